"""How well a ranking finds those whom a treatment changes, on rows of a randomised trial.

Belongs here: Qini, area under the uplift curve, uplift by tenth, calibration, policy value, and whether the arms are
comparable at all. Does not: the models, or the decision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from propensity_dagster.evaluation.bootstrap import entity_weights

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

SRM_ALPHA = 0.001
_SMD, _SMD_ALPHA = 0.1, 0.001
_AUC_ERRORS, _AUC = 4.0, 0.55


@dataclass(frozen=True)
class Outcomes:
    """Rows of a trial: conversion 0 or 1 (n,), whether treated (n,), and code of the entity (n,) from 0."""

    y: Floats
    treated: Flags
    entity: Ints

    def rows(self, chosen: Flags) -> "Outcomes":
        """Some of the rows (n,)."""
        return Outcomes(self.y[chosen], self.treated[chosen], np.unique(self.entity[chosen], return_inverse=True)[1])


@dataclass(frozen=True)
class Ranked:
    """A ranking from nobody on, at each step (r, steps) of r resamples: share of rows, treated, untreated, and the
    converted of each. Rows of equal score are one step.
    """

    share: Floats
    treated: Floats
    control: Floats
    treated_converted: Floats
    control_converted: Floats


def ranked(score: Floats, rows: Outcomes, weights: Floats) -> Ranked:
    """Cumulate a trial along a ranking.

    Args:
        score: the ranking (n,), the best highest.
        rows: of the trial.
        weights: resamples (r, n).
    """
    order = np.argsort(-score, kind="stable")
    ends = _step_ends(score[order])
    t, y = rows.treated[order].astype(np.float64), rows.y[order]
    w = weights[:, order]

    def upto(values: Floats) -> Floats:
        sums = np.cumsum(w * values, axis=1)[:, ends]
        return np.concatenate([np.zeros((len(w), 1)), sums], axis=1)

    share = upto(np.ones_like(y))
    return Ranked(share / share[:, -1:], upto(t), upto(1 - t), upto(t * y), upto((1 - t) * y))


def qini(r: Ranked) -> Floats:
    """Qini coefficient (r,): area between the Qini curve and that of a random order, per treated row.

    The curve (Radcliffe 2007) is what the treated among the best so many brought more than the untreated there would
    have, as many as the treated: Y_t - Y_c N_t / N_c, over all N_t treated; its abscissa is the share of rows. 0 is a
    random order; conversions per treated row are its unit.
    """
    curve = _gain(r)
    area: Floats = np.asarray(np.trapezoid(curve, r.share, axis=1))
    return area - 0.5 * curve[:, -1]


def auuc(r: Ranked) -> Floats:
    """Area under the uplift curve (r,): effect among the best so many times their share, over the share of rows.

    The unnormalised curve of Gutierrez and Gérardy (2017), per row; a random order has half of the average effect.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        there = (r.treated > 0) & (r.control > 0)
        effect = np.where(there, r.treated_converted / r.treated - r.control_converted / r.control, 0.0)
    return np.asarray(np.trapezoid(effect * r.share, r.share, axis=1))


def _gain(r: Ranked) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        gain = r.treated_converted - r.control_converted * r.treated / r.control
    return np.where(r.control > 0, gain, 0.0) / r.treated[:, -1:]


def qini_of_effects(score: Floats, effect: Floats) -> float:
    """The Qini coefficient of a ranking (n,) if the effects (n,) are known: without the noise of a trial."""
    order = np.argsort(-score, kind="stable")
    ends = _step_ends(score[order])
    gained = np.concatenate([[0.0], np.cumsum(effect[order])[ends]]) / len(effect)
    share = np.concatenate([[0.0], (ends + 1) / len(effect)])
    return float(np.trapezoid(gained, share) - 0.5 * gained[-1])


def average_effect(rows: Outcomes, weights: Floats) -> Floats:
    """Difference of the conversion rates of treated and untreated rows (r,)."""
    t = rows.treated.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ (t * rows.y)) / (weights @ t) - (weights @ ((1 - t) * rows.y)) / (weights @ (1 - t))


def policy_value(treat: Flags, rows: Outcomes, share: float, margin: float, cost: float, weights: Floats) -> Floats:
    """Profit a row (r,) of treating exactly these rows (n,), by inverse probability weighting (Horvitz-Thompson)."""
    t, y = rows.treated, rows.y
    seen = np.where(treat, t * (y * margin - cost) / share, ~t * y * margin / (1 - share))
    return (weights @ seen) / weights.sum(axis=1)


