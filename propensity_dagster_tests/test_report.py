"""The evaluation report: what it says, that it needs nothing but a browser, and what it does with odd runs."""

import copy
import json
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from propensity_dagster.campaign import SHIPPED, load_campaign
from propensity_dagster.data.lake import Home
from propensity_dagster.errors import ConfigError, DataContractError
from propensity_dagster.evaluation.evaluate import TestScores, evaluate
from propensity_dagster.registry.mlflow_store import MlflowStore
from propensity_dagster.reports.evaluation_report import cautions, publish_report, verdict
from propensity_dagster.reports.site import report_url, serve_reports
from propensity_dagster.scoring.candidates import read_evaluation
from propensity_dagster.scoring.promotion import keep_reports

from .conftest import run_through_dagster

CAMPAIGN = load_campaign(SHIPPED / "ecommerce_purchase.yaml")


@pytest.fixture(scope="module")
def page(materialized):
    return (materialized.home.reports("small") / "report.html").read_text()


@pytest.fixture(scope="module")
def record(materialized):
    return read_evaluation(materialized.campaign, materialized.home)


def test_the_page_needs_nothing_but_a_browser(page):
    assert len(page.encode()) < 3_000_000
    assert not re.findall(r"<(?:script|link|iframe|img)\b", page)
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', page)
    assert all((a or b).startswith("#") for a, b in links)
    inside = {name for pair in links for name in pair if name}
    assert {name[1:] for name in inside} <= set(re.findall(r'id="([^"]+)"', page))


def test_no_two_drawings_share_a_name(page):
    names = re.findall(r'<(?:clipPath|path) id="([^"]+)"', page)
    assert len(names) == len(set(names))


def test_the_page_says_what_the_evaluation_found(page, record):
    assert verdict(record) in page.replace("&#39;", "'")
    challenger = record["models"][record["challenger"]]
    assert f"{challenger['log_loss']['value']:.4f}" in page
    for section in ("wrong", "gate", "models", "ranking", "calibration", "money", "segments", "time", "why", "data"):
        assert f'<h2 id="{section}">' in page
    assert page.count("<svg") == 6 + 2 + 1 + 6  # plots of the scores, over time, importance, dependence
    for snapshot in record["snapshots"]["test"]:
        assert f"<td>{snapshot}</td>" in page
    assert "synthetic" in page


def test_equal_runs_give_equal_pages(materialized, page):
    assert publish_report(materialized.campaign, materialized.home).read_text() == page


def test_mlflow_keeps_the_page_with_the_challenger(materialized, page):
    from mlflow.artifacts import download_artifacts

    store = MlflowStore(materialized.home)
    (version,) = store.versions("small")
    kept = download_artifacts(run_id=version.run_id, artifact_path="reports/report.html")
    assert Path(kept).read_text() == page


def test_a_challenger_that_was_never_registered(materialized, tmp_path):
    shutil.copytree(materialized.home.root / "reports", tmp_path / "reports")
    shutil.copytree(materialized.home.candidates("small"), Home(tmp_path).candidates("small"))
    with pytest.raises(DataContractError, match="materialize small/champion"):
        keep_reports(materialized.campaign, Home(tmp_path), MlflowStore(Home(tmp_path)))


def test_reports_over_http(tmp_path, monkeypatch):
    (tmp_path / "reports" / "small").mkdir(parents=True)
    (tmp_path / "reports" / "small" / "report.html").write_text("seen")
    (tmp_path / "secret").write_text("hidden")
    address = serve_reports(tmp_path / "reports", 0)
    assert urllib.request.urlopen(f"{address}/small/report.html").read() == b"seen"
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{address}/../secret")
    with pytest.raises(ConfigError, match=r"--reports-port: port .* cannot be used"):
        serve_reports(tmp_path / "reports", int(address.rpartition(":")[2]))
    assert report_url("small", "report.html") == "http://127.0.0.1:3002/small/report.html"
    monkeypatch.setenv("PROPENSITY_REPORTS_URL", "https://reports.example/")
    assert report_url("small", "report.html") == "https://reports.example/small/report.html"


