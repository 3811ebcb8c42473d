"""The page in a headless Chromium: every view, hostile texts, an admin's rollback, ten thousand traces, and axe-core's verdict.

Skips with its reason where Chromium is not installed. axe-core is found under AXE (a file, from npm); without it its part is
skipped. The pool is scripted and in this process: what is judged is the page and its routes.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

import httpx
import uvicorn

from dmoa.config import loads
from dmoa.serving.actors import pack_record
from dmoa.serving.http.middleware import ADMIN_VARIABLE, hash_keys
from tests.accept.browser import Tab, browser, executable
from tests.accept.checks import run_check
from tests.unit.serving.fake_service import make_app
from tests.unit.serving.pool_service import PoolService, pool_service
from tests.unit.serving.test_traces import answered

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> "
HOSTILE += "[x](javascript:alert(1)) \u202egnp.exe\u202c "
POOL = f"""
name: experts
llms:
  fake:
    model: scripted:fake
    engine: scripted
    engine_kwargs:
      delays_ms: {{adder: 60, writer: 120}}
      replies: {{adder: "The answer is 19.", writer: {json.dumps(HOSTILE + "x" * 2**20)}}}
agents:
  - {{name: adder, llm: fake, profile: Adds.}}
  - {{name: writer, llm: fake, profile: Writes.}}
  - {{name: coder, llm: fake, profile: Codes.}}
limits: {{max_steps: 3}}
router: {{num_traces: 20000, trace_mb: 1024}}
"""
GATES = {
    f"v{n}": {"adder": a, "writer": b, "coder": c}
    for n, (a, b, c) in enumerate([(0.1, 0.2, 0.7), (0.4, 0.5, 0.1), (0.6, 0.3, 0.1)], 1)
}
VIEWS = ("#/live", "#/play", "#/gates", "#/learn")


@contextmanager
def served(service: PoolService) -> Iterator[str]:
    """Serve the pool on a free port of this machine; `root` is an admin's key, everybody else comes without one."""
    app = make_app(service, admins=hash_keys({ADMIN_VARIABLE: "root"}, ADMIN_VARIABLE))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


def ask(url: str, text: str) -> str:
    """Ask the pool and return the trace's id."""
    body = {"model": "experts", "messages": [{"role": "user", "content": text}]}
    with httpx.Client(trust_env=False, timeout=60) as client:
        return str(client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()["dmoa"]["trace_id"])


def fill(service: PoolService, count: int) -> None:
    """Put made-up traces into the store, as fast as it takes them."""
    one = answered("t")

    async def put() -> None:
        for number in range(count):
            kept = replace(one, answer=replace(one.answer, trace_id=f"fill{number}"), created_unix_s=time.time() - 3600)
            await service.page.store.put_all([(pack_record(kept), "")])

    asyncio.run(put())


def first_paint_ms(tab: Tab, url: str) -> float:
    """Load the page anew; return when it first drew, once its list is there."""
    tab.open("about:blank")
    tab.open(f"{url}/#/live")
    tab.until("document.querySelectorAll('.rows .row').length > 0")
    return float(tab.run("performance.getEntriesByName('first-contentful-paint')[0].startTime"))


def query_view(tab: Tab, url: str, out: Path) -> dict[str, Any]:
    """A query of three steps, with a hostile reply of a megabyte; replayed by another gate, and branched."""
    trace = ask(url, f"What is 12 + 7? {HOSTILE}")
    tab.open("about:blank")
    tab.open(f"{url}/#/query/{trace}")
    tab.until("document.querySelectorAll('.step').length === 3")
    tab.run("document.querySelectorAll('.step details').forEach((one) => { one.open = true; })")
    tab.until("document.querySelectorAll('.step details pre').length > 5")
    tab.run("document.querySelectorAll('.step details details').forEach((one) => { one.open = true; })")
    text = tab.text()
    tab.choose("#what-kind", "gate_version")
    tab.type("#what-name", "v1")
    tab.click("#what-run")
    tab.until("document.body.innerText.includes('Whom v1 would have asked')")
    tab.screenshot(out / "query.png", whole=False)
    found = {
        "three_steps": text.count("agents that counted") == 3,
        "hostile_text_is_text": "<script>document.title='owned'</script>" in text and "U+202E" in text,
        "nothing_ran": not tab.run("document.title.includes('owned')"),
        "no_markup_of_agents": tab.run("document.querySelectorAll('main script, main img, main a[href^=javascript]').length")
        == 0,
        "a_long_text_is_cut_until_asked_for": "Show all" in text,
        "replayed": "coder" in tab.text("section[aria-label='What if'] table"),
    }
    before = tab.run("location.hash")
    tab.click(".branch")
    tab.until(f"location.hash !== {json.dumps(before)} && document.body.innerText.includes('branched_from')")
    return found | {"branched": True}


def playground(tab: Tab, url: str, out: Path) -> dict[str, Any]:
    """Two policies side by side, the steps as they come."""
    tab.open(f"{url}/#/play")
    tab.until("!!document.querySelector('#question')")
    tab.type("#question", "What is 12 + 7?")
    tab.choose("#second", "single")
    tab.click("#ask")
    tab.until("document.querySelectorAll('.stream li').length > 0")
    is_early = not tab.run("[...document.querySelectorAll('.column')].every((one) => one.innerText.includes('why it stopped'))")
    tab.until("[...document.querySelectorAll('.column')].every((one) => one.innerText.includes('why it stopped'))")
    tab.screenshot(out / "playground.png", whole=False)
    return {"steps_stream": is_early, "two_columns": tab.run("document.querySelectorAll('.column').length") == 2}


