"""GSM8K's scorer against an independent one, on recorded replies of eleven public models; disagreements decided by hand."""

from __future__ import annotations

import ast
import gzip
import json
import operator
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from dmoa.evaluation import registry
from dmoa.evaluation.records import Label, Reply

SHARED = Path(__file__).parents[4] / "shared"
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
DECIDED = {
    # (row, model): who is right, and why
    ("220", "Yi-1.5-9B-Chat"): ("ours", "JSON says 60; the text after it corrects it to 70"),
    ("265", "Yi-1.5-9B-Chat"): ("ours", "JSON says 12,000; the text after it calls that a mistake: 9,500"),
    ("820", "Yi-1.5-9B-Chat"): ("ours", "JSON says 128; the text after it works out 720"),
    ("1027", "Yi-1.5-9B-Chat"): ("second", "JSON says $9; prose after it names $12, in words that no reader should trust"),
    ("1079", "Yi-1.5-9B-Chat"): ("ours", "JSON says 20; the text after it corrects it to 10%"),
    ("1084", "Phi-3.5-mini-instruct"): ("ours", "JSON says 20; then the model makes up another question"),
}
"""By hand, in our own words."""


@pytest.fixture(scope="module")
def folder() -> Path:
    """The folder of recorded replies. Where it is absent the test is skipped, but fails in CI that has data for its clone."""
    found = Path(os.environ.get("DMOA_RECORDED_REPLIES", SHARED / "outcomes"))
    if not (found / "gsm8k.replies.jsonl.gz").is_file() or not (found / "gsm8k.labels.jsonl.gz").is_file():
        if "CI" in os.environ and SHARED.is_dir():
            pytest.fail(f"recorded replies are missing in {SHARED}")
        pytest.skip("recorded replies are not part of a clone; DMOA_RECORDED_REPLIES may name their folder")
    return found


def lines(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def independent(text: str) -> Fraction | None:
    """What follows the last key `answer`, worked out by Python's parser, or its last number; without a key the last of all."""
    place = text.rfind('"answer"')
    said = text if place < 0 else text[place + len('"answer"') :].lstrip(" :\n")
    if place >= 0 and said.startswith('"'):
        said = re.split(r'(?<!\\)"', said[1:], maxsplit=1)[0]
    elif place >= 0:
        said = said.partition("}")[0]
    try:
        return value_of(ast.parse(re.sub(r"[$,%]", "", said).strip(), mode="eval").body) if place >= 0 else last_number(said)
    except (ValueError, SyntaxError, ZeroDivisionError, MemoryError, RecursionError):
        return last_number(said)


def value_of(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value_of(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    raise ValueError(node)


def last_number(text: str) -> Fraction | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text.replace("$", ""))
    for word in reversed(found):
        try:
            return Fraction(word.replace(",", ""))
        except (ValueError, ZeroDivisionError):
            continue
    return None


def test_agrees_with_an_independent_scorer_on_recorded_replies(folder: Path) -> None:
    score = registry.build_scorer("gsm8k").score
    gold = {
        line["query_id"]: line["answer"].removeprefix("# ").replace(",", "") for line in lines(folder / "gsm8k.labels.jsonl.gz")
    }
    right: dict[str, list[tuple[bool, bool, bool]]] = defaultdict(list)
    disagreements = set()
    for line in lines(folder / "gsm8k.replies.jsonl.gz"):
        number = gold[line["query_id"]]
        ours = score(Label(row_id=line["query_id"], benchmark="gsm8k", gold={"number": number}), Reply(text=line["text"]))
        theirs = independent(line["text"]) == Fraction(number)
        right[line["agent"]].append((ours.value == 1.0, theirs, ours.is_scored))
        if (ours.value == 1.0) != theirs:
            disagreements.add((line["query_id"].rpartition("#")[2], line["agent"]))
    assert len(right) == 11
    for agent, pairs in right.items():
        shares = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
        assert abs(shares[0] - shares[1]) <= 0.005, (agent, shares)
    assert disagreements <= set(DECIDED), disagreements - set(DECIDED)
    scored = [is_scored for pairs in right.values() for _, _, is_scored in pairs]
    assert 1 - sum(scored) / len(scored) <= 0.01
