"""Publishing: whole or not at all. Scores, the model store, the runtime's settings."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import (
    Home,
    publish_table,
    publish_text,
    publishing,
    publishing_folder,
    scratch_folder,
)
from propensity_dagster.errors import ConfigError, DataContractError, SavedModelError, StorageError
from propensity_dagster.models.dataset import read_split
from propensity_dagster.models.saved import load_model
from propensity_dagster.registry.mlflow_store import MlflowStore
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.batch import score_snapshot, score_violations
from propensity_dagster.scoring.candidates import read_evaluation
from propensity_dagster.scoring.promotion import promote_if_decided, require_champion

TABLE = pa.table({"a": np.arange(1000)})


def test_many_write_one_file_at_once(tmp_path):
    """The last one to finish wins, and nobody takes away what another is writing."""
    file = tmp_path / "day=2024-01-01" / "part.parquet"

    def write(number: int) -> None:
        publish_table(pa.table({"n": [number] * 1000}), file)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert len(set(pq.read_table(file)["n"].to_pylist())) == 1
    assert leftovers(tmp_path) == []


def test_a_folder_that_is_being_written_is_not_taken_away_by_another_writer(tmp_path):
    folder = tmp_path / "model"

    def write(content: str) -> None:
        with publishing_folder(folder) as staging:
            (staging / "trees.txt").write_text(content)

    with publishing_folder(folder) as staging:
        (staging / "trees.txt").write_text("mine")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(write, "theirs").result()
        assert (folder / "trees.txt").read_text() == "theirs"
    assert (folder / "trees.txt").read_text() == "mine"
    assert leftovers(tmp_path) == []


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*")]


def test_an_error_in_the_middle_leaves_what_was_there(tmp_path):
    file = tmp_path / "table" / "part.parquet"
    publish_table(TABLE, file)
    before = file.read_bytes()
    with pytest.raises(KeyError), publishing(file) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert file.read_bytes() == before
    assert leftovers(tmp_path) == []
    with pytest.raises(KeyError), publishing_folder(tmp_path / "model") as staging:
        (staging / "a").write_text("half")
        raise KeyError
    assert not (tmp_path / "model").exists()


def test_a_full_disk_is_a_clear_error(tmp_path):
    """The kernel refuses to let the file grow, as it does when the disk is full."""
    file = tmp_path / "part.parquet"
    publish_text("the last good one", file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match=r"part\.parquet: cannot be written"):
            publish_table(pa.table({"a": np.random.default_rng(0).random(10_000)}), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "the last good one"
    assert leftovers(tmp_path) == []


def test_a_full_disk_while_the_engine_writes(tmp_path):
    file = tmp_path / "features" / "part.parquet"
    code = f"""
import resource, signal
from pathlib import Path
import ibis
from propensity_dagster.data.engine import open_engine
from propensity_dagster.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open_engine() as engine:
    table = engine.backend.sql("SELECT random() AS a FROM range(400000)")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        engine.publish(table, Path({str(file)!r}))
    except StorageError as error:
        print("told:", error)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "told:" in shown.stdout
    assert "cannot be written" in shown.stdout
    assert list(file.parent.iterdir()) == []


def test_a_killed_writer_leaves_nothing_visible(tmp_path):
    file = tmp_path / "part.parquet"
    publish_text("good", file)
    child = os.fork()
    if child == 0:
        with publishing(file) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert file.read_text() == "good"
    assert leftovers(tmp_path) != []  # the temporary file of the dead
    publish_text("better", file)
    assert leftovers(tmp_path) == []
    assert file.read_text() == "better"


