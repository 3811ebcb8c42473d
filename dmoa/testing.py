"""For tests of swarms, plug-ins and what reads their records: stand-ins that decide everything beforehand.

Scripted swarm: `FakeAgents` meets each call with the agent's next fate (`Say`, `Lose`, `Refuse`, `Fail`, `Hang`);
`orchestrator_of` runs the real step loop over them, `answer_of` and `events_of` ask it, and `jumping` runs it all on a clock
that does not wait. A policy is tested by handing it to `answer_of`; `Schedule` is a policy with a set plan. Fake router:
`router_of(fixed_gate({...}))` gives the same probabilities whatever it reads; `FakeEncoder` replaces the sentence encoder.

    agents = FakeAgents({"adder": Say(text="19"), "echo": Lose()})
    answer = await answer_of(orchestrator_of(agents, ["adder", "echo"]), query("12 + 7?"), MyPolicy())
    assert answer.text == "19"

Records: `domain_rows` and `write_rollouts` make a folder that `dmoa train` reads; `run_info`, `answered`, `failed`, `scored` and
`write_run` one that `dmoa report` reads. Nothing here needs Ray, a model or a network; it is deterministic.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmoa.agents.pool import fingerprint
from dmoa.agents.summarizer import LlmSummarizer, SelectSummarizer
from dmoa.config import SUMMARIZER, Config, SummarizerConfig, loads
from dmoa.core.features import FEEDBACK_FEATURES
from dmoa.core.gate import Gate, GateSpec
from dmoa.dispatch import Dispatcher
from dmoa.errors import AgentOverloadedError, AgentUnavailableError
from dmoa.evaluation.records import Answered, BenchmarkInfo, PoolInfo, RunInfo, Scored
from dmoa.evaluation.run_folder import RunFolder, write_lines, write_whole
from dmoa.flat import flat
from dmoa.orchestrator import Orchestrator
from dmoa.protocols import Policy
from dmoa.provenance import Machine
from dmoa.routing import LocalRouter
from dmoa.step_calls import AgentCard
from dmoa.trace import decision_of
from dmoa.training.rollouts import LATER_COLUMNS, SCHEMA, SCHEMA_VERSION, Manifest
from dmoa.types import (
    Activation,
    AgentCall,
    AgentReply,
    Answer,
    Defence,
    EntropySum,
    Event,
    FinishReason,
    FloatArray,
    Limits,
    Price,
    Query,
    QueryState,
    RouteDecision,
    Sampling,
    StepPlan,
    StepRecord,
    Stop,
    TextDelta,
    TokenUsage,
)

T = TypeVar("T")
DIM = 4
"""Width of the fake embeddings."""
CONTEXT_DIM = 384
"""Width of the embeddings in made-up rollouts, whose context has two."""


@dataclass(frozen=True, kw_only=True)
class Say:
    """The agent answers; streamed in `pieces`, or else whole."""

    text: str
    nats: float = 0.5
    tokens: int = 4
    prompt_tokens: int = 10
    finish_reason: FinishReason = "stop"
    pieces: tuple[str, ...] = ()
    after: asyncio.Event | None = None
    """Answers only once this is set."""


@dataclass(frozen=True, kw_only=True)
class Lose:
    """The agent's place dies, when streaming after `pieces` were sent."""

    error: str = "replica died"
    pieces: tuple[str, ...] = ()
    kind: type[AgentUnavailableError] = AgentUnavailableError


@dataclass(frozen=True)
class Refuse:
    """The agent's queue is full."""


@dataclass(frozen=True, kw_only=True)
class Fail:
    """The agent replies that it failed, when streaming after `pieces` were sent."""

    error: str = "out of memory"
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Hang:
    """The agent never answers, when streaming after `pieces` were sent."""

    pieces: tuple[str, ...] = ()


Fate = Say | Lose | Refuse | Fail | Hang


