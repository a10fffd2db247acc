"""Tables and figures of a campaign for notebooks: what a run left in the home folder, as pandas frames and pictures.

Features are looked at on training rows only: who looks at test rows begins to choose by them.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, EventCampaign, find_campaign
from propensity_dagster.data.days import rows_of_each
from propensity_dagster.data.lake import Home
from propensity_dagster.doctor.columns import auc_alone
from propensity_dagster.errors import ConfigError
from propensity_dagster.evaluation.bootstrap import Z95
from propensity_dagster.evaluation.splits import TRAIN
from propensity_dagster.explain.population import FeatureWords, describe_features, sample_rows
from propensity_dagster.features.snapshots import SPLITS, TRAINING_SET
from propensity_dagster.models.dataset import CATEGORY, Floats, pc, read_split
from propensity_dagster.models.ensemble import EnsembleScorer
from propensity_dagster.models.saved import load_model
from propensity_dagster.models.training import BASELINE, train_candidate
from propensity_dagster.reports.plots import PLOTS, drawn, label
from propensity_dagster.reports.summary import count_rows, newest_scores
from propensity_dagster.scoring.candidates import folds_of, read_evaluation, training_datasets
from propensity_dagster.wording import words as in_words

_GROUPS = 10
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F")
_LINES = ("-", "--", "-.", ":")
Draw = Callable[[Any], None]


def open_campaign(name: str) -> tuple[Campaign, Home]:
    """A campaign by name or file, and its home: PROPENSITY_HOME, else the nearest `.propensity` here or above.

    Raises:
        ConfigError: when there is no such campaign, or it has not been run.
    """
    campaign, home = find_campaign(name), Home.from_environment()
    if "PROPENSITY_HOME" not in os.environ:  # a notebook runs in its own folder
        found = [folder / ".propensity" for folder in (Path.cwd(), *Path.cwd().parents)]
        home = next((Home(folder) for folder in found if folder.is_dir()), home)
    if not (home.reports(campaign.name) / "evaluation.json").exists():
        raise ConfigError(f"{campaign.name} has not been run in {home.root}: run `propensity demo {name}` first")
    pd.set_option("display.max_colwidth", 240)  # sentences of reasons and findings are shown whole
    return campaign, home


# Data


def rows_read(campaign: Campaign, home: Home) -> pd.DataFrame:
    """Of each source table: rows read, good ones, those in quarantine, duplicates."""
    return pd.DataFrame(count_rows(campaign, home)).set_index("table")


def findings(campaign: Campaign, home: Home) -> pd.DataFrame:
    """What the doctor found in the run's data."""
    rows = [
        {"code": f["code"], "severity": f["severity"], "where": f["where"], "what, and what to do": _sentence(f)}
        for f in _diagnosis(campaign, home)["findings"]
    ]
    return pd.DataFrame(rows, columns=["code", "severity", "where", "what, and what to do"]).set_index("code")


def columns(campaign: Campaign, home: Home) -> pd.DataFrame:
    """Every column of the source: type, share of missing values, number of different ones, range or most frequent."""
    rows = [
        {"table": t["table"], "column": c["name"], "type": c["kind"], "missing": f"{c['missing']:.1%}",
         "different values": c["distinct"], "range or most frequent": c["typical"]}
        for t in _diagnosis(campaign, home)["tables"]
        for c in t["columns"]
    ]  # fmt: skip
    return pd.DataFrame(rows).set_index(["table", "column"])


