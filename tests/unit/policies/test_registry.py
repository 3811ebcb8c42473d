"""Policies by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dmoa.config import Config, loads
from dmoa.errors import RequestError
from dmoa.policies.dmoa import DmoaPolicy
from dmoa.policies.registry import POLICIES, NamedGate, PolicyContext, build_policy, is_gated, width_of
from dmoa.testing import FakeEncoder, fixed_gate, query, router_of, state_of
from dmoa.types import StepPlan


def context(agent: str | None = None, **gate: object) -> PolicyContext:
    config = Config.model_validate(
        {
            "name": "pool",
            "llms": {"tiny": {"model": "scripted:tiny", "engine": "scripted"}},
            "agents": [{"name": name, "llm": "tiny", "profile": "x"} for name in "abc"],
            "gate": gate,
        }
    )
    router = router_of(fixed_gate({"a": 0.5, "b": 0.3, "c": 0.2}, preset=config.gate.preset))
    return PolicyContext(config=config, router=router, encoder=FakeEncoder(), agent=agent)


def test_every_policy_answers_to_its_own_name() -> None:
    assert list(POLICIES)[:5] == ["dmoa", "single", "dense", "random", "selector"]
    for name, entry in POLICIES.items():
        needs_data = entry.options is not None and "data" in entry.options.model_fields
        assert entry.name == name == build_policy(name, context("data=somewhere" if needs_data else None)).name
        assert entry.summary.endswith(".")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("layers=1", "layers is '1'; expected "),
        ("layer=2", "layer: unknown key"),
        ("agents=a+x", "'x' is not in the pool; expected some of a, b, c"),
        ("aggregator=aa", "'aa' is not in the pool; expected some of a, b, c; name one of them"),
        ("agents=", "agents is "),
        ("agents=a+a", "one agent stands there twice"),
        ("a:b", "agents is given twice, 'a' and 'b'"),
        ("layers=2:layers=3", "layers is given twice"),
    ],
)
def test_a_parameter_that_cannot_be_is_refused_by_name(words: str, said: str) -> None:
    with pytest.raises(RequestError, match=r"^policy: moa: ") as caught:
        build_policy("moa", context(words))
    assert said in str(caught.value)


def test_a_quorum_of_more_than_the_panel_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^policy: fusion: quorum is 4, and the panel has 3; expected at most as many"):
        build_policy("fusion", context("quorum=4"))
    assert build_policy("fusion", context("quorum=4:panel=4")).name == "fusion"


def test_a_width_is_that_of_the_parameters() -> None:
    config = context().config
    assert [width_of(name, config) for name in ("single:b", "moa", "moa:b", "self_consistency:k=9", "cot")] == [1, 3, 1, 9, 1]


def test_recorded_replies_are_refused_to_policies_that_ask_more_than_the_query(tmp_path: Path) -> None:
    config = loads(
        f"""name: pool
llms: {{r: {{model: "recorded:x", engine: recorded, engine_kwargs: {{replies: "{tmp_path}"}}}}}}
agents: [{{name: a, llm: r, profile: x}}, {{name: b, llm: r, profile: x}}]
limits: {{max_steps: 1}}
"""
    )
    asked = replace(context(), config=config)
    for name in POLICIES.builtin:
        options = POLICIES[name].options
        named = replace(asked, agent="data=x" if options and "data" in options.model_fields else None)
        if POLICIES[name].first_step_only:
            assert build_policy(name, named)
        else:
            with pytest.raises(RequestError, match=f"^policy: '{name}' asks agents more than the query alone"):
                build_policy(name, named)
    with pytest.raises(RequestError, match=r"^policy: 'star' asks agents more than the query alone"):
        build_policy("knapsack", replace(asked, agent="inner=star"))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(
        RequestError, match="policy: 'vote' is not known; expected one of dmoa, single, dense, random, selector"
    ) as caught:
        build_policy("vote", context())
    assert (caught.value.param, caught.value.code, caught.value.status) == ("dmoa.policy", "unknown_policy", 400)


async def test_single_asks_the_agent_that_was_named_or_the_first() -> None:
    for agent, asked, reserves in (("b", "b", []), (None, "a", ["b", "c"])):
        plan = await build_policy("single", context(agent)).next_step(state_of(query()))
        assert isinstance(plan, StepPlan)
        assert [activation.agent for activation in plan.activations] == [asked]
        assert [activation.agent for activation in plan.reserves] == reserves


async def test_dmoa_routes_with_the_gate_that_is_named() -> None:
    router = router_of(fixed_gate({"a": 0.5, "b": 0.3, "c": 0.2}))
    other = fixed_gate({"a": 0.1, "b": 0.1, "c": 0.8})
    router.install("other", other)
    router.use("v1")
    gates = {"new": NamedGate(version="other", preset="default")}
    for agent, asked in ((None, ["a", "b"]), ("new", ["c"])):
        plan = await build_policy("dmoa", replace(context(agent), router=router, gates=gates)).next_step(state_of(query()))
        assert isinstance(plan, StepPlan)
        assert [activation.agent for activation in plan.activations] == asked
    with pytest.raises(RequestError, match=r"dmoa:old is not a gate of this swarm, which has none"):
        build_policy("dmoa", context("old"))


@pytest.mark.parametrize("preset", ["default", "paper"])
async def test_dmoa_builds_the_inputs_of_the_pools_preset(preset: str) -> None:
    policy = build_policy("dmoa", context(preset=preset))
    assert isinstance(policy, DmoaPolicy)
    plan = await policy.next_step(state_of(query()))
    assert isinstance(plan, StepPlan)
    assert [activation.agent for activation in plan.activations] == ["a", "b"]


def test_the_limit_on_agents_is_that_of_gates() -> None:
    found = [name for name in POLICIES.builtin if is_gated(name)]
    assert found == ["dmoa", "exploring", "capacity_aware"]
    assert not is_gated("capacity_aware:inner=moa")
    assert is_gated("somebody.elses")
