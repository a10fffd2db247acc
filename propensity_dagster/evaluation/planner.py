"""Whom to contact, through which channel, to earn the most: exact under capacity, budget, channels and segments.

A linear programme. Each customer is contacted once at most; what couples customers are a few limits. So nearly every
customer's best choice is plain once the limits have their prices (Dantzig 1957, the bounded knapsack; the core of a
knapsack: Balas and Zemel 1980). The prices come from a sample, only customers whose choice is close at those prices go
to the solver (HiGHS through SciPy), and the price bound over everybody (Lagrange) proves how near the optimum the plan
is. Belongs here: probabilities in, choices out. Does not: who may be contacted, which is the audience's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from propensity_dagster.errors import PlanError
from propensity_dagster.evaluation.metrics import Floats

NOBODY = -1

_SAMPLE, _CORE = 20_000, 20_000
_NEAR, _NODES = 120, 2_000
_TOLERANCE = 1e-9
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
class _Problem:
    """Value (n, C) of each choice, -inf where it is not allowed; rows of limits: names, sizes, and who counts."""

    value: Floats
    names: list[str] = field(default_factory=list[str])
    limit: list[float] = field(default_factory=list[float])
    weights: list[Floats] = field(default_factory=list[Floats])  # by limit and channel (C,): what a contact takes
    groups: list[NDArray[np.bool_] | None] = field(default_factory=list[NDArray[np.bool_] | None])  # None: everybody

    def add(self, name: str, limit: float, weights: Floats, group: NDArray[np.bool_] | None = None) -> None:
        """One more limit: the weights of all contacts of the group sum to at most that much."""
        self.names.append(name)
        self.limit.append(limit)
        self.weights.append(weights)
        self.groups.append(group)

    def part(self, rows: NDArray[np.int64], limit: Floats) -> "_Problem":
        """The same for some customers, with limits of their own."""
        groups = [None if g is None else g[rows] for g in self.groups]
        return _Problem(self.value[rows], self.names, limit.tolist(), self.weights, groups)

    def reduced(self, prices: Floats) -> Floats:
        """Value (n, C) of each choice after it has paid for what it takes of the limits."""
        left = self.value.copy()
        for price, weights, group in zip(prices, self.weights, self.groups, strict=True):
            if price:
                left -= price * (weights if group is None else group[:, None] * weights)
        return left

    def used(self, channel: NDArray[np.int64]) -> Floats:
        """What choices (n,) take of each limit."""
        chosen = channel != NOBODY
        taken = [
            np.bincount(channel[chosen if g is None else chosen & g], minlength=self.value.shape[1]) @ w
            for w, g in zip(self.weights, self.groups, strict=True)
        ]
        return np.array(taken, dtype=np.float64)

    def profit(self, channel: NDArray[np.int64]) -> float:
        """Sum of the values of choices (n,)."""
        chosen = np.flatnonzero(channel != NOBODY)
        return float(self.value[chosen, channel[chosen]].sum())

    def bound(self, prices: Floats) -> float:
        """No plan within the limits earns more than this, whatever the prices (weak duality)."""
        best = np.maximum(self.reduced(prices).max(axis=1, initial=0.0), 0.0)
        return float(prices @ np.array(self.limit) + best.sum())


@dataclass(frozen=True)
class _Relaxed:
    """Share of each allowed choice (m,): of whom, through which channel; prices of the limits (K,); profit."""

    share: Floats
    who: NDArray[np.int64]
    how: NDArray[np.int64]
    prices: Floats
    profit: float


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
    everybody = problem = _state(probability, margin, channels, limits, allowed)
    if held is not None:
        problem = everybody.part(np.flatnonzero(~held), np.array(everybody.limit))
    costs = np.array([channel.cost for channel in channels])
    _require_possible(problem, limits, costs)
    chosen, prices = _greedy(problem, limits, channels) or _by_prices(problem)
    binding = {name: float(price) for name, price in zip(problem.names, prices, strict=True) if price > _CLOSE}
    channel = chosen
    if held is not None:  # they would be contacted if what the others paid for the limits were still worth it
        channel, _ = _choices(everybody.reduced(prices))
        channel[~held] = chosen
    cost = float(costs[chosen[chosen != NOBODY]].sum())
    return Plan(channel, problem.profit(chosen), cost, problem.bound(prices), binding)


def _state(
    probability: Floats,
    margin: float,
    channels: Sequence[Channel],
    limits: Limits,
    allowed: NDArray[np.bool_] | None,
) -> _Problem:
    costs = np.array([channel.cost for channel in channels])
    value = probability[:, None] * margin - costs
    if allowed is not None:
        value[~allowed] = -np.inf
    problem = _Problem(value)
    every = np.ones(len(channels))
    if limits.capacity is not None:
        problem.add("capacity", limits.capacity, every)
    if limits.budget is not None:
        problem.add("budget", limits.budget, costs)
    for i, channel in enumerate(channels):
        if channel.capacity is not None:
            problem.add(f"capacity of {channel.name}", channel.capacity, np.eye(len(channels))[i])
    for segment in limits.segments:
        if segment.maximum is not None:
            problem.add(f"maximum of {segment.name}", segment.maximum, every, segment.members)
        if segment.minimum:
            problem.add(f"minimum of {segment.name}", -segment.minimum, -every, segment.members)
    return problem


def _require_possible(problem: _Problem, limits: Limits, costs: Floats) -> None:
    """What can be seen without a solver is said with its numbers."""
    reachable = np.isfinite(problem.value).any(axis=1)
    members = {name: group for name, group in zip(problem.names, problem.groups, strict=True) if group is not None}
    demanded = [s for s in limits.segments if s.minimum]
    for segment in demanded:
        there = int((reachable & members[f"minimum of {segment.name}"]).sum())
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
    if limits.budget is not None and len(costs) and largest * costs.min() > limits.budget:
        raise PlanError(
            f"a minimum of {largest:,} contacts costs at least {largest * costs.min():,.2f}, the budget is "
            f"{limits.budget:,.2f}"
        )


def _greedy(problem: _Problem, limits: Limits, channels: Sequence[Channel]) -> tuple[NDArray[np.int64], Floats] | None:
    """The best first, where that is the optimum: one limit on people at most, or one on money with one cost."""
    if limits.segments or any(channel.capacity is not None for channel in channels):
        return None
    if limits.budget is not None and (len(channels) > 1 or channels[0].cost <= 0):
        return None
    best = problem.value.argmax(axis=1)
    value = problem.value[np.arange(len(best)), best]
    pays = int((value > 0).sum())
    rooms = {"capacity": limits.capacity}
    if limits.budget is not None:
        rooms["budget"] = int(limits.budget / channels[0].cost + _CLOSE)
    scarce = min((name for name, room in rooms.items() if room is not None), key=lambda n: rooms[n] or 0, default="")
    room = min(pays, rooms[scarce] or 0) if scarce else pays
    order = np.argsort(-value, kind="stable")
    channel = np.full(len(best), NOBODY)
    channel[order[:room]] = best[order[:room]]
    prices = np.zeros(len(problem.names))
    if room < pays:
        price = max(float(value[order[room]]), 0.0)
        prices[problem.names.index(scarce)] = price / channels[0].cost if scarce == "budget" else price
    return channel, prices


def _by_prices(problem: _Problem) -> tuple[NDArray[np.int64], Floats]:
    """Prices from a sample, the close choices to the solver, and more of them until nobody else's choice matters.

    That is when the relaxation with the others' choices fixed earns as much as the bound over everybody.
    """
    n = len(problem.value)
    limit = np.array(problem.limit)
    rows = np.arange(n)[:: max(n // _SAMPLE, 1)]
    relaxed = _relax(problem.part(rows, limit * len(rows) / max(n, 1)))
    prices = np.zeros(len(limit)) if relaxed is None else relaxed.prices
    size = _CORE
    while True:
        channel, closeness = _choices(problem.reduced(prices))
        core = np.argpartition(closeness, size)[:size] if size < n else np.arange(n)
        channel[core] = NOBODY
        part = problem.part(core, limit - problem.used(channel))
        relaxed = _relax(part)
        if relaxed is not None:
            prices = relaxed.prices
            earned = problem.profit(channel) + relaxed.profit
            if size >= n or problem.bound(prices) - earned <= _TOLERANCE * max(abs(earned), 1.0):
                channel[core] = _whole(part, relaxed)
                return channel, prices
        elif size >= n:
            raise PlanError(f"no plan keeps all limits together: {', '.join(problem.names)}")
        size *= 4


def _choices(reduced: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The best choice (n,) at the prices, and by how much it is better than the next one."""
    ordered = np.sort(np.column_stack([reduced, np.zeros(len(reduced))]), axis=1)
    best = reduced.argmax(axis=1)
    channel = np.where(reduced[np.arange(len(best)), best] > 0, best, NOBODY)
    return channel, ordered[:, -1] - ordered[:, -2]


