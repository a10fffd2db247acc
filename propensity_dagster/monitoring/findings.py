"""What drift, quality and performance say, as findings in words: how grave, why, and what to do.

A finding never holds a value of a customer: column names, counts, shares and indices only. Belongs here: from the
tables of monitoring to findings, and the verdict over them. Does not: who is told, which is alerts'.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.lake import Home
from propensity_dagster.monitoring.drift import DISTRIBUTION, DOMAIN, SCORE, TOGETHER, TRAINING, read_drift
from propensity_dagster.monitoring.ledger import (
    LEVEL,
    RANKING,
    SPREAD,
    judged_rows,
    persistent_problems,
    read_ledger,
    reopened_rows,
)
from propensity_dagster.monitoring.quality import DUPLICATES, QUARANTINED, ROWS, SILENCE, read_quality

ALERT, WARN = "alert", "warn"
DRIFTING, QUALITY, PERFORMANCE, RUN = "drift", "quality", "performance", "run"
"""Where findings come from."""

_MINOR = 0.02  # share of importance below which a column's drift cannot move many scores
_HEAVY = 0.10  # share of importance that drifted, from which scores are not to be trusted
_CAUSES = 4


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        source: "drift", "quality", "performance" or "run".
        subject: what it is about; with the source it names the finding from one snapshot to the next.
        severity: "warn" or "alert".
        sentence: what was found, with its numbers.
        cause: the probable cause, or "".
        advice: what to do.
        numbers: those of the sentence.
    """

    source: str
    subject: str
    severity: str
    sentence: str
    cause: str = ""
    advice: str = ""
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def key(self) -> str:
        """Names the finding from one snapshot to the next."""
        return f"{self.source}: {self.subject}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Whether the scores of a snapshot are to be trusted: "yes", "with care" or "no", and why, in one sentence."""

    answer: str
    sentence: str


