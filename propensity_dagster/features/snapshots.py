"""Publishing snapshots: features, labels, and the training set made of them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import EventCampaign
from propensity_dagster.data.days import day_index
from propensity_dagster.data.engine import Engine, any_day, compiling, on_day
from propensity_dagster.data.lake import ROW_GROUP, Home, publish_table, publish_text, publishing
from propensity_dagster.data.sources import campaign_calendar
from propensity_dagster.errors import DataContractError, InsufficientDataError
from propensity_dagster.evaluation.splits import (
    EMBARGO,
    TEST,
    TRAIN,
    SnapshotSplit,
    plan_splits,
    require_out_of_time,
)
from propensity_dagster.features.build import (
    Inputs,
    build_features,
    build_labels,
    fold_history,
    is_mature,
    newest_mature,
    open_inputs,
)
from propensity_dagster.features.definitions import features_markdown

logger = logging.getLogger(__name__)

TRAINING_SET = "training_set"
SPLITS = "splits"
_SCORED = "scored_entities"
_ATTEMPTS = 3
T = TypeVar("T")


@dataclass(frozen=True)
class FeaturesReport:
    """Eligible entities per snapshot, and the number of features."""

    rows_by_snapshot: dict[date, int]
    features: int


@dataclass(frozen=True)
class LabelsReport:
    """Labelled entities and converters per snapshot."""

    rows_by_snapshot: dict[date, int]
    converted_by_snapshot: dict[date, int]


@dataclass(frozen=True)
class TrainingSetReport:
    """What the training set holds. `shared_entities`: share of test entities that also are in training."""

    rows: dict[str, int]
    converted: dict[str, int]
    shared_entities: float
    plan: tuple[SnapshotSplit, ...] = ()


def publish_features(campaign: EventCampaign, snapshots: Sequence[date], home: Home, engine: Engine) -> FeaturesReport:
    """Compute and publish `features` of these snapshots, reading the activity once."""
    return _of_one_state(_publish_features, campaign, sorted(snapshots), home, engine, with_outcomes=False)


def publish_labels(campaign: EventCampaign, snapshots: Sequence[date], home: Home, engine: Engine) -> LabelsReport:
    """Publish `labels` of these snapshots for the entities that their `features` hold.

    Raises:
        InsufficientDataError: when one is not mature: its labels do not exist, they are not 0.
    """
    ordered = sorted(snapshots)
    mature_until = newest_mature(campaign, home)
    if ordered[-1] > mature_until:
        raise InsufficientDataError(
            f"{campaign.file}: labels of snapshot {ordered[-1]} do not exist yet: its outcome window of "
            f"{campaign.outcome_end_days} days is not over; the newest mature snapshot is {mature_until}"
        )
    return _of_one_state(_publish_labels, campaign, ordered, home, engine, with_outcomes=True)


def publish_training_set(campaign: EventCampaign, home: Home, engine: Engine) -> TrainingSetReport:
    """Plan the splits, publish features and labels of their snapshots, and join them into `training_set`.

    Raises:
        InsufficientDataError: for too little history, or a split without a converter or a non-converter.
        LeakageError: never, unless the plan is broken: it is checked all the same.
    """
    newest = newest_mature(campaign, home)
    stated = campaign.snapshots.newest
    if stated is not None and not is_mature(campaign, _newest_event(newest, campaign), as_of=stated):
        raise InsufficientDataError(
            f"{campaign.file}: snapshots.newest: {stated} is not mature; the newest mature snapshot is {newest}"
        )
    plan = plan_splits(campaign, stated or newest, campaign_calendar(campaign).first)
    require_out_of_time(plan)
    used = [s.snapshot for s in plan if s.split != EMBARGO]
    labels = _of_one_state(_publish_both, campaign, used, home, engine, with_outcomes=True)
    _require_both_outcomes(campaign, plan, labels)
    _join(campaign, plan, home, engine)
    return _describe(campaign, plan, labels, home, engine)


def shared_entities(key: str, training_set: Path, engine: Engine) -> float:
    """Share of the test entities that are also among the training rows."""
    table = engine.read(training_set)
    train = table.filter(table.split == TRAIN).select(key).distinct()
    test = table.filter(table.split == TEST).select(key).distinct()
    both = engine.arrow(test.semi_join(train, key).aggregate(n=test[key].count()))["n"][0].as_py()
    return both / engine.arrow(test.aggregate(n=test.count()))["n"][0].as_py()


def snapshot_instant(snapshot: date) -> datetime:
    """The instant a snapshot stands for: 00:00 UTC."""
    return datetime(snapshot.year, snapshot.month, snapshot.day)


def _newest_event(mature: date, campaign: EventCampaign) -> date:
    return date.fromordinal(mature.toordinal() + campaign.outcome_end_days + campaign.source.late_days)


def _of_one_state(
    publish: Callable[[EventCampaign, Sequence[date], Home, Engine, Inputs], T],
    campaign: EventCampaign,
    snapshots: Sequence[date],
    home: Home,
    engine: Engine,
    *,
    with_outcomes: bool,
) -> T:
    """What `publish` gives of inputs that nobody replaces meanwhile. Where a day is ingested again, it is done again.

    A query opens a file once for every window, and months say what was before them: half of it could be of the day as
    it was and half of the day as it is.

    Raises:
        DataContractError: when files are replaced each time.
    """
    replaced: list[Path] = []
    for _ in range(_ATTEMPTS):
        inputs = open_inputs(
            campaign, home, engine, first=snapshots[0], last=snapshots[-1], with_outcomes=with_outcomes
        )
        report = publish(campaign, snapshots, home, engine, inputs)
        replaced = inputs.replaced()
        if not replaced:
            return report
        logger.warning("%s and %d other files were replaced meanwhile: once more", replaced[0], len(replaced) - 1)
    raise DataContractError(
        f"{replaced[0]} and {len(replaced) - 1} other files were replaced while they were read, {_ATTEMPTS} times; "
        "run this again when the ingestion is over"
    )


def _publish_features(
    campaign: EventCampaign, snapshots: Sequence[date], home: Home, engine: Engine, inputs: Inputs
) -> FeaturesReport:
    lake = home.lake(campaign.name)
    if len(snapshots) > 1:
        inputs = fold_history(campaign, inputs, engine, first=snapshots[0], last=snapshots[-1])
    inputs = _laid_out(inputs, campaign.key, engine)
    with compiling():
        query = engine.prepare(build_features(campaign, inputs, as_of=any_day()))
    rows: dict[date, int] = {}
    for position, snapshot in enumerate(snapshots, start=1):
        file = lake.target("features", "snapshot", snapshot)
        engine.publish_query(on_day(query, day_index(snapshot)), file)
        rows[snapshot] = pq.read_metadata(file).num_rows
        logger.info("features %s: %s entities (%d of %d)", snapshot, f"{rows[snapshot]:,}", position, len(snapshots))
    publish_text(features_markdown(campaign, inputs.features), home.reports(campaign.name) / "features.md")
    return FeaturesReport(rows, len(inputs.features))


def _laid_out(inputs: Inputs, key: str, engine: Engine) -> Inputs:
    """What every snapshot reads, laid out by entity once."""
    entities = engine.by_key(inputs.entities, key)
    categories = engine.by_key(inputs.categories, key) if inputs.categories is not None else None
    if inputs.periods is not None:
        return replace(inputs, entities=entities, categories=categories, periods=engine.by_key(inputs.periods, key))
    return replace(inputs, entities=entities, categories=categories, activity=engine.by_key(inputs.activity, key))


def _publish_labels(
    campaign: EventCampaign, snapshots: Sequence[date], home: Home, engine: Engine, inputs: Inputs
) -> LabelsReport:
    lake = home.lake(campaign.name)
    rows: dict[date, int] = {}
    converted: dict[date, int] = {}
    scored = engine.view(_SCORED, lake.existing_partition("features", "snapshot", snapshots[0]))
    query = engine.prepare(build_labels(campaign, inputs.activity, scored, as_of=any_day()))
    for snapshot in snapshots:
        engine.view(_SCORED, lake.existing_partition("features", "snapshot", snapshot))
        file = lake.target("labels", "snapshot", snapshot)
        engine.publish_query(on_day(query, day_index(snapshot)), file)
        labels = pq.read_table(file, columns=["converted"])["converted"]
        rows[snapshot] = len(labels)
        converted[snapshot] = int(labels.cast("int64").to_numpy().sum())
    logger.info("labels: %s rows, %s converted", f"{sum(rows.values()):,}", f"{sum(converted.values()):,}")
    return LabelsReport(rows, converted)


def _publish_both(
    campaign: EventCampaign, snapshots: Sequence[date], home: Home, engine: Engine, inputs: Inputs
) -> LabelsReport:
    _publish_features(campaign, snapshots, home, engine, inputs)
    return _publish_labels(campaign, snapshots, home, engine, inputs)


def _require_both_outcomes(campaign: EventCampaign, plan: list[SnapshotSplit], labels: LabelsReport) -> None:
    for split in sorted({s.split for s in plan} - {EMBARGO}):
        snapshots = [s.snapshot for s in plan if s.split == split]
        rows = sum(labels.rows_by_snapshot[s] for s in snapshots)
        converted = sum(labels.converted_by_snapshot[s] for s in snapshots)
        if rows == 0 or converted in (0, rows):
            raise InsufficientDataError(
                f"{campaign.file}: the {split} snapshots {snapshots[0]} to {snapshots[-1]} have {rows:,} "
                f"eligible entities of which {converted:,} converted; both outcomes are needed. Widen "
                "outcome.horizon_days, add snapshots, or check outcome and eligibility"
            )


def _join(campaign: EventCampaign, plan: list[SnapshotSplit], home: Home, engine: Engine) -> None:
    """One file sorted by snapshot and key, written snapshot by snapshot: memory holds one at a time."""
    lake = home.lake(campaign.name)
    with publishing(lake.file(TRAINING_SET)) as temporary:
        writer: Any = None
        for item in plan:
            if item.split == EMBARGO:
                continue
            features = pq.read_table(lake.partition("features", "snapshot", item.snapshot))
            labels = pq.read_table(lake.partition("labels", "snapshot", item.snapshot))
            n = features.num_rows
            instant = pa.array([snapshot_instant(item.snapshot)], pa.timestamp("us"))
            table = features.add_column(1, "snapshot", instant.take(pa.array([0] * n)))
            table = table.add_column(2, "split", pa.array([item.split]).take(pa.array([0] * n)))
            table = table.append_column("converted", labels["converted"])
            if writer is None:
                writer = pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=ROW_GROUP)
        writer.close()


def _describe(
    campaign: EventCampaign,
    plan: list[SnapshotSplit],
    labels: LabelsReport,
    home: Home,
    engine: Engine,
) -> TrainingSetReport:
    lake = home.lake(campaign.name)
    publish_table(
        pa.table(
            {
                "snapshot": pa.array([str(s.snapshot) for s in plan]),
                "split": pa.array([s.split for s in plan]),
                "outcome_start": pa.array([s.outcome_start for s in plan]),
                "outcome_end": pa.array([s.outcome_end for s in plan]),
                "rows": pa.array([labels.rows_by_snapshot.get(s.snapshot, 0) for s in plan], pa.int64()),
                "converted": pa.array([labels.converted_by_snapshot.get(s.snapshot, 0) for s in plan], pa.int64()),
            }
        ),
        lake.file(SPLITS),
    )
    splits = sorted({s.split for s in plan} - {EMBARGO})
    return TrainingSetReport(
        plan=tuple(plan),
        rows={p: sum(labels.rows_by_snapshot[s.snapshot] for s in plan if s.split == p) for p in splits},
        converted={p: sum(labels.converted_by_snapshot[s.snapshot] for s in plan if s.split == p) for p in splits},
        shared_entities=shared_entities(campaign.key, lake.file(TRAINING_SET), engine),
    )
