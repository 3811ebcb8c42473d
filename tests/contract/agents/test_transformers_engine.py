"""The transformers engine on a tiny random model, against the bare model run one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dmoa.engine_options import TransformersOptions
from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.engines.transformers.load import use_threads
from dmoa.errors import EngineError
from dmoa.types import Generation, GenerationRequest, Message, Sampling, TextDelta
from tests.unit.agents.conftest import ADAPTERS, plain_model, teacher_forced_entropies, tiny_tokenizer
from tests.unit.agents.openai_server import request

CPU = TransformersOptions(threads=1, max_model_len=1024)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run the bare models on one thread: with more, tiny products only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompt_ids(messages: tuple[Message, ...]) -> list[int]:
    text = "".join(f"<|start|>{m.role}\n{m.content}<|end|>" for m in messages) + "<|start|>assistant\n"
    ids: list[int] = tiny_tokenizer().backend_tokenizer.encode(text).ids
    return ids


@torch.inference_mode()
def slow_generate(model: LlamaForCausalLM, prompt: list[int], max_tokens: int, end: int = 0) -> list[int]:
    """Greedy generation without a cache."""
    ids = list(prompt)
    while len(ids) - len(prompt) < max_tokens:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def shown(tokens: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")


def test_an_engines_thread_keeps_its_threads_while_an_encoder_lowers_the_processs_number() -> None:
    with ThreadPoolExecutor(1) as engine:
        engine.submit(use_threads, TransformersOptions(threads=3)).result()
        torch.set_num_threads(1)  # as the encoder does beside it
        assert engine.submit(torch.get_num_threads).result() == 3


@pytest.mark.contract
async def test_mixed_batch_equals_the_bare_models_one_by_one(
    tiny_engine: TransformersEngine, tiny_model: Path, tiny_adapters: dict[str, Path]
) -> None:
    models = {name: plain_model(tiny_model, folder) for name, folder in tiny_adapters.items()}
    names: list[str | None] = [*ADAPTERS, None]
    requests = [request(f"{i} the quick brown fox " * (1 + i % 5), adapter=names[i % 4], max_tokens=5 + 3 * i) for i in range(20)]
    results = await asyncio.gather(*map(tiny_engine.generate, requests))
    base = plain_model(tiny_model)
    ends = set()
    for item, result in zip(requests, results, strict=True):
        model = base if item.adapter is None else models[item.adapter]
        prompt = prompt_ids(item.messages)
        tokens = slow_generate(model, prompt, item.sampling.max_tokens)
        entropies = teacher_forced_entropies(model, prompt, tokens)
        assert result.text == shown(tokens, tiny_tokenizer())
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(prompt), len(tokens))
        assert result.entropy.tokens == len(tokens)
        assert result.entropy.sum_nats == pytest.approx(sum(entropies), abs=1e-4 * len(tokens))
        assert result.entropy.sq_sum == pytest.approx(sum(h * h for h in entropies), rel=1e-4)
        assert result.finish_reason == ("stop" if tokens[-1] == 0 else "length")
        assert 0 <= result.queue_ms <= result.engine_ms
        ends.add(result.finish_reason)
    assert len({result.text for result in results}) > 15
    assert ends == {"stop", "length"}


async def test_stream_ends_with_the_generation_and_joins_to_its_text(tiny_engine: TransformersEngine) -> None:
    items = [item async for item in tiny_engine.stream(request("what is twelve", max_tokens=30))]
    assert isinstance(items[-1], Generation)
    deltas = items[:-1]
    assert len(deltas) > 3
    assert all(isinstance(item, TextDelta) and item.text for item in deltas)
    assert "".join(item.text for item in deltas if isinstance(item, TextDelta)) == items[-1].text
    assert items[-1].text == (await tiny_engine.generate(request("what is twelve", max_tokens=30))).text


async def test_stop_text_ends_the_reply_and_counts_its_tokens(tiny_engine: TransformersEngine) -> None:
    whole = await tiny_engine.generate(request("the lazy dog", max_tokens=40))
    stop = whole.text[10:13]
    cut = whole.text[: whole.text.index(stop)]
    items = [item async for item in tiny_engine.stream(request("the lazy dog", max_tokens=40, stop=(stop,)))]
    result = items[-1]
    assert isinstance(result, Generation)
    assert result.text == cut == "".join(item.text for item in items if isinstance(item, TextDelta))
    assert result.finish_reason == "stop"
    assert len(cut) < len(whole.text)
    assert 0 < result.entropy.tokens == result.usage.completion_tokens < whole.usage.completion_tokens


async def test_same_call_gives_the_same_sample_in_any_batch(tiny_engine: TransformersEngine) -> None:
    call = request("what is", name="trace/0/agent", temperature=1.0, top_p=0.95, max_tokens=20)
    alone = await tiny_engine.generate(call)
    others = [request(f"fox {i}", temperature=0.7, max_tokens=9 + i) for i in range(6)]
    among = (await asyncio.gather(*map(tiny_engine.generate, [*others, call])))[-1]
    other = await tiny_engine.generate(request("what is", name="trace/1/agent", temperature=1.0, top_p=0.95, max_tokens=20))
    assert alone.text == among.text != other.text


async def test_the_assistants_own_beginning_is_continued(tiny_engine: TransformersEngine) -> None:
    whole = await tiny_engine.generate(request("brown fox", max_tokens=24))
    user = Message(role="user", content="brown fox")
    begun = Message(role="assistant", content="the dog ")
    prompt = prompt_ids((user,)) + tiny_tokenizer().backend_tokenizer.encode("the dog ").ids
    continued = await tiny_engine.generate(
        GenerationRequest(request_id="c", messages=(user, begun), sampling=Sampling(max_tokens=24))
    )
    assert continued.usage.prompt_tokens == len(prompt)
    assert continued.text != whole.text


async def test_prompt_over_the_models_length_names_the_numbers(tiny_engine: TransformersEngine) -> None:
    with pytest.raises(EngineError, match=r"prompt has \d{4} tokens; expected at most 1023"):
        await tiny_engine.generate(request("fox " * 1100))
    fitting = await tiny_engine.generate(request("fox" * 400, max_tokens=4000))
    assert fitting.usage.total <= 1024


async def test_unknown_adapter_names_the_allowed_ones(tiny_engine: TransformersEngine) -> None:
    with pytest.raises(EngineError, match=r"'nobody'; expected null, path:/adapters/one.0"):
        await tiny_engine.generate(request("fox", adapter="nobody"))


async def test_no_messages_is_an_error(tiny_engine: TransformersEngine) -> None:
    with pytest.raises(EngineError, match="messages is empty"):
        await tiny_engine.generate(GenerationRequest(request_id="x", messages=(), sampling=Sampling()))


async def test_deadline_ends_a_request_with_what_it_has(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, CPU.model_copy(update={"max_model_len": 100_000}), max_num_seqs=1)
    late = await engine.generate(request("fox", deadline_unix_s=time.time() - 1))
    assert (late.text, late.finish_reason, late.usage.completion_tokens) == ("", "length", 0)
    endless = Sampling(max_tokens=90_000, temperature=2.0, seed=1)
    endless_requests = [
        GenerationRequest(
            request_id=str(i),
            messages=(Message(role="user", content="fox"),),
            sampling=endless,
            deadline_unix_s=time.time() + 0.5,
        )
        for i in range(2)
    ]
    began = time.time()
    running, waiting = await asyncio.gather(*map(engine.generate, endless_requests))
    assert time.time() - began < 5
    for result in (running, waiting):
        assert result.finish_reason in ("length", "stop")
        assert result.entropy.tokens == result.usage.completion_tokens < 90_000
    await engine.close()
