"""One real vLLM for all tests here: LoRA, entropies and prefix cache on, prompts in chunks, and room for few sequences."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

# Read when vLLM is imported and when its processes start.
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

MAX_MODEL_LEN = 512
CHUNK_TOKENS = 96
"""Tokens of one engine step: longer prompts are read in parts."""
NUM_BLOCKS = 28
"""Blocks of 32 tokens: fewer than the sequences of a full batch may grow to, so that some are preempted."""
ADAPTERS = ("arith", "words")


@dataclass(frozen=True, slots=True)
class Running:
    """A started engine."""

    engine: Any
    client: Any
    tokenizer: Any
    folder: Path


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm() -> AsyncIterator[Running]:
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from dmoa.engines.models import resolve_adapter, resolve_model
    from dmoa.engines.vllm.engine import VllmEngine

    folder = resolve_model("embedded:smollm2-135m")
    assert isinstance(folder, Path)
    client = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            max_num_seqs=8,
            max_num_batched_tokens=CHUNK_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            block_size=32,
            num_gpu_blocks_override=NUM_BLOCKS,
            enable_prefix_caching=True,
            enable_lora=True,
            max_loras=len(ADAPTERS) + 1,  # the last slot stays empty, see `serving/vllm_replica`
            max_lora_rank=8,
            logits_processors=["dmoa.engines.vllm.entropy:EntropyProcessor"],
            worker_extension_cls="dmoa.engines.vllm.entropy.EntropyWorker",
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adapters = {name: resolve_adapter(f"builtin:{name}") for name in ADAPTERS}
    engine = VllmEngine(client, tokenizer, max_model_len=MAX_MODEL_LEN, label="vllm/float32", adapters=adapters)
    yield Running(engine, client, tokenizer, folder)
    await engine.close()


@pytest.fixture(scope="session")
def model(vllm: Running) -> Any:
    """The same model in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(vllm.folder, dtype=torch.float32).eval()
