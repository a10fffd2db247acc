"""The promotion gate: a decision with its numbers, never a threshold on one metric.

Belongs here: what a challenger must satisfy, in words and numbers. Does not: where models are kept.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from propensity_dagster.campaign_sections import Gate
from propensity_dagster.evaluation.bootstrap import Floats, lower_bound, upper_bound

CONSTANT = "constant"
_MIN_SEGMENT_ROWS = 100
_MIN_SEGMENT_CONVERTERS = 10
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Criterion:
    """One demand: what was found, what was wanted."""

    name: str
    passed: bool
    found: str
    wanted: str


@dataclass(frozen=True)
class Decision:
    """Whether the challenger becomes the champion, and why."""

    challenger: str
    references: tuple[str, ...]
    promoted: bool
    criteria: tuple[Criterion, ...]

    @property
    def sentence(self) -> str:
        """The decision in one sentence."""
        against = " and ".join(self.references)
        if self.promoted:
            return f"{self.challenger} is promoted: it beats {against} on all {len(self.criteria)} criteria"
        failed = [c for c in self.criteria if not c.passed]
        reasons = "; ".join(f"{c.name}: {c.found}, wanted {c.wanted}" for c in failed)
        return f"{self.challenger} is not promoted: {reasons}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "sentence": self.sentence}


def decide(
    challenger: str,
    champion: str | None,
    replicated: Mapping[str, Mapping[str, Floats]],
    segments: Mapping[str, Mapping[str, Any]],
    saved_difference: float,
    limits: Gate,
    monotone: Mapping[str, float] | None = None,
    *,
    recalibrated: bool = False,
) -> Decision:
    """Judge a challenger against the champion (if there is one), the baseline and the constant.

    A champion that was only recalibrated is judged against itself and the constant: its ranking is the champion's, and
    its calibration may be nearer to right than the champion's is, where that is not within the limits.

    Args:
        challenger: the model with the lowest cross-validated validation log loss; test rows had no say.
        champion: name under which the present champion was judged on the same rows, if any.
        replicated: per model, per metric: estimate first, then paired bootstrap replicates.
        segments: per segment value: rows, converted, and the challenger's AUC estimate.
        saved_difference: largest difference in log-odds between the model in memory and as saved.
        limits: the campaign's limits.
        monotone: by constrained feature, how far in log-odds the challenger moves the wrong way; None without any.
    """
    references = [*([champion] if champion else []), *([] if recalibrated else ["baseline"]), CONSTANT]
    references = [name for name in references if name != challenger]
    criteria = [_beats(challenger, reference, replicated, limits) for reference in references]
    ranked = [name for name in references if name != CONSTANT]
    criteria += [_keeps_lift(challenger, reference, replicated, limits) for reference in ranked]
    criteria += _is_calibrated(challenger, replicated, limits, champion if recalibrated else None)
    criteria.append(_no_segment_collapses(segments, limits))
    criteria.append(
        Criterion("saved model", saved_difference <= 1e-6, f"differs by {saved_difference:.2g}", "at most 1e-06")
    )
    if monotone:
        criteria.append(_is_monotone(monotone))
    return Decision(challenger, tuple(references), all(c.passed for c in criteria), tuple(criteria))


def _beats(challenger: str, reference: str, replicated: Mapping[str, Mapping[str, Floats]], limits: Gate) -> Criterion:
    difference = replicated[challenger]["log_loss"] - replicated[reference]["log_loss"]
    bound = upper_bound(difference, limits.confidence)
    return Criterion(
        f"log loss against {reference}",
        bound < 0,
        f"{difference[0]:+.5f}, {limits.confidence:.0%} bound {bound:+.5f}",
        "bound below 0",
    )


def _keeps_lift(
    challenger: str, reference: str, replicated: Mapping[str, Mapping[str, Floats]], limits: Gate
) -> Criterion:
    difference = replicated[challenger]["top_decile_lift"] - replicated[reference]["top_decile_lift"]
    bound = lower_bound(difference, limits.confidence)
    return Criterion(
        f"top-decile lift against {reference}",
        bound >= -limits.lift_margin,
        f"{difference[0]:+.2f}, {limits.confidence:.0%} bound {bound:+.2f}",
        f"bound at least {-limits.lift_margin:.2f}",
    )


def _is_calibrated(
    challenger: str, replicated: Mapping[str, Mapping[str, Floats]], limits: Gate, stale: str | None
) -> list[Criterion]:
    """Within the limits; of a recalibrated model also: nearer to right than the stale one."""
    low, high = limits.slope

    def slope(model: str) -> Criterion:
        found = float(replicated[model]["calibration_slope"][0])
        words = f"{found:.2f}" if np.isfinite(found) else "none: all forecasts are equal"
        return Criterion("calibration slope", low <= found <= high, words, f"between {low} and {high}")

    def away(metric: str, name: str, limit: float, shown: str) -> Criterion:
        found, before = (float(replicated[m][metric][0]) for m in (challenger, stale or challenger))
        better = stale is not None and abs(found) < abs(before)
        words = f"{found:{shown}}" + (f", stale {before:{shown}}" if stale else "")
        wanted = f"at most {limit} from 0" + (", or nearer than stale" if stale else "")
        return Criterion(name, abs(found) <= limit or better, words, wanted)

    return [
        slope(challenger),
        away("calibration_intercept", "calibration in the large", limits.max_intercept, "+.2f"),
        away("calibration_error", "expected calibration error", limits.max_calibration_error, ".4f"),
    ]


def _is_monotone(violations: Mapping[str, float]) -> Criterion:
    broken = {name: size for name, size in violations.items() if size > _ROUNDING}
    found = ", ".join(f"{name} by {size:.2g}" for name, size in broken.items())
    words = f"moves the wrong way: {found}" if broken else f"{len(violations)} kept"
    return Criterion("monotone constraints", not broken, words, "no score moving the wrong way")


def _no_segment_collapses(segments: Mapping[str, Mapping[str, Any]], limits: Gate) -> Criterion:
    """A segment collapses when even the upper end of its AUC's interval lies below the limit."""
    judged = {
        name: s
        for name, s in segments.items()
        if s["rows"] >= _MIN_SEGMENT_ROWS
        and min(s["converted"], s["rows"] - s["converted"]) >= _MIN_SEGMENT_CONVERTERS
        and s["auc"]["high"] is not None
    }
    collapsed = [n for n, s in judged.items() if s["auc"]["high"] < limits.min_segment_auc]
    found = f"{', '.join(collapsed)} collapsed" if collapsed else f"none of {len(judged)} collapsed"
    return Criterion("segments", not collapsed, found, f"AUC interval reaching {limits.min_segment_auc}")
