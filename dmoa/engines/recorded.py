"""The `recorded` engine: replies that models gave before, found by query and agent in files; nothing is generated.

Stands where a real engine stands, so that a pool of logged replies is probed, trained, evaluated and served by the same code.
A file is read once, line by line, to index where each reply lies; the texts stay on disk. Sampling is not looked at: a reply
is as it was recorded.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import tempfile
import time
import zlib
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self, cast

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    ValidationError,
    model_validator,
)

from dmoa.core.truncated_entropy import listed_entropy
from dmoa.engine_options import RecordedOptions
from dmoa.engines.openai_replies import estimated_tokens, generated_tokens
from dmoa.errors import ConfigError, EngineError
from dmoa.reading import BYTE_ORDER_MARK, home_path, lines_of, regular
from dmoa.types import EntropySum, Generation, GenerationRequest, TextDelta, TokenUsage, question_key
from dmoa.validation import describe, did_you_mean

KINDS = (".jsonl", ".jsonl.gz", ".parquet")
_MAX_NAMED = 8
_BATCH_ROWS = 1024
_FEW_ROWS, _LEAST_ROW_BYTES = 100_000, 4
_FEW_BYTES, _MOST_PACKED = 1 << 28, 100
"""Of a table: what may be in any, and how tightly a larger one is packed at most."""


def _known(value: Any) -> Any:
    """Return a value of a table, where NaN stands for a missing number, as JSON has it."""
    return None if isinstance(value, float) and math.isnan(value) else value


Count = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_known)]
Amount = Annotated[NonNegativeFloat | None, BeforeValidator(_known)]


class RecordedReply(BaseModel):
    """One reply of one agent to one query: a line of a file of replies. Other keys of a line are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)

    query_id: Annotated[str | None, BeforeValidator(_known)] = None
    """What the query is called; replies are found by it where the query's text is not known."""
    query: Annotated[str | None, BeforeValidator(_known)] = None
    """Text of the query; white space does not matter."""
    agent: str = Field(min_length=1, max_length=256)
    """Who replied: the model's or the agent's name."""
    text: str
    """The whole reply, unchanged."""
    reasoning: str | None = None
    """Thoughts that came apart from the text."""
    entropy: Annotated[NonNegativeFloat | list[NonNegativeFloat] | None, BeforeValidator(_known)] = Field(
        default=None, validation_alias=AliasChoices("entropy", "entropy_nats")
    )
    """Mean entropy of the text in nats per token, or that of every token; `entropy_nats` is the same."""
    entropy_tokens: Count = None
    """Tokens that a mean entropy is of; else the generated ones, the reasoning's left out."""
    top_logprobs: list[list[float]] | None = None
    """Per token its listed natural log-probabilities: entropies are bounded by them where `entropy` is absent."""
    prompt_tokens: Count = None
    completion_tokens: Count = None
    """Generated tokens, those of the reasoning included."""
    reasoning_tokens: Count = None
    cached_tokens: Count = None
    latency_ms: Amount = None
    """How long the reply took."""
    price: Amount = None
    """What the reply cost, in any currency."""
    finish_reason: Literal["stop", "length"] | None = None

    @model_validator(mode="after")
    def _names_its_query(self) -> Self:
        if not (self.query or "").strip() and not self.query_id:
            raise ValueError("query and query_id are both missing; give the query's text, or what it is called")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """What the reply is found by: the key of its query's text first."""
        by_text = (question_key(self.query),) if self.query and self.query.strip() else ()
        return (*by_text, *((f"id:{self.query_id}",) if self.query_id else ()))


def agent_name(recorded: str) -> str:
    """Return the name that an agent of a pool has for a recorded name: small letters, and `-` for what no name holds."""
    return re.sub(r"[^a-z0-9._-]+", "-", recorded.lower()).strip("-._")[:64]


def replies_files(place: Path) -> list[Path]:
    """Return the file, or the files of a folder by name. Raises ConfigError where there is none."""
    if place.is_file():
        if not place.name.endswith(KINDS):
            raise ConfigError(f"{place}: its name ends with none of {', '.join(KINDS)}; name it by what it holds")
        return [place]
    found = sorted(path for path in place.glob("*") if path.name.endswith(KINDS)) if place.is_dir() else []
    if not found:
        seen = "holds no file of replies" if place.is_dir() else "is not there"
        raise ConfigError(f"{str(place)!r} {seen}; name a file or folder of {', '.join(KINDS)}")
    return found


