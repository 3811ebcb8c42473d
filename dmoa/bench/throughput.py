"""P5 and P13: tokens per second of the evaluation pipeline and of rollouts beside the same calls on the bare engine.

A recording engine stands between the agents and the real one. Its notes become a graph: a query is a row of steps, a
step holds the chains of its agents, a chain is one call, or several around tool results. Replaying it on a bare engine
computes nothing in between, so it is the most that any orchestration of the same calls could reach.
"""

from __future__ import annotations

import asyncio
import pickle
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from dmoa.agents.agent import LocalAgents
from dmoa.agents.pool import build_agents, build_encoder, build_engine, build_pool_gate, load_pool
from dmoa.bench.harness import LABELS, BenchResult, Spread, engines_here, on_engine, ratio, record, spread, warm
from dmoa.config import Config, callable_agents
from dmoa.dataflow import OVERCOMMIT
from dmoa.engines.models import fetch, resolve_model
from dmoa.errors import DmoaError
from dmoa.evaluation.answering import Asking
from dmoa.evaluation.pipeline import AnswerWorkers, answer_all
from dmoa.evaluation.registry import SUITES
from dmoa.evaluation.run_folder import RunFolder, write_lines
from dmoa.protocols import Engine
from dmoa.routing import LocalRouter
from dmoa.serving.agent_replica import ENGINE_ENV
from dmoa.serving.launch import start_ray
from dmoa.swarm import Swarm, limits_for
from dmoa.training.collect import CollectedQueries, CollectSession, CollectWorkers, RolloutAsking, collect, width
from dmoa.training.options import RolloutOptions
from dmoa.training.rollouts import RolloutFolder, RolloutQuery
from dmoa.types import Generation, GenerationRequest, Limits, TextDelta
from dmoa.workflows.backends import OpenCollectingPool
from dmoa.workflows.collect import new_manifest

Chain = tuple[GenerationRequest, ...]
"""One agent's calls in one step, each after the one before."""
StepCalls = tuple[Chain, ...]
"""Chains that run side by side."""
QueryCalls = tuple[StepCalls, ...]
"""Steps, each after all of the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCall:
    """One generation as it happened."""

    request: GenerationRequest
    began_s: float
    """time.perf_counter() at the engine's accept, as `ended_s` at its last token: one clock for the whole machine."""
    ended_s: float
    completion_tokens: int

    @classmethod
    def ended(cls, request: GenerationRequest, began_s: float, generation: Generation) -> RecordedCall:
        """Return a call that ends now."""
        tokens = generation.usage.completion_tokens
        return cls(request=request, began_s=began_s, ended_s=time.perf_counter(), completion_tokens=tokens)


