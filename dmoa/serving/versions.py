"""The gate versions of one router: which one is current, what may become current, and how it came about.

Checks and keeps; the router actor then lets new queries begin with the version that comes back. Blocking (files, torch), so
the actor calls it in a thread; one call at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dmoa.agents.pool import build_pool_gate, fingerprint, fit_gate
from dmoa.checkpoint import Checkpoint
from dmoa.config import Config
from dmoa.core.gate import Gate
from dmoa.errors import CheckpointError
from dmoa.serving.router_state import RouterState, read_files
from dmoa.serving.shadow import Shadow, shadow_check
from dmoa.types import FloatArray, is_untrained
from dmoa.validation import describe, did_you_mean

_LOG = logging.getLogger("dmoa.router")
MAX_HISTORY = 256
"""Changes that are remembered; versions that none of them names are removed."""
MAX_NOTE_CHARACTERS = 500


class HistoryEntry(BaseModel):
    """One change of the version that new queries begin with."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: str
    action: Literal["configured", "install", "rollback"]
    """configured: what the app was deployed with."""
    previous: str | None
    """Version that was current before."""
    note: str
    """The words of whoever made the change."""
    unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A version that is to become current."""

    version: str
    gate: Gate
    previous: str | None
    is_change: bool
    """False where the version was current already; nothing was recorded then."""
    shadow: Shadow | None = None
    """What the shadow check found; None where there was none to make."""

    def to_json(self) -> dict[str, Any]:
        """Return what the actor and `dmoa router` report."""
        return {
            "version": self.version,
            "previous": self.previous,
            "changed": self.is_change,
            "untrained": is_untrained(self.version),
            "shadow": None if self.shadow is None else self.shadow.model_dump(mode="json"),
        }


class GateVersions:
    """Keeps the versions of a router and the history of what was current."""

    def __init__(self, state: RouterState, config: Config, configured: str | None, *, max_history: int = MAX_HISTORY) -> None:
        """`configured` is the version of the checkpoint that the app was deployed with, None without one.

        Takes up the state where it was made from the same pool, gate settings and checkpoint; else the configured gate
        becomes current. Raises CheckpointError.
        """
        self._state = state
        self._config = config
        self._max_history = max_history
        # By content: a checkpoint that was trained again in the same folder is another one, a copy elsewhere is not.
        settings = config.gate.model_dump(mode="json", exclude={"checkpoint"})
        self._source = {"fingerprint": fingerprint(config), "gate": settings, "configured": configured}
        self._history: list[HistoryEntry] = []
        self.configured: str | None = None
        """Version that the app was deployed with."""
        self.gate, self.version = self._begin()

    def _begin(self) -> tuple[Gate, str]:
        kept = self._state.load() or {}
        source = kept.get("source")
        if isinstance(source, dict) and source.get("fingerprint") == self._source["fingerprint"]:
            self._history = _parse(kept.get("history", []))
        if source == self._source:
            found = self._state.load_version(str(kept.get("current")))
            if found is not None:
                self.configured = kept.get("configured")
                return found[0], found[1].version
            _LOG.warning("gate %s is no longer kept: the configured gate takes its place", kept.get("current"))
        gate, record = build_pool_gate(self._config)
        previous = self._history[-1].version if self._history else None
        self.configured = record.version
        self._keep(gate, record, _entry(record.version, "configured", previous))
        return gate, record.version

    def _keep(self, gate: Gate, record: Checkpoint, entry: HistoryEntry) -> None:
        """Keep a version, then the state that makes it current, so that a crash in between changes nothing."""
        self._state.save_version(gate, record)
        history = [*self._history, entry]
        kept = history[-self._max_history :]
        state = {
            "current": record.version,
            "configured": self.configured,
            "source": self._source,
            "history": [one.model_dump(mode="json") for one in kept],
        }
        self._state.save(state)
        self._history, self.gate, self.version = kept, gate, record.version
        if len(kept) < len(history):
            self._drop_old({one.version for one in kept})

    def _drop_old(self, wanted: set[str]) -> None:
        try:
            self._state.keep_versions(wanted)
        except OSError as error:
            _LOG.warning("old gate versions stay where they are: %s", error)

    @property
    def since_unix_s(self) -> float | None:
        """When the current version became current."""
        return self._history[-1].unix_s if self._history else None

    def history(self) -> list[dict[str, Any]]:
        """Return the changes, oldest first, as plain values."""
        return [one.model_dump(mode="json") for one in self._history]

    def install(self, files: Mapping[str, bytes], note: str, inputs: Sequence[FloatArray]) -> Change:
        """Check the files of a checkpoint and make its gate current; `inputs` [X] are those routed last.

        Raises CheckpointError for files that are damaged, of another pool, of other sizes, or that fail the shadow check:
        then nothing has changed.
        """
        gate, record = fit_gate(self._config, *read_files(files, "the checkpoint"))
        if gate.spec.input_dim != self.gate.spec.input_dim:
            raise CheckpointError(
                f"gate {record.version}: embedding_dim is {gate.spec.embedding_dim}, the encoder of this pool gives "
                f"{self.gate.spec.embedding_dim}; train it with the pool's encoder"
            )
        shadow = shadow_check(gate, record.version, self.gate, inputs)
        return self._change(gate, record, "install", note, shadow)

    def rollback(self, version: str | None, note: str) -> Change:
        """Make an earlier version current again, by default the one before the current one.

        Rolling back twice goes back twice. Raises CheckpointError where there is no such version, or it fits no more.
        """
        line = _line(self._history)
        if version is None:
            if len(line) < 2:
                raise CheckpointError(f"rollback: nothing was current before gate {self.version}; {self._known()}")
            version = line[-2]
        kept = {one.version for one in self._history}
        if version not in kept:
            nearest = did_you_mean(version, kept)
            raise CheckpointError(f"rollback: gate {version!r} was never current here; {self._known()}{nearest}")
        found = self._state.load_version(version)
        if found is None:
            raise CheckpointError(f"rollback: gate {version} is no longer kept; install its checkpoint again")
        gate, record = fit_gate(self._config, *found)
        return self._change(gate, record, "rollback", note, None)

    def _change(
        self, gate: Gate, record: Checkpoint, action: Literal["install", "rollback"], note: str, shadow: Shadow | None
    ) -> Change:
        previous, is_change = self.version, record.version != self.version
        if is_change:
            self._keep(gate, record, _entry(record.version, action, previous, note))
        return Change(version=record.version, gate=gate, previous=previous, is_change=is_change, shadow=shadow)

    def _known(self) -> str:
        names = list(dict.fromkeys(one.version for one in reversed(self._history)))
        return f"known are {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}; see `dmoa router history`"


def _entry(
    version: str, action: Literal["configured", "install", "rollback"], previous: str | None, note: str = ""
) -> HistoryEntry:
    note = note[:MAX_NOTE_CHARACTERS]
    return HistoryEntry(version=version, action=action, previous=previous, note=note, unix_s=time.time())


def _line(history: Sequence[HistoryEntry]) -> list[str]:
    """Return the versions that led to the current one: a rollback takes back what came after its version."""
    line: list[str] = []
    for entry in history:
        if entry.action == "rollback" and entry.version in line:
            while line[-1] != entry.version:
                line.pop()
        else:
            line.append(entry.version)
    return line


def _parse(tree: object) -> list[HistoryEntry]:
    if not isinstance(tree, list):
        raise CheckpointError("router state: history is no list; remove state.json to begin anew")
    try:
        return [HistoryEntry.model_validate(one) for one in tree]
    except ValidationError as error:
        raise CheckpointError(
            f"router state: history: {describe(error, HistoryEntry)}; remove state.json to begin anew"
        ) from error
