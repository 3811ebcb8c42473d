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
from fastapi import FastAPI

from dmoa.config import loads
from dmoa.evaluation.records import BenchmarkInfo, RunInfo
from dmoa.evaluation.run import finish_run
from dmoa.evaluation.run_folder import RunFolder
from dmoa.serving.actors import pack_record
from dmoa.serving.http.middleware import ADMIN_VARIABLE, hash_keys
from dmoa.serving.http.page import create_view
from dmoa.testing import answered as answered_row
from dmoa.testing import run_info, scored, write_run
from dmoa.trace import write_traces
from dmoa.tracking import open_tracker
from dmoa.workflows.view import Folder
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
  - {{name: writer, llm: fake, profile: Writes., sampling: {{max_tokens: 16384}}}}
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
    with listening(make_app(service, admins=hash_keys({ADMIN_VARIABLE: "root"}, ADMIN_VARIABLE))) as url:
        yield url


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


def ask(url: str, text: str) -> str:
    """Ask the pool and return the trace's id."""
    body = {"model": "experts", "messages": [{"role": "user", "content": text}]}
    with httpx.Client(trust_env=False, timeout=60) as client:
        return str(client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()["dmoa"]["trace_id"])


def fill(tab: Tab, service: PoolService, count: int) -> None:
    """Put made-up traces into the store, as fast as it takes them."""
    one = answered("t")

    async def put() -> None:
        for number in range(count):
            kept = replace(one, answer=replace(one.answer, trace_id=f"fill{number}"), created_unix_s=time.time() - 3600)
            await service.page.store.put_all([(pack_record(kept), "")])

    tab.open("about:blank")  # the page reads the store, in another thread
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
    fill(tab, service, 1000)
    paint_ms = first_paint_ms(tab, url)
    fill(tab, service, 10_000)
    first_paint_ms(tab, url)
    script = "(async () => { const v = document.querySelector('.viewport'); const times = []; for (let i = 0; i < 400; i++) {"
    script += " if (v.scrollHeight >= 10000 * 46) break;"
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


def write_runs(folder: Path) -> None:
    """Write traces, a training of forty steps and an evaluation of three policies on two benchmarks, as commands do."""
    write_traces(folder / "traces.jsonl", [answered(f"disk{number}", at_s=number).trace() for number in range(9)])
    tracker = open_tracker("jsonl", run_dir=folder / "train", name="train", config={"command": "dmoa train --preset few-shot"})
    for step in range(40):
        losses = {
            "train/loss": 0.7 * 0.94**step + 0.02 * (step % 3),
            "held/held_loss": 0.72 * 0.95**step,
            "pace": 30.0 + step % 7,
        }
        tracker.log(losses | {f"choices/{name}": 0.2 + 0.01 * step * place for place, name in enumerate("abc")}, step=step)
    tracker.log({"held_back_accuracy": 0.81})
    tracker.finish()
    info = run_info(
        [BenchmarkInfo(name=name, title=name.title(), rows=40) for name in ("arith", "words")],
        policies=("dmoa", "single", "dense"),
    )
    paths = write_evaluation(folder / "runs" / "evaluation", info, lost=0)
    for count in range(3):
        changes = {"options": {"adversaries": count, "kind": "liar", "defence": "none"}}
        write_evaluation(paths.curve(count, "none"), info.model_copy(update=changes), lost=count)
    finish_run(paths)


def write_evaluation(root: Path, info: RunInfo, *, lost: int) -> RunFolder:
    """Write answers and scores of forty rows a benchmark, of which each policy has so many in ten right, `lost` fewer."""
    right, tokens = {"dmoa": 9, "single": 6, "dense": 7}, {"dmoa": 150, "single": 60, "dense": 420}
    cells = [(name.name, policy, number) for name in info.benchmarks for policy in info.policies for number in range(40)]
    answers = [answered_row(name, number, policy, prompt_tokens=tokens[policy]) for name, policy, number in cells]
    scores = [
        scored(name, number, policy, float(number % 10 < right[policy] - lost - (name == "words")))
        for name, policy, number in cells
    ]
    return write_run(root, info, answers, scores)


