"""The detached actors of an app: their names, how they are created, what travels to them, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pickle
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

import ray
from platformdirs import user_state_path
from ray.exceptions import ActorUnavailableError, RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

_LOG = logging.getLogger("dmoa.feedback")
T = TypeVar("T")
ActorKind = Literal["router", "traces", "feedback"]
NAMESPACE = "dmoa"
RESTART_S = 60.0
"""How long an actor that restarts is waited for by what cannot begin without it."""
SAVE_PATIENCE_S = 5.0
"""How long an actor that is to end may take to save what it has."""
_PAUSE_S = 0.1


def actor_name(kind: ActorKind, app: str) -> str:
    """Return the name of an app's actor."""
    return f"dmoa-{kind}-{app}"


def find_actor(kind: ActorKind, app: str) -> Any:
    """Return an app's actor. Raises ValueError where it is not there."""
    return ray.get_actor(actor_name(kind, app), namespace=NAMESPACE)


def ensure_actor(actor: type, kind: ActorKind, app: str, *arguments: object) -> Any:
    """Return an app's detached actor, made of these arguments if it is not there; it restarts for as long as its app lives."""
    name = actor_name(kind, app)
    options = {"name": name, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached", "max_restarts": -1}
    return ray.remote(actor).options(**options, max_concurrency=1000, num_cpus=0).remote(*arguments)


def default_state_uri(app: str) -> str:
    """Return where state is kept when the configuration names no place: a folder of this user on this machine."""
    return (user_state_path("dmoa") / "router" / app).as_uri()


def served_before_restart(app: str) -> dict[str, Any] | None:
    """Return what an app served last (`config`, `configured`) to an actor that Ray restarted as it was first made; else None."""
    if not ray.get_runtime_context().was_current_actor_reconstructed:
        return None
    found = _internal_kv_get(f"dmoa/config/{app}".encode())
    return json.loads(found) if found else None


async def once_up(ask: Callable[[], Awaitable[T]]) -> T:
    """Return what an actor answers, asked again while it restarts, for `RESTART_S`: then it raises ActorUnavailableError."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + RESTART_S
    while True:
        try:
            return await ask()
        except ActorUnavailableError:
            if loop.time() > give_up:
                raise
            await asyncio.sleep(_PAUSE_S)


class ClusterMemory:
    """Bytes of an app in its cluster's key-value store: they outlive its actors, and no file system loses them."""

    def __init__(self, app: str, place: str) -> None:
        """`place`: what is kept there, and so what it is another copy of."""
        self._prefix = f"dmoa/state/{app}/{place}/"

    def get(self, name: str) -> bytes | None:
        """Return what is kept under a name."""
        found: bytes | None = _internal_kv_get(self._prefix + name)
        return found or None

    def __setitem__(self, name: str, data: bytes) -> None:
        _internal_kv_put(self._prefix + name, data, overwrite=True)

    @staticmethod
    def forget(app: str) -> None:
        """Forget all of an app."""
        _internal_kv_del(f"dmoa/state/{app}/", del_by_prefix=True)


def pack_record(record: object) -> bytes:
    """Return a record as bytes for an actor call: Ray's own pickler takes half a millisecond more for a routing decision."""
    return pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)


def unpack_record(packed: bytes) -> Any:
    """Return the record that `pack` packed, in this cluster."""
    return pickle.loads(packed)  # noqa: S301 -- from our own actors alone, as everything that Ray carries


def end_actors(app: str, patience_s: float = SAVE_PATIENCE_S) -> None:
    """End the actors of an app, those that are there; they do not restart. Blocks: not for an event loop.

    Traces and feedback are asked to save first what they answered for, both at once, for `patience_s` at most.
    """
    give_up, saving = time.monotonic() + patience_s, {}
    with contextlib.suppress(ValueError):
        saving["traces"] = find_actor("traces", app).end.remote()
    with contextlib.suppress(ValueError):
        saving["feedback"] = find_actor("feedback", app).save.remote()
    for what, saved in saving.items():
        try:
            ray.get(saved, timeout=max(0.0, give_up - time.monotonic()))
        except RayError as error:
            _LOG.warning("%s: the last seconds were not saved: %s", what, type(error).__name__)
    kinds: tuple[ActorKind, ...] = ("traces", "feedback", "router")
    for kind in kinds:
        with contextlib.suppress(ValueError):
            ray.kill(find_actor(kind, app))
