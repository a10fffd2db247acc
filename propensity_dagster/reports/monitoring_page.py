"""The monitoring page of a campaign: should I trust tonight's scores? One HTML file that needs nothing but a browser.

Belongs here: from the tables of monitoring to words and pictures. Does not: what is a finding.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.lake import Home, publish_text
from propensity_dagster.monitoring.alerts import PAGE, Alert, read_alerts
from propensity_dagster.monitoring.drift import DISTRIBUTION, DRIFT, SCORE, TRAINING, read_drift
from propensity_dagster.monitoring.drift_report import REPORT as DRIFT_REPORT
from propensity_dagster.monitoring.findings import Finding, Verdict, told_severity
from propensity_dagster.monitoring.ledger import HINDSIGHT, MATURE, WAITING
from propensity_dagster.monitoring.quality import read_quality
from propensity_dagster.reports.plots import svg_plot
from propensity_dagster.reports.rendering import template

_SNAPSHOTS, _COLUMNS, _LEDGER_ROWS, _ALERTS = 60, 20, 30, 30
_STATES = {MATURE: "", WAITING: "outcome window not over", HINDSIGHT: "scored in hindsight: not counted"}
_PROBLEMS = {"level": "too many or too few", "spread": "too extreme or too flat", "ranking": "order lost"}


def publish_monitoring_page(
    campaign: Campaign,
    snapshot: date,
    answer: Verdict,
    findings: Sequence[Finding],
    ledger: Sequence[dict[str, Any]],
    unknowable: str | None,
    home: Home,
) -> Path:
    """Write the page as of a snapshot, and return it."""
    shown = list(ledger)[-_SNAPSHOTS:]
    alerts = read_alerts(home, campaign.name)
    drift = _drift_over_time(campaign, snapshot, home)
    judged = [row for row in shown if row["state"] == MATURE]
    content = {
        "campaign": campaign,
        "snapshot": snapshot,
        "verdict": answer,
        "findings": findings,
        "tonight": next((row for row in reversed(ledger) if row["snapshot"] == snapshot), None),
        "ledger": list(reversed(shown))[:_LEDGER_ROWS],
        "more_rows": max(len(ledger) - _LEDGER_ROWS, 0),
        "states": _STATES,
        "problems": _PROBLEMS,
        "unknowable": unknowable,
        "judged": judged,
        "quality": read_quality(campaign, snapshot, home),
        "alerts": alerts[:_ALERTS],
        "drift_report": DRIFT_REPORT if (home.reports(campaign.name) / DRIFT_REPORT).exists() else None,
        "figures": _figures(shown, judged, drift, alerts),
        "contact": campaign.contact,
    }
    file = home.reports(campaign.name) / PAGE
    publish_text(template("monitoring.html").render(content), file)
    return file


def _drift_over_time(campaign: Campaign, snapshot: date, home: Home) -> dict[date, list[dict[str, Any]]]:
    days = [d for d in home.lake(campaign.name).partitions(DRIFT, "snapshot") if d <= snapshot][-_SNAPSHOTS:]
    found = {day: read_drift(campaign, day, home) for day in days}
    return {
        day: [r for r in rows if r["against"] == TRAINING and r["measure"] == DISTRIBUTION]
        for day, rows in found.items()
    }


def _figures(
    ledger: Sequence[Mapping[str, Any]],
    judged: Sequence[Mapping[str, Any]],
    drift: Mapping[date, Sequence[Mapping[str, Any]]],
    alerts: Sequence[Alert],
) -> dict[str, str]:
    """Drawings by name; "" where there is nothing to draw."""

    def drawn(name: str, draw: Callable[..., None], *content: Any, height: float = 3.2) -> str:
        return svg_plot(name, lambda axes: draw(axes, *content), height) if content[0] else ""

    columns = _columns(drift)
    return {
        "scores": drawn("scores", _draw_scores, ledger),
        "conversions": drawn("conversions", _draw_conversions, ledger),
        "calibration": drawn("calibration", _draw_ratio, judged),
        "ranking": drawn("ranking", _draw_ranking, ledger),
        "drift": drawn("drift", _draw_drift, drift, columns, height=1.2 + 0.2 * len(columns)),
        "alerts": drawn("alerts", _draw_alerts, alerts[:_ALERTS], height=1.2 + 0.2 * min(len(alerts), _ALERTS)),
    }


def _columns(drift: Mapping[date, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The scores, then the columns that moved most at any time."""
    largest: dict[str, float] = {}
    for rows in drift.values():
        for row in rows:
            beyond = row["value"] - (row["usual"] or 0.0)
            largest[row["column"]] = max(largest.get(row["column"], -np.inf), beyond)
    ranked = sorted((c for c in largest if c != SCORE), key=lambda c: -largest[c])[:_COLUMNS]
    return [SCORE, *ranked] if SCORE in largest else ranked


