"""What `dmoa adapt` keeps of a stream, and how it goes on with it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from dmoa.checkpoint import load as checkpoint_of
from dmoa.config import Config, loads
from dmoa.core.label_model import MIN_ROWS
from dmoa.errors import ConfigError, DmoaError, EmptyAnswerError
from dmoa.evaluation.records import Task
from dmoa.evaluation.registry import SKILLS
from dmoa.evaluation.run import Session
from dmoa.evaluation.run_folder import RunFolder
from dmoa.feedback import MARK, is_held_back
from dmoa.serving.rollover import pool_version
from dmoa.testing import AGENTS, CONTEXT_DIM, rollout_row, scripted_pool, scripted_pool_yaml, write_rollouts
from dmoa.training.options import AdaptOptions, OnlineOptions
from dmoa.training.prequential import Counted, StreamUpdate
from dmoa.training.rollouts import RolloutQuery, table_of
from dmoa.workflows.adapt import Stage, _prepared, _report, check_same, run_adapt, run_first
from dmoa.workflows.adapt_online import LEASE_S, Lease, build_job
from dmoa.workflows.console import Bars, Common
from tests.unit.evaluation.samples import row, write_rows
from tests.unit.training.adapt_lessons import lesson

TASKS = {
    f"dyes/test/{number}": Task(row_id=f"dyes/test/{number}", benchmark="dyes", text=f"Mix {number}.") for number in range(3)
}
QUERIES = [RolloutQuery(query_id=row, source="dyes", split="test", text=task.text) for row, task in TASKS.items()]


def counted(number: int, **changes: Any) -> Counted:
    """A query that was answered by version `v1`."""
    answer = replace(lesson(0, number).answer, gate_version="v1")
    table = table_of(QUERIES[number], answer, preset="paper", seed=0, fingerprint="f" * 64)
    values: dict[str, Any] = {"query": QUERIES[number], "version": "v1", "answer": answer, "table": table}
    return Counted(**values | changes)


def update(number: int) -> StreamUpdate:
    return StreamUpdate(
        number=number,
        queries=["dyes/test/0"],
        answered_by="v1",
        version="v2",
        loss=None,
        used=1,
        skipped={},
        replayed=0,
        drift=0.0,
        distance=0.0,
        refitted=False,
        outcomes=0,
    )


def test_an_answer_is_counted_once_and_its_rollout_is_found_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, TASKS)
    for _ in range(2):  # a session that was killed between the two writes asks again: the first answer is the one that counts
        stage.keep("zero-shot", counted(0))
    (line,) = RunFolder(tmp_path).read_answers("dyes", "dmoa:zero-shot-ttt")
    assert (line.row_id, line.status) == ("dyes/test/0", "ok")
    kept = stage.kept("zero-shot", QUERIES)
    assert [(row, one.version, one.is_new) for row, one in kept.items()] == [("dyes/test/0", "v1", False)]
    table = kept["dyes/test/0"].table
    assert table is not None
    assert table.equals(counted(0).table)
    assert stage.kept("few-shot", QUERIES) == {}


@pytest.mark.parametrize(
    ("error", "status"), [(DmoaError("nobody is there"), "failed"), (EmptyAnswerError("no words", replies=()), "ok")]
)
def test_a_query_without_an_answer_has_a_line_and_no_rollout(tmp_path: Path, error: DmoaError, status: str) -> None:
    stage = Stage(tmp_path, TASKS)
    stage.keep("zero-shot", counted(1, answer=None, table=None, error=error))
    (line,) = RunFolder(tmp_path).read_answers("dyes", "dmoa:zero-shot-ttt")
    assert (line.status, line.text, line.gate_version) == (status, "", "v1")
    # It is not asked again: the updates after it were made without, and it would be counted after them.
    kept = stage.kept("zero-shot", QUERIES)
    assert {row: (one.version, one.table, one.is_new) for row, one in kept.items()} == {"dyes/test/1": ("v1", None, False)}


def test_a_line_that_a_killed_session_left_torn_is_cut_off_and_its_query_asked_again(tmp_path: Path) -> None:
    stage, path = Stage(tmp_path, TASKS), RunFolder(tmp_path).answers("dyes", "dmoa:zero-shot-ttt")
    stage.keep("zero-shot", counted(0))
    path.write_bytes(path.read_bytes() + b'{"row_id": "dyes/te')
    assert list(stage.kept("zero-shot", QUERIES)) == ["dyes/test/0"]
    path.write_text("")  # a person took the line out: answered by the last gate it would be counted after its update
    assert stage.kept("zero-shot", QUERIES) == {}
    for number in range(2):
        stage.keep("zero-shot", counted(number))
    assert [line.row_id for line in RunFolder(tmp_path).read_answers("dyes", "dmoa:zero-shot-ttt")] == list(TASKS)[:2]


def test_an_answer_of_a_later_gate_is_not_counted(tmp_path: Path) -> None:
    stage, late = Stage(tmp_path, TASKS), counted(0).answer
    assert late is not None
    stage.keep("zero-shot", counted(0, answer=replace(late, gate_version="v9")))
    with pytest.raises(ConfigError, match="'dyes/test/0' was answered by gate v9, not v1; use another folder"):
        stage.keep("zero-shot", counted(0))


def test_an_update_that_is_made_again_is_written_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, TASKS)
    for number in (1, 1, 2, 1):
        stage.keep("zero-shot", update(number))
    lines = stage.updates("zero-shot").read_text(encoding="utf-8").splitlines()
    assert [StreamUpdate.model_validate_json(line).number for line in lines] == [1, 2]


def test_another_run_in_the_folder_is_refused_by_what_differs(tmp_path: Path) -> None:
    options = AdaptOptions.parse({"benchmark": "dyes", "out": tmp_path})
    stage = Stage(tmp_path, TASKS)
    stage.keep("zero-shot", counted(0))
    check_same(options, scripted_pool(), {"zero-shot": None})
    check_same(options.model_copy(update={"workers": 2, "track": "none"}), scripted_pool(), {"zero-shot": None})
    with pytest.raises(ConfigError, match="queries: begun with 30, now 31"):
        check_same(options.model_copy(update={"queries": 31}), scripted_pool(), {"zero-shot": None})
    with pytest.raises(ConfigError, match="starts: begun with"):
        check_same(options, scripted_pool(), {"zero-shot": None, "few-shot": tmp_path})
    other = scripted_pool()
    other = other.model_copy(update={"limits": other.limits.model_copy(update={"budget_tokens": 7})})
    with pytest.raises(ConfigError, match="limits: begun with"):
        check_same(options, other, {"zero-shot": None})


def test_rows_that_have_changed_are_refused_once_there_are_answers(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data", "gsm8k", "test.jsonl", [row("gsm8k")])
    options = AdaptOptions.parse({"benchmark": "gsm8k", "data_dir": tmp_path / "nowhere", "out": tmp_path / "out"})
    check_same(options, scripted_pool(), {"zero-shot": None})
    options = options.model_copy(update={"data_dir": tmp_path / "data"})
    check_same(options, scripted_pool(), {"zero-shot": None})  # the corrected command: nobody was asked yet
    Stage(tmp_path / "out", TASKS).keep("zero-shot", counted(0))
    check_same(options, scripted_pool(), {"zero-shot": None})
    path.write_text(json.dumps(row("gsm8k", question="Ada has 4 pots. How many?")) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--out: file gsm8k/test.jsonl: begun with [0-9a-f]{64}, now [0-9a-f]{64};"):
        check_same(options, scripted_pool(), {"zero-shot": None})


def test_places_at_uris_are_the_same_in_the_next_session(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    options = AdaptOptions.parse(
        {"benchmark": "gsm8k", "data_dir": tmp_path / "nowhere", "workers": 0, "track": "none"}
        | {"out": (tmp_path / "out").as_uri(), "replay": (tmp_path / "old").as_uri()}
    )
    (tmp_path / "old" / "rollouts.json").write_text("{}")
    for _ in range(2):  # the second one finds the settings of the first
        with pytest.raises(ConfigError, match="nowhere"):
            run_adapt(options, scripted_pool(), None, Common(verbosity=-1), "dmoa adapt")


def test_a_benchmark_that_is_not_known_is_named_by_its_option(tmp_path: Path) -> None:
    options = AdaptOptions.parse({"benchmark": "dyess", "out": tmp_path})
    with pytest.raises(ConfigError, match=r"^--benchmark: dyess not known.*dyes"):
        run_adapt(options, scripted_pool(), None, Common(verbosity=-1), "dmoa adapt")


def test_rows_are_shared_out_and_every_benchmark_has_its_line(tmp_path: Path) -> None:
    options = AdaptOptions.parse({"benchmark": "dyes,signals,words", "out": tmp_path, "queries": 2, "limit": 3})
    folder = RunFolder(tmp_path)
    names = ["dyes", "signals", "words"]
    first = [task for task, _ in _prepared(options, folder, names)]
    assert [task.benchmark for task in first] == ["dyes", "signals"]
    pool = SimpleNamespace(name="pool")
    session = SimpleNamespace(folder=folder, benchmarks=names, gates={"zero-shot": "v1"}, pool=pool, command="dmoa adapt")
    report = _report(options, cast(Session, session), first)
    assert [(row.benchmark, row.first_rows, row.rest_rows) for row in report.rows] == [(name, 0, 0) for name in names]
    few = options.model_copy(update={"queries": 30, "limit": 3})
    assert len(_prepared(few, folder, names)) == 9


def test_traffic_that_gates_are_judged_by_is_not_replayed(tmp_path: Path) -> None:
    config = scripted_pool()
    names = [f"{MARK}{number:032x}" for number in range(60)] + ["mine/1"]
    rows = [rollout_row(name, 0, agent, 0.5, np.full(2 * CONTEXT_DIM, 0.1)) for name in names for agent in AGENTS]
    options = OnlineOptions.parse({"replay": write_rollouts(tmp_path / "traffic", rows, config), "out": tmp_path / "out"})
    replay = build_job(options, config, "dmoa adapt --online").replay
    assert replay is not None
    share = config.router.guards.held_back
    free = [name for name in names if not is_held_back(name.removeprefix(MARK), share) or name == "mine/1"]
    assert sorted(key.query_id for key in replay.key_Q) == sorted(free)
    assert 30 < len(free) < 61


def test_a_job_knows_the_version_of_the_pool_as_the_router_tells_it(tmp_path: Path) -> None:
    config = scripted_pool()
    kept = json.loads(json.dumps({"config": config.model_dump(mode="json")}))  # as the router leaves it, by another process
    options = OnlineOptions.parse({"out": tmp_path / "out"})
    told = build_job(options, Config.model_validate(kept["config"]), "dmoa adapt --online").pool_version
    assert told == pool_version(Config.model_validate_json(config.model_dump_json()))


QUERIES_OF_A_STREAM = MIN_ROWS + 1
"""Of untrained weights the last two teach: before, there is nothing to measure replies by."""


def begun(
    config: Config, out: Path, benchmark: str = "dyes", checkpoint: Path | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """Run the streams of an adaptation in this process, and return the updates of its last start."""
    options = AdaptOptions.parse(
        {"benchmark": benchmark, "out": out, "workers": 0, "queries": QUERIES_OF_A_STREAM, "limit": 12, "track": "none"} | changes
    )
    starts = {"zero-shot": None} if checkpoint is None else {"zero-shot": None, "few-shot": checkpoint}
    folder = RunFolder(out)
    folder.make()
    with Bars(-1) as bars:
        first = run_first(options, config, folder, [benchmark], starts, bars, lambda text: None)
    for start in starts:
        lines = list(folder.read_answers(benchmark, f"dmoa:{start}-ttt"))
        assert [line.row_id for line in lines] == [task.row_id for task in first]
        assert {line.status for line in lines} == {"ok"}
    text = Stage(out).updates(list(starts)[-1]).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def check_few_shot(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Adapt from zero, then begin a second run with what came of it."""
    learned = begun(config, folder / "one")
    assert learned[-1]["used"] == 1
    checkpoint = folder / "one" / "gates" / "zero-shot-ttt"
    again = begun(config, folder / "two", checkpoint=checkpoint)
    version = checkpoint_of(checkpoint)[1].version
    assert (learned[-1]["version"], again[0]["answered_by"]) == (version, version)
    assert checkpoint_of(folder / "two" / "gates" / "few-shot")[1].version == version
    adapted = checkpoint_of(folder / "two" / "gates" / "few-shot-ttt")[1]
    assert adapted.version == again[-1]["version"] != version
    return again


