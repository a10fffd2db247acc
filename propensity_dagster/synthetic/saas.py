"""A software service: business accounts, their usage, seats, trials, tickets and upgrades, with true probabilities.

The model of the world, so that it can be judged:

- An account buys seats at sign-up and fills them at its own pace. The share of the paid seats in use drives
  upgrades; an upgrade is the next plan with more seats, so the share falls and the wait begins anew.
- Usage of account i on day d is Poisson: its own level, a slow wave (constant within a week), a burst after
  sign-up, and working days. Accounts that use more fill their seats sooner, try more and upgrade more.
- An account tries a premium feature now and then; while the trial runs, upgrading is several times as likely.
- It has an incident now and then; until that is resolved, upgrading is rare and leaving more likely.
- Accounts leave for good at a daily hazard that depends on the plan at sign-up and on a running incident.
- Who came before the first day has a history that no log shows: it is lived through, unwritten, to day 0.

Given the state at t (latents, upgrades so far, trial running or not, incident running or not, still there or
not), seats and waves are known functions of time. What remains until the next upgrade is a Markov chain on
trial x incident with known daily rates, so the probability of at least one upgrade is the exact forward sum
of `true_probability`. The state cannot be read off the latents: every change of it is kept beside them.
"""

import csv
import logging
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from propensity_dagster.synthetic.world import (
    MICROSECONDS_PER_DAY,
    WorldConfig,
    dirty_rows,
    key_column,
    time_column,
    write_day,
)

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

PLANS = np.array(["starter", "team", "business", "enterprise"])
_TOP = len(PLANS) - 1
_PLAN_SHARE = np.array([0.55, 0.30, 0.15, 0.0])  # at sign-up; the top plan is only reached by upgrades
_PLAN_UPGRADE = np.array([1.3, 1.0, 0.8, 0.0])
_PLAN_RISK = np.array([1.4, 0.8, 0.5, 0.5]) / 2500
_PLAN_FEE = np.array([6.0, 9.0, 14.0, 21.0])  # a month and seat
INDUSTRIES = np.array(["software", "retail", "finance", "health", "education", "construction"])
_INDUSTRY_SHARE = np.array([0.28, 0.20, 0.14, 0.13, 0.13, 0.12])
_INDUSTRY_USAGE = np.array([0.30, 0.0, 0.10, -0.15, -0.20, -0.35])
_INDUSTRY_UPGRADE = np.array([0.15, 0.0, 0.25, 0.0, -0.45, -0.10])
REGIONS = np.array(["dach", "france", "uk_ireland", "nordics", "benelux", "iberia"])
_REGION_SHARE = np.array([0.27, 0.17, 0.22, 0.13, 0.12, 0.09])
# A plan opens the features of the plans below it and two more, so their number tells the plan.
FEATURES = np.array(
    ["boards", "documents", "calendar", "forms", "timesheets", "reports", "automation", "dashboards", "audit", "sso"]
)
_FEATURES_OF_STARTER = 4
_WEEKDAY = np.array([1.05, 1.10, 1.08, 1.05, 0.92, 0.05, 0.04])

OUTCOME_TABLE = "upgrades"

_DAYS_BEFORE = 450  # sign-ups reach this far back before the first day
_TYPICAL_LEVEL = 0.095
_SEATS_PER_UPGRADE = 1.6
_FULL = 5.5  # how steeply upgrades rise with the share of seats in use
_TRIAL_ENDS, _INCIDENT_ENDS = 1 / 14, 1 / 12
_TRIAL_UPGRADE, _INCIDENT_UPGRADE = 8.0, 0.3
_INCIDENT_RISK = 3.0


@dataclass(frozen=True)
class Latents:
    """What drives each account; one array entry per account. Days count from the world's first day."""

    signup: Ints
    seats: Ints
    plan: Ints
    industry: Ints
    region: Ints
    risk: Floats
    level: Floats
    wave_amplitude: Floats
    wave_period: Floats
    wave_phase: Floats
    first_share: Floats
    growth: Floats
    trial_level: Floats
    incident_level: Floats
    readiness: Floats


