"""Gate versions of the router: installed after a shadow check, rolled back, and kept beyond its life (`serving/router/state`)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from dmoa.agents.pool import build_pool_gate, fingerprint, fit_gate
from dmoa.checkpoint import Checkpoint, read_files
from dmoa.config import Config
from dmoa.core.gate import Gate
from dmoa.core.inference import Decider
from dmoa.errors import CheckpointError, RoutingError
from dmoa.serving.router.state import RouterState
from dmoa.trace import ReplyModel
from dmoa.types import FloatArray, RouteDecision, RouteRequest, is_untrained
from dmoa.validation import describe, did_you_mean, short

JUDGED_ROWS = 64
"""Rows of a batch where an offered gate decides anew: nobody waits for a single one, and the last bit decides nothing."""
_SUM_TOLERANCE = 1e-4
_PROBE_SEED = 0

_LOG = logging.getLogger("dmoa.router")
MAX_HISTORY = 256
"""Changes that are remembered; versions that none of them names are removed."""
MAX_ADAPTED = 16
"""Adapted versions among them: learning makes many, and pushes nobody's installs out."""
MAX_NOTE_CHARACTERS = 500


class Shadow(ReplyModel):
    """What a gate decides on the inputs that the router was asked about last."""

    inputs: int
    """Recent inputs; 0 where nothing was routed yet, then only made-up inputs were tried."""
    same_first: float | None
    """Share of them on which the most probable agent is the current gate's too; null without inputs."""
    mean_k: float | None
    """Active agents on average; null without inputs."""
    first: dict[str, float]
    """Share of the inputs on which each agent is the most probable; agents without any are left out."""


Decisions = list[RouteDecision]
Shadowed = tuple[Shadow, tuple[Decisions, Decisions]]


def shadow_check(gate: Gate, version: str, current: Gate, inputs: Sequence[FloatArray]) -> Shadowed:
    """Let a gate decide recent inputs [X] beside the current one, whose input width is the same, and say what comes out.

    Returns what both decided too, the gate's first.

    Every input is decided twice: as a first step, and as a second from the hidden state that the first left; made-up
    inputs are tried too. Raises CheckpointError where weights or a decision are not finite or not valid. That all inputs go
    to one agent is reported and no reason to refuse: traffic of one kind does.
    """
    for name, tensor in gate.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"gate {version}: {name} holds NaN or infinity; only finite weights are allowed; train it again"
            )
    rows = [*inputs, *_made_up(gate.spec.input_dim)]
    decisions = judged(gate, rows, version=version)
    for decision in (*decisions, *judged(gate, rows, decisions, version=version)):
        _check(decision, version)
    decisions = decisions[: len(inputs)]
    if not inputs:
        return Shadow(inputs=0, same_first=None, mean_k=None, first={}), ([], [])
    before = judged(current, inputs)
    first = Counter(_first(decision) for decision in decisions)
    same = sum(_first(new) == _first(old) for new, old in zip(decisions, before, strict=True))
    shadow = Shadow(
        inputs=len(inputs),
        same_first=same / len(inputs),
        mean_k=sum(decision.k for decision in decisions) / len(inputs),
        first={name: count / len(inputs) for name, count in first.most_common()},
    )
    return shadow, (decisions, before)


def _made_up(input_dim: int) -> list[FloatArray]:
    """Return inputs that any gate must be able to decide: zeros, and one of unit length."""
    row_X = np.random.default_rng(_PROBE_SEED).standard_normal(input_dim)
    return [np.zeros(input_dim, np.float32), np.asarray(row_X / np.linalg.norm(row_X), dtype=np.float32)]


@lru_cache(maxsize=2)
def _judging(gate: Gate) -> Decider:
    return Decider(gate, "judged", batch_size=JUDGED_ROWS)


def judged(gate: Gate, inputs: Sequence[FloatArray], before: Decisions | None = None, *, version: str = "current") -> Decisions:
    """Return what a gate decides of first steps [X], or of second ones after those `before`. Raises CheckpointError.

    The two gates of the last comparison are kept ready: one of them is in the next. Not for two threads at once.
    """
    states = [None] * len(inputs) if before is None else [one.hidden_H for one in before]
    decider = _judging(gate)
    decider.version = version
    try:
        return decider.decide([RouteRequest(input_X=x, hidden_H=h) for x, h in zip(inputs, states, strict=True)])
    except RoutingError as error:
        raise CheckpointError(f"gate {version}: shadow check: {error}") from error


def _check(decision: RouteDecision, version: str) -> None:
    probability_A, count = decision.probability_A, len(decision.agents)
    is_valid = (
        bool(np.isfinite(decision.hidden_H).all())
        and abs(float(probability_A.sum()) - 1.0) <= _SUM_TOLERANCE  # which NaN is not
        and sorted(decision.ranking) == list(range(count))
        and 1 <= decision.k <= count
    )
    if not is_valid:
        raise CheckpointError(
            f"gate {version}: shadow check: a decision with probabilities {probability_A.tolist()} and k {decision.k} is not "
            "valid; probabilities must be finite and sum to 1, k must lie between 1 and the number of agents; train it again"
        )


def _first(decision: RouteDecision) -> str:
    return decision.agents[decision.ranking[0]]


Action = Literal["configured", "install", "adapted", "rollback"]


