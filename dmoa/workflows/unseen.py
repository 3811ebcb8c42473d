"""Adaptation to a skill that a gate was not trained on, shown on replies that are there already; for the demo.

A gate is trained on the rollouts of all suites but one, then the queries of that one teach it in turn, without labels, as
`dmoa adapt` does. Before and after, it is judged on held-out rows that every agent has answered alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dmoa import checkpoint
from dmoa.agents.pool import fingerprint
from dmoa.checkpoint import Checkpoint
from dmoa.config import Config
from dmoa.core.gate import Gate
from dmoa.evaluation.answer_matrix import AnswerMatrix, Floats, gate_choices, read_matrix, replay_choices
from dmoa.evaluation.run_folder import RunFolder
from dmoa.protocols import Encoder
from dmoa.storage import write_whole
from dmoa.training.adapt import Adapter
from dmoa.training.dataset import Episodes, read_episodes
from dmoa.training.distributed import SingleWorker
from dmoa.training.options import AdaptSettings, TrainOptions
from dmoa.training.rollouts import RolloutFolder, part_of, read_manifest, read_table
from dmoa.training.trainer import TrainContext, run_training
from dmoa.types import FloatArray

_STEPS = 12
"""Gradient steps of an update: there are few queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How a gate does after so many queries of the skill."""

    queries: int
    skill: float
    """Accuracy on held-out rows of the new skill."""
    others: float
    """On those of the suites that it was trained on."""


def without(rollouts: Path, suite: str, out: Path) -> Path:
    """Write the rollouts of all other suites as a collection of its own, and return its folder."""
    table, folder = read_table(rollouts), RolloutFolder(out)
    kept = table.filter(pc.not_equal(table["source"], pa.scalar(suite)))
    folder.parts.mkdir(parents=True)
    write_whole(folder.parts / "part-000000.parquet", part_of([kept]))
    lines = RolloutFolder(rollouts).queries.read_text(encoding="utf-8").splitlines(keepends=True)
    write_whole(folder.queries, "".join(line for line in lines if f'"source":"{suite}"' not in line.replace('": "', '":"')))
    write_whole(folder.manifest, read_manifest(rollouts).model_dump_json(indent=2) + "\n")
    return out


def trained_without(rollouts: Path, suite: str, config: Config, out: Path, seed: int) -> tuple[Gate, Checkpoint]:
    """Train a gate on the rollouts of all suites but one, in this process."""
    values = {"rollouts": without(rollouts, suite, out / "rollouts"), "out": out / "gate", "workers": 0, "track": "none"}
    return checkpoint.load(run_training(TrainOptions.parse({**values, "seed": seed}), config, TrainContext()).checkpoint)


def adapt_to_unseen(
    start: tuple[Gate, Checkpoint], episodes: Episodes, suite: str, judge: Callable[[Gate], tuple[float, float]]
) -> list[Seen]:
    """Let the queries of a suite teach a gate that has not seen it, the others replayed; return how it does after each.

    `judge` gives the accuracy on the suite and on the others.
    """
    is_new_Q = np.array([key.query_id.startswith(f"{suite}/") for key in episodes.key_Q], dtype=np.bool_)
    old = episodes.take(np.flatnonzero(~is_new_Q))
    adapter = Adapter(*start, old, AdaptSettings(steps=_STEPS), SingleWorker(torch.device("cpu")))
    found = [Seen(queries=0, skill=(shares := judge(start[0]))[0], others=shares[1])]
    for number, query in enumerate(np.flatnonzero(is_new_Q), start=1):
        adapter.learn([episodes.take(np.array([query]))])
        skill, others = judge(adapter.candidate()[0])
        found.append(Seen(queries=number, skill=skill, others=others))
    return found


def show_unseen(
    rollouts: Path, folder: RunFolder, config: Config, encoder: Encoder, suites: Sequence[str], out: Path, seed: int
) -> list[Seen]:
    """Train without the last suite, adapt to it, and return how that went; `folder` has every agent's answers to held-out rows.

    Raises ConfigError where an agent has not answered every row.
    """
    suite = suites[-1]
    matrices = {name: read_matrix(folder, name, config.agent_names) for name in suites}
    embedded = {
        name: np.stack(asyncio.run(encoder.embed([task.text for task in matrix.tasks]))) for name, matrix in matrices.items()
    }
    start = trained_without(rollouts, suite, config, out, seed)
    episodes = read_episodes([rollouts], start[0].spec, fingerprint(config), on_ray=False)

    def judge(gate: Gate) -> tuple[float, float]:
        values = {name: _values(gate, matrix, embedded[name]) for name, matrix in matrices.items()}
        return float(values.pop(suite).mean()), float(np.concatenate(list(values.values())).mean())

    return adapt_to_unseen(start, episodes, suite, judge)


def _values(gate: Gate, matrix: AnswerMatrix, embedding_RD: FloatArray) -> Floats:
    return replay_choices(matrix, gate_choices(gate, embedding_RD)).value_R


def told(found: Sequence[Seen], suite: str) -> list[str]:
    """Return the story in lines: now and then how many answers are right, and what is not claimed."""
    shown = [one for one in found if one.queries in (0, 1, 2, 3, 5) or one.queries == found[-1].queries]
    lines = [f"  after {one.queries:2d} queries: {one.skill:4.0%} right on {suite}, {one.others:4.0%} elsewhere" for one in shown]
    first, last = found[0], found[-1]
    gain, kept = 100 * (last.skill - first.skill), 100 * (last.others - first.others)
    return [*lines, f"  without a label: {gain:+.0f} points on {suite}, {kept:+.0f} on what it knew"]
