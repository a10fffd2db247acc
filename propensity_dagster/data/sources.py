"""Opening a campaign's source and reading its declared columns. Belongs here: nothing about contracts.

A connection is a folder of parquet or CSV files (`orders.parquet`, `orders.csv`, or a folder `orders/`),
`duckdb://file.duckdb`, or `synthetic://world`.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import difflib
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import duckdb
import ibis
import sqlglot
import sqlglot.expressions as sge

from propensity_dagster.campaign import Campaign
from propensity_dagster.data import coerce
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home
from propensity_dagster.errors import ConfigError, DataContractError, SourceError
from propensity_dagster.synthetic import is_synthetic, open_world

_DUCKDB = "duckdb://"


@dataclass(frozen=True)
class Calendar:
    """The event days a campaign covers, both inclusive. `last` is None while the log goes on."""

    first: date
    last: date | None


def campaign_calendar(campaign: Campaign) -> Calendar:
    """First and last event day, from the file or from the synthetic world."""
    source = campaign.source
    if is_synthetic(source.connection):
        config = open_world(source.connection, Path()).config
        return Calendar(source.first_day or config.first_day, source.last_day or config.last_day)
    if source.first_day is None:
        raise ConfigError(f"{campaign.file}: source.first_day is required")
    return Calendar(source.first_day, source.last_day)


def source_folder(campaign: Campaign, home: Home) -> Path | None:
    """The folder of files a campaign reads, or None for a database. Makes a synthetic world on first use.

    Raises:
        ConfigError: when the folder is not there.
    """
    connection = expand_variables(campaign)
    if is_synthetic(connection):
        world = open_world(connection, home.synthetic)
        home.synthetic.mkdir(parents=True, exist_ok=True)
        world.ensure()
        return world.tables
    if connection.startswith(_DUCKDB):
        return None
    if "://" in connection:
        raise ConfigError(
            f"{campaign.file}: source.connection: unknown kind {connection.partition('://')[0]!r}; allowed are "
            "a folder of parquet or CSV files, duckdb:// and synthetic://"
        )
    return _resolve(campaign, connection)


def open_table(campaign: Campaign, table: str, as_text: Sequence[str], home: Home, engine: Engine) -> ibis.Table:
    """A declared table of the source, as it is; in CSV files the columns `as_text` are not interpreted.

    Raises:
        ConfigError: when it is not there.
        SourceError: when it cannot be read.
    """
    folder = source_folder(campaign, home)
    with reading(f"{campaign.file}: table {table!r}"):
        if folder is not None:
            return _open_files(campaign, folder, table, as_text, engine)
        path = _resolve(campaign, expand_variables(campaign).removeprefix(_DUCKDB))
        return _open_duckdb(campaign, path, table, engine)


def changed_files(campaign: Campaign, home: Home, seen: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Files of the watched folder with their size and time, and those that differ from `seen`.

    The watched folder is `schedule.watch`, else the source's own folder; a database has none.
    """
    watch = campaign.schedule.watch
    folder = _resolve(campaign, watch) if watch else source_folder(campaign, home)
    if folder is None:
        return {}, []
    state: dict[str, str] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".parquet", ".csv") and not file.name.startswith("."):
            stat = file.stat()
            state[str(file)] = f"{stat.st_size}:{stat.st_mtime_ns}"
    return state, [file for file, mark in state.items() if seen.get(file) != mark]


def days_in_files(campaign: Campaign, files: Sequence[str], home: Home, engine: Engine) -> tuple[date, date] | None:
    """First and last event day, within the calendar, that these source files hold; None without events."""
    folder = source_folder(campaign, home)
    calendar = campaign_calendar(campaign)
    newest = calendar.last or date.today()
    found: list[date] = []
    for name, stream in campaign.source.streams.items():
        own = [f for f in files if folder is not None and _table_of(folder, Path(f)) == stream.table]
        if not own:
            continue
        read = _read_csv if own[0].endswith(".csv") else _read_parquet
        table = read(own, [stream.time], engine)
        time = coerce.utc_time(table[stream.time], stream.time_format, f"{campaign.file}: source.streams.{name}.time")
        days = table.select(day=time.date())
        days = days.filter((days.day >= calendar.first) & (days.day <= newest))
        limits = engine.arrow(days.aggregate(first=days.day.min(), last=days.day.max())).to_pylist()[0]
        found += [day for day in limits.values() if day is not None]
    return (min(found), max(found)) if found else None


