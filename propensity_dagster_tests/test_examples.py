"""The examples on real order logs, through Dagster: the figures the README quotes may not get lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import SHARED_DATA

ROOT = Path(__file__).parents[1]

needs_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(),
    reason=f"{SHARED_DATA} is absent: the real data are not part of the repository (examples/*.yaml say where to get them)",
)


def record_of(name: str, home: Path) -> dict:
    environment = {**os.environ, "PROPENSITY_HOME": str(home), "PROPENSITY_DATA": str(SHARED_DATA)}
    command = [sys.executable, "-m", "propensity_dagster.cli", "demo", f"examples/{name}.yaml"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return json.loads((home / "reports" / name / "evaluation.json").read_text())


@needs_data
def test_cdnow(tmp_path):
    record = record_of("cdnow", tmp_path)
    assert record["snapshots"]["test"] == ["1997-10-01"]
    assert record["rows"] == 23_570
    champion = record["models"][record["challenger"]]
    assert champion["auc"]["value"] > 0.77
    assert champion["log_loss"]["value"] < record["models"]["baseline"]["log_loss"]["value"]
    assert champion["log_loss"]["value"] < record["models"]["constant"]["log_loss"]["value"]
    assert record["decision"]["promoted"]


@needs_data
def test_online_retail(tmp_path):
    record = record_of("online_retail", tmp_path)
    assert record["snapshots"]["test"][-1] == "2011-08-01"
    comparison = record["comparisons"]["baseline"]["log_loss"]
    assert comparison["high"] < 0
    assert record["decision"]["promoted"]
