"""Nothing that a client sends is answered with anything but success or a 4xx error object, and the server stays alive."""

from __future__ import annotations

import json
import random
from typing import Any
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from dmoa.serving.http.page import HEADERS
from tests.examples import examples
from tests.unit.serving.fake_service import QUESTION, FakeService, connect, make_app

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
OUTCOMES = "/v1/dmoa/outcomes"
JSON = {"content-type": "application/json"}
VALID: dict[str, Any] = {
    "model": "tiny",
    "messages": QUESTION,
    "prompt": "1 + 1",
    "input": "1 + 1",
    "temperature": 0.5,
    "top_p": 0.9,
    "max_tokens": 5,
    "stop": ["x"],
    "seed": 1,
    "stream": False,
    "stream_options": None,
    "user": "u",
    "metadata": {"a": "b"},
    "dmoa": {"max_steps": 1, "policy": "dmoa"},
}
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**63, -(2**70), 10**300, 1e308, -0.0),
    *("", " ", "x" * 3000, "\u0000", "\U0010ffff", "\u202e", "ß" * 99, "tiny/../..", "tiny/dmoa/", "%00", "NaN"),
    *([], {}, [[]], [None], [{}], {"": ""}, {"role": "user"}, {"type": "text"}),
    *([{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "x"}] * 500),
    *(["a"] * 500, {str(i): i for i in range(300)}),
)
RAW = (
    b"",
    b"{",
    b"}",
    b"nul",
    b"NaN",
    b"[" * 5000,
    b'{"a":' * 3000,
    b"\xff\xfe\x00",
    b'"\\ud800"',
    b'{"model": "\\udfff"}',
    b"\xef\xbb\xbf{}",
)


def malformed(random_: random.Random) -> bytes:
    """One body: a valid one with a few fields lost, replaced or added, or bytes that are no JSON at all."""
    if random_.random() < 0.15:
        return random_.choice(RAW)
    body = dict(VALID)
    for _ in range(random_.randint(1, 4)):
        kind = random_.random()
        name = random_.choice([*VALID, "n", "tools", "vllm_xargs", "logit_bias", "echo", "\u0000", "__class__"])
        if kind < 0.3:
            body.pop(name, None)
        elif kind < 0.9:
            body[name] = random_.choice(ODD)
        else:
            value: Any = random_.choice(ODD)
            for _ in range(random_.choice((3, 150, 400))):
                value = [value] if random_.random() < 0.5 else {"content": value}
            body[name] = value
    text = json.dumps(body)
    if random_.random() < 0.1:
        text = text[: random_.randrange(len(text))]
    return text.encode()


def check_refusal(status: int, text: str) -> None:
    """A client error with an error object, and nothing of the server's insides."""
    assert 400 <= status < 500, text
    assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in text
    assert "pydantic" not in text


@pytest.mark.parametrize("seed", range(4))
async def test_two_hundred_malformed_requests(seed: int) -> None:
    random_ = random.Random(seed)
    service = FakeService()
    num_refused = 0
    async with connect(make_app(service, max_body_bytes=16384, unknown_fields="refuse")) as client:
        for _ in range(50):
            response = await client.post(random_.choice(PATHS), content=malformed(random_), headers=JSON)
            if response.status_code != 200:
                check_refusal(response.status_code, response.text)
                num_refused += 1
        assert (await client.get("/healthz")).status_code == 200
    assert num_refused >= 45
    assert service.running == 0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from([*VALID, "n", "x"]), VALUES, max_size=6).map(lambda odd: {**VALID, **odd})


@settings(max_examples=examples(150))
@given(
    content=st.binary(max_size=64) | st.one_of(VALUES, BODIES).map(lambda value: json.dumps(value).encode()),
    path=st.sampled_from((*PATHS, OUTCOMES)),
)
def test_any_bytes(content: bytes, path: str) -> None:
    response = CLIENT.post(path, content=content, headers=JSON)
    assert response.text
    if response.status_code != 200:
        check_refusal(response.status_code, response.text)


