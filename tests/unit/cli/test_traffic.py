"""`dmoa rollouts --from-traffic` and `dmoa outcomes`, on what a swarm saved: read, judged, trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest

from dmoa.agents.pool import fingerprint
from dmoa.config import Config, load
from dmoa.core.witnesses import answer_classes
from dmoa.errors import RequestError
from dmoa.feedback import feedback_of, tenant_of, write_feedback
from dmoa.protocols import final_answer
from dmoa.serving.feedback import FeedbackStore, buffer_of
from dmoa.serving.feedback_buffer import KeptOutcome
from dmoa.testing import AGENTS, decision, domain_rows, scripted_pool, scripted_pool_yaml
from dmoa.trace import AnsweredQuery
from dmoa.training.collect import RolloutAsking, query_of_rollout
from dmoa.training.outcomes import credit_replies, read_outcomes
from dmoa.training.rollouts import RolloutQuery, read_manifest, read_table, table_of
from dmoa.types import AgentReply, Answer, EntropySum, Limits, Query, RouteRequest, StepRecord, SummarizerRecord
from dmoa.workflows.backends import OpenCollectingPool, OpenCollectingServer, OpenPool
from tests.unit.cli.conftest import Invoke

pytestmark = pytest.mark.contract
GATE = "{hidden: 16, score: posterior, activation: {max_agents: 2}}"
NUM_QUERIES = 48
SOURCE = "users of\nmine  0  two"


def texts_of(number: int) -> list[str]:
    """What the agents say: the one of the domain is right, and in every third query another agrees with it in other words."""
    right = number % len(AGENTS)
    said = [f"I say {number * 10 + place + 1}." for place in range(len(AGENTS))]
    said[right] = f"The answer is {number * 10}."
    if number % 3 == 0:
        said[(right + 1) % len(AGENTS)] = f"{number * 10}.0"
    return said


def answered(number: int, row: list[dict[str, object]], *, everybody: bool = True) -> Answer:
    """What the swarm answered: agents one and two count, three was explored or left idle."""
    texts = texts_of(number)
    replies = tuple(
        AgentReply(
            agent=str(one["agent"]),
            status="ok",
            text=text,
            entropy=EntropySum(sum_nats=float(one["entropy_sum_nats"]), sq_sum=float(one["entropy_sq_sum"]), tokens=8),  # type: ignore[arg-type]
        )
        for one, text in zip(row, texts, strict=True)
    )
    input_X = np.concatenate([np.asarray(row[0]["context"], np.float32), np.zeros(4, np.float32)])
    step = StepRecord(
        step=0,
        replies=replies if everybody else replies[:2],
        active=AGENTS[:2],
        explored=((AGENTS[2], 1.0),) if everybody else (),
        summary=texts[0],
        summarizer=SummarizerRecord(mode="select", verdict="rule"),
        decision=decision(dict.fromkeys(AGENTS, 1 / 3), 2),
        route=RouteRequest(input_X=input_X),
    )
    return Answer(
        trace_id=f"{number:032x}",
        text=texts[0],
        policy="dmoa",
        stop_reason="agreement",
        steps=(step,),
        degraded=False,
        finish_reason="stop",
        gate_version="untrained-0",
    )


def save(place: Path, config: Config, *, everybody: bool = True, of_pool: str | None = None) -> None:
    """What a swarm saves that answered NUM_QUERIES queries, and heard of every third one whether it was right."""
    buffer = buffer_of(config)
    rows = [list(group) for _, group in groupby(domain_rows(NUM_QUERIES), key=lambda row: row["query_id"])]
    for number, row in enumerate(rows):
        answer = answered(number, row, everybody=everybody)
        query = Query(trace_id=answer.trace_id, text="What is a zebra?")
        one = AnsweredQuery(query=query, answer=answer, fingerprint=of_pool or fingerprint(config), created_unix_s=7.0)
        record = feedback_of(one, key_hash="k", salt=b"s")
        buffer.put(record)
        if number % 3 == 0:  # agent one is right there
            outcome = KeptOutcome(trace_id=answer.trace_id, agent=None, step=None, reward=1.0, source=SOURCE)
            assert buffer.judge(tenant_of("k"), outcome, 8.0) == "new"
    FeedbackStore(place.as_uri()).save(write_feedback(buffer.records()), buffer.state())


@pytest.fixture
def pool_path(tmp_path: Path) -> Path:
    path = tmp_path / "pool.yaml"
    path.write_text(scripted_pool_yaml(gate=GATE))
    return path


def test_traffic_becomes_rollouts_that_a_gate_is_trained_on(dmoa: Invoke, tmp_path: Path, pool_path: Path) -> None:
    save(tmp_path / "state", scripted_pool(gate=GATE))
    out = tmp_path / "traffic"
    result = dmoa("rollouts", "--config", pool_path, "--from-traffic", tmp_path / "state", "--out", out, "--track", "none")
    assert result.exit_code == 0, result.stderr
    assert (
        f"{NUM_QUERIES} queries, {NUM_QUERIES} steps, {3 * NUM_QUERIES} rows and {NUM_QUERIES // 3 * 2} outcomes" in result.stderr
    )
    manifest, table = read_manifest(out), read_table(out).to_pylist()
    assert (manifest.mode, manifest.counts.queries, manifest.sources[0].name) == ("dense", NUM_QUERIES, "traffic")
    for name, group in groupby(table, key=lambda row: row["query_id"]):
        number = int(name.removeprefix("traffic/"), 16)
        found = list(group)
        assert answer_classes([row["text"] for row in found]) == answer_classes(texts_of(number))
        assert [(row["is_selected"], row["is_explored"]) for row in found] == [(True, False), (True, False), (False, True)]
    assert not any("zebra" in path.read_bytes().decode(errors="ignore") for path in out.rglob("*") if path.is_file())
    credited = credit_replies(read_outcomes(out / "outcomes.jsonl"), read_table(out), seed=0, round_=0)
    # Where one is right, two agrees: both are credited, three is not.
    assert credited.credit == {
        (f"traffic/{number:032x}", agent): 1.0 for number in range(0, NUM_QUERIES, 3) for agent in ("one", "two")
    }
    trained = dmoa(
        "train",
        *("--config", pool_path, "--rollouts", out, "--outcomes", out / "outcomes.jsonl", "--out", tmp_path / "gate"),
        *("--workers", "0", "--track", "none", "--epochs", "2"),
    )
    assert trained.exit_code == 0, trained.stderr
    record = json.loads((tmp_path / "gate" / "checkpoint" / "gate.json").read_text())
    assert record["supervision"] == f"outcomes({NUM_QUERIES // 3 * 2})"


def test_sparse_traffic_says_so_and_keeps_who_was_asked(dmoa: Invoke, tmp_path: Path, pool_path: Path) -> None:
    save(tmp_path / "state", scripted_pool(gate=GATE), everybody=False)
    out = tmp_path / "traffic"
    assert dmoa("rollouts", "--config", pool_path, "--from-traffic", tmp_path / "state", "--out", out).exit_code == 0
    assert read_manifest(out).mode == "epsilon"
    assert read_table(out).num_rows == 2 * NUM_QUERIES
    again = dmoa("rollouts", "--config", pool_path, "--from-traffic", tmp_path / "state", "--out", out)
    assert (again.exit_code, "holds rollouts already" in again.stderr) == (2, True)


def test_a_folder_with_a_manifest_has_its_outcomes(dmoa: Invoke, tmp_path: Path, pool_path: Path) -> None:
    """Where they cannot be written the folder is no collection yet, and the same command makes it one."""
    save(tmp_path / "state", scripted_pool(gate=GATE))
    arguments = ("rollouts", "--config", pool_path, "--from-traffic", tmp_path / "state", "--out", tmp_path / "out")
    in_the_way = tmp_path / "out" / "outcomes.jsonl"
    in_the_way.mkdir(parents=True)
    assert dmoa(*arguments).exit_code == 2
    assert not (tmp_path / "out" / "rollouts.json").exists()
    in_the_way.rmdir()
    assert dmoa(*arguments).exit_code == 0
    assert read_outcomes(tmp_path / "out" / "outcomes.jsonl")


def test_queries_of_another_pool_are_refused(dmoa: Invoke, tmp_path: Path, pool_path: Path) -> None:
    save(tmp_path / "state", scripted_pool(gate=GATE), of_pool="f" * 64)
    result = dmoa("rollouts", "--config", pool_path, "--from-traffic", tmp_path / "state", "--out", tmp_path / "o")
    assert (result.exit_code, f"none of {NUM_QUERIES} queries was answered by this pool" in result.stderr) == (2, True)


def test_outcomes_are_listed_and_exported(dmoa: Invoke, tmp_path: Path) -> None:
    save(tmp_path / "state", scripted_pool(gate=GATE))
    shown = dmoa("outcomes", "list", "--state", tmp_path / "state")
    assert shown.stdout.splitlines()[0] == f"{0:032x}  1  one  users of mine 0 two"  # one line, whatever they call themselves
    result = dmoa("outcomes", "export", "--state", tmp_path / "state", "--out", tmp_path / "o.jsonl")
    assert result.stdout.split() == [str(tmp_path / "o.jsonl")]
    assert {(one.agent, one.reward, one.source) for one in read_outcomes(tmp_path / "o.jsonl")} == {
        ("one", 1.0, SOURCE),
        ("two", 1.0, SOURCE),
    }
    missing = dmoa("outcomes", "list", "--state", tmp_path / "nowhere")
    assert (missing.exit_code, "no feedback lies there" in missing.stderr) == (2, True)


@pytest.mark.parametrize("epsilon", [None, 1.0])
async def test_a_server_gives_the_rollouts_that_its_pool_gives_here(url: str, pool: Path, epsilon: float | None) -> None:
    config = load(pool)
    asked = [RolloutQuery(query_id=f"q{n}", source="mine", split="train", text=f"What is {n} + 7?") for n in range(3)]
    name = fingerprint(config)
    asking = RolloutAsking(seed=0, round=0, limits=Limits(max_steps=2, max_agents=1), preset="default", fingerprint=name)
    opened = OpenCollectingServer(url=url, pool=config.name, fingerprint=name, epsilon=epsilon)
    local = OpenPool(config_json=config.model_dump_json())
    here, there = OpenCollectingPool(pool=local, epsilon=epsilon)(), opened()
    for query in asked:
        rows, found = [], []
        for swarm, kept in ((here, rows), (there, found)):
            answer = await final_answer(swarm, query_of_rollout(query, asking), "dmoa")
            kept += table_of(query, answer, preset="default", seed=0, fingerprint=name).to_pylist()
        chances = [1.0, 1.0, 1.0] if epsilon is None else [0.5, 1.0]
        for each in (rows, found):
            assert [sorted(row["propensity"] for row in each if row["step"] == step) for step in range(2)] == [chances] * 2
            assert [row["is_explored"] for row in each] == [not row["is_selected"] for row in each]
        # Which agent epsilon draws depends on the trace's id, which is the server's.
        key, is_compared = itemgetter("step", "agent"), (lambda row: epsilon is None or row["is_selected"])
        pairs = zip(sorted(filter(is_compared, rows), key=key), sorted(filter(is_compared, found), key=key), strict=True)
        for row, other in pairs:
            for column in ("step", "num_steps", "agent", "context", "feedback", "probability", "gate_version", "text", "status"):
                assert other[column] == row[column], column
            for column in ("entropy_sum_nats", "entropy_sq_sum", "entropy_tokens", "completion_tokens"):
                assert other[column] == pytest.approx(row[column], abs=1e-4), column
    foreign = replace(opened, fingerprint="f" * 64)()
    with pytest.raises(RequestError, match=f"the server's pool is 'tiny' {name[:12]}, this one 'tiny' ffffffffffff; give"):
        await final_answer(foreign, query_of_rollout(asked[0], asking), "dmoa")
    for swarm in (here, there, foreign):
        await swarm.close()
    with pytest.raises(RequestError, match="the server's pool is"):  # agents that are not these are asked no more
        await final_answer(foreign, query_of_rollout(asked[1], asking), "dmoa")


def test_a_server_with_another_pool_is_refused_before_anybody_is_asked(
    dmoa: Invoke, url: str, pool: Path, tmp_path: Path
) -> None:
    other, out = tmp_path / "other.yaml", tmp_path / "o"
    other.write_text(pool.read_text().replace("name: tiny", "name: other"))
    given = ("rollouts", "--config", other, "--benchmarks", "arith", "--limit", "2", "--out", out)
    result = dmoa(*given, "--url", url)
    assert (result.exit_code, "the server's pool is 'tiny', this one 'other'" in result.stderr) == (2, True)
    result = dmoa(*given, "--url", "http://127.0.0.1:1")
    assert (result.exit_code, "cannot be reached" in result.stderr) == (1, True)
    assert not (out / "rollouts.json").exists(), "so the same folder serves the mended command"


def test_what_is_answered_already_is_not_asked(dmoa: Invoke, tmp_path: Path, pool_path: Path) -> None:
    result = dmoa(
        "rollouts", "--config", pool_path, "--from-traffic", "running", "--benchmarks", "arith", "--out", tmp_path / "o"
    )
    assert (result.exit_code, "its queries are answered already; leave benchmarks out" in result.stderr) == (2, True)
    result = dmoa("rollouts", "--config", pool_path, "--from-traffic", "running", "--url", "http://x", "--out", tmp_path / "o")
    assert (result.exit_code, "leave url out" in result.stderr) == (2, True)
