"""Reads the user's own queries from files without labels, and lets several sources of a collection take turns.

Rows of benchmarks and suites come from evaluation and are brought in by `workflows/collect`; training never sees their labels.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from dmoa.engines.recorded import read_replies, replies_files
from dmoa.errors import ConfigError
from dmoa.reading import lines_of, read_json, regular
from dmoa.training.rollouts import RolloutQuery
from dmoa.validation import short

T = TypeVar("T")
_Found = tuple[str, str]
"""Id and text of a query."""
_ID_CHARS = 16
_MANY = 1000
"""Texts beyond twice a limit that are kept before those that will not be drawn are dropped."""
_ALLOWED = 'a line is a text, or a JSON object such as {"query": "What is 12 + 7?"}, {"prompt": TEXT} or {"messages": [...]}'
_FIELDS = ("query", "prompt", "messages")
"""Where the text of a row is looked for, in this order; of messages it is the user's last one."""
_MORE = "\0more"
"""Under which the values of a CSV row beyond the names of the header lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnQueries:
    """What a file of queries holds."""

    queries: tuple[RolloutQuery, ...]
    """Every text once: in the order of the file, or as drawn where there is a limit."""
    num_bad: int = 0
    """Lines left out because they are not queries."""


def read_queries(
    path: Path, *, skip_bad_rows: bool = False, limit: int | None = None, seed: int = 0, field: str | None = None
) -> OwnQueries:
    """Read a file of queries, one a line: a text, or a JSON object with `field`, of whose other keys `query_id` alone is read.

    Without `field` the text is that of query or prompt, or the last user message of messages. A .csv file has the same
    names as columns. A folder, .jsonl.gz and .parquet hold recorded replies; their queries are read, each once.

    With a `limit` only the queries that `sample_queries` draws by `seed` are kept, in its order, so that a long file takes no
    more memory than a short one. Every line is checked all the same.

    Raises ConfigError naming file, line, value and what is expected, for a file that cannot be read, holds no query, or
    (unless they are to be skipped) holds a line that is none.
    """
    found: dict[str, _Found] = {}
    num_bad = 0
    for number, line in _items(path):
        try:
            query = line if isinstance(line, tuple) else _query(line, field)
        except ValueError as error:
            if not skip_bad_rows:
                raise ConfigError(f"--queries: {path}, line {number}: {error}; {_ALLOWED}; or add --skip-bad-rows") from None
            num_bad += 1
            continue
        found.setdefault(_id_of(query[1]), query)
        if limit is not None and len(found) >= 2 * limit + _MANY:
            found = {_id_of(text): (name, text) for name, text in sample_queries(found.values(), limit, seed, itemgetter(0))}
    drawn = sample_queries(found.values(), limit, seed, itemgetter(0))
    queries = [RolloutQuery(query_id=query_id, source=path.name, split="train", text=text) for query_id, text in drawn]
    if not queries:
        raise ConfigError(f"--queries: {str(path)!r} holds no query; {_ALLOWED}")
    twice = next((name for name, count in Counter(query.query_id for query in queries).items() if count > 1), None)
    if twice is not None:
        raise names_two_texts(twice, str(path))
    return OwnQueries(queries=tuple(queries), num_bad=num_bad)


def names_two_texts(query_id: str, where: str) -> ConfigError:
    """Return the error of an id that two different queries have."""
    return ConfigError(f"--queries: {where}: query_id {query_id!r} names two texts; give each query an id of its own, or none")


def _items(path: Path) -> Iterator[tuple[int, bytes | dict[str, Any] | _Found]]:
    """Yield lines, rows or queries of a file, whatever it holds, with their numbers from 1. Raises ConfigError."""
    if path.is_dir() or path.name.endswith((".jsonl.gz", ".parquet")):
        yield from _recorded(path)
    elif path.suffix.lower() == ".csv":
        yield from _rows(path)
    else:
        yield from _lines(path)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a CSV file by the names of its first line; of one column whatever it is called. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8-sig", newline="", opener=regular) as file:
            reader = csv.DictReader(lines_of(file, path), restkey=_MORE)
            for row in reader:
                only = next(iter(row.values())) if len(row) == 1 else None
                yield reader.line_num, {"query": only} if isinstance(only, str) else dict(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--queries: cannot read {str(path)!r}: {error}; give the path of a file of queries") from error


def _recorded(path: Path) -> Iterator[tuple[int, _Found]]:
    """Yield the queries of recorded replies that have a text, one a reply. Raises ConfigError."""
    try:
        for file in replies_files(path):
            for number, reply in enumerate(read_replies(file), start=1):
                text = (reply.query or "").strip()
                if text:
                    yield number, (reply.query_id or _id_of(text), text)
    except ConfigError as error:
        raise ConfigError(f"--queries: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1, as they are read. Raises ConfigError."""
    try:
        # Latin-1 keeps every byte as it is, and text files end lines at CR too.
        with open(path, encoding="latin-1", newline=None, opener=regular) as file:
            for number, line in enumerate(lines_of(file, path), start=1):
                if not line.isspace():
                    yield number, line.encode("latin-1")
    except OSError as error:
        raise ConfigError(f"--queries: cannot read {str(path)!r}: {error}; give the path of a file of queries") from error