@pytest.mark.contract  # trains, in two sessions
def test_a_few_shot_start_goes_on_from_its_checkpoint_with_scripted_agents(tmp_path: Path) -> None:
    updates = check_few_shot(scripted_pool(), tmp_path)
    assert all(update["loss"] is not None for update in updates)


def test_a_pool_that_answers_nothing_stops_before_the_rest_is_asked(tmp_path: Path) -> None:
    pool = scripted_pool_yaml().replace("engine: scripted", "engine: scripted, engine_kwargs: {failing: [one, two, three]}")
    with pytest.raises(DmoaError, match=r"zero-shot: all 9 queries of dyes failed; the first error: .* begin in another folder"):
        begun(loads(pool), tmp_path)


def test_outcomes_of_other_queries_are_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    given = tmp_path / "outcomes.jsonl"
    given.write_text('{"query_id": "elsewhere/1", "reward": 1}\n{"trace_id": "t", "reward": 0}\n')
    with pytest.raises(ConfigError, match=r"--outcomes: none of 2 outcomes is of a query and an agent of the first queries"):
        begun(scripted_pool(), tmp_path / "out", outcomes=given)
    assert not list((tmp_path / "out" / "answers").glob("*"))


def test_one_learner_at_a_time_follows_an_app() -> None:
    memory: dict[str, bytes] = {}
    first, second = Lease("dmoa", "here:/a", memory), Lease("dmoa", "there:/b", memory)
    first.keep(0.0)
    for now in (0.0, LEASE_S / 2):
        with pytest.raises(ConfigError, match=r"'dmoa' is followed by .*\(here:/a\); end that one"):
            second.keep(now)
    first.keep(LEASE_S / 2)  # a sign of life
    with pytest.raises(ConfigError, match="followed"):
        second.keep(1.4 * LEASE_S)
    second.give_up()  # nothing of its own
    Lease("dmoa", "here:/a", memory).keep(1.4 * LEASE_S)  # the same command, which was killed
    second.keep(2.5 * LEASE_S)  # it died
    with pytest.raises(ConfigError, match="there:/b"):
        first.keep(2.6 * LEASE_S)  # or was stopped for a while, and ends now
    second.give_up()
    first.keep(2.6 * LEASE_S)


