"""Proof on data with known answers: the true effect of an appeal on each contact of the synthetic campaign_response."""

from datetime import date

import numpy as np
import pyarrow as pa
import pytest

from propensity_dagster.campaign import SHIPPED, EventCampaign, load_campaign
from propensity_dagster.campaign_sections import Experiment
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.evaluation.planner import Channel, Limits, SegmentLimit, plan
from propensity_dagster.evaluation.uplift import qini_of_effects
from propensity_dagster.experiments.assignment import assign
from propensity_dagster.experiments.earned import Compared, earned_of
from propensity_dagster.experiments.holdout import hold_out
from propensity_dagster.experiments.readout import read_out
from propensity_dagster.experiments.uplift import effects, publish_uplift
from propensity_dagster.models.dataset import read_split
from propensity_dagster.synthetic import open_world
from propensity_dagster_tests.conftest import shop_file
from propensity_dagster_tests.pipeline import run_pipeline
from propensity_dagster_tests.test_planner import exact

SEEDS = 200

pytestmark = pytest.mark.usefixtures("little_to_collect")


@pytest.fixture(scope="module")
def contacts(tmp_path_factory):
    """Keys, probability of a response within 30 days with appeals and without, of those who are there."""
    world = open_world("synthetic://outreach?customers=20000&days=90", tmp_path_factory.mktemp("worlds"))
    world.ensure()
    keys, treated, control = world.true_effect(date(2024, 3, 1), 30)
    there = treated + control > 0
    return keys[there].tolist(), treated[there], control[there]


def test_intervals_of_an_experiment_cover_the_true_effect(contacts):
    """95% intervals of 200 assignments by our own hash: 93 to 97% hold the mean of the true effects."""
    keys, treated, control = contacts
    truth = float((treated - control).mean())
    stated = {
        "units": "scored",
        "variants": {"control": 0.5, "treated": 0.5},
        "starts": "2024-03-01",
        "ends": "2024-03-02",
    }
    hits = always = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        experiment = Experiment.model_validate({**stated, "salt": f"s{seed}"})
        arm = assign("known", experiment, keys)
        y = (rng.random(len(keys)) < np.where(arm == "treated", treated, control)).astype(float)
        table = pa.table({"variant": pa.array(arm, pa.string()), "conversion": y, "covariate": control})
        row = read_out(experiment, table, covariate=True)["metrics"]["conversion"]["variants"]["treated"]
        hits += row["difference"]["low"] <= truth <= row["difference"]["high"]
        always += row["difference_always"]["low"] <= truth <= row["difference_always"]["high"]
    assert 0.93 * SEEDS <= hits <= 0.97 * SEEDS
    assert always >= hits


def test_what_was_earned_covers_the_true_money(contacts):
    """Contacts to those above break-even, a fifth of them held, three snapshots: 93 to 97% hold the true profit."""
    _, treated, control = contacts
    chosen = np.flatnonzero(treated * 27 > 0.65)
    hits = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        held = rng.random(len(chosen)) < 0.2
        who = np.tile(np.arange(len(chosen)), 3)
        p1, p0 = treated[chosen][who], control[chosen][who]
        y = (rng.random(len(who)) < np.where(held[who], p0, p1)).astype(float)
        found = earned_of(Compared(y, ~held[who], p1, who, np.full(len(who), 0.65)), margin=27.0)
        contacted = ~held[who]
        profit = (p1 - p0)[contacted].sum() * 27 - 0.65 * contacted.sum()
        hits += found["incremental_profit"]["low"] <= profit <= found["incremental_profit"]["high"]
    assert 0.93 * SEEDS <= hits <= 0.97 * SEEDS


def test_the_plan_earns_what_the_exact_optimum_does(contacts):
    """Three channels, a budget, a capacity and a limit on a segment, on 2,000 contacts and their true probabilities."""
    _, treated, _ = contacts
    p = treated[:2000]
    ways = [Channel("email", 0.1, 300), Channel("letter", 0.65), Channel("phone", 2.0, 50)]
    limits = Limits(
        capacity=400, budget=120.0, segments=[SegmentLimit("first", np.arange(2000) < 500, minimum=40, maximum=90)]
    )
    allowed = np.random.default_rng(0).random((2000, 3)) < [0.6, 0.9, 0.3]
    found = plan(p, 22.5, ways, limits, allowed)
    best = exact(p, ways, limits, allowed)
    assert found.profit >= 0.99 * best
    assert found.profit <= best + 1e-6
    assert found.bound >= best - 1e-6


def test_the_holdout_is_balanced(contacts, tmp_path):
    """On the true probabilities and effects: closer than a plain draw of the same size is, over 50 campaigns."""
    keys, treated, control = contacts
    decile = (10 * np.argsort(np.argsort(-treated)) // len(treated)).astype(str).astype(object)
    home = Home(tmp_path / "home").ensure()
    off, plain = [], []
    for i in range(50):
        campaign = load_campaign(shop_file(tmp_path, name=f"c{i}", holdout={"fraction": 0.05}))
        held = hold_out(campaign, date(2024, 3, 1), pa.array(keys), decile, home, keep=False)
        assert abs(held.sum() - 0.05 * len(keys)) <= 10, "exact in each tenth but for one"
        off.append(treated[held].mean() - treated[~held].mean())
        drawn = np.random.default_rng(i).random(len(keys)) < 0.05
        plain.append(treated[drawn].mean() - treated[~drawn].mean())
    assert np.std(off) < 0.7 * np.std(plain)
    assert abs(np.mean(off)) < 4 * np.std(off) / np.sqrt(50)
    assert abs((treated - control)[held].mean() - (treated - control)[~held].mean()) < 0.01


def test_uplift_ranks_nearly_as_the_true_effects_do(tmp_path):
    """The shipped campaign as it is: out of sample, at least 80% of the Qini that the true effects themselves have.

    The logs do not tell everything: LightGBM that learns from the true effects instead of responses has 89%.
    """
    campaign, home = load_campaign(SHIPPED / "campaign_response.yaml"), Home(tmp_path).ensure()
    assert isinstance(campaign, EventCampaign)
    with open_engine() as engine:
        run_pipeline(campaign, home, engine)
    record = publish_uplift(campaign, home)
    assert record["decision"]["rank_by"] == "uplift"
    world = open_world(campaign.source.connection, home.synthetic)
    rows = read_split(home.lake(campaign.name).existing("training_set"), "test")
    publish_table(rows, tmp_path / "test.parquet")
    estimated = effects(campaign, tmp_path / "test.parquet", home)["effect"].to_numpy()
    keys, snapshots = rows[campaign.key].to_pylist(), rows["snapshot"].to_pylist()
    true = {day: world.true_effect(day.date(), campaign.outcome.horizon_days) for day in set(snapshots)}
    effect_of = {day: dict(zip(k.tolist(), t - c, strict=True)) for day, (k, t, c) in true.items()}
    effect = np.array([effect_of[day][key] for day, key in zip(snapshots, keys, strict=True)])
    assert qini_of_effects(estimated, effect) > 0.8 * qini_of_effects(effect, effect)
