"""Writing scores to a table of a database, one snapshot in one transaction.

The table is created if it is missing, with the key and the snapshot as its primary key. Rows of the snapshot are
upserted, and those that an earlier run left and this one does not have are removed: afterwards the table holds
that snapshot as the lake does. Other snapshots are not touched.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.connections import (
    POSTGRES,
    SQLITE,
    connect_postgres,
    database_file,
    expand_variables,
    is_database_error,
    require_known_scheme,
    writing,
)
from propensity_dagster.data.engine import BATCH_ROWS
from propensity_dagster.errors import ConfigError

_STAGED = "propensity_staged_scores"


@dataclass(frozen=True)
class _Column:
    name: str
    sql_type: str


def deliver_scores(campaign: Campaign, snapshot: date, scores: Path) -> int:
    """Write the scores of one snapshot to the campaign's target. Returns the rows the table then holds of it.

    Raises:
        ConfigError: when there is no target, its kind is unknown, or the table belongs to another campaign.
        SourceError: when the database refuses or goes away; nothing has changed then.
    """
    target = campaign.target
    if target is None:
        raise ConfigError(f"{campaign.file}: there is no target to deliver to")
    connection = expand_variables(campaign, "target.connection", target.connection)
    require_known_scheme(campaign, "target.connection", connection)
    where = f"{campaign.file}: target {target.table!r}"
    with writing(where):
        if connection.startswith(POSTGRES):
            return _deliver_postgres(campaign, connection, snapshot, scores, where)
        path = database_file(campaign, "target.connection", connection)
        if connection.startswith(SQLITE):
            return _deliver_sqlite(campaign, path, snapshot, scores, where)
        return _deliver_duckdb(campaign, path, snapshot, scores, where)


def _deliver_postgres(campaign: Campaign, connection: str, snapshot: date, scores: Path, where: str) -> int:
    columns = _columns(scores, {"text": "TEXT", "float": "DOUBLE PRECISION", "int": "INTEGER", "time": "TIMESTAMP"})
    backend = connect_postgres(connection, read_only=False)
    try:
        with backend.con.transaction(), backend.con.cursor() as cursor:
            cursor.execute(_create(campaign, columns))
            cursor.execute(f"CREATE TEMP TABLE {_STAGED} ({_definitions(columns)}) ON COMMIT DROP")
            with cursor.copy(f"COPY {_STAGED} ({_names(columns)}) FROM STDIN") as copy:
                for rows in _rows(scores):
                    for row in rows:
                        copy.write_row(row)
            _require_own(campaign, lambda sql: cursor.execute(sql).fetchone(), where)
            cursor.execute(_delete(campaign, "%s"), [snapshot])
            cursor.execute(_upsert(campaign, columns))
            (rows,) = cursor.execute(_count(campaign, "%s"), [snapshot]).fetchone()
        return rows
    finally:
        backend.disconnect()


def _deliver_sqlite(campaign: Campaign, path: Path, snapshot: date, scores: Path, where: str) -> int:
    columns = _columns(scores, {"text": "TEXT", "float": "REAL", "int": "INTEGER", "time": "TEXT"})
    connection = sqlite3.connect(path, isolation_level=None, timeout=60)
    try:
        connection.execute(f"CREATE TEMP TABLE {_STAGED} ({_definitions(columns)})")
        places = ", ".join("?" * len(columns))
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_create(campaign, columns))
        for rows in _rows(scores):
            texts = ([str(v) if hasattr(v, "isoformat") else v for v in row] for row in rows)
            connection.executemany(f"INSERT INTO {_STAGED} VALUES ({places})", texts)
        _require_own(campaign, lambda sql: connection.execute(sql).fetchone(), where)
        instant = f"{snapshot} 00:00:00"
        connection.execute(_delete(campaign, "?"), [instant])
        connection.execute(_upsert(campaign, columns))
        (rows,) = connection.execute(_count(campaign, "?"), [instant]).fetchone()
        connection.execute("COMMIT")
        return rows
    finally:
        connection.close()  # without a commit, everything is rolled back


def _deliver_duckdb(campaign: Campaign, path: Path, snapshot: date, scores: Path, where: str) -> int:
    columns = _columns(scores, {"text": "VARCHAR", "float": "DOUBLE", "int": "INTEGER", "time": "TIMESTAMP"})
    connection = duckdb.connect(str(path))
    try:
        connection.execute("BEGIN")
        connection.execute(_create(campaign, columns))
        connection.execute(f"CREATE TEMP TABLE {_STAGED} ({_definitions(columns)})")
        connection.execute(f"INSERT INTO {_STAGED} SELECT {_names(columns)} FROM read_parquet(?)", [str(scores)])
        _require_own(campaign, lambda sql: connection.execute(sql).fetchone(), where)
        connection.execute(_delete(campaign, "?"), [snapshot])
        connection.execute(_upsert(campaign, columns))
        found = connection.execute(_count(campaign, "?"), [snapshot]).fetchone()
        connection.execute(f"DROP TABLE {_STAGED}")
        connection.execute("COMMIT")
        return found[0] if found else 0
    finally:
        connection.close()


def _columns(scores: Path, types: dict[str, str]) -> list[_Column]:
    def kind(dtype: pa.DataType) -> str:
        if pa.types.is_floating(dtype):
            return "float"
        if pa.types.is_integer(dtype):
            return "int"
        return "time" if pa.types.is_timestamp(dtype) else "text"

    return [_Column(field.name, types[kind(field.type)]) for field in pq.read_schema(scores)]


def _rows(scores: Path) -> Iterator[Sequence[tuple[Any, ...]]]:
    for batch in pq.ParquetFile(scores).iter_batches(batch_size=BATCH_ROWS):
        yield list(zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _require_own(campaign: Campaign, first_row: Any, where: str) -> None:
    """Two campaigns in one table would overwrite each other's customers."""
    try:
        found = first_row(f"SELECT campaign FROM {_table(campaign)} WHERE campaign <> '{campaign.name}' LIMIT 1")
    except Exception as error:  # each database's driver has its own; what is none of theirs is raised again
        if is_database_error(error) or isinstance(error, duckdb.Error):
            raise ConfigError(f"{where}: is a table of something else; scores need one of their own") from None
        raise
    if found is not None:
        raise ConfigError(f"{where}: holds the scores of campaign {found[0]!r}; give each campaign a table of its own")


