"""Keeps entropies of tokens by request and output position, for an engine whose decode steps are not reported.

The sampler hands over the logits of every row of its batch (`engines/vllm/entropy`); the server takes the sums of a request once
it knows how many tokens came out. Shape letters: B rows of the engine's batch, V vocabulary, R rows of the store, P output
positions, N requests that are taken, C cuts between text and thought.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dmoa.core.entropy import token_entropy
from dmoa.types import EntropySum

_FIRST_ROWS = 32
_FIRST_POSITIONS = 256


class RequestSums(NamedTuple):
    """What is known of a finished request, the tokens of its thought apart from those of its text."""

    sum_nats: float
    """NaN where logits of a position that counts were not a distribution, or were never written."""
    sq_sum: float
    tokens: int
    """Positions that were counted."""
    thought_nats: float = 0.0
    thought_sq_sum: float = 0.0
    thought_tokens: int = 0

    @property
    def text(self) -> EntropySum:
        """The sums over the text."""
        return EntropySum(sum_nats=self.sum_nats, sq_sum=self.sq_sum, tokens=self.tokens)

    @property
    def thought(self) -> EntropySum:
        """The sums over the thought."""
        return EntropySum(sum_nats=self.thought_nats, sq_sum=self.thought_sq_sum, tokens=self.thought_tokens)


Wanted = tuple[str, int, *tuple[int, ...]]
"""A request, how many of its first tokens count, and where its thoughts begin and end in turn."""


@dataclass(slots=True)
class _Entry:
    """One request that nobody has asked for yet."""

    row: int
    outputs: Sequence[int]
    """The engine's own growing list of output tokens: its length is the position that is decoded next."""
    index: int | None
    """Its place in the engine's batch; None while it has none."""
    num_seen: int = 0
    """Positions from 0 on that may have been written."""


