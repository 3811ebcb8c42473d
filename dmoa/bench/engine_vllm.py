"""P8 on vLLM: what the exact entropy costs there, beside the stock engine and beside 20 listed log-probabilities.

Two vLLMs of the embedded model live side by side and decode the same prompts in turns: one computes entropies, the other is as it
comes, without and with log-probabilities. On GPUs vLLM runs stock engines with its newest model runner, and those with a
processor of one's own with the first one: there the ratio holds that difference too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from dmoa.bench.harness import BenchResult, generate_all, interleave, ratio, record, spread, stories
from dmoa.config import LlmConfig
from dmoa.engine_options import VllmOptions
from dmoa.engines.chat_template import encode_chat, load_tokenizer
from dmoa.engines.vllm.start import connect, engine_args, engine_over
from dmoa.protocols import Engine
from dmoa.types import GenerationRequest

MODEL = "embedded:smollm2-135m"
SHARE_BAR = 0.03
GPU_SPEED_BAR = 0.98
BATCH = 16
_MAX_TOKENS = 32


def run(*, gpus: float, rounds: int) -> list[BenchResult]:
    """Return the results of P8 on vLLM. Takes a minute per round on two cores, after as much again for the start."""
    part = LlmConfig.model_validate({"model": MODEL, "engine": "vllm", "max_num_seqs": BATCH, "gpus": gpus})
    # No prefix cache: the arms of a round ask the same prompts, so that their replies are equally long.
    exact = VllmOptions(dtype="float32", max_model_len=1024, gpu_memory_utilization=0.3, prefix_cache=False)
    listed = exact.model_copy(update={"entropy": "listed"})
    timed = {
        "logits_processors": ["dmoa.bench.vllm_timed:TimedProcessor"],
        "worker_extension_cls": "dmoa.bench.vllm_timed.TimedWorker",
    }
    with asyncio.Runner() as runner:
        ours = connect(part, exact, engine_args(part, exact, ()) | timed)
        stock = connect(part, listed, engine_args(part, listed, ()))
        try:
            return _measure(runner, part, ours, stock, (exact, listed), rounds)
        finally:
            ours.shutdown()
            stock.shutdown()


def _measure(
    runner: asyncio.Runner, part: LlmConfig, ours: Any, stock: Any, options: tuple[VllmOptions, VllmOptions], rounds: int
) -> list[BenchResult]:
    exact, listed = (engine_over(client, part, given, ()) for client, given in zip((ours, stock), options, strict=True))
    tokenizer = load_tokenizer(stock.vllm_config.model_config.tokenizer)
    shares: list[float] = []

    def arm(work: Callable[[int], Any]) -> Callable[[], float]:
        salts = count(1)

        def call() -> float:
            salt = next(salts)
            before = runner.run(_spent(ours))
            began = time.perf_counter()
            tokens: int = runner.run(work(salt))
            seconds = time.perf_counter() - began
            if (spent := runner.run(_spent(ours)) - before) > 0:
                shares.append(spent / seconds)
            return tokens / seconds

        return call

    arms = {
        "exact": arm(lambda salt: _decode(exact, salt)),
        "stock": arm(lambda salt: _bare(stock, tokenizer, salt)),
        "listed": arm(lambda salt: _decode(listed, salt)),
    }
    figures = interleave(arms, rounds)
    return _results(figures, shares[1:], part, exact.label)


def _results(figures: dict[str, list[float]], shares: list[float], part: LlmConfig, label: str) -> list[BenchResult]:
    what = f"batch {BATCH}, {_MAX_TOKENS} tokens at most"
    per_s = {name: round(spread(values).value, 1) for name, values in figures.items()}
    share = f"time in the processor / wall time; {what}"
    exact = f"tokens/s with exact entropies, {per_s['exact']} / of the stock engine, {per_s['stock']}; {what}"
    listed = f"tokens/s with 20 log-probabilities listed, {per_s['listed']} / of the stock engine; {what}"
    ratios = {name: ratio(figures[name], figures["stock"]) for name in ("exact", "listed")}
    share_bar, speed_bar = (None, GPU_SPEED_BAR) if part.gpus else (SHARE_BAR, None)
    return [
        record("P8.vllm.share", spread(shares), "share", engine=label, note=share, at_most=share_bar),
        record("P8.vllm", ratios["exact"], "x", engine=label, note=exact, at_least=speed_bar),
        record("P8.vllm.listed", ratios["listed"], "x", engine=label, note=listed),
    ]


async def _spent(client: Any) -> float:
    readings: list[float] = await client.collective_rpc("processor_seconds")
    return max(readings)


async def _decode(engine: Engine, salt: int) -> int:
    replies = await generate_all(engine, stories(BATCH, salt, max_tokens=_MAX_TOKENS))
    return sum(reply.usage.completion_tokens for reply in replies)


async def _bare(client: Any, tokenizer: Any, salt: int) -> int:
    """Decode with nothing asked for but tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def one(request: GenerationRequest) -> int:
        prompt = encode_chat(tokenizer, request.messages, model=MODEL)
        params = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS, output_kind=RequestOutputKind.DELTA)
        outputs = client.generate({"prompt_token_ids": prompt}, params, request.request_id)
        return sum([len(output.outputs[0].token_ids) async for output in outputs])

    return sum(await asyncio.gather(*map(one, stories(BATCH, salt, max_tokens=_MAX_TOKENS))))
