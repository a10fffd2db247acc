"""Drift of a snapshot: its features and scores against the rows the model learnt from, and against the snapshot before.

Counting is done where the data are: one row of totals per table comes back, never the population.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.coerce import float_literal
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home, publish_table, read_rows
from propensity_dagster.errors import DataContractError
from propensity_dagster.explain.population import sample_file
from propensity_dagster.explain.summary import read_importance
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.dataset import CATEGORY
from propensity_dagster.models.population import Counts
from propensity_dagster.monitoring.domain import read_reference, tell_apart
from propensity_dagster.monitoring.stability import judge_stability
from propensity_dagster.scoring.batch import SCORES, version_of

logger = logging.getLogger(__name__)

DRIFT, SCORE, TOGETHER, TRAINING, PREVIOUS = "drift", "(score)", "(together)", "training", "previous"
DISTRIBUTION, MISSING, UNSEEN, OUT_OF_RANGE, DOMAIN = "distribution", "missing", "unseen", "out of range", "domain auc"
"""What is measured: of a column its stability index and shares of rows, of all together the domain classifier."""

_MAX_PACE = 4.0
_SLACK = 1.25  # the largest movement of a few training snapshots is not the largest there can be
_COUNTS = "counts"

SCHEMA = pa.schema(
    [
        ("snapshot", pa.date32()),
        ("against", pa.string()),
        ("column", pa.string()),
        ("measure", pa.string()),
        ("value", pa.float64()),
        ("usual", pa.float64()),
        ("p_value", pa.float64()),
        ("severity", pa.string()),
        ("detail", pa.string()),
        ("importance", pa.float64()),
        ("model_version", pa.string()),
    ]
)


@dataclass(frozen=True)
class DriftReport:
    """What was published: rows that were compared, and the columns that drifted, the gravest first.

    `domain_auc` is how well tonight's rows can be told from the model's; None where that was not tried.
    """

    rows: int
    compared_with: tuple[str, ...]
    score_index: float
    domain_auc: float | None
    drifted: tuple[str, ...]
    severity: str


@dataclass(frozen=True)
class _Counted:
    """Counts of each column's buckets, and rows outside the range of the training rows."""

    rows: int
    buckets: Mapping[str, Counts]
    outside: Mapping[str, int]

    def to_text(self, version: str) -> str:
        """Kept with the table: the next snapshot is compared with them."""
        buckets = {name: counts.tolist() for name, counts in self.buckets.items()}
        return json.dumps({"version": version, "rows": self.rows, "buckets": buckets, "outside": dict(self.outside)})


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
    reference = _Counted(population["rows"], trained, dict.fromkeys(now.outside, 0))
    expected = _expected(population, snapshot, model)
    rows = _compare(TRAINING, reference, population["independent"], now, model, expected)
    rows.append(_together(campaign, model, version, features, _pace(population, snapshot, model), home))
    before = _previous(campaign, snapshot, version, home)
    if before is not None:
        earlier = _kept_counts(lake.partition(DRIFT, "snapshot", before[0]), version)
        earlier = earlier or _count(before[1], before[2], model, population, engine)
        if earlier.rows:
            rows += _compare(PREVIOUS, earlier, earlier.rows, now, model, _expected_steps(population))
    importance = read_importance(campaign, version, home)
    same = {"snapshot": snapshot, "model_version": version}
    rows = [{**same, "importance": importance.get(row["column"]), **row} for row in rows]
    table = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata({_COUNTS: now.to_text(version)})
    publish_table(table, lake.partition(DRIFT, "snapshot", snapshot))
    return _report(rows, now.rows, before)


def read_drift(campaign: Campaign, snapshot: date, home: Home) -> list[dict[str, Any]]:
    """Rows of the `drift` of a snapshot; none before it was compared."""
    return read_rows(home.lake(campaign.name).partition(DRIFT, "snapshot", snapshot))


def _together(
    campaign: Campaign, model: FittedModel, version: str, features: Path, pace: float, home: Home
) -> dict[str, Any]:
    """The row of the domain classifier."""
    row = {"against": TRAINING, "column": TOGETHER, "measure": DOMAIN, "usual": 0.5, "severity": "none"}
    reference = read_reference(campaign, home, version)
    if reference is None:
        return {**row, "detail": f"not compared: version {version} was registered before its training rows were kept"}
    current = sample_file(features, [campaign.key, *model.contract.names])
    found = tell_apart(campaign, model, reference, current, pace)
    if found is None:
        return {**row, "detail": "not compared: fewer than 100 rows on one side, or every column moves by itself"}
    words = ", ".join(f"{name} {share:.0%}" for name, share in found.columns)
    row["usual"] = found.expected
    return {**row, "value": found.auc, "p_value": found.p_value, "severity": found.severity, "detail": words}


