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
from study_posterior import SURE_NATS, changed, matrix_of, reply_of, trained
from study_replies import Replies, everyone, first_step, replies, rows_of

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
from dmoa.evaluation.answer_matrix import everyone as all_agents
from dmoa.evaluation.answer_matrix import gate_choices, replay_choices
from dmoa.evaluation.answering import Asking, query_of_task
from dmoa.evaluation.records import Reply, Row, Task
from dmoa.evaluation.registry import SUITES
from dmoa.evaluation.statistics import compare_policies, interval
from dmoa.policies.registry import split_policy
from dmoa.protocols import Encoder, final_answer
from dmoa.storage import write_whole
from dmoa.swarm import Swarm
from dmoa.types import AgentCall, AgentReply, Answer, Defence, FloatArray, Limits, Message, Sampling
from dmoa.workflows.backends import build_local_swarm
from tests.accept.checks import ROOT, ROWS, run_check
from tests.accept.rivals_overhead import overhead
from tests.accept.rivals_report import report

IN_FLIGHT = 8
LEARN, SEED = 100, 0
MOST_LOST = 0.03
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


def reply_under(text: str, agent: str, asked: str, kind: str) -> AgentReply:
    """Return a recorded reply, or what an adversary makes of it; one that is absent says nothing."""
    reply = AgentReply(agent=agent, status="ok", text=text)
    call = AgentCall(trace_id=asked, step=0, agent=agent, messages=(Message(role="user", content=asked),), sampling=Sampling())
    if kind == "absent":
        return replace(reply, text="")
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


FIRST_STEP = ("dense", "random", "random_router", "majority_k:k=3", "majority_k:k=64", "free_agency", "knapsack")
LABELLED = ("bandit", "knn_router", "linear_router", "kmeans")
LONGER = (
    "self_consistency",
    "self_moa",
    "best_of_n",
    "cot",
    "debate:rounds=1",
    "moa:layers=2",
    "complete",
    "fusion",
    "chain",
    "smoa",
)
DRAWS = 5
Done = Callable[[str, Figures], None]


def suites(folder: Path, per_suite: int, pools: Sequence[str], longer_rows: int, keep: Callable[[Figures], None]) -> Figures:
    """Policies on the specialists' suites: dmoa with gates of five draws, and rivals; the longer ones on fewer rows.

    Every agent answers each row once, and gates and rivals of the first step choose among these replies; what the longer ones ask
    is kept in `folder` as well. Routers with labels learn from the queries of the first draw.
    """
    split, _, seed = TEST_ROWS
    test = replies(rows_of(split, per_suite, seed), everyone(pools), folder, f"{split}-{seed}")
    learnt = [replies(rows_of("gate", 8, 301 + draw), everyone(pools), folder, f"gate-{301 + draw}") for draw in range(DRAWS)]
    judge, tasks = judge_of(test.rows), [row.task for row in test.rows]
    found: Figures = {"rows": len(tasks), "longer_rows": longer_rows}
    for name in pools:
        config, table = first_step(load_pool(name)), found.setdefault(name, {})

        def done(policy: str, entry: Figures, table: Figures = table, name: str = name) -> None:
            own = table.setdefault("dmoa, anchored, draw 0", entry)["values"][: len(entry["values"])]
            against = compare_policies(own, entry["values"])
            entry["dmoa_minus_it"] = [round(x, 4) for x in (against.difference, against.low, against.high, against.p)]
            table[policy] = entry
            print(name, policy, {key: value for key, value in entry.items() if key != "values"}, flush=True)
            keep(found)

        matrix, embedding_RD = matrix_of(test, config)
        for arm in ("anchored", "posterior"):
            for draw in range(DRAWS):
                gate = trained(learnt[draw], config, arm, draw, folder / "gates" / name / arm / str(draw))
                served = replay_choices(matrix, gate_choices(gate, embedding_RD))
                values = served.value_R.tolist()
                done(
                    f"dmoa, {arm}, draw {draw}",
                    figures(values, served.k_R.tolist(), served.tokens_R.tolist()) | {"values": values},
                )
        done("oracle", figures(best := matrix.value_RA.max(axis=1).tolist(), [1], [0]) | {"values": best})
        data = folder / f"{name}-labels.jsonl"
        right_RA = learnt[0].values(config.agent_names)
        cells = [
            (row.task.text, agent, right)
            for row, rights in zip(learnt[0].rows, right_RA, strict=True)
            for agent, right in zip(config.agent_names, rights.tolist(), strict=True)
        ]
        write_whole(
            data, "".join(json.dumps(dict(zip(("query", "agent", "reward"), c, strict=True))) + "\n" for c in cells).encode()
        )
        first = (
            [f"single:{agent}" for agent in config.agent_names] + [*FIRST_STEP] + [f"{router}:data={data}" for router in LABELLED]
        )
        pool = recorded_pool(write_recorded(folder / f"{name}-replies.jsonl", test), config.agent_names)
        asyncio.run(_asked(pool, None, first, tasks, judge, done))
        asyncio.run(_asked(config, folder / "calls", LONGER, tasks[:longer_rows], judge, done))
    return found


