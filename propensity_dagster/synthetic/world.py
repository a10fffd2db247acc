"""What every synthetic world shares: its size, its calendar, writing its tables."""

from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

EPOCH = date(1970, 1, 1)
MICROSECONDS_PER_DAY = 86_400_000_000
_DIRTY_SHARE = 0.003
_FAR_FUTURE = np.datetime64("2099-12-31T12:00:00", "us")


TROUBLES = ("units", "missing", "population", "concept", "emails", "duplicates", "late", "label_delay")
"""What can go wrong from a day on, to see whether it is found: see `WorldConfig.trouble`."""


@dataclass(frozen=True)
class WorldConfig:
    """Size, seed and calendar of a world: 609 days are about 20 months.

    `trouble` names what goes wrong, and from which day on; before it the world is the same as without. A feature comes
    in other `units`, or goes `missing`; another `population` arrives; the relation of customers to outcomes changes
    (`concept`); `emails` stop; three days come twice (`duplicates`) or a week `late`; orders are known two weeks later
    (`label_delay`).
    """

    customers: int = 20_000
    seed: int = 7
    days: int = 609
    first_day: date = date(2024, 1, 1)
    trouble: tuple[tuple[str, date], ...] = ()

    def days_of(self, trouble: str, day: date) -> int | None:
        """Days since a trouble began; None before it, or without it."""
        begun = [start for name, start in self.trouble if name == trouble and start <= day]
        return (day - begun[0]).days if begun else None

    @property
    def last_day(self) -> date:
        """The newest day that has events."""
        return self.first_day + timedelta(days=self.days - 1)

    def offset(self, day: date) -> int:
        """Days from the first day."""
        return (day - self.first_day).days


def day_times(rng: np.random.Generator, day: date, size: int) -> NDArray[np.datetime64]:
    """Instants within a day: few at night, most in the evening. Microseconds make chance ties rare."""
    hours = rng.beta(2.6, 1.9, size) * 24
    offsets = np.minimum((hours * 3.6e9).astype(np.int64), MICROSECONDS_PER_DAY - 1)
    return np.datetime64(day, "us") + offsets.astype("timedelta64[us]")


def write_day(folder: Path, day: date, columns: dict[str, pa.Array]) -> None:
    """Write one day's rows of a table, behind those that are in the day's file already."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{day}.parquet"
    table = pa.table(columns)
    if file.exists():
        table = pa.concat_tables([pq.read_table(file), table])
    pq.write_table(table, file, compression="zstd")


def dirty_rows(rng: np.random.Generator, size: int, kinds: int) -> list[NDArray[np.int64]]:
    """For each kind of dirt, the rows that get it; no row gets two."""
    chosen = rng.permutation(size)[: rng.poisson(_DIRTY_SHARE * size)]
    kind = rng.integers(0, kinds, len(chosen))
    return [chosen[kind == k] for k in range(kinds)]


def key_column(entities: NDArray[np.int64], missing: NDArray[np.int64]) -> pa.Array:
    """Keys 1, 2, ... of entity numbers 0, 1, ...; the rows `missing` have none."""
    mask = np.zeros(len(entities), dtype=bool)
    mask[missing] = True
    return pa.array(entities + 1, mask=mask)


def time_column(times: NDArray[np.datetime64], missing: NDArray[np.int64], future: NDArray[np.int64]) -> pa.Array:
    """Instants; the rows `missing` have none, the rows `future` lie far ahead."""
    times = times.copy()
    times[future] = _FAR_FUTURE
    mask = np.zeros(len(times), dtype=bool)
    mask[missing] = True
    return pa.array(times, mask=mask)
