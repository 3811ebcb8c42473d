"""Every error of the HTTP contract: its status, its error object, and that nothing else leaks."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from dmoa.errors import (
    AgentUnavailableError,
    DeadlineError,
    DmoaError,
    EmptyAnswerError,
    NoAgentError,
    RequestError,
    RoutingError,
)
from dmoa.serving.http.middleware import hash_keys
from tests.logged import Logged
from tests.unit.serving.fake_service import QUESTION, FakeService, connect, make_app, until

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "Hi"}


def check(response: httpx.Response, status: int, param: str | None, code: str | None) -> str:
    """Check an error object to the letter; return its message."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    return error["message"]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": QUESTION} | fields


def tool(name: str = "add", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


def deep(levels: int) -> dict[str, Any]:
    """A schema of so many objects in each other."""
    return {} if levels == 1 else {"not": deep(levels - 1)}


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({}, 400, "model", "missing_required_parameter"),
    ({"model": "tiny"}, 400, "messages", "missing_required_parameter"),
    (chat(n=9), 400, "n", "invalid_value"),
    (chat(n=True), 400, "n", "invalid_value"),
    (chat(tools=[{"type": "function"}]), 400, "tools[0].function", "missing_required_parameter"),
    (chat(tools=[{"type": "file_search"}]), 400, "tools[0].type", "invalid_value"),
    (chat(tools=[tool("a b")]), 400, "tools[0].function.name", "invalid_value"),
    (chat(tools=[tool(), tool()]), 400, "tools", "invalid_value"),
    (chat(tools=[tool(f"t{i}") for i in range(129)]), 400, "tools", "invalid_value"),
    (chat(tools=[tool(parameters=deep(66))]), 400, "tools[0].function.parameters", "invalid_value"),
    (chat(tool_choice="required"), 400, "tool_choice", "invalid_value"),
    (chat(tool_choice="any"), 400, "tool_choice", "invalid_value"),
    (chat(tools=[tool()], tool_choice=tool("other")), 400, "tool_choice", "invalid_value"),
    (chat(functions=[{}]), 400, "functions", "unsupported"),
    (chat(logprobs=1), 400, "logprobs", "invalid_value"),
    (chat(top_logprobs=3), 400, "top_logprobs", "invalid_value"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "invalid_value"),
    (chat(response_format={"type": "xml"}), 400, "response_format.type", "invalid_value"),
    (chat(response_format={"type": "json_schema"}), 400, "response_format.json_schema", "missing_required_parameter"),
    (chat(response_format=form(deep(66))), 400, "response_format.json_schema.schema", "invalid_value"),
    (chat(frequency_penalty=0.5), 400, "frequency_penalty", "unsupported"),
    (chat(logit_bias={"5": 1}), 400, "logit_bias", "unsupported"),
    (chat(modalities=["audio"]), 400, "modalities", "unsupported"),
    (chat(top_k=-2), 400, "top_k", "invalid_value"),
    (chat(min_p=2), 400, "min_p", "invalid_value"),
    (chat(repetition_penalty=0), 400, "repetition_penalty", "invalid_value"),
    (chat(chat_template_kwargs={"chat_template": "x"}), 400, "chat_template_kwargs.chat_template", "invalid_value"),
    (chat(chat_template_kwargs={"x": "<|im_end|>"}), 400, "chat_template_kwargs.x", "invalid_value"),
    (chat(chat_template_kwargs={f"x{i}": 1 for i in range(17)}), 400, "chat_template_kwargs", "invalid_value"),
    (chat(max_tokens=-2), 400, "max_tokens", "invalid_value"),
    (chat(dmoa=True), 400, "dmoa", "invalid_value"),
    (chat(temperature=2.1), 400, "temperature", "invalid_value"),
    (chat(temperature="hot"), 400, "temperature", "invalid_value"),
    (chat(temperature=10**400), 400, "temperature", "invalid_value"),
    (chat(top_p=0), 400, "top_p", "invalid_value"),
    (chat(top_p=1.1), 400, "top_p", "invalid_value"),
    (chat(max_tokens=0), 400, "max_tokens", "invalid_value"),
    (chat(max_completion_tokens=2**40), 400, "max_completion_tokens", "invalid_value"),
    (chat(max_tokens=5, max_completion_tokens=6), 400, "max_tokens", "invalid_value"),
    (chat(stop=["a"] * 65), 400, "stop", "invalid_value"),
    (chat(stop="a" * 257), 400, "stop", "invalid_value"),
    (chat(stop=["a", 1]), 400, "stop[1]", "invalid_value"),
    (chat(n=1.5), 400, "n", "invalid_value"),
    (chat(seed=2**63 - 1), 400, "seed", "invalid_value"),
    (chat(seed=1.5), 400, "seed", "invalid_value"),
    (chat(stream="yes"), 400, "stream", "invalid_value"),
    (chat(stream_options={"include_usage": True}), 400, "stream_options", "invalid_value"),
    (chat(metadata={"k": "v", "l" * 65: 1}), 400, f"metadata.{'l' * 65}", "invalid_value"),
    (chat(dmoa=[]), 400, "dmoa", "invalid_value"),
    (chat(dmoa={"max_step": 1}), 400, "dmoa.max_step", "unknown_parameter"),
    (chat(dmoa={"max_steps": 0}), 400, "dmoa.max_steps", "invalid_value"),
    (chat(dmoa={"max_agents": -1}), 400, "dmoa.max_agents", "invalid_value"),
    (chat(dmoa={"budget_tokens": 0}), 400, "dmoa.budget_tokens", "invalid_value"),
    (chat(dmoa={"deadline_s": 0}), 400, "dmoa.deadline_s", "invalid_value"),
    (chat(dmoa={"policy": "nope"}), 400, "dmoa.policy", "unknown_policy"),
    (chat(model="tiny/dmoa", dmoa={"policy": "single"}), 400, "dmoa.policy", "invalid_value"),
    (chat(model="adder", dmoa={"policy": "dmoa"}), 400, "dmoa.policy", "invalid_value"),
    (chat(model="gpt-4"), 404, "model", "model_not_found"),
    (chat(model="tiny/nope"), 404, "model", "model_not_found"),
    (chat(model=""), 404, "model", "model_not_found"),
    (chat(model=7), 400, "model", "invalid_value"),
    (chat(messages=[]), 400, "messages", "invalid_value"),
    (chat(messages="Hi"), 400, "messages", "invalid_value"),
    (chat(messages=["Hi"]), 400, "messages[0]", "invalid_value"),
    (chat(messages=[{"role": "user"}]), 400, "messages[0].content", "missing_required_parameter"),
    (chat(messages=[{"role": "user", "content": None}]), 400, "messages[0].content", "invalid_value"),
    (chat(messages=[{"role": "system"}, USER]), 400, "messages[0].content", "missing_required_parameter"),
    (chat(messages=[{"role": "system", "content": None}, USER]), 400, "messages[0].content", "invalid_value"),
    (chat(messages=[{"role": "user", "content": None}, USER]), 400, "messages[0].content", "invalid_value"),
    (chat(messages=[{"role": "user", "content": "Hi", "type": "image"}]), 400, "messages[0].type", "unsupported"),
    (chat(messages=[{"role": "user", "content": "Hi", "images": ["x"]}]), 400, "messages[0].images", "unsupported"),
    (chat(messages=[{"role": "user", "content": "  "}]), 400, "messages[0].content", "invalid_value"),
    (chat(messages=[{"role": "user", "content": []}]), 400, "messages[0].content", "invalid_value"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content[0].type",
        "unsupported",
    ),
    (chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages[0].role", "invalid_value"),
    (chat(messages=[USER, {"role": "tool", "content": None}]), 400, "messages[1].content", "invalid_value"),
    (chat(messages=[USER, {"role": "assistant", "content": "x"}]), 400, "messages[1].role", "invalid_value"),
    (chat(messages=[{"role": "system", "content": "x"}]), 400, "messages[0].role", "invalid_value"),
    (
        chat(messages=[USER, {"role": "assistant", "content": "x"}, {"role": "system", "content": "x"}]),
        400,
        "messages[1].role",
        "invalid_value",
    ),
    (
        chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}, USER]),
        400,
        "messages[0].tool_calls[0].function",
        "missing_required_parameter",
    ),
]


