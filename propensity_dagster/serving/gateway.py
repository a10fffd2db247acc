"""HTTP around the answers, outside BentoML's own middleware: routes, keys, limits, errors, metrics.

BentoML's stack costs several times a prediction (timers, tracing, access log, validation that repeats what was sent)
and a third of a second at the start, so that only the files of its Swagger UI are taken from it: its own page would
tell Google who looks at it.
Values of a request are in no log and no error.
"""

import asyncio
import gc
import itertools
import logging
import operator
import os
import re
import resource
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from propensity_dagster.serving.limits import RateLimit
from propensity_dagster.serving.measures import Measures, run_folder
from propensity_dagster.serving.model_info import campaigns_body, model_body
from propensity_dagster.serving.openapi import PAGE, document
from propensity_dagster.serving.packages import Release
from propensity_dagster.serving.prediction_log import PredictionLog
from propensity_dagster.serving.predictions import Answered, log_answers, predict, predict_batch, predict_explained
from propensity_dagster.serving.problems import Problem
from propensity_dagster.serving.protocol import answer_through
from propensity_dagster.serving.settings import ApiKey, is_loopback, predictions_folder, serving_folder
from propensity_dagster.serving.watch import Watcher

logger = logging.getLogger("propensity.serving")

Scope = Any
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Header = tuple[bytes, bytes]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
_JSON = (b"content-type", b"application/json")
_PLAIN = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
_HTML = (b"content-type", b"text/html; charset=utf-8")
_STYLE = (b"content-type", b"text/css; charset=utf-8")
_SCRIPT = (b"content-type", b"text/javascript; charset=utf-8")
_CLOSE = (b"connection", b"close")
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip")
_SWEEP_SECONDS = 0.1
_SWEEPS_A_MEASURE = 10
_DRAIN_BYTES = 4 << 20


