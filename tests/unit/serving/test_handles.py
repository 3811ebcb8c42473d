"""Calls within one request: each has an id of its own in Serve's books, and ends with whoever waits for it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import pickle
import warnings
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    # Ray 2.60's own, with this pydantic.
    warnings.filterwarnings("ignore", message="Using extra keyword arguments", category=DeprecationWarning)
    from ray.exceptions import RayActorError
    from ray.serve import context
    from ray.serve._private import replica
    from ray.serve._private.common import StreamingHTTPRequest
    from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

    from dmoa.serving.app import _ask_ingress

from dmoa.errors import AgentUnavailableError, PoolChangedError
from dmoa.serving.agent_client import ServeAgentClient
from dmoa.serving.encoder import ServeEncoder
from dmoa.serving.handles import CarriedBody, ask, take_carried_bodies
from dmoa.serving.http.front import BODY
from dmoa.types import AgentCall, Limits, Query, Sampling
from tests.unit.serving.fake_service import until

QUERY = Query(trace_id="t", text="Who?", limits=Limits(max_steps=1, deadline_s=0.05))


class Books:
    """What Serve's router is told of calls; every one of them is lost."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def assign_request(self, metadata: Any, *_: Any, **__: Any) -> concurrent.futures.Future[Any]:
        """Note a call."""
        self.calls.append(metadata)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_exception(RayActorError())
        return future


@pytest.fixture
def request_context() -> Iterator[Any]:
    found = context._RequestContext(route="/", request_id="the client's", _internal_request_id="the request's", app_name="dmoa")
    token = context._serve_request_context.set(found)
    yield found
    context._serve_request_context.reset(token)


def handle_of(books: Books) -> Any:
    counter = SimpleNamespace(inc=lambda **_: None)
    options = SimpleNamespace(_source=None, _run_router_in_separate_loop=True)
    return DeploymentHandle("llm", "dmoa", init_options=options, _router=books, _request_counter=counter)


async def test_calls_of_one_request_have_ids_of_their_own(request_context: Any) -> None:
    books = Books()
    handle = handle_of(books)
    agents = ServeAgentClient({"a": handle, "b": handle}, "v", affine="ab")
    calls = [AgentCall(trace_id="t", step=0, agent=name, messages=(), sampling=Sampling(), conversation="c") for name in "ab"]
    asked = [*(agents.call(call) for call in calls), *(anext(agents.stream(call)) for call in calls)]  # type: ignore[call-overload]
    asked += [agents.ping("a"), agents.ping("b"), ServeEncoder(handle).embed(["x"])]
    for work in asked:
        with pytest.raises(AgentUnavailableError):
            await work
    with pytest.raises(PoolChangedError):
        await anext(_ask_ingress(handle.options(method_name="answer_here", stream=True), QUERY, "dmoa", None))
    assert [call.call_method for call in books.calls] == [*["call"] * 2, *["stream"] * 2, *["ping"] * 2, "embed", "answer_here"]
    ids = [call.internal_request_id for call in books.calls]
    assert len(set(ids)) == len(ids)
    assert "the request's" not in ids
    # Logs still tell whose call it was, a conversation still has one replica, and the request is as it was.
    assert {call.request_id for call in books.calls} == {"the client's"}
    assert {call.session_id for call in books.calls[:4]} == {"c"}
    assert context._get_serve_request_context() == request_context


class Running:
    """A replica's answer that never comes, and that can be cancelled."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        """Note it."""
        self.is_cancelled = True

    async def get_async(self) -> Any:
        """Wait for good."""
        await asyncio.Event().wait()


class Answering:
    """A handle whose calls all get one response."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.embed = self

    def remote(self, *_: Any) -> Any:
        """Return the response."""
        return self._response


def response_of(result: Any = None, kind: type[Any] = DeploymentResponse) -> Any:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    if result is not None:
        future.set_result(result)
    return kind(future, SimpleNamespace(request_id="r"))


def test_a_call_is_taken_once_a_replica_has_accepted_it() -> None:
    assert ask(Answering(response_of(Running()))).is_taken()
    sent = ask(Answering(response_of()))
    assert not sent.is_taken()
    # Serve's books, as kept where the call goes to a replica: refused there it comes out of them again.
    context._add_in_flight_request(sent.call_id, "a replica's", Running())
    assert sent.is_taken()
    context._remove_in_flight_request(sent.call_id, "a replica's")
    assert not sent.is_taken()


async def test_nobody_waits_for_an_embedding_any_more() -> None:
    running = Running()
    task = asyncio.create_task(ServeEncoder(Answering(response_of(running))).embed(["x"]))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    await until(lambda: running.is_cancelled)


