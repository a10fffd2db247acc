"""Drift of a snapshot: its features and scores against the rows the model learnt from, and against the snapshot before.

Counting is done where the data are: one row of totals per table comes back, never the population.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.errors import DataContractError
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.dataset import CATEGORY
from propensity_dagster.monitoring.stability import Counts, Stability, judge_stability
from propensity_dagster.scoring.batch import SCORES

logger = logging.getLogger(__name__)

DRIFT, SCORE, TRAINING, PREVIOUS = "drift", "(score)", "training", "previous"
SCHEMA = pa.schema(
    [
        ("snapshot", pa.date32()),
        ("against", pa.string()),
        ("column", pa.string()),
        ("index", pa.float64()),
        ("by_chance", pa.float64()),
        ("p_value", pa.float64()),
        ("severity", pa.string()),
        ("largest_bucket", pa.string()),
        ("missing", pa.float64()),
        ("missing_before", pa.float64()),
        ("unseen", pa.float64()),
        ("out_of_range", pa.float64()),
        ("model_version", pa.string()),
    ]
)


@dataclass(frozen=True)
class DriftReport:
    """What was published: rows that were compared, and the columns that drifted, the gravest first."""

    rows: int
    compared_with: tuple[str, ...]
    score_index: float
    drifted: tuple[str, ...]
    severity: str


@dataclass(frozen=True)
class _Counted:
    """Counts of each column's buckets, and rows outside the range of the training rows."""

    rows: int
    buckets: Mapping[str, Counts]
    outside: Mapping[str, int]


def publish_drift(
    campaign: Campaign, snapshot: date, model: FittedModel, version: str, home: Home, engine: Engine
) -> DriftReport:
    """Compare one scored snapshot and publish its `drift`, replacing that partition alone.

    Args:
        campaign: the campaign.
        snapshot: which partition.
        model: the one that scored the snapshot.
        version: of that model.
        home: where the lake is.
        engine: counts.

    Raises:
        DataContractError: when the snapshot has no rows, or the model was saved before populations were kept.
    """
    population = model.facts.get("population")
    if population is None:
        raise DataContractError(
            f"{campaign.name}: version {version} does not know what its training rows looked like: it was trained "
            "before that was kept. Train again to see drift"
        )
    lake = home.lake(campaign.name)
    features = lake.existing_partition("features", "snapshot", snapshot)
    now = _count(features, lake.existing_partition(SCORES, "snapshot", snapshot), model, population, engine)
    if not now.rows:
        raise DataContractError(f"{campaign.name}: snapshot {snapshot} has no rows: nothing can be said of drift")
    trained = {name: np.array(f["counts"]) for name, f in population["features"].items()}
    trained[SCORE] = np.array(population["scores"]["counts"])
    rows = _compare(snapshot, TRAINING, trained, population["independent"], now, model, version)
    before = _previous(campaign, snapshot, version, home)
    if before is not None:
        earlier = _count(before[1], before[2], model, population, engine)
        if earlier.rows:
            rows += _compare(snapshot, PREVIOUS, earlier.buckets, earlier.rows, now, model, version)
    target = lake.partition(DRIFT, "snapshot", snapshot)
    publish_table(pa.Table.from_pylist(rows, schema=SCHEMA), target)
    return _report(rows, now.rows, before)


def scored_by(campaign: Campaign, snapshot: date, home: Home) -> str:
    """Version of the model that scored a snapshot.

    Raises:
        DataContractError: when it has not been scored, or has no rows.
    """
    file = pq.ParquetFile(home.lake(campaign.name).existing_partition(SCORES, "snapshot", snapshot))
    for batch in file.iter_batches(1, columns=["model_version"]):
        return batch.column(0)[0].as_py()
    raise DataContractError(f"{campaign.name}: snapshot {snapshot} has no scores: nothing can be said of drift")


def _previous(campaign: Campaign, snapshot: date, version: str, home: Home) -> tuple[date, Path, Path] | None:
    """The newest earlier snapshot that the same version scored: another one's scores are no comparison."""
    lake = home.lake(campaign.name)
    for day in reversed([d for d in lake.partitions(SCORES, "snapshot") if d < snapshot]):
        features, scores = (lake.partition(table, "snapshot", day) for table in ("features", SCORES))
        if features.exists() and pq.read_metadata(scores).num_rows and scored_by(campaign, day, home) == version:
            return day, features, scores
    return None


