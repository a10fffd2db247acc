"""Population stability: whether the rows of a snapshot are distributed like those the model learnt from.

The population stability index of two samples over the same buckets is the symmetric Kullback-Leibler divergence
(Jeffreys 1946), sum of (p - q) log(p / q). The industry's rule (0.1 warns, 0.25 alerts) forgets the sample: between
two samples of one distribution it is about (1/n + 1/m) times a chi-squared with buckets - 1 degrees of freedom
(Yurdakul and Naranjo 2020), at n = 100 above 0.1 nearly always. Here a finding must pass the rule and chance.

Belongs here: counts in, judgement out. Does not: reading data, alerts.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc

from propensity_dagster.models.population import SMOOTHING, Counts, index_terms

K = TypeVar("K", bound=Hashable)

WARN, ALERT = 0.1, 0.25
"""Limits of the index by industry practice."""

SHARE_WARN, SHARE_ALERT = 0.05, 0.20
"""Limits of a change in the share of rows that are missing, never seen, or out of range."""

FALSE_ALARMS = 0.005
"""Rate of false discoveries over all columns of a snapshot (Benjamini and Hochberg 1995)."""

_MIN_EXPECTED = 10.0  # rows a bucket must be expected to hold; below, the chi-squared law does not hold


@dataclass(frozen=True)
class Stability:
    """How one column's distribution moved.

    Attributes:
        index: the population stability index, over all buckets.
        by_chance: what the index is expected to be between equal distributions, at these sample sizes.
        p_value: how often chance alone gives as much.
        severity: "none", "warn" or "alert"; by the index or the share, and only beyond chance among all columns.
        largest: the bucket that contributes most.
    """

    index: float
    by_chance: float
    p_value: float
    severity: str
    largest: int


def stability_index(reference: Counts, current: Counts) -> float:
    """Population stability index of two samples' counts (buckets,) over the same buckets."""
    return float(index_terms(reference, current).sum())


def judge_stability(
    counts: Mapping[K, tuple[Counts, Counts]],
    reference_size: float | None = None,
    shares: Collection[K] = (),
    expected: Mapping[K, float] | None = None,
) -> dict[K, Stability]:
    """Judge the columns of one snapshot together.

    Args:
        counts: per column the counts (buckets,) of reference and current rows.
        reference_size: number of independent rows in the reference, where rows repeat a customer; None: all are.
        shares: those of `counts` that have two buckets, of which the first one's share is judged, not the index.
        expected: how far a column moves by itself, as time passes; less than that is no finding.

    Returns:
        A judgement per column. Under equal distributions the chance that any column is not "none" is at most 0.5%.
    """
    from scipy.stats import false_discovery_control

    tested = {
        name: (_tested_share if name in shares else _tested)(reference, current, reference_size)
        for name, (reference, current) in counts.items()
    }
    adjusted = false_discovery_control([p for _, p in tested.values()]) if tested else []
    found: dict[K, Stability] = {}
    for (name, (reference, current)), beyond in zip(counts.items(), adjusted, strict=True):
        by_chance, p_value = tested[name]
        terms = index_terms(reference, current)
        index = float(terms.sum())
        size, (warn, alert) = index, (WARN, ALERT)
        if name in shares:
            size, (warn, alert) = abs(_share(current) - _share(reference)), (SHARE_WARN, SHARE_ALERT)
        real = beyond <= FALSE_ALARMS
        real = real and size > (expected or {}).get(name, 0.0)
        severity = "alert" if real and size > alert else "warn" if real and size > warn else "none"
        found[name] = Stability(index, by_chance, p_value, severity, int(terms.argmax()))
    return found


def _share(counts: Counts) -> float:
    """Share of the first bucket."""
    return float(counts[0] / max(counts.sum(), 1))


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
    p, q = (b + SMOOTHING) / (n + SMOOTHING * size), (a + SMOOTHING) / (a.sum() + SMOOTHING * size)
    statistic = float(((p - q) * np.log(p / q)).sum()) / scale
    return scale * (size - 1), float(chdtrc(size - 1, statistic))


def _tested_share(reference: Counts, current: Counts, reference_size: float | None) -> tuple[float, float]:
    """The same of two buckets, by Fisher's exact test: a share that was zero until now has no large sample."""
    from scipy.stats import fisher_exact

    m = float(reference.sum())
    known = reference * min(reference_size / m, 1.0) if reference_size and m else reference
    table = np.array([known.round(), current], dtype=np.int64)
    p_value: Any = fisher_exact(table)[1]
    return 0.0, float(p_value)


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
