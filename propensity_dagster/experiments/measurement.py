"""Who is in an experiment, in which variant, since when, and what was measured of them.

A unit enters on the first day that exposes it, and is measured once its whole window lies before the newest event day.
Events are counted by day: who is assigned during a day is measured from the next one on, so that nothing from before
the assignment counts. Belongs here: units and their measures. Does not: comparing them.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import json
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, EventCampaign, measured_sums
from propensity_dagster.campaign_sections import CONVERSION, Assignments, Experiment
from propensity_dagster.contracts.tables import CENTS, THOUSANDTHS
from propensity_dagster.data import coerce
from propensity_dagster.data.days import days_between, pc
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.ingest import newest_event_day
from propensity_dagster.data.lake import Home, Lake, publish_text
from propensity_dagster.data.sources import campaign_calendar, read_register
from propensity_dagster.errors import ConfigError, DataContractError, InsufficientDataError
from propensity_dagster.experiments.assignment import assign
from propensity_dagster.experiments.readout import read_out, segment_names
from propensity_dagster.features.activity import ACTIVITY
from propensity_dagster.features.build import entity_table
from propensity_dagster.scoring.audiences import AUDIENCE, CONTACT, RANDOM, delivered_audiences
from propensity_dagster.scoring.batch import SCORES
from propensity_dagster.serving.publish.prediction_log import PREDICTIONS

_COVARIATE_SHARE = 0.9  # of the units a score must be known for, to be the covariate
_FROZEN = ("units", "variants", "starts", "horizon_days", "primary", "alpha", "planned_units", "salt")


@dataclass(frozen=True)
class Units:
    """Units of an experiment.

    Attributes:
        assigned: units so far.
        measured: those whose window is over, with their measures: see `readout.read_out`.
        covariate: what `covariate` is; None where there is none.
        matures: day from which on the last unit that may be assigned is measured.
        newest: the newest event day.
    """

    assigned: int
    measured: pa.Table
    covariate: str | None
    matures: date
    newest: date


def require_unchanged(campaign: Campaign, name: str, home: Home) -> None:
    """What makes an experiment is written down when it is first read, and must stay.

    Raises:
        ConfigError: naming what was changed midway.
    """
    experiment = campaign.experiments[name]
    file = home.lake(campaign.name).document("experiments", name, "definition.json")
    stated = json.loads(experiment.model_dump_json(include=set(_FROZEN)))
    stated["variants"] = list(stated["variants"].items())  # their order is part of the assignment
    if experiment.horizon_days is None and isinstance(campaign, EventCampaign):
        stated["horizon_days"] = campaign.outcome.horizon_days
    metric = experiment.metrics.get(experiment.primary)
    stated["primary"] = {"name": experiment.primary, **(metric.model_dump() if metric else {})}
    now = json.loads(json.dumps(stated))
    if not file.exists():
        publish_text(json.dumps(now, indent=1), file)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for key in _FROZEN:
        if before[key] != now[key]:
            raise ConfigError(
                f"{campaign.file}: experiments.{name}.{key}: was {before[key]} when the experiment started, now it is "
                f"{now[key]}; a running experiment must not change: give a new one another name"
            )


def publish_readout(campaign: EventCampaign, name: str, home: Home, engine: Engine) -> dict[str, Any]:
    """Read an experiment out, and publish the record as JSON. Returns it.

    Raises:
        InsufficientDataError: while too few units are measured, with the day on which the last one will be.
        DataContractError: for units in two variants, or in one that the experiment does not have.
        ConfigError: when the experiment was changed after its start.
    """
    experiment = campaign.experiments[name]
    require_unchanged(campaign, name, home)
    units = measured_units(campaign, name, home, engine)
    where = f"{campaign.name}: experiment {name}"
    if not units.measured.num_rows:
        raise InsufficientDataError(
            f"{where}: of {units.assigned:,} units none is measured yet: events go to {units.newest}; the last unit "
            f"will be on {units.matures}"
        )
    try:
        found = read_out(experiment, units.measured, units.covariate is not None)
    except (InsufficientDataError, DataContractError) as error:
        raise type(error)(
            f"{where}: {error}; {units.assigned:,} units are assigned, events go to {units.newest}"
        ) from None
    record = {
        "experiment": name,
        "assigned": units.assigned,
        "covariate": units.covariate,
        "newest": str(units.newest),
        "matures": str(units.matures),
        "final": units.newest >= units.matures,
        **found,
    }
    publish_text(json.dumps(record, indent=1), readout_file(campaign, name, home))
    return record


def readout_file(campaign: EventCampaign, name: str, home: Home) -> Path:
    """Where the record of an experiment's readout is."""
    return home.reports(campaign.name) / f"experiment_{name}.json"


