"""The stream of finished queries: each goes to one named, detached actor per app, which keeps and saves a sample.

Nobody waits for it: records are made of the queries that the trace store has, in its process and after the reply, and given up
where too many are on their way or the actor is gone. The actor comes back with its last snapshot, so that its death costs the
records of the last seconds and no query.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import ray
from pyarrow import fs as arrow_fs
from pyarrow.lib import ArrowException
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from dmoa.config import Config, RouterConfig
from dmoa.errors import ConfigError, RequestError
from dmoa.feedback import FILE, Feedback, feedback_of, is_held_back, read_feedback, tenant_of, tenants_of, write_feedback
from dmoa.serving.actors import (
    default_state_uri,
    ensure_actor,
    find_actor,
    once_up,
    pack_record,
    served_before_restart,
    unpack_record,
)
from dmoa.serving.feedback_buffer import FeedbackBuffer, KeptOutcome, Said
from dmoa.serving.trace_list import unknown_trace
from dmoa.storage import is_draft, place_of, under, write_at
from dmoa.trace import AnsweredQuery
from dmoa.types import Query
from dmoa.validation import redact_text

_LOG = logging.getLogger("dmoa.feedback")
MAX_PENDING = 64
"""Records that may be on their way; one more is given up."""
PATIENCE_S = 10.0
"""How long the actor may take for a record, or an outcome."""
NICENESS = 5
"""How far the actor stands back behind what answers queries."""
SAVE_S = 2.0
"""How often what is new is saved, where saving takes no more than a thirtieth of the time."""
_SHARE = 29
LOOK_S = 2.0
"""How often an ingress looks how many queries are to be explored."""
IDLE_WAIT_S = 5.0
"""How long an exploration waits for idle moments, from its draw on: a swarm that never has one is explored too."""
QUIET_S = 0.002
"""How long after a query it still does: its reply is written then."""
STATE = "feedback.json"
"""Traces and outcomes, beside the records."""
_NO_STATE = b'{"tenants": {}}'


class FeedbackStore:
    """A snapshot under `feedback/` of `router.state_uri`; every file is written whole, then renamed."""

    def __init__(self, uri: str) -> None:
        """Open the place. Raises ConfigError for a URI that no file system serves."""
        self._fs, root = place_of(uri, "router.state_uri")
        self._root = f"{root}/feedback"
        self.place = redact_text(under(uri, "feedback"))

    def save(self, records: bytes, state: bytes) -> None:
        """Keep a snapshot. Raises OSError."""
        write_at(self._fs, f"{self._root}/{FILE}", records)
        write_at(self._fs, f"{self._root}/{STATE}", state)

    def sweep(self) -> None:
        """Remove the drafts of writers that died; call when nobody else writes here."""
        try:
            for found in self._fs.get_file_info(arrow_fs.FileSelector(self._root, allow_not_found=True)):
                if found.type == arrow_fs.FileType.File and is_draft(found.base_name):
                    self._fs.delete_file(found.path)
        except OSError as error:
            _LOG.warning("unfinished files of feedback stay where they are: %s", error)

    def load(self) -> tuple[list[Feedback], bytes] | None:
        """Return records and state, or None; records alone where the first save was cut off. Raises ConfigError if unreadable."""
        names = (f"{self._root}/{FILE}", f"{self._root}/{STATE}")
        has_records, has_state = (info.type == arrow_fs.FileType.File for info in self._fs.get_file_info(list(names)))
        if has_state and not has_records:
            raise ConfigError(f"{self.place}: {FILE} is gone, and {STATE} is there; remove the folder to begin anew")
        if not has_records:
            return None
        if not has_state:
            _LOG.warning("%s: %s is not there; queries are taken up without outcomes", self.place, STATE)
        records = self._fs.open_input_stream(names[0]).readall()
        state = self._fs.open_input_stream(names[1]).readall() if has_state else _NO_STATE
        return read_feedback(records, f"{self.place}/{FILE}"), state

    def under(self, newer: FeedbackBuffer, empty: FeedbackBuffer, *, is_expected: bool = False) -> FeedbackBuffer:
        """Return the snapshot with what is `newer`, in `empty`; `newer` itself where there is none that is whole.

        Where one that `is_expected` is not there the log says so. Raises OSError where it cannot be read now.
        """
        try:
            found = self.load()
            if found is None:
                if is_expected:
                    _LOG.warning("feedback begins empty: %s holds none; if some was kept there, is it mounted?", self.place)
                return newer
            empty.restore([*found[0], *newer.records()], found[1])
            empty.add(newer.state())
        except ConfigError as error:
            _LOG.warning("feedback begins anew: %s", error)
            return newer
        return empty


def buffer_of(config: Config) -> FeedbackBuffer:
    """Return an empty buffer with the bounds of a configuration."""
    router = config.router
    return FeedbackBuffer(
        preset=config.gate.preset,
        max_bytes=router.feedback_mb * 2**20,
        outcomes_per_minute=router.outcomes_per_minute,
        max_age_s=router.outcome_days * 86_400,
        key_share=router.feedback_key_share,
        exclude=tenants_of(router.feedback_exclude),
    )


class FeedbackActor:
    """The buffer of one app, and its snapshots."""

    def __init__(self, config_json: str, app: str) -> None:
        os.nice(NICENESS)
        config = Config.model_validate_json(config_json)
        served = served_before_restart(app)
        if served is not None:
            config = Config.model_validate(served["config"])
        self._app = app
        self._saver: asyncio.Task[None] | None = None
        self._changes = self._saved = 0
        self._saving = asyncio.Lock()
        self._config, self._life = config, os.urandom(8).hex()
        self._buffer = buffer_of(config)
        self._store = self._store_of(config)
        self._is_read = self._read()

    def _store_of(self, config: Config) -> FeedbackStore:
        return FeedbackStore(config.router.state_uri or default_state_uri(self._app))

    def _read(self) -> bool:
        """Take up the snapshot, below what came since; returns False where it cannot be read now, and is not written over."""
        try:
            kept = ray.get_runtime_context().was_current_actor_reconstructed or self._config.router.state_uri is not None
            self._buffer = self._store.under(self._buffer, buffer_of(self._config), is_expected=kept)
        except OSError as error:
            _LOG.warning("feedback that was kept cannot be read, and none is saved until it can: %s", error)
            return False
        self._store.sweep()
        self._life = os.urandom(8).hex()
        return True

    async def configure(self, config_json: str) -> None:
        """Take the bounds and the place of a configuration; what was kept goes on being kept, here and there."""
        config = Config.model_validate_json(config_json)
        if config != self._config:
            store = self._store_of(config)
            before, self._buffer, self._config, self._life = self._buffer, buffer_of(config), config, os.urandom(8).hex()
            self._buffer.restore(before.records(), before.state())
            # What lies at another place, or could not be read yet, is taken up before anything is written there.
            self._is_read = self._is_read and store.place == self._store.place
            self._store = store
            self._changes += 1
        self._start_saving()

    async def put(self, packed: bytes) -> None:
        """Take `Feedback` records, packed as one list."""
        for record in unpack_record(packed):
            self._buffer.put(record)
        self._touch()

    async def judge(self, tenant: str, outcome: KeptOutcome) -> Said:
        """Keep an outcome as `FeedbackBuffer.judge`."""
        self._touch()
        return self._buffer.judge(tenant, outcome, time.time())

    async def snapshot(self) -> tuple[bytes, bytes]:
        """Return records and state as they are now, as in the files of a snapshot."""
        return await asyncio.to_thread(write_feedback, self._buffer.records()), self._buffer.state()

    async def since(self, life: str, number: int) -> tuple[str, int, bytes, bytes]:
        """Return what came after the first `number` records: this actor's life, how many have come, records and state.

        All that are kept for another life: the actor was started anew since, and counts from 0.
        """
        count, records = self._buffer.since(number if life == self._life else 0)
        return self._life, count, await asyncio.to_thread(write_feedback, records), self._buffer.state()

    async def newest(self, life: str, number: int) -> tuple[str, int, bytes]:
        """Return the same without the state, the records packed as one list: for the router, which looks every second."""
        count, records = self._buffer.since(number if life == self._life else 0)
        return self._life, count, pack_record(records)

    async def save(self) -> None:
        """Write a snapshot, where something is new."""
        async with self._saving:  # an older snapshot must not be written over a newer one
            if self._changes == self._saved:
                return
            self._is_read = self._is_read or self._read()
            if not self._is_read:
                return
            store, changes, (records, state) = self._store, self._changes, await self.snapshot()
            try:
                await asyncio.to_thread(store.save, records, state)
                self._saved = changes
            except (OSError, ArrowException) as error:
                _LOG.warning("feedback was not saved: %s", error)

    def _touch(self) -> None:
        self._changes += 1
        self._start_saving()

    def _start_saving(self) -> None:
        if self._saver is None or self._saver.done():
            self._saver = asyncio.get_running_loop().create_task(self._save_often())

    async def _save_often(self) -> None:
        while True:
            started = time.monotonic()
            await self.save()
            await asyncio.sleep(max(SAVE_S, _SHARE * (time.monotonic() - started)))


def explore_more(app: str, share: float, for_s: float) -> None:
    """Have a share of an app's queries asked of all agents for some time; every ingress learns of it within seconds."""
    told = {"share": share, "until_unix_s": time.time() + for_s}
    _internal_kv_put(f"dmoa/explore/{app}".encode(), json.dumps(told).encode(), overwrite=True)


