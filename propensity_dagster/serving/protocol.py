"""Uvicorn's HTTP protocol, with the head and the body of an answer in one write instead of two.

Each write is a system call and a wake-up of whoever waits for the answer: together a tenth of a request's time.
"""

import asyncio
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class _JoinedWrites:
    """A transport that holds the head of an answer until its body comes, or until the loop turns."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._call_soon = loop.call_soon
        self._head: bytes | None = None

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

    def close(self) -> None:
        """Send what is held, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head)


class JoinedWritesProtocol(HttpToolsProtocol):
    """See the module."""

    def connection_made(self, transport: Any) -> None:
        """Take the connection."""
        super().connection_made(_JoinedWrites(transport, self.loop))  # pyright: ignore[reportArgumentType]


def use_joined_writes() -> None:
    """Make it the protocol that uvicorn takes when, as BentoML does, nobody names one."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{JoinedWritesProtocol.__name__}"  # pyright: ignore
