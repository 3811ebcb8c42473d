"""Clients: the real packages, default settings each, against a real dmoa server over *an endpoint that is scripted*.

Every client gets an environment of its own, made here from the package index. A cell of the matrix is one thing a client does; it
works, or the sentence says why not. The pool's agents are models of an OpenAI-compatible endpoint of this check: it answers
"The answer is 19.", JSON where a form is asked for, and calls of the tools that it is offered until it sees a result; or, with
`--pool embedded`, the embedded model. `--docs dmoa/docs/api.md` puts the table of what came of it there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from dmoa.serving.launch import free_port
from tests.accept.checks import run_check

HERE = Path(__file__).parent / "clients"
PYTHON: dict[str, tuple[str, ...]] = {
    "openai": ("openai",),
    "litellm": ("litellm",),
    "langchain": ("langchain-openai",),
    "llama_index": ("llama-index-llms-openai-like",),
    "openai_agents": ("openai-agents",),
    "pydantic_ai": ("pydantic-ai-slim[openai]",),
    "autogen": ("autogen-ext[openai]==0.7.5", "autogen-agentchat==0.7.5"),
    "instructor": ("instructor",),
    "lm_eval": ("lm-eval[api]",),
}
NODE = ("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai", "zod")
NO_CALL = "the embedded model, of 135M parameters, calls no tool where it may answer in text"
NO_FORM = (
    "the client asks for JSON without a schema, or in words alone, which the embedded model, of 135M parameters, does not follow"
)
NO_LOGPROBS = "the embedded model's engine lists no log-probabilities; the server says so, 400"
NO_SCHEMA = "the embedded model, of 135M parameters, goes on from the schema's first key with an object, until max_tokens cuts it"
CANNOT = {
    "embedded": {
        r"n and logprobs": NO_LOGPROBS,
        r"tool": NO_CALL,
        r"MD_JSON|mode JSON$|openai-compatible: generateObject": NO_FORM,
        r"generateObject": NO_SCHEMA,
    }
}
"""Per pool what its model cannot do, by the names of cells: there the sentence stands in place of a failure."""
INSTALL_S, CLIENT_S, START_S = 900, 600, 600
LLMS = {
    "endpoint": '{{model: "openai:scripted", engine: openai, engine_kwargs: {{base_url: "http://127.0.0.1:{port}/v1"}}}}',
    "embedded": '{{model: "embedded:smollm2-135m", engine: transformers, engine_kwargs: {{max_model_len: 8192}}}}',
}
"""What the agents run on, by the name of `--pool`."""
POOL = """
name: clients
llms:
  one: {llm}
agents:
  - {{name: one, llm: one, profile: Answers., sampling: {{max_tokens: 256}}}}
  - {{name: two, llm: one, profile: Answers too., sampling: {{max_tokens: 256}}}}
gate: {{hidden: 16, activation: {{max_agents: 2}}}}
limits: {{max_steps: 1}}
"""


def value_of(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """Return a value that matches a simple schema: 19, "Paris", and so on."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "enum" in schema or "const" in schema:
        return schema.get("const", (schema.get("enum") or [None])[0])
    for part in ("anyOf", "oneOf", "allOf"):
        if part in schema:
            return value_of(schema[part][0], root)
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: value_of(part, root) for name, part in schema.get("properties", {}).items()}
    plain: dict[str, Any] = {"string": "Paris", "integer": 19, "number": 19.0, "boolean": True, "null": None}
    return [value_of(schema.get("items", {"type": "string"}), root)] if kind == "array" else plain[kind]


