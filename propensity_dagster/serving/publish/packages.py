"""Building a package from a registered version: the saved model, and all that an answer needs beside it."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit

from propensity_dagster.campaign import ROW_NUMBER, Campaign
from propensity_dagster.data.lake import Home, publishing_folder
from propensity_dagster.errors import ConfigError, DataContractError
from propensity_dagster.evaluation.splits import TEST
from propensity_dagster.evaluation.value import break_even
from propensity_dagster.explain.population import (
    FeatureWords,
    describe_features,
    reference_rows,
    sample_file,
    sample_rows,
)
from propensity_dagster.features.snapshots import TRAINING_SET
from propensity_dagster.manifest import folder_identity, write_manifest
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Floats
from propensity_dagster.models.dataset import read_split
from propensity_dagster.models.prior import LogOddsHistogram
from propensity_dagster.models.saved import load_model
from propensity_dagster.registry.store import ModelStore, Version
from propensity_dagster.reports.model_card import model_card
from propensity_dagster.scoring.batch import PRIOR_SHIFT, SCORES, version_of
from propensity_dagster.scoring.candidates import folds_of
from propensity_dagster.serving.explanations import REASONS
from propensity_dagster.serving.inputs import LARGEST
from propensity_dagster.serving.packages import CAMPAIGN, FORMAT, MODEL, PACKAGES, POPULATION
from propensity_dagster.serving.predictions import ANSWER_FIELDS

_POPULATION = 1_000_000
_METRICS = (
    "log_loss",
    "auc",
    "average_precision",
    "calibration_error",
    "calibration_slope",
    "calibration_intercept",
    "top_decile_lift",
)


@dataclass(frozen=True)
class _Population:
    """Who a score is compared with: ascending probabilities, and a sample of the rows."""

    source: str
    snapshot: str
    rows: int
    probabilities: Floats
    prior_shift: float
    sample: pa.Table


def build_package(campaign: Campaign, version: Version, home: Home, store: ModelStore) -> str:
    """Write the package of a version against the newest population, and return its name. Equal ones are one.

    Raises:
        DataContractError: when there is no population to compare a score with.
        ConfigError: when the key is called like a field of the answer.
    """
    if campaign.key in ANSWER_FIELDS:
        raise ConfigError(f"{campaign.file}: the key column {campaign.key!r} is also a field of every answer")
    folder = store.folder(campaign.name, version.version)
    model = load_model(folder)
    population = _population(campaign, model, version.version, home)
    content = _content(campaign, version, model, population, store.evaluation(campaign.name, version.version))
    with tempfile.TemporaryDirectory(prefix="propensity-package-") as scratch:
        built = Path(scratch) / "package"
        shutil.copytree(folder, built / MODEL)
        population.probabilities.astype("<f8").tofile(built / POPULATION)
        (built / CAMPAIGN).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
        write_manifest(built, FORMAT)
        name = f"v{version.version}-{population.snapshot}-{folder_identity(built)[:8]}"
        target = home.serving / campaign.name / PACKAGES / name
        if not target.exists():
            with publishing_folder(target) as staging:
                shutil.copytree(built, staging, dirs_exist_ok=True)
    return name


def _content(
    campaign: Campaign, version: Version, model: FittedModel, population: _Population, record: dict[str, Any]
) -> dict[str, Any]:
    keyed = campaign.key != ROW_NUMBER
    threshold = break_even(campaign.value)
    judged = record["models"][record["challenger"]]
    metrics = {name: judged[name] for name in _METRICS if judged[name]["value"] is not None}
    return {
        "campaign": campaign.name,
        "description": campaign.description,
        "version": version.version,
        "model": version.model,
        "identity": version.identity,
        "key": campaign.key if keyed else None,
        "outcome": campaign.outcome.model_dump(mode="json"),
        "features": _features(describe_features(campaign, model, population.sample)),
        "reasons": campaign.explanations.reasons or REASONS,
        "tiers": campaign.tiers.model_dump(),
        "value": campaign.value.model_dump(),
        "threshold": threshold if np.isfinite(threshold) else None,
        "prior_shift": population.prior_shift,
        "population": {"source": population.source, "snapshot": population.snapshot, "rows": population.rows},
        "reference": [
            [None if np.isnan(v) else v for v in row] for row in reference_rows(model, population.sample).tolist()
        ],
        "trained_on": {
            "snapshots": model.facts["snapshots"],
            "rows": model.facts["rows"],
            "calibration": model.calibrator.method,
            "versions": model.facts.get("versions", {}),
        },
        "metrics": metrics,
        "model_card": model_card(campaign, record),
    }


def _features(features: Sequence[FeatureWords]) -> list[dict[str, Any]]:
    return [
        {
            "name": feature.name,
            "feature": feature.feature,
            "kind": feature.kind,
            "meaning": feature.meaning,
            "window": feature.window,
            "minimum": -LARGEST if feature.minimum is None else float(feature.minimum),
            "maximum": LARGEST if feature.maximum is None else float(feature.maximum),
            "typical": feature.typical,
            "template": feature.template,
            "hidden": feature.hidden,
            "source": feature.source,
        }
        for feature in features
    ]


def _population(campaign: Campaign, model: FittedModel, version: str, home: Home) -> _Population:
    """The newest snapshot that this version scored; else the newest features, or the test rows, scored now."""
    lake = home.lake(campaign.name)
    columns = model.contract.names
    for snapshot in reversed(lake.partitions(SCORES, "snapshot")):
        file = pq.ParquetFile(lake.partition(SCORES, "snapshot", snapshot))
        features = lake.partition("features", "snapshot", snapshot)
        if not features.exists() or not file.metadata.num_rows:
            continue
        if version_of(lake.partition(SCORES, "snapshot", snapshot)) != version:
            break  # an older one scored the newest snapshot: it is scored anew, below
        shift = float((file.schema_arrow.metadata or {}).get(PRIOR_SHIFT.encode(), b"0.0"))
        probabilities = file.read(["probability"])["probability"].to_numpy()
        return _described(SCORES, snapshot, probabilities, shift, sample_file(features, columns))
    for snapshot in reversed(lake.partitions("features", "snapshot")):
        features = lake.partition("features", "snapshot", snapshot)
        present = pq.read_schema(features).names
        if pq.read_metadata(features).num_rows and all(name in present for name in columns):
            batches = pq.ParquetFile(features).iter_batches(columns=columns)
            probabilities, shift = _rescored(campaign, model, batches)
            return _described("features", snapshot, probabilities, shift, sample_file(features, columns))
    if not lake.file(TRAINING_SET).exists():
        raise DataContractError(f"{campaign.name}: there is nothing to compare a score with: no scores, no features")
    test = read_split(lake.file(TRAINING_SET), TEST, folds_of(campaign)[0])
    probabilities, shift = _rescored(campaign, model, test.to_batches())
    return _described(
        "test rows", None, probabilities, shift, sample_rows(test.select(columns).to_batches(), test.num_rows)
    )


def _rescored(campaign: Campaign, model: FittedModel, batches: Iterable[pa.RecordBatch]) -> tuple[Floats, float]:
    z = np.concatenate([model.log_odds(model.contract.encode(batch)) for batch in batches])
    shift = 0.0
    if campaign.prior.adapt:
        histogram = LogOddsHistogram()
        histogram.add(z)
        shift = histogram.shift(model.facts["calibration_rate"], campaign.prior.max_odds_ratio)
    return expit(z + shift), shift


def _described(
    source: str, snapshot: date | None, probabilities: Floats, shift: float, sample: pa.Table
) -> _Population:
    ordered = np.sort(probabilities)
    n = len(ordered)
    if n > _POPULATION:  # every millionth: a percentile is then right to 1e-6
        ordered = ordered[(np.arange(1, _POPULATION + 1) * n) // _POPULATION - 1]
    return _Population(source, str(snapshot) if snapshot else "test", n, ordered, shift, sample)
