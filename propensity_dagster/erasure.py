"""Erasing a person: from every table, file, store and log below the home folder, of every campaign.

First the tombstone, so that an ingestion beside it does not bring the person back; then one file after another, each
replaced by one rename; then a search that must find nothing. Interrupted, it is simply run again. Belongs here: where
people are. Does not: what lies outside the home folder, which is only named.
"""

# pyright: reportUnknownMemberType=false

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from csv import reader
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from propensity_dagster.campaign import ROW_NUMBER, Campaign, EventCampaign
from propensity_dagster.data.lake import Home, publishing, write_parquet
from propensity_dagster.data.objects import store_of
from propensity_dagster.data.tombstones import bury, same_key
from propensity_dagster.errors import ConfigError, StorageError
from propensity_dagster.serving.online import redis_forget, redis_has
from propensity_dagster.serving.settings import read_settings

_FILES_AT_ONCE = 2000
_BLANK = b'{"head":null,"features":[],"categories":{}'
_ONLINE = "online.sqlite"
_KEY = "key"  # of the service's log, and its table


@dataclass(frozen=True)
class Place:
    """A file that holds the person: of which campaign, which table, how many rows. Redis has no file."""

    campaign: str
    table: str
    file: Path | None
    rows: int


@dataclass
class Erasure:
    """What was found, or erased.

    Attributes:
        places: files with rows of the person.
        models: by campaign, versions that were trained on the person.
        outside: what lies outside the home folder and must be erased there, in words.
        left: rows that a search finds afterwards; None before it was made.
    """

    places: list[Place] = field(default_factory=list[Place])
    models: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    outside: list[str] = field(default_factory=list[str])
    left: int | None = None

    @property
    def rows(self) -> int:
        """Rows of all places."""
        return sum(place.rows for place in self.places)


def find_person(key: str, campaigns: Sequence[Campaign], home: Home, store: Any) -> Erasure:
    """Where a person is. Changes nothing.

    Args:
        key: of the person, as in the source.
        campaigns: all whose tables are there: what the key column is, only the campaign file says.
        home: what is searched.
        store: of the models' versions and their training snapshots.

    Raises:
        ConfigError: when there are tables of a campaign that is not among `campaigns`.
    """
    wanted = same_key(key)
    by_name = {campaign.name: campaign for campaign in campaigns}
    places = [home.root / "exports", home.predictions, home.serving]
    there = {folder.name for place in places for folder in place.glob("*") if folder.is_dir()} | home.campaigns()
    unknown = sorted(there - set(by_name))
    if unknown:
        raise ConfigError(
            f"{home.root} holds data of {', '.join(unknown)}, whose campaign file is not among those that were read: "
            "which column is the key is not known. Name the files with --campaign, or a folder with "
            "PROPENSITY_CAMPAIGNS"
        )
    found = Erasure()
    for name in sorted(there):
        campaign = by_name[name]
        columns = _key_columns(campaign)
        lake = home.lake(name)
        for table in lake.tables():
            found.places += _in_parquet(wanted, name, table, lake.files_of(table), columns)
        found.places += _in_exports(wanted, name, home, columns)
        found.places += _in_online(wanted, name, home)
        found.places += _in_log(wanted, name, home)
        found.outside += _outside(campaign)
        versions = _trained_on(campaign, found.places, store)
        if versions:
            found.models[name] = versions
    return found


