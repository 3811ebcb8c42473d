"""Learning while serving, on the router's side: offered gates are judged, tried on a share of the queries, installed, taken back.

Apart from Ray, and not for two threads at once. What was decided is kept in `adaptation.json` under `router.state_uri`, whole,
then renamed, before anybody hears of it, or later where it cannot be written: the number of the last update that was taken (none
is taken twice), the trial that runs, whether learning is frozen, and what happened. A router that dies comes back with all of it.

A trial compares two versions on new queries that chance gives to the one or the other (by a hash of the trace id). `canary`: the
candidate has `canary_share` of them until it passed or failed. `on`: the candidate is current at once, and the version before,
the control, keeps `canary_share`; later updates take the candidate's place, the control follows one window behind.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Required, cast

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from typing_extensions import TypedDict

from dmoa.checkpoint import Checkpoint
from dmoa.config import Config
from dmoa.core import guards
from dmoa.core.gate import Gate
from dmoa.core.guards import ArmComparison, ByContext, Comparison, RateComparison, RateTest, SequentialTest, Verdict
from dmoa.core.scores import BoolArray
from dmoa.errors import CheckpointError, ConfigError
from dmoa.feedback import MAX_CONTEXTS, Contexts, Feedback, query_part
from dmoa.serving.router.probes import read_probes
from dmoa.serving.router.replayed import HeldBack, Reading, Slice, is_of_pool, loads, probabilities, read_queries, read_slice
from dmoa.serving.router.state import RouterState
from dmoa.serving.router.versions import Change, Decisions, GateVersions, Shadow, judged
from dmoa.types import FloatArray, is_untrained
from dmoa.validation import describe, short

_LOG = logging.getLogger("dmoa.router")
FILE = "adaptation.json"
MAX_EVENTS = 256
MAX_LINE = 64
"""Versions of a trial whose queries still count."""
KEPT_CANDIDATES = 8
"""Versions that were tried and are no longer, and are kept for the queries that began with them."""
SUSPICION = 2.0
"""Evidence against a canary at which it is looked at more closely."""
LOOK_AGAIN = 64
"""Finished queries after which distrusted agents are looked at anew, whether a gate is offered or not."""
MAX_JUMP = 10**9
"""How far an update's number may lie above the ledger: one beyond all numbers would be the last that is taken."""
LOST_S = 60.0
"""Seconds after which a query that began and was not heard of counts as failed; with a deadline, that and 5 more."""
SAVE_S = 5.0
"""How often the tests of a trial are saved: a router that starts anew hears again of the queries since."""
MARGINS = {"failures": 0.05, "lost": 0.05, "tokens": 0.161, "latency": 0.292}
"""What is not worse: 5 more failures in 100, a quarter more tokens, half as much time again (logarithms to base 4)."""

State = Literal["refused", "observed", "canary", "installed"]


