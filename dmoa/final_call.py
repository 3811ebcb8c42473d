"""The call that writes an answer as a client wants it: with its tools, by a schema, several times, with log-probabilities.

Agents work on a query as ever, and see nothing of the form. Then one of them, or the summarizer that writes, is asked once more.
Engines do what they can by themselves; else the form is asked for in words, checked, and asked for once more.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from dmoa.agents.json_forms import (
    calls_fault,
    calls_in,
    calls_schema,
    check_schemas,
    completed,
    form_brief,
    form_prompt,
    text_fault,
    unwrapped,
)
from dmoa.agents.prompts import agent_messages
from dmoa.dispatch import Dispatcher
from dmoa.errors import DeadlineError, EmptyAnswerError, NoAgentError, RequestError
from dmoa.step_calls import AgentCard
from dmoa.types import (
    AgentCall,
    AgentReply,
    Choice,
    FinalCall,
    FinishReason,
    Message,
    QueryState,
    StepRecord,
    SummarizerRecord,
    TextDelta,
    TokenUsage,
    total_price,
)

TOOLS, TOOL_PROMPT, SCHEMA, LOGPROBS = "tools", "tool_prompt", "schema", "logprobs"
"""Abilities of engines: calls of tools by the engine, by a prompt of ours, decoding guided by a schema, log-probabilities."""
_TASK = "Write the final answer to the question, on the basis of the work so far."
_SHOWN = 2000
_CALL_BEGINS = re.compile(r"[{\[<`]")
Emit = Callable[[TextDelta], None]


class _HandedOn:
    """Hands text on up to where a call of a tool in words may begin."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.text = ""
        """What was handed on."""
        self._is_over = False

    def take(self, delta: TextDelta) -> None:
        """Take a piece of text, or of a thought, which goes on as it is."""
        if delta.is_reasoning:
            self._emit(delta)
        elif not self._is_over and (piece := self._begin(delta.text)):
            self.text += piece
            self._emit(TextDelta(text=piece))

    def _begin(self, piece: str) -> str:
        """Return what of a piece is handed on."""
        lead = _CALL_BEGINS.split(piece, maxsplit=1)[0]
        self._is_over = lead != piece
        return lead

    def joined(self, choice: Choice) -> Choice:
        """Return an answer that begins with what was handed on."""
        if choice.text.startswith(self.text):
            return choice
        return replace(choice, text="\n\n".join(filter(str.strip, (self.text, choice.text))))


