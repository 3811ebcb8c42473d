"""Public shapes of replies that were once read wrongly, through the scorers of benchmarks: right, wrong, or unscored."""

from __future__ import annotations

from typing import Any

import pytest

from dmoa.evaluation.records import Label, Reply
from dmoa.evaluation.registry import build_scorer

FOUR = ["4", "6", "7", "9"]
PERCENT = ["50%", "25%", "10%", "5%", "none of these"]
FRACTIONS = ["\\frac{1}{4}", "\\frac{3}{4}", "\\frac{1}{3}", "\\frac{2}{3}", "\\frac{1}{6}"]
CASES: list[tuple[str, dict[str, Any], str, bool | None]] = [
    ("gsm8k", {"number": "42"}, "<think>\nI cannot be sure. The answer is 41", None),
    ("gsm8k", {"number": "42"}, "analysisWe compute. The answer is 40? no 42.assistantfinal42", True),
    ("gsm8k", {"number": "5"}, "#### 5\n\nAnn has 4 and buys 5. How many has she?\n#### 9", True),
    ("gsm8k", {"number": "70000"}, "The profit is $70,000 (150% of the value).", True),
    ("gsm8k", {"number": "18"}, "She earns $18 a day (9 eggs at $2 each).", True),
    ("gsm8k", {"number": "-15"}, "Answer: \u2013 15", True),
    ("gsm8k", {"number": "6"}, "Answer: between 5 and 6", None),
    ("gsm8k", {"number": "829"}, "The answer is not 829.", None),
    ("gsm8k", {"number": "1024"}, "Answer: 2^10", True),
    ("gsm8k", {"number": "18"}, '{"reasoning": "9 and 2", "answer": "18"}', True),
    ("gsm8k", {"number": "4"}, "Answer: 2, 4", None),
    ("gsm8k", {"number": "2"}, "Answer: 2\u221a3", None),
    ("gsm8k", {"number": "12"}, "The answer is 0, as 12 is too few.", False),
    ("mmlu", {"letter": "C", "choices": FOUR}, "<think>\nMaybe the answer is A. Hmm", None),
    ("mmlu", {"letter": "C", "choices": FOUR}, '```json\n{"answer": "C"}\n```', True),
    ("mmlu", {"letter": "B", "choices": FOUR}, "Answer: Let's think step by step. B is right, so (B).", True),
    ("mmlu", {"letter": "B", "choices": FOUR}, "It is not (B)", None),
    ("aqua_rat", {"letter": "A", "choices": PERCENT}, "Answer: 50 percent", True),
    ("aqua_rat", {"letter": "A", "choices": PERCENT}, "The answer is \\frac{1}{2}, so 50%", True),
    ("aqua_rat", {"letter": "B", "choices": FRACTIONS}, "Answer: 0.75", True),
    ("hotpotqa", {"answer": "Paris"}, '{"answer": "Paris"}', True),
    ("hotpotqa", {"answer": "A"}, "Answer: A", None),
    ("cruxeval_o", {"output": "'UppEr'"}, '{"answer": "upper"}', False),
    ("cruxeval_o", {"output": "[1]"}, "<think>[1]", None),
    ("math", {"answer": "2\\sqrt{3}"}, "It is \\boxed{\\sqrt{12}}.", True),
    ("math", {"answer": "2"}, '{"answer": "2 + sqrt(3), 2 - sqrt(3)"}', False),
    ("math", {"answer": "\\frac{2}{3}"}, '{"answer": "\\frac{2}{3}"}', True),
    ("math", {"answer": "60000"}, "Answer: 60,000", True),
    ("math", {"answer": "120"}, "So it is \\boxed{5!}.", True),
    ("math", {"answer": "5"}, "So it is \\boxed{5!}.", False),
    ("math", {"answer": "5"}, "The answer is 5!", True),
    ("math", {"answer": "1,2"}, "Answer: 2 and 1", True),
    ("math", {"answer": "1,2"}, "\\boxed{x = 1 \\text{ or } x = 2}", True),
    ("math", {"answer": "1,2"}, "\\boxed{x = 1 \\text{ or } x = 3}", False),
    ("math", {"answer": "\\frac{1}{3}"}, "\\boxed{0.\\overline{3}}", True),
    ("math", {"answer": "0.\\overline{54}"}, "\\boxed{\\frac{6}{11}}", True),
    ("math", {"answer": "x \\le 5"}, "\\boxed{5 >= x}", True),
    ("math", {"answer": "3"}, "The answer is that there are 2 values of x for which f(x) = 3.", False),
]


@pytest.mark.parametrize(("name", "gold", "reply", "expected"), CASES)
def test_a_reply_is_right_wrong_or_unscored(name: str, gold: dict[str, Any], reply: str, expected: bool | None) -> None:
    found = build_scorer(name).score(Label(row_id=f"{name}/test/0", benchmark=name, gold=gold), Reply(text=reply))
    assert (found.value == 1.0 if found.is_scored else None) == expected, found
