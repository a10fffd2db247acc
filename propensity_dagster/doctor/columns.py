"""What the doctor asks of columns: profiles, and whether one gives the outcome away."""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.engine import Engine
from propensity_dagster.doctor.findings import ColumnProfile, Diagnosis
from propensity_dagster.models.dataset import MAX_CATEGORIES

_LEAK_AUC = 0.98
_MOSTLY = 0.95
_SAME_CODING_VALUES = 50
_CODE_VALUES = (3, 60)
_FOLDS = 5
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d+,\d+\s*")


def profile_columns(table: ibis.Table, kinds: Mapping[str, str], engine: Engine) -> list[ColumnProfile]:
    """Missing share, number of values and range of each column, in one pass."""
    if not kinds:
        return []
    parts: dict[str, Any] = {"rows": table.count()}
    for i, (name, kind) in enumerate(kinds.items()):
        column = table[name]
        parts[f"there_{i}"] = column.count()
        if kind == "number":  # how many different numbers is not worth a hash table
            parts |= {f"distinct_{i}": column.approx_nunique(), f"low_{i}": column.min(), f"high_{i}": column.max()}
    found = engine.arrow(table.aggregate(**parts)).to_pylist()[0]
    for i, (name, kind) in enumerate(kinds.items()):
        if kind != "number":
            groups = table.filter(table[name].notnull()).group_by(v=table[name]).aggregate(n=ibis._.count())
            found[f"distinct_{i}"] = engine.arrow(groups.aggregate(n=groups.count()))["n"][0].as_py()
            first = engine.arrow(groups.order_by([ibis.desc("n"), "v"]).limit(1))["v"]
            found[f"typical_{i}"] = first[0].as_py() if len(first) else ""
    rows = max(found["rows"], 1)

    def typical(i: int, kind: str) -> str:
        if kind != "number":
            return str(found[f"typical_{i}"])
        return f"{found[f'low_{i}']:g} to {found[f'high_{i}']:g}" if found[f"there_{i}"] else ""

    return [
        ColumnProfile(name, kind, 1 - found[f"there_{i}"] / rows, int(found[f"distinct_{i}"]), typical(i, kind))
        for i, (name, kind) in enumerate(kinds.items())
    ]


def judge_columns(diagnosis: Diagnosis, where: str, rows: int, columns: list[ColumnProfile]) -> None:
    """Findings on columns that carry nothing, or too much."""
    for column in columns:
        place = f"{where}.{column.name}"
        if column.missing == 1:
            diagnosis.add("P208", place, "every value is missing", "Exclude it, or check sentinels and types")
        elif column.distinct <= 1:
            diagnosis.add("P207", place, f"always {column.typical}", "Exclude it: it tells nobody apart")
        elif column.missing > _MOSTLY:
            diagnosis.add("P211", place, f"{column.missing:.1%} are missing", "Check what a missing value means here")
        if (
            column.kind == "category"
            and column.distinct > _MOSTLY * rows * (1 - column.missing)
            and column.distinct > 50
        ):
            diagnosis.add(
                "P210", place, f"{column.distinct:,} values in {rows:,} rows", "Exclude it: it is an identifier"
            )
        elif column.kind == "category" and column.distinct > MAX_CATEGORIES:
            message = (
                f"{column.distinct:,} values; the {MAX_CATEGORIES} most frequent are kept, others count as missing"
            )
            diagnosis.add("P209", place, message, "Group them with derive, or exclude it")


def judge_texts(diagnosis: Diagnosis, where: str, table: pa.Table, kinds: Mapping[str, str]) -> None:
    """Findings on columns that are mostly numbers, but not enough of them to be taken for numbers."""
    for name, kind in kinds.items():
        if kind != "category" or not pa.types.is_string(table[name].type):
            continue
        counts = Counter(value for value in table[name].to_pylist() if value is not None)
        total = sum(counts.values())
        others = Counter({value: n for value, n in counts.items() if not _NUMBER.fullmatch(value)})
        commas = sum(n for value, n in counts.items() if _DECIMAL_COMMA.fullmatch(value))
        if total and 2 * commas >= total:
            fix = f"Derive a number: {name}_number: CAST(replace(\"{name}\", ',', '.') AS DOUBLE), and exclude the text"
            diagnosis.add("P215", f"{where}.{name}", "they have decimal commas", fix)
        elif total and others and len(counts) > 20 and 2 * sum(others.values()) < total:
            (text, rows) = others.most_common(1)[0]
            fix = f"If that stands for a missing value, say missing: {{{name}: {text!r}}}"
            diagnosis.add("P215", f"{where}.{name}", f"{rows:,} of {total:,} are {text!r}", fix)


