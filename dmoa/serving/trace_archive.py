"""Traces on any Ray file system: segments of a few seconds each, so that a restart loses no more than those.

`SEGMENT.jsonl` holds a trace per line, as `dmoa run --replay` reads them; `SEGMENT.index.jsonl` what a list needs of each, its
owner, and where its line is. Both are written whole; secrets are taken out of all texts. A segment goes with its last trace,
and what no index tells of, because it is damaged or its writer died, once it is as old as traces may become.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyarrow import fs as arrow_fs
from pyarrow.lib import ArrowException
from pydantic import Field, ValidationError

from dmoa.reading import MAX_LINE_BYTES
from dmoa.serving.actors import unpack_record
from dmoa.serving.trace_list import TraceCalls, TraceSummary
from dmoa.storage import json_line, place_of, write_at
from dmoa.trace import ReplyModel, Trace
from dmoa.validation import redact_text

_LOG = logging.getLogger("dmoa.traces")
_LINES, _INDEX = ".jsonl", ".index.jsonl"
_OURS = re.compile(r"\.?((\d{15})-[0-9a-f]{6})(?:\.index)?\.jsonl(?:\.[0-9a-f]{8}\.draft)?")
"""Files of a segment and drafts of them; the digits are the milliseconds at which it was written."""
_FAILURES = (OSError, ArrowException)
_TEXTS = frozenset(("text", "content", "answer", "reasoning", "error", "summary", "user", "question"))
"""Fields of a trace that hold somebody's words."""
_WORDS = frozenset(("query", "metadata", "choices"))
"""Parts of a trace in which all texts are somebody's words, ids aside: results of tools, forms and stop texts too."""
_IDS = frozenset(("trace_id", "query_id"))