class FakeAgents:
    """Implements `AgentClient`: every call of an agent meets the agent's next fate, the last one for ever after."""

    def __init__(self, fates: Mapping[str, Fate | Sequence[Fate]]) -> None:
        self._fates = {name: (fate,) if isinstance(fate, Fate) else tuple(fate) for name, fate in fates.items()}
        self.calls: list[AgentCall] = []
        self.streamed: list[str] = []
        self.cancelled: list[str] = []
        self._waiting: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def call(self, call: AgentCall) -> AgentReply:
        async for item in self._play(call):
            if isinstance(item, AgentReply):
                return item
        raise AssertionError("a fate ends with a reply")

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        self.streamed.append(call.agent)
        async for item in self._play(call):
            yield item

    async def ping(self, agent: str) -> None:
        """A place whose next fate is to hang is still coming up; every other one answers."""
        fates = self._fates[agent]
        if isinstance(fates[min(len(self.calls_of(agent)), len(fates) - 1)], Hang):
            await asyncio.Event().wait()

    def calls_of(self, agent: str) -> list[AgentCall]:
        return [call for call in self.calls if call.agent == agent]

    async def until_waiting(self, *agents: str) -> None:
        """Return once each of the agents has had a call that waits."""
        for agent in agents:
            await self._waiting[agent].wait()

    async def _play(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        fates = self._fates[call.agent]
        fate = fates[min(len(self.calls_of(call.agent)), len(fates) - 1)]
        self.calls.append(call)
        await asyncio.sleep(0)
        if isinstance(fate, Refuse):
            raise AgentOverloadedError(f"agent {call.agent!r}: its queue is full")
        if isinstance(fate, Say):
            if fate.after is not None:
                await self._wait(call.agent, fate.after)
            for piece in fate.pieces or (fate.text,):
                yield TextDelta(text=piece)
            yield said(call.agent, fate)
            return
        for piece in fate.pieces:
            yield TextDelta(text=piece)
        if isinstance(fate, Lose):
            raise fate.kind(fate.error)
        if isinstance(fate, Hang):
            await self._wait(call.agent, asyncio.Event())
        yield AgentReply(agent=call.agent, status="failed", error=fate.error if isinstance(fate, Fail) else None)

    async def _wait(self, agent: str, event: asyncio.Event) -> None:
        self._waiting[agent].set()
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancelled.append(agent)
            raise


def said(agent: str, fate: Say) -> AgentReply:
    """The reply of an agent that answers: every token has the same entropy."""
    return AgentReply(
        agent=agent,
        status="ok",
        text=fate.text,
        finish_reason=fate.finish_reason,
        entropy=EntropySum(sum_nats=fate.nats * fate.tokens, sq_sum=fate.nats**2 * fate.tokens, tokens=fate.tokens),
        usage=TokenUsage(prompt_tokens=fate.prompt_tokens, completion_tokens=fate.tokens),
    )


class FakeEncoder:
    """Implements `Encoder` with unit vectors that depend on the text alone; zeros for the empty text."""

    def __init__(self) -> None:
        self.texts: list[list[str]] = []

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        self.texts.append(list(texts))
        return [embedding(text) for text in texts]


def embedding(text: str) -> FloatArray:
    """The fake embedding of a text, [DIM]."""
    if not text:
        return np.zeros(DIM, np.float32)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    row = np.random.default_rng(seed).standard_normal(DIM)
    return np.asarray(row / np.linalg.norm(row), dtype=np.float32)


def gate_spec(agents: Sequence[str], **changes: Any) -> GateSpec:
    """The spec of a tiny gate."""
    spec = GateSpec(
        preset="default",
        head="linear",
        hidden=3,
        temperature=1.0,
        agents=tuple(agents),
        embedding_dim=DIM,
        rule="top_mass",
        mass=0.8,
        max_agents=4,
        cascade=False,
        score="raw",
    )
    return replace(spec, **changes)


def fixed_gate(probabilities: Mapping[str, float], **changes: Any) -> Gate:
    """A gate that gives these probabilities whatever it reads: all weights are 0, the head's bias is log p."""
    gate = Gate(gate_spec(tuple(probabilities), **changes))
    with torch.no_grad():
        gate.head_bias.copy_(torch.tensor([math.log(p) for p in probabilities.values()]))
    return gate


def router_of(gate: Gate, version: str = "v1") -> LocalRouter:
    """A router that holds one gate."""
    router = LocalRouter()
    router.install(version, gate)
    return router


def decision(probabilities: Mapping[str, float], k: int, *, masked: tuple[str, ...] = (), **changes: Any) -> RouteDecision:
    """A decision as a gate would make it."""
    names, chances = tuple(probabilities), tuple(probabilities.values())
    made = decision_of(names, chances, masked=masked, k=k, mass=0.0, gate_version="v1")
    known = {"mass": sum(chances[i] for i in made.ranking[:k]), "hidden_H": np.zeros(3, np.float32)}
    return replace(made, **(known | changes))


def asks(*agents: str, reserves: Sequence[str] = (), **changes: Any) -> StepPlan:
    """A plan that asks agents, each with probability 1 / their number."""
    return StepPlan(
        activations=tuple(Activation(agent=name, probability=1 / len(agents)) for name in agents),
        reserves=tuple(Activation(agent=name, probability=0.0) for name in reserves),
        **changes,
    )


class Schedule:
    """Implements `Policy`: one plan per step, the last one for ever after. An exception is raised once, as the last for ever."""

    name = "schedule"

    def __init__(self, *plans: StepPlan | Stop | Exception) -> None:
        self._plans = list(plans)
        self.states: list[QueryState] = []

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        index = min(len(state.steps), len(self._plans) - 1)
        plan = self._plans[index]
        if isinstance(plan, Exception):
            if index < len(self._plans) - 1:
                del self._plans[index]
            raise plan
        self.states.append(state)
        return plan


def query(text: str = "What is 12 + 7?", *, sampling: dict[str, Any] | None = None, **limits: Any) -> Query:
    """One query."""
    return Query(trace_id="t1", text=text, sampling=sampling or {}, limits=Limits(**limits))


def state_of(asked: Query, **changes: Any) -> QueryState:
    """The state of a query before its first step."""
    return QueryState(query=asked, started_unix_s=0.0, **changes)


def card(name: str, place: str | None = None, **changes: Any) -> AgentCard:
    """What is known of an agent; without `place` all agents live together in `llm`."""
    profile, sampling = f"You are {name}.", Sampling(max_tokens=50)
    known = AgentCard(name=name, profile=profile, tools_text="", sampling=sampling, place=place or "llm")
    return replace(known, **changes)


def orchestrator_of(
    agents: FakeAgents,
    names: Sequence[str],
    *,
    router: LocalRouter | None = None,
    llm: bool = False,
    places: Mapping[str, str] | None = None,
    price: Price | None = None,
    defence: Defence = "none",
) -> Orchestrator:
    """An orchestrator over fake agents; `llm`: the summarizer is the agent `summarizer`; `price`: that of everybody's tokens."""
    cards = {name: card(name, (places or {}).get(name), price=price) for name in names}
    config = SummarizerConfig(mode="llm", llm="tiny") if llm else SummarizerConfig()
    return Orchestrator(
        dispatcher=Dispatcher(agents=agents, cards=cards, router=router, is_select=not llm),
        summarizer=LlmSummarizer(agents, config) if llm else SelectSummarizer(),
        defence=defence,
        writer=card(SUMMARIZER, sampling=Sampling(max_tokens=70), price=price) if llm else None,
    )


async def events_of(orchestrator: Orchestrator, asked: Query, policy: Policy) -> list[Event]:
    """Everything that a query yields."""
    return [event async for event in orchestrator.answer(asked, policy)]


async def answer_of(orchestrator: Orchestrator, asked: Query, policy: Policy) -> Answer:
    """The answer of a query, after a check that it comes exactly once and last, and that the steps come in order."""
    events = await events_of(orchestrator, asked, policy)
    answers = [event for event in events if isinstance(event, Answer)]
    assert len(answers) == 1
    assert events[-1] is answers[0]
    assert [event for event in events if isinstance(event, StepRecord)] == list(answers[0].steps)
    assert [step.step for step in answers[0].steps] == list(range(len(answers[0].steps)))
    return answers[0]


class _JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self._jumped_s = 0.0
        select = self._selector.select  # type: ignore[attr-defined]  # asyncio's own selector

        def jump(timeout: float | None = None) -> Any:
            assert timeout is not None, "nothing is left to wait for"
            self._jumped_s += timeout
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._jumped_s


def jumping(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Run a coroutine on a clock that jumps; return its result and the seconds that passed on that clock."""
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        result = runner.run(work)
        return result, runner.get_loop().time()


AGENTS = ("one", "two", "three")


def scripted_pool_yaml(agents: Sequence[str] = AGENTS, gate: str = "{hidden: 16, activation: {max_agents: 2}}") -> str:
    """A pool of scripted agents."""
    lines = "".join(f"  - {{name: {name}, llm: s, profile: Is called {name}.}}\n" for name in agents)
    return f'name: made-up\nllms: {{s: {{model: "scripted:echo", engine: scripted}}}}\nagents:\n{lines}gate: {gate}\n'


def scripted_pool(agents: Sequence[str] = AGENTS, gate: str = "{hidden: 16, activation: {max_agents: 2}}") -> Config:
    """The same pool as a configuration."""
    return loads(scripted_pool_yaml(agents, gate))


def rollout_row(query: str, step: int, agent: str, nats: float, context: FloatArray, **changes: Any) -> dict[str, Any]:
    """One row: `nats` is the mean entropy of a reply of 8 tokens."""
    values: dict[str, Any] = {
        "query_id": query,
        "source": "made-up",
        "split": "train",
        "step": step,
        "num_steps": 1,
        "context": context.astype(np.float32),
        "feedback": np.zeros(FEEDBACK_FEATURES, np.float32),
        "agent": agent,
        "probability": 1 / 3,
        "is_selected": agent == "one",
        "is_explored": agent != "one",
        "propensity": 1.0,
        **flat(EntropySum(sum_nats=8 * nats, sq_sum=8 * nats * nats, tokens=8), "entropy_"),
        "finish_reason": "stop",
        **flat(TokenUsage(prompt_tokens=10, completion_tokens=8)),
        "latency_ms": 1.0,
        "text": "never read",
        "status": "ok",
        "gate_version": "untrained-0",
        "engine": "scripted",
        "seed": 0,
        "pool_fingerprint": "",
        "schema_version": SCHEMA_VERSION,
    }
    return values | changes


def domain_rows(num_queries: int = 24, *, steps: int = 1, seed: int = 0, agents: Sequence[str] = AGENTS) -> list[dict[str, Any]]:
    """Queries of as many domains as agents: agent d is sure (0.05 nats) in domain d, the others are not (0.8 to 1.6)."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((len(agents), 2 * CONTEXT_DIM)) / np.sqrt(CONTEXT_DIM)
    rows = []
    for number in range(num_queries):
        for step in range(steps):
            domain = (number + step) % len(agents)
            context = centres[domain] + 0.2 * rng.standard_normal(2 * CONTEXT_DIM) / np.sqrt(CONTEXT_DIM)
            for place, agent in enumerate(agents):
                nats = 0.05 * rng.uniform(0.5, 1.5) if place == domain else rng.uniform(0.8, 1.6)
                rows.append(rollout_row(f"q{number:03d}", step, agent, nats, context, num_steps=steps))
    return rows


def write_rollouts(folder: Path, rows: Sequence[dict[str, Any]], config: Config, *, files: int = 3, **changes: Any) -> Path:
    """Write rows as a folder of rollouts of a pool, dealt out over some files; `changes`: of the manifest."""
    name = fingerprint(config)
    (folder / "rollouts").mkdir(parents=True)
    for number in range(files):
        columns = [
            pa.array(
                [(LATER_COLUMNS | value)[field.name] for value in rows[number::files]]
                if field.name != "pool_fingerprint"
                else [name] * len(rows[number::files]),
                field.type,
            )
            for field in SCHEMA
        ]
        pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), folder / "rollouts" / f"part-{number}.parquet")
    manifest = {
        "pool": config.name,
        "pool_fingerprint": name,
        "agents": list(config.agent_names),
        "gate_version": "untrained-0",
        "preset": config.gate.preset,
        "engines": ["s: scripted"],
        "sources": [{"name": "made-up", "weight": 1.0, "queries": len(rows), "origin": {}}],
        "mode": "dense",
        "seed": 0,
        "options": {},
        "config": {},
        "dmoa_version": "0",
        "started_unix_s": 0.0,
    }
    text = json.dumps(manifest | changes)
    Manifest.model_validate_json(text)
    (folder / "rollouts.json").write_text(text)
    return folder


