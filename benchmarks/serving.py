"""The service against its peers, all in one run on the same model and features, alternating.

    python -m benchmarks.serving [--rounds 3] [--seconds 5] [--swap-seconds 60]

Peers: plain uvicorn + FastAPI with LightGBM's C API; `mlflow models serve`; and, as a ceiling, a bare ASGI application
with msgspec that checks, logs and counts nothing. All with two workers. Needs wrk. Prints Markdown tables.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

from benchmarks.models import training_data
from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Calibrator
from propensity_dagster.models.saved import write_model
from propensity_dagster.models.trees import LightGBMEstimator, TreesScorer
from propensity_dagster.registry.store import Version
from propensity_dagster.serving.publish.keys import add_key
from propensity_dagster.serving.publish.packages import build_package

PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
TREES, LEAVES, ROWS, CONNECTIONS, WORKERS = 300, 31, 50_000, 16, 2
CAMPAIGN = """
name: benchmark
source: {kind: table, path: none.csv, key: customer_id}
outcome: {column: y, positive: "1"}
models: [baseline, lightgbm]
"""
SETTINGS = "requests_per_second: 1000000\nburst: 1000000\n"

FASTAPI = r"""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
import json, math
from pathlib import Path
from fastapi import FastAPI
from typing import Annotated
from pydantic import BaseModel, ConfigDict, Field, create_model
from propensity_dagster.serving.scorers import _Trees

folder = Path(os.environ["BENCHMARK_MODEL"])
contract = json.loads((folder / "model.json").read_text())["contract"]
trees = _Trees(folder, {}, len(contract))
codes = [{c: float(i) for i, c in enumerate(f["categories"])} for f in contract]
text, number = Annotated[str, Field(max_length=256)], Annotated[float, Field(ge=-1e15, le=1e15)]
fields = {f["name"]: ((text if f["categories"] else number) | None, None) for f in contract}
key = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,256}$")]
Body = create_model("Body", __config__=ConfigDict(extra="forbid"), customer_id=(key, ...), **fields)
names = [f["name"] for f in contract]
app = FastAPI()

class Answer(BaseModel):
    customer_id: str
    probability: float
    model_version: str

@app.post("/predict")
async def predict(body: Body) -> Answer:
    row = []
    for name, known in zip(names, codes):
        value = getattr(body, name)
        row.append(math.nan if value is None else known.get(value, math.nan) if known else value)
    p = 1 / (1 + math.exp(-trees.log_odds(row)))
    return Answer(customer_id=body.customer_id, probability=p, model_version="1")
"""
CEILING = r"""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
import json, math, operator
from pathlib import Path
from typing import Annotated
import msgspec
from propensity_dagster.serving.scorers import _Trees

