"""Packs: several rows in one sequence behind the prompt tokens that they share, kept apart by the attention mask.

Between `lora_rows` and `lora_model`. Every prompt begins with the same system text; a pack computes it once for all its
rows, and rows of different length need little padding. Positions run as if every row stood alone, so that a pack gives
each row the very logits that it would have alone. Shape letters: N packs, T tokens of a pack, M target tokens of all
packs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from dmoa.training.lora_rows import Encoded


@dataclass(frozen=True, slots=True)
class Packs:
    """Rows laid out for one forward."""

    tokens_NT: Tensor
    positions_NT: Tensor
    mask_N1TT: Tensor
    """Bool: which earlier tokens each token attends to."""
    asked_M: Tensor
    """Index into the flattened [N * T] of the token whose logits predict each target token."""
    target_M: Tensor
    row_M: Tensor
    """Which of the given rows each target token belongs to."""


def pack(rows: Sequence[Encoded], rows_per_pack: int) -> Packs:
    """Lay rows out, `rows_per_pack` to a sequence; at least one row."""
    columns = zip(*(row.prompt[:-1] for row in rows), strict=False)  # every row keeps a token of its own to predict from
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    # Rows of like length side by side in turn, so that the packs come out equally long.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].prompt) + len(rows[number].target))
    num_packs = -(-len(rows) // rows_per_pack)
    groups = [order[first::num_packs] for first in range(num_packs)]
    width = max(shared + sum(_own(rows[number], shared) for number in group) for group in groups)
    tokens_NT = torch.zeros(num_packs, width, dtype=torch.long)
    positions_NT = torch.zeros(num_packs, width, dtype=torch.long)
    segment_NT = torch.full((num_packs, width), -1)
    asked: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    for index, group in enumerate(groups):
        tokens_NT[index, :shared] = torch.tensor(rows[group[0]].prompt[:shared])
        positions_NT[index, :shared] = torch.arange(shared)
        segment_NT[index, :shared] = 0
        start = shared
        for segment, number in enumerate(group, 1):
            row = rows[number]
            own = torch.tensor((*row.prompt[shared:], *row.target[:-1]))
            end = start + len(own)
            tokens_NT[index, start:end] = own
            positions_NT[index, start:end] = torch.arange(shared, shared + len(own))
            segment_NT[index, start:end] = segment
            asked.extend(index * width + place for place in range(end - len(row.target), end))
            target.extend(row.target)
            owner.extend([number] * len(row.target))
            start = end
    return Packs(tokens_NT, positions_NT, _mask(segment_NT), torch.tensor(asked), torch.tensor(target), torch.tensor(owner))


def _own(row: Encoded, shared: int) -> int:
    return len(row.prompt) - shared + len(row.target) - 1


def _mask(segment_NT: Tensor) -> Tensor:
    """A token sees what came before it in its own row and in the shared beginning; padding sees padding: it must see some."""
    width = segment_NT.shape[1]
    is_same_NTT = segment_NT[:, :, None] == segment_NT[:, None, :]
    is_shared_NTT = (segment_NT == 0)[:, None, :] & (segment_NT >= 0)[:, :, None]
    is_earlier_TT = torch.ones(width, width, dtype=torch.bool).tril()
    return ((is_same_NTT | is_shared_NTT) & is_earlier_TT)[:, None]
