"""The options of an evaluation: lists of names, budgets, and errors that say what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmoa.errors import ConfigError
from dmoa.evaluation.records import CompareOptions, EvaluateOptions
from dmoa.types import Limits


def test_names_are_lists_or_texts_with_commas() -> None:
    assert EvaluateOptions.parse({"benchmarks": "gsm8k, arith"}).benchmarks == ("gsm8k", "arith")
    assert EvaluateOptions.parse({"benchmarks": ["gsm8k", "arith"]}).benchmarks == ("gsm8k", "arith")


@pytest.mark.parametrize("policies", ["single, dmoa,single", ["single", "dmoa", "single"]])
def test_a_policy_named_twice_is_asked_once(policies: object) -> None:
    assert EvaluateOptions.parse({"benchmarks": "arith", "policies": policies}).policies == ("single", "dmoa")


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (Limits(max_steps=20), Limits(max_steps=3, max_agents=2, max_tokens=96)),
        (Limits(max_steps=2, max_agents=1, deadline_s=5.0), Limits(max_steps=2, max_agents=1, deadline_s=5.0, max_tokens=96)),
    ],
)
def test_the_cpu_budget_only_lowers_the_pools_limits(pool: Limits, expected: Limits) -> None:
    options = EvaluateOptions.parse({"benchmarks": "arith", "budget": "cpu"})
    assert options.limits(pool) == expected
    unlimited = EvaluateOptions.parse({"benchmarks": "arith"})
    assert unlimited.limits(pool) == pool
    short = {"benchmarks": "arith", "max_tokens": 16}
    assert EvaluateOptions.parse(short).limits(pool) == replace(pool, max_tokens=16)
    assert EvaluateOptions.parse(short | {"budget": "cpu"}).limits(pool) == replace(expected, max_tokens=16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"benchmarks": ""}, r"benchmarks is \(\); .*at least 1"),
        ({"benchmarks": "arith", "policies": ","}, r"policies is \(\); .*at least 1"),
        ({"benchmarks": "arith", "policies": [1]}, "policies.* is 1; "),
        ({"benchmarks": "arith", "limit": 0}, "limit is 0; .*greater than or equal to 1"),
        ({"benchmarks": "arith", "budget": "gpu"}, "budget is 'gpu'; .*'pool' or 'cpu'"),
        ({"benchmarks": "arith", "retry_failed": True}, "retry_failed has no effect without resume"),
        ({"benchmarks": "arith", "resume": True}, "resume needs out"),
        ({"benchmarks": "arith", "kind": "saboteur"}, "kind is 'saboteur', and no agent is an adversary"),
        ({"benchmarks": "arith", "url": "http://x", "call_cache": "c"}, "call_cache has no effect with url"),
        ({"benchmarks": "arith", "limits": 3}, "limits: unknown key .*expected one of benchmarks, policies"),
    ],
)
def test_bad_options_name_field_value_and_way_out(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluate: .*{message}"):
        EvaluateOptions.parse(values)


def test_a_kind_of_adversary_needs_one() -> None:
    assert EvaluateOptions.parse({"benchmarks": "arith", "kind": "saboteur", "adversaries": 1}).has_adversaries
    assert CompareOptions.parse({"benchmarks": "arith", "kind": "saboteur", "curve": "0..2"}).has_adversaries


def test_paths_may_be_texts() -> None:
    assert EvaluateOptions.parse({"benchmarks": "arith", "out": "out/x"}).out == Path("out/x")


def test_gates_are_named_folders() -> None:
    options = EvaluateOptions.parse({"benchmarks": "arith", "gates": "old=a/b, new=c"})
    assert options.gates == {"old": Path("a/b"), "new": Path("c")}
    with pytest.raises(ConfigError, match=r"gates.No.*lower case"):
        EvaluateOptions.parse({"benchmarks": "arith", "gates": "No=a"})
    for given, fault in (("a", "'a' is none"), ("a=b,c=", "'c=' is none"), ("a=b,a=c", "'a=c' is a second one")):
        with pytest.raises(ConfigError, match=f"gates is '{given}'; expected NAME=DIR,..., each name once; {fault}"):
            EvaluateOptions.parse({"benchmarks": "arith", "gates": given})
    with pytest.raises(ConfigError, match="gates have no effect with url"):
        EvaluateOptions.parse({"benchmarks": "arith", "gates": "a=b", "url": "http://x"})
