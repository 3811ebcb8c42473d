"""Value objects as the flat fields of records in files and on the wire: there `entropy.sum_nats` is `entropy_sum_nats`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from dmoa.types import AgentReply, EntropySum, TokenUsage

Value = TypeVar("Value", TokenUsage, EntropySum)
_PREFIXES = {"usage": "", "entropy": "entropy_", "reasoning_entropy": "reasoning_entropy_"}
"""What stands ahead of the fields of a reply's value objects."""
_NOT_KEPT = ("prompt", "sent_unix_s", "is_barred", "is_bug", "tool_calls", "logprobs")
"""What is a reply's only where it was given."""
_KEPT = tuple(part.name for part in fields(AgentReply) if part.name not in _NOT_KEPT)


class TokenFields(BaseModel):
    """The counts of a `TokenUsage`, as a base of records.

    The fields of a base come before a record's own: what comes before them in a file is in a base of its own.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    prompt_tokens: int
    cached_tokens: int
    """Part of prompt_tokens that an engine did not compute again."""
    completion_tokens: int
    reasoning_tokens: int = 0
    """Part of completion_tokens that was thought, not answered."""

    @property
    def usage(self) -> TokenUsage:
        """The counts as one value."""
        return _value_of(TokenUsage, {name: getattr(self, name) for name in TokenFields.model_fields})


def flat(value: TokenUsage | EntropySum, prefix: str = "") -> dict[str, Any]:
    """Return the fields of a value object by their flat names, with `prefix` ahead of each."""
    return {prefix + name: getattr(value, name) for name in value.__slots__}


def flat_reply(reply: AgentReply) -> dict[str, Any]:
    """Return the fields of a reply, with those of its value objects in their places."""
    found: dict[str, Any] = {}
    for name in _KEPT:
        value = getattr(reply, name)
        found |= flat(value, _PREFIXES[name]) if name in _PREFIXES else {name: value}
    return found


def reply_of(row: Mapping[str, Any]) -> AgentReply:
    """Return the reply that `flat_reply` made flat; what is not there has its default. Raises TypeError for other fields."""
    rest = dict(row)
    usage, entropy = _value_of(TokenUsage, rest), _value_of(EntropySum, rest, "entropy_")
    return AgentReply(usage=usage, entropy=entropy, reasoning_entropy=_value_of(EntropySum, rest, "reasoning_entropy_"), **rest)


def _value_of(kind: type[Value], row: dict[str, Any], prefix: str = "") -> Value:
    """Take the fields of a value object out of a flat record."""
    names = {part.name: prefix + part.name for part in fields(kind)}
    return kind(**{name: row.pop(key) for name, key in names.items() if key in row})
