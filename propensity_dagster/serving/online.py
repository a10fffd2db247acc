"""Features of known customers, published with each night's snapshot: a SQLite file, or Redis.

Rows are MessagePack arrays in the order of the columns that the facts list. Both sides are here, so that they agree.
"""

import asyncio
import logging
import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from propensity_dagster.errors import ConfigError

logger = logging.getLogger("propensity.serving")

FILE = "online.sqlite"
_CHUNK = 5_000
_OLD_GENERATION_SECONDS = 600
_REDIS_SECONDS = 1.0
_FACTS_SECONDS = 1.0

_decode = msgspec.msgpack.Decoder(list[Any]).decode
_encode = msgspec.msgpack.Encoder().encode


class Facts(msgspec.Struct, frozen=True):
    """What was published: the snapshot, when, how many rows, and the columns of a row."""

    snapshot: str
    published_at: float
    rows: int
    columns: tuple[str, ...]
    generation: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of the customers asked for, in the order of `facts.columns`; None for one that is unknown."""

    facts: Facts
    rows: Sequence[Sequence[Any] | None]


class OnlineUnavailableError(Exception):
    """The store did not answer."""


class OnlineStore(Protocol):
    """Where features of known customers are read. One that `waits` needs an event loop and a task to be read in."""

    waits: bool

    async def find(self, keys: Sequence[str]) -> Found | None:
        """Their rows; None when nothing has been published.

        Raises:
            OnlineUnavailableError: when the store does not answer.
        """
        ...


class SqliteStore:
    """Reads a published file. It never changes: a new snapshot is a new file in its place."""

    waits = False

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True, check_same_thread=False)
        (content,) = self._connection.execute("SELECT content FROM facts").fetchone()
        self.facts = msgspec.json.decode(content, type=Facts)

    async def find(self, keys: Sequence[str]) -> Found | None:
        """Some microseconds a key: too little for a thread of its own."""
        try:
            rows = [self._row(key) for key in keys]
        except sqlite3.Error as error:
            raise OnlineUnavailableError(type(error).__name__) from None
        return Found(self.facts, rows)

    def _row(self, key: str) -> Sequence[Any] | None:
        found = self._connection.execute("SELECT row FROM features WHERE key = ?", (key,)).fetchone()
        return _decode(found[0]) if found else None


class RedisStore:
    """Reads a hash per snapshot; a pointer says which. Made for the event loop of one worker."""

    waits = True

    def __init__(self, url: str, campaign: str) -> None:
        import redis.asyncio

        seconds = _REDIS_SECONDS
        self._client: Any = redis.asyncio.Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds)
        self._campaign = campaign
        self._facts: tuple[float, Facts | None] = (float("-inf"), None)

    async def find(self, keys: Sequence[str]) -> Found | None:
        """One round trip, and one a second for the pointer."""
        import redis.exceptions

        try:
            facts = await self._newest()
            if facts is None:
                return None
            rows = await self._client.hmget(_hash(self._campaign, facts.generation), list(keys))
        except (TimeoutError, redis.exceptions.RedisError, OSError) as error:
            raise OnlineUnavailableError(type(error).__name__) from None
        return Found(facts, [_decode(row) if row is not None else None for row in rows])

    async def _newest(self) -> Facts | None:
        now = asyncio.get_running_loop().time()
        if now - self._facts[0] > _FACTS_SECONDS:
            content = await self._client.get(_pointer(self._campaign))
            self._facts = (now, msgspec.json.decode(content, type=Facts) if content else None)
        return self._facts[1]


def write_sqlite(file: Path, facts: Facts, rows: Iterable[tuple[str, Sequence[Any]]]) -> int:
    """Write a new file, which the caller publishes by rename. Returns the number of rows."""
    connection = sqlite3.connect(file)
    try:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")  # the publisher syncs the whole file
        connection.execute("CREATE TABLE features (key TEXT PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID")
        connection.execute("CREATE TABLE facts (content BLOB NOT NULL)")
        cursor = connection.executemany("INSERT INTO features VALUES (?, ?)", ((k, _encode(row)) for k, row in rows))
        written = cursor.rowcount
        connection.execute("INSERT INTO facts VALUES (?)", (msgspec.json.encode(facts),))
        connection.commit()
    finally:
        connection.close()
    return max(written, 0)


def write_redis(url: str, campaign: str, facts: Facts, rows: Iterable[tuple[str, Sequence[Any]]]) -> int:
    """Write a new hash, then point at it. The one before stays long enough for those who still read it."""
    import redis

    client: Any = redis.Redis.from_url(url)
    generation = f"{facts.snapshot}-{facts.published_at:.3f}-{os.getpid()}"
    name = _hash(campaign, generation)
    written = 0
    try:
        chunk: dict[str, bytes] = {}
        for key, row in rows:
            chunk[key] = _encode(row)
            if len(chunk) == _CHUNK:
                client.hset(name, mapping=chunk)
                written, chunk = written + len(chunk), {}
        if chunk:
            client.hset(name, mapping=chunk)
            written += len(chunk)
        before = client.get(_pointer(campaign))
        client.set(_pointer(campaign), msgspec.json.encode(msgspec.structs.replace(facts, generation=generation)))
        if before:
            old = msgspec.json.decode(before, type=Facts).generation
            client.expire(_hash(campaign, old), _OLD_GENERATION_SECONDS)
    except BaseException:
        client.expire(name, _OLD_GENERATION_SECONDS)  # of a writer that did not finish
        raise
    finally:
        client.close()
    return written


def redis_has(url: str, campaign: str, key: str) -> bool:
    """Whether Redis holds features of a customer."""
    import redis

    client: Any = redis.Redis.from_url(url)
    try:
        content = client.get(_pointer(campaign))
        generation = msgspec.json.decode(content, type=Facts).generation if content else None
        return bool(generation and client.hexists(_hash(campaign, generation), key))
    finally:
        client.close()


def redis_forget(url: str, campaign: str, key: str) -> None:
    """Remove a customer from every generation that Redis holds."""
    import redis

    client: Any = redis.Redis.from_url(url)
    try:
        for name in client.scan_iter(_hash(campaign, "*")):
            client.hdel(name, key)
    finally:
        client.close()


def sqlite_facts(file: Path) -> Facts | None:
    """What a file holds, if there is one that can be read."""
    try:
        return open_sqlite(file).facts if file.exists() else None
    except ConfigError as error:
        logger.warning("%s; it is replaced", error)
        return None


def open_sqlite(file: Path) -> SqliteStore:
    """The store of a published file.

    Raises:
        ConfigError: when it is no such file.
    """
    try:
        return SqliteStore(file)
    except (sqlite3.Error, msgspec.MsgspecError, TypeError) as error:
        raise ConfigError(f"{file}: not a file of online features: {error}") from None


def redis_facts(url: str, campaign: str) -> Facts | None:
    """What Redis holds, if anything was published."""
    import redis

    client: Any = redis.Redis.from_url(url)
    try:
        content = client.get(_pointer(campaign))
    finally:
        client.close()
    return msgspec.json.decode(content, type=Facts) if content else None


def _hash(campaign: str, generation: str) -> str:
    return f"propensity:{campaign}:features:{generation}"


def _pointer(campaign: str) -> str:
    return f"propensity:{campaign}:online"
