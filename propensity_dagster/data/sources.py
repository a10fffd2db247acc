"""Opening a campaign's source and reading its declared columns. Belongs here: nothing about contracts.

Whatever the source is, its declared columns end up as a table of the engine, where every expression of the
campaign file is computed: equal data give equal results from every kind of source.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import difflib
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import ibis
import sqlglot
import sqlglot.expressions as sge

from propensity_dagster.campaign import Campaign, EventCampaign, TableCampaign
from propensity_dagster.campaign_sections import Register
from propensity_dagster.data import coerce
from propensity_dagster.data.connections import (
    DUCKDB,
    attached_name,
    database_table,
    expand_variables,
    is_database,
    open_database,
    reading,
    require_known_scheme,
    resolve_path,
    source_connection,
)
from propensity_dagster.data.days import Calendar, TimeRange
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.files import files_in, read_files, require_distinct_names, table_of
from propensity_dagster.data.lake import Home
from propensity_dagster.data.remote import fetch
from propensity_dagster.errors import ConfigError, DataContractError
from propensity_dagster.synthetic import SyntheticWorld, is_synthetic, open_world

_TYPES_TRIED = ("int64", "float64", "timestamp", "boolean")


def campaign_calendar(campaign: Campaign) -> Calendar:
    """First and last day, from the file or from the synthetic world."""
    source = campaign.source
    if isinstance(campaign, TableCampaign):
        return Calendar(campaign.source.first_day, None)
    if isinstance(campaign, EventCampaign) and is_synthetic(campaign.source.connection):
        config = _world(campaign, campaign.source.connection, Path()).config
        return Calendar(source.first_day or config.first_day, campaign.source.last_day or config.last_day)
    if source.first_day is None:
        raise ConfigError(f"{campaign.file}: source.first_day is required")
    return Calendar(source.first_day, getattr(source, "last_day", None))


def _world(campaign: Campaign, connection: str, root: Path) -> SyntheticWorld:
    try:
        return open_world(connection, root)
    except ConfigError as error:
        raise ConfigError(f"{campaign.file}: source.{error}") from None


def _named(campaign: Campaign) -> str:
    """The key of the file that says where the data are."""
    return "source.connection" if campaign.source.connection else "source.path"


def source_folder(campaign: Campaign, home: Home) -> Path | None:
    """The folder of files a campaign reads, or None for a database. Makes a synthetic world on first use.

    Raises:
        ConfigError: when the folder is not there.
    """
    connection = source_connection(campaign)
    require_known_scheme(campaign, "source.connection", connection)
    if is_synthetic(connection):
        world = _world(campaign, connection, home.synthetic)
        home.synthetic.mkdir(parents=True, exist_ok=True)
        world.ensure()
        return world.tables
    return None if is_database(connection) else resolve_path(campaign, _named(campaign), connection)


def open_table(campaign: Campaign, table: str, home: Home, engine: Engine) -> ibis.Table:
    """A table of the source, as it is.

    Raises:
        ConfigError: when it is not there.
        DataContractError: when two of its columns differ only in case.
        SourceError: when it cannot be read.
    """
    folder = source_folder(campaign, home)
    with reading(f"{campaign.file}: table {table!r}"):
        if folder is not None:
            return read_files(_files_of(campaign, folder, table), campaign.source.csv, engine)
        connection = source_connection(campaign)
        found = database_table(campaign, "source.connection", connection, table, engine)
        require_distinct_names(f"{campaign.file}: table {table!r}", list(found.columns))
        return found


def read_register(
    campaign: Campaign, where: str, register: Register, names: Mapping[str, str], home: Home, engine: Engine
) -> ibis.Table:
    """Columns of a table about customers that is not part of the source's logs: consents, assignments.

    Args:
        campaign: whose.
        where: its key in the campaign file, for messages.
        register: which table.
        names: column of the table by the name it is to have.
        home: where a synthetic source is.
        engine: where the rows go.

    Raises:
        ConfigError: when the table, or a column, is not there.
        SourceError: when it cannot be read.
    """
    table = _open_register(campaign, where, register, home, engine)
    for name in names.values():
        if name not in table.columns:
            raise ConfigError(
                f"{campaign.file}: {where}: there is no column {name!r} in table {register.table!r}; there are "
                f"{', '.join(table.columns)}"
            )
    selected = table.select(**{ours: table[name] for ours, name in names.items()})
    with reading(f"{campaign.file}: {where}: table {register.table!r}"):
        return fetch(selected, None, engine) if is_remote(selected, engine) else engine.cache(selected)


def _open_register(campaign: Campaign, where: str, register: Register, home: Home, engine: Engine) -> ibis.Table:
    if register.connection is None:
        if campaign.source.connection is None:
            raise ConfigError(f"{campaign.file}: {where} needs a 'connection': the source is a single file")
        return open_table(campaign, register.table, home, engine)
    connection = expand_variables(campaign, f"{where}.connection", register.connection)
    require_known_scheme(campaign, f"{where}.connection", connection)
    with reading(f"{campaign.file}: {where}: table {register.table!r}"):
        if is_database(connection):
            return database_table(campaign, where, connection, register.table, engine)
        folder = resolve_path(campaign, f"{where}.connection", connection)
        return read_files(_files_of(campaign, folder, register.table), campaign.source.csv, engine)


def open_place(campaign: TableCampaign, place: str, home: Home, engine: Engine) -> ibis.Table:
    """A file, a folder of files, or a table of the source's connection."""
    source = campaign.source
    if source.table is not None and "/" not in place and not place.endswith((".csv", ".parquet")):
        return open_table(campaign, place, home, engine)
    path = resolve_path(campaign, "rows to score", place)
    with reading(f"{campaign.file}: {path}"):
        return _read_place(campaign, path, engine)


