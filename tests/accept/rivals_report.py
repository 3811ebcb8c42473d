"""`dmoa compare` over all policies, and its report in a headless browser: a line of `accept_rivals`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmoa.agents.pool import load_pool
from dmoa.evaluation.records import RunInfo
from dmoa.evaluation.results import Evaluation
from dmoa.evaluation.run_folder import RunFolder
from dmoa.policies.registry import POLICIES, needs_labels
from dmoa.storage import write_whole
from tests.accept.browser import browser, executable
from tests.integration.evaluations import command, run, scripted_pool

Figures = dict[str, Any]


def seen(tab: Any, page: Path) -> Figures:
    """Return what a browser shows of a report."""
    tab.open(page.absolute().as_uri())
    return {
        "heading": tab.text("h1"),
        "drawings": tab.run("document.querySelectorAll('svg').length"),
        "policies_in_table": tab.run("document.querySelectorAll('table')[0].querySelectorAll('tbody tr').length"),
        "problems": tab.problems,
    }


def write_labels(out: Path, pool: Path | str, rows: Sequence[str]) -> Path:
    """Return a file of judged replies of every agent to one adaptation row a benchmark, which routers with labels learn from."""
    path, folder = out / "labels.jsonl", RunFolder(out / "labels")
    if not path.exists():
        agents = load_pool(pool).agent_names
        asked = ["--split", "adaptation", "--limit", "1", "--policies", ",".join(f"single:{agent}" for agent in agents)]
        done = run(command(folder.root, "--config", str(pool), *rows, *asked, "--resume"))
        assert done.returncode == 0, done.stderr[-2000:]
        info = RunInfo.model_validate_json(folder.run.read_text(encoding="utf-8"))
        text_of = {task.row_id: task.text for of in info.benchmarks for task in folder.read_tasks(of.name)}
        judged = [
            {"query": text_of[score.row_id], "agent": agent, "reward": score.value}
            for of in info.benchmarks
            for agent in agents
            for score in folder.read_scores(of.name, f"single:{agent}")
        ]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in judged).encode())
    return path


def report(out: Path, rows: Sequence[str], config: str | None, limit: int, more: Sequence[str]) -> Figures:
    """`dmoa compare` over all policies, and its report in a headless browser where one is installed; goes on where it was ended.

    `config` None: scripted agents, whose figures mean nothing; the report is the same kind of page. `more`: further options.
    """
    out.mkdir(parents=True, exist_ok=True)
    pool = config or str(scripted_pool(out))
    labels = write_labels(out, pool, [*rows, *more]).absolute()
    names = ["all", *(f"{name}:data={labels}" for name in POLICIES.builtin if needs_labels(name))]
    base = command(
        out / "run",
        "--config",
        pool,
        *rows,
        *more,
        "--limit",
        str(limit),
        "--policies",
        ",".join(names),
        "--resume",
        "--retry-failed",
    )
    done = run([base[0], "compare", *base[2:]])
    folder = RunFolder(out / "run")
    found: Figures = {"exit": done.returncode, "stderr": done.stderr[-1500:] if done.returncode else ""}
    if folder.evaluation.exists():
        evaluation = Evaluation.model_validate_json(folder.evaluation.read_text(encoding="utf-8"))
        found |= {"rows": len(evaluation.rows), "policies": len({row.policy for row in evaluation.rows})}
        found |= {"failed": sum(row.failed for row in evaluation.rows), "queries": sum(row.n for row in evaluation.rows)}
        found["from_the_cache"] = round(
            sum(row.memoised_tokens for row in evaluation.rows) / max(1, sum(row.usage.total for row in evaluation.rows)), 3
        )
    if executable() and folder.report.exists():
        with browser() as new_tab:
            found |= seen(new_tab(), folder.report)
    found["passed"] = done.returncode == 0 and found.get("drawings", 1) > 0 and not found.get("problems")
    return found
