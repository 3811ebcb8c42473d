"""HumanEval: complete a Python function; scored by running upstream's tests in the sandbox.

Label: `prompt`, `test`, `entry_point`, `canonical_solution`, as upstream has them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Hashable
from textwrap import dedent
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from dmoa.core.reasoning import split_reasoning
from dmoa.evaluation.benchmarks.base import (
    FROM_TEST,
    VALUE,
    HubSource,
    ScorerEntry,
    Text,
    UpstreamRow,
    benchmark,
    chance_of,
    gold_of,
    unscored,
)
from dmoa.evaluation.benchmarks.programs import (
    MAX_CHARS,
    MAX_EXTRACTED_CHARS,
    bare_code,
    indented,
    judge_program,
    program_blocks,
    python_block,
    with_helpers,
)
from dmoa.evaluation.records import Label, Reply, Score
from dmoa.sandbox.launch import SandboxLimits


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise ValueError("the name of a Python function")
    return name


@benchmark(
    "humaneval",
    title="HumanEval",
    scoring=lambda allow_weak: entry(allow_weak_sandbox=allow_weak),
    hub=HubSource(dataset="openai/openai_humaneval", revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", slices=FROM_TEST),
)
class HumanEvalRow(UpstreamRow):
    """A row of `openai/openai_humaneval`."""

    identifiers: ClassVar[dict[str, Any]] = {"task_id": True}
    task_id: str
    prompt: Text
    canonical_solution: str
    test: Text
    entry_point: Annotated[str, AfterValidator(_identifier)]

    def text(self) -> str:
        task = "Complete the Python function. Reply with one Python code block that holds the whole function."
        return f"{task}\n\n```python\n{self.prompt.strip()}\n```"

    def gold(self) -> dict[str, Any]:
        return self.model_dump(include={"prompt", "test", "entry_point", "canonical_solution"})


LIMITS = SandboxLimits(wall_s=10.0, cpu_s=10, output_bytes=4 << 20)  # what a right program prints is no fault
_BODY_INDENT = 4
_FUTURE = re.compile(r"^from __future__ import [^\n]*\n?", re.MULTILINE)


def read_completion(text: str, entry_point: str) -> str | None:
    """Return the code of a reply; None where it has none. Never raises."""
    text = split_reasoning(text).text[:MAX_CHARS]
    defines = _definition(entry_point)
    blocks = program_blocks(text)
    defining = [code for _, code in blocks if defines.search(code)]
    return with_helpers(blocks, defining[-1]) if defining else python_block(text) or bare_code(text)


def program(prompt: str, completion: str, entry_point: str) -> str:
    """Return the program that a completion makes of the prompt."""
    prompt = prompt if prompt.endswith("\n") else prompt + "\n"
    whole = dedent(completion)
    if _definition(entry_point).search(whole):
        imports = "".join(match.group().rstrip() + "\n" for match in _FUTURE.finditer(whole))  # these must come first
        return f"{imports}{prompt}\n\n{_FUTURE.sub('', whole)}"
    return prompt + indented(completion, _BODY_INDENT)


def helpers(prompt: str, entry_point: str) -> str:
    """Return what the prompt brings beside the function to write: the tests call it, and a completion must not replace it."""
    try:
        tree = ast.parse(prompt)
    except SyntaxError:
        return ""
    kept = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)]
    return ast.unparse(ast.Module(body=kept, type_ignores=[]))


def entry(*, allow_weak_sandbox: bool) -> ScorerEntry:
    """Return the scoring of HumanEval, whose gold has `prompt`, `test`, `entry_point` and `canonical_solution`."""

    def score(label: Label, reply: Reply) -> Score:
        prompt, test, entry_point = gold_of(label, "prompt", "test", "entry_point")
        completion = read_completion(reply.text, entry_point)
        if completion is None:
            return unscored("no code found")
        checker = f"{helpers(prompt, entry_point)}\n{test}\n\ncheck({entry_point})\n"
        verdict = judge_program(program(prompt, completion, entry_point), checker, LIMITS, allow_weak=allow_weak_sandbox)
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
