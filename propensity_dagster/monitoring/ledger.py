"""The maturity ledger: of every delivered snapshot and model version, what was promised and what came true.

A row begins when a snapshot is scored, with what its probabilities promise, and is completed when its outcome window is
over. Late events re-open it: the count before stays in `revisions`. Belongs here: the rows, and what a row of them in a
row says of the model. Does not: what to do about it.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.ingest import newest_event_day
from propensity_dagster.data.lake import Home, publish_table, publish_text, read_rows
from propensity_dagster.errors import InsufficientDataError
from propensity_dagster.evaluation.value import break_even
from propensity_dagster.features.build import is_mature
from propensity_dagster.monitoring.outcomes import (
    OUTCOMES,
    OutcomeCounts,
    lacks_outcomes,
    outcomes_by_version,
    publish_outcomes,
    read_counts,
    realised_performance,
)
from propensity_dagster.monitoring.promised import promised_performance
from propensity_dagster.registry.store import ModelStore
from propensity_dagster.scoring.batch import SCORES, delivered_scores, stamp_of, version_of
from propensity_dagster.scoring.promotion import version_model

logger = logging.getLogger(__name__)

LEDGER = "ledger"
WAITING, MATURE, HINDSIGHT = "waiting", "mature", "hindsight"
LEVEL, SPREAD, RANKING = "level", "spread", "ranking"
"""What can be wrong: too many or too few convert; high and low forecasts are too far apart or too near; the order."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_REOPEN_DAYS = 30  # after its window a snapshot is counted again every night, so long as late events may come
_Z95, _SIGMAS = 1.96, 3.0  # three deviations: snapshots share their customers, so that chance comes in rows, too
_PROMISED = ("conversions", "log_loss", "auc", "top_decile_lift")
_REALISED = (
    "log_loss", "auc", "top_decile_lift", "calibration_error", "calibration_intercept", "calibration_slope", "brier",
)  # fmt: skip


def _interval_fields(prefix: str, names: Sequence[str]) -> list[tuple[str, pa.DataType]]:
    return [(f"{prefix}_{name}{part}", pa.float64()) for name in names for part in ("", "_low", "_high")]


SCHEMA = pa.schema(
    [
        ("snapshot", pa.date32()),
        ("model_version", pa.string()),
        ("scored_at", pa.timestamp("us")),
        ("rows", pa.int64()),
        ("matures_on", pa.date32()),
        ("state", pa.string()),
        ("known", pa.int64()),
        ("converted", pa.int64()),
        ("revisions", pa.list_(pa.int64())),
        ("problems", pa.list_(pa.string())),
        *[(f"p{round(100 * q):02d}", pa.float64()) for q in QUANTILES],
        *_interval_fields("promised", _PROMISED),
        *_interval_fields("realised", _REALISED),
    ]
)


@dataclass(frozen=True)
class LedgerReport:
    """What was published.

    Attributes:
        rows: of the ledger, oldest snapshot first.
        counted: snapshots whose outcomes were counted now.
        reopened: snapshots whose conversions changed, with the count before.
        unknowable: why outcomes can never be known, or None.
    """

    rows: tuple[dict[str, Any], ...]
    counted: tuple[date, ...]
    reopened: dict[date, int]
    unknowable: str | None


def publish_ledger(campaign: Campaign, home: Home, store: ModelStore, engine: Engine) -> LedgerReport:
    """Count the outcomes that are due, and publish the `ledger` of all snapshots that were scored."""
    unknowable = lacks_outcomes(campaign)
    scored = scored_snapshots(campaign, home)
    counted, reopened = ([], {}) if unknowable else _count_due(campaign, scored, home, engine)
    known = {(r["snapshot"], r["model_version"], r["scored_at"]): r for r in read_ledger(campaign, home)}
    learnt: dict[str, date | None] = {}
    rows: list[dict[str, Any]] = []
    for snapshot in scored:
        outcomes = home.lake(campaign.name).partition(OUTCOMES, "snapshot", snapshot)
        counts = read_counts(outcomes)
        for version, file in delivered_scores(campaign, snapshot, home).items():
            _, at = stamp_of(file) or ("", None)
            row = known.get((snapshot, version, at)) or _promise(campaign, snapshot, version, at, file)
            if version in counts.known and not _is_told(row, version, counts):
                if version not in learnt:
                    learnt[version] = learnt_until(campaign, store, version)
                own = outcomes_by_version(pq.read_table(outcomes))[version]
                row = _complete(campaign, row, learnt[version], own, counts.revisions, home)
            rows.append(row)
    publish_table(pa.Table.from_pylist(rows, schema=SCHEMA), home.lake(campaign.name).file(LEDGER))
    return LedgerReport(tuple(rows), tuple(counted), reopened, unknowable)


