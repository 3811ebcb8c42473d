"""Summarizers: fold the contributions of a step into the new summary, and say whether the query is done.

`select` passes one contribution on and lets rules decide; `llm` is an agent that writes the summary after a verdict.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from dmoa.agents.prompts import summarizer_messages
from dmoa.config import SUMMARIZER, SummarizerConfig
from dmoa.core.aggregate import Selection, select_contribution
from dmoa.errors import AgentOverloadedError, AgentUnavailableError
from dmoa.protocols import AgentClient, Turn
from dmoa.types import AgentCall, AgentReply, FinishReason, QueryState, Sampling, SummarizerRecord, TextDelta, Verdict

Emit = Callable[[TextDelta], None]
Choose = Callable[[Sequence[AgentReply]], Selection | None]
_FINAL = "FINAL"
_CONTINUE = "CONTINUE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """The outcome of folding one step."""

    summary: str
    record: SummarizerRecord
    selection: Selection | None
    """The contribution that rules would choose; None where no agent contributed or a summarizer wrote the summary."""


class SelectSummarizer:
    """The agreed answer, or else the surest agent's (ours)."""

    async def fold(
        self,
        state: QueryState,
        replies: tuple[AgentReply, ...],
        sampling: Sampling,
        emit: Emit,
        choose: Choose = select_contribution,
    ) -> Fold:
        """Choose one contribution; nothing is generated."""
        selection = choose(replies)
        summary = selection.text if selection else state.summary
        record = SummarizerRecord(mode="select", verdict="rule", finish_reason=_ending(selection, replies))
        return Fold(summary=summary, record=record, selection=selection)


class LlmSummarizer:
    """An agent that writes the summary; its first line is the verdict, exactly FINAL or CONTINUE (paper)."""

    def __init__(self, agents: AgentClient, config: SummarizerConfig, turn: Turn = nullcontext) -> None:
        """`turn`: as the dispatcher's."""
        self._agents, self._config, self._turn = agents, config, turn

    async def fold(
        self,
        state: QueryState,
        replies: tuple[AgentReply, ...],
        sampling: Sampling,
        emit: Emit,
        choose: Choose = select_contribution,
    ) -> Fold:
        """Ask the summarizer; where it fails, fall back on the chosen contribution and say so in the record."""
        usable = [reply for reply in replies if reply.status == "ok" and reply.text.strip()]
        messages = summarizer_messages(
            state.query, state.history, usable, profile=self._config.profile, share_reasoning=self._config.share_reasoning
        )
        call = AgentCall(
            trace_id=state.query.trace_id,
            step=len(state.steps),
            agent=SUMMARIZER,
            messages=messages,
            sampling=sampling,
            deadline_unix_s=state.deadline_unix_s,
            conversation=state.query.conversation,
        )
        async with self._turn():
            sent_unix_s = time.time()
            reply = await self._listen(call, emit, is_streamed=state.query.is_streamed)
        verdict, text = parse_verdict(reply.text)
        selection = None if text else choose(replies)
        summary = text or (selection.text if selection else state.summary)
        record = SummarizerRecord(
            mode="llm",
            verdict=verdict,
            reasoning=reply.reasoning if text else "",
            usage=reply.usage,
            latency_ms=reply.latency_ms,
            engine_ms=reply.engine_ms,
            finish_reason=reply.finish_reason if text else _ending(selection, replies),
            is_memoised=reply.is_memoised,
            error=reply.error,
            price=reply.price,
            prompt=messages,
            sent_unix_s=sent_unix_s,
        )
        return Fold(summary=summary, record=record, selection=selection)

    async def _listen(self, call: AgentCall, emit: Emit, *, is_streamed: bool) -> AgentReply:
        """Ask the summarizer. Where its stream is lost or late, the reply is what had been handed on, with the error.

        Where nobody reads along the reply comes whole; with a deadline it streams all the same, for what is there by then.
        """
        heard, started = _Heard(), time.perf_counter()
        lost = AgentReply(agent=SUMMARIZER, status="failed", error="the stream ended without a reply")
        try:
            async with asyncio.timeout(None if call.deadline_unix_s is None else max(0.0, call.deadline_unix_s - time.time())):
                if is_streamed or call.deadline_unix_s is not None:
                    reply = await self._read(call, emit, heard) or lost
                else:
                    reply = await self._agents.call(call)
        except (AgentUnavailableError, AgentOverloadedError) as error:
            reply = replace(lost, error=str(error))
        except TimeoutError:
            reply = replace(lost, status="late", error="the deadline passed before the summary")
        if reply.status != "ok":
            ending: FinishReason = "length" if heard.text else "error"
            reply = replace(reply, text=heard.text, reasoning=heard.thought, finish_reason=ending)
        return replace(reply, latency_ms=(time.perf_counter() - started) * 1e3)

    async def _read(self, call: AgentCall, emit: Emit, heard: _Heard) -> AgentReply | None:
        """Read the stream; text after a FINAL line is handed on at once, and the thought before it."""
        async for item in withhold(self._agents.stream(call)):
            if isinstance(item, AgentReply):
                return item
            if item.is_reasoning:
                heard.thought += item.text
                emit(item)
            else:
                emit(item if heard.text else TextDelta(text=parse_verdict(item.text)[1]))
                heard.text += item.text
        return None


async def withhold(items: AsyncIterator[TextDelta | AgentReply]) -> AsyncIterator[TextDelta | AgentReply]:
    """Yield of a summarizer's stream thought and text once text follows a FINAL line, else the reply alone.

    Run where the summarizer runs too, it spares a message per token for text that is not handed on.
    """
    held, thought, is_final = "", "", False
    async for item in items:
        if isinstance(item, AgentReply) or is_final:
            yield item
            continue
        if item.is_reasoning:
            thought += item.text
            continue
        held += item.text
        head, newline, rest = held.lstrip().partition("\n")
        if newline and head.strip() == _FINAL and rest.strip():
            is_final = True
            if thought:
                yield TextDelta(text=thought, is_reasoning=True)
            yield TextDelta(text=held)


@dataclass(slots=True)
class _Heard:
    """What a summarizer's stream has handed on so far, its FINAL line included."""

    text: str = ""
    thought: str = ""


def _ending(selection: Selection | None, replies: Sequence[AgentReply]) -> FinishReason:
    """Return how the chosen contribution ended."""
    chosen = (reply for reply in replies if selection and (reply.agent, reply.text) == (selection.agent, selection.text))
    return next((reply.finish_reason for reply in chosen), "stop")


Summarizer = SelectSummarizer | LlmSummarizer


def parse_verdict(text: str) -> tuple[Verdict, str]:
    """Split a summarizer's reply into verdict and summary.

    The first line must be exactly FINAL or CONTINUE; anything else counts as CONTINUE, is marked `unparsable`, and the
    whole text is the summary. Blank lines ahead of a summary are dropped, nothing else: what was streamed is the same text.
    """
    head, _, rest = text.lstrip().partition("\n")
    if head.strip() == _FINAL:
        return "final", _without_blank_lines(rest)
    if head.strip() == _CONTINUE:
        return "continue", _without_blank_lines(rest)
    return "unparsable", _without_blank_lines(text)


def _without_blank_lines(text: str) -> str:
    """Return the text from its first line that is not blank, whose indentation stays; empty where all is blank."""
    body = text.lstrip()
    start = text.rfind("\n", 0, len(text) - len(body)) + 1
    return text[start:] if body else ""
