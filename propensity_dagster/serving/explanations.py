"""Why a score: the features that moved it most, in log-odds that add up, and in words.

Each feature is compared with a reference population, the newest scored one. Belongs here: choosing and wording
reasons, of features that are for customers' eyes. How contributions are computed is each scorer's own affair.
"""

import math
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from propensity_dagster.serving.inputs import Input
from propensity_dagster.serving.packages import Package
from propensity_dagster.wording import reason_sentence

REASONS = 5


def explain(package: Package, row: list[float], values: Sequence[Any]) -> dict[str, Any]:
    """`reasons`, `others`, `base`, `log_odds` and `base_probability` of one scored row.

    base + contributions of the reasons + others = log_odds, and the probability is its logistic function.

    Args:
        package: the version that scored it.
        row: its encoded values (p,).
        values: the same as they came, categories as text.
    """
    base, shares = package.model.contributions(row, package.reference)
    base += package.prior_shift
    shown = [i for i, field in enumerate(package.inputs) if not field.hidden]
    chosen: list[int] = []
    sources: set[str] = set()
    for i in sorted(shown, key=lambda i: -abs(shares[i])):
        source = package.inputs[i].source or package.inputs[i].feature
        # Of one source column the strongest: visits of 7, 30 and 90 days are not three reasons.
        if shares[i] != 0 and source not in sources and len(chosen) < package.content.get("reasons", REASONS):
            sources.add(source)
            chosen.append(i)
    reasons = [_reason(package.inputs[i], values[i], float(shares[i])) for i in chosen]
    total = float(shares.sum())
    return {
        "base": base,
        "base_probability": 1 / (1 + math.exp(-base)),
        "log_odds": base + total,
        "reasons": reasons,
        "others": total - sum(reason["contribution"] for reason in reasons),
    }


def _reason(field: Input, value: Any, contribution: float) -> dict[str, Any]:
    given = None if value is UNSET else value
    return {
        "feature": field.name,
        "value": given,
        "typical": field.typical,
        "contribution": contribution,
        "direction": "raises" if contribution > 0 else "lowers",
        "sentence": reason_sentence(
            field.template, field.meaning, field.window, given, field.typical, raises=contribution > 0
        ),
    }
