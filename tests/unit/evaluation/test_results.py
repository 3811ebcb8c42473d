"""The result of a run by hand-computed figures, whatever the order of its lines, and from the folder of a killed run."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.errors import ConfigError
from dmoa.evaluation.figures import Footnotes
from dmoa.evaluation.records import BenchmarkInfo, PoolInfo, RunInfo
from dmoa.evaluation.results import Evaluation, build_evaluation, not_run, read_evaluation, rebuild_evaluation
from dmoa.evaluation.run_folder import write_whole
from dmoa.evaluation.statistics import wilson
from dmoa.testing import answered as answer
from dmoa.testing import failed as lost
from dmoa.testing import run_info as run_of
from dmoa.testing import scored as score
from dmoa.testing import write_run
from tests.unit.run_records import small_run

# fmt: off
CONTRACT_ROW = {
    "benchmark", "policy", "n", "correct", "unscored", "failed", "accuracy", "low", "high", "prompt_tokens", "cached_tokens",
    "completion_tokens", "steps_mean", "active_mean", "wall_s", "seed",
}
# fmt: on
CONTRACT_PAIRED = {"benchmark", "a", "b", "n", "difference", "low", "high", "p", "test"}


def test_the_contracts_names_are_there() -> None:
    tree = build_evaluation(*small_run()).model_dump(mode="json")
    assert {"config", "rows", "paired"} <= set(tree)
    assert all(set(row) >= CONTRACT_ROW for row in tree["rows"])
    assert all(set(row) >= CONTRACT_PAIRED for row in tree["paired"])


def test_a_row_by_hand() -> None:
    row = build_evaluation(*small_run()).rows[0]
    assert (row.benchmark, row.policy, row.seed) == ("mmlu", "dmoa", 7)
    # Four rows: two right, one unscored, one failed.
    assert (row.n, row.correct, row.unscored, row.failed, row.missing) == (4, 2, 1, 1, 0)
    expected = wilson(2, 4)
    assert (row.accuracy, row.low, row.high, row.interval) == (0.5, expected.low, expected.high, "wilson")
    # Three answers of 100 + 10 tokens, each in two steps with two agents and one.
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.summarizer_tokens) == (300, 90, 30, 12)
    assert row.tokens_per_correct == 165.0
    assert (row.steps_mean, row.active_mean, row.steps_histogram) == (2.0, 1.5, {2: 3})
    assert (row.wall_s, row.entropy_nats, row.stop_reasons) == (1.75, 0.5, {"agreement": 3})
    assert (row.gate_versions, row.chance, row.deviation) == (["abc"], 0.25, "a generated letter instead of 5-shot scoring")
    assert not row.is_generated


def test_a_fractional_row_by_hand() -> None:
    row = next(row for row in build_evaluation(*small_run()).rows if (row.benchmark, row.policy) == ("relay", "dmoa"))
    assert (row.n, row.correct, row.accuracy, row.interval) == (3, 1, pytest.approx(1.75 / 3), "student")
    assert row.low < row.accuracy < row.high
    assert row.metrics == {"f1": pytest.approx(1.75 / 6)}
    assert row.tokens_per_correct == pytest.approx(330 / 1.75)
    assert row.is_generated


def test_policies_are_compared_on_the_rows_of_both() -> None:
    found = build_evaluation(*small_run()).paired[0]
    # Rows 0..3: dmoa 1 1 0 0 (unscored and failed ones as 0), single 1 0 0 0: one row tells them apart.
    assert (found.benchmark, found.a, found.b, found.n) == ("mmlu", "dmoa", "single", 4)
    assert (found.difference, found.p) == (0.25, 1.0)
    assert found.test.startswith("McNemar")
    assert build_evaluation(*small_run()).paired[1].test.startswith("sign-flip test")


def test_rows_of_one_policy_alone_are_not_compared() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=3)])
    scored = [score("gsm8k", n, "dmoa", 1.0) for n in range(3)] + [score("gsm8k", 2, "single", 0.0)]
    found = build_evaluation(run, [], scored).paired[0]
    assert (found.n, found.difference) == (1, 1.0)


def test_groups_need_two() -> None:
    groups = build_evaluation(*small_run()).groups
    assert [(row.group, row.policy, row.n, row.correct) for row in groups] == [
        ("art", "dmoa", 2, 1),
        ("art", "single", 2, 1),
        ("law", "dmoa", 2, 1),
        ("law", "single", 2, 0),
    ]
    run = run_of([BenchmarkInfo(name="gsm8k", rows=1)])
    assert build_evaluation(run, [], [score("gsm8k", 0, "dmoa", 1.0, group="only")]).groups == []


def test_routing_counts_active_agents_by_step() -> None:
    found = [row for row in build_evaluation(*small_run()).routing if (row.benchmark, row.policy) == ("mmlu", "dmoa")]
    assert [(row.step, row.agent, row.count) for row in found] == [(0, "adder", 3), (0, "echo", 3), (1, "adder", 3)]


def test_failures_are_kept_in_order_and_bounded() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=300)], ["dmoa"])
    lines = [lost("gsm8k", number, "dmoa", "x" * 9999) for number in range(300)]
    random.Random(1).shuffle(lines)
    found = build_evaluation(run, lines, []).failures
    assert [row.row_id for row in found] == [f"gsm8k/test/{number:04}" for number in range(50)]
    assert all(len(row.error) == 500 for row in found)


def test_what_is_missing_is_counted_and_not_wrong() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=10)])
    evaluation = build_evaluation(run, [answer("gsm8k", n, "dmoa") for n in range(3)], [score("gsm8k", 0, "dmoa", 1.0)])
    row, empty = evaluation.rows
    assert (row.n, row.accuracy, row.missing) == (1, 1.0, 9)
    assert (empty.n, empty.accuracy, empty.low, empty.high, empty.missing) == (0, 0.0, 0.0, 1.0, 10)
    assert (empty.steps_mean, empty.active_mean, empty.tokens_per_correct, empty.entropy_nats) == (None, None, None, None)


def failing_run(rows: int = 4) -> Evaluation:
    """`single:b` fails on every row of both benchmarks; `single:a` is right on every second row."""
    run = run_of([BenchmarkInfo(name=name, rows=rows) for name in ("gsm8k", "svamp")], ["single:a", "single:b", "dmoa"])
    answered, scored = [], []
    for name in ("gsm8k", "svamp"):
        for number in range(rows):
            group = str(number % 2)
            for policy in ("single:a", "dmoa"):
                answered.append(answer(name, number, policy))
                scored.append(score(name, number, policy, float(number % 2), group=group))
            answered.append(lost(name, number, "single:b", "EngineError: agent b is scripted to fail"))
            scored.append(score(name, number, "single:b", 0.0, group=group, is_scored=False, is_failed=True, metrics={"f1": 0.0}))
    return build_evaluation(run, answered, scored)


def test_a_policy_whose_every_query_failed_did_not_run_and_is_compared_with_nobody() -> None:
    found = failing_run()
    rows = {(row.benchmark, row.policy): row for row in found.rows}
    assert [cell for cell, row in rows.items() if not row.did_run] == [("gsm8k", "single:b"), ("svamp", "single:b")]
    assert not_run(found) == [row for row in found.rows if row.policy == "single:b"]
    row = rows["gsm8k", "single:b"]
    # Nothing is known: not the interval of four wrong answers, which ends at 49 %.
    assert (row.n, row.failed, row.accuracy, row.low, row.high, row.metrics) == (4, 4, 0.0, 0.0, 1.0, {})
    assert [(pair.benchmark, pair.a, pair.b) for pair in found.paired] == [
        ("gsm8k", "single:a", "dmoa"),
        ("svamp", "single:a", "dmoa"),
    ]
    assert {group.policy for group in found.groups} == {"single:a", "dmoa"}


def test_a_policy_that_answered_once_ran() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=3)], ["dmoa"])
    answered = [answer("gsm8k", 0, "dmoa"), lost("gsm8k", 1, "dmoa"), lost("gsm8k", 2, "dmoa")]
    scored = [score("gsm8k", 0, "dmoa", 1.0)]
    scored += [score("gsm8k", number, "dmoa", 0.0, is_scored=False, is_failed=True) for number in (1, 2)]
    (row,) = build_evaluation(run, answered, scored).rows
    assert (row.did_run, row.accuracy) == (True, pytest.approx(1 / 3))


def test_rows_that_are_still_to_be_asked_have_not_failed() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=3)], ["dmoa"])
    found = build_evaluation(run, [], [])
    assert not found.rows[0].did_run
    assert not_run(found) == []


def test_two_policies_of_which_no_reply_could_be_judged_are_not_compared() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=3)], ["dmoa", "single", "dense"])
    answered = [answer("gsm8k", number, policy) for number in range(3) for policy in run.policies]
    scored = [score("gsm8k", number, policy, 0.0, is_scored=False) for number in range(3) for policy in ("dmoa", "single")]
    scored += [score("gsm8k", number, "dense", 1.0) for number in range(3)]
    found = build_evaluation(run, answered, scored)
    assert [(pair.a, pair.b) for pair in found.paired] == [("dmoa", "dense"), ("single", "dense")]
    assert [row.num_scored for row in found.rows] == [0, 0, 3]


def test_a_result_of_before_says_by_its_counts_what_ran(tmp_path: Path) -> None:
    tree = failing_run().model_dump(mode="json")
    for row in tree["rows"]:
        del row["did_run"]
    write_whole(tmp_path / "evaluation.json", json.dumps(tree))
    assert read_evaluation(tmp_path) == failing_run()


@given(st.randoms(use_true_random=False))
@settings(max_examples=10)
@pytest.mark.contract
def test_the_order_of_lines_does_not_matter(order: random.Random) -> None:
    run = run_of([BenchmarkInfo(name="relay", rows=40), BenchmarkInfo(name="gsm8k", rows=40)])
    drawn = random.Random(5)
    answered, scored = [], []
    for benchmark in ("relay", "gsm8k"):
        for number in range(40):
            for policy in ("dmoa", "single"):
                answered.append(answer(benchmark, number, policy, wall_ms=drawn.random() * 1e4, entropy_nats=drawn.random()))
                value = drawn.random() if benchmark == "relay" else float(drawn.random() < 0.5)
                scored.append(score(benchmark, number, policy, value, group=str(number % 3), metrics={"f1": drawn.random()}))
    assert build_evaluation(run, order.sample(answered, len(answered)), order.sample(scored, len(scored))) == build_evaluation(
        run, answered, scored
    )


@pytest.mark.parametrize("kind", ["answers", "scores"])
def test_a_row_never_counts_twice(kind: str) -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=2)])
    answered = [answer("gsm8k", 0, "dmoa")] * (2 if kind == "answers" else 1)
    scored = [score("gsm8k", 0, "dmoa", 1.0)] * (2 if kind == "scores" else 1)
    with pytest.raises(ConfigError, match=r"gsm8k/test/0000' is there twice for policy 'dmoa'"):
        build_evaluation(run, answered, scored)


def test_a_line_of_another_run_is_refused() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=2)])
    with pytest.raises(ConfigError, match="'svamp' with policy 'dmoa' is not part of this run, which has gsm8k with dmoa"):
        build_evaluation(run, [answer("svamp", 0, "dmoa")], [])


def test_many_rows_take_little_memory() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=2_000)])
    tracemalloc.start()
    evaluation = build_evaluation(
        run,
        (answer("gsm8k", number, policy, text="long " * 200) for policy in run.policies for number in range(2_000)),
        (score("gsm8k", number, policy, float(number % 3 == 0)) for policy in run.policies for number in range(2_000)),
    )
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert evaluation.rows[0].n == 2_000
    # The texts alone would be 4 MB; what is kept is an id per row and a few numbers per row and policy.
    assert peak_bytes < 1.75e6


# From a folder


def test_a_folder_gives_the_same_result(tmp_path: Path) -> None:
    run, answered, scored = small_run()
    write_run(tmp_path, run, answered, scored)
    assert rebuild_evaluation(tmp_path) == build_evaluation(run, answered, scored)


def test_a_torn_line_is_a_row_to_come(tmp_path: Path) -> None:
    run, answered, scored = small_run()
    folder = write_run(tmp_path, run, answered, scored)
    path = folder.answers("mmlu", "single")
    path.write_bytes(path.read_bytes()[:-30])
    row = next(row for row in rebuild_evaluation(tmp_path).rows if (row.benchmark, row.policy) == ("mmlu", "single"))
    assert (row.prompt_tokens, row.missing) == (300, 1)


def test_the_written_result_is_read_back(tmp_path: Path) -> None:
    evaluation = build_evaluation(*small_run())
    write_whole(tmp_path / "evaluation.json", evaluation.model_dump_json())
    assert read_evaluation(tmp_path) == evaluation
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no run: neither evaluation.json nor run.json is there"),
        ({"run.json": "{}"}, "dmoa_version: missing; add it"),
        ({"run.json": "{"}, "run.json"),
        ({"evaluation.json": '{"rows": 3}'}, "rows is 3"),
    ],
    ids=["nothing", "an empty run", "no JSON", "a damaged result"],
)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_evaluation(tmp_path)


def test_a_run_keeps_no_secret() -> None:
    run = run_of(
        [],
        command="dmoa evaluate --set llms.a.engine_kwargs.api_key=hunter2",
        options={"url": "https://me:hunter2@host/v1"},
        pool=PoolInfo(name="tiny", fingerprint="", config={"llms": {"a": {"api_key": "hunter2", "max_num_seqs": 4}}}),
    )
    text = run.model_dump_json()
    assert "hunter2" not in text
    assert run.pool.config["llms"]["a"]["max_num_seqs"] == 4
    assert RunInfo.model_validate_json(text) == run


def test_a_row_that_cannot_be_judged_leaves_every_denominator_alike() -> None:
    run = run_of([BenchmarkInfo(name="ds1000", rows=3)])
    cannot = score("ds1000", 1, "dmoa", 0.0).model_copy(update={"is_scored": False, "is_left_out": True, "reason": "no library"})
    scored = [score("ds1000", n, "dmoa", 1.0) for n in (0, 2)] + [cannot] + [score("ds1000", n, "single", 1.0) for n in range(3)]
    answers = [answer("ds1000", n, policy) for policy in ("dmoa", "single") for n in range(3)]
    evaluation = build_evaluation(run, answers, scored)
    for row in evaluation.rows:
        # By single's reply nobody would know that row 1 cannot be judged: dmoa's says so, and both lose it.
        assert (row.n, row.correct, row.unscored, row.left_out, row.missing, row.accuracy) == (2, 2, 0, 1, 0, 1.0)
    assert evaluation.paired[0].n == 2
    assert [note.text for note in Footnotes(evaluation).all()] == [
        "ds1000: 1 rows cannot be judged here, whatever is replied; no policy is judged by them"
    ]
    older = [{key: value for key, value in row.items() if key != "left_out"} for row in evaluation.model_dump()["rows"]]
    assert [Evaluation.model_validate({**evaluation.model_dump(), "rows": older}).rows[0].left_out] == [0]
