"""Rivals on the same agents: recorded pools in one table, adversaries of each kind, and the runtime beside a plain script.

    python tests/accept/accept_rivals.py --json out/accept/rivals.json --lines recorded,attacked,overhead,adversaries

`recorded` and `attacked` need the folder of recorded replies (`DMOA_RECORDED`, else `shared/outcomes` beside the repository).
`adversaries` asks six specialists in this process; what they answer is kept in `--folder`. Figures are written as measured.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, neither is importable by itself
sys.path.insert(0, str(Path(__file__).parents[2] / "jobs" / "study"))

from label_model import NAMES, Material, answer, lines, load, with_outcomes
from study_posterior import trained
from study_replies import first_step, replies, rows_of

from dmoa.agents.adversaries import KINDS, Adversaries, corrupted
from dmoa.agents.embedder import MiniLmEncoder
from dmoa.agents.pool import load_pool
from dmoa.config import Config
from dmoa.core.aggregate import select_contribution
from dmoa.core.defences import barred
from dmoa.core.forms import agreement_key
from dmoa.core.label_model import fit_label_model
from dmoa.core.sequential import AGENT_PRICE
from dmoa.core.witnesses import NO_ANSWER, Witnesses
from dmoa.engines import models
from dmoa.engines.recorded import agent_name
from dmoa.errors import DmoaError
from dmoa.evaluation.answering import Asking, query_of_task
from dmoa.evaluation.records import Reply, Task
from dmoa.evaluation.registry import SUITES
from dmoa.evaluation.statistics import compare_policies, interval
from dmoa.policies.registry import POLICIES, split_policy
from dmoa.protocols import Encoder, final_answer
from dmoa.storage import write_whole
from dmoa.swarm import Swarm
from dmoa.types import AgentCall, AgentReply, Answer, Defence, FloatArray, Limits, Message, Sampling
from dmoa.workflows.backends import build_local_swarm
from tests.unit.agents.openai_server import Call, playing
from tests.unit.policies.test_outside import QUESTION, Script, counted, swarm_of

ROOT = Path(__file__).parents[2]
IN_FLIGHT = 8
LEARN, SEED = 100, 0
MOST_LOST, MOST_OVERHEAD = 0.03, 0.10
Figures = dict[str, Any]
Judge = Callable[[int, str], float]


class Remembering:
    """An encoder that embeds a text once, so that many policies over the same rows cost one embedding a row."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[str, FloatArray] = {}

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        """Return the embeddings, in order."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known |= dict(zip(new, await self._encoder.embed(new) if new else [], strict=True))
        return [self._known[text] for text in texts]


async def ask_all(swarm: Swarm, policy: str, tasks: Sequence[Task], limits: Limits) -> list[Answer | DmoaError]:
    """Return the answer of a policy to each task, or why there is none: one lost query does not end a table."""
    asking, room = Asking(seed=SEED, limits=limits, ends_schedules=True), asyncio.Semaphore(IN_FLIGHT)

    async def one(task: Task) -> Answer | DmoaError:
        async with room:
            try:
                return await final_answer(swarm, query_of_task(task, policy, asking), *split_policy(policy))
            except DmoaError as error:
                return error

    return list(await asyncio.gather(*map(one, tasks)))


def figures(values: Sequence[float], calls: Sequence[float], tokens: Sequence[float], wall_s: float = 0.0) -> Figures:
    """Return accuracy with its interval, and what a query takes."""
    found = interval(values)
    return {
        "n": len(values),
        "accuracy": round(found.value, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
        "calls": round(float(np.mean(calls)), 2),
        "tokens": round(float(np.mean(tokens)), 1),
        "seconds": round(wall_s / max(1, len(values)), 3),
    }


def of_answers(answers: Sequence[Answer | DmoaError], judge: Judge) -> Figures:
    """Return the figures of a policy's answers, with the value of each row; a query without an answer is wrong, and counted."""
    lost = [str(found)[-300:] for found in answers if isinstance(found, DmoaError)]
    values = [judge(number, found.text) if isinstance(found, Answer) else 0.0 for number, found in enumerate(answers)]
    calls = [sum(len(step.calls) for step in found.steps) for found in answers if isinstance(found, Answer)]
    tokens = [found.usage.total for found in answers if isinstance(found, Answer)]
    said = {"lost": len(lost), "first_lost": lost[0]} if lost else {}
    return figures(values, calls or [0], tokens or [0]) | said | {"values": values}


