"""The router's brain: versions, batches, masks, and what happens when weights are broken or gone."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.config import GateConfig
from dmoa.core.gate import Gate, init_gate, weights_version
from dmoa.errors import ConfigError, NoAgentError, RoutingError
from dmoa.routing import MAX_VERSIONS, LocalRouter, adopt_gate, build_gate
from dmoa.testing import DIM, fixed_gate, gate_spec, jumping, router_of
from dmoa.types import RouteDecision, RouteRequest

P1 = {"a": 0.6, "b": 0.3, "c": 0.1}
P2 = {"a": 0.05, "b": 0.05, "c": 0.9}
X = 2 * DIM + 4
ZEROS = np.zeros(X, np.float32)
ASK = RouteRequest(input_X=ZEROS)


def random_gate(seed: int = 0) -> Gate:
    return init_gate(gate_spec("abcde", temperature=0.1), seed=seed)


def broken_gate() -> Gate:
    gate = fixed_gate(P2)
    with torch.no_grad():
        gate.head_bias[0] = float("nan")
    return gate


def random_requests(num: int, seed: int = 0) -> list[RouteRequest]:
    generator = np.random.default_rng(seed)
    return [
        RouteRequest(
            input_X=generator.standard_normal(X).astype(np.float32),
            hidden_H=generator.standard_normal(3).astype(np.float32) if i % 2 else None,
        )
        for i in range(num)
    ]


def same_bits(a: RouteDecision, b: RouteDecision) -> bool:
    return (
        a.probability_A.tobytes() == b.probability_A.tobytes()
        and a.hidden_H.tobytes() == b.hidden_H.tobytes()
        and (a.gate_version, a.agents, a.ranking, a.k, a.mass, a.masked)
        == (b.gate_version, b.agents, b.ranking, b.k, b.mass, b.masked)
    )


async def test_a_decision_says_what_the_gate_gave() -> None:
    decided = await router_of(fixed_gate(P1)).route(ASK)
    np.testing.assert_allclose(decided.probability_A, [0.6, 0.3, 0.1], rtol=1e-6)
    assert (decided.ranking, decided.k, decided.masked) == ((0, 1, 2), 2, ())  # 0.6 < 0.8 <= 0.6 + 0.3
    assert decided.mass == pytest.approx(0.9)
    assert (decided.gate_version, decided.agents, decided.routed_by) == ("v1", ("a", "b", "c"), "router")


async def test_concurrent_requests_share_one_batch_and_do_not_change_each_other() -> None:
    requests = random_requests(20)
    together, alone = router_of(random_gate()), router_of(random_gate())
    decided = await asyncio.gather(*(together.route(request) for request in requests))
    assert (together.decided.num_batches, together.decided.num_decisions) == (1, 20)
    for request, decision in zip(requests, decided, strict=True):
        assert same_bits(decision, await alone.route(request))
    assert (alone.decided.num_batches, alone.decided.num_decisions) == (20, 20)
    assert together.decided.activations == alone.decided.activations
    assert sum(together.decided.activations.values()) == sum(decision.k for decision in decided)


@settings(max_examples=25)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_decision_depends_on_neither_order_nor_neighbours(order: list[int], size: int) -> None:
    requests = random_requests(12, seed=1)
    router = router_of(random_gate(1))
    reference = router.decide(requests)
    for start in range(0, 12, size):
        chosen = order[start : start + size]
        for index, decision in zip(chosen, router.decide([requests[i] for i in chosen]), strict=True):
            assert same_bits(decision, reference[index])


def test_a_decision_may_wait_for_others() -> None:
    async def work() -> LocalRouter:
        router = router_of(fixed_gate(P1))
        router.max_wait_ms = 10.0
        first = asyncio.create_task(router.route(ASK))
        await asyncio.sleep(0.005)
        second = asyncio.create_task(router.route(ASK))
        await asyncio.gather(first, second)
        return router

    router, waited_s = jumping(work())
    assert (router.decided.num_batches, router.decided.num_decisions) == (1, 2)
    assert waited_s == pytest.approx(0.010)


async def test_first_and_later_steps_of_one_version_share_a_batch() -> None:
    router = router_of(fixed_gate(P1))
    await asyncio.gather(router.route(ASK), router.route(RouteRequest(input_X=ZEROS, gate_version="v1")))
    assert router.decided.num_batches == 1


async def test_a_query_keeps_the_version_that_it_began_with() -> None:
    router = router_of(fixed_gate(P1))
    first = await router.route(ASK)
    router.install("v2", fixed_gate(P2))
    pinned, fresh = await asyncio.gather(
        router.route(RouteRequest(input_X=ZEROS, hidden_H=first.hidden_H, gate_version="v1")), router.route(ASK)
    )
    assert (pinned.gate_version, pinned.ranking[0]) == ("v1", 0)
    assert (fresh.gate_version, fresh.ranking[0]) == ("v2", 2)
    assert router.decided.num_batches == 3  # versions never share a batch
    router.use("v1")
    assert (await router.route(ASK)).gate_version == "v1"


async def test_a_router_without_a_gate_says_so() -> None:
    router = LocalRouter()
    with pytest.raises(RoutingError, match="holds no gate yet"):
        await router.route(ASK)
    with pytest.raises(RoutingError, match="holds no gate yet"):
        _ = router.current
    router = router_of(fixed_gate(P1))
    for attempt in (router.route(RouteRequest(input_X=ZEROS, gate_version="v7")), asyncio.to_thread(router.use, "v7")):
        with pytest.raises(RoutingError, match="gate version 'v7' is not known; known: v1"):
            await attempt
    assert router.current == "v1"


async def test_a_version_that_is_not_in_memory_is_fetched_once() -> None:
    asked: list[str] = []

    def reload(version: str) -> Gate | None:
        asked.append(version)
        return fixed_gate(P2) if version == "v0" else None

    router = LocalRouter(reload=reload)
    router.install("v1", fixed_gate(P1))
    pinned = RouteRequest(input_X=ZEROS, gate_version="v0")
    assert [(await router.route(pinned)).ranking[0] for _ in range(2)] == [2, 2]
    assert asked == ["v0"]
    assert router.current == "v1"
    router.use("v0")
    assert (await router.route(ASK)).gate_version == "v0"


async def test_old_versions_leave_memory_but_not_the_current_and_the_previous_one() -> None:
    reloaded: list[str] = []

    def reload(version: str) -> Gate | None:
        reloaded.append(version)
        return fixed_gate(P1)

    router = LocalRouter(reload=reload)
    gate = fixed_gate(P1)
    for version in ("v0", "v1", "v2"):
        router.install(version, gate)
    for number in range(MAX_VERSIONS):
        await router.route(RouteRequest(input_X=ZEROS, gate_version=f"old-{number}"))
    assert len(reloaded) == MAX_VERSIONS
    for version in ("v2", "v1", f"old-{MAX_VERSIONS - 1}"):
        await router.route(RouteRequest(input_X=ZEROS, gate_version=version))
    assert len(reloaded) == MAX_VERSIONS
    await router.route(RouteRequest(input_X=ZEROS, gate_version="v0"))  # neither current nor previous: it left first
    assert reloaded[MAX_VERSIONS:] == ["v0"]


async def test_broken_weights_fall_back_to_the_last_good_version() -> None:
    router = router_of(fixed_gate(P1))
    router.install("v2", broken_gate())
    decided = await router.route(ASK)
    assert (decided.gate_version, decided.ranking[0]) == ("v1", 0)
    pinned = await router.route(RouteRequest(input_X=ZEROS, gate_version="v2"))
    assert pinned.gate_version == "v1"
    assert np.isfinite(pinned.probability_A).all()


async def test_broken_weights_without_a_good_version_are_an_error() -> None:
    router = router_of(broken_gate())
    with pytest.raises(RoutingError, match="gave NaN or infinity"):
        await router.route(ASK)
    assert (router.decided.num_batches, router.decided.num_decisions, router.decided.activations) == (0, 0, {})


BAD_REQUESTS = [
    (RouteRequest(input_X=np.zeros(3, np.float32)), RoutingError, "input_X has shape"),
    (RouteRequest(input_X=np.full(X, np.nan, np.float32)), RoutingError, "input_X holds NaN"),
    (RouteRequest(input_X=ZEROS, hidden_H=np.zeros(5, np.float32)), RoutingError, "hidden_H has shape"),
    (RouteRequest(input_X=ZEROS, unavailable=("a", "b", "c")), NoAgentError, "every agent of the pool is unavailable"),
    (RouteRequest(input_X=np.asarray(["x"] * X)), ValueError, "could not convert"),  # type: ignore[arg-type]  # on purpose
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_REQUESTS, ids=[message for _, _, message in BAD_REQUESTS])
async def test_one_bad_request_does_not_spoil_the_others(bad: RouteRequest, error: type[Exception], message: str) -> None:
    router = router_of(fixed_gate(P2))
    router.install("v2", fixed_gate(P1))
    good = [RouteRequest(input_X=ZEROS, max_agents=1), RouteRequest(input_X=ZEROS)]
    results = await asyncio.gather(*(router.route(r) for r in (good[0], bad, good[1])), return_exceptions=True)
    assert isinstance(results[1], error)
    assert message in str(results[1])
    assert [result.k for result in (results[0], results[2]) if isinstance(result, RouteDecision)] == [1, 2]
    assert router.decided.num_decisions == 2


async def test_what_one_request_makes_of_a_gate_does_not_send_the_others_to_another_gate() -> None:
    router = router_of(fixed_gate(P2, core="linear"))
    steep = fixed_gate(P1, core="linear")
    with torch.no_grad():
        steep.head_weight.fill_(10.0)
    router.install("v2", steep)
    huge = RouteRequest(input_X=np.full(X, 3e38, np.float32))  # times 10 it is infinite, and 0 for the gate before
    decided = await asyncio.gather(router.route(ASK), router.route(huge), router.route(ASK))
    assert [one.gate_version for one in decided] == ["v2", "v1", "v2"]


def test_an_agent_is_masked_for_as_long_as_the_longest_report_says() -> None:
    router, masked = router_of(fixed_gate(P1)), []

    async def work() -> None:
        for seconds in (1.0, 30.0, 2.0):
            router.report_unavailable("a", "its last replies came too late", seconds)
        for pause_s in (1.5, 27.5, 2.0):
            await asyncio.sleep(pause_s)
            masked.append("a" in router.masked)
        router.report_unavailable("a", "again", 1.0)
        await asyncio.sleep(1.5)
        masked.append("a" in router.masked)

    jumping(work())
    assert masked == [True, True, False, False]


async def test_an_error_while_fetching_a_version_reaches_those_who_wait() -> None:
    def reload(version: str) -> Gate | None:
        raise OSError("bucket is gone")

    router = LocalRouter(reload=reload)
    router.install("v1", fixed_gate(P1))
    pinned = RouteRequest(input_X=ZEROS, gate_version="v0")
    async with asyncio.timeout(20):
        results = await asyncio.gather(router.route(pinned), router.route(pinned), router.route(ASK), return_exceptions=True)
    assert [str(result) for result in results[:2]] == ["bucket is gone"] * 2
    assert isinstance(results[2], RouteDecision)


async def test_a_request_that_is_cancelled_does_not_disturb_its_batch() -> None:
    router = router_of(fixed_gate(P1))
    tasks = [asyncio.create_task(router.route(ASK)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)
    assert isinstance(results[0], RouteDecision)
    assert isinstance(results[2], RouteDecision)


async def test_masked_agents_have_no_probability_until_they_are_back() -> None:
    router = router_of(fixed_gate(P1))
    router.report_unavailable("a", "node lost")
    router.report_unavailable("a", "node lost")
    decided = await router.route(ASK)
    np.testing.assert_allclose(decided.probability_A, [0.0, 0.75, 0.25], rtol=1e-6)
    assert decided.probability_A[0] == 0.0
    assert (decided.masked, decided.ranking, decided.k) == (("a",), (1, 2), 2)
    own = await router.route(RouteRequest(input_X=ZEROS, unavailable=("b",)))
    assert (own.masked, own.ranking, own.mass) == (("a", "b"), (2,), 1.0)
    router.report_unavailable("b", "")
    router.report_unavailable("c", "")
    assert router.masked == {"a", "b", "c"}
    with pytest.raises(NoAgentError):
        await router.route(ASK)
    for agent in ("a", "b", "c"):
        router.restore(agent)
    assert (await router.route(ASK)).masked == ()


async def test_decisions_name_cold_agents_and_are_otherwise_the_same() -> None:
    (request,) = random_requests(1)
    router = router_of(random_gate())
    before = await router.route(request)
    assert before.cold == ()
    router.cold = frozenset({"d", "b", "elsewhere"})
    decided = await router.route(request)
    assert decided.cold == ("b", "d")
    assert same_bits(decided, before)
    router.report_unavailable("d", "crashed")
    decided = await router.route(request)
    assert (decided.masked, decided.cold) == (("d",), ("b",))
    router.cold = frozenset()
    router.restore("d")
    decided = await router.route(request)
    assert decided.cold == ()
    assert same_bits(decided, before)


async def test_who_routed_is_part_of_the_decision() -> None:
    router = LocalRouter(routed_by="ingress")
    router.install("v1", fixed_gate(P1))
    assert (await router.route(ASK)).routed_by == "ingress"


def test_untrained_weights_depend_on_configuration_and_seed_alone() -> None:
    versions = [
        weights_version(build_gate(GateConfig(hidden=8, seed=seed), agents))
        for seed, agents in ((0, ("a", "b")), (0, ("a", "b")), (1, ("a", "b")), (0, ("b", "a")))
    ]
    assert versions[0] == versions[1]
    assert len(set(versions)) == 3


def test_a_profile_gate_needs_profiles_and_can_take_over_another_pool() -> None:
    config = GateConfig(hidden=8, head="profile")
    with pytest.raises(ConfigError, match="needs profile embeddings"):
        build_gate(config, ("a", "b"))
    profile_AD = np.eye(2, 384, dtype=np.float32)
    gate = build_gate(config, ("a", "b"), profile_AD)
    adopted = adopt_gate(gate, ("c", "b", "d"), np.stack([profile_AD[0], profile_AD[1], -profile_AD[0]]))
    assert adopted.spec.agents == ("c", "b", "d")
    request = RouteRequest(input_X=np.random.default_rng(0).standard_normal(gate.spec.input_dim).astype(np.float32))
    old, new = (router_of(g).decide([request])[0] for g in (gate, adopted))
    # Equal profiles have equal logits, so the ratio of their probabilities stays.
    assert new.probability_A[0] / new.probability_A[1] == pytest.approx(old.probability_A[0] / old.probability_A[1], rel=1e-4)
    assert new.hidden_H.tobytes() == old.hidden_H.tobytes()
