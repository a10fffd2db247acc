"""What a stage runs with: the home folder, an engine, the model store. Plain objects, no orchestration."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from propensity_dagster.data.engine import Engine, open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.errors import ConfigError
from propensity_dagster.registry.mlflow_store import MlflowStore

DEFAULT_MEMORY_GB = 4.0


@dataclass(frozen=True)
class Runtime:
    """Everything of the deployment that a stage may need."""

    home: Home
    memory_gb: float = DEFAULT_MEMORY_GB
    threads: int | None = None

    @classmethod
    def from_environment(cls) -> "Runtime":
        """PROPENSITY_HOME, PROPENSITY_MEMORY_GB and PROPENSITY_THREADS, with their defaults.

        Raises:
            ConfigError: for a number that is none.
        """
        memory = _positive("PROPENSITY_MEMORY_GB")
        threads = _positive("PROPENSITY_THREADS")
        return cls(Home.from_environment(), memory or DEFAULT_MEMORY_GB, int(threads) if threads else None)

    @contextmanager
    def engine(self) -> Generator[Engine]:
        """A fresh engine; what it holds is gone afterwards."""
        with open_engine(self.memory_gb, self.threads) as engine:
            yield engine

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
