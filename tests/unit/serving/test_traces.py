"""The trace store: bounded, one key's queries are no other key's, traces written when asked for, and kept where they survive."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import ray.util.metrics
from ray.experimental import internal_kv

from dmoa.config import RouterConfig, TracingConfig
from dmoa.errors import ConfigError, NoAgentError, RequestError
from dmoa.orchestrator import advance, begin, finish
from dmoa.serving.actors import pack_record, unpack_record
from dmoa.serving.metrics import QueryMetrics
from dmoa.serving.trace_list import TraceFilter, TraceSummary, statistics_of, summarise, summary_of_failure
from dmoa.serving.traces import TraceOutbox, TraceStore
from dmoa.testing import decision, scripted_pool
from dmoa.trace import AnsweredQuery, Trace, answer_of_reply, read_traces, reply_dmoa, write_traces
from dmoa.types import (
    AgentReply,
    Answer,
    Choice,
    EntropySum,
    FinalCall,
    Message,
    Query,
    RouteRequest,
    StepRecord,
    SummarizerRecord,
    ToolCall,
)
from tests.logged import Logged
from tests.unit.serving.fake_service import make_answer, make_step, reply

NOW = time.time()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def words_in(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.iterdir())


def newest_in(folder: Path) -> Path:
    return max(folder.glob("*.index.jsonl"))


def break_newest(folder: Path) -> None:
    newest_in(folder).write_text("{")


def answered(trace_id: str, *, text: str = "What is 12 + 7?", wall_ms: float = 12.5, at_s: float = 0.0) -> AnsweredQuery:
    asked = Query(trace_id=trace_id, text=text)
    step = StepRecord(
        step=0,
        replies=(AgentReply(agent="a", status="ok", text="19", entropy=EntropySum(sum_nats=1.0, tokens=4)),),
        active=("a",),
        summary="19",
        summarizer=SummarizerRecord(mode="select", verdict="rule"),
        decision=decision({"a": 0.75, "b": 0.25}, 1),
        route=RouteRequest(input_X=np.array([0.1, 0.2], np.float32)),
    )
    answer: Answer = finish(advance(begin(asked), step), "dmoa", "max_steps", wall_ms=wall_ms)
    return AnsweredQuery(
        query=asked,
        answer=answer,
        pool="pool",
        fingerprint="f" * 64,
        user="me",
        metadata={"run": "7"},
        created_unix_s=NOW + at_s,
    )


async def put(store: TraceStore, trace_id: str, key_hash: str = "k", **more: Any) -> None:
    await store.put_all([(pack_record(answered(trace_id, **more)), key_hash)])


async def ids(store: TraceStore, key_hash: str | None = "k", **wanted: Any) -> list[str]:
    """The ids that a key is shown, page after page."""
    found: list[str] = []
    while True:
        page = (await store.listed(TraceFilter.parse(wanted), key_hash)).model_dump()
        found += [one["trace_id"] for one in page["data"]]
        if page["next"] is None:
            return found
        wanted["before"] = page["next"]


def test_a_list_shows_of_a_query_what_its_reply_says() -> None:
    """Two steps by hand: an agent that was asked only to learn from, one that failed, and one that was lost and stood in for."""
    first = make_step(0, "18", replies=(reply("dater"), reply("adder", latency_ms=1.23456)), explored=(("dater", 0.5),))
    lost = reply("sorter", status="late", entropy_tokens=0, completion_tokens=0)
    second = make_step(1, "19", active=("adder",), replies=(lost, reply("adder", entropy_sum_nats=1.0, right_probability=2 / 3)))
    answer = make_answer("t1", steps=(first, second), wall_ms=40.00049, degraded=True)
    summary, calls = summarise(answer, question="x" * 300, created_unix_s=NOW)
    shown = [(call.agent, call.status, call.is_active, call.entropy_nats, call.tokens, call.latency_ms) for call in calls]
    assert shown == [
        ("adder", "ok", True, 0.5, 4, 1.235),
        ("dater", "ok", False, 0.5, 4, 12.346),
        ("adder", "ok", True, 0.25, 4, 12.346),
        ("sorter", "late", False, None, 0, 12.346),
    ]
    assert [call.right_probability for call in calls] == [None, None, 0.666667, None]
    assert (summary.agents, summary.error, summary.steps, len(summary.question)) == (["adder"], "sorter: late", 2, 240)
    assert (summary.prompt_tokens, summary.completion_tokens, summary.wall_ms) == (4 * 10 + 2 * 5, 3 * 4 + 2 * 2, 40.0)
    told = reply_dmoa(answer)
    assert (
        summarise(answer_of_reply(told, text="", finish_reason="stop", wall_ms=40.0), question="", created_unix_s=NOW)[1] == calls
    )


async def test_load_is_the_mean_number_of_calls_in_flight_in_the_last_minute() -> None:
    """Calls of 20, 10 and 60 s, the last of a query that was answered before that minute."""
    store = TraceStore(RouterConfig())
    for number, (latency_ms, ago_s) in enumerate([(20e3, 1.0), (10e3, 2.0), (60e3, 600.0)]):
        step = make_step(0, "18", replies=(reply("adder", latency_ms=latency_ms),), active=("adder",))
        one = replace(answered(f"t{number}"), answer=make_answer(f"t{number}", steps=(step,)), created_unix_s=time.time() - ago_s)
        await store.put_all([(pack_record(one), "k")])
    told = {one.agent: one.model_dump() for one in await store.statistics(("adder", "sorter"), "k")}
    assert (told["adder"]["load"], told["sorter"]["load"], told["adder"]["calls"]) == (0.5, 0.0, 3)
    assert [one.load for one in statistics_of([], ["adder"])] == [None]


async def test_a_query_that_may_not_be_stored_is_counted_and_forgotten(tmp_path: Path) -> None:
    """Its record is not sent to learn from either, which without Ray would fail here."""
    store = TraceStore(RouterConfig(trace_uri=tmp_path.as_uri()))
    one = replace(answered("t1", text="What is my secret?"), is_stored=False)
    await store.put_all([(pack_record(one), "k")], "an app that learns")
    await put(store, "t2")
    listed = (await store.listed(TraceFilter(), "k")).model_dump()["data"]
    assert [(row["trace_id"], row["question"]) for row in listed] == [("t2", "What is 12 + 7?"), ("t1", "(not stored)")]
    assert await store.get("t1", "k") is None
    await store.save()
    assert await store.get("t1", None) is None
    assert "secret" not in words_in(tmp_path)
    assert (await store.statistics((), "k"))[0].calls == 2


def test_calls_stand_in_the_order_of_their_agents_and_are_timed_from_the_first() -> None:
    """An examiner is asked after those whom it examines, and stands last; here it is one of them."""
    asks, examines = ((Message(role="user", content=text),) for text in ("What?", "Is it right?"))
    said = reply("adder", "RIGHT", status="examiner", prompt=examines, sent_unix_s=NOW + 0.25)
    found = (reply("sorter", prompt=asks, sent_unix_s=NOW + 0.125), reply("adder", prompt=asks, sent_unix_s=NOW))
    one = replace(answered("t1"), answer=make_answer("t1", steps=(make_step(0, "19", replies=(said, *found)),)))
    trace = one.trace()
    calls = [(call.agent, call.messages[0]["content"], call.started_ms) for call in trace.calls]
    assert calls == [("adder", "What?", 0.0), ("sorter", "What?", 125.0), ("adder", "Is it right?", 250.0)]
    assert [agent.name for agent in trace.dmoa.steps[0].agents][:3] == [name for name, *_ in calls]


async def test_calls_before_a_branch_are_counted_once() -> None:
    steps = (make_step(0, "18", replies=(reply("adder"),)), make_step(1, "19", replies=(reply("sorter"),)))
    whole = replace(answered("t1"), answer=make_answer("t1", steps=steps))
    branch = replace(answered("t2"), answer=make_answer("t2", steps=steps), branched_at=1)
    store = TraceStore(RouterConfig())
    await store.put_all([(pack_record(one), "k") for one in (whole, branch)])
    told = {one.agent: (one.calls, one.tokens) for one in await store.statistics((), "k")}
    assert told == {"adder": (1, 4), "sorter": (2, 8)}
    shown = (await store.listed(TraceFilter(), "k")).model_dump()["data"]
    assert [one["steps"] for one in shown] == [2, 2]


def test_metrics_count_what_is_a_branchs_own_and_no_query_of_an_exploration(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Counter[tuple[str, ...]]()

    class Recorder:
        def __init__(self, name: str, *_: object) -> None:
            self._name = name

        def set_default_tags(self, tags: dict[str, str]) -> None:
            pass

        def inc(self, count: float, tags: dict[str, str]) -> None:
            told[self._name, *tags.values()] += int(count)

        observe = inc

    for kind in ("Counter", "Histogram"):
        monkeypatch.setattr(ray.util.metrics, kind, Recorder)
    steps = (make_step(0, "18", replies=(reply("adder"),)), make_step(1, "19", replies=(reply("sorter"),)))
    metrics, answer = QueryMetrics("p"), make_answer("t", steps=steps)
    metrics.count(replace(answered("t"), answer=answer, branched_at=1).own)
    metrics.count_calls(replace(answer, steps=steps[:1]))
    assert told["dmoa_queries", "dmoa", "agreement"] == told["dmoa_query_steps", "dmoa"] == 1
    assert (told["dmoa_agent_calls", "adder", "ok"], told["dmoa_agent_calls", "sorter", "ok"]) == (1, 1)
    assert told["dmoa_tokens", "completion"] == answer.usage.completion_tokens


async def test_no_gate_is_taught_or_judged_by_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are those of the query that it branches from, and whom it asks somebody chose."""
    told: list[str] = []

    async def take(packed: bytes) -> None:
        told.extend(record.answer.trace_id for record in unpack_record(packed))

    salts = SimpleNamespace(internal_kv_get=lambda *_: b"salt", internal_kv_put=lambda *_: 0)
    monkeypatch.setattr(internal_kv, "global_gcs_client", salts)
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: SimpleNamespace(put=SimpleNamespace(remote=take)))
    store = TraceStore(RouterConfig())
    both = (answered("asked"), replace(answered("branch"), branched_at=0))
    await store.put_all([(pack_record(one), "k") for one in both], "app")
    assert (told, sorted(await ids(store))) == (["asked"], ["asked", "branch"])


