"""Thoughts of the real vLLM: parted from the text, with the entropy of every token on its own side, by marks and by a parser."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser

from dmoa.engine_options import VllmOptions
from dmoa.engines.chat_template import encode_chat
from dmoa.engines.vllm.engine import Listed, VllmEngine
from dmoa.engines.vllm.start import check_parser
from dmoa.engines.vllm.thoughts import HARMONY, ReasoningFormat, ReplyText, parser_class
from dmoa.errors import ConfigError
from dmoa.types import EntropySum, Generation, GenerationRequest, Message, Sampling, TextDelta
from tests.unit.agents.test_sampling import BYTES, FIRST_BYTE, PLAIN, SPACED
from tests.vllm.conftest import MAX_MODEL_LEN, Running

session = pytest.mark.asyncio(loop_scope="session")
PER_TOKEN_NATS = 1e-3
LINE = "Repeat this line, and nothing else: <think>Two and three.</think>The answer is 5."
THINKING = (Message(role="user", content=LINE), Message(role="assistant", content="<think>"))
"""The model goes on with the line, so that its thought ends and an answer follows."""
CAPITAL = (Message(role="user", content="Which city is the capital in France?"),)


class UpToOf(DeepSeekR1ReasoningParser):
    """Takes what is ahead of the first ` of` for a thought."""

    @property
    def start_token(self) -> str:
        return "<|im_start|>"

    @property
    def end_token(self) -> str:
        return "\u0120of"


@pytest.fixture(autouse=True)
def parsers() -> Iterator[None]:
    ReasoningParserManager.register_module("up_to_of", module=UpToOf)
    yield
    del ReasoningParserManager.reasoning_parsers["up_to_of"]


def engine(vllm: Running, **options: Any) -> VllmEngine:
    return VllmEngine(vllm.client, vllm.tokenizer, max_model_len=MAX_MODEL_LEN, label="thoughts", **options)


def request(messages: tuple[Message, ...], max_tokens: int = 24, stop: tuple[str, ...] = ()) -> GenerationRequest:
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop=stop)
    return GenerationRequest(request_id=f"thoughts-{max_tokens}", messages=messages, sampling=sampling)


async def tokens_and_nats(vllm: Running, model: Any, messages: tuple[Message, ...]) -> tuple[list[str], list[float]]:
    """What the reply's tokens say, and their entropies by a float64 softmax over the whole vocabulary."""
    prompt = encode_chat(vllm.tokenizer, messages, model="m")
    params = SamplingParams(temperature=0.0, max_tokens=24)
    outputs = [output async for output in vllm.client.generate({"prompt_token_ids": prompt}, params, "reference")]
    chosen = list(outputs[-1].outputs[0].token_ids)
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].double()
    log_TV = torch.log_softmax(logits_TV, dim=1)
    return [vllm.tokenizer.decode([token]) for token in chosen], (-(log_TV.exp() * log_TV).sum(dim=1)).tolist()


def matches(found: EntropySum, nats: list[float]) -> bool:
    expected = sum(nats)
    return found.tokens == len(nats) and found.sum_nats == pytest.approx(expected, abs=PER_TOKEN_NATS * len(nats))


@session
async def test_thought_and_answer_have_the_exact_entropy_of_their_own_tokens(vllm: Running, model: Any) -> None:
    pieces, nats = await tokens_and_nats(vllm, model, THINKING)
    assert pieces == ["Two", " and", " three", ".", "</", "think", ">", "The", " answer", " is", " ", "5", ".", "<|im_end|>"]
    found = await engine(vllm).generate(request(THINKING))
    assert (found.text, found.reasoning, found.finish_reason) == ("The answer is 5.", "Two and three.", "stop")
    assert matches(found.reasoning_entropy, nats[:7])
    assert matches(found.entropy, nats[7:])
    assert found.entropy.kind == found.reasoning_entropy.kind == "exact"
    assert (found.usage.completion_tokens, found.usage.reasoning_tokens) == (14, 7)


