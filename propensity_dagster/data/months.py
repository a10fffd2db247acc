"""The days of a table, copied month by month in the order of the key: for what reads years of them.

Features read every day there is and group by customer. From months they open a thirtieth of the files, and rows of one
customer lie together. The days stay the truth: a month's file says of which files it is a copy, with their sizes and
times of change, and is read only while those are what is there. Else it is made anew: after a day was ingested again,
a person erased, a home copied.
"""

import hashlib
import logging
from collections.abc import Sequence
from datetime import date, timedelta
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Lake, locked

logger = logging.getLogger(__name__)

MONTHS = "_months"
"""What the table of copies is called more than the table of days."""
_SOURCES = "copied_from"


def read_months(table: str, days: Sequence[date], order: Sequence[str], lake: Lake, engine: Engine) -> list[Path]:
    """Files that hold the rows of these days: of each whole month its copy, of others the days.

    Args:
        table: of the lake, with a file for each day.
        days: without a gap, ascending. The first month counts as whole though it begins later.
        order: columns by which copies are sorted, the key first.
        lake: of the campaign.
        engine: makes the copies that are not there, or not of what is there.

    Raises:
        DataContractError: when a day has not been ingested.
    """
    sources = dict(zip(days, lake.existing_days(table, days), strict=True))
    months = {month: list(found) for month, found in groupby(days, lambda day: day.replace(day=1))}
    lake.existing_partitions(f"{table}{MONTHS}", "month", list(months))  # brought up to date together
    files: list[Path] = []
    for month, found in months.items():
        parts = [sources[day] for day in found]
        if (found[-1] + timedelta(days=1)).month == month.month:
            files += parts
            continue
        copy = lake.target(f"{table}{MONTHS}", "month", month)
        if not _is_copy(copy, parts):
            _make(copy, parts, order, engine)
        files.append(copy)
    return files


def _make(copy: Path, parts: Sequence[Path], order: Sequence[str], engine: Engine) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with locked(copy.with_name(".lock")):  # a backfill and a nightly run may both find it missing
        if _is_copy(copy, parts):
            return
        logger.info("%s: copied from %d days", copy.parent.relative_to(copy.parents[2]), len(parts))
        sources = _state(parts)  # before they are read: what changes meanwhile is a reason to copy again
        engine.local.publish(engine.local.read(parts).order_by(list(order)), copy, {_SOURCES: sources})


def _is_copy(copy: Path, parts: Sequence[Path]) -> bool:
    try:
        noted = pq.read_metadata(copy).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):  # not there, or cut short
        return False
    return noted.get(_SOURCES.encode()) == _state(parts).encode()


def _state(parts: Sequence[Path]) -> str:
    """Changes whenever one of these files does."""
    marks = [(part.parent.name, stat.st_size, stat.st_mtime_ns) for part in parts for stat in [part.stat()]]
    return hashlib.sha256(repr(marks).encode()).hexdigest()
