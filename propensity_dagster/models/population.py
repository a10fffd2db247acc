"""What the rows that a model learnt from looked like, kept with the model: later snapshots are compared with them.

A column is cut into buckets: tenths of a number, the known categories; then "missing", and of categories "unseen".
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from propensity_dagster.models.dataset import CATEGORY, Columns, FeatureContract, Floats

Counts = NDArray[np.int64]

SMOOTHING = 0.5
"""Added to every bucket: an empty one is rare, not impossible."""

_TENTHS = np.arange(1, 10) / 10
_SAMPLE = 20_000


def describe_population(rows: Columns, contract: FeatureContract) -> dict[str, Any]:
    """Buckets of every feature, with the training rows in each. Looks at one column at a time.

    Args:
        rows: training rows (n), none left out.
        contract: features of the matrix.

    Returns:
        Plain data: `rows`; `independent`, the rows of a mean snapshot, for snapshots repeat their customers; and by
        feature `kind`, `edges` (of numbers), `lowest` and `highest` value, and `counts` of the buckets. Of several
        snapshots also `days` between the first and the last, and of each feature how it `moved`: the largest stability
        index of a snapshot against all, the index (`trend`) of the last against the first, the largest (`step`)
        from one to the next, the same of the share missing, and the share of the last outside the range of the first.
    """
    of_row = rows.column("snapshot").to_numpy() if "snapshot" in rows.schema.names else np.empty(0)
    days = np.unique(of_row)
    snapshots = max(len(days), 1)
    parts = [np.flatnonzero(of_row == day) for day in days] if snapshots > 1 else []
    features: dict[str, Any] = {}
    count = 0
    for spec in contract.features:
        column = rows.column(spec.name)
        values = FeatureContract((spec,)).encode(pa.table({spec.name: column}))[:, 0]
        count = len(values)
        if spec.kind == CATEGORY:
            known = np.bincount(values[~np.isnan(values)].astype(np.int64), minlength=len(spec.categories))
            missing = column.null_count
            counts = [*known.tolist(), missing, len(values) - missing - int(known.sum())]
            features[spec.name] = {"kind": CATEGORY, "counts": counts}
        else:
            features[spec.name] = {"kind": spec.kind, **number_buckets(values)}
        if parts:
            features[spec.name]["moved"] = _moved(features[spec.name], [values[rows] for rows in parts])
    apart = int((days[-1] - days[0]) / np.timedelta64(1, "D")) if snapshots > 1 else 0
    return {"rows": count, "independent": count / snapshots, "days": apart, "features": features}


def index_terms(reference: Counts, current: Counts) -> Floats:
    """What each bucket adds to the population stability index of two samples over the same buckets (buckets,)."""
    p, q = _shares(current), _shares(reference)
    return (p - q) * np.log(p / q)


def _shares(counts: Counts) -> Floats:
    smoothed = counts + SMOOTHING
    return smoothed / smoothed.sum()


def _moved(known: dict[str, Any], parts: Sequence[Floats]) -> dict[str, Any]:
    """What the model has seen a feature do by itself from snapshot to snapshot; the trend beyond chance."""
    counts = np.array([_counts(known, part) for part in parts])
    pooled = counts.sum(axis=0)
    at = -2 if known["kind"] == CATEGORY else -1
    missing = counts[:, at] / np.maximum(counts.sum(axis=1), 1)
    moved = {
        "index": max(_index(pooled, own) for own in counts),
        "trend": _beyond_chance(counts[0], counts[-1]),
        "step": max(_index(a, b) for a, b in pairwise(counts)),
        "missing": float(np.abs(missing - pooled[at] / max(pooled.sum(), 1)).max()),
        "missing_trend": float(abs(missing[-1] - missing[0])),
        "missing_step": float(np.abs(np.diff(missing)).max()),
    }
    if known["kind"] == CATEGORY:
        return moved
    first, last = parts[0], parts[-1]
    there = first[~np.isnan(first)]
    with np.errstate(invalid="ignore"):
        outside = (last < there.min()) | (last > there.max()) if len(there) else np.zeros(1)
    return {**moved, "outside_trend": float(outside.mean())}


def _beyond_chance(reference: Counts, current: Counts) -> float:
    """Index of two samples, less twice what it would be between equal distributions."""
    chance = (len(reference) - 1) * (1 / max(reference.sum(), 1) + 1 / max(current.sum(), 1))
    return max(_index(reference, current) - 2 * chance, 0.0)


def _index(reference: Counts, current: Counts) -> float:
    return float(index_terms(reference, current).sum())


def _counts(known: dict[str, Any], values: Floats) -> Counts:
    there = values[~np.isnan(values)]
    if known["kind"] == CATEGORY:  # a rare category without a code of its own counts as missing here
        codes = np.bincount(there.astype(np.int64), minlength=len(known["counts"]) - 2)
        return np.append(codes, [len(values) - len(there), 0])
    edges = np.array(known["edges"])
    buckets = np.bincount(np.searchsorted(edges, there), minlength=len(edges) + 1)
    return np.append(buckets, len(values) - len(there))


def number_buckets(values: Floats) -> dict[str, Any]:
    """Edges between the tenths of known values (n,), and the counts of the tenths and of the missing."""
    known = np.sort(values[~np.isnan(values)])
    places = np.unique(np.linspace(0, len(known) - 1, min(_SAMPLE, len(known))).astype(np.int64))
    edges = np.unique(np.quantile(known[places], _TENTHS, method="lower")) if len(known) else np.empty(0)
    below = np.searchsorted(known, edges, side="right")
    counts = np.diff(below, prepend=0, append=len(known)).tolist()
    ends = {"lowest": float(known[0]), "highest": float(known[-1])} if len(known) else {"lowest": None, "highest": None}
    return {"edges": edges.tolist(), **ends, "counts": [*counts, len(values) - len(known)]}
