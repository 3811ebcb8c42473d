"""DS-1000: complete a data-science program; scored by running upstream's own checks in the sandbox.

Label: `code_context` (upstream's checks), `reference_code`, `library`, `prompt`, `problem_id`.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, ClassVar

from dmoa.core.reasoning import split_reasoning
from dmoa.evaluation.benchmarks.base import (
    FROM_TEST,
    VALUE,
    HubSource,
    ScorerEntry,
    Text,
    UpstreamFields,
    UpstreamRow,
    benchmark,
    chance_of,
    gold_of,
    unscored,
)
from dmoa.evaluation.benchmarks.programs import (
    MAX_CHARS,
    MAX_EXTRACTED_CHARS,
    Verdict,
    bare_code,
    indented,
    judge_program,
    python_block,
)
from dmoa.evaluation.records import Label, Reply, Score
from dmoa.sandbox.launch import SandboxLimits


class Metadata(UpstreamFields):
    """Where a problem comes from."""

    problem_id: int
    library_problem_id: int
    library: Text
    test_case_cnt: int
    perturbation_type: str
    perturbation_origin_id: int


@benchmark(
    "ds1000",
    title="DS-1000",
    scoring=lambda allow_weak: entry(allow_weak_sandbox=allow_weak),
    hub=HubSource(dataset="xlangai/DS-1000", revision="4416080ac5cb80bdf7576aefb8f9a0b4d5426a44", slices=FROM_TEST),
)
class Ds1000Row(UpstreamRow):
    """A row of `xlangai/DS-1000`, the simplified release."""

    identifiers: ClassVar[dict[str, Any]] = {
        "metadata": {"problem_id": True, "library_problem_id": True, "perturbation_origin_id": True}
    }
    prompt: Text
    reference_code: str
    metadata: Metadata
    code_context: Text

    def text(self) -> str:
        """The upstream prompt, unchanged, after one sentence of task and one of format."""
        task = (
            "Complete the Python program where its solution begins. "
            "Reply with one Python code block: only the code that completes the program."
        )
        return f"{task}\n\n{self.prompt}"

    def gold(self) -> dict[str, Any]:
        """What the original harness executes."""
        return {
            "code_context": self.code_context,
            "reference_code": self.reference_code,
            "library": self.metadata.library,
            "prompt": self.prompt,
            "problem_id": self.metadata.problem_id,
        }

    def group(self) -> str:
        """The library."""
        return self.metadata.library

    def family(self) -> str:
        """The problem that this one is a variation of."""
        return f"{self.metadata.library}/{self.metadata.perturbation_origin_id}"


LIMITS = SandboxLimits(wall_s=60.0, cpu_s=60, memory_bytes=4 << 30)
_PACKAGES = {
    "Pandas": "pandas",
    "Numpy": "numpy",
    "Matplotlib": "matplotlib",
    "Sklearn": "scikit-learn",
    "Scipy": "scipy",
    "Pytorch": "torch",
    "Tensorflow": "tensorflow",
}
_CODE_TAG = re.compile(r"<code>(.*?)(?:</code>|\Z)", re.DOTALL)
_BEGIN = re.compile(r"^[ \t]*+#*+[ \t]*+(?:BEGIN SOLUTION|SOLUTION START)[ \t]*+\n", re.MULTILINE)
_END = re.compile(r"^[ \t]*+#*+[ \t]*+(?:END SOLUTION|SOLUTION END)\b.*|</code>.*", re.MULTILINE | re.DOTALL)


@dataclass(slots=True)
class References:
    """What came of the reference solutions, in this process; safe from any thread."""

    max_verdicts: int = 2_000
    """The oldest beyond them is forgotten."""
    verdicts: OrderedDict[tuple[str, str], Verdict] = field(default_factory=OrderedDict)
    """By code context and reference."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def judge(self, context: str, reference: str, *, allow_weak: bool) -> Verdict:
        """Return how a reference does, from memory where it has run before; raises as `judge_program`."""
        key = (context, reference)
        with self._lock:
            known = self.verdicts.get(key)
        if known is None:
            known = _judge(context, reference, allow_weak=allow_weak)
            if known.is_judged:
                with self._lock:
                    self.verdicts[key] = known
                    if len(self.verdicts) > self.max_verdicts:
                        self.verdicts.popitem(last=False)
        return known


def read_solution(text: str, prompt: str) -> str | None:
    """Return the code of a reply, indented as the end of the prompt is; None where it has none. Never raises."""
    text = split_reasoning(text).text[:MAX_CHARS]
    code = python_block(text)
    if code is None:
        tagged = _CODE_TAG.findall(text)
        begun = _BEGIN.split(text)
        code = tagged[-1] if tagged else begun[-1] if len(begun) > 1 else bare_code(text)
        code = _END.sub("", code) if code is not None else None
    if code is None or not code.strip():
        return None
    last_line = prompt.rstrip().rpartition("\n")[2]
    width = len(last_line) - len(last_line.lstrip(" "))
    return indented(code, width) if width else code


@cache
def library_version(library: str) -> str | None:
    """Return the installed version of a row's library; None where it is not installed."""
    try:
        return metadata.version(_PACKAGES.get(library, library.lower()))
    except metadata.PackageNotFoundError:
        return None


def entry(*, allow_weak_sandbox: bool) -> ScorerEntry:
    """Return the scoring of DS-1000, whose gold has `code_context`, `reference_code`, `library` and `prompt`."""
    references = References()

    def score(label: Label, reply: Reply) -> Score:
        context, reference, library, prompt = gold_of(label, "code_context", "reference_code", "library", "prompt")
        version = library_version(library)
        if version is None:
            return unscored(f"no library {library}: its rows cannot be judged", is_left_out=True)
        # Asked for every reply: did only a wrong one ask, such rows would count where a reply happens to pass.
        right = read_solution(_in_block(reference), prompt) or reference
        known = references.judge(context, right, allow_weak=allow_weak_sandbox)
        if not known.is_judged:
            return unscored(known.reason)
        if not known.passed:
            return unscored(f"the reference fails with {library} {version}: {known.reason}", is_left_out=True)
        solution = read_solution(reply.text, prompt)
        if solution is None:
            return unscored("no code found")
        verdict = known if solution == right else _judge(context, solution, allow_weak=allow_weak_sandbox)
        if not verdict.is_judged:
            return unscored(verdict.reason)
        return Score(value=float(verdict.passed), extracted=solution[:MAX_EXTRACTED_CHARS], reason=verdict.reason)

    return ScorerEntry(
        score=score,
        gold_replies=lambda label: {VALUE: _in_block(gold_of(label, "reference_code")[0])},
        primary="pass@1",
        chance=lambda labels: chance_of([_key(label) for label in labels]),
        answer_key=_key,
        deviation=f"installed library versions in place of the pinned ones; {LIMITS.wall_s:.0f} s a problem in place of 120 s",
        runs_programs=True,
    )


def _in_block(code: str) -> str:
    return f"```python\n{code}\n```"


def _judge(context: str, solution: str, *, allow_weak: bool) -> Verdict:
    checks = f"test_execution({solution!r})\n"
    if "def test_string(" in context:
        checks += f"test_string({solution!r})\n"
    return judge_program("", f"{context}\n\n{checks}", LIMITS, allow_weak=allow_weak)


def _key(label: Label) -> Hashable:
    return gold_of(label, "reference_code")
