"""Turns logs of model calls that people have into a file of recorded replies, which the `recorded` engine reads.

Known are pairs of OpenAI-style requests and responses, batch files, W&B tables and LiteLLM spend logs. Of a record only what a
reply consists of is taken, field by field, so keys, headers and users are never copied.
"""

from __future__ import annotations

import gzip
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError

from dmoa.config import SUMMARIZER, from_tree, is_name
from dmoa.engines.openai_replies import listed_logprobs
from dmoa.engines.recorded import RecordedReply, agent_name, read_lines
from dmoa.errors import ConfigError
from dmoa.reading import read_bounded, read_json
from dmoa.storage import replacing, write_whole, writing
from dmoa.training.options import ImportOptions
from dmoa.validation import describe, did_you_mean, short
from dmoa.yaml_tree import parse_yaml

MAX_TABLE_BYTES = 1 << 27
"""Largest file that is one JSON value and has to be read whole."""
_TOLD_EVERY = 20_000
_NO_UNICODE = "a text holds half of a character (a lone surrogate)"
_GUESSES: dict[str, tuple[str, ...]] = {
    "query_id": ("query_id", "example_id", "row_id", "custom_id"),
    "query": ("query", "question", "prompt", "input", "inputs", "instruction", "messages"),
    "agent": ("agent", "model", "model_name", "model_id"),
    "text": ("text", "output", "response", "completion", "reply", "generation", "prediction"),
    "reasoning": ("reasoning", "reasoning_content", "thinking"),
    "entropy": ("entropy", "mean_entropy"),
    "prompt_tokens": ("prompt_tokens", "input_tokens"),
    "completion_tokens": ("completion_tokens", "output_tokens"),
    "latency_ms": ("latency_ms", "duration_ms"),
    "price": ("price", "cost", "spend"),
}
"""Columns of a table that each field is looked for in, whatever their capitals."""


class _TableRow(dict[str, Any]):
    """The row of a W&B table, by its columns."""


class SkippedError(ValueError):
    """A record that is no reply to one question; its text is the reason that is counted."""


