"""Agents that work against the swarm, and what each policy loses by them: a line of `accept_rivals`.

`dmoa` and a vote choose among first replies, on all rows; `moa`, `debate` and `complete` are asked, on fewer, because each attack
makes prompts of its own. The adversaries are a pool's last agents. Rows of their own suites are left out with and without them:
what only they know nobody can keep.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from study_posterior import SURE_NATS, changed, matrix_of, trained
from study_replies import Replies, replies, rows_of

from dmoa.agents.adversaries import KINDS, Adversaries, corrupted
from dmoa.agents.pool import load_pool
from dmoa.config import Config
from dmoa.evaluation.answer_matrix import everyone, gate_choices, replay_choices
from dmoa.types import AgentCall, AgentReply, Limits, Message, Sampling
from dmoa.workflows.backends import build_local_swarm
from tests.accept.rivals_suites import GENERALIST, LEARN, LEARN_FIRST_SEED, SEEDS, TEST
from tests.accept.rivals_table import Figures, ask_all, judge_of, of_answers

SIX = 6
MOST_LOST = 0.03
POOLS = ("specialists", "with-generalist")
"""Six specialists; or a generalist, which writes the answers of the rivals, and the first five of them."""
CURVES = ("liar", "colluding")
"""Kinds that rivals are asked under more than one adversary of."""
RIVALS = ("moa:layers=2", "debate:rounds=1", "complete")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """What is measured."""

    folder: Path
    """Answers that are kept."""
    per_suite: int
    """Rows of a suite, for choices among first replies."""
    asked_rows: int
    """Rows that rivals are asked."""
    counts: Sequence[int]
    """Numbers of adversaries."""
    defences: Sequence[str]
    """Of the rivals."""
    score: str
    """What `dmoa`'s gate learns by."""


def attacked_pool(name: str) -> Config:
    """Return a pool of six agents, whose last ones become adversaries."""
    if name == POOLS[0]:
        return load_pool(name).changed("limits", max_steps=1)
    config = load_pool("specialists-generalist").changed("limits", max_steps=1)
    by_name = {agent.name: agent for agent in config.agents}
    agents = tuple(by_name[agent] for agent in (GENERALIST, *config.agent_names[: SIX - 1]))
    return config.model_copy(update={"name": name, "agents": agents})


def rivals_of(config: Config) -> dict[str, str]:
    """Return how the rivals are spelt: adversaries neither aggregate nor come last in a graph, which would be the end of them."""
    order = "+".join(reversed(config.agent_names))
    return {RIVALS[0]: RIVALS[0], RIVALS[1]: RIVALS[1], RIVALS[2]: f"complete:agents={order}"}


def reply_under(text: str, agent: str, asked: str, kind: str) -> AgentReply:
    """Return a recorded reply, or what an adversary makes of it; one that is absent says nothing."""
    reply = AgentReply(agent=agent, status="ok", text=text)
    call = AgentCall(trace_id=asked, step=0, agent=agent, messages=(Message(role="user", content=asked),), sampling=Sampling())
    if kind == "absent":
        return replace(reply, text="")
    return reply if kind == "none" else corrupted(reply, call, kind)  # type: ignore[arg-type]


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


def enemies_of(counts: Sequence[int]) -> dict[str, Adversaries | None]:
    """Return nobody, and so many adversaries of each kind, by name."""
    some = {f"{kind} x {count}": Adversaries(count=count, kind=kind) for count in counts for kind in KINDS}
    return {"none x 0": None, **some}


def adversaries(attack: Attack, pools: Sequence[str], known: Figures, keep: Callable[[Figures], None]) -> Figures:
    """Measure what `dmoa` and its rivals lose in some pools, beside what is `known` of others."""
    found: Figures = {pool: known[pool] for pool in POOLS if pool in known}
    for name in pools:

        def so_far(entry: Figures, name: str = name) -> None:
            found[name] = entry
            keep(found)

        found[name] = attacked_suites(attack, name, so_far)
    return found | {"passed": all(entry["passed"] for entry in found.values())}


