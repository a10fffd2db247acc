"""Money: from which probability a contact pays, what contacting the best so many finds, and what that is worth."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from propensity_dagster.campaign_sections import Value
from propensity_dagster.evaluation.bootstrap import estimate
from propensity_dagster.evaluation.metrics import Floats, Weighted, gains

REACHED = np.array([0.5, 0.7, 0.8, 0.9])
_POINTS = np.arange(1, 1001) / 1000
_FROM_ZERO = np.concatenate([[0.0], _POINTS])


def break_even(value: Value) -> float:
    """Probability from which a contact pays: cost over margin. Above 1 nothing pays."""
    return value.cost_per_contact / value.margin_per_conversion if value.margin_per_conversion else np.inf


def break_even_totals(value: Value) -> Callable[[Weighted], Floats]:
    """A metric (replicates, 4): rows contacted above break-even, converters among them, all converters, all rows."""
    cut = break_even(value)
    return _totals([lambda p: p > cut])


def top_totals(cuts: Sequence[float]) -> Callable[[Weighted], Floats]:
    """A metric (replicates, 2 k + 2): rows at or above each of k probabilities and converters among them; then all
    converters, all rows.
    """
    return _totals([partial(np.less_equal, cut) for cut in cuts])


def worth(value: Value, contacted: Floats, hits: Floats, converters: Floats, rows: Floats) -> dict[str, Any]:
    """What contacting some of the rows brings, as money with intervals.

    Args:
        value: margin and cost.
        contacted: rows contacted in each replicate (r,), the estimate first.
        hits: converters among them (r,).
        converters: all of them (r,).
        rows: all of them (r,).

    Returns:
        Plain data, per 1,000 rows: `profit_per_thousand`, `more_than_random` (as many contacts drawn by lot) and
        `more_than_all`; and `return_on_cost`, the profit over what the contacts cost.
    """
    margin, cost = value.margin_per_conversion, value.cost_per_contact
    profit = hits * margin - contacted * cost
    by_lot = contacted * converters / rows * margin - contacted * cost
    everybody = converters * margin - rows * cost
    with np.errstate(invalid="ignore", divide="ignore"):  # nobody contacted costs nothing
        return {
            "profit_per_thousand": estimate(1000 * profit / rows).to_json(),
            "more_than_random": estimate(1000 * (profit - by_lot) / rows).to_json(),
            "more_than_all": estimate(1000 * (profit - everybody) / rows).to_json(),
            "return_on_cost": estimate(profit / (contacted * cost)).to_json(),
        }


def reach(r: Weighted) -> Floats:
    """A metric (replicates, len(REACHED)): share of rows to contact, best first, to reach shares of the converters."""
    curve = np.maximum.accumulate(gains(r, _POINTS), axis=1)
    return np.array([np.interp(REACHED, np.concatenate([[0.0], row]), _FROM_ZERO) for row in curve])


def _totals(choices: Sequence[Callable[[Floats], Any]]) -> Callable[[Weighted], Floats]:
    def totals(r: Weighted) -> Floats:
        chosen = [np.asarray(choose(r.judged.probability), dtype=np.float64) for choose in choices]
        columns = [column for c in chosen for column in (c, c * r.judged.y)]
        return r.w @ np.column_stack([*columns, r.judged.y, np.ones_like(r.judged.y)])

    return totals
