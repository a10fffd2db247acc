"""The service's log of answers, day by day, as a table of the lake."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.lake import Home, publishing

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions"
_CHUNK = 20_000


@dataclass(frozen=True)
class PredictionsReport:
    """What a day's files held. `unreadable` are lines that are no records: the end of a file that was cut short."""

    files: int
    rows: int
    unreadable: int
    by_version: dict[str, int]
    mean_probability: float | None


def ingest_predictions(campaign: Campaign, day: date, home: Home) -> PredictionsReport:
    """Rewrite one day of the `predictions` table from all files of that day; rows in = rows out.

    `features` is a struct with one field for each feature of any version that answered that day, categories as text.
    """
    folder = home.predictions / campaign.name / f"day={day}"
    files = sorted(folder.glob("*.jsonl"))
    heads = {head["head"]: head for file in files for head in _heads(file)}
    schema = _schema(heads)
    rows = unreadable = 0
    total = 0.0
    versions: dict[str, int] = {}
    target = home.lake(campaign.name).partition(PREDICTIONS, "day", day)
    with publishing(target) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for file in files:
            chunk: list[dict[str, Any]] = []
            for record in _records(file):
                head = heads.get(record["package"]) if record else None
                if record is None or head is None:
                    unreadable += 1
                    continue
                chunk.append(_row(campaign, record, head))
                versions[head["model_version"]] = versions.get(head["model_version"], 0) + 1
                total += record["probability"]
                rows += 1
                if len(chunk) == _CHUNK:
                    writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
                    chunk = []
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
    if unreadable:
        logger.warning("predictions %s: %d lines of %d files cannot be read", day, unreadable, len(files))
    return PredictionsReport(len(files), rows, unreadable, versions, total / rows if rows else None)


def _schema(heads: dict[str, dict[str, Any]]) -> pa.Schema:
    kinds: dict[str, pa.DataType] = {}
    for head in heads.values():
        for name in head["features"]:
            kinds.setdefault(name, pa.string() if name in head["categories"] else pa.float64())
    return pa.schema(
        [
            ("request_id", pa.string()),
            ("time", pa.timestamp("us")),
            ("key", pa.string()),
            ("campaign", pa.string()),
            ("model_version", pa.string()),
            ("package", pa.string()),
            ("variant", pa.string()),
            ("endpoint", pa.string()),
            ("probability", pa.float64()),
            ("shadow_version", pa.string()),
            ("shadow_probability", pa.float64()),
            ("shadow_difference", pa.float64()),
            ("features_unseen", pa.list_(pa.string())),
            ("features", pa.struct([pa.field(name, kind) for name, kind in kinds.items()])),
        ]
    )


def _heads(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for line in lines:
            if line.startswith(b'{"head"') and line.endswith(b"\n"):
                yield json.loads(line)


def _records(file: Path) -> Iterator[dict[str, Any] | None]:
    """The records of a file; None for a line that is none."""
    with file.open("rb") as lines:
        for line in lines:
            if line.startswith(b'{"head"'):
                continue
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            yield record


def _row(campaign: Campaign, record: dict[str, Any], head: dict[str, Any]) -> dict[str, Any]:
    shadow = record["shadow"] or {}
    categories = head["categories"]
    features = {
        name: categories[name][int(value)] if name in categories and value is not None else value
        for name, value in zip(head["features"], record["features"], strict=True)
    }
    return {
        "request_id": record["request_id"],
        "time": datetime.fromtimestamp(record["time"], UTC).replace(tzinfo=None),
        "key": record["key"],
        "campaign": campaign.name,
        "model_version": head["model_version"],
        "package": record["package"],
        "variant": record["variant"],
        "endpoint": record["endpoint"],
        "probability": record["probability"],
        "shadow_version": shadow.get("model_version"),
        "shadow_probability": shadow.get("probability"),
        "shadow_difference": shadow.get("difference"),
        "features_unseen": record["unseen"],
        "features": features,
    }
