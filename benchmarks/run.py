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
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import find_campaign
from propensity_dagster.components.automation import range_tags
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.evaluation.planner import Channel, Limits, Plan, SegmentLimit, plan
from propensity_dagster.explain.trees import build_tables, tree_contributions
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Calibrator
from propensity_dagster.models.dataset import CATEGORY, Dataset, FeatureContract, FeatureSpec
from propensity_dagster.models.linear import LogisticRegressionEstimator
from propensity_dagster.models.network import NeuralNetworkEstimator
from propensity_dagster.models.population import describe_population, number_buckets
from propensity_dagster.models.saved import load_model, write_model
from propensity_dagster.models.trees import LightGBMEstimator
from propensity_dagster.monitoring.domain import keep_reference
from propensity_dagster.monitoring.drift import publish_drift
from propensity_dagster.monitoring.stability import stability_index
from propensity_dagster.synthetic import open_world

ROWS, FEATURES, ROUNDS = 200_000, 40, 3
DRIFT_CAMPAIGN, DRIFT_SNAPSHOT = "ecommerce_purchase", date(2025, 9, 1)
DRIFT_TRAINED_ON = ["2025-03-01", "2025-04-01", "2025-05-01", "2025-06-01", "2025-07-01"]
DRIFT_ROWS, DRIFT_TRAINED = 1_000_000, 100_000


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


def benchmark_drift() -> list[tuple[str, str]]:
    """One snapshot compared with the rows the model learnt from, each in a process of its own, in turn with pandas."""
    with tempfile.TemporaryDirectory() as folder:
        in_a_process(make_drift_home, folder)
        found: dict[Callable[[str], tuple[float, float]], list[tuple[float, float]]] = {
            drift_here: [],
            drift_pandas: [],
        }
        for _ in range(ROUNDS):
            for work, kept in found.items():
                kept.append(in_a_process(work, folder))
    (ours, ours_gb), (theirs, theirs_gb) = (
        (median(s for s, _ in kept), max(gb for _, gb in kept)) for kept in found.values()
    )
    shown = (
        f"{ours:.1f} s, peak {ours_gb:.2f} GB, classifier and shares included; the index alone in pandas "
        f"{theirs:.1f} s, {theirs_gb:.2f} GB"
    )
    return [(f"drift, {DRIFT_ROWS:,} rows x {FEATURES}", shown)]


def in_a_process(work: Callable[[str], Any], folder: str) -> Any:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, folder).result()


