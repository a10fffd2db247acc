"""Fetching rows of other databases. Belongs here: what is asked of them, and how it travels."""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import csv
import io
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import ibis

from propensity_dagster.campaign_sections import Csv
from propensity_dagster.data.days import TimeRange
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.files import read_csv

_FETCH_ROWS = 65_536
_DAY = timedelta(days=1)


@ibis.udf.scalar.builtin(name="date")
def _sqlite_date(text: str) -> str:  # pyright: ignore[reportReturnType]
    """SQLite's own function: the day, or null for what is no time."""


def _restricted(table: ibis.Table, within: TimeRange | None) -> ibis.Table:
    """Rows that may lie in the wanted days, a day more on both sides for time zones; and those without a day.

    Only where the database can tell: numbers and texts of another form are fetched and looked at here.
    """
    if within is None:
        return table
    column = table[within.column]
    wanted = (within.first - _DAY, within.last + 2 * _DAY)
    outside = (within.calendar.first, within.calendar.newest + _DAY)
    dtype = column.type()
    if table.get_backend().name == "sqlite":
        day: Any = _sqlite_date(column.cast("string"))
        limits = [str(day) for day in (*wanted, *outside)]
    elif dtype.is_timestamp() or dtype.is_date():
        day = column
        limits = [ibis.timestamp(datetime(d.year, d.month, d.day)) for d in (*wanted, *outside)]
    else:
        return table
    start, end, first, newest = limits
    return table.filter(day.isnull() | ((day >= start) & (day < end)) | (day < first) | (day >= newest))


def fetch(selected: ibis.Table, within: TimeRange | None, engine: Engine) -> ibis.Table:
    """Copy rows of another database into the engine's scratch folder, in bounded memory and one statement.

    One statement sees one state of the table, however long it takes and whatever is written meanwhile.

    Args:
        selected: columns of a table of the database.
        within: the days that are wanted; None wants all rows.
        engine: where the rows go.
    """
    backend: Any = selected.get_backend()
    if backend is engine.local.backend:
        return engine.adopt(selected)
    wanted = _restricted(selected, within)
    query = backend.compile(wanted)
    handle, name = tempfile.mkstemp(suffix=".csv", dir=engine.scratch)
    with open(handle, "wb") as file:
        if backend.name == "postgres":
            with backend.con.cursor() as cursor, cursor.copy(f"COPY ({query}) TO STDOUT (FORMAT csv, HEADER)") as copy:
                for block in copy:
                    file.write(block)
        else:
            _dump_rows(backend.con.execute(query), list(wanted.columns), file)
    if backend.name != "postgres":  # SQLite's types bind nobody: what is there decides
        return engine.adopt(read_csv([Path(name)], Csv(separator=",", quote='"', encoding="utf-8"), engine))
    types = {column: _duckdb_type(dtype) for column, dtype in wanted.schema().items()}
    options: Any = {"columns": types, "auto_detect": False, "header": True, "allow_quoted_nulls": False}
    return engine.adopt(engine.read_csv([Path(name)], delim=",", quote='"', escape='"', **options))


def _dump_rows(cursor: Any, columns: list[str], file: Any) -> None:
    with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        writer = csv.writer(text, quoting=csv.QUOTE_ALL)
        writer.writerow(columns)
        while rows := cursor.fetchmany(_FETCH_ROWS):
            writer.writerows(rows)


def _duckdb_type(dtype: Any) -> str:
    if dtype.is_timestamp():
        return "TIMESTAMPTZ" if dtype.timezone else "TIMESTAMP"
    if dtype.is_integer():
        return "BIGINT"
    if dtype.is_numeric():
        return "DOUBLE"
    return {"boolean": "BOOLEAN", "date": "DATE"}.get(str(dtype).lstrip("!"), "VARCHAR")
