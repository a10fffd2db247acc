"""Contributions of features to a calibrated score, for every kind of model, in log-odds that add up.

`serving/scorers.py` computes the same for one row without this package's imports; a test holds them equal.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from propensity_dagster.models.base import FittedModel, threads
from propensity_dagster.models.baseline import CellScorer, cells_of
from propensity_dagster.models.calibration import Floats
from propensity_dagster.models.ensemble import EnsembleScorer
from propensity_dagster.models.linear import LinearScorer
from propensity_dagster.models.network import NetworkScorer
from propensity_dagster.models.preprocess import Scaling
from propensity_dagster.models.trees import TreesScorer

# As in serving/scorers.py. Measured on the demo: three nodes leave 1e-4, what counts is the number of reference rows.
_NETWORK_REFERENCES = 64
_NODES, _WEIGHTS = (np.asarray(values) for values in np.polynomial.legendre.leggauss(3))
_ROWS_A_CHUNK = 128

_Explain = Callable[[Floats], tuple[float, Floats]]


@dataclass(frozen=True)
class Contributions:
    """base + values.sum(axis=1) are the calibrated log-odds.

    Attributes:
        base: calibrated log-odds that no feature has moved.
        values: (n, p), by encoded row and feature.
        raw_base: the base before the last calibrator.
        raw: the sums (n,) before it: how much it changed is `base + values.sum(axis=1) - raw_base - raw`.
    """

    base: float
    values: Floats
    raw_base: float
    raw: Floats

    @property
    def order(self) -> NDArray[np.int64]:
        """Features from the largest mean absolute contribution to the smallest."""
        return np.argsort(-np.abs(self.values).mean(axis=0), kind="stable")


class Explainer:
    """What a model's scores owe to each feature, against `reference` rows (m, p) of a population.

    Trees: path-dependent TreeSHAP, whose base is the training rows' mean score. Logistic regression: linear SHAP with
    independent features. Network: expected gradients (Erion et al. 2021). Baseline: exact Shapley values of its cells'
    columns. Ensemble: the weighted sum of its members'.
    """

    def __init__(self, model: FittedModel, reference: Floats) -> None:
        if not len(reference):
            raise ValueError("a score is explained against reference rows; got none")
        self._calibrator = model.calibrator
        self._explain = _explainer(model.scorer, reference)

    def explain(self, X: Floats) -> Contributions:
        """Contributions to the calibrated log-odds of encoded rows (n, p).

        The calibrator's curve is replaced by its secant between base and score: proportions stay, the sum is exact.
        """
        raw_base, values = self._explain(X)
        raw = values.sum(axis=1)
        z = raw_base + raw
        base = float(self._calibrator.apply(np.array([raw_base]))[0])
        slope = np.ones(len(z))
        moved = np.abs(z - raw_base) > 1e-12
        np.divide(self._calibrator.apply(z) - base, z - raw_base, out=slope, where=moved)
        return Contributions(base, values * slope[:, None], raw_base, raw)


def _explainer(scorer: Any, reference: Floats) -> _Explain:
    if isinstance(scorer, TreesScorer):
        from propensity_dagster.explain.trees import build_tables, tree_contributions

        tables = build_tables(scorer.booster)
        return lambda X: tree_contributions(scorer.booster, tables, X)
    if isinstance(scorer, LinearScorer):
        return _linear(scorer, reference)
    if isinstance(scorer, NetworkScorer):
        return _network(scorer, reference)
    if isinstance(scorer, CellScorer):
        return _cells(scorer, reference)
    if isinstance(scorer, EnsembleScorer):
        return _ensemble(scorer, reference)
    raise TypeError(f"there is no explainer of a {type(scorer).__name__}")


def _linear(scorer: LinearScorer, reference: Floats) -> _Explain:
    scaling, one_hot = scorer.scaling, scorer.one_hot
    width = len(scaling.columns) + len(scaling.indicators)
    numbers, rest = scorer.coefficients[:width], scorer.coefficients[width:]
    mean = scaling.apply(reference).mean(axis=0)
    base = scorer.intercept + float(mean @ numbers)
    codes = one_hot.codes(reference)
    tables: list[Floats] = []
    for i, size in enumerate(one_hot.sizes):
        weights, rest = rest[: size + 1], rest[size + 1 :]
        usual = float(weights[codes[:, i]].mean())
        tables.append(weights - usual)
        base += usual

    def explain(X: Floats) -> tuple[float, Floats]:
        values = _to_features(scaling, (scaling.apply(X) - mean) * numbers, X.shape[1])
        own = one_hot.codes(X)
        for i, (column, table) in enumerate(zip(one_hot.columns, tables, strict=True)):
            values[:, column] += table[own[:, i]]
        return base, values

    return explain


def _network(scorer: NetworkScorer, reference: Floats) -> _Explain:
    others = scorer.inputs(reference[:: max(1, len(reference) // _NETWORK_REFERENCES)])
    base = float(scorer.output(others).mean())
    numbers = len(scorer.scaling.columns) + len(scorer.scaling.indicators)

    def explain(X: Floats) -> tuple[float, Floats]:
        out = np.empty(X.shape)

        def explain_chunk(start: int) -> None:
            rows = slice(start, start + _ROWS_A_CHUNK)
            own = scorer.inputs(X[rows])
            values = _expected_gradients(scorer, own, others)
            # What the rule of three nodes leaves is shared in proportion.
            left = scorer.output(own) - base - values.sum(axis=1)
            size = np.abs(values)
            total = size.sum(axis=1)
            values += np.divide(left, total, out=np.zeros(len(left)), where=total > 0)[:, None] * size
            found = _to_features(scorer.scaling, values[:, :numbers], X.shape[1])
            first = numbers
            for column, table in zip(scorer.one_hot.columns, scorer.embeddings, strict=True):
                found[:, column] += values[:, first : first + table.shape[1]].sum(axis=1)
                first += table.shape[1]
            out[rows] = found

        # numpy computes without the interpreter's lock; threads of BLAS below ours would halve the speed.
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads()) as pool:
            list(pool.map(explain_chunk, range(0, len(X), _ROWS_A_CHUNK)))
        return base, out

    return explain


def _expected_gradients(scorer: NetworkScorer, own: Floats, others: Floats) -> Floats:
    """Integrated gradients (n, i) from each reference row to each row, averaged; Gauss and Legendre's rule.

    The first layer is linear: along a line it is known from its ends, and its gradient is applied once at the end.
    Single precision: the exponentials are three quarters of the work, and the sum is made exact afterwards.
    """
    single = np.float32
    (first, bias), *rest = [(w.astype(single), b.astype(single)) for w, b in scorer.layers]
    rows: Any = own.astype(single)
    references: Any = others.astype(single)
    own_hidden, other_hidden = rows @ first + bias, references @ first + bias
    at_first = np.zeros((len(own), len(others), first.shape[1]), dtype=single)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        step = single((node + 1) / 2)
        hidden = other_hidden[None] + step * (own_hidden[:, None] - other_hidden[None])
        gradient = _gradient(rest, hidden.reshape(-1, first.shape[1])).reshape(at_first.shape)
        at_first += single(weight / 2) * gradient
    # sum over references of (own - other) * (gradient @ first.T), without a (rows, references, inputs) array
    pulled_own = at_first.sum(axis=1) @ first.T * rows
    by_reference = (references[:, None, :] * first.T[None]).reshape(-1, references.shape[1])
    pulled_other = at_first.reshape(len(own), -1) @ by_reference
    return (pulled_own - pulled_other).astype(np.float64) / len(others)


def _gradient(layers: list[tuple[Any, Any]], z: Any) -> Any:
    """Gradient (n, h) of the log-odds by the first layer's outputs z (n, h), before their SiLU."""
    slopes: list[Floats] = []
    for i, (weights, bias) in enumerate(layers):
        sigmoid = 1 / (1 + np.exp(-z))
        slopes.append(sigmoid * (1 + z * (1 - sigmoid)))
        if i < len(layers) - 1:
            z = (z * sigmoid) @ weights + bias
    gradient = layers[-1][0][:, 0] * slopes[-1]
    for (weights, _), slope in zip(layers[-2::-1], slopes[-2::-1], strict=True):
        gradient = (gradient @ weights.T) * slope
    return gradient


