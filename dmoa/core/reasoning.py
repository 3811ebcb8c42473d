"""Splits what a model thought from what it answers: tags such as <think>, and the channels of gpt-oss.

A thought is never an answer: stopping, selection, prompts and scorers read the text alone. Source: ours, after the formats of
DeepSeek-R1, Qwen3, Magistral, Kimi and the harmony format of gpt-oss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from dmoa.types import TextDelta

_CLOSED_NAMES = ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")
_OPENED = (*(f"<{name}>" for name in (*_CLOSED_NAMES, "|begin_of_thought|", "|channel_thought|")), "[think]", "\u25c1think\u25b7")
_CLOSED = (*(f"</{name}>" for name in _CLOSED_NAMES), "<|end_of_thought|>", "[/think]", "\u25c1/think\u25b7")
_CHANNEL = "<|channel|>"
_ENDED = ("<|end|>", "<|return|>", "<|call|>", "<|start|>")
_HEADED = ("<|channel|>", "<|start|><|channel|>", "<|start|>assistant<|channel|>")
_GLUED = tuple(
    f"assistant{gap}{channel}{kind}"
    for gap, channel, kind in product(("", " "), ("analysis", "commentary", "final"), ("", "json", "code"))
)


def _any_of(marks: Sequence[str]) -> str:
    """Return a pattern of marks, the longest first."""
    return "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))


_OPEN = re.compile(_any_of(_OPENED), re.IGNORECASE)
_CLOSE = re.compile(_any_of(_CLOSED), re.IGNORECASE)
_BEFORE_OPEN = "\n>]\u25b7"
"""An opening tag stands at the start of a line, or behind another tag; elsewhere it is spoken about."""
_HEAD = re.compile(r"(?:<\|start\|>(?:assistant)?)?<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_HEAD_BEGUN = re.compile(_any_of(_HEADED))
_MAX_HEAD_CHARS = 200
_END = re.compile(_any_of((*_ENDED, _CHANNEL)))
# Channels whose marks were skipped on decoding: `analysisWe compute ...assistantfinal42`.
_GLUED_FIRST = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)(?=[A-Z0-9\"'(*\n]|\s*\Z)")
_GLUED_NEXT = re.compile(r"assistant\s?(analysis|commentary|final)(?:json|code)?")
_FIRST_WORDS = ("analysis", "commentary", "assistantanalysis", "assistantcommentary")
_FINAL = "final"
_BETWEEN_THOUGHTS = "\n\n"
_IN_TEXT = (*_OPENED, *_CLOSED, *_HEADED)
_IN_CHANNEL = (*_ENDED, _CHANNEL)
_HINT = re.compile(r"[<\[\u25c1]")
"""What every mark but a glued channel begins with: most texts have none and are passed on untouched."""


@dataclass(frozen=True, slots=True)
class SplitReply:
    """A reply, its thoughts apart."""

    text: str
    """What the model answers; empty while it only thinks."""
    reasoning: str = ""
    """All thoughts, blocks separated by a blank line."""
    is_open: bool = False
    """Whether the last thought never ended, so that what follows the thoughts is missing."""
    spans: tuple[tuple[int, int], ...] = ()
    """Where the text stands in the whole reply, as ranges of its characters; thoughts and delimiters are all the rest."""
    size: int = 0
    """Characters of the whole reply."""


def split_reasoning(text: str, *, is_opened: bool = False) -> SplitReply:
    """Split a whole reply into thoughts and answer. Never raises.

    `is_opened`: the chat template has already opened the thought, so a reply without a closing tag is a thought alone.
    """
    if not is_opened and not _HINT.search(text) and not _GLUED_FIRST.match(text):
        return SplitReply(text, spans=((0, len(text)),) if text else (), size=len(text))
    splitter = ReasoningSplitter(is_opened=is_opened)
    splitter.feed(text)
    splitter.close()
    return splitter.split()


def opened_at_end(prompt: str) -> str:
    """Return the opening tag that a prompt ends with, the blanks behind it too; empty where it opens no thought."""
    end = len(prompt.rstrip())
    tag = next((mark for mark in _OPENED if prompt[:end].lower().endswith(mark)), "")
    return prompt[end - len(tag) :] if tag else ""


def closing_of(opening: str) -> str:
    """Return what ends a thought without words behind the tag that opened it, in its letters; empty where that is not known."""
    tag = opening.strip()
    ends = (f"{tag[0]}/{tag[1:]}", tag.replace("begin", "end"))
    return next((f"\n{mark}\n\n" for mark in ends if mark.lower() in _CLOSED), "")


class ReasoningSplitter:
    """Splits a reply that comes in pieces; however it is cut, the whole is split alike.

    What may still turn out to be a tag is held back. Where a closing tag comes that no tag opened, all before it is a thought,
    though it was handed on as text: give `is_opened` where the prompt opens the thought.
    """

    def __init__(self, *, is_opened: bool = False) -> None:
        self._step: Callable[[], bool] = self._in_opened if is_opened else self._at_start
        """What to do with the undecided text; tells whether it got on."""
        self._before = ""
        """The end of what is decided on: blanks, and one character ahead of them."""
        self._rest = ""
        """What is not."""
        self._place = 0
        """Where `_rest` begins in the reply."""
        self._is_answer = False
        """Whether the channel is the final one."""
        self._has_answer = False
        """Whether there was such a channel."""
        self._is_quoted = False
        """Whether the text speaks about an opening tag."""
        self.is_retracted = False
        """Whether text that was handed on turned out to be a thought that the prompt opened; it is handed on again as one."""
        self._is_ended = False
        self._text: list[str] = []
        self._thought: list[str] = []
        self._gap = ""
        """What stands ahead of the next words of the thought: blanks, or the line between two thoughts."""
        self._spans: list[tuple[int, int]] = []
        self._out: list[TextDelta] = []

    def feed(self, piece: str) -> list[TextDelta]:
        """Take the next piece; return what is decided by it, in order."""
        self._rest += piece
        while self._rest and self._step():
            pass
        out, self._out = self._out, []
        return out

    def close(self) -> list[TextDelta]:
        """Return what was held back: the reply has ended."""
        self._is_ended = True
        return self.feed("")

    def split(self) -> SplitReply:
        """Return the whole of what was decided so far."""
        is_unanswered = self._step in (self._in_channel, self._between) and not self._has_answer
        is_open = is_unanswered or self._step in (self._in_opened, self._in_thought, self._in_glued)
        return SplitReply("".join(self._text), "".join(self._thought), is_open, tuple(self._spans), self._place)

    def _at_start(self) -> bool:
        head = self._rest.strip()
        if not self._is_ended and (not head or any(word.startswith(head) for word in _FIRST_WORDS)):
            return False
        glued = _GLUED_FIRST.match(self._rest)
        if glued:
            self._drop(glued.end())
        self._step = self._in_glued if glued else self._in_text
        return True

    def _in_text(self) -> bool:
        rest = self._rest
        if not _HINT.search(rest):
            return self._give_text(len(rest))
        found = [mark for mark in (self._opening(), self._stray_closing(), _HEAD.search(rest)) if mark]
        if not found:
            begun = _HEAD_BEGUN.search(rest)
            if begun is None or len(rest) - begun.start() > _MAX_HEAD_CHARS:
                return self._give_text(len(rest) if self._is_ended else _sure(rest, _IN_TEXT))
            if self._is_ended:  # cut in the head of a channel
                self._enter(begun.start(), len(rest), self._between)
            return self._is_ended or self._give_text(begun.start())
        mark = min(found, key=lambda mark: mark.start())
        if mark.re is _CLOSE:
            self._retract(mark.start())
            self._drop(mark.end() - mark.start())
        elif mark.re is _HEAD:
            self._enter(mark.start(), mark.end(), self._in_channel)
            self._open_channel(mark)
        else:
            self._enter(mark.start(), mark.end(), self._in_thought)
        return True

    def _opening(self) -> re.Match[str] | None:
        for mark in _OPEN.finditer(self._rest):
            ahead = (self._before + self._rest[: mark.start()]).rstrip(" \t")
            if not ahead or ahead[-1] in _BEFORE_OPEN:
                return mark
        return None

    def _stray_closing(self) -> re.Match[str] | None:
        """Return the end of a thought that the prompt opened, unless the text speaks about tags."""
        mark = None if self._thought or self._is_quoted or self._gap else _CLOSE.search(self._rest)
        return None if mark is None or _OPEN.search(self._rest, 0, mark.start()) else mark

    def _retract(self, size: int) -> None:
        """Make all so far, and `size` characters more, a thought."""
        said = "".join(self._text)
        self._text, self._spans, self.is_retracted = [], [], True
        self._think(said + self._rest[:size])
        self._out = [TextDelta(text="".join(self._thought), is_reasoning=True)] if self._thought else []
        self._drop(size)
        self._end_thought()

    def _enter(self, start: int, end: int, step: Callable[[], bool]) -> None:
        """Give the text up to a mark, pass over the mark."""
        if self._text or self._rest[:start].strip():
            self._give_text(start)
        else:
            self._drop(start)
        self._drop(end - start)
        self._step = step

    def _open_channel(self, mark: re.Match[str]) -> None:
        self._is_answer = mark[1] == _FINAL
        self._has_answer |= self._is_answer

    def _in_opened(self) -> bool:
        """Pass over the tag that the prompt has already: some models repeat it."""
        head = self._rest.lstrip()
        if not self._is_ended and (not head or _is_begun(head, _OPENED)):
            return False
        mark = _OPEN.match(head)
        if mark:
            self._drop(len(self._rest) - len(head) + mark.end())
        self._step = self._in_thought
        return True

    def _in_thought(self) -> bool:
        mark = _CLOSE.search(self._rest)
        if mark is None:
            return self._give_thought(len(self._rest) if self._is_ended else _sure(self._rest, _CLOSED))
        self._give_thought(mark.start())
        self._drop(mark.end() - mark.start())
        self._end_thought()
        self._step = self._in_text
        return True

    def _in_channel(self) -> bool:
        give = self._give_text if self._is_answer else self._give_thought
        mark = _END.search(self._rest)
        if mark is None:
            return give(len(self._rest) if self._is_ended else _sure(self._rest, _IN_CHANNEL))
        give(mark.start())
        if mark[0] != _CHANNEL:
            self._drop(mark.end() - mark.start())
        if not self._is_answer:
            self._end_thought()
        self._step = self._between
        return True

    def _between(self) -> bool:
        mark = _HEAD.search(self._rest)
        if mark:
            self._drop(mark.end())
            self._open_channel(mark)
            self._step = self._in_channel
        elif self._is_ended:
            self._drop(len(self._rest))
        return mark is not None

    def _in_glued(self) -> bool:
        mark = _GLUED_NEXT.search(self._rest)
        if mark is None:
            return self._give_thought(len(self._rest) if self._is_ended else _sure(self._rest, _GLUED))
        if not self._is_ended and _is_begun(self._rest[mark.start() :], _GLUED):  # the mark may go on
            return self._give_thought(mark.start())
        self._give_thought(mark.start())
        self._drop(mark.end() - mark.start())
        self._end_thought()
        if mark[1] == _FINAL:  # what follows is the answer, whatever words it has
            self._step = self._in_last
        return True

    def _in_last(self) -> bool:
        return self._give_text(len(self._rest))

    def _give_text(self, size: int) -> bool:
        """Hand on text; blanks at its beginning wait for words, and are dropped behind a thought."""
        said = self._rest[:size]
        if not self._text and (self._thought or self._gap):
            said = said.lstrip()
            self._drop(size - len(said))
            size = len(said)
        if not size or not (self._text or said.strip() or self._is_ended):
            return False
        if self._spans and self._spans[-1][1] == self._place:
            self._spans[-1] = (self._spans[-1][0], self._place + size)
        else:
            self._spans.append((self._place, self._place + size))
        self._text.append(said)
        self._out.append(TextDelta(text=said))
        self._is_quoted = self._is_quoted or (_HINT.search(said) is not None and _OPEN.search(said) is not None)
        self._drop(size)
        return True

    def _give_thought(self, size: int) -> bool:
        piece = self._think(self._rest[:size])
        if piece:
            self._out.append(TextDelta(text=piece, is_reasoning=True))
        self._drop(size)
        return size > 0

    def _think(self, said: str) -> str:
        """Take words of a thought, without the blanks around it; return what is new."""
        whole = self._gap + said if self._thought else (self._gap + said).lstrip()
        piece = whole.rstrip()
        if self._thought and not piece:
            self._gap = whole
            return ""
        self._gap = whole[len(piece) :]
        if piece:
            self._thought.append(piece)
        return piece

    def _end_thought(self) -> None:
        self._gap = _BETWEEN_THOUGHTS

    def _drop(self, size: int) -> None:
        said = self._before + self._rest[:size]
        self._before = said[len(said.rstrip(" \t")) - 1 :] if said.strip(" \t") else said
        self._rest = self._rest[size:]
        self._place += size


def _sure(text: str, marks: Sequence[str]) -> int:
    """Return how many characters of a text cannot be the beginning of a mark that is not whole yet."""
    longest, firsts = max(map(len, marks)), {mark[0] for mark in marks}
    start = max(0, len(text) - longest + 1)
    return next((i for i in range(start, len(text)) if text[i].lower() in firsts and _is_begun(text[i:], marks)), len(text))


def _is_begun(text: str, marks: Sequence[str]) -> bool:
    """Tell whether a text is the beginning of a mark, and not the whole of it."""
    read = "".join(" " if char.isspace() else char for char in text.lower())
    return any(len(mark) > len(read) and mark.startswith(read) for mark in marks)
