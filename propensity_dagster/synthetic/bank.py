"""A retail bank: customers, balances, card payments, contacts, loan offers and loans, with true uptake probabilities.

The model of the world, so that it can be judged:

- Each customer has a need for money: an own level (housing, employment, income band, thrift, and a small private
  disposition) times a wave (period 200 to 500 days, constant within a week). Where need is high, balances are low,
  days in overdraft many, and payments more and larger.
- A customer is either interested in a loan or not; on the first day nobody is, though some have had loans. Interest
  begins by itself at a daily rate in proportion to the need, or with a viewed offer, and lapses at a constant rate:
  it lasts about three weeks. Who is interested opens the loan page often, others seldom, and takes up a loan with a
  daily probability that is higher at the end of the month's money. Uptake ends the interest, and for about a year
  it seldom begins again.
- Offers follow a fixed plan, which pauses after a loan. Viewing falls with the offers of the last months (fatigue,
  which wears off). So an offer raises uptake for as long as interest lasts.
- Accounts are closed for good at a constant daily hazard.

Gender, age band and nationality group drive neither need nor uptake. They drive attributes: the young rent or
study and the old own their homes, incomes differ by gender, regions and housing by nationality group; and the old
visit branches where the young use the app. Since uptake depends on housing, employment and income, the groups
differ in it all the same, and what is left of them in the logs is what a fairness report should find.

Given the state at t (the latents, interested or not, last loan, fatigue, account open), and as long as no loan is
taken up, the future is a chain of two states with known transition probabilities: `true_probability` sums it
exactly. What a first loan in the window does to the state does not matter to "at least one".
"""

import calendar
import csv
import logging
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from propensity_dagster.synthetic.world import (
    WorldConfig,
    day_times,
    dirty_rows,
    key_column,
    time_column,
    write_day,
)

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

GENDERS = np.array(["female", "male", "diverse"])
_GENDER_SHARE = np.array([0.50, 0.49, 0.01])
_GENDER_INCOME = np.array([-0.15, 0.15, 0.0])
AGE_BANDS = np.array(["18-29", "30-44", "45-59", "60+"])
_AGE_SHARE = np.array([0.22, 0.28, 0.28, 0.22])
NATIONALITY_GROUPS = np.array(["domestic", "eu", "other"])
_NATIONALITY_SHARE = np.array([0.80, 0.12, 0.08])
REGIONS = np.array(["north", "south", "east", "west"])
_REGION_BY_NATIONALITY = np.array([[0.24, 0.28, 0.22, 0.26], [0.15, 0.45, 0.08, 0.32], [0.25, 0.20, 0.10, 0.45]])
_REGION_APP = np.array([0.10, 0.0, -0.25, 0.10])
HOUSING = np.array(["tenant", "mortgage", "owner"])
_HOUSING_BY_AGE = np.array([[0.80, 0.12, 0.08], [0.50, 0.38, 0.12], [0.33, 0.35, 0.32], [0.30, 0.10, 0.60]])
_HOUSING_NEED = np.array([0.30, 0.05, -0.55])
EMPLOYMENT = np.array(["employed", "self_employed", "student", "retired"])
_EMPLOYMENT_BY_AGE = np.array(
    [[0.66, 0.06, 0.28, 0.0], [0.84, 0.13, 0.03, 0.0], [0.83, 0.15, 0.01, 0.01], [0.22, 0.06, 0.0, 0.72]]
)
_EMPLOYMENT_NEED = np.array([0.10, 0.30, -0.35, -0.60])
_EMPLOYMENT_INCOME = np.array([0.35, 0.30, -1.20, -0.30])
INCOME_BANDS = np.array(["low", "middle", "high"])
_INCOME_NEED = np.array([0.15, 0.15, -0.45])
_INCOME_UPTAKE = np.array([-0.25, 0.10, 0.10])
_INCOME_MONTHLY = np.array([7.1, 7.6, 8.2])  # logarithm
_PAYDAYS = np.array([1, 15, 25, 28])
_PAYDAY_SHARE = np.array([0.30, 0.20, 0.20, 0.30])

