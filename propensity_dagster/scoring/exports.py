"""Sending an audience: files, a table of a database, a webhook. What was sent once is not sent again.

Contacts go in batches. A batch is written down before it is sent and marked afterwards, so that a killed export sends
the same batch under the same idempotency key, and nothing else twice. Consent and suppression are asked again just
before: whoever withdrew since the audience was chosen is left out, for good. Belongs here: the journal and the four
places. Does not: who is in the audience.
"""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from propensity_dagster.campaign import Campaign
from propensity_dagster.campaign_sections import Export
from propensity_dagster.data.connections import (
    POSTGRES,
    SQLITE,
    connect_postgres,
    database_file,
    expand_variables,
    require_known_scheme,
    writing,
)
from propensity_dagster.data.days import pc
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home, locked, publish_table, publishing, write_parquet
from propensity_dagster.data.sources import campaign_calendar
from propensity_dagster.errors import ConfigError, DataContractError, SourceError
from propensity_dagster.experiments.assignment import assign
from propensity_dagster.experiments.measurement import require_unchanged
from propensity_dagster.scoring.audiences import AUDIENCE, CONTACT, EXPORTED, RANDOM, SENDING, SENT, WITHDRAWN
from propensity_dagster.scoring.batch import SCORES
from propensity_dagster.scoring.permission import permission

logger = logging.getLogger(__name__)

_LIVE_DAYS = 7
_TRIES, _BACKOFF, _TIMEOUT = 4, 0.5, 30
_BUSY = (429, 500, 502, 503, 504)
_STATE = "state"
_SQL_TYPES = {"string": "TEXT", "double": "DOUBLE PRECISION", "int8": "INTEGER", "timestamp[us]": "TIMESTAMP"}


@dataclass(frozen=True)
class ExportReport:
    """What one export did: contacts sent now, sent before, and left out because consent was withdrawn since."""

    sent: int
    before: int
    withdrawn: int


def export_problem(campaign: Campaign, snapshot: date, home: Home, now: datetime) -> str | None:
    """Why the audience of a snapshot must not be sent any more; None if it may.

    A backfill makes audiences of the past: nobody is contacted for what was true a year ago.
    """
    scored = home.lake(campaign.name).partitions(SCORES, "snapshot")
    if scored and snapshot < scored[-1]:
        return f"snapshot {snapshot} is not the newest one that was scored, which is {scored[-1]}"
    if campaign_calendar(campaign).last is None and now.date() - snapshot > timedelta(days=_LIVE_DAYS):
        return f"snapshot {snapshot} is more than {_LIVE_DAYS} days old"
    return None


def export_audience(
    campaign: Campaign, export: Export, snapshot: date, home: Home, engine: Engine, now: datetime
) -> ExportReport:
    """Send what has not been sent yet of the audience of a snapshot to one place.

    Raises:
        DataContractError: when there is no audience, it is too old to be sent, or the consents are stale.
        ConfigError: when a variable, folder or table is missing.
        SourceError: when the place refuses or cannot be reached; what was sent so far is written down.
    """
    lake = home.lake(campaign.name)
    audience = pq.read_table(lake.existing_partition(AUDIENCE, "snapshot", snapshot))
    problem = export_problem(campaign, snapshot, home, now)
    if problem:
        raise DataContractError(f"{campaign.name}: the audience is not sent: {problem}")
    contacts = audience.filter(pc.is_in(audience["group"], pa.array([CONTACT, RANDOM]))).drop_columns("group")
    contacts = _with_variants(campaign, snapshot, contacts, home)
    folder = lake.root / EXPORTED / export.name / f"snapshot={snapshot}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        earlier = lake.glob(f"{EXPORTED}/{export.name}/snapshot={snapshot}/batch-*.parquet")
        batches, before = _batches(campaign, export, contacts, folder, earlier)
        sent = withdrawn = 0
        send = _sender(campaign, export, snapshot, home)
        may = permission(campaign, contacts[campaign.key].combine_chunks(), _channels(campaign), home, engine, now)
        for file, batch in batches:
            at: Any = pc.index_in(batch[campaign.key].combine_chunks(), contacts[campaign.key].combine_chunks())
            column = np.array([_place(campaign, name) for name in batch["channel"].to_pylist()], dtype=int)
            fine = may.allowed[np.asarray(at), column]
            if not file.exists():
                publish_table(_marked(batch, np.full(len(fine), SENDING)), file)
            send(int(file.stem.removeprefix("batch-")), batch.filter(pa.array(fine)))
            publish_table(_marked(batch, np.where(fine, SENT, WITHDRAWN)), file)
            sent, withdrawn = sent + int(fine.sum()), withdrawn + int((~fine).sum())
    logger.info("export %s %s: %s sent, %s before", export.name, snapshot, f"{sent:,}", f"{before:,}")
    return ExportReport(sent, before, withdrawn)


