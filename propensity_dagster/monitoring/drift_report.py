"""The browsable drift report, drawn by Evidently: distributions of columns then and now, side by side.

Evidently draws; it does not decide. Its own verdicts cut columns into bins of equal width and forget missing values, so
a banner says where the decisions are. Only the columns that matter most are drawn, and only the newest report is kept.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.lake import Home, publishing
from propensity_dagster.errors import DataContractError
from propensity_dagster.explain.population import sample_file
from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.dataset import CATEGORY
from propensity_dagster.monitoring.domain import read_reference
from propensity_dagster.monitoring.drift import SCORE, TOGETHER, TRAINING, read_drift

REPORT = "drift_report.html"

_ROWS = 50_000
_COLUMNS = 20
_LARGEST = 8_000_000  # bytes; with half as many columns it is drawn again
_BANNER = (
    '<p style="margin:0;padding:12px 16px;background:#f4f6f8;font:15px/1.5 system-ui,sans-serif">{campaign}, snapshot '
    "{snapshot}: {current:,} customers of tonight beside {reference:,} the model learnt from; {columns} columns, those "
    "that moved and weigh most. The words “drift detected” here are Evidently's; what counts is on "
    '<a href="monitoring.html">the monitoring page</a>.</p>'
)


@dataclass(frozen=True)
class DrawnReport:
    """The page, the columns on it, and those that could not be drawn because one side has no value."""

    file: Path
    columns: tuple[str, ...]
    empty: tuple[str, ...]
    rows: int


def publish_drift_report(
    campaign: Campaign, snapshot: date, model: FittedModel, version: str, home: Home
) -> DrawnReport:
    """Draw the report of a snapshot whose `drift` has been published.

    Raises:
        DataContractError: when there is no drift of that snapshot, or no reference of the version that scored it.
    """
    ranked = _ranked(campaign, snapshot, home)
    reference = read_reference(campaign, home, version)
    if reference is None:
        raise DataContractError(
            f"{campaign.name}: version {version} was registered before its training rows were kept: train again"
        )
    file = home.lake(campaign.name).existing_partition("features", "snapshot", snapshot)
    current = sample_file(file, ranked, _ROWS)
    empty = [c for c in ranked if reference[c].null_count == len(reference) or current[c].null_count == len(current)]
    chosen = [column for column in ranked if column not in empty][:_COLUMNS]
    if not chosen:
        raise DataContractError(f"{campaign.name}: snapshot {snapshot}: no column has values on both sides")
    kinds = {spec.name: spec.kind for spec in model.contract.features}
    target = home.reports(campaign.name) / REPORT
    while True:
        html = _draw(reference, current, chosen, [c for c in chosen if kinds[c] == CATEGORY])
        if len(html) <= _LARGEST or len(chosen) == 1:
            break
        chosen = chosen[: len(chosen) // 2]
    rows = {"current": current.num_rows, "reference": reference.num_rows, "columns": len(chosen)}
    banner = _BANNER.format(campaign=campaign.name, snapshot=snapshot, **rows)
    at = html.index(">", html.index("<body")) + 1
    with publishing(target) as temporary:
        temporary.write_text(html[:at] + banner + html[at:], encoding="utf-8")
    total = pq.read_metadata(file).num_rows
    return DrawnReport(target, tuple(chosen), tuple(empty), total)


def _ranked(campaign: Campaign, snapshot: date, home: Home) -> list[str]:
    """Columns, those that moved first, then by importance."""
    rows = [r for r in read_drift(campaign, snapshot, home) if r["against"] == TRAINING]
    if not rows:
        raise DataContractError(f"{campaign.name}: the drift of snapshot {snapshot} has not been published yet")
    ranks = {"alert": 0, "warn": 1, "none": 2}
    rows.sort(key=lambda r: (ranks[r["severity"]], -(r["importance"] or 0.0), r["column"]))
    return list(dict.fromkeys(r["column"] for r in rows if r["column"] not in (SCORE, TOGETHER)))


def _draw(reference: pa.Table, current: pa.Table, columns: Sequence[str], categories: Sequence[str]) -> str:
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

        numbers = [column for column in columns if column not in categories]
        definition = DataDefinition(numerical_columns=numbers, categorical_columns=list(categories))
        sides: list[Any] = [
            Dataset.from_pandas(table.select(list(columns)).to_pandas(), data_definition=definition)
            for table in (current, reference)
        ]
        return Report([DataDriftPreset(method="psi")]).run(*sides).get_html_str(as_iframe=False)
