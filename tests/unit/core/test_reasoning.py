"""What a model thought and what it answers: tags and channels by hand, and that no cut of the text changes the split."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.reasoning import ReasoningSplitter, SplitReply, split_reasoning

CASES = [
    # text, what is answered, what was thought, whether the thought never ended
    ("The answer is 42.", "The answer is 42.", "", False),
    ("  1 < 2 and [3]  ", "  1 < 2 and [3]  ", "", False),
    ("<think>\n6 * 7\n</think>\n\n42", "42", "6 * 7", False),
    ("<think></think>\n42\n", "42\n", "", False),
    ("\n <THINK>6 * 7</THINK>42", "42", "6 * 7", False),
    ("[THINK]a[/THINK]42", "42", "a", False),
    ("\u25c1think\u25b7a\u25c1/think\u25b742", "42", "a", False),
    ("<|begin_of_thought|>a<|end_of_thought|>42", "42", "a", False),
    ("<think>\nI cannot be sure. The answer is 41", "", "I cannot be sure. The answer is 41", True),
    ("so 41\n</think>\n\n42", "42", "so 41", False),
    ("<think>a</think>1\n<think>b</think>2", "1\n2", "a\n\nb", False),
    ("<think>a</think>\n<think>no, 4", "", "a\n\nno, 4", True),
    ("A <think> tag opens and </think> ends it.", "A <think> tag opens and </think> ends it.", "", False),
    ("analysisWe compute. The answer is 40? no 42.assistantfinal42", "42", "We compute. The answer is 40? no 42.", False),
    ("analysisA.assistantcommentaryB.assistantfinaljson{}", "{}", "A.\n\nB.", False),
    ("analysisWe compute 41", "", "We compute 41", True),
    ("analysis", "", "", True),
    ("analysis of 41 gives 42", "analysis of 41 gives 42", "", False),
    ("an assistantfinal 42", "an assistantfinal 42", "", False),
    ("<|channel|>analysis<|message|>40<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>", "42", "40", False),
    ("<|start|>assistant<|channel|>commentary to=f <|constrain|>json<|message|>{}<|call|>", "", "{}", True),
    ("<|channel|>analysis<|message|>40", "", "40", True),
    ("<|channel|>anal", "", "", True),
    ("<|channel|>final<|message|>42", "42", "", False),
    ("2 <thi", "2 <thi", "", False),
    ("<think>a</thi", "", "a</thi", True),
]


@pytest.mark.parametrize(("whole", "text", "reasoning", "is_open"), CASES)
def test_split_by_hand(whole: str, text: str, reasoning: str, is_open: bool) -> None:
    found = split_reasoning(whole)
    assert (found.text, found.reasoning, found.is_open) == (text, reasoning, is_open)


@pytest.mark.parametrize(
    ("whole", "text", "reasoning", "is_open"),
    [
        ("41\n</think>\n42", "42", "41", False),
        ("<think>41</think>42", "42", "41", False),
        ("The answer is 41", "", "The answer is 41", True),
        ("", "", "", True),
    ],
)
def test_a_thought_that_the_prompt_opened(whole: str, text: str, reasoning: str, is_open: bool) -> None:
    found = split_reasoning(whole, is_opened=True)
    assert (found.text, found.reasoning, found.is_open) == (text, reasoning, is_open)


PARTS = [
    *(
        "<think>",
        "</think>",
        "<thinking>",
        "[THINK]",
        "[/THINK]",
        "<thi",
        "\n",
        " ",
        "42",
        "<",
        "[1]",
        "assistant",
        "final",
        "json",
    ),
    *("analysis", "We", "commentary", "<|channel|>", "<|message|>", "<|end|>", "<|start|>assistant", "<|return|>", "The answer"),
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join) | st.sampled_from([case[0] for case in CASES])


@settings(derandomize=True, max_examples=700, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 60), max_size=30), st.booleans())
def test_no_cut_changes_the_split(whole: str, cuts: list[int], is_opened: bool) -> None:
    expected = fed([whole], is_opened)[0]
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[a:b] for a, b in pairwise(places)]
    for cut in (pieces, list(whole)):
        found, said = fed(cut, is_opened)
        assert found == expected
        assert said in (None, (found.text, found.reasoning))
    assert "".join(whole[a:b] for a, b in expected.spans) == expected.text


def fed(pieces: list[str], is_opened: bool) -> tuple[SplitReply, tuple[str, str] | None]:
    """Return the split of a text that came in pieces, and the text and thought handed on; None where it was taken back."""
    splitter = ReasoningSplitter(is_opened=is_opened)
    out = [delta for piece in pieces for delta in splitter.feed(piece)] + splitter.close()
    said = ["".join(delta.text for delta in out if delta.is_reasoning is kind) for kind in (False, True)]
    return splitter.split(), None if splitter.is_retracted else (said[0], said[1])


def test_text_is_handed_on_at_once_but_for_what_may_be_a_tag() -> None:
    splitter = ReasoningSplitter()
    said = [[delta.text for delta in splitter.feed(piece)] for piece in ("It ", "is 1 <", " 2 <th", "is> 3", "\n</")]
    assert said == [["It "], ["is 1 "], ["< 2 "], ["<this> 3"], ["\n"]]
    assert [delta.text for delta in splitter.close()] == ["</"]


def test_a_thought_that_only_its_end_tells_comes_once_more_as_one() -> None:
    splitter = ReasoningSplitter()
    said = [(delta.text, delta.is_reasoning) for piece in ("6 by", " 7?", "</think>", "\n\n42") for delta in splitter.feed(piece)]
    assert said == [("6 by", False), (" 7?", False), ("6 by 7?", True), ("42", False)]
    assert splitter.is_retracted
    assert (splitter.split().text, splitter.split().reasoning) == ("42", "6 by 7?")
