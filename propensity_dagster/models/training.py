"""Training one candidate: estimator by name, calibrator by cross-validation. The registry of estimators."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.campaign_sections import Candidate
from propensity_dagster.data.decisions import DECIDED_AT, POSITION
from propensity_dagster.errors import ConfigError
from propensity_dagster.models.base import Estimator, Fit, FittedModel, RfmColumns
from propensity_dagster.models.baseline import CellBaseline
from propensity_dagster.models.calibration import Floats, choose_calibrator
from propensity_dagster.models.dataset import Dataset, FeatureContract, SplitFile, read_dataset
from propensity_dagster.models.ensemble import EnsembleEstimator, Member
from propensity_dagster.models.linear import LogisticRegressionEstimator
from propensity_dagster.models.monotone import violations
from propensity_dagster.models.network import NeuralNetworkEstimator
from propensity_dagster.models.population import describe_population, number_buckets
from propensity_dagster.models.trees import LightGBMEstimator

logger = logging.getLogger(__name__)

ENSEMBLE, BASELINE = "ensemble", "baseline"

ESTIMATORS: Mapping[str, Callable[..., Estimator]] = {
    "logistic_regression": LogisticRegressionEstimator,
    "lightgbm": LightGBMEstimator,
    "neural_network": NeuralNetworkEstimator,
}
"""One more model is one class and one line. The baseline and the ensemble need more than parameters."""

_SEEDED = ("lightgbm", "neural_network")
_CONSTRAINED = ("lightgbm", "logistic_regression")
_LIBRARIES = ("lightgbm", "numpy", "scikit-learn", "torch")


def train_candidate(
    campaign: Campaign,
    candidate: Candidate,
    train: Dataset,
    validate: Dataset | None,
    facts: dict[str, Any],
    members: Sequence[Member] = (),
) -> tuple[FittedModel, Floats]:
    """Train and calibrate one candidate.

    Args:
        campaign: gives the seed and the RFM columns.
        candidate: name and parameters.
        train: rows to learn from.
        validate: rows for early stopping, calibration and blending; None cross-validates the training rows.
        facts: what to keep with the model, such as its snapshot range.
        members: the models an ensemble blends.

    Returns:
        The model, and its raw log-odds on the validation rows (all training rows when cross-validated), none of
        which was seen by the model that scored it.

    Raises:
        ConfigError: for parameters the estimator does not have, or a constraint on what is not a number.
    """
    directions = campaign.monotone_directions
    campaign.check_monotone({feature.name: feature.kind for feature in train.contract.features})
    held = validate or train
    if candidate.name == ENSEMBLE:
        fit = EnsembleEstimator(members).fit(train, held)
    elif validate is not None:
        fit = make_estimator(campaign, candidate).fit(train, validate)
    else:
        fit = cross_validate(make_estimator(campaign, candidate), train)
    calibrator, _, losses = choose_calibrator(fit.validation_log_odds, held.y, held.fold)
    logger.info(
        "%s: calibration %s, cross-validated log loss %.5f",
        candidate.name,
        calibrator.method,
        losses[calibrator.method],
    )
    known = {
        **facts,
        "params": candidate.params,
        "rows": {"train": len(train.y), "validate": len(validate.y) if validate else 0},
        "negatives_kept": float(np.exp(train.correction)),
        "calibration_rate": float(held.y.mean()),
        "validation_log_loss": losses[calibrator.method],
        "calibration_losses": losses,
        "versions": {library: version(library) for library in _LIBRARIES},
    }
    if train.population:
        scores = number_buckets(calibrator.apply(fit.validation_log_odds))
        known["population"] = {**train.population, "scores": scores}
    model = FittedModel(candidate.name, train.contract, fit.scorer, calibrator, known)
    if directions:
        known["monotone"] = violations(model, held.X, directions)
    return model, fit.validation_log_odds


def cross_validate(estimator: Estimator, train: Dataset, *, refit: bool = True) -> Fit:
    """Log-odds of every row by a model trained on the other folds of entities, and one model of all rows.

    The last one has no rows held out: it is trained for as many rounds as the others needed on average.
    """
    out = np.empty(len(train.y))
    rounds: list[int] = []
    last: Any = None
    folds = np.unique(train.fold)
    for k in folds:
        held = train.fold == k
        fit = estimator.fit(train.rows(~held), train.rows(held))
        out[held] = fit.validation_log_odds
        rounds.append(fit.rounds)
        last = fit.scorer
    needed = round(float(np.mean(rounds)))
    # Who only wants the scores of the folds is spared the last and longest training.
    return Fit(estimator.refit(train, max(needed, 1)) if refit else last, out, needed)


def make_estimator(campaign: Campaign, candidate: Candidate) -> Estimator:
    """The estimator of a candidate that learns by itself: the ensemble does not.

    Raises:
        ConfigError: for parameters it does not have.
    """
    params = dict(candidate.params)
    if candidate.name in _SEEDED:
        params.setdefault("seed", campaign.seed)
    if candidate.name in _CONSTRAINED:
        params.setdefault("monotone", campaign.monotone_directions)
    if "hidden" in params:
        params["hidden"] = tuple(params["hidden"])
    try:
        if candidate.name == BASELINE:
            return CellBaseline(rfm_columns(campaign), **params)
        return ESTIMATORS[candidate.name](**params)
    except TypeError:
        model = CellBaseline if candidate.name == BASELINE else ESTIMATORS[candidate.name]
        allowed = [name for name in inspect.signature(model).parameters if name not in ("rfm", "monotone")]
        wrong = [name for name in params if name not in allowed]
        raise ConfigError(
            f"{campaign.file}: models.{candidate.name}: there is no parameter {', '.join(wrong)}; "
            f"allowed are {', '.join(allowed)}"
        ) from None


def load_datasets(campaign: Campaign, training_set: Path, fold: int | None) -> tuple[Dataset, Dataset | None]:
    """Training and validation rows; categories are those of the training rows.

    Args:
        campaign: gives the key and the columns that are not for models; only event logs have validation rows.
        training_set: the file.
        fold: the fold of rows to be left out for the test, where every row is tested once.
    """
    key = campaign.key
    rows = SplitFile(training_set, "train", fold)
    order = () if isinstance(campaign, EventCampaign) else (POSITION, DECIDED_AT)
    contract = FeatureContract.fit(rows, key, (*campaign.protected, *order))
    population = describe_population(rows, contract)
    kept = campaign.snapshots.keep_negatives if isinstance(campaign, EventCampaign) else 1.0
    train = replace(read_dataset(rows, contract, key, kept, campaign.seed), population=population)
    if not isinstance(campaign, EventCampaign):
        return train, None
    return train, read_dataset(SplitFile(training_set, "validate"), contract, key)


def rfm_columns(campaign: Campaign) -> RfmColumns | None:
    """Recency, frequency and monetary value of the outcome's stream; a table of decisions has none."""
    if not isinstance(campaign, EventCampaign):
        return None
    name = campaign.outcome.stream
    stream = campaign.source.streams[name]
    window = f"{campaign.longest_window}d"
    frequency = f"{name}_{stream.types[0]}_count_{window}" if stream.type else f"{name}_count_{window}"
    return RfmColumns(f"{name}_recency_days", frequency, f"{name}_amount_sum_{window}" if stream.amount else None)
