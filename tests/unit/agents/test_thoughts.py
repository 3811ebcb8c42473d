"""Where an answer stands in all that was generated, and at which tokens thoughts begin and end."""

from __future__ import annotations

import pytest

from dmoa.core.entropy_scope import answer_tokens
from dmoa.core.reasoning import split_reasoning
from dmoa.engines.thoughts import cuts_of, placed_split


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        (["<x>", "so", " 42", "</x>", "\n", "42", "<end>"], "\n42", (0, 5)),  # a blank that is the text's own
        (["<x>", "so 42", "</x>\n4", "2", "<end>"], "42", (0, 2)),  # a token of both is the answer's
        (["42", "<end>"], "42", ()),  # the answer alone is listed
        (["so", " 42", "<end>"], "", (0,)),
        (["<x>", "7", "</x>", "Yes.\n", "<think>", "8", "</think>", " 7", "<end>"], "Yes.\n<think>8</think> 7", (0, 3, 4, 7)),
        (["<x>", "7", "</x>", "Yes.\n", "<think>", "8", "<end>"], "Yes.\n<think>8", (0, 3, 4)),
    ],
)
def test_by_hand(tokens: list[str], text: str, expected: tuple[int, ...]) -> None:
    placed = placed_split("".join(tokens), text, split_reasoning(text))
    assert placed is not None
    assert cuts_of(answer_tokens(tokens, placed)) == expected


def test_a_text_that_was_changed_stands_nowhere() -> None:
    assert placed_split("<x>so</x>42", "43", split_reasoning("43")) is None
