"""Adapting scores to the outcome rate of the rows they are for, without their labels.

Saerens, Latinne and Decaestecker (2002), Adjusting the outputs of a classifier to new a priori probabilities:
expectation maximisation of the rate under which the new rows' scores are likely, if only the rate changed and
not how converters look. Where that assumption fails the estimate runs away, so its odds are bounded.
"""

import numpy as np
from scipy.special import expit, logit

from propensity_dagster.models.calibration import Floats

_STEPS, _TOLERANCE = 1_000, 1e-9
_BINS, _LIMIT = 8_192, 27.0


def prior_shift(z: Floats, weights: Floats | None, rate: float, max_odds_ratio: float) -> float:
    """What to add to log-odds so that they suit the rows at hand.

    Args:
        z: calibrated log-odds (n,) of unlabelled rows.
        weights: rows that each value stands for (n,); one each when None.
        rate: outcome rate of the rows the calibration was fitted on.
        max_odds_ratio: the odds of the rate change at most by this factor, up or down.
    """
    bound = float(np.log(max_odds_ratio))
    shift = 0.0
    for _ in range(_STEPS):
        expected = float(np.clip(np.average(expit(z + shift), weights=weights), 1e-12, 1 - 1e-12))
        wanted = float(np.clip(logit(expected) - logit(rate), -bound, bound))
        if abs(wanted - shift) < _TOLERANCE:
            break
        shift = wanted
    return shift


class LogOddsHistogram:
    """Log-odds of any number of rows in constant memory: counts and means of narrow bins."""

    def __init__(self) -> None:
        self._rows = np.zeros(_BINS)
        self._sums = np.zeros(_BINS)

    def add(self, z: Floats) -> None:
        """Count these log-odds (n,)."""
        kept = np.clip(z, -_LIMIT, _LIMIT)
        bins = np.minimum(((kept + _LIMIT) * (_BINS / (2 * _LIMIT))).astype(np.int64), _BINS - 1)
        self._rows += np.bincount(bins, minlength=_BINS)
        self._sums += np.bincount(bins, weights=kept, minlength=_BINS)

    def shift(self, rate: float, max_odds_ratio: float) -> float:
        """See `prior_shift`."""
        filled = self._rows > 0
        if not filled.any():
            return 0.0
        return prior_shift(self._sums[filled] / self._rows[filled], self._rows[filled], rate, max_odds_ratio)
