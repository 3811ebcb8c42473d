"""Acceptance of the transformers engine on the embedded model; run by `make accept`.

Entropy of 50 generations of different lengths against a float64 softmax; greedy output of 100 prompts, with three
adapters and none, in mixed batches against one by one; the steps that a cancelled request keeps its place; the compiled
decode step against the plain one, on a tiny model. Prints one JSON object (or writes it to `--json FILE`) and exits 1 if
a bar is missed.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmoa.engine_options import TransformersOptions
from dmoa.engines.models import fetch
from dmoa.engines.transformers.decode import DecodeLoop, Running, TextStream, draw_for
from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.engines.transformers.load import LoadedModel, load_model, use_threads
from dmoa.engines.transformers.lora import Adapters
from dmoa.types import Generation, GenerationRequest, Message, Sampling

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check
from tests.unit.agents.conftest import save_adapters, save_tiny_model, teacher_forced_entropies

ENTROPY_BAR_NATS = 1e-3
EQUAL_BAR = 0.99
STEPS_BAR = 2
_QUESTIONS = (
    "What is {n} + 7?",
    "Name a colour. Answer with one word.",
    "Tell me a story about {n} foxes that live beside a river.",
    "Say hello.",
    "Is {n} an even number? Explain step by step how you know.",
)


@dataclass(frozen=True, slots=True)
class EntropyCheck:
    """What was found about entropies."""

    generations: int
    max_error_nats: float
    """Greatest difference per token of one generation's sum, in nats."""
    counts_agree: bool
    """Whether entropy_tokens == completion_tokens == tokens made, always."""
    ended_by_stop: int
    ended_by_limit: int


def mixed_requests(count: int, adapters: Sequence[str | None], max_tokens: int) -> list[GenerationRequest]:
    """Return prompts of different lengths for the adapters in turn; every third shares its beginning with others."""
    shared = "You are one of several agents that solve a task together. Read the task, then do your own part of it only. "
    return [
        GenerationRequest(
            request_id=str(n),
            call_id=str(n),
            messages=(
                Message(role="system", content=shared * 4 if n % 3 == 0 else f"Conversation {n}."),
                Message(role="user", content=_QUESTIONS[n % len(_QUESTIONS)].format(n=n) + " Take care." * (n % 7)),
            ),
            sampling=Sampling(max_tokens=max_tokens),
            adapter=adapters[n // 2 % len(adapters)],
        )
        for n in range(count)
    ]


def entropy_errors(folder: Path, count: int, max_tokens: int) -> EntropyCheck:
    """Run `count` generations through the decode loop, then the same tokens through the bare model."""
    requests = mixed_requests(count, [None], max_tokens)
    lengths = [3 + number % max_tokens if number % 2 else 2 * max_tokens for number in range(count)]
    done = decoded(folder, requests, lengths)
    errors, agree = [], True
    for sequence, generation, exact, _ in done:
        errors.append(abs(sum(exact) - generation.entropy.sum_nats) / len(exact))
        agree &= generation.entropy.tokens == generation.usage.completion_tokens == len(sequence.outputs)
    stopped = sum(generation.finish_reason == "stop" for _, generation, _, _ in done)
    return EntropyCheck(len(done), max(errors), agree, stopped, len(done) - stopped)


def decoded(
    folder: Path, requests: Sequence[GenerationRequest], lengths: Sequence[int]
) -> list[tuple[Running, Generation, list[float], list[str]]]:
    """Decode requests; return each with the bare model's entropies of its tokens, and the text up to them."""
    use_threads(TransformersOptions())
    loaded = load_model(folder, TransformersOptions(), has_adapters=False)
    loop = DecodeLoop(loaded, Adapters(loaded.model, {}), max_rows=16, has_prefix_cache=True)
    done: list[tuple[Running, Generation]] = []
    for number, (item, length) in enumerate(zip(requests, lengths, strict=True)):
        loop.submit(_running(loaded, item, length, number, done))
    with torch.inference_mode():
        while not loop.is_idle:
            loop.step()
        return [
            (
                sequence,
                generation,
                teacher_forced_entropies(loaded.model, sequence.tokens.tolist(), sequence.outputs),
                [loaded.tokenizer.decode(sequence.outputs[: n + 1]) for n in range(len(sequence.outputs))],
            )
            for sequence, generation in done
        ]


def _running(
    loaded: LoadedModel, item: GenerationRequest, max_tokens: int, number: int, done: list[tuple[Running, Generation]]
) -> Running:
    text = loaded.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in item.messages], tokenize=False, add_generation_prompt=True
    )
    sampling = Sampling(temperature=0.7 if number % 3 == 0 else 0.0, top_p=0.9)
    sequence = Running(
        tokens=np.array(loaded.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids),
        adapter=None,
        max_tokens=max_tokens,
        draw=draw_for(sampling, item.call_id),
        text=TextStream(loaded.tokenizer.backend_tokenizer),
        deadline_unix_s=None,
        accepted_s=0.0,
        on_text=lambda piece: None,
        on_done=lambda generation: done.append((sequence, generation)),
        outputs=[],
    )
    return sequence


