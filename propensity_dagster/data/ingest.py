"""From a source to raw copies of its declared columns, by event day.

Rows of an event log whose day cannot be known go to the pseudo-partition `unplaced`, read anew in full by
every ingestion, so that none is lost and none is counted twice.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import json
import logging
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import ibis
import pyarrow.parquet as pq

from propensity_dagster.campaign import EventCampaign
from propensity_dagster.campaign_sections import Stream
from propensity_dagster.data import coerce
from propensity_dagster.data.connections import reading
from propensity_dagster.data.days import TimeRange, day_index, days_between, publish_days, rows_of_each, stable_order
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home, Lake, publish_table, publish_text
from propensity_dagster.data.sources import campaign_calendar, is_remote, open_table, select_declared
from propensity_dagster.data.tombstones import without_erased
from propensity_dagster.errors import DataContractError, InsufficientDataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawReport:
    """What a copy from the source did. `late` counts rows that a day gained since it was read before."""

    rows: int
    unplaced: int
    late: int
    time_zone: str
    rows_by_day: dict[date, int]


def ingest_stream(campaign: EventCampaign, name: str, first: date, last: date, home: Home, engine: Engine) -> RawReport:
    """Copy the declared columns of one event log for these days into `raw_<name>`, one file a day.

    Raises:
        InsufficientDataError: when the log has no row at all.
        DataContractError, ConfigError, SourceError: see `open_table` and `select_declared`.
    """
    stream = campaign.source.streams[name]
    where = f"source.streams.{name}"
    lake = home.lake(campaign.name)
    calendar = campaign_calendar(campaign)

    with reading(f"{campaign.file}: {where}"), engine.unchanged_files():
        within = TimeRange(stream.time, first, last, calendar)
        source, table = declared_stream(campaign, name, stream, home, engine, within)
        time = coerce.utc_time(table[stream.time], stream.time_format, f"{campaign.file}: {where}.time")
        zone = "naive, taken as UTC" if coerce.is_naive(table[stream.time].type(), stream.time_format) else "to UTC"
        day = coerce.day_number(time)
        inside = (day >= day_index(calendar.first)) & (day <= day_index(calendar.newest))
        placed = table.mutate(day=ibis.ifelse(inside, day, ibis.null().cast("int32")))
        wanted = placed.day.isnull() | ((placed.day >= day_index(first)) & (placed.day <= day_index(last)))
        ordered = placed.filter(wanted).order_by([placed.day.asc(nulls_first=False), *stable_order(placed, ["day"])])
        before = sum(rows_of_each(lake.existing_partitions(f"raw_{name}", "day", days_between(first, last))))
        if not _note_source_rows(lake, name, engine, source if is_remote(source, engine) else table):
            raise InsufficientDataError(
                f"{campaign.file}: {where}: table {stream.table!r} has no rows that pass its filter"
            )
        rows, unplaced = publish_days(
            engine.batches(ordered),
            days_between(first, last),
            lambda d: lake.target(f"raw_{name}", "day", d),
            unplaced=True,
        )
        total = sum(rows.values())
        late = max(total - before, 0) if before else 0
    report = RawReport(total, unplaced, late, zone, rows)
    logger.info(
        "raw_%s: %s rows of %s to %s, %s without a usable day",
        name,
        f"{report.rows:,}",
        first,
        last,
        report.unplaced,
    )
    return report


def ingest_entities(campaign: EventCampaign, home: Home, engine: Engine) -> RawReport:
    """Copy the declared columns of the customer table into `raw_<table>`.

    Raises:
        InsufficientDataError: when it is empty.
    """
    entities = campaign.source.entities
    table_name = require_entity_table(campaign)

    with reading(f"{campaign.file}: source.entities"):
        with engine.unchanged_files():
            table = declared_entities(campaign, home, engine)
            data = engine.arrow(table.order_by(stable_order(table, [])))
        if data.num_rows == 0:
            raise InsufficientDataError(
                f"{campaign.file}: source.entities: table {table_name!r} has no rows that pass its filter"
            )
        publish_table(data, home.lake(campaign.name).file(f"raw_{table_name}"))
        zone = "naive, taken as UTC" if coerce.is_naive(table[entities.created_at or ""].type(), None) else "to UTC"
    report = RawReport(data.num_rows, 0, 0, zone, {})
    logger.info("raw_%s: %s rows", table_name, f"{report.rows:,}")
    return report


def days_to_ingest(campaign: EventCampaign, home: Home, *, until: date) -> tuple[date, date] | None:
    """First and last event day that a nightly ingestion up to `until` should read, or None when none is new.

    Days that late events may still reach are read again.
    """
    calendar = campaign_calendar(campaign)
    last = min(until, calendar.last) if calendar.last else until
    lake = home.lake(campaign.name)
    ingested = set(days_between(calendar.first, last))
    for name in campaign.source.streams:
        ingested &= set(lake.partitions(f"validated_{name}", "day"))
    missing = [day for day in days_between(calendar.first, last) if day not in ingested]
    if not missing:
        return None
    first = max(calendar.first, min(missing[0], last - timedelta(days=campaign.source.late_days)))
    return first, last


def newest_source_day(campaign: EventCampaign, home: Home, engine: Engine, *, until: date) -> date:
    """The newest day up to `until` with an event of the outcome's log in the source.

    Raises:
        InsufficientDataError: when there is none since the first day.
    """
    calendar = campaign_calendar(campaign)
    name = campaign.outcome.stream
    stream = campaign.source.streams[name]
    where = f"{campaign.file}: source.streams.{name}"
    with reading(where):
        source = open_table(campaign, stream.table, home, engine)
        kind = source[stream.time].type() if stream.time in source.columns else None
        if is_remote(source, engine) and kind is not None and (kind.is_timestamp() or kind.is_date()):
            table, day = source, source[stream.time].date()
        else:
            _, table = declared_stream(campaign, name, stream, home, engine)
            day = coerce.utc_time(table[stream.time], stream.time_format, f"{where}.time").date()
        inside = table.select(day=day).filter((day >= calendar.first) & (day <= until))
        newest = _scalar(engine, inside.aggregate(value=inside.day.max()))
    if newest is None:
        raise InsufficientDataError(
            f"{where}: no event between first_day {calendar.first} and {until}; is first_day right, and can "
            f"the column {stream.time!r} be read as a time (else say time_format)?"
        )
    return newest


def newest_event_day(campaign: EventCampaign, home: Home) -> date:
    """The newest day with an event of the outcome's log: labels need nothing newer.

    Raises:
        InsufficientDataError: when no event has been ingested.
    """
    lake = home.lake(campaign.name)
    table = f"validated_{campaign.outcome.stream}"
    for day in reversed(lake.partitions(table, "day")):
        if pq.read_metadata(lake.partition(table, "day", day)).num_rows:
            return day
    raise InsufficientDataError(f"{campaign.file}: {table} holds no event: ingest the event logs first")


def declared_stream(
    campaign: EventCampaign, name: str, stream: Stream, home: Home, engine: Engine, within: TimeRange | None = None
) -> tuple[ibis.Table, ibis.Table]:
    """The table as it is in the source, and its declared columns in the engine."""
    key = stream.key or campaign.key
    optional = [stream.id, stream.amount, stream.type, stream.ingested_at]
    declared = [key, stream.time, *(c for c in optional if c), *stream.measures, *stream.categories]
    if campaign.source.entities.stream == name:
        declared += list(campaign.source.entities.attributes)
    source = open_table(campaign, stream.table, home, engine)
    where = f"source.streams.{name}"
    table = select_declared(campaign, where, source, engine, declared, stream.derive, stream.where, within)
    return source, without_erased(table, key, home)


def declared_entities(campaign: EventCampaign, home: Home, engine: Engine) -> ibis.Table:
    """The declared columns of the customer table, in the engine."""
    entities = campaign.source.entities
    created_at = entities.created_at or ""
    table = open_table(campaign, require_entity_table(campaign), home, engine)
    declared = [entities.key, created_at, *entities.attributes]
    selected = select_declared(campaign, "source.entities", table, engine, declared, entities.derive, entities.where)
    return without_erased(selected, entities.key, home)


def _note_source_rows(lake: Lake, name: str, engine: Engine, table: ibis.Table) -> int:
    """Rows without a day belong to no run in particular: their share is judged against the whole log."""
    rows = int(_scalar(engine, table.aggregate(value=table.count())))
    publish_text(json.dumps({"rows": rows}), lake.document(f"raw_{name}", "source.json"))
    return rows


def _scalar(engine: Engine, one: ibis.Table) -> Any:
    """The column `value` of a table of one row, wherever it is."""
    if one.get_backend() is engine.backend:
        return engine.arrow(one)["value"][0].as_py()
    return one.to_pyarrow()["value"][0].as_py()


def source_rows(lake: Lake, name: str) -> int:
    """Rows of the whole log when it was read last."""
    return json.loads(lake.document(f"raw_{name}", "source.json").read_text(encoding="utf-8"))["rows"]


def require_entity_table(campaign: EventCampaign) -> str:
    """Name of the customer table.

    Raises:
        DataContractError: when entities are derived from a stream.
    """
    table = campaign.source.entities.table
    if table is None:
        raise DataContractError(f"{campaign.file}: source.entities is derived from a stream: there is no table")
    return table
