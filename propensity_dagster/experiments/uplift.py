"""Whom does the treatment change? Uplift learnt from a randomised trial, judged out of sample against propensity.

Ranking by uplift is switched on only if it beats ranking by propensity by a paired bootstrap over entities; else the
record says that propensity is the better policy. Without randomisation nothing is learnt. Belongs here: rows, learners,
judgement, decision. Does not: the statistics, or the page.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.data.days import pc
from propensity_dagster.data.decisions import DECIDED_AT, POSITION
from propensity_dagster.data.lake import Home, publish_text, publishing_folder
from propensity_dagster.errors import ConfigError, DataContractError, InsufficientDataError
from propensity_dagster.evaluation.bootstrap import Z95, estimate, lower_bound
from propensity_dagster.evaluation.uplift import (
    Comparability,
    Flags,
    Floats,
    Outcomes,
    Ranked,
    auuc,
    average_effect,
    comparability,
    policy_value,
    qini,
    qini_curve,
    ranked,
    replicate,
)
from propensity_dagster.features.snapshots import TRAINING_SET
from propensity_dagster.models.dataset import Dataset, FeatureContract, make_dataset
from propensity_dagster.models.trees import LightGBMEstimator
from propensity_dagster.models.uplift import LEARNERS, MEAN, Trial, UpliftModel, fit_uplift, read_uplift, write_uplift

logger = logging.getLogger(__name__)

UPLIFT, PROPENSITY = "uplift", "propensity"
_REPLICATES = 500
_CHOOSING_REPLICATES = 100
_MIN_CONVERTED = 100  # in each arm of the training rows
_TENTHS = 10


@dataclass
class _Rows:
    """The trial's rows: table, encoded features without and with what the treatment wrote to."""

    table: pa.Table
    before: Dataset
    response: Dataset
    treated: Any
    entity: Any

    def split(self, name: str) -> Flags:
        return np.array(self.table["split"].to_pylist(), dtype=object) == name


def publish_uplift(campaign: Campaign, home: Home) -> dict[str, Any]:
    """Learn, judge and decide; publish the models and the record. Returns the record, as plain data.

    Raises:
        ConfigError: when the campaign has no treatment, or its column no such values.
        DataContractError: when the arms are not comparable, with what speaks against it.
        InsufficientDataError: when an arm has too few conversions.
    """
    treatment = campaign.treatment
    if treatment is None:
        raise ConfigError(f"{campaign.file}: there is no 'treatment', so its effect cannot be learnt")
    rows = _read(campaign, home)
    compared = _compare_arms(campaign, rows)
    if compared.problems:
        raise DataContractError(
            f"{campaign.name}: uplift is not learnt, because treated and control are not comparable: "
            + "; ".join(compared.problems)
        )
    _require_enough(campaign, rows)
    models: list[UpliftModel] = []
    scores = {name: np.full(len(rows.treated), np.nan) for name in (UPLIFT, PROPENSITY, *LEARNERS)}
    chosen: list[str] = []
    trial = Trial(rows.before, rows.treated)
    all_rows = Outcomes(rows.before.y, rows.treated, rows.entity)
    for train, validate, judged in _folds(campaign, rows):
        choosing, X = trial.part(validate), rows.before.rows(judged).X
        model = fit_uplift(trial.part(train), choosing, campaign.seed)
        effect = {name: model.effect(name, choosing.rows.X) for name in LEARNERS}
        best = _best(effect, all_rows.rows(validate), campaign.seed)
        models.append(model)
        chosen.append(best)
        for name in LEARNERS:
            scores[name][judged] = model.effect(name, X)
        scores[UPLIFT][judged] = scores[best][judged]
        scores[PROPENSITY][judged] = _response(campaign, rows, train, validate, judged)
    judged = ~np.isnan(scores[UPLIFT])
    outcomes = all_rows.rows(judged)
    record = _judge(campaign, {name: values[judged] for name, values in scores.items()}, outcomes)
    record |= {
        "campaign": campaign.name,
        "treatment": treatment.model_dump(),
        "learners": chosen,
        "comparability": {**asdict(compared), "balance": dict(list(compared.balance.items())[:20])},
    }
    with publishing_folder(_folder(campaign, home)) as temporary:
        write_uplift(models, chosen, rows.before.contract, temporary)
    publish_text(json.dumps(record, indent=1), _record_file(campaign, home))
    return record


