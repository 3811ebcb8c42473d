"""What of the traffic may teach, and what next: the stream of finished queries made safe to learn from.

Numbers that cannot be are taken out, agents whose sureness is no longer what it was are left out, copies and single keys get no
more than their share, and batches are balanced over contexts. The long-lived job (`workflows/adapt_online`) draws its batches
here, on the first worker. No Ray, no file. Shape letters: D embedding, A agents.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dmoa.core.features import Preset
from dmoa.core.scores import Array, raw_score
from dmoa.core.shift import Shift, ShiftDetector
from dmoa.feedback import Contexts, Feedback, is_held_back, query_part, tenant_of
from dmoa.training.adapt import Lesson, lesson_of
from dmoa.training.outcomes import Outcome, authors
from dmoa.types import AgentReply, FloatArray, StepRecord

ANONYMOUS = tenant_of("")
"""The name of all who come without a key."""
MAX_NATS = 13.0
"""Mean entropies lie below the logarithm of the vocabulary: 12.5 for 256k tokens."""
MAX_COPIES = 2
"""Queries of a key with one and the same input that may teach."""
MAX_KEPT = 2000
"""Queries that wait to teach, all keys together."""
MAX_USES = 3
"""Batches that one query may be in."""
SMALL_CONTEXT = 0.03
"""Groups with a smaller share of a key's queries count as one: scattered garbage is no context each."""
UNUSUAL = 0.02
"""P-value of its sureness below which a reply to a query of a known kind does not teach: so many honest ones are lost."""
MIN_JUDGED = 8
"""Outcomes of a key, and of all others, before it is compared with them."""
CONTRADICTION = 3.0
"""Standard deviations by which a key's outcomes may fit the replies worse than the others' do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeRules:
    """Who may teach, and how much of it."""

    agents: tuple[str, ...]
    """The pool's."""
    preset: Preset
    fingerprint: str
    """Of the pool; queries of another one do not teach."""
    batch_queries: int = 8
    mixes_keys: bool = False
    key_share: float = 0.5
    """Most of a batch, of what waits, and of the evidence for a shift that one key may have where others teach too."""
    anonymous: bool = False
    exclude: Collection[str] = ()
    """Names of keys as records hold them."""
    held_back: float = 0.0
    """Share of queries that the router judges by, and that never teach."""


@dataclass(slots=True)
class _Waiting:
    record: Feedback
    context: int
    copy_of: tuple[str, bytes]
    teaches: bool
    """Whether two agents or more answered it: one alone says nothing of who is better."""
    uses: int = 0


@dataclass(slots=True)
class _Key:
    contexts: Contexts = field(default_factory=Contexts)
    waiting: OrderedDict[str, _Waiting] = field(default_factory=OrderedDict)
    """By trace id, oldest first."""


