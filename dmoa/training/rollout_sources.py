"""Queries of a collection: the user's own, read from files without labels, and how several sources take turns.

Rows of benchmarks and suites come from evaluation and are brought in by `cli`; training never sees their labels.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dmoa.errors import ConfigError
from dmoa.explain import short
from dmoa.training.rollout_records import RolloutQuery

T = TypeVar("T")
_ID_CHARS = 16
_ALLOWED = 'a line is a text, or a JSON object such as {"query": "What is 12 + 7?"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnQueries:
    """What a file of queries holds."""

    queries: tuple[RolloutQuery, ...]
    """In the order of the file; every text once."""
    num_bad: int = 0
    """Lines left out because they are no query."""


def read_queries(path: Path, *, skip_bad_rows: bool = False) -> OwnQueries:
    """Read a file of queries, one a line: a text, or {"query": TEXT}, other keys of which are not read.

    Raises ConfigError naming file, line, value seen and what is allowed, for a file that cannot be read, holds no query, or
    (unless they are to be skipped) holds a line that is none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--queries: cannot read {str(path)!r}: {error}; give the path of a file of queries") from error
    found: dict[str, RolloutQuery] = {}
    num_bad = 0
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = _text(line)
        except ValueError as error:
            if not skip_bad_rows:
                raise ConfigError(f"--queries: {path}, line {number}: {error}; {_ALLOWED}; or add --skip-bad-rows") from None
            num_bad += 1
            continue
        query_id = f"queries/{hashlib.sha256(text.encode()).hexdigest()[:_ID_CHARS]}"
        found.setdefault(query_id, RolloutQuery(query_id=query_id, source=path.name, split="train", text=text))
    if not found:
        raise ConfigError(f"--queries: {str(path)!r} holds no query; {_ALLOWED}")
    return OwnQueries(queries=tuple(found.values()), num_bad=num_bad)


def _text(line: bytes) -> str:
    """Return the query of a line. Raises ValueError."""
    text = line.decode("utf-8").strip()
    if not text.startswith("{"):
        return text
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"value seen: {short(text)}; it begins as JSON and is none") from None
    query = tree.get("query") if isinstance(tree, dict) else None
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"query: value seen: {short(query)}")
    query.encode("utf-8")
    return query.strip()


def sample(items: Iterable[T], limit: int | None, seed: int, query_id: Callable[[T], str]) -> list[T]:
    """Return `limit` items drawn by seed, the same ones whatever their order; all of them, in order, without a limit."""
    if limit is None:
        return list(items)
    return heapq.nsmallest(limit, items, key=lambda item: hashlib.sha256(f"{seed}\0{query_id(item)}".encode()).digest())


def take_turns(sources: Sequence[Sequence[T]]) -> Iterator[T]:
    """Yield the items of several sources evenly mixed, each source in its own order: any beginning has all in proportion."""
    places = [
        ((position + 0.5) / len(items), number, position)
        for number, items in enumerate(sources)
        for position in range(len(items))
    ]
    for _, number, position in sorted(places):
        yield sources[number][position]
