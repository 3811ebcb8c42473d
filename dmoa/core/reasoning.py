"""Splits what a model thought from what it answers: tags such as <think>, and the channels of gpt-oss.

A thought is never an answer: stopping, selection, prompts and scorers read the text alone. Source: ours, after the formats of
DeepSeek-R1, Qwen3, Magistral, Kimi and the harmony format of gpt-oss.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = r"think|thinking|thought|thoughts|reasoning|seed:think|\|begin_of_thought\||\|channel_thought\|"
_OPEN = re.compile(rf"(?:\A|(?<=[\n>\]\u25b7]))[ \t]*(?:<(?:{_NAMES})>|\[THINK\]|\u25c1think\u25b7)", re.IGNORECASE)
_CLOSE = re.compile(
    r"</(?:think|thinking|thought|thoughts|reasoning|seed:think)>|<\|end_of_thought\|>|\[/THINK\]|\u25c1/think\u25b7",
    re.IGNORECASE,
)
_QUOTED_OPEN = re.compile(rf"<(?:{_NAMES})>", re.IGNORECASE)
_CHANNEL = re.compile(r"(?:<\|start\|>(?:assistant)?)?<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start)\|>")
# Channels whose marks were skipped on decoding: `analysisWe compute ...assistantfinal42`.
_GLUED = re.compile(r"\A(?:assistant)?(analysis|commentary)(?=[A-Z0-9\"'(*\n]|\s*\Z)")
_GLUED_NEXT = re.compile(r"assistant\s?(analysis|commentary|final)(?:json|code)?")
_FINAL = "final"


@dataclass(frozen=True, slots=True)
class SplitReply:
    """A reply, its thoughts apart."""

    text: str
    """What the model answers; empty while it only thinks."""
    reasoning: str = ""
    """All thoughts, blocks separated by a blank line."""
    is_open: bool = False
    """Whether the last thought never ended, so that what follows the thoughts is missing."""


def split_reasoning(text: str, *, is_opened: bool = False) -> SplitReply:
    """Split a whole reply into thoughts and answer. Never raises.

    `is_opened`: the chat template has already opened the thought, so a reply without a closing tag is a thought alone.
    """
    if "<|channel|>" in text:
        return _by_channels(text)
    if _GLUED.match(text):
        return _by_glued_channels(text)
    return _by_tags(text, is_opened=is_opened)


def _by_tags(text: str, *, is_opened: bool) -> SplitReply:
    opening = _OPEN.search(text)
    closing = _CLOSE.search(text, 0, opening.start() if opening else len(text))
    if closing is not None and not is_opened and _QUOTED_OPEN.search(text, 0, closing.start()):
        closing = None  # a text about the tags
    thoughts, kept, place = list[str](), list[str](), 0
    if closing is not None:  # the opening tag stood in the prompt
        thoughts.append(text[: closing.start()])
        place = closing.end()
    elif is_opened and opening is None:
        return SplitReply("", text.strip(), is_open=True)
    is_open = False
    while (opening := _OPEN.search(text, place)) is not None:
        kept.append(text[place : opening.start()])
        closing = _CLOSE.search(text, opening.end())
        thoughts.append(text[opening.end() : closing.start() if closing else len(text)])
        place = closing.end() if closing else len(text)
        is_open = closing is None
    if not thoughts:
        return SplitReply(text)
    kept.append(text[place:])
    return _split(kept, thoughts, is_open=is_open)


def _by_channels(text: str) -> SplitReply:
    marks = list(_CHANNEL.finditer(text))
    thoughts, kept = list[str](), [_CHANNEL_END.split(text[: marks[0].start()])[0] if marks else text]
    for number, mark in enumerate(marks):
        end = marks[number + 1].start() if number + 1 < len(marks) else len(text)
        said = _CHANNEL_END.split(text[mark.end() : end], maxsplit=1)[0]
        (kept if mark[1] == _FINAL else thoughts).append(said)
    return _split(kept, thoughts, is_open=bool(marks) and all(mark[1] != _FINAL for mark in marks))


def _by_glued_channels(text: str) -> SplitReply:
    first = _GLUED.match(text)
    assert first is not None
    thoughts, kept, channel, place = list[str](), list[str](), first[1], first.end()
    for mark in _GLUED_NEXT.finditer(text, first.end()):
        (kept if channel == _FINAL else thoughts).append(text[place : mark.start()])
        channel, place = mark[1], mark.end()
        if channel == _FINAL:  # what follows is the answer, whatever words it has
            break
    (kept if channel == _FINAL else thoughts).append(text[place:])
    return _split(kept, thoughts, is_open=channel != _FINAL)


def _split(kept: list[str], thoughts: list[str], *, is_open: bool) -> SplitReply:
    reasoning = "\n\n".join(thought.strip() for thought in thoughts if thought.strip())
    return SplitReply("".join(kept).strip(), reasoning, is_open=is_open)
