"""What a collection is asked to do: the options of `dmoa rollouts` and of the `job:` section of `jobs/collect_rollouts.yaml`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dmoa.errors import ConfigError
from dmoa.types import Limits
from dmoa.validation import describe

_SAMPLE = ("benchmarks", "queries", "data_dir", "split", "limit", "difficulty", "max_steps", "max_tokens", "skip_bad_rows")
"""Options that say what is asked, and how: a collection that goes on must have the same."""


class Weighted(BaseModel):
    """A source of queries and its weight."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    """Its share of `limit`, beside the other sources' weights."""


def _weighted(value: object) -> object:
    """Accept `a:2,b` or a list of `a:2`, where sources with weights are expected."""
    parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    return tuple(_one(part) if isinstance(part, str) else part for part in parts) if isinstance(parts, list | tuple) else parts


def _one(text: str) -> dict[str, Any]:
    """Read `NAME` or `NAME:WEIGHT`; a colon that no number follows is part of the name."""
    name, colon, weight = text.rpartition(":")
    try:
        return {"name": name.strip(), "weight": float(weight)} if colon else {"name": text}
    except ValueError:
        return {"name": text}


Sources = Annotated[tuple[Weighted, ...], BeforeValidator(_weighted)]


class RolloutOptions(BaseModel):
    """One collection of rollouts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    benchmarks: Sources = ()
    """Benchmarks and suites, each NAME or NAME:WEIGHT; `all` is the nine public benchmarks, `suites` the generated ones."""
    queries: Sources = ()
    """Files of the user's own queries, each FILE or FILE:WEIGHT: a line is a text, or {"query": TEXT}; no labels needed."""
    out: Path
    """Folder of the collection. The same folder goes on with the collection in it."""
    data_dir: Path | None = None
    """Folder of benchmark files; None: the Hugging Face hub."""
    split: str = "train"
    """train, adaptation or test; suites have more: specialist, anchor, gate (what `train` means there), validation."""
    difficulty: int = Field(default=1, ge=1)
    """Of the suites; what it means is each suite's own."""
    limit: int | None = Field(default=None, ge=1)
    """Queries in all, shared out by weight; None: all rows of a file, 200 of a suite."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the samples, the suites, the sampling of replies and the exploration."""
    dense: bool = False
    """All agents run in every step; this is also what happens without `epsilon`."""
    epsilon: float | None = Field(default=None, gt=0, le=1)
    """Probability with which a step asks one agent beside the active ones; None: dense."""
    round: int = Field(default=0, ge=0)
    """Number of the on-policy round, for the record."""
    labels: Path | None = None
    """Folder for the labels of benchmark rows, apart from `out`; None: they are not kept."""
    max_steps: int | None = Field(default=None, ge=1)
    """Most steps of a query; None: as many as the pool allows."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most new tokens of a reply; None: as many as each agent's sampling says."""
    skip_bad_rows: bool = False
    call_cache: Path | None = None
    """Folder in which greedy agent calls are kept and found again."""
    address: str | None = None
    """A Ray cluster to run on; None: RAY_ADDRESS, else a Ray of its own."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Answering actors, each with the pool's engines."""
    concurrency: int | None = Field(default=None, ge=1, le=65536)
    """Agent calls that may be under way in one worker; None: enough to keep the pool's engines full."""
    track: Literal["auto", "wandb", "jsonl", "none"] = "auto"
    """Where the collection is logged; auto: W&B, offline without a key."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if not self.benchmarks and not self.queries:
            raise ValueError("benchmarks, queries: both are empty; name benchmarks, or a file of queries")
        if self.dense and self.epsilon is not None:
            raise ValueError(f"epsilon is {self.epsilon}, and dense is set, which explores everyone; leave one of them out")
        weights = {source.weight for source in (*self.benchmarks, *self.queries)}
        if self.limit is None and len(weights) > 1:
            raise ValueError("weights share out limit, which is not given; add --limit N, or leave the weights out")
        if self.labels is not None and _is_inside(self.labels, self.out):
            raise ValueError(f"labels: value seen: {str(self.labels)!r}, inside out; training reads out: name a folder apart")
        return self

    def limits(self, pool: Limits) -> Limits:
        """Return a query's limits: the pool's, lowered by these options.

        Nobody waits for these answers, so there is no deadline; the pool's token budget is the exploring policy's to keep.
        """
        return Limits(
            max_steps=min(pool.max_steps, self.max_steps or pool.max_steps),
            max_agents=pool.max_agents,
            max_tokens=self.max_tokens or pool.max_tokens,
        )

    def sample(self) -> dict[str, Any]:
        """Return the options that say what is asked, as plain values."""
        tree = self.model_dump(mode="json", include=set(_SAMPLE))
        for name in ("benchmarks", "queries"):
            tree[name] = [f"{source['name']}:{source['weight']:g}" for source in tree[name]]
        return tree


def parse_options(values: dict[str, Any]) -> RolloutOptions:
    """Build the options from plain values. Raises ConfigError naming field, value seen and what is allowed."""
    try:
        return RolloutOptions.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"rollouts: {describe(error, RolloutOptions)}") from error


def _is_inside(folder: Path, other: Path) -> bool:
    return folder.absolute() == other.absolute() or other.absolute() in folder.absolute().parents


def share_out(limit: int, weights: list[float], available: list[int | None]) -> list[int]:
    """Share `limit` queries out by weight; what a source cannot give, the others do. None: a source without end.

    Quotas are rounded to the largest remainders, so that they add up to `limit`, or to all there is.
    """
    quotas = [0] * len(weights)
    open_: set[int] = set(range(len(weights)))
    left = limit
    while open_ and left > 0:
        total = math.fsum(weights[i] for i in open_)
        wished = {i: left * weights[i] / total for i in open_}
        full = {i for i in open_ if (room := available[i]) is not None and room <= wished[i]}
        if not full:
            floors = {i: math.floor(wish) for i, wish in wished.items()}
            by_remainder = sorted(open_, key=lambda i: (floors[i] - wished[i], i))
            for i in by_remainder[: left - sum(floors.values())]:
                floors[i] += 1
            for i, floor in floors.items():
                quotas[i] = floor
            return quotas
        for i in full:
            quotas[i] = available[i] or 0
            left -= quotas[i]
        open_ -= full
    return quotas
