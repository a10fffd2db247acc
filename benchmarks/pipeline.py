"""From event logs to features: against what a person would write by hand for DuckDB, or in pandas.

The shop of `ecommerce_purchase`: 104 features of orders, visits and e-mails, about 81 events a customer.
"""

import shutil
from collections.abc import Callable
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import ibis.backends.duckdb  # noqa: F401  no contender has imports left when its clock starts
import pyarrow.parquet as pq

from benchmarks.measure import Figure, contest, prepare
from propensity_dagster.campaign import SHIPPED, EventCampaign, load_campaign
from propensity_dagster.data.days import days_between
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.ingest import ingest_entities, ingest_stream
from propensity_dagster.data.lake import Home
from propensity_dagster.data.months import LAST_DAYS, MONTHS, read_months
from propensity_dagster.data.sources import campaign_calendar, source_folder
from propensity_dagster.data.validate import validate_entities, validate_stream
from propensity_dagster.features.activity import ACTIVITY, ORDER, build_activity
from propensity_dagster.features.build import previous_days
from propensity_dagster.features.snapshots import publish_features
from propensity_dagster.runtime import DEFAULT_MEMORY_GB

SNAPSHOT = date(2025, 8, 1)
WEEKLY = [SNAPSHOT - timedelta(days=7 * i) for i in range(12)]
NIGHTS = [SNAPSHOT - timedelta(days=i) for i in range(90)]
WINDOWS = (7, 30, 90, 365)
EPOCH = date(1970, 1, 1)


def benchmark(sizes: list[int], folder: Path) -> list[Figure]:
    """Ingestion, activity and features at these numbers of customers."""
    prepare(make_lake, folder, sizes)
    per = "customers"
    by_hand = "DuckDB by hand"
    return [
        *contest("ingest and validate the visits", sizes, per, {"ours": ingest, by_hand: ingest_by_hand}, folder, 2),
        *contest("activity of all days", sizes, per, {"ours": activity, by_hand: activity_by_hand}, folder, 2),
        *contest("months of activity", sizes, per, {"ours": months, by_hand: months_by_hand}, folder),
        *contest(
            "features of one snapshot",
            sizes,
            per,
            {"ours": FeaturesOf(1), by_hand: features_by_hand, "pandas by hand": features_in_pandas},
            folder,
        ),
        *contest(
            "features of twelve snapshots",
            sizes,
            per,
            {"ours": FeaturesOf(12), "twelve of one": FeaturesOf(1)},
            folder,
            rounds=2,
            times={"twelve of one": 12},
        ),
        *contest(
            "backfill of 90 daily snapshots",
            sizes,
            per,
            {"ours": FeaturesOf(90), "90 of one": FeaturesOf(1)},
            folder,
            rounds=1,
            times={"90 of one": 90},
        ),
    ]


def shop(folder: Path, size: int) -> tuple[EventCampaign, Home]:
    """The campaign with so many customers, and its home."""
    root = folder / f"shop-{size}"
    root.mkdir(parents=True, exist_ok=True)
    shipped = (SHIPPED / "ecommerce_purchase.yaml").read_text(encoding="utf-8")
    file = root / "campaign.yaml"
    file.write_text(shipped.replace("customers=20000", f"customers={size}"), encoding="utf-8")
    campaign = load_campaign(file)
    assert isinstance(campaign, EventCampaign)
    return campaign, Home(root / "home").ensure()


def make_lake(folder: Path, size: int) -> None:
    """Everything that the features need."""
    campaign, home = shop(folder, size)
    calendar = campaign_calendar(campaign)
    assert calendar.last is not None
    if (home.lake(campaign.name).partition("activity", "day", calendar.last)).exists():
        return
    fill_lake(campaign, home)