class Intake:
    """Takes records and gives batches. The same records, rules and seed give the same batches."""

    def __init__(self, rules: IntakeRules, *, seed: int = 0, detector: ShiftDetector | None = None) -> None:
        """`detector` is asked about every record that is taken."""
        self.rules = rules
        self.detector = detector or ShiftDetector(seed=seed)
        self.taken = 0
        self.refused: Counter[str] = Counter()
        """Reason -> records and replies that do not teach."""
        self.shifts: list[Shift] = []
        self.distrusted: Collection[str] = ()
        """Agents that the router wants left out."""
        self._exclude = frozenset(rules.exclude)
        self._keys: dict[str, _Key] = {}
        self._known: OrderedDict[str, None] = OrderedDict()
        self._copies: Counter[tuple[str, bytes]] = Counter()
        self._rng = np.random.default_rng(seed)
        self._said: defaultdict[str, dict[tuple[str | None, str], float]] = defaultdict(dict)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Agents whose replies do not teach: they are as sure, or unsure, as they never were on such queries."""
        odd = {self.rules.agents[a] for a in self.detector.odd_agents}
        return tuple(name for name in self.rules.agents if name in odd or name in self.distrusted)

    @property
    def waiting(self) -> int:
        """Queries that may be drawn."""
        return sum(one.uses < MAX_USES for key in self._keys.values() for one in key.waiting.values())

    def records(self) -> list[Feedback]:
        """Return the queries that wait, cleaned, key by key."""
        return [one.record for key in self._keys.values() for one in key.waiting.values()]

    def take(self, records: Iterable[Feedback]) -> Shift | None:
        """Take records that have come; those that are known already are passed over. Returns the last shift that they show."""
        found = None
        for record in records:
            trace_id = record.answer.trace_id
            if trace_id in self._known:
                continue
            self._known[trace_id] = None
            while len(self._known) > 4 * MAX_KEPT:
                self._known.popitem(last=False)
            found = self._take(record) or found
        return found

    def _take(self, record: Feedback) -> Shift | None:
        reason = self._unfit(record)
        if reason is not None:
            self.refused[reason] += 1
            return None
        route = record.answer.steps[0].route
        assert route is not None
        input_D = query_part(route.input_X, self.rules.preset)
        # What teaches nothing must not take the place of a copy that does: of the explored one.
        teaches = any(sum(reply.status == "ok" for reply in step.replies) > 1 for step in record.answer.steps)
        digest = hashlib.blake2b(input_D.astype(np.float16).tobytes(), digest_size=8).digest()
        copy_of = record.tenant, digest + bytes([teaches])
        key = self._keys.setdefault(record.tenant, _Key())
        if self._copies[copy_of] >= MAX_COPIES:
            self.refused["a copy of queries that teach already"] += 1
            return None
        cleaned = _keeping(record, self._teaches)
        others = (one for name, other in self._keys.items() if name != record.tenant for one in other.waiting.values())
        share = self.rules.key_share if any(one.uses < MAX_USES for one in others) else 1.0
        shift = self.detector.see(input_D, self._doubts(cleaned.answer.steps[0]), record.tenant, share)
        if shift is not None:
            self.shifts.append(shift)
        self._copies[copy_of] += 1
        key.waiting[record.answer.trace_id] = _Waiting(self._usual(cleaned), key.contexts.of(input_D), copy_of, teaches)
        self.taken += 1
        self._shrink()
        return shift

    def _unfit(self, record: Feedback) -> str | None:
        """Return why a record does not teach, None where it may."""
        rules = self.rules
        if record.tenant in self._exclude:
            return "its key is excluded (router.feedback_exclude)"
        if record.tenant == ANONYMOUS and not rules.anonymous:
            return "no API key (router.feedback_anonymous is off)"
        if record.fingerprint != rules.fingerprint:
            return "another version of the pool answered it"
        if is_held_back(record.answer.trace_id, rules.held_back):
            return "held back to judge by"
        steps = record.answer.steps
        if not steps or any(step.route is None or step.decision is None for step in steps):
            return "no gate decided it"
        inputs: list[FloatArray] = [step.route.input_X for step in steps if step.route is not None]
        if not all(np.isfinite(input_X).all() and np.abs(input_X).max(initial=0.0) <= 1e3 for input_X in inputs):
            return "gate inputs that cannot be"
        return None

    def _usual(self, record: Feedback) -> Feedback:
        """Return a record without replies to its first step that are as unlike those to similar queries as hardly any is."""
        odd = {self.rules.agents[a] for a in np.flatnonzero(self.detector.usual_A < UNUSUAL)}
        for agent in odd:
            self.refused[f"replies of {agent} unlike those to similar queries"] += 1
        return _keeping(record, lambda reply: reply.agent not in odd)

    def _teaches(self, reply: AgentReply) -> bool:
        if reply.status == "ok" and not is_possible(reply):
            self.refused[f"entropies of {reply.agent} that cannot be"] += 1
            return False
        return True

    def _doubts(self, step: StepRecord) -> Array:
        """Return per agent the raw score of its reply [A], NaN where there is none."""
        doubt_A = np.full(len(self.rules.agents), np.nan)
        for reply in step.replies:
            if reply.status == "ok" and reply.agent in self.rules.agents and reply.entropy.mean_nats is not None:
                doubt_A[self.rules.agents.index(reply.agent)] = raw_score(reply.entropy.mean_nats)
        return doubt_A

    def _shrink(self) -> None:
        """Hold to the bounds: the oldest of the largest context of the fullest key goes."""
        total = sum(len(key.waiting) for key in self._keys.values())
        fullest = max(self._keys.values(), key=lambda key: len(key.waiting))
        most = MAX_KEPT if len(self._keys) == 1 else max(1, int(self.rules.key_share * MAX_KEPT))
        if total > MAX_KEPT or len(fullest.waiting) > most:
            sizes = Counter(one.context for one in fullest.waiting.values())
            largest = sizes.most_common(1)[0][0]
            gone = fullest.waiting.pop(next(trace for trace, one in fullest.waiting.items() if one.context == largest))
            self._copies[gone.copy_of] -= 1
            self._copies = +self._copies if len(self._copies) > 2 * MAX_KEPT else self._copies

    def draw(self) -> list[Lesson]:
        """Return the next batch, of at most `batch_queries`: of several keys where they may mix, else of one that is drawn.

        Fewer, or none, where a key has its share already and no other has queries; empty where nothing waits.
        """
        open_keys = {
            name: [one for one in key.waiting.values() if one.uses < MAX_USES] for name, key in self._keys.items() if key.waiting
        }
        open_keys = {name: ones for name, ones in open_keys.items() if ones}
        if not open_keys:
            return []
        size = self.rules.batch_queries
        if not self.rules.mixes_keys:
            name = self._next_key({name: sum(MAX_USES - one.uses for one in ones) for name, ones in open_keys.items()})
            return [] if name is None else self._of_key(open_keys[name], size)
        most = size if len(open_keys) == 1 else max(1, math.floor(self.rules.key_share * size))
        drawn: list[Lesson] = []
        for place, name in enumerate(self._rng.permutation(sorted(open_keys))):
            fair = math.ceil((size - len(drawn)) / (len(open_keys) - place))
            drawn += self._of_key(open_keys[str(name)], min(most, fair))
        return drawn

    def _next_key(self, left: Mapping[str, int]) -> str | None:
        """Draw whose batch it is: by how often their queries may still be used, no key above its share where others teach.

        None for what that leaves over: the others do not get more for it, or a few queries of theirs would teach much.
        """
        names = sorted(left)
        chance_K = np.array([left[name] for name in names], np.float64) / sum(left.values())
        if len(names) > 1:
            chance_K = np.minimum(chance_K, self.rules.key_share)
        drawn = float(self._rng.uniform())
        return next((name for name, end in zip(names, np.cumsum(chance_K), strict=True) if drawn < end + 1e-12), None)

    def hear(self, outcomes: Iterable[Outcome]) -> None:
        """Take all that is said so far of queries by their trace ids, in place of what was heard before; later ones count."""
        self._said = defaultdict(dict)
        for one in outcomes:
            if one.trace_id is not None and not one.step:
                self._said[one.trace_id][one.agent, one.source] = one.reward

    def _outcomes(self, record: Feedback) -> dict[str, float]:
        """Return what outcomes say of the first replies of a query: by agent the mean reward."""
        rewards: defaultdict[str, list[float]] = defaultdict(list)
        ran = {reply.agent for reply in record.answer.steps[0].replies if reply.status == "ok"}
        for (agent, _), reward in self._said.get(record.answer.trace_id, {}).items():
            for name in authors(record.answer) if agent is None else {agent} & ran:
                rewards[name].append(reward)
        return {name: float(np.mean(values)) for name, values in rewards.items()}

    @property
    def false_keys(self) -> tuple[str, ...]:
        """Keys whose outcomes do not teach, because they contradict the replies more than the others' do."""
        judged = []
        for tenant, key in self._keys.items():
            for one in key.waiting.values():
                replies = {reply.agent: reply.right_probability for reply in one.record.answer.steps[0].replies}
                for agent, reward in self._outcomes(one.record).items():
                    p = replies.get(agent)
                    judged += [] if p is None else [Judged(tenant, reward, p)]
        return tuple(sorted(false_witnesses(judged)))

    def _of_key(self, ones: Sequence[_Waiting], count: int) -> list[Lesson]:
        """Draw queries of one key, the least used first, of those what teaches, evenly over its contexts."""
        sizes = Counter(one.context for one in ones)
        groups: defaultdict[int, list[_Waiting]] = defaultdict(list)
        for place in self._rng.permutation(len(ones)):
            one = ones[place]
            groups[one.context if sizes[one.context] >= SMALL_CONTEXT * len(ones) else -1].append(one)
        for group in groups.values():
            group.sort(key=lambda one: (one.uses, not one.teaches))
        order = [groups[name] for name in self._rng.permutation(sorted(groups))]
        drawn: list[_Waiting] = []
        while len(drawn) < count and any(order):
            drawn += [group.pop(0) for group in order if group][: count - len(drawn)]
        for one in drawn:
            one.uses += 1
        left_out, is_false = set(self.left_out), bool(drawn) and drawn[0].record.tenant in self.false_keys

        def stays(reply: AgentReply) -> bool:
            return reply.agent not in left_out

        return [lesson_of(_keeping(one.record, stays), {} if is_false else self._outcomes(one.record)) for one in drawn]


