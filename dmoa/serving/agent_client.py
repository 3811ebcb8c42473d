"""Calls agents through Serve handles: sticky replicas, versions of the pool, and an end to calls that no replica can take.

`CallWatchdog` cancels calls to agents without replicas instead of waiting forever. An agent that hangs is lost as one that died:
after a while a call has it answer a ping, in time for another agent to be asked. `agent_replica` is the other side.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpc import RpcError
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from dmoa.config import Config, callable_agents
from dmoa.errors import AgentOverloadedError, AgentUnavailableError, CallNotTakenError, ConfigError, DmoaError, PoolChangedError
from dmoa.recovery import COLD_PATIENCE_S, PATIENCE_S, time_left
from dmoa.serving.deployments import has_affinity
from dmoa.serving.handles import Sent, ask, has_replica
from dmoa.types import AgentCall, AgentReply, TextDelta

REPLICA_LOST_ERRORS = (RayError, RayServeException, RpcError)
"""Between replicas Serve speaks gRPC, and makes an error of Ray of one of its statuses only, UNAVAILABLE."""

SLOW_S = 2.0
"""How long a call is trusted to be under way."""
CHECK_INTERVAL_S = 1.0
"""How often the router is asked about slow calls, for all of them together."""
LOST_S, LOST_MEMORY_S = 0.3, 30.0
"""How long a call may wait to be taken where no replica is left or one was just lost, and for how long a loss is known.

The router hears of it as soon, but Serve keeps what was sent in between until another replica has started.
"""
CHECK_S, ANSWER_S = 30.0, 10.0
"""Without a deadline: how long a call runs before its agent is pinged, again each time, and how long a ping may take."""
LEAST_ANSWER_S = 0.5
"""With a deadline half of what is left, a quarter of it, and this at least."""
_DEADLINE_SLACK_S = 1.0
"""After a call's deadline, at which its caller ends it."""


@dataclass(frozen=True, slots=True)
class MissingReplicas:
    """Whom no call can reach, as the router sees it."""

    agents: frozenset[str] = frozenset()
    """Those that should have a replica and that none can still be answering calls to."""
    version: str | None = None
    """Of the pool that the router serves; None where it could not be asked."""
    cold: frozenset[str] = frozenset()
    """Agents scaled to zero, or on their way up from there: no replica can take calls to them yet."""


FindMissing = Callable[[], Awaitable[MissingReplicas]]
"""Asks the router whom no call can reach."""


def _always() -> bool:
    return True


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _nobody() -> MissingReplicas:
    return MissingReplicas()


class CallWatchdog:
    """Watches the slow calls of one process."""

    def __init__(
        self,
        find_missing: FindMissing = _nobody,
        *,
        slow_s: float = SLOW_S,
        check_interval_s: float = CHECK_INTERVAL_S,
        cold_patience_s: float = COLD_PATIENCE_S,
        lost_s: float = LOST_S,
    ) -> None:
        """A replica may take `cold_patience_s` to start; the router is asked about calls after `slow_s`, and repeatedly.

        `lost_s`: how long a call may go untaken once no replica of its queue is left, or one was lost.
        """
        self._find_missing = find_missing
        self.slow_s, self.check_interval_s = slow_s, check_interval_s
        self.cold_patience_s, self.lost_after_s = cold_patience_s, lost_s
        self._known, self._known_s = MissingReplicas(), float("-inf")
        self._lock = asyncio.Lock()
        self._moved: dict[object, tuple[float, float]] = {}
        self._lost_s: dict[object, float] = {}

    def lost(self, queue: object) -> None:
        """Note that a replica was lost with a call of a queue."""
        self._lost_s[queue] = _now()

    def is_lost(self, queue: object) -> bool:
        """Tell whether a replica of a queue was lost not long ago, and none has answered a call since."""
        return _now() - self._lost_s.get(queue, float("-inf")) < LOST_MEMORY_S

    @property
    def served(self) -> str | None:
        """Version of the pool that the router served when it was last asked; None where that is not known."""
        return self._known.version

    async def is_gone(self, agent: str) -> bool:
        """Tell whether an agent has no replica, as of a second ago at most."""
        async with self._lock:
            if _now() - self._known_s > self.check_interval_s:
                self._known = await self._find_missing()
                self._known_s = _now()
        return agent in self._known.agents

    def is_cold(self, agent: str) -> bool:
        """Tell whether an agent was cold when the router was last asked."""
        return agent in self._known.cold

    def answered(self, queue: object, sent_s: float) -> None:
        """Note that a call of a queue was answered; times are the loop's."""
        self._moved[queue] = (sent_s, _now())
        if self._lost_s.get(queue, sent_s) < sent_s:
            del self._lost_s[queue]

    def moved_s(self, queue: object, sent_s: float) -> float:
        """Return when a call of a queue that was sent before `sent_s` was answered, as far as the last answer tells."""
        last_sent_s, at_s = self._moved.get(queue, (float("inf"), 0.0))
        return at_s if last_sent_s < sent_s else float("-inf")


