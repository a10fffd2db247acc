"""`propensity new`: from data alone to a campaign file that the doctor has nothing against."""

import os
import re
import shlex
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from propensity_dagster.campaign import EventCampaign, TableCampaign, load_campaign
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.doctor.draft import draft_campaign
from propensity_dagster.errors import ConfigError, PropensityError

from .conftest import SHARED_DATA
from .test_cli import README
from .test_databases import fill_sqlite
from .test_doctor import sound
from .test_tables import made_up


def drafted(tmp_path: Path, data: Path | str, outcome: str | None = None):
    with open_engine() as engine:
        file, diagnosis = draft_campaign(
            "drafted", str(data), outcome, tmp_path / "out", Home(tmp_path / "home"), engine
        )
    return load_campaign(file), diagnosis, file.read_text()


def test_a_table_with_traps(tmp_path):
    rows = 4_000
    at = [datetime(2024, 1, 1) + timedelta(minutes=i) for i in range(rows)]
    table = sound(
        rows,
        decided_at=lambda r, y: at,
        settled_at=lambda r, y: [t + timedelta(days=9) for t in at],
        status=lambda r, y: np.where(y, "won", "lost"),
        currency=lambda r, y: ["EUR"] * len(y),
        region_id=lambda r, y: r.integers(1, 9, len(y)),
    )
    pq.write_table(table, tmp_path / "past deals.parquet")
    campaign, diagnosis, text = drafted(tmp_path, tmp_path / "past deals.parquet")
    assert isinstance(campaign, TableCampaign)
    assert not diagnosis.errors
    assert campaign.source.key == "customer"
    assert campaign.source.order == "decided_at"
    assert campaign.outcome.column == "bought"
    assert set(campaign.exclude) == {"settled_at", "status", "currency"}
    assert campaign.source.attributes["region_id"].type == "category"
    assert "# the newest rows are the test" in text


def test_a_folder_of_logs(tmp_path):
    rng = np.random.default_rng(5)
    start = datetime(2023, 1, 1)
    source = tmp_path / "shop"
    source.mkdir()
    n, people = 9_000, 800
    times = [start + timedelta(minutes=int(m)) for m in np.sort(rng.integers(0, 600 * 1440, n))]
    orders = {
        "order_id": [f"o{i}" for i in range(n)],
        "customer_id": rng.integers(0, people, n),
        "ordered_at": times,
        "amount": rng.lognormal(3, 1, n).round(2),
        "category": [("toys", "books")[i % 2] for i in range(n)],
    }
    pq.write_table(pa.table(orders), source / "orders.parquet")
    mails = {
        "customer_id": rng.integers(0, people, n),
        "at": times,
        "event": rng.choice(["sent", "open", "click"], n, p=[0.7, 0.2, 0.1]),
    }
    pq.write_table(pa.table(mails), source / "mails.parquet")
    customers = "customer_id,signup_at,age,country\n" + "".join(
        f"{i},2022-{1 + i % 12:02d}-01,{20 + i % 50},{('DE', 'FR')[i % 2]}\n" for i in range(people)
    )
    (source / "customers.csv").write_text(customers)
    campaign, diagnosis, _ = drafted(tmp_path, source)
    assert isinstance(campaign, EventCampaign)
    assert not diagnosis.errors
    assert campaign.key == "customer_id"
    assert campaign.source.entities.table == "customers"
    assert {n: a.type for n, a in campaign.attributes.items()} == {"age": "number", "country": "category"}
    assert campaign.outcome.stream == "orders"
    assert (campaign.source.streams["orders"].id, campaign.source.streams["orders"].amount) == ("order_id", "amount")
    assert campaign.source.streams["mails"].types == ("sent", "open", "click")
    assert campaign.snapshots.train == 26
    assert campaign.source.first_day == start.date()


def test_a_database(tmp_path):
    campaign, diagnosis, _ = drafted(tmp_path, fill_sqlite(tmp_path))
    assert isinstance(campaign, EventCampaign)
    assert campaign.source.connection.startswith("sqlite://")
    assert {f.code for f in diagnosis.errors} <= {"P102", "P204"}
    assert campaign.source.entities.table == "customers"


