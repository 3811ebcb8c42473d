"""From tokens to text while they are generated: whole characters only, and nothing of a stop text.

One per running request; the decode loop pushes every token that is not an end-of-text token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_BROKEN = "\ufffd"


class TextStream:
    """Decodes one reply token by token, and finds the stop text that ends it."""

    __slots__ = ("_decoder", "_sent", "_stop", "_text", "_tokenizer", "_tokens", "stopped")

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """`tokenizer` is a `tokenizers.Tokenizer`; empty stop texts are ignored."""
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(text for text in stop if text)
        self._tokens: list[int] = []
        self._text = ""
        self._sent = 0
        self.stopped = False
        """Whether a stop text was met; the text ends before it."""

    @property
    def text(self) -> str:
        """All text so far, without the stop text and without a character whose bytes are not complete."""
        return self._text

    def push(self, token: int) -> str:
        """Take one token; return the text that may be shown now: it can be no part of a stop text."""
        self._tokens.append(token)
        piece = self._decoder.step(self._tokenizer, token)
        if piece:
            self._extend(piece)
        return self._release(0 if self.stopped else self._held())

    def finish(self) -> str:
        """Return the text still held back, once the reply has ended; bytes of an incomplete character are dropped."""
        if not self.stopped:
            # The decoder holds back everything of a token that ends amid a character, its whole characters too.
            whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True).rstrip(_BROKEN)
            if whole.startswith(self._text):
                self._extend(whole[len(self._text) :])
        return self._release(0)

    def _extend(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=1)
        start = max(0, len(self._text) - longest + 1)
        self._text += piece
        found = [at for at in (self._text.find(stop, start) for stop in self._stop) if at >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _held(self) -> int:
        """Return how many characters at the end could be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, held: int) -> str:
        end = max(self._sent, len(self._text) - held)
        fresh = self._text[self._sent : end]
        self._sent = end
        return fresh