@dataclass
class State:
    """Where each account stands; `upgrades` counts since sign-up."""

    upgrades: Ints
    trial: Flags
    incident: Flags
    gone: Flags

    @classmethod
    def at_signup(cls, size: int) -> "State":
        """Nothing has happened yet."""
        return cls(np.zeros(size, np.int64), *(np.zeros(size, bool) for _ in range(3)))


@dataclass(frozen=True)
class Rates:
    """One day's probabilities of a trial's and an incident's start, and the upgrade intensity without either."""

    trial: Floats
    incident: Floats
    upgrade: Floats


@dataclass(frozen=True)
class Happened:
    """Who did what on one day, as account numbers; `there` and `on_trial` are flags of all accounts."""

    there: Flags
    on_trial: Flags
    trial_started: Ints
    trial_ended: Ints
    incident_started: Ints
    incident_ended: Ints
    upgraded: Ints
    changed: Ints


def generate(config: WorldConfig, tables: Path, oracle: Path) -> None:
    """Write accounts.csv and one parquet file per day of each log; latents and changes of state to `oracle`.

    Memory is a few arrays of one number per account, plus one day's events.
    """
    rng = np.random.default_rng(config.seed)
    latents = _draw_latents(config, rng)
    tables.mkdir(parents=True)
    pq.write_table(pa.table(vars(latents)), oracle / "latents.parquet")
    _write_accounts(config, latents, tables / "accounts.csv", rng)
    state = State.at_signup(config.customers)
    mood = latents.level
    for offset in range(-_DAYS_BEFORE, 0):
        if offset % 7 == 0:
            mood = _weekly_mood(latents, offset)
        _live(config, latents, state, mood, offset, rng)
    before = np.flatnonzero(latents.signup < 0)
    assigned = np.where(latents.signup < 0, _seats_in_use(latents, state.upgrades, 0), 0)
    next_upgrade = 1
    first = _changes(state, before, -1)
    with pq.ParquetWriter(oracle / "changes.parquet", first.schema, compression="zstd") as history:
        history.write_table(first)
        for offset in range(config.days):
            day = config.first_day + timedelta(days=offset)
            if offset % 7 == 0:
                mood = _weekly_mood(latents, offset)
                if offset % 91 == 0:
                    logger.info("synthetic saas: %s (day %d of %d)", day, offset, config.days)
            old = state.upgrades.copy()  # the day is worked on the old plan: an upgrade shows from the next day on
            happened = _live(config, latents, state, mood, offset, rng)
            history.write_table(_changes(state, happened.changed, offset))
            _write_seats(latents, old, happened, assigned, tables / "seat_changes", offset, day, rng)
            _write_usage(config, latents, old, state, happened, mood, tables / "usage", offset, rng)
            _write_trials(happened, tables / "premium_trials", day, rng)
            _write_tickets(config, state, happened, mood, tables / "tickets", offset, rng)
            next_upgrade = _write_upgrades(latents, old, happened.upgraded, tables, day, next_upgrade, rng)


def true_probability(
    config: WorldConfig, oracle: Path, snapshot: date, horizon_days: int
) -> tuple[NDArray[np.str_], Floats]:
    """P(at least one upgrade in [snapshot, snapshot + horizon)) given the state at the snapshot.

    `silent[a, b]` is the probability of still being there without an upgrade, with a trial running (a = 1) or
    not, and an incident running (b = 1) or not. A day takes, in this order: those who leave, the starts and
    ends of trials and incidents, the upgrades. Accounts not yet signed up or already gone get 0.
    """
    table = pq.read_table(oracle / "latents.parquet")
    latents = Latents(**{name: table[name].to_numpy() for name in table.column_names})
    start = config.offset(snapshot)
    state = _state_at(config, oracle, start)
    known = (latents.signup < start) & ~state.gone
    silent = np.zeros((2, 2, config.customers))
    silent[state.trial.astype(int), state.incident.astype(int), np.arange(config.customers)] = known
    risk = np.stack([latents.risk, latents.risk * _INCIDENT_RISK])
    factor = np.array([[1.0, _INCIDENT_UPGRADE], [_TRIAL_UPGRADE, _TRIAL_UPGRADE * _INCIDENT_UPGRADE]])[:, :, None]
    upgraded = np.zeros(config.customers)
    mood = latents.level
    for offset in range(start, start + horizon_days):
        if offset == start or offset % 7 == 0:
            mood = _weekly_mood(latents, offset - offset % 7)
        rates = _rates(config, latents, state.upgrades, mood, offset)
        silent *= 1 - risk
        begun = silent[0] * rates.trial - silent[1] * _TRIAL_ENDS
        silent += np.stack([-begun, begun])
        begun = silent[:, 0] * rates.incident - silent[:, 1] * _INCIDENT_ENDS
        silent += np.stack([-begun, begun], axis=1)
        upgrade = silent * -np.expm1(-rates.upgrade * factor)
        upgraded += upgrade.sum(axis=(0, 1))
        silent -= upgrade
    keys = np.arange(1, config.customers + 1).astype(np.str_)
    return keys, upgraded


