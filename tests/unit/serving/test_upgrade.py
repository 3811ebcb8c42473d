"""Queries that meet another version of their pool: they begin again, whole, and say so when they no longer can."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from dmoa.config import Config
from dmoa.errors import DeadlineError, NoAgentError, PoolChangedError
from dmoa.serving.rollover import answer_on_one_pool_version, check_version, pool_version, query_drain_s
from dmoa.types import Event, Limits, Query, TextDelta

TREE = {
    "name": "p",
    "llms": {"s": {"model": "scripted:x", "engine": "scripted", "engine_kwargs": {"replies": {"a": "one"}}}},
    "agents": [{"name": "a", "llm": "s", "profile": "Adds."}],
}
QUERY = Query(trace_id="t", text="Who?", limits=Limits(max_steps=3))


def test_a_version_is_the_whole_configuration() -> None:
    first = Config.model_validate(TREE)
    changed = Config.model_validate(TREE | {"limits": {"max_steps": 3}})
    assert pool_version(first) == pool_version(Config.model_validate(TREE))
    assert pool_version(first) != pool_version(changed)
    check_version(pool_version(first), pool_version(first))
    with pytest.raises(PoolChangedError, match=f"version {pool_version(changed)}, and .* {pool_version(first)}"):
        check_version(pool_version(first), pool_version(changed))


class Ingress:
    """Attempts at a query, each given as what it yields before it ends or raises."""

    def __init__(self, *attempts: tuple[list[str | Event], Exception | None]) -> None:
        self._attempts = list(attempts)
        self.deadlines: list[float | None] = []

    async def answer(self, query: Query) -> AsyncGenerator[str | Event]:
        self.deadlines.append(query.limits.deadline_s)
        events, error = self._attempts.pop(0)
        for event in events:
            yield event
        if error is not None:
            raise error


CHANGED = PoolChangedError("another version")


async def test_a_query_begins_again_elsewhere_until_it_meets_one_version() -> None:
    here = Ingress((["old"], CHANGED))
    elsewhere = Ingress(([], CHANGED), (["new"], CHANGED), (["new", TextDelta(text="yes")], None))
    found = [event async for event in answer_on_one_pool_version(here.answer, elsewhere.answer, QUERY)]
    assert found == ["old", "new", "new", TextDelta(text="yes")]
    assert here.deadlines == [None]
    assert elsewhere.deadlines == [None, None, None]


async def test_text_that_left_cannot_be_taken_back() -> None:
    here = Ingress((["old", TextDelta(text="ye")], CHANGED))
    with pytest.raises(NoAgentError, match="replaced while it answered, ask again"):
        [event async for event in answer_on_one_pool_version(here.answer, Ingress().answer, QUERY)]


async def test_patience_ends() -> None:
    elsewhere = Ingress(([], CHANGED))
    attempts = answer_on_one_pool_version(Ingress(([], CHANGED)).answer, elsewhere.answer, QUERY, patience_s=0.01)
    with pytest.raises(NoAgentError, match="another version"):
        [event async for event in attempts]
    assert elsewhere.deadlines == [None]


async def test_the_deadline_goes_on() -> None:
    query = Query(trace_id="t", text="Who?", limits=Limits(max_steps=3, deadline_s=60.0))
    elsewhere = Ingress(([], CHANGED), ([], None))
    assert [event async for event in answer_on_one_pool_version(Ingress(([], CHANGED)).answer, elsewhere.answer, query)] == []
    first, second = elsewhere.deadlines
    assert first is not None
    assert second is not None
    assert second < first < 60.0
    late = Query(trace_id="t", text="Who?", limits=Limits(max_steps=3, deadline_s=0.01))
    with pytest.raises(DeadlineError, match="while the pool was being replaced"):
        [event async for event in answer_on_one_pool_version(Ingress(([], CHANGED)).answer, Ingress().answer, late)]


async def test_other_errors_are_the_query_s_own() -> None:
    with pytest.raises(NoAgentError, match="nobody"):
        [
            event
            async for event in answer_on_one_pool_version(Ingress(([], NoAgentError("nobody"))).answer, Ingress().answer, QUERY)
        ]


def test_an_ingress_goes_on_for_as_long_as_a_query_may() -> None:
    assert query_drain_s(None) == query_drain_s(60.0) == 300.0
    assert query_drain_s(600.0) == 630.0
