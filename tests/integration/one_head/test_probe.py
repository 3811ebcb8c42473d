"""`dmoa probe` as a user runs it, on scripted agents of which one is always sure and always wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.integration.evaluations import DMOA, SCRIPTED, run, run_here


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one probe with known answers, its report beside it."""
    root = tmp_path_factory.mktemp("probe")
    pool = yaml.safe_load(SCRIPTED)
    pool["llms"]["s"]["engine_kwargs"] |= {"delay_ms": 0, "entropies_nats": {"two": 0.001}}
    (root / "pool.yaml").write_text(yaml.safe_dump(pool), encoding="utf-8")
    known = ["--known-answers", "calendar", "--known-limit", "60"]
    arguments = [
        "--config",
        str(root / "pool.yaml"),
        "--limit",
        "16",
        "--out",
        str(root / "run"),
        "--json",
        str(root / "found.json"),
    ]
    ran = run([DMOA, "probe", *arguments, *known])
    assert ran.returncode == 0, ran.stderr
    assert "uses probe labels" in ran.stderr
    (root / "out.txt").write_text(ran.stdout, encoding="utf-8")
    return root


def test_the_verdict_is_in_words_and_in_json(probed: Path) -> None:
    report, text = json.loads((probed / "found.json").read_text()), (probed / "out.txt").read_text()
    assert report["verdict"] == "cannot"
    assert "scripted: entropy cannot route this pool" in text
    assert "two is the surest on 100% of the rows" in text
    assert (report["rows"], report["known_rows"]) == (16, 60)
    assert report["row_share"] + report["agent_share"] + report["interaction_share"] == pytest.approx(1.0)


def test_agents_are_told_apart(probed: Path) -> None:
    one, two, three = json.loads((probed / "found.json").read_text())["agents"]
    assert [found["ignores_input"] for found in (one, two, three)] == [True, True, False]
    # Rows of calendar whose answer is Monday, or seven days, are right; echoes never are.
    assert 0 < one["accuracy"] < 0.5
    assert three["accuracy"] == 0.0
    assert (two["entropy_nats"], two["surest"]) == (pytest.approx(0.001), 1.0)


def test_rollouts_that_are_there_can_be_looked_at_again(probed: Path) -> None:
    again = run_here([DMOA, "probe", "--config", str(probed / "pool.yaml"), "--rollouts", str(probed / "run" / "dense")])
    assert again.returncode == 0, again.stderr
    assert "16 queries" in again.stdout
    asked = [json.loads(line)["query_id"] for line in (probed / "run" / "dense" / "queries.jsonl").read_text().splitlines()]
    outcomes = [{"query_id": query, "agent": "three", "reward": 0} for query in asked[:12]]
    (probed / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in outcomes), encoding="utf-8")
    files = ["--rollouts", str(probed / "run" / "dense"), "--outcomes", str(probed / "outcomes.jsonl")]
    told = run_here([DMOA, "probe", "--config", str(probed / "pool.yaml"), *files, "--json", str(probed / "told.json")])
    assert told.returncode == 0, told.stderr
    assert "12 queries have outcomes; right by them: three 0% of 12 (0% to 24%)" in told.stdout
    assert json.loads((probed / "told.json").read_text())["answers"]["outcomes"] == 12
    other = run_here([DMOA, "probe", "--rollouts", str(probed / "run" / "dense")])
    assert other.returncode == 2
    assert "only in the rollouts: one, two, three" in other.stderr
