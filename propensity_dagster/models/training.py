"""Training one candidate: estimator by name, calibrator by cross-validation. The registry of estimators."""

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from propensity_dagster.campaign import Campaign, Candidate
from propensity_dagster.errors import ConfigError
from propensity_dagster.models.base import Estimator, FittedModel, RfmColumns
from propensity_dagster.models.baseline import RfmBaseline
from propensity_dagster.models.calibration import choose_calibrator
from propensity_dagster.models.dataset import Dataset, FeatureContract, make_dataset, read_split
from propensity_dagster.models.ensemble import EnsembleEstimator
from propensity_dagster.models.linear import LogisticRegressionEstimator
from propensity_dagster.models.network import NeuralNetworkEstimator
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
_LIBRARIES = ("lightgbm", "numpy", "scikit-learn", "torch")


def train_candidate(
    campaign: Campaign,
    candidate: Candidate,
    train: Dataset,
    validate: Dataset,
    facts: dict[str, Any],
    members: Sequence[FittedModel] = (),
) -> FittedModel:
    """Train and calibrate one candidate.

    Args:
        campaign: gives the seed and the RFM columns.
        candidate: name and parameters.
        train: rows to learn from.
        validate: rows for early stopping, calibration and blending.
        facts: what to keep with the model, such as its snapshot range.
        members: the models an ensemble blends.

    Raises:
        ConfigError: for parameters the estimator does not have.
    """
    estimator = make_estimator(campaign, candidate, members)
    fit = estimator.fit(train, validate)
    calibrator, _, losses = choose_calibrator(fit.validation_log_odds, validate.y, validate.fold)
    logger.info(
        "%s: calibration %s, cross-validated log loss %.5f",
        candidate.name,
        calibrator.method,
        losses[calibrator.method],
    )
    return FittedModel(
        candidate.name,
        train.contract,
        fit.scorer,
        calibrator,
        {
            **facts,
            "params": candidate.params,
            "rows": {"train": len(train.y), "validate": len(validate.y)},
            "validation_log_loss": losses[calibrator.method],
            "calibration_losses": losses,
            "versions": {library: version(library) for library in _LIBRARIES},
        },
    )


def make_estimator(campaign: Campaign, candidate: Candidate, members: Sequence[FittedModel]) -> Estimator:
    """The estimator of a candidate.

    Raises:
        ConfigError: for parameters it does not have.
    """
    params = dict(candidate.params)
    if candidate.name in _SEEDED:
        params.setdefault("seed", campaign.seed)
    if "hidden" in params:
        params["hidden"] = tuple(params["hidden"])
    try:
        if candidate.name == BASELINE:
            return RfmBaseline(rfm_columns(campaign), **params)
        if candidate.name == ENSEMBLE:
            return EnsembleEstimator(members, **params)
        return ESTIMATORS[candidate.name](**params)
    except TypeError as error:
        raise ConfigError(f"{campaign.file}: models.{candidate.name}: {error}") from None


def load_datasets(key: str, training_set: Path) -> tuple[Dataset, Dataset]:
    """Training and validation rows of entities with this key; categories are those of the training rows."""
    table = read_split(training_set, "train")
    contract = FeatureContract.fit(table, key)
    train = make_dataset(table, contract, key)
    del table
    return train, make_dataset(read_split(training_set, "validate"), contract, key)


def rfm_columns(campaign: Campaign) -> RfmColumns:
    """Recency, frequency and monetary value of the outcome's stream."""
    name = campaign.outcome.stream
    stream = campaign.source.streams[name]
    window = f"{campaign.longest_window}d"
    frequency = f"{name}_{stream.types[0]}_count_{window}" if stream.type else f"{name}_count_{window}"
    return RfmColumns(f"{name}_recency_days", frequency, f"{name}_amount_sum_{window}" if stream.amount else None)