def _draw_latents(config: WorldConfig, rng: np.random.Generator) -> Latents:
    n = config.customers
    plan = rng.choice(len(PLANS), n, p=_PLAN_SHARE)
    industry = rng.choice(len(INDUSTRIES), n, p=_INDUSTRY_SHARE)
    level = np.exp(np.log(_TYPICAL_LEVEL) + _INDUSTRY_USAGE[industry] + rng.normal(0, 1.0, n))
    keenness = np.log(level / _TYPICAL_LEVEL)
    return Latents(
        signup=rng.integers(-_DAYS_BEFORE, config.days, n),
        seats=np.clip(np.exp(2.6 + 0.4 * plan + rng.normal(0, 0.8, n)), 3, 400).astype(np.int64),
        plan=plan,
        industry=industry,
        region=rng.choice(len(REGIONS), n, p=_REGION_SHARE),
        risk=_PLAN_RISK[plan] * np.exp(rng.normal(-0.125, 0.5, n)),
        level=level,
        wave_amplitude=rng.uniform(0.05, 0.3, n),
        wave_period=rng.uniform(300, 700, n),
        wave_phase=rng.uniform(0, 2 * np.pi, n),
        first_share=rng.uniform(0.25, 0.85, n),
        growth=0.0010 * np.exp(0.35 * keenness + rng.normal(0, 0.7, n)),
        trial_level=0.0035 * np.exp(0.4 * keenness + rng.normal(0, 0.4, n)),
        incident_level=0.003 * np.exp(rng.normal(0, 0.4, n)),
        readiness=0.00085 * np.exp(_INDUSTRY_UPGRADE[industry] + rng.normal(0, 0.15, n)),
    )


def _weekly_mood(latents: Latents, week_start: int) -> Floats:
    """Usage rows a working day in the week that starts at `week_start`, before the calendar and the burst."""
    angle = 2 * np.pi * week_start / latents.wave_period + latents.wave_phase
    return latents.level * np.exp(latents.wave_amplitude * np.sin(angle))


def _burst(latents: Latents, offset: int) -> Floats:
    """An account explores in its first weeks."""
    return np.exp(-np.maximum(offset - latents.signup, 0) / 30.0)


def _calendar(config: WorldConfig, offset: int) -> float:
    """Offices work from Monday to Friday, less in August and hardly between the years."""
    day = config.first_day + timedelta(days=offset)
    between_years = (day.month, day.day) >= (12, 23) or (day.month, day.day) <= (1, 2)
    season = 0.35 if between_years else 0.85 if day.month == 8 else 1.0
    return float(season * _WEEKDAY[day.weekday()])


def _paid_seats(latents: Latents, upgrades: Ints) -> Ints:
    return (latents.seats * _SEATS_PER_UPGRADE**upgrades).astype(np.int64)


def _seats_filled(latents: Latents, upgrades: Ints, offset: int) -> Floats:
    """Share of the paid seats in use, between 0 and 1."""
    wanted = latents.first_share + latents.growth * np.maximum(offset - latents.signup, 0)
    return np.minimum(wanted / _SEATS_PER_UPGRADE**upgrades, 1.0)