def _dates(axes: Any, days: Sequence[date]) -> Any:
    """Positions of snapshots, a tick at about six of them."""
    ordered = sorted(set(days))
    at = {day: i for i, day in enumerate(ordered)}
    ticks = range(0, len(ordered), max(1, -(-len(ordered) // 6)))
    axes.set_xticks(list(ticks), [str(ordered[i]) for i in ticks], fontsize=7, rotation=20)
    axes.set_xlim(-0.6, len(ordered) - 0.4)
    return np.array([at[day] for day in days])


def _legend(axes: Any) -> None:
    """Above what is drawn, not over it."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3 if axes.get_yscale() == "log" else high + 0.3 * (high - low))
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)


def _draw_scores(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    newest = list({row["snapshot"]: row for row in rows}.values())
    x = _dates(axes, [row["snapshot"] for row in newest])
    p = {name: np.array([row[name] for row in newest]) * 100 for name in ("p05", "p25", "p50", "p75", "p95")}
    for low, high, alpha, words in (("p05", "p95", 0.15, "90% of customers"), ("p25", "p75", 0.3, "half of them")):
        axes.vlines(x, p[low], p[high], color="#0072B2", alpha=alpha, linewidth=7, label=words)
    axes.plot(x, p["p50"], color="#0072B2", marker="o", markersize=3, label="median")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(ylabel="probability (%)", title="Scores of each snapshot")
    _legend(axes)


def _draw_conversions(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    x = _dates(axes, [row["snapshot"] for row in rows])
    value, low, high = (np.array([row[f"promised_conversions{p}"] for row in rows]) for p in ("", "_low", "_high"))
    axes.errorbar(x, value, yerr=[value - low, high - value], fmt="none", ecolor="#0072B2", elinewidth=5, alpha=0.35)
    axes.plot(x, value, "_", color="#0072B2", markersize=9, label="promised, with 95% interval")
    for state, marker, words in ((MATURE, "o", "happened"), (HINDSIGHT, "x", "happened, scored in hindsight")):
        at = [i for i, row in enumerate(rows) if row["state"] == state]
        if at:
            axes.plot(x[at], [rows[i]["converted"] for i in at], marker, color="#D55E00", markersize=5, label=words)
    axes.set_ylim(bottom=0)
    axes.set(ylabel="conversions", title="Promised and happened")
    _legend(axes)


def _draw_ratio(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    x = _dates(axes, [row["snapshot"] for row in rows])
    names = (
        "realised_calibration_intercept",
        "realised_calibration_intercept_low",
        "realised_calibration_intercept_high",
    )
    value, low, high = (np.array([row[n] for row in rows], dtype=float) for n in names)
    axes.errorbar(x, value, yerr=[value - low, high - value], fmt="o", color="#0072B2", capsize=3, markersize=4)
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set(ylabel="log-odds that were missing", title="Calibration: 0 is right, above it too low")


def _draw_ranking(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    x = _dates(axes, [row["snapshot"] for row in rows])
    value, low, high = (
        np.array([np.nan if row[f"promised_auc{p}"] is None else row[f"promised_auc{p}"] for row in rows], dtype=float)
        for p in ("", "_low", "_high")
    )
    axes.errorbar(x, value, yerr=[value - low, high - value], fmt="none", ecolor="#0072B2", elinewidth=5, alpha=0.35)
    axes.plot(x, value, "_", color="#0072B2", markersize=9, label="promised")
    at = [i for i, row in enumerate(rows) if row["state"] == MATURE and row["realised_auc"] is not None]
    if at:
        found = [[rows[i][f"realised_auc{p}"] for i in at] for p in ("", "_low", "_high")]
        middle, lower, upper = (np.array(part, dtype=float) for part in found)
        axes.errorbar(
            x[at] + 0.15, middle, yerr=[middle - lower, upper - middle], fmt="o", color="#D55E00", markersize=4,
            label="happened",
        )  # fmt: skip
    axes.set(ylabel="AUC", title="Ranking")
    _legend(axes)


def _draw_drift(axes: Any, drift: Mapping[date, Sequence[Mapping[str, Any]]], columns: Sequence[str]) -> None:
    days = list(drift)
    grid = np.full((len(columns), len(days)), np.nan)
    place = {column: i for i, column in enumerate(columns)}
    marks: list[tuple[int, int, str]] = []
    for j, rows in enumerate(drift.values()):
        for row in rows:
            i = place.get(row["column"])
            if i is not None:
                grid[i, j] = row["value"]
                if row["severity"] != "none":
                    marks.append((j, i, "■" if told_severity(row) == "alert" else "□"))
    axes.imshow(np.minimum(grid, 0.5), cmap="Greys", vmin=0, vmax=0.5, aspect="auto", interpolation="nearest")
    for j, i, mark in marks:
        axes.text(j, i, mark, ha="center", va="center", color="#D55E00", fontsize=7)
    axes.set_yticks(range(len(columns)), [c.replace("_", " ") for c in columns], fontsize=7)
    _dates(axes, days)
    axes.set_title("Stability index (black: 0.5)  ■ alert  □ warning", loc="right")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _draw_alerts(axes: Any, alerts: Sequence[Alert]) -> None:
    newest_first = list(alerts)
    days = sorted({day for a in newest_first for day in (a.snapshot, a.last_snapshot)})
    at = {day: i for i, day in enumerate(days)}
    for y, alert in enumerate(reversed(newest_first)):
        grave = alert.finding.severity == "alert"
        colour = "#D55E00" if grave else "#E69F00"
        start, end = at[alert.snapshot], at[alert.last_snapshot]
        axes.plot([start, end], [y, y], color=colour, linewidth=4 if grave else 2, solid_capstyle="butt")
        axes.plot(start, y, "o", color=colour, markersize=5)
        if alert.resolved_at is None:
            axes.plot(end, y, ">", color=colour, markersize=7)
    words = [a.finding.key.replace("_", " ") for a in reversed(newest_first)]
    axes.set_yticks(range(len(words)), words, fontsize=7)
    axes.set_ylim(-0.7, len(words) - 0.3)
    _dates(axes, days)
    axes.set_title("Alerts: ▸ still open; thick is an alert, thin a warning", loc="right")
