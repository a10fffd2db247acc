"""Always-valid intervals: they hold at every look at once, so that peeking is safe."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def always_valid_factor(units: Floats | float, planned: float, alpha: float) -> Floats | float:
    """How many standard errors an interval must span so that it holds at all sample sizes together.

    An asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2024, "Time-uniform central limit
    theory and asymptotic confidence sequences", Annals of Statistics 52(6), theorem 2.2 with the tuning of their
    appendix B.2): for an estimate with standard error s_n after n units the half-width is
    s_n sqrt(2 (n rho^2 + 1) / (n rho^2) log(sqrt(n rho^2 + 1) / alpha)).

    Args:
        units: n, in all variants of the comparison; an array for many looks.
        planned: number of units at which the interval is to be tightest; must be fixed before the first look.
        alpha: chance that it ever misses the true value.

    Returns:
        The factor, of the shape of `units`; 3.0 at the planned size for an alpha of 0.05, where one look needs 1.96.
    """
    rho_squared = (-2 * np.log(alpha) + np.log(-2 * np.log(alpha) + 1)) / planned
    v = np.asarray(units, dtype=np.float64) * rho_squared
    found = np.sqrt(2 * (v + 1) / v * np.log(np.sqrt(v + 1) / alpha))
    return float(found) if np.ndim(units) == 0 else found
