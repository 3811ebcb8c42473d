"""The third test of PREREGISTRATION.md: endpoint 5 with constant agents discounted, on test rows of its own.

    python jobs/study_third.py --config jobs/study_gate.yaml --json out/study_third.json

It takes the rollouts of `jobs/study_gate.py`'s folder, or collects them by the same seeds. Some forty minutes on two cores
from nothing; stopped, the same command goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from study_endpoints import SINGLE, liar
from study_gate import open_study
from study_gates import gates, material
from study_material import answered, embeddings
from study_second import PRICED
from study_settings import CONSTANT, POOL, Study, plain, pool

from dmoa.cli.jobs import run_job
from dmoa.evaluation.answer_matrix import AnswerMatrix
from dmoa.evaluation.run_folder import write_whole
from dmoa.workflows.console import Common, with_common
from dmoa.workflows.evaluate import opened_ray

SEED = 9
"""Of the rows; the earlier tests' have 7 and 8."""
ROWS = 300
CHOSEN = {"score": "anchored", "epochs": 20, "patience": 20} | PRICED
"""What the first test chose, with the second one's price."""
NAME = "third"
Found = Mapping[str, Mapping[str, AnswerMatrix]]


@with_common
def third(common: Common) -> None:
    """Run the third test, or go on with it."""
    settings = open_study(common)
    with opened_ray(None):
        result = _run(settings)
    write_whole(settings.out / f"{NAME}.json", json.dumps(plain(result), indent=2, allow_nan=False) + "\n")
    common.write_json(plain(result))
    print(f"5 liar {'passed' if result['endpoints']['5 liar']['passed'] else 'FAILED'}")


def _run(settings: Study) -> dict[str, Any]:
    arms = {name: CHOSEN | {"discount_constant": name == "discounted"} for name in ("discounted", "kept")}
    for arm in arms.values():  # before any row is answered
        gates(settings, POOL, arm)
        gates(settings, CONSTANT, arm)
    test = answered(settings, NAME, pool(CONSTANT), SINGLE, rows=ROWS, seed=SEED)
    found: Found = {"validation": {}, "test": test}
    embedded = embeddings(settings, NAME, test)
    judged = {name: _liar(settings, arm, found, embedded) for name, arm in arms.items()}
    return {
        "settings": arms["discounted"],
        "rows": ROWS,
        "seed": SEED,
        "seeds": settings.seeds,
        "endpoints": {"5 liar": judged["discounted"]},
        "kept": judged["kept"],
    }


def _liar(settings: Study, arm: Mapping[str, Any], found: Found, embedded: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Return endpoint 5 of one arm: the pool with the liar against the pool without it."""
    pair = (material(settings, name, gates(settings, name, arm), found, embedded) for name in (CONSTANT, POOL))
    return liar(*pair)


if __name__ == "__main__":
    run_job(third)
