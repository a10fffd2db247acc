"""The scores asset."""

from datetime import timedelta

import dagster as dg

from propensity_dagster.campaign import Campaign
from propensity_dagster.components.common import (
    SOURCE_RETRIES,
    blocking,
    checked,
    column_schema,
    daily,
    key,
    note_partitions,
    partition_days,
    row_counts,
    user_errors,
    warning,
)
from propensity_dagster.contracts import scores_contract
from propensity_dagster.data.days import now_utc, rows_of_each
from propensity_dagster.data.delivery import deliver_scores
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.batch import SCORES, ScoresReport, score_snapshot, score_violations
from propensity_dagster.scoring.promotion import require_champion

SCORING = "scoring"
DELIVERED = "delivered_scores"


def scoring_assets(campaign: Campaign) -> list[dg.AssetsDefinition]:
    """features + champion -> scores (-> a table of a database)."""
    return [_scores(campaign), *([_delivered(campaign)] if campaign.target else [])]


def score_tables(campaign: Campaign) -> list[str]:
    """What the score job materializes."""
    return ["features", SCORES, *([DELIVERED] if campaign.target else [])]


def _scores(campaign: Campaign) -> dg.AssetsDefinition:
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
            warning("no_unseen_category", asset, "every category was there when the champion was trained"),
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
        scored_at = now_utc()
        reports, broken = {}, 0
        with runtime.engine() as engine:
            for snapshot in partition_days(context):
                reports[snapshot] = score_snapshot(campaign, snapshot, model, version, scored_at, runtime.home, engine)
                broken += score_violations(campaign, snapshot, runtime.home, engine)
        note_partitions(context, asset, {d: _shown(campaign, r) for d, r in reports.items()})
        lost = sum(abs(r.rows_in - r.rows) for r in reports.values())
        unseen = {str(d): r.unseen for d, r in reports.items() if r.unseen}
        constant = [str(d) for d, r in reports.items() if r.constant]
        return dg.MaterializeResult(
            metadata={"model_version": version, "dagster/column_schema": column_schema(scores_contract(campaign))},
            check_results=[
                checked(asset, "rows_in_equal_rows_out", lost == 0, lost=lost),
                checked(asset, "contract", broken == 0, rows_that_break_it=broken),
                checked(asset, "not_constant", not constant, constant_snapshots=", ".join(constant)),
                checked(asset, "no_unseen_category", not unseen, warn=True, rows=str(unseen) if unseen else ""),
            ],
        )

    return scores


def _delivered(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, DELIVERED)

    @dg.asset(
        key=asset,
        deps=[key(campaign, SCORES)],
        group_name=SCORING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        retry_policy=SOURCE_RETRIES,
        check_specs=[blocking("rows_add_up", asset, "the table holds every score of the snapshot, and no other")],
        description="The scores in a table of a database, a snapshot in one transaction.",
        kinds={"sql"},
    )
    @user_errors
    def delivered_scores(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        delivered, wanted = {}, 0
        for snapshot in partition_days(context):
            file = runtime.home.lake(campaign.name).existing_partition(SCORES, "snapshot", snapshot)
            delivered[snapshot] = deliver_scores(campaign, snapshot, file)
            wanted += rows_of_each([file])[0]
        note_partitions(context, asset, row_counts(delivered))
        return dg.MaterializeResult(
            check_results=[checked(asset, "rows_add_up", sum(delivered.values()) == wanted, wanted=wanted)]
        )

    return delivered_scores


def _shown(campaign: Campaign, report: ScoresReport) -> dict[str, float]:
    shift = {"prior_shift": report.prior_shift} if campaign.prior.adapt else {}
    return {"rows": report.rows, "mean_probability": report.mean_probability, **shift}
