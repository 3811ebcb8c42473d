"""Every policy by name: what `POOL/NAME` and `--policy NAME` may say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, Field, InstanceOf, ValidationError

from dmoa.config import Config
from dmoa.core.features import Preset
from dmoa.errors import DmoaError, PluginError, RequestError
from dmoa.plugins import Registry, home_of
from dmoa.policies.options import PolicyOptions, Staged
from dmoa.protocols import Encoder, Policy, Router, ended
from dmoa.types import Activation, Fold, QueryState, RouteDecision, RouteRequest, StepPlan, Stop, StopReason
from dmoa.validation import describe, did_you_mean, short

_LOG = logging.getLogger("dmoa.policies")


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
    options: Any = None
    """For policies with parameters their checked record, whose `agents` are those that take part; None for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEntry:
    """One policy: its name, one sentence, and how it is built for a query."""

    name: str
    summary: str
    build: Callable[[PolicyContext], Policy]
    width: Callable[[Config], int] = lambda config: len(config.agents)
    """Most agents that one of its steps asks at once; evaluation lets in as many queries as engines have room for."""
    options: type[PolicyOptions] | None = None
    """Its parameters, as in `moa:layers=3:temperature=0.7`; None: it has none."""
    cost: str = ""
    """Calls of one query, a formula of A agents and the parameters; empty: not told."""
    reads: str = ""
    """Earlier texts that the prompts of one query hold together, a formula as `cost`."""
    first_step_only: bool | None = None
    """Whether it asks each agent the query alone, once: what a pool of recorded replies can answer. None: seen at each step."""
    answers_at_once: bool = True
    """Whether its first step writes an answer, which is what it is asked for at every stage of a query that has some."""

    def options_of(self, words: str | None, config: Config) -> PolicyOptions:
        """Return the parameters that `words` name, of a policy that has some. Raises RequestError."""
        assert self.options is not None, self.name
        return self.options.of(self.name, words, config.agent_names)


POLICIES: Registry[PolicyEntry] = Registry(
    PolicyEntry,
    what="policy",
    group="dmoa.policies",
    builtin={
        "dmoa": "dmoa.policies.dmoa:build_dmoa",
        "single": "dmoa.policies.baselines:build_single",
        "dense": "dmoa.policies.baselines:DensePolicy",
        "random": "dmoa.policies.baselines:RandomPolicy",
        "selector": "dmoa.policies.baselines:build_selector",
        **{name: f"dmoa.policies.voting:{name}" for name in ("cot", "self_consistency", "best_of_n", "majority_k")},
        **{name: f"dmoa.policies.layers:{name}" for name in ("moa", "self_moa", "self_moa_seq", "smoa", "fusion")},
        "exploring": "dmoa.policies.exploring:build_exploring",
        **{name: f"dmoa.policies.graphs:build_{name}" for name in ("chain", "tree", "star", "complete", "random_graph")},
        "debate": "dmoa.policies.debate:debate",
        "refine": "dmoa.policies.debate:refine",
        "group_chat": "dmoa.policies.debate:GroupChatPolicy",
        "escalate": "dmoa.policies.adaptive:escalate",
        "elastic": "dmoa.policies.adaptive:ElasticPolicy",
        "symbolic": "dmoa.policies.adaptive:SymbolicPolicy",
        "random_router": "dmoa.policies.routers:RandomRouter",
        "bandit": "dmoa.policies.routers:BanditRouter",
        "knn_router": "dmoa.policies.routers:KnnRouter",
        "linear_router": "dmoa.policies.routers:LinearRouter",
        "kmeans": "dmoa.policies.routers:KmeansRouter",
        "mcts": "dmoa.policies.mcts:MctsPolicy",
        "capacity_aware": "dmoa.policies.rosters:CapacityPolicy",
        "knapsack": "dmoa.policies.rosters:KnapsackPolicy",
        "free_agency": "dmoa.policies.rosters:FreeAgencyPolicy",
        "gptswarm": "dmoa.policies.learned_graphs:GptswarmPolicy",
        "g_designer": "dmoa.policies.learned_graphs:GDesignerPolicy",
    },
)


