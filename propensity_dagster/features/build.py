"""Point-in-time features and labels. Belongs here: what may be seen at a snapshot, and nothing later.

`as_of` is required everywhere. Features of snapshot t read activity with day < t - late_days that was known
before t; labels read days in [t + gap, t + gap + horizon).
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow.parquet as pq

from propensity_dagster.campaign import EventCampaign
from propensity_dagster.campaign_sections import Stream
from propensity_dagster.data import coerce
from propensity_dagster.data.days import day_index, days_between
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.ingest import newest_event_day
from propensity_dagster.data.lake import Home, version_of
from propensity_dagster.data.months import day_with, read_months
from propensity_dagster.data.sources import campaign_calendar
from propensity_dagster.errors import DataContractError, InsufficientDataError
from propensity_dagster.features.activity import ACTIVITY, CATEGORIES, ORDER, activity_columns
from propensity_dagster.features.definitions import ALL, Feature, define_features

logger = logging.getLogger(__name__)

ENTITIES = "entities"
AsOf = date | ir.IntegerValue
"""A snapshot, or what stands for one in a query that is prepared (see `engine.any_day`)."""


@dataclass(frozen=True)
class Inputs:
    """What features are computed from, as engine tables, and the feature list.

    `activity` has the columns of `previous_days` too. `versions`: of the files of all these, before they were read.
    `periods`: the rows of `activity`, some of them added up: `fold_history`.
    """

    entities: ibis.Table
    activity: ibis.Table
    categories: ibis.Table | None
    features: list[Feature]
    versions: Mapping[Path, tuple[int, int]] = field(default_factory=dict[Path, tuple[int, int]])
    periods: ibis.Table | None = None

    def replaced(self) -> list[Path]:
        """Files that are not what they were: what was read of them may be of both states."""
        return [file for file, version in self.versions.items() if not file.exists() or version_of(file) != version]


def build_features(campaign: EventCampaign, inputs: Inputs, *, as_of: AsOf) -> ibis.Table:
    """Features of every eligible entity at snapshot `as_of`, one row each, sorted by key."""
    cut = _day(as_of) - campaign.source.late_days
    rows = _periods(campaign, inputs.activity) if inputs.periods is None else inputs.periods
    known = rows.filter((rows.known_day < _day(as_of)) & (rows.day < cut))
    parts = [_span(campaign, known, cut, *span) for span in _spans(campaign)]
    recent = known.filter(known.day >= cut - campaign.longest_window)
    for name, stream in campaign.source.streams.items():
        if not stream.type and stream.ingested_at:
            parts.append(_gap_squares(campaign, recent, name))
    if inputs.categories is not None:
        parts += _distinct(campaign, inputs.categories, as_of=as_of)
    entities = _known_entities(campaign, inputs.entities, as_of=as_of)
    joined = reduce(lambda left, right: _left_join(left, right, campaign.key), parts, entities)
    joined = joined.mutate(**_windows(campaign, joined))
    eligible = joined.filter(_eligible(campaign, joined, cut, as_of=as_of))
    columns = {feature.name: feature.expression(eligible) for feature in inputs.features}
    return eligible.select(campaign.key, **columns).order_by(campaign.key)


def fold_history(campaign: EventCampaign, inputs: Inputs, engine: Engine, *, first: date, last: date) -> Inputs:
    """The same inputs, with the days that lie in one span for all snapshots from `first` to `last` made one row.

    Where events become known later, each snapshot knows others of those days: then it is left as it is.
    """
    if any(stream.ingested_at for stream in campaign.source.streams.values()):
        return inputs
    earliest, latest = (day_index(snapshot) - campaign.source.late_days for snapshot in (first, last))
    oldest = latest - campaign.longest_window
    rows = _periods(campaign, inputs.activity)
    pieces: list[ibis.Table] = []
    for _, newer, older in reversed(_spans(campaign)):
        end = earliest - newer
        if older is not None:
            start = latest - older
            if (end - start) * 2 < older - newer:
                continue  # of few of its days, and not worth it
            pieces.append(rows.filter(rows.day < start))
            rows = rows.filter(rows.day >= start)
        inside = rows.filter(rows.day < end)
        totals = _aggregates(campaign, inside, oldest)
        for name in previous_days(campaign):  # a gap that begins before `oldest` counts for some of the snapshots
            totals[name] = (inside[name] < oldest).ifelse(inside[name], ibis.null("int32")).min()
        day = ibis.literal(end - 1, "int32")
        folded = inside.group_by(campaign.key).aggregate(**totals).mutate(day=day, known_day=day)
        pieces.append(engine.cache(folded.select(*rows.columns)))
        rows = rows.filter(rows.day >= end)
    return replace(inputs, periods=engine.as_view(ibis.union(*pieces, rows)))


def build_labels(campaign: EventCampaign, activity: ibis.Table, scored: ibis.Table, *, as_of: AsOf) -> ibis.Table:
    """Whether each entity of `scored` converted in the outcome window of snapshot `as_of`, sorted by key."""
    start = _day(as_of) + campaign.outcome.gap_days
    end = start + campaign.outcome.horizon_days
    window = activity.filter((activity.day >= start) & (activity.day < end))
    outcomes = window.group_by(campaign.key).aggregate(outcome_count=window.outcome_count.sum().cast("int64"))
    joined = _left_join(scored.select(campaign.key), outcomes, campaign.key)
    count = joined.outcome_count.fill_null(0).cast("int64")
    return joined.select(campaign.key, converted=count > 0, outcome_count=count).order_by(campaign.key)


def is_mature(campaign: EventCampaign, newest: date, *, as_of: date) -> bool:
    """Whether the whole outcome window, and the days events may be late, lie before the newest event day."""
    return as_of + timedelta(days=campaign.outcome_end_days + campaign.source.late_days) <= newest


def newest_mature(campaign: EventCampaign, home: Home) -> date:
    """The newest snapshot whose labels exist."""
    newest = newest_event_day(campaign, home)
    return newest - timedelta(days=campaign.outcome_end_days + campaign.source.late_days)


def entity_table(campaign: EventCampaign) -> str:
    """Lake table of the entities: the validated customer table, or the one derived from a stream."""
    table = campaign.source.entities.table
    return f"validated_{table}" if table else ENTITIES


def derive_entities(campaign: EventCampaign, home: Home, engine: Engine) -> int:
    """Everybody seen in the entity stream becomes an entity, created with the first event. Returns the number.

    Attributes are those of the first event, so that they too were known at creation.
    """
    name = campaign.source.entities.stream or ""
    lake = home.lake(campaign.name)
    days = lake.partitions(f"validated_{name}", "day")
    if not days:
        raise DataContractError(f"{ENTITIES}: validated_{name} has not been materialized yet")
    events = engine.read(lake.existing_days(f"validated_{name}", days))
    stream = campaign.source.streams[name]
    known = ibis.greatest(events.time, events.ingested_at) if stream.ingested_at else events.time
    columns: dict[str, Any] = {"created_at": known.min()}
    for attribute in campaign.source.entities.attributes:
        columns[attribute] = events[f"category_{attribute}"].argmin(events.time)
    entities = events.group_by(campaign.key).aggregate(**columns).order_by(campaign.key)
    engine.publish(entities, lake.file(ENTITIES))
    return pq.read_metadata(lake.file(ENTITIES)).num_rows


def open_inputs(
    campaign: EventCampaign, home: Home, engine: Engine, *, first: date, last: date, with_outcomes: bool
) -> Inputs:
    """The entities and the activity that snapshots from `first` to `last` need.

    Args:
        campaign: the campaign.
        home: where the lake is.
        engine: where to compute.
        first: oldest snapshot.
        last: newest snapshot.
        with_outcomes: also the days of the newest snapshot's outcome window.

    Raises:
        DataContractError: when a day in between has not been ingested.
    """
    lake = home.lake(campaign.name)
    start = campaign_calendar(campaign).first
    if first <= start:
        raise InsufficientDataError(
            f"{campaign.file}: snapshot {first} has no history: the event logs start on {start}"
        )
    end = last + timedelta(days=campaign.outcome_end_days - 1 if with_outcomes else -1)
    days = days_between(start, end)
    has_categories = any(stream.categories for stream in campaign.source.streams.values())
    files = [lake.existing(entity_table(campaign)), *lake.existing_days(ACTIVITY, days)]
    files += lake.existing_days(CATEGORIES, days) if has_categories else []
    versions = {file: version_of(file) for file in files}
    entities = engine.read(files[0])
    order = [campaign.key, *ORDER[ACTIVITY]]
    activity = read_months(ACTIVITY, days, order, lake, engine, previous_days(campaign))
    categories = None
    if has_categories:
        categories = read_months(CATEGORIES, days, [campaign.key, *ORDER[CATEGORIES]], lake, engine)
    return Inputs(entities, activity, categories, campaign_features(campaign, entities), versions)


def previous_days(campaign: EventCampaign) -> dict[str, str]:
    """What months of activity have more than the days: see `with_previous`. Where events become known later, the day
    before an active one is a question of the snapshot."""
    streams = campaign.source.streams.items()
    return {_previous(name): f"{name}__count" for name, s in streams if not s.type and not s.ingested_at}


def campaign_features(campaign: EventCampaign, entities: ibis.Table) -> list[Feature]:
    """The feature list, with attribute types as they were found in the data."""
    types = {
        name: "number" if entities[name].type().is_numeric() else "category"
        for name in campaign.source.entities.attributes
    }
    return define_features(campaign, types)


def _spans(campaign: EventCampaign) -> list[tuple[str, int, int | None]]:
    """Each window's name, and the days before the snapshot that it has and the one before it has not."""
    edges = [0, *campaign.features.windows_days]
    spans: list[tuple[str, int, int | None]] = [(f"{older}d", newer, older) for newer, older in pairwise(edges)]
    return [*spans, (ALL, edges[-1], None)]


