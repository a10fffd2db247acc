"""Spark gives what DuckDB gives, on this machine. Elsewhere: test_spark_cluster.py."""

import shutil
from datetime import date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from propensity_dagster.campaign import find_campaign, load_campaign
from propensity_dagster.data import coerce
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.data.spark import open_spark
from propensity_dagster.errors import ConfigError, EngineError
from propensity_dagster.models.rows import RowScorer
from propensity_dagster.models.saved import load_model
from propensity_dagster.runtime import Runtime

from .conftest import KINDS, SHARED_DATA
from .pipeline import require_equal_lakes, require_equal_tables, run_pipeline, score_newest
from .served import free_port

pyspark = pytest.importorskip("pyspark", reason="the extra 'spark' is not installed")
if shutil.which("java") is None:
    pytest.skip("there is no Java", allow_module_level=True)

ROOT = Path(__file__).parents[1]
EXAMPLES = {"cdnow": "cdnow.yaml", "online_retail": "online_retail.yaml"}


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    """A session of two cores that cuts tables into more parts than that."""
    with open_spark("local[2]", tmp_path_factory.mktemp("spark"), memory_gb=1.0, threads=2) as opened:
        opened.session.conf.set("spark.sql.files.maxPartitionBytes", "2m")
        opened.session.conf.set("spark.sql.files.openCostInBytes", "16k")
        opened.session.conf.set("spark.sql.adaptive.coalescePartitions.enabled", "false")
        opened.session.conf.set("spark.sql.shuffle.partitions", "3")
        yield opened


TEXTS = [
    "2024-01-01 10:00:00", "2024-01-01T10:00:00+02:00", "2024-01-01T10:00:00Z", "2024-01-01 10:00:00.123456", "2024-1-2",
    "2024-02-30", "2024-01-01", "2024", "2024-05", "10:00:00", "20240131", "31/01/2024", "1/2/2024", " 12.5 ", "12.5", "-0",
    "1e3", "1d", "17850", "17850.0", "00123", "-7.000", "Infinity", "nan", "", "  ", "\vfive\f", "\tfashion\n", "x'y", "\\d", "1_000", "0x1F", "1,5", ".5", "5.", "1e400", "+1", "1f", "inf", "epoch",
    "2024/01/02", "2024-01-01 10:00", "2024-01-01 25:00:00", "0024-01-01", "99999-01-01", None,
]  # fmt: skip
NUMBERS = [
    0.0, -0.0, 1.0, 2.5, 0.005, 1.005, 2.675, -3.0, 17850.0, 1e20, 9.1e15, float("nan"), float("inf"), float("-inf"), None,
]  # fmt: skip
COERCIONS = {
    "key": lambda t: coerce.key_text(t.text),
    "key_of_number": lambda t: coerce.key_text(t.number),
    "key_of_integer": lambda t: coerce.key_text(t.integer),
    "time": lambda t: coerce.utc_time(t.text, None, ""),
    "time_day_first": lambda t: coerce.utc_time(t.text, "%d/%m/%Y", ""),
    "time_compact": lambda t: coerce.utc_time(t.text, "%Y%m%d", ""),
    "time_seconds": lambda t: coerce.utc_time(t.text, "%Y-%m-%d %H:%M:%S", ""),
    "time_letters": lambda t: coerce.utc_time(t.text, "%Y-%m-%dT%H:%M:%SZ", ""),
    "time_of_timestamp": lambda t: coerce.utc_time(t.at, None, ""),
    "time_of_zoned": lambda t: coerce.utc_time(t.zoned, None, ""),
    "time_of_date": lambda t: coerce.utc_time(t.day, None, ""),
    "number": lambda t: coerce.number(t.text),
    "number_of_number": lambda t: coerce.number(t.number),
    "cents": lambda t: coerce.scaled_integer(t.number, 100),
    "cents_of_text": lambda t: coerce.scaled_integer(t.text, 100),
    "category": lambda t: coerce.category(t.text),
    "category_of_integer": lambda t: coerce.category(t.integer),
    "lost": lambda t: coerce.lost(t.text, coerce.number(t.text)),
    "lost_number": lambda t: coerce.lost(t.number, coerce.number(t.number)),
    "day": lambda t: coerce.day_number(t.at),
    "hash": lambda t: t.text.hexdigest("sha256"),
}


@pytest.fixture(scope="module")
def nasty(spark, engine, tmp_path_factory):
    """One file of hard values, as a table of each engine."""
    n = len(TEXTS)
    numbers = [NUMBERS[i % len(NUMBERS)] for i in range(n)]
    at = [datetime(1969 + i, 12, 31, 23, 59, 59, 999999) for i in range(n)]
    data = pa.table(
        {
            "row": pa.array(range(n)),
            "text": pa.array(TEXTS, pa.string()),
            "number": pa.array(numbers, pa.float64(), from_pandas=False),
            "integer": pa.array([i - 3 for i in range(n)]),
            "at": pa.array(at, pa.timestamp("us")),
            "zoned": pa.array(at, pa.timestamp("us", "UTC")),
            "day": pa.array([date(1969 + i, 2, 28) for i in range(n)]),
        }
    )
    file = tmp_path_factory.mktemp("nasty") / "nasty.parquet"
    pq.write_table(data, file)
    return engine.read(file), spark.read(file)


