"""Alerts: the one place where a finding becomes something that somebody is told, once, and told again when it is over.

`alerts/alerts.sqlite` of the home folder holds every alert, its events (raised, escalated, resolved) and what is to be
delivered to whom. A finding that lasts is one alert. Delivery is at least once: what was sent is marked after it was
sent, and what could not be sent is tried again, with growing pauses, for ever.

Belongs here: state and delivery. Does not: what is a finding.
"""

import json
import logging
import os
import re
import sqlite3
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from propensity_dagster.campaign import explain_problem
from propensity_dagster.campaign_sections import Frozen
from propensity_dagster.data.lake import Home, locked
from propensity_dagster.errors import ConfigError
from propensity_dagster.monitoring.findings import ALERT, Finding
from propensity_dagster.reports.site import report_url

logger = logging.getLogger(__name__)

SETTINGS, PAGE = "settings.yaml", "monitoring.html"
RAISED, ESCALATED, RESOLVED = "raised", "escalated", "resolved"

_SHOWN = 20  # findings of one message
_LONGEST_PAUSE = timedelta(hours=1)
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_TABLES = """
CREATE TABLE IF NOT EXISTS alerts (
    id INTEGER PRIMARY KEY, campaign TEXT NOT NULL, key TEXT NOT NULL, source TEXT NOT NULL, severity TEXT NOT NULL,
    snapshot TEXT NOT NULL, last_snapshot TEXT NOT NULL, opened_at TEXT NOT NULL, resolved_at TEXT,
    finding TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS one_open ON alerts (campaign, key) WHERE resolved_at IS NULL;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, alert INTEGER NOT NULL, kind TEXT NOT NULL, snapshot TEXT NOT NULL, at TEXT NOT NULL,
    routed INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS deliveries (
    event INTEGER NOT NULL, channel TEXT NOT NULL, due TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    deferred INTEGER NOT NULL DEFAULT 0, sent_at TEXT, obsolete INTEGER NOT NULL DEFAULT 0, error TEXT,
    PRIMARY KEY (event, channel)
);
CREATE TABLE IF NOT EXISTS progress (campaign TEXT PRIMARY KEY, snapshot TEXT NOT NULL);
"""


