"""Estimators, calibration, the saved-model format."""

import json
import shutil

import lightgbm
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propensity_dagster.campaign import load_campaign
from propensity_dagster.campaign_sections import Candidate
from propensity_dagster.errors import ConfigError, DataContractError, SavedModelError
from propensity_dagster.models import kernels
from propensity_dagster.models.base import BLOCK_ROWS, MANY_ROWS
from propensity_dagster.models.bitvectors import build_forest
from propensity_dagster.models.calibration import METHODS, choose_calibrator, cross_fit, fit_calibrator, log_loss
from propensity_dagster.models.dataset import Dataset, FeatureContract, FeatureSpec, entity_folds, make_dataset
from propensity_dagster.models.ensemble import Member
from propensity_dagster.models.monotone import keeps, violations
from propensity_dagster.models.preprocess import Scaling
from propensity_dagster.models.saved import golden_difference, load_model, model_identity, write_model
from propensity_dagster.models.training import train_candidate
from propensity_dagster.models.trees import TreesScorer
from propensity_dagster.scoring.candidates import choose_challenger

from .conftest import SMALL

NAMES = ("baseline", "logistic_regression", "lightgbm", "neural_network", "ensemble")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    file = tmp_path_factory.mktemp("campaign") / "small.yaml"
    file.write_text(SMALL)
    return load_campaign(file)


