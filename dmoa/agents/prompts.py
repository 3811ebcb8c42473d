"""The prompt layout, the same for every agent of every step.

[common system text, client's system text][earlier turns][query][history, append-only][role and instruction last]

What agents wrote stands between lines of ours ("Contribution of a:"). A line of theirs that reads like one is marked as quoted
and written apart, so a text neither ends its part nor opens another's.

All agents of a step share everything up to the role, so a prefix cache computes it once; history grows only at its
end, so the next step shares it as well.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from dmoa.types import AgentReply, Message, Query

COMMON_SYSTEM = "You work with other experts on a user's question. Be brief and correct."

_LINE_END = re.compile(r"(\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029])")
_FRAME = re.compile(
    r"\W*+(?:(?:contribution|thoughts)\W+of\W++[^\s:]{1,80}+[^\w:]*+:|work\W+so\W+far\W+step\W*\d|your\W+role\W*:"
    r"|answer\W+the\W+question\W+above\b|tools\W+used\W+since\W*:"
    r"|write\W+on\W+the\W+first\W+line\b|(?-i:FINAL|CONTINUE)\W*$)",
    re.IGNORECASE,
)
"""Lines that frame what agents wrote, or look like it: with other capitals, or signs around the words.

Possessive, so that no line takes more than time in proportion to its length: another pool member writes it.
"""

_SEEN_AS = str.maketrans(
    "\u0410\u0421\u0415\u041d\u0406\u041e\u0420\u0405\u0422\u0412\u0423\u0430\u0441\u0435\u04bb\u0456\u043e\u0440\u0455"
    "\u0443\u051d\u051b\u0501\u0391\u0392\u0395\u0397\u0399\u039d\u039f\u03a4\u03a5\u03dc\u03b1\u03b9\u03bf\u03c5\u03bd"
    "\u03c1\u115f\u1160",
    "ACEHIOPSTBYacehiopsywqdABEHINOTYFaiouvp\u00ad\u00ad",
)
"""Cyrillic and Greek letters to the Latin ones that they look like, and two letters without a width to another such sign."""

_VERDICT = (
    "Write on the first line exactly FINAL if the question is now fully answered, else exactly CONTINUE. "
    "Then write the answer so far, complete and on its own."
)


def agent_messages(
    query: Query, history: Sequence[str], *, profile: str, tools: str = "", instruction: str = ""
) -> tuple[Message, ...]:
    """Return the prompt of one agent for one step; `history` is what it sees of earlier work, oldest first."""
    parts = (f"Answer the question above. Your role: {profile.strip()}", tools.strip(), instruction.strip())
    role = " ".join(part for part in parts if part)
    return (*_opening(query), _user(_task(query, history), role))


def summarizer_messages(
    query: Query, history: Sequence[str], replies: Sequence[AgentReply], *, profile: str, share_reasoning: bool = False
) -> tuple[Message, ...]:
    """Return the prompt of the `llm` summarizer; `share_reasoning`: what agents thought stands before each contribution."""
    work = "\n\n".join(
        (f"Thoughts of {reply.agent}:\n{_framed(reply.reasoning)}\n\n" if share_reasoning and reply.reasoning else "")
        + f"Contribution of {reply.agent}:\n{_framed(reply.text)}"
        for reply in replies
    )
    return (*_opening(query), _user(_task(query, history), work, f"Your role: {profile.strip()} {_VERDICT}"))


def _opening(query: Query) -> tuple[Message, ...]:
    system = "\n\n".join(part for part in (COMMON_SYSTEM, query.system.strip()) if part)
    return (Message(role="system", content=system), *query.turns)


def _task(query: Query, history: Sequence[str]) -> str:
    work = [f"Work so far, step {number}:\n{_framed(text)}" for number, text in enumerate(history, 1)]
    used = [f"Tools used since:\n{_framed(query.exchange)}"] if query.exchange else []
    return "\n\n".join([query.text, *used, *work])


def _user(*parts: str) -> Message:
    return Message(role="user", content="\n\n".join(parts))


def _framed(text: str) -> str:
    """Return what an agent wrote, every line of it that could be taken for one of the frame's or a verdict marked as quoted."""
    # Every second part is the end of a line.
    return "".join(part if i % 2 else _marked(part) for i, part in enumerate(_LINE_END.split(text.strip())))


def _marked(line: str) -> str:
    seen = _plain(line)
    found = _FRAME.match(seen)
    return f"> {'-'.join(found[0].split())}{seen[found.end() :]}" if found else line


def _plain(line: str) -> str:
    """Return a line as a reader sees it: without characters that have no width, and letters in their usual form."""
    if line.isascii():
        return line
    seen = unicodedata.normalize("NFKC", line).translate(_SEEN_AS)
    return "".join(char for char in seen if unicodedata.category(char) not in ("Cf", "Mn", "Me"))
