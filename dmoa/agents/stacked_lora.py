"""Linear layers that add the LoRA of every row's own adapter, all adapters in two products.

The adapters of a layer lie side by side: one narrow product with all of them, what a row's adapter did not compute set to
zero, one product back. PEFT's mixed batches take the adapters one after another, which costs more than the layers
themselves where rows are few. Source of the method: ours (cf. the batched LoRA of Punica and S-LoRA).
Shape letters: B rows, T tokens, I inputs, O outputs, N adapters, M ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Layout:
    """Which columns of M belong to which adapter, and which of them the rows of the next forward use.

    Layers whose adapters have the same ranks share one.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        """`ranks` holds every adapter's rank in these layers, 0 where it leaves them alone."""
        ends = [sum(ranks[: number + 1]) for number in range(len(ranks))]
        self._spans = [(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]
        self._owner_M = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks, dtype=torch.long))
        self.span: tuple[int, int] = (0, 0)
        """Columns to compute, from and to; the same where no row has an adapter here."""
        self.mask_B1M: Tensor | None = None
        """True where a row has another adapter, of the columns of `span`; None: every row uses all of them."""

    def choose(self, adapters: Sequence[int | None], device: torch.device) -> None:
        """Set the adapter of every row of the next forwards by its number; None is the base model."""
        used = set(adapters)
        if len(used) == 1:
            (only,) = used
            self.span, self.mask_B1M = (0, 0) if only is None else self._spans[only], None
            return
        own_B = torch.tensor([-1 if number is None else number for number in adapters])
        self.span = (0, len(self._owner_M))
        self.mask_B1M = (own_B[:, None, None] != self._owner_M).to(device)


class StackedLora(nn.Module):
    """A linear layer with the LoRA of all adapters beside it."""

    def __init__(self, base: nn.Linear, down_IM: Tensor, up_MO: Tensor, layout: Layout) -> None:
        """`down_IM` and `up_MO` hold the adapters' A and B transposed, side by side, B with its scale in it."""
        super().__init__()
        self.base = base
        self.layout = layout
        self.register_buffer("down_IM", down_IM, persistent=False)
        self.register_buffer("up_MO", up_MO, persistent=False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return [B, T, O]."""
        y_BTO: Tensor = self.base(x_BTI)
        start, end = self.layout.span
        if start == end:
            return y_BTO
        down_IM: Tensor = self.down_IM  # type: ignore[assignment]
        up_MO: Tensor = self.up_MO  # type: ignore[assignment]
        low_BTM = x_BTI @ down_IM[:, start:end]
        if self.layout.mask_B1M is not None:
            # Filled, not multiplied: another row's adapter may give infinity here, and 0 x inf is NaN.
            low_BTM = low_BTM.masked_fill(self.layout.mask_B1M, 0.0)
        return y_BTO + low_BTM @ up_MO[start:end]
