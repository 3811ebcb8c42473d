"""Which of a reply's tokens are its answer, and the entropy of answer and thought apart.

How sure an agent is of its answer is asked of the answer's tokens; a thought may well be full of doubt (`gate.entropy_scope`).
Engines call it with each token's own text. Delimiters belong to the thought, the stop token to the answer. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dmoa.core.reasoning import SplitReply
from dmoa.types import EntropySum


class ScopedEntropy(NamedTuple):
    """Entropy of a reply, by what its tokens say."""

    answer: EntropySum
    thought: EntropySum
    thought_tokens: int


def answer_tokens(pieces: Sequence[str], split: SplitReply) -> list[bool]:
    """Tell of every token whether it is part of the answer: whether any of its characters is.

    `pieces` are the tokens' texts, in order, which make up the text that was split; more of them, such as the stop token, come
    after its end. A token without text belongs to what is ahead of it.
    """
    is_text = bytearray(split.size)
    for start, end in split.spans:
        is_text[start:end] = b"\1" * (end - start)
    found, place = list[bool](), 0
    for piece in pieces:
        start, place = place, place + len(piece)
        if start >= split.size:
            found.append(not split.is_open)
        else:
            found.append(any(is_text[start:place]) if piece else bool(is_text[max(0, start - 1)]))
    return found


def scoped_entropy(pieces: Sequence[str], nats: Sequence[float], split: SplitReply) -> ScopedEntropy:
    """Return the entropy of answer and thought: [T] nats of the tokens whose texts are `pieces` [T]."""
    is_answer = answer_tokens(pieces, split)
    answer = [value for value, is_in in zip(nats, is_answer, strict=True) if is_in]
    thought = [value for value, is_in in zip(nats, is_answer, strict=True) if not is_in]
    return ScopedEntropy(EntropySum.of_tokens(answer), EntropySum.of_tokens(thought), len(thought))


def unscoped(nats: Sequence[float]) -> ScopedEntropy:
    """Return the entropy of a reply without a thought."""
    return ScopedEntropy(EntropySum.of_tokens(nats), EntropySum(), 0)