def _id_of(text: str) -> str:
    return f"queries/{hashlib.sha256(text.encode()).hexdigest()[:_ID_CHARS]}"


def _query(line: bytes | dict[str, Any], field: str | None) -> _Found:
    """Return the query of a line or row, its id first. Raises ValueError."""
    if isinstance(line, dict):
        tree: Any = line
        if _MORE in line:
            named = len(line) - 1
            raise ValueError(f"{named + len(line[_MORE])} values, the header names {named}; quote a text that holds commas")
    else:
        text = line.decode("utf-8-sig").strip()
        if not text.startswith("{"):
            return _id_of(text), text
        try:
            tree = read_json(text)
        except ValueError:
            raise ValueError(f"{short(text)} starts like JSON but does not parse") from None
    name = field or next((name for name in _FIELDS if tree.get(name) is not None), _FIELDS[0])
    query = tree.get(name)
    if isinstance(query, list):
        query = _last_question(query)
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"{name} is {short(query)}; expected a text that is not blank")
    query.encode("utf-8")
    return _name(tree.get("query_id")) or _id_of(query.strip()), query.strip()


def _name(name: object) -> str:
    """Return the id that a line gives its query, empty where it gives none. Raises ValueError for what is no id."""
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise ValueError(f"query_id is {short(name)}; expected a text or a whole number, or none")
    found = "" if name is None else str(name)
    found.encode("utf-8")
    return found


def _last_question(messages: list[Any]) -> str | None:
    """Return the text of the last user message of a conversation, None where there is none."""
    said = [message for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    content = said[-1].get("content") if said else None
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else None


def sample_queries(items: Iterable[T], limit: int | None, seed: int, query_id: Callable[[T], str]) -> list[T]:
    """Return `limit` items drawn by seed, the same ones whatever their order; all of them, in order, without a limit."""
    if limit is None:
        return list(items)
    return heapq.nsmallest(limit, items, key=lambda item: _place(query_id(item), seed))


def _place(query_id: str, seed: int) -> bytes:
    """Return what decides when a query is drawn: the lowest come first."""
    return hashlib.sha256(f"{seed}\0{query_id}".encode()).digest()


def take_turns(sources: Sequence[Sequence[T]]) -> Iterator[T]:
    """Yield the items of several sources evenly mixed, each source in its own order: any beginning has all in proportion."""
    places = [
        ((position + 0.5) / len(items), number, position)
        for number, items in enumerate(sources)
        for position in range(len(items))
    ]
    for _, number, position in sorted(places):
        yield sources[number][position]
