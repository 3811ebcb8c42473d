"""Rows of supervised training: a conversation and the reply that is wanted, in files and as tokens.

First stop of specialist training: `cli` writes the rows that a recipe asks for, `lora_packs` lays their tokens out for
the model. Prompts are encoded exactly as the transformers engine encodes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dmoa.errors import ConfigError
from dmoa.validation import describe


class TrainingMessage(BaseModel):
    """One message of a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    content: str


class TrainingRow(BaseModel):
    """One example: a line of a file of rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    messages: tuple[TrainingMessage, ...]
    """The whole prompt, as the agent will be sent it."""
    target: str
    """The wanted reply, without the token that ends it."""
    source: str = ""
    """Where the row comes from, such as a suite: accuracies are broken down by it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as tokens."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    """With the token that ends a reply."""
    source: str


def write_rows(path: Path, rows: Iterable[TrainingRow]) -> None:
    """Write rows as JSON lines, whole and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(path)


def read_rows(path: Path) -> list[TrainingRow]:
    """Read rows from JSON lines. Raises ConfigError naming file, line and field."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)  # not splitlines: texts may hold other line separators, which JSON does not escape
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rows: cannot read {str(path)!r}: {error}; name a file of JSON lines (messages, target)") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(TrainingRow.model_validate(json.loads(line)))
        except ValidationError as error:
            raise ConfigError(f"rows: {path.name}, line {number}: {describe(error, TrainingRow)}") from error
        except ValueError as error:
            raise ConfigError(f"rows: {path.name}, line {number}: not valid JSON: {error}; correct or remove it") from error
    if not rows:
        raise ConfigError(f"rows: {str(path)!r} holds no row; at least one is needed; write the rows again")
    return rows


def encode(tokenizer: Any, rows: Sequence[TrainingRow]) -> list[Encoded]:
    """Turn rows into tokens with a transformers tokenizer that has a chat template and a token that ends a reply."""
    backend = tokenizer.backend_tokenizer
    encoded = []
    for row in rows:
        text = tokenizer.apply_chat_template(
            [message.model_dump() for message in row.messages], tokenize=False, add_generation_prompt=True
        )
        prompt = backend.encode(text, add_special_tokens=False).ids
        target = [*backend.encode(row.target, add_special_tokens=False).ids, tokenizer.eos_token_id]
        encoded.append(Encoded(tuple(prompt), tuple(target), row.source))
    return encoded
