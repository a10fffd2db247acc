"""Jobs, schedules and sensors of one campaign.

A night: the schedule ingests the days that are new, and when that run succeeds a sensor scores the snapshot
that sees them. Two runs, because a run has one partition and the last event day of snapshot t is t - 1.
"""

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from propensity_dagster.campaign import Campaign, EventCampaign, TableCampaign
from propensity_dagster.components.common import asset_job, daily
from propensity_dagster.components.contacting import contacting_tables
from propensity_dagster.components.experiments import learnt_tables, measured_tables
from propensity_dagster.components.explaining import ABLATION, EXPLANATIONS
from propensity_dagster.components.monitoring import monitored_tables
from propensity_dagster.components.reporting import REPORT
from propensity_dagster.components.scoring import score_tables
from propensity_dagster.components.serving import ONLINE_FEATURES, RELEASE
from propensity_dagster.components.training import DIAGNOSIS, candidate_table
from propensity_dagster.data.decisions import DECISIONS, modified_on
from propensity_dagster.data.ingest import days_to_ingest
from propensity_dagster.data.lake import Home
from propensity_dagster.data.sources import campaign_calendar, changed_files, days_in_files
from propensity_dagster.errors import PropensityError
from propensity_dagster.features.activity import ACTIVITY
from propensity_dagster.features.build import ENTITIES
from propensity_dagster.monitoring.reaction import RECALIBRATE, Memory, due_act
from propensity_dagster.monitoring.recalibration import RECALIBRATED
from propensity_dagster.runtime import Runtime

_RANGE_START = "dagster/asset_partition_range_start"
_RANGE_END = "dagster/asset_partition_range_end"
_WATCH_SECONDS = 60
_REACT_SECONDS = 600


def ingest_job_name(campaign: Campaign) -> str:
    """Name of the job from the source to daily activity."""
    return f"{campaign.name}__ingest"


def train_job_name(campaign: Campaign) -> str:
    """Name of the job from snapshots to the champion."""
    return f"{campaign.name}__train"


def score_job_name(campaign: Campaign) -> str:
    """Name of the job from activity to scores."""
    return f"{campaign.name}__score"


def audience_job_name(campaign: Campaign) -> str:
    """Name of the job that chooses whom to contact on a scored snapshot, and sends it."""
    return f"{campaign.name}__contact"  # the asset's own operation has the name of the table


def monitor_job_name(campaign: Campaign) -> str:
    """Name of the job that looks at the scores of a snapshot, and at what became of earlier ones."""
    return f"{campaign.name}__monitor"


def range_tags(first: date, last: date) -> dict[str, str]:
    """Run tags that make one run materialize every day from first to last."""
    return {_RANGE_START: str(first), _RANGE_END: str(last)}


def campaign_automation(campaign: Campaign) -> dg.Definitions:
    """Jobs, schedules and sensors."""
    if isinstance(campaign, EventCampaign):
        return _event_automation(campaign)
    assert isinstance(campaign, TableCampaign)
    return _table_automation(campaign)


def _event_automation(campaign: EventCampaign) -> dg.Definitions:
    streams = campaign.source.streams
    entities = campaign.source.entities.table
    ingested = [ACTIVITY, *(f"{stage}_{name}" for name in streams for stage in ("raw", "validated"))]
    ingested += [f"raw_{entities}", f"validated_{entities}"] if entities else [ENTITIES]
    description = "From the source to daily activity."
    ingest = asset_job(campaign, ingest_job_name(campaign), ingested, description, daily(campaign))
    train, score = _train_job(campaign, []), _score_job(campaign)
    description = "What each event log is worth: as many trainings more. Afterwards the report is written again."
    ablation = asset_job(campaign, f"{campaign.name}__ablate", [ABLATION, REPORT], description)
    return dg.Definitions(
        jobs=[ingest, train, score, *_audience_jobs(campaign), ablation],
        schedules=[_nightly_ingestion(campaign, ingest), _monthly(campaign, train)],
        sensors=[
            _score_after_ingest(campaign, ingest, score),
            _new_files(campaign, ingest),
            *_monitoring_sensors(campaign, score, train),
        ],
    )


