"""The scripted engine: determinism, sums of entropies, limits, stop strings, delays, failures, cancellation."""

import asyncio
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.engine_options import ScriptedOptions
from dmoa.engines.scripted import ScriptedEngine
from dmoa.errors import EngineError
from dmoa.types import Generation, GenerationRequest, Message, Sampling, TextDelta


def request(text: str = "What is 12 + 7?", *, agent: str = "solver", begun: str = "", **sampling: object) -> GenerationRequest:
    messages = (Message(role="system", content="Be brief."), Message(role="user", content=text))
    if begun:
        messages = (*messages, Message(role="assistant", content=begun))
    return GenerationRequest(
        request_id="r",
        messages=messages,
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
        agent=agent,
    )


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


def same(a: Generation, b: Generation) -> bool:
    return (a.text, a.entropy.sum_nats, a.entropy.sq_sum, a.finish_reason, a.usage.completion_tokens) == (
        b.text,
        b.entropy.sum_nats,
        b.entropy.sq_sum,
        b.finish_reason,
        b.usage.completion_tokens,
    )


async def test_replies_by_agent_and_echoes_else() -> None:
    engine = ScriptedEngine(ScriptedOptions(replies={"solver": "{query} It is {19}."}))
    question = request("What is 12 + 7?\n\nYour role: solver")
    assert (await engine.generate(question)).text == "What is 12 + 7? It is {19}."
    assert (await engine.generate(request("Hi\n\nYour role", agent="other"))).text == "Hi"
    assert engine.label == "scripted"


@given(text=st.text(), agent=st.text(), tokens=st.integers(1, 50), max_tokens=st.integers(1, 60))
def test_a_generation_is_repeatable_and_consistent(text: str, agent: str, tokens: int, max_tokens: int) -> None:
    first, second = (
        asyncio.run(ScriptedEngine(ScriptedOptions(tokens=tokens)).generate(request(text, agent=agent, max_tokens=max_tokens)))
        for _ in range(2)
    )
    assert same(first, second)
    count = min(tokens, max_tokens)
    assert first.entropy.tokens == first.usage.completion_tokens == count
    assert first.finish_reason == ("length" if max_tokens < tokens else "stop")
    mean = first.entropy.sum_nats / count
    assert 0.05 <= mean <= 2.0
    variance = first.entropy.sq_sum / count - mean**2
    assert variance >= -1e-12
    assert variance <= mean**2


async def test_entropies_tell_agents_and_questions_apart() -> None:
    engine = ScriptedEngine(ScriptedOptions())
    pairs = [(f"question {i}", f"agent{j}") for i in range(10) for j in range(10)]
    sums = [(await engine.generate(request(text, agent=agent))).entropy.sum_nats for text, agent in pairs]
    assert len(set(sums)) == 100
    means = sorted(value / 8 for value in sums)
    assert means[10] < 0.6
    assert means[89] > 1.4


async def test_set_entropies_and_their_spread() -> None:
    engine = ScriptedEngine(ScriptedOptions(tokens=5, entropies_nats={"solver": 0.4}))
    made = await engine.generate(request())
    by_token = [0.2, 0.6, 0.2, 0.6, 0.4]
    assert made.entropy.sum_nats == pytest.approx(sum(by_token))
    assert made.entropy.sq_sum == pytest.approx(sum(h * h for h in by_token))


async def test_a_limit_cuts_the_text_too() -> None:
    engine = ScriptedEngine(ScriptedOptions(tokens=10, replies={"solver": "0123456789"}))
    made = await engine.generate(request(max_tokens=4))
    assert (made.text, made.finish_reason, made.usage.completion_tokens) == ("0123", "length", 4)


async def test_stop_strings_end_a_reply_and_a_continuation_goes_on() -> None:
    engine = ScriptedEngine(ScriptedOptions(replies={"solver": "So <calculator>12+7</calculator>, it is 19."}))
    stop = ("</calculator>",)
    first = await engine.generate(request(stop=stop))
    assert first.text == "So <calculator>12+7"
    rest = await engine.generate(request(stop=stop, begun=first.text + "</calculator> = 19\n"))
    assert rest.text == ", it is 19."
    assert (await engine.generate(request(stop=stop, begun="</calculator></calculator>"))).text == ""


async def test_streams_pieces_then_the_same_generation() -> None:
    engine = ScriptedEngine(ScriptedOptions())
    items = [item async for item in engine.stream(request())]
    pieces, last = items[:-1], items[-1]
    assert isinstance(last, Generation)
    assert all(isinstance(piece, TextDelta) for piece in pieces)
    assert len(pieces) == 4
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextDelta)) == last.text == "What is 12 + 7?"
    assert same(last, await engine.generate(request()))


async def test_failing_agents_fail_and_others_do_not() -> None:
    engine = ScriptedEngine(ScriptedOptions(failing=("solver",)))
    with pytest.raises(EngineError, match="agent 'solver'"):
        await engine.generate(request())
    assert (await engine.generate(request(agent="other"))).text
    assert engine.in_flight == 0


async def test_delays_are_per_agent_and_run_side_by_side() -> None:
    engine = ScriptedEngine(ScriptedOptions(delay_ms=60, delays_ms={"quick": 0}))
    started = time.perf_counter()
    slow = [asyncio.create_task(engine.generate(request())) for _ in range(20)]
    await until(lambda: engine.in_flight == 20)
    quick = await engine.generate(request(agent="quick"))
    assert not any(task.done() for task in slow)
    made = await asyncio.gather(*slow)
    wall_ms = (time.perf_counter() - started) * 1e3
    assert 59 <= wall_ms < 20 * 60
    assert quick.engine_ms < 59 <= min(item.engine_ms for item in made)


async def test_without_a_delay_nothing_yields_to_the_loop() -> None:
    engine = ScriptedEngine(ScriptedOptions())
    step = engine.generate(request())
    with pytest.raises(StopIteration) as finished:
        step.send(None)
    assert finished.value.value.text == "What is 12 + 7?"


async def test_cancelling_frees_the_place() -> None:
    engine = ScriptedEngine(ScriptedOptions(delay_ms=600_000))
    task = asyncio.create_task(engine.generate(request()))
    await until(lambda: engine.in_flight == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.in_flight == 0


async def test_closing_fails_what_runs_and_what_comes() -> None:
    engine = ScriptedEngine(ScriptedOptions(delay_ms=600_000))
    task = asyncio.create_task(engine.generate(request()))
    await until(lambda: engine.in_flight == 1)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await task
    with pytest.raises(EngineError, match="closed"):
        await engine.generate(request())