def _seats_in_use(latents: Latents, upgrades: Ints, offset: int) -> Ints:
    filled = _seats_filled(latents, upgrades, offset)
    return np.maximum((filled * _paid_seats(latents, upgrades)).astype(np.int64), 1)


def _rates(config: WorldConfig, latents: Latents, upgrades: Ints, mood: Floats, offset: int) -> Rates:
    """What chance draws from on one day: the generator and the oracle share it."""
    calendar = _calendar(config, offset)
    plan = np.minimum(latents.plan + upgrades, _TOP)
    keen = (mood / _TYPICAL_LEVEL) ** 0.6
    trial = latents.trial_level * keen * (1 + 2 * _burst(latents, offset)) * (plan < _TOP) * calendar
    full = np.exp(_FULL * (_seats_filled(latents, upgrades, offset) - 0.75))
    return Rates(
        trial=np.minimum(trial, 0.5),
        incident=np.minimum(latents.incident_level * calendar, 0.5),
        upgrade=latents.readiness * keen * full * _PLAN_UPGRADE[plan] * calendar,
    )


def _live(
    config: WorldConfig, latents: Latents, state: State, mood: Floats, offset: int, rng: np.random.Generator
) -> Happened:
    """Let one day happen and change `state`. Nobody leaves before the first day: who had left would be dead weight."""
    n = config.customers
    there = (latents.signup <= offset) & ~state.gone
    left = np.zeros(n, dtype=bool)
    if offset >= 0:
        left = there & (rng.random(n) < latents.risk * np.where(state.incident, _INCIDENT_RISK, 1.0))
        state.gone |= left
        there &= ~left
    rates = _rates(config, latents, state.upgrades, mood, offset)
    trial_turns = there & (rng.random(n) < np.where(state.trial, _TRIAL_ENDS, rates.trial))
    incident_turns = there & (rng.random(n) < np.where(state.incident, _INCIDENT_ENDS, rates.incident))
    state.trial ^= trial_turns
    state.incident ^= incident_turns
    factor = np.where(state.trial, _TRIAL_UPGRADE, 1.0) * np.where(state.incident, _INCIDENT_UPGRADE, 1.0)
    upgraded = there & (rng.random(n) < -np.expm1(-rates.upgrade * factor))
    on_trial = state.trial.copy()
    state.upgrades += upgraded
    state.trial &= ~upgraded  # bought, so no longer on trial
    return Happened(
        there=there,
        on_trial=on_trial,
        trial_started=np.flatnonzero(trial_turns & on_trial),
        trial_ended=np.flatnonzero((trial_turns & ~on_trial) | (upgraded & on_trial)),
        incident_started=np.flatnonzero(incident_turns & state.incident),
        incident_ended=np.flatnonzero(incident_turns & ~state.incident),
        upgraded=np.flatnonzero(upgraded),
        changed=np.flatnonzero(left | trial_turns | incident_turns | upgraded),
    )


def _changes(state: State, accounts: Ints, offset: int) -> pa.Table:
    """The state of some accounts at the end of a day."""
    columns = {name: values[accounts] for name, values in vars(state).items()}
    return pa.table({"day": np.full(len(accounts), offset), "account": accounts, **columns})


def _state_at(config: WorldConfig, oracle: Path, start: int) -> State:
    """The state at the beginning of a day: each account's newest change before it."""
    changes = pq.read_table(oracle / "changes.parquet", filters=pc.field("day") < start)
    state = State.at_signup(config.customers)
    accounts = changes["account"].to_numpy()
    for name, values in vars(state).items():
        values[accounts] = changes[name].to_numpy()  # changes are in order of days: the last assignment stays
    return state


def _office_times(rng: np.random.Generator, day: date, size: int) -> NDArray[np.datetime64]:
    """Instants within a day, most in office hours. Microseconds make chance ties rare."""
    offsets = ((0.25 + 0.6 * rng.beta(2.0, 2.2, size)) * MICROSECONDS_PER_DAY).astype(np.int64)
    return np.datetime64(day, "us") + offsets.astype("timedelta64[us]")


