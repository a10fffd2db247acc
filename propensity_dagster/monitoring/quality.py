"""Data quality over time: is a day's data like the same weekday's before?

Bounds are learnt from history: the median of the last eight same weekdays, four robust deviations either way (median
absolute deviation, Hampel 1974; never less than counting noise). Every count is a file's row count, read from its
footer: nothing is computed again. Belongs here: rows of data. Does not: what they say, which is drift's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.data.decisions import NEW_ROWS
from propensity_dagster.data.lake import Home, Lake, publish_table, read_rows
from propensity_dagster.errors import DataContractError

QUALITY = "quality"
ROWS, QUARANTINED, DUPLICATES, SILENCE = "rows", "quarantined share", "duplicate share", "days without events"
SCHEMA = pa.schema(
    [
        ("snapshot", pa.date32()),
        ("table", pa.string()),
        ("day", pa.date32()),
        ("measure", pa.string()),
        ("value", pa.float64()),
        ("usual", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("history", pa.int64()),
        ("severity", pa.string()),
    ]
)

_WEEKS, _MIN_WEEKS = 8, 3
_SHARE_DAYS, _SILENCE_DAYS = 28, 90
_DEVIATIONS = 4.0
_MAD_TO_SIGMA = 1.4826
_WEEKLY_NOISE = 0.05  # of the median: same weekdays differ that much for no reason worth a name
_SHARE_SLACK, _SHARE_ALERT = 0.01, 0.10


@dataclass(frozen=True)
class QualityReport:
    """What was published: how many measures, and those that left their bounds."""

    measures: int
    findings: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class _Table:
    """A table whose partitions are counted, and the names its stages have in the lake."""

    name: str
    column: str
    raw: str
    good: str
    bad: str


def publish_quality(campaign: Campaign, snapshot: date, home: Home) -> QualityReport:
    """Judge the newest day that a snapshot saw, of every event log, against the days before; publish `quality`.

    Of a table of decisions the rows that were scored are judged.

    Raises:
        DataContractError: when that day has not been ingested.
    """
    lake = home.lake(campaign.name)
    if isinstance(campaign, EventCampaign):
        day = snapshot - timedelta(days=1 + campaign.source.late_days)
        streams = campaign.source.streams
        tables = [_Table(n, "day", f"raw_{n}", f"validated_{n}", f"quarantine_{n}") for n in streams]
    else:
        day = snapshot
        tables = [_Table(NEW_ROWS, "snapshot", f"raw_{NEW_ROWS}", "features", f"quarantine_{NEW_ROWS}")]
    rows: list[dict[str, Any]] = []
    for table in tables:
        rows += _judge(campaign, lake, snapshot, day, table)
    publish_table(pa.Table.from_pylist(rows, schema=SCHEMA), lake.partition(QUALITY, "snapshot", snapshot))
    return QualityReport(len(rows), tuple(row for row in rows if row["severity"] != "none"))


def read_quality(campaign: Campaign, snapshot: date, home: Home) -> list[dict[str, Any]]:
    """Rows of the `quality` of a snapshot; none before it was judged."""
    return read_rows(home.lake(campaign.name).partition(QUALITY, "snapshot", snapshot))


def _judge(campaign: Campaign, lake: Lake, snapshot: date, day: date, table: _Table) -> list[dict[str, Any]]:
    counts = _counts(lake, table, _history(lake, table, day))
    if day not in counts:
        raise DataContractError(
            f"{campaign.name}: {table.raw} {table.column}={day} has not been ingested: nothing can be said of it"
        )
    floor = campaign.monitoring.min_rows.get(table.name, 0)
    now, before = counts[day], {d: c for d, c in counts.items() if d < day}
    judged = [_rows(now, day, before, floor), _share(QUARANTINED, 1, now, before), _share(DUPLICATES, 2, now, before)]
    if isinstance(campaign, EventCampaign):
        judged.append(_silence(counts, day))
    return [{"snapshot": snapshot, "table": table.name, "day": day, **found} for found in judged]


def _history(lake: Lake, table: _Table, day: date) -> list[date]:
    """The day itself and the days before that anything is learnt from."""
    first = day - timedelta(days=_SILENCE_DAYS)
    return [d for d in lake.partitions(table.raw, table.column) if first <= d <= day]


def _counts(lake: Lake, table: _Table, days: Sequence[date]) -> dict[date, tuple[int, int, int]]:
    """Of each day the rows read, quarantined, and dropped as duplicates."""
    read, good, bad = (_rows_by_day(lake, name, table.column, days) for name in (table.raw, table.good, table.bad))
    return {d: (read[d], bad[d], max(read[d] - good[d] - bad[d], 0)) for d in days}


def _rows_by_day(lake: Lake, table: str, column: str, days: Sequence[date]) -> dict[date, int]:
    files = lake.existing_partitions(table, column, days)
    rows = {date.fromisoformat(file.parent.name.partition("=")[2]): pq.read_metadata(file).num_rows for file in files}
    return dict.fromkeys(days, 0) | rows


def _rows(now: tuple[int, int, int], day: date, before: dict[date, tuple[int, int, int]], floor: int) -> dict[str, Any]:
    weeks = [day - timedelta(weeks=k) for k in range(1, _WEEKS + 1)]
    same = np.array([before[d][0] for d in weeks if d in before], dtype=np.float64)
    value = float(now[0])
    found = {"measure": ROWS, "value": value, "history": len(same)}
    if len(same) < _MIN_WEEKS:
        severity = "alert" if value < floor else "none"
        return {**found, "usual": None, "low": float(floor), "high": None, "severity": severity}
    usual = float(np.median(same))
    deviation = _MAD_TO_SIGMA * float(np.median(np.abs(same - usual)))
    spread = _DEVIATIONS * max(deviation, np.sqrt(usual), _WEEKLY_NOISE * usual)
    low, high = max(usual - spread, 0.0), usual + spread
    severity = "none" if low <= value <= high else "alert" if value < low / 2 or value > 2 * high else "warn"
    if value < floor:
        severity = "alert"
    return {**found, "usual": usual, "low": max(low, float(floor)), "high": high, "severity": severity}


def _share(
    measure: str, place: int, now: tuple[int, int, int], before: dict[date, tuple[int, int, int]]
) -> dict[str, Any]:
    newest = sorted(before)[-_SHARE_DAYS:]
    read = sum(before[d][0] for d in newest)
    found = {"measure": measure, "history": len(newest), "low": 0.0}
    if not now[0] or not read:
        return {**found, "value": None, "usual": None, "high": None, "severity": "none"}
    value, usual = now[place] / now[0], sum(before[d][place] for d in newest) / read
    noise = _DEVIATIONS * float(np.sqrt(max(usual * (1 - usual), 1 / read) / now[0]))
    high = usual + noise + _SHARE_SLACK
    severity = "none" if value <= high else "alert" if value > high + _SHARE_ALERT else "warn"
    return {**found, "value": value, "usual": usual, "high": high, "severity": severity}


def _silence(counts: dict[date, tuple[int, int, int]], day: date) -> dict[str, Any]:
    """Days since the newest one with events, against the longest silence before."""
    days = sorted(counts)
    heard = [d for d in days if counts[d][0] - counts[d][1] > 0]
    found: dict[str, Any] = {"measure": SILENCE, "history": len(days) - 1, "low": 0.0}
    if not heard:
        return {**found, "value": float(len(days)), "usual": None, "high": None, "severity": "none"}
    now = float((day - heard[-1]).days)
    longest = float(max((b - a).days - 1 for a, b in _pairs(heard))) if len(heard) > 1 else 0.0
    high = longest + 1
    severity = "none" if now <= high else "alert" if now > 2 * high else "warn"
    return {**found, "value": now, "usual": longest, "high": high, "severity": severity}


def _pairs(days: Sequence[date]) -> list[tuple[date, date]]:
    return list(pairwise(days))
