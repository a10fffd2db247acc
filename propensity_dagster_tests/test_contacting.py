"""From scores to money through the system: audience, export, experiment and earnings of a campaign that was run."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from propensity_dagster.campaign import load_campaign
from propensity_dagster.components.campaign_folder import campaign_definitions
from propensity_dagster.components.launch import choose_audience
from propensity_dagster.contracts import audience_contract
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.errors import ConfigError, DataContractError, InsufficientDataError, PropensityError
from propensity_dagster.experiments.assignment import assign
from propensity_dagster.experiments.earned import publish_earned
from propensity_dagster.experiments.measurement import measured_units, publish_readout
from propensity_dagster.monitoring.outcomes import publish_outcomes
from propensity_dagster.reports.experiment_page import (
    describe_earned,
    publish_earned_page,
    publish_experiment_page,
)
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.audiences import read_plan
from propensity_dagster.scoring.batch import score_snapshot
from propensity_dagster.scoring.contacts import publish_audience
from propensity_dagster.scoring.promotion import require_champion
from propensity_dagster.synthetic import open_world
from propensity_dagster_tests.conftest import SMALL

EARLIER = date(2024, 7, 20)


def test_a_night_chooses_and_sends(materialized, newest_snapshot):
    home = materialized.home
    file = home.lake("small").partition("audience", "snapshot", newest_snapshot)
    table = pq.read_table(file)
    audience_contract(materialized.campaign).validate(table.to_pandas())
    plan = read_plan(home.lake("small"), newest_snapshot)
    groups = dict(zip(*np.unique(table["group"].to_pylist(), return_counts=True), strict=True))
    assert groups["contact"] + groups["random"] == plan["contacted"]
    assert (groups["random"], groups["holdout"]) == (20, plan["held_chosen"])
    (sent,) = (home.root / "exports" / "small").iterdir()
    assert len(sent.read_text().splitlines()) == 1 + plan["contacted"]
    consents = pq.read_table(next((home.root / "synthetic").rglob("consents.parquet")))
    granted = {
        str(k) for k, g in zip(consents["customer_id"].to_pylist(), consents["granted"].to_pylist(), strict=True) if g
    }
    assert set(table["customer_id"].to_pylist()) <= granted
    assert plan["excluded"]["no consent"] > 0
    assert "wait for the end of their outcome window" in (home.reports("small") / "earned.html").read_text()


@dataclass
class Past:
    """The campaign with an older snapshot scored, so that its outcomes are known; nothing is exported."""

    campaign: object
    home: Home


@pytest.fixture(scope="module")
def past(materialized, tmp_path_factory) -> Past:
    root = tmp_path_factory.mktemp("past")
    shutil.copytree(materialized.home.root, root / "home", ignore=shutil.ignore_patterns("mlruns", "dagster"))
    file = root / "small.yaml"
    file.write_text(
        SMALL.replace("  exports: [{name: crm, kind: csv}]\n", "").replace("fraction: 0.05", "fraction: 0.3")
        + "holdout: {fraction: 0.3}\n"
    )
    campaign, home = load_campaign(file), Home(root / "home")
    shutil.rmtree(home.lake("small").root / "audience")
    shutil.rmtree(home.lake("small").root / "holdout")
    version, model = require_champion(materialized.campaign, Runtime(materialized.home).store)
    with open_engine() as engine:
        from propensity_dagster.features.snapshots import publish_features

        publish_features(campaign, [EARLIER], home, engine)
        score_snapshot(campaign, EARLIER, model, version, datetime(2024, 7, 20, 1), home, engine)
        publish_audience(campaign, EARLIER, home, engine, datetime(2024, 7, 20, 2))
        publish_outcomes(campaign, EARLIER, home, engine)
    return Past(campaign, home)


def test_an_experiment_is_read_out_when_outcomes_mature(past):
    with open_engine() as engine:
        record = publish_readout(past.campaign, "wording", past.home, engine)
    scores = pq.read_table(past.home.lake("small").partition("scores", "snapshot", EARLIER))
    newest = pq.read_table(past.home.lake("small").partition("scores", "snapshot", date(2024, 8, 28)))
    assert record["units"] == scores.num_rows
    assert record["assigned"] == len({*scores["customer_id"].to_pylist(), *newest["customer_id"].to_pylist()})
    assert record["covariate"] == "propensity score before the assignment"
    assert record["srm"]["passed"]
    assert not record["final"]
    # Nobody was treated: whatever is found is chance, and nothing may be claimed.
    assert record["recommendation"]["answer"] in ("wait", "no")
    lift = record["metrics"]["conversion"]["variants"]["warm"]["lift_always"]
    assert lift["low"] < 0 < lift["high"]
    page = publish_experiment_page(past.campaign, "wording", record, past.home).read_text()
    for words in (
        "What happened",
        "How sure is that",
        "Were the variants comparable?",
        "must not become worse",
        "<svg",
    ):
        assert words in page
    assert "The experiment is still running" in page


def test_measures_equal_a_plain_count(past):
    """Against a sum over the validated events, row by row, for some units."""
    with open_engine() as engine:
        units = measured_units(past.campaign, "wording", past.home, engine).measured
    lake = past.home.lake("small").root
    orders = pq.read_table(sorted(lake.glob("validated_orders/day=*/part.parquet")))
    emails = pq.read_table(sorted(lake.glob("validated_emails/day=*/part.parquet")))
    first, last = np.datetime64("2024-07-20"), np.datetime64("2024-08-03")

    def within(table):
        time = table["time"].to_numpy()
        return table.filter(pa.array((time >= first) & (time < last)))

    spent: dict = {}
    for row in within(orders).to_pylist():
        spent[row["customer_id"]] = spent.get(row["customer_id"], 0) + row["amount"] / 100
    opened: dict = {}
    for row in within(emails).to_pylist():
        sums = opened.setdefault(row["customer_id"], {"open": 0, "sent": 0})
        if row["type"] in sums:
            sums[row["type"]] += 1
    assert spent
    for row in units.to_pylist():
        assert row["revenue"] == pytest.approx(spent.get(row["key"], 0))
        assert row["conversion"] == (row["key"] in spent)
        assert row["opens"] == opened.get(row["key"], {}).get("open", 0)
        assert row["opens__per"] == opened.get(row["key"], {}).get("sent", 0)
    variants = assign("wording", past.campaign.experiments["wording"], units["key"].to_pylist())
    assert units["variant"].to_pylist() == variants.tolist()


def changed(past, **stated):
    experiment = past.campaign.experiments["wording"].model_copy(update=stated)
    return past.campaign.model_copy(update={"experiments": {"wording": experiment}})


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            {"variants": {"control": 0.5, "hot": 0.5}},
            r"experiments\.wording\.variants: was .*'warm'.* now it is .*'hot'",
        ),
        ({"variants": {"warm": 0.5, "control": 0.5}}, r"experiments\.wording\.variants"),
        ({"primary": "revenue"}, r"experiments\.wording\.primary: was .*conversion.* now it is .*revenue"),
        ({"salt": "new"}, r"experiments\.wording\.salt"),
    ],
)
def test_a_running_experiment_must_not_change(past, stated, message):
    with open_engine() as engine:
        publish_readout(past.campaign, "wording", past.home, engine)
        with pytest.raises(ConfigError, match=message):
            publish_readout(changed(past, **stated), "wording", past.home, engine)
        publish_readout(changed(past, ends=date(2024, 12, 24)), "wording", past.home, engine)


def elsewhere(past, tmp_path, rows):
    from propensity_dagster.campaign_sections import Assignments

    (tmp_path / "assigned.csv").write_text("\n".join(["who,arm,at", *rows]))
    units = Assignments(table="assigned", connection=str(tmp_path), key="who", variant="arm", time="at")
    campaign = changed(past, units=units)
    shutil.rmtree(past.home.lake("small").root / "experiments", ignore_errors=True)
    return campaign


def test_assignments_made_elsewhere(past, tmp_path):
    scores = pq.read_table(past.home.lake("small").partition("scores", "snapshot", EARLIER))
    keys = scores["customer_id"].to_pylist()
    rows = [f"{k},{'warm' if i % 2 else 'control'},2024-07-2{i % 3}T10:00:00" for i, k in enumerate(keys)]
    with open_engine() as engine:
        record = publish_readout(elsewhere(past, tmp_path, rows), "wording", past.home, engine)
        assert record["units"] == len(keys)
        twice = elsewhere(past, tmp_path, [*rows, f"{keys[0]},warm,2024-07-22", f"{keys[2]},warm,2024-07-22"])
        with pytest.raises(DataContractError, match=r"2 of [\d,]+ units are in two variants"):
            publish_readout(twice, "wording", past.home, engine)
        renamed = elsewhere(past, tmp_path, [row.replace("warm", "hot") for row in rows])
        with pytest.raises(DataContractError, match="units have the variant 'hot', which the experiment does not have"):
            publish_readout(renamed, "wording", past.home, engine)
        future = elsewhere(past, tmp_path, [row.replace("2024-07-2", "2024-09-0") for row in rows])
        with pytest.raises(
            InsufficientDataError, match=r"none is measured yet: events go to 2024-08-2[67]; the last unit"
        ):
            publish_readout(future, "wording", past.home, engine)
        start = measured_units(
            elsewhere(past, tmp_path, ["1,warm,2024-07-20T00:00:00", "2,warm,2024-07-20T00:00:01"]),
            "wording",
            past.home,
            engine,
        )
        assert [str(d) for d in start.measured["start"].to_pylist()] == ["2024-07-20", "2024-07-21"]


def test_champion_and_challenger_of_the_service_are_compared(past, tmp_path):
    """From the log of answers: who was answered by which, and what they did afterwards."""
    scores = pq.read_table(past.home.lake("small").partition("scores", "snapshot", EARLIER))
    keys = scores["customer_id"].to_pylist()
    shares = {"champion": 0.5, "challenger": 0.5}
    table = pa.table(
        {"key": [*keys, None], "variant": [*(("champion", "challenger")[i % 2] for i in range(len(keys))), "champion"]}
    )
    file = past.home.lake("small").partition("predictions", "day", date(2024, 7, 20))
    publish_table(table, file)
    shutil.rmtree(past.home.lake("small").root / "experiments", ignore_errors=True)
    with open_engine() as engine:
        record = publish_readout(changed(past, units="predictions", variants=shares), "wording", past.home, engine)
    assert record["units"] == len(keys)
    assert record["covariate"] != "propensity score before the assignment", "the score is the variant's own"
    shutil.rmtree(file.parent.parent)
    shutil.rmtree(past.home.lake("small").root / "experiments", ignore_errors=True)


@contextmanager
def outcomes_of(past, lift):
    """The snapshot's outcomes as those of a world in which 15% convert, and of the contacted `lift` more."""
    lake = past.home.lake("small")
    file = lake.partition("outcomes", "snapshot", EARLIER)
    before, audience = pq.read_table(file), pq.read_table(lake.partition("audience", "snapshot", EARLIER))
    groups = dict(zip(audience["customer_id"].to_pylist(), audience["group"].to_pylist(), strict=True))
    rng = np.random.default_rng(0)
    chance = [0.15 + lift * (groups.get(key) in ("contact", "random")) for key in before["customer_id"].to_pylist()]
    place = before.column_names.index("converted")
    publish_table(before.set_column(place, "converted", pa.array(rng.random(len(chance)) < np.array(chance))), file)
    yield
    publish_table(before, file)


