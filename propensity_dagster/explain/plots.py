"""Plots of explanations: shap's beeswarm, bar, dependence and waterfall, and partial dependence with ICE."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from propensity_dagster.data.lake import publishing
from propensity_dagster.explain.summary import Explained
from propensity_dagster.models.dataset import CATEGORY
from propensity_dagster.wording import words

_SHOWN, _DEPENDENCE = 12, 4
_LINE, _BAND = "#0072B2", "#BBBBBB"


def publish_explanation_plots(explained: Explained, folder: Path) -> list[Path]:
    """Draw everything into `folder`, and return the files. Where there is nothing to draw the picture says so."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Whatever was drawn before in this process must not show; the warnings are of shap's colour maps and layouts.
    with plt.style.context(["default", {"font.size": 9}]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import shap

        np.random.seed(0)  # shap's jitter has no other seed: the same explanations give the same bytes
        explanation = shap.Explanation(
            explained.contributions.values,
            base_values=np.full(len(explained.X), explained.contributions.base),
            data=explained.X,
            feature_names=[_label(feature.name) for feature in explained.features],
        )
        title = f"{explained.record['campaign']}: {explained.record['model'].replace('_', ' ')}"
        files = [
            _summary(shap, plt, explained, explanation, folder / "explanations_summary.png", title),
            _scatter(shap, plt, explained, explanation, folder / "explanations_dependence.png", title),
            _partial(plt, explained, folder / "explanations_partial.png", title),
        ]
        for name, row in typical_rows(explained).items():
            files.append(_waterfall(shap, plt, explained, row, name, folder))
    return files


def typical_rows(explained: Explained) -> dict[str, int]:
    """Three customers: the surest, the one nearest to the mean, the most unlikely."""
    p = explained.probability
    return {"sure": int(p.argmax()), "average": int(np.abs(p - p.mean()).argmin()), "unlikely": int(p.argmin())}


def _label(name: str) -> str:
    return "\n".join(textwrap.wrap(name.replace("_", " "), 26))


def _moved(explained: Explained) -> bool:
    return bool(np.abs(explained.contributions.values).any())


def _summary(shap: Any, plt: Any, explained: Explained, explanation: Any, file: Path, title: str) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    if _moved(explained):
        shown = min(_SHOWN, explained.X.shape[1])
        order = explained.contributions.order[:shown]
        shap.plots.beeswarm(
            explanation[:, order], max_display=shown, show=False, ax=left, plot_size=None, color=plt.get_cmap("cividis")
        )
        left.set(xlabel="contribution to the log-odds of converting", title="Each dot is a customer")
        draw_importance(right, explained.record["features"][:shown])
        right.spines[["top", "right"]].set_visible(False)
    else:
        _nothing(left, "no feature moves the score: the model gives everybody the same")
        right.set_axis_off()
    figure.suptitle(f"{title} on {explained.record['rows']:,} test rows")
    return _save(plt, figure, file)


def _scatter(shap: Any, plt: Any, explained: Explained, explanation: Any, file: Path, title: str) -> Path:
    order = explained.contributions.order
    chosen = [i for i in order if explained.features[i].kind != CATEGORY][:_DEPENDENCE] if _moved(explained) else []
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axes, i in zip(grid.flat, chosen, strict=False):
        known = explained.X[:, i][~np.isnan(explained.X[:, i])]
        low, high = np.quantile(known, [0.005, 0.995]) if len(known) else (0.0, 1.0)
        shap.plots.scatter(explanation[:, i], show=False, ax=axes, color=_LINE, alpha=0.25, hist=True)
        if high > low:
            axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        axes.set(xlabel=explained.features[i].name.replace("_", " "), ylabel="contribution (log-odds)")
    for axes in list(grid.flat)[len(chosen) :]:
        _nothing(axes, "no further number moves the score")
    figure.suptitle(f"{title}: what each value contributes (grey: how many customers have it)")
    return _save(plt, figure, file)


def _partial(plt: Any, explained: Explained, file: Path, title: str) -> Path:
    curves = explained.record["dependence"]
    figure, grid = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for axes, curve in zip(grid.flat, curves, strict=False):
        draw_dependence(axes, curve)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(curves) :]:
        _nothing(axes, "no further number moves the score" if curves else "no number moves the score")
    figure.suptitle(
        f"{title}: the mean probability if all had this value (thick), and of single customers (thin)\n"
        "Ticks are the deciles of the data; the curve ends where the data end, at the 1st and 99th percentile"
    )
    return _save(plt, figure, file)


def draw_importance(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars of rows of a record that have a `mean_absolute` and a `feature` or `name`, the largest first."""
    for y, row in enumerate(rows[::-1]):
        size = row["mean_absolute"]
        axes.barh(y, size["value"], color=_LINE)
        axes.plot([size["low"], size["high"]], [y, y], color="black", linewidth=1.2)
    axes.set_yticks(range(len(rows)), [_label(row.get("feature") or row["name"]) for row in rows[::-1]])
    axes.set(xlabel="mean absolute contribution, with 95% intervals", title="Importance")


def draw_dependence(axes: Any, curve: Mapping[str, Any]) -> None:
    """Partial dependence (thick), ICE (thin) and the deciles of the data (ticks) of one feature of a record."""
    for line in curve["curves"]:
        axes.plot(curve["grid"], np.array(line) * 100, color=_BAND, linewidth=0.5, alpha=0.6)
    axes.plot(curve["grid"], np.array(curve["mean"]) * 100, color=_LINE, linewidth=2.2)
    bottom = axes.get_ylim()[0]
    inside = [d for d in curve["deciles"] if curve["grid"][0] <= d <= curve["grid"][-1]]
    axes.plot(inside, [bottom] * len(inside), "|", color="black", markersize=12)
    notes = [f"{curve['missing']:.0%} have no value"] if curve["missing"] >= 0.005 else []
    if curve["outside_the_curve"] > 0.025:
        notes.append(f"{curve['outside_the_curve']:.0%} lie outside the curve")
    axes.set(xlabel=curve["feature"].replace("_", " "), ylabel="probability (%)")
    axes.set_title("; ".join(notes), fontsize=9)
    axes.set_ylim(bottom=min(bottom, 0))


def _waterfall(shap: Any, plt: Any, explained: Explained, index: int, name: str, folder: Path) -> Path:
    shown = [words(f.value(value)) for f, value in zip(explained.features, explained.X[index], strict=True)]
    row = shap.Explanation(
        explained.contributions.values[index],
        base_values=explained.contributions.base,
        data=np.array(shown, dtype=object),
        feature_names=[_label(feature.name) for feature in explained.features],
    )
    shap.plots.waterfall(row, max_display=10, show=False)
    figure = plt.gcf()
    figure.set_size_inches(9, 5.5)
    names = {"sure": "The surest customer", "average": "A customer near the mean", "unlikely": "The most unlikely"}
    figure.suptitle(
        f"{names[name]}: probability {explained.probability[index]:.2%}. Contributions in log-odds,\n"
        "from E[f(X)], where everybody starts, to f(x), this score",
        y=1.04,
    )
    return _save(plt, figure, folder / f"explanations_{name}.png")


def _nothing(axes: Any, words: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", wrap=True)


def _save(plt: Any, figure: Any, file: Path) -> Path:
    with publishing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file
