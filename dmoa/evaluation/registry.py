"""Every benchmark and suite by name: how rows are read and split, and how replies are scored.

Where upstream has no rows for a split, a file is divided by the hash of each row's family: 60 % train, 40 % adaptation.
A family is one row, or the rows that must stay together (equal questions of MultiArith, one body of SVAMP, variations of
one DS-1000 problem). HotpotQA's and DDXPlus's validation rows are the test slice, AQuA's validation rows the adaptation slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks import choices as letters
from dmoa.evaluation.benchmarks import ddxplus, ds1000, hotpotqa, humaneval
from dmoa.evaluation.benchmarks import word_problems as numbers
from dmoa.evaluation.benchmarks.base import RowSpec, ScorerEntry, Slice, UpstreamRow, model_parser
from dmoa.evaluation.benchmarks.choices import AquaRow, MmluRow
from dmoa.evaluation.benchmarks.ds1000 import Ds1000Row
from dmoa.evaluation.benchmarks.hotpotqa import HotpotRow
from dmoa.evaluation.benchmarks.humaneval import HumanEvalRow
from dmoa.evaluation.benchmarks.word_problems import Gsm8kRow, MultiArithRow, SvampRow
from dmoa.evaluation.records import Label, Reply, Score, Scorer, Split
from dmoa.evaluation.suites.arith import ARITH, SHARED
from dmoa.evaluation.suites.calendar import CALENDAR
from dmoa.evaluation.suites.chain import CHAIN
from dmoa.evaluation.suites.relay import RELAY
from dmoa.evaluation.suites.suite import Suite
from dmoa.evaluation.suites.words import WORDS
from dmoa.validation import did_you_mean

TRAIN_SHARE = 0.6


def _divided(test_file: str) -> dict[Split, Slice]:
    return {
        "train": Slice(file="train", high=TRAIN_SHARE),
        "adaptation": Slice(file="train", low=TRAIN_SHARE),
        "test": Slice(file=test_file),
    }


def _own(train: str, adaptation: str, test: str) -> dict[Split, Slice]:
    return {"train": Slice(file=train), "adaptation": Slice(file=adaptation), "test": Slice(file=test)}


def _plain(name: str, model: type[UpstreamRow], slices: Mapping[Split, Slice]) -> RowSpec:
    return RowSpec(name=name, parse=model_parser(model), slices=slices)


_SPECS = (
    _plain("mmlu", MmluRow, _own("dev", "validation", "test")),
    _plain("gsm8k", Gsm8kRow, _divided("test")),
    _plain("multiarith", MultiArithRow, _divided("test")),
    _plain("svamp", SvampRow, _divided("test")),
    _plain("aqua_rat", AquaRow, _own("train", "validation", "test")),
    _plain("humaneval", HumanEvalRow, _divided("test")),
    _plain("ds1000", Ds1000Row, _divided("test")),
    _plain("hotpotqa", HotpotRow, _divided("validation")),
    RowSpec(
        name="ddxplus",
        parse=ddxplus.parse_patient,
        slices=_divided("validation"),
        definitions=(ddxplus.EVIDENCES_FILE, ddxplus.CONDITIONS_FILE),
        read_definitions=ddxplus.read_definitions,
    ),
)
BENCHMARKS: dict[str, RowSpec] = {spec.name: spec for spec in _SPECS}


def spec_of(name: str) -> RowSpec:
    """The benchmark of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark {name!r} is not known; take one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


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


def build_scorer(name: str, *, allow_weak_sandbox: bool = False) -> ScorerEntry:
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


SUITES: dict[str, Suite] = {suite.name: suite for suite in (ARITH, WORDS, CALENDAR, SHARED, CHAIN, RELAY)}
"""In the order of tables."""


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
    entry = build_scorer(name, allow_weak_sandbox=allow_weak_sandbox)
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
