"""The prompt layout, the same for every agent of every step.

[common system text, client's system text][earlier turns][query][history, append-only][role and instruction last]

All agents of a step share everything up to the role, so a prefix cache computes it once; history grows only at its
end, so the next step shares it as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmoa.types import AgentReply, Message, Query

COMMON_SYSTEM = "You work with other experts on a user's question. Be brief and correct."

_VERDICT = (
    "Write on the first line exactly FINAL if the question is now fully answered, else exactly CONTINUE. "
    "Then write the answer so far, complete and on its own."
)


def agent_messages(
    query: Query, history: Sequence[str], *, profile: str, tools: str = "", instruction: str = ""
) -> tuple[Message, ...]:
    """Return the prompt of one agent for one step.

    `history` is what the agent sees of earlier work, oldest first; `profile`, `tools` and `instruction` come last.
    """
    parts = (f"Answer the question above. Your role: {profile.strip()}", tools.strip(), instruction.strip())
    role = " ".join(part for part in parts if part)
    return (*_opening(query), _user(_task(query, history), role))


def summarizer_messages(
    query: Query, history: Sequence[str], replies: Sequence[AgentReply], *, profile: str
) -> tuple[Message, ...]:
    """Return the prompt of the `llm` summarizer: the shared prefix, the step's contributions, role and verdict rule."""
    work = "\n\n".join(f"Contribution of {reply.agent}:\n{reply.text.strip()}" for reply in replies)
    return (*_opening(query), _user(_task(query, history), work, f"Your role: {profile.strip()} {_VERDICT}"))


def _opening(query: Query) -> tuple[Message, ...]:
    system = "\n\n".join(part for part in (COMMON_SYSTEM, query.system.strip()) if part)
    return (Message(role="system", content=system), *query.turns)


def _task(query: Query, history: Sequence[str]) -> str:
    work = [f"Work so far, step {number}:\n{text.strip()}" for number, text in enumerate(history, 1)]
    return "\n\n".join([query.text, *work])


def _user(*parts: str) -> Message:
    return Message(role="user", content="\n\n".join(parts))
