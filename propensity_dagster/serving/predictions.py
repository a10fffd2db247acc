"""Answers: from a body to a probability and all that goes with it. Belongs here: nothing of HTTP."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import UNSET

from propensity_dagster.serving.explanations import explain
from propensity_dagster.serving.inputs import Parsed
from propensity_dagster.serving.online import Facts, Found, OnlineStore, OnlineUnavailableError
from propensity_dagster.serving.packages import Package, Release
from propensity_dagster.serving.prediction_log import PredictionLog, Record
from propensity_dagster.serving.problems import Problem

_ROWS_A_TURN = 32
_encode = msgspec.json.Encoder().encode

ANSWER_FIELDS = (
    "campaign",
    "probability",
    "percentile",
    "decile",
    "tier",
    "expected_value",
    "decision",
    "threshold",
    "model_version",
    "variant",
    "known",
    "features_missing",
    "features_unseen",
    "features_from",
    "online",
    "request_id",
)


class Sources(msgspec.Struct, gc=False):
    """Where the features came from."""

    request: list[str]
    online: list[str]


class Online(msgspec.Struct, gc=False):
    """How old the features from the online store are: hours since the instant of their snapshot."""

    snapshot: str
    published_at: str
    age_hours: float


@dataclass(slots=True)
class Scored:
    """One customer, scored. `values` are the release's inputs; `row` is what the model read."""

    parsed: Parsed
    values: Sequence[Any]
    package: Package
    variant: str
    row: list[float]
    unseen: list[str]
    probability: float
    known: bool | None
    facts: Facts | None
    request_id: str


@dataclass(slots=True)
class Answered:
    """A body to send, and what is to be logged once it is sent."""

    body: bytes
    release: Release | None = None
    scored: list[Scored] = field(default_factory=list[Scored])


async def predict(release: Release, store: OnlineStore | None, body: bytes, request_id: str) -> Answered:
    """One customer's answer.

    Raises:
        Problem: 422 for the body, 503 when features are needed and the online store does not answer.
    """
    scored = await _score_with_store(release, store, release.inputs.parse(body), request_id)
    return Answered(_encode(_answer(release, scored)), release, [scored])


async def predict_batch(
    release: Release, store: OnlineStore | None, body: bytes, request_id: str, charge: Callable[[int], None]
) -> Answered:
    """The answers of up to 1,000 customers, in their order. Other requests are served in between.

    Raises:
        Problem: 422 for the body, 429 when the rows are too many for the rate, 503 as for one customer.
    """
    rows = release.inputs.parse_rows(body)
    charge(len(rows) - 1)
    wanted = [row.key for row in rows if row.key is not None and row.is_incomplete]
    found = await _find(store, wanted) if wanted else None
    stored = iter(found.rows if found is not None else ())
    scored: list[Scored] = []
    answers: list[Any] = []
    for i, row in enumerate(rows):
        online = next(stored, None) if row.key is not None and row.is_incomplete else None
        scored.append(_score(release, row, found, online, f"{request_id}-{i}"))
        answers.append(_answer(release, scored[-1]))
        if i % _ROWS_A_TURN == _ROWS_A_TURN - 1:
            await asyncio.sleep(0)
    return Answered(_encode({"predictions": answers, "request_id": request_id}), release, scored)


async def predict_explained(release: Release, store: OnlineStore | None, body: bytes, request_id: str) -> Answered:
    """One customer's answer with the reasons.

    Raises:
        Problem: as `predict`.
    """
    scored = await _score_with_store(release, store, release.inputs.parse(body), request_id)
    values = release.own_values(scored.package, scored.values)
    answer = msgspec.json.decode(_encode(_answer(release, scored))) | explain(scored.package, scored.row, values)
    return Answered(_encode(answer), release, [scored])


def log_answers(endpoint: str, answered: Answered, log: PredictionLog) -> None:
    """Write what was answered to the log; a shadow challenger scores now, when the answer is on its way."""
    release = answered.release
    if release is None:
        return
    now = time.time()
    for scored in answered.scored:
        record = Record(
            now,
            scored.request_id,
            scored.parsed.key,
            scored.package.name,
            scored.variant,
            endpoint,
            scored.probability,
            scored.row,
            scored.unseen,
            _shadow(release, scored),
        )
        log.append(release.campaign, scored.package, record)


