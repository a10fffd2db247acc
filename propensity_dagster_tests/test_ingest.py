"""From source to validated tables: every row is accounted for, every mistake is told."""

from datetime import UTC, date, datetime, timedelta, timezone
from functools import partial

import duckdb
import pandera.pandas as pandera
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propensity_dagster.campaign import load_campaign
from propensity_dagster.contracts import stream_contract
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.ingest import days_to_ingest, ingest_entities, ingest_stream, newest_event_day
from propensity_dagster.data.lake import UNPLACED
from propensity_dagster.data.quarantine import reason_for
from propensity_dagster.data.sources import changed_files, days_in_files
from propensity_dagster.data.validate import stream_violations, validate_entities, validate_stream
from propensity_dagster.errors import ConfigError, DataContractError, InsufficientDataError

from .conftest import CUSTOMERS, ORDERS, write_rows

FIRST, LAST = date(2024, 1, 1), date(2024, 12, 31)


def ingest(shop, engine, first=FIRST, last=LAST):
    ingest_stream(shop.campaign, "orders", first, last, shop.home, engine)
    return validate_stream(shop.campaign, "orders", first, last, shop.home, engine)


def validated(shop, table="orders"):
    files = sorted(shop.home.lake("shop").root.glob(f"validated_{table}/**/part.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def order(**changes):
    return {**ORDERS[0], **changes}


def text_order(**changes):
    return {**{k: str(v) for k, v in ORDERS[0].items()}, **changes}


DIRTY = [
    ("missing key", order(customer_id=None), "customer_id: missing"),
    ("missing time", order(ordered_at=None), "time: missing"),
    ("missing id", order(order_id=None), "event_id: missing"),
    ("text instead of a time", order(ordered_at="soon"), "time: not a time"),
    ("dated 2099", order(ordered_at="2099-01-01T00:00:00"), "time: at or after 2025-01-01 00:00:00"),
    ("before the first day", order(ordered_at="1970-01-01"), "time: below 2024-01-01 00:00:00"),
    ("infinite amount", order(amount=float("inf")), "amount: not a finite number"),
    ("NaN amount", order(amount=float("nan")), "amount: missing"),
    ("negative amount", order(amount=-0.01), "amount: below 0"),
    ("an amount beyond exact integers", order(amount=1e300), "amount: not a finite number"),
    ("text amount", text_order(amount="ten"), "amount: not a finite number"),
    ("blank text", text_order(amount=" "), "amount: missing"),
    ("fractional key", order(customer_id=1.5), "customer_id: not a text"),
]


@pytest.mark.parametrize(("row", "reason"), [c[1:] for c in DIRTY], ids=[c[0] for c in DIRTY])
def test_a_bad_row_is_quarantined_with_its_reason(make_shop, engine, row, reason):
    good = {
        k: type(row[k])(v) if isinstance(row[k], str | float) and k != "ordered_at" else v for k, v in ORDERS[1].items()
    }
    shop = make_shop(orders=[row, good])
    report = ingest(shop, engine)
    assert (report.rows_in, report.good, report.quarantined, report.duplicates) == (2, 1, 1, 0)
    assert report.reasons == {reason: 1}
    assert report.adds_up
    lake = shop.home.lake("shop").root
    quarantined = [pq.read_table(f) for f in lake.glob("quarantine_orders/**/part.parquet")]
    assert [t["reason"][0].as_py() for t in quarantined if t.num_rows] == [reason]
    assert stream_violations(shop.campaign, "orders", FIRST, LAST, shop.home, engine) == 0


def test_duplicates_are_dropped_and_counted(make_shop, engine):
    rows = [order(), order(), order(amount=99.0), order(order_id=7)]
    report = ingest(make_shop(orders=rows), engine)
    assert (report.good, report.duplicates, report.quarantined) == (2, 2, 0)


def test_amounts_are_cents_and_times_are_utc(make_shop, engine):
    east, west = timezone(timedelta(hours=9)), timezone(timedelta(hours=-5))
    rows = [
        order(order_id=1, ordered_at="2024-03-01T00:30:00+09:00"),
        order(order_id=2, ordered_at="2024-02-29T10:30:00-05:00"),
        order(order_id=3, ordered_at="2024-02-29T15:30:00Z"),
        order(order_id=4, ordered_at="2024-02-29 15:30:00", amount=0.125),
    ]
    found = validated_after(make_shop(orders=rows), engine)
    assert {row["time"] for row in found} == {datetime(2024, 2, 29, 15, 30)}
    assert datetime(2024, 3, 1, 0, 30, tzinfo=east).astimezone(UTC).hour == 15
    assert datetime(2024, 2, 29, 10, 30, tzinfo=west).astimezone(UTC).hour == 15
    assert [row["amount"] for row in found] == [1000, 1000, 1000, 13]


def validated_after(shop, engine):
    ingest(shop, engine)
    return sorted(validated(shop), key=lambda row: row["event_id"])


def test_a_zoned_column_is_normalised(make_shop, engine):
    times = pa.array([datetime(2024, 3, 1, 2, 0)], pa.timestamp("us", "Asia/Tokyo"))
    table = pa.table({"order_id": [1], "customer_id": [1], "ordered_at": times, "amount": [1.0], "category": ["a"]})
    found = validated_after(make_shop(orders=table), engine)
    assert found[0]["time"] == datetime(2024, 3, 1, 2, 0)


def test_a_key_that_is_a_float_here_and_text_there(make_shop, engine):
    customers = [{**c, "customer_id": str(c["customer_id"])} for c in CUSTOMERS]
    shop = make_shop(customers=customers, orders=[order(customer_id=1.0), order(order_id=2, customer_id=2.0)])
    ingest_entities(shop.campaign, shop.home, engine)
    validate_entities(shop.campaign, shop.home, engine)
    ingest(shop, engine)
    keys = pq.read_table(shop.home.lake("shop").file("validated_customers"))["customer_id"].to_pylist()
    assert keys == ["1", "2"]
    assert sorted(row["customer_id"] for row in validated(shop)) == ["1", "2"]


def test_a_duplicate_customer(make_shop, engine):
    again = {**CUSTOMERS[0], "signup_at": "2024-06-01T00:00:00", "country": "IT"}
    shop = make_shop(customers=[*CUSTOMERS, again, CUSTOMERS[1]])
    ingest_entities(shop.campaign, shop.home, engine)
    report = validate_entities(shop.campaign, shop.home, engine)
    assert (report.good, report.quarantined, report.duplicates) == (2, 1, 1)
    assert report.reasons == {"customer_id: another row with this key was created earlier": 1}
    kept = pq.read_table(shop.home.lake("shop").file("validated_customers")).to_pylist()
    assert kept[0]["country"] == "DE"


def test_customer_attributes_are_checked(make_shop, engine):
    bad = {"customer_id": 3, "signup_at": "yesterday", "age": 1, "country": "DE"}
    source = {"age": {"type": "number", "minimum": 0, "maximum": 120}, "country": "category"}
    shop = make_shop(customers=[*CUSTOMERS, bad, {**CUSTOMERS[0], "customer_id": 4, "age": 999}])
    entities = shop.campaign.source.entities.model_copy(
        update={
            "attributes": type(shop.campaign.source.entities)
            .model_validate(
                {"table": "customers", "key": "customer_id", "created_at": "signup_at", "attributes": source}
            )
            .attributes
        }
    )
    source_model = shop.campaign.source.model_copy(update={"entities": entities})
    campaign = shop.campaign.model_copy(update={"source": source_model})
    ingest_entities(campaign, shop.home, engine)
    report = validate_entities(campaign, shop.home, engine)
    assert report.reasons == {"age: above 120.0": 1, "created_at: not a time": 1}


def test_missing_column_names_what_is_there(make_shop, engine):
    rows = [{k: v for k, v in r.items() if k != "amount"} | {"amout": 1.0} for r in ORDERS]
    with pytest.raises(
        DataContractError,
        match=r"campaign\.yaml: source\.streams\.orders: there is no column 'amount'; did you mean 'amout'\?",
    ):
        ingest(make_shop(orders=rows), engine)


def test_empty_and_missing_tables(make_shop, engine):
    empty = pa.Table.from_pylist(ORDERS).slice(0, 0)
    with pytest.raises(InsufficientDataError, match="table 'orders' has no rows"):
        ingest(make_shop(orders=empty), engine)
    shop = make_shop(customers=pa.Table.from_pylist(CUSTOMERS).slice(0, 0))
    with pytest.raises(InsufficientDataError, match="table 'customers' has no rows"):
        ingest_entities(shop.campaign, shop.home, engine)
    (shop.folder / "orders.parquet").unlink()
    with pytest.raises(ConfigError, match=r"table 'orders' is not in .*; there are campaign, customers"):
        ingest(shop, engine)


def test_too_many_bad_rows_block_and_leave_the_last_good_table(make_shop, engine):
    shop = make_shop(max_bad_fraction=0.3)
    ingest(shop, engine)
    before = validated(shop)
    write_rows(shop.folder / "orders.parquet", [ORDERS[0], order(order_id=9, amount=-1.0)])
    with pytest.raises(
        DataContractError,
        match=r"orders: 1 of 2 rows \(50\.0%\) break the contract, max_bad_fraction allows 30\.0%\. Reasons: amount: below 0 \(1 rows\)",
    ):
        ingest(shop, engine)
    assert validated(shop) == before


def test_rows_without_a_day_are_counted_once_however_days_are_grouped(make_shop, engine):
    shop = make_shop(orders=[*ORDERS, order(order_id=3, ordered_at="nonsense")])
    for first, last in ((FIRST, date(2024, 2, 29)), (date(2024, 3, 1), LAST)):
        report = ingest(shop, engine, first, last)
        assert report.adds_up
    assert len(validated(shop)) == 2
    lake = shop.home.lake("shop")
    assert pq.read_metadata(lake.partition("quarantine_orders", "day", UNPLACED)).num_rows == 1


def test_ingesting_again_gives_the_same_bytes(make_shop, engine):
    shop = make_shop()
    contents = []
    for _ in range(2):
        ingest(shop, engine)
        contents.append({f: f.read_bytes() for f in shop.home.root.rglob("*.parquet")})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3 * 366 + 2


def test_filters_and_derived_columns(make_shop, engine):
    rows = [
        {**r, "price": 2.0, "pieces": i + 1} for i, r in enumerate([*ORDERS, order(order_id="C5", category="gift")])
    ]
    for row in rows:
        row["order_id"] = str(row["order_id"])
    shop = make_shop(orders=rows)
    stream = {
        "table": "orders", "time": "ordered_at", "id": "order_id", "amount": "total",
        "derive": {"total": "price * pieces"}, "where": "order_id NOT LIKE 'C%' AND total > 1",
    }  # fmt: skip
    campaign = with_orders(shop, stream)
    ingest_stream(campaign, "orders", FIRST, LAST, shop.home, engine)
    validate_stream(campaign, "orders", FIRST, LAST, shop.home, engine)
    assert sorted(r["amount"] for r in validated(shop)) == [200, 400]


def with_orders(shop, stream):
    import yaml

    content = yaml.safe_load(shop.campaign.file.read_text())
    content["source"]["streams"]["orders"] = stream
    shop.campaign.file.write_text(yaml.safe_dump(content))
    return load_campaign(shop.campaign.file)


EXPRESSIONS = [
    ("where", "no_such > 1", ConfigError, "there is no column 'no_such'"),
    ("where", "amount >", ConfigError, "not an SQL expression"),
    ("where", "amount IN (SELECT 1)", ConfigError, "must be one expression on one row's columns"),
    ("where", "DROP TABLE orders", ConfigError, "not an SQL expression"),
    ("where", "amount > 1; DROP TABLE orders", ConfigError, "not an SQL expression"),
    ("where", "sum(amount) > 1", ConfigError, "must be one expression"),
    ("where", "category > 1", DataContractError, "source.streams.orders"),
]


@pytest.mark.parametrize(("key", "sql", "error", "message"), EXPRESSIONS, ids=[e[1] for e in EXPRESSIONS])
def test_bad_expressions(make_shop, engine, key, sql, error, message):
    shop = make_shop()
    stream = {
        "table": "orders",
        "time": "ordered_at",
        "id": "order_id",
        "amount": "amount",
        "categories": ["category"],
        key: sql,
    }
    with pytest.raises(error, match="campaign") as caught:
        ingest_stream(with_orders(shop, stream), "orders", FIRST, LAST, shop.home, engine)
    assert message in str(caught.value)


def test_csv_and_duckdb_give_the_same_lake(make_shop, engine, tmp_path):
    shop = make_shop()
    ingest(shop, engine)
    expected = validated(shop)
    table = pq.read_table(shop.folder / "orders.parquet")
    (shop.folder / "orders.parquet").unlink()
    (shop.folder / "orders").mkdir()
    half = table.to_pandas()
    half.iloc[:1].to_csv(shop.folder / "orders" / "a.csv", index=False)
    half.iloc[1:].to_csv(shop.folder / "orders" / "b.csv", index=False)
    ingest(shop, engine)
    assert validated(shop) == expected

    database = tmp_path / "warehouse.duckdb"
    with duckdb.connect(str(database)) as connection:
        connection.register("incoming", half)
        connection.execute("CREATE TABLE orders AS SELECT * FROM incoming")
    source = shop.campaign.source.model_copy(update={"connection": f"duckdb://{database}"})
    campaign = shop.campaign.model_copy(update={"source": source})
    with open_engine() as fresh:
        ingest_stream(campaign, "orders", FIRST, LAST, shop.home, fresh)
        validate_stream(campaign, "orders", FIRST, LAST, shop.home, fresh)
    assert validated(shop) == expected


def test_csv_keeps_leading_zeros_and_zones(make_shop, engine):
    shop = make_shop()
    (shop.folder / "orders.parquet").unlink()
    header = "order_id,customer_id,ordered_at,amount,category\n"
    (shop.folder / "orders.csv").write_text(header + "01,007,2024-03-01T01:00:00+02:00,5,a\n")
    ingest(shop, engine)
    (row,) = validated(shop)
    assert (row["customer_id"], row["event_id"]) == ("007", "01")
    assert row["time"] == datetime(2024, 2, 29, 23, 0)


def test_connection_variables(make_shop, engine, monkeypatch):
    shop = make_shop()
    source = shop.campaign.source.model_copy(update={"connection": "${SHOP_DATA}"})
    campaign = shop.campaign.model_copy(update={"source": source})
    read = partial(ingest_stream, campaign, "orders", FIRST, LAST, shop.home, engine)
    with pytest.raises(ConfigError, match="environment variable SHOP_DATA is not set"):
        read()
    monkeypatch.setenv("SHOP_DATA", str(shop.folder / "nowhere"))
    with pytest.raises(ConfigError, match="is not there; tried"):
        read()
    monkeypatch.setenv("SHOP_DATA", str(shop.folder))
    assert read().rows == 2


def test_what_a_night_ingests(make_shop, engine):
    shop = make_shop(orders=ORDERS)
    assert days_to_ingest(shop.campaign, shop.home, until=date(2024, 3, 5)) == (FIRST, date(2024, 3, 5))
    ingest(shop, engine, FIRST, date(2024, 3, 5))
    assert days_to_ingest(shop.campaign, shop.home, until=date(2024, 3, 5)) is None
    assert days_to_ingest(shop.campaign, shop.home, until=date(2024, 3, 7)) == (date(2024, 3, 6), date(2024, 3, 7))
    assert newest_event_day(shop.campaign, shop.home) == date(2024, 3, 2)


def test_the_watched_folder(make_shop, engine):
    shop = make_shop()
    state, changed = changed_files(shop.campaign, shop.home, {})
    assert {f.rpartition("/")[2] for f in changed} == {"customers.parquet", "orders.parquet"}
    assert days_in_files(shop.campaign, changed, shop.home, engine) == (date(2024, 3, 1), date(2024, 3, 2))
    assert changed_files(shop.campaign, shop.home, state)[1] == []
    write_rows(shop.folder / "orders.parquet", [*ORDERS, order(order_id=3, ordered_at="2024-05-06T00:00:00")])
    again = changed_files(shop.campaign, shop.home, state)[1]
    assert [f.rpartition("/")[2] for f in again] == ["orders.parquet"]


values = st.sampled_from([None, -100, -1, 0, 1, 5, 10**9])
rows = st.lists(
    st.fixed_dictionaries(
        {
            "customer_id": st.sampled_from([None, "a", "b"]),
            "time": st.sampled_from([None, datetime(1999, 1, 1), datetime(2024, 5, 5), datetime(2099, 1, 1)]),
            "amount": values,
            "measure_pages": values,
            "type": st.sampled_from([None, "sent", "bounced"]),
        }
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(rows)
def test_the_quarantine_agrees_with_pandera(engine, data):
    """The Ibis translation of a contract and pandera's own verdict fall on the same rows."""
    campaign = load_small()
    stream = type(campaign.source.streams["orders"]).model_validate(
        {"table": "t", "time": "t", "amount": "a", "measures": ["pages"], "type": "e"}
    )
    contract = stream_contract(campaign, stream, FIRST, LAST)
    types = [
        ("customer_id", pa.string()),
        ("time", pa.timestamp("us")),
        ("amount", pa.int64()),
        ("measure_pages", pa.int64()),
        ("type", pa.string()),
    ]
    table = pa.Table.from_pylist(data, schema=pa.schema(types))
    expression = engine.table(table)
    bad = engine.arrow(expression.mutate(reason=reason_for(expression, contract, {})))["reason"].to_pylist()
    frame = table.to_pandas(types_mapper={pa.int64(): __import__("pandas").Int64Dtype()}.get)
    frame["time"] = frame["time"].astype("datetime64[us]")
    loose = pandera.DataFrameSchema(
        {
            n: c.set_name(n) if str(c.dtype) != "int64" else pandera.Column("Int64", c.checks, nullable=c.nullable)
            for n, c in contract.columns.items()
        }
    )
    failed: set[int] = set()
    try:
        loose.validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as error:
        failed = {int(i) for i in error.failure_cases["index"].dropna()}
    assert {i for i, reason in enumerate(bad) if reason} == failed


def load_small():
    import tempfile
    from pathlib import Path

    from .conftest import SMALL

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.yaml"
        file.write_text(SMALL)
        return load_campaign(file)
