"""What the blocking checks of features and labels ask of the published files."""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import ibis

from propensity_dagster.campaign import EventCampaign
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home
from propensity_dagster.features.build import entity_table
from propensity_dagster.features.snapshots import snapshot_instant


@dataclass(frozen=True)
class FeaturesAudit:
    """Rows that must not be there. `from_the_future`: an entity created, or an event counted, at or after t."""

    repeated: int
    from_the_future: int


def audit_features(campaign: EventCampaign, snapshots: Sequence[date], home: Home, engine: Engine) -> FeaturesAudit:
    """Look for repeated keys and for what could not have been known, in every snapshot."""
    repeated, future = 0, 0
    entities = engine.read(home.lake(campaign.name).existing(entity_table(campaign)))
    for snapshot in snapshots:
        table = _published(campaign, "features", snapshot, home, engine)
        later = entities.filter(entities.created_at >= ibis.literal(snapshot_instant(snapshot)))
        recency = [name for name in table.columns if name.endswith("_recency_days")]
        too_new = [(table[name] < 1).sum().fill_null(0) for name in recency]
        counts = table.aggregate(
            repeated=table.count() - table[campaign.key].nunique(),
            future=sum(too_new[1:], too_new[0]).cast("int64") if too_new else ibis.literal(0, "int64"),
        )
        found = engine.arrow(counts).to_pylist()[0]
        unknown = engine.arrow(table.semi_join(later, campaign.key).aggregate(n=ibis._.count()))
        repeated += found["repeated"]
        future += found["future"] + unknown["n"][0].as_py()
    return FeaturesAudit(repeated, future)


def audit_labels(campaign: EventCampaign, snapshots: Sequence[date], home: Home, engine: Engine) -> int:
    """Number of keys that only labels or only features have."""
    unmatched = 0
    for snapshot in snapshots:
        features = _published(campaign, "features", snapshot, home, engine)
        labels = _published(campaign, "labels", snapshot, home, engine)
        for one, other in ((features, labels), (labels, features)):
            alone = one.anti_join(other, campaign.key)
            unmatched += engine.arrow(alone.aggregate(n=alone.count()))["n"][0].as_py()
    return unmatched


def _published(campaign: EventCampaign, table: str, snapshot: date, home: Home, engine: Engine) -> ibis.Table:
    return engine.read(home.lake(campaign.name).existing_partition(table, "snapshot", snapshot))
