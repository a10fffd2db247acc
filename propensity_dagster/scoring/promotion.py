"""Carrying out the gate's decision in the model store, and finding the champion."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.lake import Home
from propensity_dagster.errors import DataContractError
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.saved import load_model, model_identity
from propensity_dagster.registry.store import MADE_LATER, ModelStore
from propensity_dagster.scoring.candidates import read_evaluation


@dataclass(frozen=True)
class PromotionReport:
    """What was decided, and who is the champion now."""

    promoted: bool
    sentence: str
    criteria: list[dict[str, Any]]
    challenger_version: str
    champion_version: str | None


def champion_model(campaign: Campaign, store: ModelStore) -> tuple[str, FittedModel] | None:
    """Version and model of the champion, if there is one."""
    champion = store.champion(campaign.name)
    return (champion.version, version_model(campaign, store, champion.version)) if champion else None


def version_model(campaign: Campaign, store: ModelStore, version: str) -> FittedModel:
    """The model of a registered version."""
    return load_model(store.folder(campaign.name, version))


def require_champion(campaign: Campaign, store: ModelStore) -> tuple[str, FittedModel]:
    """Version and model of the champion.

    Raises:
        DataContractError: when there is none.
    """
    found = champion_model(campaign, store)
    if found is None:
        raise DataContractError(
            f"{campaign.name}: there is no champion: run the job {campaign.name}__train first; if it ran, the "
            "gate refused every challenger (propensity champion history)"
        )
    return found


def promote_if_decided(
    campaign: Campaign, record: dict[str, Any], folder: Path, reports: Path, store: ModelStore
) -> PromotionReport:
    """Register the challenger of an evaluation and carry out its decision.

    Args:
        campaign: the campaign.
        record: the evaluation.
        folder: the challenger as it was saved.
        reports: where the record and what belongs to it lie.
        store: versions and aliases.

    Running it again, after a crash or by hand, changes nothing: an equal model keeps its version, and a
    version that is the champion already is neither promoted nor refused again.
    """
    decision = record["decision"]
    facts = {
        **{f"snapshots_{split}": f"{s[0]} to {s[-1]}" for split, s in record["snapshots"].items()},
        "rows_test": record["rows"],
        "outcome_rate_test": record["outcome_rate"],
        **{f"training_{k}": v for k, v in record["training"][record["challenger"]]["rows"].items()},
    }
    challenger = store.record_training(campaign.name, folder, record, reports, facts)
    champion = store.champion(campaign.name)
    sentence = decision["sentence"]
    if champion is not None and champion.version == challenger.version:
        sentence = f"{record['challenger']} (version {challenger.version}) is the champion already: the same model"
        return PromotionReport(True, sentence, decision["criteria"], challenger.version, champion.version)
    if decision["promoted"]:
        store.promote(campaign.name, challenger.version, sentence)
        return PromotionReport(True, sentence, decision["criteria"], challenger.version, challenger.version)
    store.refuse(campaign.name, challenger.version, sentence)
    now = champion.version if champion else None
    return PromotionReport(False, sentence, decision["criteria"], challenger.version, now)


def keep_reports(campaign: Campaign, home: Home, store: ModelStore) -> str:
    """Log the newest explanations and report with the version of the newest challenger; return the version.

    Raises:
        DataContractError: when the challenger has not been registered.
    """
    identity = model_identity(home.candidates(campaign.name) / read_evaluation(campaign, home)["challenger"])
    for version in store.versions(campaign.name):
        if version.identity == identity:
            files = [f for f in sorted(home.reports(campaign.name).iterdir()) if f.name.startswith(MADE_LATER)]
            store.log_reports(campaign.name, version.version, files)
            return version.version
    raise DataContractError(f"{campaign.name}: the challenger is not registered: materialize {campaign.name}/champion")
