"""Next-token choice and incremental text, against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dmoa.engines.transformers.decode import TextStream, draw_for, nucleus, pick_tokens
from dmoa.types import Sampling
from tests.examples import examples
from tests.unit.agents.conftest import tiny_tokenizer


def slow_nucleus(probabilities: list[float], top_p: float) -> set[int]:
    """Return the smallest set of most probable tokens whose mass reaches top_p."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept: list[int] = []
    while sum(probabilities[token] for token in kept) < top_p and len(kept) < len(order):
        kept.append(order[len(kept)])
    return set(kept)


def test_greedy_rows_take_the_argmax() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert pick_tokens(logits_BV, [None, None]).tolist() == [1, 0]
    assert draw_for(Sampling(temperature=0.0), "call") is None


def test_samples_follow_the_tempered_distribution() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -math.inf])
    temperature = 0.8
    draw = draw_for(Sampling(temperature=temperature), "call")
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[pick_tokens(logits_V[None], [draw])[0]] += 1
    expected_V = torch.softmax(logits_V / temperature, dim=-1)
    assert counts[3] == 0
    # Five standard deviations of a binomial.
    assert ((counts / 4000 - expected_V).abs() <= 5 * (expected_V * (1 - expected_V) / 4000).sqrt() + 1e-9).all()


@settings(max_examples=examples(60))
@given(st.lists(st.integers(-30, 30), min_size=2, max_size=40, unique=True), st.floats(0.05, 0.999))
def test_nucleus_is_the_smallest_set_that_reaches_the_mass(logits: list[int], top_p: float) -> None:
    probability_V = torch.softmax(torch.tensor(logits, dtype=torch.float64) / 5, dim=-1)
    kept = nucleus(probability_V[None], torch.tensor([top_p], dtype=torch.float64))[0]
    chosen = set(torch.nonzero(kept).flatten().tolist())
    wanted = slow_nucleus(probability_V.tolist(), top_p)
    assert chosen == wanted or abs(probability_V[list(wanted)].sum().item() - top_p) < 1e-9
    assert torch.equal(kept[list(chosen)], probability_V[list(chosen)])


def test_nucleus_wider_than_the_first_candidates() -> None:
    probability_V = torch.full((5000,), 1 / 5000)
    kept = nucleus(probability_V[None], torch.tensor([0.5]))[0]
    assert int((kept > 0).sum()) == pytest.approx(2500, abs=2)


def test_rows_without_nucleus_beside_rows_with_one_keep_all_tokens() -> None:
    probability_NV = torch.softmax(torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)), dim=-1)
    kept_NV = nucleus(probability_NV, torch.tensor([1.0, 0.3]))
    assert torch.equal(kept_NV[0], probability_NV[0])
    assert 0.3 <= kept_NV[1].sum() < 0.31


def test_a_sample_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_BV = torch.randn(5, 400, generator=generator)
    samplings = [Sampling(temperature=0.9, top_p=p) for p in (1.0, 0.9, 0.5, 1.0, 0.7)]
    together = pick_tokens(logits_BV, [draw_for(s, f"call{i}") for i, s in enumerate(samplings)]).tolist()
    alone = [pick_tokens(logits_BV[i : i + 1], [draw_for(s, f"call{i}")]).item() for i, s in enumerate(samplings)]
    assert together == alone


def test_seed_and_call_id_name_the_stream() -> None:
    def numbers(sampling: Sampling, call_id: str) -> list[float]:
        draw = draw_for(sampling, call_id)
        assert draw is not None
        return [draw.uniform() for _ in range(4)]

    warm = Sampling(temperature=1.0)
    assert numbers(warm, "a") == numbers(warm, "a") != numbers(warm, "b")
    seeded = Sampling(temperature=1.0, seed=7)
    assert numbers(seeded, "a") == numbers(seeded, "b") != numbers(warm, "a")


TOKENIZER = tiny_tokenizer().backend_tokenizer


@settings(max_examples=examples(150))
@given(st.lists(st.integers(2, 319), max_size=30))
def test_pieces_join_to_the_decoded_text_without_broken_characters_at_the_end(tokens: list[int]) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in tokens]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == TOKENIZER.decode(tokens).rstrip("\ufffd")


@settings(max_examples=examples(150))
@given(st.text(alphabet="ab😀 c\n", max_size=24), st.lists(st.text(alphabet="ab😀 c\n", min_size=1, max_size=5), max_size=3))
def test_no_part_of_a_stop_text_is_shown(text: str, stop: list[str]) -> None:
    stream = TextStream(TOKENIZER, stop)
    shown = ""
    for token in TOKENIZER.encode(text).ids:
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == stream.text
    assert stream.stopped == any(item in text for item in stop)
    assert not any(item in shown for item in stop)
    assert text.startswith(shown)
    if not stream.stopped:
        assert shown == text


def test_text_that_may_become_a_stop_text_is_held_back_until_it_cannot() -> None:
    stream = TextStream(TOKENIZER, ("##END",))
    shown = [stream.push(token) for token in TOKENIZER.encode("a##EN").ids]
    assert "".join(shown) == "a"
    assert "".join(stream.push(token) for token in TOKENIZER.encode("x").ids) == "##ENx"


def byte_fallback_tokenizer() -> Tokenizer:
    """Return a tokenizer that writes what it has no token for in bytes, as those of Llama 2 and Gemma do."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581on", "on"]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(numbers, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return tokenizer


BYTES = byte_fallback_tokenizer()
FIRST_BYTE, SPACED, PLAIN = 1, 257, 258


def test_half_a_character_after_a_whole_one_does_not_end_the_reply() -> None:
    """A decoder of bytes takes both for no text then, which changes what was shown already."""
    stream, emoji = TextStream(BYTES, ("on on",)), [FIRST_BYTE + byte for byte in "😀".encode()]
    tokens = [PLAIN, *emoji, *emoji[:2], SPACED, PLAIN, *emoji, SPACED, SPACED]
    shown = [stream.push(token) for token in tokens]
    assert (stream.stopped, stream.text) == (True, "on😀 onon😀 ")
    assert "".join([*shown, stream.finish()]) == stream.text
    assert "".join(stream.pieces(len(tokens))) == stream.text


@settings(max_examples=examples(150))
@given(st.lists(st.sampled_from([SPACED, PLAIN, *(FIRST_BYTE + byte for byte in "é😀".encode())]), max_size=24))
def test_no_tokens_of_bytes_spoil_the_text_that_was_shown(tokens: list[int]) -> None:
    stream = TextStream(BYTES)
    pieces = [stream.push(token) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == stream.text
    assert stream.text.count("on") == sum(token in (SPACED, PLAIN) for token in tokens)