def recorded_pool(path: Path, agents: Sequence[str]) -> Config:
    """Return the pool of a file of recorded replies."""
    llm = {"model": "recorded:replies", "engine": "recorded", "engine_kwargs": {"replies": str(path)}}
    return Config.model_validate(
        {
            "name": "recorded",
            "llms": {"r": llm},
            "agents": [{"name": agent_name(name), "llm": "r", "profile": "Answers."} for name in agents],
            "limits": {"max_steps": 1},
            "gate": {"activation": {"max_agents": 3}},
        }
    )


def write_judged(path: Path, material: Material, texts: Sequence[str], rows: Sequence[int]) -> Path:
    """Write some rows' replies as labels that routers learn from."""
    judged = [
        {"query": texts[row], "agent": agent_name(name), "reward": float(material.right_RA[row, column])}
        for row in rows
        for column, name in enumerate(material.agents)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in judged), encoding="utf-8")
    return path


def sample(source: Path, name: str, out: Path, count: int) -> Path:
    """Return a folder with some queries of a recorded pool, drawn by the seed; written whole, one for each count."""
    folder = out / f"recorded-{count}"
    if not (folder / f"{name}.labels.jsonl.gz").exists():
        ids = np.array(sorted({row["query_id"] for row in lines(source / f"{name}.labels.jsonl.gz")}))
        kept = set(np.random.default_rng(SEED).permutation(ids)[:count].tolist())
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("replies", "labels"):
            found = (row for row in lines(source / f"{name}.{kind}.jsonl.gz") if row["query_id"] in kept)
            text = "".join(json.dumps(row) + "\n" for row in found)
            write_whole(folder / f"{name}.{kind}.jsonl.gz", gzip.compress(text.encode()))
    return folder


def recorded(source: Path, out: Path, limit: int) -> Figures:
    """Every first-step policy on the recorded pools; dmoa's label model and label-trained routers with 0, 20 and 100 outcomes."""
    encoder, found = MiniLmEncoder(models.fetch("minilm")), {}
    for name in NAMES:
        folder = sample(source, name, out, LEARN + limit)
        found[name] = recorded_suite(folder, name, encoder, out, limit)
        print(name, json.dumps(found[name], indent=1), flush=True)
    return found


