"""Drift: no false alarm at any size, real shifts found by name, counting in the engine equal to counting by hand."""

import json
import shutil
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.errors import DataContractError
from propensity_dagster.models.saved import load_model
from propensity_dagster.monitoring.drift import (
    DISTRIBUTION,
    DOMAIN,
    DRIFT,
    MISSING,
    OUT_OF_RANGE,
    SCORE,
    TOGETHER,
    UNSEEN,
    publish_drift,
    read_drift,
)
from propensity_dagster.monitoring.findings import drift_findings
from propensity_dagster.monitoring.stability import judge_stability, stability_index
from propensity_dagster.registry.mlflow_store import MlflowStore
from propensity_dagster.scoring.batch import delivered_scores
from propensity_dagster.scoring.promotion import version_model

TENTHS = np.full(11, 1 / 11)
SHAPES = [
    TENTHS,
    np.array([0.8, *[0.02] * 10]),
    1 / np.arange(1, 201) ** 1.2,  # two hundred categories, most of them rare
    np.array([0.999, 0.001]),
    np.array([0.5, 0.5]),
]


SHARES = [0.0, 0.0005, 0.02, 0.3, 0.5, 0.97]


@pytest.mark.parametrize(("n", "m"), [(200, 200), (200, 400_000), (5_000, 20_000), (1_000_000, 1_000_000)])
def test_equal_distributions_raise_no_alarm(n, m):
    """At most 1% of snapshots of 20 columns and 12 shares: 0.5% are meant, and seven of 400 leave room for luck."""
    rng = np.random.default_rng(n + m)
    shapes = [shape / shape.sum() for shape in SHAPES] * 4
    shares = {f"share {i}": np.array([share, 1 - share]) for i, share in enumerate(SHARES * 2)}
    alarms = 0
    p_values: list[float] = []
    for _ in range(400):
        drawn = {str(i): shape for i, shape in enumerate(shapes)} | shares
        counts = {name: (rng.multinomial(m, q), rng.multinomial(n, q)) for name, q in drawn.items()}
        found = judge_stability(counts, shares=list(shares))
        alarms += any(stability.severity != "none" for stability in found.values())
        p_values += [stability.p_value for name, stability in found.items() if name not in shares]
    assert alarms <= 7
    assert 0.0005 < np.mean(np.array(p_values) < 0.01) < 0.02, "the law of the index holds"


@pytest.mark.parametrize(("n", "before", "after"), [(300, 0.0, 0.15), (1_000, 0.3, 0.45), (1_000_000, 0.02, 0.08)])
def test_shares_that_changed_are_found(n, before, after):
    """Rows gone missing, never seen or out of range in one of 80 shares, where 5% is the limit of what matters."""
    rng = np.random.default_rng(n)
    found = 0
    for _ in range(40):
        counts = {
            str(i): (rng.multinomial(20_000, [0.1, 0.9]), rng.multinomial(n, [0.1, 0.9])) for i in range(79)
        } | {"moved": (rng.multinomial(20_000, [before, 1 - before]), rng.multinomial(n, [after, 1 - after]))}  # fmt: skip
        found += judge_stability(counts, shares=list(counts))["moved"].severity != "none"
    assert found >= 38


@pytest.mark.parametrize(("n", "shift"), [(1_000, 0.6), (20_000, 0.35), (1_000_000, 0.35)])
def test_real_shifts_are_found(n, shift):
    """A column whose mean moved by a third of its deviation (more on few rows), among 39 that did not."""
    rng = np.random.default_rng(n)
    edges = np.quantile(rng.normal(size=100_000), np.arange(1, 10) / 10)
    found = 0
    for _ in range(40):
        counts = {str(i): (rng.multinomial(20_000, TENTHS), rng.multinomial(n, TENTHS)) for i in range(39)}
        reference, moved = (
            np.searchsorted(edges, rng.normal(mean, 1, size)) for mean, size in ((0, 20_000), (shift, n))
        )
        counts["moved"] = (np.bincount(reference, minlength=10), np.bincount(moved, minlength=10))
        judged = judge_stability(counts)
        found += judged["moved"].severity != "none"
    assert found >= 38


def test_the_index_is_the_textbooks():
    reference, current = np.array([200, 300, 500]), np.array([400, 300, 300])
    p, q = (current + 0.5) / 1001.5, (reference + 0.5) / 1001.5
    assert stability_index(reference, current) == pytest.approx(np.sum((p - q) * np.log(p / q)))
    assert stability_index(reference, reference) == 0


def test_snapshots_that_repeat_their_customers_are_fewer_witnesses():
    rng = np.random.default_rng(0)
    counts = {"a": (rng.multinomial(26_000, TENTHS), rng.multinomial(1_000, TENTHS))}
    all_rows, one_snapshot = judge_stability(counts)["a"], judge_stability(counts, 1_000)["a"]
    assert one_snapshot.by_chance > all_rows.by_chance
    assert one_snapshot.p_value > all_rows.p_value


