"""Plots of an evaluation, legible in grey and for colour-blind readers (Okabe and Ito's palette)."""

import base64
import io
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from propensity_dagster.data.lake import publishing

_STYLES = {
    "ensemble": ("#0072B2", "-"),
    "lightgbm": ("#E69F00", "--"),
    "neural_network": ("#009E73", "-."),
    "logistic_regression": ("#CC79A7", ":"),
    "champion": ("#56B4E9", (0, (5, 1))),
    "baseline": ("#7F7F7F", (0, (1, 1))),
    "oracle": ("#000000", (0, (3, 1, 1, 1, 1, 1))),
}
_WORDS = {
    "logistic_regression": "logistic regression",
    "lightgbm": "LightGBM",
    "neural_network": "neural network",
    "oracle": "best possible (oracle)",
    "champion": "present champion",
}
_DPI = 110
_SMALL_DPI = 64


def publish_plots(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the plots of the evaluation record whose curves lie in `folder` as PNG; return the files.

    `overview.png` holds the four that answer most questions, small enough to be shown inline.
    """
    drawn = {name: PLOTS[name] for name in ("gain", "lift", "calibration", "models")}
    files: list[Path] = []
    with _style() as plt:
        for name, draw in drawn.items():
            figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
            draw(axes, record, folder)
            files.append(_save(plt, figure, folder / f"{name}.png", _DPI))
        figure, grid = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
        for axes, draw in zip(grid.flat, drawn.values(), strict=True):
            draw(axes, record, folder)
        figure.suptitle(f"{record['campaign']}: {record['rows']:,} test rows, {record['converted']:,} converted")
        files.append(_save(plt, figure, folder / "overview.png", _SMALL_DPI))
    return files


def svg_plot(salt: str, draw: Callable[[Any], None], height: float = 3.5) -> str:
    """What `draw` puts on the axes it is given, as an SVG element that scales with the page.

    Equal drawings with equal `salt` give equal bytes; on one page each needs its own.
    """
    with _style({"svg.fonttype": "none", "svg.hashsalt": salt}) as plt:
        figure, axes = plt.subplots(figsize=(4.8, height), layout="constrained")
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        plt.close(figure)
    svg = buffer.getvalue()
    svg = re.sub(
        r'<svg ([^>]*?)width="[^"]*" ', r"<svg \1", re.sub(r'height="[^"]*" ', "", svg[svg.index("<svg") :], count=1)
    )
    # The page's own font: a reader's machine need not have matplotlib's.
    return re.sub(r"font: ([^;]*?)(\d[\d.]*px) '[^;]*?(;|\")", r"font: \1\2 sans-serif\3", svg)


def drawn(draws: Sequence[Callable[[Any], None]], width: float = 5.5, height: float = 3.8, columns: int = 2) -> Any:
    """A matplotlib figure with one picture for each of `draws`, which are called with its axes."""
    across = min(columns, len(draws))
    down = -(-len(draws) // across)
    with _style() as plt:
        figure, grid = plt.subplots(
            down, across, figsize=(width * across, height * down), layout="constrained", squeeze=False
        )
        for axes, draw in zip(grid.flat, draws, strict=False):
            draw(axes)
        for axes in list(grid.flat)[len(draws) :]:
            axes.set_axis_off()
        plt.close(figure)
    return figure


@contextmanager
def _style(more: dict[str, Any] | None = None) -> Generator[Any]:
    """pyplot without a display, whatever was drawn before in this process."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, **(more or {})}
    with plt.style.context(["default", own]):
        yield plt


def inline_image(file: Path) -> str:
    """Markdown that shows a PNG inside the Dagster UI, without a file server."""
    return f"![{file.stem}](data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()})"


def _save(plt: Any, figure: Any, file: Path, dpi: int) -> Path:
    with publishing(file) as temporary:
        # Without the software's name the same evaluation gives the same bytes.
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    return file


def _shown(record: dict[str, Any]) -> list[str]:
    """Models in the order of the legend, the best first."""
    named = [name for name in record["models"] if name in _STYLES]
    return sorted(named, key=lambda name: record["models"][name]["log_loss"]["value"])


def _curves(folder: Path, table: str, model: str) -> dict[str, np.ndarray]:
    found = pq.read_table(folder / f"{table}.parquet", filters=[("model", "=", model)])
    return {name: found[name].to_numpy() for name in found.column_names if name != "model"}


def label(name: str) -> str:
    """What a model is called in plots and tables."""
    return _WORDS.get(name, name.replace("_", " "))


def _colour(name: str) -> tuple[str, Any]:
    return _STYLES.get(name, ("#7F7F7F", "-"))


def _gain(axes: Any, record: dict[str, Any], folder: Path) -> None:
    for name in _shown(record):
        curve = _curves(folder, "gain_curve", name)
        colour, style = _STYLES[name]
        x, y = np.append(0, curve["contacted"]), np.append(0, curve["converters_found"])
        axes.plot(x * 100, y * 100, color=colour, linestyle=style, label=label(name))
    band = _curves(folder, "deciles", record["challenger"])
    x, low, high = (np.append(0, band[part]) * 100 for part in ("contacted", "recall_low", "recall_high"))
    axes.fill_between(x, low, high, color=_colour(record["challenger"])[0], alpha=0.15, linewidth=0)
    axes.plot([0, 100], [0, 100], color="#999999", linewidth=0.8)
    axes.annotate("at random", (62, 55), color="#666666", rotation=35)
    axes.set(xlabel="customers contacted, best first (%)", ylabel="converters found (%)", title="Gain")
    axes.legend(frameon=False, loc="lower right", fontsize=8)


def _lift(axes: Any, record: dict[str, Any], folder: Path) -> None:
    name = record["challenger"]
    rows = _curves(folder, "deciles", name)
    recall = rows["recall"]
    rate = np.diff(recall, prepend=0) * 10
    axes.bar(np.arange(1, 11), rate, color=_colour(name)[0])
    for x, value in zip(np.arange(1, 11), rate, strict=True):
        axes.annotate(f"{value:.1f}", (x, value), ha="center", va="bottom", fontsize=8)
    axes.axhline(1, color="#555555", linewidth=0.8)
    axes.set_xticks(range(1, 11))
    axes.set(
        xlabel="tenth of customers, 1 has the highest scores",
        ylabel="conversion rate over the average",
        title=f"Lift of each tenth ({label(name)})",
    )


def _calibration(axes: Any, record: dict[str, Any], folder: Path) -> None:
    top = 0.0
    for name in [record["challenger"], "baseline"]:
        rows = _curves(folder, "calibration_curve", name)
        x, y, low, high = (rows[part] * 100 for part in ("mean_probability", "rate", "low", "high"))
        colour, style = _colour(name)
        axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=3, linewidth=1, label=label(name))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        top = max(top, float(np.nanmax(high)), float(x.max()))
    axes.plot([0, top], [0, top], color="#999999", linewidth=0.8)
    axes.annotate("forecast = converted", (top * 0.98, top), ha="right", va="bottom", color="#666666", fontsize=8)
    axes.set(xlabel="forecast probability (%)", ylabel="converted (%), with 95% band", title="Calibration")
    axes.legend(frameon=False, loc="upper left", fontsize=8)


