"""A bench's pool on another engine: what stays as it was, and what changes."""

from __future__ import annotations

from dmoa.agents.pool import fingerprint, load_pool
from dmoa.bench.harness import on_engine
from dmoa.engine_options import VllmOptions


def test_a_pool_on_its_own_engine_is_the_pool() -> None:
    pool = load_pool(None)
    assert on_engine(pool, "transformers") is pool


def test_a_pool_moved_to_vllm_keeps_agents_model_width_and_context() -> None:
    pool = load_pool(None)
    moved = on_engine(pool, "vllm", cpu_kv_cache_gib=3)
    (before,), (after,) = pool.llms.values(), moved.llms.values()
    assert fingerprint(moved) == fingerprint(pool)
    assert (after.engine, after.model, after.max_num_seqs) == ("vllm", before.model, before.max_num_seqs)
    options = after.options
    assert isinstance(options, VllmOptions)
    assert (options.max_model_len, options.dtype, options.cpu_kv_cache_gib) == (8192, "float32", 3)
    assert before.engine == "transformers", "the pool itself stays"
