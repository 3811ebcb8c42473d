"""The logits processor itself: hand-made batch updates in the order in which vLLM's runner makes them, against sums by hand.

Every step of the runner is `update_state` (None where the batch stays as it is), then `apply` on one row of logits per
request; then each row that sampled grows its list of output tokens. Scheduled asynchronously, it grows by a placeholder,
and a request that ended runs one step more before it is removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors, MoveDirectionality

from dmoa.engines.vllm.entropy import KEY, EntropyProcessor, EntropyWorker
from dmoa.engines.vllm.entropy_store import RequestSums

SAMPLED_LATER = -1
"""What stands for a token whose number the host does not know yet."""
ROWS = {
    2: [0.5, 0.5],
    4: [0.25, 0.25, 0.25, 0.25],
    8: [0.125] * 8,
    3: [0.5, 0.25, 0.25],  # 1.5 bits
    1: [1.0],
}
"""Probabilities of rows of logits, by a name."""
NATS = {2: math.log(2), 4: math.log(4), 8: math.log(8), 3: 1.5 * math.log(2), 1: 0.0}
"""Their entropies."""


def logits(*names: int) -> torch.Tensor:
    """Rows of logits with these distributions over eight tokens; what cannot come is at minus infinity."""
    rows = [[math.log(p) for p in ROWS[name]] + [-math.inf] * (8 - len(ROWS[name])) for name in names]
    return torch.tensor(rows) + 3.0  # a shift of all logits changes nothing


class Runner:
    """vLLM's side: applies an update, hands over logits, appends what was sampled."""

    def __init__(self) -> None:
        self.processor = EntropyProcessor(SimpleNamespace(), torch.device("cpu"), is_pin_memory=False)  # type: ignore[arg-type]
        self.worker = EntropyWorker()
        batch = SimpleNamespace(logitsprocs=LogitsProcessors([self.processor]))
        self.worker.model_runner = SimpleNamespace(input_batch=batch)
        self.outputs: dict[str, list[int]] = {}

    def added(self, index: int, key: str, outputs: list[int] | None = None) -> tuple[int, SamplingParams, list[int], list[int]]:
        self.outputs[key] = [] if outputs is None else outputs
        return index, SamplingParams(extra_args={KEY: key}), [7, 7], self.outputs[key]

    def step(self, rows: Sequence[int], sampled: Sequence[str], **update: Any) -> None:
        """One step over rows with these distributions; `sampled`: whose lists grow after it."""
        parts = {"removed": (), "added": (), "moved": ()} | update
        self.processor.update_state(BatchUpdate(batch_size=len(rows), **parts) if update else None)
        given = logits(*rows)
        assert self.processor.apply(given) is given
        assert torch.equal(given, logits(*rows))
        for key in sampled:
            self.outputs[key].append(SAMPLED_LATER)

    def take(self, key: str, tokens: int) -> RequestSums | None:
        return self.worker.take_entropies([(key, tokens)]).get(key)


def summed(*names: int) -> tuple[float, float, int]:
    """Sums over tokens of these distributions, by hand."""
    return sum(NATS[name] for name in names), sum(NATS[name] ** 2 for name in names), len(names)


def close(found: RequestSums | None, *names: int) -> bool:
    return found is not None and tuple(found)[:3] == pytest.approx(summed(*names), abs=1e-6)


def test_it_changes_no_argmax_and_yet_always_runs() -> None:
    assert not EntropyProcessor(SimpleNamespace(), torch.device("cpu"), False).is_argmax_invariant()  # type: ignore[arg-type]


def test_requests_that_join_and_go_on() -> None:
    run = Runner()
    run.step([2], "a", added=[run.added(0, "a")])
    run.step([4], "a")
    run.step([8, 3], "ab", added=[run.added(1, "b")])
    run.step([1, 2], "ab")
    assert close(run.take("a", 4), 2, 4, 8, 1)
    assert close(run.take("b", 2), 3, 2)
    assert run.worker.count_entropies() == 0


def test_a_request_that_ended_runs_one_step_more_whenever_its_sums_are_taken() -> None:
    for is_taken_first in (True, False):
        run = Runner()
        run.step([2, 4], "ab", added=[run.added(0, "a"), run.added(1, "b")])
        run.step([8, 4], "ab")  # a's second token ends it, but the next step is under way
        early = run.take("a", 2) if is_taken_first else None
        run.step([3, 4], "ab")
        late = run.take("a", 2) if not is_taken_first else None
        assert close(early or late, 2, 8)
        run.step([1], "b", removed=[], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)])  # b fills a's place
        run.step([2], "b")
        assert close(run.take("b", 5), 4, 4, 4, 1, 2)
        assert run.worker.count_entropies() == 0


def test_a_new_request_takes_the_place_of_one_that_went() -> None:
    run = Runner()
    run.step([2, 4], "ab", added=[run.added(0, "a"), run.added(1, "b")])
    run.step([8, 4], "bc", added=[run.added(0, "c")])  # an added row that replaces another is not listed as removed
    run.step([3, 4], "bc")
    assert close(run.take("a", 1), 2)
    assert close(run.take("c", 2), 8, 3)
    assert close(run.take("b", 3), 4, 4, 4)