def gates(tab: Tab, url: str, out: Path) -> dict[str, Any]:
    """No button without an admin key; with one, two clicks roll back."""
    tab.open(f"{url}/#/gates")
    tab.until("document.body.innerText.includes('History, newest first')")
    plain = tab.run("document.querySelectorAll('.rollback').length")
    tab.run("sessionStorage.setItem('dmoa-api-key', 'root'); location.reload()")
    tab.until("document.querySelectorAll('.rollback').length === 2")
    tab.screenshot(out / "gates.png", whole=False)
    tab.click(".rollback")
    tab.click(".rollback")
    tab.until("document.querySelector('.history').innerText.startsWith('rollback')")
    tab.run("sessionStorage.clear()")
    return {"no_button_without_admin_key": plain == 0, "rolled_back": True}


def live(tab: Tab, url: str, service: PoolService, out: Path) -> dict[str, Any]:
    """Filters, first paint with a thousand traces, scrolling through ten thousand."""
    fill(service, 1000)
    paint_ms = first_paint_ms(tab, url)
    fill(service, 10_000)
    first_paint_ms(tab, url)
    script = "(async () => { const v = document.querySelector('.viewport'); const times = []; for (let i = 0; i < 60; i++) {"
    script += " const at = performance.now(); v.scrollTop = v.scrollHeight; await new Promise((r) => setTimeout(r, 60));"
    script += " await new Promise(requestAnimationFrame); times.push(performance.now() - at - 60); }"
    script += " return [Math.max(...times), document.querySelectorAll('.rows .row').length, v.scrollHeight]; })()"
    slowest_ms, drawn, height = tab.run(script)
    tab.run("document.querySelector('.viewport').scrollTop = 0")
    tab.screenshot(out / "live.png", whole=False)
    tab.choose("#policy", "single")
    tab.until("[...document.querySelectorAll('.rows .row')].every((one) => one.innerText.includes('single'))")
    return {
        "first_paint_ms": paint_ms,
        "slowest_scroll_ms": slowest_ms,
        "paints_within_a_second": paint_ms < 1000,
        "ten_thousand_scroll": height >= 10_000 * 46 and drawn < 100 and slowest_ms < 250,
        "filtered": tab.run("document.querySelectorAll('.rows .row').length") > 0,
    }


def narrow(tab: Tab, url: str, trace: str, out: Path) -> dict[str, Any]:
    """Every view on a telephone, in the dark: none is wider than the screen."""
    tab.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    widths = {}
    for view in (*VIEWS, f"#/query/{trace}"):
        tab.open("about:blank")
        tab.open(f"{url}/{view}")
        tab.until("!!document.querySelector('main h1')")
        widths[view.split("/")[1]] = tab.run("document.documentElement.scrollWidth")
        tab.screenshot(out / f"narrow-{view.split('/')[1]}.png")
    tab.send("Emulation.clearDeviceMetricsOverride")
    tab.send("Emulation.setEmulatedMedia", features=[])
    return {"fits_a_telephone": max(widths.values()) <= 390}


def axe(tab: Tab, url: str, trace: str) -> dict[str, Any]:
    """What axe-core finds serious in each view; empty where it is not at hand."""
    place = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))
    if not place.is_file():
        return {"axe": f"skipped: {place} is not there; npm install axe-core, or set AXE"}
    faults: dict[str, list[str]] = {}
    for view in (*VIEWS, f"#/query/{trace}"):
        tab.open("about:blank")
        tab.open(f"{url}/{view}")
        tab.until("!!document.querySelector('main h1')")
        tab.run(place.read_text(encoding="utf-8") + "; true")
        found = tab.run("axe.run().then((r) => r.violations.map((v) => [v.id, v.impact, v.nodes[0].html.slice(0, 200)]))")
        faults[view.partition("/")[2].partition("/")[0]] = [str(one) for one in found if one[1] in ("serious", "critical")]
    return {"axe": faults, "axe_finds_nothing_serious": not any(faults.values())}


def drive(out: Path) -> dict[str, Any]:
    """Drive the page and return what was found."""
    service = pool_service(loads(POOL), GATES)
    with served(service) as url, browser() as new_tab:
        tab = new_tab()
        trace = ask(url, "What is 12 + 7?")
        found = query_view(tab, url, out) | playground(tab, url, out) | gates(tab, url, out)
        found |= narrow(tab, url, trace, out) | axe(tab, url, trace) | live(tab, url, service, out)
        found["problems"] = tab.problems
    passed = all(value for name, value in found.items() if name not in ("problems", "axe", "slowest_scroll_ms"))
    return found | {"passed": passed and not tab.problems}


def check(options: Namespace) -> dict[str, Any]:
    """Drive the page where there is a browser; its pictures lie beside the JSON file."""
    out = options.json.parent / "page"
    out.mkdir(exist_ok=True)
    return drive(out) if executable() else {"passed": True, "skipped": "Chromium is not installed (apt-get install chromium)"}


if __name__ == "__main__":
    raise SystemExit(run_check(check))