def scores(n=4000, periods=2, off=1.0):
    rng = np.random.default_rng(0)
    z = rng.normal(-2, 1, n)
    period = np.array([f"2025-01-0{1 + i}" for i in rng.integers(0, periods, n)], dtype=object)
    p = 1 / (1 + np.exp(-z)) * np.where(period == "2025-01-02", off, 1.0)
    y = (rng.random(n) < p).astype(float)
    log_odds = {"lightgbm": z, "baseline": np.full(n, -2.0)}
    return TestScores(
        y, np.arange(n), log_odds, {"country": np.repeat(["DE", "FR"], n // 2).astype(object)}, 0.15, period
    )


FACTS = {"training": {"lightgbm": {}, "baseline": {}}, "snapshots": {}, "champion_lacks": [], "champion_version": "3"}


def test_thresholds_equal_counting():
    judged = scores()
    found = evaluate(CAMPAIGN, judged, "lightgbm", 0.0, FACTS, replicates=50).record["thresholds"]
    z, y, value = judged.log_odds["lightgbm"], judged.y, CAMPAIGN.value
    p = 1 / (1 + np.exp(-z))
    for row in found:
        chosen = p >= row["probability"]
        assert row["contacted"]["value"] == pytest.approx(chosen.mean())
        assert row["precision"]["value"] == pytest.approx(y[chosen].mean())
        assert row["recall"]["value"] == pytest.approx(y[chosen].sum() / y.sum())
        profit = y[chosen].sum() * value.margin_per_conversion - chosen.sum() * value.cost_per_contact
        assert row["profit_per_thousand"]["value"] == pytest.approx(1000 * profit / len(y))
        assert row["profit_per_thousand"]["low"] < profit * 1000 / len(y) < row["profit_per_thousand"]["high"]
        by_lot = chosen.sum() * (y.mean() * value.margin_per_conversion - value.cost_per_contact)
        everybody = y.sum() * value.margin_per_conversion - len(y) * value.cost_per_contact
        assert row["more_than_random"]["value"] == pytest.approx(1000 * (profit - by_lot) / len(y))
        assert row["more_than_all"]["value"] == pytest.approx(1000 * (profit - everybody) / len(y))
        if value.cost_per_contact:
            assert row["return_on_cost"]["value"] == pytest.approx(profit / (chosen.sum() * value.cost_per_contact))
    assert found[-1]["contacted"]["value"] == 1
    assert found[-1]["more_than_random"]["value"] == pytest.approx(0, abs=1e-9)
    assert found[-1]["more_than_all"]["value"] == pytest.approx(0, abs=1e-9)


def test_the_profit_of_each_tenth_equals_counting():
    judged = scores()
    record = evaluate(CAMPAIGN, judged, "lightgbm", 0.0, FACTS, replicates=50).record
    y, value = judged.y[np.argsort(-judged.log_odds["lightgbm"])], CAMPAIGN.value
    for i, row in enumerate(record["deciles"]["lightgbm"]):
        tenth = y[400 * i : 400 * (i + 1)]
        profit = tenth.mean() * value.margin_per_conversion - value.cost_per_contact
        assert row["tenth_profit_per_thousand"]["value"] == pytest.approx(1000 * profit)
        assert row["tenth_profit_per_thousand"]["low"] < row["tenth_profit_per_thousand"]["high"]


def test_reaching_a_share_of_the_converters_equals_counting():
    judged = scores()
    record = evaluate(CAMPAIGN, judged, "lightgbm", 0.0, FACTS, replicates=50).record
    y = judged.y[np.argsort(-judged.log_odds["lightgbm"])]
    for row in record["reach"]:
        needed = np.searchsorted(np.cumsum(y), row["converters"] * y.sum()) + 1
        assert row["contacted"]["value"] == pytest.approx(needed / len(y), abs=0.002)
        assert row["contacted"]["low"] < row["contacted"]["value"] < row["contacted"]["high"]
        cost = 1000 * CAMPAIGN.value.cost_per_contact
        assert row["cost_per_thousand"]["value"] + row["saved_per_thousand"]["value"] == pytest.approx(cost)
    for segment in record["segments"]["lightgbm"].values():
        assert segment["more_than_random"]["low"] > 0, "the ranking is worth something in every segment"


def test_periods_and_distribution_hold_every_row():
    evaluation = evaluate(CAMPAIGN, scores(), "lightgbm", 0.0, FACTS, replicates=50)
    assert sum(p["rows"] for p in evaluation.record["periods"].values()) == 4000
    distribution = evaluation.tables["score_distribution"]
    for side in ("converters", "others"):
        assert 0.98 < sum(distribution[side].to_pylist()) <= 1 + 1e-12


def test_the_calibration_band_covers_what_is_true():
    """Forecasts are right here, so about 95% of the bands hold the forecast."""
    curve = (
        evaluate(CAMPAIGN, scores(20_000), "lightgbm", 0.0, FACTS, replicates=200)
        .tables["calibration_curve"]
        .to_pylist()
    )
    inside = [row["low"] <= row["mean_probability"] <= row["high"] for row in curve if row["model"] == "lightgbm"]
    assert len(inside) == 15
    assert sum(inside) >= 12


CAUTIONS = [
    (lambda r: r.update(champion_lacks=["age", "town"]), "(version 3) was not judged: it needs age and town"),
    (lambda r: None, "Only"),
    (lambda r: r["models"]["lightgbm"]["auc"].update(value=0.99), "too good for human behaviour"),
    (lambda r: r.update(outcome_rate=0.3), "the world is changing"),
    (lambda r: r["models"]["baseline"]["log_loss"].update(value=0.0), "Another candidate did better"),
    (
        lambda r: r["segments"]["lightgbm"]["country=DE"].update(converted=3),
        "Too few to judge, under 10 conversions: country=DE",
    ),
]


@pytest.mark.parametrize(("change", "words"), CAUTIONS, ids=[words for _, words in CAUTIONS])
def test_cautions(change, words):
    found = evaluate(CAMPAIGN, scores(4000 if words != "Only" else 600), "lightgbm", 0.0, FACTS, replicates=50).record
    changed = copy.deepcopy(found)
    change(changed)
    assert any(words in line for line in cautions(CAMPAIGN, changed, None, {"findings": []}))
    if words != "Only":
        assert not any(words in line for line in cautions(CAMPAIGN, found, None, {"findings": []}))


def test_a_snapshot_that_went_wrong_is_named():
    lines = cautions(
        CAMPAIGN, evaluate(CAMPAIGN, scores(off=2.0), "lightgbm", 0.0, FACTS, replicates=90).record, None, None
    )
    (line,) = [line for line in lines if "Did it stay right?" in line]
    assert "2025-01-02" in line
    assert any("not examined" in line for line in lines)


def test_one_feature_has_it_all():
    record = evaluate(CAMPAIGN, scores(), "lightgbm", 0.0, FACTS, replicates=20).record
    explained = {"features": [{"feature": "days_late", "share": {"value": 0.8}}], "jumped": [{"feature": "age"}]}
    lines = cautions(CAMPAIGN, record, explained, {"findings": []})
    assert any("days late alone has 80% of the importance" in line for line in lines)
    assert any("importance of age jumped" in line for line in lines)


def test_a_refusal_says_why(record):
    refused = json.loads(json.dumps(record))
    refused["decision"]["promoted"] = False
    refused["decision"]["criteria"][0] |= {"passed": False, "found": "+0.1", "wanted": "below 0"}
    words = verdict(refused)
    assert words.startswith("No: ")
    assert "+0.1, wanted below 0" in words


def odd_tables():
    rng = np.random.default_rng(0)
    n = 1500
    x = rng.normal(size=n).round(2)
    town = rng.integers(0, 320, n)  # more than the 200 categories that models keep
    bought = (rng.random(n) < 1 / (1 + np.exp(1 - x - (town % 3)))).astype(int)
    coin = (rng.random(n) < 0.3).astype(int)
    few = (np.arange(n) % 2).astype(int)  # says nothing
    return {
        "one feature": {"x": x, "bought": bought},
        "320 categories": {"town": [f"town {t}" for t in town], "bought": bought},
        "a column without values": {"x": x, "empty": [None] * n, "bought": bought},
        "nothing to learn": {"few": few, "bought": coin},
    }


@pytest.mark.parametrize("case", odd_tables())
def test_odd_tables_get_a_page_that_says_so(tmp_path, case):
    """Trained, judged, explained and reported end to end through Dagster: a page, and no empty plot in it."""
    import csv

    columns = odd_tables()[case]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(["" if v is None else v for v in values] for values in columns.values()), strict=True))
    (tmp_path / "odd.yaml").write_text(
        "name: odd\nsource: {kind: table, path: data.csv}\noutcome: {column: bought}\nmin_converters: 50\n"
        "models: [baseline, logistic_regression, lightgbm, {neural_network: {max_epochs: 1}}, ensemble]\n"
    )
    home = Home(tmp_path / "home")
    campaign = run_through_dagster(tmp_path / "odd.yaml", home)
    page = (home.reports("odd") / "report.html").read_text()
    record = read_evaluation(campaign, home)
    assert "no order in time" in page
    assert "nan" not in page.lower()
    assert verdict(record) in page
    promoted = record["decision"]["promoted"]
    assert f"Explained is the {'champion' if promoted else 'challenger'}" in page
    assert not (promoted and case == "nothing to learn")
    if case == "320 categories":
        assert "P209" in page
        assert "no number moves the score" not in page
    if case == "a column without values":
        assert "P208" in page


