"""The doctor on event logs."""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import ibis
import pyarrow as pa

from propensity_dagster.campaign import EventCampaign
from propensity_dagster.contracts.tables import CENTS, THOUSANDTHS
from propensity_dagster.data import coerce
from propensity_dagster.data.days import EPOCH, TimeRange, day_index
from propensity_dagster.data.engine import Engine, any_day, on_day
from propensity_dagster.data.ingest import declared_entities, declared_stream
from propensity_dagster.data.lake import UNPLACED, Home
from propensity_dagster.data.sources import campaign_calendar
from propensity_dagster.data.validate import attribute_types, judge_entities, judge_stream
from propensity_dagster.doctor.columns import judge_columns, judge_leaks, judge_segments, profile_columns
from propensity_dagster.doctor.findings import Diagnosis, OutcomeRate, TableProfile, judge_counts, rate_change
from propensity_dagster.errors import InsufficientDataError
from propensity_dagster.evaluation.splits import EMBARGO, TEST, TRAIN, SnapshotSplit, plan_splits
from propensity_dagster.features.activity import daily_activity
from propensity_dagster.features.definitions import define_features

_SAMPLE = 200_000
_LATE_SHARE = _STRANGER_SHARE = 0.01


@dataclass(frozen=True)
class _Data:
    """Good rows, compact: `entities` (key, created_day, attributes), `active` (key, day), `outcomes` (key, day)."""

    entities: ibis.Table
    active: ibis.Table
    outcomes: ibis.Table
    types: dict[str, str]


def diagnose_events(campaign: EventCampaign, home: Home, engine: Engine, *, ingested: bool) -> Diagnosis:
    """Look at the event logs and the entities: in the lake when `ingested`, else at the source."""
    diagnosis = Diagnosis(campaign.name)
    good: dict[str, ibis.Table] = {}
    naive: list[str] = []
    for name in campaign.source.streams:
        good[name] = _judge_stream(diagnosis, campaign, name, home, engine, naive, ingested=ingested)
    if naive:
        diagnosis.add("P205", ", ".join(naive), "taken as UTC", "Say the zone in the source if it is another")
    entities, types = _judge_entities(diagnosis, campaign, good, home, engine, ingested=ingested)
    for name, table in good.items():
        _judge_strangers(diagnosis, campaign, name, table, entities, engine)
    outcome = campaign.outcome.stream
    activity = daily_activity(campaign, {outcome: good[outcome]}, engine)
    chosen = campaign.eligibility.streams or tuple(campaign.source.streams)
    days = [good[name].select(campaign.key, "day").distinct() for name in chosen]
    active = ibis.union(*days, distinct=True) if len(days) > 1 else days[0]
    data = _Data(
        entities,
        engine.cache(active),
        engine.cache(activity.filter(activity.outcome_count > 0).select(campaign.key, "day").distinct()),
        types,
    )
    _judge_outcome(diagnosis, campaign, data, engine)
    judge_segments(diagnosis, campaign, types)
    features = define_features(campaign, {n: k for n, k in types.items() if n not in campaign.protected})
    diagnosis.features = [(feature.name, feature.meaning) for feature in features]
    return diagnosis


def _judge_stream(
    diagnosis: Diagnosis,
    campaign: EventCampaign,
    name: str,
    home: Home,
    engine: Engine,
    naive: list[str],
    *,
    ingested: bool,
) -> ibis.Table:
    """Profile one log; returns its good rows. Columns of times without a zone are added to `naive`."""
    stream = campaign.source.streams[name]
    calendar = campaign_calendar(campaign)
    if ingested:
        lake = home.lake(campaign.name)
        days = lake.partitions(f"raw_{name}", "day")
        raw = engine.read(lake.existing_partitions(f"raw_{name}", "day", [*days, UNPLACED]))
    else:
        within = TimeRange(stream.time, calendar.first, calendar.newest, calendar)
        _, raw = declared_stream(campaign, name, stream, home, engine, within)
    if coerce.is_naive(raw[stream.time].type(), stream.time_format):
        naive.append(f"{name}.{stream.time}")
    row = judge_stream(campaign, name, raw)
    kept = [c for c in row.columns if not c.startswith("raw__")]
    row = engine.cache(row.select(*kept))
    fine = row.filter(row.reason.isnull())
    counts: dict[str, Any] = {"first": fine.time.min(), "last": fine.time.max(), "n": fine.count()}
    counts["entities"] = fine[campaign.key].nunique()
    if stream.id and not stream.lines:
        counts["ids"] = fine.event_id.nunique()
    if stream.ingested_at:
        late = coerce.day_number(fine.ingested_at) - fine.day > campaign.source.late_days
        counts["late"] = late.sum()
    found = engine.arrow(fine.aggregate(**counts)).to_pylist()[0]
    reasons = engine.arrow(
        row.group_by("reason").aggregate(n=row.count()).order_by([ibis.desc("n"), "reason"])
    ).to_pylist()
    rows = sum(r["n"] for r in reasons)
    bad = [(r["reason"], r["n"]) for r in reasons if r["reason"] is not None]
    _judge_bad_rows(diagnosis, campaign, name, rows, bad)
    if found["n"] and "ids" in found and found["n"] > found["ids"]:
        again = found["n"] - found["ids"]
        if again > 0.01 * found["n"]:
            diagnosis.add("P202", f"{name}.{stream.id}", f"{again:,} of {found['n']:,} events repeat an id")
    if found.get("late", 0) and found["late"] > _LATE_SHARE * found["n"]:
        message = (
            f"{found['late'] / found['n']:.1%} arrived more than {campaign.source.late_days} days after they happened"
        )
        diagnosis.add("P304", name, message, "State source.late_days: labels then wait for them")
    kinds = {**dict.fromkeys(stream.categories, "category"), **dict.fromkeys(stream.measures, "number")}
    shown: dict[str, Any] = {c: fine[f"category_{c}"] for c in stream.categories}
    shown |= {m: fine[f"measure_{m}"] / float(THOUSANDTHS) for m in stream.measures}
    if stream.amount:
        kinds[stream.amount] = "number"
        shown[stream.amount] = fine.amount / float(CENTS)
    columns = profile_columns(fine.select(**shown), kinds, engine) if kinds else []
    first, last = (str(found[end] or "") for end in ("first", "last"))
    diagnosis.tables.append(TableProfile(name, rows, found["n"], first, last, found["entities"], columns))
    return fine