@pytest.mark.parametrize("name", COERCIONS)
def test_values_coerce_alike(spark, engine, nasty, name):
    here, there = (
        opened.arrow(table.select("row", value=COERCIONS[name](table)).order_by("row"))
        for opened, table in zip((engine, spark), nasty, strict=True)
    )
    assert there.schema == here.schema
    if pa.types.is_timestamp(here["value"].type):  # Python's end with the year 9999
        here, there = (t.set_column(1, "value", t["value"].cast("int64")) for t in (here, there))
    assert there["value"].to_pylist() == here["value"].to_pylist()


def shipped(name: str, folder: Path):
    """A shipped campaign on fewer customers, with two snapshots to learn from."""
    file = folder / f"{name}.yaml"
    file.write_text(find_campaign(name).file.read_text().replace("customers=20000", "customers=800"))
    return fewer_snapshots(load_campaign(file))


def fewer_snapshots(campaign):
    stated = campaign.snapshots.model_copy(update={"train": 2, "validate_": 1, "test": 1})
    return campaign.model_copy(update={"snapshots": stated})


def on_both(campaign, spark, engine, folder: Path):
    """The lake of each engine."""
    here, there = Home(folder / "duckdb"), Home(folder / "spark")
    said = run_pipeline(campaign, here, engine)
    if here.synthetic.exists():
        shutil.copytree(here.synthetic, there.synthetic)
    assert run_pipeline(campaign, there, spark) == said
    assert require_equal_lakes(here.lake(campaign.name).root, there.lake(campaign.name).root) > 100
    return here, there


@pytest.mark.parametrize("name", ["ecommerce_purchase", "saas_upgrade", "loan_uptake", "campaign_response"])
def test_shipped_campaigns_give_the_same_tables(spark, engine, tmp_path, name):
    on_both(shipped(name, tmp_path), spark, engine, tmp_path)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real data are not part of the repository")
@pytest.mark.parametrize("name", EXAMPLES)
def test_real_logs_give_the_same_tables(spark, engine, tmp_path, monkeypatch, name):
    monkeypatch.setenv("PROPENSITY_DATA", str(SHARED_DATA))
    campaign = load_campaign(ROOT / "examples" / EXAMPLES[name])
    on_both(fewer_snapshots(campaign), spark, engine, tmp_path)


@pytest.fixture
def two_homes(all_registered, tmp_path):
    """The same features twice."""
    homes = Home(tmp_path / "duckdb"), Home(tmp_path / "spark")
    for home in homes:
        shutil.copytree(all_registered.home.root, home.root, ignore=shutil.ignore_patterns("mlruns", "raw_*"))
    return homes


@pytest.mark.parametrize("kind", KINDS)
def test_executors_score_as_one_machine_does(spark, engine, all_registered, two_homes, kind):
    here, there = two_homes
    folder = all_registered.store.folder("small", all_registered.versions[kind])
    said = [
        score_newest(all_registered.campaign, folder, h, e) for h, e in zip(two_homes, (engine, spark), strict=True)
    ]
    assert said[0][0].rows == said[1][0].rows > 1000
    assert said[0][1] == said[1][1] == 0
    assert require_equal_lakes(here.lake("small").root, there.lake("small").root) > 100


def test_a_scored_table_of_decisions_is_the_same(spark, engine, decisions, tmp_path):
    """Its rows are in the file's order, which is no column's."""
    file = tmp_path / "rows.parquet"
    table = pq.read_table(decisions.home.lake("past").file("training_set"))
    shuffled = pa.concat_tables([table.slice(7), table.slice(0, 7)] * 40)
    pq.write_table(shuffled, file, row_group_size=100)
    model = load_model(decisions.home.candidates("past") / "lightgbm")
    schema = pa.schema(
        [(decisions.campaign.key, table.schema.field(decisions.campaign.key).type), ("log_odds", pa.float64())]
    )
    columns = [decisions.campaign.key, *model.contract.names]
    here, there = (e.map_batches(file, columns, schema, RowScorer(model)).read_all() for e in (engine, spark))
    require_equal_tables(here, there, "scores")


def test_what_cannot_be_is_said(spark, tmp_path, monkeypatch):
    monkeypatch.setenv("PROPENSITY_ENGINE", "sparkle")
    with pytest.raises(ConfigError, match=r"PROPENSITY_ENGINE must be duckdb, spark, local\[N\].* got 'sparkle'"):
        Runtime.from_environment()
    with (
        pytest.raises(ConfigError, match=r"sc://127.0.0.1:\d+: nobody answers there"),
        open_spark(f"sc://127.0.0.1:{free_port()}", tmp_path),
    ):
        pass
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 cut short")
    with pytest.raises(EngineError, match="Spark could not finish") as raised:
        spark.read(broken)
    assert "\n" not in str(raised.value)
    assert "\tat " not in str(raised.value)


def test_scratch_is_gone_afterwards(tmp_path):
    with open_spark("local[2]", tmp_path, memory_gb=1.0, threads=2) as opened:
        table = opened.cache(opened.table(pa.table({"a": [3, 1, 2]})))
        assert opened.arrow(table.order_by("a"))["a"].to_pylist() == [1, 2, 3]
        assert any((tmp_path / "scratch").iterdir())
    assert not any((tmp_path / "scratch").iterdir())
    with open_engine() as here:
        assert here.local is here