@pytest.mark.parametrize("counts", [([0, 0], [0, 0]), ([5, 0], [0, 0]), ([0, 0], [3, 0]), ([10], [10])])
def test_nothing_to_compare_is_no_alarm(counts):
    found = judge_stability({"a": (np.array(counts[0]), np.array(counts[1]))})["a"]
    assert (found.severity, found.p_value) == ("none", 1.0)
    assert judge_stability({}) == {}


class Drifting:
    """A copy of the small campaign's home whose scored snapshot can be changed."""

    def __init__(self, given, root, snapshot):
        shutil.copytree(given.home.lake("small").root, Home(root).lake("small").root)
        self.campaign, self.home, self.snapshot = given.campaign, Home(root), snapshot
        store = MlflowStore(given.home)
        self.version = list(delivered_scores(self.campaign, snapshot, self.home))[-1]
        self.model = version_model(self.campaign, store, self.version)
        self.features = self.home.lake("small").partition("features", "snapshot", snapshot)

    def replace(self, name, column):
        table = pq.read_table(self.features)
        pq.write_table(table.set_column(table.column_names.index(name), name, column(table[name])), self.features)

    def run(self, snapshot=None):
        day = snapshot or self.snapshot
        with open_engine() as engine:
            report = publish_drift(self.campaign, day, self.model, self.version, self.home, engine)
        rows = read_drift(self.campaign, day, self.home)
        against = [row for row in rows if row["against"] == "training" and row["measure"] != DOMAIN]
        self.shares = {(r["column"], r["measure"]): r for r in against if r["measure"] != DISTRIBUTION}
        return report, {row["column"]: row for row in against if row["measure"] == DISTRIBUTION}, rows


@pytest.fixture
def drifting(materialized, newest_snapshot, tmp_path):
    return Drifting(materialized, tmp_path / "home", newest_snapshot)


def test_counts_of_the_engine_are_those_by_hand(drifting):
    _, found, _ = drifting.run()
    table = pq.read_table(drifting.features)
    population = drifting.model.facts["population"]
    assert set(found) == {*drifting.model.contract.names, SCORE}
    for name in ("age", "orders_recency_days", "visits_count_30d", "emails_open_rate_90d"):  # shares sit on edges
        known = population["features"][name]
        values = table[name].cast(pa.float64()).to_numpy()
        there = values[~np.isnan(values)]
        buckets = np.bincount(np.searchsorted(known["edges"], there), minlength=len(known["edges"]) + 1)
        counts = np.append(buckets, len(values) - len(there))
        assert found[name]["value"] == pytest.approx(stability_index(np.array(known["counts"]), counts))
        shares = {MISSING: np.isnan(values).mean()}
        outside = (there < known["lowest"]) | (there > known["highest"])
        shares[OUT_OF_RANGE] = outside.sum() / len(values)
        for measure, share in shares.items():
            row = drifting.shares.get((name, measure), {"value": 0.0})
            assert row["value"] == pytest.approx(share)
    for feature in population["features"].values():
        assert sum(feature["counts"]) == population["rows"]


