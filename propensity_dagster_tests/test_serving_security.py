"""Keys, limits and bad input: every answer has the one shape, no value comes back, nothing is a 500."""

import gzip
import hashlib
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from propensity_dagster.serving.gateway import Gateway
from propensity_dagster.serving.inputs import Input, Inputs
from propensity_dagster.serving.limits import RateLimit
from propensity_dagster.serving.problems import Problem
from propensity_dagster.serving.publish.keys import add_key, remove_key
from propensity_dagster.serving.publish.online_features import publish_online_features
from propensity_dagster.serving.publish.releases import publish_release
from propensity_dagster.serving.settings import read_keys

from .served import Service, free_port, wait_until
from .test_serving import copy_home, newest

SECRET = "geheim4711"


@pytest.fixture(scope="module")
def home(all_registered, tmp_path_factory):
    found = copy_home(all_registered, tmp_path_factory.mktemp("secured"))
    publish_release(all_registered.campaign, found, all_registered.store)
    publish_online_features(all_registered.campaign, newest(found), found)
    return found


@pytest.fixture(scope="module")
def service(home):
    with Service(home.root) as running:
        yield running
    text = running.text()
    assert SECRET not in text
    assert "Traceback" not in text
    assert "ERROR" not in text


def is_problem(answer: httpx.Response, status: int, code: str | None = None) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    content = answer.json()
    assert set(content) == {"status", "code", "message", "fields", "request_id"}
    assert content["status"] == status
    assert content["request_id"] == answer.headers["x-request-id"]
    assert code is None or content["code"] == code
    assert SECRET not in answer.text
    return content


JSON = {"content-type": "application/json"}
BODIES = {
    # name: body, wrong fields
    "nan": (b'{"customer_id":"1","age":NaN}', {"age"}),
    "infinity": (b'{"customer_id":"1","age":Infinity}', {"age"}),
    "minus infinity": (b'{"customer_id":"1","age":-Infinity}', {"age"}),
    "1e400": (b'{"customer_id":"1","age":1e400}', {"age"}),
    "5,000 digits": (b'{"customer_id":"1","age":' + b"9" * 5_000 + b"}", {"age"}),
    "below the minimum": (b'{"customer_id":"1","total_purchases":-1}', {"total_purchases"}),
    "text for a number": (b'{"customer_id":"1","age":"geheim4711"}', {"age"}),
    "number for a text": (b'{"customer_id":"1","country":4711}', {"country"}),
    "true for a number": (b'{"customer_id":"1","age":true}', {"age"}),
    "list for a number": (b'{"customer_id":"1","age":[1]}', {"age"}),
    "object for a number": (b'{"customer_id":"1","age":{"a":1}}', {"age"}),
    "huge text": (b'{"customer_id":"1","country":"' + b"x" * 10_000 + b'"}', {"country"}),
    "unknown field": (b'{"customer_id":"1","geheim":1}', {"geheim"}),
    "the inner name": (b'{"customer_id":"1","orders_count_all":1}', {"orders_count_all"}),
    "key given twice": (b'{"customer_id":"1","age":1,"age":2}', {"age"}),
    "id given twice": (b'{"customer_id":"1","customer_id":"2"}', {"customer_id"}),
    "no id": (b'{"age":1}', {"customer_id"}),
    "empty id": (b'{"customer_id":""}', {"customer_id"}),
    "number as id": (b'{"customer_id":12345}', {"customer_id"}),
    "null as id": (b'{"customer_id":null}', {"customer_id"}),
    "long id": (b'{"customer_id":"' + b"1" * 257 + b'"}', {"customer_id"}),
    "null byte in id": (b'{"customer_id":"1\\u0000"}', {"customer_id"}),
    "half a character in id": (b'{"customer_id":"\\ud800"}', {"customer_id"}),
    "half a character in a text": (b'{"customer_id":"1","country":"\\ud800"}', {"country"}),
    "several at once": (b'{"customer_id":1,"age":"x","nope":1}', {"customer_id", "age", "nope"}),
    "a list": (b"[]", {"(body)"}),
    "a number": (b"1", {"(body)"}),
    "null": (b"null", {"(body)"}),
    "nothing": (b"", None),
    "truncated": (b'{"customer_id":"1","age":', None),
    "two objects": (b'{"customer_id":"1"}{"customer_id":"2"}', None),
    "null byte": (b'{"customer_id":"1"\x00}', None),
    "not UTF-8": (b'{"customer_id":"\xff\xfe"}', None),
    "UTF-16": ('{"customer_id":"1"}'.encode("utf-16"), None),
    "nested deep": (b'{"customer_id":"1","age":' + b"[" * 20_000 + b"]" * 20_000 + b"}", None),
    "nested deep objects": (b'{"a":' * 8_000 + b"1" + b"}" * 8_000, None),
    "single quotes": (b"{'customer_id': '1'}", None),
}


