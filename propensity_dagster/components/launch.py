"""Runs one campaign end to end through Dagster, in this process: what `propensity demo`, `score` and `audience` start.

    python -m propensity_dagster.components.launch CAMPAIGN [--score [--snapshot DATE] [--rows PLACE]...]
    python -m propensity_dagster.components.launch CAMPAIGN --audience [--snapshot DATE] [--capacity N] [--budget X]

Ingestion of every day, training, and scores of the newest snapshot are three runs of the campaign's jobs,
recorded in DAGSTER_HOME like any other, so that the UI shows them.
"""

import argparse
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterUnknownPartitionError

from propensity_dagster.campaign import SHIPPED, Campaign, EventCampaign, load_campaigns
from propensity_dagster.components.automation import (
    audience_job_name,
    ingest_job_name,
    monitor_job_name,
    range_tags,
    score_job_name,
    train_job_name,
)
from propensity_dagster.components.campaign_folder import campaigns_folder
from propensity_dagster.data.ingest import days_to_ingest, newest_source_day
from propensity_dagster.data.sources import campaign_calendar, source_folder
from propensity_dagster.errors import ConfigError, PropensityError
from propensity_dagster.features.activity import ACTIVITY
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.audiences import AUDIENCE
from propensity_dagster.scoring.batch import SCORES, newest_scored
from propensity_dagster.scoring.permission import require_consent

logger = logging.getLogger("propensity_dagster.launch")

