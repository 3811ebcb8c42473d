"""Acceptance of the vLLM engine on the embedded model; run by `make accept` after `make test-vllm`, which installs vLLM.

The texts of 50 prompts by vLLM and by the transformers engine; a thousand calls that end in every way a call can, after which
vLLM must keep nothing of them. Greedy, float32. Prints one JSON object (or writes it to `--json FILE`) and exits 1 if a bar is
missed, 3 where no vLLM is installed.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from dmoa.config import LlmConfig
from dmoa.engine_options import TransformersOptions
from dmoa.engines.models import resolve_adapter, resolve_model
from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.engines.vllm.start import start_vllm
from dmoa.errors import EngineError
from dmoa.types import Generation, GenerationRequest, Message, Sampling

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import need_vllm, run_check

EQUAL_BAR = 0.95
PROMPTS = 50
CALLS = 1000
IN_FLIGHT = 24
MODEL = "embedded:smollm2-135m"
ADAPTERS = ("builtin:arith", "builtin:words")
_QUESTIONS = (
    "What is {n} + 7?",
    "Name a colour that comes to mind when you read the number {n}.",
    "Say in one sentence why {n} is a good number.",
    "Is {n} even or odd?",
    "Write the number {n} in words.",
)


def vllm_llm() -> LlmConfig:
    """An LLM on vLLM, small enough in blocks of keys and values that long batches are preempted."""
    options = {"dtype": "float32", "max_model_len": 512, "max_lora_rank": 8}
    return LlmConfig.model_validate({"model": MODEL, "engine": "vllm", "max_num_seqs": 16, "engine_kwargs": options})


def asked(
    number: int, *, max_tokens: int, stop: tuple[str, ...] = (), adapter: str | None = None, **more: Any
) -> GenerationRequest:
    """Return one call; every third shares a long beginning with the others like it."""
    shared = "You are one of several agents that solve a task together. Read it, then do your own part of it only. "
    return GenerationRequest(
        request_id=f"call-{number}",
        call_id=f"call-{number}",
        messages=(
            Message(role="system", content=shared * 4 if number % 3 == 0 else f"Conversation {number}."),
            Message(role="user", content=_QUESTIONS[number % len(_QUESTIONS)].format(n=number)),
        ),
        sampling=Sampling(max_tokens=max_tokens, stop=stop),
        adapter=adapter,
        **more,
    )


async def texts(engine: Any) -> list[str]:
    """Return the greedy replies to the prompts, all in flight at once."""
    calls = (engine.generate(asked(number, max_tokens=64)) for number in range(PROMPTS))
    return [reply.text for reply in await asyncio.gather(*calls)]


async def plain_texts() -> list[str]:
    """Return the replies of the transformers engine."""
    folder = resolve_model(MODEL)
    assert isinstance(folder, Path)
    engine = TransformersEngine(folder, TransformersOptions(), max_num_seqs=16, model_label=MODEL)
    try:
        return await texts(engine)
    finally:
        await engine.close()


async def mixed(engine: Any, seed: int) -> Counter[str]:
    """Run calls that end by the stop token, the limit, a stop text, the deadline or their caller; count how they ended."""
    chance = random.Random(seed)
    places = asyncio.Semaphore(IN_FLIGHT)
    ends: Counter[str] = Counter()

    async def one(number: int) -> None:
        kind = chance.choice(("plain", "plain", "limit", "stop", "late", "cancelled", "refused"))
        adapter = chance.choice((None, *ADAPTERS))
        more: dict[str, Any] = {"max_tokens": 2 if kind == "limit" else 24}
        if kind == "stop":
            more["stop"] = (" ", "e")
        if kind == "late":
            more["deadline_unix_s"] = time.time() + chance.uniform(0.0, 2.0)
        if kind == "refused":
            adapter = "builtin:nobody"
        wait_s = chance.uniform(0.0, 1.5)
        async with places:
            task = asyncio.create_task(engine.generate(asked(number, adapter=adapter, **more)))
            if kind == "cancelled":
                await asyncio.wait([task], timeout=wait_s)
                task.cancel()
            ends[await end_of(task)] += 1

    await asyncio.gather(*(one(number) for number in range(CALLS)))
    return ends


async def end_of(task: asyncio.Task[Generation]) -> str:
    """Return how a call ended; `wrong count` where entropies and tokens are not as many."""
    try:
        reply = await task
    except asyncio.CancelledError:
        return "cancelled"
    except EngineError:
        return "refused"
    return reply.finish_reason if reply.entropy.tokens == reply.usage.completion_tokens else "wrong count"


async def check_vllm_engine() -> dict[str, Any]:
    """Run both checks on one vLLM."""
    engine = start_vllm(vllm_llm(), "m", ADAPTERS)
    try:
        ours = await texts(engine)
        began = time.perf_counter()
        ends = await mixed(engine, seed=0)
        seconds = time.perf_counter() - began
        deadline = time.monotonic() + 60
        while (kept := await engine.count_kept()) and time.monotonic() < deadline:  # noqa: ASYNC110 vLLM's processes count
            await asyncio.sleep(0.1)
    finally:
        await engine.close()
    return {"texts": ours, "ends": dict(ends), "kept": kept, "mixed_s": round(seconds, 1)}


async def check(options: Namespace) -> dict[str, Any]:
    """Measure and judge."""
    need_vllm()
    for adapter in ADAPTERS:
        resolve_adapter(adapter)
    found = await check_vllm_engine()
    plain = await plain_texts()
    ours = found.pop("texts")
    equal = sum(a == b for a, b in zip(ours, plain, strict=True)) / PROMPTS
    ends = found["ends"]
    passed = {
        "equal": equal >= EQUAL_BAR,
        "kept": found["kept"] == 0,
        "counts": "wrong count" not in ends and sum(ends.values()) == CALLS,
        "every_end": {"stop", "length", "cancelled", "refused"} <= set(ends),
    }
    different = [{"prompt": n, "vllm": a, "transformers": b} for n, (a, b) in enumerate(zip(ours, plain, strict=True)) if a != b]
    return {"equal_share": equal, "different": different, **found, "passed": passed}


if __name__ == "__main__":
    raise SystemExit(run_check(check))
