"""The protocol every model follows, and the fitted model: scorer, calibrator, contract."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import pyarrow as pa
from scipy.special import expit

from propensity_dagster.models.calibration import Calibrator, Floats
from propensity_dagster.models.dataset import Dataset, FeatureContract

BLOCK_ROWS = 2000
"""What is computed from so many rows fits the processor's cache."""
MANY_ROWS = 32_768
"""For so many rows at once what Numba compiles is worth being loaded."""


class Scorer(Protocol):
    """A trained model before calibration. `kind` names its class in a saved model."""

    kind: ClassVar[str]

    def log_odds(self, X: Floats) -> Floats:
        """Raw log-odds (n,) of encoded rows (n, p)."""
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Write arrays and text into `folder`; return the rest as plain JSON data."""
        ...

    @classmethod
    def load(cls, folder: Path, state: dict[str, Any]) -> Self:
        """Inverse of `save`."""
        ...


@dataclass(frozen=True)
class Fit:
    """What an estimator gives.

    Attributes:
        scorer: the trained model.
        validation_log_odds: its log-odds (n,) on the validation rows, which it was not fitted on.
        rounds: trees or epochs after which the validation rows said stop; 0 where there are none.
    """

    scorer: Scorer
    validation_log_odds: Floats
    rounds: int = 0


class Estimator(Protocol):
    """Something that learns. Validation rows are for early stopping only."""

    def fit(self, train: Dataset, validate: Dataset) -> Fit:
        """Learn from `train`."""
        ...

    def refit(self, train: Dataset, rounds: int) -> Scorer:
        """Learn from `train` for that many rounds, with nothing held out."""
        ...


@dataclass(frozen=True)
class FittedModel:
    """A model that can be judged, saved and served. `facts` is what was known when it was trained."""

    name: str
    contract: FeatureContract
    scorer: Scorer
    calibrator: Calibrator
    facts: dict[str, Any]

    def log_odds(self, X: Floats) -> Floats:
        """Calibrated log-odds (n,) of encoded rows (n, p)."""
        return self.calibrator.apply(self.scorer.log_odds(X))

    def predict_proba(self, rows: pa.Table | pa.RecordBatch) -> Floats:
        """Calibrated probability (n,) of each row.

        Raises:
            DataContractError: when the rows lack a feature of the contract.
        """
        return expit(self.log_odds(self.contract.encode(rows)))


@dataclass(frozen=True)
class RfmColumns:
    """Names of the features that recency, frequency and monetary value are read from."""

    recency: str
    frequency: str
    monetary: str | None

    def names(self) -> Sequence[str]:
        """Those that exist."""
        return [self.recency, self.frequency, *([self.monetary] if self.monetary else [])]


def threads() -> int:
    """As many as OMP_NUM_THREADS allows; without it, all cores."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return int(allowed) if allowed.isdigit() and int(allowed) else os.cpu_count() or 1


def compiled(rows: int) -> ModuleType | None:
    """The kernels for many rows; None for few, which a service or a Spark executor has: Numba is not needed there."""
    if rows < MANY_ROWS:
        return None
    from propensity_dagster.models import kernels

    return kernels


def by_blocks(score: Callable[[Floats], Floats], X: Floats) -> Floats:
    """Scores (n,) of rows (n, p), made for a block of rows at a time, on all threads."""
    out = np.empty(len(X))

    def fill(start: int) -> None:
        rows = slice(start, start + BLOCK_ROWS)
        out[rows] = score(X[rows])

    starts = range(0, len(X), BLOCK_ROWS)
    if len(starts) > 1:
        with ThreadPoolExecutor(threads(), "blocks") as pool:
            list(pool.map(fill, starts))
    elif starts:
        fill(0)
    return out


def clipped_logit(p: Floats | float) -> Floats:
    """Log-odds of probabilities kept away from 0 and 1 by 1e-9."""
    safe = np.clip(p, 1e-9, 1 - 1e-9)
    return np.asarray(np.log(safe) - np.log1p(-safe))
