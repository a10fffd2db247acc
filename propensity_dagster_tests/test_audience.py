"""The audience: nobody without consent, the same people held for as long, what is sent is sent once."""

import json
import sqlite3
import threading
from datetime import date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chi2_contingency

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.days import pc
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.errors import ConfigError, DataContractError, PlanError, SourceError
from propensity_dagster.experiments.assignment import assign
from propensity_dagster.experiments.holdout import hold_out
from propensity_dagster.scoring import exports
from propensity_dagster.scoring.audiences import (
    AUDIENCE,
    CONTACT,
    HELD,
    RANDOM,
    RANDOM_HELD,
    contacted_keys,
    delivered_audiences,
    exported_contacts,
)
from propensity_dagster.scoring.contacts import audience_violations, publish_audience
from propensity_dagster.scoring.exports import export_audience
from propensity_dagster.scoring.permission import permission
from propensity_dagster_tests import postgres
from propensity_dagster_tests.conftest import shop_file
from propensity_dagster_tests.postgres import as_admin

DAY, NOW = date(2024, 6, 1), datetime(2024, 6, 2)
VALUE = {"margin_per_conversion": 10, "cost_per_contact": 1}
FREE = {"consent": "not_required"}


class Scored:
    """A campaign in a folder, whose customers c0, c1, ... are scored at will."""

    def __init__(self, folder, **sections):
        self.folder, self.home = folder, Home(folder / "home").ensure()
        self.load(**sections)

    def load(self, **sections):
        self.campaign = load_campaign(shop_file(self.folder, **{"value": VALUE, "contacts": FREE, **sections}))

    def score(self, probability, day=DAY, country=None):
        n = len(probability)
        keys = [f"c{i}" for i in range(n)]
        rank = np.argsort(np.argsort(-np.asarray(probability), kind="stable"))
        table = pa.table(
            {
                "customer_id": pa.array(keys, pa.string()),
                "probability": pa.array(probability, pa.float64()),
                "decile": pa.array(1 + 10 * rank // max(n, 1), pa.int8()),
                "model_version": pa.array(["1"] * n, pa.string()),
            }
        )
        lake = self.home.lake(self.campaign.name)
        publish_table(table, lake.partition("scores", "snapshot", day))
        text = pa.string()
        features = pa.table({"customer_id": pa.array(keys, text), "country": pa.array(country or ["DE"] * n, text)})
        publish_table(features, lake.partition("features", "snapshot", day))

    def audience(self, day=DAY, now=NOW, **limits):
        with open_engine() as engine:
            self.plan = publish_audience(self.campaign, day, self.home, engine, now, **limits)
        file = self.home.lake(self.campaign.name).partition(AUDIENCE, "snapshot", day)
        rows = pq.read_table(file)
        assert not any(audience_violations(self.campaign, day, self.home).values())
        return {
            group: set(rows.filter(pc.equal(rows["group"], group))["customer_id"].to_pylist())
            for group in (CONTACT, HELD, RANDOM, RANDOM_HELD)
        }

    def export(self, day=DAY, now=NOW):
        with open_engine() as engine:
            (export,) = self.campaign.contacts.exports
            return export_audience(self.campaign, export, day, self.home, engine, now)


@pytest.fixture
def scored(tmp_path):
    return Scored(tmp_path)


def consents(folder, rows, columns="customer_id,granted"):
    (folder / "consents.csv").write_text("\n".join([columns, *rows]))


ALL = [0.9] * 6


@pytest.mark.parametrize(
    ("columns", "rows", "section", "contacted"),
    [
        ("customer_id,granted", ["c0,true", "c1,false", "c2,"], {}, {"c0"}),
        ("customer_id,granted", ["c0,yes", "c1,1", "c2,T", "c3,nope", "c4,on"], {}, {"c0", "c1", "c2"}),
        ("customer_id,granted", ["c0,on", "c1,yes"], {"values": "on"}, {"c0"}),
        ("customer_id,granted", ["c0,1.0", "c0,0.0", "c1,1.0"], {}, {"c1"}),  # a refusal among equals counts
        ("id,granted", ["c0,1", " c1 ,1", ",1", "c9,1"], {"key": "id"}, {"c0", "c1"}),
        (
            "customer_id,granted,at",
            ["c0,1,2024-05-30", "c0,0,2024-05-31", "c1,0,2024-05-30", "c1,1,2024-06-01", "c2,1,", "c2,0,2024-01-01"],
            {"time": "at"},
            {"c1"},
        ),
        (  # a refusal whose time cannot be read counts as the newest, a consent from the future as none
            "customer_id,granted,at",
            ["c0,1,2024-05-30", "c0,0,31.05.2024 10:00", "c1,0,2024-05-30", "c1,1,2099-01-01", "c2,1,2024-06-01"],
            {"time": "at"},
            {"c2"},
        ),
    ],
)
def test_nobody_is_contacted_without_consent(scored, columns, rows, section, contacted):
    consents(scored.folder, rows, columns)
    scored.load(
        contacts={"consent": {"table": "consents", "granted": "granted", **section}}, holdout={"fraction": 1e-9}
    )
    scored.score(ALL)
    assert scored.audience()[CONTACT] == contacted
    assert scored.plan["excluded"]["no consent"] == 6 - len(contacted)


def test_consent_by_channel(scored):
    rows = [
        "c0,Email,1",
        "c0,phone,0",
        "c1,phone,1",
        "c2,email,1",
        "c2,,0",
        "c3,,1",
        "c4,post,1",
        "c5,email,1",
        "c5,ALL,0",
    ]
    consents(scored.folder, rows, "customer_id,how,granted")
    consent = {"table": "consents", "granted": "granted", "channel": "how"}
    scored.load(contacts={"consent": consent, "channels": {"email": 0.1, "phone": 2.0}}, holdout={"fraction": 1e-9})
    scored.score(ALL)
    assert scored.audience()[CONTACT] == {"c0", "c1"}
    assert scored.plan["by_channel"] == {"email": 1, "phone": 1}
    with pytest.raises(ConfigError, match=r"consent\.channel needs 'channels'"):
        scored.load(contacts={"consent": consent})


@pytest.mark.parametrize(
    ("consent", "error", "message"),
    [
        (None, ConfigError, r"contacts\.consent is not set, so nobody is contacted"),
        ({"table": "nowhere", "granted": "x"}, ConfigError, "table 'nowhere' is not in"),
        ({"table": "consents", "granted": "x"}, ConfigError, "there is no column 'x' in table 'consents'; there are"),
        ({"table": "empty", "granted": "granted"}, DataContractError, "'empty' has no rows: nobody is contacted"),
        (
            {"table": "consents", "granted": "granted", "time": "at", "max_age_days": 3},
            DataContractError,
            r"'consents' is stale: its newest 'at' is 2024-05-01 .*, 3 days are allowed",
        ),
        ({"connection": "duckdb://gone.duckdb", "table": "t", "granted": "g"}, ConfigError, "is not there"),
    ],
)
def test_registers_that_cannot_be_trusted_stop_everything(scored, consent, error, message):
    consents(scored.folder, ["c0,1,2024-05-01"], "customer_id,granted,at")
    (scored.folder / "empty.csv").write_text("customer_id,granted\n")
    scored.load(contacts={"consent": consent, "exports": [{"name": "crm", "kind": "csv"}]})
    scored.score(ALL)
    with pytest.raises(error, match=message):
        scored.audience()
    lake = scored.home.lake("shop")
    assert not (lake.root / AUDIENCE).exists()
    assert not (lake.root / "holdout").exists(), "nobody was drawn"
    with pytest.raises(DataContractError, match="audience snapshot=2024-06-01 has not been materialized"):
        scored.export()


def test_suppressed_customers_from_another_database(scored):
    with duckdb.connect(str(scored.folder / "crm.duckdb")) as database:
        database.execute("CREATE TABLE never AS SELECT * FROM (VALUES ('c1'), ('c3'), (NULL)) t(who)")
    with sqlite3.connect(scored.folder / "legal.sqlite") as database:
        database.execute("CREATE TABLE deceased (customer_id TEXT)")
        database.execute("INSERT INTO deceased VALUES ('c0')")
    lists = [
        {"table": "never", "key": "who", "connection": "duckdb://crm.duckdb"},
        {"table": "deceased", "connection": "sqlite://legal.sqlite"},
    ]
    scored.load(contacts={**FREE, "suppression": lists}, holdout={"fraction": 1e-9})
    scored.score(ALL)
    assert scored.audience()[CONTACT] == {"c2", "c4", "c5"}
    assert scored.plan["excluded"] == {"listed in never": 2, "listed in deceased": 1, "contacted often enough": 0}


def test_suppression_is_read_to_the_last_digit(scored):
    with duckdb.connect(str(scored.folder / "crm.duckdb")) as database:
        database.execute("CREATE TABLE exact AS SELECT 12345678901234567::DECIMAL(20,0) AS customer_id")
        database.execute("CREATE TABLE rounded AS SELECT 12345678901234567::DOUBLE AS customer_id")
    keys = ["12345678901234567", "12345678901234568"]

    def suppressed(table):
        scored.load(contacts={**FREE, "suppression": [{"table": table, "connection": "duckdb://crm.duckdb"}]})
        with open_engine() as engine:
            return (
                permission(scored.campaign, pa.array(keys), ["contact"], scored.home, engine, NOW)
                .allowed[:, 0]
                .tolist()
            )

    assert suppressed("exact") == [False, True]
    with pytest.raises(
        DataContractError, match="1 keys of table 'rounded' cannot be read as keys: whom they are about"
    ):
        suppressed("rounded")


def test_two_campaigns_of_one_night_know_of_each_other(scored):
    scored.load(holdout={"fraction": 1e-9})
    scored.score(ALL)
    scored.audience()
    other = Scored(scored.folder / "home", name="other", contacts={**FREE, "at_most": {"campaigns": ["shop"]}})
    other.home = scored.home
    other.score([0.9] * 8)
    assert other.audience()[CONTACT] | other.audience()[HELD] == {"c6", "c7"}


def test_equal_customers_at_the_cut_off_are_held_like_the_others(scored):
    scored.load(value={**VALUE, "capacity": 100}, holdout={"fraction": 0.2})
    scored.score([0.5] * 1000)
    found = scored.audience()
    assert len(found[CONTACT]) == 100
    assert 10 <= len(found[HELD]) <= 45, "of 200 held about an eighth would have been contacted"


def test_nobody_is_contacted_more_often_than_the_cap(scored):
    """Those who are held count as contacted: else they would be chosen more often than their like."""
    scored.load(contacts={**FREE, "at_most": {"contacts": 2, "days": 21}}, holdout={"fraction": 0.2, "keep_days": 300})
    chosen = []
    for week in range(6):
        day = DAY + timedelta(days=7 * week)
        scored.score([0.9] * 50, day)
        found = scored.audience(day)
        chosen.append(found[CONTACT] | found[HELD])
    assert [len(c) for c in chosen] == [50, 50, 0, 50, 50, 0]
    other = Scored(
        scored.folder / "home", name="other", contacts={**FREE, "at_most": {"days": 30, "campaigns": ["shop"]}}
    )
    other.home = scored.home
    other.score([0.9] * 60, DAY + timedelta(days=28))
    found = other.audience(DAY + timedelta(days=28))
    spared = scored.audience()[HELD] | {f"c{i}" for i in range(50, 60)}
    assert found[CONTACT] | found[HELD] == spared, "who was held by the other campaign was not contacted by it"


def test_held_customers_stay_held_and_are_like_the_others(scored):
    rng = np.random.default_rng(0)
    probability = rng.beta(1, 10, 4000)
    country = rng.choice(["DE", "FR", "IT"], 4000).tolist()
    scored.load(holdout={"fraction": 0.05, "keep_days": 90, "strata": ["country"]})
    scored.score(probability, country=country)
    keys = pq.read_table(scored.home.lake("shop").partition("scores", "snapshot", DAY))["customer_id"].combine_chunks()

    def held(day=DAY, rows=slice(None), keep=True):
        strata = np.array(country, dtype=object)[rows]
        taken = keys.take(pa.array(np.arange(4000)[rows]))
        return dict(
            zip(taken.to_pylist(), hold_out(scored.campaign, day, taken, strata, scored.home, keep=keep), strict=True)
        )

    preview = held(keep=False)
    first = held()
    assert first == preview, "what a plan shows is what the audience does"
    assert sum(first.values()) == pytest.approx(200, abs=3), "exact in each stratum but for one"
    for name in ("DE", "FR", "IT"):
        members = [f for f, c in zip(first.values(), country, strict=True) if c == name]
        assert abs(sum(members) - 0.05 * len(members)) <= 1
    later = held(DAY + timedelta(days=60), slice(500, None))
    assert all(first[key] == value for key, value in later.items())
    again = held(DAY + timedelta(days=90))
    both = sum(again[key] and first[key] for key in first)
    assert sum(again.values()) == pytest.approx(200, abs=3)
    assert both < 30, "a new draw: a twentieth of the held are held again"


def test_the_share_is_kept_whatever_the_size_of_a_stratum(scored):
    """One new customer a night: one in four is held over the nights, neither none nor all."""
    scored.load(holdout={"fraction": 0.25})
    one = np.array(["s"], dtype=object)
    days = [
        hold_out(scored.campaign, DAY + timedelta(days=i), pa.array(["n"]), one, scored.home, keep=False)[0]
        for i in range(2000)
    ]
    assert np.mean(days) == pytest.approx(0.25, abs=0.04)


def test_holdouts_of_campaigns_are_independent(scored):
    strata = np.array(["s"] * 3000, dtype=object)
    keys = pa.array([f"c{i}" for i in range(3000)])
    dependent = 0
    for i in range(200):
        scored.load(name=f"one_{i}", holdout={"fraction": 0.1})
        one = hold_out(scored.campaign, DAY, keys, strata, scored.home, keep=False)
        scored.load(name=f"two_{i}", holdout={"fraction": 0.1})
        two = hold_out(scored.campaign, DAY, keys, strata, scored.home, keep=False)
        table = np.array([[np.sum(one & two), np.sum(one & ~two)], [np.sum(~one & two), np.sum(~one & ~two)]])
        dependent += chi2_contingency(table).pvalue < 0.05
    assert dependent <= 20, "a twentieth of 200 are below 0.05 by chance: 20 or more in one of 500 runs"


def test_contacts_by_lot_below_the_cut_off(scored):
    rng = np.random.default_rng(1)
    scored.load(contacts={**FREE, "random": 100}, value={**VALUE, "capacity": 300}, holdout={"fraction": 0.1})
    scored.score(rng.beta(1, 6, 2000))
    found = scored.audience()
    assert (len(found[CONTACT]), len(found[RANDOM])) == (200, 100), "they take their part of the capacity"
    table = pq.read_table(scored.home.lake("shop").partition(AUDIENCE, "snapshot", DAY))
    p = {g: table.filter(pc.equal(table["group"], g))["probability"].to_numpy() for g in found}
    assert p[RANDOM].max() <= p[CONTACT].min()
    assert p[RANDOM_HELD].max() <= p[HELD].min()
    assert p[RANDOM].mean() == pytest.approx(p[RANDOM_HELD].mean(), abs=0.03)
    assert scored.plan["cost"] == 300
    with pytest.raises(PlanError, match="100 is more than the capacity of 50"):
        scored.audience(capacity=50)


def test_an_audience_of_nobody(scored):
    """Nobody was eligible, or nobody may be contacted: an empty audience, and nothing to send."""
    scored.load(contacts={**FREE, "random": 3, "exports": [{"name": "crm", "kind": "csv"}]})
    scored.score([])
    assert not any(scored.audience().values())
    assert scored.export().sent == 0
    assert not (scored.home.root / "exports").exists()
    consents(scored.folder, ["c9,1"])
    scored.load(contacts={"consent": {"table": "consents", "granted": "granted"}})
    scored.score(ALL)
    assert not any(scored.audience().values())
    assert scored.plan["excluded"]["no consent"] == 6


def test_limits_of_the_run_replace_the_files(scored):
    scored.score([0.9, 0.8, 0.7, 0.05])
    scored.load(holdout={"fraction": 1e-9})
    assert scored.audience()[CONTACT] == {"c0", "c1", "c2"}
    assert scored.audience(capacity=2)[CONTACT] == {"c0", "c1"}
    assert scored.audience(budget=1.0)[CONTACT] == {"c0"}


# Exports


EXPORT = {"holdout": {"fraction": 1e-9}}


def with_export(scored, **export):
    scored.load(contacts={**FREE, "exports": [{"name": "crm", **export}]}, **EXPORT)
    scored.score(ALL)
    scored.audience()


def test_files_are_written_once(scored):
    with_export(scored, kind="csv")
    assert scored.export().sent == 6
    folder = scored.home.root / "exports" / "shop"
    (file,) = folder.iterdir()
    before = file.read_bytes(), file.stat().st_mtime_ns
    lines = before[0].decode().splitlines()
    assert (file.name, len(lines)) == ("shop_2024-06-01_crm.csv", 7)
    assert "group" not in lines[0], "whoever carries it out must not treat them differently"
    report = scored.export()
    assert (report.sent, report.before) == (0, 6)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()] == [before]
    scored.score([0.9] * 9)
    assert len(scored.audience()[CONTACT]) == 6, "an audience that was sent stays"
    with pytest.raises(DataContractError, match="was exported already: a capacity or budget comes too late"):
        scored.audience(capacity=3)


