"""Several gates in one swarm: `dmoa:NAME` routes with the checkpoint of that name, `dmoa` with the pool's own."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from dmoa import checkpoint
from dmoa.agents.pool import build_pool_gate, fingerprint
from dmoa.config import Config, load
from dmoa.core.gate import init_gate
from dmoa.protocols import final_answer
from dmoa.types import Query
from dmoa.workflows.backends import OpenCollectingPool, OpenPool, build_local_swarm, carried


def other_gate(config: Config, folder: Path) -> str:
    """Save another gate for the pool, of the `paper` preset, and return its version."""
    spec = build_pool_gate(config)[0].spec
    gate = init_gate(replace(spec, preset="paper", cascade=False), seed=9)
    record = checkpoint.describe_gate(gate, fingerprint=fingerprint(config), trained_on={"rollouts": "none"})
    checkpoint.save(folder, gate, record)
    return record.version


async def test_a_query_names_its_gate(pool: Path, tmp_path: Path) -> None:
    config = load(pool)
    version = other_gate(config, tmp_path / "paper")
    backend = build_local_swarm(config, lambda text: None, gates={"paper": tmp_path / "paper"})
    try:
        own = await final_answer(backend, Query(trace_id="a", text="What is 2 + 2?"), "dmoa")
        named = await final_answer(backend, Query(trace_id="b", text="What is 2 + 2?"), "dmoa", "paper")
    finally:
        await backend.close()
    assert own.gate_version == build_pool_gate(config)[1].version
    assert (named.gate_version, named.gate_trained) == (version, True)


async def test_a_worker_needs_no_folder_of_a_gate(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be on another machine than the command, which has read the checkpoints."""
    (tmp_path / "worker").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "worker"))
    checkpoint.save(tmp_path / "own", *build_pool_gate(load(pool, ["gate.seed=5"])))
    config = load(pool, [f"gate.checkpoint={tmp_path / 'own'}"])
    own, other = build_pool_gate(config)[1].version, other_gate(config, tmp_path / "paper")
    text, gates = config.model_dump_json(), {"paper": tmp_path / "paper"}
    packed = carried(config, gates)
    opened = OpenPool(config_json=text, gates=gates, carried=packed)
    collecting = OpenCollectingPool(pool=OpenPool(config_json=text, carried=packed), epsilon=None)
    for name in ("own", "paper"):
        shutil.rmtree(tmp_path / name)
    query = Query(trace_id="a", text="What is 2 + 2?")
    for one, gate, version in ((opened, None, own), (opened, "paper", other), (collecting, None, own)):
        swarm = pickle.loads(pickle.dumps(one))()
        assert (await final_answer(swarm, query, "dmoa", gate)).gate_version == version
        await swarm.close()
    assert list((tmp_path / "worker").iterdir()) == []
