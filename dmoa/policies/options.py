"""Parameters of policies, as `NAME:key=value:key=value` gives them, and what policies with a set schedule share.

Every such policy asks the agents that its `agents` names, the whole pool unless told. A query with stages runs one step a
stage, so there a policy asks as at its own first step, and the answer most agents agree on is the stage's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from dmoa.core.aggregate import contributions
from dmoa.errors import RequestError
from dmoa.protocols import Policy, ended
from dmoa.types import Activation, AgentReply, Fold, QueryState, StepPlan, StepRecord, Stop, StopReason
from dmoa.validation import describe, did_you_mean


def _split(value: Any) -> Any:
    return tuple(part for part in value.split("+") if part) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Several names, written A+B+C."""
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
Count = Annotated[int, Field(ge=1, le=64)]
_SAMPLED = 0.7
_ROLES = ("aggregator", "judge", "manager", "rater", "recruiter")
"""Parameters that name one agent; None: the first of `agents`. A policy has one of them at most."""


class PolicyOptions(BaseModel):
    """Parameters that every policy of a set schedule has."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    agents: Names = Field(default=(), min_length=1)
    """Agents that take part, in this order; none named: the whole pool."""

    @field_validator("agents")
    @classmethod
    def _differ(cls, agents: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(agents)) < len(agents):
            raise ValueError("one agent stands there twice; name each once")
        return agents

    @classmethod
    def of(cls, policy: str, words: str | None, pool: tuple[str, ...]) -> Self:
        """Return the parameters that `key=value:key=value` gives, with all agents of the pool where none is named.

        A word without `=` is the one agent that takes part. Raises RequestError naming the parameter.
        """
        given: dict[str, str] = {}
        for word in filter(None, (words or "").split(":")):
            key, mark, value = word.partition("=")
            key, value = (key, value) if mark else ("agents", key)
            if key in given:
                raise RequestError(f"policy: {policy}: {key} is given twice, {given[key]!r} and {value!r}; give it once")
            given[key] = value
        try:
            options = cls.model_validate({"agents": pool} | given)
        except ValidationError as error:
            raise RequestError(f"policy: {policy}: {describe(error, cls)}; written {policy}:name=value") from None
        for name in options.named:
            if name not in pool:
                seen = f"{name!r} is not in the pool; expected some of {', '.join(pool)}"
                raise RequestError(f"policy: {policy}: {seen}; name one of them{did_you_mean(name, pool)}")
        return options

    def check_pool(self, config: Any) -> None:
        """Raise RequestError where the pool of this `Config` cannot do what they ask."""

    @property
    def named(self) -> tuple[str, ...]:
        """Every agent that the parameters name: those that take part, and who has a role of its own."""
        return (*self.agents, *(name for role in _ROLES if (name := getattr(self, role, None))))

    @property
    def lead(self) -> str:
        """Who has the role of its own, or comes first."""
        return (*self.named[len(self.agents) :], *self.agents)[0]

    @property
    def width(self) -> int:
        """Most agents that one step asks at once."""
        return len(self.agents)


class OneOptions(PolicyOptions):
    """Parameters of policies that ask one agent at a time."""

    @property
    def width(self) -> int:
        """One agent is asked at a time."""
        return 1


class SampledOptions(PolicyOptions):
    """Parameters of policies that take several samples of one agent: the first of `agents`."""

    temperature: Temperature = _SAMPLED
    """Of the samples; at 0 they are all the same."""
    k: Count = 5
    """Samples."""

    @property
    def width(self) -> int:
        """All samples are taken at once."""
        return self.k


class Wrapping:
    """Base of policies around another one."""

    _policy: Policy

    def ended(self, state: QueryState) -> str:
        """Return what the other policy makes of a query that is over."""
        return ended(self._policy, state)


class Staged(Wrapping):
    """Any policy that knows no stages, over queries that have some too."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def name(self) -> str:
        """The policy's own name."""
        return self._policy.name

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Return the policy's plan; at a stage the plan of its first step, whose agents see what the stage lets them see.

        Raises RequestError where that step writes no answer.
        """
        if not state.query.stages:
            return await self._policy.next_step(state)
        if state.stage is None:
            return Stop(reason="stages")
        asked = replace(state.query, text=state.asked, stages=())
        plan = await self._policy.next_step(replace(state, query=asked, steps=()))
        if isinstance(plan, Stop):
            return plan
        if plan.fold == "keep":
            raise RequestError(
                f"policy: {self.name!r} writes no answer at its first step, and a query with stages asks each stage as that; "
                "expected one that does; use another policy"
            )
        activations, reserves = (tuple(replace(x, history=None) for x in found) for found in (plan.activations, plan.reserves))
        fold: Fold = "vote" if len(activations) > 1 else "pass"
        return replace(plan, activations=activations, reserves=reserves, fold=fold, ends_with=None)


def ask(agents: Iterable[str], **changes: Any) -> tuple[Activation, ...]:
    """Return activations that differ in their agent alone; an agent that comes again is a further sample of it."""
    found, samples = list[Activation](), Counter[str]()
    for agent in agents:
        found.append(Activation(agent=agent, sample=samples[agent], **changes))
        samples[agent] += 1
    return tuple(found)


def ask_one(
    agents: Iterable[str], agent: str, *, fold: Fold = "pass", ends_with: StopReason | None = None, **changes: Any
) -> StepPlan:
    """Return a step of one agent; for it all others of `agents` stand in, in their order, asked the same."""
    reserves = ask((name for name in agents if name != agent), **changes)
    return StepPlan(activations=ask([agent], **changes), reserves=reserves, fold=fold, ends_with=ends_with)


def said(step: StepRecord) -> tuple[AgentReply, ...]:
    """Return the contributions of a step in the order in which agents were asked."""
    return tuple(contributions(step.replies))


def texts(step: StepRecord) -> tuple[str, ...]:
    """Return what agents contributed to a step, without their names."""
    return tuple(reply.text for reply in said(step))