class EntropyStore:
    """Entropy by request and position, on the engine's device; nothing is copied to the host before it is asked for."""

    # Rows may be written more often than tokens come out (parts of a prompt, steps done again after a preemption, one step more
    # than was asked for), so the last write of a position counts, and positions behind the reply's end do not.

    def __init__(self, device: torch.device, *, is_pinned: bool = False) -> None:
        """`is_pinned`: whether index lists go to the device from pinned memory, which makes their copies asynchronous."""
        self._device = device
        self._is_pinned = is_pinned
        self._nats_RP = torch.zeros(_FIRST_ROWS, _FIRST_POSITIONS, device=device)
        self._free = list(range(_FIRST_ROWS))
        self._entries: dict[str, _Entry] = {}
        self._at: dict[int, str] = {}

    def __len__(self) -> int:
        """Requests that something is kept of."""
        return len(self._entries)

    # What becomes of the engine's batch, in the order in which the engine tells it: removed, added, moved.

    def remove(self, index: int) -> None:
        """The row at a batch index is gone."""
        key = self._at.pop(index, None)
        if key is not None:
            self._entries[key].index = None

    def add(self, index: int, key: str | None, outputs: Sequence[int]) -> None:
        """A request takes a batch index, in place of whatever was there; key None: one that nobody will ask for."""
        self.remove(index)
        if key is None:
            return
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = _Entry(self._new_row(), outputs, index)
        else:  # it was preempted, and comes back with the tokens it has
            entry.outputs, entry.index = outputs, index
            entry.num_seen = min(entry.num_seen, len(outputs))  # what was sampled behind them was for nothing
        self._at[index] = key

    def move(self, source: int, target: int, *, swaps: bool) -> None:
        """The row of one batch index goes to another, or the two change places."""
        moved, there = self._at.pop(source, None), self._at.pop(target, None)
        self._place(moved, target)
        self._place(there, source if swaps else None)

    def _place(self, key: str | None, index: int | None) -> None:
        if key is not None:
            self._entries[key].index = index
            if index is not None:
                self._at[index] = key

    def write(self, logits_BV: Tensor) -> None:
        """Keep the entropy of every row of the batch at the position that its request decodes now; waits for no device."""
        targets = []
        for index, key in self._at.items():
            if index < len(logits_BV):
                entry = self._entries[key]
                targets.append((index, entry.row, position := len(entry.outputs)))
                entry.num_seen = max(entry.num_seen, position + 1)
        if not targets:
            return
        self._reserve(max(position for _, _, position in targets) + 1)
        index_B3 = torch.tensor(targets)
        if self._is_pinned:
            index_B3 = index_B3.pin_memory()
        batch_B, row_B, position_B = index_B3.to(self._device, non_blocking=True).unbind(1)
        everyone = len(targets) == len(logits_BV)
        nats_B = token_entropy(logits_BV if everyone else logits_BV[batch_B])
        self._nats_RP[row_B, position_B] = nats_B[batch_B] if everyone else nats_B

    def take(self, wanted: Iterable[Wanted]) -> dict[str, RequestSums]:
        """Return the sums of requests over their first so many tokens, in one copy, and forget them.

        Requests that are not known are left out. With 0 tokens a request is only forgotten. Each may be wanted once.
        """
        known = [(key, tokens, tuple(cuts)) for key, tokens, *cuts in wanted if key in self._entries]
        counts = [min(tokens, self._entries[key].num_seen) for key, tokens, _ in known]
        found: dict[str, RequestSums] = {}
        if any(counts):
            rows = torch.tensor([self._entries[key].row for key, _, _ in known], device=self._device)
            sums = _sums(self._nats_RP[rows, : max(counts)].double(), counts, [cuts for _, _, cuts in known]).tolist()
            for (key, _, _), ((nats, squares, tokens), (thought, its_squares, its_tokens)) in zip(known, sums, strict=True):
                found[key] = RequestSums(nats, squares, int(tokens), thought, its_squares, int(its_tokens))
        for key, _, _ in known:
            entry = self._entries.pop(key)
            self._free.append(entry.row)
            if entry.index is not None:  # an engine may run one step more: nothing of it is kept
                del self._at[entry.index]
        return found

    def _new_row(self) -> int:
        if not self._free:
            rows = len(self._nats_RP)
            self._nats_RP = torch.cat([self._nats_RP, torch.zeros_like(self._nats_RP)])
            self._free = list(range(rows, 2 * rows))
        row = self._free.pop()
        self._nats_RP[row] = torch.nan  # the last request's entropies are not this one's
        return row

    def _reserve(self, positions: int) -> None:
        have = self._nats_RP.shape[1]
        if positions > have:
            more = max(positions, 2 * have) - have
            self._nats_RP = torch.nn.functional.pad(self._nats_RP, (0, more), value=torch.nan)


def _sums(nats_NP: Tensor, counts: list[int], cuts: list[tuple[int, ...]]) -> Tensor:
    """Return sum, sum of squares and number of the first positions outside and inside of thoughts, [N, 2, 3]."""
    width, device = nats_NP.shape[1], nats_NP.device
    position_P = torch.arange(width, device=device)
    counted_NP = position_P < torch.tensor(counts, device=device)[:, None]
    masks = [counted_NP]
    if most := max(map(len, cuts)):
        cut_NC = torch.tensor([[*row, *[width] * (most - len(row))] for row in cuts], device=device)
        inside_NP = (position_P[:, None] >= cut_NC[:, None, :]).sum(dim=2) % 2 == 1
        masks = [counted_NP & ~inside_NP, counted_NP & inside_NP]
    parts = []
    for mask_NP in masks:
        kept_NP = nats_NP.masked_fill(~mask_NP, 0.0)
        parts.append(torch.stack([kept_NP.sum(dim=1), kept_NP.square().sum(dim=1), mask_NP.sum(dim=1)], dim=1))
    return torch.stack(parts if most else [*parts, torch.zeros_like(parts[0])], dim=1)
