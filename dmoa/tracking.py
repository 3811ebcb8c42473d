"""Logs settings, curves, tables and files of a run: as JSON lines always, to Weights & Biases where it is wanted.

A run neither waits for W&B nor fails by it: wandb lives in a process of its own (this module as a program) that reads the JSON
lines as they are written; a server that hangs costs the run nothing but the bounded wait of `finish`. In the run's own process
wandb would hold it at its end for as long as the server does not answer. Offline without a key.

Online, a run that goes on resumes its W&B run. Offline, every session of it is a W&B run with an id of its own, in one group
named by the run's id: `wandb sync` writes a W&B run anew from its first step, and would lose a session of the same id.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

from dmoa.reading import lines_of, read_bounded, read_json, regular
from dmoa.validation import redact

Mode = Literal["auto", "wandb", "jsonl", "none"]
Role = Literal["input", "output"]
"""Which side of a run an artifact is on: the lineage of a checkpoint is the inputs of the run that made it."""
FINISH_TIMEOUT_S = 30.0
"""How long `finish` waits for W&B to have everything."""
INIT_TIMEOUT_S = 15.0
"""How long W&B's server may take to begin a run, before the run goes on offline."""
_POLL_S = 0.5
"""How often the process of W&B looks for new lines."""
STEP = "step"
"""The figure of W&B that holds the steps of others."""
_LOG = logging.getLogger(__name__)


