"""A charity that writes to its contacts: newsletters, appeals, responses, and a randomised treatment.

The model of the world, so that it can be judged:

- Everybody gets the newsletter, by a fixed plan. Appeals also follow a fixed plan, in waves that each have a
  topic, but only the treated get them: half of the contacts, drawn at adding, independently of everything.
- Without an appeal contact i responds at a Poisson rate: an own level times a slow wave (period 300 to 700
  days, constant within a week) and the season. A click on a newsletter can be answered as well.
- An appeal adds responses, most on its day and fewer on each day after: the contact's persuasion, more when
  the topic is the true interest, less when earlier appeals have made tired. It also takes responses away: a
  share, the annoyance, of what would have come anyway. A click on an appeal can be answered as well.
- So there are four kinds of contact. Persuadables have much persuasion; sure things a high level; lost causes
  a low one; sleeping dogs a high annoyance. Source, age and household say in part who is what, and the logs
  say more: how often newsletters are opened and how long they are read follows the level, their clicks also
  persuasion less annoyance; and so do opens, reading time and clicks of appeals, which only the treated get.
- Contacts leave for good at a constant daily hazard that depends on the source. Most say so and are written to
  no more; the others just fall silent. Nobody leaves because of an appeal, and what is opened, read and
  clicked of newsletters does not depend on the arm.

Given the latent state at t (level, persuasion, annoyance, wave, plan, still there or not), the only unknowns
of the next 30 days are the day of leaving and independent Poisson and Bernoulli draws, so the probability of
at least one response has the closed form of `true_probability`. A response changes nothing for later days.
The state is therefore the same whatever the arm was before, and `true_effect` knows both potential outcomes.

A newsletter comes every week or two, so that what its clicks say of persuasion is nearly all there is to learn of an
effect: LightGBM that learns from the true effects themselves has 89% of their Qini, by the features of the shipped
campaign.
"""

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
    MICROSECONDS_PER_DAY,
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
Times = NDArray[np.datetime64]

OUTCOME_TABLE = "responses"

ARMS = np.array(["control", "treated"])
KINDS = np.array(["persuadable", "sure_thing", "lost_cause", "sleeping_dog"])
SOURCES = np.array(["website", "street", "event", "friend", "bought_list"])
_SOURCE_SHARE = np.array([0.32, 0.22, 0.14, 0.10, 0.22])
_SOURCE_HAZARD = np.array([1.0, 1.5, 0.8, 0.6, 1.3]) / 7000
REGIONS = np.array(["north", "south", "east", "west", "abroad"])
_REGION_SHARE = np.array([0.25, 0.30, 0.15, 0.25, 0.05])
_REGION_LEVEL = np.array([0.1, 0.0, -0.15, 0.1, -0.3])
HOUSEHOLDS = np.array(["single", "couple", "family"])
_HOUSEHOLD_SHARE = np.array([0.40, 0.33, 0.27])
TOPICS = np.array(["children", "animals", "climate", "health"])
_TOPIC_SHARE = np.array([0.34, 0.26, 0.20, 0.20])
_WEEKDAY = np.array([1.06, 1.05, 1.02, 1.0, 0.96, 0.92, 0.99])

# Kinds of contact: how frequent (log-odds), by source and household; the level without any appeal (responses a
# day); and what an appeal does. In the order of KINDS.
_KIND_LOG_ODDS = np.array([-0.55, -1.55, 0.25, -1.25])
_KIND_BY_SOURCE = np.array(
    [
        [0.7, 0.1, -0.2, -0.3],
        [0.3, -0.6, 0.2, 0.5],
        [0.0, 0.7, -0.4, 0.2],
        [-0.2, 1.2, -0.7, -0.3],
        [-0.8, -1.0, 0.9, 0.2],
    ]
)
_KIND_BY_HOUSEHOLD = np.array([[0.4, 0.0, 0.0, -0.7], [0.1, 0.4, -0.1, -0.3], [-0.7, -0.3, 0.2, 0.9]])
_KIND_BY_DECADE = np.array([0.10, 0.30, -0.15, -0.20])  # of age above 48
_KIND_LEVEL = np.log(np.array([0.011, 0.085, 0.005, 0.046]) / 30)
_KIND_PERSUASION = np.log(np.array([0.0055, 0.0012, 0.0003, 0.0002]))
_KIND_ANNOYANCE = np.array([0.02, 0.08, 0.05, 0.75])  # means of a beta distribution

