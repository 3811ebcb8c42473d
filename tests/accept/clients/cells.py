"""What the scripts of the clients have in common: they run in environments without dmoa, a cell a line of JSON."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import traceback
from collections.abc import Callable
from typing import Any

URL = os.environ.get("BASE_URL", "")
MODEL = "clients"
ASKED = "What is 12 + 7?"
LOOP = asyncio.new_event_loop()
"""One for all cells: some clients keep a connection of their own."""


def cell(name: str, run: Callable[[], Any]) -> None:
    """Run one cell, a function or a coroutine function, and print what became of it."""
    why = ""
    try:
        done = LOOP.run_until_complete(run()) if inspect.iscoroutinefunction(run) else run()
        why = "" if done else f"it returned {done!r}"
    except BaseException as error:  # whatever a client raises is what the cell says
        traceback.print_exc()
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(json.dumps({"cell": name, "why": why}), flush=True)
