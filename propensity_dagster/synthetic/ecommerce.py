"""A web shop: customers, orders, web visits and e-mails, with true order probabilities.

The model of the world, so that it can be judged:

- Visits of customer i on day d are Poisson. Their rate is a customer's own level times a slow wave
  (period 300 to 700 days, constant within a week), a burst after sign-up, the weekday and the season.
- A visit becomes an order with the customer's own conversion probability, which also shows in the pages seen.
- E-mails follow a fixed plan. Opening falls with the months on the list and with their frequency
  (fatigue); a click is a visit, half again as likely to become an order.
- Customers drop out for good at a constant daily hazard that depends on the channel.

Given the latent state at t (level, conversion, wave, plan, still there or not), the only unknowns of the
next 30 days are the dropout day and independent Poisson and Bernoulli draws, so the probability of at
least one order has the closed form of `true_probability`.
"""

import csv
import logging
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
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

CHANNELS = np.array(["search", "social", "email", "referral", "direct"])
_CHANNEL_SHARE = np.array([0.34, 0.24, 0.12, 0.10, 0.20])
_CHANNEL_VISITS = np.array([0.0, -0.35, 0.25, 0.15, 0.30])
_CHANNEL_CONVERSION = np.array([0.10, -0.45, 0.15, 0.35, 0.10])
_CHANNEL_HAZARD = np.array([1.0, 1.7, 0.8, 0.6, 0.8]) / 5000
COUNTRIES = np.array(["DE", "FR", "GB", "NL", "ES", "IT"])
_COUNTRY_SHARE = np.array([0.30, 0.20, 0.20, 0.10, 0.12, 0.08])
_COUNTRY_SPEND = np.array([0.05, 0.0, 0.10, 0.05, -0.10, -0.05])
CATEGORIES = np.array(["fashion", "home", "sports", "beauty", "toys", "electronics"])
_CATEGORY_SHARE = np.array([0.30, 0.20, 0.16, 0.14, 0.12, 0.08])
_WEEKDAY = np.array([1.02, 0.98, 0.96, 0.97, 0.95, 1.03, 1.09])

OUTCOME_TABLE = "orders"

_DAYS_BEFORE = 720  # sign-ups reach this far back before the first day
_CLICK_BOOST = 1.5
_TYPICAL_CONVERSION = 0.008
_BAD_DAYS = 3  # that come twice, or late
_CHANGED_CONCEPT = 0.2  # about as many orders as before


@dataclass(frozen=True)
class Latents:
    """What drives each customer; one array entry per customer. Days count from the world's first day."""

    signup: Ints
    dropout: Ints
    hazard: Floats
    visit_level: Floats
    conversion: Floats
    wave_amplitude: Floats
    wave_period: Floats
    wave_phase: Floats
    consent: NDArray[np.bool_]
    mail_weekday: Ints
    mails_per_week: Floats
    open_level: Floats
    click_level: Floats
    spend_level: Floats
    favourite: Ints
    channel: Ints
    country: Ints
    age: Ints


def generate(config: WorldConfig, tables: Path, oracle: Path) -> None:
    """Write customers.csv and one parquet file per day of orders, web_visits and emails; latents to `oracle`.

    Memory is a few arrays of one number per customer, plus one day's events.
    """
    rng = np.random.default_rng(config.seed)
    latents = _draw_latents(config, rng)
    tables.mkdir(parents=True)
    _write_customers(config, latents, tables / "customers.csv", rng)
    _write_consents(config, tables / "consents.parquet")
    for kind, start in config.trouble:
        if kind == "population":
            latents = _with_newcomers(config, latents, start, tables / "customers.csv")
    pq.write_table(pa.table(vars(latents)), oracle / "latents.parquet")
    next_order = 1
    rate = np.zeros(len(latents.signup))
    for offset in range(config.days):
        day = config.first_day + timedelta(days=offset)
        if offset % 7 == 0:
            rate = _weekly_visit_rate(latents, offset)
            if offset % 91 == 0:
                logger.info("synthetic ecommerce: %s (day %d of %d)", day, offset, config.days)
        next_order = _write_day(config, latents, rate, offset, day, tables, rng, next_order)


