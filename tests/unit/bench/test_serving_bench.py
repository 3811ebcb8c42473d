"""What the benches of serving measure, without Ray: pools that never stop early, the chain's payloads, turns, shares."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dmoa.agents.pool import build_encoder, build_local, build_pool_gate
from dmoa.agents.prompts import agent_messages
from dmoa.bench import adaptation as adaptation_bench
from dmoa.bench import latency as hops_bench
from dmoa.bench import latency as orchestration_bench
from dmoa.bench.latency import STEPS, WIDTH, null_pool
from dmoa.bench.serve_process import Echo, records
from dmoa.policies.registry import POLICIES
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm, limits_for
from dmoa.types import AgentCall, Answer, Query, Sampling, StepRecord


async def answer_of(num_agents: int, *, placement: str, mode: str) -> Answer:
    config = null_pool(num_agents, placement=placement, mode=mode)
    agents, _ = build_local(config)
    router = LocalRouter()
    gate, record = build_pool_gate(config)
    router.install(record.version, gate)
    swarm = Swarm(config, agents=agents, router=router, encoder=build_encoder(config))
    asked = Query(trace_id="t", text="What is this?", limits=limits_for(config))
    return [event async for event in swarm.ask(asked, next(iter(POLICIES)))][-1]  # type: ignore[return-value]


@pytest.mark.parametrize(("placement", "mode"), [("dedicated", "llm"), ("shared", "select")])
@pytest.mark.parametrize("num_agents", [2, 8])
async def test_a_null_query_takes_every_step_with_every_hop(num_agents: int, placement: str, mode: str) -> None:
    answer = await answer_of(num_agents, placement=placement, mode=mode)
    assert (answer.stop_reason, len(answer.steps)) == ("max_steps", STEPS)
    assert {len(step.active) for step in answer.steps} == {min(WIDTH, num_agents)}
    assert {step.summarizer.mode for step in answer.steps} == {mode}
    if mode == "llm":
        assert {step.summary for step in answer.steps} == {"work"}, "a new summary would have to be embedded"


async def test_the_chains_records_are_as_large_as_the_swarms() -> None:
    answer = await answer_of(hops_bench.NUM_AGENTS, placement="dedicated", mode="llm")
    step: StepRecord = answer.steps[STEPS // 2]
    ours = records(hops_bench.NUM_AGENTS)
    asked = Query(trace_id="0" * 32, text="What is this?")
    messages = agent_messages(asked, ["work"] * step.step, profile="Does part agent-1.")
    call = AgentCall(trace_id=asked.trace_id, step=step.step, agent="agent-1", messages=messages, sampling=Sampling())
    for seen, sent in (
        (step.route, ours.route_out),
        (step.decision, ours.route_back),
        (call, ours.call_out),
        (replace(step.replies[0], prompt=(), sent_unix_s=0.0), ours.reply),  # what the ingress adds crosses no hop
    ):
        assert len(pickle.dumps(sent)) == pytest.approx(len(pickle.dumps(seen)), rel=0.25)
    sizes = ours.as_bytes()
    assert isinstance(sizes.call_out, bytes)
    assert len(sizes.call_out) == len(pickle.dumps(ours.call_out))


async def test_a_hop_answers_in_kind() -> None:
    echo = Echo("record", b"00")
    assert await echo.call({"any": "record"}) == "record"
    assert await echo.call(b"any bytes") == b"00"


class Turn:
    """A server that notes when it is frozen."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name = name
        self._log = log

    def suspend(self) -> None:
        self._log.append(f"{self._name} frozen")

    def resume(self) -> None:
        self._log.append(f"{self._name} on")


def test_one_server_runs_at_a_time_and_warms_up_after_a_change() -> None:
    log: list[str] = []
    first, second = Turn("first", log), Turn("second", log)
    stage: Any = hops_bench.Stage([first, second])  # type: ignore[list-item]

    def take(name: str) -> Callable[[], list[float]]:
        return lambda: log.append(name) or [float(len(log))]  # type: ignore[func-returns-value]

    assert stage.measure(first, take("a")) == [4.0]
    assert stage.measure(first, take("b")) == [5.0]
    stage.measure(second, take("c"))
    assert log == ["second frozen", "first on", "a", "a", "b", "first frozen", "second on", "c", "c"]


def test_the_critical_path_is_the_slowest_agent_and_then_the_summarizer() -> None:
    steps = [
        {
            "agents": [{"engine_ms": 10.0, "engine": "x"}, {"engine_ms": 30.0, "engine": "x"}, {"engine_ms": 0.0, "engine": ""}],
            "summarizer": {"engine_ms": 5.0},
        },
        {"agents": [{"engine_ms": 7.0, "engine": "y"}], "summarizer": {"engine_ms": 0.0}},
    ]
    assert orchestration_bench.critical_path_ms({"steps": steps}) == 42.0
    assert orchestration_bench.engine_label({"steps": steps}) == "x, y"


@pytest.mark.contract
def test_pss_holds_what_a_process_and_its_children_hold() -> None:
    """Measured in a process of its own: others' threads of this one give memory back in between."""
    measured = """
import mmap, subprocess, sys
from dmoa.bench import memory as memory_bench
holder = "import mmap, sys; m = mmap.mmap(-1, 32 << 20); m.write(b'x' * (32 << 20)); print(flush=True); sys.stdin.read()"
before = memory_bench.pss_bytes()
held = mmap.mmap(-1, 16 << 20)
held.write(b"x" * (16 << 20))
own = memory_bench.pss_bytes()
with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
    child.stdout.readline()
    print(own - before, memory_bench.pss_bytes() - own)
    child.kill()
"""
    done = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True, timeout=60)
    own, childs = map(int, done.stdout.split())
    assert 15 << 20 <= own <= 32 << 20
    assert 31 << 20 <= childs <= 64 << 20


def test_p15_asks_at_set_moments_and_gives_an_interval_of_paired_ratios() -> None:
    moments = adaptation_bench.arrivals_s(400, 20.0, 1)
    assert moments == sorted(moments) == adaptation_bench.arrivals_s(400, 20.0, 1)
    assert [math.floor(moment * 20.0) for moment in moments] == list(range(400))  # one in every interval
    asked: list[str] = []
    waits = adaptation_bench.open_loop(lambda question: float(len(asked.append(question) or asked)), [0.0, 0.001, 0.002])
    assert len(waits) == len(asked) == 3
    found = adaptation_bench.interval([1.0, 1.1, 1.21])
    assert found.value == pytest.approx(1.1)
    half = 4.302653 * math.log(1.1) / math.sqrt(3)  # Student's 97.5 % quantile with two degrees of freedom
    assert (found.low, found.high) == pytest.approx((1.1 * math.exp(-half), 1.1 * math.exp(half)))


def test_p15_compares_the_same_pool_with_adaptation_on_and_off() -> None:
    on, off = (adaptation_bench.adapting(null_pool(8, placement="shared", mode="select"), mode) for mode in ("on", "off"))
    assert (on.router.adaptation, off.router.adaptation) == ("on", "off")
    assert on.model_copy(update={"router": off.router}) == off


def test_p15_has_a_length_that_is_known_before() -> None:
    """Turns of both kinds, the round that is thrown away included: start-up apart, under five minutes."""
    kinds = adaptation_bench.loads(None)
    assert [kind.kind for kind in kinds] == ["null", "real"]
    assert sum(2 * (kind.rounds + 1) * kind.turn_s for kind in kinds) < 300
    assert min(kind.rounds for kind in adaptation_bench.loads(1)) >= 1