@pytest.mark.parametrize(("body", "status", "param", "code"), REFUSED, ids=lambda value: str(value)[:40])
async def test_chat_refuses_by_name(body: dict[str, Any], status: int, param: str, code: str) -> None:
    service = FakeService()
    async with connect(make_app(service)) as client:
        message = check(await client.post(CHAT, json=body), status, param, code)
    assert message.startswith(param)
    assert service.asked == []


async def test_a_message_names_field_value_seen_and_what_is_allowed() -> None:
    async with connect(make_app(FakeService())) as client:
        message = check(await client.post(CHAT, json=chat(temperature=3)), 400, "temperature", "invalid_value")
        assert message == "temperature is 3; expected a number less than or equal to 2"
        message = check(await client.post(CHAT, json=chat(logit_bias=2)), 400, "logit_bias", "unsupported")
        assert message == "logit_bias is 2, which is not supported; expected {}, null; leave the field out"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "model", "missing_required_parameter"),
        ({"model": "tiny"}, "prompt", "missing_required_parameter"),
        ({"model": "tiny", "prompt": ["a", "b"]}, "prompt", "invalid_value"),
        ({"model": "tiny", "prompt": []}, "prompt", "invalid_value"),
        ({"model": "tiny", "prompt": [1, 2]}, "prompt", "invalid_value"),
        ({"model": "tiny", "prompt": [1]}, "prompt[0]", "invalid_value"),
        ({"model": "tiny", "prompt": " "}, "prompt", "invalid_value"),
        ({"model": "tiny", "prompt": "x", "echo": True}, "echo", "unsupported"),
        ({"model": "tiny", "prompt": "x", "suffix": "y"}, "suffix", "unsupported"),
        ({"model": "tiny", "prompt": "x", "best_of": 2}, "best_of", "unsupported"),
        ({"model": "tiny", "prompt": "x", "logprobs": 1}, "logprobs", "unsupported"),
    ],
)
async def test_completions_refuse_by_name(body: dict[str, Any], param: str, code: str) -> None:
    async with connect(make_app(FakeService())) as client:
        check(await client.post("/v1/completions", json=body), 400, param, code)


