"""The assets that say what contacts earned, and what experiments showed."""

from typing import Any

import dagster as dg

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.components.common import checked, key, user_errors, warning
from propensity_dagster.errors import InsufficientDataError
from propensity_dagster.experiments.earned import EARNED, publish_earned
from propensity_dagster.experiments.measurement import publish_readout
from propensity_dagster.experiments.uplift import UPLIFT, publish_uplift
from propensity_dagster.monitoring.ledger import LEDGER
from propensity_dagster.reports.experiment_page import publish_earned_page, publish_experiment_page
from propensity_dagster.reports.site import report_url
from propensity_dagster.reports.uplift_page import describe_uplift, publish_uplift_page
from propensity_dagster.runtime import Runtime

EXPERIMENTS = "experiments"


def experiment_assets(campaign: Campaign) -> list[dg.AssetsDefinition]:
    """ledger -> earned; one readout an experiment."""
    assets = [_earned(campaign), *([_uplift(campaign)] if campaign.treatment else [])]
    if isinstance(campaign, EventCampaign):
        assets += [_readout(campaign, name) for name in campaign.experiments]
    return assets


def measured_tables(campaign: Campaign) -> list[str]:
    """What is measured again after each night's monitoring."""
    return [EARNED, *(_table(name) for name in campaign.experiments)]


def learnt_tables(campaign: Campaign) -> list[str]:
    """What is learnt with every training, besides the models."""
    return [UPLIFT] if campaign.treatment else []


def _table(name: str) -> str:
    return f"experiment_{name}"


def _earned(campaign: Campaign) -> dg.AssetsDefinition:
    @dg.asset(
        key=key(campaign, EARNED),
        deps=[key(campaign, LEDGER)],
        group_name=EXPERIMENTS,
        description="What contacts earned beyond what would have come anyway: contacted against held back.",
        kinds={"html"},
    )
    @user_errors
    def earned(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        record = publish_earned(campaign, runtime.home)
        page = publish_earned_page(campaign, record, runtime.home)
        shown: dict[str, Any] = {"audiences_waiting": len(record["waiting"])}
        total = record.get("total")
        if total is not None:
            shown |= {name: total[name] for name in ("contacts", "held", "conversions", "expected", "cost")}
            for name in ("incremental_conversions", "incremental_profit"):
                if total[name] is not None:
                    shown |= {name if part == "value" else f"{name}_{part}": v for part, v in total[name].items()}
        url = dg.MetadataValue.url(report_url(campaign.name, page.name))
        return dg.MaterializeResult(metadata={**shown, "page": url})

    return earned


def _uplift(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, UPLIFT)

    @dg.asset(
        key=asset,
        deps=[key(campaign, "training_set")],
        group_name=EXPERIMENTS,
        check_specs=[warning("beats_propensity", asset, "choosing by uplift is better than choosing by propensity")],
        description="Whom the treatment changes; used to choose an audience only if it beats propensity.",
        kinds={"lightgbm", "html"},
    )
    @user_errors
    def uplift(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        record = publish_uplift(campaign, runtime.home)
        page = publish_uplift_page(campaign, record, runtime.home)
        decision = record["decision"]
        return dg.MaterializeResult(
            metadata={
                "decision": describe_uplift(record),
                "rank_by": decision["rank_by"],
                "qini_uplift": record["rankings"]["uplift"]["qini"]["value"],
                "qini_propensity": record["rankings"]["propensity"]["qini"]["value"],
                "learners": ", ".join(record["learners"]),
                "page": dg.MetadataValue.url(report_url(campaign.name, page.name)),
            },
            check_results=[
                checked(
                    asset,
                    "beats_propensity",
                    decision["rank_by"] == UPLIFT,
                    warn=True,
                    lower_bound=decision["lower_bound"],
                )
            ],
        )

    return uplift


def _readout(campaign: EventCampaign, name: str) -> dg.AssetsDefinition:
    asset = key(campaign, _table(name))

    @dg.asset(
        key=asset,
        deps=[key(campaign, LEDGER)],
        group_name=EXPERIMENTS,
        check_specs=[warning("sample_ratio", asset, "units fell into the variants as their shares say")],
        description=f"What the experiment {name} showed: how sure, and what to do.",
        kinds={"html"},
    )
    @user_errors
    def readout(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.local_engine() as engine:
            try:
                record = publish_readout(campaign, name, runtime.home, engine)
            except InsufficientDataError as error:  # not a failure: the night goes on, and tomorrow there are more
                return dg.MaterializeResult(
                    metadata={"waiting": str(error)},
                    check_results=[checked(asset, "sample_ratio", True, warn=True, waiting=str(error))],
                )
        page = publish_experiment_page(campaign, name, record, runtime.home)
        words = record["recommendation"]
        return dg.MaterializeResult(
            metadata={
                "assigned": record["assigned"],
                "measured": record["units"],
                "answer": words["answer"],
                "what_to_do": words["do"],
                "page": dg.MetadataValue.url(report_url(campaign.name, page.name)),
            },
            check_results=[
                checked(asset, "sample_ratio", record["srm"]["passed"], warn=True, p_value=record["srm"]["p_value"])
            ],
        )

    return readout