def read_replies(path: Path) -> Iterator[RecordedReply]:
    """Yield the replies of a file. Raises ConfigError naming file, line, field and what is expected."""
    for number, line in _rows(path) if path.suffix == ".parquet" else read_lines(path):
        try:
            reply = RecordedReply.model_validate_json(line) if isinstance(line, bytes) else RecordedReply.model_validate(line)
        except ValidationError as error:
            raise ConfigError(f"{path}, line {number}: {describe(error)}; mend the line or take it out") from None
        yield reply


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank of a file of JSON Lines, also .gz, numbered from 1. Raises ConfigError."""
    try:
        with open(path, "rb", opener=regular) as raw, cast(IO[bytes], gzip.open(raw) if path.suffix == ".gz" else raw) as file:
            for number, line in enumerate(lines_of(file, path), 1):
                line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                if line and not line.isspace():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; copy it again, or name another file") from error


def open_table(path: str | Path) -> Any:
    """Return an open Parquet file. Raises OSError for what is none, and for a small one that would fill the memory."""
    import pyarrow.parquet as pq

    os.close(regular(path, os.O_RDONLY))
    size, table = Path(path).stat().st_size, pq.ParquetFile(path, page_checksum_verification=True)
    groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
    rows, unpacked = table.metadata.num_rows, sum(group.total_byte_size for group in groups)
    if rows > max(_FEW_ROWS, size // _LEAST_ROW_BYTES) or unpacked > max(_FEW_BYTES, size * _MOST_PACKED):
        table.close()
        raise OSError(f"its {size} bytes claim to hold {rows} rows of {unpacked} bytes, which no table of replies packs so")
    return table


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa

    try:
        with open_table(path) as table:
            known = [name for name in table.schema_arrow.names if name in {*RecordedReply.model_fields, "entropy_nats"}]
            number = 0
            for batch in table.iter_batches(_BATCH_ROWS, columns=known):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}; write it again") from error


class ReplyIndex:
    """Where each reply lies, by agent and query; of several replies of an agent to a query the first counts."""

    def __init__(self, place: Path) -> None:
        """Read every line once. Raises ConfigError for a line that is no reply, and for two agents with one name."""
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
        self._names: dict[str, str] = {}
        # One file of lines for all kinds: a compressed file and a table cannot be read from the middle.
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="dmoa-replies-")  # noqa: SIM115 -- open for the engine's life
        with ExitStack() as unread:
            unread.callback(self._file.close)
            for path in replies_files(place):
                for reply in read_replies(path):
                    self._add(path, reply)
            self._file.flush()
            unread.pop_all()

    @property
    def agents(self) -> tuple[str, ...]:
        """Recorded names, in the order in which they first come."""
        return tuple(self._names.values())

    def count(self, agent: str) -> int:
        """Return how many queries an agent has a reply to, 0 for one that is not there; `agent` as a pool names it."""
        return len(set(self._places.get(agent, {}).values()))

    def _add(self, path: Path, reply: RecordedReply) -> None:
        name = agent_name(reply.agent)
        if self._names.setdefault(name, reply.agent) != reply.agent:
            raise ConfigError(
                f"{path}: {reply.agent!r} and {self._names[name]!r} both become {name!r}, the name of an agent; rename one"
            )
        places = self._places.setdefault(name, {})
        if all(key in places for key in reply.keys):
            return
        line = reply.model_dump_json(exclude_none=True, exclude={"query_id", "query"}).encode()
        place = (self._file.tell(), len(line))
        self._file.write(line)
        for key in reply.keys:
            places.setdefault(key, place)

    def find(self, agent: str, keys: Iterable[str]) -> RecordedReply | None:
        """Return an agent's reply by the first of the keys that is known, None where there is none."""
        places = self._places.get(agent, {})
        place = next((places[key] for key in keys if key in places), None)
        if place is None:
            return None
        line = json.loads(os.pread(self._file.fileno(), place[1], place[0]))
        return RecordedReply.model_construct(**{"query_id": None, **line})

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()


