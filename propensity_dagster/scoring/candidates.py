"""Training and judging the candidates of one run, from lake to lake. The glue between models and evaluation."""

import json
import logging
from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, Candidate
from propensity_dagster.data.lake import Home, publish_table, publish_text, publishing_folder
from propensity_dagster.errors import DataContractError, SavedModelError
from propensity_dagster.evaluation.evaluate import CHAMPION, ORACLE, Evaluation, TestScores, evaluate
from propensity_dagster.features.snapshots import SPLITS, TRAINING_SET
from propensity_dagster.models.base import FittedModel, clipped_logit
from propensity_dagster.models.dataset import Dataset, Floats, read_split
from propensity_dagster.models.saved import golden_difference, load_model, write_model
from propensity_dagster.models.training import BASELINE, ENSEMBLE, load_datasets, train_candidate
from propensity_dagster.synthetic import is_synthetic, open_world

logger = logging.getLogger(__name__)

_SAVED_CHECK_ROWS = 10_000


def publish_candidate(campaign: Campaign, candidate: Candidate, home: Home) -> tuple[FittedModel, float]:
    """Train one candidate on the training set and save it; an ensemble reads its members as they were saved.

    Returns:
        The model, and the largest difference in log-odds between it and its saved form on validation rows.

    Raises:
        SavedModelError: when the saved form scores differently by more than 1e-6.
    """
    training_set = home.lake(campaign.name).existing(TRAINING_SET)
    train, validate = _datasets(campaign, training_set)
    folder = home.candidates(campaign.name)
    members: list[FittedModel] = []
    if candidate.name == ENSEMBLE:
        members = [load_model(folder / name) for name in member_names(campaign)]
    model = train_candidate(campaign, candidate, train, validate, _facts(campaign, home), members)
    sample = validate.X[:_SAVED_CHECK_ROWS]
    with publishing_folder(folder / candidate.name) as staging:
        write_model(model, staging, train.X)
        difference = float(np.abs(load_model(staging).log_odds(sample) - model.log_odds(sample)).max())
        if difference > 1e-6:
            raise SavedModelError(f"{candidate.name}: the saved model's log-odds differ by {difference:.3g}")
    return model, difference


def publish_evaluation(campaign: Campaign, home: Home, champion: tuple[str, FittedModel] | None) -> Evaluation:
    """Judge the saved candidates, and the present champion, on the test snapshots; publish JSON and curves.

    Args:
        campaign: the campaign.
        home: where candidates and training set are; the result goes to its reports.
        champion: version and model of the present champion, if there is one.
    """
    models = {c.name: load_model(home.candidates(campaign.name) / c.name) for c in campaign.models}
    challenger = choose_challenger(models)
    if champion is not None:
        models[CHAMPION] = champion[1]
    scores = score_test_rows(campaign, home, models)
    saved_difference = golden_difference(home.candidates(campaign.name) / challenger)
    facts = {
        "snapshots": {
            split: [str(s) for s in snapshots] for split, snapshots in _snapshots_of_splits(campaign, home).items()
        },
        "champion_version": champion[0] if champion else None,
        "training": {
            name: {
                "calibrator": m.calibrator.method,
                "validation_log_loss": m.facts["validation_log_loss"],
                "rows": m.facts["rows"],
            }
            for name, m in models.items()
        },
    }
    evaluation = evaluate(campaign, scores, challenger, saved_difference, facts)
    folder = home.reports(campaign.name)
    for name, table in evaluation.tables.items():
        publish_table(table, folder / f"{name}.parquet")
    publish_text(json.dumps(evaluation.record, indent=1, sort_keys=True), folder / "evaluation.json")
    logger.info("evaluation: %s", evaluation.decision.sentence)
    return evaluation


def read_evaluation(campaign: Campaign, home: Home) -> dict[str, Any]:
    """The newest evaluation record.

    Raises:
        DataContractError: when there is none.
    """
    file = home.reports(campaign.name) / "evaluation.json"
    if not file.exists():
        raise DataContractError(f"{campaign.name}: there is no evaluation yet: {file} is missing; train first")
    return json.loads(file.read_text(encoding="utf-8"))


