"""What a model goes by: importance with intervals and history, by feature, source column and stream; dependence.

Everything is measured on test rows, which nothing was fitted on. `reports/explanations.json` is the record;
`reports/explanations_history.jsonl` has a line per version, so that a feature that jumps between retrains is seen.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.data.lake import Home, publish_text
from propensity_dagster.evaluation.bootstrap import entity_weights, estimate
from propensity_dagster.evaluation.splits import TEST
from propensity_dagster.explain.contributions import Contributions, Explainer
from propensity_dagster.explain.population import FeatureWords, describe_features, reference_rows
from propensity_dagster.features.snapshots import TRAINING_SET
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.calibration import Floats, Ints, log_loss
from propensity_dagster.models.dataset import CATEGORY, read_split
from propensity_dagster.models.ensemble import EnsembleScorer
from propensity_dagster.scoring.candidates import folds_of

RECORD, HISTORY = "explanations.json", "explanations_history.jsonl"
ADDITIVE = 1e-6
"""What contributions and base may differ from the log-odds by."""

_ROWS, _REPLICATES, _SHUFFLES = 2_000, 200, 3
_SHOWN_FEATURES, _DEPENDENCE_FEATURES, _GRID, _CURVES = 20, 6, 20, 60
_JUMP_SHARE, _JUMP_RATIO, _JUMP_VERSIONS = 0.03, 2.0, 5


@dataclass(frozen=True)
class Explained:
    """A sample of test rows with their contributions.

    Attributes:
        record: everything that goes into the JSON file.
        X: encoded rows (n, p).
        contributions: of these rows.
        features: of the matrix's columns.
        probability: (n,), calibrated.
    """

    record: dict[str, Any]
    X: Floats
    contributions: Contributions
    features: tuple[FeatureWords, ...]
    probability: Floats


def explain_model(campaign: Campaign, model: FittedModel, version: str, role: str, home: Home) -> Explained:
    """Explain a model on test rows, and publish the record and a line of the history.

    Args:
        campaign: the campaign.
        model: the champion, or the challenger while there is none.
        version: in the registry.
        role: "champion" or "challenger".
        home: where the training set and the reports are.

    Raises:
        DataContractError: when the test rows lack a feature of the model.
        ConfigError: when the campaign explains a feature that does not exist.
    """
    table = read_split(home.lake(campaign.name).existing(TRAINING_SET), TEST, folds_of(campaign)[0])
    table = table.take(pa.array(np.unique(np.linspace(0, table.num_rows - 1, min(_ROWS, table.num_rows)).astype(int))))
    X = model.contract.encode(table)
    y = table["converted"].cast(pa.float64()).to_numpy()
    entity = np.unique(np.asarray(table[campaign.key].cast(pa.string()).to_pylist()), return_inverse=True)[1]
    features = describe_features(campaign, model, table)
    found = Explainer(model, reference_rows(model, table)).explain(X)
    z = model.log_odds(X)
    loss = log_loss(z, y)
    record: dict[str, Any] = {
        "campaign": campaign.name,
        "version": version,
        "role": role,
        "model": model.name,
        "rows": len(X),
        "customers": int(entity.max()) + 1,
        "outcome_rate": float(y.mean()),
        "base_log_odds": found.base,
        "largest_difference": float(np.abs(found.base + found.values.sum(axis=1) - z).max()),
        "calibration": _calibration(model, found, z),
        "members": _members(model, X, table),
        "features": _importance(found.values, features, entity, model, X, y, loss),
        "sources": _summed(found.values, features, [f.source for f in features], entity),
        "streams": _summed(found.values, features, [f.stream or "customer" for f in features], entity),
        "shuffled_streams": _shuffled_streams(model, features, X, y, loss),
        "dependence": _dependence(model, found, features, X),
    }
    history = home.reports(campaign.name) / HISTORY
    lines = _read_history(history)
    record["jumped"] = _jumped(record, lines, version)
    _write_history(history, record, lines)
    publish_text(json.dumps(record, indent=1), home.reports(campaign.name) / RECORD)
    return Explained(record, X, found, features, 1 / (1 + np.exp(-z)))


def read_importance(campaign: Campaign, version: str, home: Home) -> dict[str, float]:
    """Share of importance of each feature, by the model's name for it; empty for a version that was not explained."""
    inner = campaign.features.names if isinstance(campaign, EventCampaign) else {}
    for line in _read_history(home.reports(campaign.name) / HISTORY):
        if line["version"] == version:
            return {str(inner.get(name, name)): share for name, share in line["shares"].items()}
    return {}


