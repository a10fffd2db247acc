"""What the rows that a model learnt from looked like, kept with the model: later snapshots are compared with them.

A column is cut into buckets: tenths of a number, the known categories; then "missing", and of categories "unseen".
"""

from typing import Any

import numpy as np
import pyarrow as pa

from propensity_dagster.models.dataset import CATEGORY, FeatureContract, Floats

_TENTHS = np.arange(1, 10) / 10
_SAMPLE = 20_000


def describe_population(table: pa.Table, contract: FeatureContract, X: Floats) -> dict[str, Any]:
    """Buckets of every feature, with the training rows in each.

    Args:
        table: training rows (n).
        contract: features of the matrix.
        X: the same rows, encoded (n, p).

    Returns:
        Plain data: `rows`; `independent`, the rows of a mean snapshot, for snapshots repeat their customers; and by
        feature `kind`, `edges` (of numbers), `lowest` and `highest` value, and `counts` of the buckets.
    """
    snapshots = len(table["snapshot"].unique()) if "snapshot" in table.column_names else 1
    features: dict[str, Any] = {}
    for i, spec in enumerate(contract.features):
        values = X[:, i]
        if spec.kind == CATEGORY:
            known = np.bincount(values[~np.isnan(values)].astype(np.int64), minlength=len(spec.categories))
            missing = table[spec.name].null_count
            counts = [*known.tolist(), missing, len(values) - missing - int(known.sum())]
            features[spec.name] = {"kind": CATEGORY, "counts": counts}
        else:
            features[spec.name] = {"kind": spec.kind, **number_buckets(values)}
    return {"rows": len(X), "independent": len(X) / snapshots, "features": features}


def number_buckets(values: Floats) -> dict[str, Any]:
    """Edges between the tenths of known values (n,), and the counts of the tenths and of the missing."""
    known = np.sort(values[~np.isnan(values)])
    places = np.unique(np.linspace(0, len(known) - 1, min(_SAMPLE, len(known))).astype(np.int64))
    edges = np.unique(np.quantile(known[places], _TENTHS, method="lower")) if len(known) else np.empty(0)
    below = np.searchsorted(known, edges, side="right")
    counts = np.diff(below, prepend=0, append=len(known)).tolist()
    ends = {"lowest": float(known[0]), "highest": float(known[-1])} if len(known) else {"lowest": None, "highest": None}
    return {"edges": edges.tolist(), **ends, "counts": [*counts, len(values) - len(known)]}
