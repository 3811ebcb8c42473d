"""From a recipe to a trained adapter with its card: the work of `jobs/train_specialist.py`."""

from __future__ import annotations

from typing import Any

from dmoa.cli.interrupts import goes_on
from dmoa.cli.options import Common
from dmoa.cli.terminal import on_terminal


def train_specialist(values: dict[str, Any], common: Common, command: str) -> dict[str, Any]:
    """Train what the options say and return the adapter's card; called again, go on where it was.

    Raises ConfigError for bad input, CheckpointError where the folder holds a run with other settings.
    """
    from dmoa.cli.evaluation_session import opened_ray
    from dmoa.cli.specialist_card import write_card
    from dmoa.cli.specialist_recipes import held_out_rows, parse_specialist, training_rows
    from dmoa.provenance import code_revision
    from dmoa.training.lora import write_training_rows
    from dmoa.training.specialists import build_job, train_adapter

    options = parse_specialist(values)
    recipe = options.recipe
    run_dir = (options.out / options.name).absolute()
    rows, held_out = training_rows(recipe), held_out_rows(recipe)
    write_training_rows(run_dir / "rows.jsonl", rows)
    write_training_rows(run_dir / "held_out.jsonl", held_out)
    common.say(f"{options.name}: {len(rows)} rows to train on, {len(held_out)} held out; the run lies in {run_dir}")
    job = build_job(
        options.name,
        options.model,
        recipe.adapter,
        recipe.schedule,
        rows,
        held_out,
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
    common.say(f"{options.name}: {trained.steps} steps; {trained.folder}")
    if options.card_rows == 0:
        return {"name": options.name, "steps_made": trained.steps, "curve": trained.curve}
    card = write_card(trained, options, command, code_revision=code_revision())
    for suite, found in card["held_out"].items():
        common.say(f"{suite}: accuracy {found['accuracy']:.3f}, entropy {found['entropy_nats']:.3f} nats/token")
    return card