folder = Path(os.environ["BENCHMARK_MODEL"])
contract = json.loads((folder / "model.json").read_text())["contract"]
trees = _Trees(folder, {}, len(contract))
codes = [(i, {c: float(k) for k, c in enumerate(f["categories"])}) for i, f in enumerate(contract) if f["categories"]]
text, number = Annotated[str, msgspec.Meta(max_length=256)], Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
fields = [(f["name"], (text if f["categories"] else number) | None, None) for f in contract]
key = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,256}$")]
Body = msgspec.defstruct("Body", [("customer_id", key), *fields], forbid_unknown_fields=True, gc=False)
Answer = msgspec.defstruct("Answer", [("customer_id", str), ("probability", float), ("model_version", str)], gc=False)
decode, encode = msgspec.json.Decoder(Body).decode, msgspec.json.Encoder().encode
values = operator.attrgetter(*(f["name"] for f in contract))
nan = math.nan

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    one = decode(body)
    row = list(values(one))
    for i, known in codes:
        row[i] = known.get(row[i], nan)
    if None in row:
        row = [nan if v is None else v for v in row]
    out = encode(Answer(one.customer_id, 1 / (1 + math.exp(-trees.log_odds(row))), "1"))
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(out))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": out})
"""
LUA = """
wrk.method = "POST"
wrk.body = [==[{body}]==]
wrk.headers["Content-Type"] = "application/json"
wrk.headers["X-API-Key"] = "{key}"
"""


@dataclass
class Server:
    """One contestant: how it is started, where it is asked, and what was measured."""

    name: str
    command: list[str]
    path: str
    body: str
    environment: dict[str, str]
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    ready_seconds: float = 0.0

    def start(self, key: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}{self.path}"
        command = [part.replace("{port}", str(self.port)) for part in self.command]
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while self.ask(key) != 200:
            if self.process.poll() is not None or time.perf_counter() - began > 120:
                raise SystemExit(f"{self.name} did not start: {' '.join(command)}")
            time.sleep(0.02)
        self.ready_seconds = time.perf_counter() - began

    def ask(self, key: str) -> int:
        headers = {"Content-Type": "application/json", "X-API-Key": key}
        request = urllib.request.Request(self.url, self.body.encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def load(self, seconds: float, key: str, scratch: Path) -> None:
        script = scratch / "wrk.lua"
        script.write_text(LUA.replace("{body}", self.body).replace("{key}", key))
        command = ["wrk", "-t2", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "--latency", "-s", str(script), self.url]
        before = sum(cpu for _, cpu in self.workers().values())
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spent = sum(cpu for _, cpu in self.workers().values()) - before
        if "Non-2xx" in shown or ("Socket errors" in shown and self.name == "propensity"):
            raise SystemExit(f"{self.name}: {shown}")
        self.rates.append(float(re.search(r"Requests/sec:\s+([\d.]+)", shown).group(1)))
        self.cpu.append(spent / float(re.search(r"(\d+) requests in", shown).group(1)) * 1e6)
        self.p50.append(milliseconds(re.search(r"(?m)^ +50% +(\S+)$", shown).group(1)))
        self.p99.append(milliseconds(re.search(r"(?m)^ +99% +(\S+)$", shown).group(1)))

    def workers(self) -> dict[int, tuple[float, float]]:
        """Memory (MiB) and CPU seconds so far of each process below the one that was started."""
        parents: dict[int, int] = {}
        found: dict[int, tuple[float, float]] = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                pid = int(place.name)
                parents[pid] = int(fields[1])
                found[pid] = (int(fields[21]) * PAGE / 2**20, (int(fields[11]) + int(fields[12])) / TICKS)

        def is_below(pid: int) -> bool:
            while pid in parents:
                pid = parents[pid]
                if pid == self.process.pid:
                    return True
            return False

        return {pid: values for pid, values in found.items() if is_below(pid)}

    def worker_megabytes(self) -> float:
        """Resident memory of the largest worker."""
        return max((megabytes for megabytes, _ in self.workers().values()), default=0.0)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}[unit]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class OneModel:
    """The model store of a benchmark: one folder is every version."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self, campaign: str, version: str) -> Path:
        return self._folder

    def evaluation(self, campaign: str, version: str) -> dict:
        unknown = {"value": None, "low": None, "high": None}
        names = ("log_loss", "auc", "average_precision", "calibration_error", "calibration_slope")
        return {
            "challenger": "lightgbm",
            "models": {"lightgbm": dict.fromkeys((*names, "calibration_intercept", "top_decile_lift"), unknown)},
            "rows": 0,
            "converted": 0,
            "outcome_rate": 0.0,
            "snapshots": {},
            "decision": {"sentence": "not judged: a benchmark"},
            "segments": {"lightgbm": {}},
        }


def prepare(root: Path) -> tuple[Home, Path, dict]:
    """A home that serves a model of 300 trees, the model's folder, and the body of one customer."""
    train = training_data(ROWS, 1)
    estimator = LightGBMEstimator(num_leaves=LEAVES, min_data_in_leaf=20, lambda_l2=0.0)
    scorer = estimator.refit(train, TREES)
    assert isinstance(scorer, TreesScorer)
    facts = {"snapshots": {}, "rows": {"train": ROWS}, "calibration_rate": float(train.y.mean())}
    model = FittedModel("lightgbm", train.contract, scorer, Calibrator(), facts)
    folder = root / "model"
    write_model(model, folder, train.X)
    home = Home(root / "home").ensure()
    file = root / "benchmark.yaml"
    file.write_text(CAMPAIGN)
    columns: dict = {"customer_id": pa.array([str(i) for i in range(5_000)])}
    for i, spec in enumerate(train.contract.features):
        values = train.X[:5_000, i]
        if spec.categories:
            columns[spec.name] = pa.array([spec.categories[int(v)] for v in values])
        else:
            columns[spec.name] = pa.array([None if np.isnan(v) else float(v) for v in values])
    table = pa.table(columns)
    publish_table(table, home.lake("benchmark").partition("features", "snapshot", date(2025, 1, 1)))
    campaign = load_campaign(file)
    packages = [build_package(campaign, Version(v, "lightgbm", "", "", ()), home, OneModel(folder)) for v in ("1", "2")]
    serving = home.serving / "benchmark"
    (serving / "release.json").write_text(json.dumps({"champion": packages[0]}))
    (home.serving / "settings.yaml").write_text(SETTINGS)
    row = {name: value for name, value in table.slice(7, 1).to_pylist()[0].items()}
    # A customer with every value: null would be shorter.
    row = {name: 1.5 if value is None else value for name, value in row.items()}
    return home, folder, row


