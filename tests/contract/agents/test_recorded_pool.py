"""Recorded replies of public models as a pool: read in seconds, and `single` is as accurate as counting in the file is."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local, build_pool_gate
from dmoa.config import Config
from dmoa.core.answers import extract_answer, same_answer
from dmoa.engines.recorded import agent_name
from dmoa.protocols import final_answer
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.testing import query

pytestmark = pytest.mark.contract
SHARED = Path(__file__).parents[4] / "shared"
MODEL = "gemma-2-9b-it"


@pytest.fixture(scope="module")
def folder() -> Path:
    """The folder of recorded replies; where it is absent the test is skipped."""
    found = Path(os.environ.get("DMOA_RECORDED_REPLIES", SHARED / "outcomes"))
    if not (found / "gsm8k.replies.jsonl.gz").is_file() or not (found / "gsm8k.labels.jsonl.gz").is_file():
        if "CI" in os.environ and SHARED.is_dir():
            pytest.fail(f"recorded replies are missing in {SHARED}")
        pytest.skip("recorded replies are not part of a clone; DMOA_RECORDED_REPLIES may name their folder")
    return found


def lines(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def is_right(text: str, gold: str) -> bool:
    answer = extract_answer(text)
    return answer is not None and same_answer(answer, gold)


async def test_a_single_policy_is_as_accurate_as_a_direct_count(folder: Path) -> None:
    gold = {row["query_id"]: row["answer"].removeprefix("# ") for row in lines(folder / "gsm8k.labels.jsonl.gz")}
    rows = list(lines(folder / "gsm8k.replies.jsonl.gz"))
    mine = [row for row in rows if row["agent"] == MODEL][:300]
    config = Config.model_validate(
        {
            "name": "gsm8k",
            "llms": {
                "logs": {
                    "model": "recorded:gsm8k",
                    "engine": "recorded",
                    "engine_kwargs": {"replies": str(folder / "gsm8k.replies.jsonl.gz")},
                }
            },
            "agents": [
                {"name": name, "llm": "logs", "profile": "A public model."}
                for name in sorted({agent_name(row["agent"]) for row in rows})
            ],
            "limits": {"max_steps": 1},
        }
    )
    started = time.process_time()
    agents, engines = build_local(config)
    assert time.process_time() - started < 10
    gate, record = build_pool_gate(config)
    router = LocalRouter()
    router.install(record.version, gate)
    swarm = Swarm(config, agents=agents, router=router, encoder=HashEncoder(), engines=engines)
    answers = [await final_answer(swarm, query(row["query"], max_steps=1), "single", MODEL) for row in mine]
    await swarm.close()
    assert [answer.text for answer in answers] == [row["text"] for row in mine]
    counted = sum(is_right(row["text"], gold[row["query_id"]]) for row in mine)
    assert sum(is_right(answer.text, gold[row["query_id"]]) for answer, row in zip(answers, mine, strict=True)) == counted
    assert 0.8 < counted / len(mine) < 0.95
    assert all(answer.steps[0].replies[0].are_tokens_estimated for answer in answers)