def _judge_bad_rows(
    diagnosis: Diagnosis, campaign: EventCampaign, name: str, rows: int, bad: list[tuple[str, int]]
) -> None:
    total = sum(n for _, n in bad)
    if not total:
        return
    reasons = "; ".join(f"{reason} ({n:,})" for reason, n in bad[:3])
    code = "P204" if total > campaign.max_bad_fraction * rows else "P203"
    fix = "Mend the source, or say time_format, where, or max_bad_fraction" if code == "P204" else ""
    diagnosis.add(code, name, f"{total:,} of {rows:,} rows break the contract: {reasons}", fix)


def _judge_entities(
    diagnosis: Diagnosis,
    campaign: EventCampaign,
    good: dict[str, ibis.Table],
    home: Home,
    engine: Engine,
    *,
    ingested: bool,
) -> tuple[ibis.Table, dict[str, str]]:
    """Profile the customer table, or derive it; returns its good rows and the attributes' types."""
    source = campaign.source.entities
    if source.table is None:
        events = good[source.stream or ""]
        attributes = {name: events[f"category_{name}"].argmin(events.time) for name in source.attributes}
        derived = events.group_by(campaign.key).aggregate(created_day=events.day.min(), **attributes)
        return engine.cache(derived), dict.fromkeys(source.attributes, "category")
    name = source.table
    if ingested:
        raw = engine.read(home.lake(campaign.name).existing(f"raw_{name}"))
    else:
        raw = declared_entities(campaign, home, engine)
    raw = engine.cache(raw)
    types = attribute_types(campaign, raw, engine)
    row = judge_entities(campaign, raw, types)
    row = engine.cache(row.select(campaign.key, "created_at", *types, "reason"))
    reasons = engine.arrow(
        row.group_by("reason").aggregate(n=row.count()).order_by([ibis.desc("n"), "reason"])
    ).to_pylist()
    rows = sum(r["n"] for r in reasons)
    _judge_bad_rows(diagnosis, campaign, name, rows, [(r["reason"], r["n"]) for r in reasons if r["reason"]])
    fine = row.filter(row.reason.isnull())
    found = engine.arrow(
        fine.aggregate(
            n=fine.count(), keys=fine[campaign.key].nunique(), first=fine.created_at.min(), last=fine.created_at.max()
        )
    ).to_pylist()[0]
    if found["n"] > found["keys"]:
        again = found["n"] - found["keys"]
        diagnosis.add("P202", f"{name}.{campaign.key}", f"{again:,} rows repeat a key", "The row created first is used")
    columns = profile_columns(fine, types, engine)
    judge_columns(diagnosis, name, found["n"], columns)
    first, last = (str(found[end] or "") for end in ("first", "last"))
    diagnosis.tables.append(TableProfile(name, rows, found["n"], first, last, found["keys"], columns))
    _judge_times(diagnosis, campaign, name, raw)
    known = fine.group_by(campaign.key).aggregate(
        created_day=coerce.day_number(fine.created_at).min(),
        **{attribute: fine[attribute].argmin(fine.created_at) for attribute in types},
    )
    return engine.cache(known), types


def _judge_times(diagnosis: Diagnosis, campaign: EventCampaign, name: str, raw: ibis.Table) -> None:
    for attribute in campaign.attributes:
        dtype = raw[attribute].type()
        if dtype.is_timestamp() or dtype.is_date():
            message = "a time in the customer table is as of today, not as of a snapshot"
            diagnosis.add("P303", f"{name}.{attribute}", message, "Leave it out, or make it an event log")