def fill_lake(campaign: EventCampaign, home: Home) -> None:
    """From the source to the activity of all days, with an engine for each table, as assets have."""
    first, last = days_of(campaign)
    with open_engine() as engine:
        ingest_entities(campaign, home, engine)
        validate_entities(campaign, home, engine)
    for name in campaign.source.streams:
        with open_engine() as engine:
            ingest_stream(campaign, name, first, last, home, engine)
            validate_stream(campaign, name, first, last, home, engine)
    with open_engine() as engine:
        build_activity(campaign, first, last, home, engine)


def ingest(folder: Path, size: int) -> Callable[[], object]:
    campaign, home = shop(folder, size)
    first, last = days_of(campaign)

    def action() -> None:
        with open_engine() as engine:
            ingest_stream(campaign, "visits", first, last, home, engine)
            validate_stream(campaign, "visits", first, last, home, engine)

    return action


def ingest_by_hand(folder: Path, size: int) -> Callable[[], object]:
    """One pass over the source: rows that can be used, in files by day. No quarantine, no duplicates, no report."""
    campaign, home = shop(folder, size)
    source, target = source_of(campaign, home) / "web_visits", folder / f"hand-{size}"
    query = f"""
        COPY (SELECT CAST(customer_id AS VARCHAR) AS customer_id, CAST(visited_at AS TIMESTAMP) AS time, pages, seconds,
                     CAST(visited_at AS DATE) AS day
              FROM read_parquet('{source}/*.parquet')
              WHERE customer_id IS NOT NULL AND visited_at IS NOT NULL
              ORDER BY day, customer_id, time)
        TO '{target}' (FORMAT PARQUET, COMPRESSION zstd, PARTITION_BY (day))"""
    shutil.rmtree(target, ignore_errors=True)
    return lambda: run_sql(query)


def activity(folder: Path, size: int) -> Callable[[], object]:
    campaign, home = shop(folder, size)

    def action() -> None:
        with open_engine() as engine:
            build_activity(campaign, *days_of(campaign), home, engine)

    return action


def activity_by_hand(folder: Path, size: int) -> Callable[[], object]:
    """The same table in one file."""
    campaign, home = shop(folder, size)
    lake = home.lake(campaign.name).root

    def events(name: str) -> str:
        return f"read_parquet('{lake}/validated_{name}/day=2*/part.parquet', hive_partitioning=false)"

    day = "CAST(floor(epoch(time) / 86400) AS INTEGER)"
    kinds = ", ".join(f"sum(CASE WHEN type = '{k}' THEN 1 ELSE 0 END) AS {k}" for k in ("sent", "open", "click"))
    query = f"""
        COPY (
            SELECT customer_id, day, sum(orders) AS orders, sum(amount) AS amount, max(largest) AS largest,
                   sum(visits) AS visits, sum(pages) AS pages, max(most_pages) AS most_pages,
                   sum(seconds) AS seconds, max(most_seconds) AS most_seconds,
                   sum(sent) AS sent, sum(open) AS open, sum(click) AS click
            FROM (
                SELECT customer_id, {day} AS day, count(*) AS orders, sum(amount) AS amount, max(amount) AS largest
                FROM {events("orders")} GROUP BY ALL
                UNION ALL BY NAME
                SELECT customer_id, {day} AS day, count(*) AS visits, sum(measure_pages) AS pages,
                       max(measure_pages) AS most_pages, sum(measure_seconds) AS seconds,
                       max(measure_seconds) AS most_seconds
                FROM {events("visits")} GROUP BY ALL
                UNION ALL BY NAME
                SELECT customer_id, {day} AS day, {kinds} FROM {events("emails")} GROUP BY ALL)
            GROUP BY ALL ORDER BY day, customer_id)
        TO '{folder}/activity-{size}.parquet' (FORMAT PARQUET, COMPRESSION zstd);
        COPY (SELECT DISTINCT customer_id, {day} AS day, category_category AS value FROM {events("orders")}
              WHERE category_category IS NOT NULL ORDER BY ALL)
        TO '{folder}/categories-{size}.parquet' (FORMAT PARQUET, COMPRESSION zstd)"""
    return lambda: run_sql(query)