def _kept_counts(drift: Path, version: str) -> _Counted | None:
    """Counts of an earlier snapshot, in the buckets of the version that scored it."""
    kept = (pq.read_schema(drift).metadata or {}).get(_COUNTS.encode()) if drift.exists() else None
    stated = json.loads(kept) if kept else {}
    if stated.get("version") != version:
        return None
    buckets = {name: np.array(counts, dtype=np.int64) for name, counts in stated["buckets"].items()}
    return _Counted(stated["rows"], buckets, stated["outside"])


def _previous(campaign: Campaign, snapshot: date, version: str, home: Home) -> tuple[date, Path, Path] | None:
    """The newest earlier snapshot that the same version scored: another one's scores are no comparison."""
    lake = home.lake(campaign.name)
    for day in reversed([d for d in lake.partitions(SCORES, "snapshot") if d < snapshot]):
        features, scores = (lake.partition(table, "snapshot", day) for table in ("features", SCORES))
        if features.exists() and version_of(scores) == version:
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
    # No comparison holds for a null, nor one from below for a NaN, which every engine sorts last: asking each time
    # whether the value is there would double the work.
    totals = {f"present_{name}": (column.notnull() & ~column.isnan()).sum()}
    for k, edge in enumerate(known["edges"]):
        totals[f"upto_{name}_{k}"] = (column <= float_literal(edge)).sum()
    if known["lowest"] is not None:
        totals[f"below_{name}"] = (column < float_literal(known["lowest"])).sum()
        totals[f"inside_{name}"] = (column <= float_literal(known["highest"])).sum()
    return totals


def _number_counts(found: Mapping[str, Any], known: Mapping[str, Any], name: str, rows: int) -> tuple[Counts, int]:
    present = found[f"present_{name}"] or 0
    upto = [found[f"upto_{name}_{k}"] or 0 for k in range(len(known["edges"]))]
    counts = np.append(np.diff(upto, prepend=0, append=present), rows - present)
    below, inside = (found.get(f"{part}_{name}") for part in ("below", "inside"))
    outside = 0 if inside is None else (below or 0) + present - inside
    return counts.astype(np.int64), outside


def _category_counts(table: Any, spec: Any, present: int, rows: int, engine: Engine) -> Counts:
    """Known categories, missing, unseen. What is unseen is only counted: there may be a hundred thousand of them."""
    text = table.select(value=table[spec.name].cast("string"))
    grouped = text.filter(text.value.isin(list(spec.categories) or [""])).group_by("value").aggregate(n=ibis._.count())
    known = {row["value"]: row["n"] for row in engine.arrow(grouped).to_pylist()}
    counts = [known.get(category, 0) for category in spec.categories]
    return np.array([*counts, rows - present, present - sum(counts)], dtype=np.int64)


def _expected(population: Mapping[str, Any], snapshot: date, model: FittedModel) -> dict[tuple[str, str], float]:
    """How far each column would be from training by now if it went on as it did between the training snapshots.

    Those that come and go have gone as far before; those that move as time passes keep their pace: shares move in
    proportion to the days, the index, a squared distance, to their square.
    """
    pace = _pace(population, snapshot, model)
    if not pace:
        return {}
    found: dict[tuple[str, str], float] = {}
    for name, known in population["features"].items():
        moved = known["moved"]
        found[name, DISTRIBUTION] = _SLACK * max(moved["index"], moved["trend"] * pace**2)
        found[name, MISSING] = _SLACK * max(moved["missing"], moved["missing_trend"] * pace)
        found[name, OUT_OF_RANGE] = _SLACK * moved.get("outside_trend", 0.0) * pace
    return found


