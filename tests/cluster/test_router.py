"""The gate of a running swarm, changed from a second shell: no restart, no failed query, and a killed router forgets nothing.

This file has a server of its own: it kills the router and deploys the app again.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.swaps import POOL, crossed, mixed, offered, swap_under_load, version_of, write_checkpoint, write_pool
from tests.integration.server import Served, serve

DMOA = Path(sys.executable).with_name("dmoa")
SWAPS = 10
STREAMS = 8


class Running:
    """A server on checkpoint `one`, and `dmoa router` in a shell beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Guards that would judge drawn weights are left out: what an offer goes through is looked at.
        learning = (
            "adaptation: canary, guards: {skip: [drift, distance, held_back, load], canary_share: 0.4, canary_queries: 1000}"
        )
        self.pool = write_pool(folder, POOL.replace("router: {", f"router: {{{learning}, "))
        self.one, self.two, self.three = (write_checkpoint(folder / name, self.pool, i) for i, name in enumerate("abc", 1))
        self.env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
        self.served = serve(self.pool, "--checkpoint", str(self.one), "--json", str(folder / "serve.json"))
        told = json.loads((folder / "serve.json").read_text())
        self.address: str = told["ray_address"]
        self.url = self.served.url

    def router(self, *arguments: str, code: int = 0) -> tuple[subprocess.CompletedProcess[str], Any]:
        """Run `dmoa router`; return what it printed, and its JSON."""
        out = self.folder / "router.json"
        out.unlink(missing_ok=True)
        command = [str(DMOA), "router", *arguments, "--address", self.address, "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=self.env)
        assert done.returncode == code, done.stderr[-3000:]
        return done, json.loads(out.read_text()) if out.is_file() else None

    def ask(self) -> dict[str, Any]:
        """Ask one query; return the reply's `dmoa` object."""
        body = {"model": "swaps", "messages": [{"role": "user", "content": "Who?"}]}
        reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()["dmoa"]
        return found

    def until_heard(self, least: int) -> dict[str, Any]:
        """Return the trial, once the router has heard of so many of its queries."""
        deadline = time.monotonic() + 60
        while True:
            trial: dict[str, Any] = self.router("status")[1]["adaptation"]["trial"]
            if sum(trial["queries"].values()) >= least:
                return trial
            assert time.monotonic() < deadline, trial


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("router"))
    yield running
    running.served.stop()


def test_the_configured_checkpoint_is_served(running: Running) -> None:
    assert running.served.gate == version_of(running.one)
    assert running.ask()["gate_version"] == version_of(running.one)
    printed, status = running.router("status")
    assert (status["gate_version"], status["configured_version"]) == (version_of(running.one), version_of(running.one))
    assert status["untrained"] is False
    assert status["decisions"] == status["recent_inputs"] == 4
    assert f"gate          {version_of(running.one)}, current since" in printed.stdout


def test_install_refuse_and_roll_back(running: Running, tmp_path: Path) -> None:
    printed, changed = running.router("install", str(running.two), "--note", "second try")
    assert f"gate {version_of(running.two)} is current, before it was {version_of(running.one)}" in printed.stdout
    assert changed["shadow"]["inputs"] >= 4
    assert sum(changed["shadow"]["first"].values()) == pytest.approx(1.0)
    assert "inputs: most probable" in printed.stdout
    assert running.ask()["gate_version"] == version_of(running.two)

    other = write_pool(tmp_path, running.pool.read_text().replace("Says four.", "Says five."))
    foreign = write_checkpoint(tmp_path / "foreign", other, 1)
    refused, _ = running.router("install", str(foreign), code=2)
    assert "the agents have the same names, but a model, adapter, profile, tool or sampling setting differs" in refused.stderr
    refused, _ = running.router("install", str(tmp_path), code=2)
    assert "a checkpoint is a folder with gate.safetensors and gate.json" in refused.stderr
    refused, _ = running.router("status", "--app", "nobody", code=2)
    assert "app is 'nobody'; running on this Ray: dmoa" in refused.stderr
    assert running.ask()["gate_version"] == version_of(running.two)

    _, changed = running.router("rollback")
    assert (changed["version"], changed["changed"]) == (version_of(running.one), True)
    assert running.ask()["gate_version"] == version_of(running.one)
    printed, history = running.router("history")
    entries = [(entry["action"], entry["version"]) for entry in history["history"]]
    names = [version_of(folder) for folder in (running.one, running.two, running.one)]
    assert entries == list(zip(("configured", "install", "rollback"), names, strict=True))
    assert "second try" in printed.stdout


async def test_swaps_under_streams_fail_no_query_and_mix_no_versions(running: Running) -> None:
    folders = [running.two, running.one]
    found, swapped = await swap_under_load(running.url, running.address, folders, swaps=SWAPS, streams=STREAMS)
    assert found.failures == []
    assert mixed(found) == []
    assert {one.reported for one in found.seen} == {version_of(folder) for folder in folders}
    assert crossed(found, swapped) > 0, "no query was under way while a version changed"
    assert len(swapped.seconds) == SWAPS