CONTACTS = np.array(["app", "loan_page", "branch", "call"])
MERCHANTS = np.array(["groceries", "travel", "clothing", "health", "leisure", "furniture", "electronics", "car"])
_MERCHANT_SHARE = np.array([0.22, 0.12, 0.16, 0.10, 0.14, 0.08, 0.10, 0.08])
_LARGE_PURCHASES = np.array([5, 6, 7])
PRODUCTS = np.array(["car", "home_improvement", "debt_consolidation", "free_use"])
_PRODUCT_BY_HOUSING = np.array([[0.35, 0.05, 0.25, 0.35], [0.25, 0.35, 0.20, 0.20], [0.30, 0.40, 0.05, 0.25]])
_WEEKDAY = np.array([1.20, 1.15, 1.10, 1.10, 1.15, 0.80, 0.50])

OUTCOME_TABLE = "loans"

_DAYS_BEFORE = 1500  # accounts were opened as far back as this before the first day
_NEVER = -100_000  # day of the last loan of those without one
_STATEMENT_DAYS = 14
_THRIFT = 1.0  # how much it lowers the need for money
_LAPSE = 0.025  # of interest, a day
_UPTAKE = 0.028  # a day of interest
_OFFER_PAUSE_DAYS = 180  # no offers so soon after a loan
_FATIGUE_DAYS = 120.0  # in which an offer is forgotten but for 1/e
_LOAN, _OFFER, _BEGIN, _END = range(4)  # kinds of the state's history
_HISTORY = pa.schema({"day": pa.int32(), "customer": pa.int64(), "kind": pa.int8()})


@dataclass(frozen=True)
class Latents:
    """What drives each customer; one array entry per customer. Days count from the world's first day."""

    opened: Ints
    closed: Ints
    loan_before: Ints
    hazard: Floats
    interest_rate: Floats
    uptake: Floats
    wave_amplitude: Floats
    wave_period: Floats
    wave_phase: Floats
    thrift: Floats
    income: Floats
    payday: Ints
    statement_day: Ints
    card_level: Floats
    app_level: Floats
    branch_level: Floats
    page_level: Floats
    consent: Flags
    offer_every: Ints
    offer_day: Ints
    view_level: Floats
    gender: Ints
    age_band: Ints
    nationality_group: Ints
    region: Ints
    housing: Ints
    employment: Ints
    income_band: Ints


@dataclass
class State:
    """What the past has made of each customer, as at the start of a day."""

    interested: Flags
    last_loan: Ints
    fatigue: Floats


@dataclass(frozen=True)
class Today:
    """One day: its number and date, whose account is open, the wave, and how much of the month's money is spent."""

    offset: int
    day: date
    there: Flags
    wave: Floats
    spent: Floats


@dataclass(frozen=True)
class Steps:
    """What happened to the state on one day: the customers it happened to. `keen`: interested at any time of it."""

    sent: Ints
    viewed: Ints
    begun: Ints
    borrowed: Ints
    lapsed: Ints
    keen: Flags


def generate(config: WorldConfig, tables: Path, oracle: Path) -> None:
    """Write customers.csv and one parquet file per day of the five event tables; latents and history to `oracle`.

    Memory is a few arrays of one number per customer, plus one day's events.
    """
    rng = np.random.default_rng(config.seed)
    latents = _draw_latents(config, rng)
    tables.mkdir(parents=True)
    pq.write_table(pa.table(vars(latents)), oracle / "latents.parquet")
    _write_customers(config, latents, tables / "customers.csv", rng)
    n = config.customers
    state = State(np.zeros(n, dtype=bool), latents.loan_before.copy(), np.zeros(n))
    wave = np.zeros(n)
    next_card, next_loan = 1, 1
    with pq.ParquetWriter(oracle / "history.parquet", _HISTORY, compression="zstd") as history:
        for offset in range(config.days):
            day = config.first_day + timedelta(days=offset)
            if offset % 7 == 0:
                wave = _weekly_wave(latents, offset)
                if offset % 91 == 0:
                    logger.info("synthetic bank: %s (day %d of %d)", day, offset, config.days)
            there = (latents.opened <= offset) & (latents.closed > offset)
            today = Today(offset, day, there, wave, _month_spent(day)[latents.payday])
            steps = _advance(latents, state, today, rng)
            history.write_table(_history_of(offset, steps))
            _write_balances(latents, today, tables / "balances", rng)
            next_card += _write_cards(latents, today, tables / "card_transactions", next_card, rng)
            _write_contacts(latents, today, steps, tables / "contacts", rng)
            _write_offers(today, steps, tables / "offers", rng)
            next_loan += _write_loans(latents, today, steps.borrowed, tables / "loans", next_loan, rng)


