"""Caches greedy agent calls by content: the same prompt to the same agent is generated once, whoever asks.

Stands between the orchestrator and an agent client, in one SQLite file that is safe for several processes. A reply from the
cache counts its tokens as if it had been run, and is marked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from pydantic import TypeAdapter

from dmoa.config import Config, callable_agents
from dmoa.engine_options import ENGINES
from dmoa.engines.models import adapter_hash, model_id
from dmoa.errors import ConfigError
from dmoa.flat import flat_reply, reply_of
from dmoa.protocols import AgentClient
from dmoa.reading import hash_file
from dmoa.storage import check_local
from dmoa.types import AgentCall, AgentReply, TextDelta
from dmoa.validation import is_finite

T = TypeVar("T")
_LOG = logging.getLogger("dmoa.call_cache")
FILE_NAME = "calls.sqlite3"
_VERSION = 3
_BUSY_S = 60.0
_MAX_BYTES = 16 << 20
"""Of an entry: a larger one is not kept, and not found."""
_REPLY = TypeAdapter(AgentReply)


class CallStore:
    """Replies by key, in one file of a folder."""

    def __init__(self, folder: str | Path) -> None:
        """Open or make the file. Raises ConfigError if that cannot be done."""
        path = Path(folder) / FILE_NAME
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite does not wait for its turn to change the journal mode: workers that open a new file do so one by one.
            with FileLock(path.with_suffix(".lock"), timeout=_BUSY_S):
                # Autocommit: a reply is on disk once `put` returns, and a killed run keeps all it has paid for.
                self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
                self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_BYTES)  # before anything of a file is read
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
                if self._connection.execute("SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone():
                    raise OSError("it holds programs (views, triggers), which no cache of ours does")
        except (OSError, sqlite3.Error) as error:
            is_damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
            advice = "remove that file to begin anew" if is_damaged else "name a folder that can be written"
            raise ConfigError(f"--call-cache: cannot open {str(path)!r}: {error}; {advice}") from error

    def get(self, key: str) -> AgentReply | None:
        """Return the reply kept under a key, None if there is none or it is not one: a number as text, NaN tokens, any status.

        What is not one is given up, so that the next reply is kept in its place.
        """
        row = None
        try:
            with self._lock:
                row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            return None if row is None else _reply_in(row[0])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, sqlite3.DataError):
            # Written by another version, or by nobody of ours; or larger than any.
            found = "" if row is None else " AND reply IS ?"  # not what another process has kept meanwhile
            with self._lock:
                self._connection.execute(f"DELETE FROM replies WHERE key = ?{found}", (key, *(row or ())))  # noqa: S608
            return None

    def put(self, key: str, reply: AgentReply) -> None:
        """Keep a reply; the first one kept under a key stays, so that all who share the file read the same."""
        text = json.dumps(flat_reply(reply))
        with self._lock, suppress(sqlite3.DataError):  # larger than is kept
            self._connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()


def cache_folder(folder: Path | None) -> Path | None:
    """Return a folder as workers name it, None for none. Raises ConfigError here, not in a worker, where it cannot be used."""
    if folder is None:
        return None
    check_local(folder, "--call-cache")
    CallStore(folder.absolute()).close()
    return folder.absolute()


def _reply_in(text: str) -> AgentReply:
    """Return the reply that an entry holds. Raises ValueError, TypeError, KeyError, AttributeError, RecursionError."""
    flat = json.loads(text)
    numbers = [x for name, x in flat.items() if isinstance(x, int | float) and not name.endswith("slack_nats")]
    if not all(isinstance(x, bool) or (is_finite(x) and x >= 0) for x in numbers):
        raise ValueError("a number is negative, or none")
    return _REPLY.validate_json(json.dumps(asdict(reply_of(flat))), strict=True)


class CachedAgents:
    """An `AgentClient` that asks another one only for what no earlier call has asked; sampled calls pass by."""

    def __init__(self, agents: AgentClient, store: CallStore, identities: Mapping[str, str]) -> None:
        """`identities` says, by agent name, everything but the call itself that a reply depends on."""
        self._agents = agents
        self._store = store
        self._identities = dict(identities)
        self._in_flight: dict[str, asyncio.Future[AgentReply]] = {}
        self._is_warned = False

    async def call(self, call: AgentCall) -> AgentReply:
        """Return the kept reply, marked, or ask. The same call in flight twice is run once. Raises as the client does."""
        if call.sampling.temperature > 0 or call.final is not None:
            return await self._agents.call(call)
        key = self._key(call)
        while (running := self._in_flight.get(key)) is not None:
            # Whoever runs it may be cancelled, late or fail: then this one looks again, and runs it itself.
            await asyncio.wait([running])
            if not running.cancelled() and is_whole(running.result(), call):
                return replace(running.result(), agent=call.agent, is_memoised=True)
        kept = await self._try(partial(self._store.get, key))
        if kept is not None:
            return replace(kept, agent=call.agent, is_memoised=True)
        if key in self._in_flight:
            return await self.call(call)
        return await self._run(key, call)

    async def _run(self, key: str, call: AgentCall) -> AgentReply:
        running: asyncio.Future[AgentReply] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = running
        try:
            reply = await self._agents.call(call)
            if is_whole(reply, call):
                await self._try(partial(self._store.put, key, reply))
            running.set_result(reply)
            return reply
        finally:
            del self._in_flight[key]
            running.cancel()

    async def _try(self, work: Callable[[], T]) -> T | None:
        """Read or write the file; where that fails, on a full disk say, calls go on as without a cache."""
        try:
            return await asyncio.to_thread(work)
        except sqlite3.Error as error:
            if not self._is_warned:
                self._is_warned = True
                _LOG.warning("call cache: replies are neither kept nor found (%s)", error)
            return None

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        """Yield the whole text at once, then the reply."""
        reply = await self.call(call)
        if reply.reasoning:
            yield TextDelta(text=reply.reasoning, is_reasoning=True)
        if reply.text:
            yield TextDelta(text=reply.text)
        yield reply

    async def ping(self, agent: str) -> None:
        """Ask the client."""
        await self._agents.ping(agent)

    def _key(self, call: AgentCall) -> str:
        """Return the SHA-256 over what a greedy reply depends on; the call's id, its seed and its deadline are not part of it."""
        content = {
            "version": _VERSION,
            "agent": self._identities[call.agent],
            "messages": [(message.role, message.content) for message in call.messages],
            "max_tokens": call.sampling.max_tokens,
            "stop": call.sampling.stop,
            **({"repetition_penalty": penalty} if (penalty := call.sampling.repetition_penalty) else {}),
            **({"template": template} if (template := call.sampling.template) else {}),
            **({"query_id": call.query_id} if call.question else {}),  # recorded replies go by it too
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def is_whole(reply: AgentReply, call: AgentCall) -> bool:
    """Return whether a reply is what the call alone comes to: it ended by itself, or by the call's own limit of tokens.

    One that ended below the limit was cut by a deadline or by the engine's room; where tokens are estimated, nobody knows.
    """
    if reply.status != "ok":
        return False
    is_full = reply.usage.completion_tokens >= call.sampling.max_tokens and not reply.are_tokens_estimated
    return reply.finish_reason == "stop" or (reply.finish_reason == "length" and is_full)


def call_identities(config: Config) -> dict[str, str]:
    """Return by agent name what its replies depend on beside the call: model, engine and options, adapter, tools, corpus.

    Two agents that differ in their role alone have the same: the role is part of the call's messages.
    """
    found = {}
    for agent in callable_agents(config):
        llm = config.llms[agent.llm]
        entry = llm.engine_entry
        identity = {
            "model": model_id(llm.model),
            # Of an engine from a file its content: an edited one says other things, and a moved one the same.
            "engine": ENGINES.digest(entry.name) or entry.name,
            "options": llm.options.model_dump(mode="json"),
            "entropy_scope": config.gate.entropy_scope,
            "adapter": adapter_hash(agent.adapter) if agent.adapter else None,
            "tools": agent.tools,
            "corpus": _corpus_hash(config) if "search" in agent.tools else None,
            # Scripted and recorded replies go by the agent's name.
            "name": agent.name if entry.is_scripted or entry.is_recorded else None,
        }
        found[agent.name] = json.dumps(identity, sort_keys=True)
    return found


def _corpus_hash(config: Config) -> str | None:
    """Return the SHA-256 of the corpus that `search` reads, None where there is none."""
    corpus = config.tools.search_corpus
    if corpus is None:
        return None
    try:
        return hash_file(corpus)
    except OSError as error:
        raise ConfigError(f"tools.search_corpus: cannot read {corpus!r}: {error}; give a JSON Lines file") from error