def _keeping(record: Feedback, keeps: Callable[[AgentReply], bool]) -> Feedback:
    """Return a record with some of its replies."""
    steps = tuple(replace(step, replies=tuple(filter(keeps, step.replies))) for step in record.answer.steps)
    return replace(record, answer=replace(record.answer, steps=steps))


def is_possible(reply: AgentReply) -> bool:
    """Tell whether a reply's entropies could have been measured: finite, from 0 to log of any vocabulary, sums that fit."""
    said = reply.entropy
    if not all(math.isfinite(value) for value in (said.sum_nats, said.sq_sum)) or said.tokens < 0:
        return False
    if said.tokens == 0:
        return said.sum_nats == 0
    mean = said.sum_nats / said.tokens
    # The mean of squares is at least the square of the mean; where squares were not kept it is 0.
    return 0 <= mean <= MAX_NATS and (said.sq_sum == 0 or said.sq_sum / said.tokens >= mean * mean * (1 - 1e-6))


@dataclass(frozen=True, slots=True)
class Judged:
    """One outcome, and how probable it was by the replies alone."""

    tenant: str
    reward: float
    right_probability: float
    """Of the reply that it judges, without this outcome."""


def false_witnesses(judged: Iterable[Judged]) -> Mapping[str, float]:
    """Return the keys whose outcomes contradict the replies more than those of all other keys do, and by how many deviations.

    Where all keys' outcomes contradict the replies, the replies are wrong: a key is compared with the others, and one alone is
    believed. Source: ours.
    """
    surprise: defaultdict[str, list[float]] = defaultdict(list)
    for one in judged:
        p = min(max(one.right_probability, 0.02), 0.98)
        fits = one.reward * p + (1 - one.reward) * (1 - p)
        surprise[one.tenant].append(fits - (p * p + (1 - p) * (1 - p)))
    found = {}
    for tenant, mine in surprise.items():
        others = [value for name, values in surprise.items() if name != tenant for value in values]
        if min(len(mine), len(others)) < MIN_JUDGED:
            continue
        spread = math.sqrt(np.var([*mine, *others]) * (1 / len(mine) + 1 / len(others))) or 1e-9
        below = (float(np.mean(others)) - float(np.mean(mine))) / spread
        if below > CONTRADICTION:
            found[tenant] = below
    return found
