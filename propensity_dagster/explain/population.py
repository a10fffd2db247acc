"""Whom a customer is compared with: a sample of the scored rows, its typical values, and what features are called."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.errors import ConfigError
from propensity_dagster.features.definitions import Feature, define_features
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Floats
from propensity_dagster.models.dataset import CATEGORY, NUMBER

REFERENCE_ROWS = 256
_SAMPLE_ROWS = 20_000


@dataclass(frozen=True)
class FeatureWords:
    """What a feature of a model is to people.

    Attributes:
        name: what the outside calls it.
        feature: what the model calls it.
        kind: "number" or "category".
        categories: of a category, by its code.
        meaning: in words.
        window: in days, "all", or "".
        stream: the event log it comes from, or "".
        source: the source column it comes from: features of one source are also shown summed.
        minimum: values below it cannot be; None where they can.
        maximum: values above it cannot be; None where they can.
        template: the campaign's own sentence, or "".
        hidden: not for customers' eyes.
        typical: median or mode of the population; None where most have no value.
    """

    name: str
    feature: str
    kind: str
    categories: tuple[str, ...]
    meaning: str
    window: str
    stream: str
    source: str
    minimum: float | None
    maximum: float | None
    template: str
    hidden: bool
    typical: Any

    def value(self, encoded: float) -> float | str | None:
        """What an encoded value stands for; None for a missing one."""
        if np.isnan(encoded):
            return None
        return self.categories[int(encoded)] if self.kind == CATEGORY else float(encoded)


def describe_features(campaign: Campaign, model: FittedModel, sample: pa.Table) -> tuple[FeatureWords, ...]:
    """The features of a model, in the order of its matrix.

    Raises:
        ConfigError: when `explanations` names a feature that does not exist.
    """
    specs = {spec.name: spec for spec in model.contract.features}
    aliases: dict[str, str] = {}
    defined: dict[str, Feature] = {}
    if isinstance(campaign, EventCampaign):
        aliases = {target: alias for alias, target in campaign.features.names.items()}
        types = {name: specs[name].kind if name in specs else NUMBER for name in campaign.attributes}
        defined = {feature.name: feature for feature in define_features(campaign, types)}
    stated = campaign.explanations
    templates = _by_feature(campaign, stated.sentences, aliases, {*specs, *defined})
    hidden = _by_feature(campaign, dict.fromkeys(stated.hidden, True), aliases, {*specs, *defined})
    found: list[FeatureWords] = []
    for name, spec in specs.items():
        feature, attribute = defined.get(name), campaign.attributes.get(name)
        source = feature.source if feature else name
        if attribute is not None:
            feature = None
        minimum = attribute.minimum if attribute is not None else feature.minimum if feature is not None else None
        found.append(
            FeatureWords(
                aliases.get(name, name),
                name,
                spec.kind,
                spec.categories,
                feature.meaning if feature else name.replace("_", " "),
                feature.window if feature else "",
                feature.stream if feature else "",
                source,
                minimum,
                attribute.maximum if attribute else None,
                templates.get(name, ""),
                name in hidden,
                _typical(sample[name], spec.kind),
            )
        )
    return tuple(found)


def reference_rows(model: FittedModel, sample: pa.Table) -> Floats:
    """Encoded rows (m, p), m <= 256, in the order of their scores: the sample's score in m equal steps.

    A few rows drawn without regard to the score leave the base, and with it every contribution, to chance.
    """
    X = model.contract.encode(sample)
    order = np.argsort(model.log_odds(X), kind="stable")
    count = min(REFERENCE_ROWS, len(order))
    return X[order[((np.arange(count) + 0.5) * len(order) / max(count, 1)).astype(np.int64)]]


def sample_rows(batches: Iterable[pa.RecordBatch], total: int, wanted: int = _SAMPLE_ROWS) -> pa.Table:
    """About `wanted` of `total` rows, evenly spaced, whatever their number."""
    stride = max(1, total // wanted)
    taken = [batch.take(pa.array(np.arange(0, batch.num_rows, stride))) for batch in batches]
    return pa.Table.from_batches(taken).combine_chunks()


def sample_file(file: Path, columns: list[str], wanted: int = _SAMPLE_ROWS) -> pa.Table:
    """The same of a parquet file."""
    source = pq.ParquetFile(file)
    return sample_rows(source.iter_batches(columns=columns), source.metadata.num_rows, wanted)


def _by_feature(campaign: Campaign, stated: dict[str, Any], aliases: dict[str, str], known: set[str]) -> dict[str, Any]:
    """What the file says of features, under the model's names for them."""
    inner = {alias: target for target, alias in aliases.items()}
    for name in stated:
        if inner.get(name, name) not in known:
            raise ConfigError(
                f"{campaign.file}: explanations: there is no feature {name!r}; "
                f"there are {', '.join(sorted({aliases.get(k, k) for k in known}))}"
            )
    return {inner.get(name, name): value for name, value in stated.items()}


def _typical(column: pa.ChunkedArray, kind: str) -> float | str | None:
    """Median or mode of a feature; None where most customers have no value."""
    present = column.drop_null()
    if 2 * len(present) < len(column) or not len(present):
        return None
    if kind == CATEGORY:
        counts = sorted(present.value_counts().to_pylist(), key=lambda c: (-c["counts"], c["values"]))
        return str(counts[0]["values"])
    return float(np.median(present.cast("float64").to_numpy()))
