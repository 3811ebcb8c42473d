"""Follows a training from outside: its epochs go to the screen and to the tracker as the workers keep them.

The workers write one file per epoch (`training/run_state`) and nothing else; this reads how far they are. A run that goes on
logs what its tracker has not got yet, under the id that is kept in its folder, so that it joins its own run and no other's. A
run that is over and logged logs nothing more.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dmoa import checkpoint
from dmoa.errors import ConfigError
from dmoa.tracking import Tracker, is_logged, keep_run_id, open_tracker
from dmoa.training.export import Trained
from dmoa.training.options import TrainOptions
from dmoa.training.rollouts import RolloutFolder
from dmoa.training.run_state import EpochRecord, StateStore

_POLL_S = 0.25
_REMOTE_POLL_S = 5.0


class Curves:
    """The tracker of a training, and the thread that feeds it."""

    def __init__(self, options: TrainOptions, pool: str, identity: Mapping[str, Any]) -> None:
        """Follow the run in `options.out`; its tracker is opened when there is something to log. `identity`: of the training."""
        self._options, self._out = options, options.out.absolute()
        self._settings = {"pool_name": pool, **identity}
        self._of = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._opened: Tracker | None = None
        if options.track != "none":
            keep_run_id(self._out, of=self._of)  # what another run logged here is set aside
        self._logged = _logged_epochs(self._out / "metrics.jsonl")

    @property
    def _tracker(self) -> Tracker:
        if self._opened is None:
            mode, name = self._options.track, self._out.name or "train"
            self._opened = open_tracker(mode, run_dir=self._out, name=name, of=self._of, config=self._settings)
        return self._opened

    @contextmanager
    def follow(self, store: StateStore, watch: Callable[[EpochRecord], None]) -> Iterator[None]:
        """Call `watch` with each epoch that ends in this block, and log every epoch that is not logged yet."""
        done = threading.Event()
        seen = _num_epochs(store)

        def look() -> None:
            nonlocal seen
            with suppress(ConfigError, OSError):  # a look that fails is made up for by the next
                progress = store.read_progress()
                for record in progress.epochs if progress else ():
                    self._log(record)
                    if record.epoch > seen:
                        seen = record.epoch
                        watch(record)

        def loop() -> None:
            while not done.wait(_REMOTE_POLL_S if "://" in store.place else _POLL_S):
                look()

        thread = threading.Thread(target=loop, name="curves", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            look()

    def _log(self, record: EpochRecord) -> None:
        if record.epoch not in self._logged:
            self._logged.add(record.epoch)
            values = {name: value for name, value in record.model_dump().items() if name != "epoch" and value is not None}
            self._tracker.log(values, step=record.epoch)

    def end(self, trained: Trained, load: Mapping[str, float], folder: Path, parent: str | None) -> None:
        """Log what came of it: metrics, the routing table, the checkpoint; and the rollouts and the gate that it came of.

        Nothing where that is logged already.
        """
        name = checkpoint.artifact_name(trained.record.version)
        if is_logged(self._out, "artifact", name=name, kind="checkpoint", role="output"):
            return
        self._tracker.log({f"held/{name}": value for name, value in trained.record.metrics.items()})
        self._tracker.table("first_choices", ["agent", "share of held-back steps"], [list(item) for item in load.items()])
        self._tracker.artifact(folder, name, "checkpoint")
        # After the output: W&B waits for inputs that it does not have yet.
        options = self._options
        anchors = [] if options.anchor_rollouts is None else [options.anchor_rollouts]
        for rollouts in map(RolloutFolder, dict.fromkeys((*options.rollouts, *anchors))):
            self._tracker.artifact(rollouts.parts, rollouts.artifact, "rollouts", role="input")
        if options.start_from is not None and parent is not None:
            self._tracker.artifact(options.start_from, checkpoint.artifact_name(parent), "checkpoint", role="input")

    def close(self) -> None:
        """End the logging."""
        if self._opened is not None:
            self._opened.finish()


def _num_epochs(store: StateStore) -> int:
    progress = store.read_progress()
    return len(progress.epochs) if progress else 0


def _logged_epochs(path: Path) -> set[int]:
    """Return the epochs that a file of curves holds already."""
    found: set[int] = set()
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                message = json.loads(line)
                if message["op"] == "log" and message["step"] is not None:
                    found.add(int(message["step"]))
    return found