@pytest.mark.parametrize("path", ["/predict", "/explain", "/campaigns/small/predict"])
@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_422_and_names_the_fields(service, name, path):
    body, fields = BODIES[name]
    answer = service.client.post(path, content=body, headers=JSON)
    if fields is None:
        assert is_problem(answer, 422)["code"] in ("invalid_json", "invalid_fields")
    else:
        assert {f["field"] for f in is_problem(answer, 422, "invalid_fields")["fields"]} == fields


def test_words_say_what_is_allowed(service):
    answer = service.client.post("/predict", json={"customer_id": "1", "ages": 3, "age": -5, "orders_count_all": 2})
    words = {f["field"]: f["message"] for f in answer.json()["fields"]}
    assert words["ages"] == "unknown field; did you mean 'age'?"
    assert words["orders_count_all"] == "unknown field; it is called 'total_purchases' here"
    body = {"customer_id": "1", "total_purchases": -5}
    assert "between 0 and" in service.client.post("/predict", json=body).json()["fields"][0]["message"]


def test_a_colon_in_a_text_is_no_second_key(service):
    answer = service.ok("/predict", {"customer_id": "a:b:c", "country": "x:y"})
    assert answer["customer_id"] == "a:b:c"


BATCHES = {
    "no rows": ({}, {"rows"}),
    "empty": ({"rows": []}, {"rows"}),
    "too many": ({"rows": [{"customer_id": "1"}] * 1_001}, {"rows"}),
    "no list": ({"rows": {"customer_id": "1"}}, {"rows"}),
    "more": ({"rows": [{"customer_id": "1"}], "x": 1}, {"x"}),
    "third row": (
        {"rows": [{"customer_id": "1"}, {"customer_id": "1"}, {"age": "x"}]},
        {"rows[2].age", "rows[2].customer_id"},
    ),
    "no object": ({"rows": [1]}, {"rows[0]"}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_bad_batch_names_rows_and_fields(service, name):
    body, fields = BATCHES[name]
    problem = is_problem(service.client.post("/predict_batch", json=body), 422, "invalid_fields")
    assert {f["field"] for f in problem["fields"]} == fields


def test_a_full_batch_is_answered(service):
    rows = [{"customer_id": str(i)} for i in range(1_000)]
    assert len(service.ok("/predict_batch", {"rows": rows})["predictions"]) == 1_000


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/predict", "POST"),
        ("PUT", "/predict_batch", "POST"),
        ("DELETE", "/explain", "POST"),
        ("POST", "/model", "GET, HEAD"),
        ("OPTIONS", "/predict", "POST"),
        ("TRACE", "/predict", "POST"),
        ("POST", "/metrics", "GET, HEAD"),
        ("PATCH", "/campaigns", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
    ],
)
def test_other_methods(service, method, path, allowed):
    answer = service.client.request(method, path)
    is_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    "path",
    ["/nope", "/predict/", "/campaigns/small", "/campaigns/small/predict/x", "/schema.json", "/static_content/x"],
)
def test_other_paths(service, path):
    is_problem(service.client.get(path), 404, "not_found")


def test_head_is_get_without_a_body(service):
    answer = service.client.head("/model")
    assert (answer.status_code, answer.content) == (200, b"")


MEDIA = [
    {},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=latin-1"},
    {"content-type": "application/json", "content-encoding": "gzip"},
]


@pytest.mark.parametrize("headers", MEDIA)
def test_other_media_types(service, headers):
    body = b'{"customer_id":"1"}'
    content = gzip.compress(body) if "content-encoding" in headers else body
    request = httpx.Request("POST", f"{service.client.base_url}/predict", content=content, headers=headers)
    is_problem(service.client.send(request), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", 'application/json;charset="UTF-8"']
)
def test_the_media_type_may_be_spelt_otherwise(service, kind):
    answer = service.client.post("/predict", content=b'{"customer_id":"1"}', headers={"content-type": kind})
    assert answer.status_code == 200


