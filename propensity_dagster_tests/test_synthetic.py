"""The generated world: seeded, dirty in the known ways, and honest about its own probabilities."""

from datetime import date

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from propensity_dagster.errors import ConfigError
from propensity_dagster.synthetic import open_world

WORLDS = {  # name: table and columns of the outcome's key and time
    "ecommerce": ("orders", "customer_id", "ordered_at"),
    "saas": ("upgrades", "account_id", "upgraded_at"),
    "bank": ("loans", "customer_id", "taken_up_at"),
    "outreach": ("responses", "contact_id", "responded_at"),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}
    for name in WORLDS:
        made[name] = open_world(f"synthetic://{name}?customers=30000&days=200&seed=11", tmp_path_factory.mktemp(name))
        made[name].ensure()
    return made


@pytest.fixture(scope="module")
def world(worlds):
    return worlds["ecommerce"]


def converters(world, snapshot: date, days: int) -> set[str]:
    table, key, time = WORLDS[world.name]
    sql = f"""
        SELECT DISTINCT CAST({key} AS VARCHAR) FROM '{world.tables}/{table}/*.parquet'
        WHERE {time} >= DATE '{snapshot}' AND {time} < DATE '{snapshot}' + {days} AND {key} IS NOT NULL
    """
    return {row[0] for row in duckdb.sql(sql).fetchall()}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(
    ("snapshot", "horizon"), [(date(2024, 3, 1), 30), (date(2024, 5, 5), 7), (date(2024, 4, 10), 60)]
)
def test_the_true_probabilities_are_true(worlds, name, snapshot, horizon):
    """Outcomes fall as often as the oracle says, overall and in each tenth; 4 standard errors."""
    world = worlds[name]
    assert world.outcome_table == WORLDS[name][0]
    keys, p = world.true_probability(snapshot, horizon)
    found = converters(world, snapshot, horizon)
    y = np.array([key in found for key in keys.tolist()], dtype=float)
    assert not y[p == 0].sum() or (p == 0).sum() < len(p)
    known = p > 0
    for rows in [known, *np.array_split(np.flatnonzero(known)[np.argsort(p[known])], 10)]:
        expected, spread = p[rows].sum(), np.sqrt((p[rows] * (1 - p[rows])).sum())
        assert abs(y[rows].sum() - expected) < 4 * spread + 1
    assert 0.002 < y[known].mean() < 0.12


@pytest.mark.parametrize(("snapshot", "horizon"), [(date(2024, 3, 1), 30), (date(2024, 4, 10), 60)])
def test_the_true_effect_of_the_treatment_is_true(worlds, snapshot, horizon):
    """Arms were drawn by lot: their difference is the mean of the true effects, in each fifth; 4 standard errors."""
    world = worlds["outreach"]
    keys, treated, control = world.true_effect(snapshot, horizon)
    sql = f"SELECT CAST(contact_id AS VARCHAR), arm FROM '{world.tables}/assignments.parquet'"
    arm = dict(duckdb.sql(sql).fetchall())
    is_treated = np.array([arm[key] == "treated" for key in keys.tolist()])
    found = converters(world, snapshot, horizon)
    y = np.array([key in found for key in keys.tolist()], dtype=float)
    there = (treated > 0) | (control > 0)
    assert 0.45 < is_treated[there].mean() < 0.75
    assert (treated - control)[there].mean() > 0.003
    assert ((treated - control)[there] < 0).mean() > 0.02, "there are sleeping dogs"
    order = np.flatnonzero(there)[np.argsort((treated - control)[there])]
    for rows in [order, *np.array_split(order, 5)]:
        a, b = rows[is_treated[rows]], rows[~is_treated[rows]]
        for group, p in ((a, treated), (b, control)):
            spread = np.sqrt((p[group] * (1 - p[group])).sum())
            assert abs(y[group].sum() - p[group].sum()) < 4 * spread + 1


@pytest.mark.parametrize("name", WORLDS)
def test_equal_seeds_give_equal_worlds(tmp_path, name):
    contents = []
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        world = open_world(f"synthetic://{name}?customers=300&days=30&seed={seed}", tmp_path / folder)
        world.ensure()
        files = [f for f in world.folder.rglob("*") if f.is_file() and f.name != "world.json"]
        contents.append({f.relative_to(world.folder): f.read_bytes() for f in files})
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


@pytest.mark.parametrize("name", WORLDS)
def test_the_smallest_world(tmp_path, name):
    open_world(f"synthetic://{name}?customers=1&days=3", tmp_path).ensure()


def test_the_truth_lies_where_no_source_reads(world):
    tables = {"customers.csv", "consents.parquet", "orders", "web_visits", "emails"}
    assert {p.name for p in world.tables.iterdir()} == tables
    assert (world.folder / "oracle" / "latents.parquet").exists()
    named = pq.read_schema(next((world.tables / "orders").glob("*.parquet"))).names
    assert named == ["order_id", "customer_id", "ordered_at", "amount", "category"]


def test_every_kind_of_dirt_is_there(world):
    def count(sql: str) -> int:
        return duckdb.sql(sql.replace("@", f"{world.tables}/")).fetchone()[0]

    assert count("SELECT count(*) FROM '@orders/*.parquet' WHERE amount < 0")
    assert count("SELECT count(*) FROM '@orders/*.parquet' WHERE isinf(amount)")
    assert count("SELECT count(*) FROM '@orders/*.parquet' WHERE ordered_at > '2099-01-01'")
    assert count("SELECT count(*) FROM '@orders/*.parquet' WHERE customer_id IS NULL")
    assert count("SELECT count(*) - count(DISTINCT order_id) FROM '@orders/*.parquet'")
    assert count("SELECT count(*) FROM '@web_visits/*.parquet' WHERE pages < 0")
    assert count("SELECT count(*) FROM '@emails/*.parquet' WHERE event = 'bounced'")
    assert "not a date" in (world.tables / "customers.csv").read_text()


MISTAKES = [
    ("synthetic://casino", "unknown synthetic world 'casino'; allowed are ecommerce, saas, bank, outreach"),
    ("synthetic://ecommerce?people=3", "unknown option 'people'; allowed are customers, seed, days"),
    ("synthetic://ecommerce?trouble=nonsense@2024-02-01", "unknown trouble 'nonsense'; allowed are units"),
    ("synthetic://ecommerce?trouble=units@soon", "trouble must be KIND@DATE such as units@2025-03-01"),
    (
        "synthetic://ecommerce?trouble=units@2027-01-01",
        "trouble units@2027-01-01 is outside the data, which go from 2024-01-01 to 2025-08-31",
    ),
    ("synthetic://saas?trouble=units@2024-02-01", "trouble is for ecommerce, not for saas"),
    ("synthetic://ecommerce?customers=many", "customers must be a positive whole number, got 'many'"),
    ("synthetic://ecommerce?days=0", "days must be a positive whole number, got '0'"),
]


@pytest.mark.parametrize(("connection", "message"), MISTAKES)
def test_mistaken_connections(tmp_path, connection, message):
    with pytest.raises(ConfigError, match="connection") as caught:
        open_world(connection, tmp_path)
    assert message in str(caught.value)