TROUBLE = {
    "other units": ("visits_pages_sum_90d", lambda c: pc.multiply(c.cast(pa.float64()), 100.0), "above"),
    "gone missing": ("visits_count_30d", lambda c: pa.nulls(len(c), c.type), "missing"),
    "all the same": ("age", lambda c: pa.array([30.0] * len(c), c.type), "% now"),
    "new categories": ("country", lambda c: pa.array([f"new {i}" for i in range(len(c))], pa.string()), "unseen"),
    "one category": ("channel", lambda c: pa.array(["email"] * len(c), pa.string()), "search"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_is_named_and_nothing_else_is(drifting, trouble):
    name, change, bucket = TROUBLE[trouble]
    _, before, _ = drifting.run()
    drifting.replace(name, change)
    report, after, _ = drifting.run()
    assert after[name]["severity"] == "alert"
    assert bucket in after[name]["detail"]
    assert report.severity == "alert"
    assert any(words.startswith(f"{name} against training") for words in report.drifted)
    changed = {n for n in after if after[n]["value"] != pytest.approx(before[n]["value"])}
    assert changed == {name}


def test_no_value_of_a_customer_is_in_a_finding(drifting):
    drifting.replace("country", lambda c: pa.array([f"jane{i}@example.com" for i in range(len(c))], pa.string()))
    drifting.replace("channel", lambda c: pa.array(["search"] * len(c), pa.string()))
    _, _, rows = drifting.run()
    words = json.dumps([finding.to_json() for finding in drift_findings(rows)])
    assert "country" in words
    assert "channel" in words
    assert "jane" not in words
    assert "search" not in words


def test_a_hundred_thousand_categories(drifting):
    drifting.replace("country", lambda c: pa.array([f"place {i}" for i in range(len(c))], pa.string()))
    _, found, _ = drifting.run()
    assert found["country"]["severity"] == "alert"
    row = drifting.shares["country", UNSEEN]
    assert (row["value"], row["usual"], row["severity"]) == (1.0, 0.0, "alert")


def test_the_snapshot_before_counts_only_if_the_same_model_scored_it(drifting):
    lake = drifting.home.lake("small")
    day = drifting.snapshot - timedelta(days=7)
    for table in ("features", "scores"):
        source, target = (lake.partition(table, "snapshot", d) for d in (drifting.snapshot, day))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    report, _, rows = drifting.run()
    assert report.compared_with == ("training", str(day))
    assert all(row["value"] == 0 for row in rows if row["against"] == "previous" and row["measure"] == DISTRIBUTION)
    scores = pq.read_table(lake.partition("scores", "snapshot", day))
    other = scores.set_column(
        scores.column_names.index("model_version"), "model_version", pa.array(["9"] * len(scores))
    )
    pq.write_table(other, lake.partition("scores", "snapshot", day))
    assert drifting.run()[0].compared_with == ("training",)


def test_the_same_snapshot_gives_the_same_bytes(drifting):
    file = drifting.home.lake("small").partition(DRIFT, "snapshot", drifting.snapshot)
    drifting.run()
    first = file.read_bytes()
    drifting.run()
    assert file.read_bytes() == first


def test_what_cannot_be_compared_says_so(drifting, materialized):
    lake = drifting.home.lake("small")
    with pytest.raises(DataContractError, match="features snapshot=2020-01-01 has not been materialized yet"):
        drifting.run(date(2020, 1, 1))
    scores = lake.partition("scores", "snapshot", drifting.snapshot)
    pq.write_table(pq.read_table(scores).slice(0, 0), scores)
    with pytest.raises(DataContractError, match="has no scores: nobody was eligible"):
        delivered_scores(drifting.campaign, drifting.snapshot, drifting.home)
    pq.write_table(pq.read_table(drifting.features).slice(0, 0), drifting.features)
    with pytest.raises(DataContractError, match="has no rows: nothing can be said of drift"):
        drifting.run()
    model = load_model(materialized.home.candidates("small") / "lightgbm")
    model.facts.pop("population")
    drifting.model = model
    with pytest.raises(DataContractError, match="Train again to see drift"):
        drifting.run()


def test_the_nightly_run_publishes_drift(materialized, newest_snapshot):
    table = pq.read_table(materialized.home.lake("small").partition(DRIFT, "snapshot", newest_snapshot))
    assert set(table["against"].to_pylist()) == {"training"}
    keys = set(zip(table["column"].to_pylist(), table["measure"].to_pylist(), strict=True))
    assert len(keys) == table.num_rows
    (score,) = [r for r in table.to_pylist() if r["column"] == SCORE and r["measure"] == DISTRIBUTION]
    assert score["value"] < 0.1
    (together,) = [row for row in table.to_pylist() if row["column"] == TOGETHER]
    assert 0.5 < together["value"] < 1
    assert "%" in together["detail"]


def test_a_move_of_two_columns_together_is_seen_by_the_classifier(drifting, materialized, newest_snapshot):
    """Each column alone stays as it is: only what goes with what has changed."""
    shutil.copytree(
        materialized.home.lake("small").root / "reference", drifting.home.lake("small").root / "reference",
        dirs_exist_ok=True,
    )  # fmt: skip
    before = next(row for row in drifting.run()[2] if row["measure"] == DOMAIN)
    rng = np.random.default_rng(0)
    for name in ("visits_pages_sum_90d", "visits_count_90d"):
        drifting.replace(name, lambda c: c.take(pa.array(rng.permutation(len(c)))))
    report, found, rows = drifting.run()
    after = next(row for row in rows if row["measure"] == DOMAIN)
    assert all(found[n]["severity"] == "none" for n in ("visits_count_90d", "visits_pages_sum_90d"))
    assert after["severity"] == "alert"
    assert after["value"] > before["value"] + 0.1
    assert "90d" in after["detail"]
    assert report.domain_auc == after["value"]


def test_a_version_without_reference_says_so(drifting):
    shutil.rmtree(drifting.home.lake("small").root / "reference")
    together = next(row for row in drifting.run()[2] if row["measure"] == DOMAIN)
    assert together["value"] is None
    assert "registered before its training rows were kept" in together["detail"]


def test_two_runs_at_once_leave_one_whole_table(drifting):
    from concurrent.futures import ThreadPoolExecutor

    drifting.run()
    file = drifting.home.lake("small").partition(DRIFT, "snapshot", drifting.snapshot)
    alone = file.read_bytes()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: drifting.run(), range(2)))
    assert file.read_bytes() == alone


def test_a_hundred_rows_are_compared_and_none_is_no_zero(drifting):
    pq.write_table(pq.read_table(drifting.features).slice(0, 99), drifting.features)
    report, _, rows = drifting.run()
    assert report.rows == 99
    together = next(row for row in rows if row["measure"] == DOMAIN)
    assert together["value"] is None
    assert together["detail"].startswith("not compared: fewer than 100 rows on one side")
