"""Coercing source columns to the lake's types: keys are text, times UTC, money integer cents.

Each function gives an expression that is null where a value is missing or does not coerce; `lost` tells the
two apart. Nothing here raises on a bad value.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

from typing import Any

import ibis
import ibis.expr.datatypes as dt

from propensity_dagster.errors import DataContractError

EPOCH = "1970-01-01"
_LARGEST = 9e15  # integers beyond it are not exact as doubles


@ibis.udf.scalar.builtin
def try_strptime(text: str, pattern: str) -> dt.Timestamp(scale=6):  # type: ignore[valid-type]  # pyright: ignore
    """DuckDB's parser that gives null instead of failing."""


def key_text(column: Any) -> Any:
    """An entity key as text. 17850, 17850.0 and "17850.0" are one key: a log that lost values holds floats."""
    dtype = column.type()
    if dtype.is_decimal() and not dtype.scale:
        return column.cast("string")  # exact, however many digits
    if dtype.is_floating() or dtype.is_decimal():
        number = column.cast("float64")
        whole = is_finite(number) & (number == number.round()) & (number.abs() < _LARGEST)
        return ibis.ifelse(whole, number, ibis.null()).cast("int64").cast("string")
    text = column.cast("string").strip()
    return text.re_replace(r"^(-?\d+)\.0+$", r"\1").nullif("")


def utc_time(column: Any, pattern: str | None, where: str) -> Any:
    """An instant as UTC, without zone. A value without zone is taken as UTC; a date is its midnight.

    Raises:
        DataContractError: for a number without `time_format`: seconds, days and 20240131 look alike.
    """
    dtype = column.type()
    if pattern is not None:
        return try_strptime(column.cast("string"), pattern)
    if dtype.is_timestamp():
        return (
            column.cast("timestamp") if dtype.timezone is None else column.cast(dt.Timestamp("UTC")).cast("timestamp")
        )
    if dtype.is_date():
        return column.cast("timestamp")
    if dtype.is_string():
        return column.strip().try_cast(dt.Timestamp("UTC")).cast("timestamp")
    raise DataContractError(f"{where}: a time must be a timestamp, a date or text, or have a time_format; got {dtype}")


def is_naive(dtype: dt.DataType, pattern: str | None) -> bool:
    """Whether values of this type carry no time zone of their own (text may, value by value)."""
    return pattern is not None or dtype.is_date() or (dtype.is_timestamp() and dtype.timezone is None)


def number(column: Any) -> Any:
    """A finite number; infinities and NaN are no numbers."""
    value = column.cast("float64") if column.type().is_numeric() else column.try_cast("float64")
    return ibis.ifelse(is_finite(value), value, ibis.null().cast("float64"))


def scaled_integer(column: Any, scale: int) -> Any:
    """A number as an integer of 1/scale, rounded half away from zero; null where that is not exact."""
    scaled = number(column) * ibis.literal(float(scale))
    return ibis.ifelse(scaled.abs() < _LARGEST, scaled, ibis.null()).round().cast("int64")


def category(column: Any) -> Any:
    """A category as text; blank is missing."""
    return column.cast("string").strip().nullif("")


def lost(raw: Any, coerced: Any) -> Any:
    """True where a value was there and did not coerce. Blank text and NaN are missing, not lost."""
    there = raw.notnull()
    if raw.type().is_string():
        there = there & (raw.strip() != "")
    if raw.type().is_floating():
        there = there & ~raw.isnan()
    return there & coerced.isnull()


def day_number(time: Any) -> Any:
    """Days since 1970-01-01 of an instant."""
    return time.date().delta(ibis.date(EPOCH), unit="day").cast("int32")


def is_finite(value: Any) -> Any:
    """Neither NaN nor infinite."""
    return ~value.isnan() & ~value.isinf()
