"""Batch scoring of one snapshot. Memory does not grow with the number of customers.

First pass: features stream through in Arrow batches into a matrix filled column by column, log-odds go to temporary
files. Second pass: the reasons of all, or of the best. Third: exact global percentiles from the sorted log-odds alone,
which are mapped from their file, then the finished table.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import expit

from propensity_dagster.campaign import Campaign
from propensity_dagster.contracts import reason_columns, scores_contract
from propensity_dagster.data.engine import BATCH_ROWS, Engine
from propensity_dagster.data.lake import Home, publishing, scratch_folder
from propensity_dagster.data.quarantine import count_violations
from propensity_dagster.errors import ConfigError, DataContractError
from propensity_dagster.explain.population import sample_file
from propensity_dagster.features.snapshots import snapshot_instant
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Floats
from propensity_dagster.models.dataset import CATEGORY
from propensity_dagster.models.prior import LogOddsHistogram
from propensity_dagster.models.rows import LOG_ODDS, RowScorer, ahead

if TYPE_CHECKING:
    from propensity_dagster.explain.reasons import ReasonCoder

logger = logging.getLogger(__name__)

_PROGRESS_ROWS = 1_000_000
_TIERS = ("low", "medium", "high")
SCORES, REPLACED = "scores", "scores_replaced"
PRIOR_SHIFT = "prior_shift"
"""Key of the file's metadata: what was added to all log-odds of the snapshot."""


