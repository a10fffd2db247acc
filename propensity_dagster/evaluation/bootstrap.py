"""The paired bootstrap over entities: every model is judged on the same resamples of whole entities."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from propensity_dagster.evaluation.metrics import METRICS, Floats, Judged, Weighted

Ints = NDArray[np.int64]

REPLICATES = 250
Z95 = 1.959964
"""Standard errors from an estimate to the limits of its 95% interval."""
_CELLS = 4_000_000  # weights held at a time


@dataclass(frozen=True)
class Estimate:
    """A value with a 95% percentile interval (Efron and Tibshirani 1993, 13.3)."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Plain data; NaN becomes null."""
        return {"value": finite(self.value), "low": finite(self.low), "high": finite(self.high)}


def entity_weights(entity: Ints, replicates: int, seed: int) -> Iterator[Floats]:
    """Weights (some, n): first one row of ones, then `replicates` resamples of entities with replacement.

    Args:
        entity: entity code (n,) from 0 of each row; all rows of one entity get the same weight.
        replicates: number of resamples.
        seed: equal seeds give equal weights, which is what makes comparisons paired.
    """
    rng = np.random.default_rng(seed)
    entities = int(entity.max()) + 1
    yield np.ones((1, len(entity)))
    chunk = max(1, min(replicates, _CELLS // max(len(entity), 1)))
    for start in range(0, replicates, chunk):
        size = min(chunk, replicates - start)
        counts = np.empty((size, entities))
        for i in range(size):
            counts[i] = np.bincount(rng.integers(0, entities, entities), minlength=entities)
        yield counts[:, entity]


def replicate_metrics(
    models: Mapping[str, Judged],
    entity: Ints,
    replicates: int = REPLICATES,
    seed: int = 0,
    metrics: Mapping[str, Callable[[Weighted], Floats]] = METRICS,
) -> dict[str, dict[str, Floats]]:
    """Every metric of every model: arrays whose first entry is the estimate, the others its replicates.

    A metric may give one number per replicate or a row of them.
    """
    parts: dict[str, dict[str, list[Floats]]] = {m: {name: [] for name in metrics} for m in models}
    for weights in entity_weights(entity, replicates, seed):
        for model, judged in models.items():
            weighted = Weighted(judged, weights)
            for name, metric in metrics.items():
                parts[model][name].append(metric(weighted))
    return {m: {name: np.concatenate(v) for name, v in found.items()} for m, found in parts.items()}


def estimate(replicated: Floats) -> Estimate:
    """Estimate and 95% interval of an array made by `replicate_metrics`."""
    draws = replicated[1:][~np.isnan(replicated[1:])]
    if np.isnan(replicated[0]) or not len(draws):
        return Estimate(float(replicated[0]), np.nan, np.nan)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(replicated[0]), float(low), float(high))


def upper_bound(replicated: Floats, confidence: float) -> float:
    """One-sided upper confidence bound."""
    return float(np.nanquantile(replicated[1:], confidence))


def lower_bound(replicated: Floats, confidence: float) -> float:
    """One-sided lower confidence bound."""
    return float(np.nanquantile(replicated[1:], 1 - confidence))


def finite(value: float) -> float | None:
    """NaN and infinities have no place in JSON."""
    return float(value) if np.isfinite(value) else None
