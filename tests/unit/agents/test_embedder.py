"""Embeddings: independence of the batch, the chunked mean, the cache, and the async front."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmoa.agents.embedder import AsyncEncoder, D, HashEncoder, MiniLmEncoder, _bert_of, has_bfloat16
from dmoa.engines import models
from dmoa.errors import ModelFetchError
from dmoa.types import FloatArray
from tests.logged import Logged

TEXTS = ["What is 12 + 7?", "The capital of France is Paris.", "Sort: pear, apple, fig.", "x" * 400, "naïve 日本語 😀"]
LONG = " ".join(f"word{i} is number {i};" for i in range(120))


class TestHashEncoder:
    async def test_equal_texts_agree_and_others_are_unrelated(self) -> None:
        rows = await HashEncoder().embed([*TEXTS, TEXTS[0]])
        row_ND = np.stack(rows)
        assert row_ND.dtype == np.float32
        assert row_ND.shape == (6, D)
        np.testing.assert_allclose(np.linalg.norm(row_ND, axis=1), 1.0, atol=1e-6)
        np.testing.assert_array_equal(rows[0], rows[5])
        likeness = row_ND[:5] @ row_ND[:5].T - np.eye(5)
        assert np.abs(likeness).max() < 0.25

    async def test_the_empty_text_is_zeros(self) -> None:
        blank, empty = await HashEncoder().embed([" \n", ""])
        assert not blank.any()
        assert not empty.any()

    async def test_a_lone_surrogate_is_a_text(self) -> None:
        (row,) = await HashEncoder().embed(["\ud800"])
        assert np.isfinite(row).all()


class CountingEncoder:
    """Stands for `MiniLmEncoder`: remembers nothing, notes every turn, and may be held at its door."""

    def __init__(self) -> None:
        self.turns: list[list[str]] = []
        self.door = threading.Event()
        self.door.set()
        self.thread_ids: set[int] = set()

    def cached(self, text: str) -> FloatArray | None:
        return np.ones(2, np.float32) if text == "known" else None

    def encode(self, texts: Sequence[str]) -> FloatArray:
        self.thread_ids.add(threading.get_ident())
        self.turns.append(list(texts))
        assert self.door.wait(timeout=30)
        if "bad" in texts:
            raise RuntimeError("no such text")
        return np.array([[float(text), 0.0] for text in texts], np.float32)


async def turns_begun(encoder: CountingEncoder, number: int) -> None:
    deadline = time.monotonic() + 30
    while len(encoder.turns) < number:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


class TestAsyncEncoder:
    async def test_texts_that_arrive_meanwhile_share_a_turn(self) -> None:
        encoder = CountingEncoder()
        front = AsyncEncoder(encoder)
        encoder.door.clear()
        first = asyncio.create_task(front.embed(["1"]))
        await turns_begun(encoder, 1)
        later = [asyncio.create_task(front.embed([str(i), str(i + 10)])) for i in (2, 3, 4)]
        await asyncio.sleep(0)
        encoder.door.set()
        assert [row[0] for row in await first] == [1.0]
        assert [[row[0] for row in rows] for rows in await asyncio.gather(*later)] == [[2, 12], [3, 13], [4, 14]]
        assert encoder.turns == [["1"], ["2", "12", "3", "13", "4", "14"]]
        assert len(encoder.thread_ids) == 1
        assert threading.get_ident() not in encoder.thread_ids

    async def test_remembered_texts_need_no_turn(self) -> None:
        encoder = CountingEncoder()
        assert len(await AsyncEncoder(encoder).embed(["known", "known"])) == 2
        assert encoder.turns == []

    async def test_a_cancelled_waiter_leaves_the_others(self) -> None:
        encoder = CountingEncoder()
        front = AsyncEncoder(encoder)
        encoder.door.clear()
        busy = asyncio.create_task(front.embed(["1"]))
        await turns_begun(encoder, 1)
        leaves, stays = asyncio.create_task(front.embed(["2"])), asyncio.create_task(front.embed(["3"]))
        await asyncio.sleep(0)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        encoder.door.set()
        assert (await stays)[0][0] == 3.0
        await busy

    async def test_an_error_reaches_its_waiter_and_the_next_turn_works(self) -> None:
        front = AsyncEncoder(CountingEncoder())
        with pytest.raises(RuntimeError, match="no such text"):
            await front.embed(["bad"])
        assert (await front.embed(["5"]))[0][0] == 5.0

    def test_it_survives_a_change_of_event_loop(self) -> None:
        front = AsyncEncoder(CountingEncoder())
        assert [asyncio.run(front.embed([str(i)]))[0][0] for i in range(2)] == [0.0, 1.0]


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFetchError, match="holds no sentence encoder"):
        MiniLmEncoder(tmp_path)


@pytest.fixture(scope="module")
def folder() -> Path:
    return models.fetch("minilm")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> MiniLmEncoder:
    return MiniLmEncoder(folder, cache_size=64)


@pytest.mark.parametrize(
    ("flags", "has"),
    [("fpu avx512f avx512_bf16", True), ("fpu amx_bf16 sse", True), ("fpu avx512f avx2", False), ("avx512_bf16x", False)],
)
def test_who_multiplies_bfloat16(tmp_path: Path, flags: str, has: bool) -> None:
    place = tmp_path / "cpuinfo"
    place.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n")
    assert has_bfloat16(place) is has
    assert not has_bfloat16(tmp_path / "missing")


def test_a_model_that_is_built_otherwise_is_run_as_it_is(logged: Logged) -> None:
    class Other:
        def __getitem__(self, place: int) -> object:
            return object()

        def __call__(self, told: dict[str, Any]) -> dict[str, Any]:
            return {"sentence_embedding": told["input_ids"].sum(1, keepdim=True)}

    forward = _bert_of(Other(), in_bfloat16=False)
    assert [row.tolist() for row in forward([torch.tensor([3, 4]), torch.tensor([5])])] == [[7], [5]]
    assert "run as it is" in logged.text


@pytest.mark.real_model
class TestMiniLm:
    @pytest.mark.contract
    def test_a_quick_one_is_nearly_exact(self, folder: Path, encoder: MiniLmEncoder) -> None:
        rows = MiniLmEncoder(folder, is_quick=True).encode([*TEXTS, LONG])
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1)[:1], 1.0, atol=1e-5)
        np.testing.assert_allclose(rows, encoder.encode([*TEXTS, LONG]), atol=3e-3)

    def test_agrees_with_sentence_transformers(self, folder: Path, encoder: MiniLmEncoder) -> None:
        from sentence_transformers import SentenceTransformer

        reference = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
        np.testing.assert_allclose(encoder.encode(TEXTS), reference, atol=1e-6)

    @pytest.mark.parametrize("name", ["[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]"])
    def test_the_name_of_a_special_token_is_text(self, encoder: MiniLmEncoder, name: str) -> None:
        # The model reads small letters, in which the name is none of a token.
        row, as_text = encoder.encode([f"sort {name} apples", f"sort {name.lower()} apples"])
        np.testing.assert_array_equal(row, as_text)

    @pytest.mark.contract
    def test_a_row_does_not_depend_on_its_company(self, folder: Path, encoder: MiniLmEncoder) -> None:
        together = encoder.encode([*TEXTS, LONG])
        forgetful = MiniLmEncoder(folder, cache_size=0)
        quick = MiniLmEncoder(folder, cache_size=0, is_quick=True)
        many = [*TEXTS, LONG, *(" ".join(LONG.split()[:length]) for length in range(1, 60, 7))]
        np.testing.assert_array_equal(quick.encode(many), np.concatenate([quick.encode([text]) for text in many]))
        np.testing.assert_array_equal(together, forgetful.encode([LONG, *reversed(TEXTS)])[::-1])
        np.testing.assert_array_equal(together, np.concatenate([forgetful.encode([text]) for text in [*TEXTS, LONG]]))

    def test_likeness_follows_meaning(self, encoder: MiniLmEncoder) -> None:
        sums, other_sums, city = encoder.encode(["What is 3 plus 4?", "Add three and four.", "Paris lies on the Seine."])
        assert sums @ other_sums > 0.5 > 0.3 > sums @ city

    def test_a_long_text_is_the_mean_of_equal_chunks(self, encoder: MiniLmEncoder) -> None:
        words = ["cat", "dog", "sun", "sea"]  # one word piece each: 508 of them are exactly two windows
        chunks = [" ".join(words[i % 2] for i in range(254)), " ".join(words[2 + i % 2] for i in range(254))]
        first, second, both = encoder.encode([*chunks, " ".join(chunks)])
        mean = (first + second) / 2
        np.testing.assert_allclose(both, mean / np.linalg.norm(mean), atol=1e-6)
        over = encoder.encode([" ".join(["cat"] * 255)])[0]
        parts = encoder.encode([" ".join(["cat"] * 128), " ".join(["cat"] * 127)]).mean(axis=0)
        np.testing.assert_allclose(over, parts / np.linalg.norm(parts), atol=1e-6)

    def test_of_a_very_long_text_the_first_the_last_and_as_many_between_are_read(self, encoder: MiniLmEncoder) -> None:
        names = [f"{word} {other}" for word in ("cat", "dog", "sun", "sea", "man", "car", "sky", "ice") for other in ("a", "the")]
        chunks = [" ".join([names[number % 16]] * 127) for number in range(63)]  # read are the 32 of even number
        rows = encoder.encode(chunks[::2])
        mean = rows.mean(axis=0)
        long, other = encoder.encode(
            [" ".join(chunks), " ".join(c if i % 2 == 0 else "war " * 254 for i, c in enumerate(chunks))]
        )
        np.testing.assert_allclose(long, mean / np.linalg.norm(mean), atol=1e-6)
        np.testing.assert_array_equal(long, other)

    def test_unit_length_and_zeros_for_nothing(self, encoder: MiniLmEncoder) -> None:
        np.testing.assert_allclose(np.linalg.norm(encoder.encode([*TEXTS, LONG, "\ud800 lone"]), axis=1), 1.0, atol=1e-6)
        assert not encoder.encode(["", " \n\t"]).any()
        assert encoder.encode([]).shape == (0, D)

    def test_the_cache_keeps_the_newest(self, folder: Path) -> None:
        encoder = MiniLmEncoder(folder, cache_size=2)
        encoder.encode(["a", "b"])
        assert encoder.cached("a") is not None  # and is now the newest
        encoder.encode(["c"])
        assert encoder.cached("b") is None
        kept = encoder.cached("a")
        assert kept is not None
        with pytest.raises(ValueError, match="read-only"):
            kept[0] = 1.0

    def test_the_callers_threads_stay_as_they_were(self, encoder: MiniLmEncoder) -> None:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            encoder.encode(["a text not seen before"])
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    async def test_a_long_text_lets_others_pass(self, encoder: MiniLmEncoder) -> None:
        front = AsyncEncoder(encoder)
        texts = [LONG * times for times in (16, 4)]
        longest, longer = (asyncio.create_task(front.embed([text])) for text in texts)
        await asyncio.sleep(0)
        await front.embed(["Who is next?"])
        assert not longer.done()
        rows = await longer
        assert not longest.done()
        np.testing.assert_array_equal(np.stack([*await longest, *rows]), encoder.encode(texts))

    async def test_the_async_front_gives_the_same_rows(self, encoder: MiniLmEncoder) -> None:
        rows = await AsyncEncoder(encoder).embed([*TEXTS, "", TEXTS[0]])
        np.testing.assert_array_equal(np.stack(rows), encoder.encode([*TEXTS, "", TEXTS[0]]))
