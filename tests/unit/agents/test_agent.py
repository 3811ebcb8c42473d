"""An agent on an engine: the tool loop, sums over its rounds, streaming, and failures that become replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dmoa.agents.agent import MAX_TOOL_ROUNDS, Agent, LocalAgents
from dmoa.agents.tools import default_tools
from dmoa.config import AgentConfig
from dmoa.core.aggregate import doubt, select_contribution
from dmoa.engine_options import ScriptedOptions
from dmoa.engines.scripted import ScriptedEngine
from dmoa.errors import EngineError
from dmoa.types import AgentCall, AgentReply, EntropySum, Generation, GenerationRequest, Message, Sampling, TextDelta, TokenUsage
from tests.logged import Logged

QUESTION = Message(role="user", content="What is 12 times 7?")
ENTROPY = EntropySum(sum_nats=2.0, sq_sum=1.0, tokens=4)
USAGE = TokenUsage(prompt_tokens=10, completion_tokens=4)


def generated(text: str, **changes: Any) -> Generation:
    """A generation of 4 tokens at 0.5 nats."""
    values: dict[str, Any] = {
        "finish_reason": "stop",
        "entropy": ENTROPY,
        "usage": USAGE,
    }
    return Generation(text=text, **(values | changes))


class ListEngine:
    """Implements `Engine`: one entry per request, the last one for ever after; an exception is raised, None ends the stream."""

    label = "list"

    def __init__(self, *entries: Generation | Exception | None) -> None:
        self._entries = entries
        self.requests: list[GenerationRequest] = []
        self.streamed = 0

    async def generate(self, request: GenerationRequest) -> Generation:
        async for item in self._items(request):
            if isinstance(item, Generation):
                return item
        raise EngineError("no generation")

    def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta | Generation]:
        self.streamed += 1
        return self._items(request)

    async def _items(self, request: GenerationRequest) -> AsyncIterator[TextDelta | Generation]:
        self.requests.append(request)
        entry = self._entries[min(len(self.requests), len(self._entries)) - 1]
        if isinstance(entry, Exception):
            yield TextDelta(text="begun")
            raise entry
        if entry is not None:
            for word in entry.text.split():
                yield TextDelta(text=word)
            yield entry

    async def close(self) -> None:
        return


def agent_of(engine: Any, tools: Sequence[str] = (), **changes: Any) -> Agent:
    config = AgentConfig.model_validate({"name": "solver", "llm": "tiny", "profile": "Solves.", "tools": tools} | changes)
    return Agent(config, engine, default_tools())


@pytest.mark.parametrize(
    ("given", "price"), [(0.25, 0.25), (0.0, 0.0), (None, None), (float("nan"), None), (float("inf"), None), (-1.0, None)]
)
async def test_a_price_that_cannot_be_is_not_known(given: float | None, price: float | None) -> None:
    """An engine of a file may say anything; a reply with a price that is no number could not be told."""
    assert (await agent_of(ListEngine(generated("7", price=given))).call(call_of())).price == price


@pytest.mark.parametrize(
    ("error", "is_bug"),
    [
        (AttributeError("no attribute 'x'"), True),
        (ZeroDivisionError(), True),
        (NotImplementedError(), True),
        (EngineError("gone"), False),
        (ConnectionError("reset"), False),
        (MemoryError(), False),
    ],
)
async def test_an_error_of_code_is_told_from_one_of_the_world(error: Exception, is_bug: bool, logged: Logged) -> None:
    reply = await agent_of(ListEngine(error)).call(call_of())
    assert (reply.status, reply.is_bug) == ("failed", is_bug)
    told = [record for record in logged.records if record.levelname == "ERROR"]
    assert [record.exc_info[1] for record in told if record.exc_info] == [error] * is_bug


@pytest.mark.parametrize(
    ("text", "thought", "status"),
    [("x" * 66_000, "", "ok"), ("x" * 10_000_000, "", "failed"), ("x", "x" * 10_000_000, "failed"), ("x", "", "ok")],
)
async def test_a_reply_that_is_longer_than_its_tokens_is_no_contribution(text: str, thought: str, status: str) -> None:
    reply = await agent_of(ListEngine(generated(text, reasoning=thought))).call(call_of(max_tokens=16))
    assert reply.status == status
    assert len(reply.text) <= 263_168
    assert status == "ok" or (reply.error or "").endswith("for max_tokens 16; expected at most 263168")


@pytest.mark.parametrize("text", ["It is \ud800 19.", "\udfff"])
async def test_what_utf_8_cannot_carry_reaches_nobody(text: str) -> None:
    reply = await agent_of(ListEngine(generated(text, reasoning=text))).call(call_of())
    assert (reply.text, reply.reasoning) == (text.encode("utf-8", "replace").decode(),) * 2
    assert "?" in reply.text


@pytest.mark.parametrize("nats", [float("nan"), float("inf"), -3.0, -float("inf")])
async def test_an_entropy_that_cannot_be_is_no_confidence(nats: float) -> None:
    reply = await agent_of(ListEngine(generated("It is 18.", entropy=EntropySum(sum_nats=nats, tokens=4)))).call(call_of())
    honest = AgentReply(agent="b", status="ok", text="It is 19.", entropy=EntropySum(sum_nats=4.0, tokens=4))
    assert reply.entropy.mean_nats is None
    chosen = select_contribution([reply, honest])
    assert chosen is not None
    assert chosen.agent == "b"


def call_of(**sampling: Any) -> AgentCall:
    return AgentCall(
        trace_id="t1", step=2, agent="solver", messages=(QUESTION,), sampling=Sampling(**sampling), deadline_unix_s=99.0
    )


async def items_of(agent: Agent, call: AgentCall) -> tuple[list[str], AgentReply]:
    """The pieces of a streamed call, and its reply, which must come last."""
    items = [item async for item in agent.stream(call)]
    assert [isinstance(item, AgentReply) for item in items] == [False] * (len(items) - 1) + [True]
    reply = items[-1]
    assert isinstance(reply, AgentReply)
    return [item.text for item in items if isinstance(item, TextDelta)], reply


async def test_a_reply_without_tools_is_the_generation() -> None:
    engine = ListEngine(
        generated(" It is 84.\n", usage=replace(USAGE, cached_tokens=6), engine_ms=30.0, queue_ms=5.0, finish_reason="length")
    )
    reply = await agent_of(engine, adapter="path:/adapters/x").call(
        call_of(temperature=0.5, stop=("END",), max_tokens=20, seed=7)
    )
    assert (reply.agent, reply.status, reply.text, reply.finish_reason) == ("solver", "ok", " It is 84.\n", "length")
    assert (reply.entropy.sum_nats, reply.entropy.sq_sum, reply.entropy.tokens, reply.entropy.kind) == (2.0, 1.0, 4, "exact")
    assert (reply.usage.prompt_tokens, reply.usage.cached_tokens, reply.usage.completion_tokens, reply.engine_ms) == (
        10,
        6,
        4,
        30.0,
    )
    assert (reply.engine, reply.error, reply.attempts) == ("list", None, 1)
    (request,) = engine.requests
    assert request.messages == (QUESTION,)
    assert request.sampling == Sampling(temperature=0.5, stop=("END",), max_tokens=20, seed=7)
    assert (request.adapter, request.deadline_unix_s, request.agent) == ("path:/adapters/x", 99.0, "solver")
    assert request.call_id == "t1/2/solver"


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["sum_nats", "sq_sum", "slack_nats"])
async def test_a_round_with_an_entropy_that_is_not_a_number_leaves_nothing_known_of_the_whole(field: str, broken: float) -> None:
    engine = ListEngine(generated("<calculator>12*7", entropy=replace(ENTROPY, **{field: broken})), generated(" So 84."))
    reply = await agent_of(engine, ["calculator"]).call(call_of(max_tokens=50))
    assert (reply.status, len(engine.requests), reply.usage.completion_tokens) == ("ok", 2, 8)
    assert (reply.entropy.mean_nats, reply.entropy.tokens, reply.entropy.sum_nats, reply.entropy.sq_sum) == (None, 0, 0.0, 0.0)
    assert doubt(reply) == float("inf")


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -1.0])
def test_an_entropy_that_is_not_a_number_from_0_is_unknown_wherever_it_comes_from(broken: float) -> None:
    reply = AgentReply(agent="a", status="ok", text="84", entropy=EntropySum(sum_nats=broken, tokens=4))
    assert reply.entropy.mean_nats is None
    sure = AgentReply(agent="b", status="ok", text="85", entropy=EntropySum(sum_nats=8.0, tokens=4))
    chosen = select_contribution([reply, sure])
    assert chosen is not None
    assert chosen.agent == "b"


async def test_requests_have_names_of_their_own_and_calls_keep_theirs() -> None:
    engine = ListEngine(generated("84"))
    agent = agent_of(engine)
    for _ in range(3):
        await agent.call(call_of())
    assert len({request.request_id for request in engine.requests}) == 3
    assert {request.call_id for request in engine.requests} == {"t1/2/solver"}


async def test_a_tool_call_is_answered_and_the_reply_goes_on() -> None:
    engine = ListEngine(
        generated(
            "12 times 7: <calculator>12*7",
            usage=replace(USAGE, completion_tokens=6),
            entropy=replace(ENTROPY, sum_nats=3.0, tokens=6),
            engine_ms=30.0,
        ),
        generated(
            "Check: <calculator>84/7",
            entropy=replace(ENTROPY, sum_nats=0.25, kind="truncated"),
            usage=replace(USAGE, cached_tokens=9),
            engine_ms=20.0,
        ),
        generated("The answer is 84.", usage=replace(USAGE, prompt_tokens=30), finish_reason="length", engine_ms=10.0),
    )
    reply = await agent_of(engine, ["calculator"]).call(call_of(max_tokens=20, stop=("END",)))
    first = "12 times 7: <calculator>12*7</calculator> = 84\n"
    second = first + "Check: <calculator>84/7</calculator> = 12\n"
    assert reply.text == second + "The answer is 84."
    assert (reply.status, reply.finish_reason, reply.entropy.kind) == ("ok", "length", "truncated")
    assert (reply.entropy.sum_nats, reply.entropy.sq_sum, reply.entropy.tokens) == (3.0 + 0.25 + 2.0, 3.0, 6 + 4 + 4)
    assert (reply.usage.prompt_tokens, reply.usage.cached_tokens, reply.usage.completion_tokens) == (10 + 10 + 30, 9, 6 + 4 + 4)
    assert reply.engine_ms == 60.0
    assert [request.messages for request in engine.requests] == [
        (QUESTION,),
        (QUESTION, Message(role="assistant", content=first)),
        (QUESTION, Message(role="assistant", content=second)),
    ]
    assert [request.sampling.max_tokens for request in engine.requests] == [20, 14, 10]
    assert {request.sampling.stop for request in engine.requests} == {("END", "</calculator>")}
    assert [request.call_id for request in engine.requests] == ["t1/2/solver", "t1/2/solver#1", "t1/2/solver#2"]


async def test_the_scripted_engine_takes_part_in_the_tool_loop() -> None:
    script = "12 times 7 is <calculator>12*7</calculator>so the answer is 84."
    engine = ScriptedEngine(ScriptedOptions(replies={"solver": script}, tokens=3))
    reply = await agent_of(engine, ["calculator"]).call(call_of())
    assert reply.text == "12 times 7 is <calculator>12*7</calculator> = 84\nso the answer is 84."
    assert reply.usage.completion_tokens == 6


async def test_a_tool_that_fails_says_so_in_the_text() -> None:
    engine = ListEngine(generated("<calculator>1/0"), generated("No answer."))
    reply = await agent_of(engine, ["calculator"]).call(call_of())
    assert reply.text == "<calculator>1/0</calculator> = error: division by zero\nNo answer."


async def test_a_model_that_calls_tools_for_ever_is_stopped() -> None:
    engine = ListEngine(generated("<calculator>1+1"))
    reply = await agent_of(engine, ["calculator"]).call(call_of(max_tokens=1000))
    assert len(engine.requests) == MAX_TOOL_ROUNDS == 4
    assert (reply.status, reply.finish_reason, reply.usage.completion_tokens) == ("ok", "length", 16)
    assert reply.text == "<calculator>1+1</calculator> = 2\n" * 3 + "<calculator>1+1"


async def test_the_rounds_share_the_token_limit_of_the_call() -> None:
    engine = ListEngine(
        generated("<calculator>1+1", usage=replace(USAGE, completion_tokens=7)),
        generated("<calculator>2+2", usage=replace(USAGE, completion_tokens=3)),
    )
    reply = await agent_of(engine, ["calculator"]).call(call_of(max_tokens=10))
    assert [request.sampling.max_tokens for request in engine.requests] == [10, 3]
    assert (reply.usage.completion_tokens, reply.finish_reason) == (10, "length")


async def test_tags_are_text_to_an_agent_without_tools() -> None:
    engine = ListEngine(generated("<calculator>1+1"))
    reply = await agent_of(engine).call(call_of(stop=("END",)))
    assert (reply.text, len(engine.requests)) == ("<calculator>1+1", 1)
    assert engine.requests[0].sampling.stop == ("END",)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (EngineError("prompt of 9000 tokens, at most 2048"), "prompt of 9000 tokens, at most 2048"),
        (OSError("GET https://me:pw@host/x?token=abc"), "OSError: GET https://[redacted]@host/x?token=[redacted]"),
        (RuntimeError("device lost"), "RuntimeError: device lost"),
    ],
)
@pytest.mark.parametrize("rounds_before", [0, 1])
async def test_whatever_the_engine_raises_is_the_agents_own_failure(entry: Exception, message: str, rounds_before: int) -> None:
    engine = ListEngine(*[generated("<calculator>1+1")] * rounds_before, entry)
    reply = await agent_of(engine, ["calculator"]).call(call_of())
    tokens = 4 * rounds_before  # what was generated before counts
    assert (reply.status, reply.text, reply.usage.completion_tokens, reply.engine) == ("failed", "", tokens, "list")
    assert reply.error is not None
    assert message in reply.error


async def test_a_stream_that_ends_without_a_generation_is_the_agents_own_failure() -> None:
    pieces, reply = await items_of(agent_of(ListEngine(None)), call_of())
    assert (pieces, reply.status) == ([], "failed")
    assert "its stream ended without a generation" in (reply.error or "")


async def test_a_call_asks_the_engine_for_no_text() -> None:
    engine = ListEngine(generated("It is 84."))
    await agent_of(engine).call(call_of())
    assert engine.streamed == 0
    await items_of(agent_of(engine), call_of())
    assert engine.streamed == 1


async def test_text_streams_as_it_comes_unless_there_are_tools() -> None:
    pieces, reply = await items_of(agent_of(ListEngine(generated("It is 84."))), call_of())
    assert (pieces, reply.text) == (["It", "is", "84."], "It is 84.")
    engine = ListEngine(generated("<calculator>12*7"), generated("so 84"))
    pieces, reply = await items_of(agent_of(engine, ["calculator"]), call_of())
    assert (pieces, reply.text) == ([], "<calculator>12*7</calculator> = 84\nso 84")
    pieces, reply = await items_of(agent_of(ListEngine(EngineError("gone"))), call_of())
    assert (pieces, reply.status, reply.error) == (["begun"], "failed", "gone")


async def test_cancelling_a_call_reaches_the_engine() -> None:
    engine = ScriptedEngine(ScriptedOptions(delay_ms=60_000))
    task = asyncio.create_task(agent_of(engine).call(call_of()))
    while not engine.in_flight:  # noqa: ASYNC110  # the engine has no event to wait for
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.in_flight == 0


async def test_local_agents_are_reached_by_name() -> None:
    agents = LocalAgents({"solver": agent_of(ListEngine(generated("84"))), "other": agent_of(ListEngine(generated("85")))})
    assert (await agents.call(call_of())).text == "84"
    items = [item async for item in agents.stream(call_of())]
    assert [type(item) for item in items] == [TextDelta, AgentReply]


async def test_a_reply_that_fails_after_a_tool_call_counts_what_it_took_before() -> None:
    engine = ListEngine(generated("<calculator>12*7", price=0.25, engine_ms=5.0), EngineError("gone"))
    reply = await agent_of(engine, ["calculator"]).call(call_of())
    assert (reply.status, reply.error, reply.text) == ("failed", "gone", "")
    assert (reply.usage, reply.price, reply.engine_ms) == (USAGE, 0.25, 5.0)
    assert (await agent_of(ListEngine(EngineError("gone"))).call(call_of())).price is None


@pytest.mark.parametrize("has_closing", [False, True])
async def test_a_call_that_was_cut_is_not_run(has_closing: bool) -> None:
    """By the deadline or the engine's room: its argument may be half of one, and nothing could follow its result."""
    said = f"<calculator>12*7{'</calculator> so' * has_closing}"
    engine = ListEngine(generated(said, finish_reason="length"), EngineError("the prompt has 2048 tokens; expected at most 2047"))
    reply = await agent_of(engine, ["calculator"]).call(call_of(max_tokens=50))
    assert (reply.status, reply.text, reply.finish_reason, len(engine.requests)) == ("ok", said, "length", 1)