def test_a_feature_dropped_since_training_is_told(materialized):
    """The champion needs what the newest training set lacks: told by name, and nothing is published."""
    import pyarrow.parquet as pq

    from propensity_dagster.explain.summary import explain_model
    from propensity_dagster.models.saved import load_model

    home = Home(Path(str(materialized.home.root) + "_dropped"))
    source, target = (h.lake("small").file("training_set") for h in (materialized.home, home))
    target.parent.mkdir(parents=True)
    pq.write_table(pq.read_table(source).drop_columns(["visits_count_30d"]), target)
    model = load_model(materialized.home.candidates("small") / "lightgbm")
    with pytest.raises(DataContractError, match="the data lack: visits_count_30d; were features changed"):
        explain_model(materialized.campaign, model, "1", "champion", home)
    assert not home.reports("small").exists()


def test_no_evaluation_yet(tmp_path):
    with pytest.raises(DataContractError, match="there is no evaluation yet"):
        publish_report(CAMPAIGN, Home(tmp_path))


def test_the_ablation_stays_with_its_candidates(materialized, tmp_path):
    """Trained without each stream; visits make the synthetic orders, so nothing replaces them."""
    from propensity_dagster.explain.ablation import publish_ablation, read_ablation

    home = Home(tmp_path / "home")
    shutil.copytree(materialized.home.root, home.root)
    assert read_ablation(materialized.campaign, home) is None
    record = publish_ablation(materialized.campaign, home)
    assert record["model"] == "lightgbm"
    assert {row["name"] for row in record["streams"]} == {"orders", "visits", "emails", "customer"}
    assert record["streams"][0]["name"] == "visits"
    assert record["streams"][0]["loss_without"]["low"] > 0
    assert "What each source is worth" in publish_report(materialized.campaign, home).read_text()
    shutil.rmtree(home.candidates("small") / "lightgbm")
    shutil.copytree(home.candidates("small") / "logistic_regression", home.candidates("small") / "lightgbm")
    assert read_ablation(materialized.campaign, home) is None


def test_a_champion_that_needs_a_dropped_feature_is_replaced(decisions, tmp_path):
    """The campaign file excludes a column that the champion reads: it is not judged, and says so; nothing is stuck."""
    home, file = Home(tmp_path / "home"), tmp_path / "past.yaml"
    shutil.copytree(decisions.home.root, home.root)
    shutil.copy(decisions.file.parent / "data.csv", tmp_path / "data.csv")
    file.write_text(decisions.file.read_text() + "exclude: {age: no longer collected}\n")
    campaign = run_through_dagster(file, home)
    record = read_evaluation(campaign, home)
    assert record["champion_lacks"] == ["age"]
    assert "champion" not in record["models"]
    assert record["decision"]["promoted"], record["decision"]["sentence"]
    champion = MlflowStore(home).champion("past")
    assert champion is not None
    assert champion.version == "2"
    page = (home.reports("past") / "report.html").read_text()
    assert "The champion in service (version 1) was not judged: it needs age, which the data lack now." in page
    assert "Explained is the champion" in page
