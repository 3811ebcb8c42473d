"""A tiny random model and rows for the tests of specialist training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dmoa.training.lora import LoraSettings, TrainingRow
from dmoa.types import Message

if TYPE_CHECKING:
    from dmoa.training.specialists import LoraJob

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def save_tiny_model(folder: Path) -> str:
    """Write a random byte-level Llama of three layers into a folder; returns its `model`."""
    torch.manual_seed(5)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(["</s>", "<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return f"path:{folder}"


def make_rows(count: int) -> list[TrainingRow]:
    """Return rows of different length that all want the same short reply."""
    return [
        TrainingRow(
            messages=(
                Message(role="system", content="Be brief."),
                Message(role="user", content=f"{'ab' * (number % 4)} {number}?"),
            ),
            target="no" if number % 3 else "yes",
            source="odd" if number % 2 else "even",
        )
        for number in range(count)
    ]


def make_job(model: str, run_dir: Path, **schedule: object) -> LoraJob:
    """Return a job of a few quick steps."""
    from dmoa.training.specialists import LoraJob, Schedule  # seconds, with transformers' Trainer

    settings = {"steps": 12, "batch_rows": 6, "learning_rate": 0.02, "check_every": 4} | schedule
    return LoraJob(
        name="tiny",
        model=model,
        settings=LoraSettings(rank=2, alpha=4, first_layer=1),
        schedule=Schedule.model_validate(settings),
        rows=tuple(make_rows(72)),
        held_out=tuple(make_rows(12)),
        run_dir=run_dir.absolute(),
        track="jsonl",
        threads=1,
    )
