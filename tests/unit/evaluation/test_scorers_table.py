"""What holds for every scorer: any text, refusals, huge replies, labels of other benchmarks."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.errors import ConfigError
from dmoa.evaluation import registry as table
from dmoa.evaluation.records import Label, Reply
from tests.examples import examples

GOLD: dict[str, dict[str, object]] = {
    "mmlu": {"letter": "B", "choices": ["one", "two", "three", "four"]},
    "gsm8k": {"number": "911"},
    "multiarith": {"number": "3"},
    "svamp": {"number": "2.5"},
    "aqua_rat": {"letter": "E", "choices": ["1", "2", "3", "4", "None of these"]},
    "hotpotqa": {"answer": "I cannot help with that"},
    "ddxplus": {"pathology": "GERD", "differential": [["GERD", 0.9], ["Croup", 0.1]], "conditions": ["GERD", "Croup", "SLE"]},
    "cruxeval_o": {"output": "{'911': [1, None]}"},
    "math": {"answer": "\\frac{911}{\\sqrt{2}}"},
}
LABELS = {name: Label(row_id=f"{name}/test/0", benchmark=name, gold=gold) for name, gold in GOLD.items()}
ENTRIES = {name: table.build_scorer(name) for name in GOLD}
PIECES = [
    *("Answer: ", "answer is ", "Diagnosis: ", "Differential: ", "GERD", " or ", "or", "(B)", "B.", "C"),
    *("\\boxed{", "\\frac{", "}", "\\sqrt", "\\times", "####", "```", "```python\n", "\n", " ", ";"),
    *("1/2", "1,2", "1e9", "-", "$", "^", "=", "\ud800", "\x00", "\u00bd", "\u2212"),
]
TEXTS = (
    st.text(max_size=300)
    | st.text(st.characters(categories=["Cs", "Cc", "No", "Nd", "Ps", "Pe", "Sm", "Po"]), max_size=100)
    | st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
)


# On a slow machine math-verify's clock may ring inside Hypothesis's callback of the garbage collector, where it is passed over.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=examples(1500), derandomize=True, database=None)
@given(TEXTS)
def test_no_text_raises(text: str) -> None:
    for name, entry in ENTRIES.items():
        score = entry.score(LABELS[name], Reply(text=text))
        assert 0.0 <= score.value <= 1.0
        assert score.is_scored or score.value == 0.0
        assert (score.extracted is None) == (not score.is_scored)
        assert tuple(score.metrics) == entry.metrics
        assert score.reason


@pytest.mark.parametrize("name", GOLD)
def test_gold_replies_reach_one_in_what_they_are_for(name: str) -> None:
    entry, label = ENTRIES[name], LABELS[name]
    if name == "hotpotqa":
        label = label.model_copy(update={"gold": {"answer": "Paris"}})
    replies = entry.gold_replies(label)
    assert set(replies) == {"value", *entry.metrics}
    for measure, text in replies.items():
        score = entry.score(label, Reply(text=text))
        assert (score.value if measure == "value" else score.metrics[measure]) == 1.0


@pytest.mark.parametrize(
    "text", ["", "  \n\t", "I cannot help with that.", "I'm sorry, as an AI I can't answer. Call 911.", "As an AI, no."]
)
@pytest.mark.parametrize("name", GOLD)
def test_empty_and_refused_replies_are_unscored_zeros(name: str, text: str) -> None:
    score = ENTRIES[name].score(LABELS[name], Reply(text=text))
    assert (score.value, score.is_scored, set(score.metrics.values()) - {0.0}) == (0.0, False, set())


HUGE = [
    *(part * 60_000 for part in PIECES),
    *(
        "A: " * 100_000,
        "A: option " * 50_000,
        "<answer>" * 50_000,
        "answer " * 150_000,
        "- GERD\n" * 150_000,
        " " * 1_000_000 + "x",
        "(" * 1_000_000,
        "9" * 1_000_000,
    ),
]


@pytest.mark.parametrize("text", HUGE, ids=range(len(HUGE)))
@pytest.mark.contract
def test_huge_replies_are_read_in_bounded_time(text: str) -> None:
    start = time.process_time()
    for name, entry in ENTRIES.items():
        entry.score(LABELS[name], Reply(text=text))
    assert time.process_time() - start < 6.0


def test_labels_of_other_benchmarks_and_unknown_benchmarks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'multiarith'.*'gsm8k'"):
        ENTRIES["gsm8k"].score(LABELS["multiarith"], Reply(text="3"))
    with pytest.raises(ConfigError, match=r"'mmul' is not known.*mmlu"):
        table.build_scorer("mmul")


def test_chance_is_one_of_the_choices_or_another_rows_answer() -> None:
    letters = [Label(row_id="x", benchmark="mmlu", gold={"letter": "A", "choices": ["a"] * n}) for n in (4, 4, 2)]
    assert ENTRIES["mmlu"].chance(letters) == pytest.approx((1 / 4 + 1 / 4 + 1 / 2) / 3)
    numbers = [Label(row_id="x", benchmark="gsm8k", gold={"number": number}) for number in ("7", "7.0", "7", "8")]
    assert ENTRIES["gsm8k"].chance(numbers) == pytest.approx(6 / 12)  # of the 12 ordered pairs, those among the three 7s
    assert ENTRIES["gsm8k"].chance(numbers[:1]) == 0.0


def test_deviations_are_said() -> None:
    assert {name for name, entry in ENTRIES.items() if entry.deviation} == {"mmlu", "hotpotqa", "ddxplus", "cruxeval_o"}
