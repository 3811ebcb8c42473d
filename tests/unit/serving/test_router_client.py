"""The ingress's side of the router: copies of weights follow what is installed, and stand in while the actor is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from dmoa import checkpoint
from dmoa.checkpoint import FILES, describe_gate
from dmoa.config import Config
from dmoa.core.gate import init_gate
from dmoa.errors import ConfigError, DmoaError, NoAgentError, RoutingError
from dmoa.routing import LocalRouter, RouterView
from dmoa.serving.actors import pack_record, unpack_record
from dmoa.serving.agent_client import MissingReplicas
from dmoa.serving.rollover import pool_version
from dmoa.serving.router.client import (
    MASKED_S,
    MAX_HELD,
    NUM_ANSWERED,
    PATIENCE_S,
    ROUTE_TIMEOUT_S,
    TRIED_S,
    RemoteRouter,
    told,
)
from dmoa.testing import DIM, gate_spec
from dmoa.types import RouteDecision, RouteRequest, RouterStatus

ASK = RouteRequest(input_X=np.ones(2 * DIM + 4, np.float32))
CONFIG = Config.model_validate(
    {
        "name": "p",
        "llms": {"s": {"model": "scripted:x", "engine": "scripted"}},
        "agents": [{"name": "a", "llm": "s", "profile": "Adds."}],
    }
)


class Method:
    """A method of an actor, as its handle has it."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.remote = work


