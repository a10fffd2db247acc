"""Tables of past decisions: reading them as they come, splitting, training, and scoring new rows."""

import json
import os
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from propensity_dagster.campaign import TableCampaign, load_campaign
from propensity_dagster.data.decisions import (
    ingest_decisions,
    publish_new_rows,
    resolve_outcome,
    rows_to_score,
    validate_decisions,
)
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.errors import (
    ConfigError,
    DataContractError,
    InsufficientDataError,
    PropensityError,
    SourceError,
)
from propensity_dagster.features.past_decisions import publish_decision_training_set

PLAIN = """id,age,job title,net.worth,bought
1,30,nurse,100.5,yes
2,41,cook,-3,no
3,,nurse,7,no
4,55,clerk,1e3,yes
"""


def table_campaign(folder: Path, text: str | bytes = PLAIN, name: str = "data.csv", **changes) -> TableCampaign:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    source = {"kind": "table", "path": name, **changes.pop("source", {})}
    content = {"name": "past", "source": source, "outcome": {"column": "bought"}, **changes}
    file = folder / "campaign.yaml"
    file.write_text(yaml.safe_dump(content))
    campaign = load_campaign(file)
    assert isinstance(campaign, TableCampaign)
    return campaign


def validated(campaign: TableCampaign, home: Home) -> pa.Table:
    with open_engine() as engine:
        ingest_decisions(campaign, home, engine)
        validate_decisions(campaign, home, engine)
    return pq.read_table(home.lake("past").file("validated_decisions"))


