"""Scoring one row at a time, from a saved model's files. Belongs here: what `models/` computes for a matrix.

The batch classes cost milliseconds on one row and import scipy and pyarrow; these cost microseconds. Each saved
model's golden rows prove at load that both give the same. `contributions` are log-odds that add up to the score.
"""

import ctypes
import importlib.util
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import factorial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from propensity_dagster.errors import SavedModelError
from propensity_dagster.manifest import read_verified

Floats = NDArray[np.float64]
Row = Sequence[float]

FORMAT, MODEL = 1, "model.json"
_EXACT, _FLOATING = 1e-9, 1e-6  # what golden rows may differ by, in log-odds
_LIMIT = 16.0  # as in models/calibration.py
_CLIP = 6.0  # as in models/preprocess.py
_NAN = math.nan


class RowScorer(Protocol):
    """A trained model before calibration, for one row of encoded values (missing is NaN)."""

    tolerance: float

    def log_odds(self, row: Row) -> float:
        """Raw log-odds."""
        ...

    def contributions(self, row: Row, reference: Floats) -> tuple[float, Floats]:
        """Base and one contribution per feature (p,), in log-odds; they add up to `log_odds(row)`.

        `reference` (m, p) are rows of the population that the row is compared with.
        """
        ...


@dataclass(frozen=True)
class Model:
    """A saved model: its inputs in order, scorer and calibrator."""

    name: str
    features: tuple[dict[str, Any], ...]
    scorer: RowScorer
    calibrate: Callable[[float], float]
    facts: dict[str, Any]

    def log_odds(self, row: Row) -> float:
        """Calibrated log-odds."""
        return self.calibrate(self.scorer.log_odds(row))

    def contributions(self, row: Row, reference: Floats) -> tuple[float, Floats]:
        """Like the scorer's, but adding up to the calibrated log-odds.

        The calibrator's curve is replaced by its secant between base and score: contributions keep their
        proportions, and the sum is exact.
        """
        base, shares = self.scorer.contributions(row, reference)
        z = base + float(shares.sum())
        low, high = self.calibrate(base), self.calibrate(z)
        # Beyond the limit of log-odds the curve is flat, and without a difference there is nothing to share.
        slope = (high - low) / (z - base) if abs(z - base) > 1e-12 else 1.0
        return low, shares * slope


def load_model(folder: Path) -> Model:
    """Read a saved model, verifying checksums and golden rows.

    Raises:
        SavedModelError: when a file is missing, cut short, changed, or of an unknown format or kind.
    """
    content = read_verified(folder, FORMAT, MODEL)
    try:
        kind = content["kind"]
        if kind not in _SCORERS:
            raise SavedModelError(f"{folder}: unknown kind of model {kind!r}; allowed are {', '.join(_SCORERS)}")
        calibrator = content["calibrator"]
        features = tuple(content["contract"])
        scorer = _SCORERS[kind](folder, content["scorer"], len(features))
        calibrate = _CALIBRATORS[calibrator["method"]](calibrator["values"])
        model = Model(content["name"], features, scorer, calibrate, content["facts"])
        golden = content["golden"]
        rows = [[_NAN if v is None else v for v in row] for row in golden["rows"]]
        difference = max(abs(model.log_odds(row) - z) for row, z in zip(rows, golden["log_odds"], strict=True))
    except (KeyError, ValueError, TypeError, IndexError, OSError) as error:
        raise SavedModelError(f"{folder}: not a saved model: {error!r}") from None
    if not difference <= scorer.tolerance:
        raise SavedModelError(
            f"{folder}: the golden rows score differently by {difference:.3g} in log-odds (allowed {scorer.tolerance})"
        )
    return model


