"""Routers without a gate, on rewards whose best answer is known by hand."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmoa.errors import RequestError
from dmoa.policies.registry import POLICIES, build_policy, split_policy
from dmoa.policies.routers import fitted_to_labels, mean_rewards
from dmoa.testing import FakeEncoder, embedding, query, scripted_pool, state_of
from dmoa.types import FloatArray, StepPlan
from tests.unit.policies.schedules import context_of


def write(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    lines = (json.dumps({"query": text, "agent": agent, "reward": reward}) for text, agent, reward in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


async def chosen(policy: str, text: str, trace_id: str = "t") -> list[str]:
    """Who is asked, then who stands in."""
    plan = await build_policy(split_policy(policy)[0], context_of(policy)).next_step(
        state_of(replace(query(text), trace_id=trace_id))
    )
    assert isinstance(plan, StepPlan)
    assert (plan.fold, plan.ends_with, len(plan.activations)) == ("pass", "schedule", 1)
    return [x.agent for x in (*plan.activations, *plan.reserves)]


@pytest.mark.parametrize("policy", ["knn_router:k=1", "linear_router:ridge=0.01", "kmeans:clusters=4"])
async def test_each_query_goes_to_the_agent_that_was_right_on_it(policy: str, tmp_path: Path) -> None:
    # The fake embeddings of four texts are four different directions; agent i is right on text i alone.
    texts = {"a": "one", "b": "two", "c": "three", "d": "four"}
    rows = [(text, agent, float(agent == right)) for right, text in texts.items() for agent in texts]
    data = write(tmp_path / "judged.jsonl", rows)
    for agent, text in texts.items():
        assert (await chosen(f"{policy}:data={data}", text))[0] == agent


async def test_the_nearest_neighbours_are_averaged(tmp_path: Path) -> None:
    rows = [("x", "b", 1.0), ("y", "b", 0.0), ("z", "b", 0.0), ("x", "c", 0.5), ("y", "c", 0.5), ("z", "c", 0.5)]
    data = write(tmp_path / "judged.jsonl", rows)
    assert (await chosen(f"knn_router:k=1:agents=b+c:data={data}", "x"))[0] == "b"
    assert (await chosen(f"knn_router:k=3:agents=b+c:data={data}", "x"))[0] == "c"


async def test_queries_of_agents_that_take_no_part_are_no_neighbours(tmp_path: Path) -> None:
    # On the nearest query of theirs b was right, on the two others c, which is the better one in the mean.
    near, *far = sorted("wyz", key=lambda text: -float(embedding(text) @ embedding("x")))
    rows = [("x", "a", 1.0), (near, "b", 1.0), (near, "c", 0.0), (far[0], "c", 1.0), (far[1], "b", 0.0), (far[1], "c", 1.0)]
    data = write(tmp_path / "judged.jsonl", rows)
    assert (await chosen(f"knn_router:k=1:agents=b+c:data={data}", "x"))[0] == "b"


async def test_of_several_rewards_of_one_reply_the_mean_counts(tmp_path: Path) -> None:
    rows = [("x", "b", 1.0), ("x", "b", 1.0), ("x", "b", 0.0), ("x", "c", 0.5)]
    data = write(tmp_path / "judged.jsonl", rows)
    assert (await chosen(f"knn_router:k=1:agents=c+b:data={data}", "x"))[0] == "b"


def test_a_mean_counts_its_prior_as_one_row() -> None:
    reward_QA = np.array([[1.0, np.nan], [0.0, np.nan], [1.0, 1.0]], np.float32)
    assert mean_rewards(reward_QA).tolist() == pytest.approx([2.5 / 4, 1.5 / 2])


async def test_a_bandit_draws_good_agents_more_often_and_ucb_tries_the_unknown_first(tmp_path: Path) -> None:
    rows = [("q", "a", 1.0)] * 8 + [("q", "a", 0.0)] * 2 + [("q", "b", 0.0)] * 10 + [("q", "c", 1.0)] * 5
    data = write(tmp_path / "judged.jsonl", rows)
    drawn = Counter([(await chosen(f"bandit:agents=a+b+c:data={data}", "q", f"t{i}"))[0] for i in range(200)])
    assert drawn["c"] > drawn["a"] > drawn["b"]
    assert (await chosen(f"bandit:rule=ucb:data={data}", "q"))[0] == "d"
    # N = 25: a 0.8 + (2 ln 25 / 10) ** .5 = 1.60, b 0.80, c 1 + (2 ln 25 / 5) ** .5 = 2.13.
    assert await chosen(f"bandit:rule=ucb:agents=a+b+c:data={data}", "q") == ["c", "a", "b"]


async def test_the_random_router_is_even_and_repeats() -> None:
    drawn = Counter([(await chosen("random_router", "q", f"t{i}"))[0] for i in range(400)])
    assert all(abs(drawn[name] - 100) < 44 for name in "abcd")  # five standard deviations
    assert await chosen("random_router", "q", "t7") == await chosen("random_router", "q", "t7")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no line"),
        ('{"query": "x", "agent": "a", "reward": 2}\n', "line 1: reward is 2"),
        ('{"query": "x", "agent": "GPT-4o", "reward": 1}\n', "judges GPT-4o; expected replies of a, b, c, d; name agents as"),
        (None, "cannot read"),
    ],
)
async def test_a_file_that_cannot_be_is_refused_by_name(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "r.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=said):
        await chosen(f"knn_router:data={tmp_path / 'r.jsonl'}", "q")


@pytest.mark.parametrize("policy", ["bandit:data", "knapsack:gpus=9:rewards"])
async def test_rewards_of_others_alone_are_refused_and_signs_that_look_like_line_ends_end_no_line(
    policy: str, tmp_path: Path
) -> None:
    data = tmp_path / "r.jsonl"
    line = json.dumps({"query": "x \u2028 y \x85 z", "agent": "b", "reward": 1}, ensure_ascii=False)
    data.write_text(f"{line}\r\n{line}\n", encoding="utf-8")
    plan = await build_policy(split_policy(policy)[0], context_of(f"{policy}={data}")).next_step(state_of(query("x")))
    assert isinstance(plan, StepPlan)
    data.write_text(line.replace('"b"', '"B"'), encoding="utf-8")
    with pytest.raises(RequestError, match="judges B; expected replies of a, b, c, d"):
        await build_policy(split_policy(policy)[0], context_of(f"{policy}={data}")).next_step(state_of(query("x")))


def test_a_router_without_its_file_is_refused() -> None:
    with pytest.raises(RequestError, match="policy: knn_router: data: missing; add it"):
        build_policy("knn_router", context_of("knn_router"))


class SlowEncoder(FakeEncoder):
    """Takes turns of the event loop, as one behind a queue does, and fails where it is told to."""

    error: Exception | None = None

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return await super().embed(texts)


async def test_queries_in_flight_together_fit_a_router_once(tmp_path: Path) -> None:
    data = write(tmp_path / "judged.jsonl", [("x", "a", 1.0), ("y", "b", 1.0)])
    encoder, fits = SlowEncoder(), 0
    words = f"data={data}:agents=a+b"
    options = POLICIES["kmeans"].options_of(words, scripted_pool(tuple("abcd")))
    context = replace(context_of(f"kmeans:{words}"), encoder=encoder, options=options)

    def fit(query_QD: FloatArray, reward_QA: FloatArray) -> int:
        nonlocal fits
        fits += 1
        return fits

    encoder.error = OSError("busy")
    lost = await asyncio.gather(*(fitted_to_labels(context, "x", fit) for _ in range(2)), return_exceptions=True)
    assert [str(error) for error in lost] == ["busy", "busy"]
    encoder.error = None
    asked = [asyncio.create_task(fitted_to_labels(context, "x", fit)) for _ in range(8)]
    await asyncio.sleep(0)
    asked.pop(0).cancel()
    assert await asyncio.gather(*asked) == [1] * 7
    assert await fitted_to_labels(context, "x", fit) == 1
