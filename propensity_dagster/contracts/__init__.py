"""One pandera schema per table: what a row of it promises."""

from propensity_dagster.contracts.tables import (
    audience_contract,
    decision_contract,
    entity_contract,
    reason_columns,
    scores_contract,
    stream_contract,
)

__all__ = [
    "audience_contract",
    "decision_contract",
    "entity_contract",
    "reason_columns",
    "scores_contract",
    "stream_contract",
]