def true_probability(
    config: WorldConfig, oracle: Path, snapshot: date, horizon_days: int
) -> tuple[NDArray[np.str_], Floats]:
    """P(at least one loan in [snapshot, snapshot + horizon)) given the state at the snapshot.

    `idle` and `keen` are the probabilities to be there without a loan so far, and not interested or interested.
    They go through the day as customers do in `_advance`: the account is closed or not, an offer or the need
    begins interest, interest leads to a loan (the probability sought) or lapses. Customers whose account is not
    yet open or already closed get 0.
    """
    table = pq.read_table(oracle / "latents.parquet")
    latents = Latents(**{name: table[name].to_numpy() for name in table.column_names})
    start = config.offset(snapshot)
    state = _state_at(latents, oracle, start)
    keen = state.interested.astype(np.float64)
    idle = 1 - keen
    fatigue = state.fatigue
    probability = np.zeros(config.customers)
    wave = np.zeros(config.customers)
    for step in range(horizon_days):
        offset = start + step
        if step == 0 or offset % 7 == 0:
            wave = _weekly_wave(latents, offset - offset % 7)
        need = _need(latents, wave) * _readiness(state.last_loan, offset)
        sent = _is_sent(latents, state.last_loan, offset)
        persuaded = sent * _view_probability(latents, fatigue) * _persuasion(need)
        begins = 1 - (1 - persuaded) * (1 - need)
        day = snapshot + timedelta(days=step)
        uptake = _uptake(latents, day, _month_spent(day)[latents.payday])
        idle, keen = idle * (1 - latents.hazard), keen * (1 - latents.hazard)
        idle, keen = idle * (1 - begins), keen + idle * begins
        probability += keen * uptake
        keen = keen * (1 - uptake)
        idle, keen = idle + keen * _LAPSE, keen * (1 - _LAPSE)
        fatigue = _fatigue_after(fatigue, sent)
    known = (latents.opened < start) & (latents.closed >= start)
    keys = np.arange(1, config.customers + 1).astype(np.str_)
    return keys, np.where(known, probability, 0.0)


