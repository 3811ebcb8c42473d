"""P17: the memory of one more role in shared placement, as a share of the engine it rides on.

A child process hosts the embedded model for one agent, another for nine; each answers once per agent, then the
proportional set size (PSS) of both is read at the same moment, while they share the same libraries with the same others.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dmoa.bench.measure import BenchResult, spread
from dmoa.errors import DmoaError

BAR = 0.02
FEW, MANY = 1, 9


def run(rounds: int) -> list[BenchResult]:
    """Measure P17; a round is one process of each size, side by side."""
    shares, sizes = [], []
    for _ in range(rounds):
        few, many = _pss_of_hosts((FEW, MANY))
        shares.append((many - few) / (MANY - FEW) / few)
        sizes.append(few / 2**20)
    share, size = spread(shares), spread(sizes)
    return [
        BenchResult(
            id="P17",
            value=share.value,
            unit="share",
            low=share.low,
            high=share.high,
            rounds=rounds,
            bar=f"<= {BAR}",
            passed=share.value <= BAR,
            engine="transformers/float32",
            note=f"PSS of one more role over an engine of {size.value:.0f} MiB; {MANY} agents against {FEW}, one process each",
        )
    ]


def _pss_of_hosts(sizes: Sequence[int]) -> list[float]:
    """Return the PSS in bytes of hosts with so many agents, all up and warm at the same time."""
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(_Host(size)) for size in sizes]
        for host in hosts:
            host.wait()
        return [host.pss() for host in hosts]


class _Host:
    """A child process with an engine and some agents."""

    def __init__(self, num_agents: int) -> None:
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115 -- closed when the host ends
            mode="w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dmoa.bench.memory_bench", str(num_agents)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )

    def __enter__(self) -> _Host:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def wait(self) -> None:
        """Return once every agent has answered."""
        self._line()

    def pss(self) -> float:
        """Return the PSS of this moment in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(json.loads(self._line())["pss_bytes"])

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise DmoaError(f"bench: a host of agents ended too early: {self._errors.read()[-2000:]}")
        return line


def pss_bytes() -> int:
    """Return the proportional set size of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise DmoaError("bench: /proc/self/smaps_rollup has no Pss line; P17 needs Linux 4.14 or newer")


def main() -> None:
    """Run the child's side: host so many agents, ask each once, then print the PSS for every line that comes in."""
    import asyncio

    asyncio.run(_serve(int(sys.argv[1])))


async def _serve(num_agents: int) -> None:
    from dmoa.agents.pool import build_local
    from dmoa.agents.prompts import agent_messages
    from dmoa.config import Config
    from dmoa.types import AgentCall, Query, Sampling

    names = [f"role-{i}" for i in range(num_agents)]
    config = Config.model_validate(
        {
            "name": "memory",
            "llms": {"m": {"model": "embedded:smollm2-135m", "max_num_seqs": 4}},
            "agents": [{"name": name, "llm": "m", "profile": f"Takes the part of {name} in every discussion."} for name in names],
        }
    )
    agents, engines = build_local(config)
    query = Query(trace_id="memory", text="What is 12 + 7?")
    for agent in config.agents:
        messages = agent_messages(query, (), profile=agent.profile)
        await agents.call(AgentCall(trace_id="m", step=0, agent=agent.name, messages=messages, sampling=Sampling(max_tokens=4)))
    gc.collect()
    _say({"ready": True})
    for _ in sys.stdin:
        _say({"pss_bytes": pss_bytes()})
    for engine in engines:
        await engine.close()


def _say(record: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
