"""Recalibration: the same model, its calibrator fitted anew on matured snapshots, as a new version before the gate.

It is what is tried first when the ranking is intact and the level is not: nothing is learnt again, and the newest
outcomes are used. Calibrator and judgement never see the same rows.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.data.lake import Home, publish_table, publish_text, publishing_folder
from propensity_dagster.errors import DataContractError, InsufficientDataError
from propensity_dagster.evaluation.evaluate import CHAMPION, Evaluation, TestScores, evaluate
from propensity_dagster.evaluation.splits import hash_fractions
from propensity_dagster.explain.summary import inherit_importance
from propensity_dagster.features.snapshots import snapshot_instant
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import choose_calibrator
from propensity_dagster.models.dataset import CATEGORY, FeatureContract, Floats
from propensity_dagster.models.population import number_buckets
from propensity_dagster.models.saved import golden_difference, load_model, write_model
from propensity_dagster.models.training import BASELINE
from propensity_dagster.monitoring.domain import inherit_reference
from propensity_dagster.monitoring.ledger import judged_rows, read_ledger
from propensity_dagster.monitoring.outcomes import OUTCOMES, outcomes_by_version
from propensity_dagster.registry.store import ModelStore
from propensity_dagster.scoring.candidates import score_rows, segment_values
from propensity_dagster.scoring.promotion import PromotionReport, promote_if_decided, require_champion

logger = logging.getLogger(__name__)

RECALIBRATED = "recalibration"
_SNAPSHOTS = 8  # the newest matured ones are enough for two numbers, and are nearest to now
_FOLDS = 5
_MIN_CONVERTERS = 50


@dataclass(frozen=True)
class RecalibrationReport:
    """What was done.

    Attributes:
        promotion: what the gate decided.
        method: of the new calibrator.
        fitted_on: snapshots the calibrator was fitted on.
        judged_on: snapshots it was judged on; the same ones when halves of their customers were used.
        log_loss: of the recalibrated and of the stale model on the rows that judged.
    """

    promotion: PromotionReport
    method: str
    fitted_on: tuple[date, ...]
    judged_on: tuple[date, ...]
    log_loss: tuple[float, float]


def recalibrate(campaign: Campaign, home: Home, store: ModelStore) -> RecalibrationReport:
    """Fit the champion's calibrator anew on its matured snapshots; register it; let the gate decide.

    The newest matured snapshot judges where older ones were over before it; else customers are halved by a hash.

    Raises:
        DataContractError: when there is no champion, or no candidate baseline to measure against.
        InsufficientDataError: when too few of those scored by the champion have converted by now.
    """
    version, stale = require_champion(campaign, store)
    days = [row["snapshot"] for row in judged_rows(read_ledger(campaign, home), version)][-_SNAPSHOTS:]
    if not days:
        raise InsufficientDataError(
            f"{campaign.name}: none of the snapshots that version {version} scored is mature: there is nothing to "
            "recalibrate on"
        )
    older = [day for day in days[:-1] if _is_over(campaign, day, days[-1])]
    tables = {day: _labelled(campaign, day, version, stale.contract, home) for day in days}
    if older:
        fit, judge = pa.concat_tables(tables[d] for d in older), tables[days[-1]]
        fitted_on, judged_on = older, days[-1:]
    else:
        together = pa.concat_tables(tables.values())
        half = hash_fractions(together[campaign.key].to_pylist(), "recalibration") < 0.5
        fit, judge = together.filter(pa.array(half)), together.filter(pa.array(~half))
        fitted_on = judged_on = days
    _require_outcomes(campaign, version, fit, judge)
    fresh = _refitted(campaign, stale, version, fit, fitted_on)
    folder = home.candidates(campaign.name) / RECALIBRATED
    with publishing_folder(folder) as staging:
        write_model(fresh, staging, fresh.contract.encode(judge))
    evaluation = _judged(campaign, home, fresh, stale, version, judge, golden_difference(folder))
    reports = home.reports(campaign.name) / RECALIBRATED
    for name, table in evaluation.tables.items():
        publish_table(table, reports / f"{name}.parquet")
    publish_text(json.dumps(evaluation.record, indent=1, sort_keys=True), reports / "evaluation.json")
    promotion = promote_if_decided(campaign, evaluation.record, folder, reports, store)
    inherit_importance(campaign, version, promotion.challenger_version, home)
    inherit_reference(campaign, version, promotion.challenger_version, home)
    models = evaluation.record["models"]
    losses = (models[fresh.name]["log_loss"]["value"], models[CHAMPION]["log_loss"]["value"])
    logger.info("recalibration: log loss %.5f, stale %.5f: %s", *losses, promotion.sentence)
    return RecalibrationReport(promotion, fresh.calibrator.method, tuple(fitted_on), tuple(judged_on), losses)


def _is_over(campaign: Campaign, day: date, judge: date) -> bool:
    """Whether a snapshot's outcome window was over when another one was scored."""
    window = campaign.outcome_end_days if isinstance(campaign, EventCampaign) else 1
    return day + timedelta(days=window) <= judge