async def test_a_router_killed_in_the_middle_of_a_canary_comes_back_with_it(running: Running) -> None:
    _, before = await asyncio.to_thread(running.router, "status")
    current, candidate = before["gate_version"], version_of(running.three)
    told = await asyncio.to_thread(offered, running.address, running.three, 1, current)
    assert (told["state"], told["ledger"], told["current"]) == ("canary", 1, current)
    replies = [await asyncio.to_thread(running.ask) for _ in range(20)]
    assert {reply["gate_version"] for reply in replies} == {current, candidate}
    trial = await asyncio.to_thread(running.until_heard, 10)
    asking = asyncio.gather(*(asyncio.to_thread(running.ask) for _ in range(8)))
    (router,) = running.served.processes("ray::RouterActor")
    router.kill()
    assert {reply["gate_version"] for reply in await asking} <= {current, candidate}
    deadline = time.monotonic() + 90
    while (await asyncio.to_thread(running.ask))["routed_by"] != "router":
        assert time.monotonic() < deadline, "the router did not come back"
    again = await asyncio.to_thread(running.until_heard, sum(trial["queries"].values()))
    assert (again["candidate"], again["control"], again["begun_unix_s"]) == (candidate, current, trial["begun_unix_s"])
    told = await asyncio.to_thread(offered, running.address, running.two, 1, current)
    assert (told["accepted"], told["ledger"]) == (False, 1)
    assert "update 1 was judged before" in told["reasons"][0]

    printed, frozen = await asyncio.to_thread(running.router, "freeze", "--note", "release day")
    assert (printed.stdout, frozen["trial"]) == ("frozen: release day\n", None)
    told = await asyncio.to_thread(offered, running.address, running.two, 2, current)
    assert told["reasons"] == ["learning is frozen (release day); `dmoa router thaw` ends that"]
    assert {(await asyncio.to_thread(running.ask))["gate_version"] for _ in range(8)} == {current}
    await asyncio.to_thread(running.router, "thaw")
    _, history = await asyncio.to_thread(running.router, "history")
    actions = [entry["action"] for entry in history["history"]]
    assert actions[-6:] == ["canary", "refused", "freeze", "withdrawn", "refused", "thaw"]
    metrics = (await asyncio.to_thread(httpx.get, f"{running.url}/metrics", timeout=60)).text
    assert 'dmoa_router_offers_total{state="canary"} 1.0' in metrics


async def test_a_killed_router_comes_back_with_what_was_installed(running: Running) -> None:
    changed = (await asyncio.to_thread(running.router, "install", str(running.two)))[1]
    assert changed["version"] == version_of(running.two)
    assert (await asyncio.to_thread(running.ask))["gate_version"] == version_of(running.two)  # now the ingress knows it too
    queries = [asyncio.to_thread(running.ask) for _ in range(4)]
    asking = asyncio.gather(*queries)
    (router,) = running.served.processes("ray::RouterActor")
    router.kill()
    replies = await asking
    assert {reply["gate_version"] for reply in replies} == {version_of(running.two)}
    deadline = time.monotonic() + 90
    while (await asyncio.to_thread(running.ask))["routed_by"] != "router":
        assert time.monotonic() < deadline, "the router did not come back"
    _, status = await asyncio.to_thread(running.router, "status")
    assert (status["gate_version"], status["configured_version"]) == (version_of(running.two), version_of(running.one))
    _, history = await asyncio.to_thread(running.router, "history")
    assert history["history"][-1]["version"] == version_of(running.two)


def test_the_same_deployment_keeps_what_was_installed_and_another_checkpoint_replaces_it(running: Running) -> None:
    """The app is deployed again on the running Ray, once as it was and once with another checkpoint."""
    assert running.router("status")[1]["gate_version"] == version_of(running.two)
    for checkpoint, gate in ((running.one, running.two), (running.three, running.three)):
        port = running.url.rpartition(":")[2]
        more = ["--checkpoint", str(checkpoint), "--address", running.address, "--port", port]
        command = [str(DMOA), "serve", "--config", str(running.pool), *more]
        again = Served(command).wait_ready()
        try:
            assert again.gate == version_of(gate)
            assert running.ask()["gate_version"] == version_of(gate)
            errors = "".join(again.errors)
            assert ("the gate was installed before; deployed is" in errors) == (checkpoint != gate)
        finally:
            again.process.kill()  # not as a user would: ending it would delete the app
            again.process.wait(60)
    entries = [(entry["action"], entry["version"]) for entry in running.router("history")[1]["history"]]
    assert entries[-1] == ("configured", version_of(running.three))
    _, changed = running.router("rollback")
    assert changed["version"] == version_of(running.two)