def _relax(problem: _Problem) -> _Relaxed | None:
    """The best plan that may contact a customer in part; None where no plan keeps the limits."""
    from scipy.optimize import linprog

    n, width = problem.value.shape
    who, how = np.nonzero(np.isfinite(problem.value))
    limits = _rows(problem, who, how)
    rows, room = limits, np.array(problem.limit)
    if not len(who):  # the solver refuses a programme without variables
        return _Relaxed(np.empty(0), who, how, np.zeros(len(room)), 0.0) if (room >= 0).all() else None
    if width > 1:
        rows, room = sparse.vstack([limits, _once(who, n)], format="csr"), np.concatenate([room, np.ones(n)])
    found = linprog(-problem.value[who, how], A_ub=rows, b_ub=room, bounds=(0, 1), method="highs")
    if found.status != 0:
        return None
    return _Relaxed(found.x, who, how, np.maximum(-found.ineqlin.marginals[: len(problem.names)], 0.0), -found.fun)


def _whole(problem: _Problem, relaxed: _Relaxed) -> NDArray[np.int64]:
    """Whole choices (n,): the few customers that the relaxation splits, no more than there are limits, are decided with
    those whose choice is as close.

    Raises:
        PlanError: when whole customers cannot keep the limits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    who, how, x = relaxed.who, relaxed.how, relaxed.share
    taken = x > 0.5
    split = np.abs(x - taken) > _CLOSE
    if split.any():
        left = np.abs(problem.reduced(relaxed.prices)[who, how])
        open_ = np.isin(who, who[np.union1d(np.flatnonzero(split), np.argsort(left, kind="stable")[:_NEAR])])
        limits = _rows(problem, who, how)
        room = np.array(problem.limit) - limits @ (taken & ~open_).astype(np.float64)
        rules = [
            LinearConstraint(limits[:, open_], ub=room),
            LinearConstraint(_once(who, len(problem.value))[:, open_], ub=1),
        ]
        found = milp(
            -problem.value[who, how][open_],
            integrality=np.ones(int(open_.sum())),
            bounds=Bounds(0, 1),
            constraints=rules,
            options={"node_limit": _NODES},  # the bound says what it may have missed
        )
        if found.x is None:
            raise PlanError(f"no plan of whole customers keeps all limits together: {', '.join(problem.names)}")
        taken[open_] = found.x > 0.5
    channel = np.full(len(problem.value), NOBODY)
    channel[who[taken]] = how[taken]
    return channel


def _once(who: NDArray[np.int64], n: int) -> Any:
    """Each customer once (n, m)."""
    return sparse.csr_array((np.ones(len(who)), (who, np.arange(len(who)))), shape=(n, len(who)))


def _rows(problem: _Problem, who: NDArray[np.int64], how: NDArray[np.int64]) -> Any:
    """What each choice takes of each limit (K, m)."""
    rows = [w[how] if g is None else w[how] * g[who] for w, g in zip(problem.weights, problem.groups, strict=True)]
    return sparse.csr_array(np.array(rows).reshape(len(rows), len(who)))
