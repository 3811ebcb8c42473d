"""How calls by Serve's handles end, with Ray's own responses: given up, cancelled, refused."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

with warnings.catch_warnings():
    # Ray 2.60's own, with this pydantic.
    warnings.filterwarnings("ignore", message="Using extra keyword arguments", category=DeprecationWarning)
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError
    from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

from dmoa.agents.pool import build_local
from dmoa.config import Config
from dmoa.errors import AgentOverloadedError, AgentUnavailableError, CallNotTakenError, PoolChangedError
from dmoa.serving.agent_client import CallWatchdog, MissingReplicas, ServeAgentClient, WatchedCall
from dmoa.serving.agent_replica import AgentCalls, IngressAgents
from dmoa.serving.rollover import pool_version
from dmoa.testing import jumping
from dmoa.types import AgentCall, AgentReply, Message, Sampling, TextDelta

CALL = AgentCall(trace_id="t", step=0, agent="solver", messages=(), sampling=Sampling())


class Waiting:
    """A replica's answer that never comes, on a machine that does not even hear of the cancelling."""

    def cancel(self) -> None:
        """Do nothing."""

    async def get_async(self) -> Any:
        """Wait for good."""
        await asyncio.Event().wait()


class Handle:
    """Gives Ray's responses over futures that the test made."""

    def __init__(self, future: concurrent.futures.Future[Any], kind: type[Any] = DeploymentResponse) -> None:
        self._future, self._kind = future, kind

    def options(self, **_: Any) -> Handle:
        """Return itself."""
        return self

    def running_replicas_populated(self) -> bool:
        """Know of no replicas."""
        return False

    def remote(self, *_: Any) -> Any:
        """Return a response."""
        return self._kind(self._future, SimpleNamespace(request_id="r"))


def future_of(result: Any = None, error: Exception | None = None) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    if error is not None:
        future.set_exception(error)
    elif result is not None:
        future.set_result(result)
    return future


@pytest.fixture
def looks() -> asyncio.Event:
    return asyncio.Event()


def quick() -> CallWatchdog:
    return CallWatchdog(slow_s=0.01, check_interval_s=0.01)


def watched(handle: Handle, looks: asyncio.Event, served: str | None = "v") -> Any:
    async def gone() -> MissingReplicas:
        looks.set()
        return MissingReplicas(frozenset({"solver"}), served)

    return ServeAgentClient({"solver": handle}, "v", watchdog=CallWatchdog(gone, slow_s=0.01))  # type: ignore[dict-item]


async def ask_by_call(agents: Any) -> None:
    await agents.call(CALL)


async def ask_by_stream(agents: Any) -> None:
    await anext(agents.stream(CALL))


async def ask_by_ping(agents: Any) -> None:
    await agents.ping("solver")


@pytest.mark.parametrize("ask", [ask_by_call, ask_by_stream, ask_by_ping])
@pytest.mark.parametrize(
    ("served", "error", "told"),
    [
        ("v", AgentUnavailableError, "it has no running replica"),
        (None, AgentUnavailableError, "it has no running replica"),
        ("newer", PoolChangedError, "another version of the pool is served by now"),
    ],
)
async def test_an_agent_that_is_gone_with_its_pool_has_the_query_begin_again(
    looks: asyncio.Event, ask: Callable[[Any], Awaitable[None]], served: str | None, error: type[Exception], told: str
) -> None:
    """A ping too: a query whose agents were all lost waits by pings for one of them to come back."""
    kind = DeploymentResponseGenerator if ask is ask_by_stream else DeploymentResponse
    with pytest.raises(error, match=told):
        async with asyncio.timeout(5):
            await ask(watched(Handle(future_of(), kind), looks, served))