def test_scratch_of_the_dead_is_removed_and_of_the_living_not(tmp_path):
    child = os.fork()
    if child == 0:
        with scratch_folder("spill", tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    with scratch_folder("spill", tmp_path) as first:
        assert not left.exists()
        with scratch_folder("spill", tmp_path) as second:
            assert {*tmp_path.iterdir()} == {first, second}
    assert list(tmp_path.iterdir()) == []


DYING_SCORES = """
import os, signal, sys
from datetime import date, datetime
from pathlib import Path
from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.models.saved import load_model
from propensity_dagster.scoring import batch

finish, finished = batch._finish, []

def dying(*arguments):
    if finished:
        os.kill(os.getpid(), signal.SIGKILL)
    finished.append(1)
    return finish(*arguments)

batch._finish, batch.BATCH_ROWS = dying, 500
file, home, model, day = sys.argv[1:]
with open_engine() as engine:
    batch.score_snapshot(
        load_campaign(Path(file)), date.fromisoformat(day), load_model(Path(model)), "2", datetime(2031, 1, 1),
        Home(Path(home)), engine,
    )
"""


def test_a_scoring_run_killed_in_the_middle(materialized, newest_snapshot, tmp_path, monkeypatch):
    """The scores before it stay whole; the next run gives the same and leaves nothing behind."""
    scratch, home, campaign = tmp_path / "tmp", Home(tmp_path / "home"), materialized.campaign
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    folder = materialized.home.candidates("small") / "lightgbm"
    source = materialized.home.lake("small").partition("features", "snapshot", newest_snapshot)
    target = home.lake("small").partition("features", "snapshot", newest_snapshot)
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)
    stated = campaign, newest_snapshot, load_model(folder), "2", datetime(2030, 1, 1), home
    with open_engine() as engine:
        score_snapshot(*stated, engine)
    file = home.lake("small").partition("scores", "snapshot", newest_snapshot)
    before = file.read_bytes()
    arguments = [str(campaign.file), str(home.root), str(folder), str(newest_snapshot)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    killed = subprocess.run([sys.executable, "-c", DYING_SCORES, *arguments], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert file.read_bytes() == before
    assert any(scratch.iterdir())
    with open_engine() as engine:
        score_snapshot(*stated, engine)
    assert file.read_bytes() == before
    assert not any(scratch.iterdir())
    assert [f.name for f in file.parent.iterdir()] == ["part.parquet"]


def test_a_home_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match="the home folder must be a folder that can be written to"):
        Home(blocked / "home").ensure()
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError, match="set PROPENSITY_HOME"):
            Home(tmp_path).ensure()


@pytest.mark.parametrize("value", ["zero", "-1", "0"])
def test_settings_of_the_runtime(monkeypatch, value):
    monkeypatch.setenv("PROPENSITY_MEMORY_GB", value)
    with pytest.raises(ConfigError, match=f"PROPENSITY_MEMORY_GB must be a positive number, got '{value}'"):
        Runtime.from_environment()


@pytest.fixture
def champion(materialized):
    return require_champion(materialized.campaign, MlflowStore(materialized.home))


def test_scores_are_complete_and_ranked(materialized, newest_snapshot):
    lake = materialized.home.lake("small")
    features = pq.read_table(lake.partition("features", "snapshot", newest_snapshot))
    scores = pq.read_table(lake.partition("scores", "snapshot", newest_snapshot)).to_pandas()
    assert scores["customer_id"].tolist() == features["customer_id"].to_pylist()
    p = scores["probability"].to_numpy()
    expected = np.array([(p <= value).mean() for value in p])
    assert np.allclose(scores["percentile"], expected, rtol=0, atol=1e-15)
    assert abs((scores["decile"] == 1).mean() - 0.1) < 0.01
    assert ((scores["tier"] == "high") == (scores["percentile"] > 0.9)).all()
    assert np.allclose(scores["expected_value"], p * 22.5 - 0.4)
    assert (scores["decile"] == 11 - np.ceil(np.round(expected * len(p)) * 10 / len(p))).all()


def test_scoring_again_changes_nothing_but_the_time(materialized, newest_snapshot, champion, tmp_path):
    campaign, home = materialized.campaign, materialized.home
    version, model = champion
    file = home.lake("small").partition("scores", "snapshot", newest_snapshot)
    before = pq.read_table(file)
    at = before["scored_at"][0].as_py()
    with open_engine() as engine:
        report = score_snapshot(campaign, newest_snapshot, model, version, at, home, engine)
        assert score_violations(campaign, newest_snapshot, home, engine) == 0
    assert report.rows == report.rows_in == before.num_rows
    assert pq.read_table(file).equals(before)


def test_batch_scores_equal_the_model_on_the_whole_table(materialized, newest_snapshot, champion):
    lake = materialized.home.lake("small")
    features = pq.read_table(lake.partition("features", "snapshot", newest_snapshot))
    scores = pq.read_table(lake.partition("scores", "snapshot", newest_snapshot))
    assert np.abs(champion[1].predict_proba(features) - scores["probability"].to_numpy()).max() <= 1e-9


def test_scoring_without_champion_or_features(materialized, champion, tmp_path, engine):
    campaign = materialized.campaign
    with pytest.raises(DataContractError, match="there is no champion: run the job small__train"):
        require_champion(campaign, MlflowStore(Home(tmp_path)))
    with pytest.raises(DataContractError, match="features snapshot=2030-01-01 has not been"):
        day = datetime(2030, 1, 1).date()
        score_snapshot(campaign, day, champion[1], "1", datetime(2030, 1, 1), materialized.home, engine)


def test_tied_scores_share_their_percentile(materialized, newest_snapshot, tmp_path, engine):
    campaign = materialized.campaign
    home = Home(tmp_path)
    source = materialized.home.lake("small").partition("features", "snapshot", newest_snapshot)
    target = home.lake("small").partition("features", "snapshot", newest_snapshot)
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)
    baseline = load_model(materialized.home.candidates("small") / "baseline")
    score_snapshot(campaign, newest_snapshot, baseline, "0", datetime(2024, 1, 1), home, engine)
    scores = pq.read_table(home.lake("small").partition("scores", "snapshot", newest_snapshot)).to_pandas()
    assert (scores.groupby("probability")["percentile"].nunique() == 1).all()
    assert scores["percentile"].max() == 1.0


