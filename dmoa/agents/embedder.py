"""Embeds sentences, the query and the summary, for the gate to read.

`MiniLmEncoder` (the home of sentence-transformers) works behind an async front (`AsyncEncoder`); `HashEncoder` stands in
without a model. Shape letters: N texts, C chunks of one text, D embedding (384).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dmoa.errors import ModelFetchError
from dmoa.types import FloatArray

_LOG = logging.getLogger("dmoa.encoder")
D = 384
"""Width of an embedding of all-MiniLM-L6-v2, and of the stand-in."""
MAX_CHUNKS = 32
"""Of a text, 8,128 word pieces: one encoder works for all clients, and a book would keep them waiting for a minute."""


class MiniLmEncoder:
    """all-MiniLM-L6-v2 on the CPU, with a cache. Source of the chunked mean: ours. Safe in several threads.

    A text's embedding does not depend on what else is asked for, bit for bit: every chunk runs at its own length, alone, or in
    one pass with others where that gives the same bits.
    """

    def __init__(self, model_dir: Path, *, cache_size: int = 4096, is_quick: bool = False) -> None:
        """Load the model from a folder (`models.fetch("minilm")`); blocks for seconds, most of it imports.

        A forward pass takes one thread. `cache_size`: how many texts are remembered (1.5 KiB each).
        `is_quick`: matrix products in bfloat16 where the CPU has them (`has_bfloat16`), in about half the time. Cosines to exact
        embeddings stay above .9999; of 600 first decisions trained gates changed none, an untrained one 1 (int8: 1 to 26 %).
        Elsewhere new texts share passes in float32, by products that may differ from the model's in the last bit.
        Raises ModelFetchError for a folder without the model.
        """
        if not (model_dir / "modules.json").is_file():
            raise ModelFetchError(f"encoder: {str(model_dir)!r} holds no sentence encoder; get one by `dmoa models fetch minilm`")
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(model_dir), device="cpu", local_files_only=True)
        self._model.eval()
        self._bert = _bert_of(self._model, in_bfloat16=is_quick and has_bfloat16(), together=is_quick)
        self._model.tokenizer("", split_special_tokens=True)  # sets it, as no two threads may at once
        self._chunk_tokens = int(self._model.max_seq_length) - 2  # word pieces besides [CLS] and [SEP]
        self._cache_size = cache_size
        self._cache: OrderedDict[bytes, FloatArray] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._model_lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Return [N, D] float32, rows of unit length; a text without word pieces (empty, blanks) is a row of zeros.

        A text of more than 254 word pieces is cut into the fewest chunks that fit, as equal in length as possible; its
        row is the mean of theirs, scaled to unit length. Of more than `MAX_CHUNKS`, so many are read, spread evenly over it.
        """
        rows = {text: row for text in texts if (row := self.cached(text)) is not None}
        new = [text for text in dict.fromkeys(texts) if text not in rows]
        rows.update((text, self._remember(text, row)) for text, row in zip(new, self._encode_new(new), strict=True))
        return np.stack([rows[text] for text in texts]) if texts else np.zeros((0, D), np.float32)

    def cached(self, text: str) -> FloatArray | None:
        """Return the remembered embedding of a text, [D] float32, read-only; None if it must be computed."""
        key = _digest(text)
        with self._cache_lock:
            if (row := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
            return row

    def _remember(self, text: str, row: FloatArray) -> FloatArray:
        row.flags.writeable = False
        with self._cache_lock:
            self._cache[_digest(text)] = row
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return row

    def _encode_new(self, texts: Sequence[str]) -> list[FloatArray]:
        import torch

        from dmoa.core.inference import one_thread

        chunks, rows = [self._chunks(text) for text in texts], list[FloatArray]()
        packs = _packs([chunk for some in chunks for chunk in some])
        for number, pack in enumerate(packs):
            if number:
                time.sleep(_PAUSE_S)
            # On one thread, and as many as before after it: an engine in the same process sets its own.
            with self._model_lock, one_thread(), torch.inference_mode():
                rows += [row.numpy().copy() for row in self._bert(list(map(torch.tensor, pack)))]
        ends = np.cumsum([0, *map(len, chunks)])
        return [_mean(rows[start:end]) for start, end in pairwise(ends)]

    def _chunks(self, text: str) -> list[list[int]]:
        # It refuses lone surrogates, which JSON can carry. Split, so that a text which names a special token, [SEP], holds none.
        clean, tokenizer = text.encode("utf-8", "replace").decode("utf-8"), self._model.tokenizer
        ids: list[int] = tokenizer(clean, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        parts = np.array_split(np.asarray(ids), -(-len(ids) // self._chunk_tokens)) if ids else []
        if len(parts) > MAX_CHUNKS:
            parts = [parts[number * (len(parts) - 1) // (MAX_CHUNKS - 1)] for number in range(MAX_CHUNKS)]
        return [[tokenizer.cls_token_id, *part.tolist(), tokenizer.sep_token_id] for part in parts]


def _mean(rows: Sequence[FloatArray]) -> FloatArray:
    if len(rows) < 2:
        return rows[0] if rows else np.zeros(D, np.float32)
    mean_D = np.stack(rows).astype(np.float64).mean(axis=0)
    unit_D: FloatArray = (mean_D / np.linalg.norm(mean_D)).astype(np.float32)
    return unit_D


@dataclass(slots=True)
class _Turn:
    """Texts that the worker thread will encode in one go."""

    texts: list[str]
    rows: Future[FloatArray]


class AsyncEncoder:
    """Implements `protocols.Encoder` over a `MiniLmEncoder`: worker threads, so the event loop never waits for torch.

    One works for each `size_class`. Texts that arrive while it is busy are merged into its next turn; remembered texts need none.
    """

    def __init__(self, encoder: MiniLmEncoder) -> None:
        self._encoder = encoder
        self._workers = defaultdict[int, ThreadPoolExecutor](partial(ThreadPoolExecutor, 1, "dmoa-encoder"))
        self._lock = threading.Lock()
        self._open: dict[int, _Turn] = {}
        """By class, the turn that has not begun."""

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        """Return one float32 [D] per text, in order: unit length, or zeros for a text without word pieces."""
        known = [self._encoder.cached(text) for text in texts]
        found = [row for row in known if row is not None]
        if len(found) == len(texts):
            return found
        size = size_class(texts)
        with self._lock:
            if size not in self._open:
                self._open[size] = _Turn(texts=[], rows=self._workers[size].submit(self._run_turn, size))
            turn = self._open[size]
            start = len(turn.texts)
            turn.texts.extend(texts)
        # Shielded: a waiter that is cancelled must not cancel the turn that others share.
        rows = await asyncio.shield(asyncio.wrap_future(turn.rows))
        return list(rows[start : start + len(texts)])

    def _run_turn(self, size: int) -> FloatArray:
        with self._lock:
            turn = self._open.pop(size)
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
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


_PROBE = [101, 2129, 2116, 18108, 2024, 2187, 1029, 102]
"""Word pieces by which a forward pass is compared with the model's own."""
_TOLERANCE = 1e-5
_PACK = 512
"""Word pieces of a pass at most, beyond one text: for few the reading of the weights takes longer than the products."""
_PAUSE_S = 5e-4
"""Between the passes of a long text, in which those of other texts begin."""
_SHORT_CHARS = 4000
"""Texts below this are of the lowest class."""


class _Bert:
    """A sentence encoder's forward pass over texts, in two thirds of the time that its own takes for one.

    Texts without padding need no masks; the three projections of a layer are one product. Float32 gives the model's numbers, to
    the bit where this was tried; rows of oneDNN's products, unlike MKL's, are the same however many there are.
    """

    def __init__(self, model: Any, *, in_bfloat16: bool, by_onednn: bool) -> None:
        """`in_bfloat16`, `by_onednn`: products alone. Raises AttributeError for a model that is built otherwise."""
        import torch

        bert = model[0].auto_model
        self._kind = torch.bfloat16 if in_bfloat16 else torch.float32
        self._by_onednn = by_onednn
        self._num_heads = bert.config.num_attention_heads
        self._words = bert.embeddings.word_embeddings.weight.detach()
        self._places = (bert.embeddings.position_embeddings.weight + bert.embeddings.token_type_embeddings.weight[0]).detach()
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
        if self._by_onednn:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return lambda x: torch.nn.functional.linear(x.to(self._kind), weight, bias).to(torch.float32)

    def __call__(self, texts: Sequence[Any]) -> list[Any]:
        """Return the embeddings, [D] each, of texts of word pieces [L], in one pass."""
        import torch

        lengths, functional = [len(ids) for ids in texts], torch.nn.functional
        x = self._norm(self._words[torch.cat(list(texts))] + torch.cat([self._places[:length] for length in lengths]))
        for project, mix, norm_mixed, widen, narrow, norm_out in self._layers:
            parts = (part.view(len(part), 3, 1, self._num_heads, -1).permute(1, 2, 3, 0, 4) for part in project(x).split(lengths))
            seen = [functional.scaled_dot_product_attention(*part)[0].transpose(0, 1).flatten(1) for part in parts]
            x = norm_mixed(mix(torch.cat(seen)) + x)
            x = norm_out(narrow(functional.gelu(widen(x))) + x)
        return [functional.normalize(part.mean(0), dim=0) for part in x.split(lengths)]


def _packs(texts: Sequence[list[int]]) -> list[list[list[int]]]:
    """Return texts of word pieces by passes, many short ones to each."""
    packs: list[list[list[int]]] = []
    for ids in texts:
        if not packs or sum(map(len, packs[-1])) + len(ids) > _PACK:
            packs.append([])
        packs[-1].append(ids)
    return packs


def size_class(texts: Sequence[str]) -> int:
    """Return a number for the length of texts: those of one class wait for each other alone."""
    return (sum(map(len, texts)) // _SHORT_CHARS).bit_length()


def _bert_of(model: Any, *, in_bfloat16: bool, together: bool = False) -> Callable[[Sequence[Any]], list[Any]]:
    """Return a model's quick forward pass, or its own where numbers differ; `together`: texts share a pass of the same bits."""
    import torch

    def whole(texts: Sequence[Any]) -> list[Any]:
        told = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in texts]
        return [model(one)["sentence_embedding"][0] for one in told]

    by_onednn = together and not in_bfloat16 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    try:
        quick, probe = _Bert(model, in_bfloat16=in_bfloat16, by_onednn=by_onednn), torch.tensor(_PROBE)
        probes = [probe.repeat(times) for times in (1, 3, 7, 2)]
        with torch.inference_mode():
            apart = (quick([probe])[0] - whole([probe])[0]).abs().max().item()
            agree = by_onednn and all(torch.equal(quick([one])[0], row) for one, row in zip(probes, quick(probes), strict=True))
    except (AttributeError, RuntimeError) as error:
        _LOG.warning("encoder: the model is built otherwise than expected, and run as it is: %s", error)
        return whole
    if apart > (_TOLERANCE * 1e3 if in_bfloat16 else _TOLERANCE):
        _LOG.warning("encoder: the quick numbers are %.1e from the model's, which is run as it is", apart)
        return whole
    return quick if agree else lambda texts: [row for ids in texts for row in quick([ids])]
