"""The call that writes a client's answer: who makes it, what it is asked, repairs, refusals, several answers, and its step."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from dmoa.agents.summarizer import LlmSummarizer, SelectSummarizer
from dmoa.config import SUMMARIZER, SummarizerConfig
from dmoa.dispatch import Dispatcher
from dmoa.errors import AgentUnavailableError, DeadlineError, EmptyAnswerError, NoAgentError, RequestError
from dmoa.orchestrator import Orchestrator
from dmoa.testing import Fail, FakeAgents, Say, Schedule, answer_of, asks, card, jumping, query
from dmoa.trace import AnsweredQuery, reply_dmoa
from dmoa.types import (
    AgentCall,
    AgentReply,
    AgentStatus,
    Answer,
    FinalCall,
    FinishReason,
    QueryState,
    StepRecord,
    TextDelta,
    TokenUsage,
    ToolCall,
)

TOOLS = ({"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},)
NATIVE = frozenset({"tools", "schema", "logprobs"})
PROMPTED = frozenset({"tool_prompt"})
GUIDED = frozenset({"tool_prompt", "schema"})
OWN = frozenset({"tools", "tool_prompt", "schema", "logprobs"})
CALL = '{"tool_calls": [{"name": "add", "arguments": {"a": 1}}]}'
FORM: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


class Writers:
    """An `AgentClient` whose agents say `work` in steps, and in final calls what is next on their lists."""

    def __init__(self, *finals: AgentReply | str, work: str = "It is 19.") -> None:
        self._finals = [AgentReply(agent="", status="ok", text=one) if isinstance(one, str) else one for one in finals]
        self._work = work
        self.calls: list[AgentCall] = []

    @property
    def finals(self) -> list[AgentCall]:
        return [call for call in self.calls if call.final]

    async def call(self, call: AgentCall) -> AgentReply:
        self.calls.append(call)
        usage = TokenUsage(prompt_tokens=10, completion_tokens=4)
        if call.final is None:
            return AgentReply(agent=call.agent, status="ok", text=self._work, usage=usage)
        return replace(self._finals[min(len(self.finals), len(self._finals)) - 1], agent=call.agent, usage=usage)

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        reply = await self.call(call)
        yield TextDelta(text=reply.text[:2])
        yield TextDelta(text=reply.text[2:])
        yield reply

    async def ping(self, agent: str) -> None:
        return None


def orchestrator(agents: Writers, *, llm: bool = False, **abilities: frozenset[str]) -> Orchestrator:
    """An orchestrator over agents with these abilities; with `llm` the summarizer, which has those of `one`, writes."""
    cards = {name: card(name, abilities=known, engine=f"engine-of-{name}") for name, known in abilities.items()}
    config = SummarizerConfig(mode="llm", llm="tiny") if llm else SummarizerConfig()
    return Orchestrator(
        dispatcher=Dispatcher(agents=agents, cards=cards, router=None, is_select=not llm),
        summarizer=LlmSummarizer(agents, config) if llm else SelectSummarizer(),
        writer=card(SUMMARIZER, abilities=abilities["one"]) if llm else None,
    )


async def written(agents: Writers, final: FinalCall, *, llm: bool = False, **abilities: frozenset[str]) -> Answer:
    """The answer of a query in one step that asks all agents."""
    asked = replace(query(sampling={"seed": 5, "max_tokens": 60}), final=final)
    built = orchestrator(agents, llm=llm, **abilities)
    built.check(asked)
    return await answer_of(built, asked, Schedule(asks(*abilities, ends_with="schedule")))


async def test_agents_work_without_tools_and_the_chosen_one_gets_them() -> None:
    calls = (ToolCall(call_id="c1", name="add", arguments='{"a": 1}'), ToolCall(call_id="c2", name="add", arguments='{"a": 2}'))
    agents = Writers(AgentReply(agent="", status="ok", tool_calls=calls))
    answer = await written(agents, FinalCall(tools=TOOLS), one=NATIVE, two=NATIVE)
    work = [call for call in agents.calls if not call.final]
    assert [call.agent for call in work] == ["one", "two"]
    assert "add" not in work[0].messages[-1].content
    (final,) = agents.finals
    assert (final.agent, final.final, final.step) == ("one", FinalCall(tools=TOOLS), 1)
    assert final.messages[-1].content.startswith(
        "What is 12 + 7?\n\nWork so far, step 1:\nIt is 19.\n\nAnswer the question above."
    )
    assert answer.choices[0].tool_calls == calls
    assert (answer.text, answer.choices[0].finish_reason, answer.finish_reason) == ("", "tool_calls", "stop")


async def test_the_final_call_is_told_the_answer_that_the_policy_ended_with() -> None:
    """A search that a budget cut: its best answer is the first of two, by `two`; its last is by `one`."""

    class Search(Schedule):
        def ended(self, state: QueryState) -> str:
            return state.steps[0].summary

    agents = FakeAgents({"two": (Say(text="It is 19."), Say(text='{"n": 19}')), "one": Say(text="It is 20.")})
    cards = {name: card(name, abilities=NATIVE) for name in ("one", "two")}
    loop = Orchestrator(
        dispatcher=Dispatcher(agents=agents, cards=cards, router=None, is_select=True),
        summarizer=SelectSummarizer(),
    )
    asked = replace(query(budget_calls=2, max_steps=9), final=FinalCall(schema=FORM))
    answer = await answer_of(loop, asked, Search(asks("two", fold="pass"), asks("one", fold="pass")))
    assert answer.stop_reason == "budget_calls"
    assert [call.agent for call in agents.calls] == ["two", "one", "two"], "the author of the answer writes it"
    assert (
        agents.calls[-1]
        .messages[-1]
        .content.startswith(
            "What is 12 + 7?\n\nWork so far, step 1:\nIt is 19.\n\nWork so far, step 2:\nIt is 19.\n\nAnswer the question above."
        )
    )
    assert [step.summary for step in answer.steps[:2]] == ["It is 19.", "It is 20."], "what the steps came to is kept"


async def test_the_final_call_is_a_step_and_counts() -> None:
    answer = await written(Writers("19"), FinalCall(n=1, schema={}, schema_name="any"), one=NATIVE)
    assert [(step.step, step.active, step.summary) for step in answer.steps] == [(0, ("one",), "It is 19."), (1, ("one",), "19")]
    assert (answer.usage.total, answer.text, answer.stop_reason) == (28, "19", "schedule")
    assert [len(step.agents) for step in reply_dmoa(answer).steps] == [1, 1]


async def test_in_mode_llm_the_summarizer_writes() -> None:
    agents = Writers('{"n": 19}', work="FINAL\n19")
    answer = await written(agents, FinalCall(schema=FORM, schema_name="f"), llm=True, one=GUIDED)
    assert [call.agent for call in agents.finals] == [SUMMARIZER]
    assert answer.text == '{"n": 19}'
    last = answer.steps[-1]
    assert (last.replies, last.active, last.summarizer.verdict, last.summarizer.usage.total) == ((), (), "final", 14)


async def test_who_cannot_is_passed_over_and_where_nobody_can_it_is_a_400() -> None:
    agents = Writers(AgentReply(agent="", status="ok", tool_calls=(ToolCall(call_id="c", name="add", arguments="{}"),)))
    await written(agents, FinalCall(tools=TOOLS), one=frozenset(), two=NATIVE)
    assert [call.agent for call in agents.finals] == ["two"]
    for final, param in ((FinalCall(tools=TOOLS), "tools"), (FinalCall(top_logprobs=0), "logprobs")):
        with pytest.raises(
            RequestError, match=rf"^{param}: it is not supported by the engine of the pool \(engine-of-one\)"
        ) as caught:
            await written(Writers("x"), final, one=frozenset({"template"}))
        assert (caught.value.param, caught.value.code, caught.value.status) == (param, "unsupported", 400)


def test_recorded_agents_answer_in_no_form() -> None:
    cards = {"one": card("one", is_recorded=True, engine="recorded")}
    dispatcher = Dispatcher(agents=Writers(), cards=cards, router=None, is_select=True)
    built = Orchestrator(dispatcher=dispatcher, summarizer=SelectSummarizer())
    for final, param in ((FinalCall(schema={}), "response_format"), (FinalCall(n=2), "n")):
        with pytest.raises(RequestError) as caught:
            built.check(replace(query(), final=final))
        assert caught.value.param == param


async def test_a_named_agent_alone_is_looked_at() -> None:
    built = orchestrator(Writers("x"), one=frozenset(), two=NATIVE)
    with pytest.raises(RequestError, match=r"the engine of the agent \(engine-of-one\)"):
        built.check(replace(query(), final=FinalCall(tools=TOOLS)), "one")
    built.check(replace(query(), final=FinalCall(tools=TOOLS)), "two")


@pytest.mark.parametrize("replies", [(CALL,), ("I call add.", " 1}}]}"), ("I call add.", " 1}. Done.")])
async def test_tools_are_asked_for_in_words_and_once_more_where_the_form_is_wrong(replies: tuple[str, ...]) -> None:
    agents = Writers(*replies)
    answer = await written(agents, FinalCall(tools=TOOLS, tool_choice="required"), one=PROMPTED)
    assert [(call.name, call.arguments) for call in answer.choices[0].tool_calls] == [("add", '{"a": 1}')]
    assert answer.text == ""
    first, *repairs = agents.finals
    assert first.final == FinalCall(tool_choice="required")
    assert "Call at least one of them." in first.messages[-1].content
    assert len(repairs) == len(replies) - 1
    for call in repairs:
        assert [message.role for message in call.messages[-2:]] == ["user", "assistant"]
        assert 'Call the tool add, in JSON with "a" (integer).' in call.messages[-2].content
        assert call.messages[-1].content == '{"tool_calls": [{"name": "add", "arguments": {"a":'
        assert call.call_id != first.call_id
    assert len(answer.steps[-1].replies) == len(replies)


async def test_with_tools_in_words_a_plain_text_is_an_answer() -> None:
    answer = await written(Writers("It is 19."), FinalCall(tools=TOOLS), one=PROMPTED)
    assert (answer.text, answer.choices[0].tool_calls, answer.choices[0].finish_reason) == ("It is 19.", (), "stop")


async def test_guided_engines_get_the_schema_of_calls_that_must_be_made() -> None:
    agents = Writers(CALL)
    await written(agents, FinalCall(tools=TOOLS, tool_choice="=add"), one=GUIDED)
    (call,) = agents.finals
    assert call.final is not None
    assert call.final.tools == ()
    assert call.final.schema["properties"]["tool_calls"]["minItems"] == 1
    assert call.sampling.template == (("enable_thinking", False),)


@pytest.mark.parametrize("abilities", [frozenset(), PROMPTED, NATIVE])
@pytest.mark.parametrize("replies", [('{"n": 1}',), ('{"n": "x"}', '```json\n{"n": 1}\n```')])
async def test_answers_match_the_schema(abilities: frozenset[str], replies: tuple[str, ...]) -> None:
    if abilities == PROMPTED:  # the form is begun for it
        replies = (replies[0], *(" 1}" for _ in replies[1:]))
    agents = Writers(*replies)
    asked = replace(query(), final=FinalCall(schema=FORM, schema_name="f"), is_streamed=False)
    answer = await answer_of(orchestrator(agents, one=abilities), asked, Schedule(asks("one", ends_with="schedule")))
    assert json.loads(answer.text) == {"n": 1}
    assert len(agents.finals) == len(replies)
    assert (agents.finals[0].final == FinalCall(schema=FORM, schema_name="f")) == ("schema" in abilities)


@pytest.mark.parametrize(
    ("final", "param"), [(FinalCall(schema=FORM), "response_format"), (FinalCall(tools=TOOLS, tool_choice="required"), "tools")]
)
async def test_a_second_wrong_answer_is_a_422_with_its_text(final: FinalCall, param: str) -> None:
    agents = Writers("first", "second")
    with pytest.raises(RequestError, match=r"its text: .*second$") as caught:
        await written(agents, final, one=PROMPTED)
    assert (caught.value.param, caught.value.code, caught.value.status) == (param, "invalid_answer", 422)
    assert len(agents.finals) == 2


async def test_schemas_that_cannot_be_used_are_refused_before_anybody_is_asked() -> None:
    agents = Writers("x")
    for final, param in (
        (FinalCall(schema={"type": "x"}), "response_format"),
        (FinalCall(tools=({"name": "f", "parameters": {"patternProperties": {"a": {}}}},)), "tools[0]"),
    ):
        with pytest.raises(RequestError) as caught:
            await written(agents, final, one=PROMPTED)
        assert (caught.value.param, caught.value.code) == (param, "invalid_schema")
    assert agents.calls == []


async def test_a_text_that_a_limit_cut_is_given_as_it_is() -> None:
    cut: FinishReason = "length"
    answer = await written(
        Writers(AgentReply(agent="", status="ok", text='{"n": ', finish_reason=cut)), FinalCall(schema=FORM), one=NATIVE
    )
    assert (answer.text, answer.choices[0].finish_reason, answer.finish_reason) == ('{"n":', "length", "length")


@pytest.mark.parametrize(("arguments", "reason"), [('{"a": 1}', "tool_calls"), ('{"a": ', "length")])
async def test_a_call_that_a_limit_cut_is_told_as_cut(arguments: str, reason: str) -> None:
    calls = tuple(ToolCall(call_id=f"c{i}", name="add", arguments=said) for i, said in enumerate(('{"a": 0}', arguments)))
    agents = Writers(AgentReply(agent="", status="ok", tool_calls=calls, finish_reason="length"))
    answer = await written(agents, FinalCall(tools=TOOLS), one=NATIVE)
    assert (answer.choices[0].tool_calls, answer.choices[0].finish_reason) == (calls, reason)


async def test_several_answers_have_seeds_of_their_own() -> None:
    agents = Writers("a", "b", "c")
    answer = await written(agents, FinalCall(n=3), one=frozenset())
    assert sorted(choice.text for choice in answer.choices) == ["a", "b", "c"]
    assert answer.text == answer.choices[0].text
    assert sorted((call.sampling.seed, call.sample) for call in agents.finals) == [(5, 0), (6, 1), (7, 2)]
    assert len({call.call_id for call in agents.finals}) == 3
    assert all(call.sampling.max_tokens == 60 for call in agents.finals)


@pytest.mark.parametrize(("final", "pieces"), [(FinalCall(tools=TOOLS), ["19", " it is"]), (FinalCall(n=2), [])])
async def test_text_is_handed_on_where_it_is_sure_to_be_the_answer(final: FinalCall, pieces: list[str]) -> None:
    asked = replace(query(), final=final, is_streamed=True)
    built = orchestrator(Writers("19 it is"), one=NATIVE)
    events = [event async for event in built.answer(asked, Schedule(asks("one", ends_with="single")))]
    assert [event.text for event in events if isinstance(event, TextDelta)] == pieces
    assert [type(event) for event in events if not isinstance(event, TextDelta)] == [StepRecord, StepRecord, Answer]


@pytest.mark.parametrize(
    ("replies", "pieces", "text", "calls"),
    [
        (("It is 19.",), ["It is 19."], "It is 19.", 0),
        (("It is `19`.",), ["It is "], "It is `19`.", 0),
        ((f"I look. {CALL}",), ["I look. "], "I look. ", 1),
        ((CALL,), [], "", 1),
        (('I look. {"tool_calls": [{"name": "x", "arguments": {}}]}', CALL), ["I look. "], "I look. ", 1),
        (('I look. {"tool_calls": [{"name": "x", "arguments": {}}]}', "It is 19."), ["I look. "], "I look. \n\nIt is 19.", 0),
    ],
)
async def test_with_tools_in_words_text_is_handed_on_up_to_where_a_call_may_begin(
    replies: tuple[str, ...], pieces: list[str], text: str, calls: int
) -> None:
    asked = replace(query(), final=FinalCall(tools=TOOLS), is_streamed=True)
    built = orchestrator(Writers(*replies), one=PROMPTED)
    events = [event async for event in built.answer(asked, Schedule(asks("one", ends_with="single")))]
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "".join(pieces)
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert (answer.text, len(answer.choices[0].tool_calls)) == (text, calls)


@pytest.mark.parametrize(
    ("replies", "pieces", "asked"),
    [
        (('{"n": 19}',), ['{"', 'n": 19}'], 1),
        (('\n {"n": 19}\n\nThat is it: {}',), ['{"n": 19}'], 1),
        (('{"n": 19, "s": "}\\"]"} so',), ['{"', 'n": 19, "s": "}\\"]"}'], 1),
        (('```json\n{"n": 19}\n```',), [], 1),
        (('So: {"n": 19}',), [], 1),
        (("Nineteen.", '{"n": 19}'), [], 2),
    ],
)
async def test_a_form_is_the_same_streamed_and_whole(replies: tuple[str, ...], pieces: list[str], asked: int) -> None:
    texts = []
    for is_streamed in (False, True):
        agents, final = Writers(*replies), FinalCall(schema=FORM, schema_name="f")
        wanted = replace(query(), final=final, is_streamed=is_streamed)
        built = orchestrator(agents, one=NATIVE)
        events = [event async for event in built.answer(wanted, Schedule(asks("one", ends_with="single")))]
        assert [event.text for event in events if isinstance(event, TextDelta)] == (pieces if is_streamed else [])
        assert len(agents.finals) == asked
        assert isinstance(events[-1], Answer)
        texts.append(events[-1].text)
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["n"] == 19
    assert texts[1].startswith("".join(pieces))


@pytest.mark.parametrize("said", ['{"m": 1}', '{"m": {"n": 19}, x}'])
async def test_a_form_that_was_begun_wrong_in_a_stream_is_an_error(said: str) -> None:
    wanted = replace(query(), final=FinalCall(schema=FORM, schema_name="f"), is_streamed=True)
    with pytest.raises(RequestError, match="its text: "):
        await answer_of(orchestrator(Writers(said), one=NATIVE), wanted, Schedule(asks("one", ends_with="single")))


async def test_calls_that_an_engine_read_of_its_own_model_are_checked_and_asked_for_once_more() -> None:
    wrong, right = (ToolCall(call_id="c", name=name, arguments='{"a": 1}') for name in ("ad", "add"))
    agents = Writers(*(AgentReply(agent="", status="ok", tool_calls=(call,)) for call in (wrong, right)))
    answer = await written(agents, FinalCall(tools=TOOLS, tool_choice="required"), one=OWN)
    assert answer.choices[0].tool_calls == (right,)
    first, repair = agents.finals
    assert first.final == FinalCall(tools=TOOLS, tool_choice="required")
    assert first.sampling.template == (("enable_thinking", False),)
    assert "'ad' is called; expected add" in repair.messages[-1].content


async def test_with_tools_a_model_of_ones_own_is_guided_to_no_schema() -> None:
    agents = Writers('{"n": "x"}', '{"n": 1}')
    final = FinalCall(tools=TOOLS, schema=FORM, schema_name="f")
    answer = await written(agents, final, one=OWN)
    assert answer.text == '{"n": 1}'
    assert [call.final and call.final.schema for call in agents.finals] == [None, None]
    assert "JSON Schema" in agents.finals[0].messages[-1].content


@pytest.mark.parametrize(
    ("status", "reason", "error"),
    [
        ("late", "error", DeadlineError),
        ("failed", "error", NoAgentError),
        ("failed", "length", RequestError),
        ("ok", "stop", EmptyAnswerError),
    ],
)
async def test_a_final_call_that_is_lost(status: AgentStatus, reason: FinishReason, error: type[Exception]) -> None:
    reply = AgentReply(agent="", status=status, finish_reason=reason, error="why")
    with pytest.raises(error):
        await written(Writers(reply), FinalCall(n=1, top_logprobs=0), one=NATIVE)


@pytest.mark.parametrize(
    ("final", "said", "is_answered"),
    [
        (FinalCall(tools=TOOLS), "", True),
        (FinalCall(tools=TOOLS), "19 is", False),  # its words are with the client already
        (FinalCall(tools=TOOLS, tool_choice="required"), "", False),
        (FinalCall(tools=TOOLS, schema=FORM, schema_name="f"), "", False),
        (FinalCall(tools=TOOLS, n=2), "", False),
        (FinalCall(top_logprobs=0), "", False),
    ],
)
async def test_where_a_text_will_do_a_deadline_ends_with_the_best_one_so_far(
    final: FinalCall, said: str, is_answered: bool
) -> None:
    late = Writers(AgentReply(agent="", status="late", text=said, error="too late"))
    if not is_answered:
        with pytest.raises(DeadlineError, match="final call"):
            await written(late, final, one=NATIVE)
        return
    answer = await written(late, final, one=NATIVE)
    assert (answer.text, answer.stop_reason, answer.finish_reason, answer.degraded) == ("It is 19.", "deadline", "stop", True)
    assert (len(answer.steps), answer.choices, answer.usage.total) == (1, (), 14)


class Dying(Writers):
    """The place of whoever writes dies, so many times."""

    def __init__(self, *finals: str, deaths: int, work: str = "It is 19.") -> None:
        super().__init__(*finals, work=work)
        self._deaths = deaths

    async def call(self, call: AgentCall) -> AgentReply:
        if call.final and self._deaths:
            self._deaths -= 1
            raise AgentUnavailableError("replica died")
        return await super().call(call)


@pytest.mark.parametrize("llm", [False, True])
def test_a_final_call_that_is_lost_with_its_place_is_sent_again_once_it_is_back(llm: bool) -> None:
    agents = Dying('{"n": 19}', deaths=2, work="FINAL\n19")
    answer, _ = jumping(written(agents, FinalCall(schema=FORM, schema_name="f"), llm=llm, one=GUIDED))
    assert answer.text == '{"n": 19}'
    assert answer.degraded or llm
    assert len(answer.steps) == 2


def test_a_final_call_whose_place_does_not_come_back_is_given_up() -> None:
    with pytest.raises(NoAgentError, match="replica died"):
        jumping(written(Dying("19", deaths=1000), FinalCall(n=1), one=NATIVE))


@pytest.mark.parametrize("llm", [False, True])
async def test_a_trace_holds_what_the_final_call_was_asked(llm: bool) -> None:
    agents = Writers('{"n": 19}', work="FINAL\n19")
    final = FinalCall(schema=FORM, schema_name="f")
    answer = await written(agents, final, llm=llm, one=GUIDED)
    calls = AnsweredQuery(query=query(), answer=answer).trace().calls
    assert [call.agent for call in calls if call.step == 1] == [SUMMARIZER if llm else "one"]
    assert calls[-1].messages[-1]["content"] == agents.finals[0].messages[-1].content
    assert calls[-1].started_ms >= 0


async def test_work_of_which_no_text_leaves_goes_on_with_another_agent() -> None:
    """The client is to get a form, so what is said before is not streamed, and who is lost in the midst of it is replaced."""
    agents = FakeAgents({"one": Fail(pieces=("It", " is")), "two": (Say(text="19"), Say(text='{"n": 19}'))})
    loop = Orchestrator(
        dispatcher=Dispatcher(
            agents=agents,
            cards={name: card(name, abilities=NATIVE) for name in ("one", "two")},
            router=None,
            is_select=True,
        ),
        summarizer=SelectSummarizer(),
    )
    plan = asks("one", reserves=["two"], fold="pass", ends_with="single")
    asked = replace(query(), final=FinalCall(schema=FORM, schema_name="f"))
    assert (await answer_of(loop, asked, Schedule(plan))).text == '{"n": 19}'