def table_of(n: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    recency = np.where(rng.random(n) < 0.3, np.nan, rng.exponential(40, n))
    count, amount = rng.poisson(2, n), rng.lognormal(3, 1, n)
    country = rng.choice(["DE", "FR", "IT"], n)
    z = -2.2 + 0.5 * count - np.nan_to_num(recency, nan=90) / 60 + (country == "DE")
    return pa.table(
        {
            "customer_id": [f"c{i % (n // 3)}" for i in range(n)],
            "orders_recency_days": pa.array(recency, from_pandas=True),
            "orders_count_90d": count,
            "orders_amount_sum_90d": amount,
            "country": pa.array(country).take(pa.array([None if i % 11 == 0 else i for i in range(n)], pa.int64())),
            "constant": np.ones(n),
            "all_missing": pa.nulls(n, pa.float64()),
            "converted": rng.random(n) < 1 / (1 + np.exp(-z)),
        }
    )


@pytest.fixture(scope="module")
def data():
    train = table_of(3000, 1)
    contract = FeatureContract.fit(train, "customer_id")
    return tuple(make_dataset(t, contract, "customer_id") for t in (train, table_of(1500, 2), table_of(1500, 3)))


@pytest.fixture(scope="module")
def models(campaign, data):
    train, validate, _ = data
    fitted = {}
    members = []
    for candidate in campaign.models:
        model, scores = train_candidate(campaign, candidate, train, validate, {"campaign": "small"}, members)
        fitted[candidate.name] = model
        members += [Member(model, scores)] if candidate.name != "baseline" else []
    return fitted


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_model_scores_like_the_one_in_memory(models, data, tmp_path, name):
    train, _, test = data
    write_model(models[name], tmp_path / "model", train.X)
    loaded = load_model(tmp_path / "model")
    assert np.abs(loaded.log_odds(test.X) - models[name].log_odds(test.X)).max() <= 1e-9
    assert golden_difference(tmp_path / "model") <= 1e-9
    assert loaded.contract == models[name].contract
    written = {p.suffix for p in (tmp_path / "model").rglob("*") if p.is_file()}
    assert written <= {".json", ".txt", ".npz"}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("rows", [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 700])
@pytest.mark.parametrize("name", NAMES)
def test_the_score_of_a_row_does_not_depend_on_the_others(models, data, name, rows, order):
    rng = np.random.default_rng(rows)
    X = np.tile(data[2].X, (4, 1))[:rows]
    numbers = [i for i in range(X.shape[1]) if i not in models[name].contract.categorical]
    X[:, numbers] *= rng.choice([1.0, -1e-9, -1e9, np.nan], (rows, len(numbers)), p=[0.7, 0.1, 0.1, 0.1])
    together = models[name].log_odds(np.asarray(X, order=order))
    assert together.shape == (rows,)
    assert np.isfinite(together).all()
    for i in rng.integers(0, rows, 40 if rows else 0):
        assert abs(models[name].log_odds(X[i : i + 1])[0] - together[i]) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_many_rows_score_as_few(models, data, name):
    """Of many rows what is compiled: to the last bit for trees, and nearly so for sums of logarithms."""
    X = np.asfortranarray(np.tile(data[2].X, (MANY_ROWS // len(data[2].X) + 1, 1)))
    together = models[name].log_odds(X)
    apart = np.concatenate([models[name].log_odds(part) for part in np.array_split(X, 7)])
    assert np.abs(together - apart).max() <= (0 if name == "lightgbm" else 1e-12)


def test_kernels_are_numpys_functions():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(-700, 700, 200_000)) * rng.choice([-1, 1], 200_000)
    hard = [0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, -1e-308, 2.0**53, 1.7e308, -0.5, np.sqrt(2) - 1, 708.5, -745.2]
    x = np.concatenate([hard, rng.normal(0, 30, 200_000), sizes])
    wide, scaled = np.tile(x, (2, 1)), np.empty((2, len(x)))
    mean, deviation = np.array([0.0, 3.5]), np.array([200.0, 1.0])
    kernels.scale(wide, mean, deviation, 6.0, scaled)
    logged = np.copysign(np.log1p(np.abs(wide)), wide)
    expected = np.nan_to_num(np.clip((logged - mean[:, None]) / deviation[:, None], -6, 6), nan=0.0)
    finite = ~np.isinf(wide)
    assert (np.sign(scaled) == np.sign(expected)).all()
    np.testing.assert_allclose(scaled[finite], expected[finite], rtol=4e-15, atol=4e-15)
    hidden = x[np.abs(x) < 1e300][None].copy()
    stated = hidden[0].copy()
    kernels.silu(hidden, np.zeros(hidden.shape[1]))
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(hidden[0], stated / (1 + np.exp(-stated)), rtol=4e-15, atol=1e-300)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_beats_the_constant_on_unseen_rows(models, data, name):
    _, _, test = data
    rate = test.y.mean()
    z = models[name].log_odds(test.X)
    assert np.isfinite(z).all()
    assert log_loss(z, test.y) < log_loss(np.full(len(test.y), np.log(rate / (1 - rate))), test.y)


@pytest.mark.parametrize("name", ["logistic_regression", "lightgbm", "neural_network"])
def test_two_trainings_on_the_same_data_give_the_same_bytes(campaign, models, data, tmp_path, name):
    train, validate, _ = data
    candidate = next(c for c in campaign.models if c.name == name)
    again, _ = train_candidate(campaign, candidate, train, validate, {"campaign": "small"})
    write_model(models[name], tmp_path / "a", train.X)
    write_model(again, tmp_path / "b", train.X)
    assert model_identity(tmp_path / "a") == model_identity(tmp_path / "b")


def test_the_network_in_numpy_equals_torch(campaign, data):
    import torch

    from propensity_dagster.models.network import NeuralNetworkEstimator

    train, validate, test = data
    scorer = NeuralNetworkEstimator(max_epochs=1).fit(train, validate).scorer
    hidden = torch.from_numpy(
        np.hstack(
            [
                scorer.scaling.apply(test.X),
                *(t[c] for t, c in zip(scorer.embeddings, scorer.one_hot.codes(test.X).T, strict=True)),
            ]
        )
    ).float()
    for weights, bias in scorer.layers[:-1]:
        hidden = torch.nn.functional.silu(hidden @ torch.from_numpy(weights).float() + torch.from_numpy(bias).float())
    weights, bias = scorer.layers[-1]
    z = (hidden @ torch.from_numpy(weights).float() + torch.from_numpy(bias).float())[:, 0].numpy()
    p, q = (1 / (1 + np.exp(-v)) for v in (z, scorer.log_odds(test.X)))
    assert np.abs(p - q).max() < 1e-6


def test_the_network_is_the_same_whatever_ran_before():
    """Numba and torch share their OpenMP: scoring by trees leaves torch with another number of threads."""
    import torch

    from propensity_dagster.models.network import NeuralNetworkEstimator

    rng = np.random.default_rng(0)
    contract = FeatureContract(tuple(FeatureSpec(f"f{i}", "number") for i in range(20)))
    y = (rng.random(2000) < 0.3).astype(float)
    train = Dataset(rng.normal(size=(2000, 20)), y, np.zeros(2000, dtype=np.int64), contract)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        layers = NeuralNetworkEstimator(hidden=(7,)).refit(train, 2).layers
        found.append([part.tobytes() for layer in layers for part in layer])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1]


def test_the_network_keeps_its_best_epoch(data):
    from propensity_dagster.models.network import NeuralNetworkEstimator

    train, validate, _ = data
    fit = NeuralNetworkEstimator(max_epochs=3).fit(train, validate)
    assert np.allclose(fit.validation_log_odds, fit.scorer.log_odds(validate.X))


@pytest.fixture
def saved(models, data, tmp_path):
    folder = tmp_path / "saved"
    write_model(models["ensemble"], folder, data[0].X)
    return folder


@pytest.mark.parametrize("file", ["model.json", "manifest.json", "lightgbm/trees.txt", "neural_network/weights.npz"])
@pytest.mark.parametrize("harm", ["cut short", "changed", "removed"])
def test_a_harmed_model_is_refused(saved, file, harm):
    path = saved / file
    content = path.read_bytes()
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut short" else content.replace(b"1", b"2", 1))
    with pytest.raises(SavedModelError, match=str(saved)):
        load_model(saved)


def test_a_model_with_matching_checksums_but_other_scores_is_refused(models, data, tmp_path):
    import hashlib

    folder = tmp_path / "model"
    write_model(models["logistic_regression"], folder, data[0].X)
    content = json.loads((folder / "model.json").read_text())
    content["scorer"]["intercept"] += 0.1
    (folder / "model.json").write_text(json.dumps(content))
    checksum = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "sha256": {"model.json": checksum}}))
    with pytest.raises(SavedModelError, match="golden rows score differently"):
        load_model(folder)