async def test_harmless_openai_fields_are_accepted() -> None:
    body = chat(
        n=1, user="u", store=True, service_tier="auto", parallel_tool_calls=False, reasoning_effort="low", logprobs=False,
        verbosity="low", response_format={"type": "text"}, tools=[], tool_choice="auto", presence_penalty=0, top_p=None,
        frequency_penalty=0.0, prompt_cache_key="k", safety_identifier="s", modalities=["text"], logit_bias={},
    )  # fmt: skip
    async with connect(make_app(FakeService())) as client:
        assert (await client.post(CHAT, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"\x00", "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"model": "\\udbff', "invalid_json"),
        (b"\xef\xbb\xbf", "invalid_json"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "invalid_json"),
        (b'{"model": ' + b"[" * 10_000 + b"}", "invalid_json"),
        (b'{"a":' * 9000 + b"1" + b"}" * 9000, "invalid_json"),
        (b'{"seed": ' + b"9" * 50000 + b"}", "invalid_json"),
        (b"[]", "invalid_type"),
        (b"null", "invalid_type"),
        (b'"text"', "invalid_type"),
        (b"12", "invalid_type"),
    ],
    ids=lambda value: repr(value)[:24],
)
async def test_a_body_that_is_no_json_object(content: bytes, code: str) -> None:
    async with connect(make_app(FakeService())) as client:
        for path in (CHAT, "/v1/completions"):
            check(await client.post(path, content=content, headers=JSON), 400, None, code)


@pytest.mark.parametrize(
    ("number", "param"),
    [("NaN", "temperature"), ("Infinity", "temperature"), ("-Infinity", "temperature"), ("1e999", "temperature")],
)
async def test_numbers_that_are_none(number: str, param: str) -> None:
    body = json.dumps(chat(temperature=1)).replace('"temperature": 1', f'"temperature": {number}').encode()
    async with connect(make_app(FakeService())) as client:
        check(await client.post(CHAT, content=body, headers=JSON), 400, param, "invalid_value")