EXPLORING = "exploring"
"""The policy that reads a query's epsilon."""


def split_policy(policy: str) -> tuple[str, str | None]:
    """Return a policy's name, and what follows it: the agent of `single:NAME`, the gate of `dmoa:NAME`, or its parameters."""
    name, mark, words = policy.partition(":")
    return name, words if mark else None


def width_of(policy: str, config: Config) -> int:
    """Return the most agents that one step of a policy asks at once, with the parameters that its name holds."""
    name, words = split_policy(policy)
    entry = POLICIES[name]
    return entry.options_of(words, config).width if entry.options else entry.width(config)


LONGEST_SCHEDULE = 4200
"""More steps than any policy of ours plans: `chain` has 4,096 in the largest pool."""


def _innermost(policy: str) -> str:
    """Return the name of the policy that one wraps, which says how far it goes; its own where it wraps none."""
    name, words = split_policy(policy)
    options = POLICIES[name].options if name in POLICIES else None
    inner = options.model_fields.get("inner") if options else None
    given = dict(word.partition("=")[::2] for word in (words or "").split(":"))
    return name if inner is None else _innermost(str(given.get("inner", inner.default)))


def has_schedule(policy: str) -> bool:
    """Tell whether a policy plans its own end, so that limits on steps can only cut it."""
    name = _innermost(policy)
    return name in POLICIES and POLICIES[name].options is not None


def can_do_stages(policy: str) -> bool:
    """Tell whether a policy can answer a query with stages, as far as is known."""
    name = _innermost(policy)
    return name not in POLICIES or POLICIES[name].answers_at_once


def is_gated(policy: str) -> bool:
    """Tell whether a policy may read a query's limit on agents, which is the gate's.

    The other policies of ours ask as many agents as their parameters say; of a policy of somebody else's it is not known.
    """
    name = _innermost(policy)
    return name in ("dmoa", EXPLORING) or name not in POLICIES.builtin


def needs_labels(name: str) -> bool:
    """Tell whether a policy learns from a file of judged replies that must be given."""
    options = POLICIES[name].options
    return options is not None and any(of.is_required() for field, of in options.model_fields.items() if field != "agents")


def check_words(entry: PolicyEntry, words: str | None, config: Config) -> PolicyOptions | None:
    """Return the parameters of a policy, None where it has none.

    Raises RequestError for parameters that cannot be, of the policy itself or one that it wraps, and where agents with recorded
    replies would be asked more than the query, once.
    """
    options = entry.options_of(words, config) if entry.options else None
    if options is not None:
        options.check_pool(config)
    wrapped = getattr(options, "inner", None)
    if isinstance(wrapped, str):
        if wrapped not in POLICIES:
            known = f"{wrapped!r} is not known; expected one of {', '.join(POLICIES)}{did_you_mean(wrapped, POLICIES)}"
            raise RequestError(f"policy: {entry.name}: inner: {known}")
        check_words(POLICIES[wrapped], None, config)
    if entry.first_step_only is not False:
        return options
    asked = options.named if options else config.agent_names
    recorded = next((x.name for x in config.agents if x.name in asked and config.llms[x.llm].engine_entry.is_recorded), None)
    if recorded is not None:
        fit = ", ".join(name for name in POLICIES.builtin if POLICIES[name].first_step_only)
        raise RequestError(
            f"policy: {entry.name!r} asks agents more than the query alone, and the replies of {recorded} are recorded, one to "
            f"each query; expected one of {fit}; name one of these, or use a pool whose engines generate"
        )
    return options