class WatchedCall:
    """One call under watch."""

    def __init__(
        self,
        watchdog: CallWatchdog,
        agent: str,
        give_up: Callable[[], None],
        *,
        is_taken: Callable[[], bool] = _always,
        patience_s: float = PATIENCE_S,
        queue: object = None,
        has_replica: Callable[[], bool] | None = None,
        ping: Callable[[], Awaitable[None]] | None = None,
        left_s: float | None = None,
    ) -> None:
        """Watch a call from now on; `give_up` is called once, if its agent turns out to be gone.

        So it is where no replica takes the call for `patience_s`, as `is_taken` tells. That time begins anew with every call
        of the same `queue` that was sent before it and is answered, and while the agent is cold. With `has_replica` it hurries:
        it waits for `lost_s` where that tells of no replica, or where one of its queue was lost, and none has answered since.
        With `ping` its agent hangs where that does not return in time; `left_s` is what is left until the call's deadline.
        """
        self._watchdog, self._agent, self._give_up = watchdog, agent, give_up
        self._is_taken, self.patience_s, self._queue, self._ping = is_taken, patience_s, queue, ping
        self._has_replica = has_replica or _always
        check_s, self.answer_s = (CHECK_S, ANSWER_S) if left_s is None else (left_s / 2, max(LEAST_ANSWER_S, left_s / 4))
        self.check_s = check_s if ping else math.inf
        self._sent_s = _now()
        self.is_given_up = self._is_answered = False
        self.is_untaken = self.is_hung = False
        """Whether it was given up because no replica took it, or its agent hangs, though that has replicas."""
        self._checking: asyncio.Task[None] | None = None
        # Timers, not tasks: nearly all calls end before they go off.
        self._timer = asyncio.get_running_loop().call_later(min(watchdog.slow_s, self.check_s), self._begin)
        self._hurrying = None if has_replica is None else self._look_later()

    def _look_later(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._watchdog.lost_after_s, self._look)

    def _look(self) -> None:
        """Give the call up where no replica will take it soon; else look again, until one has it."""
        if self.is_given_up or self._is_answered or self._is_taken():
            return
        can_hope = self._has_replica() and not self._watchdog.is_lost(self._queue)
        if can_hope or self._watchdog.is_cold(self._agent):
            self._hurrying = self._look_later()
        else:
            self.is_given_up = True
            self._give_up()

    def end(self) -> None:
        """Stop watching: the call is over, or its replica has answered."""
        self._timer.cancel()
        if self._hurrying is not None:
            self._hurrying.cancel()
        if self._checking is not None:
            self._checking.cancel()

    def answered(self) -> None:
        """Note that its replica has answered, so its queue moves; from now on it is watched for hanging alone."""
        self._is_answered = True
        if self._ping is None:
            self.end()
        self._watchdog.answered(self._queue, self._sent_s)

    def _begin(self) -> None:
        self._checking = asyncio.get_running_loop().create_task(self._check())

    async def _check(self) -> None:
        since_s, ping_s = self._sent_s, self._sent_s + self.check_s
        while True:
            if _now() >= ping_s:
                if await self._hangs():
                    break
                ping_s = _now() + max(self.check_s, self._watchdog.check_interval_s)
            if not self._is_answered and await self._watchdog.is_gone(self._agent):
                break
            since_s = max(since_s, self._waits_since_s())
            if not self._is_answered and not self._is_taken() and _now() - since_s >= self.patience_s:
                self.is_untaken = True
                break
            await asyncio.sleep(min(self._watchdog.check_interval_s, max(0.0, ping_s - _now())))
        self.is_given_up = True
        self._give_up()

    async def _hangs(self) -> bool:
        assert self._ping is not None
        try:
            async with asyncio.timeout(self.answer_s):
                await self._ping()
        except (TimeoutError, DmoaError) as error:  # of the latter the call itself hears
            self.is_hung = isinstance(error, TimeoutError)
        return self.is_hung

    def _waits_since_s(self) -> float:
        """Return when the call could last hope for a replica to take it soon."""
        now_s = _now()
        if self._watchdog.is_cold(self._agent) and now_s - self._sent_s < self._watchdog.cold_patience_s:
            return now_s
        return self._watchdog.moved_s(self._queue, self._sent_s)


