"""P17: the memory of one more role in shared placement, as a share of the engine it rides on.

A child process hosts the embedded model for one agent, another for nine; each answers once per agent, then its
proportional set size (PSS) is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from dmoa.bench.measure import BenchResult, spread
from dmoa.errors import DmoaError

BAR = 0.02
FEW, MANY = 1, 9


def run(rounds: int) -> list[BenchResult]:
    """Measure P17; the arms take turns, a round is one process of each."""
    shares, sizes = [], []
    for _ in range(rounds):
        few, many = _pss_of_host(FEW), _pss_of_host(MANY)
        shares.append((many - few) / (MANY - FEW) / few)
        sizes.append(few / 2**20)
    share, size = spread(shares), spread(sizes)
    return [
        BenchResult(
            id="P17", value=share.value, unit="share", low=share.low, high=share.high, rounds=rounds, bar=f"<= {BAR}",
            passed=share.value <= BAR, engine="transformers/float32",
            note=f"PSS of one more role over an engine of {size.value:.0f} MiB; {MANY} agents against {FEW}, one process each",
        )
    ]  # fmt: skip


def _pss_of_host(num_agents: int) -> float:
    command = [sys.executable, "-m", "dmoa.bench.memory_bench", str(num_agents)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    if done.returncode != 0:
        raise DmoaError(f"bench: the host of {num_agents} agents failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["pss_bytes"])


def pss_bytes() -> int:
    """Return the proportional set size of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise DmoaError("bench: /proc/self/smaps_rollup has no Pss line; P17 needs Linux 4.14 or newer")


def main() -> None:
    """Run the child's side: host so many agents, ask each once, print the PSS."""
    import asyncio
    import gc

    from dmoa.agents.pool import build_local
    from dmoa.agents.prompts import agent_messages
    from dmoa.config import Config
    from dmoa.types import AgentCall, Query, Sampling

    names = [f"role-{i}" for i in range(int(sys.argv[1]))]
    config = Config.model_validate(
        {
            "name": "memory",
            "llms": {"m": {"model": "embedded:smollm2-135m", "max_num_seqs": 4}},
            "agents": [{"name": name, "llm": "m", "profile": f"Takes the part of {name} in every discussion."} for name in names],
        }
    )

    async def work() -> int:
        agents, engines = build_local(config)
        query = Query(trace_id="memory", text="What is 12 + 7?")
        for agent in config.agents:
            messages = agent_messages(query, (), profile=agent.profile)
            await agents.call(
                AgentCall(trace_id="m", step=0, agent=agent.name, messages=messages, sampling=Sampling(max_tokens=4))
            )
        gc.collect()
        found = pss_bytes()
        for engine in engines:
            await engine.close()
        return found

    sys.stdout.write(json.dumps({"pss_bytes": asyncio.run(work())}) + "\n")


if __name__ == "__main__":
    main()