@pytest.mark.parametrize(("served", "error"), [("v", AgentUnavailableError), ("newer", PoolChangedError)])
async def test_a_ping_that_is_refused_looks_whether_the_agent_is_gone_with_its_pool(
    looks: asyncio.Event, served: str, error: type[Exception]
) -> None:
    refused = RayActorError()
    with pytest.raises(error, match="no running replica"):
        await watched(Handle(future_of(error=refused)), looks, served).ping("solver")
    with pytest.raises(AgentUnavailableError, match="its replica died"):
        await ServeAgentClient({"solver": Handle(future_of(error=refused))}, "v").ping("solver")  # type: ignore[dict-item]


async def test_a_call_that_is_given_up_and_cancelled_ends_as_cancelled(looks: asyncio.Event) -> None:
    task = asyncio.create_task(watched(Handle(future_of(Waiting())), looks).call(CALL))
    async with asyncio.timeout(5):
        await looks.wait()
    for _ in range(5):  # the look ends, and the call is given up, which this replica does not hear
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_full_queue_is_told_as_such_by_streams_too() -> None:
    handle = Handle(future_of(error=BackPressureError(4, 4)), DeploymentResponseGenerator)
    agents = ServeAgentClient({"solver": handle}, "v")  # type: ignore[dict-item]
    with pytest.raises(AgentOverloadedError, match="its queue is full"):
        await anext(agents.stream(CALL))


@pytest.mark.parametrize("status", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_a_connection_that_breaks_between_replicas_costs_a_call_and_no_more(status: grpc.StatusCode) -> None:
    broken = grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), details="stream removed")
    with pytest.raises(AgentUnavailableError, match=r"agent 'solver': AioRpcError: its replica died or cannot be reached"):
        await ServeAgentClient({"solver": Handle(future_of(error=broken))}, "v").call(CALL)  # type: ignore[dict-item]
    streamed = Handle(future_of(error=broken), DeploymentResponseGenerator)
    with pytest.raises(AgentUnavailableError, match="AioRpcError"):
        await anext(ServeAgentClient({"solver": streamed}, "v").stream(CALL))  # type: ignore[dict-item]


@pytest.mark.parametrize("ask", [ask_by_call, ask_by_stream, ask_by_ping])
async def test_a_call_that_no_replica_takes_ends_though_some_run(
    ask: Callable[[Any], Awaitable[None]],
) -> None:
    future = future_of()
    handle = Handle(future, DeploymentResponseGenerator if ask is ask_by_stream else DeploymentResponse)
    agents = ServeAgentClient({"solver": handle}, "v", watchdog=quick(), patience_s=0.05)  # type: ignore[dict-item]
    with pytest.raises(CallNotTakenError, match=r"agent 'solver': no replica of it took the call for 0\.05 s"):
        async with asyncio.timeout(5):
            await ask(agents)
    assert future.cancelled()


class Answer:
    """A replica's answer."""

    def __init__(self, value: object) -> None:
        self._value = value

    async def get_async(self) -> Any:
        """Return it."""
        return self._value


class Pieces:
    """A replica's stream that stops after so many pieces."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> Any:
        if not self._count:
            await asyncio.Event().wait()
        self._count -= 1
        return TextDelta(text="The answer")

    def cancel(self) -> None:
        """Do nothing."""


class Pings(Handle):
    """Every ping meets the next future; the last one is met for ever after."""

    def __init__(self, futures: list[concurrent.futures.Future[Any]]) -> None:
        super().__init__(futures[0])
        self._futures, self.asked = futures, 0

    def remote(self, *_: Any) -> Any:
        """Return a response."""
        self.asked += 1
        self._future = self._futures.pop(0) if len(self._futures) > 1 else self._futures[0]
        return super().remote()


class Pinged(Handle):
    """An agent's replica whose pings are another thing than its calls."""

    def __init__(self, call: concurrent.futures.Future[Any], pings: list[concurrent.futures.Future[Any]], **more: Any) -> None:
        super().__init__(call, **more)
        self.pings = Pings(pings)

    def options(self, method_name: str = "", **_: Any) -> Handle:
        """Return the handle of a method."""
        return self.pings if method_name == "ping" else self