def test_unknown_format_and_kind_are_named(models, data, tmp_path):
    import hashlib

    folder = tmp_path / "model"
    for kind, version, message in (
        ("oracle", 1, "unknown kind of model 'oracle'"),
        ("cells", 9, "format 9 is unknown"),
    ):
        write_model(models["baseline"], folder, data[0].X)
        content = json.loads((folder / "model.json").read_text()) | {"kind": kind}
        (folder / "model.json").write_text(json.dumps(content))
        checksum = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps({"format": version, "sha256": {"model.json": checksum}}))
        with pytest.raises(SavedModelError, match=message):
            load_model(folder)
    shutil.rmtree(folder)
    with pytest.raises(SavedModelError, match="not a complete saved model"):
        load_model(folder)


def test_rows_in_any_order_of_columns_and_unseen_categories(models):
    model = models["ensemble"]
    row = table_of(30, 9).drop_columns(["converted"])
    assert np.array_equal(model.predict_proba(row), model.predict_proba(row.select(row.column_names[::-1])))
    unseen = row.set_column(row.column_names.index("country"), "country", pa.array(["XX"] * 30))
    missing = row.set_column(row.column_names.index("country"), "country", pa.nulls(30, pa.string()))
    assert np.array_equal(model.predict_proba(unseen), model.predict_proba(missing))
    with pytest.raises(DataContractError, match="needs 1 features that the data lack: orders_count_90d"):
        model.predict_proba(row.drop_columns(["orders_count_90d"]))


def test_unknown_parameters_name_the_model(campaign, data):
    candidate = Candidate(name="lightgbm", params={"num_leafs": 3})
    with pytest.raises(ConfigError, match=r"models\.lightgbm: .*num_leafs"):
        train_candidate(campaign, candidate, data[0], data[1], {})


def test_folds_follow_the_entity():
    keys = pa.chunked_array([[f"c{i % 50}" for i in range(500)]])
    folds = entity_folds(keys)
    assert {len(set(folds[i::50])) for i in range(50)} == {1}
    assert set(folds) == {0, 1, 2, 3, 4}


def test_scaling_uses_training_rows_alone(data):
    train, _, test = data
    scaling = Scaling.fit(train.X, train.contract)
    scaled = scaling.apply(train.X)
    assert np.isfinite(scaling.apply(test.X)).all()
    assert abs(scaled[:, 1].mean()) < 0.05
    assert 0.8 < scaled[:, 1].std() < 1.05


TRUE_MAPS = {
    "none": lambda z: z,
    "temperature": lambda z: 0.5 * z,
    "platt": lambda z: 0.7 * z - 1.0,
    "beta": lambda z: 0.4 * np.log(1 / (1 + np.exp(-z))) - 1.3 * np.log(1 / (1 + np.exp(z))) - 0.5,
    "isotonic": lambda z: np.interp(z, [-8, -1, 0, 1, 8], [-5, -2.5, -2.4, 1.0, 1.5]),
}


