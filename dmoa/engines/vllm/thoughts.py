"""Parts thoughts from text as vLLM sends a reply, and tells whose its tokens are.

By a reasoning parser of vLLM's own where the pool names one, else by the marks that `core/reasoning` knows. No Ray here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from tokenizers.decoders import DecodeStream
from vllm.reasoning import ReasoningParser, ReasoningParserManager

from dmoa.core.entropy_scope import answer_tokens
from dmoa.core.reasoning import ReasoningSplitter, split_reasoning
from dmoa.engines.thoughts import has_special_marks, placed_split
from dmoa.errors import ConfigError
from dmoa.types import TextDelta

HARMONY = "openai_gptoss"
"""Of the channels of gpt-oss vLLM's reasoning parser knows no more than that they end: they are parted by their marks."""


def parser_class(name: str | None) -> type[ReasoningParser] | None:
    """Return vLLM's reasoning parser of a name, None where none is needed. Raises ConfigError, which lists what vLLM has."""
    if name == HARMONY:
        return None
    known = ReasoningParserManager.list_registered()
    found: type[ReasoningParser] | None = parser_of("reasoning_parser", name, known, ReasoningParserManager.get_reasoning_parser)
    return found


def parser_of(option: str, name: str | None, known: Sequence[str], get: Callable[[str], Any]) -> Any:
    """Return what vLLM has under a name that an option gives, None for none. Raises ConfigError, which lists what vLLM has."""
    if name is None:
        return None
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"engine_kwargs.{option} is {name!r}; {hint}this vLLM has {', '.join(known)}; name one, or leave it out"
        )
    try:
        return get(name)
    except ImportError as error:
        raise ConfigError(f"engine_kwargs.{option} is {name!r}, which vLLM cannot load: {error}; install that") from error


def check_fits(option: str, name: str | None, make: Callable[[], object]) -> None:
    """Raise ConfigError where vLLM's parser cannot be made for a model's tokenizer."""
    try:
        make()
    except Exception as error:  # whatever a parser of vLLM's has against the tokenizer
        raise ConfigError(
            f"engine_kwargs.{option} is {name!r}, which does not fit the model: {error}; name the one that the "
            "model's card names, or leave it out"
        ) from error


class ReasoningFormat:
    """How one model marks its thoughts."""

    def __init__(self, tokenizer: Any, parser: str | None = None) -> None:
        """`parser`: the name of one of vLLM's. Raises ConfigError for one that vLLM lacks or that does not fit the model."""
        self.backend = tokenizer.backend_tokenizer
        self._tokenizer = tokenizer
        self._parser = parser_class(parser)
        self.keeps_marks = parser is not None or has_special_marks(self.backend)
        """Whether vLLM is to leave special tokens in the text, because some of them mark thoughts."""
        check_fits("reasoning_parser", parser, self.new_parser)

    def new_parser(self) -> ReasoningParser | None:
        """Return vLLM's parser for one reply; None where the marks are known here."""
        return self._parser(self._tokenizer) if self._parser else None

    def decoder(self, prompt_tokens: Sequence[int], *, keeps_marks: bool) -> DecodeStream:
        """Return what decodes a reply token by token, as vLLM does."""
        return DecodeStream(ids=list(prompt_tokens), skip_special_tokens=not (self.keeps_marks or keeps_marks))


