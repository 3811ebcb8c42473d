"""An agent: an LLM (perhaps with an adapter) in a role, with tools, on an engine; and a client for agents in process.

Between the orchestrator's `AgentCall` and the engine's `GenerationRequest` stands the tool loop: a reply that calls a
tool is continued after the tool's result, and counts as one contribution. What was thought is parted from the text here, once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from numbers import Integral
from typing import get_args

from dmoa.agents import tools as toolbox
from dmoa.config import AgentConfig, EntropyScope
from dmoa.core.reasoning import ReasoningSplitter, split_reasoning
from dmoa.errors import AgentOverloadedError, DeadlineError, DmoaError, EngineError, PluginError, PromptTooLongError, is_bug
from dmoa.protocols import Engine
from dmoa.types import (
    AgentCall,
    AgentReply,
    AgentStatus,
    EntropySum,
    FinishReason,
    Generation,
    GenerationRequest,
    Message,
    TextDelta,
    TokenUsage,
)
from dmoa.validation import redact_text, short

_LOG = logging.getLogger("dmoa.agent")

MAX_TOOL_ROUNDS = 4
LEAST_CHARS, CHARS_PER_TOKEN = 262_144, 64
"""Bound of a reply and its thought: what is longer than its tokens can be is no contribution; recordings look at no limit."""


class Agent:
    """One agent on one engine."""

    def __init__(
        self,
        config: AgentConfig,
        engine: Engine,
        tools: Mapping[str, toolbox.Tool] | None = None,
        *,
        entropy_scope: EntropyScope = "answer",
    ) -> None:
        """`entropy_scope`: whether the entropy of a reply is that of its answer's tokens, or of the thought's too."""
        self._config = config
        self._entropy_scope = entropy_scope
        self._engine = engine
        self._tools: dict[str, toolbox.Tool] = {name: (tools or {})[name] for name in config.tools}

    async def call(self, call: AgentCall) -> AgentReply:
        """Answer one call; an engine's failure becomes a reply with status `failed`, `late` or `overloaded`."""
        async for item in self._items(call, has_text=False):
            if isinstance(item, AgentReply):
                return item
        raise AssertionError("stream ends with a reply")

    def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        """Answer one call, yielding pieces of text and last the whole reply.

        With tools nothing is yielded before the end, because a tool call is not text for a client.
        """
        return self._items(call, has_text=call.final is not None or not self._tools)

    async def _items(self, call: AgentCall, *, has_text: bool) -> AsyncIterator[TextDelta | AgentReply]:
        """Run the tool loop; text that nobody reads is not asked of the engine, which would send it token by token."""
        started = time.perf_counter()
        rounds: list[Generation] = []
        text = ""
        splitter = ReasoningSplitter()
        tools = {} if call.final else self._tools  # a final call may call the client's tools alone
        try:
            while True:
                generation: Generation | None = None
                request = self._request(call, text, rounds)
                if not has_text:
                    generation = await self._engine.generate(request)
                else:
                    async for item in self._engine.stream(request):
                        if isinstance(item, Generation):
                            generation = item
                        elif item.is_reasoning:
                            yield item
                        else:
                            for delta in splitter.feed(item.text):
                                yield delta
                    for delta in splitter.close():
                        yield delta
                if generation is None:
                    raise EngineError(f"engine {self._engine.label}: its stream ended without a generation")
                _check_form(generation, self._engine.label)
                _check_length(generation, call)
                rounds.append(generation)
                text += generation.raw or generation.text
                found = toolbox.find_call(text, tools) if tools else None
                is_cut = generation.finish_reason == "length" and bool(generation.text.strip())  # maybe amid the call itself
                if found is None or is_cut or len(rounds) >= MAX_TOOL_ROUNDS or self._room(call, rounds) <= 0:
                    break
                result = await tools[found.tool].run(found.argument)
                text = found.before + toolbox.result_text(found, result)
        except Exception as error:  # an engine and its tools are called here: whatever fails is the agent's own failure
            yield self._failed(call, error, started, rounds)
            return
        yield self._reply(call, text, rounds, started, is_cut=found is not None)

    def _room(self, call: AgentCall, rounds: list[Generation]) -> int:
        return call.sampling.max_tokens - sum(item.usage.completion_tokens for item in rounds)

    def _request(self, call: AgentCall, text: str, rounds: list[Generation]) -> GenerationRequest:
        number = len(rounds)
        messages = (*call.messages, Message(role="assistant", content=text)) if text else call.messages
        stop = (*call.sampling.stop, *toolbox.stop_strings({} if call.final else self._tools))
        return GenerationRequest(
            request_id=f"{call.call_id}#{number}@{time.monotonic_ns()}",
            messages=messages,
            sampling=replace(call.sampling, max_tokens=self._room(call, rounds), stop=stop),
            adapter=self._config.adapter,
            deadline_unix_s=call.deadline_unix_s,
            agent=call.agent,
            call_id=f"{call.call_id}#{number}" if number else call.call_id,
            question=call.question,
            query_id=call.query_id,
            final=call.final,
        )

    def _reply(self, call: AgentCall, text: str, rounds: list[Generation], started: float, *, is_cut: bool) -> AgentReply:
        """Add up the rounds; `is_cut`: the last one ended in a tool call for which there was no room."""
        split = split_reasoning(text)
        asides = (item.reasoning for item in rounds if not item.raw)  # of engines that leave no trace of it in the text
        reasoning = "\n\n".join(thought for thought in (*asides, split.reasoning) if thought)
        answer = "" if split.is_open else split.text  # a thought that never ended is no contribution
        usage, is_guess = _counted(sum((item.usage for item in rounds), TokenUsage()), reasoning, answer)
        entropy = sum((item.entropy for item in rounds), EntropySum())
        thought_entropy = sum((item.reasoning_entropy for item in rounds), EntropySum())
        if self._entropy_scope == "all":
            entropy += thought_entropy
        return AgentReply(
            agent=call.agent,
            status="ok",
            text=_sound(answer),
            reasoning=_sound(reasoning),
            finish_reason="length" if is_cut or split.is_open else rounds[-1].finish_reason,
            entropy=_known(entropy),
            reasoning_entropy=_known(thought_entropy),
            usage=usage,
            are_tokens_estimated=is_guess or any(item.are_tokens_estimated for item in rounds),
            price=_price(rounds),
            latency_ms=(time.perf_counter() - started) * 1e3,
            tool_calls=rounds[-1].tool_calls,
            logprobs=rounds[-1].logprobs,
            engine_ms=sum(item.engine_ms for item in rounds),
            engine=self._engine.label,
        )

    def _failed(self, call: AgentCall, error: Exception, started: float, rounds: list[Generation]) -> AgentReply:
        """Return a failure as a reply, with what the rounds before it took; `length`: the prompt did not fit."""
        status: AgentStatus = "late" if isinstance(error, DeadlineError) else "failed"
        if not isinstance(error, DmoaError):
            _LOG.log(logging.ERROR if is_bug(error) else logging.INFO, "agent %s raised", call.agent, exc_info=error)
        return AgentReply(
            agent=call.agent,
            status="overloaded" if isinstance(error, AgentOverloadedError) else status,
            error=redact_text(str(error) if isinstance(error, DmoaError) else f"{type(error).__name__}: {error}"),
            finish_reason="length" if isinstance(error, PromptTooLongError) else "error",
            usage=sum((item.usage for item in rounds), TokenUsage()),
            are_tokens_estimated=any(item.are_tokens_estimated for item in rounds),
            price=_price(rounds) if rounds else None,
            engine_ms=sum(item.engine_ms for item in rounds),
            latency_ms=(time.perf_counter() - started) * 1e3,
            engine=self._engine.label,
            is_bug=is_bug(error) or isinstance(error, PluginError),
        )


