"""DDXPlus: name the condition, and the differential, from a patient's coded answers turned into text.

Codes (`E_91`, `E_54_@_V_161`) get their meaning from the release's `release_evidences.json`, condition names are those
of `release_conditions.json`; rows and definitions must be of one release. Label: `pathology`, `differential` (pairs of
name and probability), `conditions` (all names, in the order of the definitions).
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.upstream import ParsedRow, RowError, Text, UpstreamFields, show, validate

EVIDENCES_FILE = "release_evidences.json"
CONDITIONS_FILE = "release_conditions.json"
MAX_LITERAL_CHARS = 100_000
_SAME_RELEASE = "rows and definitions must be of one release, French or English"
_WORDS = {"N": "no", "Y": "yes"}


class Evidence(UpstreamFields):
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

    evidences: dict[str, Evidence]
    conditions: list[str]


def read_definitions(paths: Mapping[str, Path]) -> Definitions:
    """The two definition files.

    Raises:
        ConfigError: a file is not JSON of the release's form, or a name could not be told apart in an answer.
    """
    conditions = list(_read_json(paths[CONDITIONS_FILE], dict[str, dict[str, Any]]))
    evidences = _read_json(paths[EVIDENCES_FILE], dict[str, Evidence])
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
        return TypeAdapter(form).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        seen = show(first["input"])
        raise ConfigError(f"{path}, `{where}`: saw {seen}; {first['msg']}. Take the file of the DDXPlus release.") from None
    except (ValueError, RecursionError) as error:
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


def parse(fields: Mapping[str, Any], definitions: Definitions) -> ParsedRow:
    """A patient as a question: the conditions to choose from, age, sex, first complaint, findings.

    Raises:
        RowError: a field is missing or ill-typed; a condition, a code or a value is not of the definitions.
    """
    row = validate(DdxRow, fields)
    _check_conditions(row, definitions)
    task = (
        "Diagnose the patient. End with a line `Diagnosis: NAME`, the likeliest condition, and a line "
        "`Differential: NAME; NAME; ...`, all that are possible, likeliest first, names from the list."
    )
    patient = f"Age: {row.AGE}\nSex: {'female' if row.SEX == 'F' else 'male'}"
    complaint = "".join(_answers([row.INITIAL_EVIDENCE], "INITIAL_EVIDENCE", definitions.evidences).values()) or "none"
    findings = _answers(row.EVIDENCES, "EVIDENCES", definitions.evidences)
    parts = [
        task,
        f"Conditions: {'; '.join(definitions.conditions)}",
        patient,
        f"Initial complaint: {complaint}",
    ]
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
        raise RowError("PATHOLOGY", show(row.PATHOLOGY), known)
    for name, _probability in row.DIFFERENTIAL_DIAGNOSIS:
        if name not in definitions.conditions:
            raise RowError("DIFFERENTIAL_DIAGNOSIS", show(name), known)


def _answers(codes: list[str], field: str, evidences: dict[str, Evidence]) -> dict[str, str]:
    """Question and answer per evidence, several values under one question; what does not apply is left out."""
    values: dict[str, list[str]] = {}
    for code in codes:
        name, has_value, value = code.partition("_@_")
        evidence = evidences.get(name)
        if evidence is None:
            raise RowError(field, show(code), f"a code of {EVIDENCES_FILE}; {_SAME_RELEASE}")
        if evidence.data_type == "B" and has_value:
            raise RowError(field, show(code), f"{name} alone: it is a yes-or-no question")
        if evidence.data_type != "B" and value not in map(str, evidence.possible_values):
            raise RowError(field, show(code), f"{name}_@_ and one of {show(evidence.possible_values)}")
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