def test_what_contacts_earned(past):
    plan = read_plan(past.home.lake("small"), EARLIER)
    record = publish_earned(past.campaign, past.home)
    total = record["total"]
    assert total["contacts"] == total["measured"] == plan["contacted"] - plan["random"]
    assert total["expected"] == pytest.approx(plan["expected_conversions"]["value"], rel=0.1), "those by lot are apart"
    with outcomes_of(past, 0.0):
        record = publish_earned(past.campaign, past.home)
        total = record["total"]
        low, high = (total["incremental_conversions"][part] for part in ("low", "high"))
        assert low < 0 < high, "the contacts changed nothing, and it says so"
        assert total["incremental_profit"]["value"] == pytest.approx(
            total["incremental_conversions"]["value"] * 22.5 - total["cost"]
        )
        assert [row["snapshot"] for row in record["snapshots"]] == [str(EARLIER)]
        assert sum(row["contacts"] for row in record["deciles"]) == total["contacts"]
        page = publish_earned_page(past.campaign, record, past.home).read_text()
    for words in ("By tenth of the score", "The ledger", "What is the model worth?", describe_earned(record)):
        assert words in page


def test_earned_of_an_effect_that_is_there(past):
    with outcomes_of(past, 0.3):
        record = publish_earned(past.campaign, past.home)
    assert record["total"]["effect"]["low"] > 0
    assert record["total"]["effect"]["value"] == pytest.approx(0.3, abs=0.15)
    assert describe_earned(record).startswith("The contacts earned")