def test_an_export_says_who_gets_which_variant(scored):
    stated = {
        "units": "audience",
        "variants": {"control": 0.5, "warm": 0.5},
        "starts": "2024-06-01",
        "ends": "2024-06-02",
    }
    later = {**stated, "starts": "2024-07-01", "ends": "2024-08-01"}
    exports_ = {"contacts": {**FREE, "exports": [{"name": "crm", "kind": "parquet"}]}, **EXPORT}
    scored.load(**exports_, experiments={"words": stated, "later": later})
    scored.score(ALL)
    scored.audience()
    scored.export()
    sent = pq.read_table(next((scored.home.root / "exports" / "shop").iterdir()))
    assert "experiment_later" not in sent.column_names
    expected = assign("words", scored.campaign.experiments["words"], sent["customer_id"].to_pylist())
    assert sent["experiment_words"].to_pylist() == expected.tolist()


def test_parquet_goes_to_a_folder_of_the_users(scored):
    with_export(scored, kind="parquet", folder="out")
    with pytest.raises(ConfigError, match=r"contacts\.exports\.crm\.folder: there is no folder"):
        scored.export()
    (scored.folder / "out").mkdir()
    assert scored.export().sent == 6
    assert pq.read_table(scored.folder / "out" / "shop_2024-06-01_crm.parquet").num_rows == 6