def contestants(root: Path, home: Home, model: Path, row: dict) -> list[Server]:
    for name, text in (("plain_fastapi", FASTAPI), ("ceiling", CEILING)):
        (root / f"{name}.py").write_text(text)
    import mlflow

    import propensity_dagster.registry.pyfunc_model as pyfunc

    mlflow.pyfunc.save_model(
        root / "mlflow_model", python_model=pyfunc.__file__, artifacts={"saved_model": str(model)}, pip_requirements=[]
    )
    features = {name: value for name, value in row.items() if name != "customer_id"}
    python, body = sys.executable, json.dumps(row)
    quiet = {"PYTHONPATH": f"{root}:{Path.cwd()}", "BENCHMARK_MODEL": str(model), "OMP_NUM_THREADS": "1"}
    uvicorn = ["--host", "127.0.0.1", "--port", "{port}", "--workers", str(WORKERS)]
    uvicorn += ["--log-level", "critical", "--no-access-log"]
    slow = ["--loop", "asyncio", "--http", "h11"]  # what `pip install uvicorn fastapi` gives
    ours = {"PROPENSITY_HOME": str(home.root), "PROPENSITY_WORKERS": str(WORKERS)}
    service = [python, "-m", "bentoml", "serve", "propensity_dagster.serving.service:Propensity"]
    mlflow_serve = ["models", "serve", "-m", str(root / "mlflow_model"), "--env-manager", "local", "--workers"]
    return [
        Server("propensity", [*service, "--host", "127.0.0.1", "--port", "{port}"], "/predict", body, ours),
        Server(
            "plain uvicorn + FastAPI, C API",
            [python, "-m", "uvicorn", "plain_fastapi:app", *uvicorn, *slow],
            "/predict",
            body,
            quiet,
        ),
        Server(
            "the same with uvloop and httptools",
            [python, "-m", "uvicorn", "plain_fastapi:app", *uvicorn],
            "/predict",
            body,
            quiet,
        ),
        Server(
            "mlflow models serve",
            [python, "-m", "mlflow", *mlflow_serve, str(WORKERS), "--host", "127.0.0.1", "--port", "{port}"],
            "/invocations",
            json.dumps({"dataframe_split": {"columns": list(features), "data": [list(features.values())]}}),
            {
                "PYTHONPATH": str(Path.cwd()),
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
            },
        ),
        Server(
            "raw ASGI + msgspec (ceiling)",
            [python, "-m", "uvicorn", "ceiling:app", *uvicorn],
            "/predict",
            body,
            quiet,
        ),
    ]


# Swaps under load


@dataclass
class SwapReport:
    """What happened: every answer that was not 200, and how long a swap took to reach the last worker."""

    requests: int = 0
    swaps: int = 0
    refused: int = 0
    slowest_swap_seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


def swap_under_load(port: int, folder: Path, packages: list[str], seconds: float, key: str = "") -> SwapReport:
    """Sixteen connections ask without pause while the champion changes every second, broken ones among them.

    Args:
        port: of the service on this machine.
        folder: the campaign's serving folder.
        packages: two packages of different versions, to change between.
        seconds: how long.
        key: API key, if one is needed.
    """
    return asyncio.run(_swap_under_load(port, folder, packages, seconds, key))