def read_decision(campaign: Campaign, home: Home) -> str:
    """What to rank by: uplift, where a trial showed that it is better; else propensity."""
    if campaign.treatment is None or not _record_file(campaign, home).exists():
        return PROPENSITY
    return _read_record(campaign, home)["decision"]["rank_by"]


def error_of_sum(campaign: Campaign, effect: Floats, home: Home) -> float:
    """Standard error of the sum of estimated effects (n,): that of the tenth of the ranking each falls into."""
    tenths = _read_record(campaign, home)["tenths"]
    lowest = np.array([row["lowest"] for row in tenths[:-1]])  # of the tenths from the best on, descending
    place = np.searchsorted(-lowest, -effect, side="left")
    error = np.array([(row["observed"]["high"] - row["observed"]["low"]) / (2 * Z95) for row in tenths])
    return float(np.sqrt(((np.bincount(place, minlength=len(tenths)) * error) ** 2).sum()))


def effects(campaign: Campaign, features: Path, home: Home) -> pa.Table:
    """Key and estimated effect of each row of a features file.

    Raises:
        SavedModelError: when the models are cut short or were tampered with.
        DataContractError: when the features lack what the models need.
    """
    models, learners, contract = read_uplift(_folder(campaign, home))
    parts: list[pa.Table] = []
    columns = [campaign.key, *contract.names]
    file = pq.ParquetFile(features)
    contract.require(file.schema_arrow.names)
    for batch in file.iter_batches(columns=columns):
        X = contract.encode(batch)
        effect = np.mean([m.effect(name, X) for m, name in zip(models, learners, strict=True)], axis=0)
        parts.append(pa.table({campaign.key: batch.column(campaign.key), "effect": effect}))
    return pa.concat_tables(parts) if parts else pa.table({campaign.key: pa.array([], pa.string()), "effect": []})


def _record_file(campaign: Campaign, home: Home) -> Path:
    return home.reports(campaign.name) / "uplift.json"


def _read_record(campaign: Campaign, home: Home) -> dict[str, Any]:
    return json.loads(_record_file(campaign, home).read_text(encoding="utf-8"))


def _folder(campaign: Campaign, home: Home) -> Path:
    return home.candidates(campaign.name) / UPLIFT


def _read(campaign: Campaign, home: Home) -> _Rows:
    treatment = campaign.treatment
    assert treatment is not None
    file = home.lake(campaign.name).existing(TRAINING_SET)
    if treatment.column not in pq.read_schema(file).names:
        raise ConfigError(f"{campaign.file}: treatment.column: there is no column {treatment.column!r} in the data")
    table = pq.read_table(file)
    arm = table[treatment.column].cast(pa.string())
    there = set(pc.unique(arm).to_pylist())
    for role in ("control", "treated"):
        if getattr(treatment, role) not in there:
            values = ", ".join(sorted(str(v) for v in there)[:20])
            raise ConfigError(
                f"{campaign.file}: treatment.{role}: no row has {getattr(treatment, role)!r} in {treatment.column!r}; "
                f"there are {values}"
            )
    table = table.filter(pc.is_in(arm, pa.array([treatment.control, treatment.treated])))
    hidden = (*campaign.protected, treatment.column, POSITION, DECIDED_AT)
    response = FeatureContract.fit(table, campaign.key, hidden)
    written = tuple(f"{name}_" for name in treatment.without)
    before = FeatureContract(tuple(f for f in response.features if not f.name.startswith(written or ("\0",))))
    entity: Any = table[campaign.key].combine_chunks().dictionary_encode().indices
    treated = pc.equal(table[treatment.column].cast(pa.string()), treatment.treated).to_numpy(zero_copy_only=False)
    return _Rows(
        table,
        make_dataset(table, before, campaign.key),
        make_dataset(table, response, campaign.key),
        np.asarray(treated),
        entity.to_numpy().astype(np.int64),
    )


