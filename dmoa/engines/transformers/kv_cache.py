"""Keys and values of the running sequences, and of recent prompts whose beginning may come again.

`KvRows` is the cache that the model's forward writes to and reads from: one row per running sequence, position p of a
sequence in slot p of its row, written in place. `PrefixStore` keeps copies of the rows of recent prompts. Shape
letters: R rows, L slots of a row, T tokens, H key-value heads, D head size, E = H x D, N tensors (keys and values of
every layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache

TokenArray = npt.NDArray[np.int64]
_SLOT_STEP = 256
"""Rows grow by this many slots: rare enough for the copy not to matter."""


@dataclass(frozen=True, slots=True)
class _Span:
    """What one forward reads and writes."""

    first_row: int
    num_rows: int
    index_N: Tensor
    """Flat slot (row x L + position) of every new token, row by row."""
    num_slots: int
    """Slots that attention reads."""
    is_fresh: bool
    """Whether every sequence starts at position 0, so that attention needs the new keys alone."""


class KvRows(Cache):
    """Pre-allocated keys and values of the running sequences: a row each, rows 0..n-1 in use.

    Grows by whole blocks when a row or a slot is missing, shrinks by `release` alone. Slots past a sequence's end hold old but
    finite values: attention masks them.
    """

    def __init__(self, *, num_layers: int, num_heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self._heads = num_heads
        self._head_size = head_size
        # Keys and values of every layer, [R, L, E] each, in a tensor of their own: what torch.compile takes as inputs.
        self._kv = [torch.zeros(0, 0, num_heads * head_size, dtype=dtype, device=device) for _ in range(2 * num_layers)]
        self._span: _Span | None = None

    @property
    def nbytes(self) -> int:
        """Memory of all rows."""
        return sum(kv_RLE.nbytes for kv_RLE in self._kv)

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for `rows` sequences of up to `slots` tokens, keeping what is there."""
        had_rows, had_slots, size = self._kv[0].shape
        if rows <= had_rows and slots <= had_slots:
            return
        # Never a single row: torch.compile makes a special case of sizes of 1, and compiles twice.
        new_rows = max(had_rows, 2, 1 << (rows - 1).bit_length())
        new_slots = max(had_slots, -(-slots // _SLOT_STEP) * _SLOT_STEP)
        for number, old_RLE in enumerate(self._kv):
            # Zeros, not uninitialised memory: a masked slot has weight 0, and 0 x NaN is NaN.
            grown_RLE = old_RLE.new_zeros(new_rows, new_slots, size)
            grown_RLE[:had_rows, :had_slots] = old_RLE
            self._kv[number] = grown_RLE

    def release(self) -> None:
        """Give all memory back; no row may be in use."""
        self._kv = [kv_RLE.new_zeros(0, 0, kv_RLE.shape[2]) for kv_RLE in self._kv]

    def begin(self, first_row: int, starts: list[int], width: int) -> tuple[Tensor, Tensor | None]:
        """Prepare a forward of `width` new tokens for the rows from `first_row` on, row i starting at starts[i].

        Returns the positions [R, T] and the additive attention mask [R, 1, T, L], None where plain causal attention
        over the new tokens is the same.
        """
        device = self._kv[0].device
        start_R = torch.tensor(starts, device=device)
        position_RT = start_R[:, None] + torch.arange(width, device=device)
        row_R = torch.arange(first_row, first_row + len(starts), device=device)
        index_RT = row_R[:, None] * self._kv[0].shape[1] + position_RT
        slots = max(starts) + width
        is_fresh = width > 1 and not any(starts)
        self._span = _Span(first_row, len(starts), index_RT.flatten(), slots, is_fresh)
        if is_fresh:
            return position_RT, None
        visible_RTL = torch.arange(slots, device=device) <= position_RT[:, :, None]
        mask_RTL = torch.zeros(visible_RTL.shape, dtype=self._kv[0].dtype, device=device)
        return position_RT, mask_RTL.masked_fill_(~visible_RTL, float("-inf"))[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [R, H, T, D] of one layer; return those that attention reads, [R, H, L, D]."""
        span = self._span
        assert span is not None
        kept: list[Tensor] = []
        for kv_RLE, states_RHTD in zip(self._kv[2 * layer_idx :], (key_states, value_states), strict=False):
            size = kv_RLE.shape[2]
            kv_RLE.view(-1, size).index_copy_(0, span.index_N, states_RHTD.transpose(1, 2).reshape(-1, size))
            read_RLE = kv_RLE[span.first_row : span.first_row + span.num_rows, : span.num_slots]
            kept.append(read_RLE.view(span.num_rows, span.num_slots, self._heads, self._head_size).transpose(1, 2))
        return (key_states, value_states) if span.is_fresh else (kept[0], kept[1])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given to the model, never counted by the cache."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the sizes of a causal mask over the new tokens, for the forwards that bring no mask."""
        return query_length, 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of one row over another row."""
        for kv_RLE in self._kv:
            kv_RLE[target, :length] = kv_RLE[source, :length]

    def wipe(self, row: int) -> None:
        """Set all slots of a row to zero."""
        for kv_RLE in self._kv:
            kv_RLE[row].zero_()

    def read(self, row: int, length: int) -> Tensor:
        """Return a copy of the first `length` slots of a row, [N, T, E]."""
        return torch.stack([kv_RLE[row, :length] for kv_RLE in self._kv])

    def write(self, row: int, kv_NTE: Tensor) -> None:
        """Fill the first slots of a row with what `read` returned, or the beginning of it."""
        for kv_RLE, kv_TE in zip(self._kv, kv_NTE, strict=True):
            kv_RLE[row, : len(kv_TE)] = kv_TE


def common_prefix(a: TokenArray, b: TokenArray, at_least: int = 1) -> int:
    """Return how many tokens two sequences share at their beginning; 0 where fewer than `at_least`."""
    size = min(len(a), len(b))
    # Most sequences differ here already, and this looks at one token only.
    if size < at_least or a[at_least - 1] != b[at_least - 1]:
        return 0
    differs = a[:size] != b[:size]
    shared = int(differs.argmax()) if differs.any() else size
    return shared if shared >= at_least else 0


@dataclass(frozen=True, slots=True, eq=False)
class StoredPrefix:
    """Keys and values of the tokens of one recent prompt."""

    adapter: str | None
    tokens: TokenArray
    kv_NTE: Tensor


class PrefixStore:
    """Keys and values of recent prompts, least recently used ones dropped beyond `max_bytes`.

    A prompt that adds fewer than `min_tokens` to a stored one is not stored again: the agents of a step differ in
    their last lines only.
    """

    def __init__(self, max_bytes: int, min_tokens: int) -> None:
        self._max_bytes = max_bytes
        self._min_tokens = min_tokens
        self._entries: list[StoredPrefix] = []
        """The least recently used one first."""

    @property
    def nbytes(self) -> int:
        """Memory of all stored prompts."""
        return sum(entry.kv_NTE.nbytes for entry in self._entries)

    def find(self, adapter: str | None, tokens: TokenArray) -> tuple[StoredPrefix | None, int]:
        """Return the stored prompt that shares the longest beginning with `tokens`, and that length."""
        best, shared = None, 0
        for entry in self._entries:
            length = common_prefix(entry.tokens, tokens, shared + 1) if entry.adapter == adapter else 0
            if length:
                best, shared = entry, length
        if best is not None:
            self._entries.remove(best)
            self._entries.append(best)
        return best, shared

    def wants(self, adapter: str | None, tokens: TokenArray) -> bool:
        """Return whether a prompt is worth storing."""
        return len(tokens) - self.find(adapter, tokens)[1] >= self._min_tokens

    def put(self, entry: StoredPrefix) -> None:
        """Store a prompt that fits by itself; those that it extends go, and the least recently used ones beyond the limit."""
        if entry.kv_NTE.nbytes > self._max_bytes:
            return
        for old in self._entries[:]:
            if old.adapter == entry.adapter and common_prefix(old.tokens, entry.tokens, len(old.tokens)):
                self._entries.remove(old)
        self._entries.append(entry)
        while self.nbytes > self._max_bytes:
            del self._entries[0]

    def clear(self) -> None:
        """Forget every prompt."""
        self._entries.clear()
