"""Embeds sentences, the query and the summary, for the gate to read.

`MiniLmEncoder` (the home of sentence-transformers) works behind an async front (`AsyncEncoder`); `HashEncoder` stands in
without a model. Shape letters: N texts, C chunks of one text, D embedding (384).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmoa.errors import ModelFetchError
from dmoa.types import FloatArray

_LOG = logging.getLogger("dmoa.encoder")
D = 384
"""Width of an embedding of all-MiniLM-L6-v2, and of the stand-in."""


class MiniLmEncoder:
    """all-MiniLM-L6-v2 on the CPU, with a cache. Source of the chunked mean: ours. Safe in several threads.

    A text's embedding does not depend on what else is asked for, bit for bit: every chunk runs alone at its own length
    (in a padded batch it differs by about 1e-7, and padding to one fixed length costs several times more).
    """

    def __init__(self, model_dir: Path, *, threads: int = 1, cache_size: int = 4096, is_quick: bool = False) -> None:
        """Load the model from a folder (`models.fetch("minilm")`); blocks for seconds, most of it imports.

        `threads` is how many CPU threads a forward pass uses, `cache_size` how many texts are remembered (1.5 KiB each).
        `is_quick`: matrix products in bfloat16 where the CPU has them (`has_bfloat16`), in about half the time. Cosines to exact
        embeddings stay above .9999; of 600 first decisions trained gates changed none, an untrained one 1 (int8: 5 to 26 %).
        Raises ModelFetchError for a folder without the model.
        """
        if not (model_dir / "modules.json").is_file():
            raise ModelFetchError(f"encoder: {str(model_dir)!r} holds no sentence encoder; get one by `dmoa models fetch minilm`")
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(model_dir), device="cpu", local_files_only=True)
        self._model.eval()
        self._bert = _bert_of(self._model, in_bfloat16=is_quick and has_bfloat16())
        self._chunk_tokens = int(self._model.max_seq_length) - 2  # word pieces besides [CLS] and [SEP]
        self._threads = threads
        self._cache_size = cache_size
        self._cache: OrderedDict[bytes, FloatArray] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._model_lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Return [N, D] float32, rows of unit length; a text without word pieces (empty, blanks) is a row of zeros.

        A text of more than 254 word pieces is cut into the fewest chunks that fit, as equal in length as possible; its
        row is the mean of theirs, scaled to unit length.
        """
        rows: list[FloatArray] = []
        for text in texts:
            row = self.cached(text)
            rows.append(self._remember(text, self._encode_one(text)) if row is None else row)
        return np.stack(rows) if rows else np.zeros((0, D), np.float32)

    def cached(self, text: str) -> FloatArray | None:
        """Return the remembered embedding of a text, [D] float32, read-only; None if it must be computed."""
        key = _digest(text)
        with self._cache_lock:
            row = self._cache.get(key)
            if row is not None:
                self._cache.move_to_end(key)
            return row

    def _remember(self, text: str, row: FloatArray) -> FloatArray:
        row.flags.writeable = False
        with self._cache_lock:
            self._cache[_digest(text)] = row
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return row

    def _encode_one(self, text: str) -> FloatArray:
        # The tokenizer refuses lone surrogates; JSON can carry them.
        clean = text.encode("utf-8", "replace").decode("utf-8")
        with self._model_lock:
            # Split, so that a text which names a special token, such as [SEP], holds none.
            found = self._model.tokenizer(clean, add_special_tokens=False, split_special_tokens=True, verbose=False)
            ids: list[int] = found["input_ids"]
            if not ids:
                return np.zeros(D, np.float32)
            num_chunks = -(-len(ids) // self._chunk_tokens)
            with _torch_threads(self._threads):
                chunks = [self._forward(chunk.tolist()) for chunk in np.array_split(np.asarray(ids), num_chunks)]
        if num_chunks == 1:
            return chunks[0]
        mean_D = np.stack(chunks).astype(np.float64).mean(axis=0)
        unit_D: FloatArray = (mean_D / np.linalg.norm(mean_D)).astype(np.float32)
        return unit_D

    def _forward(self, ids: list[int]) -> FloatArray:
        import torch

        tokenizer = self._model.tokenizer
        with torch.inference_mode():
            row: FloatArray = self._bert(torch.tensor([tokenizer.cls_token_id, *ids, tokenizer.sep_token_id])).numpy().copy()
        return row


@dataclass(slots=True)
class _Turn:
    """Texts that the worker thread will encode in one go."""

    texts: list[str]
    rows: Future[FloatArray]


class AsyncEncoder:
    """Implements `protocols.Encoder` over a `MiniLmEncoder`: one worker thread, so the event loop never waits for torch.

    Texts that arrive while the thread is busy are merged into its next turn; remembered texts need no turn at all.
    """

    def __init__(self, encoder: MiniLmEncoder) -> None:
        self._encoder = encoder
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dmoa-encoder")
        self._lock = threading.Lock()
        self._open: list[_Turn] = []
        """At most one: the turn that has not begun."""

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        """Return one float32 [D] per text, in order: unit length, or zeros for a text without word pieces."""
        known = [self._encoder.cached(text) for text in texts]
        found = [row for row in known if row is not None]
        if len(found) == len(texts):
            return found
        with self._lock:
            if not self._open:
                self._open.append(_Turn(texts=[], rows=self._executor.submit(self._run_turn)))
            turn = self._open[0]
            start = len(turn.texts)
            turn.texts.extend(texts)
        # Shielded: a waiter that is cancelled must not cancel the turn that others share.
        rows = await asyncio.shield(asyncio.wrap_future(turn.rows))
        return list(rows[start : start + len(texts)])

    def _run_turn(self) -> FloatArray:
        with self._lock:
            turn = self._open.pop()
        return self._encoder.encode(turn.texts)


class HashEncoder:
    """A stand-in for unit tests and for measuring overhead: implements `protocols.Encoder` without a model or torch.

    A text's embedding is a random unit vector seeded by its hash: equal texts agree, all others are unrelated, so it
    carries no meaning. The empty text is zeros, as with MiniLM.
    """

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        """Return one float32 [D] per text: unit length, or zeros for the empty text."""
        return [self._row(text) for text in texts]

    def _row(self, text: str) -> FloatArray:
        if not text.strip():
            return np.zeros(D, np.float32)
        row = np.random.default_rng(int.from_bytes(_digest(text), "big")).standard_normal(D)
        unit: FloatArray = (row / np.linalg.norm(row)).astype(np.float32)
        return unit


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether this machine's CPU multiplies bfloat16 by itself; False where nothing is known of it."""
    try:
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


_PROBE = [101, 2129, 2116, 18108, 2024, 2187, 1029, 102]
"""Word pieces by which a forward pass is compared with the model's own."""
_TOLERANCE = 1e-5


class _Bert:
    """A sentence encoder's forward pass over one text, in two thirds of the time that its own takes.

    One text without padding needs no masks, and little of what transformers does around a layer; the three projections of a layer
    are one product. Float32 gives the model's own numbers, to the bit where this was tried.
    """

    def __init__(self, model: Any, *, in_bfloat16: bool) -> None:
        """`in_bfloat16`: products alone. Raises AttributeError for a model that is built otherwise."""
        import torch

        bert = model[0].auto_model
        self._kind = torch.bfloat16 if in_bfloat16 else torch.float32
        self._num_heads = bert.config.num_attention_heads
        self._words = bert.embeddings.word_embeddings.weight.detach()
        kinds_KD, places_LD = bert.embeddings.token_type_embeddings.weight, bert.embeddings.position_embeddings.weight
        self._places = (places_LD + kinds_KD[0]).detach()
        self._norm = bert.embeddings.LayerNorm
        self._layers = [
            (
                self._product(layer.attention.self.query, layer.attention.self.key, layer.attention.self.value),
                self._product(layer.attention.output.dense),
                layer.attention.output.LayerNorm,
                self._product(layer.intermediate.dense),
                self._product(layer.output.dense),
                layer.output.LayerNorm,
            )
            for layer in bert.encoder.layer
        ]

    def _product(self, *parts: Any) -> Callable[[Any], Any]:
        import torch

        weight, bias = (torch.cat([getattr(x, name).detach() for x in parts]).to(self._kind) for name in ("weight", "bias"))
        return lambda x: torch.nn.functional.linear(x.to(self._kind), weight, bias).to(torch.float32)

    def __call__(self, ids: Any) -> Any:
        """Return the embedding, [D], of word pieces [L]."""
        import torch

        length, functional = len(ids), torch.nn.functional
        x = self._norm(self._words[ids] + self._places[:length])
        for project, mix, norm_mixed, widen, narrow, norm_out in self._layers:
            q, k, v = project(x).view(length, 3, self._num_heads, -1).permute(1, 2, 0, 3)
            seen = functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            x = norm_mixed(mix(seen.transpose(0, 1).reshape(length, -1)) + x)
            x = norm_out(narrow(functional.gelu(widen(x))) + x)
        return functional.normalize(x.mean(0), dim=0)


def _bert_of(model: Any, *, in_bfloat16: bool) -> Callable[[Any], Any]:
    """Return the quick forward pass of a model; its own, in float32, where the quick one does not give its numbers."""
    import torch

    def whole(ids: Any) -> Any:
        return model({"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])})["sentence_embedding"][0]

    try:
        quick, probe = _Bert(model, in_bfloat16=in_bfloat16), torch.tensor(_PROBE)
        with torch.inference_mode():
            apart = (quick(probe) - whole(probe)).abs().max().item()
    except (AttributeError, RuntimeError) as error:
        _LOG.warning("encoder: the model is built otherwise than expected, and run as it is: %s", error)
        return whole
    if apart > (_TOLERANCE * 1e3 if in_bfloat16 else _TOLERANCE):
        _LOG.warning("encoder: the quick numbers are %.1e from the model's, which is run as it is", apart)
        return whole
    return quick


@contextmanager
def _torch_threads(wanted: int) -> Iterator[None]:
    """Run torch with `wanted` threads and restore the number after: an engine in the same process sets its own."""
    import torch

    before = torch.get_num_threads()
    if before == wanted:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