_DAYS_BEFORE = 720  # contacts were added this far back before the first day
_TREATED_SHARE = 0.5
_TYPICAL_LEVEL = -7.2  # logarithms: where opening is neither frequent nor rare
_TYPICAL_PERSUASION = -6.2
_MATCH = 1.4  # a topic of interest, and any other
_NO_MATCH = 0.85
_FADES_EMAIL, _FADES_LETTER, _FADES_ANNOYANCE = 7.0, 14.0, 45.0  # days
_TIRED_DAYS = 90.0
_TIRES = 0.12  # of an appeal's effect, per earlier appeal
_READ_SECONDS = 20.0  # typical, of an opened message
_ANSWERS = 22.0  # chance that a click is answered: this many days of level or persuasion
_HAND_KEYED = 3  # responses are typed in from reply slips: so many times as dirty as a log


@dataclass(frozen=True)
class Latents:
    """What drives each contact; one array entry per contact. Days count from the world's first day."""

    added: Ints
    left: Ints
    hazard: Floats
    says_so: Flags
    treated: Flags
    kind: Ints
    level: Floats
    persuasion: Floats
    annoyance: Floats
    wave_amplitude: Floats
    wave_period: Floats
    wave_phase: Floats
    by_letter: Flags
    news_every: Ints
    news_phase: Ints
    appeal_every: Ints
    appeal_phase: Ints
    news_open: Floats
    news_click: Floats
    appeal_open: Floats
    appeal_click: Floats
    news_care: Floats
    appeal_care: Floats
    amount_level: Floats
    interest: Ints
    declares: Flags
    source: Ints
    region: Ints
    household: Ints
    age: Ints


@dataclass(frozen=True)
class Mailing:
    """One day's newsletter or appeal: to whom, and the chances of an open, then a click, then an answer.

    `care` multiplies the seconds an opened one is read; it says nothing about the chances.
    """

    name: str
    topic: int
    sent: Flags
    by_letter: Flags
    opens: Floats
    clicks: Floats
    answers: Floats
    care: Floats


@dataclass(frozen=True)
class Chances:
    """All that can happen on one day to a contact who is still there: a Poisson rate, and two mailings."""

    rate: Floats
    mailings: tuple[Mailing, Mailing]

    @property
    def silence(self) -> Floats:
        """P(no response on this day)."""
        none = np.exp(-self.rate)
        for mail in self.mailings:
            none *= 1 - mail.sent * mail.opens * mail.clicks * mail.answers
        return none


def generate(config: WorldConfig, tables: Path, oracle: Path) -> None:
    """Write contacts.csv, assignments.parquet, and per day a file of messages and responses; latents to `oracle`.

    Memory is a few arrays of one number per contact, plus one day's events.
    """
    rng = np.random.default_rng(config.seed)
    latents = _draw_latents(config, rng)
    tables.mkdir(parents=True)
    pq.write_table(pa.table(vars(latents)), oracle / "latents.parquet")
    _write_contacts(config, latents, tables, rng)
    next_response = 1
    attention = np.ones(config.customers)
    for offset in range(config.days):
        day = config.first_day + timedelta(days=offset)
        if offset % 7 == 0:
            attention = _attention(latents, offset)
            if offset % 91 == 0:
                logger.info("synthetic outreach: %s (day %d of %d)", day, offset, config.days)
        chances = _chances(config, latents, latents.treated, attention, offset)
        next_response = _write_day(latents, chances, offset, day, tables, rng, next_response)


def true_probability(
    config: WorldConfig, oracle: Path, snapshot: date, horizon_days: int
) -> tuple[NDArray[np.str_], Floats]:
    """P(at least one response in [snapshot, snapshot + horizon)) given the latent state, each contact in its arm."""
    latents = _read_latents(oracle)
    return _keys(config), _probability(config, latents, latents.treated, snapshot, horizon_days)


