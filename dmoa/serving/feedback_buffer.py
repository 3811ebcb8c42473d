"""What the feedback actor holds, apart from Ray: samples of finished queries per key and context, and what clients say of them.

Everything is kept key by key: what one key sends takes no place of another's context, trace or outcome, and where the records
together are too many, the largest group gives one up.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from dmoa.core.features import Preset
from dmoa.errors import ConfigError
from dmoa.feedback import Contexts, Feedback, query_part
from dmoa.reading import read_json

MAX_TRACES = 10_000
"""Newest queries of a key that an outcome may speak of, and outcomes of a key that are kept."""
MAX_NEWEST = 256
"""Newest records that `since` gives whether the sample kept them or not."""
_STEP_BYTES, _REPLY_BYTES = 1500, 1200
"""About what the objects of a step and of a reply take in memory beside their arrays."""
Said = Literal["new", "same", "changed", "unknown", "too_many"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptOutcome:
    """What a client said of one of its queries."""

    trace_id: str
    agent: str | None
    """Whose reply was judged; None: the final answer."""
    step: int | None
    """Which of its replies; None: that to the first step."""
    reward: float
    """1 right, 0 wrong."""
    source: str


_OUTCOME = TypeAdapter(KeptOutcome)


@dataclass(slots=True)
class _Tenant:
    """All that is known of one key."""

    traces: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """Newest queries, and when each was answered."""
    outcomes: OrderedDict[tuple[str, str, str | None, int | None], KeptOutcome] = field(default_factory=OrderedDict)
    contexts: Contexts = field(default_factory=Contexts)
    asked: deque[float] = field(default_factory=deque)
    """When outcomes came in the last minute."""


class FeedbackBuffer:
    """An even sample of the queries of every key and context, the newest traces, and outcomes. Not for two threads at once."""

    def __init__(
        self,
        *,
        preset: Preset,
        max_bytes: int,
        outcomes_per_minute: int,
        max_age_s: float,
        key_share: float = 1.0,
        exclude: Collection[str] = (),
        seed: int | None = None,
    ) -> None:
        """`max_bytes`: about what all records may take; `max_age_s`: how long after its answer a query may be judged.

        `key_share`: most of the bytes that one key's records may take; `exclude`: keys, as records name them, that are not kept.
        """
        self.preset = preset
        self.max_bytes = max_bytes
        self.key_share = key_share
        self.exclude = frozenset(exclude)
        self.outcomes_per_minute = outcomes_per_minute
        self.max_age_s = max_age_s
        self.seen = 0
        """Records taken so far, those since given up too."""
        self.bytes = 0
        self._random = random.Random(seed)  # noqa: S311 -- a sample, not a secret
        self._numbers = itertools.count()
        self._tenants: dict[str, _Tenant] = {}
        self._groups: dict[tuple[str, int], list[tuple[float, int, Feedback]]] = {}
        """A heap each, whose first entry has the highest draw: the next one to go (bottom-k sample, Cohen & Kaplan 2007)."""
        self._group_bytes: Counter[tuple[str, int]] = Counter()
        self._key_bytes: Counter[str] = Counter()
        self._newest: deque[tuple[int, Feedback]] = deque(maxlen=MAX_NEWEST)

    def put(self, record: Feedback) -> None:
        """Take a record, unless its query is known already; one of the largest group's goes where there are too many."""
        tenant = self._tenants.setdefault(record.tenant, _Tenant())
        trace_id = record.answer.trace_id
        if trace_id in tenant.traces:
            return
        _remember(tenant.traces, trace_id, record.created_unix_s)
        self._keep(tenant, record)

    def _keep(self, tenant: _Tenant, record: Feedback) -> None:
        route = record.answer.steps[0].route if record.answer.steps else None
        if route is None or record.tenant in self.exclude:
            return  # no gate decided, or its key teaches nothing: only outcomes of other queries can be learned from
        group = record.tenant, tenant.contexts.of(query_part(route.input_X, self.preset))
        self.seen += 1
        number = next(self._numbers)
        self._newest.append((number, record))
        heapq.heappush(self._groups.setdefault(group, []), (-self._random.random(), number, record))
        self._count(group, size_of(record))
        while self._key_bytes[record.tenant] > self.key_share * self.max_bytes:
            self._drop(name for name in self._groups if name[0] == record.tenant)
        while self.bytes > self.max_bytes:
            self._drop(self._groups)

    def _drop(self, names: Iterable[tuple[str, int]]) -> None:
        """Give up one record of the largest of some groups."""
        largest = max(names, key=lambda name: self._group_bytes[name])
        *_, gone = heapq.heappop(self._groups[largest])
        self._count(largest, -size_of(gone))

    def _count(self, group: tuple[str, int], size: int) -> None:
        self.bytes += size
        self._group_bytes[group] += size
        self._key_bytes[group[0]] += size

    def judge(self, tenant_name: str, outcome: KeptOutcome, now: float) -> Said:
        """Keep what a key says of one of its queries; the last word of a source on an answer counts.

        unknown: no query of this key that is young enough has the trace id, whoever else's may; too_many: this minute.
        """
        tenant = self._tenants.setdefault(tenant_name, _Tenant())
        while tenant.asked and not now - 60 < tenant.asked[0] <= now:  # later than now: the clock was set back
            tenant.asked.popleft()
        if len(tenant.asked) >= self.outcomes_per_minute:
            return "too_many"
        tenant.asked.append(now)
        if now - tenant.traces.get(outcome.trace_id, -np.inf) > self.max_age_s:
            return "unknown"
        name = _name_of(outcome)
        before = tenant.outcomes.get(name)
        _remember(tenant.outcomes, name, outcome)
        return "new" if before is None else "same" if before == outcome else "changed"

    def records(self) -> list[Feedback]:
        """Return what is kept, in the order in which it came."""
        return [record for _, _, record in sorted(itertools.chain(*self._groups.values()), key=lambda entry: entry[1])]

    def since(self, number: int) -> tuple[int, list[Feedback]]:
        """Return how many records have come, and those after `number` that are kept or new: who follows the stream sees all."""
        newer = {place: record for _, place, record in itertools.chain(*self._groups.values()) if place >= number}
        newer |= {place: record for place, record in self._newest if place >= number}
        return self.seen, [newer[place] for place in sorted(newer)]

    def groups(self) -> dict[tuple[str, int], int]:
        """Return how many records are kept, by key and context."""
        return {group: len(entries) for group, entries in self._groups.items() if entries}

    def outcomes(self) -> list[KeptOutcome]:
        """Return all outcomes, key by key, oldest first."""
        return [outcome for tenant in self._tenants.values() for outcome in tenant.outcomes.values()]

    def state(self) -> bytes:
        """Return what is known beside the records, as JSON."""
        tenants = {
            name: {"traces": dict(tenant.traces), "outcomes": [asdict(outcome) for outcome in tenant.outcomes.values()]}
            for name, tenant in self._tenants.items()
        }
        return json.dumps({"tenants": tenants}).encode()

    def restore(self, records: list[Feedback], state: bytes) -> None:
        """Take up a snapshot in an empty buffer. Raises ConfigError for a state that cannot be read."""
        for record in records:
            self.put(record)
        for name, kept, outcomes in read_state(state):
            tenant = self._tenants.setdefault(name, _Tenant())
            newest = max(kept.values(), default=-np.inf)  # the records were saved before, and may be newer
            tenant.traces = OrderedDict(kept | {trace: at for trace, at in tenant.traces.items() if at > newest})
            tenant.outcomes = OrderedDict((_name_of(one), one) for one in outcomes)

    def add(self, state: bytes) -> None:
        """Take up what another buffer came to know since: its word counts. Raises ConfigError for a state that cannot be read."""
        for name, traces, outcomes in read_state(state):
            tenant = self._tenants.setdefault(name, _Tenant())
            for trace_id, unix_s in traces.items():
                _remember(tenant.traces, trace_id, unix_s)
            for one in outcomes:
                _remember(tenant.outcomes, _name_of(one), one)


