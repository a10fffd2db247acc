"""What the foundation promises about time, measured as ratios in one run where there is a peer.

    python -m benchmarks.run [--customers 1000000]

Prints a Markdown table. The world of --customers (0 by default: skipped) is made in a temporary folder.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import dagster as dg
import numpy as np
import pyarrow.parquet as pq

from propensity_dagster.components.automation import range_tags
from propensity_dagster.explain.trees import build_tables, tree_contributions
from propensity_dagster.models.dataset import Dataset, FeatureContract, FeatureSpec
from propensity_dagster.models.linear import LogisticRegressionEstimator
from propensity_dagster.models.network import NeuralNetworkEstimator
from propensity_dagster.models.trees import LightGBMEstimator
from propensity_dagster.synthetic import open_world

ROWS, FEATURES, ROUNDS = 200_000, 40, 3


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def training_data(rows: int, seed: int) -> Dataset:
    """Heavy-tailed counts, missing values and two categories; 3% convert."""
    rng = np.random.default_rng(seed)
    X = np.asfortranarray(rng.lognormal(0, 1.5, (rows, FEATURES)).round(1))
    X[rng.random(X.shape) < 0.1] = np.nan
    X[:, -2:] = rng.integers(0, 6, (rows, 2))
    z = -4.3 + 0.5 * np.nan_to_num(np.log1p(X[:, 0])) + 0.6 * (np.nan_to_num(X[:, 1]) > 2) + 0.2 * X[:, -1]
    y = (rng.random(rows) < 1 / (1 + np.exp(-z))).astype(float)
    specs = [FeatureSpec(f"f{i}", "number") for i in range(FEATURES - 2)]
    specs += [FeatureSpec(f"c{i}", "category", tuple("abcdef")) for i in range(2)]
    return Dataset(X, y, rng.integers(0, 5, rows), FeatureContract(tuple(specs)))


def benchmark_training() -> list[tuple[str, str]]:
    train, validate = training_data(ROWS, 1), training_data(ROWS // 5, 2)
    estimators = (LogisticRegressionEstimator(), LightGBMEstimator(), NeuralNetworkEstimator())
    return [
        (
            f"train {type(e).__name__.removesuffix('Estimator')}, {ROWS:,} rows x {FEATURES}",
            f"{seconds(lambda e=e: e.fit(train, validate)):.1f} s",
        )
        for e in estimators
    ]


def benchmark_reasons() -> list[tuple[str, str]]:
    """Exact contributions of the default model: ours against LightGBM's own, in turn, on the same rows."""
    train = training_data(ROWS, 1)
    booster = LightGBMEstimator().refit(train, 300).booster
    began = time.perf_counter()
    tables = build_tables(booster)
    built = time.perf_counter() - began
    assert tables is not None
    tables.contributions(train.X[:10])  # compiled here
    ours, theirs, predictions = [], [], []
    rows = train.X[:10_000]
    for _ in range(ROUNDS):
        ours.append(seconds(lambda: tables.contributions(rows)) / len(rows) * 1e6)
        theirs.append(seconds(lambda: tree_contributions(booster, None, rows)) / len(rows) * 1e6)
        predictions.append(seconds(lambda: booster.predict(rows, raw_score=True)) / len(rows) * 1e6)
    ratio = median(a / b for a, b in zip(theirs, ours, strict=True))
    shown = (
        f"{median(ours):.0f} us a row; `pred_contrib` {median(theirs):.0f} us ({ratio:.1f} times), a prediction "
        f"{median(predictions):.0f} us; tables {tables.table.nbytes / 2**20:.0f} MiB in {built:.1f} s"
    )
    return [(f"reasons of LightGBM, 300 trees x 15 leaves x {FEATURES}", shown)]


def benchmark_event_log() -> list[tuple[str, str]]:
    """One run over 365 partitions with Dagster's SQLite event log and with ours, in turn."""
    days = range_tags(date(2024, 1, 1), date(2024, 12, 30))

    @dg.asset(
        partitions_def=dg.DailyPartitionsDefinition("2024-01-01", end_date="2025-01-01"),
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def table() -> dg.MaterializeResult:
        return dg.MaterializeResult()

    ours = {"module": "propensity_dagster.components.event_log", "class": "BatchingSqliteEventLogStorage"}
    found: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(ROUNDS):
        for name, overrides in (("theirs", {}), ("ours", {"event_log_storage": ours})):
            os.environ["DAGSTER_EVENT_BATCH_SIZE"] = "0" if name == "theirs" else "1000"
            with tempfile.TemporaryDirectory() as home, dg.instance_for_test(overrides, temp_dir=home) as instance:
                found[name].append(seconds(lambda i=instance: dg.materialize([table], instance=i, tags=days)))
    ratios = [a / b for a, b in zip(found["theirs"], found["ours"], strict=True)]
    shown = f"{median(found['ours']):.1f} s; Dagster's own {median(found['theirs']):.1f} s ({median(ratios):.1f} times)"
    return [("record a run over 365 partitions", shown)]


def benchmark_world(customers: int) -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        world = open_world(f"synthetic://ecommerce?customers={customers}", Path(folder))
        took = seconds(world.ensure)
        events = sum(pq.read_metadata(f).num_rows for f in world.tables.rglob("*.parquet"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return [(f"generate {customers:,} customers, {events:,} events", f"{took:.0f} s, peak {peak:.1f} GB")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--customers", type=int, default=0)
    customers = parser.parse_args().customers
    rows = benchmark_world(customers) if customers else []
    rows += benchmark_training() + benchmark_reasons() + benchmark_event_log()
    print(f"{date.today()}, {os.cpu_count()} cores\n\n| what | measured |\n|---|---|")
    for what, measured in rows:
        print(f"| {what} | {measured} |")


if __name__ == "__main__":
    main()
