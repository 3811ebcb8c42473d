"""MMLU: four choices, 57 subjects.

Label: `letter`, `choices` (4 texts). Asked without examples and answered by a written letter; the original protocol is
5-shot and takes the likeliest next token among A-D.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from dmoa.evaluation.benchmarks.upstream import Text, UpstreamRow

LETTERS = "ABCDE"
LETTER_FORMAT = "End with a line `Answer: X`, X one letter."


class MmluRow(UpstreamRow):
    """A row of `cais/mmlu`."""

    question: Text
    subject: Text
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, le=3)]
    """Index of the right choice."""

    def text(self) -> str:
        """The subject in words, the question and the choices."""
        task = f"Answer the multiple-choice question about {self.subject.replace('_', ' ')}. {LETTER_FORMAT}"
        return f"{task}\n\nQuestion: {self.question.strip()}\n{render_choices(self.choices)}"

    def gold(self) -> dict[str, Any]:
        """The letter, and the texts it stands among."""
        return {"letter": LETTERS[self.answer], "choices": list(self.choices)}

    def group(self) -> str:
        """The subject."""
        return self.subject


def render_choices(choices: list[str]) -> str:
    """One line a choice: `A) text`."""
    return "\n".join(f"{letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False))