async def test_a_trace_is_that_of_the_query_when_it_was_answered() -> None:
    store = TraceStore(RouterConfig(num_traces=2))
    await put(store, "t1")
    found: Any = json.loads(await store.get("t1", "k") or "null")
    kept = answered("t1")
    assert Trace.model_validate(found) == Trace.model_validate_json(kept.trace().model_dump_json())
    assert (found["user"], found["metadata"]) == ("me", {"run": "7"})
    assert (found["pool_fingerprint"], found["dmoa"]["pool"]) == ("f" * 64, "pool")
    assert (found["created_unix_s"], found["answer"], found["routes"][0]["input_X"][0]) == (NOW, "19", float(np.float32(0.1)))


async def test_only_the_key_that_asked_gets_the_trace() -> None:
    store = TraceStore(RouterConfig(num_traces=2))
    await put(store, "t1", "mine")
    assert await store.get("t1", "other") is None
    assert await store.get("t1", "") is None
    assert await store.get("t2", "mine") is None
    assert await store.get("t1", "mine") is not None


async def test_the_oldest_goes_when_there_are_too_many() -> None:
    store = TraceStore(RouterConfig(num_traces=2))
    for trace_id in ("t1", "t2", "t3"):
        await put(store, trace_id)
    assert [await store.get(trace_id, "k") is not None for trace_id in ("t1", "t2", "t3")] == [False, True, True]


