"""What every bench shares: arms run in turns, medians with their spread, results as records, and the engines they run on.

Ratios are taken within one round, so that a slow minute of a shared machine hits both arms alike.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from pydantic import BaseModel, ConfigDict

from dmoa.agents.pool import vllm_builds
from dmoa.config import Config, LlmConfig
from dmoa.errors import ConfigError
from dmoa.protocols import Engine
from dmoa.provenance import Machine
from dmoa.types import Generation, GenerationRequest, Message, Sampling
from dmoa.validation import did_you_mean


class BenchResult(BaseModel):
    """One measured figure beside its bar: an entry of `results` in the file that `dmoa bench` writes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str
    """Metric of the plan, such as `P1`; what is only reported beside it has a suffix, such as `P1.records`."""
    value: float
    """Median over the rounds."""
    unit: str
    """Unit of value, low and high, such as `x` or `ms`."""
    low: float
    """Lower end of the spread over the rounds."""
    high: float
    """Upper end of the spread over the rounds."""
    rounds: int
    """Rounds measured, the warm-up not counted."""
    bar: str
    """What the metric must reach, such as `<= 1.5x`; empty where it is only reported."""
    passed: bool | None
    """Whether the median reaches the bar; None where there is none."""
    engine: str
    """Engine and the options that may change numbers; `null` for scripted agents, `gate` where no engine runs."""
    note: str = ""
    """What was measured against what."""


class BenchReport(BaseModel):
    """The file that `dmoa bench --json` writes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    machine: Machine
    results: list[BenchResult]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of several rounds with the first and third quartile."""

    value: float
    low: float
    high: float
    rounds: int


def interleave(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every arm once per round, in turns, and return what each returned, by name, in order of the rounds.

    One round before the first is thrown away; every other round runs the arms backwards, so that none profits from
    its place. Raises ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    names = list(arms)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        arms[name]()
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            figures[name].append(arms[name]())
    return figures


def spread(figures: Sequence[float]) -> Spread:
    """Return median and quartiles of the rounds' figures."""
    if len(figures) == 1:
        return Spread(figures[0], figures[0], figures[0], 1)
    low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
    return Spread(median, low, high, len(figures))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of the ratios taken round by round."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def record(
    id_: str,
    found: Spread,
    unit: str,
    *,
    engine: str,
    note: str,
    at_least: float | None = None,
    at_most: float | None = None,
    bar_unit: str = "",
) -> BenchResult:
    """Return the entry of a figure, judged where it has a bar in its own unit; `bar_unit` is written behind the bar."""
    bar, passed = "", None
    if at_least is not None:
        bar, passed = f">= {at_least}{bar_unit}", found.value >= at_least
    if at_most is not None:
        bar, passed = f"<= {at_most}{bar_unit}", found.value <= at_most
    return BenchResult(id=id_, unit=unit, bar=bar, passed=passed, engine=engine, note=note, **asdict(found))


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Return the mean wall time of `calls` calls in a row, in seconds."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


LABELS = {"transformers": "transformers/float32", "vllm": "vllm/float32"}
"""Name of an engine -> its label, with the dtype that benches run it in."""
_VLLM_OPTIONS: dict[str, Any] = {"dtype": "float32", "cpu_kv_cache_gib": 2}


def engines_here(only: str | None = None) -> tuple[str, ...]:
    """Return the engines that can run the embedded model here, vLLM only where it is installed; or just the one that is named.

    Raises ConfigError for one that is not among them.
    """
    here = ("transformers", *(["vllm"] if len(vllm_builds()) == 1 else []))
    if only is None:
        return here
    if only not in here:
        nearest = did_you_mean(only, here)
        raise ConfigError(
            f"--engine is {only!r}; expected one of {', '.join(here)}, the engines that are installed here{nearest}"
        )
    return (only,)


def on_engine(pool: Config, engine: str, **options: Any) -> Config:
    """Return a pool of `transformers` LLMs with all of them on an engine, as long in context, wide and placed as they were.

    `options`: entries of `engine_kwargs` for vLLM, over those that benches set.
    """
    if engine == "transformers":
        return pool
    return pool.model_copy(update={"llms": {name: _on_vllm(part, options) for name, part in pool.llms.items()}})


def _on_vllm(part: LlmConfig, options: dict[str, Any]) -> LlmConfig:
    kept = {key: part.engine_kwargs[key] for key in ("max_model_len",) if key in part.engine_kwargs}
    return LlmConfig.model_validate(part.model_dump() | {"engine": "vllm", "engine_kwargs": kept | _VLLM_OPTIONS | options})


async def warm(engine: Engine) -> None:
    """Let an engine generate once."""
    words = (Message(role="user", content="Count to three."),)
    await engine.generate(GenerationRequest(request_id="warm", messages=words, sampling=Sampling(max_tokens=8)))


async def generate_all(engine: Engine, requests: Iterable[GenerationRequest]) -> list[Generation]:
    """Generate side by side, replies in the order of the requests. Raises as the engine."""
    return list(await asyncio.gather(*map(engine.generate, requests)))


def tokens_per_s(work: Callable[[int], int]) -> Callable[[], float]:
    """Return an arm that times `work`, which takes a number of its own every time and returns how many tokens it made."""
    salts = count(1001)

    def call() -> float:
        began = time.perf_counter()
        tokens = work(next(salts))
        return tokens / (time.perf_counter() - began)

    return call


_TOPICS = ("a river", "seven apples", "the moon", "an old clock", "a lazy fox and its day", "bread", "the number twelve", "rain")


def stories(batch: int, salt: int, *, max_tokens: int) -> list[GenerationRequest]:
    """Return requests for `batch` stories, their prompts of different lengths; take a new salt for every batch."""
    return [
        GenerationRequest(
            request_id=f"{salt}/{i}",
            call_id=f"{salt}/{i}",
            messages=(
                Message(role="system", content=f"{salt}.{i} is the number of this conversation."),
                Message(role="user", content=f"Tell me a short story about {_TOPICS[i % 8]}. " * (1 + i % 3)),
            ),
            sampling=Sampling(max_tokens=max_tokens),
        )
        for i in range(batch)
    ]
