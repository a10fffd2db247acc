"""A first campaign file from a look at the data: guesses that are written down, each where it can be changed.

Belongs here: guessing what tables and columns mean, and writing the YAML. The doctor judges the result.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import yaml

from propensity_dagster.campaign import Campaign, EventCampaign, TableCampaign, load_campaign
from propensity_dagster.data import coerce
from propensity_dagster.data.connections import is_database, reading, source_connection
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.files import files_in, read_files, table_of
from propensity_dagster.data.lake import Home
from propensity_dagster.data.sources import open_table, source_folder, tables_of_database
from propensity_dagster.doctor import diagnose
from propensity_dagster.doctor.findings import Diagnosis
from propensity_dagster.errors import ConfigError, InsufficientDataError
from propensity_dagster.evaluation.splits import plan_splits

_ROWS_LOOKED_AT = 200_000
_NEARLY_ALL, _RARE = 0.95, 0.005
_TIME_FORMS = {
    "%Y%m%d": r"^(19|20)\d{6}$",
    "%d.%m.%Y": r"^\d{1,2}\.\d{1,2}\.\d{4}$",
    "%d/%m/%Y": r"^\d{1,2}/\d{1,2}/\d{4}$",
    "%m/%d/%Y": r"^\d{1,2}/\d{1,2}/\d{4}$",
}
"""How times are written where they are not ISO, the day before the month unless that cannot be."""
_ENTITY_WORDS = ("customer", "client", "user", "account", "contact", "member", "visitor", "cust")
_OUTCOME_WORDS = (
    "y", "target", "label", "outcome", "converted", "conversion", "response", "responded", "bought", "purchase",
    "purchased", "revenue", "churn", "churned", "subscribed", "visit", "uptake", "default", "result", "won", "success",
    "sold", "accepted",
)  # fmt: skip
_OUTCOME_VALUES = ({"won", "lost"}, {"accepted", "rejected"}, {"success", "failure"}, {"sold", "not sold"})
_ORDER_WORDS = ("order", "purchase", "transaction", "sale", "payment", "invoice", "booking", "response", "upgrade")
_AMOUNT_WORDS = ("amount", "price", "total", "revenue", "spend", "value", "sum")
_TYPE_WORDS = ("event", "type", "kind", "action", "status")
_DATABASE_FILES = {".db": "sqlite://", ".sqlite": "sqlite://", ".sqlite3": "sqlite://", ".duckdb": "duckdb://"}
_EXCLUDED = {
    "P301": "it predicts the outcome all alone: was it known before the decision?",
    "P302": "it is the outcome in other words",
    "P303": "recorded after the decision",
    "P207": "always the same",
    "P208": "without values",
    "P210": "different in nearly every row: an identifier",
    "P212": "a time, which only grows: derive a number of days from it instead",
}


@dataclass(frozen=True)
class _Column:
    """What a look at one column says. `values` are its few values, the most frequent first, faulty ones left out."""

    name: str
    is_number: bool
    is_time: bool
    time_format: str | None
    distinct: int
    filled: int
    values: tuple[str, ...]

    def named(self, words: Sequence[str]) -> bool:
        """Whether its name has one of the words, whole."""
        parts = re.split(r"[^a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", self.name).lower())
        return any(word in parts for word in words)

    @property
    def is_identifier(self) -> bool:
        """Whether its name ends like one of an identifier."""
        return bool(re.search(r"(^|[_\s.-]|[a-z])(id|ID|Id|key|Key|number|Number|[nN]o|[nN]r)$", self.name))

    @property
    def is_entity(self) -> bool:
        """Whether it names a person or an account: customer, customer_id, but not customer_type."""
        bare = re.sub(r"[^a-z]", "", self.name.lower())
        return any(bare in (word, f"{word}id", f"{word}key", f"{word}no", f"{word}number") for word in _ENTITY_WORDS)


@dataclass(frozen=True)
class _Table:
    """What a look at one table says."""

    name: str
    rows: int
    columns: list[_Column] = field(default_factory=list[_Column])

    def first(self, test: Any) -> _Column | None:
        """The first column that passes."""
        return next((c for c in self.columns if test(c)), None)

    @property
    def time(self) -> _Column | None:
        """The first column of times."""
        return self.first(lambda c: c.is_time)


def draft_campaign(
    name: str, data: str, outcome: str | None, folder: Path, home: Home, engine: Engine
) -> tuple[Path, Diagnosis]:
    """Write `<folder>/<name>.yaml` for these data.

    Args:
        name: name of the campaign.
        data: a file, a folder of files, or the connection of a database.
        outcome: the outcome's column (one table) or event log (several); guessed when None.
        folder: where the file goes.
        home: where a synthetic world would lie; nothing else is written there.
        engine: where to look at the data.

    Returns:
        The file, and what the doctor says of it.

    Raises:
        ConfigError: when the file exists, or the data cannot be made sense of.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"NAME must be lower-case letters, digits and underscores, got {name!r}")
    file = folder / f"{name}.yaml"
    if file.exists():
        raise ConfigError(f"{file}: exists already; choose another name")
    path = Path(data)
    if "://" not in data and not path.exists():
        raise ConfigError(
            f"--from: {data!r} is not there; wanted is a file, a folder of parquet or CSV files, or a database"
        )
    place = data if "://" in data else str(path.resolve())
    if "://" not in data and path.suffix in _DATABASE_FILES:
        place = _DATABASE_FILES[path.suffix] + place
    tables = _look(name, place, file, home, engine)
    if len(tables) == 1 and _is_decisions(tables[0], outcome):
        content, notes = _decisions(name, place, tables[0], outcome)
    else:
        content, notes = _events(name, place, tables, outcome)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        diagnosis = Diagnosis(name)
        for _ in range(4):  # what the doctor finds may be mended, and mending may show more
            file.write_text(_text(content, notes), encoding="utf-8")
            campaign = load_campaign(file)
            diagnosis = diagnose(campaign, home, engine, ingested=False)
            if not _mend(campaign, content, notes, diagnosis, home, engine):
                break
    except Exception:  # whatever it is, it is raised again
        file.unlink(missing_ok=True)  # nothing half-written
        raise
    return file, diagnosis


