"""`dmoa export`: what a swarm said as JSON Lines to train a single model with, supervised (sft) or by preference (dpo).

Traces give chosen answers without labels; a pair of them are two replies to one question whose probabilities of being right lie
apart. Runs of evaluations give right answers, and pairs of a right and a wrong one: there labels choose. Source: after Mixture of
Agents Alignment (arXiv 2505.03059); the pairs ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmoa.errors import ConfigError
from dmoa.evaluation.records import Answered
from dmoa.evaluation.results import read_evaluation
from dmoa.evaluation.run_folder import RunFolder
from dmoa.storage import replacing
from dmoa.trace import ReplyAgent, ReplyStep, Trace, read_traces
from dmoa.training.options import ExportOptions

Record = dict[str, Any]


def export(options: ExportOptions) -> int:
    """Write the file whole and return how many lines it has. Raises ConfigError, TraceError."""
    if options.traces is not None:
        traces = read_traces(options.traces)
        found = [line for trace in traces for line in of_trace(trace, is_dpo=options.format == "dpo", margin=options.margin)]
    else:
        assert options.run is not None
        found = list(of_run(options.run, is_dpo=options.format == "dpo"))
    try:
        with replacing(options.out) as file:
            file.writelines(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for line in found)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {str(options.out)!r}: {error}; name a file that can be written") from error
    return len(found)


def of_trace(trace: Trace, *, is_dpo: bool, margin: float) -> Iterator[Record]:
    """Yield the answer of a query, or a pair of each step whose likeliest and least likely replies lie `margin` apart."""
    query, about = trace.query, {"trace_id": trace.trace_id, "policy": trace.dmoa.policy, "gate_version": trace.dmoa.gate_version}
    asked = [{"role": "system", "content": query["system"]}] if query.get("system") else []
    asked += [dict(turn) for turn in query.get("turns", ())] + [{"role": "user", "content": query["text"]}]
    if not is_dpo:
        steps = [_decision(step) for step in trace.dmoa.steps]
        if trace.answer.strip() and trace.finish_reason == "stop":
            yield {
                "messages": [*asked, _said(trace.answer)],
                "dmoa": about | {"stop_reason": trace.dmoa.stop_reason, "steps": steps},
            }
        return
    for step in trace.dmoa.steps:
        judged = sorted(_judged(step), key=lambda pair: -pair[1])
        if not judged or judged[0][1] - judged[-1][1] < margin or judged[0][0].text == judged[-1][0].text:
            continue
        better, worse = judged[0], judged[-1]
        decision = _decision(step) | {"chosen": better[0].name, "rejected": worse[0].name, "right": [better[1], worse[1]]}
        yield _pair(asked, better[0].text or "", worse[0].text or "", about | decision)


def of_run(folder: Path, *, is_dpo: bool) -> Iterator[Record]:
    """Yield every right answer of a run, or for each row the first right answer and the first wrong one, by policy."""
    run, paths = read_evaluation(folder).config, RunFolder(folder)
    for benchmark in (info.name for info in run.benchmarks):
        answers = {policy: {line.row_id: line for line in paths.read_answers(benchmark, policy)} for policy in run.policies}
        scores = {policy: {line.row_id: line for line in paths.read_scores(benchmark, policy)} for policy in run.policies}
        for task in paths.read_tasks(benchmark):
            asked, right, wrong = [{"role": "user", "content": task.text}], list[Answered](), list[Answered]()
            for policy in run.policies:
                answer, score = answers[policy].get(task.row_id), scores[policy].get(task.row_id)
                if answer and answer.text.strip() and score and not score.is_failed and not score.is_left_out:
                    (right if score.value == 1.0 else wrong).append(answer)
            about = {"row_id": task.row_id, "split": run.split}
            if is_dpo and right and wrong:
                told = about | {"chosen": _answered(right[0]), "rejected": _answered(wrong[0])}
                yield _pair(asked, right[0].text, wrong[0].text, told)
            elif not is_dpo:
                yield from ({"messages": [*asked, _said(line.text)], "dmoa": about | _answered(line)} for line in right)


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _pair(asked: list[dict[str, str]], better: str, worse: str, about: Record) -> Record:
    return {"prompt": asked, "chosen": [_said(better)], "rejected": [_said(worse)], "dmoa": about}


def _answered(line: Answered) -> Record:
    return {"policy": line.policy, "gate_version": line.gate_version, "active": [list(names) for names in line.active]}


def _decision(step: ReplyStep) -> Record:
    """Return whom the gate asked in a step, and how probable it found each."""
    asked = [agent for agent in step.agents if agent.status not in ("idle", "masked")]
    return {"step": step.step, "k": step.k, "agents": {agent.name: agent.probability for agent in asked}}


def _judged(step: ReplyStep) -> list[tuple[ReplyAgent, float]]:
    """Return the replies of a step with the probabilities that they are right, where a gate knew them."""
    replies = [agent for agent in step.agents if agent.status == "ok" and agent.text and agent.finish_reason == "stop"]
    return [(agent, agent.right_probability) for agent in replies if agent.right_probability is not None]
