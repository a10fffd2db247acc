"""What a connection of a campaign file means. Belongs here: variables, paths, databases, and their errors.

A connection is a folder of parquet or CSV files (`orders.parquet`, `orders.csv`, or a folder `orders/`),
`duckdb://file`, `sqlite://file`, `postgres://user:${PASSWORD}@host:port/database`, or `synthetic://world`.
"""

import os
import re
import sqlite3
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import duckdb
import ibis

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.engine import Engine
from propensity_dagster.errors import ConfigError, DataContractError, PropensityError, SourceError
from propensity_dagster.synthetic import is_synthetic

DUCKDB, SQLITE, POSTGRES = "duckdb://", "sqlite://", "postgres://"
DATABASES = (DUCKDB, SQLITE, POSTGRES)

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_IN_THE_URL = ("host", "port", "user", "password", "database", "dbname", "options", "connect_timeout")
_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]*@")


def source_connection(campaign: Campaign) -> str:
    """The connection of the source, with variables from the environment."""
    source = campaign.source
    connection = source.connection or getattr(source, "path", None) or ""
    return expand_variables(campaign, "source.connection", connection)


def expand_variables(campaign: Campaign, where: str, connection: str) -> str:
    """A connection with ${NAME} or ${NAME:-default} taken from the environment.

    Raises:
        ConfigError: for a variable that is not set and has no default.
    """

    def value(match: re.Match[str]) -> str:
        name: str = match.group(1)
        default: str | None = match.group(2)
        found = os.environ.get(name) or default
        if found is None:
            raise ConfigError(f"{campaign.file}: {where}: the environment variable {name} is not set")
        return found

    expanded = _VARIABLE.sub(value, connection)
    return re.sub(r"^postgresql://", POSTGRES, expanded)


def is_database(connection: str) -> bool:
    """Whether a connection names a database, and not files."""
    return connection.startswith(DATABASES)


def require_known_scheme(campaign: Campaign, where: str, connection: str) -> None:
    """Raise for a connection of an unknown kind.

    Raises:
        ConfigError: naming the kinds there are.
    """
    if "://" in connection and not is_database(connection) and not is_synthetic(connection):
        raise ConfigError(
            f"{campaign.file}: {where}: unknown kind {connection.partition('://')[0]!r}; allowed are a folder of "
            "parquet or CSV files, duckdb://, sqlite://, postgres:// and synthetic://"
        )


def resolve_path(campaign: Campaign, where: str, path: str) -> Path:
    """A path of the campaign file: beside the file first, then below the working directory.

    Raises:
        ConfigError: when it is at neither place.
    """
    tried = [(base / path).resolve() for base in (campaign.file.parent, Path.cwd())]
    for found in tried:
        if found.exists():
            return found
    raise ConfigError(f"{campaign.file}: {where}: {path!r} is not there; tried {tried[0]} and {tried[1]}")


def open_database(campaign: Campaign, where: str, connection: str, engine: Engine) -> Any:
    """An Ibis backend for reading; DuckDB files are attached to the engine itself.

    Raises:
        ConfigError: when the file is not there, or a driver is not installed.
        SourceError: when the server cannot be reached.
    """
    if connection.startswith(POSTGRES):
        return engine.database(connection, lambda: connect_postgres(connection, read_only=True))
    path = resolve_path(campaign, where, re.sub(r"^\w+://", "", connection))
    if connection.startswith(SQLITE):
        return engine.database(connection, lambda: _open_sqlite(path))
    quoted = str(path).replace("'", "''")
    engine.local.backend.raw_sql(f"ATTACH IF NOT EXISTS '{quoted}' AS {attached_name(connection)} (READ_ONLY)")
    return engine.local.backend


def attached_name(connection: str) -> str:
    """The name that a DuckDB file has in the engine: a campaign may read several."""
    return f"source_{zlib.crc32(connection.encode()):08x}"