def months(folder: Path, size: int) -> Callable[[], object]:
    """The copies that features read, all of them anew: otherwise one is made a month."""
    campaign, home = shop(folder, size)
    for table in (*(f"{table}{MONTHS}" for table in ORDER), f"{ACTIVITY}{LAST_DAYS}"):
        shutil.rmtree(home.lake(campaign.name).root / table, ignore_errors=True)
    return lambda: files_of_features(campaign, home)


def months_by_hand(folder: Path, size: int) -> Callable[[], object]:
    """The same rows of both tables, each sorted in one file."""
    campaign, home = shop(folder, size)
    lake = home.lake(campaign.name).root
    query = "; ".join(
        f"COPY (SELECT * FROM read_parquet('{lake}/{table}/day=2*/part.parquet', hive_partitioning=false) "
        f"WHERE day < {(SNAPSHOT - EPOCH).days} ORDER BY customer_id, day) "
        f"TO '{folder}/{table}-sorted-{size}.parquet' (FORMAT PARQUET, COMPRESSION zstd)"
        for table in ORDER
    )
    return lambda: run_sql(query)


class FeaturesOf:
    """Features of the newest of so many snapshots, or of all of them. A class, for a process can be sent it."""

    def __init__(self, snapshots: int) -> None:
        self.snapshots = {1: [SNAPSHOT], 12: WEEKLY, 90: NIGHTS}[snapshots]

    def __call__(self, folder: Path, size: int) -> Callable[[], object]:
        campaign, home = shop(folder, size)

        def action() -> None:
            with open_engine() as engine:
                publish_features(campaign, self.snapshots, home, engine)

        return action


def features_by_hand(folder: Path, size: int) -> Callable[[], object]:
    """The same 104 columns of the same rows from the same files, in one query; tested to be equal."""
    campaign, home = shop(folder, size)
    target = folder / f"features-{size}.parquet"
    query = f"COPY ({features_sql(campaign, home)}) TO '{target}' (FORMAT PARQUET, COMPRESSION zstd)"
    return lambda: run_sql(query)