def _draw_latents(config: WorldConfig, rng: np.random.Generator) -> Latents:
    n = config.customers
    gender = rng.choice(len(GENDERS), n, p=_GENDER_SHARE)
    age_band = rng.choice(len(AGE_BANDS), n, p=_AGE_SHARE)
    nationality = rng.choice(len(NATIONALITY_GROUPS), n, p=_NATIONALITY_SHARE)
    region = _choose(rng, _REGION_BY_NATIONALITY[nationality])
    housing = _choose(rng, _HOUSING_BY_AGE[age_band])
    housing[(nationality > 0) & (rng.random(n) < 0.30)] = 0
    employment = _choose(rng, _EMPLOYMENT_BY_AGE[age_band])
    standing = _EMPLOYMENT_INCOME[employment] + _GENDER_INCOME[gender] + rng.normal(0, 1, n)
    income_band = np.digitize(standing, [-0.4, 1.0]).astype(np.int64)
    opened = rng.integers(-_DAYS_BEFORE, config.days, n)
    hazard = np.exp(rng.normal(-0.125, 0.5, n)) / 4000
    thrift = rng.normal(0, 1, n)
    need = _HOUSING_NEED[housing] + _EMPLOYMENT_NEED[employment] + _INCOME_NEED[income_band]
    income = _INCOME_MONTHLY[income_band] + rng.normal(0, 0.2, n)
    rate = np.exp(-6.4 + need - _THRIFT * thrift + rng.normal(0, 0.15, n))
    every = rng.choice([28, 42, 63], n, p=[0.2, 0.4, 0.4])
    return Latents(
        opened=opened,
        # Those who had left long before the first day would only be dead weight: everybody is there at the start.
        closed=np.maximum(opened, 0) + rng.geometric(hazard) - 1,
        loan_before=_draw_loans_before(opened, 0.5 * rate, rng),
        hazard=hazard,
        interest_rate=rate,
        uptake=np.minimum(_UPTAKE * np.exp(_INCOME_UPTAKE[income_band] + rng.normal(0, 0.1, n)), 0.4),
        wave_amplitude=rng.uniform(0.2, 0.8, n),
        wave_period=rng.uniform(200, 500, n),
        wave_phase=rng.uniform(0, 2 * np.pi, n),
        thrift=thrift,
        income=income,
        payday=rng.choice(len(_PAYDAYS), n, p=_PAYDAY_SHARE),
        statement_day=rng.integers(0, _STATEMENT_DAYS, n),
        card_level=np.exp(-4.2 + 0.6 * (income - 7.6) - 0.15 * thrift + rng.normal(0, 0.6, n)),
        app_level=np.exp(-4.5 + _REGION_APP[region] - 0.3 * (age_band - 1) + rng.normal(0, 0.9, n)),
        branch_level=np.exp(-6.6 + 0.35 * (age_band - 1) + rng.normal(0, 0.7, n)),
        page_level=np.exp(rng.normal(-0.02, 0.2, n)),
        consent=rng.random(n) < 0.6,
        offer_every=every,
        offer_day=rng.integers(0, every),
        view_level=rng.beta(3.0, 2.0, n),
        gender=gender,
        age_band=age_band,
        nationality_group=nationality,
        region=region,
        housing=housing,
        employment=employment,
        income_band=income_band,
    )


def _draw_loans_before(opened: Ints, rate: Floats, rng: np.random.Generator) -> Ints:
    """Days of the last loans before the first day, as if the years before had gone like those that follow.

    A loan keeps `_readiness` low for the equivalent of `pause` days; then the next comes at about `rate` a day.
    """
    pause = 266.0
    pausing = rng.random(len(rate)) < pause * rate / (1 + pause * rate)
    ago = np.where(pausing, rng.uniform(0, pause, len(rate)), pause + rng.exponential(1 / rate))
    day = -np.ceil(ago).astype(np.int64)
    return np.where(day > opened, day, _NEVER)


def _choose(rng: np.random.Generator, shares: Floats) -> Ints:
    """One choice per row of `shares`."""
    return (rng.random(len(shares))[:, None] >= np.cumsum(shares, axis=1)[:, :-1]).sum(axis=1)


def _weekly_wave(latents: Latents, week_start: int) -> Floats:
    """Logarithm of the need relative to a customer's own level, in the week that starts at `week_start`."""
    angle = 2 * np.pi * week_start / latents.wave_period + latents.wave_phase
    return latents.wave_amplitude * np.sin(angle)


def _need(latents: Latents, wave: Floats) -> Floats:
    """P(interest begins by itself on a day), before the pause after a loan."""
    return np.minimum(latents.interest_rate * np.exp(wave), 0.2)


def _readiness(last_loan: Ints, offset: int) -> Floats:
    """How open a customer is to another loan: 0 just after one, nearly 1 a year and a half later."""
    return 1 - np.exp(-(((offset - last_loan) / 300.0) ** 2))


def _persuasion(need: Floats) -> Floats:
    """P(a viewed offer begins interest). Its square root: an offer also reaches those with little need."""
    return np.minimum(4.0 * np.sqrt(need), 0.6)


def _is_sent(latents: Latents, last_loan: Ints, offset: int) -> Flags:
    due = offset % latents.offer_every == latents.offer_day
    return due & latents.consent & (latents.opened + 30 <= offset) & (offset - last_loan >= _OFFER_PAUSE_DAYS)


def _view_probability(latents: Latents, fatigue: Floats) -> Floats:
    return latents.view_level * np.exp(-0.25 * fatigue)


