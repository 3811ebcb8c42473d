"""Queries of made-up domains for the tests of adaptation: agent d is sure in domain d, the others are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from dmoa.core.gate import GateSpec
from dmoa.training.adapt import Lesson
from dmoa.types import AgentReply, Answer, EntropySum, FloatArray, RouteDecision, RouteRequest, StepRecord, SummarizerRecord

AGENTS = ("one", "two", "three")
DIM = 8
CENTRES = np.random.default_rng(7).standard_normal((3, DIM)) / np.sqrt(DIM)
CPU = torch.device("cpu")


def spec(**changes: object) -> GateSpec:
    base = GateSpec(
        preset="paper",
        head="linear",
        hidden=16,
        temperature=0.1,
        agents=AGENTS,
        embedding_dim=DIM,
        rule="top_mass",
        mass=0.9,
        max_agents=2,
        cascade=False,
        score="anchored",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type] # typed by the fields


def place(domain: int, number: int) -> FloatArray:
    noise = np.random.default_rng([domain, number]).standard_normal(DIM) / np.sqrt(DIM)
    return (CENTRES[domain] + 0.2 * noise).astype(np.float32)


def lesson(domain: int, number: int, *, agents: Sequence[str] = AGENTS, nats: float | None = None) -> Lesson:
    """A dense query of a domain: agent `domain` is sure, the others are not."""
    rng = np.random.default_rng([9, domain, number])
    drawn = [0.05 * rng.uniform(0.5, 1.5) if a == domain else rng.uniform(0.8, 1.6) for a in range(len(AGENTS))]
    replies = tuple(
        AgentReply(
            agent=name,
            status="ok",
            text=f"{name} {number}",
            entropy=EntropySum(sum_nats=8 * (value if nats is None else nats), sq_sum=8 * value * value, tokens=8),
        )
        for name, value in zip(agents, drawn, strict=False)
    )
    step = StepRecord(
        step=0,
        replies=replies,
        active=(agents[0],),
        explored=tuple((name, 1.0) for name in agents[1:]),
        summary="",
        summarizer=SummarizerRecord(mode="select", verdict="rule"),
        decision=RouteDecision(
            gate_version="v1",
            agents=tuple(agents),
            probability_A=np.full(len(agents), 1 / len(agents), np.float32),
            ranking=tuple(range(len(agents))),
            k=1,
            mass=0.5,
            hidden_H=np.zeros(0, np.float32),
        ),
        route=RouteRequest(input_X=place(domain, number)),
    )
    answer = Answer(
        trace_id=f"{domain}-{number}",
        text="",
        policy="exploring",
        stop_reason="single",
        steps=(step,),
        degraded=False,
        finish_reason="stop",
    )
    return Lesson(query_id=f"d{domain}/{number}", answer=answer)