def features_sql(campaign: EventCampaign, home: Home) -> str:
    """What a person would write: a narrow group-by for each window, joined."""
    lake, t = home.lake(campaign.name), (SNAPSHOT - EPOCH).days
    read = {
        table: f"read_parquet({[str(file) for file in files]}, hive_partitioning=false)"
        for table, files in files_of_features(campaign, home).items()
    }
    measures = {
        "orders": ["count", "amount"],
        "visits": ["count", "pages", "seconds"],
        "emails": ["type_sent", "type_open", "type_click"],
    }

    def window(name: str, days: int | None) -> str:
        sums = [f"sum({s}__{m}) AS {s}_{m}" for s, columns in measures.items() for m in columns]
        sums += [
            f"max({s}__{m}_max) AS {s}_{m}_max"
            for s, m in (("orders", "amount"), ("visits", "pages"), ("visits", "seconds"))
        ]
        if days == 365:
            sums += [f"sum(CASE WHEN {s}__count > 0 THEN 1 ELSE 0 END) AS {s}_days" for s in ("orders", "visits")]
        if days is None:
            sums += [f"{f}(day) FILTER ({s}__count > 0) AS {s}_{f}" for s in measures for f in ("max", "min")]
            sums += [f"max(day) FILTER (emails__type_{k} > 0) AS emails_{k}_max" for k in ("open", "click")]
        start = "" if days is None else f"WHERE day >= {t - days}"
        return f"{name} AS (SELECT customer_id, {', '.join(sums)} FROM known {start} GROUP BY customer_id)"

    def rhythm(s: str) -> str:
        return f"""{s}_gaps AS (
            SELECT customer_id, count(gap) AS n, sum(gap) AS total, sum(gap * gap) AS squares
            FROM (SELECT customer_id, day - lag(day) OVER (PARTITION BY customer_id ORDER BY day) AS gap
                  FROM known WHERE day >= {t - 365} AND {s}__count > 0) GROUP BY customer_id)"""

    tables = {f"w{d}": d for d in WINDOWS} | {"ever": None}
    steps = [
        f"known AS (SELECT * FROM {read['activity']} WHERE known_day < {t} AND day < {t})",
        *(window(name, days) for name, days in tables.items()),
        rhythm("orders"),
        rhythm("visits"),
        f"""kinds AS (SELECT customer_id, count(DISTINCT value) AS n
            FROM {read["activity_categories"]}
            WHERE day >= {t - 365} AND day < {t} AND known_day < {t} GROUP BY customer_id)""",
        f"""people AS (
            SELECT customer_id, age, country, channel, CAST(floor(epoch(created_at) / 86400) AS INTEGER) AS born
            FROM '{lake.file("validated_customers")}'
            WHERE floor(epoch(created_at) / 86400) < {t})""",
    ]
    columns = [f"({t} - born) / 30.4375 AS tenure_months", "age", "country", "channel"]
    for s, kinds in (("orders", ["amount"]), ("visits", ["pages", "seconds"])):
        columns += [
            f"{t} - ever.{s}_max AS {s}_recency_days",
            f"{t} - ever.{s}_min AS {s}_first_days",
            *(f"coalesce({w}.{s}_count, 0) AS {s}_count_{n}" for w, n in names(tables)),
            f"coalesce(w365.{s}_days, 0) AS {s}_active_days_365d",
            f"ever.{s}_count * 30.0 / nullif({t} - ever.{s}_min, 0) AS {s}_rate_all",
            f"({t} - ever.{s}_max) / nullif({t} - ever.{s}_min, 0) AS {s}_recency_share",
            f"{s}_gaps.total / nullif({s}_gaps.n, 0) AS {s}_gap_mean_days",
            f"sqrt(({s}_gaps.squares - {s}_gaps.total::DOUBLE * {s}_gaps.total / nullif({s}_gaps.n, 0)) "
            f"/ nullif({s}_gaps.n - 1, 0)) AS {s}_gap_std_days",
            f"({t} - ever.{s}_max) / nullif({s}_gaps.total / nullif({s}_gaps.n, 0), 0) AS {s}_overdue_ratio",
            *(
                f"coalesce(w{a}.{s}_count, 0) * {b} / nullif(w{b}.{s}_count * {a}, 0) AS {s}_momentum_{a}d_{b}d"
                for a, b in pairwise(WINDOWS)
            ),
        ]
        for kind in kinds:
            scale = 100 if kind == "amount" else 1000
            for w, n in names(tables):
                if kind != "amount" and w == "ever":
                    continue
                columns += [
                    f"coalesce({w}.{s}_{kind}, 0) / {scale} AS {s}_{kind}_sum_{n}",
                    f"{w}.{s}_{kind} / (nullif({w}.{s}_count, 0) * {scale}) AS {s}_{kind}_mean_{n}",
                    f"{w}.{s}_{kind}_max / {scale} AS {s}_{kind}_max_{n}",
                ]
        if s == "orders":
            columns.append("coalesce(kinds.n, 0) AS orders_category_distinct_365d")
    columns.append(f"{t} - ever.emails_max AS emails_recency_days")
    columns += [f"{t} - ever.emails_{k}_max AS emails_{k}_recency_days" for k in ("open", "click")]
    for w, n in names(tables):
        columns += [f"coalesce({w}.emails_type_{k}, 0) AS emails_{k}_count_{n}" for k in ("sent", "open", "click")]
        columns += [
            f"coalesce({w}.emails_type_{k}, 0) / nullif({w}.emails_type_sent, 0) AS emails_{k}_rate_{n}"
            for k in ("open", "click")
        ]
    joins = " ".join(
        f"LEFT JOIN {name} USING (customer_id)" for name in (*tables, "orders_gaps", "visits_gaps", "kinds")
    )
    active = " OR ".join(f"coalesce(ever.{s}_max >= {t - 365}, false)" for s in ("orders", "visits"))
    return (
        f"WITH {', '.join(steps)} SELECT customer_id, {', '.join(columns)} FROM people {joins} "
        f"WHERE {active} OR born >= {t - 365} ORDER BY customer_id"
    )


