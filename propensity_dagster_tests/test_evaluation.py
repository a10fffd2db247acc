"""Metrics against scikit-learn, the bootstrap, splits, the gate and the money."""

import itertools
from datetime import date, timedelta

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from propensity_dagster.campaign import SHIPPED, load_campaign
from propensity_dagster.campaign_sections import Gate
from propensity_dagster.errors import InsufficientDataError, LeakageError
from propensity_dagster.evaluation.bootstrap import entity_weights, estimate, replicate_metrics
from propensity_dagster.evaluation.evaluate import TestScores, evaluate
from propensity_dagster.evaluation.gate import decide
from propensity_dagster.evaluation.metrics import METRICS, Judged, Weighted, gains
from propensity_dagster.evaluation.splits import plan_splits, require_out_of_time
from propensity_dagster.reports.model_card import card_markdown, model_card

CAMPAIGN = load_campaign(SHIPPED / "ecommerce_purchase.yaml")
ONES = np.ones((1, 500))


def sample(seed: int, n: int = 500, ties: bool = False):
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 1.5, n)
    if ties:
        z = np.round(z)
    y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
    y[:2] = [0, 1]
    return z, y


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_metrics_equal_scikit_learn(seed, ties):
    z, y = sample(seed, ties=ties)
    p = 1 / (1 + np.exp(-z))
    whole = Weighted(Judged(z, y), ONES)
    assert METRICS["log_loss"](whole)[0] == pytest.approx(sk.log_loss(y, p))
    assert METRICS["brier"](whole)[0] == pytest.approx(sk.brier_score_loss(y, p))
    assert METRICS["auc"](whole)[0] == pytest.approx(sk.roc_auc_score(y, z))
    assert METRICS["average_precision"](whole)[0] == pytest.approx(sk.average_precision_score(y, z))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_a_weight_is_a_repetition(seed, ties):
    """Weighting a row by 3 gives what three copies of it give: the bootstrap relies on it."""
    z, y = sample(seed, 200, ties)
    counts = np.random.default_rng(seed).integers(0, 4, 200)
    counts[:2] = 1
    repeated = Judged(np.repeat(z, counts), np.repeat(y, counts))
    weighted = Weighted(Judged(z, y), counts[None, :].astype(float))
    copies = Weighted(repeated, np.ones((1, counts.sum())))
    for name in ("log_loss", "brier", "auc", "average_precision", "top_decile_lift"):
        assert METRICS[name](weighted)[0] == pytest.approx(METRICS[name](copies)[0]), name


def test_gains_spread_ties_evenly():
    judged = Weighted(Judged(np.zeros(10), np.array([1.0] * 4 + [0.0] * 6)), np.ones((1, 10)))
    assert gains(judged, np.array([0.1, 0.5, 1.0]))[0] == pytest.approx([0.1, 0.5, 1.0])
    perfect = Weighted(Judged(np.arange(10.0)[::-1], np.array([1.0] * 2 + [0.0] * 8)), np.ones((1, 10)))
    assert gains(perfect, np.array([0.1, 0.2, 0.3]))[0] == pytest.approx([0.5, 1.0, 1.0])


def test_brier_decomposition_adds_up_for_binned_forecasts():
    z, y = sample(3, ties=True)
    whole = Weighted(Judged(z, y), ONES)
    rel, res, unc = (METRICS[f"brier_{part}"](whole)[0] for part in ("reliability", "resolution", "uncertainty"))
    # Bins keep ties together; what is left is the variance within a bin of several forecasts.
    assert METRICS["brier"](whole)[0] == pytest.approx(rel - res + unc, abs=0.01)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (0.4, 1.0), (-0.3, 0.6), (0.0, 1.5)])
def test_calibration_slope_and_intercept(a, b):
    rng = np.random.default_rng(1)
    z = rng.normal(-1, 1, 100_000)
    y = (rng.random(len(z)) < 1 / (1 + np.exp(-(a + b * z)))).astype(float)
    whole = Weighted(Judged(z, y), np.ones((1, len(z))))
    assert METRICS["calibration_slope"](whole)[0] == pytest.approx(b, abs=0.03)
    if b == 1.0:
        assert METRICS["calibration_intercept"](whole)[0] == pytest.approx(a, abs=0.03)
        assert METRICS["calibration_error"](whole)[0] == pytest.approx(0.0 if a == 0 else 0.07, abs=0.02)


