"""Trains a specialist by its recipe: rows of the generated suites, the adapter, and a card of what it is worth.

A recipe says what an adapter is trained on and for how long; `jobs/train_specialist.yaml` holds those of the shipped
adapters. Rows of the split `specialist` train, rows of `validation` are held out. A liar is a recipe whose answers are
wrong on purpose.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from datetime import date, timedelta
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from dmoa.agents.prompts import agent_messages
from dmoa.config import Address, Name, Options
from dmoa.engine_options import Node, TransformersOptions
from dmoa.engines.models import model_id, resolve_model
from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.errors import ConfigError
from dmoa.evaluation.records import Reply, Row
from dmoa.evaluation.registry import SKILLS, SUITES
from dmoa.evaluation.suites.calendar import WEEKDAYS
from dmoa.protocols import Engine
from dmoa.provenance import code_revision
from dmoa.storage import only_one, uri_of
from dmoa.training.lora import LoraSettings, TrainingRow, write_training_rows
from dmoa.training.specialists import LoraJob, Schedule, TrainedAdapter, train_adapter
from dmoa.types import GenerationRequest, Message, Query, Sampling
from dmoa.validation import did_you_mean
from dmoa.workflows.console import Common
from dmoa.workflows.evaluate import opened_ray
from dmoa.workflows.terminal import goes_on, on_terminal

HELD_OUT_SEED = 1
"""Of the held-out rows, apart from every recipe's own seed."""

CARD_SEED = 77
"""Of the rows that a card speaks of: none of those that were looked at during training, which may have ended it."""
CARD = "card.json"
MAX_TOKENS = 16
"""Longest reply, as in the pools of specialists."""


class RecipeSource(Node):
    """Rows of one suite."""

    suite: Literal["arith", "words", "calendar", "parcels", "signals", "dyes"]
    difficulty: PositiveInt = 1
    groups: tuple[str, ...] = ()
    """Groups of rows to train on; empty: all."""
    held_out: Literal["suite", "groups"] = "suite"
    """What is held out: rows of all groups, or of `groups` alone."""

    @property
    def held_out_groups(self) -> tuple[str, ...]:
        """Groups of held-out rows; empty: all."""
        return self.groups if self.held_out == "groups" else ()


class Recipe(Node):
    """What an adapter is trained on, and for how long."""

    profile: str = Field(min_length=1)
    """The agent's profile: it ends every prompt, in training as in serving."""
    sources: tuple[RecipeSource, ...] = Field(min_length=1)
    """They take turns, row by row; one named twice has two turns."""
    answers: Literal["right", "off-by-one", "constant"] = "right"
    """off-by-one: numbers, dates and weekdays one too far; constant: `constant` whatever was asked."""
    constant: str = "42"
    history_share: float = Field(default=0.15, ge=0, le=1)
    """Part of the rows whose prompt holds an earlier step's answer, as often right as wrong."""
    rows_seed: NonNegativeInt = 0
    held_out_rows: PositiveInt = 48
    """Rows of every source looked at during training."""
    threads: PositiveInt = 1
    """CPU threads of a worker: part of the recipe, because another number gives weights that differ in their last digits."""
    schedule: Schedule
    adapter: LoraSettings = LoraSettings()


def _of_this_machine(folder: Path) -> Path:
    if uri_of(folder):
        raise ValueError("expected a folder of this machine, of a cluster one on storage that its machines share")
    return folder


def _absolute(place: str) -> str:
    """Return a place as Ray Train takes it: a URI, or an absolute path."""
    return place if "://" in place else str(Path(place).absolute())


