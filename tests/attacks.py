"""Attacks on a gate that learns while it serves, over a pool whose truth is known: who learns from what, and how right it stays.

Three arms see the same queries: `frozen` learns nothing, `guarded` learns as the long-lived job does, `unguarded` from every
record as it comes, without replay, pull or vetting. Shape letters: C domains, A agents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dmoa.checkpoint import Checkpoint, describe_gate
from dmoa.core.gate import Gate, GateSpec, init_gate
from dmoa.core.shift import ShiftDetector
from dmoa.feedback import Feedback
from dmoa.training.adapt import Adapter, episodes_of, lesson_of
from dmoa.training.dataset import Episodes
from dmoa.training.distributed import SingleWorker
from dmoa.training.intake import Intake, IntakeRules
from dmoa.training.judging import witnesses_of_steps
from dmoa.training.options import AdaptSettings
from dmoa.training.outcomes import Outcome
from tests.streams import FINGERPRINT, KEYS, Asked, D, ScriptedPool

KNOWN = (0, 1, 2, 3)
"""Domains that the deployed gate was trained on; the last domain is new to it."""
CLEAN = 150
"""Held-out rows of every known domain."""
CPU = torch.device("cpu")
EVERY = 8
"""Queries of the stream for each update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """A trained gate, what it was trained on, and clean rows of the domains that it knows."""

    pool: ScriptedPool
    gate: Gate
    record: Checkpoint
    replay: Episodes
    rows: list[Asked]


def deployed(seed: int, score: str = "anchored", *, newcomers: int = 0) -> Deployed:
    """Train a gate on the known domains; the last `newcomers` agents were not there then."""
    pool = ScriptedPool(seed=seed, agents=("arith", "words", "dates", "code", "law", "new", "newer")[: 5 + newcomers])
    there = range(len(pool.agents) - newcomers)
    spec = GateSpec(
        preset="paper",
        head="linear",
        hidden=32,
        temperature=0.1,
        agents=pool.agents[: len(there)],
        embedding_dim=D,
        rule="top_mass",
        mass=0.9,
        max_agents=2,
        cascade=False,
        score=score,  # type: ignore[arg-type] # a name of a score
    )
    taught = [pool.record(one, there) for one in pool.mixed(120, KNOWN)]
    gate = init_gate(spec, seed=seed)
    settings = AdaptSettings(pull=0.0, lr=3e-3, recent=120)
    teacher = Adapter(gate, describe_gate(gate, fingerprint=FINGERPRINT), None, settings, SingleWorker(CPU))
    for start in range(0, len(taught), EVERY):
        teacher.learn(taught[start : start + EVERY])
    trained, record = teacher.candidate()
    if newcomers:
        trained, record = _joined(trained, record, pool.agents)
    found = [episodes_of(lesson_of(one), trained.spec) for one in taught]
    replay = Episodes.joined([one for one in found if isinstance(one, Episodes)])
    return Deployed(pool=pool, gate=trained, record=record, replay=replay, rows=pool.mixed(CLEAN * len(KNOWN), KNOWN))


def _joined(gate: Gate, record: Checkpoint, agents: tuple[str, ...]) -> tuple[Gate, Checkpoint]:
    """Return the gate with more agents, of which it asks none yet."""
    wider = Gate(gate.spec.for_agents(agents))
    weights = gate.state_dict()
    count = len(agents) - len(gate.spec.agents)
    weights["head_weight"] = torch.cat([weights["head_weight"], torch.zeros(count, gate.spec.hidden)])
    weights["head_bias"] = torch.cat([weights["head_bias"], torch.full((count,), -3.0)])
    wider.load_state_dict(weights)
    return wider, describe_gate(wider, fingerprint=FINGERPRINT, metrics=record.metrics, trained_on=record.trained_on)


def accuracy(gate: Gate, rows: Sequence[Asked]) -> float:
    """Return the share of rows that the gate's first choice answers right."""
    x_BD = torch.from_numpy(np.stack([row.input_D for row in rows]))
    with torch.no_grad():
        first_B = gate(x_BD, torch.zeros(len(rows), gate.spec.hidden)).logits_BA.argmax(dim=1).numpy()
    return float(np.mean([row.right_A[place] for row, place in zip(rows, first_B, strict=True)]))


def choices(gate: Gate, rows: Sequence[Asked]) -> np.ndarray:
    """Return how often each agent is the first choice [A]."""
    x_BD = torch.from_numpy(np.stack([row.input_D for row in rows]))
    with torch.no_grad():
        first_B = gate(x_BD, torch.zeros(len(rows), gate.spec.hidden)).logits_BA.argmax(dim=1)
    return np.bincount(first_B.numpy(), minlength=len(gate.spec.agents)) / len(rows)