def _compare_arms(campaign: Campaign, rows: _Rows) -> Comparability:
    """On one row an entity, the first; the chance to be treated by a model of the other half of the entities."""
    assert campaign.treatment is not None
    first = np.zeros(len(rows.entity), dtype=bool)
    first[np.unique(rows.entity, return_index=True)[1]] = True
    before, treated = rows.before.rows(first), rows.treated[first]
    labelled = Dataset(before.X, treated.astype(np.float64), before.fold, before.contract)
    half = labelled.fold % 2 == 0
    chance = np.empty(len(treated))
    for part in (half, ~half):
        estimator = LightGBMEstimator(seed=campaign.seed, max_rounds=100, patience=20)
        scorer: Any = estimator.refit(labelled.rows(~part), 50)
        chance[part] = expit(scorer.log_odds(before.X[part]))
    names, categorical = before.contract.names, before.contract.categorical
    return comparability(before.X, names, categorical, treated, chance, campaign.treatment.share)


def _require_enough(campaign: Campaign, rows: _Rows) -> None:
    for arm, words in ((True, "treated"), (False, "control")):
        converted = int(rows.before.y[rows.treated == arm].sum())
        if converted < _MIN_CONVERTED:
            raise InsufficientDataError(
                f"{campaign.name}: {converted} of the {words} rows converted, {_MIN_CONVERTED} are needed to learn "
                "uplift"
            )


def _folds(campaign: Campaign, rows: _Rows) -> Iterator[tuple[Flags, Flags, Flags]]:
    """Rows (n,) that learn, that choose the learner, and that are judged: never a row of one in another.

    Snapshots are judged out of time. A table that is tested in folds is judged as a whole, each row by models that saw
    neither its fold nor the one that chose the learner.
    """
    if isinstance(campaign, EventCampaign):
        yield rows.split("train"), rows.split("validate"), rows.split("test")
    elif "fold" in rows.table.column_names:
        number = rows.table["fold"].to_numpy()
        count = int(number.max()) + 1
        for k in range(count):
            held, choosing = number == k, number == (k + 1) % count
            yield ~held & ~choosing, choosing, held
    else:
        test, choosing = rows.split("test"), rows.before.fold == 0
        yield ~test & ~choosing, ~test & choosing, test


def _best(effect: dict[str, Floats], rows: Outcomes, seed: int) -> str:
    """The mean of the learners, unless one has a Qini that is larger by more than the difference's standard error.

    The largest alone would be picked by the noise of a trial, which is many times what the learners differ by (the
    one-standard-error rule; Breiman et al. 1984).
    """
    measures = {name: lambda w, e=values: qini(ranked(e, rows, w)) for name, values in effect.items()}
    found = replicate(measures, rows.entity, _CHOOSING_REPLICATES, seed)
    ahead = {name: values - found[MEAN] for name, values in found.items() if name != MEAN}
    better = {name: d[0] for name, d in ahead.items() if d[0] > d[1:].std(ddof=1)}
    best = max(better, key=lambda name: better[name], default=MEAN)
    logger.info("uplift: %s chosen of %s", best, {name: round(float(v[0]), 5) for name, v in found.items()})
    return best


def _response(campaign: Campaign, rows: _Rows, train: Flags, validate: Flags, judged: Flags) -> Floats:
    """Probability to convert of the judged rows, by a model of both arms that may see the whole history."""
    fit = LightGBMEstimator(seed=campaign.seed).fit(rows.response.rows(train), rows.response.rows(validate))
    return expit(fit.scorer.log_odds(rows.response.rows(judged).X))


