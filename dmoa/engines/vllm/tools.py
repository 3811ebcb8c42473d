"""Calls of a client's tools in what vLLM generates, read by vLLM's own parser: as text comes, and of the whole reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager
from vllm.sampling_params import SamplingParams
from vllm.tool_parsers import ToolParser, ToolParserManager

from dmoa.answer_form import FinalCall, ToolCall, new_call_id
from dmoa.engines.chat_template import template_text
from dmoa.engines.vllm.thoughts import check_fits, parser_of
from dmoa.errors import ConfigError
from dmoa.types import TextDelta

_STUB = "harmony"
"""Tools of gpt-oss are read from its tokens by a parser of vLLM's server, which parts its thoughts as well."""


def tool_parser_class(name: str | None) -> type[ToolParser] | None:
    """Return vLLM's tool parser of a name, None for none. Raises ConfigError, which lists what vLLM has."""
    known = ToolParserManager.list_registered()
    found: type[ToolParser] | None = parser_of("tool_parser", name, known, ToolParserManager.get_tool_parser)
    if found is not None and found.structural_tag_model == _STUB:
        raise ConfigError(
            f"engine_kwargs.tool_parser is {name!r}: it reads gpt-oss's calls from tokens inside `vllm serve`, which engine vllm "
            "here does not run; leave it out, and tools are asked for in words, or run `vllm serve MODEL --tool-call-parser "
            f"{name} --enable-auto-tool-choice` and name that as base_url of an LLM with engine openai"
        )
    return found


class ToolFormat:
    """How one model calls tools."""

    def __init__(self, tokenizer: Any, parser: str | None = None) -> None:
        """`parser`: the name of one of vLLM's. Raises ConfigError for one that vLLM lacks or that does not fit the model."""
        self._tokenizer = tokenizer
        self._parser: Any = None
        if tool_parser_class(parser) is None:
            return
        self._parser = ParserManager.get_parser(tool_parser_name=parser, enable_auto_tools=True)
        if "tools" not in template_text(tokenizer.chat_template):
            raise ConfigError(
                f"engine_kwargs.tool_parser is {parser!r}, but the model's chat template tells it of no tools; leave it out: "
                "tools are then asked for in words"
            )
        check_fits("tool_parser", parser, lambda: self._parser(tokenizer, []))

    def reader(self, final: FinalCall | None) -> ToolReader | None:
        """Return what reads the calls of one reply; None where no tools are offered, or no parser is named."""
        if final is None or not final.tools or self._parser is None:
            return None
        return ToolReader(self._parser, self._tokenizer, final)


class ToolReader:
    """Parts one reply in text and calls of tools."""

    def __init__(self, parser: Any, tokenizer: Any, final: FinalCall) -> None:
        choice = final.tool_choice
        self.tools = [{"type": "function", "function": dict(tool)} for tool in final.tools]
        """As the chat template is told of them."""
        named = {"type": "function", "function": {"name": choice[1:]}}
        given = {
            "messages": [],
            "tools": self.tools,
            "tool_choice": named if choice.startswith("=") else choice,
            "parallel_tool_calls": final.is_parallel,
        }
        request = ChatCompletionRequest.model_validate(given)
        self._new: Callable[[], Any] = lambda: parser(tokenizer, request.tools)
        self._parser = self._new()
        self._request = self._parser.adjust_request(request)
        self._tokens: list[int] = []
        self._said: list[str] = []

    @property
    def keeps_marks(self) -> bool:
        """Whether vLLM is to leave special tokens in the text, because some of them mark calls."""
        return not self._request.skip_special_tokens

    def bind(self, params: SamplingParams) -> None:
        """Have the reply guided where calls must be made, or must have their form where they are."""
        params.structured_outputs = self._request.structured_outputs

    def feed(self, pieces: Sequence[TextDelta], tokens: Sequence[int]) -> list[TextDelta]:
        """Take pieces of thought and text, and the tokens that came with them; return what is certainly no call."""
        self._tokens += tokens
        text = "".join(piece.text for piece in pieces if not piece.is_reasoning)
        shown = [piece for piece in pieces if piece.is_reasoning]
        if not text:
            return shown
        told = self._parser.parse_delta(text, self._tokens, self._request, prompt_token_ids=[], finished=False)
        self._tokens = []
        said = (told.content if told is not None else None) or ""
        self._said.append(said)
        return [*shown, TextDelta(text=said)] if said else shown

    def finish(self, text: str, tokens: Sequence[int]) -> tuple[str, tuple[ToolCall, ...]]:
        """Return text and calls of a whole reply; of what was shown as text nothing is taken back."""
        _, content, calls = self._new().parse(text, self._request, enable_auto_tools=True, model_output_token_ids=tokens)
        made = tuple(
            ToolCall(call_id=call.id or new_call_id(), name=call.name, arguments=call.arguments or "{}") for call in calls or ()
        )
        said = "".join(self._said)
        return said if said.strip() and made else (content or "") if made else text, made