async def test_a_list_is_of_one_key_newest_first_and_an_admin_sees_all() -> None:
    store = TraceStore(RouterConfig())
    for number, key in enumerate(("a", "b", "a")):
        await put(store, f"t{number}", key, at_s=number)
    assert await ids(store, "a") == ["t2", "t0"]
    assert await ids(store, "b") == ["t1"]
    assert await ids(store, "") == []
    assert await ids(store, None) == ["t2", "t1", "t0"]
    assert await store.get("t1", None) is not None


async def test_pages_of_a_list_hold_every_trace_once() -> None:
    store = TraceStore(RouterConfig())
    for number in range(7):
        await put(store, f"t{number}", at_s=number // 3)  # several at one moment
    assert sorted(await ids(store, limit="2")) == [f"t{number}" for number in range(7)]


async def test_pages_follow_the_order_of_answers_and_not_that_in_which_they_were_told() -> None:
    """A query that failed is told of at once, an answered one with others a tenth of a second later."""
    store = TraceStore(RouterConfig())
    for trace_id, at_s in (("third", 3), ("first", 1), ("second", 2)):
        await put(store, trace_id, at_s=at_s)
    assert await ids(store, limit="1") == ["third", "second", "first"]


def test_an_examiner_has_not_failed() -> None:
    """Nor does an agent's pace count what it wrote in calls whose time it does not count: 4 tokens / 0.02 s."""
    said = reply("sorter", "WRONG", status="examiner", latency_ms=20.0)
    step = make_step(
        0,
        "19",
        replies=(said, reply("adder", latency_ms=20.0), reply("adder", status="failed", latency_ms=5.0)),
        active=("adder",),
    )
    summary, calls = summarise(make_answer("t1", steps=(step,)), question="", created_unix_s=NOW)
    assert summary.error == "adder: failed"
    found = {one.agent: one for one in statistics_of(calls)}
    assert {name: (one.calls, one.failed, one.tokens_per_s) for name, one in found.items()} == {
        "sorter": (1, 0, 200.0),
        "adder": (2, 1, 200.0),
    }


async def test_a_list_is_filtered_by_what_went_wrong_how_long_it_took_and_who_decided() -> None:
    store = TraceStore(RouterConfig())
    await put(store, "quick")
    await put(store, "slow", wall_ms=5000.0)
    failed = TraceSummary(
        trace_id="failed",
        created_unix_s=NOW,
        question="?",
        policy="single",
        gate_version=None,
        stop_reason=None,
        steps=0,
        agents=[],
        prompt_tokens=0,
        completion_tokens=0,
        wall_ms=1.0,
        price=None,
        degraded=False,
        error="NoAgentError: nobody is up",
    )
    await store.put_failed(failed.model_dump_json(), "k")
    assert await ids(store, error="true") == ["failed"]
    assert await ids(store, slow_ms="5000") == ["slow"]
    assert await ids(store, policy="single") == ["failed"]
    assert await ids(store, gate_version="v1") == ["slow", "quick"]
    assert await store.get("failed", "k") is None


@pytest.mark.parametrize(
    "given", [{"limit": "0"}, {"limit": "x"}, {"before": "yesterday"}, {"slow_ms": "-1"}, {"slow_ms": "nan"}, {"odd": "1"}]
)
def test_a_bad_filter_names_the_field(given: dict[str, str]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(RequestError, match=rf"^{name}(: unknown key \(value| is) '{value}'.*expected") as caught:
        TraceFilter.parse(given)
    assert caught.value.status == 400


async def test_statistics_count_what_each_agent_did() -> None:
    store = TraceStore(RouterConfig())
    await put(store, "t1")
    await put(store, "t2")
    (b, a) = [one.model_dump() for one in await store.statistics(("b", "a"), "k")]
    assert (a["calls"], a["active"], a["share"], a["failed"]) == (2, 2, 1.0, 0)
    assert a["entropies"] == [0, 2] + [0] * 10  # 0.25 nats of 3 in bins of a quarter
    assert (b["calls"], b["share"], sum(b["entropies"]), b["tokens_per_s"]) == (0, 0.0, 0, None)


async def test_traces_go_by_bytes_and_by_age() -> None:
    store = TraceStore(RouterConfig(trace_mb=1))
    for number in range(4):
        await put(store, f"t{number}", text="x" * 300_000)
    kept = await ids(store)
    assert "t3" in kept
    assert "t0" not in kept
    aged = TraceStore(RouterConfig(trace_days=2))
    await put(aged, "old", at_s=-3 * 86_400)
    await put(aged, "new", at_s=-1 * 86_400)
    assert await ids(aged) == ["new"]


async def test_traces_survive_a_restart_without_the_secrets_in_their_texts(tmp_path: Path) -> None:
    bounds = RouterConfig(trace_uri=tmp_path.as_uri())
    store = TraceStore(bounds)
    await put(store, "t1", "mine", text="my api_key=abcd1234efgh5678 is lost")
    await put(store, "t2", "other")
    await store.save()
    restarted = TraceStore(bounds)
    assert await ids(restarted, "mine") == ["t1"]
    assert await ids(restarted, None) == ["t2", "t1"]
    assert await restarted.get("t1", "other") is None
    for held in (store, restarted):
        found = Trace.model_validate_json(await held.get("t1", "mine") or "null")
        assert (found.answer, found.query["text"]) == ("19", "my api_key=[redacted] is lost")
        assert found.routes[0].input_X[1] == float(np.float32(0.2))
    assert "abcd1234efgh5678" not in words_in(tmp_path)
    (calls,) = [one.model_dump() for one in await restarted.statistics(("a",), "mine")]
    assert calls["calls"] == 1


async def test_no_secret_of_a_tools_result_or_a_form_is_written(tmp_path: Path) -> None:
    store, secret = TraceStore(RouterConfig(trace_uri=tmp_path.as_uri())), "api_key=abcd1234efgh5678"
    one = answered("t1")
    call = ToolCall(call_id="c1", name="add", arguments=json.dumps({"why": secret}))
    tools = ({"name": "add", "description": f"Adds, with {secret}"},)
    kept = replace(
        one,
        query=replace(
            one.query,
            query_id="q1",
            exchange=f"Result of add: {secret}",
            final=FinalCall(tools=tools),
            sampling={"stop": (secret,)},
        ),
        answer=replace(one.answer, choices=(Choice(text="", tool_calls=(call,), finish_reason="tool_calls"),)),
    )
    await store.put_all([(pack_record(kept), "mine")])
    await store.save()
    found = Trace.model_validate_json(await store.get("t1", "mine") or "null")
    assert "abcd1234" not in words_in(tmp_path)
    assert found.query["exchange"] == "Result of add: api_key=[redacted]"
    assert (found.query["trace_id"], found.query["query_id"], found.query["final"]["tools"][0]["name"]) == ("t1", "q1", "add")
    assert [made["name"] for made in found.choices[0]["tool_calls"]] == ["add"]


async def test_a_segment_goes_with_its_last_trace_and_a_broken_one_is_left_out(tmp_path: Path) -> None:
    bounds = RouterConfig(trace_uri=tmp_path.as_uri(), num_traces=2)
    store = TraceStore(bounds)
    for trace_id in ("t1", "t2"):
        await put(store, trace_id)
        await store.save()
    assert len(names_in(tmp_path)) == 4
    await put(store, "t3")
    await store.save()
    assert len(names_in(tmp_path)) == 4  # those of t2 and t3
    break_newest(tmp_path)
    assert await ids(TraceStore(bounds)) == ["t2"]


async def test_a_damaged_line_of_an_index_costs_its_own_trace_alone(tmp_path: Path, logged: Logged) -> None:
    bounds = RouterConfig(trace_uri=tmp_path.as_uri())
    store = TraceStore(bounds)
    for trace_id in ("t1", "t2", "t3"):
        await put(store, trace_id)
    await store.save()
    index = newest_in(tmp_path)
    first, _, last = index.read_bytes().split(b"\n")
    index.write_bytes(b"\n".join((first, b'{"owner": "k', last)))
    again = TraceStore(bounds)
    assert await ids(again) == ["t3", "t1"]
    assert all([await again.get(trace_id, "k") for trace_id in ("t1", "t3")])
    assert "1 traces of" in logged.text


async def test_half_a_line_is_no_trace(tmp_path: Path) -> None:
    """A file that was cut, or an index whose digits are wrong, gives nobody a part of anything."""
    store = TraceStore(RouterConfig(trace_uri=tmp_path.as_uri()))
    for trace_id in ("t1", "t2"):
        await put(store, trace_id)
    await store.save()
    lines = tmp_path / newest_in(tmp_path).name.replace(".index", "")
    lines.write_bytes(lines.read_bytes()[:-10])
    assert (await store.get("t1", "k") is None, await store.get("t2", "k")) == (False, None)


async def test_half_a_character_in_a_text_keeps_no_trace_from_being_read_or_written(tmp_path: Path) -> None:
    """As JSON may carry it, from an endpoint that cuts an error's words."""
    bounds = RouterConfig(trace_uri=tmp_path.as_uri())
    store = TraceStore(bounds)
    one = answered("odd")
    step = one.answer.steps[0]
    lost = AgentReply(agent="b", status="failed", error="no \ud83d", text="")
    odd = replace(one, answer=replace(one.answer, steps=(replace(step, replies=(*step.replies, lost)),)))
    await store.put_all([(pack_record(odd), "k")])
    await put(store, "even")
    here = json.loads(await store.get("odd", "k") or "")
    await store.save()
    again = TraceStore(bounds)
    there = json.loads(await again.get("odd", "k") or "")
    assert await again.get("even", "k") is not None
    assert [trace["dmoa"]["steps"][0]["agents"][1]["error"] for trace in (here, there)] == ["no ?", "no ?"]
    write_traces(tmp_path / "file.jsonl", [odd.trace()])
    assert [trace.trace_id for trace in read_traces(tmp_path / "file.jsonl")] == ["odd"]
    told = summary_of_failure(one.query, "dmoa", NoAgentError("no \ud83d"), NOW)
    assert json.loads(told.model_dump_json())["error"] == "NoAgentError: no ?"


@contextmanager
def days_later(monkeypatch: pytest.MonkeyPatch, days: float) -> Iterator[None]:
    """Within the block it is so many days later."""
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + days * 86_400)
        yield


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():  # noqa: ASYNC110 - the store's own task
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("moves_to", ["b", None])
async def test_traces_are_kept_when_their_place_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged, moves_to: str | None
) -> None:
    """And go when their time has come, there and here."""
    (tmp_path / "b").mkdir()
    store = TraceStore(RouterConfig(trace_uri=(tmp_path / "a").as_uri(), num_traces=3))
    await put(store, "t1")
    await store.save()
    moved = RouterConfig(trace_uri=(tmp_path / moves_to).as_uri() if moves_to else None, num_traces=3)
    await store.configure(moved, TracingConfig())
    for number in range(2, 4):
        await put(store, f"t{number}", at_s=number)
        await store.save()
    assert await ids(store) == ["t3", "t2", "t1"]
    assert all([await store.get(f"t{number}", "k") for number in range(1, 4)])
    await put(store, "t4", at_s=4)
    assert (await ids(store), names_in(tmp_path / "a")) == (["t4", "t3", "t2"], [])
    with days_later(monkeypatch, 40):
        await store.configure(moved, TracingConfig())
    assert (names_in(tmp_path / "b"), logged.messages) == ([], [])


