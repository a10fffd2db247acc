"""Models of what a treatment changes, from trees of the one estimator: T-, X- and DR-learner, transformed outcome.

Belongs here: fitting and saving them. Does not: whether they are any good, which evaluation/uplift.py says.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from propensity_dagster.manifest import read_verified, write_manifest
from propensity_dagster.models.calibration import Floats
from propensity_dagster.models.dataset import Dataset, FeatureContract
from propensity_dagster.models.trees import LightGBMEstimator, TreesScorer

Flags = NDArray[np.bool_]
MEAN = "mean"
LEARNERS = ("t_learner", "x_learner", "dr_learner", "transformed_outcome", MEAN)
"""MEAN is that of the others: their errors differ, so most of the time it is the best of them."""
_FORMAT, _FILE = 1, "uplift.json"


@dataclass(frozen=True)
class UpliftModel:
    """What the treatment adds to the probability of a conversion, by every learner.

    Attributes:
        scorers: trees by learner and role.
        share: of the treated among the training rows.
    """

    scorers: Mapping[tuple[str, str], TreesScorer]
    share: float

    def effect(self, learner: str, X: Floats) -> Floats:
        """Effect (n,) on the probability by one of `LEARNERS`, for encoded rows (n, p)."""
        if learner == MEAN:
            return np.mean([self.effect(name, X) for name in LEARNERS if name != MEAN], axis=0)
        raw = {role: scorer.log_odds(X) for (name, role), scorer in self.scorers.items() if name == learner}
        if learner == "t_learner":
            return expit(raw["treated"]) - expit(raw["control"])
        if learner == "x_learner":
            return self.share * raw["of_control"] + (1 - self.share) * raw["of_treated"]
        return raw["effect"]


@dataclass(frozen=True)
class Trial:
    """Rows of a randomised trial and who was treated (n,)."""

    rows: Dataset
    treated: Flags

    def arm(self, treated: bool) -> Dataset:
        """The rows of one arm."""
        return self.rows.rows(self.treated == treated)

    def part(self, chosen: Flags) -> "Trial":
        """Some of the rows (n,)."""
        return Trial(self.rows.rows(chosen), self.treated[chosen])


def fit_uplift(train: Trial, validate: Trial, seed: int) -> UpliftModel:
    """Fit every learner; validation rows are for early stopping only."""
    share = float(train.treated.mean())
    arms = _arms(train, validate, seed)
    fitted = {
        "t_learner": arms,
        "x_learner": _x_learner(train, validate, arms, seed),
        "dr_learner": _dr_learner(train, validate, share, seed),
        "transformed_outcome": _transformed_outcome(train, validate, share, seed),
    }
    return UpliftModel({(name, role): s for name, roles in fitted.items() for role, s in roles.items()}, share)


def _arms(train: Trial, validate: Trial, seed: int) -> dict[str, TreesScorer]:
    """Two models of the outcome, one an arm: alone they are the T-learner (Künzel et al. 2019)."""
    return {name: _outcome(train, validate, arm, seed) for name, arm in (("treated", True), ("control", False))}


def _x_learner(train: Trial, validate: Trial, arms: Mapping[str, TreesScorer], seed: int) -> dict[str, TreesScorer]:
    """Each arm's outcomes less what the other arm's model says of them, regressed (Künzel et al. 2019)."""

    def imputed(trial: Trial, arm: bool) -> Dataset:
        rows = trial.arm(arm)
        other = expit(arms["control" if arm else "treated"].log_odds(rows.X))
        return replace(rows, y=rows.y - other if arm else other - rows.y)

    return {
        role: _regression(imputed(train, arm), imputed(validate, arm), seed)
        for role, arm in (("of_treated", True), ("of_control", False))
    }


def _dr_learner(train: Trial, validate: Trial, share: float, seed: int) -> dict[str, TreesScorer]:
    """Doubly robust scores, cross-fitted in two halves of the entities, regressed (Kennedy 2023)."""
    half = train.rows.fold % 2 == 0
    stages = [_arms(train.part(part), validate, seed) for part in (half, ~half)]

    def scores(trial: Trial, arms: Mapping[str, TreesScorer]) -> Floats:
        means = {name: expit(scorer.log_odds(trial.rows.X)) for name, scorer in arms.items()}
        y, t = trial.rows.y, trial.treated
        residual = np.where(t, (y - means["treated"]) / share, -(y - means["control"]) / (1 - share))
        return means["treated"] - means["control"] + residual

    psi = np.where(half, scores(train, stages[1]), scores(train, stages[0]))
    held = (scores(validate, stages[0]) + scores(validate, stages[1])) / 2
    return {"effect": _regression(replace(train.rows, y=psi), replace(validate.rows, y=held), seed)}


def _transformed_outcome(train: Trial, validate: Trial, share: float, seed: int) -> dict[str, TreesScorer]:
    """A target whose mean is the effect, regressed (Athey and Imbens 2016).

    What is foretold of both arms together is taken off the outcome first: the target's mean stays, and most of its
    noise goes (as in the R-learner of Nie and Wager 2021).
    """
    both = _fitted(LightGBMEstimator(seed=seed), train.rows, validate.rows)

    def transformed(trial: Trial) -> Dataset:
        left = trial.rows.y - expit(both.log_odds(trial.rows.X))
        return replace(trial.rows, y=np.where(trial.treated, left / share, -left / (1 - share)))

    return {"effect": _regression(transformed(train), transformed(validate), seed)}


def _outcome(train: Trial, validate: Trial, arm: bool, seed: int) -> TreesScorer:
    return _fitted(LightGBMEstimator(seed=seed), train.arm(arm), validate.arm(arm))


def _regression(train: Dataset, validate: Dataset, seed: int) -> TreesScorer:
    return _fitted(LightGBMEstimator(seed=seed, objective="regression"), train, validate)


def _fitted(estimator: LightGBMEstimator, train: Dataset, validate: Dataset) -> TreesScorer:
    scorer: Any = estimator.fit(train, validate).scorer
    return scorer


def write_uplift(
    models: Sequence[UpliftModel], learners: Sequence[str], contract: FeatureContract, folder: Path
) -> None:
    """Write models, and which learner of each is used, into `folder`; the caller publishes it. No pickle, checksums."""
    described: list[dict[str, Any]] = []
    for i, (model, learner) in enumerate(zip(models, learners, strict=True)):
        for (name, role), scorer in model.scorers.items():
            place = folder / f"{i}_{name}_{role}"
            place.mkdir(parents=True)
            scorer.save(place)
        described.append({"learner": learner, "share": model.share, "roles": list(model.scorers)})
    content = {"contract": contract.to_json(), "models": described}
    (folder / _FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    write_manifest(folder, _FORMAT)


def read_uplift(folder: Path) -> tuple[list[UpliftModel], list[str], FeatureContract]:
    """Inverse of `write_uplift`.

    Raises:
        SavedModelError: when the folder is cut short or was tampered with.
    """
    content = read_verified(folder, _FORMAT, _FILE)
    models = [
        UpliftModel({(n, r): TreesScorer.load(folder / f"{i}_{n}_{r}", {}) for n, r in m["roles"]}, m["share"])
        for i, m in enumerate(content["models"])
    ]
    return models, [m["learner"] for m in content["models"]], FeatureContract.from_json(content["contract"])