def _cells(scorer: CellScorer, reference: Floats) -> _Explain:
    k = len(scorer.columns)
    sizes = [len(edges) + 2 for edges in scorer.edges]
    digits_of_others = np.column_stack(np.unravel_index(cells_of(reference, scorer.columns, scorer.edges), sizes))
    # Worth of a coalition, by the digits of the row: a table over the row's digits, as the others are averaged.
    grid = np.stack(np.meshgrid(*[np.arange(size) for size in sizes], indexing="ij"), axis=-1).reshape(-1, k)
    worth: dict[tuple[bool, ...], Floats] = {}
    for chosen in product((False, True), repeat=k):
        total = np.zeros(len(grid))
        for other in digits_of_others:
            mixed = np.where(np.array(chosen), grid, other)
            total += scorer.cell_log_odds[np.ravel_multi_index(tuple(mixed.T), sizes)]
        worth[chosen] = total / len(digits_of_others)
    shares = np.zeros((len(grid), k))
    for i in range(k):
        for chosen, value in worth.items():
            if not chosen[i]:
                size = sum(chosen)
                weight = factorial(size) * factorial(k - size - 1) / factorial(k)
                shares[:, i] += weight * (worth[(*chosen[:i], True, *chosen[i + 1 :])] - value)
    base = float(worth[(False,) * k][0])

    def explain(X: Floats) -> tuple[float, Floats]:
        values = np.zeros(X.shape)
        found = shares[cells_of(X, scorer.columns, scorer.edges)]
        for i, column in enumerate(scorer.columns):
            values[:, column] += found[:, i]
        return base, values

    return explain


def _ensemble(scorer: EnsembleScorer, reference: Floats) -> _Explain:
    members = [
        (Explainer(member, reference), weight)
        for member, weight in zip(scorer.members, scorer.weights, strict=True)
        if weight
    ]

    def explain(X: Floats) -> tuple[float, Floats]:
        base, values = 0.0, np.zeros(X.shape)
        for explainer, weight in members:
            found = explainer.explain(X)
            base += weight * found.base
            values += weight * found.values
        return base, values

    return explain


def _to_features(scaling: Scaling, values: Floats, width: int) -> Floats:
    """What each feature (n, width) gets of what its scaled value and its missing-value indicator got."""
    out = np.zeros((len(values), width))
    out[:, list(scaling.columns)] += values[:, : len(scaling.columns)]
    for offset, position in enumerate(scaling.indicators):
        out[:, scaling.columns[position]] += values[:, len(scaling.columns) + offset]
    return out