async def test_a_place_that_comes_back_holds_what_it_held(tmp_path: Path) -> None:
    """What lies there may be older than what came since, and is the first to go."""
    here, there = (RouterConfig(trace_uri=(tmp_path / name).as_uri(), num_traces=3) for name in "ab")
    store = TraceStore(here)
    for bounds, number in ((here, 1), (there, 2), (here, 3), (here, 4)):
        await store.configure(bounds, TracingConfig())
        await put(store, f"t{number}", at_s=number)
        await store.save()
    assert await ids(store) == ["t4", "t3", "t2"]
    assert all([await store.get(f"t{number}", "k") for number in (2, 3, 4)])
    assert (len(names_in(tmp_path / "a")), len(names_in(tmp_path / "b"))) == (4, 2)


async def test_a_place_that_cannot_be_opened_changes_nothing(tmp_path: Path) -> None:
    store = TraceStore(RouterConfig(trace_uri=tmp_path.as_uri()))
    with pytest.raises(ConfigError, match=r"^router\.trace_uri is 'nowhere://x'"):
        await store.configure(RouterConfig(trace_uri="nowhere://x"), TracingConfig())
    await put(store, "t1")
    await store.save()
    assert await store.get("t1", "k") is not None


async def test_too_old_a_trace_is_gone_though_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = RouterConfig(trace_uri=tmp_path.as_uri(), trace_days=30)
    store = TraceStore(bounds, tend_s=0.01)
    await put(store, "old")
    await store.save()
    with days_later(monkeypatch, 40):
        assert (await store.get("old", "k"), await ids(store), await store.statistics((), "k")) == (None, [], [])
        await until(lambda: not names_in(tmp_path))