@dataclass(slots=True)
class Request:
    """What a handler needs. `slot` is the key's place in the table of rates."""

    id: str
    release: Release | None
    body: bytes
    slot: int | None


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint: `batch` bodies may be longer, `open` ones need no key, `campaign` ones a release; or a `file`."""

    name: str
    method: str
    handler: str
    batch: bool = False
    open: bool = False
    campaign: bool = True
    content_type: Header = _JSON
    file: str = ""


_CAMPAIGN_ROUTES = {
    "predict": Route("predict", "POST", "_predict"),
    "predict_batch": Route("predict_batch", "POST", "_predict_batch", batch=True),
    "explain": Route("explain", "POST", "_explain"),
    "model": Route("model", "GET", "_model"),
}
_ROUTES = {
    **{f"/{name}": route for name, route in _CAMPAIGN_ROUTES.items()},
    "/campaigns": Route("campaigns", "GET", "_campaigns", campaign=False),
    "/metrics": Route("metrics", "GET", "_metrics", campaign=False, content_type=_PLAIN),
    "/livez": Route("livez", "GET", "_alive", campaign=False, open=True),
    "/readyz": Route("readyz", "GET", "_ready", campaign=False, open=True),
    "/": Route("docs", "GET", "_page", campaign=False, open=True, content_type=_HTML),
    "/docs.json": Route("docs", "GET", "_docs", campaign=False, open=True),
    **{
        f"/static_content/{name}": Route("docs", "GET", "", False, True, False, content_type, name)
        for name, content_type in (
            ("swagger-ui.css", _STYLE),
            ("swagger-ui-bundle.js", _SCRIPT),
            ("swagger-ui-standalone-preset.js", _SCRIPT),
            ("swagger-initializer.js", _SCRIPT),
        )
    },
}


@dataclass(slots=True)
class _InHand:
    """A request that is being answered; `reading` its body, or `late` once its time was up."""

    task: Any
    deadline: float
    reading: bool = False
    late: bool = False


class Gateway:
    """The ASGI application. One per worker; everything runs on its event loop."""

    def __init__(self) -> None:
        self._watcher = Watcher(serving_folder(), os.environ.get("PROPENSITY_DEFAULT_CAMPAIGN"))
        self._state = self._watcher.state
        self._in_hand: dict[int, _InHand] = {}
        self._numbers = itertools.count()
        self._prefix = secrets.token_hex(6)
        self._log: PredictionLog | None = None
        self._documents: tuple[tuple[Any, ...], bytes] = ((None, None, None), b"")

    async def _no_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await send({"type": "websocket.close", "code": 1003})
            return

        await receive()
        try:
            self._start()
        except Exception as error:  # unless it is told so, uvicorn would serve without
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._stop()
        await send({"type": "lifespan.shutdown.complete"})

    def _start(self) -> None:
        _show_log()
        _raise_file_limit()
        answer_through(self)
        folder = run_folder()
        self._measures = Measures(folder, self._state)
        self._rates = RateLimit(folder / "rates")
        self._watcher.start()
        predictions = predictions_folder()
        if predictions is None:
            logger.warning("PROPENSITY_HOME and PROPENSITY_PREDICTIONS are not set: answers are not logged")
        else:
            self._log = PredictionLog(predictions)
            self._measures.follow(self._log)
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())
        # What was loaded stays: collections need not look at it again. Requests leave no cycles behind.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)

    def _stop(self) -> None:
        self._sweeper.cancel()
        self._watcher.stop()
        if self._log is not None:
            self._log.close()
        self._measures.stop()

    async def _sweep(self) -> None:
        """Cancel what is late. One timer for all requests: a timer each would cost more than a prediction."""
        for turn in itertools.count():
            await asyncio.sleep(_SWEEP_SECONDS)
            if turn % _SWEEPS_A_MEASURE == 0:
                self._measures.update(len(self._in_hand))
            now = time.monotonic()
            for request in list(self._in_hand.values()):
                if request.deadline < now and not request.late:
                    request.late = True
                    request.task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the worker's start and stop."""
        if scope["type"] != "http":
            await self._no_request(scope, receive, send)
            return
        started = time.perf_counter()
        headers = _Headers(scope["headers"])
        number, request_id = self._number(headers)
        route: Route | None = None
        name: str | None = None
        in_hand: _InHand | None = None
        try:
            route, name = _find_route(scope)
            self._admit(scope, headers, route)
            in_hand = self._take(number)
            answer = await self._answer(receive, headers, route, name, request_id, in_hand)
        except Problem as problem:
            answer = problem
        except asyncio.CancelledError:
            if in_hand is None or not in_hand.late:
                raise
            answer = _late(in_hand)
        except Exception as error:
            answer = _failed(error, scope["path"], request_id)
        finally:
            self._in_hand.pop(number, None)
        status, sent, body = self._reply(answer, route, headers, request_id)
        await send({"type": "http.response.start", "status": status, "headers": sent})
        if _CLOSE in sent:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await _drain(receive)
            body = b""
        await send({"type": "http.response.body", "body": body})
        self._finish(route, name, status, started, answer)

    def release_now(self, path: bytes) -> Release | None:
        """Who answers a `POST` to this path from memory alone; None where that takes a task, or is no prediction."""
        state = self._state
        if path == b"/predict":
            name = state.default_campaign
        elif path.startswith(b"/campaigns/") and path.endswith(b"/predict"):
            name = path[11:-8].decode("latin-1")
        else:
            return None
        release = state.releases.get(name) if name is not None else None
        if release is None or len(self._in_hand) >= state.settings.max_concurrency:
            return None
        store = state.stores.get(release.campaign)
        return release if store is None or not store.waits else None

    def answer_now(
        self,
        scope: Scope,
        release: Release,
        path: bytes,
        body: bytes,
        write: Callable[[int, list[Header], bytes], None],
    ) -> None:
        """Answer a prediction whose body is there, without a task: what `__call__` would, byte for byte."""
        started = time.perf_counter()
        headers = _Headers(scope["headers"])
        _, request_id = self._number(headers)
        route = _CAMPAIGN_ROUTES["predict"]
        try:
            self._admit(scope, headers, route)
            _require_json(headers)
            limit = self._state.settings.max_body_bytes
            if len(body) > limit:
                raise _too_large(limit)
            store = self._state.stores.get(release.campaign)
            answer = _without_waiting(predict(release, store, body, request_id))
        except Problem as problem:
            answer = problem
        except Exception as error:
            answer = _failed(error, path.decode("latin-1"), request_id)
        status, sent, body = self._reply(answer, route, headers, request_id)
        write(status, sent, body)
        name = release.campaign if len(path) > len(b"/predict") else None
        self._finish(route, name, status, started, answer)

    def _number(self, headers: "_Headers") -> tuple[int, str]:
        number = next(self._numbers)
        return number, headers.request_id or f"{self._prefix}{number:08x}"

    def _reply(
        self, answer: Answered | Problem, route: Route | None, headers: "_Headers", request_id: str
    ) -> tuple[int, list[Header], bytes]:
        """Status, headers and body."""
        if isinstance(answer, Problem):
            status, body, content_type, extra = answer.status, answer.body(request_id), _JSON, answer.headers
        else:
            assert route is not None
            status, body, content_type, extra = 200, answer.body, route.content_type, ()
        sent = [
            content_type,
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id.encode()),
            *extra,
        ]
        if headers.origin and headers.origin.decode("latin-1") in self._state.settings.cors_origins:
            sent += [(b"access-control-allow-origin", headers.origin), (b"vary", b"Origin")]
        return status, sent, body

    def _finish(
        self, route: Route | None, name: str | None, status: int, started: float, answer: Answered | Problem
    ) -> None:
        """Count and log what was sent."""
        endpoint = route.name if route else "none"
        self._measures.request(endpoint, name, status, time.perf_counter() - started)
        if self._log is not None and isinstance(answer, Answered) and self._state.settings.log_predictions:
            log_answers(endpoint, answer, self._log)

    def _admit(self, scope: Scope, headers: "_Headers", route: Route) -> None:
        """Methods, keys and rates, before a byte of the body is read."""
        method = scope["method"]
        if method == "OPTIONS" and headers.origin and headers.get(b"access-control-request-method"):
            self._preflight(headers, route)
        if method != route.method and not (method == "HEAD" and route.method == "GET"):
            allowed = route.method if route.method == "POST" else "GET, HEAD"
            raise Problem(
                405, "method_not_allowed", f"allowed is {allowed}", headers=((b"allow", allowed.encode()), _CLOSE)
            )
        if route.open:
            return
        key = self._authenticate(scope, headers)
        if key is not None:
            headers.slot = key.slot
            self._charge(key.slot, 1)

    def _preflight(self, headers: "_Headers", route: Route) -> None:
        if headers.origin.decode("latin-1") in self._state.settings.cors_origins:
            allowed = (
                (b"access-control-allow-methods", route.method.encode()),
                (b"access-control-allow-headers", b"content-type, authorization, x-api-key, x-request-id"),
                (b"access-control-max-age", b"600"),
            )
            raise _Preflight(allowed)

    def _authenticate(self, scope: Scope, headers: "_Headers") -> ApiKey | None:
        keys = self._state.keys
        if keys.entries:
            found = keys.find(headers.key) if headers.key else None
            if found is None:
                said = "this API key is not known" if headers.key else "an API key is needed"
                raise _unauthorized(f"{said}: send it as X-API-Key, or as Authorization: Bearer")
            return found
        if not _is_local(scope, headers):
            raise _unauthorized("no API key has been made yet (propensity key add NAME), so only this machine may call")
        return None

    def _charge(self, slot: int | None, cost: int) -> None:
        if slot is None or cost <= 0:
            return
        settings = self._state.settings
        seconds = self._rates.wait(slot, settings.requests_per_second, settings.burst, cost)
        if seconds:
            message = f"more than {settings.requests_per_second:g} a second for this key, a batch counts its rows"
            after = (b"retry-after", b"%d" % max(1, round(seconds + 0.5)))
            raise Problem(429, "rate_limited", message, headers=(after,))

    def _take(self, number: int) -> _InHand:
        settings = self._state.settings
        if len(self._in_hand) >= settings.max_concurrency:
            message = f"more than {settings.max_concurrency} requests at once"
            raise Problem(429, "too_many_requests", message, headers=((b"retry-after", b"1"), _CLOSE))
        in_hand = _InHand(asyncio.current_task(), time.monotonic() + settings.timeout_seconds)
        self._in_hand[number] = in_hand
        return in_hand

    async def _answer(
        self, receive: Receive, headers: "_Headers", route: Route, name: str | None, request_id: str, in_hand: _InHand
    ) -> Answered:
        if route.file:
            return Answered(_static_file(route.file))
        release = self._release(name) if route.campaign else None
        body = b""
        if route.method == "POST":
            settings = self._state.settings
            limit = settings.max_batch_bytes if route.batch else settings.max_body_bytes
            _require_json(headers)
            in_hand.reading = True
            body = await _read(receive, headers.length, limit)
            in_hand.reading = False
        request = Request(request_id, release, body, headers.slot)
        return await getattr(self, route.handler)(request)

    def _release(self, name: str | None) -> Release:
        state = self._state
        wanted = name if name is not None else state.default_campaign
        release = state.releases.get(wanted) if wanted is not None else None
        if release is not None:
            return release
        if name is not None and state.releases:
            raise Problem(
                404, "unknown_campaign", f"there is no such campaign; there are {', '.join(sorted(state.releases))}"
            )
        said = "the default campaign" if state.releases else "any campaign"
        raise Problem(503, "no_champion", f"there is no champion of {said} yet: train and promote one", headers=_RETRY)

    async def _predict(self, request: Request) -> Answered:
        release = _released(request)
        return await predict(release, self._state.stores.get(release.campaign), request.body, request.id)

    async def _predict_batch(self, request: Request) -> Answered:
        release = _released(request)
        store = self._state.stores.get(release.campaign)
        return await predict_batch(
            release, store, request.body, request.id, lambda cost: self._charge(request.slot, cost)
        )

    async def _explain(self, request: Request) -> Answered:
        release = _released(request)
        return await predict_explained(release, self._state.stores.get(release.campaign), request.body, request.id)

    async def _model(self, request: Request) -> Answered:
        return Answered(model_body(_released(request), self._state))

    async def _campaigns(self, request: Request) -> Answered:
        return Answered(campaigns_body(self._state))

    async def _metrics(self, request: Request) -> Answered:
        self._measures.update(len(self._in_hand))
        return Answered(self._measures.text())

    async def _alive(self, request: Request) -> Answered:
        return Answered(b'{"status":"alive"}')

    async def _ready(self, request: Request) -> Answered:
        self._release(None)
        return Answered(b'{"status":"ready"}')

    async def _page(self, request: Request) -> Answered:
        return Answered(PAGE)

    async def _docs(self, request: Request) -> Answered:
        state = self._state
        shown = (state.releases, state.keys, state.settings)
        if not all(map(operator.is_, self._documents[0], shown)):
            self._documents = (shown, document(state))
        return Answered(self._documents[1])