def contact_id(campaign: str, snapshot: date, key: str, channel: str) -> str:
    """The same for the same contact, whenever it is sent: a receiver that has it already may drop it."""
    return hashlib.sha256(f"{campaign}\n{snapshot}\n{key}\n{channel}".encode()).hexdigest()[:32]


def _with_variants(campaign: Campaign, snapshot: date, contacts: pa.Table, home: Home) -> pa.Table:
    """A column `experiment_<name>` for each experiment on this audience: whoever sends must know who gets what.

    Raises:
        ConfigError: when an experiment was changed after its start: nobody is sent another variant.
    """
    for name, experiment in campaign.experiments.items():
        if experiment.units == AUDIENCE and experiment.starts <= snapshot < experiment.ends:
            require_unchanged(campaign, name, home)
            variants = assign(name, experiment, contacts[campaign.key].to_pylist())
            contacts = contacts.append_column(f"experiment_{name}", pa.array(variants, pa.string()))
    return contacts


def _place(campaign: Campaign, channel: str) -> int:
    channels = _channels(campaign)
    if channel not in channels:
        raise DataContractError(
            f"{campaign.file}: contacts.channels: the audience was chosen with the channel {channel!r}, which is not "
            f"there any more; there are {', '.join(channels)}"
        )
    return channels.index(channel)


def _channels(campaign: Campaign) -> list[str]:
    return list(campaign.contacts.channels) or ["contact"]


def _batches(
    campaign: Campaign, export: Export, contacts: pa.Table, folder: Path, files: Sequence[Path]
) -> tuple[list[tuple[Path, pa.Table]], int]:
    """What is to be sent, the interrupted batches first; and how many contacts are done with."""
    found, before, known = [], 0, []
    for file in files:
        batch = pq.read_table(file)
        known.append(batch[campaign.key].combine_chunks())
        if batch.num_rows and batch[_STATE][0].as_py() == SENDING:
            found.append((file, batch.drop_columns(_STATE)))
        else:
            before += batch.num_rows
    keys = pa.concat_arrays(known) if known else pa.array([], pa.string())
    rest = contacts.filter(pc.invert(pc.is_in(contacts[campaign.key], keys)))
    size = export.batch if export.kind == "webhook" else max(rest.num_rows, 1)
    for i, start in enumerate(range(0, rest.num_rows, size), start=len(files) + 1):
        found.append((folder / f"batch-{i:06d}.parquet", rest.slice(start, size)))
    return found, before


def _marked(batch: pa.Table, state: Any) -> pa.Table:
    return batch.append_column(_STATE, pa.array(state.astype(object), pa.string()))


def _sender(campaign: Campaign, export: Export, snapshot: date, home: Home) -> Callable[[int, pa.Table], None]:
    where = f"contacts.exports.{export.name}"
    if export.kind == "webhook":
        return _webhook(campaign, export, snapshot, where)
    if export.kind == "table":
        return _table(campaign, export, where)
    return _file(campaign, export, snapshot, home)


def _file(campaign: Campaign, export: Export, snapshot: date, home: Home) -> Callable[[int, pa.Table], None]:
    """One file a batch: what a later export adds gets a number, and nobody is in two files."""
    folder = home.root / "exports" / campaign.name
    if export.folder is not None:
        folder = (campaign.file.parent / export.folder).resolve()
        if not folder.is_dir():
            raise ConfigError(f"{campaign.file}: contacts.exports.{export.name}.folder: there is no folder {folder}")

    def send(number: int, batch: pa.Table) -> None:
        part = f"_{number}" if number > 1 else ""
        with publishing(folder / f"{campaign.name}_{snapshot}_{export.name}{part}.{export.kind}") as temporary:
            if export.kind == "parquet":
                write_parquet(batch, temporary)
            else:
                csv.write_csv(batch, temporary)

    return send


def _table(campaign: Campaign, export: Export, where: str) -> Callable[[int, pa.Table], None]:
    """Rows that are there already stay; a batch is one transaction."""
    connection = expand_variables(campaign, f"{where}.connection", export.connection or "")
    require_known_scheme(campaign, f"{where}.connection", connection)

    def send(number: int, batch: pa.Table) -> None:
        del number
        with writing(f"{campaign.file}: {where}"):
            _insert(campaign, export, connection, batch, where)

    return send


