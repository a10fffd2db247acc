"""LightGBM, with its own handling of categories and missing values. Saved in LightGBM's text format."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from propensity_dagster.models.base import MANY_ROWS, Fit, threads
from propensity_dagster.models.calibration import Floats
from propensity_dagster.models.dataset import Dataset

logger = logging.getLogger(__name__)

_FILE = "trees.txt"


@dataclass(frozen=True)
class TreesScorer:
    """A booster, cut at its best iteration."""

    booster: Any
    kind: ClassVar[str] = "lightgbm"

    def log_odds(self, X: Floats) -> Floats:
        """Raw scores (n,): of many rows by bit vectors, which need a moment to be made, and are the same."""
        forest = self._forest if len(X) >= MANY_ROWS else None
        if forest is not None:
            return forest.log_odds(X)
        return self.booster.predict(X, raw_score=True, num_threads=threads())

    @cached_property
    def _forest(self) -> Any:
        from propensity_dagster.models.bitvectors import build_forest

        return build_forest(self.booster)

    def save(self, folder: Path) -> dict[str, Any]:
        """The text format holds 17 digits: what is loaded scores the same."""
        (folder / _FILE).write_text(self.booster.model_to_string(), encoding="utf-8")
        return {"trees": self.booster.num_trees()}

    @classmethod
    def load(cls, folder: Path, state: dict[str, Any]) -> Self:
        """Inverse of `save`."""
        import lightgbm

        return cls(lightgbm.Booster(model_str=(folder / _FILE).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class LightGBMEstimator:
    """Gradient-boosted trees with early stopping on the validation rows.

    Snapshots repeat an entity, so leaves must be large: 26 weekly rows of one customer are not 26 witnesses. With the
    objective "regression" outcomes are any numbers, and the scorer's log-odds are their forecasts.
    """

    learning_rate: float = 0.05
    num_leaves: int = 15
    min_data_in_leaf: int = 200
    feature_fraction: float = 0.5
    bagging_fraction: float = 0.8
    lambda_l2: float = 10.0
    max_rounds: int = 1500
    patience: int = 60
    seed: int = 0
    monotone: Mapping[str, int] = field(default_factory=dict[str, int])
    objective: str = "binary"

    def fit(self, train: Dataset, validate: Dataset) -> Fit:
        """Boost until the validation log loss has not fallen for `patience` rounds."""
        import lightgbm

        params = self._params(train)
        rows = lightgbm.Dataset(train.X, train.y, categorical_feature=train.contract.categorical, params=params)
        # Rows are left out of the training alone: scores of the validation rows start corrected.
        start = np.full(len(validate.y), train.correction) if train.correction else None
        held = lightgbm.Dataset(validate.X, validate.y, reference=rows, init_score=start, params=params)
        booster = lightgbm.train(
            params,
            rows,
            num_boost_round=self.max_rounds,
            valid_sets=[held],
            valid_names=["validation"],
            callbacks=[lightgbm.early_stopping(self.patience, verbose=False), _log_progress(100)],
        )
        best = lightgbm.Booster(model_str=booster.model_to_string(num_iteration=booster.best_iteration))
        scorer = TreesScorer(_corrected(best, train.correction))
        return Fit(scorer, scorer.log_odds(validate.X), best.num_trees())

    def refit(self, train: Dataset, rounds: int) -> TreesScorer:
        """Boost for `rounds` rounds."""
        import lightgbm

        params = self._params(train)
        rows = lightgbm.Dataset(train.X, train.y, categorical_feature=train.contract.categorical, params=params)
        return TreesScorer(_corrected(lightgbm.train(params, rows, num_boost_round=rounds), train.correction))

    def _params(self, train: Dataset) -> dict[str, Any]:
        signs = [self.monotone.get(name, 0) for name in train.contract.names]
        # "intermediate" forbids less than the default does, and keeps the constraint all the same.
        constraints = {"monotone_constraints": signs, "monotone_constraints_method": "intermediate"}
        return {
            **(constraints if any(signs) else {}),
            "objective": self.objective,
            "metric": {"binary": "binary_logloss", "regression": "l2"}[self.objective],
            "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves,
            # A leaf must not hold most of a small training set.
            "min_data_in_leaf": max(5, min(self.min_data_in_leaf, len(train.y) // 50)),
            "feature_fraction": self.feature_fraction,
            "bagging_fraction": self.bagging_fraction,
            "bagging_freq": 1,
            "lambda_l2": self.lambda_l2,
            "max_bin": 127,
            "seed": self.seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": threads(),
            "verbosity": -1,
        }


def _corrected(booster: Any, correction: float) -> Any:
    """The booster with a constant added to its first tree, and so to every score."""
    if correction:
        leaves = booster.dump_model(num_iteration=1)["tree_info"][0]["num_leaves"]
        for leaf in range(leaves):
            booster.set_leaf_output(0, leaf, booster.get_leaf_output(0, leaf) + correction)
    return booster


def _log_progress(every: int) -> Any:
    def callback(env: Any) -> None:
        if (env.iteration + 1) % every == 0:
            loss = env.evaluation_result_list[0][2]
            logger.info("lightgbm: %d trees, validation log loss %.5f", env.iteration + 1, loss)

    return callback