NUMBERS = ["NaN", "-Infinity", "1e999", "-1E+0400", "9" * 400 + ".0", "9" * 250 + "e99"]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda value: value[:8])
async def test_numbers_that_are_none_are_refused_where_any_value_may_stand(number: str) -> None:
    """They are no JSON: a reply that repeats them was a 500, after all agents had been asked."""
    service = FakeService()
    bodies: dict[str, dict[str, Any]] = {
        CHAT: chat(tools=[tool(parameters={"a": 1.5})]),
        "/v1/responses": {"model": "tiny", "input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": 1.5}}]},
        "/v1/completions": {"model": "tiny", "prompt": "x", "odd": 1.5},
    }
    async with connect(make_app(service)) as client:
        for path, body in bodies.items():
            sent = json.dumps(body).replace("1.5", number).encode()
            check(await client.post(path, content=sent, headers=JSON), 400, None, "invalid_json")
        assert service.asked == []
        texts = chat(messages=[{"role": "user", "content": " ".join(NUMBERS)}], temperature=1.0)
        assert (await client.post(CHAT, json=texts)).status_code == 200


@pytest.mark.parametrize("space", ["", "\n "], ids=["dense", "spaced"])
async def test_a_body_of_very_many_messages_is_refused_before_it_is_read(space: str) -> None:
    """A body of 14 MB could hold a million: half a minute of one process, in which it answers nobody."""
    many = json.dumps(chat(messages=[USER] * 20_001)).replace('{"', "{" + space + '"')
    parts = chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 20_000}])
    text = chat(messages=[{"role": "user", "content": '{"a": 1}{}[\\' * 30_000}])
    async with connect(make_app(FakeService(), max_body_bytes=2**22)) as client:
        for body in (many, json.dumps(parts), '{"model": "dmoa", "metadata": [' + "{}," * 20_001 + "{}]}"):
            message = check(await client.post(CHAT, content=body, headers=JSON), 400, None, "request_too_large")
            assert "JSON objects; expected at most 20000" in message
        lists = '{"model": "dmoa", "metadata": "[{}", "user": ' + "[" * 20_001
        message = check(await client.post(CHAT, content=lists, headers=JSON), 400, None, "request_too_large")
        assert message.startswith("body: 20001 JSON lists;")
        assert (await client.post(CHAT, json=text)).status_code == 200, "objects within a text are none of the body"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "\u00ff", ""])
async def test_another_content_type_is_refused(content_type: str) -> None:
    headers = {"content-type": content_type.encode("latin-1")}
    async with connect(make_app(FakeService())) as client:
        response = await client.post(CHAT, content=json.dumps(chat()).encode(), headers=headers)
        check(response, 400, None, "unsupported_content_type")
        charset = {"content-type": "application/json; charset=utf-8"}
        assert (await client.post(CHAT, content=json.dumps(chat()).encode(), headers=charset)).status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "GZIP", "identity, gzip"])
async def test_a_packed_body_is_told_so(coding: str) -> None:
    service = FakeService()
    async with connect(make_app(service, admins=hash_keys({"DMOA_API_KEYS": "a"})), authorization="Bearer a") as client:
        for path in (
            *(CHAT, "/v1/completions", "/v1/responses", "/v1/dmoa/outcomes", "/v1/dmoa/gates/rollback"),
            *("/v1/dmoa/traces/x/what-if", "/v1/dmoa/traces/x/branch"),
        ):
            response = await client.post(path, content=b"\x1f\x8b", headers=JSON | {"content-encoding": coding})
            message = check(response, 415, None, "unsupported_content_encoding")
            assert message.startswith(f"Content-Encoding is {coding!r}; expected identity")
            assert response.headers["accept-encoding"] == "identity"
        assert (await client.post(CHAT, json=chat(), headers={"content-encoding": "Identity"})).status_code == 200
    assert len(service.asked) == 1


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (NoAgentError("no agent of the pool answered"), 503, None, "no_agent"),
        (AgentUnavailableError("the host restarts"), 503, None, "no_agent"),
        (EmptyAnswerError("every contribution was empty"), 503, None, "empty_answer"),
        (DeadlineError("the deadline of 1 s passed"), 504, None, "deadline_exceeded"),
        (RequestError("messages: too long", param="messages", code="too_long"), 400, "messages", "too_long"),
    ],
)
async def test_what_the_swarm_cannot_do(error: DmoaError, status: int, param: str, code: str, is_stream: bool) -> None:
    async with connect(make_app(FakeService(error=error))) as client:
        assert check(await client.post(CHAT, json=chat(stream=is_stream)), status, param, code) == str(error)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_empty_answer_is_never_a_success(is_stream: bool) -> None:
    async with connect(make_app(FakeService(overrides={"text": " \n", "steps": ()}))) as client:
        check(await client.post(CHAT, json=chat(stream=is_stream)), 503, None, "empty_answer")