class RecordedEngine:
    """Implements `protocols.Engine` over files of replies; a query without one is a failed contribution."""

    label = "recorded"

    def __init__(self, options: RecordedOptions, agents: Sequence[str]) -> None:
        """`agents`: those of the pool that it answers for. Blocks while the files are read.

        Raises ConfigError for files that cannot be read, and for an agent without any reply.
        """
        self._options = options
        try:
            self._index = ReplyIndex(home_path(options.replies))
        except ConfigError as error:
            raise ConfigError(f"engine_kwargs.replies: {error}") from error
        self._names = {agent: agent_name(options.names.get(agent, agent)) for agent in agents}
        lacking = next((agent for agent, name in self._names.items() if not self._index.count(name)), None)
        if lacking is not None:
            self._index.close()
            name, found = self._names[lacking], [agent_name(known) for known in self._index.agents]
            more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
            raise ConfigError(
                f"engine_kwargs.replies: {options.replies!r} holds no reply of agent {name!r}; expected one of "
                f"{', '.join(found[:_MAX_NAMED])}{more}; name the agent so, or set engine_kwargs.names.{lacking}"
                f"{did_you_mean(name, found)}"
            )

    async def generate(self, request: GenerationRequest) -> Generation:
        """Return the recorded reply. Raises EngineError where there is none, or where more than the query is asked."""
        started = time.perf_counter()
        if not request.question:
            raise EngineError(
                f"agent {request.agent}: the prompt holds more than the query, and replies are recorded to queries alone; use a "
                "policy of one step, or an engine that generates"
            )
        name = self._names.get(request.agent, request.agent)
        reply = self._index.find(name, (request.question, f"id:{request.query_id}"))
        if reply is None:
            raise EngineError(
                f"agent {request.agent}: no reply to this query is recorded in {Path(self._options.replies).name}; record one, "
                "or ask a query that is there"
            )
        return self._generation(reply, request, (time.perf_counter() - started) * 1e3)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | Generation, None]:
        """Yield the reply's text at once, then the generation."""
        generation = await self.generate(request)
        if generation.text:
            yield TextDelta(text=generation.text)
        yield generation

    async def close(self) -> None:
        """Close the files."""
        self._index.close()

    def _generation(self, reply: RecordedReply, request: GenerationRequest, engine_ms: float) -> Generation:
        prompt = sum(len(message.content) for message in request.messages)
        is_estimated = reply.prompt_tokens is None or reply.completion_tokens is None
        completion = reply.completion_tokens
        if completion is None:
            completion = estimated_tokens(len(reply.text) + len(reply.reasoning or ""))
        completion = generated_tokens(completion, reply.reasoning_tokens or 0)
        return Generation(
            text=reply.text,
            reasoning=reply.reasoning or "",
            finish_reason=reply.finish_reason or "stop",
            entropy=entropy_of(reply, completion - (reply.reasoning_tokens or 0), self._options.vocab_size),
            usage=TokenUsage(
                prompt_tokens=estimated_tokens(prompt) if reply.prompt_tokens is None else reply.prompt_tokens,
                cached_tokens=reply.cached_tokens or 0,
                completion_tokens=completion,
                reasoning_tokens=reply.reasoning_tokens or 0,
            ),
            are_tokens_estimated=is_estimated,
            price=reply.price,
            engine_ms=engine_ms if reply.latency_ms is None else reply.latency_ms,
        )


def entropy_of(reply: RecordedReply, tokens: int, vocab_size: int) -> EntropySum:
    """Return what is known of a reply's entropy, zero tokens for nothing; a mean stands for equal ones (squares: a lower end)."""
    if isinstance(reply.entropy, list):
        return EntropySum.of_tokens(reply.entropy)
    if reply.entropy is not None:
        tokens = reply.entropy_tokens or tokens
        return EntropySum(sum_nats=reply.entropy * tokens, sq_sum=reply.entropy * reply.entropy * tokens, tokens=tokens)
    return sum((listed_entropy(listed, vocab_size) for listed in reply.top_logprobs or ()), EntropySum())
