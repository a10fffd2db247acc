"""What the rest of the system knows of the model store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MADE_LATER = ("explanations", "report")
"""How names of reports begin that are made after a version is registered: until then the last run's lie there."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a campaign's champion. `previous` is the champion before it."""

    number: int
    action: str
    version: str
    previous: str | None
    at: str
    why: str


@dataclass(frozen=True)
class Version:
    """One registered model."""

    version: str
    model: str
    identity: str
    run_id: str
    aliases: tuple[str, ...]


class ModelStore(Protocol):
    """Versions of each campaign's models; at most one is the champion."""

    def record_training(
        self, campaign: str, folder: Path, record: Mapping[str, Any], reports: Path, facts: Mapping[str, Any]
    ) -> Version:
        """Log a training run and register its challenger; an equal model keeps its version."""
        ...

    def versions(self, campaign: str) -> list[Version]:
        """Every registered version, oldest first."""
        ...

    def version(self, campaign: str, version: str) -> Version:
        """One registered version."""
        ...

    def champion(self, campaign: str) -> Version | None:
        """The champion, if there is one."""
        ...

    def folder(self, campaign: str, version: str) -> Path:
        """The saved model of a version."""
        ...

    def log_reports(self, campaign: str, version: str, files: Sequence[Path]) -> None:
        """Keep files with the run that a version came from; those of the same names are replaced."""
        ...

    def evaluation(self, campaign: str, version: str) -> dict[str, Any]:
        """The evaluation record of the run that a version came from."""
        ...

    def promote(self, campaign: str, version: str, why: str) -> None:
        """Make a version the champion."""
        ...

    def refuse(self, campaign: str, version: str, why: str) -> None:
        """Record that a challenger was not promoted."""
        ...

    def roll_back(self, campaign: str, to: str | None, why: str) -> Event:
        """Make the champion before the present one, or version `to`, the champion again."""
        ...

    def history(self, campaign: str) -> list[Event]:
        """Every event, oldest first."""
        ...
