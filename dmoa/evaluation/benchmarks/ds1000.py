"""DS-1000: complete a data-science program.

Label: `code_context` (upstream's own checks), `reference_code`, `library`, `prompt`, `problem_id`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from dmoa.evaluation.benchmarks.upstream import Text, UpstreamFields, UpstreamRow


class Metadata(UpstreamFields):
    """Where a problem comes from."""

    problem_id: int
    library_problem_id: int
    library: Text
    test_case_cnt: int
    perturbation_type: str
    perturbation_origin_id: int


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