async def test_an_empty_answer_after_steps_is_an_error_event() -> None:
    async with connect(make_app(FakeService(overrides={"text": ""}))) as client:
        response = await client.post(CHAT, json=chat(stream=True))
    *_, last, done, end = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "empty_answer"
    assert (done, end) == ("data: [DONE]", "")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (NoAgentError("all gone"), "no_agent", "all gone"),
        (ZeroDivisionError("secret"), "internal_error", "unexpected error"),
        (RoutingError("secret"), "internal_error", "its log has the details"),
    ],
)
async def test_an_error_in_mid_stream_is_an_event_then_done(error: Exception, code: str, text: str, logged: Logged) -> None:
    service = FakeService(error=error, error_at=1)
    async with connect(make_app(service)) as client:
        response = await client.post(CHAT, json=chat(stream=True))
    assert response.status_code == 200
    *_, last, done, end = response.text.split("\n\n")
    found = json.loads(last.removeprefix("data: "))["error"]
    assert found["code"] == code
    assert text in found["message"]
    assert (done, end) == ("data: [DONE]", "")
    assert "secret" not in response.text
    assert ("secret" in logged.text) == (code == "internal_error")

    transport = httpx.ASGITransport(make_app(service))
    official = AsyncOpenAI(base_url="http://test/v1", api_key="k", http_client=httpx.AsyncClient(transport=transport))
    stream = await official.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
    with pytest.raises(openai.APIError) as caught:
        [chunk async for chunk in stream]
    assert caught.value.code == code
    await official.close()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_surprise_is_a_generic_500_with_its_details_in_the_log(is_stream: bool, logged: Logged) -> None:
    async with connect(make_app(FakeService(error=KeyError("secret")))) as client:
        response = await client.post(CHAT, json=chat(stream=is_stream))
    message = check(response, 500, None, "internal_error")
    assert "secret" not in message
    assert "Traceback" not in message
    assert [record.levelno for record in logged.records if record.name.startswith("dmoa")] == [logging.ERROR]
    assert "secret" in logged.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/v1/chat", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions/", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes(method: str, path: str, status: int, code: str) -> None:
    async with connect(make_app(FakeService())) as client:
        response = await client.request(method, path)
        check(response, status, None, code)
        assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("method", "path", "way"),
    [
        ("GET", "/v1/responses", "not a method of this path; use POST"),
        ("POST", "/responses/", "use POST /v1/responses (the base URL of a client ends in /v1)"),
        ("POST", "/chat/completions", "use POST /v1/chat/completions (the base URL of a client ends in /v1)"),
        ("POST", "/completions", "use POST /v1/completions (the base URL of a client ends in /v1)"),
        ("GET", "/models", "use GET /v1/models (the base URL of a client ends in /v1)"),
        ("POST", "/v1/v1/chat/completions", "use POST /v1/chat/completions"),
        ("POST", "/openai/deployments/tiny/chat/completions", "use POST /v1/chat/completions (the base URL"),
        ("POST", "/v1/chat", "use POST /v1/chat/completions"),
        ("POST", "/v1/chat/completion", "use POST /v1/chat/completions"),
        ("GET", "/v1/model", "use GET /v1/models"),
        ("GET", "/health", "use GET /healthz"),
        ("GET", "/ready", "use GET /readyz"),
        ("GET", "/dmoa/traces", "use GET /v1/dmoa/traces (the base URL of a client ends in /v1)"),
        (
            "POST",
            "/v1/embeddings",
            "its paths: POST /v1/chat/completions, POST /v1/completions, POST /v1/responses, GET /v1/models, ",
        ),
        ("GET", "/quite/another", "its paths: POST /v1/chat/completions, "),
        ("GET", CHAT, "not a method of this path; use POST"),
        ("POST", "/healthz", "not a method of this path; use GET"),
    ],
)
async def test_an_unknown_route_is_told_the_right_one(method: str, path: str, way: str) -> None:
    async with connect(make_app(FakeService())) as client:
        response = await client.request(method, path)
    assert response.status_code in (404, 405)
    assert way in response.json()["error"]["message"]