def test_one_newton_step_is_as_good_as_a_refit():
    from sklearn.linear_model import LogisticRegression

    z, y = sample(8, 4000)
    weights = next(w for i, w in enumerate(entity_weights(np.arange(4000), 5, 0)) if i == 1)
    judged = Judged(z, y)
    slopes = METRICS["calibration_slope"](Weighted(judged, weights))
    for w, slope in zip(weights, slopes, strict=True):
        refit = LogisticRegression(C=np.inf).fit(z[:, None], y, sample_weight=w)
        assert slope == pytest.approx(float(refit.coef_[0, 0]), abs=3e-3)


def test_undefined_metrics_are_not_numbers():
    same = Weighted(Judged(np.zeros(5), np.array([0.0, 0, 1, 0, 0])), np.ones((1, 5)))
    assert np.isnan(METRICS["calibration_slope"](same)[0])
    assert METRICS["auc"](same)[0] == 0.5
    none = Weighted(Judged(np.arange(5.0), np.zeros(5)), np.ones((1, 5)))
    assert np.isnan(METRICS["auc"](none)[0])
    assert estimate(np.array([np.nan, 1.0])).to_json() == {"value": None, "low": None, "high": None}


def test_the_bootstrap_resamples_whole_entities_and_is_paired():
    entity = np.repeat(np.arange(50), 4)
    first, *rest = list(entity_weights(entity, 30, 1))
    assert (first == 1).all()
    weights = np.vstack(rest)
    assert weights.shape == (30, 200)
    assert (weights.reshape(30, 50, 4) == weights.reshape(30, 50, 4)[:, :, :1]).all()
    z, y = sample(2, 200)
    found = replicate_metrics({"a": Judged(z, y), "b": Judged(z, y)}, entity, 30, 1)
    assert np.array_equal(found["a"]["log_loss"], found["b"]["log_loss"])


def test_the_interval_covers():
    """About 95% of intervals for a mean loss cover it; a test of the machinery, with seeds fixed."""
    covered = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        z = np.zeros(300)
        y = (rng.random(300) < 0.3).astype(float)
        found = replicate_metrics(
            {"m": Judged(z, y)}, np.arange(300), 200, seed, {"brier_uncertainty": METRICS["brier_uncertainty"]}
        )
        interval = estimate(found["m"]["brier_uncertainty"])
        covered += interval.low <= 0.21 <= interval.high
    assert 105 <= covered <= 119


SPLITS = [
    (7, 30, 26, 4, 4, 8),
    (7, 14, 8, 3, 3, 2),
    (1, 90, 6, 1, 1, 178),
    (30, 30, 3, 1, 2, 0),
    (10, 1, 2, 2, 2, 0),
]


@pytest.mark.parametrize(("every", "horizon", "train", "validate", "test", "embargoed"), SPLITS)
@pytest.mark.parametrize("gap", [0, 5])
def test_splits_are_out_of_time(every, horizon, train, validate, test, embargoed, gap):
    campaign = CAMPAIGN.model_copy(
        update={
            "outcome": CAMPAIGN.outcome.model_copy(update={"horizon_days": horizon, "gap_days": gap}),
            "snapshots": type(CAMPAIGN.snapshots).model_validate(
                {"every": every, "train": train, "validate": validate, "test": test}
            ),
        }
    )
    newest = date(2025, 8, 1)
    plan = plan_splits(campaign, newest, date(2020, 1, 1))
    require_out_of_time(plan)
    counts = {s: sum(p.split == s for p in plan) for s in ("train", "validate", "test", "embargo")}
    assert (counts["train"], counts["validate"], counts["test"]) == (train, validate, test)
    assert gap or counts["embargo"] == embargoed
    assert plan[-1].snapshot == newest
    assert {(b.snapshot - a.snapshot).days for a, b in itertools.pairwise(plan)} == {every}
    # No snapshot is embargoed that need not be: the last embargoed one would reach into the next split.
    for before, after in itertools.pairwise(plan):
        if before.split == "embargo" and after.split in ("validate", "test"):
            assert before.outcome_end > after.snapshot


