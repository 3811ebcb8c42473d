"""Policies that ask the query alone, step by step or once: who is asked when and sees what, and that it costs what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmoa.policies.registry import POLICIES, needs_labels
from dmoa.testing import query
from tests.unit.policies.schedules import POOL, QUESTION, Says, check_cost, run, schedule_of

LONG = query(QUESTION, max_steps=2, max_agents=2)


def chooser(name: str) -> Says:
    """The one who reads the profiles names an agent; it answers at length."""
    return lambda call: name if "name of the one expert" in call.messages[-1].content else None


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Rewards by which c is the best agent, whatever the query."""
    rows = [{"query": text, "agent": agent, "reward": float(agent == "c")} for text in ("one", "two", "three") for agent in POOL]
    path = tmp_path / "rewards.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("policy", "schedule"),
    [
        ("single", ["a.0"]),
        ("single:c", ["c.0"]),
        # Where no two agree the surest speaks for the step; of equally sure ones the first that was asked.
        ("dense", ["a.0", "b.0", "c.0", "d.0", "a.1 <- a.0", "b.1 <- a.0", "c.1 <- a.0", "d.1 <- a.0"]),
        # The gate ranks d, c, b, a, and the query allows two.
        ("dmoa", ["d.0", "c.0", "d.1 <- d.0", "c.1 <- d.0"]),
        # Those that are asked only to learn from begin first, and see what the others see.
        ("exploring", ["b.0", "a.0", "d.0", "c.0", "b.1 <- d.0", "a.1 <- d.0", "d.1 <- d.0", "c.1 <- d.0"]),
        ("free_agency:roster=2", ["a.0", "b.0"]),
        ("majority_k:k=2:drawn=false", ["a.0", "b.0"]),
    ],
)
async def test_who_is_asked_when_and_sees_what(policy: str, schedule: list[str]) -> None:
    _, calls = await run(policy, asked=LONG)
    assert schedule_of(calls) == schedule


async def test_a_selector_reads_profiles_and_who_it_names_answers_without_its_words() -> None:
    answer, calls = await run("selector:b", chooser("d"), LONG)
    assert schedule_of(calls) == ["b.0", "d.1"]
    assert "Work so far" not in calls[1].messages[-1].content
    assert answer.text.startswith("[d.1]")


@pytest.mark.parametrize("policy", ["random", "random_router"])
async def test_one_agent_is_drawn(policy: str) -> None:
    answer, calls = await run(policy, asked=LONG)
    steps = 2 if policy == "random" else 1
    first = calls[0].agent
    assert [call.step for call in calls] == list(range(steps))
    assert schedule_of(calls) == [f"{first}.0", *([f"{calls[1].agent}.1 <- {first}.0"] if steps == 2 else [])]
    assert answer.text.startswith(f"[{calls[-1].agent}.{steps - 1}]")


@pytest.mark.parametrize("policy", [name for name in POLICIES.builtin if needs_labels(name) and POLICIES[name].first_step_only])
async def test_a_router_asks_the_agent_that_labels_name_once(policy: str, labels: Path) -> None:
    answer, calls = await run(f"{policy}:{'rule=ucb:' if policy == 'bandit' else ''}data={labels}", asked=LONG)
    assert schedule_of(calls) == ["c.0"]
    assert answer.text.startswith("[c.0]")
    await check_cost(f"{policy}:data={labels}", asked=LONG)


@pytest.mark.parametrize("policy", ["single", "dense", "random", "dmoa", "exploring", "random_router", "capacity_aware"])
@pytest.mark.parametrize("steps", [1, 2, 3])
async def test_calls_and_tokens_are_those_of_the_formula(policy: str, steps: int) -> None:
    await check_cost(policy, asked=query(QUESTION, max_steps=steps, max_agents=2))


async def test_a_selectors_short_word_is_one_call_of_the_formula() -> None:
    await check_cost("selector", chooser("d"), LONG)


def test_every_policy_tells_what_it_costs() -> None:
    assert [name for name in POLICIES.builtin if not POLICIES[name].cost or not POLICIES[name].reads] == []
