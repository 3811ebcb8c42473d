"""Letters: the forms that models write, and an independent reader on generated replies."""

from __future__ import annotations

import random

import pytest

from dmoa.evaluation import registry as table
from dmoa.evaluation.benchmarks.choices import read_choice
from dmoa.evaluation.records import Label, Reply

CHOICES = ["Paris", "a dog", "12", "None of these"]
CHOSEN = [
    ("Answer: B", "B"),
    ("ANSWER: A", "A"),
    ("Answer is A", "A"),
    ("Answer: b", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("b", "B"),
    ("A: B", "B"),
    ("A: Option B", "B"),
    ("A: a dog", "B"),
    ("A: Paris", "A"),
    ("A: not B", "A"),
    ("<answer>B</answer>", "B"),
    ("Answer: B?", "B"),
    ("Answer: B\u200b", "B"),
    ("\\boxed{\\textbf{(B) }a dog}", "B"),
    ("Answer: \\textbf{(B)}\\ 12 dogs", "B"),
    ("{'answer': 'B'}", "B"),
    ("the answer is option c", "C"),
    ("The correct answer is (D).", "D"),
    ("Answer: The correct answer is (D).", "D"),
    ("\\boxed{D}", "D"),
    ("\\boxed{\\text{(B)}}", "B"),
    ("Answer: $B$", "B"),
    ("Answer: `B`", "B"),
    ("**Answer:** **B**", "B"),
    ("Answer: Option A", "A"),
    ("Answer: (C) 12", "C"),
    ("The correct answer is B) a dog", "B"),
    ("Answer: B a dog", "B"),
    ("Answer: B, a mammal", "B"),
    ("answer: B because of it", "B"),
    ("The answer is D: nothing fits", "D"),
    # the full text of exactly one choice
    ("Answer: a dog", "B"),
    ("Answer: A dog", "B"),
    ("Answer: 12", "C"),
    ("Answer: 12.", "C"),
    ("paris", "A"),
    ("Answer: none of these", "D"),
    # without a statement
    ("B\n\nBecause dogs bark", "B"),
    ("The correct option is B.", "B"),
    ("I choose C", "C"),
    ("A is wrong. B is correct.", "B"),
    ("I think (B), since (B) is a mammal", "B"),
    ("A. Paris\nB. a dog\nC. 12\nB", "B"),
    ("Dogs bark.\n(B) a dog", "B"),
    # plain words
    ("Answer: it is B.", "B"),
    ("Answer: It's B", "B"),
    ("It is B.", "B"),
    ("Answer: I would choose B", "B"),
    ("Answer: I'd go with option B, because dogs bark", "B"),
    ("Answer: Not A, but B", "B"),
    ("Answer: B and not A", "B"),
    ("Answer: B rather than A", "B"),
    ("Answer: A is incorrect, so B", "B"),
    ("Answer: A is wrong; C is wrong; so it must be B", "B"),
    ("Answer: it is a dog", "B"),
    ("Answer: B</s>", "B"),
    ("Answer: B<|im_end|>", "B"),
    ("Answer: B\n\nThe answer is correct.", "B"),
    # corrections
    ("Answer: A\nno, wait\nAnswer: B", "B"),
    ("Answer: B\n\\boxed{B}", "B"),
]
NOT_CHOSEN = [
    "",
    " \n ",
    "I cannot help with that.",
    "I'm sorry, as an AI I can't answer",
    "As a dog, I would not say",
    "Answer:",
    "Answer: X, X one letter",
    "Answer: E",
    "Answer: N/A",
    "Answer: I",
    "Answer: a lot of things",
    "Answer: A lot of things",
    "Answer: 13",
    "Option B is not correct",
    "Answer: it is not B",
    "Answer: not A",
    "Answer: A is incorrect",
    "Answer: I would not choose B",
    "Answer: it is A or B",
    "Answer: I say a lot of things",
    "Answer: A not so small dog",
    # contradictions
    "Answer: A or B",
    "Answer: A and B",
    "Answer: (A) or (B)",
    "Answer: A\nAnswer: B",
    "Answer: A\n\\boxed{B}",
    "B. Paris",
    "(A) or (B)?",
    "Option A is correct. Option B is correct.",
    # lists of the choices are no choice
    "A. Paris\nB. a dog\nC. 12\nD. None of these",
    "(A) Paris\n(B) a dog",
]


@pytest.mark.parametrize(("text", "letter"), CHOSEN)
def test_letter_of_a_reply(text: str, letter: str) -> None:
    assert read_choice(text, CHOICES).value == letter


@pytest.mark.parametrize("text", NOT_CHOSEN)
def test_without_one_letter_none_is_made_up(text: str) -> None:
    choice = read_choice(text, CHOICES)
    assert choice.value is None
    assert choice.reason


def test_equal_choices_are_told_apart_by_letter_only() -> None:
    choices = ["manipulative", "reactive", "manipulative", "Manipulative"]
    assert read_choice("Answer: manipulative", choices).value is None
    assert read_choice("Answer: Manipulative", choices).value == "D"
    assert read_choice("Answer: C", choices).value == "C"


def test_a_choice_of_two_quantities_has_no_value() -> None:
    choices = ["23 chromosomes, 46 chromatids", "46 chromosomes, 46 chromatids", "7 hours", "90"]
    assert read_choice("I think 23 chromosomes, 46 chromatids", choices).value is None
    assert read_choice("Answer: 46 chromosomes, 46 chromatids", choices).value == "B"
    assert read_choice("Answer: x = 7", choices).value == "C"


def test_a_fifth_choice_exists_where_there_are_five() -> None:
    assert read_choice("Answer: E", [*CHOICES, "14"]).value == "E"


def independent(text: str, num_choices: int) -> str | None:
    """Word by word: the word after the last word "answer", an optional verb and an optional noun, if it is a letter."""
    words = ["".join(c for c in word if c.isalnum()) for word in text.split()]
    places = [place for place, word in enumerate(words) if word.lower() == "answer"]
    if not places:
        return None
    rest = [word for word in words[places[-1] + 1 :] if word]
    while rest and rest[0].lower() in ("is", "option", "choice"):
        rest = rest[1:]
    if len(rest) >= 3 and rest[1] == "or":
        return None
    is_letter = bool(rest) and len(rest[0]) == 1 and ord(rest[0].upper()) - ord("A") in range(num_choices)
    return rest[0].upper() if is_letter else None


def test_agrees_with_an_independent_reader_on_1000_replies() -> None:
    dice = random.Random(0)
    before = [
        "",
        "Dogs bark.\n",
        "(A) is small, (B) is big.\n",
        "Let me think: 12 is a number.\n",
        "Answer: A\nNo, that is wrong.\n",
    ]
    marks = ["Answer: {}", "answer: {}", "The answer is {}", "the answer is: option {}", "**Answer:** {}", "Answer: choice {}"]
    shapes = ["{}", "({})", "{}.", "**{}**", "[{}]", "{}\nThat is all.", "({}) because it fits", "{} or 1", "${}$"]
    found = {None: 0, "letter": 0}
    for _ in range(1000):
        num_choices = dice.choice([4, 5])
        letter = dice.choice("ABCDEFxyZ?abcde")
        shape = dice.choice(shapes)
        said = f"{letter} or {dice.choice('AB')}" if shape == "{} or 1" else shape.format(letter)
        text = dice.choice(before) + dice.choice(marks).format(said)
        if shape == "{} or 1" and (letter.upper() == said[-1] or not letter.isupper()):
            continue
        expected = independent(text, num_choices)
        assert read_choice(text, ["one", "two", "three", "four", "five"][:num_choices]).value == expected, text
        found["letter" if expected else None] += 1
    assert min(found.values()) > 100


def test_scores() -> None:
    score = table.build_scorer("mmlu").score
    label = Label(row_id="mmlu/test/1", benchmark="mmlu", gold={"letter": "B", "choices": CHOICES})
    assert score(label, Reply(text="Answer: B")).value == 1.0
    wrong = score(label, Reply(text="Answer: C"))
    assert (wrong.value, wrong.is_scored, wrong.extracted) == (0.0, True, "C")
    none = score(label, Reply(text="Answer: maybe"))
    assert (none.value, none.is_scored, none.extracted) == (0.0, False, None)