class _HandedOnJson(_HandedOn):
    """Hands the object or list of a text on as it comes, up to what closes it; what begins otherwise waits for its end."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(emit)
        self._depth = 0
        self._is_quoted = self._is_escaped = False

    def _begin(self, piece: str) -> str:
        piece = piece if self.text else piece.lstrip()
        self._is_over = not self.text and piece[:1] not in ("", "{", "[")
        return "" if self._is_over else piece[: self._end(piece)]

    def _end(self, piece: str) -> int:
        """Return where the value ends in a piece, its length where it does not."""
        for place, sign in enumerate(piece):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_quoted:
                self._is_escaped, self._is_quoted = sign == "\\", sign != '"'
            elif sign == '"':
                self._is_quoted = True
            elif sign in "{}[]":
                self._depth += 1 if sign in "{[" else -1
                self._is_over = not self._depth
                if self._is_over:
                    return place + 1
        return len(piece)


@dataclass(frozen=True, slots=True)
class FinalCaller:
    """Asks for answers in the form that a client wants."""

    dispatcher: Dispatcher
    writer: AgentCard | None
    """The summarizer that writes answers; None: the agent whose contribution was chosen does."""

    def check(self, final: FinalCall, agent: str | None = None) -> None:
        """Check that somebody can answer so; `agent`: the one that alone is asked. Raises RequestError."""
        known = self.dispatcher.cards
        asked = [known[agent]] if agent is not None and agent in known else list(known.values())
        cards = [self.writer] if self.writer else asked
        lacks = {card.name: _lack(card, final) for card in cards}
        if all(lacks.values()):
            param = lacks[cards[0].name]
            engines = ", ".join(dict.fromkeys(card.engine for card in cards))
            can = {"tools": "openai, vllm or transformers", "logprobs": "openai or vllm"}.get(param, "any but recorded")
            seen = f"is not supported by the engine of {'the agent' if agent else 'the pool'} ({engines})"
            raise RequestError(
                f"{param}: it {seen}; leave it out, or use an engine that can: {can}", param=param, code="unsupported"
            )
        able = [card for card in cards if not lacks[card.name]]
        check_schemas(final, are_tools_checked=any(_runs_model(card) or TOOLS not in card.abilities for card in able))

    async def write(self, state: QueryState, emit: Emit | None) -> tuple[StepRecord, tuple[Choice, ...]]:
        """Return the answers, and the step that they took; `emit` takes pieces of the text where it is sure to be the answer's.

        Raises RequestError (422) for an answer that is not in the form when asked for the second time, and what a step raises.
        """
        final, started = state.query.final, time.perf_counter()
        assert final is not None
        card = self._card(state, final)
        tasks = [asyncio.create_task(self._choice(state, card, final, number, emit)) for number in range(final.n)]
        try:
            written = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        choices, replies = tuple(choice for choice, _ in written), tuple(reply for _, asked in written for reply in asked)
        first, has_agent = choices[0], self.writer is None
        ending: FinishReason = "length" if first.finish_reason == "length" else "stop"
        record = SummarizerRecord(mode="select", verdict="rule", reasoning=first.reasoning, finish_reason=ending)
        if not has_agent:
            record = replace(
                record,
                mode="llm",
                verdict="final",
                usage=sum((reply.usage for reply in replies), TokenUsage()),
                latency_ms=max(reply.latency_ms for reply in replies),
                engine_ms=max(reply.engine_ms for reply in replies),
                price=total_price(replies),
                prompt=replies[0].prompt,
                sent_unix_s=replies[0].sent_unix_s,
            )
        step = StepRecord(
            step=len(state.steps),
            replies=replies if has_agent else (),
            active=(card.name,) if has_agent else (),
            summary=first.text,
            summarizer=record,
            wall_ms=(time.perf_counter() - started) * 1e3,
        )
        return step, choices

    def _card(self, state: QueryState, final: FinalCall) -> AgentCard:
        """Return who writes: the summarizer, the agent that was chosen, or else the next one whose engine can."""
        if self.writer is not None:
            return self.writer
        cards, summary = self.dispatcher.cards, state.summary
        authors = [reply.agent for step in reversed(state.steps) for reply in step.replies if reply.text == summary]
        names = dict.fromkeys([*authors, *(name for step in reversed(state.steps) for name in step.active), *cards])
        return next(cards[name] for name in names if not _lack(cards[name], final))

    async def _choice(
        self, state: QueryState, card: AgentCard, final: FinalCall, number: int, emit: Emit | None
    ) -> tuple[Choice, tuple[AgentReply, ...]]:
        """Return one of the answers, and the replies that it took."""
        is_prompted = bool(final.tools) and TOOLS not in card.abilities
        # With tools a model that runs here is guided to calls, and to no schema.
        is_guided = SCHEMA in card.abilities and not (final.tools and _runs_model(card))
        is_sure = not is_prompted and final.tool_choice == "auto" and (final.schema is None or is_guided)
        emit = emit if final.tool_choice == "auto" and final.n == 1 and final.top_logprobs is None else None
        live = emit if is_sure and final.schema is None else None
        lead = _HandedOn(emit) if emit and is_prompted and final.schema is None else None
        form = _HandedOnJson(emit) if emit and is_sure and final.schema is not None else None
        call = self._call(state, card, final, number, is_prompted=is_prompted)
        reply = await self._ask(call, card, lead.take if lead else form.take if form else live)
        replies: tuple[AgentReply, ...] = (reply,)
        shown = form.text if form else ""
        choice, fault = _read(reply, card, final, shown)
        if fault and live is None and not shown:
            told = f"That is not the form that was asked for: {fault}. Write it again, as nothing but that form."
            said = Message(role="assistant", content=reply.text[:_SHOWN] or "(nothing)")
            asked = (*call.messages, said, Message(role="user", content=told))
            # For a model that nothing guides the form is begun: it has only to go on with it.
            brief, head = form_brief(final) if _runs_model(card) and SCHEMA not in card.abilities else ("", "")
            if head:
                asked = (*self._messages(state, card, brief), Message(role="assistant", content=head))
            reply = await self._ask(replace(call, messages=asked, sample=number + final.n), card, None)
            reply = replace(reply, text=completed(head + reply.text)) if head else reply
            replies = (*replies, reply)
            choice, fault = _read(reply, card, final)
        if fault:
            what = "tools" if fault.startswith("tools: ") else "response_format"
            message = f"{what}: the answer is not in the form that was asked for: {fault.removeprefix('tools: ')}"
            shown = reply.text if len(reply.text) <= _SHOWN else reply.text[:_SHOWN] + "..."
            raise RequestError(f"{message}; its text: {shown}", param=what, code="invalid_answer", status=422)
        if not choice.text.strip() and not choice.tool_calls:
            raise EmptyAnswerError("the final call wrote nothing; ask again, or raise max_tokens")
        return lead.joined(choice) if lead else choice, replies

    def _call(self, state: QueryState, card: AgentCard, final: FinalCall, number: int, *, is_prompted: bool) -> AgentCall:
        is_forced = is_prompted and final.tool_choice != "auto"
        is_guided = SCHEMA in card.abilities
        wanted = calls_schema(final) if is_forced else None if final.tools and _runs_model(card) else final.schema
        schema = wanted if is_guided else None
        sampling = self.dispatcher.sampling_for(state.query, card.sampling, is_final=True)
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + number)
        is_bound = schema is not None or (bool(final.tools) and final.tool_choice != "auto")
        if is_bound and is_guided and _runs_model(card) and "enable_thinking" not in dict(sampling.template):
            # A thought is no JSON, and no call; an endpoint knows that itself.
            sampling = replace(sampling, template=(*sampling.template, ("enable_thinking", False)))
        # A model that has to call tools is not told of the schema of an answer in text.
        told = form_prompt(replace(final, schema=None) if is_forced else final, has_tools=is_prompted)
        return AgentCall(
            trace_id=state.query.trace_id,
            step=len(state.steps),
            agent=card.name,
            messages=self._messages(state, card, told),
            sampling=sampling,
            deadline_unix_s=state.deadline_unix_s,
            conversation=state.query.conversation,
            query_id=state.query.query_id,
            sample=number,
            final=replace(final, tools=() if is_prompted else final.tools, schema=schema, n=1),
        )

    def _messages(self, state: QueryState, card: AgentCard, form: str) -> tuple[Message, ...]:
        return agent_messages(state.query, state.history, profile=card.profile, instruction=f"{_TASK}\n{form}")

    async def _ask(self, call: AgentCall, card: AgentCard, emit: Emit | None) -> AgentReply:
        reply = await self.dispatcher.ask_once(call, card, emit)
        if reply.status == "ok":
            return reply
        if reply.status == "late":
            raise DeadlineError(f"the deadline passed before the final call of {card.name} was answered; allow more time")
        if reply.finish_reason == "length":
            raise RequestError(f"messages: {reply.error}", param="messages", code="context_length_exceeded")
        raise NoAgentError(f"the final call of {card.name} was lost ({reply.status}, {reply.error}); ask again")


def _lack(card: AgentCard, final: FinalCall) -> str:
    """Return the field of a request that an agent's engine cannot serve, empty if it can do all."""
    if final.tools and not {TOOLS, TOOL_PROMPT} & card.abilities:
        return "tools"
    if final.top_logprobs is not None and LOGPROBS not in card.abilities:
        return "logprobs"
    if card.is_recorded:
        return "response_format" if final.schema is not None else "n"
    return ""