def _judge(campaign: Campaign, scores: dict[str, Floats], rows: Outcomes) -> dict[str, Any]:
    """Every ranking on the judged rows, the decision, uplift by tenth, calibration and policies."""
    treatment = campaign.treatment
    assert treatment is not None
    measures: dict[str, Any] = {}
    for name, score in scores.items():
        measures[f"areas {name}"] = lambda w, s=score: _areas(ranked(s, rows, w))
    measures["effect"] = lambda w: average_effect(rows, w)
    tenth = _tenths(scores[UPLIFT])
    for i in range(_TENTHS):
        member = (tenth == i).astype(np.float64)
        measures[f"tenth {i}"] = lambda w, m=member: average_effect(rows, w * m)
    policies = _policies(campaign, scores)
    value = campaign.value
    for name, treat in policies.items():
        measures[f"policy {name}"] = lambda w, t=treat: policy_value(
            t, rows, treatment.share, value.margin_per_conversion, value.cost_per_contact, w
        )
    found = replicate(measures, rows.entity, _REPLICATES, campaign.seed)
    areas = {name: dict(zip(("qini", "auuc"), found[f"areas {name}"].T, strict=True)) for name in scores}
    difference = areas[UPLIFT]["qini"] - areas[PROPENSITY]["qini"]
    better = lower_bound(difference, campaign.gate.confidence)
    curves = {name: [v.tolist() for v in qini_curve(scores[name], rows)] for name in (UPLIFT, PROPENSITY)}
    return {
        "rows": len(rows.y),
        "treated": int(rows.treated.sum()),
        "converted": int(rows.y.sum()),
        "effect": estimate(found["effect"]).to_json(),
        "rankings": {name: {m: estimate(v).to_json() for m, v in of_name.items()} for name, of_name in areas.items()},
        "decision": {
            "rank_by": UPLIFT if better > 0 else PROPENSITY,
            "difference": estimate(difference).to_json(),
            "lower_bound": better,
            "confidence": campaign.gate.confidence,
        },
        "tenths": [
            {
                "tenth": i + 1,
                "rows": int((tenth == i).sum()),
                "lowest": float(scores[UPLIFT][tenth == i].min()),
                "predicted": float(scores[UPLIFT][tenth == i].mean()),
                "observed": estimate(found[f"tenth {i}"]).to_json(),
            }
            for i in range(_TENTHS)
        ],
        "calibration": _calibration(scores[UPLIFT], tenth, found),
        "policies": {
            name: {
                "treated": float(treat.mean()),
                "profit_per_thousand": estimate(1000 * found[f"policy {name}"]).to_json(),
                "more_than_propensity": estimate(
                    1000 * (found[f"policy {name}"] - found[f"policy {PROPENSITY}"])
                ).to_json(),
            }
            for name, treat in policies.items()
        },
        "curves": curves,
        "bootstrap": {"unit": "entity", "replicates": _REPLICATES, "seed": campaign.seed, "interval": 0.95},
    }


def _areas(r: Ranked) -> Floats:
    return np.column_stack([qini(r), auuc(r)])


def _policies(campaign: Campaign, scores: dict[str, Floats]) -> dict[str, Any]:
    """Whom each policy treats: all, nobody, by uplift above break-even, and as many by propensity."""
    value = campaign.value
    by_uplift = scores[UPLIFT] * value.margin_per_conversion > value.cost_per_contact
    order = np.argsort(-scores[PROPENSITY], kind="stable")
    by_propensity = np.zeros(len(order), dtype=bool)
    by_propensity[order[: int(by_uplift.sum())]] = True
    n = len(order)
    return {
        "all": np.ones(n, dtype=bool),
        "nobody": np.zeros(n, dtype=bool),
        UPLIFT: by_uplift,
        PROPENSITY: by_propensity,
    }


def _tenths(score: Floats) -> Any:
    """Tenth (n,) by the ranking, 0 the best; as many rows in each."""
    place = np.empty(len(score), dtype=np.int64)
    place[np.argsort(-score, kind="stable")] = np.arange(len(score))
    return place * _TENTHS // max(len(score), 1)


def _calibration(score: Floats, tenth: Any, found: dict[str, Floats]) -> dict[str, Any]:
    """Slope of observed on predicted uplift over the tenths: 1 is right, below 1 too extreme, 0 no information."""
    predicted = np.array([score[tenth == i].mean() for i in range(_TENTHS)])
    observed = np.column_stack([found[f"tenth {i}"] for i in range(_TENTHS)])
    centred = predicted - predicted.mean()
    spread = float(centred @ centred)
    slope = observed @ centred / spread if spread > 0 else np.full(len(observed), np.nan)
    return {"slope": estimate(slope).to_json(), "mean_predicted": float(score.mean())}
