"""Whom of a scored snapshot it pays to contact, and what that is expected to earn.

Belongs here: from the scores and the campaign's money and limits to a plan with intervals. Does not: the optimum, which
is the planner's; consent, holdout and export, without which nobody is contacted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.days import pc
from propensity_dagster.data.lake import Home
from propensity_dagster.evaluation.bootstrap import Estimate
from propensity_dagster.evaluation.planner import NOBODY, Channel, Floats, Limits, SegmentLimit, plan
from propensity_dagster.evaluation.value import break_even
from propensity_dagster.scoring.batch import SCORES
from propensity_dagster.scoring.candidates import segment_values

_Z95 = 1.959964


@dataclass(frozen=True)
class ContactPlan:
    """Whom to contact, and what is expected of it. Intervals hold 95% if the probabilities are right.

    Attributes:
        snapshot: whose scores these are.
        scored: customers.
        break_even_probability: from which the cheapest contact pays; above 1 none does.
        above_break_even: customers for whom it does.
        contacted: customers.
        by_channel: contacts of each channel.
        expected_conversions: among them.
        cost: of the contacts.
        expected_profit: conversions times margin, less the cost.
        profit_of_contacting_all: through the cheapest channel, limits or not.
        profit_of_random: of as many contacts for the same money, drawn by lot.
        shadow_prices: by limit that binds, what one more unit of it would earn.
        gap: share of the profit that the plan may be short of the optimum.
    """

    snapshot: date
    scored: int
    break_even_probability: float
    above_break_even: int
    contacted: int
    by_channel: Mapping[str, int]
    expected_conversions: Estimate
    cost: float
    expected_profit: Estimate
    profit_of_contacting_all: float
    profit_of_random: float
    shadow_prices: Mapping[str, float]
    gap: float


def plan_contacts(
    campaign: Campaign, snapshot: date, home: Home, capacity: int | None = None, budget: float | None = None
) -> ContactPlan:
    """The plan for one scored snapshot.

    Args:
        campaign: gives money, channels and limits.
        snapshot: which scores.
        home: where the lake is.
        capacity: replaces the campaign's.
        budget: replaces the campaign's.

    Raises:
        DataContractError: when the snapshot has not been scored.
        PlanError: when the limits contradict each other.
        ConfigError: when a limit names a column that the snapshot does not have, or a number.
    """
    lake = home.lake(campaign.name)
    scores = pq.read_table(lake.existing_partition(SCORES, "snapshot", snapshot), columns=[campaign.key, "probability"])
    value = campaign.value
    channels = [Channel(name, c.cost, c.capacity) for name, c in campaign.contacts.channels.items()]
    channels = channels or [Channel("contact", value.cost_per_contact)]
    limits = Limits(
        value.capacity if capacity is None else capacity,
        value.budget if budget is None else budget,
        _segment_limits(campaign, snapshot, scores, home),
    )
    probability = scores["probability"].to_numpy()
    found = plan(probability, value.margin_per_conversion, channels, limits)
    cheapest = value.model_copy(update={"cost_per_contact": min(channel.cost for channel in channels)})
    chosen = found.channel != NOBODY
    counts = np.bincount(found.channel[chosen], minlength=len(channels))
    conversions = _poisson_binomial(probability[chosen])
    margin = value.margin_per_conversion
    mean = float(probability.mean()) if len(probability) else 0.0
    return ContactPlan(
        snapshot=snapshot,
        scored=len(probability),
        break_even_probability=break_even(cheapest),
        above_break_even=int((probability * margin > cheapest.cost_per_contact).sum()),
        contacted=found.contacted,
        by_channel={c.name: int(n) for c, n in zip(channels, counts, strict=True)},
        expected_conversions=conversions,
        cost=found.cost,
        expected_profit=Estimate(
            *(sold * margin - found.cost for sold in (conversions.value, conversions.low, conversions.high))
        ),
        profit_of_contacting_all=float(probability.sum() * margin - len(probability) * cheapest.cost_per_contact),
        profit_of_random=found.contacted * mean * margin - found.cost,
        shadow_prices=found.shadow_prices,
        gap=found.gap,
    )


def describe_plan(campaign: Campaign, plan: ContactPlan) -> str:
    """Who is worth contacting, in words."""
    margin = campaign.value.margin_per_conversion
    if not plan.contacted:
        why = f"a contact pays above a probability of {plan.break_even_probability:.2%}, at a margin of {margin:g}"
        return f"On {plan.snapshot} nobody of {plan.scored:,} is worth a contact: {why}."
    capped = ""
    if plan.contacted < plan.above_break_even:
        capped = f" within the limits ({plan.above_break_even:,} would pay)"
    profit, sold = plan.expected_profit, plan.expected_conversions
    return (
        f"On {plan.snapshot} {plan.contacted:,} of {plan.scored:,} customers are worth contacting{capped}: at a margin "
        f"of {margin:g} a contact pays above a probability of {plan.break_even_probability:.2%}. Expected: "
        f"{sold.value:,.0f} conversions ({sold.low:,.0f} to {sold.high:,.0f}) and a profit of {profit.value:,.0f} "
        f"({profit.low:,.0f} to {profit.high:,.0f}) at a cost of {plan.cost:,.0f}; contacting all would bring "
        f"{plan.profit_of_contacting_all:,.0f}, as many at random {plan.profit_of_random:,.0f}."
    )


def _poisson_binomial(probability: Floats) -> Estimate:
    """A sum of independent draws, by its normal approximation."""
    mean, spread = float(probability.sum()), _Z95 * float(np.sqrt((probability * (1 - probability)).sum()))
    return Estimate(mean, max(mean - spread, 0.0), mean + spread)


def _segment_limits(campaign: Campaign, snapshot: date, scores: pa.Table, home: Home) -> list[SegmentLimit]:
    stated = campaign.contacts.limits
    if not stated:
        return []
    features = home.lake(campaign.name).existing_partition("features", "snapshot", snapshot)
    columns = list(dict.fromkeys(limit.segment for limit in stated))
    known = [c for c in columns if c in pq.read_schema(features).names]
    table = pq.read_table(features, columns=[campaign.key, *known])
    at: Any = pc.index_in(scores[campaign.key].combine_chunks(), table[campaign.key].combine_chunks())
    table = table.take(at)
    values = {name: segment_values(campaign, table, name) for name in columns}
    return [SegmentLimit(f"{x.segment} {x.value}", values[x.segment] == x.value, x.minimum, x.maximum) for x in stated]
