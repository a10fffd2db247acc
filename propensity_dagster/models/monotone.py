"""Monotone constraints: more of a feature may only raise, or only lower, the score, all else equal.

LightGBM and the logistic regression keep what the campaign file states; every fitted model is then measured, and one
that breaks it is neither blended nor promoted. Only known values are compared: a missing one is no number.
"""

from collections.abc import Mapping

import numpy as np

from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Floats

KEPT = 1e-9
"""Log-odds that a model may move the wrong way by: rounding."""

_ROWS, _GRID = 500, 20


def violations(model: FittedModel, X: Floats, directions: Mapping[str, int]) -> dict[str, float]:
    """How far, in log-odds, the score of any row moves the wrong way between neighbours of a grid of values.

    Args:
        model: what to measure.
        X: encoded rows (n, p); at most 500 are used, and the 1st to 99th percentile of their known values.
        directions: +1 or -1 by feature.

    Returns:
        By feature the largest violation; 0 where there is none.
    """
    rows = X[np.unique(np.linspace(0, len(X) - 1, min(_ROWS, len(X))).astype(np.int64))]
    found: dict[str, float] = {}
    for name, direction in directions.items():
        column = model.contract.names.index(name)
        known = X[:, column][~np.isnan(X[:, column])]
        grid = np.unique(np.quantile(known, np.linspace(0.01, 0.99, _GRID))) if len(known) else known
        worst, before = 0.0, None
        for value in grid:
            changed = rows.copy(order="F")
            changed[:, column] = value
            z = direction * model.log_odds(changed)
            if before is not None:
                worst = max(worst, float((before - z).max()))
            before = z
        found[name] = worst
    return found


def keeps(model: FittedModel) -> bool:
    """Whether a model kept every constraint when it was trained; one without constraints does."""
    return max(model.facts.get("monotone", {}).values(), default=0.0) <= KEPT