async def test_too_old_a_trace_is_gone_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is what no index tells of: of a writer that died, or damaged. What is younger, or not ours, stays."""
    bounds = RouterConfig(trace_uri=tmp_path.as_uri(), trace_days=30)
    store = TraceStore(bounds)
    for trace_id in ("t1", "t2"):
        await put(store, trace_id)
        await store.save()
    break_newest(tmp_path)
    half = "000000000000001-abcdef.jsonl"
    for name in (half, f".{half}.01234567.draft", "notes.jsonl", "1-a.index.jsonl"):
        (tmp_path / name).write_text("{}")
    assert await ids(TraceStore(bounds)) == ["t1"]
    assert len(names_in(tmp_path)) == 4 + 2, "damaged, but young: somebody may mend it"
    with days_later(monkeypatch, 40):
        assert await ids(TraceStore(bounds)) == []
    assert names_in(tmp_path) == ["1-a.index.jsonl", "notes.jsonl"]


async def test_a_file_that_cannot_be_removed_is_tried_again_and_one_that_is_gone_is_gone(tmp_path: Path, logged: Logged) -> None:
    store = TraceStore(RouterConfig(trace_uri=tmp_path.as_uri(), num_traces=1), tend_s=0.05)
    await put(store, "t1")
    await store.save()
    index = newest_in(tmp_path)
    index.unlink()
    index.mkdir()  # no file any more, so that it cannot be removed
    await put(store, "t2")
    assert names_in(tmp_path) == [index.name], "what belongs to it is removed nevertheless"
    assert "files of old traces stay where they are for now" in logged.text
    index.rmdir()
    logged.clear()
    await asyncio.sleep(0.2)
    await store.save()
    newest_in(tmp_path).unlink()
    await put(store, "t3")
    assert (names_in(tmp_path), logged.messages) == ([], [])


async def test_a_place_that_cannot_be_read_yet_is_read_later(tmp_path: Path) -> None:
    bounds = RouterConfig(trace_uri=(tmp_path / "traces").as_uri())
    store = TraceStore(bounds)
    await put(store, "t1")
    await store.save()
    (tmp_path / "traces").rename(tmp_path / "away")
    (tmp_path / "traces").write_text("no folder")
    restarted = TraceStore(bounds, tend_s=0.01)
    await put(restarted, "t2", at_s=1)
    await restarted.save()
    assert await ids(restarted) == ["t2"]
    (tmp_path / "traces").unlink()
    (tmp_path / "away").rename(tmp_path / "traces")
    await until(lambda: len(names_in(tmp_path / "traces")) == 4)
    assert await ids(restarted) == await ids(TraceStore(bounds)) == ["t2", "t1"]


async def test_what_is_written_twice_at_once_is_written_once(tmp_path: Path) -> None:
    store = TraceStore(RouterConfig(trace_uri=tmp_path.as_uri()))
    await put(store, "t1")
    await asyncio.gather(store.save(), store.save(), store.end())
    assert len(names_in(tmp_path)) == 2


class Calls:
    """An actor's handle: keeps what it is called with, and fails the first time."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[tuple[bytes, str]], str | None]] = []

    @property
    def put_all(self) -> Calls:
        return self

    async def remote(self, packed: list[tuple[bytes, str]], learner: str | None) -> None:
        self.seen.append((packed, learner))
        if len(self.seen) == 1:
            raise RuntimeError("away")


