"""The doctor: every kind of trouble has its code, sound data have none, and nothing ends in a stack trace."""

import json
import subprocess
import sys
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.doctor import Diagnosis, diagnose
from propensity_dagster.doctor.findings import CODES, judge_counts

from .test_tables import PLAIN, table_campaign


def look(campaign: Campaign, home: Path) -> Diagnosis:
    with open_engine() as engine:
        return diagnose(campaign, Home(home), engine, ingested=False)


def codes(diagnosis: Diagnosis) -> set[str]:
    return {f.code for f in diagnosis.findings}


def sound(rows: int = 4_000, **columns) -> pa.Table:
    """A table without trouble, with some columns added or replaced."""
    rng = np.random.default_rng(1)
    bought = rng.random(rows) < 0.4
    table = {
        "customer": [f"c{i}" for i in range(rows)],
        "amount": rng.lognormal(3, 1, rows).round(2),
        "channel": [("web", "shop", "post")[i] for i in rng.integers(0, 3, rows)],
        "bought": bought,
    }
    made = {name: make(rng, bought) for name, make in columns.items()}
    return pa.table({**table, **made})


def repeated(values, bought):
    return [values[i % len(values)] for i in range(len(bought))]


TROUBLES = {
    "nothing": ({}, {}, set()),
    "a constant column": ({"c": lambda r, y: ["x"] * len(y)}, {}, {"P207"}),
    "a column without values": ({"c": lambda r, y: pa.nulls(len(y), pa.string())}, {}, {"P208"}),
    "a column that is mostly missing": (
        {"c": lambda r, y: [float(i) if i % 30 == 0 else None for i in range(len(y))]},
        {},
        {"P211"},
    ),
    "3,000 categories": ({"c": lambda r, y: [f"k{i % 3000}" for i in range(len(y))]}, {}, {"P209"}),
    "an identifier": ({"c": lambda r, y: [f"k{i}" for i in range(len(y))]}, {}, {"P210"}),
    "the outcome in other words": ({"c": lambda r, y: np.where(y, "won", "lost")}, {}, {"P302"}),
    "the outcome, several words for each": (
        {"c": lambda r, y: [f"{('no', 'yes')[int(v)]}{i % 5}" for i, v in enumerate(y)]},
        {},
        {"P302"},
    ),
    "a number that gives it away": ({"c": lambda r, y: y * 3 + r.normal(size=len(y)) * 0.8}, {}, {"P301"}),
    "a number against it": ({"c": lambda r, y: -(y * 3) + r.normal(size=len(y)) * 0.8}, {}, {"P301"}),
    "missing where not bought": (
        {"c": lambda r, y: [float(r.normal()) if v else None for v in y]},
        {},
        {"P301"},
    ),
    "40 converters": ({"bought": lambda r, y: np.arange(len(y)) < 40}, {}, {"P101"}),
    "40 others": ({"bought": lambda r, y: np.arange(len(y)) >= 40}, {}, {"P102", "P104"}),
    "700 converters": ({"bought": lambda r, y: np.arange(len(y)) % 5 == 0}, {}, {"P108"}),
    "outcomes all equal, and not as stated": (
        {"bought": lambda r, y: ["lost"] * len(y)},
        {"outcome": {"column": "bought", "positive": "won"}},
        {"P105"},
    ),
    "outcomes all equal": ({"bought": lambda r, y: [False] * len(y)}, {}, {"P105"}),
    "an outcome of three values": (
        {"bought": lambda r, y: repeated(["yes", "no", "maybe"], y)},
        {"outcome": {"column": "bought", "positive": "yes"}},
        {"P106"},
    ),
    "an outcome of unknown words": ({"bought": lambda r, y: repeated(["a", "b"], y)}, {}, {"P106"}),
    "a missing outcome": (
        {"bought": lambda r, y: [None if i % 50 == 0 else bool(v) for i, v in enumerate(y)]},
        {},
        {"P203"},
    ),
    "too many missing outcomes": (
        {"bought": lambda r, y: [None if i % 5 == 0 else bool(v) for i, v in enumerate(y)]},
        {},
        {"P204"},
    ),
    "codes": ({"region_id": lambda r, y: r.integers(1, 9, len(y))}, {}, {"P214"}),
    "codes that are declared": (
        {"region_id": lambda r, y: r.integers(1, 9, len(y))},
        {"source": {"key": "customer", "attributes": {"region_id": "category"}}},
        set(),
    ),
    "a time": ({"t": lambda r, y: [datetime(2024, 1, 1) + timedelta(hours=i) for i in range(len(y))]}, {}, {"P212"}),
    "a time after the decision": (
        {
            "t": lambda r, y: [datetime(2024, 2, 1) + timedelta(hours=i) for i in range(len(y))],
            "at": lambda r, y: [datetime(2024, 1, 1) + timedelta(hours=i) for i in range(len(y))],
        },
        {"source": {"key": "customer", "order": "at"}},
        {"P303"},
    ),
    "another rate in the test rows": (
        {"bought": lambda r, y: [i % (4 if i < 3200 else 2) == 0 for i in range(len(y))]},
        {"source": {"key": "customer", "order": "file"}},
        {"P107", "P108"},
    ),
    "numbers among other texts": (
        {"c": lambda r, y: ["n/a" if i % 3 == 0 else f"{v:.3f}" for i, v in enumerate(r.normal(size=len(y)))]},
        {},
        {"P209", "P215"},
    ),
    "decimal commas": (
        {"c": lambda r, y: [f"{v:.3f}".replace(".", ",") for v in r.normal(size=len(y))]},
        {},
        {"P209", "P215"},
    ),
    "a segment that is a number": ({}, {"segments": ["amount"]}, {"P001"}),
    "a parameter that is not there": ({}, {"models": ["baseline", {"lightgbm": {"n_trees": 5}}]}, {"P001"}),
    "no key": ({}, {"source": {}, "exclude": {"customer": "not here"}}, {"P206", "P213"}),
    "a column that is not there": ({}, {"source": {"key": "kunde"}}, {"P003"}),
    "a file that is not there": ({}, {"source": {"path": "gone.parquet"}}, {"P001"}),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_trouble_has_its_code(tmp_path, trouble):
    columns, changes, expected = TROUBLES[trouble]
    campaign = table_campaign(tmp_path, b"", "data.parquet", **{"source": {"key": "customer"}, **changes})
    pq.write_table(sound(**columns), tmp_path / "data.parquet")
    diagnosis = look(campaign, tmp_path / "home")
    assert codes(diagnosis) == expected, [f.sentence for f in diagnosis.findings]
    assert not (tmp_path / "home").exists(), "a doctor writes nothing"


def test_what_a_finding_says(tmp_path):
    campaign = table_campaign(tmp_path, b"", "data.parquet", source={"key": "customer"})
    pq.write_table(sound(bought=lambda r, y: np.arange(len(y)) % 20 == 0), tmp_path / "data.parquet")
    (finding,) = look(campaign, tmp_path / "home").findings
    assert finding.severity == "error"
    assert finding.sentence.startswith("P101 too few converters: ")
    assert " in 3,183 rows to learn from, " in finding.sentence
    assert finding.sentence.endswith("500 needed. Use more rows, or another outcome.")


def test_the_words_of_the_design():
    diagnosis = Diagnosis("x")
    judge_counts(diagnosis, "outcome", 90_000, 212, "in 26 training snapshots", 500)
    assert [f.sentence for f in diagnosis.findings] == [
        "P101 too few converters: 212 in 26 training snapshots, 500 needed. Widen horizon_days or add snapshots."
    ]


def shop_of(make_shop, seed: int = 0, n: int = 4_000, **changes):
    """A shop whose orders fill the year; customers have bought since the first day."""
    rng = np.random.default_rng(seed)
    start = datetime(2024, 1, 1)
    customers = [
        {"customer_id": str(i), "signup_at": start, "age": 20 + i % 50, "country": ("DE", "FR")[i % 2]}
        for i in range(300)
    ]
    orders = [
        {
            "order_id": str(i),
            "customer_id": str(int(c)),
            "ordered_at": start + timedelta(minutes=int(m)),
            "amount": 10.0,
            "category": "a",
        }
        for i, (c, m) in enumerate(zip(rng.integers(0, 300, n), rng.integers(0, 366 * 1440, n), strict=True))
    ]
    settings = {"snapshots": {"every": "7d", "train": 8, "validate": 3, "test": 3}, **changes}
    return make_shop(
        changes.pop("customers", lambda c: c)(customers),
        changes.pop("orders", lambda o: o)(orders),
        **{k: v for k, v in settings.items() if k not in ("customers", "orders")},
    )


def test_a_sound_shop(make_shop):
    shop = shop_of(make_shop, n=2_000, min_converters=100)
    diagnosis = look(shop.campaign, shop.home.root)
    assert codes(diagnosis) == {"P205"}, [f.sentence for f in diagnosis.findings]
    assert [o.split for o in diagnosis.outcome] == ["train"] * 8 + ["validate"] * 3 + ["test"] * 3
    assert {t.table for t in diagnosis.tables} == {"orders", "customers"}
    assert ("orders_count_30d", "number of orders") in diagnosis.features
    json.loads(diagnosis.to_json())


def test_the_doctor_counts_like_the_pipeline(make_shop):
    """Rows and converters of every snapshot, before any feature is computed."""
    from propensity_dagster.data.ingest import ingest_entities, ingest_stream
    from propensity_dagster.data.validate import validate_entities, validate_stream
    from propensity_dagster.features.activity import build_activity
    from propensity_dagster.features.snapshots import SPLITS, publish_training_set

    shop = shop_of(
        make_shop,
        eligibility={"active_within_days": 40, "min_tenure_days": 0},
        customers=lambda c: [{**r, "signup_at": datetime(2024, 1, 1) + timedelta(days=i)} for i, r in enumerate(c)],
        outcome={"stream": "orders", "gap_days": 2, "horizon_days": 20},
    )
    days = (date(2024, 1, 1), date(2024, 12, 31))
    with open_engine() as engine:
        ingest_entities(shop.campaign, shop.home, engine)
        validate_entities(shop.campaign, shop.home, engine)
        ingest_stream(shop.campaign, "orders", *days, shop.home, engine)
        validate_stream(shop.campaign, "orders", *days, shop.home, engine)
        build_activity(shop.campaign, *days, shop.home, engine)
        publish_training_set(shop.campaign, shop.home, engine)
    splits = pq.read_table(shop.home.lake("shop").file(SPLITS)).to_pylist()
    expected = [(s["snapshot"], s["split"], s["rows"], s["converted"]) for s in splits if s["split"] != "embargo"]
    for ingested in (False, True):
        with open_engine() as engine:
            found = diagnose(shop.campaign, shop.home, engine, ingested=ingested).outcome
        assert [(o.snapshot, o.split, o.rows, o.converted) for o in found] == expected


SHOP_TROUBLES = {
    "strangers": ({"customers": lambda c: c[:150]}, {"P201"}),
    "keys given twice": ({"customers": lambda c: [*c, {**c[0], "age": 77}]}, {"P202"}),
    "rows without a key": (
        {
            "orders": lambda o: [
                {**r, "customer_id": None if i % 30 == 0 else r["customer_id"]} for i, r in enumerate(o)
            ]
        },
        {"P203"},
    ),
    "too few converters": ({"orders": lambda o: o[::40], "min_converters": 500}, {"P101"}),
    "too little history": ({"snapshots": {"every": "7d", "train": 60, "validate": 3, "test": 3}}, {"P103"}),
    "nothing counts": ({"outcome": {"stream": "orders", "horizon_days": 30, "minimum_amount": 1e6}}, {"P105"}),
    "a table that is not there": ({"source_table": "ordrs"}, {"P001"}),
}


@pytest.mark.parametrize("trouble", SHOP_TROUBLES)
def test_troubles_of_event_logs(make_shop, trouble):
    changes, expected = SHOP_TROUBLES[trouble]
    changes = dict(changes)
    table = changes.pop("source_table", None)
    shop = shop_of(make_shop, **{"min_converters": 20, **changes})
    campaign = shop.campaign
    if table:
        stream = campaign.source.streams["orders"].model_copy(update={"table": table})
        source = campaign.source.model_copy(update={"streams": {"orders": stream}})
        campaign = campaign.model_copy(update={"source": source})
    diagnosis = look(campaign, shop.home.root)
    assert expected <= codes(diagnosis), [f.sentence for f in diagnosis.findings]


def test_an_attribute_that_knows_the_future(make_shop):
    shop = shop_of(make_shop, n=900, min_converters=20)
    orders = pq.read_table(shop.folder / "orders.parquet").to_pylist()
    test = date(2024, 12, 1)
    buyers = {o["customer_id"] for o in orders if test <= o["ordered_at"].date() < test + timedelta(days=30)}
    customers = pq.read_table(shop.folder / "customers.parquet").to_pylist()
    told = [{**c, "country": "A" if c["customer_id"] in buyers else "B"} for c in customers]
    pq.write_table(pa.Table.from_pylist(told), shop.folder / "customers.parquet")
    assert {"P302", "P301"} & codes(look(shop.campaign, shop.home.root))


def command(*arguments: str, home: Path) -> subprocess.CompletedProcess:
    import os

    environment = {**os.environ, "PROPENSITY_HOME": str(home)}
    line = [sys.executable, "-m", "propensity_dagster.cli", "doctor", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("good.csv", PLAIN),
        ("picture.csv", bytes(range(256)) * 30),
        ("ragged.csv", "a,b,bought\n1,2,yes\n1\n1,2,3,4,5,no\n"),
        ("cases.csv", "Age,age,bought\n1,2,yes\n2,3,no\n"),
        ("empty.csv", ""),
    ],
)
def test_the_command_line_never_shows_a_stack_trace(tmp_path, name, text):
    table_campaign(tmp_path, text, name)
    shown = command(str(tmp_path / "campaign.yaml"), home=tmp_path / "home")
    assert shown.returncode == 1
    assert "Traceback" not in shown.stdout + shown.stderr
    assert "P" in shown.stdout
    as_json = command(str(tmp_path / "campaign.yaml"), "--json", home=tmp_path / "home")
    found = json.loads(as_json.stdout)["findings"]
    assert found
    assert all(f["code"] in CODES and f["message"] for f in found)