DIALECTS = {
    "comma": PLAIN,
    "semicolon": PLAIN.replace(",", ";"),
    "tab": PLAIN.replace(",", "\t"),
    "pipe": PLAIN.replace(",", "|"),
    "quoted": "\n".join(",".join(f'"{v}"' if v else "" for v in line.split(",")) for line in PLAIN.splitlines()),
    "byte order mark": "\ufeff" + PLAIN,
    "windows ends of lines": PLAIN.replace("\n", "\r\n"),
    "TRUE and FALSE": PLAIN.replace("yes", "TRUE").replace("no\n", "FALSE\n"),
    "1 and 0": PLAIN.replace("yes", "1").replace("no\n", "0\n"),
    "1.0 and 0.0": PLAIN.replace("yes", "1.0").replace("no\n", "0.0\n"),
    "Y and N, with blanks": PLAIN.replace("yes", " Y").replace("no\n", "N \n"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_table(tmp_path, dialect):
    expected = validated(table_campaign(tmp_path / "a", source={"key": "id"}), Home(tmp_path / "home_a"))
    found = validated(
        table_campaign(tmp_path / "b", DIALECTS[dialect], source={"key": "id"}), Home(tmp_path / "home_b")
    )
    assert found == expected
    assert expected.column_names == ["id", "position", "age", "job title", "net.worth", "converted"]
    assert expected["converted"].to_pylist() == [True, False, False, True]
    assert expected["net.worth"].to_pylist() == [100.5, -3.0, 7.0, 1000.0]
    assert expected["age"].to_pylist() == [30.0, 41.0, None, 55.0]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8"])
def test_encodings(tmp_path, encoding):
    text = PLAIN.replace("nurse", "Pflegekräftin").replace("cook", "Köchin")
    found = validated(table_campaign(tmp_path, text.encode(encoding)), Home(tmp_path / "home"))
    assert found["job title"].to_pylist() == ["Pflegekräftin", "Köchin", "Pflegekräftin", "clerk"]


def test_without_a_key_the_row_number_is_the_key(tmp_path):
    found = validated(table_campaign(tmp_path), Home(tmp_path / "home"))
    assert found["row_number"].to_pylist() == ["1", "2", "3", "4"]


def test_rows_keep_the_order_of_the_file(tmp_path):
    """Also when several threads read a file of many row groups."""
    n = 700_000
    table = pa.table({"n": pa.array(np.arange(n)), "bought": pa.array(np.arange(n) % 3 == 0)})
    campaign = table_campaign(tmp_path, b"", "data.parquet")
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=50_000)
    found = validated(campaign, Home(tmp_path / "home"))
    assert np.array_equal(found["position"].to_numpy(), np.arange(1, n + 1))
    assert np.array_equal(found["n"].to_numpy(), np.arange(n))


def test_sentinels_categories_exclusions_filters_and_derived_columns(tmp_path):
    text = "zip,pdays,note,when,y\n01234,999,?,5,1\n01235,3,x,6,0\n01236,999.0,?,7,1\n09999,1,z,8,0\n"
    campaign = table_campaign(
        tmp_path,
        text,
        source={
            "attributes": {"zip": "category"},
            "where": "zip <> '09999'",
            "derive": {"twice": "pdays * 2"},
        },
        outcome={"column": "y", "positive": 1},
        exclude={"when": "known only afterwards"},
        missing={"pdays": 999, "*": "?"},
    )
    found = validated(campaign, Home(tmp_path / "home"))
    assert found.column_names == ["row_number", "position", "zip", "pdays", "note", "twice", "converted"]
    assert found["zip"].to_pylist() == ["01234", "01235", "01236"]
    assert found["pdays"].to_pylist() == [None, 3.0, None]
    assert found["note"].to_pylist() == [None, "x", None]
    assert found["position"].to_pylist() == [1, 2, 3]


def test_bad_rows_go_to_quarantine_with_a_reason(tmp_path):
    rows = "".join(f"{20 + i % 40},{'yes' if i % 3 else 'no'}\n" for i in range(60))
    text = "age,bought\n" + rows + "old,yes\n50,\n51,perhaps\n"
    campaign = table_campaign(
        tmp_path, text, outcome={"column": "bought", "positive": "yes", "negative": "no"}, max_bad_fraction=0.1
    )
    home = Home(tmp_path / "home")
    found = validated(campaign, home)
    quarantine = pq.read_table(home.lake("past").file("quarantine_decisions")).to_pylist()
    assert found.num_rows == 60
    assert sorted((r["position"], r["reason"]) for r in quarantine) == [
        ("61", "age: not a finite number"),
        ("62", "converted: missing"),
        ("63", "converted: not a known outcome"),
    ]


OUTCOMES = [
    ({"column": "y"}, {"yes": 3, "no": 4}, ({"yes"}, {"no", "0", "false", "f", "n"})),
    ({"column": "y"}, {"true": 3, "false": 4}, ({"true"}, {"no", "0", "false", "f", "n"})),
    ({"column": "y", "positive": True}, {"yes": 3, "no": 4}, ({"yes", "1", "true", "t", "y"}, {"no"})),
    ({"column": "y", "positive": 1}, {"1": 3, "2": 4}, ({"1"}, {"2"})),
    ({"column": "y", "positive": "Sold"}, {"sold": 3, "lost": 4}, ({"sold"}, {"lost"})),
    ({"column": "y", "positive": "a", "negative": ["b", "c"]}, {"a": 3, "b": 4, "c": 1, "d": 1}, ({"a"}, {"b", "c"})),
    ({"column": "y"}, {"a": 3, "b": 4}, "say which is a conversion with outcome.positive"),
    ({"column": "y", "positive": "x"}, {"a": 3, "b": 4}, "no row is 'x'; there are a (3 rows), b (4 rows)"),
    ({"column": "y", "positive": "a"}, {"a": 3, "b": 4, "c": 1}, "has 3 values: a (3 rows), b (4 rows), c (1 rows)"),
]


@pytest.mark.parametrize(("outcome", "counts", "expected"), OUTCOMES)
def test_what_an_outcome_means(tmp_path, outcome, counts, expected):
    campaign = table_campaign(tmp_path, outcome=outcome)
    if isinstance(expected, str):
        with pytest.raises(DataContractError) as caught:
            resolve_outcome(campaign, counts)
        assert expected in str(caught.value)
    else:
        assert resolve_outcome(campaign, counts) == expected


MISTAKES = [
    ({"exclude": {"agee": "typo"}}, ConfigError, "exclude: there is no column 'agee'; there are id, age"),
    ({"exclude": {"age": " "}}, ConfigError, "exclude.age: say why"),
    ({"exclude": {"bought": "x"}}, ConfigError, "'bought' is the outcome"),
    ({"missing": {"ages": 9}}, ConfigError, "missing: there is no column 'ages'"),
    ({"segments": ["shop"]}, ConfigError, "segments: there is no column 'shop'"),
    ({"outcome": {"column": "boughd"}}, DataContractError, "there is no column 'boughd'; did you mean 'bought'?"),
    ({"source": {"key": "ID"}}, DataContractError, "there is no column 'ID'"),
    ({"source": {"attributes": ["shoe"]}}, DataContractError, "there is no column 'shoe'"),
    ({"source": {"order": "when"}}, DataContractError, "there is no column 'when'"),
    ({"source": {"path": "gone.csv"}}, ConfigError, "'gone.csv' is not there"),
    ({"source": {"path": None}}, ConfigError, "needs either 'path'"),
    ({"source": {"order": "file"}, "split": {"folds": 5}}, ConfigError, "split.folds mixes old and new rows"),
    ({"eligibility": {}}, ConfigError, "eligibility: unknown key; allowed are name"),
    ({"source": {"csv": {"separator": ";"}}}, DataContractError, "one column only: csv.separator is ';'"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_a_mistake_is_told(tmp_path, changes, kind, message):
    with pytest.raises(kind) as caught:
        validated(table_campaign(tmp_path, **changes), Home(tmp_path / "home"))
    assert message in str(caught.value)


BROKEN = {
    "another encoding than stated": (
        "añb,bought\n1,yes\n2,no\n".encode("latin-1"),
        "is not utf-8: csv.encoding may be",
    ),
    "names that differ in case": ("Age,age,bought\n1,2,yes\n2,3,no\n", "have one name, but for case"),
    "one name twice": ("age,age,bought\n1,2,yes\n2,3,no\n", "have one name, but for case"),
    "a name of ours": ("split,bought\n1,yes\n2,no\n", "a column must not be called 'split'"),
    "no rows": ("age,bought\n", "has no rows"),
    "no feature": ("bought\nyes\nno\n", "no column is left"),
    "empty": ("", "the file is empty"),
    "a picture": (bytes(range(256)) * 40, ""),
    "a ragged file": ("a,b,bought\n1,2,yes\n1\n1,2,3,4,5,no\n", ""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_end_in_one_of_our_errors(tmp_path, kind):
    text, message = BROKEN[kind]
    stated = {"csv": {"encoding": "utf-8"}} if kind == "another encoding than stated" else {}
    with pytest.raises(PropensityError) as caught:
        validated(table_campaign(tmp_path, text, source=stated), Home(tmp_path / "home"))
    assert message in str(caught.value)


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path):
    campaign = table_campaign(tmp_path)
    changed = pytest.raises(SourceError, match="changed while it was read")
    with open_engine() as engine, changed, engine.unchanged_files():
        engine.note_files([tmp_path / "data.csv"])
        (tmp_path / "data.csv").write_text(PLAIN + "5,20,cook,1,no\n")
    assert validated(campaign, Home(tmp_path / "home")).num_rows == 5


def made_up(rows: int, seed: int = 0, first: int = 0) -> pa.Table:
    """Decisions of repeating customers over two years, of which some can be foretold."""
    rng = np.random.default_rng(seed)
    age = rng.integers(18, 90, rows)
    channel = rng.integers(0, 4, rows)
    noise = rng.normal(size=rows)
    z = -1.5 + 0.05 * (age - 50) + 0.8 * (channel == 2) + noise
    days = np.sort(rng.integers(0, 700, rows))
    start = datetime(2023, 1, 1)
    return pa.table(
        {
            "customer": pa.array([f"c{(first + i) % (rows // 2 + 1)}" for i in range(rows)]),
            "decided": pa.array([start + timedelta(days=int(d)) for d in days], pa.timestamp("us")),
            "age of person": pa.array(age),
            "channel.code": pa.array([f"ch{c}" for c in channel]),
            "noise": pa.array(rng.normal(size=rows)),
            "bought": pa.array(rng.random(rows) < 1 / (1 + np.exp(-z))),
        }
    )


def split_of(folder: Path, table: pa.Table, **changes) -> tuple[TableCampaign, pa.Table, Home]:
    campaign = table_campaign(folder, b"", "data.parquet", **changes)
    pq.write_table(table, folder / "data.parquet")
    home = Home(folder / "home")
    validated(campaign, home)
    with open_engine() as engine:
        publish_decision_training_set(campaign, home, engine)
    return campaign, pq.read_table(home.lake("past").file("training_set")), home


def test_the_newest_rows_test_and_days_stay_whole(tmp_path):
    table = made_up(5_000)
    campaign, found, home = split_of(tmp_path, table, source={"order": "decided", "key": "customer"})
    decided = pq.read_table(home.lake("past").file("validated_decisions"))["decided_at"].to_numpy()
    is_test = found["split"].to_numpy(zero_copy_only=False) == "test"
    assert decided[~is_test].max() < decided[is_test].min()
    assert abs(is_test.mean() - campaign.split.test) < 0.01
    splits = pq.read_table(home.lake("past").file("splits")).to_pylist()
    assert splits[1]["snapshot"].startswith(str(decided[is_test].min())[:10])


def test_the_order_of_the_file_splits(tmp_path):
    _, found, _ = split_of(tmp_path, made_up(1_000), source={"order": "file"})
    assert found["split"].to_pylist() == ["train"] * 800 + ["test"] * 200


def test_a_row_that_tests_tests_for_ever(tmp_path):
    """The hash keeps a customer on one side, also when the table has grown."""
    source = {"key": "customer"}
    exclude = {"decided": "the order is not used here"}
    _, before, _ = split_of(tmp_path / "a", made_up(2_000), source=source, exclude=exclude)
    grown = pa.concat_tables([made_up(2_000), made_up(3_000, seed=1, first=300)])
    _, after, _ = split_of(tmp_path / "b", grown, source=source, exclude=exclude)
    sides = dict(zip(before["customer"].to_pylist(), before["split"].to_pylist(), strict=True))
    assert set(sides.values()) == {"train", "test"}
    for customer, side in zip(after["customer"].to_pylist(), after["split"].to_pylist(), strict=True):
        assert sides.setdefault(customer, side) == side
    assert 0.16 < np.mean([side == "test" for side in sides.values()]) < 0.24


def test_folds_test_every_customer_once(tmp_path):
    _, found, _ = split_of(tmp_path, made_up(3_000), source={"key": "customer"}, split={"folds": 4})
    folds = {}
    for customer, fold in zip(found["customer"].to_pylist(), found["fold"].to_pylist(), strict=True):
        assert folds.setdefault(customer, fold) == fold
    assert set(folds.values()) == {0, 1, 2, 3}


MODELS = [
    "baseline",
    "logistic_regression",
    {"lightgbm": {"max_rounds": 40}},
    {"neural_network": {"max_epochs": 2}},
    "ensemble",
]


def run_through_dagster(campaign: TableCampaign, home: Home):
    """Definitions and instance after a training run."""
    import dagster as dg

    from propensity_dagster.components.campaign_folder import campaign_definitions
    from propensity_dagster.components.launch import run_campaign
    from propensity_dagster.runtime import Runtime

    runtime = Runtime(home.ensure())
    defs = dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": runtime}))
    instance = dg.DagsterInstance.ephemeral()
    run_campaign(campaign, runtime, defs, instance)
    return runtime, defs, instance


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "inbox").mkdir()
    campaign = table_campaign(
        folder,
        b"",
        "data.parquet",
        source={"key": "customer"},
        exclude={"decided": "the order is not used here"},
        models=MODELS,
        segments=["channel.code"],
        schedule={"watch": "inbox"},
        min_converters=100,
    )
    pq.write_table(made_up(6_000), folder / "data.parquet")
    home = Home(folder / "home")
    return campaign, home, *run_through_dagster(campaign, home)


def drop_file(campaign: TableCampaign, name: str, table: pa.Table, day: date) -> Path:
    file = campaign.file.parent / "inbox" / name
    pq.write_table(table, file)
    instant = datetime(day.year, day.month, day.day, 12, tzinfo=UTC).timestamp()
    os.utime(file, (instant, instant))
    return file


def test_a_table_becomes_a_champion(trained):
    _, home, runtime, *_ = trained
    record = json.loads((home.reports("past") / "evaluation.json").read_text())
    assert record["decision"]["promoted"]
    assert record["models"][record["challenger"]]["auc"]["value"] > 0.68
    assert record["snapshots"] == {"train": ["80% by hash of customer"], "test": ["20% by hash of customer"]}
    assert json.loads((home.reports("past") / "diagnosis.json").read_text())["findings"] == []
    assert runtime.store.champion("past").version == "1"


def test_dropped_files_are_scored_as_of_their_day(trained):
    import dagster as dg

    campaign, home, _, defs, instance = trained
    day = date(2024, 6, 3)
    fresh = made_up(400, seed=9).drop_columns(["bought", "decided"]).slice(0, 150)
    drop_file(campaign, "one.parquet", fresh, day)
    sensor = defs.resolve_sensor_def("past__dropped_files")
    repository = defs.get_repository_def()
    result = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, repository_def=repository))
    assert [r.partition_key for r in result.run_requests] == [str(day)]
    context = dg.build_sensor_context(instance=instance, cursor=result.cursor, repository_def=repository)
    assert not sensor.evaluate_tick(context).run_requests
    run = defs.resolve_job_def("past__score").execute_in_process(instance=instance, partition_key=str(day))
    assert run.success
    scores = pq.read_table(home.lake("past").partition("scores", "snapshot", day))
    assert scores["customer"].to_pylist() == sorted(fresh["customer"].to_pylist())


def test_missing_columns_and_unseen_categories_are_counted(trained):
    campaign, home, _, defs, instance = trained
    day = date(2024, 6, 4)
    fresh = made_up(400, seed=9).drop_columns(["bought", "decided", "age of person"]).slice(0, 100)
    channels = pa.array(["moon"] * 7 + fresh["channel.code"].to_pylist()[7:])
    fresh = fresh.set_column(fresh.column_names.index("channel.code"), "channel.code", channels)
    file = drop_file(campaign, "two.parquet", pa.concat_tables([fresh, fresh.slice(0, 1)]), day)
    config = {"ops": {"past__features": {"config": {"rows": [str(file)]}}}}
    run = defs.resolve_job_def("past__score").execute_in_process(
        instance=instance, partition_key=str(day), run_config=config
    )
    assert run.success
    checks = {c.check_name: c for c in run.get_asset_check_evaluations()}
    assert checks["no_column_missing"].metadata["columns"].value == "age of person"
    assert checks["no_unseen_category"].metadata["rows"].value == str({"2024-06-04": {"channel.code": 7}})
    assert checks["no_bad_rows"].metadata["quarantined"].value == 1  # a key may be scored once
    assert not any(checks[c].passed for c in ("no_column_missing", "no_unseen_category", "no_bad_rows"))
    assert pq.read_table(home.lake("past").partition("scores", "snapshot", day)).num_rows == 100


def test_training_rows_score_the_same_when_they_come_back_as_a_file(trained, tmp_path):
    """CSV, other order of columns: what the model sees is the same."""
    import duckdb

    from propensity_dagster.scoring.promotion import require_champion

    campaign, home, runtime, *_ = trained
    _, model = require_champion(campaign, runtime.store)
    rows = pq.read_table(home.lake("past").file("training_set")).slice(0, 800)
    firsts = {key: i for i, key in reversed(list(enumerate(rows["customer"].to_pylist())))}
    once = rows.take(sorted(firsts.values()))
    columns = [*model.contract.names[::-1], "customer"]
    duckdb.from_arrow(once.select(columns)).write_csv(str(tmp_path / "again.csv"), sep="|")
    day = date(2024, 6, 5)
    with open_engine() as engine:
        publish_new_rows(campaign, day, [str(tmp_path / "again.csv")], home, engine)
    back = pq.read_table(home.lake("past").partition("features", "snapshot", day))
    found = dict(zip(back["customer"].to_pylist(), model.predict_proba(back).tolist(), strict=True))
    expected = dict(zip(once["customer"].to_pylist(), model.predict_proba(once).tolist(), strict=True))
    assert found == expected


def test_the_filter_of_past_decisions_leaves_no_row_unscored(tmp_path):
    """A trial's arm is known of the past; who is scored has none."""
    text = "arm,age,bought\n" + "".join(f"{'ab'[i % 2]},{20 + i % 50},{'yes' if i % 3 else 'no'}\n" for i in range(60))
    campaign = table_campaign(tmp_path, text, source={"where": "arm = 'a'"}, exclude={"arm": "the same for all"})
    home = Home(tmp_path / "home")
    assert validated(campaign, home).num_rows == 30
    (tmp_path / "new.csv").write_text("age\n30\n40\n")
    with open_engine() as engine:
        assert publish_new_rows(campaign, date(2024, 5, 1), ["new.csv"], home, engine).good == 2


def test_where_the_rows_to_score_come_from(tmp_path):
    campaign = table_campaign(tmp_path, schedule={"watch": "."})
    today = datetime.fromtimestamp(time.time(), UTC).date()
    assert rows_to_score(campaign, date(2024, 1, 5), ["a.csv"]) == ["a.csv"]
    assert rows_to_score(campaign, today, []) == [str(tmp_path / "data.csv")]
    with pytest.raises(InsufficientDataError, match="there is nothing to score on 2024-01-05"):
        rows_to_score(campaign, date(2024, 1, 5), [])
    stated = table_campaign(tmp_path, source={"new_rows": "fresh.csv"})
    assert rows_to_score(stated, date(2024, 1, 5), []) == ["fresh.csv"]


def test_folds_judge_every_row_by_a_model_that_never_saw_it(tmp_path):
    campaign = table_campaign(
        tmp_path,
        b"",
        "data.parquet",
        source={"key": "customer"},
        exclude={"decided": "the order is not used here"},
        split={"folds": 3},
        models=["baseline", "logistic_regression"],
        search={"seconds": 9, "trials": 2, "models": ["logistic_regression"]},
        min_converters=100,
    )
    pq.write_table(made_up(3_000), tmp_path / "data.parquet")
    home = Home(tmp_path / "home")
    *_, instance = run_through_dagster(campaign, home)
    record = json.loads((home.reports("past") / "evaluation.json").read_text())
    assert record["rows"] == 3_000
    import dagster as dg

    shown = instance.get_latest_materialization_event(dg.AssetKey(["past", "candidate_logistic_regression"]))
    metadata = shown.asset_materialization.metadata
    assert metadata["search_trials"].value == 2
    assert metadata["search_log_loss_best"].value <= metadata["search_log_loss_as_stated"].value
    assert "data:image/png" in metadata["search"].md_str
    assert (home.candidates("past") / "fold1" / "logistic_regression" / "model.json").exists()
    assert record["training"]["logistic_regression"]["rows"]["train"] < 2_300