def _with_dirt(rng: np.random.Generator, size: int, kinds: int) -> tuple[Ints, list[Ints]]:
    """Which good row each written row shows, and the places of each kind of faulty copy.

    Faulty copies come on top of the good rows, as a faulty writer would add them: the truth stays the truth.
    """
    dirty = dirty_rows(rng, size, kinds)
    ends = size + np.cumsum([len(k) for k in dirty])
    spans = [np.arange(end - len(k), end) for k, end in zip(dirty, ends, strict=True)]
    return np.concatenate([np.arange(size), *dirty]), spans


def _write_upgrades(
    latents: Latents,
    old: Ints,
    upgraded: Ints,
    tables: Path,
    day: date,
    next_upgrade: int,
    rng: np.random.Generator,
) -> int:
    fees = [
        _paid_seats(latents, upgrades)[upgraded] * _PLAN_FEE[(latents.plan + upgrades)[upgraded]]
        for upgrades in (old, old + 1)
    ]
    rebate = rng.choice([1.0, 0.9, 0.8], len(upgraded), p=[0.7, 0.2, 0.1])
    increase = np.round(fees[1] * rebate - fees[0], 2)
    rows, spans = _with_dirt(rng, len(upgraded), 7)
    no_key, no_time, future, negative, infinite, _, same_id = spans
    values = increase[rows]
    values[negative] *= -1
    values[infinite] = np.inf
    values[same_id] += 1.0
    write_day(
        tables / OUTCOME_TABLE,
        day,
        {
            "upgrade_id": pa.array(np.arange(next_upgrade, next_upgrade + len(upgraded))[rows]),
            "account_id": key_column(upgraded[rows], no_key),
            "upgraded_at": time_column(_office_times(rng, day, len(upgraded))[rows], no_time, future),
            "monthly_increase": pa.array(values),
            "new_plan": pa.array(PLANS[(latents.plan + old + 1)[upgraded]][rows]),
        },
    )
    return next_upgrade + len(upgraded)


def _write_usage(
    config: WorldConfig,
    latents: Latents,
    old: Ints,
    state: State,
    happened: Happened,
    mood: Floats,
    folder: Path,
    offset: int,
    rng: np.random.Generator,
) -> None:
    day = config.first_day + timedelta(days=offset)
    eager = np.where(happened.on_trial, 1.6, 1.0) * np.where(state.incident, 0.75, 1.0)
    daily = np.where(happened.there, mood, 0.0) * (1 + 1.5 * _burst(latents, offset)) * eager
    cumulative = np.cumsum(daily * _calendar(config, offset))
    # Independent Poisson counts: one Poisson total, allotted in proportion to the rates.
    who = np.searchsorted(cumulative, rng.random(rng.poisson(cumulative[-1])) * cumulative[-1], "right")
    n = len(who)
    opened = _FEATURES_OF_STARTER + 2 * np.minimum(latents.plan + old, _TOP)[who] + 2 * happened.on_trial[who]
    opened = np.minimum(opened, len(FEATURES))
    features = FEATURES[(rng.random(n) * opened).astype(np.int64)]
    # Not every seat is at work every day.
    utilisation = np.round(100 * _seats_filled(latents, old, offset)[who] * rng.beta(45, 7, n), 1)
    actions = 1 + np.round(_seats_in_use(latents, old, offset)[who] * rng.lognormal(0.8, 0.6, n)).astype(np.int64)
    rows, (no_key, no_time, future, negative, infinite, _) = _with_dirt(rng, n, 6)
    shown_actions, shown_utilisation = actions[rows], utilisation[rows]
    shown_actions[negative] *= -1
    shown_utilisation[infinite] = np.inf
    write_day(
        folder,
        day,
        {
            "account_id": key_column(who[rows], no_key),
            "used_at": time_column(_office_times(rng, day, n)[rows], no_time, future),
            "feature": pa.array(features[rows]),
            "actions": pa.array(shown_actions),
            "utilisation": pa.array(shown_utilisation),
        },
    )