class RecordingEngine:
    """An engine that notes every generation of another in a file, at once; implements `protocols.Engine`.

    `before`: done with the other engine once, before the first call is timed; nothing of it is noted.
    """

    def __init__(self, engine: Engine, path: Path, *, before: Callable[[Engine], Awaitable[None]] | None = None) -> None:
        self._engine = engine
        self._path = path
        self._before = before
        self._opening = asyncio.Lock()

    @property
    def label(self) -> str:
        """The other engine's."""
        return self._engine.label

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate and note it. Raises as the other engine."""
        await self._open()
        began_s = time.perf_counter()
        generation = await self._engine.generate(request)
        self._note(request, began_s, generation)
        return generation

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta | Generation]:
        """Generate piece by piece and note it. Raises as the other engine."""
        await self._open()
        began_s = time.perf_counter()
        async for item in self._engine.stream(request):
            if isinstance(item, Generation):
                self._note(request, began_s, item)
            yield item

    async def close(self) -> None:
        """Close the other engine."""
        await self._engine.close()

    async def _open(self) -> None:
        async with self._opening:
            if self._before is not None:
                await self._before(self._engine)
                self._before = None

    def _note(self, request: GenerationRequest, began_s: float, generation: Generation) -> None:
        call = RecordedCall.ended(request, began_s, generation)
        with self._path.open("ab", buffering=0) as file:
            file.write(pickle.dumps(call))


def read_calls(path: Path) -> list[RecordedCall]:
    """Return the calls that a recording engine noted."""
    calls: list[RecordedCall] = []
    with path.open("rb") as file:
        while file.peek(1):
            calls.append(pickle.load(file))  # noqa: S301 -- written by this bench a moment ago
    return calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Work between the first call and the last token."""

    tokens: int
    """Completion tokens."""
    seconds: float
    under_way: float
    """Calls at the engine, mean over the window."""

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens per second."""
        return self.tokens / self.seconds


def window_of(calls: Sequence[RecordedCall]) -> Window:
    """Return the window of recorded calls."""
    seconds = max(call.ended_s for call in calls) - min(call.began_s for call in calls)
    return Window(
        tokens=sum(call.completion_tokens for call in calls),
        seconds=seconds,
        under_way=sum(call.ended_s - call.began_s for call in calls) / seconds,
    )


def graph_of(calls: Iterable[RecordedCall]) -> tuple[QueryCalls, ...]:
    """Return the queries behind recorded calls, in the order in which they began.

    Reads `call_id`, which is `trace/step/agent`, with `#n` behind it from the second call of an agent's tool loop on.
    """
    graph: dict[str, dict[int, dict[str, list[GenerationRequest]]]] = {}
    for call in sorted(calls, key=lambda call: call.began_s):
        trace, step, agent = call.request.call_id.split("/")
        steps = graph.setdefault(trace, {})
        steps.setdefault(int(step), {}).setdefault(agent.partition("#")[0], []).append(call.request)
    return tuple(tuple(tuple(map(tuple, steps[number].values())) for number in sorted(steps)) for steps in graph.values())


async def replay_calls(engine: Engine, graph: Sequence[QueryCalls], in_flight: int) -> Window:
    """Run a graph on a bare engine, `in_flight` queries at a time, and return its window."""
    waiting = iter(graph)
    done: list[RecordedCall] = []

    async def chain(requests: Chain) -> None:
        for request in requests:
            done.append(await _timed(engine, request))

    async def worker() -> None:
        for query in waiting:
            for step in query:
                await asyncio.gather(*map(chain, step))

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return window_of(done)


async def replay_flat(engine: Engine, graph: Sequence[QueryCalls]) -> Window:
    """Run all calls of a graph as one list, none waiting for another, as the engine has room."""
    requests = [request for query in graph for step in query for calls in step for request in calls]
    return window_of(await asyncio.gather(*(_timed(engine, request) for request in requests)))


async def _timed(engine: Engine, request: GenerationRequest) -> RecordedCall:
    began_s = time.perf_counter()
    return RecordedCall.ended(request, began_s, await engine.generate(request))


def replayed(config: Config, graph: Sequence[QueryCalls], in_flight: int | None) -> Window:
    """Replay a graph on the bare engine, in a fresh process with an engine's environment; `in_flight` None: as a flat list."""
    gpus = config.llms[_llm(config)].gpus
    replay = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, runtime_env={"env_vars": dict(ENGINE_ENV)})(_replay)
    window: Window = ray.get(replay.remote(config.model_dump_json(), tuple(graph), in_flight))
    return window


def _replay(config_json: str, graph: Sequence[QueryCalls], in_flight: int | None) -> Window:
    config = Config.model_validate_json(config_json)
    name = _llm(config)
    engine = build_engine(config, name, callable_agents(config, name))

    async def run() -> Window:
        try:
            await warm(engine)
            return await (replay_flat(engine, graph) if in_flight is None else replay_calls(engine, graph, in_flight))
        finally:
            await engine.close()

    return asyncio.run(run())


def _llm(config: Config) -> str:
    """Return the one LLM of a pool."""
    (name,) = config.llms
    return name


