"""What if: other gates and policies on recorded inputs, without a call; and branches, which go on from a recorded step."""

from __future__ import annotations

from typing import Any

import pytest

from dmoa.config import Config, loads
from dmoa.trace import AnsweredQuery
from tests.unit.serving.fake_service import connect, make_app
from tests.unit.serving.pool_service import PoolService, pool_service

POOL = """
name: tiny
llms:
  fake:
    model: scripted:fake
    engine: scripted
    engine_kwargs: {replies: {one: "The answer is 1.", two: "The answer is 2.", three: "The answer is 3."}}
agents:
  - {name: one, llm: fake, profile: Says one.}
  - {name: two, llm: fake, profile: Says two.}
  - {name: three, llm: fake, profile: Says three.}
limits: {max_steps: 3}
"""
GATES = {"v1": {"one": 0.1, "two": 0.2, "three": 0.7}, "v2": {"one": 0.5, "two": 0.4, "three": 0.1}}
QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "How many?"}], "temperature": 0.5, "stop": ["x"]}


def service() -> PoolService:
    config: Config = loads(POOL)
    return pool_service(config, GATES)


async def asked(client: Any, **more: Any) -> dict[str, Any]:
    """Ask, and return the trace."""
    reply = (await client.post("/v1/chat/completions", json=QUESTION | more)).json()
    found: dict[str, Any] = (await client.get(f"/v1/dmoa/traces/{reply['dmoa']['trace_id']}")).json()
    return found


async def test_a_trace_holds_the_prompt_of_every_call_and_when_it_was_made() -> None:
    async with connect(make_app(service())) as client:
        trace = await asked(client)
    calls = trace["calls"]
    assert [(call["step"], call["agent"]) for call in calls] == [(step, name) for step in range(3) for name in ("one", "two")]
    first, last = calls[0]["messages"], calls[-1]["messages"]
    assert first[-1]["content"].startswith("How many?")
    assert first[-1]["content"].endswith("Your role: Says one.")
    assert last[-1]["content"].count("Work so far, step") == 2
    assert last[-1]["content"].endswith("Your role: Says two.")
    starts = [call["started_ms"] for call in calls]
    assert starts[0] == 0.0
    assert starts == sorted(starts)


async def test_another_gate_decides_on_the_recorded_inputs_and_asks_nobody() -> None:
    held = service()
    async with connect(make_app(held)) as client:
        trace = await asked(client)
        path = f"/v1/dmoa/traces/{trace['trace_id']}/what-if"
        found = (await client.post(path, json={"gate_version": "v1"})).json()
        same = (await client.post(path, json={"gate_version": "v2"})).json()
        unknown = await client.post(path, json={"gate_version": "v9"})
        count = len((await client.get("/v1/dmoa/traces")).json()["data"])
    assert [step["asked"] for step in found["steps"]] == [["one", "two"]] * 3
    assert [step["would_ask"] for step in found["steps"]] == [["three", "two"]] * 3
    assert [step["would_ask"] for step in same["steps"]] == [["one", "two"]] * 3
    chances = [(one["agent"], one["probability"]) for one in found["steps"][0]["probabilities"]]
    assert chances == [("three", pytest.approx(0.7)), ("two", pytest.approx(0.2)), ("one", pytest.approx(0.1))]
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "gate_version")
    assert count == 1


async def test_another_policy_says_whom_it_would_ask_at_each_recorded_state() -> None:
    async with connect(make_app(service())) as client:
        trace = await asked(client)
        path = f"/v1/dmoa/traces/{trace['trace_id']}/what-if"
        found = (await client.post(path, json={"policy": "dense"})).json()
        for body in ({}, {"policy": "dense", "gate_version": "v1"}, {"policy": "nothing"}, {"gate_version": ""}):
            assert (await client.post(path, json=body)).status_code == 400
        assert (await client.post("/v1/dmoa/traces/none/what-if", json={"policy": "dense"})).status_code == 404
    assert sorted(found["steps"][0]["would_ask"]) == ["one", "three", "two"]


async def test_a_branch_takes_the_steps_before_it_as_they_were_and_is_a_query_of_its_own() -> None:
    async with connect(make_app(service())) as client:
        trace = await asked(client)
        path = f"/v1/dmoa/traces/{trace['trace_id']}/branch"
        reply = (await client.post(path, json={"step": 1})).json()
        branched = (await client.get(f"/v1/dmoa/traces/{reply['dmoa']['trace_id']}")).json()
        late = await client.post(path, json={"step": 3})
    assert branched["trace_id"] != trace["trace_id"]
    assert branched["metadata"] == {"branched_from": trace["trace_id"], "branched_at": "1"}
    assert branched["query"] | {"trace_id": ""} == trace["query"] | {"trace_id": ""}
    assert branched["dmoa"]["steps"][0] == trace["dmoa"]["steps"][0]
    # The gate goes on as it did: the same inputs and states, as no agent drew anything.
    for now, then in zip(branched["routes"], trace["routes"], strict=True):
        for name in ("input_X", "hidden_H", "probability_A"):
            assert now[name] == pytest.approx(then[name], abs=1e-5), name  # traces round entropies
    assert (late.status_code, late.json()["error"]["param"]) == (400, "step")


