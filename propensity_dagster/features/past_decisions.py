"""The training set of a table of past decisions: which rows test, and which fold each is in."""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import TableCampaign
from propensity_dagster.data.decisions import CONVERTED, DECIDED_AT, DECISIONS, POSITION
from propensity_dagster.data.engine import BATCH_ROWS, Engine
from propensity_dagster.data.lake import Home, publish_table, publishing
from propensity_dagster.errors import InsufficientDataError
from propensity_dagster.evaluation.splits import TEST, TRAIN, hash_fractions
from propensity_dagster.features.snapshots import SPLITS, TRAINING_SET, TrainingSetReport, shared_entities

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Order:
    """Rows at or after `threshold` of `column` test. `words` describe the two sides."""

    column: str
    threshold: Any
    words: dict[str, str]


def publish_decision_training_set(campaign: TableCampaign, home: Home, engine: Engine) -> TrainingSetReport:
    """Split the validated decisions into training and test rows.

    With an order the newest rows test, and rows of one instant stay together; else a stable hash of the key
    decides, so that a row that once was a test row always is one.

    Raises:
        InsufficientDataError: when a side has no conversion, or nothing else.
    """
    lake = home.lake(campaign.name)
    file = lake.existing(f"validated_{DECISIONS}")
    order = _order(campaign, file, engine)
    counts = _no_rows()
    with publishing(lake.file(TRAINING_SET)) as temporary:
        writer: pq.ParquetWriter | None = None
        for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
            table = pa.Table.from_batches([batch])
            fold, is_test = _assign(campaign, table, order)
            _count(counts, table, is_test)
            features = [n for n in table.column_names if n not in (campaign.key, POSITION, DECIDED_AT, CONVERTED)]
            out = table.select([campaign.key, *([order.column] if order else []), *features, CONVERTED])
            out = out.add_column(1, "split", pa.array(np.where(is_test, TEST, TRAIN).astype(object), pa.string()))
            if campaign.split.folds:
                out = out.add_column(2, "fold", pa.array(fold.astype(np.int8)))
            writer = writer or pq.ParquetWriter(temporary, out.schema, compression="zstd")
            writer.write_table(out)
        if writer is None:
            raise InsufficientDataError(f"{campaign.file}: there is no valid row to learn from")
        writer.close()
        rows, converted = ({split: found[i] for split, found in counts.items()} for i in (0, 1))
        _require_both_outcomes(campaign, rows, converted)
    publish_table(pa.Table.from_pylist(_described(campaign, order, counts)), lake.file(SPLITS))
    logger.info("training_set: %s rows train, %s test", f"{rows[TRAIN]:,}", f"{rows[TEST]:,}")
    return TrainingSetReport(rows, converted, shared_entities(campaign.key, lake.file(TRAINING_SET), engine))


def count_decision_splits(campaign: TableCampaign, home: Home, engine: Engine) -> list[dict[str, Any]]:
    """Rows and converters of each side, as `publish_decision_training_set` would split them."""
    file = home.lake(campaign.name).existing(f"validated_{DECISIONS}")
    order = _order(campaign, file, engine)
    column = order.column if order else campaign.key
    counts = _no_rows()
    for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS, columns=[column, CONVERTED]):
        table = pa.Table.from_batches([batch])
        _, is_test = _assign(campaign, table, order)
        _count(counts, table, is_test)
    return _described(campaign, order, counts)


def _no_rows() -> dict[str, list[int]]:
    """Rows and converters of each side, before any was counted."""
    return {TRAIN: [0, 0], TEST: [0, 0]}


def _count(counts: dict[str, list[int]], table: pa.Table, is_test: Any) -> None:
    labels = table[CONVERTED].to_numpy(zero_copy_only=False)
    for split, chosen in ((TRAIN, ~is_test), (TEST, is_test)):
        counts[split][0] += int(chosen.sum())
        counts[split][1] += int(labels[chosen].sum())


def _described(campaign: TableCampaign, order: _Order | None, counts: dict[str, list[int]]) -> list[dict[str, Any]]:
    """The rows of the `splits` table."""
    words = order.words if order else _words_of_hash(campaign)
    return [{"snapshot": words[s], "split": s, "rows": n, "converted": k} for s, (n, k) in counts.items()]


def _assign(campaign: TableCampaign, table: pa.Table, order: _Order | None) -> tuple[Any, Any]:
    """Fold (n,) and whether a row tests (n,)."""
    if order is not None:
        values = table[order.column].to_numpy(zero_copy_only=False)
        return np.zeros(len(values)), values >= order.threshold
    fraction = hash_fractions(table[campaign.key].to_pylist())
    if campaign.split.folds:
        fold = (fraction * campaign.split.folds).astype(np.int64)
        return fold, fold == 0
    return np.zeros(len(fraction)), fraction < campaign.split.test


def _order(campaign: TableCampaign, file: Path, engine: Engine) -> _Order | None:
    """The value from which on rows test, so that about the wanted share does and no instant is torn apart."""
    if campaign.source.order is None:
        return None
    column = POSITION if campaign.source.order == "file" else DECIDED_AT
    table = engine.read(file)
    table = table.mutate(rank=ibis.row_number().over(order_by=table[column]))
    total = pq.read_metadata(file).num_rows
    start = round(total * (1 - campaign.split.test))
    threshold = engine.arrow(table.filter(table["rank"] == start).select(value=column))["value"]
    if not len(threshold):
        raise InsufficientDataError(f"{campaign.file}: split.test: {total} rows leave none to test on")
    value = threshold[0].as_py()
    ends = table.aggregate(first=table[column].min(), last=table[column].max())
    limits = engine.arrow(ends).to_pylist()[0]
    if column == POSITION:
        words = {TRAIN: f"rows {limits['first']} to {value - 1}", TEST: f"rows {value} to {limits['last']}"}
        return _Order(column, value, words)
    words = {TRAIN: f"{limits['first']} to before {value}", TEST: f"{value} to {limits['last']}"}
    return _Order(column, np.datetime64(value), words)


def _words_of_hash(campaign: TableCampaign) -> dict[str, str]:
    by = f"hash of {campaign.key}"
    if campaign.split.folds:
        return {TRAIN: f"{campaign.split.folds} folds by {by}", TEST: f"every row once, {campaign.split.folds} folds"}
    return {TRAIN: f"{1 - campaign.split.test:.0%} by {by}", TEST: f"{campaign.split.test:.0%} by {by}"}


def _require_both_outcomes(campaign: TableCampaign, rows: dict[str, int], converted: dict[str, int]) -> None:
    for split, total in rows.items():
        if converted[split] in (0, total):
            raise InsufficientDataError(
                f"{campaign.file}: of {total:,} {split} rows {converted[split]:,} converted; both outcomes are needed. "
                "Check outcome.positive, or use more rows"
            )
