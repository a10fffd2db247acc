"""Imputation, scaling and encoding for models that need them. Fitted on training rows, saved with the model."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from propensity_dagster.models.base import BLOCK_ROWS
from propensity_dagster.models.calibration import Floats
from propensity_dagster.models.dataset import CATEGORY, FeatureContract

_CLIP = 6.0


@dataclass(frozen=True)
class Scaling:
    """Numbers to z-scores of sign(x) log(1 + |x|), clipped at 6; missing becomes the mean, with an indicator.

    Attributes:
        columns: matrix columns of the numbers.
        mean: training means after the logarithm, one per column.
        scale: training standard deviations after the logarithm; 1 for a constant.
        indicators: positions in `columns` that get a missing-value indicator.
    """

    columns: tuple[int, ...]
    mean: Floats
    scale: Floats
    indicators: tuple[int, ...]

    @classmethod
    def fit(cls, X: Floats, contract: FeatureContract) -> "Scaling":
        """Fit on training rows (n, p)."""
        columns = tuple(i for i, feature in enumerate(contract.features) if feature.kind != CATEGORY)
        means, scales, indicators = [], [], []
        for position, column in enumerate(columns):
            values = X[:, column]
            present = _signed_log(values[~np.isnan(values)])
            deviation = float(present.std()) if len(present) else 0.0
            means.append(float(present.mean()) if len(present) else 0.0)
            scales.append(deviation if deviation > 1e-9 else 1.0)
            if 0 < len(present) < len(values):
                indicators.append(position)
        return cls(columns, np.array(means), np.array(scales), tuple(indicators))

    def apply(self, X: Floats, kernels: ModuleType | None = None) -> Floats:
        """Scaled numbers followed by indicators, (n, numbers + indicators), column by column.

        With kernels, which want their arrays in one piece, of one block of rows.
        """
        columns, indicators = list(self.columns), list(self.indicators)
        out = np.empty((len(columns) + len(indicators), len(X)))
        for start in range(0, len(X), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            values = X.T[columns, rows]
            missing = np.isnan(values)
            numbers = out[: len(columns), rows]
            if kernels is not None:
                kernels.scale(np.ascontiguousarray(values), self.mean, self.scale, _CLIP, numbers)
            else:
                _signed_log(values, numbers)
                numbers -= self.mean[:, None]
                numbers /= self.scale[:, None]
                np.clip(numbers, -_CLIP, _CLIP, out=numbers)
                numbers *= ~missing
            out[len(columns) :, rows] = missing[indicators]
        return out.T

    def to_json(self) -> dict[str, Any]:
        """Plain data for the saved model."""
        return {
            "columns": list(self.columns),
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "indicators": list(self.indicators),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Scaling":
        """Inverse of `to_json`."""
        return cls(tuple(data["columns"]), np.array(data["mean"]), np.array(data["scale"]), tuple(data["indicators"]))


@dataclass(frozen=True)
class OneHot:
    """Category codes to indicators; a missing or unseen category is all zeros plus its own indicator."""

    columns: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def fit(cls, contract: FeatureContract) -> "OneHot":
        """The categories are the contract's."""
        columns = tuple(contract.categorical)
        return cls(columns, tuple(len(contract.features[c].categories) for c in columns))

    def apply(self, X: Floats) -> Floats:
        """Indicators (n, sum of sizes + number of columns)."""
        blocks = [np.eye(size + 1)[code] for size, code in zip(self.sizes, self.codes(X).T, strict=True)]
        return np.hstack(blocks) if blocks else np.empty((len(X), 0))

    def codes(self, X: Floats) -> Any:
        """Codes (n, columns), `size` for missing or unseen."""
        values = X[:, list(self.columns)]
        return np.where(np.isnan(values), np.array(self.sizes, dtype=np.float64), values).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the saved model."""
        return {"columns": list(self.columns), "sizes": list(self.sizes)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "OneHot":
        """Inverse of `to_json`."""
        return cls(tuple(data["columns"]), tuple(data["sizes"]))


def _signed_log(values: Floats, out: Floats | None = None) -> Floats:
    """sign(x) log(1 + |x|), and 0 for NaN, of which a logarithm takes twice as long; in `out` if that is given."""
    out = np.abs(values, out=out)
    np.log1p(np.fmax(out, 0.0, out=out), out=out)
    return np.copysign(out, values, out=out) if (values < 0).any() else out
