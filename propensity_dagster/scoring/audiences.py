"""The audience of a snapshot as a table: its groups, its plan in the footer, and what was delivered of it.

Belongs here: reading and writing it. Does not: who is in it, which is the plan's; where it goes, which is the export's.
"""

import json
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.data.lake import Lake, publish_table

AUDIENCE, EXPORTED = "audience", "exported"
CONTACT, HELD, RANDOM, RANDOM_HELD = "contact", "holdout", "random", "random_holdout"
"""Contacted because it pays; would have been, but is held; contacted by lot below the cut-off; held and below it."""

_PLAN = "plan"


def publish_audience_table(table: pa.Table, plan: dict[str, Any], lake: Lake, snapshot: date) -> None:
    """Publish the audience of a snapshot, with its plan in the file's footer."""
    described = table.replace_schema_metadata({_PLAN: json.dumps(plan)})
    publish_table(described, lake.partition(AUDIENCE, "snapshot", snapshot))


def read_plan(lake: Lake, snapshot: date) -> dict[str, Any]:
    """The plan of an audience, as plain data.

    Raises:
        DataContractError: when the snapshot has no audience.
    """
    file = lake.existing_partition(AUDIENCE, "snapshot", snapshot)
    return json.loads((pq.read_schema(file).metadata or {})[_PLAN.encode()])


def was_exported(lake: Lake, snapshot: date) -> bool:
    """Whether any contact of the snapshot was sent anywhere, or may have been."""
    return any(lake.root.glob(f"{EXPORTED}/*/snapshot={snapshot}/batch-*.parquet"))


def exported_contacts(lake: Lake, export: str, snapshot: date) -> dict[str, int]:
    """Contacts of a snapshot that one export has, by their state."""
    found: dict[str, int] = {}
    for file in sorted(lake.root.glob(f"{EXPORTED}/{export}/snapshot={snapshot}/batch-*.parquet")):
        for state in pq.read_table(file, columns=["state"])["state"].to_pylist():
            found[state] = found.get(state, 0) + 1
    return found


def delivered_audiences(lake: Lake) -> list[date]:
    """Snapshots whose contacts were made, ascending: those that were exported; all, where there is no export."""
    days = lake.partitions(AUDIENCE, "snapshot")
    return [day for day in days if was_exported(lake, day) or not read_plan(lake, day)["exports"]]
