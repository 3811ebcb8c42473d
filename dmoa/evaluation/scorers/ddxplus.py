"""DDXPlus: the first diagnosis, and the differential beside it.

`Diagnosis: NAME` counts as right where NAME is the patient's pathology; where there is no such line, the first entry of
`Differential: NAME; NAME; ...` stands for it, as in GTPA@1. Names are compared without case, accents, punctuation and
spaces; a name that stands for exactly one condition counts too: one side of a slash ("NSTEMI"), the name without its
parentheses, a whole-word beginning ("Acute COPD exacerbation", or "Influenza" in "Influenza A"). DDR, DDP and DDF1
compare the set of the differential with the conditions of probability above 0.01, per patient; names outside the list
count against precision; without a differential they are 0. Source: Fansi Tchango et al. 2022.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dmoa.evaluation.records import Label, Reply, Score
from dmoa.evaluation.scorers.entry import VALUE, ScorerEntry, gold_of, unscored
from dmoa.evaluation.scorers.statements import is_refusal, last_line, readable

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


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The first diagnosis of a reply."""

    name: str | None
    """A condition of the list, or what the reply says instead; None where it says nothing, or several."""
    reason: str


def read_diagnosis(text: str, conditions: Sequence[str]) -> Diagnosis:
    """Return the first diagnosis of a reply: its last `Diagnosis:` line, else its differential's first. Never raises."""
    prose = readable(text)
    found = _DIAGNOSIS.findall(prose)
    if not found:
        names = _names(tuple(conditions))
        alone = next((name for line in (prose, last_line(prose)) if (name := names.get(_tidy(line[:_MAX_NAME_CHARS])))), None)
        differential = [] if alone else read_differential(text, conditions)
        if differential:
            return Diagnosis(differential[0], "first of the differential")
        return Diagnosis(alone, "the reply is a name" if alone else "no diagnosis found")
    said = str(found[-1]).strip()[:_MAX_NAME_CHARS]
    if is_refusal(said):
        return Diagnosis(None, "the reply refuses to answer")
    several = {find_condition(part, conditions) for part in re.split(r";|\bor\b", said)} - {None}
    if len(several) > 1:
        return Diagnosis(None, "the diagnosis names several conditions")
    name = find_condition(said, conditions) or find_condition(_NAME_END.split(said, maxsplit=1)[0], conditions)
    return Diagnosis(name or said, "stated" if name else "stated, and not a name of the list")


def read_differential(text: str, conditions: Sequence[str]) -> list[str]:
    """Return the names of a reply's last `Differential:` list, each once; unknown ones as they are spelled. Never raises."""
    found = _DIFFERENTIAL.findall(readable(text))
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
    if diagnosis.name is None:
        score = unscored(diagnosis.reason)
        return replace(score, metrics=metrics)
    return Score(
        value=float(diagnosis.name == pathology),
        extracted=diagnosis.name,
        reason=f"{diagnosis.reason}; right is {pathology}",
        metrics=metrics,
    )
