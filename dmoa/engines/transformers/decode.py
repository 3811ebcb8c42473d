"""The decode loop of the `transformers` engine: prefill, batched steps with their entropy, token picks, and text as it forms.

Runs on the engine's one thread, which calls it with token sequences (`engine`); keys and values lie in `kv_cache`. Shape letters:
B sequences that decode together, V vocabulary, N the sampling ones among them, C candidates of the nucleus.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from dmoa.core.entropy import NOT_FINITE, token_entropy
from dmoa.core.entropy_scope import scoped_entropy, unscoped
from dmoa.core.reasoning import ReasoningSplitter
from dmoa.engines.chat_template import seed_of
from dmoa.engines.transformers.kv_cache import KvRows, PrefixStore, StoredPrefix, TokenArray, common_prefix
from dmoa.engines.transformers.load import LoadedModel
from dmoa.engines.transformers.lora import Adapters
from dmoa.errors import EngineError
from dmoa.types import FinishReason, Generation, Sampling, TextDelta, TokenUsage

_GREEDY_BELOW = 1e-4
"""Temperatures below this are greedy: the quotient would leave the range of float32."""
_CANDIDATES = 1024
"""Nucleus candidates looked at first: a whole sort of 49152 logits takes longer than all else in the step."""

_BROKEN = "\ufffd"

PREFILL_TOKENS = 2048
"""Most tokens of one prefill, padding included: bounds its memory and how long running rows wait for it."""
_PADDING = 0.0625
"""Most padding of a prefill, as a share of its tokens: on a CPU it costs as much as they do, a second forward next to nothing."""
MIN_SHARED_TOKENS = 16
"""Shortest prompt beginning worth copying from a running row or the store."""
SPLIT_TOKENS = 64
"""Shortest beginning shared by waiting prompts for which one goes ahead and the others follow in a prefill of their own.

The second forward costs as much as some 30 tokens more in the first (SmolLM2-135M on two cores: about even for three
prompts at 64 tokens, a third of the time at 256).
"""
PREFIX_BYTES = 256 << 20
"""Most memory kept for the beginnings of recent prompts."""
MASK_CELLS = 1 << 26
"""Most cells of an attention mask, 256 MiB: a longer prompt is computed from its beginning, where attention needs none."""


class Draw:
    """The random choices of one request: its temperature, its nucleus and its own stream of uniform numbers."""

    __slots__ = ("_generator", "temperature", "top_p")

    def __init__(self, sampling: Sampling, call_id: str) -> None:
        """Seed the stream by `seed_of`."""
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self._generator = torch.Generator().manual_seed(seed_of(sampling, call_id))

    def uniform(self) -> float:
        """Return the next number of the stream, in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def draw_for(sampling: Sampling, call_id: str) -> Draw | None:
    """Return the random choices of a request, None for a greedy one."""
    return None if sampling.temperature < _GREEDY_BELOW else Draw(sampling, call_id)


def pick_tokens(logits_BV: Tensor, draws: Sequence[Draw | None]) -> Tensor:
    """Return the next token of every row, [B] int64: the argmax where `draws` has None, else one sample.

    `logits_BV` are raw, after the entropy was taken from them. Advances the random stream of every sampling row by one number,
    so the same call gives the same sample whatever else is in its batch.
    """
    tokens_B = _argmax(logits_BV)
    rows = [row for row, draw in enumerate(draws) if draw is not None]
    if not rows:
        return tokens_B
    active = [draw for draw in draws if draw is not None]
    device = logits_BV.device
    temperature_N = torch.tensor([draw.temperature for draw in active], device=device)
    top_p_N = torch.tensor([draw.top_p for draw in active], device=device)
    uniform_N = torch.tensor([draw.uniform() for draw in active], dtype=torch.float64, device=device)
    index_N = torch.tensor(rows, device=device)
    probability_NV = torch.softmax(logits_BV[index_N].float() / temperature_N[:, None], dim=-1)
    tokens_B[index_N] = _invert(nucleus(probability_NV, top_p_N), uniform_N)
    return tokens_B


def _argmax(logits_BV: Tensor) -> Tensor:
    if logits_BV.is_cpu and logits_BV.dtype == torch.float32:
        # numpy's is vectorised: 0.2 instead of 2.8 ms for 32 rows of 49152 with torch 2.13.
        return torch.from_numpy(logits_BV.numpy().argmax(axis=-1))
    return logits_BV.argmax(dim=-1)


