"""Performance before outcomes: what calibrated probabilities promise, if they are right.

Confidence-based performance estimation (CBPE; Kivimäki, Bialek, Nurminen and Kuberski 2025, "Confidence-based
estimators for predictive performance in model monitoring"): each row converts with its own probability, so expected
counts, and with them every metric, follow from the probabilities alone. Concept drift breaks the "if they are right":
then the realised metrics leave the promised interval, which is how it is found.

Belongs here: probabilities in, estimates out. Does not: outcomes.
"""

import numpy as np
from numpy.typing import NDArray

from propensity_dagster.evaluation.bootstrap import Estimate

Floats = NDArray[np.float64]

_DRAWS = 200
_BINS = 4_096  # rows are drawn in groups of nearly equal probability: memory does not grow with the population
_TINY = 1e-12


def promised_performance(probability: Floats, threshold: float, seed: int = 0) -> dict[str, Estimate]:
    """Expected performance of calibrated probabilities (n,), each with the 95% interval of what chance makes of it.

    Args:
        probability: of conversion, one a row.
        threshold: probability from which a row is contacted, for the confusion matrix.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        `conversions`, `log_loss`, `brier`, `auc`, `top_decile_lift`, and the counts `true_positives`,
        `false_positives`, `false_negatives`, `true_negatives` at the threshold.
    """
    p = np.sort(np.clip(probability, _TINY, 1 - _TINY))
    split = int(np.searchsorted(p, threshold))
    sizes, means = _groups(p, split)
    expected = _metrics(sizes, means, (sizes * means)[None], split)
    # Within a group the rows differ a little; the means of these two know every row.
    expected["log_loss"] = np.array([-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean()])
    expected["brier"] = np.array([(p * (1 - p)).mean()])
    rng = np.random.default_rng(seed)
    draws = rng.binomial(sizes, means, (_DRAWS, len(sizes))).astype(np.float64)
    drawn = _metrics(sizes, means, draws, split)
    found: dict[str, Estimate] = {}
    for name, values in drawn.items():
        known = values[~np.isnan(values)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        found[name] = Estimate(float(expected[name][0]), float(low), float(high))
    return found


def _groups(p: Floats, split: int) -> tuple[NDArray[np.int64], Floats]:
    """Sizes and mean probabilities of groups of sorted rows; none crosses the threshold."""
    sizes: list[NDArray[np.int64]] = []
    means: list[Floats] = []
    for part in (p[:split], p[split:]):
        groups = min(len(part), _BINS)
        if not groups:
            continue
        edges = np.linspace(0, len(part), groups + 1).astype(np.int64)
        count = np.diff(edges)
        sizes.append(count)
        means.append(np.add.reduceat(part, edges[:-1]) / count)
    return np.concatenate(sizes), np.concatenate(means)


def _metrics(sizes: NDArray[np.int64], means: Floats, converted: Floats, below: int) -> dict[str, Floats]:
    """Metrics of each row of `converted` (draws, groups), groups by ascending probability."""
    n = float(sizes.sum())
    others = sizes - converted
    total = converted.sum(axis=1)
    rest = n - total
    beaten = np.cumsum(others, axis=1) - others / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = (converted * beaten).sum(axis=1) / (total * rest)
        lift = _best_tenth(sizes, converted) / total / 0.1
    low = np.cumsum(sizes) <= below
    missed = converted[:, low].sum(axis=1)
    losses = converted @ np.log(means) + others @ np.log1p(-means)
    squares = converted @ (1 - means) ** 2 + others @ means**2
    return {
        "conversions": total,
        "log_loss": -losses / n,
        "brier": squares / n,
        "auc": auc,
        "top_decile_lift": lift,
        "true_positives": total - missed,
        "false_positives": (n - below) - (total - missed),
        "false_negatives": missed,
        "true_negatives": below - missed,
    }


def _best_tenth(sizes: NDArray[np.int64], converted: Floats) -> Floats:
    """Converters among the tenth with the highest probabilities; a group on the border counts in part."""
    from_best = np.cumsum(sizes[::-1])
    wanted = 0.1 * sizes.sum()
    share = np.clip((wanted - (from_best - sizes[::-1])) / sizes[::-1], 0, 1)
    return converted[:, ::-1] @ share
