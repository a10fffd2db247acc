"""Searching for better parameters under a time budget, with Optuna. Belongs here: the spaces and the study.

A trial is judged by the log loss of validation rows that its model was not trained on: later snapshots, or the
other folds of a table's training rows. Test rows are never read.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from propensity_dagster.campaign import Campaign
from propensity_dagster.campaign_sections import Candidate, Search
from propensity_dagster.data.lake import publishing
from propensity_dagster.errors import ConfigError
from propensity_dagster.models.calibration import log_loss
from propensity_dagster.models.dataset import Dataset
from propensity_dagster.models.training import cross_validate, make_estimator

logger = logging.getLogger(__name__)

_HIDDEN = {"32": [32], "64-32": [64, 32], "128-64": [128, 64]}


def _lightgbm(trial: Any) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.2, log=True),
        "num_leaves": trial.suggest_int("num_leaves", 4, 64, log=True),
        "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 10, 500, log=True),
        "feature_fraction": trial.suggest_float("feature_fraction", 0.2, 1.0),
        "bagging_fraction": trial.suggest_float("bagging_fraction", 0.5, 1.0),
        "lambda_l2": trial.suggest_float("lambda_l2", 0.1, 100.0, log=True),
    }


def _logistic_regression(trial: Any) -> dict[str, Any]:
    return {"C": trial.suggest_float("C", 1e-4, 10.0, log=True)}


def _neural_network(trial: Any) -> dict[str, Any]:
    return {
        "hidden": _HIDDEN[trial.suggest_categorical("hidden", list(_HIDDEN))],
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        "learning_rate": trial.suggest_float("learning_rate", 5e-4, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True),
    }


SPACES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "lightgbm": _lightgbm,
    "logistic_regression": _logistic_regression,
    "neural_network": _neural_network,
}


def search_candidate(
    campaign: Campaign,
    search: Search,
    candidate: Candidate,
    train: Dataset,
    validate: Dataset | None,
    storage: Path,
    study_name: str,
) -> tuple[Candidate, dict[str, Any]]:
    """The candidate with the best parameters found, and facts of the search.

    The candidate's own parameters are judged first: the result is never worse than they are on validation rows.

    Args:
        campaign: gives the seed.
        search: budget in seconds and trials.
        candidate: parameters that the file states stay as they are.
        train: rows to learn from.
        validate: rows to judge on; None cross-validates the training rows.
        storage: SQLite file that keeps every study.
        study_name: a study of this name goes on where it was left.

    Raises:
        ConfigError: when Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            f"{campaign.file}: search needs Optuna: pip install 'propensity_dagster[search]', or leave 'search' out"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def loss_of(params: Mapping[str, Any]) -> float:
        tried = Candidate.model_validate({"name": candidate.name, "params": {**params, **candidate.params}})
        estimator = make_estimator(campaign, tried)
        if validate is None:
            return log_loss(cross_validate(estimator, train, refit=False).validation_log_odds, train.y)
        return log_loss(estimator.fit(train, validate).validation_log_odds, validate.y)

    stated = loss_of({})
    storage.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=study_name,
        storage=f"sqlite:///{storage}",
        sampler=optuna.samplers.TPESampler(seed=campaign.seed),
        load_if_exists=True,
    )
    study.set_user_attr("stated_log_loss", stated)
    space = SPACES[candidate.name]

    def objective(trial: Any) -> float:
        params = space(trial)
        trial.set_user_attr("params", params)
        return loss_of(params)

    study.optimize(objective, n_trials=search.trials, timeout=search.seconds, catch=(FloatingPointError,))
    done: list[Any] = [t for t in study.trials if t.value is not None and np.isfinite(t.value)]
    best: Any = min(done, key=lambda t: float(t.value or 0.0)) if done else None
    facts: dict[str, Any] = {"trials": len(done), "stated_log_loss": stated, "study": study_name}
    logger.info(
        "%s: %d trials, best %.5f, as stated %.5f", candidate.name, len(done), getattr(best, "value", np.inf), stated
    )
    if best is None or best.value is None or best.value >= stated:
        return candidate, {**facts, "best_log_loss": stated, "losses": [t.value for t in done]}
    params = {**best.user_attrs["params"], **candidate.params}
    chosen = Candidate.model_validate({"name": candidate.name, "params": params})
    return chosen, {**facts, "best_log_loss": best.value, "losses": [t.value for t in done]}


def plot_search(name: str, facts: Mapping[str, Any], file: Path) -> None:
    """Every trial's log loss, the best so far, and what the campaign file's own parameters reach."""
    from matplotlib.figure import Figure

    losses = facts["losses"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(range(1, len(losses) + 1), losses, s=14, color="#7f8fa6", label="trial")
    if losses:
        axes.step(range(1, len(losses) + 1), np.minimum.accumulate(losses), where="post", color="#1f5fa8", label="best")
    axes.axhline(facts["stated_log_loss"], color="#c0392b", linestyle="--", linewidth=1, label="as stated")
    axes.set(xlabel="trial", ylabel="validation log loss", title=f"Search for {name}")
    axes.legend(frameon=False)
    with publishing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
