"""The Serve application: the ingress behind one OpenAI-compatible name, and everything it is bound to.

The ingress holds no model: it runs the step loop over Serve handles, the router actor and the encoder.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle

from dmoa.agents.pool import check_files, check_vllm, fingerprint
from dmoa.config import Config, callable_agents
from dmoa.errors import CheckpointError, DmoaError, NoAgentError, PoolChangedError, RequestError
from dmoa.loopback import ignore_proxies
from dmoa.policies.registry import POLICIES
from dmoa.reading import read_json
from dmoa.recovery import PATIENCE_S
from dmoa.serving.actors import ensure_actor, once_up
from dmoa.serving.agent_client import REPLICA_LOST_ERRORS, CallWatchdog, ServeAgentClient, affine_agents
from dmoa.serving.agent_replica import IngressAgents
from dmoa.serving.deployments import bind_hosts
from dmoa.serving.encoder import ServeEncoder, bind_encoder
from dmoa.serving.feedback import Explorer, FeedbackClient, asked_again, exploration, may_be_explored
from dmoa.serving.feedback_buffer import KeptOutcome, Said
from dmoa.serving.handles import ask, listen_where_ray_does, take_carried_bodies
from dmoa.serving.http.front import Bounds, FrontNotice, places_behind
from dmoa.serving.http.requests import unknown_model
from dmoa.serving.http.routes import create_app
from dmoa.serving.listening import LaunchMark
from dmoa.serving.metrics import QueryMetrics, exposition
from dmoa.serving.placement import INGRESS, deployment_names
from dmoa.serving.rollover import answer_on_one_pool_version, pool_version, query_drain_s
from dmoa.serving.router.actor import RouterActor
from dmoa.serving.router.client import RemoteRouter
from dmoa.serving.router.replica_health import UP, sleepers, state_of
from dmoa.serving.trace_list import AgentStatistics, TraceFilter, TracePage, TraceSummary
from dmoa.serving.traces import TraceOutbox, TraceStore
from dmoa.serving.what_if import DecidedStep, branch, by_gate, by_policy
from dmoa.swarm import Swarm, abilities_of
from dmoa.trace import AnsweredQuery, Trace
from dmoa.types import Answer, Event, Query

_LOG = logging.getLogger("dmoa.ingress")
READY_TIMEOUT_S = 2.0
"""How long /readyz waits for an agent's answer."""
APP = "dmoa"
"""Name of the Serve application unless told otherwise."""
AWAY = "the router is away; try again in a moment"
TRACES_AWAY = "the trace store is away; try again in a moment"
_HEAD = "node:__internal_head__"
"""Resource that Ray gives to the head alone, one of it."""