async def test_an_ingress_sends_what_was_answered_in_a_while_in_one_call() -> None:
    calls = Calls()
    outbox = TraceOutbox(calls, "app", wait_s=0.01)
    lost = await asyncio.gather(*(outbox.put(answered(name), name) for name in "ab"), return_exceptions=True)
    assert [str(error) for error in lost] == ["away", "away"], "who waits learns that it was not kept"
    leaves = asyncio.create_task(outbox.put(answered("c"), "c"))
    await asyncio.sleep(0)
    leaves.cancel()
    await outbox.put(answered("d"), "d")
    assert [[owner for _, owner in packed] for packed, _ in calls.seen] == [["a", "b"], ["c", "d"]]
    assert {learner for _, learner in calls.seen} == {"app"}
    assert [unpack_record(packed).query.trace_id for packed, _ in calls.seen[1][0]] == ["c", "d"]


@pytest.mark.parametrize(("is_back", "kept"), [(True, ["t3", "t2"]), (False, ["t3"])])
async def test_a_store_that_ray_restarts_has_the_settings_that_were_served_last(
    monkeypatch: pytest.MonkeyPatch, is_back: bool, kept: list[str]
) -> None:
    """Its constructor gets those with which the first deployment made it."""
    last = scripted_pool("ab").model_copy(update={"router": RouterConfig(num_traces=2)})
    cluster = {b"dmoa/config/app": json.dumps({"config": last.model_dump(mode="json"), "configured": None}).encode()}
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(was_current_actor_reconstructed=is_back))
    monkeypatch.setattr(internal_kv, "global_gcs_client", SimpleNamespace(internal_kv_get=lambda key, _: cluster.get(key)))
    store = TraceStore(RouterConfig(num_traces=1), None, "app")
    for trace_id in ("t1", "t2", "t3"):
        await put(store, trace_id)
    assert await ids(store) == kept


