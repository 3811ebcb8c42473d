"""Calls whose logits were NaN: failed with the reason, whether entropies come from inside vLLM or from what it lists."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from dmoa.engines.vllm.engine import Listed, VllmEngine
from dmoa.engines.vllm.entropy_store import RequestSums
from dmoa.errors import EngineError
from dmoa.types import GenerationRequest, Message, Sampling, TextDelta
from tests.unit.agents.conftest import tiny_tokenizer


class Client:
    """A vLLM that says two tokens, with these sums or these listed log-probabilities of each."""

    def __init__(self, sum_nats: float, listed: list[float]) -> None:
        self._sum_nats = sum_nats
        self._listed = listed

    async def generate(self, prompt: Any, params: Any, key: str, *, lora_request: Any) -> AsyncIterator[Any]:
        for number in range(2):
            flat = SimpleNamespace(
                start_indices=[0],
                end_indices=[len(self._listed)],
                token_ids=list(range(len(self._listed))),
                logprobs=self._listed if number else [0.0] * len(self._listed),
            )
            part = SimpleNamespace(
                token_ids=[5],
                text="word ",
                finish_reason="stop" if number else None,
                stop_reason=None,
                logprobs=flat if params.logprobs is not None else None,
            )
            yield SimpleNamespace(outputs=[part], num_cached_tokens=0, metrics=None)

    async def collective_rpc(self, name: str, args: Any = ()) -> list[dict[str, RequestSums]]:
        return [{key: RequestSums(self._sum_nats, self._sum_nats, tokens) for key, tokens in args[0]}]


def engine_of(client: Client, *, is_listed: bool) -> VllmEngine:
    listed = Listed(2, 10) if is_listed else None
    return VllmEngine(client, tiny_tokenizer(), max_model_len=64, label="vllm/float32", model_label="m", listed=listed)


ASKED = GenerationRequest(request_id="r", messages=(Message(role="user", content="fox"),), sampling=Sampling(max_tokens=4))


@pytest.mark.parametrize("is_listed", [False, True])
async def test_a_call_with_broken_logits_fails_with_the_reason(is_listed: bool) -> None:
    engine = engine_of(Client(math.nan, [math.nan]), is_listed=is_listed)
    with pytest.raises(EngineError, match="m: its logits are NaN or infinite"):
        await engine.generate(ASKED)
    with pytest.raises(EngineError, match="NaN or infinite"):
        assert [item async for item in engine.stream(ASKED) if not isinstance(item, TextDelta)] == []


@pytest.mark.parametrize("is_listed", [False, True])
async def test_a_call_with_sound_logits_does_not(is_listed: bool) -> None:
    found = await engine_of(Client(0.5, [0.0]), is_listed=is_listed).generate(ASKED)
    assert (found.text, found.entropy.tokens, found.entropy.sum_nats) == ("word word ", 2, 0.0 if is_listed else 0.5)
