"""Learning while serving under kill -9: the learner, the feedback buffer and the router die under load, on *scripted agents*.

Streams ask over HTTP all the while; `dmoa adapt --online` learns from them and offers, `router.adaptation` is `on`. In turns the
job (with its worker), the buffer's actor and the router's are killed without warning; a job that was killed is started again, as
whoever runs it would. Judged: no query fails; after every kill the ledger goes on upwards from where it stood; no update number
is in the router's history twice. The loss of a node is another check's (`tests/cluster/test_cluster.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check
from tests.cluster.swaps import POOL, ROOT, stream_until, write_pool
from tests.integration.server import Served, serve

STREAMS = 4
PATIENCE_S = 240.0
KILLS = ("learner", "FeedbackActor", "RouterActor", "learner", "RouterActor")
LEARNING = "adaptation: 'on', feedback_anonymous: true, explore: 1.0, guards: {cooldown_s: 0, skip: [canary]}"


class Learner:
    """`dmoa adapt --online` in a process of its own."""

    def __init__(self, address: str, out: Path) -> None:
        self._command = [sys.executable, "-m", "dmoa", "adapt", "--online", "--address", address, "--out", str(out)]
        self._command += ["--every", "4", "--offer-every", "1", "--poll-s", "0.5", "--track", "none"]
        self._log = (out.parent / "learner.log").open("ab")
        self.start()

    def start(self) -> None:
        """Begin, or begin again."""
        env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
        self.process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log, cwd=ROOT, env=env)

    def kill(self) -> None:
        """End it and what it started, without a word."""
        for process in (*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)


def router(address: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run `dmoa router`; return its JSON, empty where it did not answer."""
    out = folder / "router.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dmoa", "router", *arguments, "--address", address, "--json", str(out)]
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    subprocess.run(command, capture_output=True, timeout=120, check=False, cwd=ROOT, env=env)
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    return found


def until_learned(address: str, folder: Path, above: int) -> int:
    """Return the ledger once it is above a number; -1 if it never is."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ledger = router(address, folder, "status").get("adaptation", {}).get("ledger", 0)
        if ledger > above:
            return int(ledger)
        time.sleep(1.0)
    return -1


def break_things(served: Served, learner: Learner, address: str, folder: Path) -> list[dict[str, Any]]:
    """Kill one thing after the other; return how far learning had come before and after each."""
    found = []
    ledger = until_learned(address, folder, 0)
    for kind in KILLS:
        if kind == "learner":
            learner.kill()
            for worker in served.processes("RayTrainWorker"):
                worker.kill()
            learner.start()
        else:
            (process,) = served.processes(f"ray::{kind}")
            process.kill()
        again = until_learned(address, folder, ledger)
        found.append({"killed": kind, "ledger_before": ledger, "ledger_after": again})
        ledger = max(ledger, again)
    return found


async def check(folder: Path) -> dict[str, Any]:
    """Serve, learn, kill, and return what came of it."""
    pool = write_pool(folder, POOL.replace("router: {", f"router: {{{LEARNING}, "))
    served = serve(pool, "--json", str(folder / "serve.json"))
    address = json.loads((folder / "serve.json").read_text())["ray_address"]
    learner, is_over = Learner(address, folder / "adapt"), asyncio.Event()
    asking = asyncio.create_task(stream_until(served.url, is_over, STREAMS))
    try:
        kills = await asyncio.to_thread(break_things, served, learner, address, folder)
        history = await asyncio.to_thread(router, address, folder, "history")
    finally:
        is_over.set()
        load = await asking
        learner.kill()
        served.stop()
    entries = [entry for entry in history.get("history", []) if entry["action"] in ("adapted", "refused", "observed")]
    updates = Counter(found[1] for entry in entries if (found := re.match(r"update (\d+)", entry["note"])))
    twice = sorted(int(number) for number, times in updates.items() if times > 1)
    return {
        "agents": "scripted: no figure speaks of a model",
        "streams": STREAMS,
        "queries": len(load.seen),
        "failed": len(load.failures),
        "failures": load.failures[:10],
        "kills": kills,
        "updates_in_history": len(updates),
        "updates_taken_twice": twice,
        "passed": not load.failures
        and len(load.seen) > 0
        and not twice
        and len(updates) > 0
        and all(one["ledger_after"] > one["ledger_before"] > 0 for one in kills),
    }


if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: check(options.scratch)))
