"""Says how one reply to one row is judged: what was read, where it stood, by which rule, what is right, and the verdict.

`dmoa evaluate --explain ROW` shows it, without asking any agent. Source: ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from dmoa.core.answers import open_reply, read_answer
from dmoa.core.forms import form_of
from dmoa.core.literals import read_literal
from dmoa.core.reasoning import split_reasoning
from dmoa.errors import ConfigError
from dmoa.evaluation.answering import score_answer
from dmoa.evaluation.data import load_rows
from dmoa.evaluation.records import Answered, FileRecord, Label, Scored, Split, Task
from dmoa.evaluation.registry import SUITES, judging
from dmoa.evaluation.results import Evaluation, read_evaluation
from dmoa.evaluation.run_folder import RunFolder
from dmoa.flat import flat
from dmoa.types import TokenUsage
from dmoa.validation import storable

T = TypeVar("T")
ROW_COLUMNS = ("row", "benchmark", "policy", "question", "answer", "gold", "score", "agents", "tokens")
"""Of `table_of_rows`."""
_MAX_CELL = 2000
"""Characters of a text in it."""


class Explanation(FileRecord):
    """How one reply is judged."""

    row_id: str
    source: str
    """Whose reply: a policy of the run, or `given`."""
    query: str
    text: str
    """The reply without its thoughts."""
    reasoning: str
    """What was thought before; no scorer reads it."""
    span: str
    """The part of the text that states the answer; empty where nothing is stated."""
    rule: str
    """By which rule the answer was found, or why there is none."""
    extracted: str | None
    """The answer as the benchmark's scorer read it; None where it found none."""
    gold: dict[str, Any]
    verdict: str
    """right, wrong, a fraction, unscored, failed (the query has no answer), or left out (no reply can be judged here)."""
    value: float
    reason: str
    """The scorer's own words."""


def explain(
    row_id: str, *, reply: str | None, out: Path | None, data_dir: Path | None, allow_weak_sandbox: bool = False
) -> list[Explanation]:
    """Return how a given reply (a text, or a file that holds it) is judged, or each policy's reply of the run in `out`.

    `row_id`: `benchmark/split/hash`, or its unambiguous beginning. Rows and labels are those of the run where there is one.
    Raises ConfigError for no such row, or no reply to explain.
    """
    benchmark = row_id.partition("/")[0]
    task, label = _from_run(row_id, out) if out is not None else _from_rows(row_id, benchmark, data_dir)
    given = {"row_id": task.row_id, "benchmark": benchmark, "policy": "given", **flat(TokenUsage())}
    replies = list(_replies(task, out)) if reply is None else [Answered(text=storable(_text_of(reply)), **given)]
    if not replies:
        raise ConfigError(f"--explain: there is no reply to {task.row_id}; give one with --reply TEXT, or a run with --out DIR")
    scorers = {benchmark: judging(benchmark, allow_weak_sandbox=allow_weak_sandbox).score}
    return [_explained(task, label, answer, score_answer(answer, label, scorers)) for answer in replies]


def _explained(task: Task, label: Label, answer: Answered, score: Scored) -> Explanation:
    text = answer.text
    split = split_reasoning(text)
    if form_of(task.text) == "literal":
        literal = read_literal(text)
        span, rule = literal.span, literal.reason if literal.how is None else f"{literal.how}: {literal.reason}"
    else:
        final, found = open_reply(text).final, read_answer(text)
        span = final.span if final is not None else ""
        rule = found.reason if found.how is None else f"{found.how}: {found.reason}, read as {found.kind}"
    left_out = "left out" if score.is_left_out else "failed" if score.is_failed else "unscored"
    verdict = {1.0: "right", 0.0: "wrong"}.get(score.value, f"{score.value:g}") if score.is_scored else left_out
    return Explanation(
        row_id=task.row_id,
        source=answer.policy,
        query=task.text,
        text=split.text,
        reasoning=split.reasoning,
        span=storable(span),
        rule=rule,
        extracted=score.extracted,
        gold=label.gold,
        verdict=verdict,
        value=score.value,
        reason=score.reason,
    )


def _text_of(reply: str) -> str:
    """Return the text that a reply names: what the file of this name holds, else itself."""
    try:
        path = Path(reply)
        return path.read_text(encoding="utf-8") if path.is_file() else reply
    except (OSError, ValueError):  # too long or too odd for a name
        return reply


def _replies(task: Task, out: Path | None) -> Iterator[Answered]:
    if out is None:
        return
    for policy in read_evaluation(out).config.policies:
        for answer in RunFolder(out).read_answers(task.benchmark, policy):
            if answer.row_id == task.row_id:
                yield answer


def _from_run(row_id: str, out: Path) -> tuple[Task, Label]:
    folder, benchmark = RunFolder(out), row_id.partition("/")[0]
    task = _one(row_id, {task.row_id: task for task in folder.read_tasks(benchmark)}, str(out))
    labels = {label.row_id: label for label in folder.read_gold(benchmark)}
    return task, _one(task.row_id, labels, str(folder.gold(benchmark)))


def _from_rows(row_id: str, benchmark: str, data_dir: Path | None) -> tuple[Task, Label]:
    split = row_id.split("/")[1] if row_id.count("/") else ""
    if benchmark in SUITES:
        raise ConfigError(f"--explain: rows of {benchmark} are generated by a run; name its folder with --out DIR")
    if split not in get_args(Split):
        raise ConfigError(f"--explain is {row_id!r}; expected a row as tables name it, such as gsm8k/test/0123456789abcdef")
    rows = load_rows(benchmark, split, data_dir=data_dir, skip_bad_rows=True).rows  # type: ignore[arg-type]
    row = _one(row_id, {row.task.row_id: row for row in rows}, str(data_dir or "the hub"))
    return row.task, row.label


def _one(row_id: str, rows: dict[str, T], where: str) -> T:
    found = [name for name in rows if name.startswith(row_id)]
    if row_id not in rows and len(found) != 1:
        some = f"name one, such as {', '.join(list(rows)[:3])}" if rows else "it holds none of that benchmark"
        raise ConfigError(f"--explain: {len(found)} rows of {where} begin with {row_id!r}; {some}")
    return rows[row_id if row_id in rows else found[0]]


def table_of_rows(evaluation: Evaluation, folder: RunFolder) -> Iterator[list[Any]]:
    """Yield a row for every answer: what was asked and said, what is right, who was asked, what it took."""
    for info in evaluation.config.benchmarks:
        asked = {task.row_id: task.text for task in folder.read_tasks(info.name)}
        gold = {label.row_id: json.dumps(label.gold, ensure_ascii=False) for label in folder.read_gold(info.name)}
        for policy in evaluation.config.policies:
            scores = {one.row_id: one.value for one in folder.read_scores(info.name, policy)}
            for one in folder.read_answers(info.name, policy):
                texts = [text[:_MAX_CELL] for text in (asked.get(one.row_id, ""), one.text, gold.get(one.row_id, ""))]
                agents = "; ".join(", ".join(step) for step in one.active)
                yield [one.row_id, info.name, policy, *texts, scores.get(one.row_id), agents, one.usage.total]
