"""The summary a person reads at the end of a run."""

from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from propensity_dagster.campaign import SHIPPED, Campaign, EventCampaign
from propensity_dagster.data.days import now_utc, rows_of_each
from propensity_dagster.data.decisions import DECISIONS
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home
from propensity_dagster.evaluation.evaluate import ORACLE
from propensity_dagster.experiments.uplift import UPLIFT
from propensity_dagster.features.snapshots import SPLITS
from propensity_dagster.models.training import BASELINE
from propensity_dagster.monitoring.alerts import PAGE
from propensity_dagster.monitoring.drift import read_drift
from propensity_dagster.monitoring.findings import snapshot_findings, verdict
from propensity_dagster.monitoring.quality import read_quality
from propensity_dagster.reports.experiment_page import EARNED_PAGE
from propensity_dagster.reports.uplift_page import UPLIFT_PAGE
from propensity_dagster.scoring.audiences import AUDIENCE, exported_contacts, read_plan
from propensity_dagster.scoring.batch import SCORES
from propensity_dagster.scoring.candidates import read_evaluation
from propensity_dagster.scoring.contacts import ContactPlan, describe_plan, plan_contacts

_COLUMNS = {
    "log_loss": ("log loss", "{:.4f}"),
    "auc": ("AUC", "{:.3f}"),
    "average_precision": ("average\nprecision", "{:.3f}"),
    "calibration_error": ("calibr.\nerror", "{:.4f}"),
    "top_decile_lift": ("top 10%\nlift", "{:.2f}"),
}
_SHOWN_GAP = 1e-5
_NOTES = {"constant": "one score for all", BASELINE: "cells, no model", ORACLE: "best possible here"}


def print_summary(campaign: Campaign, home: Home, console: Console) -> None:
    """Print what a run of this campaign did, from what it left in the home folder."""
    record = read_evaluation(campaign, home)
    parts = [
        *_data(campaign, home),
        _models(record),
        Text(_sentence_of_decision(record)),
        *_oracle(record),
        *_value(campaign, home, record),
        _where(campaign, home),
    ]
    body = Group(*(item for part in parts for item in (part, Text(""))))
    console.print(Panel(body, title=f"{campaign.name}: {campaign.description}", padding=(1, 2)))


