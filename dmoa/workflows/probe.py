"""Puts a probe together: dense rollouts of the queries, and of rows with known answers, judged; then the statistics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoa.config import Config
from dmoa.core.features import Preset
from dmoa.engine_options import RecordedOptions
from dmoa.errors import ConfigError
from dmoa.evaluation.registry import SKILLS, SUITES
from dmoa.storage import write_whole
from dmoa.training.cluster_router import ProbeSample, sample_of
from dmoa.training.probe import ProbeReport, probe_pool
from dmoa.types import Price
from dmoa.validation import did_you_mean
from dmoa.workflows.console import Common
from dmoa.workflows.terminal import goes_on

if TYPE_CHECKING:
    import pyarrow as pa

    from dmoa.training.options import ProbeOptions


DEFAULT_SUITES = ",".join(suite.name for suite in SKILLS)
STAGED = ("chain", "relay")
KNOWN_ANSWERS = "known-answers.jsonl"
"""In the folder of a probe with known answers: who is right on which input, for the router's guard of that name."""


def run_probe(options: ProbeOptions, config: Config, common: Common, command: str) -> ProbeReport:
    """Ask the queries, unless there are rollouts, and rows with known answers where some are wanted; look at what was found.

    Raises ConfigError, DmoaError as `dmoa rollouts` does.
    """
    from dmoa.workflows.evaluate import opened_ray

    known = options.known_answers or ()
    allowed = [name for name in SUITES if name not in STAGED]
    unknown = [name for name in known if name not in allowed]
    if unknown:
        raise ConfigError(
            f"--known-answers: {', '.join(unknown)} not known; name some of {', '.join(allowed)}, the generated suites "
            f"whose answers are computed{did_you_mean(unknown, allowed)}"
        )
    out = options.out or Path("out") / time.strftime("probe-%Y%m%d-%H%M%S")
    collect = partial(_collect, config=config, common=common, options=options, command=command)
    if options.rollouts is not None:
        return _look(options.rollouts, out, config, common, options, collect)
    queries = options.queries or (None if options.benchmarks else _recorded_place(config))
    benchmarks = options.benchmarks or ("" if queries else DEFAULT_SUITES)
    sources = {"queries": queries or (), "benchmarks": benchmarks, "data_dir": options.data_dir}
    with goes_on(f"the same command with --out {out} goes on from here"), opened_ray(options.address):
        collect({**sources, "limit": options.limit}, out / "dense")
        return _look(out / "dense", out, config, common, options, collect)


def _recorded_place(config: Config) -> str | None:
    """Return where the replies of a recorded pool lie, whose queries are then asked; None for any other pool."""
    recorded = [llm.options for llm in config.llms.values() if isinstance(llm.options, RecordedOptions)]
    return recorded[0].replies if recorded else None


def _look(
    folder: Path,
    out: Path,
    config: Config,
    common: Common,
    options: ProbeOptions,
    collect: Callable[[dict[str, Any], Path], None],
) -> ProbeReport:
    """Look at rollouts that are there, and at rows with known answers, judged, where some are wanted."""
    from dmoa.training.rollouts import read_table

    sample = _unlabelled_sample(folder, config, options.outcomes)
    if not options.known_answers:
        return probe_pool(sample, seed=options.seed)
    common.say("uses probe labels: generated rows with computed answers")
    labels = out / "known-labels"
    collect({"benchmarks": options.known_answers, "limit": options.known_limit, "labels": labels}, out / "known")
    table = read_table(out / "known")
    judged = _judged(table, labels)
    write_whole(out / KNOWN_ANSWERS, known_answers(table, judged, config.gate.preset))
    known = sample_of(table, config.agent_names, config.gate.preset, judged)
    return probe_pool(sample, known=known, seed=options.seed)


def probe_rollouts(folder: Path, config: Config, *, seed: int = 0) -> ProbeReport:
    """Look at dense rollouts of a pool. Raises ConfigError for those of another pool, or too few."""
    return probe_pool(_unlabelled_sample(folder, config), seed=seed)


def _unlabelled_sample(folder: Path, config: Config, outcomes: Path | None = None) -> ProbeSample:
    from dmoa.agents.pool import fingerprint
    from dmoa.training.outcomes import credit_replies, no_outcome_fits, read_outcomes
    from dmoa.training.rollouts import check_rollout_pool, read_manifest, read_table

    manifest = read_manifest(folder)
    check_rollout_pool(manifest, fingerprint=fingerprint(config), agents=config.agent_names)
    table, credit = read_table(folder), None
    if outcomes is not None:
        given = read_outcomes(outcomes)
        found = credit_replies(given, table, seed=manifest.seed, round_=manifest.round)
        if not found.used:
            raise no_outcome_fits(len(given))
        credit = found.credit
    prices = {agent.name: Price(**price.model_dump()) for agent in config.agents if (price := config.llms[agent.llm].price)}
    return sample_of(
        table, config.agent_names, manifest.preset, outcomes=credit, prices=prices, agent_price=config.gate.agent_price
    )


def _judged(table: pa.Table, labels: Path) -> dict[tuple[str, str], float]:
    """Return the score of every reply to the first step, by query and agent."""
    from dmoa.evaluation.records import Reply
    from dmoa.workflows.collect import read_labels

    label_of = {label.row_id: label for label in read_labels(labels)}
    rows = table.select(("query_id", "step", "source", "agent", "text")).to_pylist()
    return {
        (row["query_id"], row["agent"]): SUITES[row["source"]].score(label_of[row["query_id"]], Reply(text=row["text"])).value
        for row in rows
        if row["step"] == 0
    }


def known_answers(table: pa.Table, judged: Mapping[tuple[str, str], float], preset: Preset) -> str:
    """Return the lines of a file for `router.guards.known_answers`: the gate's input to each question, and who is right."""
    rows = [row for row in table.select(("query_id", "step", "agent", "context", "feedback")).to_pylist() if row["step"] == 0]
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        given = row["context"] + (row["feedback"] if preset != "paper" else [])
        one = found.setdefault(row["query_id"], {"input": [round(value, 7) for value in given], "right": {}})
        one["right"][row["agent"]] = judged[row["query_id"], row["agent"]]
    return "".join(json.dumps(one) + "\n" for one in found.values())


def _collect(sources: dict[str, Any], out: Path, *, config: Config, common: Common, options: ProbeOptions, command: str) -> None:
    from dmoa.training.options import RolloutOptions
    from dmoa.workflows.collect import run_rollouts

    shared = options.model_dump(include={"difficulty", "seed", "call_cache", "address"})
    fixed = {"out": out, "dense": True, "max_steps": 1, "track": "none"}
    run_rollouts(RolloutOptions.parse({**shared, **sources, **fixed}), config, common, command)
