"""The trace store: a bounded, shared memory of recent queries, off the critical path.

It keeps what an ingress knows of a query as it came; the trace itself, hundreds of kilobytes of JSON after twenty steps,
is written only for those who ask for it, or where traces are to survive a restart (`router.trace_uri`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from dmoa.config import Config, RouterConfig, TracingConfig
from dmoa.errors import ConfigError
from dmoa.feedback import tenant_of
from dmoa.serving.actors import ClusterMemory, pack_record, served_before_restart, unpack_record
from dmoa.serving.feedback import FeedbackSender
from dmoa.serving.otlp import Exporter
from dmoa.serving.trace_archive import KeptTrace, Place, TraceArchive
from dmoa.serving.trace_list import (
    LOAD_S,
    NOT_STORED,
    AgentStatistics,
    TraceFilter,
    TracePage,
    TraceSummary,
    page_of,
    statistics_of,
    summarise,
)
from dmoa.trace import AnsweredQuery

_LOG = logging.getLogger("dmoa.traces")
BATCH_S = 0.1
"""How long an ingress gathers answered queries."""
SAVE_S = 2.0
"""How often what is new is written."""
SPANS_S = 1.0
"""How long a store that ends may take to send spans."""
TEND_S = 60.0
"""How often what is too old goes, and what could not be read, written or removed is tried again, also where nobody asks."""
MAX_PLACES = 16
"""Of earlier places so many are read again where Ray restarts the store."""
_PLACES = "places"


class TraceOutbox:
    """An ingress's way to the store: answered queries of a short while travel in one call, which costs as much as for one."""

    def __init__(self, store: Any, learner: str | None, *, wait_s: float = BATCH_S) -> None:
        """`store` is the actor's handle; `learner` as `TraceStore.put_all` has it."""
        self._store, self._learner, self._wait_s = store, learner, wait_s
        self._waiting: list[tuple[bytes, str]] = []
        self._sending: asyncio.Task[None] | None = None

    async def put(self, one: AnsweredQuery, key_hash: str) -> None:
        """Return once a query is kept. Raises RayError."""
        self._waiting.append((pack_record(one), key_hash))
        if self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send())
        await asyncio.shield(self._sending)

    async def _send(self) -> None:
        await asyncio.sleep(self._wait_s)
        packed, self._waiting, self._sending = self._waiting, [], None
        await self._store.put_all.remote(packed, self._learner)