MACHINE = Machine(cpu="some CPU", cores=2, memory_gib=8.0, gpus=[], python="3.11.7", versions={"dmoa": "0.1.0", "ray": "2.60.0"})


def run_info(benchmarks: Sequence[BenchmarkInfo], policies: Sequence[str] = ("dmoa", "single"), **changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "dmoa_version": "0.1.0",
        "pool": PoolInfo(
            name="tiny", fingerprint="f" * 64, config={"name": "tiny", "agents": [{"name": "adder"}, {"name": "echo"}]}
        ),
        "benchmarks": list(benchmarks),
        "policies": list(policies),
        "seed": 7,
        "machine": MACHINE,
        "started_unix_s": 1_790_000_000.0,
    }
    return RunInfo(**values | changes)


def answered(benchmark: str, number: int, policy: str, **changes: Any) -> Answered:
    values: dict[str, Any] = {
        "row_id": f"{benchmark}/test/{number:04}",
        "benchmark": benchmark,
        "policy": policy,
        "text": "Answer: 1",
        "stop_reason": "agreement",
        "active": (("adder", "echo"), ("adder",)),
        **flat(TokenUsage(prompt_tokens=100, cached_tokens=30, completion_tokens=10)),
        "summarizer_tokens": 4,
        "entropy_nats": 0.5,
        "wall_ms": 250.0,
        "gate_version": "abc",
    }
    return Answered(**values | changes)


def failed(benchmark: str, number: int, policy: str, error: str = "DeadlineError: too late") -> Answered:
    return Answered(
        row_id=f"{benchmark}/test/{number:04}",
        benchmark=benchmark,
        policy=policy,
        status="failed",
        error=error,
        **flat(TokenUsage()),
        wall_ms=1000.0,
    )


def scored(benchmark: str, number: int, policy: str, value: float, **changes: Any) -> Scored:
    values = {"row_id": f"{benchmark}/test/{number:04}", "benchmark": benchmark, "policy": policy, "value": value}
    return Scored(**values | changes)


def write_run(root: Path, run: RunInfo, answers: Iterable[Answered], scores: Iterable[Scored]) -> RunFolder:
    """Write a run's folder as the pipeline does."""
    folder = RunFolder(root)
    write_whole(folder.run, run.model_dump_json(indent=2))
    answer_lines, score_lines = list(answers), list(scores)
    for info in run.benchmarks:
        for policy in run.policies:
            cell = (info.name, policy)
            write_lines(folder.answers(*cell), [line for line in answer_lines if (line.benchmark, line.policy) == cell])
            write_lines(folder.scores(*cell), [line for line in score_lines if (line.benchmark, line.policy) == cell])
    return folder
