"""Real databases as source and as target: the same campaign, the same bytes, whatever the connection."""

import logging
import sqlite3
import threading
import time
from datetime import date, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from propensity_dagster.campaign import Campaign, load_campaign
from propensity_dagster.data.delivery import deliver_scores
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.ingest import days_to_ingest, ingest_entities, ingest_stream, newest_source_day
from propensity_dagster.data.lake import Home
from propensity_dagster.data.validate import validate_entities, validate_stream
from propensity_dagster.errors import ConfigError, SourceError
from propensity_dagster.features.activity import build_activity

from . import postgres
from .postgres import as_admin

FIRST, LAST = date(2024, 1, 1), date(2024, 3, 1)
VARIABLE = "TEST_DATABASE_PASSWORD"

needs_postgres = pytest.mark.skipif(postgres.binaries() is None, reason="no Postgres binaries on this machine")


def rows_of_source() -> tuple[pa.Table, pa.Table]:
    """Customers and orders with every kind of trouble a database can hold."""
    rng = np.random.default_rng(3)
    n = 4_000
    start = datetime(2023, 12, 30)
    times = [start + timedelta(minutes=int(m)) for m in rng.integers(0, 64 * 24 * 60, n)]
    orders = pa.table(
        {
            "order_id": pa.array(range(1, n + 1), pa.int64()),
            "customer_id": pa.array([int(c) if c else None for c in rng.integers(0, 200, n)], pa.int64()),
            "ordered_at": pa.array([None if i % 500 == 7 else t for i, t in enumerate(times)], pa.timestamp("us")),
            "amount": pa.array(np.round(rng.lognormal(3, 1, n), 2) * np.where(rng.random(n) < 0.01, -1, 1)),
            "category": pa.array([("a, 'quoted'", 'b "x"', "ü\nline", None)[k] for k in rng.integers(0, 4, n)]),
        }
    )
    customers = pa.table(
        {
            "customer_id": pa.array(range(200), pa.int64()),
            "signup_at": pa.array([datetime(2023, 1, 1) + timedelta(days=i) for i in range(200)], pa.timestamp("us")),
            "age": pa.array([None if i % 9 == 0 else 20 + i % 60 for i in range(200)], pa.int64()),
            "country": pa.array([("DE", "FR")[i % 2] for i in range(200)]),
        }
    )
    return customers, orders


@pytest.fixture(autouse=True)
def _password(monkeypatch):
    monkeypatch.setenv(VARIABLE, postgres.PASSWORD)


def fill_postgres(address: str) -> str:
    customers, orders = rows_of_source()
    with as_admin(address) as connection:
        connection.execute("DROP TABLE IF EXISTS orders; DROP TABLE IF EXISTS customers")
        connection.execute(
            "CREATE TABLE orders (order_id BIGINT, customer_id BIGINT, ordered_at TIMESTAMP, "
            "amount DOUBLE PRECISION, category TEXT)"
        )
        connection.execute(
            "CREATE TABLE customers (customer_id BIGINT, signup_at TIMESTAMP, age INTEGER, country TEXT)"
        )
        for name, table in (("orders", orders), ("customers", customers)):
            with connection.cursor() as cursor, cursor.copy(f"COPY {name} FROM STDIN") as copy:
                for row in table.to_pylist():
                    copy.write_row(list(row.values()))
    return "postgres://" + address.replace("@", f":${{{VARIABLE}}}@")


def fill_sqlite(folder: Path) -> str:
    customers, orders = rows_of_source()
    with sqlite3.connect(folder / "shop.sqlite") as connection:
        connection.execute("CREATE TABLE orders (order_id, customer_id, ordered_at TEXT, amount REAL, category TEXT)")
        connection.execute("CREATE TABLE customers (customer_id INTEGER, signup_at TEXT, age INTEGER, country TEXT)")
        for name, table in (("orders", orders), ("customers", customers)):
            rows = [[str(v) if isinstance(v, datetime) else v for v in r.values()] for r in table.to_pylist()]
            places = ", ".join("?" * table.num_columns)
            connection.executemany(f"INSERT INTO {name} VALUES ({places})", rows)
    return f"sqlite://{folder / 'shop.sqlite'}"