def _data(campaign: Campaign, home: Home) -> list[Any]:
    lake = home.lake(campaign.name)
    table = Table(title="Rows", title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("table", "read", "good", "quarantined", "duplicates"):  # the keys of count_rows
        table.add_column(column, justify="left" if column == "table" else "right")
    for counts in count_rows(campaign, home):
        table.add_row(*(f"{n:,}" if isinstance(n, int) else n for n in counts.values()))
    splits = pq.read_table(lake.existing(SPLITS)).to_pylist()
    used = [s for s in splits if s["rows"]]
    rows, converted = sum(s["rows"] for s in used), sum(s["converted"] for s in used)
    counts = {name: sum(s["split"] == name for s in splits) for name in ("train", "validate", "test", "embargo")}
    if not isinstance(campaign, EventCampaign):
        sides = "; ".join(
            f"{s['rows']:,} {s['split']} ({s['snapshot']}), {s['converted'] / s['rows']:.2%}" for s in used
        )
        return [
            table,
            Text(f"{rows:,} decisions, {converted:,} converted: {sides}. Trained in five folds of entities."),
        ]
    caption = (
        f"{len(used)} snapshots from {used[0]['snapshot']} to {used[-1]['snapshot']} "
        f"({counts['train']} to train, {counts['validate']} to validate, {counts['test']} to test, "
        f"{counts['embargo']} embargoed): {rows:,} rows, {converted:,} converted ({converted / rows:.2%})"
    )
    return [table, Text(caption)]


def count_rows(campaign: Campaign, home: Home) -> list[dict[str, Any]]:
    """Of each source table: rows read, good ones, those in quarantine, and duplicates."""
    lake = home.lake(campaign.name)
    found: list[dict[str, Any]] = []
    for name in _source_tables(campaign):
        read, good, bad = [
            sum(rows_of_each(lake.files_of(f"{stage}_{name}"))) for stage in ("raw", "validated", "quarantine")
        ]
        counts = {"read": read, "good": good, "quarantined": bad, "duplicates": read - good - bad}
        found.append({"table": name, **counts})
    return found


def _source_tables(campaign: Campaign) -> list[str]:
    if not isinstance(campaign, EventCampaign):
        return [DECISIONS]
    entities = campaign.source.entities.table
    return [*([entities] if entities else []), *campaign.source.streams]


def _models(record: dict[str, Any]) -> Table:
    table = Table(
        title=f"Models on {record['rows']:,} test rows, which nothing was fitted on",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 3, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for words, _ in _COLUMNS.values():
        table.add_column(words, justify="right")
    table.add_column("")
    ranked = sorted(record["models"].items(), key=lambda item: -item[1]["log_loss"]["value"])
    for name, metrics in ranked:
        cells = [_cell(metrics[m]["value"], form) for m, (_, form) in _COLUMNS.items()]
        chosen = name == record["challenger"]
        note = "challenger" if chosen else _NOTES.get(name, "")
        table.add_row(name, *cells, note, style="bold" if chosen else "dim" if name in _NOTES else "")
    return table


def _sentence_of_decision(record: dict[str, Any]) -> str:
    decision = record["decision"]
    comparison = record["comparisons"][BASELINE]["log_loss"]
    against = f"Against the baseline its log loss is {comparison['value']:+.4f}"
    interval = f" (95% interval {comparison['low']:+.4f} to {comparison['high']:+.4f})."
    return f"{decision['sentence']}. {against}{interval}".replace("_", " ")


def _oracle(record: dict[str, Any]) -> list[Text]:
    if ORACLE not in record["models"]:
        return []
    best, reached = (record["models"][name]["auc"]["value"] for name in (ORACLE, record["challenger"]))
    return [
        Text(
            f"These data are synthetic, so the best possible is known: AUC {best:.3f}, log loss "
            f"{record['models'][ORACLE]['log_loss']['value']:.4f}. {record['challenger'].replace('_', ' ')} "
            f"reaches {(reached - 0.5) / (best - 0.5):.1%} of the oracle's AUC above one half."
        )
    ]


def _value(campaign: Campaign, home: Home, record: dict[str, Any]) -> list[Text]:
    found = newest_scores(campaign, home)
    if found is None and record["decision"]["promoted"]:
        file = campaign.name if campaign.file.parent == SHIPPED.resolve() else _short(campaign.file)
        return [Text(f"Nobody has been scored yet: propensity score {file} --rows FILE_OR_TABLE scores new rows.")]
    if found is None:
        return [
            Text(
                "Nobody was scored: no model has passed the gate. Look at the criteria above: more history, more "
                "snapshots or a longer horizon help most; docs/guide.md explains the limits under `gate`."
            )
        ]
    snapshot, _ = found
    with open_engine() as engine:
        plan = plan_contacts(campaign, snapshot, home, engine, now_utc())
    parts = [Text(describe_plan(campaign, plan))]
    if read_quality(campaign, snapshot, home) or read_drift(campaign, snapshot, home):
        answer = verdict(snapshot_findings(campaign, snapshot, home))
        parts.insert(0, Text(f"Should these scores be trusted? {answer.sentence}"))
    return parts


def newest_scores(campaign: Campaign, home: Home) -> tuple[date, Path] | None:
    """The newest scored snapshot and its file."""
    lake = home.lake(campaign.name)
    scored = lake.partitions(SCORES, "snapshot")
    return (scored[-1], lake.partition(SCORES, "snapshot", scored[-1])) if scored else None


def print_plan(campaign: Campaign, plan: ContactPlan, console: Console) -> None:
    """Print what contacts are expected to earn, and what each limit costs."""
    table = Table(title=f"{campaign.name}, snapshot {plan.snapshot}", title_justify="left", show_header=False)
    sold, profit = plan.expected_conversions, plan.expected_profit
    table.add_row("customers scored", f"{plan.scored:,}, {plan.above_break_even:,} would pay")
    channels = ", ".join(f"{n:,} by {name}" for name, n in plan.by_channel.items()) if len(plan.by_channel) > 1 else ""
    for reason, n in plan.excluded.items():
        table.add_row(f"not contacted: {reason}", f"{n:,}")
    table.add_row("held back for comparison", f"{plan.held:,}, {plan.held_chosen:,} of them would be contacted")
    if plan.ranked_by == UPLIFT:
        table.add_row("chosen by", "what a contact changes (uplift): a trial showed that it is better")
    table.add_row("contacts", f"{plan.contacted:,}" + (f": {channels}" if channels else ""))
    expected = "expected conversions" if plan.ranked_by != UPLIFT else "expected because of them"
    table.add_row(expected, f"{sold.value:,.1f} ({sold.low:,.1f} to {sold.high:,.1f})")
    table.add_row("cost", f"{plan.cost:,.2f}")
    table.add_row("expected profit", f"{profit.value:,.2f} ({profit.low:,.2f} to {profit.high:,.2f})")
    table.add_row("of as many at random", f"{plan.profit_of_random:,.2f}")
    table.add_row("of contacting all", f"{plan.profit_of_contacting_all:,.2f}, without limits")
    for name, price in plan.shadow_prices.items():
        table.add_row(
            f"limit: {name}", f"{'one less' if name.startswith('minimum') else 'one more'} earns {price:,.2f}"
        )
    if plan.gap > _SHOWN_GAP:
        table.add_row("distance to the optimum", f"at most {plan.gap:.3%}")
    console.print(table)
    if not plan.contacted:
        console.print(Text(describe_plan(campaign, plan)))
    for note in plan.notes:
        console.print(Text(f"Note: {note}."))
    right = "probabilities are" if plan.ranked_by != UPLIFT else "uplift of each tenth of the trial is"
    console.print(Text(f"Intervals hold 95% if the {right} right. Nobody has been contacted by this plan."))


def print_audience(campaign: Campaign, snapshot: date, home: Home, console: Console) -> None:
    """Print what the audience of a snapshot is, and where it went."""
    lake = home.lake(campaign.name)
    plan = read_plan(lake, snapshot)
    profit = plan["expected_profit"]
    console.print(
        Text(
            f"Audience of {snapshot}: {plan['contacted']:,} contacts, {plan['random']:,} of them by lot; "
            f"{plan['held_chosen']:,} who would have been contacted are held back. "
            f"Expected profit {profit['value']:,.0f} ({profit['low']:,.0f} to {profit['high']:,.0f}) at a cost of "
            f"{plan['cost']:,.0f}."
        )
    )
    for name in plan["exports"]:
        for state, number in exported_contacts(lake, name, snapshot).items():
            console.print(Text(f"{name}: {number:,} {state}"))
    console.print(Text(_short(lake.partition(AUDIENCE, "snapshot", snapshot))))


def _where(campaign: Campaign, home: Home) -> Table:
    table = Table(title="Where to look next", title_justify="left", box=None, pad_edge=False, show_header=False)
    found = newest_scores(campaign, home)
    reports = home.reports(campaign.name)
    shipped = campaign.file.parent == SHIPPED.resolve()
    own = "" if shipped else f"PROPENSITY_CAMPAIGNS={_short(campaign.file.parent)} "
    rows = [
        ("lineage, runs, checks", f"{own}make dev"),
        ("scores, with reasons", _short(found[1]) if found else "none"),
        *_contacted(campaign, found, home),
        *([("over HTTP", "make serve")] if found else []),
        ("the evaluation, a page", _short(reports / "report.html")),
        *([("is it still right, a page", _short(reports / PAGE))] if (reports / PAGE).exists() else []),
        *_pages(campaign, reports),
        ("for whom, how good", _short(reports / "model_card.md")),
        ("every number", _short(reports / "evaluation.json")),
        *([("features explained", _short(reports / "features.md"))] if (reports / "features.md").exists() else []),
        ("what the doctor found", _short(reports / "diagnosis.json")),
        ("champion", f"propensity champion show {campaign.name if shipped else _short(campaign.file)}"),
    ]
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut cannot be copied
    for what, where in rows:
        table.add_row(what, where)
    return table


def _contacted(campaign: Campaign, found: tuple[date, Path] | None, home: Home) -> list[tuple[str, str]]:
    """The audience of the newest scores, and the folder of what was sent, where there are any."""
    sent = home.root / "exports" / campaign.name
    file = home.lake(campaign.name).partition(AUDIENCE, "snapshot", found[0]) if found else sent / "none"
    rows = [("whom to contact", _short(file))] if file.exists() else []
    return [*rows, *([("as files to send", _short(sent))] if sent.is_dir() else [])]


def _pages(campaign: Campaign, reports: Path) -> list[tuple[str, str]]:
    """Pages about contacts: what they earned, whom they change, what experiments showed."""
    pages = [("what it earned, a page", EARNED_PAGE), ("whom it changes, a page", UPLIFT_PAGE)]
    pages += [(f"{name.replace('_', ' ')}, an experiment", f"experiment_{name}.html") for name in campaign.experiments]
    return [(words, _short(reports / page)) for words, page in pages if (reports / page).exists()]


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
