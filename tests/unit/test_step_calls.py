"""Whom a step asks next: hand-made tables of plans, fates and the calls that they lead to, and what holds for all of them.

A transcript names the calls in order: `a` asks, `a!` insists on a cold agent, `a~` sends a lost call until its place is back.
Fates: `lost` dies with its place, `untaken` was waited for by the call already, `text` dies after some text was handed on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.core.label_model import LabelModel, fit_label_model
from dmoa.core.witnesses import witnesses_of
from dmoa.step_calls import NextCall, Places, StepCalls
from dmoa.testing import Say, asks, card, decision, query, said, state_of
from dmoa.types import AgentReply, AgentStatus, StepPlan

NAMES = "abcdef"
TOKENS = 14
"""Of every reply that is ok."""
STATUS: Mapping[str, AgentStatus] = {"lost": "failed", "untaken": "failed", "text": "failed"}


@dataclass
class Step:
    """Runs the decision over fates instead of agents; each call of an agent meets its next fate, the last one for ever after."""

    plan: StepPlan
    fates: Mapping[str, str]
    places: Places = field(default_factory=Places)
    place_of: Mapping[str, str] = field(default_factory=dict)
    tokens_left: int | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    """By agent, what it says where that is not 1."""
    calls: list[NextCall] = field(default_factory=list)
    has_time: bool = True
    has_text: bool = False

    def __post_init__(self) -> None:
        cards = {name: card(name, self.place_of.get(name, name)) for name in NAMES}
        self.decision = StepCalls(self.plan, cards, self.places, state_of(query("", budget_tokens=self.tokens_left)))

    def run(self, order: st.DataObject | None = None) -> None:
        """Ask to the end, first come first served or in the order drawn."""
        waiting = deque(self.decision.begin())
        self.calls += waiting
        while waiting:
            if order is not None:
                waiting.rotate(-order.draw(st.integers(0, len(waiting) - 1)))
            call = waiting.popleft()
            more = self.decision.after(call, self.reply_to(call), has_time=self.has_time, has_text=self.has_text)
            self.check(more)
            self.calls += more
            waiting += more

    def check(self, more: list[NextCall]) -> None:
        """What holds of the calls that follow a reply."""

    def reply_to(self, call: NextCall) -> AgentReply:
        name = call.activation.agent
        fates = self.fates.get(name, "ok").split()
        fate = fates[min(sum(one.activation.agent == name for one in self.calls), len(fates)) - 1]
        if call.lost is None and fate in ("lost", "untaken", "text"):
            self.places.dead.add(self.place_of.get(name, name))
        if fate == "untaken":
            self.places.waited_out.add(self.place_of.get(name, name))
        self.has_text = self.has_text or fate == "text"
        self.has_time = self.has_time and fate != "late"
        if fate in ("ok", "sure"):
            self.places.cold.discard(self.place_of.get(name, name))
            return said(name, Say(text=self.texts.get(name, "1"), nats=0.01 if fate == "sure" else 0.9))
        return AgentReply(agent=name, status=STATUS.get(fate, fate))  # type: ignore[arg-type]

    @property
    def transcript(self) -> str:
        return " ".join(mark(call) for call in self.calls)


def mark(call: NextCall) -> str:
    return call.activation.agent + ("!" if call.insists else "~" if call.lost else "")


def step_of(agents: str, fates: str = "", *, cold: str = "", together: str = "", **changes: object) -> Step:
    """A step of `active|reserves`, with fates as `a=lost,ok b=ok`; the agents `together` share a place."""
    active, _, reserves = agents.partition("|")
    plan = replace(asks(*active, reserves=reserves), **changes.pop("plan", {}))  # type: ignore[arg-type]
    place_of = {name: together if name in together else name for name in NAMES}
    told = {part[0]: part[2:].replace(",", " ") for part in fates.split()}
    return Step(plan, told, Places(cold={place_of[name] for name in cold}), place_of, **changes)  # type: ignore[arg-type]


LOST = "failed overloaded lost untaken cold"


@pytest.mark.parametrize(
    ("agents", "fates", "transcript"),
    [
        ("ab|c", "", "a b"),
        *(("ab|cd", f"a={fate}", "a b c") for fate in LOST.split()),
        *(("a|bcd", f"a={fate} b={fate}", "a b c") for fate in LOST.split()),
        ("ab|cd", "a=failed b=failed", "a b c d"),  # each has a stand-in of its own
        ("ab|cd", "a=failed c=failed", "a b c d"),
        ("a|b", "a=failed b=failed", "a b"),  # an agent that failed is not sent to again
        ("a|", "a=overloaded", "a"),
        ("a|bc", "a=late", "a"),  # after the deadline nobody stands in
        ("a|bc", "a=failed b=late", "a b"),
    ],
)
def test_a_lost_agent_has_the_next_ranked_stand_in(agents: str, fates: str, transcript: str) -> None:
    step = step_of(agents, fates)
    step.run()
    assert step.transcript == transcript
    is_after_another = (agents, fates) == ("ab|cd", "a=failed c=failed")  # b has contributed its 14 tokens when d is asked
    assert [call.tokens_used for call in step.calls] == [0] * (len(step.calls) - is_after_another) + [14] * is_after_another


@pytest.mark.parametrize(
    ("together", "fates", "transcript"),
    [
        ("ab", "a=lost", "a c"),
        ("ab", "a=failed", "a b"),
        ("bc", "a=lost", "a b"),
        ("abc", "a=lost", "a d"),
        ("bc", "a=failed b=lost", "a b d"),
        ("abcd", "a=lost,ok", "a a~"),
    ],
)
def test_nobody_is_asked_in_a_dead_place(together: str, fates: str, transcript: str) -> None:
    step = step_of("a|bcd", fates, together=together)
    step.run()
    assert step.transcript == transcript


@pytest.mark.parametrize(
    ("agents", "cold", "fates", "transcript"),
    [
        ("a|bc", "b", "a=failed", "a c"),  # those that are up come first
        ("a|bcd", "bc", "a=failed d=failed", "a d b!"),
        ("a|b", "a", "a=cold", "a b"),
        ("a|", "a", "a=cold,ok", "a a!"),
        ("a|b", "ab", "a=cold,ok", "a a!"),  # the agent that was chosen, before a reserve
        ("a|b", "ab", "a=failed", "a b!"),
        ("ab|cd", "abcd", "a=cold,ok b=cold,ok", "a b a! b!"),
        ("ab|cd", "cd", "a=failed b=failed", "a b c! d!"),
        ("ab|c", "c", "a=failed b=failed", "a b c!"),
        ("ab|c", "ac", "a=cold", "a b"),  # nobody insists beside a contribution
        ("a|bc", "bc", "a=failed b=overloaded", "a b!"),  # one is enough
        ("a|b", "b", "a=lost,ok b=overloaded", "a b! a~"),
        ("a|", "a", "a=cold,lost,ok", "a a! a~"),
        ("a|b", "b", "a=late", "a"),
        ("a|b", "b", "a=lost b=late", "a b! a~"),  # to insist was begun in time
    ],
)
def test_a_cold_agent_is_waited_for_where_nobody_contributed(agents: str, cold: str, fates: str, transcript: str) -> None:
    step = step_of(agents, fates, cold=cold)
    step.run()
    assert step.transcript == transcript
    assert len({reply.agent for reply in step.decision.replies}) == len(step.decision.replies)


@pytest.mark.parametrize(
    ("agents", "fates", "transcript"),
    [
        ("a|", "a=lost,ok", "a a~"),
        ("a|", "a=lost,failed", "a a~"),  # once
        ("a|b", "a=lost b=lost,ok", "a b b~"),  # the newest
        ("a|b", "a=lost,ok b=failed", "a b a~"),
        ("ab|", "a=lost,ok b=lost,ok", "a b a~ b~"),
        ("ab|", "a=lost b=ok", "a b"),
        ("a|", "a=untaken", "a"),
        ("a|b", "a=lost,ok b=untaken", "a b a~"),
        ("a|b", "a=untaken b=lost,ok", "a b b~"),
    ],
)
def test_a_dead_place_is_waited_for_where_nobody_contributed(agents: str, fates: str, transcript: str) -> None:
    step = step_of(agents, fates)
    step.run()
    assert step.transcript == transcript
    last = step.calls[-1]
    if last.lost is not None:
        assert last.lost.agent == last.activation.agent
        assert all(reply is not last.lost for reply in step.decision.replies)  # what came of the repeated call takes its place


def test_only_calls_that_were_lost_with_the_place_are_sent_again() -> None:
    step = step_of("ab|", "a=cold,overloaded b=lost,ok", cold="a", together="ab")
    step.run()
    assert step.transcript == "a b a! b~"


@pytest.mark.parametrize(
    ("agents", "cold", "fates", "transcript"),
    [
        ("a|b", "", "a=text,ok", "a a~"),  # the same agent may go on with its words, another may not
        ("a|b", "a", "a=cold b=text,ok", "a b b~"),
        ("a|b", "b", "a=text,ok", "a a~"),
    ],
)
def test_no_other_agent_follows_text(agents: str, cold: str, fates: str, transcript: str) -> None:
    step = step_of(agents, fates, cold=cold)
    step.run()
    assert step.transcript == transcript


UNSURE = {"decision": decision(dict.fromkeys(NAMES, 1 / 6), 1, theta=-1.0, limit=3)}


@pytest.mark.parametrize(
    ("agents", "cold", "fates", "tokens_left", "calls"),
    [
        ("a|bcd", "", "", None, [("a", 0), ("b", TOKENS), ("c", 2 * TOKENS)]),  # the limit is 3
        ("a|bcd", "", "a=sure", None, [("a", 0)]),
        ("a|bcd", "", "b=sure", None, [("a", 0), ("b", TOKENS)]),
        ("ab|cd", "", "", None, [("a", 0), ("b", 0), ("c", 2 * TOKENS)]),
        ("a|bcd", "", "b=failed c=failed", None, [("a", 0), ("b", TOKENS), ("c", TOKENS), ("d", TOKENS)]),
        ("a|bcd", "b", "", None, [("a", 0), ("c", TOKENS), ("d", 2 * TOKENS)]),  # a cold one is not worth the wait
        ("a|bcd", "", "b=cold", None, [("a", 0), ("b", TOKENS), ("c", TOKENS), ("d", 2 * TOKENS)]),
        ("a|b", "", "b=lost", None, [("a", 0), ("b", TOKENS)]),  # nor a dead place, beside a contribution
        ("a|bcd", "", "b=late", None, [("a", 0), ("b", TOKENS)]),
        ("a|bcd", "", "", TOKENS, [("a", 0)]),
        ("a|bcd", "", "", TOKENS + 1, [("a", 0), ("b", TOKENS)]),
        ("a|bcd", "", "", 0, [("a", 0)]),
        ("a|bcd", "", "a=failed", 0, [("a", 0), ("b", 0)]),  # a stand-in is owed whatever the budget
    ],
)
def test_unsure_replies_call_for_one_agent_more_at_a_time(
    agents: str, cold: str, fates: str, tokens_left: int | None, calls: list[tuple[str, int]]
) -> None:
    step = step_of(agents, fates, cold=cold, tokens_left=tokens_left, plan=UNSURE)
    step.run()
    assert [(mark(call), call.tokens_used) for call in step.calls] == calls
    passing = step_of(agents, fates, cold=cold, plan=UNSURE | {"fold": "pass"})
    passing.run()
    assert {call.tokens_used for call in passing.calls} == {0}


@cache
def two_liars() -> LabelModel:
    """What is learnt of six agents when c to f agree, b says the same always, and a something else every time."""
    texts = [[f"{1000 + 7 * row}", "42", *(4 * [str(row)])] for row in range(12)]
    return fit_label_model(witnesses_of(texts), seed=0)


JUDGED = {"decision": replace(UNSURE["decision"], label_model=two_liars())}


@pytest.mark.parametrize(
    ("agents", "fates", "price", "transcript"),
    [
        ("c|abdef", "", 0.1, "c"),  # a competent agent is believed at once
        ("c|abdef", "", 0.02, "c d"),  # unless one more costs next to nothing
        ("a|bcdef", "", 0.1, "a c"),  # the other liar is next-ranked, and worth nothing
        ("a|bfedc", "", 0.1, "a f"),  # of equals the next-ranked
        ("a|b", "", 0.02, "a"),
        ("a|bc", "", 1.0, "a"),
        ("c|bdef", "c=failed", 0.1, "c b d"),  # a liar stands in for the lost agent, and is not believed
    ],
)
def test_with_a_label_model_whoever_is_worth_most_is_asked(agents: str, fates: str, price: float, transcript: str) -> None:
    step = step_of(agents, fates, plan={"decision": replace(JUDGED["decision"], agent_price=price)})
    step.texts = {"a": "5", "b": "42"}
    step.run()
    assert step.transcript == transcript


def test_a_reserve_whose_place_came_up_is_asked() -> None:
    step = step_of("ab|cd", "a=failed", cold="bc", together="bc")
    first, second = step.decision.begin()
    step.calls += [first, second]
    assert step.decision.after(second, step.reply_to(second), has_time=True, has_text=False) == []  # b came up, and c with it
    (stand_in,) = step.decision.after(first, step.reply_to(first), has_time=True, has_text=False)
    assert mark(stand_in) == "c"


@pytest.mark.parametrize(
    ("cold", "dead", "expected"), [("", "", True), ("a", "", True), ("a", "b", False), ("ab", "", False), ("", "ab", False)]
)
def test_whether_anybody_is_up(cold: str, dead: str, expected: bool) -> None:
    step = Step(asks("a", reserves="b"), {}, Places(cold=set(cold), dead=set(dead)))
    assert step.decision.has_agent_up is expected


@dataclass
class Checked(Step):
    """A step of which every decision is judged when it is made."""

    is_ranked: bool = True
    """Whether the next-ranked agent is always the next to be asked, as without a label model."""

    def check(self, more: list[NextCall]) -> None:
        known, asked = self.places, [call.activation.agent for call in self.calls]
        place = {name: self.place_of.get(name, name) for name in NAMES}
        for number, call in enumerate(more):
            name = call.activation.agent
            if call.lost is not None:
                assert place[name] in known.dead - known.waited_out
                assert not any(mark(call) == mark(earlier) for earlier in self.calls)
                continue
            # One that was passed over as cold is worth another try, though its place could not start for another since.
            assert place[name] not in known.dead or (call.insists and name in asked)
            assert call.insists or self.has_time
            assert not self.has_text
            if call.insists:
                assert [mark(earlier) for earlier in self.calls].count(f"{name}!") == 0
                assert not any(reply.status == "ok" for reply in self.decision.replies)
            else:
                assert name not in asked
                assert place[name] not in known.cold
            if name not in asked and self.is_ranked:  # no better ranked reserve was passed over
                taken = {*asked, *(one.activation.agent for one in more[:number])}
                fit = [x.agent for x in self.plan.reserves if x.agent not in taken and place[x.agent] not in known.dead]
                assert name == next(one for one in fit if (place[one] in known.cold) == call.insists)


FATES = st.lists(st.sampled_from((*STATUS, "ok", "sure", "failed", "overloaded", "cold", "late")), min_size=1, max_size=3)


@given(
    order=st.permutations(NAMES),
    active=st.integers(1, 3),
    reserves=st.integers(0, 3),
    fates=st.fixed_dictionaries(dict.fromkeys(NAMES, FATES)),
    place_of=st.fixed_dictionaries(dict.fromkeys(NAMES, st.sampled_from("uvwxyz"))),
    cold=st.sets(st.sampled_from("uvwxyz")),
    limit=st.integers(1, 6),
    tokens_left=st.none() | st.integers(0, 60),
    is_judged=st.booleans(),
    data=st.data(),
)
def test_every_step_ends_and_asks_nobody_twice_or_in_a_dead_place(
    order: list[str],
    active: int,
    reserves: int,
    fates: dict[str, list[str]],
    place_of: dict[str, str],
    cold: set[str],
    limit: int,
    tokens_left: int | None,
    is_judged: bool,
    data: st.DataObject,
) -> None:
    decided = replace((JUDGED if is_judged else UNSURE)["decision"], limit=limit)
    plan = asks(*order[:active], reserves=order[active : active + reserves], decision=decided)
    told = {name: " ".join(met) for name, met in fates.items()}
    step = Checked(plan, told, Places(cold=set(cold)), place_of, tokens_left, is_ranked=not is_judged)
    step.run(data)
    assert len(step.calls) <= active + reserves + 2 * active  # a chain insists once, and waits once
    replied = [reply.agent for reply in step.decision.replies]
    assert len(set(replied)) == len(replied)
    assert set(replied) == {call.activation.agent for call in step.calls}
    if not any(reply.status == "ok" for reply in step.decision.replies) and step.has_time and not step.has_text:
        left = {x.agent for x in plan.reserves} - set(replied)  # nobody was forgotten who could have answered
        assert all(place_of[name] in step.places.dead or place_of[name] in step.places.cold for name in left)
