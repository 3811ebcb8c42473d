"""What a run was: everything needed to repeat it, kept as `run.json` and as `config` of its result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dmoa.evaluation.records import FineSplit, Split
from dmoa.provenance import Machine
from dmoa.validation import redact, redact_text


class ResultRecord(BaseModel):
    """Base of the records of a result: frozen, unknown keys refused, fields documented in place."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BenchmarkInfo(ResultRecord):
    """One benchmark of a run: where its rows came from, and how its scores are to be read."""

    name: str
    title: str = ""
    """What tables call it; empty: the name."""
    is_generated: bool = False
    """Whether a generator made the rows; every table says so."""
    deviation: str = ""
    """How the scoring differs from the benchmark's original protocol; empty where it does not. Every table says so."""
    primary: str = "accuracy"
    """What accuracy means here, such as `exact match`."""
    chance: float | None = None
    """Accuracy of guessing, 0..1; None where unknown."""
    sources: dict[str, str] = {}
    """File -> SHA-256, or hub data set -> revision, or generator -> its parameters."""
    rows: int = Field(ge=0)
    """Rows that each policy is asked."""
    bad_rows: int = 0
    """Rows left out because they do not parse (`--skip-bad-rows`)."""
    duplicates: int = 0
    """Rows left out because an equal row of the same split came before."""
    dropped: int = 0
    """Rows taken out of the training side because another split has them."""


class PoolInfo(ResultRecord):
    """The agents of a run."""

    name: str
    fingerprint: str
    """SHA-256 of what makes the agents answer as they do; empty where it is not known, as behind a URL."""
    config: dict[str, Any]
    """The resolved configuration tree; secrets are taken out when this record is made."""

    @field_validator("config")
    @classmethod
    def _without_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        return dict(redact(value))


_ANSWERING = ("agents", "summarizer", "gate", "tools", "llms")
"""Parts of a pool's configuration that replies depend on."""
_NOT_COMPARED = ("autoscaling", "placement", "max_num_seqs", "gpus", "threads", "tags", "model", "adapter", "checkpoint")
"""Fields of theirs that say how much runs side by side and where, or whose content fingerprint and gate version stand for."""


def pool_differences(before: PoolInfo, now: PoolInfo) -> dict[str, tuple[Any, Any]]:
    """Return the settings that replies depend on and in which two pools differ: dotted name -> (before, now).

    Sees what the fingerprint leaves out, such as max_tokens and dtype; what scripted agents do is not compared.
    """
    old, new = _settings(before), _settings(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {name: (old.get(name), new.get(name)) for name in names}


def _settings(pool: PoolInfo) -> dict[str, Any]:
    tree = {name: pool.config[name] for name in _ANSWERING if name in pool.config}
    if "llms" in tree:
        tree["llms"] = {name: llm for name, llm in tree["llms"].items() if llm.get("engine") != "scripted"}
    return dict(_flat(tree, ""))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in entries:
            if key not in _NOT_COMPARED:
                yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


class RunInfo(ResultRecord):
    """Everything needed to repeat a run: `run.json`, and `config` of the result."""

    schema_version: Literal[1] = 1
    command: str = ""
    """The command line that repeats the run; secrets are taken out."""
    options: dict[str, Any] = {}
    """The options of the run as plain values; secrets are taken out."""
    dmoa_version: str
    code_revision: str = ""
    """Commit of the code, `+changes` where files differ from it; empty outside a checkout."""
    later_revisions: list[str] = []
    """Other code that the run went on with, in order."""
    pool: PoolInfo
    benchmarks: list[BenchmarkInfo]
    policies: list[str]
    derived: list[str] = []
    """Policies whose lines were worked out from those of the others, such as `oracle`; nobody was asked for them."""
    split: Split | FineSplit = "test"
    limit: int | None = None
    """Rows asked for per benchmark, a seeded sample; None: all."""
    seed: int
    """Seed of samples, suites and replies."""
    limits: dict[str, Any] = {}
    """Budgets of a query, such as max_steps, max_agents, budget_tokens, deadline_s."""
    gate_version: str | None = None
    """Gate that the run began with; None for policies without one."""
    gates: dict[str, str] = {}
    """Version of each gate of the policies `dmoa:NAME`, by name."""
    engines: list[str] = []
    """Engines and their options that may change numbers, such as `transformers/float32`."""
    isolation: str = ""
    """How programs were contained while they were scored; empty where none ran."""
    machine: Machine
    versions: dict[str, str] = {}
    """Package -> version, beyond those of `machine`."""
    started_unix_s: float
    ended_unix_s: float | None = None
    """End of the last session; None while none has ended."""

    @property
    def all_policies(self) -> list[str]:
        """The policies that were run, and the derived ones."""
        return [*self.policies, *self.derived]

    @field_validator("options", "limits")
    @classmethod
    def _without_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        return dict(redact(value))

    @field_validator("command")
    @classmethod
    def _command_without_secrets(cls, value: str) -> str:
        return redact_text(value)