def measured_units(campaign: EventCampaign, name: str, home: Home, engine: Engine) -> Units:
    """Everybody who is in an experiment, and the measures of those whose window is over.

    Raises:
        DataContractError: for units in two variants, or days that are missing.
        ConfigError: when a table of assignments lacks a column.
    """
    experiment = campaign.experiments[name]
    units = _exposed(campaign, name, experiment, home, engine)
    newest = newest_event_day(campaign, home)
    horizon = experiment.horizon_days or campaign.outcome.horizon_days
    lag = campaign.outcome.gap_days + horizon + campaign.source.late_days
    mature = units.filter(pc.less_equal(units["start"], pa.scalar(newest - timedelta(days=lag), pa.date32())))
    matures = experiment.ends + timedelta(days=lag)
    table, covariate = _measure(campaign, experiment, mature, horizon, home, engine)
    return Units(units.num_rows, table, covariate, matures, newest)


def _exposed(campaign: EventCampaign, name: str, experiment: Experiment, home: Home, engine: Engine) -> pa.Table:
    """Key, variant, first day measured, score (may be null) of every unit, sorted by key."""
    lake = home.lake(campaign.name)
    if isinstance(experiment.units, Assignments):
        rows = _assigned_elsewhere(campaign, name, experiment.units, home, engine)
    elif experiment.units == PREDICTIONS:
        rows = _answered(campaign, lake, experiment)
    else:
        rows = _in_snapshots(campaign, lake, experiment)
        variants = assign(name, experiment, rows["key"].to_pylist())
        rows = rows.append_column("variant", pa.array(variants, pa.string()))
    first, last = pa.scalar(experiment.starts, pa.date32()), pa.scalar(experiment.ends, pa.date32())
    rows = rows.filter(pc.and_(pc.greater_equal(rows["start"], first), pc.less(rows["start"], last)))
    rows = rows.sort_by([("key", "ascending"), ("start", "ascending")])
    keys = rows["key"].to_numpy(zero_copy_only=False)
    first_of_key = np.ones(len(keys), dtype=bool)
    first_of_key[1:] = keys[1:] != keys[:-1]
    pairs = rows.group_by(["key", "variant"]).aggregate([]).num_rows
    if pairs > first_of_key.sum():
        raise DataContractError(
            f"{campaign.name}: experiment {name}: {pairs - int(first_of_key.sum()):,} of {int(first_of_key.sum()):,} "
            "units are in two variants: which of the two had an effect cannot be told. Mend the assignment, or leave "
            "these units out of it"
        )
    return rows.filter(pa.array(first_of_key))


def _in_snapshots(campaign: EventCampaign, lake: Lake, experiment: Experiment) -> pa.Table:
    """Contacts of delivered audiences, or all who were scored, of the experiment's days."""
    of_audience = experiment.units == AUDIENCE
    table = AUDIENCE if of_audience else SCORES
    days = delivered_audiences(lake) if of_audience else lake.partitions(SCORES, "snapshot")
    parts = [_schema().empty_table()]
    for day in days:
        if experiment.starts <= day < experiment.ends:
            columns = [campaign.key, "probability", *(["group"] if of_audience else [])]
            rows = pq.read_table(lake.partition(table, "snapshot", day), columns=columns)
            if of_audience:
                rows = rows.filter(pc.is_in(rows["group"], pa.array([CONTACT, RANDOM])))
            start = pa.repeat(pa.scalar(day, pa.date32()), rows.num_rows)
            parts.append(pa.table({"key": rows[campaign.key], "start": start, "score": rows["probability"]}))
    return pa.concat_tables(parts)