@session
async def test_a_stop_text_ends_the_answer_and_a_limit_the_thought(vllm: Running, model: Any) -> None:
    _, nats = await tokens_and_nats(vllm, model, THINKING)
    stopped = await engine(vllm).generate(request(THINKING, stop=(" is 5",)))
    assert (stopped.text, stopped.finish_reason, stopped.usage.reasoning_tokens) == ("The answer", "stop", 7)
    assert matches(stopped.entropy, nats[7:12])
    cut = await engine(vllm).generate(request(THINKING, max_tokens=3))
    assert (cut.text, cut.reasoning, cut.finish_reason) == ("", "Two and three", "length")
    assert matches(cut.reasoning_entropy, nats[:3])
    assert (cut.entropy.tokens, cut.usage.reasoning_tokens) == (0, 3)


@session
@pytest.mark.parametrize(("messages", "parser"), [(THINKING, None), (CAPITAL, "up_to_of"), (CAPITAL, None)])
async def test_a_stream_says_the_same_as_the_whole(vllm: Running, messages: tuple[Message, ...], parser: str | None) -> None:
    over = engine(vllm, reasoning_parser=parser)
    whole = await over.generate(request(messages))
    items = [item async for item in over.stream(request(messages))]
    pieces, last = [item for item in items if isinstance(item, TextDelta)], items[-1]
    assert isinstance(last, Generation)
    assert "".join(item.text for item in pieces if not item.is_reasoning) == last.text == whole.text
    assert "".join(item.text for item in pieces if item.is_reasoning) == last.reasoning == whole.reasoning
    assert len(pieces) > 3
    assert bool(whole.reasoning) == (messages is THINKING or parser is not None)


@session
async def test_a_parser_of_vllm_that_the_pool_names(vllm: Running, model: Any) -> None:
    pieces, nats = await tokens_and_nats(vllm, model, CAPITAL)
    at = pieces.index(" of") + 1
    found = await engine(vllm, reasoning_parser="up_to_of").generate(request(CAPITAL))
    plain = await engine(vllm).generate(request(CAPITAL))
    assert (plain.reasoning, plain.reasoning_entropy.tokens, plain.usage.reasoning_tokens) == ("", 0, 0)
    assert matches(plain.entropy, nats)
    assert (found.reasoning, found.text) == tuple(part.strip() for part in plain.text.split(" of", 1))
    assert matches(found.reasoning_entropy, nats[:at])
    assert matches(found.entropy, nats[at:])


@session
async def test_listed_log_probabilities_are_kept_apart_too(vllm: Running, model: Any) -> None:
    _, nats = await tokens_and_nats(vllm, model, THINKING)
    listed = Listed(20, vllm.client.vllm_config.model_config.get_vocab_size())
    found = await engine(vllm, listed=listed).generate(request(THINKING))
    for entropy, expected in ((found.reasoning_entropy, nats[:7]), (found.entropy, nats[7:])):
        assert (entropy.tokens, entropy.kind) == (7, "truncated")
        assert abs(entropy.sum_nats - sum(expected)) <= entropy.slack_nats + PER_TOKEN_NATS * 7


def test_half_a_character_after_a_whole_one_does_not_end_the_call() -> None:
    emoji = [FIRST_BYTE + byte for byte in "\U0001f600".encode()]
    reply = ReplyText(ReasoningFormat(SimpleNamespace(backend_tokenizer=BYTES)), [PLAIN], (True, "<think>"))
    reply.feed("on\U0001f600on</think>on", [PLAIN, *emoji, *emoji[:2], SPACED, PLAIN])  # its tags are no tokens here
    reply.finish()
    assert len(reply.answer_tokens()) == 9


@pytest.fixture(scope="module")
def thinking_tokenizer(tokenizer: Any) -> Any:
    """The same, with a token for each tag."""
    found = copy.deepcopy(tokenizer)
    found.add_tokens(["<think>", "</think>"])
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from dmoa.engines.chat_template import load_tokenizer
    from dmoa.engines.models import resolve_model

    return load_tokenizer(str(resolve_model("embedded:smollm2-135m")))


