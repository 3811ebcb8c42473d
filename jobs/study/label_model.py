"""Judges the label model on recorded replies of public models: what it gets right, at how many calls, with and without outcomes.

    python jobs/study/label_model.py FOLDER --out jobs/study/results/label_model.json

FOLDER holds `NAME.replies.jsonl.gz` (query_id, query, agent, text) and, opened here alone to score, `NAME.labels.jsonl.gz`.
Five draws of 80 queries to learn from; the rest is test. Shape letters as in `dmoa/core/label_model`.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmoa.agents.embedder import MiniLmEncoder
from dmoa.core.forms import agreement_key
from dmoa.core.label_model import LabelModel, fit_label_model
from dmoa.core.sequential import AGENT_PRICE, standing
from dmoa.core.witnesses import NO_ANSWER, Witnesses
from dmoa.engines import models

NAMES = ("gsm8k", "cruxeval_o", "math_l5")
TRAIN = 80
DRAWS = 5
MARGIN = 0.1
REFIT = 100
"""Queries answered between two fits, where the model learns while it answers."""
BARS = {  # suite: (calls allowed, outcomes)
    "gsm8k": (2.2, 0),
    "math_l5": (4.5, 0),
    "cruxeval_o": (1.5, 20),
    "mixed": (2.3, 60),
}
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Material:
    """Replies of one suite, and which of them are right."""

    agents: tuple[str, ...]
    witnesses: Witnesses
    right_RA: Bools


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What came of answering some queries in turn."""

    right: Bools
    calls: Ints
    probability: Floats

    def figures(self) -> dict[str, float]:
        """Return accuracy, calls and the expected calibration error over ten bins of equal width."""
        bins = np.minimum((self.probability * 10).astype(int), 9)
        gaps = [abs(float((self.probability - self.right)[bins == b].sum())) for b in range(10)]
        return {
            "accuracy": float(self.right.mean()),
            "calls": float(self.calls.mean()),
            "ece": sum(gaps) / len(bins),
        }


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load(folder: Path, name: str, encoder: MiniLmEncoder, only: tuple[str, ...] = ()) -> Material:
    """Return one suite; `only` some of the agents."""
    rows = [row for row in lines(folder / f"{name}.replies.jsonl.gz") if not only or row["agent"] in only]
    gold = {row["query_id"]: row["answer"].removeprefix("# ") for row in lines(folder / f"{name}.labels.jsonl.gz")}
    query = {row["query_id"]: row["query"] for row in rows}
    ids, agents = sorted(query), sorted({row["agent"] for row in rows})
    keys: dict[str, dict[str, str | None]] = defaultdict(dict)
    length_RA = np.full((len(ids), len(agents)), np.nan)
    place = {query_id: number for number, query_id in enumerate(ids)}
    for row in rows:
        keys[row["query_id"]][row["agent"]] = agreement_key(row["text"], row["query"])
        length_RA[place[row["query_id"]], agents.index(row["agent"])] = len(row["text"])
    answer_RA, right_RA = np.full(length_RA.shape, NO_ANSWER), np.zeros(length_RA.shape, dtype=bool)
    for number, query_id in enumerate(ids):
        said = [keys[query_id][agent] for agent in agents]
        classes = {key: at for at, key in enumerate(dict.fromkeys(key for key in said if key is not None))}
        answer_RA[number] = [NO_ANSWER if key is None else classes[key] for key in said]
        truth = agreement_key(json.dumps({"answer": gold[query_id]}), query[query_id])
        right_RA[number] = [key is not None and key == truth for key in said]
    unknown_RA = np.full(length_RA.shape, np.nan)
    embedding_RD = encoder.encode([query[query_id] for query_id in ids]).astype(np.float64)
    witnesses = Witnesses(
        answer_RA=answer_RA, doubt_RA=unknown_RA, length_RA=length_RA, outcome_RA=unknown_RA, embedding_RD=embedding_RD
    )
    return Material(agents=tuple(agents), witnesses=witnesses, right_RA=right_RA)


def joined(parts: list[Material]) -> Material:
    """Return the queries of several suites of the same agents as one stream."""
    right_RA = np.concatenate([part.right_RA for part in parts])
    return Material(agents=parts[0].agents, witnesses=joined_witnesses([part.witnesses for part in parts]), right_RA=right_RA)


def joined_witnesses(parts: list[Witnesses]) -> Witnesses:
    """Return the queries of all parts, one after the other."""
    names = [item.name for item in fields(Witnesses)]
    return Witnesses(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def answer(model: LabelModel, material: Material, rows: Ints, price: float) -> tuple[Answers, Bools]:
    """Answer queries in turn; also return who was asked [R, A]."""
    num_agents = len(material.agents)
    asked_RA = np.zeros((len(rows), num_agents), dtype=bool)
    leaders, probability = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows))
    for number, row in enumerate(rows):
        whole = material.witnesses.rows(slice(row, row + 1))
        while True:
            now = standing(model, whole.only(asked_RA[number : number + 1]), price=price)
            agent = now.next_agent
            if agent is None and now.leader is None:
                agent = int(np.argmax(np.where(asked_RA[number], -1.0, now.right_A)))
            if agent is None:
                break
            asked_RA[number, agent] = True
        assert now.leader is not None
        leaders[number], probability[number] = now.leader, now.probability
    answers = Answers(right=material.right_RA[rows, leaders], calls=asked_RA.sum(axis=1), probability=probability)
    return answers, asked_RA