MISTAKES = [
    ("nowhere", None, "'nowhere' is not there"),
    ("texts.csv", None, "has no column of two values: say --outcome COLUMN; there are a, b"),
    ("texts.csv", "c", "--from: texts has no column 'c'"),
    ("empty", None, "holds no table"),
]


@pytest.mark.parametrize(("data", "outcome", "message"), MISTAKES)
def test_what_cannot_be_drafted(tmp_path, monkeypatch, data, outcome, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.csv").write_text("a,b\n1,x\n2,y\n3,z\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PropensityError) as caught:
        drafted(tmp_path, data, outcome)
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("drafted.yaml"))


def test_dates_of_another_form_and_repeating_customers(tmp_path):
    table = made_up(4_000)
    days = [t.strftime("%d.%m.%Y") for t in table["decided"].to_pylist()]
    won = pa.array(["Won" if v else "Lost" for v in table["bought"].to_pylist()])
    table = (
        table.drop_columns(["decided", "bought"]).append_column("Offer.Date", pa.array(days)).append_column("End", won)
    )
    table = table.rename_columns(["Kunden ID" if n == "customer" else n for n in table.column_names])
    duckdb.from_arrow(table).write_csv(str(tmp_path / "offers.csv"), sep=";")
    campaign, diagnosis, _ = drafted(tmp_path, tmp_path / "offers.csv")
    assert isinstance(campaign, TableCampaign)
    assert (campaign.source.order, campaign.source.time_format) == ("Offer.Date", "%d.%m.%Y")
    assert campaign.source.key == "Kunden ID"
    assert (campaign.outcome.column, campaign.outcome.positive) == ("End", "Won")
    assert not diagnosis.errors


def test_a_database_file_by_its_name(tmp_path):
    fill_sqlite(tmp_path)
    (tmp_path / "shop.sqlite").rename(tmp_path / "shop.db")
    campaign, *_ = drafted(tmp_path, tmp_path / "shop.db")
    assert campaign.source.connection.startswith("sqlite://")


def test_a_name_that_is_none(tmp_path):
    with open_engine() as engine, pytest.raises(ConfigError, match="lower-case letters, digits and underscores"):
        draft_campaign("My Offers", str(tmp_path), None, tmp_path, Home(tmp_path / "home"), engine)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "drafted.yaml").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        drafted(tmp_path, tmp_path)
    assert (tmp_path / "out" / "drafted.yaml").read_text() == "precious"


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real data are not part of the repository")
@pytest.mark.parametrize(
    "place",
    [
        "online_shoppers/online_shoppers_intention.csv",
        "bank_marketing/bank-additional-full.csv",
        "coil2000/coil2000.parquet",
        "hillstrom/hillstrom.parquet",
        "online_retail",
        "cdnow",
    ],
)
def test_real_data(tmp_path, place):
    _, diagnosis, _ = drafted(tmp_path, SHARED_DATA / place)
    assert not diagnosis.errors, [f.sentence for f in diagnosis.errors]


def test_the_readme_from_data_to_scores(tmp_path):
    """What a new user types, word for word, and nothing else."""
    (block,) = re.findall(r"## Your own data\n.*?```sh\n(.*?)```", README, re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    calls = made_up(15_000).drop_columns(["decided"])
    duckdb.from_arrow(calls).write_csv(str(tmp_path / "calls.csv"), sep=";")
    fresh = made_up(300, seed=3).drop_columns(["decided", "bought"]).slice(0, 150)
    duckdb.from_arrow(fresh).write_csv(str(tmp_path / "new_calls.csv"), sep=";")
    environment = {**os.environ, "PROPENSITY_HOME": str(tmp_path / "home")}
    shown = {}
    for words in lines:
        if "dev" in words:  # it does not end; test_cli.py starts it
            continue
        line = [sys.executable, "-m", "propensity_dagster.cli", *words[1:]]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        shown[words[1]] = " ".join(done.stdout.split())
    assert list(shown) == ["new", "doctor", "demo", "score"]
    assert "nothing stands against training" in shown["new"]
    assert "nothing stands against training" in shown["doctor"]
    assert "is promoted" in shown["demo"]
    assert pq.read_metadata(shown["score"].split()[-1]).num_rows == 150
