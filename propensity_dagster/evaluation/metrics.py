"""Metrics of probabilities against outcomes, for many weightings of the rows at once.

Every metric reads a `Weighted`: forecasts and outcomes of n rows under weights of shape (replicates, n). A
row of ones gives the point estimate, resampled rows give bootstrap replicates: one formula for both.
Converters are few, so ranking metrics work on the converters' positions and one cumulative sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CALIBRATION_BINS = 15
DECILES = np.arange(1, 11) / 10
_LIMIT = 27.0  # log-odds of 1e-12: a certain and wrong forecast costs 27 nats, not infinity


@dataclass(frozen=True)
class Judged:
    """Forecasts of n rows: log-odds `z` and outcomes `y` of 0 and 1. Orders and bins are computed once."""

    z: Floats
    y: Floats

    @cached_property
    def probability(self) -> Floats:
        """Forecast probabilities (n,)."""
        return expit(np.clip(self.z, -_LIMIT, _LIMIT))

    @cached_property
    def losses(self) -> Floats:
        """Negative log-likelihood of each row (n,)."""
        z = np.clip(self.z, -_LIMIT, _LIMIT)
        return -(self.y * log_expit(z) + (1 - self.y) * log_expit(-z))

    @cached_property
    def order(self) -> Ints:
        """Rows from the highest forecast to the lowest."""
        return np.argsort(-self.z, kind="stable")

    @cached_property
    def tie_edges(self) -> Ints:
        """Positions in `order` where a new forecast value begins, and n at the end (groups + 1,)."""
        ordered = self.z[self.order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        return np.append(starts, len(ordered))

    @cached_property
    def converters(self) -> Ints:
        """Positions of the converters in `order`, ascending (k,)."""
        return np.flatnonzero(self.y[self.order] > 0)

    @cached_property
    def bin_columns(self) -> Floats:
        """Per row, membership in 15 bins, then the same times probability, then times outcome (n, 45).

        Bins have equal numbers of rows, ordered by forecast; ties stay together.
        """
        n = len(self.z)
        edges = self.tie_edges
        bins = np.empty(n, dtype=np.int64)
        bins[self.order] = np.repeat((n - edges[1:]) * CALIBRATION_BINS // n, np.diff(edges))
        member = np.zeros((n, CALIBRATION_BINS))
        member[np.arange(n), bins] = 1.0
        return np.hstack([member, member * self.probability[:, None], member * self.y[:, None]])


@dataclass(frozen=True)
class Weighted:
    """Judged rows under weights `w` (replicates, n)."""

    judged: Judged
    w: Floats

    @cached_property
    def size(self) -> Floats:
        """Total weight of each replicate."""
        return self.w.sum(axis=1)

    @cached_property
    def rate(self) -> Floats:
        """Weighted conversion rate of each replicate."""
        return self.w @ self.judged.y / self.size

    @cached_property
    def cumulative(self) -> Floats:
        """Weight of the best 0, 1, 2, ... n rows (replicates, n + 1)."""
        out = np.zeros((len(self.w), self.w.shape[1] + 1))
        np.cumsum(self.w[:, self.judged.order], axis=1, out=out[:, 1:])
        return out

    @cached_property
    def found(self) -> Floats:
        """Weight of the best 0, 1, 2, ... k converters (replicates, k + 1)."""
        rows = self.judged.order[self.judged.converters]
        out = np.zeros((len(self.w), len(rows) + 1))
        np.cumsum(self.w[:, rows], axis=1, out=out[:, 1:])
        return out

    @cached_property
    def bins(self) -> tuple[Floats, Floats, Floats]:
        """Weight, mean forecast and conversion rate of each calibration bin (replicates, bins)."""
        n, forecasts, converters = np.split(self.w @ self.judged.bin_columns, 3, axis=1)
        return n, _divide(forecasts, n, empty=0.0), _divide(converters, n, empty=0.0)


def mean_probability(r: Weighted) -> Floats:
    """Mean of the forecasts."""
    return r.w @ r.judged.probability / r.size


def log_loss(r: Weighted) -> Floats:
    """Mean negative log-likelihood."""
    return r.w @ r.judged.losses / r.size


def brier(r: Weighted) -> Floats:
    """Mean squared error of the probabilities (Brier 1950)."""
    return r.w @ (r.judged.probability - r.judged.y) ** 2 / r.size


def brier_reliability(r: Weighted) -> Floats:
    """First term of Murphy's (1973) decomposition, over the calibration bins; 0 is best."""
    n, forecast, rate = r.bins
    return (n * (forecast - rate) ** 2).sum(axis=1) / r.size


