"""Dagster's SQLite storage of a home folder, which several processes may be the first to open."""

import os
from pathlib import Path
from typing import Any

from dagster._core.storage.sqlite_storage import DagsterSqliteStorage, _event_logs_directory
from dagster._serdes import ConfigurableClassData

from propensity_dagster.components.event_log import BatchingSqliteEventLogStorage
from propensity_dagster.data.lake import locked


class HomeStorage(DagsterSqliteStorage):
    """Dagster's own storage but for two things: databases are made by one process at a time, and batches are fast.

    Dagster takes a database that another process is still making for one of before 2024, and marks it so; the
    other marks it as new, and no process can open it from then on ("more than one head present").
    """

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None):
        with locked(Path(base_dir) / ".storage.lock"):
            super().__init__(base_dir, inst_data)
            self._event_log_storage = BatchingSqliteEventLogStorage(_event_logs_directory(base_dir))

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """No settings."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Any) -> "HomeStorage":
        """The storage of this DAGSTER_HOME."""
        del config_value
        return cls.from_local(os.environ["DAGSTER_HOME"], inst_data)
