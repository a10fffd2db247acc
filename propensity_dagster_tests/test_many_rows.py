"""Training rows that are read in batches, and negatives that are left out."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit

from propensity_dagster.models.base import RfmColumns
from propensity_dagster.models.baseline import CellBaseline
from propensity_dagster.models.calibration import fit_calibrator
from propensity_dagster.models.dataset import FeatureContract, SplitFile, make_dataset, read_dataset, read_split
from propensity_dagster.models.linear import LogisticRegressionEstimator
from propensity_dagster.models.network import NeuralNetworkEstimator
from propensity_dagster.models.population import describe_population
from propensity_dagster.models.trees import LightGBMEstimator

from .test_models import table_of


@pytest.fixture(scope="module")
def split_files(tmp_path_factory):
    """A training set of many rows, of which one in eight converts."""
    file = tmp_path_factory.mktemp("training") / "training_set.parquet"
    parts = []
    for split, n, seed in (("train", 40_000, 1), ("validate", 8_000, 2), ("test", 20_000, 3)):
        table = table_of(n, seed)
        fold = pa.array(np.arange(n) % 5)
        parts.append(table.append_column("split", pa.array([split] * n)).append_column("fold", fold))
    pq.write_table(pa.concat_tables(parts), file, row_group_size=5_000)
    return {split: SplitFile(file, split) for split in ("train", "validate", "test")}


def test_a_split_read_in_batches_is_the_one_in_memory(split_files, monkeypatch):
    monkeypatch.setattr("propensity_dagster.models.dataset._BATCH_ROWS", 700)
    rows = split_files["train"]
    table = read_split(rows.file, "train")
    contract = FeatureContract.fit(rows, "customer_id")
    assert contract == FeatureContract.fit(table, "customer_id")
    assert describe_population(rows, contract) == describe_population(table, contract)
    whole, read = make_dataset(table, contract, "customer_id"), read_dataset(rows, contract, "customer_id")
    for one, other in ((whole.X, read.X), (whole.y, read.y), (whole.fold, read.fold)):
        np.testing.assert_array_equal(one, other)
    fold = SplitFile(rows.file, "test", 2)
    np.testing.assert_array_equal(
        read_dataset(fold, contract, "customer_id").X,
        make_dataset(read_split(rows.file, "test", 2), contract, "customer_id").X,
    )


def test_some_negatives_are_left_out_and_no_positive(split_files):
    rows = split_files["train"]
    contract = FeatureContract.fit(rows, "customer_id")
    whole = read_dataset(rows, contract, "customer_id")
    part, again, other = (read_dataset(rows, contract, "customer_id", 0.2, seed) for seed in (7, 7, 8))
    assert part.y.sum() == whole.y.sum()
    assert (1 - part.y).sum() == pytest.approx(0.2 * (1 - whole.y).sum(), rel=0.05)
    np.testing.assert_array_equal(part.X, again.X)
    assert len(other.y) != len(part.y) or not np.array_equal(part.fold, other.fold)
    assert part.correction == pytest.approx(np.log(0.2))
    assert part.rows(part.y > 0).correction == part.correction


@pytest.mark.parametrize(
    "estimator",
    [
        CellBaseline(RfmColumns("orders_recency_days", "orders_count_90d", "orders_amount_sum_90d")),
        LogisticRegressionEstimator(),
        LightGBMEstimator(max_rounds=150),
        NeuralNetworkEstimator(max_epochs=5),
    ],
    ids=lambda e: type(e).__name__,
)
def test_probabilities_are_true_though_negatives_were_left_out(split_files, estimator):
    """Before any calibration: by the formula to the last digit, and on rows nobody has seen within chance."""
    contract = FeatureContract.fit(split_files["train"], "customer_id")
    train = read_dataset(split_files["train"], contract, "customer_id", 0.1, 1)
    validate, test = (read_dataset(split_files[s], contract, "customer_id") for s in ("validate", "test"))
    assert train.y.mean() > 3 * test.y.mean()
    corrected, plain = (
        estimator.refit(part, 4).log_odds(test.X[:500]) for part in (train, replace(train, correction=0.0))
    )
    p = expit(plain)
    np.testing.assert_allclose(expit(corrected), p / (p + (1 - p) / 0.1), rtol=1e-9)
    z = estimator.fit(train, validate).scorer.log_odds(test.X)
    chance = np.sqrt(test.y.mean() / len(test.y))
    assert abs(expit(z).mean() - test.y.mean()) < 4 * chance
    if not isinstance(estimator, CellBaseline):  # which draws small cells to the mean, with all rows too
        ((slope, intercept),) = fit_calibrator("platt", z, test.y).values
        assert slope == pytest.approx(1, abs=0.2)
        assert intercept == pytest.approx(0, abs=0.4)


def test_newton_finds_what_scikit_learn_finds(split_files, monkeypatch):
    from sklearn.linear_model import LogisticRegression

    from propensity_dagster.models import linear

    contract = FeatureContract.fit(split_files["validate"], "customer_id")
    train = read_dataset(split_files["validate"], contract, "customer_id")
    held = LogisticRegressionEstimator(C=0.3).refit(train, 0)
    monkeypatch.setattr(linear, "_HELD_BYTES", 0)
    monkeypatch.setattr(linear, "_CHUNK", 999)
    streamed = LogisticRegressionEstimator(C=0.3).refit(train, 0)
    with monkeypatch.context() as patch:
        patch.setattr(linear, "_CHUNK", 10**6)
        whole = LogisticRegressionEstimator(C=0.3).refit(train, 0)
    design = np.hstack([held.scaling.apply(train.X), held.one_hot.apply(train.X)])
    theirs = LogisticRegression(C=0.3, solver="newton-cholesky", tol=1e-10, max_iter=100).fit(design, train.y)
    for ours, near in ((held, 1e-3), (streamed, 1e-6), (whole, 1e-6)):
        np.testing.assert_allclose(ours.coefficients, theirs.coef_[0], atol=near)
        assert ours.intercept == pytest.approx(theirs.intercept_[0], abs=near)
