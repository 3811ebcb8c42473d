"""What `dmoa probe` asks a pool of recorded replies, and what it reads beside their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dmoa.config import Config, loads
from dmoa.errors import ConfigError
from dmoa.testing import domain_rows, scripted_pool, scripted_pool_yaml, write_rollouts
from dmoa.training.options import ProbeOptions, RolloutOptions
from dmoa.training.rollouts import RolloutFolder, RolloutQuery
from dmoa.workflows.collect import prepare_queries
from dmoa.workflows.console import Common
from dmoa.workflows.probe import RECORDED, common_queries, probe_rollouts, run_probe, sources_of

COMMON = Common(verbosity=-1)


def record(path: Path, **numbers: range) -> Path:
    """Replies of agents to the queries of these numbers, each with an id."""
    lines = [
        {"query_id": f"q{number}", "query": f"What is {number} + 1?", "agent": agent, "text": f"The answer is {number + 1}."}
        for agent, those in numbers.items()
        for number in those
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def recorded_pool(**places: str) -> Config:
    """A pool of an LLM for each agent, whose replies lie there."""
    llms = "".join(
        f"  {name}: {{model: 'recorded:{name}', engine: recorded, engine_kwargs: {{replies: '{at}'}}}}\n"
        for name, at in places.items()
    )
    agents = "".join(f"  - {{name: {name}, llm: {name}, profile: Is called {name}.}}\n" for name in places)
    gate = (
        "gate: {hidden: 16, score: anchored, activation: {max_agents: 2}}\nlimits: {max_steps: 1}\nsummarizer: {mode: select}\n"
    )
    return loads(f"name: recorded\nllms:\n{llms}agents:\n{agents}{gate}")


def asked_of(config: Config, out: Path, **changes: Any) -> list[RolloutQuery]:
    """Return what a probe of the pool would ask."""
    sources = sources_of(ProbeOptions.parse({"out": out} | changes), config, out, COMMON)
    options = RolloutOptions.parse({**sources, "out": out / "dense", "dense": True})
    return list(prepare_queries(options, COMMON.say).queries)


def test_replies_in_the_home_folder_and_in_a_path_with_a_comma_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    record(tmp_path / "logs, old" / "r.jsonl", a=range(12), b=range(12))
    place = "~/logs, old/r.jsonl"
    asked = asked_of(recorded_pool(a=place, b=place), tmp_path / "out, 1")
    assert sorted(query.query_id for query in asked) == sorted(f"q{number}" for number in range(12))
    assert asked[0].text == f"What is {asked[0].query_id[1:]} + 1?"


def test_what_all_recorded_agents_replied_to_is_asked_first(tmp_path: Path) -> None:
    """Of forty and forty queries in two files ten are the same."""
    first, second = record(tmp_path / "a.jsonl", a=range(40)), record(tmp_path / "b.jsonl", b=range(30, 70))
    config = recorded_pool(a=str(first), b=str(second))
    asked = asked_of(config, tmp_path / "out", limit=16)
    assert {f"q{number}" for number in range(30, 40)} < {query.query_id for query in asked}
    assert len(asked) == 16
    lines = (tmp_path / "out" / RECORDED).read_text(encoding="utf-8")
    assert asked_of(config, tmp_path / "again", limit=16) == asked
    assert (tmp_path / "again" / RECORDED).read_text(encoding="utf-8") == lines
    few = asked_of(config, tmp_path / "few", limit=4)
    assert {query.query_id for query in few} < {f"q{number}" for number in range(30, 40)}


def test_queries_of_ones_own_are_asked_as_they_are(tmp_path: Path) -> None:
    place = record(tmp_path / "r.jsonl", a=range(9), b=range(9))
    (tmp_path / "mine.jsonl").write_text("What is 1 + 1?\nWhat is 3 + 1?\n", encoding="utf-8")
    asked = asked_of(recorded_pool(a=str(place), b=str(place)), tmp_path / "out", queries=str(tmp_path / "mine.jsonl"))
    assert sorted(query.text for query in asked) == ["What is 1 + 1?", "What is 3 + 1?"]


def test_the_same_query_is_one_whatever_it_is_called_and_an_id_of_two_texts_is_none(tmp_path: Path) -> None:
    lines = [
        {"agent": "a", "query": "What  is 1 + 1?", "query_id": "q1", "text": "2"},
        {"agent": "b", "query": "What is 1 + 1?", "query_id": "other", "text": "2"},
        {"agent": "b", "query": "What is 5 + 1?", "query_id": "q1", "text": "6"},
        {"agent": "a", "query": "What is 2 + 1?", "query_id": "q2", "text": "3"},
        {"agent": "b", "query_id": "q2", "text": "3"},
        {"agent": "stranger", "query": "What is 9 + 1?", "text": "10"},
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found, whole = common_queries({path: {"a": ["a"], "b": ["b", "twin"]}}, 9, 0)
    assert whole == 2
    assert sorted(found[:2], key=str) == [{"query": "What is 1 + 1?"}, {"query": "What is 2 + 1?", "query_id": "q2"}]
    assert found[2:] == [{"query": "What is 5 + 1?"}]


def test_replies_without_texts_of_queries_are_told(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"agent": "a", "query_id": "q1", "text": "2"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="no reply has the text of its query; name a file of queries with --queries"):
        common_queries({path: {"a": ["a"]}}, 9, 0)
    with pytest.raises(ConfigError, match=r"engine_kwargs.replies: '.*nowhere.jsonl' is not there"):
        common_queries({tmp_path / "nowhere.jsonl": {"a": ["a"]}}, 9, 0)


def test_a_pool_of_one_agent_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="solo is the pool's only agent"):
        run_probe(ProbeOptions.parse({"out": tmp_path / "out"}), loads(scripted_pool_yaml(("solo",))), COMMON, "dmoa probe")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_or_written_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    pool = scripted_pool()
    for changes, message in (
        ({"out": "s3://bucket/x"}, "--out is 's3://bucket/x'; expected a place of this machine"),
        ({"out": tmp_path / "out", "benchmarks": "arith", "outcomes": tmp_path / "gone"}, "--outcomes: .*gone"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_probe(ProbeOptions.parse(changes), pool, COMMON, "dmoa probe")
    assert not (tmp_path / "out").exists()


def test_rollouts_at_a_uri_are_probed(tmp_path: Path) -> None:
    folder = write_rollouts(tmp_path / "r", domain_rows(16), scripted_pool())
    options = ProbeOptions.parse({"rollouts": folder.as_uri(), "out": tmp_path / "out"})
    assert run_probe(options, scripted_pool(), COMMON, "dmoa probe").rows == 16


def test_answers_are_compared_by_what_the_collection_asked_and_cut_ones_are_none(tmp_path: Path) -> None:
    """One and two differ in letters and quotes alone, which count where a Python literal is asked for; three was cut off."""
    texts = {"one": "{'a': 1}", "two": "{'b': 1}", "three": "{'a': 1}"}
    rows = [row | {"text": texts[row["agent"]]} for row in domain_rows(16)]
    rows = [row | {"finish_reason": "length"} if row["agent"] == "three" else row for row in rows]
    folder = RolloutFolder(write_rollouts(tmp_path / "r", rows, scripted_pool()))
    without = probe_rollouts(folder.root, scripted_pool()).answers
    queries = [
        RolloutQuery(query_id=f"q{number:03d}", source="made-up", split="train", text="assert f(1) == ??") for number in range(16)
    ]
    folder.queries.write_text("".join(query.model_dump_json() + "\n" for query in queries), encoding="utf-8")
    found = probe_rollouts(folder.root, scripted_pool()).answers
    assert without is not None
    assert found is not None
    assert (without.agreed, found.agreed) == (16, 0)
    assert without.unread == found.unread == ["three"]
