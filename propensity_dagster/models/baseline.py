"""What a marketer would do without a model: the outcome rate of the RFM cell.

Quintiles of recency, frequency and monetary value (Hughes, Strategic Database Marketing, 1994), fitted on
training rows; each cell's rate is shrunk towards the overall rate by `prior_rows` rows of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from propensity_dagster.models.base import Fit, RfmColumns, clipped_logit
from propensity_dagster.models.calibration import Floats
from propensity_dagster.models.dataset import Dataset

_QUINTILES = np.array([0.2, 0.4, 0.6, 0.8])
_MISSING_CELL = 5


@dataclass(frozen=True)
class RfmScorer:
    """Log-odds of cells: `edges` are the inner quintile edges of each column of `columns`."""

    columns: tuple[int, ...]
    edges: tuple[tuple[float, ...], ...]
    cell_log_odds: Floats
    kind: ClassVar[str] = "rfm"

    def log_odds(self, X: Floats) -> Floats:
        """Log-odds (n,) of each row's cell."""
        return self.cell_log_odds[self._cells(X)]

    def _cells(self, X: Floats) -> NDArray[np.int64]:
        return rfm_cells(X, self.columns, self.edges)

    def save(self, folder: Path) -> dict[str, Any]:
        """All of it is JSON."""
        return {
            "columns": list(self.columns),
            "edges": [list(e) for e in self.edges],
            "cell_log_odds": self.cell_log_odds.tolist(),
        }

    @classmethod
    def load(cls, folder: Path, state: dict[str, Any]) -> Self:
        """Inverse of `save`."""
        edges = tuple(tuple(e) for e in state["edges"])
        return cls(tuple(state["columns"]), edges, np.array(state["cell_log_odds"]))


@dataclass(frozen=True)
class RfmBaseline:
    """Estimator of `RfmScorer`."""

    rfm: RfmColumns
    prior_rows: float = 100.0

    def fit(self, train: Dataset, validate: Dataset) -> Fit:
        """Quintile edges and cell rates of the training rows."""
        columns = tuple(train.contract.names.index(name) for name in self.rfm.names())
        edges = tuple(_quintile_edges(train.X[:, c]) for c in columns)
        cells = rfm_cells(train.X, columns, edges)
        size = (_MISSING_CELL + 1) ** len(columns)
        rows = np.bincount(cells, minlength=size)
        converted = np.bincount(cells, weights=train.y, minlength=size)
        rate = (converted + self.prior_rows * train.y.mean()) / (rows + self.prior_rows)
        scorer = RfmScorer(columns, edges, clipped_logit(rate))
        return Fit(scorer, scorer.log_odds(validate.X))


def rfm_cells(X: Floats, columns: tuple[int, ...], edges: tuple[tuple[float, ...], ...]) -> NDArray[np.int64]:
    """Cell number (n,) of each row: base-6 digits, one per column, 5 for a missing value."""
    cells = np.zeros(len(X), dtype=np.int64)
    for column, cuts in zip(columns, edges, strict=True):
        values = X[:, column]
        quintile = np.searchsorted(np.array(cuts), values, side="right")
        cells = cells * (_MISSING_CELL + 1) + np.where(np.isnan(values), _MISSING_CELL, quintile)
    return cells


def _quintile_edges(values: Floats) -> tuple[float, ...]:
    present = values[~np.isnan(values)]
    if not len(present):
        return ()
    # Half the customers often share one value (no order yet): equal edges would leave empty quintiles.
    return tuple(float(e) for e in np.unique(np.quantile(present, _QUINTILES)))