class SwarmIngress:
    """One ingress replica: the HTTP contract over a swarm on Serve; implements `service.SwarmService`."""

    async def __init__(  # type: ignore[misc] # Serve awaits the constructor
        self,
        config_json: str,
        key_hashes: tuple[str, ...],
        configured: str | None,
        encoder: DeploymentHandle,
        hosts: dict[str, DeploymentHandle],
        mark: str = "",
        admin_hashes: tuple[str, ...] = (),
        policy_files: tuple[str, ...] = (),
    ) -> None:
        POLICIES.resolve(policy_files, "--policy")
        ignore_proxies()  # where Ray was started by others, its processes may not have been told
        config = Config.model_validate_json(config_json)
        app = serve.get_replica_context().app_name
        self._config = config
        self.pool, self.agents, self.limits = config.name, config.agent_names, config.limits
        self.abilities = frozenset(ability for llm in config.llms.values() for ability in abilities_of(llm))
        self._key_hashes = key_hashes
        self._admin_hashes = admin_hashes
        self._mark = mark
        self._fingerprint = fingerprint(config)
        handles = {name: hosts[host] for name, host in deployment_names(config).items()}
        self._sleepers = sleepers(config)
        actor = ensure_actor(RouterActor, "router", app, config_json, app, configured)
        self._router = RemoteRouter(actor, config, configured)
        watchdog = CallWatchdog(self._router.missing_replicas)
        elsewhere = ServeAgentClient(
            handles, pool_version(config), affine=affine_agents(config), sleepers=self._sleepers, watchdog=watchdog
        )
        self._agents = await asyncio.to_thread(IngressAgents, config, elsewhere)
        self._traces = ensure_actor(TraceStore, "traces", app, config.router, config.tracing, app)
        self._feedback = FeedbackClient(config, app) if config.router.feedback == "on" else None
        self._swarm = Swarm(config, agents=self._agents, router=self._router, encoder=ServeEncoder(encoder))
        self.policies = self._swarm.policies
        self._explorer = Explorer(lambda: exploration(app, config.router.explore))
        self._exploring = Swarm(
            config, agents=self._agents, router=self._router, encoder=self._swarm.encoder, turn=self._explorer.turn
        )
        self.page = Observatory(traces=self._traces, router=self._router, actor=actor, swarm=self._swarm)
        self._metrics = QueryMetrics(config.name)
        self._any_ingress = serve.get_deployment_handle(INGRESS, app).options(method_name="answer_here", stream=True)
        self._answered_elsewhere: dict[str, str] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._outbox = TraceOutbox(self._traces, app if config.router.feedback == "on" else None)
        version = await self._router.start()
        await once_up(lambda: self._traces.configure.remote(config.router, config.tracing))
        if self._feedback is not None:
            await self._feedback.start()
        _LOG.info("ingress of pool %s: gate %s", config.name, version)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the FastAPI app; Serve calls this after the constructor."""
        take_carried_bodies()
        listen_where_ray_does()
        server, queued = self._config.server, self.limits.max_queued_requests
        app = create_app(
            lambda: self,
            key_hashes=self._key_hashes,
            admin_hashes=self._admin_hashes,
            server=server,
            max_queued_requests=places_behind(queued),
            has_request_ids=True,  # Serve's proxy adds one of its own
        )
        app.add_middleware(LaunchMark, mark=self._mark)
        queries = queued * server.ingress_replicas
        bounds = Bounds(body=server.max_body_bytes, queries=queries, has_keys=bool(self._key_hashes), origins=server.cors_origins)
        app.add_middleware(FrontNotice, bounds=bounds)
        return app

    async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        """Answer one query on one version of the pool, here or at the ingress of a newer one; see `Swarm.ask`."""
        here = partial(self.answer_here, policy=policy, agent=agent)
        elsewhere = partial(_ask_ingress, self._any_ingress, policy=policy, agent=agent)
        answering = self._fingerprint
        async with aclosing(answer_on_one_pool_version(here, elsewhere, query)) as events:
            async for event in events:
                if isinstance(event, str):
                    answering = event
                    continue
                if isinstance(event, Answer) and answering != self._fingerprint:
                    self._answered_elsewhere[query.trace_id] = answering
                yield event

    async def answer_here(self, query: Query, policy: str, agent: str | None) -> AsyncGenerator[str | Event]:
        """Answer on this version of the pool, its fingerprint first. Raises PoolChangedError, RequestError (no such agent)."""
        if agent is not None and agent not in self.agents:
            raise unknown_model(agent, self)
        yield self._fingerprint
        with self._explorer.answering():
            async with aclosing(self._swarm.ask(query, policy, agent)) as events:
                async for event in events:
                    if isinstance(event, Answer):
                        self._metrics.count(event)
                    yield event

    async def close(self) -> None:
        """Wait until the traces of the queries answered so far are kept."""
        await asyncio.gather(*self._tasks.values())

    async def ready(self) -> dict[str, str]:
        """Return agent -> "up", "cold", or why it is neither. Who may sleep is not asked, for that wakes it: the router tells."""
        names = [agent.name for agent in callable_agents(self._config)]
        asked = [name for name in names if name not in self._sleepers]
        states = dict.fromkeys(asked, UP) | await self._agents.unready(asked, READY_TIMEOUT_S)
        if self._sleepers:
            status = await self._router.status()
            states |= {name: state_of(name, status) for name in self._sleepers}
        return {name: states[name] for name in names}

    async def metrics(self) -> str:
        """Return the router's aggregate in the Prometheus text format."""
        return exposition(await self._router.status())

    async def trace(self, trace_id: str, key_hash: str | None) -> dict[str, Any] | None:
        """Return the trace of a query that the same key made; without a key, anybody's."""
        await self._kept(trace_id)
        try:
            found = await self._traces.get.remote(trace_id, key_hash)
        except RayError:
            return None
        return read_json(found, nan_is_null=True) if found else None

    def record(self, answered: AnsweredQuery, key_hash: str) -> None:
        """Keep the trace of an answered query and hand it to the feedback, after the reply."""
        query, answer = answered.query, answered.answer
        if answered.branched_at is not None:  # which `answer_here` has not seen
            self._metrics.count(answered.own)
        task = asyncio.get_running_loop().create_task(self._record(answered, key_hash))
        self._tasks[answer.trace_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(answer.trace_id, None))
        if may_be_explored(answered, key_hash, self._config.router):
            self._explorer.offer(lambda: self._explore(query, key_hash))

    async def _explore(self, query: Query, key_hash: str) -> None:
        again, hurried = asked_again(query, self._config.router.guards.held_back), self._explorer.hurried
        try:
            async with aclosing(self._exploring.ask(again, "exploring")) as events:
                async for event in events:
                    if isinstance(event, Answer):
                        self._metrics.count_calls(event)
                        explored = AnsweredQuery(query=again, answer=event, metadata={"explores": query.trace_id})
                        await self._record(explored, key_hash)
        except DmoaError as error:
            _LOG.info("exploring query %s: %s", query.trace_id, error)
        self._metrics.count_hurried(self._explorer.hurried - hurried)

    async def judge(self, outcome: KeptOutcome, key_hash: str) -> Said:
        """Keep what the key that made a query says of it. Raises RequestError."""
        if self._feedback is None:
            raise RequestError("outcomes: this server keeps none (router.feedback is off)", code="feedback_off", status=404)
        await self._kept(outcome.trace_id)
        return await self._feedback.judge(outcome, key_hash)

    async def _kept(self, trace_id: str) -> None:
        """Wait for the record of a query that was answered here: a client may be quicker than it."""
        pending = self._tasks.get(trace_id)
        if pending is not None:
            await asyncio.wait({pending})

    async def _record(self, answered: AnsweredQuery, key_hash: str) -> None:
        trace_id = answered.answer.trace_id
        by = self._answered_elsewhere.pop(trace_id, self._fingerprint)
        try:
            await self._outbox.put(replace(answered, pool=self.pool, fingerprint=by), key_hash)
        except RayError as error:
            _LOG.warning("trace %s was lost: %s", trace_id, type(error).__name__)