def drift_findings(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """One finding per column that moved, the gravest first; and of scores and all columns together."""
    found = [row for row in rows if row["severity"] == ALERT or (row["severity"] == WARN and not _is_minor(row))]
    cause = _cause(found)
    findings: list[Finding] = []
    columns = list(dict.fromkeys(row["column"] for row in found))
    for column in columns:
        own = sorted((row for row in found if row["column"] == column), key=_gravity)
        alike = sum(_log_of(other) == _log_of(column) for other in columns) - 1
        findings.append(_of_column(own[0], [*own[1:]], cause, alike))
    return sorted(findings, key=lambda f: (f.severity != ALERT, -(f.numbers.get("importance") or 0.0)))


def quality_findings(campaign: Campaign, rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """One finding for each measure of a table that left its bounds."""
    return [_of_table(campaign, row) for row in rows if row["severity"] != "none"]


def performance_findings(campaign: Campaign, ledger: Sequence[dict[str, Any]]) -> list[Finding]:
    """What mature snapshots say of the version that scored last: concept drift once it persists, else a warning."""
    if not ledger:
        return []
    version = ledger[-1]["model_version"]
    judged = judged_rows(ledger, version)
    findings: list[Finding] = []
    if judged:
        lasting = persistent_problems(campaign, ledger, version)
        newest = judged[-1]
        for problem in newest["problems"]:
            findings.append(_of_problem(campaign, problem, judged, lasting=problem in lasting))
    reopened = reopened_rows(ledger)
    if reopened:
        snapshot, now, before = (reopened[-1][name] for name in ("snapshot", "converted", "revisions"))
        before = before[-2]
        findings.append(
            Finding(
                PERFORMANCE,
                "late events",
                WARN,
                f"late events re-opened {len(reopened)} snapshots; {snapshot} has {now:,} conversions, had {before:,}",
                advice="State how late events may be (source.late_days), or ask why they are late.",
                numbers={"snapshots": len(reopened), "conversions": now, "before": before},
            )
        )
    return findings


def snapshot_findings(campaign: Campaign, snapshot: date, home: Home) -> list[Finding]:
    """Everything that was found about a snapshot whose drift, quality and ledger have been published; alerts first."""
    findings = [
        *quality_findings(campaign, read_quality(campaign, snapshot, home)),
        *performance_findings(campaign, [r for r in read_ledger(campaign, home) if r["snapshot"] <= snapshot]),
        *drift_findings(read_drift(campaign, snapshot, home)),
    ]
    return sorted(findings, key=lambda f: f.severity != ALERT)


def verdict(findings: Sequence[Finding], waiting: str = "") -> Verdict:
    """Should the scores of this snapshot be trusted?

    Args:
        findings: of the snapshot.
        waiting: what cannot be known yet, said where nothing else is wrong.
    """
    heavy = sum(f.numbers.get("importance") or 0.0 for f in findings if f.source == DRIFTING and f.severity == ALERT)
    grave = [
        f for f in findings if f.severity == ALERT and (f.source != DRIFTING or f.subject == SCORE or heavy >= _HEAVY)
    ]
    if grave:
        return Verdict("no", f"No: {grave[0].sentence}{_more(len(findings) - 1)}.")
    if findings:
        return Verdict("with care", f"With care: {findings[0].sentence}{_more(len(findings) - 1)}.")
    words = "inputs, scores and data look as they did when the model was trained"
    return Verdict("yes", f"Yes: {words}{'; ' + waiting if waiting else ''}.")


def _more(count: int) -> str:
    return f"; and {count} more finding{'s' if count > 1 else ''}" if count else ""


def told_severity(row: Mapping[str, Any]) -> str:
    """How grave a row of the drift table is to people: what hardly moves a score is no reason to wake anybody."""
    return WARN if row["severity"] == ALERT and _is_minor(row) else row["severity"]


def _is_minor(row: Mapping[str, Any]) -> bool:
    """Whether the model hardly looks at a column: a small change of it is in the table, and no finding."""
    return row["importance"] is not None and row["importance"] < _MINOR


def _gravity(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
    """The gravest row of a column first; against training before against the snapshot before."""
    return row["severity"] != ALERT, row["against"] != TRAINING, -(row["value"] or 0.0)


def _cause(rows: Sequence[Mapping[str, Any]]) -> str:
    """The columns that drifted and have most of the model's importance."""
    shares = {r["column"]: r["importance"] for r in rows if r["importance"] is not None}
    largest = sorted(shares.items(), key=lambda item: -item[1])[:_CAUSES]
    return ", ".join(f"{name} ({share:.0%} of the importance)" for name, share in largest)


def _log_of(column: str) -> str:
    """The event log of a feature, by its name."""
    return column.partition("_")[0]


def _of_column(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]], cause: str, alike: int) -> Finding:
    column, measure, against = row["column"], row["measure"], row["against"]
    importance = row["importance"]
    severity = told_severity(row)
    numbers = {"value": row["value"], "usual": row["usual"], "against": against, "importance": importance}
    since = "training" if against == TRAINING else "the snapshot before"
    if measure == DOMAIN:
        return Finding(
            DRIFTING,
            TOGETHER,
            severity,
            f"customers can be told from those the model learnt from with an AUC of {row['value']:.2f}",
            f"columns that tell them apart: {row['detail']}",
            "Look at these columns; train again if the change is here to stay.",
            numbers,
        )
    if column == SCORE:
        sentence = f"scores are distributed otherwise than at {since} (stability index {row['value']:.2f})"
        advice = "Check the columns named, then whether a cut-off or capacity still fits."
        return Finding(DRIFTING, SCORE, severity, sentence, f"drifted: {cause}" if cause else "", advice, numbers)
    if measure == DISTRIBUTION:
        sentence = f"{column} moved since {since} (stability index {row['value']:.2f}, {_place(row['detail'])})"
    else:
        sentence = f"{column}: {row['value']:.1%} of the values are {measure}, {row['usual']:.1%} at {since}"
    also = [other["measure"] for other in others if other["measure"] != measure]
    if importance is not None:
        sentence += f"; it has {importance:.0%} of the model's importance"
    together = (
        f"{alike} more columns of {_log_of(column)} moved: what they all come from has changed" if alike > 1 else ""
    )
    words = "; ".join(part for part in (together, f"also: {', '.join(dict.fromkeys(also))}" if also else "") if part)
    advice = "Has its source, its unit or its meaning changed? Mend the source, or train again."
    return Finding(DRIFTING, column, severity, sentence, words, advice, numbers)


def _place(detail: str) -> str:
    """Where it moved, without a value of a customer: a category's name may be one."""
    known = ("above", "up to", "any value", "missing", "unseen")
    return f"most: {detail}" if detail.startswith(known) else "most in one of its categories"


def _of_table(campaign: Campaign, row: Mapping[str, Any]) -> Finding:
    table, measure, day = row["table"], row["measure"], row["day"]
    numbers = {name: row[name] for name in ("value", "usual", "low", "high")}
    if measure == ROWS:
        usual = "" if row["usual"] is None else f", usual on that weekday are {row['usual']:,.0f}"
        bound = row["low"] if row["value"] < row["low"] else row["high"]
        sentence = f"{table} has {row['value']:,.0f} rows on {day}{usual} (bound {bound:,.0f})"
        cause = (
            "the source stopped, is late or incomplete" if row["value"] < row["low"] else "rows come twice, or a surge"
        )
        floor = campaign.monitoring.min_rows.get(table)
        advice = f"Ask the source; the floor of the campaign is {floor:,}." if floor else "Ask the source."
    elif measure == SILENCE:
        sentence = (
            f"{table} has been silent for {row['value']:.0f} days; the longest silence before was {row['usual']:.0f}"
        )
        cause, advice = "the source stopped, or events are late", "Ask the source; scores use what came before."
    else:
        sentence = (
            f"{row['value']:.1%} of the rows of {table} on {day} are {_WORDS[measure]}, usual are {row['usual']:.1%}"
        )
        cause = "a day was sent twice" if measure == DUPLICATES else "the source writes rows that break the contract"
        advice = (
            f"Look at quarantine_{table}." if measure == QUARANTINED else "Nothing is counted twice; ask the source."
        )
    return Finding(QUALITY, f"{table} {measure}", row["severity"], sentence, cause, advice, numbers)


_WORDS = {QUARANTINED: "in quarantine", DUPLICATES: "duplicates"}


def _of_problem(campaign: Campaign, problem: str, judged: Sequence[Mapping[str, Any]], *, lasting: bool) -> Finding:
    row = judged[-1]
    share = row["known"] / row["rows"]
    promised = row["promised_conversions"] * share
    numbers: dict[str, Any] = {"snapshot": str(row["snapshot"]), "converted": row["converted"], "promised": promised}
    when = f"of snapshot {row['snapshot']}"
    if problem == LEVEL:
        low, high = row["promised_conversions_low"] * share, row["promised_conversions_high"] * share
        sentence = f"{row['converted']:,} conversions {when}, {promised:,.0f} were promised ({low:,.0f} to {high:,.0f})"
        advice = "Recalibrate: the ranking may still be right."
    elif problem == RANKING:
        sentence = f"AUC {when} is {row['realised_auc']:.3f}, {row['promised_auc']:.3f} was promised"
        advice = "Train again; the gate decides."
        numbers |= {"auc": row["realised_auc"], "promised_auc": row["promised_auc"]}
    else:
        assert problem == SPREAD
        slope = row["realised_calibration_slope"]
        sentence = (
            f"calibration slope {when} is {slope:.2f}, allowed are {campaign.gate.slope[0]} to {campaign.gate.slope[1]}"
        )
        advice = "Recalibrate: the ranking may still be right."
        numbers["slope"] = slope
    if not lasting:
        needed = campaign.monitoring.persist
        return Finding(
            PERFORMANCE, problem, WARN, sentence, f"one snapshot; {needed} in a row are concept drift", advice, numbers
        )
    cause = f"concept drift: the same for {campaign.monitoring.persist} mature snapshots in a row"
    return Finding(PERFORMANCE, problem, ALERT, sentence, cause, advice, numbers)
