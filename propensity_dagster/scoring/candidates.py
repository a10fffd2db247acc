"""Training and judging the candidates of one run, from lake to lake. The glue between models and evaluation."""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, EventCampaign, TableCampaign
from propensity_dagster.campaign_sections import Candidate, Search
from propensity_dagster.data.decisions import DECIDED_AT, POSITION
from propensity_dagster.data.lake import Home, publish_table, publish_text, publishing, publishing_folder
from propensity_dagster.errors import ConfigError, DataContractError, SavedModelError
from propensity_dagster.evaluation.evaluate import CHAMPION, ORACLE, Evaluation, TestScores, evaluate
from propensity_dagster.evaluation.splits import TEST, TRAIN
from propensity_dagster.features.snapshots import SPLITS, TRAINING_SET
from propensity_dagster.models.base import FittedModel, clipped_logit
from propensity_dagster.models.dataset import Dataset, Floats, SplitFile, read_split
from propensity_dagster.models.ensemble import Member
from propensity_dagster.models.monotone import keeps, violations
from propensity_dagster.models.prior import prior_shift
from propensity_dagster.models.saved import golden_difference, load_model, write_model
from propensity_dagster.models.training import BASELINE, ENSEMBLE, load_datasets, train_candidate
from propensity_dagster.synthetic import is_synthetic, open_world

logger = logging.getLogger(__name__)

_SAVED_CHECK_ROWS = 10_000
_QUARTERS = 4


def publish_candidate(campaign: Campaign, candidate: Candidate, home: Home) -> tuple[FittedModel, float]:
    """Train one candidate on the training set and save it; an ensemble reads its members as they were saved.

    Where every row is tested once, in folds, there is a model per fold; the one that serves is the first fold's.

    Returns:
        The model, and the largest difference in log-odds between it and its saved form on validation rows.

    Raises:
        SavedModelError: when the saved form scores differently by more than 1e-6.
    """
    first, *others = [_publish_fold(campaign, candidate, home, fold) for fold in folds_of(campaign)]
    return first[0], max([first[1], *(difference for _, difference in others)])


def folds_of(campaign: Campaign) -> list[int | None]:
    """Folds of test rows: [None] where the split is one of train and test rows."""
    folds = campaign.split.folds if isinstance(campaign, TableCampaign) else None
    return list(range(folds)) if folds else [None]


def _publish_fold(campaign: Campaign, candidate: Candidate, home: Home, fold: int | None) -> tuple[FittedModel, float]:
    train, validate = training_datasets(campaign, home, fold)
    folder = _fold_folder(campaign, home, fold)
    members: list[Member] = []
    if candidate.name == ENSEMBLE:
        for name in member_names(campaign):
            scores = np.load(_validation_file(folder, name), allow_pickle=False)
            members.append(Member(load_model(folder / name), scores))
        # A blend is only as monotone as its members; without any that keep the constraints the gate will refuse it.
        members = [m for m in members if keeps(m.model)] or members
    facts = _facts(campaign, home)
    if campaign.search and candidate.name in campaign.search.models:
        candidate, facts["search"] = _searched(campaign, campaign.search, candidate, (train, validate), home, fold)
    model, scores = train_candidate(campaign, candidate, train, validate, facts, members)
    sample = (validate or train).X[:_SAVED_CHECK_ROWS]
    with publishing(_validation_file(folder, candidate.name)) as temporary, temporary.open("wb") as file:
        np.save(file, scores, allow_pickle=False)
    with publishing_folder(folder / candidate.name) as staging:
        write_model(model, staging, train.X)
        difference = float(np.abs(load_model(staging).log_odds(sample) - model.log_odds(sample)).max())
        if difference > 1e-6:
            raise SavedModelError(f"{candidate.name}: the saved model's log-odds differ by {difference:.3g}")
    return model, difference


def _searched(
    campaign: Campaign,
    search: Search,
    candidate: Candidate,
    data: tuple[Dataset, Dataset | None],
    home: Home,
    fold: int | None,
) -> tuple[Candidate, dict[str, Any]]:
    """Better parameters, found on these rows; each fold searches for itself, or it would know its test rows."""
    from propensity_dagster.models.search import plot_search, search_candidate

    share = search.model_copy(update={"seconds": search.seconds / len(folds_of(campaign))})
    started = datetime.now(UTC).isoformat(timespec="seconds")
    name = f"{campaign.name}/{candidate.name}/{started}" + (f"/fold{fold}" if fold is not None else "")
    found, facts = search_candidate(campaign, share, candidate, *data, home.root / "optuna.db", name)
    if not fold:
        plot_search(candidate.name, facts, home.reports(campaign.name) / f"search_{candidate.name}.png")
    return found, facts


