"""Dagster's SQLite event log, writing the events of many partitions in one transaction.

A run over 609 days records an event per asset and day. Dagster's own storage stores each with two commits
and several schema look-ups (about 10 ms), and hands batches to `store_event_batch` only to loop over them.
`make benchmark` measures the two against each other. `HomeStorage` has it; older homes name it in `dagster.yaml`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as db
from dagster._core.events import ASSET_EVENTS
from dagster._core.events.log import EventLogEntry
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._serdes import ConfigurableClassData

# Dagster collects events into batches only when this is set, in whichever process runs the step.
os.environ.setdefault("DAGSTER_EVENT_BATCH_SIZE", "1000")


class BatchingSqliteEventLogStorage(SqliteEventLogStorage):
    """Equal to its base but for the speed of batches. Kept below DAGSTER_HOME/history, as Dagster's is."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """No settings."""
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Any
    ) -> "BatchingSqliteEventLogStorage":
        """The storage of this DAGSTER_HOME."""
        del config_value
        base = Path(os.environ["DAGSTER_HOME"]) / "history" / "runs"
        return cls(inst_data=inst_data, base_dir=str(base))

    def store_event_batch(self, events: Sequence[EventLogEntry]) -> None:
        """Store events of runs: the asset events together, in the run's shard and in the index, others singly."""
        for run_id in dict.fromkeys(event.run_id for event in events):
            of_run = [event for event in events if event.run_id == run_id]
            together = [event for event in of_run if _is_asset_event(event)]
            super().store_event_batch([event for event in of_run if not _is_asset_event(event)])
            if together:
                self._store_asset_events(run_id, together)

    def _store_asset_events(self, run_id: str, events: Sequence[EventLogEntry]) -> None:
        rows = [self._event_to_row(event) for event in events]
        with self.run_connection(run_id) as connection:
            connection.execute(SqlEventLogStorageTable.insert(), rows)
        with self.index_transaction() as connection:
            connection.execute(SqlEventLogStorageTable.insert(), rows)
            # SQLite has one writer: within the transaction the new ids are the last ones, in order.
            last = connection.execute(db.select(db.func.max(SqlEventLogStorageTable.c.id))).scalar_one()
            ids = range(last - len(events) + 1, last + 1)
            self._store_asset_event_tags(connection, events, list(ids))
            newest = {event.get_dagster_event().asset_key: (event, i) for event, i in zip(events, ids, strict=True)}
            for event, event_id in newest.values():
                self._store_asset_event(connection, event, event_id)


def _is_asset_event(event: EventLogEntry) -> bool:
    return event.is_dagster_event and event.dagster_event_type in ASSET_EVENTS
