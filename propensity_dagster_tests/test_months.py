"""Copies of months: the rows of the days, read only while they are."""

import multiprocessing
from collections import defaultdict
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from propensity_dagster.data.days import days_between
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home, Lake, publish_table
from propensity_dagster.data.months import read_months
from propensity_dagster.errors import DataContractError

DAYS = days_between(date(2024, 1, 20), date(2024, 4, 10))
MADE = "activity_months/month=2024-02-01/part.parquet"


def rows_of(day: date, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng([day.toordinal(), seed])
    keys = [f"c{k}" for k in rng.permutation(50)[:20]]
    day_number = pa.array([day.toordinal()] * 20, pa.int32())
    return pa.table(
        {"customer_id": keys, "day": day_number, "n": rng.choice([0] * 9 + [2], 20), "m": rng.integers(0, 9, 20)}
    )


@pytest.fixture
def lake(tmp_path) -> Lake:
    lake = Home(tmp_path).lake("shop")
    for day in DAYS:
        publish_table(rows_of(day), lake.target("activity", "day", day))
    return lake


def read(lake: Lake, engine, days=DAYS) -> pa.Table:
    return in_order(engine.arrow(read_months("activity", days, ["customer_id", "day"], lake, engine)))


def in_order(table: pa.Table) -> pa.Table:
    return table.sort_by([("customer_id", "ascending"), ("day", "ascending")]).combine_chunks()


def expected(days=DAYS, seeds=()) -> pa.Table:
    changed = dict(seeds)
    return in_order(pa.concat_tables([rows_of(day, changed.get(day, 0)) for day in days]))


def test_whole_months_are_read_from_one_file_in_the_order_of_the_key(lake, engine):
    assert read(lake, engine).equals(expected())
    assert sorted(times(lake, "activity_months")) == [f"month=2024-0{n}-01" for n in (1, 2, 3)], "April is not over"
    february = pq.read_table(lake.root / MADE)
    assert february.equals(in_order(february))


@pytest.mark.parametrize("last", [date(2024, 1, 25), date(2024, 2, 28), date(2024, 2, 29), date(2024, 3, 1)])
def test_a_month_is_whole_with_its_last_day(lake, engine, last):
    days = [day for day in DAYS if day <= last]
    assert read(lake, engine, days).equals(expected(days))
    assert read_chained(lake, engine, days) == chained(expected(days))
    assert (lake.root / MADE).exists() == (last >= date(2024, 2, 29))


def times(lake: Lake, table: str) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in (lake.root / table).rglob("*.parquet")}


def test_a_copy_is_kept_until_one_of_its_days_changes(lake, engine):
    read(lake, engine)
    first = (lake.root / MADE).stat().st_mtime_ns
    read(lake, engine)
    assert (lake.root / MADE).stat().st_mtime_ns == first
    changed = date(2024, 2, 14)
    publish_table(rows_of(changed, 1), lake.target("activity", "day", changed))
    assert read(lake, engine).equals(expected(seeds={changed: 1}.items()))


def test_a_log_that_begins_earlier_than_it_did_is_copied_again(lake, engine):
    read(lake, engine)
    days = [DAYS[0] - timedelta(days=1), *DAYS]
    publish_table(rows_of(days[0]), lake.target("activity", "day", days[0]))
    assert read(lake, engine, days).equals(expected(days))


@pytest.mark.parametrize("keep", [0, 3, -20])
def test_a_copy_that_was_cut_short_is_made_anew(lake, engine, keep):
    read(lake, engine)
    (lake.root / MADE).write_bytes((lake.root / MADE).read_bytes()[:keep])
    assert read(lake, engine).equals(expected())


def test_a_day_that_is_missing_is_an_error_though_its_month_was_copied(lake, engine):
    read(lake, engine)
    lake.target("activity", "day", date(2024, 2, 14)).unlink()
    with pytest.raises(DataContractError, match=r"1 of 82 days .* have not been ingested: 2024-02-14"):
        read(lake, engine)