def fill_duckdb(folder: Path) -> str:
    customers, orders = rows_of_source()
    with duckdb.connect(str(folder / "shop.duckdb")) as connection:
        connection.register("c", customers)
        connection.register("o", orders)
        connection.execute("CREATE TABLE customers AS FROM c; CREATE TABLE orders AS FROM o")
    return f"duckdb://{folder / 'shop.duckdb'}"


def fill_folder(folder: Path, suffix: str) -> str:
    customers, orders = rows_of_source()
    target = folder / suffix
    target.mkdir()
    for name, table in (("orders", orders), ("customers", customers)):
        if suffix == "parquet":
            pq.write_table(table, target / f"{name}.parquet")
        else:
            duckdb.from_arrow(table).write_csv(str(target / f"{name}.csv"), header=True)
    return str(target)


def campaign_on(folder: Path, connection: str, **changes) -> Campaign:
    content = {
        "name": "shop",
        "source": {
            "kind": "events",
            "connection": connection,
            "first_day": str(FIRST),
            "last_day": str(LAST),
            "entities": {
                "table": "customers",
                "key": "customer_id",
                "created_at": "signup_at",
                "attributes": {"age": "number", "country": "category"},
            },
            "streams": {
                "orders": {
                    "table": "orders",
                    "time": "ordered_at",
                    "id": "order_id",
                    "amount": "net",
                    "categories": ["category"],
                    "derive": {"net": "amount / 2"},
                    "where": "amount <> 10",
                }
            },
        },
        "outcome": {"stream": "orders", "horizon_days": 7},
        "max_bad_fraction": 0.9,
        **changes,
    }
    file = folder / "campaign.yaml"
    file.write_text(yaml.safe_dump(content))
    return load_campaign(file)


def ingest(campaign: Campaign, home: Home, first: date = FIRST, last: date = LAST) -> dict[str, bytes]:
    """Validated tables and activity as their bytes."""
    with open_engine() as engine:
        ingest_entities(campaign, home, engine)
        validate_entities(campaign, home, engine)
        ingest_stream(campaign, "orders", first, last, home, engine)
        validate_stream(campaign, "orders", first, last, home, engine)
        build_activity(campaign, first, last, home, engine)
    root = home.lake("shop").root
    tables = ("validated_orders", "validated_customers", "activity", "activity_categories", "quarantine_orders")
    return {str(f.relative_to(root)): f.read_bytes() for t in tables for f in sorted((root / t).rglob("*.parquet"))}


KINDS = ["parquet", "csv", "duckdb", "sqlite", pytest.param("postgres", marks=needs_postgres)]


def connect(kind: str, folder: Path, request) -> str:
    if kind == "postgres":
        return fill_postgres(request.getfixturevalue("postgres_server"))
    return (
        {"sqlite": fill_sqlite, "duckdb": fill_duckdb}[kind](folder)
        if kind in ("sqlite", "duckdb")
        else fill_folder(folder, kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_tables(tmp_path, request, kind):
    """Only `connection` differs. Quarantined rows are shown as text, which CSV and SQLite spell in their own way."""
    expected = ingest(campaign_on(tmp_path, fill_folder(tmp_path, "parquet")), Home(tmp_path / "expected"))
    (tmp_path / "other").mkdir()
    campaign = campaign_on(tmp_path, connect(kind, tmp_path / "other", request))
    found = ingest(campaign, Home(tmp_path / "found"))
    good = [name for name in expected if not name.startswith("quarantine")]
    assert len(good) > 120
    assert [n for n in good if found[n] != expected[n]] == []
    assert found.keys() == expected.keys()
    rows = [
        pq.read_table(tmp_path / side / "lake/shop" / n).num_rows
        for side in ("found", "expected")
        for n in found
        if "quarantine" in n
    ]
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]
    assert sum(rows) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_days_read_one_by_one_equal_one_read(tmp_path, request, kind):
    campaign = campaign_on(tmp_path, connect(kind, tmp_path, request))
    whole = ingest(campaign, Home(tmp_path / "whole"))
    home = Home(tmp_path / "daily")
    for offset in range(0, (LAST - FIRST).days + 1, 13):
        start = FIRST + timedelta(days=offset)
        parts = ingest(campaign, home, start, min(start + timedelta(days=12), LAST))
    assert parts == whole


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=needs_postgres)])
def test_an_incremental_read_fetches_its_days_only(tmp_path, request, kind):
    """And, anew, the rows whose day cannot be known: they belong to no day."""
    campaign = campaign_on(tmp_path, connect(kind, tmp_path, request))
    with open_engine() as engine:
        ingest_stream(campaign, "orders", LAST, LAST, Home(tmp_path / "home"), engine)
        fetched = sum(len(f.read_text().split("\n2")) for f in engine.scratch.glob("*.csv"))
    _, orders = rows_of_source()
    assert fetched < orders.num_rows / 5


