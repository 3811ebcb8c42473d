"""A pool on a cluster of four nodes with eight declared GPUs: placement, dry runs, an upgrade, a node lost and returned.

The agents are scripted: the GPUs are Ray's book-keeping alone. Every test leaves the cluster whole, with the pool on it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.nodes import Nodes, Placed, cluster, until
from tests.integration.server import Served, serve

GPUS = (2, 2, 2, 2)
DEDICATED = tuple(f"a{number}" for number in range(6))
POOL = """
name: many
llms:
  small:
    model: "scripted:small"
    engine: scripted
    placement: dedicated
    gpus: 1
    engine_kwargs: {delay_ms: 300, replies: {a0: "zero", a1: "one", a2: "two", a3: "three", a4: "four", a5: "five"}}
  wide:
    model: "scripted:wide"
    engine: scripted
    placement: shared
    gpus: 2
    engine_kwargs: {delay_ms: 300, replies: {judge: "guilty"}}
agents:
  - {name: a0, llm: small, profile: Counts from zero.}
  - {name: a1, llm: small, profile: Counts from one.}
  - {name: a2, llm: small, profile: Counts from two.}
  - {name: a3, llm: small, profile: Counts from three.}
  - {name: a4, llm: small, profile: Counts from four.}
  - {name: a5, llm: small, profile: Counts from five.}
  - {name: judge, llm: wide, profile: Judges.}
gate: {activation: {rule: fixed, max_agents: 3}}
limits: {max_steps: 3, deadline_s: 240}
router: {state_uri: "STATE"}
"""
"""Agents that never agree, so that every query takes all its steps."""
WAIT_S = 60.0
"""A call that is sent between the loss of an agent's only replica and its mask waits in Serve, until the query's deadline."""
QUERIES = 50
STREAMS = 10


@dataclass(frozen=True, slots=True)
class Running:
    """The cluster with the pool served on it."""

    nodes: Nodes
    served: Served
    pool: Path

    def replicas(self) -> dict[str, Placed]:
        """Return the replicas by deployment; each has one here."""
        return {placed.deployment: placed for placed in self.nodes.placed() if placed.deployment}

    def dry_run(self, *options: str) -> tuple[int, str, dict[str, Any]]:
        """Run the dry run against the cluster's address; returns its status, its errors and its JSON."""
        told = self.pool.with_name("plan.json")
        command = [str(Path(sys.executable).with_name("dmoa")), "serve", "--dry-run", "--config", str(self.pool)]
        command += ["--address", self.nodes.address, "--json", str(told), *options]
        done = subprocess.run(command, env=self.nodes.environ, capture_output=True, text=True, timeout=180, check=False)
        return done.returncode, done.stderr, json.loads(told.read_text())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("cluster")
    pool = folder / "pool.yaml"
    pool.write_text(POOL.replace("STATE", (folder / "state").as_uri()), encoding="utf-8")
    with cluster(*GPUS) as nodes:
        served = serve(pool, "--address", nodes.address, env=nodes.env)
        try:
            yield Running(nodes, served, pool)
        finally:
            assert served.stop() == 0


def check_own_gpus(replicas: dict[str, Placed]) -> None:
    """Assert that every agent has its own GPU, and the wide LLM two of one node."""
    taken = Counter((placed.node, gpu) for placed in replicas.values() for gpu in placed.gpus)
    assert len(taken) == sum(GPUS)
    assert set(taken.values()) == {1}, f"a GPU is shared: {taken}"
    assert {name: len(placed.gpus) for name, placed in replicas.items()} == {
        **{f"agent-{name}": 1 for name in DEDICATED},
        "llm-wide": 2,
        "encoder": 0,
        "ingress": 0,
    }


async def ask(http: httpx.AsyncClient, text: str, **dmoa: Any) -> dict[str, Any]:
    question = {"model": "many", "messages": [{"role": "user", "content": text}], "dmoa": dmoa}
    reply = await http.post("/v1/chat/completions", json=question)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def agents_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [agent for step in body["dmoa"]["steps"] for agent in step["agents"]]


def test_every_agent_has_its_own_gpu_and_a_wide_one_two_of_one_node(running: Running) -> None:
    replicas = running.replicas()
    check_own_gpus(replicas)
    assert {placed.node for placed in replicas.values() if placed.gpus} == set(running.nodes.living)
    # A query lives in its ingress, behind the proxy of the head: no other node may take it with it.
    assert replicas["ingress"].node == running.nodes.living[0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            "llms.wide.gpus=3",
            "llms.wide.gpus: a replica's 3 GPUs belong on one node, and the largest of the Ray at ADDRESS has 2",
        ),
        (
            "agents.0.autoscaling.min_replicas=2",
            "llms.small.gpus and of wide: 9 in all at min_replicas (agent-a0 2 x 1, agent-a1 1 x 1",
        ),
    ],
)
def test_a_dry_run_on_the_living_cluster_refuses_what_cannot_be_placed(running: Running, change: str, fault: str) -> None:
    status, errors, plan = running.dry_run("--set", change, "--set", "agents.0.autoscaling.max_replicas=2")
    assert status == 2, errors
    assert fault.replace("ADDRESS", running.nodes.address) in errors
    assert not plan["ok"]


def test_a_dry_run_on_the_living_cluster_knows_its_nodes(running: Running) -> None:
    status, errors, plan = running.dry_run()
    assert status == 0, errors
    assert (plan["ok"], plan["faults"]) == (True, [])
    assert (plan["gpus"]["available"], plan["gpus"]["needed_min"]) == (8, 8)
    assert [node["gpus"] for node in plan["gpus"]["nodes"]] == list(GPUS)