class FakeActor:
    """A router actor in this process that can be away; every `install` makes a new version current."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._local = LocalRouter()
        self.is_away = False
        self.versions: list[str] = []
        self.told: list[tuple[Any, ...]] = []
        self.fetched: list[str] = []
        self.inputs: list[Any] = []
        self.configure, self.route, self.weights = Method(self._configure), Method(self._route), Method(self._weights)
        self.look = Method(self._look)
        self.batches: list[int] = []
        self.release = asyncio.Event()
        self.release.set()
        self.install()

    def install(self) -> str:
        gate = init_gate(gate_spec("abc"), seed=len(self.versions))
        record = describe_gate(gate, fingerprint="f", trained_on={"rows": 1})
        checkpoint.save(self._folder / record.version, gate, record)
        self._local.install(record.version, gate)
        self.versions.append(record.version)
        return record.version

    def cool(self, *agents: str) -> None:
        self._local.cold = frozenset(agents)

    def mask(self, *agents: str) -> None:
        self._local.masked = frozenset(agents)

    def _check(self) -> None:
        if self.is_away:
            raise ActorUnavailableError("it restarts", b"0" * 16)

    async def _configure(self, *told: Any) -> str:
        self._check()
        self.told.append(told)
        return self._local.current

    async def _route(self, packed: bytes, version: str) -> bytes:
        self._check()
        assert version == pool_version(CONFIG)
        requests = unpack_record(packed)
        self.batches.append(len(requests))
        await self.release.wait()
        decisions = await asyncio.gather(*map(self._local.route, requests), return_exceptions=True)
        return pack_record([told(one) if isinstance(one, BaseException) else one for one in decisions])

    async def _look(self, packed: bytes, version: str) -> bytes:
        self._check()
        seen, decided = unpack_record(packed)
        self._local.add_decided(decided)
        self.inputs.extend(decided.inputs)
        while self._local.view == seen and not self.is_away:  # noqa: ASYNC110 -- as the actor's own
            await asyncio.sleep(0.001)
        self._check()
        return pack_record(self._local.view)

    async def _weights(self, version: str) -> dict[str, bytes]:
        self._check()
        self.fetched.append(version)
        return {name: (self._folder / version / name).read_bytes() for name in FILES}


async def settle(router: RemoteRouter) -> None:
    """Wait for the copies under way."""
    await asyncio.gather(*router._tasks)


@pytest.fixture
async def pair(tmp_path: Path) -> tuple[FakeActor, RemoteRouter]:
    actor = FakeActor(tmp_path)
    router = RemoteRouter(actor, CONFIG, "checkpoint-version")
    assert await router.start() == actor.versions[0]
    return actor, router


async def test_the_actor_is_told_what_is_configured(pair: tuple[FakeActor, RemoteRouter]) -> None:
    actor, _ = pair
    assert actor.told == [(CONFIG.model_dump_json(), "checkpoint-version")]


@pytest.mark.parametrize("kind", ["ConfigError", "CheckpointError"])
async def test_a_router_that_cannot_have_its_state_is_told_of_in_a_line(tmp_path: Path, kind: str) -> None:
    actor = FakeActor(tmp_path)
    words = f"ray::RouterActor.__init__()\n  File x.py, line 1\ndmoa.errors.{kind}: no space"

    async def dead(*told: Any) -> str:
        raise ActorDiedError(RayTaskError("__init__", words, DmoaError("no space")))

    actor.configure = Method(dead)
    with pytest.raises(ConfigError, match=r"^no space$"):
        await RemoteRouter(actor, CONFIG).start()


async def test_an_ingress_that_starts_while_the_router_restarts_waits_for_it(tmp_path: Path) -> None:
    """One that ended with an error was started anew by Serve, and nobody listened for twice as long."""
    actor = FakeActor(tmp_path)
    actor.is_away, asked = True, 0

    async def restarting(*told: Any) -> str:
        nonlocal asked
        asked += 1
        actor.is_away = asked < 3
        return await actor._configure(*told)

    actor.configure = Method(restarting)
    assert await RemoteRouter(actor, CONFIG).start() == actor.versions[0]
    assert asked == 3


async def test_copies_follow_what_is_installed_and_decide_the_same_while_the_actor_is_away(
    pair: tuple[FakeActor, RemoteRouter],
) -> None:
    actor, router = pair
    first = await router.route(ASK)
    new = actor.install()
    second = await router.route(ASK)
    await settle(router)
    assert (first.gate_version, second.gate_version) == tuple(actor.versions)
    actor.is_away = True
    again = await router.route(ASK)
    assert (again.gate_version, again.routed_by) == (new, "ingress")
    assert again.probability_A.tobytes() == second.probability_A.tobytes()
    pinned = await router.route(RouteRequest(input_X=ASK.input_X, hidden_H=first.hidden_H, gate_version=first.gate_version))
    assert (pinned.gate_version, pinned.routed_by) == (first.gate_version, "ingress")
    assert actor.fetched == actor.versions  # once each


async def test_the_stand_in_is_built_before_the_actor_goes_away(tmp_path: Path) -> None:
    """To import torch takes seconds, which the queries of that moment would wait for; what starts first needs the CPU too."""
    router = RemoteRouter(FakeActor(tmp_path), CONFIG, ready_s=0.0)
    await router.start()
    assert router._building is None
    async with asyncio.timeout(60):
        while router._building is None:  # noqa: ASYNC110 -- a timer
            await asyncio.sleep(0.001)
        assert (await router._building).current == router._current


async def test_one_query_tries_an_actor_that_went_away_and_the_others_do_not_wait(
    pair: tuple[FakeActor, RemoteRouter],
) -> None:
    actor, router = pair
    router.away_s = 0.0
    asked, is_asked, release = 0, asyncio.Event(), asyncio.Event()

    async def hangs(*sent: Any) -> bytes:
        nonlocal asked
        asked += 1
        is_asked.set()
        await release.wait()
        raise ActorUnavailableError("it restarts", b"0" * 16)

    actor.is_away = True
    assert (await router.route(ASK)).routed_by == "ingress"
    router.away_s, router.trial_s = 60.0, 60.0
    actor.route, actor.is_away = Method(hangs), False
    trying = asyncio.create_task(router.route(ASK))
    await is_asked.wait()
    others = await asyncio.gather(*(router.route(ASK) for _ in range(3)))
    assert ([one.routed_by for one in others], asked, trying.done()) == (["ingress"] * 3, 1, False)
    release.set()
    assert (await trying).routed_by == "ingress"


async def test_who_was_cold_when_the_actor_went_away_stays_cold(pair: tuple[FakeActor, RemoteRouter]) -> None:
    actor, router = pair
    actor.cool("b")
    assert (await router.route(ASK)).cold == ("b",)
    await settle(router)
    actor.is_away = True
    alone = await router.route(ASK)
    assert (alone.cold, alone.routed_by) == (("b",), "ingress")


async def test_who_was_masked_when_the_actor_went_away_stays_masked(pair: tuple[FakeActor, RemoteRouter]) -> None:
    actor, router = pair
    actor.mask("b")
    assert (await router.route(ASK)).masked == ("b",)
    await settle(router)
    actor.is_away = True
    alone = await router.route(ASK)
    assert (alone.masked, alone.routed_by) == (("b",), "ingress")


async def test_an_agent_that_failed_while_the_actor_is_away_is_tried_by_one_query(
    pair: tuple[FakeActor, RemoteRouter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the router is away nobody else finds out who is back: eight queries at once would wait for a dead agent."""
    actor, router = pair
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    await router.route(ASK)
    first = (await router.route(ASK)).ranking[0]  # asked wherever it is not left out
    name = "abc"[first]
    actor.is_away = True
    router.report_unavailable(name, "it is dead")

    async def masked(queries: int) -> list[bool]:
        return [name in one.masked for one in await asyncio.gather(*(router.route(ASK) for _ in range(queries)))]

    assert await masked(3) == [True] * 3
    now += MASKED_S
    assert sorted(await masked(8)) == [False] + [True] * 7  # one tries it
    assert await masked(3) == [True] * 3
    router.report_unavailable(name, "it is still dead")
    now += TRIED_S
    assert await masked(3) == [True] * 3
    now += MASKED_S - TRIED_S
    assert sorted(await masked(3)) == [False, True, True]
    now += TRIED_S  # nobody said that it failed
    assert await masked(3) == [False] * 3


