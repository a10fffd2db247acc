"""The evaluation report: one self-contained HTML page per training run, from what the run left in the home folder.

Belongs here: what the page says, and what a reader must be warned of. The page itself is `evaluation_report.html`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.data.lake import Home, publish_text
from propensity_dagster.evaluation.splits import EMBARGO, TEST, TRAIN
from propensity_dagster.explain.ablation import read_ablation
from propensity_dagster.features.snapshots import SPLITS
from propensity_dagster.reports.plots import PLOTS, label, svg_plot
from propensity_dagster.reports.rendering import interval, number, plain, template
from propensity_dagster.reports.summary import count_rows
from propensity_dagster.scoring.candidates import read_evaluation
from propensity_dagster.synthetic import is_synthetic

REPORT = "report.html"

_FEATURES_SHOWN, _SEGMENTS_SHOWN, _FINDINGS_SHOWN = 15, 60, 30
_FEW_CONVERTERS, _FEW_IN_SEGMENT = 200, 10
_SUSPICIOUS_AUC, _SUSPICIOUS_SHARE, _CHANGED_RATE = 0.97, 0.5, 1.5


def publish_report(campaign: Campaign, home: Home) -> Path:
    """Write the page of the newest evaluation, and return it.

    Raises:
        DataContractError: when there is no evaluation yet.
    """
    record = read_evaluation(campaign, home)
    folder = home.reports(campaign.name)
    explained = _read(folder / "explanations.json")
    diagnosis = _read(folder / "diagnosis.json")
    splits = pq.read_table(home.lake(campaign.name).existing(SPLITS)).to_pylist()
    content = {
        "campaign": campaign,
        "record": record,
        "challenger": label(record["challenger"]),
        "verdict": verdict(record),
        "cards": _cards(campaign, record),
        "models": _models(record),
        "explained": explained,
        "ablation": read_ablation(campaign, home),
        "features": explained["features"][:_FEATURES_SHOWN] if explained else [],
        "described": any(f["meaning"] != plain(f["feature"]) for f in explained["features"]) if explained else False,
        "few": _FEW_IN_SEGMENT,
        "segments": list(record["segments"][record["challenger"]].items())[:_SEGMENTS_SHOWN],
        "more_segments": max(len(record["segments"][record["challenger"]]) - _SEGMENTS_SHOWN, 0),
        "rows": count_rows(campaign, home),
        "splits": _splits(splits),
        "findings": diagnosis["findings"][:_FINDINGS_SHOWN] if diagnosis else None,
        "cautions": cautions(campaign, record, explained, diagnosis),
        "figures": _figures(record, folder, explained),
        "profit_digits": 0
        if any(abs(row["profit_per_thousand"]["value"]) >= 100 for row in record["thresholds"])
        else 2,
        "contact": campaign.contact,
    }
    publish_text(template("evaluation_report.html").render(content), folder / REPORT)
    return folder / REPORT


def verdict(record: Mapping[str, Any]) -> str:
    """The decision of the gate, for whoever has never heard of one."""
    name = label(record["challenger"])
    decision = record["decision"]
    known = [f"the {label(reference)}" for reference in decision["references"]]
    if decision["promoted"]:
        return f"Yes: the {name} model goes into service. It beats {_joined(known)} and meets every other demand."
    failed = [f"{c['name']} is {c['found']}, wanted {c['wanted']}" for c in decision["criteria"] if not c["passed"]]
    return f"No: the {name} model does not go into service: {'; '.join(failed).replace('_', ' ')}."


def cautions(
    campaign: Campaign,
    record: Mapping[str, Any],
    explained: Mapping[str, Any] | None,
    diagnosis: Mapping[str, Any] | None,
) -> list[str]:
    """What could be wrong with these numbers, the gravest first; the last ones hold of every propensity model."""
    found = [*_too_good(record, explained), *_too_few(record), *_off(record)]
    if explained and explained["jumped"]:
        jumped = [plain(row["feature"]) for row in explained["jumped"]]
        found.append(f"The importance of {_joined(jumped)} jumped against the last versions: has its source changed?")
    if record["champion_lacks"]:
        found.append(
            f"The champion in service (version {record['champion_version']}) was not judged: it needs "
            f"{_first(record['champion_lacks'])}, which the data lack now."
        )
    name = record["challenger"]
    if record["models"][name]["log_loss"]["value"] > min(m["log_loss"]["value"] for m in _rivals(record)) + 1e-12:
        found.append(
            f"Another candidate did better on the test rows. The {label(name)} was chosen before they were looked at; "
            "choosing by them would flatter the winner."
        )
    grave = sum(f["severity"] != "info" for f in diagnosis["findings"]) if diagnosis else 0
    if diagnosis is None:
        found.append("The data were not examined by the doctor in this run.")
    elif grave:
        found.append(f"The doctor has {grave} finding{'s' if grave > 1 else ''} on the data: see “The data”.")
    if isinstance(campaign, EventCampaign) and is_synthetic(campaign.source.connection):
        found.append("These data are synthetic: they show that the system works, not what your customers will do.")
    return [
        *found,
        "A score says who will convert, not whom a contact changes: some would have bought anyway. Only a group that "
        "is deliberately not contacted can tell.",
        "Every number holds while customers and offers stay as they were in the test rows.",
    ]


def read_cautions(campaign: Campaign, home: Home) -> list[str]:
    """The cautions of the newest evaluation."""
    folder = home.reports(campaign.name)
    explained, diagnosis = _read(folder / "explanations.json"), _read(folder / "diagnosis.json")
    return cautions(campaign, read_evaluation(campaign, home), explained, diagnosis)


def _too_good(record: Mapping[str, Any], explained: Mapping[str, Any] | None) -> list[str]:
    """Signs of a leak."""
    found: list[str] = []
    auc = record["models"][record["challenger"]]["auc"]["value"] or 0.0
    if auc > _SUSPICIOUS_AUC:
        found.append(
            f"An AUC of {auc:.3f} is too good for human behaviour: look for a column that is written after the outcome."
        )
    first = explained["features"][0] if explained else None
    if first and first["share"]["value"] > _SUSPICIOUS_SHARE:
        found.append(
            f"{plain(first['feature'])} alone has {first['share']['value']:.0%} of the importance: make sure that it "
            "is known before the outcome, and expect trouble on the day it is late or broken."
        )
    return found


def _too_few(record: Mapping[str, Any]) -> list[str]:
    """Where luck may have decided."""
    segments = record["segments"][record["challenger"]]
    found: list[str] = []
    if record["converted"] < _FEW_CONVERTERS:
        found.append(
            f"Only {record['converted']:,} test rows converted: the intervals are wide, and differences between models "
            "may be luck."
        )
    few = [segment for segment, m in segments.items() if m["converted"] < _FEW_IN_SEGMENT]
    if few:
        found.append(f"Too few to judge, under {_FEW_IN_SEGMENT} conversions: {_first(few)}.")
    return found


def _off(record: Mapping[str, Any]) -> list[str]:
    """Where forecasts and conversions part, beyond chance."""
    segments, periods = record["segments"][record["challenger"]], record["periods"]
    rate, usual = record["outcome_rate"], record["training_rate"]
    found: list[str] = []
    if max(rate, usual) > _CHANGED_RATE * min(rate, usual):
        found.append(
            f"{rate:.2%} of the test rows converted, {usual:.2%} of the training rows: the world is changing, and "
            "probabilities learnt earlier age quickly."
        )
    off = [period for period, m in periods.items() if _excludes_one(m["observed_over_expected"])]
    if off:
        found.append(
            f"More or fewer converted than was forecast, beyond chance, in {_joined(off)}: see “Did it stay right?”."
        )
    judged = {segment: m for segment, m in segments.items() if m["converted"] >= _FEW_IN_SEGMENT}
    mistaken = [segment for segment, m in judged.items() if _excludes_one(m["observed_over_expected"])]
    if mistaken:
        found.append(
            f"Forecasts are too high or too low, beyond what a 95% interval allows, in {_first(mistaken)}. "
            f"Of {len(judged)} segments about "
            f"{max(round(len(judged) * 0.05), 1)} would be by chance alone."
        )
    return found


def _rivals(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [record["models"][name] for name in record["training"] if name != "champion"]


def _excludes_one(found: Mapping[str, float | None]) -> bool:
    low, high = found["low"], found["high"]
    return low is not None and high is not None and not low <= 1 <= high


def _cards(campaign: Campaign, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The five numbers to remember."""
    name = record["challenger"]
    metrics = record["models"][name]
    gained = record["comparisons"]["baseline"]["log_loss"]
    threshold = record["threshold"]
    profit = threshold["models"][name]["profit"]
    thousand = 1000 / record["rows"]
    cards = [
        {
            "title": "Lift of the best tenth",
            "value": number(metrics["top_decile_lift"]["value"], 2),
            "words": f"as many conversions as in a random tenth ({interval(metrics['top_decile_lift'], 2)})",
        },
        {
            "title": "AUC",
            "value": number(metrics["auc"]["value"], 3),
            "words": f"of pairs are ranked rightly; 0.5 is chance ({interval(metrics['auc'], 3)})",
        },
        {
            "title": "Forecast and reality",
            "value": number(metrics["calibration_error"]["value"], 4),
            "words": f"mean gap between forecast and rate ({interval(metrics['calibration_error'], 4)})",
        },
        {
            "title": "Against the baseline",
            "value": number(gained["value"], 4, signed=True),
            "words": f"log loss, negative is better ({interval(gained, 4, signed=True)})",
        },
    ]
    if campaign.value.cost_per_contact:
        words = f"per 1,000 customers, contacting above {threshold['probability']:.2%}"
        scaled = {part: value and value * thousand for part, value in profit.items()}
        cards.append(
            {"title": "Profit", "value": number(scaled["value"], 0), "words": f"{words} ({interval(scaled, 0)})"}
        )
    return cards


