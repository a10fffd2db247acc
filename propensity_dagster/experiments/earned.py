"""What contacts earned: contacted customers against their like who were held back, by tenth of the score and in all.

A customer who would have bought anyway converts in the holdout too, so only the difference was earned. Rows of one
customer at several snapshots are not independent: errors are clustered by customer. Belongs here: the comparison and
the ledger of expected against incremental. Does not: who was held, or the page.
"""

import json
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.data.days import pc
from propensity_dagster.data.lake import Home, Lake, publish_text
from propensity_dagster.evaluation.bootstrap import Z95, Estimate
from propensity_dagster.monitoring.outcomes import OUTCOMES
from propensity_dagster.scoring.audiences import (
    AUDIENCE,
    CONTACT,
    HELD,
    RANDOM,
    RANDOM_HELD,
    delivered_audiences,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EARNED = "earned"
MIN_HELD = 30
MIN_EACH = 10
"""Conversions, and others, on each side: below it the normal approximation says too little."""


@dataclass(frozen=True)
class Compared:
    """Contacts (n rows) with their outcomes: who was treated, and what is known of each beforehand.

    Attributes:
        y: 1 for a conversion (n,).
        treated: whether the customer was contacted (n,), else held.
        p: probability that was forecast (n,).
        entity: code of the customer (n,), from 0.
        cost: of the contact (n,), or what it would have been.
    """

    y: Floats
    treated: NDArray[np.bool_]
    p: Floats
    entity: Ints
    cost: Floats

    def rows(self, which: NDArray[np.bool_]) -> "Compared":
        """Some of the rows."""
        return Compared(self.y[which], self.treated[which], self.p[which], self.entity[which], self.cost[which])


def effect(rows: Compared) -> tuple[float, float] | None:
    """Effect of a contact on the probability to convert, and its standard error.

    The difference of the mean outcomes of contacted and held, each adjusted by the forecast probability (CUPED: Deng et
    al. 2013), with errors clustered by customer (Liang and Zeger 1986). None where either side is too small.
    """
    n, m = int(rows.treated.sum()), int((~rows.treated).sum())
    converted = rows.y[rows.treated].sum(), rows.y[~rows.treated].sum()
    if min(n, m) < MIN_HELD or min(*converted, n - converted[0], m - converted[1]) < MIN_EACH:
        return None
    centred = rows.p - rows.p.mean()
    spread = centred @ centred
    slope = float(centred @ rows.y / spread) if spread > 0 else 0.0
    adjusted = rows.y - slope * centred
    means = adjusted[rows.treated].mean(), adjusted[~rows.treated].mean()
    # Each row's part of the difference; the parts of a customer are summed before they are squared.
    part = np.where(rows.treated, (adjusted - means[0]) / n, -(adjusted - means[1]) / m)
    sums = np.bincount(rows.entity, weights=part)
    clusters = int((np.bincount(rows.entity) > 0).sum())
    error = float(np.sqrt(sums @ sums * clusters / (clusters - 1)))
    return float(means[0] - means[1]), error


def earned_of(rows: Compared, margin: float, first: NDArray[np.bool_] | None = None) -> dict[str, Any]:
    """What the contacts of these rows brought beyond what would have come anyway, with 95% intervals.

    Args:
        rows: contacts and held.
        margin: of a conversion.
        first: rows (n,) whose outcome windows do not overlap with an earlier one of the same customer: a conversion
            counts once. The cost is that of all contacts. None: all rows.

    Returns:
        Plain data: contacts, cost; of the rows in `first` measured (treated), held, conversions (observed among the
        treated), expected (by the forecast); and unless there are too few: effect, incremental_conversions,
        incremental_profit, return_on_cost.
    """
    made, cost = int(rows.treated.sum()), float(rows.cost[rows.treated].sum())
    rows = rows if first is None else rows.rows(first)
    contacts = rows.treated
    found: dict[str, Any] = {
        "contacts": made,
        "measured": int(contacts.sum()),
        "held": int((~contacts).sum()),
        "conversions": int(rows.y[contacts].sum()),
        "held_conversions": int(rows.y[~contacts].sum()),
        "expected": float(rows.p[contacts].sum()),
        "cost": cost,
        "effect": None,
        "incremental_conversions": None,
        "incremental_profit": None,
        "return_on_cost": None,
    }
    measured = effect(rows)
    if measured is None:
        return found
    value, error = measured
    per_contact = _with_error(value, error)
    conversions = per_contact * found["measured"]
    profit = conversions * margin - found["cost"]
    found |= {
        "effect": Estimate(*per_contact).to_json(),
        "incremental_conversions": Estimate(*conversions).to_json(),
        "incremental_profit": Estimate(*profit).to_json(),
    }
    if found["cost"] > 0:
        found["return_on_cost"] = Estimate(*profit / found["cost"]).to_json()
    return found


def first_windows(entity: Ints, day: Ints, window: int) -> NDArray[np.bool_]:
    """Rows (n,) to count: a customer's first, then each that is at least `window` days after the last counted one."""
    if window == 0 or not len(entity):
        return np.ones(len(entity), dtype=bool)
    counted = np.zeros(len(entity), dtype=bool)
    order = np.lexsort((day, entity))
    who, since = entity[order], day[order] - day.min()
    place = who * (since.max() + window + 1) + since  # ascending; a window on from a customer's last day is nobody's
    at = np.flatnonzero(np.diff(who, prepend=-1))
    while len(at):  # one round for each row that a customer has counted
        counted[order[at]] = True
        after = np.searchsorted(place, place[at] + window)
        there = after < len(who)
        at = after[there][who[after[there]] == who[at[there]]]
    return counted


def publish_earned(campaign: Campaign, home: Home) -> dict[str, Any]:
    """Compare every audience whose outcomes are known, and publish the record as JSON. Returns it.

    Returns:
        Plain data: `total`, `deciles`, `snapshots` (the ledger), `random` (contacts by lot below the cut-off), `model`
        (how much more a chosen contact brings than one by lot), `waiting` (audiences whose outcomes are not known yet).
    """
    lake = home.lake(campaign.name)
    days = delivered_audiences(lake)
    known = [day for day in days if lake.partition(OUTCOMES, "snapshot", day).exists()]
    table = pa.concat_tables([_with_outcomes(campaign, lake, day) for day in known]) if known else None
    margin = campaign.value.margin_per_conversion
    record: dict[str, Any] = {"campaign": campaign.name, "waiting": [str(d) for d in days if d not in known]}
    if table is None:
        return _published(record, campaign, home)
    group = table["group"].to_numpy(zero_copy_only=False)
    compared = _compared(table, campaign.key, np.isin(group, (CONTACT, RANDOM)))
    chosen, by_lot = np.isin(group, (CONTACT, HELD)), np.isin(group, (RANDOM, RANDOM_HELD))
    decile = table["decile"].to_numpy()
    snapshot = table["snapshot"].to_numpy().astype("datetime64[D]")
    window = campaign.outcome_end_days if isinstance(campaign, EventCampaign) else 0
    first = first_windows(compared.entity, snapshot.astype(np.int64), window)

    def earned(which: NDArray[np.bool_]) -> dict[str, Any]:
        return earned_of(compared.rows(which), margin, first[which])

    record |= {
        "total": earned(chosen),
        "deciles": [{"decile": int(d), **earned(chosen & (decile == d))} for d in np.unique(decile[chosen])],
        "snapshots": [
            {"snapshot": str(day), **earned_of(compared.rows(chosen & (snapshot == np.datetime64(day))), margin)}
            for day in known
        ],
    }
    if by_lot.any():
        record["random"] = earned(by_lot)
        record["model"] = _worth_of_the_model(compared, chosen & first, by_lot & first, margin)
    return _published(record, campaign, home)


def _with_error(value: float, error: float) -> Floats:
    """Value and limits of its 95% interval (3,)."""
    return np.array([value, value - Z95 * error, value + Z95 * error])


def _worth_of_the_model(
    compared: Compared, chosen: NDArray[np.bool_], by_lot: NDArray[np.bool_], margin: float
) -> dict[str, Any] | None:
    """Effect of a chosen contact less that of one by lot, and what that is in money for all chosen contacts."""
    best, lot = effect(compared.rows(chosen)), effect(compared.rows(by_lot))
    if best is None or lot is None:
        return None
    value, error = best[0] - lot[0], float(np.hypot(best[1], lot[1]))
    per_contact = _with_error(value, error)
    contacts = int((chosen & compared.treated).sum())
    return {
        "effect": Estimate(*per_contact).to_json(),
        "profit": Estimate(*per_contact * contacts * margin).to_json(),
    }


def _with_outcomes(campaign: Campaign, lake: Lake, day: date) -> pa.Table:
    """The audience of a snapshot with `converted`; rows whose outcome is not known are left out."""
    audience = pq.read_table(lake.partition(AUDIENCE, "snapshot", day))
    outcomes = pq.read_table(lake.partition(OUTCOMES, "snapshot", day), columns=[campaign.key, "converted"])
    at: Any = pc.index_in(audience[campaign.key].combine_chunks(), outcomes[campaign.key].combine_chunks())
    table = audience.append_column("converted", outcomes["converted"].take(at))
    return table.filter(pc.is_valid(table["converted"])).select(
        [campaign.key, "snapshot", "group", "probability", "decile", "cost", "converted"]
    )


def _compared(table: pa.Table, key: str, treated: NDArray[np.bool_]) -> Compared:
    entity: Any = table[key].combine_chunks().dictionary_encode().indices
    return Compared(
        y=table["converted"].cast("float64").to_numpy(),
        treated=treated,
        p=table["probability"].to_numpy(),
        entity=entity.to_numpy().astype(np.int64),
        cost=table["cost"].to_numpy(),
    )


def _published(record: dict[str, Any], campaign: Campaign, home: Home) -> dict[str, Any]:
    publish_text(json.dumps(record, indent=1), home.reports(campaign.name) / "earned.json")
    return record
