"""The doctor's findings as tables a person reads."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from propensity_dagster.doctor.findings import CODES, ERROR, WARNING, Diagnosis, TableProfile

_STYLES = {ERROR: "bold red", WARNING: "yellow"}
_COLUMNS_SHOWN = 100


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print profiles, outcome rates, features and, last, the findings: they are what one must see."""
    for profile in diagnosis.tables:
        console.print(_profile(profile))
    if diagnosis.outcome:
        console.print(_outcome(diagnosis))
    if diagnosis.features:
        console.print(_features(diagnosis))
    console.print(_findings(diagnosis))
    errors = len(diagnosis.errors)
    warnings = sum(f.severity == WARNING for f in diagnosis.findings)
    verdict = f"{errors} errors: mend them before training" if errors else "nothing stands against training"
    console.print(Text(f"{diagnosis.campaign}: {verdict}; {warnings} warnings."))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column)
    return table


def _profile(profile: TableProfile) -> Table:
    title = (
        f"\n{profile.table}: {profile.rows:,} rows ({profile.good:,} good) of {profile.entities:,} entities, "
        f"{profile.first} to {profile.last}"
    )
    table = _table(title, "column", "type", "missing", "values", "range or most frequent")
    for column in profile.columns[:_COLUMNS_SHOWN]:
        table.add_row(column.name, column.kind, f"{column.missing:.1%}", f"{column.distinct:,}", column.typical[:40])
    return table


def _outcome(diagnosis: Diagnosis) -> Table:
    table = _table("\nOutcome", "snapshot", "split", "rows", "converted", "rate")
    for o in diagnosis.outcome:
        table.add_row(o.snapshot, o.split, f"{o.rows:,}", f"{o.converted:,}", f"{o.rate:.2%}")
    return table


def _features(diagnosis: Diagnosis) -> Table:
    table = _table(f"\n{len(diagnosis.features)} features", "name", "meaning")
    for name, meaning in diagnosis.features:
        table.add_row(name, meaning)
    return table


def _findings(diagnosis: Diagnosis) -> Table:
    table = _table("\nFindings", "code", "severity", "where", "what, and what to do")
    for f in diagnosis.ranked:
        words = f"{CODES[f.code][1]}: {f.message}." + (f" {f.fix}." if f.fix else "")
        table.add_row(f.code, f.severity, f.where, words, style=_STYLES.get(f.severity, ""))
    if not diagnosis.findings:
        table.add_row("", "", "", "none")
    return table
