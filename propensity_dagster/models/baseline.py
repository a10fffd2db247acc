"""What a marketer would do without a model: the outcome rate of a cell.

Event logs: the cell of recency, frequency and monetary value (Hughes, Strategic Database Marketing, 1994). Tables:
the cell of the one column that tells most. Numbers are cut at the training rows' quintiles; each cell's rate is
shrunk towards the overall rate by `prior_rows` rows of it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from propensity_dagster.models.base import Fit, RfmColumns, clipped_logit
from propensity_dagster.models.calibration import Floats, log_loss
from propensity_dagster.models.dataset import CATEGORY, Dataset

_QUINTILES = np.array([0.2, 0.4, 0.6, 0.8])


@dataclass(frozen=True)
class CellScorer:
    """Log-odds of cells: `edges` are the inner edges of each column of `columns`."""

    columns: tuple[int, ...]
    edges: tuple[tuple[float, ...], ...]
    cell_log_odds: Floats
    kind: ClassVar[str] = "cells"

    def log_odds(self, X: Floats) -> Floats:
        """Log-odds (n,) of each row's cell."""
        return self.cell_log_odds[cells_of(X, self.columns, self.edges)]

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
class CellBaseline:
    """Estimator of `CellScorer`: in the cells of `rfm`, or without it of the best single column."""

    rfm: RfmColumns | None
    prior_rows: float = 100.0

    def fit(self, train: Dataset, validate: Dataset) -> Fit:
        """Edges and cell rates of the training rows."""
        scorer = self.refit(train, 0)
        return Fit(scorer, scorer.log_odds(validate.X))

    def refit(self, train: Dataset, rounds: int) -> CellScorer:
        """The same: validation rows play no part."""
        if self.rfm is not None:
            columns = tuple(train.contract.names.index(name) for name in self.rfm.names())
        else:
            columns = (self._best_column(train),)
        return self._rates(train, columns)

    def _rates(self, train: Dataset, columns: tuple[int, ...]) -> CellScorer:
        edges = tuple(_edges(train, c) for c in columns)
        cells = cells_of(train.X, columns, edges)
        size = int(np.prod([len(e) + 2 for e in edges]))
        rows = np.bincount(cells, minlength=size)
        converted = np.bincount(cells, weights=train.y, minlength=size)
        rate = (converted + self.prior_rows * train.y.mean()) / (rows + self.prior_rows)
        return CellScorer(columns, edges, clipped_logit(rate) + train.correction)

    def _best_column(self, train: Dataset) -> int:
        """The column whose cells have the lowest log loss on entities that were not counted."""
        counted, held = train.fold != 0, train.fold == 0
        if counted.all() or held.all():
            counted = held = np.ones(len(train.y), dtype=bool)
        part = replace(train.rows(counted), correction=0.0)  # the rows held out are as few
        losses = [
            log_loss(self._rates(part, (column,)).log_odds(train.X[held]), train.y[held])
            for column in range(len(train.contract.features))
        ]
        return int(np.argmin(losses))


def cells_of(X: Floats, columns: tuple[int, ...], edges: tuple[tuple[float, ...], ...]) -> NDArray[np.int64]:
    """Cell number (n,) of each row: a digit per column, its last value for a missing one."""
    cells = np.zeros(len(X), dtype=np.int64)
    for column, cuts in zip(columns, edges, strict=True):
        values = X[:, column]
        missing = len(cuts) + 1
        digit = np.searchsorted(np.array(cuts), values, side="right")
        cells = cells * (missing + 1) + np.where(np.isnan(values), missing, digit)
    return cells


def _edges(train: Dataset, column: int) -> tuple[float, ...]:
    feature = train.contract.features[column]
    if feature.kind == CATEGORY:  # a cell for each code
        return tuple(code - 0.5 for code in range(1, len(feature.categories)))
    values = train.X[:, column]
    present = values[~np.isnan(values)]
    if not len(present):
        return ()
    # Half the customers often share one value (no order yet): equal edges would leave empty quintiles.
    return tuple(float(e) for e in np.unique(np.quantile(present, _QUINTILES)))
