"""The bento: built offline by Dagster when the champion changes, and served where only its own packages are."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg
import httpx
import pytest
import yaml

from propensity_dagster.components.campaign_folder import campaign_definitions
from propensity_dagster.runtime import Runtime
from propensity_dagster.serving.publish.releases import publish_release

from .served import Service, wait_until
from .test_serving import copy_home, features_of, scores_of

ROOT = Path(__file__).parents[1]
NOT_IN_THE_WORKER = ("dagster", "mlflow", "torch", "shap", "pandas", "pyarrow", "scipy", "sklearn", "lightgbm", "ibis")
# No name is resolved and no proxy is asked: what needs the network fails.
OFFLINE = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "PIP_INDEX_URL")}
DUMP = """
import json, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: open(os.environ["DUMP"] + str(os.getpid()), "w").write(json.dumps(sorted(sys.modules))))
"""


@pytest.fixture(scope="module")
def built(all_registered, tmp_path_factory):
    """The asset `bento` of a home, built without a network."""
    root = tmp_path_factory.mktemp("bento")
    home = copy_home(all_registered, root)
    publish_release(all_registered.campaign, home, all_registered.store)
    defs = dg.Definitions.merge(
        campaign_definitions(all_registered.campaign), dg.Definitions(resources={"runtime": Runtime(home)})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(root / "bentoml"))
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        with dg.DagsterInstance.ephemeral() as instance:
            result = defs.resolve_job_def("small__build_bento").execute_in_process(instance=instance)
    assert result.success
    (event,) = [e for e in result.all_events if e.event_type_value == "ASSET_MATERIALIZATION"]
    metadata = {k: v.value for k, v in event.materialization.metadata.items()}
    return root, home, metadata


def test_the_asset_says_what_it_built(built):
    _, home, metadata = built
    assert metadata["tag"].startswith("propensity:")
    assert 0 < metadata["megabytes"] < 20
    assert (
        json.loads((home.serving / "small" / "release.json").read_text())["champion"] == metadata["packages"]["small"]
    )


def test_no_customers_and_no_keys_in_the_bento(built):
    root, _, _ = built
    names = [str(path.relative_to(root)) for path in (root / "bentoml").rglob("*")]
    assert any(name.endswith("trees.txt") for name in names)
    assert not [name for name in names if name.endswith((".sqlite", "keys.json", "settings.yaml", ".lock", ".pkl"))]


def test_the_sensor_follows_the_champion(registered, monkeypatch):
    campaign, home, store = registered.campaign, registered.home, registered.store
    monkeypatch.setenv("PROPENSITY_HOME", str(home.root))
    publish_release(campaign, home, store)
    resources = dg.Definitions(resources={"runtime": Runtime(home)})
    defs = dg.Definitions.merge(campaign_definitions(campaign), resources)
    sensor = defs.resolve_sensor_def("small__bento_after_release")

    def evaluate(cursor):
        context = dg.build_sensor_context(cursor=cursor)
        return sensor(context), context.cursor

    first, cursor = evaluate(None)
    assert isinstance(first, dg.RunRequest)
    assert isinstance(evaluate(cursor)[0], dg.SkipReason)
    publish_release(campaign, home, store)  # a new night, the same champion
    assert isinstance(evaluate(cursor)[0], dg.SkipReason)
    store.promote("small", registered.versions["lightgbm"], "by hand")
    publish_release(campaign, home, store)
    assert isinstance(evaluate(cursor)[0], dg.RunRequest)


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory) -> Path:
    """A virtual environment with the packages of bentofile.yaml, in our pinned versions, and nothing of ours."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    packages = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), *packages], check=True)
    return folder / "bin" / "python"


def test_the_bento_is_served_with_its_packages_alone(built, clean_python, tmp_path):
    """`bentoml serve propensity:latest`: same scores, and none of the batch side's packages in a worker."""
    root, home, _ = built
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DUMP)
    environment = {
        **OFFLINE,
        "NO_PROXY": "127.0.0.1",
        "BENTOML_HOME": str(root / "bentoml"),
        "PROPENSITY_HOME": "",
        "PYTHONPATH": str(tmp_path / "site"),
        "DUMP": str(tmp_path / "modules-"),
    }
    command = (str(clean_python), "-m", "bentoml", "serve", "propensity:latest", "--host", "127.0.0.1")
    features = features_by_key(home)
    with Service(home.root, environment=environment, command=command, cwd=tmp_path) as running:
        assert "answers are not logged" in running.text()
        for key, wanted in list(scores_of(home).items())[:50]:
            answer = running.ok("/predict", features[key])
            assert answer["probability"] == pytest.approx(wanted["probability"], abs=1e-6)
            assert answer["tier"] == wanted["tier"]
        workers = running.workers()
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGUSR1)
        files = [tmp_path / f"modules-{pid}" for pid in workers]
        wait_until(lambda: all(file.exists() and file.read_text().endswith("]") for file in files))
        for file in files:
            loaded = set(json.loads(file.read_text()))
            assert not loaded & set(NOT_IN_THE_WORKER)
            assert "propensity_dagster.serving.gateway" in loaded
            assert "propensity_dagster.serving.publish" not in loaded
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_worker_of_the_full_environment_imports_no_more(built, tmp_path):
    """Where dagster, torch and pandas are installed, the worker still does not load them."""
    _, home, _ = built
    (tmp_path / "sitecustomize.py").write_text(DUMP)
    environment = {"PYTHONPATH": str(tmp_path), "DUMP": str(tmp_path / "modules-")}
    with Service(home.root, environment=environment) as running:
        running.ok("/explain", {"customer_id": "1"})
        assert httpx.get(f"http://127.0.0.1:{running.port}/metrics").status_code == 200
        assert len(running.workers()) == 2
        for pid in running.workers():
            os.kill(pid, signal.SIGUSR1)
            file = tmp_path / f"modules-{pid}"
            wait_until(lambda f=file: f.exists() and f.read_text().endswith("]"))
            assert not set(json.loads(file.read_text())) & set(NOT_IN_THE_WORKER)


def features_by_key(home) -> dict[str, dict]:
    return {row["customer_id"]: row for row in features_of(home)}


def test_the_users_own_build_works(built, tmp_path):
    """`bentoml build` in the project's root, with a home in .propensity."""
    _, home, _ = built
    root = tmp_path / "project"
    shutil.copytree(
        ROOT / "propensity_dagster", root / "propensity_dagster", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "bentofile.yaml", root)
    shutil.copytree(home.serving, root / ".propensity" / "serving")
    environment = {**os.environ, **OFFLINE, "BENTOML_HOME": str(tmp_path / "bentoml"), "BENTOML_DO_NOT_TRACK": "true"}
    environment.pop("PROPENSITY_HOME", None)
    shown = subprocess.run(
        [sys.executable, "-m", "bentoml", "build"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    (source,) = (tmp_path / "bentoml" / "bentos" / "propensity").glob("*/src")
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert ".propensity/serving/small/release.json" in names
    assert "propensity_dagster/serving/gateway.py" in names
    assert not [n for n in names if "publish" in n or "models/" in n.replace("/model/", "") or n.endswith(".sqlite")]
