"""Promised and realised performance, the ledger, recalibration: on simulated truth and on real calls of a bank."""

import csv
import shutil
from datetime import date, datetime, timedelta

import numpy as np
import pytest
from scipy.special import expit

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.decisions import ingest_decisions, publish_new_rows, validate_decisions
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.features.past_decisions import publish_decision_training_set
from propensity_dagster.models.saved import load_model
from propensity_dagster.monitoring.domain import keep_reference
from propensity_dagster.monitoring.drift import publish_drift, read_drift
from propensity_dagster.monitoring.findings import drift_findings, performance_findings
from propensity_dagster.monitoring.ledger import publish_ledger, read_ledger
from propensity_dagster.monitoring.promised import promised_performance
from propensity_dagster.monitoring.reaction import due_act
from propensity_dagster.monitoring.recalibration import recalibrate
from propensity_dagster.registry.mlflow_store import MlflowStore
from propensity_dagster.scoring.batch import score_snapshot
from propensity_dagster.scoring.candidates import publish_candidate, publish_evaluation
from propensity_dagster.scoring.promotion import promote_if_decided, require_champion
from propensity_dagster_tests.conftest import SHARED_DATA


def metrics(p, y):
    order = np.argsort(-p)
    top = y[order[: len(y) // 10]].mean() / y.mean()
    beaten = (p[y == 1][:, None] > p[y == 0]).mean() + (p[y == 1][:, None] == p[y == 0]).mean() / 2
    return {
        "conversions": y.sum(),
        "log_loss": -np.mean(np.where(y == 1, np.log(p), np.log1p(-p))),
        "brier": np.mean((p - y) ** 2),
        "auc": beaten,
        "top_decile_lift": top,
        "true_positives": (y[p >= 0.2] == 1).sum(),
        "false_negatives": (y[p < 0.2] == 1).sum(),
    }


def test_promises_hold_when_the_probabilities_are_right():
    """Of 120 worlds about 95% lie in each interval, and the expectation is their mean."""
    rng = np.random.default_rng(0)
    p = expit(rng.normal(-2, 1.2, 3_000))
    promised = promised_performance(p, 0.2)
    worlds = [metrics(p, (rng.random(len(p)) < p).astype(int)) for _ in range(120)]
    for name in worlds[0]:
        drawn = np.array([world[name] for world in worlds])
        found = promised[name]
        assert np.mean((drawn >= found.low) & (drawn <= found.high)) > 0.88, name
        assert found.value == pytest.approx(drawn.mean(), abs=4 * drawn.std() / np.sqrt(len(drawn))), name
    assert promised["false_positives"].value == pytest.approx((p >= 0.2).sum() - promised["true_positives"].value)
    assert promised["true_negatives"].value == pytest.approx((p < 0.2).sum() - promised["false_negatives"].value)


@pytest.mark.parametrize("p", [[0.3], [0.0, 0.0], [1.0, 1.0, 1.0], [0.5] * 7])
def test_promises_of_little_are_finite_or_unknown(p):
    found = promised_performance(np.array(p), 0.4)
    assert found["conversions"].value == pytest.approx(sum(p), abs=1e-6)
    assert np.isfinite(found["log_loss"].value)


def test_promises_of_many_rows_cost_little_memory():
    p = expit(np.random.default_rng(1).normal(-3, 1, 1_000_000))
    found = promised_performance(p, 0.1)
    assert found["conversions"].value == pytest.approx(p.sum())
    assert found["conversions"].low < p.sum() < found["conversions"].high


CHUNKS, CHUNK = 8, 1_029


class Bank:
    """The bank's calls in the order in which they were made, a hundred a day: four fifths to learn from, then ten days a night."""

    def __init__(self, root):
        if not SHARED_DATA.is_dir():
            pytest.skip(f"{SHARED_DATA} is absent: the real data are not part of the repository")
        with (SHARED_DATA / "bank_marketing" / "bank-additional-full.csv").open() as file:
            rows = list(csv.DictReader(file, delimiter=";"))
        self.names = ["id", "called_on", *rows[0]]
        first = date(2008, 5, 1)
        self.rows = [
            {"id": str(i), "called_on": str(first + timedelta(days=i // 100)), **row} for i, row in enumerate(rows)
        ]
        self.root, self.start = root, len(rows) - CHUNKS * CHUNK
        (root / "bank.yaml").write_text(
            "name: bank\nsource: {kind: table, path: past.csv, key: id, order: called_on, first_day: 2008-01-01}\n"
            'outcome: {column: y, positive: "yes"}\nexclude: {duration: known only after the call}\n'
            'missing: {pdays: "999"}\nmodels: [baseline, logistic_regression, lightgbm]\nmin_converters: 50\n'
            "gate: {max_calibration_error: 0.15, max_intercept: 1.5, slope: [0.2, 2.0]}\n"
            "explanations: {reasons: 0}\nmonitoring: {persist: 2}\n"
        )
        self.campaign, self.home = load_campaign(root / "bank.yaml"), Home(root / "home").ensure()
        self.store = MlflowStore(self.home)
        self.write("past.csv", self.rows[: self.start])

    def write(self, name, rows):
        with (self.root / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, self.names)
            writer.writeheader()
            writer.writerows(rows)

    def train(self):
        with open_engine() as engine:
            ingest_decisions(self.campaign, self.home, engine)
            validate_decisions(self.campaign, self.home, engine)
            publish_decision_training_set(self.campaign, self.home, engine)
        for candidate in self.campaign.models:
            publish_candidate(self.campaign, candidate, self.home)
        judged = publish_evaluation(self.campaign, self.home, None)
        record = {**judged.record, "decision": {**judged.record["decision"], "promoted": True}}
        folder = self.home.candidates("bank") / record["challenger"]
        promote_if_decided(self.campaign, record, folder, self.home.reports("bank"), self.store)
        keep_reference(self.campaign, load_model(folder), "1", self.home)

    def night(self, k):
        """Score the next calls; then they are made, and their outcomes are known. Returns the snapshot."""
        new = self.rows[self.start + k * CHUNK : self.start + (k + 1) * CHUNK]
        snapshot = date.fromisoformat(new[0]["called_on"])
        self.write("new.csv", [{**row, "y": ""} for row in new])
        version, model = require_champion(self.campaign, self.store)
        with open_engine() as engine:
            publish_new_rows(self.campaign, snapshot, [str(self.root / "new.csv")], self.home, engine)
            score_snapshot(self.campaign, snapshot, model, version, datetime(2025, 1, 1), self.home, engine)
            publish_drift(self.campaign, snapshot, model, version, self.home, engine)
            self.write("past.csv", self.rows[: self.start + (k + 1) * CHUNK])
            ingest_decisions(self.campaign, self.home, engine)
            validate_decisions(self.campaign, self.home, engine)
            publish_ledger(self.campaign, self.home, self.store, engine)
        return snapshot


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    made = Bank(tmp_path_factory.mktemp("bank"))
    made.train()
    made.nights = [made.night(k) for k in range(4)]
    return made


def test_the_bank_drifts_and_the_monitor_says_so(bank):
    """The economy of 2009 is not that of 2008: every night, in the columns of the economy, and in what was promised."""
    for snapshot in bank.nights:
        found = {f.subject: f for f in drift_findings(read_drift(bank.campaign, snapshot, bank.home))}
        assert found["(together)"].severity == "alert"
        assert found["euribor3m"].severity == "alert"
    rows = read_ledger(bank.campaign, bank.home)
    assert [row["state"] for row in rows] == ["mature"] * 4
    assert all(row["known"] == row["rows"] == CHUNK for row in rows)
    assert any(row["problems"] for row in rows)
    assert {f.severity for f in performance_findings(bank.campaign, rows)} == {"alert"}


def test_recalibration_beats_the_stale_model_on_the_real_nights_that_follow(bank, tmp_path):
    shutil.copytree(bank.root, tmp_path / "bank")
    later = Bank.__new__(Bank)
    later.__dict__ |= {**bank.__dict__, "root": tmp_path / "bank", "home": Home(tmp_path / "bank" / "home")}
    later.campaign, later.store = load_campaign(tmp_path / "bank" / "bank.yaml"), MlflowStore(later.home)
    act, version = due_act(later.campaign, later.home, later.store, date(2025, 1, 1), None)
    assert act.kind == "recalibrate"
    done = recalibrate(later.campaign, later.home, later.store)
    assert done.log_loss[0] < done.log_loss[1]
    assert done.promotion.promoted, done.promotion.sentence
    stale_version, fresh_version = version, done.promotion.challenger_version
    assert require_champion(later.campaign, later.store)[0] == fresh_version
    losses = {stale_version: [], fresh_version: []}
    for k in range(4, CHUNKS):
        snapshot = later.night(k)
        for row in read_ledger(later.campaign, later.home):
            if row["snapshot"] == snapshot:
                losses[row["model_version"]].append(row["realised_log_loss"])
    assert len(losses[fresh_version]) == CHUNKS - 4
    assert not losses[stale_version]
    later.store.roll_back("bank", None, "to see what it would have said")
    assert later.night(CHUNKS - 1) == snapshot
    rows = read_ledger(later.campaign, later.home)
    last = {row["model_version"]: row for row in rows if row["snapshot"] == snapshot}
    assert last.keys() == {stale_version, fresh_version}, "both were delivered"
    assert last[fresh_version]["realised_log_loss"] < last[stale_version]["realised_log_loss"]
    assert {row["model_version"] for row in read_drift(later.campaign, snapshot, later.home)} == {stale_version}
    assert due_act(later.campaign, later.home, later.store, date(2025, 1, 1), None)[1] == stale_version
