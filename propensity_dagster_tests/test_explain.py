"""Contributions that add up, equal the references, and become reasons; the same in batch and over HTTP."""

import json

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shap
from hypothesis import given, settings
from hypothesis import strategies as st

from propensity_dagster.data.lake import Home
from propensity_dagster.errors import ConfigError
from propensity_dagster.explain.contributions import Explainer
from propensity_dagster.explain.plots import publish_explanation_plots, typical_rows
from propensity_dagster.explain.population import describe_features, reference_rows, sample_file
from propensity_dagster.explain.reasons import ReasonCoder
from propensity_dagster.explain.summary import RECORD, _jumped, explain_model
from propensity_dagster.explain.trees import build_tables, tree_contributions
from propensity_dagster.models.saved import load_model
from propensity_dagster.scoring.batch import score_snapshot
from propensity_dagster.serving import scorers
from propensity_dagster.serving.explanations import explain
from propensity_dagster.serving.packages import load_release
from propensity_dagster.serving.publish.releases import publish_release

from .conftest import KINDS
from .test_serving_models import TOLERANCE, rows

__all__ = ["rows"]  # the fixture

# Trees


def booster(seed: int, *, missing: str, categories: int, leaves: int = 15, rounds: int = 20, features: int = 6):
    """A booster on data with every kind of value, and the data."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(1500, features)).round(1)
    if missing == "nan":
        X[generator.random(X.shape) < 0.2] = np.nan
    if missing == "zero":
        X[generator.random(X.shape) < 0.3] = 0.0
    X[:, 0] = generator.integers(0, categories, len(X))
    X[:7, 0] = np.nan
    y = (np.nan_to_num(X[:, 1]) + X[:, 0] % 3 + generator.normal(size=len(X)) > 1).astype(float)
    params = {"objective": "binary", "num_leaves": leaves, "min_data_in_leaf": 5, "verbosity": -1, "seed": seed}
    params |= {"zero_as_missing": missing == "zero", "min_data_per_group": 5, "num_threads": 2, "deterministic": True}
    data = lightgbm.Dataset(np.nan_to_num(X, nan=np.nan), y, categorical_feature=[0], params=params)
    return lightgbm.train(params, data, rounds), X


@pytest.mark.parametrize("missing", ["none", "nan", "zero"])
@pytest.mark.parametrize("categories", [3, 40, 200])
def test_tables_give_what_lightgbm_gives(missing, categories):
    model, X = booster(1, missing=missing, categories=categories)
    X[10:20, 0] = categories + 50  # never seen
    X[20:30, 1] = 1e300
    X[30:40] = np.nan
    base, values = tree_contributions(model, build_tables(model), X)
    wanted = np.asarray(model.predict(X, pred_contrib=True))
    np.testing.assert_allclose(values, wanted[:, :-1], rtol=0, atol=1e-12)
    assert base == pytest.approx(wanted[0, -1], abs=1e-12)


@given(seed=st.integers(0, 10_000), leaves=st.integers(2, 40), features=st.integers(2, 9), rounds=st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_tables_add_up_to_the_score(seed, leaves, features, rounds):
    model, X = booster(seed, missing="nan", categories=5, leaves=leaves, features=features, rounds=rounds)
    base, values = tree_contributions(model, build_tables(model), X)
    np.testing.assert_allclose(base + values.sum(axis=1), model.predict(X, raw_score=True), rtol=0, atol=1e-10)


def test_tables_are_shaps_values():
    model, X = booster(2, missing="nan", categories=4)
    _, values = tree_contributions(model, build_tables(model), X[:100])
    np.testing.assert_allclose(values, shap.TreeExplainer(model).shap_values(X[:100]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("limits", [{"max_path": 2}, {"max_bytes": 1000}])
def test_trees_too_deep_for_tables_are_explained_by_lightgbm(limits):
    model, X = booster(3, missing="nan", categories=5)
    tables = build_tables(model, **limits)
    assert tables is None
    base, values = tree_contributions(model, tables, X)
    np.testing.assert_allclose(base + values.sum(axis=1), model.predict(X, raw_score=True), rtol=0, atol=1e-10)


def test_trees_without_a_split():
    _, X = booster(4, missing="none", categories=3, rounds=1)
    X[:] = 1.0
    constant = lightgbm.train({"objective": "binary", "verbosity": -1}, lightgbm.Dataset(X, np.arange(len(X)) % 2), 3)
    base, values = tree_contributions(constant, build_tables(constant), X)
    assert not values.any()
    assert base == pytest.approx(constant.predict(X[:1], raw_score=True)[0])


# Every kind of model


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_add_up_and_are_those_of_the_service(materialized, rows, kind):
    folder = materialized.home.candidates(materialized.campaign.name) / kind
    model, single, reference = load_model(folder), scorers.load_model(folder), rows[50:90]
    found = Explainer(model, reference).explain(rows)
    np.testing.assert_allclose(found.base + found.values.sum(axis=1), model.log_odds(rows), rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.raw_base + found.raw, model.scorer.log_odds(rows), rtol=0, atol=1e-9)
    for i in range(0, len(rows), 5):
        base, values = single.contributions(rows[i].tolist(), reference)
        assert base == pytest.approx(found.base, abs=TOLERANCE[kind])
        np.testing.assert_allclose(found.values[i], values, rtol=0, atol=TOLERANCE[kind])


def test_linear_contributions_are_shaps(materialized, rows):
    model = load_model(materialized.home.candidates("small") / "logistic_regression")
    scorer, reference = model.scorer, rows[50:90]
    design = [np.hstack([scorer.scaling.apply(X), scorer.one_hot.apply(X)]) for X in (reference, rows)]
    wanted = shap.LinearExplainer((scorer.coefficients, scorer.intercept), shap.maskers.Independent(design[0], 1000))
    found = Explainer(model, reference).explain(rows)
    raw = found.raw / np.where(found.values.sum(axis=1) == 0, 1, found.values.sum(axis=1))
    values = wanted.shap_values(design[1])
    for column in scorer.scaling.columns[:10]:
        place = scorer.scaling.columns.index(column)
        own = values[:, place].copy()
        for offset, position in enumerate(scorer.scaling.indicators):
            if position == place:
                own += values[:, len(scorer.scaling.columns) + offset]
        np.testing.assert_allclose(found.values[:, column] * raw, own, rtol=0, atol=1e-8)


def test_the_networks_contributions_are_near_shaps_expected_gradients(materialized, rows):
    """The integral is computed where shap draws 2,000 points at random: the same up to shap's own noise."""
    import torch

    model = load_model(materialized.home.candidates("small") / "neural_network")
    scorer = model.scorer
    codes = scorer.one_hot.codes(rows)
    inputs = np.hstack([scorer.scaling.apply(rows), *[t[codes[:, i]] for i, t in enumerate(scorer.embeddings)]])
    layers: list = []
    for weights, bias in scorer.layers:
        layer = torch.nn.Linear(*weights.shape)
        layer.weight.data, layer.bias.data = torch.tensor(weights.T).float(), torch.tensor(bias).float()
        layers += [layer, torch.nn.SiLU()]
    network = torch.nn.Sequential(*layers[:-1]).eval()
    others, own = torch.tensor(inputs[50:90]).float(), torch.tensor(inputs[100:110]).float()
    wanted = shap.GradientExplainer(network, others).shap_values(own, nsamples=2000, rseed=1)[..., 0]
    found = Explainer(model, rows[50:90]).explain(rows[100:110])
    numbers = len(scorer.scaling.columns)
    slope = found.raw / found.values.sum(axis=1)
    for place, column in enumerate(scorer.scaling.columns):
        if place not in scorer.scaling.indicators:
            np.testing.assert_allclose(
                found.values[:, column] * slope, wanted[:, place], rtol=0, atol=0.05 * np.abs(wanted[:, :numbers]).max()
            )


