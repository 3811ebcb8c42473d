"""Rivals on the same agents: recorded pools in one table, adversaries of each kind, and the runtime beside a plain script.

    python tests/accept/accept_rivals.py --json out/accept/rivals.json --lines recorded,attacked,overhead,adversaries

`recorded` and `attacked` need the folder of recorded replies (`DMOA_RECORDED`, else `shared/outcomes` beside the repository).
`adversaries` asks six specialists in this process; what they answer is kept in `--folder`. Figures are written as measured.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, neither is importable by itself
sys.path.insert(0, str(Path(__file__).parents[2] / "jobs" / "study"))

from label_model import NAMES, Material, answer, lines, load, with_outcomes

from dmoa.agents.adversaries import KINDS
from dmoa.agents.embedder import MiniLmEncoder
from dmoa.config import Config
from dmoa.core.aggregate import select_contribution
from dmoa.core.defences import barred
from dmoa.core.forms import agreement_key
from dmoa.core.label_model import fit_label_model
from dmoa.core.sequential import AGENT_PRICE
from dmoa.core.witnesses import NO_ANSWER, Witnesses
from dmoa.engines import models
from dmoa.engines.recorded import agent_name
from dmoa.evaluation.records import Task
from dmoa.evaluation.statistics import compare_policies
from dmoa.storage import write_whole
from dmoa.types import AgentReply, Defence, Limits
from dmoa.workflows.backends import build_local_swarm
from tests.accept.checks import ROOT, ROWS, run_check
from tests.accept.rivals_adversaries import MOST_LOST, POOLS, SIX, Attack, adversaries, reply_under
from tests.accept.rivals_overhead import overhead
from tests.accept.rivals_report import report
from tests.accept.rivals_suites import suites
from tests.accept.rivals_table import SEED, Figures, Remembering, ask_all, figures, of_answers

LEARN = 100


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


def attacked(source: Path, out: Path, limit: int) -> Figures:
    """Six recorded agents, none to three of which work against the others: dmoa's label model, and votes with each defence.

    The model is fitted to unlabelled queries under the same attack. No entropies are recorded: `confident_liar` is `liar` here.
    An attack costs what is lost beside `absent`, where the same agents say nothing; what they themselves knew nobody can keep.
    """
    found: Figures = {}
    for name in NAMES:
        folder = sample(source, name, out, LEARN + limit)
        rows = lines(folder / f"{name}.replies.jsonl.gz")
        agents = six_of(folder, name)
        text_of = {row["query_id"]: row["query"] for row in rows}
        ids = sorted(text_of)
        said = {(row["query_id"], row["agent"]): row["text"] for row in rows}
        gold = {row["query_id"]: row["answer"].removeprefix("# ") for row in lines(folder / f"{name}.labels.jsonl.gz")}
        truth = [agreement_key(json.dumps({"answer": gold[query_id]}), text_of[query_id]) for query_id in ids]
        order = np.random.default_rng(SEED).permutation(len(ids))
        found[name] = {"agents": agents}
        for kind in ("none", "absent", *(kind for kind in KINDS if kind != "confident_liar")):
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
        found[name]["lost"] = {
            arm: {
                policy: round(found[name][f"absent x {arm[-1]}"][policy]["accuracy"] - of["accuracy"], 4)
                for policy, of in table.items()
            }
            for arm, table in found[name].items()
            if " x " in arm and arm[-1] != "0"
        }
    lost = [found[name]["lost"][arm]["dmoa"] for name in NAMES for arm in found[name]["lost"] if arm.endswith("1")]
    found["passed"] = max(lost) <= MOST_LOST
    return found


def in_turn(source: Path, out: Path, limit: int) -> Figures:
    """Each of six recorded agents in turn as the one liar: what dmoa's label model loses beside six honest ones, and a vote.

    `attacked` has the last agent lie, which may be the best of the six: what it alone knew is lost whatever is done.
    """
    found: Figures = {}
    for name in NAMES:
        folder = sample(source, name, out, LEARN + limit)
        material = load(folder, name, MiniLmEncoder(models.fetch("minilm")), tuple(six_of(folder, name)))
        order = np.random.default_rng(SEED).permutation(len(material.right_RA))
        learn, test = order[:LEARN], order[LEARN:]
        honest, *lying = (lied(material, liar, learn, test) for liar in (None, *range(SIX)))
        lost = {of: [round(honest[of] - table[of], 4) for table in lying] for of in honest}
        found[name] = {"agents": material.agents, "honest": honest, "lost": lost}
        found[name] |= {f"mean_lost_{of}": round(float(np.mean(values)), 4) for of, values in lost.items()}
        found[name]["best_single"] = material.right_RA[test].mean(axis=0).round(4).tolist()
        print(name, found[name], flush=True)
    return found | {"passed": all(entry["mean_lost_dmoa"] <= MOST_LOST for entry in found.values())}


def six_of(folder: Path, name: str) -> list[str]:
    """Return the first six recorded agents."""
    return sorted({row["agent"] for row in lines(folder / f"{name}.replies.jsonl.gz")})[:SIX]


def lied(material: Material, liar: int | None, learn: Any, test: Any) -> dict[str, float]:
    """Return accuracies where one agent's answers are wrong and nobody else's, and its texts as long as ever."""
    witnesses, right_RA = material.witnesses, material.right_RA.copy()
    if liar is not None:
        classes_RA = witnesses.answer_RA.copy()
        others = np.delete(classes_RA, liar, axis=1)
        classes_RA[:, liar] = [min(set(range(SIX)) - set(row)) for row in others.tolist()]  # nobody else says it
        right_RA[:, liar] = False
        witnesses = replace(witnesses, answer_RA=classes_RA)
    under = replace(material, witnesses=witnesses, right_RA=right_RA)
    own, _ = answer(fit_label_model(witnesses.rows(learn), seed=SEED), under, test, AGENT_PRICE)
    votes_R = []
    for row in test:
        classes, counts = np.unique(said := witnesses.answer_RA[row][witnesses.answer_RA[row] >= 0], return_counts=True)
        chosen = classes[counts == counts.max()] if len(said) else []
        votes_R.append(np.mean([right_RA[row][witnesses.answer_RA[row] == one].max() for one in chosen]) if len(said) else 0.0)
    return {"dmoa": float(own.right.mean()), "vote": float(np.mean(votes_R))}


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


FLAGS: dict[str, dict[str, Any]] = {
    "--lines": {"default": "recorded,attacked,in_turn,report,overhead,suites,adversaries"},
    "--folder": {"type": Path, "default": Path("out/rivals"), "help": "answers that are kept between runs"},
    "--limit": {"type": int, "default": 300, "help": "recorded test rows of a pool"},
    "--benchmarks": {"default": "arith,words", "help": "of the report"},
    "--config": {"help": "pool of the report [scripted agents]"},
    "--report-limit": {"type": int, "default": 4, "help": "rows of a benchmark, of the report"},
    "--max-tokens": {"help": "of a reply, of the report"},
    "--queries": {"type": int, "default": 16, "help": "of a turn of the runtime or the script beside it"},
    "--engine": {"choices": ("embedded", "delay"), "default": "embedded", "help": "of the runtime beside a script"},
    "--delay": {"type": float, "default": 0.5, "help": "seconds that the stand-in for an engine takes for a call"},
    "--rounds": {"type": int, "default": 12, "help": "pairs of turns, of the runtime beside a script"},
    "--rows": {"type": int, "default": 5, "help": "test rows of a suite, of `suites` and `adversaries`"},
    "--pools": {"default": "specialists,specialists-generalist", "help": "of the suites"},
    "--attacked-pools": {"default": ",".join(POOLS), "help": "of the adversaries"},
    "--longer-rows": {"type": int, "default": 30, "help": "rows that policies of several calls an agent are asked at first"},
    "--longer": {"default": "", "help": "policies of several calls that are asked [all]"},
    "--adversaries": {"default": "1", "help": "numbers of adversaries, such as 1,2,3"},
    "--defences": {"default": "none"},
    "--score": {"choices": ("anchored", "posterior"), "default": "posterior", "help": "of dmoa's gate, of `adversaries`"},
}


def _names(listed: str) -> list[str]:
    return [name for name in listed.split(",") if name]


def check(options: Namespace) -> Figures:
    """Measure the lines that are asked for; what the JSON file holds of other lines is kept."""
    source = Path(os.environ.get("DMOA_RECORDED", ROOT.parent / "shared" / "outcomes"))
    counts = [int(count) for count in options.adversaries.split(",")]
    asked = ["--benchmarks", options.benchmarks, *(["--data-dir", str(ROWS)] if ROWS.is_dir() else [])]
    most = ["--max-tokens", options.max_tokens] if options.max_tokens else []
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    known.pop("passed", None)

    def keep(line: str) -> Callable[[Figures], None]:
        return lambda so_far: write_whole(options.json, (json.dumps(known | {line: so_far}, indent=1) + "\n").encode())

    skipped: Figures = {"skipped": "no recorded replies beside this clone"}
    measures: dict[str, Callable[[], Figures]] = {
        "recorded": lambda: recorded(source, options.folder, options.limit) if source.is_dir() else skipped,
        "attacked": lambda: attacked(source, options.folder, options.limit) if source.is_dir() else skipped,
        "in_turn": lambda: in_turn(source, options.folder, options.limit) if source.is_dir() else skipped,
        "report": lambda: report(options.folder / "report", asked, options.config, options.report_limit, most),
        "overhead": lambda: overhead(options.queries, options.delay, options.engine, options.rounds),
        "suites": lambda: suites(
            options.folder, options.rows, options.pools.split(","), options.longer_rows, _names(options.longer), keep("suites")
        ),
        "adversaries": lambda: adversaries(
            Attack(
                folder=options.folder,
                per_suite=options.rows,
                asked_rows=options.longer_rows,
                counts=counts,
                defences=options.defences.split(","),
                score=options.score,
            ),
            options.attacked_pools.split(","),
            known.get("adversaries", {}),
            keep("adversaries"),
        ),
    }
    for name in options.lines.split(","):
        started = time.monotonic()
        known[name] = measures[name]() | {"load": os.getloadavg()[0]}
        known[name]["took_s"] = round(time.monotonic() - started, 1)
        write_whole(options.json, (json.dumps(known, indent=1) + "\n").encode())
        print(name, f"{known[name]['took_s']} s", flush=True)
    return known | {"passed": all(found.get("passed", True) for found in known.values())}


if __name__ == "__main__":
    raise SystemExit(run_check(check, FLAGS))