class Endpoint(BaseHTTPRequestHandler):
    """The scripted endpoint."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message, reason = self._message(body)
        rows = [{"token": "The", "logprob": -0.1, "top_logprobs": [{"token": "The", "logprob": -0.1}]}]
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": reason,
            "logprobs": {"content": rows} if body.get("logprobs") else None,
        }
        usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
        if not body.get("stream"):
            self._send("application/json", json.dumps({"choices": [choice | {"message": message}], "usage": usage}).encode())
            return
        calls = [call | {"index": place} for place, call in enumerate(message.get("tool_calls", []))]
        delta = message | ({"tool_calls": calls} if calls else {})
        events = [{"choices": [choice | {"delta": delta}]}, {"choices": [], "usage": usage}]
        self._send("text/event-stream", "".join(f"data: {json.dumps(one)}\n\n" for one in events).encode() + b"data: [DONE]\n\n")

    def _message(self, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        said = " ".join(str(message["content"]) for message in body["messages"])
        tools, form = body.get("tools", []), body.get("response_format") or {}
        forced = body.get("tool_choice") not in (None, "auto", "none")
        if tools and body.get("tool_choice") != "none" and (forced or "Result of" not in said):
            function = tools[0]["function"]
            if isinstance(body.get("tool_choice"), dict):
                name = body["tool_choice"]["function"]["name"]
                function = next(tool["function"] for tool in tools if tool["function"]["name"] == name)
            parameters = function.get("parameters") or {}
            called = {"name": function["name"], "arguments": json.dumps(value_of(parameters, parameters))}
            return {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": called}],
            }, "tool_calls"
        if form.get("type") == "json_schema":
            schema = form["json_schema"]["schema"]
            return {"role": "assistant", "content": json.dumps(value_of(schema, schema))}, "stop"
        if form.get("type") == "json_object":
            return {"role": "assistant", "content": '{"answer": 19, "city": "Paris"}'}, "stop"
        if "```json" in said:
            return {"role": "assistant", "content": '```json\n{"answer": 19}\n```'}, "stop"
        return {"role": "assistant", "content": "The answer is 19."}, "stop"

    def _send(self, kind: str, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def endpoint() -> Iterator[int]:
    """Run the scripted endpoint; yields its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


@contextmanager
def served(folder: Path, llm: str) -> Iterator[str]:
    """Run a real dmoa server whose agents run on an LLM; yields its URL."""
    pool, port = folder / "pool.yaml", free_port()
    pool.write_text(POOL.format(llm=llm), encoding="utf-8")
    log = folder / "serve.log"
    with log.open("w", encoding="utf-8") as told:
        command = [sys.executable, "-m", "dmoa", "serve", "--config", str(pool), "--port", str(port)]
        process = subprocess.Popen(command, stdout=told, stderr=told)
        try:
            until = time.monotonic() + START_S
            while "dmoa: ready at" not in log.read_text(encoding="utf-8"):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def cells_of(output: str) -> list[dict[str, str]]:
    """Return the cells that a client's script printed, a JSON line each."""
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"cell"')]