def exploration(app: str, usual: float) -> float:
    """Return the share of queries that is to be explored now: `usual`, unless more was asked for and its time is not over."""
    told = json.loads(_internal_kv_get(f"dmoa/explore/{app}".encode()) or b"{}")
    return max(usual, float(told["share"])) if told.get("until_unix_s", 0.0) > time.time() else usual


class Explorer:
    """Decides when an ingress asks queries once more, of all agents, after their answers have left. For one event loop.

    It is work for the learner, so it stands behind those who wait: one at a time, and over time, that in which it gives way left
    out, no longer than the share of queries that is to be explored. Its calls are made in a `turn` each: one by one, begun in a
    moment in which nobody waits. Where none comes soon they go on among the queries, each with a pause behind it that keeps their
    time to the same share: all at once they would delay every query for seconds.
    """

    def __init__(
        self, share: Callable[[], float], *, idle_wait_s: float = IDLE_WAIT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`share` tells how many queries are to be explored now; it may block."""
        self.explored = self.hurried = 0
        """Explorations, and turns that were not waited for to the end."""
        self._ask_share, self._idle_wait_s, self._clock = share, idle_wait_s, clock
        self._place, self._held_s = asyncio.Lock(), 0.0
        self._patient_until_s = self._paused_until_s = -1.0
        self._share, self._look_again_s, self._rest_until_s = 0.0, -1.0, -1.0
        self._waiting = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Somebody waits for an answer within this block."""
        self._waiting += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._idle.set()

    def offer(self, explore: Callable[[], Awaitable[None]]) -> None:
        """Take a query that was answered: `explore` asks it again, if it is its turn and none is under way."""
        if self._task is None and self._clock() >= self._rest_until_s:
            self._task = asyncio.get_running_loop().create_task(self._explore(explore))
            self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None

    async def _explore(self, explore: Callable[[], Awaitable[None]]) -> None:
        now = self._clock()
        if now >= self._look_again_s:
            self._look_again_s = now + LOOK_S
            self._share = await asyncio.to_thread(self._ask_share)
        if random.random() >= self._share:  # noqa: S311 -- exploration, no secret
            return
        self._patient_until_s, self._paused_until_s = self._clock() + self._idle_wait_s, -1.0
        async with self.turn():
            began, self._held_s = self._clock(), 0.0
        try:
            await explore()
        finally:
            self.explored += 1
            ended = self._clock()
            self._rest_until_s = max(self._paused_until_s, ended + self._rest_after_s(ended - began - self._held_s))

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Make one explored call within this block: it begins when the one before is over and nobody waits for an answer."""
        async with self._place:
            asked = self._clock()
            is_hurried = not await self._is_idle_in_time()
            began = self._clock()
            self._held_s += began - asked
            self.hurried += is_hurried
            try:
                yield
            finally:
                if is_hurried:  # its pause pays for it, so it is not charged once more at the end
                    ended = self._clock()
                    self._held_s += ended - began
                    self._paused_until_s = ended + self._rest_after_s(ended - began)

    async def _is_idle_in_time(self) -> bool:
        """Wait for a moment in which nobody waits for an answer; tell whether it came before patience and pause were over."""
        try:
            async with asyncio.timeout(max(0.0, max(self._patient_until_s, self._paused_until_s) - self._clock())):
                while self._waiting:
                    await self._idle.wait()
                    await asyncio.sleep(QUIET_S)
        except TimeoutError:
            return False
        return True

    def _rest_after_s(self, took_s: float) -> float:
        """Return how long to rest after so much time, so that it is no more than the share that is to be explored."""
        return took_s * (1.0 / self._share - 1.0)


def may_be_explored(answered: AnsweredQuery, key_hash: str, router: RouterConfig) -> bool:
    """Tell whether a query may be asked once more: a gate adapts here, decided it, and may learn from its key."""
    may_teach = key_hash or router.feedback_anonymous
    is_learnt_from = (
        answered.is_stored and answered.branched_at is None and router.adaptation != "off" and answered.answer.policy == "dmoa"
    )
    return bool(is_learnt_from and may_teach and tenant_of(key_hash) not in tenants_of(router.feedback_exclude))


def asked_again(query: Query, held_back: float) -> Query:
    """Return a query as it is asked once more to learn from: nobody waits for its answer, or reads it, as in rollouts.

    Of the share `held_back` of queries, that gates are judged by and never learn from, it is if the query is.
    """
    trace_id = secrets.token_hex(16)
    while is_held_back(trace_id, held_back) != is_held_back(query.trace_id, held_back):
        trace_id = secrets.token_hex(16)
    limits = replace(query.limits, deadline_s=None, quorum=None, hedge_after_ms=None)
    # The call of the form that the client wanted is made for nobody: the gate learns nothing of it.
    return replace(query, trace_id=trace_id, epsilon=None, limits=limits, is_streamed=False, final=None)


class FeedbackSender:
    """Makes records of finished queries and sends them on: where the traces are, so that no ingress works for it."""

    def __init__(self, app: str) -> None:
        """Find the app's actor. Raises ValueError where there is none."""
        self._actor = find_actor("feedback", app)
        name = f"dmoa/feedback-salt/{app}".encode()
        _internal_kv_put(name, os.urandom(32), overwrite=False)  # never saved: without it a token tells nothing
        self._salt: bytes = _internal_kv_get(name)
        self._pending = 0
        self.given_up = 0
        """Records that were not sent."""

    async def send_all(self, finished: Sequence[tuple[AnsweredQuery, str]]) -> None:
        """Send records of answered queries, each with its key's hash, in one call; those too many on their way are given up."""
        taken = finished[: max(0, MAX_PENDING - self._pending)]
        self._give_up(len(finished) - len(taken), "too many are on their way")
        if not taken:
            return
        self._pending += len(taken)
        try:
            packed = await asyncio.to_thread(
                lambda: pack_record([feedback_of(one, key_hash=key_hash, salt=self._salt) for one, key_hash in taken])
            )
            async with asyncio.timeout(PATIENCE_S):
                await self._actor.put.remote(packed)
        except (RayError, TimeoutError) as error:
            self._give_up(len(taken), type(error).__name__)
        finally:
            self._pending -= len(taken)

    def _give_up(self, number: int, reason: str) -> None:
        before, self.given_up = self.given_up, self.given_up + number
        if before.bit_length() < self.given_up.bit_length():  # at twice as many each time: a log is bounded too
            _LOG.warning("feedback of %d queries was lost so far, now because of %s", self.given_up, reason)


class FeedbackClient:
    """The ingress's side: creates the actor, and hands outcomes over."""

    def __init__(self, config: Config, app: str) -> None:
        """Find the app's actor, or create it."""
        self._config_json = config.model_dump_json()
        self._actor = ensure_actor(FeedbackActor, "feedback", app, self._config_json, app)

    async def start(self) -> None:
        """Hand the configuration over."""
        await once_up(lambda: self._actor.configure.remote(self._config_json))

    async def judge(self, outcome: KeptOutcome, key_hash: str) -> Said:
        """Hand over an outcome. Raises RequestError: 404 and 429 for what the buffer refuses, 503 while the actor is away."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                said: Said = await self._actor.judge.remote(tenant_of(key_hash), outcome)
        except (RayError, TimeoutError) as error:
            raise RequestError(
                f"outcomes are not taken just now ({type(error).__name__}); send it again", code="feedback_away", status=503
            ) from error
        return check_said(said, outcome)


def check_said(said: Said, outcome: KeptOutcome) -> Said:
    """Return what the buffer said. Raises RequestError (404, 429) where it refused the outcome."""
    if said == "unknown":
        raise unknown_trace(outcome.trace_id)
    if said == "too_many":
        message = "too many outcomes of this key in the last minute (router.outcomes_per_minute); send the rest later"
        raise RequestError(message, code="too_many_requests", status=429)
    return said
