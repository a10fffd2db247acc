"""Event logs whose files change: other columns or types on day 200, a file cut short, one customer with everything."""

from datetime import date, datetime, timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.engine import Engine, open_engine
from propensity_dagster.data.ingest import ingest_entities, ingest_stream
from propensity_dagster.data.lake import Home
from propensity_dagster.data.validate import validate_entities, validate_stream
from propensity_dagster.errors import DataContractError, EngineError
from propensity_dagster.features import activity
from propensity_dagster.features.activity import build_activity
from propensity_dagster.features.snapshots import publish_features

from .conftest import shop_file, write_rows

FIRST, LAST, CHANGED = date(2024, 1, 1), date(2024, 12, 31), 200
ROWS = 20


def orders(day: int) -> pa.Table:
    return pa.table(
        {
            "order_id": [f"{day}-{i}" for i in range(ROWS)],
            "customer_id": [i % 7 for i in range(ROWS)],
            "ordered_at": [datetime(2024, 1, 1) + timedelta(days=day, hours=i) for i in range(ROWS)],
            "amount": [10.5 + i for i in range(ROWS)],
            "category": ["toys"] * ROWS,
        }
    )


def shop_of(folder: Path, change, first=lambda table: table):
    """A campaign on a file every tenth day; `change` is what happens to them from day 200 on."""
    (folder / "orders").mkdir()
    for day in range(0, 300, 10):
        table = orders(day)
        pq.write_table(change(table) if day >= CHANGED else first(table), folder / "orders" / f"{day:03}.parquet")
    customers = [{"customer_id": i, "signup_at": "2023-12-01T00:00:00", "age": 30, "country": "DE"} for i in range(7)]
    write_rows(folder / "customers.parquet", customers)
    return load_campaign(shop_file(folder)), Home(folder / "home")


def replaced(table: pa.Table, name: str, column) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column(table[name]))


def cast(name: str, kind: pa.DataType):
    return lambda table: replaced(table, name, lambda c: c.cast(kind, safe=False))


