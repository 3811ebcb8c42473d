"""A deterministic in-memory swarm behind the HTTP front: it answers at once, fails or holds as told, and remembers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI

from dmoa.config import LimitsConfig, RouterConfig, ServerConfig
from dmoa.errors import NoAgentError, RequestError
from dmoa.feedback import feedback_of, tenant_of
from dmoa.flat import reply_of
from dmoa.serving.feedback import check_said
from dmoa.serving.feedback_buffer import FeedbackBuffer, KeptOutcome, Said
from dmoa.serving.http.routes import create_app
from dmoa.serving.trace_list import AgentStatistics, TraceFilter, TracePage, TraceSummary
from dmoa.serving.traces import TraceStore
from dmoa.serving.what_if import DecidedStep
from dmoa.trace import AnsweredQuery, Trace
from dmoa.types import AgentReply, Answer, Event, Query, RouteDecision, StepRecord, SummarizerRecord, TextDelta, TokenUsage

AGENTS = ("adder", "sorter", "dater")
QUESTION = [{"role": "user", "content": "What is 12 + 7?"}]


def decision(probability_A: list[float], masked: tuple[str, ...] = ()) -> RouteDecision:
    """One decision over AGENTS."""
    ranking = tuple(sorted((i for i, name in enumerate(AGENTS) if name not in masked), key=lambda i: -probability_A[i]))
    return RouteDecision(
        gate_version="untrained-1",
        agents=AGENTS,
        probability_A=np.asarray(probability_A, dtype=np.float32),
        ranking=ranking,
        k=2,
        mass=0.875,
        masked=masked,
        hidden_H=np.zeros(4, dtype=np.float32),
    )


def reply(agent: str, text: str = "19", **more: Any) -> AgentReply:
    """One contribution of 4 tokens at 0.5 nats."""
    values: dict[str, Any] = {
        "status": "ok",
        "entropy_sum_nats": 2.0,
        "entropy_sq_sum": 1.0,
        "entropy_tokens": 4,
        "prompt_tokens": 10,
        "cached_tokens": 6,
        "completion_tokens": 4,
        "latency_ms": 12.34567,
    }
    return reply_of({"agent": agent, "text": text, **values, **more})


def make_step(step: int, summary: str, **more: Any) -> StepRecord:
    """One step of two active agents and an idle one."""
    values: dict[str, Any] = {
        "replies": (reply("sorter", entropy_sum_nats=8.0), reply("adder")),
        "active": ("adder", "sorter"),
        "summarizer": SummarizerRecord(
            mode="select", verdict="rule", usage=TokenUsage(prompt_tokens=5, cached_tokens=1, completion_tokens=2), latency_ms=1.0
        ),
        "mass": 0.875,
        "wall_ms": 20.00049,
        "decision": decision([0.625, 0.25, 0.125]),
    }
    return StepRecord(step=step, summary=summary, **(values | more))


def make_answer(trace_id: str, **more: Any) -> Answer:
    """Two steps and the answer 19."""
    values: dict[str, Any] = {
        "text": "The answer is 19.",
        "policy": "dmoa",
        "stop_reason": "agreement",
        "steps": (make_step(0, "18 or 19"), make_step(1, "19")),
        "degraded": False,
        "finish_reason": "stop",
        "gate_version": "untrained-1",
        "gate_trained": False,
    }
    return Answer(trace_id=trace_id, **(values | more))


class FakePage:
    """Implements `PageService` over a trace store in this process and a made-up history of three gates."""

    def __init__(self) -> None:
        self.store = TraceStore(RouterConfig())
        self.history = [
            {"version": f"v{number}", "action": action, "previous": previous, "note": note, "unix_s": 1.79e9 + number}
            for number, action, previous, note in (
                (1, "configured", None, ""),
                (2, "install", "v1", "80 queries, soft loss"),
                (3, "install", "v2", ""),
            )
        ]
        self.is_away = False
        self.failures: list[TraceSummary] = []

    async def status(self) -> dict[str, Any] | None:
        gate = self.history[-1]["version"]
        return None if self.is_away else {"app": "dmoa", "pool": "tiny", "gate_version": gate, "decisions": 3}

    async def statistics(self, key_hash: str | None) -> list[AgentStatistics]:
        return await self.store.statistics(AGENTS, key_hash)

    async def traces(self, wanted: TraceFilter, key_hash: str | None) -> TracePage:
        return await self.store.listed(wanted, key_hash)

    async def gates(self) -> dict[str, Any]:
        if self.is_away:
            raise NoAgentError("the router is away; try again in a moment")
        return {"current": self.history[-1]["version"], "history": self.history}

    async def rollback(self, version: str | None, note: str) -> dict[str, Any]:
        previous, wanted = self.history[-1]["version"], version or self.history[-2]["version"]
        if wanted not in [one["version"] for one in self.history]:
            raise RequestError(f"version: {wanted!r} was never current", param="version", code="unknown_version", status=404)
        self.history.append({"version": wanted, "action": "rollback", "previous": previous, "note": note, "unix_s": 1.79e9 + 9})
        return {"version": wanted, "previous": previous, "changed": wanted != previous, "untrained": False, "shadow": None}

    async def what_if(self, trace: Trace, *, gate_version: str | None, policy: str | None) -> list[DecidedStep]:
        raise AssertionError("no trace of this service is whole")

    def branch(
        self, trace: Trace, trace_id: str, *, step: int, policy: str | None, agents: tuple[str, ...]
    ) -> tuple[Query, AsyncGenerator[Event]]:
        raise AssertionError("no trace of this service is whole")

    def failed(self, summary: TraceSummary, key_hash: str) -> None:
        self.failures.append(summary)


@dataclass
class FakeService:
    """Implements `SwarmService`."""

    pool: str = "tiny"
    agents: tuple[str, ...] = AGENTS
    policies: tuple[str, ...] = ("dmoa", "single")
    limits: LimitsConfig = field(default_factory=lambda: LimitsConfig(max_steps=5, deadline_s=30.0))
    deltas: tuple[str, ...] = ()
    """Pieces in which the final text streams."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the Answer."""
    error: Exception | None = None
    error_at: int = 0
    """How many items come before the error."""
    hold_at: int | None = None
    """How many items come before the query waits for `release`."""
    abilities: frozenset[str] = frozenset()
    """What engines can do."""
    states: dict[str, str] = field(default_factory=lambda: dict.fromkeys(AGENTS, "up"))
    release: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    cancelled: int = 0
    asked: list[tuple[Query, str, str | None]] = field(default_factory=list)
    recorded: list[dict[str, Any]] = field(default_factory=list)
    stored: list[bool] = field(default_factory=list)
    """Of every recorded query, whether it may be kept."""
    page: FakePage = field(default_factory=FakePage)
    buffer: FeedbackBuffer = field(
        default_factory=lambda: FeedbackBuffer(preset="default", max_bytes=2**20, outcomes_per_minute=1000, max_age_s=60)
    )

    async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        self.asked.append((query, policy, agent))
        answer = make_answer(query.trace_id, **({"policy": policy} | self.overrides))
        texts = [TextDelta(text=text) for text in self.deltas]
        items = [*answer.steps[:-1], *texts, *answer.steps[-1:], answer]  # a step is over when its text is
        self.running += 1
        try:
            for i, item in enumerate(items):
                if self.error is not None and i == self.error_at:
                    raise self.error
                if i == self.hold_at:
                    await self.release.wait()
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += item is not items[-1]  # whoever has the Answer may stop reading
            raise
        finally:
            self.running -= 1

    async def close(self) -> None:
        pass

    async def ready(self) -> dict[str, str]:
        return self.states

    async def metrics(self) -> str:
        return "# TYPE dmoa_steps_total counter\ndmoa_steps_total 3\n"

    async def trace(self, trace_id: str, key_hash: str | None) -> dict[str, Any] | None:
        for record in self.recorded:
            if record["trace_id"] == trace_id and key_hash in (None, record["key_hash"]):
                return record
        return None

    def record(self, answered: AnsweredQuery, key_hash: str) -> None:
        query = answered.query
        known = {"key_hash": key_hash, "user": answered.user, "metadata": answered.metadata}
        self.recorded.append({"trace_id": query.trace_id} | known)
        self.stored.append(answered.is_stored)
        self.buffer.put(feedback_of(answered, key_hash=key_hash, salt=b"s"))

    async def judge(self, outcome: KeptOutcome, key_hash: str) -> Said:
        return check_said(self.buffer.judge(tenant_of(key_hash), outcome, time.time()), outcome)