@pytest.mark.parametrize("method", METHODS)
def test_calibration_recovers_the_true_map(method):
    rng = np.random.default_rng(0)
    z = rng.normal(-0.5, 1.5, 60_000)
    truth = TRUE_MAPS[method](z)
    y = (rng.random(len(z)) < 1 / (1 + np.exp(-truth))).astype(float)
    chosen, held, losses = choose_calibrator(z, y, rng.integers(0, 5, len(z)))
    best = log_loss(truth, y)
    assert losses[chosen.method] - best < 1e-3
    assert log_loss(held, y) == losses[chosen.method]
    error = np.abs(1 / (1 + np.exp(-fit_calibrator(method, z, y).apply(z))) - 1 / (1 + np.exp(-truth)))
    assert error.mean() < 0.01


def test_isotonic_calibration_makes_no_cliff_below_the_data():
    """The lowest rows of a sample often hold no converter; that is no proof that such rows never convert."""
    rng = np.random.default_rng(2)
    z = rng.normal(-1.5, 0.7, 5000)
    y = (rng.random(5000) < 1 / (1 + np.exp(-z))).astype(float)
    y[np.argsort(z)[:60]] = 0
    low = fit_calibrator("isotonic", z, y).apply(np.array([z.min(), z.min() - 1.0]))
    assert low[0] > z.min() - 1.0
    assert low[0] - low[1] == pytest.approx(1.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(METHODS))
def test_calibration_never_reverses_the_order(seed, method):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, rng.uniform(0.1, 4), 200)
    y = (rng.random(200) < rng.uniform(0.05, 0.9)).astype(float)
    y[:2] = [0, 1]
    calibrated = fit_calibrator(method, z, y).apply(np.sort(z))
    assert np.isfinite(calibrated).all()
    assert (np.diff(calibrated) >= -1e-9).all()


def test_cross_fitting_never_reads_the_row_it_scores():
    rng = np.random.default_rng(4)
    z, y, fold = rng.normal(size=500), (rng.random(500) < 0.3).astype(float), rng.integers(0, 5, 500)
    before = cross_fit("isotonic", z, y, fold)
    flipped = np.where(fold == 2, 1 - y, y)
    after = cross_fit("isotonic", z, flipped, fold)
    assert np.array_equal(before[fold == 2], after[fold == 2])
    assert not np.array_equal(before[fold != 2], after[fold != 2])


def monotone(campaign, **directions):
    return campaign.model_copy(update={"monotone": directions})


@pytest.mark.parametrize("name", ["logistic_regression", "lightgbm"])
@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
def test_a_monotone_constraint_is_kept(campaign, data, name, direction):
    """Outward names count too; recency rises against what the data say, count falls against it."""
    train, validate, test = data
    stated = monotone(campaign, days_since_last_purchase=direction, orders_count_90d=direction)
    assert stated.monotone_directions.keys() == {"orders_recency_days", "orders_count_90d"}
    candidate = next(c for c in campaign.models if c.name == name)
    model, _ = train_candidate(stated, candidate, train, validate, {})
    assert model.facts["monotone"].keys() == stated.monotone_directions.keys()
    assert keeps(model)
    assert max(violations(model, test.X, stated.monotone_directions).values()) <= 1e-9
    free, _ = train_candidate(campaign, candidate, train, validate, {})
    assert "monotone" not in free.facts
    assert violations(free, test.X, {"orders_recency_days": 1})["orders_recency_days"] > 0.01


def test_a_violation_is_measured(models, data):
    """A linear model whose coefficient is known: the score falls by it, whatever the other features are."""
    from dataclasses import replace

    test = data[2]
    model = models["logistic_regression"]
    column = model.contract.names.index("orders_count_90d")
    position = model.scorer.scaling.columns.index(column)
    coefficients = np.zeros_like(model.scorer.coefficients)
    coefficients[position] = -1.0
    scorer = replace(model.scorer, coefficients=coefficients)
    falling = replace(model, scorer=scorer, calibrator=replace(model.calibrator, method="none", values=()))
    assert violations(falling, test.X, {"orders_count_90d": -1}) == {"orders_count_90d": 0.0}
    assert violations(falling, test.X, {"orders_count_90d": 1})["orders_count_90d"] > 0.05


CONSTRAINTS = [
    ({"no_such": "increasing"}, "monotone: there is no feature 'no_such'; numbers are"),
    ({"country": "increasing"}, "monotone: 'country' is a category, which has no more or less"),
]


