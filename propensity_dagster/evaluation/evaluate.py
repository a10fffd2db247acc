"""The evaluation of one training run: everything that is known about the models on the test snapshots.

It receives scores and labels. Belongs here: assembling metrics, curves, segments and value into one record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from propensity_dagster.campaign import Campaign
from propensity_dagster.evaluation.bootstrap import REPLICATES, Floats, Ints, estimate, replicate_metrics
from propensity_dagster.evaluation.gate import CONSTANT, Decision, decide
from propensity_dagster.evaluation.metrics import (
    DECILES,
    METRICS,
    Judged,
    Weighted,
    bin_rates,
    decile_gains,
    gains,
    mean_probability,
)
from propensity_dagster.evaluation.value import REACHED, break_even, break_even_totals, reach, top_totals, worth

ORACLE, CHAMPION = "oracle", "champion"
_GAINS, _BREAK_EVEN, _MEAN = "decile_gains", "break_even_totals", "mean_probability"
_BINS, _TOP, _REACH = "bin_rates", "top_totals", "reach"
_TOP_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_SCORE_BINS = 40
_SEGMENT_METRICS = {name: METRICS[name] for name in ("log_loss", "auc", "calibration_error", "top_decile_lift")}
_GAIN_POINTS = np.arange(1, 101) / 100


@dataclass(frozen=True)
class TestScores:
    """Scores of the test rows by every model, as log-odds, with what is needed to judge them.

    Attributes:
        y: outcomes (n,) of 0 and 1.
        entity: entity code (n,) from 0.
        log_odds: per model (n,): the candidates, "champion" if there is one, "oracle" on synthetic data.
        segments: per segment column, the value of each row as text (n,).
        period: the snapshot of each row, or another piece of time, as text (n,); None where rows have no order.
        training_rate: conversion rate of the training rows: what the constant forecasts.
    """

    y: Floats
    entity: Ints
    log_odds: Mapping[str, Floats]
    segments: Mapping[str, NDArray[np.object_]]
    training_rate: float
    period: NDArray[np.object_] | None = None


@dataclass(frozen=True)
class Evaluation:
    """`record` is the JSON; `tables` are the curves; `replicated` feeds the gate."""

    record: dict[str, Any]
    tables: dict[str, pa.Table]
    decision: Decision


def evaluate(
    campaign: Campaign,
    scores: TestScores,
    challenger: str,
    saved_difference: float,
    facts: dict[str, Any],
    monotone: Mapping[str, float] | None = None,
    replicates: int = REPLICATES,
    *,
    recalibrated: bool = False,
) -> Evaluation:
    """Judge every model on the test rows and decide whether the challenger is to be promoted.

    Args:
        campaign: gives seed, gate limits and money.
        scores: forecasts and outcomes of the test rows.
        challenger: the candidate chosen on validation data.
        saved_difference: see `gate.decide`.
        facts: what else belongs into the record (snapshots, validation losses, ...).
        monotone: see `gate.decide`.
        replicates: bootstrap resamples of entities.
        recalibrated: see `gate.decide`.
    """
    constant = np.full(len(scores.y), np.log(scores.training_rate) - np.log1p(-scores.training_rate))
    log_odds = {CONSTANT: constant, **scores.log_odds}
    models = {name: Judged(z, scores.y) for name, z in log_odds.items()}
    extended = {**METRICS, _GAINS: decile_gains, _BREAK_EVEN: break_even_totals(campaign.value), _BINS: bin_rates}
    replicated = replicate_metrics(models, scores.entity, replicates, campaign.seed, extended)
    segments = _segments(campaign, scores, models, challenger, replicates)
    periods = {} if scores.period is None else {"": scores.period}
    champion = CHAMPION if CHAMPION in models else None
    decision = decide(
        challenger, champion, replicated, segments[challenger], saved_difference, campaign.gate, monotone,
        recalibrated=recalibrated,
    )  # fmt: skip
    record = {
        **facts,
        "campaign": campaign.name,
        "rows": len(scores.y),
        "converted": int(scores.y.sum()),
        "outcome_rate": float(scores.y.mean()),
        "training_rate": scores.training_rate,
        "challenger": challenger,
        "models": {
            name: {metric: estimate(found[metric]).to_json() for metric in METRICS}
            for name, found in replicated.items()
        },
        "comparisons": _comparisons(challenger, replicated),
        "deciles": _deciles(campaign, replicated),
        "threshold": _threshold(campaign, replicated),
        "thresholds": _thresholds(campaign, scores, models[challenger], replicates),
        "reach": _reach(campaign, scores, models[challenger], replicates),
        "segments": segments,
        "periods": _groups(campaign, scores, models, challenger, replicates, periods)[challenger],
        "decision": decision.to_json(),
        "monotone": dict(monotone or {}),
        "bootstrap": {"unit": "entity", "replicates": replicates, "seed": campaign.seed, "interval": 0.95},
    }
    return Evaluation(record, _tables(models, replicated, record), decision)


def _comparisons(challenger: str, replicated: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
    """Challenger minus each other model, on the same resamples."""
    return {
        other: {
            metric: estimate(replicated[challenger][metric] - values).to_json()
            for metric, values in found.items()
            if metric in ("log_loss", "auc", "average_precision", "top_decile_lift")
        }
        for other, found in replicated.items()
        if other != challenger
    }


def _deciles(campaign: Campaign, replicated: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
    """Recall, precision and lift when contacting the best 10%, 20%, ... of the rows; the profit of each tenth alone."""
    value = campaign.value
    found: dict[str, Any] = {}
    for name, metrics in replicated.items():
        _, _, converters, rows = metrics[_BREAK_EVEN].T
        recall = metrics[_GAINS]
        tenths = np.diff(recall, axis=1, prepend=0.0)  # share of the converters in each tenth
        found[name] = [
            {
                "contacted": float(fraction),
                "recall": estimate(recall[:, i]).to_json(),
                "precision": estimate(recall[:, i] / fraction * converters / rows).to_json(),
                "lift": estimate(recall[:, i] / fraction).to_json(),
                "tenth_profit_per_thousand": estimate(
                    1000
                    * (tenths[:, i] / 0.1 * converters / rows * value.margin_per_conversion - value.cost_per_contact)
                ).to_json(),
            }
            for i, fraction in enumerate(DECILES)
        ]
    return found


def _threshold(campaign: Campaign, replicated: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
    """The same at the break-even probability, with the profit it would have brought on the test rows."""
    value = campaign.value
    found: dict[str, Any] = {}
    for name, metrics in replicated.items():
        contacted, hits, converters, rows = metrics[_BREAK_EVEN].T
        profit = hits * value.margin_per_conversion - contacted * value.cost_per_contact
        money = worth(value, contacted, hits, converters, rows)
        with np.errstate(invalid="ignore", divide="ignore"):  # nobody above break-even: no precision
            found[name] = {
                "contacted": estimate(contacted / rows).to_json(),
                "precision": estimate(hits / contacted).to_json(),
                "recall": estimate(hits / converters).to_json(),
                "lift": estimate((hits / contacted) / (converters / rows)).to_json(),
                "profit": estimate(profit).to_json(),
                **money,
            }
    return {"probability": break_even(value), "models": found}


def _thresholds(campaign: Campaign, scores: TestScores, judged: Judged, replicates: int) -> list[dict[str, Any]]:
    """What contacting the challenger's best 1%, 2%, ... of the rows finds and brings; money per 1,000 rows.

    The cut-offs are those of the test rows and stay fixed in every resample; equal scores share one.
    """
    best_first = np.sort(judged.probability)[::-1]
    places = [max(round(fraction * len(best_first)), 1) - 1 for fraction in _TOP_FRACTIONS]
    cuts = list(dict.fromkeys(best_first[places].tolist()))
    metrics = {_TOP: top_totals(cuts)}
    totals = replicate_metrics({_TOP: judged}, scores.entity, replicates, campaign.seed, metrics)[_TOP][_TOP]
    converters, rows = totals[:, -2], totals[:, -1]
    found: list[dict[str, Any]] = []
    for i, cut in enumerate(cuts):
        contacted, hits = totals[:, 2 * i], totals[:, 2 * i + 1]
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold nobody above the cut-off
            found.append(
                {
                    "probability": cut,
                    "contacted": estimate(contacted / rows).to_json(),
                    "precision": estimate(hits / contacted).to_json(),
                    "recall": estimate(hits / converters).to_json(),
                    **worth(campaign.value, contacted, hits, converters, rows),
                }
            )
    return found


def _reach(campaign: Campaign, scores: TestScores, judged: Judged, replicates: int) -> list[dict[str, Any]]:
    """What it takes to reach shares of the converters: contacts, their cost, what that saves; money per 1,000 rows."""
    found = replicate_metrics({_REACH: judged}, scores.entity, replicates, campaign.seed, {_REACH: reach})
    share = found[_REACH][_REACH]
    cost = 1000 * campaign.value.cost_per_contact
    return [
        {
            "converters": float(reached),
            "contacted": estimate(share[:, i]).to_json(),
            "cost_per_thousand": estimate(share[:, i] * cost).to_json(),
            "saved_per_thousand": estimate((1 - share[:, i]) * cost).to_json(),
        }
        for i, reached in enumerate(REACHED)
    ]


def _segments(
    campaign: Campaign, scores: TestScores, models: Mapping[str, Judged], challenger: str, replicates: int
) -> dict[str, dict[str, Any]]:
    """Metrics within each segment value, of the challenger and what it is measured against."""
    return _groups(campaign, scores, models, challenger, replicates, scores.segments)


def _groups(
    campaign: Campaign,
    scores: TestScores,
    models: Mapping[str, Judged],
    challenger: str,
    replicates: int,
    groups: Mapping[str, NDArray[np.object_]],
) -> dict[str, dict[str, Any]]:
    """Metrics within each value of each grouping (n,); keys are "column=value", or the value where it has no name."""
    chosen = [name for name in (challenger, "baseline", CONSTANT, ORACLE) if name in models]
    found: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for column, values in groups.items():
        for value in sorted(set(values.tolist())):
            rows = values == value
            y = scores.y[rows]
            within = {name: Judged(models[name].z[rows], y) for name in chosen}
            entity = np.unique(scores.entity[rows], return_inverse=True)[1]
            metrics = {**_SEGMENT_METRICS, _BREAK_EVEN: break_even_totals(campaign.value), _MEAN: mean_probability}
            replicated = replicate_metrics(within, entity, replicates // 3, campaign.seed, metrics)
            for name in chosen:
                found[name][f"{column}={value}" if column else value] = {
                    "rows": int(rows.sum()),
                    "converted": int(y.sum()),
                    **{metric: estimate(replicated[name][metric]).to_json() for metric in _SEGMENT_METRICS},
                    **_fairness(replicated[name]),
                    **worth(campaign.value, *replicated[name][_BREAK_EVEN].T),
                }
    return found


def _fairness(replicated: Mapping[str, Floats]) -> dict[str, Any]:
    """Selection rate (demographic parity), true positive rate (equal opportunity; Hardt et al. 2016) at break-even,
    and how many convert for each conversion that was forecast (calibration within groups; Kleinberg et al. 2017).
    """
    contacted, hits, converters, rows = replicated[_BREAK_EVEN].T
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample without converters has no rate of them
        return {
            "selection_rate": estimate(contacted / rows).to_json(),
            "true_positive_rate": estimate(hits / converters).to_json(),
            "observed_over_expected": estimate(converters / rows / replicated[_MEAN]).to_json(),
        }


def _tables(
    models: Mapping[str, Judged], replicated: Mapping[str, Mapping[str, Floats]], record: Mapping[str, Any]
) -> dict[str, pa.Table]:
    ones = np.ones((1, len(next(iter(models.values())).y)))
    gain_rows, calibration_rows, decile_rows = [], [], []
    for name, judged in models.items():
        weighted = Weighted(judged, ones)
        curve = gains(weighted, _GAIN_POINTS)[0]
        gain_rows += [
            {"model": name, "contacted": float(x), "converters_found": float(g)}
            for x, g in zip(_GAIN_POINTS, curve, strict=True)
        ]
        n, forecast, rate = (values[0] for values in weighted.bins)
        band = [estimate(replicated[name][_BINS][:, i]) for i in range(len(n))]
        calibration_rows += [
            {
                "model": name,
                "bin": i,
                "rows": int(n[i]),
                "mean_probability": float(forecast[i]),
                "rate": float(rate[i]),
                "low": band[i].low,
                "high": band[i].high,
            }
            for i in range(len(n))
            if n[i]
        ]
        for row in record["deciles"][name]:
            flat = {"model": name, "contacted": row["contacted"]}
            for metric in ("recall", "precision", "lift"):
                flat |= {f"{metric}_{part}" if part != "value" else metric: v for part, v in row[metric].items()}
            decile_rows.append(flat)
    segment_rows = [
        {"model": name, "segment": segment, "rows": s["rows"], "converted": s["converted"]}
        | {m: s[m]["value"] for m in _SEGMENT_METRICS}
        for name, found in record["segments"].items()
        for segment, s in found.items()
    ]
    tables = {
        "gain_curve": pa.Table.from_pylist(gain_rows),
        "calibration_curve": pa.Table.from_pylist(calibration_rows),
        "deciles": pa.Table.from_pylist(decile_rows),
        "score_distribution": _distribution(models[record["challenger"]]),
    }
    if segment_rows:
        tables["segments"] = pa.Table.from_pylist(segment_rows)
    return tables


def _distribution(judged: Judged) -> pa.Table:
    """Histogram of the log-odds: which share of the converters, and of the others, lies in each bin.

    The bins span 99.8% of the rows; a few outliers would press everybody else into one bar.
    """
    low, high = np.quantile(judged.z, [0.001, 0.999])
    edges = np.linspace(low, max(high, low + 0.1), _SCORE_BINS + 1)
    shares = [np.histogram(judged.z[judged.y == side], edges)[0] / max((judged.y == side).sum(), 1) for side in (1, 0)]
    return pa.table({"low": edges[:-1], "high": edges[1:], "converters": shares[0], "others": shares[1]})