def _fatigue_after(fatigue: Floats, sent: Flags) -> Floats:
    return (fatigue + sent) * np.exp(-1 / _FATIGUE_DAYS)


def _month_spent(day: date) -> Floats:
    """For each payday, how much of the month since is over: 0 on payday, nearly 1 on the day before."""
    length = calendar.monthrange(day.year, day.month)[1]
    return ((day.day - _PAYDAYS) % length) / length


def _uptake(latents: Latents, day: date, spent: Floats) -> Floats:
    """P(an interested customer takes up a loan on this day)."""
    return latents.uptake * _WEEKDAY[day.weekday()] * (0.7 + 0.6 * spent)


def _advance(latents: Latents, state: State, today: Today, rng: np.random.Generator) -> Steps:
    """One day of interest, offers and uptake. Changes `state`."""
    need = _need(latents, today.wave) * _readiness(state.last_loan, today.offset)
    is_sent = _is_sent(latents, state.last_loan, today.offset) & today.there
    sent = np.flatnonzero(is_sent)
    viewed = sent[rng.random(len(sent)) < _view_probability(latents, state.fatigue)[sent]]
    persuaded = viewed[rng.random(len(viewed)) < _persuasion(need)[viewed]]
    begins = rng.random(len(need)) < need
    begins[persuaded] = True
    begins &= today.there & ~state.interested

    interested = (state.interested | begins) & today.there
    keen = np.flatnonzero(interested)
    takes = rng.random(len(keen)) < _uptake(latents, today.day, today.spent)[keen]
    lapses = ~takes & (rng.random(len(keen)) < _LAPSE)
    state.interested = interested.copy()
    state.interested[keen[takes | lapses]] = False
    state.last_loan[keen[takes]] = today.offset
    state.fatigue = _fatigue_after(state.fatigue, is_sent)
    return Steps(sent, viewed, np.flatnonzero(begins), keen[takes], keen[lapses], interested)


def _history_of(offset: int, steps: Steps) -> pa.Table:
    parts = {_LOAN: steps.borrowed, _OFFER: steps.sent, _BEGIN: steps.begun}
    ended = np.concatenate([steps.borrowed, steps.lapsed])
    customers = np.concatenate([*parts.values(), ended])
    kinds = np.repeat([*parts, _END], [*(len(p) for p in parts.values()), len(ended)])
    return pa.table([np.full(len(customers), offset), customers, kinds], schema=_HISTORY)


def _state_at(latents: Latents, oracle: Path, start: int) -> State:
    """The state at the start of a day, from the history before it."""
    history = pq.read_table(oracle / "history.parquet", filters=[("day", "<", start)])
    day, customer, kind = (history[name].to_numpy() for name in ("day", "customer", "kind"))
    customers = len(latents.opened)
    begun, ended = (np.bincount(customer[kind == k], minlength=customers) for k in (_BEGIN, _END))
    last_loan = latents.loan_before.copy()
    np.maximum.at(last_loan, customer[kind == _LOAN], day[kind == _LOAN])
    sent = kind == _OFFER
    fatigue = np.zeros(customers)
    np.add.at(fatigue, customer[sent], np.exp(-(start - day[sent]) / _FATIGUE_DAYS))
    return State(begun > ended, last_loan, fatigue)


def _append_dirt(rng: np.random.Generator, size: int, *kinds: str) -> tuple[Ints, dict[str, Ints]]:
    """The rows to write, and per kind of dirt the places of its rows among them.

    Bad rows come on top of the good ones, as a faulty writer would add them: the truth stays the truth.
    """
    chosen = dirty_rows(rng, size, len(kinds))
    at = np.cumsum([size, *(len(rows) for rows in chosen)])
    places = {kind: np.arange(at[i], at[i + 1]) for i, kind in enumerate(kinds)}
    return np.concatenate([np.arange(size), *chosen]), places


def _draw_counts(rng: np.random.Generator, rates: Floats) -> Ints:
    """Independent Poisson counts as a list of positions: one Poisson total, allotted in proportion to the rates."""
    cumulative = np.cumsum(rates)
    return np.searchsorted(cumulative, rng.random(rng.poisson(cumulative[-1])) * cumulative[-1], "right")


