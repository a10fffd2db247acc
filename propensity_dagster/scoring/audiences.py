"""The audience of a snapshot as a table: its groups, its plan in the footer, and what was delivered of it.

Belongs here: reading and writing it. Does not: who is in it, which is the plan's; where it goes, which is the export's.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.data.days import pc
from propensity_dagster.data.lake import Lake, publish_table

AUDIENCE, EXPORTED = "audience", "exported"
CONTACT, HELD, RANDOM, RANDOM_HELD = "contact", "holdout", "random", "random_holdout"
"""Contacted because it pays; would have been, but is held; contacted by lot below the cut-off; held and below it."""

SENDING, SENT, WITHDRAWN = "sending", "sent", "withdrawn"
"""States of a contact in the journal of an export."""

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
    return bool(lake.glob(f"{EXPORTED}/*/snapshot={snapshot}/batch-*.parquet"))


def exported_contacts(lake: Lake, export: str, snapshot: date) -> dict[str, int]:
    """Contacts of a snapshot that one export has, by their state."""
    found: dict[str, int] = {}
    for file in lake.glob(f"{EXPORTED}/{export}/snapshot={snapshot}/batch-*.parquet"):
        for state in pq.read_table(file, columns=["state"])["state"].to_pylist():
            found[state] = found.get(state, 0) + 1
    return found


def delivered_audiences(lake: Lake) -> list[date]:
    """Snapshots whose contacts were made, ascending: those that one export has sent in full; all, without exports.

    An audience that was sent in part is in neither: who was left out is not known to be like the others.
    """
    return [day for day in lake.partitions(AUDIENCE, "snapshot") if _is_delivered(lake, day)]


def contacted_keys(lake: Lake, day: date, *, with_held: bool) -> pa.Array:
    """Who was contacted on a snapshot; with those who would have been but are held, if anybody was."""
    table = _keys_and(lake.partition(AUDIENCE, "snapshot", day), "group")
    contacts = _keys_of(table, (CONTACT, RANDOM))
    if read_plan(lake, day)["exports"]:
        sent = pa.concat_arrays([pa.array([], pa.string()), *(keys for _, _, keys in _sent(lake, day))])
        contacts = contacts.filter(pc.is_in(contacts, sent))
    held = _keys_of(table, (HELD,)) if with_held and len(contacts) else pa.array([], pa.string())
    return pa.concat_arrays([contacts, held])


def _is_delivered(lake: Lake, day: date) -> bool:
    if not read_plan(lake, day)["exports"]:
        return True
    table = _keys_and(lake.partition(AUDIENCE, "snapshot", day), "group")
    contacts = len(_keys_of(table, (CONTACT, RANDOM)))
    done: dict[str, int] = {}
    for export, rows, _ in _sent(lake, day):
        done[export] = done.get(export, 0) + rows
    return bool(done) and max(done.values()) >= contacts


def _sent(lake: Lake, day: date) -> Iterator[tuple[str, int, pa.Array]]:
    """Of each batch that was sent: the export, its rows, and the keys of those who did not withdraw."""
    for file in lake.glob(f"{EXPORTED}/*/snapshot={day}/batch-*.parquet"):
        batch = _keys_and(file, "state")
        sent = batch.filter(pc.equal(batch["state"], SENT)).column(0).combine_chunks()
        if not pc.any(pc.equal(batch["state"], SENDING)).as_py():
            yield file.parent.parent.name, batch.num_rows, sent


def _keys_and(file: Path, column: str) -> pa.Table:
    """The keys, which are the first column, and one more: an audience of every night is looked at every night."""
    return pq.read_table(file, columns=[pq.read_schema(file).names[0], column])


def _keys_of(table: pa.Table, groups: Sequence[str]) -> pa.Array:
    return table.filter(pc.is_in(table["group"], pa.array(groups))).column(0).combine_chunks()