def replicate(
    measures: Mapping[str, Callable[[Floats], Floats]], entity: Ints, replicates: int, seed: int
) -> dict[str, Floats]:
    """Each measure's estimate, then its replicates, on the same resamples of whole entities."""
    found: dict[str, list[Floats]] = {name: [] for name in measures}
    for weights in entity_weights(entity, replicates, seed):
        for name, measure in measures.items():
            found[name].append(measure(weights))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def qini_curve(score: Floats, rows: Outcomes, points: int = 100) -> tuple[Floats, Floats]:
    """Share of rows treated (points + 1,), and what that brings per treated row."""
    r = ranked(score, rows, np.ones((1, len(score))))
    at = np.linspace(0, 1, points + 1)
    return at, np.interp(at, r.share[0], _gain(r)[0])


@dataclass(frozen=True)
class Comparability:
    """Whether treated and untreated rows are alike before the treatment. `problems` is empty if so.

    Attributes:
        treated: rows.
        control: rows.
        share: of the treated, as it was drawn.
        p_value: of the counts, if the share is right.
        balance: by feature, the standardised difference of the means, largest first.
        auc: how well the features tell the arms apart; 0.5 is not at all.
        overlap: 1% and 99% quantile of the chance to be treated, by the features.
        problems: what speaks against a randomised trial.
    """

    treated: int
    control: int
    share: float
    p_value: float
    balance: dict[str, float]
    auc: float
    overlap: tuple[float, float]
    problems: tuple[str, ...]


def comparability(
    X: Floats, names: Sequence[str], categorical: Sequence[int], treated: Flags, chance: Floats, share: float
) -> Comparability:
    """Compare the arms, one row an entity.

    Args:
        X: encoded features (n, p), of before the treatment.
        names: of the features (p,).
        categorical: columns that hold codes.
        treated: who was treated (n,).
        chance: to be treated (n,), by a model of the features that did not see the row.
        share: of the treated, as it was drawn.
    """
    from scipy.stats import binomtest, rankdata

    n1, n0 = int(treated.sum()), int((~treated).sum())
    p_value = float(binomtest(n1, n1 + n0, share).pvalue)
    balance = _balance(X, names, categorical, treated)
    ranks = rankdata(chance)
    auc = float((ranks[treated].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)) if n1 and n0 else 0.5
    error = float(np.sqrt((n1 + n0 + 1) / (12 * n1 * n0))) if n1 and n0 else 0.0
    low, high = (float(q) for q in np.quantile(chance, [0.01, 0.99]))
    problems: list[str] = []
    if p_value < SRM_ALPHA:
        problems.append(
            f"{n1:,} of {n1 + n0:,} are treated, {share:.1%} should be (p = {p_value:.1g}): units were lost, or the "
            "share is another"
        )
    critical = float(ndtri(1 - _SMD_ALPHA / 2 / max(len(balance), 1))) * np.sqrt(1 / n1 + 1 / n0)
    unlike = [name for name, smd in balance.items() if abs(smd) > max(_SMD, critical)]
    if unlike:
        some = ", ".join(f"{name} ({balance[name]:+.2f} standard deviations)" for name in unlike[:3])
        problems.append(
            f"{len(unlike)} of {len(balance)} features differ between the arms, most of all {some}: either they are "
            "consequences of the treatment, and their event log belongs into treatment.without, or the arms were not "
            "drawn by lot"
        )
    if auc - 0.5 > _AUC_ERRORS * error and auc > _AUC:
        problems.append(f"the features tell the arms apart (AUC {auc:.2f}): they were not drawn by lot")
    if low < 0.05 or high > 0.95:
        problems.append(f"some are nearly always or never treated (chances from {low:.2f} to {high:.2f}): no overlap")
    return Comparability(n1, n0, share, p_value, balance, auc, (low, high), tuple(problems))


def _balance(X: Floats, names: Sequence[str], categorical: Sequence[int], treated: Flags) -> dict[str, float]:
    """Standardised difference of the means of each number, of the shares of each code, of the missing ones."""
    found: dict[str, float] = {}
    for i, name in enumerate(names):
        column = X[:, i]
        missing = np.isnan(column)
        differences = [_smd(missing.astype(np.float64), treated)] if missing.any() else []
        if i in categorical:
            differences += [_smd((column == code).astype(np.float64), treated) for code in np.unique(column[~missing])]
        else:
            differences.append(_smd(column[~missing], treated[~missing]))
        found[name] = max(differences, key=abs, default=0.0)
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


def _smd(values: Floats, treated: Flags) -> float:
    one, zero = values[treated], values[~treated]
    if len(one) < 2 or len(zero) < 2:
        return 0.0
    spread = np.sqrt((one.var(ddof=1) + zero.var(ddof=1)) / 2)
    return float((one.mean() - zero.mean()) / spread) if spread > 0 else 0.0


def _step_ends(ordered: Floats) -> Ints:
    """Last place of each run of equal values."""
    return np.concatenate([np.flatnonzero(ordered[1:] != ordered[:-1]), [len(ordered) - 1]])
