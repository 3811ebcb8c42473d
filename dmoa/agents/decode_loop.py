"""The decode loop of the transformers engine: admit waiting sequences, decode one token for all rows, evict.

Runs in the engine's one thread and knows nothing of asyncio. `step` does one round; what happened to a sequence is
left in `events`. No paging, priorities or preemption. Shape letters: B rows that decode together, T new tokens of a
prefill, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmoa.agents.adapters import Adapters
from dmoa.agents.kv_cache import KvRows, PrefixStore, StoredPrefix, TokenArray, common_prefix
from dmoa.agents.loading import LoadedModel
from dmoa.agents.sampling import Draw, pick_tokens
from dmoa.agents.text_stream import TextStream
from dmoa.core.entropy import NOT_FINITE, EntropySums, token_entropy
from dmoa.errors import EngineError
from dmoa.types import FinishReason, Generation

PREFILL_TOKENS = 2048
"""Most tokens of one prefill, padding included: bounds its memory and how long running rows wait for it."""
MIN_SHARED_TOKENS = 16
"""Shortest prompt beginning worth copying from a running row or the store."""
SPLIT_TOKENS = 64
"""Shortest beginning shared by waiting prompts for which one goes ahead and the others follow in a prefill of their own.

The second forward costs as much as some 30 tokens more in the first (SmolLM2-135M on two cores: about even for three
prompts at 64 tokens, a third of the time at 256).
"""
PREFIX_BYTES = 256 << 20
"""Most memory kept for the beginnings of recent prompts."""


@dataclass(slots=True, kw_only=True, eq=False)
class Running:
    """One sequence from its arrival to its last token."""

    tokens: TokenArray
    """The prompt."""
    adapter: str | None
    max_tokens: int
    """Most new tokens, at least 1."""
    draw: Draw | None
    text: TextStream
    deadline_unix_s: float | None
    accepted_s: float
    """time.perf_counter() of the engine's accept."""
    on_text: Callable[[str], None]
    """Told every new piece of text."""
    on_done: Callable[[Generation | EngineError], None]
    """Told the whole generation, or why there is none, once."""
    outputs: list[int]
    sums: EntropySums
    cached_tokens: int = 0
    prefill_s: float | None = None
    """time.perf_counter() at the start of its prefill; None while it waits."""
    finish: FinishReason | None = None

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in its row: all but the newest output."""
        return len(self.tokens) + len(self.outputs) - 1

    def accept(self, token: int, entropy_nats: float, stop_tokens: frozenset[int]) -> None:
        """Take the next token; sets `finish` where it is the last one."""
        self.outputs.append(token)
        self.sums.add(entropy_nats)
        if token in stop_tokens:
            self.finish = "stop"
        else:
            piece = self.text.push(token)
            if piece:
                self.on_text(piece)
            if self.text.stopped:
                self.finish = "stop"
            elif len(self.outputs) >= self.max_tokens:
                self.finish = "length"

    def end(self) -> None:
        """Report the whole generation, whatever there is of it."""
        now = time.perf_counter()
        piece = self.text.finish()
        if piece:
            self.on_text(piece)
        self.on_done(
            Generation(
                text=self.text.text,
                finish_reason=self.finish or "length",
                entropy_sum_nats=self.sums.sum_nats,
                entropy_sq_sum=self.sums.sq_sum,
                entropy_tokens=self.sums.tokens,
                prompt_tokens=len(self.tokens),
                cached_tokens=self.cached_tokens,
                completion_tokens=len(self.outputs),
                engine_ms=(now - self.accepted_s) * 1e3,
                queue_ms=((self.prefill_s or now) - self.accepted_s) * 1e3,
            )
        )


@dataclass(slots=True)
class LoopTimes:
    """Where the loop's time went, since it was made."""

    steps: int = 0
    """Decode steps, prefills not counted."""
    decode_s: float = 0.0
    """Wall time of the decode steps."""
    prefill_s: float = 0.0
    entropy_s: float = 0.0
    """Part of decode_s in the entropy of the logits."""
    prefilled_tokens: int = 0
    """Prompt tokens computed, padding and reused ones not counted."""