def _look(name: str, place: str, file: Path, home: Home, engine: Engine) -> list[_Table]:
    """Profile every table of the place."""
    is_file = Path(place).is_file()
    source = {"kind": "table", "path": place} if is_file else {"kind": "table", "connection": place, "table": "any"}
    campaign = TableCampaign.model_validate(
        {"name": name, "source": source, "outcome": {"column": "any"}, "file": file.resolve()}
    )
    with reading(f"--from {place}"):
        if is_file:
            opened = {Path(place).stem: read_files([Path(place)], campaign.source.csv, engine)}
        elif is_database(source_connection(campaign)):
            names = tables_of_database(campaign, source_connection(campaign), engine)
            opened = {table: open_table(campaign, table, home, engine) for table in names}
        else:
            folder = source_folder(campaign, home) or Path(place)
            names = list(dict.fromkeys(table_of(folder, f) for f in files_in(folder)))
            opened = {table: open_table(campaign, table, home, engine) for table in names}
        if not opened:
            raise ConfigError(f"--from: {place} holds no table")
        return [_profile(table, source, engine) for table, source in opened.items()]


def _profile(name: str, table: ibis.Table, engine: Engine) -> _Table:
    """Look at the first rows of a table."""
    rows = engine.table(table.limit(_ROWS_LOOKED_AT).to_pyarrow())
    plain = {i: f"c{i}" for i in range(len(rows.columns))}
    parts: dict[str, Any] = {"rows": rows.count()}
    for i, column in enumerate(rows.columns):
        value = rows[column]
        text = value.cast("string").strip().nullif("")
        parts |= {f"{plain[i]}_filled": text.count(), f"{plain[i]}_distinct": text.nunique()}
        if value.type().is_string():
            parts[f"{plain[i]}_times"] = coerce.utc_time(value, None, column).count()
            parts[f"{plain[i]}_numbers"] = coerce.number(text).count()
        if value.type().is_string() or value.type().is_integer():
            for k, (pattern, form) in enumerate(_TIME_FORMS.items()):
                parts[f"{plain[i]}_form{k}"] = ibis.ifelse(
                    text.re_search(form), coerce.try_strptime(text, pattern), ibis.null()
                ).count()
    found = engine.arrow(rows.aggregate(**parts)).to_pylist()[0]
    columns: list[_Column] = []
    for i, column in enumerate(rows.columns):
        dtype = rows[column].type()
        filled = found[f"{plain[i]}_filled"]

        def nearly(what: str, i: int = i, filled: int = filled) -> bool:
            return filled > 0 and found.get(f"{plain[i]}_{what}", 0) >= _NEARLY_ALL * filled

        pattern = next((p for k, p in enumerate(_TIME_FORMS) if nearly(f"form{k}")), None)
        is_number = dtype.is_numeric() or nearly("numbers")
        is_time = dtype.is_timestamp() or dtype.is_date() or pattern is not None or (nearly("times") and not is_number)
        distinct = found[f"{plain[i]}_distinct"]
        values: tuple[str, ...] = ()
        if 0 < distinct <= 8:
            listed = rows.select(v=rows[column].cast("string").strip()).filter(ibis._.v != "")
            counted = listed.group_by("v").aggregate(n=listed.count()).order_by([ibis.desc("n"), "v"])
            values = tuple(row["v"] for row in engine.arrow(counted).to_pylist() if row["n"] >= _RARE * filled)
        columns.append(_Column(column, is_number and not is_time, is_time, pattern, distinct, filled, values))
    return _Table(name, found["rows"], columns)