def _fold_folder(campaign: Campaign, home: Home, fold: int | None) -> Path:
    folder = home.candidates(campaign.name)
    return folder / f"fold{fold}" if fold else folder


def _validation_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.validation.npy"


def publish_evaluation(campaign: Campaign, home: Home, champion: tuple[str, FittedModel] | None) -> Evaluation:
    """Judge the saved candidates, and the present champion, on the test snapshots; publish JSON and curves.

    Args:
        campaign: the campaign.
        home: where candidates and training set are; the result goes to its reports.
        champion: version and model of the present champion, if there is one.
    """
    models = {c.name: load_model(home.candidates(campaign.name) / c.name) for c in campaign.models}
    challenger = choose_challenger(models)
    lacking = lacking_features(campaign, home, champion[1]) if champion else []
    if champion and lacking:
        # It cannot score these customers tonight either: nothing is gained by keeping it.
        words = ", ".join(lacking[:5]) + (" ..." if len(lacking) > 5 else "")
        logger.warning("champion version %s is not judged: the data lack %s, which it needs", champion[0], words)
    scores = score_test_rows(campaign, home, champion[1] if champion and not lacking else None)
    saved_difference = golden_difference(home.candidates(campaign.name) / challenger)
    facts = {
        "snapshots": _snapshots_of_splits(campaign, home),
        "champion_version": champion[0] if champion else None,
        "champion_lacks": lacking,
        "training": {
            name: {
                "calibrator": m.calibrator.method,
                "validation_log_loss": m.facts["validation_log_loss"],
                "rows": m.facts["rows"],
            }
            for name, m in {**models, **({CHAMPION: champion[1]} if champion and not lacking else {})}.items()
        },
    }
    monotone = _monotone(campaign, models[challenger], home)
    evaluation = evaluate(campaign, scores, challenger, saved_difference, facts, monotone)
    folder = home.reports(campaign.name)
    for name, table in evaluation.tables.items():
        publish_table(table, folder / f"{name}.parquet")
    publish_text(json.dumps(evaluation.record, indent=1, sort_keys=True), folder / "evaluation.json")
    logger.info("evaluation: %s", evaluation.decision.sentence)
    return evaluation


def lacking_features(campaign: Campaign, home: Home, model: FittedModel) -> list[str]:
    """Features that a model needs and the newest training set does not have."""
    return model.contract.lacking(pq.read_schema(home.lake(campaign.name).existing(TRAINING_SET)).names)


def _monotone(campaign: Campaign, model: FittedModel, home: Home) -> dict[str, float]:
    """Violations of the campaign's monotone constraints on test rows."""
    if not campaign.monotone:
        return {}
    test = read_split(home.lake(campaign.name).existing(TRAINING_SET), TEST, folds_of(campaign)[0])
    return violations(model, model.contract.encode(test), campaign.monotone_directions)


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
    """The candidate with the lowest cross-validated log loss on validation rows.

    The baseline cannot challenge, nor, while another can, a model that breaks a monotone constraint.
    """
    known = [name for name in models if name not in (BASELINE, CHAMPION)]
    contenders = [name for name in known if keeps(models[name])] or known
    return min(contenders, key=lambda name: models[name].facts["validation_log_loss"])


def score_test_rows(campaign: Campaign, home: Home, champion: FittedModel | None) -> TestScores:
    """Log-odds of every candidate, the champion, and the oracle on synthetic data, for the test rows.

    In folds every row is a test row once. Against a champion only the first fold counts: the champion, too, was
    trained on the others.
    """
    file = home.lake(campaign.name).existing(TRAINING_SET)
    folds = folds_of(campaign)[:1] if champion else folds_of(campaign)
    tables = [read_split(file, TEST, fold) for fold in folds]
    parts: list[dict[str, Floats]] = []
    for fold, table in zip(folds, tables, strict=True):
        folder = _fold_folder(campaign, home, fold)
        models = {c.name: load_model(folder / c.name) for c in campaign.models}
        if champion is not None:
            models[CHAMPION] = champion
        parts.append(score_rows(campaign, models, table))
    table = pa.concat_tables(tables)
    log_odds = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    keys = table[campaign.key].combine_chunks().dictionary_encode()
    truth = true_log_odds(campaign, home, table)
    if truth is not None:
        log_odds[ORACLE] = truth
    train = SplitFile(file, TRAIN, folds[0]).column("converted")
    return TestScores(
        y=table["converted"].cast("float64").to_numpy(),
        entity=keys.indices.to_numpy().astype(np.int64),
        log_odds=log_odds,
        segments={c: segment_values(campaign, table, c) for c in campaign.all_segments},
        training_rate=float(train.cast("float64").to_numpy().mean()),
        period=_periods(table),
    )