def names(tables: dict[str, int | None]) -> list[tuple[str, str]]:
    """Tables of windows, and how they are called in the names of features."""
    return [(table, "all" if days is None else f"{days}d") for table, days in tables.items()]


def features_in_pandas(folder: Path, size: int) -> Callable[[], object]:
    """The same 104 columns of the same rows from the same files, as a notebook has them; tested to be equal."""
    campaign, home = shop(folder, size)
    lake, t = home.lake(campaign.name), (SNAPSHOT - EPOCH).days
    files = files_of_features(campaign, home)
    activity, categories = files["activity"], files["activity_categories"]
    target = folder / f"features-pandas-{size}.parquet"
    return lambda: pandas_table(activity, categories, lake.file("validated_customers"), t).to_parquet(target)


def files_of_features(campaign: EventCampaign, home: Home) -> dict[str, list[Path]]:
    """What ours reads, by table: sorted months, which are gifts to the peers as well."""
    first, _ = days_of(campaign)
    days = days_between(first, SNAPSHOT - timedelta(days=1))
    lake = home.lake(campaign.name)
    more = {ACTIVITY: previous_days(campaign)}
    with open_engine() as engine:
        for table, order in ORDER.items():
            read_months(table, days, [campaign.key, *order], lake, engine, more.get(table))
    firsts = dict.fromkeys(day.replace(day=1) for day in days)  # the snapshot is the first of a month: all are whole
    return {table: [lake.target(f"{table}{MONTHS}", "month", first) for first in firsts] for table in ORDER}


def pandas_table(activity: list[Path], categories: list[Path], customers: Path, t: int) -> Any:
    """One frame of everything that was known on day `t`; a group-by for each window, joined."""
    import pandas

    pd: Any = pandas
    key = "customer_id"
    columns = [name for name in pq.read_schema(activity[0]).names if not name.startswith("_previous")]
    known = pd.concat([pd.read_parquet(file, columns=columns) for file in activity], ignore_index=True)
    known = known[(known["known_day"] < t) & (known["day"] < t)]
    people = pd.read_parquet(customers).set_index(key).sort_index()
    people["born"] = people["created_at"].astype("datetime64[s]").astype("int64") // 86400
    people = people[people["born"] < t]
    windows = pandas_windows(known, people.index, t)
    ever = windows["all"]

    def days_with(column: str) -> Any:
        return known.loc[known[column] > 0].groupby(key)["day"]

    out: dict[str, Any] = {"tenure_months": (t - people["born"]) / 30.4375}
    out |= {name: people[name] for name in ("age", "country", "channel")}
    year = known[known["day"] >= t - 365]
    newest: dict[str, Any] = {}
    for stream, measures in (("orders", ["amount"]), ("visits", ["pages", "seconds"])):
        count = f"{stream}__count"
        extent = days_with(count).agg(["max", "min"]).reindex(people.index)
        recency, since, newest[stream] = t - extent["max"], t - extent["min"], extent["max"]
        out[f"{stream}_recency_days"], out[f"{stream}_first_days"] = recency, since
        for name, window in windows.items():
            out[f"{stream}_count_{name}"] = window[count].fillna(0)
        active = year.loc[year[count] > 0, [key, "day"]].sort_values([key, "day"])
        out[f"{stream}_active_days_365d"] = active.groupby(key).size().reindex(people.index).fillna(0)
        out[f"{stream}_rate_all"] = ever[count] * 30.0 / since.where(since != 0)
        out[f"{stream}_recency_share"] = recency / since.where(since != 0)
        gaps = active.assign(gap=active.groupby(key)["day"].diff()).groupby(key)["gap"]
        mean = gaps.mean().reindex(people.index)
        out[f"{stream}_gap_mean_days"], out[f"{stream}_gap_std_days"] = mean, gaps.std().reindex(people.index)
        out[f"{stream}_overdue_ratio"] = recency / mean.where(mean != 0)
        for a, b in pairwise(WINDOWS):
            less, more = windows[f"{a}d"][count].fillna(0), windows[f"{b}d"][count]
            out[f"{stream}_momentum_{a}d_{b}d"] = less * b / (more.where(more != 0) * a)
        for measure in measures:
            scale = 100 if measure == "amount" else 1000
            for name, window in windows.items():
                if measure == "amount" or name != "all":
                    total, number = window[f"{stream}__{measure}"], window[count]
                    out[f"{stream}_{measure}_sum_{name}"] = total.fillna(0) / scale
                    out[f"{stream}_{measure}_mean_{name}"] = total / (number.where(number != 0) * scale)
                    out[f"{stream}_{measure}_max_{name}"] = window[f"{stream}__{measure}_max"] / scale
    seen = pd.concat([pd.read_parquet(file) for file in categories], ignore_index=True)
    seen = seen[(seen["day"] >= t - 365) & (seen["day"] < t) & (seen["known_day"] < t)]
    out["orders_category_distinct_365d"] = seen.groupby(key)["value"].nunique().reindex(people.index).fillna(0)
    out["emails_recency_days"] = t - days_with("emails__count").max().reindex(people.index)
    for kind in ("open", "click"):
        out[f"emails_{kind}_recency_days"] = t - days_with(f"emails__type_{kind}").max().reindex(people.index)
    for name, window in windows.items():
        sent = window["emails__type_sent"]
        for kind in ("sent", "open", "click"):
            out[f"emails_{kind}_count_{name}"] = window[f"emails__type_{kind}"].fillna(0)
        for kind in ("open", "click"):
            out[f"emails_{kind}_rate_{name}"] = window[f"emails__type_{kind}"].fillna(0) / sent.where(sent != 0)
    eligible = (people["born"] >= t - 365) | (newest["orders"] >= t - 365) | (newest["visits"] >= t - 365)
    return pd.DataFrame(out)[eligible].reset_index()


