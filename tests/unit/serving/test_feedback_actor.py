"""The feedback actor apart from Ray: what lies at its place is never written over unread, and an orderly end saves first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from dmoa.config import Config
from dmoa.feedback import FILE, write_feedback
from dmoa.serving.actors import end_actors, pack_record
from dmoa.serving.feedback import FeedbackActor, FeedbackStore, buffer_of
from dmoa.testing import scripted_pool
from tests.logged import Logged
from tests.unit.serving.test_feedback_buffer import made


class _Context:
    was_current_actor_reconstructed = False


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", _Context)
    monkeypatch.setattr(os, "nice", lambda by: by)


def config_at(place: Path, **router: Any) -> Config:
    config = scripted_pool()
    return config.model_copy(update={"router": config.router.model_copy(update={"state_uri": place.as_uri()} | router)})


def keep(place: Path, *numbers: int) -> None:
    """Leave feedback of a swarm at a place."""
    kept = buffer_of(scripted_pool())
    for number in numbers:
        kept.put(made(number))
    FeedbackStore(place.as_uri()).save(write_feedback(kept.records()), kept.state())


def kept_at(place: Path) -> list[str]:
    found = FeedbackStore(place.as_uri()).load()
    assert found is not None
    return [record.answer.trace_id for record in found[0]]


async def put_and_save(actor: FeedbackActor, number: int) -> None:
    await actor.put(pack_record([replace(made(number), created_unix_s=9.0)]))
    await actor.save()


@contextmanager
def unreadable(place: Path) -> Iterator[None]:
    """Have what is kept at a place answer with an error, as a mount does whose server is away."""
    file, away = place / "feedback" / FILE, place / "away"
    file.rename(away)
    file.symlink_to("/proc/self/mem")  # a file that is there, and whose first byte cannot be read
    yield
    file.unlink()
    away.rename(file)


async def test_a_redeploy_writes_nothing_over_feedback_that_could_not_be_read(tmp_path: Path) -> None:
    keep(tmp_path, 1, 2)
    with unreadable(tmp_path):
        actor = FeedbackActor(config_at(tmp_path).model_dump_json(), "dmoa")
        await actor.configure(config_at(tmp_path, explore=0.1).model_dump_json())
        await put_and_save(actor, 3)
    assert kept_at(tmp_path) == ["mine1", "mine2"]
    await actor.save()
    assert kept_at(tmp_path) == ["mine1", "mine2", "mine3"]


async def test_feedback_that_lies_where_an_app_moves_to_is_taken_up(tmp_path: Path) -> None:
    keep(tmp_path / "there", 1, 2)
    actor = FeedbackActor(config_at(tmp_path / "here").model_dump_json(), "dmoa")
    await put_and_save(actor, 3)
    await actor.configure(config_at(tmp_path / "there").model_dump_json())
    await put_and_save(actor, 4)
    assert kept_at(tmp_path / "there") == ["mine1", "mine2", "mine3", "mine4"]
    assert kept_at(tmp_path / "here") == ["mine3"]


def test_what_a_killed_writer_left_half_written_is_removed(tmp_path: Path) -> None:
    keep(tmp_path, 1)
    kept_in = tmp_path / "feedback"
    for name in (f".{FILE}.0a1b2c3d.draft", "notes.draft"):
        (kept_in / name).write_bytes(b"half")
    FeedbackActor(config_at(tmp_path).model_dump_json(), "dmoa")
    assert sorted(path.name for path in kept_in.iterdir()) == ["feedback.json", "notes.draft", FILE]
    assert kept_at(tmp_path) == ["mine1"]


class _Ray:
    """Named actors, and what was done to them in order."""

    def __init__(self, *names: str, fails: RayError | None = None) -> None:
        self.names, self.fails = names, fails
        self.done: list[str] = []

    def get_actor(self, name: str, namespace: str) -> Any:
        if name not in self.names:
            raise ValueError(f"no actor {name}")
        calls = {call: SimpleNamespace(remote=lambda call=call: f"{call} {name}") for call in ("end", "save")}
        return SimpleNamespace(name=name, **calls)

    def get(self, what: str, timeout: float) -> None:
        self.done.append(f"{what} within {timeout:.0f} s")
        if self.fails is not None:
            raise self.fails

    def kill(self, handle: Any) -> None:
        self.done.append(f"kill {handle.name}")


ENDED = ["kill dmoa-traces-a", "kill dmoa-feedback-a", "kill dmoa-router-a"]


@pytest.fixture(name="ray_of")
def _ray_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Ray]:
    def ray_of(*names: str, fails: RayError | None = None) -> _Ray:
        found = _Ray(*names, fails=fails)
        for name in ("get_actor", "get", "kill"):
            monkeypatch.setattr(ray, name, getattr(found, name))
        return found

    return ray_of


@pytest.mark.parametrize("fails", [None, GetTimeoutError("too slow"), ActorDiedError()])
def test_traces_and_feedback_are_saved_before_the_actors_of_an_app_end(
    ray_of: Callable[..., _Ray], logged: Logged, fails: RayError | None
) -> None:
    swarm = ray_of("dmoa-traces-a", "dmoa-feedback-a", "dmoa-router-a", fails=fails)
    end_actors("a", 3.0)
    assert swarm.done == ["end dmoa-traces-a within 3 s", "save dmoa-feedback-a within 3 s", *ENDED]
    assert len(logged.messages) == (0 if fails is None else 2)


def test_an_app_without_feedback_ends_too(ray_of: Callable[..., _Ray]) -> None:
    swarm = ray_of("dmoa-router-a")
    end_actors("a")
    assert swarm.done == ["kill dmoa-router-a"]