def where_it_goes(kind, request, scored):
    """A connection of the campaign file, and what opens it for us."""
    if kind == "postgres":
        address = request.getfixturevalue("postgres_address")
        user, rest = address.split("@")
        return f"postgres://{user}:${{PG_PASSWORD}}@{rest}", lambda: as_admin(address)
    open_ = sqlite3.connect if kind == "sqlite" else duckdb.connect
    return f"{kind}://out.{kind}", lambda: open_(str(scored.folder / f"out.{kind}"))


@pytest.fixture
def postgres_address(postgres_server, monkeypatch):
    monkeypatch.setenv("PG_PASSWORD", postgres.PASSWORD)
    with as_admin(postgres_server) as connection:
        connection.execute("DROP TABLE IF EXISTS contacts")
    return postgres_server


KINDS_OF_TABLE = ["sqlite", "duckdb", "postgres"]


@pytest.mark.parametrize("kind", KINDS_OF_TABLE)
def test_a_table_holds_each_contact_once(scored, kind, request):
    connection, open_ = where_it_goes(kind, request, scored)
    with_export(scored, kind="table", connection=connection, table="contacts")
    rows = []
    for day in (DAY, DAY + timedelta(days=1)):
        scored.score(ALL, day)
        scored.audience(day)
        for attempt in range(2):
            if attempt:  # as if killed after the transaction, before it was written down
                (journal,) = scored.home.root.glob(f"lake/shop/exported/crm/snapshot={day}/batch-*")
                table = pq.read_table(journal)
                publish_table(table.set_column(table.num_columns - 1, "state", pa.array(["sending"] * 6)), journal)
            scored.export(day)
            database = open_()
            rows.append(database.execute("SELECT count(*), count(DISTINCT customer_id) FROM contacts").fetchone())
            database.close()
    assert rows == [(6, 6), (6, 6), (12, 6), (12, 6)]


