"""Tools, forms, several answers and log-probabilities over HTTP: what reaches the swarm, and what clients read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from dmoa.types import Choice, FinalCall, Message, ToolCall
from tests.unit.serving.fake_service import QUESTION, FakeService, connect, make_app
from tests.unit.serving.test_http_chat import official

CHAT = "/v1/chat/completions"
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": PARAMETERS}
WHY = "x" * 90
CALLS = tuple(ToolCall(call_id=f"call_{i}", name="add", arguments=f'{{"a": {i}, "why": "{WHY}"}}') for i in range(2))
CALLED = FakeService(overrides={"text": "", "choices": (Choice(text="", tool_calls=CALLS, finish_reason="tool_calls"),)})
ROW = {"token": "19", "logprob": -0.5, "bytes": [49, 57], "top_logprobs": [{"token": "20", "logprob": -1.0, "bytes": [50, 48]}]}


async def final_of(**body: Any) -> FinalCall | None:
    """What of a body is asked of the final call."""
    service = FakeService()
    async with connect(make_app(service)) as client:
        response = await client.post(CHAT, json={"model": "tiny", "messages": QUESTION} | body)
    assert response.status_code == 200, response.text
    return service.asked[0][0].final


@pytest.mark.parametrize(
    ("body", "final"),
    [
        ({"tools": [ADD]}, FinalCall(tools=(FUNCTION,))),
        ({"tools": [ADD], "tool_choice": "none"}, None),
        ({"tools": [], "tool_choice": "auto", "n": 1, "response_format": {"type": "text"}, "logprobs": False}, None),
        ({"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False},
         FinalCall(tools=(FUNCTION,), tool_choice="required", is_parallel=False)),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}},
         FinalCall(tools=(FUNCTION,), tool_choice="=add")),
        ({"response_format": {"type": "json_object"}}, FinalCall(schema={"type": "object"})),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": PARAMETERS, "strict": True}}},
         FinalCall(schema=PARAMETERS, schema_name="f", is_strict=True)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "f", "description": "A sum."}}},
         FinalCall(schema={}, schema_name="f", schema_description="A sum.")),
        ({"tools": [{"type": "function", "function": FUNCTION | {"odd": 1}}]}, FinalCall(tools=(FUNCTION,))),
        ({"logprobs": True}, FinalCall(top_logprobs=0)),
        ({"logprobs": True, "top_logprobs": 3.0, "n": 8}, FinalCall(top_logprobs=3, n=8)),
        ({"tools": [ADD], "tool_choice": "none", "n": 2}, FinalCall(n=2)),
    ],
)  # fmt: skip
async def test_what_is_asked_of_the_final_call(body: dict[str, Any], final: FinalCall | None) -> None:
    assert await final_of(**body) == final


async def test_calls_and_results_of_tools_are_turns_or_follow_the_question() -> None:
    service = FakeService()
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    used = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "19"},
    ]
    async with connect(make_app(service)) as client:
        for messages in ([*QUESTION, *used], [*QUESTION, *used, {"role": "user", "content": "Sure?"}]):
            response = await client.post(CHAT, json={"model": "tiny", "messages": messages, "tools": [ADD]})
            assert response.status_code == 200, response.text
    (first, *_), (second, *_) = service.asked
    assert (first.text, first.turns) == ("What is 12 + 7?", ())
    assert first.exchange == 'Called add with {"a": 1}\nResult of add: 19'
    assert (second.text, second.exchange) == ("Sure?", "")
    assert second.turns == (
        Message(role="user", content="What is 12 + 7?"),
        Message(role="assistant", content='Called add with {"a": 1}'),
        Message(role="user", content="Result of add: 19"),
    )


def read(calls: Any) -> list[tuple[str, str, str]]:
    return [(call.id, call.function.name, call.function.arguments) for call in calls]


async def test_calls_of_tools_arrive_whole_and_streamed() -> None:
    wanted = [(call.call_id, call.name, call.arguments) for call in CALLS]
    tools: Any = [ADD]
    async with official(CALLED) as client:
        whole = (await client.chat.completions.create(model="tiny", messages=QUESTION, tools=tools)).choices[0]
        stream = await client.chat.completions.create(model="tiny", messages=QUESTION, tools=tools, stream=True)
        pieces = [call for chunk in [chunk async for chunk in stream] for call in chunk.choices[0].delta.tool_calls or []]
        async with client.chat.completions.stream(model="tiny", messages=QUESTION, tools=tools) as helper:
            final = (await helper.get_final_completion()).choices[0]
    assert (whole.finish_reason, whole.message.content, read(whole.message.tool_calls)) == ("tool_calls", None, wanted)
    assert len(pieces) == 6  # each call's name, then its arguments of some 100 characters in two pieces
    assert (final.finish_reason, read(final.message.tool_calls)) == ("tool_calls", wanted)


async def test_text_beside_calls_comes_as_it_is_written() -> None:
    tools: Any = [ADD]
    choice = Choice(text="I look. ", tool_calls=CALLS[:1], finish_reason="tool_calls")
    service = FakeService(overrides={"text": choice.text, "choices": (choice,)}, deltas=("I ", "look. "))
    async with official(service) as client:
        stream = await client.chat.completions.create(model="tiny", messages=QUESTION, tools=tools, stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream if chunk.choices]
        whole = (await client.chat.completions.create(model="tiny", messages=QUESTION, tools=tools)).choices[0]
    assert [delta.content for delta in deltas if delta.content] == ["I ", "look. "]
    first_call = next(place for place, delta in enumerate(deltas) if delta.tool_calls)
    assert all(not delta.content for delta in deltas[first_call:])
    assert (whole.message.content, read(whole.message.tool_calls)) == (
        "I look. ",
        [(c.call_id, c.name, c.arguments) for c in CALLS[:1]],
    )


@pytest.mark.parametrize("is_stream", [False, True])
async def test_several_answers_have_places(is_stream: bool) -> None:
    choices = (Choice(text="19", logprobs=(ROW,)), Choice(text="20", finish_reason="length"))
    async with official(FakeService(overrides={"text": "19", "choices": choices})) as client:
        if is_stream:
            stream = await client.chat.completions.create(model="tiny", messages=QUESTION, n=2, logprobs=True, stream=True)
            texts, ends, rows = {0: "", 1: ""}, {}, []
            async for chunk in stream:
                for part in chunk.choices:
                    texts[part.index] += part.delta.content or ""
                    ends |= {part.index: part.finish_reason} if part.finish_reason else {}
                    rows += part.logprobs.content or [] if part.logprobs else []
        else:
            reply = await client.chat.completions.create(model="tiny", messages=QUESTION, n=2, logprobs=True)
            texts = {part.index: part.message.content or "" for part in reply.choices}
            ends = {part.index: part.finish_reason for part in reply.choices}
            rows = [row for part in reply.choices for row in (part.logprobs.content or [] if part.logprobs else [])]
        plain = await client.completions.create(model="tiny", prompt="1", n=2)
    assert (texts, ends) == ({0: "19", 1: "20"}, {0: "stop", 1: "length"})
    assert [row.model_dump() for row in rows] == [ROW]
    assert [part.text for part in plain.choices] == ["19", "20"]


class Wanted(BaseModel):
    """A form that the official client parses replies into."""

    answer: int


async def test_the_official_clients_parse_helper_works() -> None:
    service = FakeService(overrides={"text": '{"answer": 19}', "choices": (Choice(text='{"answer": 19}'),)})
    async with official(service) as client:
        reply = await client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Wanted)
        async with client.chat.completions.stream(model="tiny", messages=QUESTION, response_format=Wanted) as stream:
            streamed = await stream.get_final_completion()
    assert reply.choices[0].message.parsed == streamed.choices[0].message.parsed == Wanted(answer=19)
    final = service.asked[0][0].final
    assert final is not None
    assert (final.schema_name, final.is_strict, (final.schema or {})["required"]) == ("Wanted", True, ["answer"])
