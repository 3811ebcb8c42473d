"""Weights swapped under streams of queries: what a stream saw, what the swaps did, and whether any trace mixes versions.

Run as a program it is the swapper: a process of its own that joins the swarm's Ray and installs two checkpoints in turn.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmoa import checkpoint
from dmoa.agents.pool import fingerprint
from dmoa.checkpoint import describe_gate
from dmoa.config import Config, load
from dmoa.errors import DmoaError, RequestError
from dmoa.routing import build_gate
from dmoa.serving.client import RemoteReply, ServerClient
from dmoa.types import Message

ROOT = Path(__file__).parents[2]
POOL = """
name: swaps
llms:
  s:
    model: "scripted:echo"
    engine: scripted
    placement: shared
    max_num_seqs: 64
    engine_kwargs: {delay_ms: 30, replies: {one: "Answer: 1", two: "Answer: 2", three: "Answer: 3", four: "Answer: 4"}}
agents:
  - {name: one, llm: s, profile: Says one.}
  - {name: two, llm: s, profile: Says two.}
  - {name: three, llm: s, profile: Says three.}
  - {name: four, llm: s, profile: Says four.}
gate: {activation: {rule: fixed, max_agents: 2}}
limits: {max_steps: 4}
router: {state_uri: "STATE", num_traces: 100000}
"""
"""Scripted agents that never agree, so that every query takes four steps; its figures say nothing about any model."""
NUM_STEPS = 4
DECISIONS_BETWEEN = (4, 24)
"""Least decisions of the router between two swaps, drawn from here: streams in step must not meet every second version."""
_PATIENCE_S = 300.0


def write_pool(folder: Path, text: str = POOL) -> Path:
    """Write the pool file, with its state in the same folder, and return its path."""
    path = folder / "pool.yaml"
    path.write_text(text.replace("STATE", (folder / "state").as_uri()), encoding="utf-8")
    return path


def write_checkpoint(folder: Path, pool: Path, seed: int, **spec: Any) -> Path:
    """Write a checkpoint for the pool whose weights count as trained, drawn from the seed."""
    config: Config = load(pool)
    gate = build_gate(config.gate.model_copy(update={"seed": seed}), config.agent_names)
    gate.spec = replace(gate.spec, **spec)
    record = describe_gate(gate, fingerprint=fingerprint(config), trained_on={"seed": seed})
    return checkpoint.save(folder, gate, record)


def version_of(folder: Path) -> str:
    """Return the version of a checkpoint folder."""
    return checkpoint.load(folder)[1].version


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One streamed query that was answered."""

    trace_id: str
    began_unix_s: float
    ended_unix_s: float
    versions: tuple[str, ...]
    """Different gate versions among the trace's decisions."""
    reported: str
    """The gate version that the reply named."""
    num_decisions: int
    routed_by: str


@dataclass(slots=True, kw_only=True)
class Load:
    """What concurrent streams met while they ran."""

    seen: list[Seen] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


async def stream_until(url: str, is_over: asyncio.Event, streams: int) -> Load:
    """Ask one query after the other in every one of `streams` streams until the event is set; traces are read too."""
    load_ = Load()
    async with ServerClient(url) as client:
        await asyncio.gather(*(_stream(client, number, is_over, load_) for number in range(streams)))
    return load_


async def _stream(client: ServerClient, number: int, is_over: asyncio.Event, found: Load) -> None:
    count = 0
    while not is_over.is_set():
        count += 1
        try:
            found.seen.append(await _ask(client, f"Question {count} of stream {number}?"))
        except DmoaError as error:
            found.failures.append(f"{type(error).__name__}: {error}")


