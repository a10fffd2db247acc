"""Coercing source columns to the lake's types: keys are text, times UTC, money integer cents.

Each function gives an expression that is null where a value is missing or does not coerce; `lost` tells the
two apart. Nothing here raises on a bad value.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import re
import sys
from typing import Any

import ibis
import ibis.expr.datatypes as dt

from propensity_dagster.errors import DataContractError

EPOCH = "1970-01-01"
_LARGEST = 9e15  # integers beyond it are not exact as doubles
_DATE_FIRST = r"^[0-9]{1,6}-[0-9]{1,2}-[0-9]{1,2}"
_JAVA = {
    "Y": "yyyy", "y": "yy", "m": "MM", "d": "dd", "H": "HH", "I": "hh", "M": "mm", "S": "ss", "f": "SSSSSS", "p": "a",
    "b": "MMM", "B": "MMMM", "a": "EEE", "A": "EEEE", "j": "DDD", "z": "xx",
}  # fmt: skip


@ibis.udf.scalar.builtin
def try_strptime(text: str, pattern: str) -> dt.Timestamp(scale=6):  # type: ignore[valid-type]  # pyright: ignore
    """DuckDB's parser that gives null instead of failing."""


@ibis.udf.scalar.builtin
def try_to_timestamp(text: str, pattern: str) -> dt.Timestamp(scale=6):  # type: ignore[valid-type]  # pyright: ignore
    """Spark's."""


def key_text(column: Any) -> Any:
    """An entity key as text. 17850, 17850.0 and "17850.0" are one key: a log that lost values holds floats."""
    dtype = column.type()
    if dtype.is_decimal() and not dtype.scale:
        return column.cast("string")  # exact, however many digits
    if dtype.is_floating() or dtype.is_decimal():
        number = column.cast("float64")
        exact = ibis.ifelse(is_finite(number) & (number.abs() < _LARGEST), number, ibis.null())
        return ibis.ifelse(exact == exact.round(), exact, ibis.null()).cast("int64").cast("string")
    text = stripped(column.cast("string"))
    return text.re_replace(r"^(-?\d+)\.0+$", "$1" if _on_spark(text) else r"\1").nullif("")


def stripped(text: Any) -> Any:
    """Text without white space around it. Spark takes the vertical tab and the form feed of Ibis' strip for v and f."""
    return text.re_replace(r"^\s+|\s+$", "") if _on_spark(text) else text.strip()


def utc_time(column: Any, pattern: str | None, where: str) -> Any:
    """An instant as UTC, without zone. A value without zone is taken as UTC; a date is its midnight.

    Raises:
        DataContractError: for a number without `time_format`: seconds, days and 20240131 look alike.
    """
    dtype = column.type()
    spark = _on_spark(column)
    if pattern is not None:
        text = _with_digits(column.cast("string"))
        return try_to_timestamp(text, _java_pattern(pattern)) if spark else try_strptime(text, pattern)
    if dtype.is_timestamp():
        return (
            column.cast("timestamp") if dtype.timezone is None else column.cast(dt.Timestamp("UTC")).cast("timestamp")
        )
    if dtype.is_date():
        return column.cast("timestamp")
    if dtype.is_string():
        text = _with_digits(stripped(column))
        if spark:  # to which "2024", "2024-05" and "10:00" are times too
            text = text.re_replace("^([0-9]+)/([0-9]+)/([0-9]+)", "$1-$2-$3")
            text = ibis.ifelse(text.re_search(_DATE_FIRST), text, ibis.null())
        return text.try_cast(dt.Timestamp("UTC")).cast("timestamp")
    raise DataContractError(f"{where}: a time must be a timestamp, a date or text, or have a time_format; got {dtype}")


def _with_digits(text: Any) -> Any:
    """Text without digits is no time; to DuckDB "infinity" and "epoch" are."""
    return ibis.ifelse(text.re_search("[0-9]"), text, ibis.null())


def _java_pattern(pattern: str) -> str:
    """A strptime pattern in Java's letters. Next to a separator a number may be short: 1/2/2024."""
    found: list[str] = []
    parts = re.findall(r"%(.)|([^%]+)", pattern)
    for i, (letter, text) in enumerate(parts):
        if text:
            found.append("'" + text.replace("'", "''") + "'" if re.search(r"[A-Za-z']", text) else text)
            continue
        java = _JAVA.get(letter, f"'%{letter}'")
        alone = not (i and parts[i - 1][0]) and not (i + 1 < len(parts) and parts[i + 1][0])
        found.append(java[:1] if alone and java in ("MM", "dd", "HH", "hh", "mm", "ss") else java)
    return "".join(found)


def is_naive(dtype: dt.DataType, pattern: str | None) -> bool:
    """Whether values of this type carry no time zone of their own (text may, value by value)."""
    return pattern is not None or dtype.is_date() or (dtype.is_timestamp() and dtype.timezone is None)


def number(column: Any) -> Any:
    """A finite number; infinities and NaN are no numbers."""
    if column.type().is_string() and _on_spark(column):  # to which "1d" is a number, as in Java, and "1_000" is none
        text = column.re_replace("(?<=[0-9])_(?=[0-9])", "")
        column = ibis.ifelse(text.re_search("[dDfF]\\s*$"), ibis.null(), text)
    value = column.cast("float64") if column.type().is_numeric() else column.try_cast("float64")
    return ibis.ifelse(is_finite(value), value, ibis.null().cast("float64"))


def scaled_integer(column: Any, scale: int) -> Any:
    """A number as an integer of 1/scale, rounded half away from zero; null where that is not exact."""
    scaled = number(column) * ibis.literal(float(scale))
    return ibis.ifelse(scaled.abs() < _LARGEST, scaled, ibis.null()).round().cast("int64")


def category(column: Any) -> Any:
    """A category as text; blank is missing."""
    return stripped(column.cast("string")).nullif("")


def lost(raw: Any, coerced: Any) -> Any:
    """True where a value was there and did not coerce. Blank text and NaN are missing, not lost."""
    there = raw.notnull()
    if raw.type().is_string():
        there = there & (stripped(raw) != "")
    if raw.type().is_floating():
        there = there & ~raw.isnan()
    return there & coerced.isnull()


def float_literal(value: float) -> Any:
    """A number to its last digit. DuckDB reads 0.08333333333333333 as a decimal, which becomes another double."""
    return ibis.literal(repr(float(value))).cast("float64")


def day_number(time: Any) -> Any:
    """Days since 1970-01-01 of an instant."""
    return time.date().delta(ibis.date(EPOCH), unit="day").cast("int32")


def is_finite(value: Any) -> Any:
    """Neither NaN nor infinite: every engine sorts NaN above infinity, and Spark has no literal for that."""
    return value.abs() <= ibis.literal(sys.float_info.max, "float64")


def _on_spark(column: Any) -> bool:
    return column.get_backend().name == "pyspark"
