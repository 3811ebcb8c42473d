"""POST /v1/dmoa/outcomes: what a client may say of its own queries, and what it cannot find out about those of others."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from tests.unit.serving.fake_service import QUESTION, FakeService, connect, make_app

PATH = "/v1/dmoa/outcomes"
HASHES = tuple(hashlib.sha256(key.encode()).hexdigest() for key in ("alpha", "beta"))
ALPHA, BETA = ({"authorization": f"Bearer {key}"} for key in ("alpha", "beta"))


async def test_only_the_key_that_asked_may_judge() -> None:
    service = FakeService()
    async with connect(make_app(service, keys=HASHES)) as client:
        asked = await client.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION}, headers=ALPHA)
        trace_id = asked.json()["dmoa"]["trace_id"]
        body = {"trace_id": trace_id, "verdict": "right", "source": "users"}
        assert (await client.post(PATH, json=body)).status_code == 401
        refused = await client.post(PATH, json=body, headers=BETA)
        unknown = await client.post(PATH, json=body | {"trace_id": "0" * 32}, headers=BETA)
        assert (refused.status_code, unknown.status_code) == (404, 404)
        assert refused.json()["error"]["message"].replace(trace_id, "X") == unknown.json()["error"]["message"].replace(
            "0" * 32, "X"
        )
        for reward, kept in ((1, "new"), (1.0, "same"), (0, "changed")):
            said = await client.post(PATH, json={"trace_id": trace_id, "reward": reward, "source": "users"}, headers=ALPHA)
            assert (said.status_code, said.json()) == (200, {"trace_id": trace_id, "kept": kept})
    assert [(one.reward, one.source) for one in service.buffer.outcomes()] == [(0.0, "users")]


async def test_one_thing_said_in_two_ways_is_the_same() -> None:
    service = FakeService()
    async with connect(make_app(service)) as client:
        asked = await client.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION})
        body = {"trace_id": asked.json()["dmoa"]["trace_id"], "agent": "adder"}
        ways: list[dict[str, Any]] = [{"verdict": "wrong"}, {"reward": 0, "step": 0}, {"reward": -0.0, "step": None}]
        kept = [(await client.post(PATH, json=body | way)).json()["kept"] for way in ways]
        assert kept == ["new", "same", "same"]
        for odd in (True, "1", 1.0000001, -1e-9):
            assert (await client.post(PATH, json=body | {"reward": odd})).status_code == 400
        for text in ("NaN", "1e999", "[1]"):
            said = json.dumps(body)[:-1] + f', "reward": {text}}}'
            reply = await client.post(PATH, content=said, headers={"content-type": "application/json"})
            assert reply.status_code == 400
    assert [(str(one.reward), one.step) for one in service.buffer.outcomes()] == [("0.0", None)]


async def test_too_many_outcomes_are_told_to_wait() -> None:
    service = FakeService()
    service.buffer.outcomes_per_minute = 1
    async with connect(make_app(service)) as client:
        replies = [await client.post(PATH, json={"trace_id": "t", "reward": 1}) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [404, 429]
    assert replies[1].headers["retry-after"]
    assert "router.outcomes_per_minute" in replies[1].json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"reward": 1}, "trace_id", "missing"),
        ({"trace_id": "t"}, "reward", "missing; send it, or verdict"),
        ({"trace_id": "t", "reward": 1, "verdict": "right"}, "reward", "they mean the same"),
        ({"trace_id": "t", "reward": 1.5}, "reward", "is 1.5"),
        ({"trace_id": "t", "verdict": "good"}, "verdict", "'good'"),
        ({"trace_id": "t", "reward": 1, "agent": "nobody"}, "agent", "expected one of adder, sorter, dater"),
        ({"trace_id": "t", "reward": 1, "step": 0}, "step", "without agent"),
        ({"trace_id": "t", "reward": 1, "text": "19"}, "text", "unknown field"),
    ],
)
async def test_errors_name_the_field(body: dict[str, Any], param: str, words: str) -> None:
    async with connect(make_app(FakeService())) as client:
        reply = await client.post(PATH, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert words in error["message"]