def judge_segments(diagnosis: Diagnosis, campaign: Campaign, kinds: Mapping[str, str]) -> None:
    """Findings on segments that are numbers: a model cannot be judged within each of their values."""
    for name in campaign.segments:
        if kinds.get(name) == "number":
            diagnosis.add(
                "P001", f"segments.{name}", "it is a number, which has no groups", "Call it a category, or leave it out"
            )


def judge_leaks(
    diagnosis: Diagnosis, where: str, table: pa.Table, kinds: Mapping[str, str], y: NDArray[np.float64]
) -> None:
    """Findings on columns that alone tell who converted.

    Args:
        diagnosis: where the findings go.
        where: name of the table.
        table: columns (n rows); text or numbers.
        kinds: "number" or "category" of each column to look at.
        y: outcomes (n,) of 0 and 1.
    """
    if not 0 < y.sum() < len(y):
        return
    fix = "Exclude it with the reason, or show that it was known before the decision"
    for name, kind in kinds.items():
        codes = _codes(table[name])
        if _is_recoding(codes, y):
            diagnosis.add("P302", f"{where}.{name}", "each of its values has one outcome only", fix)
            continue
        auc = _best_auc(table[name], codes, kind, y)
        if auc > _LEAK_AUC:
            diagnosis.add("P301", f"{where}.{name}", f"its AUC is {auc:.3f} by itself, {_LEAK_AUC} is suspicious", fix)


def auc_alone(column: pa.ChunkedArray, kind: str, y: NDArray[np.float64]) -> float:
    """How well a column ranks by itself, from 0.5 to 1; categories by the rates of held-out rows.

    Args:
        column: values (n,).
        kind: "number" or "category".
        y: outcomes (n,) of 0 and 1, both present.
    """
    return _best_auc(column, _codes(column), kind, y)


def is_code(column: ColumnProfile, table: pa.Table) -> bool:
    """Whether a column of whole numbers has the looks of codes: few values, from 0 or 1 without large gaps."""
    low, high = _CODE_VALUES
    if column.kind != "number" or not low < column.distinct <= high:
        return False
    values = np.unique(table[column.name].drop_null().to_numpy())
    name = column.name.lower()
    whole = bool(np.all(values == np.round(values)))
    named = any(name.endswith(end) for end in ("id", "code", "type", "region", "class", "browser", "system", "systems"))
    dense = len(values) >= 0.6 * (values[-1] - values[0] + 1)
    return whole and named and (dense or name.endswith(("code", "id")))


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """A code per value, missing included."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _is_recoding(codes: NDArray[np.int64], y: NDArray[np.float64]) -> bool:
    """Whether few values each belong to one outcome, without exception."""
    rows = np.bincount(codes)
    if not 1 < len(rows) <= _SAME_CODING_VALUES:
        return False
    converted = np.bincount(codes, weights=y, minlength=len(rows))
    return bool(np.all((converted == 0) | (converted == rows)))


def _best_auc(column: pa.ChunkedArray, codes: NDArray[np.int64], kind: str, y: NDArray[np.float64]) -> float:
    """AUC of the column alone, whichever way it points: by its order, by whether it is there, or by its groups."""
    found = [0.5]
    if kind == "number":
        values = column.cast("float64").to_numpy()
        there = ~np.isnan(values)
        found.append(_auc(there.astype(float), y))
        if there.sum() > 0.5 * len(values):
            found.append(_auc(np.where(there, values, np.nanmin(values) - 1), y))
    elif len(np.unique(codes)) <= len(y) // 20:
        found.append(_auc(_held_out_rates(codes, y), y))
    return max(max(auc, 1 - auc) for auc in found)


def _held_out_rates(codes: NDArray[np.int64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The outcome rate of each row's group among the other rows' folds: a group of one says nothing of itself."""
    fold = np.random.default_rng(0).integers(0, _FOLDS, len(y))
    size = int(codes.max()) + 1
    rates = np.empty(len(y))
    for k in range(_FOLDS):
        held = fold == k
        rows = np.bincount(codes[~held], minlength=size)
        converted = np.bincount(codes[~held], weights=y[~held], minlength=size)
        rates[held] = ((converted + y.mean()) / (rows + 1))[codes[held]]
    return rates


def _auc(values: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Area under the ROC curve by ranks (Hanley and McNeil 1982)."""
    from scipy.stats import rankdata

    ranks = rankdata(values)
    positives = y.sum()
    return float((ranks[y > 0].sum() - positives * (positives + 1) / 2) / (positives * (len(y) - positives)))
