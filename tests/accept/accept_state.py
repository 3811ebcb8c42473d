"""A router's state that is lost, cut or cannot be written, on a running swarm of *scripted agents*.

Judged: with its folder gone, cut or older than the swarm, a router that is killed (SIGKILL) comes back with the gate that was
installed, says what was lost, writes it back, and no query fails meanwhile; a place that cannot be written ends `dmoa serve`
with one line and status 2 within `START_S`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from dmoa.serving.launch import free_port
from tests.accept.accept_adaptation_kills import router
from tests.accept.checks import run_check
from tests.cluster.swaps import stream_until, version_of, write_checkpoint, write_pool
from tests.integration.server import Served, serve

STREAMS = 4
PATIENCE_S = 60.0
START_S = 60.0
TAKEN = "the last that was kept elsewhere takes its place"


def cut(state: Path) -> None:
    """Leave half of each state file, as a full disk does."""
    for name in ("state.json", "state.json.last"):
        data = (state / name).read_bytes()
        (state / name).write_bytes(data[: len(data) // 2])


LOSSES: dict[str, Callable[[Path], object]] = {
    "the folder is gone": shutil.rmtree,
    "the states are cut": cut,
    "the weights are gone": lambda state: shutil.rmtree(state / "versions"),
    "one state is cut": lambda state: (state / "state.json").write_bytes(b'{"current": '),
}


def lose(served: Served, address: str, folder: Path, state: Path, loss: str) -> dict[str, Any]:
    """Lose something, kill the router, and return how it came back."""
    before = router(address, folder, "status")
    LOSSES[loss](state)
    (process,) = served.processes("ray::RouterActor")
    process.kill()
    started = time.monotonic()
    status: dict[str, Any] = {}
    while time.monotonic() < started + PATIENCE_S:
        status = router(address, folder, "status")
        if status.get("started_unix_s", 0.0) > before["started_unix_s"]:
            break
    seconds = time.monotonic() - started
    said = status.get("state_lost") or logged(served)
    while status.get("state_lost") and time.monotonic() < started + PATIENCE_S:
        time.sleep(1.0)
        status = router(address, folder, "status")
    return {
        "loss": loss,
        "gate_before": before["gate_version"],
        "gate_after": status.get("gate_version"),
        "seconds": round(seconds, 1),
        "said": said,
        "is_written_back": (state / "versions" / before["gate_version"] / "gate.json").is_file()
        and json.loads((state / "state.json").read_text())["current"] == before["gate_version"],
    }


def logged(served: Served) -> str | None:
    """Return what the router's log says was lost: its status says so only until it is written back."""
    logs = [Path(f"/proc/{process.pid}/fd/2").read_text() for process in served.processes("ray::RouterActor")]
    return next((line for log in logs for line in log.splitlines() if TAKEN in line), None)


async def check(folder: Path) -> dict[str, Any]:
    """Serve, install, lose and kill; return what came of it."""
    pool = write_pool(folder)
    installed = write_checkpoint(folder / "installed", pool, seed=2)
    served = serve(pool, "--json", str(folder / "serve.json"))
    address = json.loads((folder / "serve.json").read_text())["ray_address"]
    is_over = asyncio.Event()
    asking = asyncio.create_task(stream_until(served.url, is_over, STREAMS))
    state = folder / "state"
    try:
        await asyncio.to_thread(router, address, folder, "install", str(installed))
        losses = [await asyncio.to_thread(lose, served, address, folder, state, loss) for loss in LOSSES]
    finally:
        is_over.set()
        load = await asking
        served.stop()
    refused = start_without_a_place(pool, folder)
    return {
        "agents": "scripted: no figure speaks of a model",
        "queries": len(load.seen),
        "failed": len(load.failures),
        "failures": load.failures[:10],
        "losses": losses,
        "refused": refused,
        "passed": len(load.seen) > 0
        and not load.failures
        and all(one["gate_after"] == version_of(installed) and one["said"] and one["is_written_back"] for one in losses)
        and refused["status"] == 2
        and refused["seconds"] < START_S,
    }


def start_without_a_place(pool: Path, folder: Path) -> dict[str, Any]:
    """Start a server whose state has no place, and return how it ends."""
    (folder / "taken").write_text("no folder")
    place = f"router.state_uri={(folder / 'taken' / 'state').as_uri()}"
    started = time.monotonic()
    command = [sys.executable, "-m", "dmoa", "serve", "--config", str(pool), "--set", place, "--port", str(free_port())]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    words = [line for line in ended.stderr.splitlines() if "router.state_uri" in line]
    return {"status": ended.returncode, "seconds": round(time.monotonic() - started, 1), "words": words[-1:]}


if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: check(options.scratch)))
