"""The generated world: seeded, dirty in the known ways, and honest about its own probabilities."""

from datetime import date

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from propensity_dagster.errors import ConfigError
from propensity_dagster.synthetic import open_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = open_world("synthetic://ecommerce?customers=30000&days=200&seed=11", tmp_path_factory.mktemp("world"))
    made.ensure()
    return made


def converters(world, snapshot: date, days: int) -> set[str]:
    sql = f"""
        SELECT DISTINCT CAST(customer_id AS VARCHAR) FROM '{world.tables}/orders/*.parquet'
        WHERE ordered_at >= DATE '{snapshot}' AND ordered_at < DATE '{snapshot}' + {days} AND customer_id IS NOT NULL
    """
    return {row[0] for row in duckdb.sql(sql).fetchall()}


@pytest.mark.parametrize(
    ("snapshot", "horizon"), [(date(2024, 3, 1), 30), (date(2024, 5, 5), 7), (date(2024, 4, 10), 60)]
)
def test_the_true_probabilities_are_true(world, snapshot, horizon):
    """Outcomes fall as often as the oracle says, overall and in each tenth; 4 standard errors."""
    keys, p = world.true_probability(snapshot, horizon)
    found = converters(world, snapshot, horizon)
    y = np.array([key in found for key in keys.tolist()], dtype=float)
    assert not y[p == 0].sum() or (p == 0).sum() < len(p)
    known = p > 0
    for rows in [known, *np.array_split(np.flatnonzero(known)[np.argsort(p[known])], 10)]:
        expected, spread = p[rows].sum(), np.sqrt((p[rows] * (1 - p[rows])).sum())
        assert abs(y[rows].sum() - expected) < 4 * spread + 1
    assert 0.005 < y[known].mean() < 0.1


def test_equal_seeds_give_equal_worlds(tmp_path):
    contents = []
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        world = open_world(f"synthetic://ecommerce?customers=300&days=30&seed={seed}", tmp_path / folder)
        world.ensure()
        contents.append({f.relative_to(world.tables): f.read_bytes() for f in world.tables.rglob("*") if f.is_file()})
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_the_truth_lies_where_no_source_reads(world):
    assert {p.name for p in world.tables.iterdir()} == {"customers.csv", "orders", "web_visits", "emails"}
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
    ("synthetic://casino", "unknown synthetic world 'casino'; allowed are ecommerce"),
    ("synthetic://ecommerce?people=3", "unknown option 'people'; allowed are customers, seed, days"),
    ("synthetic://ecommerce?customers=many", "customers must be a positive whole number, got 'many'"),
    ("synthetic://ecommerce?days=0", "days must be a positive whole number, got '0'"),
]


@pytest.mark.parametrize(("connection", "message"), MISTAKES)
def test_mistaken_connections(tmp_path, connection, message):
    with pytest.raises(ConfigError, match="connection") as caught:
        open_world(connection, tmp_path)
    assert message in str(caught.value)
