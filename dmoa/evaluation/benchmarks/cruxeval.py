"""CRUXEval-O: predict what a Python function returns; scored by equality of Python literals, which are read and never run.

Label: `output`, a Python literal.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from dmoa.core.literals import literal_key, read_literal
from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.base import (
    VALUE,
    ScorerEntry,
    Text,
    UpstreamRow,
    benchmark,
    chance_of,
    divided,
    gold_of,
    unscored,
)
from dmoa.evaluation.records import Label, Reply, Score

_MAX_SHOWN = 200


def _literal(text: str) -> str:
    if literal_key(text) is None:
        raise ValueError("a Python literal such as [1, 'a']")
    return text


@benchmark("cruxeval_o", title="CRUXEval-O", scoring=lambda _: entry(), slices=divided("test"))
class CruxevalRow(UpstreamRow):
    """A row of `cruxeval-org/cruxeval`."""

    identifiers: ClassVar[dict[str, Any]] = {"id": True}
    id: str
    code: Text
    input: str
    output: Annotated[str, AfterValidator(_literal)]

    def text(self) -> str:
        task = (
            "Complete the assertion with the Python literal that the function returns, even if the function is wrong. "
            "End with a line `Answer: X`, X the literal."
        )
        return f"{task}\n\n```python\n{self.code.strip()}\nassert f({self.input}) == ??\n```"

    def gold(self) -> dict[str, Any]:
        return {"output": self.output}

    def family(self) -> str:
        """The function: upstream asks about some with several inputs."""
        return self.code


def entry() -> ScorerEntry:
    """Return the scoring of CRUXEval-O, whose gold has `output`."""
    return ScorerEntry(
        score=_score,
        gold_replies=lambda label: {VALUE: f"Answer: {gold_of(label, 'output')[0]}"},
        primary="accuracy (Python literal)",
        chance=lambda labels: chance_of([_gold(label) for label in labels]),
        answer_key=_gold,
        deviation="text without quotes that is no Python literal is a string; quotes of JSON do not count",
    )


def _gold(label: Label) -> str:
    (output,) = gold_of(label, "output")
    key = literal_key(str(output))
    if key is None:
        raise ConfigError(f"label {label.row_id}: gold output is {output!r}; a Python literal is needed")
    return key


def _score(label: Label, reply: Reply) -> Score:
    gold = _gold(label)
    said = read_literal(reply.text)
    if said.key is None:
        return unscored(said.reason)
    reason = f"{said.reason}: {said.key[:_MAX_SHOWN]}, right is {gold[:_MAX_SHOWN]}"
    return Score(value=float(said.key == gold), extracted=said.key[:_MAX_SHOWN], reason=reason)