def _write_balances(latents: Latents, today: Today, folder: Path, rng: np.random.Generator) -> None:
    """The fortnight's statement of those whose turn it is: balance, and days in overdraft."""
    who = np.flatnonzero(today.there & (today.offset % _STATEMENT_DAYS == latents.statement_day))
    n = len(who)
    pressure = today.wave[who] - _THRIFT * latents.thrift[who]
    in_overdraft = 1 / (1 + np.exp(2.3 - 1.8 * pressure))
    overdraft_days = rng.binomial(_STATEMENT_DAYS, in_overdraft)
    level = latents.income[who] + 0.3 - 0.9 * pressure - 0.8 * today.spent[who]
    balance = np.exp(level + rng.normal(0, 0.25, n)).astype(np.int64)
    balance[rng.random(n) < in_overdraft] = 0
    rows, places = _append_dirt(rng, n, "no_key", "no_time", "future", "negative", "twice")
    shown = balance[rows]
    shown[places["negative"]] = -1 - shown[places["negative"]]
    write_day(
        folder,
        today.day,
        {
            "customer_id": key_column(who[rows], places["no_key"]),
            "observed_at": time_column(day_times(rng, today.day, n)[rows], places["no_time"], places["future"]),
            "balance": pa.array(shown),
            "overdraft_days": pa.array(overdraft_days[rows]),
        },
    )


def _write_cards(latents: Latents, today: Today, folder: Path, next_card: int, rng: np.random.Generator) -> int:
    """Card payments; the log has those of 50 and more. Many after payday; more and larger when need is high."""
    rate = latents.card_level * np.exp(0.5 * today.wave) * (1.4 - 0.8 * today.spent)
    who = _draw_counts(rng, rate * today.there)
    n = len(who)
    large = rng.random(n) < np.clip(0.15 + 0.15 * today.wave[who], 0.02, 0.5)
    merchant = rng.choice(len(MERCHANTS), n, p=_MERCHANT_SHARE)
    merchant[large] = rng.choice(_LARGE_PURCHASES, n)[large]
    size = np.exp(3.2 + 0.4 * (latents.income[who] - 7.6) + 1.6 * large + rng.normal(0, 0.7, n))
    rows, places = _append_dirt(rng, n, "no_key", "no_time", "future", "negative", "infinite", "twice", "same_id")
    amounts = np.round(50 + size, 2)[rows]
    amounts[places["negative"]] *= -1
    amounts[places["infinite"]] = np.inf
    amounts[places["same_id"]] += 1.0
    write_day(
        folder,
        today.day,
        {
            "transaction_id": pa.array(np.arange(next_card, next_card + n)[rows]),
            "customer_id": key_column(who[rows], places["no_key"]),
            "paid_at": time_column(day_times(rng, today.day, n)[rows], places["no_time"], places["future"]),
            "amount": pa.array(amounts),
            "merchant_category": pa.array(MERCHANTS[merchant[rows]]),
        },
    )
    return n


