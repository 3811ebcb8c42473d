"""DDXPlus: name the condition, and the differential, from a patient's coded answers turned into text; scored on both.

Codes (`E_91`, `E_54_@_V_161`) get their meaning from the release's `release_evidences.json`, condition names are those
of `release_conditions.json`; rows and definitions must be of one release. Label: `pathology`, `differential` (pairs of
name and probability), `conditions` (all names, in the order of the definitions).
"""

from __future__ import annotations

import ast
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from dmoa.core.answers import Reading, is_refusal, last_line, open_reply
from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.base import (
    VALUE,
    Benchmark,
    HubSource,
    ParsedRow,
    RowError,
    ScorerEntry,
    Text,
    UpstreamFields,
    divided,
    gold_of,
    shown_field,
    unscored,
    validate,
)
from dmoa.evaluation.records import Label, Reply, Score
from dmoa.reading import read_bounded, read_json
from dmoa.validation import findings

EVIDENCES_FILE = "release_evidences.json"
CONDITIONS_FILE = "release_conditions.json"
MAX_LITERAL_CHARS = 100_000
_SAME_RELEASE = "rows and definitions must be of one release, French or English"
_WORDS = {"N": "no", "Y": "yes"}


class EvidenceDefinition(UpstreamFields):
    """One question of the interview."""

    question_en: Text
    is_antecedent: bool
    data_type: Literal["B", "C", "M"]
    """Binary, categorical, or several values at once."""
    default_value: int | str
    """What holds where the row does not list the question."""
    possible_values: list[int | str] = Field(alias="possible-values")
    value_meaning: dict[str, dict[str, str]]

    def answer(self, value: str) -> str:
        """The value in words, or on its scale; empty where it says that the question does not apply."""
        if self.data_type == "B":
            return "yes"
        if value in self.value_meaning:
            meaning = self.value_meaning[value]["en"]
            return "" if meaning == "NA" else _WORDS.get(meaning, meaning)
        numbers = [number for number in self.possible_values if isinstance(number, int)]
        return f"{value} on a scale of {min(numbers)} to {max(numbers)}" if numbers else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Definitions:
    """What a release's codes and names mean."""

    evidences: dict[str, EvidenceDefinition]
    conditions: list[str]


def read_definitions(paths: Mapping[str, Path]) -> Definitions:
    """Read the two definition files. Raises ConfigError for other forms, and for a name that no answer could tell apart."""
    conditions = list(_read_json(paths[CONDITIONS_FILE], dict[str, dict[str, Any]]))
    evidences = _read_json(paths[EVIDENCES_FILE], dict[str, EvidenceDefinition])
    for name in conditions:
        if not name.strip() or ";" in name or "\n" in name:
            raise ConfigError(f"{paths[CONDITIONS_FILE]}: condition {name!r} is blank or holds `;` or a line break")
    for code, evidence in evidences.items():
        unnamed = [meaning for meaning in evidence.value_meaning.values() if "en" not in meaning]
        if unnamed:
            raise ConfigError(f"{paths[EVIDENCES_FILE]}: evidence {code} has a value without English text: {unnamed[0]!r}")
    if not conditions:
        raise ConfigError(f"{paths[CONDITIONS_FILE]} holds no conditions; take the file of the DDXPlus release")
    return Definitions(evidences=evidences, conditions=conditions)


def _read_json(path: Path, form: Any) -> Any:
    try:
        return TypeAdapter(form).validate_python(read_json(read_bounded(path, most=1 << 26)))
    except ValidationError as error:
        first = findings(error)[0]
        where = ".".join(str(part) for part in first["loc"])
        seen = shown_field(first["input"])
        raise ConfigError(f"{path}, `{where}`: saw {seen}; {first['msg']}. Take the file of the DDXPlus release.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON in UTF-8: {error}. Take the file of the DDXPlus release.") from None


