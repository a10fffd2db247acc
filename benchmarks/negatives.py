"""What leaving out negatives costs: the same models on ever fewer of the rows that did not convert.

    python -m benchmarks.negatives [--campaign ecommerce_purchase] [--keep 1 0.5 0.2 0.1 0.05 0.02]

Judged on all rows of the out-of-time test snapshots, with the calibrator that the validation snapshots chose.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from benchmarks.pipeline import fill_lake
from propensity_dagster.campaign import EventCampaign, find_campaign
from propensity_dagster.campaign_sections import Candidate
from propensity_dagster.data.lake import Home
from propensity_dagster.features.snapshots import TRAINING_SET, publish_training_set
from propensity_dagster.models.calibration import fit_calibrator, log_loss
from propensity_dagster.models.dataset import SplitFile, read_dataset
from propensity_dagster.models.training import load_datasets, train_candidate
from propensity_dagster.runtime import Runtime

MODELS = ("logistic_regression", "lightgbm", "neural_network")


@dataclass(frozen=True)
class Row:
    """One model at one share of the negatives, on the test rows."""

    model: str
    kept: float
    rows: int
    seconds: float
    log_loss: float
    auc: float
    mean: float
    slope: float
    intercept: float


def measure(campaign: EventCampaign, training_set: Path, shares: list[float]) -> tuple[list[Row], float]:
    """Every model at every share, and the outcome rate of the test rows."""
    rows: list[Row] = []
    rate = 0.0
    for share in shares:
        stated = campaign.snapshots.model_copy(update={"keep_negatives": share})
        train, validate = load_datasets(campaign.model_copy(update={"snapshots": stated}), training_set, None)
        test = read_dataset(SplitFile(training_set, "test"), train.contract, campaign.key)
        rate = float(test.y.mean())
        for name in MODELS:
            start = time.perf_counter()
            model, _ = train_candidate(campaign, Candidate(name=name, params={}), train, validate, {})
            seconds = time.perf_counter() - start
            z = model.log_odds(test.X)
            ((slope, intercept),) = fit_calibrator("platt", z, test.y).values
            loss, auc, mean = log_loss(z, test.y), float(roc_auc_score(test.y, z)), float(expit(z).mean())
            rows.append(Row(name, share, len(train.y), seconds, loss, auc, mean, slope, intercept))
            print(rows[-1], flush=True)
    return rows, rate


def table_of(rows: list[Row], rate: float, command: str) -> str:
    """Markdown, with the loss that leaving out adds."""
    whole = {row.model: row for row in rows if row.kept == 1}
    lines = [
        f"{date.today()}, `{command}`; {rate:.2%} of the test rows convert",
        "",
        "| model | negatives kept | rows | seconds | log loss | added | AUC | mean probability | slope | intercept |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (MODELS.index(r.model), -r.kept)):
        added = row.log_loss / whole[row.model].log_loss - 1 if row.model in whole else np.nan
        lines.append(
            f"| {row.model} | {row.kept:.0%} | {row.rows:,} | {row.seconds:.1f} | {row.log_loss:.5f} | {added:+.2%} | "
            f"{row.auc:.4f} | {row.mean:.2%} | {row.slope:.2f} | {row.intercept:+.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaign", default="ecommerce_purchase")
    parser.add_argument("--keep", type=float, nargs="+", default=[1, 0.5, 0.2, 0.1, 0.05, 0.02])
    stated = parser.parse_args()
    campaign = find_campaign(stated.campaign)
    assert isinstance(campaign, EventCampaign), "only event logs have snapshots"
    with tempfile.TemporaryDirectory(prefix="propensity-benchmarks-") as folder:
        home = Home(Path(folder)).ensure()
        fill_lake(campaign, home)
        with Runtime(home).engine() as engine:
            publish_training_set(campaign, home, engine)
        rows, rate = measure(campaign, home.lake(campaign.name).existing(TRAINING_SET), stated.keep)
    print("\n" + table_of(rows, rate, f"python -m benchmarks.negatives --campaign {campaign.name}"))


if __name__ == "__main__":
    main()
