"""What policies do where agents are lost, say nothing, or budgets end them in the middle, in pools of one to thirteen agents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from dmoa.errors import EmptyAnswerError, NoAgentError, RequestError
from dmoa.policies.registry import POLICIES, build_policy, check_words, needs_labels
from dmoa.testing import Fail, FakeAgents, Say, answer_of, orchestrator_of, query
from dmoa.types import AgentCall, AgentReply, TokenUsage
from tests.unit.policies.schedules import MOST, POOL, QUESTION, Says, check_cost, context_of, mark_of, run, schedule_of, words_of

ROLES = {
    "numbers of the best": "1, 2",
    "Reply STOP": "GO",
    "worst mistake": "CONCEPT",
    "You lead a chat": "who knows",
    "Reply with one number": "5",
    "name of the one expert": "a",
    "Reply with those that the question needs": "none",
}
"""What is asked of who prepares an answer -> what it says."""
OF_ONE = {"self_consistency", "best_of_n", "self_moa", "self_moa_seq"}
"""Policies that sample one agent: nobody stands in for it."""
LONG = query(QUESTION, max_steps=40)
SHORT = query(QUESTION, max_steps=2)


def roles(call: AgentCall) -> str | None:
    return next((words for asked, words in ROLES.items() if asked in call.messages[-1].content), None)


def lost(call: AgentCall) -> AgentReply:
    return AgentReply(agent=call.agent, status="failed", error="broken")


def blank(call: AgentCall) -> AgentReply:
    usage = TokenUsage(prompt_tokens=words_of(call), completion_tokens=1)
    return AgentReply(agent=call.agent, status="ok", text=" ", usage=usage)


def where(agents: Sequence[str], does: Says, steps: range = range(99), otherwise: Says = roles) -> Says:
    """Some agents do another thing than all others, in some steps."""
    return lambda call: does(call) if call.agent in agents and call.step in steps else otherwise(call)


def limits_of(name: str) -> dict[str, int]:
    """Steps enough for a schedule; those that the pool's rules end have two."""
    return {"max_steps": 2 if POLICIES[name].options is None or name == "capacity_aware" else 40}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rewards by which c is the best agent."""
    rows = [{"query": text, "agent": agent, "reward": float(agent == "c")} for text in ("one", "two") for agent in MOST]
    path = tmp_path_factory.mktemp("labels") / "rewards.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.contract
@pytest.mark.parametrize("size", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("name", list(POLICIES.builtin))
async def test_whoever_is_lost_or_says_nothing_takes_no_answer_of_the_others_away(name: str, size: int, labels: Path) -> None:
    """One agent of each pool is lost, or says nothing, always or in one step; there is an answer, and it is somebody's."""
    policy, pool = f"{name}:data={labels}" if needs_labels(name) else name, MOST[:size]
    policy += ":rounds=20" if "sparsity" in getattr(POLICIES[name].options, "model_fields", {}) else ""
    for agent, does, steps in product({pool[0], pool[-1]}, (lost, blank), (range(99), range(1), range(1, 2))):
        seen: list[str] = []

        def says(
            call: AgentCall, agent: str = agent, does: Says = does, steps: range = steps, seen: list[str] = seen
        ) -> str | AgentReply | None:
            seen.append(call.agent)
            return does(call) if call.agent == agent and call.step in steps else roles(call) or f"[{mark_of(call)}]"

        try:
            answer, _ = await run(policy, says, query("Who?", **limits_of(name)), pool=pool)
        except (NoAgentError, EmptyAnswerError):
            # Nobody stands in for who is sampled, nor for who says nothing where one agent is asked.
            assert size == 1 or ({*seen} == {agent} and (name in OF_ONE or does is blank)), (agent, does.__name__, steps)
            continue
        assert answer.text.startswith("["), (agent, does.__name__, steps)
        assert steps != range(99) or not answer.text.startswith(f"[{agent}.")


@pytest.mark.parametrize(
    "size", [1, 2, 3, pytest.param(5, marks=pytest.mark.contract), pytest.param(13, marks=pytest.mark.contract)]
)
@pytest.mark.parametrize(
    "policy",
    [
        "chain", "tree", "star", "complete", "random_graph:p=1", "random_graph:p=0", "moa", "self_moa:k=1", "self_moa_seq:k=1",
        "self_moa_seq:k=7:window=3", "smoa:layers=3", "fusion", "debate", "refine", "group_chat", "symbolic", "mcts", "escalate",
        "elastic", "majority_k", "knapsack:inner=star", "capacity_aware:inner=debate",
    ],
)  # fmt: skip
async def test_formulas_hold_for_pools_of_any_size(policy: str, size: int) -> None:
    pool = MOST[:size]
    if policy.startswith("random_graph:p=0"):
        assert schedule_of((await run(policy, roles, LONG, pool=pool))[1]) == schedule_of((await run("star", pool=pool))[1])
    else:
        await check_cost(policy, roles, LONG, pool)


