"""What an evaluation is asked to do: the options of `dmoa evaluate` and of the `job:` section of `jobs/evaluate.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dmoa.config import Name
from dmoa.errors import ConfigError
from dmoa.evaluation.records import FineSplit, Split
from dmoa.types import Limits
from dmoa.validation import describe


def _names(value: object) -> object:
    """Accept `a,b` where a list of names is expected; a name counts once."""
    names = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    return tuple(dict.fromkeys(names)) if isinstance(names, list) and all(isinstance(name, str) for name in names) else names


def _gates(value: object) -> object:
    """Accept `a=DIR,b=DIR` where a mapping of names to folders is expected."""
    if not isinstance(value, str):
        return value
    return dict(part.strip().partition("=")[::2] for part in value.split(",") if part.strip())


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Gates = Annotated[dict[Name, Path], BeforeValidator(_gates)]
CPU_BUDGET = {"max_steps": 3, "max_agents": 2, "max_tokens": 96}
"""`--budget cpu`: what two cores can pay for."""


class EvaluateOptions(BaseModel):
    """One evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    benchmarks: Names = Field(min_length=1)
    """Benchmarks and suites; `all` is the nine public benchmarks, `suites` the generated ones."""
    policies: Names = Field(default=("dmoa", "single"), min_length=1)
    """Policies; `single:NAME` is one agent of the pool, `dmoa:NAME` one of `gates`."""
    gates: Gates = Field(default={}, max_length=50)
    """Checkpoints to compare in one run, beside the pool's own: name -> folder."""
    data_dir: Path | None = None
    """Folder of benchmark files; None: the Hugging Face hub."""
    split: Split | FineSplit = "test"
    """Suites have more than the three that every benchmark has; test is opened last, and once."""
    limit: int | None = Field(default=None, ge=1)
    """A seeded sample of this many rows per benchmark; None: every row of a file, 200 of a suite."""
    seed: int = Field(default=0, ge=0)
    """Seed of the samples, the suites and the sampling of replies."""
    difficulty: int = Field(default=1, ge=1)
    """Of the suites; what it means is each suite's own."""
    budget: Literal["pool", "cpu"] = "pool"
    """cpu: at most 3 steps, 2 agents a step and 96 new tokens a reply; pool: the pool's own limits."""
    out: Path | None = None
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in `out`."""
    retry_failed: bool = False
    """With `resume`: run failed rows again."""
    skip_bad_rows: bool = False
    allow_weak_sandbox: bool = False
    call_cache: Path | None = None
    """Folder in which greedy agent calls are kept and found again."""
    url: str | None = None
    """A running server to evaluate instead of a swarm in this process's Ray."""
    address: str | None = None
    """A Ray cluster to run on; None: RAY_ADDRESS, else a Ray of its own."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Answering actors, each with the pool's engines."""
    concurrency: int | None = Field(default=None, ge=1, le=65536)
    """Agent calls that may be under way in one worker; None: enough to keep the pool's engines full."""
    track: Literal["auto", "wandb", "jsonl", "none"] = "auto"
    """Where tables are logged; auto: W&B, offline without a key."""

    @model_validator(mode="after")
    def _retry_needs_resume(self) -> Self:
        if self.retry_failed and not self.resume:
            raise ValueError("retry_failed has no effect without resume; add --resume or leave it out")
        if self.resume and self.out is None:
            raise ValueError("resume needs out, the folder of the run to go on with; add --out DIR")
        if self.url is not None and self.call_cache is not None:
            raise ValueError("call_cache has no effect with url: the server calls its own agents; leave one out")
        if self.url is not None and self.gates:
            raise ValueError("gates have no effect with url: the server has its own; leave one out")
        return self

    def limits(self, pool: Limits) -> Limits:
        """Return a query's limits: the pool's, lowered by the budget."""
        if self.budget == "pool":
            return pool
        return Limits(
            max_steps=min(pool.max_steps, CPU_BUDGET["max_steps"]),
            max_agents=min(pool.max_agents or CPU_BUDGET["max_agents"], CPU_BUDGET["max_agents"]),
            budget_tokens=pool.budget_tokens,
            deadline_s=pool.deadline_s,
            max_tokens=CPU_BUDGET["max_tokens"],
        )


def parse_options(values: dict[str, Any]) -> EvaluateOptions:
    """Build the options from plain values. Raises ConfigError naming field, value seen and what is allowed."""
    try:
        return EvaluateOptions.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"evaluate: {describe(error, EvaluateOptions)}") from error
