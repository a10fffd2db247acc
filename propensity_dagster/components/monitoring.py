"""The monitoring assets: today's inputs and scores, what they promise, what came true, and who is told."""

from collections.abc import Sequence
from datetime import UTC, date, datetime
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
from propensity_dagster.monitoring.alerts import record_findings
from propensity_dagster.monitoring.drift import DRIFT, SCORE, DriftReport, publish_drift
from propensity_dagster.monitoring.drift_report import publish_drift_report
from propensity_dagster.monitoring.findings import (
    ALERT,
    DRIFTING,
    PERFORMANCE,
    performance_findings,
    quality_findings,
    snapshot_findings,
    verdict,
)
from propensity_dagster.monitoring.ledger import LEDGER, MATURE, publish_ledger, read_ledger
from propensity_dagster.monitoring.outcomes import OUTCOMES, OutcomesReport, lacks_outcomes, publish_outcomes
from propensity_dagster.monitoring.quality import QUALITY, QualityReport, publish_quality
from propensity_dagster.monitoring.recalibration import RECALIBRATED, recalibrate
from propensity_dagster.reports.monitoring_page import publish_monitoring_page
from propensity_dagster.reports.site import report_url
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.batch import SCORES, require_version
from propensity_dagster.scoring.promotion import version_model
from propensity_dagster.serving.publish.releases import publish_release

MONITORING = "monitoring"
DRIFT_REPORT = "drift_report"
_SHOWN = 10


def monitoring_assets(campaign: Campaign) -> list[dg.AssetsDefinition]:
    """features, scores, activity -> drift, quality, outcomes, ledger -> alerts and the page; recalibration."""
    return [
        _drift(campaign),
        _drift_report(campaign),
        _quality(campaign),
        _outcomes(campaign),
        _ledger(campaign),
        _monitoring(campaign),
        _recalibration(campaign),
    ]


def monitored_tables() -> list[str]:
    """What the monitoring job materializes."""
    return [DRIFT, DRIFT_REPORT, QUALITY, LEDGER, MONITORING]


