"""Erasing a person: nothing is left, nothing else is lost, and ingestion does not bring the person back."""

import decimal
import json
import os
import shutil
import sqlite3
import time
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.ingest import ingest_entities, ingest_stream
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.data.tombstones import bury, is_buried
from propensity_dagster.data.validate import validate_entities, validate_stream
from propensity_dagster.erasure import erase_person, find_person
from propensity_dagster.errors import ConfigError
from propensity_dagster.serving.online import Facts, redis_facts, redis_has, write_redis
from propensity_dagster.serving.publish.prediction_log import ingest_predictions
from propensity_dagster.serving.settings import SETTINGS
from propensity_dagster_tests.conftest import CUSTOMERS, ORDERS


class NoModels:
    def versions(self, campaign):
        return []


@pytest.fixture
def lived(materialized, tmp_path):
    """A home that has seen everything, and a person who is in most of it."""
    from propensity_dagster.registry.mlflow_store import MlflowStore

    home = Home(tmp_path / "home")
    shutil.copytree(materialized.home.root, home.root, ignore=shutil.ignore_patterns("synthetic"))
    audience = pq.read_table(
        next((home.root / "lake/small/audience").rglob("*.parquet")), filters=[("group", "=", "contact")]
    )
    training = set(pq.read_table(home.root / "lake/small/training_set/part.parquet")["customer_id"].to_pylist())
    person = next(key for key in audience["customer_id"].to_pylist() if key in training)
    log = home.predictions / "small" / "day=2024-08-20"
    log.mkdir(parents=True)
    lines = [{"head": "p", "features": ["a"], "categories": {}, "model_version": "1"}]
    for i, key in enumerate([person, "someone", person, None]):
        lines.append(
            {"request_id": f"r{i}", "time": time.time(), "key": key, "package": "p", "variant": "champion",
             "endpoint": "predict", "probability": 0.5, "shadow": None, "unseen": [], "features": [1.0]}
        )  # fmt: skip
    (log / "w-1.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    ingest_predictions(materialized.campaign, date(2024, 8, 20), home)
    return materialized.campaign, home, person, MlflowStore(materialized.home)


def rows_of(home):
    """Rows of every table, by file."""
    return {
        f.relative_to(home.root): pq.read_metadata(f).num_rows for f in sorted((home.root / "lake").rglob("*.parquet"))
    }


def test_nothing_is_left_and_nothing_else_is_lost(lived):
    campaign, home, person, store = lived
    before = rows_of(home)
    footer = pq.read_schema(next((home.root / "lake/small/audience").rglob("*.parquet"))).metadata
    planned = find_person(person, [campaign], home, store)
    assert rows_of(home) == before, "a dry run changes nothing"
    tables = {place.table for place in planned.places}
    assert {
        "raw_orders", "validated_visits", "activity", "activity_months", "activity_last_days", "features", "labels", "training_set", "scores", "audience",
        "exported", "exports", "holdout", "online features", "log of answers", "predictions",
    } <= tables  # fmt: skip
    assert planned.models == {"small": ["1"]}
    done = erase_person(f" {person}.0 ", [campaign], home, store)
    assert (done.rows, done.left) == (planned.rows, 0)
    after = rows_of(home)
    lost = {p.file.relative_to(home.root): p.rows for p in planned.places if p.file.suffix == ".parquet"}
    assert {file: n - after[file] for file, n in before.items() if n != after[file]} == {
        file: n for file, n in lost.items() if file.parts[0] == "lake"
    }
    assert pq.read_schema(next((home.root / "lake/small/audience").rglob("*.parquet"))).metadata == footer
    assert not any(person.encode() == cell for cell in texts(home)), "a search of our own, over every file"
    connection = sqlite3.connect(home.serving / "small" / "online.sqlite")
    assert connection.execute("SELECT count(*) FROM features").fetchone()[0] > 100
    assert is_buried(person, home)
    assert person not in (home.root / "erased.json").read_text()


def texts(home):
    """Every value of every key-like column, field and cell below the lake, the exports, the log and the store."""
    for file in [*(home.root / "lake").rglob("*.parquet"), *(home.root / "exports").rglob("*.parquet")]:
        table = pq.read_table(file)
        for name in ("customer_id", "key"):
            if name in table.column_names:
                yield from (str(v).encode() for v in table[name].to_pylist())
    for file in (home.root / "exports").rglob("*.csv"):
        yield from (cell.strip('"').encode() for line in file.read_text().splitlines() for cell in line.split(",")[:1])
    for file in home.predictions.rglob("*.jsonl"):
        yield from (str(json.loads(line).get("key")).encode() for line in file.read_text().splitlines())
    connection = sqlite3.connect(home.serving / "small" / "online.sqlite")
    yield from (key.encode() for (key,) in connection.execute("SELECT key FROM features"))


def test_the_log_keeps_its_length_while_the_service_writes(lived):
    campaign, home, person, store = lived
    file = home.predictions / "small" / "day=2024-08-20" / "w-1.jsonl"
    size = file.stat().st_size
    handle = os.open(file, os.O_WRONLY | os.O_APPEND)
    erase_person(person, [campaign], home, store)
    os.write(handle, b'{"head":"q","features":[],"categories":{},"model_version":"2"}\n')
    os.close(handle)
    assert file.stat().st_size == size + 63
    report = ingest_predictions(campaign, date(2024, 8, 20), home)
    assert (report.rows, report.unreadable) == (2, 0), "what is blanked is no record, and no broken line"


def test_an_interrupted_erasure_is_run_again(lived, monkeypatch):
    campaign, home, person, store = lived
    planned = find_person(person, [campaign], home, store)
    calls = []

    def cut(place):
        calls.append(place)
        if len(calls) == len(planned.places) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase_person(person, [campaign], home, store, cut)
    assert is_buried(person, home), "the tombstone is there first"
    left = find_person(person, [campaign], home, store)
    assert 0 < len(left.places) < len(planned.places)
    assert left.models == planned.models, "who was trained on is known to the last"
    assert not list(home.root.rglob("*.tmp"))
    assert erase_person(person, [campaign], home, store).left == 0


def test_ingestion_does_not_bring_the_person_back(make_shop):
    orders = [*ORDERS, {**ORDERS[0], "order_id": 3, "customer_id": 2}]
    shop = make_shop(CUSTOMERS, orders)
    bury("2", shop.home)
    with open_engine() as engine:
        ingest_entities(shop.campaign, shop.home, engine)
        validate_entities(shop.campaign, shop.home, engine)
        ingest_stream(shop.campaign, "orders", date(2024, 3, 1), date(2024, 3, 2), shop.home, engine)
        validate_stream(shop.campaign, "orders", date(2024, 3, 1), date(2024, 3, 2), shop.home, engine)
    assert find_person("2", [shop.campaign], shop.home, NoModels()).places == []
    assert find_person("1", [shop.campaign], shop.home, NoModels()).rows == 4, "raw and validated: customer and order"


def test_a_number_and_its_text_are_one_person(make_shop):
    shop = make_shop([{**CUSTOMERS[0], "customer_id": 1.0}, {**CUSTOMERS[1], "customer_id": 2.0}])
    with open_engine() as engine:
        ingest_entities(shop.campaign, shop.home, engine)
        validate_entities(shop.campaign, shop.home, engine)
    for key in ("1", "1.0", " 1 "):
        assert {p.table for p in find_person(key, [shop.campaign], shop.home, NoModels()).places} == {
            "raw_customers",
            "validated_customers",
        }
    assert find_person("nobody", [shop.campaign], shop.home, NoModels()).rows == 0


def test_decisions_of_the_person_do_not_come_back(tmp_path, decisions):
    import dagster as dg

    from propensity_dagster.components.campaign_folder import campaign_definitions
    from propensity_dagster.runtime import Runtime

    file = tmp_path / "past.yaml"
    file.write_text(decisions.file.read_text().replace("data.csv", str(decisions.file.parent / "data.csv")))
    campaign, home = load_campaign(file), Home(tmp_path / "home").ensure()
    bury("17", home)
    defs = dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": Runtime(home)}))
    job = dg.define_asset_job(
        "read", dg.AssetSelection.assets(*(dg.AssetKey(["past", f"{s}_decisions"]) for s in ("raw", "validated")))
    )
    with dg.DagsterInstance.ephemeral() as instance:
        merged = dg.Definitions.merge(defs, dg.Definitions(jobs=[job]))
        assert merged.resolve_job_def("read").execute_in_process(instance=instance).success
    assert find_person("17", [campaign], home, NoModels()).rows == 0
    assert find_person("18", [campaign], home, NoModels()).rows == 2


def test_tables_whose_key_is_not_known_stop_it(lived):
    _, home, person, store = lived
    with pytest.raises(ConfigError, match="holds data of small, whose campaign file is not among those that were read"):
        erase_person(person, [], home, store)
    assert not is_buried(person, home)


@pytest.mark.parametrize(
    ("key", "values", "erased"),
    [
        ("00123", pa.array(["00123", "123"]), 1),
        ("12345678901234567", pa.array([decimal.Decimal("12345678901234567"), None], pa.decimal128(18, 0)), 1),
        ("A17", pa.array(["\tA17", "A17 ", "a17"]), 2),
        ("4915112345678", pa.array([4915112345678.0, 4915112345679.0, None]), 1),
        ("17", pa.array([17, 170, None]), 1),
        ("1.5", pa.array([1.5, 1.0]), 0),
        ("anna", pa.array([1, 2]), 0),
    ],
)
def test_one_key_in_every_type(make_shop, key, values, erased):
    shop = make_shop()
    file = shop.home.lake("shop").file("raw_customers")
    publish_table(pa.table({"customer_id": values, "age": list(range(len(values)))}), file)
    done = erase_person(key, [shop.campaign], shop.home, NoModels())
    assert (done.rows, done.left) == (erased, 0)
    table = pq.read_table(file)
    assert table.num_rows == len(values) - erased
    assert table.schema.field("customer_id").type == values.type


def test_keys_in_files_and_logs_are_text(make_shop):
    shop = make_shop()
    folder = shop.home.root / "exports" / "shop"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text('"customer_id","amount"\n"00123",1.50\n"7",2.00\n')
    log = shop.home.predictions / "shop" / "day=2024-01-01"
    log.mkdir(parents=True)
    (log / "w.jsonl").write_text(
        json.dumps({"key": "CORP\\jdoe", "probability": 0.123456789012345678, "more": "x" * 60}) + "\n"
    )
    assert erase_person("00123", [shop.campaign], shop.home, NoModels()).rows == 1
    assert (folder / "a.csv").read_text().splitlines()[1:] == ['"7","2.00"']
    assert erase_person("CORP\\jdoe", [shop.campaign], shop.home, NoModels()).rows == 1
    assert "jdoe" not in (log / "w.jsonl").read_text()


def test_redis_forgets(lived, redis_url):
    campaign, home, person, store = lived
    url, _ = redis_url
    write_redis(url, "small", Facts("2024-08-20", time.time(), 2, ("a",)), [(person, [1.0]), ("x", [2.0])])
    (home.serving / SETTINGS).write_text(f"online_store: {url}\n")
    assert any(place.file is None for place in find_person(person, [campaign], home, store).places)
    assert erase_person(person, [campaign], home, store).left == 0
    assert not redis_has(url, "small", person)
    assert redis_has(url, "small", "x")
    assert redis_facts(url, "small") is not None
