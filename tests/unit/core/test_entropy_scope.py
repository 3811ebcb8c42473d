"""Which tokens are the answer's, by hand and by law: answer and thought add up to the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.entropy_scope import answer_tokens, scoped_entropy
from dmoa.core.reasoning import split_reasoning
from dmoa.types import EntropySum


@pytest.mark.parametrize(
    ("pieces", "marks", "is_opened"),
    [
        (["<think>", "so", " 41", "</think>", "\n\n", "42", ""], "tttttaa", False),
        (["so", " 41", "</", "think", ">\n\n", "4", "2", ""], "tttttaaa", False),
        (["so", "</think>\n4", "2", ""], "taaa", True),
        (["<think>", "so", " 41"], "ttt", False),
        (["so", " 41", ""], "ttt", True),
        (["<think>", "</think>", ""], "tta", False),
        (["4", "2", ""], "aaa", False),
        (["", "analysis", "", "We", "", "assistant", "", "final", "", "42", ""], "tttttttttaa", False),
        (["1", "\n", "<think>", "a", "</think>", "2", ""], "aatttaa", False),
        (["<think>a</think>4", "2", "STOP", ""], "aaaa", False),
    ],
)
def test_tokens_by_hand(pieces: list[str], marks: str, is_opened: bool) -> None:
    whole = "".join(piece for piece in pieces if piece != "STOP")  # what lies behind a stop text is not part of the reply
    found = answer_tokens(pieces, split_reasoning(whole, is_opened=is_opened))
    assert "".join("a" if is_answer else "t" for is_answer in found) == marks


def test_entropy_by_hand() -> None:
    pieces = ["<think>", "so", "</think>", "4", "2", ""]
    found = scoped_entropy(pieces, [1.0, 2.0, 3.0, 0.25, 0.5, 0.125], split_reasoning("".join(pieces)))
    assert found == (EntropySum.of_tokens([0.25, 0.5, 0.125]), EntropySum.of_tokens([1.0, 2.0, 3.0]), 3)


PIECES = st.lists(st.sampled_from(["<think>", "</think>", "4", " so", "\n", "", "</th", "ink>"]), max_size=12)


@settings(derandomize=True, deadline=None)
@given(PIECES, st.data(), st.booleans())
def test_answer_and_thought_are_the_whole(pieces: list[str], data: st.DataObject, is_opened: bool) -> None:
    nats = [float(data.draw(st.integers(0, 9))) for _ in pieces]
    split = split_reasoning("".join(pieces), is_opened=is_opened)
    found = scoped_entropy(pieces, nats, split)
    assert found.answer + found.thought == EntropySum.of_tokens(nats)
    assert found.thought_tokens == found.thought.tokens
    if split.text.strip():
        assert found.answer.tokens > 0
