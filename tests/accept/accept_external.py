"""The recipe for applications as agents: a LangGraph app, an AutoGen group and a CrewAI crew, each in a process of its own.

    python tests/accept/accept_external.py --json out/accept/external.json

The code is the guide's own (`dmoa docs extending`). An endpoint of the tests plays the model that all three call; dmoa asks the
three by `engine: openai`, alone and in a vote. Installs the three into a virtual environment (`--folder`), which needs the
network; what cannot be installed is said, and fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import venv
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local
from dmoa.config import Config
from dmoa.policies.registry import split_policy
from dmoa.protocols import final_answer
from dmoa.serving.launch import free_port
from dmoa.swarm import Swarm
from dmoa.testing import fixed_gate, query, router_of, scripted_pool
from tests.accept.checks import run_check
from tests.unit.agents.openai_server import Call, playing

GUIDE = Path(__file__).parents[2] / "dmoa" / "docs" / "extending.md"
PACKAGES = {
    "langgraph": ("langgraph", "langchain-openai"),
    "autogen": ("autogen-agentchat", "autogen-ext[openai]"),
    "crewai": ("crewai",),
}
START_S = 240.0


def blocks() -> dict[str, str]:
    """Return the guide's files by the name in their first line."""
    found = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return dict(found)


async def model(call: Call) -> None:
    """Play the model: it knows one answer, in each way that a client may ask for it."""
    text = "Answer: 19"
    usage = {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24}
    common = {"id": "c", "object": "chat.completion", "created": 0, "model": "played", "usage": usage}
    if call.body.get("stream"):
        await call.open_stream()
        choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        await call.event(common | {"object": "chat.completion.chunk", "choices": [choice]})
        await call.chunk(b"data: [DONE]\n\n")
        await call.chunk(b"")
        return
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    await call.send(200, json.dumps(common | {"choices": [choice]}).encode())


def pool(ports: dict[str, int]) -> Config:
    """Return the pool of the applications that run."""
    tree = scripted_pool(tuple(ports)).model_dump(mode="json", exclude_unset=True)
    tree["llms"] = {
        name: {"model": f"openai:{name}", "engine": "openai", "engine_kwargs": {"base_url": f"http://127.0.0.1:{port}/v1"}}
        for name, port in ports.items()
    }
    tree["agents"] = [{"name": name, "llm": name, "profile": "Answers."} for name in ports]
    return Config.model_validate(tree)


async def asked(ports: dict[str, int]) -> dict[str, str]:
    """Return what each application answers through dmoa, and their vote."""
    config = pool(ports)
    agents, engines = build_local(config)
    router = router_of(fixed_gate(dict.fromkeys(ports, 1 / len(ports))))
    swarm = Swarm(config, agents=agents, router=router, encoder=HashEncoder(), engines=engines)
    try:
        policies = (*(f"single:{name}" for name in ports), "majority_k")
        return {policy: (await final_answer(swarm, query(), *split_policy(policy))).text for policy in policies}
    finally:
        await swarm.close()


def install(folder: Path, names: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """Return the environment's Python, and why an application could not be installed."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    failed = {}
    for name in names:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES[name]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed[name] = done.stderr.strip()[-400:]
    return python, failed


def start(python: Path, name: str, folder: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start an application; what it writes goes to a file beside it."""
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([str(python), f"{name}_app.py"], cwd=folder, env=env, stdout=log, stderr=log)


async def run(python: Path, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Start the applications, ask them and end them."""
    for name, text in blocks().items():
        (folder / name).write_text(text, encoding="utf-8")
    async with playing(model) as server:
        ports = {name: free_port() for name in names}
        env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and key != "PYTHONPATH"}
        env |= {"MODEL": "played", "MODEL_URL": server.url, "OPENAI_API_KEY": "none", "CREWAI_DISABLE_TELEMETRY": "true"}
        env |= {"OTEL_SDK_DISABLED": "true", "CREWAI_TRACING_ENABLED": "false", "HOME": str(folder)}
        processes = {name: start(python, name, folder, env | {"PORT": str(ports[name])}) for name in names}
        try:
            up = {name: port for name, port in ports.items() if await _is_up(port, processes[name])}
            answers = await asked(up) if up else {}
        finally:
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.wait()
        down = {name: (folder / f"{name}.log").read_text()[-400:] for name in names if name not in up}
        return {"answers": answers, "did_not_start": down, "calls_of_the_model": len(server.calls)}


async def _is_up(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        await asyncio.sleep(0.3)
    return False


FLAGS: dict[str, dict[str, Any]] = {
    "--folder": {"type": Path, "default": Path("out/external")},
    "--only": {"nargs": "+", "choices": tuple(PACKAGES), "default": tuple(PACKAGES)},
    "--python": {"type": Path, "help": "an environment that has them already"},
}


async def check(options: Namespace) -> dict[str, Any]:
    """Install, run, ask: passed where every application answered as the model did."""
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    python, failed = (options.python.absolute(), {}) if options.python else install(folder / "venv", options.only)
    names = [name for name in options.only if name not in failed]
    found = await run(python, names, folder) if names else {"answers": {}}
    wrong = {policy: text for policy, text in found["answers"].items() if "19" not in text}
    found |= {"not_installed": failed, "wrong": wrong}
    found["passed"] = not wrong and not failed and len(found["answers"]) == len(options.only) + 1
    return found


if __name__ == "__main__":
    raise SystemExit(run_check(check, FLAGS))
