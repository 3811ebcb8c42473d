"""Messages for bad input: a name that is nearly right gets the right one, wherever it was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import BaseModel, ValidationError

from dmoa.agents.pool import load_pool
from dmoa.config import LimitsConfig, loads
from dmoa.engines.models import resolve_adapter, resolve_model
from dmoa.engines.recorded import RecordedReply
from dmoa.errors import DmoaError
from dmoa.evaluation.records import CompareOptions, EvaluateOptions
from dmoa.evaluation.registry import expand_names
from dmoa.evaluation.suites.suite import fine_split
from dmoa.policies.registry import POLICIES, check_words
from dmoa.serving.http.requests import ChatRequest, CompletionRequest, parse_body, request_error
from dmoa.serving.http.responses_api import ResponsesRequest
from dmoa.serving.trace_list import TraceFilter
from dmoa.training.options import TrainOptions
from dmoa.validation import describe, did_you_mean
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


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            lambda: loads(POOL, overrides=["agents[0].profile=Hi"]),
            "agents[0]: unknown key (value {'profile': 'Hi'}); expected one",
        ),
        (lambda: loads(POOL, overrides=["gate.a[b]=1"]), "gate.a[b]: unknown key (value 1); expected one of preset"),
        (lambda: loads(POOL + "gate: {'list[a]': 1}"), "gate.list[a]: unknown key (value 1); expected one of preset"),
        (lambda: loads(POOL.replace("llms: {fake", "llms: {'a[0]'")), "llms.a[0].[key] is 'a[0]'; expected 1-64 lower case"),
        (lambda: TrainOptions.parse({"rollouts": "r", "out": "o", "lr[0]": 3}), "lr[0]: unknown key (value 3); expected one"),
        (lambda: TraceFilter.parse({"filter[a]": "1"}), "filter[a]"),
        (lambda: check_words(POLICIES["moa"], "layers[0]=2", loads(POOL)), "layers[0]"),
        (_chat('{"model": "m", "messages": [{"role": "user", "content": "x"}], "stop[0]": "a"}'), "stop[0]"),
    ],
)
def test_a_name_with_brackets_is_a_name(act: Callable[[], object], said: str) -> None:
    with pytest.raises(DmoaError) as refused:
        act()
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("model", "field", "value", "said"),
    [
        (LimitsConfig, "hedge_after_ms", -1, "hedge_after_ms is -1; expected a number greater than 0 or 'p95'"),
        (LimitsConfig, "hedge_after_ms", "p96", "hedge_after_ms is 'p96'; expected a valid number or 'p95'; did you mean 'p95'?"),
        (LimitsConfig, "hedge_after_ms", [], "hedge_after_ms is []; expected a valid number or 'p95'"),
        (TrainOptions, "workers", -1, "workers is -1; expected a number greater than or equal to 0 or 'auto'"),
        (TrainOptions, "alpha", 2, "alpha is 2; expected a number less than 1 or 'auto'"),
        (EvaluateOptions, "split", "tst", "split is 'tst'; expected 'train', 'adaptation' or 'test' or 'specialist', "),
        (CompareOptions, "split", 3, "split is 3; expected 'train', 'adaptation' or 'test' or 'specialist', "),
        (RecordedReply, "entropy", -1, "entropy is -1; expected a number greater than or equal to 0 or a valid list"),
        (RecordedReply, "entropy", [1, -2], "entropy.1 is -2; expected a number greater than or equal to 0"),
    ],
)
def test_a_union_is_named_as_one_writes_it(model: type[BaseModel], field: str, value: object, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({field: value})
    sentences = [one for one in describe(caught.value, model).split("; ") if "missing" not in one and one != "add it"]
    told = "; ".join(sentences)
    assert told.startswith(said)
    assert told.count(field) == 1, "one sentence for all branches"


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (ChatRequest, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (ChatRequest, {"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "stop": 3}, "stop"),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "stop": ["a", 3]}, "stop[1]"),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "dmoa": True}, "dmoa"),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "dmoa": {"max_steps": "x"}}, "dmoa.max_steps"),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "tool_choice": 3}, "tool_choice"),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "tool_choice": "some"}, "tool_choice"),
        (CompletionRequest, {"prompt": 3}, "prompt"),
        (CompletionRequest, {"prompt": [3]}, "prompt[0]"),
        (CompletionRequest, {"prompt": "a", "stop": {}}, "stop"),
        (ResponsesRequest, {"input": 3}, "input"),
        (ResponsesRequest, {"input": [{"role": "user", "content": 3}]}, "input[0].content"),
        (ResponsesRequest, {"input": [{"type": "function_call_output", "call_id": "a", "output": 3}]}, "input[0].output"),
    ],
)
def test_a_union_in_a_body_is_named_as_one_writes_it(model: type[BaseModel], body: dict[str, object], param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"model": "tiny", **body})
    assert request_error(caught.value).param == param


def test_a_file_full_of_faults_is_told_in_a_few_words() -> None:
    names = "".join(f"k{i}: 1\n" for i in range(1000))
    with pytest.raises(DmoaError) as caught:
        loads(f"? {'a' * 100_000}\n: 1\n{names}")
    assert len(str(caught.value)) < 10_000
    assert str(caught.value).endswith("; and 984 more")