def select_declared(
    campaign: Campaign,
    where: str,
    table: ibis.Table,
    engine: Engine,
    declared: list[str],
    derive: dict[str, str],
    row_filter: str | None,
) -> ibis.Table:
    """The declared columns of the rows that pass the filter; derived columns are SQL expressions.

    The result also holds every column an expression reads, so that equal rows are equal in the source.

    Raises:
        ConfigError: for an expression that is not one, or that reads a column that is not there.
        DataContractError: for a declared column that is not there.
    """
    expressions = {name: parse_expression(campaign, f"{where}.derive.{name}", sql) for name, sql in derive.items()}
    condition = parse_expression(campaign, f"{where}.where", row_filter) if row_filter else None
    available = list(table.columns)
    read: list[str] = [name for name in declared if name not in derive]
    for name, expression in expressions.items():
        _check_columns(campaign, f"{where}.derive.{name}", _columns_of(expression), available, ConfigError)
        read += _columns_of(expression)
    if condition is not None:
        known = [*available, *derive]
        _check_columns(campaign, f"{where}.where", _columns_of(condition), known, ConfigError)
        read += [name for name in _columns_of(condition) if name not in derive]
    _check_columns(campaign, where, read, available, DataContractError)
    selected = table.select(*dict.fromkeys(read))
    if not expressions and condition is None:
        return selected
    name = engine.backend.create_view(ibis.util.gen_name("source"), selected).get_name()
    columns = ["*", *(f'({e.sql("duckdb")}) AS "{n}"' for n, e in expressions.items())]
    query = f'SELECT {", ".join(columns)} FROM "{name}"'
    if condition is not None:
        query = f"SELECT * FROM ({query}) AS derived WHERE {condition.sql('duckdb')}"
    return engine.backend.sql(query, dialect="duckdb")


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


@contextmanager
def reading(what: str) -> Generator[None]:
    """Turn a failing read into a SourceError, which Dagster tries again.

    Raises:
        SourceError: for an input or output error inside the block.
        DataContractError: for a value that an expression of the campaign file cannot compute.
    """
    try:
        yield
    except (OSError, duckdb.IOException, duckdb.ConnectionException) as error:
        raise SourceError(f"{what}: cannot be read: {str(error).splitlines()[0]}") from error
    except (duckdb.BinderException, duckdb.ConversionException, duckdb.InvalidInputException) as error:
        raise DataContractError(f"{what}: {' '.join(str(error).split())[:400]}") from error


def expand_variables(campaign: Campaign) -> str:
    """The connection with ${NAME} or ${NAME:-default} taken from the environment.

    Raises:
        ConfigError: for a variable that is not set and has no default.
    """

    def value(match: re.Match[str]) -> str:
        name: str = match.group(1)
        default: str | None = match.group(2)
        found = os.environ.get(name) or default
        if found is None:
            raise ConfigError(f"{campaign.file}: source.connection: the environment variable {name} is not set")
        return found

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, campaign.source.connection)


def _table_of(folder: Path, file: Path) -> str:
    """The table a file of the source folder belongs to: its own name, or its first folder's."""
    relative = file.relative_to(folder) if file.is_relative_to(folder) else file
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _resolve(campaign: Campaign, connection: str) -> Path:
    """A path of the campaign file: beside the file first, then below the working directory."""
    tried = [(base / connection).resolve() for base in (campaign.file.parent, Path.cwd())]
    for path in tried:
        if path.exists():
            return path
    raise ConfigError(
        f"{campaign.file}: source.connection: {connection!r} is not there; tried {tried[0]} and {tried[1]}"
    )


def _open_files(campaign: Campaign, folder: Path, table: str, as_text: Sequence[str], engine: Engine) -> ibis.Table:
    for suffix, read in ((".parquet", _read_parquet), (".csv", _read_csv)):
        single = folder / f"{table}{suffix}"
        files = [single] if single.is_file() else sorted((folder / table).glob(f"**/*{suffix}"))
        if files:
            return read([str(file) for file in files], as_text, engine)
    names = sorted({path.stem for path in folder.iterdir() if not path.name.startswith(".")})
    raise ConfigError(
        f"{campaign.file}: table {table!r} is not in {folder}; there are {', '.join(names) or 'no files'}"
    )


def _read_parquet(paths: list[str], as_text: Sequence[str], engine: Engine) -> ibis.Table:
    del as_text  # parquet has types of its own
    return engine.backend.read_parquet(paths, hive_partitioning=False)


def _read_csv(paths: list[str], as_text: Sequence[str], engine: Engine) -> ibis.Table:
    """Types are decided by every value, not a sample; times and keys stay text.

    DuckDB would read the key 00123 as 123, and drop the zone of 2024-01-01T00:00:00+02:00 without a word.
    """
    columns = engine.backend.read_csv(paths, all_varchar=True, hive_partitioning=False).columns
    types = {name: "VARCHAR" for name in as_text if name in columns}
    return engine.backend.read_csv(paths, types=types or None, sample_size=-1, hive_partitioning=False)


def _open_duckdb(campaign: Campaign, path: Path, table: str, engine: Engine) -> ibis.Table:
    attached = "source_database"
    engine.backend.raw_sql(
        f"ATTACH IF NOT EXISTS '{str(path).replace(chr(39), chr(39) * 2)}' AS {attached} (READ_ONLY)"
    )
    names = engine.backend.list_tables(database=(attached, "main"))
    if table not in names:
        raise ConfigError(f"{campaign.file}: table {table!r} is not in {path}; there are {', '.join(names) or 'none'}")
    return engine.backend.table(table, database=(attached, "main"))


def _columns_of(expression: sge.Expr) -> list[str]:
    return [column.name for column in expression.find_all(sge.Column)]


def _check_columns(
    campaign: Campaign,
    where: str,
    wanted: list[str],
    available: list[str],
    error: type[ConfigError] | type[DataContractError],
) -> None:
    for name in wanted:
        if name not in available:
            close = difflib.get_close_matches(name, available, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise error(
                f"{campaign.file}: {where}: there is no column {name!r}; {hint}there are {', '.join(available)}"
            )
