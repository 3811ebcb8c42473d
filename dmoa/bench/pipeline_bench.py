"""P5: how full the evaluation pipeline keeps an engine, on the embedded model, for every engine that is installed.

One arm asks generated rows through Ray Data, as `dmoa evaluate` does, and records every engine call. The other replays
the same calls with the same dependencies on the bare engine, as many queries in flight, in an actor with the same
environment. Both count from the first call to the last token: models are loaded and warm by then. P5 is the lowest of
the ratios at 8, 16 and 32 queries in flight on the default pool as it is shipped, whose engine decodes 16 calls at a time;
P5.wide is reported beside it: 32 queries on an engine that decodes all their calls at once. Where vLLM is installed,
P5.engines holds both engines against each other on the same calls.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dmoa.agents.pool import load_pool
from dmoa.bench.bare_engine import recorded_swarm, replayed
from dmoa.bench.call_graph import QueryCalls, Window, graph_of, read_calls, window_of
from dmoa.bench.engines import LABELS, engines_here, on_engine
from dmoa.bench.measure import BenchResult, ratio, record, spread
from dmoa.config import Config
from dmoa.engines.models import fetch, resolve_model
from dmoa.errors import DmoaError
from dmoa.evaluation.answering import Asking, SwarmOutcome, ask_swarm
from dmoa.evaluation.pipeline import AnswerWorkers, answer_all
from dmoa.evaluation.registry import SUITES
from dmoa.evaluation.run_folder import RunFolder, write_lines
from dmoa.protocols import Engine
from dmoa.swarm import Swarm, limits_for
from dmoa.types import Query

BAR = 0.9
IN_FLIGHT = (8, 16, 32)
WIDE_IN_FLIGHT = 32
FLAT_IN_FLIGHT = 16
"""Where the flat list is measured, and both engines on the same calls."""
_NUM_QUERIES = {8: 24, 16: 32, 32: 64}
_SUITE = "shared"
_MAX_TOKENS = 24
_MAX_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Tokens per second of the arms in one round."""

    pipeline: float
    replay: float
    fill: float
    """Calls at the engine, mean over the window: the pipeline's over the replay's."""
    flat: float | None = None
    """None where the flat list was not run."""


def run(ids: Collection[str], rounds: int | None = None, engine: str | None = None) -> list[BenchResult]:
    """Measure P5 on every engine that is installed, or on one; a round takes some four minutes on two cores and an engine.

    Raises ConfigError for an engine that is not installed, DmoaError if a query failed.
    """
    import ray

    from dmoa.serving.launch import start_ray

    engines = engines_here(engine)
    pool = load_pool(None)
    for llm in pool.llms.values():
        resolve_model(llm.model)
    fetch("minilm")
    started_ray = start_ray()
    results: list[BenchResult] = []
    try:
        for name in engines:
            own = on_engine(pool, name)
            figures = {in_flight: _measure(own, in_flight, rounds or 2) for in_flight in IN_FLIGHT}
            results += judged({n: found for n, (found, _) in figures.items()}, engine=LABELS[name])
            if name == "transformers":
                wide, _ = _measure(_with_room(own, WIDE_IN_FLIGHT), WIDE_IN_FLIGHT, rounds or 2)
                results.append(wide_result(wide, engine=LABELS[name]))
            else:
                results.append(_beside(pool, own, figures[FLAT_IN_FLIGHT][1], rounds or 2, engine=LABELS[name]))
    finally:
        if started_ray:
            ray.shutdown()
    return results


def judged(figures: Mapping[int, Sequence[Round]], *, engine: str) -> list[BenchResult]:
    """Return the results of all rounds by queries in flight: the ratios, the lowest of them as P5, and what lies behind them."""
    ratios = {n: ratio([r.pipeline for r in rounds], [r.replay for r in rounds]) for n, rounds in figures.items()}
    worst = min(ratios, key=lambda n: ratios[n].value)
    note = "evaluation pipeline's tokens/s / replay of the same calls on the bare engine"
    results = [
        record("P5", ratios[worst], "x", engine=engine, note=f"{note}; the lowest, {worst} queries in flight", at_least=BAR),
        *(
            record(f"P5.{n}", found, "x", engine=engine, note=f"{note}; {n} queries in flight", at_least=BAR)
            for n, found in ratios.items()
        ),
    ]
    fills = {n: spread([r.fill for r in rounds]) for n, rounds in figures.items()}
    fill_note = "mean of the calls at the engine, pipeline / replay; below 1: gaps between calls"
    results += [
        record(f"P5.{n}.fill", found, "x", engine=engine, note=f"{fill_note}; {n} queries in flight")
        for n, found in fills.items()
    ]
    for n, rounds in figures.items():
        arms = {
            f"P5.{n}.pipeline": [r.pipeline for r in rounds],
            f"P5.{n}.replay": [r.replay for r in rounds],
            "P5.flat": [r.flat for r in rounds if r.flat is not None],
        }
        for id_, values in arms.items():
            what = "all calls handed in at once, none waiting for another; beside" if id_ == "P5.flat" else "with"
            if values:
                results.append(record(id_, spread(values), "tokens/s", engine=engine, note=f"{what} {n} queries in flight"))
    return results


