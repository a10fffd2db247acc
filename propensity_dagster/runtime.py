"""What a stage runs with: the home folder, an engine, the model store. Plain objects, no orchestration."""

import os
import re
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property

from propensity_dagster.data.engine import Engine, open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.data.spark import open_spark
from propensity_dagster.errors import ConfigError
from propensity_dagster.registry.mlflow_store import MlflowStore

DEFAULT_MEMORY_GB = 4.0
DUCKDB = "duckdb"
_SPARK = re.compile(r"spark|local\[(\d+|\*)\]|(spark|sc)://\S+")


@dataclass(frozen=True)
class Runtime:
    """Everything of the deployment that a stage may need.

    Attributes:
        home: the home folder.
        memory_gb: what an engine on this machine may take; the rest is spilled.
        threads: of an engine on this machine; None takes all cores.
        engine_url: "duckdb", or where Spark is: see `open_spark`.
    """

    home: Home
    memory_gb: float = DEFAULT_MEMORY_GB
    threads: int | None = None
    engine_url: str = DUCKDB

    @classmethod
    def from_environment(cls) -> "Runtime":
        """PROPENSITY_HOME, PROPENSITY_ENGINE, PROPENSITY_MEMORY_GB and PROPENSITY_THREADS, with their defaults.

        Raises:
            ConfigError: for a number that is none, or an engine that is not known.
        """
        url = os.environ.get("PROPENSITY_ENGINE") or DUCKDB
        if url != DUCKDB and not _SPARK.fullmatch(url):
            raise ConfigError(
                f"environment variable PROPENSITY_ENGINE must be duckdb, spark, local[N], spark://HOST:PORT or "
                f"sc://HOST:PORT, got {url!r}"
            )
        memory = _positive("PROPENSITY_MEMORY_GB")
        threads = _positive("PROPENSITY_THREADS")
        return cls(Home.from_environment(), memory or DEFAULT_MEMORY_GB, int(threads) if threads else None, url)

    @contextmanager
    def engine(self) -> Generator[Engine]:
        """The engine of the deployment, fresh; what it holds is gone afterwards."""
        if self.engine_url == DUCKDB:
            opened = self.local_engine()
        else:
            opened = open_spark(self.engine_url, self.home.ensure().root, self.memory_gb, self.threads)
        with opened as engine:
            yield engine

    def local_engine(self) -> AbstractContextManager[Engine]:
        """DuckDB in this process, for what is small or of one machine."""
        return open_engine(self.memory_gb, self.threads)

    @cached_property
    def store(self) -> MlflowStore:
        """The model store of this home."""
        return MlflowStore(self.home)


def _positive(variable: str) -> float | None:
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value <= 0:
        raise ConfigError(f"environment variable {variable} must be a positive number, got {text!r}")
    return value
