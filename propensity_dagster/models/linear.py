"""Logistic regression on scaled numbers and one-hot categories."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from propensity_dagster.models.base import Fit
from propensity_dagster.models.calibration import Floats
from propensity_dagster.models.dataset import Dataset
from propensity_dagster.models.preprocess import OneHot, Scaling

_CHUNK = 65_536


@dataclass(frozen=True)
class LinearScorer:
    """Intercept and coefficients over the preprocessed columns."""

    scaling: Scaling
    one_hot: OneHot
    coefficients: Floats
    intercept: float
    kind: ClassVar[str] = "linear"

    def log_odds(self, X: Floats) -> Floats:
        """Log-odds (n,)."""
        out = np.empty(len(X))
        for start in range(0, len(X), _CHUNK):  # the preprocessed matrix is wider than X
            rows = slice(start, start + _CHUNK)
            out[rows] = _design(X[rows], self.scaling, self.one_hot) @ self.coefficients + self.intercept
        return out

    def save(self, folder: Path) -> dict[str, Any]:
        """All of it is JSON."""
        return {
            "scaling": self.scaling.to_json(),
            "one_hot": self.one_hot.to_json(),
            "coefficients": self.coefficients.tolist(),
            "intercept": self.intercept,
        }

    @classmethod
    def load(cls, folder: Path, state: dict[str, Any]) -> Self:
        """Inverse of `save`."""
        return cls(
            Scaling.from_json(state["scaling"]),
            OneHot.from_json(state["one_hot"]),
            np.array(state["coefficients"]),
            state["intercept"],
        )


@dataclass(frozen=True)
class LogisticRegressionEstimator:
    """L2-penalised logistic regression; `C` is the inverse penalty of scikit-learn.

    A number has one coefficient, so `monotone` features are those whose coefficient has the stated sign.
    """

    C: float = 0.05
    max_iter: int = 50
    monotone: Mapping[str, int] = field(default_factory=dict[str, int])

    def fit(self, train: Dataset, validate: Dataset) -> Fit:
        """Fit by Newton steps: few passes over many rows and some hundred columns."""
        scorer = self.refit(train, 0)
        return Fit(scorer, scorer.log_odds(validate.X))

    def refit(self, train: Dataset, rounds: int) -> LinearScorer:
        """The same: validation rows play no part."""
        from sklearn.linear_model import LogisticRegression

        scaling, one_hot = Scaling.fit(train.X, train.contract), OneHot.fit(train.contract)
        design = _design(train.X, scaling, one_hot)
        signs = np.zeros(design.shape[1])
        signs[: len(scaling.columns)] = [self.monotone.get(train.contract.names[i], 0) for i in scaling.columns]
        used = np.ones(design.shape[1], dtype=bool)
        while True:
            model = LogisticRegression(C=self.C, solver="newton-cholesky", max_iter=self.max_iter, tol=1e-4)
            model.fit(design if used.all() else design[:, used], train.y)
            coefficients = np.zeros(design.shape[1])
            coefficients[used] = np.ravel(model.coef_)
            wrong = coefficients * signs < 0
            if not wrong.any():
                return LinearScorer(scaling, one_hot, coefficients, float(np.ravel(model.intercept_)[0]))
            # Where the constraint binds its optimum is at zero: the column goes, and the others are fitted anew.
            used &= ~wrong


def _design(X: Floats, scaling: Scaling, one_hot: OneHot) -> Floats:
    return np.hstack([scaling.apply(X), one_hot.apply(X)])