def _distribution(axes: Any, record: dict[str, Any], folder: Path) -> None:
    del record
    found = pq.read_table(folder / "score_distribution.parquet")
    low, high, converters, others = (found[n].to_numpy() for n in ("low", "high", "converters", "others"))
    edges = np.append(low, high[-1])
    axes.stairs(others * 100, edges, fill=True, color="#BBBBBB", label="did not convert")
    axes.stairs(converters * 100, edges, color=_STYLES["ensemble"][0], linewidth=1.8, label="converted")
    ticks = np.array([1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999])
    at = np.log(ticks) - np.log1p(-ticks)
    shown = (at >= edges[0]) & (at <= edges[-1])
    axes.set_xticks(at[shown], [f"{100 * p:g}" for p in ticks[shown]])
    axes.set(xlabel="forecast probability (%), stretched at both ends", ylabel="share of the group (%)", title="Scores")
    axes.legend(frameon=False, fontsize=8)


def _profit(axes: Any, record: dict[str, Any], folder: Path) -> None:
    del folder
    rows = record["thresholds"]
    x = np.array([row["contacted"]["value"] for row in rows]) * 100
    value, low, high = (
        np.array([row["profit_per_thousand"][p] for row in rows], float) for p in ("value", "low", "high")
    )
    colour, style = _colour(record["challenger"])
    axes.plot(x, value, color=colour, linestyle=style, marker="o", markersize=3, label=label(record["challenger"]))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot([0, 100], [0, value[-1]], color="#999999", linewidth=0.8, label="at random")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="customers contacted, best first (%)", ylabel="profit per 1,000 customers", title="Money")
    axes.legend(frameon=False, fontsize=8)


def _periods(axes: Any, record: dict[str, Any], folder: Path, metric: str = "observed_over_expected") -> None:
    del folder
    names = list(record["periods"])
    found = [record["periods"][name][metric] for name in names]
    known = [(i, f) for i, f in enumerate(found) if f["value"] is not None]
    for i, f in known:
        low, high = (f["value"] if f[part] is None else f[part] for part in ("low", "high"))
        axes.errorbar(
            i, f["value"], yerr=[[f["value"] - low], [high - f["value"]]], fmt="o", color="#0072B2", capsize=3
        )
    if metric == "observed_over_expected":
        axes.axhline(1, color="#999999", linewidth=0.8)
    shown = [name.removesuffix(" of the test rows") for name in names]
    axes.set_xticks(range(len(names)), shown, fontsize=8, rotation=30 if len(names) > 4 else 0)
    axes.margins(x=0.15)
    words = {
        "observed_over_expected": "conversions / forecast",
        "auc": "AUC",
        "top_decile_lift": "lift of the best tenth",
    }
    axes.set(ylabel=words[metric], title=words[metric].capitalize() if metric != "auc" else "AUC")


def _models(axes: Any, record: dict[str, Any], folder: Path) -> None:
    del folder  # drawn from the record alone
    names = [*_shown(record), "constant"][::-1]
    for y, name in enumerate(names):
        loss = record["models"][name]["log_loss"]
        colour = _colour(name)[0]
        axes.errorbar(
            loss["value"], y, xerr=[[loss["value"] - loss["low"]], [loss["high"] - loss["value"]]],
            color=colour, marker="o", capsize=3,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.margins(y=0.1)
    axes.set(xlabel="log loss with 95% intervals (lower is better)", title="Models")


PLOTS: dict[str, Callable[..., None]] = {
    "gain": _gain,
    "lift": _lift,
    "calibration": _calibration,
    "models": _models,
    "distribution": _distribution,
    "profit": _profit,
    "periods": _periods,
}