def _table_automation(campaign: TableCampaign) -> dg.Definitions:
    train = _train_job(campaign, [f"raw_{DECISIONS}", f"validated_{DECISIONS}"])
    score = _score_job(campaign)
    return dg.Definitions(
        jobs=[train, score, *_audience_jobs(campaign)],
        schedules=[_nightly_scores(campaign, score), _monthly(campaign, train)],
        sensors=[_dropped_files(campaign, score), *_monitoring_sensors(campaign, score, train)],
    )


def _monitoring_sensors(campaign: Campaign, score: Any, train: Any) -> list[dg.SensorDefinition]:
    description = (
        "Is the model still right, and what did it earn? Drift, quality, outcomes, alerts, experiments, pages."
    )
    tables = [*monitored_tables(), *measured_tables(campaign)]
    monitor = asset_job(campaign, monitor_job_name(campaign), tables, description, daily(campaign))
    description = "The champion with a calibrator of the newest outcomes, as a new version; the gate decides."
    recalibrate = asset_job(campaign, f"{campaign.name}__recalibrate", [RECALIBRATED], description)
    return [_monitor_after_score(campaign, score, monitor), _react(campaign, train, recalibrate)]


def _train_job(campaign: Campaign, before: list[str]) -> Any:
    tables = [
        *before,
        DIAGNOSIS,
        "training_set",
        *(candidate_table(c) for c in campaign.models),
        "evaluation",
        "champion",
        EXPLANATIONS,
        REPORT,
        *learnt_tables(campaign),
    ]
    description = "Train every candidate, judge them, promote if earned, explain the champion, write the report."
    return asset_job(campaign, train_job_name(campaign), tables, description)


def _score_job(campaign: Campaign) -> Any:
    description = "Features and scores of a snapshot, what the service answers with, and the audience."
    tables = [*score_tables(campaign), ONLINE_FEATURES, RELEASE, *contacting_tables(campaign)]
    return asset_job(campaign, score_job_name(campaign), tables, description, daily(campaign))


def _audience_jobs(campaign: Campaign) -> list[Any]:
    tables = contacting_tables(campaign)
    description = "Whom to contact on a scored snapshot, as consent stands now; and sending it."
    return [asset_job(campaign, audience_job_name(campaign), tables, description, daily(campaign))] if tables else []


def _nightly_ingestion(campaign: EventCampaign, job: Any) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{campaign.name}__nightly",
        cron_schedule=campaign.schedule.score,
        job=job,
        execution_timezone="UTC",
        description="Ingests the days up to yesterday that are new; scoring follows.",
    )
    def nightly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        now = context.scheduled_execution_time.astimezone(UTC)
        days = days_to_ingest(campaign, Home.from_environment(), until=now.date() - timedelta(days=1))
        if days is None:
            return dg.SkipReason(f"the event log ended on {campaign_calendar(campaign).last}: nothing is new")
        return dg.RunRequest(run_key=f"{now.date()}", tags=range_tags(*days))

    return nightly


def _nightly_scores(campaign: TableCampaign, job: Any) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{campaign.name}__nightly",
        cron_schedule=campaign.schedule.score,
        job=job,
        execution_timezone="UTC",
        description="Scores source.new_rows.",
    )
    def nightly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        day = context.scheduled_execution_time.astimezone(UTC).date()
        if campaign.source.new_rows is None:
            return dg.SkipReason("no source.new_rows: rows to score come as files into schedule.watch")
        return dg.RunRequest(run_key=f"{day}", partition_key=str(day))

    return nightly


def _monthly(campaign: Campaign, job: Any) -> dg.ScheduleDefinition:
    return dg.ScheduleDefinition(
        name=f"{campaign.name}__monthly",
        cron_schedule=campaign.schedule.train,
        job=job,
        execution_timezone="UTC",
        description="Trains a challenger; the gate decides.",
    )


