"""The preregistered study of the gate (PREREGISTRATION.md): tuning on validation rows, then all endpoints on test rows.

    python jobs/study_gate.py --config jobs/study_gate.yaml --json out/study.json

Hours on two cores, nearly all of them for the answer matrices; stopped, the same command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from study_endpoints import controls, home, liar, same_surface, several
from study_material import (
    CONSTANT,
    MATRIX_SUITES,
    POOL,
    WRONG,
    Study,
    embeddings,
    gate,
    labelled_gate,
    material,
    matrices,
    rollouts,
    sent_to,
)
from study_memory import chain, relay

from dmoa.cli.evaluation_session import opened_ray
from dmoa.cli.jobs import read_job, run_job
from dmoa.cli.options import Common, with_common
from dmoa.core.gate import Gate
from dmoa.core.scores import SCORE_OFFSET_NATS
from dmoa.errors import ConfigError
from dmoa.evaluation.hierarchical import holm
from dmoa.evaluation.matrix import AnswerMatrix
from dmoa.evaluation.matrix_replay import replay
from dmoa.evaluation.matrix_routers import gate_choices

SCORES, EPOCHS = ("raw", "anchored"), (10, 20, 40)
ALPHAS = tuple(product((0.1, 0.3, 0.5), (0.5, 0.3, 0.1)))
"""(alpha of tau, alpha of theta)."""
MOST_ACTIVE = 1.6
"""Agents of a step, on average: the budget within which the pair of alphas is chosen."""
TIE = 1e-9
UNHEARD_NATS = 20.0
"""What counts as the entropy of a reply of nothing."""
Found = Mapping[str, Mapping[str, AnswerMatrix]]


@with_common
def study(common: Common) -> None:
    """Run the study, or go on with it; settings stand in the `job:` section of --config."""
    _, values = read_job(common)
    try:
        settings = Study(**{**values, "out": Path(values["out"]).absolute()}, common=common)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"job: {error}; allowed: {', '.join(Study.__dataclass_fields__)}; out is needed") from error
    started = time.time()
    with opened_ray(None):
        result = _run(settings)
    result["seconds_of_this_session"] = time.time() - started
    common.write_json(result)
    for name, endpoint in result["endpoints"].items():
        print(f"{name:<14} {'passed' if endpoint['passed'] else 'FAILED'}")


def _run(settings: Study) -> dict[str, Any]:
    found: dict[str, Mapping[str, AnswerMatrix]] = {"validation": matrices(settings, "validation")}
    seen = embeddings(settings, "validation", found["validation"])
    chosen, tried = _tune(settings, found, seen)
    settings.common.say(f"chosen on validation rows, without labels: {chosen}; now the test rows are opened")
    found["test"] = matrices(settings, "test")
    unseen = embeddings(settings, "test", found["test"])
    other = {**chosen, "score": "anchored" if chosen["score"] == "raw" else "raw"}
    endpoints = _endpoints(settings, chosen, found, unseen)
    endpoints["3 relay"] = relay(settings, chosen)
    endpoints["3 chain"] = chain(settings, chosen)
    judged = [name for name in endpoints if "p" in endpoints[name]]
    for name, p in zip(judged, holm([endpoints[name]["p"] for name in judged]), strict=True):
        endpoints[name]["p_holm"] = p
    labelled = [labelled_gate(settings, seed, chosen) for seed in range(settings.seeds)]
    return {
        "chosen": chosen,
        "tried": tried,
        "configurations_tried": len(SCORES) + len(EPOCHS) + len(ALPHAS),
        "endpoints": dict(sorted(endpoints.items())),
        "other_score": {"settings": other, "endpoints": _endpoints(settings, other, found, unseen)},
        "upper_bound_with_labels": home(material(settings, POOL, labelled, found, unseen)),
        "rows": {"test": settings.test_rows, "validation": settings.validation_rows},
        "seeds": settings.seeds,
    }


def _gates(settings: Study, name: str, chosen: Mapping[str, Any], ablation: str = "default") -> list[Gate]:
    sources = [rollouts(settings, name, seed) for seed in range(settings.seeds)]
    return [gate(settings, name, seed, ablation, source, chosen)[0] for seed, source in enumerate(sources)]


def _tune(settings: Study, found: Found, seen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choose score, epochs and theta's quantile on validation rows, by criteria that read no label."""
    sent = {score: sent_to(_gates(settings, CONSTANT, {"score": score}), seen) for score in SCORES}
    score = "anchored" if sent["anchored"] < sent["raw"] - TIE else "raw"
    pairwise = {epochs: _pairwise(settings, {"score": score, "epochs": epochs, "patience": epochs}) for epochs in EPOCHS}
    epochs = next(number for number in EPOCHS if pairwise[number] >= max(pairwise.values()) - TIE)
    fixed: dict[str, Any] = {"score": score, "epochs": epochs, "patience": epochs}
    spent = {pair: _spent(settings, {**fixed, **_alphas(pair)}, found, seen) for pair in ALPHAS}
    within = [pair for pair in ALPHAS if spent[pair]["active"] <= MOST_ACTIVE]
    best = min(within, key=lambda pair: spent[pair]["doubt"]) if within else min(ALPHAS, key=lambda pair: spent[pair]["active"])
    sizes = [{**_alphas(pair), **figures} for pair, figures in spent.items()]
    return {**fixed, **_alphas(best)}, {"liar_share": sent, "held_pairwise": pairwise, "sizes": sizes}


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
    for g in _gates(settings, POOL, chosen):
        for suite in MATRIX_SUITES:
            matrix = found["validation"][suite].only(g.spec.agents)
            unsure_RA = np.log(np.nan_to_num(matrix.entropies(), nan=UNHEARD_NATS) + SCORE_OFFSET_NATS)
            replayed = replay(matrix, gate_choices(g, seen[suite]))
            doubts.append(unsure_RA[np.arange(len(unsure_RA)), replayed.chosen_R])
            if suite == "shared":
                active.append(replayed.k_R)
    return {"active": float(np.mean(np.concatenate(active))), "doubt": float(np.mean(np.concatenate(doubts)))}


def _endpoints(settings: Study, chosen: Mapping[str, Any], found: Found, unseen: Mapping[str, Any]) -> dict[str, Any]:
    def of(name: str, ablation: str = "default") -> Any:
        return material(settings, name, _gates(settings, name, chosen, ablation), found, unseen)

    honest = of(POOL)
    wrong = liar(of(WRONG), honest, "liar-wrong")
    return {
        "1 home": home(honest),
        "2 shared": same_surface(honest),
        "4 several": several(honest),
        "5 liar": {**liar(of(CONSTANT), honest), "wrong_answers": wrong},
        "6 controls": controls(of(POOL, "shuffled-within"), of(POOL, "shuffled-across")),
    }


if __name__ == "__main__":
    run_job(study)