class TraceStore:
    """Keeps the newest queries of an app, each with the tenant whose key made it."""

    def __init__(
        self,
        bounds: RouterConfig,
        tracing: TracingConfig | None = None,
        app: str | None = None,
        *,
        tend_s: float = TEND_S,
    ) -> None:
        """`app` is whose actor this is; where Ray restarted it, the settings are those that the app served last."""
        served = None if app is None else served_before_restart(app)
        if served is not None:
            config = Config.model_validate(served["config"])
            bounds, tracing = config.router, config.tracing
        self._bounds, self._tend_s = bounds, tend_s
        self._exporter = Exporter(tracing or TracingConfig())
        self._kept: OrderedDict[str, KeptTrace] = OrderedDict()
        self._bytes = 0
        self._sender: FeedbackSender | None = None
        self._archives: list[TraceArchive] = []
        """Where kept traces may be: the places of this actor's life, and of those before it that Ray restarted."""
        self._unread: list[TraceArchive] = []
        """Those of which it is not known yet what lies there."""
        self._archive: TraceArchive | None = None
        self._memory = None if app is None else ClusterMemory(app, "traces")
        self._writing = asyncio.Lock()
        self._saver: asyncio.Task[None] | None = None
        self._tender: asyncio.Task[None] | None = None
        for uri in self._places() if served is not None else ():
            with suppress(ConfigError):  # it could be opened once
                if uri != bounds.trace_uri:
                    self._reach(uri)
        self._open(bounds)
        with suppress(RuntimeError):  # no loop runs yet
            self._tend_often()

    def _open(self, bounds: RouterConfig) -> None:
        """Take these bounds, and what lies at their place. Raises ConfigError for a URI that no file system serves."""
        self._archive = self._reach(bounds.trace_uri) if bounds.trace_uri else None
        self._bounds = bounds
        self._read()

    def _reach(self, uri: str) -> TraceArchive:
        archive = TraceArchive(uri)
        self._archives.append(archive)
        self._unread.append(archive)
        return archive

    def _places(self) -> list[str]:
        """Return the places that the app's traces were written to, the last one last."""
        found = self._memory.get(_PLACES) if self._memory is not None else None
        return json.loads(found) if found else []

    def _remember(self, uri: str | None) -> None:
        """Note in the cluster where traces are written, for an actor that Ray starts in place of this one."""
        if uri is not None and self._memory is not None:
            others = [place for place in self._places() if place != uri]
            self._memory[_PLACES] = json.dumps([*others, uri][-MAX_PLACES:]).encode()

    def _read(self) -> None:
        for archive in tuple(self._unread):
            try:
                for kept in archive.load():
                    self._add(kept)
                self._unread.remove(archive)
            except OSError as error:
                _LOG.warning("traces of %s are not read: %s", archive.place, error)
        # What was there may be older than what came since.
        self._kept = OrderedDict(sorted(self._kept.items(), key=lambda item: item[1].summary.created_unix_s))
        self._shrink()
        self._sweep()

    def _tend_often(self) -> None:
        if self._tender is None or self._tender.done():
            self._tender = asyncio.get_running_loop().create_task(self._tend())

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(self._tend_s)
            async with self._writing:
                if self._unread:
                    self._read()
                await self._write()
            self._shrink()
            self._sweep()

    def _sweep(self) -> None:
        for archive in self._archives:
            archive.sweep(self._oldest_unix_s())

    async def configure(self, bounds: RouterConfig, tracing: TracingConfig) -> None:
        """Take the settings of a configuration; what was kept goes on being kept, and is read where it lies."""
        self._exporter.configure(tracing)
        if bounds.trace_uri != self._bounds.trace_uri:
            await self.save()
            async with self._writing:  # what is being written belongs to no trace yet
                self._open(bounds)
        self._bounds = bounds
        self._shrink()
        self._save_soon()
        self._tend_often()
        self._remember(bounds.trace_uri)

    async def put_all(self, packed: Sequence[tuple[bytes, str]], learner: str | None = None) -> None:
        """Keep packed `AnsweredQuery` records, each with its key's hash; the oldest go when there are too many.

        `learner` is the app whose feedback gets records of them, without texts and not of branches; they are there when this
        returns.
        """
        kept = [(self._keep(one, key_hash), key_hash) for one, key_hash in packed]
        found = [(one, key_hash) for one, key_hash in kept if one.is_stored and one.branched_at is None]
        if learner is not None and found:
            self._sender = self._sender or FeedbackSender(learner)
            await self._sender.send_all(found)

    def _keep(self, packed: bytes, key_hash: str) -> AnsweredQuery:
        one: AnsweredQuery = unpack_record(packed)
        packed, question = (packed, one.query.text) if one.is_stored else (b"", NOT_STORED)
        summary, calls = summarise(one.answer, question=question, created_unix_s=one.created_unix_s)
        if one.branched_at:
            _, calls = summarise(one.own, question=question, created_unix_s=one.created_unix_s)
        self._take(KeptTrace(owner=tenant_of(key_hash), summary=summary, calls=calls, size=len(packed), packed=packed))
        self._exporter.put(one)
        return one

    async def put_failed(self, summary_json: str, key_hash: str) -> None:
        """Keep the summary of a query that was not answered."""
        summary = TraceSummary.model_validate_json(summary_json)
        self._take(KeptTrace(owner=tenant_of(key_hash), summary=summary, calls=(), size=len(summary_json)))

    def _take(self, kept: KeptTrace) -> None:
        self._add(kept)
        self._shrink()
        self._save_soon()

    async def get(self, trace_id: str, key_hash: str | None) -> str | None:
        """Return the trace of a query made with the same key as JSON, else None; without a key, anybody's."""
        kept = self._kept.get(trace_id)
        if kept is None or self._is_old(kept) or (key_hash is not None and kept.owner != tenant_of(key_hash)):
            return None
        if (trace := kept.unpacked()) is not None:
            return trace.line().decode()
        if kept.place is None or not kept.place.length:
            return None
        return await asyncio.to_thread(kept.place.archive.read, kept.place)

    async def listed(self, wanted: TraceFilter, key_hash: str | None) -> TracePage:
        """Return a page of the traces of a key, newest first; without a key, everybody's."""
        return page_of((kept.summary for kept in self._of(key_hash)), wanted)

    async def statistics(self, agents: tuple[str, ...], key_hash: str | None) -> list[AgentStatistics]:
        """Return what the agents did in the traces of a key; without a key, in all."""
        kept, since = list(self._of(key_hash)), time.time() - LOAD_S
        recent = [call for one in kept if one.summary.created_unix_s > since for call in one.calls]
        return statistics_of((call for one in kept for call in one.calls), agents, recent)

    def _of(self, key_hash: str | None) -> Iterator[KeptTrace]:
        owner = None if key_hash is None else tenant_of(key_hash)
        newest_first = (kept for kept in reversed(self._kept.values()) if not self._is_old(kept))
        return (kept for kept in newest_first if owner is None or kept.owner == owner)

    def _oldest_unix_s(self) -> float:
        return time.time() - self._bounds.trace_days * 86_400

    def _is_old(self, kept: KeptTrace) -> bool:
        return kept.summary.created_unix_s < self._oldest_unix_s()

    def _add(self, kept: KeptTrace) -> None:
        before = self._kept.pop(kept.summary.trace_id, None)
        self._bytes += kept.size - (before.size if before else 0)
        self._kept[kept.summary.trace_id] = kept

    def _shrink(self, gone: Sequence[Place] = ()) -> None:
        """Let the oldest go: over the bounds, or too old; and the lines of what is `gone` already."""
        bounds, gone = self._bounds, list(gone)
        while self._kept:
            first = next(iter(self._kept.values()))
            if not self._is_old(first) and len(self._kept) <= bounds.num_traces and self._bytes <= bounds.trace_mb * 2**20:
                break
            self._kept.popitem(last=False)
            self._bytes -= first.size
            if first.place is not None:
                gone.append(first.place)
        for archive in self._archives if gone else ():
            archive.drop([place for place in gone if place.archive is archive])

    def _save_soon(self) -> None:
        if self._archive is not None and (self._saver is None or self._saver.done()):
            self._saver = asyncio.get_running_loop().create_task(self._save_later())

    async def _save_later(self) -> None:
        await asyncio.sleep(SAVE_S)
        await self.save()

    async def save(self) -> None:
        """Write what is new, in one segment; what cannot be written stays in memory and is tried again."""
        async with self._writing:  # nothing is written twice
            await self._write()

    async def _write(self) -> None:
        archive, new = self._archive, [kept for kept in self._kept.values() if kept.place is None]
        if archive is None or not new:
            return
        try:
            places = await asyncio.to_thread(archive.write, new)
        except OSError as error:
            _LOG.warning("%d traces are not written: %s", len(new), error)
            return
        for kept, place in zip(new, places, strict=True):
            kept.place, kept.packed = place, b""
            if self._kept.get(kept.summary.trace_id) is kept:
                self._bytes += place.length - kept.size
                kept.size = place.length
        self._shrink([kept.place for kept in new if kept.place and self._kept.get(kept.summary.trace_id) is not kept])

    async def end(self) -> None:
        """Write what is new, and send the spans that wait, for a moment: the actor is about to end."""
        await asyncio.gather(self.save(), self._send_spans())

    async def _send_spans(self) -> None:
        try:
            async with asyncio.timeout(SPANS_S):
                await self._exporter.flush()
        except TimeoutError:
            _LOG.warning("spans of the last seconds were not taken in time")