def test_an_empty_snapshot_gives_an_empty_table(materialized, newest_snapshot, champion, tmp_path, engine):
    campaign, home = materialized.campaign, Home(tmp_path)
    source = materialized.home.lake("small").partition("features", "snapshot", newest_snapshot)
    publish_table(
        pq.read_table(source).slice(0, 0), home.lake("small").partition("features", "snapshot", newest_snapshot)
    )
    report = score_snapshot(campaign, newest_snapshot, champion[1], "1", datetime(2024, 1, 1), home, engine)
    assert report.rows == report.rows_in == 0
    published = pq.read_schema(home.lake("small").partition("scores", "snapshot", newest_snapshot))
    assert published.names[:4] == ["customer_id", "snapshot", "probability", "percentile"]


def test_promotion_history_and_rollback(materialized, tmp_path):
    """Three different models through a real store: promoted, refused, rolled back twice."""
    campaign, home = materialized.campaign, Home(tmp_path)
    shutil.copytree(materialized.home.reports("small"), home.reports("small"))
    shutil.copytree(materialized.home.candidates("small"), home.candidates("small"))
    record = read_evaluation(campaign, home)
    store = MlflowStore(home)

    def stage(challenger: str, promoted: bool):
        decision = {**record["decision"], "promoted": promoted, "sentence": f"{challenger} {promoted}"}
        judged = {**record, "challenger": challenger, "decision": decision}
        folder = home.candidates("small") / challenger
        return promote_if_decided(campaign, judged, folder, home.reports("small"), store)

    assert stage("lightgbm", True).champion_version == "1"
    assert stage("neural_network", False).champion_version == "1"
    assert stage("ensemble", True).champion_version == "3"
    again = stage("ensemble", True)
    assert (again.champion_version, "is the champion already" in again.sentence) == ("3", True)
    assert [(e.action, e.version, e.previous) for e in store.history("small")] == [
        ("promoted", "1", None),
        ("refused", "2", "1"),
        ("promoted", "3", "1"),
    ]
    loaded = load_model(store.folder("small", "3"))
    rows = read_split(materialized.home.lake("small").file("training_set"), "test")
    here = load_model(home.candidates("small") / "ensemble")
    assert np.array_equal(loaded.predict_proba(rows), here.predict_proba(rows))

    assert store.roll_back("small", None, "worse in practice").version == "1"
    assert store.champion("small").version == "1"
    with pytest.raises(ConfigError, match="version 1 is the first champion; there is none before it"):
        store.roll_back("small", None, "again")
    with pytest.raises(ConfigError, match="there is no version 9; there are 1, 2, 3"):
        store.roll_back("small", "9", "typo")
    with pytest.raises(ConfigError, match="version 1 is the champion already"):
        store.roll_back("small", "1", "twice")
    assert store.roll_back("small", "3", "back").version == "3"
    assert [e.action for e in store.history("small")][-2:] == ["rolled back", "rolled back"]
    with pytest.raises(ConfigError, match="there is no champion to roll back"):
        store.roll_back("unknown", None, "")


def test_the_registered_model_loads_through_mlflow(materialized, newest_snapshot):
    """A colleague without this package's habits: mlflow.pyfunc and a pandas frame."""
    import mlflow

    store = MlflowStore(materialized.home)
    version = store.champion("small").version
    model = mlflow.pyfunc.load_model(f"models:/small/{version}")
    features = pq.read_table(materialized.home.lake("small").partition("features", "snapshot", newest_snapshot)).slice(
        0, 50
    )
    expected = load_model(store.folder("small", version)).predict_proba(features)
    assert np.abs(model.predict(features.drop_columns(["customer_id"]).to_pandas()) - expected).max() <= 1e-9
    run = mlflow.get_run(store.champion("small").run_id)
    assert run.data.tags["git_revision"]
    assert run.data.params["snapshots_train"]
    assert run.data.metrics["ensemble.log_loss"] > 0


def test_two_processes_may_open_a_fresh_store_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from propensity_dagster.data.lake import Home;"
        "from propensity_dagster.registry.mlflow_store import MlflowStore;"
        "print(MlflowStore(Home(Path(sys.argv[1]))).champion('nobody'))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "home")], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == ["None"] * 3


def test_a_harmed_champion_is_refused(materialized, tmp_path):
    folder = MlflowStore(materialized.home).folder("small", "1")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.json").write_bytes((copy / "model.json").read_bytes()[:-10])
    with pytest.raises(SavedModelError, match="checksum differs"):
        load_model(copy)
