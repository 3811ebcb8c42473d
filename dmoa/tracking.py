"""Logs settings, curves, tables and files of a run: as JSON lines always, to Weights & Biases where it is wanted.

A run neither waits for W&B nor fails by it: wandb lives in a process of its own (this module as a program), fed through a
queue by a thread; a server that hangs costs the run nothing but the bounded wait of `finish`. Offline without a key.

Online, a run that goes on resumes its W&B run. Offline, every session of it is a W&B run with an id of its own, in one group
named by the run's id: `wandb sync` writes a W&B run anew from its first step, and would lose a session of the same id.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, Protocol

from dmoa.validation import redact

Mode = Literal["auto", "wandb", "jsonl", "none"]
Role = Literal["input", "output"]
"""Which side of a run an artifact is on: the lineage of a checkpoint is the inputs of the run that made it."""
FINISH_TIMEOUT_S = 30.0
"""How long `finish` waits for W&B to have everything."""
INIT_TIMEOUT_S = 15.0
"""How long W&B's server may take to begin a run, before the run goes on offline."""
_MAX_QUEUED = 10_000
_LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes what a run logs. No method raises for what the tracker meets, and none waits, `finish` aside."""

    run_id: str
    """Stable name of the run, the same when it goes on later: W&B's id online, its group always."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log figures by name; those of one step belong together."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Log a table of plain values."""
        ...

    def config(self, values: Mapping[str, Any]) -> None:
        """Add settings; secrets are taken out."""
        ...

    def artifact(self, path: Path, name: str, kind: str, role: Role = "output") -> None:
        """Log a file or a folder under a name and a kind, such as `checkpoint`: made by the run, or what it was made from.

        An input with the name, kind and content of another run's output is that very artifact: W&B links the two runs.
        """
        ...

    def finish(self) -> None:
        """End the logging; waits for it, for a bounded time. Calling it again does nothing."""
        ...


def open_tracker(
    mode: Mode,
    *,
    run_dir: Path,
    project: str = "dmoa",
    name: str,
    run_id: str | None = None,
    of: str = "",
    config: Mapping[str, Any] | None = None,
    finish_timeout_s: float = FINISH_TIMEOUT_S,
    init_timeout_s: float = INIT_TIMEOUT_S,
) -> Tracker:
    """Begin to log a run, or go on with the one in `run_dir`.

    `auto` and `wandb`: JSON lines and W&B, online where WANDB_API_KEY or WANDB_MODE is set, else offline under
    `run_dir`/wandb; `auto` keeps quiet about a W&B that cannot run. `jsonl`: `run_dir`/metrics.jsonl alone. `none`: nothing.
    `run_id` and `of`: as in `keep_run_id`.
    """
    if mode == "none":
        return _Nothing(run_id or "")
    identity = keep_run_id(run_dir, run_id, of)
    sinks: list[_Sink] = [_JsonLines(run_dir / "metrics.jsonl")]
    if mode != "jsonl":
        begin = {"project": project, "name": name, "run_id": identity, "dir": str(run_dir), "init_timeout_s": init_timeout_s}
        sinks.append(_Wandb(begin, run_dir / "tracking.log", finish_timeout_s, is_quiet=mode == "auto"))
    tracker = _Tracker(identity, sinks)
    if config:
        tracker.config(config)
    return tracker


def keep_run_id(run_dir: Path, run_id: str | None = None, of: str = "") -> str:
    """Return the id of the run in a folder, kept in `run_dir`/tracking.json: `run_id`, else the one there, else a new one.

    `of` says what the run is a run of, such as a hash of its settings. Where the folder holds a run of something else, this
    one gets an id of its own, and the other's metrics.jsonl is set aside as metrics-ID.jsonl.
    """
    path, kept = run_dir / "tracking.json", dict[str, str]()
    with suppress(OSError, ValueError, TypeError):
        kept = {str(key): str(value) for key, value in dict(json.loads(path.read_text(encoding="utf-8"))).items()}
    is_other = bool(of) and kept.get("of", of) != of
    identity = run_id or (None if is_other else kept.get("run_id")) or uuid.uuid4().hex[:16]
    now = {"run_id": identity} | ({"of": of} if of else {name: kept[name] for name in kept if name == "of"})
    try:
        if is_other and (run_dir / "metrics.jsonl").exists():
            (run_dir / "metrics.jsonl").replace(run_dir / f"metrics-{kept.get('run_id', 'before')}.jsonl")
        if now != kept:
            run_dir.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(now) + "\n", encoding="utf-8")
    except OSError as error:
        _LOG.warning("tracking: cannot keep the run's id in %s: %s", path, error)
    return identity