class Receiver(BaseHTTPRequestHandler):
    """Answers as told; drops what it had under the same key, as a receiver should."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.requests.append((self.headers["Idempotency-Key"], self.headers.get("Authorization"), json.loads(body)))
        answer = server.answers.pop(0) if server.answers else 200
        if answer == "taken, then cut":
            server.taken.setdefault(self.headers["Idempotency-Key"], json.loads(body)["contacts"])
            self.connection.close()
            return
        if answer == 200:
            server.taken.setdefault(self.headers["Idempotency-Key"], json.loads(body)["contacts"])
        self.send_response(answer)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def receiver():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.answers, server.requests, server.taken = [], [], {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hooked(scored, receiver, monkeypatch):
    monkeypatch.setattr(exports, "_BACKOFF", 0.0)
    monkeypatch.setenv("CRM_TOKEN", "s3cret")
    url = f"http://127.0.0.1:{receiver.server_port}/contacts"
    with_export(scored, kind="webhook", url=url, batch=4, headers={"Authorization": "Bearer ${CRM_TOKEN}"})
    return scored


def taken(receiver):
    return [row["customer_id"] for rows in receiver.taken.values() for row in rows]


def test_a_webhook_gets_batches(hooked, receiver):
    assert hooked.export().sent == 6
    assert [len(body["contacts"]) for _, _, body in receiver.requests] == [4, 2]
    assert {token for _, token, _ in receiver.requests} == {"Bearer s3cret"}
    assert sorted(taken(receiver)) == [f"c{i}" for i in range(6)]
    assert len({row["id"] for rows in receiver.taken.values() for row in rows}) == 6
    assert hooked.export().sent == 0
    assert len(receiver.requests) == 2


@pytest.mark.parametrize("answers", [[503, 200], [429, 503, 200], ["taken, then cut", 200], [200, 500, 500, 200]])
def test_a_busy_webhook_is_asked_again(hooked, receiver, answers):
    receiver.answers = list(answers)
    assert hooked.export().sent == 6
    assert sorted(taken(receiver)) == [f"c{i}" for i in range(6)]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([400], "answered 400 to batch 1"),
        ([302], "answered 302 to batch 1"),
        ([200, *[503] * 5], "answered 503 to batch 2"),
        ([200, *["taken, then cut"] * 5], "cannot be reached: ConnectionError; batch 2 is tried again"),
    ],
)
def test_a_webhook_that_fails_gets_the_rest_later_and_nothing_twice(hooked, receiver, answers, message):
    receiver.answers = list(answers)
    with pytest.raises(SourceError, match=message) as error:
        hooked.export()
    assert "s3cret" not in str(error.value)
    receiver.answers = []
    hooked.export()
    assert sorted(taken(receiver)) == [f"c{i}" for i in range(6)]
    assert exported_contacts(hooked.home.lake("shop"), "crm", DAY) == {"sent": 6}


def test_what_was_not_sent_does_not_count_as_contacted(hooked, receiver):
    lake = hooked.home.lake("shop")
    receiver.answers = [200, *[503] * 5]
    with pytest.raises(SourceError):
        hooked.export()
    assert delivered_audiences(lake) == [], "in part: not to be compared"
    assert len(contacted_keys(lake, DAY, with_held=True)) == 4, "but these were contacted"
    receiver.answers = []
    hooked.export()
    assert delivered_audiences(lake) == [DAY]
    assert len(contacted_keys(lake, DAY, with_held=True)) == 6


def test_a_channel_that_was_renamed_is_named(hooked, receiver):
    receiver.answers = [400]
    with pytest.raises(SourceError):
        hooked.export()
    contacts = hooked.campaign.contacts.model_dump(mode="json", exclude_unset=True)
    hooked.load(contacts={**contacts, "channels": {"mail": 0.1}}, **EXPORT)
    with pytest.raises(DataContractError, match="was chosen with the channel 'contact', which is not there any more"):
        hooked.export()


@pytest.mark.parametrize("kind", KINDS_OF_TABLE)
def test_a_table_gains_the_column_of_an_experiment(scored, kind, request):
    connection, _ = where_it_goes(kind, request, scored)
    with_export(scored, kind="table", connection=connection, table="contacts")
    scored.export()
    stated = {
        "units": "audience",
        "variants": {"control": 0.5, "warm": 0.5},
        "starts": "2024-06-02",
        "ends": "2024-07-02",
    }
    contacts = scored.campaign.contacts.model_dump(mode="json", exclude_unset=True)
    scored.load(contacts=contacts, experiments={"words": stated}, **EXPORT)
    day = DAY + timedelta(days=1)
    scored.score(ALL, day)
    scored.audience(day)
    scored.export(day)
    scored.load(
        contacts=contacts, experiments={"words": {**stated, "variants": {"control": 0.8, "warm": 0.2}}}, **EXPORT
    )
    with pytest.raises(ConfigError, match=r"experiments\.words\.variants: was"):
        scored.export(day)


def test_consent_withdrawn_since_is_respected(hooked, receiver):
    """Also in a batch that was interrupted."""
    receiver.answers = [400]
    with pytest.raises(SourceError):
        hooked.export()
    (hooked.folder / "never.csv").write_text("customer_id\nc2\nc5\n")
    contacts = hooked.campaign.contacts.model_dump(mode="json", exclude_defaults=True, exclude_unset=True)
    hooked.load(contacts={**contacts, "suppression": ["never"]}, **EXPORT)
    report = hooked.export()
    assert (report.sent, report.withdrawn) == (4, 2)
    assert sorted(taken(receiver)) == ["c0", "c1", "c3", "c4"]


def test_only_the_newest_audience_is_sent(scored):
    with_export(scored, kind="csv")
    scored.score(ALL, DAY + timedelta(days=1))
    with pytest.raises(DataContractError, match="snapshot 2024-06-01 is not the newest one that was scored"):
        scored.export()
    assert delivered_audiences(scored.home.lake("shop")) == [], "what was not sent does not count as a contact"
    scored.audience(DAY + timedelta(days=1))
    scored.export(DAY + timedelta(days=1))
    assert delivered_audiences(scored.home.lake("shop")) == [DAY + timedelta(days=1)]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"holdout": {"fraction": 0}}, r"holdout\.fraction: Input should be greater than 0, got 0"),
        ({"holdout": {"fraction": 1}}, r"holdout\.fraction: Input should be less than 1, got 1"),
        ({"holdout": {"strata": ["planet"]}}, r"holdout\.strata: 'planet' is not declared"),
        ({"contacts": {"exports": [{"name": "a", "kind": "table"}]}}, "of kind table needs 'connection' and 'table'"),
        ({"contacts": {"exports": [{"name": "a", "kind": "csv", "batch": 3}]}}, "of kind csv has no 'batch'"),
        ({"contacts": {"exports": [{"name": "a", "kind": "csv"}] * 2}}, "exports must have different names"),
        (
            {
                "contacts": {
                    "exports": [{"name": "a", "kind": "webhook", "url": "http://x/", "headers": {"X-Api-Key": "abc"}}]
                }
            },
            r"a secret must come from the environment, as \$\{NAME\}",
        ),
        (
            {"contacts": {"consent": "maybe"}},
            r"yaml: contacts\.consent: Input should be 'not_required' or a section of its own, got 'maybe'$",
        ),
        ({"contacts": {"consent": {"table": "c"}}}, r"yaml: contacts\.consent\.granted: required key is missing$"),
        (
            {"contacts": {"consent": {"table": "c", "granted": "g", "chanel": "x"}}},
            r"yaml: contacts\.consent\.chanel: unknown key; did you mean 'channel'\?",
        ),
        (
            {"contacts": {"consent": {"table": "c", "granted": "g", "max_age_days": 3}}},
            "max_age_days needs 'time': without it nobody can tell how old",
        ),
    ],
)
def test_what_a_campaign_may_not_say(scored, section, message):
    with pytest.raises(ConfigError, match=message) as error:
        scored.load(**section)
    assert "abc" not in str(error.value)
