"""What became of those who were scored: the outcomes of delivered scores, and how right the scores were.

Scores are joined as they were delivered; nothing is scored again. A version that a later one replaced keeps its own
outcomes. Belongs here: one snapshot. Does not: the sequence of snapshots, which is the ledger's.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import logit

from propensity_dagster.campaign import Campaign, EventCampaign, TableCampaign
from propensity_dagster.data.days import days_between, pc
from propensity_dagster.data.decisions import DECIDED_AT, DECISIONS
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.errors import InsufficientDataError
from propensity_dagster.evaluation.bootstrap import Floats, estimate, replicate_metrics
from propensity_dagster.evaluation.metrics import METRICS, Judged, bin_rates, mean_probability
from propensity_dagster.features.activity import ACTIVITY
from propensity_dagster.features.build import build_labels, newest_mature
from propensity_dagster.scoring.batch import delivered_scores

logger = logging.getLogger(__name__)

OUTCOMES = "outcomes"
_COUNTS = "counts"

_REPLICATES = 100
_MIN_SEGMENT_ROWS = 30
_KNOWN_SHARE = 0.9  # of the rows a table of decisions must know before a snapshot counts as mature
_SEGMENT_METRICS = {name: METRICS[name] for name in ("log_loss", "auc", "calibration_intercept", "top_decile_lift")}


@dataclass(frozen=True)
class OutcomeCounts:
    """Conversions each time they were counted and had changed, the first count first; known outcomes by version."""

    revisions: list[int]
    known: dict[str, int]


@dataclass(frozen=True)
class OutcomesReport:
    """What was published: rows whose outcome is known, those that converted, and the count before if it changed."""

    rows: int
    converted: int
    reopened_from: int | None


def lacks_outcomes(campaign: Campaign) -> str | None:
    """Why a campaign can never tell what became of its scores; None if it can."""
    if isinstance(campaign, TableCampaign) and (campaign.source.key is None or campaign.source.order in (None, "file")):
        return (
            f"{campaign.file}: what became of scored rows cannot be told: the table of decisions needs a 'key', and a "
            "column of times as 'order', to find them again"
        )
    return None


def publish_outcomes(campaign: Campaign, snapshot: date, home: Home, engine: Engine) -> OutcomesReport:
    """Join the scores of a snapshot, of every version that scored it, with what happened; publish `outcomes`.

    Raises:
        InsufficientDataError: when the snapshot is not mature: its outcomes do not exist, they are not 0.
    """
    lake = home.lake(campaign.name)
    delivered = delivered_scores(campaign, snapshot, home)
    tables = [_joined(campaign, snapshot, version, file, home, engine) for version, file in delivered.items()]
    rows = tables[-1].num_rows
    scored = pq.read_metadata(next(reversed(delivered.values()))).num_rows
    if rows < _KNOWN_SHARE * scored or not rows:
        raise InsufficientDataError(
            f"{campaign.name}: of the {scored:,} customers scored for {snapshot} the outcome of {rows:,} is known; "
            f"{_KNOWN_SHARE:.0%} are needed"
        )
    table = pa.concat_tables(tables)
    converted = _conversions(tables[-1])
    target = lake.partition(OUTCOMES, "snapshot", snapshot)
    before = read_counts(target).revisions
    revisions = before if before and before[-1] == converted else [*before, converted]
    known = {version: part.num_rows for version, part in zip(delivered, tables, strict=True)}
    counts = json.dumps({"revisions": revisions, "known": known})
    publish_table(table.replace_schema_metadata({_COUNTS: counts}), target)
    reopened = before[-1] if len(revisions) > 1 and len(revisions) > len(before) else None
    if reopened is not None:
        logger.warning("outcomes %s: late events: %d conversions, %d before", snapshot, converted, reopened)
    return OutcomesReport(rows, converted, reopened)


def read_counts(file: Path) -> OutcomeCounts:
    """What was counted of a snapshot, from the file's footer; nothing before it was."""
    metadata = (pq.read_schema(file).metadata or {}) if file.exists() else {}
    stated = json.loads(metadata.get(_COUNTS.encode(), b"{}"))
    return OutcomeCounts(stated.get("revisions", []), stated.get("known", {}))


def realised_performance(
    campaign: Campaign, snapshot: date, outcomes: pa.Table, threshold: float, home: Home
) -> dict[str, Any]:
    """Metrics, with 95% intervals, of one version's delivered scores: overall, by calibration bin, and by segment.

    Args:
        campaign: gives segments and seed.
        snapshot: of the scores.
        outcomes: rows of `outcomes` (n) of one model version.
        threshold: probability from which a row is contacted, for the confusion matrix.
        home: where the snapshot's features, and with them the segments, are.

    Returns:
        Plain data: `rows`, `converted`, `metrics`, `confusion`, `calibration`, `segments`.
    """
    p, y = outcomes["probability"].to_numpy(), outcomes["converted"].cast("float64").to_numpy()
    judged = Judged(logit(np.clip(p, 1e-12, 1 - 1e-12)), y)
    rows = np.arange(len(y))
    found = replicate_metrics({"": judged}, rows, _REPLICATES, campaign.seed, {**METRICS, "bins": bin_rates})[""]
    above = p >= threshold
    return {
        "rows": len(y),
        "converted": int(y.sum()),
        "metrics": {name: estimate(found[name]).to_json() for name in METRICS},
        "confusion": {
            "true_positives": int((above & (y > 0)).sum()),
            "false_positives": int((above & (y == 0)).sum()),
            "false_negatives": int((~above & (y > 0)).sum()),
            "true_negatives": int((~above & (y == 0)).sum()),
        },
        "calibration": _calibration(judged, found["bins"]),
        "segments": _segments(campaign, snapshot, outcomes, judged, home),
    }


