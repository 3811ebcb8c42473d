"""What else could have been: a recorded query decided again by another gate or policy, and the branch from one of its steps.

Deciding again asks no agent: the gate reads the inputs that were recorded, a policy the steps that were finished.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

import numpy as np

from dmoa.errors import RequestError, RoutingError
from dmoa.orchestrator import advance, begin
from dmoa.protocols import Router
from dmoa.swarm import Swarm
from dmoa.trace import ReplyModel, Trace, answer_of_trace, query_of_trace
from dmoa.types import Event, FloatArray, Query, RouteDecision, RouteRequest, Stop
from dmoa.validation import did_you_mean


class AgentChance(ReplyModel):
    """One agent in a decision."""

    agent: str
    probability: float


class DecidedStep(ReplyModel):
    """One recorded step, decided again."""

    step: int
    asked: list[str]
    """Whose replies counted, as recorded."""
    would_ask: list[str]
    """Whom the other gate or policy would have asked; nobody where it would have stopped."""
    probabilities: list[AgentChance]
    """All agents by the other gate, or those that the policy names, most probable first."""


async def by_gate(trace: Trace, router: Router, version: str) -> list[DecidedStep]:
    """Decide every step of a trace by another gate version, from the recorded inputs and the version's own states.

    Raises RequestError (404) for a version that the router does not keep, and (400) for a trace without a gate's inputs.
    """
    if not trace.routes:
        raise RequestError("gate_version: no gate decided this query; choose a policy", param="gate_version", code="no_gate")
    recorded, found = {step.step: step for step in answer_of_trace(trace).steps}, list[DecidedStep]()
    hidden_H: FloatArray | None = None
    for route in trace.routes:
        request = RouteRequest(
            input_X=np.asarray(route.input_X, np.float32),
            hidden_H=hidden_H,
            gate_version=version,
            max_agents=route.max_agents,
            unavailable=tuple(route.masked),
        )
        with _known_versions():
            decision = await router.route(request)
        hidden_H = decision.hidden_H
        found.append(_decided(route.step, recorded[route.step].active, decision))
    return found


@contextmanager
def _known_versions() -> Iterator[None]:
    """Raise RequestError for a gate version that is not kept any more."""
    try:
        yield
    except RoutingError as error:
        raise RequestError(f"gate_version: {error}", param="gate_version", code="unknown_version", status=404) from error


def _decided(step: int, asked: tuple[str, ...], decision: RouteDecision) -> DecidedStep:
    chances = [
        AgentChance(agent=decision.agents[place], probability=round(float(decision.probability_A[place]), 6))
        for place in decision.ranking
    ]
    return DecidedStep(
        step=step, asked=list(asked), would_ask=[one.agent for one in chances[: decision.k]], probabilities=chances
    )


async def by_policy(trace: Trace, swarm: Swarm, name: str) -> list[DecidedStep]:
    """Ask a policy at every recorded state of a query whom it would ask next. Raises RequestError for an unknown policy."""
    policy, state = swarm.policy(name, _agent_of(trace, swarm, name)), begin(query_of_trace(trace, trace.trace_id))
    found = []
    for step in answer_of_trace(trace).steps:
        with _known_versions():
            plan = await policy.next_step(state)
        activations = () if isinstance(plan, Stop) else (*plan.activations, *plan.reserves)
        chances = [AgentChance(agent=one.agent, probability=round(one.probability, 6)) for one in activations]
        asked = [] if isinstance(plan, Stop) else [one.agent for one in plan.activations]
        found.append(DecidedStep(step=step.step, asked=list(step.active), would_ask=asked, probabilities=chances))
        state = advance(state, step)
    return found


def branch(
    trace: Trace, swarm: Swarm, trace_id: str, *, step: int, policy: str | None, agents: tuple[str, ...]
) -> tuple[Query, AsyncGenerator[Event]]:
    """Return a query that goes on from before a step of a trace, under a new id, and its events.

    `policy` None: the recorded one; `agents`: whom the step asks in place of the policy's choice. Raises RequestError.
    """
    steps = answer_of_trace(trace).steps
    if step >= len(steps):
        raise RequestError(f"step is {step}; expected at most {len(steps) - 1}, the last one", param="step", code="invalid_value")
    for name in agents:
        if name not in swarm.config.agent_names:
            raise RequestError(
                f"agents: {name!r} is not in this pool{did_you_mean(name, swarm.config.agent_names)}",
                param="agents",
                code="unknown_agent",
            )
    query, name = query_of_trace(trace, trace_id), policy or _policy_of(trace)
    return query, _branched(swarm.branch(query, name, steps[:step], agents, agent=_agent_of(trace, swarm, name)))


async def _branched(events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """Yield what a branch comes to. Raises RequestError where the gate that decided the steps before it is not kept any more."""
    with _known_versions():
        async with aclosing(events):
            async for event in events:
                yield event


def _policy_of(trace: Trace) -> str:
    return trace.dmoa.policy.partition(":")[0]


def _agent_of(trace: Trace, swarm: Swarm, policy: str) -> str | None:
    """Return the agent that a query to one agent named, whose policy is asked again; a trace holds no more of it than its steps.

    None for other policies, and for the pool's first agent, whom `single` asks, with stand-ins, where none is named.
    """
    if policy != "single" or _policy_of(trace) != policy:
        return None
    answered, others = next(iter(answer_of_trace(trace).steps[0].active), None), swarm.config.agent_names[1:]
    return answered if answered in others else None