def price_within(model: LabelModel, material: Material, rows: Ints, calls: float) -> float:
    """Return the lowest price at which the unlabelled training queries take so many calls; a bisection of its logarithm.

    They take a little fewer than new ones do, because the model has learnt from them: `MARGIN` of the calls are spared.
    """
    calls = 1 + (calls - 1) * (1 - MARGIN)
    low, high = np.log(0.002), np.log(0.3)
    for _ in range(8):
        middle = (low + high) / 2
        taken = answer(model, material, rows, float(np.exp(middle)))[0].calls.mean()
        low, high = (middle, high) if taken > calls else (low, middle)
    return float(np.exp(high))


def with_outcomes(material: Material, rows: Ints, rng: np.random.Generator, flipped: float = 0.0) -> Witnesses:
    """Return the witnesses with the replies to some queries judged, a share of them wrongly."""
    outcome_RA = material.witnesses.outcome_RA.copy()
    right = material.right_RA[rows]
    outcome_RA[rows] = np.where(rng.random(right.shape) < flipped, ~right, right)
    return replace(material.witnesses, outcome_RA=outcome_RA)


def while_answering(model: LabelModel, material: Material, train: Ints, test: Ints, price: float, seed: int) -> Answers:
    """Answer and learn: every few queries the model is fitted again, on the training queries and the replies asked for since."""
    parts: list[Answers] = []
    known = material.witnesses.rows(train)
    for start in range(0, len(test), REFIT):
        rows = test[start : start + REFIT]
        answers, asked_RA = answer(model, material, rows, price)
        parts.append(answers)
        known = joined_witnesses([known, material.witnesses.rows(rows).only(asked_RA)])
        model = fit_label_model(known, seed=seed)
    return Answers(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in ("right", "calls", "probability")})


def majority(material: Material, rows: Ints) -> float:
    """Return how often the commonest answer of all agents is right; the first of equals."""
    hits = []
    for row in rows:
        said = material.witnesses.answer_RA[row]
        counts = np.bincount(said[said >= 0], minlength=1)
        hits.append(bool(material.right_RA[row][said == counts.argmax()].any()))
    return float(np.mean(hits))


def judge(material: Material, calls: float, outcomes: int, limit: int | None) -> dict[str, Any]:
    """Return the figures of one suite: means over draws, and of each accuracy and number of calls the extremes."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    trust: list[list[str]] = []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        rows = rng.permutation(len(material.right_RA))
        train, test = rows[:TRAIN], rows[TRAIN:][:limit]
        best = int(material.right_RA[test].mean(axis=0).argmax())
        found["best single"].append({"accuracy": float(material.right_RA[test, best].mean()), "calls": 1.0})
        found["majority of all"].append({"accuracy": majority(material, test), "calls": float(len(material.agents))})
        arms = {"no outcomes": material.witnesses}
        if outcomes:
            arms[f"{outcomes} outcomes"] = with_outcomes(material, train[:outcomes], rng)
            arms[f"{outcomes} outcomes, a fifth of them wrong"] = with_outcomes(material, train[:outcomes], rng, 0.2)
        for name, witnesses in arms.items():
            model = fit_label_model(witnesses.rows(train), seed=draw)
            price = price_within(model, material, train, calls)
            found[f"{name}, at the default price"].append(answer(model, material, test, AGENT_PRICE)[0].figures())
            found[f"{name}, within {calls:g} calls"].append(answer(model, material, test, price)[0].figures() | {"price": price})
            if name == "no outcomes":
                trust.append([one.signal for one in model.trust])
                estimated = model.right_probability(material.witnesses.rows(train)).mean(axis=0)
                accuracy = material.right_RA.mean(axis=0)
                found["competence estimated against accuracy, r"].append({"r": float(np.corrcoef(estimated, accuracy)[0, 1])})
            if not outcomes:
                learned = while_answering(model, material, train, test, price, draw)
                found[f"{name}, within {calls:g} calls, learning while answering"].append(learned.figures())
    return {"trust": trust, **{name: summary(each) for name, each in found.items()}}


def summary(each: list[dict[str, float]]) -> dict[str, Any]:
    """Return the mean of every figure and the smallest and largest over draws."""
    return {
        figure: {"mean": round(float(np.mean(values)), 4), "from": round(min(values), 4), "to": round(max(values), 4)}
        for figure in each[0]
        for values in [[one[figure] for one in each]]
    }


def main() -> None:
    """Run the suites; each is added to the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--suites", nargs="+", choices=tuple(BARS), default=tuple(BARS))
    parser.add_argument("--limit", type=int, help="test rows of a draw [all]")
    options = parser.parse_args()
    encoder = MiniLmEncoder(models.fetch("minilm"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for suite in options.suites:
        if suite == "mixed":
            named = [{row["agent"] for row in lines(options.folder / f"{name}.replies.jsonl.gz")} for name in NAMES]
            common = tuple(sorted(set.intersection(*named)))
            material = joined([load(options.folder, name, encoder, common) for name in NAMES])
        else:
            material = load(options.folder, suite, encoder)
        found = judge(material, *BARS[suite], options.limit)
        print(suite, json.dumps(found, indent=1), flush=True)
        known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        options.out.write_text(json.dumps(known | {suite: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