def inherit_importance(campaign: Campaign, parent: str, version: str, home: Home) -> None:
    """A version that only recalibrates another goes by the same features: its line of the history is that one's."""
    file = home.reports(campaign.name) / HISTORY
    lines = _read_history(file)
    known = {line["version"]: line for line in lines}
    if parent in known and version not in known:
        lines.append({**known[parent], "version": version})
        publish_text("".join(json.dumps(line) + "\n" for line in lines), file)


def _calibration(model: FittedModel, found: Contributions, z: Floats) -> dict[str, Any]:
    """How much of the score is the last calibrator's: it stretches all contributions of a row alike."""
    return {
        "method": model.calibrator.method,
        "raw_base_log_odds": found.raw_base,
        "mean_absolute_change": float(np.abs(z - found.raw_base - found.raw).mean()),
    }


def _members(model: FittedModel, X: Floats, table: pa.Table) -> list[dict[str, Any]]:
    """Of an ensemble: weight, and share of the sum of all members' absolute contributions."""
    if not isinstance(model.scorer, EnsembleScorer):
        return []
    found: list[dict[str, Any]] = []
    for member, weight in zip(model.scorer.members, model.scorer.weights, strict=True):
        size = 0.0
        if weight:
            explained = Explainer(member, reference_rows(member, table)).explain(X[:500])
            size = weight * float(np.abs(explained.values).sum(axis=1).mean())
        found.append({"model": member.name, "weight": weight, "size": size})
    total = sum(member["size"] for member in found)
    return [{"model": m["model"], "weight": m["weight"], "share": m["size"] / total if total else 0.0} for m in found]


def _importance(
    values: Floats,
    features: Sequence[FeatureWords],
    entity: Ints,
    model: FittedModel,
    X: Floats,
    y: Floats,
    loss: float,
) -> list[dict[str, Any]]:
    """Mean absolute contribution with its interval; for the first twenty the loss when the feature is shuffled."""
    size = np.abs(values)
    draws = _weighted_means(size, entity)
    shares = draws / np.maximum(draws.sum(axis=1, keepdims=True), 1e-300)
    order = np.argsort(-draws[0], kind="stable")
    found: list[dict[str, Any]] = []
    for rank, i in enumerate(order.tolist()):
        words = features[i]
        found.append(
            {
                "feature": words.name,
                "meaning": words.meaning,
                "window": words.window,
                "source": words.source,
                "mean_absolute": estimate(draws[:, i]).to_json(),
                "share": estimate(shares[:, i]).to_json(),
                "loss_when_shuffled": _shuffled(model, X, y, [i], loss) if rank < _SHOWN_FEATURES else None,
            }
        )
    return found


def _weighted_means(values: Floats, entity: Ints) -> Floats:
    """Means (1 + replicates, columns) of rows; the first is the estimate, the others resample entities."""
    parts = [weights @ values / weights.sum(axis=1)[:, None] for weights in entity_weights(entity, _REPLICATES, 0)]
    return np.concatenate(parts)


def _summed(
    values: Floats, features: Sequence[FeatureWords], group: Sequence[str], entity: Ints
) -> list[dict[str, Any]]:
    """Contributions of features of one group are added before their size is taken: they may cancel out."""
    names = sorted(set(group))
    sums = np.column_stack([values[:, [g == name for g in group]].sum(axis=1) for name in names])
    draws = _weighted_means(np.abs(sums), entity)
    found = [
        {"name": name, "features": list(group).count(name), "mean_absolute": estimate(draws[:, i]).to_json()}
        for i, name in enumerate(names)
    ]
    return sorted(found, key=lambda row: -row["mean_absolute"]["value"])