@dataclass(frozen=True)
class ScoresReport:
    """What was published.

    Attributes:
        rows_in: feature rows.
        rows: score rows; they must be as many.
        mean_probability: mean of the published probabilities.
        smallest: the smallest of them.
        largest: the largest.
        prior_shift: what was added to all log-odds to suit these rows (see models/prior.py).
        unseen: per feature, rows with a category that training never saw; they count as missing.
    """

    rows_in: int
    rows: int
    mean_probability: float
    smallest: float
    largest: float
    prior_shift: float
    unseen: dict[str, int]

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
        engine: where the features are read and the model is called.

    Raises:
        DataContractError: when the features are not there, or lack what the model needs.
    """
    lake = home.lake(campaign.name)
    features = lake.existing_partition("features", "snapshot", snapshot)
    target = lake.partition(SCORES, "snapshot", snapshot)
    if target.exists():
        logger.info("scores %s: replacing %s earlier ones", snapshot, f"{pq.read_metadata(target).num_rows:,}")
        _keep_replaced(campaign, snapshot, version, home)
    coder = _reason_coder(campaign, features, model)
    with scratch_folder("scores") as scratch:
        raw, numbers = scratch / "log_odds.parquet", scratch / "log_odds.float64"
        first = _write_log_odds(campaign, features, model, engine, raw, numbers)
        ordered = np.memmap(numbers, np.float64, "r+") if first.rows else np.empty(0)
        ordered.sort()
        if coder is not None:
            raw = _with_reasons(campaign, features, model, raw, ordered, coder)
        rows_in, shift = first.rows, 0.0
        if campaign.prior.adapt:
            shift = first.histogram.shift(model.facts["calibration_rate"], campaign.prior.max_odds_ratio)
        writer: pq.ParquetWriter | None = None
        rows, total, smallest, largest = 0, 0.0, np.inf, -np.inf
        with publishing(target) as temporary:
            for batch in ahead(pq.ParquetFile(raw).iter_batches(BATCH_ROWS)):
                table = _finish(campaign, snapshot, version, scored_at, batch, ordered, shift, coder)
                writer = writer or _writer(temporary, table.schema, campaign.key)
                writer.write_table(table)
                probability = table["probability"].to_numpy()
                rows += table.num_rows
                total += float(probability.sum())
                _show_progress("scores ranked", rows, batch.num_rows, rows_in)
                smallest, largest = min(smallest, probability.min()), max(largest, probability.max())
            if writer is None:
                empty = pa.RecordBatch.from_pylist([], schema=_raw_schema(campaign))
                table = _finish(campaign, snapshot, version, scored_at, empty, ordered, 0.0, None)
                writer = _writer(temporary, table.schema, campaign.key)
            writer.close()
    logger.info("scores %s: %s rows, mean probability %.4f", snapshot, f"{rows:,}", total / max(rows, 1))
    unseen = _unseen_categories(features, model, engine)
    if unseen:
        logger.warning("scores %s: categories never seen in training: %s", snapshot, unseen)
    mean = total / max(rows, 1)
    return ScoresReport(rows_in, rows, mean, float(smallest), float(largest), shift, unseen)


def newest_scored(campaign: Campaign, home: Home) -> date:
    """The newest scored snapshot.

    Raises:
        ConfigError: when nothing has been scored yet.
    """
    scored = home.lake(campaign.name).partitions(SCORES, "snapshot")
    if not scored:
        raise ConfigError(
            f"{campaign.name}: nothing has been scored yet; run propensity demo or propensity score first"
        )
    return scored[-1]


def score_violations(campaign: Campaign, snapshot: date, home: Home, engine: Engine) -> int:
    """How many rows of the published scores break their contract: key twice, probability outside 0..1, ..."""
    table = engine.read(home.lake(campaign.name).existing_partition(SCORES, "snapshot", snapshot))
    contract = scores_contract(campaign)
    return int(engine.arrow(table.aggregate(n=count_violations(table, contract).cast("int64")))["n"][0].as_py())


def stamp_of(scores: Path) -> tuple[str, datetime] | None:
    """Version of the model that gave a file of scores, and when; None where nobody was scored."""
    for batch in pq.ParquetFile(scores).iter_batches(1, columns=["model_version", "scored_at"]):
        return batch.column(0)[0].as_py(), batch.column(1)[0].as_py()
    return None


def version_of(scores: Path) -> str | None:
    """Version of the model that gave a file of scores; None where nobody was scored."""
    stamp = stamp_of(scores)
    return stamp[0] if stamp else None


def require_version(campaign: Campaign, snapshot: date, home: Home) -> str:
    """Version of the model whose scores of a snapshot are in force.

    Raises:
        DataContractError: when the snapshot has not been scored, or has no rows.
    """
    version = version_of(home.lake(campaign.name).existing_partition(SCORES, "snapshot", snapshot))
    if version is None:
        raise DataContractError(f"{campaign.name}: snapshot {snapshot} has no scores: nobody was eligible")
    return version


def delivered_scores(campaign: Campaign, snapshot: date, home: Home) -> dict[str, Path]:
    """Files of the scores of a snapshot by the version that gave them, the ones in force last.

    Scores that another version replaced had been delivered before: they are kept, to be judged by their outcomes.

    Raises:
        DataContractError: when the snapshot has not been scored, or has no rows.
    """
    version = require_version(campaign, snapshot, home)
    lake = home.lake(campaign.name)
    replaced = lake.glob(f"{REPLACED}/version=*/snapshot={snapshot}/part.parquet")
    earlier = {str(version_of(file)): file for file in sorted(replaced, key=lambda f: f.stat().st_mtime_ns)}
    earlier.pop(version, None)
    return {**earlier, version: lake.partition(SCORES, "snapshot", snapshot)}


def _keep_replaced(campaign: Campaign, snapshot: date, version: str, home: Home) -> None:
    """Scores of another version stay under a name of their own: a second link to the file, no copy of it.

    In a store each file has its own stamp, which two links could not have.
    """
    lake = home.lake(campaign.name)
    current = lake.partition(SCORES, "snapshot", snapshot)
    before = version_of(current)
    if before not in (None, version):
        with publishing(lake.partition(f"{REPLACED}/version={before}", "snapshot", snapshot)) as temporary:
            (os.link if lake.store is None else shutil.copyfile)(current, temporary)


@dataclass
class _FirstPass:
    """What the first pass over the features learns."""

    rows: int
    histogram: LogOddsHistogram


def _reason_coder(campaign: Campaign, features: Path, model: FittedModel) -> ReasonCoder | None:
    """None where no reasons are asked for, or nobody is there to have any."""
    if not campaign.explanations.reasons or not pq.read_metadata(features).num_rows:
        return None
    from propensity_dagster.explain.reasons import ReasonCoder

    present = pq.read_schema(features).names
    if any(name not in present for name in model.contract.names):
        return None  # scoring stops at that, and says what is missing
    return ReasonCoder(campaign, model, sample_file(features, model.contract.names))


def _with_reasons(
    campaign: Campaign, features: Path, model: FittedModel, raw: Path, ordered: Floats, coder: ReasonCoder
) -> Path:
    """A file beside `raw` with its rows and their reasons; of rows at or below `above_percentile` these are empty."""
    least = int(campaign.explanations.above_percentile * len(ordered) + 1e-9)
    cut_off = ordered[least] if least < len(ordered) else np.inf
    target = raw.with_name("reasons.parquet")
    scores = pq.ParquetFile(raw).iter_batches(batch_size=BATCH_ROWS)
    rows = pq.ParquetFile(features).iter_batches(batch_size=BATCH_ROWS, columns=model.contract.names)
    writer: pq.ParquetWriter | None = None
    for scored, batch in zip(scores, rows, strict=True):
        chosen = np.flatnonzero(scored.column(LOG_ODDS).to_numpy() >= cut_off)
        found = coder.reasons(model.contract.encode(batch.take(pa.array(chosen)))).columns()
        place = np.full(batch.num_rows, -1)
        place[chosen] = np.arange(len(chosen))
        at = pa.array(place, mask=place < 0)
        table = pa.table({name: scored.column(name) for name in scored.schema.names})
        for name, column in found.items():
            table = table.append_column(name, column.take(at))
        writer = writer or pq.ParquetWriter(target, table.schema, compression="lz4", use_dictionary=False)
        writer.write_table(table)
    assert writer is not None  # nobody to explain has no coder
    writer.close()
    return target


def _write_log_odds(
    campaign: Campaign, features: Path, model: FittedModel, engine: Engine, file: Path, numbers: Path
) -> _FirstPass:
    """Keys and log-odds to `file`, the log-odds alone to `numbers`, as they are in memory."""
    schema = _raw_schema(campaign)
    metadata = pq.read_metadata(features)
    model.contract.require(metadata.schema.names)
    found = _FirstPass(0, LogOddsHistogram())
    scored = engine.map_batches(features, [campaign.key, *model.contract.names], schema, RowScorer(model))
    with pq.ParquetWriter(file, schema, compression="lz4", use_dictionary=False) as writer, numbers.open("wb") as plain:
        for batch in scored:
            writer.write_batch(batch)
            z = batch.column(LOG_ODDS).to_numpy()
            z.tofile(plain)
            found.rows += batch.num_rows
            _show_progress("scores", found.rows, batch.num_rows, metadata.num_rows)
            if campaign.prior.adapt:
                found.histogram.add(z)
    return found


def _unseen_categories(features: Path, model: FittedModel, engine: Engine) -> dict[str, int]:
    """Per category feature, rows with a value that training never saw."""
    table: Any = engine.read(features)
    specs = [spec for spec in model.contract.features if spec.kind == CATEGORY]
    if not specs:
        return {}
    new = {f"new_{i}": table[s.name].notnull() & table[s.name].notin(s.categories) for i, s in enumerate(specs)}
    counts = table.aggregate(**{name: unknown.sum().fill_null(0).cast("int64") for name, unknown in new.items()})
    found = engine.arrow(counts).to_pylist()[0]
    return {spec.name: found[f"new_{i}"] for i, spec in enumerate(specs) if found[f"new_{i}"]}


def _show_progress(what: str, rows: int, added: int, total: int) -> None:
    if total > _PROGRESS_ROWS and rows // _PROGRESS_ROWS > (rows - added) // _PROGRESS_ROWS:
        logger.info("%s: %s of %s rows", what, f"{rows:,}", f"{total:,}")


def _writer(file: Path, schema: pa.Schema, key: str) -> pq.ParquetWriter:
    """Dictionaries of keys and of numbers that are all different would be made and thrown away."""
    repeated: Any = [field.name for field in schema if field.name != key and field.type != pa.float64()]
    return pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=repeated)


def _raw_schema(campaign: Campaign) -> pa.Schema:
    return pa.schema([(campaign.key, pa.string()), (LOG_ODDS, pa.float64())])


def _ranks(z: Floats, ordered: Floats) -> NDArray[np.int64]:
    """How many of all log-odds are not above each of these (n,). Looked up in order, so that memory is too."""
    order = np.argsort(z)
    ranks = np.empty(len(z), dtype=np.int64)
    ranks[order] = np.searchsorted(ordered, z[order], side="right")
    return ranks


def _finish(
    campaign: Campaign,
    snapshot: date,
    version: str,
    scored_at: datetime,
    batch: pa.RecordBatch,
    ordered: Floats,
    shift: float,
    coder: ReasonCoder | None,
) -> pa.Table:
    z = batch.column(LOG_ODDS).to_numpy()
    probability = expit(z + shift)
    rank, total = _ranks(z, ordered), max(len(ordered), 1)
    percentile = rank / total
    decile = 11 - -(-10 * rank // total)
    tier = (percentile > campaign.tiers.medium).astype(np.int8) + (percentile > campaign.tiers.high)
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
            "tier": pa.array(_TIERS).take(pa.array(tier)),
            "expected_value": pa.array(probability * value.margin_per_conversion - value.cost_per_contact),
            "campaign": pa.array([campaign.name]).take(same),
            "model_version": pa.array([version]).take(same),
            "scored_at": pa.array([scored_at], pa.timestamp("us")).take(same),
            **(coder.worded(batch) if coder is not None else _no_reasons(campaign, n)),
        }
    ).replace_schema_metadata({PRIOR_SHIFT: repr(shift)})


def _no_reasons(campaign: Campaign, rows: int) -> dict[str, pa.Array]:
    """The columns of reasons, empty."""
    return {
        name: pa.nulls(rows, pa.float64() if name.endswith("_contribution") else pa.string())
        for name in reason_columns(campaign)
    }
