"""The contact planner: equal to a whole-number programme over everybody, its bound a proof, its errors with numbers."""

from datetime import date, datetime

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.errors import ConfigError, DataContractError, PlanError
from propensity_dagster.evaluation import planner
from propensity_dagster.evaluation.planner import NOBODY, Channel, Limits, SegmentLimit, plan
from propensity_dagster.scoring.contacts import describe_plan, plan_contacts
from propensity_dagster_tests.conftest import shop_file

MARGIN = 22.5


def world(seed, n=300, channels=3):
    rng = np.random.default_rng(seed)
    probability = rng.beta(0.6, 8, n)
    costs = np.sort(rng.uniform(0.05, 2.5, channels))
    caps = [int(n * rng.uniform(0.05, 0.4)) if rng.random() < 0.5 else None for _ in range(channels)]
    ways = [Channel(f"c{i}", float(cost), cap) for i, (cost, cap) in enumerate(zip(costs, caps, strict=True))]
    allowed = rng.random((n, channels)) < 0.7
    segment = rng.integers(0, 3, n)
    segments = [
        SegmentLimit(
            f"s{k}", segment == k, minimum=int(rng.integers(0, n // 20)), maximum=int(rng.integers(n // 20, n))
        )
        for k in range(3)
    ]
    limits = Limits(int(n * rng.uniform(0.2, 0.9)), float(n * rng.uniform(0.05, 0.4)), segments)
    return probability, ways, limits, allowed


def exact(probability, ways, limits, allowed):
    """The optimum, by a programme with a variable for each customer and channel."""
    n, width = allowed.shape
    costs = np.array([c.cost for c in ways])
    value = (probability[:, None] * MARGIN - costs).ravel()
    every = np.ones(n * width)
    rows = [(every, 0, limits.capacity), (np.tile(costs, n), 0, limits.budget)]
    rows += [(np.tile(np.eye(width)[i], n), 0, c.capacity) for i, c in enumerate(ways) if c.capacity is not None]
    rows += [(np.repeat(s.members, width).astype(float), s.minimum, s.maximum) for s in limits.segments]
    rules = [LinearConstraint(row, low, high) for row, low, high in rows if high is not None]
    rules.append(LinearConstraint(sparse.csr_array(np.kron(np.eye(n), np.ones(width))), ub=1))
    bounds = Bounds(0, allowed.ravel().astype(float))
    found = milp(-value, constraints=rules, integrality=every, bounds=bounds, options={"mip_rel_gap": 1e-7})
    return None if found.x is None else -found.fun


def kept(found, ways, limits, allowed):
    chosen = found.channel != NOBODY
    assert allowed[np.flatnonzero(chosen), found.channel[chosen]].all(), "only as it is allowed"
    assert limits.capacity is None or found.contacted <= limits.capacity
    assert limits.budget is None or found.cost <= limits.budget + 1e-6
    for i, way in enumerate(ways):
        assert way.capacity is None or (found.channel == i).sum() <= way.capacity
    for segment in limits.segments:
        count = (chosen & segment.members).sum()
        assert count >= segment.minimum
        assert segment.maximum is None or count <= segment.maximum
    return True


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_is_the_optimum(seed):
    probability, ways, limits, allowed = world(seed)
    best = exact(probability, ways, limits, allowed)
    if best is None:
        with pytest.raises(PlanError):
            plan(probability, MARGIN, ways, limits, allowed)
        return
    found = plan(probability, MARGIN, ways, limits, allowed)
    assert kept(found, ways, limits, allowed)
    assert found.profit == pytest.approx(best, rel=1e-3)
    assert best <= found.bound + 1e-6, "the bound is one"
    assert found.profit <= best + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_runs_of_customers_find_what_each_alone_finds(seed, monkeypatch):
    """With few and long runs, so that they must be split again and again."""
    problem = world(seed, n=5_000)
    whole = plan(problem[0], MARGIN, *problem[1:])
    monkeypatch.setattr(planner, "_RUNS", 20)
    monkeypatch.setattr(planner, "_SPLIT", 3)
    by_runs = plan(problem[0], MARGIN, *problem[1:])
    assert kept(by_runs, *problem[1:])
    assert by_runs.bound == pytest.approx(whole.bound, rel=1e-9)
    assert by_runs.profit == pytest.approx(whole.profit, rel=1e-4)
    assert by_runs.gap < 1e-3


@pytest.mark.parametrize(
    "limits",
    [Limits(), Limits(capacity=40), Limits(budget=9.9), Limits(capacity=20, budget=50.0), Limits(capacity=10**9)],
)
def test_the_best_first_is_the_optimum_where_it_is_used(limits):
    rng = np.random.default_rng(1)
    probability = rng.beta(0.6, 8, 400)
    way = [Channel("mail", 0.4)]
    greedy = plan(probability, MARGIN, way, limits)
    # A segment of everybody without limits of its own changes nothing, but goes to the solver.
    forced = Limits(limits.capacity, limits.budget, [SegmentLimit("all", np.ones(400, bool), maximum=400)])
    solved = plan(probability, MARGIN, way, forced)
    assert greedy.profit == pytest.approx(solved.profit)
    assert greedy.contacted == solved.contacted
    for name, price in greedy.shadow_prices.items():
        assert price == pytest.approx(solved.shadow_prices[name], rel=0.05)


def test_shadow_prices_say_what_one_more_would_earn():
    probability, ways, _, allowed = world(3, n=4_000)
    limits = Limits(capacity=400, budget=150.0)
    found = plan(probability, MARGIN, ways, limits, allowed)
    more_people = plan(probability, MARGIN, ways, Limits(410, 150.0), allowed)
    more_money = plan(probability, MARGIN, ways, Limits(400, 155.0), allowed)
    for name, more, units in (("capacity", more_people, 10), ("budget", more_money, 5)):
        assert (more.profit - found.profit) / units == pytest.approx(found.shadow_prices.get(name, 0.0), rel=0.05)


def test_nobody_is_contacted_below_break_even():
    found = plan(np.array([0.5, 0.01]), 1.0, [Channel("mail", 0.6)], Limits(capacity=10))
    assert (found.contacted, found.profit, found.cost) == (0, 0.0, 0.0)
    assert plan(np.empty(0), 1.0, [Channel("mail", 0.6)], Limits(capacity=10)).contacted == 0
    nobody = SegmentLimit("DE", np.empty(0, bool), maximum=3)
    assert plan(np.empty(0), 1.0, [Channel("mail", 0.6)], Limits(segments=[nobody])).contacted == 0
    two = SegmentLimit("DE", np.ones(2, bool), maximum=1)
    assert plan(np.ones(2), 1.0, [Channel("mail", 0.6)], Limits(segments=[two]), np.zeros((2, 1), bool)).contacted == 0
    assert plan(np.array([0.9]), 1.0, [Channel("mail", 0.1)], Limits(capacity=1), np.array([[False]])).contacted == 0


def test_what_earns_the_same_under_the_same_prices_would_be_chosen():
    """Held customers take nothing of the limits, and are chosen at the prices that the others paid."""
    rng = np.random.default_rng(2)
    probability = rng.beta(0.6, 8, 20_000)
    held = rng.random(20_000) < 0.1
    found = plan(probability, MARGIN, [Channel("mail", 0.4)], Limits(capacity=2_000), held=held)
    assert (found.channel[~held] != NOBODY).sum() == 2_000
    threshold = probability[~held & (found.channel != NOBODY)].min()
    assert np.array_equal(found.channel[held] != NOBODY, probability[held] > threshold)
    assert found.cost == pytest.approx(2_000 * 0.4)


S = np.array([True, True, False])
IMPOSSIBLE = [
    (Limits(segments=[SegmentLimit("DE", S, minimum=3)]), r"minimum of DE: 3 contacts wanted, but only 2"),
    (Limits(segments=[SegmentLimit("DE", S, minimum=2, maximum=1)]), r"DE: the maximum 1 is below the minimum 2"),
    (Limits(capacity=1, segments=[SegmentLimit("DE", S, minimum=2)]), r"2 contacts is more than the capacity of 1"),
    (Limits(budget=0.5, segments=[SegmentLimit("DE", S, minimum=2)]), r"costs at least 0\.80, the budget is 0\.50"),
    (
        Limits(capacity=2, segments=[SegmentLimit("DE", S, minimum=2), SegmentLimit("FR", ~S, minimum=1)]),
        r"no plan keeps all limits together: capacity, minimum of DE, minimum of FR",
    ),
]


@pytest.mark.parametrize(("limits", "message"), IMPOSSIBLE)
def test_limits_that_contradict_each_other_are_named(limits, message):
    with pytest.raises(PlanError, match=message):
        plan(np.array([0.9, 0.8, 0.7]), MARGIN, [Channel("mail", 0.4)], limits)


DAY, NOW = date(2024, 6, 1), datetime(2024, 6, 2)


def planned(campaign, home, day=DAY, **limits):
    with open_engine() as engine:
        return plan_contacts(campaign, day, home, engine, NOW, **limits)


def contacts(tmp_path, probability, country=None, **sections):
    """A campaign with these sections, and a home with one scored snapshot; features are in another order."""
    sections = {"holdout": {"fraction": 1e-9}, **sections}  # nobody, of so few
    campaign, home = load_campaign(shop_file(tmp_path, **sections)), Home(tmp_path / "home").ensure()
    keys = [f"c{i}" for i in range(len(probability))]
    lake = home.lake(campaign.name)
    publish_table(
        pa.table(
            {
                "customer_id": keys,
                "probability": pa.array(probability, pa.float64()),
                "decile": pa.array(np.arange(len(keys)) % 10 + 1, pa.int8()),
                "model_version": ["1"] * len(keys),
            }
        ),
        lake.partition("scores", "snapshot", DAY),
    )
    country = country or ["DE"] * len(keys)
    publish_table(
        pa.table({"customer_id": keys[::-1], "country": pa.array(country[::-1], pa.string())}),
        lake.partition("features", "snapshot", DAY),
    )
    return campaign, home


def test_whom_to_contact(tmp_path):
    probability = [0.5, 0.02, 0.3, 0.01, 0.1]
    campaign, home = contacts(tmp_path, probability, value={"margin_per_conversion": 10, "cost_per_contact": 1})
    found = planned(campaign, home)
    assert (found.above_break_even, found.contacted, found.cost) == (2, 2, 2.0)  # 0.1 x 10 only pays its cost
    assert found.expected_profit.value == pytest.approx(0.8 * 10 - 2)
    assert found.expected_profit.low < found.expected_profit.value < found.expected_profit.high
    assert found.profit_of_contacting_all == pytest.approx(9.3 - 5)
    assert found.profit_of_random == pytest.approx(2 * 0.186 * 10 - 2)
    assert planned(campaign, home, capacity=1).contacted == 1
    assert planned(campaign, home, budget=1.5).contacted == 1
    with pytest.raises(PlanError, match="capacity must be at most 5, the number of customers there are, got 6"):
        planned(campaign, home, capacity=6)
    assert planned(campaign, home, capacity=0).contacted == 0
    with pytest.raises(DataContractError, match="scores snapshot=2024-06-02 has not been materialized"):
        planned(campaign, home, date(2024, 6, 2))


@pytest.mark.parametrize(
    "value", [{"margin_per_conversion": 1, "cost_per_contact": 2}, {"margin_per_conversion": 0, "cost_per_contact": 1}]
)
def test_costs_above_margins_contact_nobody_and_say_so(tmp_path, value):
    campaign, home = contacts(tmp_path, [0.5, 0.2], value=value)
    found = planned(campaign, home)
    assert (found.contacted, found.expected_profit.value) == (0, 0)
    assert "nobody of 2 is worth a contact" in describe_plan(campaign, found)


def test_channels_and_segments_of_the_campaign(tmp_path):
    stated = {
        "channels": {"email": 0.1, "phone": {"cost": 2.0, "capacity": 1}},
        "limits": [
            {"segment": "country", "value": "FR", "minimum": 1},
            {"segment": "country", "value": "DE", "maximum": 1},
        ],
    }
    value = {"margin_per_conversion": 10, "cost_per_contact": 1}
    campaign, home = contacts(
        tmp_path, [0.5, 0.4, 0.001, 0.0005], ["DE", "DE", "FR", "FR"], value=value, contacts=stated
    )
    found = planned(campaign, home)
    assert (found.contacted, found.by_channel) == (2, {"email": 2, "phone": 0})
    assert found.expected_conversions.value == pytest.approx(0.501)
    assert found.shadow_prices["minimum of country FR"] == pytest.approx(0.09)
    assert found.shadow_prices["maximum of country DE"] == pytest.approx(3.9)
    campaign = load_campaign(
        shop_file(tmp_path, contacts={"limits": [{"segment": "country", "value": "XX", "minimum": 1}]})
    )
    with pytest.raises(PlanError, match="minimum of country XX: 1 contacts wanted, but only 0"):
        planned(campaign, home)
    campaign = load_campaign(
        shop_file(tmp_path, contacts={"limits": [{"segment": "country", "value": "XX", "maximum": 1}]})
    )
    assert "limit of country XX: no customer has this value; there are DE, FR" in planned(campaign, home).notes
    with pytest.raises(ConfigError, match=r"contacts\.limits: 'planet' is not declared"):
        load_campaign(shop_file(tmp_path, contacts={"limits": [{"segment": "planet", "value": "x"}]}))
    with pytest.raises(ConfigError, match=r"contacts\.channels\.email\.cost"):
        load_campaign(shop_file(tmp_path, contacts={"channels": {"email": -1}}))