def _drift(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, DRIFT)

    @dg.asset(
        key=asset,
        deps=[key(campaign, "features"), key(campaign, SCORES)],
        group_name=MONITORING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[
            warning("no_drift", asset, "no column moved by more than chance, time and the industry's limits explain"),
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
                # A snapshot is compared with what scored it, whoever is champion now.
                version = require_version(campaign, snapshot, runtime.home)
                if version not in models:
                    models[version] = version_model(campaign, runtime.store, version)
                reports[snapshot] = publish_drift(campaign, snapshot, models[version], version, runtime.home, engine)
        note_partitions(context, asset, {day: _shown(report) for day, report in reports.items()})
        drifted = [f"{day}: {words}" for day, r in reports.items() for words in r.drifted]
        scores = [words for words in drifted if SCORE in words]
        grave = any(r.severity == ALERT for r in reports.values())
        return dg.MaterializeResult(
            check_results=[
                checked(asset, "no_drift", not drifted, warn=not grave, drifted=_some(drifted)),
                checked(asset, "scores_stable", not scores, warn=not grave, drifted=_some(scores)),
            ],
        )

    return drift


def _drift_report(campaign: Campaign) -> dg.AssetsDefinition:
    @dg.asset(
        key=key(campaign, DRIFT_REPORT),
        deps=[key(campaign, DRIFT)],
        group_name=MONITORING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        description="Distributions then and now, column by column, drawn by Evidently; the newest snapshot's is kept.",
        kinds={"html"},
    )
    @user_errors
    def drift_report(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        snapshot = partition_days(context)[-1]
        version = require_version(campaign, snapshot, runtime.home)
        model = version_model(campaign, runtime.store, version)
        drawn = publish_drift_report(campaign, snapshot, model, version, runtime.home)
        return dg.MaterializeResult(
            metadata={
                "page": dg.MetadataValue.url(report_url(campaign.name, drawn.file.name)),
                "file": dg.MetadataValue.path(drawn.file),
                "columns": ", ".join(drawn.columns),
                "columns_without_values": ", ".join(drawn.empty) or "none",
                "bytes": drawn.file.stat().st_size,
            }
        )

    return drift_report


def _quality(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, QUALITY)

    @dg.asset(
        key=asset,
        deps=[key(campaign, SCORES)],
        group_name=MONITORING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[warning("as_on_other_days", asset, "row counts, quarantine, duplicates and silence are as usual")],
        description="Rows, quarantined and duplicate shares and silence of the newest day, against the days before.",
        kinds={"parquet"},
    )
    @user_errors
    def quality(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        reports: dict[date, QualityReport] = {
            snapshot: publish_quality(campaign, snapshot, runtime.home) for snapshot in partition_days(context)
        }
        note_partitions(context, asset, {day: {"findings": len(r.findings)} for day, r in reports.items()})
        found = [f"{day}: {f.sentence}" for day, r in reports.items() for f in quality_findings(campaign, r.findings)]
        grave = any(row["severity"] == ALERT for r in reports.values() for row in r.findings)
        return dg.MaterializeResult(
            check_results=[checked(asset, "as_on_other_days", not found, warn=not grave, findings=_some(found))]
        )

    return quality


def _outcomes(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, OUTCOMES)

    @dg.asset(
        key=asset,
        deps=[key(campaign, SCORES)],
        group_name=MONITORING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        description="What became of those who were scored, of every version delivered. The ledger keeps it up.",
        kinds={"parquet"},
    )
    @user_errors
    def outcomes(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        reports: dict[date, OutcomesReport] = {}
        with runtime.local_engine() as engine:
            for snapshot in partition_days(context):
                reports[snapshot] = publish_outcomes(campaign, snapshot, runtime.home, engine)
        note_partitions(context, asset, {day: {"rows": r.rows, "converted": r.converted} for day, r in reports.items()})
        return dg.MaterializeResult(metadata={"reopened": sum(r.reopened_from is not None for r in reports.values())})

    return outcomes


def _ledger(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, LEDGER)

    @dg.asset(
        key=asset,
        deps=[key(campaign, SCORES), key(campaign, OUTCOMES)],
        group_name=MONITORING,
        check_specs=[
            warning("promises_kept", asset, "conversions and ranking of the newest mature snapshot as promised")
        ],
        description=(
            "Of every delivered snapshot and version what was promised and what came true. It counts the outcomes that "
            "are due, and those that late events may have changed."
        ),
        kinds={"parquet"},
    )
    @user_errors
    def ledger(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.local_engine() as engine:
            report = publish_ledger(campaign, runtime.home, runtime.store, engine)
        for snapshot in report.counted:  # the UI shows what was computed on the way as materialized: it is
            context.log_event(dg.AssetMaterialization(key(campaign, OUTCOMES), partition=str(snapshot)))
        found = performance_findings(campaign, report.rows)
        return dg.MaterializeResult(
            metadata={
                "rows": len(report.rows),
                "counted_now": len(report.counted),
                "reopened": ", ".join(map(str, report.reopened)) or "none",
                **({"outcomes": report.unknowable} if report.unknowable else {}),
            },
            check_results=[
                checked(
                    asset,
                    "promises_kept",
                    not found,
                    warn=not any(f.severity == ALERT for f in found),
                    findings="; ".join(f"{f.sentence} ({f.cause})" for f in found),
                )
            ],
        )

    return ledger


def _monitoring(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, MONITORING)

    @dg.asset(
        key=asset,
        deps=[key(campaign, table) for table in (DRIFT, QUALITY, LEDGER, DRIFT_REPORT)],
        group_name=MONITORING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[warning("scores_to_be_trusted", asset, "nothing speaks against the scores of this snapshot")],
        description="Should I trust these scores? Findings become alerts; the page says why.",
        kinds={"html"},
    )
    @user_errors
    def monitoring(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        snapshot = partition_days(context)[-1]
        rows = read_ledger(campaign, runtime.home)
        unknowable = lacks_outcomes(campaign)
        findings = snapshot_findings(campaign, snapshot, runtime.home)
        changes = record_findings(
            campaign.name, snapshot, (QUALITY, PERFORMANCE, DRIFTING), findings, runtime.home, datetime.now(UTC)
        )
        answer = verdict(findings, _waiting(rows, unknowable))
        page = publish_monitoring_page(campaign, snapshot, answer, findings, rows, unknowable, runtime.home)
        return dg.MaterializeResult(
            metadata={
                "verdict": answer.sentence,
                "page": dg.MetadataValue.url(report_url(campaign.name, page.name)),
                "file": dg.MetadataValue.path(page),
                "findings": len(findings),
                "alerts": ", ".join(changes) or "no change",
            },
            check_results=[
                checked(
                    asset, "scores_to_be_trusted", not findings, warn=answer.answer != "no", verdict=answer.sentence
                )
            ],
        )

    return monitoring


def _recalibration(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, RECALIBRATED)

    @dg.asset(
        key=asset,
        deps=[key(campaign, LEDGER), key(campaign, "champion")],
        group_name=MONITORING,
        check_specs=[warning("promoted", asset, "the recalibrated model passed the gate")],
        description="The champion with a calibrator fitted on matured snapshots, as a new version; the gate decides.",
        kinds={"mlflow"},
    )
    @user_errors
    def recalibration(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        done = recalibrate(campaign, runtime.home, runtime.store)
        release = publish_release(campaign, runtime.home, runtime.store)
        return dg.MaterializeResult(
            metadata={
                "decision": done.promotion.sentence,
                "version": done.promotion.challenger_version,
                "method": done.method,
                "fitted_on": ", ".join(map(str, done.fitted_on)),
                "judged_on": ", ".join(map(str, done.judged_on)),
                "log_loss": done.log_loss[0],
                "log_loss_stale": done.log_loss[1],
                "released": release.package if release else "none",
            },
            check_results=[
                checked(asset, "promoted", done.promotion.promoted, warn=True, decision=done.promotion.sentence)
            ],
        )

    return recalibration


def _waiting(rows: Sequence[dict[str, Any]], unknowable: str | None) -> str:
    """What cannot be known yet."""
    if unknowable:
        return "whether they come true cannot be known"
    if any(row["state"] == MATURE for row in rows):
        return "so far promises were kept"
    days = [row["matures_on"] for row in rows if row["matures_on"] is not None]
    return f"whether they come true will be known from {min(days)} on" if days else ""


def _shown(report: DriftReport) -> dict[str, Any]:
    return {
        "rows": report.rows,
        "score_stability_index": round(report.score_index, 5),
        "domain_auc": "not tried" if report.domain_auc is None else round(report.domain_auc, 4),
        "findings": len(report.drifted),
        "severity": report.severity,
        "compared_with": ", ".join(report.compared_with),
    }


def _some(words: list[str]) -> str:
    return "; ".join(words[:_SHOWN]) + (f"; and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")
