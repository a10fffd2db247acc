"""Tables of past decisions: copying, typing, checking; and rows to score, which must look like them.

Every raw row ends in `validated_decisions` or, with a reason, in `quarantine_decisions`. Equal rows stay: two
anonymous visitors may well look alike.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import NOT_COLUMNS, TableCampaign
from propensity_dagster.campaign_sections import ColumnOutcome
from propensity_dagster.contracts import decision_contract
from propensity_dagster.data import coerce
from propensity_dagster.data.connections import reading, resolve_path
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.files import files_in
from propensity_dagster.data.lake import Home, publishing
from propensity_dagster.data.quarantine import REASON, count_violations, reason_for
from propensity_dagster.data.sources import open_decisions, open_place, select_declared
from propensity_dagster.data.tombstones import without_erased
from propensity_dagster.data.validate import NUMBER_SHARE, ValidationReport, require_few_bad_rows
from propensity_dagster.errors import ConfigError, DataContractError, InsufficientDataError

logger = logging.getLogger(__name__)

DECISIONS, NEW_ROWS = "decisions", "new_rows"
POSITION, DECIDED_AT, CONVERTED = "position", "decided_at", "converted"
ANY_COLUMN = "*"

_RAW = "raw__"
_ROWS_FOR_TYPES = 200_000
_YES = frozenset({"1", "true", "t", "yes", "y"})
_NO = frozenset({"0", "false", "f", "no", "n"})


@dataclass(frozen=True)
class NewRowsReport:
    """What became of rows to score. `absent`: columns of the past decisions that they lack."""

    rows_in: int
    good: int
    quarantined: int
    reasons: dict[str, int]
    absent: tuple[str, ...]
    places: tuple[str, ...]


def ingest_decisions(campaign: TableCampaign, home: Home, engine: Engine) -> int:
    """Copy the table of past decisions into `raw_decisions`, rows numbered as they come. Returns their number.

    Raises:
        InsufficientDataError: when there is none.
        ConfigError, DataContractError, SourceError: see `open_table` and `select_declared`.
    """
    with reading(f"{campaign.file}: source"), engine.unchanged_files():
        source = open_decisions(campaign, home, engine)
        declared = [campaign.outcome.column, *_order_column(campaign), *_columns(campaign, source)]
        file = home.lake(campaign.name).file(f"raw_{DECISIONS}")
        rows = _publish_raw(campaign, source, declared, file, home, engine, campaign.source.where)
    if rows == 0:
        raise InsufficientDataError(f"{campaign.file}: source: the table has no rows that pass its filter")
    logger.info("raw_%s: %s rows", DECISIONS, f"{rows:,}")
    return rows


def validate_decisions(campaign: TableCampaign, home: Home, engine: Engine) -> ValidationReport:
    """Split `raw_decisions` into `validated_decisions` and `quarantine_decisions`.

    Raises:
        DataContractError: when the outcome's values cannot be told apart, or too many rows are bad.
    """
    lake = home.lake(campaign.name)
    raw = engine.read(lake.existing(f"raw_{DECISIONS}"))
    types = feature_types(campaign, raw, engine)
    outcome = resolve_outcome(campaign, outcome_values(campaign, raw, engine))
    columns = _coerced(campaign, raw, types)
    value = raw[campaign.outcome.column]
    text = outcome_text(value)
    positive, negative = (text.isin(sorted(texts)) for texts in outcome)
    columns[CONVERTED] = (value, ibis.cases((positive, True), (negative, False)))
    if _order_column(campaign):
        time = raw[campaign.source.order]
        where = f"{campaign.file}: source.order"
        columns[DECIDED_AT] = (time, coerce.utc_time(time, campaign.source.time_format, where))
    contract = decision_contract(campaign, types, labelled=True)
    checked = engine.cache(_judged(raw, columns, contract))
    bad, reasons = _publish_quarantine(checked, raw.columns, lake.file(f"quarantine_{DECISIONS}"), engine)
    total = pq.read_metadata(lake.file(f"raw_{DECISIONS}")).num_rows
    require_few_bad_rows(campaign, DECISIONS, bad, total, reasons, lake.root / f"quarantine_{DECISIONS}")
    good = checked.filter(checked[REASON].isnull()).select(*contract.columns).order_by(POSITION)
    file = lake.file(f"validated_{DECISIONS}")
    engine.publish(good, file)
    kept = pq.read_metadata(file).num_rows
    logger.info("validated_%s: %s good, %s quarantined", DECISIONS, f"{kept:,}", f"{bad:,}")
    return ValidationReport(total, kept, bad, 0, reasons, {})


def decision_violations(campaign: TableCampaign, home: Home, engine: Engine) -> int:
    """How many rows of `validated_decisions` break the contract."""
    file = home.lake(campaign.name).existing(f"validated_{DECISIONS}")
    contract = decision_contract(campaign, stored_types(campaign, file), labelled=True)
    return int(engine.arrow(_count(count_violations(engine.read(file), contract)))["n"][0].as_py())


def publish_new_rows(
    campaign: TableCampaign, snapshot: date, places: Sequence[str], home: Home, engine: Engine
) -> NewRowsReport:
    """Bring rows to score into the columns of the past decisions, as the `features` of a snapshot.

    Args:
        campaign: the campaign.
        snapshot: partition to write.
        places: files, folders, or one table of the source's connection.
        home: where the lake is.
        engine: where to compute.

    Raises:
        InsufficientDataError: when there is no row.
        DataContractError: when the past decisions are not there, or too many rows are bad.
    """
    lake = home.lake(campaign.name)
    types = stored_types(campaign, lake.existing(f"validated_{DECISIONS}"))
    raw_file = lake.partition(f"raw_{NEW_ROWS}", "snapshot", snapshot)
    present = _collect_new_rows(campaign, places, types, raw_file, home, engine)
    raw = engine.read(raw_file)
    contract = decision_contract(campaign, types, labelled=False)
    checked = engine.cache(_once_a_key(campaign, _judged(raw, _coerced(campaign, raw, types), contract)))
    quarantine = lake.partition(f"quarantine_{NEW_ROWS}", "snapshot", snapshot)
    bad, reasons = _publish_quarantine(checked, raw.columns, quarantine, engine)
    total = pq.read_metadata(raw_file).num_rows
    require_few_bad_rows(campaign, NEW_ROWS, bad, total, reasons, quarantine)
    good = checked.filter(checked[REASON].isnull()).select(campaign.key, *types).order_by(campaign.key)
    file = lake.partition("features", "snapshot", snapshot)
    engine.publish(good, file)
    absent = tuple(name for name in types if name not in present)
    if bad:
        logger.warning("new rows: %s of %s left out: %s; they are in %s", f"{bad:,}", f"{total:,}", reasons, quarantine)
    if not campaign.source.key:
        logger.info("new rows: there is no key column: row_number counts the rows of the file from 1")
    if absent:
        logger.warning("new rows: %d columns are not there and count as missing: %s", len(absent), ", ".join(absent))
    return NewRowsReport(total, pq.read_metadata(file).num_rows, bad, reasons, absent, tuple(places))


def rows_to_score(campaign: TableCampaign, snapshot: date, stated: Sequence[str]) -> list[str]:
    """Where the rows of a snapshot are: as stated, else files put into the watched folder that day, else `new_rows`.

    Raises:
        InsufficientDataError: when nothing says.
    """
    if stated:
        return list(stated)
    found = [str(file) for file in dropped_files(campaign) if modified_on(file) == snapshot]
    if found:
        return found
    if campaign.source.new_rows:
        return [campaign.source.new_rows]
    watched = campaign.schedule.watch or "none is stated"
    raise InsufficientDataError(
        f"{campaign.file}: there is nothing to score on {snapshot}: no file of that day in schedule.watch ({watched}), "
        "and no source.new_rows; name files or a table in the run's config, or with `propensity score --rows`"
    )


def dropped_files(campaign: TableCampaign) -> list[Path]:
    """Data files of the watched folder."""
    watch = campaign.schedule.watch
    return files_in(resolve_path(campaign, "schedule.watch", watch)) if watch else []


def modified_on(file: Path) -> date:
    """The day, UTC, on which a file was written: its rows are scored as of then."""
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).date()


def feature_types(campaign: TableCampaign, raw: ibis.Table, engine: Engine) -> dict[str, str]:
    """Feature columns with "number" or "category": as declared, else as nearly every value says.

    Raises:
        InsufficientDataError: when no column is left.
    """
    skipped = {campaign.key, POSITION, campaign.outcome.column, campaign.source.order}
    needed = {name for name in raw.columns if name not in skipped and name not in campaign.exclude}
    names = [name for name in raw.columns if name in needed]
    if not names:
        raise InsufficientDataError(f"{campaign.file}: no column is left to learn from")
    counts: dict[str, Any] = {}
    rows = engine.arrow(raw.aggregate(n=raw.count()))["n"][0].as_py()
    sample = raw.filter(raw[POSITION] % max(1, rows // _ROWS_FOR_TYPES) == 0)
    for name in names:
        if campaign.attributes.get(name) is None or campaign.attributes[name].type is None:
            value = _without_sentinels(campaign, sample, name)
            if value.type().is_string():
                counts[f"there__{name}"] = coerce.category(value).count()
                counts[f"number__{name}"] = coerce.number(coerce.category(value)).count()
    found = engine.arrow(sample.aggregate(**counts)).to_pylist()[0] if counts else {}

    def kind(name: str) -> str:
        declared = campaign.attributes[name].type if name in campaign.attributes else None
        if declared is not None:
            return declared
        if f"there__{name}" in found:
            there = found[f"there__{name}"]
            return "number" if there and found[f"number__{name}"] >= NUMBER_SHARE * there else "category"
        dtype = raw[name].type()
        return "number" if dtype.is_numeric() or dtype.is_timestamp() or dtype.is_date() else "category"

    return {name: kind(name) for name in names}


def stored_types(campaign: TableCampaign, file: Path) -> dict[str, str]:
    """Feature columns of `validated_decisions` with their types."""
    ours = {campaign.key, POSITION, DECIDED_AT, CONVERTED}
    return {
        field.name: "category" if pa.types.is_string(field.type) else "number"
        for field in pq.read_schema(file)
        if field.name not in ours
    }


def resolve_outcome(campaign: TableCampaign, counts: Mapping[str, int]) -> tuple[set[str], set[str]]:
    """Which texts of the outcome column are a conversion, and which are none.

    Args:
        campaign: states `positive` and `negative`, as needed.
        counts: rows of each text, in the form of `outcome_text`.

    Raises:
        DataContractError: when that leaves open what a value means.
    """
    outcome = campaign.outcome
    where = f"{campaign.file}: outcome.column {outcome.column!r}"
    shown = ", ".join(f"{value} ({rows:,} rows)" for value, rows in list(counts.items())[:5])
    positive = _meant(outcome)
    if positive is None:
        positive = _YES & set(counts)
        if not set(counts) <= _YES | _NO:
            raise DataContractError(f"{where} has the values {shown}: say which is a conversion with outcome.positive")
        return set(positive or _YES), set(_NO)
    if not positive & set(counts):
        raise DataContractError(f"{where}: no row is {outcome.positive!r}; there are {shown}")
    others = set(counts) - positive
    if outcome.negative is not None:
        negative: set[str] = set().union(*(_texts_of(value) for value in outcome.negative))
        return positive, negative - positive
    if len(others) > 1:
        raise DataContractError(
            f"{where} has {len(counts)} values: {shown}. Two are wanted: name those that are no conversion with "
            "outcome.negative; rows with any other value go to quarantine"
        )
    return positive, others


def outcome_text(column: Any) -> Any:
    """Spellings of one value as one text: TRUE and true, 1 and 1.0."""
    return column.cast("string").strip().lower().re_replace(r"^(-?\d+)\.0+$", r"\1").nullif("")


def outcome_values(campaign: TableCampaign, raw: ibis.Table, engine: Engine) -> dict[str, int]:
    """Rows of each of the 50 most frequent texts of the outcome column."""
    values = raw.select(value=outcome_text(raw[campaign.outcome.column]))
    values = values.filter(values.value.notnull())
    counts = values.group_by("value").aggregate(rows=values.count()).order_by([ibis.desc("rows"), "value"]).limit(50)
    return {row["value"]: row["rows"] for row in engine.arrow(counts).to_pylist()}


def _meant(outcome: ColumnOutcome) -> set[str] | None:
    return None if outcome.positive is None else _texts_of(outcome.positive)


def _texts_of(value: bool | str) -> set[str]:
    """YAML reads yes and true alike as a boolean: then every spelling of it is meant."""
    if isinstance(value, bool):
        return set(_YES if value else _NO)
    text = value.strip().lower()
    return {text.removesuffix(".0")}


def _order_column(campaign: TableCampaign) -> list[str]:
    order = campaign.source.order
    return [order] if order not in (None, "file") else []


def _columns(campaign: TableCampaign, source: ibis.Table) -> list[str]:
    """The key and every column that may be a feature, derived ones last.

    Raises:
        ConfigError: for a column in the file that is not in the data, or with a name of ours.
    """
    available = [*source.columns, *campaign.source.derive]
    for where, names in (("exclude", campaign.exclude), ("missing", campaign.missing), ("segments", campaign.segments)):
        unknown = [name for name in names if name not in (*available, ANY_COLUMN)]
        if unknown:
            raise ConfigError(
                f"{campaign.file}: {where}: there is no column {unknown[0]!r}; there are {', '.join(available)}"
            )
    apart = {campaign.outcome.column, campaign.source.order, *campaign.exclude}
    chosen = [name for name in available if name not in apart]
    for name in [*campaign.attributes, *([campaign.source.key] if campaign.source.key else [])]:
        if name not in chosen:
            chosen.append(name)  # `select_declared` says that it is not there
    taken = [name for name in chosen if name.lower() in NOT_COLUMNS]
    if taken:
        raise ConfigError(
            f"{campaign.file}: source: a column must not be called {taken[0]!r}; exclude it and give it another name "
            f"with derive: {{{taken[0]}_value: {taken[0]}}}"
        )
    return chosen


def _publish_raw(
    campaign: TableCampaign,
    source: ibis.Table,
    declared: Sequence[str],
    file: Path,
    home: Home,
    engine: Engine,
    where: str | None = None,
) -> int:
    names, derive = list(dict.fromkeys(declared)), campaign.source.derive
    table = select_declared(campaign, "source", source, engine, names, derive, where, number_rows=True)
    if campaign.source.key is not None:
        table = without_erased(table, campaign.source.key, home)
    engine.publish(table, file)
    return pq.read_metadata(file).num_rows


def _collect_new_rows(
    campaign: TableCampaign, places: Sequence[str], types: Mapping[str, str], file: Path, home: Home, engine: Engine
) -> set[str]:
    """Copy the rows of all places into one raw file; returns the feature columns that at least one has."""
    present: set[str] = set()
    parts: list[Path] = []
    for number, place in enumerate(places):
        with reading(f"{campaign.file}: rows to score: {place}"), engine.unchanged_files():
            source = open_place(campaign, place, home, engine)
            found = {*source.columns, *campaign.source.derive}
            present |= found
            keys = [campaign.source.key] if campaign.source.key else []
            part = engine.scratch / f"new_rows_{number}.parquet"
            _publish_raw(campaign, source, [*keys, *(name for name in types if name in found)], part, home, engine)
            table = engine.read(part)
            if not campaign.source.key and len(places) > 1:  # row numbers of two files are the same
                prefix = ibis.literal(f"{Path(place).stem}:")
                table = table.mutate(**{campaign.key: prefix + table[POSITION].cast("string")})
            aligned = {name: _as_text(table, name, kind) for name, kind in types.items()}
            own = [campaign.key] if campaign.key in table.columns else []
            parts.append(part.with_suffix(".aligned.parquet"))
            engine.publish(table.select(*own, POSITION, **aligned), parts[-1])
    with publishing(file) as temporary:
        engine.backend.raw_sql(
            f"COPY (SELECT * FROM read_parquet({[str(p) for p in parts]})) TO '{temporary}' (FORMAT PARQUET)"
        )
    if pq.read_metadata(file).num_rows == 0:
        raise InsufficientDataError(f"{campaign.file}: rows to score: there is none in {', '.join(places)}")
    return present


def _as_text(table: ibis.Table, name: str, kind: str) -> Any:
    """One type for every file, whatever each of them holds."""
    if name not in table.columns:
        return ibis.null().cast("string")
    value = table[name]
    if kind == "number" and not value.type().is_string():
        value = _number(value)
    return value.cast("string")


def _coerced(campaign: TableCampaign, raw: ibis.Table, types: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """Per column of the contract: the raw expression, and the coerced one."""
    key = raw[campaign.key] if campaign.key in raw.columns else raw[POSITION]
    columns: dict[str, tuple[Any, Any]] = {
        campaign.key: (key, coerce.key_text(key)),
        POSITION: (raw[POSITION], raw[POSITION]),
    }
    for name, kind in types.items():
        value = _without_sentinels(campaign, raw, name)
        columns[name] = (value, _number(value) if kind == "number" else coerce.category(value))
    return columns


def _number(value: Any) -> Any:
    """Numbers as they are; a time as days since 1970."""
    dtype = value.type()
    if dtype.is_timestamp() or dtype.is_date():
        return coerce.day_number(value.cast("timestamp")).cast("float64")
    if dtype.is_boolean():
        return value.cast("int8").cast("float64")
    return coerce.number(coerce.category(value) if dtype.is_string() else value)


def _without_sentinels(campaign: TableCampaign, raw: ibis.Table, name: str) -> Any:
    """The column with the values that stand for a missing one gone."""
    value = raw[name]
    sentinels = [*campaign.missing.get(name, ()), *campaign.missing.get(ANY_COLUMN, ())]
    if not sentinels:
        return value
    texts = {text.strip().lower().removesuffix(".0") for text in sentinels}
    return ibis.ifelse(outcome_text(value).isin(sorted(texts)), ibis.null(), value)


def _judged(raw: ibis.Table, columns: Mapping[str, tuple[Any, Any]], contract: Any) -> ibis.Table:
    """Coerced columns, the raw ones under another name, and the reason why a row is bad."""
    kept = {f"{_RAW}{name}": raw[name] for name in raw.columns}
    lost = {
        f"lost__{name}": coerce.lost(value, coerced)
        for name, (value, coerced) in columns.items()
        if not (value.type().is_string() and coerced.type().is_string())
    }
    row = raw.select(**kept, **{name: coerced for name, (_, coerced) in columns.items()}, **lost)
    uncoerced = {name.removeprefix("lost__"): row[name] for name in lost}
    return row.mutate(**{REASON: reason_for(row, contract, uncoerced)}).drop(*lost)


def _once_a_key(campaign: TableCampaign, row: ibis.Table) -> ibis.Table:
    """A key may be scored once: the first of its good rows is."""
    window = ibis.window(group_by=[row[campaign.key], row[REASON].isnull()], order_by=[POSITION])
    again = row[REASON].isnull() & (ibis.row_number().over(window) > 0)
    return row.mutate(**{REASON: ibis.ifelse(again, f"{campaign.key}: given twice", row[REASON])})


def _publish_quarantine(
    checked: ibis.Table, raw_columns: Sequence[str], file: Path, engine: Engine
) -> tuple[int, dict[str, int]]:
    bad = checked.filter(checked[REASON].notnull())
    shown = {name: bad[f"{_RAW}{name}"].cast("string") for name in raw_columns}
    engine.publish(bad.select(**shown, **{REASON: bad[REASON]}).order_by([REASON, *shown]), file)
    counts = engine.arrow(bad.group_by(REASON).aggregate(n=bad.count()).order_by(REASON)).to_pylist()
    reasons = {row[REASON]: row["n"] for row in counts}
    return sum(reasons.values()), reasons


def _count(expression: Any) -> ibis.Table:
    return expression.cast("int64").name("n").as_table()
