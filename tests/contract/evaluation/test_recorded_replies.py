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


CORPORA = {
    "gsm8k": Corpus("gsm8k", "number", second_scorers.number_is_right, 11, 0.01),
    "cruxeval_o": Corpus("cruxeval_o", "output", second_scorers.literal_is_right, 9, 0.03),
    "math": Corpus("math_l5", "answer", second_scorers.expression_is_right, 9, 0.03),
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
    right: dict[str, list[bool]] = defaultdict(list)
    num_unscored, undecided = 0, []
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
            said_right = said_right if who is None else (found.value == 1.0) if who[0] == "ours" else said_right
        ours[model].append(found.value == 1.0)
        right[model].append(said_right)
    assert not undecided, undecided
    assert len(ours) == corpus.num_models
    for model, values in ours.items():
        assert abs(sum(values) - sum(right[model])) / len(values) <= 0.005, model
    assert num_unscored / sum(map(len, ours.values())) <= corpus.max_unscored


@pytest.mark.contract
def test_the_two_scorers_agree_on_nearly_every_reply_to_gsm8k(folder: Path) -> None:
    """Without any decision: each model's accuracy within half a point."""
    score = registry.build_scorer("gsm8k").score
    gold = {
        line["query_id"]: line["answer"].removeprefix("# ").replace(",", "") for line in lines(folder / "gsm8k.labels.jsonl.gz")
    }
    pairs: dict[str, list[float]] = defaultdict(list)
    for line in lines(folder / "gsm8k.replies.jsonl.gz"):
        number = gold[line["query_id"]]
        found = score(Label(row_id=line["query_id"], benchmark="gsm8k", gold={"number": number}), Reply(text=line["text"]))
        pairs[line["agent"]].append(found.value - second_scorers.number_is_right(line["text"], number))
    assert {
        model: abs(sum(values)) / len(values) for model, values in pairs.items() if abs(sum(values)) > 0.005 * len(values)
    } == {}