def _shadow(release: Release, scored: Scored) -> dict[str, Any] | None:
    challenger = release.challenger
    if challenger is None or release.file.mode != "shadow":
        return None
    row, _ = challenger.encode(release.own_values(challenger, scored.values))
    probability = challenger.probability(row)
    return {
        "package": challenger.name,
        "model_version": challenger.version,
        "probability": probability,
        "difference": probability - scored.probability,
    }


async def _score_with_store(release: Release, store: OnlineStore | None, parsed: Parsed, request_id: str) -> Scored:
    if parsed.key is None or not parsed.is_incomplete:
        return _score(release, parsed, None, None, request_id)
    found = await _find(store, [parsed.key])
    return _score(release, parsed, found, found.rows[0] if found else None, request_id)


async def _find(store: OnlineStore | None, keys: list[str]) -> Found | None:
    if store is None:
        return None
    try:
        return await store.find(keys)
    except OnlineUnavailableError:
        message = "the online store does not answer, and the body lacks features; send all of them, or try again"
        raise Problem(503, "online_store_unavailable", message, headers=((b"retry-after", b"1"),)) from None


def _score(
    release: Release, parsed: Parsed, found: Found | None, online: Sequence[Any] | None, request_id: str
) -> Scored:
    values = parsed.values
    known: bool | None = None
    if parsed.key is not None and parsed.is_incomplete:
        known = online is not None
    facts = found.facts if found is not None and online is not None else None
    if facts is not None and online is not None:
        places = _places(release.inputs.features, facts.columns)
        values = [
            online[place] if value is UNSET and place is not None else value
            for value, place in zip(values, places, strict=True)
        ]
    package, variant = release.choose(parsed.key)
    row, unseen = package.encode(release.own_values(package, values))
    return Scored(parsed, values, package, variant, row, unseen, package.probability(row), known, facts, request_id)


@lru_cache(maxsize=64)
def _places(features: tuple[str, ...], columns: tuple[str, ...]) -> list[int | None]:
    """Where each feature is in a row of the online store."""
    at = {name: i for i, name in enumerate(columns)}
    return [at.get(name) for name in features]


def _answer(release: Release, scored: Scored) -> Any:
    package, p = scored.package, scored.probability
    percentile, decile, tier = package.rank(p)
    margin, cost, threshold = package.money
    missing, sources = _origins(release, scored)
    facts = scored.facts
    key = (scored.parsed.key,) if release.inputs.key is not None else ()
    return _answer_type(release.inputs.key)(
        *key,
        release.campaign,
        p,
        percentile,
        decile,
        tier,
        p * margin - cost,
        "contact" if p > threshold else "skip",
        threshold if threshold < math.inf else None,
        package.version,
        scored.variant,
        scored.known,
        missing,
        scored.unseen,
        sources,
        _online(facts) if facts is not None else None,
        scored.request_id,
    )


_NONE = msgspec.Raw(b"[]")


def _origins(release: Release, scored: Scored) -> tuple[Any, Any]:
    """Names of the features without any value, and of those from the body and from the online store."""
    parsed, names = scored.parsed, release.inputs.names
    if not parsed.is_incomplete:
        return _NONE, release.inputs.all_given
    given = [name for name, value in zip(names, parsed.values, strict=True) if value is not UNSET]
    if scored.facts is None:
        return [name for name, v in zip(names, parsed.values, strict=True) if v is UNSET], Sources(given, [])
    online, missing = [], []
    for name, own, value in zip(names, parsed.values, scored.values, strict=True):
        if own is UNSET:
            (missing if value is UNSET else online).append(name)
    return missing, Sources(given, online)


def _online(facts: Facts) -> Online:
    snapshot = datetime.fromisoformat(facts.snapshot).replace(tzinfo=UTC).timestamp()
    published = datetime.fromtimestamp(facts.published_at, UTC).isoformat(timespec="seconds")
    return Online(facts.snapshot, published, round((time.time() - snapshot) / 3600, 2))


@lru_cache(maxsize=64)
def _answer_type(key: str | None) -> Any:
    names = [*(["key"] if key is not None else []), *ANSWER_FIELDS]
    return msgspec.defstruct("Answer", [(n, Any) for n in names], rename={"key": key} if key else None, gc=False)