@pytest.mark.parametrize("lives", [True, False])
def test_a_learner_that_died_is_waited_out_and_one_that_lives_is_left_alone(lives: bool) -> None:
    memory: dict[str, bytes] = {}
    first, second = Lease("dmoa", "here:/a", memory), Lease("dmoa", "there:/b", memory)
    first.keep(0.0)
    now, said = [1.0], list[str]()

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if lives:
            first.keep(now[0])

    with pytest.raises(ConfigError, match="end that one first") if lives else nullcontext():
        second.take(said.append, lambda: now[0], sleep)
    assert now[0] == (LEASE_S / 6 if lives else LEASE_S)
    assert len(said) == 1
    assert "here:/a" in said[0]


@pytest.mark.contract  # routes by the embedded encoder
def test_recorded_replies_are_adapted_to_from_both_starts(tmp_path: Path) -> None:
    replies = tmp_path / "replies.jsonl"
    rows = [row.task for suite in SKILLS if suite.name == "dyes" for row in suite.generate("test", 12, 0)]
    lines = [
        {"query": task.text, "agent": name, "text": text}
        for task in rows
        for name, text in zip("abc", ("4", "4", "5"), strict=True)
    ]
    replies.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    agents = "".join(f"  - {{name: {name}, llm: logs, profile: {name}}}\n" for name in "abc")
    config = loads(
        f"name: logs\nllms: {{logs: {{model: 'recorded:dyes', engine: recorded, engine_kwargs: {{replies: {replies}}}}}}}\n"
        f"agents:\n{agents}gate: {{score: posterior, activation: {{max_agents: 2}}}}\nlimits: {{max_steps: 1}}\n"
    )
    updates = check_few_shot(config, tmp_path)
    assert all(update["loss"] is not None for update in updates)


def test_progress_that_is_counted_has_the_rate_of_what_came_since_the_first_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Bars(0) as bars:
        for done in (6, 10, 18):
            now[0] += 10.0
            bars.count("adapting", done, 18)
    assert capsys.readouterr().err.splitlines() == [
        "dmoa: adapting: 6 of 18 rows, 0 rows/s",
        "dmoa: adapting: 10 of 18 rows, 0.4 rows/s, about 20 s left",
        "dmoa: adapting: 18 of 18 rows, 0.6 rows/s",
    ]
