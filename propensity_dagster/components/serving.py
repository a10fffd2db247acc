"""Assets of serving: online features, releases, the bento, and the log of answers."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from propensity_dagster.campaign import Campaign
from propensity_dagster.components.common import (
    SOURCE_RETRIES,
    asset_job,
    checked,
    daily,
    key,
    note_partitions,
    partition_days,
    user_errors,
    warning,
)
from propensity_dagster.data.days import rows_of_each
from propensity_dagster.data.lake import Home
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.batch import SCORES
from propensity_dagster.serving.publish.bento import build_bento
from propensity_dagster.serving.publish.online_features import publish_online_features
from propensity_dagster.serving.publish.prediction_log import PREDICTIONS, ingest_predictions
from propensity_dagster.serving.publish.releases import champion_version, publish_release

SERVING = "serving"
ONLINE_FEATURES, RELEASE, BENTO = "online_features", "release", "bento"
_POLL_SECONDS = 30
_FIRST_LOG_DAY = "2024-01-01"


def serving_assets(campaign: Campaign) -> list[dg.AssetsDefinition]:
    """features -> online features; scores + champion -> release -> bento; the service's log -> predictions."""
    return [_online_features(campaign), _release(campaign), _bento(campaign), _predictions(campaign)]


def serving_automation(campaign: Campaign) -> dg.Definitions:
    """The bento follows the champion; the log of a day is ingested the night after."""
    bento = asset_job(campaign, f"{campaign.name}__build_bento", [BENTO], "Builds the bento from what is released.")
    description = "The service's log of one day, as a table of the lake."
    predictions = asset_job(campaign, f"{campaign.name}__ingest_predictions", [PREDICTIONS], description, _log_days())
    return dg.Definitions(
        jobs=[bento, predictions],
        schedules=[
            dg.build_schedule_from_partitioned_job(
                predictions,
                name=f"{campaign.name}__nightly_predictions",
                description="Ingests yesterday's answers of the service.",
                hour_of_day=0,
                minute_of_hour=30,
            )
        ],
        sensors=[_bento_after_release(campaign, bento)],
    )


def _log_days() -> dg.DailyPartitionsDefinition:
    """Days of answers, today included; the calendar of a log that has ended does not end them."""
    return dg.DailyPartitionsDefinition(start_date=_FIRST_LOG_DAY, end_offset=1)


def _online_features(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, ONLINE_FEATURES)

    @dg.asset(
        key=asset,
        deps=[key(campaign, "features")],
        group_name=SERVING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        retry_policy=SOURCE_RETRIES,
        check_specs=[warning("rows_add_up", asset, "every customer of the snapshot can be looked up")],
        description="The newest snapshot's features by customer, for the service: a SQLite file, or Redis.",
        kinds={"sqlite"},
    )
    @user_errors
    def online_features(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        snapshot = partition_days(context)[-1]  # of a backfill only the newest is of use
        report = publish_online_features(campaign, snapshot, runtime.home)
        wanted = rows_of_each([runtime.home.lake(campaign.name).existing_partition("features", "snapshot", snapshot)])[
            0
        ]
        context.add_asset_metadata(asdict(report), asset_key=asset, partition_key=str(snapshot))
        passed = bool(report.skipped) or report.rows == wanted
        return dg.MaterializeResult(check_results=[checked(asset, "rows_add_up", passed, warn=True, wanted=wanted)])

    return online_features


def _release(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, RELEASE)

    @dg.asset(
        key=asset,
        deps=[key(campaign, SCORES), key(campaign, "champion")],
        group_name=SERVING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        description="What the service answers with: the champion, ranked in the newest scored population.",
        kinds={"json"},
    )
    @user_errors
    def release(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        report = publish_release(campaign, runtime.home, runtime.store)
        return dg.MaterializeResult(metadata={k: str(v) for k, v in asdict(report).items()} if report else {})

    return release


def _bento(campaign: Campaign) -> dg.AssetsDefinition:
    @dg.asset(
        key=key(campaign, BENTO),
        deps=[key(campaign, "champion")],
        group_name=SERVING,
        description="`propensity:latest` in BENTOML_HOME: the service with what is released, of all campaigns.",
        kinds={"bentoml"},
    )
    @user_errors
    def bento(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        report = build_bento(runtime.home)
        return dg.MaterializeResult(
            metadata={
                "tag": report.tag,
                "megabytes": report.megabytes,
                "packages": dg.MetadataValue.json(report.packages),
                "serve": f"bentoml serve {report.tag}",
            }
        )

    return bento


def _predictions(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, PREDICTIONS)

    @dg.asset(
        key=asset,
        group_name=SERVING,
        partitions_def=_log_days(),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[warning("every_line_read", asset, "no line of the log was cut short")],
        description="Every answer of the service: id, time, version, variant, probability, features used.",
        kinds={"parquet"},
    )
    @user_errors
    def predictions(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        reports = {day: ingest_predictions(campaign, day, runtime.home) for day in partition_days(context)}
        shown = {
            day: {"rows": r.rows, "files": r.files, **({"mean_probability": r.mean_probability} if r.rows else {})}
            for day, r in reports.items()
        }
        note_partitions(context, asset, shown)
        unreadable = sum(report.unreadable for report in reports.values())
        return dg.MaterializeResult(
            check_results=[checked(asset, "every_line_read", unreadable == 0, warn=True, unreadable=unreadable)]
        )

    return predictions


def _bento_after_release(campaign: Campaign, job: Any) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{campaign.name}__bento_after_release",
        job=job,
        minimum_interval_seconds=_POLL_SECONDS,
        description="Builds the bento when another version has become the champion, by promotion or by rollback.",
    )
    def bento_after_release(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        version = champion_version(campaign.name, Home.from_environment())
        if version is None:
            return dg.SkipReason("nothing has been released yet")
        if version == context.cursor:
            return dg.SkipReason(f"the champion is still version {version}")
        context.update_cursor(version)
        return dg.RunRequest(run_key=f"{version}@{datetime.now(UTC).isoformat()}")

    return bento_after_release
