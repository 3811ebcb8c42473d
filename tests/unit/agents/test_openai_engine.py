"""The openai engine against an endpoint on a real socket: texts, tokens, entropies, deadlines, cancelling, closing."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import math
import time
from dataclasses import replace
from typing import Any

import pytest

from dmoa.agents.agent import Agent
from dmoa.config import AgentConfig
from dmoa.core.aggregate import doubt
from dmoa.engine_options import OpenaiOptions
from dmoa.engines.openai import OpenaiEngine
from dmoa.errors import DeadlineError, EngineError
from dmoa.types import AgentCall, AgentReply, EntropySum, Generation, GenerationRequest, Message, Sampling, TextDelta
from tests.logged import Logged
from tests.unit.agents.openai_server import (
    USAGE,
    Call,
    FakeEndpoint,
    answer,
    content,
    event_bytes,
    opening,
    playing,
    request,
    row,
    stall,
    until,
)

LOG2 = math.log(2)
ROWS = [row("The ", 0.5, 0.25), row("19", 1.0), row(".", 0.5, 0.5)]
"""Under a vocabulary of ten: the first token between 1.5 log 2 and that + log(8) / 4, the others known: 0 and log 2."""
MIDDLE = 1.5 * LOG2 + 3 * LOG2 / 8
ANSWER = answer("The ", "19", ".", rows=ROWS)


def engine_of(endpoint: FakeEndpoint, *, max_num_seqs: int = 4, **options: Any) -> OpenaiEngine:
    settings = OpenaiOptions.model_validate({"base_url": endpoint.url, "vocab_size": 10} | options)
    return OpenaiEngine("some-model", settings, max_num_seqs=max_num_seqs)


async def read(engine: OpenaiEngine, asked: GenerationRequest) -> tuple[list[str], Generation]:
    """Return the pieces of a stream and what it ends with."""
    items = [item async for item in engine.stream(asked)]
    assert isinstance(items[-1], Generation)
    assert all(isinstance(item, TextDelta) for item in items[:-1])
    return [item.text for item in items[:-1] if isinstance(item, TextDelta)], items[-1]


async def generated(engine: OpenaiEngine, asked: GenerationRequest, *, is_stream: bool) -> Generation:
    return (await read(engine, asked))[1] if is_stream else await engine.generate(asked)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_reply_has_its_text_tokens_and_entropy(is_stream: bool) -> None:
    async with playing(ANSWER) as endpoint:
        engine = engine_of(endpoint)
        found = await generated(engine, request("What is 12 + 7?"), is_stream=is_stream)
        await engine.close()
    assert (found.text, found.finish_reason, found.entropy.kind) == ("The 19.", "stop", "truncated")
    assert (found.usage.prompt_tokens, found.usage.cached_tokens, found.usage.completion_tokens, found.entropy.tokens) == (
        11,
        5,
        3,
        3,
    )
    assert not found.are_tokens_estimated
    assert found.entropy.sum_nats == pytest.approx(MIDDLE + LOG2)
    assert found.entropy.sq_sum == pytest.approx(MIDDLE**2 + LOG2**2)
    assert found.entropy.slack_nats == pytest.approx(3 * LOG2 / 8)
    assert 0.0 <= found.queue_ms <= found.engine_ms


@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_is_sent(is_stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", " sk-secret-0123456789\n")
    asked = request("Sort.", name="t/0/a", max_tokens=7, temperature=0.5, top_p=0.9, stop=("</x>",))
    async with playing(ANSWER) as endpoint:
        engine = engine_of(endpoint, api_key_env="SOME_KEY", top_logprobs=5)
        for one in (asked, request("Hi"), replace(asked, call_id="t/1/a"), asked):
            await generated(engine, one, is_stream=is_stream)
        await engine.close()
        first, greedy, other, again = (call.body for call in endpoint.calls)
        assert endpoint.calls[0].path == "/v1/chat/completions"
        assert endpoint.calls[0].headers["authorization"] == "Bearer sk-secret-0123456789"
    seed = first.pop("seed")
    assert first == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "Sort."}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "stop": ["</x>"],
        "logprobs": True,
        "top_logprobs": 5,
        "stream": is_stream,
    } | ({"stream_options": {"include_usage": True}} if is_stream else {})
    assert not {"seed", "stop", "top_p"} & greedy.keys()
    assert again["seed"] == seed != other["seed"]


async def test_pieces_arrive_as_they_are_made() -> None:
    async with playing(opening("The ", "answer", then="stall")) as endpoint:
        engine = engine_of(endpoint)
        stream = engine.stream(request("Hi"))
        assert [await anext(stream), await anext(stream)] == [TextDelta(text="The "), TextDelta(text="answer")]
        assert engine.num_running == 1
        await stream.aclose()
        await until(lambda: endpoint.running == 0)  # hung up
        assert engine.num_running == 0
        await engine.close()


async def test_a_stream_may_be_cut_into_packets_anywhere_and_hold_any_character() -> None:
    text = "nän\u2028\u0085 😀\x0b."
    sent = event_bytes({"choices": [{"delta": {"content": text}}]}) + b": a comment\n\nevent: x\ndata:\n\n"
    sent += event_bytes({"choices": [{"delta": {}, "finish_reason": "stop"}]}).replace(b"\n", b"\r\n") + b"data: [DONE]"

    async def bytewise(call: Call) -> None:
        await call.open_stream()
        for i in range(len(sent)):
            await call.chunk(sent[i : i + 1])
        await call.raw(b"0\r\n\r\n")

    async with playing(bytewise) as endpoint:
        engine = engine_of(endpoint)
        pieces, found = await read(engine, request("Hi"))
        await engine.close()
    assert (pieces, found.text, found.finish_reason) == ([text], text, "stop")


async def test_an_endpoint_that_never_streams_is_understood() -> None:
    async def whole(call: Call) -> None:
        call.body["stream"] = False
        await ANSWER(call)

    async with playing(whole) as endpoint:
        engine = engine_of(endpoint)
        pieces, found = await read(engine, request("Hi"))
        await engine.close()
    assert (pieces, found.text, found.usage.completion_tokens) == (["The 19."], "The 19.", 3)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_token_counts_that_are_not_told_are_estimated_and_marked(is_stream: bool) -> None:
    asked = request("x" * 24)  # with 16 characters for the template, ten tokens of four
    async with playing(answer("12345678", rows=ROWS[:2], usage=None), answer("12345678!", usage=None)) as endpoint:
        engine = engine_of(endpoint)
        listed = await generated(engine, asked, is_stream=is_stream)
        unlisted = await generated(engine, asked, is_stream=is_stream)
        await engine.close()
    assert (listed.usage.prompt_tokens, listed.usage.completion_tokens, listed.are_tokens_estimated) == (10, 2, True)
    assert (unlisted.usage.prompt_tokens, unlisted.usage.completion_tokens, unlisted.are_tokens_estimated) == (10, 3, True)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_without_log_probabilities_the_entropy_is_unknown(is_stream: bool, logged: Logged) -> None:
    async with playing(answer("19")) as endpoint:
        engine = engine_of(endpoint, top_logprobs=0)
        found = [await generated(engine, request("Hi"), is_stream=is_stream) for _ in range(2)]
        await engine.close()
        assert not {"logprobs", "top_logprobs"} & endpoint.calls[0].body.keys()
    assert (found[0].entropy.tokens, found[0].entropy.sum_nats, found[0].entropy.kind) == (0, 0.0, "truncated")
    reply = AgentReply(agent="a", status="ok", text="19", entropy=EntropySum(tokens=found[0].entropy.tokens, kind="truncated"))
    assert reply.entropy.mean_nats is None
    assert doubt(reply) == math.inf
    assert [record.getMessage() for record in logged.records if record.name == "dmoa.openai"] == [
        "openai:some-model lists no log-probabilities: the entropy of its replies is unknown, so they never count as sure, and "
        "the gate learns nothing of its agents"
    ]


@pytest.mark.parametrize(
    ("listed", "nats"),
    [
        ([row("a", 0.5, 0.25, chosen=0.125)], 1.75 * LOG2 + math.log(7) / 16),  # drawn from beyond the listed ones
        ([row("a", 0.5, 0.25, chosen=0.25)], 1.5 * LOG2),
        ([row("t1", 0.5, 0.25, chosen=0.25)], MIDDLE),  # one of the listed ones
        ([{"token": "a", "logprob": math.log(0.5)}], LOG2 + math.log(9) / 4),  # none but its own
        ([{"token": "a", "logprob": None, "top_logprobs": [{"token": "a", "logprob": 0.0}]}], 0.0),
        ([{"token": "a", "logprob": 3.0, "top_logprobs": []}, row("b", 0.5, 0.5)], LOG2),  # a row that cannot be is left out
    ],
)
async def test_rows_of_every_kind(listed: list[dict[str, Any]], nats: float) -> None:
    async with playing(answer("19", rows=listed)) as endpoint:
        engine = engine_of(endpoint)
        found = await engine.generate(request("Hi"))
        await engine.close()
    assert found.entropy.tokens == 1
    assert found.entropy.sum_nats == pytest.approx(nats)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "broken",
    [
        {"token": "b", "logprob": math.nan},
        {"token": "b", "logprob": 0.0, "top_logprobs": [{"token": "b", "logprob": 0.0}, {"token": "c", "logprob": math.nan}]},
        {"token": "b", "logprob": math.nan, "top_logprobs": [{"token": "c", "logprob": 0.0}]},
        {"token": "b", "logprob": math.inf},
    ],
)
async def test_a_reply_with_a_log_probability_that_is_not_a_number_is_never_a_sure_one(
    broken: dict[str, Any], is_stream: bool
) -> None:
    async with playing(answer("a", "b", "c", rows=[row("a", 1.0), broken, row("c", 1.0)])) as endpoint:
        engine = engine_of(endpoint)
        agent = Agent(AgentConfig(name="a", llm="x", profile="Works."), engine)
        call = AgentCall(trace_id="t", step=0, agent="a", messages=request("Hi").messages, sampling=Sampling())
        replies = [item async for item in agent.stream(call)] if is_stream else [await agent.call(call)]
        await engine.close()
    reply = replies[-1]
    assert isinstance(reply, AgentReply)
    assert (reply.status, reply.text, reply.entropy.mean_nats, reply.entropy.tokens) == ("ok", "abc", None, 0)
    assert (reply.entropy.sum_nats, reply.entropy.sq_sum, reply.entropy.slack_nats) == (0.0, 0.0, 0.0)
    assert doubt(reply) == math.inf


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("said", "reason"), [("stop", "stop"), ("length", "length"), ("eos", "stop")])
async def test_how_a_reply_ended(is_stream: bool, said: str, reason: str) -> None:
    async with playing(answer("19", finish=said)) as endpoint:
        engine = engine_of(endpoint)
        assert (await generated(engine, request("Hi"), is_stream=is_stream)).finish_reason == reason
        await engine.close()


async def test_a_reply_that_was_begun_is_sent_as_a_turn_or_continued_in_place() -> None:
    asked = request("Hi")
    asked = replace(asked, messages=(*asked.messages, Message(role="assistant", content="<x>1</x> = 1")))
    async with playing(answer("19")) as endpoint:
        for is_continued in (False, True):
            engine = engine_of(endpoint, continue_final_message=is_continued)
            await engine.generate(asked)
            await engine.generate(request("Hi"))
            await engine.close()
        bodies = [call.body for call in endpoint.calls]
    assert bodies[0]["messages"][-1] == bodies[2]["messages"][-1] == {"role": "assistant", "content": "<x>1</x> = 1"}
    assert (bodies[2]["continue_final_message"], bodies[2]["add_generation_prompt"]) == (True, False)
    assert all("continue_final_message" not in bodies[i] for i in (0, 1, 3))


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_deadline_closes_the_connection(is_stream: bool) -> None:
    async with playing(stall) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(DeadlineError, match=r"^openai:some-model: the deadline passed before the endpoint's reply$"):
            await generated(engine, request("Hi", deadline_unix_s=time.time() + 0.1), is_stream=is_stream)
        await until(lambda: len(endpoint.calls) == 1 and endpoint.running == 0)
        with pytest.raises(DeadlineError):
            await generated(engine, request("Hi", deadline_unix_s=time.time() - 1), is_stream=is_stream)
        await engine.close()
    assert len(endpoint.calls) == 1


async def test_a_deadline_in_mid_text_leaves_what_is_there() -> None:
    async with playing(opening("The ", "ans", then="stall")) as endpoint:
        engine = engine_of(endpoint)
        pieces, found = await read(engine, request("Hi", deadline_unix_s=time.time() + 0.5))
        await until(lambda: endpoint.running == 0)
        await engine.close()
    assert (pieces, found.text, found.finish_reason) == (["The ", "ans"], "The ans", "length")


async def test_a_silent_endpoint_is_given_up_after_its_timeout_and_not_asked_again() -> None:
    async with playing(stall) as endpoint:
        engine = engine_of(endpoint, timeout_s=0.1)
        with pytest.raises(EngineError, match=r"nothing came for 0\.1 s; raise timeout_s"):
            await engine.generate(request("Hi"))
        await engine.close()
    assert len(endpoint.calls) == 1


@pytest.mark.parametrize("is_stream", [False, True])
async def test_cancelling_closes_the_connection(is_stream: bool) -> None:
    async with playing(stall) as endpoint:
        engine = engine_of(endpoint)
        asking = asyncio.create_task(generated(engine, request("Hi"), is_stream=is_stream))
        await until(lambda: endpoint.running == 1)
        asking.cancel()
        await until(lambda: endpoint.running == 0)
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert engine.num_running == 0
        await engine.close()


async def test_no_more_calls_are_open_than_there_are_places() -> None:
    async def soon(call: Call) -> None:
        await asyncio.sleep(0.02)
        await ANSWER(call)

    async with playing(soon) as endpoint:
        engine = engine_of(endpoint, max_num_seqs=2)
        found = await asyncio.gather(*(engine.generate(request("Hi", name=str(i))) for i in range(6)))
        await engine.close()
    assert endpoint.peak == 2
    assert len(endpoint.calls) == 6
    assert max(generation.queue_ms for generation in found) >= 20


@pytest.mark.parametrize("is_stream", [False, True])
async def test_closing_fails_what_is_in_flight_and_what_comes_after(is_stream: bool) -> None:
    async with playing(stall) as endpoint:
        engine = engine_of(endpoint, max_num_seqs=1)
        asking = [asyncio.create_task(generated(engine, request("Hi", name=str(i)), is_stream=is_stream)) for i in range(3)]
        await until(lambda: endpoint.running == 1 and engine.num_running == 3)
        await engine.close()
        for result in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(result, EngineError)
            assert str(result) == "openai:some-model: the engine was closed"
        await until(lambda: endpoint.running == 0)
        with pytest.raises(EngineError, match="is closed; build a new one"):
            await generated(engine, request("Hi"), is_stream=is_stream)
        await engine.close()


def test_one_event_loop_may_follow_another() -> None:
    engines: list[OpenaiEngine] = []

    async def ask() -> str:
        async with playing(ANSWER) as endpoint:
            engine = engine_of(endpoint) if not engines else engines[0]
            engine._url = endpoint.url
            engines.append(engine)
            text = (await engine.generate(request("Hi"))).text
            assert engine._room is not None
            await engine._room.client.close()
            return text

    assert [asyncio.run(ask()), asyncio.run(ask())] == ["The 19.", "The 19."]


async def test_the_label_names_what_may_change_numbers() -> None:
    async with playing(ANSWER) as endpoint:
        assert engine_of(endpoint).label == "openai/top20/vocab10"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"{", "its reply is not understood (the whole: Invalid JSON"),
        (b'"hello"', "its reply is not understood"),
        (b'{"choices": [{"message": {"content": 3}}]}', "(choices.0.message.content: Input should be a valid string"),
        (b'{"error": {"message": "the GPU is gone"}}', "it reported an error: the GPU is gone"),
        (
            b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}',
            "its content filter ended the reply",
        ),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_garbled_replies_are_errors_and_not_asked_for_again(data: bytes, named: str, is_stream: bool) -> None:
    async def events(call: Call) -> None:
        await call.open_stream()
        await call.event({"choices": [{"delta": {"content": "The "}}]})
        await call.chunk(b"data: " + data + b"\n\n")
        await call.until_gone()

    async with playing(events if is_stream else content(data)) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(EngineError) as caught:
            await generated(engine, request("Hi"), is_stream=is_stream)
        await engine.close()
    assert str(caught.value).startswith("openai:some-model: ")
    assert named in str(caught.value)
    assert len(endpoint.calls) == 1


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_web_page_in_place_of_a_reply_is_told_as_such_and_not_asked_for_again(is_stream: bool) -> None:
    async def page(call: Call) -> None:
        await call.send(200, b"<html>Sign in</html>", {"Content-Type": "text/html; charset=utf-8"})

    async with playing(page) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(EngineError, match=r"a web page .* came in place of a reply; check base_url"):
            await generated(engine, request("Hi"), is_stream=is_stream)
        await engine.close()
    assert len(endpoint.calls) == 1


@pytest.mark.parametrize("kind", ["one line", "events", "no end of a line"])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_reply_without_end_is_given_up(kind: str, is_stream: bool) -> None:
    sent = 0

    async def endless(call: Call) -> None:
        nonlocal sent
        await call.open_stream()
        piece = event_bytes({"choices": [{"delta": {"content": "x" * 60_000}}]}) if kind == "events" else b"x" * 60_000
        while True:
            await call.chunk(piece if kind != "one line" else b"data: " + piece)
            sent += len(piece)

    async with playing(endless) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(EngineError, match="more than 1179648 bytes for max_tokens 16"):
            await generated(engine, request("q", max_tokens=16), is_stream=is_stream)
        await engine.close()
        assert len(endpoint.calls) == 1
    assert sent < 64 * 2**20, "most of it is in the kernel's buffers"


@pytest.mark.parametrize(("size", "is_fine"), [(17_408, True), (17_409, False)])
async def test_a_text_that_is_longer_than_its_tokens_can_be_is_an_error(size: int, is_fine: bool) -> None:
    async with playing(answer("x" * size)) as endpoint:
        engine = engine_of(endpoint)
        asked = request("q", max_tokens=16)
        assert len((await read(engine, asked))[1].text) == size, "a stream's text is with the client already"
        if is_fine:
            assert len((await engine.generate(asked)).text) == size
        else:
            with pytest.raises(EngineError, match="17409 characters for max_tokens 16; expected at most 17408"):
                await engine.generate(asked)
        await engine.close()


async def test_an_error_without_end_is_read_to_a_bound() -> None:
    async def endless(call: Call) -> None:
        call.writer.write(b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await call.chunk(b"x" * 60_000)

    async with playing(endless) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(EngineError, match="400"):
            await engine.generate(request("q"))
        await engine.close()


async def test_a_reply_may_come_byte_by_byte() -> None:
    data = event_bytes({"choices": [{"delta": {"content": "It is 19."}, "finish_reason": "stop"}]})

    async def slowly(call: Call) -> None:
        await call.open_stream()
        for place in range(len(data)):
            await call.chunk(data[place : place + 1])
        await call.raw(b"0\r\n\r\n")

    async with playing(slowly) as endpoint:
        engine = engine_of(endpoint)
        assert (await read(engine, request("q")))[1].text == "It is 19."
        await engine.close()


async def test_the_usage_of_the_reply_is_believed_whatever_else_is_in_it() -> None:
    extra = USAGE | {"prompt_tokens_details": None, "completion_tokens_details": {"reasoning_tokens": 2}, "cost": 0.1}
    async with playing(answer("19", usage=extra)) as endpoint:
        engine = engine_of(endpoint)
        found = await engine.generate(request("Hi"))
        await engine.close()
    assert (found.usage.prompt_tokens, found.usage.cached_tokens, found.usage.completion_tokens) == (11, 0, 3)


@pytest.mark.parametrize("told", [[None, USAGE], [USAGE, None], [None, USAGE, None]], ids=["before", "after", "both"])
async def test_a_null_usage_beside_the_real_one_says_nothing(told: list[dict[str, Any] | None]) -> None:
    async def turn(call: Call) -> None:
        await call.open_stream()
        for usage in told:
            await call.event({"choices": [{"index": 0, "delta": {"content": "19 "}, "finish_reason": "stop"}], "usage": usage})
        await call.event("[DONE]")
        await call.raw(b"0\r\n\r\n")

    async with playing(turn) as endpoint:
        engine = engine_of(endpoint)
        found = await generated(engine, request("Hi"), is_stream=True)
        await engine.close()
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.are_tokens_estimated) == (11, 3, False)


def test_the_engine_is_quiet_at_info(logged: Logged) -> None:
    with logged.at_level(logging.INFO, logger="dmoa"):
        OpenaiEngine("m", OpenaiOptions(base_url="http://127.0.0.1:9/v1"), max_num_seqs=1)
    assert logged.records == []


@pytest.mark.parametrize("is_broken", [False, True])
async def test_a_compressed_reply_is_read_or_said_to_be_broken(is_broken: bool) -> None:
    tree = {"choices": [{"message": {"content": "19"}, "finish_reason": "stop"}]}

    async def compressed(call: Call) -> None:
        data = json.dumps(tree).encode() if is_broken else gzip.compress(json.dumps(tree).encode())
        await call.send(200, data, {"Content-Encoding": "gzip"})

    async with playing(compressed) as endpoint:
        engine = engine_of(endpoint)
        if is_broken:
            with pytest.raises(EngineError, match=r"its reply cannot be decoded \(DecodingError: "):
                await engine.generate(request("Hi"))
        else:
            assert (await engine.generate(request("Hi"))).text == "19"
        await engine.close()
    assert "gzip" in endpoint.calls[0].headers["accept-encoding"]
    assert len(endpoint.calls) == 1


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
async def test_an_endpoint_elsewhere_is_asked_by_the_proxies_of_the_environment(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    async with playing(ANSWER) as proxy:
        monkeypatch.setenv(variable, proxy.url.removesuffix("/v1"))
        for host, is_proxied in (("endpoint.example", True), ("other.example", False)):
            monkeypatch.setenv("no_proxy", "other.example")
            options = OpenaiOptions(base_url=f"http://{host}:9/v1", max_retries=0)
            engine = OpenaiEngine("some-model", options, max_num_seqs=1)
            if is_proxied:
                assert (await engine.generate(request("Hi"))).text == "The 19."
            else:
                with pytest.raises(EngineError, match=r"the connection failed \(ConnectError: "):
                    await engine.generate(request("Hi"))
            await engine.close()
    assert [call.path for call in proxy.calls] == ["http://endpoint.example:9/v1/chat/completions"]


async def test_connections_are_kept_between_calls() -> None:
    async with playing(ANSWER) as endpoint:
        engine = engine_of(endpoint)
        for _ in range(3):
            await engine.generate(request("Hi"))
        await engine.close()
    assert len({id(call.writer) for call in endpoint.calls}) == 1


async def test_an_endpoint_on_this_machine_is_asked_without_the_proxies_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with playing(ANSWER) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        assert (await engine.generate(request("What is 12 + 7?"))).text == "The 19."
        await engine.close()