class DecodeLoop:
    """Batches the waiting sequences of many agents and queries through one model."""

    def __init__(self, loaded: LoadedModel, adapters: Adapters, *, max_rows: int, has_prefix_cache: bool) -> None:
        self.times = LoopTimes()
        self._loaded = loaded
        self._adapters = adapters
        self._max_rows = max_rows
        self._rows: list[Running] = []
        self._waiting: list[Running] = []
        self._kv = KvRows(
            num_layers=loaded.num_layers,
            num_heads=loaded.num_heads,
            head_size=loaded.head_size,
            dtype=loaded.dtype,
            device=loaded.device,
        )
        self._prefixes = PrefixStore(PREFIX_BYTES if has_prefix_cache else 0, MIN_SHARED_TOKENS)
        self._has_prefix_cache = has_prefix_cache

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._rows and not self._waiting

    @property
    def num_running(self) -> int:
        """Rows in use."""
        return len(self._rows)

    def submit(self, sequence: Running) -> None:
        """Queue a sequence; it is admitted by a later step, first come first served."""
        self._waiting.append(sequence)

    def cancel(self, sequence: Running) -> None:
        """Forget a sequence, wherever it is; nothing more is told of it."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._rows:
            self._evict(self._rows.index(sequence))

    def clear(self) -> None:
        """Forget every sequence: after a failure nothing that is in their rows can be trusted."""
        self._rows.clear()
        self._waiting.clear()

    @property
    def held_bytes(self) -> int:
        """Memory of keys and values, of rows and of the beginnings of recent prompts."""
        return self._kv.nbytes + self._prefixes.nbytes

    def release_rows(self) -> None:
        """Give the memory of the rows back, which grew with the largest batch so far; only while idle."""
        assert self.is_idle
        self._kv.release()

    def release_prefixes(self) -> None:
        """Forget the beginnings of recent prompts."""
        self._prefixes.clear()

    def step(self) -> None:
        """Do one round: end what is late, admit what fits, decode one token for every row."""
        self._end_late()
        while self._waiting and len(self._rows) < self._max_rows:
            self._prefill(*self._next_group())
        if self._rows:
            self._decode()

    def _end_late(self) -> None:
        now = time.time()
        late = [s for s in (*self._rows, *self._waiting) if s.deadline_unix_s is not None and s.deadline_unix_s <= now]
        for sequence in late:
            self.cancel(sequence)
            sequence.finish = "length"
            sequence.end()

    def _next_group(self) -> tuple[list[Running], list[int]]:
        """Take waiting sequences for one prefill; return them with how many of their tokens are reused.

        The oldest always goes. Others join while padding stays small and unless they could reuse the prompt of one
        that is in the group already: they follow in the next group.
        """
        group: list[Running] = []
        starts: list[int] = []
        for sequence in list(self._waiting):
            if len(self._rows) + len(group) >= self._max_rows:
                break
            start = self._reusable(sequence) if self._has_prefix_cache else 0
            if group and (self._would_share(sequence, start, group) or not _fits(sequence, start, group, starts)):
                continue
            group.append(sequence)
            starts.append(start)
            self._waiting.remove(sequence)
        return group, starts

    def _would_share(self, sequence: Running, start: int, group: Sequence[Running]) -> bool:
        if not self._has_prefix_cache:
            return False
        return any(_shared(sequence, other) >= start + SPLIT_TOKENS for other in group)

    def _reusable(self, sequence: Running) -> int:
        """Return how many tokens of a waiting prompt have their keys and values in a running row or in the store."""
        stored = self._prefixes.find(sequence.adapter, sequence.tokens)[1]
        shared = max([stored, *(_shared(sequence, other) for other in self._rows)])
        # The last token is always computed: its logits are needed.
        shared = min(shared, len(sequence.tokens) - 1)
        return shared if shared >= MIN_SHARED_TOKENS else 0

    def _copy_prefix(self, row: int, sequence: Running, length: int) -> None:
        for other_row, other in enumerate(self._rows):
            if min(_shared(sequence, other), len(sequence.tokens) - 1) >= length:
                self._kv.move(other_row, row, length)
                return
        entry, _ = self._prefixes.find(sequence.adapter, sequence.tokens)
        assert entry is not None
        self._kv.write(row, entry.kv_NTE[:, :length])

    def _prefill(self, group: list[Running], starts: list[int]) -> None:
        began = time.perf_counter()
        first = len(self._rows)
        fresh = [len(sequence.tokens) - start for sequence, start in zip(group, starts, strict=True)]
        width = max(fresh)
        self._kv.reserve(first + len(group), max(starts) + width)
        token_BT = np.zeros((len(group), width), dtype=np.int64)
        for i, (sequence, start) in enumerate(zip(group, starts, strict=True)):
            sequence.prefill_s = began
            sequence.cached_tokens = start
            token_BT[i, : fresh[i]] = sequence.tokens[start:]
            if start:
                self._copy_prefix(first + i, sequence, start)
        self._rows += group
        kept = sorted(set(fresh))
        logits_BTV = self._forward(torch.from_numpy(token_BT), first, starts, [size - 1 for size in kept])
        last_B = torch.tensor([kept.index(size) for size in fresh], device=logits_BTV.device)
        logits_BV = logits_BTV[torch.arange(len(group), device=logits_BTV.device), last_B]
        self.times.prefilled_tokens += sum(fresh)
        self._take(group, logits_BV)
        self.times.prefill_s += time.perf_counter() - began

    def _decode(self) -> None:
        began = time.perf_counter()
        rows = list(self._rows)
        lengths = [sequence.length for sequence in rows]
        self._kv.reserve(len(rows), max(lengths) + 1)
        token_BT = torch.tensor([[sequence.outputs[-1]] for sequence in rows])
        logits_BTV = self._forward(token_BT, 0, lengths, None)
        self.times.entropy_s += self._take(rows, logits_BTV[:, -1])
        self.times.steps += 1
        self.times.decode_s += time.perf_counter() - began

    def _forward(self, token_BT: Tensor, first: int, starts: list[int], kept: list[int] | None) -> Tensor:
        """Run the model on new tokens of the rows from `first` on; return the logits at the positions `kept`."""
        device = self._loaded.device
        self._adapters.choose([sequence.adapter for sequence in self._rows[first : first + len(starts)]])
        position_BT, mask_B1TL = self._kv.begin(first, starts, token_BT.shape[1])
        run = self._loaded.decode if kept is None else self._loaded.model
        output = run(
            input_ids=token_BT.to(device),
            attention_mask=mask_B1TL,
            position_ids=position_BT,
            past_key_values=self._kv,
            use_cache=True,
            logits_to_keep=0 if kept is None else torch.tensor(kept, device=device),
        )
        logits_BTV: Tensor = output.logits
        return logits_BTV

    def _take(self, sequences: Sequence[Running], logits_BV: Tensor) -> float:
        """Pick and hand out the next token of every sequence, evict the finished; return the seconds spent on entropy."""
        began = time.perf_counter()
        entropies = token_entropy(logits_BV).tolist()
        entropy_s = time.perf_counter() - began
        tokens = pick_tokens(logits_BV, [sequence.draw for sequence in sequences]).tolist()
        broken = [sequence for sequence, entropy in zip(sequences, entropies, strict=True) if math.isnan(entropy)]
        for sequence, token, entropy in zip(sequences, tokens, entropies, strict=True):
            if not math.isnan(entropy):
                sequence.accept(token, entropy, self._loaded.stop_tokens)
        for sequence in broken:  # once every other row has its token: they may move
            self._give_up(sequence)
        for row in range(len(self._rows) - 1, -1, -1):
            sequence = self._rows[row]
            if sequence.finish is not None:
                self._evict(row)
                sequence.end()
        return entropy_s

    def _give_up(self, sequence: Running) -> None:
        """End a sequence whose logits are no distribution; whatever else runs goes on."""
        row = self._rows.index(sequence)
        # Its keys and values may hold NaN, which masking does not keep from those who use the row next: 0 x NaN is NaN.
        self._kv.wipe(row)
        self._evict(row, is_sound=False)
        adapter = f" with adapter {sequence.adapter!r}" if sequence.adapter else ""
        sequence.on_done(EngineError(f"token {len(sequence.outputs) + 1}{adapter}: {NOT_FINITE}"))

    def _evict(self, row: int, *, is_sound: bool = True) -> None:
        """Free a row: the last row moves into its place, its prompt's keys and values may be kept if they are sound."""
        sequence = self._rows[row]
        if is_sound:
            self._keep_prefix(row, sequence)
        last = self._rows.pop()
        if last is not sequence:
            self._rows[row] = last
            self._kv.move(len(self._rows), row, last.length)

    def _keep_prefix(self, row: int, sequence: Running) -> None:
        if not self._has_prefix_cache:
            return
        # A reply that a stop text ended is often continued, by the result of a tool: its own tokens are kept too.
        tokens = sequence.tokens
        if sequence.text.stopped:
            tokens = np.concatenate([tokens, np.array(sequence.outputs[:-1], dtype=np.int64)])
        if self._prefixes.wants(sequence.adapter, tokens):
            self._prefixes.put(StoredPrefix(sequence.adapter, tokens, self._kv.read(row, len(tokens))))


def _shared(sequence: Running, other: Running) -> int:
    """Return how many tokens of a prompt could be taken from another sequence's row, 0 where it is not worth it."""
    return common_prefix(sequence.tokens, other.tokens, MIN_SHARED_TOKENS) if sequence.adapter == other.adapter else 0


def _fits(sequence: Running, start: int, group: Sequence[Running], starts: Sequence[int]) -> bool:
    """Return whether a sequence may join a prefill: little padding, and not too many tokens in all."""
    fresh = [len(s.tokens) - at for s, at in zip((*group, sequence), (*starts, start), strict=True)]
    padded = max(fresh) * len(fresh)
    return padded <= PREFILL_TOKENS and padded <= 1.25 * sum(fresh) + MIN_SHARED_TOKENS
