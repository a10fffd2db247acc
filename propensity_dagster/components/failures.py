"""Deployment sensors: failed runs are written down and alerted; alerts are delivered."""

import json
import logging
from datetime import UTC, date, datetime

import dagster as dg

from propensity_dagster.data.lake import Home
from propensity_dagster.errors import PropensityError
from propensity_dagster.monitoring.alerts import deliver_alerts, raise_once
from propensity_dagster.monitoring.findings import ALERT, RUN, Finding

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
    campaign = line["campaign"]
    if campaign:
        snapshot = run.tags.get("dagster/partition") or run.tags.get("dagster/asset_partition_range_end")
        finding = Finding(
            RUN,
            f"{run.job_name} failed",
            ALERT,
            f"the run {run.run_id[:8]} of {run.job_name} failed",
            advice="What came of it is in Dagster's UI; nothing half-written was published.",
        )
        day = date.fromisoformat(snapshot) if snapshot else datetime.now(UTC).date()
        raise_once(campaign, day, finding, Home.from_environment(), datetime.now(UTC))


@dg.sensor(
    name="deliver_alerts",
    minimum_interval_seconds=60,
    description="Tells the channels of alerts/settings.yaml what they have not been told yet.",
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def deliver(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Send what is due; a channel that is down is tried again at a later pass."""
    try:
        report = deliver_alerts(Home.from_environment(), datetime.now(UTC))
    except PropensityError as error:
        context.log.error(f"nobody is told of any alert: {error}")
        return dg.SkipReason(str(error))
    failed = "".join(f"; {name}: {error}" for name, error in report.failed.items())
    return dg.SkipReason(f"{report.sent} messages sent, {report.waiting} events waiting{failed}")
