"""The runtime beside a plain script of the same calls: a line of `accept_rivals`."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dmoa.agents.pool import build_local
from dmoa.bench.harness import ratio
from dmoa.config import Config
from dmoa.evaluation.answering import Asking, query_of_task
from dmoa.evaluation.records import Task
from dmoa.policies.registry import split_policy
from dmoa.protocols import final_answer
from dmoa.types import GenerationRequest, Limits, Message, Sampling
from tests.unit.agents.openai_server import Call, playing
from tests.unit.policies.test_outside import QUESTION, Script, counted, swarm_of

IN_FLIGHT = 8
MOST_OVERHEAD = 0.10
MOST_CALLS, REAL_TOKENS = 64, 8
WARM_UPS = 2
SIDES = ("runtime", "script")
REAL = {
    "name": "real",
    "llms": {"m": {"model": "embedded:smollm2-135m", "max_num_seqs": MOST_CALLS}},
    "agents": [{"name": "a", "llm": "m", "profile": "Answers."}],
}
Figures = dict[str, Any]


def overhead(queries: int, delay_s: float, engine: str, rounds: int) -> Figures:
    """Return what eight concurrent queries cost through the runtime, over a plain script of the same calls.

    `engine`: the embedded model behind a chat endpoint in this process, or `delay`, which answers after a set time, so that what
    differs is the runtime's own work. Both sides may have all their calls under way at once. They take short turns, each first
    as often; a round's two turns are compared with each other, so that load that comes and goes is on both. The overhead is the
    median of these ratios less one; its quartiles stand beside it. Processor time is of this process, endpoint included;
    what the runtime takes more of it, as a share of the script's wall time, hardly depends on what else the machine does.
    """
    found: Figures = {"engine": engine}
    for policy in ("moa", "self_consistency:b"):
        taken = asyncio.run(_turns(policy, queries, delay_s, engine, rounds))
        entry: Figures = {
            side: dict(zip(("seconds", "cpu_s", "calls", "tokens"), np.median(values, axis=0).round(4).tolist(), strict=True))
            for side, values in taken.items()
        }
        by_turn = {of: ratio(*(np.array(taken[side])[:, at].tolist() for side in SIDES)) for at, of in enumerate(("wall", "cpu"))}
        entry |= {f"{of}_over_script": [round(x - 1, 4) for x in (r.value, r.low, r.high)] for of, r in by_turn.items()}
        extra = np.array(taken["runtime"])[:, 1] - np.array(taken["script"])[:, 1]
        entry["extra_cpu_of_wall"] = round(float(np.median(extra)) / entry["script"]["seconds"], 4)
        entry["overhead"] = entry["wall_over_script"][0]
        entry["same"] = all(entry["script"][of] == entry["runtime"][of] for of in ("calls", "tokens"))
        found[policy] = entry
    arms = [entry for entry in found.values() if entry != engine]
    found["passed"] = all(entry["same"] and entry["overhead"] <= MOST_OVERHEAD for entry in arms)
    return found


async def _turns(policy: str, queries: int, delay_s: float, engine: str, rounds: int) -> dict[str, list[tuple[float, ...]]]:
    """Return seconds, processor seconds, calls and tokens of each turn of each side."""
    real = build_local(Config.model_validate(REAL))[1][0] if engine == "embedded" else None

    async def answered(call: Call) -> None:
        if real is None:
            await asyncio.sleep(delay_s)
            await counted(call)
            return
        messages = tuple(Message(**message) for message in call.body["messages"])
        sampling = Sampling(temperature=0.0, max_tokens=REAL_TOKENS)
        made = await real.generate(GenerationRequest(request_id=uuid.uuid4().hex, messages=messages, sampling=sampling))
        usage = {"prompt_tokens": made.usage.prompt_tokens, "completion_tokens": made.usage.completion_tokens, "total_tokens": 0}
        choice = {"index": 0, "message": {"role": "assistant", "content": made.text}, "finish_reason": made.finish_reason}
        await call.send(200, json.dumps({"choices": [choice], "usage": usage}).encode())

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MOST_CALLS))  # one thread for each call of the script
    taken: dict[str, list[tuple[float, ...]]] = {"script": [], "runtime": []}
    async with playing(answered) as server:
        script, swarm, room = Script(server.url), swarm_of(server.url, MOST_CALLS), asyncio.Semaphore(IN_FLIGHT)

        async def one(side: str, number: int) -> int:
            async with room:
                if side == "script":
                    await (script.moa() if policy == "moa" else script.self_consistency())
                    return 0
                task = Task(row_id=str(number), benchmark="b", text=QUESTION)
                query = query_of_task(task, policy, Asking(seed=0, limits=Limits(max_steps=9)))
                return (await final_answer(swarm, query, *split_policy(policy))).usage.total

        for turn in range(-WARM_UPS, rounds):
            for side in SIDES if turn % 2 else SIDES[::-1]:
                server.calls.clear()
                before, started, cpu = script.tokens, time.perf_counter(), time.process_time()
                tokens = sum(await asyncio.gather(*(one(side, number) for number in range(queries))))
                seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
                if turn >= 0:
                    taken[side].append((seconds, cpu, len(server.calls), tokens or script.tokens - before))
        await swarm.close()
    if real is not None:
        await real.close()
    return taken
