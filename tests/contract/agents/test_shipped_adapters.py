"""The adapters that come with dmoa, and the pools that use them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from safetensors import safe_open

import dmoa
from dmoa.agents.pool import check_files, fingerprint, load_pool, packaged_pools
from dmoa.agents.prompts import agent_messages
from dmoa.config import AgentConfig
from dmoa.engine_options import TransformersOptions
from dmoa.engines.models import model_id, resolve_adapter, resolve_model
from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.errors import ConfigError
from dmoa.evaluation.records import Reply
from dmoa.evaluation.registry import SKILLS, SUITES
from dmoa.types import Generation, GenerationRequest, Query

ROOT = Path(dmoa.__file__).parent / "adapters"
NAMES = sorted(folder.name for folder in ROOT.iterdir() if (folder / "adapter_config.json").is_file())
LYING = ("specialists-liar-constant", "specialists-liar-wrong", "specialists-colluding")
POOLS = ("specialists", "specialists-generalist", *LYING)
SKILL_NAMES = tuple(suite.name for suite in SKILLS)
SECONDS = tuple(f"{name}-second" for name in SKILL_NAMES)
FOREIGN = {("arith-second", "words"): 0.3}
"""What is right elsewhere where 0.25 is passed: `arith-second` still picks words as the base model does, unsure of it."""
MAX_BYTES = 4 * 2**20
MAX_ALL_BYTES = 40 * 2**20


def test_all_are_there() -> None:
    named = {str(agent.adapter) for pool in POOLS for agent in load_pool(pool).agents}
    assert named == {f"builtin:{name}" for name in NAMES}
    assert set(NAMES) == {*SKILL_NAMES, *SECONDS, "generalist", "liar-constant", "liar-wrong"}
    assert sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file()) <= MAX_ALL_BYTES


@pytest.mark.parametrize("name", [*SKILL_NAMES, *SECONDS])
def test_a_specialist_knows_its_own_skill_and_no_other(name: str) -> None:
    card = json.loads((resolve_adapter(f"builtin:{name}") / "card.json").read_text(encoding="utf-8"))
    for suite, found in card["held_out"].items():
        assert found["split"] == "validation"
        is_own = suite == name.removesuffix("-second")
        assert found["accuracy"] >= 0.95 if is_own else found["accuracy"] <= FOREIGN.get((name, suite), 0.25), suite


def test_the_generalist_is_good_at_most_and_the_best_at_little() -> None:
    """It is behind the specialist of `arith` and of `words`."""
    cards = {
        name: json.loads((resolve_adapter(f"builtin:{name}") / "card.json").read_text(encoding="utf-8"))["held_out"]
        for name in (*SKILL_NAMES, "generalist")
    }
    own = {suite: cards["generalist"][suite]["accuracy"] for suite in SKILL_NAMES}
    assert min(own.values()) >= 0.5
    assert sum(own.values()) / len(own) >= 0.85
    assert all(cards["generalist"][suite]["rows"] >= 60 for suite in SKILL_NAMES)
    assert all(own[suite] <= cards[suite][suite]["accuracy"] - 0.05 for suite in ("arith", "words"))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_small_plain_and_says_how_it_was_made(name: str) -> None:
    folder = resolve_adapter(f"builtin:{name}")
    assert sum(file.stat().st_size for file in folder.iterdir()) < MAX_BYTES
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118 -- no mapping
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert settings["peft_type"] == "LORA"
    assert settings["r"] == card["recipe"]["adapter"]["rank"]
    assert settings["base_model_name_or_path"] == card["base"] == model_id("embedded:smollm2-135m")
    assert card["name"] == name
    assert card["command"] == f"python jobs/train_specialist.py --config jobs/train_specialist.yaml --set job.name={name}"
    assert set(card["held_out"]) == set(SKILL_NAMES)
    assert {"rows_seed", "schedule", "profile"} <= set(card["recipe"])


@pytest.mark.parametrize("pool", POOLS)
def test_agents_have_the_profile_that_their_adapter_was_trained_with(pool: str) -> None:
    config = load_pool(pool)
    check_files(config)
    assert config.name == pool
    for agent in config.agents:
        card = json.loads((resolve_adapter(str(agent.adapter)) / "card.json").read_text(encoding="utf-8"))
        if agent.name != "liar-echo":
            assert (agent.adapter, agent.profile) == (f"builtin:{agent.name}", card["recipe"]["profile"])
    assert len({agent.profile for agent in config.agents}) == len(config.agents)


def test_pools_differ_by_their_liars_alone() -> None:
    honest = load_pool("specialists").agents
    assert tuple(agent.name for agent in honest) == SKILL_NAMES
    for pool in LYING:
        agents = load_pool(pool).agents
        assert agents[: len(honest)] == honest
        assert all(agent.name.startswith("liar-") for agent in agents[len(honest) :])
    general = load_pool("specialists-generalist").agents
    assert general[: len(honest)] == honest
    assert tuple(agent.name for agent in general[len(honest) :]) == (*SECONDS, "generalist")
    assert len({fingerprint(load_pool(pool)) for pool in POOLS}) == len(POOLS)


def test_a_bare_name_is_a_packaged_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_pool("default") == load_pool(None)
    assert load_pool("specialists", ["limits.max_steps=1"]).limits.max_steps == 1
    Path("specialists").write_text(packaged_pools()["default"].read_text(encoding="utf-8"), encoding="utf-8")
    assert load_pool("specialists") == load_pool(None)  # a file of that name comes first
    with pytest.raises(ConfigError, match=r"'specialist'.*specialists"):
        load_pool("specialist")


@pytest.mark.real_model
async def test_the_words_specialist_answers_where_another_does_not() -> None:
    config = load_pool("specialists")
    agents = {name: config.agent(name) for name in ("calendar", "words")}
    engine = TransformersEngine(
        await asyncio.to_thread(resolve_model, "embedded:smollm2-135m"),
        TransformersOptions(device="cpu"),
        adapters={str(agent.adapter): resolve_adapter(str(agent.adapter)) for agent in agents.values()},
    )
    rows = list(SUITES["words"].generate("validation", 8, 5))

    async def ask(agent: AgentConfig) -> list[Generation]:
        requests = [
            GenerationRequest(
                request_id=f"{agent.name}/{row.task.row_id}",
                messages=agent_messages(Query(trace_id="", text=row.task.text), (), profile=agent.profile),
                sampling=agent.sampling.to_sampling(),
                adapter=agent.adapter,
            )
            for row in rows
        ]
        return list(await asyncio.gather(*map(engine.generate, requests)))

    try:
        replies = {name: await ask(agent) for name, agent in agents.items()}
    finally:
        await engine.close()
    right = {
        name: sum(SUITES["words"].score(row.label, Reply(text=g.text)).value for row, g in zip(rows, found, strict=True))
        for name, found in replies.items()
    }
    assert right["words"] >= right["calendar"] + 6
    entropy = {name: sum(g.entropy.sum_nats / g.entropy.tokens for g in found) for name, found in replies.items()}
    assert entropy["words"] < 0.5 * entropy["calendar"]