def plot_events(campaign: Campaign, home: Home) -> Any:
    """Events of each log per day, as the mean of seven days. Past decisions have no days."""
    lake = home.lake(campaign.name)
    streams = list(campaign.source.streams) if isinstance(campaign, EventCampaign) else []

    def draw(axes: Any) -> None:
        for i, name in enumerate(streams):
            days = lake.partitions(f"validated_{name}", "day")
            counts = rows_of_each(lake.existing_days(f"validated_{name}", days))
            means = np.convolve(counts, np.ones(7) / 7, "valid")
            colour = _COLOURS[i % len(_COLOURS)]
            axes.plot(
                days[len(days) - len(means) :], means, color=colour, linestyle=_LINES[i % len(_LINES)], label=name
            )
        axes.set(ylabel="events a day, mean of 7 days", yscale="log")
        axes.legend(frameon=False)
        axes.tick_params(axis="x", rotation=30)

    return drawn([draw if streams else _says("a table of past decisions has no event logs")], width=8)


def plot_outcome(campaign: Campaign, home: Home) -> Any:
    """Conversion rate of each snapshot, or of each side of the split, with 95% intervals (Wilson 1927)."""
    splits = pq.read_table(home.lake(campaign.name).existing(SPLITS)).to_pylist()
    used = [row for row in splits if row["rows"]]

    def draw(axes: Any) -> None:
        rates = np.array([row["converted"] / row["rows"] for row in used])
        ends = np.array([_wilson(row["converted"], row["rows"]) for row in used])
        for i, side in enumerate(dict.fromkeys(row["split"] for row in used)):
            x = np.flatnonzero([row["split"] == side for row in used])
            errors = np.abs(ends[x].T - rates[x]) * 100
            axes.errorbar(
                x, rates[x] * 100, yerr=errors, fmt="os^D"[i], color=_COLOURS[i], capsize=2, markersize=4, label=side
            )
        step = max(1, len(used) // 8)
        names = [str(row["snapshot"]) for row in used[::step]]
        axes.set_xticks(range(0, len(used), step), names, rotation=30, ha="right")
        axes.set(ylabel="converted (%), with 95% intervals", ylim=(0, None))
        axes.legend(frameon=False)

    return drawn([draw], width=8)


# Features


def features(campaign: Campaign, home: Home) -> pd.DataFrame:
    """Every feature of the models: meaning, window, source column, share missing, and its AUC alone on training rows.

    An AUC of 0.5 is chance, whichever way a feature points.
    """
    table, y, words = _training_rows(campaign, home)
    rows = [
        {"feature": w.name, "meaning": w.meaning, "window (days)": w.window, "source": w.source,
         "missing": f"{table[w.feature].null_count / len(y):.1%}",
         "AUC alone": round(auc_alone(_plain(table[w.feature]), w.kind, y), 3)}
        for w in words
    ]  # fmt: skip
    return pd.DataFrame(rows).set_index("feature")


def strongest_features(campaign: Campaign, home: Home, count: int = 6) -> list[str]:
    """Names of the features with the highest AUC alone, the first of each source column."""
    ranked = features(campaign, home).sort_values("AUC alone", ascending=False, kind="stable")
    return ranked.drop_duplicates("source").index[:count].tolist()


def attribute_names(campaign: Campaign, home: Home, count: int = 6) -> list[str]:
    """Features that come from no event log: what is known of the customer, or of the decision."""
    _, _, words = _training_rows(campaign, home)
    own = [w.name for w in words if not w.stream]
    strongest = features(campaign, home).loc[own].sort_values("AUC alone", ascending=False, kind="stable")
    return strongest.index[:count].tolist()


def customer_history(campaign: Campaign, home: Home, count: int = 8) -> pd.DataFrame:
    """One customer through the training snapshots: what was known at each, and whether it then converted.

    It is the one with most conversions. Past decisions have no history: their first rows are shown.
    """
    table = read_split(home.lake(campaign.name).existing(TRAINING_SET), TRAIN, folds_of(campaign)[0])
    names = [n for n in _outward(campaign).values() if n in table.column_names] if _outward(campaign) else []
    shown = names or [n for n in table.column_names if n not in (campaign.key, "split", "fold", "converted")][:8]
    if "snapshot" not in table.column_names:
        return table.select([campaign.key, *shown, "converted"]).slice(0, count).to_pandas().set_index(campaign.key)
    converted = table.group_by(campaign.key).aggregate([("converted", "sum")])
    best = converted.sort_by([("converted_sum", "descending"), (campaign.key, "ascending")])[campaign.key][0]
    rows = table.filter(pc.equal(table[campaign.key], best)).sort_by("snapshot")
    chosen = rows.select(["snapshot", *shown, "converted"]).to_pandas()
    chosen["snapshot"] = pd.to_datetime(chosen["snapshot"]).dt.date
    return chosen.tail(count).set_index("snapshot").rename(columns={v: k for k, v in _outward(campaign).items()})


def plot_rates(campaign: Campaign, home: Home, names: Sequence[str]) -> Any:
    """Conversion rate of training rows by tenths of a number, or by category, with 95% intervals (Wilson 1927)."""
    table, y, words = _training_rows(campaign, home)

    def draw(w: FeatureWords) -> Draw:
        return lambda axes: _rates(axes, w, table[w.feature], y)

    return drawn([draw(w) for w in _named(campaign, words, names)])


def plot_correlation(campaign: Campaign, home: Home, names: Sequence[str]) -> Any:
    """Rank correlation (Spearman 1904) of numbers over training rows that have both."""
    table, _, words = _training_rows(campaign, home)
    numbers = [w for w in _named(campaign, words, names) if w.kind != CATEGORY]
    correlation = pd.DataFrame({w.name: table[w.feature].to_pandas() for w in numbers}).corr("spearman").to_numpy()
    found = np.round(correlation, 1) + 0.0  # no minus before a zero

    def draw(axes: Any) -> None:
        axes.imshow(found, vmin=-1, vmax=1, cmap="PuOr")
        shown = [w.name.replace("_", " ") for w in numbers]
        axes.set_xticks(range(len(shown)), shown, rotation=40, ha="right")
        axes.set_yticks(range(len(shown)), shown)
        for i, j in np.ndindex(found.shape):
            if np.isfinite(found[i, j]):
                dark = abs(found[i, j]) > 0.6
                axes.text(
                    j,
                    i,
                    f"{found[i, j]:.1f}",
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                )

    enough = len(numbers) > 1
    return drawn([draw if enough else _says("fewer than two numbers to compare")], width=7, height=5.5)


# Training


def candidates(campaign: Campaign, home: Home) -> pd.DataFrame:
    """What each candidate reached on validation rows: log loss by calibration method, and the one that was chosen."""
    rows: list[dict[str, Any]] = []
    for candidate in campaign.models:
        facts = load_model(home.candidates(campaign.name) / candidate.name).facts
        losses = facts["calibration_losses"]
        chosen = min(losses, key=losses.get)
        rows.append(
            {"model": label(candidate.name), "training rows": facts["rows"]["train"], **losses, "chosen": chosen}
        )
    frame = pd.DataFrame(rows).set_index("model")
    return frame.sort_values(by="model", key=lambda names: frame.min(axis=1, numeric_only=True))


def blend(campaign: Campaign, home: Home) -> pd.DataFrame:
    """Weights of the ensemble's members; empty where the campaign trains none."""
    folder = home.candidates(campaign.name) / "ensemble"
    scorer = load_model(folder).scorer if folder.exists() else None
    members = zip(scorer.members, scorer.weights, strict=True) if isinstance(scorer, EnsembleScorer) else ()
    rows = [{"member": label(member.name), "weight": round(weight, 3)} for member, weight in members]
    return pd.DataFrame(rows, columns=["member", "weight"]).set_index("member")


def learning_curve(
    campaign: Campaign, home: Home, name: str = "logistic_regression", shares: Sequence[float] = (0.05, 0.2, 0.5)
) -> pd.DataFrame:
    """Log loss on validation rows of one candidate trained on shares of the training entities.

    Where rows are cross-validated the loss is that of the rows of the share itself.
    """
    train, validate = training_datasets(campaign, home, folds_of(campaign)[0])
    candidate = next((c for c in campaign.models if c.name == name), None)
    if candidate is None:
        known = ", ".join(c.name for c in campaign.models if c.name not in (BASELINE, "ensemble"))
        raise ConfigError(f"{campaign.file}: models: there is no {name!r} to train; there are {known}")
    keys = read_split(home.lake(campaign.name).existing(TRAINING_SET), TRAIN, folds_of(campaign)[0])[campaign.key]
    place = np.unique(np.asarray(keys.cast(pa.string()).to_pylist()), return_inverse=True)[1]
    order = np.random.default_rng(campaign.seed).permutation(int(place.max()) + 1)
    rows: list[dict[str, Any]] = []
    for share in shares:
        part = train.rows(order[place] < share * len(order))
        if not 0 < part.y.sum() < len(part.y):
            continue
        _, scores = train_candidate(campaign, candidate, part, validate, {})
        y = (validate or part).y
        loss = float(np.mean(np.logaddexp(0, scores) - y * scores))
        rows.append({"training rows": len(part.y), "converted": int(part.y.sum()), "validation log loss": loss})
    return pd.DataFrame(rows)


def plot_learning_curve(curve: pd.DataFrame) -> Any:
    """What more customers are worth."""

    def draw(axes: Any) -> None:
        axes.plot(curve["training rows"], curve["validation log loss"], marker="o", color=_COLOURS[0])
        axes.set(xscale="log", xlabel="training rows", ylabel="validation log loss")
        axes.set_xticks(curve["training rows"], [f"{n:,}" for n in curve["training rows"]])
        axes.minorticks_off()

    return drawn([draw], width=6)


# Evaluation


def models(campaign: Campaign, home: Home) -> pd.DataFrame:
    """Metrics of every model on the test rows, the best log loss first."""
    record = read_evaluation(campaign, home)
    shown = ("log_loss", "auc", "average_precision", "calibration_error", "calibration_slope", "top_decile_lift")
    rows = {label(n): {m.replace("_", " "): found[m]["value"] for m in shown} for n, found in record["models"].items()}
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("log loss").round(4)


def thresholds(campaign: Campaign, home: Home) -> pd.DataFrame:
    """What contacting the best 1%, 2%, ... finds and brings; profit per 1,000 customers with its 95% interval."""
    rows = [
        {"contacted": f"{t['contacted']['value']:.1%}", "down to": f"{t['probability']:.2%}",
         "of them convert": f"{t['precision']['value']:.1%}", "of all converters": f"{t['recall']['value']:.1%}",
         "profit": round(t["profit_per_thousand"]["value"], 1), "low": round(t["profit_per_thousand"]["low"], 1),
         "high": round(t["profit_per_thousand"]["high"], 1)}
        for t in read_evaluation(campaign, home)["thresholds"]
    ]  # fmt: skip
    return pd.DataFrame(rows).set_index("contacted")


def plot_evaluation(campaign: Campaign, home: Home, names: Sequence[str]) -> Any:
    """Some of `plots.PLOTS`, side by side."""
    record, folder = read_evaluation(campaign, home), home.reports(campaign.name)
    return drawn([lambda axes, name=name: PLOTS[name](axes, record, folder) for name in names])


def plot_importance(campaign: Campaign, home: Home, count: int = 12) -> Any:
    """The features that move scores most, and, beside them, how the score changes with the first."""
    from propensity_dagster.explain.plots import draw_dependence, draw_importance

    record = json.loads((home.reports(campaign.name) / "explanations.json").read_text(encoding="utf-8"))
    draws: list[Draw] = [lambda axes: draw_importance(axes, record["features"][:count])]
    draws += [lambda axes, curve=curve: draw_dependence(axes, curve) for curve in record["dependence"][:1]]
    return drawn(draws, height=5)


def best_customers(campaign: Campaign, home: Home, count: int = 5) -> pd.DataFrame:
    """Those with the highest scores of the newest snapshot, each with its strongest reason; empty before any."""
    found = newest_scores(campaign, home)
    if found is None:
        return pd.DataFrame(columns=["probability", "percentile", "tier"])
    table = pq.read_table(found[1]).sort_by([("probability", "descending"), (campaign.key, "ascending")])
    shown = [n for n in ("probability", "percentile", "tier", "reason_1_sentence") if n in table.column_names]
    return table.slice(0, count).select([campaign.key, *shown]).to_pandas().set_index(campaign.key).round(4)


def _diagnosis(campaign: Campaign, home: Home) -> dict[str, Any]:
    return json.loads((home.reports(campaign.name) / "diagnosis.json").read_text(encoding="utf-8"))


def _sentence(finding: dict[str, Any]) -> str:
    return f"{finding['message']}." + (f" {finding['fix']}." if finding["fix"] else "")


def _training_rows(campaign: Campaign, home: Home) -> tuple[pa.Table, Floats, tuple[FeatureWords, ...]]:
    """A sample of training rows, their outcomes (n,), and the features of the models in words."""
    file = home.lake(campaign.name).existing(TRAINING_SET)
    table = read_split(file, TRAIN, folds_of(campaign)[0])
    sample = sample_rows(table.to_batches(), table.num_rows)
    fullest = next(c.name for c in campaign.models if c.name != BASELINE)
    model = load_model(home.candidates(campaign.name) / fullest)
    y = sample["converted"].cast(pa.float64()).to_numpy()
    return sample, y, describe_features(campaign, model, sample)


def _named(campaign: Campaign, words: Sequence[FeatureWords], names: Sequence[str]) -> list[FeatureWords]:
    known = {w.name: w for w in words}
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(f"{campaign.name}: there is no feature {missing[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names]


def _outward(campaign: Campaign) -> dict[str, str]:
    return dict(campaign.features.names) if isinstance(campaign, EventCampaign) else {}


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()) if pa.types.is_boolean(column.type) else column


def _rates(axes: Any, words: FeatureWords, column: pa.ChunkedArray, y: Floats) -> None:
    values = column.to_pandas()
    groups: list[tuple[str, Any]] = []
    if words.kind == CATEGORY:
        known = values.astype("string")
        groups = [(str(name), (known == name).fillna(False)) for name in known.value_counts().index[:_GROUPS]]
    elif values.notna().any():
        edges = np.unique(np.quantile(values.dropna(), np.linspace(0, 1, _GROUPS + 1)))
        bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(edges) - 2, 0))
        for i in range(max(len(edges) - 1, 1)):
            inside = (bins == i) & values.notna()
            if inside.any():
                groups.append((in_words(float(values[inside].median())), inside))
    if values.isna().any():
        groups.append(("none", values.isna()))
    for x, (_, rows) in enumerate(groups):
        chosen = y[rows.to_numpy(dtype=bool)]
        low, high = _wilson(chosen.sum(), len(chosen))
        axes.bar(x, chosen.mean() * 100, color=_COLOURS[0], alpha=0.85)
        axes.plot([x, x], [low * 100, high * 100], color="black", linewidth=1)
    axes.axhline(y.mean() * 100, color="#777777", linewidth=0.8)
    tilted = len(groups) > 6 or any(len(name) > 6 for name, _ in groups)
    axes.set_xticks(range(len(groups)), [name[:14] for name, _ in groups], rotation=40 if tilted else 0)
    axes.set(xlabel=words.name.replace("_", " "), ylabel="converted (%)")


def _wilson(converted: float, rows: float) -> tuple[float, float]:
    """95% interval of a rate (Wilson 1927)."""
    rate, z2 = converted / rows, Z95**2
    middle = (rate + z2 / (2 * rows)) / (1 + z2 / rows)
    half = Z95 * np.sqrt(rate * (1 - rate) / rows + z2 / (4 * rows**2)) / (1 + z2 / rows)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _says(words: str) -> Draw:
    def draw(axes: Any) -> None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, words, ha="center", va="center", wrap=True)

    return draw
