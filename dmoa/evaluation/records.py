"""Records of evaluation: what is asked, what is right, what was answered, and how it scored.

A row of a benchmark falls apart into a `Task`, which agents see, and a `Label`, which only scorers see; the two are
written to different folders. `Answered` says what a policy did with a task, `Scored` whether it was right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from dmoa.types import Stage

Split = Literal["train", "adaptation", "test"]
SPLITS: tuple[Split, ...] = ("train", "adaptation", "test")
FineSplit = Literal["specialist", "anchor", "gate", "validation"]
"""Splits that generated suites have beside `adaptation` and `test`."""


class FileRecord(BaseModel):
    """Base of the records that are lines of files: frozen, unknown keys refused, fields documented in place."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Task(FileRecord):
    """What is asked; carries nothing that gives the answer away."""

    row_id: str
    """`benchmark/split/hash`: names the row in every file; the hash covers the whole normalised row."""
    benchmark: str
    text: str
    """The query: task description, answer format and question."""
    group: str = ""
    """What tables break results down by: subject, library, template; empty where there is none."""
    stages: tuple[Stage, ...] = ()
    """Set where the task runs exactly these steps (`chain`, `relay`); empty: as many as the policy wants."""


class Label(FileRecord):
    """What is right; opened by evaluation alone."""

    row_id: str
    benchmark: str
    gold: dict[str, Any]
    """Plain JSON values; the keys are the benchmark's own and are documented where its rows are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a benchmark."""

    task: Task
    label: Label
    row_hash: str
    """SHA-256 hex of the whole normalised row: equal rows are equal, wherever they come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a scorer reads of an answer."""

    text: str
    """The final answer; empty where there was none."""
    step_texts: tuple[str, ...] = ()
    """The summary after every step, in order; `relay` scores them one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one answer was judged."""

    value: float
    """0..1; what accuracy is the mean of. 0.0 where `is_scored` is false."""
    extracted: str | None = None
    """The answer as the scorer read it; None where it found none."""
    reason: str = ""
    """One short sentence: why this value, or why it could not be scored."""
    is_scored: bool = True
    """False: the reply held no answer, or the checker itself failed; counted beside wrong ones, as *unscored*."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Secondary measures, such as `f1`; every scored or unscored row of a benchmark has the same keys."""


Scorer = Callable[[Label, Reply], Score]
"""Judges a reply. Never raises, whatever the reply says; raises only for a label that is not its benchmark's."""


class Answered(FileRecord):
    """What one policy did with one task: a line of `answers/`."""

    row_id: str
    benchmark: str
    policy: str
    group: str = ""
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    """Why there is no answer; None where there is one."""
    text: str = ""
    step_texts: tuple[str, ...] = ()
    """The summary after every step."""
    stop_reason: str = ""
    finish_reason: str = ""
    degraded: bool = False
    active: tuple[tuple[str, ...], ...] = ()
    """Per step, the agents whose contributions counted."""
    prompt_tokens: int = 0
    """All agents and the summarizer, as in the other counts."""
    cached_tokens: int = 0
    """Part of prompt_tokens that an engine did not compute again."""
    completion_tokens: int = 0
    summarizer_tokens: int = 0
    """Part of prompt_tokens and completion_tokens that the summarizer took."""
    memoised_tokens: int = 0
    """Part of prompt_tokens and completion_tokens that came from the call cache: counted as if run."""
    entropy_nats: float | None = None
    """Mean over the active agents of the last step, nats per token."""
    wall_ms: float = 0.0
    gate_version: str | None = None


class Scored(FileRecord):
    """How one policy's answer to one task was judged: a line of `labels/scores/`."""

    row_id: str
    benchmark: str
    policy: str
    group: str = ""
    value: float
    extracted: str | None = None
    reason: str = ""
    is_scored: bool = True
    is_failed: bool = False
    """The query itself failed: no answer to judge; value is 0."""
    metrics: dict[str, float] = {}
