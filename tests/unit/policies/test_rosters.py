"""Who is in the pool: capacities, budgets and free agents, with shares, costs and votes that are counted by hand."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmoa.config import Config
from dmoa.errors import RequestError
from dmoa.policies.registry import PolicyContext, build_policy, split_policy
from dmoa.policies.rosters import Bid, best_subset
from dmoa.testing import FakeAgents, Say, answer_of, orchestrator_of, query, scripted_pool, state_of
from dmoa.types import StepPlan
from tests.unit.policies.schedules import POOL, check_cost, context_of, run, schedule_of


async def plan_of(policy: str, context: PolicyContext, trace_id: str = "t") -> StepPlan:
    """The plan of a query's first step, in one swarm."""
    context = replace(context, agent=split_policy(policy)[1])
    plan = await build_policy(split_policy(policy)[0], context).next_step(
        state_of(replace(query(max_agents=2), trace_id=trace_id))
    )
    assert isinstance(plan, StepPlan)
    return plan


async def test_an_agent_over_its_capacity_yields_to_the_next_ranked_one_with_room() -> None:
    # The gate's two are always d and c, then b and a. Of 8 calls an agent may take ceil(1 * 8 / 4) = 2.
    context, asked = context_of("capacity_aware"), []
    for _ in range(5):
        plan = await plan_of("capacity_aware:window=8:factor=1", context)
        asked.append("".join(x.agent for x in plan.activations))
        assert len({x.agent for x in (*plan.activations, *plan.reserves)}) == 4
        probability = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
        assert plan.mass == pytest.approx(sum(probability[name] for name in asked[-1]))
    # b and a take over when d and c are full; of the 8 newest calls everyone then has two, so nobody has room.
    assert asked == ["dc", "dc", "ba", "ba", "dc"]


async def test_shares_are_even_within_the_capacity_factor() -> None:
    context, counts = context_of("capacity_aware"), Counter[str]()
    for number in range(100):
        counts.update(x.agent for x in (await plan_of("capacity_aware:window=40:factor=1.2", context, f"q{number}")).activations)
    assert counts.total() == 200
    # ceil(1.2 * 40 / 4) = 12 of every 40 calls, 60 of 200; the window slides, so a few more may be under way.
    assert max(counts.values()) <= 66
    assert min(counts.values()) >= 34


async def test_roomy_capacity_changes_nothing() -> None:
    _, calls = await run("capacity_aware:inner=star")
    assert schedule_of(calls) == ["a.0", "b.0", "c.0", "d.1 <- a.0 b.0 c.0"]


def priced_pool(prices: dict[str, tuple[str, float, float]]) -> Config:
    """Agents of models with prices and GPUs: agent -> (model, price of a million tokens either way, GPUs)."""
    tree: dict[str, Any] = scripted_pool(POOL).model_dump(mode="json", exclude_unset=True)
    tree["llms"] = {
        model: {
            "model": "scripted:echo",
            "engine": "scripted",
            "price": {"prompt_per_1m": price / 2, "completion_per_1m": price / 2},
            "gpus": gpus,
        }
        for model, price, gpus in prices.values()
    }
    tree["agents"] = [{"name": name, "llm": model, "profile": "x"} for name, (model, _, _) in prices.items()]
    return Config.model_validate(tree)


PRICED = {"a": ("small", 1.0, 1.0), "b": ("small", 1.0, 1.0), "c": ("middle", 3.0, 2.0), "d": ("big", 6.0, 4.0)}


@pytest.mark.parametrize(
    ("budget", "voters"),
    [
        ("", "abcd"),
        ("price=6", "d"),  # the gate gives d 0.4; b and c, for 4, have 0.5 but a fits in too: a, b, c are worth 0.6 for 5
        ("price=4", "bc"),
        ("price=1.5", "b"),
        ("gpus=4", "abc"),  # small counts once: 1 + 2
        ("gpus=5", "abd"),  # 0.1 + 0.2 + 0.4
        ("gpus=1", "ab"),
    ],
)
async def test_the_sub_pool_is_worth_most_within_the_budget(budget: str, voters: str) -> None:
    expected = "abc" if budget == "price=6" else voters
    plan = await plan_of(f"knapsack:inner=star:{budget}", context_of("knapsack", priced_pool(PRICED)))
    last = await plan_of(f"star:agents={'+'.join(expected)}", context_of("star"))
    assert [x.agent for x in plan.activations] == [x.agent for x in last.activations]


async def test_labels_say_what_agents_are_worth_where_they_are_given(tmp_path: Path) -> None:
    rows = [("a", 1.0), ("a", 1.0), ("b", 0.0), ("c", 0.0), ("d", 0.0)]
    data = tmp_path / "rewards.jsonl"
    data.write_text("".join(json.dumps({"query": "q", "agent": name, "reward": reward}) + "\n" for name, reward in rows))
    plan = await plan_of(f"knapsack:price=1:rewards={data}", context_of("knapsack", priced_pool(PRICED)))
    assert [x.agent for x in (*plan.activations, *plan.reserves)] == ["a"]


def test_the_best_subset_is_that_of_a_search_by_hand() -> None:
    worth, price, model = [0.3, 0.1, 0.25, 0.2, 0.15], [4.0, 1.0, 3.0, 2.5, 1.5], ["x", "x", "y", "z", "y"]
    gpus = {"x": 2.0, "y": 1.0, "z": 4.0}
    for most_price, most_gpus in itertools.product((1.0, 3.0, 5.5, 9.0), (1.0, 3.0, 6.0)):
        fitting = [
            subset
            for size in range(1, 6)
            for subset in itertools.combinations(range(5), size)
            if sum(price[a] for a in subset) <= most_price and sum(gpus[m] for m in {model[a] for a in subset}) <= most_gpus
        ]
        best = max((round(sum(worth[a] for a in subset), 9) for subset in fitting), default=None)
        bids = [Bid(name, cost, gpus[name]) for name, cost in zip(model, price, strict=True)]
        found = best_subset(worth, bids, most_price, most_gpus)
        assert (tuple(found) in fitting) if fitting else (found == [])
        assert best is None or round(sum(worth[a] for a in found), 9) == best