# The server's own bound: schemathesis sends bodies beyond 64 KiB now and then, and takes a 413 for an answer to none.
CLIENT = TestClient(make_app(FakeService(), max_body_bytes=2**20), base_url="http://test")


DOCUMENT = schemathesis.openapi.from_asgi("/openapi.json", CLIENT.app)
PAGE_PATHS = ("/", "/v1/dmoa/status", "/v1/dmoa/traces", "/v1/dmoa/gates", "/v1/dmoa/runs", "/v1/dmoa/runs/{run_id}")
MODELS = ("/v1/models", "/v1/models/{model}")
GET_PATHS = ("/healthz", "/readyz", "/metrics", *MODELS, "/v1/dmoa/traces/{trace_id}", *PAGE_PATHS)
TRACE = "/v1/dmoa/traces/{trace_id}"
PAGE_POSTS = ("/v1/dmoa/gates/rollback", f"{TRACE}/what-if", f"{TRACE}/branch")
KEEP = settings(max_examples=examples(40), derandomize=True, suppress_health_check=list(HealthCheck))


def walk(path: str, method: str, mode: GenerationMode, model: str | None = None) -> int:
    """Send what schemathesis makes of one operation, and check the answers against the document; returns how many it sent."""
    statuses: list[int] = []
    # The document cannot say what depends on the pool or on two fields together (the last message is the user's), so
    # a valid body for an existing model may be refused.
    beyond = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")] if model or path in PAGE_POSTS else []

    @KEEP
    @given(case=DOCUMENT[path][method].as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        if model is not None and path != OUTCOMES and isinstance(case.body, dict):
            case.body["model"] = model
        statuses.append(case.call_and_validate(excluded_checks=beyond).status_code)

    run()
    return len(statuses)


@pytest.mark.parametrize("path", GET_PATHS)
def test_what_can_be_read_is_as_documented(path: str) -> None:
    assert walk(path, "get", GenerationMode.POSITIVE) > 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("mode", "model"), [(GenerationMode.NEGATIVE, None), (GenerationMode.POSITIVE, None), (GenerationMode.POSITIVE, "tiny")]
)
def test_what_can_be_asked_is_as_documented(path: str, mode: GenerationMode, model: str | None) -> None:
    assert walk(path, "post", mode, model) > 0


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_outcomes_are_taken_as_documented(mode: GenerationMode) -> None:
    assert walk(OUTCOMES, "post", mode, "tiny") > 0


@pytest.mark.parametrize("path", PAGE_POSTS)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_what_the_page_asks_is_as_documented(path: str, mode: GenerationMode) -> None:
    assert walk(path, "post", mode) > 0


NAMES = st.text(st.characters(blacklist_categories=("Cs",)), max_size=40) | st.sampled_from(
    ("..", "../app.js", "%2e%2e%2fapp.js", "app.js%00", "app.js/", "index.html", "__init__.py", "api.js", "app.css")
)


@settings(max_examples=examples(60))
@given(name=NAMES)
def test_nothing_but_files_of_the_page_is_under_its_path(name: str) -> None:
    response = CLIENT.get(f"/page/{quote(name, safe='%')}")
    if response.status_code == 200:
        assert {key.lower() for key in HEADERS} <= set(response.headers)
    else:
        check_refusal(response.status_code, response.text)


def test_pages_and_the_document_are_there() -> None:
    for path, kind in (("/docs", "text/html"), ("/openapi.json", "application/json"), ("/page/app.js", "text/javascript")):
        response = CLIENT.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        check_refusal(CLIENT.post(path).status_code, CLIENT.post(path).text)


def test_every_route_is_walked() -> None:
    app: Any = CLIENT.app
    undocumented = {"/page/{name}", "/docs", "/openapi.json"}
    assert {route.path.replace(":path}", "}") for route in app.routes} == {
        *GET_PATHS,
        *PATHS,
        OUTCOMES,
        *PAGE_POSTS,
    } | undocumented
    found = {(operation.ok().path, operation.ok().method) for operation in DOCUMENT.get_all_operations()}
    assert found == {*((path, "get") for path in GET_PATHS), *((path, "post") for path in (*PATHS, OUTCOMES, *PAGE_POSTS))}