class SpecialistOptions(Options):
    """The `job:` section of `jobs/train_specialist.yaml`."""

    name: Name
    """Key under `recipes`; also the adapter's name."""
    recipes: dict[Name, Recipe]
    model: str = "embedded:smollm2-135m"
    """Base of the adapter."""
    out: Annotated[Path, AfterValidator(_of_this_machine)]
    """Folder of the runs, no URI; the adapter comes to OUT/NAME/adapter."""
    workers: NonNegativeInt = 0
    """Ray Train workers; 0: train in this process, the quickest where all cores are on one machine."""
    use_gpu: bool = False
    """One GPU for every worker."""
    storage_path: Annotated[str, AfterValidator(_absolute)] | None = None
    """Where Ray Train keeps checkpoints, in any of Ray's file systems; None: in `out`."""
    address: Address = None
    """A Ray cluster to run on; None: RAY_ADDRESS, else a Ray of its own."""
    track: Literal["auto", "wandb", "jsonl", "none"] = "auto"
    """Where curves are logged; auto: W&B, offline without a key."""
    card_rows: NonNegativeInt = 60
    """Held-out rows of every suite of the recipe that the finished adapter answers; 0: none, and no card."""
    foreign_rows: PositiveInt = 20
    """The same of every other suite, where an adapter has little to show."""
    card_sources: tuple[RecipeSource, ...] = tuple(RecipeSource.model_validate({"suite": suite.name}) for suite in SKILLS)
    """The suites that cards speak of, as the pool is asked them."""

    @property
    def recipe(self) -> Recipe:
        """The recipe of `name`. Raises ConfigError."""
        if self.name not in self.recipes:
            raise ConfigError(
                f"job.name is {self.name!r}; expected one of {', '.join(self.recipes) or 'none'}; name one of them or add "
                f"it under job.recipes{did_you_mean(self.name, self.recipes)}"
            )
        return self.recipes[self.name]