class HistoryEntry(ReplyModel):
    """One change of the version that new queries begin with."""

    version: str
    action: Action
    """configured: what the app was deployed with; adapted: an offer that passed its guards."""
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
        self.source = {"fingerprint": fingerprint(config), "gate": settings, "configured": configured}
        """What the state was made from."""
        self.wanted: frozenset[str] = frozenset()
        """Versions to keep beside those of the history."""
        self._history: list[HistoryEntry] = []
        self.configured: str | None = None
        """Version that the app was deployed with."""
        self.gate, self.version = self._begin()

    def _begin(self) -> tuple[Gate, str]:
        kept = self._state.load() or {}
        source = kept.get("source")
        if isinstance(source, dict) and source.get("fingerprint") == self.source["fingerprint"]:
            self._history = _parse(kept.get("history", []))
        elif isinstance(source, dict):
            words = "%s held the gates of pool %s (%.12s), and now holds those of pool %r (%.12s); two pools need two places"
            theirs = (short(kept.get("pool", "?")), str(source.get("fingerprint")))
            _LOG.warning(words, self._state.place, *theirs, self._config.name, self.source["fingerprint"])
        if source == self.source:
            current = str(kept.get("current"))
            found = self._state.load_version(current)
            if found is None:
                raise CheckpointError(
                    f"router state {self._state.place!r}: gate {current} was current, and its files are gone; put "
                    f"versions/{current} back, or remove that folder to begin anew"
                )
            self.configured = kept.get("configured")
            self._state.remember(current)
            return found[0], found[1].version
        gate, record = build_pool_gate(self._config)
        previous = self._history[-1].version if self._history else None
        self.configured = record.version
        self._keep(gate, record, _entry(record.version, "configured", previous))
        return gate, record.version

    def _keep(self, gate: Gate, record: Checkpoint, entry: HistoryEntry) -> None:
        """Keep a version, then the state that makes it current, so that a crash in between changes nothing."""
        self._state.save_version(gate, record)
        history = [*self._history, entry]
        adapted = [one for one in history if one.action == "adapted"]
        kept = [one for one in history if one not in adapted[:-MAX_ADAPTED]][-self._max_history :]
        state = {
            "current": record.version,
            "configured": self.configured,
            "pool": self._config.name,
            "source": self.source,
            "history": [one.model_dump(mode="json") for one in kept],
        }
        self._state.save(state)
        self._history, self.gate, self.version = kept, gate, record.version
        self._state.remember(record.version)
        if len(kept) < len(history):
            self.drop_old()

    def drop_old(self) -> None:
        """Remove the versions that nobody wants any more."""
        try:
            self._state.keep_versions({one.version for one in self._history} | self.wanted)
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
        gate, record, (shadow, _) = self.check(files, inputs)
        return self._change(gate, record, "install", note, shadow)

    def check(self, files: Mapping[str, bytes], inputs: Sequence[FloatArray]) -> tuple[Gate, Checkpoint, Shadowed]:
        """Return the gate in the files of a checkpoint, and its `shadow_check`. Raises CheckpointError as `install`."""
        gate, record = fit_gate(self._config, *read_files(files, "the checkpoint"))
        if gate.spec.input_dim != self.gate.spec.input_dim:
            raise CheckpointError(
                f"gate {record.version}: embedding_dim is {gate.spec.embedding_dim}, the encoder of this pool gives "
                f"{self.gate.spec.embedding_dim}; train it with the pool's encoder"
            )
        return gate, record, shadow_check(gate, record.version, self.gate, inputs)

    def adopt(self, gate: Gate, record: Checkpoint, note: str) -> Change:
        """Make a kept gate current that `check` gave, because it passed the guards; the state may be written later."""
        with self._state.patience():
            return self._change(gate, record, "adapted", note, None)

    def rollback(self, version: str | None, note: str) -> Change:
        """Make an earlier version current again, by default the one before the current one.

        Rolling back twice goes back twice. What is `wanted` can be had back however many versions came after it. Raises
        CheckpointError where there is no such version, or it fits no more.
        """
        line = _line(self._history)
        if version is None:
            if len(line) < 2:
                raise CheckpointError(f"rollback: nothing was current before gate {self.version}; {self._known()}")
            version = line[-2]
        kept = {one.version for one in self._history} | self.wanted
        if version not in kept:
            nearest = did_you_mean(version, kept)
            raise CheckpointError(f"rollback: gate {version!r} was never current here; {self._known()}{nearest}")
        found = self._state.load_version(version)
        if found is None:
            raise CheckpointError(f"rollback: gate {version} is no longer kept; install its checkpoint again")
        gate, record = fit_gate(self._config, *found)
        return self._change(gate, record, "rollback", note, None)

    def _change(self, gate: Gate, record: Checkpoint, action: Action, note: str, shadow: Shadow | None) -> Change:
        previous, is_change = self.version, record.version != self.version
        if is_change:
            self._keep(gate, record, _entry(record.version, action, previous, note))
        return Change(version=record.version, gate=gate, previous=previous, is_change=is_change, shadow=shadow)

    def _known(self) -> str:
        names = list(dict.fromkeys(one.version for one in reversed(self._history)))
        return f"known are {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}; see `dmoa router history`"


def _entry(version: str, action: Action, previous: str | None, note: str = "") -> HistoryEntry:
    return HistoryEntry(version=version, action=action, previous=previous, note=note[:MAX_NOTE_CHARACTERS], unix_s=time.time())


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
        raise CheckpointError("router state: history is not a list; remove its folder to begin anew")
    try:
        return [HistoryEntry.model_validate(one) for one in tree]
    except ValidationError as error:
        raise CheckpointError(
            f"router state: history: {describe(error, HistoryEntry)}; remove its folder to begin anew"
        ) from error