def _create(campaign: Campaign, columns: list[_Column]) -> str:
    key = f'PRIMARY KEY ("{campaign.key}", "snapshot")'
    return f"CREATE TABLE IF NOT EXISTS {_table(campaign)} ({_definitions(columns)}, {key})"


def _delete(campaign: Campaign, place: str) -> str:
    table, key = _table(campaign), f'"{campaign.key}"'
    staged = f"SELECT 1 FROM {_STAGED} WHERE {_STAGED}.{key} = {table}.{key}"
    return f'DELETE FROM {table} WHERE "snapshot" = {place} AND NOT EXISTS ({staged})'


def _upsert(campaign: Campaign, columns: list[_Column]) -> str:
    changed = ", ".join(
        f'"{c.name}" = excluded."{c.name}"' for c in columns if c.name not in (campaign.key, "snapshot")
    )
    return (
        f"INSERT INTO {_table(campaign)} ({_names(columns)}) SELECT {_names(columns)} FROM {_STAGED} WHERE true "
        f'ON CONFLICT ("{campaign.key}", "snapshot") DO UPDATE SET {changed}'
    )


def _count(campaign: Campaign, place: str) -> str:
    return f'SELECT count(*) FROM {_table(campaign)} WHERE "snapshot" = {place}'


def _definitions(columns: list[_Column]) -> str:
    return ", ".join(f'"{c.name}" {c.sql_type}' for c in columns)


def _names(columns: list[_Column]) -> str:
    return ", ".join(f'"{c.name}"' for c in columns)


def _table(campaign: Campaign) -> str:
    assert campaign.target is not None
    return f'"{campaign.target.table}"'
