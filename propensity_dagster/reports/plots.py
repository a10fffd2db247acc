"""PNG plots of an evaluation, legible in grey and for colour-blind readers (Okabe and Ito's palette)."""

import base64
from collections.abc import Callable
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
    """Draw every plot of the evaluation record whose curves lie in `folder`; return the files.

    `overview.png` holds the four that answer most questions, small enough to be shown inline.
    """
    plots: dict[str, Callable[[Any, dict[str, Any], Path], None]] = {
        "gain": _gain,
        "lift": _lift,
        "calibration": _calibration,
        "models": _models,
    }
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    files = []
    for name, draw in plots.items():
        figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
        draw(axes, record, folder)
        files.append(_save(plt, figure, folder / f"{name}.png", _DPI))
    figure, grid = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axes, draw in zip(grid.flat, plots.values(), strict=True):
        draw(axes, record, folder)
    figure.suptitle(f"{record['campaign']}: {record['rows']:,} test rows, {record['converted']:,} converted")
    files.append(_save(plt, figure, folder / "overview.png", _SMALL_DPI))
    return files


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


def _label(name: str) -> str:
    return _WORDS.get(name, name)


def _gain(axes: Any, record: dict[str, Any], folder: Path) -> None:
    for name in _shown(record):
        curve = _curves(folder, "gain_curve", name)
        colour, style = _STYLES[name]
        x, y = np.append(0, curve["contacted"]), np.append(0, curve["converters_found"])
        axes.plot(x * 100, y * 100, color=colour, linestyle=style, label=_label(name))
    axes.plot([0, 100], [0, 100], color="#BBBBBB", linewidth=0.8)
    axes.annotate("at random", (62, 55), color="#777777", rotation=35)
    axes.set(xlabel="customers contacted, best first (%)", ylabel="converters found (%)", title="Gain")
    axes.legend(frameon=False, loc="lower right", fontsize=8)


def _lift(axes: Any, record: dict[str, Any], folder: Path) -> None:
    name = record["challenger"]
    rows = _curves(folder, "deciles", name)
    recall = rows["recall"]
    rate = np.diff(recall, prepend=0) * 10
    axes.bar(np.arange(1, 11), rate, color=_STYLES[name][0])
    for x, value in zip(np.arange(1, 11), rate, strict=True):
        axes.annotate(f"{value:.1f}", (x, value), ha="center", va="bottom", fontsize=8)
    axes.axhline(1, color="#555555", linewidth=0.8)
    axes.set_xticks(range(1, 11))
    axes.set(
        xlabel="tenth of customers, 1 has the highest scores",
        ylabel="conversion rate over the average",
        title=f"Lift of each tenth ({_label(name)})",
    )


def _calibration(axes: Any, record: dict[str, Any], folder: Path) -> None:
    top = 0.0
    for name in [record["challenger"], "baseline"]:
        rows = _curves(folder, "calibration_curve", name)
        rate, n = rows["rate"], rows["rows"]
        error = 1.96 * np.sqrt(rate * (1 - rate) / n)
        colour, style = _STYLES[name]
        axes.errorbar(
            rows["mean_probability"] * 100, rate * 100, yerr=error * 100, color=colour, linestyle=style,
            marker="o", markersize=3, linewidth=1, label=_label(name),
        )  # fmt: skip
        top = max(top, float(rate.max()), float(rows["mean_probability"].max()))
    axes.plot([0, top * 100], [0, top * 100], color="#BBBBBB", linewidth=0.8)
    axes.set(xlabel="forecast probability (%)", ylabel="converted (%), with 95% intervals", title="Calibration")
    axes.legend(frameon=False, loc="upper left", fontsize=8)


def _models(axes: Any, record: dict[str, Any], folder: Path) -> None:
    del folder  # drawn from the record alone
    names = [*_shown(record), "constant"][::-1]
    for y, name in enumerate(names):
        loss = record["models"][name]["log_loss"]
        colour = _STYLES.get(name, ("#7F7F7F", "-"))[0]
        axes.errorbar(
            loss["value"], y, xerr=[[loss["value"] - loss["low"]], [loss["high"] - loss["value"]]],
            color=colour, marker="o", capsize=3,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.margins(y=0.1)
    axes.set(xlabel="log loss on test snapshots, with 95% intervals (lower is better)", title="Models")
