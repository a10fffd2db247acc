"""From raw copies to validated tables: coercion, contracts, quarantine, duplicates.

Every raw row ends in exactly one place: validated, quarantined with a reason, or counted as a duplicate.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import ibis
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.campaign_sections import Stream
from propensity_dagster.contracts import entity_contract, stream_contract
from propensity_dagster.contracts.tables import CENTS, THOUSANDTHS
from propensity_dagster.data import coerce
from propensity_dagster.data.days import day_index, days_between, publish_days, rows_of_each, stable_order
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.ingest import require_entity_table, source_rows
from propensity_dagster.data.lake import UNPLACED, Home, publish_table
from propensity_dagster.data.quarantine import REASON, count_violations, reason_for
from propensity_dagster.data.sources import campaign_calendar
from propensity_dagster.errors import DataContractError

logger = logging.getLogger(__name__)

_RAW = "raw__"
NUMBER_SHARE = 0.95


@dataclass(frozen=True)
class ValidationReport:
    """Where the rows went: rows_in = good + quarantined + duplicates.

    `unplaced` of the rows are bad because their day cannot be known; they belong to no day of the run.
    """

    rows_in: int
    good: int
    quarantined: int
    duplicates: int
    reasons: dict[str, int]
    good_by_day: dict[date, int]
    unplaced: int = 0

    @property
    def adds_up(self) -> bool:
        """Whether every row is accounted for."""
        return self.rows_in == self.good + self.quarantined + self.duplicates

    @property
    def bad_fraction(self) -> float:
        """Share of quarantined rows among those with a day."""
        placed = self.rows_in - self.unplaced
        return (self.quarantined - self.unplaced) / placed if placed else 0.0


def validate_stream(
    campaign: EventCampaign, name: str, first: date, last: date, home: Home, engine: Engine
) -> ValidationReport:
    """Split `raw_<name>` of these days into `validated_<name>` and `quarantine_<name>`.

    Duplicates are looked for within a day, so that the result does not depend on how days are grouped in
    runs: rows with one id, or, without an id (or with `lines`), rows equal in every column read.

    Raises:
        DataContractError: when the share of bad rows is above the campaign's `max_bad_fraction`; the
            quarantine is then written and `validated_<name>` is left as it was.
    """
    stream = campaign.source.streams[name]
    lake = home.lake(campaign.name)
    days = days_between(first, last)
    files = lake.existing_days(f"raw_{name}", days)
    unplaced = lake.partition(f"raw_{name}", "day", UNPLACED)
    calendar = campaign_calendar(campaign)
    contract = stream_contract(campaign, stream, calendar.first, calendar.newest)
    row = judge_stream(campaign, name, engine.read([*files, unplaced]))
    inside = row.time.notnull() & (row.day >= day_index(first)) & (row.day <= day_index(last))
    in_calendar = (row.day >= day_index(calendar.first)) & (row.day <= day_index(calendar.newest))
    # A row of the unplaced file has no day in the calendar; anything else would be another run's row.
    row = row.filter(inside | row.day.isnull() | ~in_calendar)
    row = row.mutate(day=ibis.ifelse(inside, row.day, ibis.null().cast("int32")))
    raw_columns = [c for c in row.columns if c.startswith(_RAW)]
    checked = engine.cache(_mark_duplicates(row, _identity(stream, raw_columns), raw_columns))

    quarantine = checked.filter(checked.reason.notnull())
    quarantine = quarantine.order_by([quarantine.day.asc(nulls_first=False), *raw_columns, REASON])
    shown = {c.removeprefix(_RAW): quarantine[c].cast("string") for c in raw_columns}
    quarantine = quarantine.select("day", **shown, reason=quarantine.reason)
    bad_by_day, bad_unplaced = publish_days(
        engine.batches(quarantine),
        days,
        lambda d: lake.target(f"quarantine_{name}", "day", d),
        unplaced=True,
    )
    rows_by_day = dict(zip(days, rows_of_each(files), strict=True))
    reasons = _reasons(engine, checked)
    where = lake.root / f"quarantine_{name}"
    require_few_bad_rows(campaign, name, sum(bad_by_day.values()), sum(rows_by_day.values()), reasons, where)
    require_few_bad_rows(campaign, name, bad_unplaced, source_rows(lake, name), reasons, where / f"day={UNPLACED}")

    good = checked.filter(checked.reason.isnull() & (checked.duplicate == 0))
    good = good.select("day", *contract.columns)
    good = good.order_by(["day", *stable_order(good, ["day"])])
    good_by_day, _ = publish_days(engine.batches(good), days, lambda d: lake.target(f"validated_{name}", "day", d))
    report = ValidationReport(
        rows_in=sum(rows_by_day.values()) + pq.read_metadata(unplaced).num_rows,
        good=sum(good_by_day.values()),
        quarantined=sum(bad_by_day.values()) + bad_unplaced,
        duplicates=_duplicates(engine, checked),
        reasons=reasons,
        good_by_day=good_by_day,
        unplaced=bad_unplaced,
    )
    logger.info(
        "validated_%s: %s good, %s quarantined, %s duplicates",
        name,
        f"{report.good:,}",
        f"{report.quarantined:,}",
        f"{report.duplicates:,}",
    )
    return report


def stream_violations(campaign: EventCampaign, name: str, first: date, last: date, home: Home, engine: Engine) -> int:
    """How many rows of `validated_<name>` break the contract: the check reads what was published."""
    stream = campaign.source.streams[name]
    calendar = campaign_calendar(campaign)
    contract = stream_contract(campaign, stream, calendar.first, calendar.newest)
    table = engine.read(home.lake(campaign.name).existing_days(f"validated_{name}", days_between(first, last)))
    if stream.id and not stream.lines:  # ids are unique within a day: see `validate_stream`
        contract = contract.update_column("event_id", unique=False)
        repeated = table.group_by([coerce.day_number(table.time).name("day"), "event_id"]).aggregate(n=table.count())
        twice = int(
            engine.arrow(repeated.aggregate(n=(repeated.n - 1).sum().fill_null(0).cast("int64")))["n"][0].as_py()
        )
    else:
        twice = 0
    broken = engine.arrow(table.aggregate(n=count_violations(table, contract).cast("int64")))
    return int(broken["n"][0].as_py()) + twice


def validate_entities(campaign: EventCampaign, home: Home, engine: Engine) -> ValidationReport:
    """Split `raw_<table>` into `validated_<table>` and `quarantine_<table>`.

    Of customers with one key the one created first is kept; an equal row is a duplicate, a different one is
    quarantined.

    Raises:
        DataContractError: when the share of bad rows is above the campaign's `max_bad_fraction`.
    """
    table_name = require_entity_table(campaign)
    lake = home.lake(campaign.name)
    raw = engine.read(lake.existing(f"raw_{table_name}"))
    types = attribute_types(campaign, raw, engine)
    contract = entity_contract(campaign, types, campaign_calendar(campaign).newest)
    row = judge_entities(campaign, raw, types)
    raw_columns = [c for c in row.columns if c.startswith(_RAW)]
    row = _mark_duplicates(row, raw_columns, raw_columns)
    clean = row.reason.isnull() & (row.duplicate == 0)
    rank = ibis.row_number().over(
        group_by=[row[campaign.key], clean], order_by=[row.created_at, *(row[c] for c in raw_columns)]
    )
    again = clean & (rank > 0)
    message = f"{campaign.key}: another row with this key was created earlier"
    checked = engine.cache(row.mutate(reason=ibis.ifelse(again, message, row.reason)))

    quarantine = checked.filter(checked.reason.notnull()).order_by([*raw_columns, REASON])
    quarantine = quarantine.select(
        **{c.removeprefix(_RAW): quarantine[c].cast("string") for c in raw_columns}, reason=quarantine.reason
    )
    bad = engine.arrow(quarantine)
    publish_table(bad, lake.file(f"quarantine_{table_name}"))
    total = pq.read_metadata(lake.file(f"raw_{table_name}")).num_rows
    where = lake.file(f"quarantine_{table_name}")
    require_few_bad_rows(campaign, table_name, bad.num_rows, total, _reasons(engine, checked), where)
    good = checked.filter(checked.reason.isnull() & (checked.duplicate == 0)).select(*contract.columns)
    data = engine.arrow(good.order_by(campaign.key))
    publish_table(data, lake.file(f"validated_{table_name}"))
    report = ValidationReport(
        total, data.num_rows, bad.num_rows, _duplicates(engine, checked), _reasons(engine, checked), {}
    )
    logger.info(
        "validated_%s: %s good, %s quarantined, %s duplicates", table_name, f"{report.good:,}", report.quarantined,
        report.duplicates,
    )  # fmt: skip
    return report


def entity_violations(campaign: EventCampaign, home: Home, engine: Engine) -> int:
    """How many rows of the validated customer table break the contract."""
    table = engine.read(home.lake(campaign.name).existing(f"validated_{require_entity_table(campaign)}"))
    types = {n: "number" if table[n].type().is_numeric() else "category" for n in campaign.source.entities.attributes}
    calendar = campaign_calendar(campaign)
    contract = entity_contract(campaign, types, calendar.newest)
    return int(engine.arrow(table.aggregate(n=count_violations(table, contract).cast("int64")))["n"][0].as_py())


def judge_stream(campaign: EventCampaign, name: str, raw: ibis.Table) -> ibis.Table:
    """Raw rows of an event log with their coerced columns, `day`, and `reason`: null for a good row."""
    calendar = campaign_calendar(campaign)
    stream = campaign.source.streams[name]
    contract = stream_contract(campaign, stream, calendar.first, calendar.newest)
    row, uncoerced = _coerce_stream(campaign, name, stream, raw)
    return row.mutate(reason=reason_for(row, contract, uncoerced))


def judge_entities(campaign: EventCampaign, raw: ibis.Table, types: dict[str, str]) -> ibis.Table:
    """Raw rows of the customer table with their coerced columns and `reason`."""
    contract = entity_contract(campaign, types, campaign_calendar(campaign).newest)
    row, uncoerced = _coerce_entities(campaign, raw, types)
    return row.mutate(reason=reason_for(row, contract, uncoerced))


def _coerce_stream(
    campaign: EventCampaign, name: str, stream: Stream, raw: ibis.Table
) -> tuple[ibis.Table, dict[str, Any]]:
    table = raw.rename({f"{_RAW}{c}": c for c in raw.columns})
    where = f"{campaign.file}: source.streams.{name}"

    def source(column: str) -> Any:
        return table[f"{_RAW}{column}"]

    key = source(stream.key or campaign.key)
    time = coerce.utc_time(source(stream.time), stream.time_format, f"{where}.time")
    columns: dict[str, tuple[Any, Any]] = {
        campaign.key: (key, coerce.key_text(key)),
        "time": (source(stream.time), time),
    }
    if stream.id:
        columns["event_id"] = (source(stream.id), coerce.key_text(source(stream.id)))
    if stream.amount:
        columns["amount"] = (source(stream.amount), coerce.scaled_integer(source(stream.amount), CENTS))
    for measure in stream.measures:
        value = source(measure)
        columns[f"measure_{measure}"] = (value, coerce.scaled_integer(value, THOUSANDTHS))
    for column in stream.categories:
        columns[f"category_{column}"] = (source(column), coerce.category(source(column)))
    if stream.type:
        columns["type"] = (source(stream.type), coerce.category(source(stream.type)))
    if stream.ingested_at:
        value = source(stream.ingested_at)
        columns["ingested_at"] = (value, coerce.utc_time(value, None, f"{where}.ingested_at"))
    coerced = table.mutate(**{column: expression for column, (_, expression) in columns.items()})
    coerced = coerced.mutate(day=coerce.day_number(coerced.time))
    return coerced, _lost_values(coerced, columns)


def _coerce_entities(
    campaign: EventCampaign, raw: ibis.Table, types: dict[str, str]
) -> tuple[ibis.Table, dict[str, Any]]:
    entities = campaign.source.entities
    table = raw.rename({f"{_RAW}{c}": c for c in raw.columns})
    key, created = table[f"{_RAW}{entities.key}"], table[f"{_RAW}{entities.created_at}"]
    where = f"{campaign.file}: source.entities.created_at"
    columns: dict[str, tuple[Any, Any]] = {
        campaign.key: (key, coerce.key_text(key)),
        "created_at": (created, coerce.utc_time(created, entities.time_format, where)),
    }
    for name in entities.attributes:
        value = table[f"{_RAW}{name}"]
        columns[name] = (value, coerce.number(value) if types[name] == "number" else coerce.category(value))
    coerced = table.mutate(**{column: expression for column, (_, expression) in columns.items()})
    return coerced, _lost_values(coerced, columns)


def _lost_values(coerced: ibis.Table, columns: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Per column, where a value was there and did not coerce. Text coerces to text, so it cannot be lost."""
    return {
        name: coerce.lost(coerced[raw.get_name()], coerced[name])
        for name, (raw, _) in columns.items()
        if not (raw.type().is_string() and coerced[name].type().is_string())
    }


