"""The days of a table, copied month by month in the order of the key: for what reads years of them.

Features read every day there is and group by customer. From months they open a thirtieth of the files, and rows of one
customer lie together and know the day before theirs. The days stay the truth: a month's file says of which files it is
a copy, with their sizes and times of change, and is read only while those are what is there. Else it is made anew:
after a day was ingested, or ingested again, a person erased, a home copied.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Lake, locked, version_of

logger = logging.getLogger(__name__)

MONTHS = "_months"
"""Suffix of the table of copies."""
LAST_DAYS = "_last_days"
"""Suffix of the table that says, by month and key, on which day something was counted last until the end of it."""
_SOURCES = "copied_from"
_FORMAT = 1
"""To be raised when what a copy holds of the same days changes: then all are made anew."""


@dataclass(frozen=True)
class _Month:
    """A month's copy, or where it is to be; of what; and what its file must say of those."""

    first: date
    copy: Path
    parts: list[Path]
    mark: str


@dataclass(frozen=True)
class _Copies:
    """How the months of one table are copied: see `read_months`."""

    table: str
    order: Sequence[str]
    previous: Mapping[str, str]
    lake: Lake
    engine: Engine

    def make(self, months: Sequence[_Month]) -> None:
        """The copy of the newest of these months; those before it are made."""
        month = months[-1]

        def rows() -> ibis.Table:
            days = self.engine.read(month.parts)
            if self.previous:
                before = self.last_days(months[:-1])
                days = with_previous(days, self.order[0], self.previous, self.engine.read(before) if before else None)
            return days.order_by(list(self.order))

        self._publish(rows, month.copy, month)

    def last_days(self, months: Sequence[_Month]) -> Path | None:
        """The last day that counts, by key and column, until the end of the newest of these months."""
        if not months:
            return None
        month, key = months[-1], self.order[0]
        file = self.lake.partition(f"{self.table}{LAST_DAYS}", "month", month.first)

        def rows() -> ibis.Table:
            copy = self.engine.read(month.copy)
            days = copy.select(key, **{name: day_with(copy, count) for name, count in self.previous.items()})
            before = self.last_days(months[:-1])
            if before:
                days = days.union(self.engine.read(before))
            return days.group_by(key).aggregate(**{name: days[name].max() for name in self.previous}).order_by(key)

        self._publish(rows, file, month)
        return file

    def _publish(self, rows: Callable[[], ibis.Table], file: Path, month: _Month) -> None:
        """Unless the file is of the month as it is now."""
        if _is_of(file, month.mark):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(".lock")):  # a backfill and a nightly run may both find it missing
            if not _is_of(file, month.mark):
                logger.info("%s: made of %d days", file.parent.relative_to(file.parents[2]), len(month.parts))
                self.engine.publish(rows(), file, {_SOURCES: month.mark})


def read_months(
    table: str,
    days: Sequence[date],
    order: Sequence[str],
    lake: Lake,
    engine: Engine,
    previous: Mapping[str, str] | None = None,
) -> ibis.Table:
    """The rows of these days: of each whole month from its copy, of others from the days.

    Args:
        table: of the lake, with a file for each day.
        days: without a gap, ascending. They begin with the first there is, whoever asks: a copy depends on it. The
            month of that day counts as whole.
        order: columns by which copies are sorted, the key first.
        lake: of the campaign.
        engine: reads; its local one makes the copies that are not there, or not of what is there.
        previous: further columns, and the count that each is of: see `with_previous`.

    Raises:
        DataContractError: when a day has not been ingested.
    """
    sources = dict(zip(days, lake.existing_days(table, days), strict=True))
    found = {first: [sources[day] for day in of] for first, of in groupby(days, lambda day: day.replace(day=1))}
    newest, after = days[-1].replace(day=1), days[-1] + timedelta(days=1)
    rest = found.pop(newest) if after.month == newest.month else []
    lake.existing_partitions(f"{table}{MONTHS}", "month", list(found))  # brought up to date together
    copies = _Copies(table, order, previous or {}, lake, engine.local)
    months: list[_Month] = []
    for first, parts in found.items():
        before = months[-1].mark if months and previous else ""
        mark = _mark(parts, [_FORMAT, *order, *copies.previous.items(), before])
        months.append(_Month(first, lake.target(f"{table}{MONTHS}", "month", first), parts, mark))
        copies.make(months)
    files = [month.copy for month in months]
    if not rest or not previous:
        return engine.read([*files, *rest])
    until = copies.last_days(months)
    days_so_far = with_previous(engine.read(rest), order[0], previous, engine.read(until) if until else None)
    so_far = engine.cache(days_so_far)  # every span reads it
    if not files:
        return so_far
    return engine.as_view(engine.read(files).union(so_far))


def with_previous(rows: ibis.Table, key: str, previous: Mapping[str, str], before: ibis.Table | None) -> ibis.Table:
    """Each row that counts something, with the day of the row before it, of the same key, that counts it too.

    A copy can tell, once, what every snapshot else has to sort a year of rows for.

    Args:
        rows: with the key, `day`, and counts; of those that count a thing, a key has one a day.
        key: of the rows.
        previous: what the new columns are called, and the counts that they are of. Of rows that count none they are
            null, and of the first that does.
        before: the key and the same columns, for the days before all of `rows`.
    """
    window = ibis.window(group_by=key, order_by="day", preceding=(None, 1))
    within: dict[str, Any] = {name: day_with(rows, count).max().over(window) for name, count in previous.items()}
    rows = rows.mutate(**within)
    if before is not None:
        before = before.rename({f"{name}__before": name for name in previous})
        rows = rows.left_join(before, key).drop(f"{key}_right")
        rows = rows.mutate(**{name: rows[name].fill_null(rows[f"{name}__before"]) for name in previous})
        rows = rows.drop(*(f"{name}__before" for name in previous))
    return rows.mutate(
        **{name: (rows[count] > 0).ifelse(rows[name], ibis.null("int32")) for name, count in previous.items()}
    )


def day_with(rows: ibis.Table, count: str) -> Any:
    """The day where this count is not zero: null elsewhere, for a filter on each aggregate costs a third more."""
    return (rows[count] > 0).ifelse(rows.day, ibis.null("int32"))


def _is_of(file: Path, mark: str) -> bool:
    try:
        noted = pq.read_metadata(file).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):  # not there, or cut short
        return False
    return noted.get(_SOURCES.encode()) == mark.encode()


def _mark(parts: Sequence[Path], more: Sequence[object]) -> str:
    """Changes whenever one of these files does, or what else the copy depends on."""
    marks = [(part.parent.name, *version_of(part)) for part in parts]
    return hashlib.sha256(repr((marks, more)).encode()).hexdigest()
