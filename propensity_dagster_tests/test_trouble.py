"""Nights on a world in which something goes wrong on a known day: which alarm rings, when, and that no other does."""

import shutil
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.ingest import ingest_entities, ingest_stream
from propensity_dagster.data.lake import Home
from propensity_dagster.data.sources import days_in_files
from propensity_dagster.data.validate import validate_entities, validate_stream
from propensity_dagster.explain.summary import explain_model
from propensity_dagster.features.activity import build_activity
from propensity_dagster.features.snapshots import publish_features, publish_training_set
from propensity_dagster.monitoring.alerts import read_alerts, record_findings
from propensity_dagster.monitoring.domain import keep_reference
from propensity_dagster.monitoring.drift import publish_drift
from propensity_dagster.monitoring.findings import (
    DRIFTING,
    PERFORMANCE,
    QUALITY,
    Finding,
    quality_findings,
    snapshot_findings,
    verdict,
)
from propensity_dagster.monitoring.ledger import publish_ledger, read_ledger
from propensity_dagster.monitoring.quality import publish_quality
from propensity_dagster.monitoring.reaction import RETRAIN, Memory, due_act
from propensity_dagster.registry.mlflow_store import MlflowStore
from propensity_dagster.scoring.batch import score_snapshot
from propensity_dagster.scoring.candidates import publish_candidate, publish_evaluation, read_evaluation
from propensity_dagster.scoring.promotion import promote_if_decided, require_champion
from propensity_dagster.synthetic import open_world
from propensity_dagster_tests.conftest import SMALL

FIRST = date(2024, 1, 1)
TRAINED, BEGUN, LAST = (FIRST + timedelta(days=n) for n in (168, 182, 238))
WEEK = timedelta(days=7)
WORLD = "synthetic://ecommerce?customers=2500&days=240&seed=3"


def file_day(file: Path) -> date:
    return date.fromisoformat(file.stem)


@dataclass
class Nights:
    """A campaign whose source receives, each night, the files of the days before."""

    file: Path
    home: Home
    world: Path
    source: Path

    def __post_init__(self):
        self.campaign = load_campaign(self.file)
        self.store = MlflowStore(self.home)

    def arrive(self, before: date) -> None:
        """Copy what has arrived, and ingest the days of it."""
        new = []
        for file in sorted(self.world.rglob("*")):
            target = self.source / file.relative_to(self.world)
            if file.is_file() and file.parent == self.world:  # of no day: customers, consents
                shutil.copy(file, target)
            elif file.is_file() and not target.exists() and file_day(file) < before:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
                new.append(str(target))
        if not new:
            return
        with open_engine() as engine:
            ingest_entities(self.campaign, self.home, engine)
            validate_entities(self.campaign, self.home, engine)
            found = days_in_files(self.campaign, new, self.home, engine)
            days = (min(found[0], self.next_day), before - timedelta(days=1))
            for name in self.campaign.source.streams:
                ingest_stream(self.campaign, name, *days, self.home, engine)
                validate_stream(self.campaign, name, *days, self.home, engine)
            build_activity(self.campaign, *days, self.home, engine)

    @property
    def next_day(self) -> date:
        days = self.home.lake(self.campaign.name).partitions("activity", "day")
        return days[-1] + timedelta(days=1) if days else FIRST

    def train(self) -> None:
        campaign, home = self.campaign, self.home
        with open_engine() as engine:
            publish_training_set(campaign, home, engine)
        for candidate in campaign.models:
            publish_candidate(campaign, candidate, home)
        judged = publish_evaluation(campaign, home, None)
        folder, reports = home.candidates(campaign.name) / judged.record["challenger"], home.reports(campaign.name)
        done = promote_if_decided(campaign, judged.record, folder, reports, self.store)
        assert done.promoted, done.sentence
        version, model = require_champion(campaign, self.store)
        keep_reference(campaign, model, version, home)
        explain_model(campaign, model, version, "champion", home)

    def score(self, snapshot: date) -> None:
        campaign, home = self.campaign, self.home
        version, model = require_champion(campaign, self.store)
        with open_engine() as engine:
            publish_features(campaign, [snapshot], home, engine)
            score_snapshot(campaign, snapshot, model, version, datetime(2024, 1, 1), home, engine)
            publish_drift(campaign, snapshot, model, version, home, engine)
            publish_ledger(campaign, home, self.store, engine)

    def look(self, snapshot: date) -> list[tuple[date, Finding]]:
        """As the nightly job does it; the days since the last night are looked at for their data alone."""
        seen = []
        for back in range(6, -1, -1):
            day = snapshot - timedelta(days=back)
            report = publish_quality(self.campaign, day, self.home)
            sources = (QUALITY,) if back else (QUALITY, PERFORMANCE, DRIFTING)
            found = quality_findings(self.campaign, report.findings)
            found = found if back else snapshot_findings(self.campaign, day, self.home)
            record_findings(self.campaign.name, day, sources, found, self.home, datetime.now(UTC))
            seen += [(day, finding) for finding in found]
        return seen

    def run(self, first: date, last: date) -> list[tuple[date, Finding]]:
        """Weekly nights: what was found, and when."""
        seen = []
        snapshot = first
        while snapshot <= last:
            self.arrive(snapshot)
            self.score(snapshot)
            seen += self.look(snapshot)
            snapshot += timedelta(days=7)
        return seen


