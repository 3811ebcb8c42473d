"""The feedback of a real server: queries reach the actor and its snapshot, outcomes come from the key that asked alone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from dmoa.feedback import FILE, read_feedback, tenant_of
from dmoa.serving.feedback_buffer import read_state
from dmoa.serving.http.middleware import hash_keys
from tests.integration.one_server.conftest import KEYS
from tests.integration.server import Served

pytestmark = pytest.mark.real_model
QUESTION = "How many zebras are seven zebras?"


async def test_a_query_and_its_outcome_reach_the_snapshot(server: Served, config_path: Path) -> None:
    headers = [{"authorization": f"Bearer {key}"} for key in KEYS]
    body = {"model": "swarm", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 6}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        reply = (await client.post("/v1/chat/completions", json=body, headers=headers[0])).json()["dmoa"]
        outcome = {"trace_id": reply["trace_id"], "verdict": "wrong", "source": "tests"}
        theirs = await client.post("/v1/dmoa/outcomes", json=outcome, headers=headers[1])
        mine = [await client.post("/v1/dmoa/outcomes", json=outcome, headers=headers[0]) for _ in range(2)]
    assert (theirs.status_code, theirs.json()["error"]["code"]) == (404, "trace_not_found")
    assert [(one.status_code, one.json()["kept"]) for one in mine] == [(200, "new"), (200, "same")]
    folder = config_path.parent / "state" / "feedback"
    deadline = time.monotonic() + 30
    state = folder / "feedback.json"  # Written after the rows: a snapshot's own end.
    while not state.exists() or reply["trace_id"] not in state.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, "the snapshot never came"
        await asyncio.sleep(0.1)
    data = (folder / FILE).read_bytes()
    (record,) = [one for one in read_feedback(data, "here") if one.answer.trace_id == reply["trace_id"]]
    assert record.tenant == tenant_of(hash_keys({"DMOA_API_KEYS": KEYS[0]})[0])
    assert len(record.answer.steps) == len(reply["steps"])
    for step, shown in zip(record.answer.steps, reply["steps"], strict=True):
        nats = {one.agent: one.entropy.mean_nats for one in step.replies}
        assert nats == pytest.approx(
            {one["name"]: one["entropy_nats"] for one in shown["agents"] if one["status"] == "ok"}, abs=1e-6
        )
        assert step.route is not None
        assert len(step.route.input_X) == 2 * 384 + 4
    assert b"zebra" not in data
    kept = [one for _, _, outcomes in read_state(state.read_bytes()) for one in outcomes]
    assert [(one.reward, one.source) for one in kept if one.trace_id == reply["trace_id"]] == [(0.0, "tests")]
