"""The Responses API through the official openai client: texts, tools, forms, events, and what a stateless server refuses."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from dmoa.errors import NoAgentError, RequestError
from dmoa.types import Choice, Event, FinalCall, Message, Query, TextDelta, ToolCall
from tests.unit.serving.fake_service import FakeService, connect, make_answer, make_app
from tests.unit.serving.test_http_chat import official

PATH = "/v1/responses"
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD: Any = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": False}
CALL = ToolCall(call_id="call_1", name="add", arguments=json.dumps({"a": 1, "why": "x" * 90}))
CALLS = [
    {"role": "user", "content": "Hi"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call", "call_id": "d", "name": "g", "arguments": "{}"},
]
CALLED: dict[str, Any] = {"text": "", "choices": (Choice(text="", tool_calls=(CALL,), finish_reason="tool_calls"),)}


async def asked(**body: Any) -> FakeService:
    """The service that answered a body."""
    service = FakeService()
    async with connect(make_app(service)) as client:
        response = await client.post(PATH, json={"model": "tiny", "input": "What is 12 + 7?"} | body)
    assert response.status_code == 200, response.text
    return service


async def test_a_question_is_answered_and_nothing_is_stored() -> None:
    async with official(FakeService()) as client:
        reply = await client.responses.create(model="tiny", input="What is 12 + 7?", instructions="Be brief.", store=False)
    assert (reply.output_text, reply.status, reply.store, reply.object) == ("The answer is 19.", "completed", False, "response")
    assert [type(item) for item in reply.output] == [ResponseOutputMessage]
    usage = reply.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens, usage.input_tokens_details.cached_tokens) == (
        50,
        20,
        70,
        26,
    )
    assert (reply.model_extra or {})["dmoa"]["stop_reason"] == "agreement"
    assert reply.id == f"resp_{(reply.model_extra or {})['dmoa']['trace_id']}"


async def test_fields_and_items_reach_the_swarm() -> None:
    conversation = [
        {"role": "developer", "content": "Use digits."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "12 + 7?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}', "id": "fc_1", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "19"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "noon"}]},
    ]
    service = await asked(
        input=conversation, instructions="Be brief.", max_output_tokens=9, temperature=0.5, metadata={"a": 1}, user="u",
        dmoa={"max_steps": 1}, tools=[ADD], tool_choice={"type": "function", "name": "add"}, parallel_tool_calls=False,
    )  # fmt: skip
    query = service.asked[0][0]
    assert (query.text, query.system, query.turns) == ("12 + 7?", "Be brief.\n\nUse digits.", ())
    assert query.exchange == 'Called add with {"a": 1}\nCalled now with {}\nResult of add: 19\nResult of now: noon'
    assert (query.sampling, query.limits.max_steps) == ({"temperature": 0.5, "max_tokens": 9}, 1)
    function = {"name": "add", "parameters": PARAMETERS, "strict": False}
    assert query.final == FinalCall(tools=(function,), tool_choice="=add", is_parallel=False)
    assert (service.recorded[0]["user"], service.recorded[0]["metadata"]) == ("u", {"a": "1"})


async def test_what_was_answered_may_be_sent_back() -> None:
    service = FakeService()
    async with official(service) as client:
        first = await client.responses.create(model="tiny", input="Hi")
        back: Any = [{"role": "user", "content": "Hi"}, *first.output, {"role": "user", "content": "Sure?"}]
        await client.responses.create(model="tiny", input=back)
    assert service.asked[1][0].turns == (
        Message(role="user", content="Hi"),
        Message(role="assistant", content="The answer is 19."),
    )


async def test_calls_of_tools_whole_and_streamed() -> None:
    async with official(FakeService(overrides=CALLED)) as client:
        whole = await client.responses.create(model="tiny", input="Hi", tools=[ADD])
        async with client.responses.stream(model="tiny", input="Hi", tools=[ADD]) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_response()
    for reply in (whole, streamed):
        (item,) = reply.output
        assert isinstance(item, ResponseFunctionToolCall)
        assert (item.call_id, item.name, item.arguments) == (CALL.call_id, CALL.name, CALL.arguments)
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


async def test_text_beside_calls_is_a_message_ahead_of_them() -> None:
    choice = Choice(text="I look. ", tool_calls=(CALL,), finish_reason="tool_calls")
    service = FakeService(overrides={"text": choice.text, "choices": (choice,)}, deltas=("I ", "look. "))
    async with official(service) as client:
        whole = await client.responses.create(model="tiny", input="Hi", tools=[ADD])
        async with client.responses.stream(model="tiny", input="Hi", tools=[ADD]) as stream:
            pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            streamed = await stream.get_final_response()
    assert pieces == ["I ", "look. "]
    for reply in (whole, streamed):
        assert [item.type for item in reply.output] == ["message", "function_call"]
        assert reply.output_text == "I look. "


@pytest.mark.parametrize("deltas", [(), ("The ans", "wer is 19.")])
async def test_a_stream_tells_thoughts_then_the_text(deltas: tuple[str, ...]) -> None:
    service = FakeService(deltas=deltas, overrides={"reasoning": "" if deltas else "7 more than 12"})
    async with (
        official(service) as client,
        client.responses.stream(model="tiny", input="Hi", reasoning={"summary": "auto", "effort": "low"}) as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == "The answer is 19."
    thought, message = final.output
    assert isinstance(thought, ResponseReasoningItem)
    assert isinstance(message, ResponseOutputMessage)
    assert thought.summary[0].text.startswith("Step 1: adder (p 0.625, entropy 0.500 nats)")
    assert thought.summary[0].text.endswith("" if deltas else "7 more than 12")
    said = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert said == (list(deltas) or ["The answer is 19."])
    assert events[-1].type == "response.completed"


async def test_items_of_a_stream_have_ids_of_their_own_where_a_thought_comes_between() -> None:
    class Pondering(FakeService):
        async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
            answer = make_answer(query.trace_id, reasoning="Hm.")
            said = (TextDelta(text="The ans"), TextDelta(text="Hm.", is_reasoning=True), TextDelta(text="wer is 19."))
            for event in (answer.steps[0], *said, answer.steps[1], answer):
                yield event

    asked: Any = {"model": "tiny", "input": "Hi", "reasoning": {"summary": "auto"}}
    async with official(Pondering()) as client, client.responses.stream(**asked) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "reasoning", "message"]
    assert len({item.id for item in final.output}) == 4
    assert final.output_text == "The answer is 19."
    places = {(event.output_index, event.item_id) for event in events if hasattr(event, "item_id")}
    assert places == {(place, item.id) for place, item in enumerate(final.output)}


async def test_a_cut_text_is_incomplete() -> None:
    async with official(FakeService(overrides={"finish_reason": "length"})) as client:
        reply = await client.responses.create(model="tiny", input="Hi")
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"


class Wanted(BaseModel):
    """A form that the official client parses replies into."""

    answer: int


async def test_the_official_clients_parse_helper_works() -> None:
    service = FakeService(overrides={"text": '{"answer": 19}', "choices": (Choice(text='{"answer": 19}'),)})
    async with official(service) as client:
        reply = await client.responses.parse(model="tiny", input="Hi", text_format=Wanted)
    assert reply.output_parsed == Wanted(answer=19)
    final = service.asked[0][0].final
    assert final is not None
    assert (final.schema_name, final.is_strict) == ("Wanted", True)


@pytest.mark.parametrize(
    ("body", "listed"),
    [
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["reasoning.encrypted_content"]}, None),
        ({"include": 7}, None),
    ],
)
async def test_log_probabilities_may_be_included(body: dict[str, Any], listed: int | None) -> None:
    final = (await asked(**body)).asked[0][0].final
    assert (final and final.top_logprobs) == listed
    refusal = FakeService(error=RequestError("logprobs: it is not supported", param="logprobs", code="unsupported"))
    async with connect(make_app(refusal)) as client:
        response = await client.post(PATH, json={"model": "tiny", "input": "Hi"} | body)
    assert response.json()["error"]["param"] == "include"


async def test_what_a_form_is_for_is_told() -> None:
    service = await asked(text={"format": {"type": "json_schema", "name": "f", "description": "A sum.", "schema": {}}})
    assert service.asked[0][0].final == FinalCall(schema={}, schema_name="f", schema_description="A sum.")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"store": True}, "store", "unsupported"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported"),
        ({"conversation": "c"}, "conversation", "unsupported"),
        ({"background": True}, "background", "unsupported"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "unsupported"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": [ADD, ADD | {"name": "a b"}]}, "tools[1].name", "invalid_value"),
        ({"tools": [ADD | {"parameters": {"a": "x" * 70000}}]}, "tools[0].parameters", "invalid_value"),
        ({"tool_choice": {"type": "function", "name": "a" * 200}}, "tool_choice.name", "invalid_value"),
        ({"input": "  "}, "input", "invalid_value"),
        ({"input": "  ", "instructions": "Be brief."}, "input", "invalid_value"),
        ({"input": [{"type": "reasoning"}], "instructions": "Be brief."}, "input", "invalid_value"),
        ({"input": [{"role": "user", "content": " "}], "instructions": "x"}, "input[0].content", "invalid_value"),
        ({"input": [*CALLS, {"role": "user", "content": " "}], "instructions": "x"}, "input[3].content", "invalid_value"),
        ({"input": [*CALLS, {"role": "assistant", "content": "x"}]}, "input[3].role", "invalid_value"),
        ({"input": CALLS}, "input[2]", "invalid_value"),
        ({"input": [*CALLS, {"type": "function_call", "name": "x" * 300}]}, "input[3].name", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "schema": {"a": "x" * 70000}}}}, "text.format.schema", "invalid_value"),
        ({"tool_choice": 7}, "tool_choice", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
    ],
)
async def test_what_is_refused(body: dict[str, Any], param: str, code: str) -> None:
    service = FakeService()
    async with connect(make_app(service, max_body_bytes=2**17)) as client:
        response = await client.post(PATH, json={"model": "tiny", "input": "Hi"} | body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert error["message"].startswith(param)
    assert service.asked == []


@pytest.mark.parametrize(("error_at", "is_stream"), [(0, False), (0, True), (1, True)])
@pytest.mark.parametrize(("old", "new"), [("response_format", "text.format"), ("messages", "input"), ("tools", "tools")])
async def test_an_error_on_the_way_names_fields_as_the_request(old: str, new: str, error_at: int, is_stream: bool) -> None:
    service = FakeService(error=RequestError(f"{old}: it is wrong", param=old, code="x", status=422), error_at=error_at)
    async with connect(make_app(service)) as client:
        response = await client.post(PATH, json={"model": "tiny", "input": "Hi", "stream": is_stream})
    text = response.text.replace(" ", "")
    assert response.status_code == (200 if error_at else 422)
    assert f'"param":"{new}"' in text
    assert f"{new}:itiswrong" in text


async def test_unknown_fields_are_named_and_an_error_in_mid_stream_is_an_event() -> None:
    async with connect(make_app(FakeService(error=NoAgentError("all gone"), error_at=1))) as client:
        response = await client.post(PATH, json={"model": "tiny", "input": "Hi", "stream": True, "odd": 1})
    assert response.headers["x-dmoa-ignored"] == "odd"
    last = response.text.split("\n\n")[-2]
    assert last.startswith("event: error\n")
    assert json.loads(last.partition("data: ")[2]) | {"sequence_number": 0} == {
        "type": "error",
        "sequence_number": 0,
        "code": "no_agent",
        "message": "all gone",
        "param": None,
    }


async def test_fields_of_every_depth_are_named_and_those_of_chat_requests_are_taken() -> None:
    service = FakeService()
    said = [
        {"role": "user", "content": "Hi", "odd": 1},
        {"role": "assistant", "content": "Ho", "more": 1},
        {"type": "reasoning", "new": 1},
        {"role": "user", "content": [{"type": "input_text", "text": "What is 12 + 7?", "id": 3}]},
    ]
    body = {"model": "tiny", "input": said, "seed": 3, "messages": [{"role": "user", "content": "Else"}], "n": 2, "max_tokens": 4}
    async with connect(make_app(service)) as client:
        response = await client.post(PATH, json=body | {"max_output_tokens": 9})
        strict = await client.post(PATH, json=body | {"input": [*said[1:3], {"role": "user", "content": "Hi"}]})
    assert response.status_code == strict.status_code == 200, response.text
    assert response.json()["dmoa"]["ignored"] == ["messages", "n", "input[0].odd", "input[3].content[0].id"]
    async with connect(make_app(service)) as client:
        hinted = await client.post(PATH, json=body | {"reasoning": {"effort": "low"}, "text": {"verbosity": "low"}})
    assert hinted.json()["dmoa"]["ignored"][-2:] == ["reasoning.effort", "text.verbosity"]
    query = service.asked[0][0]
    assert (query.text, query.sampling, query.final) == ("What is 12 + 7?", {"max_tokens": 9, "seed": 3}, None)
