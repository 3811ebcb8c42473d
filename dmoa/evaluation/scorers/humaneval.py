"""HumanEval: pass@1 by execution, as the original harness does.

The code is the last fenced block that defines the entry point, else the last Python block, else the reply itself where
it looks like code; without code a reply is unscored. A whole function is put behind the prompt, which gives it the
prompt's imports and helpers; anything else is the function's body and completes the prompt. Then the row's test runs, and
`check(entry_point)`. The time limit is more generous than upstream's 3 s, so that a busy machine fails no correct program.
Source: Chen et al. 2021, `human_eval/execution.py`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from textwrap import dedent

from dmoa.evaluation.records import Label, Reply, Score
from dmoa.evaluation.scorers.entry import VALUE, ScorerEntry, chance_of, gold_of, unscored
from dmoa.evaluation.scorers.programs import MAX_CHARS, MAX_EXTRACTED_CHARS, bare_code, code_blocks, indented, judge, python_block
from dmoa.sandbox.launch import SandboxLimits

LIMITS = SandboxLimits(wall_s=10.0, cpu_s=10)
_BODY_INDENT = 4
_FUTURE = re.compile(r"^from __future__ import [^\n]*\n?", re.MULTILINE)


def read_completion(text: str, entry_point: str) -> str | None:
    """Return the code of a reply; None where it has none. Never raises."""
    text = text[:MAX_CHARS]
    defines = _definition(entry_point)
    defining = [code for _, code in code_blocks(text) if defines.search(code)]
    return defining[-1] if defining else python_block(text) or bare_code(text)


def program(prompt: str, completion: str, entry_point: str) -> str:
    """Return the program that a completion makes of the prompt."""
    prompt = prompt if prompt.endswith("\n") else prompt + "\n"
    whole = dedent(completion)
    if _definition(entry_point).search(whole):
        imports = "".join(match.group().rstrip() + "\n" for match in _FUTURE.finditer(whole))  # these must come first
        return f"{imports}{prompt}\n\n{_FUTURE.sub('', whole)}"
    return prompt + indented(completion, _BODY_INDENT)


def entry(*, allow_weak_sandbox: bool) -> ScorerEntry:
    """Return the scoring of HumanEval, whose gold has `prompt`, `test`, `entry_point` and `canonical_solution`."""

    def score(label: Label, reply: Reply) -> Score:
        prompt, test, entry_point = gold_of(label, "prompt", "test", "entry_point")
        completion = read_completion(reply.text, entry_point)
        if completion is None:
            return unscored("no code found")
        checker = f"{test}\n\ncheck({entry_point})\n"
        verdict = judge(program(prompt, completion, entry_point), checker, LIMITS, allow_weak=allow_weak_sandbox)
        if not verdict.is_judged:
            return unscored(verdict.reason)
        return Score(value=float(verdict.passed), extracted=completion[:MAX_EXTRACTED_CHARS], reason=verdict.reason)

    return ScorerEntry(
        score=score,
        gold_replies=_gold_replies,
        primary="pass@1",
        chance=lambda labels: chance_of([_key(label) for label in labels]),
        answer_key=_key,
        deviation=f"{LIMITS.wall_s:.0f} s a program in place of 3 s",
        runs_programs=True,
    )


def _definition(entry_point: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:async )?def[ \t]+{re.escape(entry_point)}[ \t]*\(", re.MULTILINE)


def _gold_replies(label: Label) -> dict[str, str]:
    prompt, solution = gold_of(label, "prompt", "canonical_solution")
    return {VALUE: f"```python\n{prompt}{solution}\n```"}


def _key(label: Label) -> Hashable:
    return gold_of(label, "prompt", "canonical_solution")