class Tracker:
    """Takes what a run logs. No method raises for what the tracker meets, and none waits, `finish` aside."""

    def __init__(self, run_id: str, lines: _JsonLines | None = None, wandb: _Wandb | None = None) -> None:
        """Without `lines` nothing is logged."""
        self.run_id = run_id
        """Stable name of the run, the same when it goes on later: W&B's id online, its group always."""
        self._lines = lines
        self._wandb = wandb
        self._is_finished = False

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log figures by name; those of one step belong together."""
        self._put({"op": "log", "step": step, "metrics": {name: float(value) for name, value in metrics.items()}})

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Log a table of plain values; secrets are taken out, each cell by the name of its column."""
        plain = [[redact(value, column) for value, column in zip(row, columns, strict=True)] for row in rows]
        self._put({"op": "table", "name": name, "columns": list(columns), "rows": plain})

    def histogram(self, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Log counts in bins; `edges` are one more than the bins."""
        self._put({"op": "histogram", "name": name, "counts": list(counts), "edges": list(edges)})

    def config(self, values: Mapping[str, Any]) -> None:
        """Add settings; secrets are taken out."""
        self._put({"op": "config", "values": redact(dict(values))})

    def artifact(self, path: Path, name: str, kind: str, role: Role = "output") -> None:
        """Log a file or a folder under a name and a kind, such as `checkpoint`: made by the run, or what it was made from.

        An input with the name, kind and content of another run's output is that very artifact: W&B links the two runs.
        """
        self._put({"op": "artifact", "path": str(path.absolute()), "name": name, "kind": kind, "role": role})

    def finish(self) -> None:
        """End the logging; waits for it, for a bounded time. Calling it again does nothing."""
        if self._is_finished:
            return
        self._is_finished = True
        if self._lines:
            self._lines.close()
        if self._wandb:
            self._wandb.close()

    def _put(self, message: dict[str, Any]) -> None:
        if self._is_finished:
            _LOG.warning("tracking: %s after finish is not logged", message["op"])
        elif self._lines:
            self._lines.append(_plain({"time_unix_s": time.time(), **message}))


def open_tracker(
    mode: Mode,
    *,
    run_dir: Path,
    project: str = "dmoa",
    name: str,
    run_id: str | None = None,
    of: str = "",
    config: Mapping[str, Any] | None = None,
    after: Sequence[str | Path | None] = (),
    finish_timeout_s: float = FINISH_TIMEOUT_S,
    init_timeout_s: float = INIT_TIMEOUT_S,
) -> Tracker:
    """Begin to log a run, or go on with the one in `run_dir`.

    `auto` and `wandb`: JSON lines and W&B, online where WANDB_API_KEY or WANDB_MODE is set, else offline under
    `run_dir`/wandb; `auto` keeps quiet about a W&B that cannot run. `jsonl`: `run_dir`/metrics.jsonl alone. `none`: nothing.
    `run_id` and `of`: as in `keep_run_id`. `after`: folders that the run goes on from, such as rollouts and checkpoints; it joins
    the group of the first one that a run was logged in, or beside.
    """
    if mode == "none":
        return Tracker(run_id or "")
    identity, path = keep_run_id(run_dir, run_id, of), run_dir / "metrics.jsonl"
    lines, wandb = _JsonLines(path), None
    if mode != "jsonl" and lines.start is not None:
        begin = {
            "project": project,
            "name": name,
            "run_id": identity,
            "group": keep_group(run_dir, identity, after),
            "dir": str(run_dir),
            "init_timeout_s": init_timeout_s,
            "lines": str(path),
            "start": lines.start,
            "finish_timeout_s": finish_timeout_s,
        }
        wandb = _Wandb(begin, run_dir / "tracking.log", is_quiet=mode == "auto")
    tracker = Tracker(identity, lines, wandb)
    if config:
        tracker.config(config)
    return tracker


def keep_run_id(run_dir: Path, run_id: str | None = None, of: str = "") -> str:
    """Return the id of the run in a folder, kept in `run_dir`/tracking.json: `run_id`, else the one there, else a new one.

    `of` says what the run is a run of, such as a hash of its settings. Where the folder holds a run of something else, this
    one gets an id of its own, and the other's metrics.jsonl is set aside as metrics-ID.jsonl.
    """
    kept = _kept(run_dir)
    is_other = bool(of) and kept.get("of", of) != of
    identity = run_id or (None if is_other else kept.get("run_id")) or uuid.uuid4().hex[:16]
    now = {"run_id": identity} | ({"of": of} if of else {name: kept[name] for name in kept if name == "of"})
    try:
        if is_other and (run_dir / "metrics.jsonl").exists():
            (run_dir / "metrics.jsonl").replace(run_dir / f"metrics-{kept.get('run_id', 'before')}.jsonl")
        if now != kept:
            _keep(run_dir, now)
    except OSError as error:
        _LOG.warning("tracking: cannot keep the run's id in %s: %s", run_dir / "tracking.json", error)
    return identity


def keep_group(run_dir: Path, run_id: str, after: Sequence[str | Path | None]) -> str:
    """Return the group of a run, kept in `run_dir`/tracking.json: that of the first folder which has one, else its own."""
    found = run_id
    for place in [Path(one) for one in after if one is not None]:
        kept = _kept(place) or _kept(place.parent)
        if kept:
            found = kept.get("group") or kept.get("run_id") or run_id
            break
    if found != run_id:
        with suppress(OSError):
            _keep(run_dir, _kept(run_dir) | {"group": found})
    return found


def _keep(run_dir: Path, values: Mapping[str, str]) -> None:
    from dmoa.storage import write_whole  # not in the process of W&B

    write_whole(run_dir / "tracking.json", json.dumps(values) + "\n")


def _kept(run_dir: Path) -> dict[str, str]:
    """Return what a folder keeps of its run; empty where it keeps nothing."""
    with suppress(OSError, ValueError, TypeError):
        return {str(key): str(value) for key, value in dict(read_json(read_bounded(run_dir / "tracking.json"))).items()}
    return {}


def is_logged(run_dir: Path, op: str, **values: Any) -> bool:
    """Say whether the run in a folder has logged this, as the last of its kind: an op, with these among its values.

    Figures are of a kind by their names, the rest by its name. False where no JSON lines are kept.
    """
    wanted = {"op": op, **_plain(redact(values) if op == "table" else values)}
    last: dict[str, Any] | None = None
    with suppress(OSError), open(run_dir / "metrics.jsonl", "rb", opener=regular) as lines:
        for line in lines_of(lines, run_dir):
            with suppress(ValueError, AttributeError):
                message = read_json(line)
                if message.get("op") == op and _kind(message) == _kind(wanted):
                    last = message
    return last is not None and all(last.get(name) == value for name, value in wanted.items())


def _kind(message: Mapping[str, Any]) -> Any:
    return message.get("name") or sorted(message.get("metrics") or ())


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as JSON has it: numbers that it does not have (NaN, infinities) become null."""
    found: dict[str, Any] = read_json(json.dumps(message), nan_is_null=True)
    return found


class _JsonLines:
    """Appends messages to a file, a line each; a file that cannot be written is given up with a warning."""

    def __init__(self, path: Path) -> None:
        self.start: int | None = None
        """Where in the file the first message goes; None where it cannot be written."""
        self._path = path
        self._file: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
            self._file.seek(max(0, self._file.seek(0, os.SEEK_END) - 1))
            if self._file.read(1) not in (b"", b"\n"):
                # What a killed run left of a line stays a line of its own.
                self._file.write(b"\n")
            self.start = self._file.seek(0, os.SEEK_END)
        except OSError as error:
            self._give_up(error)

    def append(self, message: dict[str, Any]) -> None:
        """Append a message at once."""
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


class _Wandb:
    """The process that holds wandb; the run is free of it, whatever becomes of it."""

    def __init__(self, begin: dict[str, Any], log_path: Path, *, is_quiet: bool) -> None:
        self._finish_timeout_s: float = begin["finish_timeout_s"]
        self._level = logging.INFO if is_quiet else logging.WARNING
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with log_path.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-P", "-m", "dmoa.tracking", json.dumps(begin)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    # Ctrl-C stops the run, and the run's end ends W&B, with everything that was logged.
                    start_new_session=True,
                )
        except OSError as error:
            _LOG.log(self._level, "tracking: W&B cannot be started, the run goes on without it: %s", error)

    def close(self) -> None:
        """Wait until W&B has everything, for the bounded time; then end its process."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            status: int | None = process.wait(self._finish_timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        if status != 0:
            state = "did not end in time" if status is None else f"ended with status {status}"
            _LOG.log(self._level, "tracking: W&B %s; metrics.jsonl has everything, tracking.log what W&B said", state)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(begin: dict[str, Any]) -> NoReturn:
    """Be the process that holds wandb: take over every line of the run's file, and finish when the run ends or dies."""
    run = _begin(begin)
    plotted: set[str] = set()
    for message in _follow(Path(begin["lines"]), begin["start"]):
        try:
            _apply(run, message, plotted)
        except Exception as error:  # W&B is called here: what it cannot take must not lose what comes after
            print(f"{message['op']}: {error}", file=sys.stderr, flush=True)
    # A run that was killed waits for nobody: this process ends itself, with all that wandb started.
    watchdog = threading.Timer(begin["finish_timeout_s"], os.killpg, (os.getpgid(0), signal.SIGKILL))
    watchdog.daemon = True
    watchdog.start()
    run.finish()
    sys.stderr.flush()
    # Not by way of wandb's exit hooks: they wait for a server that did not answer, although all is on the disk.
    os._exit(0)


