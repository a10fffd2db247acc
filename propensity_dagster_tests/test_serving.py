"""The service as its callers see it: started with `propensity serve`, asked over HTTP, stopped with every child."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, date, datetime
from pathlib import Path

import httpx
import msgspec
import pyarrow.parquet as pq
import pytest
import yaml

from propensity_dagster.data.lake import Home
from propensity_dagster.models.saved import load_model
from propensity_dagster.scoring.batch import score_snapshot
from propensity_dagster.serving.online import sqlite_facts
from propensity_dagster.serving.packages import ReleaseFile
from propensity_dagster.serving.publish.online_features import publish_online_features
from propensity_dagster.serving.publish.packages import build_package
from propensity_dagster.serving.publish.prediction_log import ingest_predictions
from propensity_dagster.serving.publish.releases import publish_release, set_rollout
from propensity_dagster.serving.settings import Settings

from .conftest import KINDS, SMALL
from .served import Service, free_port, wait_until

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def copy_home(registered, root: Path) -> Home:
    shutil.copytree(registered.home.root, root / "home")
    return Home(root / "home")


def newest(home: Home) -> date:
    return home.lake("small").partitions("scores", "snapshot")[-1]


def features_of(home: Home) -> list[dict]:
    """Feature rows of the scored snapshot, by the names the outside knows."""
    table = pq.read_table(home.lake("small").partition("features", "snapshot", newest(home)))
    return [outward(row) for row in table.to_pylist()]


def outward(row: dict) -> dict:
    """The row under the names that the campaign file gives its features."""
    names = {feature: name for name, feature in yaml.safe_load(SMALL)["features"]["names"].items()}
    return {names.get(feature, feature): value for feature, value in row.items()}


def scores_of(home: Home) -> dict[str, dict]:
    table = pq.read_table(home.lake("small").partition("scores", "snapshot", newest(home)))
    return {row["customer_id"]: row for row in table.to_pylist()}


@pytest.fixture(scope="module")
def service(all_registered, tmp_path_factory):
    """One service for the tests that only ask."""
    root = tmp_path_factory.mktemp("served")
    home = copy_home(all_registered, root)
    publish_release(all_registered.campaign, home, all_registered.store)
    publish_online_features(all_registered.campaign, newest(home), home)
    with Service(home.root) as running:
        running.lake_home = home
        yield running


def test_ready_soon(service):
    assert service.seconds_to_ready < 15, "the benchmark measures it; this only catches an import gone wild"
    assert service.client.get("/readyz").json() == {"status": "ready"}


def test_a_known_customer_needs_only_its_id(service):
    scores = scores_of(service.lake_home)
    for key in list(scores)[:20]:
        answer = service.ok("/predict", {"customer_id": key})
        wanted = scores[key]
        assert answer["probability"] == pytest.approx(wanted["probability"], abs=1e-6)
        assert answer["percentile"] == pytest.approx(wanted["percentile"], abs=1e-9)
        assert (answer["decile"], answer["tier"]) == (wanted["decile"], wanted["tier"])
        assert answer["expected_value"] == pytest.approx(wanted["expected_value"], abs=1e-4)
        assert answer["decision"] == ("contact" if answer["probability"] > 0.4 / 22.5 else "skip")
        assert answer["threshold"] == pytest.approx(0.4 / 22.5)
        assert answer["known"] is True
        assert answer["features_missing"] == []
        assert answer["features_from"]["request"] == []
        assert "total_purchases" in answer["features_from"]["online"]
        assert answer["online"]["snapshot"] == str(newest(service.lake_home))
        age = datetime.now(UTC) - datetime.fromisoformat(answer["online"]["snapshot"]).replace(tzinfo=UTC)
        assert answer["online"]["age_hours"] == pytest.approx(age.total_seconds() / 3600, abs=0.1)
        assert answer["model_version"] == wanted["model_version"]


def test_the_curl_of_the_readme(service):
    """As it is printed, but for the port."""
    (command,) = re.findall(r"```console\n(curl .*?)```", README, re.DOTALL)
    command = command.replace("localhost:3000", f"localhost:{service.port}")
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=30)
    answer = json.loads(shown.stdout)
    assert 0 < answer["probability"] < 1
    assert set(answer["features_from"]["request"]) == set(json.loads(command.split("-d '")[1].split("'")[0])) - {
        "customer_id"
    }


def test_values_of_the_body_win(service):
    row = features_of(service.lake_home)[0]
    key = row["customer_id"]
    plain = service.ok("/predict", {"customer_id": key})
    same = service.ok("/predict", {"customer_id": key, "total_purchases": row["total_purchases"]})
    assert same["probability"] == plain["probability"]
    assert same["features_from"]["request"] == ["total_purchases"]
    assert "total_purchases" not in same["features_from"]["online"]
    other = service.ok("/predict", {"customer_id": key, "days_since_last_purchase": 1, "visits_recency_days": 1})
    assert other["probability"] != plain["probability"]
    null = service.ok("/predict", {"customer_id": key, "days_since_last_purchase": None})
    assert null["features_from"]["request"] == ["days_since_last_purchase"], "null is a value: known to be empty"


def test_an_unknown_customer_is_scored_and_flagged(service):
    answer = service.ok("/predict", {"customer_id": "nobody", "age": 35, "country": "Atlantis"})
    assert answer["known"] is False
    assert answer["online"] is None
    assert answer["features_unseen"] == ["country"]
    assert "total_purchases" in answer["features_missing"]
    assert not {"age", "country"} & set(answer["features_missing"])
    assert 0 < answer["probability"] < 1
    missing = {"customer_id": "nobody", "age": 35, "country": None}
    assert service.ok("/predict", missing)["probability"] == answer["probability"], "unseen counts as missing"


def test_all_features_in_the_body_need_no_store(service):
    row = features_of(service.lake_home)[3]
    answer = service.ok("/predict", {**row, "customer_id": "somebody else"})
    assert answer["known"] is None
    assert (answer["features_missing"], answer["features_from"]["online"]) == ([], [])
    wanted = scores_of(service.lake_home)[row["customer_id"]]["probability"]
    assert answer["probability"] == pytest.approx(wanted, abs=1e-6)


def test_a_batch_gives_the_answers_of_its_rows(service):
    rows = [{"customer_id": row["customer_id"]} for row in features_of(service.lake_home)[:250]]
    rows += [{"customer_id": "nobody"}, features_of(service.lake_home)[0]]
    answer = service.ok("/predict_batch", {"rows": rows}, headers={"X-Request-ID": "night-1"})
    assert answer["request_id"] == "night-1"
    found = answer["predictions"]
    assert [a["customer_id"] for a in found] == [row["customer_id"] for row in rows]
    assert [a["request_id"] for a in found[:2]] == ["night-1-0", "night-1-1"]
    assert len({a["request_id"] for a in found}) == len(rows)
    for row, batched in zip(rows[::50], found[::50], strict=True):
        assert service.ok("/predict", row)["probability"] == batched["probability"]
    assert found[250]["known"] is False


def test_explanations_add_up_and_are_words(service):
    import math

    for i, row in enumerate(features_of(service.lake_home)[:10]):
        answer = service.ok("/explain", row if i % 2 else {"customer_id": row["customer_id"]})
        total = answer["base"] + sum(r["contribution"] for r in answer["reasons"]) + answer["others"]
        assert total == pytest.approx(answer["log_odds"], abs=1e-9)
        assert 1 / (1 + math.exp(-answer["log_odds"])) == pytest.approx(answer["probability"], abs=1e-9)
        assert len(answer["reasons"]) == 5
        sizes = [abs(r["contribution"]) for r in answer["reasons"]]
        assert sizes == sorted(sizes, reverse=True)
        for reason in answer["reasons"]:
            assert reason["value"] == row[reason["feature"]]
            assert reason["direction"] in reason["sentence"] or reason["sentence"].startswith("viewed ")
            assert any(words in reason["sentence"] for words in ("typically ", "most have none", "as most"))
            assert reason["feature"] != "visits_recency_days", "hidden in the campaign file"


def test_the_model_tells_about_itself(service):
    model = service.client.get("/model").json()
    assert (model["campaign"], model["key"], model["rollout"]["mode"]) == ("small", "customer_id", "off")
    assert model["metrics"]["auc"]["low"] < model["metrics"]["auc"]["value"] < model["metrics"]["auc"]["high"]
    contract = {feature["name"]: feature for feature in model["features"]}
    assert contract["total_purchases"]["feature"] == "orders_count_all"
    assert contract["total_purchases"]["minimum"] == 0
    assert "DE" in contract["country"]["categories"]
    assert model["trained_on"]["rows"]["train"] > 0
    assert model["model_card"]["intended_use"]
    campaigns = service.client.get("/campaigns").json()
    assert campaigns["default"] == "small"
    assert campaigns["campaigns"][0]["paths"][0] == "/campaigns/small/predict"
    assert service.client.get("/campaigns/small/model").json() == model


def test_the_documentation_is_there(service):
    page = service.client.get("/")
    assert page.status_code == 200
    assert "swagger" in page.text.lower()
    loaded = re.findall(r'(?:src|href)="(.*?)"', page.text)
    assert "http" not in "".join(loaded), "the page needs, and tells, no other host"
    for file in loaded:
        assert file == "data:," or service.client.get(file[1:]).status_code == 200
    document = service.client.get("/docs.json").json()
    for path in ("/predict", "/predict_batch", "/explain", "/model", "/campaigns", "/campaigns/small/predict"):
        assert path in document["paths"]
    example = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["example"]
    service.ok("/predict", example)


def test_metrics_count_with_few_labels(service):
    for i in range(50):
        service.client.get(f"/junk/{i}")
        service.client.post(f"/campaigns/junk{i}/predict", json={})
    service.ok("/predict", {"customer_id": "1"})
    text = service.client.get("/metrics").text
    assert 'propensity_requests_total{campaign="",endpoint="predict",status="200"}' in text
    assert 'propensity_requests_within_total{campaign="",endpoint="predict",le="+Inf"}' in text
    assert "junk" not in text
    assert "propensity_predictions_dropped 0.0" in text
    assert text.count("\n") < 400


@pytest.mark.parametrize("kind", KINDS)
def test_http_gives_the_numbers_of_batch(all_registered, tmp_path, engine, kind):
    """A whole snapshot, one customer at a time and in batches, from the body and from the store."""
    home = copy_home(all_registered, tmp_path)
    version = all_registered.versions[kind]
    model = load_model(all_registered.store.folder("small", version))
    score_snapshot(all_registered.campaign, newest(home), model, version, datetime(2025, 1, 1), home, engine)
    (found,) = [v for v in all_registered.store.versions("small") if v.version == version]
    name = build_package(all_registered.campaign, found, home, all_registered.store)
    write_release(home, ReleaseFile(name))
    publish_online_features(all_registered.campaign, newest(home), home)
    tolerance = 1e-6 if kind in ("neural_network", "ensemble") else 1e-9
    scores, rows = scores_of(home), features_of(home)
    assert len(scores) == len(rows) > 1_000
    with Service(home.root) as running:
        for i, row in enumerate(rows):
            # One from its body and one from the store, in turn; then all of them in batches from the store.
            compare(running.ok("/predict", row if i % 2 else {"customer_id": row["customer_id"]}), scores, tolerance)
        for start in range(0, len(rows), 1_000):
            part = [{"customer_id": row["customer_id"]} for row in rows[start : start + 1_000]]
            for answer in running.ok("/predict_batch", {"rows": part})["predictions"]:
                compare(answer, scores, tolerance)


def compare(answer: dict, scores: dict[str, dict], tolerance: float) -> None:
    wanted = scores[answer["customer_id"]]
    assert answer["probability"] == pytest.approx(wanted["probability"], abs=tolerance, rel=0)
    assert answer["percentile"] == pytest.approx(wanted["percentile"], abs=1e-12)
    assert (answer["decile"], answer["tier"]) == (wanted["decile"], wanted["tier"])
    assert answer["model_version"] == wanted["model_version"]


def write_release(home: Home, release: ReleaseFile) -> None:
    """As the publisher does: a new file in the place of the old one."""
    folder = home.serving / "small"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".release.tmp"
    temporary.write_text(json.dumps(msgspec.to_builtins(release)))
    temporary.replace(folder / "release.json")


# Swapping


def test_swaps_under_load_lose_nothing(registered, tmp_path):
    """Sixteen connections, a swap a second, broken packages and releases among them: no error, no old answer.

    `make benchmark-serving` does the same for a minute.
    """
    from benchmarks.serving import swap_under_load

    packages = two_packages(registered)
    with Service(registered.home.root) as running:
        report = swap_under_load(running.port, registered.home.serving / "small", packages, seconds=8)
        assert report.errors == []
        assert report.requests > 500
        assert report.swaps >= 5
        assert report.slowest_swap_seconds < 2.0
        assert report.refused > 0
    assert "Traceback" not in running.text()


def two_packages(registered) -> list[str]:
    store, home = registered.store, registered.home
    publish_release(registered.campaign, home, store)
    versions = [registered.versions[kind] for kind in ("lightgbm", "logistic_regression")]
    found = [v for v in store.versions("small") if v.version in versions]
    return [build_package(registered.campaign, v, home, store) for v in found]


def test_promotion_and_rollback_reach_every_worker(registered):
    campaign, home, store = registered.campaign, registered.home, registered.store
    first = store.champion("small").version
    publish_release(campaign, home, store)
    with Service(home.root) as running:
        assert versions_seen(running) == {first}
        store.promote("small", registered.versions["lightgbm"], "by hand")
        publish_release(campaign, home, store)
        published = last_old = time.monotonic()
        while time.monotonic() < published + 5:
            if first in versions_seen(running, 4):
                last_old = time.monotonic()
        assert last_old - published < 2.0
        assert versions_seen(running) == {registered.versions["lightgbm"]}
        command = [sys.executable, "-m", "propensity_dagster.cli", "champion", "rollback", str(registered.file)]
        subprocess.run(command, env=environment(home), check=True, capture_output=True)
        wait_until(lambda: versions_seen(running) == {first})


def environment(home: Home) -> dict[str, str]:
    import os

    return {**os.environ, "PROPENSITY_HOME": str(home.root)}


def versions_seen(running: Service, connections: int = 24) -> set[str]:
    """Over new connections, so that every worker is asked."""
    found = set()
    for _ in range(connections):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port)) as connection:
            connection.request("POST", "/predict", '{"customer_id": "1"}', {"Content-Type": "application/json"})
            found.add(json.load(connection.getresponse())["model_version"])
    return found


def test_a_service_without_a_champion_waits_for_one(registered, tmp_path):
    home = registered.home
    shutil.rmtree(home.serving, ignore_errors=True)
    with Service(home.root) as running:
        assert running.client.get("/livez").status_code == 200
        for answer in (running.client.get("/readyz"), running.post("/predict", {"customer_id": "1"})):
            assert (answer.status_code, answer.json()["code"]) == (503, "no_champion")
        assert "answers 503 until" in running.text()
        publish_release(registered.campaign, home, registered.store)
        wait_until(lambda: running.client.get("/readyz").status_code == 200)
        running.ok("/predict", {"customer_id": "1"})


def test_a_broken_release_leaves_the_good_one(registered):
    home = registered.home
    publish_release(registered.campaign, home, registered.store)
    with Service(home.root) as running:
        before = running.ok("/predict", {"customer_id": "1"})["model_version"]
        (home.serving / "small" / "release.json").write_text('{"champion": "v9-gone"}')
        wait_until(lambda: running.client.get("/model").json()["refused"])
        assert running.ok("/predict", {"customer_id": "1"})["model_version"] == before
        wait_until(lambda: 'propensity_refusals{what="release of small"} 1.0' in running.client.get("/metrics").text)


# Rollout


def test_shadow_scores_and_logs_but_never_answers(registered):
    campaign, home, store = registered.campaign, registered.home, registered.store
    publish_release(campaign, home, store)
    publish_online_features(campaign, newest(home), home)
    challenger = registered.versions["lightgbm"]
    set_rollout(campaign, home, store, "shadow", 0.0, challenger)
    rows = [{"customer_id": row["customer_id"]} for row in features_of(home)[:40]]
    with Service(home.root) as running:
        answers = [running.ok("/predict", row) for row in rows]
    assert {a["variant"] for a in answers} == {"champion"}
    day = datetime.now(UTC).date()
    ingest_predictions(campaign, day, home)
    logged = pq.read_table(home.lake("small").partition("predictions", "day", day)).to_pylist()
    model = load_model(store.folder("small", challenger))
    features = pq.read_table(home.lake("small").partition("features", "snapshot", newest(home)))
    shadow = dict(zip(features["customer_id"].to_pylist(), model.predict_proba(features).tolist(), strict=True))
    assert len(logged) == len(rows)
    for row in logged:
        assert row["shadow_version"] == challenger
        assert row["shadow_probability"] == pytest.approx(shadow[row["key"]], abs=1e-9)
        assert row["shadow_difference"] == pytest.approx(row["shadow_probability"] - row["probability"], abs=1e-12)


def test_a_split_moves_only_who_must_move(registered):
    campaign, home, store = registered.campaign, registered.home, registered.store
    publish_release(campaign, home, store)
    challenger = registered.versions["lightgbm"]
    rows = [{"customer_id": f"customer-{i}"} for i in range(1_000)]

    def challenged(running: Service, share: float) -> set[str]:
        set_rollout(campaign, home, store, "split", share, challenger)
        wait_until(lambda: running.client.get("/model").json()["rollout"]["share"] == share)
        time.sleep(0.6)  # the other worker, too
        found = running.ok("/predict_batch", {"rows": rows})["predictions"]
        for answer in found:
            assert (answer["variant"] == "challenger") == (answer["model_version"] == challenger)
        return {a["customer_id"] for a in found if a["variant"] == "challenger"}

    with Service(home.root) as running:
        small, large, again = (challenged(running, share) for share in (0.1, 0.4, 0.1))
    assert 60 < len(small) < 145
    assert 340 < len(large) < 460
    assert small < large
    assert small == again


# The log


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_every_answer_is_in_the_log_after_a_normal_stop(registered, how):
    campaign, home = registered.campaign, registered.home
    publish_release(campaign, home, registered.store)
    publish_online_features(campaign, newest(home), home)
    rows = [{"customer_id": row["customer_id"]} for row in features_of(home)[:300]]
    answers: list[dict] = []
    with Service(home.root) as running:

        def ask(part):
            with httpx.Client(base_url=f"http://127.0.0.1:{running.port}") as client:
                answers.extend(client.post("/predict", json=row).json() for row in part)

        threads = [threading.Thread(target=ask, args=(rows[i::6],)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers += running.ok("/predict_batch", {"rows": rows})["predictions"]
        answers.append(running.ok("/explain", {**rows[0], "age": 47, "country": "Atlantis"}))
        running.stop(how)
    day = datetime.now(UTC).date()
    report = ingest_predictions(campaign, day, home)
    assert (report.rows, report.unreadable) == (len(answers), 0)
    logged = {row["request_id"]: row for row in predictions_of(home, day)}
    assert len(logged) == len(answers)
    stored = {row["customer_id"]: row for row in features_of(home)}
    for answer in answers:
        row = logged[answer["request_id"]]
        assert row["probability"] == answer["probability"]
        assert (row["key"], row["variant"]) == (answer["customer_id"], answer["variant"])
        assert row["model_version"] == answer["model_version"]
        if answer is not answers[-1]:
            used = outward(row["features"])
            assert used == {k: v for k, v in stored[row["key"]].items() if k != "customer_id"}
    last = logged[answers[-1]["request_id"]]
    assert (last["features"]["age"], last["features"]["country"]) == (47, None)
    assert (last["features_unseen"], last["endpoint"]) == (["country"], "explain")
    assert ingest_predictions(campaign, day, home).rows == len(answers), "again, it is the same"


def predictions_of(home: Home, day: date) -> list[dict]:
    return pq.read_table(home.lake("small").partition("predictions", "day", day)).to_pylist()


def test_a_line_that_was_cut_short_is_counted(registered):
    campaign, home = registered.campaign, registered.home
    publish_release(campaign, home, registered.store)
    with Service(home.root) as running:
        for i in range(10):
            running.ok("/predict", {"customer_id": str(i)})
    (file, *_) = sorted((home.predictions / "small").glob("day=*/*.jsonl"))
    file.write_bytes(file.read_bytes()[:-20])
    report = ingest_predictions(campaign, datetime.now(UTC).date(), home)
    assert (report.rows, report.unreadable) == (9, 1)


def test_a_log_that_cannot_be_written_does_not_stop_the_answers(registered, tmp_path):
    publish_release(registered.campaign, registered.home, registered.store)
    place = tmp_path / "full"
    place.write_text("a file where the folder should be")
    with Service(registered.home.root, environment={"PROPENSITY_PREDICTIONS": str(place)}) as running:
        for i in range(30):
            running.ok("/predict", {"customer_id": str(i)})
        wait_until(lambda: "propensity_predictions_dropped 30.0" in running.client.get("/metrics").text)


def test_dagster_ingests_the_log(registered):
    import dagster as dg

    from propensity_dagster.components.campaign_folder import campaign_definitions
    from propensity_dagster.runtime import Runtime

    publish_release(registered.campaign, registered.home, registered.store)
    with Service(registered.home.root) as running:
        running.ok("/predict", {"customer_id": "1"})
    defs = dg.Definitions.merge(
        campaign_definitions(registered.campaign),
        dg.Definitions(resources={"runtime": Runtime(registered.home)}),
    )
    day = str(datetime.now(UTC).date())
    with dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def("small__ingest_predictions").execute_in_process(
            instance=instance, partition_key=day
        )
    assert result.success
    assert len(predictions_of(registered.home, date.fromisoformat(day))) == 1


# Several campaigns


def test_several_campaigns_in_one_process(registered):
    """A second campaign beside the first; the plain paths are the default's."""
    home = registered.home
    publish_release(registered.campaign, home, registered.store)
    package = next((home.serving / "small" / "packages").iterdir())
    other = home.serving / "another" / "packages" / "v7-x"
    shutil.copytree(package, other)
    from propensity_dagster.manifest import write_manifest

    content = json.loads((other / "campaign.json").read_text())
    (other / "campaign.json").write_text(json.dumps({**content, "campaign": "another", "version": "7"}))
    write_manifest(other, 1)
    (home.serving / "another" / "release.json").write_text('{"champion": "v7-x"}')
    (home.serving / "settings.yaml").write_text("default_campaign: small\n")
    with Service(home.root) as running:
        names = [c["name"] for c in running.client.get("/campaigns").json()["campaigns"]]
        assert names == ["another", "small"]
        assert running.ok("/predict", {"customer_id": "1"})["campaign"] == "small"
        assert running.ok("/campaigns/another/predict", {"customer_id": "1"})["model_version"] == "7"
        assert running.client.get("/campaigns/none/model").status_code == 404
        (home.serving / "settings.yaml").write_text("default_campaign: another\n")
        wait_until(lambda: running.ok("/predict", {"customer_id": "1"})["campaign"] == "another")