def brier_resolution(r: Weighted) -> Floats:
    """Second term of Murphy's (1973) decomposition; more is better."""
    n, _, rate = r.bins
    return (n * (rate - r.rate[:, None]) ** 2).sum(axis=1) / r.size


def brier_uncertainty(r: Weighted) -> Floats:
    """Third term of Murphy's (1973) decomposition: the variance of the outcome, the same for every model."""
    return r.rate * (1 - r.rate)


def auc(r: Weighted) -> Floats:
    """Area under the ROC curve; a tie counts one half. NaN without both outcomes."""
    starts, ends, first, last = _groups_of_converters(r.judged)
    weight = np.diff(r.found, axis=1)
    others_before = r.cumulative[:, starts] - r.found[:, first]
    others_after = r.cumulative[:, ends] - r.found[:, last]
    others = r.size - r.found[:, -1]
    beaten = others[:, None] - (others_before + others_after) / 2
    return _divide((weight * beaten).sum(axis=1), r.found[:, -1] * others)


def average_precision(r: Weighted) -> Floats:
    """Sum of precision times the gain in recall, over the distinct forecasts. NaN without a converter."""
    _, ends, _, last = _groups_of_converters(r.judged)
    precision = _divide(r.found[:, last], r.cumulative[:, ends], empty=0.0)
    return _divide((np.diff(r.found, axis=1) * precision).sum(axis=1), r.found[:, -1])


def calibration_error(r: Weighted) -> Floats:
    """Expected calibration error over 15 bins of equal size (Naeini et al. 2015).

    Noise alone makes it positive, and resampling adds noise: intervals lie a little above the estimate.
    """
    n, forecast, rate = r.bins
    return (n * np.abs(forecast - rate)).sum(axis=1) / r.size


def calibration_slope(r: Weighted) -> Floats:
    """Slope b of logit P(y) = a + b z (Cox 1958); 1 is best, below 1 means too extreme."""
    return _recalibration(r.judged, r.w, free_slope=True)[:, 1]


def calibration_intercept(r: Weighted) -> Floats:
    """Intercept a of logit P(y) = a + z: calibration in the large (Van Calster et al. 2019); 0 is best."""
    return _recalibration(r.judged, r.w, free_slope=False)[:, 0]


def top_decile_lift(r: Weighted) -> Floats:
    """Conversion rate of the tenth with the highest forecasts over the overall rate."""
    return gains(r, np.array([0.1]))[:, 0] / 0.1


def bin_rates(r: Weighted) -> Floats:
    """Conversion rate of each calibration bin (replicates, bins); NaN where a bin is empty."""
    n, _, rate = r.bins
    return np.where(n > 0, rate, np.nan)


def gains(r: Weighted, fractions: Floats) -> Floats:
    """Share of converters among the given fractions of rows with the highest forecasts.

    Returns:
        (replicates, fractions). Within a tie converters are spread evenly, as a random order would.
    """
    edges = r.judged.tie_edges
    found_at = np.searchsorted(r.judged.converters, edges)
    out = np.empty((len(r.w), len(fractions)))
    for i, total in enumerate(r.cumulative):
        contacted, at = total[edges], fractions * total[-1]
        group = np.clip(np.searchsorted(contacted, at), 1, len(edges) - 1)
        low, high = contacted[group - 1], contacted[group]
        share = np.clip(_divide(at - low, high - low, empty=1.0), 0.0, 1.0)
        before, after = r.found[i, found_at[group - 1]], r.found[i, found_at[group]]
        out[i] = _divide(before + share * (after - before), np.full(len(fractions), r.found[i, -1]))
    return out


