"""The store of entropies by request and position, against a reference that remembers every write, and calls by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.entropy import token_entropy
from dmoa.engines.vllm.entropy_store import EntropyStore
from dmoa.types import EntropySum
from tests.examples import examples

V = 7


def logits(*seeds: int) -> torch.Tensor:
    """One row of logits per seed."""
    return torch.stack([torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 2 for seed in seeds])


def nats(*seeds: int) -> list[float]:
    """What those rows' entropies are, in float64."""
    p = torch.softmax(logits(*seeds).double(), dim=1)
    return (-(p * p.log()).sum(dim=1)).tolist()


def store() -> EntropyStore:
    return EntropyStore(torch.device("cpu"))


def test_sums_are_those_of_the_first_tokens() -> None:
    kept, outputs = store(), []
    kept.add(0, "a", outputs)
    for seed in (1, 2, 3):
        kept.write(logits(seed))
        outputs.append(9)
    found = kept.take([("a", 2)])["a"]
    first, second = nats(1, 2)
    assert found.tokens == 2
    assert found.sum_nats == pytest.approx(first + second, abs=1e-6)
    assert found.sq_sum == pytest.approx(first**2 + second**2, abs=1e-6)
    assert len(kept) == 0


def test_thoughts_and_text_have_sums_of_their_own() -> None:
    kept, one, other, plain = store(), [], [], []
    for index, (key, outputs) in enumerate((("one", one), ("other", other), ("plain", plain))):
        kept.add(index, key, outputs)
    seeds = range(1, 6)
    for seed in seeds:
        kept.write(logits(seed, seed + 10, seed + 20))
        for outputs in (one, other, plain):
            outputs.append(9)
    # Positions 0 to 2 are a thought; 1 and from 3 on are two; the fifth of them does not count.
    found = kept.take([("one", 5, 0, 3), ("other", 4, 1, 2, 3), ("plain", 2)])
    for key, base, thought, text in (("one", 0, (0, 1, 2), (3, 4)), ("other", 10, (1, 3), (0, 2)), ("plain", 20, (), (0, 1))):
        values = nats(*(seed + base for seed in seeds))
        for entropy, places in ((found[key].thought, thought), (found[key].text, text)):
            assert entropy.tokens == len(places)
            assert entropy.sum_nats == pytest.approx(sum(values[place] for place in places), abs=1e-6)
            assert entropy.sq_sum == pytest.approx(sum(values[place] ** 2 for place in places), abs=1e-6)


def test_a_broken_position_of_the_thought_leaves_the_text_known() -> None:
    kept, outputs = store(), []
    kept.add(0, "a", outputs)
    for rows in (torch.full((1, V), torch.nan), logits(2)):
        kept.write(rows)
        outputs.append(0)
    found = kept.take([("a", 2, 0, 1)])["a"]
    assert math.isnan(found.thought.sum_nats)
    assert found.text.sum_nats == pytest.approx(nats(2)[0], abs=1e-6)


def test_parts_of_a_prompt_are_overwritten_by_its_last_part() -> None:
    kept, outputs = store(), []
    kept.add(0, "a", outputs)
    for seed in (5, 6, 7):  # three chunks: no token came out yet
        kept.write(logits(seed))
    outputs.append(1)
    assert kept.take([("a", 1)])["a"].sum_nats == pytest.approx(nats(7)[0], abs=1e-6)


def test_a_step_more_than_was_asked_for_does_not_count_whether_before_or_after_the_taking() -> None:
    # Asynchronous scheduling: the engine learns of the stop token when the next step is under way.
    kept, outputs = store(), []
    kept.add(0, "a", outputs)
    kept.write(logits(1))
    outputs.append(-1)
    kept.write(logits(2))  # one step more
    assert kept.take([("a", 1)])["a"].sum_nats == pytest.approx(nats(1)[0], abs=1e-6)
    outputs.append(-1)
    kept.write(logits(3))  # and one after the sums were taken
    assert len(kept) == 0
    kept.remove(0)
    kept.add(0, "b", [])
    kept.write(logits(4))
    assert kept.take([("b", 1)])["b"].sum_nats == pytest.approx(nats(4)[0], abs=1e-6)


def test_a_preempted_request_goes_on_at_its_position_in_another_place() -> None:
    kept, outputs, other = store(), [], []
    kept.add(0, "a", outputs)
    kept.add(1, "b", other)
    kept.write(logits(1, 10))
    outputs.append(0)
    other.append(0)
    kept.remove(0)
    kept.move(1, 0, swaps=False)
    kept.write(logits(11))
    other.append(0)
    again = [0]  # the engine makes a new list with the tokens that are there
    kept.add(1, "a", again)
    kept.write(logits(12, 8))  # a part of the prompt that is done again
    other.append(0)
    kept.write(logits(13, 2))
    again.append(0)
    other.append(0)
    found = kept.take([("a", 2), ("b", 4)])
    assert found["a"].sum_nats == pytest.approx(sum(nats(1, 2)), abs=1e-6)
    assert found["b"].sum_nats == pytest.approx(sum(nats(10, 11, 12, 13)), abs=1e-6)


