"""P8 and P18: the transformers engine beside exact references, on the embedded model.

P8 is what the exact entropy costs per decode step, and how far it is from a float64 softmax over the whole vocabulary.
P18 is tokens per second beside transformers' own batched `generate` on the same prompts, greedy and with the same stop token;
entropy is on in the engine's arm only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch

from dmoa.agents.pool import vllm_builds
from dmoa.bench import engine_vllm as vllm_bench
from dmoa.bench.harness import BenchResult, Spread, generate_all, interleave, ratio, record, spread, stories, tokens_per_s
from dmoa.engine_options import TransformersOptions
from dmoa.engines.models import fetch
from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.engines.transformers.load import LoadedModel, load_model, use_threads
from dmoa.protocols import Engine
from dmoa.types import GenerationRequest

MODEL = "smollm2-135m"
ENTROPY_BAR_NATS = 1e-3
SHARE_BAR = 0.03
SPEED_BAR = 0.9
SHARE_BATCHES = (1, 8, 32)
SPEED_BATCHES = (8, 16, 32)
SPEED_BATCH = 16
"""The batch of P18 itself: the default `max_num_seqs`. The others are reported beside it."""
_MAX_TOKENS = 48


def run(ids: Collection[str], rounds: int = 5) -> list[BenchResult]:
    """Return the results of P8 and P18, as far as `ids` names them. Takes a minute per round on two cores.

    P8 runs on vLLM too, where it is installed.
    """
    options = TransformersOptions()
    folder = fetch(MODEL)
    results: list[BenchResult] = []
    loaded = load_model(folder, options, has_adapters=False)
    use_threads(options)
    with asyncio.Runner() as runner:
        engine = TransformersEngine(folder, options, max_num_seqs=max(SHARE_BATCHES), model_label=MODEL)
        if "P8" in ids:
            results += _entropy_share(engine, runner, rounds)
            results.append(_entropy_error(engine, loaded, runner))
        if "P18" in ids:
            results += _speed(engine, loaded, runner, rounds)
        runner.run(engine.close())
    if "P8" in ids and len(vllm_builds()) == 1:
        results += vllm_bench.run(gpus=0 if torch.cuda.device_count() == 0 else 1, rounds=rounds)
    return results


def _entropy_share(engine: TransformersEngine, runner: asyncio.Runner, rounds: int) -> list[BenchResult]:
    salts = count(1001)

    def arm(batch: int) -> Callable[[], float]:
        def call() -> float:
            entropy_s, decode_s = engine.times.entropy_s, engine.times.decode_s
            runner.run(generate_all(engine, stories(batch, next(salts), max_tokens=_MAX_TOKENS)))
            return (engine.times.entropy_s - entropy_s) / (engine.times.decode_s - decode_s)

        return call

    figures = interleave({str(batch): arm(batch) for batch in SHARE_BATCHES}, rounds)
    shares = {batch: spread(figures[str(batch)]) for batch in SHARE_BATCHES}
    note = "time in the entropy of the logits / time of the decode steps"
    worst = max(shares, key=lambda batch: shares[batch].value)
    notes = {batch: f"{note}; batch {batch}" for batch in SHARE_BATCHES}
    return [
        record("P8", shares[worst], "share", engine=engine.label, note=notes[worst], at_most=SHARE_BAR),
        *(record(f"P8.b{n}", shares[n], "share", engine=engine.label, note=notes[n]) for n in SHARE_BATCHES),
    ]


def _entropy_error(engine: TransformersEngine, loaded: LoadedModel, runner: asyncio.Runner) -> BenchResult:
    requests = stories(8, 1, max_tokens=_MAX_TOKENS)
    generations = runner.run(generate_all(engine, requests))
    references = [_mean_nats(loaded, request) for request in requests]
    errors = [abs(r - g.entropy.sum_nats / g.entropy.tokens) for r, g in zip(references, generations, strict=True)]
    worst = Spread(max(errors), min(errors), max(errors), len(errors))
    note = "greatest difference of a reply's mean entropy from a float64 softmax over generate's own logits; 8 greedy replies"
    return record("P8.error", worst, "nats/token", engine=engine.label, note=note, at_most=ENTROPY_BAR_NATS)


def _mean_nats(loaded: LoadedModel, request: GenerationRequest) -> float:
    logits_TV = torch.cat(_plain_generate(loaded, [request]).logits).double()
    log_probability_TV = torch.log_softmax(logits_TV, dim=-1)
    return float(-(log_probability_TV.exp() * log_probability_TV).sum(dim=-1).mean())


def _speed(engine: TransformersEngine, loaded: LoadedModel, runner: asyncio.Runner, rounds: int) -> list[BenchResult]:
    results = []
    for batch in SPEED_BATCHES:
        arms = {
            "engine": tokens_per_s(partial(_engine_tokens, engine, runner, batch)),
            "plain": tokens_per_s(partial(_plain_tokens, loaded, batch)),
        }
        figures = interleave(arms, rounds)
        found = ratio(figures["engine"], figures["plain"])
        note = f"engine's tokens/s with entropy / batched generate's; batch {batch}, {_MAX_TOKENS} tokens at most"
        id_, bar = ("P18", SPEED_BAR) if batch == SPEED_BATCH else (f"P18.b{batch}", None)
        results.append(record(id_, found, "x", engine=engine.label, note=note, at_least=bar))
        results += [
            record(f"P18.b{batch}.{name}", spread(values), "tokens/s", engine=engine.label, note=f"batch {batch}")
            for name, values in figures.items()
        ]
    return results


def _engine_tokens(engine: Engine, runner: asyncio.Runner, batch: int, salt: int) -> int:
    replies = runner.run(generate_all(engine, stories(batch, salt, max_tokens=_MAX_TOKENS)))
    return sum(reply.usage.completion_tokens for reply in replies)


def _plain_tokens(loaded: LoadedModel, batch: int, salt: int) -> int:
    requests = stories(batch, salt, max_tokens=_MAX_TOKENS)
    return _made(loaded, requests, _plain_generate(loaded, requests))


@torch.inference_mode()
def _plain_generate(loaded: LoadedModel, requests: Sequence[GenerationRequest]) -> Any:
    """Run transformers' own batched greedy generation; return its output, logits included."""
    prompts = [_encode(loaded, request) for request in requests]
    width = max(map(len, prompts))
    stop = sorted(loaded.stop_tokens)
    padded = torch.tensor([[stop[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=loaded.device)
    return loaded.model.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=_MAX_TOKENS,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop[0],
        return_dict_in_generate=True,
        output_logits=len(requests) == 1,
    )


def _made(loaded: LoadedModel, requests: Sequence[GenerationRequest], output: Any) -> int:
    """Return the tokens that a batched generation made, stop tokens included, padding after them not."""
    width = max(len(_encode(loaded, request)) for request in requests)
    made = 0
    for row in output.sequences[:, width:].tolist():
        ends = [i for i, token in enumerate(row) if token in loaded.stop_tokens]
        made += ends[0] + 1 if ends else len(row)
    return made


def _encode(loaded: LoadedModel, request: GenerationRequest) -> list[int]:
    text = loaded.tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in request.messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens: list[int] = loaded.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return tokens
