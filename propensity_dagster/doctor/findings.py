"""What the doctor says: coded findings, profiles of the tables, outcome rates. Nothing here reads data."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

ERROR, WARNING, INFO = "error", "warning", "info"
_RANKS = {ERROR: 0, WARNING: 1, INFO: 2}

CODES: dict[str, tuple[str, str]] = {
    "P001": (ERROR, "the campaign file or its source is wrong"),
    "P002": (ERROR, "the source cannot be read"),
    "P003": (ERROR, "the columns are not as declared"),
    "P101": (ERROR, "too few converters"),
    "P102": (ERROR, "too few others"),
    "P103": (ERROR, "too little history"),
    "P104": (WARNING, "unusual outcome rate"),
    "P105": (ERROR, "all outcomes are equal"),
    "P106": (ERROR, "the outcome has values of unknown meaning"),
    "P107": (WARNING, "the outcome rate changes"),
    "P108": (WARNING, "fewer converters than usual"),
    "P201": (WARNING, "entities missing from the customer table"),
    "P202": (WARNING, "keys given twice"),
    "P203": (WARNING, "bad rows"),
    "P204": (ERROR, "too many bad rows"),
    "P205": (INFO, "times without a zone"),
    "P206": (INFO, "no key column"),
    "P207": (WARNING, "constant column"),
    "P208": (WARNING, "column without values"),
    "P209": (WARNING, "too many categories"),
    "P210": (WARNING, "nearly every value is different"),
    "P211": (WARNING, "mostly missing"),
    "P212": (WARNING, "a time as a feature"),
    "P213": (WARNING, "rows given twice"),
    "P214": (WARNING, "numbers that may be categories"),
    "P215": (WARNING, "numbers among other texts"),
    "P301": (ERROR, "a column alone predicts the outcome"),
    "P302": (ERROR, "a column is the outcome under another coding"),
    "P303": (ERROR, "recorded after the outcome"),
    "P304": (WARNING, "events recorded later than the campaign allows for"),
}
"""Every code, its severity and its title. A code never changes its meaning."""


@dataclass(frozen=True)
class Finding:
    """One thing to know or mend. `where` is a table, or a table and column."""

    code: str
    where: str
    message: str
    fix: str = ""

    @property
    def severity(self) -> str:
        """Whether it stops the training, may harm it, or is only to be known."""
        return CODES[self.code][0]

    @property
    def sentence(self) -> str:
        """Code, title, numbers and remedy."""
        return f"{self.code} {CODES[self.code][1]}: {self.message}." + (f" {self.fix}." if self.fix else "")


@dataclass(frozen=True)
class ColumnProfile:
    """One column: share of missing values, number of different ones, and its range or most frequent value."""

    name: str
    kind: str
    missing: float
    distinct: int
    typical: str


@dataclass(frozen=True)
class TableProfile:
    """One table: rows, good rows, range of times, entities, columns."""

    table: str
    rows: int
    good: int
    first: str
    last: str
    entities: int
    columns: list[ColumnProfile] = field(default_factory=list[ColumnProfile])


@dataclass(frozen=True)
class OutcomeRate:
    """Rows and converters of one snapshot, or of one side of a split."""

    snapshot: str
    split: str
    rows: int
    converted: int

    @property
    def rate(self) -> float:
        """Share that converted."""
        return self.converted / self.rows if self.rows else 0.0


@dataclass
class Diagnosis:
    """Everything that was found. `features` are name and meaning, in the order of the features table."""

    campaign: str
    findings: list[Finding] = field(default_factory=list[Finding])
    tables: list[TableProfile] = field(default_factory=list[TableProfile])
    outcome: list[OutcomeRate] = field(default_factory=list[OutcomeRate])
    features: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def add(self, code: str, where: str, message: str, fix: str = "") -> None:
        """Note one finding."""
        self.findings.append(Finding(code, where, message, fix))

    @property
    def ranked(self) -> list[Finding]:
        """Errors first, then warnings, then the rest, each by code."""
        return sorted(self.findings, key=lambda f: (_RANKS[f.severity], f.code, f.where))

    @property
    def errors(self) -> list[Finding]:
        """What stops the training."""
        return [f for f in self.ranked if f.severity == ERROR]

    def to_json(self) -> str:
        """The whole diagnosis as JSON."""
        content: dict[str, Any] = asdict(self)
        content["findings"] = [
            {"code": f.code, "severity": f.severity, "where": f.where, "message": f.message, "fix": f.fix}
            for f in self.ranked
        ]
        content["outcome"] = [{**asdict(o), "rate": o.rate} for o in self.outcome]
        content["features"] = [{"name": name, "meaning": meaning} for name, meaning in self.features]
        return json.dumps(content, indent=1)


def judge_counts(
    diagnosis: Diagnosis, where: str, rows: int, converted: int, words: str, minimum: int, kept: float = 1.0
) -> None:
    """Findings on the number of converters and others to learn from; of the others only the share `kept` is.

    Minimum counts as in Adobe Customer AI and GA4: 500 of both; fewer than twice that is worth a warning.
    """
    others = round(kept * (rows - converted))
    fix = "Widen horizon_days or add snapshots" if "snapshot" in words else "Use more rows, or another outcome"
    if rows and converted in (0, rows):
        diagnosis.add("P105", where, f"{converted:,} of {rows:,} rows {words} converted", "Check the outcome")
    elif converted < minimum:
        diagnosis.add("P101", where, f"{converted:,} {words}, {minimum:,} needed", fix)
    elif others < minimum:
        left = f" and are kept ({kept:.1%}, snapshots.keep_negatives)" if kept < 1 else ""
        diagnosis.add("P102", where, f"{others:,} {words} did not convert{left}, {minimum:,} needed", fix)
    elif min(converted, others) < 2 * minimum:
        few = min(converted, others)
        diagnosis.add("P108", where, f"{few:,} {words}; from {2 * minimum:,} on models are steadier", fix)
    rate = converted / rows if rows else 0.0
    if rows and 0 < converted < rows and not 0.001 <= rate <= 0.6:
        diagnosis.add("P104", where, f"{rate:.2%} convert; usual are 0.1% to 60%", "Check outcome and eligibility")


def rate_change(outcome: Sequence[OutcomeRate]) -> tuple[float, float] | None:
    """Rates of the training and the test rows where they differ by more than a factor of 1.5, else None."""
    sides: list[float] = []
    for split in ("train", "test"):
        chosen = [o for o in outcome if o.split == split]
        rows = sum(o.rows for o in chosen)
        sides.append(sum(o.converted for o in chosen) / rows if rows else 0.0)
    train, test = sides
    if min(sides) <= 0 or max(sides) / min(sides) < 1.5:
        return None
    return train, test
