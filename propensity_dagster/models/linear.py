"""Logistic regression on scaled numbers and one-hot categories."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from propensity_dagster.models.base import Fit, by_blocks, compiled
from propensity_dagster.models.calibration import Floats, log_loss
from propensity_dagster.models.dataset import Dataset
from propensity_dagster.models.preprocess import OneHot, Scaling

_CHUNK = 65_536
_HELD_BYTES = 1 << 30
_SHORTEST, _CONVERGED = 1e-4, 1e-6


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
        numbers = len(self.scaling.columns) + len(self.scaling.indicators)
        ends = np.cumsum([size + 1 for size in self.one_hot.sizes])
        tables = np.split(self.coefficients[numbers:], ends[:-1]) if len(ends) else []

        kernels = compiled(len(X))

        def score(rows: Floats) -> Floats:
            # Not by BLAS, whose threads would wait for one another over so few rows.
            z = np.einsum("ij,j->i", self.scaling.apply(rows, kernels), self.coefficients[:numbers])
            for table, codes in zip(tables, self.one_hot.codes(rows).T, strict=True):
                z += table[codes]
            return z + self.intercept

        return by_blocks(score, X)

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
        scaling, one_hot = Scaling.fit(train.X, train.contract), OneHot.fit(train.contract)
        rows = _Rows(train, scaling, one_hot)
        signs = np.zeros(rows.width)
        signs[: len(scaling.columns)] = [self.monotone.get(train.contract.names[i], 0) for i in scaling.columns]
        used = np.ones(rows.width, dtype=bool)
        while True:
            solve = self._newton if rows.held is None else self._in_memory
            coefficients, intercept = solve(rows, used)
            wrong = coefficients * signs < 0
            if not wrong.any():
                return LinearScorer(scaling, one_hot, coefficients, intercept + train.correction)
            # Where the constraint binds its optimum is at zero: the column goes, and the others are fitted anew.
            used &= ~wrong

    def _in_memory(self, rows: "_Rows", used: NDArray[np.bool_]) -> tuple[Floats, float]:
        """By scikit-learn, which wants the whole preprocessed matrix, twice as wide as the features, and copies it."""
        from sklearn.linear_model import LogisticRegression

        assert rows.held is not None
        design = rows.held if used.all() else rows.held[:, used]
        model = LogisticRegression(C=self.C, solver="newton-cholesky", max_iter=self.max_iter, tol=1e-4)
        model.fit(design, rows.y)
        coefficients = np.zeros(rows.width)
        coefficients[used] = np.ravel(model.coef_)
        return coefficients, float(np.ravel(model.intercept_)[0])

    def _newton(self, rows: "_Rows", used: NDArray[np.bool_]) -> tuple[Floats, float]:
        """The minimum of |w|^2 / 2 + C (sum of log losses), by Newton steps over pieces; w is zero where not used."""
        active = np.append(np.flatnonzero(used), rows.width)
        w = np.zeros(rows.width + 1)  # the intercept is the last, and free
        rate = float(np.clip(rows.y.mean(), 1e-9, 1 - 1e-9))
        w[-1] = np.log(rate / (1 - rate))
        penalty = np.append(np.ones(rows.width), 0.0)
        loss, gradient, curvature = rows.sums(w)
        value = self.C * loss
        for _ in range(self.max_iter):
            slope = (self.C * gradient + penalty * w)[active]
            bend = (self.C * curvature + np.diag(penalty))[np.ix_(active, active)]
            step = np.zeros_like(w)
            step[active] = np.linalg.solve(bend, -slope)
            before, length = value, 1.0
            while True:
                tried = w + length * step
                loss, gradient, curvature = rows.sums(tried)
                value = self.C * loss + penalty @ tried**2 / 2
                if value <= before * (1 + 1e-12) or length < _SHORTEST:
                    break
                length /= 2
            w = tried
            if np.abs(step).max() < _CONVERGED:
                break
        return w[:-1], float(w[-1])


class _Rows:
    """Preprocessed training rows: `held` in memory where they are small, else made anew for each pass, in pieces."""

    def __init__(self, train: Dataset, scaling: Scaling, one_hot: OneHot) -> None:
        self.y = train.y
        self.width = len(scaling.columns) + len(scaling.indicators) + sum(one_hot.sizes) + len(one_hot.sizes)
        self._train, self._scaling, self._one_hot = train, scaling, one_hot
        small = 8 * self.width * len(self.y) < _HELD_BYTES
        self.held = _design(train.X, scaling, one_hot) if small else None

    def _make(self) -> Iterator[tuple[Floats, Floats]]:
        for start in range(0, len(self.y), _CHUNK):
            X = self._train.X[start : start + _CHUNK]
            ones = np.ones((len(X), 1))
            yield np.hstack([_design(X, self._scaling, self._one_hot), ones]), self.y[start : start + _CHUNK]

    def sums(self, w: Floats) -> tuple[float, Floats, Floats]:
        """Log loss, its gradient (k,) and curvature (k, k) at these coefficients (k,), summed over the rows."""
        loss, gradient, curvature = 0.0, np.zeros(len(w)), np.zeros((len(w), len(w)))
        for design, y in self._make():
            z = design @ w
            p = expit(z)
            loss += len(y) * log_loss(z, y)
            gradient += design.T @ (p - y)
            curvature += design.T @ (design * (p * (1 - p))[:, None])
        return loss, gradient, curvature


def _design(X: Floats, scaling: Scaling, one_hot: OneHot) -> Floats:
    return np.hstack([scaling.apply(X), one_hot.apply(X)])