def _labelled(campaign: Campaign, snapshot: date, version: str, contract: FeatureContract, home: Home) -> pa.Table:
    """Features of those whom a version scored, and their segments, with `converted` and `snapshot`."""
    lake = home.lake(campaign.name)
    outcomes = pq.read_table(lake.existing_partition(OUTCOMES, "snapshot", snapshot))
    own = outcomes_by_version(outcomes)[version]
    file = lake.existing_partition("features", "snapshot", snapshot)
    segments = [c for c in campaign.all_segments if c in pq.read_schema(file).names and c not in contract.names]
    features = pq.read_table(file, columns=[campaign.key, *contract.names, *segments])
    for i, spec in enumerate(contract.features, start=1):  # a table's types are those of its day
        kind = pa.string() if spec.kind == CATEGORY else pa.float64()
        features = features.set_column(i, spec.name, features[spec.name].cast(kind))
    place = dict(zip(features[campaign.key].to_pylist(), range(features.num_rows), strict=True))
    at = [place.get(key) for key in own[campaign.key].to_pylist()]
    if None in at:
        raise DataContractError(
            f"{campaign.name}: the features of snapshot {snapshot} are no longer those that were scored: "
            f"{at.count(None):,} of {len(at):,} customers are gone from them"
        )
    table = features.take(pa.array(at, pa.int64()))
    instant = pa.array([snapshot_instant(snapshot)], pa.timestamp("us")).take(pa.array([0] * len(at), pa.int32()))
    return table.append_column("converted", own["converted"]).append_column("snapshot", instant)


def _require_outcomes(campaign: Campaign, version: str, *tables: pa.Table) -> None:
    for table in tables:
        converted = int(_outcomes(table).sum())
        if min(converted, len(table) - converted) < _MIN_CONVERTERS:
            raise InsufficientDataError(
                f"{campaign.name}: of {len(table):,} customers whose outcome is known of those that version {version} "
                f"scored {converted:,} converted; recalibration needs {_MIN_CONVERTERS} of both on either side"
            )


def _refitted(
    campaign: Campaign, stale: FittedModel, version: str, rows: pa.Table, days: Sequence[date]
) -> FittedModel:
    """The same scorer under a calibrator of these rows."""
    z, y = stale.scorer.log_odds(stale.contract.encode(rows)), _outcomes(rows)
    fold = (hash_fractions(rows[campaign.key].to_pylist(), "calibration") * _FOLDS).astype(np.int64)
    calibrator, _, losses = choose_calibrator(z, y, fold)
    facts = {
        **stale.facts,
        "calibration_rate": float(y.mean()),
        "validation_log_loss": losses[calibrator.method],
        "calibration_losses": losses,
        "recalibrated_from": version,
        "recalibrated_on": [str(day) for day in days],
    }
    if "population" in facts:
        population: dict[str, Any] = stale.facts["population"]
        facts["population"] = {**population, "scores": number_buckets(calibrator.apply(z))}
    return replace(stale, calibrator=calibrator, facts=facts)


def _judged(
    campaign: Campaign, home: Home, fresh: FittedModel, stale: FittedModel, version: str, rows: pa.Table, saved: float
) -> Evaluation:
    """The gate's judgement: the recalibrated model against the stale champion, the baseline and the constant."""
    baseline = home.candidates(campaign.name) / BASELINE
    if not baseline.exists():
        raise DataContractError(f"{campaign.name}: there is no candidate baseline to measure against: train first")
    models = {fresh.name: fresh, CHAMPION: stale, BASELINE: load_model(baseline)}
    days = sorted({str(day) for day in rows["snapshot"].cast(pa.date32()).to_pylist()})
    keys = rows[campaign.key].combine_chunks().dictionary_encode()
    scores = TestScores(
        y=_outcomes(rows),
        entity=keys.indices.to_numpy().astype(np.int64),
        log_odds=score_rows(campaign, models, rows),
        segments={c: segment_values(campaign, rows, c) for c in campaign.all_segments if c in rows.column_names},
        training_rate=stale.facts["calibration_rate"],
        period=None,
    )
    facts: dict[str, Any] = {
        "snapshots": {**fresh.facts["snapshots"], "test": days},
        "champion_version": version,
        "champion_lacks": [],
        "recalibrated_on": fresh.facts["recalibrated_on"],
        "training": {
            name: {
                "calibrator": model.calibrator.method,
                "validation_log_loss": model.facts["validation_log_loss"],
                "rows": model.facts["rows"],
            }
            for name, model in models.items()
        },
    }
    return evaluate(campaign, scores, fresh.name, saved, facts, recalibrated=True)


def _outcomes(rows: pa.Table) -> Floats:
    return rows["converted"].cast("float64").to_numpy()
