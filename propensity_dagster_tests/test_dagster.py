"""Everything through Dagster: definitions, one campaign end to end, ranges, failures, a process killed anywhere."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest

import propensity_dagster
from propensity_dagster.campaign import load_campaign
from propensity_dagster.components.automation import range_tags
from propensity_dagster.components.campaign_folder import campaign_definitions
from propensity_dagster.data.lake import Home
from propensity_dagster.definitions import defs as location
from propensity_dagster.runtime import Runtime

from .conftest import SMALL

SNAPSHOT_FILE = Path(__file__).parent / "definitions_snapshot.json"


def described(definitions: dg.Definitions) -> dict:
    repository = definitions.get_repository_def()
    graph = repository.asset_graph
    return {
        "assets": sorted(k.to_user_string() for k in graph.get_all_asset_keys()),
        "checks": sorted(f"{c.asset_key.to_user_string()}:{c.name}" for c in graph.asset_check_keys),
        "jobs": sorted(j.name for j in repository.get_all_jobs() if not j.name.startswith("__")),
        "schedules": {s.name: s.cron_schedule for s in repository.schedule_defs},
        "sensors": sorted(s.name for s in repository.sensor_defs),
    }


def test_keys_checks_jobs_schedules_and_sensors_are_as_recorded():
    """Update with PROPENSITY_UPDATE_SNAPSHOT=1 when the change is meant."""
    found = described(location())
    if os.environ.get("PROPENSITY_UPDATE_SNAPSHOT"):
        SNAPSHOT_FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(SNAPSHOT_FILE.read_text())


def test_partitions_cover_every_day_and_the_snapshot_after_the_last():
    graph = location().get_repository_def().asset_graph
    node = graph.get(dg.AssetKey(["ecommerce_purchase", "scores"]))
    keys = node.partitions_def.get_partition_keys()
    assert (keys[0], keys[-1], len(keys)) == ("2024-01-01", "2025-09-01", 610)
    assert node.backfill_policy == dg.BackfillPolicy.single_run()
    assert (
        graph.get(dg.AssetKey(["ecommerce_purchase", "raw_orders"])).partitions_def.get_partition_keys()[-2]
        == "2025-08-31"
    )
    assert node.freshness_policy is not None


def test_a_users_own_folder_of_campaigns(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(SMALL.replace("name: small", "name: mine"))
    monkeypatch.setenv("PROPENSITY_CAMPAIGNS", str(tmp_path))
    assert {key.split("/")[0] for key in described(location())["assets"]} == {"mine"}
    (tmp_path / "broken.yaml").write_text(SMALL.replace("horizon_days", "horizon"))
    with pytest.raises(Exception, match=r"broken\.yaml: outcome\.horizon: unknown key"):
        location()
    monkeypatch.setenv("PROPENSITY_CAMPAIGNS", str(tmp_path / "nowhere"))
    with pytest.raises(Exception, match="PROPENSITY_CAMPAIGNS: there is no folder"):
        location()


def test_one_campaign_end_to_end(materialized, newest_snapshot):
    lake = materialized.home.lake("small")
    splits = pq.read_table(lake.file("splits")).to_pylist()
    assert [s["split"] for s in splits] == ["train"] * 8 + ["embargo"] + ["validate"] * 3 + ["embargo"] + ["test"] * 3
    training = pq.read_table(lake.file("training_set"), columns=["customer_id", "snapshot", "split", "converted"])
    assert training.num_rows == sum(s["rows"] for s in splits)
    record = json.loads((materialized.home.reports("small") / "evaluation.json").read_text())
    assert set(record["models"]) == {
        "constant",
        "baseline",
        "logistic_regression",
        "lightgbm",
        "neural_network",
        "ensemble",
        "oracle",
    }
    plots = {p.stem for p in materialized.home.reports("small").glob("*.png")}
    explained = {f"explanations_{n}" for n in ("summary", "dependence", "partial", "sure", "average", "unlikely")}
    assert plots == {"gain", "lift", "calibration", "models", "overview"} | explained
    assert newest_snapshot == date(2024, 8, 28)
    assert (
        "| orders_count_30d | number of orders | number | 30 |"
        in (materialized.home.reports("small") / "features.md").read_text()
    )


def test_features_of_the_training_set_are_those_of_the_snapshots(materialized):
    lake = materialized.home.lake("small")
    training = pq.read_table(lake.file("training_set"))
    for snapshot in sorted(set(training["snapshot"].to_pylist()))[::4]:
        rows = training.filter(__import__("pyarrow.compute", fromlist=["x"]).equal(training["snapshot"], snapshot))
        features = pq.read_table(lake.partition("features", "snapshot", snapshot.date()))
        assert rows.select(features.column_names).equals(features)


@pytest.fixture
def world(tmp_path):
    """A campaign of its own, with an instance and definitions, nothing materialized."""
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    campaign = load_campaign(file)
    runtime = Runtime(Home(tmp_path / "home").ensure())
    definitions = dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": runtime}))
    return campaign, runtime, definitions


def execute(definitions, job, instance, assets=None, raise_on_error=True, **tags):
    selection = [dg.AssetKey(["small", a]) for a in assets] if assets else None
    return definitions.resolve_job_def(job).execute_in_process(
        instance=instance, tags=tags, raise_on_error=raise_on_error, asset_selection=selection,
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )  # fmt: skip


def checks_of(result):
    return {(c.asset_key.path[-1], c.check_name): c.passed for c in result.get_asset_check_evaluations()}


def test_a_range_in_one_run_equals_days_one_by_one(world, tmp_path):
    campaign, runtime, definitions = world
    streams = [f"{stage}_{n}" for n in campaign.source.streams for stage in ("raw", "validated")]
    days = [date(2024, 1, 1) + timedelta(days=n) for n in range(5)]
    contents = []
    with dg.DagsterInstance.ephemeral() as instance:
        result = execute(
            definitions, "small__ingest", instance, [*streams, "activity"], **range_tags(days[0], days[-1])
        )
        contents.append({f: f.read_bytes() for f in runtime.home.lake("small").root.glob("*/day=2*/part.parquet")})
        assert all(passed for (_, name), passed in checks_of(result).items() if name != "no_bad_rows")
        records = instance.get_materialized_partitions(dg.AssetKey(["small", "activity"]))
        assert records == {str(day) for day in days}
        for day in days:
            execute(definitions, "small__ingest", instance, [*streams, "activity"], **range_tags(day, day))
        contents.append({f: f.read_bytes() for f in runtime.home.lake("small").root.glob("*/day=2*/part.parquet")})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5 * (3 * 3 + 2)


def test_a_gap_in_the_days_is_an_error_that_names_them(world):
    campaign, _runtime, definitions = world
    streams = [f"{stage}_{n}" for n in campaign.source.streams for stage in ("raw", "validated")]
    with dg.DagsterInstance.ephemeral() as instance:
        tables = [*streams, "activity", "raw_customers", "validated_customers"]
        for first, last in ((1, 3), (5, 6)):
            execute(
                definitions, "small__ingest", instance, tables, **range_tags(date(2024, 1, first), date(2024, 1, last))
            )
        result = execute(
            definitions,
            "small__score",
            instance,
            ["features"],
            raise_on_error=False,
            **range_tags(date(2024, 1, 7), date(2024, 1, 7)),
        )
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    assert "activity: 1 of 6 days from 2024-01-01 to 2024-01-06 have not been ingested: 2024-01-04" in (
        failure.step_failure_data.user_failure_data.description
    )


def test_labels_of_an_immature_snapshot_do_not_exist(materialized, tmp_path):
    runtime = Runtime(materialized.home)
    definitions = dg.Definitions.merge(
        campaign_definitions(materialized.campaign), dg.Definitions(resources={"runtime": runtime})
    )
    with dg.DagsterInstance.ephemeral() as instance:
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            partition_key="2024-08-20",
            asset_selection=[dg.AssetKey(["small", "labels"])],
            raise_on_error=False,
        )
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    assert "labels of snapshot 2024-08-20 do not exist yet" in failure.step_failure_data.user_failure_data.description


def test_no_converter_at_all(world, monkeypatch):
    """An outcome nobody reaches: the training job says so, and the last training set stays."""
    campaign, runtime, _ = world
    text = SMALL.replace(
        "outcome: {stream: orders, horizon_days: 14}",
        "outcome: {stream: orders, horizon_days: 14, minimum_amount: 1.0e+9}",
    )
    campaign.file.write_text(text)
    changed = load_campaign(campaign.file)
    definitions = dg.Definitions.merge(campaign_definitions(changed), dg.Definitions(resources={"runtime": runtime}))
    with dg.DagsterInstance.ephemeral() as instance:
        execute(definitions, "small__ingest", instance, **range_tags(date(2024, 1, 1), date(2024, 8, 27)))
        result = execute(definitions, "small__train", instance, raise_on_error=False)
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    assert "P105 all outcomes are equal" in failure.step_failure_data.user_failure_data.description
    assert not runtime.home.lake("small").file("training_set").exists()


def test_the_nightly_schedule(world, monkeypatch):
    _campaign, runtime, definitions = world
    monkeypatch.setenv("PROPENSITY_HOME", str(runtime.home.root))
    schedule = definitions.resolve_schedule_def("small__nightly")
    night = datetime(2024, 1, 4, 2, 0, tzinfo=UTC)
    with dg.build_schedule_context(scheduled_execution_time=night) as context:
        request = schedule(context)
    assert request.tags == range_tags(date(2024, 1, 1), date(2024, 1, 3))
    late = datetime(2026, 1, 4, 2, 0, tzinfo=UTC)
    with dg.build_schedule_context(scheduled_execution_time=late) as context:
        request = schedule(context)
    assert request.tags["dagster/asset_partition_range_end"] == "2024-08-27"


def test_the_sensor_of_new_files(tmp_path, monkeypatch, make_shop):
    shop = make_shop()
    monkeypatch.setenv("PROPENSITY_HOME", str(tmp_path / "home"))
    definitions = dg.Definitions.merge(
        campaign_definitions(shop.campaign), dg.Definitions(resources={"runtime": Runtime(shop.home)})
    )
    sensor = definitions.resolve_sensor_def("shop__new_files")
    context = dg.build_sensor_context()
    request = sensor(context)
    assert request.tags["dagster/asset_partition_range_start"] == "2024-03-01"
    assert request.tags["dagster/asset_partition_range_end"] == "2024-03-02"
    assert isinstance(sensor(dg.build_sensor_context(cursor=context.cursor)), dg.SkipReason)
    (shop.folder / "orders.parquet").unlink()
    (shop.folder / "orders.csv").write_text("order_id,ordered_at\n1,2024-07-01\n")
    request = sensor(dg.build_sensor_context(cursor=context.cursor))
    assert request.tags["dagster/asset_partition_range_start"] == "2024-07-01"


def test_a_night_scores_after_ingesting(materialized, monkeypatch):
    monkeypatch.setenv("PROPENSITY_HOME", str(materialized.home.root))
    definitions = dg.Definitions.merge(
        campaign_definitions(materialized.campaign), dg.Definitions(resources={"runtime": Runtime(materialized.home)})
    )
    sensor = definitions.resolve_sensor_def("small__score_after_ingest")
    with dg.DagsterInstance.ephemeral() as instance:
        result = execute(
            definitions,
            "small__ingest",
            instance,
            ["raw_customers"],
            **range_tags(date(2024, 8, 26), date(2024, 8, 27)),
        )
        context = dg.build_run_status_sensor_context(
            sensor_name=sensor.name,
            dagster_event=result.get_run_success_event(),
            dagster_instance=instance,
            dagster_run=result.dagster_run,
        )
        request = sensor(context)
    assert request.partition_key == "2024-08-28"


def test_a_failed_run_is_written_down(tmp_path, monkeypatch):
    from propensity_dagster.components.failures import record_failures

    @dg.op
    def breaks():
        raise dg.Failure("the warehouse is closed")

    @dg.job(tags={"propensity/campaign": "small"})
    def nightly():
        breaks()

    monkeypatch.setenv("PROPENSITY_HOME", str(tmp_path))
    with dg.DagsterInstance.ephemeral() as instance:
        result = nightly.execute_in_process(instance=instance, raise_on_error=False)
        context = dg.build_run_status_sensor_context(
            sensor_name="record_failures",
            dagster_event=result.get_run_failure_event(),
            dagster_instance=instance,
            dagster_run=result.dagster_run,
        ).for_run_failure()
        record_failures(context)
    (line,) = [json.loads(text) for text in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert (line["campaign"], line["job"], line["run_id"]) == ("small", "nightly", result.run_id)


def test_batches_of_events_are_stored_like_single_ones(tmp_path, monkeypatch):
    """The event log of ours and Dagster's own tell the same story."""
    from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage

    @dg.asset(
        partitions_def=dg.DailyPartitionsDefinition("2024-01-01", end_date="2024-02-10"),
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def table(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        for day in context.partition_keys:
            context.add_asset_metadata({"rows": int(day[-2:])}, partition_key=day)
        return dg.MaterializeResult(metadata={"seconds": 1})

    stories = []
    for name, settings in {
        "ours": {"storage": {"custom": {"module": "propensity_dagster.components.storage", "class": "HomeStorage"}}},
        "theirs": {},
    }.items():
        home = tmp_path / name
        home.mkdir()
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        with dg.instance_for_test(overrides=settings, temp_dir=str(home)) as instance:
            assert isinstance(instance.event_log_storage, SqliteEventLogStorage)
            for span in (("2024-01-01", "2024-01-31"), ("2024-01-20", "2024-02-09")):
                dg.materialize([table], instance=instance, tags=range_tags(*map(date.fromisoformat, span)))
            records = instance.fetch_materializations(table.key, limit=100).records
            latest = instance.get_latest_materialization_event(table.key).asset_materialization
            stories.append(
                (
                    sorted((r.partition_key, r.asset_materialization.metadata["rows"].value) for r in records),
                    latest.partition,
                    instance.get_materialized_partitions(table.key),
                    [len(instance.all_logs(run.run_id)) for run in instance.get_runs()],
                )
            )
    assert stories[0] == stories[1]


def test_several_processes_are_the_first_to_open_a_home(tmp_path):
    """A backfill, a night and the user interface started at once on a new home: all open it, then and later."""
    shutil.copy(Path(propensity_dagster.__file__).parent / "dagster.yaml", tmp_path)
    opens = "import sys, dagster; print('ready', flush=True); sys.stdin.read(); dagster.DagsterInstance.get()"
    environment = {**os.environ, "DAGSTER_HOME": str(tmp_path)}
    command = [sys.executable, "-c", opens]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    together = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(4)]
    for process in together:
        assert process.stdout.readline() == "ready\n"
    # The end of their input is the sign to go; reading what they say waits for each.
    for process in together:
        process.stdin.close()
    for process in together:
        error = process.stderr.read()
        assert process.wait() == 0, error[-2000:]
    later = subprocess.run(command, check=False, env=environment, input="", capture_output=True, text=True)
    assert later.returncode == 0, later.stderr[-2000:]


_TIMED = ("/ledger/", "/quality/", "drift_report.html", "monitoring.html")


def content_of(root: Path) -> dict[str, bytes]:
    """What a run leaves, but for the moment of scoring."""
    found = {}
    for file in sorted([*root.glob("lake/**/*"), *root.glob("reports/**/*"), *root.glob("candidates/**/*")]):
        # Monitoring tells when scores were given, which differs between two runs.
        if file.is_file() and not any(part in str(file) for part in _TIMED):
            found[str(file.relative_to(root))] = file.read_bytes()
            # A copy of a month notes when the days it is of were written, and so do the last days of one.
            timed = ("/scores/", "/audience/", "/exported/", "_months/", "_last_days/")
            if any(part in str(file) for part in timed) and file.suffix == ".parquet":
                table = pq.read_table(file)
                table = table.drop_columns([c for c in ("scored_at", "decided_at") if c in table.column_names])
                found[str(file.relative_to(root))] = repr(table.to_pydict()).encode()
    return found


def test_killed_in_the_middle_of_every_asset_and_run_again(materialized, tmp_path):
    """Same bytes as the undisturbed run. The champion's registration is judged by its model's identity."""
    from propensity_dagster.registry.mlflow_store import MlflowStore

    home = Home(tmp_path / "home").ensure()
    (home.root / "synthetic").symlink_to(materialized.home.synthetic)
    killer = Path(__file__).parent / "killer.py"
    command = [sys.executable, str(killer), str(materialized.file), str(home.root)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert shown.returncode == 0, shown.stdout[-2000:] + shown.stderr[-2000:]
    expected, found = content_of(materialized.home.root), content_of(home.root)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list(home.root.rglob(".*.tmp"))
    identities = [MlflowStore(h).champion("small").identity for h in (materialized.home, home)]
    assert identities[0] == identities[1]
