"""What all benchmarks share: checked fields of upstream rows, a hash and a place in the splits, and the scorer's record.

A line of a file becomes a `dict`, `Benchmark.parse` turns it into a `ParsedRow` (pure: no disk, no network) or raises
`RowError`, and `evaluation/data` gives it an id and makes it a `Row`. Each benchmark's module defines its upstream fields, its
prompt, its label, its scorer and where its splits come from, in one `Benchmark`.

Where upstream has no rows for a split, a file is divided by the hash of each row's family: 60 % train, 40 % adaptation.
A family is one row, or the rows that must stay together (equal questions of MultiArith, one body of SVAMP, variations of
one DS-1000 problem). HotpotQA's and DDXPlus's validation rows are the test slice, AQuA's validation rows the adaptation slice.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from dmoa.errors import ConfigError
from dmoa.evaluation.records import SPLITS, Label, Score, Scorer, Split
from dmoa.plugins import Registry
from dmoa.validation import findings, short


class RowError(ValueError):
    """A row is not what its benchmark's rows are; says which field, what was seen and what was expected."""

    def __init__(self, field: str, seen: str, expected: str) -> None:
        super().__init__(f"field `{field}`: saw {seen}; expected {expected}")
        self.field = field


def shown_field(value: object, max_chars: int = 100) -> str:
    """The value as text that fits into a message."""
    text = repr(value)
    return text if len(text) <= max_chars else f"{text[:max_chars]}... ({len(text)} characters)"


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a text that is not blank")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]
"""A text that is not blank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRow:
    """A row before it has an id."""

    text: str
    """What agents are asked."""
    gold: dict[str, Any]
    """The label; plain JSON values."""
    content: dict[str, Any]
    """What the row hash covers: every upstream field, the label's included, without mere identifiers."""
    group: str = ""
    """What tables break results down by."""
    family: str = ""
    """Rows of one family never lie in two parts of one file; empty: the row is a family of its own."""


class UpstreamFields(BaseModel):
    """Base of what is read from files: fields carry upstream's names and are checked without coercion; others are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class UpstreamRow(UpstreamFields, ABC):
    """A row that is understood without definitions."""

    identifiers: ClassVar[dict[str, Any]] = {}
    """Fields that only name the row: left out of the hash, so that one row under two names is still one row."""

    @abstractmethod
    def text(self) -> str:
        """The task description, the answer format (once) and the question."""

    @abstractmethod
    def gold(self) -> dict[str, Any]:
        """The label."""

    def group(self) -> str:
        """What tables break results down by; empty where there is nothing."""
        return ""

    def family(self) -> str:
        """The key of rows that belong together; empty where a row stands alone."""
        return ""


FieldsT = TypeVar("FieldsT", bound=UpstreamFields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of one upstream file: the families whose fraction lies in [low, high)."""

    file: str
    """Name without its ending, such as `train`; on the hub, the split."""
    low: float = 0.0
    high: float = 1.0

    def holds(self, fraction: float) -> bool:
        """Whether a family of this fraction (0..1) lies in this part."""
        return self.low <= fraction < self.high


TRAIN_SHARE = 0.6