def screens(tab: Tab, places: dict[str, str], out: Path) -> dict[str, Any]:
    """Every view by name and address, wide and on a telephone, light and dark: what axe-core finds, and its width."""
    place = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))
    has_axe, widths, faults = place.is_file(), dict[str, int](), dict[str, list[str]]()
    for name, address in places.items():
        for width, colours in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            tab.send("Emulation.setDeviceMetricsOverride", **size)
            tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colours}])
            tab.open("about:blank")
            tab.open(address)
            tab.until("!!document.querySelector('main h1') && !document.querySelector('main[aria-busy]')")
            seen = f"{name}-{width}-{colours}"
            widths[seen] = tab.run("document.documentElement.scrollWidth") - width
            tab.screenshot(out / f"{seen}.png", whole=width < 500)
            if has_axe:
                tab.run(place.read_text(encoding="utf-8") + "; true")
                found = tab.run("axe.run().then((r) => r.violations.map((v) => [v.id, v.impact, v.nodes[0].html.slice(0, 200)]))")
                faults[seen] = [str(one) for one in found if one[1] in ("serious", "critical")]
    tab.send("Emulation.clearDeviceMetricsOverride")
    tab.send("Emulation.setEmulatedMedia", features=[])
    judged = {"axe_finds_nothing_serious": not any(faults.values())} if has_axe else {}
    skipped = f"skipped: {place} is not there; npm install axe-core, or set AXE"
    axe = {seen: told for seen, told in faults.items() if told} if has_axe else skipped
    return {"fits_every_screen": max(widths.values()) <= 0, "screens": len(widths), "axe": axe, **judged}


def runs(tab: Tab, url: str) -> dict[str, Any]:
    """Curves of a training and the figures of an evaluation, from files on disk."""
    tab.open(f"{url}/#/learn/train")
    tab.until("document.querySelectorAll('svg.chart').length > 3")
    curves = tab.text()
    tab.open(f"{url}/#/learn/runs%2Fevaluation")
    tab.until("document.querySelectorAll('svg.chart').length === 4")  # accuracy and robustness of two benchmarks
    return {"curves_of_a_training": "held_loss" in curves and "0.81" in curves, "an_evaluation": "tokens a row" in tab.text()}


def drive(folder: Path, out: Path) -> dict[str, Any]:
    """Drive the page and return what was found."""
    service = pool_service(loads(POOL), GATES)
    write_runs(folder)
    with served(service) as url, listening(create_view(Folder(folder))) as view, browser() as new_tab:
        tab = new_tab()
        trace = ask(url, "What is 12 + 7?")
        found = query_view(tab, url, out) | playground(tab, url, out) | gates(tab, url, out) | runs(tab, view)
        places = {name.split("/")[1]: f"{url}/{name}" for name in (*VIEWS, f"#/query/{trace}")}
        places |= {"disk": f"{view}/#/live", "runs": f"{view}/#/learn", "training": f"{view}/#/learn/train"}
        places["evaluation"] = f"{view}/#/learn/runs%2Fevaluation"
        found |= screens(tab, places, out) | live(tab, url, service, out)
        found["problems"] = tab.problems
    passed = all(value for name, value in found.items() if name not in ("problems", "axe", "slowest_scroll_ms"))
    return found | {"passed": passed and not tab.problems}


def check(options: Namespace) -> dict[str, Any]:
    """Drive the page where there is a browser; its pictures lie beside the JSON file."""
    out = options.json.parent / "page"
    out.mkdir(exist_ok=True)
    skipped = {"passed": True, "skipped": "Chromium is not installed (apt-get install chromium)"}
    return drive(options.scratch, out) if executable() else skipped


if __name__ == "__main__":
    raise SystemExit(run_check(check))
