"""The drift asset: is tonight's population still the one the model learnt from?"""

from typing import Any

import dagster as dg

from propensity_dagster.campaign import Campaign
from propensity_dagster.components.common import (
    checked,
    daily,
    key,
    note_partitions,
    partition_days,
    user_errors,
    warning,
)
from propensity_dagster.monitoring.drift import DRIFT, SCORE, DriftReport, publish_drift, scored_by
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.batch import SCORES
from propensity_dagster.scoring.promotion import version_model

MONITORING = "monitoring"
_SHOWN = 10


def drift_asset(campaign: Campaign) -> dg.AssetsDefinition:
    """features, scores -> drift."""
    asset = key(campaign, DRIFT)

    @dg.asset(
        key=asset,
        deps=[key(campaign, "features"), key(campaign, SCORES)],
        group_name=MONITORING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[
            warning("no_drift", asset, "no column moved by more than chance and the industry's limits"),
            warning("scores_stable", asset, "the scores are distributed as they were when the model was trained"),
        ],
        description="Population stability of features and scores, against training and the snapshot before.",
        kinds={"parquet"},
    )
    @user_errors
    def drift(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        reports: dict[Any, DriftReport] = {}
        models: dict[str, Any] = {}
        with runtime.engine() as engine:
            for snapshot in partition_days(context):
                version = scored_by(campaign, snapshot, runtime.home)
                if version not in models:  # a snapshot is compared with what scored it, whoever is champion now
                    models[version] = version_model(campaign, runtime.store, version)
                reports[snapshot] = publish_drift(campaign, snapshot, models[version], version, runtime.home, engine)
        note_partitions(context, asset, {day: _shown(report) for day, report in reports.items()})
        drifted = [f"{day}: {words}" for day, r in reports.items() for words in r.drifted]
        scores = [words for words in drifted if SCORE in words]
        shown = "; ".join(drifted[:_SHOWN]) + (f"; and {len(drifted) - _SHOWN} more" if len(drifted) > _SHOWN else "")
        return dg.MaterializeResult(
            check_results=[
                checked(asset, "no_drift", not drifted, warn=True, drifted=shown),
                checked(asset, "scores_stable", not scores, warn=True, drifted="; ".join(scores[:_SHOWN])),
            ],
        )

    return drift


def _shown(report: DriftReport) -> dict[str, Any]:
    return {
        "rows": report.rows,
        "score_stability_index": round(report.score_index, 5),
        "drifted_columns": len(report.drifted),
        "severity": report.severity,
        "compared_with": ", ".join(report.compared_with),
    }
