"""A stream answers for the record first, and only then learns: in no other order, whatever the stream."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dmoa.checkpoint import Checkpoint, describe_gate
from dmoa.core.gate import Gate, init_gate
from dmoa.core.inference import Decider
from dmoa.errors import ConfigError, DmoaError
from dmoa.testing import scripted_pool
from dmoa.training.adapt import Adapter
from dmoa.training.distributed import SingleWorker
from dmoa.training.options import AdaptSettings
from dmoa.training.prequential import Counted, Stream, StreamJob, StreamUpdate
from dmoa.training.rollouts import RolloutQuery
from dmoa.types import Answer, Query, RouteRequest
from tests.unit.training.adapt_lessons import CPU, lesson, place, spec

QUERIES = 9


class FakeSwarm:
    """Agents of made-up domains, routed by whatever gate is installed."""

    def __init__(self, changed: Mapping[str, int] | None = None, fails: str = "", lies: str = "") -> None:
        """`changed`: queries whose replies are those of another domain; `fails`: one that fails; `lies`: one of another gate."""
        self.asked: list[str] = []
        self.decisions: dict[str, list[float]] = {}
        self._changed, self._fails, self._lies = dict(changed or {}), fails, lies

    def install(self, version: str, gate: Gate) -> None:
        self._version, self._decider = version, Decider(gate, version)

    async def ask(self, query: Query) -> Answer:
        self.asked.append(query.query_id)
        if query.query_id == self._fails:
            raise DmoaError("nobody is there")
        domain, number = map(int, query.query_id.split("/"))
        request = RouteRequest(input_X=place(domain, number))
        (decision,) = self._decider.decide([request])
        self.decisions[query.query_id] = decision.probability_A.tolist()
        await asyncio.sleep(0)  # others of the batch are under way at the same moment
        answer = lesson(self._changed.get(query.query_id, domain), number).answer
        step = dataclasses.replace(answer.steps[0], decision=decision, route=request)
        version = "another" if query.query_id == self._lies else self._version
        return dataclasses.replace(answer, steps=(step,), gate_version=version)

    async def close(self) -> None: ...


def streamed(swarm: FakeSwarm, *, every: int = 1, kept: Mapping[str, Counted] | None = None, steps: int = 2) -> list[Any]:
    """Run a stream of alternating domains from an untrained gate; returns what was kept, in order."""
    gate = init_gate(spec(score="raw"), seed=3)
    record: Checkpoint = describe_gate(gate, fingerprint="f" * 64).model_copy(update={"metrics": {"eta": 1.0}})
    found: list[Any] = []
    asked = [f"{number % 3}/{number}" for number in range(QUERIES)]
    job = StreamJob(
        config=scripted_pool(),
        open_swarm=lambda: swarm,
        queries=tuple(
            (RolloutQuery(query_id=name, source="s", split="test", text=name), Query(trace_id=name, text=name, query_id=name))
            for name in asked
        ),
        starts={"zero-shot": None},
        out=Path(),
        keep=lambda _, one: found.append((one, len(swarm.asked))),
        kept={"zero-shot": dict(kept or {})},
        settings=AdaptSettings(steps=steps),
        every=every,
        preset="paper",
        fingerprint="f" * 64,
    )
    world = SingleWorker(CPU)
    stream = Stream("zero-shot", job, swarm, Adapter(gate, record, None, job.settings, world), world)
    asyncio.run(stream.run())
    return found


def test_a_counted_answer_does_not_depend_on_its_own_replies_but_later_ones_do() -> None:
    plain, other = FakeSwarm(), FakeSwarm(changed={"1/4": 2})
    streamed(plain)
    streamed(other)
    names = plain.asked
    same = [plain.decisions[name] == other.decisions[name] for name in names]
    assert same[:5] == [True] * 5  # 1/4 is the fifth: what its agents said cannot have reached its own decision
    assert not any(same[5:])


@pytest.mark.parametrize("every", [1, 3])
def test_answers_are_kept_before_the_update_and_the_next_query_comes_after_it(every: int) -> None:
    found = streamed(FakeSwarm(), every=every)
    kinds = [type(one) for one, _ in found]
    assert kinds == ([Counted] * every + [StreamUpdate]) * (QUERIES // every)
    assert [asked for _, asked in found] == [every * (place_ // (every + 1) + 1) for place_ in range(len(found))]  # none ahead
    batches = [found[start : start + every + 1] for start in range(0, len(found), every + 1)]
    assert all({one.version for one, _ in batch[:-1]} == {batch[-1][0].answered_by} for batch in batches)
    updates = [one for one, _ in found if isinstance(one, StreamUpdate)]
    assert [update.used for update in updates] == [every] * len(updates)
    assert all(before.version == after.answered_by for before, after in pairwise(updates))


def test_a_stream_goes_on_from_what_was_kept_without_asking_again() -> None:
    whole, first = FakeSwarm(), streamed(FakeSwarm())
    kept = {one.query.query_id: dataclasses.replace(one, is_new=False) for one, _ in first[:9] if isinstance(one, Counted)}
    again = streamed(whole, kept=kept)
    assert len(whole.asked) == QUERIES - len(kept)
    last = [[one.version for one, _ in found if isinstance(one, StreamUpdate)] for found in (first, again)]
    assert last[0] == last[1]


def test_answers_of_another_run_are_refused() -> None:
    kept = {one.query.query_id: one for one, _ in streamed(FakeSwarm()) if isinstance(one, Counted)}
    with pytest.raises(ConfigError, match="use another folder"):
        streamed(FakeSwarm(), kept=kept, steps=3)


def test_an_answer_of_another_gate_is_not_counted() -> None:
    with pytest.raises(DmoaError, match="was answered by gate another"):
        streamed(FakeSwarm(lies="0/3"))


def test_a_failed_query_counts_and_teaches_nothing() -> None:
    found = streamed(FakeSwarm(fails="2/2"))
    lost = next(one for one, _ in found if isinstance(one, Counted) and one.query.query_id == "2/2")
    assert lost.table is None
    assert "nobody is there" in str(lost.error)
    update = next(one for one, _ in found if isinstance(one, StreamUpdate) and one.queries == ["2/2"])
    assert update.used == 0
    assert update.version == update.answered_by
