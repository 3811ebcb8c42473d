"""Benchmarks and generated suites by name: how each is judged, and what the names on a command line stand for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, SupportsFloat, TypeVar

from dmoa.errors import ConfigError, DmoaError, PluginError
from dmoa.evaluation.benchmarks.base import BENCHMARKS, VALUE, Benchmark, RowError, ScorerEntry
from dmoa.evaluation.records import Label, Reply, Score, Scorer
from dmoa.evaluation.suites.arith import ARITH, SHARED
from dmoa.evaluation.suites.calendar import CALENDAR
from dmoa.evaluation.suites.chain import CHAIN
from dmoa.evaluation.suites.relay import RELAY
from dmoa.evaluation.suites.suite import Suite
from dmoa.evaluation.suites.tables import DYES, PARCELS, SIGNALS
from dmoa.evaluation.suites.words import WORDS
from dmoa.plugins import home_of
from dmoa.validation import did_you_mean, short

T = TypeVar("T")
_LOG = logging.getLogger("dmoa.evaluation")


def spec_of(name: str) -> Benchmark:
    """Return the benchmark of this name. Raises ConfigError where there is none."""
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark {name!r} is not known; take one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def build_scorer(name: str, *, allow_weak_sandbox: bool = False) -> ScorerEntry:
    """Return the scoring of a benchmark.

    `allow_weak_sandbox`: run programs even below the sandbox's stated level; else scorers raise SandboxError there. Raises
    ConfigError, and PluginError for one of somebody's own whose scoring cannot be had; so do its functions, where they fail.
    """
    found = run_own(name, "scoring", spec_of(name).scoring, allow_weak_sandbox)
    if not isinstance(found, ScorerEntry) or not isinstance(found.primary, str) or not isinstance(found.deviation, str):
        raise _mistake(name, f"its scoring is {short(found)}; expected a ScorerEntry, primary and deviation of it texts")
    return replace(
        found,
        score=_checked(name, found),
        gold_replies=partial(
            _own, name, "gold_replies", found.gold_replies, _are_replies, f"a text for {VALUE!r} and each measure"
        ),
        chance=partial(_own, name, "chance", found.chance, _is_chance, "a number from 0 to 1"),
        answer_key=partial(_own, name, "answer_key", found.answer_key, _is_key, "what a dictionary takes as a key"),
    )


def _own(name: str, what: str, work: Callable[..., T], is_right: Callable[[object], bool], expected: str, *args: Any) -> T:
    """Do as `run_own`. Raises PluginError also for a result of another kind."""
    found = run_own(name, what, work, *args)
    if not is_right(found):
        raise _mistake(name, f"{what} gave {short(found)}; expected {expected}")
    return found


def _are_replies(found: object) -> bool:
    return isinstance(found, dict) and VALUE in found and all(isinstance(text, str) for pair in found.items() for text in pair)


def _is_share(found: object) -> bool:
    return isinstance(found, SupportsFloat) and 0.0 <= float(found) <= 1.0


def _is_chance(found: object) -> bool:
    return found is None or _is_share(found)


def _is_key(found: object) -> bool:
    return isinstance(found, Hashable)


def run_own(name: str, what: str, work: Callable[..., T], *args: Any) -> T:
    """Return what a benchmark's own code makes of the arguments. Raises PluginError where that of somebody's own fails."""
    try:
        return work(*args)
    except (DmoaError, RowError):
        raise
    except Exception as error:  # code of others
        if name in BENCHMARKS.builtin:
            raise
        _LOG.info("benchmark %s: %s failed", name, what, exc_info=error)
        raise _mistake(name, f"{what} raised {error!r}; mend it, -v shows where") from error


def _mistake(name: str, text: str) -> PluginError:
    file = BENCHMARKS.references([name]) or (home_of(BENCHMARKS[name].scoring),)
    return PluginError(f"benchmark {name!r} ({file[0]}): {text}")


def _checked(name: str, entry: ScorerEntry) -> Callable[[Label, Reply], Score]:
    """Refuse labels of other benchmarks, whose keys may agree and whose rules do not, and what is no score."""

    def score(label: Label, reply: Reply) -> Score:
        if label.benchmark != name:
            raise ConfigError(f"label {label.row_id} is of benchmark {label.benchmark!r}, the scorer of {name!r}; use its own")
        found = run_own(name, f"the scorer, of {label.row_id},", entry.score, label, reply)
        if not _is_score(found):
            expected = "a Score with a value from 0 to 1, finite metrics, reason a text, extracted a text or None"
            raise _mistake(name, f"the scorer gave {label.row_id} {short(found)}; expected {expected}")
        return found

    return score


def _is_score(found: object) -> bool:
    if (
        not isinstance(found, Score)
        or not _is_share(found.value)
        or any(x not in (0, 1) for x in (found.is_scored, found.is_left_out))
    ):
        return False
    is_text = isinstance(found.reason, str) and isinstance(found.extracted, str | None)
    is_measured = isinstance(found.metrics, dict) and all(
        isinstance(x, str) and isinstance(y, SupportsFloat) for x, y in found.metrics.items()
    )
    return is_text and is_measured and all(math.isfinite(figure) for figure in found.metrics.values())


SKILLS = (ARITH, WORDS, CALENDAR, PARCELS, SIGNALS, DYES)
"""The suites that one specialist each of the pool `specialists` has been taught."""

SUITES: dict[str, Suite] = {suite.name: suite for suite in (*SKILLS, SHARED, CHAIN, RELAY)}
"""In the order of tables."""

STAGED = (CHAIN.name, RELAY.name)
"""The suites whose queries have stages."""


ALL, ALL_SUITES = "all", "suites"


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
    entry = build_scorer(name, allow_weak_sandbox=allow_weak_sandbox)
    return Judging(
        title=spec_of(name).title,
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
    files: tuple[str, ...] = ()
    """Benchmarks among them as `FILE.py:NAME`, with paths that this process finds too."""

    def __call__(self) -> dict[str, Scorer]:
        """Return the scorers by benchmark."""
        BENCHMARKS.resolve(self.files, "--benchmarks")
        return {name: judging(name, allow_weak_sandbox=self.allow_weak_sandbox).score for name in self.names}


def expand_names(names: Sequence[str], option: str = "--benchmarks") -> tuple[str, ...]:
    """Return benchmark names with `all` (the nine that the hub has), `suites` and each `FILE.py:NAME` replaced.

    Raises ConfigError for unknown ones, and for a file that cannot be loaded.
    """
    found: list[str] = []
    resolved = BENCHMARKS.resolve(names, option)
    taken = [name for name in resolved if name in BENCHMARKS and name in (*SUITES, ALL, ALL_SUITES)]
    if taken:
        raise ConfigError(f"{option}: @benchmark({taken[0]!r}): dmoa's own generated rows have that name; choose another")
    for name in resolved:
        on_hub = (known for known in BENCHMARKS.builtin if BENCHMARKS[known].hub is not None)
        found.extend(on_hub if name == ALL else SUITES if name == ALL_SUITES else (name,))
    unknown = [name for name in found if name not in BENCHMARKS and name not in SUITES]
    if unknown or not found:
        allowed = (*BENCHMARKS, *SUITES, ALL, ALL_SUITES)
        seen = ", ".join(unknown) or "an empty name"
        raise ConfigError(
            f"{option}: {seen} not known; name some of {', '.join(allowed)}, separated by commas{did_you_mean(unknown, allowed)}"
        )
    return tuple(dict.fromkeys(found))