def true_effect(
    config: WorldConfig, oracle: Path, snapshot: date, horizon_days: int
) -> tuple[NDArray[np.str_], Floats, Floats]:
    """Keys, P(response) in the treated arm and P(response) in the control arm, as in `true_probability`.

    Both are for a contact who was in that arm since adding. The difference is the contact's true effect.
    """
    latents = _read_latents(oracle)
    treated, control = (
        _probability(config, latents, np.full(config.customers, arm), snapshot, horizon_days) for arm in (True, False)
    )
    return _keys(config), treated, control


def _probability(config: WorldConfig, latents: Latents, treated: Flags, snapshot: date, horizon_days: int) -> Floats:
    """P(at least one response in the window), if the arms were `treated`.

    With silence s_d of day d for a contact who is still there, and daily hazard h of leaving,
    P(no response) = sum over d of (prod_{e<d} s_e (1-h)) h + prod_d s_d (1-h): leaving happens at the start
    of a day. Contacts not yet added or already gone get 0.
    """
    start = config.offset(snapshot)
    silent = np.ones(config.customers)  # still there, no response yet
    gone = np.zeros(config.customers)  # left before any response
    attention = np.ones(config.customers)
    for step in range(horizon_days):
        offset = start + step
        if step == 0 or offset % 7 == 0:
            attention = _attention(latents, offset - offset % 7)
        gone += silent * latents.hazard
        silent *= (1 - latents.hazard) * _chances(config, latents, treated, attention, offset).silence
    known = (latents.added < start) & (latents.left >= start)
    return np.where(known, 1 - silent - gone, 0.0)


def _keys(config: WorldConfig) -> NDArray[np.str_]:
    return np.arange(1, config.customers + 1).astype(np.str_)


def _read_latents(oracle: Path) -> Latents:
    table = pq.read_table(oracle / "latents.parquet")
    return Latents(**{name: table[name].to_numpy() for name in table.column_names})