def read_state(state: bytes) -> Iterator[tuple[str, dict[str, float], list[KeptOutcome]]]:
    """Yield each key of a snapshot's state with its traces and outcomes. Raises ConfigError for what is none."""
    try:
        for name, tree in read_json(state)["tenants"].items():
            traces = {str(trace): float(unix_s) for trace, unix_s in tree["traces"].items()}
            yield name, traces, [_OUTCOME.validate_json(json.dumps(one), strict=True) for one in tree["outcomes"]]
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"feedback state: {' '.join(str(error).split())[:300]}; remove the file to begin anew") from error


def _name_of(outcome: KeptOutcome) -> tuple[str, str, str | None, int | None]:
    return outcome.trace_id, outcome.source, outcome.agent, outcome.step


def _remember(kept: OrderedDict[Any, Any], name: object, value: object) -> None:
    kept[name] = value
    kept.move_to_end(name)
    while len(kept) > MAX_TRACES:
        kept.popitem(last=False)


def size_of(record: Feedback) -> int:
    """Return about how many bytes a record takes in memory."""
    size = _STEP_BYTES
    for step in record.answer.steps:
        size += _STEP_BYTES + _REPLY_BYTES * len(step.replies)
        size += step.route.input_X.nbytes if step.route else 0
        size += step.decision.probability_A.nbytes if step.decision else 0
    return size
