"""Money: whom it pays to contact, and what that is expected to earn."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from propensity_dagster.campaign_sections import Value
from propensity_dagster.evaluation.bootstrap import Estimate
from propensity_dagster.evaluation.metrics import Floats, Weighted

_Z95 = 1.959964


@dataclass(frozen=True)
class ContactPlan:
    """Who is worth contacting among scored people. The interval holds if the probabilities are right."""

    scored: int
    break_even_probability: float
    above_break_even: int
    contacted: int
    cut_off: float
    expected_conversions: Estimate
    cost: float
    expected_profit: Estimate
    profit_of_contacting_all: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def break_even(value: Value) -> float:
    """Probability from which a contact pays: cost over margin. Above 1 nothing pays."""
    return value.cost_per_contact / value.margin_per_conversion if value.margin_per_conversion else np.inf


def plan_contacts(probability: Floats, value: Value) -> ContactPlan:
    """Contact everybody above break-even, the best first, up to capacity.

    Given the probabilities, conversions are a sum of independent Bernoulli draws; the 95% interval is the
    normal approximation of that Poisson binomial sum.
    """
    ordered = np.sort(probability)[::-1]
    pays = int((ordered * value.margin_per_conversion > value.cost_per_contact).sum())
    contacted = min(pays, value.capacity or pays)
    chosen = ordered[:contacted]
    conversions = float(chosen.sum())
    spread = _Z95 * float(np.sqrt((chosen * (1 - chosen)).sum()))
    cost = contacted * value.cost_per_contact
    margin = value.margin_per_conversion

    def profit(sold: float) -> float:
        return sold * margin - cost

    return ContactPlan(
        scored=len(ordered),
        break_even_probability=break_even(value),
        above_break_even=pays,
        contacted=contacted,
        cut_off=float(chosen[-1]) if contacted else 1.0,
        expected_conversions=Estimate(conversions, max(conversions - spread, 0.0), conversions + spread),
        cost=cost,
        expected_profit=Estimate(
            profit(conversions), profit(max(conversions - spread, 0.0)), profit(conversions + spread)
        ),
        profit_of_contacting_all=float(probability.sum() * margin - len(ordered) * value.cost_per_contact),
    )


def break_even_totals(value: Value) -> Callable[[Weighted], Floats]:
    """A metric (replicates, 4): rows contacted above break-even, converters among them, all converters, all rows."""
    cut = break_even(value)
    return _totals([lambda p: p > cut])


def top_totals(cuts: Sequence[float]) -> Callable[[Weighted], Floats]:
    """A metric (replicates, 2 k + 2): rows at or above each of k probabilities and converters among them; then all
    converters, all rows.
    """
    return _totals([partial(np.less_equal, cut) for cut in cuts])


def _totals(choices: Sequence[Callable[[Floats], Any]]) -> Callable[[Weighted], Floats]:
    def totals(r: Weighted) -> Floats:
        chosen = [np.asarray(choose(r.judged.probability), dtype=np.float64) for choose in choices]
        columns = [column for c in chosen for column in (c, c * r.judged.y)]
        return r.w @ np.column_stack([*columns, r.judged.y, np.ones_like(r.judged.y)])

    return totals
