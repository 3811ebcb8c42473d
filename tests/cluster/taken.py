"""A program that asks the agents a1 and a2 of a running pool for what is never answered, and says when their calls are taken.

Arguments: the address of the Ray, the pool's file, the question. It prints one line, and cancels the calls when it is sent one.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from dmoa.config import load
from dmoa.serving.launch import set_flags, start_ray
from dmoa.serving.rollover import pool_version
from dmoa.types import AgentCall, Message, Sampling


async def _main(address: str, pool: Path, question: str) -> None:
    set_flags()  # before Serve is imported
    start_ray(address)
    from ray import serve

    from dmoa.serving.handles import ask

    handle = serve.get_deployment_handle("llm-pair", "dmoa").options(method_name="call")
    version = pool_version(load(pool))
    asked = (Message(role="user", content=question),)
    calls = [AgentCall(trace_id="taken", step=0, agent=name, messages=asked, sampling=Sampling()) for name in ("a1", "a2")]
    sent = [ask(handle, call, version) for call in calls]
    before = [one.is_taken() for one in sent]
    while not all(one.is_taken() for one in sent):  # noqa: ASYNC110 Serve tells nobody
        await asyncio.sleep(0.05)
    print("taken, at first", before, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for one in sent:
        one.response.cancel()
    await asyncio.sleep(1)  # the cancelling is sent by this process


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
