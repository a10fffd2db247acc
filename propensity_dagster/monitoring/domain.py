"""A classifier that tries to tell tonight's rows from those the model learnt from: what no single column shows.

If it cannot (an AUC near 0.5), the two are one population, however many columns there are (classifier two-sample test;
Lopez-Paz and Oquab 2017). If it can, the columns it goes by are where they differ. It is judged out of fold, with all
rows of a customer on one side, or it would know people rather than populations.

Time alone tells rows apart: counts of all visits grow. Columns by which the oldest rows of the model can be told from
its newest are left out, and what little the others say is carried on to tonight.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import ndtr, ndtri

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.days import pc
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.evaluation.metrics import Judged, Weighted, auc
from propensity_dagster.evaluation.splits import TRAIN, hash_fractions
from propensity_dagster.explain.population import sample_rows
from propensity_dagster.features.snapshots import TRAINING_SET
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Floats
from propensity_dagster.monitoring.stability import FALSE_ALARMS

REFERENCE = "reference"
WARN, ALERT = 0.65, 0.80
"""AUC of the domain classifier. One normal column shifted so that its index is 0.1 gives 0.59, at 0.25 0.64; many
columns that each moved a little add up."""

_MIN_ROWS = 100
_ROUNDS = 60
_NAMED = 5
_APART = 0.75
_STANDING = "standing"
_PARAMS: dict[str, Any] = {
    "objective": "binary", "num_leaves": 8, "learning_rate": 0.1, "min_data_in_leaf": 20, "feature_fraction": 0.8,
    "verbose": -1, "deterministic": True, "force_row_wise": True,
    # So few rows gain nothing from a second thread, and beside other campaigns' nights threads wait for each other.
    "num_threads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """How well two populations can be told apart.

    Attributes:
        auc: out of fold; 0.5 is one population.
        expected: what time alone gives by tonight, at the pace of the model's own rows.
        p_value: how often chance alone gives as much, by the law of Mann and Whitney's statistic.
        columns: those the classifier goes by, with their share of its gain, the largest first.
    """

    auc: float
    expected: float
    p_value: float
    columns: tuple[tuple[str, float], ...]

    @property
    def severity(self) -> str:
        """By the AUC, and only beyond chance and what time does."""
        if self.p_value > FALSE_ALARMS or self.auc <= self.expected:
            return "none"
        return "alert" if self.auc > ALERT else "warn" if self.auc > WARN else "none"


def keep_reference(campaign: Campaign, model: FittedModel, version: str, home: Home) -> None:
    """Keep a sample of the rows that a version learnt from, and which columns stand still in it.

    Later training sets replace the one it learnt from.
    """
    lake = home.lake(campaign.name)
    file = pq.ParquetFile(lake.existing(TRAINING_SET))
    sample = sample_rows((_training_rows(b) for b in file.iter_batches()), file.metadata.num_rows)
    columns, within = _standing(campaign, model, sample)
    stated = json.dumps({"columns": list(columns), "within": within})
    publish_table(sample.replace_schema_metadata({_STANDING: stated}), lake.partition(REFERENCE, "version", version))


def inherit_reference(campaign: Campaign, parent: str, version: str, home: Home) -> None:
    """A version that only recalibrates another learnt from the same rows."""
    sample = read_reference(campaign, home, parent)
    if sample is not None:
        publish_table(sample, home.lake(campaign.name).partition(REFERENCE, "version", version))


def read_reference(campaign: Campaign, home: Home, version: str) -> pa.Table | None:
    """The sample kept for a version; None where there is none."""
    file = home.lake(campaign.name).partition(REFERENCE, "version", version)
    sample = pq.read_table(file) if file.exists() else None
    return sample if sample is not None and _STANDING.encode() in (sample.schema.metadata or {}) else None


def tell_apart(
    campaign: Campaign, model: FittedModel, reference: pa.Table, current: pa.Table, pace: float
) -> Domain | None:
    """Train the classifier on reference (m) and current rows (n).

    Args:
        campaign: names the key.
        model: names the features.
        reference: a sample of the rows it learnt from, as it was kept.
        current: tonight's.
        pace: days from the middle of training to tonight, over the days that training spans.

    Returns:
        None where one side has fewer than a hundred rows, or no column stands still.
    """
    if min(reference.num_rows, current.num_rows) < _MIN_ROWS:
        return None
    standing = json.loads(reference.schema.metadata[_STANDING.encode()])
    columns = standing["columns"]
    if not columns:
        return None
    found, gain, p_value = _classify(campaign, model, columns, reference, current)
    return Domain(found, _carried_on(standing["within"], pace), p_value, _named(columns, gain))


def _standing(campaign: Campaign, model: FittedModel, reference: pa.Table) -> tuple[Sequence[str], float]:
    """Columns by which the oldest and the newest quarter of the reference's snapshots are not told apart; the AUC.

    Those that tell most are left out together, until the rest tells less than what would be a finding.
    """
    columns = model.contract.names
    if "snapshot" not in reference.column_names:
        return columns, 0.5
    snapshot = reference["snapshot"].to_numpy()
    low, high = np.quantile(snapshot.astype("int64"), [0.25, 0.75]).astype(snapshot.dtype)
    older, newer = (reference.filter(pa.array(rows)) for rows in (snapshot <= low, snapshot >= high))
    if low >= high or min(older.num_rows, newer.num_rows) < _MIN_ROWS:
        return columns, 0.5
    while columns:
        within, gain, _ = _classify(campaign, model, columns, older, newer)
        if within <= WARN:
            return columns, within
        columns = [name for name, of in zip(columns, gain, strict=True) if of < gain.max() / 2]
    return columns, 0.5


def _carried_on(within: float, pace: float) -> float:
    """The AUC that time alone gives, if the distance that it stands for grows as it did.

    Between two normal distributions d standard deviations apart the AUC is Phi(d / sqrt 2). The middles of the outer
    quarters are three quarters of the span apart.
    """
    return float(ndtr(ndtri(within) * pace / _APART)) if within > 0.5 else 0.5


def _classify(
    campaign: Campaign, model: FittedModel, columns: Sequence[str], reference: pa.Table, current: pa.Table
) -> tuple[float, Floats, float]:
    """AUC out of fold, gain of each feature (p,), and the p-value of the AUC."""
    chosen = [model.contract.names.index(name) for name in columns]
    X = np.concatenate([model.contract.encode(part)[:, chosen] for part in (reference, current)])
    categorical = [at for at, i in enumerate(chosen) if i in model.contract.categorical]
    y = np.repeat([0.0, 1.0], [reference.num_rows, current.num_rows])
    keys = [*reference[campaign.key].to_pylist(), *current[campaign.key].to_pylist()]
    fold = hash_fractions(keys) < 0.5
    z = np.empty(len(y))
    gain = np.zeros(X.shape[1])
    for held in (fold, ~fold):
        booster = _train(X[~held], y[~held], categorical, campaign.seed)
        z[held] = booster.predict(X[held], raw_score=True, num_threads=1)
        gain += booster.feature_importance("gain")
    found = float(auc(Weighted(Judged(z, y), np.ones((1, len(y)))))[0])
    # Snapshots repeat their customers, who count once. Taking one row of each would change the population: the newest
    # row of those who have left since is the one from when they were leaving.
    sizes = [float(len(pc.unique(part[campaign.key]))) for part in (reference, current)]
    return found, gain, _p_value(found, *sizes)


def _training_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.filter(pc.equal(batch.column("split"), TRAIN))


def _train(X: Floats, y: Floats, categorical: Sequence[int], seed: int) -> Any:
    import lightgbm

    data = lightgbm.Dataset(X, y, categorical_feature=list(categorical), free_raw_data=True)
    return lightgbm.train({**_PARAMS, "seed": seed}, data, _ROUNDS)


def _p_value(found: float, m: float, n: float) -> float:
    return float(ndtr((0.5 - found) / np.sqrt((n + m + 1) / (12 * n * m))))


def _named(names: Sequence[str], gain: Floats) -> tuple[tuple[str, float], ...]:
    order = np.argsort(-gain, kind="stable")[:_NAMED]
    total = max(float(gain.sum()), 1e-12)
    return tuple((names[int(i)], float(gain[i] / total)) for i in order.tolist() if gain[i] > 0)