def _answered(campaign: EventCampaign, lake: Lake, experiment: Experiment) -> pa.Table:
    """Customers whom the service answered, from its log; the score is the variant's own and no covariate."""
    parts = [_schema(variant=True).empty_table()]
    for day in lake.partitions(PREDICTIONS, "day"):
        if experiment.starts <= day < experiment.ends:
            rows = pq.read_table(lake.partition(PREDICTIONS, "day", day), columns=["key", "variant"])
            rows = rows.filter(pc.is_valid(rows["key"])).group_by(["key", "variant"]).aggregate([])
            n = rows.num_rows
            start = pa.repeat(pa.scalar(day + timedelta(days=1), pa.date32()), n)
            parts.append(
                pa.table(
                    {"key": rows["key"], "start": start, "score": pa.nulls(n, pa.float64()), "variant": rows["variant"]}
                )
            )
    return pa.concat_tables(parts)


def _assigned_elsewhere(campaign: EventCampaign, name: str, table: Assignments, home: Home, engine: Engine) -> pa.Table:
    where = f"experiments.{name}.units"
    names = {"key": table.key or campaign.key, "variant": table.variant, "time": table.time}
    rows = read_register(campaign, where, table, names, home, engine)
    at = coerce.utc_time(rows.time, None, f"{campaign.file}: {where}.time")
    # During a day, events before and after cannot be told apart: the next day is the first that is surely after.
    start = (at + ibis.interval(days=1) - ibis.interval(microseconds=1)).date()
    found = rows.select(key=coerce.key_text(rows.key), start=start, variant=coerce.category(rows.variant))
    found = engine.arrow(found.filter(found.key.notnull() & found.start.notnull() & found.variant.notnull()))
    scores = pa.nulls(found.num_rows, pa.float64())
    units = pa.table({"key": found["key"], "start": found["start"].cast("date32"), "score": scores})
    return _last_scores(campaign, units, home.lake(campaign.name)).append_column("variant", found["variant"])


def _last_scores(campaign: EventCampaign, units: pa.Table, lake: Lake) -> pa.Table:
    """The newest score of each unit from on or before its first day."""
    score = np.full(units.num_rows, np.nan)
    start = units["start"].to_numpy(zero_copy_only=False).astype("datetime64[D]")
    for day in lake.partitions(SCORES, "snapshot"):
        rows = np.flatnonzero(start >= np.datetime64(day))
        if len(rows):
            table = pq.read_table(lake.partition(SCORES, "snapshot", day), columns=[campaign.key, "probability"])
            at: Any = pc.index_in(
                units["key"].combine_chunks().take(pa.array(rows)), table[campaign.key].combine_chunks()
            )
            there = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
            score[rows[there]] = table["probability"].take(at.drop_null()).to_numpy()
    return units.set_column(2, "score", pa.array(score, mask=np.isnan(score)))


def _schema(*, variant: bool = False) -> pa.Schema:
    fields: list[Any] = [("key", pa.string()), ("start", pa.date32()), ("score", pa.float64())]
    return pa.schema([*fields, *([("variant", pa.string())] if variant else [])])


