"""Uvicorn's HTTP protocol with two shortcuts, which together halve what a prediction costs.

A prediction whose body came with its head is answered where it was read: no task, no ASGI messages, no event to wait
for. Every other answer has its head and its body in one write instead of two: each is a system call, and a wake-up of
whoever waits.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

_Header = tuple[bytes, bytes]


class _Answering(Protocol):
    """What the gateway offers; see there."""

    def release_now(self, path: bytes) -> Any: ...

    def answer_now(
        self, scope: Any, release: Any, path: bytes, body: bytes, write: Callable[[int, list[_Header], bytes], None]
    ) -> None: ...


class _JoinedWrites:
    """A transport that holds the head of an answer until its body comes, or until the loop turns."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._call_soon = loop.call_soon
        self._head: bytes | None = None
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, or hold a head."""
        head = self._head
        if head is not None:
            self._head = None
            self._transport.write(head + data)
        elif data[:9] == b"HTTP/1.1 " and data[9:12] != b"100":
            self._head = data
            self._call_soon(self._flush)
        else:
            self._transport.write(data)

    def write_now(self, data: bytes) -> None:
        """Send a whole answer, after what is held."""
        self._flush()
        self._transport.write(data)

    def close(self) -> None:
        """Send what is held, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head)


class QuickProtocol(HttpToolsProtocol):
    """See the module. `gateway` is set when the worker has started."""

    gateway: _Answering | None = None
    _release: Any = None  # who answers the request that is being read, if it is answered at once
    _body = b""

    def connection_made(self, transport: Any) -> None:
        """Take the connection."""
        super().connection_made(_JoinedWrites(transport, self.loop))  # pyright: ignore[reportArgumentType]

    def data_received(self, data: bytes) -> None:
        """Read. A request that is not whole by then takes the long way, with its time limit."""
        super().data_received(data)
        if self._release is not None:
            self._release = None
            if not self.transport.is_closing():
                super().on_headers_complete()
                if self._body:
                    super().on_body(self._body)

    def on_headers_complete(self) -> None:
        """Hold a prediction for its body."""
        gateway, parser, cycle = self.gateway, self.parser, self.cycle
        if (
            gateway is not None
            and parser is not None
            and (not cycle or cycle.response_complete)
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
            and not self.expect_100_continue
            and not self.flow.write_paused
        ):
            self._release, self._body = gateway.release_now(self.url), b""
            if self._release is not None:
                self.scope["method"] = "POST"
                return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        if self._release is None:
            super().on_body(body)
        else:
            self._body += body

    def on_message_complete(self) -> None:
        """Answer what was held."""
        release, gateway = self._release, self.gateway
        if release is None or gateway is None:
            super().on_message_complete()
            return
        self._release = None
        if self.transport.is_closing():
            return
        gateway.answer_now(self.scope, release, self.url, self._body, self._send)
        self.on_response_complete()

    def _send(self, status: int, headers: list[_Header], body: bytes) -> None:
        parts = [STATUS_LINE[status]]
        closes = False
        for name, value in (*self.server_state.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
            closes = closes or name == b"connection"
        parts += (b"\r\n", body)
        self.transport.write_now(b"".join(parts))  # pyright: ignore[reportAttributeAccessIssue] ours
        if closes:
            self.transport.close()


def use_quick_protocol() -> None:
    """Make it the protocol that uvicorn takes when, as BentoML does, nobody names one."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{QuickProtocol.__name__}"  # pyright: ignore


def answer_through(gateway: _Answering) -> None:
    """Let this process's gateway answer at once."""
    QuickProtocol.gateway = gateway