_RETRY: tuple[Header, ...] = ((b"retry-after", b"1"),)


class _Preflight(Problem):
    """Not a problem: what a browser asks before it sends; 204 has no body."""

    def __init__(self, headers: tuple[Header, ...]) -> None:
        super().__init__(204, "", "", headers=headers)

    def body(self, request_id: str) -> bytes:
        return b""


class _Headers:
    """The headers that matter; of one given twice the last counts."""

    __slots__ = ("_all", "key", "origin", "slot")

    def __init__(self, headers: Any) -> None:
        self._all: dict[bytes, bytes] = dict(headers)
        self.origin = self._all.get(b"origin", b"")
        self.key = self._all.get(b"x-api-key") or _bearer(self._all.get(b"authorization", b""))
        self.slot: int | None = None

    def get(self, name: bytes) -> bytes:
        """One header, empty when absent."""
        return self._all.get(name, b"")

    @property
    def request_id(self) -> str | None:
        """The caller's own id of the request, if it is one."""
        value = self._all.get(b"x-request-id")
        return value.decode() if value and _REQUEST_ID.fullmatch(value) else None

    @property
    def length(self) -> int | None:
        """Length of the body, if it is said."""
        value = self._all.get(b"content-length", b"")
        return int(value) if value.isdigit() else None

    @property
    def forwarded(self) -> bool:
        """Whether a proxy passed the request on."""
        return any(name in self._all for name in _FORWARDED)