class ReplyText:
    """The text of one reply as it comes, without its thoughts."""

    def __init__(
        self,
        given: ReasoningFormat,
        prompt_tokens: Sequence[int],
        opened: tuple[bool, str] = (False, ""),
        *,
        keeps_marks: bool = False,
    ) -> None:
        """`opened`: whether the prompt leaves a thought open, and by which text of the chat template (`opened_thought`).

        `keeps_marks`: vLLM leaves special tokens in this text for another reason than thoughts.
        """
        self._format = given
        self._keeps_marks = keeps_marks
        self._opening = opened[1]
        self._prompt_tokens = prompt_tokens
        self._decoder: DecodeStream | None = None
        self._tokens: list[int] = []
        self._ends: list[int] = []
        """Where the text of each token ends, as far as measured."""
        self._raw = ""
        self._said: list[str] = []
        self._thought: list[str] = []
        """What a parser told."""
        self._splitter = ReasoningSplitter(is_opened=opened[0])
        self._parser = given.new_parser()
        self._num_parsed = 0
        self._num_thought: int | None = None
        """Tokens before the parser said that the thought is over; None: it has not."""
        if self._parser is not None:
            if self._parser.is_reasoning_end(list(prompt_tokens)):
                self._num_thought = 0
            else:
                self._parser.adjust_initial_state_from_prompt(prompt_tokens)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._said) if self._parser is not None else self._splitter.split().text

    @property
    def reasoning(self) -> str:
        """The thoughts so far."""
        return "".join(self._thought) if self._parser is not None else self._splitter.split().reasoning

    @property
    def raw(self) -> str:
        """Thoughts and answer as they were written, where the marks say which is which; empty where nothing was thought."""
        split = self._splitter.split()
        return self._opening + self._raw if self._parser is None and (split.is_open or split.text != self._raw) else ""

    def feed(self, text: str, tokens: Sequence[int]) -> list[TextDelta]:
        """Take what vLLM sent; return what may be shown of it."""
        self._raw += text
        self._tokens += tokens
        if self._parser is None:
            return self._splitter.feed(text)
        self._measure()
        # vLLM holds text back that may begin a stop text, and puts pieces together where nobody takes them in time.
        shown = list[TextDelta]()
        while self._num_parsed < len(self._tokens) and self._ends[self._num_parsed] <= len(self._raw):
            shown += self._parse(self._parser)
        return shown

    def finish(self) -> list[TextDelta]:
        """Take the reply as ended; return what was held back."""
        if self._parser is None:
            return self._splitter.close()
        shown = list[TextDelta]()
        while self._num_parsed < len(self._tokens) and self._start(self._num_parsed) < len(self._raw):
            shown += self._parse(self._parser)
        return shown + (self._flushed(self._parser) if self._num_thought is None else [])

    def answer_tokens(self) -> list[bool]:
        """Tell of every token whether it is the answer's."""
        text = self._raw if self._parser is None else self.text
        split = self._splitter.split() if self._parser is None else split_reasoning(text)
        if not (self._thought or split.is_open or split.text != text):
            return [True] * len(self._tokens)
        placed = split if self._parser is None else placed_split(self._raw, text, split)
        if placed is None:  # a parser that does not leave the words of the answer as they are
            return [self._num_thought is not None and number >= self._num_thought for number in range(len(self._tokens))]
        self._measure()
        return answer_tokens([self._raw[start:end] for start, end in pairwise([0, *self._ends])], placed)

    def _measure(self) -> None:
        if self._decoder is None:
            self._decoder = self._format.decoder(self._prompt_tokens, keeps_marks=self._keeps_marks)
        for number in range(len(self._ends), len(self._tokens)):
            try:
                piece = self._decoder.step(self._format.backend, self._tokens[number])
            except Exception:  # tokenizers has no other: bytes that are no text spoil those before them; vLLM begins anew too
                self._decoder = self._format.decoder((), keeps_marks=self._keeps_marks)
                piece = self._decoder.step(self._format.backend, self._tokens[number])
            self._ends.append(self._start(number) + len(piece or ""))

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def _parse(self, parser: ReasoningParser) -> list[TextDelta]:
        """Show the parser the next token: some take no more at once. None is asked again once the thought is over."""
        start, end = self._start(self._num_parsed), self._ends[self._num_parsed]
        self._num_parsed += 1
        piece, tokens = self._raw[start:end], self._tokens[: self._num_parsed]
        if self._num_thought is not None:
            return self._kept([TextDelta(text=piece)])
        shown = self._told(
            parser.extract_reasoning_streaming(self._raw[:start], self._raw[:end], piece, tokens[:-1], tokens, tokens[-1:])
        )
        if parser.engine_based_streaming:
            is_over = parser.has_engine_confirmed_reasoning_end()
        else:
            is_over = parser.is_reasoning_end_streaming(tokens, tokens[-1:])
        if is_over:
            self._num_thought = self._num_parsed
            shown += self._flushed(parser)
        return shown

    def _flushed(self, parser: ReasoningParser) -> list[TextDelta]:
        flush = getattr(parser, "finish_streaming", None)
        return self._told(flush()) if flush else []

    def _told(self, found: Any) -> list[TextDelta]:
        """Keep a message of the parser's."""
        if found is None:
            return []
        return self._kept([TextDelta(text=found.reasoning or "", is_reasoning=True), TextDelta(text=found.content or "")])

    def _kept(self, pieces: Iterable[TextDelta]) -> list[TextDelta]:
        shown = list[TextDelta]()
        for piece in pieces:
            # The lines between a thought and the answer are neither's.
            is_lead = not piece.is_reasoning and self._thought and not self._said
            text = piece.text.lstrip() if is_lead else piece.text
            if text:
                (self._thought if piece.is_reasoning else self._said).append(text)
                shown.append(TextDelta(text=text, is_reasoning=piece.is_reasoning))
        return shown
