"""Splitting rows into good, duplicate and bad, with a reason, as one Ibis expression.

The predicates come from the pandera schema of the table, so that the contract is stated once and runs where
the data are. Pandera's own `drop_invalid_rows` drops good rows beside bad ones and cannot drop a value that
does not coerce; a test holds this translation equal to pandera's verdict.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

from collections.abc import Callable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

import ibis
import ibis.expr.types as ir

if TYPE_CHECKING:
    import pandera.pandas as pa

REASON = "reason"

_TRANSLATIONS: Mapping[str, tuple[Callable[[Any, Any], Any], str]] = {
    "greater_than_or_equal_to": (lambda column, s: column >= s["min_value"], "below {min_value}"),
    "less_than_or_equal_to": (lambda column, s: column <= s["max_value"], "above {max_value}"),
    "less_than": (lambda column, s: column < s["max_value"], "at or after {max_value}"),
    "isin": (lambda column, s: column.isin(list(s["allowed_values"])), "not one of {allowed_values}"),
}


def reason_for(row: ir.Table, contract: "pa.DataFrameSchema", uncoerced: Mapping[str, Any]) -> Any:
    """Why a row is bad, or null for a good one: the first broken rule, columns in order.

    Args:
        row: the coerced table; every column of the contract is there.
        contract: the table's schema. Uniqueness is not a property of one row: see `mark_duplicates`.
        uncoerced: per column, a boolean expression that is true where a value was there but did not coerce.

    Returns:
        A string expression on `row`.
    """
    rules: list[tuple[Any, str]] = []
    for name, column in contract.columns.items():
        value = row[name]
        if name in uncoerced:
            rules.append((uncoerced[name], f"{name}: not a {_type_name(column)}"))
        if not column.nullable:
            rules.append((value.isnull(), f"{name}: missing"))
        for check in column.checks:
            satisfied, words = _TRANSLATIONS[check.name]
            statement = f"{name}: {words.format(**check.statistics)}"
            rules.append((value.notnull() & ~satisfied(value, check.statistics), statement))
    none = ibis.null().cast("string")
    return reduce(lambda other, rule: ibis.ifelse(rule[0], rule[1], other), reversed(rules), none)


def count_violations(table: ir.Table, contract: "pa.DataFrameSchema") -> ir.IntegerScalar:
    """How many rows of a published table break its contract, uniqueness included."""
    bad = reason_for(table, contract, {}).notnull().sum().fill_null(0)
    unique = [name for name, column in contract.columns.items() if column.unique]
    repeated = [table.count() - table[name].nunique() - table[name].isnull().sum().fill_null(0) for name in unique]
    return reduce(lambda total, more: total + more, repeated, bad)


def _type_name(column: Any) -> str:
    kind = str(column.dtype)
    if kind.startswith("datetime"):
        return "time"
    if kind == "bool":
        return "known outcome"
    return "text" if kind.startswith("str") else "finite number"
