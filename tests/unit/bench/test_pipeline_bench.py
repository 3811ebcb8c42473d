"""P5 without models: what is recorded, the graph made of it, the order of a replay, the figures made of rounds."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest

from dmoa.bench.throughput import (
    BAR,
    RecordedCall,
    RecordingEngine,
    Round,
    Window,
    graph_of,
    pipeline_results,
    read_calls,
    replay_calls,
    replay_flat,
    wide_result,
    window_of,
)
from dmoa.engine_options import ScriptedOptions
from dmoa.engines.scripted import ScriptedEngine
from dmoa.types import EntropySum, Generation, GenerationRequest, Message, Sampling, TokenUsage


def asked(call_id: str) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"{call_id}@1", call_id=call_id, messages=(Message(role="user", content=call_id),), sampling=Sampling()
    )


def recorded(call_id: str, began_s: float, ended_s: float = 100.0, tokens: int = 1) -> RecordedCall:
    return RecordedCall(request=asked(call_id), began_s=began_s, ended_s=ended_s, completion_tokens=tokens)


CALLS = [
    recorded("q2/0/one", 1.5),
    recorded("q1/1/two", 5.0),
    recorded("q1/0/two", 1.0),
    recorded("q1/0/one#1", 3.0),
    recorded("q1/0/one", 1.1),
    recorded("q2/10/one", 9.0),
    recorded("q2/2/one", 7.0),
]
"""Two queries, out of order; agent `one` called a tool in q1's first step."""


