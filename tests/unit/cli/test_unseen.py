"""The demo's last act: a skill that the gate was not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from dmoa.checkpoint import describe_gate
from dmoa.core.gate import Gate, init_gate
from dmoa.testing import domain_rows, scripted_pool, write_rollouts
from dmoa.training.adapt import Adapter, episodes_of
from dmoa.training.dataset import Episodes
from dmoa.training.distributed import SingleWorker
from dmoa.training.options import AdaptSettings
from dmoa.training.rollouts import RolloutFolder, RolloutQuery, read_table
from dmoa.workflows.unseen import Seen, adapt_to_unseen, told, without
from tests.unit.training.adapt_lessons import CPU, lesson, place, spec


def chosen(gate: Gate, domain: int) -> float:
    """Share of unseen queries of a domain that go to the agent that knows it."""
    x_BX = torch.from_numpy(np.stack([place(domain, 500 + number) for number in range(20)]))
    with torch.no_grad():
        return float((gate(x_BX, torch.zeros(20, gate.spec.hidden)).logits_BA.argmax(dim=1) == domain).float().mean())


def test_queries_of_one_suite_teach_it_and_the_others_are_replayed() -> None:
    gate = init_gate(spec(), seed=3)
    learner = Adapter(gate, describe_gate(gate, fingerprint="f" * 64), None, AdaptSettings(lr=3e-3), SingleWorker(CPU))
    for number in range(10):
        learner.learn([lesson(domain, number) for domain in (0, 1)])
    found = [episodes_of(lesson(domain, number), spec()) for number in range(8) for domain in range(3)]
    whole = Episodes.joined([one for one in found if isinstance(one, Episodes)])
    steps = adapt_to_unseen(
        learner.candidate(), whole, "d2", lambda gate: (chosen(gate, 2), min(chosen(gate, 0), chosen(gate, 1)))
    )
    assert [one.queries for one in steps] == list(range(9))
    assert steps[0].skill < 0.5
    assert steps[-1].skill >= 0.9
    assert steps[-1].others >= 0.9


def test_a_collection_without_one_suite_has_all_rows_of_the_others(tmp_path: Path) -> None:
    rows = [row | {"source": f"suite-{number % 2}"} for number, row in enumerate(domain_rows(6))]
    whole = RolloutFolder(write_rollouts(tmp_path / "whole", rows, scripted_pool(("one", "two", "three"))))
    queries = [RolloutQuery(query_id=f"q{number}", source=f"suite-{number % 2}", split="gate", text="?") for number in range(4)]
    whole.queries.write_text("".join(query.model_dump_json() + "\n" for query in queries), encoding="utf-8")
    part = RolloutFolder(without(whole.root, "suite-1", tmp_path / "part"))
    assert read_table(part.root)["source"].unique().to_pylist() == ["suite-0"]
    assert len(read_table(part.root)) == len(rows) // 2 == len(pq.read_table(part.parts))
    kept = [RolloutQuery.model_validate_json(line).query_id for line in part.queries.read_text(encoding="utf-8").splitlines()]
    assert kept == ["q0", "q2"]


def test_the_story_names_what_was_gained_and_what_was_lost() -> None:
    found = [Seen(queries=number, skill=min(1.0, number / 4), others=0.95 - 0.01 * number) for number in range(8)]
    lines = told(found, "dyes")
    assert lines[0] == "  after  0 queries:   0% right on dyes,  95% elsewhere"
    assert [line.split()[1] for line in lines[:-1]] == ["0", "1", "2", "3", "5", "7"]
    assert lines[-1] == "  without a label: +100 points on dyes, -7 on what it knew"