# Reasons


def newest_features(home: Home):
    lake = home.lake("small")
    snapshot = lake.partitions("scores", "snapshot")[-1]
    return lake.partition("features", "snapshot", snapshot), lake.partition("scores", "snapshot", snapshot)


@pytest.mark.parametrize("kind", KINDS)
def test_reasons_are_the_strongest_features_that_may_be_seen(materialized, kind):
    model = load_model(materialized.home.candidates("small") / kind)
    features, _ = newest_features(materialized.home)
    sample = sample_file(features, model.contract.names)
    coder = ReasonCoder(materialized.campaign, model, sample)
    X = model.contract.encode(sample)[:300]
    found, values = coder.reasons(X), Explainer(model, reference_rows(model, sample)).explain(X).values
    hidden = model.contract.names.index("visits_recency_days")
    shown = np.abs(values)
    shown[:, hidden] = 0.0
    for name in {feature.source for feature in coder.features}:
        columns = np.array([i for i, feature in enumerate(coder.features) if feature.source == name])
        for row in shown:
            weaker = np.delete(columns, row[columns].argmax())
            row[weaker] = 0.0
    for i, row in enumerate(found.feature):
        chosen = row[row >= 0]
        assert hidden not in chosen
        assert len(set(chosen)) == len(chosen) == min(5, np.count_nonzero(shown[i]))
        np.testing.assert_array_equal(found.contribution[i][: len(chosen)], values[i][chosen])
        np.testing.assert_array_equal(shown[i][chosen], np.sort(shown[i])[::-1][: len(chosen)])


