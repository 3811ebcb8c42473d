"""A scripted pool, of four agents unless told, that notes who was asked when, and what each saw of the others' words."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import cache
from typing import Any

from dmoa.agents.summarizer import SelectSummarizer
from dmoa.config import Config
from dmoa.dispatch import Dispatcher
from dmoa.orchestrator import Orchestrator
from dmoa.policies.registry import POLICIES, PolicyContext, build_policy, split_policy
from dmoa.testing import FakeEncoder, answer_of, card, fixed_gate, query, router_of, scripted_pool
from dmoa.types import AgentCall, AgentReply, Answer, EntropySum, Query, TextDelta, TokenUsage

POOL = ("a", "b", "c", "d")
"""The pool of most tests."""
MOST = tuple("abcdefghijklm")
"""The agents of larger ones."""
_FILLER = "word " * 3000
QUESTION = f"What is said here? {_FILLER}"

pool_of = cache(scripted_pool)
"""A pool's configuration, which does not change, by its agents."""

Says = Callable[[AgentCall], str | AgentReply | None]


class NotingAgents:
    """Implements `AgentClient`: each reply is its own mark and 3000 words; tokens are words."""

    def __init__(self, says: Says, nats: Mapping[str, float]) -> None:
        self._says = says
        self._nats = nats
        self.calls: list[AgentCall] = []

    async def call(self, call: AgentCall) -> AgentReply:
        self.calls.append(call)
        said = self._says(call)
        if isinstance(said, AgentReply):
            return said
        text = f"[{mark_of(call)}] {_FILLER}" if said is None else said
        tokens = len(text.split())
        nats = self._nats.get(mark_of(call), 0.5)
        return AgentReply(
            agent=call.agent,
            status="ok",
            text=text,
            entropy=EntropySum(sum_nats=nats * tokens, sq_sum=nats * nats * tokens, tokens=tokens),
            usage=TokenUsage(prompt_tokens=words_of(call), completion_tokens=tokens),
        )

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        reply = await self.call(call)
        yield TextDelta(text=reply.text)
        yield reply

    async def ping(self, agent: str) -> None:
        return


def mark_of(call: AgentCall) -> str:
    """`agent.step`, and the sample where it is not the first."""
    return f"{call.agent}.{call.step}" + (f"~{call.sample}" if call.sample else "")


def words_of(call: AgentCall) -> int:
    """Words of a prompt: its tokens."""
    return sum(len(message.content.split()) for message in call.messages)


def context_of(policy: str, config: Config | None = None) -> PolicyContext:
    """What a policy is built from, over the four agents; the gate ranks the last one first: d, c, b, a."""
    config = config or pool_of(POOL)
    size = len(config.agents)
    router = router_of(fixed_gate({name: 2 * place / size / (size + 1) for place, name in enumerate(config.agent_names, 1)}))
    return PolicyContext(config=config, router=router, encoder=FakeEncoder(), agent=split_policy(policy)[1])


async def run(
    policy: str,
    says: Says = lambda call: None,
    asked: Query | None = None,
    nats: Mapping[str, float] | None = None,
    pool: Sequence[str] = POOL,
) -> tuple[Answer, list[AgentCall]]:
    """Ask a policy, `NAME` or `NAME:key=value`; `says` gives an agent's words, or its reply; None: its mark and 3000 words."""
    agents = NotingAgents(says, nats or {})
    dispatcher = Dispatcher(agents=agents, cards={name: card(name) for name in pool}, router=None, is_select=True)
    loop = Orchestrator(dispatcher=dispatcher, summarizer=SelectSummarizer())
    built = build_policy(split_policy(policy)[0], context_of(policy, pool_of(tuple(pool))))
    return await answer_of(loop, asked or query(QUESTION, max_steps=50), built), agents.calls


def schedule_of(calls: list[AgentCall]) -> list[str]:
    """One line a call, in order: its mark, and the marks of the texts that it saw."""
    seen = (re.findall(r"\[([a-m]\.\d+(?:~\d+)?)\]", call.messages[-1].content) for call in calls)
    return [" ".join((mark_of(call), *(["<-", *marks] if marks else []))) for call, marks in zip(calls, seen, strict=True)]


def cost_of(policy: str, asked: Query | None = None, pool: Sequence[str] = POOL) -> tuple[int, int]:
    """Calls and reads as the formulas of a policy's entry have them, for the pool and the query's limits."""
    name, words = split_policy(policy)
    entry, limits = POLICIES[name], (asked or query()).limits
    options = entry.options_of(words, pool_of(tuple(pool))) if entry.options else None
    names: dict[str, Any] = {**(options.model_dump() if options else {}), "A": len(options.agents if options else pool)}
    names |= {"ceil": math.ceil, "min": min, "max": max, "steps": limits.max_steps, "max_agents": limits.max_agents}
    if "inner" in names:
        names["inner"], names["inner_reads"] = cost_of(names["inner"], asked, pool)
    calls, reads = (eval(text.removesuffix(" at most"), {"__builtins__": {}}, names) for text in (entry.cost, entry.reads))
    return calls, reads


async def check_cost(policy: str, says: Says = lambda call: None, asked: Query | None = None, pool: Sequence[str] = POOL) -> None:
    """Assert that calls are those of the formula, and tokens within 1 % of what calls and reads come to."""
    answer, calls = await run(policy, says, asked, pool=pool)
    expected_calls, reads = cost_of(policy, asked, pool)
    assert len(calls) == expected_calls
    prompt = len(QUESTION.split())
    said = [str(says(call) or f"x {_FILLER}") for call in calls]
    expected = sum(prompt + len(text.split()) for text in said) + reads * (len(_FILLER.split()) + 1)
    assert abs(answer.usage.total - expected) <= 0.01 * expected
