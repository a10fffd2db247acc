"""The schemas. They give the quarantine its predicates, the asset checks, and the column documentation.

Amounts are integer cents and measures integer thousandths: sums of integers are exact on every engine.
Only checks that `data/quarantine.py` can translate to Ibis may be used here. Pandera and the pandas it needs take
0.4 s to import: what only defines assets, or answers requests, does without.
"""

from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from propensity_dagster.campaign import Campaign, EventCampaign, TableCampaign
from propensity_dagster.campaign_sections import Attribute, Stream

if TYPE_CHECKING:
    import pandera.pandas as pa

CENTS = 100
THOUSANDTHS = 1000
EARLIEST_CREATION = datetime(1900, 1, 1)


def entity_contract(campaign: EventCampaign, types: dict[str, str], newest: date) -> "pa.DataFrameSchema":
    """Customers, after coercion. `types` says which attributes are numbers and which categories."""
    import pandera.pandas as pa

    before = datetime.combine(newest + timedelta(days=1), datetime.min.time())
    columns: dict[str, Any] = {
        campaign.key: pa.Column(str, nullable=False, unique=True, description="entity key, as text"),
        "created_at": pa.Column(
            "datetime64[us]",
            [pa.Check.greater_than_or_equal_to(EARLIEST_CREATION), pa.Check.less_than(before)],
            nullable=False,
            description="when the entity became known, UTC",
        ),
    }
    for name, attribute in campaign.source.entities.attributes.items():
        columns[name] = _attribute_column(types[name], attribute)
    return pa.DataFrameSchema(columns, strict=True, name="entities")


def stream_contract(campaign: EventCampaign, stream: Stream, first: date, last: date) -> "pa.DataFrameSchema":
    """Events of one log, after coercion, with days from `first` to `last` inclusive."""
    import pandera.pandas as pa

    start = datetime.combine(first, datetime.min.time())
    end = datetime.combine(last + timedelta(days=1), datetime.min.time())
    columns: dict[str, Any] = {
        campaign.key: pa.Column(str, nullable=False, description="entity key, as text"),
        "time": pa.Column(
            "datetime64[us]",
            [pa.Check.greater_than_or_equal_to(start), pa.Check.less_than(end)],
            nullable=False,
            description="when it happened, UTC",
        ),
    }
    if stream.id:
        columns["event_id"] = pa.Column(str, nullable=False, unique=not stream.lines, description="event id")
    if stream.amount:
        checks = []
        if stream.minimum_amount is not None:
            checks.append(pa.Check.greater_than_or_equal_to(round(stream.minimum_amount * CENTS)))
        columns["amount"] = pa.Column("int64", checks, nullable=False, description="amount in cents")
    for name in stream.measures:
        columns[f"measure_{name}"] = pa.Column(
            "int64",
            pa.Check.greater_than_or_equal_to(0),
            nullable=True,
            description=f"{name}, in thousandths",
        )
    for name in stream.categories:
        columns[f"category_{name}"] = pa.Column(str, nullable=True, description=name)
    if stream.type:
        columns["type"] = pa.Column(str, pa.Check.isin(list(stream.types)), nullable=False, description="event type")
    if stream.ingested_at:
        columns["ingested_at"] = pa.Column("datetime64[us]", nullable=False, description="when it arrived, UTC")
    return pa.DataFrameSchema(columns, strict=True, name="events")


def decision_contract(campaign: TableCampaign, types: dict[str, str], *, labelled: bool) -> "pa.DataFrameSchema":
    """Past decisions, after coercion, or (not `labelled`) rows to score, one per key."""
    import pandera.pandas as pa

    columns: dict[str, Any] = {
        campaign.key: pa.Column(str, nullable=False, unique=not labelled, description="entity key, as text"),
        "position": pa.Column("int64", nullable=False, description="number of the row in the source, from 1"),
    }
    if labelled and campaign.source.order not in (None, "file"):
        columns["decided_at"] = pa.Column("datetime64[us]", nullable=False, description="when it was decided, UTC")
    for name, kind in types.items():
        columns[name] = _attribute_column(kind, campaign.attributes.get(name, Attribute()))
    if labelled:
        columns["converted"] = pa.Column(bool, nullable=False, description="whether the outcome was positive")
    return pa.DataFrameSchema(columns, strict=True, name="decisions")


