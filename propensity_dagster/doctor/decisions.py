"""The doctor on a table of past decisions."""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import tempfile
from collections import Counter
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import TableCampaign
from propensity_dagster.data.decisions import (
    CONVERTED,
    DECIDED_AT,
    DECISIONS,
    POSITION,
    ingest_decisions,
    outcome_values,
    resolve_outcome,
    stored_types,
    validate_decisions,
)
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home
from propensity_dagster.doctor.columns import (
    is_code,
    judge_columns,
    judge_leaks,
    judge_segments,
    judge_texts,
    profile_columns,
)
from propensity_dagster.doctor.findings import Diagnosis, OutcomeRate, TableProfile, judge_counts, rate_change
from propensity_dagster.errors import DataContractError
from propensity_dagster.features.past_decisions import count_decision_splits

_SAMPLE = 200_000


def diagnose_decisions(campaign: TableCampaign, home: Home, engine: Engine, *, ingested: bool) -> Diagnosis:
    """Look at the past decisions: in the lake when `ingested`, else at the source, in the engine's scratch folder."""
    diagnosis = Diagnosis(campaign.name)
    seen = home
    if not ingested:
        seen = Home(Path(tempfile.mkdtemp(dir=engine.scratch)))
        ingest_decisions(campaign, seen, engine)
    lake = seen.lake(campaign.name)
    raw = engine.read(lake.existing(f"raw_{DECISIONS}"))
    values = outcome_values(campaign, raw, engine)
    if len(values) == 1:
        diagnosis.add("P105", f"outcome.{campaign.outcome.column}", f"every value is {next(iter(values))!r}")
        return diagnosis
    try:
        resolve_outcome(campaign, values)
    except DataContractError as error:
        diagnosis.add("P106", f"outcome.{campaign.outcome.column}", str(error))
        return diagnosis
    _judge_times(diagnosis, campaign, raw, engine)
    if not ingested and not _validated(diagnosis, campaign, seen, engine):
        return diagnosis
    table = engine.read(lake.existing(f"validated_{DECISIONS}"))
    types = stored_types(campaign, lake.file(f"validated_{DECISIONS}"))
    kinds = {name: kind for name, kind in types.items() if name not in campaign.protected}
    total = pq.read_metadata(lake.file(f"raw_{DECISIONS}")).num_rows
    good = pq.read_metadata(lake.file(f"validated_{DECISIONS}")).num_rows
    if good < total:
        quarantine = pq.read_table(lake.file(f"quarantine_{DECISIONS}"), columns=["reason"])["reason"]
        reasons = Counter(quarantine.to_pylist()).most_common(3)
        words = "; ".join(f"{reason} ({rows:,})" for reason, rows in reasons)
        diagnosis.add("P203", DECISIONS, f"{total - good:,} of {total:,} rows break the contract: {words}")
    columns = profile_columns(table, kinds, engine)
    times = table[DECIDED_AT] if DECIDED_AT in table.columns else table[POSITION]
    ends = engine.arrow(
        table.aggregate(first=times.min(), last=times.max(), entities=table[campaign.key].nunique())
    ).to_pylist()[0]
    diagnosis.tables.append(
        TableProfile(DECISIONS, total, good, str(ends["first"]), str(ends["last"]), ends["entities"], columns)
    )
    if campaign.source.key is None:
        diagnosis.add(
            "P206", DECISIONS, "the row number is the key, in the scores too", "State source.key if there is one"
        )
    judge_columns(diagnosis, DECISIONS, good, columns)
    sample = _sample(campaign, table, kinds, good, engine)
    y = sample[CONVERTED].cast("float64").to_numpy()
    codes = [c.name for c in columns if c.name not in campaign.attributes and is_code(c, sample)]
    if codes:
        diagnosis.add(
            "P214", DECISIONS, ", ".join(codes), "If they are codes, say so: source.attributes: {name: category}"
        )
    judge_leaks(diagnosis, DECISIONS, sample, kinds, y)
    judge_texts(diagnosis, DECISIONS, sample, {n: k for n, k in kinds.items() if n not in campaign.attributes})
    judge_segments(diagnosis, campaign, types)
    _judge_repeats(diagnosis, campaign, raw, total, engine)
    _judge_outcome(diagnosis, campaign, seen, engine)
    diagnosis.features = [(name, f"column {name}, a {kind}") for name, kind in kinds.items()]
    return diagnosis


