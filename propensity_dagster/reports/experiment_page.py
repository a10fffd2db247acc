"""Pages that a marketer reads: what an experiment showed, and what contacts earned.

Belongs here: from a record to words and pictures. Does not: any statistic.
"""

from pathlib import Path
from typing import Any

import numpy as np

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.campaign_sections import Experiment
from propensity_dagster.data.lake import Home, publish_text
from propensity_dagster.experiments.earned import MIN_EACH
from propensity_dagster.reports.plots import svg_plot
from propensity_dagster.reports.rendering import money, template

EARNED_PAGE = "earned.html"
_AUDIENCES = 30


def publish_experiment_page(campaign: EventCampaign, name: str, record: dict[str, Any], home: Home) -> Path:
    """Write the page of an experiment, and return it."""
    experiment = campaign.experiments[name]
    metrics = record.get("metrics")
    content = {
        "campaign": campaign,
        "name": name,
        "experiment": experiment,
        "horizon": experiment.horizon_days or campaign.outcome.horizon_days,
        "record": record,
        "words": record["recommendation"],
        "primary": metrics[experiment.primary] if metrics else None,
        "svg": svg_plot(name, lambda axes: _draw_lifts(axes, experiment, metrics), _height(metrics)) if metrics else "",
    }
    file = home.reports(campaign.name) / f"experiment_{name}.html"
    publish_text(template("experiment.html").render(content), file)
    return file


def publish_earned_page(campaign: Campaign, record: dict[str, Any], home: Home) -> Path:
    """Write the page of what contacts earned, and return it."""
    total = record.get("total")
    rows = record.get("snapshots", [])[-_AUDIENCES:]
    known = [row for row in rows if row["incremental_conversions"] is not None]
    content = {
        "campaign": campaign,
        "record": record,
        "total": total,
        "sentence": describe_earned(record),
        "good": bool(total and total["incremental_profit"] and total["incremental_profit"]["low"] > 0),
        "few": MIN_EACH,
        "svg": svg_plot("earned", lambda axes: _draw_ledger(axes, known)) if known else "",
    }
    file = home.reports(campaign.name) / EARNED_PAGE
    publish_text(template("earned.html").render(content), file)
    return file


def describe_earned(record: dict[str, Any]) -> str:
    """What contacts earned, in one sentence."""
    total = record.get("total")
    if total is None:
        waiting = len(record["waiting"])
        if not waiting:
            return "Nobody has been contacted yet."
        return (
            f"Not known yet: {waiting} audience{'s' if waiting > 1 else ''} wait for the end of their outcome window."
        )
    profit = total["incremental_profit"]
    if profit is None:
        return f"Too few were held back, or converted, to tell: {MIN_EACH} conversions are needed on each side."
    amount = f"{money(profit['value'])} ({money(profit['low'])} to {money(profit['high'])})"
    if profit["low"] > 0:
        return f"The contacts earned {amount} beyond what would have come anyway, after their cost."
    if profit["high"] < 0:
        return f"The contacts lost money: {amount}. Most of those who bought would have bought anyway."
    return f"It cannot be told yet whether the contacts earned anything: {amount} after their cost."


def _height(metrics: dict[str, Any]) -> float:
    return 1.2 + 0.35 * sum(len(found["variants"]) for found in metrics.values() if found)


def _draw_lifts(axes: Any, experiment: Experiment, metrics: dict[str, Any]) -> None:
    rows = [
        (name, variant, row)
        for name, found in metrics.items()
        if found is not None
        for variant, row in found["variants"].items()
    ]
    several = len(experiment.variants) > 2
    for y, (name, _, row) in enumerate(rows):
        colour = "#0072B2" if name == experiment.primary else "#555555"
        once, always = row["lift"], row["lift_always"]
        axes.plot([100 * always["low"], 100 * always["high"]], [y, y], color=colour, linewidth=1)
        axes.plot([100 * once["low"], 100 * once["high"]], [y, y], color=colour, linewidth=5, alpha=0.4)
        axes.plot(100 * once["value"], y, "o", color=colour, markersize=5)
    axes.axvline(0, color="#999999", linewidth=0.8)
    words = [name.replace("_", " ") + (f", {variant}" if several else "") for name, variant, _ in rows]
    axes.set_yticks(range(len(rows)), words)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=f"change against {experiment.control} (%)")


def _draw_ledger(axes: Any, rows: list[dict[str, Any]]) -> None:
    x = np.arange(len(rows))
    expected = [row["expected"] for row in rows]
    value, low, high = (np.array([row["incremental_conversions"][p] for row in rows]) for p in ("value", "low", "high"))
    axes.plot(x, expected, "_", color="#0072B2", markersize=9, label="expected of the contacted")
    axes.errorbar(
        x, value, yerr=[value - low, high - value], fmt="o", color="#D55E00", capsize=3, markersize=4,
        label="because of the contact",
    )  # fmt: skip
    axes.axhline(0, color="#999999", linewidth=0.8)
    ticks = range(0, len(rows), max(1, -(-len(rows) // 6)))
    axes.set_xticks(list(ticks), [rows[i]["snapshot"] for i in ticks], fontsize=7, rotation=20)
    axes.set(ylabel="conversions")
    axes.legend(frameon=False, fontsize=8)
