"""The examples on real order logs, through Dagster: the figures the README quotes may not get lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from propensity_dagster.campaign import load_campaign
from propensity_dagster.campaign_sections import Candidate
from propensity_dagster.data.lake import Home
from propensity_dagster.models.calibration import log_loss
from propensity_dagster.models.dataset import FeatureContract, FeatureSpec, make_dataset, read_split
from propensity_dagster.models.training import rfm_columns, train_candidate

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


def rfm_regression_loss(home: Path, name: str) -> float:
    """Test log loss of a calibrated logistic regression on recency, frequency and spend alone."""
    campaign = load_campaign(ROOT / "examples" / f"{name}.yaml")
    training_set = Home(home).lake(name).file("training_set")
    wanted = rfm_columns(campaign).names()
    contract = FeatureContract(tuple(FeatureSpec(feature, "number") for feature in wanted))
    train, validate, test = (
        make_dataset(read_split(training_set, split), contract, campaign.key) for split in ("train", "validate", "test")
    )
    candidate = Candidate(name="logistic_regression")
    model, _ = train_candidate(campaign, candidate, train, validate, {})
    return log_loss(model.log_odds(test.X), test.y)


@needs_data
def test_online_retail(tmp_path):
    record = record_of("online_retail", tmp_path)
    assert record["snapshots"]["test"][-1] == "2011-08-01"
    comparison = record["comparisons"]["baseline"]["log_loss"]
    assert comparison["high"] < 0
    champion = record["models"][record["challenger"]]["log_loss"]["value"]
    assert champion < rfm_regression_loss(tmp_path, "online_retail")
    assert record["decision"]["promoted"]


TABLES = {  # example: least AUC and largest log loss of the challenger, where the README claims one
    "online_shoppers": (0.930, 0.235),
    "online_shoppers_early": (0.770, 0.375),
    "bank_marketing_by_date": (0.65, 0.65),
}


@needs_data
@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    """The others take longer: `make benchmark-real` runs them all."""
    record = record_of(name, tmp_path)
    auc, loss = TABLES[name]
    found = record["models"][record["challenger"]]
    assert found["auc"]["value"] > auc
    assert found["log_loss"]["value"] < loss
    for other in ("baseline", "constant"):
        assert record["comparisons"][other]["log_loss"]["high"] < 0
    assert record["decision"]["promoted"]
