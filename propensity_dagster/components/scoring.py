"""The scores asset."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from propensity_dagster.campaign import Campaign
from propensity_dagster.components.common import (
    blocking,
    checked,
    column_schema,
    daily,
    key,
    note_partitions,
    partition_days,
    user_errors,
)
from propensity_dagster.contracts import scores_contract
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.batch import SCORES, score_snapshot, score_violations
from propensity_dagster.scoring.promotion import require_champion

SCORING = "scoring"


def scoring_assets(campaign: Campaign) -> list[dg.AssetsDefinition]:
    """features + champion -> scores."""
    asset = key(campaign, SCORES)

    @dg.asset(
        key=asset,
        deps=[key(campaign, "features"), key(campaign, "champion")],
        group_name=SCORING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[
            blocking("rows_in_equal_rows_out", asset, "one score per eligible entity"),
            blocking("contract", asset, "unique keys, probabilities within 0 and 1"),
            blocking("not_constant", asset, "the scores tell people apart"),
        ],
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=timedelta(hours=36), warn_window=timedelta(hours=26)
        ),
        description="Calibrated probability, percentile, decile, tier and expected value of every eligible entity.",
        kinds={"parquet"},
    )
    @user_errors
    def scores(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        version, model = require_champion(campaign, runtime.store)
        scored_at = datetime.now(UTC).replace(tzinfo=None)
        reports, broken = {}, 0
        with runtime.engine() as engine:
            for snapshot in partition_days(context):
                reports[snapshot] = score_snapshot(campaign, snapshot, model, version, scored_at, runtime.home, engine)
                broken += score_violations(campaign, snapshot, runtime.home, engine)
        rows = {d: {"rows": r.rows, "mean_probability": r.mean_probability} for d, r in reports.items()}
        note_partitions(context, asset, rows)
        lost = sum(abs(r.rows_in - r.rows) for r in reports.values())
        constant = [str(d) for d, r in reports.items() if r.constant]
        return dg.MaterializeResult(
            metadata={"model_version": version, "dagster/column_schema": column_schema(scores_contract(campaign))},
            check_results=[
                checked(asset, "rows_in_equal_rows_out", lost == 0, lost=lost),
                checked(asset, "contract", broken == 0, rows_that_break_it=broken),
                checked(asset, "not_constant", not constant, constant_snapshots=", ".join(constant)),
            ],
        )

    return [scores]