async def test_what_is_not_supported_yet_names_the_way() -> None:
    async with connect(make_app(FakeService())) as client:
        for field, value, way in (
            ("functions", [{"name": "f"}], "send tools and tool_choice"),
            ("function_call", "f", "send tools and tool_choice"),
        ):
            message = check(await client.post(CHAT, json=chat(**{field: value})), 400, field, "unsupported")
            assert message.endswith(way)


@pytest.mark.parametrize(
    "path", ["/v1/models/gpt-4", "/v1/models/gpt-4/", "/v1/models/tiny/nope", "/v1/models/tiny%2Fnope", "/v1/models/%ff"]
)
async def test_unknown_model_of_the_list(path: str) -> None:
    async with connect(make_app(FakeService())) as client:
        check(await client.get(path), 404, "model", "model_not_found")


async def test_unknown_trace() -> None:
    async with connect(make_app(FakeService())) as client:
        check(await client.get("/v1/dmoa/traces/nope"), 404, "trace_id", "trace_not_found")


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Bearer", "right", "Basic right", "Bearer rightx", "bearer \u00ff"]
)
async def test_without_a_known_key_nothing_but_the_probes_answers(header: str | None) -> None:
    service = FakeService()
    headers = {"authorization": header.encode("latin-1")} if header is not None else {}
    async with connect(make_app(service, keys=hash_keys({"DMOA_API_KEYS": "right,other"}))) as client:
        for method, path in (
            ("POST", CHAT),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/nope"),
            ("GET", "/openapi.json"),
        ):
            response = await client.request(method, path, headers=headers)
            message = check(response, 401, None, "invalid_api_key")
            assert "right" not in message
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path, headers=headers)).status_code == 200
    assert service.asked == []


@pytest.mark.parametrize("key", ["right", "other"])
async def test_every_known_key_opens(key: str) -> None:
    keys = hash_keys({"DMOA_API_KEYS": "right,other"})
    async with connect(make_app(FakeService(), keys=keys), authorization=f"bearer {key}") as client:
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_a_body_over_the_limit_is_refused_declared_or_not() -> None:
    limit = 2000
    service = FakeService()
    body = json.dumps(chat(messages=[{"role": "user", "content": "x" * limit}])).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for i in range(0, len(body), 100):
            yield body[i : i + 100]

    async with connect(make_app(service, max_body_bytes=limit)) as client:
        check(await client.post(CHAT, content=body, headers=JSON), 413, None, "request_too_large")
        check(await client.post(CHAT, content=pieces(), headers=JSON), 413, None, "request_too_large")
        lying = {**JSON, "content-length": "9" * 5000}
        check(await client.post(CHAT, content=body, headers=lying), 413, None, "request_too_large")
        assert service.asked == []
        exact = json.dumps(chat()).encode()
        exact += b" " * (limit - len(exact))
        assert (await client.post(CHAT, content=exact, headers=JSON)).status_code == 200
        check(await client.post(CHAT, content=exact + b" ", headers=JSON), 413, None, "request_too_large")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_one_query_more_than_the_places_is_429(is_stream: bool) -> None:
    service = FakeService(hold_at=0)
    async with connect(make_app(service, queued=2)) as client:
        held = [asyncio.create_task(client.post(CHAT, json=chat(stream=is_stream))) for _ in range(2)]
        await until(lambda: service.running == 2)
        response = await client.post(CHAT, json=chat(stream=is_stream))
        check(response, 429, None, "too_many_requests")
        assert int(response.headers["retry-after"]) >= 1
        service.release.set()
        assert [(await task).status_code for task in held] == [200, 200]
        assert (await client.post(CHAT, json=chat(stream=is_stream))).status_code == 200
    assert service.running == 0


async def test_a_failed_query_gives_its_place_back() -> None:
    async with connect(make_app(FakeService(error=NoAgentError("gone")), queued=1)) as client:
        for is_stream in (False, True, False, True):
            check(await client.post(CHAT, json=chat(stream=is_stream)), 503, None, "no_agent")
