"""Fixtures: small campaigns on real files, and one campaign run through Dagster for everybody."""

import gc
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from propensity_dagster.campaign import Campaign, load_campaign
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster_tests import postgres
from propensity_dagster_tests.served import free_port, wait_until

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
LONGEST = ("test_spark.py", "test_spark_cluster.py", "test_serving.py", "test_known_answers.py", "test_examples.py")
"""Files of several minutes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long is begun first: a worker that gets it last works on while the others have nothing left."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def shop_file(folder: Path, **changes) -> Path:
    """A campaign on the tables of `folder`, with some keys replaced."""
    content = {
        "name": "shop",
        "source": {
            "kind": "events",
            "connection": str(folder),
            "first_day": "2024-01-01",
            "last_day": "2024-12-31",
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
                    "amount": "amount",
                    "categories": ["category"],
                }
            },
        },
        "outcome": {"stream": "orders", "horizon_days": 30},
        "max_bad_fraction": 0.9,
        "min_converters": 1,
        **changes,
    }
    file = folder / "campaign.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@dataclass
class Shop:
    """A campaign, its source folder and its home."""

    campaign: Campaign
    folder: Path
    home: Home


@pytest.fixture
def make_shop(tmp_path: Path) -> Callable[..., Shop]:
    """Writes customers and orders (lists of rows) and loads a campaign on them."""

    def make(customers=None, orders=None, **changes) -> Shop:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        write_rows(folder / "customers.parquet", CUSTOMERS if customers is None else customers)
        write_rows(folder / "orders.parquet", ORDERS if orders is None else orders)
        return Shop(load_campaign(shop_file(folder, **changes)), folder, Home(tmp_path / "home"))

    return make


@pytest.fixture(scope="module")
def engine():
    """DuckDB, shared by the tests of a file."""
    with open_engine() as opened:
        yield opened


def write_rows(file: Path, rows: "list[dict] | pa.Table") -> None:
    pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, file)


CUSTOMERS = [
    {"customer_id": 1, "signup_at": "2024-01-05T10:00:00", "age": 30, "country": "DE"},
    {"customer_id": 2, "signup_at": "2024-02-05T10:00:00", "age": 40, "country": "FR"},
]
ORDERS = [
    {"order_id": 1, "customer_id": 1, "ordered_at": "2024-03-01T12:00:00", "amount": 10.0, "category": "toys"},
    {"order_id": 2, "customer_id": 2, "ordered_at": "2024-03-02T12:00:00", "amount": 20.5, "category": "home"},
]

SMALL = """
name: small
description: Will this customer order within the next 14 days?
source:
  kind: events
  connection: synthetic://ecommerce?customers=2500&days=240&seed=3
  entities:
    table: customers
    key: customer_id
    created_at: signup_at
    attributes: {age: number, country: category, channel: category}
  streams:
    orders: {table: orders, time: ordered_at, id: order_id, amount: amount, categories: [category]}
    visits: {table: web_visits, time: visited_at, measures: [pages]}
    emails: {table: emails, time: sent_at, type: event, types: [sent, open, click]}
outcome: {stream: orders, horizon_days: 14}
eligibility: {active_within_days: 90, streams: [orders, visits]}
snapshots: {every: 7d, train: 8, validate: 3, test: 3}
features:
  windows_days: [7, 30, 90]
  names:
    total_purchases: orders_count_all
    avg_order_value: orders_amount_mean_all
    days_since_last_purchase: orders_recency_days
    email_open_rate: emails_open_rate_90d
    website_visits_30d: visits_count_30d
    tenure_months: tenure_months
models:
  - baseline
  - logistic_regression
  - lightgbm: {max_rounds: 60}
  - neural_network: {max_epochs: 2}
  - ensemble
value: {margin_per_conversion: 22.5, cost_per_contact: 0.4}
contacts:
  consent: {table: consents, granted: granted}
  random: 20
  exports: [{name: crm, kind: csv}]
experiments:
  wording:
    units: scored
    variants: {control: 0.5, warm: 0.5}
    starts: 2024-07-01
    ends: 2024-12-01
    metrics: {revenue: orders.amount, opens: {sum: emails.open, per: emails.sent}}
    guardrails: [opens]
explanations:
  hidden: [visits_recency_days]
  sentences: {visits_pages_sum_90d: "viewed {value} pages in the last 90 days, typically {typical}"}
