"""What Dagster costs: the same work as calls and as a run, a run over many partitions, and the start of a process."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure, contest, in_a_process
from benchmarks.pipeline import SNAPSHOT, make_lake, shop
from propensity_dagster.campaign import EventCampaign
from propensity_dagster.campaign_sections import Candidate
from propensity_dagster.data.lake import Home
from propensity_dagster.runtime import Runtime

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
_OURS = {"module": "propensity_dagster.components.event_log", "class": "BatchingSqliteEventLogStorage"}


def benchmark(sizes: list[int], folder: Path) -> list[Figure]:
    """The nightly score at these numbers of customers; partitions and campaign files in numbers of their own."""
    for size in sizes:
        in_a_process(make_lake, folder, size)
        in_a_process(make_champion, folder, size)
    return [
        *contest("nightly features and scores", sizes, "customers", {"Dagster": as_run, "as calls": as_calls}, folder),
        *contest(
            "record a run", [30, 120, 365], "partitions", {"ours": record_ours, "Dagster's": record_theirs}, folder
        ),
        *contest(
            "load campaign files",
            [1, 10, 100],
            "files",
            {"ours": load_files, "import dagster": import_dagster},
            folder,
            rounds=1,
        ),
    ]


def campaign_of(folder: Path, size: int) -> tuple[EventCampaign, Home]:
    campaign, home = shop(folder, size)
    models = tuple(Candidate.model_validate({"name": name}) for name in ("baseline", "logistic_regression"))
    return campaign.model_copy(update={"models": models, "min_converters": 50}), home


def make_champion(folder: Path, size: int) -> None:
    import dagster as dg

    from propensity_dagster.components.automation import train_job_name

    campaign, home = campaign_of(folder, size)
    if Runtime(home).store.champion(campaign.name) is None:
        with dg.DagsterInstance.ephemeral() as instance:
            definitions(campaign, home).resolve_job_def(train_job_name(campaign)).execute_in_process(
                run_config=_QUIET, instance=instance
            )


def definitions(campaign: EventCampaign, home: Home) -> Any:
    import dagster as dg

    from propensity_dagster.components.campaign_folder import campaign_definitions

    return dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": Runtime(home)}))


def as_run(folder: Path, size: int) -> Callable[[], object]:
    """Three assets of the job, with their checks and records."""
    import dagster as dg

    from propensity_dagster.components.automation import score_job_name

    campaign, home = campaign_of(folder, size)
    job = definitions(campaign, home).resolve_job_def(score_job_name(campaign))
    keys = [dg.AssetKey([campaign.name, name]) for name in ("features", "scores", "online_features")]
    os.environ["DAGSTER_EVENT_BATCH_SIZE"] = "1000"

    def action() -> None:
        with (
            tempfile.TemporaryDirectory() as root,
            dg.instance_for_test({"event_log_storage": _OURS}, temp_dir=root) as instance,
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
    from propensity_dagster.features.snapshots import publish_features
    from propensity_dagster.scoring.batch import score_snapshot, score_violations
    from propensity_dagster.scoring.promotion import require_champion
    from propensity_dagster.serving.publish.online_features import publish_online_features

    campaign, home = campaign_of(folder, size)
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
    return _record(size, "1000", {"event_log_storage": _OURS})


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
            dg.materialize([table], instance=instance, tags=days)

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


def import_dagster(_folder: Path, _size: int) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", "import dagster"], check=True)
