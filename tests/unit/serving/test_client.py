"""The client of a running server: what goes in and out, and dmoa's own errors in place of statuses."""

from __future__ import annotations

import socket
from typing import Any

import httpx2
import pytest
from openai import DefaultAsyncHttpxClient

from dmoa.errors import DeadlineError, DmoaError, EmptyAnswerError, NoAgentError, RequestError
from dmoa.serving.client import RemoteReply, ServerClient, StepLine
from dmoa.serving.http.middleware import hash_keys
from dmoa.trace import ReplyDmoa
from dmoa.types import Message, TextDelta
from tests.unit.serving.fake_service import AGENTS, FakeService, make_app

HI = (Message(role="user", content="What is 12 + 7?"),)


def client_of(service: FakeService, *, api_key: str = "", **options: Any) -> ServerClient:
    """A client of an app over the service, without sockets."""
    transport = httpx2.ASGITransport(make_app(service, **options))
    return ServerClient("http://test/v1/", api_key=api_key, http_client=DefaultAsyncHttpxClient(transport=transport))


async def test_ask_returns_text_usage_and_a_dmoa_object_of_the_schema() -> None:
    service = FakeService()
    async with client_of(service) as client:
        reply = await client.chat(HI, dmoa={"max_steps": 2, "trace": True}, sampling={"temperature": 0.5, "max_tokens": 9})
    assert (reply.text, reply.finish_reason, reply.model) == ("The answer is 19.", "stop", "tiny")
    assert reply.usage["total_tokens"] == 70
    assert ReplyDmoa.model_validate(reply.dmoa).steps[1].summary == "19"
    query, policy, agent = service.asked[0]
    assert (query.limits.max_steps, query.sampling, policy, agent) == (2, {"temperature": 0.5, "max_tokens": 9}, "dmoa", None)


async def test_stream_gives_steps_and_pieces_as_they_come_then_the_same_reply() -> None:
    async with client_of(FakeService(deltas=("The answer ", "is 19."))) as client:
        whole = await client.chat(HI, model="tiny/single")
        events = [event async for event in client.stream(HI, model="tiny/single")]
    assert [type(event) for event in events] == [StepLine, TextDelta, TextDelta, StepLine, RemoteReply]
    reply = events[-1]
    assert isinstance(reply, RemoteReply)
    assert (reply.text, reply.finish_reason, reply.model, reply.usage) == (whole.text, "stop", "tiny/single", whole.usage)
    for told in (reply.dmoa, whole.dmoa):
        assert told.pop("trace_url").endswith(f"/#/query/{told.pop('trace_id')}")
    assert reply.dmoa == whole.dmoa


async def test_models_readiness_and_traces() -> None:
    service = FakeService()
    hashes = hash_keys({"DMOA_API_KEYS": "k"})
    async with client_of(service, api_key="k", keys=hashes) as client:
        assert await client.models() == ["tiny", "tiny/dmoa", "tiny/single", *AGENTS]
        assert await client.ready() == dict.fromkeys(AGENTS, "up")
        service.states = {"adder": "restarting"}
        assert await client.ready() == {"adder": "restarting"}
        reply = await client.chat(HI)
        assert (await client.trace(reply.dmoa["trace_id"]))["key_hash"] == hashes[0]
        with pytest.raises(RequestError, match="no trace of that id"):
            await client.trace("nope")


async def test_no_error_shows_the_clients_key() -> None:
    key = "Zq9/w+Tr_4kV=mB7x"
    async with client_of(FakeService(error=NoAgentError(f"no: {key}, {key[:9]}..., api_key: other")), api_key=key) as client:
        with pytest.raises(NoAgentError) as caught:
            await client.chat(HI)
    assert str(caught.value) == "http://test: no: [redacted], [redacted], api_key: [redacted]"


@pytest.mark.parametrize("error", [NoAgentError("all gone"), EmptyAnswerError("all empty"), DeadlineError("too late")])
@pytest.mark.parametrize("error_at", [0, 1])
async def test_the_swarms_errors_arrive_as_themselves(error: DmoaError, error_at: int) -> None:
    async with client_of(FakeService(error=error, error_at=error_at)) as client:
        with pytest.raises(type(error), match=f"http://test: {error}"):
            await client.chat(HI)
        with pytest.raises(type(error), match=f"http://test: {error}"):
            [event async for event in client.stream(HI)]


async def test_refusals_name_the_field() -> None:
    async with client_of(FakeService()) as client:
        with pytest.raises(RequestError) as caught:
            await client.chat(HI, dmoa={"policy": "nope"})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "dmoa.policy", "unknown_policy")


