"""Reasons in words. Belongs here: what batch scores and the service must say alike; only the standard library."""

from typing import Any


def reason_sentence(template: str, meaning: str, window: str, value: Any, typical: Any, *, raises: bool) -> str:
    """One reason for whoever reads it.

    Args:
        template: the campaign's own, with `{value}` and `{typical}`, for customers who have a value; or empty.
        meaning: of the feature, in words.
        window: in days, "all", or "" where none applies.
        value: of the customer; None where it has none.
        typical: of the population; None where most have none.
        raises: whether it raises the probability.
    """
    if template and value is not None:
        return template.replace("{value}", words(value)).replace("{typical}", words(typical))
    what = meaning[:1].upper() + meaning[1:]
    if window == "all":
        what += "" if "since" in meaning else ", ever"
    elif window and " last " not in meaning:  # a meaning of its own windows
        what += f", last {window} days"
    own, usual = words(value), "most have none" if typical is None else f"typically {words(typical)}"
    if value is not None and own == words(typical):
        usual = "as most"
    return f"{what}: {own}, {usual}. This {'raises' if raises else 'lowers'} the probability."


def words(value: Any) -> str:
    """A value as people write it: no digits that mean nothing."""
    if value is None:
        return "none known"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
