"""`dmoa rollouts` as a user runs it, on scripted agents: whole, killed and gone on with, refused, and as a job."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from dmoa.training.rollouts import part_paths, read_manifest, read_table
from tests.integration.evaluations import DMOA, run, run_and_kill, run_here, scripted_pool

ROOT = Path(__file__).parents[3]
QUERIES = 60
VOLATILE = ["latency_ms"]


def command(out: Path, *more: str, own: Path | None = None) -> list[str]:
    """Return the command of a collection of generated rows and of the user's own queries."""
    own = own or out.parent / "own.jsonl"
    own.write_text("".join(f'{{"query": "Own question {number}?"}}\n' for number in range(10)), encoding="utf-8")
    sources = ["--benchmarks", "arith:2,relay:1", "--queries", f"{own}:1", "--limit", str(QUERIES)]
    return [DMOA, "rollouts", "--config", str(scripted_pool(out.parent)), "--out", str(out), "--track", "none", *sources, *more]


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return all rows in the order of queries, without what differs from run to run."""
    table = read_table(out).drop_columns(VOLATILE)
    return table.sort_by([(name, "ascending") for name in ("query_id", "step", "agent")]).to_pylist()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole collection."""
    out = tmp_path_factory.mktemp("rollouts") / "run"
    ran = run([*command(out), "--json", str(out.parent / "manifest.json")])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(out)]
    assert f"collecting: {QUERIES} of {QUERIES} rows" in ran.stderr
    return out


def test_every_query_is_there_once_with_every_agent_in_every_step(unbroken: Path) -> None:
    rows, manifest = rows_of(unbroken), read_manifest(unbroken)
    steps = {(row["query_id"], row["step"]) for row in rows}
    num_steps = {row["query_id"]: row["num_steps"] for row in rows}
    assert {source.name: source.queries for source in manifest.sources} == {"own.jsonl": 10, "arith": 33, "relay": 17}
    assert Counter(key.split("/")[0] for key in num_steps) == {"queries": 10, "arith": 33, "relay": 17}
    assert steps == {(key, step) for key, number in num_steps.items() for step in range(number)}
    assert {number for key, number in num_steps.items() if key.startswith("relay")} == {4}
    assert len(rows) == 3 * len(steps), "dense: all three agents ran in every step"
    for row in rows:
        assert row["is_selected"] != row["is_explored"]
        assert (row["propensity"], row["status"], row["schema_version"]) == (1.0, "ok", 1)
        assert (len(row["context"]), len(row["feedback"])) == (len(rows[0]["context"]), 4)
    assert any(row["is_explored"] for row in rows)
    counts = manifest.counts
    assert (counts.queries, counts.steps, counts.rows, counts.failed) == (QUERIES, len(steps), len(rows), 0)
    assert (
        manifest.model_dump_json()
        == (type(manifest).model_validate_json((unbroken.parent / "manifest.json").read_text())).model_dump_json()
    )


@pytest.mark.accept
def test_a_collection_that_is_killed_goes_on_and_asks_no_query_twice(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = command(out, "--concurrency", "3")
    assert run_and_kill(arguments, lambda: bool(part_paths(out)), tmp_path / "log"), (tmp_path / "log").read_text()
    kept = {path.name: path.read_bytes() for path in part_paths(out)}
    done = {row["query_id"] for row in rows_of(out)}
    assert 0 < len(done) < QUERIES
    ran = run(arguments)
    assert ran.returncode == 0, ran.stderr
    assert f"{len(done)} queries are collected, {QUERIES - len(done)} are left" in ran.stderr
    assert kept.items() <= {path.name: path.read_bytes() for path in part_paths(out)}.items(), "what was written stands"
    queries = [key for path in part_paths(out) for key in pq.read_table(path)["query_id"].unique().to_pylist()]
    assert len(queries) == len(set(queries)) == QUERIES
    assert rows_of(out) == rows_of(unbroken)


def test_going_on_refuses_other_settings_damage_and_foreign_rows(unbroken: Path, tmp_path: Path) -> None:
    other = run_here([*command(unbroken), "--seed", "9"])
    assert other.returncode == 2
    assert "seed: begun with 0, now 9" in other.stderr
    out = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(unbroken), str(out)], check=True)
    (path, *_) = part_paths(out)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = command(out, own=unbroken.parent / "own.jsonl")
    cut = run_here(again)
    assert cut.returncode == 2
    assert f"{path}: not a whole Parquet file" in cut.stderr
    path.write_bytes(whole)
    manifest = read_manifest(out)
    (out / "rollouts.json").write_text(manifest.model_copy(update={"pool_fingerprint": "0" * 64}).model_dump_json())
    foreign = run_here(again)
    assert foreign.returncode == 2
    assert f"pool_fingerprint: begun with {'0' * 64}, now {manifest.pool_fingerprint}" in foreign.stderr


def test_a_sparse_round_as_a_job_explores_as_often_as_it_says(tmp_path: Path) -> None:
    tree = yaml.safe_load(scripted_pool(tmp_path).read_text(encoding="utf-8"))
    tree["gate"] = {"activation": {"max_agents": 1}}
    tree["job"] = {
        "benchmarks": "calendar",
        "limit": 100,
        "epsilon": 0.3,
        "round": 2,
        "out": (tmp_path / "run").as_uri(),
        "labels": str(tmp_path / "labels"),
        "track": "none",
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    ran = run([sys.executable, str(ROOT / "jobs" / "collect_rollouts.py"), "--config", str(path)])
    assert ran.returncode == 0, ran.stderr
    manifest, rows = read_manifest(tmp_path / "run"), rows_of(tmp_path / "run")
    assert (manifest.mode, manifest.epsilon, manifest.round) == ("epsilon", 0.3, 2)
    explored = [row for row in rows if row["is_explored"]]
    steps = manifest.counts.steps
    assert {row["propensity"] for row in explored} == {0.3 / 2}
    assert abs(len(explored) - 0.3 * steps) <= 4 * (steps * 0.3 * 0.7) ** 0.5
    assert len(rows) == steps + len(explored)
    assert len((tmp_path / "labels" / "labels.jsonl").read_text().splitlines()) == 100
    assert not list((tmp_path / "run").rglob("*label*"))


@pytest.mark.accept
def test_failed_queries_are_named_and_asked_again(tmp_path: Path) -> None:
    pool = yaml.safe_load(scripted_pool(tmp_path).read_text(encoding="utf-8"))
    path, out = tmp_path / "failing.yaml", tmp_path / "run"
    base = [
        DMOA,
        "rollouts",
        "--config",
        str(path),
        "--out",
        str(out),
        "--benchmarks",
        "words",
        "--limit",
        "3",
        "--track",
        "none",
    ]
    for failing, status, failed in ((["one", "two", "three"], 1, 3), ([], 0, 0)):
        pool["llms"]["s"]["engine_kwargs"]["failing"] = failing
        path.write_text(yaml.safe_dump(pool), encoding="utf-8")
        ran = run(base)
        assert ran.returncode == status, ran.stderr
        assert read_manifest(out).counts.failed == failed
        assert ("all 3 queries failed" in ran.stderr) == bool(failed)
    assert len({row["query_id"] for row in rows_of(out)}) == 3