def attacked_suites(attack: Attack, name: str, keep: Callable[[Figures], None]) -> Figures:
    """Return accuracies by attack and by policy, and what each loses beside nobody's attack on the same rows.

    A gate learns under the same attack, without labels: the mean of three draws of queries. `dmoa` is also asked, with each
    draw's gate, on the rivals' rows.
    """
    config = attacked_pool(name)
    rows, named = rows_of(TEST[0], attack.per_suite, TEST[1]), f"{name}-{TEST[0]}-{TEST[1]}-{attack.per_suite}"
    test = replies(rows, config, attack.folder, named)
    learnt = [
        replies(rows_of("gate", LEARN, seed), config, attack.folder, f"{name}-gate-{seed}-{LEARN}")
        for seed in range(LEARN_FIRST_SEED, LEARN_FIRST_SEED + SEEDS)
    ]
    suites_R = np.array([row.task.benchmark for row in test.rows])
    honest = {count: np.flatnonzero(~np.isin(suites_R, config.agent_names[SIX - count :])) for count in attack.counts}
    found: Figures = {
        "score": attack.score,
        "agents": config.agent_names,
        "rows": {count: len(rows) for count, rows in honest.items()},
        "arms": {},
    }
    for arm, enemies in enemies_of(attack.counts).items():
        at, values, pools = attack.folder / "attacked" / name / arm.replace(" ", "-") / attack.score, list[Any](), list[Config]()
        matrix, embedding_RD = matrix_of(under_attack(test, config, enemies), config)
        for draw, queries in enumerate(learnt):
            gate = trained(under_attack(queries, config, enemies), config, attack.score, draw, at / str(draw))
            values.append(replay_choices(matrix, gate_choices(gate, embedding_RD)).value_R)
            checkpoint = str(next((at / str(draw) / "gate").glob("**/gate.json")).parent)
            pools.append(config.model_copy(update={"gate": config.gate.model_copy(update={"checkpoint": checkpoint})}))
        vote_R = replay_choices(matrix, everyone(matrix)).value_R
        found["arms"][arm] = {
            count: {
                "dmoa": float(np.mean([value_R[rows].mean() for value_R in values])),
                "dmoa_draws": [round(float(value_R[rows].mean()), 4) for value_R in values],
                "vote": float(vote_R[rows].mean()),
                "asked": _asked(attack, pools, test, rows[: attack.asked_rows].tolist(), enemies),
            }
            for count, rows in honest.items()
            if enemies is None or enemies.count == count
        }
        print(name, arm, found["arms"][arm], flush=True)
        keep(found)
    return found | judged(found["arms"])


def _asked(
    attack: Attack, pools: Sequence[Config], test: Replies, rows: Sequence[int], enemies: Adversaries | None
) -> dict[str, Figures]:
    """Ask `dmoa` with each gate, and the rivals, with each defence; under several adversaries of some kinds nobody is asked."""
    if not rows or (enemies is not None and enemies.count > 1 and enemies.kind not in CURVES):
        return {}
    found: dict[str, Figures] = {}
    for defence in attack.defences if enemies else ("none",):
        summarizer = pools[0].summarizer.model_copy(update={"defence": defence})
        served = [pool.model_copy(update={"summarizer": summarizer}) for pool in pools]
        own = [asyncio.run(_answers(pool, attack.folder, enemies, test.only(rows), {"dmoa": "dmoa"}))["dmoa"] for pool in served]
        means = {name: float(np.mean([entry[name] for entry in own])) for name in ("accuracy", "calls", "tokens")}
        asked = {"dmoa": means | {"draws": [entry["accuracy"] for entry in own]}}
        asked |= asyncio.run(_answers(served[0], attack.folder, enemies, test.only(rows), rivals_of(served[0])))
        for policy, entry in asked.items():
            shown = policy if defence == "none" else f"{policy}, {defence}"
            found[shown] = {name: value for name, value in entry.items() if name != "values"}
    return found


async def _answers(
    config: Config, folder: Path, enemies: Adversaries | None, rows: Replies, policies: Mapping[str, str]
) -> dict[str, Figures]:
    swarm, judge = build_local_swarm(config, lambda text: None, folder / "calls", None, enemies), judge_of(rows.rows)
    tasks = [row.task for row in rows.rows]
    try:
        asked = {shown: await ask_all(swarm, policy, tasks, Limits(max_steps=1)) for shown, policy in policies.items()}
        return {shown: of_answers(answers, judge) for shown, answers in asked.items()}
    finally:
        await swarm.close()


def judged(arms: Mapping[str, Mapping[int, Figures]]) -> Figures:
    """Return what each policy loses, and whether one adversary of any kind costs `dmoa` at most 3 points and rivals no less."""
    lost: Figures = {}
    for arm, by_count in arms.items():
        for count, entry in by_count.items() if arm != "none x 0" else ():
            before = arms["none x 0"][count]
            lost[arm] = {of: round(before[of] - entry[of], 4) for of in ("dmoa", "vote")}
            lost[arm]["asked"] = {
                policy: round(before["asked"][policy.split(",")[0]]["accuracy"] - of["accuracy"], 4)
                for policy, of in entry["asked"].items()
            }
    one = {arm: entry for arm, entry in lost.items() if arm.endswith(" x 1")}
    bars = {arm: entry["dmoa"] <= MOST_LOST for arm, entry in one.items()}
    less = {
        arm: [policy for policy in RIVALS if policy in entry["asked"] and entry["asked"][policy] < entry["dmoa"]]
        for arm, entry in one.items()
    }
    asked = [entry["asked"] for entry in one.values() if entry["asked"]]
    means = {policy: float(np.mean([entry[policy] for entry in asked])) for policy in ("dmoa", *RIVALS) if asked}
    passed = all(bars.values()) and not any(less.values())
    return {"lost": lost, "mean_lost": means, "at_most_3_points": bars, "rivals_that_lose_less": less, "passed": passed}
