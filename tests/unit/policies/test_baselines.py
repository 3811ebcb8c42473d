"""The policies that a gate is compared with: everyone, and anyone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from dmoa.policies.baselines import DensePolicy, RandomPolicy
from dmoa.testing import query, state_of
from dmoa.types import StepPlan, StepRecord, SummarizerRecord
from tests.unit.policies.schedules import context_of, pool_of

AGENTS = ("a", "b", "c")
STEP = StepRecord(step=0, replies=(), active=(), summary="19", summarizer=SummarizerRecord(mode="select", verdict="rule"))


async def plan_of(policy: RandomPolicy | DensePolicy, trace_id: str = "q", *, steps: int = 0) -> StepPlan:
    plan = await policy.next_step(state_of(replace(query(), trace_id=trace_id), steps=(STEP,) * steps))
    assert isinstance(plan, StepPlan)
    return plan


async def test_dense_asks_everyone_at_every_step() -> None:
    for steps in (0, 1):
        plan = await plan_of(DensePolicy(context_of("dense", pool_of(AGENTS))), steps=steps)
        assert [activation.agent for activation in plan.activations] == list(AGENTS)
        assert (plan.reserves, plan.fold, plan.ends_with) == ((), "summarizer", None)


async def test_random_asks_one_agent_and_keeps_the_others_in_reserve() -> None:
    plan = await plan_of(RandomPolicy(context_of("random", pool_of(AGENTS))))
    assert len(plan.activations) == 1
    assert sorted(a.agent for a in (*plan.activations, *plan.reserves)) == list(AGENTS)
    assert plan.mass == plan.activations[0].probability == 1 / 3


async def test_random_repeats_for_a_query_and_draws_anew_at_every_step() -> None:
    policy = RandomPolicy(context_of("random", pool_of(AGENTS)))
    assert await plan_of(policy, "q7") == await plan_of(RandomPolicy(context_of("random", pool_of(AGENTS))), "q7")
    firsts = {(await plan_of(policy, "q7", steps=step)).activations[0].agent for step in range(20)}
    assert firsts == set(AGENTS)


async def test_random_is_even() -> None:
    policy = RandomPolicy(context_of("random", pool_of(AGENTS)))
    counts = Counter([(await plan_of(policy, f"q{number}")).activations[0].agent for number in range(900)])
    # Five standard deviations of a binomial count around 300.
    assert all(abs(counts[name] - 300) < 71 for name in AGENTS)
