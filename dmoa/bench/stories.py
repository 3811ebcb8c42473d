"""Prompts for benches of engines: short ones that share no beginning worth reusing, nor do those of another salt."""

from __future__ import annotations

from dmoa.types import GenerationRequest, Message, Sampling

_TOPICS = ("a river", "seven apples", "the moon", "an old clock", "a lazy fox and its day", "bread", "the number twelve", "rain")


def stories(batch: int, salt: int, *, max_tokens: int) -> list[GenerationRequest]:
    """Return requests for `batch` stories, their prompts of different lengths; take a new salt for every batch."""
    return [
        GenerationRequest(
            request_id=f"{salt}/{i}",
            call_id=f"{salt}/{i}",
            messages=(
                Message(role="system", content=f"{salt}.{i} is the number of this conversation."),
                Message(role="user", content=f"Tell me a short story about {_TOPICS[i % 8]}. " * (1 + i % 3)),
            ),
            sampling=Sampling(max_tokens=max_tokens),
        )
        for i in range(batch)
    ]
