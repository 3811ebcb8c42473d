"""The transformers engine on the embedded model: exact entropies, and batches that equal single calls.

Reduced forms of what `tests/accept/accept_engine.py` does in full.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.types import GenerationRequest, Message, Sampling
from tests.accept.accept_engine import decoded, entropy_errors, mixed_requests

pytestmark = pytest.mark.real_model


def test_entropies_equal_a_float64_softmax_over_the_same_tokens(smollm2: Path) -> None:
    found = entropy_errors(smollm2, count=8, max_tokens=24)
    assert found.max_error_nats <= 1e-3
    assert found.counts_agree
    assert found.ended_by_stop >= 2
    assert found.ended_by_limit >= 2


def test_entropies_of_answer_and_thought_are_exact_apart(smollm2: Path) -> None:
    """Earlier turns show the model how to think; the bare model gives the entropies, the decoded beginnings the places."""
    turns = [
        Message(role=role, content=text)
        for a, b in [(3, 4), (20, 5), (11, 8), (30, 14)]
        for role, text in (
            ("user", f"{a} + {b}?"),
            ("assistant", f"<think>\n{a} and {b} is {a + b}.\n</think>\nThe answer is {a + b}."),
        )
    ]
    requests = [
        GenerationRequest(
            request_id=str(n), messages=(*turns, Message(role="user", content=f"{n} + {n + 3}?")), sampling=Sampling()
        )
        for n in (6, 12, 25, 41)
    ]
    thoughts = 0
    for _, generation, exact, begun in decoded(smollm2, requests, [48] * len(requests)):
        # The first token whose text goes past the closing tag and the blank behind it.
        first = next((n for n, text in enumerate(begun) if text.partition("</think>")[2].strip()), 0)
        answer, thought = generation.entropy, generation.reasoning_entropy
        assert (answer.tokens, thought.tokens) == (len(exact) - first, first)
        assert abs(sum(exact[first:]) - answer.sum_nats) / answer.tokens <= 1e-3
        if thought.tokens:
            thoughts += 1
            assert abs(sum(exact[:first]) - thought.sum_nats) / thought.tokens <= 1e-3
            assert "think" not in generation.text + generation.reasoning
    assert thoughts >= 3


async def test_a_mixed_batch_equals_single_calls(smollm2_engine: TransformersEngine, smollm2_adapters: dict[str, Path]) -> None:
    requests = mixed_requests(12, [None, *smollm2_adapters], max_tokens=12)
    together = await asyncio.gather(*map(smollm2_engine.generate, requests))
    alone = [await smollm2_engine.generate(item) for item in requests]
    # Two nearly equal logits may change places between batches of different size.
    assert sum(a.text == b.text for a, b in zip(together, alone, strict=True)) >= len(requests) - 1
    assert len({item.text for item in alone}) > 6
    assert any(item.usage.cached_tokens for item in together)


async def test_it_answers_and_counts_its_prompt(smollm2_engine: TransformersEngine) -> None:
    messages = [Message(role="system", content="You are a helpful assistant."), Message(role="user", content="What is 12 + 7?")]
    asked = GenerationRequest(request_id="q", messages=tuple(messages), sampling=Sampling(max_tokens=12))
    result = await smollm2_engine.generate(asked)
    assert "19" in result.text
    assert result.usage.prompt_tokens == 29  # ChatML, every digit apart
    assert smollm2_engine.label == "transformers/float32"
