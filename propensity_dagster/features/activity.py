"""Daily activity: one integer row per entity and day, from which every feature is a windowed sum.

Columns: the key, `day` (the event's), `known_day` (the day it became known, equal to `day` unless the log has
`ingested_at`), per stream `<stream>__count`, `__amount`, `__amount_max`, `__<measure>`, `__<measure>_max`,
`__type_<type>`, and `outcome_count`. Values of categories are in a second table, one row per value and day:
counting distinct values needs the values.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import ibis
import sqlglot.expressions as sge

from propensity_dagster.campaign import EventCampaign
from propensity_dagster.campaign_sections import Stream
from propensity_dagster.contracts.tables import CENTS, THOUSANDTHS
from propensity_dagster.data import coerce
from propensity_dagster.data.days import days_between, publish_days, rows_of_each
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home
from propensity_dagster.data.sources import parse_expression
from propensity_dagster.errors import ConfigError

logger = logging.getLogger(__name__)

EVENTS_AT_ONCE = 10_000_000
"""Events that are grouped together: of 40 million with as many customers and days DuckDB needs 4 GB."""
ACTIVITY = "activity"
CATEGORIES = "activity_categories"
ORDER = {ACTIVITY: ["day", "known_day"], CATEGORIES: ["day", "known_day", "feature", "value"]}
"""Columns that with the key say which row of a table one is."""


@dataclass(frozen=True)
class ActivityReport:
    """Rows written, and events counted in them against events read."""

    rows: int
    events: int
    events_read: int
    rows_by_day: dict[date, int]


def build_activity(campaign: EventCampaign, first: date, last: date, home: Home, engine: Engine) -> ActivityReport:
    """Aggregate the validated events of these days into `activity` and `activity_categories`.

    Days are independent, so that on one machine as many are taken at once as fit: years of them outgrow any memory.
    """
    lake = home.lake(campaign.name)
    days = days_between(first, last)
    files = {name: lake.existing_days(f"validated_{name}", days) for name in campaign.source.streams}
    portions = [slice(None)] if engine.local is not engine else _portions(list(files.values()))
    reports: list[ActivityReport] = []
    for portion in portions:
        events = {name: engine.read(found[portion]) for name, found in files.items()}
        reports.append(_build_days(campaign, days[portion], events, home, engine))
    return ActivityReport(
        rows=sum(report.rows for report in reports),
        events=sum(report.events for report in reports),
        events_read=sum(report.events_read for report in reports),
        rows_by_day={day: rows for report in reports for day, rows in report.rows_by_day.items()},
    )


def _portions(files: Sequence[Sequence[Path]]) -> list[slice]:
    """Days in a row with at most `EVENTS_AT_ONCE` in the files of all streams, or one day with more."""
    starts, events = [0], 0
    by_day = [sum(found) for found in zip(*map(rows_of_each, files), strict=True)]
    for i, more in enumerate(by_day):
        if i > starts[-1] and events + more > EVENTS_AT_ONCE:
            starts.append(i)
            events = 0
        events += more
    return [slice(start, end) for start, end in pairwise([*starts, len(by_day)])]


def _build_days(
    campaign: EventCampaign, days: Sequence[date], events: dict[str, ibis.Table], home: Home, engine: Engine
) -> ActivityReport:
    lake = home.lake(campaign.name)
    activity = engine.cache(daily_activity(campaign, events, engine))
    rows, _ = publish_days(
        engine.batches(activity.order_by(["day", campaign.key, "known_day"])),
        days,
        lambda d: lake.target(ACTIVITY, "day", d),
        keep_day=True,
    )
    categories = daily_categories(campaign, events)
    if categories is not None:
        publish_days(
            engine.batches(categories.order_by(["day", *(c for c in categories.columns if c != "day")])),
            days,
            lambda d: lake.target(CATEGORIES, "day", d),
            keep_day=True,
        )
    totals = reduce(lambda a, b: a + b, (activity[_count(name)].sum().fill_null(0) for name in campaign.source.streams))
    counted = int(engine.arrow(activity.aggregate(n=totals.cast("int64")))["n"][0].as_py())
    read = sum(
        int(engine.arrow(_one_row_an_event(campaign, n, t).aggregate(n=ibis._.count()))["n"][0].as_py())
        for n, t in events.items()
    )
    engine.forget(activity)
    logger.info("activity %s to %s: %s rows from %s events", days[0], days[-1], f"{sum(rows.values()):,}", f"{read:,}")
    return ActivityReport(sum(rows.values()), counted, read, rows)


def daily_activity(campaign: EventCampaign, events: dict[str, ibis.Table], engine: Engine) -> ibis.Table:
    """The activity table of these validated events."""
    parts = [_stream_activity(campaign, name, table, engine) for name, table in events.items()]
    columns = activity_columns(campaign)
    aligned = [
        part.select(
            campaign.key,
            "day",
            "known_day",
            **{c: part[c] if c in part.columns else _absent(c) for c in columns},
        )
        for part in parts
    ]
    united = ibis.union(*aligned) if len(aligned) > 1 else aligned[0]
    totals: dict[str, Any] = {
        c: united[c].max() if c.endswith("_max") else united[c].sum().cast("int64") for c in columns
    }
    return united.group_by([campaign.key, "day", "known_day"]).aggregate(**totals)


def daily_categories(campaign: EventCampaign, events: dict[str, ibis.Table]) -> ibis.Table | None:
    """Distinct (key, day, known_day, feature, value), or None where no stream has categories."""
    parts: list[ibis.Table] = []
    for name, stream in campaign.source.streams.items():
        for column in stream.categories:
            table = _with_days(stream, events[name])
            value = table[f"category_{column}"]
            parts.append(
                table.filter(value.notnull())
                .select(campaign.key, "day", "known_day", feature=ibis.literal(f"{name}_{column}"), value=value)
                .distinct()
            )
    if not parts:
        return None
    return ibis.union(*parts) if len(parts) > 1 else parts[0]


def activity_columns(campaign: EventCampaign) -> list[str]:
    """Measure columns of the activity table, in order."""
    columns: list[str] = []
    for name, stream in campaign.source.streams.items():
        columns.append(_count(name))
        if stream.amount:
            columns += [f"{name}__amount", f"{name}__amount_max"]
        for measure in stream.measures:
            columns += [f"{name}__{measure}", f"{name}__{measure}_max"]
        if stream.type:
            columns += [f"{name}__type_{kind}" for kind in stream.types]
    return [*columns, "outcome_count"]


def _stream_activity(campaign: EventCampaign, name: str, table: ibis.Table, engine: Engine) -> ibis.Table:
    stream = campaign.source.streams[name]
    rows = _one_row_an_event(campaign, name, _flag_outcomes(campaign, name, table, engine))
    measures: dict[str, Any] = {_count(name): rows.count()}
    if stream.amount:
        measures[f"{name}__amount"] = rows.amount.sum()
        measures[f"{name}__amount_max"] = rows.amount.max()
    for measure in stream.measures:
        measures[f"{name}__{measure}"] = rows[f"measure_{measure}"].sum().fill_null(0)
        measures[f"{name}__{measure}_max"] = rows[f"measure_{measure}"].max()
    if stream.type:
        for kind in stream.types:
            measures[f"{name}__type_{kind}"] = (rows.type == kind).sum()
    if name == campaign.outcome.stream:
        counts = rows.is_outcome > 0
        if campaign.outcome.minimum_amount is not None:
            counts = counts & (rows.amount >= round(campaign.outcome.minimum_amount * CENTS))
        measures["outcome_count"] = counts.sum()
    grouped = rows.group_by([campaign.key, "day", "known_day"])
    return grouped.aggregate(**{c: m.cast("int64") for c, m in measures.items()})


def _one_row_an_event(campaign: EventCampaign, name: str, table: ibis.Table) -> ibis.Table:
    """Events with their days; the lines of one event are summed."""
    stream = campaign.source.streams[name]
    rows = _with_days(stream, table)
    if not stream.lines:
        return rows
    sums = [c for c in rows.columns if c == "amount" or c.startswith("measure_")]
    totals: dict[str, Any] = {c: rows[c].sum().cast("int64") for c in sums}
    if stream.type:
        totals["type"] = rows.type.min()
    if "is_outcome" in rows.columns:
        totals["is_outcome"] = rows.is_outcome.max()
    return rows.group_by([campaign.key, "day", "known_day", "event_id"]).aggregate(n_lines=rows.count(), **totals)


def _with_days(stream: Stream, table: ibis.Table) -> ibis.Table:
    day = coerce.day_number(table.time)
    known = ibis.greatest(day, coerce.day_number(table.ingested_at)) if stream.ingested_at else day
    return table.mutate(day=day, known_day=known)


def _flag_outcomes(campaign: EventCampaign, name: str, table: ibis.Table, engine: Engine) -> ibis.Table:
    """Adds `is_outcome` (0 or 1) to the outcome's stream. The condition reads the names of the campaign file."""
    if name != campaign.outcome.stream:
        return table
    if campaign.outcome.where is None:
        return table.mutate(is_outcome=ibis.literal(1, "int8"))
    expression = parse_expression(campaign, "outcome.where", campaign.outcome.where)
    stream = campaign.source.streams[name]
    named: dict[str, Any] = {c: table[f"category_{c}"] for c in stream.categories}
    named |= {m: table[f"measure_{m}"] / float(THOUSANDTHS) for m in stream.measures}
    if stream.amount:
        named[stream.amount] = table.amount / float(CENTS)
    if stream.type:
        named[stream.type] = table.type
    missing = sorted({c.name for c in expression.find_all(sge.Column)} - set(named))
    if missing:
        raise ConfigError(
            f"{campaign.file}: outcome.where: unknown column {missing[0]!r}; allowed are {', '.join(named)}"
        )
    shown = engine.name(table.select(*table.columns, **{f"shown__{n}": v for n, v in named.items()}))
    for column in list(expression.find_all(sge.Column)):
        column.set("this", sge.to_identifier(f"shown__{column.name}", quoted=True))
    keep = ", ".join(f'"{c}"' for c in table.columns)
    sql = f'SELECT {keep}, CAST(COALESCE(({expression.sql("duckdb")}), FALSE) AS TINYINT) AS is_outcome FROM "{shown}"'
    return engine.sql(sql)


def _absent(column: str) -> Any:
    return ibis.null().cast("int64") if column.endswith("_max") else ibis.literal(0, "int64")


def _count(stream: str) -> str:
    return f"{stream}__count"
