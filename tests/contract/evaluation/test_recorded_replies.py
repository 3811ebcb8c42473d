"""Scorers against independent ones, on recorded replies of public models; every disagreement was decided by hand."""

from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dmoa.evaluation import registry
from dmoa.evaluation.records import Label, Reply
from tests.contract.evaluation import second_scorers
from tests.contract.evaluation.decided import DECIDED

SHARED = Path(__file__).parents[4] / "shared"


@dataclass(frozen=True)
class Corpus:
    file: str
    gold: str
    second: Callable[[str, str], bool]
    num_models: int
    max_unscored: float
    max_gap: float
    """Of any model's accuracy, from that by the second scorer as it is: no decision is looked at."""
    num_decided: int
    """Replies on which the two disagree, each decided by hand; a decision for a row's models shall not cover new ones."""


CORPORA = {
    "gsm8k": Corpus("gsm8k", "number", second_scorers.number_is_right, 11, 0.01, 0.005, 5),
    "cruxeval_o": Corpus("cruxeval_o", "output", second_scorers.literal_is_right, 9, 0.03, 0.016, 95),
    "math": Corpus("math_l5", "answer", second_scorers.expression_is_right, 9, 0.03, 0.0065, 11),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    """The folder of recorded replies. Where it is absent the test is skipped, but fails where a part of it is there."""
    found = Path(os.environ.get("DMOA_RECORDED_REPLIES", SHARED / "outcomes"))
    if not found.is_dir():
        if "CI" in os.environ and SHARED.is_dir():
            pytest.fail(f"recorded replies are missing in {SHARED}")
        pytest.skip("recorded replies are not part of a clone; DMOA_RECORDED_REPLIES may name their folder")
    missing = [
        name
        for corpus in CORPORA.values()
        for name in (f"{corpus.file}.replies.jsonl.gz", f"{corpus.file}.labels.jsonl.gz")
        if not (found / name).is_file()
    ]
    assert not missing, f"{found} lacks {missing}"
    return found


def lines(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


@pytest.mark.contract
@pytest.mark.parametrize("name", CORPORA)
def test_agrees_with_an_independent_scorer_on_recorded_replies(name: str, folder: Path) -> None:
    corpus, score = CORPORA[name], registry.build_scorer(name).score
    labels = {line["query_id"]: line["answer"] for line in lines(folder / f"{corpus.file}.labels.jsonl.gz")}
    if name == "gsm8k":
        labels = {row: answer.removeprefix("# ").replace(",", "") for row, answer in labels.items()}
    ours: dict[str, list[bool]] = defaultdict(list)
    theirs: dict[str, list[bool]] = defaultdict(list)
    right: dict[str, list[bool]] = defaultdict(list)
    num_unscored = num_decided = 0
    undecided = []
    for line in lines(folder / f"{corpus.file}.replies.jsonl.gz"):
        row, model, gold = line["query_id"], line["agent"], labels[line["query_id"]]
        found = score(Label(row_id=row, benchmark=name, gold={corpus.gold: gold}), Reply(text=line["text"]))
        said_right = corpus.second(line["text"], gold)
        num_unscored += not found.is_scored
        if (found.value == 1.0) != said_right:
            number = row.rpartition("/")[2].rpartition("#")[2]
            who = DECIDED[name].get((number, model)) or DECIDED[name].get((number, "*"))
            if who is None:
                undecided.append((number, model, found.value, found.extracted))
            num_decided += 1
            is_right = found.value == 1.0 if who is not None and who[0] == "ours" else said_right
        else:
            is_right = said_right
        ours[model].append(found.value == 1.0)
        theirs[model].append(said_right)
        right[model].append(is_right)
    assert not undecided, undecided
    assert len(ours) == corpus.num_models
    num_rows = len(next(iter(ours.values())))
    for model, values in sorted(ours.items()):
        raw, decided = ((sum(values) - sum(others[model])) / num_rows for others in (theirs, right))
        print(f"{name} {model}: {sum(values) / num_rows:.4f}, second scorer {raw:+.4f}, decided by hand {decided:+.4f}")
        assert len(values) == num_rows
        assert abs(raw) <= corpus.max_gap, model
        assert abs(decided) <= 0.005, model
    assert num_decided <= corpus.num_decided
    assert num_unscored / sum(map(len, ours.values())) <= corpus.max_unscored
