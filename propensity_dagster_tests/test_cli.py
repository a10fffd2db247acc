"""The command line and the README, as a user types them."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import typer

from propensity_dagster import cli
from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.lake import Home
from propensity_dagster.monitoring.alerts import raise_once
from propensity_dagster.monitoring.findings import Finding

from .conftest import SMALL
from .served import Webhook, free_port, wait_until

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROPENSITY = [sys.executable, "-m", "propensity_dagster.cli"]


def run(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*PROPENSITY, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PROPENSITY_HOME": str(home), "COLUMNS": "110", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`propensity demo` on a small campaign file, as a user's own."""
    root = tmp_path_factory.mktemp("demo")
    file = root / "mine" / "small.yaml"
    file.parent.mkdir()
    file.write_text(SMALL.replace("customers=2500", "customers=1500"))
    return root / "home", file, run("demo", str(file), home=root / "home")


def test_help_lists_the_commands(tmp_path):
    shown = run("--help", home=tmp_path)
    assert shown.returncode == 0
    for command in ("demo", "dev", "champion"):
        assert command in shown.stdout


def test_the_demo_ends_with_a_summary(demo):
    _, _, shown = demo
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for words in (
        "quarantined",
        "embargoed",
        "log loss",
        "oracle",
        "worth contacting",
        "Where to look next",
        "make dev",
    ):
        assert words in " ".join(shown.stdout.split()), "a long path may break a line"
    assert "Traceback" not in shown.stdout + shown.stderr


def test_a_command_line_that_is_killed_takes_its_run_with_it(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    command = [*PROPENSITY, "demo", str(file)]
    environment = {**os.environ, "PROPENSITY_HOME": str(tmp_path / "home")}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    lake = tmp_path / "home" / "lake"
    wait_until(lake.exists, seconds=120)
    (child,) = map(int, children.read_text().split())
    process.kill()
    process.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists(), seconds=30)


def test_a_run_that_is_killed_is_said(tmp_path, capsys):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    with pytest.raises(typer.Exit), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROPENSITY_HOME", str(tmp_path / "home"))
        patch.setattr(cli.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9))
        cli._launch(load_campaign(file))
    assert capsys.readouterr().err == "error: small: the run was killed (signal 9); run it again\n"


def test_champion_commands(demo):
    home, file, _ = demo
    shown = run("champion", "show", str(file), home=home)
    assert shown.returncode == 0, shown.stderr
    assert "champion" in shown.stdout
    assert "promoted" in run("champion", "history", str(file), home=home).stdout
    refused = run("champion", "rollback", str(file), home=home)
    assert (refused.returncode, refused.stderr.strip()) == (
        1,
        "error: small: version 1 is the first champion; there is none before it",
    )