def attribute_types(campaign: EventCampaign, raw: ibis.Table, engine: Engine) -> dict[str, str]:
    """Declared types; else numbers where the source's column is one, or text that nearly always reads as one."""
    types: dict[str, str] = {}
    for name, attribute in campaign.source.entities.attributes.items():
        if attribute.type is not None:
            types[name] = attribute.type
        elif raw[name].type().is_string():
            present = raw.filter(coerce.category(raw[name]).notnull())
            counts = present.aggregate(n=present.count(), numbers=coerce.number(present[name]).count())
            found = engine.arrow(counts).to_pylist()[0]
            is_number = found["n"] and found["numbers"] >= NUMBER_SHARE * found["n"]
            types[name] = "number" if is_number else "category"
        else:
            types[name] = "number" if raw[name].type().is_numeric() else "category"
    return types


def _identity(stream: Stream, raw_columns: Sequence[str]) -> list[str] | None:
    """Columns in which equal rows are one event; None where every row is an event of its own."""
    if stream.id and not stream.lines:
        return ["day", "event_id"]
    return None if stream.equal_rows == "keep" else ["day", *raw_columns]


def _mark_duplicates(row: ibis.Table, identity: Sequence[str] | None, raw_columns: Sequence[str]) -> ibis.Table:
    """Adds `duplicate`: 0 for the first of the good rows that share an identity, then 1, 2, ..."""
    if identity is None:
        return row.mutate(duplicate=ibis.literal(0, "int64"))
    window = ibis.window(
        group_by=[row.reason.isnull(), *(row[c] for c in identity)],
        order_by=[row[c] for c in [*([] if "time" not in row.columns else ["time"]), *raw_columns]],
    )
    number = ibis.row_number().over(window)
    return row.mutate(duplicate=ibis.ifelse(row.reason.isnull(), number, 0).cast("int64"))


