"""Uplift: measures with known answers, learners that find a known effect, and a decision that is not taken lightly."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.errors import ConfigError, DataContractError, InsufficientDataError, SavedModelError
from propensity_dagster.evaluation.uplift import (
    Outcomes,
    auuc,
    average_effect,
    comparability,
    policy_value,
    qini,
    qini_of_effects,
    ranked,
)
from propensity_dagster.experiments.uplift import effects, error_of_sum, publish_uplift, read_decision
from propensity_dagster.models.uplift import LEARNERS
from propensity_dagster.reports.uplift_page import describe_uplift, publish_uplift_page
from propensity_dagster_tests.conftest import SHARED_DATA


def ones(n):
    return np.ones((1, n))


def trial(rng, n, effect, base=0.2):
    treated = rng.random(n) < 0.5
    y = (rng.random(n) < base + treated * effect).astype(float)
    return Outcomes(y, treated, np.arange(n))


def test_qini_by_hand():
    """Four rows, best first: treated and converted, untreated and not, treated and not, untreated and converted."""
    rows = Outcomes(np.array([1.0, 0, 0, 1]), np.array([True, False, True, False]), np.arange(4))
    r = ranked(np.array([4.0, 3, 2, 1]), rows, ones(4))
    # Gain after 0..4 rows: 0, 0 (no untreated yet), 1, 1, 1 - 1 = 0; over two treated.
    assert qini(r)[0] == pytest.approx(np.trapezoid([0, 0, 0.5, 0.5, 0], [0, 0.25, 0.5, 0.75, 1]))
    assert auuc(r)[0] == pytest.approx(np.trapezoid([0, 0, 0.5 * 1, 0.75 * 0.5, 0], [0, 0.25, 0.5, 0.75, 1]))


def test_equal_scores_are_one_step_and_weights_are_rows():
    rng = np.random.default_rng(0)
    rows = trial(rng, 500, 0.1)
    constant = ranked(np.zeros(500), rows, ones(500))
    assert qini(constant)[0] == pytest.approx(0, abs=1e-12)
    score = rng.integers(0, 5, 500).astype(float)
    w = rng.integers(0, 3, (3, 500)).astype(float)
    for i in range(3):
        again = np.repeat(np.arange(500), w[i].astype(int))
        repeated = Outcomes(rows.y[again], rows.treated[again], rows.entity[again])
        expected = ranked(score[again], repeated, ones(len(again)))
        assert qini(ranked(score, rows, w))[i] == pytest.approx(qini(expected)[0])
        assert auuc(ranked(score, rows, w))[i] == pytest.approx(auuc(expected)[0])


def test_a_trial_estimates_what_known_effects_give():
    rng = np.random.default_rng(1)
    effect = rng.beta(1, 4, 40_000) - 0.1
    score = effect + rng.normal(0, 0.1, 40_000)
    truth = qini_of_effects(score, effect)
    found = [qini(ranked(score, trial(rng, 40_000, effect), ones(40_000)))[0] for _ in range(40)]
    assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / np.sqrt(40))
    assert qini_of_effects(effect, effect) > truth > 0 > qini_of_effects(-effect, effect)
    rows = trial(rng, 40_000, effect)
    assert average_effect(rows, ones(40_000))[0] == pytest.approx(effect.mean(), abs=0.02)


def test_policy_value_by_hand():
    rng = np.random.default_rng(2)
    effect = np.where(np.arange(100_000) < 50_000, 0.3, -0.1)
    rows = trial(rng, 100_000, effect)

    def value(treat):
        return policy_value(treat, rows, 0.5, margin=10, cost=1, weights=ones(100_000))[0]

    assert value(np.ones(100_000, bool)) == pytest.approx(10 * (0.2 + 0.1) - 1, abs=0.06)
    assert value(np.zeros(100_000, bool)) == pytest.approx(10 * 0.2, abs=0.06)
    assert value(effect > 0) == pytest.approx(10 * (0.2 + 0.15) - 0.5, abs=0.06)


def test_arms_that_are_not_comparable_are_named():
    rng = np.random.default_rng(3)
    n = 4000
    X = np.column_stack([rng.normal(size=n), rng.integers(0, 3, n), rng.normal(size=n)])
    treated = rng.random(n) < 0.5
    fine = comparability(X, ["a", "b", "c"], [1], treated, np.full(n, 0.5), 0.5)
    assert fine.problems == ()
    lost = comparability(
        X[~treated | (np.arange(n) % 7 > 0)],
        ["a", "b", "c"],
        [1],
        treated[~treated | (np.arange(n) % 7 > 0)],
        np.full(int((~treated | (np.arange(n) % 7 > 0)).sum()), 0.5),
        0.5,
    )
    assert "50.0% should be" in lost.problems[0]
    X[:, 2] += 0.5 * treated
    unlike = comparability(X, ["a", "b", "c"], [1], treated, np.where(treated, 0.6, 0.4), 0.5)
    assert "1 of 3 features differ between the arms, most of all c (+0." in unlike.problems[0]
    assert "AUC 1.00" in unlike.problems[1]
    chosen = comparability(X[:, :2], ["a", "b"], [1], treated, np.where(treated, 0.99, 0.5), 0.5)
    assert any("no overlap" in problem for problem in chosen.problems)


FILE = """
name: trial
source: {{kind: table, path: data.parquet, key: id}}
outcome: {{column: y, positive: 1}}
treatment: {{column: arm, control: none, treated: mail{more}}}
split: {{folds: 5}}
value: {{margin_per_conversion: 10, cost_per_contact: 0.5}}
min_converters: 50
"""


def home_of(tmp_path, n, effect, base, rng, treated=None, more=""):
    """A campaign whose training set is a trial: x drives the effect, z what happens anyway."""
    x, z = rng.normal(size=n), rng.normal(size=n)
    treated = rng.random(n) < 0.5 if treated is None else treated(x, z)
    y = rng.random(n) < expit(base(x, z)) + treated * effect(x, z)
    (tmp_path / "trial.yaml").write_text(FILE.format(more=more))
    campaign, home = load_campaign(tmp_path / "trial.yaml"), Home(tmp_path / "home").ensure()
    table = pa.table(
        {
            "id": [f"c{i}" for i in range(n)],
            "split": np.where(np.arange(n) % 5 == 0, "test", "train"),
            "fold": pa.array(np.arange(n) % 5, pa.int8()),
            "arm": np.where(treated, "mail", "none"),
            "x": x,
            "z": z,
            "converted": y,
        }
    )
    publish_table(table, home.lake("trial").file("training_set"))
    publish_table(table.select(["id", "x", "z"]), home.lake("trial").partition("features", "snapshot", "2024-01-01"))
    return campaign, home, x, z


def persuaded_by_x(x, z):
    return np.where(x > 0, 0.25, -0.05)


def anyway_by_z(x, z):
    return -1.5 + z


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A trial in which uplift is known to be the better ranking."""
    rng = np.random.default_rng(4)
    campaign, home, x, z = home_of(tmp_path_factory.mktemp("trial"), 12_000, persuaded_by_x, anyway_by_z, rng)
    return campaign, home, x, z, publish_uplift(campaign, home)


