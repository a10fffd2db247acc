"""The explanations asset, what the champion goes by; and the ablation, what each event log is worth."""

from typing import Any

import dagster as dg

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.components.common import blocking, checked, key, records_table, user_errors, warning
from propensity_dagster.components.training import EVALUATION, TRAINING_SET, candidate_table
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.saved import load_model
from propensity_dagster.reports.plots import inline_image
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.candidates import lacking_features, read_evaluation
from propensity_dagster.scoring.promotion import champion_model

EXPLANATIONS, ABLATION = "explanations", "ablation"
_SHOWN = 10


def explanations_asset(campaign: Campaign) -> dg.AssetsDefinition:
    """champion -> explanations."""
    asset = key(campaign, EXPLANATIONS)

    @dg.asset(
        key=asset,
        deps=[key(campaign, "champion")],
        group_name=EVALUATION,
        check_specs=[
            blocking("additive", asset, "contributions add up to each prediction within 1e-6"),
            warning("importance_is_stable", asset, "no feature's share of importance jumped since the last versions"),
        ],
        description="Why the champion scores as it does: SHAP, importance, dependence, on test rows.",
        kinds={"json"},
    )
    @user_errors
    def explanations(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        from propensity_dagster.explain.plots import publish_explanation_plots
        from propensity_dagster.explain.summary import ADDITIVE, RECORD, explain_model

        version, model, role = _explained(campaign, runtime)
        found = explain_model(campaign, model, version, role, runtime.home)
        record, folder = found.record, runtime.home.reports(campaign.name)
        publish_explanation_plots(found, folder)
        difference, jumped = record["largest_difference"], [row["feature"] for row in record["jumped"]]
        return dg.MaterializeResult(
            metadata={
                "explained": f"{role}, version {version}, {model.name}",
                "rows": record["rows"],
                "importance": records_table([_row(row) for row in record["features"][:_SHOWN]]),
                "sources": records_table([_group(row) for row in record["sources"][:_SHOWN]]),
                "summary": dg.MetadataValue.md(inline_image(folder / "explanations_summary.png")),
                "record": dg.MetadataValue.path(folder / RECORD),
            },
            check_results=[
                checked(asset, "additive", difference <= ADDITIVE, largest_difference=difference),
                checked(asset, "importance_is_stable", not jumped, warn=True, jumped=", ".join(jumped)),
            ],
        )

    return explanations


def ablation_asset(campaign: EventCampaign) -> dg.AssetsDefinition:
    """candidates -> ablation."""

    @dg.asset(
        key=key(campaign, ABLATION),
        deps=[key(campaign, TRAINING_SET), *(key(campaign, candidate_table(c)) for c in campaign.models)],
        group_name=EVALUATION,
        description="What a model would lose without each event log: trained again without it, judged on test rows.",
        kinds={"json"},
    )
    @user_errors
    def ablation(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        from propensity_dagster.explain.ablation import RECORD, publish_ablation

        record = publish_ablation(campaign, runtime.home)
        return dg.MaterializeResult(
            metadata={
                "model": record["model"],
                "log_loss": record["log_loss"],
                "streams": records_table([_lost(row) for row in record["streams"]]),
                "record": dg.MetadataValue.path(runtime.home.reports(campaign.name) / RECORD),
            }
        )

    return ablation


def _lost(row: dict[str, Any]) -> dict[str, Any]:
    rise = row["loss_without"]
    return {
        "without": row["name"],
        "features": row["features"],
        "rise of the log loss": f"{rise['value']:+.5f}" if rise else "nothing would be left",
        "95% interval": f"{rise['low']:+.5f} to {rise['high']:+.5f}" if rise else "",
    }


def _explained(campaign: Campaign, runtime: Runtime) -> tuple[str, FittedModel, str]:
    """The champion; where there is none that can score the test rows, the challenger that the gate refused."""
    champion = champion_model(campaign, runtime.store)
    # A champion of an older campaign file may need features that there are no more.
    if champion is not None and not lacking_features(campaign, runtime.home, champion[1]):
        return *champion, "champion"
    name = read_evaluation(campaign, runtime.home)["challenger"]
    model = load_model(runtime.home.candidates(campaign.name) / name)
    return "not promoted", model, "challenger"


def _row(row: dict[str, Any]) -> dict[str, Any]:
    size, shuffled = row["mean_absolute"], row["loss_when_shuffled"]
    return {
        "feature": row["feature"],
        "mean absolute contribution (log-odds)": round(size["value"], 4),
        "95% interval": f"{size['low']:.4f} to {size['high']:.4f}",
        "share": f"{row['share']['value']:.1%}",
        "log loss when shuffled": f"{shuffled['value']:+.5f}" if shuffled else "",
    }


def _group(row: dict[str, Any]) -> dict[str, Any]:
    size = row["mean_absolute"]
    return {
        "source column": row["name"],
        "features": row["features"],
        "mean absolute sum (log-odds)": round(size["value"], 4),
        "95% interval": f"{size['low']:.4f} to {size['high']:.4f}",
    }
