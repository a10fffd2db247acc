"""Features and labels computed with plain loops, one entity and one event at a time. Slow and obvious."""

import math
from datetime import date, datetime, timedelta
from itertools import pairwise

WINDOWS = (7, 30)
HORIZON = 14
MONTH = 30.4375


def reference(world, as_of: date, late_days: int = 0) -> dict[str, dict]:
    """Expected feature rows, and `converted`, by key. `world` is a `World` of test_features."""
    t = datetime(as_of.year, as_of.month, as_of.day)
    cut = t - timedelta(days=late_days)
    found = {}
    for entity in world.customers:
        key = entity["customer_id"]
        if entity["signup_at"] >= t:
            continue
        visible = {name: _visible(world.streams[name], key, t, cut) for name in world.streams}
        if not _eligible(entity, visible, t, cut):
            continue
        days = (as_of - entity["signup_at"].date()).days
        row = {"tenure_months": days / MONTH, "age": entity["age"], "country": entity["country"]}
        row |= _orders(visible["orders"], t, cut)
        row |= _emails(visible["emails"], t, cut)
        row["converted"] = any(
            e["customer_id"] == key and t <= e["time"] < t + timedelta(days=HORIZON) for e in world.streams["orders"]
        )
        found[key] = row
    return found


def _visible(events, key, t, cut):
    return [e for e in events if e["customer_id"] == key and e["time"] < cut and e["ingested_at"] < t]


def _eligible(entity, visible, t, cut):
    if t.date() - entity["signup_at"].date() <= timedelta(days=60):
        return True
    return any(e["time"] >= cut - timedelta(days=60) for events in visible.values() for e in events)


def _within(events, cut, window):
    return [e for e in events if window is None or e["time"] >= cut - timedelta(days=window)]


def _days_since(t, events):
    return (t.date() - max(e["time"] for e in events).date()).days if events else None


def _orders(events, t, cut):
    row = {"orders_recency_days": _days_since(t, events)}
    first = min((e["time"].date() for e in events), default=None)
    row["orders_first_days"] = (t.date() - first).days if first else None
    for window in (*WINDOWS, None):
        chosen, suffix = _within(events, cut, window), f"{window}d" if window else "all"
        amounts = [e["amount"] for e in chosen]
        row[f"orders_count_{suffix}"] = len(chosen)
        row[f"orders_amount_sum_{suffix}"] = sum(amounts) / 100
        row[f"orders_amount_mean_{suffix}"] = sum(amounts) / (100 * len(amounts)) if amounts else None
        row[f"orders_amount_max_{suffix}"] = max(amounts) / 100 if amounts else None
    longest = _within(events, cut, WINDOWS[-1])
    days = sorted({e["time"].date() for e in longest})
    row["orders_active_days_30d"] = len(days)
    row["orders_category_distinct_30d"] = len({e["category"] for e in longest if e["category"] is not None})
    age, since = row["orders_first_days"], row["orders_recency_days"]
    row["orders_rate_all"] = len(events) * 30 / age if events else None
    row["orders_recency_share"] = since / age if events else None
    gaps = [(b - a).days for a, b in pairwise(days)]
    mean = sum(gaps) / len(gaps) if gaps else None
    row["orders_gap_mean_days"] = mean
    row["orders_gap_std_days"] = (
        math.sqrt(sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1)) if len(gaps) > 1 else None
    )
    row["orders_overdue_ratio"] = since / mean if gaps else None
    short, long = (row[f"orders_count_{w}d"] for w in WINDOWS)
    row["orders_momentum_7d_30d"] = (short * 30) / (long * 7) if long else None
    return row


def _emails(events, t, cut):
    opened = [e for e in events if e["type"] == "open"]
    row = {"emails_recency_days": _days_since(t, events), "emails_open_recency_days": _days_since(t, opened)}
    for window in (*WINDOWS, None):
        chosen, suffix = _within(events, cut, window), f"{window}d" if window else "all"
        sent = sum(e["type"] == "sent" for e in chosen)
        opens = sum(e["type"] == "open" for e in chosen)
        row[f"emails_sent_count_{suffix}"], row[f"emails_open_count_{suffix}"] = sent, opens
        row[f"emails_open_rate_{suffix}"] = opens / sent if sent else None
    return row