def _judge_strangers(
    diagnosis: Diagnosis, campaign: EventCampaign, name: str, table: ibis.Table, entities: ibis.Table, engine: Engine
) -> None:
    strangers = table.anti_join(entities, campaign.key)
    counts = engine.arrow(strangers.aggregate(n=strangers.count(), keys=strangers[campaign.key].nunique()))
    found = counts.to_pylist()[0]
    total = engine.arrow(table.aggregate(n=table.count()))["n"][0].as_py()
    if found["n"] > _STRANGER_SHARE * max(total, 1):
        message = f"{found['n']:,} of {total:,} events belong to {found['keys']:,} entities it does not have"
        diagnosis.add("P201", name, message, "They are left out. Check the key, or complete the table")


def _judge_outcome(diagnosis: Diagnosis, campaign: EventCampaign, data: _Data, engine: Engine) -> None:
    """Outcome rate of every snapshot of the plan, and attributes that give the outcome away."""
    newest_event = engine.arrow(data.outcomes.aggregate(day=data.outcomes.day.max()))["day"][0].as_py()
    where = f"outcome.{campaign.outcome.stream}"
    if newest_event is None:
        diagnosis.add("P105", where, "no event of the outcome's log counts", "Check outcome.where and minimum_amount")
        return
    newest = EPOCH + timedelta(days=newest_event - campaign.outcome_end_days - campaign.source.late_days)
    try:
        plan = plan_splits(campaign, campaign.snapshots.newest or newest, campaign_calendar(campaign).first)
    except InsufficientDataError as error:
        diagnosis.add("P103", "snapshots", str(error).removeprefix(f"{campaign.file}: snapshots: "))
        return
    diagnosis.outcome = _outcome_rates(campaign, plan, data, engine)
    train = [o for o in diagnosis.outcome if o.split == TRAIN]
    rows, converted = sum(o.rows for o in train), sum(o.converted for o in train)
    words = f"in {len(train)} training snapshots"
    kept = campaign.snapshots.keep_negatives
    judge_counts(diagnosis, where, rows, converted, words, campaign.min_converters, kept)
    for split in sorted({o.split for o in diagnosis.outcome} - {TRAIN}):
        chosen = [o for o in diagnosis.outcome if o.split == split]
        if sum(o.converted for o in chosen) in (0, sum(o.rows for o in chosen)):
            diagnosis.add("P105", where, f"in the {split} snapshots", "Widen horizon_days or add snapshots")
    changed = rate_change(diagnosis.outcome)
    if changed:
        fix = "" if campaign.prior.adapt else "Let the scores follow it: prior: {adapt: true}"
        diagnosis.add("P107", where, f"from {changed[0]:.2%} in training to {changed[1]:.2%} in test snapshots", fix)
    last = max(item.snapshot for item in plan if item.split == TEST)
    _judge_attributes(diagnosis, campaign, last, data, engine)


def _outcome_rates(
    campaign: EventCampaign, plan: list[SnapshotSplit], data: _Data, engine: Engine
) -> list[OutcomeRate]:
    labelled = _labelled(campaign, data, any_day())
    query = engine.prepare(labelled.aggregate(rows=labelled.count(), converted=labelled.converted.sum().fill_null(0)))
    rates: list[OutcomeRate] = []
    for item in plan:
        if item.split != EMBARGO:
            (found,) = engine.run_query(on_day(query, day_index(item.snapshot))).to_pylist()
            rates.append(OutcomeRate(str(item.snapshot), item.split, found["rows"], int(found["converted"])))
    return rates


def _labelled(campaign: EventCampaign, data: _Data, as_of: Any) -> ibis.Table:
    """Eligible entities at `as_of` and whether they converted: the pipeline's rules, without its features."""
    rule = campaign.eligibility
    cut = as_of - campaign.source.late_days
    start = as_of + campaign.outcome.gap_days
    end = start + campaign.outcome.horizon_days
    key = campaign.key
    known = data.entities.filter(
        (data.entities.created_day < as_of) & (as_of - data.entities.created_day >= rule.min_tenure_days)
    )
    hits = data.outcomes.filter((data.outcomes.day >= start) & (data.outcomes.day < end)).select(key).distinct()
    known = known.mutate(converted=known[key].isin(hits[key]))
    if rule.active_within_days is None:
        return known
    recent = data.active.filter((data.active.day >= cut - rule.active_within_days) & (data.active.day < cut))
    is_active = known[key].isin(recent.select(key).distinct()[key])
    return known.filter(is_active | (known.created_day >= as_of - rule.active_within_days))


def _judge_attributes(
    diagnosis: Diagnosis, campaign: EventCampaign, snapshot: date, data: _Data, engine: Engine
) -> None:
    kinds = {name: kind for name, kind in data.types.items() if name not in campaign.protected}
    if not kinds:
        return
    table = _labelled(campaign, data, ibis.literal(day_index(snapshot), "int32"))
    sample: pa.Table = engine.arrow(table.select(*kinds, "converted").limit(_SAMPLE))
    judge_leaks(diagnosis, "entities", sample, kinds, sample["converted"].cast("float64").to_numpy())