class ImportReport(BaseModel):
    """What an import did."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    read: int
    """Records of the logs."""
    written: int
    """Replies that were written."""
    skipped: dict[str, int]
    """Records that were left out, by reason."""
    agents: dict[str, int]
    """Replies by agent, as a pool names it."""
    queries: int
    """Different queries."""
    complete: int
    """Queries that every agent replied to: what `dmoa probe` and `dmoa train` can use in full."""


def import_logs(options: ImportOptions, say: Callable[[str], None]) -> ImportReport:
    """Read the logs, write `options.out` whole, and the pool file where one is asked for. Raises ConfigError."""
    _check_columns(options.columns)
    requests = _batch_requests(options.logs)
    read, tabled, skipped, seen, spelt = 0, 0, Counter[str](), defaultdict[str, set[str]](set), dict[str, str]()
    with writing(options.out), ExitStack() as stack:
        file = stack.enter_context(replacing(options.out))
        is_packed = options.out.suffix == ".gz"
        out = stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb", mtime=0)) if is_packed else file
        for record in _all_records(options.logs):
            read += 1
            tabled += isinstance(record, _TableRow)
            if read % _TOLD_EVERY == 0:
                say(f"{read} records read, {sum(map(len, seen.values()))} replies so far")
            try:
                reply = reply_of(record, requests, options)
                spelling = spelt.setdefault(agent_name(reply.agent), reply.agent)  # GPT-4o and gpt-4o are one agent
                line = reply.model_copy(update={"agent": spelling}).model_dump_json(exclude_none=True).encode()
                _admit(reply, seen)
            except (SkippedError, PydanticSerializationError) as reason:
                skipped[str(reason) if isinstance(reason, SkippedError) else _NO_UNICODE] += 1
                continue
            out.write(line + b"\n")
        if options.columns and not tabled:
            raise ConfigError(
                "--columns: no effect: none of the logs is a W&B table (a JSON file with columns and data); leave it out"
            )
        if not seen:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in skipped.most_common(3)) or "there is no record"
            raise ConfigError(f"import-logs: no reply was found in {read} records ({reasons}); name other files")
    report = _report(read, skipped, seen)
    if options.pool is not None:
        _write_pool(options, report)
    return report


def _check_columns(columns: Iterable[str]) -> None:
    """Raise ConfigError for columns of fields that a reply does not have."""
    unknown = [field for field in (pair.partition("=")[0] for pair in columns) if field not in _GUESSES]
    if unknown:
        known = ", ".join(_GUESSES)
        raise ConfigError(
            f"--columns names {', '.join(map(repr, unknown))}; expected FIELD=COLUMN with a FIELD of {known}"
            f"{did_you_mean(unknown, _GUESSES)}"
        )


def _admit(reply: RecordedReply, seen: defaultdict[str, set[str]]) -> None:
    """Keep account of a reply. Raises SkippedError for one that is there already."""
    name, key = agent_name(reply.agent), reply.keys[0]
    if not is_name(name):
        raise SkippedError("the model's name holds no letter of a to z and no digit; give --agent")
    if key in seen[name]:
        raise SkippedError("a reply of this agent to this query came before")
    seen[name].add(key)


def _report(read: int, skipped: Counter[str], seen: Mapping[str, set[str]]) -> ImportReport:
    return ImportReport(
        read=read,
        written=sum(map(len, seen.values())),
        skipped=dict(skipped.most_common()),
        agents={name: len(keys) for name, keys in sorted(seen.items())},
        queries=len(set().union(*seen.values())),
        complete=len(set.intersection(*seen.values())),
    )


def _all_records(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the records of files: lines of JSON Lines, items of a JSON array, rows of a W&B table. Raises ConfigError."""
    for path in paths:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            for number, line in read_lines(path):
                yield _object(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")
        else:
            yield from _whole(path)


def _whole(path: Path) -> Iterator[dict[str, Any]]:
    try:
        tree = _parsed(read_bounded(path, most=MAX_TABLE_BYTES), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; name a file of logs, a large one JSON Lines (.jsonl)") from error
    if isinstance(tree, dict) and isinstance(tree.get("columns"), list) and isinstance(tree.get("data"), list):
        columns = [str(column) for column in tree["columns"]]
        for number, row in enumerate(tree["data"], start=1):
            if not isinstance(row, list) or len(row) != len(columns):
                raise ConfigError(f"{path}, row {number}: {short(row)}; expected a list of {len(columns)} values, as columns has")
            yield _TableRow(zip(columns, row, strict=True))
        return
    for number, item in enumerate(tree if isinstance(tree, list) else [tree], start=1):
        yield _object(item, f"{path}, item {number}")


def _parsed(data: bytes, where: str) -> Any:
    try:
        return read_json(data, nan_is_null=True)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON ({error}); mend it or take it out, and name JSON Lines .jsonl") from None


def _object(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ConfigError(f"{where}: {short(item)}; expected a JSON object, a record of one call")
    return item


def _batch_requests(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return the bodies of batch input files by custom_id: batch output files do not repeat what was asked."""
    found: dict[str, dict[str, Any]] = {}
    for record in _all_records(paths):
        if _is_batch_input(record) and found.setdefault(name := str(record["custom_id"]), record["body"]) != record["body"]:
            raise ConfigError(
                f"--logs: custom_id {name!r} stands for two different requests of a batch; import each batch by itself (a pool "
                "reads a folder of replies)"
            )
    return found


def _is_batch_input(record: Mapping[str, Any]) -> bool:
    is_asked = "custom_id" in record and "response" not in record and isinstance(record.get("body"), dict)
    return is_asked and not isinstance(record, _TableRow)


def reply_of(record: Mapping[str, Any], requests: Mapping[str, Mapping[str, Any]], options: ImportOptions) -> RecordedReply:
    """Return the reply that a record holds; `requests` are those of batch input files. Raises SkippedError."""
    if isinstance(record, _TableRow):
        values = _of_table(record, options)
    elif _is_batch_input(record):
        raise SkippedError("a request of a batch, for the reply in its output file")
    elif "spend" in record and "response" in record:
        values = _of_litellm(record)
    elif "response" in record:
        values = _of_openai(record, requests)
    else:
        raise SkippedError("neither a request with its response, nor a spend log")
    if options.agent is not None:
        values["agent"] = options.agent
    if not values.get("agent"):
        raise SkippedError("the model is not named; give --agent")
    try:
        return RecordedReply.model_validate(values)
    except ValidationError as error:
        raise SkippedError(describe(error).partition(";")[0][:120]) from None


def _of_openai(record: Mapping[str, Any], requests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    response = _tree(record["response"])
    name = record.get("custom_id") or record.get("query_id")
    code = response.get("status_code")
    if record.get("error") or (isinstance(code, int) and code >= 400):
        raise SkippedError("the call failed")
    request = _tree(record.get("request")) or requests.get(str(name), {})
    request, body = _tree(request.get("body")) or request, _tree(response.get("body")) or response
    values = _of_body(body)
    query = question_of(request.get("messages")) if request.get("messages") else None
    if query is None and name is None:
        raise SkippedError("what was asked is not there: no messages, no custom_id")
    latency = record.get("latency_ms")
    return values | {
        "query_id": None if name is None else str(name),
        "query": query,
        "agent": request.get("model") or body.get("model"),
        "latency_ms": latency if isinstance(latency, int | float) else None,
    }


def _of_litellm(record: Mapping[str, Any]) -> dict[str, Any]:
    if record.get("status") not in (None, "success"):
        raise SkippedError("the call failed")
    asked = _tree(record.get("proxy_server_request"))
    messages = _json(record.get("messages")) or (_tree(asked.get("body")) or asked).get("messages")
    if not messages:
        raise SkippedError("what was asked is not there: LiteLLM keeps it with store_prompts_in_spend_logs")
    values = _of_body(_tree(record["response"]))
    counts = {name: record.get(name) for name in ("prompt_tokens", "completion_tokens") if record.get(name)}
    return values | {
        "query": question_of(messages),
        "agent": record.get("model_group") or record.get("model"),
        "price": record.get("spend"),
        "latency_ms": _milliseconds(record.get("startTime"), record.get("endTime")),
        **counts,
    }


def _of_table(row: Mapping[str, Any], options: ImportOptions) -> dict[str, Any]:
    """Return the fields of a table's row, from the columns that are named or else guessed."""
    named = dict(pair.split("=", 1) for pair in options.columns)
    lower = {column.lower(): column for column in row}
    values: dict[str, Any] = {}
    for field, guesses in _GUESSES.items():
        column = named.get(field) or next((lower[guess] for guess in guesses if guess in lower), None)
        if named.get(field) and named[field] not in row:
            raise ConfigError(f"--columns: {field}={named[field]}: the table has {', '.join(row)}; name one of them")
        if column is not None:
            values[field] = row[column]
    if isinstance(values.get("query"), list):
        values["query"] = question_of(values["query"])
    for field in ("query", "text"):
        if not isinstance(values.get(field), str) and (field == "text" or not values.get("query_id")):
            raise SkippedError(f"the table has no column of the {field}; name it by --columns {field}=COLUMN")
    if values.get("query_id") is not None:
        values["query_id"] = str(values["query_id"])
    return values


def _of_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a chat completion says. Raises SkippedError where that is no text."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = _tree(choice.get("message"))
    text = _text(message.get("content"))
    if not text:
        raise SkippedError("it called a tool" if message.get("tool_calls") else "the response holds no text")
    usage = _tree(body.get("usage"))
    logprobs = _tree(choice.get("logprobs")).get("content")
    return {
        "text": text,
        "reasoning": message.get("reasoning_content") or message.get("reasoning") or None,
        "finish_reason": "length" if choice.get("finish_reason") == "length" else "stop",
        "top_logprobs": listed_logprobs(logprobs) if isinstance(logprobs, list) else None,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "cached_tokens": _tree(usage.get("prompt_tokens_details")).get("cached_tokens"),
        "reasoning_tokens": _tree(usage.get("completion_tokens_details")).get("reasoning_tokens"),
    }


def question_of(messages: Any) -> str:
    """Return the one question that a conversation asks: its last user message.

    Raises SkippedError where earlier turns were part of what was asked, because a pool has replies to questions alone. System
    messages are the agent's own.
    """
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    turns = [turn for turn in turns if turn.get("role") not in ("system", "developer")]
    if not turns:
        raise SkippedError("what was asked is not there: no messages, no custom_id")
    if len(turns) > 1:
        raise SkippedError("a conversation of several turns")
    text = _text(turns[0].get("content"))
    if not text.strip():
        raise SkippedError("the question is not text")
    return text


def _text(content: Any) -> str:
    """Return the text of a message; empty where there is none, or something else beside it."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else ""
    return content if isinstance(content, str) else ""


def _json(value: Any) -> Any:
    """Return JSON in a text as plain values, as databases export it; any other value as it is."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return read_json(value, nan_is_null=True)
        except ValueError:
            return None
    return value


def _tree(value: Any) -> dict[str, Any]:
    found = _json(value)
    return found if isinstance(found, dict) else {}


def _free_name(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: as it is, else with `-logs` at its end."""
    ends = ("", "-logs", *(f"-logs{number}" for number in range(2, len(taken) + 2)))
    return next(one for one in (f"{name[: 64 - len(end)]}{end}" for end in ends) if one not in taken)


def _milliseconds(start: Any, end: Any) -> float | None:
    try:
        return max(0.0, (datetime.fromisoformat(str(end)) - datetime.fromisoformat(str(start))).total_seconds() * 1e3)
    except (ValueError, TypeError):
        return None


def _write_pool(options: ImportOptions, report: ImportReport) -> None:
    """Write a pool file over the replies. Raises ConfigError, also where no pool can have so many agents."""
    pool = options.pool
    assert pool is not None
    names = {_free_name(agent, report.agents) if agent == SUMMARIZER else agent: agent for agent in report.agents}
    name = _free_name(agent_name(options.out.name.removesuffix(".gz").removesuffix(".jsonl")) or "logs", names)
    renamed = {agent: model for agent, model in names.items() if agent != model}
    tree = {
        "name": name,
        "llms": {
            "logs": {
                "model": f"recorded:{name}",
                "engine": "recorded",
                "max_num_seqs": 256,
                "engine_kwargs": {"replies": str(options.out.absolute()), **({"names": renamed} if renamed else {})},
            }
        },
        "agents": [
            {"name": agent, "llm": "logs", "profile": f"The model {model}, as recorded."} for agent, model in names.items()
        ],
        "limits": {"max_steps": 1},
    }
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    from_tree(parse_yaml(text, str(pool)), source=f"--pool: {pool}")
    with writing(pool, "--pool"):
        write_whole(pool, text)