_KNOW_STAGES = frozenset(("dmoa", "exploring", "single", "dense", "random"))
"""Policies that ask for as many steps as a query has stages, each as its stage wants."""
Build = TypeVar("Build", bound=Callable[[PolicyContext], Policy])


def policy(
    name: str,
    summary: str,
    *,
    width: Callable[[Config], int] = lambda config: len(config.agents),
    options: type[PolicyOptions] | None = None,
    cost: str = "",
    reads: str = "",
    first_step_only: bool | None = None,
    answers_at_once: bool = True,
) -> Callable[[Build], Build]:
    """Enter a policy, its class, built from a `PolicyContext`, or a function that builds it, with what its `PolicyEntry` says."""
    about = partial(PolicyEntry, name=name, summary=summary, width=width, options=options, cost=cost, reads=reads)

    def enter(build: Build) -> Build:
        return POLICIES.add(about(build=build, first_step_only=first_step_only, answers_at_once=answers_at_once), build)

    return enter


Schedule = Callable[[Any, QueryState], StepPlan | Stop]
"""What a policy of a set schedule is: its next step, by its parameters and the state."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A policy of a set schedule, for one query."""

    name: str
    options: PolicyOptions
    schedule: Schedule

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Return what the schedule says."""
        return self.schedule(self.options, state)


def scheduled(
    name: str, summary: str, *, options: type[PolicyOptions], cost: str, reads: str, first_step_only: bool = False
) -> Callable[[Schedule], Callable[[PolicyContext], Policy]]:
    """Enter a policy of a set schedule, with what its `PolicyEntry` says."""

    def enter(schedule: Schedule) -> Callable[[PolicyContext], Policy]:
        @policy(name, summary, options=options, cost=cost, reads=reads, first_step_only=first_step_only)
        @wraps(schedule)
        def build(context: PolicyContext) -> Policy:
            return Scheduled(name, context.options, schedule)

        return build

    return enter


def build_policy(name: str, context: PolicyContext) -> Policy:
    """Return a policy, built for one query; never runs a file. Raises RequestError for an unknown name, and PluginError."""
    if name not in POLICIES:
        raise RequestError(
            f"policy: {name!r} is not known; expected one of {', '.join(POLICIES)}{did_you_mean(name, POLICIES)}",
            param="dmoa.policy",
            code="unknown_policy",
        )
    built = built_from(POLICIES[name], replace(context, options=check_words(POLICIES[name], context.agent, context.config)))
    return built if name in _KNOW_STAGES else Staged(built)


def built_from(entry: PolicyEntry, context: PolicyContext) -> Policy:
    """Return the policy of an entry, whose mistakes, where it is not dmoa's own, are PluginErrors."""
    return entry.build(context) if entry.name in POLICIES.builtin else PluginPolicy(entry, context)


def _in_bounds(asked: Activation) -> Activation:
    """Refuse numbers that no engine takes, or nothing can be learnt from."""
    if asked.temperature is not None and not 0.0 <= asked.temperature <= 2.0:
        raise ValueError(f"temperature is {asked.temperature}; expected a number from 0 to 2")
    if not 0.0 < asked.propensity <= 1.0:
        raise ValueError(f"propensity is {asked.propensity}; expected a number above 0, 1 at most")
    return asked


_Asked = Annotated[Activation, AfterValidator(_in_bounds)]


class _Planned(BaseModel):
    """What a plan asks, whose records anybody may have filled."""

    activations: tuple[_Asked, ...]
    reserves: tuple[_Asked, ...]
    explored: tuple[_Asked, ...]
    quorum: int | None = Field(ge=1)
    mass: float = Field(allow_inf_nan=False)
    decision: InstanceOf[RouteDecision] | None
    route: InstanceOf[RouteRequest] | None


def _plain(value: object) -> object:
    if not isinstance(value, list | tuple):
        return value
    return [{name: getattr(x, name) for name in Activation.__slots__} if isinstance(x, Activation) else x for x in value]