def _insert(campaign: Campaign, export: Export, connection: str, batch: pa.Table, where: str) -> None:
    kinds = {field.name: _SQL_TYPES[str(field.type)] for field in batch.schema}
    columns = ", ".join(f'"{name}" {kind}' for name, kind in kinds.items())
    names = ", ".join(f'"{name}"' for name in kinds)
    primary = f'PRIMARY KEY ("{campaign.key}", "snapshot", "campaign")'
    create = f'CREATE TABLE IF NOT EXISTS "{export.table}" ({columns}, {primary})'
    rows = list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    insert = f'INSERT INTO "{export.table}" ({names}) VALUES ({{}}) ON CONFLICT DO NOTHING'
    if connection.startswith(POSTGRES):
        backend = connect_postgres(connection, read_only=False)
        try:
            with backend.con.transaction(), backend.con.cursor() as cursor:
                cursor.execute(create)
                cursor.execute(f'SELECT * FROM "{export.table}" LIMIT 0')
                for change in _additions(export, kinds, cursor.description):
                    cursor.execute(change)
                cursor.executemany(insert.format(", ".join(["%s"] * len(kinds))), rows)
        finally:
            backend.disconnect()
        return
    path = database_file(campaign, where, connection)
    if connection.startswith(SQLITE):
        with closing(sqlite3.connect(path, timeout=60)) as database, database:
            database.execute(create)
            for change in _additions(export, kinds, database.execute(f'SELECT * FROM "{export.table}"').description):
                database.execute(change)
            texts = ([str(v) if isinstance(v, datetime) else v for v in row] for row in rows)
            database.executemany(insert.format(", ".join("?" * len(kinds))), texts)
        return
    with duckdb.connect(str(path)) as database:
        database.execute(create)
        there = database.execute(f'SELECT * FROM "{export.table}" LIMIT 0').description
        for change in _additions(export, kinds, there):
            database.execute(change)
        database.register("batch", batch)
        database.execute(f'INSERT INTO "{export.table}" ({names}) SELECT {names} FROM batch ON CONFLICT DO NOTHING')


def _additions(export: Export, kinds: dict[str, str], there: Any) -> list[str]:
    """What a table lacks that was made before an experiment added a column."""
    known = {column[0] for column in there or ()}
    return [f'ALTER TABLE "{export.table}" ADD COLUMN "{n}" {kind}' for n, kind in kinds.items() if n not in known]


def _webhook(campaign: Campaign, export: Export, snapshot: date, where: str) -> Callable[[int, pa.Table], None]:
    """A POST a batch, tried again where that may help; the receiver knows a repeated one by its Idempotency-Key."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    url = expand_variables(campaign, f"{where}.url", export.url or "")
    headers = {k: expand_variables(campaign, f"{where}.headers.{k}", v) for k, v in export.headers.items()}
    retry = Retry(
        _TRIES,
        backoff_factor=_BACKOFF,
        backoff_jitter=_BACKOFF,
        status_forcelist=_BUSY,
        allowed_methods=None,
        raise_on_status=False,
    )

    def send(number: int, batch: pa.Table) -> None:
        rows = [
            {
                "id": contact_id(campaign.name, snapshot, row[campaign.key], row["channel"]),
                **{k: str(v) if isinstance(v, datetime) else v for k, v in row.items()},
            }
            for row in batch.to_pylist()
        ]
        if not rows:
            return
        # The batch keeps its number and name when it is tried again, also if somebody in it withdrew meanwhile.
        name = f"{campaign.name}/{export.name}/{snapshot}/{number}"
        body = json.dumps({"campaign": campaign.name, "snapshot": str(snapshot), "batch": number, "contacts": rows})
        key = {"Idempotency-Key": hashlib.sha256(name.encode()).hexdigest(), "Content-Type": "application/json"}
        try:
            with requests.Session() as session:
                for scheme in ("http://", "https://"):
                    session.mount(scheme, HTTPAdapter(max_retries=retry))
                answer = session.post(
                    url, data=body, headers={**headers, **key}, timeout=_TIMEOUT, allow_redirects=False
                )
        except requests.RequestException as error:
            raise SourceError(
                f"{campaign.file}: {where}: cannot be reached: {type(error).__name__}; batch {number} is tried again "
                "by the next export"
            ) from None
        if not 200 <= answer.status_code < 300:
            raise SourceError(
                f"{campaign.file}: {where}: answered {answer.status_code} to batch {number}; it is tried again by the "
                "next export"
            )

    return send
