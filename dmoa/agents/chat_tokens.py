"""From a conversation to the tokens of a prompt: the same for every engine that runs a model itself.

The transformers engine, the vLLM engine and nothing else; what an endpoint does with messages is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoa.errors import EngineError, PromptTooLongError
from dmoa.types import Message


def encode_chat(tokenizer: Any, messages: Sequence[Message], *, model: str) -> list[int]:
    """Return a prompt's tokens by the chat template of a transformers tokenizer; raises EngineError without a message.

    A last message of the assistant's is continued; after any other the template opens the reply.
    """
    if not messages:
        raise EngineError(f"{model}: messages: value seen: none; at least one message is needed")
    is_continued = messages[-1].role == "assistant"
    text = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        tokenize=False,
        add_generation_prompt=not is_continued,
        continue_final_message=is_continued,
    )
    # The backend's own call: transformers' sets padding on the shared tokenizer, which is not safe among threads.
    tokens: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return tokens


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Return the tokenizer of a folder or a repository on the hub. Blocks."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, revision=revision or "main")


def room_for_reply(num_tokens: int, max_model_len: int, *, model: str) -> int:
    """Return how many tokens a reply may have after a prompt, at least 1. Raises PromptTooLongError."""
    room = max_model_len - num_tokens
    if room < 1:
        raise PromptTooLongError(
            f"{model}: the prompt has {num_tokens} tokens; allowed are {max_model_len - 1} "
            f"(max_model_len {max_model_len}, 1 for the reply); shorten it or raise max_model_len"
        )
    return room