def wide_result(rounds: Sequence[Round], *, engine: str) -> BenchResult:
    """Return the ratio of an engine with a place for every call; reported, because no shipped pool has so wide a batch."""
    found = ratio([r.pipeline for r in rounds], [r.replay for r in rounds])
    what = f"as P5.{WIDE_IN_FLIGHT}, on an engine that decodes all calls of {WIDE_IN_FLIGHT} queries at once"
    return record("P5.wide", found, "x", engine=engine, note=what)


def _beside(pool: Config, moved: Config, graph: Sequence[QueryCalls], rounds: int, *, engine: str) -> BenchResult:
    """Replay the same calls on the engine of `pool` and on that of `moved`, without anything between engine and calls."""
    windows = [tuple(replayed(config, graph, FLAT_IN_FLIGHT) for config in (pool, moved)) for _ in range(rounds)]
    speeds = [[window.tokens_per_s for window in side] for side in zip(*windows, strict=True)]
    what = f"tokens/s of the bare engine / of transformers, {spread(speeds[0]).value:.1f}, on the same calls"
    found = ratio(speeds[1], speeds[0])
    return record("P5.engines", found, "x", engine=engine, note=f"{what}; {FLAT_IN_FLIGHT} queries in flight")


def _measure(config: Config, in_flight: int, rounds: int) -> tuple[list[Round], tuple[QueryCalls, ...]]:
    """Run the arms in turns; every other round replays first, by the calls of the round before. Returns the last calls, too."""
    graph: tuple[QueryCalls, ...] = ()
    found: list[Round] = []
    for number in range(rounds):
        again = _replayed(config, graph, in_flight) if number % 2 else None
        pipeline, graph = _piped(config, in_flight)
        bare, flat = again or _replayed(config, graph, in_flight)
        fill = pipeline.under_way / bare.under_way
        flat_per_s = flat.tokens_per_s if flat is not None else None
        found.append(Round(pipeline=pipeline.tokens_per_s, replay=bare.tokens_per_s, fill=fill, flat=flat_per_s))
    return found, graph


def _width(config: Config) -> int:
    """Return the most calls that one query has under way."""
    return min(config.gate.activation.max_agents, len(config.agents))


def _with_room(pool: Config, in_flight: int) -> Config:
    """Return the pool with an engine that decodes all calls of so many queries at once."""
    llms = {name: llm.model_copy(update={"max_num_seqs": in_flight * _width(pool)}) for name, llm in pool.llms.items()}
    return pool.model_copy(update={"llms": llms})


def _piped(config: Config, in_flight: int) -> tuple[Window, tuple[QueryCalls, ...]]:
    """Ask the rows through the pipeline; return its window and the graph of its calls."""
    from dmoa.serving.agent_replica import ENGINE_ENV

    with tempfile.TemporaryDirectory() as scratch:
        folder, calls = RunFolder(Path(scratch)), Path(scratch) / "calls"
        rows = SUITES[_SUITE].generate("test", _NUM_QUERIES[in_flight], 0)
        write_lines(folder.tasks(_SUITE), (row.task for row in rows))
        limits = limits_for(config.model_copy(update={"limits": config.limits.model_copy(update={"max_steps": _MAX_STEPS})}))
        workers = AnswerWorkers(
            open_answerer=OpenRecorded(config_json=config.model_dump_json(), calls=calls),
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
        recorded = read_calls(calls)
    return window_of(recorded), graph_of(recorded)


def _replayed(config: Config, graph: tuple[QueryCalls, ...], in_flight: int) -> tuple[Window, Window | None]:
    """Replay a graph; return the window, and that of the flat list where it is asked for."""
    bare = replayed(config, graph, in_flight)
    return bare, replayed(config, graph, None) if in_flight == FLAT_IN_FLIGHT else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRecorded:
    """Loads a pool as `dmoa evaluate` does, with an engine that notes its calls."""

    config_json: str
    calls: Path

    def __call__(self) -> RecordedAnswerer:
        """Return the swarm, warm; blocks while models load."""
        return RecordedAnswerer(*recorded_swarm(Config.model_validate_json(self.config_json), self.calls))


class RecordedAnswerer:
    """A swarm on a recording engine; implements `evaluation.answering.Answerer`."""

    def __init__(self, swarm: Swarm, engine: Engine) -> None:
        self._swarm = swarm
        self._engine = engine

    async def answer(self, query: Query, policy: str, agent: str | None) -> SwarmOutcome:
        """Answer one query. Raises DmoaError."""
        return await ask_swarm(self._swarm, query, policy, agent)

    async def close(self) -> None:
        """Stop the engine."""
        await self._engine.close()
