"""Tracking: JSON lines always, W&B offline for real, a server that never answers, and no secret anywhere."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmoa import tracking
from dmoa.tracking import is_logged, keep_group, keep_run_id, open_tracker
from tests.logged import Logged
from tests.unit.offline_runs import synced

SECRET = "hunter2-do-not-show"


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no mode, no home of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The URL of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


def everything_under(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# JSON lines


def test_json_lines_hold_everything(tmp_path: Path) -> None:
    tracker = open_tracker("jsonl", run_dir=tmp_path, name="x", config={"lr": 0.1})
    tracker.log({"loss": 0.5}, step=3)
    tracker.log({"bad": math.nan, "worse": math.inf})
    tracker.table("table", ["a", "b"], [(1, "x"), (None, 2.5)])
    tracker.artifact(tmp_path / "gate", "gate", "checkpoint")
    tracker.finish()
    config, loss, bad, table, artifact = lines_of(tmp_path)
    assert (config["op"], config["values"]) == ("config", {"lr": 0.1})
    assert (loss["op"], loss["step"], loss["metrics"]) == ("log", 3, {"loss": 0.5})
    assert bad["metrics"] == {"bad": None, "worse": None}
    assert (table["name"], table["columns"], table["rows"]) == ("table", ["a", "b"], [[1, "x"], [None, 2.5]])
    assert (artifact["name"], artifact["kind"], artifact["path"]) == ("gate", "checkpoint", str(tmp_path / "gate"))
    assert artifact["role"] == "output"
    assert not (tmp_path / "wandb").exists()


def test_no_secret_is_in_a_line(tmp_path: Path) -> None:
    tracker = open_tracker("jsonl", run_dir=tmp_path, name="x", config={"auth_tokens": {"prod": SECRET}, "max_tokens": 96})
    tracker.table("t", ["api_key", "tokens", "note"], [(SECRET, 5, f"password: {SECRET}")])
    tracker.finish()
    config, table = lines_of(tmp_path)
    assert config["values"] == {"auth_tokens": {"prod": "[redacted]"}, "max_tokens": 96}
    assert table["rows"] == [["[redacted]", 5, "password: [redacted]"]]


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = open_tracker("jsonl", run_dir=tmp_path, name="x")
    tracker.log({"loss": 1.0})
    assert lines_of(tmp_path)[0]["metrics"] == {"loss": 1.0}
    tracker.finish()


def test_a_torn_line_stays_apart_from_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"op": "log"}\n{"op": "l')
    tracker = open_tracker("jsonl", run_dir=tmp_path, name="x")
    tracker.log({"loss": 1.0})
    tracker.finish()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"op": "l'
    assert json.loads(lines[2])["metrics"] == {"loss": 1.0}


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, logged: Logged) -> None:
    (tmp_path / "file").write_text("no folder")
    tracker = open_tracker("wandb", run_dir=tmp_path / "file" / "run", name="x", config={"a": 1})
    tracker.log({"loss": 1.0})
    tracker.finish()
    assert "the run goes on without it" in logged.text


def test_after_finish_nothing_is_logged_and_nothing_raised(tmp_path: Path, logged: Logged) -> None:
    tracker = open_tracker("jsonl", run_dir=tmp_path, name="x")
    tracker.finish()
    tracker.finish()
    tracker.log({"loss": 1.0})
    assert lines_of(tmp_path) == []
    assert "log after finish" in logged.text


def test_none_logs_nothing(tmp_path: Path) -> None:
    tracker = open_tracker("none", run_dir=tmp_path / "run", name="x", config={"a": 1})
    tracker.log({"loss": 1.0})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_keeps_its_id(tmp_path: Path) -> None:
    first = open_tracker("jsonl", run_dir=tmp_path, name="x")
    first.log({"loss": 2.0})
    first.finish()
    second = open_tracker("jsonl", run_dir=tmp_path, name="x")
    second.log({"loss": 1.0})
    second.finish()
    other = open_tracker("jsonl", run_dir=tmp_path / "other", name="x")
    other.finish()
    assert first.run_id == second.run_id != other.run_id
    assert [line["metrics"]["loss"] for line in lines_of(tmp_path)] == [2.0, 1.0]
    chosen = open_tracker("jsonl", run_dir=tmp_path, name="x", run_id="mine")
    chosen.finish()
    assert chosen.run_id == "mine"


def test_folders_of_one_name_hold_runs_of_their_own(tmp_path: Path) -> None:
    ids = []
    for place in ("round-0", "round-1", "round-0"):
        tracker = open_tracker("jsonl", run_dir=tmp_path / place / "gate", name="gate", of=place)
        tracker.finish()
        ids.append(tracker.run_id)
    assert ids[0] == ids[2] != ids[1]


def test_a_run_of_something_else_in_the_same_folder_gets_an_id_of_its_own(tmp_path: Path) -> None:
    first = open_tracker("jsonl", run_dir=tmp_path, name="x", of="these settings")
    first.log({"loss": 2.0}, step=1)
    first.finish()
    second = open_tracker("jsonl", run_dir=tmp_path, name="x", of="those settings")
    second.log({"loss": 1.0}, step=1)
    second.finish()
    assert first.run_id != second.run_id == keep_run_id(tmp_path) == keep_run_id(tmp_path, of="those settings")
    assert [line["metrics"]["loss"] for line in lines_of(tmp_path)] == [1.0]
    assert '"loss": 2.0' in (tmp_path / f"metrics-{first.run_id}.jsonl").read_text()


def test_an_id_that_was_kept_before_is_still_the_runs(tmp_path: Path) -> None:
    (tmp_path / "tracking.json").write_text('{"run_id": "earlier"}')
    assert keep_run_id(tmp_path, of="settings") == "earlier"
    assert keep_run_id(tmp_path, of="others") != "earlier"


# W&B


@pytest.mark.contract
def test_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    monkeypatch.setenv("SOME_ENVIRONMENT", SECRET)
    config = {"gate": {"hidden": 128}, "api_key": SECRET, "url": f"https://me:{SECRET}@host/v1"}
    patience = {"finish_timeout_s": 120.0, "init_timeout_s": 120.0}  # on a busy machine W&B takes longer than users would wait
    tracker = open_tracker("wandb", run_dir=tmp_path, project="proj", name="my-run", config=config, **patience)
    for step in range(3):
        tracker.log({"loss_of_training": 1.0 / (step + 1), "bad": math.nan}, step=step)
    tracker.table("results_table", ["benchmark", "note"], [["gsm8k", f"https://u:{SECRET}@x/"]])
    (tmp_path / "gate.bin").write_bytes(b"weights")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "part.parquet").write_bytes(b"rows")
    tracker.artifact(tmp_path / "rows", "made-from-these", "rollouts", role="input")
    tracker.artifact(tmp_path / "gate.bin", "gate-artifact", "checkpoint")
    tracker.finish()
    (run,) = offline_runs(tmp_path)
    kept = run.read_bytes()
    for part in (b"my-run", b"proj", b"loss_of_training", b"results_table", b"hidden", tracker.run_id.encode()):
        assert part in kept
    for part in (b"made-from-these", b"gate-artifact", b"part.parquet", b'"role":"input"', b'"role":"output"'):
        assert part in kept.replace(b": ", b":")
    assert tracker.run_id in run.parent.name
    assert SECRET.encode() not in everything_under(tmp_path)
    assert logged.text == ""
    assert len(lines_of(tmp_path)) == 7


class OnlineRun:
    """Stands for a W&B run that is online: keeps the artifacts that it is given."""

    offline = False

    def __init__(self) -> None:
        self.logged: list[Any] = []
        self.used: list[Any] = []

    def log_artifact(self, artifact: Any) -> None:
        self.logged.append(artifact)

    def use_artifact(self, artifact: Any) -> None:
        self.used.append(artifact)


def test_an_input_is_the_very_artifact_that_was_an_output(tmp_path: Path) -> None:
    """W&B tells artifacts by name and digest; the input is not copied, and more content is another version."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "part-0.parquet").write_bytes(b"rows")
    message = {"op": "artifact", "path": str(tmp_path / "rows"), "name": "rollouts-x", "kind": "rollouts"}
    maker, taker, later = OnlineRun(), OnlineRun(), OnlineRun()
    tracking._apply(maker, message | {"role": "output"}, set())
    tracking._apply(taker, message | {"role": "input"}, set())
    (tmp_path / "rows" / "part-1.parquet").write_bytes(b"more")
    tracking._apply(later, message | {"role": "input"}, set())
    ((made,), (used,), (other,)) = maker.logged, taker.used, later.used
    assert (maker.used, taker.logged) == ([], [])
    assert (used.name, used.type, used.digest) == (made.name, made.type, made.digest)
    assert other.digest != made.digest
    (entry,) = used.manifest.entries.values()
    assert entry.local_path == str(tmp_path / "rows" / "part-0.parquet")