BAR = 0.9
IN_FLIGHT = (8, 16, 32)
WIDE_IN_FLIGHT = 32
FLAT_IN_FLIGHT = 16
"""Where the flat list is measured, and both engines on the same calls."""
MODES: dict[str, float | None] = {"dense": None, "epsilon": 0.2}
"""Name of a mode of rollouts -> its epsilon."""
_PIPELINE_QUERIES = {8: 24, 16: 32, 32: 64}
_ROLLOUT_QUERIES = {"dense": 16, "epsilon": 32}
_SUITE = "shared"
_MAX_TOKENS = 24
_MAX_STEPS = 3
_LIMITS = Limits(max_steps=2, max_tokens=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The arms in one round."""

    ours: Window
    """The evaluation pipeline's, or rollouts'."""
    replay: Window
    """The same calls on the bare engine."""
    flat: Window | None = None
    """None where the flat list was not run."""


def run(ids: Collection[str], rounds: int | None = None, engine: str | None = None) -> list[BenchResult]:
    """Measure P5, P13 or both. A round of P5 takes some four minutes on two cores and an engine, one of P13 three.

    P5 runs on every engine that is installed, or on `engine` alone. Raises ConfigError for an engine that is not installed,
    DmoaError if a query failed.
    """
    engines = engines_here(engine) if "P5" in ids else ()
    pool = load_pool(None)
    for llm in pool.llms.values():
        resolve_model(llm.model)
    fetch("minilm")
    started_ray = start_ray()
    results: list[BenchResult] = []
    try:
        for name in engines:
            results += _run_p5(pool, name, rounds or 2)
        if "P13" in ids:
            figures = {mode: _measure_rollouts(pool, mode, rounds or 2) for mode in MODES}
            results += rollout_results(figures, engine=LABELS["transformers"])
    finally:
        if started_ray:
            ray.shutdown()
    return results


def _run_p5(pool: Config, name: str, rounds: int) -> list[BenchResult]:
    own, label = on_engine(pool, name), LABELS[name]
    figures = {in_flight: _measure_pipeline(own, in_flight, rounds) for in_flight in IN_FLIGHT}
    results = pipeline_results({n: found for n, (found, _) in figures.items()}, engine=label)
    if name != "transformers":
        return [*results, _beside(pool, own, figures[FLAT_IN_FLIGHT][1], rounds, engine=label)]
    wide, _ = _measure_pipeline(_with_room(own, WIDE_IN_FLIGHT), WIDE_IN_FLIGHT, rounds)
    return [*results, wide_result(wide, engine=label)]


def pipeline_results(figures: Mapping[int, Sequence[Round]], *, engine: str) -> list[BenchResult]:
    """Return the results of all rounds by queries in flight: the ratios, the lowest of them as P5, and what lies behind them."""
    note = "evaluation pipeline's tokens/s / replay of the same calls on the bare engine"
    what = {n: f"{n} queries in flight" for n in figures}
    results = _judged("P5", figures, what, note, engine, lowest="the lowest")
    fill = "mean of the calls at the engine, pipeline / replay; below 1: gaps between calls"
    results += [
        record(f"P5.{n}.fill", _ratio(rounds, "under_way"), "x", engine=engine, note=f"{fill}; {what[n]}")
        for n, rounds in figures.items()
    ]
    for n, rounds in figures.items():
        arms = {
            f"P5.{n}.pipeline": [r.ours for r in rounds],
            f"P5.{n}.replay": [r.replay for r in rounds],
            "P5.flat": [r.flat for r in rounds if r.flat is not None],
        }
        for id_, windows in arms.items():
            how = "all calls handed in at once, none waiting for another; beside" if id_ == "P5.flat" else "with"
            if windows:
                speeds = spread([window.tokens_per_s for window in windows])
                results.append(record(id_, speeds, "tokens/s", engine=engine, note=f"{how} {what[n]}"))
    return results


def wide_result(rounds: Sequence[Round], *, engine: str) -> BenchResult:
    """Return the ratio of an engine with a place for every call; reported, because no shipped pool has so wide a batch."""
    what = f"as P5.{WIDE_IN_FLIGHT}, on an engine that decodes all calls of {WIDE_IN_FLIGHT} queries at once"
    return record("P5.wide", _ratio(rounds, "tokens_per_s"), "x", engine=engine, note=what)


def rollout_results(figures: Mapping[str, Sequence[Round]], *, engine: str) -> list[BenchResult]:
    """Return the ratios by mode, the lower of them as P13, and what lies behind them."""
    note = "rollouts' tokens/s / replay of the same calls on the bare engine"
    results = _judged("P13", figures, {mode: mode for mode in figures}, note, engine, lowest="the lower")
    for mode, rounds in figures.items():
        fill = "mean of the calls at the engine, rollouts / replay; below 1: gaps between calls"
        results.append(record(f"P13.{mode}.fill", _ratio(rounds, "under_way"), "x", engine=engine, note=fill))
        speeds = spread([one.ours.tokens_per_s for one in rounds])
        results.append(record(f"P13.{mode}.tokens", speeds, "tokens/s", engine=engine, note=f"{mode} rollouts"))
    return results


def _judged(
    id_: str, figures: Mapping[Any, Sequence[Round]], what: Mapping[Any, str], note: str, engine: str, *, lowest: str
) -> list[BenchResult]:
    """Return the lowest ratio under the bare id, and every one under its own."""
    ratios = {key: _ratio(rounds, "tokens_per_s") for key, rounds in figures.items()}
    worst = min(ratios, key=lambda key: ratios[key].value)
    return [
        record(id_, ratios[worst], "x", engine=engine, note=f"{note}; {lowest}, {what[worst]}", at_least=BAR),
        *(
            record(f"{id_}.{key}", found, "x", engine=engine, note=f"{note}; {what[key]}", at_least=BAR)
            for key, found in ratios.items()
        ),
    ]


def _ratio(rounds: Sequence[Round], name: str) -> Spread:
    return ratio([getattr(one.ours, name) for one in rounds], [getattr(one.replay, name) for one in rounds])


def _beside(pool: Config, moved: Config, graph: Sequence[QueryCalls], rounds: int, *, engine: str) -> BenchResult:
    """Replay the same calls on the engine of `pool` and on that of `moved`, without anything between engine and calls."""
    windows = [tuple(replayed(config, graph, FLAT_IN_FLIGHT) for config in (pool, moved)) for _ in range(rounds)]
    speeds = [[window.tokens_per_s for window in side] for side in zip(*windows, strict=True)]
    what = f"tokens/s of the bare engine / of transformers, {spread(speeds[0]).value:.1f}, on the same calls"
    found = ratio(speeds[1], speeds[0])
    return record("P5.engines", found, "x", engine=engine, note=f"{what}; {FLAT_IN_FLIGHT} queries in flight")


def _measure(
    config: Config, in_flight: int, rounds: int, work: Callable[[Path], None], *, has_flat: bool = False
) -> tuple[list[Round], tuple[QueryCalls, ...]]:
    """Run the arms in turns; every other round replays first, by the calls of the round before. Returns the last calls, too.

    `work` leaves its calls as `calls` in the folder it is given.
    """
    graph: tuple[QueryCalls, ...] = ()
    found: list[Round] = []

    def bare() -> tuple[Window, Window | None]:
        return replayed(config, graph, in_flight), replayed(config, graph, None) if has_flat else None

    for number in range(rounds):
        before = bare() if number % 2 else None
        with tempfile.TemporaryDirectory() as scratch:
            work(Path(scratch))
            calls = read_calls(Path(scratch) / "calls")
        graph = graph_of(calls)
        replay, flat = before or bare()
        found.append(Round(ours=window_of(calls), replay=replay, flat=flat))
    return found, graph


def _measure_pipeline(config: Config, in_flight: int, rounds: int) -> tuple[list[Round], tuple[QueryCalls, ...]]:
    return _measure(config, in_flight, rounds, partial(_answer, config, in_flight), has_flat=in_flight == FLAT_IN_FLIGHT)


def _measure_rollouts(config: Config, mode: str, rounds: int) -> list[Round]:
    return _measure(config, _places(config) // width(config, MODES[mode]), rounds, partial(_collect, config, mode))[0]


def _width(config: Config) -> int:
    """Return the most calls that one query has under way."""
    return min(config.gate.activation.max_agents, len(config.agents))


def _with_room(pool: Config, in_flight: int) -> Config:
    """Return the pool with an engine that decodes all calls of so many queries at once."""
    llms = {name: llm.model_copy(update={"max_num_seqs": in_flight * _width(pool)}) for name, llm in pool.llms.items()}
    return pool.model_copy(update={"llms": llms})


def _places(config: Config) -> int:
    return OVERCOMMIT * sum(llm.max_num_seqs for llm in config.llms.values())


def _answer(config: Config, in_flight: int, scratch: Path) -> None:
    """Ask the rows through the evaluation pipeline. Raises DmoaError if a query failed."""
    folder = RunFolder(scratch)
    rows = SUITES[_SUITE].generate("test", _PIPELINE_QUERIES[in_flight], 0)
    write_lines(folder.tasks(_SUITE), (row.task for row in rows))
    limits = limits_for(config.changed("limits", max_steps=_MAX_STEPS))
    workers = AnswerWorkers(
        open_swarm=OpenRecorded(config_json=config.model_dump_json(), calls=scratch / "calls"),
        places=in_flight * _width(config),
        widths={"dmoa": _width(config)},
        num_gpus=sum(llm.gpus for llm in config.llms.values()),
        env=ENGINE_ENV,
    )
    asking = Asking(seed=0, limits=replace(limits, max_tokens=_MAX_TOKENS))
    answer_all(folder, [_SUITE], ["dmoa"], asking, workers, lambda progress: None)
    lost = [row for row in folder.read_answers(_SUITE, "dmoa") if row.status == "failed"]
    if lost:
        raise DmoaError(f"bench: {len(lost)} queries failed, the first by {lost[0].error}")


def _collect(config: Config, mode: str, scratch: Path) -> None:
    """Collect rollouts. Raises DmoaError if a query failed."""
    manifest = collect(_session(config, mode, scratch / "rollouts", scratch / "calls"))
    if manifest.failures:
        raise DmoaError(f"bench: {manifest.counts.failed} queries failed, the last: {manifest.failures[-1]}")


def _session(config: Config, mode: str, root: Path, calls: Path) -> CollectSession:
    """Return what `dmoa rollouts` would put together, on a recording engine."""
    epsilon, preset = MODES[mode], config.gate.preset
    options = RolloutOptions.parse({"out": root, "benchmarks": _SUITE, "epsilon": epsilon})
    manifest = new_manifest(options, config, "", "dmoa bench")
    recording = OpenRecorded(config_json=config.model_dump_json(), calls=calls)
    rows = SUITES[_SUITE].generate("train", _ROLLOUT_QUERIES[mode], 0)
    queries = [RolloutQuery(query_id=row.task.row_id, source=_SUITE, split="train", text=row.task.text) for row in rows]
    return CollectSession(
        folder=RolloutFolder(root),
        manifest=manifest,
        prepare=lambda: CollectedQueries(queries=queries, sources=[]),
        asking=RolloutAsking(seed=0, round=0, limits=_LIMITS, preset=preset, fingerprint=manifest.pool_fingerprint),
        workers=CollectWorkers(
            open_swarm=OpenCollectingPool(pool=recording, epsilon=epsilon),
            places=_places(config),
            width=width(config, epsilon),
            env=ENGINE_ENV,
        ),
        say=lambda text: None,
        watch=lambda progress: None,
        open_ray=nullcontext,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRecorded:
    """Loads a pool as `dmoa evaluate` and `dmoa rollouts` do, with an engine that notes its calls."""

    config_json: str
    calls: Path
    """File of the notes."""

    def __call__(self) -> Swarm:
        """Return the swarm, warm; blocks while models load."""
        config = Config.model_validate_json(self.config_json)
        gate, record = build_pool_gate(config)
        router = LocalRouter()
        router.install(record.version, gate)
        encoder = build_encoder(config)
        asyncio.run(encoder.embed(["A first text."]))
        name = _llm(config)
        engine = RecordingEngine(build_engine(config, name, callable_agents(config, name)), self.calls, before=warm)
        agents = LocalAgents(build_agents(config, name, engine))
        return Swarm(config, agents=agents, router=router, encoder=encoder, engines=(engine,))
