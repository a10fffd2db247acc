"""Batch scoring of one snapshot. Memory does not grow with the number of customers.

First pass: features stream through in Arrow batches into a matrix filled column by column, probabilities go
to a temporary file. Second pass: exact global percentiles over the scores alone, by the engine's external
sort, then the finished table.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import logging
import tempfile
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign
from propensity_dagster.contracts import scores_contract
from propensity_dagster.data.engine import BATCH_ROWS, Engine
from propensity_dagster.data.lake import Home, publishing
from propensity_dagster.data.quarantine import count_violations
from propensity_dagster.features.snapshots import snapshot_instant
from propensity_dagster.models.base import FittedModel

logger = logging.getLogger(__name__)

SCORES = "scores"


@dataclass(frozen=True)
class ScoresReport:
    """What was published. `rows_in` counts feature rows, `rows` score rows: they must be equal."""

    rows_in: int
    rows: int
    mean_probability: float
    smallest: float
    largest: float

    @property
    def constant(self) -> bool:
        """Whether every score is the same: nothing was told apart."""
        return self.rows > 1 and self.smallest == self.largest


def score_snapshot(
    campaign: Campaign,
    snapshot: date,
    model: FittedModel,
    version: str,
    scored_at: datetime,
    home: Home,
    engine: Engine,
) -> ScoresReport:
    """Score the `features` of one snapshot and publish `scores`, replacing that partition alone.

    Args:
        campaign: gives key, tiers and money.
        snapshot: which partition.
        model: the champion.
        version: its version in the registry.
        scored_at: stamped on every row, UTC.
        home: where the lake is.
        engine: for the ranking.

    Raises:
        DataContractError: when the features are not there, or lack what the model needs.
    """
    lake = home.lake(campaign.name)
    features = lake.existing_partition("features", "snapshot", snapshot)
    target = lake.partition(SCORES, "snapshot", snapshot)
    with tempfile.TemporaryDirectory(prefix="propensity-scores-") as scratch:
        raw = Path(scratch) / "probabilities.parquet"
        rows_in = _write_probabilities(campaign, features, model, raw)
        ranked = engine.read(raw)
        ranked = ranked.mutate(percentile=ibis.cume_dist().over(order_by=ranked.probability))
        writer: pq.ParquetWriter | None = None
        rows, total, smallest, largest = 0, 0.0, np.inf, -np.inf
        with publishing(target) as temporary:
            for batch in engine.batches(ranked.order_by(campaign.key)):
                table = _finish(campaign, snapshot, version, scored_at, batch, rows_in)
                writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
                writer.write_table(table)
                probability = table["probability"].to_numpy()
                rows += table.num_rows
                total += float(probability.sum())
                smallest, largest = min(smallest, probability.min()), max(largest, probability.max())
            if writer is None:
                empty = pa.RecordBatch.from_pylist([], schema=_ranked_schema(campaign))
                writer = pq.ParquetWriter(
                    temporary,
                    _finish(campaign, snapshot, version, scored_at, empty, 1).schema,
                    compression="zstd",
                )
            writer.close()
    logger.info("scores %s: %s customers, mean probability %.4f", snapshot, f"{rows:,}", total / max(rows, 1))
    return ScoresReport(rows_in, rows, total / max(rows, 1), float(smallest), float(largest))


def score_violations(campaign: Campaign, snapshot: date, home: Home, engine: Engine) -> int:
    """How many rows of the published scores break their contract: key twice, probability outside 0..1, ..."""
    table = engine.read(home.lake(campaign.name).existing_partition(SCORES, "snapshot", snapshot))
    contract = scores_contract(campaign)
    return int(engine.arrow(table.aggregate(n=count_violations(table, contract).cast("int64")))["n"][0].as_py())


def _write_probabilities(campaign: Campaign, features: Path, model: FittedModel, file: Path) -> int:
    schema = pa.schema([(campaign.key, pa.string()), ("probability", pa.float64())])
    columns = [campaign.key, *model.contract.names]
    source = pq.ParquetFile(features)
    present = [name for name in columns if name in source.schema_arrow.names]
    rows = 0
    with pq.ParquetWriter(file, schema, compression="lz4") as writer:
        for batch in source.iter_batches(batch_size=BATCH_ROWS, columns=present):
            probability = model.predict_proba(batch)
            writer.write_batch(pa.record_batch([batch.column(campaign.key), pa.array(probability)], schema=schema))
            rows += batch.num_rows
    return rows


def _ranked_schema(campaign: Campaign) -> pa.Schema:
    return pa.schema([(campaign.key, pa.string()), ("probability", pa.float64()), ("percentile", pa.float64())])


def _finish(
    campaign: Campaign, snapshot: date, version: str, scored_at: datetime, batch: pa.RecordBatch, total: int
) -> pa.Table:
    probability = batch.column("probability").to_numpy()
    percentile = batch.column("percentile").to_numpy()
    # The rank as an integer: 0.7 x 10 is not 7 in floating point.
    rank = np.rint(percentile * total).astype(np.int64)
    decile = 11 - -(-10 * rank // total)
    tiers = np.where(
        percentile > campaign.tiers.high,
        "high",
        np.where(percentile > campaign.tiers.medium, "medium", "low"),
    )
    n = batch.num_rows
    value = campaign.value
    same = pa.array([0] * n, pa.int32())
    return pa.table(
        {
            campaign.key: batch.column(campaign.key),
            "snapshot": pa.array([snapshot_instant(snapshot)], pa.timestamp("us")).take(same),
            "probability": pa.array(probability),
            "percentile": pa.array(percentile),
            "decile": pa.array(decile.astype(np.int8)),
            "tier": pa.array(tiers.astype(object), pa.string()),
            "expected_value": pa.array(probability * value.margin_per_conversion - value.cost_per_contact),
            "campaign": pa.array([campaign.name]).take(same),
            "model_version": pa.array([version]).take(same),
            "scored_at": pa.array([scored_at], pa.timestamp("us")).take(same),
        }
    )