def test_overlapping_splits_are_a_leak():
    plan = plan_splits(CAMPAIGN, date(2025, 8, 1), date(2024, 1, 1))
    first_test = next(i for i, s in enumerate(plan) if s.split == "test")
    broken = [
        *plan[: first_test - 1],
        type(plan[0])(
            plan[first_test - 1].snapshot,
            "validate",
            *[plan[first_test - 1].outcome_start, plan[first_test - 1].outcome_end],
        ),
        *plan[first_test:],
    ]
    with pytest.raises(LeakageError, match="the outcome window of validate snapshot"):
        require_out_of_time(broken)


def test_too_little_history_says_how_much_is_needed():
    with pytest.raises(
        InsufficientDataError, match=r"reach back to 2024-10-18, but the event logs start on 2025-01-01"
    ):
        plan_splits(CAMPAIGN, date(2025, 8, 1), date(2025, 1, 1))


def gate(challenger, champion=None, segments=None, saved=0.0, monotone=None):
    n = 101
    rng = np.random.default_rng(0)

    def draws(value, spread=0.001):
        return np.concatenate([[value], rng.normal(value, spread, n - 1)])

    good = {
        "log_loss": 0.10,
        "top_decile_lift": 4.0,
        "calibration_slope": 1.0,
        "calibration_intercept": 0.0,
        "calibration_error": 0.01,
    }
    replicated = {
        "constant": {k: draws(v) for k, v in {**good, "log_loss": 0.13, "top_decile_lift": 1.0}.items()},
        "baseline": {k: draws(v) for k, v in {**good, "log_loss": 0.12, "top_decile_lift": 3.0}.items()},
        "new": {k: draws(v) for k, v in {**good, **challenger}.items()},
    }
    if champion is not None:
        replicated["champion"] = {k: draws(v) for k, v in {**good, **champion}.items()}
    return decide(
        "new", "champion" if champion is not None else None, replicated, segments or {}, saved, Gate(), monotone
    )


@pytest.mark.parametrize(("found", "promoted"), [({"age": 0.0}, True), ({"age": 1e-3}, False), (None, True)])
def test_the_gate_knows_monotone_constraints(found, promoted):
    decision = gate({}, monotone=found)
    assert decision.promoted == promoted
    assert ("monotone constraints" in [c.name for c in decision.criteria]) == (found is not None)
    assert promoted or "moves the wrong way: age by 0.001" in decision.sentence


def segment(low, high):
    return {"rows": 500, "converted": 50, "auc": {"value": (low + high) / 2, "low": low, "high": high}}


DECISIONS = [
    ("a good first model", {}, None, None, 0.0, True, ""),
    ("worse than the baseline", {"log_loss": 0.125}, None, None, 0.0, False, "log loss against baseline"),
    ("worse than the constant", {"log_loss": 0.14}, None, None, 0.0, False, "log loss against constant"),
    (
        "a coin flip",
        {"log_loss": 0.131, "top_decile_lift": 1.0},
        None,
        None,
        0.0,
        False,
        "top-decile lift against baseline",
    ),
    ("better than the champion", {"log_loss": 0.09}, {}, None, 0.0, True, ""),
    ("equal to the champion", {}, {}, None, 0.0, False, "log loss against champion"),
    (
        "better loss, lost lift",
        {"log_loss": 0.09, "top_decile_lift": 3.5},
        {},
        None,
        0.0,
        False,
        "top-decile lift against champion",
    ),
    ("overconfident", {"calibration_slope": 0.5}, None, None, 0.0, False, "calibration slope"),
    ("biased", {"calibration_intercept": -0.8}, None, None, 0.0, False, "calibration in the large"),
    ("badly calibrated", {"calibration_error": 0.2}, None, None, 0.0, False, "expected calibration error"),
    ("constant", {"calibration_slope": np.nan}, None, None, 0.0, False, "calibration slope"),
    ("a collapsed segment", {}, None, {"country=DE": segment(0.3, 0.45)}, 0.0, False, "country=DE collapsed"),
    ("a noisy segment", {}, None, {"country=DE": segment(0.3, 0.6)}, 0.0, True, ""),
    ("saved differently", {}, None, None, 1e-3, False, "saved model"),
]


