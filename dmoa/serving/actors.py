"""The detached actors of an app: their names, how they are created, what travels to them, and how they end."""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

import ray
from platformdirs import user_state_path

NAMESPACE = "dmoa"


def router_name(app: str) -> str:
    """Return the name of an app's router actor."""
    return f"dmoa-router-{app}"


def traces_name(app: str) -> str:
    """Return the name of an app's trace store actor."""
    return f"dmoa-traces-{app}"


def feedback_name(app: str) -> str:
    """Return the name of an app's feedback actor."""
    return f"dmoa-feedback-{app}"


def default_state_uri(app: str) -> str:
    """Return where state is kept when the configuration names no place: a folder of this user on this machine."""
    return (user_state_path("dmoa") / "router" / app).as_uri()


def detached(name: str) -> dict[str, Any]:
    """Return the options of a detached actor that restarts for as long as its app lives and takes no CPU of Ray's."""
    return {
        "name": name,
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_concurrency": 1000,
        "num_cpus": 0,
    }


def pack_record(record: object) -> bytes:
    """Return a record as bytes for an actor call: Ray's own pickler takes half a millisecond more for a routing decision."""
    return pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)


def unpack_record(packed: bytes) -> Any:
    """Return the record that `pack` packed, in this cluster."""
    return pickle.loads(packed)  # noqa: S301 -- from our own actors alone, as everything that Ray carries


def end_actors(app: str) -> None:
    """End the actors of an app, those that are there; they do not restart."""
    for name in (traces_name(app), feedback_name(app), router_name(app)):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
