"""What a model would lose without an event log: trained again without its features, judged on the same test rows.

Shuffling a stream says how much this model leans on it; only training again says whether others would stand in.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.campaign_sections import Candidate
from propensity_dagster.data.lake import Home, publish_text
from propensity_dagster.evaluation.bootstrap import Estimate, entity_weights, estimate
from propensity_dagster.evaluation.splits import TEST
from propensity_dagster.explain.population import describe_features
from propensity_dagster.features.snapshots import TRAINING_SET
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Floats, Ints
from propensity_dagster.models.dataset import Dataset, FeatureContract, make_dataset, read_split
from propensity_dagster.models.saved import load_model, model_identity
from propensity_dagster.models.training import train_candidate
from propensity_dagster.scoring.candidates import training_datasets

logger = logging.getLogger(__name__)

RECORD = "explanations_ablation.json"
_PROBES = ("lightgbm", "logistic_regression", "neural_network")
_REPLICATES = 200


def publish_ablation(campaign: EventCampaign, home: Home) -> dict[str, Any]:
    """Train the probe without each stream, and without the customer's attributes; publish and return the record.

    The probe is the fastest candidate that handles what is missing: LightGBM, or else the next of the candidates.
    A rise of the log loss, with its 95% interval over resampled entities, is what the data are worth.
    """
    probe = next(name for name in _PROBES if name in {c.name for c in campaign.models})
    model = load_model(home.candidates(campaign.name) / probe)
    train, validate = training_datasets(campaign, home)
    assert validate is not None  # event logs always have validation snapshots
    table = read_split(home.lake(campaign.name).existing(TRAINING_SET), TEST)
    test = make_dataset(table, model.contract, campaign.key)
    entity = np.unique(np.asarray(table[campaign.key].to_pylist()), return_inverse=True)[1]
    whole = _losses(model, test)
    streams = [words.stream or "customer" for words in describe_features(campaign, model, table.slice(0, 1))]
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(streams):
        kept = [i for i, stream in enumerate(streams) if stream != name]
        lost: dict[str, Any] = {"name": name, "features": len(streams) - len(kept)}
        if not kept:  # the only source: nothing is left to train on
            rows.append({**lost, "loss_without": None})
            continue
        candidate = Candidate.model_validate({"name": probe, "params": model.facts["params"]})
        fewer = _only(train, kept)
        without, _ = train_candidate(_without(campaign, fewer), candidate, fewer, _only(validate, kept), {})
        rise = _rise(_losses(without, _only(test, kept)) - whole, entity)
        logger.info("without %s: log loss %+.5f (%+.5f to %+.5f)", name, rise.value, rise.low, rise.high)
        rows.append({**lost, "loss_without": rise.to_json()})
    identity = model_identity(home.candidates(campaign.name) / probe)
    record = {
        "model": probe,
        "identity": identity,
        "rows": len(whole),
        "log_loss": float(whole.mean()),
        "streams": sorted(rows, key=_worth),
    }
    publish_text(json.dumps(record, indent=1), home.reports(campaign.name) / RECORD)
    return record


def read_ablation(campaign: Campaign, home: Home) -> dict[str, Any] | None:
    """The newest record, if it is of the present candidates."""
    file = home.reports(campaign.name) / RECORD
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return record if record["identity"] == model_identity(home.candidates(campaign.name) / record["model"]) else None


def _without(campaign: EventCampaign, data: Dataset) -> EventCampaign:
    """The campaign, less constraints on features that are gone."""
    names, aliases = set(data.contract.names), campaign.features.names
    monotone = {name: sign for name, sign in campaign.monotone.items() if aliases.get(name, name) in names}
    return campaign.model_copy(update={"monotone": monotone})


def _worth(row: dict[str, Any]) -> float:
    """What costs most comes first; what cannot be left out, before all."""
    return -row["loss_without"]["value"] if row["loss_without"] else -np.inf


def _only(data: Dataset, kept: Sequence[int]) -> Dataset:
    contract = FeatureContract(tuple(data.contract.features[i] for i in kept))
    return replace(data, X=np.asfortranarray(data.X[:, list(kept)]), contract=contract)


def _losses(model: FittedModel, data: Dataset) -> Floats:
    z = model.log_odds(data.X)
    return np.logaddexp(0, z) - data.y * z


def _rise(differences: Floats, entity: Ints) -> Estimate:
    parts = [w @ differences / w.sum(axis=1) for w in entity_weights(entity, _REPLICATES, 0)]
    return estimate(np.concatenate(parts))