def affine_agents(config: Config) -> frozenset[str]:
    """Return the agents (and the summarizer) that may have several replicas: a conversation stays on one of them."""
    return frozenset(agent.name for agent in callable_agents(config) if has_affinity(config.scaling_of(agent)))


class ServeAgentClient:
    """Reaches agents through Serve handles; implements `protocols.AgentClient`."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        version: str,
        *,
        affine: Collection[str] = (),
        sleepers: Collection[str] = (),
        watchdog: CallWatchdog | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`handles` are by agent name; `version` is the pool's, which every reply must come from.

        Calls of `affine` agents go to the replica of their conversation. Calls to agents that have no replica, as the watchdog
        finds, end. So do calls without a deadline that no replica takes for `patience_s`, see `WatchedCall`. `sleepers`
        may be without a replica while nobody asks them.
        """
        self._version, self._patience_s = version, patience_s
        self._watchdog = watchdog or CallWatchdog()
        # Made once, because a handle builds a new one for every method that is named on it. Calls are plain records:
        # pickle takes half of cloudpickle's time for them. Replies may be errors, which only cloudpickle carries safely.
        options = {"request_serialization": "pickle"}
        self._calls = {name: handle.options(method_name="call", **options) for name, handle in handles.items()}
        self._streams = {name: handle.options(method_name="stream", stream=True, **options) for name, handle in handles.items()}
        self._affine = frozenset(affine)
        self._has_replica = {name: _always if name in sleepers else partial(has_replica, x) for name, x in self._calls.items()}
        self._pings = {name: handle.options(method_name="ping") for name, handle in handles.items()}
        self._queues = {name: id(handle) for name, handle in handles.items()}  # one for all agents of a deployment

    async def call(self, call: AgentCall) -> AgentReply:
        """Ask one agent; cancelling cancels the call. Raises AgentUnavailableError, AgentOverloadedError, PoolChangedError."""
        sent = ask(self._handle(self._calls, call), call, self._version)
        with self._watch(call.agent, sent, call) as watched:
            reply: AgentReply = await sent.response
        watched.answered()
        return reply

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        """Ask one agent and yield its text as it comes, last the reply. Raises as `call` does."""
        sent = ask(self._handle(self._streams, call), call, self._version)
        is_done = False
        with self._watch(call.agent, sent, call) as watched:
            try:
                async for item in sent.response:
                    watched.answered()
                    is_done = isinstance(item, AgentReply)
                    yield item
            except REPLICA_LOST_ERRORS:
                is_done = True  # to cancel it now could raise the same error again
                raise
            finally:
                if not is_done:
                    sent.response.cancel()

    async def ping(self, agent: str) -> None:
        """Return once the agent's place answers. Raises AgentUnavailableError, AgentOverloadedError, PoolChangedError.

        Serve starts a replica for a ping as for any call; cancelled, it no longer asks for one.
        """
        sent = ask(self._pings[agent])
        with self._watch(agent, sent) as watched:
            try:
                await sent.response
            except REPLICA_LOST_ERRORS:
                # Serve refuses calls to a deployment that was deleted, and so what waits by pings would wait for ever.
                watched.is_given_up = watched.is_given_up or await self._watchdog.is_gone(agent)
                raise
        watched.answered()

    @contextmanager
    def _watch(self, agent: str, sent: Sent, call: AgentCall | None = None) -> Iterator[WatchedCall]:
        """Watch a call, or a ping, until it ends, cancel it with its task, and raise losses as errors of ours."""
        left_s = None if call is None else time_left(call.deadline_unix_s)
        task = asyncio.current_task()

        def give_up() -> None:
            sent.response.cancel()
            if watched.is_hung and task is not None:
                task.cancel()  # for a replica that hangs does not hear of the other; who reads a stream waits for nothing else

        watched = WatchedCall(
            self._watchdog,
            agent,
            give_up,
            is_taken=sent.is_taken,
            patience_s=self._patience_s if left_s is None else left_s + _DEADLINE_SLACK_S,
            queue=self._queues[agent],
            has_replica=None if call is None else self._has_replica[agent],
            ping=None if call is None else partial(self.ping, agent),
            left_s=left_s,
        )
        try:
            yield watched
        except asyncio.CancelledError:
            sent.response.cancel()
            if watched.is_given_up:
                raise self._given_up(agent, watched) from None
            raise
        except REPLICA_LOST_ERRORS as error:
            lost = self._given_up(agent, watched) if watched.is_given_up else _lost(agent, error)
            if type(lost) is AgentUnavailableError and not watched.is_given_up:
                self._watchdog.lost(self._queues[agent])
            raise lost from error
        finally:
            watched.end()

    def _given_up(self, agent: str, watched: WatchedCall) -> AgentUnavailableError | PoolChangedError | asyncio.CancelledError:
        """Return how what was given up ends: as cancelled where its own task is, for Serve tells both by one error.

        Where another pool is served by now, the agent may be gone for good: the query has to begin again on that one.
        """
        task = asyncio.current_task()
        if task is not None and watched.is_hung:
            task.uncancel()
        if task is not None and task.cancelling():
            return asyncio.CancelledError()
        if self._watchdog.served not in (None, self._version):
            return PoolChangedError(f"agent {agent!r} has no running replica, and another version of the pool is served by now")
        if watched.is_hung:
            waited = f"no reply after {watched.check_s:.3g} s, nor to a ping within {watched.answer_s:.3g} s"
            return AgentUnavailableError(f"agent {agent!r}: it hangs: {waited}")
        if watched.is_untaken:
            return CallNotTakenError(f"agent {agent!r}: no replica of it took the call for {watched.patience_s:.3g} s")
        return AgentUnavailableError(f"agent {agent!r}: it has no running replica")

    def _handle(self, handles: Mapping[str, Any], call: AgentCall) -> Any:
        """Return the handle to call by; one that names the conversation costs some 15 microseconds more."""
        handle = handles[call.agent]
        return handle.options(session_id=call.conversation) if call.conversation and call.agent in self._affine else handle


def _lost(agent: str, error: Exception) -> AgentUnavailableError | AgentOverloadedError | PoolChangedError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, PoolChangedError):
        return cause
    if isinstance(error, BackPressureError) or isinstance(cause, BackPressureError):
        return AgentOverloadedError(f"agent {agent!r}: its queue is full")
    if isinstance(cause, ConfigError):
        return AgentUnavailableError(f"agent {agent!r}: {cause}")
    return AgentUnavailableError(f"agent {agent!r}: {type(error).__name__}: its replica died or cannot be reached")