segments: [country]
max_bad_fraction: 0.9
min_converters: 100
"""


@dataclass
class Materialized:
    """A campaign that was run end to end through Dagster, its home and the instance that recorded it."""

    campaign: Campaign
    home: Home
    file: Path


@pytest.fixture(scope="session")
def materialized(tmp_path_factory: pytest.TempPathFactory) -> Materialized:
    """The small campaign, run through Dagster as `propensity demo` does. Read it, do not change it."""
    root = tmp_path_factory.mktemp("materialized")
    file = root / "campaigns" / "small.yaml"
    file.parent.mkdir()
    file.write_text(SMALL)
    home = Home(root / "home")
    return Materialized(run_through_dagster(file, home), home, file)


def run_through_dagster(file: Path, home: Home) -> Campaign:
    """Run a campaign file end to end, as `propensity demo` does, in this process."""
    import dagster as dg

    from propensity_dagster.components.campaign_folder import campaign_definitions
    from propensity_dagster.components.launch import run_campaign
    from propensity_dagster.runtime import Runtime

    campaign, runtime = load_campaign(file), Runtime(home.ensure())
    defs = dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": runtime}))
    with dg.DagsterInstance.ephemeral() as instance:
        run_campaign(campaign, runtime, defs, instance)
    return campaign


@pytest.fixture(scope="session")
def decisions(tmp_path_factory) -> Materialized:
    """A table of past decisions in the order of time, run through Dagster."""
    root = tmp_path_factory.mktemp("decisions")
    rng = np.random.default_rng(0)
    n = 4000
    x, town = rng.normal(size=n).round(2), rng.choice(["Ulm", "Bern", "Graz"], n)
    bought = (rng.random(n) < 1 / (1 + np.exp(2.5 - 2 * x - 2 * (town == "Ulm")))).astype(int)
    lines = [f"{i},{x[i]},{town[i]},{'' if i % 7 == 0 else i % 90},{bought[i]}" for i in range(n)]
    (root / "data.csv").write_text("\n".join(["id,x,town,age,bought", *lines]))
    (root / "past.yaml").write_text(
        "name: past\nsource: {kind: table, path: data.csv, key: id, order: file}\noutcome: {column: bought}\n"
        "min_converters: 50\nmodels: [baseline, logistic_regression, lightgbm, ensemble]\nsegments: [town]\n"
    )
    home = Home(root / "home")
    return Materialized(run_through_dagster(root / "past.yaml", home), home, root / "past.yaml")


@pytest.fixture(scope="session")
def newest_snapshot(materialized: Materialized) -> date:
    """The snapshot that was scored."""
    return materialized.home.lake("small").partitions("scores", "snapshot")[-1]


KINDS = ("baseline", "logistic_regression", "lightgbm", "neural_network", "ensemble")


@dataclass
class Registered:
    """A home in which each kind of model is a registered version; `versions` says which."""

    campaign: Campaign
    home: Home
    file: Path
    versions: dict[str, str]

    @property
    def store(self):
        from propensity_dagster.registry.mlflow_store import MlflowStore

        return MlflowStore(self.home)


@pytest.fixture(scope="session")
def all_registered(materialized: Materialized, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    """A copy of the materialized home with a version of every kind. Copy it before you change it."""
    from propensity_dagster.registry.mlflow_store import MlflowStore
    from propensity_dagster.scoring.candidates import read_evaluation

    root = tmp_path_factory.mktemp("registered")
    shutil.copytree(materialized.home.root, root / "home")
    # The registry knows where its artifacts are by absolute paths: those of the original, which stays.
    home, campaign = Home(root / "home"), materialized.campaign
    store, record = MlflowStore(home), read_evaluation(materialized.campaign, home)
    reports = root / "reports"
    reports.mkdir()
    for kind in KINDS:
        segments = {kind: record["segments"][record["challenger"]]}
        judged = {**record, "challenger": kind, "segments": segments}
        (reports / "evaluation.json").write_text(json.dumps(judged))
        store.record_training(campaign.name, home.candidates(campaign.name) / kind, judged, reports, {})
    versions = {version.model: version.version for version in store.versions(campaign.name)}
    return Registered(campaign, home, materialized.file, versions)


@pytest.fixture
def registered(all_registered: Registered, tmp_path: Path) -> Registered:
    """The same, for one test to change."""
    shutil.copytree(all_registered.home.root, tmp_path / "home")
    return Registered(all_registered.campaign, Home(tmp_path / "home"), all_registered.file, all_registered.versions)


@pytest.fixture
def redis_url(tmp_path):
    """A real server, where one is installed."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
    import redis

    client = redis.Redis(port=port)

    def answers() -> bool:
        try:
            return client.ping()
        except redis.exceptions.ConnectionError:
            return False

    wait_until(answers)
    yield f"redis://127.0.0.1:{port}/0", process
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def little_to_collect():
    """statsmodels' correction calls the garbage collector, which looks at all of pytest's objects each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory: pytest.TempPathFactory):
    """A server for the tests of a module: its URL without the password."""
    if postgres.binaries() is None:
        pytest.skip("no Postgres binaries on this machine")
    with postgres.server(tmp_path_factory.mktemp("postgres") / "server") as address:
        yield address
