"""From an Answer to OpenAI's objects: whole replies, stream chunks, usage, and the readable line of a finished step.

Last stop of a query over HTTP. The reply's own `dmoa` object is made in `dmoa.trace`, because traces keep it too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from dmoa.errors import EmptyAnswerError
from dmoa.serving.intake import Order
from dmoa.serving.problems import encode_json, error_object
from dmoa.trace import ReplyDmoa, ReplyModel, dump, finite, reply_dmoa, step_probabilities
from dmoa.types import AgentReply, Answer, StepRecord, SummarizerRecord

DONE = b"data: [DONE]\n\n"
_SUMMARY_CHARACTERS = 500
Finish = Literal["stop", "length"]


class PromptTokensDetails(ReplyModel):
    """Parts of the prompt tokens."""

    cached_tokens: int


class Usage(ReplyModel):
    """Tokens over all agents and the summarizer, lost calls included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ReplyMessage(ReplyModel):
    """The answer as a message."""

    role: Literal["assistant"] = "assistant"
    content: str = Field(min_length=1)
    refusal: None = None


class ChatChoice(ReplyModel):
    """The one choice of a chat reply."""

    index: Literal[0] = 0
    message: ReplyMessage
    logprobs: None = None
    finish_reason: Finish
    """length where a token limit cut the text; why the query ended is `dmoa.stop_reason`."""


class TextChoice(ReplyModel):
    """The one choice of a plain completion."""

    index: Literal[0] = 0
    text: str = Field(min_length=1)
    logprobs: None = None
    finish_reason: Finish


class ChatReply(ReplyModel):
    """Body of the answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    dmoa: ReplyDmoa


class TextReply(ReplyModel):
    """Body of the answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    dmoa: ReplyDmoa


def usage_of(answer: Answer) -> Usage:
    """Return the tokens of a query, summed over all agents and the summarizer."""
    calls: list[AgentReply | SummarizerRecord] = []
    for step in answer.steps:
        calls += [*step.replies, step.summarizer]
    prompt = sum(call.prompt_tokens for call in calls)
    completion = sum(call.completion_tokens for call in calls)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(call.cached_tokens for call in calls)),
    )


def step_line(step: StepRecord) -> str:
    """Return a finished step as one readable line: who was active, how sure, and the new summary."""
    chance = step_probabilities(step)
    replies = {reply.agent: reply for reply in step.replies}
    parts = []
    for name in step.active:
        entropy = replies[name].entropy_nats if name in replies else None
        sure = "" if entropy is None else f", entropy {finite(entropy):.3f} nats"
        parts.append(f"{name} (p {finite(chance.get(name, 1.0)):.3f}{sure})")
    explored = {name for name, _ in step.explored}
    lost = [f"{reply.agent} {reply.status}" for reply in step.replies if reply.status != "ok" and reply.agent not in explored]
    summary = " ".join(step.summary.split())
    if len(summary) > _SUMMARY_CHARACTERS:
        summary = summary[: _SUMMARY_CHARACTERS - 3] + "..."
    note = f"; lost: {', '.join(lost)}" if lost else ""
    return f"Step {step.step + 1}: {', '.join(parts) or 'nobody'}{note} -> {summary}\n"


class Rendering:
    """Renders one order's answer, in one piece or as stream chunks; chat and plain completions differ only here."""

    def __init__(self, order: Order, pool: str, *, is_chat: bool) -> None:
        self._order = order
        self._pool = pool
        self._is_chat = is_chat
        self._created = int(time.time())
        self._sent = ""
        """Text of the answer that was streamed."""
        self._held = ""
        """White space at its start, which is no answer as long as nothing follows."""

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the reply of a request that does not stream. Raises EmptyAnswerError."""
        check_not_empty(answer)
        choice: dict[str, Any] = {"index": 0}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        choice |= {"logprobs": None, "finish_reason": answer.finish_reason}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._envelope(kind, [choice], usage=usage_of(answer).model_dump(), dmoa=self._dmoa(answer))

    def opening(self) -> bytes:
        """Return the chunk that opens a chat stream; plain completions have none."""
        return self._chunk({"role": "assistant", "content": ""}) if self._is_chat else b""

    def step(self, step: StepRecord) -> bytes:
        """Return the chunk of a finished step; plain completions have none."""
        return self._chunk({"reasoning_content": step_line(step)}) if self._is_chat else b""

    def delta(self, text: str) -> bytes:
        """Return the chunk of a piece of the answer; nothing while all is white space, which goes with the first word."""
        self._held += text
        if not self._held or not (self._sent or self._held.strip()):
            return b""
        piece, self._held = self._held, ""
        self._sent += piece
        return self._chunk({"content": piece})

    def closing(self, answer: Answer) -> bytes:
        """Return the chunks that end a stream: what was not sent of the text, the reason, usage, `[DONE]`.

        Raises EmptyAnswerError.
        """
        events = b""
        check_not_empty(answer)
        if answer.text != self._sent and answer.text.startswith(self._sent):
            events += self._chunk({"content": answer.text[len(self._sent) :]})
        events += self._chunk({}, answer.finish_reason, dmoa=self._dmoa(answer))
        if self._order.has_usage_chunk:
            events += _event(self._envelope(self._kind, [], usage=usage_of(answer).model_dump()))
        return events + DONE

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _dmoa(self, answer: Answer) -> dict[str, Any]:
        return dump(reply_dmoa(answer, pool=self._pool, with_texts=self._order.with_texts))

    def _chunk(self, delta: Mapping[str, str], finish_reason: Finish | None = None, **more: Any) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        choice |= {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        choice |= {"logprobs": None, "finish_reason": finish_reason}
        if self._order.has_usage_chunk:
            more["usage"] = None
        return _event(self._envelope(self._kind, [choice], **more))

    def _envelope(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self._order.query.trace_id}",
            "object": kind,
            "created": self._created,
            "model": self._order.model,
            "choices": choices,
            **more,
        }


def check_not_empty(answer: Answer) -> None:
    """Raise EmptyAnswerError for an answer without text: it is never sent as a success."""
    if not answer.text.strip():
        raise EmptyAnswerError("every contribution was empty; ask again, or raise max_tokens")


def failure(error: Exception) -> bytes:
    """Return the events of an error in mid-stream: the error object, then `[DONE]`."""
    return _event(error_object(error)) + DONE


def _event(content: object) -> bytes:
    return b"data: " + encode_json(content) + b"\n\n"