@pytest.mark.contract
def test_no_session_of_a_run_replaces_another_when_they_are_synced(tmp_path: Path) -> None:
    for steps in ((1, 2), (3, 4)):
        tracker = open_tracker("auto", run_dir=tmp_path, name="x", finish_timeout_s=120.0, init_timeout_s=120.0)
        for step in steps:
            tracker.log({"loss": float(step)}, step=step)
        tracker.finish()
    runs = synced(tmp_path).values()
    assert sorted((run.rows for run in runs), key=str) == [[{"loss": 1}, {"loss": 2}], [{"loss": 3}, {"loss": 4}]]
    assert sorted(step for run in runs for step in run.steps) == [1, 2, 3, 4]
    assert {run.group for run in runs} == {tracker.run_id}


@pytest.mark.contract
def test_a_step_that_is_logged_again_is_not_dropped(tmp_path: Path) -> None:
    """A training that goes on from its last state meets steps that are logged already, online in the same W&B run."""
    tracker = open_tracker("auto", run_dir=tmp_path, name="x", finish_timeout_s=120.0, init_timeout_s=120.0)
    for step, loss in ((1, 4.0), (2, 3.0), (3, 2.0), (2, 2.5)):
        tracker.log({"loss": loss}, step=step)
    tracker.finish()
    (run,) = synced(tmp_path).values()
    assert (run.steps, run.rows) == ([1, 2, 3, 2], [{"loss": loss} for loss in (4, 3, 2, 2.5)])
    assert run.step_of == {"loss": "step"}, "W&B plots it by this step"