def erase_person(
    key: str, campaigns: Sequence[Campaign], home: Home, store: Any, tell: Callable[[Place], None] = lambda _: None
) -> Erasure:
    """Erase a person, and prove it by another search.

    Args:
        key: of the person, as in the source.
        campaigns: all there are.
        home: what is searched.
        store: of the models.
        tell: is called after each file.

    Raises:
        StorageError: when a file cannot be replaced, or something is left; running it again continues.
    """
    wanted = same_key(key)
    found = find_person(key, campaigns, home, store)
    bury(wanted, home)
    by_name = {campaign.name: campaign for campaign in campaigns}
    # Models and training rows last: until they are gone, another run still says which models knew the person.
    for place in sorted(found.places, key=lambda p: p.table in ("training_set", "features", "reference")):
        columns = _key_columns(by_name[place.campaign])
        if place.file is None:
            redis_forget(read_settings(home.serving).online_store or "", place.campaign, wanted)
        elif place.file.suffix == ".jsonl":
            _blank_lines(wanted, place.file)
        elif place.file.suffix == ".sqlite":
            _rewrite_online(wanted, place.file)
        elif place.file.suffix == ".csv":
            _rewrite_csv(wanted, place.file, columns)
        else:
            _rewrite_parquet(wanted, place.file, columns)
        if place.table == "training_set":
            for file in home.candidates(place.campaign).glob("*.npy"):  # a row each of a table that lost some
                file.unlink()
        tell(place)
    objects = store_of(home.lakes)
    unfinished = objects.sweep() if objects else 0
    if objects:
        found.outside.append(f"working copies of {objects.url} in other homes: erase there too, or delete their lake/")
    if objects and unfinished:
        found.outside.append(
            f"{unfinished} unfinished uploads of the last day in {objects.url}: run this again tomorrow"
        )
    found.left = find_person(key, campaigns, home, store).rows
    if found.left:
        raise StorageError(
            f"{found.left} rows of the person are still there: something wrote them meanwhile; run it again"
        )
    return found


def _key_columns(campaign: Campaign) -> set[str]:
    """Names under which a table of a campaign may hold the key; none where its rows are only numbered."""
    if campaign.key == ROW_NUMBER:
        return set()
    names = {campaign.key, _KEY}
    if isinstance(campaign, EventCampaign):
        names |= {stream.key for stream in campaign.source.streams.values() if stream.key}
    return names


def _column_of(names: Sequence[str], columns: set[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _in_parquet(wanted: str, campaign: str, table: str, files: Sequence[Path], columns: set[str]) -> Iterator[Place]:
    """Files of one table that hold the key."""
    by_column: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        schema = pq.read_schema(file)
        column = _column_of(schema.names, columns)
        if column is not None:
            by_column.setdefault((column, str(schema.field(column).type)), []).append(file)
    with duckdb.connect() as connection:
        for (column, _), of_column in by_column.items():
            for start in range(0, len(of_column), _FILES_AT_ONCE):
                part = [str(file) for file in of_column[start : start + _FILES_AT_ONCE]]
                rows = connection.execute(
                    f"SELECT filename, count(*) FROM read_parquet(?, filename = true, union_by_name = true) "
                    f"WHERE {_is_key(column)} GROUP BY filename ORDER BY filename",
                    [part, wanted],
                ).fetchall()
                yield from (Place(campaign, table, Path(file), count) for file, count in rows)


def _is_key(column: str) -> str:
    """A condition with one parameter, whatever the column's type: `coerce.key_text` in DuckDB's words.

    One predicate finds and erases. Large floats are written out as integers, not with an exponent.
    """
    quoted = '"' + column.replace('"', '""') + '"'
    text = (
        f"CASE WHEN typeof({quoted}) IN ('DOUBLE', 'FLOAT') "
        f"THEN CAST(TRY_CAST({quoted} AS HUGEINT) AS VARCHAR) ELSE CAST({quoted} AS VARCHAR) END"
    )
    trimmed = f"trim({text}, E' \\t\\n\\r\\v\\f')"
    return f"regexp_replace({trimmed}, '^(-?[0-9]+)[.]0+$', '\\1') = ?"


def _in_exports(wanted: str, campaign: str, home: Home, columns: set[str]) -> Iterator[Place]:
    folder = home.root / "exports" / campaign
    yield from _in_parquet(wanted, campaign, "exports", sorted(folder.glob("*.parquet")), columns)
    for file in sorted(folder.glob("*.csv")):
        rows = int(_matches(_read_csv(file), columns, wanted).sum())
        if rows:
            yield Place(campaign, "exports", file, rows)


def _read_csv(file: Path) -> pa.Table:
    """As text throughout: 00123 is a key, and what is not of the person stays as it was written."""
    with file.open(encoding="utf-8") as lines:
        names = next(reader(lines))
    return csv.read_csv(file, convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())))