HARMLESS = {
    "a new column": lambda t: t.append_column("new", pa.array([1] * ROWS)),
    "another order": lambda t: t.select(["amount", "category", "ordered_at", "order_id", "customer_id"]),
    "keys as text": cast("customer_id", pa.string()),
    "amounts as text": cast("amount", pa.string()),
    "smaller numbers": cast("amount", pa.float32()),
    "times as text": lambda t: replaced(t, "ordered_at", lambda c: pa.array([str(x) for x in c.to_pylist()])),
    "times with a zone": cast("ordered_at", pa.timestamp("us", "UTC")),
}


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("order", ["forth", "back"])
def test_what_changes_harmlessly_gives_the_same_tables(tmp_path, engine, change, order):
    """Also the other way round: the first file's types are not everybody's."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "changed").mkdir()
    changed = HARMLESS[change]
    found = (
        shop_of(tmp_path / "changed", changed)
        if order == "forth"
        else shop_of(tmp_path / "changed", lambda t: t, changed)
    )
    tables = []
    for campaign, home in (found, shop_of(tmp_path / "plain", lambda t: t)):
        ingest_stream(campaign, "orders", FIRST, LAST, home, engine)
        report = validate_stream(campaign, "orders", FIRST, LAST, home, engine)
        assert (report.good, report.quarantined) == (30 * ROWS, 0)
        files = sorted(home.lake("shop").root.glob("validated_orders/day=*/part.parquet"))
        tables.append(pa.concat_tables([pq.read_table(file) for file in files]))
    assert tables[0].equals(tables[1])


def test_keys_that_become_words_are_other_customers(tmp_path, engine):
    campaign, home = shop_of(
        tmp_path, lambda t: replaced(t, "customer_id", lambda c: pa.array([f"C{i}" for i in c.to_pylist()]))
    )
    ingest_stream(campaign, "orders", FIRST, LAST, home, engine)
    assert validate_stream(campaign, "orders", FIRST, LAST, home, engine).good == 30 * ROWS


@pytest.mark.parametrize("column", ["amount", "category", "ordered_at"])
def test_a_column_that_goes_is_named_with_the_file(tmp_path, engine, column):
    campaign, home = shop_of(tmp_path, lambda t: t.drop_columns([column]))
    with pytest.raises(DataContractError, match=rf"orders/200\.parquet has no column '{column}', other files have"):
        ingest_stream(campaign, "orders", FIRST, LAST, home, engine)
    assert not (home.lake("shop").root / "raw_orders").exists()


def test_a_file_that_is_cut_short_is_named(tmp_path, engine):
    campaign, home = shop_of(tmp_path, lambda t: t)
    ingest_stream(campaign, "orders", FIRST, LAST, home, engine)
    before = {f: f.read_bytes() for f in home.lake("shop").root.rglob("*.parquet")}
    file = tmp_path / "orders" / "250.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataContractError, match=r"orders/250\.parquet: is not a parquet file, or cut short"):
        ingest_stream(campaign, "orders", FIRST, LAST, home, engine)
    assert {f: f.read_bytes() for f in home.lake("shop").root.rglob("*.parquet")} == before


@pytest.fixture
def lake(tmp_path, engine):
    """A shop up to its activity."""
    campaign, home = shop_of(tmp_path, lambda t: t)
    ingest_entities(campaign, home, engine)
    validate_entities(campaign, home, engine)
    ingest_stream(campaign, "orders", FIRST, LAST, home, engine)
    validate_stream(campaign, "orders", FIRST, LAST, home, engine)
    build_activity(campaign, FIRST, LAST, home, engine)
    return campaign, home


@pytest.mark.parametrize("at_once", [1, 100])
def test_days_built_in_portions_are_those_built_at_once(lake, engine, monkeypatch, at_once):
    """Years of days outgrow the memory of one machine."""
    campaign, home = lake
    whole = build_activity(campaign, FIRST, LAST, home, engine)
    before = {f: f.read_bytes() for f in (home.lake("shop").root / "activity").rglob("*.parquet")}
    before |= {f: f.read_bytes() for f in (home.lake("shop").root / "activity_categories").rglob("*.parquet")}
    assert whole.events_read > 2 * at_once
    tables = engine.backend.list_tables()
    for file in before:
        file.unlink()
    monkeypatch.setattr(activity, "EVENTS_AT_ONCE", at_once)
    assert build_activity(campaign, FIRST, LAST, home, engine) == whole
    assert {f: f.read_bytes() for f in before} == before
    assert [name for name in set(engine.backend.list_tables()) - set(tables) if name.startswith("cached")] == []


def test_a_validated_day_that_is_cut_short(lake, engine):
    campaign, home = lake
    file = home.lake("shop").partition("validated_orders", "day", date(2024, 5, 20))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataContractError, match=r"day=2024-05-20/part\.parquet: is not a parquet file, or cut short"):
        build_activity(campaign, FIRST, LAST, home, engine)


@pytest.mark.parametrize("trouble", ["missing", "cut short"])
def test_a_partition_in_the_middle_of_a_window(lake, trouble):
    campaign, home = lake
    file = home.lake("shop").partition("activity", "day", date(2024, 5, 20))
    if trouble == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises((DataContractError, EngineError), match="2024-05-20") as raised, open_engine() as engine:
        publish_features(campaign, [date(2024, 7, 1)], home, engine)
    assert "\n" not in str(raised.value)
    assert not home.lake("shop").partition("features", "snapshot", date(2024, 7, 1)).exists()


SNAPSHOTS = [date(2024, 6, 1), date(2024, 7, 1)]


def ingest_again(campaign, home, at: datetime, folder: Path) -> None:
    """An order that arrived late, and its day once more."""
    late = orders(0).slice(0, 1)
    late = replaced(late, "ordered_at", lambda c: pa.array([at], c.type))
    late = replaced(late, "order_id", lambda c: pa.array([f"late {at}"], c.type))
    pq.write_table(late, folder / "orders" / f"late {at:%d}.parquet")
    with open_engine(threads=1) as other:
        ingest_stream(campaign, "orders", at.date(), at.date(), home, other)
        validate_stream(campaign, "orders", at.date(), at.date(), home, other)
        build_activity(campaign, at.date(), at.date(), home, other)


@pytest.mark.parametrize("times", [1, 2, 9])
def test_a_day_that_is_ingested_again_while_features_are_computed(lake, tmp_path, monkeypatch, times):
    """All snapshots are of the data as they are in the end, or it is said that there is no end."""
    campaign, home = lake
    at = iter([datetime(2024, 5, day, 12) for day in range(1, times + 1)])
    with open_engine() as engine:
        publish = Engine.publish_query

        def disturbed(self, query, file, *notes):
            publish(self, query, file, *notes)
            if file.parent.name == f"snapshot={SNAPSHOTS[0]}":  # the first is written, the second not yet
                for moment in islice(at, 1):
                    ingest_again(campaign, home, moment, tmp_path)

        monkeypatch.setattr(Engine, "publish_query", disturbed)
        if times == 9:
            with pytest.raises(DataContractError, match=r"activity.day=2024-05-03.* 3 times; run this again when"):
                publish_features(campaign, SNAPSHOTS, home, engine)
            return
        publish_features(campaign, SNAPSHOTS, home, engine)
    files = [home.lake("shop").partition("features", "snapshot", snapshot) for snapshot in SNAPSHOTS]
    found = [pq.read_table(file) for file in files]
    with open_engine() as engine:
        publish_features(campaign, SNAPSHOTS, home, engine)
    assert found == [pq.read_table(file) for file in files]
    (mine,) = [row for row in found[0].to_pylist() if row["customer_id"] == "0"]
    assert mine["orders_count_all"] >= 3 * 15 + times


def test_one_customer_with_a_million_events(tmp_path, engine):
    campaign, home = shop_of(tmp_path, lambda t: t)
    n = 1_000_000
    seconds = np.arange(n) * 20  # twenty seconds apart, for eight months
    at = np.datetime64("2024-01-01", "us") + seconds.astype("timedelta64[s]")
    whale = {"order_id": [f"w{i}" for i in range(n)], "customer_id": np.full(n, 3), "ordered_at": at}
    whale |= {"amount": np.full(n, 1.0), "category": ["toys"] * n}
    pq.write_table(pa.table(whale), tmp_path / "orders" / "whale.parquet")
    ingest_entities(campaign, home, engine)
    validate_entities(campaign, home, engine)
    ingest_stream(campaign, "orders", FIRST, LAST, home, engine)
    report = validate_stream(campaign, "orders", FIRST, LAST, home, engine)
    assert report.good == n + 30 * ROWS
    build_activity(campaign, FIRST, LAST, home, engine)
    publish_features(campaign, [date(2024, 7, 1)], home, engine)
    rows = pq.read_table(home.lake("shop").partition("features", "snapshot", date(2024, 7, 1))).to_pylist()
    (found,) = [row for row in rows if row["customer_id"] == "3"]
    assert found["orders_count_30d"] == 30 * 86_400 / 20 + 3 * 3
    assert found["orders_active_days_365d"] == 182


def test_too_little_memory_is_said(tmp_path):
    query = "SELECT string_agg(range::VARCHAR || random()::VARCHAR) AS a FROM range(3000000)"
    with (
        pytest.raises(EngineError, match=r"PROPENSITY_MEMORY_GB=0\.002 allows") as raised,
        open_engine(memory_gb=0.002, threads=1) as small,
    ):
        small.arrow(small.sql(query))
    assert "\n" not in str(raised.value)