def nights(name: str, world: Path, root: Path) -> Nights:
    source = root / f"{name}_source"
    source.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_load(SMALL)
    content["name"] = name
    content["source"] |= {"connection": str(source), "first_day": str(FIRST)}
    content["models"] = ["baseline", "logistic_regression", {"lightgbm": {"max_rounds": 60}}]
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return Nights(file, Home(root / "home").ensure(), world, source)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A home with two campaigns on equal calm worlds: `shop` up to the day before trouble, `calm` to the end."""
    root = tmp_path_factory.mktemp("nights")
    world = open_world(WORLD, root)
    world.ensure()
    shop = nights("shop", world.tables, root)
    shop.arrive(TRAINED)
    shop.train()
    shop.run(TRAINED, BEGUN)
    calm = nights("calm", world.tables, root)
    for copied in ("shop_source", "home/lake/shop", "home/reports/shop", "home/candidates/shop"):
        shutil.copytree(root / copied, root / copied.replace("shop", "calm"), dirs_exist_ok=True)
    reports = calm.home.reports("calm")
    record = read_evaluation(calm.campaign, calm.home)
    promote_if_decided(calm.campaign, record, calm.home.candidates("calm") / record["challenger"], reports, calm.store)
    calm.run(BEGUN + WEEK, LAST)
    return root


def troubled(begun: Path, tmp_path: Path, trouble: str) -> Nights:
    """A copy of the home in which the shop's world has trouble from a day on."""
    world = open_world(f"{WORLD}&trouble={trouble}@{BEGUN}", tmp_path)
    world.ensure()
    shutil.copytree(begun / "home", tmp_path / "home")
    shutil.copytree(begun / "shop_source", tmp_path / "shop_source")
    return nights("shop", world.tables, tmp_path)


def grave(home: Home, campaign: str) -> list[str]:
    return [a.finding.sentence for a in read_alerts(home, campaign) if a.finding.severity == "alert"]


def test_a_calm_world_raises_no_alert(begun):
    home = Home(begun / "home")
    assert grave(home, "shop") == grave(home, "calm") == []
    rows = read_ledger(load_campaign(begun / "calm.yaml"), home)
    judged = [r for r in rows if r["state"] == "mature"]
    assert rows[: len(judged)] == judged
    assert {r["state"] for r in rows[len(judged) :]} == {"waiting"}
    assert len(judged) >= 6
    inside = [r["promised_conversions_low"] <= r["converted"] <= r["promised_conversions_high"] for r in judged]
    assert sum(inside) >= len(inside) - 3


TROUBLES = {
    # trouble: the finding that names it, and weeks from its first day to the snapshot that must tell
    "units": ("drift: visits_pages_sum_30d", 1),
    "missing": ("drift: (together)", 1),
    "population": ("drift: country", 1),
    "emails": ("quality: emails days without events", 1),
    "duplicates": ("quality: visits duplicate share", 1),
    "late": ("quality: visits rows", 1),
    "label_delay": ("quality: orders days without events", 1),
    "concept": ("performance: ranking", 5),
}