def test_scores_hold_reasons_in_words(materialized):
    features, scores = newest_features(materialized.home)
    table = {row["customer_id"]: row for row in pq.read_table(features).to_pylist()}
    worded = 0
    for row in pq.read_table(scores).to_pylist():
        sizes = [abs(row[f"reason_{i}_contribution"]) for i in range(1, 6) if row[f"reason_{i}"]]
        assert sizes == sorted(sizes, reverse=True)
        for i in range(1, 6):
            feature, value = row[f"reason_{i}"], row[f"reason_{i}_value"]
            if feature is None:
                assert row[f"reason_{i}_sentence"] is None
                continue
            assert feature != "visits_recency_days"
            assert (row[f"reason_{i}_contribution"] > 0) == (row[f"reason_{i}_direction"] == "raises")
            if feature == "visits_pages_sum_90d":
                worded += 1
                typical = row[f"reason_{i}_typical"]
                assert value == f"{table[row['customer_id']][feature]:,.0f}"
                assert row[f"reason_{i}_sentence"] == f"viewed {value} pages in the last 90 days, typically {typical}"
    assert worded


def test_the_service_gives_the_reasons_of_batch(registered):
    """The package's population is the scored snapshot: the same reference, the same reasons, the same words."""
    release = publish_release(registered.campaign, registered.home, registered.store)
    assert release is not None
    features, scores = newest_features(registered.home)
    wanted = {row["customer_id"]: row for row in pq.read_table(scores).to_pylist()}
    package = load_release(registered.home.serving / "small").champion
    for row in pq.read_table(features).slice(0, 60).to_pylist():
        values = [row[field.feature] for field in package.inputs]
        encoded, _ = package.encode(values)
        for i, reason in enumerate(explain(package, encoded, values)["reasons"], start=1):
            batch = wanted[row["customer_id"]]
            assert reason["contribution"] == pytest.approx(batch[f"reason_{i}_contribution"], abs=1e-6)
            assert (reason["feature"], reason["sentence"]) == (batch[f"reason_{i}"], batch[f"reason_{i}_sentence"])


@pytest.mark.parametrize(("reasons", "above"), [(4, 0.0), (2, 0.9), (1, 1.0), (0, 0.0)])
def test_how_many_and_for_whom(registered, engine, reasons, above):
    stated = registered.campaign.explanations.model_copy(update={"reasons": reasons, "above_percentile": above})
    campaign = registered.campaign.model_copy(update={"explanations": stated})
    lake = registered.home.lake("small")
    snapshot = lake.partitions("scores", "snapshot")[-1]
    before = pq.read_table(lake.partition("scores", "snapshot", snapshot))
    model = load_model(registered.home.candidates("small") / "lightgbm")
    score_snapshot(campaign, snapshot, model, "1", before["scored_at"][0].as_py(), registered.home, engine)
    found = pq.read_table(lake.partition("scores", "snapshot", snapshot))
    assert sum(name.endswith("_sentence") for name in found.column_names) == reasons
    if reasons:
        has = pa.compute.is_valid(found["reason_1"]).to_numpy()
        np.testing.assert_array_equal(has, found["percentile"].to_numpy() > above)