def _write_seats(
    latents: Latents,
    old: Ints,
    happened: Happened,
    assigned: Ints,
    folder: Path,
    offset: int,
    day: date,
    rng: np.random.Generator,
) -> None:
    """Seats are assigned when an administrator comes to it; `assigned` is brought up to date."""
    in_use = _seats_in_use(latents, old, offset)
    comes = rng.random(len(assigned)) < (0.3 if day.weekday() < 5 else 0.02)
    who = np.flatnonzero(happened.there & comes & (in_use > assigned))
    added = (in_use - assigned)[who]
    assigned[who] = in_use[who]
    filled = np.round(100 * in_use[who] / _paid_seats(latents, old)[who], 1)
    rows, (no_key, no_time, negative, _) = _with_dirt(rng, len(who), 4)
    shown = added[rows]
    shown[negative] *= -1
    write_day(
        folder,
        day,
        {
            "account_id": key_column(who[rows], no_key),
            "changed_at": time_column(_office_times(rng, day, len(who))[rows], no_time, np.arange(0)),
            "seats_added": pa.array(shown),
            "filled": pa.array(filled[rows]),
        },
    )


def _write_trials(happened: Happened, folder: Path, day: date, rng: np.random.Generator) -> None:
    who = np.concatenate([happened.trial_started, happened.trial_ended])
    events = np.repeat(["started", "ended"], [len(happened.trial_started), len(happened.trial_ended)])
    _write_typed(who, events, "prolonged", folder, day, rng)


def _write_tickets(
    config: WorldConfig,
    state: State,
    happened: Happened,
    mood: Floats,
    folder: Path,
    offset: int,
    rng: np.random.Generator,
) -> None:
    calendar = _calendar(config, offset)
    chance = rng.random(config.customers)
    asks = np.flatnonzero(happened.there & (chance < np.minimum(0.06 * mood * calendar, 0.5)))
    presses = np.flatnonzero(happened.there & state.incident & (chance > 1 - 0.12 * calendar))
    kinds = [asks, happened.incident_started, presses, happened.incident_ended]
    events = np.repeat(["question", "incident", "escalation", "resolved"], [len(k) for k in kinds])
    _write_typed(np.concatenate(kinds), events, "merged", folder, config.first_day + timedelta(days=offset), rng)


def _write_typed(
    who: Ints, events: NDArray[np.str_], unknown_type: str, folder: Path, day: date, rng: np.random.Generator
) -> None:
    rows, (no_key, unknown, _) = _with_dirt(rng, len(who), 3)
    shown = events[rows].astype(object)
    shown[unknown] = unknown_type
    write_day(
        folder,
        day,
        {
            "account_id": key_column(who[rows], no_key),
            "at": pa.array(_office_times(rng, day, len(who))[rows]),
            "event": pa.array(shown, pa.string()),
        },
    )


def _write_accounts(config: WorldConfig, latents: Latents, file: Path, rng: np.random.Generator) -> None:
    n = config.customers
    created = np.datetime64(config.first_day, "s") + (latents.signup * 86_400).astype("timedelta64[s]")
    created = np.datetime_as_string(created + rng.integers(0, 86_400, n).astype("timedelta64[s]"))
    industries = INDUSTRIES[latents.industry].astype(object)
    industries[rng.random(n) < 0.05] = ""
    columns = [np.arange(1, n + 1), created, latents.seats, PLANS[latents.plan], industries, REGIONS[latents.region]]
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["account_id", "created_at", "seats_bought", "signup_plan", "industry", "region"])
        writer.writerows(zip(*columns, strict=True))
        # One of each kind of dirt: added rows, so that the good account stays.
        writer.writerow(["", "2024-05-01T10:00:00", 12, "team", "retail", "dach"])
        writer.writerow([n + 1, "not a date", 8, "starter", "finance", "benelux"])
        writer.writerow([n + 2, "2024-06-01T10:00:00", -5, "starter", "health", "nordics"])
        writer.writerow([n + 3, "2024-06-02T10:00:00", "a dozen", "business", "retail", "iberia"])
        writer.writerow([1, "2025-08-30T10:00:00", 25, "business", "software", "france"])
        writer.writerow([column[-1] for column in columns])