def open_decisions(campaign: TableCampaign, home: Home, engine: Engine) -> ibis.Table:
    """The table of past decisions: its path, or a table of a connection."""
    source = campaign.source
    if source.table is not None:
        return open_table(campaign, source.table, home, engine)
    path = source_folder(campaign, home)
    assert path is not None, "a path names files"
    with reading(f"{campaign.file}: {path}"):
        return _read_place(campaign, path, engine)


def tables_of_database(campaign: Campaign, connection: str, engine: Engine) -> list[str]:
    """Names of the tables of a database, of its default schema."""
    backend = open_database(campaign, "source.connection", connection, engine)
    place: Any = (attached_name(connection), "main") if connection.startswith(DUCKDB) else None
    return sorted(backend.list_tables(database=place) if place else backend.list_tables())


def changed_files(campaign: Campaign, home: Home, seen: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Files of the watched folder with their size and time, and those that differ from `seen`.

    The watched folder is `schedule.watch`, else an event log's own folder; a database has none.
    """
    watch = campaign.schedule.watch
    if watch:
        folder = resolve_path(campaign, "schedule.watch", watch)
    else:
        folder = source_folder(campaign, home) if isinstance(campaign, EventCampaign) else None
    if folder is None:
        return {}, []
    state: dict[str, str] = {}
    for file in files_in(folder):
        stat = file.stat()
        state[str(file)] = f"{stat.st_size}:{stat.st_mtime_ns}"
    return state, [file for file, mark in state.items() if seen.get(file) != mark]


def days_in_files(
    campaign: EventCampaign, files: Sequence[str], home: Home, engine: Engine
) -> tuple[date, date] | None:
    """First and last event day, within the calendar, that these source files hold; None without events."""
    folder = source_folder(campaign, home)
    calendar = campaign_calendar(campaign)
    found: list[date] = []
    for name, stream in campaign.source.streams.items():
        own = [Path(f) for f in files if folder is not None and table_of(folder, Path(f)) == stream.table]
        if not own:
            continue
        table = read_files(own, campaign.source.csv, engine)
        time = coerce.utc_time(table[stream.time], stream.time_format, f"{campaign.file}: source.streams.{name}.time")
        days = table.select(day=time.date())
        days = days.filter((days.day >= calendar.first) & (days.day <= calendar.newest))
        limits = engine.arrow(days.aggregate(first=days.day.min(), last=days.day.max())).to_pylist()[0]
        found += [day for day in limits.values() if day is not None]
    return (min(found), max(found)) if found else None


def select_declared(
    campaign: Campaign,
    where: str,
    source: ibis.Table,
    engine: Engine,
    declared: Sequence[str],
    derive: Mapping[str, str],
    row_filter: str | None,
    within: TimeRange | None = None,
    number_rows: bool = False,
) -> ibis.Table:
    """The declared columns of the rows that pass the filter, in the engine; derived columns are SQL expressions.

    The result also holds every column an expression reads, so that equal rows are equal in the source. Of a
    remote table only these columns, and with `within` only those days, are fetched. With `number_rows` a column
    `position` numbers the rows from 1, before the filter.

    Raises:
        ConfigError: for an expression that is not one, or that reads a column that is not there.
        DataContractError: for a declared column that is not there.
    """
    expressions = {name: parse_expression(campaign, f"{where}.derive.{name}", sql) for name, sql in derive.items()}
    condition = parse_expression(campaign, f"{where}.where", row_filter) if row_filter else None
    available = list(source.columns)
    read: list[str] = [name for name in declared if name not in derive]
    for name, expression in expressions.items():
        _check_columns(campaign, f"{where}.derive.{name}", _columns_of(expression), available, engine, ConfigError)
        read += _columns_of(expression)
    if condition is not None:
        known = [*available, *derive]
        _check_columns(campaign, f"{where}.where", _columns_of(condition), known, engine, ConfigError)
        read += [name for name in _columns_of(condition) if name not in derive]
    _check_columns(campaign, where, read, available, engine, DataContractError)
    computed = [name for e in (*expressions.values(), condition) if e is not None for name in _columns_of(e)]
    selected = source.select(*dict.fromkeys(read))
    if is_remote(source, engine):
        selected = fetch(selected, within, engine)
    selected, typed = _typed(selected, [name for name in computed if name in selected.columns], engine)
    if number_rows:
        selected = selected.mutate(position=(ibis.row_number() + 1).cast("int64"))
    if not expressions and condition is None:
        return selected
    name = engine.name(selected)
    columns = ["*", *(f'({_over(typed, e).sql("duckdb")}) AS "{n}"' for n, e in expressions.items())]
    query = f'SELECT {", ".join(columns)} FROM "{name}"'
    if condition is not None:
        query = f"SELECT * FROM ({query}) AS derived WHERE {_over(typed, condition).sql('duckdb')}"
    return engine.sql(query).drop(*typed.values())


def parse_expression(campaign: Campaign, where: str, sql: str) -> sge.Expr:
    """One scalar SQL expression, in DuckDB's dialect.

    Raises:
        ConfigError: for anything else: a statement, a sub-query, text that does not parse.
    """
    try:
        # In brackets only an expression parses: no statement, nothing after a semicolon.
        parsed = sqlglot.parse_one(f"SELECT ({sql}\n)", dialect="duckdb")
    except sqlglot.errors.ParseError as error:
        reason = error.errors[0]["description"] if error.errors else str(error)
        raise ConfigError(f"{campaign.file}: {where}: not an SQL expression: {sql!r} ({reason})") from None
    (outer,) = parsed.expressions
    expression = outer.this if isinstance(outer, sge.Paren) else outer
    if expression.find(sge.Query, sge.Command, sge.AggFunc, sge.Window, sge.Tuple):
        raise ConfigError(f"{campaign.file}: {where}: must be one expression on one row's columns, got {sql!r}")
    return expression


def is_remote(table: ibis.Table, engine: Engine) -> bool:
    """Whether a table lives in another database than the engine."""
    return table.get_backend() is not engine.backend


def _read_place(campaign: Campaign, path: Path, engine: Engine) -> ibis.Table:
    files = files_in(path)
    if not files:
        raise ConfigError(f"{campaign.file}: there is no *.parquet or *.csv file in {path}")
    return read_files(files, campaign.source.csv, engine)


def _files_of(campaign: Campaign, folder: Path, table: str) -> list[Path]:
    for suffix in (".parquet", ".csv"):
        single = folder / f"{table}{suffix}"
        files = [single] if single.is_file() else sorted((folder / table).glob(f"**/*{suffix}"))
        if files:
            return files
    names = sorted({path.stem for path in folder.iterdir() if not path.name.startswith(".")})
    raise ConfigError(
        f"{campaign.file}: table {table!r} is not in {folder}; there are {', '.join(names) or 'no files'}"
    )


def _typed(table: ibis.Table, columns: Sequence[str], engine: Engine) -> tuple[ibis.Table, dict[str, str]]:
    """Adds, for text columns that an expression computes with, ones of the type that fits every value.

    Returns:
        The table, and the name of the added column for each such column. The text itself stays: 00123 is a key.
    """
    texts = [name for name in dict.fromkeys(columns) if table[name].type().is_string()]
    if not texts:
        return table, {}
    counts: dict[str, Any] = {}
    for i, name in enumerate(texts):
        value = coerce.stripped(table[name]).nullif("")
        counts[f"there_{i}"] = value.count()
        counts |= {f"{kind}_{i}": value.try_cast(kind).count() for kind in _TYPES_TRIED}
        # DuckDB rounds "12.13" to the integer 12 rather than refuse it.
        counts[f"int64_{i}"] = value.re_search(r"^[+-]?\d{1,18}$").sum().fill_null(0)
    found = engine.arrow(table.aggregate(**counts)).to_pylist()[0]
    casts: dict[str, Any] = {}
    for i, name in enumerate(texts):
        fitting = [kind for kind in _TYPES_TRIED if found[f"{kind}_{i}"] == found[f"there_{i}"] > 0]
        if fitting:
            casts[f"typed__{name}"] = coerce.stripped(table[name]).nullif("").cast(fitting[0])
    typed = {name.removeprefix("typed__"): name for name in casts}
    return (table.mutate(**casts) if casts else table), typed


def _over(typed: Mapping[str, str], expression: sge.Expr) -> sge.Expr:
    """The expression reading the typed columns."""
    copied = expression.copy()
    for column in list(copied.find_all(sge.Column)):
        if column.name in typed:
            column.set("this", sge.to_identifier(typed[column.name], quoted=True))
    return copied


def _columns_of(expression: sge.Expr) -> list[str]:
    return [column.name for column in expression.find_all(sge.Column)]


def _check_columns(
    campaign: Campaign,
    where: str,
    wanted: list[str],
    available: list[str],
    engine: Engine,
    error: type[ConfigError] | type[DataContractError],
) -> None:
    for name in wanted:
        if name not in available and name in engine.lacking:
            raise error(f"{campaign.file}: {where}: {engine.lacking[name]} has no column {name!r}, other files have")
        if name not in available:
            close = difflib.get_close_matches(name, available, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise error(
                f"{campaign.file}: {where}: there is no column {name!r}; {hint}there are {', '.join(available)}"
            )
