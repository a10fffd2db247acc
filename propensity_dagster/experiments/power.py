"""How many units, and how many days, an experiment needs to find the effect that is worth finding."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from propensity_dagster.errors import ConfigError
from propensity_dagster.experiments.sequential import always_valid_factor


@dataclass(frozen=True)
class Power:
    """What a comparison of two variants needs.

    Attributes:
        units: in both variants, if the result is looked at once, at the end.
        units_peeking: the same if it may be looked at every day, with always-valid intervals.
        days: for `units`, at the stated number of new units a day; None where that is not known.
        days_peeking: for `units_peeking`.
        effect: the smallest relative effect found with the power at `planned` units, looked at once.
    """

    units: int
    units_peeking: int
    days: int | None
    days_peeking: int | None
    effect: float


def power(
    mean: float,
    variance: float,
    effect: float,
    share: float,
    alpha: float = 0.05,
    power: float = 0.8,
    explained: float = 0.0,
    daily: float | None = None,
    planned: int = 10_000,
    treated: float | None = None,
) -> Power:
    """Sample size for a difference of two means (Welch; the normal approximation).

    Args:
        mean: of the metric in the control; a rate, for conversions.
        variance: of the metric between units; mean x (1 - mean), for conversions.
        effect: relative difference to be found, 0.05 is 5% more.
        share: of the units that get the treatment, of both variants of the comparison.
        alpha: chance of a false alarm, two-sided.
        power: chance of finding the effect.
        explained: share of the variance that the covariate explains (CUPED: Deng et al. 2013).
        daily: new units a day.
        treated: variance in the treatment, if it is another: of conversions it grows with the rate.
        planned: where the always-valid interval is tightest.

    Raises:
        ConfigError: for a metric that is 0 or does not vary, or a share outside 0..1.
    """
    if mean <= 0 or variance <= 0:
        raise ConfigError(f"the metric must have a mean above 0 and vary, got mean {mean:g} and variance {variance:g}")
    if not 0 < share < 1 or not 0 <= explained < 1 or effect <= 0:
        raise ConfigError(
            f"share must be between 0 and 1, explained from 0 to below 1, effect above 0; got {share:g}, "
            f"{explained:g}, {effect:g}"
        )
    if not 0 < alpha < 1 or not 0 < power < 1 or (treated is not None and treated <= 0):
        raise ConfigError(
            "alpha and power must lie between 0 and 1, and the metric must still vary with the effect (a rate stays "
            f"below 1); got alpha {alpha:g}, power {power:g}, effect {effect:g} on a mean of {mean:g}"
        )
    # Variance of the difference, times n.
    one = (1 - explained) * ((variance if treated is None else treated) / share + variance / (1 - share))
    found = float(ndtri(power))

    def needed(factor: float) -> float:
        return one * ((factor + found) / (effect * mean)) ** 2

    once = needed(float(ndtri(1 - alpha / 2)))
    peeking = once
    for _ in range(100):  # the factor grows by a logarithm of n: the steps shrink fast
        peeking = needed(float(always_valid_factor(peeking, planned, alpha)))
    detectable = (float(ndtri(1 - alpha / 2)) + found) * np.sqrt(one / planned) / mean
    days = [None if not daily else int(np.ceil(n / daily)) for n in (once, peeking)]
    return Power(int(np.ceil(once)), int(np.ceil(peeking)), days[0], days[1], float(detectable))
