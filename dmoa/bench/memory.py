"""P17: the memory of one more role in shared placement, as a share of the engine it rides on.

A child process hosts the embedded model for one agent, another for nine; each answers once per agent, then the
proportional set size (PSS) of both, with the processes that an engine starts, is read at the same moment, while they share
the same libraries with the same others. Where vLLM is installed it is measured, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import psutil

from dmoa.agents.pool import build_local
from dmoa.agents.prompts import agent_messages
from dmoa.bench.child import Child, to_parent
from dmoa.bench.harness import LABELS, BenchResult, engines_here, on_engine, record, spread
from dmoa.config import Config
from dmoa.errors import DmoaError
from dmoa.types import AgentCall, Query, Sampling

BAR = 0.02
FEW, MANY = 1, 9
STOP_TIMEOUT_S = 20.0


def run(rounds: int = 3) -> list[BenchResult]:
    """Measure P17; a round is one process of each size, side by side, for each engine."""
    return [_measure(engine, rounds) for engine in engines_here()]


def _measure(engine: str, rounds: int) -> BenchResult:
    shares, sizes = [], []
    for _ in range(rounds):
        few, many = _pss_of_hosts(engine, (FEW, MANY))
        shares.append((many - few) / (MANY - FEW) / few)
        sizes.append(few / 2**20)
    what = f"PSS of one more role over an engine of {spread(sizes).value:.0f} MiB; {MANY} agents against {FEW}, one host each"
    return record("P17", spread(shares), "share", engine=LABELS[engine], note=what, at_most=BAR)


def _pss_of_hosts(engine: str, sizes: Sequence[int]) -> list[float]:
    """Return the PSS in bytes of hosts with so many agents, all up and warm at the same time."""
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    with contextlib.ExitStack() as stack:
        # vLLM's processes outlive a parent that is killed: a host is given the time to close its engine.
        hosts = [
            stack.enter_context(Child("dmoa.bench.memory", engine, str(size), env=env, stop_timeout_s=STOP_TIMEOUT_S))
            for size in sizes
        ]
        for host in hosts:
            host.hear()
        found = []
        for host in hosts:
            host.say("pss")
            found.append(float(host.hear()))
        return found


def pss_bytes() -> int:
    """Return the proportional set size of this process and of those that it started."""
    own = psutil.Process()
    return sum(_pss_of(process.pid) for process in (own, *own.children(recursive=True)))


def _pss_of(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise DmoaError("bench: /proc/PID/smaps_rollup has no Pss line; P17 needs Linux 4.14 or newer")


def main() -> None:
    """Run the child's side: host so many agents, ask each once, then print the PSS for every line that comes in."""
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), to_parent()))


async def _serve(engine: str, num_agents: int, answers: TextIO) -> None:
    names = [f"role-{i}" for i in range(num_agents)]
    config = Config.model_validate(
        {
            "name": "memory",
            "llms": {"m": {"model": "embedded:smollm2-135m", "max_num_seqs": 4}},
            "agents": [{"name": name, "llm": "m", "profile": f"Takes the part of {name} in every discussion."} for name in names],
        }
    )
    agents, engines = build_local(on_engine(config, engine, max_model_len=1024, cpu_kv_cache_gib=1))
    query = Query(trace_id="memory", text="What is 12 + 7?")
    for agent in config.agents:
        messages = agent_messages(query, (), profile=agent.profile)
        await agents.call(AgentCall(trace_id="m", step=0, agent=agent.name, messages=messages, sampling=Sampling(max_tokens=4)))
    gc.collect()
    print(json.dumps("ready"), file=answers)
    for _ in sys.stdin:
        print(pss_bytes(), file=answers)
    for started in engines:
        await started.close()


if __name__ == "__main__":
    main()