def _runs_model(card: AgentCard) -> bool:
    """Whether the engine is no endpoint, which would know by itself how tools, thoughts and schemas go together."""
    return TOOL_PROMPT in card.abilities


def _read(reply: AgentReply, card: AgentCard, final: FinalCall, shown: str = "") -> tuple[Choice, str]:
    """Return a reply as a choice, and what is wrong with its form; a text that a limit of tokens cut is given as it is.

    `shown`: JSON of its text that was handed on already, and therefore is the answer.
    """
    is_cut = reply.finish_reason == "length"
    text, calls, fault = reply.text, reply.tool_calls, ""
    if final.tools and TOOLS not in card.abilities:
        calls, fault = calls_in(text, final)
        text = "" if calls else text
    elif final.tools and not calls and final.tool_choice != "auto":
        fault = "no tool is called"
    elif calls and _runs_model(card):
        fault = calls_fault(calls, final)
    fault = f"tools: {fault}" if fault else ""
    if final.schema is not None and not calls and not fault:
        text = shown.rstrip() or unwrapped(text)
        fault = "" if is_cut else text_fault(text, final.schema)
    elif shown:
        text = text.lstrip()
    is_called = bool(calls) and not any(text_fault(call.arguments, {}) for call in calls)  # else a limit cut the last one
    choice = Choice(
        text=text,
        reasoning=reply.reasoning,
        tool_calls=calls,
        logprobs=reply.logprobs,
        finish_reason="length" if is_cut and not is_called else "tool_calls" if calls else "stop",
    )
    return choice, fault
