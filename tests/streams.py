"""A pool whose truth is known, in process: domains, agents that are right and sure by domain, and their traffic as feedback.

Entropies and answers are drawn anew for every query from fixed tables [C, A]; nothing is served. Shape letters: C domains,
A agents, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dmoa.core.scores import Array
from dmoa.feedback import Feedback, tenant_of
from dmoa.testing import decision
from dmoa.types import AgentReply, Answer, EntropySum, FloatArray, RouteRequest, StepRecord, SummarizerRecord, TokenUsage

D = 48
KEYS = tuple(tenant_of(f"key {number}") for number in range(4))
FINGERPRINT = "pool"
TOKENS = 12
Lie = Callable[["Asked", int], None]


@dataclass(slots=True)
class Asked:
    """One query with everybody's reply, as it might be before anybody tampers with it."""

    domain: int
    input_D: FloatArray
    nats_A: Array
    """Mean entropy of each reply."""
    right_A: np.ndarray
    """[A] bool."""
    answer_A: list[str]
    """Token of each answer: "right" or one of the wrong ones."""
    tenant: str = KEYS[0]


@dataclass(slots=True)
class ScriptedPool:
    """Domain c is that of agent c: it is right there nine times in ten and surest there; others seldom, and less sure."""

    seed: int = 0
    domains: int = 5
    agents: tuple[str, ...] = ("arith", "words", "dates", "code", "law")
    home: float = 0.9
    """Share of right answers of an agent at home; elsewhere 0.15."""
    rng: np.random.Generator = field(init=False)
    centre_CD: Array = field(init=False)
    log_nats_CA: Array = field(init=False)
    right_CA: Array = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        centre_CD = self.rng.normal(size=(self.domains, D))
        self.centre_CD = centre_CD / np.linalg.norm(centre_CD, axis=1, keepdims=True)
        is_home_CA = np.arange(self.domains)[:, None] == np.arange(len(self.agents))
        self.log_nats_CA = np.where(is_home_CA, -2.5, -0.7) + 0.3 * self.rng.normal(size=is_home_CA.shape)
        self.right_CA = np.where(is_home_CA, self.home, 0.15)

    def ask(self, domain: int, tenant: str = KEYS[0]) -> Asked:
        """A new query of a domain, answered by everybody."""
        row_D = 0.75 * self.centre_CD[domain] + 0.66 * self.rng.normal(size=D) / np.sqrt(D)
        right_A = self.rng.uniform(size=len(self.agents)) < self.right_CA[domain]
        # Whoever is wrong is a little less sure than he would be.
        doubt_A = self.log_nats_CA[domain] + 0.4 * self.rng.normal(size=len(self.agents)) + 0.5 * ~right_A
        wrong = [f"wrong{number}" for number in self.rng.integers(6, size=len(self.agents))]
        return Asked(
            domain=domain,
            input_D=np.asarray(row_D / np.linalg.norm(row_D), np.float32),
            nats_A=np.exp(doubt_A),
            right_A=right_A,
            answer_A=["right" if is_right else said for is_right, said in zip(right_A, wrong, strict=True)],
            tenant=tenant,
        )

    def mixed(self, count: int, domains: Sequence[int] | None = None) -> list[Asked]:
        """Queries of domains drawn evenly, all if none are named, of two keys."""
        among = list(range(self.domains)) if domains is None else list(domains)
        return [self.ask(int(self.rng.choice(among)), KEYS[number % 2]) for number in range(count)]

    def record(self, asked: Asked, among: Sequence[int] | None = None) -> Feedback:
        """The feedback of a query that all agents were asked, or some that were all there then; the first one is active."""
        self.count += 1
        places = list(range(len(self.agents))) if among is None else list(among)
        names = [self.agents[place] for place in places]
        replies = tuple(
            AgentReply(
                agent=self.agents[place],
                status="ok",
                text=asked.answer_A[place],
                finish_reason="stop",
                # The spread of the tokens' entropies is half of their mean.
                entropy=EntropySum(
                    sum_nats=float(TOKENS * asked.nats_A[place]),
                    sq_sum=float(TOKENS * 1.25 * asked.nats_A[place] ** 2),
                    tokens=TOKENS,
                ),
                usage=TokenUsage(prompt_tokens=40, completion_tokens=TOKENS),
                latency_ms=5.0,
                engine="scripted",
            )
            for place in places
        )
        step = StepRecord(
            step=0,
            replies=replies,
            active=tuple(names[:1]),
            explored=tuple((name, 1.0) for name in names[1:]),
            summary="",
            summarizer=SummarizerRecord(mode="select", verdict="rule"),
            mass=1.0,
            decision=decision({name: 1 / len(names) for name in names}, 1),
            route=RouteRequest(input_X=asked.input_D, max_agents=len(self.agents)),
        )
        answer = Answer(
            trace_id=f"trace{self.count}",
            text=replies[0].text,
            policy="exploring",
            stop_reason="single",
            steps=(step,),
            degraded=False,
            finish_reason="stop",
            gate_version="v1",
            wall_ms=5.0,
        )
        return Feedback(answer=answer, tenant=asked.tenant, fingerprint=FINGERPRINT, created_unix_s=float(self.count))

    def records(self, asked: Sequence[Asked]) -> list[Feedback]:
        """The feedback of queries that everybody was asked."""
        return [self.record(one) for one in asked]