def _check_form(generation: Generation, label: str) -> None:
    """Raise PluginError for what an engine of somebody else's got wrong: records and messages would fail far from it."""
    if not isinstance(generation, Generation):
        raise PluginError(f"engine {label}: generate gave {short(generation)}; expected a Generation")
    kinds = dict.fromkeys(("text", "reasoning", "raw"), str) | dict.fromkeys(("entropy", "reasoning_entropy"), EntropySum)
    asked = [(name, getattr(generation, name), kind) for name, kind in (kinds | {"usage": TokenUsage}).items()]
    found = [(name, value, f"a value of type {kind.__name__}") for name, value, kind in asked if not isinstance(value, kind)]
    if generation.finish_reason not in get_args(FinishReason):
        found.append(("finish_reason", generation.finish_reason, ", ".join(get_args(FinishReason))))
    counts = {name: getattr(generation.usage, name, 0) for name in TokenUsage.__slots__}
    found += [(f"usage.{n}", x, "a count") for n, x in counts.items() if not isinstance(x, Integral) or x < 0]
    if found:
        name, value, allowed = found[0]
        raise PluginError(f"engine {label}: {name} of its Generation is {short(value)}; expected {allowed}; mend the engine")


def _check_length(generation: Generation, call: AgentCall) -> None:
    """Raise EngineError for more text than the call's tokens can be; other agents' prompts and the trace would carry it."""
    most, seen = LEAST_CHARS + CHARS_PER_TOKEN * call.sampling.max_tokens, len(generation.text) + len(generation.reasoning)
    if seen > most:
        what = f"agent {call.agent!r}: its reply has {seen} characters for max_tokens {call.sampling.max_tokens}"
        raise EngineError(f"{what}; expected at most {most}")


def _price(rounds: list[Generation]) -> float | None:
    """Return what the rounds cost; None where an engine does not say it of all."""
    known = [item.price for item in rounds if item.price is not None and 0 <= item.price < math.inf]
    return sum(known) if len(known) == len(rounds) else None


def _sound(text: str) -> str:
    """Return a text without what UTF-8 cannot carry: another agent's engine would fail on it."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _known(entropy: EntropySum) -> EntropySum:
    """Return an entropy, or nothing where an engine's numbers broke: then nothing is known of the whole."""
    return entropy if entropy.is_finite else EntropySum(kind=entropy.kind)


def _counted(usage: TokenUsage, reasoning: str, answer: str) -> tuple[TokenUsage, bool]:
    """Return usage with the tokens of the thought, and whether they are a guess: by characters, where the engine did not tell."""
    if not reasoning or usage.reasoning_tokens:
        return usage, False
    share = len(reasoning) / (len(reasoning) + len(answer))
    return replace(usage, reasoning_tokens=round(share * usage.completion_tokens)), True


class LocalAgents:
    """Agents in this process, as an `AgentClient`."""

    def __init__(self, agents: Mapping[str, Agent]) -> None:
        self._agents = dict(agents)

    async def call(self, call: AgentCall) -> AgentReply:
        """Ask one agent and wait for its reply."""
        return await self._agents[call.agent].call(call)

    def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        """Ask one agent and yield its text as it comes, last the reply."""
        return self._agents[call.agent].stream(call)

    async def ping(self, agent: str) -> None:
        """Return at once: agents of this process are up for as long as it is."""
