"""Leakage must be impossible: features and labels against plain loops, and bugs that must be caught. DESIGN 5."""

import dataclasses
import math
import random
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cache

import ibis
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propensity_dagster.campaign import EventCampaign
from propensity_dagster.data.days import day_index
from propensity_dagster.data.engine import any_day, on_day, open_engine
from propensity_dagster.data.months import with_previous
from propensity_dagster.features import build
from propensity_dagster.features.activity import daily_activity, daily_categories
from propensity_dagster.features.build import (
    Inputs,
    build_features,
    build_labels,
    campaign_features,
    fold_history,
    previous_days,
)

from .reference import HORIZON, WINDOWS, reference

T = date(2024, 6, 1)
NOON = datetime(2024, 6, 1)
EDGES = [0, 1, 7, 8, 30, 31, -HORIZON, -HORIZON + 1, 60, 61]


@dataclass
class World:
    """Validated events, as plain rows."""

    customers: list[dict]
    streams: dict[str, list[dict]]


@cache
def campaign(late_days: int = 0, late: bool | str = False) -> EventCampaign:
    """`late`: whether every log has times of arrival, or the one log that has."""
    arrives = {name: {"ingested_at": "arrived"} if late in (True, name) else {} for name in ("orders", "emails")}
    return EventCampaign.model_validate(
        {
            "name": "world",
            "source": {
                "kind": "events",
                "connection": "nowhere",
                "first_day": "2024-01-01",
                "late_days": late_days,
                "entities": {"table": "c", "key": "customer_id", "created_at": "signup_at",
                             "attributes": {"age": "number", "country": "category"}},
                "streams": {
                    "orders": {"table": "o", "time": "time", "id": "id", "amount": "amount", "categories": ["category"], **arrives["orders"]},
                    "emails": {"table": "e", "time": "time", "type": "event", "types": ["sent", "open"], **arrives["emails"]},
                },
            },
            "outcome": {"stream": "orders", "horizon_days": HORIZON},
            "eligibility": {"active_within_days": 60},
            "features": {"windows_days": list(WINDOWS)},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    with open_engine(threads=1) as opened:
        yield opened


def make_world(seed: int, late: bool | str = False) -> World:
    """Events crowd the edges: midnight of the snapshot, of every window, of the outcome window."""
    rng = random.Random(seed)

    def instant() -> datetime:
        if rng.random() < 0.6:
            edge = NOON - timedelta(days=rng.choice(EDGES))
            return edge + rng.choice([timedelta(0), -timedelta(microseconds=1), timedelta(hours=5)])
        return NOON + timedelta(days=rng.uniform(-120, 40))

    def event(**more) -> dict:
        time = instant()
        delayed = late in (True, "emails" if "type" in more else "orders")
        delay = timedelta(days=rng.choice([0, 0, 0, 1, 3]), hours=rng.choice([0, 2])) if delayed else timedelta(0)
        return {"customer_id": f"c{rng.randrange(8)}", "time": time, "ingested_at": time + delay, **more}

    customers = [
        {"customer_id": f"c{i}", "signup_at": instant() - timedelta(days=rng.choice([0, 0, 90])),
         "age": rng.choice([None, 20.0, 50.5]), "country": rng.choice([None, "DE", "FR"])}
        for i in range(8)
    ]  # fmt: skip
    orders = [
        event(event_id=str(i), amount=rng.randrange(1, 9000), category=rng.choice([None, "a", "b", "c"]))
        for i in range(rng.randrange(40))
    ]
    emails = [event(type=rng.choice(["sent", "open"])) for _ in range(rng.randrange(30))]
    return World(customers, {"orders": orders, "emails": emails})


def inputs_of(world: World, c: EventCampaign, engine) -> Inputs:
    late = {n: {"ingested_at": pa.timestamp("us")} if s.ingested_at else {} for n, s in c.source.streams.items()}
    shapes = {
        "orders": {"customer_id": pa.string(), "time": pa.timestamp("us"), "event_id": pa.string(), "amount": pa.int64(), "category_category": pa.string(), **late["orders"]},
        "emails": {"customer_id": pa.string(), "time": pa.timestamp("us"), "type": pa.string(), **late["emails"]},
    }  # fmt: skip
    events = {}
    for name, shape in shapes.items():
        rows = [{**row, "category_category": row.get("category")} for row in world.streams[name]]
        events[name] = engine.table(
            pa.Table.from_pylist([{k: r[k] for k in shape} for r in rows], schema=pa.schema(shape))
        )
    schema = pa.schema(
        [
            ("customer_id", pa.string()),
            ("created_at", pa.timestamp("us")),
            ("age", pa.float64()),
            ("country", pa.string()),
        ]
    )
    entities = engine.table(
        pa.Table.from_pylist([{**r, "created_at": r["signup_at"]} for r in world.customers], schema=schema)
    )
    activity = engine.cache(with_previous(daily_activity(c, events, engine), c.key, previous_days(c), None))
    return Inputs(entities, activity, engine.cache(daily_categories(c, events)), campaign_features(c, entities))


def compute(world: World, c: EventCampaign, engine, t: date = T) -> dict[str, dict]:
    inputs = inputs_of(world, c, engine)
    features = engine.arrow(build_features(c, inputs, as_of=t))
    labels = engine.arrow(build_labels(c, inputs.activity, engine.table(features), as_of=t))
    assert (
        features["customer_id"].to_pylist()
        == labels["customer_id"].to_pylist()
        == sorted(features["customer_id"].to_pylist())
    )
    merged = features.append_column("converted", labels["converted"]).to_pylist()
    return {row.pop("customer_id"): row for row in merged}


def differences(found: dict, expected: dict) -> list[str]:
    """Keys or cells that differ; integers and text exactly, floats to 12 digits."""
    wrong = [f"entity {k}" for k in found.keys() ^ expected.keys()]
    for key in found.keys() & expected.keys():
        for name in found[key].keys() | expected[key].keys():
            a, b = found[key].get(name, "absent"), expected[key].get(name, "absent")
            if a is None or b is None or isinstance(a, str) or isinstance(b, str):
                same = a == b
            else:
                same = math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)
            if not same:
                wrong.append(f"{name}: {a} instead of {b}")
    return wrong


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**9),
    st.sampled_from([(0, False), (0, True), (3, False), (2, True), (0, "emails"), (1, "orders")]),
)
def test_features_and_labels_equal_plain_loops(engine, seed, setting):
    late_days, late = setting
    world = make_world(seed, late)
    found = compute(world, campaign(late_days, late), engine)
    assert differences(found, reference(world, T, late_days)) == []


