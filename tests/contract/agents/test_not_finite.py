"""Logits that are NaN or infinite on the transformers engine: a failed call with its reason, and nothing of it in others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoa.agents.agent import Agent
from dmoa.config import AgentConfig
from dmoa.core.aggregate import contributions
from dmoa.engine_options import TransformersOptions
from dmoa.engines.transformers.decode import draw_for, pick_tokens
from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.errors import EngineError
from dmoa.types import AgentCall, Message, Sampling
from tests.unit.agents.conftest import ADAPTERS, save_tiny_model
from tests.unit.agents.openai_server import request

CPU = TransformersOptions(threads=1)
LONG = "the quick brown fox jumps over the lazy dog " * 3


def broken_model(folder: Path, value: float) -> Path:
    """The tiny model with one row of lm_head that holds a value."""
    save_tiny_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_a_model_with_a_broken_row_of_lm_head_fails_with_the_reason(
    tmp_path: Path, value: float, temperature: float
) -> None:
    engine = TransformersEngine(broken_model(tmp_path, value), CPU, model_label="tiny")
    for _ in range(2):
        with pytest.raises(EngineError, match=r"tiny: token 1: its logits are NaN or infinite.*check the weights"):
            await engine.generate(request("fox", temperature=temperature, top_p=0.9))
    agent = Agent(AgentConfig(name="a", llm="tiny", profile="Works."), engine)
    call = AgentCall(
        trace_id="t",
        step=0,
        agent="a",
        messages=(Message(role="user", content="fox"),),
        sampling=Sampling(temperature=temperature),
    )
    reply = await agent.call(call)
    assert (reply.status, reply.entropy.mean_nats, contributions([reply])) == ("failed", None, [])
    streamed = [item async for item in agent.stream(call)]
    assert len(streamed) == 1
    assert engine.num_running == 0
    await engine.close()


@pytest.fixture
def huge(tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter of finite numbers that are too large to be multiplied."""
    weights = load_file(tiny_adapters[ADAPTERS[0]] / "adapter_model.safetensors")
    save_file({name: torch.full_like(value, 3e38) for name, value in weights.items()}, tmp_path / "adapter_model.safetensors")
    settings = (tiny_adapters[ADAPTERS[0]] / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(settings)
    return tmp_path


async def test_a_row_whose_numbers_overflow_spoils_no_other(tiny_model: Path, tiny_adapters: dict[str, Path], huge: Path) -> None:
    sound = [
        request(LONG * repeats, name=f"{repeats}", adapter=adapter, max_tokens=12)
        for repeats in (1, 3)
        for adapter in (None, ADAPTERS[1])
    ]
    clean = TransformersEngine(tiny_model, CPU, adapters=tiny_adapters)
    expected = [(await clean.generate(item)).text for item in sound]
    await clean.close()

    engine = TransformersEngine(tiny_model, CPU, adapters=tiny_adapters | {"huge": huge}, idle_s=(600.0, 600.0))
    bad = [request(LONG * 4, name=f"bad{number}", adapter="huge", max_tokens=12) for number in range(2)]
    for _ in range(2):  # in one batch, and then in rows that the bad ones had
        results = await asyncio.gather(*map(engine.generate, [bad[0], *sound, bad[1]]), return_exceptions=True)
        for failed in (results[0], results[-1]):
            assert isinstance(failed, EngineError)
            assert "with adapter 'huge'" in str(failed)
        assert [getattr(result, "text", result) for result in results[1:-1]] == expected
        with pytest.raises(EngineError, match="NaN or infinite"):
            await engine.generate(bad[0])
    together = await asyncio.gather(*map(engine.generate, sound))
    assert [result.text for result in together] == expected
    assert engine.num_running == 0
    await engine.close()


async def test_rows_that_break_in_one_step_leave_nothing_to_those_who_have_their_places(
    tiny_model: Path, tiny_adapters: dict[str, Path], huge: Path
) -> None:
    sound = [request(LONG * repeats, name=f"{repeats}", max_tokens=12) for repeats in (3, 1)]
    options = TransformersOptions(threads=1, prefix_cache=False)
    engine = TransformersEngine(tiny_model, options, adapters=tiny_adapters | {"huge": huge}, idle_s=(600.0, 600.0))
    expected = [(await engine.generate(item)).text for item in sound]
    bad = [request(LONG * 4, name=f"bad{number}", adapter="huge", max_tokens=12) for number in range(2)]
    results = await asyncio.gather(*map(engine.generate, bad), return_exceptions=True)
    assert [type(result) for result in results] == [EngineError] * 2
    together = await asyncio.gather(*map(engine.generate, sound))
    assert [result.text for result in together] == expected
    await engine.close()


async def test_of_a_broken_row_nothing_is_kept_for_later_prompts(tmp_path: Path) -> None:
    engine = TransformersEngine(broken_model(tmp_path, float("nan")), CPU, idle_s=(0.05, 600.0))
    with pytest.raises(EngineError, match="NaN or infinite"):
        await engine.generate(request(LONG))
    async with asyncio.timeout(10):
        while engine.held_bytes:  # noqa: ASYNC110 another thread gives it back
            await asyncio.sleep(0.01)
    await engine.close()


def test_a_broken_row_takes_no_others_token() -> None:
    logits_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    draws = [draw_for(Sampling(temperature=1.0, top_p=0.9), str(row)) for row in range(3)]
    expected = pick_tokens(logits_BV, draws).tolist()
    broken_BV = logits_BV.clone()
    broken_BV[1] = torch.nan
    again = [draw_for(Sampling(temperature=1.0, top_p=0.9), str(row)) for row in range(3)]
    found = pick_tokens(broken_BV, again).tolist()
    assert [found[0], found[2]] == [expected[0], expected[2]]