def _in_online(wanted: str, campaign: str, home: Home) -> Iterator[Place]:
    url = read_settings(home.serving).online_store
    if url is not None and redis_has(url, campaign, wanted):
        yield Place(campaign, "online features", None, 1)
    file = home.serving / campaign / _ONLINE
    if file.exists():
        connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
        try:
            (rows,) = connection.execute("SELECT count(*) FROM features WHERE key = ?", [wanted]).fetchone()
        finally:
            connection.close()
        if rows:
            yield Place(campaign, "online features", file, rows)


def _in_log(wanted: str, campaign: str, home: Home) -> Iterator[Place]:
    for file in sorted((home.predictions / campaign).rglob("*.jsonl")):
        rows = sum(1 for _ in _lines_of(wanted, file))
        if rows:
            yield Place(campaign, "log of answers", file, rows)


def _lines_of(wanted: str, file: Path) -> Iterator[tuple[int, int]]:
    """Start and length, without the end of the line, of each record of the person."""
    start, quoted = 0, json.dumps(wanted)[1:-1].encode()
    with file.open("rb") as lines:
        for line in lines:
            if quoted in line and not line.startswith(b'{"head"'):
                try:
                    record = json.loads(line)
                except ValueError:
                    record = {}
                if isinstance(record.get(_KEY), str) and same_key(record[_KEY]) == wanted:
                    yield start, len(line.rstrip(b"\n"))
            start += len(line)


def _blank_lines(wanted: str, file: Path) -> None:
    """Overwrite the lines where they stand: the service may be appending to the file, and must not lose it."""
    handle = os.open(file, os.O_WRONLY)
    try:
        for start, length in list(_lines_of(wanted, file)):
            os.pwrite(handle, _BLANK + b" " * (length - len(_BLANK) - 1) + b"}", start)
        os.fsync(handle)
    finally:
        os.close(handle)


def _rewrite_parquet(wanted: str, file: Path, columns: set[str]) -> None:
    table = pq.read_table(file)
    with publishing(file) as temporary:
        write_parquet(table.filter(pa.array(~_matches(table, columns, wanted))), temporary)


def _rewrite_csv(wanted: str, file: Path, columns: set[str]) -> None:
    table = _read_csv(file)
    with publishing(file) as temporary:
        csv.write_csv(table.filter(pa.array(~_matches(table, columns, wanted))), temporary)


def _rewrite_online(wanted: str, file: Path) -> None:
    """A copy without the row; VACUUM, so that its bytes are gone from the file as well."""
    with publishing(file) as temporary:
        temporary.write_bytes(file.read_bytes())
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.execute("DELETE FROM features WHERE key = ?", [wanted])
            connection.execute("VACUUM")
        finally:
            connection.close()


def _matches(table: pa.Table, columns: set[str], wanted: str) -> Any:
    """Which rows (n,) are the person's."""
    column = _column_of(table.column_names, columns)
    if column is None:
        return np.zeros(table.num_rows, dtype=bool)
    with duckdb.connect() as connection:
        keys = table.select([column])
        connection.register("keys", keys)
        found = connection.execute(f"SELECT coalesce({_is_key(column)}, false) AS it FROM keys", [wanted])
        return np.asarray(found.fetchnumpy()["it"], dtype=bool)


def _trained_on(campaign: Campaign, places: Sequence[Place], store: Any) -> list[str]:
    """Versions with a training or validation snapshot at which the person was there; of tables, all since the first."""
    mine = [place for place in places if place.campaign == campaign.name]
    features = [p.file for p in mine if p.table == "features" and p.file is not None]
    snapshots = {file.parent.name.removeprefix("snapshot=") for file in features}
    in_training = any(p.table == "training_set" for p in mine)
    found: list[str] = []
    for version in store.versions(campaign.name):
        used: Mapping[str, Sequence[str]] = store.evaluation(campaign.name, version.version).get("snapshots") or {}
        learnt = {*used.get("train", ()), *used.get("validate", ())}
        if learnt & snapshots or (in_training and not isinstance(campaign, EventCampaign)):
            found.append(version.version)
    return found


def _outside(campaign: Campaign) -> list[str]:
    words: list[str] = []
    if campaign.target is not None:
        words.append(f"{campaign.name}: scores in table {campaign.target.table!r} of the target database")
    for export in campaign.contacts.exports:
        if export.kind in ("table", "webhook") or export.folder is not None:
            words.append(f"{campaign.name}: contacts that were sent to {export.name!r} ({export.kind})")
    return words