def without_label(rows: dict) -> dict:
    return {k: {n: v for n, v in row.items() if n != "converted"} for k, row in rows.items()}


def scrambled(world: World, keep, seed: int) -> World:
    """Every event that need not be kept is changed, moved or removed, and others are added at the edges."""
    rng = random.Random(seed)
    changed = make_world(seed + 1, late=False)
    streams = {}
    for name, events in world.streams.items():
        kept = [e for e in events if keep(e)]
        added = [e for e in changed.streams[name] if not keep(e)]
        for i, e in enumerate(added):
            e["event_id"] = f"x{i}"
        rng.shuffle(added)
        streams[name] = kept + added
    return dataclasses.replace(world, streams=streams)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9))
def test_the_future_changes_no_feature(engine, seed):
    world = make_world(seed)
    other = scrambled(world, lambda e: e["time"] < NOON, seed)
    newcomer = {"customer_id": "new", "signup_at": NOON, "age": 1.0, "country": "DE"}
    other = dataclasses.replace(other, customers=[*world.customers, newcomer])
    c = campaign()
    assert without_label(compute(world, c, engine)) == without_label(compute(other, c, engine))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9))
def test_a_label_sees_its_outcome_window_alone(engine, seed):
    world, end = make_world(seed), NOON + timedelta(days=HORIZON)
    everybody = dataclasses.replace(
        world, customers=[{**c, "signup_at": NOON - timedelta(days=1)} for c in world.customers]
    )
    other = scrambled(everybody, lambda e: NOON <= e["time"] < end, seed)
    c = campaign()
    labels = [{k: row["converted"] for k, row in compute(w, c, engine).items()} for w in (everybody, other)]
    assert labels[0] == labels[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**9))