class _Trees:
    """LightGBM through its C library alone: `import lightgbm` would cost a worker 150 MiB and a second.

    Not for two threads at once: the row and the result live in buffers of the object.
    """

    tolerance = _EXACT
    _RAW, _CONTRIBUTIONS = 1, 3

    def __init__(self, folder: Path, state: dict[str, Any], width: int) -> None:
        self._width = width
        self._library = _lightgbm()
        text = (folder / "trees.txt").read_bytes()
        self._booster = ctypes.c_void_p()
        trees = ctypes.c_int(0)
        self._checked(
            self._library.LGBM_BoosterLoadModelFromString(text, ctypes.byref(trees), ctypes.byref(self._booster))
        )
        columns = ctypes.c_int(0)
        self._checked(self._library.LGBM_BoosterGetNumFeature(self._booster, ctypes.byref(columns)))
        if columns.value != width:
            raise ValueError(f"the trees read {columns.value} columns, the contract has {width}")
        self._row = (ctypes.c_double * width)()
        self._out = (ctypes.c_double * (width + 1))()
        self._length = ctypes.byref(ctypes.c_int64(0))
        self._predict = self._library.LGBM_BoosterPredictForMatSingleRowFast
        self._raw = self._configured(self._RAW)
        self._shares: ctypes.c_void_p | None = None

    def log_odds(self, row: Row) -> float:
        """Raw score."""
        self._row[:] = row  # pyright: ignore[reportArgumentType, reportCallIssue] any sequence of floats
        self._checked(self._predict(self._raw, self._row, self._length, self._out))
        return self._out[0]

    def contributions(self, row: Row, reference: Floats) -> tuple[float, Floats]:
        """TreeSHAP (Lundberg et al. 2020) by LightGBM's own code; its base is the training rows' mean score."""
        if self._shares is None:
            self._shares = self._configured(self._CONTRIBUTIONS)
        self._row[:] = row  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._checked(self._predict(self._shares, self._row, self._length, self._out))
        return self._out[self._width], np.array(self._out[: self._width])

    def _configured(self, prediction: int) -> ctypes.c_void_p:
        configuration = ctypes.c_void_p()
        self._checked(
            self._library.LGBM_BoosterPredictForMatSingleRowFastInit(
                self._booster,
                ctypes.c_int(prediction),
                ctypes.c_int(0),
                ctypes.c_int(-1),
                ctypes.c_int(1),  # rows of float64
                ctypes.c_int32(self._width),
                b"num_threads=1",
                ctypes.byref(configuration),
            )
        )
        return configuration

    def _checked(self, status: int) -> None:
        if status:
            raise ValueError(f"LightGBM: {self._library.LGBM_GetLastError().decode(errors='replace')}")

    def __del__(self) -> None:
        for configuration in (getattr(self, "_raw", None), getattr(self, "_shares", None)):
            if configuration:
                self._library.LGBM_FastConfigFree(configuration)
        if getattr(self, "_booster", None):
            self._library.LGBM_BoosterFree(self._booster)


def _lightgbm() -> Any:
    spec = importlib.util.find_spec("lightgbm")
    if spec is None or not spec.submodule_search_locations:
        raise SavedModelError("the package lightgbm is not installed, which holds the library that scores trees")
    folder = Path(spec.submodule_search_locations[0])
    for name in ("lib/lib_lightgbm.so", "lib/lib_lightgbm.dylib", "bin/lib_lightgbm.dll", "lib_lightgbm.so"):
        if (folder / name).exists():
            library = ctypes.CDLL(str(folder / name))
            library.LGBM_GetLastError.restype = ctypes.c_char_p
            return library
    raise SavedModelError(f"{folder}: there is no LightGBM library in this package")


class _Scaling:
    """`models.preprocess.Scaling` for one row, or for many when they explain one."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.columns = np.array(state["columns"], dtype=np.int64)
        self.indicators = np.array(state["indicators"], dtype=np.int64)
        self._mean, self._scale = np.array(state["mean"]), np.array(state["scale"])
        self.width = len(self.columns) + len(self.indicators)

    def apply(self, X: Floats) -> Floats:
        """Scaled numbers and indicators of rows (..., p)."""
        values = X[..., self.columns]
        scaled = (np.copysign(np.log1p(np.abs(values)), values) - self._mean) / self._scale
        absent = np.isnan(values)
        scaled = np.minimum(np.maximum(scaled, -_CLIP), _CLIP)
        scaled[absent] = 0.0
        return np.concatenate([scaled, absent[..., self.indicators]], axis=-1)

    def to_features(self, shares: Floats, width: int) -> Floats:
        """What each feature (width,) gets of what its scaled value and its indicator got."""
        numbers = len(self.columns)
        out = np.zeros(width)
        out[self.columns] += shares[:numbers]
        np.add.at(out, self.columns[self.indicators], shares[numbers:])
        return out


class _Codes:
    """Category codes of rows; `size` for missing or unseen."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.columns = tuple(state["columns"])
        self.sizes = tuple(state["sizes"])

    def of(self, row: Row) -> list[int]:
        """Codes of one row."""
        return [
            size if math.isnan(value := row[column]) else int(value)
            for column, size in zip(self.columns, self.sizes, strict=True)
        ]