def test_uplift_is_switched_on_where_it_is_better(learnt):
    campaign, home, x, z, record = learnt
    assert read_decision(campaign, home) == record["decision"]["rank_by"] == "uplift"
    assert record["decision"]["difference"]["low"] > 0
    found = effects(campaign, home.lake("trial").partition("features", "snapshot", "2024-01-01"), home)
    effect, truth = found["effect"].to_numpy(), persuaded_by_x(x, z)
    assert np.corrcoef(effect, truth)[0, 1] > 0.8
    assert qini_of_effects(effect, truth) > 0.8 * qini_of_effects(truth, truth)
    for name in LEARNERS:
        assert record["rankings"][name]["qini"]["low"] > 0, name
    assert record["effect"]["value"] == pytest.approx(truth.mean(), abs=0.03), "4 standard errors, and clipping"
    assert record["calibration"]["slope"]["low"] < 1 < record["calibration"]["slope"]["high"] + 0.3
    policies = {name: p["profit_per_thousand"]["value"] for name, p in record["policies"].items()}
    assert policies["uplift"] > max(policies["all"], policies["nobody"], policies["propensity"])
    assert 0.4 < record["policies"]["uplift"]["treated"] < 0.65
    spread = error_of_sum(campaign, effect[:1000], home)
    assert abs(effect[:1000].sum() - truth[:1000].sum()) < 4 * spread


def test_the_page_says_what_to_do(learnt):
    campaign, home, _, _, record = learnt
    page = publish_uplift_page(campaign, record, home).read_text()
    assert describe_uplift(record).startswith("Choose by uplift: out of sample it finds better")
    for words in ("By tenth of the ranking", "What each policy is worth", "Were the arms comparable?", "<svg"):
        assert words in page