class Evidence(BaseModel):
    """What a learner says of the gate that it offers. The router judges by none of it: it keeps order by it."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    base_version: str
    """The gate that the update began with."""
    update: int = Field(ge=1)
    """Counts the learner's updates, upwards; one that is no higher than the router's ledger is refused."""
    source: str = ""
    used: int = Field(default=0, ge=0, le=2**53)
    """Queries that it learnt from."""
    shift: bool = False
    """Whether the stream is said to have changed: doubles the bounds of drift and distance, and renews the anchor in the end."""
    signal: Literal["entropy", "posterior", "outcomes"] = "entropy"


class Tested(TypedDict, total=False):
    """`ByContext.state`."""

    log_wealth: Required[list[FiniteFloat]]
    pairs: Required[int]
    mean: Required[FiniteFloat]
    control: Annotated[str, Field(pattern="^[01]*$")]
    parts: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Tested]


class Trial(BaseModel):
    """Two versions that are compared on new queries."""

    model_config = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)

    control: str
    candidate: str
    update: int
    shift: bool = False
    line: list[str] = Field(default_factory=list)
    """The candidate and the versions that it took the place of."""
    pending: str | None = None
    """With `on`: the version that becomes the control at the end of the window."""
    renews: bool = False
    """Whether that one becomes the anchor too: a shift was declared before it."""
    begun_unix_s: float
    tests: dict[str, Tested] = Field(default_factory=dict)
    """By signal."""
    counted_unix_s: float = 0.0
    """When the newest query that is in them was answered."""
    queries: Counter[str] = Field(default_factory=Counter)
    """Finished ones that are compared, by arm: control, candidate."""
    heard: Counter[str] = Field(default_factory=Counter)
    """All that were heard of, of any policy, and those that were given up."""
    lost: Counter[str] = Field(default_factory=Counter)
    """Those of them that began and were not heard of."""


class Kept(BaseModel):
    """`adaptation.json`."""

    model_config = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)

    source: dict[str, Any]
    """As in `state.json`: of another pool nothing is taken up."""
    ledger: int = 0
    """The last update that was judged."""
    frozen: str | None = None
    """Why no offer is taken; None: offers are."""
    cooldown_until_unix_s: float = 0.0
    anchor: str
    """The version that distances are measured from: what was configured or installed last, or renewed at a shift."""
    trial: Trial | None = None
    tried: list[str] = Field(default_factory=list)
    contexts: list[str] = Field(default_factory=list)
    """Kinds of queries, by whose numbers the tests are kept."""
    counts: Counter[str] = Field(default_factory=Counter)
    """Offers by their end: refused, observed, canary, installed, passed, rolled_back."""
    failures: Counter[str] = Field(default_factory=Counter)
    """Guards that refused, and signals that ended a trial."""
    distrusted: list[str] = Field(default_factory=list)
    """Agents that became surer while fewer agreed: the learner leaves them out."""
    events: list[dict[str, Any]] = Field(default_factory=list)


class Adaptation:
    """Judges offers and watches trials; `GateVersions` makes current what it decides."""

    def __init__(
        self,
        state: RouterState,
        config: Config,
        versions: GateVersions,
        clock: Callable[[], float] = time.time,
        *,
        frozen: str | None = None,
    ) -> None:
        """Take up what was kept for the same pool; `frozen`: why it was so at the place before. Raises CheckpointError."""
        self._state, self._config, self._versions, self._clock = state, config, versions, clock
        self._guards = config.router.guards
        self._held = HeldBack(config)
        self._probes = read_probes(self._guards.known_answers) if self._guards.known_answers else None
        self._arms: dict[str, ByContext] = {}
        self._usual: deque[tuple[float, int]] = deque(maxlen=MAX_CONTEXTS * guards.BASELINE)
        """Whether the newest queries of versions that are not tried failed, and their contexts."""
        self._control_gate: Gate | None = None
        self._unlooked, self._heard_unix_s, self._saved_unix_s = 0, 0.0, 0.0
        self._begun: deque[tuple[float, int, int]] = deque()
        self._base: tuple[int, int] = (0, 0)
        self._kept = self._load()
        self._contexts = Contexts(self._kept.contexts)
        self._counted_unix_s = 0.0
        if (trial := self._kept.trial) is not None:
            self._counted_unix_s = trial.counted_unix_s  # a router that starts anew hears of all queries once more
            trial.heard.clear()  # those that begin are counted from 0 again, and what is heard of is set beside it
            trial.lost.clear()
        if trial is not None and not self._fits(trial):
            self._end(trial, "withdrawn", "another version is current, or one of the trial is gone")
        self._resume()
        if frozen is not None or (self._kept.frozen is not None and self._kept.trial is not None):
            self.freeze(frozen or "")  # the router before this one may have died before the trial was ended
        elif self._kept.trial is not None and self.mode not in ("canary", "on"):
            self._withdraw(f"router.adaptation is {self.mode!r} now")
            self._save()

    @property
    def mode(self) -> str:
        """`router.adaptation`."""
        return self._config.router.adaptation

    @property
    def split(self) -> tuple[str, float] | None:
        """The version beside the current one, and its share of new queries; None where no trial runs.

        A canary that is under suspicion has half of them: the same failures tell as much, and it is over sooner.
        """
        trial, share = self._kept.trial, self._guards.canary_share
        if trial is None:
            return None
        if trial.candidate == self._versions.version:
            return trial.control, share
        is_suspect = any(arm.suspicion >= SUSPICION for arm in self._arms.values())
        return trial.candidate, max(share, 0.5) if is_suspect else share

    def _load(self) -> Kept:
        tree, version = self._state.load(FILE) or {}, self._versions.version
        if tree.get("source") == self._versions.source:
            try:
                return Kept.model_validate(tree)
            except ValidationError as error:
                raise CheckpointError(f"router state {FILE}: {describe(error, Kept)}; remove it to begin anew") from error
        kept = Kept(source=self._versions.source, anchor=version)
        frozen = tree.get("frozen")
        if isinstance(frozen, str):  # until somebody ends it: a deploy says nothing of it
            entry = {"version": version, "action": "freeze", "previous": version, "unix_s": self._clock()}
            kept.frozen = frozen
            kept.events = [entry | {"note": f"still frozen after a deploy: {frozen}"[:500]}]
            self._state.save(kept.model_dump(mode="json"), FILE)
        return kept

    def _fits(self, trial: Trial) -> bool:
        """Tell whether a trial goes on; the router may have died between the writes of an update, or of the trial's end."""
        current = self._versions.version
        if current in trial.line:  # the update after it never became current
            trial.candidate = current
        is_tried = current == trial.candidate or (current == trial.control and self.mode != "on")
        return is_tried and all(self._state.load_version(version) for version in (trial.control, trial.candidate))

    def _resume(self) -> None:
        trial = self._kept.trial
        self._arms, self._control_gate = {}, None
        self._versions.wanted = frozenset({self._kept.anchor, *self._kept.tried})
        if trial is None:
            return
        margins = {"quality": self._guards.margin, **MARGINS}
        for name, margin in margins.items():
            # Several signals are looked at: each has its part of the error rate.
            part = self._guards.error_rate / len(margins)
            whole = self._comparison(name, margin, part)
            self._arms[name] = ByContext(whole, partial(self._comparison, name, margin, part, whole), MAX_CONTEXTS)
            if name in trial.tests:
                self._arms[name].take_up(trial.tests[name])
            elif name == "failures":
                for failed, context in self._usual:
                    self._arms[name].add(failed, context, is_suspect=False)
        self._versions.wanted |= {trial.control, trial.candidate, trial.pending or trial.control}
        found = self._state.load_version(trial.control)
        self._control_gate = found[0] if found else None

    def _comparison(self, name: str, margin: float, error_rate: float, whole: Comparison | None = None) -> Comparison:
        restarts = self.mode == "on"
        if name in ("failures", "lost"):  # how many are lost usually is not known before the trial
            usual = whole if isinstance(whole, RateComparison) else None
            return RateComparison(RateTest(error_rate, restarts=restarts), margin, usual)
        return ArmComparison(SequentialTest(margin, error_rate, restarts=restarts))

    def _save(self) -> None:
        trial = self._kept.trial
        if trial is not None:
            trial.tests = {name: cast(Tested, arm.state()) for name, arm in self._arms.items()}
        self._kept.contexts = self._contexts.state()
        self._kept.events = self._kept.events[-MAX_EVENTS:]
        self._saved_unix_s = self._clock()
        with self._state.patience():  # what was decided holds, and is served
            self._state.save(self._kept.model_dump(mode="json"), FILE)

    def _note(self, action: str, version: str, note: str, **more: Any) -> None:
        entry = {"version": version, "action": action, "previous": self._versions.version, "note": note[:500]}
        self._kept.events.append(entry | {"unix_s": self._clock()} | more)
        _LOG.info("adaptation: %s %s: %s", action, version, note)

    def events(self) -> list[dict[str, Any]]:
        """Return what happened, oldest first, in the form of the versions' history."""
        return list(self._kept.events)

    def status(self) -> dict[str, Any]:
        """Return the state as plain values: part of `dmoa router status`."""
        kept, trial = self._kept, self._kept.trial
        arms = {
            name: {"pairs": arm.whole.pairs, "worse_by": round(arm.whole.mean, 4), "evidence": round(arm.evidence, 3)}
            for name, arm in list(self._arms.items())  # a thread may change them
        }
        shown = {"control", "candidate", "update", "begun_unix_s", "queries"}
        return {
            "mode": self.mode,
            "ledger": kept.ledger,
            "frozen": kept.frozen,
            "cooldown_s": round(self._cooldown_left_s(), 1),
            "anchor": kept.anchor,
            "held_back": len(self._held),
            "trial": trial and trial.model_dump(mode="json", include=shown) | {"signals": arms},
            "counts": dict(kept.counts),
            "failures": dict(kept.failures),
            "distrusted": list(kept.distrusted),
            "skipped_guards": list(self._guards.skip),
            "uses_probe_labels": self._probes is not None,
        }

    def freeze(self, note: str = "") -> Change | None:
        """Take no offer from now on, and end the trial: the version before it goes on alone.

        Raises CheckpointError where the trial cannot be ended; no offer is taken then either.
        """
        if self._kept.frozen is None:
            self._kept.frozen = note or "by an operator"
            self._note("freeze", self._versions.version, note)
            self._save()
        change = self._withdraw("frozen")
        self._save()
        return change

    def thaw(self, note: str = "") -> None:
        """Take offers again, also where a rollback is still cooling down."""
        if self._kept.frozen is not None or self._cooldown_left_s() > 0:
            self._kept.frozen, self._kept.cooldown_until_unix_s = None, 0.0
            self._note("thaw", self._versions.version, note)
            self._save()

    def rollback(self, version: str | None, note: str) -> Change:
        """Make the version current that an operator goes back to; `operated` is to hear of it.

        None: the one before the trial; where none runs the one before the current one. Raises CheckpointError.
        """
        trial = self._kept.trial
        if trial is None:
            return self._versions.rollback(version, note)
        try:
            return self._versions.rollback(trial.control if version is None else version, note)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; the trial of gate {trial.candidate} goes on, `dmoa router freeze` ends it and takes no other"
            ) from error

    def operated(self) -> None:
        """Hear that an operator made a version current: it is the anchor, and a trial is over."""
        trial = self._kept.trial
        if trial is not None:
            self._end(trial, "withdrawn", f"an operator made {self._versions.version} current")
        self._kept.anchor = self._versions.version
        self._save()

    def offer(
        self, files: Mapping[str, bytes], evidence: Mapping[str, Any], inputs: Sequence[FloatArray]
    ) -> tuple[dict[str, Any], Change | None]:
        """Judge an offered gate, and do with it what the mode says; `inputs` [X] are those routed last.

        Returns what the learner is told, and the change of the current version, if there is one. Raises ConfigError for
        evidence that cannot be read.
        """
        try:
            said = Evidence.model_validate(dict(evidence))
        except ValidationError as error:
            raise ConfigError(f"offer: evidence: {describe(error, Evidence)}") from error
        if said.update > self._kept.ledger + MAX_JUMP:
            raise ConfigError(f"offer: update is {short(said.update)}; expected at most {MAX_JUMP} above {self._kept.ledger}")
        if self.mode == "off":
            return self._told("refused", ["router.adaptation is 'off'; set it to observe, canary or on"]), None
        closed = self._closed(said)
        if closed is not None:
            return self._turn_away(said, *closed), None
        self._kept.ledger = said.update
        try:
            gate, record, (shadow, recent) = self._versions.check(files, inputs)
        except CheckpointError as error:
            return self._decline("refused", said, [str(error)], ["finite" if "NaN" in str(error) else "checkpoint"]), None
        verdicts = self._judge(gate, recent, said)
        failed = [verdict for verdict in verdicts if not verdict.passed]
        if failed:
            reasons, names = [f"{verdict.guard}: {verdict.words}" for verdict in failed], [verdict.guard for verdict in failed]
            return self._decline("refused", said, reasons, names, verdicts, record.version), None
        if self.mode == "observe":
            found = shadow.model_dump(mode="json")
            return self._decline("observed", said, [_would(shadow)], (), verdicts, record.version, shadow=found), None
        return self._take(gate, record, said, verdicts)

    def _decline(
        self,
        state: State,
        said: Evidence,
        reasons: Sequence[str],
        failed: Iterable[str],
        verdicts: Sequence[Verdict] = (),
        version: str = "",
        **more: Any,
    ) -> dict[str, Any]:
        """Count, note and tell what became of an offer that changes nothing."""
        self._count(state, failed)
        self._note(state, version, f"update {said.update}: {'; '.join(reasons)}", **more)
        self._save()
        return self._told(state, reasons, verdicts, version)

    def _closed(self, said: Evidence) -> tuple[str, str] | None:
        """Return why no offer, or not this one, is looked at, in a word and in a sentence; None where it is."""
        kept, trial, current = self._kept, self._kept.trial, self._versions.version
        if kept.frozen is not None:
            return "frozen", f"learning is frozen ({kept.frozen}); `dmoa router thaw` ends that"
        if said.update <= kept.ledger:
            words = f"update {said.update} was judged before, the ledger is {kept.ledger}; number the next one higher"
            return "ledger", words
        left = self._cooldown_left_s()
        if left > 0:
            return "cooldown", f"a gate was taken back lately; offers are taken again in {left:.0f} s"
        if trial is not None and self.mode == "canary":
            return "trial", f"gate {trial.candidate} is on trial (update {trial.update}); offer again when it is over"
        if said.base_version not in {current, *(trial.line if trial else ()), *([trial.control] if trial else ())}:
            return "base", f"the update began with gate {said.base_version}, current is {current}; begin with that"
        return None

    def _cooldown_left_s(self) -> float:
        """Return how long no offer is taken after a rollback: no longer than is configured, also where the clock was set back."""
        now = self._clock()
        if self._kept.cooldown_until_unix_s > now + self._guards.cooldown_s:
            self._kept.cooldown_until_unix_s = now + self._guards.cooldown_s
        return max(0.0, self._kept.cooldown_until_unix_s - now)

    def _turn_away(self, said: Evidence, reason: str, words: str) -> dict[str, Any]:
        """Count an offer that is not looked at; of several in a row for one reason, the history has the first."""
        self._count("refused", [reason])
        last = self._kept.events[-1] if self._kept.events else {}
        if last.get("closed") != reason:
            self._note("refused", "", f"update {said.update}: {words}", closed=reason)
        self._save()
        return self._told("refused", [words])

    def _judge(self, gate: Gate, decided: tuple[Decisions, Decisions], said: Evidence) -> list[Verdict]:
        """Return the verdicts of all guards that are on; `decided` is what the gate and the current one did lately."""
        current, agents, bounds = self._versions.gate, self._versions.gate.spec.agents, self._guards
        replay = read_slice(self._held.records(), current)
        new, old = ([*some, *judged(one, replay.inputs)] for one, some in zip((gate, current), decided, strict=True))
        split, count, slack = len(decided[0]), len(agents), 2.0 if said.shift else 1.0
        weights = {name: tensor.numpy() for name, tensor in gate.state_dict().items()}
        verdicts = [guards.finite(weights)]
        recent = [probabilities(some[: split or None], count) for some in (new, old)]  # right after a start: the replayed
        new_RA, old_RA = loads(new, count), loads(old, count)
        verdicts.append(guards.drift(recent[0], recent[1], bounds.max_kl * slack))
        verdicts.append(self._distance(weights, slack))
        loss_R = ((old_RA - new_RA)[split:] * replay.right_RA).sum(axis=1)
        verdicts.append(guards.not_worse("held_back", loss_R, margin=bounds.margin, error_rate=bounds.error_rate))
        verdicts.append(guards.load(new_RA, old_RA, bounds.min_effective_agents))
        bad_A = self._look_at(replay)
        verdicts.append(guards.disagreement(new_RA, old_RA, bad_A, agents))
        if self._probes is not None:
            verdicts.append(self._probes.judge(gate, current, margin=bounds.margin, error_rate=bounds.error_rate))
        return [verdict for verdict in verdicts if verdict.guard not in bounds.skip]

    def _look_at(self, replay: Slice) -> BoolArray:
        """Note who is distrusted now, and return it [A]."""
        bad_A = guards.distrusted(replay.sureness_RA, replay.agreement_RA, replay.context_R)
        agents = self._versions.gate.spec.agents
        self._kept.distrusted, self._unlooked = [name for name, bad in zip(agents, bad_A, strict=True) if bad], 0
        return bad_A

    def _distance(self, weights: Mapping[str, Any], slack: float) -> Verdict:
        found = self._state.load_version(self._kept.anchor)
        bound = self._guards.max_distance * slack
        anchor = {} if found is None else {name: tensor.numpy() for name, tensor in found[0].state_dict().items()}
        if is_untrained(self._kept.anchor) or {n: a.shape for n, a in anchor.items()} != {n: a.shape for n, a in weights.items()}:
            words = "the anchor is untrained, or of other sizes: no distance is bounded"
            return Verdict(guard="distance", passed=True, value=0.0, bound=bound, words=words)
        return guards.distance(weights, anchor, bound)

    def _take(
        self, gate: Gate, record: Checkpoint, said: Evidence, verdicts: Sequence[Verdict]
    ) -> tuple[dict[str, Any], Change | None]:
        """Try a gate that passed the guards, or install it where nothing is to be tried."""
        if record.version == self._versions.version:
            self._save()
            return self._told("refused", [f"gate {record.version} is current already"], verdicts, record.version), None
        self._state.save_version(gate, record)
        note = f"update {said.update} on {said.used} queries ({said.signal}{', shift' if said.shift else ''})"
        is_tried = "canary" not in self._guards.skip
        if is_tried:
            self._begin_trial(record.version, said)
        if self.mode == "canary":
            self._count("canary")
            self._note("canary", record.version, f"{note}; {self._guards.canary_share:.0%} of new queries")
            self._save()
            return self._told("canary", [], verdicts, record.version), None
        if not is_tried and said.shift:
            self._kept.anchor = record.version
        self._count("installed")
        self._save()  # the ledger before the version: a crash in between loses the update, and never takes it twice
        change = self._versions.adopt(gate, record, note)
        return self._told("installed", [], verdicts, record.version), change

    def _begin_trial(self, version: str, said: Evidence) -> None:
        trial, now = self._kept.trial, self._clock()
        if trial is None:
            control = self._versions.version
            self._kept.trial = Trial(
                control=control, candidate=version, update=said.update, shift=said.shift, line=[version], begun_unix_s=now
            )
            self._begun.clear()
            self._resume()
            return
        if version == trial.control:  # which is known already
            self._end(trial, "withdrawn", f"update {said.update} goes back to the gate before it")
            return
        trial.candidate, trial.update, trial.shift = version, said.update, trial.shift or said.shift
        trial.line = [*trial.line, version][-MAX_LINE:]
        self._kept.tried = [*self._kept.tried, version][-KEPT_CANDIDATES:]
        self._versions.wanted |= {version}

    def _count(self, end: str, failed: Iterable[str] = ()) -> None:
        self._kept.counts[end] += 1
        self._kept.failures.update(failed)

    def _told(self, state: State, reasons: Sequence[str], verdicts: Sequence[Verdict] = (), version: str = "") -> dict[str, Any]:
        return {
            "accepted": state != "refused",
            "state": state,
            "reasons": list(reasons),
            "ledger": self._kept.ledger,
            "version": version,
            "current": self._versions.version,
            "verdicts": [verdict.to_json() for verdict in verdicts],
            "distrusted": list(self._kept.distrusted),
        }

    def observe(self, records: Iterable[Feedback], begun: tuple[int, int] = (0, 0), *, again: bool = False) -> Change | None:
        """Take finished queries; returns the change of the current version where they end a trial.

        `begun`: queries that began with the current version and with the other one of the trial, since the router started.
        `again`: the feedback was started anew, and tells once more of what it had saved.
        """
        since_unix_s, fingerprint = self._heard_unix_s if again else 0.0, str(self._versions.source["fingerprint"])
        found = [one for one in records if one.created_unix_s > since_unix_s and is_of_pool(one, fingerprint)]
        self._heard_unix_s = max([self._heard_unix_s, *(one.created_unix_s for one in found)])
        for record in found:
            self._held.put(record)
        self._unlooked += len(found)
        if self._kept.distrusted and self._unlooked >= LOOK_AGAIN:
            # Without the agents that are left out there may be nothing to learn, and no offer at which they are looked at.
            self._look_at(read_slice(self._held.records(), self._versions.gate))
        trial = self._kept.trial
        if trial is None:
            read = zip(read_queries(found, self._versions.gate), found, strict=True)
            self._usual.extend((one.failures, self._context(record)) for one, record in read)
            return None
        arms = {trial.control: False} | dict.fromkeys(trial.line, True)
        mine = [one for one in found if one.answer.gate_version in arms and one.created_unix_s >= trial.begun_unix_s]
        mine = [one for one in mine if one.created_unix_s > self._counted_unix_s]
        for record in mine:
            trial.counted_unix_s = max(trial.counted_unix_s, record.created_unix_s)
            trial.heard["candidate" if arms[str(record.answer.gate_version)] else "control"] += 1
        readings = [one for one in mine if one.answer.policy == "dmoa"]
        for record, reading in zip(readings, read_queries(readings, self._control_gate or self._versions.gate), strict=True):
            self._add(trial, reading, self._context(record), is_candidate=arms[str(record.answer.gate_version)])
        lost = trial.lost.total()
        self._add_lost(trial, *begun)
        return self._conclude(trial, is_told_once=trial.lost.total() > lost) if readings or trial.lost.total() else None

    def _context(self, record: Feedback) -> int:
        route = record.answer.steps[0].route
        assert route is not None  # `is_of_pool` has seen to it
        return self._contexts.of(query_part(route.input_X, self._config.gate.preset))

    def _add(self, trial: Trial, reading: Reading, context: int | None, *, is_candidate: bool) -> None:
        trial.queries["candidate" if is_candidate else "control"] += not reading.lost
        if not is_candidate and context is not None:
            self._usual.append((reading.failures, context))
        for signal, arm in self._arms.items():
            arm.add(getattr(reading, signal), context, is_suspect=is_candidate)

    def _add_lost(self, trial: Trial, current: int, other: int) -> None:
        """Count queries as failed that began long enough ago and were not heard of."""
        now = self._clock()
        candidate, control = (current, other) if trial.candidate == self._versions.version else (other, current)
        if not self._begun:
            self._base = candidate, control
        if candidate < self._base[0] or control < self._base[1]:  # the router was started anew, and counts from 0
            self._begun.clear()
            self._base = (0, 0)
        self._begun.append((now, candidate - self._base[0], control - self._base[1]))
        deadline_s = self._config.limits.deadline_s
        patience_s = LOST_S if deadline_s is None else deadline_s + 5.0
        old = None
        while len(self._begun) > 1 and self._begun[0][0] <= now - patience_s:
            old = self._begun.popleft()
        if old is None:
            return
        # The control first: what it lost as well is known then when the candidate is tested, however many come at once.
        for name, begun, is_candidate in (("control", old[2], False), ("candidate", old[1], True)):
            for _ in range(begun - trial.heard[name]):
                trial.lost[name] += 1
                trial.heard[name] += 1
                self._add(trial, Reading(math.nan, math.nan, math.nan, math.nan, lost=1.0), None, is_candidate=is_candidate)

    def _conclude(self, trial: Trial, *, is_told_once: bool) -> Change | None:
        """End the trial where the candidate is worse, or has stood it; `is_told_once`: feedback will not tell of this again."""
        worse = [name for name, arm in self._arms.items() if arm.is_found]
        if worse:
            return self._roll_back(trial, worse)
        done = min(trial.queries[name] for name in ("candidate", "control")) >= self._guards.canary_queries
        change = self._pass(trial) if done and self.mode == "canary" else None
        if done and self.mode == "on":
            self._next_window(trial)
        if done or is_told_once or self._clock() - self._saved_unix_s >= SAVE_S:
            self._save()
        return change

    def _roll_back(self, trial: Trial, worse: Sequence[str]) -> Change | None:
        named = {"failures" if name == "lost" else name: self._arms[name] for name in worse}
        words = [f"{name} {arm.where}, evidence {arm.evidence:.3g}" for name, arm in named.items()]
        note = f"update {trial.update} after {trial.queries['candidate']} queries: {'; '.join(words)}"
        self._kept.cooldown_until_unix_s = self._clock() + self._guards.cooldown_s
        self._count("rolled_back", list(named))
        change = self._back(trial, note)
        self._end(trial, "rolled back", note)
        self._save()
        return change

    def _pass(self, trial: Trial) -> Change | None:
        """Make a canary that was not found worse current."""
        found = self._state.load_version(trial.candidate)
        if found is None:
            self._end(trial, "withdrawn", "it is no longer kept; offer it again")
            return None
        count = trial.queries["candidate"]
        self._count("passed")
        if trial.shift:
            self._kept.anchor = trial.candidate
        self._end(trial, "passed", f"update {trial.update}: not found worse on {count} queries")
        return self._versions.adopt(*found, f"update {trial.update}: stood the canary on {count} queries")

    def _next_window(self, trial: Trial) -> None:
        """Let the control follow: the version that was current a window ago, and was not found worse since."""
        if trial.pending is not None:
            if trial.renews:
                self._kept.anchor = trial.pending
            trial.control = trial.pending
            self._count("passed")
        trial.renews, trial.shift = trial.shift, False
        trial.pending, trial.tests = trial.candidate, {}
        for counter in (trial.queries, trial.heard, trial.lost):
            counter.clear()
        trial.line = [version for version in trial.line if version != trial.control]
        self._begun.clear()
        if trial.control == trial.candidate:
            self._end(trial, "passed", f"update {trial.update}: not found worse over two windows of queries")
            return
        trial.begun_unix_s = self._clock()
        self._resume()

    def _withdraw(self, why: str) -> Change | None:
        """End the trial with the control alone."""
        trial = self._kept.trial
        if trial is None:
            return None
        change = self._back(trial, why)
        self._end(trial, "withdrawn", why)
        return change

    def _back(self, trial: Trial, why: str) -> Change | None:
        """Make the control current, also where the place cannot be written now."""
        with self._state.patience():
            return self._versions.rollback(trial.control, why) if trial.control != self._versions.version else None

    def _end(self, trial: Trial, action: str, note: str) -> None:
        self._note(action, trial.candidate, note)
        self._kept.tried = [*self._kept.tried, trial.candidate][-KEPT_CANDIDATES:]
        self._kept.trial = None
        self._resume()
        self._versions.drop_old()


def _would(shadow: Shadow) -> str:
    if not shadow.inputs:
        return "would have been installed; no inputs yet to say what it changes"
    first = ", ".join(f"{name} {share:.0%}" for name, share in list(shadow.first.items())[:5])
    other = 1 - (shadow.same_first or 0)
    return f"would have been installed: on {shadow.inputs} inputs {other:.0%} get another first agent; {first}"
