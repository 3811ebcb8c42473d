"""The call cache: what is the same call, who is marked, and that nothing but a good greedy reply is kept."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmoa.agents.call_cache import FILE_NAME, CachedAgents, CallStore, cache_folder, call_identities, is_whole
from dmoa.agents.pool import load_pool
from dmoa.errors import AgentUnavailableError, ConfigError
from dmoa.flat import reply_of
from dmoa.testing import Fail, FakeAgents, Lose, Say
from dmoa.types import AgentCall, AgentReply, Message, Sampling, TextDelta
from tests.logged import Logged

SAME = {"a": "engine", "b": "engine", "c": "another engine"}


def call_of(agent: str = "a", text: str = "What is 12 + 7?", trace: str = "t1", **sampling: object) -> AgentCall:
    return AgentCall(
        trace_id=trace,
        step=0,
        agent=agent,
        messages=(Message(role="user", content=text),),
        sampling=replace(Sampling(max_tokens=8), **sampling),  # type: ignore[arg-type]
        deadline_unix_s=None,
    )


def cached(agents: FakeAgents, folder: Path) -> CachedAgents:
    return CachedAgents(agents, CallStore(folder), SAME)


async def test_the_same_call_is_run_once_and_its_second_reply_is_marked(tmp_path: Path) -> None:
    agents = FakeAgents({"a": (Say(text="19", nats=0.25, tokens=3), Say(text="another"))})
    cache = cached(agents, tmp_path)
    first, second = await cache.call(call_of()), await cache.call(call_of(trace="t2", seed=7))
    assert len(agents.calls) == 1
    assert (first.text, first.is_memoised) == ("19", False)
    assert second == replace(first, is_memoised=True)  # tokens and entropies as if it had been run
    assert (second.usage.completion_tokens, second.entropy.sum_nats) == (3, 0.75)


async def test_an_entry_larger_than_any_is_neither_read_nor_kept(tmp_path: Path) -> None:
    agents = FakeAgents({"a": (Say(text="19"), Say(text="x" * (17 << 20)), Say(text="20"))})
    cache = cached(agents, tmp_path)
    await cache.call(call_of())
    with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as file:
        file.execute("UPDATE replies SET reply = reply || CAST(zeroblob(120000000) AS TEXT)")
    tracemalloc.start()
    reply = await cache.call(call_of())
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert (len(reply.text), reply.is_memoised) == (17 << 20, False)
    assert (await cache.call(call_of())).text == "20"  # the large one was not kept either


def test_the_first_reply_that_is_kept_stays(tmp_path: Path) -> None:
    """Two processes that share a file may ask the same at once: all read the same one afterwards."""
    one, other = CallStore(tmp_path), CallStore(tmp_path)
    first, second = (AgentReply(agent="a", status="ok", text=text) for text in ("first", "second"))
    one.put("key", first)
    other.put("key", second)
    assert (one.get("key"), other.get("key")) == (first, first)


async def test_replies_outlive_the_process(tmp_path: Path) -> None:
    await cached(FakeAgents({"a": Say(text="19")}), tmp_path).call(call_of())
    reply = await cached(FakeAgents({"a": Lose()}), tmp_path).call(call_of())
    assert (reply.text, reply.is_memoised) == ("19", True)


@pytest.mark.parametrize(
    "other",
    [
        call_of(text="What is 12 + 8?"),
        call_of(max_tokens=9),
        call_of(stop=("x",)),
        call_of(agent="c"),
    ],
    ids=["text", "max_tokens", "stop", "engine"],
)
async def test_whatever_a_reply_depends_on_makes_another_call(tmp_path: Path, other: AgentCall) -> None:
    agents = FakeAgents({"a": Say(text="19"), "c": Say(text="19")})
    cache = cached(agents, tmp_path)
    await cache.call(call_of())
    assert not (await cache.call(other)).is_memoised
    assert len(agents.calls) == 2


async def test_agents_with_the_same_engine_and_prompt_share_replies_under_their_own_names(tmp_path: Path) -> None:
    agents = FakeAgents({"a": Say(text="19"), "b": Say(text="never asked")})
    cache = cached(agents, tmp_path)
    await cache.call(call_of("a"))
    reply = await cache.call(call_of("b"))
    assert (reply.agent, reply.text, len(agents.calls)) == ("b", "19", 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"latency_ms": "12"},
        {"entropy_sum_nats": "0.5"},
        {"prompt_tokens": 1.5},
        {"status": "splendid"},
        {"finish_reason": "tired"},
        {"entropy_kind": "guessed"},
        {"text": 19},
        {"text": None},
        {"agent": None},
        {"completion_tokens": -5},
        {"completion_tokens": 10**400},
        {"entropy_sum_nats": float("nan")},
        {"latency_ms": float("inf")},
    ],
)
async def test_what_is_no_reply_is_not_believed(tmp_path: Path, changes: dict[str, Any]) -> None:
    agents = FakeAgents({"a": (Say(text="19", nats=0.25, tokens=3), Say(text="asked again"))})
    cache = cached(agents, tmp_path)
    await cache.call(call_of())
    assert (await cache.call(call_of())).is_memoised
    spoil(tmp_path, lambda text: json.dumps(json.loads(text) | changes))
    again = [await cache.call(call_of()) for _ in range(2)]
    assert [(reply.text, reply.is_memoised) for reply in again] == [("asked again", False), ("asked again", True)]


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "7", "", '{"agent": "a"}'])
async def test_json_that_holds_no_reply_is_not_believed(tmp_path: Path, text: str) -> None:
    agents = FakeAgents({"a": (Say(text="19"), Say(text="asked again"))})
    cache = cached(agents, tmp_path)
    await cache.call(call_of())
    spoil(tmp_path, lambda _: text)
    assert [(await cache.call(call_of())).is_memoised for _ in range(2)] == [False, True], "it is kept in place of that"


def test_a_place_of_another_machine_is_refused_and_no_folder_made_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--call-cache is 's3://bucket/calls'; expected a place of this machine"):
        cache_folder(Path("s3://bucket/calls"))
    assert list(tmp_path.iterdir()) == []
    assert cache_folder(None) is None
    assert cache_folder(Path("calls")) == tmp_path / "calls"


def test_a_file_that_is_damaged_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match=r"calls.sqlite3': file is not a database; remove that file to begin anew"):
        CallStore(tmp_path)


@pytest.mark.parametrize(
    "program",
    [
        "CREATE VIEW more AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r",
        "CREATE TRIGGER late AFTER INSERT ON replies BEGIN DELETE FROM replies; END",
    ],
)
def test_a_file_that_holds_programs_is_refused(tmp_path: Path, program: str) -> None:
    CallStore(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute(program)
        connection.commit()
    with pytest.raises(ConfigError, match="it holds programs"):
        CallStore(tmp_path)


def spoil(folder: Path, change: Callable[[str], str]) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME)) as connection:
        ((key, text),) = connection.execute("SELECT key, reply FROM replies").fetchall()
        connection.execute("UPDATE replies SET reply = ? WHERE key = ?", (change(text), key))
        connection.commit()


async def test_sampled_calls_pass_by(tmp_path: Path) -> None:
    agents = FakeAgents({"a": (Say(text="19"), Say(text="20"))})
    cache = cached(agents, tmp_path)
    texts = [(await cache.call(call_of(temperature=0.7))).text for _ in range(2)]
    assert texts == ["19", "20"]


async def test_failures_are_not_kept(tmp_path: Path) -> None:
    agents = FakeAgents({"a": (Fail(), Lose(), Say(text="19"))})
    cache = cached(agents, tmp_path)
    assert (await cache.call(call_of())).status == "failed"
    with pytest.raises(AgentUnavailableError):
        await cache.call(call_of())
    reply = await cache.call(call_of())
    assert (reply.text, reply.is_memoised) == ("19", False)


async def test_a_reply_that_a_deadline_cut_is_not_kept(tmp_path: Path) -> None:
    agents = FakeAgents({"a": (Say(text="Let me", tokens=3, finish_reason="length"), Say(text="19"))})
    cache = cached(agents, tmp_path)
    cut = await cache.call(replace(call_of(), deadline_unix_s=1.0))
    assert (cut.text, cut.finish_reason) == ("Let me", "length")
    whole = await cache.call(call_of())
    assert (whole.text, whole.is_memoised) == ("19", False)


async def test_a_reply_that_the_calls_own_limit_cut_is_kept(tmp_path: Path) -> None:
    agents = FakeAgents({"a": (Say(text="Let me add", tokens=8, finish_reason="length"), Say(text="another"))})
    cache = cached(agents, tmp_path)
    texts = [(await cache.call(call_of(max_tokens=8))).text for _ in range(2)]
    assert texts == ["Let me add"] * 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"finish_reason": "stop", "completion_tokens": 3}, True),
        ({"finish_reason": "length", "completion_tokens": 8}, True),
        ({"finish_reason": "length", "completion_tokens": 7}, False),
        ({"finish_reason": "length", "completion_tokens": 9, "are_tokens_estimated": True}, False),
        ({"finish_reason": "stop", "completion_tokens": 3, "are_tokens_estimated": True}, True),
        ({"finish_reason": "error", "completion_tokens": 8}, False),
        ({"status": "late", "completion_tokens": 8}, False),
        ({"status": "failed"}, False),
        ({"status": "overloaded"}, False),
    ],
)
def test_what_is_whole(changes: dict[str, Any], expected: bool) -> None:
    assert is_whole(reply_of({"agent": "a", "status": "ok", "text": "19"} | changes), call_of(max_tokens=8)) is expected


async def test_who_waits_for_a_call_that_a_deadline_cuts_runs_it(tmp_path: Path) -> None:
    gate = asyncio.Event()
    agents = FakeAgents({"a": (Say(text="Let me", tokens=3, finish_reason="length", after=gate), Say(text="19"))})
    cache = cached(agents, tmp_path)
    first = asyncio.create_task(cache.call(replace(call_of(), deadline_unix_s=1.0)))
    await agents.until_waiting("a")
    second = asyncio.create_task(cache.call(call_of(trace="t2")))
    await asyncio.sleep(0)
    gate.set()
    assert [(await task).text for task in (first, second)] == ["Let me", "19"]
    assert (await cache.call(call_of(trace="t3"))).text == "19"


async def test_the_same_call_in_flight_twice_is_run_once(tmp_path: Path) -> None:
    gate = asyncio.Event()
    agents = FakeAgents({"a": Say(text="19", after=gate)})
    cache = cached(agents, tmp_path)
    both = [asyncio.create_task(cache.call(call_of(trace=trace))) for trace in ("t1", "t2")]
    await agents.until_waiting("a")
    gate.set()
    replies = await asyncio.gather(*both)
    assert len(agents.calls) == 1
    assert sorted(reply.is_memoised for reply in replies) == [False, True]


async def test_who_waits_for_a_call_that_is_cancelled_runs_it(tmp_path: Path) -> None:
    gate = asyncio.Event()
    agents = FakeAgents({"a": (Say(text="never", after=asyncio.Event()), Say(text="19", after=gate))})
    cache = cached(agents, tmp_path)
    first = asyncio.create_task(cache.call(call_of()))
    await agents.until_waiting("a")
    second = asyncio.create_task(cache.call(call_of(trace="t2")))
    await asyncio.sleep(0)
    first.cancel()
    gate.set()
    assert (await second).text == "19"


async def test_a_stream_from_the_cache_is_one_piece_and_the_reply(tmp_path: Path) -> None:
    cache = cached(FakeAgents({"a": Say(text="19")}), tmp_path)
    await cache.call(call_of())
    items = [item async for item in cache.stream(call_of())]
    assert items[0] == TextDelta(text="19")
    assert isinstance(items[1], AgentReply)
    assert items[1].is_memoised


async def test_a_line_of_another_version_counts_as_none(tmp_path: Path) -> None:
    agents = FakeAgents({"a": Say(text="19")})
    cache = cached(agents, tmp_path)
    await cache.call(call_of())
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("UPDATE replies SET reply = ?", ('{"agent": "a", "status": "ok", "unknown": 1}',))
    connection.close()
    await cache.call(call_of())
    assert len(agents.calls) == 2


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--call-cache: cannot open .*name a folder that can be written"):
        CallStore(tmp_path / "file")


def test_roles_share_an_identity_and_tools_do_not() -> None:
    identities = call_identities(load_pool(None))
    assert identities["math-solver"] == identities["math-inspector"]
    assert identities["math-solver"] != identities["math-calculator"]


def test_another_corpus_makes_other_calls(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"

    def identity() -> str:
        config = load_pool(None, (f"tools.search_corpus={corpus}", "agents.0.tools=[search]"))
        return call_identities(config)[config.agents[0].name]

    corpus.write_text('{"title": "a", "text": "one"}\n')
    first = identity()
    assert identity() == first
    corpus.write_text('{"title": "a", "text": "two"}\n')
    assert identity() != first
    corpus.unlink()
    with pytest.raises(ConfigError, match=r"tools.search_corpus: cannot read .*corpus.jsonl"):
        identity()


def test_workers_that_open_a_new_cache_together_all_can(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as workers:
        for number in range(20):
            folders = [tmp_path / str(number)] * 8
            stores = list(workers.map(CallStore, folders))
            stores[0].put("key", AgentReply(agent="a", status="ok", text="19"))
            found = [store.get("key") for store in stores]
            assert [reply.text if reply else None for reply in found] == ["19"] * 8
            for store in stores:
                store.close()


async def test_a_file_that_fails_costs_no_reply(tmp_path: Path, logged: Logged) -> None:
    store = CallStore(tmp_path)
    cache = CachedAgents(FakeAgents({"a": Say(text="19")}), store, SAME)
    store.close()
    replies = [await cache.call(call_of()) for _ in range(2)]
    assert [(reply.status, reply.text, reply.is_memoised) for reply in replies] == [("ok", "19", False)] * 2
    assert len([record for record in logged.records if "call cache" in record.getMessage()]) == 1


async def test_recorded_replies_to_two_queries_of_one_text_are_two(tmp_path: Path) -> None:
    agents = FakeAgents({"a": (Say(text="19"), Say(text="20"))})
    cache = cached(agents, tmp_path)
    calls = [replace(call_of(), question="digest", query_id=name) for name in ("q1", "q2", "q1")]
    assert [(await cache.call(call)).text for call in calls] == ["19", "20", "19"]
