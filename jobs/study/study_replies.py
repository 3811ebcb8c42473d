"""What every agent of several pools replies to rows of the built-in suites, made once, in this process, and kept as rollouts.

Pools are cut out of one table of replies: a reply to the first step depends on the agent and the query alone. Calls are kept in a
cache, so that an agent that joins later costs its own calls only. Shape letters: R rows, A agents.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmoa.agents.pool import fingerprint, load_pool
from dmoa.config import Config
from dmoa.evaluation.records import Reply, Row
from dmoa.evaluation.registry import SKILLS, SUITES
from dmoa.evaluation.suites.suite import SuiteSplit
from dmoa.protocols import final_answer
from dmoa.storage import write_whole
from dmoa.training.collect import ExploringSwarm, RolloutAsking, query_of_rollout
from dmoa.training.options import RolloutOptions
from dmoa.training.rollouts import RolloutFolder, RolloutQuery, part_of, table_of
from dmoa.types import Limits
from dmoa.workflows.backends import build_local_swarm
from dmoa.workflows.collect import new_manifest

IN_FLIGHT = 12
"""Queries under way at once: together enough calls for a full batch of the engine."""
Values = np.ndarray[Any, Any]


def everyone(names: Sequence[str]) -> Config:
    """Return the pool of all agents of some packaged pools, each once."""
    pools = [load_pool(name).changed("limits", max_steps=1) for name in names]
    agents = {agent.name: agent for pool in pools for agent in pool.agents}
    llms = {name: llm for pool in pools for name, llm in pool.llms.items()}
    return pools[0].model_copy(update={"name": "everyone", "agents": tuple(agents.values()), "llms": llms})


def rows_of(split: SuiteSplit, per_suite: int, seed: int) -> list[Row]:
    """Return rows of the suites that agents were taught, at their difficulty, suites in turn."""
    by_suite = [list(suite.generate(split, per_suite, seed, 1)) for suite in SKILLS]
    return [row for together in zip(*by_suite, strict=True) for row in together]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """Rows and what every agent replied to them."""

    rows: Sequence[Row]
    table: pa.Table
    """Rollouts, a row a reply."""

    def values(self, agents: Sequence[str]) -> Values:
        """Return the score of every reply [R, A], 0 where there is none; opens the labels."""
        place = {row.task.row_id: number for number, row in enumerate(self.rows)}
        column = {name: number for number, name in enumerate(agents)}
        found = np.zeros((len(self.rows), len(agents)))
        for line in self.table.select(("query_id", "agent", "text", "status")).to_pylist():
            if line["agent"] in column and line["status"] == "ok" and line["query_id"] in place:
                row = self.rows[place[line["query_id"]]]
                assert row.label is not None
                score = SUITES[row.task.benchmark].score(row.label, Reply(text=line["text"]))
                found[place[line["query_id"]], column[line["agent"]]] = score.value
        return found

    def only(self, numbers: Sequence[int]) -> Replies:
        """Return some of the rows."""
        rows = [self.rows[number] for number in numbers]
        ids = pa.array([row.task.row_id for row in rows])
        return replace(self, rows=rows, table=self.table.filter(pc.is_in(self.table["query_id"], ids)))


def replies(rows: Sequence[Row], config: Config, out: Path, name: str) -> Replies:
    """Ask every agent of a pool each row once, or take what is there; the time that the calls took lies beside the table."""
    path = out / f"{name}.parquet"
    if not path.exists():
        started = time.time()
        tables = asyncio.run(_asked(rows, config, out / "calls"))
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, part_of(tables))
        took = {"rows": len(rows), "agents": len(config.agents), "seconds": round(time.time() - started, 1)}
        write_whole(out / f"{name}.json", (json.dumps(took) + "\n").encode())
    return Replies(rows=rows, table=pq.read_table(path))


async def _asked(rows: Sequence[Row], config: Config, cache: Path) -> list[pa.Table]:
    swarm = ExploringSwarm(build_local_swarm(config, print, cache), None)
    asking = RolloutAsking(
        seed=0, round=0, limits=Limits(max_steps=1), preset=config.gate.preset, fingerprint=fingerprint(config)
    )
    room, done = asyncio.Semaphore(IN_FLIGHT), 0

    async def ask(row: Row) -> pa.Table:
        nonlocal done
        asked = RolloutQuery(query_id=row.task.row_id, source=row.task.benchmark, split=_split(row), text=row.task.text)
        async with room:
            answer = await final_answer(swarm, query_of_rollout(asked, asking), "dmoa")
        done += 1
        if done % 24 == 0:
            print(f"{done} of {len(rows)} rows", flush=True)
        return table_of(asked, answer, preset=asking.preset, seed=0, fingerprint=asking.fingerprint)

    try:
        return list(await asyncio.gather(*map(ask, rows)))
    finally:
        await swarm.close()


def _split(row: Row) -> str:
    """Return the split that a row's name says: `benchmark/split/hash`."""
    return row.task.row_id.split("/")[1]


def write_rollouts(found: Replies, config: Config, folder: Path) -> Path:
    """Write the replies of a pool's agents as dense rollouts that a gate is trained on; a folder that is there stays."""
    target = RolloutFolder(folder)
    if not target.manifest.exists():
        target.parts.mkdir(parents=True, exist_ok=True)
        table = found.table.filter(pc.is_in(found.table["agent"], pa.array(config.agent_names)))
        place = table.schema.get_field_index("pool_fingerprint")
        named = pa.array([fingerprint(config)] * table.num_rows, pa.string())
        write_whole(target.parts / "part-000000.parquet", part_of([table.set_column(place, table.schema.field(place), named)]))
        options = RolloutOptions.parse({"out": folder, "benchmarks": ",".join(suite.name for suite in SKILLS)})
        write_whole(target.manifest, new_manifest(options, config, "untrained", "jobs/study").model_dump_json(indent=1).encode())
    return folder