def nucleus(probability_NV: Tensor, top_p_N: Tensor) -> Tensor:
    """Return the probabilities with 0 outside the smallest set whose mass reaches top_p; rows are not rescaled.

    The most probable token always stays; a row with top_p = 1 is returned unchanged.
    """
    if bool((top_p_N >= 1.0).all()):
        return probability_NV
    vocabulary = probability_NV.shape[1]
    top_NC, index_NC = probability_NV.topk(min(_CANDIDATES, vocabulary), dim=-1)
    limited_N = top_p_N < 1.0
    if bool((top_NC.sum(dim=-1) < top_p_N)[limited_N].any()):
        top_NC, index_NC = probability_NV.sort(dim=-1, descending=True)
    before_NC = top_NC.cumsum(dim=-1) - top_NC
    kept_NC = top_NC.masked_fill(before_NC >= top_p_N[:, None], 0.0)
    kept_NV = torch.zeros_like(probability_NV).scatter_(1, index_NC, kept_NC)
    return torch.where(limited_N[:, None], kept_NV, probability_NV)


def _invert(weight_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Invert every row's cumulative distribution at `uniform_N`, in vocabulary order: rounding swaps no near ones."""
    cumulative_NV = weight_NV.double().cumsum(dim=-1)
    total_N = cumulative_NV[:, -1]
    # Below the total even after rounding, so that the token found has a probability above 0.
    target_N = torch.minimum(uniform_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    return torch.searchsorted(cumulative_NV, target_N[:, None], right=True).squeeze(1)


class TextStream:
    """Decodes one reply token by token, and finds the stop text that ends it."""

    __slots__ = ("_decoder", "_ends", "_keeps_special", "_longest", "_sent", "_stop", "_tokenizer", "_tokens", "stopped", "text")

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, keeps_special: bool = False) -> None:
        """`tokenizer` is a `tokenizers.Tokenizer`; empty stop texts are ignored. `keeps_special`: special tokens are text."""
        self._tokenizer = tokenizer
        self._keeps_special = keeps_special
        self._decoder = DecodeStream(skip_special_tokens=not keeps_special)
        self._stop = tuple(text for text in stop if text)
        self._longest = max(map(len, self._stop), default=1)
        self._tokens: list[int] = []
        self.text = ""
        """All text so far, without the stop text and without a character whose bytes are not complete."""
        self._ends: list[int] = []
        """Where in the text each token ends; tokens amid a character end where the one before does."""
        self._sent = 0
        self.stopped = False
        """Whether a stop text was met; the text ends before it."""

    def pieces(self, tokens: int) -> list[str]:
        """Return the text of each of so many tokens, as the whole text has it; of a stop token it is empty."""
        found = [self.text[start:end] for start, end in pairwise((0, *self._ends))]
        return found + [""] * (tokens - len(found))

    def push(self, token: int) -> str:
        """Take one token; return the text that may be shown now: it cannot be part of a stop text."""
        self._tokens.append(token)
        piece = self._decoded(token)
        if piece:
            self._extend(piece)
        self._ends.append(len(self.text))
        return self._release(0 if self.stopped else self._held())

    def finish(self) -> str:
        """Return the text still held back, once the reply has ended; bytes of an incomplete character are dropped."""
        if not self.stopped:
            # The decoder holds back everything of a token that ends amid a character, its whole characters too.
            whole = self._tokenizer.decode(self._tokens, skip_special_tokens=not self._keeps_special).rstrip(_BROKEN)
            if whole.startswith(self.text):
                self._extend(whole[len(self.text) :])
        return self._release(0)

    def _decoded(self, token: int) -> str:
        """Return the text that the newest token adds; bytes before it that are no text are left out where they spoil what was."""
        try:
            return self._decoder.step(self._tokenizer, token) or ""
        except Exception:  # tokenizers has no other: bytes that are no text have changed how those before them are decoded
            self._decoder = DecodeStream(ids=[token], skip_special_tokens=not self._keeps_special)
            before, after = (
                self._tokenizer.decode(tokens, skip_special_tokens=not self._keeps_special)
                for tokens in (self._tokens[:-1], self._tokens)
            )
            return str(after[len(before) :]) if after.startswith(before) else ""

    def _extend(self, piece: str) -> None:
        start = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        found = [at for at in (self.text.find(stop, start) for stop in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held(self) -> int:
        """Return how many characters at the end could be the beginning of a stop text."""
        for size in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, held: int) -> str:
        end = max(self._sent, len(self.text) - held)
        fresh = self.text[self._sent : end]
        self._sent = end
        return fresh


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
    on_text: Callable[[TextDelta], None]
    """Told every new piece of text, and of the thought before it."""
    on_done: Callable[[Generation | EngineError], None]
    """Told the whole generation, or why there is none, once."""
    outputs: list[int]
    splitter: ReasoningSplitter = field(default_factory=ReasoningSplitter)
    opening: str = ""
    """What the chat template opened the thought with."""
    nats: list[float] = field(default_factory=list)
    """Entropy of each of the outputs."""
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
        self.nats.append(entropy_nats)
        if token in stop_tokens:
            self.finish = "stop"
        else:
            piece = self.text.push(token)
            self._say(self.splitter.feed(piece))
            if self.text.stopped:
                self.finish = "stop"
            elif len(self.outputs) >= self.max_tokens:
                self.finish = "length"

    def _say(self, deltas: Sequence[TextDelta]) -> None:
        for delta in deltas:
            self.on_text(delta)

    def end(self) -> None:
        """Report the whole generation, whatever there is of it."""
        now = time.perf_counter()
        self._say(self.splitter.feed(self.text.finish()))
        self._say(self.splitter.close())
        split = self.splitter.split()
        has_thought = split.is_open or split.text != self.text.text
        entropy = scoped_entropy(self.text.pieces(len(self.nats)), self.nats, split) if has_thought else unscoped(self.nats)
        self.on_done(
            Generation(
                text=split.text,
                reasoning=split.reasoning,
                raw=self.opening + self.text.text if has_thought else "",
                finish_reason=self.finish or "length",
                entropy=entropy.answer,
                reasoning_entropy=entropy.thought,
                usage=TokenUsage(
                    prompt_tokens=len(self.tokens),
                    cached_tokens=self.cached_tokens,
                    completion_tokens=len(self.outputs),
                    reasoning_tokens=entropy.thought_tokens,
                ),
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
        self._kv.release()  # some layers may have grown and others not, where memory ran out

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

    def close(self) -> None:
        """Give all memory back, the model's too."""
        self.clear()
        self.release_prefixes()
        del self._loaded

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
        """Take waiting sequences for one prefill, the oldest first; return them with how many of their tokens are reused."""
        group: list[Running] = []
        starts: list[int] = []
        oldest = len(self._waiting[0].tokens)
        for sequence in sorted(self._waiting, key=lambda one: abs(len(one.tokens) - oldest)):
            if len(self._rows) + len(group) >= self._max_rows:
                break
            start = self._reusable(sequence) if self._has_prefix_cache else 0
            # Who could reuse the prompt of one in the group follows in the next.
            if group and (self._would_share(sequence, start, group) or not _fits(sequence, start, group, starts)):
                continue
            group.append(sequence)
            starts.append(start)
            self._waiting.remove(sequence)
        order = sorted(range(len(group)), key=lambda row: group[row].adapter or "")  # rows of an adapter lie together
        return [group[row] for row in order], [starts[row] for row in order]

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
        is_bounded = (len(sequence.tokens) - shared) * len(sequence.tokens) <= MASK_CELLS
        return shared if shared >= MIN_SHARED_TOKENS and is_bounded else 0

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
        if logits_BV.is_cuda:
            torch.cuda.synchronize(logits_BV.device)  # else the forward, which still runs there, would count as entropy
        began = time.perf_counter()
        entropies = token_entropy(logits_BV).tolist()
        entropy_s = time.perf_counter() - began
        tokens = pick_tokens(logits_BV, [sequence.draw for sequence in sequences]).tolist()
        broken = [sequence for sequence, entropy in zip(sequences, entropies, strict=True) if math.isnan(entropy)]
        for sequence, token, entropy in zip(sequences, tokens, entropies, strict=True):
            if not math.isnan(entropy):
                sequence.accept(token, entropy, self._loaded.stop_tokens)
        # Their keys and values may hold NaN, which masking does not keep from those who use the rows next: 0 x NaN is NaN.
        for sequence in broken:
            self._kv.wipe(self._rows.index(sequence))
        for sequence in broken:  # once every other row has its token, and no row holds NaN: rows move
            self._give_up(sequence)
        for row in range(len(self._rows) - 1, -1, -1):
            sequence = self._rows[row]
            if sequence.finish is not None:
                self._evict(row)
                sequence.end()
        return entropy_s

    def _give_up(self, sequence: Running) -> None:
        """End a sequence whose logits are not a distribution; whatever else runs goes on."""
        self._evict(self._rows.index(sequence), is_sound=False)
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
    return padded <= PREFILL_TOKENS and padded <= (1 + _PADDING) * sum(fresh) + MIN_SHARED_TOKENS
