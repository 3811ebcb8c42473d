"""Known-answer probes: inputs of generated questions and who is right on them, which gates are compared by. Uses probe labels.

A JSON Lines file: `{"input": [X floats], "right": {"agent": 0 or 1, ...}}` a question; `dmoa probe --known-answers` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmoa.core import guards
from dmoa.core.gate import Gate
from dmoa.core.guards import Verdict
from dmoa.errors import ConfigError
from dmoa.reading import read_bounded, read_json
from dmoa.serving.router.replayed import loads
from dmoa.serving.router.versions import judged
from dmoa.types import FloatArray


@dataclass(frozen=True, slots=True)
class Probes:
    """Questions whose answers are known."""

    place: str
    inputs: list[FloatArray]
    right: list[dict[str, float]]

    def judge(self, gate: Gate, current: Gate, *, margin: float, error_rate: float) -> Verdict:
        """Judge whether a gate activates agents that are right less often than the current one does."""
        agents = current.spec.agents
        if {len(input_X) for input_X in self.inputs} != {current.spec.input_dim}:
            raise ConfigError(
                f"router.guards.known_answers is {self.place!r}: inputs are not {current.spec.input_dim} wide; write it anew"
            )
        right_RA = np.array([[one.get(name, 0.5) for name in agents] for one in self.right])
        new_RA, old_RA = (loads(judged(one, self.inputs), len(agents)) for one in (gate, current))
        verdict = guards.not_worse(
            "known_answers", ((old_RA - new_RA) * right_RA).sum(axis=1), margin=margin, error_rate=error_rate
        )
        return replace(verdict, words=f"{verdict.words} (uses probe labels)")


def read_probes(place: str) -> Probes:
    """Return the probes of a file. Raises ConfigError where it cannot be read."""
    inputs, right = [], []
    try:
        for line in read_bounded(Path(place), most=1 << 28).splitlines():
            tree: dict[str, Any] = read_json(line)
            inputs.append(np.asarray(tree["input"], np.float32))
            right.append({str(name): float(value) for name, value in tree["right"].items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"router.guards.known_answers is {place!r}: {error}; write it with `dmoa probe --known-answers`"
        ) from error
    if not inputs:
        raise ConfigError(f"router.guards.known_answers is {place!r}: it is empty; write it with `dmoa probe --known-answers`")
    return Probes(place, inputs, right)
