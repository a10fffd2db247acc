"""What the system does by itself when a model is no longer right, and why. The gate decides what comes of it."""

import json
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.lake import Home
from propensity_dagster.monitoring.ledger import (
    LEVEL,
    RANKING,
    SPREAD,
    judged_rows,
    learnt_until,
    persistent_problems,
    read_ledger,
)
from propensity_dagster.registry.store import ModelStore

RECALIBRATE, RETRAIN = "recalibrate", "retrain"


@dataclass(frozen=True)
class Act:
    """An automatic act. `evidence` names what it answers: the same evidence is answered once."""

    kind: Literal["recalibrate", "retrain"]
    why: str
    evidence: str


@dataclass(frozen=True)
class Memory:
    """The last automatic act of a campaign: when, what, and on which evidence and version."""

    on: date
    kind: str
    evidence: str
    version: str

    def to_text(self) -> str:
        """For a cursor."""
        return json.dumps({"on": str(self.on), "kind": self.kind, "evidence": self.evidence, "version": self.version})

    @classmethod
    def from_text(cls, text: str | None) -> "Memory | None":
        """Inverse of `to_text`; None for nothing."""
        if not text:
            return None
        stated = json.loads(text)
        return cls(date.fromisoformat(stated["on"]), stated["kind"], stated["evidence"], stated["version"])


def due_act(
    campaign: Campaign, home: Home, store: ModelStore, today: date, last: Memory | None
) -> tuple[Act, str] | str:
    """The act that is due now, with the champion's version; or why there is none.

    Recalibration comes first where the ranking is intact. Where it was tried and the champion is still the same, it was
    refused, and the model is trained again.
    """
    if not campaign.monitoring.react:
        return "the campaign does not allow automatic acts (monitoring.react)"
    champion = store.champion(campaign.name)
    if champion is None:
        return "there is no champion"
    found = _wanted(campaign, home, store, champion.version, last)
    if found is None:
        return "no drift that lasts, and the model is not too old"
    if last is not None and today < last.on + timedelta(days=campaign.monitoring.react_every_days):
        return (
            f"{found.kind} is due ({found.why}), but the last automatic act was on {last.on}, and the campaign allows "
            f"one in {campaign.monitoring.react_every_days} days"
        )
    if last is not None and last.evidence == found.evidence:
        return f"{found.kind} was done on {last.on} for this reason, and nothing is known since: {found.why}"
    return found, champion.version


def _wanted(campaign: Campaign, home: Home, store: ModelStore, version: str, last: Memory | None) -> Act | None:
    rows = read_ledger(campaign, home)
    judged = judged_rows(rows, version)
    newest = str(judged[-1]["snapshot"]) if judged else "none"
    lasting = persistent_problems(campaign, rows, version)
    words = f"of version {version} for {campaign.monitoring.persist} mature snapshots up to {newest}"
    if RANKING in lasting:
        why = f"concept drift: AUC {judged[-1]['realised_auc']:.3f}, {judged[-1]['promised_auc']:.3f} promised, {words}"
        return Act(RETRAIN, why, f"{RETRAIN} {RANKING} {version} {newest}")
    if LEVEL in lasting or SPREAD in lasting:
        row = judged[-1]
        why = f"calibration off: {row['converted']:,} conversions, {row['promised_conversions']:,.0f} promised, {words}"
        refused = last is not None and last.kind == RECALIBRATE and last.version == version
        kind = RETRAIN if refused else RECALIBRATE
        return Act(kind, why + ("; recalibration was refused" if refused else ""), f"{kind} level {version} {newest}")
    limit = campaign.monitoring.retrain_after_days
    learnt = learnt_until(campaign, store, version) if limit else None
    if limit and learnt and rows:
        age = (rows[-1]["snapshot"] - learnt).days
        if age > limit:
            why = f"age: version {version} learnt up to {learnt}, {age} days before the newest scores, allowed {limit}"
            return Act(RETRAIN, why, f"{RETRAIN} age {version} {rows[-1]['snapshot']}")
    return None