def choose_challenger(models: Mapping[str, FittedModel]) -> str:
    """The candidate with the lowest cross-validated log loss on validation rows. The baseline cannot challenge."""
    contenders = [name for name in models if name not in (BASELINE, CHAMPION)]
    return min(contenders, key=lambda name: models[name].facts["validation_log_loss"])


def score_test_rows(campaign: Campaign, home: Home, models: Mapping[str, FittedModel]) -> TestScores:
    """Log-odds of every model, and of the oracle on synthetic data, for the rows of the test snapshots."""
    file = home.lake(campaign.name).existing(TRAINING_SET)
    table = read_split(file, "test")
    log_odds: dict[str, Floats] = {}
    encoded: dict[int, Floats] = {}
    for name, model in models.items():
        identity = hash(model.contract)
        if identity not in encoded:
            encoded[identity] = model.contract.encode(table)
        log_odds[name] = model.log_odds(encoded[identity])
    keys = table[campaign.key].combine_chunks().dictionary_encode()
    snapshots = table["snapshot"].to_numpy().astype("datetime64[D]")
    truth = true_log_odds(campaign, home, np.asarray(keys.dictionary.to_pylist())[keys.indices.to_numpy()], snapshots)
    if truth is not None:
        log_odds[ORACLE] = truth
    train = pq.read_table(file, columns=["converted"], filters=[("split", "=", "train")])
    return TestScores(
        y=table["converted"].cast("float64").to_numpy(),
        entity=keys.indices.to_numpy().astype(np.int64),
        log_odds=log_odds,
        segments={c: _segment_values(table[c]) for c in campaign.segments},
        training_rate=float(train["converted"].cast("float64").to_numpy().mean()),
    )


def true_log_odds(campaign: Campaign, home: Home, keys: Any, snapshots: Any) -> Floats | None:
    """True log-odds (n,) on synthetic data, where the outcome is the one the world knows; else None."""
    outcome = campaign.outcome
    plain = outcome.gap_days == 0 and outcome.where is None and outcome.minimum_amount is None
    if not (is_synthetic(campaign.source.connection) and plain and outcome.stream == "orders"):
        return None
    world = open_world(campaign.source.connection, home.synthetic)
    out = np.empty(len(keys))
    for snapshot in np.unique(snapshots):
        rows = snapshots == snapshot
        day: date = snapshot.item()
        known, probability = world.true_probability(day, outcome.horizon_days)
        true = dict(zip(known.tolist(), probability.tolist(), strict=True))
        # Somebody the world does not know, a faulty row of the customer table, does nothing.
        out[rows] = [true.get(key, 0.0) for key in keys[rows]]
    return clipped_logit(out)


def member_names(campaign: Campaign) -> list[str]:
    """What the ensemble blends: every other candidate but the baseline."""
    return [c.name for c in campaign.models if c.name not in (BASELINE, ENSEMBLE)]


def _datasets(campaign: Campaign, training_set: Path) -> tuple[Dataset, Dataset]:
    stat = training_set.stat()
    return _cached_datasets(campaign.key, training_set, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)
def _cached_datasets(key: str, training_set: Path, *version: int) -> tuple[Dataset, Dataset]:
    """The candidates of one run are trained one after the other, in one process, on the same matrix."""
    del version
    return load_datasets(key, training_set)


def _facts(campaign: Campaign, home: Home) -> dict[str, Any]:
    found = _snapshots_of_splits(campaign, home)
    return {
        "campaign": campaign.name,
        "snapshots": {split: [str(s[0]), str(s[-1])] for split, s in found.items()},
        "outcome": campaign.outcome.model_dump(),
    }


def _snapshots_of_splits(campaign: Campaign, home: Home) -> dict[str, list[date]]:
    splits = pq.read_table(home.lake(campaign.name).existing(SPLITS)).to_pylist()
    found: dict[str, list[date]] = {}
    for row in splits:
        found.setdefault(row["split"], []).append(row["snapshot"])
    return found


def _segment_values(column: Any) -> Any:
    if not (str(column.type).endswith("string")):
        raise DataContractError("segments must be categories; a number has no groups")
    return np.asarray(column.fill_null("(missing)").to_pylist(), dtype=object)
