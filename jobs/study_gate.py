"""The preregistered study of the gate (PREREGISTRATION.md): tuning on validation rows, then all endpoints on test rows.

    python jobs/study_gate.py --config jobs/study_gate.yaml --json out/study.json

Hours on two cores, nearly all of them for the answer matrices; stopped, the same command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from study_endpoints import controls, home, liar, same_surface, several
from study_material import CONSTANT, POOL, WRONG, Study, embeddings, gate, labelled_gate, material, matrices, rollouts, sent_to
from study_memory import chain, relay

from dmoa.cli.evaluation_session import opened_ray
from dmoa.cli.jobs import read_job, run_job
from dmoa.cli.options import Common, with_common
from dmoa.core.gate import Gate
from dmoa.errors import ConfigError
from dmoa.evaluation.hierarchical import holm
from dmoa.evaluation.matrix import AnswerMatrix
from dmoa.evaluation.matrix_replay import replay
from dmoa.evaluation.matrix_routers import gate_choices

SCORES, EPOCHS, THETAS = ("raw", "anchored"), (10, 20, 40), (0.5, 0.7, 0.9)
TIE = 1e-9
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
        "configurations_tried": len(SCORES) + len(EPOCHS) + len(THETAS),
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
    gains = {q: _gain(settings, {**fixed, "theta_alpha": round(1 - q, 3)}, found, seen) for q in THETAS}
    best = max(THETAS, key=lambda q: gains[q])
    return {**fixed, "theta_alpha": round(1 - best, 3)}, {"liar_share": sent, "held_pairwise": pairwise, "theta_gain": gains}


def _pairwise(settings: Study, chosen: Mapping[str, Any]) -> float:
    """Return the share of held-back pairs that gates of these settings rank right, mean over the seeds."""
    sources = [rollouts(settings, POOL, seed) for seed in range(settings.seeds)]
    records = [gate(settings, POOL, seed, "default", source, chosen)[1] for seed, source in enumerate(sources)]
    return float(np.mean([record.metrics["pairwise"] for record in records]))


def _gain(settings: Study, chosen: Mapping[str, Any], found: Found, seen: Mapping[str, Any]) -> float:
    """Return how much surer the winner is than the first choice, per extra agent that the cascade asked."""
    gained, extra = 0.0, 0
    for g in _gates(settings, POOL, chosen):
        for suite in ("arith", "words", "calendar", "shared"):
            matrix = found["validation"][suite].only(g.spec.agents)
            sure_RA = np.log(np.nan_to_num(matrix.entropies(), nan=20.0) + 1e-3)
            choices = gate_choices(g, seen[suite])
            asked = replay(matrix, choices).k_R
            for row, (choice, k) in enumerate(zip(choices, asked, strict=True)):
                first = sure_RA[row, list(choice.ranking[: choice.k])].min()
                gained += first - sure_RA[row, list(choice.ranking[:k])].min()
                extra += int(k) - choice.k
    return gained / extra if extra else 0.0


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
