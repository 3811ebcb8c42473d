"""The encoder on Ray Serve: one replica embeds for every ingress; each ingress keeps what it has seen."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from dmoa.agents.embedder import size_class
from dmoa.agents.pool import build_encoder
from dmoa.config import Config
from dmoa.errors import AgentUnavailableError
from dmoa.serving.agent_client import REPLICA_LOST_ERRORS
from dmoa.serving.handles import ask, listen_where_ray_does
from dmoa.types import FloatArray

CACHE_SIZE = 4096
"""Embeddings that an ingress keeps: 1.5 KiB each."""


class EncoderReplica:
    """A replica that embeds texts."""

    def __init__(self, config_json: str) -> None:
        listen_where_ray_does()
        self._encoder = build_encoder(Config.model_validate_json(config_json), is_quick=True)

    async def embed(self, texts: list[str]) -> list[FloatArray]:
        """Return one unit-length float32 [D] per text."""
        return await self._encoder.embed(texts)


def bind_encoder(config: Config) -> Any:
    """Return the bound Serve deployment of the encoder."""
    options = {
        "name": "encoder",
        "num_replicas": 1,
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": 256,
        "health_check_period_s": 0.5,  # as for the ingress; by default 10, and no step begins without it
    }
    return serve.deployment(EncoderReplica).options(**options).bind(config.model_dump_json())


MAX_CALLS = 2
"""Calls of one ingress at a time, for one size of texts: one is worked on, one waits; what comes meanwhile is the next."""


class _Call:
    """Texts that are asked for together, by their keys, and how many wait for them."""

    def __init__(self) -> None:
        self.texts: dict[bytes, str] = {}
        self.num_waiting = 0
        self.task: asyncio.Task[dict[bytes, FloatArray]] | None = None


class _Line:
    """Those who ask for texts of one size in one event loop, of which there may be several, one after the other or in threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.places = asyncio.Semaphore(MAX_CALLS)
        self.next: _Call | None = None

    def leave(self, call: _Call) -> None:
        """Let nobody join a call any more."""
        self.next = None if self.next is call else self.next


class ServeEncoder:
    """Reaches the encoder through its handle and remembers what it returned; implements `protocols.Encoder`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._cache: OrderedDict[bytes, FloatArray] = OrderedDict()
        self._lines: dict[int, _Line] = {}
        """By the size of what is asked for."""

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        """Return one embedding per text, asking only for those not seen before. Raises AgentUnavailableError."""
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache}
        found = {key: self._cache[key] for key in keys if key in self._cache}
        if missing:
            found |= await self._asked(missing)
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return [found[key] for key in keys]

    async def _asked(self, texts: dict[bytes, str]) -> dict[bytes, FloatArray]:
        """Return what the next call brings, of which these texts are a part; it ends with the last who waits for it."""
        loop, size = asyncio.get_running_loop(), size_class(list(texts.values()))
        line = self._lines.get(size)
        if line is None or line.loop is not loop:
            line = self._lines[size] = _Line(loop)
        call = line.next = line.next or _Call()
        call.texts |= texts
        call.num_waiting += 1
        call.task = call.task or loop.create_task(self._ask(call, line))
        try:
            return await asyncio.shield(call.task)
        finally:
            call.num_waiting -= 1
            if not call.num_waiting and not call.task.done():
                call.task.cancel()
                line.leave(call)

    async def _ask(self, call: _Call, line: _Line) -> dict[bytes, FloatArray]:
        async with line.places:
            line.leave(call)
            response = ask(self._handle.embed, list(call.texts.values())).response
            try:
                rows: list[FloatArray] = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except REPLICA_LOST_ERRORS as error:
                raise AgentUnavailableError(f"encoder: {type(error).__name__}: its replica died or cannot be reached") from error
            return dict(zip(call.texts, rows, strict=True))
