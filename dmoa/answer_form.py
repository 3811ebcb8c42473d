"""What a client may want of an answer beyond a text, and what it then gets."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, Literal

NEVER_NATS = -9999.0
"""What is written for the log-probability of what has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of one of the client's tools, which the client is to run."""

    call_id: str
    """Named by whoever made it; the client's result names it again."""
    name: str
    arguments: str
    """A JSON object as text."""


def new_call_id() -> str:
    """Return an id for a call of a tool, as OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalCall:
    """What a client wants of its answer beyond a text: with any of it the answer is written by a call of its own."""

    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the answer may call: name, description, parameters (JSON Schema), as OpenAI's objects have them."""
    tool_choice: str = "auto"
    """auto, required, or `=NAME`: the tool that must be called."""
    is_parallel: bool = True
    """Whether one answer may call several tools."""
    schema: dict[str, Any] | None = None
    """JSON Schema of the text; None: any text."""
    schema_name: str = ""
    """What the client calls the schema; empty: any JSON object is asked for."""
    schema_description: str = ""
    """What the client says that the form is for."""
    is_strict: bool | None = None
    """As the client says of its schema, for endpoints."""
    top_logprobs: int | None = None
    """Log-probabilities listed per token beside the chosen one's; None: none are asked for."""
    n: int = 1
    """Answers, each of a call with its own seed."""

    @property
    def may_be_text(self) -> bool:
        """Whether any text is such an answer: there are tools that may be called, and nothing else is asked for."""
        return self.tool_choice == "auto" and self.schema is None and self.top_logprobs is None and self.n == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer of those that a final call was asked for."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[dict[str, Any], ...] | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] = "stop"
