"""Calibration of log-odds. Belongs here: the maps, their fit, and the choice among them by cross-validation.

Sources: Platt (1999) for the logistic map; Guo et al. (2017) for temperature; Kull, Silva Filho and Flach
(2017) for the beta map; Zadrozny and Elkan (2002) for isotonic regression.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

METHODS = ("none", "temperature", "platt", "beta", "isotonic")
"""From the simplest to the most flexible; the order decides ties."""

_NEWTON_STEPS = 30
_LIMIT = 16.0  # log-odds beyond it are no information: P = 1e-7


@dataclass(frozen=True)
class Calibrator:
    """A map from raw to calibrated log-odds, non-decreasing. `values` are the method's parameters."""

    method: str = "none"
    values: tuple[tuple[float, ...], ...] = ()

    def apply(self, z: Floats) -> Floats:
        """Calibrated log-odds of raw log-odds."""
        return _APPLY[self.method](np.clip(z, -_LIMIT, _LIMIT), self.values)


def log_loss(z: Floats, y: Floats) -> float:
    """Mean negative log-likelihood of log-odds `z` for outcomes `y`."""
    return float(-np.mean(y * log_expit(z) + (1 - y) * log_expit(-z)))


def fit_calibrator(method: str, z: Floats, y: Floats) -> Calibrator:
    """Fit one method on log-odds (n,) and outcomes (n,) that no base model was trained on."""
    return Calibrator(method, _FIT[method](np.clip(z, -_LIMIT, _LIMIT), y))


def cross_fit(method: str, z: Floats, y: Floats, fold: Ints) -> Floats:
    """Calibrated log-odds of each row by the method fitted on the other folds."""
    out = np.empty_like(z)
    for k in np.unique(fold):
        held = fold == k
        out[held] = fit_calibrator(method, z[~held], y[~held]).apply(z[held])
    return out


def choose_calibrator(z: Floats, y: Floats, fold: Ints) -> tuple[Calibrator, Floats, dict[str, float]]:
    """The method with the lowest cross-validated log loss, refitted on all rows.

    Returns:
        The calibrator, its cross-fitted log-odds (n,), and every method's cross-validated log loss.
    """
    fitted = {method: cross_fit(method, z, y, fold) for method in METHODS}
    losses = {method: log_loss(values, y) for method, values in fitted.items()}
    best = min(METHODS, key=lambda method: round(losses[method], 9))
    return fit_calibrator(best, z, y), fitted[best], losses


def _minimize_logistic(columns: Floats, y: Floats, start: Floats, lower: list[float | None]) -> Floats:
    """Coefficients of a logistic regression without penalty, with lower bounds.

    Newton's method from `start`; where it leaves the bounds or does not converge, L-BFGS-B decides.
    """
    w = start
    for _ in range(_NEWTON_STEPS):
        p = expit(columns @ w)
        curvature = columns.T @ (columns * (p * (1 - p))[:, None])
        try:
            step = np.linalg.solve(curvature, columns.T @ (y - p))
        except np.linalg.LinAlgError:
            break
        w = w + step
        if not np.isfinite(w).all() or any(b is not None and v < b for v, b in zip(w, lower, strict=True)):
            break
        if np.abs(step).max() < 1e-9:
            return w

    def loss(w: Floats) -> tuple[float, Floats]:
        z = columns @ w
        return log_loss(z, y), columns.T @ (expit(z) - y) / len(y)

    bounds = [(b, None) for b in lower]
    result = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"gtol": 1e-9, "ftol": 1e-14})
    return result.x


def _fit_temperature(z: Floats, y: Floats) -> tuple[tuple[float, ...], ...]:
    (a,) = _minimize_logistic(z[:, None], y, np.ones(1), [1e-3])
    return ((float(a),),)


def _fit_platt(z: Floats, y: Floats) -> tuple[tuple[float, ...], ...]:
    a, b = _minimize_logistic(np.column_stack([z, np.ones_like(z)]), y, np.array([1.0, 0.0]), [1e-3, None])
    return ((float(a), float(b)),)


def _fit_beta(z: Floats, y: Floats) -> tuple[tuple[float, ...], ...]:
    columns = np.column_stack([log_expit(z), -log_expit(-z), np.ones_like(z)])
    a, b, c = _minimize_logistic(columns, y, np.array([1.0, 1.0, 0.0]), [0.0, 0.0, None])
    return ((float(a), float(b), float(c)),)


def _fit_isotonic(z: Floats, y: Floats) -> tuple[tuple[float, ...], ...]:
    from sklearn.isotonic import IsotonicRegression

    # Half an observation on either side keeps empty ends away from probability 0 and 1.
    edge = 0.5 / (len(y) + 1)
    model = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(z, y)
    return tuple(map(float, model.X_thresholds_)), tuple(map(float, model.y_thresholds_))


def _apply_isotonic(z: Floats, v: tuple[tuple[float, ...], ...]) -> Floats:
    p = np.interp(z, v[0], v[1])
    return np.log(p) - np.log1p(-p)


_FIT: dict[str, Callable[[Floats, Floats], tuple[tuple[float, ...], ...]]] = {
    "none": lambda z, y: (),
    "temperature": _fit_temperature,
    "platt": _fit_platt,
    "beta": _fit_beta,
    "isotonic": _fit_isotonic,
}
_APPLY: dict[str, Callable[[Floats, tuple[tuple[float, ...], ...]], Floats]] = {
    "none": lambda z, v: z,
    "temperature": lambda z, v: v[0][0] * z,
    "platt": lambda z, v: v[0][0] * z + v[0][1],
    "beta": lambda z, v: v[0][0] * log_expit(z) - v[0][1] * log_expit(-z) + v[0][2],
    "isotonic": _apply_isotonic,
}
