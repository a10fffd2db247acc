"""One pandera schema per table: what a row of it promises."""

from propensity_dagster.contracts.tables import (
    decision_contract,
    entity_contract,
    reason_columns,
    scores_contract,
    stream_contract,
)

__all__ = ["decision_contract", "entity_contract", "reason_columns", "scores_contract", "stream_contract"]
