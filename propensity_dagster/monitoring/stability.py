"""Population stability: whether the rows of a snapshot are distributed like those the model learnt from.

The population stability index of two samples over the same buckets is the symmetric Kullback-Leibler divergence
(Jeffreys 1946), sum of (p - q) log(p / q). The industry's rule (0.1 warns, 0.25 alerts) forgets the sample: between
two samples of one distribution it is about (1/n + 1/m) times a chi-squared with buckets - 1 degrees of freedom
(Yurdakul and Naranjo 2020), at n = 100 above 0.1 nearly always. Here a finding must pass the rule and chance.

Belongs here: counts in, judgement out. Does not: reading data, alerts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, false_discovery_control

Counts = NDArray[np.int64]

WARN, ALERT = 0.1, 0.25
"""Limits of the index by industry practice."""

FALSE_ALARMS = 0.005
"""Rate of false discoveries over all columns of a snapshot (Benjamini and Hochberg 1995)."""

_SMOOTHING = 0.5  # added to every bucket: an empty one is rare, not impossible
_MIN_EXPECTED = 10.0  # rows a bucket must be expected to hold; below, the chi-squared law does not hold


@dataclass(frozen=True)
class Stability:
    """How one column's distribution moved.

    Attributes:
        name: of the column.
        index: the population stability index, over all buckets.
        by_chance: what the index is expected to be between equal distributions, at these sample sizes.
        p_value: how often chance alone gives as much.
        severity: "none", "warn" or "alert"; by the index, and only beyond chance among all columns.
        largest: the bucket that contributes most.
    """

    name: str
    index: float
    by_chance: float
    p_value: float
    severity: str
    largest: int


def stability_index(reference: Counts, current: Counts) -> float:
    """Population stability index of two samples' counts (buckets,) over the same buckets."""
    return float(_terms(reference, current).sum())


def judge_stability(
    counts: Mapping[str, tuple[Counts, Counts]], reference_size: float | None = None
) -> dict[str, Stability]:
    """Judge the columns of one snapshot together.

    Args:
        counts: per column the counts (buckets,) of reference and current rows.
        reference_size: number of independent rows in the reference, where rows repeat a customer; None: all are.

    Returns:
        A judgement per column. Under equal distributions the chance that any column is not "none" is at most 0.5%.
    """
    tested = {name: _tested(reference, current, reference_size) for name, (reference, current) in counts.items()}
    adjusted = false_discovery_control([p for _, p in tested.values()]) if tested else []
    found: dict[str, Stability] = {}
    for (name, (reference, current)), beyond in zip(counts.items(), adjusted, strict=True):
        by_chance, p_value = tested[name]
        terms = _terms(reference, current)
        index = float(terms.sum())
        real = beyond <= FALSE_ALARMS
        severity = "alert" if real and index > ALERT else "warn" if real and index > WARN else "none"
        found[name] = Stability(name, index, by_chance, p_value, severity, int(terms.argmax()))
    return found


def _terms(reference: Counts, current: Counts) -> NDArray[np.float64]:
    p, q = _shares(current), _shares(reference)
    return (p - q) * np.log(p / q)


def _shares(counts: Counts) -> NDArray[np.float64]:
    smoothed = counts + _SMOOTHING
    return smoothed / smoothed.sum()


def _tested(reference: Counts, current: Counts, reference_size: float | None) -> tuple[float, float]:
    """Expected index under equal distributions, and the p-value of the one that was found.

    Buckets too rare for the law are pooled, for the test alone: the index keeps them apart.
    """
    n = float(current.sum())
    m = float(reference.sum()) if reference_size is None else min(reference_size, float(reference.sum()))
    if not n or not m:
        return 0.0, 1.0
    pooled = (reference + current) / (reference.sum() + n)
    groups = _pool(pooled * min(n, m))
    size = groups.max() + 1
    if size < 2:
        return 0.0, 1.0
    a, b = (np.bincount(groups, weights=counts, minlength=size) for counts in (reference, current))
    scale = 1 / n + 1 / m
    p, q = (b + _SMOOTHING) / (n + _SMOOTHING * size), (a + _SMOOTHING) / (a.sum() + _SMOOTHING * size)
    statistic = float(((p - q) * np.log(p / q)).sum()) / scale
    return scale * (size - 1), float(chi2.sf(statistic, size - 1))


def _pool(expected: Sequence[float] | NDArray[np.float64]) -> NDArray[np.int64]:
    """A group for each bucket, so that every group is expected to hold enough rows: the rare ones share one."""
    values = np.asarray(expected, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    groups = np.empty(len(values), dtype=np.int64)
    group, held = 0, 0.0
    for place, bucket in enumerate(order):
        groups[bucket] = group
        held += values[bucket]
        if held >= _MIN_EXPECTED and values[order[place + 1 :]].sum() >= _MIN_EXPECTED:
            group, held = group + 1, 0.0
    return groups