def _literal(value: object) -> object:
    # Upstream's CSV holds Python literals; a copy as JSON may hold real lists.
    if not isinstance(value, str):
        return value
    if len(value) > MAX_LITERAL_CHARS:
        raise ValueError(f"a Python list of at most {MAX_LITERAL_CHARS} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes inside the literal: what they mean is what counts
            return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("a Python list, such as ['E_91', 'E_54_@_V_161']") from None


def _pairs(value: object) -> object:
    value = _literal(value)
    return [tuple(pair) if isinstance(pair, list) else pair for pair in value] if isinstance(value, list) else value


Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class DdxRow(UpstreamFields):
    """A patient of the release, in either of its two languages."""

    AGE: Annotated[int, Field(ge=0, le=150)]
    DIFFERENTIAL_DIAGNOSIS: Annotated[list[tuple[str, Probability]], BeforeValidator(_pairs), Field(min_length=1)]
    SEX: Literal["F", "M"]
    PATHOLOGY: Text
    EVIDENCES: Annotated[list[str], BeforeValidator(_literal), Field(min_length=1)]
    INITIAL_EVIDENCE: Text


def parse_patient(fields: Mapping[str, Any], definitions: Definitions) -> ParsedRow:
    """Put a patient as a question. Raises RowError for a bad field, and what the definitions do not have."""
    row = validate(DdxRow, fields)
    _check_conditions(row, definitions)
    task = (
        "Diagnose the patient. End with a line `Diagnosis: NAME`, the likeliest condition, and a line "
        "`Differential: NAME; NAME; ...`, all that are possible, likeliest first, names from the list."
    )
    patient = f"Age: {row.AGE}\nSex: {'female' if row.SEX == 'F' else 'male'}"
    complaint = "".join(_answers([row.INITIAL_EVIDENCE], "INITIAL_EVIDENCE", definitions.evidences).values()) or "none"
    findings = _answers(row.EVIDENCES, "EVIDENCES", definitions.evidences)
    parts = [task, f"Conditions: {'; '.join(definitions.conditions)}", patient, f"Initial complaint: {complaint}"]
    for title, is_antecedent in (("Symptoms", False), ("Antecedents", True)):
        lines = [f"- {text}" for code, text in findings.items() if definitions.evidences[code].is_antecedent is is_antecedent]
        if lines:
            parts.append("\n".join([f"{title}:", *lines]))
    parts.append("Everything that is not listed is absent.")
    gold = {
        "pathology": row.PATHOLOGY,
        "differential": [[name, probability] for name, probability in row.DIFFERENTIAL_DIAGNOSIS],
        "conditions": definitions.conditions,
    }
    return ParsedRow(text="\n\n".join(parts), gold=gold, content=row.model_dump())


def _check_conditions(row: DdxRow, definitions: Definitions) -> None:
    known = f"one of the {len(definitions.conditions)} conditions of {CONDITIONS_FILE}; {_SAME_RELEASE}"
    if row.PATHOLOGY not in definitions.conditions:
        raise RowError("PATHOLOGY", shown_field(row.PATHOLOGY), known)
    for name, _probability in row.DIFFERENTIAL_DIAGNOSIS:
        if name not in definitions.conditions:
            raise RowError("DIFFERENTIAL_DIAGNOSIS", shown_field(name), known)


def _answers(codes: list[str], field: str, evidences: dict[str, EvidenceDefinition]) -> dict[str, str]:
    """Question and answer per evidence, several values under one question; what does not apply is left out."""
    values: dict[str, list[str]] = {}
    for code in codes:
        name, has_value, value = code.partition("_@_")
        evidence = evidences.get(name)
        if evidence is None:
            raise RowError(field, shown_field(code), f"a code of {EVIDENCES_FILE}; {_SAME_RELEASE}")
        if evidence.data_type == "B" and has_value:
            raise RowError(field, shown_field(code), f"{name} alone: it is a yes-or-no question")
        if evidence.data_type != "B" and value not in map(str, evidence.possible_values):
            raise RowError(field, shown_field(code), f"{name}_@_ and one of {shown_field(evidence.possible_values)}")
        listed = values.setdefault(name, [])
        if value not in listed:
            listed.append(value)
    answers: dict[str, str] = {}
    for name, listed in values.items():
        evidence = evidences[name]
        # Beside other values the default ("nowhere") says nothing.
        told = [value for value in listed if len(listed) == 1 or value != str(evidence.default_value)]
        words = [evidence.answer(value) for value in told]
        if any(words):
            answers[name] = f"{evidence.question_en.strip()} {', '.join(word for word in words if word)}"
    return answers


RECALL, PRECISION, F1 = "ddr", "ddp", "ddf1"
MIN_PROBABILITY = 0.01
"""Entries of a differential that are not above it do not count, on both sides."""
_MAX_NAMES = 200
_MAX_NAME_CHARS = 200
_MIN_PREFIX_CHARS = 4
_SPELLINGS = {"laryngospasm": "larygospasm"}
"""Upstream's list spells it without the n."""

_DIAGNOSIS = re.compile(
    r"^[ \t#*>-]*(?:(?:final|primary|main|likely|most likely|top|principal|leading)[ \t]+)*"
    r"diagnosis[ \t]*(?::|\bis\b:?)[ \t]*(\S[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_DIFFERENTIAL = re.compile(
    r"^[ \t#*>-]*differentials?(?:[ \t]+diagnos[ie]s)?[ \t]*(?::|\bis\b:?)[ \t]*"
    r"([^\n]*(?:\n[ \t]*(?:[-*\u2022]|[0-9]{1,2}[.)])[ \t]*[^\n]*)*)",
    re.IGNORECASE | re.MULTILINE,
)
_JSON_DIAGNOSIS = re.compile(r"[\"'](?:(?:final|primary|main)[_ ])?(?:diagnosis|answer)[\"']\s*:\s*\"([^\"\n]+)\"", re.IGNORECASE)
_JSON_DIFFERENTIAL = re.compile(r"[\"']differential(?:[_ ]diagnos[ie]s)?[\"']\s*:\s*\[([^\]]*)\]", re.IGNORECASE)
_NAME_END = re.compile(r"\s*[;,(]|\s[-\u2013\u2014]\s|\.\s")
_BULLET = re.compile(r"^[ \t]*(?:[-*\u2022]|[0-9]{1,2}[.)])[ \t]*")
_PROBABILITY = re.compile(r"[\s(\[:,=-]*(?:p\s*=\s*)?(?:([0-9]{1,3}(?:\.[0-9]{1,6})?)\s?%|([01]?\.[0-9]{1,9}|[01]))[)\]\s.]*\Z")


@lru_cache(maxsize=16)
def _names(conditions: tuple[str, ...]) -> dict[str, str]:
    """Return spelling -> condition: the name itself, and what else stands for exactly one condition."""
    known = {_tidy(name): name for name in conditions}
    aliases: dict[str, set[str]] = {}
    for name in conditions:
        for part in [*name.split("/"), re.sub(r"\([^)]*\)", "", name)]:
            aliases.setdefault(_tidy(part), set()).add(name)
    unique = {alias: next(iter(names)) for alias, names in aliases.items() if alias and len(names) == 1}
    return {**unique, **known}


def _tidy(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name.casefold())
    words = re.sub(r"[^a-z0-9]+", " ", "".join(c for c in plain if not unicodedata.combining(c))).strip()
    return _SPELLINGS.get(words, words)


def find_condition(name: str, conditions: Sequence[str]) -> str | None:
    """Return the condition that a name stands for; None where it is none of them, or could be several."""
    names = _names(tuple(conditions))
    wanted = _tidy(name[:_MAX_NAME_CHARS])
    if wanted in names:
        return names[wanted]
    longer = {condition for known, condition in names.items() if f"{known} ".startswith(f"{wanted} ")}
    if len(wanted) >= _MIN_PREFIX_CHARS and len(longer) == 1:
        return longer.pop()
    shorter = [known for known in names if f"{wanted} ".startswith(f"{known} ")]
    return names[max(shorter, key=len)] if shorter else None


Diagnosis = Reading[str]
"""The first diagnosis of a reply: a condition of the list, or what it says instead; None where it says nothing, or several."""


def read_diagnosis(text: str, conditions: Sequence[str]) -> Diagnosis:
    """Return the first diagnosis of a reply: its last `Diagnosis:` line, else its differential's first. Never raises."""
    prose = open_reply(text).prose
    found = _DIAGNOSIS.findall(prose) or _JSON_DIAGNOSIS.findall(prose)
    if not found:
        names = _names(tuple(conditions))
        alone = next((name for line in (prose, last_line(prose)) if (name := names.get(_tidy(line[:_MAX_NAME_CHARS])))), None)
        differential = [] if alone else read_differential(text, conditions)
        if differential:
            return Reading(differential[0], "first of the differential")
        return Reading(alone, "the reply is a name" if alone else "no diagnosis found")
    said = str(found[-1]).strip()[:_MAX_NAME_CHARS]
    if is_refusal(said):
        return Reading(None, "the reply refuses to answer")
    several = {find_condition(part, conditions) for part in re.split(r";|\bor\b", said)} - {None}
    if len(several) > 1:
        return Reading(None, "the diagnosis names several conditions")
    name = find_condition(said, conditions) or find_condition(_NAME_END.split(said, maxsplit=1)[0], conditions)
    return Reading(name or said, "stated" if name else "stated, and not a name of the list")


def read_differential(text: str, conditions: Sequence[str]) -> list[str]:
    """Return the names of a reply's last `Differential:` list, each once; unknown ones as they are spelled. Never raises."""
    prose = open_reply(text).prose
    found = _DIFFERENTIAL.findall(prose)
    if not found:
        found = ["; ".join(re.findall(r"\"([^\"\n]+)\"", each)) for each in _JSON_DIFFERENTIAL.findall(prose)]
    if not found:
        return []
    lines = [_BULLET.sub("", line) for line in str(found[-1]).splitlines()]
    parts = [part for line in lines for part in line.split(";" if ";" in line else ",")]
    names: dict[str, None] = {}
    for part in parts[:_MAX_NAMES]:
        said = part.strip(" .\t")[:_MAX_NAME_CHARS]
        probability = _PROBABILITY.search(said[-40:])
        if probability and said not in conditions:
            said = said[: len(said) - len(probability.group())]
            value = float(probability[1]) / 100 if probability[1] else float(probability[2])
            if value <= MIN_PROBABILITY:
                continue
        if _tidy(said) and not is_refusal(said):
            names[find_condition(said, conditions) or said] = None
    return list(names)


def differential_metrics(said: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Return recall, precision and F1, 0..1, of one set of names against another; 0 where either is empty."""
    num_right = len(set(said) & set(gold))
    if num_right == 0:
        return {RECALL: 0.0, PRECISION: 0.0, F1: 0.0}
    recall, precision = num_right / len(set(gold)), num_right / len(set(said))
    return {RECALL: recall, PRECISION: precision, F1: 2 * precision * recall / (precision + recall)}


def entry(deviation: str) -> ScorerEntry:
    """Return the scoring of DDXPlus, whose gold has `pathology`, `differential` and `conditions`."""
    return ScorerEntry(
        score=_score,
        gold_replies=_gold_replies,
        primary="top-1 accuracy",
        metrics=(RECALL, PRECISION, F1),
        chance=lambda labels: sum(1 / len(gold_of(label, "conditions")[0]) for label in labels) / max(1, len(labels)),
        answer_key=_pathology,
        deviation=deviation,
    )


def _pathology(label: Label) -> str:
    return str(gold_of(label, "pathology")[0])


def _gold_differential(label: Label) -> list[str]:
    (entries,) = gold_of(label, "differential")
    return [name for name, probability in entries if probability > MIN_PROBABILITY]


def _gold_replies(label: Label) -> dict[str, str]:
    differential = "Differential: " + "; ".join(_gold_differential(label))
    return {VALUE: f"Diagnosis: {_pathology(label)}"} | dict.fromkeys((RECALL, PRECISION, F1), differential)


def _score(label: Label, reply: Reply) -> Score:
    pathology, conditions = gold_of(label, "pathology", "conditions")
    diagnosis = read_diagnosis(reply.text, conditions)
    metrics = differential_metrics(read_differential(reply.text, conditions), _gold_differential(label))
    if diagnosis.value is None:
        return replace(unscored(diagnosis.reason), metrics=metrics)
    return Score(
        value=float(diagnosis.value == pathology),
        extracted=diagnosis.value,
        reason=f"{diagnosis.reason}; right is {pathology}",
        metrics=metrics,
    )


DDXPLUS = Benchmark(
    name="ddxplus",
    title="DDXPlus",
    parse=parse_patient,
    slices=divided("validation"),
    scoring=lambda _: entry("top-1 of 49 given names, all evidences shown, no dialogue"),
    hub=HubSource(
        dataset="aai530-group6/ddxplus",
        revision="2ad986acc1ec62fb4a94171acc43f4fdd5bfde53",
        slices=divided("validate"),
        max_rows=20_000,
    ),
    definitions=(EVIDENCES_FILE, CONDITIONS_FILE),
    read_definitions=read_definitions,
)
