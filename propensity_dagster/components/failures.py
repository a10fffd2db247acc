"""The run-failure sensor: one line per failed run in the home folder's failures.jsonl, and in the log."""

import json
import logging
from datetime import UTC, datetime

import dagster as dg

from propensity_dagster.data.lake import Home

logger = logging.getLogger(__name__)


@dg.run_failure_sensor(
    name="record_failures",
    description="Appends every failed run to failures.jsonl in the home folder.",
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def record_failures(context: dg.RunFailureSensorContext) -> None:
    """Write down which run of which campaign failed, and why."""
    run = context.dagster_run
    line = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "campaign": run.tags.get("propensity/campaign"),
        "job": run.job_name,
        "run_id": run.run_id,
        "message": context.failure_event.message,
    }
    logger.error("run %s of %s failed: %s", run.run_id, run.job_name, line["message"])
    with (Home.from_environment().ensure().root / "failures.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