@pytest.mark.parametrize("kind", ["duckdb", "sqlite", pytest.param("postgres", marks=needs_postgres)])
def test_the_newest_day_is_found(tmp_path, request, kind):
    campaign = campaign_on(tmp_path, connect(kind, tmp_path, request))
    with open_engine() as engine:
        assert newest_source_day(campaign, Home(tmp_path / "home"), engine, until=date(2024, 2, 10)) == date(
            2024, 2, 10
        )


def test_late_rows_are_read_again(tmp_path):
    connection = fill_sqlite(tmp_path)
    campaign = campaign_on(tmp_path, connection)
    late = campaign.model_copy(update={"source": campaign.source.model_copy(update={"late_days": 5})})
    home = Home(tmp_path / "home")
    ingest(late, home, FIRST, LAST - timedelta(days=1))
    with sqlite3.connect(tmp_path / "shop.sqlite") as database:
        database.execute("INSERT INTO orders VALUES (99999, 5, '2024-02-27 10:00:00', 12.5, 'a')")
    days = days_to_ingest(late, home, until=LAST)
    assert days == (LAST - timedelta(days=5), LAST)
    with open_engine() as engine:
        report = ingest_stream(late, "orders", *days, home, engine)
    assert report.late >= 1


@needs_postgres
def test_a_connection_that_drops_is_retried_by_dagster(tmp_path, postgres_server, caplog):
    """The server ends our session in the middle of the read: the asset is tried again, and nothing is half there."""
    import dagster as dg

    from propensity_dagster.components.automation import range_tags
    from propensity_dagster.components.campaign_folder import campaign_definitions
    from propensity_dagster.runtime import Runtime

    campaign = campaign_on(tmp_path, fill_postgres(postgres_server))
    with as_admin(postgres_server) as admin:  # slow enough to be caught at it: every row waits a little
        admin.execute("ALTER TABLE orders RENAME TO fast_orders")
        admin.execute(
            "CREATE VIEW orders AS SELECT order_id, customer_id, ordered_at, amount, "
            "CASE WHEN pg_sleep(0.0005) IS NULL THEN NULL ELSE category END AS category FROM fast_orders"
        )
        killed: list[int] = []

        def kill() -> None:
            until = time.monotonic() + 180  # a busy machine is slow to begin
            while not killed and time.monotonic() < until:
                found = admin.execute(
                    "SELECT pid FROM pg_stat_activity WHERE query LIKE 'COPY%' AND state = 'active' AND pid <> pg_backend_pid()"
                ).fetchall()
                for (pid,) in found:
                    time.sleep(0.3)
                    admin.execute("SELECT pg_terminate_backend(%s)", [pid])
                    killed.append(pid)
                time.sleep(0.01)

        thread = threading.Thread(target=kill)
        thread.start()
        home = Home(tmp_path / "home")
        defs = dg.Definitions.merge(
            campaign_definitions(campaign), dg.Definitions(resources={"runtime": Runtime(home.ensure())})
        )
        with dg.DagsterInstance.ephemeral() as instance:
            result = defs.resolve_job_def("shop__ingest").execute_in_process(
                instance=instance, tags=range_tags(FIRST, LAST), raise_on_error=False
            )
        thread.join()
        admin.execute("DROP VIEW orders")
        admin.execute("ALTER TABLE fast_orders RENAME TO orders")
    assert killed
    assert result.success
    retried = [e for e in result.all_events if e.event_type_value == "STEP_RESTARTED"]
    assert retried
    expected = ingest(campaign, Home(tmp_path / "expected"))
    root = home.lake("shop").root
    assert {n: (root / n).read_bytes() for n in expected} == expected


