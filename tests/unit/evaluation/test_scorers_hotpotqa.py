"""HotpotQA: exact match and F1 against an independent implementation of the definition, and what counts as the answer."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from dmoa.evaluation import registry as table
from dmoa.evaluation.benchmarks.hotpotqa import exact_match, f1, normalised, read_answer
from dmoa.evaluation.records import Label, Reply

PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def independent_tokens(text: str) -> list[str]:
    """The definition, character by character: lower case, no punctuation, no articles, split at white space."""
    kept = "".join(char for char in text.lower() if char not in PUNCTUATION)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def independent_scores(said: str, gold: str) -> tuple[bool, Fraction]:
    """EM and F1 = 2 * shared / (both lengths), the shared tokens crossed off one by one."""
    said_tokens, gold_tokens = independent_tokens(said), independent_tokens(gold)
    is_equal = said_tokens == gold_tokens
    if not is_equal and any(tokens in (["yes"], ["no"], ["noanswer"]) for tokens in (said_tokens, gold_tokens)):
        return is_equal, Fraction(0)
    left = list(gold_tokens)
    num_shared = 0
    for token in said_tokens:
        if token in left:
            left.remove(token)
            num_shared += 1
    if not num_shared:
        return is_equal, Fraction(0)
    return is_equal, Fraction(2 * num_shared, len(said_tokens) + len(gold_tokens))


def test_agree_with_an_independent_implementation_on_1000_pairs() -> None:
    dice = random.Random(0)
    words = [
        "The",
        "a",
        "an",
        "Paris",
        "paris,",
        "New",
        "York",
        "City.",
        "yes",
        "no",
        "NoAnswer",
        "1,969",
        "U.S.",
        "the-end",
        "'A'",
        "é",
    ]
    num_equal = num_partial = 0
    for _ in range(1000):
        gold = dice.choices(words, k=dice.randint(1, 4))
        said = dice.choice([gold[:], dice.choices(words, k=dice.randint(0, 5)), gold[1:], [word.upper() for word in gold]])
        pair = dice.choice([" ", "  "]).join(said), " ".join(gold)
        is_equal, expected = independent_scores(*pair)
        assert exact_match(*pair) == float(is_equal), pair
        assert f1(*pair) == pytest.approx(float(expected), abs=1e-12), pair
        assert f1(*pair) == pytest.approx(f1(*reversed(pair)), abs=1e-12)
        num_equal += is_equal
        num_partial += 0 < expected < 1
    assert min(num_equal, num_partial) > 100


@pytest.mark.parametrize(
    ("said", "gold", "em", "expected"),
    [
        ("The Beatles", "beatles", 1.0, 1.0),
        ("Golden Valley, Minnesota", "Golden Valley, Minnesota,", 1.0, 1.0),
        ("Stephen Edwin King", "Stephen King", 0.0, 0.8),
        ("yes", "no", 0.0, 0.0),
        ("yes it is", "yes", 0.0, 0.0),
        ("no", "no idea", 0.0, 0.0),
        ("", "Paris", 0.0, 0.0),
    ],
)
def test_known_values(said: str, gold: str, em: float, expected: float) -> None:
    assert exact_match(said, gold) == em
    assert f1(said, gold) == pytest.approx(expected)


def test_normalisation_keeps_words_that_hold_articles() -> None:
    assert normalised("The theatre: an  Anthem, A-side") == "theatre anthem aside"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: Stephen King", "Stephen King"),
        ("He wrote it in 1977.\nAnswer: Stephen King", "Stephen King"),
        ("**Answer:** yes", "yes"),
        ("It was in 1977.\n<answer>Stephen King</answer>", "Stephen King"),
        ("<answer>\nStephen King\n</answer>\nHe wrote it.", "Stephen King"),
        ("The answer is St. Louis, Missouri", "St. Louis, Missouri"),
        ("Stephen King", "Stephen King"),
        ("He wrote it.\n\nStephen King\n", "Stephen King"),
        ("Answer: Sorry, Wrong Number", "Sorry, Wrong Number"),
        ("Sorry, Wrong Number", "Sorry, Wrong Number"),
        ("Answer: A\nno\nAnswer: B", "B"),
        ("", None),
        (" \n ", None),
        ("Answer:", None),
        ("...", None),
        ("I cannot help with that.", None),
        ("Answer: I cannot help with that.", None),
        ("I'm sorry, as an AI language model\nI have no opinion", None),
    ],
)
def test_answer_of_a_reply(text: str, answer: str | None) -> None:
    assert read_answer(text) == answer


def test_scores() -> None:
    score = table.build_scorer("hotpotqa").score
    label = Label(row_id="hotpotqa/test/1", benchmark="hotpotqa", gold={"answer": "Stephen King"})
    right = score(label, Reply(text="Answer: stephen king."))
    assert (right.value, right.metrics) == (1.0, {"f1": 1.0})
    near = score(label, Reply(text="Answer: Stephen Edwin King"))
    assert (near.value, near.is_scored) == (0.0, True)
    assert near.metrics["f1"] == pytest.approx(0.8)
    none = score(label, Reply(text="I cannot help the King with that."))
    assert (none.value, none.is_scored, none.metrics) == (0.0, False, {"f1": 0.0})


def test_a_row_whose_answer_is_an_article_is_unscorable() -> None:
    label = Label(row_id="hotpotqa/test/1", benchmark="hotpotqa", gold={"answer": "A"})
    found = table.build_scorer("hotpotqa").score(label, Reply(text="Answer: A"))
    assert (found.value, found.is_scored) == (0.0, False)
    assert "no reply can be right" in found.reason
    assert found.is_left_out
    assert not found.is_scored


def test_an_answer_in_json_is_read_without_its_braces() -> None:
    assert read_answer('{"answer": "Paris"}') == "Paris"
    assert read_answer("<think>Rome?</think>\nParis") == "Paris"
    assert read_answer("<think>Rome?") is None


@pytest.mark.parametrize("title", ["I Can't Dance", "Sorry, I Love You", "We Won't Be Fooled", "Sorry"])
def test_a_title_that_begins_like_a_refusal_is_an_answer(title: str) -> None:
    assert read_answer(f"Answer: {title}") == title


@pytest.mark.parametrize(
    "said", ["I cannot determine the answer.", "I'm sorry, but I can't tell", "As an AI", "I do not know", "Sorry, I do not know"]
)
def test_a_refusal_that_is_stated_is_none(said: str) -> None:
    assert read_answer(f"Answer: {said}") is None
    assert read_answer(said) is None