def _span(campaign: EventCampaign, known: ibis.Table, cut: Any, name: str, newer: int, older: int | None) -> ibis.Table:
    """Totals of the days between two windows, by entity: every row is read for one span alone.

    One narrow group-by a span: half the cost of one wide group-by over all.
    """
    rows = known.filter(known.day < cut - newer) if newer else known
    if older is not None:
        rows = rows.filter(rows.day >= cut - older)
    totals = _aggregates(campaign, rows, cut - campaign.longest_window)
    return rows.group_by(campaign.key).aggregate(**{f"{column}__{name}": total for column, total in totals.items()})


def _periods(campaign: EventCampaign, activity: ibis.Table) -> ibis.Table:
    """Rows of days as rows of periods, which also say when a thing happened last and first, and on how many days.

    `_gap_squares` is of the days between active ones within the period, `_previous` the active day before its first.
    Names that begin with an underscore are ours: a measure of a stream may be called `days` or `last`.
    """
    columns: dict[str, Any] = {}
    for name, stream in campaign.source.streams.items():
        happened = day_with(activity, f"{name}__count")
        columns |= {f"_last__{name}": happened, f"_first__{name}": happened}
        for kind in stream.types if stream.type else ():
            columns[f"_last_{kind}__{name}"] = day_with(activity, f"{name}__type_{kind}")
        if not stream.type and not stream.ingested_at:
            columns[f"_days__{name}"] = (activity[f"{name}__count"] > 0).cast("int64")
            columns[f"_gap_squares__{name}"] = ibis.literal(0, "int64")
    return activity.select(campaign.key, "day", "known_day", *_totals(campaign), *previous_days(campaign), **columns)


