"""Real servers: the service, started as a user would and stopped with every child, and a webhook."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Service:
    """`propensity serve` on a home, or another command that starts the same service."""

    home: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] | None = None
    cwd: Path | None = None

    def __enter__(self) -> "Service":
        self.port = free_port()
        self.log = self.home.parent / f"service-{self.port}.log"
        plain = [sys.executable, "-m", "propensity_dagster.cli", "serve", *self.arguments]
        command = [*(self.command or plain), "--port", str(self.port)]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PROPENSITY_")}
        environment = {**inherited, "PROPENSITY_HOME": str(self.home), "PROPENSITY_WORKERS": "2", **self.environment}
        started = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.cwd, stdout=log, stderr=log, start_new_session=True
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        while self.process.poll() is None and time.monotonic() - started < 60:
            with contextlib.suppress(httpx.HTTPError):
                if self.client.get("/livez").status_code == 200:
                    self.seconds_to_ready = time.monotonic() - started
                    return self
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"the service did not start:\n{self.text()}")

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self.stop()

    def stop(self, number: int = signal.SIGINT) -> None:
        """A normal stop; every process of it must be gone."""
        started = self.workers()
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"the service did not stop:\n{self.text()}") from None
        deadline = time.monotonic() + 10
        while any(map(is_running, started)) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [pid for pid in started if is_running(pid)]
        self.kill(left)
        assert not left, f"processes that outlived the service: {left}"

    def kill(self, others: list[int] | None = None) -> None:
        for pid in [self.process.pid, *(self.workers() if others is None else others)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def workers(self) -> list[int]:
        """Its worker processes: children with sessions of their own."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found.append(int(stat.parent.name))
        return found

    def text(self) -> str:
        """What it wrote to its log."""
        return self.log.read_text()

    def post(self, path: str, content: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=content, **options)

    def ok(self, path: str, content: Any, **options: Any) -> Any:
        answer = self.post(path, content, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 10.0) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


class Webhook:
    """Keeps what it is sent; answers 500 while `down`."""

    def __init__(self):
        self.messages, self.down = [], False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not outer.down:
                    outer.messages.append(body)
                self.send_response(500 if outer.down else 200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"json://127.0.0.1:{self.server.server_port}/"

    @property
    def titles(self):
        return [message["title"] for message in self.messages]