def recorded_suite(folder: Path, name: str, encoder: MiniLmEncoder, out: Path, limit: int) -> Figures:
    """Return the table of one recorded pool: 100 queries to learn from, and others to answer."""
    material, source = load(folder, name, encoder), lines(folder / f"{name}.replies.jsonl.gz")
    text_of = {row["query_id"]: row["query"] for row in source}
    ids = sorted(text_of)
    texts = [text_of[query_id] for query_id in ids]
    gold = {row["query_id"]: row["answer"].removeprefix("# ") for row in lines(folder / f"{name}.labels.jsonl.gz")}
    rows = np.random.default_rng(SEED).permutation(len(ids))
    learn, test = rows[:LEARN], rows[LEARN:][:limit]
    truth = [agreement_key(json.dumps({"answer": gold[ids[row]]}), texts[row]) for row in test]

    def judge(number: int, text: str) -> float:
        key = agreement_key(text, texts[test[number]])
        return float(key is not None and key == truth[number])

    agents = [agent_name(agent) for agent in material.agents]
    policies = [*(f"single:{agent}" for agent in agents), "dense", "random", "random_router", "majority_k:k=3", "majority_k:k=64"]
    policies += ["free_agency", "knapsack", "capacity_aware:inner=majority_k"]
    for count in (20, LEARN):
        data = write_judged(out / f"{name}-{count}.jsonl", material, texts, learn[:count])
        policies += [f"{router}:data={data}" for router in ("bandit", "knn_router", "linear_router", "kmeans")]
    tasks = [Task(row_id=ids[row], benchmark=name, text=texts[row]) for row in test]
    table: dict[str, Figures] = {}
    swarm = build_local_swarm(recorded_pool(folder / f"{name}.replies.jsonl.gz", material.agents), lambda text: None)
    swarm.encoder = Remembering(swarm.encoder)

    async def run() -> None:
        for policy in policies:
            table[policy.split(":data=")[0] + labels_of(policy)] = of_answers(
                await ask_all(swarm, policy, tasks, Limits(max_steps=1)), judge
            )
        await swarm.close()

    asyncio.run(run())
    rng = np.random.default_rng(SEED)
    for count in (0, 20, LEARN):
        witnesses = with_outcomes(material, learn[:count], rng) if count else material.witnesses
        found, _ = answer(fit_label_model(witnesses.rows(learn), seed=SEED), material, test, AGENT_PRICE)
        values = found.right.astype(float).tolist()
        table[f"dmoa, {count} outcomes"] = figures(values, found.calls.tolist(), [0.0]) | {"values": values}
    own = table["dmoa, 0 outcomes"]["values"]
    for entry in table.values():
        against = compare_policies(own, entry.pop("values"))
        entry["dmoa_minus_it"] = [round(x, 4) for x in (against.difference, against.low, against.high, against.p)]
    best = max((key for key in table if key.startswith("single:")), key=lambda key: table[key]["accuracy"])
    return {"agents": len(agents), "best_single": best, "table": table}


def labels_of(policy: str) -> str:
    """Return how many labelled queries a router learnt from, in words."""
    return f", labels of {policy.rsplit('-', 1)[1].removesuffix('.jsonl')} queries" if ":data=" in policy else ""


DEFENCES: tuple[Defence, ...] = ("none", "agreement", "cluster_filter", "dropout_cluster")
SIX = 6


def attacked(source: Path, out: Path, limit: int) -> Figures:
    """Six recorded agents, none to three of which work against the others: dmoa's label model, and votes with each defence.

    The model is fitted to unlabelled queries under the same attack. No entropies are recorded: `confident_liar` is `liar` here.
    """
    found: Figures = {}
    for name in NAMES:
        folder = sample(source, name, out, LEARN + limit)
        rows = lines(folder / f"{name}.replies.jsonl.gz")
        agents = sorted({row["agent"] for row in rows})[:SIX]
        text_of = {row["query_id"]: row["query"] for row in rows}
        ids = sorted(text_of)
        said = {(row["query_id"], row["agent"]): row["text"] for row in rows}
        gold = {row["query_id"]: row["answer"].removeprefix("# ") for row in lines(folder / f"{name}.labels.jsonl.gz")}
        truth = [agreement_key(json.dumps({"answer": gold[query_id]}), text_of[query_id]) for query_id in ids]
        order = np.random.default_rng(SEED).permutation(len(ids))
        found[name] = {"agents": agents}
        for kind in ("none", *(kind for kind in KINDS if kind != "confident_liar")):
            for count in (1, 2, 3) if kind != "none" else (0,):
                kinds = ["none"] * (SIX - count) + [kind] * count
                replies_RA = [
                    [
                        reply_under(said.get((query_id, agent), ""), agent, text_of[query_id], as_what)
                        for agent, as_what in zip(agents, kinds, strict=True)
                    ]
                    for query_id in ids
                ]
                table = votes(replies_RA, [text_of[query_id] for query_id in ids], truth, order)
                found[name][f"{kind} x {count}"] = table
                print(name, kind, count, {policy: entry["accuracy"] for policy, entry in table.items()}, flush=True)
    return found


