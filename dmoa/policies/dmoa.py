"""The DMoA policy: a recurrent gate reads the query and the state so far, and activates a sparse, adaptive set.

Source: paper (recurrent router, top-mass activation); embedding query and summary apart, the feedback features and
the reserves are ours.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from dmoa.core.features import FEEDBACK_FEATURES, feedback, gate_input
from dmoa.errors import RequestError
from dmoa.policies.registry import PolicyContext, policy
from dmoa.protocols import Encoder, Router
from dmoa.types import Activation, FloatArray, QueryState, RouteDecision, RouteRequest, StepPlan, StepRecord, Stop
from dmoa.validation import did_you_mean


@policy(
    "dmoa",
    "The recurrent gate activates a sparse, adaptive set of agents at every step.",
    width=lambda config: min(config.gate.activation.max_agents, len(config.agents)),
    cost="steps * max_agents at most",
    reads="max_agents * steps * (steps - 1) / 2 at most",
    first_step_only=True,
)
def build_dmoa(context: PolicyContext) -> DmoaPolicy:
    """Return the policy over the router's current gate, or over the one that is named. Raises RequestError for an unknown one."""
    if context.agent is None:
        return DmoaPolicy(router=context.router, encoder=context.encoder, preset=context.config.gate.preset)
    gate = context.gates.get(context.agent)
    if gate is None:
        allowed = ", ".join(context.gates) or "none"
        raise RequestError(
            f"policy: dmoa:{context.agent} is not a gate of this swarm, which has {allowed}; give the gate, or leave its name out"
            f"{did_you_mean(context.agent, context.gates)}"
        )
    return DmoaPolicy(router=context.router, encoder=context.encoder, preset=gate.preset, gate_version=gate.version)


class DmoaPolicy:
    """Asks the agents that the gate activates; those ranked next stand in for lost ones."""

    name = "dmoa"

    def __init__(
        self, *, router: Router, encoder: Encoder, preset: Literal["default", "paper"], gate_version: str | None = None
    ) -> None:
        """`gate_version`: the version to begin with; None: the router's current one."""
        self._gate_version = gate_version
        self._router = router
        self._encoder = encoder
        self._preset = preset

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Embed the state, ask the router, and plan the activated agents."""
        last = state.steps[-1] if state.steps else None
        previous = last.decision if last else None
        lost = _failed(last) if last else set()
        request = RouteRequest(
            input_X=await self._input(state),
            hidden_H=previous.hidden_H if previous else None,
            gate_version=previous.gate_version if previous else self._gate_version,
            max_agents=state.query.limits.max_agents,
            unavailable=tuple(sorted(lost)) if previous and len(lost) < len(previous.agents) else (),
            trace_id=state.query.trace_id,
        )
        return _plan(await self._router.route(request), request)

    async def _input(self, state: QueryState) -> FloatArray:
        query, summary = state.query.text, _observation(state)
        if self._preset == "paper":
            text = f"{query}\n\n{summary}" if summary else query
            (context_D,) = await self._encoder.embed([text])
            return gate_input("paper", context_D, context_D, np.zeros(FEEDBACK_FEATURES, dtype=np.float32))
        query_D, summary_D = await self._encoder.embed([query, summary])
        return gate_input("default", query_D, summary_D, _feedback(state))


def _observation(state: QueryState) -> str:
    """What the gate reads beside the query: the summary, or what the step's stage puts in its place."""
    stage = state.stage
    return state.summary if stage is None or stage.observation is None else stage.observation


def _feedback(state: QueryState) -> FloatArray:
    """Return what the gate reads of the last step: F zeros before the first. Its K is that of the version that decided."""
    last = state.steps[-1] if state.steps else None
    if last is None or last.decision is None:
        return feedback([], 0, 1, 0.0)
    entropies = [
        reply.entropy.mean_nats
        for reply in last.replies
        if reply.agent in last.active and reply.status != "examiner" and not reply.is_barred
        if reply.entropy.mean_nats is not None
    ]
    return feedback(entropies, len(last.active), last.decision.max_agents, _budget_share(state))


def _failed(step: StepRecord) -> set[str]:
    """Return the agents that failed; explored ones count for nothing."""
    explored = {name for name, _ in step.explored}
    return {reply.agent for reply in step.replies if reply.status == "failed"} - explored


def _plan(decision: RouteDecision, request: RouteRequest) -> StepPlan:
    probabilities, agents = decision.probability_A.tolist(), decision.agents
    ranked = [Activation(agent=agents[index], probability=probabilities[index]) for index in decision.ranking]
    return StepPlan(
        activations=tuple(ranked[: decision.k]),
        reserves=tuple(ranked[decision.k :]),
        mass=decision.mass,
        decision=decision,
        route=request,
    )


def _budget_share(state: QueryState) -> float:
    """Share of the query's budget that is used: the larger of steps and tokens, 0..1."""
    limits = state.query.limits
    steps = len(state.steps) / limits.max_steps
    tokens = state.tokens_used / limits.budget_tokens if limits.budget_tokens else 0.0
    return min(1.0, max(steps, tokens))