class Observatory:
    """What the page of a server reads and does, over the actors of its app; implements `service.PageService`."""

    def __init__(self, *, traces: Any, router: RemoteRouter, actor: Any, swarm: Swarm) -> None:
        """`traces` and `actor` are the trace store's and the router's handles."""
        self._traces = traces
        self._router = router
        self._actor = actor
        self._swarm = swarm
        self._agents = swarm.config.agent_names

    async def status(self) -> dict[str, Any] | None:
        """Return the router's account of itself; None while it is away."""
        found = await self._router.status()
        return None if found is None else asdict(found)

    async def statistics(self, key_hash: str | None) -> list[AgentStatistics]:
        """Return what the agents did in the traces of a key."""
        try:
            return await self._traces.statistics.remote(self._agents, key_hash)
        except RayError:
            return []

    async def traces(self, wanted: TraceFilter, key_hash: str | None) -> TracePage:
        """Return a page of the traces of a key. Raises RequestError (503) while the store is away: it does not have none."""
        try:
            return await self._traces.listed.remote(wanted, key_hash)
        except RayError as error:
            raise RequestError(TRACES_AWAY, code="traces_away", status=503) from error

    async def gates(self) -> dict[str, Any]:
        """Return the current gate and the history. Raises NoAgentError while the router is away."""
        history, status = await self._ask("history"), await self._ask("status")
        return {"current": status.gate_version, "history": history}  # the last entry may be of an offer that was refused

    async def rollback(self, version: str | None, note: str) -> dict[str, Any]:
        """Make an earlier gate current again. Raises RequestError where there is none such."""
        return await self._ask("rollback", version, note)

    async def what_if(self, trace: Trace, *, gate_version: str | None, policy: str | None) -> list[DecidedStep]:
        """Decide every step of a trace again. Raises RequestError."""
        if gate_version is not None:
            return await by_gate(trace, self._router, gate_version)
        return await by_policy(trace, self._swarm, policy or "")

    def branch(
        self, trace: Trace, trace_id: str, *, step: int, policy: str | None, agents: tuple[str, ...]
    ) -> tuple[Query, AsyncGenerator[Event]]:
        """Return the query that goes on from before a step of a trace, and its events. Raises RequestError."""
        return branch(trace, self._swarm, trace_id, step=step, policy=policy, agents=agents)

    def failed(self, summary: TraceSummary, key_hash: str) -> None:
        """Keep the summary of a query that was not answered."""
        with suppress(RayError):
            self._traces.put_failed.remote(summary.model_dump_json(), key_hash)

    async def _ask(self, method: str, *arguments: object) -> Any:
        try:
            return await getattr(self._actor, method).remote(*arguments)
        except RayTaskError as error:
            if isinstance(error.cause, CheckpointError):
                raise RequestError(f"version: {error.cause}", param="version", code="unknown_version", status=404) from error
            raise
        except RayError as error:
            raise NoAgentError(AWAY) from error