@needs_postgres
def test_the_password_is_nowhere(tmp_path, postgres_server, caplog, monkeypatch):
    """Neither in what is written, nor in logs, nor in errors; and it may not stand in the campaign file."""
    caplog.set_level(logging.DEBUG)
    campaign = campaign_on(tmp_path, fill_postgres(postgres_server))
    home = Home(tmp_path / "home")
    ingest(campaign, home)
    monkeypatch.setenv(VARIABLE, "wrong-" + postgres.PASSWORD)
    with open_engine() as engine, pytest.raises(SourceError) as caught:
        ingest_entities(campaign, home, engine)
    assert "password authentication failed" in str(caught.value)
    monkeypatch.delenv(VARIABLE)
    with open_engine() as engine, pytest.raises(ConfigError, match=f"the environment variable {VARIABLE} is not set"):
        ingest_entities(campaign, home, engine)
    written = [f for f in home.root.rglob("*") if f.is_file()]
    assert written
    assert not [f for f in written if postgres.PASSWORD.encode() in f.read_bytes()]
    assert postgres.PASSWORD not in caplog.text + str(caught.value) + campaign.model_dump_json()
    literal = (tmp_path / "campaign.yaml").read_text().replace(f"${{{VARIABLE}}}", postgres.PASSWORD)
    (tmp_path / "literal.yaml").write_text(literal)
    with pytest.raises(ConfigError, match="got a password in clear; it must come from the environment") as refused:
        load_campaign(tmp_path / "literal.yaml")
    assert postgres.PASSWORD not in str(refused.value)


def scores_file(folder: Path, snapshot: date, probabilities: dict[str, float], campaign: str = "shop") -> Path:
    n = len(probabilities)
    at = datetime(snapshot.year, snapshot.month, snapshot.day)
    table = pa.table(
        {
            "customer_id": pa.array(list(probabilities)),
            "snapshot": pa.array([at] * n, pa.timestamp("us")),
            "probability": pa.array(list(probabilities.values())),
            "decile": pa.array([1] * n, pa.int8()),
            "campaign": pa.array([campaign] * n),
            "scored_at": pa.array([datetime(2024, 5, 1, 2, 3, 4, 5)] * n, pa.timestamp("us")),
        }
    )
    file = folder / f"{snapshot}-{n}-{campaign}.parquet"
    pq.write_table(table, file)
    return file


def target_on(kind: str, folder: Path, request) -> tuple[str, "callable"]:
    """A target connection, and a function that reads (customer_id, snapshot, probability) from it."""
    sql = "SELECT customer_id, CAST(snapshot AS VARCHAR(10)), probability FROM scores ORDER BY 1, 2"
    if kind == "postgres":
        address = request.getfixturevalue("postgres_server")
        with as_admin(address) as admin:
            admin.execute("DROP TABLE IF EXISTS scores")

        def read_postgres():
            with as_admin(address) as admin:
                return admin.execute(sql).fetchall()

        return "postgres://" + address.replace("@", f":${{{VARIABLE}}}@"), read_postgres
    file = folder / f"target.{kind}"
    if kind == "sqlite":
        return f"sqlite://{file}", lambda: [
            (k, s[:10], p) for k, s, p in sqlite3.connect(file).execute(sql.replace("VARCHAR(10)", "TEXT")).fetchall()
        ]
    return f"duckdb://{file}", lambda: [
        (k, s[:10], p) for k, s, p in duckdb.connect(str(file), read_only=True).execute(sql).fetchall()
    ]


TARGETS = ["duckdb", "sqlite", pytest.param("postgres", marks=needs_postgres)]


@pytest.mark.parametrize("kind", TARGETS)
def test_scores_are_delivered_like_the_lake_holds_them(tmp_path, request, kind):
    connection, read = target_on(kind, tmp_path, request)
    campaign = campaign_on(tmp_path, str(tmp_path), target={"connection": connection})
    one, two = date(2024, 2, 1), date(2024, 2, 2)
    assert deliver_scores(campaign, one, scores_file(tmp_path, one, {"1": 0.1, "2": 0.2, "3": 0.3})) == 3
    assert deliver_scores(campaign, two, scores_file(tmp_path, two, {"1": 0.5})) == 1
    # Again, with one customer less, one more, and one changed: that snapshot alone is replaced.
    again = scores_file(tmp_path, one, {"1": 0.11, "3": 0.3, "4": 0.4, "5": 1 / 3})
    assert deliver_scores(campaign, one, again) == 4
    assert deliver_scores(campaign, one, again) == 4
    assert read() == [
        ("1", "2024-02-01", 0.11),
        ("1", "2024-02-02", 0.5),
        ("3", "2024-02-01", 0.3),
        ("4", "2024-02-01", 0.4),
        ("5", "2024-02-01", 1 / 3),
    ]