def write_recorded(path: Path, found: Replies) -> Path:
    """Write replies as a file of the engine `recorded`."""
    text_of = {row.task.row_id: row.task.text for row in found.rows}
    lines_of = []
    for line in found.table.to_pylist():
        if line["query_id"] in text_of:
            reply = reply_of(line)
            known = {"agent": reply.agent, "text": reply.text, "entropy": reply.entropy.mean_nats}
            tokens = {name: getattr(reply.usage, name) for name in ("prompt_tokens", "completion_tokens")}
            lines_of.append(json.dumps(known | tokens | {"query": text_of[line["query_id"]]}) + "\n")
    write_whole(path, "".join(lines_of).encode())
    return path


async def _asked(
    config: Config, calls: Path | None, policies: Sequence[str], tasks: Sequence[Task], judge: Judge, done: Done
) -> None:
    """Ask one policy after the other."""
    swarm = build_local_swarm(config, lambda text: None, calls)
    swarm.encoder = Remembering(swarm.encoder)
    try:
        for policy in policies:
            shown = f"{split_policy(policy)[0]}, labels" if ":data=" in policy else policy
            done(shown, of_answers(await ask_all(swarm, policy, tasks, Limits(max_steps=1)), judge))
    finally:
        await swarm.close()


ATTACKED = ("dmoa", "majority_k:k=6", "moa:layers=2", "debate:rounds=1", "complete")
GATE_ROWS, TEST_ROWS = ("gate", 8, 301), ("test", 16, 401)
"""Split, rows a suite and seed of what gates learn from and of what is judged: rows of the study, whose replies can be given."""


def under_attack(found: Replies, config: Config, enemies: Adversaries | None) -> Replies:
    """Return the replies as they are where some agents work against the others."""
    if enemies is None:
        return found
    asked = {row.task.row_id: row.task.text for row in found.rows}
    names, table = enemies.of(config.agent_names), found.table.to_pylist()
    said = [
        reply_under(line["text"], line["agent"], asked[line["query_id"]], enemies.kind if line["agent"] in names else "none").text
        for line in table
    ]
    changes: dict[str, Sequence[Any]] = {"text": said}
    if enemies.kind == "confident_liar":
        sure = [line["entropy_tokens"] * SURE_NATS if line["agent"] in names else line["entropy_sum_nats"] for line in table]
        changes["entropy_sum_nats"] = sure
    return replace(found, table=changed(found.table, changes))


def gated(folder: Path, config: Config, enemies: Adversaries | None, score: str, at: Path) -> Config:
    """Return a pool with a gate that has learnt, without labels, from replies under the same attack."""
    found = replies(rows_of(*GATE_ROWS), config, folder, f"{GATE_ROWS[0]}-{GATE_ROWS[2]}")
    trained(under_attack(found, config, enemies), config, score, 0, at)
    checkpoint = next((at / "gate").glob("**/gate.json")).parent
    return config.model_copy(update={"gate": config.gate.model_copy(update={"checkpoint": str(checkpoint)})})


def enemies_of(counts: Sequence[int]) -> dict[str, Adversaries | None]:
    """Return nobody, and so many adversaries of each kind, by name."""
    some = {f"{kind} x {count}": Adversaries(count=count, kind=kind) for count in counts for kind in KINDS}
    return {"none x 0": None, **some}