def _models(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every model, the best first."""
    notes = {
        "constant": "the same for everybody",
        "baseline": "what one would do without a model",
        "oracle": "what nobody can beat: the data are synthetic",
        "champion": f"version {record['champion_version']}, in service now",
        record["challenger"]: "judged for promotion",
    }
    ranked = sorted(record["models"].items(), key=lambda item: item[1]["log_loss"]["value"])
    return [
        {
            "name": label(name),
            "note": notes.get(name, ""),
            "chosen": name == record["challenger"],
            "metrics": metrics,
            "calibrator": record["training"].get(name, {}).get("calibrator", ""),
        }
        for name, metrics in ranked
    ]


def _splits(splits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each side, with its first and last snapshot."""
    found: list[dict[str, Any]] = []
    for side in dict.fromkeys(row["split"] for row in splits):
        rows = [row for row in splits if row["split"] == side]
        first, last = str(rows[0]["snapshot"]), str(rows[-1]["snapshot"])
        found.append(
            {
                "side": {TRAIN: "training", TEST: "test", EMBARGO: "embargo"}.get(side, "validation"),
                "snapshots": first if first == last else f"{first} to {last} ({len(rows)})",
                "rows": sum(row["rows"] for row in rows),
                "converted": sum(row["converted"] for row in rows),
            }
        )
    return found


def _figures(record: dict[str, Any], folder: Path, explained: dict[str, Any] | None) -> dict[str, Any]:
    """Drawings by name; `periods` and `dependence` are lists of them."""

    def drawn(salt: str, draw: Callable[..., None], *content: Any, height: float = 3.5, **options: Any) -> str:
        return svg_plot(salt, lambda axes: draw(axes, *content, **options), height)

    shown = ("gain", "lift", "calibration", "models", "distribution", "profit")
    found: dict[str, Any] = {name: drawn(name, PLOTS[name], record, folder) for name in shown}
    timed = ("observed_over_expected", "auc") if record["periods"] else ()
    found["periods"] = [drawn(metric, PLOTS["periods"], record, folder, metric=metric) for metric in timed]
    found["importance"], found["dependence"] = "", []
    if explained and explained["features"][0]["mean_absolute"]["value"] > 0:
        from propensity_dagster.explain.plots import draw_dependence, draw_importance

        rows = explained["features"][:_FEATURES_SHOWN]
        found["importance"] = drawn("importance", draw_importance, rows, height=1 + 0.3 * len(rows))
        curves = enumerate(explained["dependence"])
        found["dependence"] = [drawn(f"dependence-{i}", draw_dependence, curve) for i, curve in curves]
    return found


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _first(names: Sequence[str]) -> str:
    return _joined(names) if len(names) <= 5 else f"{', '.join(names[:5])} and {len(names) - 5} more"