class _Linear:
    """`models.linear.LinearScorer`."""

    tolerance = _EXACT

    def __init__(self, folder: Path, state: dict[str, Any], width: int) -> None:
        self._width = width
        self._scaling, self._codes = _Scaling(state["scaling"]), _Codes(state["one_hot"])
        coefficients = np.array(state["coefficients"])
        self._numbers = coefficients[: self._scaling.width]
        edges = np.cumsum([self._scaling.width, *(size + 1 for size in self._codes.sizes)])
        if edges[-1] != len(coefficients):
            raise ValueError(f"{len(coefficients)} coefficients for {edges[-1]} columns")
        self._categories = [coefficients[a:b].tolist() for a, b in pairwise(edges)]
        self._intercept = float(state["intercept"])

    def log_odds(self, row: Row) -> float:
        """Raw log-odds."""
        z = self._intercept + float(self._scaling.apply(np.array(row)) @ self._numbers)
        for weights, code in zip(self._categories, self._codes.of(row), strict=True):
            z += weights[code]
        return z

    def contributions(self, row: Row, reference: Floats) -> tuple[float, Floats]:
        """Linear SHAP with independent features: coefficient times difference to the reference's mean."""
        mean = self._scaling.apply(reference).mean(axis=0)
        shares = self._scaling.to_features((self._scaling.apply(np.array(row)) - mean) * self._numbers, self._width)
        base = self._intercept + float(mean @ self._numbers)
        own = self._codes.of(row)
        others = np.array([self._codes.of(other) for other in reference.tolist()]).reshape(len(reference), -1)
        for i, (column, weights) in enumerate(zip(self._codes.columns, self._categories, strict=True)):
            usual = float(np.array(weights)[others[:, i]].mean())
            shares[column] += weights[own[i]] - usual
            base += usual
        return base, shares


