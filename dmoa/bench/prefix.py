"""P6, P7 and the growth of prefill: what the agents of a step, and the steps of a query, share of their prompts.

One query is asked step by step with set contributions, by the prompt layout of `agents.prompts`, on the `transformers` engine
and, where it is installed, on vLLM. P7 holds what was prefilled against the least that a cache of whole blocks allows, and the
time to the first token against prompts that begin with the role. P6 is what two more agents cost a step. No Ray here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from scipy.stats import linregress

from dmoa.agents.pool import build_engine
from dmoa.agents.prompts import COMMON_SYSTEM, agent_messages
from dmoa.bench.harness import BenchResult, engines_here, generate_all, interleave, ratio, record, spread, warm
from dmoa.config import Config
from dmoa.engines.chat_template import encode_chat, load_tokenizer
from dmoa.engines.models import fetch
from dmoa.protocols import Engine
from dmoa.types import GenerationRequest, Message, Query, Sampling

MODEL = "smollm2-135m"
PREFILL_BAR = 1.15
FIRST_TOKEN_BAR = 0.5
GROWTH_BAR = 1.1
STEPS = 20
_FIRST_TOKEN_STEPS = 4
_FIRST_TOKEN_AGENTS = (3, 4)
"""The first is judged, the second reported. Where an engine prefills one prompt after the other, the mean wait of n agents is at
least 2 / (n + 1) of that of role-first prompts."""
_FIRST_TOKEN_SENTENCES = 24
"""A question with its passages, as in HotpotQA: what role-first prompts compute once for every agent."""
_PROFILES = (
    "Solves problems step by step.",
    "Checks the work of others.",
    "Explains results in plain words.",
    "Looks for another way to the same result.",
)
_BLOCK = {"transformers": 1, "vllm": 32}
"""Tokens that each engine reuses at a time."""
_WORK = "The train covers {n} kilometres before noon and {m} after it, so both parts together must be added up with care. "
_OPTIONS: dict[str, dict[str, Any]] = {
    "transformers": {"max_model_len": 4096},
    "vllm": {"dtype": "float32", "max_model_len": 4096, "cpu_kv_cache_gib": 2},
}


@dataclass(frozen=True, slots=True)
class Arm:
    """An engine in an event loop of its own."""

    name: str
    engine: Engine
    runner: asyncio.Runner
    tokenizer: Any


def run(ids: Collection[str], rounds: int = 3, engine: str | None = None) -> list[BenchResult]:
    """Return the results of P6, P7 and prefill for every engine that is installed, or for one. Takes some minutes."""
    results: list[BenchResult] = []
    for name in engines_here(engine):
        with _arm(name) as arm:
            if {"P7", "prefill"} & set(ids):
                results += _prefill(arm, ids)
            if "P7" in ids:
                results += [_first_token(arm, rounds, num_agents) for num_agents in _FIRST_TOKEN_AGENTS]
            if "P6" in ids:
                results.append(_more_agents(arm, rounds))
    return results


@contextmanager
def _arm(name: str) -> Iterator[Arm]:
    tree = {"model": f"embedded:{MODEL}", "engine": name, "max_num_seqs": 16, "engine_kwargs": _OPTIONS[name]}
    agents = [{"name": "a", "llm": "m", "profile": "x"}]
    config = Config.model_validate({"name": "bench", "llms": {"m": tree}, "agents": agents})
    with asyncio.Runner() as runner:
        engine = build_engine(config, "m", list(config.agents))
        arm = Arm(name, engine, runner, load_tokenizer(str(fetch(MODEL)), None))
        runner.run(warm(engine))
        try:
            yield arm
        finally:
            runner.run(engine.close())


def step_of(
    salt: int, step: int, *, num_agents: int, max_tokens: int, sentences: int = 6, role_first: bool = False
) -> list[GenerationRequest]:
    """Return the calls of one step of query number `salt`, whose earlier steps contributed set texts.

    `sentences`: how long the question is; `role_first`: the same words, the role in the system text.
    """
    text = f"Question {salt}. " + "".join(_WORK.format(n=salt + k, m=7 * k) for k in range(sentences)) + "How far is it in all?"
    query = Query(trace_id=f"{salt}", text=text)
    history = [_WORK.format(n=salt * k, m=3 * k) * 2 for k in range(step)]
    requests = []
    for number, profile in enumerate(_PROFILES[:num_agents]):
        messages = agent_messages(query, history, profile=profile)
        if role_first:
            system = Message(role="system", content=f"Your role: {profile} {COMMON_SYSTEM}")
            messages = (system, *(replace(m, content=m.content.replace(f" Your role: {profile}", "")) for m in messages[1:]))
        name = f"{salt}/{step}/{number}/{role_first}"
        sampling = Sampling(max_tokens=max_tokens)
        requests.append(GenerationRequest(request_id=name, call_id=name, messages=tuple(messages), sampling=sampling))
    return requests


def least_prefill(prompts: Sequence[Sequence[int]], block: int) -> list[int]:
    """Return the fewest tokens that each prompt must be prefilled with, after those before it.

    Whole blocks that an earlier prompt began with are there; the last token is always computed, for its logits.
    """
    found = []
    for number, prompt in enumerate(prompts):
        shared = max((_common(prompt, earlier) for earlier in prompts[:number]), default=0)
        found.append(len(prompt) - min(shared, len(prompt) - 1) // block * block)
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two prompts begin with in common."""
    different = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def _prefill(arm: Arm, ids: Collection[str]) -> list[BenchResult]:
    """Ask one query of many steps, and hold what was prefilled against the least."""
    prefilled: list[int] = []
    prompts: list[list[int]] = []
    for step in range(STEPS):
        requests = step_of(1000, step, num_agents=3, max_tokens=2)
        replies = arm.runner.run(generate_all(arm.engine, requests))
        prompts += [encode_chat(arm.tokenizer, request.messages, model=MODEL) for request in requests]
        prefilled.append(sum(reply.usage.prompt_tokens - reply.usage.cached_tokens for reply in replies))
    costs = least_prefill(prompts, _BLOCK[arm.name])
    least = [sum(costs[3 * step : 3 * step + 3]) for step in range(STEPS)]
    results = []
    if "P7" in ids:
        note = f"prefilled prompt tokens / the least with blocks of {_BLOCK[arm.name]}; {STEPS} steps of 3 agents"
        found = spread([sum(prefilled) / sum(least)])
        results.append(record("P7", found, "x", engine=arm.engine.label, note=note, at_most=PREFILL_BAR))
    if "prefill" in ids:
        note = f"log-log slope of all prefilled tokens over the steps, 1 to {STEPS}, 3 agents"
        found = spread([float(linregress(np.log(np.arange(1, STEPS + 1)), np.log(np.cumsum(prefilled))).slope)])
        results.append(record("prefill", found, "slope", engine=arm.engine.label, note=note, at_most=GROWTH_BAR))
    return results