def _expected_steps(population: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """How far each column went from one training snapshot to the next."""
    found: dict[tuple[str, str], float] = {}
    for name, known in population["features"].items():
        moved = known.get("moved")
        if moved:
            found[name, DISTRIBUTION] = _SLACK * moved["step"]
            found[name, MISSING] = _SLACK * moved["missing_step"]
    return found


def _pace(population: Mapping[str, Any], snapshot: date, model: FittedModel) -> float:
    """Days from the middle of training to the snapshot, over the days training spans; at most four times that."""
    trained = model.facts.get("snapshots", {}).get("train")
    if not population.get("days") or not trained:
        return 0.0
    first, last = (date.fromisoformat(day) for day in (trained[0], trained[-1]))
    return min(((snapshot - first).days - (last - first).days / 2) / population["days"], _MAX_PACE)


def _compare(
    against: str,
    reference: _Counted,
    independent: float,
    now: _Counted,
    model: FittedModel,
    expected: Mapping[tuple[str, str], float],
) -> list[dict[str, Any]]:
    """Rows of the table: of each column its distribution, and shares of rows that are there at all."""
    kinds = {spec.name: spec for spec in model.contract.features}
    population = model.facts["population"]
    edges = {name: known.get("edges", ()) for name, known in population["features"].items()}
    edges[SCORE] = population["scores"]["edges"]
    counts: dict[tuple[str, str], tuple[Counts, Counts]] = {}
    for name, buckets in now.buckets.items():
        before = reference.buckets[name]
        counts[name, DISTRIBUTION] = (before, buckets)
        category = name in kinds and kinds[name].kind == CATEGORY
        places = {MISSING: -2, UNSEEN: -1} if category else {MISSING: -1}
        pairs = {measure: (before[at], buckets[at]) for measure, at in places.items()}
        if not category:
            pairs[OUT_OF_RANGE] = (reference.outside.get(name, 0), now.outside.get(name, 0))
        for measure, (a, b) in pairs.items():
            if a or b:
                counts[name, measure] = (_two(a, before.sum()), _two(b, buckets.sum()))
    shares = [key for key in counts if key[1] != DISTRIBUTION]
    rows: list[dict[str, Any]] = []
    for (name, measure), found in judge_stability(counts, independent, shares, expected).items():
        before, buckets = counts[name, measure]
        row = {"against": against, "column": name, "measure": measure, "p_value": found.p_value}
        row["severity"] = found.severity
        if measure == DISTRIBUTION:
            row |= {"value": found.index, "usual": max(found.by_chance, expected.get((name, measure), 0.0))}
            where = _bucket(kinds.get(name), edges[name], found.largest)
            old, new = (counted[found.largest] / max(counted.sum(), 1) for counted in (before, buckets))
            row["detail"] = f"{where}: {old:.1%} before, {new:.1%} now"
        else:
            row |= {"value": buckets[0] / max(buckets.sum(), 1), "usual": before[0] / max(before.sum(), 1)}
            row["detail"] = ""
        rows.append(row)
    return rows


def _two(count: int, total: int) -> Counts:
    return np.array([count, total - count], dtype=np.int64)


def _bucket(spec: Any, edges: Sequence[float], place: int) -> str:
    """The values in a bucket, in words. Scores, which have no spec, are kept as log-odds and shown as probabilities."""
    if spec is not None and spec.kind == CATEGORY:
        return [*spec.categories, "missing", "unseen"][place]
    if place > len(edges):
        return "missing"
    ends = [f"{edge:,.4g}" if spec is not None else f"{expit(edge):.2%}" for edge in edges]
    if place == 0:
        return f"up to {ends[0]}" if ends else "any value"
    return f"above {ends[-1]}" if place == len(ends) else f"above {ends[place - 1]} up to {ends[place]}"


def _report(rows: list[dict[str, Any]], count: int, before: tuple[date, Path, Path] | None) -> DriftReport:
    ranks = {"alert": 0, "warn": 1}
    found = [row for row in rows if row["severity"] != "none"]
    found.sort(key=lambda row: (ranks[row["severity"]], -row["value"]))
    score = next(row["value"] for row in rows if row["against"] == TRAINING and row["column"] == SCORE)
    domain = next(row.get("value") for row in rows if row["measure"] == DOMAIN)
    severity = found[0]["severity"] if found else "none"
    compared = (TRAINING, *([str(before[0])] if before else []))
    return DriftReport(count, compared, score, domain, tuple(drift_sentence(row) for row in found), severity)


def drift_sentence(row: Mapping[str, Any]) -> str:
    """One row of the table in words."""
    what, value, usual = row["column"], row["value"], row["usual"]
    if row["measure"] == DISTRIBUTION:
        return f"{what} against {row['against']}: {value:.2f} ({row['detail']})"
    if row["measure"] == DOMAIN:
        return f"all columns together against {row['against']}: AUC {value:.2f} ({row['detail']})"
    return f"{what} against {row['against']}: {value:.1%} {row['measure']}, {usual:.1%} before"
