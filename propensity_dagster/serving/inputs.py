"""Reading a body: the fields a campaign accepts, a fast decoder, and careful words for what is wrong.

A body that the fast decoder accepts never meets the slow reader. One that it refuses, or that may hold a key twice
(which it would not notice), is read again by hand, and every wrong field is named, without its value.
"""

import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import UNSET

from propensity_dagster.serving.problems import Problem

LARGEST = 1e15
MAX_TEXT = 256
KEY_PATTERN = r"^[^\u0000-\u001f\u007f-\u009f]+$"
MAX_ROWS = 1_000

_TEXT = re.compile("[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,256}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNPRINTED = re.compile("[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Input:
    """A field that a body may have. `name` is what the outside calls it, `feature` what the model does."""

    name: str
    feature: str
    kind: str
    meaning: str
    window: str
    minimum: float
    maximum: float
    categories: tuple[str, ...]
    typical: Any
    template: str = ""
    hidden: bool = False
    source: str = ""


@dataclass(slots=True)
class Parsed:
    """One customer of a body. Values are in the order of the inputs; UNSET where the body says nothing."""

    key: str | None
    values: Sequence[Any]
    given: int

    @property
    def is_incomplete(self) -> bool:
        """Whether the body left out a feature."""
        return self.given < len(self.values)


class Inputs:
    """What the bodies of one campaign look like: the entity's key, if it has one, and the features."""

    def __init__(self, key: str | None, fields: Sequence[Input]) -> None:
        self.key = key
        self.fields = tuple(fields)
        self.names = [field.name for field in fields]
        self.features = tuple(field.feature for field in fields)
        self.all_given = msgspec.Raw(msgspec.json.encode({"request": self.names, "online": []}))
        self._positions = {field.name: i for i, field in enumerate(fields)}
        self._features = {f.feature: f.name for f in fields if f.feature != f.name}
        attributes = [f"f{i}" for i in range(len(fields))]
        row = _struct(key, self.fields, attributes)
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(row).decode
        self._decode_rows: Callable[[bytes], Any] = msgspec.json.Decoder(_rows_struct(row)).decode
        getter = operator.attrgetter(*attributes)
        self._values: Callable[[Any], Sequence[Any]] = getter if len(attributes) > 1 else lambda o: (getter(o),)

    def parse(self, body: bytes) -> Parsed:
        """One customer.

        Raises:
            Problem: 422, naming every field that is wrong.
        """
        try:
            parsed = self._parsed(self._decode(body))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._read(_load(body), "")
        if body.count(b":") != parsed.given + (self.key is not None):  # a key given twice, or a colon in a text
            return self._read(_load(body), "")
        return parsed

    def parse_rows(self, body: bytes) -> list[Parsed]:
        """The customers of a batch, `{"rows": [...]}`.

        Raises:
            Problem: 422, naming every field that is wrong, by row.
        """
        try:
            rows = [self._parsed(row) for row in self._decode_rows(body).rows]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._read_rows(_load(body))
        if body.count(b":") != 1 + sum(row.given for row in rows) + len(rows) * (self.key is not None):
            return self._read_rows(_load(body))
        return rows

    def _parsed(self, row: Any) -> Parsed:
        values = self._values(row)
        absent = sum(v is UNSET for v in values) if UNSET in values else 0
        return Parsed(row.key if self.key is not None else None, values, len(values) - absent)

    def _read_rows(self, content: Any) -> list[Parsed]:
        if not isinstance(content, _Object):
            raise _invalid([_wrong("(body)", 'must be an object such as {"rows": [...]}')])
        if content.names != ["rows"]:
            fields = [_wrong(name, "unknown field; the only one is 'rows'") for name in content.names if name != "rows"]
            fields += [_wrong("rows", "given twice")] if content.names.count("rows") > 1 else []
            fields += [_wrong("rows", "is required")] if "rows" not in content.names else []
            raise _invalid(fields)
        rows = content.values[0]
        if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_ROWS:
            raise _invalid([_wrong("rows", f"must be a list of 1 to {MAX_ROWS:,} customers")])
        found: list[Parsed] = []
        wrong: list[dict[str, str]] = []
        for i, row in enumerate(rows):
            try:
                found.append(self._read(row, f"rows[{i}]."))
            except Problem as problem:
                wrong += problem.fields
        if wrong:
            raise _invalid(wrong)
        return found

    def _read(self, content: Any, prefix: str) -> Parsed:
        """One customer by hand; what the fast decoder accepts is accepted, with the same meaning."""
        if not isinstance(content, _Object):
            raise _invalid(
                [
                    _wrong(
                        prefix.rstrip(".") or "(body)",
                        "must be an object with one field per feature; predict_batch takes several",
                    )
                ]
            )
        values: list[Any] = [UNSET] * len(self.fields)
        key: str | None = None
        wrong: list[dict[str, str]] = []
        seen: set[str] = set()
        for name, value in zip(content.names, content.values, strict=True):
            message = None
            if name in seen:
                message = "given twice"
            elif self.key is not None and name == self.key:
                key, message = value, _wrong_key(value)
            elif name in self._positions:
                position = self._positions[name]
                values[position], message = value, _wrong_value(self.fields[position], value)
            else:
                message = self._unknown(name)
            if message:
                wrong.append(_wrong(prefix + _shown(name), message))
            seen.add(name)
        if self.key is not None and self.key not in seen:
            wrong.append(_wrong(prefix + self.key, "is required: the customer's id, as text"))
        if wrong:
            raise _invalid(wrong)
        return Parsed(key, values, sum(v is not UNSET for v in values))

    def _unknown(self, name: str) -> str:
        if name in self._features:
            return f"unknown field; it is called {self._features[name]!r} here"
        allowed = [*self.names, *([self.key] if self.key else [])]
        close = difflib.get_close_matches(name[:MAX_TEXT], allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "GET /model lists what is allowed"
        return f"unknown field; {hint}"


class _Object:
    """A JSON object with its keys as they were written, twice if they were given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.names = [name for name, _ in pairs]
        self.values = [value for _, value in pairs]


def _load(body: bytes) -> Any:
    try:
        # Whole numbers as floats: a number of 5,000 digits is out of range, not an error of its own.
        return json.loads(body.decode(), object_pairs_hook=_Object, parse_int=float, parse_constant=_constant)
    except UnicodeDecodeError:
        problem = "the body is not UTF-8"
    except json.JSONDecodeError as error:
        problem = f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        problem = "the body is nested too deep"
    raise Problem(422, "invalid_json", problem)


def _constant(name: str) -> float:
    return math.inf if name != "NaN" else math.nan


def _invalid(fields: list[dict[str, str]]) -> Problem:
    some = fields[:100]
    count = f"{len(fields)} fields are wrong" if len(fields) > 1 else "a field is wrong"
    return Problem(422, "invalid_fields", count, some)


def _wrong(name: str, message: str) -> dict[str, str]:
    return {"field": name, "message": message}


def _shown(name: str) -> str:
    """A field's name that may be anything: short, and printable."""
    cleaned = _UNPRINTED.sub("?", _SURROGATE.sub("?", name[:65]))
    return cleaned if len(name) <= 64 else cleaned[:64] + "..."


def _wrong_key(value: Any) -> str | None:
    if isinstance(value, str) and _TEXT.fullmatch(value):
        return None
    return f"must be text of 1 to {MAX_TEXT} characters without control characters, got {_type(value)}"


def _wrong_value(field: Input, value: Any) -> str | None:
    if value is None:
        return None
    if field.kind == "category":
        if isinstance(value, str) and len(value) <= MAX_TEXT and not _SURROGATE.search(value):
            return None
        return f"must be text of at most {MAX_TEXT} characters or null, got {_type(value)}"
    if not isinstance(value, float):
        return f"must be a number or null, got {_type(value)}"
    if field.minimum <= value <= field.maximum:
        return None
    return f"must be between {field.minimum:g} and {field.maximum:g}"


def _type(value: Any) -> str:
    if isinstance(value, str):
        return "text" if 0 < len(value) <= MAX_TEXT else "empty text" if not value else "longer text"
    names = {float: "a number", bool: "true or false", type(None): "null", list: "a list", _Object: "an object"}
    return names.get(type(value), "something else")  # pyright: ignore[reportUnknownArgumentType]


def _struct(key: str | None, fields: Sequence[Input], attributes: Sequence[str]) -> Any:
    stated: list[tuple[Any, ...]] = []
    renamed: dict[str, str] = {}
    if key is not None:
        stated.append(("key", Annotated[str, msgspec.Meta(pattern=_TEXT_WHOLE)]))
        renamed["key"] = key
    for attribute, field in zip(attributes, fields, strict=True):
        text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
        number = Annotated[float, msgspec.Meta(ge=field.minimum, le=field.maximum)]
        kind: Any = text if field.kind == "category" else number
        stated.append((attribute, kind | None | msgspec.UnsetType, UNSET))
        renamed[attribute] = field.name
    return msgspec.defstruct("Row", stated, rename=renamed, forbid_unknown_fields=True, gc=False)


_TEXT_WHOLE = r"\A[^\x00-\x1f\x7f-\x9f]{1,256}\Z"


def _rows_struct(row: Any) -> Any:
    rows = Annotated[list[row], msgspec.Meta(min_length=1, max_length=MAX_ROWS)]
    return msgspec.defstruct("Rows", [("rows", rows)], forbid_unknown_fields=True)