async def test_a_store_that_ray_restarts_reads_where_the_app_wrote_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its place was changed while it lived."""
    here, there = (RouterConfig(trace_uri=(tmp_path / name).as_uri()) for name in "ab")
    last = scripted_pool("ab").model_copy(update={"router": there})
    cluster = {b"dmoa/config/app": json.dumps({"config": last.model_dump(mode="json"), "configured": None}).encode()}
    is_back = False

    def keep(key: bytes, value: bytes, *_: object) -> int:
        cluster[key] = value
        return 1

    client = SimpleNamespace(internal_kv_get=lambda key, _: cluster.get(key), internal_kv_put=keep)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(was_current_actor_reconstructed=is_back))
    monkeypatch.setattr(internal_kv, "global_gcs_client", client)
    store = TraceStore(here, None, "app")
    for bounds, number in ((here, 1), (there, 2)):
        await store.configure(bounds, TracingConfig())
        await put(store, f"t{number}", at_s=number)
        await store.save()
    is_back = True
    again = TraceStore(here, None, "app")
    assert await ids(again) == ["t2", "t1"]
    assert all([await again.get(trace_id, "k") for trace_id in ("t1", "t2")])
    await put(again, "t3", at_s=3)
    await again.save()
    assert (len(names_in(tmp_path / "a")), len(names_in(tmp_path / "b"))) == (2, 4)
