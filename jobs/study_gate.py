"""The preregistered study of the gate (PREREGISTRATION.md): tuning on validation rows, then all endpoints on test rows.

    python jobs/study_gate.py --config jobs/study_gate.yaml --json out/study.json

Hours on two cores, nearly all of them for the answer matrices; stopped, the same command goes on. What is known so far lies
in `result.json` of the study's folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from study_endpoints import controls, home, liar, same_surface, several
from study_gates import constant_agents, gate, gates, labelled_gate, material, sent_to, sure_and_wrong
from study_material import blank_replies, embeddings, matrices, rollouts
from study_memory import memory
from study_settings import (
    ALPHAS,
    CONSTANT,
    EPOCHS,
    MATRIX_SUITES,
    MOST_ACTIVE,
    POOL,
    SCORES,
    WRONG,
    Study,
    check_same,
    plain,
    pool,
    write_result,
)

from dmoa.cli.jobs import read_job, run_job
from dmoa.core.scores import SCORE_OFFSET_NATS
from dmoa.errors import ConfigError
from dmoa.evaluation.answer_matrix import AnswerMatrix, gate_choices, replay_choices
from dmoa.evaluation.statistics import holm
from dmoa.workflows.console import Common, with_common
from dmoa.workflows.evaluate import opened_ray

TIE = 1e-9
UNHEARD_NATS = 20.0
"""What counts as the entropy of a reply of nothing, and of no reply."""
JUDGED = ("1 home", "2 shared", "3 memory", "4 several", "5 liar")
"""The family of Holm's correction."""
Found = Mapping[str, Mapping[str, AnswerMatrix]]


@with_common
def study(common: Common) -> None:
    """Run the study, or go on with it; settings stand in the `job:` section of --config."""
    settings = open_study(common)
    started = time.time()
    with opened_ray(None):
        result = _run(settings)
    result["seconds_of_this_session"] = time.time() - started
    write_result(settings, result)
    common.write_json(plain(result))
    for name, endpoint in result["endpoints"].items():
        print(f"{name:<14} {'passed' if endpoint['passed'] else 'FAILED'}")


def open_study(common: Common) -> Study:
    """Return the settings of the `job:` section, checked against those that its folder was begun with. Raises ConfigError."""
    _, values = read_job(common)
    try:
        settings = Study(**{**values, "out": Path(values["out"]).absolute()}, common=common)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"job: {error}; allowed: {', '.join(Study.__dataclass_fields__)}; out is needed") from error
    check_same(settings)
    return settings


def _run(settings: Study) -> dict[str, Any]:
    found: dict[str, Mapping[str, AnswerMatrix]] = {"validation": matrices(settings, "validation")}
    seen = embeddings(settings, "validation", found["validation"])
    chosen, tried = _tune(settings, found, seen)
    settings.common.say(f"chosen on validation rows, without labels: {chosen}; now the test rows are opened")
    found["test"] = matrices(settings, "test")
    unseen = embeddings(settings, "test", found["test"])
    endpoints = _endpoints(settings, chosen, found, unseen)
    result = {
        "chosen": chosen,
        "tried": tried,
        "configurations_tried": len(SCORES) + len(EPOCHS) + len(ALPHAS),
        "endpoints": endpoints,
        "blank_replies": {split: blank_replies(matrix) for split, matrix in found.items()},
        "rows": {"test": settings.test_rows, "validation": settings.validation_rows},
        "seeds": settings.seeds,
    }
    settings.common.say(f"blank replies by agent: {result['blank_replies']}")
    other = {**chosen, "score": "anchored" if chosen["score"] == "raw" else "raw"}
    result["other_score"] = {"settings": other, "endpoints": _routed(settings, other, found, unseen)}
    result["upper_bound_with_labels"] = _upper_bound(settings, chosen, found, unseen)
    write_result(settings, result)
    endpoints["3 memory"] = memory(settings, chosen)
    for name, p in zip(JUDGED, holm([endpoints[name]["p"] for name in JUDGED]), strict=True):
        endpoints[name]["p_holm"] = p
    return {**result, "endpoints": dict(sorted(endpoints.items()))}