def reply_under(text: str, agent: str, asked: str, kind: str) -> AgentReply:
    """Return a recorded reply, or what an adversary makes of it."""
    reply = AgentReply(agent=agent, status="ok", text=text)
    call = AgentCall(trace_id="", step=0, agent=agent, messages=(Message(role="user", content=asked),), sampling=Sampling())
    return reply if kind == "none" else corrupted(reply, call, kind)  # type: ignore[arg-type]


def votes(
    replies_RA: Sequence[Sequence[AgentReply]], asked: Sequence[str], truth: Sequence[str | None], order: Any
) -> dict[str, Figures]:
    """Return the figures of the label model and of votes with each defence."""
    keys_RA = [[agreement_key(reply.text, text) for reply in row] for row, text in zip(replies_RA, asked, strict=True)]
    classes_RA = np.full((len(keys_RA), SIX), NO_ANSWER)
    for number, keys in enumerate(keys_RA):
        place = {key: at for at, key in enumerate(dict.fromkeys(key for key in keys if key is not None))}
        classes_RA[number] = [NO_ANSWER if key is None else place[key] for key in keys]
    right_RA = np.array([[key is not None and key == truth[r] for key in keys] for r, keys in enumerate(keys_RA)])
    unknown_RA = np.full(right_RA.shape, np.nan)
    length_RA = np.array([[float(len(reply.text)) for reply in row] for row in replies_RA])
    witnesses = Witnesses(answer_RA=classes_RA, doubt_RA=unknown_RA, length_RA=length_RA, outcome_RA=unknown_RA)
    material = Material(agents=tuple(reply.agent for reply in replies_RA[0]), witnesses=witnesses, right_RA=right_RA)
    learn, test = order[:LEARN], order[LEARN:]
    own, _ = answer(fit_label_model(witnesses.rows(learn), seed=SEED), material, test, AGENT_PRICE)
    table = {"dmoa": figures(own.right.astype(float).tolist(), own.calls.tolist(), [0.0])}
    for defence in DEFENCES:
        values = []
        for row in test:
            chosen = select_contribution(barred(replies_RA[row], defence, asked=asked[row]), asked=asked[row])
            key = agreement_key(chosen.text, asked[row]) if chosen else None
            values.append(float(key is not None and key == truth[row]))
        table[f"vote of six, {defence}"] = figures(values, [float(SIX)], [0.0])
    return table


ATTACKED = ("dmoa", "majority_k:k=6", "moa:layers=2", "debate:rounds=1", "complete")


def adversaries(folder: Path, per_suite: int, defences: Sequence[str], counts: Sequence[int]) -> Figures:
    """One adversary of each kind among the six specialists: what each policy loses. The gate learns under attack, without labels.

    The adversary is the pool's last agent; rows of its own suite are left out, which without it nobody could answer.
    """
    config = first_step(load_pool("specialists"))
    trained(replies(rows_of("gate", 10, 1), config, folder, "gate-rows"), config, "posterior", 0, folder / "posterior")
    checkpoint = next((folder / "posterior" / "gate").glob("**/gate.json")).parent
    lost = set(config.agent_names[len(config.agents) - max(counts) :])
    rows = [row for row in rows_of("test", per_suite, 17) if row.task.benchmark not in lost]
    tasks = [row.task for row in rows]

    def judge(number: int, text: str) -> float:
        label = rows[number].label
        assert label is not None
        return SUITES[tasks[number].benchmark].score(label, Reply(text=text)).value

    config = config.model_copy(update={"gate": config.gate.model_copy(update={"checkpoint": str(checkpoint)})})
    found: dict[str, Any] = {"rows": len(rows), "left_out": sorted(lost), "table": {}}
    arms = [("none", 0), *((kind, count) for count in counts for kind in KINDS)]
    for kind, count in arms:
        for defence in defences if count else ("none",):
            summarizer = config.summarizer.model_copy(update={"defence": defence})
            pool = config.model_copy(update={"summarizer": summarizer})
            enemies = Adversaries(count=count, kind=kind) if count else None  # type: ignore[arg-type]
            found["table"][f"{kind} x {count}, {defence}"] = asyncio.run(_attacked(pool, folder, enemies, tasks, judge))
            print(kind, count, defence, found["table"][f"{kind} x {count}, {defence}"], flush=True)
    honest = found["table"]["none x 0, none"]
    found["lost"] = {
        arm: {policy: round(honest[policy]["accuracy"] - entry["accuracy"], 4) for policy, entry in table.items()}
        for arm, table in found["table"].items()
    }
    with_one = {arm: table for arm, table in found["lost"].items() if " x 1, none" in arm}
    found["passed"] = all(
        table["dmoa"] <= MOST_LOST and table["dmoa"] <= min(table[rival] for rival in ATTACKED[2:]) for table in with_one.values()
    )
    return found