@pytest.mark.parametrize("kind", TARGETS)
def test_a_failed_delivery_changes_nothing(tmp_path, request, kind):
    connection, read = target_on(kind, tmp_path, request)
    campaign = campaign_on(tmp_path, str(tmp_path), target={"connection": connection})
    day = date(2024, 2, 1)
    deliver_scores(campaign, day, scores_file(tmp_path, day, {"1": 0.1}))
    broken = scores_file(tmp_path, day, {"1": 0.9, "2": 0.9})
    repeated = pa.concat_tables([pq.read_table(broken)] * 2).drop_columns(["scored_at"])  # not the table's columns
    pq.write_table(repeated.append_column("surprise", pa.array([1] * 4)), broken)
    with pytest.raises(SourceError, match="cannot be written"):
        deliver_scores(campaign, day, broken)
    assert read() == [("1", "2024-02-01", 0.1)]


@pytest.mark.parametrize("kind", TARGETS)
def test_two_campaigns_do_not_share_a_table(tmp_path, request, kind):
    connection, read = target_on(kind, tmp_path, request)
    campaign = campaign_on(tmp_path, str(tmp_path), target={"connection": connection})
    day = date(2024, 2, 1)
    deliver_scores(campaign, day, scores_file(tmp_path, day, {"1": 0.1}))
    other = campaign_on(tmp_path, str(tmp_path), name="other", target={"connection": connection})
    with pytest.raises(ConfigError, match="holds the scores of campaign 'shop'"):
        deliver_scores(other, day, scores_file(tmp_path, day, {"1": 0.7}, "other"))
    assert read() == [("1", "2024-02-01", 0.1)]


@pytest.mark.parametrize("kind", TARGETS)
def test_a_table_of_something_else_is_left_alone(tmp_path, request, kind):
    connection, _ = target_on(kind, tmp_path, request)
    campaign = campaign_on(tmp_path, str(tmp_path), target={"connection": connection})
    if kind == "postgres":
        with as_admin(request.getfixturevalue("postgres_server")) as admin:
            admin.execute("CREATE TABLE scores (a INTEGER)")
    else:
        opened = (
            sqlite3.connect(tmp_path / "target.sqlite")
            if kind == "sqlite"
            else duckdb.connect(str(tmp_path / "target.duckdb"))
        )
        opened.execute("CREATE TABLE scores (a INTEGER)")
        opened.close()
    day = date(2024, 2, 1)
    with pytest.raises(ConfigError, match="is a table of something else"):
        deliver_scores(campaign, day, scores_file(tmp_path, day, {"1": 0.1}))


def test_a_password_in_the_query_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="got a password in clear") as caught:
        campaign_on(tmp_path, "postgres://bob@127.0.0.1/crm?password=hunter2")
    assert "hunter2" not in str(caught.value)


def test_unknown_tables_and_kinds(tmp_path):
    (tmp_path / "x").mkdir()
    for connection, message in (
        (fill_sqlite(tmp_path / "x"), "table 'ordrs' is not in the database; there are customers, orders"),
        ("mysql://root@localhost/db", "unknown kind 'mysql'; allowed are a folder of parquet or CSV files, duckdb://"),
        ("sqlite://nowhere.db", "'nowhere.db' is not there"),
    ):
        campaign = campaign_on(tmp_path, connection)
        stream = campaign.source.streams["orders"].model_copy(update={"table": "ordrs"})
        source = campaign.source.model_copy(update={"streams": {"orders": stream}})
        broken = campaign.model_copy(update={"source": source})
        with open_engine() as engine, pytest.raises(ConfigError) as caught:
            ingest_stream(broken, "orders", FIRST, LAST, Home(tmp_path / "home"), engine)
        assert message in str(caught.value)