def true_probability(
    config: WorldConfig, oracle: Path, snapshot: date, horizon_days: int
) -> tuple[NDArray[np.str_], Floats]:
    """P(at least one order in [snapshot, snapshot + horizon)) given the latent state at the snapshot.

    With no-order probability s_d of day d for a customer who is still there, and daily dropout hazard h,
    P(no order) = sum over d of (prod_{e<d} s_e (1-h)) h + prod_d s_d (1-h): dropout happens at the start
    of a day. Customers not yet signed up or already gone get 0.
    """
    table = pq.read_table(oracle / "latents.parquet")
    latents = Latents(**{name: table[name].to_numpy() for name in table.column_names})
    start = config.offset(snapshot)
    silent = np.ones(len(latents.signup))  # still there, no order yet
    gone = np.zeros(len(latents.signup))  # dropped out before any order
    rate = np.zeros(len(latents.signup))
    for step in range(horizon_days):
        offset = start + step
        if step == 0 or offset % 7 == 0:
            rate = _weekly_visit_rate(latents, offset - offset % 7)
        gone += silent * latents.hazard
        silent *= (1 - latents.hazard) * _no_order(config, latents, rate, offset)
    probability = 1 - silent - gone
    known = (latents.signup < start) & (latents.dropout >= start)
    keys = np.arange(1, len(latents.signup) + 1).astype(np.str_)
    return keys, np.where(known, probability, 0.0)


def _draw_latents(config: WorldConfig, rng: np.random.Generator) -> Latents:
    n = config.customers
    channel = rng.choice(len(CHANNELS), n, p=_CHANNEL_SHARE)
    country = rng.choice(len(COUNTRIES), n, p=_COUNTRY_SHARE)
    age = np.clip(rng.normal(41, 14, n), 18, 90).astype(np.int64)
    signup = rng.integers(-_DAYS_BEFORE, config.days, n)
    hazard = _CHANNEL_HAZARD[channel] * np.exp(rng.normal(-0.125, 0.5, n))
    # Those who had gone long before the first day would only be dead weight: everybody is there at the start.
    dropout = np.maximum(signup, 0) + rng.geometric(hazard) - 1
    age_effect = -0.5 * ((age - 38) / 22.0) ** 2
    level = np.exp(-3.05 + _CHANNEL_VISITS[channel] + rng.normal(0, 1.3, n))
    conversion = np.exp(-4.75 + _CHANNEL_CONVERSION[channel] + age_effect + rng.normal(0, 0.27, n))
    return Latents(
        signup=signup,
        dropout=dropout,
        hazard=hazard,
        visit_level=level,
        conversion=np.minimum(conversion, 0.5),
        wave_amplitude=rng.uniform(0.05, 0.4, n),
        wave_period=rng.uniform(300, 700, n),
        wave_phase=rng.uniform(0, 2 * np.pi, n),
        consent=rng.random(n) < 0.35,
        mail_weekday=rng.integers(0, 7, n),
        mails_per_week=rng.choice([0.5, 1.0, 2.0], n, p=[0.5, 0.4, 0.1]),
        open_level=rng.beta(2.2, 4.0, n),
        click_level=rng.beta(1.5, 8.0, n),
        spend_level=3.7 + _COUNTRY_SPEND[country] + rng.normal(0, 0.45, n),
        favourite=rng.choice(len(CATEGORIES), n, p=_CATEGORY_SHARE),
        channel=channel,
        country=country,
        age=age,
    )


