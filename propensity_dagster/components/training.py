"""Assets from snapshots to the champion."""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.campaign_sections import Candidate
from propensity_dagster.components.common import (
    blocking,
    checked,
    daily,
    key,
    note_partitions,
    partition_days,
    records_table,
    row_counts,
    user_errors,
    warning,
    window_dependency,
)
from propensity_dagster.data.ingest import newest_event_day
from propensity_dagster.data.lake import publish_text
from propensity_dagster.doctor import diagnose
from propensity_dagster.doctor.findings import WARNING
from propensity_dagster.errors import DataContractError
from propensity_dagster.evaluation.metrics import METRICS
from propensity_dagster.evaluation.splits import EMBARGO, SnapshotSplit
from propensity_dagster.features.activity import ACTIVITY
from propensity_dagster.features.audit import audit_features, audit_labels
from propensity_dagster.features.build import entity_table
from propensity_dagster.features.snapshots import (
    TRAINING_SET,
    TrainingSetReport,
    publish_features,
    publish_labels,
    publish_training_set,
)
from propensity_dagster.models.saved import load_model
from propensity_dagster.models.training import BASELINE, ENSEMBLE
from propensity_dagster.monitoring.domain import keep_reference
from propensity_dagster.reports.model_card import publish_model_card
from propensity_dagster.reports.plots import inline_image, publish_plots
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.candidates import (
    member_names,
    publish_candidate,
    publish_evaluation,
    read_evaluation,
)
from propensity_dagster.scoring.promotion import champion_model, promote_if_decided
from propensity_dagster.serving.publish.releases import publish_release

VALIDATED, FEATURES, MODELS, EVALUATION = "validated", "features", "models", "evaluation"
DIAGNOSIS = "diagnosis"
_EVER = -36_500  # days: lifetime features read the whole history
FEW_OUTCOMES = 1_000
_RECENT_DAYS = 7
RATE_LIMITS = (0.001, 0.60)
RATE_WORDS = f"the outcome rate lies between {RATE_LIMITS[0]:.1%} and {RATE_LIMITS[1]:.0%}"


def snapshot_assets(campaign: EventCampaign) -> list[dg.AssetsDefinition]:
    """diagnosis, features, labels -> training set."""
    entities = campaign.source.entities.table
    looked_at = [f"raw_{name}" for name in campaign.source.streams] + ([f"raw_{entities}"] if entities else [])
    diagnosis = diagnosis_asset(campaign, looked_at)
    return [diagnosis, _features(campaign), _labels(campaign), _training_set(campaign)]


