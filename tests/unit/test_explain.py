"""Messages for bad input: a name that is nearly right gets the right one, wherever it was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dmoa.agents.pool import load_pool
from dmoa.config import loads
from dmoa.engines.models import resolve_adapter, resolve_model
from dmoa.errors import DmoaError
from dmoa.evaluation.records import EvaluateOptions
from dmoa.evaluation.registry import expand_names
from dmoa.evaluation.suites.suite import fine_split
from dmoa.serving.http.requests import ChatRequest, parse_body
from dmoa.validation import did_you_mean
from dmoa.workflows.evaluate import check_policies

POOL = """
name: tiny
llms: {fake: {model: "scripted:fake", engine: scripted}}
agents: [{name: adder, llm: fake, profile: Adds.}, {name: echo, llm: fake, profile: Echoes.}]
"""


@pytest.mark.parametrize(
    ("seen", "allowed", "said"),
    [
        ("temprature", ("temperature", "hidden"), "; did you mean 'temperature'?"),
        ("GSM8K", ("gsm8k", "mmlu"), "; did you mean 'gsm8k'?"),
        (" arith ", ("arith",), "; did you mean 'arith'?"),
        (("arit", "wrods", "qqq"), ("arith", "words"), "; did you mean 'arith', 'words'?"),
        ("qqq", ("arith", "words"), ""),
        ("", ("arith",), ""),
        ("arith", (), ""),
        ((), ("arith",), ""),
    ],
)
def test_a_near_name_is_suggested_and_no_other(seen: str | tuple[str, ...], allowed: tuple[str, ...], said: str) -> None:
    assert did_you_mean(seen, allowed) == said


def _chat(body: str) -> Callable[[], object]:
    return lambda: parse_body(ChatRequest, body.encode(), "application/json", refuses_unknown=True)


@pytest.mark.parametrize(
    ("act", "suggested"),
    [
        (lambda: loads(POOL + "gate: {temprature: 0.2}"), "temperature"),
        (lambda: loads(POOL + "gaet: {}"), "gate"),
        (lambda: loads(POOL + "summarizer: {mode: selct}"), "select"),
        (lambda: loads(POOL.replace("engine: scripted", "engine: scriptd")), "scripted"),
        (lambda: loads(POOL.replace("engine: scripted", "engine: scripted, engine_kwargs: {dely_ms: 1}")), "delay_ms"),
        (lambda: loads(POOL.replace("llm: fake", "llm: fkae")), "fake"),
        (lambda: loads(POOL, overrides=["limits.max_step=3"]), "max_steps"),
        (lambda: load_pool("specialist"), "specialists"),
        (lambda: resolve_adapter("builtin:arit"), "arith"),
        (lambda: resolve_model("embedded:smolm2-135m"), "smollm2-135m"),
        (lambda: expand_names(["gms8k"]), "gsm8k"),
        (lambda: expand_names(["calender"]), "calendar"),
        (lambda: fine_split("tset"), "test"),
        (lambda: EvaluateOptions.parse({"benchmarks": "arith", "policies": "dmoa", "track": "wandbb"}), "wandb"),
        (lambda: check_policies(("dnese",), loads(POOL)), "dense"),
        (lambda: check_policies(("single:ader",), loads(POOL)), "adder"),
        (lambda: check_policies(("adder",), loads(POOL)), "single:adder"),
        (lambda: check_policies(("dmoa:trianed",), loads(POOL), ("trained",)), "trained"),
        (_chat('{"model": "m", "messages": [{"role": "user", "content": "x"}], "temprature": 1}'), "temperature"),
        (_chat('{"model": "m", "messages": [{"role": "user", "content": "x"}], "dmoa": {"max_step": 1}}'), "max_steps"),
    ],
)
def test_every_refused_name_gets_its_suggestion(act: Callable[[], object], suggested: str) -> None:
    with pytest.raises(DmoaError, match=f"did you mean .*'{suggested}'") as refused:
        act()
    assert str(refused.value).count("did you mean") == 1
