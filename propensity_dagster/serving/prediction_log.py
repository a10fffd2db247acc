"""The log of answers: JSON lines in `<predictions>/<campaign>/day=YYYY-MM-DD/<worker>-<number>.jsonl`.

Appending never blocks an answer: records wait in a bounded buffer, a thread writes them. What does not fit is counted
and left out. A normal stop writes everything. Files are rotated by day (UTC) and size; each names the packages whose
records it holds, with their features, before the first such record.
"""

import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from propensity_dagster.serving.packages import Package

logger = logging.getLogger("propensity.predictions")

MAX_BUFFER_BYTES = 8 << 20
MAX_FILE_BYTES = 64 << 20
_FLUSH_SECONDS = 0.1
_DAY = 86_400

_encode = msgspec.json.Encoder().encode


class Record(msgspec.Struct, gc=False):
    """One answer. `features` are the model's row in its order; a category is its code, a missing value null."""

    time: float
    request_id: str
    key: str | None
    package: str
    variant: str
    endpoint: str
    probability: float
    features: list[float]
    unseen: list[str]
    shadow: dict[str, Any] | None = None


class PredictionLog:
    """One worker's log. `append` is for the event loop alone; `written` and `dropped` count records."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._worker = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() // 1_000_000}"
        self._waiting: list[tuple[str, Package, float, bytes]] = []
        self._bytes = 0
        self._files: dict[str, _File] = {}
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.written = self.dropped = self.failures = 0
        self._thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)
        self._thread.start()

    def append(self, campaign: str, package: Package, record: Record) -> None:
        """Keep one answer, or count it as dropped when the buffer is full."""
        line = _encode(record)
        if self._bytes + len(line) > MAX_BUFFER_BYTES:
            self.dropped += 1
            return
        with self._lock:  # held elsewhere only to take the list
            self._waiting.append((campaign, package, record.time, line))
            self._bytes += len(line)

    def close(self) -> None:
        """Write what waits, and stop."""
        self._stopping.set()
        self._thread.join()
        self._flush()
        for file in self._files.values():
            file.close()

    def _run(self) -> None:
        while not self._stopping.wait(_FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, []
        if not taken:
            return
        groups: dict[tuple[str, int], list[tuple[Package, bytes]]] = {}
        for campaign, package, at, line in taken:
            groups.setdefault((campaign, int(at // _DAY)), []).append((package, line))
        for (campaign, day), lines in groups.items():
            try:
                self._file(campaign, day).write(lines)
                self.written += len(lines)
            except OSError as error:
                self._abandon(campaign)
                self.failures += 1
                self.dropped += len(lines)
                logger.error("predictions of %s: %d not written: %s", campaign, len(lines), error.strerror)
        with self._lock:
            self._bytes -= sum(len(line) for _, _, _, line in taken)

    def _file(self, campaign: str, day: int) -> "_File":
        file = self._files.get(campaign)
        if file is not None and (file.day != day or file.size >= MAX_FILE_BYTES):
            file.close()
            file = None
        if file is None:
            number = self.failures + self.written
            place = self._folder / campaign / f"day={time.strftime('%Y-%m-%d', time.gmtime(day * _DAY))}"
            file = self._files[campaign] = _File(place / f"{self._worker}-{number}.jsonl", day)
        return file

    def _abandon(self, campaign: str) -> None:
        """After a failed write the file may end in half a line, which readers skip; the next write opens another."""
        file = self._files.pop(campaign, None)
        if file is not None:
            file.close()


class _File:
    """A file that is only ever appended to."""

    def __init__(self, path: Path, day: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        self.day, self.size = day, os.fstat(self._handle).st_size
        self._named: set[str] = set()

    def write(self, lines: list[tuple[Package, bytes]]) -> None:
        """Append records, after the head of each package that the file does not name yet."""
        parts: list[bytes] = []
        for package, line in lines:
            if package.name not in self._named:
                self._named.add(package.name)
                parts.append(_head(package))
            parts.append(line)
        content = memoryview(b"\n".join([*parts, b""]))
        while content:
            written = os.write(self._handle, content)
            self.size += written
            content = content[written:]

    def close(self) -> None:
        os.close(self._handle)


def _head(package: Package) -> bytes:
    inputs = package.inputs
    return _encode(
        {
            "head": package.name,
            "campaign": package.content["campaign"],
            "model_version": package.version,
            "key": package.content["key"],
            "features": [field.feature for field in inputs],
            "categories": {f.feature: f.categories for f in inputs if f.kind == "category"},
        }
    )
