"""What an endpoint's reply may look like: endings, refusals, tool calls, events of every form, optional parts of any shape."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest

from dmoa.engine_options import OpenaiOptions
from dmoa.engines.openai import OpenaiEngine
from dmoa.engines.openai_replies import events
from dmoa.errors import EngineError
from dmoa.types import FinalCall, Generation, ToolCall
from tests.unit.agents.openai_server import Call, FakeEndpoint, Turn, content, event_bytes, playing, request, row


def engine_of(endpoint: FakeEndpoint, **options: Any) -> OpenaiEngine:
    settings = OpenaiOptions.model_validate({"base_url": endpoint.url, "vocab_size": 10, "max_retries": 0} | options)
    return OpenaiEngine("some-model", settings, max_num_seqs=4)


async def ask(turn: Turn, *, is_stream: bool, deadline_s: float | None = None, **options: Any) -> Generation:
    asked = request("Hi", deadline_unix_s=None if deadline_s is None else time.time() + deadline_s)
    async with playing(turn) as endpoint:
        engine = engine_of(endpoint, **options)
        try:
            if not is_stream:
                return await engine.generate(asked)
            items = [item async for item in engine.stream(asked)]
        finally:
            await engine.close()
    assert isinstance(items[-1], Generation)
    return items[-1]


def saying(message: dict[str, Any], finish: Any, *, of: int = 1, **fields: Any) -> Turn:
    """Answer with one message: whole, or its text in `of` pieces and then how it ended."""

    async def turn(call: Call) -> None:
        if not call.body["stream"]:
            choice = {"index": 0, "message": message, "finish_reason": finish} | fields
            await call.send(200, json.dumps({"choices": [choice]}).encode())
            return
        await call.open_stream()
        text = message.get("content") or ""
        for i in range(of):
            piece = message | {"content": text[i * len(text) // of : (i + 1) * len(text) // of]}
            await call.event({"choices": [{"index": 0, "delta": piece} | fields]})
        await call.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        await call.event("[DONE]")
        await call.raw(b"0\r\n\r\n")

    return turn


def sending(*parts: bytes, kind: str = "text/event-stream") -> Turn:
    """Answer with these bytes, a packet each, whatever was asked for."""

    async def turn(call: Call) -> None:
        await call.raw(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for part in parts:
            await call.chunk(part)
        await call.raw(b"0\r\n\r\n")

    return turn


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "ending",
    [
        "error",
        "abort",
        "aborted",
        "ABORT",
        "cancelled",
        "timeout",
        "insufficient_system_resource",
        "OTHER",
        "load",
        {"type": "abort"},
    ],
)
async def test_half_a_text_is_not_a_reply(ending: Any, is_stream: bool) -> None:
    said = ending["type"] if isinstance(ending, dict) else ending
    with pytest.raises(
        EngineError, match=rf"^openai:some-model: its reply ended with finish_reason '{said}', so the text is not"
    ):
        await ask(saying({"content": "It is 1"}, ending), is_stream=is_stream)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("ending", ["content_filter", "CONTENT_FILTER", "safety", "SAFETY"])
async def test_a_filtered_text_is_not_a_reply(ending: str, is_stream: bool) -> None:
    with pytest.raises(EngineError, match="its content filter ended the reply"):
        await ask(saying({"content": "It is 1"}, ending), is_stream=is_stream)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        *((word, "stop") for word in ("stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "COMPLETE", "eosFound")),
        *((word, "length") for word in ("length", "max_tokens", "MAX_TOKENS", "model_length", "maxPredictedTokensReached")),
        ({"type": "length", "length": 4}, "length"),
        (None, "stop"),
        ("null", "stop"),
        ("tool_calls", "stop"),
    ],
)
async def test_whole_and_cut_texts_by_every_name(ending: Any, reason: str, is_stream: bool) -> None:
    found = await ask(saying({"content": "It is 19."}, ending), is_stream=is_stream)
    assert (found.text, found.finish_reason) == ("It is 19.", reason)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("message", "ending", "named"),
    [
        (
            {"content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
            "tool_calls",
            "it called a tool in place of an",
        ),
        (
            {"content": "", "function_call": {"name": "f", "arguments": ""}},
            "function_call",
            "it called a tool in place of an answer",
        ),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "stop", "it called a tool in place of an answer, and none was offered"),
        ({"content": None, "refusal": "I will not."}, "stop", "it refused to answer: I will not."),
    ],
)
async def test_what_stands_in_place_of_an_answer_is_named(
    message: dict[str, Any], ending: str, named: str, is_stream: bool
) -> None:
    with pytest.raises(EngineError) as caught:
        await ask(saying(message, ending), is_stream=is_stream)
    assert named in str(caught.value)
    assert "max_tokens" not in str(caught.value)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_answer_beside_a_refusal_or_a_call_stays(is_stream: bool) -> None:
    message = {"content": "19", "refusal": None, "tool_calls": []}
    assert (await ask(saying(message, "stop"), is_stream=is_stream)).text == "19"
    assert (await ask(saying(message | {"tool_calls": [{"id": "1"}]}, "stop"), is_stream=is_stream)).text == "19"


SHAPES = [
    [],
    "none",
    7,
    {"content": "x"},
    {"content": [{"token": "a", "logprob": "low"}]},
    {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": {"a": -0.1}}]},
    {"content": [["a", -0.1]]},
    {"tokens": ["a"], "token_logprobs": [-0.1], "top_logprobs": [{"a": -0.1}]},
]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=json.dumps)
async def test_log_probabilities_of_another_shape_leave_the_reply_with_an_unknown_entropy(shape: Any, is_stream: bool) -> None:
    found = await ask(saying({"content": "It is 19."}, "stop", logprobs=shape), is_stream=is_stream)
    assert (found.text, found.finish_reason) == ("It is 19.", "stop")
    assert (found.entropy.tokens, found.entropy.sum_nats) == (0, 0.0)


@pytest.mark.parametrize(
    "usage",
    [[], "3", {"prompt_tokens": None}, {"prompt_tokens": "many"}, {"completion_tokens": -1}, {"prompt_tokens": 10**30}],
    ids=json.dumps,
)
async def test_a_usage_of_another_shape_leaves_the_reply_with_estimated_counts(usage: Any) -> None:
    tree = {"choices": [{"message": {"content": "12345678"}, "finish_reason": "stop"}], "usage": usage}
    found = await ask(content(json.dumps(tree).encode()), is_stream=False)
    assert (found.text, found.usage.completion_tokens, found.are_tokens_estimated) == ("12345678", 2, True)


async def test_a_text_in_parts_is_put_together() -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "It is "}, {"type": "text", "text": "19."}]
    assert (await ask(saying({"content": parts}, "stop"), is_stream=False)).text == "It is 19."


async def test_other_choices_are_not_glued_to_the_text() -> None:
    def piece(index: int, text: str) -> bytes:
        return event_bytes(
            {"choices": [{"index": index, "delta": {"content": text}, "logprobs": {"content": [row(text, 0.5, 0.5)]}}]}
        )

    both = {"choices": [{"index": 1, "delta": {"content": "no"}}, {"index": 0, "delta": {"content": "19"}}]}
    ends = [{"index": 1, "delta": {}, "finish_reason": "length"}, {"index": 0, "delta": {}, "finish_reason": "stop"}]
    turn = sending(
        piece(1, "It was "),
        piece(0, "It is "),
        piece(1, "18"),
        event_bytes(both),
        *(event_bytes({"choices": [end]}) for end in ends),
        event_bytes("[DONE]"),
    )
    found = await ask(turn, is_stream=True)
    assert (found.text, found.finish_reason, found.entropy.tokens) == ("It is 19", "stop", 1)
    assert found.entropy.sum_nats == pytest.approx(math.log(2))


async def test_of_several_whole_choices_the_first_by_index_is_the_reply() -> None:
    choices = [{"index": i, "message": {"content": f"text {i}"}, "finish_reason": "stop"} for i in (1, 0)]
    assert (await ask(content(json.dumps({"choices": choices}).encode()), is_stream=False)).text == "text 0"


FIRST = json.dumps({"choices": [{"index": 0, "delta": {"content": "It "}}]})
SECOND = json.dumps({"choices": [{"index": 0, "delta": {"content": "is 19."}, "finish_reason": "stop"}]})
PRETTY = json.dumps(json.loads(FIRST), indent=1).splitlines()
STREAMS = {
    "line feeds": f"data: {FIRST}\n\ndata: {SECOND}\n\ndata: [DONE]\n\n",
    "CR": f"data: {FIRST}\r\rdata: {SECOND}\r\rdata: [DONE]\r\r",
    "CR LF": f"data: {FIRST}\r\n\r\ndata: {SECOND}\r\n\r\ndata: [DONE]\r\n\r\n",
    "a byte order mark": f"\ufeffdata: {FIRST}\n\ndata: {SECOND}\n\ndata: [DONE]\n\n",
    "a byte order mark and CR": f"\ufeffdata: {FIRST}\r\rdata: {SECOND}\r\rdata: [DONE]\r\r",
    "no space": f"data:{FIRST}\n\ndata:{SECOND}\n\ndata:[DONE]\n\n",
    "comments and fields": f": hi\n\nid: 1\nevent: x\nretry: 5\ndata: {FIRST}\n\n:\ndata: {SECOND}\n: x\n\ndata: [DONE]\n\n",
    "several lines": "".join(f"data: {line}\n" for line in PRETTY) + f"\ndata: {SECOND}\n\ndata: [DONE]\n\n",
    "several lines and CR": "".join(f"data: {line}\r" for line in PRETTY) + f"\rdata: {SECOND}\r\rdata: [DONE]\r\r",
    "several lines and CR LF": "".join(f"data: {line}\r\n" for line in PRETTY)
    + f"\r\ndata: {SECOND}\r\n\r\ndata: [DONE]\r\n\r\n",
    "no blank lines": f"data: {FIRST}\ndata: {SECOND}\ndata: [DONE]\n",
    "no end": f"data: {FIRST}\n\ndata: {SECOND}",
    "no end after several lines": f"data: {FIRST}\n\n"
    + "\n".join(f"data: {line}" for line in json.dumps(json.loads(SECOND), indent=1).splitlines()),
    "null choices": f'data: {{"choices": null}}\n\ndata: {FIRST}\n\ndata: {{"choices": []}}\n\ndata: {SECOND}\n\n',
    "usage alone": f'data: {FIRST}\n\ndata: {SECOND}\n\ndata: {{"usage": {{"completion_tokens": 3}}}}\n\ndata: [DONE]\n\n',
}


@pytest.mark.parametrize("size", [1, 2, 7, 10**6])
@pytest.mark.parametrize("name", STREAMS)
async def test_events_of_every_form_in_packets_of_every_size(name: str, size: int) -> None:
    data = STREAMS[name].encode()
    found = await ask(sending(*(data[i : i + size] for i in range(0, len(data), size))), is_stream=True)
    assert (found.text, found.finish_reason) == ("It is 19.", "stop")


async def test_a_whole_reply_may_begin_with_a_byte_order_mark() -> None:
    tree = {"choices": [{"message": {"content": "19"}, "finish_reason": "stop"}]}
    assert (await ask(content(b"\xef\xbb\xbf" + json.dumps(tree).encode()), is_stream=False)).text == "19"


async def test_an_endpoint_that_always_streams_is_understood() -> None:
    assert (await ask(sending(STREAMS["line feeds"].encode()), is_stream=False)).text == "It is 19."


async def test_an_event_comes_with_its_line_end_whatever_that_is() -> None:
    for end in (b"\n", b"\r", b"\r\n"):

        async def chunks(end: bytes = end) -> Any:
            yield b"data: {}" + end + end
            raise AssertionError("the event was not handed on before the next packet")

        assert await anext(events(chunks())) == "{}"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("data", "named"),
    [
        ('{"error": {"message": "the GPU is gone"}}', "it reported an error: the GPU is gone"),
        ('{"error": "the GPU is gone"}', "it reported an error: the GPU is gone"),
        ('{"object": "error", "message": "the GPU is gone", "code": 500}', "it reported an error: the GPU is gone"),
        (
            '{"choices": [{"error": {"message": "the GPU is gone"}, "finish_reason": "error"}]}',
            "it reported an error: the GPU is gone",
        ),
        ('{"choices": []}', "its reply holds no choice"),
        ('{"choices": null}', "its reply holds no choice"),
        ("{}", "its reply holds no choice"),
    ],
)
async def test_errors_that_come_with_status_200(data: str, named: str, is_stream: bool) -> None:
    turn = sending(f"data: {data}\n\ndata: [DONE]\n\n".encode()) if is_stream else content(data.encode())
    with pytest.raises(EngineError) as caught:
        await ask(turn, is_stream=is_stream)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "data", ['{"message": "the GPU is gone"}', "the GPU is gone", '{"error": {"message": "the GPU is gone"}}']
)
async def test_an_event_of_the_kind_error_is_one(data: str) -> None:
    sent = f"data: {FIRST}\n\nevent: error\ndata: {data}\n\n"
    with pytest.raises(EngineError, match="it reported an error: the GPU is gone"):
        await ask(sending(sent.encode()), is_stream=True)


def breaking(head: bytes) -> Turn:
    """Send some bytes, then cut the connection."""

    async def turn(call: Call) -> None:
        if head:
            await call.raw(head)
        call.writer.close()

    return turn


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = event_bytes(FIRST)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_connection_lost_in_mid_reply_does_not_blame_the_address(is_stream: bool) -> None:
    stream = CHUNKED + b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK)
    whole = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"choices": ['
    with pytest.raises(EngineError, match=r"the connection failed in mid-reply \(.*\); ask again$") as caught:
        await ask(breaking(stream if is_stream else whole), is_stream=is_stream)
    assert "base_url" not in str(caught.value)


async def test_a_connection_lost_after_the_end_of_the_reply_is_no_loss() -> None:
    data = event_bytes(FIRST) + event_bytes(SECOND)
    found = await ask(breaking(CHUNKED + b"%x\r\n%s\r\n" % (len(data), data)), is_stream=True)
    assert (found.text, found.finish_reason) == ("It is 19.", "stop")


async def test_a_whole_text_stays_whole_where_the_deadline_passes_before_the_stream_is_closed() -> None:
    async def turn(call: Call) -> None:
        await call.open_stream()
        await call.chunk(event_bytes(FIRST) + event_bytes(SECOND))
        await call.until_gone()

    found = await ask(turn, is_stream=True, deadline_s=0.5)
    assert (found.text, found.finish_reason) == ("It is 19.", "stop")


CALLED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
PIECES: list[dict[str, Any]] = [
    {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
    {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "now", "arguments": None}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
]
FUNCTION = {"name": "add", "parameters": {"type": "object"}}


async def final_call(endpoint: FakeEndpoint, final: FinalCall, *, is_stream: bool = False) -> Generation:
    engine, asked = engine_of(endpoint, top_logprobs=0), replace(request("Hi"), final=final)
    try:
        items = [item async for item in engine.stream(asked)] if is_stream else [await engine.generate(asked)]
    finally:
        await engine.close()
    assert isinstance(items[-1], Generation)
    return items[-1]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_calls_of_tools_that_were_offered_are_read(is_stream: bool) -> None:
    async def pieces(call: Call) -> None:
        await call.open_stream()
        for piece in PIECES:
            await call.event({"choices": [{"index": 0, "delta": piece}]})
        await call.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
        await call.event("[DONE]")
        await call.raw(b"0\r\n\r\n")

    turn = pieces if is_stream else saying({"content": None, "tool_calls": [CALLED, {"function": {"name": "now"}}]}, "tool_calls")
    async with playing(turn) as endpoint:
        found = await final_call(endpoint, FinalCall(tools=(FUNCTION,)), is_stream=is_stream)
        sent = endpoint.calls[0].body
    first, second = found.tool_calls
    assert (found.text, found.finish_reason) == ("", "stop")
    assert first == ToolCall(call_id="c1", name="add", arguments='{"a": 1}')
    assert (second.name, second.arguments) == ("now", "{}")
    assert sent["tools"] == [{"type": "function", "function": FUNCTION}]
    assert sent["tool_choice"] == "auto"


@pytest.mark.parametrize(
    ("final", "fields"),
    [
        (FinalCall(tools=(FUNCTION,), tool_choice="=add", is_parallel=False),
         {"tool_choice": {"type": "function", "function": {"name": "add"}}, "parallel_tool_calls": False}),
        (FinalCall(schema={"type": "object"}), {"response_format": {"type": "json_object"}}),
        (FinalCall(schema={}, schema_name="n", is_strict=True),
         {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}}}),
        (FinalCall(schema={}, schema_name="n", schema_description="A sum."),
         {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "description": "A sum.", "schema": {}}}}),
        (FinalCall(top_logprobs=3), {"logprobs": True, "top_logprobs": 3}),
        (FinalCall(n=2), {}),
    ],
)  # fmt: skip
async def test_what_a_client_wants_is_passed_on(final: FinalCall, fields: dict[str, Any]) -> None:
    async with playing(saying({"content": "1"}, "stop")) as endpoint:
        await final_call(endpoint, final)
        sent = endpoint.calls[0].body
    wanted = {"tools", "tool_choice", "parallel_tool_calls", "response_format", "logprobs", "top_logprobs"} & sent.keys()
    assert {name: sent[name] for name in wanted} == fields | ({"tools": sent["tools"]} if final.tools else {})


async def test_log_probabilities_are_handed_on_as_many_as_were_asked_for() -> None:
    rows = [{"token": "1", "logprob": -0.1, "bytes": [49], "top_logprobs": [{"token": t, "logprob": -2.0} for t in "1234"]}]
    async with playing(saying({"content": "1"}, "stop", logprobs={"content": rows})) as endpoint:
        found = await final_call(endpoint, FinalCall(top_logprobs=2))
        plain = await final_call(endpoint, FinalCall(n=2))
    listed = [{"token": "1", "logprob": -2.0, "bytes": [49]}, {"token": "2", "logprob": -2.0, "bytes": [50]}]
    assert found.logprobs == ({"token": "1", "logprob": -0.1, "bytes": [49], "top_logprobs": listed},)
    assert plain.logprobs is None


def piece(name: str | None, said: str, **fields: Any) -> dict[str, Any]:
    return fields | {"function": {"arguments": said} | ({"name": name} if name else {})}


@pytest.mark.parametrize(
    "told",
    [
        [[piece("add", '{"a": 1}', id="c1"), piece("add", '{"a": 2}', id="c2")]],
        [[piece("add", '{"a": 1}', id="")], [piece("add", '{"a": 2}', id="")]],
        [[piece("add", "", id="c1")], [piece(None, '{"a"')], [piece(None, ": 1}")], [piece("add", '{"a": 2}', id="c2")]],
        [[piece("add", '{"a"', id="c1")], [piece("add", ": 1}", id="c1")], [piece("add", '{"a": 2}', id="c2")]],
        [[piece("add", '{"a": 1}', id="c1", index=0)], [piece("add", '{"a": 2}', id="c2", index=0)]],
        [[piece("add", '{"a"', id="c1", index=0)], [piece(None, ": 1}", id="x", index=0)], [piece("add", '{"a": 2}', index=1)]],
        [[piece("add", '{"a": 1', index=3)], [piece("add", '{"a": 2}', index=4)], [piece("add", "}", index=3)]],
    ],
    ids=["one-piece", "no-ids", "in-pieces", "named-again", "all-of-index-0", "other-ids-of-pieces", "by-index"],
)
async def test_calls_in_a_stream_are_told_apart_however_they_are_counted(told: list[list[dict[str, Any]]]) -> None:
    async def turn(call: Call) -> None:
        await call.open_stream()
        for calls in told:
            await call.event({"choices": [{"index": 0, "delta": {"tool_calls": calls}}]})
        await call.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
        await call.event("[DONE]")
        await call.raw(b"0\r\n\r\n")

    async with playing(turn) as endpoint:
        found = await final_call(endpoint, FinalCall(tools=(FUNCTION,)), is_stream=True)
    assert [(call.name, call.arguments) for call in found.tool_calls] == [("add", '{"a": 1}'), ("add", '{"a": 2}')]
    assert len({call.call_id for call in found.tool_calls}) == 2