def divided(test_file: str) -> dict[Split, Slice]:
    """The splits of a benchmark with a file of test rows, and one, `train`, which is divided for the other two splits."""
    return {
        "train": Slice(file="train", high=TRAIN_SHARE),
        "adaptation": Slice(file="train", low=TRAIN_SHARE),
        "test": Slice(file=test_file),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """Where the Hugging Face hub keeps a benchmark."""

    dataset: str
    """Repository of the data set."""
    revision: str
    """Commit of that repository."""
    config: str | None = None
    """Configuration of the data set; None: its only one."""
    slices: Mapping[Split, Slice] | None = None
    """Which hub split each split comes from; None: the hub's splits are named as the benchmark's files are."""
    max_rows: int | None = None
    """At most this many rows of a hub split, evenly spaced; None: all. For data sets that would not fit into memory."""


# Upstream has one split, `test`: a fifth of the families is set apart for training and adaptation.
FROM_TEST: dict[Split, Slice] = {
    "train": Slice(file="test", high=0.12),
    "adaptation": Slice(file="test", low=0.12, high=0.2),
    "test": Slice(file="test", low=0.2),
}


def model_parser(model: type[UpstreamRow]) -> Callable[[Mapping[str, Any], Any], ParsedRow]:
    """The `parse` of a benchmark whose rows need no definitions."""

    def parse(fields: Mapping[str, Any], _definitions: Any) -> ParsedRow:
        row = validate(model, fields)
        content = row.model_dump(exclude=row.identifiers)
        gold, texts = row.gold(), {"text": row.text(), "group": row.group(), "family": row.family()}
        for name, seen, kind, allowed in (
            *((*told, str, "a text") for told in texts.items()),
            ("gold", gold, Mapping, "a mapping"),
        ):
            if not isinstance(seen, kind):
                raise TypeError(f"{name}() gave {short(seen)}; expected {allowed}")
        return ParsedRow(gold=gold, content=content, **texts)

    return parse


def validate(model: type[FieldsT], fields: Mapping[str, Any]) -> FieldsT:
    """Return the row as a checked record. Raises RowError for the first field that is missing or is not what it should be."""
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        first = findings(error)[0]
        name = ".".join(str(part) for part in first["loc"]) or "(whole row)"
        if first["type"] == "missing":
            present = shown_field(sorted(map(str, first["input"])))
            raise RowError(name, f"nothing; there are {present}", "this field") from None
        expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise RowError(name, shown_field(first["input"]), expected) from None


def normalise(value: Any) -> Any:
    """The value with every text in NFC, surrounding white space removed and inner white space collapsed to one blank."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, (list, tuple)):
        return [normalise(inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): normalise(inner) for key, inner in value.items()}
    return value


def hash_content(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 hex of normalised content as JSON with sorted keys. Raises RowError for a lone surrogate."""
    text = json.dumps(normalise(content), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise RowError(
            "(whole row)", shown_field(text[error.start : error.end]), "valid Unicode text, no lone surrogates"
        ) from None


def fraction_of(family: str) -> float:
    """A number in [0, 1) that depends on nothing but the family's key: what divides a file among splits. Source: ours."""
    return int.from_bytes(hashlib.sha256(" ".join(family.split()).encode()).digest()[:6], "big") / 2**48


VALUE = "value"
"""The measure that accuracy is the mean of, beside the names of the secondary metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerEntry:
    """One benchmark's scoring."""

    score: Scorer
    gold_replies: Callable[[Label], dict[str, str]]
    """Measure (`value`, or a secondary metric) -> a reply that must reach 1.0 in it."""
    primary: str
    """What accuracy means here, such as `exact match`."""
    metrics: tuple[str, ...] = ()
    """Names of the secondary metrics; every score has exactly these."""
    chance: Callable[[Sequence[Label]], float]
    """Accuracy, 0..1, to expect of guessing: one of the choices where they are given, else another row's right answer."""
    answer_key: Callable[[Label], Hashable]
    """Rows of the same key have the same right answer."""
    deviation: str
    """How this differs from the benchmark's original protocol; empty where it does not. Every table says it."""
    runs_programs: bool = False
    """Whether scoring runs a program in the sandbox, which takes seconds a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark: how its rows are read, asked and judged, where they come from, and what tables call it."""

    name: str
    """Canonical name; also its folder under `--data-dir`."""
    title: str
    """Its name in tables."""
    parse: Callable[[Mapping[str, Any], Any], ParsedRow]
    """Pure function of a decoded row and of what `read_definitions` returned; raises RowError."""
    slices: Mapping[Split, Slice]
    """Where the rows of each split come from."""
    scoring: Callable[[bool], ScorerEntry]
    """Returns the scoring; true: programs may run where the host's isolation falls below the sandbox's stated level."""
    hub: HubSource | None = None
    """None: its rows are in files only."""
    definitions: tuple[str, ...] = ()
    """Files beside the rows that give their codes a meaning."""
    read_definitions: Callable[[Mapping[str, Path]], Any] = field(default=lambda _paths: None)
    """Reads those files, by name; raises ConfigError."""


_HERE = "dmoa.evaluation.benchmarks"
BENCHMARKS: Registry[Benchmark] = Registry(
    Benchmark,
    what="benchmark",
    group="dmoa.benchmarks",
    builtin={
        "mmlu": f"{_HERE}.choices:MmluRow",
        "gsm8k": f"{_HERE}.word_problems:Gsm8kRow",
        "multiarith": f"{_HERE}.word_problems:MultiArithRow",
        "svamp": f"{_HERE}.word_problems:SvampRow",
        "aqua_rat": f"{_HERE}.choices:AquaRow",
        "humaneval": f"{_HERE}.humaneval:HumanEvalRow",
        "ds1000": f"{_HERE}.ds1000:Ds1000Row",
        "hotpotqa": f"{_HERE}.hotpotqa:HotpotRow",
        "ddxplus": f"{_HERE}.ddxplus:DDXPLUS",
        "cruxeval_o": f"{_HERE}.cruxeval:CruxevalRow",
        "math": f"{_HERE}.competition_math:MathRow",
    },
)
RowT = TypeVar("RowT", bound=type[UpstreamRow])


def benchmark(
    name: str,
    *,
    title: str,
    scoring: Callable[[bool], ScorerEntry],
    slices: Mapping[Split, Slice] | None = None,
    hub: HubSource | None = None,
) -> Callable[[RowT], RowT]:
    """Enter a benchmark over the class of its rows. `slices` None: rows in `test.jsonl`, and in `train.jsonl` if there is one."""
    parts = slices or divided("test")
    if set(parts) != set(SPLITS):
        raise ConfigError(f"@benchmark({name!r}): slices has {', '.join(parts)}; give exactly {', '.join(SPLITS)}")

    def enter(row: RowT) -> RowT:
        found = Benchmark(name=name, title=title, parse=model_parser(row), slices=parts, scoring=scoring, hub=hub)
        return BENCHMARKS.add(found, row)

    return enter


def gold_of(label: Label, *keys: str) -> tuple[Any, ...]:
    """Return the named gold values. Raises ConfigError where one is missing, so that the label is not this benchmark's."""
    missing = [key for key in keys if key not in label.gold]
    if missing:
        raise ConfigError(
            f"label {label.row_id}: gold has the keys {sorted(label.gold)}, and not {missing}, which scoring "
            f"{label.benchmark!r} needs; load the rows again"
        )
    return tuple(label.gold[key] for key in keys)


def unscored(reason: str, metrics: Iterable[str] = (), *, is_left_out: bool = False) -> Score:
    """Return the score of a reply that could not be judged: 0 in everything, and not scored."""
    return Score(value=0.0, reason=reason, is_scored=False, is_left_out=is_left_out, metrics=dict.fromkeys(metrics, 0.0))


def chance_of(keys: Sequence[Hashable]) -> float:
    """Return how often another row's right answer is right as well: the share of equal keys among all pairs of rows."""
    pairs = len(keys) * (len(keys) - 1)
    return sum(count * (count - 1) for count in Counter(keys).values()) / pairs if pairs else 0.0
