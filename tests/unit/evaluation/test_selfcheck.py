"""The self-check: what it finds on hand-made rows, that it notices broken rows, and that it passes on the real rows."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from dmoa.errors import ConfigError
from dmoa.evaluation import selfcheck
from dmoa.evaluation.selfcheck import SILENT, SelfCheck, expect_dealt


def write_rows(folder: Path, file: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / file
    path.write_bytes(gzip.compress(text.encode()) if file.endswith(".gz") else text.encode())


def numbers(count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {number} and {number}?", "answer": f"Add.\n#### {2 * number:,}"} for number in range(count)]


HUMANEVAL = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def add{number}(x):\n    """Add {number} to x."""\n',
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {1 + number}\n",
        "entry_point": f"add{number}",
    }
    for number in range(4)
]


def ds1000_row(number: int, reference: str, library: str = "Numpy") -> dict[str, Any]:
    context = (
        'exec_context = r"""\n[insert]\n"""\n\n\ndef test_execution(solution):\n    env = {}\n'
        f'    exec(exec_context.replace("[insert]", solution), env)\n    assert env["result"] == {number}\n'
    )
    metadata = {
        "problem_id": number,
        "library_problem_id": number,
        "library": library,
        "test_case_cnt": 1,
        "perturbation_type": "Origin",
        "perturbation_origin_id": number,
    }
    prompt = f"Give {number}.\nA:\n<code>\nresult = ... # put solution in this variable\nBEGIN SOLUTION\n<code>\n"
    return {"prompt": prompt, "reference_code": reference, "metadata": metadata, "code_context": context}


@pytest.mark.contract
def test_passes_on_hand_made_rows_and_counts_them(tmp_path: Path) -> None:
    write_rows(tmp_path / "gsm8k", "train.jsonl", numbers(40))
    write_rows(tmp_path / "gsm8k", "test.jsonl.gz", [*numbers(30), *numbers(1)])
    seen: list[tuple[str, int, int]] = []
    found = selfcheck.run_selfcheck(["gsm8k"], data_dir=tmp_path, progress=lambda *event: seen.append(event))
    (check,) = found.benchmarks
    assert found.passed
    assert sum(check.rows.values()) == 70
    assert check.rows["test"] == 30
    assert check.num_duplicates == 1
    assert (check.gold[0].measure, check.gold[0].num_rows, check.gold[0].num_right) == ("value", 70, 70)
    assert (check.silent.num_replies, check.silent.num_above_zero) == (70 * len(SILENT), 0)
    # 30 answers occur twice among 70 rows, 10 once
    assert check.dealt.expected == pytest.approx((30 * 4 + 10) / 70**2)
    assert check.dealt.can_fail
    assert seen[-1] == ("gsm8k: answers dealt out", 350, 350)
    assert SelfCheck.model_validate_json(found.model_dump_json()) == found


@pytest.mark.contract
def test_a_right_answer_that_scores_wrong_is_a_failure_with_its_row(tmp_path: Path) -> None:
    broken = [HUMANEVAL[0] | {"canonical_solution": "    return x - 1\n"}, *HUMANEVAL[1:]]
    write_rows(tmp_path / "humaneval", "test.jsonl", broken)
    found = selfcheck.run_selfcheck(["humaneval"], data_dir=tmp_path)
    (check,) = found.benchmarks
    assert not found.passed
    (gold,) = check.gold
    assert (gold.num_rows, gold.num_right, gold.num_unscored, len(gold.failures)) == (4, 3, 0, 1)
    assert "humaneval/test/" in gold.failures[0]
    assert "AssertionError" in gold.failures[0]


@pytest.mark.contract
def test_references_that_fail_here_are_listed_with_library_and_version(tmp_path: Path) -> None:
    rows = [
        ds1000_row(0, "result = 0"),
        ds1000_row(1, "import numpy as np\nresult = np.NAN"),
        ds1000_row(2, "result = 2", library="Nosuchlib"),
    ]
    write_rows(tmp_path / "ds1000", "test.jsonl.gz", rows)
    found = selfcheck.run_selfcheck(["ds1000"], data_dir=tmp_path)
    (check,) = found.benchmarks
    assert found.passed
    (gold,) = check.gold
    assert (gold.num_rows, gold.num_right, gold.num_unscored) == (3, 1, 2)
    failing, missing = sorted(check.unscored, key=lambda row: row.problem_id or 0)
    assert (failing.problem_id, failing.group) == (1, "Numpy")
    assert failing.version is not None
    assert failing.version in failing.reason
    assert "AttributeError" in failing.reason
    assert (missing.group, missing.version) == ("Nosuchlib", None)


@pytest.mark.contract
def test_a_benchmark_of_which_no_row_can_be_judged_has_not_passed(tmp_path: Path) -> None:
    write_rows(tmp_path / "ds1000", "test.jsonl", [ds1000_row(n, f"result = {n}", library="Nosuchlib") for n in range(2)])
    found = selfcheck.run_selfcheck(["ds1000"], data_dir=tmp_path)
    assert [(gold.num_right, gold.num_unscored) for gold in found.benchmarks[0].gold] == [(0, 2)]
    assert not found.passed


def test_suites_are_checked_too() -> None:
    found = selfcheck.run_selfcheck(["arith", "relay"], data_dir=None, limit=20)
    assert found.passed
    assert all(check.is_generated and set(check.rows.values()) == {20} for check in found.benchmarks)


def test_missing_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gsm8k"):
        selfcheck.run_selfcheck(["gsm8k"], data_dir=tmp_path)


@pytest.mark.parametrize("keys", ["aaab", "abcd", "aabbc", "aaaaa"])
def test_what_to_expect_of_a_deal_is_that_of_all_permutations(keys: str) -> None:
    shares = [
        sum(a == b for a, b in zip(keys, dealt, strict=True)) / len(keys) for dealt in itertools.permutations(keys, len(keys))
    ]
    found = expect_dealt([(key,) for key in keys], num_deals=1)
    assert found.mean == pytest.approx(statistics.fmean(shares))
    assert found.deviation == pytest.approx(statistics.pstdev(shares))
    five = expect_dealt([(key,) for key in keys], num_deals=5)
    assert five.deviation == pytest.approx(found.deviation / math.sqrt(5))


def test_parts_of_an_answer_count_equally() -> None:
    found = expect_dealt([("a", "x"), ("a", "y"), ("b", "z")], num_deals=1)
    assert found.mean == pytest.approx((5 / 9 + 3 / 9) / 2)


TEXT_BENCHMARKS = ["mmlu", "gsm8k", "multiarith", "svamp", "aqua_rat", "hotpotqa", "ddxplus"]


@pytest.mark.contract
@pytest.mark.parametrize("name", TEXT_BENCHMARKS)
def test_every_real_row_of_a_text_benchmark(rows_dir: Path, name: str) -> None:
    (check,) = selfcheck.run_selfcheck([name], data_dir=rows_dir).benchmarks
    assert check.passed, check
    assert all(gold.num_right == gold.num_rows == sum(check.rows.values()) for gold in check.gold)


@pytest.mark.contract
@pytest.mark.parametrize(("name", "limit"), [("humaneval", 4), ("ds1000", 2)])
def test_some_real_rows_of_programs(rows_dir: Path, name: str, limit: int) -> None:
    (check,) = selfcheck.run_selfcheck([name], data_dir=rows_dir, limit=limit).benchmarks
    assert check.passed, check
    assert check.gold[0].num_right > 0


def test_a_check_that_cannot_fail_says_so(tmp_path: Path) -> None:
    write_rows(tmp_path / "gsm8k", "test.jsonl", numbers(3))
    (check,) = selfcheck.run_selfcheck(["gsm8k"], data_dir=tmp_path).benchmarks
    assert check.passed
    assert not check.dealt.can_fail