def make_drift_home(folder: str) -> None:
    """A home with one model, the rows it learnt from, and a scored snapshot."""
    campaign, home = find_campaign(DRIFT_CAMPAIGN), Home(Path(folder)).ensure()
    train = training_data(DRIFT_TRAINED, 1)
    table = drift_table(train, campaign.key, 0, DRIFT_TRAINED_ON)
    fit = LogisticRegressionEstimator().fit(train, train)
    population = {
        **describe_population(table, train.contract, train.X),
        "scores": number_buckets(fit.validation_log_odds),
    }
    facts = {"population": population, "snapshots": {"train": DRIFT_TRAINED_ON}}
    model = FittedModel("logistic_regression", train.contract, fit.scorer, Calibrator(), facts)
    write_model(model, Path(folder) / "model")
    lake = home.lake(campaign.name)
    publish_table(table.append_column("split", pa.array(["train"] * len(table))), lake.file("training_set"))
    keep_reference(campaign, model, "1", home)
    files = [lake.partition(name, "snapshot", DRIFT_SNAPSHOT) for name in ("features", "scores")]
    for file in files:
        file.parent.mkdir(parents=True)
    with ExitStack() as open_files:
        writers: list[pq.ParquetWriter] = []
        for part in range(DRIFT_ROWS // DRIFT_TRAINED):
            rows = drift_table(training_data(DRIFT_TRAINED, 10 + part), campaign.key, part, [str(DRIFT_SNAPSHOT)])
            tables = (rows, pa.table({"probability": model.predict_proba(rows)}))
            if not writers:
                pairs = zip(files, tables, strict=True)
                writers = [open_files.enter_context(pq.ParquetWriter(file, t.schema)) for file, t in pairs]
            for writer, written in zip(writers, tables, strict=True):
                writer.write_table(written)


def drift_table(data: Dataset, key: str, part: int, snapshots: list[str]) -> pa.Table:
    """Encoded rows as the lake has them."""
    count = len(data.y)
    columns: dict[str, Any] = {key: pa.array(np.arange(part * count, (part + 1) * count)).cast("string")}
    for i, spec in enumerate(data.contract.features):
        column = pa.array(data.X[:, i], from_pandas=True)
        if spec.kind == CATEGORY:
            column = pa.DictionaryArray.from_arrays(column.cast("int8"), list(spec.categories)).cast("string")
        columns[spec.name] = column
    days = np.array(snapshots, "datetime64[D]")
    return pa.table({**columns, "snapshot": days[np.arange(count) % len(days)]})


def drift_here(folder: str) -> tuple[float, float]:
    campaign, home = find_campaign(DRIFT_CAMPAIGN), Home(Path(folder))
    model = load_model(Path(folder) / "model")
    with open_engine() as engine:
        took = seconds(lambda: publish_drift(campaign, DRIFT_SNAPSHOT, model, "1", home, engine))
    return took, peak_gb()


def drift_pandas(folder: str) -> tuple[float, float]:
    """What a script would do: all rows in a frame, the index of each column."""
    import pandas as pd

    lake = Home(Path(folder)).lake(DRIFT_CAMPAIGN)
    features = load_model(Path(folder) / "model").facts["population"]["features"]

    def work() -> None:
        frame = pd.read_parquet(lake.partition("features", "snapshot", DRIFT_SNAPSHOT))
        for name, known in features.items():
            if known["kind"] == CATEGORY:
                counts = frame[name].value_counts(dropna=False)
            else:
                counts = pd.cut(frame[name], [-np.inf, *known["edges"], np.inf]).value_counts(sort=False, dropna=False)
            before = np.array(known["counts"])[: len(counts)]
            stability_index(before, counts.to_numpy())

    return seconds(work), peak_gb()


def peak_gb() -> float:
    """Peak memory of this process since it began, in GB."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) / 1e6


def benchmark_plan() -> list[tuple[str, str]]:
    """Whom of a million customers to contact, with every kind of limit."""
    rng = np.random.default_rng(0)
    n = DRIFT_ROWS
    probability, segment, allowed = rng.beta(0.6, 12, n), rng.integers(0, 5, n), rng.random((n, 3)) < 0.7
    channels = [Channel("email", 0.05, n // 4), Channel("sms", 0.3), Channel("phone", 2.0)]
    segments = [SegmentLimit(str(k), segment == k, n // 50, n // 20) for k in range(5)]
    limits = Limits(n // 5, n * 0.06, segments)
    plans: list[Plan] = []
    took = median(
        seconds(lambda: plans.append(plan(probability, 22.5, channels, limits, allowed))) for _ in range(ROUNDS)
    )
    gap = plans[-1].gap
    return [
        (f"plan contacts of {n:,} customers, 3 channels, 13 limits", f"{took:.1f} s, within {gap:.1e} of the optimum")
    ]


def benchmark_world(customers: int) -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        world = open_world(f"synthetic://ecommerce?customers={customers}", Path(folder))
        took = seconds(world.ensure)
        events = sum(pq.read_metadata(f).num_rows for f in world.tables.glob("*/*.parquet"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return [(f"generate {customers:,} customers, {events:,} events", f"{took:.0f} s, peak {peak:.1f} GB")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--customers", type=int, default=0)
    customers = parser.parse_args().customers
    rows = benchmark_world(customers) if customers else []
    rows += benchmark_training() + benchmark_reasons() + benchmark_drift() + benchmark_plan() + benchmark_event_log()
    print(f"{date.today()}, {os.cpu_count()} cores\n\n| what | measured |\n|---|---|")
    for what, measured in rows:
        print(f"| {what} | {measured} |")


if __name__ == "__main__":
    main()