def _aggregates(campaign: EventCampaign, rows: ibis.Table, oldest: Any) -> dict[str, Any]:
    """Of periods, one period. A gap counts when it begins at day `oldest` or later."""
    columns: dict[str, Any] = {
        column: rows[column].max() if column.endswith("_max") else rows[column].sum().cast("int64")
        for column in _totals(campaign)
    }
    for name, stream in campaign.source.streams.items():
        columns[f"_last__{name}"] = rows[f"_last__{name}"].max()
        columns[f"_first__{name}"] = rows[f"_first__{name}"].min()
        for kind in stream.types if stream.type else ():
            columns[f"_last_{kind}__{name}"] = rows[f"_last_{kind}__{name}"].max()
        if stream.type:
            continue
        if stream.ingested_at:  # an entity may have several rows a day, as late events became known
            columns[f"_days__{name}"] = rows[f"_first__{name}"].nunique()
        else:
            columns[f"_days__{name}"] = rows[f"_days__{name}"].sum().cast("int64")
            previous = rows[_previous(name)]
            gap = (previous >= oldest).ifelse(rows[f"_first__{name}"] - previous, ibis.null("int32")).cast("int64")
            within = rows[f"_gap_squares__{name}"].sum()
            columns[f"_gap_squares__{name}"] = ((gap * gap).sum().fill_null(0) + within).cast("int64")
    return columns