@pytest.mark.parametrize("stated", [{"hidden": ["no_such"]}, {"sentences": {"orders_count_31d": "{value}"}}])
def test_a_feature_that_does_not_exist_is_told(materialized, stated):
    explanations = materialized.campaign.explanations.model_validate(stated)
    campaign = materialized.campaign.model_copy(update={"explanations": explanations})
    model = load_model(materialized.home.candidates("small") / "lightgbm")
    features, _ = newest_features(materialized.home)
    with pytest.raises(ConfigError, match=r"small\.yaml: explanations: there is no feature .*total_purchases"):
        describe_features(campaign, model, sample_file(features, model.contract.names))


@pytest.mark.parametrize("sentence", ["", "ordered {count} times", "two\nlines", "x" * 201])
def test_sentences_that_are_wrong_are_told(materialized, sentence):
    with pytest.raises(ValueError, match="one line of at most 200 characters"):
        materialized.campaign.explanations.model_validate({"sentences": {"age": sentence}})


# What the model goes by


def test_the_explanations_of_the_champion_are_published(materialized):
    folder = materialized.home.reports("small")
    record = json.loads((folder / RECORD).read_text())
    assert record["role"] == "champion"
    assert record["largest_difference"] <= 1e-6
    assert len(record["features"]) == len({row["feature"] for row in record["features"]})
    sizes = [row["mean_absolute"]["value"] for row in record["features"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(row["share"]["value"] for row in record["features"]) == pytest.approx(1.0)
    for row in record["features"][:5]:
        assert row["share"]["low"] <= row["share"]["value"] <= row["share"]["high"]
        assert row["loss_when_shuffled"]["high"] >= row["loss_when_shuffled"]["low"]
    assert {row["name"] for row in record["streams"]} == {"orders", "visits", "emails", "customer"}
    sources = {row["name"]: row["features"] for row in record["sources"]}
    assert sources["customers.age"] == 1
    assert sources["orders.amount"] == 12  # sum, mean, largest in three windows and ever
    assert sum(sources.values()) == len(record["features"])
    assert sum(member["share"] for member in record["members"]) == pytest.approx(1.0) or not record["members"]
    for curve in record["dependence"]:
        assert curve["grid"] == sorted(set(curve["grid"]))
        assert all(0 < p < 1 for p in curve["mean"])
    for name in ("summary", "dependence", "partial", "sure", "average", "unlikely"):
        assert (folder / f"explanations_{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_explained(registered, tmp_path, kind):
    """The baseline reads three columns only; all pictures are drawn nevertheless."""
    model = load_model(registered.home.candidates("small") / kind)
    found = explain_model(registered.campaign, model, "7", "champion", registered.home)
    assert found.record["largest_difference"] <= 1e-6
    chosen = typical_rows(found)
    assert found.probability[chosen["sure"]] >= found.probability[chosen["average"]]
    files = publish_explanation_plots(found, tmp_path)
    assert len(files) == 6


def test_a_constant_model_says_that_nothing_moves_it(registered, tmp_path):
    from dataclasses import replace

    model = load_model(registered.home.candidates("small") / "logistic_regression")
    flat = replace(model.scorer, coefficients=np.zeros_like(model.scorer.coefficients))
    found = explain_model(registered.campaign, replace(model, scorer=flat), "8", "champion", registered.home)
    assert not found.record["dependence"]
    assert len(publish_explanation_plots(found, tmp_path)) == 6


def test_a_feature_that_jumps_between_retrains_is_told():
    def record(version, **shares):
        features = [{"feature": name, "share": {"value": share}} for name, share in shares.items()]
        return {"version": version, "features": features}

    history = [{"version": str(i), "shares": {"age": 0.10, "visits": 0.50, "rare": 0.001}} for i in range(4)]
    steady = record("9", age=0.12, visits=0.45, rare=0.004)
    assert not _jumped(steady, history, "9")
    jumped = _jumped(record("9", age=0.30, visits=0.49, new=0.2), history, "9")
    assert [row["feature"] for row in jumped] == ["age", "new"]
    assert jumped[0] == {"feature": "age", "share": 0.30, "usual": pytest.approx(0.10), "versions": 4}
    assert not _jumped(steady, [], "9")
    assert not _jumped(record("3", age=0.9), [{"version": "3", "shares": {"age": 0.1}}], "3"), "itself is no history"