def test_what_is_logged_is_known_by_the_last_of_its_kind(tmp_path: Path) -> None:
    assert not is_logged(tmp_path, "log", metrics={"a": 1.0}, step=None)
    tracker = open_tracker("jsonl", run_dir=tmp_path, name="x")
    tracker.log({"a": 1, "b": math.nan}, step=3)
    tracker.log({"other": 5.0})
    tracker.table("rows", ["a", "b"], [(1, f"https://u:{SECRET}@x/")])
    tracker.artifact(tmp_path / "gate", "gate-1", "checkpoint")
    tracker.finish()
    assert is_logged(tmp_path, "log", metrics={"a": 1.0, "b": math.nan}, step=3)
    assert not is_logged(tmp_path, "log", metrics={"a": 1.0, "b": math.nan}, step=4)
    assert is_logged(tmp_path, "table", name="rows", rows=[[1, f"https://u:{SECRET}@x/"]])
    assert not is_logged(tmp_path, "table", name="others", rows=[[1, f"https://u:{SECRET}@x/"]])
    assert is_logged(tmp_path, "artifact", name="gate-1", kind="checkpoint", role="output")
    assert not is_logged(tmp_path, "artifact", name="gate-2", kind="checkpoint", role="output")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"op": "log", "step": 3, "metrics": {"a": 2.0, "b": null}}\n[1]\n{"op": "lo')
    assert not is_logged(tmp_path, "log", metrics={"a": 1.0, "b": math.nan}, step=3), "the last one counts"


@pytest.mark.contract
def test_a_message_that_wandb_refuses_loses_no_other(tmp_path: Path) -> None:
    tracker = open_tracker("wandb", run_dir=tmp_path, name="x")
    tracker.artifact(tmp_path / "absent", "gate", "checkpoint")
    tracker.log({"comes_after": 1.0})
    tracker.finish()
    (run,) = offline_runs(tmp_path)
    assert b"comes_after" in run.read_bytes()
    assert "artifact: " in (tmp_path / "tracking.log").read_text()


@pytest.mark.contract
def test_a_server_that_never_answers_slows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str, logged: Logged
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    began = time.monotonic()
    tracker = open_tracker("wandb", run_dir=tmp_path, name="x", init_timeout_s=60.0, finish_timeout_s=2.0)
    for step in range(100):
        tracker.log({"loss": 1.0}, step=step)
    logged_s = time.monotonic() - began
    tracker.finish()
    finished_s = time.monotonic() - began
    assert logged_s < 30.0, "logging waited for the server"
    assert finished_s < 45.0, "it waited for its start, not for `finish_timeout_s`"
    assert "W&B did not end in time" in logged.text
    assert len(lines_of(tmp_path)) == 100
    assert b"f" * 40 not in everything_under(tmp_path)


@pytest.mark.contract
def test_a_server_that_never_answers_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    tracker = open_tracker("auto", run_dir=tmp_path, name="x", init_timeout_s=1.0, finish_timeout_s=60.0)
    tracker.log({"kept_offline": 1.0})
    tracker.finish()
    assert b"kept_offline" in offline_runs(tmp_path)[0].read_bytes()
    assert "going on offline" in (tmp_path / "tracking.log").read_text()


@pytest.mark.contract
def test_a_wandb_that_dies_stops_nothing(tmp_path: Path, logged: Logged) -> None:
    tracker = open_tracker("wandb", run_dir=tmp_path, name="x", finish_timeout_s=60.0)
    os.kill(wandb_pid(tracker), signal.SIGKILL)
    for step in range(2000):
        tracker.log({f"figure_{step}": 1.0}, step=step)
    began = time.monotonic()
    tracker.finish()
    assert time.monotonic() - began < 45.0, "it waited for a process that is gone"
    assert "W&B ended with status -9; metrics.jsonl has everything" in logged.text
    assert len(lines_of(tmp_path)) == 2000


def wandb_pid(tracker: Any) -> int:
    return int(tracker._wandb._process.pid)


@pytest.mark.contract
def test_a_mode_that_wandb_refuses_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    tracker = open_tracker("wandb", run_dir=tmp_path, name="x")
    tracker.log({"kept_offline": 1.0})
    tracker.finish()
    assert b"kept_offline" in offline_runs(tmp_path)[0].read_bytes()


@pytest.mark.contract
def test_a_killed_run_leaves_its_curves_and_no_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom dmoa.tracking import open_tracker\n"
        f"tracker = open_tracker('wandb', run_dir=Path({str(tmp_path)!r}), name='x', finish_timeout_s=20.0)\n"
        "tracker.log({'before_the_kill': 1.0})\nprint(tracker._wandb._process.pid, flush=True)\ntime.sleep(300)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert run.stdout is not None
    child = int(run.stdout.readline())
    deadline = time.monotonic() + 60.0
    while not offline_runs(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)
    # W&B's own process writes what it was sent before it ends, on a busy machine after ours did.
    while b"before_the_kill" not in (kept := offline_runs(tmp_path)[0].read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"before_the_kill" in kept


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.contract
def test_importing_tracking_loads_no_wandb() -> None:
    code = "import sys, dmoa.tracking\nassert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.contract
def test_the_level_of_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str) -> None:
    """`auto` says nothing where W&B cannot run, at the level that users see."""
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    logger, records = logging.getLogger("dmoa.tracking"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        tracker = open_tracker("auto", run_dir=tmp_path, name="x", init_timeout_s=60.0, finish_timeout_s=0.5)
        tracker.finish()
    finally:
        logger.removeHandler(handler)
    assert records == []


def test_a_run_joins_the_group_of_what_it_goes_on_from(tmp_path: Path) -> None:
    rollouts, train, evaluation = (tmp_path / name for name in ("rollouts", "train", "evaluation"))
    first = keep_run_id(rollouts)
    assert keep_group(rollouts, first, [None, tmp_path / "nothing"]) == first
    second = keep_run_id(train)
    assert keep_group(train, second, [rollouts]) == first
    third = keep_run_id(evaluation)
    assert keep_group(evaluation, third, [train / "checkpoint"]) == first
    assert len({first, second, third}) == 3
    assert keep_run_id(evaluation) == third
