"""The page beside a *real* `dmoa serve` that is slow, wants keys, goes away and comes back, with ten thousand traces on disk.

Skips with its reason where Chromium is not installed. The agents are scripted: what is judged is what a person is told.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

import httpx

from dmoa.config import RouterConfig
from dmoa.serving.actors import pack_record
from dmoa.serving.http.middleware import hash_keys
from dmoa.serving.traces import TraceStore
from tests.accept.browser import Tab, browser, executable
from tests.accept.checks import run_check
from tests.integration.server import Served, free_port, serve
from tests.unit.serving.test_traces import answered

KEY, ADMIN = "a-key", "an-admin-key"
KEYS = {"DMOA_API_KEYS": KEY, "DMOA_ADMIN_KEYS": ADMIN}
TRACES, ROW_PX = 10_000, 46
POOL = """
name: slowly
llms:
  fake: {{model: "scripted:fake", engine: scripted, engine_kwargs: {{delay_ms: 1500, replies: {{a: "19", b: "20", c: "21"}}}}}}
agents: [{{name: a, llm: fake, profile: Adds.}}, {{name: b, llm: fake, profile: Adds.}}, {{name: c, llm: fake, profile: Adds.}}]
limits: {{max_steps: 5}}
router: {{trace_uri: "{traces}", num_traces: 20000, trace_mb: 1024}}
"""


def fill(bounds: RouterConfig) -> None:
    """Write made-up traces of the key to the place from which the server takes them when it starts."""
    (key_hash,) = hash_keys({"DMOA_API_KEYS": KEY}, "DMOA_API_KEYS")
    one = answered("t")

    async def put() -> None:
        store = TraceStore(bounds)
        for number in range(TRACES):
            kept = replace(
                one, answer=replace(one.answer, trace_id=f"fill{number}"), created_unix_s=time.time() - 3600 + number / 100
            )
            await store.put_all([(pack_record(kept), key_hash)])
        await store.save()

    asyncio.run(put())


def give_key(tab: Tab, key: str) -> None:
    """Answer the dialog that asks for a key."""
    tab.until("!!document.querySelector('dialog[open] #key-field')")
    tab.type("#key-field", key)
    tab.click("dialog .first")


def keys(tab: Tab, url: str) -> dict[str, Any]:
    """No key, one that is wrong, none after all, then the right one; a dialog that was cancelled does not come back by itself."""
    tab.open(f"{url}/#/live")
    give_key(tab, "wrong")
    tab.until("document.querySelector('dialog[open]')?.innerText.includes('not known here')")
    tab.click("dialog button[type=button]")
    tab.until("!!document.querySelector('main .problem')")
    told = tab.text("main .problem")
    time.sleep(6)  # longer than the page's period
    is_quiet = not tab.run("!!document.querySelector('dialog')")
    tab.click("#key")
    give_key(tab, KEY)
    tab.until("document.querySelectorAll('.rows .row').length > 10", 60)
    return {"wrong_key_is_told": "key" in told.lower(), "cancelled_dialog_stays_away": is_quiet}


def many(tab: Tab) -> dict[str, Any]:
    """Ten thousand traces of a real server scroll."""
    script = "(async () => { const v = document.querySelector('.viewport'); for (let i = 0; i < 400; i++) {"
    script += f" v.scrollTop = v.scrollHeight; if (v.scrollHeight >= {TRACES * ROW_PX}) break;"
    script += " await new Promise((r) => setTimeout(r, 50)); }"
    script += " return [v.scrollHeight, document.querySelectorAll('.rows .row').length]; })()"
    height, drawn = tab.run(script)
    tab.run("document.querySelector('.viewport').scrollTop = 0")
    return {"all_traces_scroll": height >= TRACES * ROW_PX and drawn < 100}


def lost_queries(tab: Tab, url: str) -> dict[str, Any]:
    """A trace that is gone, an address that is none, a trace from disk."""
    found = {}
    for name, address, wanted in (
        ("deleted_trace", "#/query/0123456789abcdef0123456789abcdef", "main .problem"),
        ("malformed_address", "#/query/%E0%A4%A", "main .problem"),
        ("trace_from_disk", "#/query/fill7", ".step"),
    ):
        tab.open("about:blank")
        tab.open(f"{url}/{address}")
        tab.until(f"!!document.querySelector({json.dumps(wanted)})")
        found[name] = True
    return found


def copied(tab: Tab, url: str, folder: Path) -> dict[str, Any]:
    """What is copied of a query runs in a shell: the question asked again with its system message, and the decisions replayed."""
    body = {
        "model": "slowly",
        "messages": [{"role": "system", "content": 'It\'s "exact".'}, {"role": "user", "content": "What is 12 + 7? $HOME `id`"}],
        "dmoa": {"max_steps": 1},
    }
    with httpx.Client(trust_env=False, timeout=120, headers={"Authorization": f"Bearer {KEY}"}) as client:
        trace = client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()["dmoa"]["trace_id"]
        tab.open("about:blank")
        tab.open(f"{url}/#/query/{trace}")
        tab.until("document.querySelectorAll('.actions button').length >= 3")
        tab.run("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
        texts = {}
        for name in ("JSON", "curl", "replay command"):
            tab.run(f"[...document.querySelectorAll('button')].find((one) => one.innerText === 'Copy {name}').click()")
            texts[name] = tab.until("window.copied")
            tab.run("delete window.copied")
        env = os.environ | {"DMOA_API_KEY": KEY, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        shell = {"cwd": folder, "env": env, "capture_output": True, "text": True, "timeout": 300, "check": True}
        asked = json.loads(subprocess.run(["bash", "-c", texts["curl"]], **shell).stdout)["dmoa"]["trace_id"]
        again = client.get(f"{url}/v1/dmoa/traces/{asked}").raise_for_status().json()["query"]
        replayed = subprocess.run(["bash", "-c", texts["replay command"]], **shell).stdout
    first = json.loads(texts["JSON"])["query"]
    return {
        "curl_asks_the_same": all(again[name] == first[name] for name in ("text", "system", "turns", "sampling", "limits")),
        "replay_is_identical": "identical" in replayed,
    }


def stopped(tab: Tab, url: str) -> dict[str, Any]:
    """A slow answer whose steps come one by one is stopped, and a second one goes on meanwhile."""
    tab.open(f"{url}/#/play")
    tab.until("!!document.querySelector('#question')")
    tab.type("#question", "What is 12 + 7?")
    tab.click("#ask")
    tab.until("document.querySelectorAll('.stream li').length > 0")
    tab.click("#ask")
    tab.until("document.querySelectorAll('.stream li').length > 0")
    is_offered = not tab.run("document.querySelector('.ask button[type=button]').hidden")
    tab.click(".ask button[type=button]")
    tab.until("document.querySelector('.column').innerText.includes('stopped')")
    return {"stop_is_offered_for_the_second": is_offered, "stopped": True}


def outage(tab: Tab, url: str, server: Served, again: Any, out: Path) -> tuple[dict[str, Any], Served]:
    """The server ends while an answer streams and the list is open, and another takes its place."""
    tab.type("#question", "What is 12 + 7?")
    tab.click("#ask")
    tab.until("document.querySelectorAll('.stream li').length > 0")
    for process in server.processes("ray::ProxyActor"):
        process.kill()
    tab.until("!!document.querySelector('.column .problem')", 30)
    told = tab.text(".column .problem")
    tab.run("location.hash = '#/live'")
    tab.until("document.querySelectorAll('.rows .row').length > 10", 60)
    before = tab.text(".rows .row")
    server.stop()
    tab.until("[...document.querySelectorAll('main .problem')].some((one) => one.innerText.includes('What is shown is of'))", 30)
    is_kept = tab.text(".rows .row") == before
    tab.screenshot(out / "outage.png", whole=False)
    server = again()
    with httpx.Client(trust_env=False, timeout=120, headers={"Authorization": f"Bearer {KEY}"}) as client:
        body = {"model": "slowly", "messages": [{"role": "user", "content": "After the outage"}], "dmoa": {"max_steps": 1}}
        client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    tab.until(
        "!document.querySelector('main .problem') && document.querySelector('.rows').innerText.includes('After the outage')", 60
    )
    found = {"cut_stream_is_told": "ask again" in told or "does not answer" in told, "list_stays": is_kept, "list_goes_on": True}
    return found, server


def drive(folder: Path, out: Path) -> dict[str, Any]:
    """Drive the page and return what was found."""
    bounds = RouterConfig(trace_uri=(folder / "traces").as_uri(), num_traces=20000, trace_mb=1024)
    fill(bounds)
    pool, port = folder / "pool.yaml", free_port()
    pool.write_text(POOL.format(traces=bounds.trace_uri), encoding="utf-8")

    def start() -> Served:
        return serve(pool, env=KEYS, port=port)

    with browser() as new_tab:
        server, tab = start(), new_tab()
        try:
            url = server.url
            found = keys(tab, url) | many(tab)
            found |= lost_queries(tab, url) | copied(tab, url, folder) | stopped(tab, url)
            more, server = outage(tab, url, server, start, out)
            found |= more
        finally:
            server.stop()
    return found | {"problems": tab.problems, "passed": all(found.values()) and not tab.problems}


def check(options: Namespace) -> dict[str, Any]:
    """Drive the page where there is a browser; its picture lies beside the JSON file."""
    out = options.json.parent / "page"
    out.mkdir(exist_ok=True)
    skipped = {"passed": True, "skipped": "Chromium is not installed (apt-get install chromium)"}
    return drive(options.scratch, out) if executable() else skipped


if __name__ == "__main__":
    raise SystemExit(run_check(check))
