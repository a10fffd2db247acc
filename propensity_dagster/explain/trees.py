"""Exact TreeSHAP of a LightGBM model, from a table per leaf. Equal to LightGBM's `pred_contrib`, several times faster.

Path-dependent TreeSHAP (Lundberg et al. 2020) gives each leaf a game among the k features on its path, in which a
feature has one of two states: the row goes the leaf's way at all its nodes, or not. The 2^k outcomes do not depend on
the row, so they are computed once (the idea of FastTreeSHAP v2, Yang 2021); a row then looks up one line per leaf.
"""

# What numba compiles has no annotations: it infers them.
# pyright: reportMissingParameterType=false

import logging
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from propensity_dagster.models.base import threads
from propensity_dagster.models.bitvectors import MISSING, ZERO, allow_threads, categories_left
from propensity_dagster.models.calibration import Floats

logger = logging.getLogger(__name__)

MAX_PATH = 14
"""Different features on the path to a leaf. A table of more would have over 200,000 entries."""
MAX_TABLE_BYTES = 512 << 20

_BLOCK_ROWS = 256
_Array = NDArray[Any]


@dataclass(frozen=True)
class TreeTables:
    """A booster as flat arrays. Nodes of all trees are in preorder, so that a parent comes before its children.

    Attributes:
        base: mean score of the training rows, in log-odds.
        roots: where each tree's nodes begin, and where the last one's end.
        nodes: per node (parent, is_left, position, feature, default_left, missing, first_word, words, leaf).
        thresholds: per node.
        category_words: bits of the categories that go left.
        leaves: per leaf (start of its table, k, start of its features).
        leaf_features: features of the leaves' paths, one after the other.
        table: Shapley values; of a leaf the line of a pattern holds k of them.
    """

    base: float
    roots: _Array
    nodes: _Array
    thresholds: Floats
    category_words: _Array
    leaves: _Array
    leaf_features: _Array
    table: Floats

    def contributions(self, X: Floats) -> Floats:
        """Contributions (n, p) in log-odds of encoded rows (n, p); with `base` they add up to the raw score."""
        out = np.zeros(X.shape)
        allow_threads()
        _contributions(
            X,
            self.roots,
            self.nodes,
            self.thresholds,
            self.category_words,
            self.leaves,
            self.leaf_features,
            self.table,
            out,
            _BLOCK_ROWS,
        )
        return out


def tree_contributions(booster: Any, tables: TreeTables | None, X: Floats) -> tuple[float, Floats]:
    """Base and contributions (n, p) by the tables, or without them by LightGBM itself."""
    if tables is not None:
        return tables.base, tables.contributions(X)
    found = np.asarray(booster.predict(X, pred_contrib=True, num_threads=threads()))
    return float(found[0, -1]) if len(found) else 0.0, found[:, :-1]


def build_tables(booster: Any, max_path: int = MAX_PATH, max_bytes: int = MAX_TABLE_BYTES) -> TreeTables | None:
    """The tables of a booster; None where a path is too long, or all would be too large.

    `pred_contrib` explains such a booster. Approximations are not offered: Saabas' attribution names other top three
    reasons for a quarter of the rows.
    """
    flat = _Flat()
    for tree in booster.dump_model()["tree_info"]:
        flat.add_tree(tree["tree_structure"])
    longest = max((len(path) for path, _ in flat.paths), default=0)
    size = sum(8 * len(path) << len(path) for path, _ in flat.paths)
    if longest > max_path or size > max_bytes:
        logger.info("reasons by pred_contrib: paths of %d features, tables of %d MiB", longest, size >> 20)
        return None
    lines: list[Floats] = []
    leaves: list[tuple[int, int, int]] = []
    features: list[int] = []
    start = 0
    for path, value in flat.paths:
        k = len(path)
        leaves.append((start, k, len(features)))
        features += [feature for feature, _ in path]
        if k:
            lines.append(_leaf_table(np.array([share for _, share in path]), value).ravel())
            start += k << k
    return TreeTables(
        flat.base,
        np.array(flat.roots, dtype=np.int64),
        np.array(flat.nodes, dtype=np.int32).reshape(-1, 9),
        np.array(flat.thresholds),
        np.array(flat.words or [0], dtype=np.uint32),
        np.array(leaves, dtype=np.int64).reshape(-1, 3),
        np.array(features, dtype=np.int32),
        np.concatenate(lines) if lines else np.zeros(1),
    )


_Path = list[tuple[int, float]]  # feature, and the share of training rows that go the path's way at its nodes


