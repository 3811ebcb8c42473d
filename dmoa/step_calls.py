"""Decides whom a step asks next and how, from its plan, the replies so far and what is known of places.

No clock and no I/O: whether time is left, and whether text was handed on, come in as values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dmoa.core.aggregate import anchors_of, is_any_sure
from dmoa.core.defences import barred
from dmoa.core.in_step import judge
from dmoa.types import (
    Activation,
    AgentReply,
    ColdPolicy,
    Defence,
    Price,
    QueryState,
    RouteDecision,
    Sampling,
    StepPlan,
    TokenUsage,
)

MAX_MISSED = 16
"""Most masked agents of which a step waits for the first to be back."""


def should_escalate(decision: RouteDecision | None, replies: Sequence[AgentReply]) -> bool:
    """Tell whether the step should ask one agent more, given the replies that count so far.

    True where the gate version fitted theta, fewer than `decision.limit` agents replied, and no contribution is as sure
    as theta. Agents that were lost take no place of the limit. Source: ours (cf. arXiv 2403.07652).
    """
    if decision is None or decision.theta is None or not has_room(decision, replies):
        return False
    return not is_any_sure(replies, decision.theta, anchors_of(decision))


def has_room(decision: RouteDecision | None, replies: Sequence[AgentReply]) -> bool:
    """Tell whether the decision allows one contribution more; agents that were lost take no place."""
    return decision is not None and sum(reply.status == "ok" for reply in replies) < decision.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCard:
    """What the orchestrator must know of an agent to ask it."""

    name: str
    profile: str
    tools_text: str
    """How to call the agent's tools, part of its role prompt."""
    sampling: Sampling
    place: str
    """What dies together: the agent's own name in dedicated placement, else the LLM's."""
    cold: ColdPolicy = "wait"
    """What to do with the agent while its place has no replica."""
    is_recorded: bool = False
    """Whether its engine has replies to queries alone, and to no other prompt."""
    price: Price | None = None
    """What its tokens cost; None: not known."""
    engine: str = ""
    """Name of its engine."""
    abilities: frozenset[str] = frozenset()
    """What its engine can do beyond plain replies."""


@dataclass(slots=True, kw_only=True)
class Places:
    """What a step knows of the places of its agents; one that is in no set is up."""

    cold: set[str] = field(default_factory=set)
    """Those without a replica, as the router knew when it decided; one that came up since is taken out."""
    dead: set[str] = field(default_factory=set)
    waited_out: set[str] = field(default_factory=set)
    """Those of the dead places that a call has waited for already, for as long as patience lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextCall:
    """One call that a step makes next."""

    activation: Activation
    chain: int
    """Which of the step's chains it belongs to: an agent that was asked and the stand-ins after it."""
    tokens_used: int
    """Tokens of the step that count against the budget of this call: those from before the cascade asked for it."""
    price_used: float = 0.0
    """The same of what they cost."""
    insists: bool = False
    """Whether a cold agent is waited for as long as the query has; else as its policy says."""
    lost: AgentReply | None = None
    """The reply of the same call when it was lost with its place, where it is now sent again until the place is back."""