def read_ledger(campaign: Campaign, home: Home) -> list[dict[str, Any]]:
    """Rows of the ledger, oldest snapshot first; none before there is one."""
    return read_rows(home.lake(campaign.name).file(LEDGER))


def scored_snapshots(campaign: Campaign, home: Home) -> list[date]:
    """Snapshots for which anybody was scored, oldest first."""
    lake = home.lake(campaign.name)
    days = lake.partitions(SCORES, "snapshot")
    files = lake.existing_partitions(SCORES, "snapshot", days)
    return [day for day, file in zip(days, files, strict=True) if version_of(file) is not None]


def judged_rows(rows: Sequence[dict[str, Any]], version: str) -> list[dict[str, Any]]:
    """Rows that say something of a version: mature, and not scored in hindsight."""
    return [row for row in rows if row["model_version"] == version and row["state"] == MATURE]


def reopened_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose conversions late events changed, of snapshots that are still counted every night."""
    newest = rows[-1]["snapshot"] if rows else date.min
    return [
        row
        for row in rows
        if len(row["revisions"]) > 1 and (row["matures_on"] or row["snapshot"]) + timedelta(days=_REOPEN_DAYS) >= newest
    ]


def persistent_problems(campaign: Campaign, rows: Sequence[dict[str, Any]], version: str) -> list[str]:
    """Problems that each of the newest judged snapshots of a version has: concept drift, not a bad week."""
    newest = judged_rows(rows, version)[-campaign.monitoring.persist :]
    if len(newest) < campaign.monitoring.persist:
        return []
    return [p for p in (RANKING, LEVEL, SPREAD) if all(p in row["problems"] for row in newest)]


def learnt_until(campaign: Campaign, store: ModelStore, version: str) -> date | None:
    """The day up to which a version knew outcomes: scores of earlier snapshots would be hindsight. None: unknown."""
    facts = version_model(campaign, store, version).facts
    snapshots = facts.get("snapshots", {})
    if isinstance(campaign, EventCampaign):
        newest = [snapshots[split][-1] for split in ("train", "validate") if snapshots.get(split)]
        stated = facts.get("recalibrated_on", [])[-1:]
        days = [date.fromisoformat(day) + timedelta(days=campaign.outcome_end_days) for day in [*newest, *stated]]
        return max(days, default=None)
    words = str(snapshots.get("train", [""])[-1])
    _, found, instant = words.partition("before ")
    return date.fromisoformat(instant[:10]) if found else None


def _is_told(row: dict[str, Any], version: str, counts: OutcomeCounts) -> bool:
    """Whether a row says already what came true."""
    return row["state"] != WAITING and row["known"] == counts.known[version] and row["revisions"] == counts.revisions


def _count_due(
    campaign: Campaign, scored: Sequence[date], home: Home, engine: Engine
) -> tuple[list[date], dict[date, int]]:
    lake = home.lake(campaign.name)
    counted: list[date] = []
    reopened: dict[date, int] = {}
    newest = newest_event_day(campaign, home) if isinstance(campaign, EventCampaign) else None
    for snapshot in scored:
        if isinstance(campaign, EventCampaign) and newest and not is_mature(campaign, newest, as_of=snapshot):
            continue
        known = read_counts(lake.partition(OUTCOMES, "snapshot", snapshot)).known
        if known and _is_closed(campaign, snapshot, known, newest, home):
            continue
        try:
            report = publish_outcomes(campaign, snapshot, home, engine)
        except InsufficientDataError as error:
            logger.info("ledger: %s", error)
            continue
        counted.append(snapshot)
        if report.reopened_from is not None:
            reopened[snapshot] = report.reopened_from
    return counted, reopened


def _is_closed(campaign: Campaign, snapshot: date, known: dict[str, int], newest: date | None, home: Home) -> bool:
    """Whether a snapshot is too old for late events, and every version that scored it has been counted."""
    if set(known) != set(delivered_scores(campaign, snapshot, home)):
        return False
    if not isinstance(campaign, EventCampaign) or newest is None:
        return True
    end = snapshot + timedelta(days=campaign.outcome_end_days + campaign.source.late_days + _REOPEN_DAYS)
    return end < newest


def _promise(campaign: Campaign, snapshot: date, version: str, scored_at: Any, file: Any) -> dict[str, Any]:
    p = pq.read_table(file, columns=["probability"])["probability"].to_numpy()
    promised = promised_performance(p, break_even(campaign.value), campaign.seed)
    matures = snapshot + timedelta(days=campaign.outcome_end_days) if isinstance(campaign, EventCampaign) else None
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row |= {
        "snapshot": snapshot,
        "model_version": version,
        "scored_at": scored_at,
        "rows": len(p),
        "matures_on": matures,
        "state": WAITING,
        "revisions": [],
        "problems": [],
    }
    row |= {f"p{round(100 * q):02d}": float(v) for q, v in zip(QUANTILES, np.quantile(p, QUANTILES), strict=True)}
    for name in _PROMISED:
        row |= _flat(f"promised_{name}", promised[name].to_json())
    return row


def _complete(
    campaign: Campaign, row: dict[str, Any], learnt: date | None, table: pa.Table, revisions: list[int], home: Home
) -> dict[str, Any]:
    """The row with what came true."""
    realised = realised_performance(campaign, row["snapshot"], table, break_even(campaign.value), home)
    expected = float(table["probability"].to_numpy().sum())
    file = home.reports(campaign.name) / OUTCOMES / f"{row['snapshot']}_version_{row['model_version']}.json"
    publish_text(json.dumps({**realised, "expected": expected}, indent=1), file)
    hindsight = learnt is not None and row["snapshot"] < learnt
    row = {**row, "state": HINDSIGHT if hindsight else MATURE, "known": table.num_rows, "revisions": revisions}
    row["converted"] = realised["converted"]
    for name in _REALISED:
        row |= _flat(f"realised_{name}", realised["metrics"][name])
    return {**row, "problems": _problems(campaign, row)}


def _problems(campaign: Campaign, row: dict[str, Any]) -> list[str]:
    """What left its promise, beyond chance and beyond what the campaign allows."""
    limits, found = campaign.monitoring, []
    share = row["known"] / row["rows"]
    promised = row["promised_conversions"]
    deviation = (row["promised_conversions_high"] - row["promised_conversions_low"]) / (2 * _Z95)
    ratio = (row["converted"] + 0.5) / (promised * share + 0.5)
    beyond = abs(row["converted"] - promised * share) > _SIGMAS * deviation * np.sqrt(share)
    if beyond and max(ratio, 1 / ratio) > 1 + limits.max_gap:
        found.append(LEVEL)
    slope_low, slope_high = campaign.gate.slope
    low, high = row["realised_calibration_slope_low"], row["realised_calibration_slope_high"]
    if low is not None and (high < slope_low or low > slope_high):
        found.append(SPREAD)
    auc, expected, high = row["realised_auc"], row["promised_auc"], row["realised_auc_high"]
    known = None not in (auc, expected, high)
    if known and expected - auc > limits.max_auc_loss and high < row["promised_auc_low"]:
        found.append(RANKING)
    return found


def _flat(name: str, found: dict[str, float | None]) -> dict[str, float | None]:
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