def make_app(
    service: FakeService,
    *,
    keys: tuple[str, ...] = (),
    admins: tuple[str, ...] = (),
    max_body_bytes: int = 65536,
    queued: int = 8,
    is_new: bool = False,
    **settings: Any,
) -> FastAPI:
    """The app over a service; `settings` of the section `server`.

    To make one takes longer than most tests of it, and it asks for its service at every request: so a test gets one of the same
    settings that an earlier test had, if there is any; `is_new`: one that is made now.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    server = ServerConfig(max_body_bytes=max_body_bytes, **({"allowed_hosts": ("test", "testserver")} | settings))
    held = _HELD.setdefault((keys, admins, queued, server.model_dump_json()), [])
    found = next((one for one in held if one.test != test and not is_new), None)
    if found is None:
        found = _Held(service)
        found.app = create_app(
            lambda: found.service, key_hashes=keys, admin_hashes=admins, server=server, max_queued_requests=queued
        )
        if test:  # outside of tests, as a module is imported, it is for all of them
            held.append(found)
    found.service, found.test = service, test
    return found.app


@dataclass
class _Held:
    """An app that was made, and which test has it now."""

    service: FakeService
    test: str = ""
    app: FastAPI = field(init=False)


_HELD: dict[tuple[object, ...], list[_Held]] = {}
"""By all that an app is made of but its service."""


class QuietServer(uvicorn.Server):
    """A server inside the test's own loop, which leaves the process's signal handlers alone and ends at once.

    Uvicorn's own looks ten times a second whether it is to end, and waits as long again for connections to close.
    """

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:  # noqa: ASYNC110 - what uvicorn sets is no event
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        for server in self.servers:
            await server.wait_closed()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def listening(app: Any, **settings: Any) -> AsyncIterator[int]:
    """The port on which uvicorn serves an app; `settings` of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = QuietServer(uvicorn.Config(app, log_level="critical", lifespan="off", **settings))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await until(lambda: server.started)
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            await task


def connect(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    """A client of the app, without sockets; an error that leaves the app fails the test."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Wait until a condition holds and return the seconds it took; fail after `seconds`."""
    start = time.perf_counter()
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the condition is another thread's or the app's own state
            await asyncio.sleep(0.005)
    return time.perf_counter() - start
