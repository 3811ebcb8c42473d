"""What a server passes over, names and lets browsers do: unknown fields, hints to engines, `dmoa: false`, CORS, /docs."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import pytest

from dmoa.errors import NoAgentError, RequestError
from dmoa.serving.http.fields import MAX_VALUES
from dmoa.serving.http.middleware import hash_keys
from dmoa.serving.http.requests import ChatRequest, chat_order, parse_body
from dmoa.serving.http.responses import IGNORED_HEADER
from tests.logged import Logged
from tests.unit.serving.fake_service import QUESTION, FakeService, connect, make_app

CHAT = "/v1/chat/completions"
HINTS = frozenset({"top_k", "min_p", "repetition_penalty", "template"})
ASKED: dict[str, Any] = {"model": "tiny", "messages": QUESTION}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vllm_xargs": {"id": 1}, "temprature": 1}, ["vllm_xargs", "temprature"]),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, ["stream_options.continuous_usage_stats"]),
        ({"messages": [{"role": "user", "content": "Hi", "cached": 1}]}, ["messages[0].cached"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "id": 3}]}]}, ["messages[0].content[0].id"]),
        ({"messages": [{"role": "assistant", "content": "x", "more": 1}, *QUESTION]}, []),
        (
            {"top_k": 5, "enable_thinking": False, "skip_special_tokens": True},
            ["top_k", "enable_thinking", "skip_special_tokens"],
        ),
        ({"reasoning_effort": "low", "verbosity": "low"}, ["reasoning_effort", "verbosity"]),
        ({"prediction": {"type": "content", "content": "19"}}, ["prediction"]),
        ({"max_tokens": -1, "top_k": None, "metadata": {"a": [1]}}, []),
        ({"dmoa": {"max_agents": 1}}, []),
        ({"dmoa": {"max_agents": 1, "epsilon": 0.5, "policy": "single"}}, ["dmoa.max_agents", "dmoa.epsilon"]),
        ({"dmoa": {"epsilon": 0.5}}, ["dmoa.epsilon"]),
        ({"model": "adder", "dmoa": {"max_agents": 1}}, ["dmoa.max_agents"]),
    ],
)
async def test_what_is_passed_over_is_named(fields: dict[str, Any], named: list[str]) -> None:
    is_stream = "stream_options" in fields
    async with connect(make_app(FakeService())) as client:
        response = await client.post(CHAT, json=ASKED | {"stream": is_stream} | fields)
    assert response.status_code == 200, response.text
    assert response.headers.get("x-dmoa-ignored", "") == ", ".join(named)
    if not is_stream:
        assert response.json()["dmoa"].get("ignored", []) == named


@pytest.mark.parametrize(("path", "asked"), [(CHAT, ASKED), ("/v1/responses", {"model": "tiny", "input": "Hi"})])
@pytest.mark.parametrize(("fields", "is_stored"), [({"store": False}, False), ({"store": None}, True), ({}, True)])
async def test_a_client_may_forbid_to_keep_its_query(path: str, asked: dict[str, Any], fields: Any, is_stored: bool) -> None:
    service, lost = FakeService(), FakeService(error=NoAgentError("all are gone"))
    async with connect(make_app(service)) as client:
        response = await client.post(path, json=asked | fields)
    assert response.status_code == 200, response.text
    assert service.stored == [is_stored]
    assert ("/#/query/" in response.text) is is_stored
    async with connect(make_app(lost)) as client:
        assert (await client.post(path, json=asked | fields)).status_code == 503
    assert [summary.question == "(not stored)" for summary in lost.page.failures] == [not is_stored]


async def test_a_field_is_named_in_the_log_once_and_its_value_never(logged: Logged) -> None:
    async with connect(make_app(FakeService())) as client:
        for _ in range(3):
            await client.post(CHAT, json=ASKED | {"odd\nfield": "hunter2"})
    told = [record.message for record in logged.records if record.name == "dmoa.http"]
    assert told == [r"request field 'odd\nfield' is not known here and is passed over (server.unknown_fields is warn)"]
    assert logged.records[0].levelno == logging.WARNING
    assert "hunter2" not in logged.text


@pytest.mark.parametrize(
    ("fields", "param", "advice"),
    [
        ({"vllm_xargs": {"id": 1}}, "vllm_xargs", "check its spelling"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"messages": [{"role": "user", "content": "Hi", "contnet": "x"}]}, "messages[0].contnet", "did you mean 'content'?"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more", "check its spelling"),
    ],
)
async def test_a_strict_server_refuses_unknown_fields(fields: dict[str, Any], param: str, advice: str) -> None:
    async with connect(make_app(FakeService(), unknown_fields="refuse")) as client:
        error = (await client.post(CHAT, json=ASKED | fields)).json()["error"]
        assert (await client.post(CHAT, json=ASKED | {"top_k": 5})).status_code == 200
    assert (error["param"], error["code"]) == (param, "unknown_parameter")
    assert advice in error["message"]


async def test_hints_reach_the_swarm_as_sampling() -> None:
    service = FakeService(abilities=HINTS)
    body = ASKED | {"top_k": 20.0, "min_p": 0.1, "repetition_penalty": 1.1, "max_tokens": -1, "enable_thinking": False}
    async with connect(make_app(service)) as client:
        response = await client.post(CHAT, json=body | {"chat_template_kwargs": {"reasoning_effort": "low"}})
        assert "x-dmoa-ignored" not in response.headers
        await client.post(CHAT, json=ASKED | {"top_p": 1, "top_k": -1, "min_p": 0, "chat_template_kwargs": {}})
        await client.post(CHAT, json=ASKED | {"top_k": 0})
    assert [query.sampling for query, *_ in service.asked] == [
        {
            "top_k": 20,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "template": (("reasoning_effort", "low"), ("enable_thinking", False)),
        },
        {"top_p": 1.0, "top_k": -1, "min_p": 0.0},
        {"top_k": -1},
    ]


async def test_metadata_that_is_no_text_is_kept_as_json() -> None:
    service = FakeService()
    async with connect(make_app(service)) as client:
        await client.post(CHAT, json=ASKED | {"metadata": {"run": 7, "tags": ["a"], "none": None, "long": "x" * 600}})
    assert service.recorded[0]["metadata"] == {"run": "7", "tags": '["a"]', "none": "null", "long": "x" * 512}


@pytest.mark.parametrize("is_stream", [False, True])
async def test_dmoa_false_leaves_the_object_out(is_stream: bool) -> None:
    async with connect(make_app(FakeService())) as client:
        response = await client.post(CHAT, json=ASKED | {"dmoa": False, "stream": is_stream})
        plain = await client.post("/v1/completions", json={"model": "tiny", "prompt": "1", "dmoa": False, "stream": is_stream})
        made = await client.post("/v1/responses", json={"model": "tiny", "input": "1", "dmoa": False, "stream": is_stream})
    assert [found.status_code for found in (response, plain, made)] == [200, 200, 200], made.text
    assert "dmoa" not in response.text + plain.text + made.text
    assert "The answer is 19." in response.text


@pytest.mark.parametrize(("num_fields", "status"), [(20, 200), (MAX_VALUES - 10, 200), (MAX_VALUES + 10, 400), (1_400_000, 400)])
async def test_a_body_of_very_many_fields_is_refused_before_it_is_read(num_fields: int, status: int) -> None:
    fields = ",".join(f'"k{number}":0' for number in range(num_fields))
    words = "a, b, c, " * 20_000 if num_fields < MAX_VALUES else "hi"  # commas of a text are none
    body = f'{{"model":"tiny","messages":[{{"role":"user","content":"{words}"}}],{fields}}}'.encode()
    started_s = time.thread_time()
    async with connect(make_app(FakeService(), max_body_bytes=2**25)) as client:
        response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert time.thread_time() - started_s < 1.5  # more than five where all were read
    assert response.status_code == status
    if status == 200:
        assert response.json()["dmoa"]["ignored"] == [f"k{number}" for number in range(16)]
    else:
        assert response.json()["error"]["code"] == "request_too_large"
        assert "JSON commas between values; expected at most 100000" in response.json()["error"]["message"]


def test_an_order_names_no_more_fields_than_a_reply() -> None:
    asked = ASKED | {f"k{number}": 0 for number in range(1000)} | {"verbosity": "low"}
    order = chat_order(parse_body(ChatRequest, json.dumps(asked).encode(), "application/json"), FakeService())
    assert order.ignored == tuple(f"k{number}" for number in range(16))


async def test_images_are_refused_by_that_word() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    async with connect(make_app(FakeService())) as client:
        error = (await client.post(CHAT, json=ASKED | {"messages": [{"role": "user", "content": parts}]})).json()["error"]
    assert (error["param"], error["code"]) == ("messages[0].content[0].type", "unsupported")
    assert error["message"].endswith("images are not supported")


async def test_pages_of_named_origins_may_ask() -> None:
    keys, asks = hash_keys({"DMOA_API_KEYS": "one"}), {"access-control-request-method": "POST"}
    app = make_app(FakeService(), keys=keys, cors_origins=("https://app.example",))
    async with connect(app) as client:
        good = await client.options(CHAT, headers={"origin": "https://app.example", **asks})
        bad = await client.options(CHAT, headers={"origin": "https://evil.example", **asks})
        answered = await client.post(CHAT, json=ASKED, headers={"origin": "https://app.example", "authorization": "Bearer one"})
        refused = await client.post(CHAT, json=ASKED, headers={"origin": "https://app.example"})
    assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, "https://app.example")
    assert "access-control-allow-origin" not in bad.headers
    assert (
        answered.headers["access-control-allow-origin"] == refused.headers["access-control-allow-origin"] == "https://app.example"
    )
    assert (answered.status_code, refused.status_code) == (200, 401)
    shown = answered.headers["access-control-expose-headers"].split(", ")
    broken = make_app(FakeService(error=KeyError("odd")), keys=keys, cors_origins=("https://app.example",))
    async with connect(broken) as client:
        surprise = await client.post(CHAT, json=ASKED, headers={"origin": "https://app.example", "authorization": "Bearer one"})
    assert (surprise.status_code, surprise.json()["error"]["code"]) == (500, "internal_error")
    assert surprise.headers["access-control-allow-origin"] == "https://app.example"
    assert {"x-request-id", IGNORED_HEADER, "retry-after"} <= set(shown)


async def test_no_page_may_ask_by_default() -> None:
    async with connect(make_app(FakeService())) as client:
        response = await client.post(CHAT, json=ASKED, headers={"origin": "https://app.example"})
    assert "access-control-allow-origin" not in response.headers


async def test_the_docs_load_nothing_from_elsewhere() -> None:
    async with connect(make_app(FakeService(), keys=hash_keys({"DMOA_API_KEYS": "one"}))) as client:
        response = await client.get("/docs")
        assert (await client.get("/redoc", headers={"authorization": "Bearer one"})).status_code == 404
    assert response.headers["content-type"].startswith("text/html")
    assert "POST /v1/chat/completions" in response.text
    assert not any(word in response.text for word in ("<script", "src=", "href=", "url(", "@import"))


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (
            RequestError("it is not JSON; it says Mr SMITH", param="response_format", code="bad", status=422),
            "RequestError (bad)",
        ),
        (NoAgentError("openai:m: it answered with status 400: messages: 'Mr SMITH has X'"), "NoAgentError"),
    ],
)
async def test_of_a_lost_query_that_may_not_be_kept_no_words_are(error: Exception, kept: str) -> None:
    service = FakeService(error=error)
    async with connect(make_app(service)) as client:
        for store in (False, True):
            assert "SMITH" in (await client.post(CHAT, json=ASKED | {"store": store})).text
    assert [one.error == kept for one in service.page.failures] == [True, False]