# Redis


def test_online_features_in_redis(registered, redis_url):
    url, server = redis_url
    campaign, home = registered.campaign, registered.home
    publish_release(campaign, home, registered.store)
    home.serving.mkdir(exist_ok=True)
    (home.serving / "settings.yaml").write_text(f"online_store: {url}\n")
    report = publish_online_features(campaign, newest(home), home)
    assert (report.store, report.rows) == ("redis", len(features_of(home)))
    older = publish_online_features(campaign, home.lake("small").partitions("features", "snapshot")[0], home)
    assert "newer" in older.skipped
    scores = scores_of(home)
    with Service(home.root) as running:
        for key in list(scores)[:50]:
            answer = running.ok("/predict", {"customer_id": key})
            assert answer["known"] is True
            assert answer["probability"] == pytest.approx(scores[key]["probability"], abs=1e-6)
        rows = [{"customer_id": key} for key in [*list(scores)[:100], "nobody"]]
        found = running.ok("/predict_batch", {"rows": rows})["predictions"]
        assert [a["known"] for a in found] == [True] * 100 + [False]
        publish_online_features(campaign, newest(home), home)  # again: the pointer moves, nobody notices
        assert running.ok("/predict", rows[0])["known"] is True
        server.terminate()
        server.wait()
        answer = running.post("/predict", rows[0])
        assert (answer.status_code, answer.json()["code"]) == (503, "online_store_unavailable")
        running.ok("/predict", features_of(home)[0])  # all features given: no store needed


