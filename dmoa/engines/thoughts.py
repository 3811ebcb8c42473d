"""Which thoughts are marked by special tokens; and where an answer stands in all that was generated, if others parted them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dmoa.core.reasoning import SplitReply, split_reasoning

_CHANNEL = "<|channel|>"


def has_special_marks(tokenizer: Any) -> bool:
    """Tell whether special tokens of a tokenizer mark thoughts, so that a reply is decoded with its special tokens."""
    added = tokenizer.get_added_tokens_decoder().values()
    return any(token.special and (token.content == _CHANNEL or split_reasoning(token.content).is_open) for token in added)


def placed_split(raw: str, text: str, split: SplitReply) -> SplitReply | None:
    """Return the split of a text with its places in `raw`, everything that was generated; None where it does not stand there.

    Looked for from the end, because a thought drafts what is said later; blanks around the text may differ. What stands ahead
    of it is a thought, and without a text all is.
    """
    body = text.strip()
    at = raw.rfind(body)
    shift = at - (len(text) - len(text.lstrip()))
    spans = tuple((max(at, start + shift), end + shift) for start, end in split.spans) if body else ()
    is_open = split.is_open or not spans
    return replace(split, spans=spans, size=at + len(body), is_open=is_open) if at >= 0 else None


def cuts_of(is_answer: Sequence[bool]) -> tuple[int, ...]:
    """Return the tokens at which thoughts begin and end in turn."""
    before = [True, *is_answer]
    return tuple(number for number, (one, other) in enumerate(zip(before, is_answer, strict=False)) if one != other)
