"""Several runs at once on one home, as processes of their own: each gives what it gives alone."""

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq

import propensity_dagster
from propensity_dagster.data.lake import Home
from propensity_dagster_tests.conftest import SMALL

OTHER = (
    SMALL.replace("name: small", "name: other")
    .replace("min_converters: 100", "min_converters: 50")
    .replace("customers=2500", "customers=1500")
    .replace("seed=3", "seed=4")
    .replace("  - lightgbm: {max_rounds: 60}\n  - neural_network: {max_epochs: 2}\n  - ensemble\n", "")
)
PACKAGE = Path(propensity_dagster.__file__).parent
MOMENTS = {"scored_at", "decided_at"}
LOOKS_BACK = {"drift", "ledger", "outcomes"}
"""Tables of the night over all snapshots that are scored by then: those of the backfill too, if that was first."""


def test_two_campaigns_a_backfill_and_a_night_at_once(materialized, newest_snapshot, tmp_path):
    """No run waits for a lock until it fails, no table is torn, and all are what they are one after the other."""
    campaigns = tmp_path / "campaigns"
    campaigns.mkdir()
    shutil.copy(materialized.file, campaigns)
    (campaigns / "other.yaml").write_text(OTHER)
    first, last = newest_snapshot - timedelta(days=30), newest_snapshot - timedelta(days=20)
    tables = " or ".join(f'key:"small/{name}"' for name in ("features", "scores"))
    days = ["--partition-range", f"{first}...{last}"]
    commands = {
        "backfill": [
            "dagster",
            "asset",
            "materialize",
            "--select",
            tables,
            *days,
            "-m",
            "propensity_dagster.definitions",
        ],
        "night": ["propensity_dagster.cli", "score", str(campaigns / "small.yaml")],
        "other": ["propensity_dagster.cli", "demo", str(campaigns / "other.yaml")],
    }
    homes = {name: Home(tmp_path / name) for name in ("alone", "together")}
    for home in homes.values():
        shutil.copytree(materialized.home.root, home.root)
        (home.root / "dagster").mkdir(exist_ok=True)
        shutil.copy(PACKAGE / "dagster.yaml", home.root / "dagster")
    for command in commands.values():
        finish(start(command, homes["alone"], campaigns))
    running = [start(command, homes["together"], campaigns) for command in commands.values()]
    for process in running:
        finish(process)
    lakes = {name: home.root / "lake" for name, home in homes.items()}
    files = {
        name: sorted(f for f in (p.relative_to(lake) for p in lake.rglob("*.parquet")) if f.parts[1] not in LOOKS_BACK)
        for name, lake in lakes.items()
    }
    assert files["together"] == files["alone"]
    assert any("small/scores" in str(file) and str(first) in str(file) for file in files["alone"])
    assert any("other/scores" in str(file) for file in files["alone"])
    for file in files["alone"]:
        found, wanted = (without_moments(lakes[name] / file) for name in ("together", "alone"))
        assert found.equals(wanted), file


def start(command: list[str], home: Home, campaigns: Path) -> subprocess.Popen:
    module, *arguments = command
    environment = {
        **os.environ,
        "PROPENSITY_HOME": str(home.root),
        "DAGSTER_HOME": str(home.root / "dagster"),
        "PROPENSITY_CAMPAIGNS": str(campaigns),
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]


def without_moments(file: Path):
    table = pq.read_table(file)
    return table.select([name for name in table.column_names if name not in MOMENTS])
