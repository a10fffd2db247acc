"""Templates of our pages, and how numbers are written in them."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from propensity_dagster.reports.plots import label


def template(name: str) -> Any:
    """A template of this package, with the filters all pages share."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment: Any = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_source),
    )
    environment.filters.update(
        number=number, interval=interval, percent=percent, plain=plain, label=label, money=money, found=_found,
        signed_percent=_signed_percent,
    )  # fmt: skip
    return environment.get_template(name)


def _source(name: str) -> str:
    return files("propensity_dagster.reports").joinpath(name).read_text(encoding="utf-8")


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """A number with thousands separated, or a dash where there is none."""
    return "–" if value is None else f"{value:{'+' if signed else ''},.{digits}f}"


def interval(found: Mapping[str, float | None], digits: int, *, signed: bool = False) -> str:
    """The 95% interval in words."""
    if found["low"] is None:
        return "no interval"
    return f"{number(found['low'], digits, signed=signed)} to {number(found['high'], digits, signed=signed)}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}%}"


def _signed_percent(value: float) -> str:
    """A change, with its sign."""
    return f"{value:+.1%}"


def money(value: float | None) -> str:
    """An amount in the campaign's currency: whole units once there are hundreds of them."""
    if value is None:
        return "–"
    return number(value, 0 if abs(value) >= 100 else 2)


def plain(name: str) -> str:
    """A name as people write it."""
    return name.replace("_", " ")


def _found(found: Mapping[str, float | None], digits: int) -> str:
    """Value and interval; what cannot be known says so."""
    if found["value"] is None or found["low"] is None:
        return "too few"
    return f"{number(found['value'], digits)} ({interval(found, digits)})"
