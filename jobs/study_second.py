"""The second test of PREREGISTRATION.md: endpoints 2 and 4 with a price on agents, on test rows of its own.

    python jobs/study_second.py --config jobs/study_gate.yaml --json out/study_second.json

It goes on in the folder of `jobs/study_gate.py`, which must have ended: same adapters, rollouts and settings. Half an hour
on two cores; stopped, the same command goes on.
"""

from __future__ import annotations

import json
from typing import Any

from study_endpoints import same_surface, several
from study_gate import open_study
from study_gates import gates, material
from study_material import answered, embeddings, matrices
from study_settings import POOL, Study, plain, pool

from dmoa.cli.jobs import run_job
from dmoa.errors import ConfigError
from dmoa.evaluation.run_folder import write_whole
from dmoa.evaluation.statistics import holm
from dmoa.workflows.console import Common, with_common
from dmoa.workflows.evaluate import opened_ray

SUITES = ("arith", "shared")
SEED = 8
"""Of the rows; the first test's have 7."""
ROWS = 500
PRICED = {"alpha": "auto", "agent_price": 0.1}
NAME = "second"


@with_common
def second(common: Common) -> None:
    """Run the second test, or go on with it."""
    settings = open_study(common)
    with opened_ray(None):
        result = _run(settings, _chosen(settings))
    write_whole(settings.out / f"{NAME}.json", json.dumps(plain(result), indent=2, allow_nan=False) + "\n")
    common.write_json(plain(result))
    for name, endpoint in result["endpoints"].items():
        print(f"{name:<14} {'passed' if endpoint['passed'] else 'FAILED'}")


def _chosen(settings: Study) -> dict[str, Any]:
    """Return what the first test chose, with the price in place of its alphas. Raises ConfigError where it has not ended."""
    path = settings.out / "result.json"
    if not path.exists():
        raise ConfigError(f"job.out: {str(settings.out)!r} holds no result; run jobs/study_gate.py to its end first")
    first = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    return {name: first[name] for name in ("score", "epochs", "patience")} | PRICED


def _run(settings: Study, chosen: dict[str, Any]) -> dict[str, Any]:
    trained = gates(settings, POOL, chosen)  # before any row is answered
    validation, test = matrices(settings, "validation"), answered(settings, NAME, pool(POOL), SUITES, rows=ROWS, seed=SEED)
    found = material(settings, POOL, trained, {"validation": validation, "test": test}, embeddings(settings, NAME, test))
    endpoints = {"2 shared": same_surface(found), "4 several": several(found)}
    for name, p in zip(endpoints, holm([endpoint["p"] for endpoint in endpoints.values()]), strict=True):
        endpoints[name]["p_holm"] = p
    points = [{"tau": gate.spec.mass, "theta": gate.spec.theta} for gate in trained]
    return {"settings": chosen, "rows": ROWS, "seed": SEED, "seeds": settings.seeds, "points": points, "endpoints": endpoints}


if __name__ == "__main__":
    run_job(second)
