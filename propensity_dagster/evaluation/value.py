"""Money: from which probability a contact pays, and what contacting the best so many finds."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from propensity_dagster.campaign_sections import Value
from propensity_dagster.evaluation.metrics import Floats, Weighted


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


def _totals(choices: Sequence[Callable[[Floats], Any]]) -> Callable[[Weighted], Floats]:
    def totals(r: Weighted) -> Floats:
        chosen = [np.asarray(choose(r.judged.probability), dtype=np.float64) for choose in choices]
        columns = [column for c in chosen for column in (c, c * r.judged.y)]
        return r.w @ np.column_stack([*columns, r.judged.y, np.ones_like(r.judged.y)])

    return totals
