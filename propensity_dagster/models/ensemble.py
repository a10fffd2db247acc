"""A blend of calibrated models: a non-negative weighted sum of their log-odds, fitted on validation rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from scipy.special import expit

from propensity_dagster.models.base import Fit, FittedModel
from propensity_dagster.models.calibration import Floats, cross_fit, log_loss
from propensity_dagster.models.dataset import Dataset


@dataclass(frozen=True)
class EnsembleScorer:
    """Members and their weights; every member reads the same matrix."""

    members: tuple[FittedModel, ...]
    weights: tuple[float, ...]
    kind: ClassVar[str] = "ensemble"

    def log_odds(self, X: Floats) -> Floats:
        """Weighted sum of the members' calibrated log-odds (n,)."""
        total = np.zeros(len(X))
        for member, weight in zip(self.members, self.weights, strict=True):
            if weight:
                total += weight * member.log_odds(X)
        return total

    def save(self, folder: Path) -> dict[str, Any]:
        """Each member is a saved model in a folder of its own."""
        from propensity_dagster.models.saved import write_model

        for member in self.members:
            write_model(member, folder / member.name)
        return {"members": [m.name for m in self.members], "weights": list(self.weights)}

    @classmethod
    def load(cls, folder: Path, state: dict[str, Any]) -> Self:
        """Inverse of `save`."""
        from propensity_dagster.models.saved import load_model

        return cls(tuple(load_model(folder / name) for name in state["members"]), tuple(state["weights"]))


@dataclass(frozen=True)
class Member:
    """A model to blend, and its raw log-odds (n,) on the validation rows, which it was not trained on."""

    model: FittedModel
    validation_log_odds: Floats


@dataclass(frozen=True)
class EnsembleEstimator:
    """Weights that minimise the validation log loss of members calibrated on the other folds."""

    members: Sequence[Member]

    def fit(self, train: Dataset, validate: Dataset) -> Fit:
        """Fit the weights; the members are trained already."""
        columns = np.column_stack(
            [
                cross_fit(m.model.calibrator.method, m.validation_log_odds, validate.y, validate.fold)
                for m in self.members
            ]
        )

        def loss(w: Floats) -> tuple[float, Floats]:
            z = columns @ w
            return log_loss(z, validate.y), columns.T @ (expit(z) - validate.y) / len(z)

        from scipy.optimize import minimize

        start = np.full(len(self.members), 1 / len(self.members))
        result = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start))
        weights = tuple(float(w) if w > 1e-6 else 0.0 for w in result.x)
        return Fit(EnsembleScorer(tuple(m.model for m in self.members), weights), columns @ np.array(weights))
