"""Learning while serving with its guards, in process: 20,000 queries to *scripted agents*, gates learnt and offered all along.

The real router, guards and learner (`training/adapt`), replies by table: nothing here speaks of any model. Deployed is a gate
that sends one of four domains astray. Judged: memory is flat; over no window of 500 queries is the swarm more than 2 points
below the frozen gate on the same queries and the same draws; load stays shared; hostile offers go nowhere; and a planted failure
that no guard can see beforehand (an agent breaks after the gate that prefers it was taken) is taken back within 50 queries, over
seeds, both with `canary` and `on`. Told beside it: how late a failure of every third query is found, and what learning without
any guard comes to under the same hostile offers.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from dmoa.agents.pool import fingerprint
from dmoa.checkpoint import describe_gate, files_of
from dmoa.core.guards import effective_agents
from dmoa.feedback import Feedback, is_held_back
from dmoa.training.adapt import Adapter, episodes_of, lesson_of
from dmoa.training.dataset import Episodes
from dmoa.training.distributed import SingleWorker
from dmoa.training.options import AdaptSettings
from tests.accept.checks import run_check
from tests.adapting import AGENTS, KEYS, LearningSwarm, is_right, pool

QUERIES, WINDOW, EVERY = 20_000, 500, 25
DEPLOYED = (0, 1, 2, 0)
"""Domain 3 is sent to the agent of domain 0."""
POINTS_BAR, EFFECTIVE_BAR, ROLLBACK_BAR, SLOPE_BAR = 0.02, 1.5, 50, 1024.0
SEEDS = 20
PRESEEN = ("drift", "distance", "held_back", "load", "disagreement")


class Learner:
    """Learns from what everybody was asked and is not held back, and offers after every update."""

    def __init__(self, swarm: LearningSwarm) -> None:
        self.swarm, self.update, self.told = swarm, 0, {}
        found = [
            episodes_of(lesson_of(record), swarm.versions.gate.spec) for record in self.fresh(swarm.adaptation._held.records())
        ]
        old = [one for one in found if isinstance(one, Episodes)]
        deployed, _ = swarm.gate(DEPLOYED)
        record = describe_gate(deployed, fingerprint=fingerprint(swarm.config), trained_on={"rows": 1})
        options = AdaptSettings(steps=2, replay_queries=256)
        self.adapter = Adapter(
            deployed, record, Episodes.joined(old) if old else None, options, SingleWorker(torch.device("cpu"))
        )

    def fresh(self, records: list[Feedback]) -> list[Feedback]:
        """Records that may be learned from."""
        share = self.swarm.config.router.guards.held_back
        return [one for one in records if len(one.answer.steps[0].replies) > 1 and not is_held_back(one.answer.trace_id, share)]

    def offer(self, records: list[Feedback]) -> None:
        """Learn from records once, and offer what came of it."""
        if self.adapter.learn(self.fresh(records)).loss is None:
            return
        self.update = max(self.update, self.swarm.adaptation.status()["ledger"]) + 1
        self.told = self.swarm.offer(files_of(*self.adapter.candidate()), self.update, used=self.adapter.used)


def stream(root: Path, queries: int, *, guarded: bool) -> dict[str, Any]:
    """Serve a stream and learn from it; return what came of it."""
    skip = () if guarded else (*PRESEEN, "canary")
    # The weights of this gate are few and small: a step of the learner is a large part of them.
    swarm = LearningSwarm(root, pool("on", skip=skip, cooldown_s=30.0, max_distance=3.0), heard_every=5)
    swarm.took(swarm.versions.install(swarm.files(DEPLOYED), "deployed", []))
    swarm.adaptation.operated()
    learner, process = Learner(swarm), psutil.Process()
    hostile = {at: kind for kind, at in enumerate(range(queries // 8, queries, queries // 8))}
    served, frozen, first, memory, records, refused = [], [], [], [], [], []
    for number in range(queries):
        domain = int(swarm.rng.integers(len(AGENTS)))
        answer = swarm.ask(domain, is_dense=bool(swarm.rng.uniform() < 0.3))
        served.append(is_right(answer))
        frozen.append(bool(swarm.right_A[DEPLOYED[domain]]))
        first.append(AGENTS.index(answer.steps[0].active[0]))
        records.append(Feedback(answer=answer, tenant=KEYS[0], fingerprint=fingerprint(swarm.config), created_unix_s=swarm.now))
        if number % EVERY == EVERY - 1:
            learner.offer(records)
            records = []
        if number in hostile:
            refused.append(attack(swarm, learner, hostile[number]))
        if number % 100 == 0:
            memory.append((number, process.memory_info().rss))
    return summary(swarm, served, frozen, first, memory) | {"hostile_offers": refused, "updates": learner.update}


def attack(swarm: LearningSwarm, learner: Learner, kind: int) -> dict[str, Any]:
    """Offer a gate that does harm; return what the router said."""
    plans = [(0, 0, 0, 0), (1, 0, 3, 2), (3, 3, 3, 3), (1, 2, 3, 0)]
    swarm.now += 31.0  # not while a rollback cools down: the guards are asked
    learner.update = max(learner.update, swarm.adaptation.status()["ledger"]) + 1
    told = swarm.offer(swarm.files(plans[kind % len(plans)], seed=kind), learner.update)
    return {
        "routes": list(plans[kind % len(plans)]),
        "state": told["state"],
        "by": [v["guard"] for v in told["verdicts"] if not v["passed"]],
    }


def summary(
    swarm: LearningSwarm, served: list[bool], frozen: list[bool], first: list[int], memory: list[tuple[int, int]]
) -> dict[str, Any]:
    """Return the figures of a stream."""
    ahead = np.convolve(np.subtract(served, frozen, dtype=float), np.ones(WINDOW) / WINDOW, "valid")
    one_hot = np.eye(len(AGENTS))[first]
    windows = [effective_agents(one_hot[start : start + WINDOW]) for start in range(0, len(first) - WINDOW + 1, WINDOW)]
    late = [(at, size) for at, size in memory if at >= 0.2 * len(served)]
    slope = float(np.polyfit([at for at, _ in late], [size for _, size in late], 1)[0])
    status = swarm.adaptation.status()
    return {
        "queries": len(served),
        "accuracy": round(float(np.mean(served)), 4),
        "accuracy_frozen": round(float(np.mean(frozen)), 4),
        "accuracy_last_quarter": round(float(np.mean(served[-len(served) // 4 :])), 4),
        "worst_window_against_frozen": round(float(ahead.min()), 4),
        "effective_agents_least": round(min(windows), 3),
        "memory_slope_bytes_per_query": round(slope, 1),
        "memory_mib_first_and_last": [round(memory[place][1] / 2**20, 1) for place in (0, -1)],
        "ledger": status["ledger"],
        "ends_of_offers": status["counts"],
        "guards_and_signals": status["failures"],
    }


def rollback_steps(root: Path, mode: str, seed: int, plan: tuple[int, ...]) -> int | None:
    """Return after how many queries a gate is taken back whose favourite breaks once it was taken; None: never of 1000."""
    swarm = LearningSwarm(root, pool(mode, skip=PRESEEN, canary_queries=1000), seed=seed)
    for _ in range(60):
        swarm.ask(is_dense=True)
    told = swarm.offer(swarm.files(plan, seed=seed + 1), 1)
    assert told["accepted"], told
    swarm.broken = ("code",)
    for number in range(1, 1001):
        swarm.ask(None if plan == (3, 3, 3, 3) else int(swarm.rng.integers(3)))
        if swarm.adaptation.events() and swarm.adaptation.events()[-1]["action"] == "rolled back":
            return number
    return None


def rollbacks(folder: Path, seeds: int) -> dict[str, Any]:
    """Return how late planted failures are found."""
    found = {}
    for mode in ("canary", "on"):
        for name, plan in (("every query", (3, 3, 3, 3)), ("one domain of three", (3, 1, 2, 3))):
            steps = [rollback_steps(folder / f"{mode}-{len(name)}-{seed}", mode, seed, plan) for seed in range(seeds)]
            known = [one for one in steps if one is not None]
            found[f"{mode}, fails {name}"] = {
                "never": steps.count(None),
                "median": statistics.median(known) if known else None,
                "latest": max(known) if known else None,
            }
    return found


FLAGS: dict[str, dict[str, Any]] = {
    "--queries": {"type": int, "default": QUERIES},
    "--seeds": {"type": int, "default": SEEDS},
}


def check(options: Namespace) -> dict[str, Any]:
    """Measure and judge."""
    began = time.monotonic()
    shared = Path("/dev/shm")  # in memory: every decision is written and synced
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        late = rollbacks(Path(name), options.seeds)
        guarded = stream(Path(name) / "guarded", options.queries, guarded=True)
        unguarded = stream(Path(name) / "unguarded", options.queries // 4, guarded=False)
    total = [late[f"{mode}, fails every query"] for mode in ("canary", "on")]
    passed = {
        "memory": guarded["memory_slope_bytes_per_query"] <= SLOPE_BAR,
        "never_below_frozen": guarded["worst_window_against_frozen"] >= -POINTS_BAR,
        "effective_agents": guarded["effective_agents_least"] >= EFFECTIVE_BAR,
        "hostile_offers_stopped": all(one["state"] == "refused" for one in guarded["hostile_offers"]),
        "rollback": all(one["never"] == 0 and one["latest"] <= ROLLBACK_BAR for one in total),
    }
    return {
        "agents": "scripted, right and sure at home: no figure speaks of a model",
        "bars": {"points": POINTS_BAR, "effective": EFFECTIVE_BAR, "rollback": ROLLBACK_BAR, "bytes_per_query": SLOPE_BAR},
        "guarded": guarded,
        "unguarded": unguarded,
        "rollback_steps": late,
        "seconds": round(time.monotonic() - began, 1),
        "passed": passed,
    }


if __name__ == "__main__":
    raise SystemExit(run_check(check, FLAGS))