async def _ask(client: ServerClient, text: str) -> Seen:
    began = time.time()
    async for event in client.stream([Message(role="user", content=text)], model="swaps"):
        reply = event
    ended = time.time()
    if not isinstance(reply, RemoteReply) or not reply.text:
        raise DmoaError(f"{text} the stream ended without an answer")
    trace = await _trace(client, reply.dmoa["trace_id"])
    return Seen(
        trace_id=trace["trace_id"],
        began_unix_s=began,
        ended_unix_s=ended,
        versions=tuple(sorted({route["gate_version"] for route in trace["routes"]})),
        reported=reply.dmoa["gate_version"],
        num_decisions=len(trace["routes"]),
        routed_by=reply.dmoa["routed_by"],
    )


async def _trace(client: ServerClient, trace_id: str) -> dict[str, Any]:
    """Return a trace, which is kept a moment after the reply."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return await client.trace(trace_id)
        except RequestError as error:
            if error.status != 404 or time.monotonic() >= deadline:
                raise
        await asyncio.sleep(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """What the swapper did."""

    moments_unix_s: tuple[float, ...]
    """When each swap had become current."""
    seconds: tuple[float, ...]
    """How long each took."""


async def swap_under_load(url: str, address: str, folders: Sequence[Path], *, swaps: int, streams: int) -> tuple[Load, Swapped]:
    """Install checkpoints in turn while streams ask; return what both met."""
    is_over = asyncio.Event()
    asking = asyncio.create_task(stream_until(url, is_over, streams))
    command = [sys.executable, "-m", "tests.cluster.swaps", address, str(swaps), *map(str, folders)]
    swapper = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        out, err = await swapper.communicate()
    finally:
        is_over.set()
        found = await asking
    assert swapper.returncode == 0, err.decode()[-3000:]
    told = json.loads(out.decode().splitlines()[-1])
    return found, Swapped(moments_unix_s=tuple(told["moments"]), seconds=tuple(told["seconds"]))


def crossed(found: Load, swapped: Swapped) -> int:
    """Return how many queries were under way while a swap became current."""
    return sum(any(one.began_unix_s < moment < one.ended_unix_s for moment in swapped.moments_unix_s) for one in found.seen)


def mixed(found: Load) -> list[Seen]:
    """Return the queries whose trace does not name exactly one version, the one of the reply, in every one of its steps."""
    return [one for one in found.seen if one.versions != (one.reported,) or one.num_decisions != NUM_STEPS]


def _swap(address: str, swaps: int, folders: Sequence[str]) -> dict[str, list[float]]:
    """Install the folders in turn, letting the router decide for the streams in between."""
    from dmoa.serving.router.admin import RouterAdmin, checkpoint_files

    admin = RouterAdmin("dmoa", address=address)
    packs = [checkpoint_files(folder) for folder in folders]
    rng = random.Random(0)
    moments, seconds = [], []
    for number in range(swaps):
        wanted = admin.status().decisions + rng.randint(*DECISIONS_BETWEEN)
        deadline = time.monotonic() + _PATIENCE_S
        while admin.status().decisions < wanted:
            assert time.monotonic() < deadline, "the streams stand still"
            time.sleep(0.005)
        began = time.time()
        changed = admin.install(packs[number % len(packs)], f"swap {number}")
        moments.append(time.time())
        seconds.append(moments[-1] - began)
        assert changed["changed"], changed
    return {"moments": moments, "seconds": seconds}


def _offer(address: str, folder: str, update: int, base: str) -> dict[str, Any]:
    """Offer a checkpoint as a learner does."""
    from dmoa.serving.router.admin import RouterAdmin, checkpoint_files

    evidence = {"base_version": base, "update": update, "source": "tests", "used": 8}
    return RouterAdmin("dmoa", address=address).offer(checkpoint_files(folder), evidence)


def offered(address: str, folder: Path, update: int, base: str) -> dict[str, Any]:
    """Offer a checkpoint from a process of its own; return what the router said."""
    command = [sys.executable, "-m", "tests.cluster.swaps", "offer", address, str(folder), str(update), base]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, cwd=ROOT)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


if __name__ == "__main__" and sys.argv[1] == "offer":
    print(json.dumps(_offer(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])))
elif __name__ == "__main__":
    print(json.dumps(_swap(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
