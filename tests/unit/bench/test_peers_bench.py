"""`dmoa bench --only peers`: the endpoint that all call, the client, process names, ratios; no peer is installed."""

from __future__ import annotations

import asyncio
import json
from itertools import islice

import pytest

from dmoa.bench.peer_servers import ROLES, WORDS, NullEndpoint, script
from dmoa.bench.peers import Caller, Taken, _questions, name_of, peers_pool, results


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += bytes(data)


def request(body: bytes) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_endpoint_answers_whole_requests_however_they_are_cut(size: int) -> None:
    endpoint, wire = NullEndpoint(), Wire()
    endpoint.connection_made(wire)
    sent = request(b'{"logprobs":true}') + request(b'{"model": "null"}')
    for start in range(0, len(sent), size):
        endpoint.data_received(sent[start : start + size])
    listed, plain = (json.loads(part.partition(b"\r\n\r\n")[2]) for part in wire.sent.split(b"HTTP/1.1 200 OK")[1:])
    assert listed["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"] == "".join(WORDS)
    assert [len(token["top_logprobs"]) for token in listed["choices"][0]["logprobs"]["content"]] == [20] * len(WORDS)
    assert plain["choices"][0]["logprobs"] is None


async def test_the_client_asks_over_one_connection() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(NullEndpoint, "127.0.0.1", 0)
    async with server, Caller(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "m") as caller:
        assert [await caller.ask(question) > 0 for question in ("one", "two")] == [True, True]


async def test_a_peer_asks_every_role_and_gives_what_most_say() -> None:
    asked = []

    async def call(role: str, question: str) -> str:
        asked.append((role, question))
        return "42" if role == ROLES[1] else "41"

    assert await script(call)("How many?") == "41"
    assert asked == [(role, "How many?") for role in ROLES]


def test_questions_are_new_only_where_they_shall_be() -> None:
    assert len(set(islice(_questions(are_new=True), 100))) == 100
    assert len(set(islice(_questions(are_new=False), 100))) == 8


@pytest.mark.parametrize(
    ("cmdline", "name"),
    [
        (["ray::ServeReplica:peers:ingress"], "ingress"),
        (["ray::ProxyActor"], "ProxyActor"),
        (["/env/bin/python", "-u", "/x/dashboard/agent.py", "--port=1"], "agent"),
        (["/x/gcs_server", "--log_dir=/tmp/y"], "gcs_server"),
    ],
)
def test_processes_have_short_names(cmdline: list[str], name: str) -> None:
    assert name_of(cmdline) == name


def test_ratios_are_taken_round_by_round_and_judged_by_their_bars() -> None:
    def rows(*figures: tuple[float, float, float]) -> list[Taken]:
        return [Taken(cpu_ms=a, queries_per_s=b, p50_ms=c, parts={"ingress": a}) for a, b, c in figures]

    taken = {
        "langgraph": rows((10, 100, 10), (20, 50, 20)),
        "dmoa": rows((8, 120, 16), (16, 60, 32)),
        "dmoa_new": rows((16, 60, 20), (32, 30, 40)),
    }
    found = {result.id: (result.value, result.passed) for result in results(taken)}
    assert {id_: found[id_] for id_ in ("peers.cpu", "peers.cpu_new", "peers.speed", "peers.p50")} == {
        "peers.cpu": (0.8, True),
        "peers.cpu_new": (1.6, False),
        "peers.speed": (1.2, True),
        "peers.p50": (1.6, False),
    }


def test_the_pool_makes_three_calls_a_query() -> None:
    config = peers_pool("http://127.0.0.1:1/v1")
    assert (config.gate.activation.rule, config.gate.activation.max_agents, config.limits.max_steps) == ("fixed", 3, 1)