async def _attacked(
    config: Config, folder: Path, enemies: Adversaries | None, tasks: Sequence[Task], judge: Judge
) -> dict[str, Figures]:
    swarm = build_local_swarm(config, lambda text: None, folder / "calls", None, enemies)
    try:
        found = {policy: of_answers(await ask_all(swarm, policy, tasks, Limits(max_steps=1)), judge) for policy in ATTACKED}
    finally:
        await swarm.close()
    return {policy: {name: value for name, value in entry.items() if name != "values"} for policy, entry in found.items()}


def overhead(queries: int, delay_s: float) -> Figures:
    """Return wall time of eight concurrent queries through the runtime, beside a plain script of the same calls.

    The endpoint stands in for an engine: it answers after a set time, so that what differs is the runtime's own work. Processor
    time is that of this process, the endpoint's included.
    """

    async def slow(call: Call) -> None:
        await asyncio.sleep(delay_s)
        await counted(call)

    async def measure(policy: str, use_script: bool) -> tuple[float, float, int, int]:
        async with playing(slow) as server:
            script = Script(server.url)
            room = asyncio.Semaphore(IN_FLIGHT)
            swarm = None if use_script else swarm_of(server.url)
            tokens = 0

            async def one(number: int) -> None:
                nonlocal tokens
                async with room:
                    if swarm is None:
                        await (script.moa() if policy == "moa" else script.self_consistency())
                    else:
                        task = Task(row_id=str(number), benchmark="b", text=QUESTION)
                        query = query_of_task(task, policy, Asking(seed=0, limits=Limits(max_steps=9)))
                        answer = await final_answer(swarm, query, *split_policy(policy))
                        tokens += answer.usage.total

            started, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*map(one, range(queries)))
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            if swarm is not None:
                await swarm.close()
            return seconds, cpu, len(server.calls), script.tokens if use_script else tokens

    found: Figures = {}
    for policy in ("moa", "self_consistency:b"):
        by_script, by_runtime = asyncio.run(measure(policy, True)), asyncio.run(measure(policy, False))
        found[policy] = {
            "script": dict(zip(("seconds", "cpu_s", "calls", "tokens"), by_script, strict=True)),
            "runtime": dict(zip(("seconds", "cpu_s", "calls", "tokens"), by_runtime, strict=True)),
            "overhead": round(by_runtime[0] / by_script[0] - 1, 4),
        }
    found["passed"] = all(
        entry["script"]["calls"] == entry["runtime"]["calls"]
        and entry["script"]["tokens"] == entry["runtime"]["tokens"]
        and entry["overhead"] <= MOST_OVERHEAD
        for entry in found.values()
    )
    return found