async def test_a_wrong_key_is_a_refusal() -> None:
    async with client_of(FakeService(), api_key="no", keys=hash_keys({"DMOA_API_KEYS": "k"})) as client:
        with pytest.raises(RequestError) as caught:
            await client.chat(HI)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


async def test_a_surprise_is_no_category() -> None:
    async with client_of(FakeService(error=KeyError("x"))) as client:
        with pytest.raises(DmoaError, match="unexpected error") as caught:
            await client.chat(HI)
    assert type(caught.value) is DmoaError


class Busy(httpx2.AsyncBaseTransport):
    """Refuses the first questions, and answers the others."""

    def __init__(self, inner: httpx2.AsyncBaseTransport, refusals: list[tuple[int, dict[str, str]]]) -> None:
        self._inner, self._refusals = inner, refusals

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST" and self._refusals:
            status, headers = self._refusals.pop(0)
            return httpx2.Response(status, headers=headers, json={"error": {"message": "busy", "code": None}}, request=request)
        return await self._inner.handle_async_request(request)


SOON = {"Retry-After": "0.01"}


@pytest.mark.parametrize(
    ("refusals", "patience_s", "waits", "left"),
    [
        ([(429, SOON), (429, {"retry-after-ms": "10"}), (503, SOON)], 60.0, 3, 0),
        ([(429, SOON)], 0.0, 0, 0),
        ([(429, {"Retry-After": "100"})], 60.0, 0, 0),  # longer than patience lasts
        ([(503, {})], 60.0, 0, 0),
        ([(429, SOON), (400, SOON), (429, SOON)], 60.0, 1, 1),
    ],
)
async def test_a_busy_server_is_asked_again_when_it_says(
    refusals: list[tuple[int, dict[str, str]]], patience_s: float, waits: int, left: int
) -> None:
    transport, is_answered = Busy(httpx2.ASGITransport(make_app(FakeService())), refusals), len(refusals) == waits
    http_client = DefaultAsyncHttpxClient(transport=transport)
    async with ServerClient("http://test/v1/", patience_s=patience_s, http_client=http_client) as client:
        if is_answered:
            assert (await client.chat(HI)).text == "The answer is 19."
        else:
            with pytest.raises(DmoaError, match="busy"):
                await client.chat(HI)
    assert (client.waits, len(refusals)) == (waits, left)


class Other(httpx2.AsyncBaseTransport):
    """A server that is no dmoa server: it gives one answer to everything."""

    def __init__(self, kind: str, content: bytes) -> None:
        self._kind, self._content = kind, content

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": self._kind}, content=self._content, request=request)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("text/html", b"<html>Sign in</html>"),
        ("application/json", b'{"hello": 1}'),
        ("application/json", b'{"object": "list", "data": [], "choices": []}'),
        ("application/json", b'{"data": [{"x": 1}]}'),
        ("application/json", b"[]"),
        ("application/json", b"{"),
    ],
)
async def test_an_answer_of_another_server_is_said_in_one_line(kind: str, content: bytes) -> None:
    http_client = DefaultAsyncHttpxClient(transport=Other(kind, content))
    async with ServerClient("http://test", http_client=http_client) as client:
        for ask in (client.pool(), client.chat(HI), client.chat(HI, model="tiny")):
            with pytest.raises(DmoaError, match=r"^http://test: its answer .*; is it a dmoa server, or a page before one"):
                await ask


class Slow(httpx2.AsyncBaseTransport):
    """A server that answers too late."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadTimeout("too late", request=request)


async def test_a_server_that_takes_too_long_is_not_said_to_be_away() -> None:
    http_client = DefaultAsyncHttpxClient(transport=Slow())
    async with ServerClient("http://test", timeout_s=5.0, http_client=http_client) as client:
        for ask in (client.chat(HI, model="tiny"), anext(client.stream(HI, model="tiny"))):
            with pytest.raises(DmoaError, match=r"^http://test: no answer within 5 s; ask for less, or set a deadline"):
                await ask


async def test_a_stream_that_breaks_off_is_no_answer() -> None:
    piece = b'data: {"id": "a", "model": "m", "choices": [{"index": 0, "delta": {"content": "The ans"}}]}\n\n'
    http_client = DefaultAsyncHttpxClient(transport=Other("text/event-stream", piece))
    async with ServerClient("http://test", http_client=http_client) as client:
        events = client.stream(HI, model="tiny")
        assert await anext(events) == TextDelta(text="The ans")
        with pytest.raises(DmoaError, match=r"^http://test: its stream broke off before the answer was whole"):
            await anext(events)


async def test_no_server_is_said_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with ServerClient(f"http://127.0.0.1:{taken.getsockname()[1]}") as client:
            with pytest.raises(DmoaError, match=r"cannot be reached .* is the server running there"):
                await client.chat(HI)