def _validated(diagnosis: Diagnosis, campaign: TableCampaign, home: Home, engine: Engine) -> bool:
    try:
        validate_decisions(campaign, home, engine)
    except DataContractError as error:
        words = str(error).partition(f"{DECISIONS}: ")[2] or str(error)  # without the scratch folder, which goes
        fix = "Mend the source, leave such rows out with source.where, or raise max_bad_fraction"
        diagnosis.add("P204", DECISIONS, words.partition(". The rows are in")[0], fix)
        return False
    return True


def _judge_outcome(diagnosis: Diagnosis, campaign: TableCampaign, home: Home, engine: Engine) -> None:
    for side in count_decision_splits(campaign, home, engine):
        diagnosis.outcome.append(OutcomeRate(side["snapshot"], side["split"], side["rows"], side["converted"]))
    if campaign.split.folds:  # every row is a test row once
        rows, converted = sum(o.rows for o in diagnosis.outcome), sum(o.converted for o in diagnosis.outcome)
        diagnosis.outcome = [OutcomeRate(f"every row once, in {campaign.split.folds} folds", "test", rows, converted)]
    train = next((o for o in diagnosis.outcome if o.split == "train"), diagnosis.outcome[0])
    chosen = diagnosis.outcome if campaign.split.folds else [train]  # in folds every row trains, and tests once
    rows, converted = sum(o.rows for o in chosen), sum(o.converted for o in chosen)
    where = f"outcome.{campaign.outcome.column}"
    judge_counts(diagnosis, where, rows, converted, f"in {rows:,} rows to learn from", campaign.min_converters)
    test = next(o for o in diagnosis.outcome if o.split == "test")
    if test.converted in (0, test.rows):
        message = f"{test.converted:,} of {test.rows:,} test rows converted"
        diagnosis.add("P105", where, message, "Both outcomes are needed: use more rows, or a larger split.test")
    changed = rate_change(diagnosis.outcome)
    if changed and not campaign.split.folds:
        fix = "" if campaign.prior.adapt else "Let the scores follow it: prior: {adapt: true}"
        diagnosis.add("P107", where, f"from {changed[0]:.1%} in training rows to {changed[1]:.1%} in test rows", fix)


def _judge_times(diagnosis: Diagnosis, campaign: TableCampaign, raw: ibis.Table, engine: Engine) -> None:
    """Times among the features: later than the decision they are a leak, and by themselves they only grow."""
    order = campaign.source.order
    decided = raw[order] if order not in (None, "file") else None
    for name in raw.columns:
        dtype = raw[name].type()
        if name == order or not (dtype.is_timestamp() or dtype.is_date()):
            continue
        if decided is not None and (decided.type().is_timestamp() or decided.type().is_date()):
            late = (raw[name].cast("timestamp") > decided.cast("timestamp")).mean()
            share = engine.arrow(raw.aggregate(share=late))["share"][0].as_py() or 0.0
            if share > 0.001:
                message = f"{share:.1%} of its times lie after the decision ({order})"
                diagnosis.add("P303", f"{DECISIONS}.{name}", message, "Exclude it: it was not known then")
                continue
        fix = "Exclude it, or derive a number of days from it"
        diagnosis.add("P212", f"{DECISIONS}.{name}", "as a number of days it only grows", fix)


def _judge_repeats(diagnosis: Diagnosis, campaign: TableCampaign, raw: ibis.Table, total: int, engine: Engine) -> None:
    if campaign.source.key is not None:
        return  # rows of a key differ in the key, or are its history
    distinct = raw.drop(POSITION).distinct()
    again = total - engine.arrow(distinct.aggregate(n=distinct.count()))["n"][0].as_py()
    if again > 0.01 * total:
        diagnosis.add("P213", DECISIONS, f"{again:,} of {total:,} rows equal another one in every column")


def _sample(campaign: TableCampaign, table: ibis.Table, kinds: dict[str, str], rows: int, engine: Engine) -> pa.Table:
    """At most 200,000 rows, spread evenly over the table."""
    step = max(1, -(-rows // _SAMPLE))
    return engine.arrow(table.filter(table[POSITION] % step == 0).select(*kinds, CONVERTED))
