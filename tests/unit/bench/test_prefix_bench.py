"""What prompts share: the least prefill by hand, and the two layouts of the same words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dmoa.bench.prefix import STEPS, least_prefill, step_of


def test_least_prefill_by_hand() -> None:
    prompts = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 9, 9], [1, 2, 3, 4, 9, 9], [1, 2, 3, 4], [7]]
    # Tokens one by one: nothing; four; all but the last; all but the last; nothing.
    assert least_prefill(prompts, 1) == [5, 2, 1, 1, 1]
    # Blocks of two: nothing; two blocks; two blocks, because the third holds the last token; one block; nothing.
    assert least_prefill(prompts, 2) == [5, 2, 2, 2, 1]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6), st.integers(1, 4))
def test_least_prefill_against_a_set_of_blocks(prompts: list[list[int]], block: int) -> None:
    seen: set[tuple[int, ...]] = set()
    expected = []
    for prompt in prompts:
        starts = [tuple(prompt[:end]) for end in range(block, len(prompt) + 1, block)]
        shared = 0
        while shared < len(starts) and starts[shared] in seen:
            shared += 1
        expected.append(len(prompt) - min(shared, (len(prompt) - 1) // block) * block)
        seen.update(starts)
    assert least_prefill(prompts, block) == expected


def test_a_step_shares_its_beginning_and_the_next_one_goes_on_from_it() -> None:
    texts = [[request.messages[-1].content for request in step_of(5, step, num_agents=3, max_tokens=2)] for step in range(3)]
    for step, (first, second, third) in enumerate(texts):
        common = first.split("Answer the question above")[0]
        assert second.startswith(common)
        assert third.startswith(common)
        assert len({first, second, third}) == 3
        if step:
            assert common.startswith(texts[step - 1][0].split("Answer the question above")[0])
    assert STEPS == 20


def test_both_layouts_hold_the_same_words() -> None:
    for ours, other in zip(
        step_of(5, 2, num_agents=3, max_tokens=2), step_of(5, 2, num_agents=3, max_tokens=2, role_first=True), strict=True
    ):
        words = [sorted(" ".join(message.content for message in request.messages).split()) for request in (ours, other)]
        assert words[0] == words[1]
        assert ours.messages[0] != other.messages[0]