def test_models_that_were_tampered_with_are_refused(learnt, tmp_path):
    import shutil

    campaign, home, _, _, _ = learnt
    shutil.copytree(home.root, tmp_path / "home")
    copy = Home(tmp_path / "home")
    file = next((copy.candidates("trial") / "uplift").rglob("trees.txt"))
    file.write_text(file.read_text().replace("leaf_value=", "leaf_value=1", 1))
    with pytest.raises(SavedModelError, match="checksum differs"):
        effects(campaign, copy.lake("trial").partition("features", "snapshot", "2024-01-01"), copy)


def test_propensity_stays_where_the_effect_follows_it(tmp_path):
    campaign, home, _, _ = home_of(tmp_path, 6000, lambda x, z: 0.25 * expit(z), anyway_by_z, np.random.default_rng(5))
    record = publish_uplift(campaign, home)
    assert record["decision"]["rank_by"] == "propensity"
    assert "Choose by propensity" in describe_uplift(record)


def test_without_randomisation_nothing_is_learnt(tmp_path):
    rng = np.random.default_rng(6)

    def salesmen(x, z):
        return rng.random(len(z)) < expit(2 * z)

    campaign, home, _, _ = home_of(tmp_path, 5000, persuaded_by_x, anyway_by_z, rng, salesmen)
    with pytest.raises(DataContractError, match=r"not comparable: .*most of all z .*they were not drawn by lot"):
        publish_uplift(campaign, home)
    assert not (home.candidates("trial") / "uplift").exists()
    assert read_decision(campaign, home) == "propensity"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"arm": ["post"] * 3000}, ConfigError, r"treatment\.control: no row has 'none' in 'arm'; there are post"),
        ({"converted": [False] * 3000}, InsufficientDataError, "0 of the treated rows converted, 100 are needed"),
        ({"arm": None}, ConfigError, "there is no column 'arm' in the data"),
    ],
)
def test_what_cannot_be_learnt_from(tmp_path, changed, error, message):
    campaign, home, _, _ = home_of(tmp_path, 3000, persuaded_by_x, anyway_by_z, np.random.default_rng(7))
    file = home.lake("trial").file("training_set")
    table = pq.read_table(file)
    for name, values in changed.items():
        table = table.drop_columns(name)
        if values is not None:
            table = table.append_column(name, pa.array(values))
    publish_table(table, file)
    with pytest.raises(error, match=message):
        publish_uplift(campaign, home)


def test_a_campaign_without_a_treatment_has_no_uplift(tmp_path):
    (tmp_path / "trial.yaml").write_text(
        "\n".join(line for line in FILE.format(more="").splitlines() if not line.startswith("treatment"))
    )
    with pytest.raises(ConfigError, match="there is no 'treatment'"):
        publish_uplift(load_campaign(tmp_path / "trial.yaml"), Home(tmp_path))


def test_the_arm_is_no_feature_of_the_models(tmp_path):
    (tmp_path / "trial.yaml").write_text(FILE.format(more=""))
    assert load_campaign(tmp_path / "trial.yaml").protected == ("arm",)
    (tmp_path / "trial.yaml").write_text(FILE.format(more=", without: [orders]"))
    with pytest.raises(ConfigError, match=r"treatment\.without names event logs"):
        load_campaign(tmp_path / "trial.yaml")


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real data are not on this machine")
def test_hillstrom_decides_by_itself(tmp_path, monkeypatch):
    """On the real trial the two e-mails differ: uplift is the better ranking for one, propensity for the other."""
    import dagster as dg

    from propensity_dagster.components.campaign_folder import campaign_definitions
    from propensity_dagster.runtime import Runtime
    from propensity_dagster_tests.test_examples import ROOT

    monkeypatch.setenv("PROPENSITY_DATA", str(SHARED_DATA))
    decided = {}
    for name in ("hillstrom_womens", "hillstrom_mens"):
        campaign, runtime = load_campaign(ROOT / "examples" / f"{name}.yaml"), Runtime(Home(tmp_path / name).ensure())
        defs = dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": runtime}))
        tables = ["raw_decisions", "validated_decisions", "diagnosis", "training_set", "uplift"]
        job = dg.define_asset_job("learn", dg.AssetSelection.assets(*(dg.AssetKey([campaign.name, t]) for t in tables)))
        defs = dg.Definitions.merge(defs, dg.Definitions(jobs=[job]))
        with dg.DagsterInstance.ephemeral() as instance:
            assert defs.resolve_job_def("learn").execute_in_process(instance=instance).success
        decided[name] = read_decision(campaign, runtime.home)
    assert decided == {"hillstrom_womens": "uplift", "hillstrom_mens": "propensity"}