def test_an_agent_that_fits_is_found_among_many_that_do_not() -> None:
    """Every choice of sixteen agents is tried, of those that fit alone: the seventeenth by worth is the only one here."""
    worth, bids = [0.9] * 16 + [0.1], [Bid("x", 5.0, 1.0)] * 16 + [Bid("x", 1.0, 1.0)]
    found = best_subset(worth, bids, 2.0, None)
    assert found == [16]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("knapsack:price=0.5", "no agent fits the budget"),
        ("knapsack:inner=dense:price=2", "'dense' asks the whole pool"),
        ("knapsack:inner=mao", "inner: 'mao' is not known.*did you mean 'moa'"),
    ],
)
async def test_what_cannot_be_chosen_is_said(policy: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        await plan_of(policy, context_of("knapsack", priced_pool(PRICED)))


async def test_a_budget_of_price_needs_prices() -> None:
    with pytest.raises(RequestError, match=r"llms\.s\.price is not set"):
        await plan_of("knapsack:price=1", context_of("knapsack"))


async def test_who_disagrees_is_shadowed_and_then_replaced() -> None:
    # b, and d that comes after it, are wrong; c is right. Windows are of 2 queries.
    agents = FakeAgents(
        {name: tuple(Say(text=f"Answer: {n}") for _ in range(30)) for name, n in zip("abcd", "1213", strict=True)}
    )
    context = replace(context_of("free_agency"), agent="roster=3:window=2:agents=a+c+b+d")
    seen = []
    for number in range(9):
        policy = build_policy("free_agency", context)
        answer = await answer_of(orchestrator_of(agents, POOL), replace(query(max_steps=4), trace_id=f"q{number}"), policy)
        seen.append((",".join(answer.steps[0].active), ",".join(name for name, _ in answer.steps[0].explored)))
        assert (answer.text, answer.stop_reason) == ("Answer: 1", "schedule")
    # Two queries show that b disagrees; two more that its shadow d is no better, so d is free again; and so on.
    assert seen == [("a,c,b", "")] * 2 + [("a,c,b", "d")] * 2 + [("a,c,b", "")] * 2 + [("a,c,b", "d")] * 2 + [("a,c,b", "")]


async def test_a_better_shadow_takes_the_place() -> None:
    words = {"a": "1", "b": "2", "c": "1", "d": "1"}
    agents = FakeAgents({name: tuple(Say(text=f"Answer: {n}") for _ in range(30)) for name, n in words.items()})
    context = replace(context_of("free_agency"), agent="roster=3:window=2")
    asked = []
    for number in range(6):
        policy = build_policy("free_agency", context)
        await answer_of(orchestrator_of(agents, POOL), replace(query(max_steps=4), trace_id=f"q{number}"), policy)
        asked.append("".join(call.agent for call in agents.calls))
        agents.calls.clear()
    assert ["".join(sorted(names)) for names in asked] == ["abc", "abc", "abcd", "abcd", "acd", "acd"]


@pytest.mark.parametrize(
    "policy", ["capacity_aware:inner=moa", "capacity_aware:inner=majority_k", "knapsack", "knapsack:inner=chain"]
)
async def test_calls_and_tokens_are_those_of_the_inner_policys_formula(policy: str) -> None:
    await check_cost(policy)


async def test_a_roster_without_shadows_costs_a_call_a_place_and_at_most_as_many_more() -> None:
    answer, calls = await run("free_agency:roster=2")
    assert schedule_of(calls) == ["a.0", "b.0"]
    assert answer.stop_reason == "schedule"


@pytest.mark.parametrize(
    ("inner", "asked"),
    [("majority_k", "ab"), ("dmoa", "ab"), ("dense", "ab"), ("single", "a"), ("exploring", "ab"), ("star", "a")],
)
async def test_only_agents_that_take_part_are_asked_within_capacities(inner: str, asked: str) -> None:
    plan = await plan_of(f"capacity_aware:agents=a+b:inner={inner}", context_of("capacity_aware"))
    assert sorted(x.agent for x in plan.activations) == list(asked)
    assert {x.agent for x in (*plan.activations, *plan.reserves, *plan.explored)} <= {"a", "b"}
    if plan.decision is not None:
        assert [x.agent for x in plan.activations] == ["b", "a"]  # as the gate ranks them
        assert plan.mass == pytest.approx(0.3)


async def test_a_chooser_that_takes_no_part_is_asked_all_the_same() -> None:
    _, calls = await run("capacity_aware:agents=b+c:inner=selector", lambda call: "c" if call.step == 0 else None)
    assert schedule_of(calls) == ["a.0", "c.1"]


async def test_a_sub_pool_is_chosen_once_for_a_query() -> None:
    """d is worth most, and dies while the query is under way."""
    context = context_of("knapsack", priced_pool(PRICED))
    built = build_policy("knapsack", replace(context, agent="inner=self_moa:price=6"))
    first = await built.next_step(state_of(query()))
    assert isinstance(first, StepPlan)
    router = context.router
    before = [x.agent for x in first.activations]
    router.report_unavailable(before[0], "gone")
    loop = orchestrator_of(FakeAgents({name: Say(text="1") for name in POOL}), POOL)
    answer = await answer_of(loop, query(max_steps=5), built)
    assert {name for step in answer.steps for name in step.active} == {before[0]}