def test_a_body_that_is_too_large(service):
    large = b'{"customer_id":"1","country":"' + b"x" * 70_000 + b'"}'
    is_problem(service.client.post("/predict", content=large, headers=JSON), 413, "body_too_large")

    def chunks():
        for _ in range(40):
            yield b"x" * 4_096

    is_problem(service.client.post("/predict", content=chunks(), headers=JSON), 413, "body_too_large")
    huge = b"x" * 5_000_000
    is_problem(service.client.post("/predict_batch", content=huge, headers=JSON), 413, "body_too_large")
    service.ok("/predict", {"customer_id": "1"})


def test_a_body_in_small_pieces(service):
    def pieces():
        for byte in b'{"customer_id":"1"}':
            yield bytes([byte])

    assert service.client.post("/predict", content=pieces(), headers=JSON).status_code == 200


def test_the_request_id_of_the_caller_comes_back(service):
    for sent, kept in (("order-17", True), ("x" * 65, False), ("a b", False)):
        answer = service.post("/predict", {"customer_id": "1"}, headers={"x-request-id": sent})
        assert (answer.headers["x-request-id"] == sent) == kept
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


def raw(port: int, *parts: bytes, pause: float = 0.0, half_close: bool = False) -> bytes:
    """What a client gets that writes to the socket itself."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = b""
        try:
            while part := connection.recv(65_536):
                answer += part
                head, _, body = answer.partition(b"\r\n\r\n")
                length = next(
                    (int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), None
                )
                if length is not None and len(body) >= length:
                    break
        except OSError:
            pass
        return answer


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_slow_body_is_408_and_a_slow_head_harms_nobody(home):
    (home.serving / "settings.yaml").write_text("timeout_seconds: 1\n")
    try:
        with Service(home.root) as running:
            slow = socket.create_connection(("127.0.0.1", running.port))
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: loc")
            started = time.monotonic()
            answer = raw(running.port, HEAD + b"Content-Length: 100\r\n\r\n{", pause=0.1)
            assert b" 408 " in answer.split(b"\r\n")[0]
            assert b'"code":"timeout"' in answer
            assert time.monotonic() - started < 4
            running.ok("/predict", {"customer_id": "1"})
            slow.close()
    finally:
        (home.serving / "settings.yaml").unlink()


def test_broken_http_harms_nobody(service):
    half = raw(service.port, HEAD + b"Content-Length: 19\r\n\r\n" + b'{"customer_id":"1"}', half_close=True)
    assert b" 200 " in half.split(b"\r\n")[0] or half == b""
    raw(service.port, HEAD + b"Content-Length: 100\r\n\r\n{", half_close=True)
    for nonsense in (
        b"\x00\xff" * 50 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nA" + b"b" * 70_000,
    ):
        answer = raw(service.port, nonsense, half_close=True)
        assert b" 500 " not in answer.split(b"\r\n")[0]
    length = HEAD + b"Content-Length: -5\r\n\r\n"
    assert b" 400 " in raw(service.port, length, half_close=True).split(b"\r\n")[0]
    for _ in range(200):  # gone before the answer
        connection = socket.create_connection(("127.0.0.1", service.port))
        connection.sendall(HEAD + b"Content-Length: 19\r\n\r\n" + b'{"customer_id":"1"}')
        connection.close()
    service.ok("/predict", {"customer_id": "1"})


def test_pipelined_requests_are_answered_in_order(service):
    one = HEAD + b"Content-Length: 19\r\n\r\n" + b'{"customer_id":"1"}'
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(one * 5)
        answer = b""
        while answer.count(b'"request_id"') < 5:
            answer += connection.recv(65_536)
    assert answer.count(b"HTTP/1.1 200 OK") == 5


def test_thousands_of_idle_connections(service):
    """Ten thousand where the machine lets a process have so many; a request is answered as if they were not there."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(10_000, hard - 500)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle = []
    try:
        for _ in range(wanted):
            connection = socket.socket()
            connection.connect(("127.0.0.1", service.port))
            idle.append(connection)
        assert len(idle) == wanted
        for i in range(50):
            service.ok("/predict", {"customer_id": str(i)})
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Keys


def with_key(key: str) -> dict[str, str]:
    return {"x-api-key": key}