def client_of(handle: Handle, **options: Any) -> Any:
    return ServeAgentClient({"solver": handle}, "v", **options)  # type: ignore[dict-item]


async def test_a_call_with_a_deadline_has_until_then_to_be_taken() -> None:
    """A second more, in which its replica is pinged once an interval."""
    handle = Pinged(future_of(), [future_of(Answer("up"))])
    agents = client_of(handle, watchdog=quick(), patience_s=3600)
    with pytest.raises(CallNotTakenError):
        async with asyncio.timeout(5):
            await agents.call(replace(CALL, deadline_unix_s=time.time()))
    assert 1 <= handle.pings.asked <= 110


@pytest.mark.parametrize("is_taken", [False, True])
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("deadline_s", "pings", "after_s", "told"),
    [
        (4000.0, 0, 3000.0, "no reply after 2e+03 s, nor to a ping within 1e+03 s"),  # in time for the next-ranked to be asked
        (None, 0, 40.0, "no reply after 30 s, nor to a ping within 10 s"),
        (None, 2, 100.0, "no reply after 30 s, nor to a ping within 10 s"),  # it answered two before
    ],
)
def test_an_agent_that_hangs_is_given_up(
    is_taken: bool, is_streamed: bool, deadline_s: float | None, pings: int, after_s: float, told: str
) -> None:
    future = future_of((Pieces(0) if is_streamed else Waiting()) if is_taken else None)

    async def ask() -> None:
        call = replace(CALL, deadline_unix_s=None if deadline_s is None else time.time() + deadline_s)
        answered = [future_of(Answer("up")) for _ in range(pings)]
        kind = DeploymentResponseGenerator if is_streamed else DeploymentResponse
        agents = client_of(Pinged(future, [*answered, future_of()], kind=kind), patience_s=1e6)
        with pytest.raises(AgentUnavailableError, match=re.escape(f"agent 'solver': it hangs: {told}")):
            await (anext(agents.stream(call)) if is_streamed else agents.call(call))
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    _, seconds = jumping(ask())
    assert seconds == pytest.approx(after_s, abs=5.0)  # the deadline is by the clock on the wall
    assert future.cancelled() is not is_taken


def test_an_agent_that_hangs_in_mid_stream_is_given_up() -> None:
    async def ask() -> int:
        handle = Pinged(future_of(Pieces(3)), [future_of(Answer("up")), future_of()], kind=DeploymentResponseGenerator)
        stream = client_of(handle, patience_s=1e6).stream(replace(CALL, deadline_unix_s=time.time() + 4000.0))
        pieces = [await anext(stream) for _ in range(3)]
        with pytest.raises(AgentUnavailableError, match="agent 'solver': it hangs"):
            await anext(stream)
        return len(pieces)

    pieces, seconds = jumping(ask())
    assert (pieces, seconds) == (3, pytest.approx(5000.0, abs=5.0))  # its caller, which has the deadline, ends it before


@pytest.mark.parametrize(("left_s", "after_s"), [(4.0, 3.0), (1.0, 1.0), (0.0, 0.5), (None, 40.0)])
def test_a_call_is_given_up_after_three_quarters_of_its_deadline(left_s: float | None, after_s: float) -> None:
    async def ask() -> bool:
        given_up = asyncio.Event()
        watched = WatchedCall(CallWatchdog(), "solver", given_up.set, ping=asyncio.Event().wait, left_s=left_s)  # type: ignore[arg-type]
        await given_up.wait()
        return watched.is_hung

    assert jumping(ask()) == (True, pytest.approx(after_s, abs=1e-6))


def test_an_agent_that_is_slow_and_answers_pings_has_the_whole_deadline() -> None:
    async def ask() -> AgentReply:
        future = future_of()
        reply = AgentReply(agent="solver", status="ok", text="slow")
        asyncio.get_running_loop().call_later(3900, future.set_result, Answer(reply))
        agents = client_of(Pinged(future, [future_of(Answer("up"))]))
        return await agents.call(replace(CALL, deadline_unix_s=time.time() + 4000.0))  # type: ignore[no-any-return]

    reply, seconds = jumping(ask())
    assert (reply.text, seconds) == ("slow", pytest.approx(3900.0, abs=0.1))


