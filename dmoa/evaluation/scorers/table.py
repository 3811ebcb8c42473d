"""The table of scorers: benchmark name -> how its replies are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dmoa.errors import ConfigError
from dmoa.evaluation.records import Label, Reply, Score
from dmoa.evaluation.scorers import ddxplus, hotpotqa, letters, numbers
from dmoa.evaluation.scorers.entry import ScorerEntry

_TEXT: dict[str, Callable[[], ScorerEntry]] = {
    "mmlu": lambda: letters.entry("a generated letter, zero-shot, in place of 5-shot next-token probabilities"),
    "gsm8k": numbers.entry,
    "multiarith": numbers.entry,
    "svamp": numbers.entry,
    "aqua_rat": lambda: letters.entry(""),
    "hotpotqa": lambda: hotpotqa.entry("answer only, no supporting facts"),
    "ddxplus": lambda: ddxplus.entry("top-1 of 49 given names, all evidences shown, no dialogue"),
}
NAMES: tuple[str, ...] = ("mmlu", "gsm8k", "multiarith", "svamp", "aqua_rat", "humaneval", "ds1000", "hotpotqa", "ddxplus")


def build(name: str, *, allow_weak_sandbox: bool = False) -> ScorerEntry:
    """Return the scoring of a benchmark.

    Args:
        allow_weak_sandbox: run programs even where the host's isolation falls below the sandbox's stated level.

    Raises:
        ConfigError: no such benchmark.
    """
    if name in _TEXT:
        found = _TEXT[name]()
    else:
        raise ConfigError(f"no scorer for benchmark {name!r}; there is: {', '.join(NAMES)}")
    return replace(found, score=_checked(name, found))


def _checked(name: str, entry: ScorerEntry) -> Callable[[Label, Reply], Score]:
    """Refuse labels of other benchmarks: their keys may agree and their rules do not."""

    def score(label: Label, reply: Reply) -> Score:
        if label.benchmark != name:
            raise ConfigError(f"label {label.row_id} is of benchmark {label.benchmark!r}, the scorer of {name!r}; use its own")
        return entry.score(label, reply)

    return score
