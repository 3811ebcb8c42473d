"""The table of scorers: benchmark name -> how its replies are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dmoa.errors import ConfigError
from dmoa.evaluation.records import Label, Reply, Score
from dmoa.evaluation.scorers import ddxplus, ds1000, hotpotqa, humaneval, letters, numbers
from dmoa.evaluation.scorers.entry import ScorerEntry

_ENTRIES: dict[str, Callable[[bool], ScorerEntry]] = {
    "mmlu": lambda _: letters.entry("a generated letter, zero-shot, in place of 5-shot next-token probabilities"),
    "gsm8k": lambda _: numbers.entry(),
    "multiarith": lambda _: numbers.entry(),
    "svamp": lambda _: numbers.entry(),
    "aqua_rat": lambda _: letters.entry(""),
    "humaneval": lambda allow_weak: humaneval.entry(allow_weak_sandbox=allow_weak),
    "ds1000": lambda allow_weak: ds1000.entry(allow_weak_sandbox=allow_weak),
    "hotpotqa": lambda _: hotpotqa.entry("answer only, no supporting facts"),
    "ddxplus": lambda _: ddxplus.entry("top-1 of 49 given names, all evidences shown, no dialogue"),
}


def build(name: str, *, allow_weak_sandbox: bool = False) -> ScorerEntry:
    """Return the scoring of a benchmark.

    Args:
        allow_weak_sandbox: run programs even where the host's isolation falls below the sandbox's stated level. Without it
            the scorers that run programs raise SandboxError there; `programs.require_sandbox` tells beforehand.

    Raises:
        ConfigError: no such benchmark.
    """
    if name not in _ENTRIES:
        raise ConfigError(f"no scorer for benchmark {name!r}; there is: {', '.join(_ENTRIES)}")
    found = _ENTRIES[name](allow_weak_sandbox)
    return replace(found, score=_checked(name, found))


def _checked(name: str, entry: ScorerEntry) -> Callable[[Label, Reply], Score]:
    """Refuse labels of other benchmarks: their keys may agree and their rules do not."""

    def score(label: Label, reply: Reply) -> Score:
        if label.benchmark != name:
            raise ConfigError(f"label {label.row_id} is of benchmark {label.benchmark!r}, the scorer of {name!r}; use its own")
        return entry.score(label, reply)

    return score
