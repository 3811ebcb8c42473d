"""The room of the engines: its places are never exceeded, and it is first come first served."""

from __future__ import annotations

import asyncio
import random

from dmoa.dataflow import AdmissionControl


async def test_a_room_never_holds_more_than_its_places_and_serves_in_order() -> None:
    room, inside, peak, order = AdmissionControl(5), 0, 0, []
    rng = random.Random(0)

    async def visit(number: int, width: int) -> None:
        nonlocal inside, peak
        taken = await room.enter(width)
        order.append(number)
        inside += taken
        peak = max(peak, inside)
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        inside -= taken
        room.leave(taken)

    await asyncio.gather(*(visit(number, rng.choice([1, 2, 3, 9])) for number in range(200)))
    assert order == list(range(200))
    assert peak == 5
    assert inside == 0