class Stepwise:
    """An engine whose generations end in an order of their own; logs `+call` at a beginning and `-call` at an end."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def generate(self, request: GenerationRequest) -> Generation:
        self.log.append(f"+{request.call_id}")
        for _ in range(1 + len(self.log) % 3):
            await asyncio.sleep(0)
        self.log.append(f"-{request.call_id}")
        return Generation(
            text="x",
            finish_reason="stop",
            entropy=EntropySum(sum_nats=0.0, sq_sum=0.0, tokens=2),
            usage=TokenUsage(prompt_tokens=1, completion_tokens=2),
        )

    def began(self) -> list[str]:
        """Return the calls in the order of their beginnings."""
        return [entry[1:] for entry in self.log if entry[0] == "+"]

    def most_queries(self) -> int:
        """Return the most queries that had a call under way at one time."""
        running: Counter[str] = Counter()
        most = 0
        for entry in self.log:
            running[entry[1:].split("/")[0]] += 1 if entry[0] == "+" else -1
            most = max(most, len(+running))
        return most


def test_a_graph_has_queries_by_beginning_steps_by_number_and_tool_rounds_in_a_chain() -> None:
    names = [[[[r.call_id for r in chain] for chain in step] for step in query] for query in graph_of(CALLS)]
    assert names == [
        [[["q1/0/two"], ["q1/0/one", "q1/0/one#1"]], [["q1/1/two"]]],
        [[["q2/0/one"]], [["q2/2/one"]], [["q2/10/one"]]],
    ]


@pytest.mark.parametrize("in_flight", [1, 2, 5])
async def test_a_replay_keeps_the_order_and_no_more_queries_under_way(in_flight: int) -> None:
    many = [
        recorded(f"q{query}/{step}/{agent}", began_s=query + step / 10)
        for query in range(6)
        for step in range(1 + query % 3)
        for agent in ("one", "two", "two#1")
    ]
    engine = Stepwise()
    window = await replay_calls(engine, graph_of(many), in_flight)  # type: ignore[arg-type]
    assert sorted(engine.began()) == sorted(call.request.call_id for call in many), "every call once"
    assert window.tokens == 2 * len(many)
    assert engine.most_queries() == in_flight
    firsts = [name.split("/")[0] for name in engine.began() if name.endswith("/0/one")]
    assert firsts == [f"q{query}" for query in range(6)], "queries begin in the order in which they were recorded"
    for query, step in [(number, step) for number in range(6) for step in range(number % 3)]:
        last_end = max(engine.log.index(f"-q{query}/{step}/{agent}") for agent in ("one", "two", "two#1"))
        assert last_end < min(engine.log.index(f"+q{query}/{step + 1}/{agent}") for agent in ("one", "two"))
        assert engine.log.index(f"-q{query}/{step}/two") < engine.log.index(f"+q{query}/{step}/two#1")


async def test_agents_of_a_step_run_side_by_side_and_the_next_step_waits_for_all() -> None:
    engine = Stepwise()
    await replay_calls(engine, graph_of(CALLS), 2)  # type: ignore[arg-type]
    log = engine.log
    assert log.index("+q1/0/one") < log.index("-q1/0/two")
    assert max(log.index(f"-q1/0/{agent}") for agent in ("two", "one", "one#1")) < log.index("+q1/1/two")
    assert log.index("-q1/0/one") < log.index("+q1/0/one#1")
    assert log.index("-q2/0/one") < log.index("+q2/2/one") < log.index("-q2/2/one") < log.index("+q2/10/one")


async def test_the_flat_list_waits_for_nothing() -> None:
    engine = Stepwise()
    window = await replay_flat(engine, graph_of(CALLS))  # type: ignore[arg-type]
    assert window.tokens == 2 * len(CALLS)
    assert sorted(engine.log[: len(CALLS)]) == sorted(f"+{call.request.call_id}" for call in CALLS), "all begin before one ends"


async def test_every_generation_is_noted_as_it_was_asked(tmp_path: Path) -> None:
    plain = ScriptedEngine(ScriptedOptions(tokens=5))
    engine = RecordingEngine(plain, tmp_path / "calls")
    first = await engine.generate(asked("q/0/one"))
    streamed = [item async for item in engine.stream(asked("q/1/two"))]
    assert first.text == (await plain.generate(asked("q/0/one"))).text
    assert isinstance(streamed[-1], Generation)
    assert engine.label == plain.label
    await engine.close()
    calls = read_calls(tmp_path / "calls")
    assert [call.request for call in calls] == [asked("q/0/one"), asked("q/1/two")]
    assert [call.completion_tokens for call in calls] == [5, 5]
    assert calls[0].began_s <= calls[0].ended_s <= calls[1].began_s <= calls[1].ended_s


async def test_what_comes_before_the_first_call_is_done_once_and_neither_timed_nor_noted(tmp_path: Path) -> None:
    log: list[float] = []

    async def before(engine: object) -> None:
        assert engine is plain
        await asyncio.sleep(0.01)
        log.append(time.perf_counter())

    plain = ScriptedEngine(ScriptedOptions(tokens=5))
    engine = RecordingEngine(plain, tmp_path / "calls", before=before)
    await asyncio.gather(*(engine.generate(asked(f"q/{step}/one")) for step in range(3)))
    calls = read_calls(tmp_path / "calls")
    assert len(log) == 1
    assert sorted(call.request.call_id for call in calls) == ["q/0/one", "q/1/one", "q/2/one"]
    assert min(call.began_s for call in calls) >= log[0]


def test_a_window_runs_from_the_first_call_to_the_last_token() -> None:
    window = window_of([recorded("a/0/x", 4.0, 6.0, 30), recorded("b/0/x", 2.0, 10.0, 50), recorded("c/0/x", 3.0, 5.0, 0)])
    assert (window.tokens, window.seconds, window.tokens_per_s) == (80, 8.0, 10.0)
    assert window.under_way == (2.0 + 8.0 + 2.0) / 8.0


def one_round(ours: float, replay: float, fill: float, flat: float | None = None) -> Round:
    """One round: tokens per second of the arms, and the pipeline's calls under way beside one of the replay's."""
    made, bare, listed = (
        Window(tokens=round(10 * speed), seconds=10.0, under_way=calls)
        for speed, calls in ((ours, fill), (replay, 1.0), (flat or 0, 1.0))
    )
    return Round(ours=made, replay=bare, flat=None if flat is None else listed)


def test_p5_is_the_lowest_of_the_medians_of_ratios_taken_round_by_round() -> None:
    figures = {
        8: [
            one_round(95.0, 100.0, 0.9),
            one_round(190.0, 200.0, 1.0),
            one_round(50.0, 100.0, 0.98),
        ],
        16: [
            one_round(80.0, 100.0, 1.0, 120.0),
            one_round(40.0, 50.0, 1.0, 60.0),
        ],
    }
    results = {result.id: result for result in pipeline_results(figures, engine="e")}
    arms = [f"P5.{n}.{arm}" for n in (8, 16) for arm in ("pipeline", "replay")]
    assert list(results) == ["P5", "P5.8", "P5.16", "P5.8.fill", "P5.16.fill", *arms, "P5.flat"]
    assert (results["P5.8.fill"].value, results["P5.8.fill"].passed) == (0.98, None)
    assert (results["P5.8"].value, results["P5.8"].passed) == (0.95, True)
    assert (results["P5.16"].value, results["P5.16"].passed) == (0.8, False)
    assert (results["P5"].value, results["P5"].passed, results["P5"].rounds) == (0.8, False, 2)
    assert (results["P5.flat"].value, results["P5.flat"].passed, results["P5.flat"].unit) == (90.0, None, "tokens/s")


def test_p5_passes_at_the_bar() -> None:
    (first, *_) = pipeline_results({8: [one_round(BAR * 64, 64.0, 1.0)]}, engine="e")
    assert (first.id, first.passed) == ("P5", True)


def test_an_engine_with_a_place_for_every_call_is_reported_and_not_judged() -> None:
    found = wide_result([one_round(40.0, 80.0, 1.0), one_round(60.0, 80.0, 1.0)], engine="e")
    assert (found.id, found.value, found.bar, found.passed, found.rounds) == ("P5.wide", 0.625, "", None, 2)
