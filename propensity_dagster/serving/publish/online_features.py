"""Publishing a snapshot's features for the service to look up: a SQLite file, or Redis where the settings say so."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import ROW_NUMBER, Campaign
from propensity_dagster.data.lake import Home, publishing
from propensity_dagster.errors import ConfigError, SourceError
from propensity_dagster.serving.online import FILE, Facts, redis_facts, sqlite_facts, write_redis, write_sqlite
from propensity_dagster.serving.settings import read_settings

_BATCH_ROWS = 8_192


@dataclass(frozen=True)
class OnlineReport:
    """What is published. `skipped` says why nothing new is."""

    store: str
    snapshot: str
    rows: int
    skipped: str = ""


def publish_online_features(campaign: Campaign, snapshot: date, home: Home) -> OnlineReport:
    """Publish the features of a snapshot unless a newer one is published already: a backfill never ages the store.

    Raises:
        DataContractError: when the features are not there.
        SourceError: when Redis does not take them; what was published stays.
    """
    if campaign.key == ROW_NUMBER:
        return OnlineReport("none", str(snapshot), 0, "the table has no key column to look a customer up by")
    file = home.lake(campaign.name).existing_partition("features", "snapshot", snapshot)
    columns = [name for name in pq.read_schema(file).names if name not in (campaign.key, *campaign.protected)]
    rows = pq.read_metadata(file).num_rows
    facts = Facts(str(snapshot), time.time(), rows, tuple(columns))
    url = read_settings(home.serving).online_store
    if url is None:
        return _to_sqlite(home.serving / campaign.name / FILE, facts, _rows(file, campaign.key, columns))
    return _to_redis(url, campaign, facts, _rows(file, campaign.key, columns))


def _to_sqlite(file: Path, facts: Facts, rows: Iterator[tuple[str, Sequence[Any]]]) -> OnlineReport:
    present = sqlite_facts(file)
    if present is not None and present.snapshot > facts.snapshot:
        return _older(file.name, present)
    with publishing(file) as temporary:
        written = write_sqlite(temporary, facts, rows)
    return OnlineReport(file.name, facts.snapshot, written)


def _to_redis(url: str, campaign: Campaign, facts: Facts, rows: Iterator[tuple[str, Sequence[Any]]]) -> OnlineReport:
    try:
        import redis.exceptions
    except ImportError:
        raise ConfigError("online_store names Redis: pip install 'propensity_dagster[redis]'") from None
    try:
        present = redis_facts(url, campaign.name)
        if present is not None and present.snapshot > facts.snapshot:
            return _older("redis", present)
        return OnlineReport("redis", facts.snapshot, write_redis(url, campaign.name, facts, rows))
    except (redis.exceptions.RedisError, OSError) as error:
        raise SourceError(f"online_store: Redis did not take the features: {type(error).__name__}") from None


def _older(store: str, present: Facts) -> OnlineReport:
    return OnlineReport(store, present.snapshot, present.rows, f"{present.snapshot} is published, and newer")


def _rows(file: Path, key: str, columns: list[str]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Key and values of each row: numbers as float64, as a model's matrix has them, categories as text."""
    for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=[key, *columns]):
        keys = batch.column(key).cast(pa.string()).to_pylist()
        values = [_plain(batch.column(name)) for name in columns]
        yield from zip(keys, zip(*values, strict=True), strict=True)


def _plain(column: pa.Array) -> list[Any]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.to_pylist()
    return column.cast(pa.float64()).to_pylist()
