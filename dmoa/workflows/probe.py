"""Puts a probe together: dense rollouts of the queries, and of rows with known answers, judged; then the statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoa.config import Config
from dmoa.errors import ConfigError
from dmoa.evaluation.registry import SUITES
from dmoa.training.cluster_router import ProbeSample, sample_of
from dmoa.training.probe import ProbeReport, probe_pool
from dmoa.validation import did_you_mean
from dmoa.workflows.console import Common
from dmoa.workflows.terminal import goes_on

if TYPE_CHECKING:
    import pyarrow as pa


STAGED = ("chain", "relay")
Known = tuple[tuple[str, ...], int]
"""Suites, and how many rows of them in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """How the probe asks."""

    data_dir: Path | None
    difficulty: int
    seed: int
    out: Path
    call_cache: Path | None
    address: str | None
    command: str


def probe_queries(
    sources: Mapping[str, Any], limit: int, config: Config, common: Common, asked: ProbeSettings, known: Known | None
) -> ProbeReport:
    """Ask the queries, then look at the rollouts. Raises ConfigError, DmoaError as `dmoa rollouts` does."""
    from dmoa.workflows.evaluate import opened_ray

    if known is not None:
        _check_suites(known[0])
    folder = asked.out / "dense"
    with goes_on(f"the same command with --out {asked.out} goes on from here"), opened_ray(asked.address):
        _collect({**sources, "limit": limit}, folder, config, common, asked)
        return collect_probe(folder, config, common, asked, known)


def collect_probe(folder: Path, config: Config, common: Common, asked: ProbeSettings, known: Known | None) -> ProbeReport:
    """Look at rollouts that are there, and at rows with known answers where some are wanted. Raises ConfigError."""
    if known is None:
        return probe_rollouts(folder, config, seed=asked.seed)
    _check_suites(known[0])
    sample = _unlabelled_sample(folder, config)
    return probe_pool(sample, known=_known_sample(known, config, common, asked), seed=asked.seed)


def probe_rollouts(folder: Path, config: Config, *, seed: int = 0) -> ProbeReport:
    """Look at dense rollouts of a pool. Raises ConfigError for those of another pool, or too few."""
    return probe_pool(_unlabelled_sample(folder, config), seed=seed)


def _unlabelled_sample(folder: Path, config: Config) -> ProbeSample:
    from dmoa.agents.pool import fingerprint
    from dmoa.training.rollouts import check_rollout_pool, read_manifest, read_table

    manifest = read_manifest(folder)
    check_rollout_pool(manifest, fingerprint=fingerprint(config), agents=config.agent_names)
    return sample_of(read_table(folder), config.agent_names, manifest.preset)


def _check_suites(names: tuple[str, ...]) -> None:
    allowed = [name for name in SUITES if name not in STAGED]
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ConfigError(
            f"--known-answers: value seen: {', '.join(unknown)}; allowed: {', '.join(allowed)}, generated suites whose answers "
            f"are computed; name some of them{did_you_mean(unknown, allowed)}"
        )


def _known_sample(known: Known, config: Config, common: Common, asked: ProbeSettings) -> ProbeSample:
    """Ask rows of suites and judge every reply."""
    from dmoa.training.rollouts import read_table

    folder, labels = asked.out / "known", asked.out / "known-labels"
    common.say("uses probe labels: generated rows with computed answers")
    sources = {"benchmarks": ",".join(known[0]), "limit": known[1], "labels": labels}
    _collect(sources, folder, config, common, replace(asked, data_dir=None))
    table = read_table(folder)
    return sample_of(table, config.agent_names, config.gate.preset, _judged(table, labels))


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


def _collect(sources: Mapping[str, Any], out: Path, config: Config, common: Common, asked: ProbeSettings) -> None:
    from dmoa.training.options import parse_rollout_options
    from dmoa.workflows.collect import run_rollouts

    options = parse_rollout_options(
        {
            **sources,
            "out": out,
            "dense": True,
            "max_steps": 1,
            "data_dir": asked.data_dir,
            "difficulty": asked.difficulty,
            "seed": asked.seed,
            "call_cache": asked.call_cache,
            "address": asked.address,
            "track": "none",
        }
    )
    run_rollouts(options, config, common, asked.command)
