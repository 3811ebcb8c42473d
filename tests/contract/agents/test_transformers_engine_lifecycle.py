"""The transformers engine's life: cancelling, failing, closing, prefix reuse, options and what they refuse."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dmoa.engine_options import TransformersOptions
from dmoa.engines.transformers.decode import SPLIT_TOKENS
from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.engines.transformers.load import in_memory
from dmoa.errors import ConfigError, EngineError, PromptTooLongError
from dmoa.types import Generation, GenerationRequest, Message, Sampling, TextDelta
from tests.unit.agents.conftest import ADAPTERS, plain_model, save_tiny_model, teacher_forced_entropies, tiny_tokenizer
from tests.unit.agents.openai_server import request

CPU = TransformersOptions(threads=1, max_model_len=4096)
ENDLESS = {"max_tokens": 4000, "temperature": 2.0, "seed": 1}
STEP = "<|start|>system\nYou are one of several agents that solve a task together. Work step by step. " * 2


def tokens_of(text: str) -> int:
    return len(tiny_tokenizer().backend_tokenizer.encode(text).ids)


async def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Poll until `condition()` holds; fail after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 another thread sets it
            await asyncio.sleep(0.002)


async def test_a_cancelled_request_frees_its_place_within_two_steps(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, CPU, max_num_seqs=1)
    running = asyncio.create_task(engine.generate(request("fox", **ENDLESS)))
    await wait_until(lambda: engine.times.steps > 3)
    waiting = asyncio.create_task(engine.generate(request("the lazy dog", max_tokens=5)))
    await asyncio.sleep(0)
    # The engine's thread stands still between two steps until it has been told: else this thread's pauses would count.
    is_held, release = threading.Event(), threading.Event()
    engine._inbox.put(lambda: (is_held.set(), release.wait(10.0), None)[-1])
    await wait_until(is_held.is_set)
    before = engine.times.steps
    running.cancel()
    await wait_until(lambda: not engine._inbox.empty())
    release.set()
    result = await waiting
    # Its own steps (the first token comes from the prefill), and at most two of the cancelled request's.
    assert engine.times.steps - before <= (result.usage.completion_tokens - 1) + 2
    with pytest.raises(asyncio.CancelledError):
        await running
    assert engine.num_running == 0
    await engine.close()


async def test_a_cancelled_waiting_request_never_runs(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, CPU, max_num_seqs=1)
    running = asyncio.create_task(engine.generate(request("fox", max_tokens=200)))
    await wait_until(lambda: engine.times.steps > 0)
    prefilled = engine.times.prefilled_tokens
    waiting = asyncio.create_task(engine.generate(request("the lazy dog", max_tokens=5)))
    await asyncio.sleep(0)
    waiting.cancel()
    await running
    await wait_until(lambda: engine.num_running == 0)
    assert engine.times.prefilled_tokens == prefilled
    await engine.close()


async def test_a_stream_that_is_left_frees_its_place(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, CPU, max_num_seqs=1)
    stream = engine.stream(request("fox", **ENDLESS))
    assert isinstance(await anext(stream), TextDelta)
    assert engine.num_running == 1
    await stream.aclose()  # type: ignore[attr-defined]
    await wait_until(lambda: engine.num_running == 0)
    await engine.close()


async def test_the_batch_survives_requests_that_come_and_go(tiny_engine: TransformersEngine) -> None:
    alone = [await tiny_engine.generate(request(f"fox {i}", max_tokens=10 + i)) for i in range(12)]

    async def cancelled(i: int) -> None:
        task = asyncio.create_task(tiny_engine.generate(request(f"dog {i} " * 9, adapter=ADAPTERS[i % 3], **ENDLESS)))
        await wait_until(lambda: tiny_engine.num_running > 0)
        task.cancel()

    together, *_ = await asyncio.gather(
        asyncio.gather(*(tiny_engine.generate(request(f"fox {i}", max_tokens=10 + i)) for i in range(12))),
        *map(cancelled, range(6)),
    )
    assert [result.text for result in together] == [result.text for result in alone]


async def test_close_fails_what_runs_and_refuses_what_comes(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, CPU, max_num_seqs=1)
    tasks = [asyncio.create_task(engine.generate(request(f"fox {i}", **ENDLESS))) for i in range(2)]
    await wait_until(lambda: engine.num_running == 1)
    await engine.close()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, EngineError)
        assert "closed" in str(result)
    with pytest.raises(EngineError, match="is closed"):
        await engine.generate(request("fox"))
    await engine.close()


async def test_a_failing_forward_fails_its_requests_and_no_later_ones(tmp_path: Path) -> None:
    engine = TransformersEngine(save_tiny_model(tmp_path, vocab_size=300), CPU, model_label="small")
    shared = "?" * 60
    rare = shared + tiny_tokenizer().decode(range(300, 320))
    for _ in range(2):
        with pytest.raises(EngineError, match="small: IndexError"):
            await engine.generate(request(rare))
    after = await engine.generate(request(shared, max_tokens=4))
    assert after.usage.cached_tokens == 0, "keys and values of a forward that failed were reused"
    assert (await engine.generate(request("?", max_tokens=4))).usage.completion_tokens > 0
    await engine.close()


async def test_a_reply_ends_where_the_model_knows_no_more_places(tmp_path: Path) -> None:
    """Whatever max_model_len says: its forward would fail there, and take all that runs beside it along."""
    sizes = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=319)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = TransformersEngine(tmp_path, CPU)
    found = await engine.generate(request("fox", **ENDLESS))
    assert found.finish_reason in ("stop", "length")
    assert found.usage.prompt_tokens + found.usage.completion_tokens <= 64
    with pytest.raises(PromptTooLongError, match="expected at most 63"):
        await engine.generate(request("?" * 64))
    await engine.close()


async def test_a_prompt_without_tokens_fails_alone(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    engine = TransformersEngine(tmp_path, CPU)
    running = asyncio.create_task(engine.generate(request("fox", **ENDLESS)))
    await wait_until(lambda: engine.num_running == 1)
    with pytest.raises(EngineError, match="the prompt has no tokens"):
        await engine.generate(request(""))
    assert engine.num_running == 1
    running.cancel()
    await engine.close()


async def test_of_a_failed_forward_no_memory_is_kept(tmp_path: Path) -> None:
    """Where it ran out amid the layers, some have grown and others not: no later forward could use them."""
    engine = TransformersEngine(save_tiny_model(tmp_path, vocab_size=300), CPU, idle_s=(600.0, 600.0))
    with pytest.raises(EngineError, match="IndexError"):
        await engine.generate(request(tiny_tokenizer().decode(range(300, 320))))
    assert engine.held_bytes == 0
    await engine.close()


async def test_what_fails_between_two_steps_does_not_end_the_engine(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, CPU)
    running = asyncio.create_task(engine.generate(request("fox", **ENDLESS)))
    await wait_until(lambda: engine.num_running == 1)
    engine._inbox.put(lambda: torch.empty(1 << 60))  # as keeping a prompt does, where memory runs out
    with pytest.raises(EngineError, match="RuntimeError"):
        await running
    async with asyncio.timeout(10):
        assert (await engine.generate(request("fox", max_tokens=4))).usage.completion_tokens > 0
    await engine.close()


@pytest.mark.parametrize("adapter", [None, ADAPTERS[0]])
async def test_agents_of_a_step_reuse_the_shared_prompt(
    tiny_model: Path, tiny_adapters: dict[str, Path], adapter: str | None
) -> None:
    with_reuse = TransformersEngine(tiny_model, CPU, adapters=tiny_adapters)
    without = TransformersEngine(tiny_model, CPU.model_copy(update={"prefix_cache": False}), adapters=tiny_adapters)
    steps = [
        [request(STEP + "result so far. " * step + role, adapter=adapter, max_tokens=20) for role in ("solve", "inspect", "use")]
        for step in range(3)
    ]
    for step in steps:
        ours = await asyncio.gather(*map(with_reuse.generate, step))
        plain = await asyncio.gather(*map(without.generate, step))
        assert [r.text for r in ours] == [r.text for r in plain]
        for a, b in zip(ours, plain, strict=True):
            assert a.entropy.sum_nats == pytest.approx(b.entropy.sum_nats, abs=1e-4 * b.entropy.tokens)
            assert b.usage.cached_tokens == 0
        reused = sorted(r.usage.cached_tokens for r in ours)
        shared = tokens_of("<|start|>user\n" + step[0].messages[0].content.removesuffix("solve")) - 1
        # A few tokens less are worth a common prefill.
        assert reused[1] >= shared - SPLIT_TOKENS
        assert (reused[0] == 0) == (step is steps[0])
    base = await with_reuse.generate(request(STEP, adapter=ADAPTERS[1]))
    assert base.usage.cached_tokens == 0, "another adapter's keys and values were reused"
    await with_reuse.close()
    await without.close()


@pytest.mark.contract
@pytest.mark.parametrize("has_prefix_cache", [True, False])
async def test_a_running_row_lends_nothing_to_another_adapter(
    tiny_model: Path, tiny_adapters: dict[str, Path], has_prefix_cache: bool
) -> None:
    agents = [None, *ADAPTERS]
    asked = [request(STEP + "go on", name=f"{name}", adapter=name, max_tokens=30) for name in agents]
    alone = TransformersEngine(tiny_model, CPU.model_copy(update={"prefix_cache": False}), adapters=tiny_adapters)
    expected = [(await alone.generate(item)).text for item in asked]
    await alone.close()
    assert len(set(expected)) == len(agents), "the adapters must differ for this test to mean anything"

    for first in range(len(agents)):  # runs while the others come
        engine = TransformersEngine(tiny_model, CPU.model_copy(update={"prefix_cache": has_prefix_cache}), adapters=tiny_adapters)
        running = engine.stream(request(STEP + "go on", name="first", adapter=agents[first], **ENDLESS))
        await anext(running)
        assert engine.num_running == 1
        others = [item for number, item in enumerate(asked) if number != first]
        together = await asyncio.gather(*map(engine.generate, others))
        assert engine.num_running == 1, "the first one ended too early to lend anything"
        assert [item.text for item in together] == [text for number, text in enumerate(expected) if number != first]
        assert [item.usage.cached_tokens for item in together] == [0] * len(others)
        await running.aclose()
        await engine.close()


async def test_an_idle_engine_gives_back_what_a_full_batch_took(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, CPU, idle_s=(0.05, 0.1))
    asked = [request(f"{number} " + STEP, max_tokens=8) for number in range(12)]
    before = [(await engine.generate(item)).text for item in asked]
    together = await asyncio.gather(*map(engine.generate, asked))
    assert [item.text for item in together] == before
    await wait_until(lambda: engine.held_bytes == 0)
    again = await asyncio.gather(*map(engine.generate, asked))
    assert [item.text for item in again] == before
    assert engine.held_bytes > 0
    await engine.close()


async def test_an_idle_engine_keeps_recent_prompts_longer_than_its_rows(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, CPU, idle_s=(0.05, 600.0))
    await engine.generate(request(STEP, max_tokens=8))
    full = engine.held_bytes
    await wait_until(lambda: engine.held_bytes < full)
    assert engine.held_bytes > 0
    assert (await engine.generate(request(STEP, name="again", max_tokens=8))).usage.cached_tokens > 0
    await engine.close()


async def test_a_reply_that_a_stop_text_ended_is_continued_without_computing_it_again(tiny_engine: TransformersEngine) -> None:
    whole = await tiny_engine.generate(request("tool " * 30, max_tokens=40))
    stopped = await tiny_engine.generate(request("tool " * 30, max_tokens=40, stop=(whole.text[30:34],)))
    user, begun = Message(role="user", content="tool " * 30), Message(role="assistant", content=stopped.text)
    continued = await tiny_engine.generate(
        GenerationRequest(request_id="c", messages=(user, begun), sampling=Sampling(max_tokens=4))
    )
    assert continued.usage.cached_tokens >= stopped.usage.prompt_tokens


@pytest.mark.contract
@pytest.mark.parametrize(
    ("options", "label", "tolerance"),
    [
        ({"dtype": "bfloat16"}, "transformers/bfloat16", 0.1),
        ({"dtype": "int8"}, "transformers/int8", 0.3),
        ({"prefix_cache": False}, "transformers/float32", 1e-4),
    ],
)
async def test_options_are_named_in_the_label(tiny_model: Path, options: dict[str, object], label: str, tolerance: float) -> None:
    engine = TransformersEngine(tiny_model, TransformersOptions.model_validate({"threads": 1, **options}))
    assert engine.label == label
    results = await asyncio.gather(*(engine.generate(request(f"fox {i} " * 4, max_tokens=1)) for i in range(6)))
    for i, result in enumerate(results):
        text = f"<|start|>user\n{f'fox {i} ' * 4}<|end|><|start|>assistant\n"
        prompt = tiny_tokenizer().backend_tokenizer.encode(text).ids
        assert len(prompt) == result.usage.prompt_tokens
        exact = teacher_forced_entropies(plain_model(tiny_model), prompt, [0])[0]
        assert result.entropy.sum_nats == pytest.approx(exact, abs=tolerance)
    await engine.close()


def test_a_missing_adapter_names_field_value_and_way_out(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapters\.math: '.*nowhere'.*give its path or leave the adapter out"):
        TransformersEngine(tiny_model, CPU, adapters={"math": tmp_path / "nowhere"})


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, tiny_adapters: dict[str, Path]) -> None:
    config = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"adapters\.math.*train it on this model"):
        TransformersEngine(tmp_path, CPU, adapters={"math": tiny_adapters[ADAPTERS[0]]})


def test_dora_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    with pytest.raises(ConfigError, match="DoRA; only plain LoRA is allowed"):
        TransformersEngine(tiny_model, CPU, adapters={"math": tmp_path})


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"compile": True}])
def test_options_that_exclude_adapters_say_so(
    tiny_model: Path, tiny_adapters: dict[str, Path], options: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=r"LoRA adapters.*leave the adapters out"):
        TransformersEngine(tiny_model, TransformersOptions.model_validate(options), adapters=tiny_adapters)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: .* check the path"):
        TransformersEngine(tmp_path, CPU)


def test_a_model_without_chat_template_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        TransformersEngine(tmp_path, CPU)


def test_a_model_with_sliding_windows_is_refused(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=64,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="full attention only; use engine vllm"):
        TransformersEngine(tmp_path, CPU)


async def test_generations_are_records_of_this_engine(tiny_engine: TransformersEngine) -> None:
    result = await tiny_engine.generate(request("fox", max_tokens=3))
    assert isinstance(result, Generation)
    assert result.entropy.kind == "exact"


def test_a_model_that_memory_does_not_suffice_for_is_told_in_one_message() -> None:
    cpu = torch.device("cpu")
    too_large = r"model: 'm' does not fit into the memory of cpu: .*allocate memory.*; free memory"
    with pytest.raises(EngineError, match=too_large), in_memory("m", cpu):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(EngineError, match="does not fit into the memory of cpu: out of memory; "), in_memory("m", cpu):
        raise MemoryError
    with pytest.raises(RuntimeError, match=r"^another$"), in_memory("m", cpu):
        raise RuntimeError("another")