def test_rows_that_condense() -> None:
    run = Runner()
    run.step([2, 4, 8, 3], "abcd", added=[run.added(i, key) for i, key in enumerate("abcd")])
    # a and c go: d fills a's place; listed as removed is what nobody fills, and not where d came from.
    run.step([1, 2], "bd", removed=[2], moved=[(3, 0, MoveDirectionality.UNIDIRECTIONAL)])
    run.step([8, 3], "bd")
    assert close(run.take("d", 3), 3, 1, 8)
    assert close(run.take("b", 3), 4, 2, 3)
    assert close(run.take("a", 1), 2)
    assert close(run.take("c", 1), 8)


def test_rows_that_swap_and_swap_again() -> None:
    run = Runner()
    run.step([2, 4, 8], "abc", added=[run.added(i, key) for i, key in enumerate("abc")])
    swap = MoveDirectionality.SWAP
    run.step([8, 4, 2], "abc", moved=[(0, 2, swap)])  # c, b, a
    run.step([1, 3, 2], "abc", moved=[(0, 1, swap), (1, 2, swap)])  # b, a, c
    assert close(run.take("a", 3), 2, 2, 3)
    assert close(run.take("b", 3), 4, 4, 1)
    assert close(run.take("c", 3), 8, 8, 2)


def test_all_three_kinds_in_one_update_go_in_the_order_of_vllm() -> None:
    run = Runner()
    run.step([2, 4, 8, 1], "abcd", added=[run.added(i, key) for i, key in enumerate("abcd")])
    moves = [(2, 1, MoveDirectionality.UNIDIRECTIONAL), (0, 1, MoveDirectionality.SWAP)]
    # a, b and d go: x takes 0, c fills 1, nobody fills 3; then x and c change places.
    run.step([3, 4], "cx", removed=[3], added=[run.added(0, "x")], moved=moves)
    run.step([2, 1], "cx")
    assert close(run.take("c", 3), 8, 3, 2)
    assert close(run.take("x", 2), 4, 1)
    for key, name in (("a", 2), ("b", 4), ("d", 1)):
        assert close(run.take(key, 1), name)


def test_parts_of_a_prompt_write_where_the_first_token_will_be() -> None:
    run = Runner()
    run.step([2], "a", added=[run.added(0, "a")])
    run.step([4, 8], "a", added=[run.added(1, "b")])  # b: a part of the prompt, nothing sampled
    run.step([4, 1], "a")
    run.step([4, 3], "ab")
    assert close(run.take("b", 1), 3)
    assert close(run.take("a", 4), 2, 4, 4, 4)


def test_a_preempted_request_comes_back_with_the_tokens_that_count() -> None:
    run = Runner()
    run.step([2, 4], "ab", added=[run.added(0, "a"), run.added(1, "b")])
    run.step([8, 4], "ab")
    run.step([3], "a", removed=[1])  # b is out
    tokens = run.outputs["b"]
    del tokens[1:]  # the runner drops what was sampled for nothing
    run.step([3, 8], "a", added=[run.added(1, "b", tokens)])  # a part of its prompt once more
    run.step([3, 1], "ab")
    run.step([3, 2], "ab")
    assert close(run.take("b", 3), 4, 1, 2)
    assert close(run.take("a", 6), 2, 8, 3, 3, 3, 3)


def test_a_preempted_request_may_come_back_in_another_place_while_its_old_one_is_given_away() -> None:
    run = Runner()
    run.step([2, 4], "ab", added=[run.added(0, "a"), run.added(1, "b")])
    run.processor.update_state(BatchUpdate(batch_size=0, removed=[1, 0], added=[], moved=[]))  # b is out, a has ended
    run.step([8], "b", added=[run.added(0, "b", run.outputs["b"])])
    run.step([3, 1], "bc", added=[run.added(1, "c")])
    assert close(run.take("b", 3), 4, 8, 3)
    run.step([2, 2], "bc")  # one step more of b, which nobody may count for another
    assert close(run.take("c", 2), 1, 2)
    assert close(run.take("a", 1), 2)
    assert run.worker.count_entropies() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_distribution_leave_nothing_known_of_their_call_alone(bad: float) -> None:
    run = Runner()
    run.step([2, 4], "ab", added=[run.added(0, "a"), run.added(1, "b")])
    rows = logits(8, 3)
    rows[0] = bad
    run.processor.update_state(None)
    run.processor.apply(rows)
    for key in "ab":
        run.outputs[key].append(SAMPLED_LATER)
    found = run.take("a", 2)
    assert found is not None
    assert math.isnan(found.sum_nats)
    assert close(run.take("b", 2), 4, 3)


def test_calls_without_a_key_are_passed_over() -> None:
    run = Runner()
    plain = (0, SamplingParams(), [7], [])
    odd = (1, SamplingParams(extra_args={KEY: 5}), [7], [])
    run.step([2, 4, 8], "a", added=[plain, odd, run.added(2, "a")])
    assert run.worker.count_entropies() == 1
    assert close(run.take("a", 1), 8)


def test_a_stage_without_logits_has_nothing() -> None:
    worker = EntropyWorker()
    worker.model_runner = SimpleNamespace(input_batch=SimpleNamespace(logitsprocs=LogitsProcessors([])))
    assert (worker.take_entropies([("a", 1)]), worker.count_entropies()) == ({}, 0)