def diagnosis_asset(campaign: Campaign, looked_at: Sequence[str]) -> dg.AssetsDefinition:
    """The doctor's findings on what was ingested: an error stops the training before it begins."""
    asset = key(campaign, DIAGNOSIS)

    @dg.asset(
        key=asset,
        deps=[key(campaign, table) for table in looked_at],
        group_name=VALIDATED,
        check_specs=[
            blocking("no_errors", asset, "the doctor finds nothing that stands against training"),
            warning("no_warnings", asset, "the doctor finds nothing at all"),
        ],
        description="What `propensity doctor` finds in the ingested data: too few converters, leaks, odd columns.",
        kinds={"json"},
    )
    @user_errors
    def diagnosis(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.local_engine() as engine:
            found = diagnose(campaign, runtime.home, engine, ingested=True)
        file = runtime.home.reports(campaign.name) / "diagnosis.json"
        publish_text(found.to_json(), file)
        if found.errors:  # a failed run, not only a failed check, so that every caller is told why
            raise DataContractError("; ".join(f.sentence for f in found.errors))
        rows = [{"finding": f"{f.severity}, {f.where}: {f.sentence}"} for f in found.ranked]  # one wide column
        warnings = [f.sentence for f in found.findings if f.severity == WARNING]
        return dg.MaterializeResult(
            metadata={
                **({"findings": records_table(rows)} if rows else {}),
                "features": len(found.features),
                "report": dg.MetadataValue.path(file),
            },
            check_results=[
                checked(asset, "no_errors", True),
                checked(asset, "no_warnings", not warnings, warn=True, warnings="; ".join(warnings)),
            ],
        )

    return diagnosis


def model_assets(campaign: Campaign) -> list[dg.AssetsDefinition]:
    """training set -> candidates -> evaluation -> champion: the same for every shape of campaign."""
    candidates = [_candidate(campaign, candidate) for candidate in campaign.models]
    return [*candidates, _evaluation(campaign), _champion(campaign)]


def candidate_table(candidate: Candidate) -> str:
    """Last part of a candidate's asset key."""
    return f"candidate_{candidate.name}"


def _features(campaign: EventCampaign) -> dg.AssetsDefinition:
    asset = key(campaign, "features")

    @dg.asset(
        key=asset,
        deps=[window_dependency(key(campaign, ACTIVITY), _EVER, -1), key(campaign, entity_table(campaign))],
        group_name=FEATURES,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[
            blocking("one_row_per_entity", asset, "no entity is missing a key or has two rows"),
            blocking("nothing_from_the_future", asset, "every entity was known, and every event older, than t"),
            warning("events_are_recent", asset, "the newest event ingested is at most a week older than t"),
        ],
        description="Point-in-time features of every eligible entity at the snapshot.",
        kinds={"parquet", "duckdb"},
    )
    @user_errors
    def features(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        snapshots = partition_days(context)
        with runtime.engine() as engine:
            report = publish_features(campaign, snapshots, runtime.home, engine)
            audit = audit_features(campaign, snapshots, runtime.home, engine)
        age = max((snapshots[-1] - newest_event_day(campaign, runtime.home)).days, 0)
        note_partitions(context, asset, row_counts(report.rows_by_snapshot))
        documentation = runtime.home.reports(campaign.name) / "features.md"
        return dg.MaterializeResult(
            metadata={"features": report.features, "documentation": dg.MetadataValue.path(documentation)},
            check_results=[
                checked(asset, "one_row_per_entity", audit.repeated == 0, repeated=audit.repeated),
                checked(asset, "nothing_from_the_future", audit.from_the_future == 0, rows=audit.from_the_future),
                checked(asset, "events_are_recent", age <= _RECENT_DAYS, warn=True, days_without_events=age),
            ],
        )

    return features


def _labels(campaign: EventCampaign) -> dg.AssetsDefinition:
    asset = key(campaign, "labels")
    outcome = campaign.outcome

    @dg.asset(
        key=asset,
        deps=[
            key(campaign, "features"),
            window_dependency(key(campaign, ACTIVITY), outcome.gap_days, campaign.outcome_end_days - 1),
        ],
        group_name=FEATURES,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[
            blocking("same_entities_as_features", asset, "labels and features have the same keys"),
            warning("outcome_rate", asset, RATE_WORDS),
        ],
        description=f"Whether an entity converts within {outcome.horizon_days} days; only of mature snapshots.",
        kinds={"parquet", "duckdb"},
    )
    @user_errors
    def labels(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        snapshots = partition_days(context)
        with runtime.engine() as engine:
            report = publish_labels(campaign, snapshots, runtime.home, engine)
            unmatched = audit_labels(campaign, snapshots, runtime.home, engine)
        rows, converted = sum(report.rows_by_snapshot.values()), sum(report.converted_by_snapshot.values())
        note_partitions(context, asset, row_counts(report.converted_by_snapshot, "converted"))
        return dg.MaterializeResult(
            metadata={"rows": rows, "converted": converted},
            check_results=[
                checked(asset, "same_entities_as_features", unmatched == 0, unmatched=unmatched),
                _rate_check(asset, rows, converted),
            ],
        )

    return labels


def _training_set(campaign: EventCampaign) -> dg.AssetsDefinition:
    asset = key(campaign, TRAINING_SET)

    @dg.asset(
        key=asset,
        deps=[key(campaign, DIAGNOSIS), key(campaign, "features"), key(campaign, "labels")],
        group_name=FEATURES,
        check_specs=[
            blocking("out_of_time", asset, "no outcome window reaches into a later split"),
            warning("enough_outcomes", asset, f"at least {FEW_OUTCOMES:,} converters and others to learn from"),
            warning("outcome_rate", asset, RATE_WORDS),
        ],
        description=(
            "Training, validation and test snapshots, out of time, with embargo. It materializes the features "
            "and labels of exactly these snapshots, in one pass over the activity."
        ),
        kinds={"parquet", "duckdb"},
    )
    @user_errors
    def training_set(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.engine() as engine:
            report = publish_training_set(campaign, runtime.home, engine)
        _log_materialized(context, campaign, report.plan)
        return training_set_result(asset, report)

    return training_set


def _candidate(campaign: Campaign, candidate: Candidate) -> dg.AssetsDefinition:
    asset = key(campaign, candidate_table(candidate))
    members = [key(campaign, f"candidate_{name}") for name in member_names(campaign)]

    @dg.asset(
        key=asset,
        deps=[key(campaign, TRAINING_SET), *(members if candidate.name == ENSEMBLE else [])],
        group_name=MODELS,
        check_specs=[blocking("saved_equals_memory", asset, "the saved model scores like the one in memory")],
        description=f"Candidate {candidate.name}, calibrated on validation snapshots and saved without pickle.",
        kinds={_KINDS[candidate.name]},
    )
    @user_errors
    def candidate_model(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        model, difference = publish_candidate(campaign, candidate, runtime.home)
        folder = runtime.home.candidates(campaign.name) / candidate.name
        return dg.MaterializeResult(
            metadata={
                "validation_log_loss": _rounded(model.facts["validation_log_loss"]),
                "calibration": model.calibrator.method,
                "training_rows": model.facts["rows"]["train"],
                "folder": dg.MetadataValue.path(folder),
                **_search_metadata(campaign, runtime, model.facts.get("search")),
            },
            check_results=[checked(asset, "saved_equals_memory", difference <= 1e-6, difference=difference)],
        )

    return candidate_model


def _search_metadata(campaign: Campaign, runtime: Runtime, search: dict[str, Any] | None) -> dict[str, Any]:
    """What a search for parameters found; nothing when there was none."""
    if search is None:
        return {}
    model = search["study"].split("/")[1]
    return {
        "search_trials": search["trials"],
        "search_log_loss_as_stated": _rounded(search["stated_log_loss"]),
        "search_log_loss_best": _rounded(search["best_log_loss"]),
        "search_study": f"{search['study']} in {runtime.home.root / 'optuna.db'}",
        "search": dg.MetadataValue.md(inline_image(runtime.home.reports(campaign.name) / f"search_{model}.png")),
    }


def _evaluation(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, "evaluation")

    @dg.asset(
        key=asset,
        deps=[key(campaign, candidate_table(c)) for c in campaign.models],
        group_name=EVALUATION,
        check_specs=[
            blocking("challenger_tells_people_apart", asset, "the challenger's test scores are not constant"),
            warning("calibrated", asset, "the challenger's calibration lies within the gate's limits"),
        ],
        description="Every candidate, the present champion, the baseline and the constant on the test snapshots.",
        kinds={"json", "parquet"},
    )
    @user_errors
    def evaluation(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        champion = champion_model(campaign, runtime.store)
        judged = publish_evaluation(campaign, runtime.home, champion)
        publish_plots(judged.record, runtime.home.reports(campaign.name))
        publish_model_card(campaign, judged.record, runtime.home.reports(campaign.name))
        return _evaluation_result(campaign, asset, runtime, judged.record)

    return evaluation


def _champion(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, "champion")

    @dg.asset(
        key=asset,
        deps=[key(campaign, "evaluation")],
        group_name=EVALUATION,
        check_specs=[warning("promoted", asset, "the challenger passed the gate")],
        description="The model that serves. The gate decides whether the challenger takes its place.",
        kinds={"mlflow"},
    )
    @user_errors
    def champion(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        record, reports = read_evaluation(campaign, runtime.home), runtime.home.reports(campaign.name)
        folder = runtime.home.candidates(campaign.name) / record["challenger"]
        decision = promote_if_decided(campaign, record, folder, reports, runtime.store)
        keep_reference(campaign, load_model(folder), decision.challenger_version, runtime.home)
        release = publish_release(campaign, runtime.home, runtime.store)
        return dg.MaterializeResult(
            metadata={
                "decision": decision.sentence,
                "champion_version": decision.champion_version or "none",
                "challenger_version": decision.challenger_version,
                "released": release.package if release else "none",
                "criteria": records_table(decision.criteria),
            },
            check_results=[checked(asset, "promoted", decision.promoted, warn=True, decision=decision.sentence)],
        )

    return champion


_KINDS = {
    BASELINE: "numpy",
    "logistic_regression": "scikitlearn",
    "lightgbm": "lightgbm",
    "neural_network": "pytorch",
    ENSEMBLE: "numpy",
}


def _rate_check(asset: dg.AssetKey, rows: int, converted: int) -> dg.AssetCheckResult:
    rate = converted / rows if rows else 0.0
    return checked(asset, "outcome_rate", RATE_LIMITS[0] <= rate <= RATE_LIMITS[1], warn=True, rate=rate)


def _log_materialized(
    context: dg.AssetExecutionContext, campaign: EventCampaign, plan: Sequence[SnapshotSplit]
) -> None:
    """The UI shows the snapshots that were computed on the way as materialized: they are."""
    for table in ("features", "labels"):
        for item in plan:
            if item.split != EMBARGO:
                event = dg.AssetMaterialization(key(campaign, table), partition=str(item.snapshot))
                context.log_event(event)


def training_set_result(asset: dg.AssetKey, report: TrainingSetReport) -> dg.MaterializeResult:
    """Rows of each split, with the results of the checks."""
    few = min(report.converted["train"], report.rows["train"] - report.converted["train"])
    splits = [{"split": s, "rows": rows, "converted": report.converted[s]} for s, rows in report.rows.items()]
    rows, converted = sum(report.rows.values()), sum(report.converted.values())
    return dg.MaterializeResult(
        metadata={
            "rows": rows,
            "converted": converted,
            "outcome_rate": _rounded(converted / rows),
            "splits": records_table(splits),
            "embargoed_snapshots": sum(s.split == EMBARGO for s in report.plan),
            "test_entities_also_in_training": _rounded(report.shared_entities),
        },
        check_results=[
            # publish_training_set raises LeakageError otherwise, and nothing is published.
            *([checked(asset, "out_of_time", True, snapshots=len(report.plan))] if report.plan else []),
            checked(asset, "enough_outcomes", few >= FEW_OUTCOMES, warn=True, fewest=few),
            _rate_check(asset, rows, converted),
        ],
    )


def _evaluation_result(
    campaign: Campaign, asset: dg.AssetKey, runtime: Runtime, record: dict[str, Any]
) -> dg.MaterializeResult:
    folder = runtime.home.reports(campaign.name)
    challenger = record["challenger"]
    found = {metric: record["models"][challenger][metric]["value"] for metric in METRICS}
    shown = ("log_loss", "auc", "average_precision", "calibration_error", "top_decile_lift")
    rows = [
        {"model": name, **{metric: _rounded(metrics[metric]["value"]) for metric in shown}}
        for name, metrics in record["models"].items()
    ]
    calibrated = [c for c in record["decision"]["criteria"] if "calibration" in c["name"]]
    return dg.MaterializeResult(
        metadata={
            "challenger": challenger,
            **{metric: _rounded(value) for metric, value in found.items() if value is not None},
            "models": records_table(rows),
            "plots": dg.MetadataValue.md(inline_image(folder / "overview.png")),
            "model_card": dg.MetadataValue.path(folder / "model_card.md"),
            "folder": dg.MetadataValue.path(folder),
        },
        check_results=[
            checked(asset, "challenger_tells_people_apart", found["calibration_slope"] is not None),
            checked(asset, "calibrated", all(c["passed"] for c in calibrated), warn=True),
        ],
    )


def _rounded(value: float | None) -> float | str:
    return "" if value is None else float(f"{value:.5g}")