def without_secrets(value: Any, name: str = "") -> Any:
    """Return a trace, or a part of one, with the secrets taken out of its texts; names and versions stay."""
    if isinstance(value, str):
        return redact_text(value) if name in _TEXTS else value
    if isinstance(value, dict):
        are_words = name in _WORDS or name == "text"
        return {key: without_secrets(inner, "text" if are_words and key not in _IDS else key) for key, inner in value.items()}
    return [without_secrets(inner, name) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a trace's line is."""

    archive: TraceArchive
    segment: str
    offset: int
    length: int
    """Bytes, line end included; 0 where a query failed and only its summary is kept."""


@dataclass(slots=True, kw_only=True)
class KeptTrace:
    """What is kept of a query: all of it in memory or in an archive, or its summary alone."""

    owner: str
    """The tenant whose key asked."""
    summary: TraceSummary
    calls: tuple[TraceCalls, ...]
    size: int
    """Bytes of the query as it came, or of its line."""
    packed: bytes = b""
    """The query as it came; empty once it is written, and where it failed or may not be kept."""
    place: Place | None = None

    def unpacked(self) -> Trace | None:
        """Return the trace of a query that is in memory, else None."""
        return unpack_record(self.packed).trace() if self.packed else None


class Indexed(ReplyModel):
    """A line of an index."""

    owner: str
    offset: int = Field(ge=0)
    length: int = Field(ge=0)
    summary: TraceSummary
    calls: tuple[TraceCalls, ...]


def _indexed(line: bytes) -> Indexed | None:
    try:
        return Indexed.model_validate_json(line)
    except ValidationError:
        return None


class TraceArchive:
    """Reads and writes segments; only the trace store of one app uses a place."""

    def __init__(self, uri: str) -> None:
        """Open the place. Raises ConfigError for a URI that no file system serves."""
        self._fs, self._root = place_of(uri, "router.trace_uri")
        self.place = redact_text(uri)
        self._held: Counter[str] = Counter()
        self._stray: dict[str, float] = {}
        """Files that belong to no trace, and when they were written; 0 for those that should be gone already."""

    def write(self, batch: Sequence[KeptTrace]) -> list[Place]:
        """Write one segment and return where each trace is. Raises OSError."""
        segment = f"{time.time_ns() // 1_000_000:015d}-{secrets.token_hex(3)}"
        lines, index, places = bytearray(), [], []
        for one in batch:
            trace = one.unpacked()
            line = b"" if trace is None else json_line(without_secrets(trace.model_dump(mode="json")))
            summary = TraceSummary.model_validate(without_secrets(one.summary.model_dump()))
            kept = Indexed(owner=one.owner, offset=len(lines), length=len(line), summary=summary, calls=one.calls)
            places.append(Place(archive=self, segment=segment, offset=len(lines), length=len(line)))
            index.append(kept.model_dump_json().encode())
            lines += line
        try:
            write_at(self._fs, self._path(segment, _LINES), bytes(lines))
            write_at(self._fs, self._path(segment, _INDEX), b"\n".join(index))
        except BaseException:
            self._stray[segment + _LINES] = 0.0
            raise
        self._held[segment] += len(batch)
        return places

    def read(self, place: Place) -> str | None:
        """Return the line of a trace, None where it is gone, or no line lies there any more."""
        try:
            with self._fs.open_input_file(self._path(place.segment, _LINES)) as file:
                file.seek(place.offset)
                line = bytes(file.read(place.length))
        except OSError:
            return None
        return line.decode("utf-8", "replace") if line.startswith(b"{") and line.endswith(b"\n") else None

    def load(self) -> Iterator[KeptTrace]:
        """Yield all that is there, oldest first; what cannot be read is left out with a warning. Raises OSError."""
        found = self._fs.get_file_info(arrow_fs.FileSelector(self._root, allow_not_found=True))
        files = [one for one in found if one.type == arrow_fs.FileType.File]
        there = (one.base_name for one in files if one.size <= MAX_LINE_BYTES)
        for segment in sorted(name.removesuffix(_INDEX) for name in there if name.endswith(_INDEX)):
            try:
                with self._fs.open_input_stream(self._path(segment, _INDEX)) as stream:
                    lines = bytes(stream.readall()).splitlines()
            except OSError as error:
                _LOG.warning("traces of %s are left out: %s", segment, str(error).splitlines()[0])
                continue
            kept = [one for one in map(_indexed, lines) if one is not None]
            if lost := len(lines) - len(kept):
                _LOG.warning("%d traces of %s are left out: their lines in its index are damaged", lost, segment)
            self._held[segment] = len(kept)
            for one in kept:
                place = Place(archive=self, segment=segment, offset=one.offset, length=one.length)
                yield KeptTrace(owner=one.owner, summary=one.summary, calls=one.calls, size=one.length, place=place)
        for ours in filter(None, (_OURS.fullmatch(one.base_name) for one in files)):
            if ours[0].startswith(".") or not self._held[ours[1]]:
                self._stray[ours[0]] = int(ours[2]) / 1e3

    def drop(self, places: Sequence[Place]) -> None:
        """Forget traces; a segment of which none is left is removed, or tried again by `sweep`."""
        self._held.subtract(place.segment for place in places)
        gone = {place.segment for place in places if self._held[place.segment] <= 0}
        for segment in gone:
            del self._held[segment]
        self._remove([segment + ending for segment in gone for ending in (_INDEX, _LINES)])

    def sweep(self, oldest_unix_s: float) -> None:
        """Remove what is older and belongs to no trace, and what could not be removed before."""
        self._remove([name for name, unix_s in list(self._stray.items()) if unix_s < oldest_unix_s])

    def _remove(self, names: Sequence[str]) -> None:
        failed: list[BaseException] = []
        for name in names:
            self._stray.pop(name, None)
            try:
                self._delete(f"{self._root}/{name}")
            except _FAILURES as error:
                failed.append(error)
                self._stray[name] = 0.0
        if failed:
            _LOG.warning("%d files of old traces stay where they are for now: %s", len(failed), failed[0])

    def _delete(self, path: str) -> None:
        """Remove a file, unless it is gone already. Raises OSError."""
        try:
            self._fs.delete_file(path)
        except _FAILURES:
            if self._fs.get_file_info(path).type != arrow_fs.FileType.NotFound:
                raise

    def _path(self, segment: str, ending: str) -> str:
        return f"{self._root}/{segment}{ending}"
