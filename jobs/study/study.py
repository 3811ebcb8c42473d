"""The preregistered study of the gate: answers every row with every agent, trains gates without labels, judges its endpoints.

    python jobs/study/study.py --config jobs/study/study.yaml --json out/study.json

README.md of this folder says what each endpoint means. Hours on two cores, nearly all of them for the answer matrices; stopped,
the same command goes on. Shape letters: S specialist sets (one here), G gate seeds, R rows, A agents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from study_memory import memory
from study_runs import (
    CONSTANT,
    HOME,
    POOL,
    SINGLE,
    WRONG,
    Matrices,
    Study,
    Values,
    blank_replies,
    clusters,
    embeddings,
    gates,
    matrices,
    not_worse,
    plain,
    pool,
    rollouts,
    spread,
)

from dmoa.agents.pool import fingerprint
from dmoa.cli.jobs import read_job, run_job
from dmoa.core.gate import Gate
from dmoa.errors import ConfigError
from dmoa.evaluation.answer_matrix import (
    AnswerMatrix,
    Replayed,
    gate_choices,
    one_agent,
    ranked,
    replay_choices,
    row_oracle,
)
from dmoa.evaluation.run_folder import write_whole
from dmoa.evaluation.statistics import Comparison, compare_crossed, holm, wilson
from dmoa.training.cluster_router import KMeansRouter, sample_of
from dmoa.training.probe import probe_pool
from dmoa.training.rollouts import read_table
from dmoa.workflows.console import Common, with_common
from dmoa.workflows.evaluate import opened_ray
from dmoa.workflows.probe import judged_replies

LIAR = "liar-constant"
JUDGED = ("1 home", "3 memory", "5 liar")
"""The family of Holm's correction."""


@with_common
def study(common: Common) -> None:
    """Run the study, or go on with it; settings stand in the `job:` section of --config."""
    settings = open_study(common)
    started = time.time()
    with opened_ray(None):
        result = {**judge(settings), "seconds_of_this_session": time.time() - started}
    text = json.dumps(result, indent=2, allow_nan=False, default=np.generic.item)
    write_whole(settings.out / "result.json", text + "\n")
    common.write_json(json.loads(text))
    for name, endpoint in result["endpoints"].items():
        print(f"{name:<14} {'passed' if endpoint['passed'] else 'FAILED'}")


def open_study(common: Common) -> Study:
    """Return the settings of the `job:` section, checked against those that its folder was begun with. Raises ConfigError."""
    _, values = read_job(common)
    try:
        settings = Study(**{**values, "out": Path(values["out"]).absolute()}, common=common)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"job: {error}; expected one of {', '.join(Study.__dataclass_fields__)}; out is needed") from error
    check_same(settings)
    return settings


