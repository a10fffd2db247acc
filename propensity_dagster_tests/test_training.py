"""Cross-validation, the prior's adaptation, the search for parameters: nothing may see what it is judged on."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy.special import expit, logit

from propensity_dagster.campaign import load_campaign
from propensity_dagster.campaign_sections import Candidate, Search
from propensity_dagster.features.definitions import define_features, features_markdown
from propensity_dagster.models.base import Fit
from propensity_dagster.models.baseline import CellBaseline
from propensity_dagster.models.calibration import log_loss
from propensity_dagster.models.dataset import Dataset, FeatureContract, FeatureSpec
from propensity_dagster.models.prior import LogOddsHistogram, prior_shift
from propensity_dagster.models.search import SPACES, plot_search, search_candidate
from propensity_dagster.models.training import cross_validate

from .conftest import SMALL


def data_of(rows: int, seed: int = 0) -> Dataset:
    """Two informative columns, a category, and five folds of which rows of one entity share one."""
    rng = np.random.default_rng(seed)
    X = np.asfortranarray(np.column_stack([rng.normal(size=rows), rng.lognormal(size=rows), rng.integers(0, 3, rows)]))
    X[rng.random(rows) < 0.1, 1] = np.nan
    z = -1 + X[:, 0] + 0.5 * (X[:, 2] == 1)
    specs = (FeatureSpec("a", "number"), FeatureSpec("b", "number"), FeatureSpec("c", "category", ("x", "y", "z")))
    y = (rng.random(rows) < expit(z)).astype(float)
    return Dataset(X, y, rng.integers(0, 5, rows), FeatureContract(specs))


@dataclass
class Memory:
    """An estimator that knows by heart the rows it was trained on, and counts rounds."""

    seen: list[set[float]] = field(default_factory=list)
    kind = "memory"

    def fit(self, train: Dataset, validate: Dataset) -> Fit:
        known = set(train.X[:, 0].tolist())
        self.seen.append(known)
        scores = np.array([5.0 if value in known else -5.0 for value in validate.X[:, 0]])
        return Fit(self, scores, rounds=10 * len(self.seen))  # pyright: ignore[reportArgumentType]

    def refit(self, train: Dataset, rounds: int):
        return ("refitted", len(train.y), rounds)


def test_no_row_is_scored_by_a_model_that_saw_it():
    data = data_of(500)
    fit = cross_validate(Memory(), data)  # pyright: ignore[reportArgumentType]
    assert (fit.validation_log_odds == -5.0).all()
    assert fit.scorer == ("refitted", 500, 30)


def test_the_rows_of_a_dataset_are_those_chosen():
    data = data_of(50)
    chosen = data.fold == 2
    part = data.rows(chosen)
    assert np.array_equal(part.X, data.X[chosen], equal_nan=True)
    assert np.array_equal(part.y, data.y[chosen])
    assert part.X.flags.f_contiguous


def test_the_baseline_of_a_table_is_its_best_column():
    data = data_of(4_000)
    scorer = CellBaseline(None).refit(data, 0)
    assert scorer.columns == (0,)
    turned = Dataset(
        data.X[:, [1, 2, 0]], data.y, data.fold, FeatureContract(tuple(data.contract.features[i] for i in (1, 2, 0)))
    )
    assert CellBaseline(None).refit(turned, 0).columns == (2,)
    only = Dataset(np.asfortranarray(data.X[:, [2]]), data.y, data.fold, FeatureContract(data.contract.features[2:]))
    found = expit(
        CellBaseline(None, prior_rows=0.001).refit(only, 0).log_odds(np.array([[0.0], [1.0], [2.0], [np.nan]]))
    )
    rates = [data.y[data.X[:, 2] == code].mean() for code in range(3)]
    assert np.allclose(found[:3], rates, atol=1e-4)
    assert found[3] == pytest.approx(data.y.mean(), abs=1e-3)


SHIFTS = [(0.05, 0.05), (0.05, 0.12), (0.2, 0.08), (0.3, 0.5)]


@pytest.mark.parametrize(("old", "new"), SHIFTS)
def test_a_changed_rate_is_found_without_labels(old, new):
    """Where only the rate changed, the adapted scores are as good as if the new rate were known."""
    rng = np.random.default_rng(4)
    y = (rng.random(60_000) < new).astype(float)
    x = rng.normal(size=len(y)) + 1.5 * y
    z = logit(old) + 1.5 * x - 1.5**2 / 2  # exact posterior log-odds under the old rate
    shift = prior_shift(z, None, old, 20.0)
    assert shift == pytest.approx(logit(new) - logit(old), abs=0.08)
    assert log_loss(z + shift, y) == pytest.approx(log_loss(z + logit(new) - logit(old), y), abs=5e-4)


def test_the_shift_is_bounded_where_the_assumption_fails():
    nonsense = np.random.default_rng(0).normal(-9, 0.01, 10_000)
    assert prior_shift(nonsense, None, 0.3, 4.0) == pytest.approx(-np.log(4.0))
    assert prior_shift(-nonsense, None, 0.3, 4.0) == pytest.approx(np.log(4.0))


def test_a_histogram_gives_the_shift_of_the_rows():
    rng = np.random.default_rng(2)
    z = np.concatenate([rng.normal(-3, 1, 30_000), rng.normal(1, 2, 4_000), [-60.0, 80.0]])
    histogram = LogOddsHistogram()
    for part in np.array_split(z, 7):
        histogram.add(part)
    assert histogram.shift(0.08, 50.0) == pytest.approx(prior_shift(z, None, 0.08, 50.0), abs=1e-4)
    assert LogOddsHistogram().shift(0.08, 50.0) == 0.0


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    file = tmp_path_factory.mktemp("campaign") / "small.yaml"
    file.write_text(
        SMALL + "search: {seconds: 20, trials: 4, models: [lightgbm, logistic_regression, neural_network]}\n"
    )
    return load_campaign(file)


@pytest.mark.parametrize("name", sorted(SPACES))
@pytest.mark.parametrize("cross_validated", [True, False])
def test_a_search_is_never_worse_than_what_was_stated(campaign, tmp_path, name, cross_validated):
    import optuna

    stated = {"neural_network": {"max_epochs": 2}, "lightgbm": {"max_rounds": 30}}.get(name, {})
    candidate = Candidate.model_validate({"name": name, "params": stated})
    train, validate = data_of(600), None if cross_validated else data_of(400, 1)
    search = Search(seconds=30, trials=3, models=("lightgbm",))
    found, facts = search_candidate(campaign, search, candidate, train, validate, tmp_path / "optuna.db", "a/b/c")
    assert facts["trials"] == 3
    assert facts["best_log_loss"] <= facts["stated_log_loss"]
    assert found.params.items() >= stated.items(), "what the file states stays"
    kept = optuna.load_study(study_name="a/b/c", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert [t.value for t in kept.trials] == facts["losses"]
    plot_search(name, facts, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 5_000


def test_a_search_keeps_to_its_time(campaign, tmp_path):
    search = Search(seconds=0.01, trials=1_000, models=("logistic_regression",))
    candidate = Candidate(name="logistic_regression")
    _, facts = search_candidate(campaign, search, candidate, data_of(500), data_of(300, 1), tmp_path / "o.db", "s")
    assert 1 <= facts["trials"] < 20


def test_no_model_sees_a_protected_attribute(campaign):
    """It stays in the training set, where it is a segment, and in no contract."""
    import pyarrow as pa

    gender = {"attributes": {**campaign.source.entities.attributes, "gender": {"type": "category", "protected": True}}}
    entities = campaign.source.entities.model_validate({**campaign.source.entities.model_dump(), **gender})
    guarded = campaign.model_copy(update={"source": campaign.source.model_copy(update={"entities": entities})})
    assert guarded.protected == ("gender",)
    assert guarded.all_segments == (*campaign.segments, "gender")
    table = pa.table({"customer_id": ["1", "2"], "age": [1.0, 2.0], "gender": ["f", "m"], "converted": [True, False]})
    assert FeatureContract.fit(table, "customer_id", guarded.protected).names == ["age"]
    assert "protected: no model sees it" in features_markdown(guarded, define_features(guarded, {"gender": "category"}))