async def _ask_ingress(answer: Any, query: Query, policy: str, agent: str | None) -> AsyncGenerator[str | Event]:
    """Yield what a running ingress yields for a query. Raises its errors; PoolChangedError where it is lost, or is too late."""
    responses = ask(answer, query, policy, agent).response
    is_done = False
    try:
        async with asyncio.timeout(query.limits.deadline_s or PATIENCE_S):
            first = await anext(responses)  # the fingerprint, which is there at once
        yield first
        async for event in responses:
            is_done = isinstance(event, Answer)
            yield event
    except RayTaskError as error:
        is_done = True
        raise (error.cause if isinstance(error.cause, DmoaError) else error) from None
    except TimeoutError as error:
        raise PoolChangedError("no ingress took the query where it began again") from error
    except REPLICA_LOST_ERRORS as error:
        is_done = True  # to cancel it now could raise the same error again
        raise PoolChangedError(f"the ingress where it began again was lost ({type(error).__name__})") from error
    finally:
        if not is_done:
            responses.cancel()


def build_app(
    config: Config,
    *,
    key_hashes: tuple[str, ...] = (),
    is_ingress_on_head: bool = False,
    mark: str = "",
    policy_files: tuple[str, ...] = (),
    admin_hashes: tuple[str, ...] = (),
) -> Any:
    """Return the bound Serve application of a pool; with `is_ingress_on_head` its ingress runs on the cluster's head alone.

    A query is lost with its ingress: where the proxy is on the head alone, that keeps it from depending on a second node. By
    `mark` a launch knows its own server. `policy_files` are policies as FILE.py:NAME, with paths that every node has. Raises
    ConfigError for a model or an adapter that is not there and for a vLLM that is not installed, CheckpointError for a
    checkpoint of another pool.
    """
    check_files(config)
    check_vllm(config)
    configured = _configured_version(config)
    actor: dict[str, Any] = {"num_cpus": 0} | ({"resources": {_HEAD: 0.001}} if is_ingress_on_head else {})
    options = {
        "name": INGRESS,
        "num_replicas": config.server.ingress_replicas,
        "ray_actor_options": actor,
        # Above what it lets in: what Serve held back would be refused by nobody, and probes would wait behind it.
        "max_ongoing_requests": 1000 + 2 * config.limits.max_queued_requests,
        "health_check_period_s": 0.5,  # where it listens itself nothing else tells Serve that it died; by default 10
        "graceful_shutdown_timeout_s": query_drain_s(config.limits.deadline_s),
    }
    ingress = serve.deployment(serve.ingress()(SwarmIngress)).options(**options)
    hosts = bind_hosts(config)
    encoder = bind_encoder(config)
    return ingress.bind(config.model_dump_json(), key_hashes, configured, encoder, hosts, mark, admin_hashes, policy_files)


def _configured_version(config: Config) -> str | None:
    """Check the configured checkpoint against the pool, before anything is deployed, and return its version."""
    if not config.gate.checkpoint:
        return None
    from dmoa import checkpoint

    _, record = checkpoint.load(config.gate.checkpoint)
    checkpoint.check_pool(record, fingerprint=fingerprint(config), agents=config.agent_names, preset=config.gate.preset)
    return record.version