def _follow(path: Path, start: int) -> Iterator[dict[str, Any]]:
    """Yield the messages of a file from byte `start` on, as they are written, until standard input ends and all are read."""
    line, is_over = b"", False
    with path.open("rb") as file:
        file.seek(start)
        while True:
            line += file.readline()
            if line.endswith(b"\n"):
                yield json.loads(line)
                line = b""
            elif is_over:
                return
            else:
                # Nothing is ever written to it: what can be read is its end, which a run that is killed leaves too.
                is_over = bool(select.select([sys.stdin], [], [], _POLL_S)[0])


def _begin(begin: dict[str, Any]) -> Any:
    """Begin or go on with a W&B run; offline where the server does not answer in time."""
    # Taken away, because wandb 0.31 cannot even go offline while the environment holds a mode that it does not know.
    mode: Any = os.environ.pop("WANDB_MODE", "") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
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
    session = {
        # Of this session alone, whatever machines the others were on.
        "id": f"{begin['run_id']}-{uuid.uuid4().hex[:6]}",
        "project": begin["project"],
        "name": begin["name"],
        "group": os.environ.get("WANDB_RUN_GROUP") or begin["group"],
        "dir": begin["dir"],
        "settings": settings,
    }
    try:
        return wandb.init(mode=mode, **session | ({"id": begin["run_id"], "resume": "allow"} if mode == "online" else {}))
    except Exception as error:  # W&B is called here, and its errors have no common root
        print(f"init: {error}; going on offline", file=sys.stderr, flush=True)
        wandb.teardown()
        return wandb.init(mode="offline", **session)


def _apply(run: Any, message: dict[str, Any], plotted: set[str]) -> None:
    """Log a message; `plotted`: figures of which W&B knows that their steps are ours."""
    import wandb

    match message["op"]:
        case "log":
            found = {name: value for name, value in message["metrics"].items() if value is not None}
            if message["step"] is not None:
                # Not W&B's own step, below which it drops figures: a run that goes on may log steps again.
                for name in found.keys() - plotted:
                    run.define_metric(name, step_metric=STEP)
                plotted |= found.keys()
                found[STEP] = message["step"]
            run.log(found)
        case "table":
            run.log({message["name"]: wandb.Table(columns=message["columns"], data=message["rows"])})
        case "histogram":
            run.log({message["name"]: wandb.Histogram(np_histogram=(message["counts"], message["edges"]))})
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
    main(json.loads(sys.argv[1]))
