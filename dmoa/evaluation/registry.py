"""Every benchmark and suite by name: how its replies are judged, and what is to be said beside its figures.

The one place where the nine benchmarks and the suites look the same; the pipeline, the tables and the command line ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.specs import BENCHMARKS
from dmoa.evaluation.records import Label, Scorer
from dmoa.evaluation.scorers.table import build
from dmoa.evaluation.suites.table import SUITES
from dmoa.validation import did_you_mean

ALL, ALL_SUITES = "all", "suites"
_TITLES = {
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "multiarith": "MultiArith",
    "svamp": "SVAMP",
    "aqua_rat": "AQuA",
    "humaneval": "HumanEval",
    "ds1000": "DS-1000",
    "hotpotqa": "HotpotQA (distractor)",
    "ddxplus": "DDXPlus",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """How one benchmark is judged, and what every table says of it."""

    title: str
    is_generated: bool
    score: Scorer
    primary: str
    """What accuracy means, such as `exact match`."""
    summary: str = ""
    """One line on generated rows: what they are, how many there are, and the chance level."""
    deviation: str
    """How this differs from the benchmark's original protocol; empty where it does not."""
    chance: Callable[[Sequence[Label]], float]
    """Accuracy, 0..1, of guessing: a choice where there are some, else another row's right answer; suites: see `Suite.chance`."""
    runs_programs: bool
    """Whether judging runs model-written programs in the sandbox."""


def judging(name: str, *, difficulty: int = 1, allow_weak_sandbox: bool = False) -> Judging:
    """Return how a benchmark or suite is judged. Raises ConfigError for an unknown name."""
    if name in SUITES:
        suite = SUITES[name]
        return Judging(
            title=suite.title,
            is_generated=True,
            score=suite.score,
            primary="exact match of the final answer",
            summary=suite.describe(difficulty),
            deviation="",
            chance=lambda labels: suite.chance(difficulty),
            runs_programs=False,
        )
    entry = build(name, allow_weak_sandbox=allow_weak_sandbox)
    return Judging(
        title=_TITLES[name],
        is_generated=False,
        score=entry.score,
        primary=entry.primary,
        deviation=entry.deviation,
        chance=entry.chance,
        runs_programs=entry.runs_programs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenScorers:
    """Builds the scorers of some benchmarks in the process that calls it; pickles."""

    names: tuple[str, ...]
    allow_weak_sandbox: bool = False

    def __call__(self) -> dict[str, Scorer]:
        """Return the scorers by benchmark."""
        return {name: judging(name, allow_weak_sandbox=self.allow_weak_sandbox).score for name in self.names}


def expand_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return benchmark names with `all` and `suites` replaced by what they stand for. Raises ConfigError for unknown ones."""
    found: list[str] = []
    for name in names:
        found.extend(BENCHMARKS if name == ALL else SUITES if name == ALL_SUITES else (name,))
    unknown = [name for name in found if name not in BENCHMARKS and name not in SUITES]
    if unknown or not found:
        allowed = (*BENCHMARKS, *SUITES, ALL, ALL_SUITES)
        seen = ", ".join(unknown) or "nothing"
        raise ConfigError(
            f"--benchmarks: value seen: {seen}; allowed: {', '.join(allowed)}; name some of them, separated by commas"
            f"{did_you_mean(unknown, allowed)}"
        )
    return tuple(dict.fromkeys(found))