def test_what_arrives_later_changes_no_snapshot(engine, seed):
    """With `ingested_at`, computing an old snapshot after late events arrived gives what was served."""
    world = make_world(seed, late=True)
    served = dataclasses.replace(
        world, streams={n: [e for e in events if e["ingested_at"] < NOON] for n, events in world.streams.items()}
    )
    c = campaign(0, True)
    assert without_label(compute(world, c, engine)) == without_label(compute(served, c, engine))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**9))
def test_features_know_no_calendar(engine, seed):
    """Everything moved by 37 days gives the same features: nothing reads the clock."""
    world, days = make_world(seed), timedelta(days=37)

    def moved(row: dict) -> dict:
        return {k: v + days if isinstance(v, datetime) else v for k, v in row.items()}

    later = World([moved(c) for c in world.customers], {n: [moved(e) for e in s] for n, s in world.streams.items()})
    c = campaign()
    assert compute(world, c, engine) == compute(later, c, engine, T + days)


def test_an_open_snapshot_equals_a_stated_one(engine):
    c, inputs = campaign(), inputs_of(make_world(5), campaign(), engine)
    query = engine.prepare(build_features(c, inputs, as_of=any_day()))
    for t in (T, T - timedelta(days=20), T + timedelta(days=3)):
        stated = engine.arrow(build_features(c, inputs, as_of=t))
        assert engine.run_query(on_day(query, day_index(t))).equals(stated)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([0, 3]), st.sampled_from([(70, 8, 1, 0), (9, 4, 0), (1, 0)]))
def test_a_history_that_snapshots_share_is_that_of_each(engine, seed, late_days, ages):
    c = campaign(late_days)
    inputs = inputs_of(make_world(seed), c, engine)
    snapshots = [T - timedelta(days=days) for days in ages]
    shared = fold_history(c, inputs, engine, first=snapshots[0], last=snapshots[-1])
    assert shared.periods is not None
    queries = [engine.prepare(build_features(c, i, as_of=any_day())) for i in (inputs, shared)]
    for t in snapshots:
        alone, together = (engine.run_query(on_day(query, day_index(t))) for query in queries)
        assert together.equals(alone), t


def test_a_measure_may_be_called_as_what_we_derive(engine):
    """Days of a rental, say: its sum is no number of active days."""
    names = ("days", "first", "last", "previous", "gap_squares", "gaps")
    base = campaign().model_dump(mode="json", by_alias=True)
    base["source"]["streams"] = {"orders": {"table": "o", "time": "time", "measures": names}}
    c = EventCampaign.model_validate(base)
    times = [NOON - timedelta(days=days) for days in (20, 9, 3)]
    rows = [
        {"customer_id": "c0", "time": t} | {f"measure_{n}": 1000 * (i + 1) for n in names} for i, t in enumerate(times)
    ]
    entities = pa.table({"customer_id": ["c0"], "created_at": pa.array([NOON - timedelta(days=90)], pa.timestamp("us")),
                         "age": [20.0], "country": ["DE"]})  # fmt: skip
    events = pa.Table.from_pylist(rows)
    events = events.set_column(1, "time", events["time"].cast(pa.timestamp("us")))
    activity = daily_activity(c, {"orders": engine.table(events)}, engine)
    activity = engine.cache(with_previous(activity, c.key, previous_days(c), None))
    table = engine.table(entities)
    (row,) = engine.arrow(
        build_features(c, Inputs(table, activity, None, campaign_features(c, table)), as_of=T)
    ).to_pylist()
    assert {n: row[f"orders_{n}_sum_30d"] for n in names} == dict.fromkeys(names, 6.0)
    assert (row["orders_active_days_30d"], row["orders_recency_days"], row["orders_first_days"]) == (3, 3, 20)
    assert (row["orders_gap_mean_days"], row["orders_overdue_ratio"]) == (8.5, 3 / 8.5)


def test_a_history_that_becomes_known_later_is_not_shared(engine):
    c = campaign(2, True)
    inputs = inputs_of(make_world(1, True), c, engine)
    assert fold_history(c, inputs, engine, first=T - timedelta(days=9), last=T) is inputs


def as_index(as_of):
    return build._day(as_of)