def test_cancelled_requests_are_forgotten_and_unknown_ones_left_out() -> None:
    kept = store()
    kept.add(0, "a", [])
    kept.write(logits(1))
    assert kept.take([("a", 0), ("nobody", 3)]) == {}
    assert len(kept) == 0


def test_rows_without_a_key_are_passed_over() -> None:
    kept = store()
    kept.add(0, None, [])
    kept.add(1, "a", [])
    kept.write(logits(1, 2))
    assert kept.take([("a", 1)])["a"].sum_nats == pytest.approx(nats(2)[0], abs=1e-6)


def test_impossible_tokens_have_probability_0() -> None:
    kept = store()
    kept.add(0, "a", [])
    kept.write(torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]))
    assert kept.take([("a", 1)])["a"].sum_nats == pytest.approx(0.6931471805599453, abs=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_of_a_call_with_a_position_that_is_no_distribution_nothing_is_known(bad: float) -> None:
    kept, broken, sound = store(), [], []
    kept.add(0, "broken", broken)
    kept.add(1, "sound", sound)
    for seed in (1, 2):
        rows = logits(seed, seed + 10)
        if seed == 2:
            rows[0] = bad
        kept.write(rows)
        broken.append(0)
        sound.append(0)
    found = kept.take([("broken", 2), ("sound", 2)])
    assert math.isnan(found["broken"].sum_nats)
    assert math.isnan(found["broken"].sq_sum)
    assert found["sound"].sum_nats == pytest.approx(sum(nats(11, 12)), abs=1e-6)


def test_a_broken_position_behind_the_replys_end_does_not_count() -> None:
    kept, outputs = store(), []
    kept.add(0, "a", outputs)
    kept.write(logits(1))
    outputs.append(0)
    kept.write(torch.full((1, V), torch.nan))
    assert kept.take([("a", 1)])["a"].sum_nats == pytest.approx(nats(1)[0], abs=1e-6)


@pytest.mark.parametrize("position", [1, 3, 400])
def test_a_position_that_was_never_written_is_unknown_whoever_had_the_row_before(position: int) -> None:
    kept = store()
    for number in range(40):  # every row of the store has held somebody's entropies
        kept.add(number, f"old{number}", [])
    for _ in range(2):
        kept.write(torch.zeros(40, V))
    kept.take([(f"old{number}", 1) for number in range(40)])
    outputs = [0] * position
    kept.add(0, "a", outputs)
    kept.write(logits(1))
    found = kept.take([("a", position + 1)])["a"]
    assert math.isnan(found.sum_nats)


def test_a_position_that_was_jumped_over_while_the_store_grew_is_unknown() -> None:
    kept, outputs = store(), []
    kept.add(0, "a", outputs)
    for _ in range(256):  # as many positions as the store begins with
        kept.write(logits(1))
        outputs.append(0)
    outputs.extend([0] * 44)
    kept.write(logits(1))
    assert math.isnan(kept.take([("a", 301)])["a"].sum_nats)


def test_more_tokens_than_positions_count_what_was_written() -> None:
    kept, outputs = store(), []
    kept.add(0, "a", outputs)
    kept.write(logits(1))
    outputs.append(0)
    kept.write(logits(2))
    found = kept.take([("a", 9)])["a"]
    assert found.tokens == 2
    assert found.sum_nats == pytest.approx(sum(nats(1, 2)), abs=1e-6)


def test_a_preempted_request_keeps_what_came_out_while_others_come_and_go() -> None:
    kept, outputs = store(), []
    kept.add(0, "a", outputs)
    for seed in (1, 2):
        kept.write(logits(seed))
        outputs.append(0)
    kept.remove(0)
    for number in range(40):  # more than there are rows
        kept.add(0, f"other{number}", [])
        kept.write(logits(100 + number))
    again = [0, 0]
    kept.add(1, "a", again)
    kept.write(logits(50, 3))
    again.append(0)
    found = kept.take([("a", 3)])["a"]
    assert found.tokens == 3
    assert found.sum_nats == pytest.approx(sum(nats(1, 2, 3)), abs=1e-6)


def test_what_was_sampled_for_nothing_before_a_preemption_does_not_count() -> None:
    kept, outputs = store(), []
    kept.add(0, "a", outputs)
    for seed in (1, 2, 3):
        kept.write(logits(seed))
        outputs.append(0)
    kept.remove(0)
    again = [0]  # the engine drops two tokens that nobody was told of
    kept.add(0, "a", again)
    kept.write(logits(4))
    again.append(0)
    found = kept.take([("a", 3)])["a"]
    assert found.tokens == 2
    assert found.sum_nats == pytest.approx(sum(nats(1, 4)), abs=1e-6)


def test_it_grows_in_rows_and_positions() -> None:
    kept = store()
    outputs: dict[str, list[int]] = {f"r{i}": [] for i in range(100)}
    for index, (key, those) in enumerate(outputs.items()):
        kept.add(index, key, those)
    for step in range(3):
        kept.write(logits(*(1000 * step + i for i in range(100))))
        for those in outputs.values():
            those.append(0)
    outputs["r7"].extend([0] * 1000)
    kept.write(logits(*range(100)))
    found = kept.take([(key, 3) for key in outputs])
    for i, key in enumerate(outputs):
        assert found[key].sum_nats == pytest.approx(sum(nats(i, 1000 + i, 2000 + i)), abs=1e-5)


class Reference:
    """An engine's batch with chunked prompts, preemption, moves and swaps; remembers the last write of every position."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.store = store()
        self.batch: list[str] = []
        self.waiting: list[str] = []
        self.outputs: dict[str, list[int]] = {}
        self.chunks: dict[str, int] = {}
        self.last: dict[str, dict[int, float]] = {}
        self.num_logits = 0

    def admit(self, key: str) -> None:
        self.outputs[key] = list(self.outputs.get(key, []))
        self.chunks[key] = self.random.randint(1, 3)
        self.store.add(len(self.batch), key, self.outputs[key])
        self.batch.append(key)

    def leave(self, index: int) -> str:
        key, last = self.batch[index], len(self.batch) - 1
        self.store.remove(index)
        if index != last:
            self.store.move(last, index, swaps=False)
        self.batch[index] = self.batch[last]
        self.batch.pop()
        return key

    def step(self) -> None:
        if not self.batch:
            return
        seeds = [self.num_logits + i for i in range(len(self.batch))]
        self.num_logits += len(seeds)
        rows = logits(*seeds)
        self.store.write(rows)
        for key, value in zip(self.batch, token_entropy(rows).tolist(), strict=True):
            self.last.setdefault(key, {})[len(self.outputs[key])] = value
            self.chunks[key] -= 1
            if self.chunks[key] <= 0:
                self.outputs[key].append(0)


@settings(max_examples=examples(60))
@given(seed=st.integers(0, 10**6), actions=st.lists(st.integers(0, 9), max_size=60))
def test_whatever_the_engine_does_every_sum_is_that_of_the_last_writes(seed: int, actions: list[int]) -> None:
    engine = Reference(seed)
    for number, action in enumerate(actions):
        if action <= 1:
            engine.admit(f"r{number}")
        elif action == 2 and engine.batch:
            engine.waiting.append(engine.leave(engine.random.randrange(len(engine.batch))))
        elif action == 3 and engine.waiting:
            engine.admit(engine.waiting.pop())
        elif action == 4 and len(engine.batch) > 1:
            one, other = engine.random.sample(range(len(engine.batch)), 2)
            engine.store.move(one, other, swaps=True)
            engine.batch[one], engine.batch[other] = engine.batch[other], engine.batch[one]
        elif action == 5 and engine.batch:
            key = engine.leave(engine.random.randrange(len(engine.batch)))
            check(engine, key)
        else:
            engine.step()
    for key in [*engine.batch, *engine.waiting]:
        check(engine, key)
    assert len(engine.store) == 0


def check(engine: Reference, key: str) -> None:
    """Take a request's sums, and compare."""
    wanted = engine.random.randint(0, len(engine.outputs[key]))
    cuts = sorted(engine.random.randint(0, wanted + 1) for _ in range(engine.random.randint(0, 3)))
    found = engine.store.take([(key, wanted, *cuts)])
    inside = [sum(cut <= position for cut in cuts) % 2 == 1 for position in range(wanted)]
    for side in (False, True):
        values = [engine.last[key][position] for position in range(wanted) if inside[position] == side]
        entropy = (found[key].thought if side else found[key].text) if wanted else EntropySum()
        assert entropy.tokens == len(values)
        assert entropy.sum_nats == pytest.approx(sum(values), abs=1e-5)
        assert entropy.sq_sum == pytest.approx(sum(value**2 for value in values), abs=1e-5)
    if not wanted and key in found:
        assert set(found[key]) == {0}
