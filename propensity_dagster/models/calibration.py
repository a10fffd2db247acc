"""Calibration of log-odds. Belongs here: the maps, their fit, and the choice among them by cross-validation.

Sources: Platt (1999) for the logistic map; Guo et al. (2017) for temperature; Kull, Silva Filho and Flach
(2017) for the beta map; Zadrozny and Elkan (2002) for isotonic regression.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

METHODS = ("none", "temperature", "platt", "beta", "isotonic")
"""From the simplest to the most flexible; the order decides ties."""

_NEWTON_STEPS = 30
_ROWS_A_BIN, _MAX_BINS = 500, 100
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
    return float(_losses(z, y).mean())


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
    """The simplest method that cross-validation cannot tell from the best one, refitted on all rows.

    A method is as good as the best when the mean difference of their losses is within one standard error of
    that difference (the one-standard-error rule; Breiman et al. 1984, 3.4.3, for the paired differences).
    The map will be applied to later snapshots, where the flexible one has more to lose.

    Returns:
        The calibrator, its cross-fitted log-odds (n,), and every method's cross-validated log loss.
    """
    fitted = {method: cross_fit(method, z, y, fold) for method in METHODS}
    losses = {method: _losses(values, y) for method, values in fitted.items()}
    means = {method: float(values.mean()) for method, values in losses.items()}
    best = min(METHODS, key=means.__getitem__)

    def is_as_good(method: str) -> bool:
        difference = losses[method] - losses[best]
        return float(difference.mean()) <= float(difference.std()) / np.sqrt(len(y))

    chosen = next(method for method in METHODS if is_as_good(method))
    return fit_calibrator(chosen, z, y), fitted[chosen], means


def _losses(z: Floats, y: Floats) -> Floats:
    return -(y * log_expit(z) + (1 - y) * log_expit(-z))


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

    from scipy.optimize import minimize

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
    """Isotonic regression of the rates of equal-sized bins: (bin means, calibrated log-odds).

    On single rows it would make a cliff of the few lowest ones, when none of them converted, and later
    snapshots that lie there would pay for that certainty. Rates are (converters + 1/2) / (rows + 1).
    """
    from sklearn.isotonic import IsotonicRegression

    bins = int(np.clip(len(z) // _ROWS_A_BIN, 2, _MAX_BINS))
    parts = np.array_split(np.argsort(z, kind="stable"), bins)
    rows = np.array([len(part) for part in parts])
    rate = np.array([(y[part].sum() + 0.5) / (len(part) + 1) for part in parts])
    at = np.array([z[part].mean() for part in parts])
    p = np.asarray(IsotonicRegression().fit_transform(at, rate, sample_weight=rows))
    knots, first = np.unique(at, return_index=True)
    values = (np.log(p) - np.log1p(-p))[first]
    return tuple(map(float, knots)), tuple(map(float, values))


def _apply_isotonic(z: Floats, v: tuple[tuple[float, ...], ...]) -> Floats:
    """Straight lines between the knots; beyond them the raw log-odds go on with slope 1."""
    knots, values = np.array(v[0]), np.array(v[1])
    beyond = np.minimum(z - knots[0], 0.0) + np.maximum(z - knots[-1], 0.0)
    return np.interp(z, knots, values) + beyond


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