def decile_gains(r: Weighted) -> Floats:
    """`gains` at 10%, 20%, ... 100%."""
    return gains(r, DECILES)


METRICS: dict[str, Callable[[Weighted], Floats]] = {
    "log_loss": log_loss,
    "brier": brier,
    "brier_reliability": brier_reliability,
    "brier_resolution": brier_resolution,
    "brier_uncertainty": brier_uncertainty,
    "auc": auc,
    "average_precision": average_precision,
    "calibration_error": calibration_error,
    "calibration_slope": calibration_slope,
    "calibration_intercept": calibration_intercept,
    "top_decile_lift": top_decile_lift,
}


def _groups_of_converters(judged: Judged) -> tuple[Ints, Ints, Ints, Ints]:
    """Per converter: its tie's first position and end, and converters before and up to the tie."""
    edges = judged.tie_edges
    group = np.searchsorted(edges, judged.converters, side="right") - 1
    starts, ends = edges[group], edges[group + 1]
    first = np.searchsorted(judged.converters, starts)
    last = np.searchsorted(judged.converters, ends)
    return starts, ends, first, last


def _recalibration(judged: Judged, w: Floats, *, free_slope: bool) -> Floats:
    """(intercept, slope) per replicate: Newton to the end for the mean weights, one more step per replicate.

    One step from the estimate of all rows is the one-step bootstrap (Shao and Tu 1995, 5.4.7): its error is
    of the order of the squared deviation.
    """
    z = np.clip(judged.z, -_LIMIT, _LIMIT)
    if np.ptp(z) == 0 and free_slope:
        return np.full((len(w), 2), np.nan)
    if not 0 < judged.y.sum() < len(z):
        return np.full((len(w), 2), np.nan)
    estimate = np.array([0.0, 1.0])
    everyone = np.ones((1, len(z)))
    for _ in range(50):
        step = _newton_step(z, judged.y, everyone, estimate, free_slope=free_slope)[0]
        # A full step may overshoot where the forecasts are far off: it is halved until the likelihood grows.
        while np.abs(step).max() > 1e-10 and _line_loss(z, judged.y, estimate + step) > _line_loss(
            z, judged.y, estimate
        ):
            step = step / 2
        estimate = estimate + step
        if np.abs(step).max() < 1e-10:
            break
    return estimate + _newton_step(z, judged.y, w, estimate, free_slope=free_slope)


def _line_loss(z: Floats, y: Floats, at: Floats) -> float:
    line = at[0] + at[1] * z
    return float(-(y * log_expit(line) + (1 - y) * log_expit(-line)).sum())


def _newton_step(z: Floats, y: Floats, w: Floats, at: Floats, *, free_slope: bool) -> Floats:
    p = expit(at[0] + at[1] * z)
    residual, curvature = y - p, p * (1 - p)
    columns = np.column_stack([residual, residual * z, curvature, curvature * z, curvature * z * z])
    g0, g1, h00, h01, h11 = (w @ columns).T
    if not free_slope:
        return np.column_stack([_divide(g0, h00, empty=0.0), np.zeros(len(w))])
    determinant = h00 * h11 - h01 * h01
    a = _divide(h11 * g0 - h01 * g1, determinant, empty=0.0)
    b = _divide(h00 * g1 - h01 * g0, determinant, empty=0.0)
    return np.column_stack([a, b])


def _divide(a: Floats, b: Floats, empty: float = np.nan) -> Floats:
    return np.divide(a, b, out=np.full(np.shape(a), empty, dtype=np.float64), where=b != 0)
