"""How the replicas of an agent are scaled, and what a query does with one that has none. Part of the configuration tree.

`serving.scaling` says it in Ray Serve's terms; `asking` acts on `cold`.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dmoa.engine_options import Node
from dmoa.types import ColdPolicy


class AutoscalingConfig(Node):
    """How many replicas an agent (dedicated) or an LLM's host (shared) runs on."""

    min_replicas: int = Field(default=1, ge=0, le=1024)
    """0: while nobody asks it, it has no replica and holds no GPU; it is then cold, see `cold`."""
    max_replicas: int = Field(default=1, ge=1, le=1024)
    target_ongoing_requests: float = Field(default=8.0, gt=0)
    """Calls in flight per replica that autoscaling aims at."""
    upscale_delay_s: float = Field(default=5.0, ge=0, le=86400)
    """How long the load must be above target before replicas are added; the first replica of a cold one starts at once."""
    downscale_delay_s: float = Field(default=300.0, ge=0, le=86400)
    """How long the load must be below target before replicas are taken away, all but the last."""
    downscale_to_zero_delay_s: float = Field(default=900.0, ge=0, le=86400)
    """How long nobody may have asked before the last replica goes; only with min_replicas 0."""
    max_queued_calls: int | None = Field(default=None, ge=1, le=1_000_000)
    """Calls that may wait for room in each replica beyond its batch, and as many in each ingress, before the agent counts as
    overloaded and the next-ranked one takes its place; None: three batches in a replica, sixteen in an ingress."""
    cold: ColdPolicy = "wait"
    """What a query does with an agent without a replica. wait: it waits for one. skip: the next-ranked agent takes its place,
    and a replica is started for later queries. warm_on_rank: a replica is started as soon as the agent is among the K most
    probable ones of a decision, chosen or not; a query that chose it waits. Only with min_replicas 0."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, below min_replicas {self.min_replicas}; raise it or lower the minimum"
            )
        return self

    @model_validator(mode="after")
    def _can_be_cold(self) -> Self:
        if self.cold != "wait" and self.min_replicas > 0:
            raise ValueError(
                f"cold: value seen: {self.cold!r}; with min_replicas {self.min_replicas} there is always a replica; "
                "set min_replicas to 0, or leave cold out"
            )
        return self