class Channel(Frozen):
    """Somebody who is told.

    Attributes:
        name: of the channel.
        url: where, in apprise's notation (slack://, mailto://, json://, ...); ${NAME} is taken from the environment.
        severities: which findings.
        campaigns: whose; all when empty.
        cool_down_hours: a finding that was told, went away and comes back is not told again before.
        digest_hours: at most one message in so many hours; 0 sends at once.
        resolved: whether the end of a finding is told too.
    """

    name: Annotated[str, Field(min_length=1)]
    url: str
    severities: tuple[Literal["alert", "warn"], ...] = ("alert",)
    campaigns: tuple[str, ...] = ()
    cool_down_hours: Annotated[float, Field(ge=0)] = 24.0
    digest_hours: Annotated[float, Field(ge=0)] = 0.0
    resolved: bool = True

    @field_validator("severities", "campaigns", mode="before")
    @classmethod
    def _accept_one(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class AlertSettings(Frozen):
    """`alerts/settings.yaml` of the home folder, read again whenever something is delivered."""

    channels: tuple[Channel, ...] = ()


@dataclass(frozen=True)
class Alert:
    """A finding with its life so far; `resolved_at` is None while it is open."""

    campaign: str
    finding: Finding
    snapshot: date
    last_snapshot: date
    opened_at: str
    resolved_at: str | None


@dataclass(frozen=True)
class DeliveryReport:
    """What one pass of delivery did: messages sent, channels that failed with the reason, events still waiting."""

    sent: int
    failed: dict[str, str]
    waiting: int


def record_findings(
    campaign: str, snapshot: date, sources: Sequence[str], findings: Sequence[Finding], home: Home, now: datetime
) -> list[str]:
    """Open, keep and resolve the alerts of a campaign by what was found at a snapshot.

    Args:
        campaign: its name.
        snapshot: that was looked at.
        sources: whose findings these are; open alerts of these sources that were not found again are resolved.
        findings: all of these sources.
        home: where alerts are kept.
        now: for the record.

    Returns:
        What changed, in words; nothing when the same snapshot is recorded again, or one that lies behind the newest.
    """
    with _open(home) as db:
        newest = db.execute("SELECT snapshot FROM progress WHERE campaign = ?", (campaign,)).fetchone()
        if newest and newest[0] > str(snapshot):
            return []  # a backfill looks at the past: its findings are in the tables, nobody is told tonight
        db.execute("INSERT OR REPLACE INTO progress VALUES (?, ?)", (campaign, str(snapshot)))
        rows = db.execute(
            "SELECT id, key, severity, source FROM alerts WHERE campaign = ? AND resolved_at IS NULL", (campaign,)
        ).fetchall()
        known = {key: (number, severity, source) for number, key, severity, source in rows}
        changes: list[str] = []
        for finding in findings:
            changes += _raise(db, campaign, snapshot, finding, known.get(finding.key), now)
        kept = {finding.key for finding in findings}
        for key, (number, _, source) in known.items():
            if source in sources and key not in kept:
                db.execute("UPDATE alerts SET resolved_at = ? WHERE id = ?", (_text(now), number))
                _event(db, number, RESOLVED, snapshot, now)
                changes.append(f"{RESOLVED}: {key}")
    return changes


def raise_once(campaign: str, snapshot: date, finding: Finding, home: Home, now: datetime) -> None:
    """Tell of something that happened and has no end, such as a failed run: it is over as soon as it is told."""
    with _open(home) as db:
        query = "SELECT id, severity, source FROM alerts WHERE campaign = ? AND key = ? AND resolved_at IS NULL"
        _raise(db, campaign, snapshot, finding, db.execute(query, (campaign, finding.key)).fetchone(), now)
        db.execute(
            "UPDATE alerts SET resolved_at = ? WHERE campaign = ? AND key = ? AND resolved_at IS NULL",
            (_text(now), campaign, finding.key),
        )


def read_alerts(home: Home, campaign: str | None = None, *, only_open: bool = False) -> list[Alert]:
    """Alerts, the newest first."""
    if not _file(home).exists():
        return []
    with _open(home) as db:
        rows = db.execute(
            "SELECT campaign, finding, snapshot, last_snapshot, opened_at, resolved_at FROM alerts "
            "WHERE (? IS NULL OR campaign = ?) AND (NOT ? OR resolved_at IS NULL) ORDER BY id DESC",
            (campaign, campaign, only_open),
        ).fetchall()
    return [
        Alert(c, Finding(**json.loads(f)), date.fromisoformat(s), date.fromisoformat(last), opened, resolved)
        for c, f, s, last, opened, resolved in rows
    ]


def deliver_alerts(home: Home, now: datetime) -> DeliveryReport:
    """Tell every channel what it has not been told yet; what fails is tried again at a later pass.

    Raises:
        ConfigError: when the settings are wrong; nothing is lost meanwhile.
    """
    if not _file(home).exists():
        return DeliveryReport(0, {}, 0)
    settings = read_settings(home)
    sent, failed = 0, {}
    with locked(_file(home).with_name(".delivery.lock")):  # two passes at once would tell everything twice
        with _open(home) as db:
            _route(db, settings, now)
        for channel in settings.channels:
            with _open(home) as db:
                pending = _pending(db, channel, now)
            if not pending:
                continue
            error = send(channel, *_message(pending), _kind(pending))
            with _open(home) as db:
                _note(db, channel, pending, error, now)
            if error:
                failed[channel.name] = error
                logger.warning("alerts: channel %s: %s", channel.name, error)
            else:
                sent += 1
        with _open(home) as db:
            query = "SELECT COUNT(*) FROM deliveries WHERE sent_at IS NULL AND NOT obsolete"
            waiting = db.execute(query).fetchone()[0]
    return DeliveryReport(sent, failed, waiting)


def settings_file(home: Home) -> Path:
    """Where the channels of a home folder are written."""
    return home.root / "alerts" / SETTINGS


def read_settings(home: Home) -> AlertSettings:
    """The channels of a home folder; none without a file.

    Raises:
        ConfigError: naming the file, the key, and what is allowed.
    """
    file = settings_file(home)
    if not file.exists():
        return AlertSettings()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        settings = AlertSettings.model_validate(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        lines = [explain_problem(file, AlertSettings, problem) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None
    names = [channel.name for channel in settings.channels]
    if len(set(names)) != len(names):
        raise ConfigError(f"{file}: channels: names must differ, got {', '.join(names)}")
    return settings


def send(channel: Channel, title: str, body: str, kind: str = "info") -> str | None:
    """Send one message; what went wrong, or None. The address is never told: it holds passwords.

    Args:
        channel: to whom.
        title: of the message.
        body: as plain text.
        kind: "failure", "warning", "success" or "info", which services show as a colour or pass on.
    """
    import apprise

    missing = [name for name in _VARIABLE.findall(channel.url) if name not in os.environ]
    if missing:
        return f"environment variable {missing[0]} is not set"
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it logs addresses
    service = apprise.Apprise()
    if not service.add(_VARIABLE.sub(lambda m: os.environ[m.group(1)], channel.url)):
        return (
            "its url is not an address that apprise knows, such as slack://..., mailto://... or, for a webhook, "
            "json://host/path (jsons:// over TLS): https://github.com/caronc/apprise lists them"
        )
    try:
        done = service.notify(
            title=title, body=body, body_format=apprise.NotifyFormat.TEXT, notify_type=apprise.NotifyType(kind)
        )
    except Exception as error:  # a plug-in may raise anything; the others must be told all the same
        return f"{type(error).__name__} while sending"
    return None if done else "the service did not take the message, or nobody answers at its address"


def _raise(
    db: sqlite3.Connection, campaign: str, snapshot: date, finding: Finding, known: Any, now: datetime
) -> list[str]:
    """Open an alert, or keep it; a warning that became an alert is told again."""
    content = json.dumps(finding.to_json())
    if known is None:
        number = db.execute(
            "INSERT INTO alerts (campaign, key, source, severity, snapshot, last_snapshot, opened_at, finding) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                campaign,
                finding.key,
                finding.source,
                finding.severity,
                str(snapshot),
                str(snapshot),
                _text(now),
                content,
            ),
        ).lastrowid
        _event(db, number, RAISED, snapshot, now)
        return [f"{RAISED}: {finding.key}"]
    number, severity, _ = known
    db.execute(
        "UPDATE alerts SET severity = ?, last_snapshot = ?, finding = ? WHERE id = ?",
        (finding.severity, str(snapshot), content, number),
    )
    if severity != ALERT and finding.severity == ALERT:
        _event(db, number, ESCALATED, snapshot, now)
        return [f"{ESCALATED}: {finding.key}"]
    return []


def _event(db: sqlite3.Connection, alert: int | None, kind: str, snapshot: date, now: datetime) -> None:
    db.execute(
        "INSERT INTO events (alert, kind, snapshot, at) VALUES (?, ?, ?, ?)", (alert, kind, str(snapshot), _text(now))
    )


def _route(db: sqlite3.Connection, settings: AlertSettings, now: datetime) -> None:
    """Decide who is told of each new event. Without any channel events wait for one."""
    if not settings.channels:
        return
    events = db.execute(
        "SELECT e.id, e.kind, a.id, a.campaign, a.key, a.severity FROM events e JOIN alerts a ON a.id = e.alert "
        "WHERE NOT e.routed ORDER BY e.id"
    ).fetchall()
    for event, kind, alert, campaign, key, severity in events:
        for channel in settings.channels:
            wanted = severity in channel.severities and (not channel.campaigns or campaign in channel.campaigns)
            if kind == RESOLVED:
                wanted = channel.resolved and _was_told(db, alert, channel.name)
            if wanted:
                due = _end_of_cool_down(db, channel, campaign, key, kind, now)
                db.execute(
                    "INSERT OR IGNORE INTO deliveries (event, channel, due, deferred) VALUES (?, ?, ?, ?)",
                    (event, channel.name, _text(due), due > now),
                )
        db.execute("UPDATE events SET routed = 1 WHERE id = ?", (event,))


def _was_told(db: sqlite3.Connection, alert: int, channel: str) -> bool:
    """Whether a channel was told of an alert, or is about to be."""
    query = (
        "SELECT 1 FROM deliveries d JOIN events e ON e.id = d.event "
        "WHERE e.alert = ? AND d.channel = ? AND e.kind <> ? AND NOT d.obsolete"
    )
    return db.execute(query, (alert, channel, RESOLVED)).fetchone() is not None


def _end_of_cool_down(
    db: sqlite3.Connection, channel: Channel, campaign: str, key: str, kind: str, now: datetime
) -> datetime:
    """When a finding that keeps coming back may be told again; at once if it never was, or became graver."""
    if kind != RAISED:
        return now
    query = (
        "SELECT MAX(d.sent_at) FROM deliveries d JOIN events e ON e.id = d.event JOIN alerts a ON a.id = e.alert "
        "WHERE a.campaign = ? AND a.key = ? AND d.channel = ? AND e.kind <> ?"
    )
    last = db.execute(query, (campaign, key, channel.name, RESOLVED)).fetchone()[0]
    return max(now, datetime.fromisoformat(last) + timedelta(hours=channel.cool_down_hours)) if last else now


def _pending(db: sqlite3.Connection, channel: Channel, now: datetime) -> list[dict[str, Any]]:
    """What a channel is to be told now, oldest first."""
    # What came back and went away again while it was cooling down is over: neither is told.
    db.execute(
        "UPDATE deliveries SET obsolete = 1 WHERE channel = ? AND sent_at IS NULL AND event IN ("
        "SELECT e.id FROM events e JOIN alerts a ON a.id = e.alert WHERE a.resolved_at IS NOT NULL AND EXISTS ("
        "SELECT 1 FROM deliveries d JOIN events r ON r.id = d.event "
        "WHERE r.alert = a.id AND d.channel = ? AND d.deferred AND d.sent_at IS NULL))",
        (channel.name, channel.name),
    )
    last = db.execute("SELECT MAX(sent_at) FROM deliveries WHERE channel = ?", (channel.name,)).fetchone()[0]
    if last and now < datetime.fromisoformat(last) + timedelta(hours=channel.digest_hours):
        return []
    rows = db.execute(
        "SELECT e.id, e.kind, e.snapshot, a.campaign, a.finding FROM deliveries d JOIN events e ON e.id = d.event "
        "JOIN alerts a ON a.id = e.alert WHERE d.channel = ? AND d.sent_at IS NULL AND NOT d.obsolete AND d.due <= ? "
        "ORDER BY e.id",
        (channel.name, _text(now)),
    ).fetchall()
    return [
        {"event": e, "kind": kind, "snapshot": s, "campaign": c, "finding": Finding(**json.loads(f))}
        for e, kind, s, c, f in rows
    ]


def _message(pending: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Title and text of one message about all of these, the gravest first."""
    ranked = sorted(pending, key=lambda p: (p["kind"] == RESOLVED, p["finding"].severity != ALERT, p["event"]))
    campaigns = list(dict.fromkeys(p["campaign"] for p in ranked))
    new = [p for p in ranked if p["kind"] != RESOLVED]
    grave = sum(p["finding"].severity == ALERT for p in new)
    counts = [f"{grave} alert{'s' * (grave != 1)}" if grave else ""]
    counts.append(f"{len(new) - grave} warning{'s' * (len(new) - grave != 1)}" if len(new) > grave else "")
    counts.append(f"{len(ranked) - len(new)} resolved" if len(ranked) > len(new) else "")
    title = f"Propensity, {', '.join(campaigns)}: {', '.join(c for c in counts if c)}"
    parts = [_paragraph(p) for p in ranked[:_SHOWN]]
    if len(ranked) > _SHOWN:
        parts.append(f"and {len(ranked) - _SHOWN} more")
    parts += [f"{campaign}: {report_url(campaign, PAGE)}" for campaign in campaigns]
    return title, "\n\n".join(parts)


def _kind(pending: Sequence[dict[str, Any]]) -> str:
    """What the gravest of these is to a service."""
    new = [p["finding"].severity for p in pending if p["kind"] != RESOLVED]
    return "failure" if ALERT in new else "warning" if new else "success"


def _paragraph(event: dict[str, Any]) -> str:
    finding: Finding = event["finding"]
    word = "RESOLVED" if event["kind"] == RESOLVED else finding.severity.upper()
    first = f"{word} {event['campaign']}, snapshot {event['snapshot']}, {finding.source}: {finding.sentence}."
    if event["kind"] == RESOLVED:
        return f"{word} {event['campaign']}, snapshot {event['snapshot']}: no longer so: {finding.sentence}."
    more = [f"Probable cause: {finding.cause}." if finding.cause else "", finding.advice]
    return "\n".join(part for part in (first, *more) if part)


def _note(
    db: sqlite3.Connection, channel: Channel, pending: Sequence[dict[str, Any]], error: str | None, now: datetime
) -> None:
    for item in pending:
        place = (item["event"], channel.name)
        if error is None:
            db.execute("UPDATE deliveries SET sent_at = ? WHERE event = ? AND channel = ?", (_text(now), *place))
            continue
        query = "SELECT attempts FROM deliveries WHERE event = ? AND channel = ?"
        attempts = db.execute(query, place).fetchone()[0] + 1
        pause = min(timedelta(minutes=2.0 ** min(attempts, 10)), _LONGEST_PAUSE)
        db.execute(
            "UPDATE deliveries SET attempts = ?, error = ?, due = ? WHERE event = ? AND channel = ?",
            (attempts, error, _text(now + pause), *place),
        )


def _file(home: Home) -> Path:
    return home.root / "alerts" / "alerts.sqlite"


@contextmanager
def _open(home: Home) -> Generator[sqlite3.Connection]:
    """One transaction: all of it, or nothing."""
    file = _file(home)
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file, timeout=30)) as db:
        db.executescript(_TABLES)
        with db:
            db.execute("BEGIN IMMEDIATE")
            yield db


def _text(at: datetime) -> str:
    """Equal instants in equal words, which sort as they follow each other."""
    return at.astimezone(UTC).isoformat(timespec="seconds")