def _bearer(authorization: bytes) -> bytes:
    return authorization[7:].strip() if authorization[:7].lower() == b"bearer " else b""


def _find_route(scope: Scope) -> tuple[Route, str | None]:
    path: str = scope["path"]
    route = _ROUTES.get(path)
    if route is not None:
        return route, None
    parts = path.split("/")
    if len(parts) == 4 and parts[1] == "campaigns" and parts[3] in _CAMPAIGN_ROUTES:
        return _CAMPAIGN_ROUTES[parts[3]], parts[2]
    raise Problem(404, "not_found", "there is no such path; GET / lists what there is", headers=(_CLOSE,))


@lru_cache
def _static_file(name: str) -> bytes:
    package = find_spec("bentoml")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name("_internal").joinpath("server", "static_content", name).read_bytes()


def _is_local(scope: Scope, headers: _Headers) -> bool:
    """Whether a caller without a key is a program on this machine: no other host, no proxy, no foreign page."""
    client, server = scope.get("client"), scope.get("server")
    ends = [end[0] for end in (client, server) if end]
    if len(ends) != 2 or headers.forwarded or not all(map(is_loopback, ends)):
        return False
    try:
        host = urlsplit("//" + headers.get(b"host").decode("latin-1")).hostname
    except ValueError:
        return False
    return host is None or host in _LOCAL_HOSTS  # a page's own name for 127.0.0.1 is no local caller