def read_alone(root: Path, start) -> list[dict]:
    start.wait()
    with open_engine(threads=1) as engine:
        return read_chained(Home(root).lake("shop"), engine)


def test_a_backfill_and_a_nightly_run_may_make_the_same_copy(lake, engine):
    context = multiprocessing.get_context("forkserver")
    with context.Manager() as manager, context.Pool(3) as pool:
        start = manager.Barrier(3)
        found = pool.starmap(read_alone, [(lake.root.parents[1], start)] * 3)
    assert found == [chained(expected())] * 3
    assert not list(lake.root.rglob("*.tmp"))


PREVIOUS = {"n__previous": "n", "m__previous": "m"}


def read_chained(lake: Lake, engine, days=DAYS) -> list[dict]:
    rows = read_months("activity", days, ["customer_id", "day"], lake, engine, PREVIOUS)
    return in_order(engine.arrow(rows)).to_pylist()


def chained(rows: pa.Table) -> list[dict]:
    """The same by a loop."""
    last: dict[tuple[str, str], int | None] = defaultdict(lambda: None)
    found = []
    for row in rows.to_pylist():
        more = {}
        for name, count in PREVIOUS.items():
            more[name] = last[row["customer_id"], count] if row[count] else None
        for count in PREVIOUS.values():
            if row[count]:
                last[row["customer_id"], count] = row["day"]
        found.append(row | more)
    return found


def test_rows_know_the_day_before_theirs_across_months(lake, engine):
    rows = read_chained(lake, engine)
    assert rows == chained(expected())
    assert any(row["n__previous"] and row["day"] - row["n__previous"] > 31 for row in rows), "over a month without"


@pytest.mark.parametrize("changed", [DAYS[0], date(2024, 2, 14), date(2024, 3, 31)])
def test_months_after_a_day_that_changed_are_copied_again(lake, engine, changed):
    read_chained(lake, engine)
    before = times(lake, "activity_months")
    publish_table(rows_of(changed, 1), lake.target("activity", "day", changed))
    assert read_chained(lake, engine) == chained(expected(seeds={changed: 1}.items()))
    after = times(lake, "activity_months")
    assert {m for m in after if after[m] != before[m]} == {m for m in after if m >= f"month={changed:%Y-%m}-01"}


def test_a_last_day_is_made_once_a_month(lake, engine):
    """Each night reads the days of a month so far and begins with what was known at the end of the one before."""
    read_chained(lake, engine)
    before = times(lake, "activity_last_days"), times(lake, "activity_months")
    assert sorted(before[0]) == ["month=2024-01-01", "month=2024-02-01", "month=2024-03-01"]
    day = DAYS[-1] + timedelta(days=1)
    publish_table(rows_of(day), lake.target("activity", "day", day))
    assert read_chained(lake, engine, [*DAYS, day]) == chained(expected([*DAYS, day]))
    assert (times(lake, "activity_last_days"), times(lake, "activity_months")) == before


@pytest.mark.parametrize("gone", ["activity_months/month=2024-03-01", "activity_last_days/month=2024-02-01"])
@pytest.mark.parametrize("keep", [None, 20])
def test_what_was_deleted_or_cut_short_of_a_chain_is_made_anew(lake, engine, gone, keep):
    read_chained(lake, engine)
    file = lake.root / gone / "part.parquet"
    file.write_bytes(file.read_bytes()[:keep]) if keep else file.unlink()
    lake.target("activity_months", "month", date(2024, 3, 1)).unlink(missing_ok=True)
    assert read_chained(lake, engine) == chained(expected())


def test_copies_without_the_days_before_are_made_anew_with_them(lake, engine):
    read(lake, engine)
    assert read_chained(lake, engine) == chained(expected())
    assert read(lake, engine).equals(expected())
