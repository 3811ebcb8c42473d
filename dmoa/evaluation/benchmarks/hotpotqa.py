"""HotpotQA in the distractor setting: a question over paragraphs, two of which matter.

Label: `answer`. Supporting facts are part of the row hash, never of the prompt.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from dmoa.evaluation.benchmarks.upstream import Text, UpstreamFields, UpstreamRow


class SupportingFacts(UpstreamFields):
    """Which sentences the answer rests on."""

    title: list[str]
    sent_id: list[int]


class Context(UpstreamFields):
    """The paragraphs, in upstream's order."""

    title: list[str]
    sentences: list[list[str]]

    @model_validator(mode="after")
    def _same_length(self) -> Context:
        if not self.title or len(self.title) != len(self.sentences):
            raise ValueError(f"as many paragraphs as titles, at least one; there are {len(self.sentences)} and {len(self.title)}")
        return self


class HotpotRow(UpstreamRow):
    """A row of `hotpotqa/hotpot_qa`, distractor."""

    identifiers: ClassVar[dict[str, Any]] = {"id": True}
    id: str
    question: Text
    answer: Text
    type: str
    level: str
    supporting_facts: SupportingFacts
    context: Context

    def text(self) -> str:
        """The paragraphs under their titles, then the question."""
        task = "Answer the question from the paragraphs. End with a line `Answer: ...`, a few words or yes or no."
        paragraphs = [
            f"Title: {title.strip()}\n{' '.join(sentence.strip() for sentence in sentences)}"
            for title, sentences in zip(self.context.title, self.context.sentences, strict=True)
        ]
        return "\n\n".join([task, *paragraphs, f"Question: {self.question.strip()}"])

    def gold(self) -> dict[str, Any]:
        """The answer."""
        return {"answer": self.answer}

    def group(self) -> str:
        """Bridge or comparison."""
        return self.type