@pytest.mark.parametrize(
    ("challenger", "champion", "segments", "saved", "promoted", "reason"),
    [d[1:] for d in DECISIONS],
    ids=[d[0] for d in DECISIONS],
)
def test_the_gate(challenger, champion, segments, saved, promoted, reason):
    decision = gate(challenger, champion, segments, saved)
    assert decision.promoted is promoted
    assert reason in decision.sentence
    assert len(decision.criteria) >= 8


def test_the_evaluation_promotes_a_good_model_and_refuses_a_coin_flip():
    rng = np.random.default_rng(0)
    n = 6000
    z = rng.normal(-3, 1.5, n)
    y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
    coin = np.full(n, -3.0) + rng.normal(0, 0.01, n)
    baseline = z * 0.3 - 1.9
    for challenger, promoted in (("good", True), ("coin", False)):
        scores = TestScores(
            y, np.arange(n) // 2, {"good": z, "coin": coin, "baseline": baseline, "oracle": z},
            {"half": np.where(np.arange(n) % 2, "a", "b").astype(object)}, float(y.mean()),
        )  # fmt: skip
        found = evaluate(CAMPAIGN, scores, challenger, 0.0, {}, replicates=60)
        assert found.decision.promoted is promoted
        assert found.record["models"]["good"]["auc"]["low"] < found.record["models"]["good"]["auc"]["value"]
        assert set(found.tables) == {"gain_curve", "calibration_curve", "deciles", "score_distribution", "segments"}
        half = found.record["segments"][challenger]["half=a"]
        assert half["rows"] == n // 2
        p = 1 / (1 + np.exp(-(z if challenger == "good" else coin)))[1::2]
        own, contacted = y[1::2], p * 22.5 > 0.4
        assert half["selection_rate"]["value"] == pytest.approx(contacted.mean())
        assert half["true_positive_rate"]["value"] == pytest.approx(own[contacted].sum() / own.sum())
        assert half["observed_over_expected"]["value"] == pytest.approx(own.mean() / p.mean())


def test_the_model_card_says_how_protected_groups_fare():
    rng = np.random.default_rng(0)
    n = 4000
    z = rng.normal(-2, 1.5, n)
    y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
    campaign = load_campaign(SHIPPED / "loan_uptake.yaml").model_copy(update={"contact": "crm@example.com"})
    name = campaign.protected[0]
    groups = np.where(np.arange(n) < 3990, "large", "small").astype(object)
    y[3990:] = 0.0  # nobody of the small group converted: no rate of them, and no invented one
    scores = TestScores(y, np.arange(n), {"lightgbm": z, "baseline": z * 0.5 - 1}, {name: groups}, float(y.mean()))
    record = evaluate(campaign, scores, "lightgbm", 0.0, {"snapshots": {"test": ["2025-01-01"]}}, replicates=60).record
    card = model_card(campaign, record)
    assert set(card["fairness"][name]) == {f"{name}=large", f"{name}=small"}
    text = card_markdown(card)
    for words in ("Intended use", "Not intended", "95% interval", f"No model sees {name}", "crm@example.com"):
        assert words in text
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name}=small")]
    assert row.split(" | ")[1:3] == ["10", "0"]
    assert "too few" in row
    assert "drawn by lot" not in text
    snapshots = campaign.snapshots.model_copy(update={"keep_negatives": 0.2})
    sampled = card_markdown(model_card(campaign.model_copy(update={"snapshots": snapshots}), record))
    assert "of its rows without the outcome 20.00%, drawn by lot, which the probabilities are corrected for" in sampled
    assert "nan" not in text.lower().replace("finance", "")


def test_a_day_is_a_day():
    assert CAMPAIGN.outcome_end_days == 30
    assert date(2025, 8, 1) + timedelta(days=CAMPAIGN.outcome_end_days) == date(2025, 8, 31)
