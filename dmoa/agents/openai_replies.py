"""What an OpenAI-compatible endpoint sends back, read leniently: whole replies, pieces of a stream, refusals.

`openai_engine` sends; here the bytes become a `Generation`. Endpoints differ in what they leave out, so every field may be
missing; what is there must have the right type. Shape letter: V listed log-probabilities.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dmoa.core.truncated_entropy import TruncatedSums
from dmoa.errors import EngineError
from dmoa.types import FinishReason, Generation

CHARS_PER_TOKEN = 4
"""What estimates of token counts assume, the usual figure for English."""
_ENDINGS: dict[str, FinishReason] = {"length": "length", "max_tokens": "length"}


class _Part(BaseModel):
    """Base of what is read: unknown fields are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Listed(_Part):
    token: str = ""
    logprob: float | None = None


class _Row(_Listed):
    top_logprobs: list[_Listed] | None = None


class _Logprobs(_Part):
    content: list[_Row] | None = None


class _Words(_Part):
    content: str | None = None


class _Choice(_Part):
    message: _Words | None = None
    delta: _Words | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _PromptDetails(_Part):
    cached_tokens: int | None = None


class _Usage(_Part):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Reply(_Part):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class Draft:
    """What an endpoint has said so far of one reply."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._pieces: list[str] = []
        self._sums = TruncatedSums()
        self._num_rows = 0
        self._finish: str | None = None
        self._usage: _Usage | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def is_begun(self) -> bool:
        """Whether some of the text is there."""
        return bool(self._pieces)

    @property
    def is_ended(self) -> bool:
        """Whether the endpoint has said how the reply ended."""
        return self._finish is not None

    @property
    def has_entropy(self) -> bool:
        """Whether log-probabilities were listed for at least one token."""
        return self._sums.tokens > 0

    def take(self, data: bytes | str) -> str:
        """Add a whole reply or a piece of a stream, as JSON; returns the text in it.

        Raises EngineError for what is no reply, and for an error that the endpoint reports in its place.
        """
        try:
            reply = _Reply.model_validate_json(data)
        except ValidationError as error:
            raise EngineError(f"its reply is not understood ({error.error_count()} faults, the first: {_first(error)})") from None
        if reply.error:
            raise EngineError(f"it reported an error: {error_message({'error': reply.error})}")
        self._usage = reply.usage or self._usage
        for choice in (reply.choices or [])[:1]:
            return self._choose(choice)
        return ""

    def _choose(self, choice: _Choice) -> str:
        words = choice.message or choice.delta
        text = (words.content if words else None) or ""
        if text:
            self._pieces.append(text)
        for row in (choice.logprobs.content if choice.logprobs else None) or []:
            self._num_rows += 1
            self._sums.take(_listed(row), self._vocab_size)
        self._finish = choice.finish_reason or self._finish
        if self._finish == "content_filter":
            raise EngineError("its content filter ended the reply; ask in other words, or ask another agent")
        return text

    def generation(self, *, prompt_tokens: int, engine_ms: float, queue_ms: float, is_late: bool = False) -> Generation:
        """Return the reply as it stands. `is_late`: the deadline ended it.

        Token counts that the endpoint did not tell are estimated: the prompt's is `prompt_tokens`, the reply's the number of
        tokens whose log-probabilities were listed, else by its length.
        """
        usage, sums = self._usage, self._sums
        details = usage.prompt_tokens_details if usage else None
        return Generation(
            text=self.text,
            finish_reason="length" if is_late else _ENDINGS.get(self._finish or "", "stop"),
            entropy_sum_nats=sums.sum_nats,
            entropy_sq_sum=sums.sq_sum,
            entropy_slack_nats=sums.slack_nats,
            entropy_tokens=sums.tokens,
            entropy_kind="truncated",
            prompt_tokens=usage.prompt_tokens if usage else prompt_tokens,
            cached_tokens=(details.cached_tokens if details else None) or 0,
            completion_tokens=usage.completion_tokens if usage else self._num_rows or estimated_tokens(len(self.text)),
            are_tokens_estimated=usage is None,
            engine_ms=engine_ms,
            queue_ms=queue_ms,
        )


def _listed(row: _Row) -> list[float]:
    """Return the log-probabilities of a token's row: the listed ones, and the chosen token's where it is not among them."""
    listed_V = [item.logprob for item in row.top_logprobs or [] if item.logprob is not None]
    is_apart = row.logprob is not None and all(item.token != row.token for item in row.top_logprobs or [])
    # Tokens whose bytes are no text of their own may share a name; only a less probable one can have been left out.
    if row.logprob is not None and is_apart and not row.logprob > min(listed_V, default=math.inf):  # NaN is not above anything
        listed_V.append(row.logprob)
    return listed_V


def estimated_tokens(num_chars: int) -> int:
    """Return how many tokens a text of that length may have."""
    return math.ceil(num_chars / CHARS_PER_TOKEN)


def _first(error: ValidationError) -> str:
    item = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}"


def error_message(body: Any) -> str:
    """Return the message in an error's body as plain values: OpenAI's object, its usual variants, or the body itself."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or json.dumps(inner)
    return str(inner)


def error_field(body: Any, name: str) -> str:
    """Return `code` or `param` of an OpenAI error object, empty where there is none."""
    inner = body.get("error") if isinstance(body, dict) else None
    value = inner.get(name) if isinstance(inner, dict) else None
    return value if isinstance(value, str) else ""


async def events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Yield the data of each server-sent event, a line of JSON or `[DONE]`.

    Lines end at line feeds alone: str.splitlines, and httpx with it, would cut JSON at the separators U+0085 and U+2028.
    """
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", "replace")
    if rest.startswith(b"data:"):
        yield rest[5:].strip().decode("utf-8", "replace")
