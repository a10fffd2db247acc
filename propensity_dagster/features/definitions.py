"""The features of a campaign: name, meaning, type, window and expression, in one list.

An expression reads the joined aggregates of `build.py`, whose columns are called
`<activity column>_<window>` with window `7d`, `30d`, ... or `all`.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ibis.expr.types as ir

from propensity_dagster.campaign import EventCampaign
from propensity_dagster.campaign_sections import Stream
from propensity_dagster.contracts.tables import CENTS, THOUSANDTHS
from propensity_dagster.errors import ConfigError

DAYS_PER_MONTH = 30.4375
ALL = "all"


@dataclass(frozen=True)
class Feature:
    """One column of the features table.

    Attributes:
        name: column name.
        meaning: in words.
        kind: "number" or "category".
        window: in days, "all" for the whole history, "" where none applies.
        stream: the event log it comes from, or "".
        expression: from the joined aggregates to the column.
        minimum: values below it cannot be; None where they can, or where the campaign file says.
        source: the column of the source tables it comes from, `table.column`.
    """

    name: str
    meaning: str
    kind: str
    window: str
    stream: str
    expression: Callable[[ir.Table], Any]
    minimum: float | None = 0.0
    source: str = ""


def define_features(campaign: EventCampaign, attribute_types: dict[str, str]) -> list[Feature]:
    """Every feature of a campaign, in the order of the table's columns.

    Args:
        campaign: the campaign.
        attribute_types: "number" or "category" for each attribute of the entities.

    Raises:
        ConfigError: when `features.names` or `monotone` points at a feature that does not exist.
    """
    entities = campaign.source.entities.table or campaign.source.entities.stream
    features = [
        # Not also in days: a caller who sends the one would contradict the other, and each would be half a reason.
        Feature(
            "tenure_months",
            "months since first known",
            "number",
            "",
            "",
            lambda x: x.tenure_days.cast("float64") / DAYS_PER_MONTH,
            source=f"{entities}.{campaign.source.entities.created_at or 'first event'}",
        ),
    ]
    for name, kind in attribute_types.items():
        words = ", protected: no model sees it" if name in campaign.protected else ""
        column = _column(f"attribute__{name}")
        source = f"{entities}.{name}"
        features.append(Feature(name, f"attribute {name}{words}", kind, "", "", column, minimum=None, source=source))
    for name, stream in campaign.source.streams.items():
        features += _stream_features(campaign, name, stream)
    known = {feature.name for feature in features}
    read = [feature for feature in features if feature.name not in campaign.protected]
    campaign.check_monotone({feature.name: feature.kind for feature in read})
    for alias, target in campaign.features.names.items():
        if target not in known:
            raise ConfigError(
                f"{campaign.file}: features.names.{alias}: there is no feature {target!r}; "
                f"there are {', '.join(sorted(known))}"
            )
    _require_one_name_each(campaign, known)
    return features


def _require_one_name_each(campaign: EventCampaign, known: set[str]) -> None:
    """Outside, a feature has one name, and a name one feature."""
    names: dict[str, str] = {}
    for alias, target in campaign.features.names.items():
        where = f"{campaign.file}: features.names.{alias}"
        if target in names:
            raise ConfigError(f"{where}: {target!r} is already called {names[target]!r}")
        if alias == campaign.key or (alias in known and alias != target):
            raise ConfigError(
                f"{where}: {alias!r} is the name of {'the key' if alias == campaign.key else 'a feature'}"
            )
        names[target] = alias


def features_markdown(campaign: EventCampaign, features: list[Feature]) -> str:
    """The generated documentation of the features table."""
    alias = {target: name for name, target in campaign.features.names.items()}
    lines = [
        f"# Features of {campaign.name}",
        "",
        "All are as of the snapshot t: they use only events before t"
        + (f" - {campaign.source.late_days} days" if campaign.source.late_days else "")
        + ". A window of w days is [t - w, t).",
        "",
        "| name | meaning | type | window (days) | also called |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {f.name} | {f.meaning} | {f.kind} | {f.window} | {alias.get(f.name, '')} |" for f in features]
    return "\n".join(lines) + "\n"


def _stream_features(campaign: EventCampaign, name: str, stream: Stream) -> list[Feature]:
    features: list[Feature] = []
    windows = [*(f"{w}d" for w in campaign.features.windows_days), ALL]
    longest = f"{campaign.longest_window}d"
    columns = {measure: measure for measure in (*stream.measures, *stream.categories)}
    columns |= dict.fromkeys(stream.types, stream.type or "") | ({"amount": stream.amount} if stream.amount else {})

    def add(suffix: str, meaning: str, window: str, expression: Callable[[ir.Table], Any]) -> None:
        shown = window.removesuffix("d")
        # Refunds: an amount may be negative where the campaign file lets it.
        below_zero = stream.minimum_amount is None or stream.minimum_amount < 0
        minimum = None if suffix.startswith("amount_") and below_zero else 0.0
        column = next((c for word, c in columns.items() if suffix.startswith(f"{word}_")), stream.time)
        source = f"{stream.table}.{column}"
        features.append(Feature(f"{name}_{suffix}", meaning, "number", shown, name, expression, minimum, source))

    add("recency_days", f"days since the latest of the {name}", ALL, _days_since(f"_last__{name}_{ALL}"))
    if stream.type:
        _add_types(add, name, stream, windows)
    else:
        add("first_days", f"days since the first of the {name}", ALL, _days_since(f"_first__{name}_{ALL}"))
        for window in windows:
            add(f"count_{window}", f"number of {name}", window, _zero(f"{name}__count_{window}"))
        add(f"active_days_{longest}", f"days with {name}", longest, _zero(f"_days__{name}_{longest}"))
        add(f"rate_{ALL}", f"{name} per 30 days since the first one", ALL, _rate(name))
        add(
            "recency_share",
            f"days since the latest of the {name}, as a share of the days since the first",
            ALL,
            _recency_share(name),
        )
        _add_rhythm(add, name, longest)
        for short, long in pairwise(campaign.features.windows_days):
            add(
                f"momentum_{short}d_{long}d",
                f"pace of {name} in the last {short} days against the last {long}",
                f"{long}d",
                _momentum(f"{name}__count", short, long),
            )
    if stream.amount:
        _add_measure(add, name, "amount", CENTS, windows)
    for measure in stream.measures:  # a lifetime of page views says little that a year's does not
        _add_measure(add, name, measure, THOUSANDTHS, windows[:-1])
    for column in stream.categories:
        add(
            f"{column}_distinct_{longest}",
            f"different {column} of {name}",
            longest,
            _zero(f"distinct__{name}_{column}"),
        )
    return features


def _add_types(add: Callable[..., None], name: str, stream: Stream, windows: list[str]) -> None:
    base, *others = stream.types
    for kind in others:
        last = _days_since(f"_last_{kind}__{name}_{ALL}")
        add(f"{kind}_recency_days", f"days since the latest of the {name} of type {kind}", ALL, last)
    for window in windows:
        for kind in stream.types:
            add(
                f"{kind}_count_{window}",
                f"number of {name} of type {kind}",
                window,
                _zero(f"{name}__type_{kind}_{window}"),
            )
        for kind in others:
            parts = f"{name}__type_{kind}_{window}", f"{name}__type_{base}_{window}"
            add(f"{kind}_rate_{window}", f"{name}: {kind} for each {base}", window, _ratio(*parts))


def _add_measure(add: Callable[..., None], name: str, measure: str, scale: int, windows: list[str]) -> None:
    for window in windows:
        total, count = f"{name}__{measure}_{window}", f"{name}__count_{window}"
        add(f"{measure}_sum_{window}", f"total {measure} of {name}", window, _scaled(total, scale, zero=True))
        add(f"{measure}_mean_{window}", f"mean {measure} of {name}", window, _mean(total, count, scale))
        largest = _scaled(f"{name}__{measure}_max_{window}", scale, zero=False)
        add(f"{measure}_max_{window}", f"largest {measure} among {name}", window, largest)


def _add_rhythm(add: Callable[..., None], name: str, longest: str) -> None:
    """Time between days with events, over the longest window; the sums are integers, so every engine agrees."""
    gaps, total, squares = f"_gaps__{name}", f"_gap_sum__{name}", f"_gap_squares__{name}"

    def mean(x: ir.Table) -> Any:
        return x[total].cast("float64") / x[gaps].nullif(0).cast("float64")

    def deviation(x: ir.Table) -> Any:
        n = x[gaps].cast("float64")
        spread = x[squares].cast("float64") - x[total].cast("float64") * x[total].cast("float64") / n.nullif(0)
        return (spread / (n - 1).nullif(0)).sqrt()

    def overdue(x: ir.Table) -> Any:
        since = x[f"_last__{name}_{ALL}"]
        return (x.as_of - since).cast("float64") / mean(x).nullif(0.0)

    add("gap_mean_days", f"mean days between days with {name}", longest, mean)
    add("gap_std_days", f"standard deviation of the days between days with {name}", longest, deviation)
    add("overdue_ratio", f"days since the latest of the {name}, in mean gaps between them", longest, overdue)


def _rate(name: str) -> Callable[[ir.Table], Any]:
    """Comparable between the young and the old, unlike a lifetime count."""

    def expression(x: ir.Table) -> Any:
        days = (x.as_of - x[f"_first__{name}_{ALL}"]).cast("float64")
        return x[f"{name}__count_{ALL}"].cast("float64") * 30.0 / days.nullif(0.0)

    return expression


def _recency_share(name: str) -> Callable[[ir.Table], Any]:
    """Recency over age: with the count, what models of buying and dropping out need (Fader et al. 2005)."""

    def expression(x: ir.Table) -> Any:
        since_last = (x.as_of - x[f"_last__{name}_{ALL}"]).cast("float64")
        return since_last / (x.as_of - x[f"_first__{name}_{ALL}"]).cast("float64").nullif(0.0)

    return expression


def _column(name: str) -> Callable[[ir.Table], Any]:
    return lambda x: x[name]


def _zero(name: str) -> Callable[[ir.Table], Any]:
    return lambda x: x[name].fill_null(0).cast("int64")


def _days_since(name: str) -> Callable[[ir.Table], Any]:
    return lambda x: (x.as_of - x[name]).cast("int64")


def _ratio(part: str, whole: str) -> Callable[[ir.Table], Any]:
    return lambda x: x[part].fill_null(0).cast("float64") / x[whole].nullif(0).cast("float64")


def _mean(total: str, count: str, scale: int) -> Callable[[ir.Table], Any]:
    return lambda x: x[total].cast("float64") / (x[count].nullif(0).cast("float64") * float(scale))


def _scaled(name: str, scale: int, *, zero: bool) -> Callable[[ir.Table], Any]:
    if zero:
        return lambda x: x[name].fill_null(0).cast("float64") / float(scale)
    return lambda x: x[name].cast("float64") / float(scale)


def _momentum(count: str, short: int, long: int) -> Callable[[ir.Table], Any]:
    def expression(x: ir.Table) -> Any:
        recent = (x[f"{count}_{short}d"].fill_null(0) * long).cast("float64")
        return recent / (x[f"{count}_{long}d"].nullif(0) * short).cast("float64")

    return expression