def run_client(name: str, command: list[str], folder: Path, url: str) -> list[dict[str, str]]:
    """Run a client's script; a script that breaks off is a cell of its own."""
    given = {"BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none", "OPENAI_BASE_URL": f"{url}/v1", "PYTHONWARNINGS": "ignore"}
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")} | given
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=CLIENT_S, check=False)
        cells, fault = cells_of(done.stdout), done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired as late:
        cells, fault = (
            cells_of((late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or ""),
            ["too slow"],
        )
    cells += [{"cell": "the script", "why": fault[0] if fault else ""}] if fault or not cells else []
    return [{"client": name, **cell} for cell in cells]


def install(name: str, packages: tuple[str, ...], envs: Path) -> str:
    """Make a client's environment unless it is there; returns why that failed, empty if it did not."""
    home = envs / name
    steps = [[sys.executable, "-m", "venv", str(home)], [str(home / "bin/pip"), "install", "-q", *packages]]
    if name == "ai_sdk":
        home.mkdir(parents=True, exist_ok=True)
        steps = [["npm", "init", "-y"], ["npm", "install", "--silent", *packages]]
    if (home / "made").exists():
        return ""
    for step in steps:
        done = subprocess.run(
            step, cwd=home if home.exists() else None, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
        if done.returncode:
            return f"cannot be installed: {(done.stderr or done.stdout).strip().splitlines()[-1][:200]}"
    (home / "made").touch()
    return ""


def matrix(pool: str, only: list[str], envs: Path) -> list[dict[str, str]]:
    """Run all clients, or those named, against a pool of `LLMS`."""
    found: list[dict[str, str]] = []
    clients = PYTHON | ({"ai_sdk": NODE} if shutil.which("npm") else {})
    with (
        tempfile.TemporaryDirectory() as temporary,
        endpoint() as port,
        served(Path(temporary), LLMS[pool].format(port=port)) as url,
    ):
        with urllib.request.urlopen(f"{url}/readyz") as ready:
            print(ready.read().decode(), flush=True)
        for name, packages in clients.items():
            if only and name not in only:
                continue
            started = time.monotonic()
            why = install(name, packages, envs)
            if why:
                found.append({"pool": pool, "client": name, "cell": "install", "why": why})
                continue
            script = HERE / (f"{name}.mjs" if name == "ai_sdk" else f"{name}_client.py")
            home = envs / name
            for file in (script, HERE / "cells.py"):
                shutil.copy(file, home)
            program = "node" if name == "ai_sdk" else str(home / "bin/python")
            for cell in run_client(name, [program, script.name], home, url):
                found.append({"pool": pool, **cell, "cannot": cannot(pool, cell)})
                state = "works" if not cell["why"] else "cannot" if found[-1]["cannot"] else "FAILS"
                print(f"{state}  {pool}, {name}: {cell['cell']}  {found[-1]['cannot'] or cell['why']}", flush=True)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return found


def cannot(pool: str, cell: dict[str, str]) -> str:
    """Return the sentence why a cell that failed cannot work on a pool, empty where nothing is known against it."""
    known = CANNOT.get(pool, {}).items() if cell["why"] else ()
    return next((why for pattern, why in known if re.search(pattern, cell["cell"])), "")


def versions(names: Iterable[str], envs: Path) -> dict[str, str]:
    """Return the packages of clients and the versions that were tried."""
    found = {}
    for name in names:
        if name == "ai_sdk":
            listed = {
                one: json.loads((envs / name / "node_modules" / one / "package.json").read_text())["version"] for one in NODE
            }
        else:
            told = subprocess.run(
                [envs / name / "bin/pip", "list", "--format", "json"], capture_output=True, text=True, check=True
            )
            listed = {one["name"].lower().replace("_", "-"): one["version"] for one in json.loads(told.stdout)}
        packages = NODE[:-1] if name == "ai_sdk" else [re.split(r"[=\[]", one)[0] for one in PYTHON[name]]
        found[name] = ", ".join(f"{package} {listed[package.lower()]}" for package in packages)
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return what came of a matrix as the table of the guide: a line a client, and why what does not work cannot."""
    pools = [pool for pool in LLMS if any(cell["pool"] == pool for cell in result["cells"])]
    lines = [f"| client | what was tried | {' | '.join(f'pool {pool}' for pool in pools)} |", "|---|---|" + "---|" * len(pools)]
    reasons: dict[str, str] = {}
    for client, packages in result["versions"].items():
        own = [cell for cell in result["cells"] if cell["client"] == client]
        tried = dict.fromkeys(cell["cell"] for cell in own)
        told = [_summary([cell for cell in own if cell["pool"] == pool], reasons) for pool in pools]
        lines.append(f"| {packages} | {'; '.join(tried)} | {' | '.join(told)} |")
    notes = [f"{mark}: {why}." for why, mark in reasons.items()]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _summary(cells: list[dict[str, str]], reasons: dict[str, str]) -> str:
    if not cells:
        return "not tried"
    works = sum(not cell["why"] for cell in cells)
    lost = [
        f"{cell['cell']} ({reasons.setdefault(cell.get('cannot') or cell['why'], chr(ord('a') + len(reasons)))})"
        for cell in cells
        if cell["why"]
    ]
    return "all" if not lost else f"{works} of {len(cells)}; not {', '.join(lost)}"


def write_table(path: Path, text: str) -> None:
    """Put the table where an earlier one is: from its first line to the last of its reasons."""
    guide = path.read_text(encoding="utf-8")
    path.write_text(TABLE.sub(lambda _: text, guide, count=1), encoding="utf-8")


TABLE = re.compile(r"^\| client \|.*(?:\n\|.*)*(?:\n\n?[a-z]: .*)*", re.MULTILINE)
FLAGS: dict[str, dict[str, Any]] = {
    "--envs": {"type": Path, "help": "where environments are made, and kept; else a temporary folder"},
    "--pool": {"choices": [*LLMS], "help": "what the agents run on, else one after the other"},
    "--docs": {"type": Path, "help": "a guide whose table of clients is written anew"},
    "only": {"nargs": "*", "help": "clients, such as litellm"},
}


def check(options: Namespace) -> dict[str, Any]:
    """Run the matrix. It fails if a cell neither works nor is in the list of those that cannot."""
    envs = (options.envs or options.scratch).absolute()
    cells = [cell for pool in ([options.pool] if options.pool else LLMS) for cell in matrix(pool, options.only, envs)]
    failed = [cell for cell in cells if cell["why"] and not cell.get("cannot")]
    working = sum(not cell["why"] for cell in cells)
    print(f"{working} of {len(cells)} cells work, {len(cells) - working - len(failed)} cannot, {len(failed)} fail")
    tried = [name for name in (*PYTHON, "ai_sdk") if any(cell["client"] == name and cell["cell"] != "install" for cell in cells)]
    found = {"versions": versions(tried, envs), "cells": cells, "passed": bool(cells) and not failed}
    if options.docs:
        write_table(options.docs, table(found))
    return found


if __name__ == "__main__":
    raise SystemExit(run_check(check, FLAGS))