def test_keys_are_rotated_without_a_restart(home):
    serving = home.serving
    with Service(home.root) as running:
        body = {"customer_id": "1"}
        running.ok("/predict", body)  # no key yet: this machine may call
        old = add_key(serving, "shop")
        wait_until(lambda: running.post("/predict", body).status_code == 401)
        time.sleep(0.6)  # the other worker, too
        running.ok("/predict", body, headers=with_key(old))
        running.ok("/predict", body, headers={"authorization": f"Bearer {old}"})
        for headers in ({}, with_key("pk_wrong"), with_key(""), {"authorization": "Basic abc"}, with_key(old + "x")):
            answer = running.post("/predict", body, headers=headers)
            is_problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/model", "/campaigns", "/metrics"):
            is_problem(running.client.get(path), 401)
        for path in ("/", "/livez", "/readyz", "/docs.json"):
            assert running.client.get(path).status_code == 200
        new = add_key(serving, "shop-2")
        wait_until(lambda: running.post("/predict", body, headers=with_key(new)).status_code == 200)
        remove_key(serving, "shop")
        wait_until(lambda: running.post("/predict", body, headers=with_key(old)).status_code == 401)
        time.sleep(0.6)
        for _ in range(10):
            running.ok("/predict", body, headers=with_key(new))
        assert new not in running.text()
    text = (serving / "keys.json").read_text()
    assert new not in text
    assert hashlib.sha256(new.encode()).hexdigest() in text
    assert [entry.name for entry in read_keys(serving).entries] == ["shop-2"]
    remove_key(serving, "shop-2")