def _duplicates(engine: Engine, checked: ibis.Table) -> int:
    repeated = checked.filter(checked.reason.isnull() & (checked.duplicate > 0))
    return int(engine.arrow(repeated.aggregate(n=repeated.count()))["n"][0].as_py())


def _reasons(engine: Engine, checked: ibis.Table) -> dict[str, int]:
    bad = checked.filter(checked.reason.notnull())
    counts = engine.arrow(bad.group_by(REASON).aggregate(n=bad.count()).order_by(REASON))
    return {row[REASON]: row["n"] for row in counts.to_pylist()}


def require_few_bad_rows(
    campaign: Campaign, name: str, bad: int, total: int, reasons: dict[str, int], where: Path
) -> None:
    """Raise when the share of bad rows is above the campaign's `max_bad_fraction`.

    Raises:
        DataContractError: with the most frequent reasons.
    """
    if total and bad > campaign.max_bad_fraction * total:
        raise DataContractError(
            f"{campaign.file}: {name}: {bad:,} of {total:,} rows ({bad / total:.1%}) break the contract, "
            f"max_bad_fraction allows {campaign.max_bad_fraction:.1%}. Reasons: {_most_frequent(reasons)}. "
            f"The rows are in {where}"
        )


def _most_frequent(reasons: dict[str, int]) -> str:
    """The three most frequent reasons, with what mends the most common mistake."""
    ranked = sorted(reasons.items(), key=lambda item: -item[1])[:3]
    words = [f"{reason} ({rows:,} rows)" for reason, rows in ranked]
    hint = " (say time_format, for example '%d/%m/%Y')" if any(r.endswith(": not a time") for r, _ in ranked) else ""
    return "; ".join(words) + hint