def scores_contract(campaign: Campaign) -> "pa.DataFrameSchema":
    """The scores table that leaves the system."""
    import pandera.pandas as pa

    unit = [pa.Check.greater_than_or_equal_to(0.0), pa.Check.less_than_or_equal_to(1.0)]
    return pa.DataFrameSchema(
        {
            campaign.key: pa.Column(str, nullable=False, unique=True, description="entity key"),
            "snapshot": pa.Column("datetime64[us]", nullable=False, description="instant of the score"),
            "probability": pa.Column(float, unit, nullable=False, description="calibrated P(conversion)"),
            "percentile": pa.Column(float, unit, nullable=False, description="share of scores at or below"),
            "decile": pa.Column(
                "int8",
                [pa.Check.greater_than_or_equal_to(1), pa.Check.less_than_or_equal_to(10)],
                nullable=False,
                description="1 is the top tenth",
            ),
            "tier": pa.Column(
                str, pa.Check.isin(["high", "medium", "low"]), nullable=False, description="by percentile"
            ),
            "expected_value": pa.Column(
                float, nullable=False, description="probability x margin - cost of one contact"
            ),
            "campaign": pa.Column(str, nullable=False, description="campaign name"),
            "model_version": pa.Column(str, nullable=False, description="registry version of the champion"),
            "scored_at": pa.Column("datetime64[us]", nullable=False, description="when computed, UTC"),
            **_reason_contract(campaign),
        },
        strict=True,
        name="scores",
    )


def audience_contract(campaign: Campaign) -> "pa.DataFrameSchema":
    """Whom to contact, and whom to compare them with."""
    import pandera.pandas as pa

    unit = [pa.Check.greater_than_or_equal_to(0.0), pa.Check.less_than_or_equal_to(1.0)]
    groups = ["contact", "holdout", "random", "random_holdout"]
    return pa.DataFrameSchema(
        {
            campaign.key: pa.Column(str, nullable=False, unique=True, description="entity key"),
            "snapshot": pa.Column("datetime64[us]", nullable=False, description="instant of the score"),
            "group": pa.Column(
                str,
                pa.Check.isin(groups),
                nullable=False,
                description="contacted because it pays; would have been, but held back; contacted by lot below the "
                "cut-off; held back and below it",
            ),
            "channel": pa.Column(str, nullable=True, description="how, or how it would have been"),
            "probability": pa.Column(float, unit, nullable=False, description="calibrated P(conversion)"),
            "decile": pa.Column("int8", nullable=False, description="1 is the top tenth of all scored"),
            "cost": pa.Column(float, nullable=False, description="of the contact"),
            "expected_profit": pa.Column(float, nullable=False, description="probability x margin - cost"),
            "campaign": pa.Column(str, nullable=False, description="campaign name"),
            "model_version": pa.Column(str, nullable=False, description="registry version of the champion"),
            "decided_at": pa.Column("datetime64[us]", nullable=False, description="when chosen, UTC"),
        },
        strict=True,
        name="audience",
    )


_REASON_PARTS = {
    "": "feature that moved the score",
    "_direction": "raises or lowers the probability",
    "_contribution": "to the calibrated log-odds",
    "_value": "of this customer",
    "_typical": "of the scored population",
    "_sentence": "the reason in words",
}


def reason_columns(campaign: Campaign) -> list[str]:
    """Names of the score columns that say why, the strongest reason first."""
    return [f"reason_{i}{part}" for i in range(1, campaign.explanations.reasons + 1) for part in _REASON_PARTS]


def _reason_contract(campaign: Campaign) -> dict[str, Any]:
    import pandera.pandas as pa

    found: dict[str, Any] = {}
    for i in range(1, campaign.explanations.reasons + 1):
        for part, words in _REASON_PARTS.items():
            checks = [pa.Check.isin(["raises", "lowers"])] if part == "_direction" else []
            kind = float if part == "_contribution" else str
            found[f"reason_{i}{part}"] = pa.Column(kind, checks, nullable=True, description=words)
    return found


def _attribute_column(kind: str, attribute: Attribute) -> "pa.Column":
    import pandera.pandas as pa

    checks = []
    if attribute.minimum is not None:
        checks.append(pa.Check.greater_than_or_equal_to(attribute.minimum))
    if attribute.maximum is not None:
        checks.append(pa.Check.less_than_or_equal_to(attribute.maximum))
    dtype = float if kind == "number" else str
    return pa.Column(dtype, checks, nullable=True, description=kind)