class _Network:
    """`models.network.NetworkScorer`."""

    tolerance = _FLOATING
    _REFERENCES = 64
    _NODES, _WEIGHTS = (values for values in np.polynomial.legendre.leggauss(3))

    def __init__(self, folder: Path, state: dict[str, Any], width: int) -> None:
        self._width = width
        self._scaling, self._codes = _Scaling(state["scaling"]), _Codes(state["one_hot"])
        with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
            self._embeddings = [arrays[f"embedding_{i}"] for i in range(state["embeddings"])]
            self._layers = [(arrays[f"weights_{i}"], arrays[f"bias_{i}"]) for i in range(state["layers"])]

    def log_odds(self, row: Row) -> float:
        """Raw log-odds."""
        return float(self._forward(self._inputs(row)))

    def contributions(self, row: Row, reference: Floats) -> tuple[float, Floats]:
        """Expected gradients (Erion et al. 2021): integrated gradients averaged over reference rows.

        The integral is by Gauss and Legendre's rule with three nodes; what it leaves is shared in proportion.
        """
        own = self._inputs(row)
        others = np.array(
            [self._inputs(other) for other in reference[:: max(1, len(reference) // self._REFERENCES)].tolist()]
        )
        steps = (self._NODES[:, None, None] + 1) / 2
        points = others + steps * (own - others)
        gradient = self._gradient(points.reshape(-1, len(own))).reshape(points.shape)
        shares = (np.einsum("s,sri->ri", self._WEIGHTS / 2, gradient) * (own - others)).mean(axis=0)
        base = float(np.mean(self._forward(others)))
        rest = float(self._forward(own)) - base - float(shares.sum())
        size = np.abs(shares)
        if size.sum() > 0:
            shares = shares + rest * size / size.sum()
        numbers = self._scaling.width
        out = self._scaling.to_features(shares[:numbers], self._width)
        start = numbers
        for column, table in zip(self._codes.columns, self._embeddings, strict=True):
            out[column] += shares[start : start + table.shape[1]].sum()
            start += table.shape[1]
        return base, out

    def _inputs(self, row: Row) -> Floats:
        numbers = self._scaling.apply(np.array(row))
        embedded = [table[code] for table, code in zip(self._embeddings, self._codes.of(row), strict=True)]
        return np.concatenate([numbers, *embedded])

    def _forward(self, hidden: Floats) -> Any:
        for weights, bias in self._layers[:-1]:
            hidden = hidden @ weights + bias
            hidden = hidden / (1 + np.exp(-hidden))
        weights, bias = self._layers[-1]
        return (hidden @ weights + bias)[..., 0]

    def _gradient(self, X: Floats) -> Floats:
        """Gradient (n, i) of the log-odds by the inputs (n, i)."""
        slopes: list[Floats] = []
        hidden = X
        for weights, bias in self._layers[:-1]:
            z = hidden @ weights + bias
            sigmoid = 1 / (1 + np.exp(-z))
            hidden = z * sigmoid
            slopes.append(sigmoid * (1 + z * (1 - sigmoid)))
        gradient = np.broadcast_to(self._layers[-1][0][:, 0], (len(X), len(self._layers[-1][0])))
        for (weights, _), slope in zip(self._layers[-2::-1], slopes[::-1], strict=True):
            gradient = (gradient * slope) @ weights.T
        return gradient


class _Cells:
    """`models.baseline.CellScorer`."""

    tolerance = _EXACT

    def __init__(self, folder: Path, state: dict[str, Any], width: int) -> None:
        self._width = width
        self._columns, self._edges, self._values = state["columns"], state["edges"], state["cell_log_odds"]

    def log_odds(self, row: Row) -> float:
        """Log-odds of the row's cell."""
        return self._at([row[column] for column in self._columns])

    def contributions(self, row: Row, reference: Floats) -> tuple[float, Floats]:
        """Exact Shapley values (Shapley 1953) of the two or three columns that make a cell."""
        own = [row[column] for column in self._columns]
        others = reference[:, self._columns].tolist()
        k = len(own)
        worth: dict[tuple[bool, ...], float] = {}
        for chosen in product((False, True), repeat=k):
            mixed = ([a if c else b for a, b, c in zip(own, other, chosen, strict=True)] for other in others)
            worth[chosen] = sum(map(self._at, mixed)) / len(others)
        shares = np.zeros(self._width)
        for i, column in enumerate(self._columns):
            for chosen, value in worth.items():
                if not chosen[i]:
                    size = sum(chosen)
                    weight = factorial(size) * factorial(k - size - 1) / factorial(k)
                    shares[column] += weight * (worth[(*chosen[:i], True, *chosen[i + 1 :])] - value)
        return worth[(False,) * k], shares

    def _at(self, values: Row) -> float:
        cell = 0
        for cuts, value in zip(self._edges, values, strict=True):
            cell = cell * (len(cuts) + 2) + (len(cuts) + 1 if math.isnan(value) else bisect_right(cuts, value))
        return self._values[cell]


class _Ensemble:
    """`models.ensemble.EnsembleScorer`."""

    def __init__(self, folder: Path, state: dict[str, Any], width: int) -> None:
        weighted = zip(state["members"], state["weights"], strict=True)
        used = [(load_model(folder / name), weight) for name, weight in weighted if weight]
        self._members = [(model, model.log_odds, weight) for model, weight in used]
        self.tolerance = max((model.scorer.tolerance for model, _ in used), default=_EXACT)
        self._width = width

    def log_odds(self, row: Row) -> float:
        """Weighted sum of the members' calibrated log-odds."""
        z = 0.0
        for _, log_odds, weight in self._members:
            z += weight * log_odds(row)
        return z

    def contributions(self, row: Row, reference: Floats) -> tuple[float, Floats]:
        """The same weighted sum of the members' contributions."""
        base, shares = 0.0, np.zeros(self._width)
        for member, _, weight in self._members:
            member_base, member_shares = member.contributions(row, reference)
            base += weight * member_base
            shares += weight * member_shares
        return base, shares


_SCORERS: dict[str, Callable[[Path, dict[str, Any], int], RowScorer]] = {
    "cells": _Cells,
    "linear": _Linear,
    "lightgbm": _Trees,
    "network": _Network,
    "ensemble": _Ensemble,
}


def _log_expit(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z >= 0 else z - math.log1p(math.exp(z))


def _clipped(z: float) -> float:
    return -_LIMIT if z < -_LIMIT else _LIMIT if z > _LIMIT else z  # NaN stays


def _none(values: Any) -> Callable[[float], float]:
    return _clipped


def _temperature(values: Any) -> Callable[[float], float]:
    ((a,),) = values
    return lambda z: a * _clipped(z)


def _platt(values: Any) -> Callable[[float], float]:
    ((a, b),) = values
    return lambda z: a * _clipped(z) + b


def _beta(values: Any) -> Callable[[float], float]:
    ((a, b, c),) = values

    def calibrate(z: float) -> float:
        z = _clipped(z)
        return a * _log_expit(z) - b * _log_expit(-z) + c

    return calibrate


def _isotonic(values: Any) -> Callable[[float], float]:
    knots, at = (list(map(float, v)) for v in values)

    def calibrate(z: float) -> float:
        z = _clipped(z)
        if z <= knots[0]:
            return at[0] + (z - knots[0])
        if z >= knots[-1]:
            return at[-1] + (z - knots[-1])
        i = bisect_right(knots, z)
        return at[i - 1] + (at[i] - at[i - 1]) / (knots[i] - knots[i - 1]) * (z - knots[i - 1])

    return calibrate


_CALIBRATORS: dict[str, Callable[[Any], Callable[[float], float]]] = {
    "none": _none,
    "temperature": _temperature,
    "platt": _platt,
    "beta": _beta,
    "isotonic": _isotonic,
}
