"""Models for the tests of `agents`: a tiny random one for behaviour, the embedded one for `real_model` tests.

Both are made once per session; what they need is loaded where one is asked for, since transformers and PEFT take seconds. The
tiny model's weights are wide enough for its argmax to be clear of rounding.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dmoa.engine_options import TransformersOptions
from dmoa.engines.models import fetch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from dmoa.engines.transformers.engine import TransformersEngine

# Some virtual machines report AMX but do not run it; read by oneDNN at its first product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

ADAPTERS = ("path:/adapters/one.0", "path:/adapters/two.0", "path:/adapters/three.0")
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "what is twelve plus seven", "日本語 😀 ünïcödé"] * 4


@contextmanager
def peft_warnings_off() -> Iterator[None]:
    """Silence PEFT 0.21 asking for an attribute that transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 320 tokens with a chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE)


def save_tiny_model(folder: Path, *, vocab_size: int = 320) -> Path:
    """Write a random two-layer model with grouped-query attention, and its tokenizer, into a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=4096,
        initializer_range=0.3,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapters(model_dir: Path, root: Path, *, alpha: float) -> dict[str, Path]:
    """Write three different random LoRA adapters of rank 4 for a model; `alpha` sets how much they change it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders: dict[str, Path] = {}
    for number, name in enumerate(ADAPTERS):
        torch.manual_seed(100 + number)
        config = LoraConfig(
            r=4,
            lora_alpha=alpha,
            init_lora_weights=False,
            target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        with peft_warnings_off():
            get_peft_model(base, config).save_pretrained(root / str(number))
        folders[name] = root / str(number)
    return folders


def plain_model(model_dir: Path, adapter: Path | None = None) -> LlamaForCausalLM:
    """Return the bare model, an adapter merged into its weights: what the engine's results are compared with."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if adapter is None:
        return model
    with peft_warnings_off():
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


@torch.inference_mode()
def teacher_forced_entropies(model: LlamaForCausalLM, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """Return the entropy of every output token's distribution, from one plain forward and a float64 softmax."""
    logits_TV = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1].double()
    log_probability_TV = torch.log_softmax(logits_TV, dim=-1)
    return (-(log_probability_TV.exp() * log_probability_TV).sum(dim=-1)).tolist()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of the tiny model, by name."""
    return save_adapters(tiny_model, tmp_path_factory.mktemp("tiny-adapters"), alpha=4)


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: Path, tiny_adapters: dict[str, Path]) -> Iterator[TransformersEngine]:
    """An engine of the tiny model with its three adapters, prefix reuse on."""
    from dmoa.engines.transformers.engine import TransformersEngine

    engine = TransformersEngine(
        tiny_model, TransformersOptions(threads=1, max_model_len=1024), max_num_seqs=8, adapters=tiny_adapters
    )
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the embedded model."""
    return fetch("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random adapters of the embedded model, small enough for it to stay readable."""
    return save_adapters(smollm2, tmp_path_factory.mktemp("smollm2-adapters"), alpha=0.05)


@pytest.fixture(scope="session")
def smollm2_engine(smollm2: Path, smollm2_adapters: dict[str, Path]) -> Iterator[TransformersEngine]:
    """An engine of the embedded model with three adapters."""
    from dmoa.engines.transformers.engine import TransformersEngine

    engine = TransformersEngine(smollm2, TransformersOptions(), max_num_seqs=16, adapters=smollm2_adapters)
    yield engine
    asyncio.run(engine.close())
