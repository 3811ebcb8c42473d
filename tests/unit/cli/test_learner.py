"""The learner that `dmoa serve --adapt` starts: where its words go, that its end is told, and where it keeps what it writes."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from dmoa.cli import serve
from dmoa.config import Config
from dmoa.storage import only_one
from dmoa.workflows.console import Common
from dmoa.workflows.terminal import libraries_apart


class _Child:
    """Takes the place of `subprocess.Popen`: says something, and ends when it is told to."""

    def __init__(self, words: list[str], *, stderr: int | None, **options: Any) -> None:
        self.words, self.status, self.is_over = words, 0, threading.Event()
        os.write(2 if stderr is None else stderr, b"what the learner says\n")
        _children.append(self)

    def wait(self) -> int:
        assert self.is_over.wait(10)
        return self.status

    def terminate(self) -> None:
        self.end(143)

    def end(self, status: int) -> None:
        """End, and wait until the server has heard of it."""
        self.status = status
        self.is_over.set()
        for thread in threading.enumerate():
            if thread.name == "dmoa-learner":
                thread.join(10)


_children: list[_Child] = []


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> serve.Learner:
    monkeypatch.setattr(subprocess, "Popen", _Child)
    with libraries_apart("serve", verbosity=0):
        return serve.Learner("127.0.0.1:6379", "dmoa", tmp_path / "learner", Common())


@pytest.mark.parametrize("status", [2, 1, 143, -9])
def test_what_it_says_and_that_it_died_is_on_the_terminal(
    learner: serve.Learner, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _children[-1].end(status)
    said = capfd.readouterr().err
    command = f"dmoa adapt --online --address 127.0.0.1:6379 --app dmoa --out {tmp_path}/learner"
    assert "what the learner says" in said
    assert f"the learner ended with status {status}, and the server goes on without; start it again: {command}" in said


@pytest.mark.parametrize("status", [None, 130, -2])
def test_one_that_is_ended_is_no_news(learner: serve.Learner, status: int | None, capfd: pytest.CaptureFixture[str]) -> None:
    if status is None:
        learner.end()
    else:
        _children[-1].end(status)
    assert "ended with status" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("state", "folder"),
    [
        ("FOLDER/a%20b", "a b/learner"),
        ("FOLDER/elsewhere", "router/mine/learner"),
        (None, "router/mine/learner"),
        ("s3://bucket/x", "router/mine/learner"),
    ],
)
def test_it_writes_beside_the_state_of_its_router(state: str | None, folder: str, pool: Path, tmp_path: Path) -> None:
    """As far as that is on this machine."""
    (tmp_path / "a b").mkdir()
    uri = state and state.replace("FOLDER", tmp_path.as_uri())
    config: Config = Common(config=pool).load()
    config = config.model_copy(update={"router": config.router.model_copy(update={"state_uri": uri})})
    found = serve.learner_folder(config, "mine")
    assert found.is_absolute()
    assert str(found).endswith(folder)


def test_two_clusters_learners_write_to_two_folders(pool: Path, tmp_path: Path) -> None:
    config: Config = Common(config=pool).load()
    config = config.model_copy(update={"router": config.router.model_copy(update={"state_uri": tmp_path.as_uri()})})
    first = serve.learner_folder(config, "mine")
    with only_one(first, "learner", "adapt"):
        assert serve.learner_folder(config, "mine") == tmp_path / "learner-2"
    assert serve.learner_folder(config, "mine") == first == tmp_path / "learner"
    (first / ".adapt.lock").unlink()
    (first / ".adapt.lock").mkdir()  # as little to be had as that of another user
    assert serve.learner_folder(config, "mine") == tmp_path / "learner-2"