Traffic = Callable[[ScriptedPool], list[Asked]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One way to lead a learning gate astray."""

    name: str
    traffic: Traffic
    score: str = "anchored"
    newcomers: int = 0
    truth: Callable[[Asked, np.random.Generator], bool] | None = None
    """What a client says of the first active agent's answer of one query in three; None: nobody says anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Accuracy on the clean rows after the stream, by arm, and what the guards said."""

    name: str
    frozen: float
    guarded: float
    unguarded: float
    said: list[str]


def intake_of(start: Deployed, seed: int = 0) -> Intake:
    """Return the intake of the long-lived job for this pool, which knows the replay."""
    detector = ShiftDetector(seed=seed)
    replay = start.replay
    with np.errstate(divide="ignore", invalid="ignore"):
        nats_NA = np.where(replay.ran_NA, replay.sum_NA / replay.tokens_NA, np.nan)
    detector.prime(replay.input_NX, np.log(nats_NA + 1e-3))
    rules = IntakeRules(agents=start.pool.agents, preset="paper", fingerprint=FINGERPRINT)
    return Intake(rules, seed=seed, detector=detector)


def attacked(attack: Attack, seed: int) -> Result:
    """Let the three arms see one stream."""
    start = deployed(seed, attack.score, newcomers=attack.newcomers)
    pool = start.pool
    records = pool.records(attack.traffic(pool))
    if attack.score == "posterior":
        records = [_judged(record, start) for record in records]
    outcomes = _outcomes(attack, records, seed)
    guarded, intake = _guarded(start, records, outcomes, seed)
    heedless = AdaptSettings(pull=0.0, replay_ratio=0.0, lr=3e-3, recent=EVERY)
    naive = Adapter(start.gate, start.record, None, heedless, SingleWorker(CPU))
    told: dict[str, dict[str, float]] = {}
    for one in outcomes:
        told.setdefault(one.trace_id or "", {})[one.agent or ""] = one.reward
    for at in range(0, len(records), EVERY):
        naive.learn([lesson_of(one, told.get(one.answer.trace_id)) for one in records[at : at + EVERY]])
    said = [f"{reason}: {count}" for reason, count in intake.refused.items()]
    said += [f"left out: {name}" for name in intake.left_out] + [f"outcomes of {name} not believed" for name in intake.false_keys]
    said += [f"shift of {shift.cause} at {shift.at}" for shift in intake.shifts]
    return Result(
        name=attack.name,
        frozen=accuracy(start.gate, start.rows),
        guarded=accuracy(guarded, start.rows),
        unguarded=accuracy(naive.candidate()[0], start.rows),
        said=said,
    )


def _guarded(start: Deployed, records: Sequence[Feedback], outcomes: Sequence[Outcome], seed: int) -> tuple[Gate, Intake]:
    intake = intake_of(start, seed)
    adapter = Adapter(start.gate, start.record, start.replay, AdaptSettings(), SingleWorker(CPU))
    intake.hear(outcomes)
    for at in range(0, len(records), EVERY):
        shift = intake.take(records[at : at + EVERY])
        batch = intake.draw()
        if batch:
            adapter.learn(batch, shift=shift is not None)
    return adapter.candidate()[0], intake


def _judged(record: Feedback, start: Deployed) -> Feedback:
    """Return a record whose replies have the probability of being right that the deployed label model gave them."""
    found, model = episodes_of(lesson_of(record), start.gate.spec), start.gate.label_model
    assert isinstance(found, Episodes)
    assert model is not None
    right_A = model.right_probability(witnesses_of_steps(found, np.arange(1), start.gate.spec))[0]
    (step,) = record.answer.steps
    replies = tuple(
        replace(reply, right_probability=float(right_A[start.pool.agents.index(reply.agent)])) for reply in step.replies
    )
    return replace(record, answer=replace(record.answer, steps=(replace(step, replies=replies),)))


def _outcomes(attack: Attack, records: Sequence[Feedback], seed: int) -> list[Outcome]:
    if attack.truth is None:
        return []
    rng = np.random.default_rng([seed, 5])
    found = []
    for record in records[::3]:
        for reply in record.answer.steps[0].replies:
            is_right = attack.truth(Asked(0, np.zeros(0, np.float32), np.zeros(0), np.zeros(0), [reply.text], record.tenant), rng)
            found.append(Outcome(trace_id=record.answer.trace_id, agent=reply.agent, reward=float(is_right)))
    return found


def _tampered(asked: list[Asked], tamper: Callable[[Asked], None]) -> list[Asked]:
    for one in asked:
        tamper(one)
    return asked


def garbage(pool: ScriptedPool) -> list[Asked]:
    """One query in five is noise: any input, any entropies."""

    def tamper(one: Asked) -> None:
        if pool.rng.uniform() < 0.2:
            row_D = pool.rng.normal(size=D)
            one.input_D = np.asarray(row_D / np.linalg.norm(row_D), np.float32)
            one.nats_A = np.exp(pool.rng.normal(size=len(pool.agents)) * 2)

    return _tampered(pool.mixed(240), tamper)


def busy_client(pool: ScriptedPool) -> list[Asked]:
    """Nine queries in ten come from one client and one domain."""
    return [pool.ask(1, KEYS[2]) if pool.rng.uniform() < 0.9 else pool.mixed(1)[0] for _ in range(240)]


def poisoned(pool: ScriptedPool) -> list[Asked]:
    """Ten queries of domain 0, chosen because agent 3 is sure of them and wrong."""
    asked = pool.mixed(230)
    for place in range(10):
        one = pool.ask(0, KEYS[3])
        one.nats_A = np.where(np.arange(len(pool.agents)) == 3, 0.005, 2.0)
        one.right_A[3] = False
        asked.insert(23 * place + 10, one)
    return asked


def liars(count: int) -> Traffic:
    """Agents that joined since: sure of everything, always wrong, and of one mind."""

    def traffic(pool: ScriptedPool) -> list[Asked]:
        def tamper(one: Asked) -> None:
            one.nats_A[5 : 5 + count] = 0.005
            one.right_A[5 : 5 + count] = False
            one.answer_A[5 : 5 + count] = ["wrong0"] * count

        return _tampered(pool.mixed(240), tamper)

    return traffic


def reports(change: Callable[[float], float]) -> Traffic:
    """Agent 2 reports other entropies than it measured."""

    def traffic(pool: ScriptedPool) -> list[Asked]:
        def tamper(one: Asked) -> None:
            one.nats_A[2] = change(float(one.nats_A[2]))

        return _tampered(pool.mixed(240), tamper)

    return traffic


def identical(pool: ScriptedPool) -> list[Asked]:
    """Four queries in five are one and the same, of domain 0, that agent 2 happens to be sure of."""
    again = pool.ask(0)
    again.nats_A = np.where(np.arange(len(pool.agents)) == 2, 0.01, 1.5)
    return [replace(again) if pool.rng.uniform() < 0.8 else pool.mixed(1)[0] for _ in range(240)]


def sorted_domains(pool: ScriptedPool) -> list[Asked]:
    """Domain after domain, the last one last."""
    return [pool.ask(number // 48, KEYS[number % 2]) for number in range(240)]


def restless(pool: ScriptedPool) -> list[Asked]:
    """Another domain with every query."""
    return [pool.ask(number % 5, KEYS[number % 2]) for number in range(240)]


def _flipped(asked: Asked, rng: np.random.Generator) -> bool:
    return (asked.answer_A[0] == "right") != bool(rng.uniform() < 0.2)


def _one_lies(asked: Asked, rng: np.random.Generator) -> bool:
    return (asked.answer_A[0] == "right") != (asked.tenant == KEYS[1])


ATTACKS = (
    Attack(name="20 % garbage", traffic=garbage),
    Attack(name="one client with 90 % of the traffic, from one domain", traffic=busy_client),
    Attack(name="ten poisoned queries that drive one agent", traffic=poisoned),
    Attack(name="a confident liar joins", score="raw", traffic=liars(1), newcomers=1),
    Attack(name="two colluding liars join", score="raw", traffic=liars(2), newcomers=2),
    Attack(name="entropies reported as 0", traffic=reports(lambda nats: 0.0)),
    Attack(name="entropies reported as NaN", traffic=reports(lambda nats: float("nan"))),
    Attack(name="entropies reported with flipped sign", traffic=reports(lambda nats: -nats)),
    Attack(name="entropies reported upside down", traffic=reports(lambda nats: max(0.0, 0.6 - nats))),
    Attack(name="a stream of identical queries", traffic=identical),
    Attack(name="label-sorted domains", traffic=sorted_domains),
    Attack(name="another domain with every query", traffic=restless),
    Attack(name="20 % flipped outcomes", traffic=lambda pool: pool.mixed(240), score="posterior", truth=_flipped),
    Attack(name="one tenant posts false outcomes", traffic=lambda pool: pool.mixed(240), score="posterior", truth=_one_lies),
)
