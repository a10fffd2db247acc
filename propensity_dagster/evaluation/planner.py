"""Whom to contact, through which channel, to earn the most: exact under capacity, budget, channels and segments.

A linear programme. Channels differ by what they cost, so customers who may be contacted in the same ways and count in
the same limits, one kind, differ by what they are worth alone: of a kind the best are contacted, and what is to be
found is how many of each kind through each channel. The programme therefore has a row for each kind and limit, not for
each customer, and its columns are runs of customers of a kind, which are split where the price of a contact falls
inside one (the bounded knapsack, Dantzig 1957; refining an aggregated programme, Zipkin 1980). Solved by HiGHS through
SciPy. Belongs here: probabilities in, choices out. Does not: who may be contacted, which is the audience's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from propensity_dagster.errors import PlanError
from propensity_dagster.evaluation.metrics import Floats

NOBODY = -1

_RUNS, _SPLIT = 20_000, 100
_NEAR, _NODES = 2_000, 200
_BITS = 30
_CLOSE = 1e-9


@dataclass(frozen=True)
class Channel:
    """A way to contact somebody: what one contact costs, and how many there may be; None is no limit."""

    name: str
    cost: float
    capacity: int | None = None


@dataclass(frozen=True)
class SegmentLimit:
    """How many members of a group are contacted at least and at most. `members` (n,) says who is in it."""

    name: str
    members: NDArray[np.bool_]
    minimum: int = 0
    maximum: int | None = None


@dataclass(frozen=True)
class Limits:
    """What holds for all contacts together: people, money, and people by segment."""

    capacity: int | None = None
    budget: float | None = None
    segments: Sequence[SegmentLimit] = ()


@dataclass(frozen=True)
class Plan:
    """Whom to contact.

    Attributes:
        channel: index of the channel of each customer (n,), or NOBODY; of those held, what it would have been.
        profit: expected, of all contacts, without those held.
        cost: of the same contacts.
        bound: no plan earns more; `profit` is the optimum when they are equal.
        shadow_prices: by limit what one more unit of it would earn, only of limits that bind; a minimum's is what one
            less would save.
    """

    channel: NDArray[np.int64]
    profit: float
    cost: float
    bound: float
    shadow_prices: Mapping[str, float]

    @property
    def contacted(self) -> int:
        """How many customers, those held among them."""
        return int((self.channel != NOBODY).sum())

    @property
    def gap(self) -> float:
        """Share of the bound that the plan may be short of the optimum."""
        return max(self.bound - self.profit, 0.0) / abs(self.bound) if self.bound else 0.0


@dataclass(frozen=True)
class _Limited:
    """K limits on the contacts of S kinds of customers through C channels.

    Attributes:
        names: of the limits.
        limit: their sizes (K,); a minimum is a negative one.
        takes: what one contact takes of each limit (K, S, C).
        cost: of one contact (S, C), inf where it is not allowed.
    """

    names: list[str]
    limit: Floats
    takes: Floats
    cost: Floats

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """Which channels a kind may be contacted through (S, C)."""
        return np.isfinite(self.cost)

    def priced(self, prices: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """What one contact of each kind costs when what it takes of the limits is paid for (S,), and its channel."""
        cost = self.cost + np.tensordot(prices, self.takes, axes=1)
        channel = cost.argmin(axis=1)
        return cost[np.arange(len(cost)), channel], channel

    def bound(self, prices: Floats, worth: Floats, kind: NDArray[np.int64]) -> float:
        """No plan within the limits earns more than this, whatever the prices (weak duality)."""
        return float(prices @ self.limit + np.maximum(worth - self.priced(prices)[0][kind], 0.0).sum())


def plan(
    probability: Floats,
    margin: float,
    channels: Sequence[Channel],
    limits: Limits,
    allowed: NDArray[np.bool_] | None = None,
    held: NDArray[np.bool_] | None = None,
) -> Plan:
    """The contacts of highest expected profit.

    Args:
        probability: of conversion (n,), if contacted.
        margin: of one conversion.
        channels: C ways to contact somebody.
        limits: of all contacts together.
        allowed: which customer may be contacted how (n, C); None: everybody every way.
        held: who is not contacted whatever it would earn (n,), so that contacts can be compared with them.

    Returns:
        The plan. Nobody is contacted below break-even, unless a minimum demands it.

    Raises:
        PlanError: when the limits contradict each other, naming them.
    """
    if allowed is None:
        allowed = np.ones((len(probability), len(channels)), dtype=np.bool_)
    free = np.ones(len(probability), dtype=np.bool_) if held is None else ~held
    _require_possible(limits, channels, np.any(allowed[free], axis=1), free)
    limited, kind = _kinds(channels, limits, allowed)
    worth = probability * margin
    chosen, prices = _greedy(limited, worth[free], kind[free], limits, channels) or _solve(
        limited, worth[free], kind[free]
    )
    # Those held would be contacted if what the others paid for the limits were still worth it.
    price, way = limited.priced(prices)
    channel = np.where(worth > price[kind], way[kind], NOBODY)
    channel[free] = chosen
    contacts = np.bincount(chosen[chosen != NOBODY], minlength=len(channels))
    cost = float(contacts @ np.array([c.cost for c in channels]))
    profit = float(worth[free][chosen != NOBODY].sum()) - cost
    binding = {name: float(price) for name, price in zip(limited.names, prices, strict=True) if price > _CLOSE}
    return Plan(channel, profit, cost, limited.bound(prices, worth[free], kind[free]), binding)


def _kinds(
    channels: Sequence[Channel], limits: Limits, allowed: NDArray[np.bool_]
) -> tuple[_Limited, NDArray[np.int64]]:
    """The limits by kind, and the kind of each customer (n,)."""
    kind = np.zeros(len(allowed), dtype=np.int64)
    for i, mark in enumerate([*allowed.T, *(segment.members for segment in limits.segments)], start=1):
        kind = 2 * kind + mark
        if i % _BITS == 0:  # before the marks fill the integer
            kind = np.unique(kind, return_inverse=True)[1]
    _, example, kind = np.unique(kind, return_index=True, return_inverse=True)
    cost = np.array([channel.cost for channel in channels])
    one = np.ones((len(example), len(channels)))
    rows: list[tuple[str, float, Floats]] = []
    if limits.capacity is not None:
        rows.append(("capacity", limits.capacity, one))
    if limits.budget is not None:
        rows.append(("budget", limits.budget, one * cost))
    for i, channel in enumerate(channels):
        if channel.capacity is not None:
            rows.append((f"capacity of {channel.name}", channel.capacity, one * np.eye(len(channels))[i]))
    for segment in limits.segments:
        counts = one * segment.members[example][:, None]
        if segment.maximum is not None:
            rows.append((f"maximum of {segment.name}", segment.maximum, counts))
        if segment.minimum:
            rows.append((f"minimum of {segment.name}", -segment.minimum, -counts))
    takes = np.array([taken for _, _, taken in rows]).reshape(len(rows), *one.shape)
    sizes = np.array([size for _, size, _ in rows], dtype=np.float64)
    return _Limited([name for name, _, _ in rows], sizes, takes, np.where(allowed[example], cost, np.inf)), kind


def _require_possible(
    limits: Limits, channels: Sequence[Channel], reachable: NDArray[np.bool_], free: NDArray[np.bool_]
) -> None:
    """What can be seen without a solver is said with its numbers."""
    demanded = [s for s in limits.segments if s.minimum]
    for segment in demanded:
        there = int((reachable & segment.members[free]).sum())
        if there < segment.minimum:
            raise PlanError(
                f"minimum of {segment.name}: {segment.minimum:,} contacts wanted, but only {there:,} of its customers "
                "may be contacted"
            )
        if segment.maximum is not None and segment.maximum < segment.minimum:
            raise PlanError(f"{segment.name}: the maximum {segment.maximum:,} is below the minimum {segment.minimum:,}")
    largest = max((s.minimum for s in demanded), default=0)
    if limits.capacity is not None and largest > limits.capacity:
        raise PlanError(f"a minimum of {largest:,} contacts is more than the capacity of {limits.capacity:,}")
    cheapest = min((channel.cost for channel in channels), default=0.0)
    if limits.budget is not None and largest * cheapest > limits.budget:
        raise PlanError(
            f"a minimum of {largest:,} contacts costs at least {largest * cheapest:,.2f}, the budget is "
            f"{limits.budget:,.2f}"
        )


def _greedy(
    limited: _Limited, worth: Floats, kind: NDArray[np.int64], limits: Limits, channels: Sequence[Channel]
) -> tuple[NDArray[np.int64], Floats] | None:
    """The best first, where that is the optimum: one limit on people at most, or one on money with one cost."""
    if limits.segments or any(channel.capacity is not None for channel in channels):
        return None
    if limits.budget is not None and (len(channels) > 1 or channels[0].cost <= 0):
        return None
    cost, way = limited.priced(np.zeros(len(limited.limit)))
    value = worth - cost[kind]
    pays = int((value > 0).sum())
    rooms = {"capacity": limits.capacity}
    if limits.budget is not None:
        rooms["budget"] = int(limits.budget / channels[0].cost + _CLOSE)
    scarce = min((name for name, room in rooms.items() if room is not None), key=lambda n: rooms[n] or 0, default="")
    room = min(pays, rooms[scarce] or 0) if scarce else pays
    order = np.argsort(-value, kind="stable")
    channel = np.full(len(value), NOBODY)
    channel[order[:room]] = way[kind[order[:room]]]
    prices = np.zeros(len(limited.limit))
    if room < pays:
        price = max(float(value[order[room]]), 0.0)
        prices[limited.names.index(scarce)] = price / channels[0].cost if scarce == "budget" else price
    return channel, prices


def _solve(limited: _Limited, worth: Floats, kind: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats]:
    """The channel of each customer (n,), and the prices of the limits (K,).

    Runs of neighbours stand for their customers until none holds both some that pay for their contact and some that do
    not; then the programme of the runs is that of the customers.
    """
    order = np.lexsort((-worth, kind))
    worth, kind = worth[order], kind[order]
    n = len(worth)
    if not n:
        return order, np.zeros(len(limited.limit))
    begins = np.searchsorted(kind, np.arange(len(limited.cost)))  # of the kinds
    starts = np.flatnonzero((np.arange(n) - begins[kind]) % max(n // _RUNS, 1) == 0)
    while True:
        ends = np.append(starts[1:], n)
        contacts, prices = _relax(limited, worth, kind, starts, ends)
        price = limited.priced(prices)[0][kind[starts]]
        mixed = np.flatnonzero((worth[starts] > price) & (worth[ends - 1] < price))
        if not len(mixed):
            break
        steps = [np.arange(a, b, max((b - a) // _SPLIT, 1)) for a, b in zip(starts[mixed], ends[mixed], strict=True)]
        starts = np.union1d(starts, np.concatenate(steps))
    contacts = _whole(limited, worth, begins, contacts)
    # The best of a kind, in the order of the channels.
    rest = np.diff(begins, append=n) - contacts.sum(axis=1)
    ways = np.tile([*range(contacts.shape[1]), NOBODY], len(contacts))
    channel = np.empty(n, dtype=np.int64)
    channel[order] = np.repeat(ways, np.column_stack([contacts, rest]).ravel())
    return channel, prices


def _relax(
    limited: _Limited, worth: Floats, kind: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """How many of each kind are contacted through each channel (S, C), in part, and the prices of the limits (K,)."""
    from scipy.optimize import linprog

    who, how = np.nonzero(limited.allowed)
    size = ends - starts
    taken, balance = _rows(limited, kind[starts])
    upper = np.concatenate([np.full(len(who), np.inf), size])
    found = linprog(
        np.concatenate([limited.cost[who, how], -np.add.reduceat(worth, starts) / size]),
        taken,
        limited.limit,
        balance,
        np.zeros(len(limited.cost)),
        bounds=np.column_stack([np.zeros(len(upper)), upper]),
        method="highs",
    )
    if found.status != 0:
        raise PlanError(f"no plan keeps all limits together: {', '.join(limited.names)}")
    contacts = np.zeros(limited.cost.shape)
    contacts[who, how] = found.x[: len(who)]
    return contacts, np.maximum(-found.ineqlin.marginals, 0.0)


def _whole(limited: _Limited, worth: Floats, begins: NDArray[np.int64], contacts: Floats) -> NDArray[np.int64]:
    """Whole contacts (S, C) near those of the relaxation, which splits no more than there are limits.

    Raises:
        PlanError: when whole customers cannot keep the limits.
    """
    rounded = np.rint(contacts)
    if (np.abs(contacts - rounded) <= _CLOSE * np.maximum(rounded, 1.0)).all():
        return rounded.astype(np.int64)
    for near in (max(_NEAR // len(begins), 2), len(worth)):
        found = _whole_near(limited, worth, begins, np.floor(contacts), near)
        if found is not None:
            return found
    raise PlanError(f"no plan of whole customers keeps all limits together: {', '.join(limited.names)}")


def _whole_near(
    limited: _Limited, worth: Floats, begins: NDArray[np.int64], contacts: Floats, near: int
) -> NDArray[np.int64] | None:
    """The best whole contacts whose number differs by at most so many within a kind; None where there are none."""
    from scipy.optimize import milp

    who, how = np.nonzero(limited.allowed)
    ends = np.append(begins[1:], len(worth))
    last = begins + contacts.sum(axis=1).astype(np.int64)
    low, high = np.maximum(last - near, begins), np.minimum(last + near, ends)
    customers = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    taken, balance = _rows(limited, np.repeat(np.arange(len(begins)), high - low))
    room = limited.limit - np.tensordot(limited.takes, contacts, axes=2)
    integer = np.concatenate([np.ones(len(who)), np.zeros(len(customers))])
    lower = np.concatenate([-contacts[who, how], np.zeros(len(customers))])
    upper = np.concatenate([np.full(len(who), np.inf), np.ones(len(customers))])
    rules: list[Any] = [(taken, -np.inf, room), (balance, low - last, low - last)]
    found = milp(
        np.concatenate([limited.cost[who, how], -worth[customers]]),
        integrality=integer,
        bounds=(lower, upper),
        constraints=rules,
        options={"node_limit": _NODES, "mip_rel_gap": 0.0},  # the bound says what it may have missed
    )
    if found.x is None:
        return None
    whole = contacts.astype(np.int64)
    whole[who, how] += np.rint(found.x[: len(who)]).astype(np.int64)
    return whole


def _rows(limited: _Limited, kind: NDArray[np.int64]) -> tuple[Any, Any]:
    """The programme's rows over its columns, the ways of each kind and then customers of the kinds (m,).

    What is taken of each limit (K, columns), and of each kind the contacts less the customers (S, columns).
    """
    who, how = np.nonzero(limited.allowed)
    taken = np.hstack([limited.takes[:, who, how], np.zeros((len(limited.limit), len(kind)))])
    sign = np.concatenate([np.ones(len(who)), -np.ones(len(kind))])
    place = (np.concatenate([who, kind]), np.arange(len(sign)))
    return sparse.csr_array(taken), sparse.csr_array((sign, place), shape=(len(limited.cost), len(sign)))
