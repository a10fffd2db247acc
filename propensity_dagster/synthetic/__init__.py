"""Synthetic customers whose true conversion probabilities are known. One module per use case.

A connection `synthetic://NAME?customers=20000&seed=7` names a world; it is made on first use.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from propensity_dagster.campaign_sections import SYNTHETIC_SCHEME
from propensity_dagster.errors import ConfigError
from propensity_dagster.synthetic.world import TROUBLES, WorldConfig

_WORLDS = ("ecommerce", "saas", "bank", "outreach")
_TROUBLED = "ecommerce"


@dataclass(frozen=True)
class SyntheticWorld:
    """A generated world on disk: `tables` is the source, `oracle` holds what no feature may read."""

    name: str
    config: WorldConfig
    folder: Path

    @property
    def _module(self) -> ModuleType:
        return import_module(f"propensity_dagster.synthetic.{self.name}")

    @property
    def tables(self) -> Path:
        """Folder of the tables a campaign reads."""
        return self.folder / "tables"

    @property
    def outcome_table(self) -> str:
        """The table whose rows the true probabilities are about."""
        return self._module.OUTCOME_TABLE

    def ensure(self) -> None:
        """Generate the world unless it is complete on disk. Published by one rename, so never half there."""
        if self.folder.exists():
            return
        staging = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "oracle").mkdir(parents=True)
        self._module.generate(self.config, staging / "tables", staging / "oracle")
        (staging / "world.json").write_text(json.dumps(asdict(self.config), indent=1, default=str))
        staging.rename(self.folder)

    def true_probability(self, snapshot: date, horizon_days: int) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
        """Keys and true P(at least one row of `outcome_table` in [snapshot, snapshot + horizon)), given the latents."""
        return self._module.true_probability(self.config, self.folder / "oracle", snapshot, horizon_days)

    def true_effect(
        self, snapshot: date, horizon_days: int
    ) -> tuple[NDArray[np.str_], NDArray[np.float64], NDArray[np.float64]]:
        """Keys, and the same probability if treated and if not; only of a world with a randomised treatment.

        Raises:
            ConfigError: for a world without one.
        """
        effect = getattr(self._module, "true_effect", None)
        if effect is None:
            raise ConfigError(f"synthetic://{self.name} has no treatment: its true effect is not defined")
        return effect(self.config, self.folder / "oracle", snapshot, horizon_days)


def is_synthetic(connection: str) -> bool:
    """Whether a connection names a synthetic world."""
    return connection.startswith(SYNTHETIC_SCHEME)


def open_world(connection: str, root: Path) -> SyntheticWorld:
    """The world a connection names, kept under `root`.

    Raises:
        ConfigError: for an unknown world or option.
    """
    name, _, query = connection.removeprefix(SYNTHETIC_SCHEME).partition("?")
    if name not in _WORLDS:
        raise ConfigError(f"connection: unknown synthetic world {name!r}; allowed are {', '.join(_WORLDS)}")
    options: dict[str, Any] = {}
    for option, value in parse_qsl(query, keep_blank_values=True):
        if option == "trouble":
            options["trouble"] = (*options.get("trouble", ()), _trouble(name, value))
            continue
        if option not in ("customers", "seed", "days"):
            raise ConfigError(f"connection: unknown option {option!r}; allowed are customers, seed, days, trouble")
        if not value.isdigit() or (option != "seed" and int(value) == 0):
            raise ConfigError(f"connection: {option} must be a positive whole number, got {value!r}")
        options[option] = int(value)
    config = WorldConfig(**options)
    for kind, day in config.trouble:
        if not config.first_day <= day <= config.last_day:
            raise ConfigError(
                f"connection: trouble {kind}@{day} is outside the data, which go from {config.first_day} to "
                f"{config.last_day}"
            )
    trouble = "".join(f"-{kind}-{day}" for kind, day in config.trouble)
    folder = root / f"{name}-{config.customers}-{config.days}d-seed{config.seed}{trouble}"
    return SyntheticWorld(name, config, folder)


def _trouble(world: str, value: str) -> tuple[str, date]:
    kind, _, day = value.partition("@")
    if world != _TROUBLED:
        raise ConfigError(f"connection: trouble is for {_TROUBLED}, not for {world}")
    if kind not in TROUBLES:
        raise ConfigError(f"connection: unknown trouble {kind!r}; allowed are {', '.join(TROUBLES)}")
    try:
        return kind, date.fromisoformat(day)
    except ValueError:
        raise ConfigError(f"connection: trouble must be KIND@DATE such as units@2025-03-01, got {value!r}") from None
