"""The page that says whether to choose by uplift or by propensity, and why.

Belongs here: from the record to words and pictures. Does not: any statistic.
"""

from pathlib import Path
from typing import Any

import numpy as np

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.lake import Home, publish_text
from propensity_dagster.reports.plots import svg_plot
from propensity_dagster.reports.rendering import template

UPLIFT_PAGE = "uplift.html"


def publish_uplift_page(campaign: Campaign, record: dict[str, Any], home: Home) -> Path:
    """Write the page, and return it."""
    content = {
        "campaign": campaign,
        "record": record,
        "treatment": campaign.treatment,
        "sentence": describe_uplift(record),
        "c": record["comparability"],
        "points": _points,
        "figures": {
            "curve": svg_plot("uplift-curve", lambda axes: _draw_curve(axes, record)),
            "tenths": svg_plot("uplift-tenths", lambda axes: _draw_tenths(axes, record)),
        },
    }
    file = home.reports(campaign.name) / UPLIFT_PAGE
    publish_text(template("uplift.html").render(content), file)
    return file


def describe_uplift(record: dict[str, Any]) -> str:
    """The decision and its reason, in one sentence."""
    decision = record["decision"]
    d = decision["difference"]
    numbers = f"the Qini differs by {d['value']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})"
    if decision["rank_by"] == "uplift":
        return f"Choose by uplift: out of sample it finds better than propensity whom the treatment changes; {numbers}."
    if d["high"] < 0:
        return f"Choose by propensity: it is the better policy; {numbers} against uplift."
    return f"Choose by propensity: uplift has not been shown to be better; {numbers}."


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.2f}"


def _draw_curve(axes: Any, record: dict[str, Any]) -> None:
    for name, colour in (("uplift", "#0072B2"), ("propensity", "#D55E00")):
        share, gain = (100 * np.array(values) for values in record["curves"][name])
        axes.plot(share, gain, color=colour, label=name)
    axes.plot([0, 100], [0, gain[-1]], color="#999999", linewidth=0.8, label="random order")
    axes.set(xlabel="customers treated, best first (%)", ylabel="conversions gained, of 100 treated")
    axes.legend(frameon=False, fontsize=8)


def _draw_tenths(axes: Any, record: dict[str, Any]) -> None:
    x = np.array([row["tenth"] for row in record["tenths"]])
    value, low, high = (
        100 * np.array([row["observed"][part] for row in record["tenths"]], dtype=float)
        for part in ("value", "low", "high")
    )
    axes.errorbar(
        x, value, yerr=[value - low, high - value], fmt="o", color="#0072B2", capsize=3, markersize=4, label="observed"
    )
    axes.plot(
        x, [100 * row["predicted"] for row in record["tenths"]], "_", color="#555555", markersize=10, label="foretold"
    )
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xticks(x)
    axes.set(xlabel="tenth of the ranking", ylabel="uplift (points)")
    axes.legend(frameon=False, fontsize=8)
