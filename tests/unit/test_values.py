"""The value objects by hand and by law, and that flat records hold the same fields and give the same values back."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.evaluation.records import Answered
from dmoa.evaluation.results import EvaluationRow
from dmoa.flat import TokenFields, flat, flat_reply, reply_of
from dmoa.trace import ReplyAgent, ReplySummarizer
from dmoa.training.rollouts import RolloutRow
from dmoa.types import AgentReply, EntropySum, StepRecord, SummarizerRecord, TokenUsage

SMALL = st.integers(0, 1000)
USAGES = st.builds(TokenUsage, prompt_tokens=SMALL, cached_tokens=SMALL, completion_tokens=SMALL, reasoning_tokens=SMALL)
# Whole numbers: their sums are exact, so that the law holds to the last bit.
WHOLE = SMALL.map(float)
ENTROPIES = st.builds(
    EntropySum, sum_nats=WHOLE, sq_sum=WHOLE, slack_nats=WHOLE, tokens=SMALL, kind=st.sampled_from(["exact", "truncated"])
)
TOKENS = st.lists(st.floats(0, 12), min_size=1, max_size=40)


def test_usage_by_hand() -> None:
    one, other = TokenUsage(prompt_tokens=10, cached_tokens=6, completion_tokens=4), TokenUsage(prompt_tokens=5)
    assert one + other == TokenUsage(prompt_tokens=15, cached_tokens=6, completion_tokens=4)
    assert one.total == 14  # the cached ones are part of the prompt
    assert sum((one, other, one), TokenUsage()).total == 33
    assert TokenUsage().total == 0


def test_a_step_uses_what_its_agents_and_its_summarizer_use() -> None:
    lost = AgentReply(agent="a", status="late", usage=TokenUsage(prompt_tokens=7))
    good = AgentReply(agent="b", status="ok", usage=TokenUsage(prompt_tokens=20, cached_tokens=16, completion_tokens=3))
    record = SummarizerRecord(mode="llm", verdict="final", usage=TokenUsage(prompt_tokens=100, completion_tokens=1))
    step = StepRecord(step=0, replies=(lost, good), active=("b",), summary="19", summarizer=record)
    assert step.usage == TokenUsage(prompt_tokens=127, cached_tokens=16, completion_tokens=4)


@settings(derandomize=True)
@given(USAGES, USAGES, USAGES)
def test_usage_adds_up_in_any_order(a: TokenUsage, b: TokenUsage, c: TokenUsage) -> None:
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + TokenUsage() == a
    assert (a + b).total == a.total + b.total


def test_entropy_by_hand() -> None:
    token = EntropySum.of_tokens([3.0])
    assert token == EntropySum(sum_nats=3.0, sq_sum=9.0, tokens=1)
    assert EntropySum.of_tokens([1.0, 2.0]) == EntropySum(sum_nats=3.0, sq_sum=5.0, tokens=2)
    assert repr(EntropySum.of_tokens([])) == repr(EntropySum())  # floats, also of nothing
    middle = EntropySum(sum_nats=0.5, sq_sum=0.25, slack_nats=0.25, tokens=1, kind="truncated")
    assert token + middle == EntropySum(sum_nats=3.5, sq_sum=9.25, slack_nats=0.25, tokens=2, kind="truncated")
    assert (token + middle).mean_nats == 1.75


@settings(derandomize=True)
@given(ENTROPIES, ENTROPIES, ENTROPIES)
def test_entropy_adds_up_in_any_order(a: EntropySum, b: EntropySum, c: EntropySum) -> None:
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + EntropySum() == a


@settings(derandomize=True)
@given(TOKENS, st.integers(0, 40))
def test_parts_of_a_reply_add_up_to_the_whole(values: list[float], cut: int) -> None:
    whole = EntropySum.of_tokens(values[:cut]) + EntropySum.of_tokens(values[cut:])
    assert whole.tokens == len(values)
    assert whole.mean_nats == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert whole.sq_sum == pytest.approx(math.fsum(value * value for value in values), abs=1e-9)


@pytest.mark.parametrize(
    ("entropy", "mean_nats", "is_finite"),
    [
        (EntropySum(), None, True),
        (EntropySum(tokens=4), 0.0, True),
        (EntropySum(sum_nats=2.0), None, True),
        (EntropySum(sum_nats=-2.0, tokens=4), None, True),
        (EntropySum(sum_nats=math.inf, tokens=4), None, False),
        (EntropySum(sum_nats=math.nan, tokens=4), None, False),
        (EntropySum(sum_nats=2.0, sq_sum=math.nan, tokens=4), 0.5, False),
        (EntropySum(sum_nats=2.0, slack_nats=math.inf, tokens=4), 0.5, False),
    ],
)
def test_what_is_known_of_an_entropy(entropy: EntropySum, mean_nats: float | None, is_finite: bool) -> None:
    assert (entropy.mean_nats, entropy.is_finite) == (mean_nats, is_finite)
    if not is_finite:
        assert not (entropy + EntropySum.of_tokens([1.0])).is_finite


def test_flat_records_have_the_fields_of_the_values() -> None:
    counts = {part.name for part in fields(TokenUsage)}
    assert TokenFields.model_fields.keys() == counts == flat(TokenUsage()).keys()
    for record in (ReplyAgent, ReplySummarizer, Answered, EvaluationRow, RolloutRow):
        assert issubclass(record, TokenFields)
    columns = {name for name in RolloutRow.model_fields if name.startswith("entropy_")}
    assert columns == {f"entropy_{part.name}" for part in fields(EntropySum)} == flat(EntropySum(), "entropy_").keys()


@settings(derandomize=True)
@given(USAGES)
def test_a_flat_record_gives_its_usage_back(usage: TokenUsage) -> None:
    assert Answered(row_id="r", benchmark="arith", policy="dmoa", **flat(usage)).usage == usage


@settings(derandomize=True)
@given(USAGES, ENTROPIES)
def test_a_reply_comes_back_from_its_line(usage: TokenUsage, entropy: EntropySum) -> None:
    reply = AgentReply(agent="a", status="ok", text="19", usage=usage, entropy=entropy, are_tokens_estimated=True, attempts=2)
    reply = replace(reply, reasoning="10 and 9", reasoning_entropy=entropy + EntropySum.of_tokens([2.0]))
    line = json.dumps(flat_reply(reply))
    assert reply_of(json.loads(line)) == reply


def test_the_line_of_a_reply_in_the_call_cache() -> None:
    usage = TokenUsage(prompt_tokens=10, cached_tokens=6, completion_tokens=4)
    reply = AgentReply(agent="a", status="ok", text="19", usage=usage, entropy=EntropySum.of_tokens([2.0]), engine="list")
    assert json.dumps(flat_reply(reply)) == (
        '{"agent": "a", "status": "ok", "text": "19", "reasoning": "", "finish_reason": "stop", '
        '"entropy_sum_nats": 2.0, "entropy_sq_sum": 4.0, "entropy_slack_nats": 0.0, "entropy_tokens": 1, '
        '"entropy_kind": "exact", "reasoning_entropy_sum_nats": 0.0, "reasoning_entropy_sq_sum": 0.0, '
        '"reasoning_entropy_slack_nats": 0.0, "reasoning_entropy_tokens": 0, "reasoning_entropy_kind": "exact", '
        '"prompt_tokens": 10, "cached_tokens": 6, "completion_tokens": 4, "reasoning_tokens": 0, '
        '"are_tokens_estimated": false, "latency_ms": 0.0, "engine_ms": 0.0, "error": null, '
        '"attempts": 1, "engine": "list", "is_memoised": false, "replica": "", "right_probability": null, "price": null}'
    )


def test_what_an_older_line_lacks_has_its_default_and_what_nobody_knows_is_refused() -> None:
    assert reply_of({"agent": "a", "status": "ok", "prompt_tokens": 3}).usage == TokenUsage(prompt_tokens=3)
    with pytest.raises(TypeError, match="surprise"):
        reply_of({"agent": "a", "status": "ok", "surprise": 1})
