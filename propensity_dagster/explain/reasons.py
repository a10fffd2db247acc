"""Reason codes: for each scored customer the features that moved its score most, in words."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from propensity_dagster.campaign import Campaign
from propensity_dagster.explain.contributions import Explainer
from propensity_dagster.explain.population import describe_features, reference_rows
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Floats
from propensity_dagster.wording import reason_sentence, words

NO_REASON = -1


@dataclass(frozen=True)
class Reasons:
    """The k strongest features of n rows, the strongest first; where there are fewer, `feature` is -1.

    Attributes:
        feature: (n, k) positions in the model's matrix.
        contribution: (n, k) in log-odds.
        value: (n, k) encoded values; NaN where the customer has none.
    """

    feature: NDArray[np.int16]
    contribution: Floats
    value: Floats

    def columns(self) -> dict[str, pa.Array]:
        """Compact columns, which `worded` turns into what people read."""
        found: dict[str, pa.Array] = {}
        for i in range(self.feature.shape[1]):
            found |= {
                f"feature_{i + 1}": pa.array(self.feature[:, i]),
                f"contribution_{i + 1}": pa.array(self.contribution[:, i]),
                f"value_{i + 1}": pa.array(self.value[:, i]),
            }
        return found


class ReasonCoder:
    """Reasons of one model against one population, a sample of which is `sample`."""

    def __init__(self, campaign: Campaign, model: FittedModel, sample: pa.Table) -> None:
        self.count = campaign.explanations.reasons
        self.features = describe_features(campaign, model, sample)
        self._shown = np.array([not feature.hidden for feature in self.features])
        sources = [feature.source for feature in self.features]
        self._sources = [np.flatnonzero([s == name for s in sources]) for name in dict.fromkeys(sources)]
        self._explainer = Explainer(model, reference_rows(model, sample))

    def reasons(self, X: Floats) -> Reasons:
        """Of encoded rows (n, p). A feature that moved nothing, or is hidden, is no reason.

        Of the features of one source column only the strongest is: visits of 7, 30 and 90 days are not three reasons.
        """
        values = self._explainer.explain(X).values
        size = np.where(self._shown, np.abs(values), 0.0)
        strongest = np.zeros(size.shape, dtype=bool)
        for columns in self._sources:
            best = columns[size[:, columns].argmax(axis=1)]
            strongest[np.arange(len(size)), best] = True
        size[~strongest] = 0.0
        k = min(self.count, size.shape[1])
        chosen = np.argpartition(-size, k - 1, axis=1)[:, :k]
        # Stable order: of equal contributions the feature that comes first.
        chosen.sort(axis=1)
        sizes = np.take_along_axis(size, chosen, axis=1)
        chosen = np.take_along_axis(chosen, np.argsort(-sizes, axis=1, kind="stable"), axis=1)
        moved = np.take_along_axis(size, chosen, axis=1) > 0
        feature = np.full((len(X), self.count), NO_REASON, dtype=np.int16)
        contribution, value = np.full((2, len(X), self.count), np.nan)
        feature[:, :k] = np.where(moved, chosen, NO_REASON)
        contribution[:, :k] = np.where(moved, np.take_along_axis(values, chosen, axis=1), np.nan)
        value[:, :k] = np.where(moved, np.take_along_axis(X, chosen, axis=1), np.nan)
        return Reasons(feature, contribution, value)

    def worded(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """The columns `reason_1`, `reason_1_direction`, ... of the scores table, from compact ones."""
        found: dict[str, pa.Array] = {}
        for i in range(1, self.count + 1):
            feature = batch.column(f"feature_{i}").fill_null(NO_REASON).to_numpy()
            contribution = batch.column(f"contribution_{i}").to_numpy(zero_copy_only=False)
            value = batch.column(f"value_{i}").to_numpy(zero_copy_only=False)
            found |= self._columns(f"reason_{i}", feature, contribution, value)
        return found

    def _columns(self, name: str, feature: Any, contribution: Floats, value: Floats) -> dict[str, pa.Array]:
        """Each different reason is worded once."""
        n = len(feature)
        texts = {part: np.full(n, None, dtype=object) for part in ("name", "value", "typical", "sentence")}
        raises = contribution > 0
        for code in np.unique(feature[feature != NO_REASON]):
            words_of = self.features[code]
            rows = np.flatnonzero(feature == code)
            missing = np.isnan(value[rows])
            different = np.column_stack([np.where(missing, 0.0, value[rows]), missing, raises[rows]])
            keys, place = np.unique(different, axis=0, return_inverse=True)
            place = np.ravel(place)
            shown = [None if key[1] else words_of.value(key[0]) for key in keys]
            sentences = [
                reason_sentence(
                    words_of.template, words_of.meaning, words_of.window, v, words_of.typical, raises=bool(key[2])
                )
                for v, key in zip(shown, keys, strict=True)
            ]
            texts["name"][rows] = words_of.name
            texts["value"][rows] = np.array([words(v) for v in shown], dtype=object)[place]
            texts["typical"][rows] = words(words_of.typical)
            texts["sentence"][rows] = np.array(sentences, dtype=object)[place]
        none = feature == NO_REASON
        direction = np.where(raises, "raises", "lowers").astype(object)
        return {
            name: pa.array(texts["name"], pa.string()),
            f"{name}_direction": pa.array(direction, pa.string(), mask=none),
            f"{name}_contribution": pa.array(contribution, mask=none),
            f"{name}_value": pa.array(texts["value"], pa.string()),
            f"{name}_typical": pa.array(texts["typical"], pa.string()),
            f"{name}_sentence": pa.array(texts["sentence"], pa.string()),
        }
