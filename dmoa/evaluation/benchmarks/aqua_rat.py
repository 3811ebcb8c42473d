"""AQuA-RAT: five choices, algebra with worked rationales.

Label: `letter`, `choices` (5 texts without the leading `C)`). The rationale is part of the row hash, never of the prompt.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from dmoa.evaluation.benchmarks.mmlu import LETTER_FORMAT, LETTERS, render_choices
from dmoa.evaluation.benchmarks.upstream import Text, UpstreamRow


def _check_options(options: list[str]) -> list[str]:
    if len(options) != len(LETTERS):
        raise ValueError(f"five options, not {len(options)}")
    for letter, option in zip(LETTERS, options, strict=True):
        if not option.startswith(f"{letter})"):
            raise ValueError(f"options that begin with A) to E) in order; the one for {letter} is {option!r:.60}")
    return options


class AquaRow(UpstreamRow):
    """A row of `deepmind/aqua_rat`, raw."""

    question: Text
    options: Annotated[list[str], AfterValidator(_check_options)]
    rationale: str
    correct: Literal["A", "B", "C", "D", "E"]

    def choices(self) -> list[str]:
        """The options without their letters."""
        return [re.sub(r"^[A-E]\)\s*", "", option) for option in self.options]

    def text(self) -> str:
        """The question and the options."""
        task = f"Answer the multiple-choice algebra question. {LETTER_FORMAT}"
        return f"{task}\n\nQuestion: {self.question.strip()}\n{render_choices(self.choices())}"

    def gold(self) -> dict[str, Any]:
        """The letter, and the texts it stands among."""
        return {"letter": self.correct, "choices": self.choices()}