async def test_short_texts_do_not_wait_for_long_ones() -> None:
    asked: list[list[str]] = []

    class Encoder:
        def __init__(self) -> None:
            self.embed = self

        def remote(self, texts: list[str]) -> Any:
            asked.append(texts)
            return response_of(Done([np.float32([len(texts[0])])]) if texts == ["Hi"] else Running())

    encoder = ServeEncoder(Encoder())  # type: ignore[arg-type]
    waiting = []
    for letter in "abcd":  # more than there are places
        waiting.append(asyncio.create_task(encoder.embed([letter * 500_000])))
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        assert (await encoder.embed(["Hi"]))[0][0] == 2.0
    assert len(asked) == 3
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_texts_that_come_while_the_encoder_works_are_asked_for_together() -> None:
    asked: list[list[str]] = []
    ends: list[concurrent.futures.Future[Any]] = []

    class Encoder:
        def __init__(self) -> None:
            self.embed = self

        def remote(self, texts: list[str]) -> Any:
            asked.append(texts)
            ends.append(concurrent.futures.Future())
            return DeploymentResponse(ends[-1], SimpleNamespace(request_id="r"))

    encoder = ServeEncoder(Encoder())  # type: ignore[arg-type]
    waiting = [asyncio.create_task(encoder.embed([text])) for text in "ab"]
    await until(lambda: len(asked) == 1)  # both were there before the first call left
    for text in ("c", "de", "ec"):
        waiting.append(asyncio.create_task(encoder.embed(list(text))))
        await until(lambda: len(asked) == 2)
    gone = asyncio.create_task(encoder.embed(["f"]))
    await asyncio.sleep(0)
    gone.cancel()
    for number in (0, 1, 2):
        await until(lambda number=number: len(asked) > number)  # type: ignore[misc]
        ends[number].set_result(Done([np.float32([ord(text)]) for text in asked[number]]))
    assert asked[:2] == [["a", "b"], ["c"]]
    assert sorted(asked[2]) == ["c", "d", "e", "f"], "as many as came meanwhile, and each of them once"
    assert [[float(row[0]) for row in rows] for rows in await asyncio.gather(*waiting)] == [
        [97],
        [98],
        [99],
        [100, 101],
        [101, 99],
    ]
    assert [float(row[0]) for row in await encoder.embed(["d"])] == [100]
    assert len(asked) == 3


def test_texts_may_come_from_one_event_loop_after_the_other() -> None:
    class Encoder:
        def __init__(self) -> None:
            self.embed = self

        def remote(self, texts: list[str]) -> Any:
            return response_of(Done([np.float32([ord(text)]) for text in texts]))

    encoder = ServeEncoder(Encoder())  # type: ignore[arg-type]

    async def some(texts: str) -> list[float]:
        async def one(number: int, text: str) -> float:
            for _ in range(number):  # each in a call of its own, so that some wait for a place
                await asyncio.sleep(0)
            return float((await encoder.embed([text]))[0][0])

        return await asyncio.gather(*(one(number, text) for number, text in enumerate(texts)))

    for texts in ("abcdefgh", "ijklmnop"):
        assert asyncio.run(some(texts)) == [ord(text) for text in texts]


class Done:
    """A replica's answer that is there."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    async def get_async(self) -> Any:
        """Return it."""
        return self._rows


async def test_a_query_that_no_ingress_takes_begins_again() -> None:
    response = response_of(kind=DeploymentResponseGenerator)
    with pytest.raises(PoolChangedError, match="no ingress took the query"):
        async with asyncio.timeout(5):
            await anext(_ask_ingress(Answering(response), QUERY, "dmoa", None))
    assert response.cancelled()


@pytest.mark.parametrize("body", [b"{}", b"", None])
async def test_a_body_that_the_request_brings_along_is_not_asked_for(body: bytes | None) -> None:
    asked: list[Any] = []

    async def proxys(metadata: Any) -> bytes:
        asked.append(metadata)
        return pickle.dumps([{"type": "http.request", "body": b"far", "more_body": False}, {"type": "http.disconnect"}])

    scope = {"type": "http", "path": "/"} | ({} if body is None else {BODY: body})
    receive = CarriedBody(scope, "metadata", proxys)
    fetching = asyncio.create_task(receive.fetch_until_disconnect())
    found = await receive()
    assert (found["body"], asked) == ((b"far", ["metadata"]) if body is None else (body, []))
    await fetching
    assert BODY not in scope
    if body is None:
        assert (await receive())["type"] == "http.disconnect"


async def test_the_proxy_is_looked_up_only_by_who_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []

    class Proxy:
        class receive_asgi_messages:  # noqa: N801 -- as a handle has its methods
            @staticmethod
            async def remote(metadata: Any) -> bytes:
                return bytes(metadata)

    def get_actor(name: str, namespace: str) -> Any:
        looked_up.append(name)
        return Proxy()

    their_own, their_class = StreamingHTTPRequest.receive_asgi_messages, replica.ASGIReceiveProxy
    monkeypatch.setattr("ray.get_actor", get_actor)
    take_carried_bodies()
    try:
        ask_proxy = StreamingHTTPRequest({"type": "http"}, proxy_actor_name="proxy").receive_asgi_messages
        assert (looked_up, replica.ASGIReceiveProxy) == ([], CarriedBody)
        assert (await ask_proxy(b"for me"), looked_up) == (b"for me", ["proxy"])
    finally:
        StreamingHTTPRequest.receive_asgi_messages, replica.ASGIReceiveProxy = their_own, their_class
