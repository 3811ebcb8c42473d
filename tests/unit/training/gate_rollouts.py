"""Small rollouts for tests of the gate's training: a made-up pool, made-up queries, written as `dmoa rollouts` writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmoa.agents.pool import fingerprint
from dmoa.config import Config, loads
from dmoa.core.features import FEEDBACK_FEATURES
from dmoa.training.rollouts import SCHEMA, SCHEMA_VERSION, Manifest

DIM = 384
AGENTS = ("one", "two", "three")


def pool_yaml(agents: Sequence[str] = AGENTS, gate: str = "{hidden: 16, activation: {max_agents: 2}}") -> str:
    """A pool of scripted agents."""
    lines = "".join(f"  - {{name: {name}, llm: s, profile: Is called {name}.}}\n" for name in agents)
    return f'name: made-up\nllms: {{s: {{model: "scripted:echo", engine: scripted}}}}\nagents:\n{lines}gate: {gate}\n'


def pool(agents: Sequence[str] = AGENTS, gate: str = "{hidden: 16, activation: {max_agents: 2}}") -> Config:
    """The same pool as a configuration."""
    return loads(pool_yaml(agents, gate))


def row(query: str, step: int, agent: str, nats: float, context: np.ndarray, **changes: Any) -> dict[str, Any]:  # type: ignore[type-arg]
    """One row: `nats` is the mean entropy of a reply of 8 tokens."""
    values: dict[str, Any] = {
        "query_id": query,
        "source": "made-up",
        "split": "train",
        "step": step,
        "num_steps": 1,
        "context": context.astype(np.float32),
        "feedback": np.zeros(FEEDBACK_FEATURES, np.float32),
        "agent": agent,
        "probability": 1 / 3,
        "is_selected": agent == "one",
        "is_explored": agent != "one",
        "propensity": 1.0,
        "entropy_sum_nats": 8 * nats,
        "entropy_sq_sum": 8 * nats * nats,
        "entropy_tokens": 8,
        "entropy_kind": "exact",
        "entropy_slack_nats": 0.0,
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "cached_tokens": 0,
        "completion_tokens": 8,
        "latency_ms": 1.0,
        "text": "never read",
        "status": "ok",
        "gate_version": "untrained-0",
        "engine": "scripted",
        "seed": 0,
        "pool_fingerprint": "",
        "schema_version": SCHEMA_VERSION,
    }
    return values | changes


def domain_rows(num_queries: int = 24, *, steps: int = 1, seed: int = 0, agents: Sequence[str] = AGENTS) -> list[dict[str, Any]]:
    """Queries of as many domains as agents: agent d is sure (0.05 nats) in domain d, the others are not (0.8 to 1.6)."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((len(agents), 2 * DIM)) / np.sqrt(DIM)
    rows = []
    for number in range(num_queries):
        for step in range(steps):
            domain = (number + step) % len(agents)
            context = centres[domain] + 0.2 * rng.standard_normal(2 * DIM) / np.sqrt(DIM)
            for place, agent in enumerate(agents):
                nats = 0.05 * rng.uniform(0.5, 1.5) if place == domain else rng.uniform(0.8, 1.6)
                rows.append(row(f"q{number:03d}", step, agent, nats, context, num_steps=steps))
    return rows


def write_rollouts(folder: Path, rows: Sequence[dict[str, Any]], config: Config, *, files: int = 3, **changes: Any) -> Path:
    """Write rows as a folder of rollouts of a pool, dealt out over some files; `changes`: of the manifest."""
    name = fingerprint(config)
    (folder / "rollouts").mkdir(parents=True)
    for number in range(files):
        columns = [
            pa.array(
                [value[field.name] for value in rows[number::files]]
                if field.name != "pool_fingerprint"
                else [name] * len(rows[number::files]),
                field.type,
            )
            for field in SCHEMA
        ]
        pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), folder / "rollouts" / f"part-{number}.parquet")
    manifest = {
        "pool": config.name,
        "pool_fingerprint": name,
        "agents": list(config.agent_names),
        "gate_version": "untrained-0",
        "preset": config.gate.preset,
        "engines": ["s: scripted"],
        "sources": [{"name": "made-up", "weight": 1.0, "queries": len(rows), "origin": {}}],
        "mode": "dense",
        "seed": 0,
        "options": {},
        "config": {},
        "dmoa_version": "0",
        "started_unix_s": 0.0,
    }
    text = json.dumps(manifest | changes)
    Manifest.model_validate_json(text)
    (folder / "rollouts.json").write_text(text)
    return folder