@dataclass(eq=False)
class StepCalls:
    """The calls of one step: no reserve is asked twice, or in a place that is known to be dead.

    The next-ranked agent whose place is up stands in for a lost one. Where nobody contributed, each chain waits for a cold
    agent, and then for its newest dead place; the first contribution ends the waits for places that are not back. Last, unsure
    replies call for one agent more at a time: the next-ranked, or with a label model whoever's reply is worth most.
    """

    plan: StepPlan
    cards: Mapping[str, AgentCard]
    places: Places
    """The caller's, who keeps it up to date."""
    state: QueryState
    calls_left: int | None = None
    """What is left of the query's budget of calls; None: no budget."""
    defence: Defence = "none"
    """Replies that it leaves out do not make a step sure."""

    def __post_init__(self) -> None:
        state, limits = self.state, self.state.query.limits
        self._asked = state.asked
        self._tokens_left = None if limits.budget_tokens is None else limits.budget_tokens - state.tokens_used
        self._price_left = None if limits.budget_price is None else limits.budget_price - state.price_used
        self._is_paced = limits.within_steps and not (self._tokens_left is None and self._price_left is None)
        self._held: list[Activation] = []
        self._reserves = list(self.plan.reserves)
        self._chains: list[list[tuple[Activation, AgentReply]]] = []
        self._flying: list[NextCall] = []
        self._has_text = False
        self._has_insisted = False

    @property
    def replies(self) -> tuple[AgentReply, ...]:
        """The replies that count, in the order of the chains; a lost call that was repeated is there once."""
        return tuple(reply for chain in self._chains for _, reply in chain)

    @property
    def has_agent_up(self) -> bool:
        """Whether a chosen agent, or one of the reserves that are left, is in a place that is up."""
        unfit = self.places.cold | self.places.dead
        return any(self._place(x) not in unfit for x in (*self.plan.activations, *self._reserves))

    def begin(self) -> list[NextCall]:
        """Return the calls of the plan's agents."""
        together = 1 if self._is_paced else len(self.plan.activations)
        self._held = list(self.plan.activations[together:])
        calls = [self._new_chain(activation) for activation in self.plan.activations[:together]]
        return self._begun(calls)

    def after(self, call: NextCall, reply: AgentReply, *, has_time: bool, has_text: bool) -> list[NextCall]:
        """Note the reply of a call and return the calls that it leads to; with none, and none under way, the step is done.

        `has_time`: the deadline has not passed. `has_text`: some of the one streamed reply was handed on, and another
        agent's words must not follow.
        """
        chain = self._chains[call.chain]
        if call.lost is None:
            chain.append((call.activation, reply))
        else:
            chain[:] = [(activation, reply if old is call.lost else old) for activation, old in chain]
        self._flying.remove(call)
        self._has_text = has_text
        calls = self._begun(self._follow(call, reply, has_time=has_time))
        calls += self._release() if has_time else []
        return calls or ([] if self._flying else self._go_on(has_time=has_time))

    def hedge(self, call: NextCall) -> list[NextCall]:
        """Return the call of the next-ranked agent beside one that takes long, in its chain; none where budgets are tight."""
        is_apt = not self._is_paced and call.lost is None and not call.insists
        return self._begun(self._next_in_chain(call) if is_apt else [])

    def overtaken(self, call: NextCall, reply: AgentReply) -> None:
        """Note how a call was ended because the other one of its chain brought a contribution first."""
        self._chains[call.chain].append((call.activation, reply))
        self.withdrawn(call)

    def is_vain(self, call: NextCall, contributed: NextCall) -> bool:
        """Tell whether a call waits for a place that is not back, though another's call has contributed by now."""
        place = self._place(call.activation)
        return call.lost is not None and place in self.places.dead and place != self._place(contributed.activation)

    def withdrawn(self, call: NextCall) -> None:
        """Note that a call that was waiting is not: another place was back first. What it was lost by stays."""
        self._flying.remove(call)

    def missed(self) -> tuple[str, ...]:
        """Return agents that were masked when the step was decided, if nobody contributes before a place is back; else nobody.

        The step may be decided anew with one of them that is back: its plan comes from a router, and nothing was handed on.
        """
        decision, unfit = self.plan.decision, self.places.dead | self.places.cold
        waits = self._flying and all(x.lost is not None and self._place(x.activation) in self.places.dead for x in self._flying)
        if not waits or decision is None or self.plan.fold != "summarizer" or self._has_text or self.calls_left is not None:
            return ()
        if any(reply.status == "ok" for reply in self.replies):
            return ()  # what was said would be thrown away
        return tuple(name for name in decision.masked if self.cards[name].place not in unfit)[:MAX_MISSED]

    def _begun(self, calls: list[NextCall]) -> list[NextCall]:
        self._flying += calls
        return calls

    def _release(self) -> list[NextCall]:
        """Return the calls of held agents that what is left pays for."""
        calls = list[NextCall]()
        while self._held and (not self._flying or any(x.usage.total for x in self.replies)) and self._can_pay(self._held[0]):
            calls += self._begun([self._new_chain(self._held.pop(0))])
        return calls

    def _can_pay(self, another: Activation) -> bool:
        """Tell whether what is left pays for a call beside those under way; it does where nobody else can contribute.

        Paced budgets pay for it if each call takes as many tokens as those so far.
        """
        if not self._flying and not any(reply.status == "ok" for reply in self.replies):
            return True
        used, price = self._used
        num_calls = len(self.replies) + len(self._flying)
        spent = ((used, self._tokens_left), (price, self._price_left), (num_calls, self.calls_left))
        if any(left is not None and sofar >= left for sofar, left in spent):
            return False
        replies = [reply for reply in self.replies if reply.usage.total]  # what was lost says nothing of what a call takes
        if not self._is_paced or not replies:
            return True
        usage, num = sum((reply.usage for reply in replies), TokenUsage()), len(replies)
        asked = [self.cards[agent].price for agent in (*(call.activation.agent for call in self._flying), another.agent)]
        dear = price + sum((price if rate is None else rate.of(usage)) / num for rate in asked)
        ahead = ((used + len(asked) * used / num, self._tokens_left), (dear, self._price_left))
        return not any(left is not None and cost > left * (1 + 1e-9) for cost, left in ahead)

    @property
    def _used(self) -> tuple[int, float]:
        """Tokens of the replies so far, and what they cost."""
        return sum(reply.usage.total for reply in self.replies), sum(reply.price or 0.0 for reply in self.replies)

    def _follow(self, call: NextCall, reply: AgentReply, *, has_time: bool) -> list[NextCall]:
        if reply.status == "ok" or call.lost is not None:
            return []
        if any(x.chain == call.chain for x in self._flying) or any(other.status == "ok" for _, other in self._chains[call.chain]):
            return []  # the other call of the chain stands in
        if call.insists:
            return self._wait_for_place(call.chain)
        return self._next_in_chain(call) if has_time else []

    def _next_in_chain(self, call: NextCall) -> list[NextCall]:
        reserve, (used, price) = self._next_reserve(), self._used
        return [] if reserve is None else [replace(call, activation=reserve, tokens_used=used, price_used=price)]

    def _go_on(self, *, has_time: bool) -> list[NextCall]:
        """Return the calls after all chains have ended: each insists where nobody contributed, else the cascade's next."""
        if not self._has_insisted:
            self._has_insisted = True
            if has_time and not any(reply.status == "ok" for reply in self.replies):
                calls = [call for chain in range(len(self._chains)) for call in self._begun(self._insist(chain))]
                if calls:
                    return calls
        if self.plan.fold == "pass" or not has_time or not has_room(self.plan.decision, self.replies):
            return []
        another = self._one_more(self.replies)
        return [] if another is None else self._begun([self._new_chain(another)])

    def _one_more(self, replies: Sequence[AgentReply]) -> Activation | None:
        """Take the reserve that the replies so far call for: the worthiest by the label model, else the next-ranked."""
        unfit = self.places.cold | self.places.dead
        available = [x.agent for x in self._reserves if self._place(x) not in unfit]
        replies = barred(replies, self.defence, asked=self._asked)
        judgement = judge(self.plan.decision, replies, available, asked=self._asked)
        if judgement is None or not judgement.right:
            return self._next_reserve() if should_escalate(self.plan.decision, replies) or judgement else None
        return self._next_reserve(among=judgement.worthwhile)

    def _new_chain(self, activation: Activation) -> NextCall:
        used, price = self._used
        self._chains.append([])
        return NextCall(activation=activation, chain=len(self._chains) - 1, tokens_used=used, price_used=price)

    def _insist(self, number: int) -> list[NextCall]:
        """Wait for a cold agent, of the chain or else of the reserves, or else for a dead place."""
        chain = self._chains[number]
        passed_over = (activation for activation, reply in chain if reply.status == "cold")
        cold = None if self._has_text else next(passed_over, None)
        waited_for = cold or self._next_reserve(is_cold=True)
        if waited_for is None:
            return self._wait_for_place(number)
        chain[:] = [link for link in chain if link[0] is not cold]
        return [NextCall(activation=waited_for, chain=number, tokens_used=0, insists=True)]

    def _wait_for_place(self, number: int) -> list[NextCall]:
        """Send the chain's newest call that was lost with its place again, unless that place was waited out already."""
        waitable = self.places.dead - self.places.waited_out
        for activation, lost in reversed(self._chains[number]):
            if lost.status == "failed" and self._place(activation) in waitable:
                return [NextCall(activation=activation, chain=number, tokens_used=0, lost=lost)]
        return []

    def _next_reserve(self, *, is_cold: bool = False, among: Sequence[str] | None = None) -> Activation | None:
        """Take the next-ranked reserve whose place is up, or is cold, if what is left pays for it.

        `among`: the first of these agents that is a reserve.
        """
        alive = [x for x in self._reserves if self._place(x) not in self.places.dead]
        if among is not None:
            alive = sorted((x for x in alive if x.agent in among), key=lambda x: among.index(x.agent))
        chosen = None if self._has_text else next((x for x in alive if (self._place(x) in self.places.cold) == is_cold), None)
        if chosen is None or not self._can_pay(chosen):
            return None
        self._reserves.remove(chosen)
        return chosen

    def _place(self, activation: Activation) -> str:
        return self.cards[activation.agent].place