class _Flat:
    """Trees of LightGBM's dump, flattened."""

    def __init__(self) -> None:
        self.base = 0.0
        self.roots = [0]
        self.nodes: list[tuple[int, ...]] = []
        self.thresholds: list[float] = []
        self.words: list[int] = []
        self.paths: list[tuple[_Path, float]] = []

    def add_tree(self, root: dict[str, Any]) -> None:
        start = len(self.nodes)
        # An explicit stack: a tree may be deeper than Python's recursion.
        waiting: list[tuple[dict[str, Any], int, int, int, _Path, float]] = [(root, -1, 0, 0, [], 1.0)]
        while waiting:
            node, parent, is_left, position, path, weight = waiting.pop()
            here = len(self.nodes) - start
            if "split_feature" not in node:
                self.base += weight * node["leaf_value"]
                self.nodes.append((parent, is_left, position, -1, 0, 0, 0, 0, len(self.paths)))
                self.thresholds.append(0.0)
                self.paths.append((path, node["leaf_value"]))
                continue
            feature, words = node["split_feature"], 0
            first_word = len(self.words)
            if node["decision_type"] == "==":
                words = self._add_categories(categories_left(node))
                self.thresholds.append(0.0)
            else:
                self.thresholds.append(float(node["threshold"]))
            missing, default = MISSING[node["missing_type"]], int(node["default_left"])
            self.nodes.append((parent, is_left, position, feature, default, missing, first_word, words, -1))
            known = [name for name, _ in path]
            place = known.index(feature) if feature in known else len(path)
            total = _rows(node["left_child"]) + _rows(node["right_child"])
            for side in ("right_child", "left_child"):  # the left one is taken first
                share = _rows(node[side]) / total
                longer = list(path)
                if place < len(path):
                    longer[place] = (feature, path[place][1] * share)
                else:
                    longer.append((feature, share))
                waiting.append((node[side], here, int(side == "left_child"), place, longer, weight * share))
        self.roots.append(len(self.nodes))

    def _add_categories(self, codes: list[int]) -> int:
        words = [0] * (max(codes) // 32 + 1)
        for code in codes:
            words[code // 32] |= 1 << code % 32
        self.words += words
        return len(words)


def _rows(node: dict[str, Any]) -> int:
    return node["internal_count"] if "split_feature" in node else node.get("leaf_count", 1)


@numba.njit(cache=True)
def _leaf_table(share: Floats, value: float) -> Floats:
    """Shapley values (2^k, k) of a leaf: line `pattern` for rows that go its way at just the features of `pattern`.

    A coalition S is worth `value` x the product of 1 or 0 (features in S) and `share` (the others). The product over
    the others of (share + x state) holds the worth of all coalitions of one size as the coefficient of a power of x.
    """
    k = len(share)
    weights = np.empty(k)
    weights[0] = 1.0 / k  # s! (k - 1 - s)! / k!
    for s in range(1, k):
        weights[s] = weights[s - 1] * s / (k - s)
    table = np.empty((1 << k, k))
    coefficients = np.empty(k + 1)
    for pattern in range(1 << k):
        for j in range(k):
            coefficients[:] = 0.0
            coefficients[0] = 1.0
            degree = 0
            for i in range(k):
                if i != j:
                    state = (pattern >> i) & 1
                    degree += 1
                    for s in range(degree, 0, -1):
                        coefficients[s] = coefficients[s] * share[i] + coefficients[s - 1] * state
                    coefficients[0] *= share[i]
            total = 0.0
            for s in range(k):
                total += coefficients[s] * weights[s]
            table[pattern, j] = value * (((pattern >> j) & 1) - share[j]) * total
    return table


@numba.njit(cache=True, inline="always")
def _goes_left(x, threshold, default_left, missing, words, first_word, category_words):
    """LightGBM's decision: tree.h, NumericalDecision and CategoricalDecision."""
    if words > 0:
        if np.isnan(x) or x < 0:
            return False
        code = np.int64(x)
        word = code // 32
        if word >= words:
            return False
        return (np.int64(category_words[first_word + word]) >> (code % 32)) & 1 == 1
    if np.isnan(x) and missing != 2:
        x = 0.0
    if (missing == 2 and np.isnan(x)) or (missing == 1 and abs(x) <= ZERO):
        return default_left == 1
    return x <= threshold


@numba.njit(cache=True, parallel=True)
def _contributions(X, roots, nodes, thresholds, category_words, leaves, leaf_features, table, out, block):
    rows = X.shape[0]
    widest = 0
    for t in range(len(roots) - 1):
        widest = max(widest, roots[t + 1] - roots[t])
    for b in numba.prange((rows + block - 1) // block):
        low = b * block
        n = min(rows, low + block) - low
        patterns = np.empty((widest, block), np.int64)
        left = np.empty((widest, block), np.bool_)
        for t in range(len(roots) - 1):
            start = roots[t]
            for i in range(start, roots[t + 1]):
                here = i - start
                parent, position, feature = nodes[i, 0], nodes[i, 2], nodes[i, 3]
                is_left, leaf = nodes[i, 1] == 1, nodes[i, 8]
                if parent < 0:
                    for r in range(n):
                        patterns[here, r] = -1  # every feature goes the leaf's way, until one does not
                else:
                    cleared = ~(np.int64(1) << np.int64(position))
                    for r in range(n):
                        bits = patterns[parent, r]
                        patterns[here, r] = bits if left[parent, r] == is_left else bits & cleared
                if leaf < 0:
                    threshold, default, missing = thresholds[i], nodes[i, 4], nodes[i, 5]
                    first_word, words = nodes[i, 6], nodes[i, 7]
                    for r in range(n):
                        x = X[low + r, feature]
                        left[here, r] = _goes_left(x, threshold, default, missing, words, first_word, category_words)
                    continue
                k, first = leaves[leaf, 1], leaves[leaf, 2]
                mask = (np.int64(1) << k) - 1
                for r in range(n):
                    line = leaves[leaf, 0] + (patterns[here, r] & mask) * k
                    for j in range(k):
                        out[low + r, leaf_features[first + j]] += table[line + j]