async def test_a_shorter_report_does_not_end_a_longer_one(
    pair: tuple[FakeActor, RemoteRouter], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, router = pair
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    await settle(router)
    actor.is_away = True
    for masked_s in (30.0, 0.0):
        router.report_unavailable("b", "its last replies came too late", masked_s)
    now += MASKED_S + 1
    assert (await router.route(ASK)).masked == ("b",)
    now += 30.0
    assert (await router.route(ASK)).masked == ()


async def test_where_all_failed_while_the_actor_is_away_they_are_tried_soon(
    pair: tuple[FakeActor, RemoteRouter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries have nobody else to ask, and a replica may be back within a second."""
    actor, router = pair
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    await router.route(ASK)
    await settle(router)
    actor.is_away = True
    for name in "abc":
        router.report_unavailable(name, "it is dead", 30.0 if name == "b" else 0.0)

    async def masked() -> list[str]:
        found = await asyncio.gather(*(router.route(ASK) for _ in range(4)), return_exceptions=True)
        return sorted("abc" if isinstance(one, NoAgentError) else "".join(cast(RouteDecision, one).masked) for one in found)

    assert await masked() == ["abc"] * 4
    now += TRIED_S
    tried = await masked()
    assert tried[-1] == "b", "who was late again and again stays masked"
    assert tried.count("abc") >= 2, "one query tries each"
    now += TRIED_S  # nobody said that they failed
    assert (await masked())[0] == "b"
    await masked()
    now += TRIED_S
    assert await masked() == ["b"] * 4


async def test_an_ingress_waits_for_the_router_as_long_as_its_answers_say(pair: tuple[FakeActor, RemoteRouter]) -> None:
    actor, router = pair
    assert router._patience_s == ROUTE_TIMEOUT_S  # before it knows
    for _ in range(NUM_ANSWERED):
        await router.route(ASK)
    assert PATIENCE_S <= router._patience_s <= ROUTE_TIMEOUT_S
    router._answered_s.append(0.1)
    router._answered_s.extend([0.002] * (NUM_ANSWERED - 1))
    assert router._patience_s == pytest.approx(0.4)
    router._answered_s.append(0.002)
    assert router._patience_s == PATIENCE_S
    actor.release.clear()  # it hangs
    assert [one.routed_by for one in await asyncio.gather(*(router.route(ASK) for _ in range(3)))] == ["ingress"] * 3


async def test_a_version_without_a_copy_waits_for_the_actor(pair: tuple[FakeActor, RemoteRouter]) -> None:
    actor, router = pair
    unseen = actor.install()
    actor.is_away = True
    with pytest.raises(NoAgentError, match=f"there is no copy of gate {unseen} here yet; ask again"):
        await router.route(RouteRequest(input_X=ASK.input_X, gate_version=unseen))
    assert (await router.route(ASK)).gate_version == actor.versions[0]  # new queries begin with what is held


async def test_copies_stay_bounded(pair: tuple[FakeActor, RemoteRouter]) -> None:
    actor, router = pair
    for _ in range(MAX_HELD + 4):
        await router.route(ASK)
        await settle(router)
        actor.install()
    await router.route(ASK)
    await settle(router)
    held = [version for version in actor.versions if version in router._weights]
    assert len(held) <= MAX_HELD + 2
    assert held == actor.versions[-len(held) :]


async def test_agents_without_a_replica_and_those_of_an_older_pool_are_gone(tmp_path: Path) -> None:
    actor = FakeActor(tmp_path)
    router = RemoteRouter(actor, CONFIG)
    told = RouterStatus(app="dmoa", pool="p", pool_fingerprint="f", pool_version="v", gate_version="v1", agents=("a", "b"))

    async def status() -> RouterStatus:
        if actor.is_away:
            raise ActorUnavailableError("it restarts", b"0" * 16)
        return told

    actor.status = Method(status)  # type: ignore[attr-defined]
    assert await router.missing_replicas() == MissingReplicas(version="v")
    told = replace(told, gone=("b",))
    assert await router.missing_replicas() == MissingReplicas(frozenset({"b"}), "v")
    told = replace(told, agents=("b",), pool_version="w")  # the router serves a newer pool, without `a`
    assert await router.missing_replicas() == MissingReplicas(frozenset({"a", "b"}), "w")
    actor.is_away = True
    assert await router.missing_replicas() == MissingReplicas()


async def test_decisions_that_wait_for_the_last_call_go_in_one_and_one_error_is_ones_own(
    pair: tuple[FakeActor, RemoteRouter],
) -> None:
    actor, router = pair
    alone = [await router.route(replace(ASK, input_X=ASK.input_X * i)) for i in range(5)]
    actor.batches.clear()
    actor.release.clear()
    asked = [asyncio.create_task(router.route(replace(ASK, input_X=ASK.input_X * i))) for i in range(5)]
    wrong = asyncio.create_task(router.route(replace(ASK, gate_version="no such version")))
    gone = asyncio.create_task(router.route(ASK))
    while not actor.batches:  # noqa: ASYNC110 -- no event tells
        await asyncio.sleep(0)
    late = asyncio.create_task(router.route(ASK))
    await asyncio.sleep(0)
    gone.cancel()
    actor.release.set()
    together = await asyncio.gather(*asked)
    with pytest.raises(RoutingError, match="no such version"):
        await wrong
    assert (await late).gate_version == actor.versions[0]
    assert actor.batches == [7, 1]
    assert [one.probability_A.tobytes() for one in together] == [one.probability_A.tobytes() for one in alone]


FOLLOWING = CONFIG.model_copy(update={"router": CONFIG.router.model_copy(update={"decide": "ingress"})})


async def follows(router: RemoteRouter, view: RouterView) -> None:
    """Wait until an ingress decides by a view."""
    async with asyncio.timeout(20):
        while router._view != view:  # noqa: ASYNC110 -- no event tells
            await asyncio.sleep(0.005)


@pytest.fixture
async def following(tmp_path: Path) -> AsyncIterator[tuple[FakeActor, RemoteRouter]]:
    actor = FakeActor(tmp_path)
    router = RemoteRouter(actor, FOLLOWING)
    await router.start()
    await follows(router, actor._local.view)
    yield actor, router
    await router.close()


def requests(num: int, **fields: Any) -> list[RouteRequest]:
    generator = np.random.default_rng(7)
    return [
        RouteRequest(input_X=generator.standard_normal(2 * DIM + 4).astype(np.float32), trace_id=f"{i:032x}", **fields)
        for i in range(num)
    ]


async def agree(actor: FakeActor, router: RemoteRouter, asked: list[RouteRequest]) -> list[RouteDecision]:
    """Have both decide, and check that the ingress says what the actor says, to the bit, without asking it."""
    asked_before = len(actor.batches)
    here = [await router.route(one) for one in asked]
    assert len(actor.batches) == asked_before
    for one, found in zip(asked, here, strict=True):
        there = await actor._local.route(one)
        assert found.routed_by == "ingress"
        for name in ("probability_A", "hidden_H"):
            assert getattr(found, name).tobytes() == getattr(there, name).tobytes()
        same = replace(found, routed_by=there.routed_by, probability_A=there.probability_A, hidden_H=there.hidden_H)
        assert repr(same) == repr(there)
    return here


async def test_an_ingress_that_decides_says_what_the_router_would(following: tuple[FakeActor, RemoteRouter]) -> None:
    actor, router = following
    local = actor._local
    first = await agree(actor, router, requests(8))
    actor.cool("b")
    local.report_unavailable("c", "it is dead")
    await follows(router, local.view)
    masked = await agree(actor, router, requests(8))
    assert {(one.masked, one.cold) for one in masked} == {(("c",), ("b",))}
    local.restore("c")
    old, new = local.current, actor.install()
    local.share(old, 0.5)  # a trial: half of the new queries begin with the version before
    await follows(router, local.view)
    split = await agree(actor, router, requests(32))
    assert {one.gate_version for one in split} == {old, new}
    pinned = requests(4, gate_version=old, hidden_H=first[0].hidden_H)
    assert {one.gate_version for one in await agree(actor, router, pinned)} == {old}


async def test_the_router_counts_what_ingresses_decide(following: tuple[FakeActor, RemoteRouter]) -> None:
    actor, router = following
    old = actor._local.current
    actor.install()
    actor._local.share(old, 0.5)
    await follows(router, actor._local.view)
    decisions = [await router.route(one) for one in requests(16)]
    actor.cool("a")  # news, with which the ingress looks again
    await follows(router, actor._local.view)
    beside = sum(one.is_beside for one in decisions)
    assert actor._local.decided.num_decisions == len(decisions) == len(actor.inputs)
    assert actor._local.decided.begun == (len(decisions) - beside, beside)
    assert actor._local.decided.activations.total() == sum(one.k for one in decisions)


async def test_what_an_ingress_reports_is_masked_there_at_once(following: tuple[FakeActor, RemoteRouter]) -> None:
    actor, router = following
    told: list[tuple[Any, ...]] = []

    async def report(*what: Any) -> None:
        told.append(what)

    actor.report_unavailable = Method(report)  # type: ignore[attr-defined]
    router.report_unavailable("a", "it died")
    assert (await router.route(ASK)).masked == ("a",)
    async with asyncio.timeout(20):
        while not told:  # noqa: ASYNC110 -- no event tells
            await asyncio.sleep(0.005)


async def test_a_version_that_an_ingress_does_not_hold_is_the_routers_to_decide(
    following: tuple[FakeActor, RemoteRouter],
) -> None:
    actor, router = following
    held = actor._local.current
    unseen = actor.install()
    router._weights.pop(unseen, None)
    decided = await router.route(RouteRequest(input_X=ASK.input_X, gate_version=unseen))
    assert decided.gate_version == unseen != held


async def test_an_ingress_goes_on_following_after_weights_that_it_cannot_read(following: tuple[FakeActor, RemoteRouter]) -> None:
    actor, router = following
    router.away_s = 0.01
    version = actor.install()
    (actor._folder / version / "gate.json").write_text("{}")
    async with asyncio.timeout(20):
        while version not in router._weights:  # noqa: ASYNC110 -- no event tells
            await asyncio.sleep(0.005)
    actor.install()
    await follows(router, actor._local.view)


async def test_an_ingress_that_loses_the_router_goes_on_and_follows_it_again(
    following: tuple[FakeActor, RemoteRouter],
) -> None:
    actor, router = following
    actor.is_away = True
    async with asyncio.timeout(20):
        while router._view is not None:  # noqa: ASYNC110 -- no event tells
            await asyncio.sleep(0.005)
    assert (await router.route(ASK)).routed_by == "ingress"
    actor.is_away = False
    actor.install()
    await follows(router, actor._local.view)
    assert (await router.route(ASK)).gate_version == actor.versions[-1]
