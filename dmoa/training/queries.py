"""Reads the user's own queries from files without labels, and lets several sources of a collection take turns.

Rows of benchmarks and suites come from evaluation and are brought in by `workflows/collect`; training never sees their labels.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from dmoa.errors import ConfigError
from dmoa.training.rollouts import RolloutQuery
from dmoa.validation import short

T = TypeVar("T")
_ID_CHARS = 16
_MANY = 1000
"""Texts beyond twice a limit that are kept before those that will not be drawn are dropped."""
_ALLOWED = 'a line is a text, or a JSON object such as {"query": "What is 12 + 7?"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnQueries:
    """What a file of queries holds."""

    queries: tuple[RolloutQuery, ...]
    """Every text once: in the order of the file, or as drawn where there is a limit."""
    num_bad: int = 0
    """Lines left out because they are not queries."""


def read_queries(path: Path, *, skip_bad_rows: bool = False, limit: int | None = None, seed: int = 0) -> OwnQueries:
    """Read a file of queries, one a line: a text, or {"query": TEXT}, other keys of which are not read.

    With a `limit` only the queries that `sample_queries` draws by `seed` are kept, in its order, so that a long file takes no
    more memory than a short one. Every line is checked all the same.

    Raises ConfigError naming file, line, value and what is expected, for a file that cannot be read, holds no query, or
    (unless they are to be skipped) holds a line that is none.
    """
    texts: dict[str, str] = {}
    num_bad = 0
    for number, line in _lines(path):
        try:
            text = _text(line)
        except ValueError as error:
            if not skip_bad_rows:
                raise ConfigError(f"--queries: {path}, line {number}: {error}; {_ALLOWED}; or add --skip-bad-rows") from None
            num_bad += 1
            continue
        texts.setdefault(_id_of(text), text)
        if limit is not None and len(texts) >= 2 * limit + _MANY:
            texts = dict(sample_queries(texts.items(), limit, seed, itemgetter(0)))
    drawn = sample_queries(texts.items(), limit, seed, itemgetter(0))
    queries = [RolloutQuery(query_id=query_id, source=path.name, split="train", text=text) for query_id, text in drawn]
    if not queries:
        raise ConfigError(f"--queries: {str(path)!r} holds no query; {_ALLOWED}")
    return OwnQueries(queries=tuple(queries), num_bad=num_bad)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1, as they are read. Raises ConfigError."""
    try:
        # Latin-1 keeps every byte as it is, and text files end lines at CR too.
        with path.open(encoding="latin-1", newline=None) as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, line.encode("latin-1")
    except OSError as error:
        raise ConfigError(f"--queries: cannot read {str(path)!r}: {error}; give the path of a file of queries") from error


def _id_of(text: str) -> str:
    return f"queries/{hashlib.sha256(text.encode()).hexdigest()[:_ID_CHARS]}"


def _text(line: bytes) -> str:
    """Return the query of a line. Raises ValueError."""
    text = line.decode("utf-8").strip()
    if not text.startswith("{"):
        return text
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{short(text)} starts like JSON but does not parse") from None
    query = tree.get("query") if isinstance(tree, dict) else None
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"query is {short(query)}; expected a text that is not blank")
    query.encode("utf-8")
    return query.strip()


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