@pytest.mark.parametrize("sizes", [[1], [3], [2, 5], [100]])
@pytest.mark.parametrize("held", [0, 9])
def test_however_vllm_puts_tokens_together_and_holds_text_back(tokenizer: Any, sizes: list[int], held: int) -> None:
    text = "The capital of France is Paris, of course. \u00e9\U0001f600!"
    tokens = tokenizer.encode(text)
    reply = ReplyText(ReasoningFormat(tokenizer, "up_to_of"), tokenizer.encode("<|im_start|>"))
    place, sent, number = 0, 0, 0
    while place < len(tokens):
        part = tokens[place : (place := place + sizes[number % len(sizes)])]
        whole = tokenizer.decode(tokens[:place]).rstrip("\ufffd")
        upto = max(sent, len(whole) - held)
        reply.feed(whole[sent:upto], part)
        sent, number = upto, number + 1
    reply.feed(text[sent:], [])
    reply.finish()
    assert (reply.reasoning, reply.text) == ("The capital", "France is Paris, of course. \u00e9\U0001f600!")
    assert reply.answer_tokens() == [number > 2 for number in range(len(tokens))]


@pytest.mark.parametrize("parser", ["deepseek_r1", "qwen3", "glm45", "kimi_k2", "olmo3", "ernie45", "step3p5", HARMONY, None])
@pytest.mark.parametrize("text", ["<think>I add.</think>\n\nIt is 5.", "I add.</think>\n\nIt is 5.", "<think>I add."])
def test_parsers_of_vllm_and_our_marks_part_the_same(thinking_tokenizer: Any, parser: str | None, text: str) -> None:
    tokens = thinking_tokenizer.encode(text)
    reply = ReplyText(ReasoningFormat(thinking_tokenizer, parser), thinking_tokenizer.encode("<|im_start|>assistant\n"))
    for token in tokens:
        reply.feed(thinking_tokenizer.decode([token]), [token])
    reply.finish()
    assert (reply.reasoning.strip(), reply.text) == ("I add.", "It is 5." if "It" in text else "")
    said = "".join(
        thinking_tokenizer.decode([token]) for token, is_in in zip(tokens, reply.answer_tokens(), strict=True) if is_in
    )
    assert said == reply.text
    assert reply.raw == (text if parser in (HARMONY, None) else "")


def test_granite_marks_its_thoughts_in_words(tokenizer: Any) -> None:
    text = "Here is my thought process: I add. Here is my response: It is 5."
    reply = ReplyText(ReasoningFormat(tokenizer, "granite"), tokenizer.encode("<|im_start|>assistant\n"))
    for token in (tokens := tokenizer.encode(text)):
        reply.feed(tokenizer.decode([token]), [token])
    reply.finish()
    assert (reply.reasoning.strip(), reply.text) == ("I add.", "It is 5.")
    said = [tokenizer.decode([token]) for token, is_in in zip(tokens, reply.answer_tokens(), strict=True) if is_in]
    assert "".join(said) == " It is 5."


def test_a_parser_that_vllm_lacks_or_that_does_not_fit_is_named(tokenizer: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"engine_kwargs.reasoning_parser is 'qwen2'; did you mean 'qwen3'\? this vLLM has .*gr"
    ):
        parser_class("qwen2")
    with pytest.raises(ConfigError, match=r"^llms\.big\.engine_kwargs\.reasoning_parser is 'none'"):
        check_parser(VllmOptions(reasoning_parser="none"), "big")
    with pytest.raises(ConfigError, match=r"is 'cohere_command3', which vLLM cannot load: .*cohere_melody"):
        parser_class("cohere_command3")
    with pytest.raises(ConfigError, match=r"is 'deepseek_r1', which does not fit the model: .*could not locate think start/end"):
        ReasoningFormat(tokenizer, "deepseek_r1")
    assert ReasoningFormat(tokenizer, HARMONY).keeps_marks
    assert not ReasoningFormat(tokenizer).keeps_marks