@pytest.mark.parametrize(
    ("policy", "agents", "schedule"),
    [
        ("chain", "b", ["a.0", "b.1 <- a.0", "c.2 <- a.0", "d.3 <- c.2"]),
        ("chain", "a", ["a.0", "b.1", "c.2 <- b.1", "d.3 <- c.2"]),
        ("complete", "bc", ["a.0", "b.1 <- a.0", "c.2 <- a.0", "d.3 <- a.0"]),
        ("star", "abc", ["a.0", "b.0", "c.0", "d.1"]),
        ("tree", "c", ["a.0", "b.0", "c.1 <- a.0", "d.2 <- a.0 b.0"]),
        ("escalate", "a", ["a.0", "b.0", "c.1", "d.2"]),
        ("symbolic:k=2:recruiter=a:agents=b+c", "a", ["a.0", "b.1", "c.1", "a.2 <- b.1 c.1", "b.2 <- b.1 c.1"]),
        ("group_chat:turns=1", "a", ["a.0", "a.1", "b.1"]),
        ("debate:agents=a+b", "b", ["a.0", "b.0", "a.1 <- a.0", "b.1 <- a.0", "a.2 <- a.1", "b.2 <- a.1"]),
    ],
)
async def test_lost_agents_are_left_out_and_what_they_would_have_read_is_passed_on(
    policy: str, agents: str, schedule: list[str]
) -> None:
    answer, calls = await run(policy, where(agents, lost, otherwise=lambda call: None), LONG)
    assert schedule_of(calls) == schedule
    assert answer.degraded


async def test_a_debater_that_was_lost_is_not_told_that_anothers_answer_is_its_own() -> None:
    _, calls = await run("debate:rounds=1:agents=a+b", where("b", lost, range(1), lambda call: None))
    (told,) = [call.messages[-1].content for call in calls if call.agent == "b" and call.step == 1]
    assert "is your own answer" not in told


async def test_an_answer_that_is_blank_is_not_sure_and_the_next_agent_is_asked() -> None:
    answer, calls = await run("escalate", where("ab", blank, otherwise=lambda call: None), LONG, nats={"c.2": 0.1})
    assert [call.agent for call in calls] == ["a", "b", "c"]
    assert (answer.stop_reason, answer.text[:5]) == ("sure", "[c.2]")


@pytest.mark.parametrize("policy", ["moa", "debate", "self_moa", "smoa", "star", "tree"])
async def test_a_round_in_which_all_say_nothing_is_followed_by_the_next(policy: str) -> None:
    answer, calls = await run(policy, where(MOST, blank, range(1)), LONG)
    assert answer.stop_reason == "schedule"
    prompts = [call.messages[-1].content for call in calls]
    # Nobody is told to weigh or mend answers that are not there.
    assert not any("work above holds" in prompt and "Work so far" not in prompt for prompt in prompts)


@pytest.mark.parametrize("policy", ["moa", "chain", "group_chat", "symbolic", "mcts", "free_agency", "elastic"])
@pytest.mark.parametrize(("does", "error"), [(lost, NoAgentError), (blank, EmptyAnswerError)])
async def test_where_nobody_says_anything_the_error_says_so(policy: str, does: Says, error: type[Exception]) -> None:
    with pytest.raises(error):
        await run(policy, does, LONG)


async def test_a_moderator_is_heard_where_the_judge_is_lost() -> None:
    def says(call: AgentCall) -> str | AgentReply | None:
        prompt = call.messages[-1].content
        return lost(call) if "numbers of the best" in prompt else "STOP" if "Reply STOP" in prompt else None

    _, calls = await run("smoa", says)
    assert schedule_of(calls)[-1] == "a.2 <- a.0 b.0"


async def test_a_manager_that_abandons_somebody_is_not_done() -> None:
    words = iter(["b", "ABANDONED", "d", "d"])
    _, calls = await run("group_chat", lambda call: next(words) if "You lead a chat" in call.messages[-1].content else None)
    assert [call.agent for call in calls[1::2]] == ["b", "b", "d", "d"]