def _tune(settings: Study, found: Found, seen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choose score, epochs and theta's quantile on validation rows, by criteria that read no label."""
    constant = constant_agents(found["validation"], pool(CONSTANT).agent_names)
    settings.common.say(f"agents with one reply to four validation rows of five: {', '.join(constant) or 'none'}")
    sent = {score: sent_to(gates(settings, CONSTANT, {"score": score}), seen, constant) for score in SCORES}
    score = "anchored" if sent["anchored"] < sent["raw"] - TIE else "raw"
    pairwise = {epochs: _pairwise(settings, {"score": score, "epochs": epochs, "patience": epochs}) for epochs in EPOCHS}
    epochs = next(number for number in EPOCHS if pairwise[number] >= max(pairwise.values()) - TIE)
    fixed: dict[str, Any] = {"score": score, "epochs": epochs, "patience": epochs}
    spent = {pair: _spent(settings, {**fixed, **_alphas(pair)}, found, seen) for pair in ALPHAS}
    within = [pair for pair in ALPHAS if spent[pair]["active"] <= MOST_ACTIVE]
    best = min(within, key=lambda pair: spent[pair]["doubt"]) if within else min(ALPHAS, key=lambda pair: spent[pair]["active"])
    sizes = [{**_alphas(pair), **figures} for pair, figures in spent.items()]
    tried = {"constant_agents": constant, "sent_to_constant_agents": sent, "held_pairwise": pairwise, "sizes": sizes}
    return {**fixed, **_alphas(best)}, tried


def _alphas(pair: tuple[float, float]) -> dict[str, float]:
    return {"alpha": pair[0], "theta_alpha": pair[1]}


def _pairwise(settings: Study, chosen: Mapping[str, Any]) -> float:
    """Return the share of held-back pairs that gates of these settings rank right, mean over the seeds."""
    sources = [rollouts(settings, POOL, seed) for seed in range(settings.seeds)]
    records = [gate(settings, POOL, seed, "default", source, chosen)[1] for seed, source in enumerate(sources)]
    return float(np.mean([record.metrics["pairwise"] for record in records]))


def _spent(settings: Study, chosen: Mapping[str, Any], found: Found, seen: Mapping[str, Any]) -> dict[str, float]:
    """Return how many agents validation rows of `shared` ask, and the mean logarithm of the winners' entropies on all suites."""
    active, doubts = [], []
    for g in gates(settings, POOL, chosen):
        for suite in MATRIX_SUITES:
            matrix = found["validation"][suite].only(g.spec.agents)
            replayed = replay_choices(matrix, gate_choices(g, seen[suite]))
            doubts.append(winners_doubt(matrix, replayed.chosen_R))
            if suite == "shared":
                active.append(replayed.k_R)
    return {"active": float(np.mean(np.concatenate(active))), "doubt": float(np.mean(np.concatenate(doubts)))}


def winners_doubt(matrix: AnswerMatrix, chosen_R: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the logarithm of the winning reply's entropy, [R]; -1 in `chosen_R`, nobody, counts as a reply of nothing."""
    nats_R = matrix.entropies()[np.arange(len(chosen_R)), chosen_R]
    nats_R = np.where((chosen_R < 0) | np.isnan(nats_R), UNHEARD_NATS, nats_R)
    return np.asarray(np.log(nats_R + SCORE_OFFSET_NATS))


def _routed(settings: Study, chosen: Mapping[str, Any], found: Found, unseen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the endpoints of one configuration that are replayed on the matrices."""

    def of(name: str) -> Any:
        return material(settings, name, gates(settings, name, chosen), found, unseen)

    honest = of(POOL)
    wrong = liar(of(WRONG), honest, "liar-wrong")
    del wrong["passed"]  # damage is reported, without a bar
    return {
        "1 home": home(honest),
        "2 shared": same_surface(honest),
        "4 several": several(honest),
        "5 liar": {**liar(of(CONSTANT), honest), "wrong_answers": wrong},
    }


def _endpoints(settings: Study, chosen: Mapping[str, Any], found: Found, unseen: Mapping[str, Any]) -> dict[str, Any]:
    """Return all endpoints of the chosen configuration but that of memory, which asks agents again."""
    endpoints = _routed(settings, chosen, found, unseen)
    named = sure_and_wrong(settings)
    is_named = "liar-wrong" in named
    passed = endpoints["5 liar"]["passed"] and is_named
    endpoints["5 liar"] |= {"sure_and_wrong": named, "probe_names_liar_wrong": is_named, "passed": passed}
    # Anchors take off what each agent gives on average: with them, one global favourite could not be learned.
    raw = {**chosen, "score": "raw"}
    within = gates(settings, POOL, raw, "shuffled-within", settings.shuffles)
    across = gates(settings, POOL, raw, "shuffled-across")
    pair = (material(settings, POOL, those, found, unseen) for those in (within, across))
    endpoints["6 controls"] = controls(*pair)
    return endpoints


def _upper_bound(settings: Study, chosen: Mapping[str, Any], found: Found, unseen: Mapping[str, Any]) -> dict[str, Any]:
    """Return endpoint 1 of gates that were trained on labels."""
    labelled = [labelled_gate(settings, seed, chosen) for seed in range(settings.seeds)]
    described = "gates trained on correctness in place of entropy; raw score, no cascade: its theta would be of made-up entropies"
    return {"described": described, **home(material(settings, POOL, labelled, found, unseen, cascades=False))}


if __name__ == "__main__":
    run_job(study)