async def equal_share(folder: Path, adapters: dict[str, Path], count: int) -> float:
    """Return the share of prompts whose greedy text in mixed batches equals that of a call alone."""
    requests = mixed_requests(count, [None, *adapters], 24)
    batched = TransformersEngine(folder, TransformersOptions(), max_num_seqs=16, adapters=adapters)
    together = await asyncio.gather(*map(batched.generate, requests))
    await batched.close()
    single = TransformersEngine(folder, TransformersOptions(prefix_cache=False), max_num_seqs=1, adapters=adapters)
    alone = [await single.generate(item) for item in requests]
    await single.close()
    return sum(a.text == b.text for a, b in zip(together, alone, strict=True)) / count


async def cancel_steps(folder: Path, tries: int) -> int:
    """Return the most token steps that a cancelled request kept its place for."""
    engine = TransformersEngine(folder, TransformersOptions(), max_num_seqs=1)
    worst = 0
    for number in range(tries):
        short, _, long = mixed_requests(3, [None], 300)
        running = asyncio.create_task(engine.generate(long))
        begun = engine.times.steps
        while engine.times.steps < begun + 2:  # noqa: ASYNC110 the engine's thread counts
            await asyncio.sleep(0.005)
        waiting = asyncio.create_task(engine.generate(replace(short, sampling=Sampling(max_tokens=3 + number))))
        await asyncio.sleep(0)
        before = engine.times.steps
        running.cancel()
        result = await waiting
        worst = max(worst, engine.times.steps - before - (result.usage.completion_tokens - 1))
    await engine.close()
    return worst


async def compile_share(folder: Path) -> float:
    """Return the share of texts of a tiny model that are the same with a compiled decode step."""
    requests = mixed_requests(12, [None], 24)
    texts = []
    for compiled in (False, True):
        engine = TransformersEngine(folder, TransformersOptions(compile=compiled))
        texts.append([await engine.generate(requests[0]), *await asyncio.gather(*map(engine.generate, requests))])
        await engine.close()
    return sum(a.text == b.text for a, b in zip(*texts, strict=True)) / len(texts[0])


async def check(options: Namespace) -> dict[str, Any]:
    """Measure and judge."""
    folder = fetch("smollm2-135m")
    entropy = entropy_errors(folder, 50, 48)
    equal = await equal_share(folder, save_adapters(folder, options.scratch, alpha=0.05), 100)
    compiled = await compile_share(save_tiny_model(options.scratch / "tiny")) if shutil.which("g++") else None
    steps = await cancel_steps(folder, 4)
    passed = {
        "entropy": entropy.max_error_nats <= ENTROPY_BAR_NATS and entropy.counts_agree and entropy.ended_by_stop > 0,
        "equal": equal >= EQUAL_BAR,
        "cancel": steps <= STEPS_BAR,
        "compile": compiled is None or compiled >= EQUAL_BAR,
    }
    return {
        "entropy": asdict(entropy),
        "equal_share": equal,
        "cancel_steps": steps,
        "compile_share": compiled,
        "passed": passed,
    }


if __name__ == "__main__":
    raise SystemExit(run_check(check))