def _count(features: Path, scores: Path, model: FittedModel, population: Mapping[str, Any], engine: Engine) -> _Counted:
    """Rows in each bucket, by one aggregate over the features, one over the scores, and one per category."""
    table = engine.read(features)
    model.contract.require(table.columns)
    totals: dict[str, Any] = {"rows": table.count()}
    for i, spec in enumerate(model.contract.features):
        column, known = table[spec.name], population["features"][spec.name]
        if spec.kind == CATEGORY:
            totals[f"present_{i}"] = column.notnull().sum()
            continue
        totals |= _number_totals(column.cast("float64"), known, str(i))
    found = engine.arrow(table.aggregate(**totals)).to_pylist()[0]
    rows = found["rows"]
    buckets: dict[str, Counts] = {}
    outside: dict[str, int] = {}
    for i, spec in enumerate(model.contract.features):
        known = population["features"][spec.name]
        if spec.kind == CATEGORY:
            buckets[spec.name] = _category_counts(table, spec, found[f"present_{i}"] or 0, rows, engine)
        else:
            buckets[spec.name], outside[spec.name] = _number_counts(found, known, str(i), rows)
    scored = engine.read(scores)
    z = scored.probability.clip(1e-12, 1 - 1e-12)
    known = population["scores"]
    totals = {"rows": scored.count(), **_number_totals((z / (1 - z)).ln(), known, "z")}
    found = engine.arrow(scored.aggregate(**totals)).to_pylist()[0]
    buckets[SCORE], outside[SCORE] = _number_counts(found, known, "z", found["rows"])
    return _Counted(rows, buckets, outside)


def _number_totals(column: Any, known: Mapping[str, Any], name: str) -> dict[str, Any]:
    there = column.notnull() & ~column.isnan()
    totals = {f"present_{name}": there.sum()}
    for k, edge in enumerate(known["edges"]):
        totals[f"upto_{name}_{k}"] = (there & (column <= edge)).sum()
    if known["lowest"] is not None:
        totals[f"outside_{name}"] = (there & ((column < known["lowest"]) | (column > known["highest"]))).sum()
    return totals


def _number_counts(found: Mapping[str, Any], known: Mapping[str, Any], name: str, rows: int) -> tuple[Counts, int]:
    present = found[f"present_{name}"] or 0
    upto = [found[f"upto_{name}_{k}"] or 0 for k in range(len(known["edges"]))]
    counts = np.append(np.diff(upto, prepend=0, append=present), rows - present)
    return counts.astype(np.int64), found.get(f"outside_{name}") or 0


def _category_counts(table: Any, spec: Any, present: int, rows: int, engine: Engine) -> Counts:
    """Known categories, missing, unseen. What is unseen is only counted: there may be a hundred thousand of them."""
    text = table.select(value=table[spec.name].cast("string"))
    grouped = text.filter(text.value.isin(list(spec.categories) or [""])).group_by("value").aggregate(n=ibis._.count())
    known = {row["value"]: row["n"] for row in engine.arrow(grouped).to_pylist()}
    counts = [known.get(category, 0) for category in spec.categories]
    return np.array([*counts, rows - present, present - sum(counts)], dtype=np.int64)


def _compare(
    snapshot: date, against: str, reference: Mapping[str, Counts], independent: float, now: _Counted,
    model: FittedModel, version: str,
) -> list[dict[str, Any]]:  # fmt: skip
    kinds = {spec.name: spec for spec in model.contract.features}
    judged = judge_stability({name: (reference[name], now.buckets[name]) for name in reference}, independent)
    rows: list[dict[str, Any]] = []
    for name, found in judged.items():
        counts, before = now.buckets[name], reference[name]
        spec = kinds.get(name)
        category = spec is not None and spec.kind == CATEGORY
        at = -2 if category else -1
        rows.append(
            {
                "snapshot": snapshot,
                "against": against,
                "column": name,
                "index": found.index,
                "by_chance": found.by_chance,
                "p_value": found.p_value,
                "severity": found.severity,
                "largest_bucket": _bucket(spec, found, len(counts), category=category),
                "missing": counts[at] / now.rows,
                "missing_before": before[at] / max(before.sum(), 1),
                "unseen": counts[-1] / now.rows if category else 0.0,
                "out_of_range": now.outside.get(name, 0) / now.rows,
                "model_version": version,
            }
        )
    return rows


def _bucket(spec: Any, found: Stability, size: int, *, category: bool) -> str:
    """The bucket that moved most, in words."""
    place = found.largest
    if category:
        return [*spec.categories, "missing", "unseen"][place]
    return "missing" if place == size - 1 else f"tenth {place + 1} of {size - 1}"


def _report(rows: list[dict[str, Any]], count: int, before: tuple[date, Path, Path] | None) -> DriftReport:
    ranks = {"alert": 0, "warn": 1}
    found = [row for row in rows if row["severity"] != "none"]
    found.sort(key=lambda row: (ranks[row["severity"]], -row["index"]))
    score = next(row["index"] for row in rows if row["against"] == TRAINING and row["column"] == SCORE)
    words = tuple(f"{r['column']} against {r['against']}: {r['index']:.2f} ({r['largest_bucket']})" for r in found)
    severity = found[0]["severity"] if found else "none"
    return DriftReport(count, (TRAINING, *([str(before[0])] if before else [])), score, words, severity)
