"""Whom of a scored snapshot to contact, whom to hold back for comparison, and what that is expected to earn.

Belongs here: from scores, money, limits, permission and holdout to a plan with intervals and to the audience. Does not:
the optimum, which is the planner's; what forbids a contact, which is the permission's; sending, which is the export's.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.data.days import pc
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home
from propensity_dagster.errors import DataContractError, PlanError
from propensity_dagster.evaluation.bootstrap import Z95, Estimate
from propensity_dagster.evaluation.planner import NOBODY, Channel, Floats, Limits, Plan, SegmentLimit, plan
from propensity_dagster.evaluation.splits import hash_fractions
from propensity_dagster.evaluation.value import break_even
from propensity_dagster.experiments.holdout import HOLDOUT, hold_out
from propensity_dagster.experiments.uplift import PROPENSITY, UPLIFT, effects, error_of_sum, read_decision
from propensity_dagster.features.build import entity_table
from propensity_dagster.features.snapshots import snapshot_instant
from propensity_dagster.scoring.audiences import (
    AUDIENCE,
    CONTACT,
    HELD,
    RANDOM,
    RANDOM_HELD,
    publish_audience_table,
    read_plan,
    was_exported,
)
from propensity_dagster.scoring.batch import SCORES
from propensity_dagster.scoring.candidates import segment_values
from propensity_dagster.scoring.permission import Flags, Permission, contacted_often, permission

logger = logging.getLogger(__name__)

_TIES = 1e-7


@dataclass(frozen=True)
class ContactPlan:
    """Whom to contact, and what is expected of it. Intervals hold 95% if the probabilities are right.

    Attributes:
        snapshot: whose scores these are.
        scored: customers.
        break_even_probability: from which the cheapest contact pays; above 1 none does.
        above_break_even: customers for whom it does.
        excluded: by reason, customers who may not be contacted.
        held: customers in the holdout among those who may be contacted.
        held_chosen: of them, those who would have been contacted.
        contacted: customers, those by lot among them.
        random: of them, those drawn by lot below the cut-off.
        by_channel: contacts of each channel.
        expected_conversions: among the contacted.
        cost: of the contacts.
        expected_profit: conversions times margin, less the cost.
        profit_of_contacting_all: through the cheapest channel, limits or not.
        profit_of_random: of as many contacts for the same money, drawn by lot.
        shadow_prices: by limit that binds, what one more unit of it would earn.
        gap: share of the profit that the plan may be short of the optimum.
        ranked_by: "propensity", or "uplift" where a trial showed that to be better; then expected conversions and
            profit are what the contacts change.
        notes: what in the campaign file had no effect, and why.
    """

    snapshot: date
    scored: int
    break_even_probability: float
    above_break_even: int
    excluded: Mapping[str, int]
    held: int
    held_chosen: int
    contacted: int
    random: int
    by_channel: Mapping[str, int]
    expected_conversions: Estimate
    cost: float
    expected_profit: Estimate
    profit_of_contacting_all: float
    profit_of_random: float
    shadow_prices: Mapping[str, float]
    gap: float
    ranked_by: str = PROPENSITY
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Chosen:
    """A plan and its customers (n,): conversions that a contact is worth, the channel of who is contacted or would be,
    who is held, who was drawn by lot.
    """

    plan: ContactPlan
    channels: list[Channel]
    worth: Floats
    channel: NDArray[np.int64]
    held: Flags
    drawn: Flags
    below: Flags  # held and below the cut-off: whom those drawn by lot are compared with


def plan_contacts(
    campaign: Campaign,
    snapshot: date,
    home: Home,
    engine: Engine,
    now: datetime,
    capacity: int | None = None,
    budget: float | None = None,
) -> ContactPlan:
    """The plan for one scored snapshot as it would be now. Contacts nobody, and writes nothing.

    Args:
        campaign: gives money, channels, limits, consent and holdout.
        snapshot: which scores.
        home: where the lake is.
        engine: reads consent and suppression.
        now: against which the age of the consents is judged, UTC.
        capacity: replaces the campaign's.
        budget: replaces the campaign's.

    Raises:
        DataContractError: when the snapshot has not been scored, or the consents are stale.
        PlanError: when the limits contradict each other, or `capacity` is more than there are customers.
        ConfigError: when consent is not set, or a limit names a column that the snapshot does not have, or a number.
    """
    scores = _scores(campaign, snapshot, home)
    return _choose(campaign, snapshot, scores, home, engine, now, capacity, budget, keep=False).plan


def publish_audience(
    campaign: Campaign,
    snapshot: date,
    home: Home,
    engine: Engine,
    now: datetime,
    capacity: int | None = None,
    budget: float | None = None,
) -> dict[str, Any]:
    """Choose whom to contact and whom to hold, and publish `audience` of the snapshot. Returns the plan as plain data.

    An audience of which something was sent stays as it is: a new one would contact some people and forget others.
    Arguments and errors are those of `plan_contacts`.

    Raises:
        DataContractError: also for a `capacity` or `budget` that comes after the export.
    """
    lake = home.lake(campaign.name)
    if was_exported(lake, snapshot):
        if capacity is not None or budget is not None:
            raise DataContractError(
                f"{campaign.name}: the audience of {snapshot} was exported already: a capacity or budget comes too late"
            )
        logger.info("audience %s: kept, it was exported", snapshot)
        return read_plan(lake, snapshot)
    scores = _scores(campaign, snapshot, home)
    chosen = _choose(campaign, snapshot, scores, home, engine, now, capacity, budget, keep=True)
    described = {
        **asdict(chosen.plan),
        "snapshot": str(snapshot),
        "decided_at": str(now),
        "margin": campaign.value.margin_per_conversion,
        "exports": [export.name for export in campaign.contacts.exports],
    }
    publish_audience_table(_table(campaign, snapshot, scores, chosen, now), described, lake, snapshot)
    logger.info(
        "audience %s: %s contacts, %s held back", snapshot, f"{chosen.plan.contacted:,}", f"{chosen.plan.held_chosen:,}"
    )
    return described


def audience_violations(campaign: Campaign, snapshot: date, home: Home) -> dict[str, int]:
    """What must never happen in a published audience: rows of a held customer who is contacted, or named twice."""
    file = home.lake(campaign.name).existing_partition(AUDIENCE, "snapshot", snapshot)
    table = pq.read_table(file, columns=[campaign.key, "group", "channel"])
    register = home.lake(campaign.name).file(HOLDOUT)
    held = pa.chunked_array([], pa.string())  # where nobody was ever scored there is no register
    if register.exists():
        held = pq.read_table(register, filters=[("held", "=", True), ("until", ">", snapshot)])[campaign.key]
    contacts = table.filter(pc.is_in(table["group"], pa.array([CONTACT, RANDOM])))
    return {
        "held_and_contacted": int(pc.sum(pc.is_in(contacts[campaign.key], held.combine_chunks())).as_py() or 0),
        "named_twice": table.num_rows - len(table[campaign.key].unique()),
        "without_channel": contacts["channel"].null_count,
    }


def describe_plan(campaign: Campaign, plan: ContactPlan) -> str:
    """Who is worth contacting, in words."""
    margin = campaign.value.margin_per_conversion
    if not plan.contacted:
        if plan.above_break_even > sum(plan.excluded.values()):
            return f"On {plan.snapshot} nobody of {plan.scored:,} is contacted: the limits allow no contact."
        if plan.above_break_even:
            why = ", ".join(f"{n:,} {reason}" for reason, n in plan.excluded.items() if n)
            return f"On {plan.snapshot} nobody of {plan.scored:,} may be contacted with profit: {why}."
        why = f"a contact pays above a probability of {plan.break_even_probability:.2%}, at a margin of {margin:g}"
        return f"On {plan.snapshot} nobody of {plan.scored:,} is worth a contact: {why}."
    capped = ""
    if plan.contacted < plan.above_break_even:
        capped = f" within consent, holdout and limits ({plan.above_break_even:,} would pay)"
    profit, sold = plan.expected_profit, plan.expected_conversions
    return (
        f"On {plan.snapshot} {plan.contacted:,} of {plan.scored:,} customers are worth contacting{capped}: at a margin "
        f"of {margin:g} a contact pays above a probability of {plan.break_even_probability:.2%}. Expected: "
        f"{sold.value:,.0f} conversions ({sold.low:,.0f} to {sold.high:,.0f}) and a profit of {profit.value:,.0f} "
        f"({profit.low:,.0f} to {profit.high:,.0f}) at a cost of {plan.cost:,.0f}; contacting all would bring "
        f"{plan.profit_of_contacting_all:,.0f}, as many at random {plan.profit_of_random:,.0f}."
    )


def _scores(campaign: Campaign, snapshot: date, home: Home) -> pa.Table:
    file = home.lake(campaign.name).existing_partition(SCORES, "snapshot", snapshot)
    return pq.read_table(file, columns=[campaign.key, "probability", "decile", "model_version"])


def _choose(
    campaign: Campaign,
    snapshot: date,
    scores: pa.Table,
    home: Home,
    engine: Engine,
    now: datetime,
    capacity: int | None,
    budget: float | None,
    *,
    keep: bool,
) -> _Chosen:
    value, contacts = campaign.value, campaign.contacts
    keys = scores[campaign.key].combine_chunks()
    channels = [Channel(name, c.cost, c.capacity) for name, c in contacts.channels.items()]
    channels = channels or [Channel("contact", value.cost_per_contact)]
    columns = list(dict.fromkeys([*campaign.holdout.strata, *(limit.segment for limit in contacts.limits)]))
    segments = _segment_columns(campaign, snapshot, keys, columns, home)
    if capacity is not None:
        _require_possible(campaign, capacity, len(keys), home)
    limits, notes = _limits(campaign, segments, capacity, budget)
    if contacts.consent is None and not keep:
        may = Permission(np.ones((len(keys), len(channels)), dtype=bool))
        notes.append("contacts.consent is not set: until it is, the audience contacts nobody")
    else:
        may = permission(campaign, keys, [c.name for c in channels], home, engine, now)
    may = may.without(contacted_often(campaign, snapshot, keys, home), "contacted often enough")
    strata = _strata(scores["decile"].to_numpy(), [segments[name] for name in campaign.holdout.strata])
    held = hold_out(campaign, snapshot, keys, strata, home, keep=keep)
    if limits.capacity is not None and limits.capacity > len(keys):
        notes.append(f"the capacity of {limits.capacity:,} is more than the {len(keys):,} customers: it limits nothing")
    cheapest = min(channels, key=lambda c: c.cost)
    lots = _Lots(contacts.random, int(np.argmin([c.cost for c in channels])), cheapest.cost)
    worth, ranked_by = scores["probability"].to_numpy(), read_decision(campaign, home)
    if ranked_by == UPLIFT:
        worth = _effects(campaign, snapshot, keys, home)
    # Equal customers are told apart by lot, the held among them: else of those at the cut-off none would be chosen.
    # Nobody is made better by it: who only just pays the cost still does not.
    lot = hash_fractions(keys.to_pylist(), f"ties:{campaign.name}:{snapshot}")
    found = plan(
        worth * (1 - _TIES * lot),
        value.margin_per_conversion,
        lots.left(channels),
        lots.limits(limits),
        may.allowed,
        held,
    )
    limited = np.zeros(len(keys), dtype=bool)
    for segment in limits.segments:
        if segment.maximum is not None:
            limited |= segment.members
    below = (found.channel == NOBODY) & may.allowed[:, lots.channel] & ~limited
    drawn = lots.draw(campaign, snapshot, keys, below & ~held)
    channel = np.where(drawn, lots.channel, found.channel)
    planned = _described(campaign, snapshot, worth, ranked_by, channels, channel, held, drawn, found, may, notes, home)
    compared = below & held if contacts.random else np.zeros_like(held)
    return _Chosen(planned, channels, worth, channel, held, drawn, compared)


@dataclass(frozen=True)
class _Lots:
    """Contacts by lot: how many, through which channel; they take their part of the limits beforehand."""

    wanted: int
    channel: int
    cost: float

    def limits(self, limits: Limits) -> Limits:
        if not self.wanted:
            return limits
        money = self.wanted * self.cost
        if limits.capacity is not None and limits.capacity < self.wanted:
            raise PlanError(f"contacts.random: {self.wanted:,} is more than the capacity of {limits.capacity:,}")
        if limits.budget is not None and limits.budget < money:
            raise PlanError(f"contacts.random costs {money:,.2f}, the budget is {limits.budget:,.2f}")
        capacity = None if limits.capacity is None else limits.capacity - self.wanted
        return Limits(capacity, None if limits.budget is None else limits.budget - money, limits.segments)

    def left(self, channels: list[Channel]) -> list[Channel]:
        mine = channels[self.channel]
        if not self.wanted or mine.capacity is None:
            return channels
        if mine.capacity < self.wanted:
            raise PlanError(f"contacts.random: {self.wanted:,} is more than the {mine.capacity:,} of {mine.name}")
        less = Channel(mine.name, mine.cost, mine.capacity - self.wanted)
        return [less if i == self.channel else c for i, c in enumerate(channels)]

    def draw(self, campaign: Campaign, snapshot: date, keys: pa.Array, pool: Flags) -> Flags:
        drawn = np.zeros(len(pool), dtype=bool)
        rows = np.flatnonzero(pool)
        if self.wanted and len(rows):
            order = hash_fractions(keys.take(pa.array(rows)).to_pylist(), f"random:{campaign.name}:{snapshot}")
            drawn[rows[np.argsort(order, kind="stable")[: self.wanted]]] = True
        return drawn


def _described(
    campaign: Campaign,
    snapshot: date,
    worth: Floats,
    ranked_by: str,
    channels: list[Channel],
    channel: NDArray[np.int64],
    held: Flags,
    drawn: Flags,
    found: Plan,
    may: Permission,
    notes: list[str],
    home: Home,
) -> ContactPlan:
    margin = campaign.value.margin_per_conversion
    cheapest = campaign.value.model_copy(update={"cost_per_contact": min(c.cost for c in channels)})
    contacted = (channel != NOBODY) & ~held
    counts = np.bincount(channel[contacted], minlength=len(channels))
    cost = float(counts @ np.array([c.cost for c in channels]))
    by_uplift = ranked_by == UPLIFT
    sold = _sum_of_effects(campaign, worth[contacted], home) if by_uplift else _poisson_binomial(worth[contacted])
    mean = float(worth.mean()) if len(worth) else 0.0
    return ContactPlan(
        snapshot=snapshot,
        scored=len(worth),
        break_even_probability=break_even(cheapest),
        above_break_even=int((worth * margin > cheapest.cost_per_contact).sum()),
        excluded=may.excluded,
        held=int((held & may.allowed.any(axis=1)).sum()),
        held_chosen=int((held & (found.channel != NOBODY)).sum()),
        contacted=int(contacted.sum()),
        random=int(drawn.sum()),
        by_channel={c.name: int(n) for c, n in zip(channels, counts, strict=True)},
        expected_conversions=sold,
        cost=cost,
        expected_profit=Estimate(*(n * margin - cost for n in (sold.value, sold.low, sold.high))),
        profit_of_contacting_all=float(worth.sum() * margin - len(worth) * cheapest.cost_per_contact),
        profit_of_random=int(contacted.sum()) * mean * margin - cost,
        shadow_prices=found.shadow_prices,
        gap=found.gap,
        ranked_by=ranked_by,
        notes=tuple(notes),
    )


def _table(campaign: Campaign, snapshot: date, scores: pa.Table, chosen: _Chosen, now: datetime) -> pa.Table:
    """Contacts, and those they are compared with; everybody else is not in it."""
    would = chosen.channel != NOBODY
    group = np.full(len(would), "", dtype=object)
    group[would & ~chosen.held] = CONTACT
    group[would & chosen.held] = HELD
    group[chosen.drawn] = RANDOM
    group[chosen.below] = RANDOM_HELD
    rows = np.flatnonzero(group != "")
    at = chosen.channel[rows]
    costs = np.array([*(c.cost for c in chosen.channels), 0.0])[at]
    names = np.array([*(c.name for c in chosen.channels), None], dtype=object)[at]
    table = scores.take(pa.array(rows))
    worth = chosen.worth[rows]
    n = len(rows)
    margin = campaign.value.margin_per_conversion
    return pa.table(
        {
            campaign.key: table[campaign.key],
            "snapshot": pa.repeat(pa.scalar(snapshot_instant(snapshot), pa.timestamp("us")), n),
            "group": pa.array(group[rows], pa.string()),
            "channel": pa.array(names, pa.string()),
            "probability": table["probability"],
            "decile": table["decile"],
            "cost": pa.array(costs),
            "expected_profit": pa.array(np.where(at == NOBODY, 0.0, worth * margin - costs)),
            "campaign": pa.repeat(campaign.name, n),
            "model_version": table["model_version"],
            "decided_at": pa.repeat(pa.scalar(now, pa.timestamp("us")), n),
        }
    )


def _poisson_binomial(probability: Floats) -> Estimate:
    """A sum of independent draws, by its normal approximation."""
    mean, spread = float(probability.sum()), Z95 * float(np.sqrt((probability * (1 - probability)).sum()))
    return Estimate(mean, max(mean - spread, 0.0), mean + spread)


def _sum_of_effects(campaign: Campaign, effect: Floats, home: Home) -> Estimate:
    """What contacts change together, with the error that the trial left in each tenth of the ranking."""
    value, spread = float(effect.sum()), Z95 * error_of_sum(campaign, effect, home)
    return Estimate(value, value - spread, value + spread)


def _effects(campaign: Campaign, snapshot: date, keys: pa.Array, home: Home) -> Floats:
    """Estimated effect of a contact on each customer (n,)."""
    features = home.lake(campaign.name).existing_partition("features", "snapshot", snapshot)
    found = effects(campaign, features, home)
    at: Any = pc.index_in(keys, found[campaign.key].combine_chunks())
    return np.asarray(found["effect"].take(at).to_numpy())


def _strata(decile: NDArray[np.int8], segments: list[NDArray[np.object_]]) -> NDArray[np.object_]:
    """Tenth of the score and segments of each customer (n,), as one text."""
    parts = [decile.astype(str).astype(object), *segments]
    return np.array(["|".join(values) for values in zip(*parts, strict=True)], dtype=object)


def _segment_columns(
    campaign: Campaign, snapshot: date, keys: pa.Array, columns: list[str], home: Home
) -> dict[str, NDArray[np.object_]]:
    if not columns:
        return {}
    features = home.lake(campaign.name).existing_partition("features", "snapshot", snapshot)
    known = [c for c in columns if c in pq.read_schema(features).names]
    table = pq.read_table(features, columns=[campaign.key, *known])
    at: Any = pc.index_in(keys, table[campaign.key].combine_chunks())
    table = table.take(at)
    return {name: segment_values(campaign, table, name) for name in columns}


def _require_possible(campaign: Campaign, capacity: int, scored: int, home: Home) -> None:
    """More contacts than there are customers, scored or not, is a slip. A campaign file's capacity is only remarked on:
    it stays what it is while customers come and go.
    """
    customers = scored
    if isinstance(campaign, EventCampaign):
        known = home.lake(campaign.name).file(entity_table(campaign))
        customers = max(scored, pq.read_metadata(known).num_rows if known.exists() else 0)
    if capacity > customers:
        raise PlanError(f"capacity must be at most {customers:,}, the number of customers there are, got {capacity:,}")


def _limits(
    campaign: Campaign, segments: Mapping[str, NDArray[np.object_]], capacity: int | None, budget: float | None
) -> tuple[Limits, list[str]]:
    stated, notes = [], []
    for limit in campaign.contacts.limits:
        members = segments[limit.segment] == limit.value
        if not members.any():
            there = ", ".join(sorted(set(segments[limit.segment].tolist()))[:20])
            notes.append(f"limit of {limit.segment} {limit.value}: no customer has this value; there are {there}")
        stated.append(SegmentLimit(f"{limit.segment} {limit.value}", members, limit.minimum, limit.maximum))
    value = campaign.value
    return Limits(
        value.capacity if capacity is None else capacity, value.budget if budget is None else budget, stated
    ), notes
