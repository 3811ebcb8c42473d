"""Learns from the traffic of a swarm: what its feedback holds, as rollouts and outcomes that `dmoa train` reads.

Texts are not there: a reply is the token of its answer (`dmoa/feedback`), which agrees with others as the answer did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmoa.errors import ConfigError
from dmoa.feedback import MARK, Feedback, read_feedback
from dmoa.serving.feedback_buffer import KeptOutcome, read_state
from dmoa.serving.router.admin import RouterAdmin
from dmoa.storage import write_whole, writing
from dmoa.training.outcomes import Outcome, authors
from dmoa.training.rollouts import Counts, Manifest, RolloutFolder, RolloutQuery, SourceInfo, part_of, table_of
from dmoa.types import StepRecord
from dmoa.workflows.console import Common

OUTCOMES = "outcomes.jsonl"
"""Outcomes of the queries of a folder of rollouts, in the folder."""
SOURCE = "traffic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What the feedback of an app holds."""

    records: list[Feedback]
    outcomes: list[Outcome]
    """Of these queries and of others; what was said of a final answer that is known names the agents that gave it."""


def read_traffic(common: Common, app: str, address: str | None, state: str | None) -> Traffic:
    """Read the feedback of a running app, or with `state` what is saved under that `router.state_uri`.

    Raises ConfigError where there is none, or a file is damaged, DmoaError while the app is away.
    """
    if state is not None:
        from dmoa.serving.feedback import FeedbackStore

        store = FeedbackStore(state if "://" in state else Path(state).absolute().as_uri())
        found = store.load()
        if found is None:
            raise ConfigError(f"{store.place}: no feedback lies there; name the router.state_uri of a swarm that keeps some")
        return traffic_of(*found)
    admin = RouterAdmin(app, address=address)
    common.say(f"asking the Ray at {admin.address}")
    records, tenants = admin.feedback()
    return traffic_of(read_feedback(records, f"feedback of {app}"), tenants)


def traffic_of(records: list[Feedback], state: bytes) -> Traffic:
    """Return records and the state of a feedback as traffic. Raises ConfigError for a state that cannot be read."""
    kept = [one for _, _, outcomes in read_state(state) for one in outcomes]
    by_trace = {record.answer.trace_id: record for record in records}
    return Traffic(records=records, outcomes=[one for said in kept for one in _outcomes(said, by_trace.get(said.trace_id))])


def _outcomes(said: KeptOutcome, record: Feedback | None) -> list[Outcome]:
    """Return an outcome in the terms of training: one of the final answer as outcomes of the agents whose first reply gave it."""
    names: Sequence[str | None] = [said.agent]
    if said.agent is None and record is not None:
        names = authors(record.answer) or [None]
    return [Outcome(trace_id=said.trace_id, agent=name, step=said.step, reward=said.reward, source=said.source) for name in names]


def write_outcomes(path: Path, traffic: Traffic) -> None:
    """Write a file that `dmoa train --outcomes` reads. Raises ConfigError where that cannot be done."""
    lines = [one.model_dump_json(exclude_none=True) + "\n" for one in traffic.outcomes]
    with writing(path):
        write_whole(path, "".join(lines))


def rollouts_of_traffic(traffic: Traffic, manifest: Manifest, root: Path) -> Manifest:
    """Write a folder of rollouts, and the outcomes in it, and return its manifest.

    `manifest` is that of a collection with the same pool. Queries that another version of the pool answered are left out.
    Raises ConfigError for a folder that is taken, and where nothing is left.
    """
    folder = RolloutFolder(root)
    if folder.manifest.exists() or folder.parts.exists():
        raise ConfigError(f"--out: {str(root)!r} holds rollouts already; use another folder")
    mine = [record for record in traffic.records if record.fingerprint == manifest.pool_fingerprint]
    if not mine:
        others = len(traffic.records)
        raise ConfigError(
            f"--from-traffic: none of {others} queries was answered by this pool ({manifest.pool_fingerprint[:12]}); give the "
            "pool that is served (--config), or let it answer some first"
        )
    queries = [RolloutQuery(query_id=f"{MARK}{one.answer.trace_id}", source=SOURCE, split="train", text="") for one in mine]
    tables = [
        table_of(query, one.answer, preset=manifest.preset, seed=manifest.seed, fingerprint=manifest.pool_fingerprint)
        for query, one in zip(queries, mine, strict=True)
    ]
    steps = [step for one in mine for step in one.answer.steps]
    sample = {"from_traffic": True, "other_pools": len(traffic.records) - len(mine)}
    manifest = manifest.model_copy(
        update={
            "gate_version": Counter(str(one.answer.gate_version) for one in mine).most_common(1)[0][0],
            "mode": "dense" if all(map(_is_dense, steps)) else "epsilon",
            "sources": [SourceInfo(name=SOURCE, weight=1.0, queries=len(mine), origin={})],
            "options": sample,
            "counts": Counts(queries=len(mine), steps=len(steps), rows=sum(map(len, tables))),
            "ended_unix_s": max(one.created_unix_s for one in mine),
        }
    )
    with writing(root, what="folder"):
        write_whole(folder.queries, "".join(query.model_dump_json() + "\n" for query in queries))
        if traffic.outcomes:
            write_outcomes(root / OUTCOMES, traffic)
        write_whole(folder.parts / "part-000000.parquet", part_of(tables))
        write_whole(folder.manifest, manifest.model_dump_json(indent=2) + "\n")  # last: what has one is whole
    return manifest


def _is_dense(step: StepRecord) -> bool:
    """Tell whether everybody was asked, whatever came of it."""
    assert step.decision is not None
    return len(step.replies) + len(step.decision.masked) >= len(step.decision.agents)
