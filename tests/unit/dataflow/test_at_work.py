"""The loop and the outbox of an answering actor."""

from __future__ import annotations

import asyncio
from threading import Thread

import pytest

from dmoa.dataflow import BackgroundLoop, BatchedWriter


class Writer:
    """Takes what it is sent once it is let go; refuses batches that hold `bad`."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.has_begun = asyncio.Event()
        self.go = asyncio.Event()

    async def send(self, items: list[str]) -> None:
        self.batches.append(items)
        self.has_begun.set()
        await self.go.wait()
        if "bad" in items:
            raise OSError("disk full")


async def test_what_comes_during_a_hand_over_goes_together_in_the_next() -> None:
    writer = Writer()
    outbox = BatchedWriter(writer.send)
    puts = [asyncio.create_task(outbox.put(item)) for item in ("a", "b")]
    await writer.has_begun.wait()
    puts += [asyncio.create_task(outbox.put(item)) for item in ("c", "d", "e")]
    await asyncio.sleep(0)
    assert not any(put.done() for put in puts), "nothing is safe before the writer says so"
    writer.go.set()
    await asyncio.gather(*puts)
    assert writer.batches == [["a", "b"], ["c", "d", "e"]]


async def test_what_the_writer_meets_belongs_to_its_batch_alone() -> None:
    writer = Writer()
    writer.go.set()
    outbox = BatchedWriter(writer.send)
    results = await asyncio.gather(outbox.put("good"), outbox.put("bad"), return_exceptions=True)
    assert [str(result) for result in results] == ["disk full"] * 2, "they went together"
    await outbox.put("later")
    assert writer.batches[-1] == ["later"]


def test_work_of_several_threads_shares_one_loop_and_ends_with_its_own_error() -> None:
    loop = BackgroundLoop()
    both = asyncio.Barrier(4)
    counts: list[int] = []

    async def meet() -> None:
        await asyncio.wait_for(both.wait(), 30.0)

    threads = [Thread(target=lambda: counts.append(loop.run_all([meet(), meet()]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert counts == [2, 2], "all four met, so all four were under way at once"

    async def fail() -> None:
        raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        loop.run_all([fail()])
