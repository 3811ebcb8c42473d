"""A running server as the backend of a command: the official openai client, thinly (see `serving.client`)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dmoa.cli.local import Wish, check_question
from dmoa.cli.show import Asked, Screen
from dmoa.errors import DmoaError, RequestError
from dmoa.trace import ReplyDmoa, Trace
from dmoa.types import Message, TextDelta
from dmoa.validation import describe

if TYPE_CHECKING:
    from dmoa.serving.client import RemoteReply, SwarmClient

_TRACE_PATIENCE_S = 10.0
_TRACE_PAUSE_S = 0.1
_NOT_FOUND = 404


class RemoteBackend:
    """Asks a running server."""

    def __init__(self, client: SwarmClient) -> None:
        self.client = client

    async def ask(self, question: str, turns: Sequence[Message], wish: Wish, screen: Screen) -> Asked:
        """Answer one question after earlier turns, showing its steps. Raises DmoaError."""
        from dmoa.serving.client import StepLine

        messages = [*turns, Message(role="user", content=check_question(question))]
        started = time.perf_counter()
        try:
            async for event in self.client.stream(messages, model=wish.agent, dmoa=_options(wish), sampling=wish.sampling):
                if isinstance(event, StepLine):
                    screen.remote_line(event.text)
                elif not isinstance(event, TextDelta):
                    reply = event
        finally:
            screen.end_remote_lines()
        wall_s = time.perf_counter() - started
        record = _record(self.client, reply)
        for step in record.steps:
            screen.step(step)
        return Asked(
            question=question,
            text=reply.text,
            finish_reason=reply.finish_reason,
            wall_s=wall_s,
            dmoa=record,
            trace=await fetch_trace(self.client, record.trace_id) if wish.keeps_trace else None,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


def build_remote_backend(url: str) -> RemoteBackend:
    """Return a backend for a server's URL; the key, where it wants one, is DMOA_API_KEY. Raises RequestError."""
    from dmoa.serving.client import SwarmClient

    if not url.startswith(("http://", "https://")):
        raise RequestError(f"--url: value seen: {url!r}; give the server's address, such as http://127.0.0.1:8000")
    return RemoteBackend(SwarmClient(url, api_key=os.environ.get("DMOA_API_KEY", "")))


async def fetch_trace(client: SwarmClient, trace_id: str) -> Trace:
    """Return a query's trace from the server, which keeps it a moment after the reply. Raises RequestError."""
    deadline = time.monotonic() + _TRACE_PATIENCE_S
    while True:
        try:
            return Trace.model_validate(await client.trace(trace_id))
        except RequestError as error:
            if error.status != _NOT_FOUND or time.monotonic() >= deadline:
                raise
        await asyncio.sleep(_TRACE_PAUSE_S)


def _options(wish: Wish) -> dict[str, Any]:
    asked = {"policy": wish.policy, "max_steps": wish.max_steps, "deadline_s": wish.deadline_s, "trace": True}
    return {name: value for name, value in asked.items() if value is not None}


def _record(client: SwarmClient, reply: RemoteReply) -> ReplyDmoa:
    try:
        return ReplyDmoa.model_validate(reply.dmoa)
    except ValidationError as error:
        raise DmoaError(f"{client.url}: its reply has no usable dmoa object ({describe(error)}); is it a dmoa server?") from error