def _unauthorized(message: str) -> Problem:
    return Problem(401, "unauthorized", message, headers=((b"www-authenticate", b"Bearer"), _CLOSE))


def _require_json(headers: _Headers) -> None:
    stated = headers.get(b"content-type")
    if stated == b"application/json" and not headers.get(b"content-encoding"):
        return
    kind, _, parameters = stated.lower().partition(b";")
    charset = parameters.strip().replace(b'"', b"")
    plain = headers.get(b"content-encoding") in (b"", b"identity")
    if kind.strip() != b"application/json" or charset not in (b"", b"charset=utf-8") or not plain:
        message = "send Content-Type: application/json, in UTF-8 and not compressed"
        raise Problem(415, "unsupported_media_type", message, headers=((b"accept", b"application/json"), _CLOSE))


async def _read(receive: Receive, length: int | None, limit: int) -> bytes:
    if length is not None and length > limit:
        raise _too_large(limit)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        parts, size = [body], len(body)
        while message.get("more_body"):
            if size > limit:
                raise _too_large(limit)
            message = await receive()
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
        body = b"".join(parts)
    if message["type"] == "http.disconnect":
        raise Problem(400, "disconnected", "the connection ended before the body did")
    if len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> Problem:
    return Problem(413, "body_too_large", f"a body may have at most {limit:,} bytes", headers=(_CLOSE,))


def _late(in_hand: _InHand) -> Problem:
    if in_hand.reading:
        return Problem(408, "timeout", "the body did not come in time", headers=(_CLOSE,))
    return Problem(503, "timeout", "the answer took too long", headers=_RETRY)


async def _drain(receive: Receive) -> None:
    """Take what still comes for a moment: a client that is sending would otherwise not see the answer."""
    try:
        async with asyncio.timeout(1):
            size = 0
            while size < _DRAIN_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):
                    return
    except TimeoutError:
        return


def _released(request: Request) -> Release:
    assert request.release is not None
    return request.release


def _failed(error: Exception, path: str, request_id: str) -> Problem:
    # Never the message: it may hold what was sent.
    logger.error("%s: %s at %s (request %s)", path[:100], type(error).__name__, _where(error), request_id)
    return Problem(500, "internal_error", "an error of ours; it is in the server's log")


def _without_waiting(answering: Coroutine[Any, Any, Answered]) -> Answered:
    """The result of a coroutine that waits for nothing."""
    try:
        answering.send(None)
    except StopIteration as done:
        return done.value
    answering.close()
    raise RuntimeError("a store that said it does not wait did")


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else "unknown"


def _show_log() -> None:
    logging.getLogger("uvicorn.access").propagate = False  # it would make a line of every request, and drop it
    own = logging.getLogger("propensity")
    if not own.handlers:
        handler = logging.StreamHandler()
        form = "%(asctime)s [%(levelname)s] [%(name)s] %(message)s"
        handler.setFormatter(logging.Formatter(form, "%Y-%m-%dT%H:%M:%S%z"))
        own.addHandler(handler)
        own.setLevel(logging.INFO)
        own.propagate = False


def _raise_file_limit() -> None:
    """Each connection is a file; the usual limit of 1,024 is soft."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
