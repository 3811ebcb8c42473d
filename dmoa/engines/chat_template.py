"""Turns a conversation into the tokens of a prompt, the same for every engine that runs a model itself.

Used by the transformers and vLLM engines; what an endpoint does with messages is its own. Control tokens come from the chat
template alone; in a message their names are plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

from dmoa.core.reasoning import closing_of, opened_at_end, split_reasoning
from dmoa.errors import EngineError, PromptTooLongError
from dmoa.types import Message, Sampling

_REASONING = re.compile(r"</?(?:think|thinking|reasoning)>", re.IGNORECASE)
"""What a model writes around its reasoning: no turn can be forged with it, and a reply that is continued holds it."""
_TAIL_TOKENS = 16
_KNOWN: WeakKeyDictionary[Any, _Controls] = WeakKeyDictionary()
_LOCK = threading.Lock()


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    model: str,
    settings: Sequence[tuple[str, Any]] = (),
    tools: Sequence[dict[str, Any]] = (),
    thinks: bool = True,
) -> list[int]:
    """Return a prompt's tokens by the chat template of a transformers tokenizer; raises EngineError without a message.

    A last message of the assistant's is continued; after any other the template opens the reply. Control tokens that messages
    name are encoded as the text that they are, so no message can end its turn or open another. `settings`: `Sampling.template`.
    `tools`: as the template is told of them, names in them being no more than text either. `thinks` False: a thought that the
    template opens is closed at once, for a reply of which every token is to be the answer's.
    """
    if not messages:
        raise EngineError(f"{model}: messages is empty; give at least one")
    controls = _controls_of(tokenizer)
    is_forged = any(map(controls.are_in, (*(message.content for message in messages), *_texts_of(list(tools)))))
    offered = {"tools": [controls.broken_tree(tool) for tool in tools] if is_forged else list(tools)} if tools else {}
    is_continued = messages[-1].role == "assistant"
    turns = [
        {"role": message.role, "content": controls.broken(message.content) if is_forged else message.content}
        for message in messages
    ]
    text = _rendered(
        tokenizer,
        turns,
        model,
        add_generation_prompt=not is_continued,
        continue_final_message=is_continued,
        **dict(settings) | offered,
    )
    opening = "" if thinks or is_continued else opened_at_end(text)
    text += closing_of(opening) if opening else ""
    if is_forged:
        return controls.encode(text)
    # The backend's own call: transformers' sets padding on the shared tokenizer, which is not safe among threads.
    tokens: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return tokens


def _rendered(tokenizer: Any, turns: list[dict[str, str]], model: str, **options: Any) -> str:
    """Return a conversation as the chat template writes it. Raises EngineError."""
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception as error:  # the template is a program that came with the model
        # Tried again with neighbours of one role as one message, then with the system text at the head of the first question.
        joined = [
            {"role": role, "content": "\n\n".join(turn["content"] for turn in same)}
            for role, same in groupby(turns, key=itemgetter("role"))
        ]
        if len(joined) < len(turns):
            return _rendered(tokenizer, joined, model, **options)
        if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise EngineError(f"{model}: its chat template refuses the conversation: {why}") from error
    first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return _rendered(tokenizer, [first, *turns[2:]], model, **options)


def opened_thought(tokenizer: Any, tokens: Sequence[int], messages: Sequence[Message]) -> tuple[bool, str]:
    """Tell whether a prompt leaves a thought open, and the text by which the chat template opened it.

    That text is empty where none is open, and where it is the assistant's own unfinished message that is continued.
    """
    if messages[-1].role == "assistant":
        return split_reasoning(messages[-1].content).is_open, ""
    tag = opened_at_end(tokenizer.decode(tokens[-_TAIL_TOKENS:], skip_special_tokens=False))
    return bool(tag), tag


def _controls_of(tokenizer: Any) -> _Controls:
    with _LOCK:
        found = _KNOWN.get(tokenizer)
        if found is None:
            found = _KNOWN[tokenizer] = _Controls(tokenizer)
        return found


class _Controls:
    """The control tokens of one tokenizer, and how text that names them is encoded beside real ones."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder().values()
        template = template_text(tokenizer.chat_template)
        # DeepSeek's tokens of roles and Qwen's of tools, say, are not marked as special, yet their templates build on them;
        # other added tokens (runs of spaces, tags of HTML) are ordinary text.
        found = [token for token in added if token.special or (_is_sign(token.content) and token.content in template)]
        found = [token for token in found if len(token.content) > 1 and not _REASONING.fullmatch(token.content)]
        self._names = sorted((token.content for token in found), key=len, reverse=True)
        self._pattern = _any_of(self._names)
        self._normaliser = self._backend.normalizer
        # Looked for in the text as the tokenizer reads it, in small letters say.
        read = [self._normaliser.normalize_str(token.content) for token in found if token.normalized] if self._normaliser else []
        self._read_pattern = _any_of(read) if any(read) else None
        number = secrets.randbelow(10**16)  # which no text can know
        self._seam = f"\u27e6{number}\u27e7"
        self._aliases = {name: f"\u27e6{number}.{i}\u27e7" for i, name in enumerate(self._names)}

    def are_in(self, text: str) -> bool:
        """Tell whether a text names one of the tokens, as it stands or as the tokenizer reads it."""
        if self._pattern.search(text):
            return True
        return self._read_pattern is not None and self._read_pattern.search(self._normaliser.normalize_str(text)) is not None

    def broken(self, text: str) -> str:
        """Return a text with a seam in every name of a control token, by which `encode` tells it from the template's."""
        while self._pattern.search(text):
            text = self._pattern.sub(lambda match: f"{match[0][0]}{self._seam}{match[0][1:]}", text)
        return text

    def broken_tree(self, value: Any) -> Any:
        """Return plain values with a seam in every name of a control token in their texts and keys."""
        if isinstance(value, dict):
            return {self.broken(key): self.broken_tree(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.broken_tree(inner) for inner in value]
        return self.broken(value) if isinstance(value, str) else value

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a rendered conversation whose messages are `broken`."""
        marked = self._pattern.sub(lambda match: self._aliases[match[0]], text)
        tokens: list[int] = self._renamed.encode(marked.replace(self._seam, ""), add_special_tokens=False).ids
        return tokens

    @cached_property
    def _renamed(self) -> Any:
        """The same tokenizer, whose control tokens go by their aliases; takes seconds to make for a large vocabulary."""
        # Not tokenizers' `encode_special_tokens`: it leaves added tokens that are not marked, and names that are words.
        from tokenizers import Tokenizer

        tree = json.loads(self._backend.to_str())
        for token in tree["added_tokens"]:
            token["content"] = self._aliases.get(token["content"], token["content"])
        model = tree["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {self._aliases.get(name, name): number for name, number in vocab.items()}
        else:
            model["vocab"] = [[self._aliases.get(name, name), score] for name, score in vocab]
        if model.get("unk_token") in self._aliases:
            model["unk_token"] = self._aliases[model["unk_token"]]
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not self._makes_control(merge)]
        tree["post_processor"] = None  # it names tokens, and adds none here
        return Tokenizer.from_str(json.dumps(tree))

    def _makes_control(self, merge: str | list[str]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return any(part in self._aliases for part in (left, right, left + right))


def _texts_of(value: Any) -> Iterator[str]:
    """Yield the texts and keys in plain values."""
    if isinstance(value, dict):
        yield from value
        yield from _texts_of(list(value.values()))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_of(inner)
    elif isinstance(value, str):
        yield value


def template_text(template: Any) -> str:
    """Return a chat template's source; of several named ones all together."""
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Return what matches the longest of these names, nothing where there is none."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name) or r"(?!)")


def _is_sign(name: str) -> bool:
    """Tell whether a token looks like a mark and not like text that is added for its frequency."""
    return re.fullmatch(r"[<\[\]].*[>\[\]]", name) is not None


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Return the tokenizer of a folder or a repository on the hub. Blocks."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, revision=revision or "main")


def seed_of(sampling: Sampling, call_id: str) -> int:
    """Return the seed of a call's random choices, 63 bits: the one that was given, else one that the call's id always gives."""
    seed = sampling.seed
    return (int.from_bytes(hashlib.sha256(call_id.encode()).digest()[:8], "little") if seed is None else seed) % 2**63


def room_for_reply(num_tokens: int, max_model_len: int, *, model: str) -> int:
    """Return how many tokens a reply may have after a prompt, at least 1. Raises PromptTooLongError."""
    room = max_model_len - num_tokens
    if room < 1:
        raise PromptTooLongError(
            f"{model}: the prompt has {num_tokens} tokens; expected at most {max_model_len - 1} "
            f"(max_model_len {max_model_len}, 1 for the reply); shorten it or raise max_model_len"
        )
    return room
