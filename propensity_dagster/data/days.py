"""Event days: their arithmetic, and publishing a stream of rows as one file a day."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import compute

from propensity_dagster.data.lake import UNPLACED, publish_table
from propensity_dagster.data.objects import AT_ONCE, store_above
from propensity_dagster.errors import DataContractError

EPOCH = date(1970, 1, 1)
_AT_ONCE_ON_DISK = 3  # more cost CPU time and bring nothing
pc: Any = compute  # its functions are made at import, which no type checker sees


@dataclass(frozen=True)
class Calendar:
    """The days a campaign covers, both inclusive. `last` is None while they go on."""

    first: date
    last: date | None

    @property
    def newest(self) -> date:
        """The last day, or today."""
        return self.last or date.today()


@dataclass(frozen=True)
class TimeRange:
    """Which rows an incremental read wants: `column` within these days, or not within the calendar at all."""

    column: str
    first: date
    last: date
    calendar: Calendar


def now_utc() -> datetime:
    """The time, UTC, without zone, as the tables hold it."""
    return datetime.now(UTC).replace(tzinfo=None)


def days_between(first: date, last: date) -> list[date]:
    """Every day from first to last, both inclusive."""
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


def day_index(day: date) -> int:
    """Days since 1970-01-01."""
    return (day - EPOCH).days


def publish_days(
    batches: pa.RecordBatchReader,
    days: Sequence[date],
    file_of: Callable[[date | str], Path],
    unplaced: bool = False,
    keep_day: bool = False,
) -> tuple[dict[date, int], int]:
    """Write a stream that is sorted by `day`, nulls last, as one file a day, empty days too.

    With `unplaced`, rows without a day go to a file of their own, which is written even when empty. A few files are
    published at once: each waits for the disk, or for the store of the lake.

    Returns:
        Rows of each day, and rows without a day.
    """
    dropped = [] if keep_day else ["day"]
    schema = pa.schema([field for field in batches.schema if field.name not in dropped])
    rows = dict.fromkeys(days, 0)
    lost = 0
    expected = iter(days)
    with _publishing_at_once(file_of(UNPLACED)) as publish:
        for day, table in _split_by_day(batches):
            if day is None:
                lost = table.num_rows
                publish(table.drop_columns(dropped), file_of(UNPLACED))
                continue
            for empty in expected:
                if empty == day:
                    break
                publish(schema.empty_table(), file_of(empty))
            rows[day] = table.num_rows
            publish(table.drop_columns(dropped), file_of(day))
        for empty in expected:
            publish(schema.empty_table(), file_of(empty))
        if unplaced and not lost:
            publish(schema.empty_table(), file_of(UNPLACED))
    return rows, lost


@contextmanager
def _publishing_at_once(place: Path) -> Generator[Callable[[pa.Table, Path], None]]:
    """`publish_table` that does not wait, until as many as may wait at that place do; at the end all are published."""
    running: deque[Future[None]] = deque()
    at_once = _AT_ONCE_ON_DISK if store_above(place) is None else AT_ONCE
    with ThreadPoolExecutor(at_once) as pool:

        def publish(table: pa.Table, file: Path) -> None:
            if len(running) == at_once:
                running.popleft().result()
            running.append(pool.submit(publish_table, table, file))

        yield publish
        for one in running:
            one.result()


def _split_by_day(batches: pa.RecordBatchReader) -> Iterator[tuple[date | None, pa.Table]]:
    """Runs of equal `day`, in order; a run may span batches."""
    pending: list[pa.RecordBatch] = []
    current: int | None = None
    for batch in batches:
        index = batch.schema.get_field_index("day")
        days = pc.fill_null(batch.column(index), np.iinfo(np.int32).max).to_numpy(zero_copy_only=False)
        starts = np.flatnonzero(np.diff(days, prepend=days[:1] - 1)) if len(days) else np.empty(0, int)
        for start, end in zip(starts, [*starts[1:], len(days)], strict=True):
            day = int(days[start])
            if pending and day != current:
                yield _day_or_none(current), pa.Table.from_batches(pending)
                pending = []
            current = day
            pending.append(batch.slice(start, end - start))
    if pending:
        yield _day_or_none(current), pa.Table.from_batches(pending)


def _day_or_none(number: int | None) -> date | None:
    if number is None or number == np.iinfo(np.int32).max:
        return None
    return EPOCH + timedelta(days=number)


def rows_of_each(files: Sequence[Path]) -> list[int]:
    """Row counts, read from the files' footers.

    Raises:
        DataContractError: naming a file that has none.
    """
    found: list[int] = []
    for file in files:
        try:
            found.append(pq.read_metadata(file).num_rows)
        except pa.ArrowInvalid:
            raise DataContractError(f"{file}: is not a parquet file, or cut short; materialize it again") from None
    return found


def stable_order(table: ibis.Table, but: Sequence[str]) -> list[str]:
    """Columns to sort by so that equal tables have equal bytes."""
    return [name for name in table.columns if name not in but]
