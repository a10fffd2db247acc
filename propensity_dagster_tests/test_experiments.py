"""Experiments: assignment by lot, intervals that hold, and a readout that refuses what it cannot tell."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import chi2_contingency, chisquare, norm

from propensity_dagster.campaign_sections import Experiment
from propensity_dagster.errors import ConfigError, DataContractError, InsufficientDataError
from propensity_dagster.evaluation.splits import hash_fractions
from propensity_dagster.experiments.assignment import assign
from propensity_dagster.experiments.earned import Compared, earned_of, effect, first_windows
from propensity_dagster.experiments.power import power
from propensity_dagster.experiments.readout import read_out, sample_ratio, shrink
from propensity_dagster.experiments.sequential import always_valid_factor

pytestmark = pytest.mark.usefixtures("little_to_collect")

STARTS = {"starts": "2024-06-01", "ends": "2024-07-01"}


def experiment(**stated):
    return Experiment.model_validate({"units": "scored", "variants": {"control": 0.5, "new": 0.5}, **STARTS, **stated})


def test_assignment_is_uniform_and_independent_over_many_salts():
    keys = [str(i) for i in range(2000)]
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    uneven = dependent = 0
    before = None
    for salt in range(300):
        variants = assign(f"e{salt}", experiment(variants=shares), keys)
        counts = np.array([(variants == name).sum() for name in shares])
        uneven += chisquare(counts, 2000 * np.array(list(shares.values()))).pvalue < 0.05
        if before is not None:
            table = np.array([[np.sum((before == a) & (variants == b)) for b in shares] for a in shares])
            dependent += chi2_contingency(table).pvalue < 0.05
        before = variants
    # Of 300 tests at 0.05 fifteen fail by chance; more than 27 in one of 1,000 runs.
    assert uneven <= 27
    assert dependent <= 27


def test_assignment_never_changes_and_a_larger_share_moves_only_whom_it_must():
    keys = [f"c{i}" for i in range(5000)]
    first = assign("e", experiment(), keys)
    assert np.array_equal(first, assign("e", experiment(), keys))
    assert np.array_equal(first[::-1], assign("e", experiment(), keys[::-1]))
    assert not np.array_equal(first, assign("f", experiment(), keys))
    assert np.array_equal(first, assign("f", experiment(salt="e"), keys))
    more = assign("e", experiment(variants={"control": 0.6, "new": 0.4}), keys)
    assert set(first[more == "control"]) == {"control", "new"}
    assert set(more[first == "control"]) == {"control"}
    assert hash_fractions(["c1"], "experiment:e")[0] == pytest.approx(0.7930210, abs=1e-6), "the same in every year"


def peeked(rng, tests, days, daily, rates, alpha, planned):
    """Over many simulated tests with a look every day: share that ever excludes 0, and that ever excludes the truth."""
    shape = (tests, days, 2)
    n = np.cumsum(np.full(shape, daily), axis=1)
    hits = np.cumsum(rng.binomial(daily, np.broadcast_to(rates, shape)), axis=1)
    p = hits / n
    difference = p[..., 1] - p[..., 0]
    error = np.sqrt((p * (1 - p) / n).sum(axis=-1))
    half = always_valid_factor(n.sum(axis=-1), planned, alpha) * error
    ready = hits.min(axis=-1) >= 10
    claimed = (ready & (np.abs(difference) > half)).any(axis=1)
    missed = (ready & (np.abs(difference - (rates[1] - rates[0])) > half)).any(axis=1)
    fixed = (ready & (np.abs(difference) > norm.ppf(1 - alpha / 2) * error)).any(axis=1)
    return claimed.mean(), missed.mean(), fixed.mean(), (np.abs(difference) > half)[:, -1].mean()


@pytest.mark.parametrize(("rate", "daily"), [(0.05, 200), (0.01, 500), (0.3, 50)])
def test_peeking_at_every_day_of_2000_tests_of_nothing_gives_at_most_5_percent_false_alarms(rate, daily):
    rng = np.random.default_rng(daily)
    claimed, _, fixed, _ = peeked(rng, 2000, 60, daily, (rate, rate), 0.05, 60 * daily)
    assert claimed <= 0.05
    assert fixed > 0.15, "ordinary intervals, looked at as often, cry wolf: the test can tell"


def test_true_effects_are_found_with_the_stated_power_and_never_missed_too_often():
    stated = power(0.05, 0.05 * 0.95, effect=0.2, share=0.5, planned=20_000, treated=0.06 * 0.94)
    days, daily = 40, -(-stated.units_peeking // 80)
    rng = np.random.default_rng(1)
    claimed, missed, _, at_the_end = peeked(rng, 2000, days, daily, (0.05, 0.06), 0.05, 20_000)
    assert at_the_end == pytest.approx(0.8, abs=0.04), "the power that was stated, with always-valid intervals"
    assert claimed >= at_the_end
    assert missed <= 0.05


def test_power_once():
    stated = power(0.05, 0.05 * 0.95, effect=0.1, share=0.5, daily=1000)
    from statsmodels.stats.power import NormalIndPower

    effect_size = 0.005 / np.sqrt(0.05 * 0.95)
    peer = 2 * NormalIndPower().solve_power(effect_size, alpha=0.05, power=0.8)
    assert stated.units == pytest.approx(peer, rel=1e-3)
    assert stated.days == -(-stated.units // 1000)
    assert stated.units_peeking > 1.5 * stated.units
    adjusted = power(0.05, 0.05 * 0.95, effect=0.1, share=0.5, explained=0.3)
    assert adjusted.units == pytest.approx(0.7 * stated.units, rel=1e-3)
    assert power(0.05, 0.05 * 0.95, stated.effect, 0.5).units == pytest.approx(10_000, abs=2)
    wrongs = [{"mean": 0}, {"variance": 0}, {"share": 1}, {"effect": 0}, {"explained": 1}]
    for wrong in [*wrongs, {"alpha": 0}, {"power": 1}, {"treated": -0.2}]:
        with pytest.raises(ConfigError, match=r"must (be|have|lie)"):
            power(**{"mean": 0.1, "variance": 0.09, "effect": 0.1, "share": 0.5, **wrong})


def units_of(rng, n, lift=0.0, shares=(0.5, 0.5), names=("control", "new"), segments=False):
    variant = rng.choice(names, n, p=shares)
    score = rng.beta(1, 12, n)
    p = np.clip(score * np.where(variant == names[0], 1, 1 + lift), 0, 1)
    visits = rng.poisson(3, n) + 1.0
    columns = {
        "variant": variant,
        "conversion": (rng.random(n) < p).astype(float),
        "revenue": np.where(rng.random(n) < p, rng.lognormal(3, 0.5, n), 0.0),
        "clicks": rng.binomial(visits.astype(int), 0.2 * (1 + lift * (variant != names[0]))).astype(float),
        "clicks__per": visits,
        "covariate": score,
    }
    if segments:
        columns["segment__country"] = rng.choice(["DE", "FR", "IT", "ES", "PL"], n)
    return pa.table(columns)


METRICS = {"revenue": "orders.amount", "clicks": {"sum": "emails.click", "per": "emails.sent"}}


def test_intervals_hold_at_their_level():
    """Of 200 a nominal 95% covers 190; 183 to 197 in all but one of 100 runs."""
    rng = np.random.default_rng(0)
    stated = experiment(metrics=METRICS)
    truth = {"conversion": 0.2, "revenue": 0.2, "clicks": 0.2}
    hits = dict.fromkeys(truth, 0)
    always = dict.fromkeys(truth, 0)
    for _ in range(200):
        found = read_out(stated, units_of(rng, 4000, 0.2), covariate=True)
        for name, true in truth.items():
            row = found["metrics"][name]["variants"]["new"]
            hits[name] += row["lift"]["low"] <= true <= row["lift"]["high"]
            always[name] += row["lift_always"]["low"] <= true <= row["lift_always"]["high"]
    for name in truth:
        assert 183 <= hits[name] <= 197, name
        assert always[name] >= 196, name


def test_the_covariate_narrows_the_interval():
    rng = np.random.default_rng(2)
    table = units_of(rng, 30_000, 0.1)
    narrow, wide = (read_out(experiment(), table, covariate=c)["metrics"]["conversion"] for c in (True, False))

    def width(found):
        lift = found["variants"]["new"]["difference"]
        return lift["high"] - lift["low"]

    explained = np.corrcoef(table["covariate"], table["conversion"])[0, 1] ** 2
    assert width(narrow) == pytest.approx(width(wide) * np.sqrt(1 - explained), rel=0.02)


def test_a_wrong_sample_ratio_comes_first_and_blocks():
    rng = np.random.default_rng(3)
    found = read_out(experiment(), units_of(rng, 20_000, 0.5, shares=(0.53, 0.47)), covariate=True)
    assert found["srm"]["p_value"] < 0.001
    assert found["recommendation"]["answer"] == "invalid"
    assert "metrics" not in found, "no effect is shown"
    wrong = sum(
        not sample_ratio(experiment(), {"control": k, "new": 10_000 - k})["passed"]
        for k in rng.binomial(10_000, 0.5, 4000).tolist()
    )
    assert wrong <= 14, "0.1% of 4,000 are 4; more than 14 in one of 10,000 runs"


@pytest.mark.parametrize(
    ("lift", "n", "answer"),
    [(0.4, 60_000, "yes"), (-0.4, 60_000, "no"), (0.0, 400_000, "no"), (0.05, 4000, "wait")],
)
def test_what_to_do(lift, n, answer):
    found = read_out(experiment(minimum_effect=0.1), units_of(np.random.default_rng(4), n, lift), covariate=True)
    words = found["recommendation"]
    assert words["answer"] == answer
    assert words["happened"].startswith("With new ")
    assert "if this is the only look" in words["sure"]


def test_a_guardrail_that_breaks_stops_a_roll_out():
    rng = np.random.default_rng(5)
    table = units_of(rng, 60_000, 0.4)
    worse = table["clicks"].to_numpy() * np.where(np.array(table["variant"].to_pylist()) == "new", 0.6, 1.0)
    table = table.set_column(table.column_names.index("clicks"), "clicks", pa.array(worse))
    stated = experiment(metrics={"clicks": METRICS["clicks"]}, guardrails=["clicks"])
    words = read_out(stated, table, covariate=True)["recommendation"]
    assert words["answer"] == "no"
    assert "clicks became worse (-" in words["do"]


def test_several_variants_and_metrics_are_corrected_together():
    """200 experiments of nothing with three variants and three metrics: at most 5% claim anything, and a bit."""
    rng = np.random.default_rng(6)
    names, shares = ("control", "one", "two", "three"), (0.25, 0.25, 0.25, 0.25)
    stated = experiment(variants=dict(zip(names, shares, strict=True)), metrics=METRICS)
    claims = naive = 0
    for _ in range(200):
        found = read_out(stated, units_of(rng, 4000, 0.0, shares, names), covariate=False)
        rows = [row for metric in found["metrics"].values() for row in metric["variants"].values()]
        claims += any(row["p_adjusted"] <= 0.05 for row in rows)
        naive += any(row["p_value"] <= 0.05 for row in rows)
    assert claims <= 19, "5% of 200 are 10; more than 19 in one of 300 runs"
    assert naive > 40


def test_segments_are_shrunk_to_what_they_differ_beyond_chance():
    rng = np.random.default_rng(7)
    table = units_of(rng, 40_000, 0.2, segments=True)
    found = read_out(experiment(), table, covariate=True)
    rows = found["segments"]
    assert [row["value"] for row in rows] == ["DE", "ES", "FR", "IT", "PL"]
    raw, shrunk = np.std([r["difference"] for r in rows]), np.std([r["shrunk"]["value"] for r in rows])
    assert shrunk < 0.7 * raw
    # Where effects truly differ, they are left apart, and closer to the truth than the raw ones.
    truth = rng.normal(0.01, 0.01, 40)
    error = np.full(40, 0.01)
    better = 0
    covered = []
    for _ in range(200):
        seen = truth + rng.normal(0, error)
        middle, spread = shrink(seen, error)
        better += np.mean((middle - truth) ** 2) < np.mean((seen - truth) ** 2)
        covered += (np.abs(middle - truth) < 1.96 * spread).tolist()
    assert better >= 190
    assert 0.92 <= np.mean(covered) <= 0.98


BAD = [
    (
        {"variant": ["old"] * 400 + ["new"] * 400},
        DataContractError,
        "units have the variant 'old', which the experiment",
    ),
    ({"variant": ["control"] * 50 + ["new"] * 55}, InsufficientDataError, "'control' has 50 measured units, 100 are"),
    ({"conversion": [0.0] * 800}, InsufficientDataError, "the primary metric 'conversion' is 0 for nearly all of 800"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_what_cannot_be_read_out(changed, error, message):
    n = len(next(iter(changed.values())))
    table = units_of(np.random.default_rng(8), n)
    if "variant" not in changed:
        changed = {**changed, "variant": ["control", "new"] * (n // 2)}
    for name, values in changed.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    with pytest.raises(error, match=message):
        read_out(experiment(), table, covariate=False)


def test_a_metric_that_is_all_zero_is_not_compared():
    table = units_of(np.random.default_rng(9), 4000, 0.2)
    table = table.set_column(table.column_names.index("revenue"), "revenue", pa.array(np.zeros(4000)))
    assert read_out(experiment(metrics=METRICS), table, covariate=False)["metrics"]["revenue"] is None


WRONG = [
    ({"variants": {"a": 0.5}}, "variants must be two or more whose shares sum to 1"),
    ({"variants": {"a": 0.5, "b": 0.6}}, "variants must be two or more whose shares sum to 1"),
    ({"starts": "2024-08-01"}, "ends must be after starts"),
    ({"primary": "revenue"}, "'revenue' is not declared; declared are conversion"),
    ({"guardrails": ["conversion"]}, "'conversion' is the primary metric"),
    ({"metrics": {"conversion": "orders.count"}}, "is the campaign's own outcome"),
]


@pytest.mark.parametrize(("stated", "message"), WRONG)
def test_what_an_experiment_may_not_say(stated, message):
    with pytest.raises(ValueError, match=message):
        experiment(**stated)


# What contacts earned


def contacts_of(rng, customers, snapshots, truth, share=0.2):
    """Contacts and holdout of several snapshots; `truth` (customers, 2): probability if held and if contacted."""
    held = rng.random(customers) < share
    entity = np.tile(np.arange(customers), snapshots)
    p = truth[entity, 0] + truth[entity, 1] * 0.5
    treated = ~held[entity]
    y = (rng.random(len(entity)) < np.where(treated, truth[entity, 1], truth[entity, 0])).astype(float)
    return Compared(y, treated, p, entity, np.full(len(entity), 0.5))


def test_what_was_earned_is_covered_by_its_interval():
    """200 seeds, customers who are alike over the snapshots: without clusters the interval would be too narrow."""
    rng = np.random.default_rng(0)
    base = rng.beta(0.5, 5, 4000)
    truth = np.column_stack([base, np.clip(base + 0.03, 0, 1)])
    hits = profits = 0
    for seed in range(200):
        rows = contacts_of(np.random.default_rng(seed), 4000, 3, truth)
        found = earned_of(rows, margin=20.0)
        true = float((truth[:, 1] - truth[:, 0]).mean())
        hits += found["effect"]["low"] <= true <= found["effect"]["high"]
        contacts = rows.entity[rows.treated]
        profit = (truth[contacts, 1] - truth[contacts, 0]).sum() * 20 - found["cost"]
        profits += found["incremental_profit"]["low"] <= profit <= found["incremental_profit"]["high"]
    assert 186 <= hits <= 198
    assert 186 <= profits <= 198


def test_sure_things_earn_nothing():
    rng = np.random.default_rng(1)
    base = rng.beta(2, 2, 6000)
    found = earned_of(contacts_of(rng, 6000, 1, np.column_stack([base, base])), margin=20.0)
    assert found["expected"] > 2000
    low, high = found["incremental_conversions"]["low"], found["incremental_conversions"]["high"]
    assert low < 0 < high
    assert found["incremental_profit"]["value"] < found["expected"] * 20 / 5
    assert found["cost"] == pytest.approx(0.5 * found["contacts"])


def test_a_conversion_counts_once_though_the_windows_overlap():
    """1,000 contacts and 100 held on five nights; half of the contacted buy once: 500, not 2,500."""
    entity = np.tile(np.arange(1100), 5)
    treated = entity < 1000
    rng = np.random.default_rng(3)
    bought = np.concatenate([rng.random(1000) < 0.5, rng.random(100) < 0.2])
    rows = Compared(bought[entity].astype(float), treated, np.full(5500, 0.4), entity, np.ones(5500))
    day = np.repeat(np.arange(5), 1100)
    found = earned_of(rows, 20.0, first_windows(entity, day, 30))
    assert (found["contacts"], found["measured"], found["cost"]) == (5000, 1000, 5000.0)
    effect_ = bought[:1000].mean() - bought[1000:].mean()
    assert found["incremental_conversions"]["value"] == pytest.approx(1000 * effect_)
    assert found["incremental_profit"]["value"] == pytest.approx(20_000 * effect_ - 5000)
    assert first_windows(np.zeros(5, dtype=int), np.array([0, 10, 30, 45, 60]), 30).tolist() == [1, 0, 1, 0, 1]


def test_few_conversions_of_the_held_say_nothing():
    rng = np.random.default_rng(4)
    rows = contacts_of(rng, 3000, 1, np.full((3000, 2), 0.01), share=0.05)
    assert rows.y[~rows.treated].sum() < 10
    assert earned_of(rows, 20.0)["effect"] is None


def test_no_effect_is_ruled_out_by_looking_often():
    """With a true effect of the minimum, it may not be ruled out just because of the many looks: 60 tests, 10 looks."""
    rng = np.random.default_rng(5)
    ruled_out = 0
    stated = experiment(minimum_effect=0.2)
    for _ in range(60):
        table = units_of(rng, 10_000, 0.2)
        ruled_out += any(
            "is ruled out" in read_out(stated, table.slice(0, n), covariate=False)["recommendation"]["do"]
            for n in range(1000, 10_001, 1000)
        )
    assert ruled_out <= 3


def test_too_few_held_say_nothing():
    rng = np.random.default_rng(2)
    rows = contacts_of(rng, 200, 1, np.full((200, 2), 0.3), share=0.05)
    assert effect(rows) is None
    assert earned_of(rows, 20.0)["incremental_profit"] is None
