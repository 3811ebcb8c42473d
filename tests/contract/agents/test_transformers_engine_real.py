"""The transformers engine on the embedded model: exact entropies, and batches that equal single calls.

Reduced forms of what `tests/accept/accept_engine.py` does in full.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.types import GenerationRequest, Message, Sampling
from tests.accept.accept_engine import entropy_errors, mixed_requests

pytestmark = pytest.mark.real_model


def test_entropies_equal_a_float64_softmax_over_the_same_tokens(smollm2: Path) -> None:
    found = entropy_errors(smollm2, count=8, max_tokens=24)
    assert found.max_error_nats <= 1e-3
    assert found.counts_agree
    assert found.ended_by_stop >= 2
    assert found.ended_by_limit >= 2


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
    assert result.usage.prompt_tokens == smollm2_engine.count_prompt_tokens(messages)
    assert smollm2_engine.label == "transformers/float32"