def database_table(campaign: Campaign, where: str, connection: str, table: str, engine: Engine) -> ibis.Table:
    """A table of a database; `schema.table` names one outside the default schema.

    Raises:
        ConfigError: when it is not there, listing those that are.
    """
    backend = open_database(campaign, where, connection, engine)
    schema, _, name = table.rpartition(".")
    place: Any = schema or None
    if connection.startswith(DUCKDB):
        place = (attached_name(connection), schema or "main")
    names = backend.list_tables(database=place) if place else backend.list_tables()
    if name not in names:
        raise ConfigError(f"{campaign.file}: table {table!r} is not in the database; there are {_some(names)}")
    return backend.table(name, database=place) if place else backend.table(name)


def connect_postgres(connection: str, *, read_only: bool) -> Any:
    """An Ibis backend on a Postgres server, in UTC.

    Raises:
        ConfigError: when the driver is not installed.
    """
    try:
        import psycopg  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError(
            "postgres:// needs the Postgres driver: pip install 'propensity_dagster[postgres]'"
        ) from error
    url = urlsplit(connection)
    settings = {"default_transaction_read_only": "on" if read_only else "off", "timezone": "UTC"}
    return ibis.postgres.connect(
        host=url.hostname or "localhost",
        port=url.port or 5432,
        user=unquote(url.username) if url.username else None,
        password=unquote(url.password) if url.password else None,
        database=url.path.lstrip("/") or None,
        connect_timeout=10,
        options=" ".join(f"-c {k}={v}" for k, v in settings.items()),
        **{name: value for name, value in parse_qsl(url.query) if name not in _IN_THE_URL},
    )


@contextmanager
def reading(what: str) -> Generator[None]:
    """Turn a failing read into a SourceError, which Dagster tries again. Passwords never get into a message.

    Raises:
        SourceError: for an input or output error inside the block.
        DataContractError: for a value that an expression of the campaign file cannot compute.
    """
    try:
        yield
    except (PropensityError, duckdb.OutOfMemoryException):
        raise
    except Exception as error:  # each database's driver has its own; what is none of theirs is raised again
        reason = redacted(" ".join(str(error).split()))[:400]
        if isinstance(error, OSError | duckdb.IOException | duckdb.ConnectionException) or is_database_error(error):
            raise SourceError(f"{what}: cannot be read: {reason}") from None
        if isinstance(error, duckdb.Error | UnicodeError):
            raise DataContractError(f"{what}: {reason}") from None
        raise


@contextmanager
def writing(what: str) -> Generator[None]:
    """Turn a failing write to a database into a SourceError. Passwords never get into a message.

    Raises:
        SourceError: when the database refuses or goes away inside the block.
    """
    try:
        yield
    except Exception as error:  # as above
        if is_database_error(error) or isinstance(error, duckdb.Error | OSError):
            reason = redacted(" ".join(str(error).split()))[:400]
            raise SourceError(f"{what}: cannot be written: {reason}") from None
        raise


def database_file(campaign: Campaign, where: str, connection: str) -> Path:
    """File of a SQLite or DuckDB database to write to. It is made where it is missing, but not its folder.

    Raises:
        ConfigError: when there is no such folder, or the connection is of another kind.
    """
    for scheme in (SQLITE, DUCKDB):
        if connection.startswith(scheme):
            path = (campaign.file.parent / connection.removeprefix(scheme)).resolve()
            if not path.parent.is_dir():
                raise ConfigError(f"{campaign.file}: {where}: there is no folder {path.parent}")
            return path
    raise ConfigError(f"{campaign.file}: {where}: must be duckdb://, sqlite:// or postgres://")


def is_database_error(error: Exception) -> bool:
    """Whether a database, and not our code, raised it. The driver of Postgres need not be installed."""
    return isinstance(error, sqlite3.Error) or any(c.__module__.startswith("psycopg") for c in type(error).__mro__)


def redacted(text: str) -> str:
    """The text with the password of every URL in it blotted out."""
    return _PASSWORD.sub(r"\1***@", text)


def _open_sqlite(path: Path) -> Any:
    return ibis.sqlite.from_connection(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True))


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:20]) or "none"
