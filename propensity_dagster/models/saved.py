"""The saved model: a folder without pickle.

`model.json` holds contract, calibrator, facts, the scorer's plain data and golden rows; beside it lie the
scorer's own files (LightGBM text, arrays). `manifest.json` lists the SHA-256 of every file. Loading verifies
the checksums, then that the golden rows score as they did when the model was saved.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from propensity_dagster.errors import SavedModelError
from propensity_dagster.manifest import folder_identity, read_verified, write_manifest
from propensity_dagster.models.base import FittedModel, Scorer
from propensity_dagster.models.baseline import CellScorer
from propensity_dagster.models.calibration import Calibrator, Floats
from propensity_dagster.models.dataset import FeatureContract
from propensity_dagster.models.ensemble import EnsembleScorer
from propensity_dagster.models.linear import LinearScorer
from propensity_dagster.models.network import NetworkScorer
from propensity_dagster.models.trees import TreesScorer

FORMAT = 1
GOLDEN_ROWS = 8
_TOLERANCE = 1e-9
MODEL = "model.json"

_SCORERS: dict[str, type[Scorer]] = {
    scorer.kind: scorer for scorer in (CellScorer, LinearScorer, TreesScorer, NetworkScorer, EnsembleScorer)
}


def write_model(model: FittedModel, folder: Path, examples: Floats | None = None) -> None:
    """Write a model into `folder`, which is created.

    Args:
        model: what to save.
        folder: where; the caller publishes it.
        examples: encoded rows (n, p) of which the first 8 become the golden rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    golden = (examples if examples is not None else _synthetic_rows(model.contract))[:GOLDEN_ROWS]
    content = {
        "name": model.name,
        "kind": model.scorer.kind,
        "contract": model.contract.to_json(),
        "calibrator": {"method": model.calibrator.method, "values": model.calibrator.values},
        "facts": model.facts,
        "scorer": model.scorer.save(folder),
        "golden": {
            "rows": [[None if np.isnan(v) else v for v in row] for row in golden.tolist()],
            "log_odds": model.log_odds(golden).tolist(),
        },
    }
    (folder / MODEL).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    write_manifest(folder, FORMAT)


def load_model(folder: Path) -> FittedModel:
    """Read a saved model, verifying checksums and golden rows.

    Raises:
        SavedModelError: when a file is missing, cut short, changed, or of an unknown format or kind.
    """
    content = read_verified(folder, FORMAT, MODEL)
    if content["kind"] not in _SCORERS:
        raise SavedModelError(f"{folder}: unknown kind of model {content['kind']!r}; allowed are {', '.join(_SCORERS)}")
    calibrator = content["calibrator"]
    model = FittedModel(
        content["name"],
        FeatureContract.from_json(content["contract"]),
        _SCORERS[content["kind"]].load(folder, content["scorer"]),
        Calibrator(calibrator["method"], tuple(tuple(v) for v in calibrator["values"])),
        content["facts"],
    )
    difference = _golden_difference(model, content)
    if not difference <= _TOLERANCE:
        raise SavedModelError(
            f"{folder}: the golden rows score differently by {difference:.3g} in log-odds (allowed {_TOLERANCE}); "
            f"it was saved with {content['facts'].get('versions')}"
        )
    return model


def golden_difference(folder: Path) -> float:
    """Largest difference in log-odds between the saved model and the one in memory when it was saved."""
    return _golden_difference(load_model(folder), read_verified(folder, FORMAT, MODEL))


def model_identity(folder: Path) -> str:
    """A short content hash: equal models have equal identities."""
    return folder_identity(folder)


def _golden_difference(model: FittedModel, content: dict[str, Any]) -> float:
    rows = np.array(content["golden"]["rows"], dtype=np.float64)
    return float(np.abs(model.log_odds(rows) - np.array(content["golden"]["log_odds"])).max())


def _synthetic_rows(contract: FeatureContract) -> Floats:
    """Rows that touch missing values, zeros and every first category."""
    rows = np.zeros((3, len(contract.features)))
    rows[1] = np.nan
    rows[2] = 1.0
    rows[2, contract.categorical] = 0.0
    return rows
