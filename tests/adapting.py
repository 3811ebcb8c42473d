"""A swarm of scripted agents that learns while it serves, in process: the real router and guards, and replies by table.

Domain c is that of agent c, which is right and sure there. Gates route by domain: each has one agent per domain. Used by the
tests of adaptation and by the acceptance over 20,000 queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmoa.agents.pool import fingerprint
from dmoa.checkpoint import Checkpoint, describe_gate, files_of
from dmoa.config import Config
from dmoa.core.gate import Gate
from dmoa.feedback import Feedback, tenant_of
from dmoa.routing import LocalRouter, build_gate
from dmoa.serving.router.adaptation import Adaptation
from dmoa.serving.router.state import RouterState
from dmoa.serving.router.versions import Change, GateVersions
from dmoa.types import (
    AgentReply,
    Answer,
    EntropySum,
    FloatArray,
    RouteDecision,
    RouteRequest,
    StepRecord,
    SummarizerRecord,
    TokenUsage,
)

AGENTS = ("sums", "words", "dates", "code")
D = 384
KEYS = (tenant_of("one"), tenant_of("two"))


def pool(adaptation: str = "canary", *, limits: dict[str, Any] | None = None, **guards: Any) -> Config:
    """The configuration of the swarm: one active agent a query, a gate that reads the input alone."""
    return Config.model_validate(
        {
            "name": "pool",
            "llms": {"s": {"model": "scripted:x", "engine": "scripted"}},
            "agents": [{"name": name, "llm": "s", "profile": f"You are {name}."} for name in AGENTS],
            "gate": {"preset": "paper", "core": "linear", "activation": {"rule": "fixed", "max_agents": 1}},
            "router": {"adaptation": adaptation, "guards": {"cooldown_s": 60.0} | guards},
            "limits": limits or {},
        }
    )


@dataclass(slots=True)
class LearningSwarm:
    """The router's side of a running swarm, query by query; the clock goes on one second a query."""

    root: Path
    config: Config = field(default_factory=pool)
    seed: int = 0
    broken: tuple[str, ...] = ()
    """Agents whose calls fail."""
    wordy: tuple[str, ...] = ()
    """Agents that write ten times as much."""
    liars: tuple[str, ...] = ()
    """Agents that are wrong and very sure."""
    redundant: bool = False
    """Whether everybody is right at most questions, at home or not."""
    silent: tuple[str, ...] = ()
    """Agents whose queries never end: no record comes of them."""
    policy: str = "dmoa"
    heard_every: int = 1
    """Queries after which the router hears of them, together."""
    now: float = 1000.0
    count: int = 0
    changes: list[str] = field(default_factory=list)
    """Versions that were made current, in order."""
    inputs: list[FloatArray] = field(default_factory=list)
    unheard: list[Feedback] = field(default_factory=list)
    right_A: np.ndarray = field(init=False)
    """Of the last query, who is right, asked or not [A]."""
    nats_A: np.ndarray = field(init=False)
    rng: np.random.Generator = field(init=False)
    centre_CD: np.ndarray = field(init=False)
    versions: GateVersions = field(init=False)
    adaptation: Adaptation = field(init=False)
    router: LocalRouter = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        centre_CD = np.random.default_rng(7).normal(size=(len(AGENTS), D))
        self.centre_CD = centre_CD / np.linalg.norm(centre_CD, axis=1, keepdims=True)
        self.config = self.config.model_copy(
            update={"router": self.config.router.model_copy(update={"state_uri": self.root.as_uri()})}
        )
        self.start()
        if not self.versions.history() or self.versions.history()[-1]["action"] == "configured":
            self.took(self.versions.install(self.files(range(len(AGENTS))), "deployed", []))
            self.adaptation.operated()

    def start(self) -> None:
        """Begin as a router does, from its state alone: what a restart comes to."""
        state = RouterState(self.root.as_uri())
        self.versions = GateVersions(state, self.config, None)
        self.adaptation = Adaptation(state, self.config, self.versions, lambda: self.now)
        self.router = LocalRouter(reload=lambda version: found[0] if (found := state.load_version(version)) else None)
        self.router.install(self.versions.version, self.versions.gate)
        self.router.share(*(self.adaptation.split or (None,)))

    def took(self, change: Change | None) -> None:
        """Serve what was decided, as the actor does."""
        if change is not None:
            self.changes.append(change.version)
            self.router.install(change.version, change.gate)
        self.router.share(*(self.adaptation.split or (None,)))

    def gate(self, agent_of: Sequence[int], *, sharpness: float = 1.0, seed: int = 0) -> tuple[Gate, Checkpoint]:
        """A gate that sends domain c to agent `agent_of[c]`; `seed` makes others with the same routing."""
        gate = build_gate(self.config.gate, AGENTS)
        weight_AD = np.zeros((len(AGENTS), D))
        for domain, agent in enumerate(agent_of):
            weight_AD[agent] += sharpness * self.centre_CD[domain]
        weight_AD += 1e-4 * np.random.default_rng(seed).normal(size=weight_AD.shape)
        with torch.no_grad():
            gate.head_weight.copy_(torch.from_numpy(weight_AD.astype(np.float32)))
            gate.head_bias.zero_()
        return gate, describe_gate(gate, fingerprint=fingerprint(self.config), trained_on={"rows": 1})

    def files(self, agent_of: Sequence[int], **options: Any) -> dict[str, bytes]:
        """The files of such a gate's checkpoint."""
        return files_of(*self.gate(agent_of, **options))

    def offer(self, files: dict[str, bytes], update: int, **evidence: Any) -> dict[str, Any]:
        """Offer a gate that began with the current one."""
        said = {"base_version": self.versions.version, "update": update, "source": "test", "used": 8} | evidence
        told, change = self.adaptation.offer(files, said, self.inputs[-256:])
        self.took(change)
        return told

    def ask(self, domain: int | None = None, *, is_dense: bool = False) -> Answer:
        """Answer one query, and hand it to the router; dense ones are answered by everybody beside the active agent."""
        domain = int(self.rng.integers(len(AGENTS))) if domain is None else domain
        row_D = 0.8 * self.centre_CD[domain] + 0.6 * self.rng.normal(size=D) / np.sqrt(D)
        self.count, self.now = self.count + 1, self.now + 1.0
        request = RouteRequest(input_X=np.asarray(row_D, np.float32), max_agents=1, trace_id=f"{self.seed}-{self.count}")
        self._draw(domain)
        version = self.router._version_for(request)
        (decided,) = self.router.decide([request], version)
        self.inputs = [*self.inputs[-255:], request.input_X]
        answer = self._answer(request, decided, is_dense=is_dense)
        record = Feedback(
            answer=answer,
            tenant=KEYS[self.count % 2],
            fingerprint=fingerprint(self.config),
            created_unix_s=self.now,
        )
        self.unheard += [record] if answer.steps[0].active[0] not in self.silent else []
        if self.count % self.heard_every == 0:
            self.took(self.adaptation.observe(self.unheard, self.router.decided.begun))
            self.unheard = []
        return answer

    def _draw(self, domain: int) -> None:
        """Draw what every agent would say to the next query."""
        is_home_A = np.arange(len(AGENTS)) == domain
        share_A = np.where(is_home_A, 0.9, 0.8 if self.redundant else 0.15)
        self.right_A = self.rng.uniform(size=len(AGENTS)) < share_A
        self.nats_A = np.exp(np.where(is_home_A, -2.5, -0.5)) * self.rng.gamma(16.0, 1 / 16, size=len(AGENTS))

    def _answer(self, request: RouteRequest, decided: RouteDecision, *, is_dense: bool) -> Answer:
        active = decided.agents[decided.ranking[0]]
        others = [name for name in AGENTS if name != active] if is_dense else []
        replies = tuple(self._reply(name) for name in (active, *others))
        step = StepRecord(
            step=0,
            replies=replies,
            active=(active,),
            explored=tuple((name, 1.0) for name in others),
            summary="",
            summarizer=SummarizerRecord(mode="select", verdict="rule"),
            decision=replace(decided, hidden_H=np.zeros(0, np.float32)),
            route=request,
        )
        return Answer(
            trace_id=request.trace_id,
            text=replies[0].text,
            policy=self.policy,
            stop_reason="single",
            steps=(step,),
            degraded=replies[0].status != "ok",
            finish_reason="stop",
            gate_version=decided.gate_version,
            wall_ms=float(self.rng.gamma(20.0, 5.0)),
        )

    def _reply(self, name: str) -> AgentReply:
        if name in self.broken:
            return AgentReply(agent=name, status="failed", error="out of memory")
        is_right, nats = bool(self.right_A[AGENTS.index(name)]), float(self.nats_A[AGENTS.index(name)])
        if name in self.liars:
            is_right, nats = False, 0.01
        tokens = 40 if name in self.wordy else 4
        return AgentReply(
            agent=name,
            status="ok",
            text="right" if is_right else f"wrong{'abcdef'[self.rng.integers(6)]}",
            finish_reason="stop",
            entropy=EntropySum(sum_nats=nats * tokens, sq_sum=1.2 * nats**2 * tokens, tokens=tokens),
            usage=TokenUsage(prompt_tokens=0, completion_tokens=tokens),
        )


def is_right(answer: Answer) -> bool:
    """Whether the answer is right: known here alone, and to no guard."""
    return answer.text == "right" and not answer.degraded