async def test_a_node_lost_in_the_middle_of_fifty_queries_fails_none_and_its_agents_come_back(running: Running) -> None:
    async with httpx.AsyncClient(base_url=running.served.url, timeout=300) as http:
        before = running.replicas()
        asked = {agent["name"] for agent in agents_of(await ask(http, "Who?")) if agent["status"] == "ok"}
        head = running.nodes.living[0]
        node = next(placed.node for name, placed in before.items() if name[6:] in asked and placed.node != head)
        lost = {name for name, placed in before.items() if placed.node == node and placed.gpus}
        bodies: list[dict[str, Any]] = []

        async def stream(number: int) -> None:
            for count in range(QUERIES // STREAMS):
                bodies.append(await ask(http, f"Question {count} of stream {number}?", deadline_s=WAIT_S))

        streams = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
        try:
            await until(lambda: len(bodies) >= STREAMS or any(one.done() for one in streams), "the first replies")
            await asyncio.to_thread(running.nodes.kill, node)
            assert len(bodies) < QUERIES - STREAMS, "the queries were over before the node was lost"
            await asyncio.gather(*streams)
        finally:
            await asyncio.to_thread(running.nodes.add, 2)
            for one in streams:
                one.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

        assert len(bodies) == QUERIES
        assert all(body["choices"][0]["message"]["content"] for body in bodies)
        hit = [body for body in bodies if any(told_as_lost(agent, lost) for agent in agents_of(body))]
        assert hit, "no trace tells of the lost node"
        assert all(body["dmoa"]["degraded"] for body in hit)

        def is_whole() -> bool:
            found = running.replicas()
            return found.keys() == before.keys() and {placed.node for placed in found.values()} <= set(running.nodes.living)

        await until(lambda: asyncio.to_thread(is_whole), "the agents of the lost node", 120)
        after = running.replicas()
        check_own_gpus(after)
        assert {name for name, placed in after.items() if placed.node == running.nodes.living[-1] and placed.gpus} == lost

        async def nothing_is_lost() -> bool:
            return not (await ask(http, "Who?"))["dmoa"]["degraded"]

        await until(nothing_is_lost, "a query that loses nothing")


async def test_an_upgrade_under_load_fails_no_query_and_mixes_no_versions(running: Running) -> None:
    """The pool is deployed again with other replies and another agent in the place of a5, while streams of queries ask.

    The wide LLM asks for no GPU in the new one: where all GPUs are taken, replicas that are replaced one by one may leave a wide
    one no node with two of them.
    """
    text = running.pool.read_text(encoding="utf-8").replace("gpus: 2", "gpus: 0")
    new = running.pool.with_name("new.yaml")
    words = {"zero": "nil", "one": "uno", "two": "due", "three": "tre", "four": "quattro", "five": "cinque"}
    for old, other in words.items():
        text = text.replace(f'"{old}"', f'"{other}"')
    new.write_text(text.replace("guilty", "innocent").replace("a5", "b5"), encoding="utf-8")
    versions = {**dict.fromkeys((*words, "guilty"), "old"), **dict.fromkeys((*words.values(), "innocent"), "new")}
    found: list[str] = []
    async with httpx.AsyncClient(base_url=running.served.url, timeout=300) as http:
        streams = [asyncio.create_task(_follow(http, versions, found)) for _ in range(6)]
        try:
            await until(lambda: len(found) >= 6 or any(one.done() for one in streams), "replies of the old pool")
            await _deploy(running, new)
            count = len(found)
            await until(lambda: len(found) >= count + 12 or any(one.done() for one in streams), "replies of the new pool")
        finally:
            for one in streams:
                one.cancel()
            ended = await asyncio.gather(*streams, return_exceptions=True)
            await _deploy(running, new, is_deleted=True)
            await _deploy(running, running.pool)
    assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended
    assert set(found) == {"old", "new"}, found
    assert set(found[:6]) == {"old"}
    assert set(found[-6:]) == {"new"}


async def _follow(http: httpx.AsyncClient, versions: dict[str, str], found: list[str]) -> None:
    """Ask one query after the other and note the version of each; fails for one that failed or is of more than one."""
    while True:
        body = await ask(http, "Who?", trace=True)
        texts = {agent["text"] for agent in agents_of(body) if agent["status"] == "ok"}
        seen = {versions[text] for text in (*texts, body["choices"][0]["message"]["content"])}
        names = {agent["name"] for agent in agents_of(body)} & {"a5", "b5"}
        assert len(seen) == 1, f"versions are mixed: {body}"
        assert names == ({"a5"} if seen == {"old"} else {"b5"}), body
        found += seen


async def _deploy(running: Running, pool: Path, *, is_deleted: bool = False) -> None:
    """Deploy a pool over the running one, as an operator who runs the command again does; `is_deleted`: and end it."""
    port = running.served.url.rpartition(":")[2]
    command = [str(Path(sys.executable).with_name("dmoa")), "serve", "--config", str(pool), "--port", port]
    again = Served([*command, "--address", running.nodes.address], running.nodes.env)
    try:
        await asyncio.to_thread(again.wait_ready)
    finally:
        if is_deleted:
            await asyncio.to_thread(again.stop)
        else:
            again.process.kill()  # not as a user would: ending it would delete the app
            await asyncio.to_thread(again.process.wait, 60)


def told_as_lost(agent: dict[str, Any], lost: set[str]) -> bool:
    """Say whether a reply tells that this agent, of a lost deployment, did not contribute at once."""
    is_of_them = f"agent-{agent['name']}" in lost or (agent["name"] == "judge" and "llm-wide" in lost)
    return is_of_them and (agent["status"] == "failed" or agent["attempts"] > 1)
