"""P13: how full the collecting of rollouts keeps an engine, on the embedded model.

One arm collects rollouts of generated rows through Ray Data, as `dmoa rollouts` does, and records every engine call. The
other replays the same calls with the same dependencies on the bare engine, as many queries in flight; see `pipeline_bench`,
which measures evaluation the same way. P13 is the lower of the ratios of dense and of epsilon-exploring rollouts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmoa import __version__
from dmoa.agents.pool import fingerprint, load_pool
from dmoa.bench.bare_engine import recorded_swarm, replayed
from dmoa.bench.call_graph import QueryCalls, Window, graph_of, read_calls, window_of
from dmoa.bench.measure import BenchResult, Spread, ratio, record, spread
from dmoa.config import Config
from dmoa.dataflow import OVERCOMMIT
from dmoa.engines.models import fetch, resolve_model
from dmoa.errors import DmoaError
from dmoa.evaluation.registry import SUITES
from dmoa.training.collect import CollectedQueries, CollectSession, CollectWorkers, RolloutAsking, SwarmCollector, collect, width
from dmoa.training.rollouts import Manifest, RolloutFolder, RolloutQuery
from dmoa.types import Limits

BAR = 0.9
MODES: dict[str, float | None] = {"dense": None, "epsilon": 0.2}
"""Name of a mode -> its epsilon."""
_NUM_QUERIES = {"dense": 16, "epsilon": 32}
_SUITE = "shared"
_LIMITS = Limits(max_steps=2, max_tokens=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The arms in one round."""

    rollouts: Window
    replay: Window


def run(ids: Collection[str], rounds: int | None = None) -> list[BenchResult]:
    """Measure P13; a round takes some three minutes on two cores. Raises DmoaError if a query failed."""
    import ray

    from dmoa.serving.launch import start_ray

    pool = load_pool(None)
    for llm in pool.llms.values():
        resolve_model(llm.model)
    fetch("minilm")
    started_ray = start_ray()
    try:
        figures = {mode: _measure(pool, mode, rounds or 2) for mode in MODES}
    finally:
        if started_ray:
            ray.shutdown()
    return judged(figures, engine="transformers/float32")


def judged(figures: Mapping[str, Sequence[Round]], *, engine: str) -> list[BenchResult]:
    """Return the ratios by mode, the lower of them as P13, and what lies behind them."""
    found = {mode: _ratio(rounds, "tokens_per_s") for mode, rounds in figures.items()}
    worst = min(found, key=lambda mode: found[mode].value)
    note = "rollouts' tokens/s / replay of the same calls on the bare engine"
    results = [record("P13", found[worst], "x", engine=engine, note=f"{note}; the lower, {worst}", at_least=BAR)]
    results += [
        record(f"P13.{mode}", one, "x", engine=engine, note=f"{note}; {mode}", at_least=BAR) for mode, one in found.items()
    ]
    for mode, rounds in figures.items():
        fill = "mean of the calls at the engine, rollouts / replay; below 1: gaps between calls"
        results.append(record(f"P13.{mode}.fill", _ratio(rounds, "under_way"), "x", engine=engine, note=fill))
        speeds = spread([one.rollouts.tokens_per_s for one in rounds])
        results.append(record(f"P13.{mode}.tokens", speeds, "tokens/s", engine=engine, note=f"{mode} rollouts"))
    return results


def _ratio(rounds: Sequence[Round], name: str) -> Spread:
    return ratio([getattr(one.rollouts, name) for one in rounds], [getattr(one.replay, name) for one in rounds])


def _measure(config: Config, mode: str, rounds: int) -> list[Round]:
    """Run the arms in turns; every other round replays first, by the calls of the round before."""
    graph: tuple[QueryCalls, ...] = ()
    found: list[Round] = []
    in_flight = _places(config) // width(config, MODES[mode])
    for number in range(rounds):
        again = replayed(config, graph, in_flight) if number % 2 else None
        collected, graph = _collected(config, mode)
        found.append(Round(rollouts=collected, replay=again or replayed(config, graph, in_flight)))
    return found


def _places(config: Config) -> int:
    return OVERCOMMIT * sum(llm.max_num_seqs for llm in config.llms.values())


def _collected(config: Config, mode: str) -> tuple[Window, tuple[QueryCalls, ...]]:
    """Collect rollouts; return their window and the graph of their calls."""
    with tempfile.TemporaryDirectory() as scratch:
        calls = Path(scratch) / "calls"
        manifest = collect(_session(config, mode, Path(scratch) / "rollouts", calls))
        if manifest.failures:
            raise DmoaError(f"bench: {manifest.counts.failed} queries failed, the last: {manifest.failures[-1]}")
        recorded = read_calls(calls)
    return window_of(recorded), graph_of(recorded)


def _session(config: Config, mode: str, root: Path, calls: Path) -> CollectSession:
    """Return what `dmoa rollouts` would put together, on a recording engine."""
    from contextlib import nullcontext

    from dmoa.serving.agent_replica import ENGINE_ENV

    epsilon, preset, own = MODES[mode], config.gate.preset, fingerprint(config)
    rows = SUITES[_SUITE].generate("train", _NUM_QUERIES[mode], 0)
    queries = [RolloutQuery(query_id=row.task.row_id, source=_SUITE, split="train", text=row.task.text) for row in rows]
    return CollectSession(
        folder=RolloutFolder(root),
        manifest=Manifest(
            pool=config.name,
            pool_fingerprint=own,
            agents=list(config.agent_names),
            gate_version="",
            preset=preset,
            engines=[],
            sources=[],
            mode="dense" if epsilon is None else "epsilon",
            epsilon=epsilon,
            seed=0,
            options={},
            config={},
            dmoa_version=__version__,
            started_unix_s=time.time(),
        ),
        prepare=lambda: CollectedQueries(queries=queries, sources=[]),
        asking=RolloutAsking(seed=0, round=0, limits=_LIMITS, preset=preset, fingerprint=own),
        workers=CollectWorkers(
            open_collector=OpenRecorded(config_json=config.model_dump_json(), calls=calls, epsilon=epsilon),
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
    """Loads a pool as `dmoa rollouts` does, with an engine that notes its calls."""

    config_json: str
    calls: Path
    epsilon: float | None

    def __call__(self) -> SwarmCollector:
        """Return the swarm, warm; blocks while models load."""
        swarm, _ = recorded_swarm(Config.model_validate_json(self.config_json), self.calls)
        return SwarmCollector(swarm, self.epsilon)
