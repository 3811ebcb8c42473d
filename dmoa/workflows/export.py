"""`dmoa export`: what a swarm said as JSON Lines to train a single model with, supervised (sft) or by preference (dpo).

Traces give chosen answers without labels; a pair of them are two replies to one question whose probabilities of being right lie
apart. Runs of evaluations give right answers, and pairs of a right and a wrong one: there labels choose. What was cut, what an
adversary had a part in, and well-known shapes of keys are left out. Source: after Mixture of Agents Alignment (arXiv 2505.03059);
the pairs ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dmoa.errors import TraceError
from dmoa.evaluation.records import Answered
from dmoa.evaluation.results import read_evaluation
from dmoa.evaluation.run_folder import RunFolder
from dmoa.storage import json_line, replacing, writing
from dmoa.trace import ReplyAgent, ReplyStep, Trace, read_traces
from dmoa.training.options import ExportOptions
from dmoa.validation import short, without_known_shapes

Record = dict[str, Any]
NEEDED = {
    ("sft", True): "a line takes an answer that was not cut",
    ("sft", False): "a line takes a right answer",
    ("dpo", True): "a pair takes replies of one step that a gate of score posterior finds --margin apart",
    ("dpo", False): "a pair takes a right and a wrong answer to one row",
}
"""What a line takes, by format and whether it is made of traces."""


def export(options: ExportOptions) -> int:
    """Write the file whole and return how many lines it has. Raises ConfigError, TraceError."""
    if options.traces is not None:
        traces = read_traces(options.traces)
        found = [line for trace in traces for line in of_trace(trace, is_dpo=options.format == "dpo", margin=options.margin)]
    else:
        assert options.run is not None
        found = list(of_run(options.run, is_dpo=options.format == "dpo"))
    with writing(options.out), replacing(options.out) as file:
        file.writelines(map(json_line, found))
    return len(found)


def of_trace(trace: Trace, *, is_dpo: bool, margin: float) -> Iterator[Record]:
    """Yield the answer of a query, or a pair of each step whose likeliest and least likely replies lie `margin` apart.

    Queries are passed over whose agents read more than the conversation, and answers in a form that it does not ask for.
    """
    query, about = trace.query, {"trace_id": trace.trace_id, "policy": trace.dmoa.policy, "gate_version": trace.dmoa.gate_version}
    if query.get("exchange") or query.get("stages"):  # results of tools, parts of a task
        return
    try:
        asked = [_message("system", query["system"])] if query.get("system") else []
        asked += [_message(**turn) for turn in query.get("turns", ())] + [_message("user", query["text"])]
        has_form = bool((query.get("final") or {}).get("schema"))
    except (KeyError, TypeError, AttributeError) as error:
        what = f"query is {short(query)}; expected text, system and turns"
        raise TraceError(f"trace {trace.trace_id!r}: {what}; give a file that dmoa wrote") from error
    if not is_dpo:
        steps = [_decision(step) for step in trace.dmoa.steps]
        if trace.answer.strip() and trace.finish_reason == "stop" and not has_form:
            yield {
                "messages": [*asked, _message("assistant", trace.answer)],
                "dmoa": about | {"stop_reason": trace.dmoa.stop_reason, "steps": steps},
            }
        return
    for step in trace.dmoa.steps:
        judged = sorted(_judged(step), key=lambda pair: -pair[1])
        if not judged or judged[0][1] - judged[-1][1] < margin:
            continue
        better, worse = judged[0], judged[-1]
        decision = _decision(step) | {"chosen": better[0].name, "rejected": worse[0].name, "right": [better[1], worse[1]]}
        yield from _pair(asked, better[0].text or "", worse[0].text or "", about | decision)


def of_run(folder: Path, *, is_dpo: bool) -> Iterator[Record]:
    """Yield every right answer of a run, or for each row the first right answer and the first wrong one, by policy.

    One that was right in some repeats only is neither, nor is one that could not be judged. Tasks with stages are passed over:
    agents read another text at each.
    """
    run, paths = read_evaluation(folder).config, RunFolder(folder)
    agents = [agent["name"] for agent in run.pool.config.get("agents", ())]
    adversaries = frozenset(agents[len(agents) - run.options.get("adversaries", 0) :])
    for benchmark in (info.name for info in run.benchmarks):
        answers = {
            policy: {x.row_id: x for x in paths.read_answers(benchmark, policy) if _is_whole(x)} for policy in run.policies
        }
        scores = {policy: {line.row_id: line for line in paths.read_scores(benchmark, policy)} for policy in run.policies}
        for task in (task for task in paths.read_tasks(benchmark) if not task.stages):
            asked, right, wrong = [_message("user", task.text)], list[Answered](), list[Answered]()
            for policy in run.policies:
                answer, score = answers[policy].get(task.row_id), scores[policy].get(task.row_id)
                if not answer or not score or score.is_failed or score.is_left_out:
                    continue
                if score.value == 0.0 and score.is_scored:
                    wrong.append(answer)
                elif score.value == 1.0 and adversaries.isdisjoint(chain.from_iterable(answer.active)):
                    right.append(answer)
            about = {"row_id": task.row_id, "split": run.split}
            for line in right if not is_dpo else ():
                yield {"messages": [*asked, _message("assistant", line.text)], "dmoa": about | _answered(line)}
            if is_dpo and right:
                told = about | {"chosen": _answered(right[0])}
                pairs = (_pair(asked, right[0].text, bad.text, told | {"rejected": _answered(bad)}) for bad in wrong)
                yield from islice(chain.from_iterable(pairs), 1)


def _is_whole(line: Answered) -> bool:
    return bool(line.text.strip()) and line.finish_reason != "length"


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": without_known_shapes(content)}


def _pair(asked: list[dict[str, str]], better: str, worse: str, about: Record) -> Iterator[Record]:
    """Yield one pair, none where both say the same."""
    chosen, rejected = _message("assistant", better), _message("assistant", worse)
    if chosen["content"].strip() != rejected["content"].strip():
        yield {"prompt": asked, "chosen": [chosen], "rejected": [rejected], "dmoa": about}


def _answered(line: Answered) -> Record:
    return {"policy": line.policy, "gate_version": line.gate_version, "active": [list(names) for names in line.active]}


def _decision(step: ReplyStep) -> Record:
    """Return whom the gate asked in a step, and how probable it found each."""
    asked = [agent for agent in step.agents if agent.status not in ("idle", "masked")]
    return {"step": step.step, "k": step.k, "agents": {agent.name: agent.probability for agent in asked}}


def _judged(step: ReplyStep) -> list[tuple[ReplyAgent, float]]:
    """Return the replies of a step with the probabilities that they are right, where a gate knew them."""
    replies = [x for x in step.agents if x.status == "ok" and (x.text or "").strip() and x.finish_reason == "stop"]
    return [(agent, agent.right_probability) for agent in replies if agent.right_probability is not None]
