"""The card of a trained adapter: what made it, and how it does on held-out rows of every suite."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoa.cli.specialist_recipes import Recipe, Source, SpecialistOptions, prompt_of, validation_rows
from dmoa.config import TransformersOptions
from dmoa.engines.models import model_id, resolve_model
from dmoa.evaluation.records import Reply
from dmoa.evaluation.registry import SUITES
from dmoa.training.specialists import TrainedAdapter
from dmoa.types import Generation, GenerationRequest, Message, Sampling

CARD = "card.json"
MAX_TOKENS = 16
"""Longest reply, as in the pools of specialists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteFigures:
    """How an adapter did on one suite."""

    source: Source
    rows: int
    accuracy: float
    entropy_nats: float
    """Mean over the rows of a reply's mean entropy per token."""
    groups: dict[str, float]
    """Accuracy by group of rows."""


def write_card(trained: TrainedAdapter, options: SpecialistOptions, command: str, *, code_revision: str | None) -> dict[str, Any]:
    """Let the adapter answer held-out rows, write its card beside it and return it. Blocks for a minute or so."""
    recipe = options.recipe
    figures = asyncio.run(_measure(trained.folder, options, recipe))
    card = {
        "name": options.name,
        "base": model_id(options.model),
        "command": command,
        "code_revision": code_revision,
        "recipe": recipe.model_dump(mode="json"),
        "steps_made": trained.steps,
        "held_out": {
            suite: {
                "rows": found.rows,
                "split": "validation",
                "difficulty": found.source.difficulty,
                "accuracy": round(found.accuracy, 4),
                "entropy_nats": round(found.entropy_nats, 4),
                "groups": {group: round(value, 4) for group, value in found.groups.items()},
            }
            for suite, found in figures.items()
        },
        "curve": [{name: round(value, 4) for name, value in point.items()} for point in trained.curve],
    }
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    (trained.folder / CARD).write_text(text, encoding="utf-8")
    return card


async def _measure(folder: Path, options: SpecialistOptions, recipe: Recipe) -> dict[str, SuiteFigures]:
    from dmoa.engines.transformers.engine import TransformersEngine

    engine = TransformersEngine(
        resolve_model(options.model), TransformersOptions(threads=recipe.threads), adapters={options.name: folder}
    )
    try:
        return {source.suite: await _ask(engine, source, options, recipe) for source in options.card_sources}
    finally:
        await engine.close()


async def _ask(engine: Any, source: Source, options: SpecialistOptions, recipe: Recipe) -> SuiteFigures:
    is_own = source.suite in {own.suite for own in recipe.sources}
    rows = validation_rows(source, options.card_rows if is_own else options.foreign_rows)
    requests = [
        GenerationRequest(
            request_id=row.task.row_id,
            messages=tuple(
                Message(role=message.role, content=message.content)  # type: ignore[arg-type]  # roles of our own prompts
                for message in prompt_of(recipe, row.task.text)
            ),
            sampling=Sampling(max_tokens=MAX_TOKENS),
            adapter=options.name,
        )
        for row in rows
    ]
    replies: list[Generation] = await asyncio.gather(*(engine.generate(request) for request in requests))
    values = [
        SUITES[source.suite].score(row.label, Reply(text=reply.text)).value for row, reply in zip(rows, replies, strict=True)
    ]
    by_group: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        by_group.setdefault(row.task.group, []).append(value)
    return SuiteFigures(
        source=source,
        rows=len(rows),
        accuracy=_mean(values),
        entropy_nats=_mean([reply.entropy_sum_nats / max(1, reply.entropy_tokens) for reply in replies]),
        groups={group: _mean(found) for group, found in sorted(by_group.items())},
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
