"""What Dagster costs: the same work as calls and as a run, a run over many partitions, and the start of a process."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.measure import Figure, contest, prepare
from benchmarks.pipeline import SNAPSHOT, WEEKLY, make_lake, shop
from propensity_dagster.campaign import EventCampaign
from propensity_dagster.data.lake import Home
from propensity_dagster.features.snapshots import publish_features, publish_labels
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Calibrator
from propensity_dagster.models.dataset import FeatureContract, make_dataset
from propensity_dagster.models.linear import LogisticRegressionEstimator
from propensity_dagster.models.saved import write_model
from propensity_dagster.runtime import Runtime

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
_OURS = {"storage": {"custom": {"module": "propensity_dagster.components.storage", "class": "HomeStorage"}}}


def benchmark(sizes: list[int], folder: Path) -> list[Figure]:
    """The nightly score at these numbers of customers; partitions and campaign files in numbers of their own."""
    prepare(make_lake, folder, sizes)
    prepare(make_champion, folder, sizes)
    return [
        *contest(
            "nightly features and scores",
            sizes,
            "customers",
            {"Dagster": as_run, "as calls": as_calls},
            folder,
            rounds=2,
        ),
        *contest(
            "record a run", [30, 120, 365], "partitions", {"ours": record_ours, "Dagster's": record_theirs}, folder, 2
        ),
        *contest(
            "load campaign files",
            [1, 10, 100],
            "files",
            {"ours": load_files, "import dagster": Import("dagster")},
            folder,
            rounds=1,
        ),
        *contest(
            "start of the command line",
            [1],
            "process",
            {"ours": Import("propensity_dagster.cli"), "import typer": Import("typer")},
            folder,
        ),
        *contest(
            "start of a service's worker",
            [1],
            "process",
            {
                "ours": Import("propensity_dagster.serving.service"),
                "what it imports of BentoML": Import("bentoml; bentoml.service"),
            },
            folder,
        ),
    ]


def make_champion(folder: Path, size: int) -> None:
    """A regression, taught one older snapshot: a night costs the same whatever its champion learnt from."""
    campaign, home = shop(folder, size)
    runtime, lake, kind = Runtime(home), home.lake(campaign.name), "logistic_regression"
    if runtime.store.champion(campaign.name) is not None:
        return
    with runtime.engine() as engine:
        publish_features(campaign, WEEKLY[-1:], home, engine)
        publish_labels(campaign, WEEKLY[-1:], home, engine)
    features, labels = (pq.read_table(lake.partition(name, "snapshot", WEEKLY[-1])) for name in ("features", "labels"))
    table = features.append_column("converted", labels["converted"])  # the same rows, in the order of their keys
    data = make_dataset(table, FeatureContract.fit(table, campaign.key), campaign.key)
    facts = {"calibration_rate": float(data.y.mean()), "snapshots": {"train": [str(WEEKLY[-1])]}}
    model = FittedModel(kind, data.contract, LogisticRegressionEstimator().refit(data, 0), Calibrator(), facts)
    saved = home.candidates(campaign.name) / kind
    write_model(model, saved, data.X)
    record = {"challenger": kind, "models": {}}
    version = runtime.store.record_training(campaign.name, saved, record, home.reports(campaign.name), {})
    runtime.store.promote(campaign.name, version.version, "of the benchmark")


def definitions(campaign: EventCampaign, home: Home) -> Any:
    import dagster as dg

    from propensity_dagster.components.campaign_folder import campaign_definitions

    return dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": Runtime(home)}))


def as_run(folder: Path, size: int) -> Callable[[], object]:
    """Three assets of the job, with their checks and records."""
    import dagster as dg

    from propensity_dagster.components.automation import score_job_name

    campaign, home = shop(folder, size)
    job = definitions(campaign, home).resolve_job_def(score_job_name(campaign))
    keys = [dg.AssetKey([campaign.name, name]) for name in ("features", "scores", "online_features")]
    os.environ["DAGSTER_EVENT_BATCH_SIZE"] = "1000"

    def action() -> None:
        with (
            tempfile.TemporaryDirectory() as root,
            dg.instance_for_test(_OURS, temp_dir=root) as instance,
        ):
            job.execute_in_process(
                instance=instance,
                partition_key=str(SNAPSHOT),
                asset_selection=keys,
                run_config=_QUIET,
            )

    return action


def as_calls(folder: Path, size: int) -> Callable[[], object]:
    """What those assets call."""
    from propensity_dagster.features.audit import audit_features
    from propensity_dagster.scoring.batch import score_snapshot, score_violations
    from propensity_dagster.scoring.promotion import require_champion
    from propensity_dagster.serving.publish.online_features import publish_online_features

    campaign, home = shop(folder, size)
    runtime = Runtime(home)

    def action() -> None:
        with runtime.engine() as engine:
            publish_features(campaign, [SNAPSHOT], home, engine)
            audit_features(campaign, [SNAPSHOT], home, engine)
        version, model = require_champion(campaign, runtime.store)
        with runtime.engine() as engine:
            score_snapshot(campaign, SNAPSHOT, model, version, datetime(2025, 8, 1, 2), home, engine)
            score_violations(campaign, SNAPSHOT, home, engine)
        publish_online_features(campaign, SNAPSHOT, home)

    return action


def record_ours(_folder: Path, size: int) -> Callable[[], object]:
    return _record(size, "1000", _OURS)


def record_theirs(_folder: Path, size: int) -> Callable[[], object]:
    return _record(size, "0", {})


def _record(partitions: int, batch: str, overrides: dict[str, object]) -> Callable[[], object]:
    import dagster as dg

    from propensity_dagster.components.automation import range_tags

    first = date(2024, 1, 1)
    days = range_tags(first, date.fromordinal(first.toordinal() + partitions - 1))

    @dg.asset(
        partitions_def=dg.DailyPartitionsDefinition("2024-01-01", end_date="2025-06-01"),
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def table() -> dg.MaterializeResult:
        return dg.MaterializeResult()

    os.environ["DAGSTER_EVENT_BATCH_SIZE"] = batch

    def action() -> None:
        with tempfile.TemporaryDirectory() as home, dg.instance_for_test(overrides, temp_dir=home) as instance:
            dg.materialize([table], instance=instance, tags=days, run_config=_QUIET)

    return action


def load_files(folder: Path, size: int) -> Callable[[], object]:
    """The whole code location, in a process of its own."""
    campaign, _ = shop(folder, 1)
    files = folder / f"campaigns-{size}"
    files.mkdir(exist_ok=True)
    text = campaign.file.read_text(encoding="utf-8")
    for i in range(size):
        (files / f"c{i}.yaml").write_text(text.replace("name: ecommerce_purchase", f"name: c{i}"), encoding="utf-8")
    code = "from propensity_dagster.definitions import defs; defs().resolve_all_job_defs()"
    environment = {**os.environ, "PROPENSITY_CAMPAIGNS": str(files), "PROPENSITY_HOME": str(folder / "empty")}
    return lambda: subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


class Import:
    """A module, imported by a process of its own. A class, for a process can be sent it."""

    def __init__(self, module: str) -> None:
        self.command = [sys.executable, "-c", f"import {module}"]

    def __call__(self, _folder: Path, _size: int) -> Callable[[], object]:
        return lambda: subprocess.run(self.command, check=True)