def test_a_broken_campaign_file_is_json_too(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("name: broken\nsource: {kind: table, path: x.csv}\noutcome: {column: y}\nexlude: {}\n")
    shown = command(str(file), "--json", home=tmp_path / "home")
    assert shown.returncode == 1
    (finding,) = json.loads(shown.stdout)["findings"]
    assert finding["code"] == "P001"
    assert "did you mean 'exclude'?" in finding["message"]


def test_an_error_stops_the_training_job(tmp_path):
    import dagster as dg

    from propensity_dagster.components.campaign_folder import campaign_definitions
    from propensity_dagster.runtime import Runtime

    campaign = table_campaign(tmp_path, b"", "data.parquet", source={"key": "customer"})
    pq.write_table(sound(told=lambda r, y: np.where(y, "won", "lost")), tmp_path / "data.parquet")
    runtime = Runtime(Home(tmp_path / "home").ensure())
    defs = dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": runtime}))
    with dg.DagsterInstance.ephemeral() as instance:
        run = defs.resolve_job_def("past__train").execute_in_process(instance=instance, raise_on_error=False)
    assert not run.success
    assert [e.step_key for e in run.all_events if e.is_step_failure] == ["past__diagnosis"]
    failed = next(e for e in run.all_events if e.is_step_failure)
    assert "P302" in failed.step_failure_data.user_failure_data.description
    assert not runtime.home.lake("past").file("training_set").exists()


def test_negatives_that_are_left_out_do_not_count():
    diagnosis = Diagnosis("shop")
    judge_counts(diagnosis, "outcome.orders", 101_000, 1_000, "in 26 training snapshots", 500, kept=0.001)
    (found,) = diagnosis.findings
    assert found.code == "P102"
    assert "100 in 26 training snapshots did not convert and are kept (0.1%, snapshots.keep_negatives)" in found.message