MISTAKES = [
    (("demo", "no_such"), "error: there is no campaign 'no_such'; there are campaign_response, ecommerce_purchase"),
    (("demo", "no_such.yaml"), "error: no_such.yaml: cannot be read"),
    (("plan",), "error: ecommerce_purchase: nothing has been scored yet"),
    (("champion", "show"), "error: ecommerce_purchase: no model has been registered yet"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_users_mistake_is_one_message(tmp_path, arguments, message):
    shown = run(*arguments, home=tmp_path / "home")
    assert shown.returncode == 1
    assert message in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_failing_asset_is_one_message(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL.replace("amount: amount", "amount: price"))
    shown = run("demo", str(file), home=tmp_path / "home")
    assert shown.returncode == 1
    assert "error: small__raw_orders: " in shown.stderr
    assert "there is no column 'price'" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_the_ui_shows_what_the_demo_materialized(demo):
    """`propensity dev`: assets with materializations, schedules, and sensors whose daemon tells of an alert."""
    import json
    import signal

    home, file, _ = demo
    hook = Webhook()
    settings = Home(home).root / "alerts" / "settings.yaml"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(json.dumps({"channels": [{"name": "team", "url": hook.url}]}))
    told = Finding("run", "a word", "alert", "the daemon is asked to tell this")
    raise_once("small", date(2025, 1, 1), told, Home(home), datetime.now(UTC))
    port, reports = free_port(), free_port()
    environment = {**os.environ, "PROPENSITY_HOME": str(home), "PROPENSITY_CAMPAIGNS": str(file.parent)}
    server = subprocess.Popen(
        [*PROPENSITY, "dev", "--port", str(port), "--reports-port", str(reports)], cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    query = """{
      assetsOrError { ... on AssetConnection { nodes { key { path } assetMaterializations(limit: 1) { runId } } } }
      repositoriesOrError { ... on RepositoryConnection { nodes { schedules { name } sensors { name } } } }
    }"""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
    )
    try:
        data = None
        for _ in range(90):
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    data = json.load(answer)["data"]
                if data["repositoriesOrError"]["nodes"]:
                    break
            except OSError:
                pass
            time.sleep(1)
        assert data, "the UI did not answer within 90 s"
        materialized = {
            "/".join(n["key"]["path"]) for n in data["assetsOrError"]["nodes"] if n["assetMaterializations"]
        }
        for table in (
            "raw_orders",
            "validated_customers",
            "activity",
            "features",
            "labels",
            "training_set",
            "candidate_ensemble",
            "evaluation",
            "champion",
            "report",
            "scores",
        ):
            assert f"small/{table}" in materialized
        (repository,) = data["repositoriesOrError"]["nodes"]
        assert {s["name"] for s in repository["schedules"]} == {
            "small__nightly",
            "small__monthly",
            "small__nightly_predictions",
        }
        assert len(repository["sensors"]) == 7
        page = urllib.request.urlopen(f"http://127.0.0.1:{reports}/small/report.html", timeout=10).read()
        assert page == (home / "reports" / "small" / "report.html").read_bytes()
        for _ in range(120):
            if hook.messages:
                break
            time.sleep(1)
        assert any(told.sentence in message["message"] for message in hook.messages)
    finally:
        hook.server.shutdown()
        hook.server.server_close()
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)  # Dagster's processes, which have a session of their own, have ended before


def test_the_readme_shows_the_shipped_campaign_file():
    """What the README prints as the campaign file is a part of the file itself."""
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    shipped = (ROOT / "propensity_dagster" / "campaigns" / "ecommerce_purchase.yaml").read_text()
    lines = [line for line in shipped.splitlines() if line and not line.lstrip().startswith("#")]
    assert [line for line in block.splitlines() if line] == lines


def test_the_readme_asks_the_service_for_what_the_shipped_campaign_has():
    """The names of its curl are the key and outward names of the default campaign."""
    import json

    from propensity_dagster.campaign import EventCampaign, load_campaign

    (text,) = re.findall(r"curl .*?-d '(.*?)'", README, re.DOTALL)
    campaign = load_campaign(ROOT / "propensity_dagster" / "campaigns" / "ecommerce_purchase.yaml")
    assert isinstance(campaign, EventCampaign)
    assert set(json.loads(text)) <= {campaign.key, *campaign.attributes, *campaign.features.names}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_exists(command):
    """`make` targets by a dry run, our commands by their help; what they do is tested above."""
    words = [w for w in command.split("#")[0].split() if "=" not in w or w.startswith("-")]
    if words[0] == "make":
        checked = ["make", "-n", words[1]]
    else:
        assert words[0] in ("propensity", ".venv/bin/propensity")
        known = [w for w in words[1:] if re.fullmatch(r"[a-z]+", w)][:2]
        files = [w for w in words[1:] if w.endswith(".yaml")]
        written = [f for f in files if f.startswith("campaigns/")]  # test_draft.py types those commands
        assert all((ROOT / f).exists() for f in files if f not in written)
        checked = [*PROPENSITY, *known[: 2 if known[0] in ("champion", "alerts", "experiment") else 1], "--help"]
    subprocess.run(checked, cwd=ROOT, check=True, capture_output=True)
