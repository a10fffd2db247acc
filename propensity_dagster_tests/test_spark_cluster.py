"""Spark away from this process: through Spark Connect, and on a cluster that loses a worker."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.lake import Home

from .conftest import SMALL
from .pipeline import require_equal_lakes, run_pipeline, score_newest
from .served import free_port, wait_until

pyspark = pytest.importorskip("pyspark", reason="the extra 'spark' is not installed")
if shutil.which("java") is None:
    pytest.skip("there is no Java", allow_module_level=True)

ROOT = Path(__file__).parents[1]
SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"


def small_campaign(folder: Path) -> Path:
    content = yaml.safe_load(SMALL)
    content["source"]["connection"] = "synthetic://ecommerce?customers=800&days=140&seed=3"
    content["snapshots"] = {"every": "7d", "train": 2, "validate": 1, "test": 1}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def expected(engine, all_registered, tmp_path_factory):
    """A campaign, a model, and the home that DuckDB made of them."""
    root = tmp_path_factory.mktemp("expected")
    campaign = load_campaign(small_campaign(root))
    model = all_registered.store.folder("small", all_registered.versions["lightgbm"])
    run_pipeline(campaign, Home(root / "duckdb"), engine)
    score_newest(campaign, model, Home(root / "duckdb"), engine)
    return campaign, model, Home(root / "duckdb")


def environment(home: Home, engine_url: str, **more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PROPENSITY_", "SPARK_", "PYSPARK_"))}
    return {
        **inherited,
        "PROPENSITY_HOME": str(home.root),
        "PROPENSITY_ENGINE": engine_url,
        "PROPENSITY_MEMORY_GB": "1",
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_SUBMIT_OPTS": os.environ["SPARK_SUBMIT_OPTS"],
        **more,
    }


def start(command: list[str], log: Path, **more: str) -> subprocess.Popen:
    with log.open("w") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_LOCAL_DIRS": str(log.parent / "spark"), **more},
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def stop(process: subprocess.Popen) -> None:
    """Servers remove their temporary files when they are asked to end; who does not end is killed."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def job(campaign, model: Path) -> list[str]:
    return [sys.executable, "-m", "propensity_dagster_tests.pipeline", str(campaign.file), str(model)]


@pytest.fixture
def worker_python(tmp_path_factory):
    """What an executor needs, and nothing else."""
    folder = tmp_path_factory.mktemp("executor") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    packages = ["numpy", "pyarrow", "lightgbm"]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *packages]
    subprocess.run(pip, check=True)
    return folder / "bin" / "python"


def test_a_cluster_that_loses_a_worker_gives_the_same_tables(expected, tmp_path, worker_python):
    campaign, model, here = expected
    home = Home(tmp_path / "home")
    shutil.copytree(here.synthetic, home.synthetic)
    port = free_port()
    url = f"spark://127.0.0.1:{port}"
    deploy = "org.apache.spark.deploy"
    local = ["--host", "127.0.0.1", "--webui-port", str(free_port())]
    processes = [
        start([str(SPARK_CLASS), f"{deploy}.master.Master", *local, "--port", str(port)], tmp_path / "master.log")
    ]
    try:
        wait_until(lambda: "ALIVE" in (tmp_path / "master.log").read_text(), seconds=60)
        for n in (1, 2):
            own = ["--host", "127.0.0.1", "--webui-port", str(free_port()), "--cores", "1", "--memory", "1g"]
            worker = [str(SPARK_CLASS), f"{deploy}.worker.Worker", *own, "--work-dir", str(tmp_path / f"work{n}"), url]
            processes.append(start(worker, tmp_path / f"worker{n}.log", SPARK_WORKER_OPTS=""))
            wait_until(lambda n=n: "registered with master" in (tmp_path / f"worker{n}.log").read_text(), seconds=60)
        driver = start(
            job(campaign, model), tmp_path / "driver.log", **environment(home, url, PYSPARK_PYTHON=str(worker_python))
        )
        processes.append(driver)
        activity = home.lake("small").root / "activity"
        wait_until(lambda: activity.exists() or driver.poll() is not None, seconds=300)
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()[-3000:]
        executors = executors_of(tmp_path / "work2")
        assert executors
        kill(processes[2])
        for pid in executors:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert driver.wait(timeout=400) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    finally:
        for process in processes:
            stop(process)
    require_equal_lakes(here.lake("small").root, home.lake("small").root)
    assert "xecutor" in (tmp_path / "driver.log").read_text()  # it noticed


def executors_of(work: Path) -> list[int]:
    """Processes whose working folder is in that of a worker."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(process / "cwd")).is_relative_to(work):
                found.append(int(process.name))
    return found


def test_spark_connect_gives_the_same_tables(expected, tmp_path):
    campaign, model, here = expected
    home, port = Home(tmp_path / "home"), free_port()
    shutil.copytree(here.synthetic, home.synthetic)
    server = start(
        [
            str(SPARK_CLASS), "org.apache.spark.deploy.SparkSubmit",
            "--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "--master", "local[2]",
            "--conf", f"spark.connect.grpc.binding.port={port}", "--conf", "spark.connect.grpc.binding.address=127.0.0.1",
            "--conf", "spark.ui.enabled=false", "--conf", "spark.driver.host=127.0.0.1", "spark-internal",
        ],
        tmp_path / "connect.log",
        PYSPARK_PYTHON=sys.executable,
    )  # fmt: skip
    try:
        wait_until(lambda: "Spark Connect server started" in (tmp_path / "connect.log").read_text(), seconds=60)
        own = environment(home, f"sc://127.0.0.1:{port}")
        done = subprocess.run(
            job(campaign, model), env=own, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        stop(server)
    require_equal_lakes(here.lake("small").root, home.lake("small").root)
