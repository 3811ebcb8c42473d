"""Every policy by name: what `POOL/NAME` and `--policy NAME` may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dmoa.config import Config
from dmoa.core.features import Preset
from dmoa.errors import RequestError
from dmoa.policies.baselines import DensePolicy, RandomPolicy, SelectorPolicy, SinglePolicy
from dmoa.policies.dmoa import DmoaPolicy
from dmoa.protocols import Encoder, Policy, Router
from dmoa.validation import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedGate:
    """A gate that the router holds beside the current one, so that several can be compared in one run."""

    version: str
    preset: Preset


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContext:
    """What a policy may be built from."""

    config: Config
    router: Router
    encoder: Encoder
    agent: str | None = None
    """The agent that was named, for policies of one agent; for `dmoa` the name of a gate."""
    gates: Mapping[str, NamedGate] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEntry:
    """One policy: its name, one sentence, and how it is built for a query."""

    name: str
    summary: str
    build: Callable[[PolicyContext], Policy]
    width: Callable[[Config], int] = lambda config: len(config.agents)
    """Most agents that one of its steps asks at once; evaluation lets in as many queries as engines have room for."""


def _dmoa(context: PolicyContext) -> Policy:
    if context.agent is None:
        return DmoaPolicy(router=context.router, encoder=context.encoder, preset=context.config.gate.preset)
    gate = context.gates.get(context.agent)
    if gate is None:
        allowed = ", ".join(context.gates) or "none was given"
        raise RequestError(
            f"policy: dmoa:{context.agent}: allowed gates: {allowed}; give the gate, or leave its name out"
            f"{did_you_mean(context.agent, context.gates)}"
        )
    return DmoaPolicy(router=context.router, encoder=context.encoder, preset=gate.preset, gate_version=gate.version)


def _single(context: PolicyContext) -> Policy:
    names = context.config.agent_names
    if context.agent is not None:
        return SinglePolicy(agent=context.agent)
    return SinglePolicy(agent=names[0], stand_ins=names)


def _selector(context: PolicyContext) -> Policy:
    agents = context.config.agents
    return SelectorPolicy(chooser=context.agent or agents[0].name, profiles={agent.name: agent.profile for agent in agents})


POLICIES: dict[str, PolicyEntry] = {
    entry.name: entry
    for entry in (
        PolicyEntry(
            name="dmoa",
            summary="The recurrent gate activates a sparse, adaptive set of agents at every step.",
            build=_dmoa,
            width=lambda config: min(config.gate.activation.max_agents, len(config.agents)),
        ),
        PolicyEntry(
            name="single",
            summary="One agent answers once: the one named, or the pool's first.",
            build=_single,
            width=lambda config: 1,
        ),
        PolicyEntry(
            name="dense",
            summary="Every agent of the pool at every step.",
            build=lambda context: DensePolicy(agents=context.config.agent_names),
        ),
        PolicyEntry(
            name="random",
            summary="One agent a step, drawn evenly; repeats for the same query.",
            build=lambda context: RandomPolicy(agents=context.config.agent_names),
            width=lambda config: 1,
        ),
        PolicyEntry(
            name="selector",
            summary="The pool's first agent reads all profiles and names the one that answers.",
            build=_selector,
            width=lambda config: 1,
        ),
    )
}


def build_policy(name: str, context: PolicyContext) -> Policy:
    """Return the policy called `name`, built for one query. Raises RequestError for an unknown name."""
    entry = POLICIES.get(name)
    if entry is None:
        raise RequestError(
            f"policy: {name!r} is not known; allowed: {', '.join(POLICIES)}{did_you_mean(name, POLICIES)}",
            param="dmoa.policy",
            code="unknown_policy",
        )
    return entry.build(context)