def test_the_true_effect_of_appeals_is_in_the_interval(tmp_path):
    """campaign_response, small: the register of the trial, through the system, against the world's own truth."""
    from propensity_dagster.campaign import SHIPPED
    from propensity_dagster.components.launch import _ingest_new
    from propensity_dagster_tests.conftest import run_through_dagster  # noqa: F401

    text = (
        (SHIPPED / "campaign_response.yaml").read_text().replace("customers=20000", "customers=6000&days=300&seed=11")
    )
    text = text.replace("ends: 2025-06-01", "ends: 2024-07-20").replace("newsletter_clicks: {", "clicks: {")
    file = tmp_path / "response.yaml"
    file.write_text(text.replace("[newsletter_clicks]", "[clicks]"))
    campaign, home = load_campaign(file), Home(tmp_path / "home").ensure()
    runtime = Runtime(home)
    defs = dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": runtime}))
    from propensity_dagster.data.sources import source_folder

    source_folder(campaign, home)
    with dg.DagsterInstance.ephemeral() as instance:
        _ingest_new(campaign, runtime, defs, instance)
    with open_engine() as engine:
        record = publish_readout(campaign, "appeals", home, engine)
        units = measured_units(campaign, "appeals", home, engine).measured
    world = open_world("synthetic://outreach?customers=6000&days=300&seed=11", home.synthetic)
    truth = []
    for start in sorted(set(units["start"].to_pylist()))[::14]:
        keys, treated, control = world.true_effect(start, 90)
        known = set(units.filter(pa.array([s == start for s in units["start"].to_pylist()]))["key"].to_pylist())
        at = [i for i, key in enumerate(keys.tolist()) if key in known]
        truth += (treated - control)[at].tolist()
    found = record["metrics"]["conversion"]["variants"]["treated"]["difference_always"]
    assert found["low"] < np.mean(truth) < found["high"]
    assert record["srm"]["passed"]


def test_the_command_line_says_why_nobody_is_contacted(tmp_path, materialized):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL.replace("  consent: {table: consents, granted: granted}\n", ""))
    with pytest.raises(ConfigError, match=r"contacts\.consent is not set, so nobody is contacted"):
        choose_audience(
            load_campaign(file), None, {}, Runtime(materialized.home), dg.Definitions(), dg.DagsterInstance.ephemeral()
        )


def test_an_audience_through_dagster_with_a_budget(past):
    campaign, runtime = past.campaign, Runtime(past.home)
    defs = dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": runtime}))
    with dg.DagsterInstance.ephemeral() as instance:
        snapshot = choose_audience(campaign, EARLIER, {"capacity": 50, "budget": 18.0}, runtime, defs, instance)
        assert read_plan(past.home.lake("small"), snapshot)["contacted"] == 45
        with pytest.raises(PropensityError, match=r"contacts\.random costs 8\.00, the budget is 1\.00"):
            choose_audience(campaign, EARLIER, {"budget": 1.0}, runtime, defs, instance)
    assert json.loads(json.dumps(read_plan(past.home.lake("small"), EARLIER)))["cost"] == pytest.approx(18.0)