def _is_decisions(table: _Table, outcome: str | None) -> bool:
    """One row a decision, and not an event log: there is a column that looks like an outcome."""
    if outcome is not None and any(c.name == outcome for c in table.columns):
        return True
    if _outcome_column(table) is not None:
        return True
    return _entity_key([table]) is None or table.time is None


def _outcome_column(table: _Table) -> _Column | None:
    pairs = [c for c in table.columns if c.distinct == 2 and not c.is_time]
    named = [c for c in pairs if c.named(_OUTCOME_WORDS)]
    named = named or [c for c in pairs if {v.lower() for v in c.values} in _OUTCOME_VALUES]
    return named[-1] if named else None


def _decisions(name: str, place: str, table: _Table, outcome: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    chosen = table.first(lambda c: c.name == outcome) if outcome else _outcome_column(table)
    if chosen is None and outcome is None:  # the last column of two values, as in most published tables
        chosen = next((c for c in reversed(table.columns) if c.distinct == 2), None)
    if chosen is None:
        wanted = f"no column {outcome!r}" if outcome else "no column of two values"
        names = ", ".join(c.name for c in table.columns)
        raise ConfigError(f"--from: {table.name} has {wanted}: say --outcome COLUMN; there are {names}")
    source: dict[str, Any] = {"kind": "table"}
    source |= (
        {"path": place}
        if Path(place).exists() and not is_database(place)
        else {"connection": place, "table": table.name}
    )
    notes = {"source.path": "one row per past decision", "source.table": "one row per past decision"}
    key = table.first(lambda c: c.is_entity and 50 * c.distinct >= table.rows and c.name != chosen.name)
    key = key or table.first(
        lambda c: c.is_identifier and not c.is_time and 20 * c.distinct >= table.rows and c.name != chosen.name
    )
    if key is not None:
        source["key"] = key.name
        notes["source.key"] = "the customer, account or session that a row is about"
    if table.time is not None:
        source["order"] = table.time.name
        notes["source.order"] = "the newest rows are the test"
        if table.time.time_format:
            source["time_format"] = table.time.time_format
    content: dict[str, Any] = {"name": name, "description": f"Will {chosen.name} be positive?", "source": source}
    content["outcome"] = {"column": chosen.name}
    positive = _positive_of(chosen)
    if positive is not None:
        content["outcome"]["positive"] = positive
        if len(chosen.values) > 2:
            content["outcome"]["negative"] = [v for v in chosen.values if v != positive]
        notes["outcome.positive"] = f"the values are {', '.join(chosen.values)}"
    return content, notes


def _positive_of(column: _Column) -> str | None:
    known = {"1", "0", "true", "false", "yes", "no", "t", "f", "y", "n"}
    if {v.lower().removesuffix(".0") for v in column.values} <= known:
        return None
    return column.values[-1] if column.values else None  # the rarer one


def _entity_key(tables: Sequence[_Table]) -> str | None:
    """A column that most tables share and that is named like the people it is about."""
    counts: dict[str, int] = {}
    for table in tables:
        for column in table.columns:
            if column.is_entity or (column.is_identifier and len(tables) > 1):
                counts[column.name] = counts.get(column.name, 0) + 1 + 10 * column.is_entity
        if len(tables) == 1:
            for column in table.columns:
                if column.is_identifier and column.name not in counts and column.distinct < column.filled:
                    counts[column.name] = 1
    return max(counts, key=lambda n: counts[n]) if counts else None


def _events(name: str, place: str, tables: list[_Table], outcome: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    key = _entity_key(tables)
    if key is None:
        names = ", ".join(t.name for t in tables)
        raise ConfigError(f"--from: no column that {names} share looks like a customer key; write the file by hand")
    having = [t for t in tables if any(c.name == key for c in t.columns)]
    people = next(
        (t for t in having if next(c for c in t.columns if c.name == key).distinct >= 0.99 * t.rows and t.time), None
    )
    logs = [t for t in having if t is not people and t.time is not None]
    if len(having) == 1:
        people, logs = None, having
    if not logs:
        raise ConfigError(f"--from: no table has both {key!r} and a column of times: there is no event log")
    connection = place if is_database(place) or Path(place).is_dir() or "://" in place else str(Path(place).parent)
    notes = {"source.entities.key": "the customer, in every table"}
    streams = {_identifier(t.name): _stream(t, key) for t in logs}
    chosen = _identifier(outcome) if outcome else _outcome_stream(logs)
    if chosen not in streams:
        raise ConfigError(f"--outcome: {outcome!r} is not an event log; there are {', '.join(streams)}")
    if people is not None and people.time is not None:
        entities: dict[str, Any] = {"table": people.name, "key": key, "created_at": people.time.name}
        if people.time.time_format:
            entities["time_format"] = people.time.time_format
        attributes = {
            c.name: "number" if c.is_number and not c.is_identifier else "category"
            for c in people.columns
            if c.name != key and not c.is_time and 1 < c.distinct <= max(200, 0.5 * people.rows * c.is_number)
        }
        entities["attributes"] = attributes
        notes["source.entities.attributes"] = "as known at creation: a column that is kept up to date tells the future"
    else:
        entities = {"stream": chosen, "key": key}
        notes["source.entities.stream"] = "everybody seen in this log"
    content: dict[str, Any] = {
        "name": name,
        "description": f"Will this customer have one of {chosen} within the next 30 days?",
        "source": {"kind": "events", "connection": connection, "entities": entities, "streams": streams},
        "outcome": {"stream": chosen, "horizon_days": 30},
    }
    content["source"] |= {"first_day": "1900-01-01", "last_day": str(date.today())}  # mended from the profile
    notes["source.last_day"] = "leave it out when the log goes on"
    return content, notes


def _outcome_stream(logs: list[_Table]) -> str:
    named = [t for t in logs if any(word in t.name.lower() for word in _ORDER_WORDS)]
    paid = [t for t in logs if t.first(lambda c: c.is_number and c.named(_AMOUNT_WORDS))]
    return _identifier((named or paid or logs)[0].name)


def _stream(table: _Table, key: str) -> dict[str, Any]:
    time = table.time
    assert time is not None
    stream: dict[str, Any] = {"table": table.name, "time": time.name}
    if time.time_format:
        stream["time_format"] = time.time_format
    used = {key, time.name}
    identity = table.first(lambda c: c.is_identifier and c.name not in used and c.distinct >= 0.98 * c.filled)
    lines = table.first(lambda c: c.is_identifier and c.name not in used and c.named(("invoice", "order", "invoiceno")))
    if identity is not None:
        stream["id"] = identity.name
    elif lines is not None:
        stream |= {"id": lines.name, "lines": True}
    used |= {stream.get("id", "")}
    kind = table.first(lambda c: c.named(_TYPE_WORDS) and not c.is_number and 1 < len(c.values) <= 8)
    if kind is not None and all(re.fullmatch(r"[a-z][a-z0-9_]*", v) for v in kind.values):
        stream |= {"type": kind.name, "types": list(kind.values)}
        used.add(kind.name)
    numbers = [c for c in table.columns if c.is_number and c.name not in used and not c.is_identifier and not c.is_time]
    amount = next((c for c in numbers if c.named(_AMOUNT_WORDS)), None)
    if amount is not None:
        stream["amount"] = amount.name
    measures = [c.name for c in numbers if c is not amount]
    if measures:
        stream["measures"] = measures
    texts = [c for c in table.columns if not c.is_number and not c.is_time and c.name not in used]
    categories = [c.name for c in texts if 1 < c.distinct <= 200]
    if categories:
        stream["categories"] = categories
    return stream


def _mend(
    campaign: Campaign, content: dict[str, Any], notes: dict[str, str], diagnosis: Diagnosis, home: Home, engine: Engine
) -> bool:
    """Change the draft where the doctor says how; whether anything changed."""
    before = yaml.safe_dump(content)
    if isinstance(campaign, TableCampaign):
        for finding in diagnosis.findings:
            _, _, column = finding.where.partition(".")
            if finding.code in _EXCLUDED and column and column != content["source"].get("order"):
                content.setdefault("exclude", {})[column] = _EXCLUDED[finding.code]
            if finding.code == "P214":
                names = [n for n in finding.message.split(", ") if n not in content.get("exclude", {})]
                content["source"].setdefault("attributes", {}).update(dict.fromkeys(names, "category"))
                notes["source.attributes"] = "numbers that look like codes"
            if finding.code == "P215":
                missing = finding.message.rpartition(" are ")[2].strip("'")
                content.setdefault("missing", {})[column] = missing
            if finding.code == "P107":
                content["prior"] = {"adapt": True}
                notes["prior.adapt"] = "the outcome rate changes between training and test"
    else:
        assert isinstance(campaign, EventCampaign)
        _leave_out_bad_rows(campaign, content, notes, diagnosis)
        _fit_calendar(campaign, content, diagnosis)
    for finding in diagnosis.findings:
        if finding.code == "P101" and diagnosis.outcome:
            training = [o for o in diagnosis.outcome if o.split == "train"]
            content["min_converters"] = max(sum(o.converted for o in training) // 2, 1)
            notes["min_converters"] = "500 is usual: with so few, intervals are wide"
    return yaml.safe_dump(content) != before


def _leave_out_bad_rows(
    campaign: EventCampaign, content: dict[str, Any], notes: dict[str, str], diagnosis: Diagnosis
) -> None:
    """Rows that are bad in so large a number are of another kind: returns, visitors without an account."""
    for finding in diagnosis.findings:
        stream = campaign.source.streams.get(finding.where)
        if finding.code != "P204" or stream is None or stream.where is not None:
            continue
        parts: list[str] = []
        if f"{campaign.key}: missing" in finding.message:
            parts.append(f'"{campaign.key}" IS NOT NULL')
        for measure in stream.measures:
            if f"measure_{measure}: below" in finding.message:
                parts.append(f'"{measure}" >= 0')
        if stream.amount and "amount: below" in finding.message:
            parts.append(f'"{stream.amount}" >= 0')
        if parts:
            content["source"]["streams"][finding.where]["where"] = " AND ".join(parts)
            notes[f"source.streams.{finding.where}"] = "rows left out by 'where' break the contract"


def _fit_calendar(campaign: EventCampaign, content: dict[str, Any], diagnosis: Diagnosis) -> None:
    """First and last day as the logs have them, and as many snapshots as they hold."""
    streams = [t for t in diagnosis.tables if t.table in campaign.source.streams and t.first]
    if not streams:
        return
    first = min(datetime.fromisoformat(t.first).date() for t in streams)
    last = max(datetime.fromisoformat(t.last).date() for t in streams)
    content["source"] |= {"first_day": str(first), "last_day": str(last)}
    outcome = next(t for t in diagnosis.tables if t.table == campaign.outcome.stream)
    newest_event = datetime.fromisoformat(outcome.last).date()
    for horizon in (30, 14, 7):
        content["outcome"]["horizon_days"] = horizon
        for train, held in ((26, 4), (18, 4), (12, 3), (8, 2), (5, 1), (3, 1)):
            snapshots = {"every": "7d", "train": train, "validate": held, "test": held}
            tried = EventCampaign.model_validate(
                {
                    **campaign.model_dump(exclude={"outcome", "snapshots"}),
                    "outcome": content["outcome"],
                    "snapshots": snapshots,
                }
            )
            try:
                plan_splits(tried, newest_event - timedelta(days=horizon), first)
            except InsufficientDataError:
                continue
            content["snapshots"] = snapshots
            return


def _text(content: dict[str, Any], notes: dict[str, str]) -> str:
    """The YAML, with the notes as comments."""
    lines = [
        f"# {content['description']}",
        "# Drafted from a look at the data: every guess is stated, so that it can be changed. It was taken for "
        + ("event logs;" if content["source"]["kind"] == "events" else "one row per past decision;"),
        "# if that is wrong, `propensity new` with --outcome COLUMN (or LOG) says what the question is about.",
        "# Then: propensity doctor THIS_FILE, and propensity demo THIS_FILE.",
    ]
    _write(content, "", 0, lines, notes)
    lines += [
        "",
        "# What a conversion brings and a contact costs decides whom to contact: put your own numbers here.",
        "value: {margin_per_conversion: 10, cost_per_contact: 1}",
    ]
    return "\n".join(lines) + "\n"


def _write(node: dict[str, Any], path: str, depth: int, lines: list[str], notes: dict[str, str]) -> None:
    for name, value in node.items():
        where = f"{path}.{name}" if path else name
        note = f"   # {notes[where]}" if where in notes else ""
        indent = "  " * depth
        if isinstance(value, dict) and depth < 3 and value and not _is_short(value, depth):
            lines.append(f"{indent}{_scalar(name)}:{note}")
            _write(value, where, depth + 1, lines, notes)
        else:
            shown = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
            lines.append(f"{indent}{_scalar(name)}: {shown.removesuffix('...' + chr(10)).strip()}{note}")


def _is_short(value: dict[str, Any], depth: int) -> bool:
    return depth > 0 and not any(isinstance(v, dict) for v in value.values()) and len(str(value)) < 90


def _scalar(name: str) -> str:
    return yaml.safe_dump(name, allow_unicode=True).removesuffix("...\n").strip()


def _identifier(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return plain if plain[:1].isalpha() else f"t_{plain}"
