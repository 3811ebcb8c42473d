"""How evaluation and rollouts reach a swarm: a pool loaded where the answering runs, or (evaluation) a running server.

What opens them pickles, because the answering runs in another process; see `evaluation.answering`, `training.rollout_stage`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dmoa.cli.local import build_local_backend
from dmoa.config import Config
from dmoa.evaluation.answering import SwarmOutcome, ask_swarm
from dmoa.trace import ReplyDmoa
from dmoa.types import Message, Query

if TYPE_CHECKING:
    from dmoa.cli.local import LocalBackend
    from dmoa.serving.client import SwarmClient
    from dmoa.training.collect import SwarmCollector


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPool:
    """Loads a pool's gate, encoder and engines in the process that calls it."""

    config_json: str
    call_cache: Path | None = None
    gates: Mapping[str, Path] = field(default_factory=dict)
    """Checkpoints beside the pool's own, by the NAME of `dmoa:NAME`."""

    def __call__(self) -> PoolAnswerer:
        """Return the swarm; blocks while models load. Raises ConfigError, CheckpointError, ModelFetchError."""
        config = Config.model_validate_json(self.config_json)
        return PoolAnswerer(build_local_backend(config, lambda text: None, self.call_cache, self.gates))


class PoolAnswerer:
    """A pool in this process."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend

    async def answer(self, query: Query, policy: str, agent: str | None) -> SwarmOutcome:
        """Answer one query. Raises DmoaError."""
        return await ask_swarm(self._backend.swarm, query, policy, agent)

    async def close(self) -> None:
        """Stop the engines."""
        await self._backend.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCollectingPool:
    """Loads a pool as `OpenPool` does, to be asked with exploration."""

    config_json: str
    epsilon: float | None
    """As in `ExploringPolicy`."""
    call_cache: Path | None = None

    def __call__(self) -> SwarmCollector:
        """Return the swarm; blocks while models load. Raises ConfigError, CheckpointError, ModelFetchError."""
        from dmoa.training.collect import SwarmCollector

        config = Config.model_validate_json(self.config_json)
        return SwarmCollector(build_local_backend(config, lambda text: None, self.call_cache).swarm, self.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenServer:
    """Opens a client of a running server."""

    url: str
    pool: str
    api_key: str = field(default="", repr=False)

    def __call__(self) -> ServerAnswerer:
        """Return the client."""
        from dmoa.serving.client import SwarmClient

        return ServerAnswerer(SwarmClient(self.url, api_key=self.api_key), self.pool)


class ServerAnswerer:
    """A running server."""

    def __init__(self, client: SwarmClient, pool: str) -> None:
        self._client = client
        self._pool = pool

    async def answer(self, query: Query, policy: str, agent: str | None) -> SwarmOutcome:
        """Answer one query. Raises DmoaError as the server says, RequestError for what it refuses."""
        limits = query.limits
        asked = {
            "max_steps": limits.max_steps,
            "max_agents": limits.max_agents,
            "budget_tokens": limits.budget_tokens,
            "deadline_s": limits.deadline_s,
            "trace": True,
        }
        sampling = {"seed": int(query.trace_id[:8], 16)}
        if limits.max_tokens is not None:
            sampling["max_tokens"] = limits.max_tokens
        started = time.perf_counter()
        reply = await self._client.ask(
            [Message(role="user", content=query.text)],
            model=agent or f"{self._pool}/{policy}",
            dmoa={name: value for name, value in asked.items() if value is not None},
            sampling=sampling,
        )
        return SwarmOutcome(
            text=reply.text,
            finish_reason=reply.finish_reason,
            dmoa=ReplyDmoa.model_validate(reply.dmoa),
            wall_ms=(time.perf_counter() - started) * 1e3,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
