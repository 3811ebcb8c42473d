"""A handful of attacks on learning while serving, small: guarded learning stays where the frozen gate is, unguarded does not."""

from __future__ import annotations

import pytest

from tests.attacks import ATTACKS, attacked

pytestmark = pytest.mark.contract
NAMED = {attack.name: attack for attack in ATTACKS}


@pytest.mark.parametrize(
    ("name", "told", "breaks"),
    [
        ("entropies reported as 0", "left out: dates", True),
        ("a confident liar joins", "left out: new", True),
        ("a stream of identical queries", "a copy of queries that teach already", True),
        ("one tenant posts false outcomes", "not believed", False),
    ],
)
def test_guarded_learning_stays_within_three_points(name: str, told: str, breaks: bool) -> None:
    found = attacked(NAMED[name], 0)
    assert found.guarded >= found.frozen - 0.03
    assert any(told in line for line in found.said)
    assert (found.unguarded < found.frozen - 0.05) is breaks