async def _swap_under_load(port: int, folder: Path, packages: list[str], seconds: float, key: str) -> SwapReport:
    report = SwapReport()
    until = time.monotonic() + seconds
    last_seen: dict[str, float] = {}
    broken = folder / "packages" / "v9-broken"
    shutil.copytree(folder / "packages" / packages[0], broken, dirs_exist_ok=True)
    population = broken / "population.f64"
    population.write_bytes(population.read_bytes()[:-8])

    async def connection(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b'{"customer_id": "%d"}' % number
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        try:
            while time.monotonic() < until:
                writer.write(request)
                head_lines = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(re.search(r"content-length: (\d+)", head_lines).group(1))
                content = await reader.readexactly(length)
                report.requests += 1
                if " 200 " not in head_lines.split("\r\n", 1)[0] + " ":
                    report.errors.append(head_lines.split("\r\n", 1)[0])
                else:
                    last_seen[json.loads(content)["model_version"]] = time.monotonic()
        except (OSError, asyncio.IncompleteReadError) as error:
            report.errors.append(repr(error))
        finally:
            writer.close()

    def point(text: str) -> None:
        temporary = folder / ".release.tmp"
        temporary.write_text(text)
        temporary.replace(folder / "release.json")

    async def swapper() -> None:
        while time.monotonic() < until - 1:
            new, old = packages[report.swaps % 2], packages[(report.swaps + 1) % 2]
            if report.swaps % 3 == 2:  # a champion that cannot be loaded, or no release at all
                point(json.dumps({"champion": broken.name}) if report.swaps % 2 else "{")
                await asyncio.sleep(0.4)
            point(json.dumps({"champion": new}))
            published = time.monotonic()
            await asyncio.sleep(1.0 if report.swaps % 3 != 2 else 0.6)
            version = old.removeprefix("v").partition("-")[0]
            report.slowest_swap_seconds = max(report.slowest_swap_seconds, last_seen.get(version, 0.0) - published)
            report.swaps += 1

    await asyncio.gather(swapper(), *(connection(i) for i in range(CONNECTIONS)))
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"X-API-Key": key})
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(request).read().decode())
    report.refused = sum(int(float(n)) for n in re.findall(r"^propensity_refusals\{.*?\} (\S+)$", text, re.MULTILINE))
    shutil.rmtree(broken, ignore_errors=True)
    return report


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--swap-seconds", type=float, default=60)
    stated = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is needed: apt-get install wrk")
    with tempfile.TemporaryDirectory(prefix="propensity-benchmark-") as scratch:
        root = Path(scratch)
        home, model, row = prepare(root)
        key = add_key(home.serving, "benchmark")
        servers = contestants(root, home, model, row)
        try:
            for server in servers:
                server.start(key)
            for server in servers:
                server.load(1, key, root)  # warm
                for measured in (server.rates, server.cpu, server.p50, server.p99):
                    measured.clear()
            for _ in range(stated.rounds):
                for server in servers:
                    server.load(stated.seconds, key, root)
            print_table(servers, stated.rounds, stated.seconds)
            ours = servers[0]
            packages = sorted(p.name for p in (home.serving / "benchmark" / "packages").iterdir())
            report = swap_under_load(ours.port, home.serving / "benchmark", packages, stated.swap_seconds, key)
            print(
                f"\nSwaps under load: {report.requests:,} requests over {CONNECTIONS} connections in "
                f"{stated.swap_seconds:g} s, {report.swaps} swaps, {report.refused} broken releases refused, "
                f"{len(report.errors)} errors, slowest swap {report.slowest_swap_seconds:.2f} s"
            )
        finally:
            for server in servers:
                if hasattr(server, "process"):
                    server.stop()


def print_table(servers: list[Server], rounds: int, seconds: float) -> None:
    ours = servers[0]
    print(
        f"{date.today()}, {os.cpu_count()} cores shared with the load generator, {platform.machine()}; LightGBM, "
        f"{TREES} trees x {LEAVES} leaves, 40 features in the body; {WORKERS} workers, {CONNECTIONS} connections, "
        f"{rounds} rounds of {seconds:g} s, alternating; medians\n"
    )
    print("| server | requests/s | ours over it | CPU us a request | p50 ms | p99 ms | MiB a worker | ready after s |")
    print("|---|---|---|---|---|---|---|---|")
    for server in servers:
        ratio = median(a / b for a, b in zip(ours.rates, server.rates, strict=True))
        print(
            f"| {server.name} | {median(server.rates):,.0f} | {ratio:.2f} | {median(server.cpu):.0f} | "
            f"{median(server.p50):.1f} | "
            f"{median(server.p99):.1f} | {server.worker_megabytes():.0f} | {server.ready_seconds:.2f} |"
        )


if __name__ == "__main__":
    main()