def _windows(campaign: EventCampaign, joined: ibis.Table) -> dict[str, Any]:
    """A window's totals are those of its spans together: whole numbers, so in any order the same."""
    names = [name for name, _, _ in _spans(campaign)]

    def of(column: str, spans: list[str], combine: Callable[..., Any]) -> Any:
        parts = [joined[f"{column}__{span}"] for span in spans]
        return combine(*parts) if len(parts) > 1 else parts[0]

    def add(*parts: Any) -> Any:
        return reduce(lambda a, b: a + b, (part.fill_null(0) for part in parts))

    def rhythm(name: str, stream: Stream) -> dict[str, Any]:
        """Of n days with events: n - 1 gaps between them, which add up to the days from the first to the last."""
        days = of(f"_days__{name}", names[:-1], add)
        last, first = of(f"_last__{name}", names[:-1], ibis.greatest), of(f"_first__{name}", names[:-1], ibis.least)
        found = {f"_days__{name}_{campaign.longest_window}d": days}
        found |= {f"_gaps__{name}": days - 1, f"_gap_sum__{name}": last - first}
        if not stream.ingested_at:
            found[f"_gap_squares__{name}"] = of(f"_gap_squares__{name}", names[:-1], add)
        return found

    columns: dict[str, Any] = {}
    for i, name in enumerate(names, start=1):
        for column in _totals(campaign):
            columns[f"{column}_{name}"] = of(column, names[:i], ibis.greatest if column.endswith("_max") else add)
    for name, stream in campaign.source.streams.items():
        columns[f"_last__{name}_{ALL}"] = of(f"_last__{name}", names, ibis.greatest)
        columns[f"_first__{name}_{ALL}"] = of(f"_first__{name}", names, ibis.least)
        for kind in stream.types if stream.type else ():
            columns[f"_last_{kind}__{name}_{ALL}"] = of(f"_last_{kind}__{name}", names, ibis.greatest)
        if not stream.type:
            columns |= rhythm(name, stream)
    return columns


def _previous(stream: str) -> str:
    return f"_previous__{stream}"


def _totals(campaign: EventCampaign) -> list[str]:
    return [column for column in activity_columns(campaign) if column != "outcome_count"]


def _gap_squares(campaign: EventCampaign, rows: ibis.Table, name: str) -> ibis.Table:
    """Sum of squares of the days between days with events, of what is known at one snapshot alone."""
    # An entity may have several rows a day, as late events became known.
    days = rows.filter(rows[f"{name}__count"] > 0).select(campaign.key, "day").distinct()
    before = days.day.lag().over(ibis.window(group_by=campaign.key, order_by="day"))
    days = days.mutate(gap=(days.day - before).cast("int64"))
    return days.group_by(campaign.key).aggregate(**{f"_gap_squares__{name}": (days.gap * days.gap).sum().cast("int64")})


def _distinct(campaign: EventCampaign, categories: ibis.Table, *, as_of: AsOf) -> list[ibis.Table]:
    cut = _day(as_of) - campaign.source.late_days
    rows = categories.filter(
        (categories.day >= cut - campaign.longest_window)
        & (categories.day < cut)
        & (categories.known_day < _day(as_of))
    )
    names = [f"{n}_{c}" for n, stream in campaign.source.streams.items() for c in stream.categories]
    return [
        rows.filter(rows.feature == name)
        .group_by(campaign.key)
        .aggregate(**{f"distinct__{name}": ibis._.value.nunique()})
        for name in names
    ]


def _known_entities(campaign: EventCampaign, entities: ibis.Table, *, as_of: AsOf) -> ibis.Table:
    attributes = {f"attribute__{name}": entities[name] for name in campaign.source.entities.attributes}
    created = coerce.day_number(entities.created_at)
    known = entities.select(campaign.key, created_day=created, **attributes)
    known = known.filter(known.created_day < _day(as_of))
    return known.mutate(
        tenure_days=(_day(as_of) - known.created_day).cast("int64"),
        as_of=_day(as_of).cast("int32"),
    )


def _eligible(campaign: EventCampaign, joined: ibis.Table, cut: Any, *, as_of: AsOf) -> Any:
    rule = campaign.eligibility
    old_enough = joined.tenure_days >= rule.min_tenure_days
    if rule.active_within_days is None:
        return old_enough
    streams = rule.streams or tuple(campaign.source.streams)
    created = joined.created_day >= _day(as_of) - rule.active_within_days
    active = [joined[f"_last__{name}_{ALL}"] >= cut - rule.active_within_days for name in streams]
    return old_enough & reduce(lambda a, b: a | b, (a.fill_null(False) for a in active), created)


def _day(as_of: AsOf) -> Any:
    return ibis.literal(day_index(as_of), "int32") if isinstance(as_of, date) else as_of


def _left_join(left: ibis.Table, right: ibis.Table, key: str) -> ibis.Table:
    joined = left.left_join(right, key)
    return joined.drop(f"{key}_right") if f"{key}_right" in joined.columns else joined