def test_without_keys_only_this_machine_may_call(service):
    body = {"customer_id": "1"}
    for headers in (
        {"x-forwarded-for": "203.0.113.5"},
        {"x-forwarded-for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
        {"x-real-ip": "127.0.0.1"},
        {"host": "evil.example"},
    ):
        is_problem(service.post("/predict", body, headers=headers), 401, "unauthorized")


def test_another_address_needs_a_key(home):
    environment = {**os.environ, "PROPENSITY_HOME": str(home.root)}
    command = [sys.executable, "-m", "propensity_dagster.cli", "serve", "--host", "0.0.0.0", "--port", str(free_port())]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert shown.returncode == 1
    assert "propensity key add" in shown.stderr


def test_a_taken_port_is_told(home, service):
    environment = {**os.environ, "PROPENSITY_HOME": str(home.root)}
    command = [sys.executable, "-m", "propensity_dagster.cli", "serve", "--port", str(service.port)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (shown.returncode, "--port" in shown.stderr, "Traceback" in shown.stderr) == (1, True, False)


# Limits


def test_rates_concurrency_and_cors(home):
    """One service with tight settings: each key has a rate of its own, a batch pays for its rows."""
    key, other = add_key(home.serving, "slow"), add_key(home.serving, "fast")
    settings = "requests_per_second: 2\nburst: 20\ncors_origins: [https://shop.example]\n"
    (home.serving / "settings.yaml").write_text(settings)
    try:
        with Service(home.root) as running:
            body = {"customer_id": "1"}
            codes = [running.post("/predict", body, headers=with_key(key)).status_code for _ in range(60)]
            assert 19 <= codes.count(200) <= 30, "counted over all workers"
            assert set(codes) == {200, 429}
            refused = running.post("/predict", body, headers=with_key(key))
            is_problem(refused, 429, "rate_limited")
            assert int(refused.headers["retry-after"]) >= 1
            rows = {"rows": [body] * 15}
            assert running.post("/predict_batch", rows, headers=with_key(other)).status_code == 200
            is_problem(running.post("/predict_batch", rows, headers=with_key(other)), 429, "rate_limited")
            # Pages of other origins may not call; the one that is named may.
            for origin, allowed in (("https://shop.example", "https://shop.example"), ("https://evil.example", None)):
                answer = running.client.get("/livez", headers={"origin": origin})
                assert answer.headers.get("access-control-allow-origin") == allowed
                preflight = {"origin": origin, "access-control-request-method": "POST"}
                answer = running.client.options("/predict", headers=preflight)
                assert answer.status_code == (204 if allowed else 405)
    finally:
        (home.serving / "settings.yaml").unlink()
        remove_key(home.serving, "slow")
        remove_key(home.serving, "fast")


def test_too_many_at_once_are_refused_at_once(home):
    (home.serving / "settings.yaml").write_text("max_concurrency: 4\ntimeout_seconds: 20\n")
    held = []
    try:
        with Service(home.root, environment={"PROPENSITY_WORKERS": "1"}) as running:
            for _ in range(4):
                connection = socket.create_connection(("127.0.0.1", running.port))
                connection.sendall(HEAD + b"Content-Length: 19\r\n\r\n{")
                held.append(connection)
            time.sleep(0.3)
            started = time.monotonic()
            is_problem(running.post("/predict", {"customer_id": "1"}), 429, "too_many_requests")
            assert time.monotonic() - started < 1
            held[0].sendall(b'"customer_id":"1"}')
            assert b" 200 " in held[0].recv(65_536).split(b"\r\n")[0]
            running.ok("/predict", {"customer_id": "1"})
            for connection in held:
                connection.close()
    finally:
        (home.serving / "settings.yaml").unlink()


def test_a_rate_is_kept(tmp_path, monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr("propensity_dagster.serving.limits.time.monotonic", lambda: now[0])
    rates = RateLimit(tmp_path / "rates")
    other_worker = RateLimit(tmp_path / "rates")
    passed = sum((rates, other_worker)[i % 2].wait(7, 10.0, 5) == 0.0 for i in range(20))
    assert passed == 5
    assert rates.wait(8, 10.0, 5) == 0.0, "another key has its own"
    assert rates.wait(7, 10.0, 5) == pytest.approx(0.1)
    now[0] += 0.1
    assert other_worker.wait(7, 10.0, 5) == 0.0
    now[0] += 100
    assert rates.wait(7, 10.0, 5, cost=50) == 0.0, "a batch larger than the burst passes when nothing is owed"
    assert rates.wait(7, 10.0, 5) == pytest.approx(4.6)
    now[0] -= 90_000  # another boot: the clock began anew
    assert rates.wait(7, 10.0, 5) == 0.0


# No value ever in an error


@pytest.mark.parametrize("value", ["geheim4711", 4711.25, [4711], {"geheim": 4711}, True])
@pytest.mark.parametrize("kind", ["number", "category"])
def test_no_value_in_a_problem(value, kind):
    field = Input("x", "x", kind, "", "", 0.0, 10.0, ("a",), None)
    with pytest.raises(Problem) as caught:
        Inputs("id", [field]).parse(json.dumps({"id": value, "x": value, "y": value}).encode())
    told = caught.value.body("r").decode()
    assert "4711" not in told
    assert "geheim" not in told


def test_an_error_of_ours_tells_nothing():
    """A bug in a handler: 500 in the one shape, its place in the log, the value nowhere."""
    import asyncio
    import logging

    gateway = Gateway()
    gateway._measures = type("Nothing", (), {"request": lambda *_: None})()  # pyright: ignore

    async def broken(request):
        raise RuntimeError(SECRET)

    gateway._alive = broken  # pyright: ignore[reportAttributeAccessIssue]
    sent, lines = [], []

    async def send(message):
        sent.append(message)

    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("propensity.serving").addHandler(handler)
    scope = {"type": "http", "method": "GET", "path": "/livez", "headers": []}
    asyncio.run(gateway(scope, None, send))  # pyright: ignore[reportArgumentType]
    logging.getLogger("propensity.serving").removeHandler(handler)
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["code"] == "internal_error"
    assert SECRET not in str(sent)
    assert SECRET not in str(lines)
    assert "RuntimeError" in lines[0]
    assert "test_serving_security.py" in lines[0]


def test_values_stay_out_of_the_log_of_the_service(service):
    """What the module's fixture looks for in the log at the end was sent here, in every place it could be."""
    for body in (
        f'{{"customer_id":"{SECRET}","age":"{SECRET}"}}',
        f'{{"customer_id":"{SECRET}","age":3}}',
        f'{{"{SECRET}',
    ):
        service.client.post("/predict", content=body.encode(), headers=JSON)
    threads = [
        threading.Thread(
            target=lambda: http.client.HTTPConnection("127.0.0.1", service.port).request("GET", f"/{SECRET}")
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
        thread.join()


# Every operation of our own document, by schemathesis


def test_schemathesis_finds_nothing(home, tmp_path):
    """All checks on thousands of cases: what the document allows is answered, what it forbids is refused in its words."""
    key = add_key(home.serving, "schemathesis")
    (home.serving / "settings.yaml").write_text("requests_per_second: 1000000\nburst: 1000000\n")
    try:
        with Service(home.root) as running:
            command = [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{running.port}/docs.json"),
                *("--header", f"X-API-Key: {key}", "--checks", "all", "--max-examples", "60", "--seed", "7"),
                *("--no-color", "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all"),
            ]
            shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
            assert shown.returncode == 0, shown.stdout[-6_000:] + shown.stderr[-2_000:]
            assert "Traceback" not in running.text()
    finally:
        (home.serving / "settings.yaml").unlink()
        remove_key(home.serving, "schemathesis")