def pandas_windows(known: Any, index: Any, t: int) -> dict[str, Any]:
    """Totals and maxima of each window before day `t`."""
    sums = ["orders__count", "orders__amount", "visits__count", "visits__pages", "visits__seconds"]
    sums += [f"emails__type_{kind}" for kind in ("sent", "open", "click")]
    largest = ["orders__amount_max", "visits__pages_max", "visits__seconds_max"]
    windows: dict[str, Any] = {}
    for days in (*WINDOWS, None):
        inside = (known if days is None else known[known["day"] >= t - days]).groupby("customer_id")
        found = inside[sums].sum(min_count=1).join(inside[largest].max())
        windows["all" if days is None else f"{days}d"] = found.reindex(index)
    return windows


def days_of(campaign: EventCampaign) -> tuple[date, date]:
    """First and last day of the logs."""
    calendar = campaign_calendar(campaign)
    assert calendar.last is not None
    return calendar.first, calendar.last


def source_of(campaign: EventCampaign, home: Home) -> Path:
    """The folder of the raw tables."""
    folder = source_folder(campaign, home)
    assert folder is not None
    return folder


def run_sql(query: str) -> None:
    """With the memory that ours has."""
    with duckdb.connect() as connection:
        connection.execute(f"SET memory_limit = '{DEFAULT_MEMORY_GB}GB'; SET enable_progress_bar = false")
        connection.execute(query)


def check_by_hand(folder: Path, size: int) -> None:
    """Raises unless the tables by hand are ours."""
    import pandas as pd

    campaign, home = shop(folder, size)
    FeaturesOf(1)(folder, size)()
    ours = pq.read_table(home.lake(campaign.name).partition("features", "snapshot", SNAPSHOT)).to_pandas()
    for work, name in ((features_by_hand, "features"), (features_in_pandas, "features-pandas")):
        work(folder, size)()
        theirs = pq.read_table(folder / f"{name}-{size}.parquet").to_pandas()
        pd.testing.assert_frame_equal(ours, theirs[list(ours.columns)], check_dtype=False, rtol=1e-12)