def is_logged(run_dir: Path, op: str, **values: Any) -> bool:
    """Say whether the run in a folder has logged this, as the last of its kind: an op, with these among its values.

    Figures are of a kind by their names, the rest by its name. False where no JSON lines are kept.
    """
    wanted = {"op": op, **json.loads(json.dumps(_finite(redact(values) if op == "table" else values)))}
    last: dict[str, Any] | None = None
    with suppress(OSError), (run_dir / "metrics.jsonl").open("rb") as lines:
        for line in lines:
            with suppress(ValueError, AttributeError):
                message = json.loads(line)
                if message.get("op") == op and _kind(message) == _kind(wanted):
                    last = message
    return last is not None and all(last.get(name) == value for name, value in wanted.items())


def _kind(message: Mapping[str, Any]) -> Any:
    return message.get("name") or sorted(message.get("metrics") or ())


class _Sink(Protocol):
    def put(self, message: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _Nothing:
    """Logs nothing."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log nothing."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Log nothing."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Log nothing."""

    def artifact(self, path: Path, name: str, kind: str, role: Role = "output") -> None:
        """Log nothing."""

    def finish(self) -> None:
        """Do nothing."""


class _Tracker:
    """Hands plain messages to all sinks."""

    def __init__(self, run_id: str, sinks: Sequence[_Sink]) -> None:
        self.run_id = run_id
        self._sinks = sinks
        self._is_finished = False

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._put({"op": "log", "step": step, "metrics": {name: float(value) for name, value in metrics.items()}})

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        # Each cell by the name of its column, as a field.
        plain = [[redact(value, column) for value, column in zip(row, columns, strict=True)] for row in rows]
        self._put({"op": "table", "name": name, "columns": list(columns), "rows": plain})

    def config(self, values: Mapping[str, Any]) -> None:
        self._put({"op": "config", "values": redact(dict(values))})

    def artifact(self, path: Path, name: str, kind: str, role: Role = "output") -> None:
        self._put({"op": "artifact", "path": str(path.absolute()), "name": name, "kind": kind, "role": role})

    def finish(self) -> None:
        if not self._is_finished:
            self._is_finished = True
            for sink in self._sinks:
                sink.close()

    def _put(self, message: dict[str, Any]) -> None:
        if self._is_finished:
            _LOG.warning("tracking: %s after finish is not logged", message["op"])
            return
        plain = _finite({"time_unix_s": time.time(), **message})
        for sink in self._sinks:
            sink.put(plain)


def _finite(value: Any) -> Any:
    """Return a message that is valid JSON: numbers that it does not have (NaN, infinities) become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


class _JsonLines:
    """Appends every message to a file, a line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.exists() and path.stat().st_size > 0 and not _ends_with_newline(path)
            self._file = path.open("ab", buffering=0)
            if torn:
                # What a killed run left of a line stays a line of its own.
                self._file.write(b"\n")
        except OSError as error:
            self._give_up(error)

    def put(self, message: dict[str, Any]) -> None:
        """Append a message; a file that cannot be written is given up with a warning."""
        if self._file is None:
            return
        try:
            self._file.write((json.dumps(message, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        _LOG.warning("tracking: %s cannot be written, the run goes on without it: %s", self._path, error)
        self._file = None


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class _Wandb:
    """Feeds the process that holds wandb; when it hangs or dies, messages are dropped."""

    def __init__(self, begin: dict[str, Any], log_path: Path, finish_timeout_s: float, *, is_quiet: bool) -> None:
        self._finish_timeout_s = finish_timeout_s
        self._level = logging.INFO if is_quiet else logging.WARNING
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_QUEUED)
        self._num_dropped = 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with log_path.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-P", "-m", "dmoa.tracking", str(finish_timeout_s)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    # Ctrl-C stops the run, and the run's end ends W&B, with everything that was logged.
                    start_new_session=True,
                )
        except OSError as error:
            _LOG.log(self._level, "tracking: W&B cannot be started, the run goes on without it: %s", error)
            return
        self._thread = threading.Thread(target=self._feed, name="tracking", daemon=True)
        self._thread.start()
        self.put(begin)

    def put(self, message: dict[str, Any]) -> None:
        """Queue a message; drop it where the queue is full."""
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            self._num_dropped += 1

    def close(self) -> None:
        """Wait until W&B has everything, for the bounded time; then end its process."""
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + self._finish_timeout_s
        with suppress(queue.Full):
            self._messages.put(None, timeout=self._finish_timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        try:
            status: int | None = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = None
        if status != 0:
            state = "did not end in time" if status is None else f"ended with status {status}"
            _LOG.log(self._level, "tracking: W&B %s; metrics.jsonl has everything, tracking.log what W&B said", state)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._thread.join()
        if self._num_dropped:
            _LOG.log(self._level, "tracking: W&B missed %d messages; metrics.jsonl has them", self._num_dropped)

    def _feed(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:
            while (message := self._messages.get()) is not None:
                pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()


def main(lines: Iterable[bytes], finish_timeout_s: float) -> NoReturn:
    """Be the process that holds wandb: the first line begins the run, the others are messages, their end finishes it."""
    iterator = iter(lines)
    begin = json.loads(next(iterator))
    run = _begin(begin)
    for line in iterator:
        message = json.loads(line)
        try:
            _apply(run, message)
        except Exception as error:  # W&B is called here: what it cannot take must not lose what comes after
            print(f"{message['op']}: {error}", file=sys.stderr, flush=True)
    # A run that was killed waits for nobody: this process ends itself, with all that wandb started.
    watchdog = threading.Timer(finish_timeout_s, os.killpg, (os.getpgid(0), signal.SIGKILL))
    watchdog.daemon = True
    watchdog.start()
    run.finish()
    sys.stderr.flush()
    # Not by way of wandb's exit hooks: they wait for a server that did not answer, although all is on the disk.
    os._exit(0)


def _begin(begin: dict[str, Any]) -> Any:
    """Begin or go on with a W&B run; offline where the server does not answer in time."""
    # Taken away, because wandb 0.31 cannot even go offline while the environment holds a mode that it does not know.
    mode: Any = os.environ.pop("WANDB_MODE", "") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    import wandb

    try:
        if mode == "online":
            return wandb.init(mode=mode, id=begin["run_id"], resume="allow", **_arguments(begin))
        return wandb.init(mode=mode, id=_session_id(begin), **_arguments(begin))
    except Exception as error:  # W&B is called here, and its errors have no common root
        print(f"init: {error}; going on offline", file=sys.stderr, flush=True)
        wandb.teardown()
        return wandb.init(mode="offline", id=_session_id(begin), **_arguments(begin))


def _session_id(begin: dict[str, Any]) -> str:
    """Return an id that no other session of the run has, whatever machine that was on."""
    return f"{begin['run_id']}-{uuid.uuid4().hex[:6]}"


def _arguments(begin: dict[str, Any]) -> dict[str, Any]:
    import wandb

    # Nothing of the machine, the command line, the code or the environment goes to W&B, only what is logged.
    settings = wandb.Settings(
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        save_code=False,
        init_timeout=begin["init_timeout_s"],
        login_timeout=begin["init_timeout_s"],
        silent=True,
        host="",
        program="dmoa",
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    return {
        "project": begin["project"],
        "name": begin["name"],
        "group": os.environ.get("WANDB_RUN_GROUP") or begin["run_id"],
        "dir": begin["dir"],
        "settings": settings,
    }


def _apply(run: Any, message: dict[str, Any]) -> None:
    import wandb

    match message["op"]:
        case "log":
            run.log({name: value for name, value in message["metrics"].items() if value is not None}, step=message["step"])
        case "table":
            run.log({message["name"]: wandb.Table(columns=message["columns"], data=message["rows"])})
        case "config":
            run.config.update(message["values"], allow_val_change=True)
        case "artifact":
            artifact = wandb.Artifact(message["name"], type=message["kind"], metadata={"role": message["role"]})
            path = Path(message["path"])
            # Inputs lie where they are and stay as they are; a copy of all rollouts beside every training would be waste.
            policy: Literal["immutable", "mutable"] = "immutable" if message["role"] == "input" else "mutable"
            artifact.add_dir(str(path), policy=policy) if path.is_dir() else artifact.add_file(str(path), policy=policy)
            # wandb 0.31 takes inputs online alone; offline the role in the metadata is what tells them apart.
            if message["role"] == "input" and not run.offline:
                run.use_artifact(artifact)
            else:
                run.log_artifact(artifact)


if __name__ == "__main__":
    main(sys.stdin.buffer, float(sys.argv[1]))