class PluginPolicy:
    """A policy that is not dmoa's own; its mistakes are one message that names policy, file and step."""

    def __init__(self, entry: PolicyEntry, context: PolicyContext) -> None:
        """Build the policy. Raises PluginError where that fails, or where it is not a `Policy`."""
        self._entry = entry
        self._agents = context.config.agent_names
        try:
            self._policy = entry.build(context)
        except DmoaError:
            raise
        except Exception as error:  # code of others
            raise self._raised("building it", error) from error
        if not isinstance(getattr(self._policy, "name", None), str):
            raise self._error(f"it has no `name`; write `name = {entry.name!r}` in its class")
        if not callable(getattr(self._policy, "next_step", None)):
            raise self._error("it has no `next_step`; write `async def next_step(self, state)` in its class")

    @property
    def name(self) -> str:
        """The policy's own name."""
        return self._policy.name

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Return what the policy says. Raises PluginError where it fails, or says what no policy may."""
        where = f"next_step of step {len(state.steps) + 1}"
        try:
            plan = await self._policy.next_step(state)
        except DmoaError:
            raise
        except Exception as error:  # code of others
            raise self._raised(where, error) from error
        if isinstance(plan, Stop):
            self._check_word(where, "reason", plan.reason, get_args(StopReason))
            return plan
        if not isinstance(plan, StepPlan) or not plan.activations:
            raise self._error(f"{where} is {short(plan)}; expected a Stop, or a StepPlan that asks somebody")
        self._check_word(where, "fold", plan.fold, get_args(Fold))
        self._check_word(where, "ends_with", plan.ends_with, (*get_args(StopReason), None))
        try:
            planned = dict(_Planned.model_validate({name: _plain(getattr(plan, name)) for name in _Planned.model_fields}))
        except ValidationError as error:
            raise self._error(f"{where}: {describe(error)}; mend the plan") from None
        asked = [*planned["activations"], *planned["explored"]]
        unknown = [x.agent for x in dict.fromkeys((*asked, *planned["reserves"])) if x.agent not in self._agents]
        if unknown:
            seen, allowed = ", ".join(map(repr, dict.fromkeys(unknown))), ", ".join(self._agents)
            raise self._error(
                f"{where}: agent {seen} is not in the pool; expected {allowed}{did_you_mean(unknown, self._agents)}"
            )
        if len({(x.agent, x.sample) for x in asked}) < len(asked):  # else calls of one id, which draw the same words
            asked = [replace(x, sample=sum(y.agent == x.agent for y in asked[:i])) for i, x in enumerate(asked)]
            count = len(planned["activations"])
            planned |= {"activations": tuple(asked[:count]), "explored": tuple(asked[count:])}
        return replace(plan, **planned)

    def ended(self, state: QueryState) -> str:
        """Return the answer that the policy makes of a query that is over. Raises PluginError where that fails."""
        try:
            text = ended(self._policy, state)
        except Exception as error:  # code of others
            raise self._raised("ended", error) from error
        if not isinstance(text, str):
            raise self._error(f"ended is {short(text)}; expected the answer, a text")
        return text

    def _check_word(self, where: str, name: str, value: object, allowed: Sequence[str | None]) -> None:
        if value not in allowed:
            nearest = did_you_mean(value, filter(None, allowed)) if isinstance(value, str) else ""
            words = ", ".join(map(str, allowed))
            raise self._error(f"{where}: {name} is {short(value)}; expected {words}; write one of these{nearest}")

    def _raised(self, where: str, error: Exception) -> PluginError:
        _LOG.info("policy %s: %s failed", self._entry.name, where, exc_info=error)
        return self._error(f"{where} raised {error!r}; mend it, -v shows where")

    def _error(self, text: str) -> PluginError:
        file = POLICIES.references([self._entry.name]) or (home_of(self._entry.build),)
        return PluginError(f"policy {self._entry.name!r} ({file[0]}): {text}")