@pytest.mark.parametrize(("stated", "message"), CONSTRAINTS, ids=["unknown", "category"])
def test_constraints_that_cannot_be(campaign, data, stated, message):
    candidate = campaign.models[1]
    with pytest.raises(ConfigError, match=message):
        train_candidate(monotone(campaign, **stated), candidate, data[0], data[1], {})


def test_who_breaks_a_constraint_does_not_challenge(models):
    from dataclasses import replace

    best = choose_challenger(models)
    broken = {
        **models,
        best: replace(models[best], facts={**models[best].facts, "monotone": {"orders_count_90d": 0.1}}),
    }
    assert choose_challenger(broken) != best
    everyone = {n: replace(m, facts={**m.facts, "monotone": {"orders_count_90d": 0.1}}) for n, m in models.items()}
    assert choose_challenger(everyone) == best  # and the gate refuses it


def forest_rows(rng, n):
    """Numbers, counts with many zeros, missing values, and two categories of which some are new."""
    X = np.asfortranarray(rng.lognormal(0, 1, (n, 8)).round(1))
    X[:, 1] = rng.poisson(0.5, n)
    X[rng.random(X.shape) < 0.15] = np.nan
    X[:, 2] = rng.lognormal(0, 1, n)  # never missing in training
    X[:, 6], X[:, 7] = rng.integers(0, 40, n), rng.integers(0, 3, n)
    X[rng.random(n) < 0.1, 6] = np.nan
    return X


@pytest.mark.parametrize(
    "params",
    [
        {"num_leaves": 15},
        {"num_leaves": 31, "zero_as_missing": True},
        {"num_leaves": 64, "use_missing": False},
        {"num_leaves": 2, "max_cat_to_onehot": 1},
        {"num_leaves": 40, "max_bin": 1000, "min_data_in_leaf": 2},
        {"num_leaves": 15, "objective": "regression", "learning_rate": 0.3},
        {"num_leaves": 15, "min_data_in_leaf": 100_000},  # not one split
    ],
)
def test_bit_vectors_score_as_lightgbm_does(params):
    rng = np.random.default_rng(3)
    X = forest_rows(rng, 4_000)
    z = np.nan_to_num(X[:, 0]) - 0.5 * np.nan_to_num(X[:, 1]) + (X[:, 6] % 5 == 0) + X[:, 2] * (X[:, 7] == 1)
    y = (rng.random(len(X)) < 1 / (1 + np.exp(1 - z))).astype(float)
    stated = {"objective": "binary", "verbosity": -1, "min_data_in_leaf": 20, **params}
    booster = lightgbm.train(stated, lightgbm.Dataset(X, y, categorical_feature=[6, 7]), num_boost_round=40)
    booster = lightgbm.Booster(model_str=booster.model_to_string())
    forest = build_forest(booster)
    assert forest is not None
    rows = forest_rows(rng, 3_001)  # no whole number of blocks
    rows[:20] = np.nan
    rows[20:40] = 0.0
    rows[40:60] = np.array([1e308, -1e308, np.inf, -np.inf, 1e-36, -1e-36, 99, -1])
    rows[60:100, :6] = X[:40, :6].round(0)
    for feature, first, count, _, codes in forest.features:
        if not codes:  # what equals a threshold goes left
            rows[100 : 100 + min(count, 900), feature] = forest.thresholds[first : first + min(count, 900)]
    assert (forest.log_odds(rows) == booster.predict(rows, raw_score=True)).all()
    assert (forest.log_odds(np.ascontiguousarray(rows[:7])) == booster.predict(rows[:7], raw_score=True)).all()
    assert forest.log_odds(rows[:0]).shape == (0,)


def test_trees_of_many_leaves_are_left_to_lightgbm():
    rng = np.random.default_rng(4)
    X = rng.normal(size=(2_000, 2))
    data = lightgbm.Dataset(X, X[:, 0] * X[:, 1] + rng.normal(size=len(X)))
    booster = lightgbm.train({"num_leaves": 65, "min_data_in_leaf": 2, "verbosity": -1}, data, num_boost_round=2)
    assert build_forest(booster) is None


def test_many_rows_score_as_lightgbm_scores_few():
    rng = np.random.default_rng(5)
    X = rng.normal(size=(40_000, 3))
    booster = lightgbm.train({"verbosity": -1}, lightgbm.Dataset(X, X[:, 0] + X[:, 1] ** 2), num_boost_round=20)
    scorer = TreesScorer(booster)
    together = scorer.log_odds(X)
    assert (together == np.concatenate([scorer.log_odds(part) for part in np.array_split(X, 4)])).all()