def _measure(
    campaign: EventCampaign, experiment: Experiment, units: pa.Table, horizon: int, home: Home, engine: Engine
) -> tuple[pa.Table, str | None]:
    lake = home.lake(campaign.name)
    starts: Any = pc.min_max(units["start"])
    if not units.num_rows:
        return units, None
    oldest, newest = starts["min"].as_py(), starts["max"].as_py()
    gap = campaign.outcome.gap_days
    calendar = campaign_calendar(campaign).first
    days = days_between(max(oldest - timedelta(days=horizon), calendar), newest + timedelta(days=gap + horizon - 1))
    people = engine.table(
        pa.table({campaign.key: units["key"], "start": pc.cast(units["start"], pa.int32())})
    )  # days since 1970, as `day` is
    activity = engine.read(lake.existing_days(ACTIVITY, days))
    joined = people.join(activity, campaign.key)
    after = (joined.day >= joined.start) & (joined.day < joined.start + horizon)
    outcome = (joined.day >= joined.start + gap) & (joined.day < joined.start + gap + horizon)
    before = (joined.day >= joined.start - horizon) & (joined.day < joined.start)
    sums: dict[str, Any] = {
        CONVERSION: joined.outcome_count.sum(where=outcome),
        "before": joined.outcome_count.sum(where=before),
    }
    columns = measured_sums(campaign.source)
    for name, metric in experiment.metrics.items():
        sums[name] = joined[columns[metric.sum]].sum(where=after)
        if metric.per is not None:
            sums[f"{name}__per"] = joined[columns[metric.per]].sum(where=after)
    found = engine.arrow(joined.group_by(campaign.key).aggregate(**{k: v.cast("int64") for k, v in sums.items()}))
    at: Any = pc.index_in(units["key"].combine_chunks(), found[campaign.key].combine_chunks())
    measured = {name: pc.fill_null(found[name].take(at), 0).to_numpy().astype(np.float64) for name in sums}
    measured[CONVERSION] = (measured[CONVERSION] > 0).astype(np.float64)
    for name, metric in experiment.metrics.items():
        measured[name] /= _scale(campaign, metric.sum)
        if metric.per is not None:
            measured[f"{name}__per"] /= _scale(campaign, metric.per)
    covariate, words = _covariate(campaign, units, measured.pop("before"), oldest, horizon)
    table = pa.table({"key": units["key"], "start": units["start"], "variant": units["variant"], **measured})
    if words is not None:
        table = table.append_column("covariate", pa.array(covariate))
    return _with_segments(campaign, experiment, table, lake), words


def _covariate(
    campaign: EventCampaign, units: pa.Table, before: Any, oldest: date, horizon: int
) -> tuple[Any, str | None]:
    """What is known of each unit before its assignment, and says most of what it will do."""
    score = units["score"].to_numpy()
    known = ~np.isnan(score)
    if known.mean() >= _COVARIATE_SHARE:
        return np.where(known, score, score[known].mean()), "propensity score before the assignment"
    enough = oldest - timedelta(days=horizon) >= campaign_calendar(campaign).first
    if enough and before.std() > 0:
        return (before > 0).astype(np.float64), f"whether the unit converted in the {horizon} days before"
    return None, None


def _scale(campaign: EventCampaign, path: str) -> float:
    """Amounts are kept in cents, measures in thousandths, counts as they are."""
    stream, _, part = path.partition(".")
    if part == "amount" and campaign.source.streams[stream].amount:
        return float(CENTS)
    return float(THOUSANDTHS) if part in campaign.source.streams[stream].measures else 1.0


def _with_segments(campaign: EventCampaign, experiment: Experiment, table: pa.Table, lake: Lake) -> pa.Table:
    names = segment_names(experiment, campaign.segments)
    if not names:
        return table
    entities = pq.read_table(lake.existing(entity_table(campaign)), columns=[campaign.key, *names])
    at: Any = pc.index_in(table["key"].combine_chunks(), entities[campaign.key].combine_chunks())
    for name in names:
        column = entities[name].take(at)
        if not str(column.type).endswith("string"):
            raise ConfigError(f"{campaign.file}: experiments: segment {name!r} is a number, which has no groups")
        table = table.append_column(f"segment__{name}", pc.fill_null(column, "(missing)"))
    return table
