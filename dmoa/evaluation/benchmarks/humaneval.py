"""HumanEval: complete a Python function.

Label: `prompt`, `test`, `entry_point`, `canonical_solution`, as upstream has them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from dmoa.evaluation.benchmarks.upstream import Text, UpstreamRow


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise ValueError("the name of a Python function")
    return name


class HumanEvalRow(UpstreamRow):
    """A row of `openai/openai_humaneval`."""

    identifiers: ClassVar[dict[str, Any]] = {"task_id": True}
    task_id: str
    prompt: Text
    canonical_solution: str
    test: Text
    entry_point: Annotated[str, AfterValidator(_identifier)]

    def text(self) -> str:
        """The signature and docstring, in a code block."""
        task = "Complete the Python function. Reply with one Python code block that holds the whole function."
        return f"{task}\n\n```python\n{self.prompt.strip()}\n```"

    def gold(self) -> dict[str, Any]:
        """What the original harness puts together."""
        return self.model_dump(include={"prompt", "test", "entry_point", "canonical_solution"})