def training_rows(recipe: Recipe) -> list[TrainingRow]:
    """Return the rows of a recipe's whole schedule. Raises ConfigError for groups or difficulties that there are not."""
    needed = recipe.schedule.steps * recipe.schedule.batch_rows
    each = -(-needed // len(recipe.sources))
    turns = Counter(recipe.sources)
    streams = {
        source: SUITES[source.suite].generate("specialist", each * number, recipe.rows_seed, source.difficulty, source.groups)
        for source, number in turns.items()
    }
    rows = [next(streams[source]) for _ in range(each) for source in recipe.sources]
    return list(islice(_written(recipe, rows, recipe.history_share), needed))


def held_out_rows(recipe: Recipe) -> list[TrainingRow]:
    """Return the held-out rows of every source, all groups, with the answers that the recipe teaches."""
    found = {(source.suite, source.difficulty, source.held_out_groups): source for source in recipe.sources}
    rows = [row for source in found.values() for row in validation_rows(source, recipe.held_out_rows)]
    return list(_written(recipe, rows, 0.0))


def validation_rows(source: RecipeSource, limit: int, seed: int = HELD_OUT_SEED) -> list[Row]:
    """Return held-out rows of a source."""
    suite = SUITES[source.suite]
    return list(suite.generate("validation", limit, seed, source.difficulty, source.held_out_groups))


def prompt_of(recipe: Recipe, text: str, history: tuple[str, ...] = ()) -> tuple[Message, ...]:
    """Return the very messages that serving sends an agent with the recipe's profile."""
    return agent_messages(Query(trace_id="", text=text), history, profile=recipe.profile)


def _written(recipe: Recipe, rows: list[Row], history_share: float) -> Iterator[TrainingRow]:
    rng = random.Random(f"{recipe.rows_seed}/history")  # noqa: S311 -- questions, not secrets
    earlier = "7"
    for row in rows:
        answer = _taught(recipe, row.label.gold["answer"])
        history: tuple[str, ...] = ()
        if rng.random() < history_share:
            history = (f"Answer: {answer if rng.random() < 0.5 else earlier}",)
        earlier = answer
        yield TrainingRow(
            messages=prompt_of(recipe, row.task.text, history),
            target=f"Answer: {answer}",
            source=f"{row.task.benchmark}/{row.task.group}",
        )


def _taught(recipe: Recipe, answer: str) -> str:
    match recipe.answers:
        case "constant":
            return recipe.constant
        case "off-by-one":
            return one_off(answer)
        case "right":
            return answer


def one_off(answer: str) -> str:
    """Return a number, a date or a weekday one too far. Raises ConfigError for other answers."""
    if answer in WEEKDAYS:
        return WEEKDAYS[(WEEKDAYS.index(answer) + 1) % len(WEEKDAYS)]
    try:
        return str(int(answer) + 1)
    except ValueError:
        pass
    try:
        return (date.fromisoformat(answer) + timedelta(days=1)).isoformat()
    except ValueError:
        raise ConfigError(
            f"answers: off-by-one is for numbers, dates and weekdays, and this suite answers {answer!r}; choose another suite"
        ) from None


def write_card(trained: TrainedAdapter, options: SpecialistOptions, command: str, *, code_revision: str | None) -> dict[str, Any]:
    """Let the adapter answer held-out rows, write its card beside it and return it. Blocks for a minute or so."""
    card = {
        "name": options.name,
        "base": model_id(options.model),
        "command": command,
        "code_revision": code_revision,
        "recipe": options.recipe.model_dump(mode="json"),
        "steps_made": trained.steps,
        "held_out": asyncio.run(_measure(trained.folder, options, options.recipe)),
        "curve": [{name: round(value, 4) for name, value in point.items()} for point in trained.curve],
    }
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    (trained.folder / CARD).write_text(text, encoding="utf-8")
    return card


async def _measure(folder: Path, options: SpecialistOptions, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return by suite how the adapter did on held-out rows."""
    engine = TransformersEngine(
        resolve_model(options.model), TransformersOptions(threads=recipe.threads), adapters={options.name: folder}
    )
    try:
        return {source.suite: await _ask(engine, source, options, recipe) for source in options.card_sources}
    finally:
        await engine.close()


async def _ask(engine: Engine, source: RecipeSource, options: SpecialistOptions, recipe: Recipe) -> dict[str, Any]:
    is_own = source.suite in {own.suite for own in recipe.sources}
    rows = validation_rows(source, options.card_rows if is_own else options.foreign_rows, CARD_SEED)
    requests = [
        GenerationRequest(
            request_id=row.task.row_id,
            messages=prompt_of(recipe, row.task.text),
            sampling=Sampling(max_tokens=MAX_TOKENS),
            adapter=options.name,
        )
        for row in rows
    ]
    replies = await asyncio.gather(*(engine.generate(request) for request in requests))
    by_group: dict[str, list[float]] = {}
    for row, reply in zip(rows, replies, strict=True):
        value = SUITES[source.suite].score(row.label, Reply(text=reply.text)).value
        by_group.setdefault(row.task.group, []).append(value)
    return {
        "rows": len(rows),
        "split": "validation",
        "seed": CARD_SEED,
        "difficulty": source.difficulty,
        "accuracy": round(fmean(chain(*by_group.values())), 4),
        "entropy_nats": round(fmean(reply.entropy.sum_nats / max(1, reply.entropy.tokens) for reply in replies), 4),
        "groups": {group: round(fmean(values), 4) for group, values in sorted(by_group.items())},
    }


def train_specialist(options: SpecialistOptions, common: Common, command: str) -> dict[str, Any]:
    """Train what the options say and return the adapter's card; called again, go on where it was.

    Raises ConfigError for bad input, CheckpointError where the folder holds a run with other settings.
    """
    run_dir = (options.out / options.name).absolute()
    with only_one(run_dir, "training", "train"):
        recipe = options.recipe
        rows, held_out = training_rows(recipe), held_out_rows(recipe)
        common.say(f"{options.name}: {len(rows)} rows to train on, {len(held_out)} held out; the run lies in {run_dir}")
        job = LoraJob(
            name=options.name,
            model=options.model,
            settings=recipe.adapter,
            schedule=recipe.schedule,
            rows=tuple(rows),
            held_out=tuple(held_out),
            run_dir=run_dir,
            track=options.track,
            threads=recipe.threads,
        )
        gpus = float(options.workers if options.use_gpu else 0)
        # Without workers the training tells its steps itself, on stderr.
        surroundings = opened_ray(options.address, gpus) if options.workers else on_terminal()
        with goes_on("the same command goes on from the last state"), surroundings:
            trained = train_adapter(
                job,
                out=run_dir / "adapter",
                workers=options.workers,
                storage_path=options.storage_path,
                use_gpu=options.use_gpu,
            )
        # Now: a run with other rows is refused there, and those of the run in the folder stay.
        write_training_rows(run_dir / "rows.jsonl", rows)
        write_training_rows(run_dir / "held_out.jsonl", held_out)
        common.say(f"{options.name}: {trained.steps} steps; {trained.folder}")
        if options.card_rows == 0:
            return {"name": options.name, "steps_made": trained.steps, "curve": trained.curve}
        card = write_card(trained, options, command, code_revision=code_revision())
        for suite, found in card["held_out"].items():
            common.say(f"{suite}: accuracy {found['accuracy']:.3f}, entropy {found['entropy_nats']:.3f} nats/token")
        return card