async def test_a_branch_may_ask_the_next_ranked_agents_or_another_policy() -> None:
    async with connect(make_app(service())) as client:
        trace = await asked(client)
        path = f"/v1/dmoa/traces/{trace['trace_id']}/branch"
        instead = (await client.post(path, json={"step": 1, "agents": ["three"]})).json()["dmoa"]
        other = (await client.post(path, json={"step": 0, "policy": "single"})).json()
        unknown = await client.post(path, json={"step": 0, "agents": ["four"]})
        over = await client.post(path, json={"step": 1, "policy": "single", "agents": ["two"]})
    counted = [[agent["name"] for agent in step["agents"][: step["k"]]] for step in instead["steps"]]
    assert counted == [["one", "two"], ["three"], ["one", "two"]]
    assert instead["steps"][1]["mass"] == pytest.approx(0.1)
    assert (other["dmoa"]["policy"], len(other["dmoa"]["steps"])) == ("single", 1)
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "agents")
    assert (over.status_code, over.json()["error"]["param"]) == (400, "agents"), "single asks once: two was never asked"


async def test_a_query_to_one_agent_is_asked_again_of_that_agent() -> None:
    async with connect(make_app(service())) as client:
        trace = await asked(client, model="three")
        path = f"/v1/dmoa/traces/{trace['trace_id']}"
        again = (await client.post(f"{path}/branch", json={"step": 0})).json()
        found = (await client.post(f"{path}/what-if", json={"policy": "single"})).json()
        other = (await client.post(f"{path}/what-if", json={"policy": "random"})).json()
    assert again["dmoa"]["policy"] == "single"
    assert [agent["name"] for agent in again["dmoa"]["steps"][0]["agents"]] == ["three"]
    assert [step["would_ask"] for step in found["steps"]] == [["three"]]
    assert len(other["steps"][0]["probabilities"]) == 3


async def test_what_only_a_gate_that_is_gone_could_go_on_with_is_refused_by_its_name() -> None:
    """A trace may be older than the versions that the router keeps; from its beginning the current gate decides."""
    held, later = service(), pool_service(loads(POOL), {"v3": GATES["v1"]})
    async with connect(make_app(held)) as client:
        trace = await asked(client)
    later.page.store = held.page.store
    path = f"/v1/dmoa/traces/{trace['trace_id']}"
    async with connect(make_app(later)) as client:
        lost = await client.post(f"{path}/branch", json={"step": 1})
        other = await client.post(f"{path}/what-if", json={"policy": "dmoa"})
        anew = await client.post(f"{path}/branch", json={"step": 0})
    for refused in (lost, other):
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_version")
        assert "gate version 'v2' is not known" in refused.json()["error"]["message"]
    assert anew.json()["dmoa"]["gate_version"] == "v3"


async def test_a_branch_is_kept_as_one() -> None:
    """For the feedback, which takes none: who branches chooses whom a gate version is to be judged by."""
    seen: list[int | None] = []

    class Noting(PoolService):
        def record(self, answered: AnsweredQuery, key_hash: str) -> None:
            seen.append(answered.branched_at)
            super().record(answered, key_hash)

    async with connect(make_app(Noting(service().page.swarm))) as client:
        trace = await asked(client)
        await client.post(f"/v1/dmoa/traces/{trace['trace_id']}/branch", json={"step": 1, "agents": ["three"]})
    assert seen == [None, 1]


async def test_an_answer_says_where_the_page_shows_it_and_a_lost_query_is_listed() -> None:
    held = service()
    async with connect(make_app(held)) as client:
        reply = (await client.post("/v1/chat/completions", json=QUESTION)).json()["dmoa"]
        assert reply["trace_url"] == f"http://test/#/query/{reply['trace_id']}"
        slow = {"dmoa": {"deadline_s": 1e-9}}
        assert (await client.post("/v1/chat/completions", json=QUESTION | slow)).status_code == 504
        found = (await client.get("/v1/dmoa/traces?error=true")).json()["data"]
    assert [(one["steps"], one["error"].partition(":")[0]) for one in found] == [(0, "DeadlineError")]


async def test_what_is_recorded_carries_who_asked() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with connect(make_app(service()), traceparent=parent) as client:
        assert (await asked(client))["query"]["traceparent"] == parent