def attacked_suites(folder: Path, per_suite: int, counts: Sequence[int]) -> Figures:
    """Choices among first replies of the six specialists under attack: gates that learnt under the same attack, and votes.

    Rows of the adversaries' own suites are left out, which without them nobody could answer, in all arms of that number.
    """
    config, found = first_step(load_pool("specialists")), {}
    split, _, seed = TEST_ROWS
    test = replies(rows_of(split, per_suite, seed), config, folder, f"{split}-{seed}")
    learnt = replies(rows_of(*GATE_ROWS), config, folder, f"{GATE_ROWS[0]}-{GATE_ROWS[2]}")
    for arm, enemies in enemies_of(counts).items():
        matrix, embedding_RD = matrix_of(under_attack(test, config, enemies), config)
        values: dict[str, Any] = {"vote of six": replay_choices(matrix, all_agents(matrix)).value_R}
        for score in ("anchored", "posterior"):
            at = folder / "attacked" / arm.replace(" ", "-") / score
            gate = trained(under_attack(learnt, config, enemies), config, score, 0, at)
            values[f"dmoa, {score}"] = replay_choices(matrix, gate_choices(gate, embedding_RD)).value_R
        suites_R = np.array([task.benchmark for task in matrix.tasks])
        honest = {count: ~np.isin(suites_R, config.agent_names[SIX - count :]) for count in counts}
        found[arm] = {name: {count: float(value_R[honest[count]].mean()) for count in counts} for name, value_R in values.items()}
        print(arm, found[arm], flush=True)
    lost = {
        arm: {name: round(found["none x 0"][name][at] - by[at], 4) for name, by in found[arm].items() for at in [enemies.count]}
        for arm, enemies in enemies_of(counts).items()
        if enemies
    }
    with_one = [by for arm, by in lost.items() if arm.endswith(" x 1")]
    passed = all(by[f"dmoa, {score}"] <= MOST_LOST for by in with_one for score in ("anchored", "posterior"))
    return {"accuracy": found, "lost": lost, "passed": passed}


def adversaries(
    folder: Path, per_suite: int, defences: Sequence[str], counts: Sequence[int], score: str, keep: Callable[[Figures], None]
) -> Figures:
    """One adversary of each kind among the six specialists: what each policy loses. The gate learns under attack, without labels.

    The adversary is the pool's last agent; rows of its own suite are left out, which without it nobody could answer.
    """
    config = first_step(load_pool("specialists"))
    lost = set(config.agent_names[len(config.agents) - max(counts) :])
    split, _, seed = TEST_ROWS
    rows = [row for row in rows_of(split, per_suite, seed) if row.task.benchmark not in lost]
    tasks, judge = [row.task for row in rows], judge_of(rows)
    found: dict[str, Any] = {"rows": len(rows), "score": score, "left_out": sorted(lost), "table": {}}
    for arm, enemies in enemies_of(counts).items():
        trained_pool = gated(folder, config, enemies, score, folder / f"{score}-{arm.replace(' ', '-')}")
        for defence in defences if enemies else ("none",):
            summarizer = config.summarizer.model_copy(update={"defence": defence})
            pool = trained_pool.model_copy(update={"summarizer": summarizer})
            found["table"][f"{arm}, {defence}"] = asyncio.run(_attacked(pool, folder, enemies, tasks, judge))
            print(arm, defence, found["table"][f"{arm}, {defence}"], flush=True)
            keep(found)
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


def judge_of(rows: Sequence[Row]) -> Judge:
    """Return what scores an answer to one of the rows of the suites."""

    def judge(number: int, text: str) -> float:
        label = rows[number].label
        assert label is not None
        return SUITES[rows[number].task.benchmark].score(label, Reply(text=text)).value

    return judge


async def _attacked(
    config: Config, folder: Path, enemies: Adversaries | None, tasks: Sequence[Task], judge: Judge
) -> dict[str, Figures]:
    swarm = build_local_swarm(config, lambda text: None, folder / "calls", None, enemies)
    try:
        found = {policy: of_answers(await ask_all(swarm, policy, tasks, Limits(max_steps=1)), judge) for policy in ATTACKED}
    finally:
        await swarm.close()
    return {policy: {name: value for name, value in entry.items() if name != "values"} for policy, entry in found.items()}


FLAGS: dict[str, dict[str, Any]] = {
    "--lines": {"default": "recorded,attacked,in_turn,report,overhead,suites,attacked_suites,adversaries"},
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
    "--longer-rows": {"type": int, "default": 30, "help": "test rows for policies of several calls an agent"},
    "--adversaries": {"default": "1", "help": "numbers of adversaries, such as 1,2,3"},
    "--defences": {"default": "none"},
    "--score": {"choices": ("anchored", "posterior"), "default": "anchored", "help": "of dmoa's gate, of `adversaries`"},
}


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
        "suites": lambda: suites(options.folder, options.rows, options.pools.split(","), options.longer_rows, keep("suites")),
        "attacked_suites": lambda: attacked_suites(options.folder, options.rows, counts),
        "adversaries": lambda: adversaries(
            options.folder, options.rows, options.defences.split(","), counts, options.score, keep("adversaries")
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