def _calibration(judged: Judged, rates: Floats) -> list[dict[str, Any]]:
    """Forecast and rate of each of the bins of equal size."""
    member, forecasts, _ = np.split(judged.bin_columns.sum(axis=0), 3)
    return [
        {"rows": int(n), "forecast": float(forecasts[i] / n), "rate": estimate(rates[:, i]).to_json()}
        for i, n in enumerate(member)
        if n
    ]


def _segments(
    campaign: Campaign, snapshot: date, outcomes: pa.Table, judged: Judged, home: Home
) -> dict[str, dict[str, Any]]:
    """Metrics within each segment value whose rows are enough to say anything."""
    features = home.lake(campaign.name).partition("features", "snapshot", snapshot)
    if not features.exists():
        return {}
    names = pq.read_schema(features).names
    columns = [name for name in campaign.all_segments if name in names]
    table = pq.read_table(features, columns=[campaign.key, *columns])
    place = dict(zip(table[campaign.key].to_pylist(), range(table.num_rows), strict=True))
    at = pa.array([place.get(key) for key in outcomes[campaign.key].to_pylist()], pa.int64())
    found: dict[str, dict[str, Any]] = {}
    for column in columns:
        values = np.asarray(table[column].cast("string").take(at).fill_null("(missing)").to_pylist(), dtype=object)
        for value in sorted(set(values.tolist())):
            rows = np.flatnonzero(values == value)
            if len(rows) < _MIN_SEGMENT_ROWS:
                continue
            within = Judged(judged.z[rows], judged.y[rows])
            metrics = {**_SEGMENT_METRICS, "expected": mean_probability}
            drawn = replicate_metrics({"": within}, np.arange(len(rows)), _REPLICATES, campaign.seed, metrics)[""]
            found[f"{column}={value}"] = {
                "rows": len(rows),
                "converted": int(within.y.sum()),
                **{name: estimate(values).to_json() for name, values in drawn.items()},
            }
    return found


def _joined(campaign: Campaign, snapshot: date, version: str, scores: Path, home: Home, engine: Engine) -> pa.Table:
    """Delivered scores whose outcome is known, sorted by key."""
    table = engine.read(scores)
    if isinstance(campaign, EventCampaign):
        outcomes = _of_events(campaign, snapshot, table, home, engine)
    else:
        outcomes = _of_decisions(campaign, snapshot, home, engine)
    joined = table.inner_join(outcomes, campaign.key)
    wanted = joined.select(campaign.key, "probability", "percentile", "converted", model_version=ibis.literal(version))
    return engine.arrow(wanted.order_by(campaign.key))


def _of_events(campaign: EventCampaign, snapshot: date, scores: ibis.Table, home: Home, engine: Engine) -> ibis.Table:
    newest = newest_mature(campaign, home)
    if snapshot > newest:
        raise InsufficientDataError(
            f"{campaign.name}: outcomes of snapshot {snapshot} do not exist yet: its window of "
            f"{campaign.outcome_end_days} days is not over; the newest mature snapshot is {newest}"
        )
    first = snapshot + timedelta(days=campaign.outcome.gap_days)
    days = days_between(first, snapshot + timedelta(days=campaign.outcome_end_days - 1))
    activity = engine.read(home.lake(campaign.name).existing_days(ACTIVITY, days))
    return build_labels(campaign, activity, scores, as_of=snapshot).select(campaign.key, "converted")


def _of_decisions(campaign: Campaign, snapshot: date, home: Home, engine: Engine) -> ibis.Table:
    """The first decision about each customer from the snapshot on."""
    reason = lacks_outcomes(campaign)
    if reason:
        raise InsufficientDataError(reason)
    decisions = engine.read(home.lake(campaign.name).existing(f"validated_{DECISIONS}"))
    after = decisions.filter(decisions[DECIDED_AT].date() >= ibis.literal(snapshot))
    return after.group_by(campaign.key).aggregate(converted=after.converted.argmin(after[DECIDED_AT]))


def _conversions(table: pa.Table) -> int:
    return int(table["converted"].cast("int64").to_numpy().sum())


def outcomes_by_version(outcomes: pa.Table) -> Mapping[str, pa.Table]:
    """Rows of `outcomes` of each model version, in the order in which they scored."""
    versions = outcomes["model_version"]
    return {v: outcomes.filter(pc.equal(versions, v)) for v in versions.unique().to_pylist()}