def _with_newcomers(config: WorldConfig, latents: Latents, start: date, customers: Path) -> Latents:
    """As many customers again as there are half, all of one kind, who sign up within two weeks from `start`."""
    rng = np.random.default_rng([config.seed, 1])
    more = _draw_latents(WorldConfig(config.customers // 2, config.seed, config.days, config.first_day), rng)
    n = len(more.signup)
    signup = config.offset(start) + rng.integers(0, 14, n)
    changed = {
        "signup": signup,
        "dropout": signup + rng.geometric(more.hazard) - 1,
        "channel": np.full(n, int(np.flatnonzero(CHANNELS == "social")[0])),
        "country": np.full(n, int(np.flatnonzero(COUNTRIES == "IT")[0])),
        "age": rng.integers(18, 26, n),
    }
    added = {**vars(more), **changed}
    at = np.datetime64(config.first_day, "s") + (signup * 86_400).astype("timedelta64[s]")
    with customers.open("a", newline="", encoding="utf-8") as handle:
        keys = np.arange(len(latents.signup) + 1, len(latents.signup) + n + 1)
        columns = [keys, np.datetime_as_string(at), changed["age"], ["IT"] * n, ["social"] * n]
        csv.writer(handle).writerows(zip(*columns, strict=True))
    return Latents(**{name: np.concatenate([values, added[name]]) for name, values in vars(latents).items()})


def _conversion(config: WorldConfig, latents: Latents, day: date) -> Floats:
    """P(order) of a visit. When the concept changes, whoever comes often no longer buys more than who comes rarely."""
    if config.days_of("concept", day) is None:
        return latents.conversion
    return np.minimum(_CHANGED_CONCEPT * _TYPICAL_CONVERSION / latents.visit_level, 0.5)


def _weekly_visit_rate(latents: Latents, week_start: int) -> Floats:
    """Visits a day in the week that starts at `week_start`, before weekday and season."""
    angle = 2 * np.pi * week_start / latents.wave_period + latents.wave_phase
    burst = 1 + 1.5 * np.exp(-np.maximum(week_start - latents.signup, 0) / 30.0)
    return latents.visit_level * np.exp(latents.wave_amplitude * np.sin(angle)) * burst


def _calendar(config: WorldConfig, offset: int) -> float:
    day = config.first_day + timedelta(days=offset)
    yearly = 1 + 0.06 * np.cos(2 * np.pi * (day.timetuple().tm_yday - 330) / 365.25)
    festive = 1.18 if (day.month, day.day) >= (11, 20) and (day.month, day.day) <= (12, 22) else 1.0
    return float(yearly * festive * _WEEKDAY[day.weekday()])


def _is_mailed(config: WorldConfig, latents: Latents, offset: int) -> NDArray[np.bool_]:
    weekday = (config.first_day + timedelta(days=offset)).weekday()
    even_week = (offset // 7) % 2 == 0
    weekly = (latents.mail_weekday == weekday) & ((latents.mails_per_week >= 1) | even_week)
    second = ((latents.mail_weekday + 3) % 7 == weekday) & (latents.mails_per_week == 2)
    return latents.consent & (weekly | second) & (latents.signup <= offset)


def _open_probability(latents: Latents, offset: int) -> Floats:
    months = np.maximum(offset - latents.signup, 0) / 30.44
    fatigue = np.exp(-months / 30.0) * np.where(latents.mails_per_week == 2, 0.75, 1.0)
    return latents.open_level * fatigue


def _no_order(config: WorldConfig, latents: Latents, rate: Floats, offset: int) -> Floats:
    """P(no order on one day) of a customer who is still there."""
    conversion = _conversion(config, latents, config.first_day + timedelta(days=offset))
    organic = np.exp(-rate * _calendar(config, offset) * conversion)
    clicked = _is_mailed(config, latents, offset) * _open_probability(latents, offset) * latents.click_level
    return organic * (1 - clicked * np.minimum(_CLICK_BOOST * conversion, 1.0))


def _write_day(
    config: WorldConfig,
    latents: Latents,
    rate: Floats,
    offset: int,
    day: date,
    tables: Path,
    rng: np.random.Generator,
    next_order: int,
) -> int:
    there = (latents.signup <= offset) & (latents.dropout > offset)
    daily = np.where(there, rate, 0.0) * _calendar(config, offset)
    cumulative = np.cumsum(daily)
    # Independent Poisson counts: one Poisson total, allotted in proportion to the rates.
    browsing = np.searchsorted(cumulative, rng.random(rng.poisson(cumulative[-1])) * cumulative[-1], "right")

    mailed = np.flatnonzero(_is_mailed(config, latents, offset))
    opens = rng.random(len(mailed)) < _open_probability(latents, offset)[mailed]
    opened = mailed[opens & there[mailed]]
    clicked = opened[rng.random(len(opened)) < latents.click_level[opened]]

    visitors = np.concatenate([browsing, clicked])
    boost = np.concatenate([np.ones(len(browsing)), np.full(len(clicked), _CLICK_BOOST)])
    conversion = _conversion(config, latents, day)[visitors]
    buys = rng.random(len(visitors)) < np.minimum(boost * conversion, 1.0)
    visit_times = day_times(rng, day, len(visitors))
    tell = partial(_tell, config, tables)
    tell("web_visits", day, _visits(latents, visitors, visit_times, buys, rng))
    tell("emails", day, _emails(day, mailed, opened, clicked, rng))
    buyers = visitors[buys]
    tell("orders", day, _orders(latents, buyers, visit_times[buys], next_order, rng))
    return next_order + len(buyers)


def _tell(config: WorldConfig, tables: Path, table: str, day: date, columns: dict[str, pa.Array]) -> None:
    """Write a day of a table, with whatever is wrong with it by then. A file holds what arrived on its day."""
    if "pages" in columns and config.days_of("units", day) is not None:
        columns["pages"] = pa.array(columns["pages"].to_numpy() * 100)
    if "pages" in columns and config.days_of("missing", day) is not None:
        columns["pages"] = pa.nulls(len(columns["pages"]), pa.int64())
    if table == "emails" and config.days_of("emails", day) is not None:
        return
    arrives = day
    since = config.days_of("late", day)
    if since is not None and since < _BAD_DAYS:
        arrives = day + timedelta(days=7)
    if table == "orders" and config.days_of("label_delay", day) is not None:
        arrives = day + timedelta(days=14)
    if arrives > config.last_day:
        return
    write_day(tables / table, arrives, columns)
    since = config.days_of("duplicates", day)
    if since is not None and since < _BAD_DAYS:
        write_day(tables / table, arrives, columns)


def _orders(
    latents: Latents, buyers: Ints, times: NDArray[np.datetime64], next_order: int, rng: np.random.Generator
) -> dict[str, pa.Array]:
    amounts = np.round(np.exp(latents.spend_level[buyers] + rng.normal(0, 0.5, len(buyers))), 2)
    loyal = rng.random(len(buyers)) < 0.6
    other = rng.choice(len(CATEGORIES), len(buyers), p=_CATEGORY_SHARE)
    categories = CATEGORIES[np.where(loyal, latents.favourite[buyers], other)]
    ids = np.arange(next_order, next_order + len(buyers))
    no_key, no_time, future, negative, infinite, twice, same_id = dirty_rows(rng, len(buyers), 7)
    # Bad rows come on top of the good ones, as a faulty writer would add them: the truth stays the truth.
    bad = np.concatenate([no_key, no_time, future, negative, infinite, twice, same_id])
    rows = np.concatenate([np.arange(len(buyers)), bad])
    start = len(buyers)
    at = np.cumsum([start, *(len(k) for k in (no_key, no_time, future, negative, infinite, twice, same_id))])
    spans = [np.arange(at[i], at[i + 1]) for i in range(7)]
    values = amounts[rows]
    values[spans[3]] *= -1
    values[spans[4]] = np.inf
    values[spans[6]] += 1.0
    return {
        "order_id": pa.array(ids[rows]),
        "customer_id": key_column(buyers[rows], spans[0]),
        "ordered_at": time_column(times[rows], spans[1], spans[2]),
        "amount": pa.array(values),
        "category": pa.array(categories[rows]),
    }


def _visits(
    latents: Latents,
    visitors: Ints,
    times: NDArray[np.datetime64],
    buys: NDArray[np.bool_],
    rng: np.random.Generator,
) -> dict[str, pa.Array]:
    n = len(visitors)
    # Those who convert more often look deeper on every visit: their interest can be seen before they buy.
    depth = 2.5 * latents.conversion[visitors] / _TYPICAL_CONVERSION
    pages = 1 + rng.poisson(depth + 3 * buys)
    seconds = np.round(pages * rng.lognormal(3.0, 0.6, n)).astype(np.int64)
    no_key, no_time, negative, twice = dirty_rows(rng, n, 4)
    rows = np.concatenate([np.arange(n), no_key, no_time, negative, twice])
    at = np.cumsum([n, len(no_key), len(no_time), len(negative)])
    shown = pages[rows]
    shown[at[2] : at[3]] *= -1
    return {
        "customer_id": key_column(visitors[rows], np.arange(at[0], at[1])),
        "visited_at": time_column(times[rows], np.arange(at[1], at[2]), np.arange(0)),
        "pages": pa.array(shown),
        "seconds": pa.array(seconds[rows]),
    }


def _emails(day: date, mailed: Ints, opened: Ints, clicked: Ints, rng: np.random.Generator) -> dict[str, pa.Array]:
    customers = np.concatenate([mailed, opened, clicked])
    events = np.repeat(["sent", "open", "click"], [len(mailed), len(opened), len(clicked)])
    n = len(customers)
    no_key, unknown, twice = dirty_rows(rng, n, 3)
    rows = np.concatenate([np.arange(n), no_key, unknown, twice])
    shown = events[rows].astype(object)
    shown[n + len(no_key) : n + len(no_key) + len(unknown)] = "bounced"
    times = day_times(rng, day, n)
    return {
        "customer_id": key_column(customers[rows], np.arange(n, n + len(no_key))),
        "sent_at": pa.array(times[rows]),
        "event": pa.array(shown, pa.string()),
    }


def _write_consents(config: WorldConfig, file: Path) -> None:
    """Who agreed to be written to: most; some refused, a few were never asked. Says nothing about the chances."""
    rng = np.random.default_rng([config.seed, 2])
    asked = np.flatnonzero(rng.random(config.customers) < 0.97)
    granted = rng.random(len(asked)) < 0.92
    pq.write_table(pa.table({"customer_id": asked + 1, "granted": granted}), file, compression="zstd")


def _write_customers(config: WorldConfig, latents: Latents, file: Path, rng: np.random.Generator) -> None:
    n = config.customers
    signup = np.datetime64(config.first_day, "s") + (latents.signup * 86_400).astype("timedelta64[s]")
    signup = np.datetime_as_string(signup + rng.integers(0, 86_400, n).astype("timedelta64[s]"))
    ages = latents.age.astype(np.str_).astype(object)
    ages[rng.random(n) < 0.06] = ""
    columns = [np.arange(1, n + 1), signup, ages, COUNTRIES[latents.country], CHANNELS[latents.channel]]
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["customer_id", "signup_at", "age", "country", "channel"])
        writer.writerows(zip(*columns, strict=True))
        # One of each kind of dirt: added rows, so that the good customer stays.
        writer.writerow(["", "2024-05-01T10:00:00", 44, "DE", "search"])
        writer.writerow([n + 1, "not a date", 31, "FR", "social"])
        writer.writerow([n + 2, "2024-06-01T10:00:00", 999, "GB", "direct"])
        writer.writerow([n + 3, "2024-06-02T10:00:00", "thirty", "NL", "direct"])
        writer.writerow([1, "2025-08-30T10:00:00", 31, "FR", "social"])
        writer.writerow([column[-1] for column in columns])