_DAGSTER_PREFIX = re.compile(r"^\S+ - [0-9a-f-]{36} - (\S+ - )?")
_LOOK_SECONDS, _END_SECONDS = 0.5, 5.0
_QUIET: dict[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def run_campaign(campaign: Campaign, runtime: Runtime, defs: dg.Definitions, instance: dg.DagsterInstance) -> None:
    """Ingest what is new, train, and score the newest snapshot.

    Raises:
        PropensityError: with the message of the first asset that failed.
    """
    source_folder(campaign, runtime.home.ensure())  # makes a synthetic world, with progress
    if isinstance(campaign, EventCampaign):
        _ingest_new(campaign, runtime, defs, instance)
    _run(defs, instance, train_job_name(campaign))
    if runtime.store.champion(campaign.name) is None:
        logger.warning("no champion: the gate refused the challenger, so there is nothing to score with")
    elif isinstance(campaign, EventCampaign):
        snapshot = runtime.home.lake(campaign.name).partitions(ACTIVITY, "day")[-1] + timedelta(days=1)
        _run(defs, instance, score_job_name(campaign), partition_key=str(snapshot))
        _run(defs, instance, monitor_job_name(campaign), partition_key=str(snapshot))


def score_campaign(
    campaign: Campaign,
    snapshot: date | None,
    rows: Sequence[str],
    runtime: Runtime,
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
) -> date:
    """Score one snapshot with the champion; the newest, when none is named. Returns the snapshot.

    Raises:
        PropensityError: with the message of the first asset that failed.
    """
    if isinstance(campaign, EventCampaign):
        if rows:
            raise ConfigError(f"{campaign.name}: --rows is for tables of decisions; event logs say who is scored")
        newest = runtime.home.lake(campaign.name).partitions(ACTIVITY, "day")
        if not newest:
            raise ConfigError(
                f"{campaign.name}: nothing has been ingested yet: run the job {ingest_job_name(campaign)}"
            )
        snapshot = snapshot or newest[-1] + timedelta(days=1)
    snapshot = snapshot or datetime.now(UTC).date()
    config: dict[str, Any] = {}
    if rows:
        config = {"ops": {f"{campaign.name}__features": {"config": {"rows": list(rows)}}}}
    _run(defs, instance, score_job_name(campaign), partition_key=str(snapshot), config=config)
    try:
        _run(defs, instance, monitor_job_name(campaign), partition_key=str(snapshot))
    except PropensityError as error:
        logger.warning("the scores are there; monitoring them failed: %s", error)
    return snapshot


def choose_audience(
    campaign: Campaign,
    snapshot: date | None,
    limits: Mapping[str, float | None],
    runtime: Runtime,
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
) -> date:
    """Choose whom to contact on a scored snapshot, the newest when none is named, and send it. Returns the snapshot.

    Raises:
        PropensityError: with the message of the first asset that failed.
    """
    require_consent(campaign)
    snapshot = snapshot or newest_scored(campaign, runtime.home)
    stated = {name: value for name, value in limits.items() if value is not None}
    config: dict[str, Any] = {"ops": {f"{campaign.name}__{AUDIENCE}": {"config": stated}}} if stated else {}
    _run(defs, instance, audience_job_name(campaign), partition_key=str(snapshot), config=config)
    return snapshot


def _ingest_new(campaign: EventCampaign, runtime: Runtime, defs: dg.Definitions, instance: dg.DagsterInstance) -> None:
    calendar = campaign_calendar(campaign)
    last = calendar.last
    if last is None:  # a copy of a log ends some day before today: there the run ends too
        with runtime.local_engine() as engine:
            last = newest_source_day(campaign, runtime.home, engine, until=_yesterday())
    days = days_to_ingest(campaign, runtime.home, until=last)
    if days is not None:
        _run(defs, instance, ingest_job_name(campaign), tags=range_tags(*days))


def _run(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    job: str,
    tags: Mapping[str, str] | None = None,
    partition_key: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    start = time.perf_counter()
    logger.info("run %s %s", job, partition_key or " to ".join((tags or {}).values()))
    try:
        result = defs.resolve_job_def(job).execute_in_process(
            run_config={**_QUIET, **(config or {})},
            instance=instance,
            tags=dict(tags or {}),
            partition_key=partition_key,
            raise_on_error=False,
        )
    except DagsterUnknownPartitionError:
        raise ConfigError(f"{job}: snapshot {partition_key} lies outside the campaign's calendar") from None
    if not result.success:
        raise PropensityError(_failure_of(result))
    logger.info("run %s finished in %.1f s", job, time.perf_counter() - start)


def _failure_of(result: dg.ExecuteInProcessResult) -> str:
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            if data.error is not None and data.error.cls_name == "DagsterAssetCheckFailedError":
                continue  # told below, in fewer words
            failure = data.user_failure_data
            if failure is not None and failure.description:
                return f"{event.step_key}: {failure.description}"
            return f"{event.step_key}: {data.error.to_string() if data.error else event.message}"
    failed = [
        e.asset_check_evaluation_data for e in result.all_events if e.event_type_value == "ASSET_CHECK_EVALUATION"
    ]
    broken = [
        f"{c.asset_key.to_user_string()}: the check {c.check_name} failed"
        + "".join(f"; {name}: {value.value}" for name, value in c.metadata.items())
        for c in failed
        if not c.passed and c.severity == dg.AssetCheckSeverity.ERROR
    ]
    return "; ".join(broken) or "the run failed; its log is in the Dagster UI (propensity dev)"


def _yesterday() -> date:
    return datetime.now(UTC).date() - timedelta(days=1)


class _Progress(logging.Formatter):
    """Time and message; Dagster's own prefix of job, run and step is for its log, not for a person's eye."""

    def format(self, record: logging.LogRecord) -> str:
        text = _DAGSTER_PREFIX.sub("", record.getMessage())
        return f"{self.formatTime(record, '%H:%M:%S')}  {text}"


def _show_progress() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Progress())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("dagster", "alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def main(arguments: Sequence[str]) -> int:
    """Run a campaign of the campaigns folder, or only score one; 0 when everything ran."""
    parser = argparse.ArgumentParser(prog="launch")
    parser.add_argument("campaign")
    parser.add_argument("--score", action="store_true", help="score only")
    parser.add_argument("--audience", action="store_true", help="choose an audience only")
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--snapshot", type=date.fromisoformat)
    parser.add_argument("--rows", action="append", default=[])
    stated = parser.parse_args(arguments)
    _show_progress()
    try:
        campaigns = {c.name: c for c in load_campaigns(campaigns_folder(SHIPPED))}
        if stated.campaign not in campaigns:
            raise ConfigError(f"there is no campaign {stated.campaign!r}; there are {', '.join(campaigns)}")
        campaign = campaigns[stated.campaign]
        from propensity_dagster.definitions import defs

        with dg.DagsterInstance.get() as instance:
            runtime = Runtime.from_environment()
            if stated.audience:
                limits = {"capacity": stated.capacity, "budget": stated.budget}
                choose_audience(campaign, stated.snapshot, limits, runtime, defs(), instance)
            elif stated.score:
                snapshot = score_campaign(campaign, stated.snapshot, stated.rows, runtime, defs(), instance)
                print(runtime.home.lake(campaign.name).partition(SCORES, "snapshot", snapshot))
            else:
                run_campaign(campaign, runtime, defs(), instance)
    except PropensityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _end_with_parent() -> None:
    """Who kills the command line means this process: two runs on one home would confuse everybody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)  # Dagster notes it
        time.sleep(_END_SECONDS)
        os._exit(1)  # what a signal raises may be lost in a library: SQLAlchemy and DuckDB catch everything

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main(sys.argv[1:]))