def test_a_newer_snapshot_replaces_the_online_features(registered):
    campaign, home = registered.campaign, registered.home
    publish_release(campaign, home, registered.store)
    older = home.lake("small").partitions("features", "snapshot")[-2]
    (home.serving / "small" / "online.sqlite").unlink()
    publish_online_features(campaign, older, home)
    key = features_of(home)[0]["customer_id"]
    with Service(home.root) as running:
        assert running.ok("/predict", {"customer_id": key})["online"]["snapshot"] == str(older)
        publish_online_features(campaign, newest(home), home)
        wait_until(lambda: running.ok("/predict", {"customer_id": key})["online"]["snapshot"] == str(newest(home)))
        assert publish_online_features(campaign, older, home).skipped


def test_a_broken_file_of_online_features_is_replaced(registered):
    campaign, home = registered.campaign, registered.home
    publish_release(campaign, home, registered.store)
    file = home.serving / "small" / "online.sqlite"
    for spoiled in (b"", b"no database", file.read_bytes()[:5000]):
        file.write_bytes(spoiled)
        assert publish_online_features(campaign, newest(home), home).rows == len(scores_of(home))
        assert sqlite_facts(file) is not None


def test_settings_that_are_wrong_are_told(registered):
    publish_release(registered.campaign, registered.home, registered.store)
    (registered.home.serving / "settings.yaml").write_text("max_body_byte: 1\n")
    command = [sys.executable, "-m", "propensity_dagster.cli", "serve", "--port", str(free_port())]
    shown = subprocess.run(command, env=environment(registered.home), capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert "settings.yaml" in shown.stderr
    assert "max_body_byte" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert Settings().max_body_bytes == 65_536
