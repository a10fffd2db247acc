"""The model card (Mitchell et al. 2019): what a model is for, how good it is and for whom, as JSON and Markdown."""

import json
from pathlib import Path
from typing import Any

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.data.lake import publish_text
from propensity_dagster.evaluation.splits import EMBARGO, TEST

_METRICS = {
    "log_loss": "log loss",
    "auc": "AUC",
    "average_precision": "average precision",
    "calibration_error": "expected calibration error",
    "calibration_slope": "calibration slope (1 is right)",
    "calibration_intercept": "calibration intercept (0 is right)",
    "top_decile_lift": "lift of the best tenth",
}
_SLICES = {
    "auc": "AUC",
    "calibration_error": "calibration error",
    "selection_rate": "selection rate",
    "true_positive_rate": "true positive rate",
    "observed_over_expected": "observed / expected",
}


def model_card(campaign: Campaign, record: dict[str, Any]) -> dict[str, Any]:
    """The card of an evaluation's challenger, from its record."""
    challenger = record["challenger"]
    slices = record["segments"][challenger]
    return {
        "campaign": campaign.name,
        "question": campaign.description,
        "model": challenger,
        "contact": campaign.contact,
        "intended_use": f"{campaign.description} Whom to contact, in what order, within a budget.",
        "not_intended_for": "Credit, employment, insurance, housing, or any decision about a person's rights.",
        "population": _population(campaign),
        "trained_on": {
            split: dates for split, dates in record.get("snapshots", {}).items() if split not in (EMBARGO, TEST)
        },
        "negatives_kept": campaign.snapshots.keep_negatives if isinstance(campaign, EventCampaign) else 1.0,
        "judged_on": {
            "rows": record["rows"],
            "converted": record["converted"],
            "outcome_rate": record["outcome_rate"],
            "snapshots": record["snapshots"].get(TEST, []),
        },
        "metrics": {name: record["models"][challenger][name] for name in _METRICS},
        "decision_of_the_gate": record["decision"]["sentence"],
        "protected_attributes_no_model_sees": list(campaign.protected),
        "segments": slices,
        "fairness": {
            name: {value: found for value, found in slices.items() if value.partition("=")[0] == name}
            for name in campaign.protected
        },
        "limits": [
            "Probabilities hold for customers like those it was judged on, while the world stays as it was then.",
            "A score says who is likely to convert, not whom a contact changes: that takes a holdout.",
            "A feature that is missing is treated as in training; a category never seen counts as missing.",
            "Percentiles compare with the last scored population.",
        ],
    }


def publish_model_card(campaign: Campaign, record: dict[str, Any], folder: Path) -> Path:
    """Write `model_card.json` and `model_card.md`; return the second."""
    card = model_card(campaign, record)
    publish_text(json.dumps(card, indent=1, ensure_ascii=False), folder / "model_card.json")
    publish_text(card_markdown(card), folder / "model_card.md")
    return folder / "model_card.md"


def _left_out(kept: float) -> str:
    """What to say about training rows that were left out."""
    if kept == 1:
        return ""
    return f"; of its rows without the outcome {kept:.2%}, drawn by lot, which the probabilities are corrected for"


def card_markdown(card: dict[str, Any]) -> str:
    """The same for people."""
    judged = card["judged_on"]
    trained = "; ".join(f"{split}: {_range(dates)}" for split, dates in card["trained_on"].items())
    lines = [
        f"# Model card: {card['campaign']}, {card['model'].replace('_', ' ')}",
        "",
        f"**Intended use.** {card['intended_use']}",
        "",
        f"**Not intended for.** {card['not_intended_for']}",
        "",
        f"**Population.** {card['population']}",
        "",
        f"**Trained on.** {trained or 'all rows that do not test'}{_left_out(card['negatives_kept'])}.",
        "",
        f"**Judged on.** {judged['rows']:,} rows, {judged['converted']:,} converted ({judged['outcome_rate']:.2%}), "
        f"{_range(judged['snapshots'])}. {card['decision_of_the_gate'].replace('_', ' ')}.",
        "",
        "| metric | value | 95% interval |",
        "|---|---|---|",
        *(f"| {_METRICS[name]} | {_cell(found)} |" for name, found in card["metrics"].items()),
        "",
    ]
    protected = card["protected_attributes_no_model_sees"]
    if card["segments"]:
        lines += [
            "## Slices",
            "",
            "Selection rate: share with a probability above break-even. True positive rate: share of the converters "
            "among them. Observed / expected: conversions for each that was forecast (1 is right).",
            "",
            f"| slice | rows | converted | {' | '.join(_SLICES.values())} |",
            "|---|---|---|" + "---|" * len(_SLICES),
            *(_slice(name, found) for name, found in card["segments"].items()),
            "",
        ]
    lines += [
        "## Fairness",
        "",
        f"No model sees {', '.join(protected)}; the slices above show how they fare."
        if protected
        else "The campaign file declares no protected attribute.",
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in card["limits"]),
        "",
        f"Contact: {card['contact'] or 'the campaign file names nobody (`contact`)'}.",
        "",
    ]
    return "\n".join(lines)


def _population(campaign: Campaign) -> str:
    rule = getattr(campaign, "eligibility", None)
    if rule is None:
        return "Customers as in the table of past decisions."
    parts = [f"active within {rule.active_within_days} days"] if rule.active_within_days else []
    parts += [f"known for at least {rule.min_tenure_days} days"] if rule.min_tenure_days else []
    return f"Customers {' and '.join(parts) or 'known'} at the snapshot."


def _range(dates: list[str]) -> str:
    if not dates:
        return "newest rows or held-out entities"
    return f"snapshots {dates[0]} to {dates[-1]}" if len(dates) > 1 else f"snapshot {dates[0]}"


def _cell(found: dict[str, float | None]) -> str:
    if found["value"] is None:
        return "not known | "
    interval = f"{found['low']:.4g} to {found['high']:.4g}" if found["low"] is not None else ""
    return f"{found['value']:.4g} | {interval}"


def _slice(name: str, found: dict[str, Any]) -> str:
    cells: list[str] = []
    for metric in _SLICES:
        value = found[metric]
        known = value["value"] is not None and value["low"] is not None
        cells.append(f"{value['value']:.3g} ({value['low']:.3g} to {value['high']:.3g})" if known else "too few")
    return f"| {name} | {found['rows']:,} | {found['converted']:,} | {' | '.join(cells)} |"