class Hosted(AgentCalls):
    """A replica's agents without a replica."""

    def __init__(self, text: str, llm: str) -> None:
        config = Config.model_validate_json(text)
        assert llm == "near"
        self._agents, _ = build_local(config)
        self._label, self._replica, self._version = "scripted", "here", pool_version(config)


async def test_agents_in_the_ingress_are_called_there_and_others_elsewhere() -> None:
    scripted = {"model": "scripted:x", "engine": "scripted"}
    tree: dict[str, Any] = {
        "name": "p",
        "llms": {
            "near": scripted | {"placement": "ingress", "engine_kwargs": {"replies": {"a": "A"}}},
            "far": scripted | {"engine_kwargs": {"replies": {"b": "B"}}},
        },
        "agents": [{"name": name, "llm": llm, "profile": "Works."} for name, llm in (("a", "near"), ("b", "far"))],
        "summarizer": {"mode": "llm", "llm": "near"},
    }
    config = Config.model_validate(tree)
    agents = IngressAgents(config, build_local(config)[0], Hosted)

    def call(agent: str) -> AgentCall:
        return AgentCall(trace_id="t", step=0, agent=agent, messages=(Message(role="user", content="q"),), sampling=Sampling())

    replies = [await agents.call(call(name)) for name in "ab"]
    assert [(reply.text, reply.replica) for reply in replies] == [("A", "here"), ("B", "")]
    for name, text, replica in (("a", "A", "here"), ("b", "B", "")):
        *pieces, last = [item async for item in agents.stream(call(name))]
        assert isinstance(last, AgentReply)
        assert ("".join(piece.text for piece in pieces if isinstance(piece, TextDelta)), last.replica) == (text, replica)
        await agents.ping(name)


class Places:
    """Reaches agents whose places answer, or not, and tells which were pinged."""

    def __init__(self) -> None:
        self.pinged: list[str] = []

    async def ping(self, agent: str) -> None:
        self.pinged.append(agent)
        if agent.startswith("lost"):
            raise AgentUnavailableError(f"agent {agent!r}: it has no running replica")
        if agent.startswith("late"):
            await asyncio.Event().wait()


async def test_a_deployment_is_pinged_once_for_all_of_its_agents() -> None:
    scripted = {"model": "scripted:x", "engine": "scripted"}
    tree: dict[str, Any] = {
        "name": "p",
        "llms": dict.fromkeys(("good", "lost", "late"), scripted)
        | {"near": scripted | {"placement": "ingress"}, "own": scripted | {"placement": "dedicated"}},
        "agents": [{"name": f"{llm}{i}", "llm": llm, "profile": "Works."} for i in range(300) for llm in ("good", "lost")]
        + [{"name": f"{llm}{i}", "llm": llm, "profile": "Works."} for i in range(2) for llm in ("near", "own", "late")],
        "gate": {"activation": {"max_agents": 3}},
    }
    config, elsewhere = Config.model_validate(tree), Places()
    agents = IngressAgents(config, elsewhere, Hosted)  # type: ignore[arg-type]
    found = await agents.unready(config.agent_names, 0.05)
    assert sorted(elsewhere.pinged) == ["good0", "late0", "lost0", "own0", "own1"]
    wrong = {name: f"agent {name!r}: it has no running replica" for name in config.agent_names if name.startswith("lost")}
    late = dict.fromkeys(("late0", "late1"), "no answer within 0.05 s")
    assert found == wrong | late
    asking = [asyncio.create_task(agents.unready(config.agent_names, 0.05)) for _ in range(20)]
    await asyncio.sleep(0)
    asking[0].cancel()  # whose client went away, and the others are told all the same
    _, *others = await asyncio.gather(*asking, return_exceptions=True)
    assert others == [found] * 19
    assert len(elsewhere.pinged) == 10