def check_same(study: Study) -> None:
    """Write down what the folder is begun with, or raise ConfigError naming what differs from what it was begun with.

    Fingerprints of pools hold the hash of every adapter's bytes. Gates are found by their options, so `train` may change.
    """
    compared = {item.name for item in fields(Study)} - {"common", "workers", "out", "train"}
    now: dict[str, Any] = {name: getattr(study, name) for name in sorted(compared)}
    now |= {f"pool {name}": fingerprint(pool(name)) for name in (POOL, CONSTANT, WRONG)}
    path = study.out / "study.json"
    if not path.exists():
        write_whole(path, json.dumps(now, indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name in now | before if before.get(name) != now.get(name)]
    different = [f"{name}: begun with {before.get(name)}, now {now.get(name)}" for name in names]
    if different:
        raise ConfigError(
            f"job.out: {'; '.join(different)}; repeat the settings, and the adapters, of {str(path)!r}, or name another folder"
        )


def judge(study: Study) -> dict[str, Any]:
    """Answer, train and judge, or go on with it; returns the endpoints with what they were computed on."""
    if study.only_memory:
        endpoints = {"3 memory": memory(study)}
        return {"train": study.train, "seeds": study.seeds, "endpoints": endpoints}
    for name in (POOL, CONSTANT, WRONG):
        gates(study, name)  # before any test row is answered
    validation, test = matrices(study, "validation"), matrices(study, "test")
    endpoints = {**judge_matrices(study, validation, test, embeddings(study, "test", test)), "3 memory": memory(study)}
    for name, p in zip(JUDGED, holm([endpoints[name]["p"] for name in JUDGED]), strict=True):
        endpoints[name]["p_holm"] = p
    return {
        "train": study.train,
        "rows": {"test": study.test_rows, "validation": study.validation_rows, "seed": study.seed},
        "seeds": study.seeds,
        "blank_replies": {"validation": blank_replies(validation), "test": blank_replies(test)},
        "endpoints": dict(sorted(endpoints.items())),
    }


def judge_matrices(study: Study, validation: Matrices, test: Matrices, embedded: Mapping[str, Values]) -> dict[str, Any]:
    """Train the gates on the study's rollouts and return all endpoints but that of memory, which asks agents again.

    `embedded`: by suite, [R, D] of the test rows.
    """

    def of(name: str, trained: Iterable[Gate]) -> Material:
        return material(study, name, trained, validation, test, embedded)

    honest = of(POOL, gates(study, POOL))
    wrong = liar(of(WRONG, gates(study, WRONG)), honest, "liar-wrong")
    del wrong["passed"]  # damage is reported, without a bar
    constant, named = liar(of(CONSTANT, gates(study, CONSTANT)), honest), sure_and_wrong(study)
    is_named = "liar-wrong" in named
    probed = {"wrong_answers": wrong, "sure_and_wrong": named, "probe_names_liar_wrong": is_named}
    # Anchors take off what each agent gives on average: with them, one global favourite could not be learned.
    within = gates(study, POOL, "shuffled-within", study.shuffles, score="raw")
    across = gates(study, POOL, "shuffled-across", score="raw")
    return {
        "1 home": home(honest),
        "5 liar": {**constant, **probed, "passed": constant["passed"] and is_named},
        "6 controls": controls(of(POOL, within), of(POOL, across)),
    }


def material(
    study: Study, name: str, trained: Iterable[Gate], validation: Matrices, test: Matrices, embedded: Mapping[str, Values]
) -> Material:
    """Put together what the endpoints of one configuration on one pool are computed from."""
    agents = pool(name).agent_names
    sources = [rollouts(study, name, seed) for seed in range(study.seeds)]
    return Material(
        validation={suite: matrix.only(agents) for suite, matrix in validation.items()},
        test={suite: matrix.only(agents) for suite, matrix in test.items()},
        embedding=embedded,
        gates=list(trained),
        clusters=[clusters(source, name, seed) for seed, source in enumerate(sources)],
    )


def sure_and_wrong(study: Study) -> dict[str, list[str]]:
    """Return whom `dmoa probe --known-answers` names in the pool with `liar-wrong`, and on which suites.

    The training queries of all seeds are the known rows, each once; nobody is asked anew.
    """
    agents, tables = pool(WRONG).agent_names, []
    values: dict[tuple[str, str], float] = {}
    for seed in range(study.seeds):
        source = rollouts(study, WRONG, seed)
        table = read_table(source)
        known = {query for query, _ in values}
        table = table.filter(pa.array([query not in known for query in table["query_id"].to_pylist()]))
        values |= judged_replies(table, study.out / "labels" / WRONG / source.name)
        tables.append(table)
    known_sample = sample_of(pa.concat_tables(tables), agents, "default", values)
    report = probe_pool(sample_of(tables[0], agents, "default"), known=known_sample)
    return {finding.agent: finding.sure_and_wrong for finding in report.agents if finding.sure_and_wrong}


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What an endpoint is computed from."""

    validation: Mapping[str, AnswerMatrix]
    """By suite; all agents of the pool, in its order."""
    test: Mapping[str, AnswerMatrix]
    embedding: Mapping[str, Values]
    """By suite, [R, D] of the test rows."""
    gates: Sequence[Gate]
    """G of one configuration."""
    clusters: Sequence[KMeansRouter]
    """G, each fitted on the rollouts of the same seed."""

    def routed(self, suite: str, *, cascades: bool = True) -> list[Replayed]:
        """Return what each gate would have done on the test rows of a suite."""
        choices = (gate_choices(gate, self.embedding[suite], cascades=cascades) for gate in self.gates)
        return [replay_choices(self.test[suite], those) for those in choices]

    def firsts(self) -> Values:
        """Return each gate's most probable agent on the test rows of the single-domain suites, [G, R]."""
        return np.array(
            [
                [choice.ranking[0] for suite in SINGLE for choice in gate_choices(gate, self.embedding[suite])]
                for gate in self.gates
            ]
        )

    def clustered(self, suite: str) -> list[Replayed]:
        """Return what each cluster router would have done."""
        return [replay_choices(self.test[suite], ranked(router.rank(self.embedding[suite]))) for router in self.clusters]

    def alone(self, suite: str, agent: str) -> Replayed:
        """Return what one agent did."""
        return replay_choices(self.test[suite], one_agent(self.test[suite], agent))

    def best(self, suites: Sequence[str], among: Sequence[str] | None = None) -> str:
        """Return the agent that is best on the validation rows of some suites."""
        agents = among or self.validation[suites[0]].agents
        tables = [self.validation[suite] for suite in suites]
        means = {agent: np.mean([one.value_RA[:, one.agents.index(agent)].mean() for one in tables]) for agent in agents}
        return max(means, key=lambda agent: means[agent])


def _compare(ours: Sequence[Replayed], theirs: Sequence[Replayed]) -> Comparison:
    return compare_crossed(_difference(ours, theirs)[None])


def _joined(parts: Sequence[Sequence[Replayed]]) -> list[Replayed]:
    """Join suites: [suite][seed] -> [seed], rows one after the other."""
    return [
        Replayed(**{name: np.concatenate([getattr(part, name) for part in together]) for name in Replayed.__dataclass_fields__})
        for together in zip(*parts, strict=True)
    ]


def _mean(parts: Sequence[Replayed]) -> float:
    return float(np.mean([part.accuracy for part in parts]))


def _difference(ours: Sequence[Replayed], theirs: Sequence[Replayed], share: float = 1.0) -> Values:
    """Return ours - share x theirs, value by value, [G, R]; one method without seeds is the same for all of ours."""
    rivals = theirs if len(theirs) == len(ours) else [theirs[0]] * len(ours)
    return np.stack([a.value_R - share * b.value_R for a, b in zip(ours, rivals, strict=True)])


def home(material: Material) -> dict[str, Any]:
    """Endpoint 1: the most probable agent is at home, and answers are as good as each suite's best agent."""
    routed = {suite: material.routed(suite) for suite in SINGLE}
    at_home = {suite: np.isin([part.first_R for part in routed[suite]], _places(material, suite)) for suite in SINGLE}
    shares = {suite: float(at_home_GR.mean()) for suite, at_home_GR in at_home.items()}
    gates = _joined(list(routed.values()))
    oracle = {suite: material.best([suite]) for suite in SINGLE}
    by_suite = _joined([[material.alone(suite, oracle[suite])] for suite in SINGLE])
    specialists = [name for names in HOME.values() for name in names]
    best = material.best(SINGLE, specialists)
    single = _joined([[material.alone(suite, best)] for suite in SINGLE])
    against_single = _compare(gates, single)
    share, accuracy = float(np.mean(list(shares.values()))), _mean(gates)
    found: dict[str, Any] = {
        "home_share": share,
        "home_share_by_suite": shares,
        "accuracy": accuracy,
        "mean_active": float(np.mean([part.k_R.mean() for part in gates])),
        "oracle_agents": oracle,
        "oracle_accuracy": _mean(by_suite),
        "best_specialist": best,
        "best_specialist_accuracy": _mean(single),
        "kmeans_accuracy": _mean(_joined([material.clustered(suite) for suite in SINGLE])),
        "row_oracle_accuracy": _mean(_joined([[replay_choices(material.test[s], row_oracle(material.test[s]))] for s in SINGLE])),
        "against_best_specialist": plain(against_single),
        "against_kmeans": plain(_compare(gates, _joined([material.clustered(suite) for suite in SINGLE]))),
        "intervals": {
            "home_share": spread(np.concatenate(list(at_home.values()), axis=1)),
            "accuracy_less_95_percent_of_oracle": spread(_difference(gates, by_suite, 0.95)),
            "mean_active": spread(np.stack([part.k_R for part in gates])),
        },
        "p": against_single.p,
        "p_of": "accuracy less the best specialist's, against 0; not against the bar of 25 points",
    }
    passed = share >= 0.95 and accuracy >= 0.95 * _mean(by_suite) and accuracy - _mean(single) >= 0.25
    return {**found, "passed": passed}


def _places(material: Material, suite: str) -> list[int]:
    agents = material.test[suite].agents
    return [agents.index(name) for name in HOME[suite]]


def liar(with_liar: Material, without: Material, name: str = LIAR) -> dict[str, Any]:
    """Endpoint 5: the liar gets next to no rows, and its being there costs nothing.

    Judged is the larger of two upper ends: that over gates and rows, and Wilson's for the rows of one gate.
    """
    index = with_liar.test["arith"].agents.index(name)
    gates = _joined([with_liar.routed(suite) for suite in SINGLE])
    honest = _joined([without.routed(suite) for suite in SINGLE])
    sent_GR = np.stack([part.first_R == index for part in gates])
    num_gates, num_rows = sent_GR.shape
    sent, alone = spread(sent_GR), wilson(-(-int(sent_GR.sum()) // num_gates), num_rows)
    high = max(sent["high"], alone.high)
    compared = not_worse(_difference(gates, honest))
    return {
        "share": sent["value"],
        "share_high": high,
        "share_high_over_gates": sent["high"],
        "share_high_by_wilson_at_one_gates_rows": alone.high,
        "asked_share": float(np.mean([part.asked_RA[:, index].mean() for part in gates])),
        "accuracy": _mean(gates),
        "accuracy_without": _mean(honest),
        "against_without": compared,
        "p": compared["p"],
        "p_of": compared["p_of"],
        "passed": high <= 0.03 and compared["passed"],
    }


def controls(within: Material, across: Material) -> dict[str, Any]:
    """Endpoint 6: shuffled entropies teach nothing, or one favourite.

    A gate that was taught nothing has favourites of its own by region; only the mean over many of them is even.
    """
    agents = within.test["arith"].agents
    within_GR, across_GR = within.firsts(), across.firsts()
    shares = np.bincount(within_GR.ravel(), minlength=len(agents)) / within_GR.size
    favourite = float(np.mean([np.bincount(first_R).max() / len(first_R) for first_R in across_GR]))
    distance = float(np.abs(shares - 1 / len(agents)).max())
    return {
        "score": "raw",
        "within_gates": len(within_GR),
        "within_shares": dict(zip(agents, shares.tolist(), strict=True)),
        "within_largest_distance": distance,
        "across_gates": len(across_GR),
        "across_favourite": favourite,
        "passed": distance <= 0.05 and favourite >= 0.95,
    }


if __name__ == "__main__":
    run_job(study)