def closed_window(c, known, cut, name, newer, older):
    """Each span has the first day of the one that is older too."""
    return ORIGINAL["_span"](c, known, cut, name, newer, older and older + 1)


def gap_between_windows(c, known, cut, name, newer, older):
    return ORIGINAL["_span"](c, known, cut, name, newer and newer + 1, older)


def no_upper_bound(c, inputs, *, as_of):
    return ORIGINAL["build_features"](
        c, dataclasses.replace(inputs, activity=inputs.activity.mutate(day=inputs.activity.day - 400)), as_of=as_of
    )


def features_including_t(c, inputs, *, as_of):
    activity = inputs.activity.mutate(day=inputs.activity.day - (inputs.activity.day == as_index(as_of)).cast("int32"))
    activity = activity.mutate(known_day=ibis.least(activity.known_day, activity.day))
    return ORIGINAL["build_features"](c, dataclasses.replace(inputs, activity=activity), as_of=as_of)


def unfiltered_late_events(c, inputs, *, as_of):
    activity = inputs.activity.mutate(known_day=inputs.activity.day)
    return ORIGINAL["build_features"](c, dataclasses.replace(inputs, activity=activity), as_of=as_of)


def categories_of_all_time(c, categories, *, as_of):
    return ORIGINAL["_distinct"](
        c,
        categories.mutate(day=ibis.least(categories.day, as_index(as_of) - 1), known_day=categories.known_day * 0),
        as_of=as_of,
    )


def entities_of_the_future(c, entities, *, as_of):
    return ORIGINAL["_known_entities"](
        c, entities.mutate(created_at=ibis.least(entities.created_at, ibis.timestamp("2024-05-31"))), as_of=as_of
    )


def label_too_early(c, activity, scored, *, as_of):
    return ORIGINAL["build_labels"](
        c, activity.mutate(day=activity.day + (activity.day == as_index(as_of) - 1).cast("int32")), scored, as_of=as_of
    )


def label_too_late(c, activity, scored, *, as_of):
    return ORIGINAL["build_labels"](
        c,
        activity.mutate(day=activity.day - (activity.day == as_index(as_of) + HORIZON).cast("int32")),
        scored,
        as_of=as_of,
    )


def label_misses_the_first_day(c, activity, scored, *, as_of):
    return ORIGINAL["build_labels"](c, activity.filter(activity.day != as_index(as_of)), scored, as_of=as_of)


def wall_clock_recency(c, joined):
    columns = ORIGINAL["_windows"](c, joined)
    off = (ibis.today().year() - ibis.today().year() + 1).cast("int32")
    return {**columns, "_last__orders_all": columns["_last__orders_all"] + off}


def gap_from_before_the_window(c, rows, oldest):
    return ORIGINAL["_aggregates"](c, rows, oldest - 1)


BUGS = {
    "a gap that begins before the window": ("_aggregates", gap_from_before_the_window),
    "window closed on both sides": ("_span", closed_window),
    "a day between two windows is lost": ("_span", gap_between_windows),
    "no upper bound": ("build_features", no_upper_bound),
    "events at t count": ("build_features", features_including_t),
    "unfiltered late events": ("build_features", unfiltered_late_events),
    "one feature over all time": ("_distinct", categories_of_all_time),
    "entities created after t": ("_known_entities", entities_of_the_future),
    "label starts a day early": ("build_labels", label_too_early),
    "label ends a day late": ("build_labels", label_too_late),
    "label misses the first day": ("build_labels", label_misses_the_first_day),
    "recency off by one day": ("_windows", wall_clock_recency),
}
ORIGINAL = {name: getattr(build, name) for name, _ in BUGS.values()}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(engine, monkeypatch, bug):
    """The comparison with plain loops notices each of these within a few worlds."""
    name, broken = BUGS[bug]
    monkeypatch.setattr(build, name, broken)
    if name in globals():
        monkeypatch.setitem(globals(), name, broken)
    late = bug == "unfiltered late events"
    for seed in range(12):
        world = make_world(seed, late)
        if differences(compute(world, campaign(0, late), engine), reference(world, T)):
            return
    pytest.fail("not caught in 12 worlds")