def _write_contacts(latents: Latents, today: Today, steps: Steps, folder: Path, rng: np.random.Generator) -> None:
    """Log-ins to the app, loan pages opened, branch visits and calls. A loan is taken up on its page."""
    new = 1 + np.exp(-np.maximum(today.offset - latents.opened, 0) / 45.0)
    app = latents.app_level * new * (1 + 1.5 * steps.keen)
    page = latents.page_level * np.where(steps.keen, 0.75, 0.6 * _need(latents, today.wave))
    branch = latents.branch_level * (1 + 2.0 * steps.keen)
    rates = np.stack([app, page, branch, 0.6 * branch]) * today.there
    found = _draw_counts(rng, rates.ravel())
    customers = np.concatenate([found % len(today.there), steps.borrowed])
    kinds = np.concatenate([found // len(today.there), np.ones(len(steps.borrowed), dtype=np.int64)])
    n = len(customers)
    rows, places = _append_dirt(rng, n, "no_key", "no_time", "future", "unknown", "twice")
    shown = CONTACTS[kinds[rows]].astype(object)
    shown[places["unknown"]] = "fax"
    write_day(
        folder,
        today.day,
        {
            "customer_id": key_column(customers[rows], places["no_key"]),
            "contacted_at": time_column(day_times(rng, today.day, n)[rows], places["no_time"], places["future"]),
            "kind": pa.array(shown, pa.string()),
        },
    )


def _write_offers(today: Today, steps: Steps, folder: Path, rng: np.random.Generator) -> None:
    """Offers sent and viewed. Some of those whom a viewed offer leaves cold decline it."""
    cold = steps.viewed[~steps.keen[steps.viewed]]
    declined = cold[rng.random(len(cold)) < 0.3]
    customers = np.concatenate([steps.sent, steps.viewed, declined])
    events = np.repeat(["sent", "viewed", "declined"], [len(steps.sent), len(steps.viewed), len(declined)])
    n = len(customers)
    rows, places = _append_dirt(rng, n, "no_key", "no_time", "unknown", "twice")
    shown = events[rows].astype(object)
    shown[places["unknown"]] = "returned"
    write_day(
        folder,
        today.day,
        {
            "customer_id": key_column(customers[rows], places["no_key"]),
            "sent_at": time_column(day_times(rng, today.day, n)[rows], places["no_time"], np.arange(0)),
            "event": pa.array(shown, pa.string()),
        },
    )


def _write_loans(
    latents: Latents, today: Today, borrowed: Ints, folder: Path, next_loan: int, rng: np.random.Generator
) -> int:
    n = len(borrowed)
    size = latents.income[borrowed] + 1.3 + 0.2 * today.wave[borrowed] + rng.normal(0, 0.5, n)
    product = _choose(rng, _PRODUCT_BY_HOUSING[latents.housing[borrowed]])
    rows, places = _append_dirt(rng, n, "no_key", "no_time", "future", "negative", "infinite", "twice", "same_id")
    amounts = (100 * np.round(np.exp(size) / 100 + 5))[rows]
    amounts[places["negative"]] *= -1
    amounts[places["infinite"]] = np.inf
    amounts[places["same_id"]] += 100.0
    write_day(
        folder,
        today.day,
        {
            "loan_id": pa.array(np.arange(next_loan, next_loan + n)[rows]),
            "customer_id": key_column(borrowed[rows], places["no_key"]),
            "taken_up_at": time_column(day_times(rng, today.day, n)[rows], places["no_time"], places["future"]),
            "amount": pa.array(amounts),
            "product": pa.array(PRODUCTS[product[rows]]),
        },
    )
    return n


def _write_customers(config: WorldConfig, latents: Latents, file: Path, rng: np.random.Generator) -> None:
    n = config.customers
    opened = np.datetime64(config.first_day, "s") + (latents.opened * 86_400).astype("timedelta64[s]")
    opened = np.datetime_as_string(opened + rng.integers(0, 86_400, n).astype("timedelta64[s]"))
    income = INCOME_BANDS[latents.income_band].astype(object)
    income[rng.random(n) < 0.06] = ""
    columns = [
        np.arange(1, n + 1),
        opened,
        income,
        EMPLOYMENT[latents.employment],
        HOUSING[latents.housing],
        REGIONS[latents.region],
        GENDERS[latents.gender],
        AGE_BANDS[latents.age_band],
        NATIONALITY_GROUPS[latents.nationality_group],
    ]
    header = ["customer_id", "opened_at", "income_band", "employment", "housing", "region"]
    person = ["middle", "employed", "tenant", "west", "female", "30-44", "domestic"]
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow([*header, "gender", "age_band", "nationality_group"])
        writer.writerows(zip(*columns, strict=True))
        # One of each kind of dirt: added rows, so that the good customer stays.
        writer.writerow(["", "2024-05-01T10:00:00", *person])
        writer.writerow([n + 1, "not a date", *person])
        writer.writerow([n + 2, "", *person])
        writer.writerow([n + 3, "2099-06-02T10:00:00", *person])
        writer.writerow([1, "2025-08-30T10:00:00", *person])
        writer.writerow([column[-1] for column in columns])