def _score_after_ingest(campaign: Campaign, ingest: Any, score: Any) -> dg.SensorDefinition:
    @dg.run_status_sensor(
        name=f"{campaign.name}__score_after_ingest",
        run_status=dg.DagsterRunStatus.SUCCESS,
        monitored_jobs=[ingest],
        request_job=score,
        description="Scores the snapshot that sees the days just ingested.",
    )
    def score_after_ingest(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
        tags = context.dagster_run.tags
        newest = tags.get(_RANGE_END) or tags.get("dagster/partition")
        if newest is None:
            return dg.SkipReason("the run had no partition")
        if Runtime.from_environment().store.champion(campaign.name) is None:
            return dg.SkipReason(f"no champion yet: run {train_job_name(campaign)} first")
        snapshot = date.fromisoformat(newest) + timedelta(days=1)
        return dg.RunRequest(run_key=context.dagster_run.run_id, partition_key=str(snapshot))

    return score_after_ingest


def _monitor_after_score(campaign: Campaign, score: Any, monitor: Any) -> dg.SensorDefinition:
    @dg.run_status_sensor(
        name=f"{campaign.name}__monitor_after_score",
        run_status=dg.DagsterRunStatus.SUCCESS,
        monitored_jobs=[score],
        request_job=monitor,
        description="Looks at the scores that were just given.",
    )
    def monitor_after_score(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
        tags = context.dagster_run.tags
        snapshot = tags.get("dagster/partition")
        if snapshot is None and tags.get(_RANGE_END) is None:
            return dg.SkipReason("the run had no partition")
        same = {"partition_key": snapshot} if snapshot else {"tags": {k: tags[k] for k in (_RANGE_START, _RANGE_END)}}
        return dg.RunRequest(run_key=context.dagster_run.run_id, **same)

    return monitor_after_score


def _react(campaign: Campaign, train: Any, recalibrate: Any) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{campaign.name}__react",
        jobs=[train, recalibrate],
        minimum_interval_seconds=_REACT_SECONDS,
        description="Recalibrates or trains again on concept drift, lost calibration or age; the gate decides.",
    )
    def react(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        runtime = Runtime.from_environment()
        today = datetime.now(UTC).date()
        try:
            found = due_act(campaign, runtime.home, runtime.store, today, Memory.from_text(context.cursor))
        except PropensityError as error:
            return dg.SkipReason(str(error))
        if isinstance(found, str):
            return dg.SkipReason(found)
        act, version = found
        context.update_cursor(Memory(today, act.kind, act.evidence, version).to_text())
        job = recalibrate if act.kind == RECALIBRATE else train
        tags = {"propensity/act": act.kind, "propensity/why": act.why}
        return dg.RunRequest(run_key=f"{act.evidence} {today}", job_name=job.name, tags=tags)

    return react


def _dropped_files(campaign: TableCampaign, job: Any) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{campaign.name}__dropped_files",
        job=job,
        minimum_interval_seconds=_WATCH_SECONDS,
        description="Scores the files put into the watched folder, as of the day they were written.",
    )
    def dropped_files(context: dg.SensorEvaluationContext) -> Any:
        seen: dict[str, str] = json.loads(context.cursor or "{}")
        try:
            state, changed = changed_files(campaign, Home.from_environment(), seen)
        except PropensityError as error:
            return dg.SkipReason(str(error))
        if not changed:
            return dg.SkipReason("no new or changed file")
        days = sorted({modified_on(Path(file)) for file in changed})
        requests = [
            dg.RunRequest(run_key=f"{day}@{datetime.now(UTC).isoformat()}", partition_key=str(day)) for day in days
        ]
        return dg.SensorResult(run_requests=requests, cursor=json.dumps(state))

    return dropped_files


def _new_files(campaign: EventCampaign, job: Any) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{campaign.name}__new_files",
        job=job,
        minimum_interval_seconds=_WATCH_SECONDS,
        description="Ingests the days of files that are new or changed in the watched folder.",
    )
    def new_files(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        runtime = Runtime.from_environment()
        seen: dict[str, str] = json.loads(context.cursor or "{}")
        try:
            state, changed = changed_files(campaign, runtime.home, seen)
            if not changed:
                return dg.SkipReason("no new or changed file")
            with runtime.local_engine() as engine:
                days = days_in_files(campaign, changed, runtime.home, engine)
        except PropensityError as error:
            return dg.SkipReason(str(error))
        context.update_cursor(json.dumps(state))
        if days is None:
            return dg.SkipReason(f"{len(changed)} changed files hold no event of the campaign's calendar")
        names = ", ".join(Path(file).name for file in changed[:5])
        return dg.RunRequest(
            run_key=f"{days[0]}..{days[1]}@{datetime.now(UTC).isoformat()}",
            tags={**range_tags(*days), "propensity/new_files": names[:200]},
        )

    return new_files