def _periods(table: pa.Table) -> Any:
    """The snapshot of each row; of ordered decisions the quarter of the test rows it is in; None without an order."""
    if "snapshot" in table.column_names:
        return np.datetime_as_string(table["snapshot"].to_numpy().astype("datetime64[D]")).astype(object)
    for column in (POSITION, DECIDED_AT):
        if column in table.column_names:
            values = table[column].to_numpy()
            edges = np.sort(values)[[len(values) * i // _QUARTERS for i in range(1, _QUARTERS)]]
            names = np.array([f"quarter {i + 1} of the test rows" for i in range(_QUARTERS)], dtype=object)
            return names[np.searchsorted(edges, values, side="right")]
    return None


def score_rows(campaign: Campaign, models: Mapping[str, FittedModel], table: pa.Table) -> dict[str, Floats]:
    """Log-odds (n,) of every model for these rows, adapted to their outcome rate where the campaign wants it."""
    out: dict[str, Floats] = {}
    encoded: dict[int, Floats] = {}
    for name, model in models.items():
        identity = hash(model.contract)
        if identity not in encoded:
            encoded[identity] = model.contract.encode(table)
        out[name] = model.log_odds(encoded[identity])
        if campaign.prior.adapt:
            out[name] += _prior_shifts(campaign, model, out[name], table)
    return out


def _prior_shifts(campaign: Campaign, model: FittedModel, z: Floats, table: pa.Table) -> Floats:
    """As batch scoring will do it: each snapshot by itself, from its scores alone."""
    rate, limit = model.facts["calibration_rate"], campaign.prior.max_odds_ratio
    if "snapshot" not in table.column_names:
        return np.full(len(z), prior_shift(z, None, rate, limit))
    shifts = np.empty(len(z))
    snapshots = table["snapshot"].to_numpy()
    for snapshot in np.unique(snapshots):
        rows = snapshots == snapshot
        shifts[rows] = prior_shift(z[rows], None, rate, limit)
    return shifts


def true_log_odds(campaign: Campaign, home: Home, table: pa.Table) -> Floats | None:
    """True log-odds (n,) on synthetic data, where the outcome is the one the world knows; else None."""
    if not (isinstance(campaign, EventCampaign) and is_synthetic(campaign.source.connection)):
        return None
    outcome = campaign.outcome
    world = open_world(campaign.source.connection, home.synthetic)
    plain = outcome.gap_days == 0 and outcome.where is None and outcome.minimum_amount is None
    if not plain or campaign.source.streams[outcome.stream].table != world.outcome_table:
        return None
    keys = np.asarray(table[campaign.key].to_pylist())
    snapshots = table["snapshot"].to_numpy().astype("datetime64[D]")
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


def training_datasets(campaign: Campaign, home: Home, fold: int | None = None) -> tuple[Dataset, Dataset | None]:
    """See `load_datasets`; the newest are held, for the next candidate of the run."""
    training_set = home.lake(campaign.name).existing(TRAINING_SET)
    stat = training_set.stat()
    version = f"{campaign.model_dump_json()} {stat.st_mtime_ns} {stat.st_size}"
    if _newest.get("version") != (version, fold):
        _newest.clear()  # before the next one is read: only one is held
        _newest.update(version=(version, fold), datasets=load_datasets(campaign, training_set, fold))
    return _newest["datasets"]


_newest: dict[str, Any] = {}
"""The candidates of one run are trained one after the other, in one process, on the same matrix."""


def _facts(campaign: Campaign, home: Home) -> dict[str, Any]:
    found = _snapshots_of_splits(campaign, home)
    return {
        "campaign": campaign.name,
        "snapshots": {split: [s[0], s[-1]] for split, s in found.items()},
        "outcome": campaign.outcome.model_dump(mode="json"),
    }


def _snapshots_of_splits(campaign: Campaign, home: Home) -> dict[str, list[str]]:
    splits = pq.read_table(home.lake(campaign.name).existing(SPLITS)).to_pylist()
    found: dict[str, list[str]] = {}
    for row in splits:
        found.setdefault(row["split"], []).append(str(row["snapshot"]))
    return found


def segment_values(campaign: Campaign, table: pa.Table, name: str) -> Any:
    """The segment of each row (n,) as text.

    Raises:
        ConfigError: when there is no such column, or it is a number.
    """
    if name not in table.column_names:
        raise ConfigError(f"{campaign.file}: segments: there is no column {name!r} in the training set")
    column = table[name]
    if not (str(column.type).endswith("string")):
        raise ConfigError(f"{campaign.file}: segments: {name!r} is a number, which has no groups: call it a category")
    return np.asarray(column.fill_null("(missing)").to_pylist(), dtype=object)