def seen(tab: Any, page: Path) -> Figures:
    """Return what a browser shows of a report."""
    tab.open(page.absolute().as_uri())
    return {
        "heading": tab.text("h1"),
        "drawings": tab.run("document.querySelectorAll('svg').length"),
        "policies_in_table": tab.run("document.querySelectorAll('table')[0].querySelectorAll('tbody tr').length"),
        "problems": tab.problems,
    }


def report(out: Path, benchmarks: str, limit: int, data: Path, config: str | None) -> Figures:
    """Every policy that needs no labels on some benchmarks, and its report in a headless browser where one is installed.

    `config` None: scripted agents, whose figures mean nothing; the report is the same kind of page.
    """
    from tests.accept.browser import browser, executable
    from tests.integration.evaluations import command, run, scripted_pool

    names = [name for name, entry in POLICIES.items() if "data" not in getattr(entry.options, "model_fields", {})]
    out.mkdir(parents=True, exist_ok=True)
    base = command(out / "run", "--config", config or str(scripted_pool(out)), "--benchmarks", benchmarks, "--limit", str(limit))
    rows = ["--data-dir", str(data)] if data.is_dir() else []
    asked = ["--policies", ",".join(names), "--match", "none", "--budget", "cpu", "--resume"]
    done = run([base[0], "compare", *base[2:], *rows, *asked])
    found: Figures = {"policies": len(names), "exit": done.returncode, "stderr": done.stderr[-600:] if done.returncode else ""}
    page = out / "run" / "report.html"
    if executable() and page.exists():
        with browser() as new_tab:
            tab = new_tab()
            found |= seen(tab, page)
    found["passed"] = (
        done.returncode == 0 and found.get("policies_in_table", len(names)) == len(names) and not found.get("problems")
    )
    return found


def main() -> int:
    """Measure the lines that are asked for, and write them beside those that the file has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--lines", default="recorded,attacked,report,overhead,adversaries")
    parser.add_argument("--folder", type=Path, default=Path("out/rivals"), help="answers that are kept between runs")
    parser.add_argument("--limit", type=int, default=300, help="recorded test rows of a pool")
    parser.add_argument("--benchmarks", default="arith,words", help="of the report")
    parser.add_argument("--config", help="pool of the report [scripted agents]")
    parser.add_argument("--queries", type=int, default=40, help="of the runtime beside a script")
    parser.add_argument("--delay", type=float, default=0.5, help="seconds that the stand-in for an engine takes for a call")
    parser.add_argument("--rows", type=int, default=5, help="test rows of a suite, with adversaries")
    parser.add_argument("--adversaries", default="1", help="numbers of adversaries, such as 1,2,3")
    parser.add_argument("--defences", default="none")
    options = parser.parse_args()
    source = Path(os.environ.get("DMOA_RECORDED", ROOT.parent / "shared" / "outcomes"))
    rows = Path(os.environ.get("DMOA_BENCHMARK_ROWS", ROOT.parent / "shared" / "benchmarks"))
    counts = [int(count) for count in options.adversaries.split(",")]
    skipped: Figures = {"skipped": "no recorded replies beside this clone"}
    measures: dict[str, Callable[[], Figures]] = {
        "recorded": lambda: (
            recorded(source, options.folder, options.limit) if source.is_dir() else {"skipped": "no recorded replies"}
        ),
        "attacked": lambda: attacked(source, options.folder, options.limit) if source.is_dir() else skipped,
        "report": lambda: report(options.folder / "report", options.benchmarks, 4, rows, options.config),
        "overhead": lambda: overhead(options.queries, options.delay),
        "adversaries": lambda: adversaries(options.folder, options.rows, options.defences.split(","), counts),
    }
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    for name in options.lines.split(","):
        started = time.monotonic()
        known[name] = measures[name]() | {"took_s": 0.0, "load": os.getloadavg()[0]}
        known[name]["took_s"] = round(time.monotonic() - started, 1)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(known[name], indent=1), flush=True)
    return 0 if all(found.get("passed", True) for found in known.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
