"""Entropies of the real vLLM, against transformers forced to say the same tokens, in every way a call can go."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch

from dmoa.core.entropy import token_entropy
from dmoa.engines.vllm.engine import EntropyTaker, Listed, VllmEngine
from dmoa.engines.vllm.entropy import KEY
from dmoa.types import Generation, GenerationRequest, Message, Sampling
from tests.vllm.conftest import CHUNK_TOKENS, MAX_MODEL_LEN, Running

pytestmark = pytest.mark.asyncio(loop_scope="session")
PER_TOKEN_NATS = 1e-3
QUESTIONS = ("What is 12 + 7?", "Name a colour.", "What is the capital of France?", "Write a short poem about the sea.")


def request(
    text: str, number: int = 0, *, max_tokens: int = 24, stop: tuple[str, ...] = (), adapter: str | None = None, **more: Any
) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"{text[:8]}-{number}",
        messages=(Message(role="user", content=text),),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, stop=stop),
        adapter=adapter,
        **more,
    )


def same(one: Generation, other: Generation) -> None:
    """The same reply, however it came about."""
    assert one.text == other.text
    assert one.usage.completion_tokens == other.usage.completion_tokens == one.entropy.tokens == other.entropy.tokens
    assert one.entropy.sum_nats == pytest.approx(other.entropy.sum_nats, abs=PER_TOKEN_NATS * one.usage.completion_tokens)
    assert one.entropy.sq_sum == pytest.approx(other.entropy.sq_sum, rel=1e-3, abs=1e-3)


async def forced(vllm: Running, model: Any, prompt: list[int], key: str, max_tokens: int) -> None:
    """Decode with vLLM, and compare with transformers on the very tokens that vLLM chose."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args={KEY: key})
    outputs = [output async for output in vllm.client.generate({"prompt_token_ids": prompt}, params, key)]
    chosen = list(outputs[-1].outputs[0].token_ids)
    found = await EntropyTaker(vllm.client).take(key, len(chosen))
    assert found is not None
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
    assert logits_TV.argmax(dim=1).tolist() == chosen, "greedy, by transformers too"
    nats_T = token_entropy(logits_TV).double()
    assert found.tokens == len(chosen)
    assert found.sum_nats == pytest.approx(float(nats_T.sum()), abs=PER_TOKEN_NATS * len(chosen))
    assert found.sq_sum == pytest.approx(float(nats_T.square().sum()), rel=1e-3)


@pytest.mark.parametrize("question", QUESTIONS)
async def test_every_token_has_its_exact_entropy(question: str, vllm: Running, model: Any) -> None:
    prompt = vllm.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    await forced(vllm, model, list(prompt), f"forced-{question}", 24)


async def test_a_prompt_in_three_parts_or_more(vllm: Running, model: Any) -> None:
    prompt = vllm.tokenizer.encode("The sea is wide and the night is long. " * 26)
    assert len(prompt) > 2 * CHUNK_TOKENS
    await forced(vllm, model, prompt, "chunks", 12)


async def test_the_stop_token_counts_and_a_limit_ends_the_reply(vllm: Running) -> None:
    stopped = await vllm.engine.generate(request("What is the capital of France?"))
    assert stopped.finish_reason == "stop"
    assert stopped.entropy.tokens == stopped.usage.completion_tokens
    limited = await vllm.engine.generate(request("What is the capital of France?", max_tokens=3))
    assert (limited.finish_reason, limited.usage.completion_tokens, limited.entropy.tokens) == ("length", 3, 3)
    assert stopped.text.startswith(limited.text)
    assert limited.entropy.sum_nats < stopped.entropy.sum_nats


async def test_a_text_that_ends_the_reply_is_not_part_of_it(vllm: Running) -> None:
    whole = await vllm.engine.generate(request("What is the capital of France?"))
    cut = await vllm.engine.generate(request("What is the capital of France?", stop=(" of",)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text.partition(" of")[0]
    assert cut.entropy.tokens == cut.usage.completion_tokens < whole.usage.completion_tokens


async def test_a_second_call_takes_the_prompt_from_the_first_with_the_same_entropies(vllm: Running) -> None:
    text = "Here are some words: " + "sun moon star cloud rain " * 12 + "Which one comes first?"
    first = await vllm.engine.generate(request(text, 1))
    second = await vllm.engine.generate(request(text, 2))
    assert second.usage.cached_tokens >= 32
    same(first, second)


async def test_preempted_calls_say_the_same_as_alone(vllm: Running) -> None:
    texts = [f"Write a long story about the number {number}." for number in range(8)]
    before = preemptions()
    together = await asyncio.gather(*(vllm.engine.generate(request(text, 1, max_tokens=110)) for text in texts))
    assert preemptions() > before, "the test asks for more memory than there is"
    # Two of them, alone: what was preempted last, and what was not.
    for number in (0, 7):
        same(together[number], await vllm.engine.generate(request(texts[number], 2, max_tokens=110)))


def preemptions() -> float:
    """How often vLLM took a sequence out of its batch for want of memory."""
    from prometheus_client import REGISTRY

    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples if sample.name == "vllm:num_preemptions_total")


async def test_adapters_in_one_batch_say_the_same_as_alone(vllm: Running) -> None:
    text = "How much is 412 + 423? End with a line `Answer: ...`, a number."
    adapters = (None, "arith", "words")
    together = await asyncio.gather(*(vllm.engine.generate(request(text, 1, adapter=adapter)) for adapter in adapters))
    assert len({reply.text for reply in together}) == 3
    for adapter, reply in zip(adapters, together, strict=True):
        same(reply, await vllm.engine.generate(request(text, 2, adapter=adapter)))


async def test_listed_log_probabilities_bound_the_exact_entropy(vllm: Running) -> None:
    engine = VllmEngine(
        vllm.client,
        vllm.tokenizer,
        max_model_len=MAX_MODEL_LEN,
        label="listed",
        listed=Listed(20, vllm.client.vllm_config.model_config.get_vocab_size()),
    )
    for text in QUESTIONS[1:3]:
        exact = await vllm.engine.generate(request(text, 1, max_tokens=12))
        listed = await engine.generate(request(text, 2, max_tokens=12))
        assert listed.text == exact.text
        assert listed.entropy.kind == "truncated"
        assert listed.entropy.tokens == listed.usage.completion_tokens == exact.usage.completion_tokens
        distance = abs(listed.entropy.sum_nats - exact.entropy.sum_nats)
        assert 0 < distance <= listed.entropy.slack_nats + PER_TOKEN_NATS * exact.usage.completion_tokens
    assert await vllm.engine.count_kept() == 0


async def test_cancelled_and_late_calls_leave_nothing_behind(vllm: Running) -> None:
    calls = [asyncio.create_task(vllm.engine.generate(request(text, 9, max_tokens=200))) for text in QUESTIONS]
    async with asyncio.timeout(60):
        await asyncio.wait([asyncio.create_task(anext(vllm.engine.stream(request(QUESTIONS[3], 10, max_tokens=200))))])
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    late = await vllm.engine.generate(request(QUESTIONS[3], 11, max_tokens=400, deadline_unix_s=time.time() + 1.0))
    assert late.finish_reason == "length"
    assert late.entropy.tokens == late.usage.completion_tokens < 400
    async with asyncio.timeout(60):
        while await vllm.engine.count_kept():  # noqa: ASYNC110  # it is vLLM's processes that are waited for
            await asyncio.sleep(0.05)