def _shuffled_streams(
    model: FittedModel, features: Sequence[FeatureWords], X: Floats, y: Floats, loss: float
) -> list[dict[str, Any]]:
    """How much worse this model is when all of a stream is given to other customers. Not what a model trained
    without it would lose: another stream may tell the same.
    """
    names = sorted({f.stream or "customer" for f in features})
    found = [
        {
            "name": name,
            "loss_when_shuffled": _shuffled(
                model, X, y, [i for i, f in enumerate(features) if (f.stream or "customer") == name], loss
            ),
        }
        for name in names
    ]
    return sorted(found, key=lambda row: -row["loss_when_shuffled"]["value"])


def _shuffled(model: FittedModel, X: Floats, y: Floats, columns: list[int], loss: float) -> dict[str, float]:
    """Permutation importance (Breiman 2001): rise of the log loss, and the range over three shuffles."""
    generator = np.random.default_rng(0)
    rises: list[float] = []
    for _ in range(_SHUFFLES):
        mixed = X.copy(order="F")
        mixed[:, columns] = X[generator.permutation(len(X))][:, columns]
        rises.append(log_loss(model.log_odds(mixed), y) - loss)
    return {"value": float(np.mean(rises)), "low": min(rises), "high": max(rises)}


def _dependence(
    model: FittedModel, found: Contributions, features: Sequence[FeatureWords], X: Floats
) -> list[dict[str, Any]]:
    """Partial dependence (Friedman 2001) and ICE (Goldstein et al. 2015) of the features that matter most.

    The curve ends where the data end: it goes from the 1st to the 99th percentile of the known values.
    """
    rows = X[np.linspace(0, len(X) - 1, min(200, len(X))).astype(int)]
    curves: list[dict[str, Any]] = []
    for i in found.order.tolist():
        values = X[:, i]
        known = values[~np.isnan(values)]
        if features[i].kind == CATEGORY or len(np.unique(known)) < 2 or not np.abs(found.values[:, i]).any():
            continue
        grid = np.unique(np.quantile(known, np.linspace(0.01, 0.99, _GRID)))
        ice = np.empty((len(rows), len(grid)))
        for k, value in enumerate(grid):
            changed = rows.copy(order="F")
            changed[:, i] = value
            ice[:, k] = model.log_odds(changed)
        probability = 1 / (1 + np.exp(-ice))
        edges = np.unique(np.quantile(known, np.linspace(0, 1, 11)))
        curves.append(
            {
                "feature": features[i].name,
                "missing": float(np.isnan(values).mean()),
                "outside_the_curve": float(((known < grid[0]) | (known > grid[-1])).mean()),
                "grid": grid.tolist(),
                "mean": probability.mean(axis=0).tolist(),
                "curves": probability[:: max(1, len(rows) // _CURVES)].tolist(),
                "deciles": edges.tolist(),
            }
        )
        if len(curves) == _DEPENDENCE_FEATURES:
            break
    return curves


def _jumped(record: dict[str, Any], history: list[dict[str, Any]], version: str) -> list[dict[str, Any]]:
    """Features whose share of importance is double or half its mean over the last versions, and 3 points from it."""
    before = [line["shares"] for line in history if line["version"] != version][-_JUMP_VERSIONS:]
    found: list[dict[str, Any]] = []
    for row in record["features"] if before else []:
        now = row["share"]["value"]
        usual = float(np.mean([shares.get(row["feature"], 0.0) for shares in before]))
        far = max(now, usual) > _JUMP_RATIO * min(now, usual)
        if far and abs(now - usual) > _JUMP_SHARE:
            found.append({"feature": row["feature"], "share": now, "usual": usual, "versions": len(before)})
    return found


def _read_history(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _write_history(file: Path, record: dict[str, Any], before: list[dict[str, Any]]) -> None:
    """One line per version; explaining a version again replaces its line."""
    shares = {row["feature"]: row["share"]["value"] for row in record["features"]}
    lines = [line for line in before if line["version"] != record["version"]]
    lines.append({"version": record["version"], "model": record["model"], "shares": shares})
    publish_text("".join(json.dumps(line) + "\n" for line in lines), file)