@pytest.fixture(scope="module")
def told(begun, tmp_path_factory):
    """Each trouble's nights, run when they are first asked for."""
    kept: dict[str, tuple[Nights, list[tuple[date, Finding]]]] = {}

    def tell(trouble: str) -> tuple[Nights, list[tuple[date, Finding]]]:
        if trouble not in kept:
            shop = troubled(begun, tmp_path_factory.mktemp(trouble), trouble)
            kept[trouble] = shop, shop.run(BEGUN + WEEK, BEGUN + TROUBLES[trouble][1] * WEEK)
        return kept[trouble]

    return tell


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_is_found_by_its_alarm(told, trouble):
    key, weeks = TROUBLES[trouble]
    shop, seen = told(trouble)
    for day, f in seen:
        print(day, f.severity, f.key, f.sentence)
    alerts = {f.key: day for day, f in reversed(seen) if f.severity == "alert"}
    assert alerts[key] <= BEGUN + weeks * WEEK
    assert grave(shop.home, "calm") == [], "nobody else is told"
    others = {f.source for _, f in seen if f.severity == "alert"} - {key.partition(":")[0]}
    assert others <= ({"drift"} if trouble in ("late", "emails") else set()), "and of nothing else"
    assert verdict([f for day, f in seen if day == BEGUN + weeks * WEEK]).answer != "yes"


def test_the_named_columns_are_the_broken_ones(told):
    for trouble in ("units", "missing"):
        columns = {
            f.subject for _, f in told(trouble)[1] if f.source == "drift" and f.subject.startswith("visits_pages")
        }
        assert {"visits_pages_sum_7d", "visits_pages_mean_7d", "visits_pages_max_7d"} <= columns


def test_late_events_reopen_a_snapshot_visibly(told):
    """Of three late days one has arrived when the snapshot is counted first, the others later."""
    shop, _ = told("late")
    shop.arrive(BEGUN + WEEK + timedelta(days=1))
    with open_engine() as engine:
        publish_ledger(shop.campaign, shop.home, shop.store, engine)
    seen = shop.run(BEGUN + 2 * WEEK, BEGUN + 2 * WEEK)
    (row,) = [r for r in read_ledger(shop.campaign, shop.home) if r["snapshot"] == BEGUN - WEEK]
    before, now = row["revisions"]
    assert before < now == row["converted"]
    (finding,) = [f for _, f in seen if f.key == "performance: late events"]
    assert f"{row['snapshot']} has {now} conversions, had {before}" in finding.sentence


def test_late_labels_are_not_zeros(told):
    """Orders known two weeks later: nothing is mature before they are there."""
    shop, _ = told("label_delay")
    states = {r["snapshot"]: r["state"] for r in read_ledger(shop.campaign, shop.home)}
    assert states[BEGUN - WEEK] == "waiting"


def test_concept_drift_is_answered(told):
    """Ranking is lost: trained again, not more often than allowed, and not twice for the same reason."""
    shop, _ = told("concept")
    today = date(2025, 1, 1)
    act, version = due_act(shop.campaign, shop.home, shop.store, today, None)
    assert (act.kind, version) == (RETRAIN, "1")
    assert "concept drift: AUC" in act.why
    done = Memory(today, act.kind, act.evidence, version)
    assert Memory.from_text(done.to_text()) == done
    again = due_act(shop.campaign, shop.home, shop.store, today + WEEK, done)
    assert "nothing is known since" in again
    older = Memory(today, act.kind, "something else", version)
    assert "allows one in 7 days" in due_act(shop.campaign, shop.home, shop.store, today + timedelta(days=6), older)
    assert due_act(shop.campaign, shop.home, shop.store, today + WEEK, older)[0].kind == RETRAIN
    patient = shop.campaign.model_copy(
        update={"monitoring": shop.campaign.monitoring.model_copy(update={"react": False})}
    )
    assert "does not allow" in due_act(patient, shop.home, shop.store, today, None)