def _draw_latents(config: WorldConfig, rng: np.random.Generator) -> Latents:
    n = config.customers
    source = rng.choice(len(SOURCES), n, p=_SOURCE_SHARE)
    region = rng.choice(len(REGIONS), n, p=_REGION_SHARE)
    household = rng.choice(len(HOUSEHOLDS), n, p=_HOUSEHOLD_SHARE)
    age = np.clip(rng.normal(48, 16, n), 18, 95).astype(np.int64)
    kind = _draw_kinds(source, household, age, rng)
    level = _KIND_LEVEL[kind] + _REGION_LEVEL[region] + rng.normal(0, 0.5, n)
    persuasion = _KIND_PERSUASION[kind] + rng.normal(0, 0.4, n)
    annoyance = rng.beta(8 * _KIND_ANNOYANCE[kind], 8 * (1 - _KIND_ANNOYANCE[kind]))
    added = rng.integers(-_DAYS_BEFORE, config.days, n)
    hazard = _SOURCE_HAZARD[source] * np.exp(rng.normal(-0.125, 0.5, n))
    news_every = rng.choice([7, 14], n, p=[0.75, 0.25])
    appeal_every = rng.choice([21, 35, 63], n, p=[0.4, 0.45, 0.15])
    # Liking what is sent shows before there is a response: in opens, seconds and clicks.
    liking = level - _TYPICAL_LEVEL
    openness = persuasion - _TYPICAL_PERSUASION - 2.0 * annoyance
    return Latents(
        added=added,
        # Those who had left long before the first day would only be dead weight: everybody is there at the start.
        left=np.maximum(added, 0) + rng.geometric(hazard) - 1,
        hazard=hazard,
        says_so=rng.random(n) < 0.7,
        treated=rng.random(n) < _TREATED_SHARE,
        kind=kind,
        level=np.exp(level),
        persuasion=np.exp(persuasion),
        annoyance=annoyance,
        wave_amplitude=rng.uniform(0.05, 0.25, n),
        wave_period=rng.uniform(300, 700, n),
        wave_phase=rng.uniform(0, 2 * np.pi, n),
        by_letter=rng.random(n) < 0.12,
        news_every=news_every,
        news_phase=rng.integers(0, 28, n) % news_every,
        appeal_every=appeal_every,
        appeal_phase=7 * rng.integers(0, appeal_every // 7) + rng.integers(0, 5, n),
        news_open=_chance(1.6 * liking + rng.normal(0, 0.15, n)),
        news_click=_chance(-1.0 + 0.7 * liking + 1.3 * openness + rng.normal(0, 0.15, n)),
        appeal_open=_chance(0.3 * liking + 1.4 * openness + rng.normal(0, 0.15, n)),
        appeal_click=_chance(-0.5 + 0.3 * liking + 1.0 * openness + rng.normal(0, 0.15, n)),
        news_care=np.exp(0.8 * liking),
        appeal_care=np.exp(0.8 * openness),
        amount_level=3.3 + 0.006 * (age - 48) + rng.normal(0, 0.5, n),
        interest=rng.choice(len(TOPICS), n, p=_TOPIC_SHARE),
        declares=rng.random(n) < 0.7,
        source=source,
        region=region,
        household=household,
        age=age,
    )


def _draw_kinds(source: Ints, household: Ints, age: Ints, rng: np.random.Generator) -> Ints:
    decades = ((age - 48) / 10)[:, None]
    log_odds = _KIND_LOG_ODDS + _KIND_BY_SOURCE[source] + _KIND_BY_HOUSEHOLD[household] + _KIND_BY_DECADE * decades
    # The largest of log-odds plus Gumbel noise is a draw from the softmax.
    return np.argmax(log_odds + rng.gumbel(size=log_odds.shape), axis=1)


def _chance(log_odds: Floats) -> Floats:
    return 1 / (1 + np.exp(-log_odds))


def _attention(latents: Latents, week_start: int) -> Floats:
    """The slow wave in the week that starts at `week_start`."""
    angle = 2 * np.pi * week_start / latents.wave_period + latents.wave_phase
    return np.exp(latents.wave_amplitude * np.sin(angle))


def _calendar(config: WorldConfig, offset: int) -> float:
    day = config.first_day + timedelta(days=offset)
    yearly = 1 + 0.05 * np.cos(2 * np.pi * (day.timetuple().tm_yday - 345) / 365.25)
    festive = 1.2 if (day.month, day.day) >= (12, 1) and (day.month, day.day) <= (12, 24) else 1.0
    return float(yearly * festive * _WEEKDAY[day.weekday()])


def _chances(config: WorldConfig, latents: Latents, treated: Flags, attention: Floats, offset: int) -> Chances:
    """What day `offset` holds for every contact, if the arms were `treated`. Generator and oracle both read it."""
    calendar = _calendar(config, offset) * attention
    months = np.maximum(offset - latents.added, 0) / 30.44
    weary = np.exp(-months / 60.0)  # what has come for years is opened less
    topic = (offset // 7) % len(TOPICS)
    is_news_day = (offset - latents.news_phase) % latents.news_every == 0
    news = Mailing(
        name="newsletter",
        topic=topic,
        sent=is_news_day & (latents.added < offset),
        by_letter=np.zeros(len(treated), dtype=bool),
        opens=latents.news_open * weary,
        clicks=np.minimum(latents.news_click * _match(latents, topic), 1.0),
        answers=np.minimum(_ANSWERS * latents.level * attention, 0.5),
        care=latents.news_care,
    )
    since = (offset - latents.appeal_phase) % latents.appeal_every
    received = np.where(treated, _appeals_received(latents, offset), 0)
    heard = received > 0
    effect = _freshness(latents, since, received) * _match(latents, ((offset - since) // 7) % len(TOPICS))
    appeal = Mailing(
        name="appeal",
        topic=topic,
        sent=heard & (since == 0),
        by_letter=latents.by_letter,
        opens=np.where(latents.by_letter, 0.0, latents.appeal_open * weary),
        clicks=latents.appeal_click,
        answers=np.minimum(_ANSWERS * latents.persuasion * effect, 0.5),
        care=latents.appeal_care,
    )
    fades = np.where(latents.by_letter, _FADES_LETTER, _FADES_EMAIL)
    kept = latents.level * (1 - heard * latents.annoyance * np.exp(-since / _FADES_ANNOYANCE))
    won = heard * latents.persuasion * effect * np.exp(-since / fades)
    return Chances((kept + won) * calendar, (news, appeal))


def _match(latents: Latents, topic: int | Ints) -> Floats:
    return np.where(latents.interest == topic, _MATCH, _NO_MATCH)


def _appeals_received(latents: Latents, offset: int) -> Ints:
    """Appeals in the plan from the day after adding to day `offset`, inclusive."""
    upto = (offset - latents.appeal_phase) // latents.appeal_every
    return np.maximum(upto - (latents.added - latents.appeal_phase) // latents.appeal_every, 0)


def _freshness(latents: Latents, since: Ints, received: Ints) -> Floats:
    """What tiredness leaves of an appeal's effect. Every earlier appeal adds one, which wears off over 90 days.

    Appeals come at equal distances, so that the sum over the earlier ones is a geometric series.
    """
    ratio = np.exp(-latents.appeal_every / _TIRED_DAYS)
    earlier = np.maximum(received - 1, 0)
    tired = np.exp(-since / _TIRED_DAYS) * ratio * (1 - ratio**earlier) / (1 - ratio)
    return np.exp(-_TIRES * tired)


def _write_day(
    latents: Latents,
    chances: Chances,
    offset: int,
    day: date,
    tables: Path,
    rng: np.random.Generator,
    next_response: int,
) -> int:
    there = (latents.added < offset) & (latents.left > offset)
    cumulative = np.cumsum(np.where(there, chances.rate, 0.0))
    # Independent Poisson counts: one Poisson total, allotted in proportion to the rates.
    unprompted = np.searchsorted(cumulative, rng.random(rng.poisson(cumulative[-1])) * cumulative[-1], "right")
    contacts, times = [unprompted], [day_times(rng, day, len(unprompted))]
    messages: list[dict[str, NDArray[np.generic]]] = []
    for mail in chances.mailings:
        sent = np.flatnonzero(mail.sent & (there | ~latents.says_so))
        sent_at = np.datetime64(day, "us") + (rng.uniform(6, 11, len(sent)) * 3.6e9).astype("timedelta64[us]")
        read = there[sent] & (rng.random(len(sent)) < mail.opens[sent])
        opened, opened_at = sent[read], _later(rng, sent_at[read], day)
        follows = rng.random(len(opened)) < mail.clicks[opened]
        clicked, clicked_at = opened[follows], _later(rng, opened_at[follows], day)
        answers = rng.random(len(clicked)) < mail.answers[clicked]
        contacts.append(clicked[answers])
        times.append(_later(rng, clicked_at[answers], day))
        seconds = np.round(_READ_SECONDS * mail.care[opened] * rng.lognormal(0, 0.6, len(opened)), 1)
        messages.append(
            {
                "contact": np.concatenate([sent, opened, clicked]),
                "at": np.concatenate([sent_at, opened_at, clicked_at]),
                "event": np.repeat(["sent", "open", "click"], [len(sent), len(opened), len(clicked)]),
                "kind": np.full(len(sent) + len(opened) + len(clicked), mail.name),
                "seconds": np.concatenate([np.full(len(sent), np.nan), seconds, np.full(len(clicked), np.nan)]),
                "letter": mail.by_letter[np.concatenate([sent, opened, clicked])],
            }
        )
    topic = str(TOPICS[chances.mailings[0].topic])
    _write_messages(tables / "messages", day, messages, topic, rng)
    responders = np.concatenate(contacts)
    _write_responses(latents, tables / "responses", day, responders, np.concatenate(times), next_response, rng)
    return next_response + len(responders)


def _later(rng: np.random.Generator, times: Times, day: date) -> Times:
    """Some time after, most often soon, on the same day."""
    left = np.datetime64(day, "us") + np.timedelta64(MICROSECONDS_PER_DAY - 1, "us") - times
    return times + (left.astype(np.int64) * rng.beta(1, 4, len(times))).astype("timedelta64[us]")


def _write_messages(
    folder: Path, day: date, messages: list[dict[str, NDArray[np.generic]]], topic: str, rng: np.random.Generator
) -> None:
    columns = {name: np.concatenate([part[name] for part in messages]) for name in messages[0]}
    n = len(columns["contact"])
    no_key, no_time, unknown, twice, negative = dirty_rows(rng, n, 5)
    # Bad rows come on top of the good ones, as a faulty writer would add them: the truth stays the truth.
    rows = np.concatenate([np.arange(n), no_key, no_time, unknown, twice, negative])
    at = np.cumsum([n, len(no_key), len(no_time), len(unknown), len(twice)])
    shown = columns["event"][rows].astype(object)
    shown[at[2] : at[3]] = "bounced"
    seconds = columns["seconds"][rows].astype(np.float64)
    seconds[at[4] :] = -1.0
    write_day(
        folder,
        day,
        {
            "contact_id": key_column(columns["contact"][rows].astype(np.int64), np.arange(at[0], at[1])),
            "happened_at": time_column(
                columns["at"][rows].astype("datetime64[us]"), np.arange(at[1], at[2]), np.arange(0)
            ),
            "event": pa.array(shown, pa.string()),
            "kind": pa.array(columns["kind"][rows]),
            "seconds": pa.array(seconds, mask=np.isnan(seconds)),
            "channel": pa.array(np.where(columns["letter"][rows], "letter", "email")),
            "topic": pa.array([topic] * len(rows), pa.string()),
        },
    )


def _write_responses(
    latents: Latents,
    folder: Path,
    day: date,
    responders: Ints,
    times: Times,
    next_response: int,
    rng: np.random.Generator,
) -> None:
    n = len(responders)
    amounts = np.round(np.exp(latents.amount_level[responders] + rng.normal(0, 0.4, n)), 2)
    faithful = rng.random(n) < 0.7
    other = rng.choice(len(TOPICS), n, p=_TOPIC_SHARE)
    topics = TOPICS[np.where(faithful, latents.interest[responders], other)]
    ids = np.arange(next_response, next_response + n)
    dirt = [rows % max(n, 1) for rows in dirty_rows(rng, _HAND_KEYED * n, 7)]
    rows = np.concatenate([np.arange(n), *dirt])
    at = np.cumsum([n, *(len(kind) for kind in dirt)])
    no_key, no_time, future, negative, infinite, _, same_id = (np.arange(at[i], at[i + 1]) for i in range(7))
    values = amounts[rows]
    values[negative] *= -1
    values[infinite] = np.inf
    values[same_id] += 1.0
    write_day(
        folder,
        day,
        {
            "response_id": pa.array(ids[rows]),
            "contact_id": key_column(responders[rows], no_key),
            "responded_at": time_column(times[rows], no_time, future),
            "amount": pa.array(values),
            "topic": pa.array(topics[rows]),
        },
    )


def _write_contacts(config: WorldConfig, latents: Latents, tables: Path, rng: np.random.Generator) -> None:
    """The contacts, with dirt; and the register of the experiment, without: whoever randomises keeps it clean."""
    n = config.customers
    keys = np.arange(1, n + 1)
    instants = np.datetime64(config.first_day, "s") + (latents.added * 86_400).astype("timedelta64[s]")
    instants = instants + rng.integers(0, 86_400, n).astype("timedelta64[s]")
    arms = ARMS[latents.treated.astype(np.int64)]
    assigned = {"contact_id": pa.array(keys), "assigned_at": pa.array(instants), "arm": pa.array(arms)}
    pq.write_table(pa.table(assigned), tables / "assignments.parquet", compression="zstd")
    ages = latents.age.astype(np.str_).astype(object)
    ages[rng.random(n) < 0.08] = ""
    # Most name what interests them, and most of these know it.
    named = np.where(rng.random(n) < 0.9, latents.interest, rng.choice(len(TOPICS), n, p=_TOPIC_SHARE))
    interests = np.where(latents.declares, TOPICS[named], "")
    attributes = [SOURCES[latents.source], REGIONS[latents.region], ages, HOUSEHOLDS[latents.household], interests]
    columns = [keys, np.datetime_as_string(instants), *attributes, arms]
    with (tables / "contacts.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["contact_id", "added_at", "source", "region", "age", "household", "interest", "arm"])
        writer.writerows(zip(*columns, strict=True))
        # One of each kind of dirt: added rows, so that the good contact stays.
        writer.writerow(["", "2024-05-01T10:00:00", "street", "north", 44, "single", "animals", "control"])
        writer.writerow([n + 1, "not a date", "website", "south", 31, "couple", "", "treated"])
        writer.writerow([n + 2, "2024-06-01T10:00:00", "event", "west", 999, "family", "health", "treated"])
        writer.writerow([n + 3, "2024-06-02T10:00:00", "friend", "east", "thirty", "single", "", "control"])
        writer.writerow([1, "2025-08-30T10:00:00", "street", "north", 31, "couple", "climate", "control"])
        writer.writerow([column[-1] for column in columns])
