"""The prefix store and the rows of keys and values, against plain lists."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoa.engines.transformers.decode import DecodeLoop
from dmoa.engines.transformers.kv_cache import KvRows, PrefixStore, StoredPrefix, common_prefix

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def entry(tokens: list[int], adapter: str | None = None) -> StoredPrefix:
    """Return a stored prompt of 8 bytes per token."""
    return StoredPrefix(adapter, np.array(tokens), torch.zeros(2, len(tokens), 1))


@given(TOKENS, TOKENS, st.integers(1, 6))
def test_common_prefix_counts_equal_tokens_at_the_beginning(a: list[int], b: list[int], at_least: int) -> None:
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    found = common_prefix(np.array(a), np.array(b), at_least)
    assert found == (shared if shared >= at_least else 0)


@given(st.lists(st.tuples(TOKENS.filter(bool), st.sampled_from([None, "x"])), max_size=8), TOKENS)
def test_find_returns_the_longest_beginning_of_the_same_adapter(
    stored: list[tuple[list[int], str | None]], asked: list[int]
) -> None:
    store = PrefixStore(max_bytes=10_000, min_tokens=1)
    for tokens, adapter in stored:
        store.put(entry(tokens, adapter))
    found, shared = store.find("x", np.array(asked))
    longest = max((common_prefix(np.array(t), np.array(asked)) for t, adapter in stored if adapter == "x"), default=0)
    assert shared == longest
    assert (found is None) == (longest == 0)
    if found is not None:
        assert found.adapter == "x"
        assert found.tokens[:shared].tolist() == asked[:shared]


def test_the_least_recently_used_prompt_goes_first() -> None:
    store = PrefixStore(max_bytes=2 * 8 * 4, min_tokens=1)
    store.put(entry([1, 1, 1, 1]))
    store.put(entry([2, 2, 2, 2]))
    assert store.find(None, np.array([1, 1]))[1] == 2
    store.put(entry([3, 3, 3, 3]))
    assert store.find(None, np.array([2, 2]))[1] == 0
    assert store.find(None, np.array([1, 1]))[1] == store.find(None, np.array([3, 3]))[1] == 2


def test_a_longer_prompt_takes_the_place_of_its_own_beginning() -> None:
    store = PrefixStore(max_bytes=8 * 5, min_tokens=2)
    store.put(entry([1, 2, 3]))
    assert not store.wants(None, np.array([1, 2, 3, 4]))
    assert store.wants(None, np.array([1, 2, 3, 4, 5]))
    assert store.wants("x", np.array([1, 2, 3]))
    store.put(entry([1, 2, 3, 4, 5]))
    assert store.find(None, np.array([1, 2, 3, 4, 5]))[1] == 5


def test_a_prompt_larger_than_the_store_drives_nobody_out() -> None:
    store = PrefixStore(max_bytes=8 * 4, min_tokens=1)
    store.put(entry([1, 2, 3]))
    store.put(entry([2] * 5))
    assert (store.find(None, np.array([1, 2, 3]))[1], store.nbytes) == (3, 8 * 3)


def test_rows_keep_what_was_written_when_they_grow_and_move() -> None:
    torch.manual_seed(0)
    rows = KvRows(num_layers=2, num_heads=2, head_size=3, dtype=torch.float32, device=torch.device("cpu"))
    rows.reserve(2, 5)
    written = {}
    for row, length in ((0, 5), (1, 3)):
        positions, mask = rows.begin(row, [0], length)
        assert positions.tolist() == [list(range(length))]
        assert mask is None
        for layer in range(2):
            keys, values = torch.randn(2, 1, 2, length, 3)
            assert rows.update(keys, values, layer)[0] is keys
            written[row, layer] = (keys, values)
    rows.reserve(9, 1000)
    rows.move(1, 5, 3)
    positions, mask = rows.begin(5, [3], 1)
    assert positions.tolist() == [[3]]
    assert mask is not None
    assert mask.shape == (1, 1, 1, 4)
    new_keys, new_values = torch.randn(2, 1, 2, 1, 3)
    for layer in range(2):
        keys, values = rows.update(new_keys, new_values, layer)
        assert torch.equal(keys, torch.cat([written[1, layer][0], new_keys], dim=2))
        assert torch.equal(values, torch.cat([written[1, layer][1], new_values], dim=2))
    rows.write(0, rows.read(5, 4))
    assert torch.equal(rows.read(0, 4), rows.read(5, 4))


def test_the_mask_hides_what_is_ahead_and_other_rows_slots() -> None:
    rows = KvRows(num_layers=1, num_heads=1, head_size=1, dtype=torch.float32, device=torch.device("cpu"))
    rows.reserve(2, 8)
    _, mask = rows.begin(0, [1, 3], 2)
    assert mask is not None
    visible = (mask[:, 0] == 0).int().tolist()
    assert visible == [[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]
    assert bool((mask[mask != 0] == float("-inf")).all())


@pytest.mark.parametrize(("is_stopped", "kept"), [(True, [1, 2, 3, 7, 8]), (False, [1, 2, 3])], ids=["by-a-text", "otherwise"])
def test_of_an_ended_reply_what_was_computed_is_kept(is_stopped: bool, kept: list[int]) -> None:
    """The last token was picked and never went through the model: its place in the row holds nothing of it."""
    row_NTE = torch.arange(6.0).repeat(2, 1)[:, :, None]  # the sixth position is not this sequence's
    text = SimpleNamespace(stopped=is_stopped)
    ended = SimpleNamespace(adapter=None, tokens=np.array([1, 2, 3]), outputs=[7, 8, 9], text=text)
    store = PrefixStore(1 << 20, 1)
    rows = SimpleNamespace(read=lambda row, length: row_NTE[:, :length])
    DecodeLoop._keep_prefix(SimpleNamespace(_has_prefix_cache=True, _prefixes=store, _kv=rows), 0, ended)  # type: ignore[arg-type]
    found, shared = store.find(None, np.array([1, 2, 3, 7, 8, 9, 9]))
    assert found is not None
    assert (found.tokens.tolist(), shared, found.kv_NTE.shape[1]) == (kept, len(kept), len(kept))


@pytest.mark.parametrize(("stored", "reused"), [(100, 0), (19_000, 19_000), (20_000, 19_999)])
def test_a_long_prompt_reuses_a_beginning_only_where_the_mask_of_the_rest_stays_small(stored: int, reused: int) -> None:
    """Attention over reused tokens needs a mask of all new tokens by all tokens: 1.6 GB for 20,000 of them."""
    store, asked = PrefixStore(1 << 30, 1), SimpleNamespace(adapter=None, tokens=np.arange(20_000))
    store.put(entry(list(range(stored))))
    assert DecodeLoop._reusable(SimpleNamespace(_prefixes=store, _rows=[]), asked) == reused  # type: ignore[arg-type]