def rated(*ratings: str) -> Says:
    return lambda call: ratings[call.step // 2] if "Reply with one number" in call.messages[-1].content else None


@pytest.mark.parametrize("budget", [4, 5, 6, 7])
async def test_a_search_that_is_cut_gives_back_the_answer_that_was_rated_best(budget: int) -> None:
    answer, calls = await run("mcts", rated("2", "8", "3", "1"), query(max_steps=40, budget_calls=budget))
    assert len(calls) == budget
    assert (answer.stop_reason, answer.text[:7]) == ("budget_calls", "[b.2~1]")


async def test_a_search_rates_no_blank_answer() -> None:
    answer, calls = await run("mcts:simulations=2", where("a", blank, range(1), rated("10", "1")), LONG)
    assert schedule_of(calls) == ["a.0", "a.1", "b.2~1", "a.3 <- b.2~1", "a.4 <- b.2~1"]
    assert answer.text.startswith("[a.4]")


async def test_the_word_of_a_chooser_is_never_the_answer() -> None:
    with pytest.raises(EmptyAnswerError, match="'selector' was ended by budget_calls after 1 calls"):
        await run("selector", lambda call: "c", query(budget_calls=1))
    with pytest.raises(NoAgentError):
        await run("selector", where(MOST, lost, range(1, 9), lambda call: "c"))


@pytest.mark.parametrize("limits", [{"max_steps": 5}, {"budget_calls": 5}])
async def test_a_schedule_that_came_to_its_end_says_so_though_its_budget_did_too(limits: dict[str, int]) -> None:
    answer, calls = await run("refine", roles, query(QUESTION, **{"max_steps": 40} | limits))
    assert (len(calls), answer.stop_reason) == (5, "schedule")


@pytest.mark.parametrize("limits", [{"budget_tokens": 9000}, {"budget_calls": 6}, {"budget_price": 0.0}])
@pytest.mark.parametrize("policy", ["moa", "chain", "debate", "mcts", "refine"])
async def test_a_budget_that_ends_in_the_middle_leaves_the_best_so_far(policy: str, limits: dict[str, float]) -> None:
    answer, _ = await run(policy, roles, query(QUESTION, max_steps=40, **limits))
    assert answer.text.startswith("[")
    assert answer.stop_reason in (*limits, "schedule")


async def asked_of(agents: FakeAgents, queries: int, **limits: int) -> list[str]:
    """Whom each of some queries asks, in one swarm."""
    context, found = replace(context_of("free_agency"), agent="roster=3:window=2"), []
    for number in range(queries):
        loop = orchestrator_of(agents, POOL, places={name: name for name in POOL})
        asked = replace(query(**{"max_steps": 4} | limits), trace_id=f"q{number}")
        await answer_of(loop, asked, build_policy("free_agency", context))
        found.append("".join(sorted(call.agent for call in agents.calls)))
        agents.calls.clear()
    return found


def saying(**words: str) -> dict[str, Say]:
    return {name: Say(text=f"Answer: {number}") for name, number in words.items()}


async def test_a_roster_learns_whatever_ends_its_queries() -> None:
    """The only step that a query may have is its last one; that is when agreement is noted."""
    agents = FakeAgents({name: (say,) * 30 for name, say in saying(a="1", b="2", c="1", d="1").items()})
    assert await asked_of(agents, 6, max_steps=1) == ["abc", "abc", "abcd", "abcd", "acd", "acd"]


async def test_an_agent_that_is_always_lost_is_replaced_by_its_shadow() -> None:
    agents = FakeAgents({name: (say,) * 30 for name, say in saying(a="1", c="1", d="1").items()} | {"b": (Fail(),) * 30})
    found = await asked_of(agents, 6)
    assert found[-1] == "acd"


async def test_a_shadow_that_is_always_lost_is_let_go() -> None:
    agents = FakeAgents({name: (say,) * 30 for name, say in saying(a="1", b="2", c="1").items()} | {"d": (Fail(),) * 30})
    assert await asked_of(agents, 5) == ["abc", "abc", "abcd", "abcd", "abc"]


async def test_shadows_are_calls_that_a_budget_of_calls_counts() -> None:
    agents = FakeAgents({name: (say,) * 30 for name, say in saying(a="1", b="2", c="1", d="1").items()})
    assert await asked_of(agents, 4, budget_calls=3) == ["abc"] * 4


@pytest.mark.parametrize(
    ("words", "said"), [("price=1", r"llms\.s\.price is not set"), ("gpus=0", None), ("agents=a:gpus=1", None)]
)
def test_a_budget_that_no_agent_fits_is_said_before_any_query(words: str, said: str | None) -> None:
    config = context_of("knapsack").config
    if said is None:
        check_words(POLICIES["knapsack"], words, config)
        llms = {name: llm.model_copy(update={"gpus": 2.0}) for name, llm in config.llms.items()}
        config, said = config.model_copy(update={"llms": llms}), "no agent fits the budget; raise gpus or price"
    with pytest.raises(RequestError, match=f"^policy: knapsack: .*{said}"):
        check_words(POLICIES["knapsack"], words, config)


@pytest.mark.parametrize(("inner", "said"), [("mao", "'mao' is not known"), ("dense", "'dense' asks the whole pool")])
def test_what_a_wrapped_policy_cannot_be_is_said_before_any_query(inner: str, said: str) -> None:
    with pytest.raises(RequestError, match=f"policy: knapsack: inner.*{said}"):
        check_words(POLICIES["knapsack"], f"inner={inner}", context_of("knapsack").config)