def _first_token(arm: Arm, rounds: int, num_agents: int) -> BenchResult:
    salts = count(2001 + 10_000 * num_agents)  # no size meets a prompt that another has asked
    tokens = 0

    def layout(role_first: bool) -> Callable[[], float]:
        def call() -> float:
            nonlocal tokens
            salt = next(salts)
            waits: list[float] = []
            for step in range(_FIRST_TOKEN_STEPS):
                requests = step_of(
                    salt,
                    step,
                    num_agents=num_agents,
                    max_tokens=1,
                    sentences=_FIRST_TOKEN_SENTENCES,
                    role_first=role_first,
                )
                tokens = len(encode_chat(arm.tokenizer, requests[0].messages, model=MODEL))
                waits += arm.runner.run(_first_tokens(arm, requests))
            return sum(waits) / len(waits)

        return call

    figures = interleave({"ours": layout(False), "role first": layout(True)}, rounds)
    found = ratio(figures["ours"], figures["role first"])
    millis = {name: round(1e3 * spread(values).value) for name, values in figures.items()}
    note = (
        f"mean time to the first token, {millis['ours']} ms / prompts that begin with the role, {millis['role first']} ms; "
        f"{_FIRST_TOKEN_STEPS} steps of {num_agents} agents, prompts of at most {tokens} tokens"
    )
    is_judged = num_agents == _FIRST_TOKEN_AGENTS[0]
    id_, bar = ("P7.first_token", FIRST_TOKEN_BAR) if is_judged else (f"P7.first_token.{num_agents}", None)
    return record(id_, found, "x", engine=arm.engine.label, note=note, at_most=bar)


async def _first_tokens(arm: Arm, requests: Sequence[GenerationRequest]) -> list[float]:
    async def wait(request: GenerationRequest) -> float:
        began = time.perf_counter()
        first = None
        async for _ in arm.engine.stream(request):
            first = first or time.perf_counter() - began
        return first or 0.0

    return list(await asyncio.gather(*map(wait, requests)))


def _more_agents(arm: Arm, rounds: int) -> BenchResult:
    salts = count(2001)

    def step(num_agents: int) -> Callable[[], float]:
        def call() -> float:
            requests = step_of(next(salts), 1, num_agents=num_agents, max_tokens=24)
            began = time.perf_counter()
            replies = arm.runner.run(generate_all(arm.engine, requests))
            # By the longest reply: the arms are to be compared at equal tokens.
            return (time.perf_counter() - began) / max(reply.usage.completion_tokens for reply in replies)

        return call

    figures = interleave({"three": step(3), "one": step(1)}, rounds)
    note = "seconds per token of the longest reply, a step with 3 agents / with 1; the bar (1.15) is for data-centre GPUs"
    return record("P6", ratio(figures["three"], figures["one"]), "x", engine=arm.engine.label, note=note)
