"""From a configuration to agents on engines: the fingerprint, what is checked on disk, and the gate of a pool."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dmoa import checkpoint
from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import (
    build_agents,
    build_encoder,
    build_engine,
    build_local,
    build_pool_gate,
    check_files,
    check_keys,
    fingerprint,
    llm_id,
    load_pool,
    vllm_builds,
)
from dmoa.config import Config, callable_agents, summarizer_agent
from dmoa.engine_options import ScriptedOptions
from dmoa.engines.scripted import ScriptedEngine
from dmoa.errors import CheckpointError, ConfigError
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.types import AgentCall, Answer, Message, Query, Sampling, TextDelta, is_untrained
from tests.unit.agents.openai_server import answer, playing

TREE: dict[str, Any] = {
    "name": "pool",
    "llms": {
        "one": {"model": "scripted:one", "engine": "scripted", "engine_kwargs": {"replies": {"adder": "from one"}}},
        "two": {"model": "scripted:two", "engine": "scripted", "engine_kwargs": {"replies": {"sorter": "from two"}}},
    },
    "agents": [
        {"name": "adder", "llm": "one", "profile": "Adds.", "tools": ["calculator"]},
        {"name": "sorter", "llm": "two", "profile": "Sorts."},
        {"name": "dater", "llm": "two", "profile": "Knows dates."},
    ],
    "gate": {"hidden": 8},
}
LLM_SUMMARIZER = {"mode": "llm", "llm": "two", "profile": "Merges."}


def pool(**changes: Any) -> Config:
    """TREE with values set at paths such as agents__0__name."""
    tree = copy.deepcopy(TREE)
    for path, value in changes.items():
        node: Any = tree
        *keys, last = path.split("__")
        for key in keys:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[last] = value
    return Config.model_validate(tree)


def adapter(folder: Path, weights: bytes = b"weights") -> str:
    """A folder that looks like an adapter."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return f"path:{folder}"


CHANGES_OF_THE_POOL: dict[str, dict[str, Any]] = {
    "agent name": {"agents__0__name": "multiplier"},
    "agent llm": {"agents__0__llm": "two"},
    "model": {"llms__one__model": "scripted:other"},
    "profile": {"agents__2__profile": "Knows days."},
    "tools": {"agents__1__tools": ["search"]},
    "temperature": {"agents__1__sampling": {"temperature": 0.5}},
    "top_p": {"agents__1__sampling": {"top_p": 0.5}},
    "order": {"agents": [TREE["agents"][1], TREE["agents"][0], TREE["agents"][2]]},
    "an agent less": {"agents": TREE["agents"][:2]},
    "summarizer": {"summarizer": LLM_SUMMARIZER},
    "summarizer's profile": {"summarizer": LLM_SUMMARIZER | {"profile": "Sums up."}},
    "summarizer's llm": {"summarizer": LLM_SUMMARIZER | {"llm": "one"}},
}
CHANGES_BESIDE_THE_POOL: dict[str, dict[str, Any]] = {
    "pool name": {"name": "other"},
    "token limit": {"agents__0__sampling": {"max_tokens": 7}},
    "engine options": {"llms__one__engine_kwargs": {"tokens": 3}},
    "placement": {"llms__one__placement": "dedicated"},
    "gate": {"gate__hidden": 9},
    "limits": {"limits": {"max_steps": 2}},
    "tags": {"agents__0__tags": ["math"]},
    "server": {"server": {"port": 9000}},
}


def test_the_fingerprint_changes_with_everything_that_makes_the_pool() -> None:
    prints = [fingerprint(pool()), *(fingerprint(pool(**changes)) for changes in CHANGES_OF_THE_POOL.values())]
    assert len(set(prints)) == len(CHANGES_OF_THE_POOL) + 1
    assert all(len(text) == 64 for text in prints)


@pytest.mark.parametrize("what", CHANGES_BESIDE_THE_POOL)
def test_the_fingerprint_leaves_out_what_does_not_make_the_pool(what: str) -> None:
    assert fingerprint(pool(**CHANGES_BESIDE_THE_POOL[what])) == fingerprint(pool())


def test_the_fingerprint_knows_an_adapter_by_its_bytes(tmp_path: Path) -> None:
    first, copied, other = adapter(tmp_path / "a"), adapter(tmp_path / "b"), adapter(tmp_path / "c", b"others")
    prints = [fingerprint(pool(agents__0__adapter=source)) for source in (None, first, copied, other)]
    assert prints[1] == prints[2]
    assert len(set(prints)) == 3


def test_the_fingerprint_of_the_default_pool_is_stable() -> None:
    assert fingerprint(load_pool(None)) == fingerprint(load_pool(None))
    assert fingerprint(load_pool(None, ["agents.0.profile=Other."])) != fingerprint(load_pool(None))


def test_the_summarizer_is_an_agent_only_where_it_writes() -> None:
    assert summarizer_agent(pool()) is None
    assert [agent.name for agent in callable_agents(pool())] == ["adder", "sorter", "dater"]
    config = pool(summarizer=LLM_SUMMARIZER | {"sampling": {"max_tokens": 7}})
    agent = summarizer_agent(config)
    assert agent is not None
    assert (agent.name, agent.llm, agent.profile, agent.sampling.max_tokens) == ("summarizer", "two", "Merges.", 7)
    assert [agent.name for agent in callable_agents(config, "two")] == ["sorter", "dater", "summarizer"]
    assert [agent.name for agent in callable_agents(config, "one")] == ["adder"]


def test_missing_adapters_are_named(tmp_path: Path) -> None:
    check_files(pool(agents__0__adapter=adapter(tmp_path / "a")))
    with pytest.raises(ConfigError, match=r"agents\.dater\.adapter: 'path:/nowhere' lacks .*; fix the name or set"):
        check_files(pool(agents__2__adapter="path:/nowhere"))
    with pytest.raises(ConfigError, match=r"^summarizer\.adapter: 'builtin:nothing' lacks"):
        check_files(pool(summarizer=LLM_SUMMARIZER | {"adapter": "builtin:nothing"}))


async def test_every_agent_runs_on_the_engine_of_its_llm() -> None:
    agents, engines = build_local(pool())
    assert [type(engine) for engine in engines] == [ScriptedEngine, ScriptedEngine]
    for name, text in (("adder", "from one"), ("sorter", "from two"), ("dater", "Hi")):
        call = AgentCall(
            trace_id="t", step=0, agent=name, messages=(Message(role="user", content="Hi"),), sampling=Sampling(max_tokens=20)
        )
        assert (await agents.call(call)).text == text


@pytest.mark.skipif(vllm_builds() != {}, reason="vLLM is installed here")
def test_an_engine_that_cannot_run_here_is_refused() -> None:
    config = pool(llms__one={"model": "hub:org/model", "engine": "vllm"})
    with pytest.raises(ConfigError, match=r"llms\.one\.engine is 'vllm'; vLLM is not installed here; "):
        build_engine(config, "one", [])


ENDPOINT = {"model": "openai:big", "engine": "openai", "engine_kwargs": {"base_url": "https://a.example.com/v1"}}


def endpoint(**options: Any) -> Config:
    """TREE with its first LLM behind an endpoint."""
    return pool(llms__one=ENDPOINT | {"engine_kwargs": ENDPOINT["engine_kwargs"] | options})


async def test_an_endpoint_is_an_engine_under_its_models_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    _, engines = build_local(endpoint(api_key_env="SOME_KEY", top_logprobs=5))
    assert [engine.label for engine in engines] == ["openai/top5/vocab128000", "scripted"]
    for engine in engines:
        await engine.close()


def test_an_endpoint_without_its_key_is_refused_when_its_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^llms\.one\.engine_kwargs\.api_key_env: the variable SOME_KEY is not set"):
        build_local(endpoint(api_key_env="SOME_KEY"))
    with pytest.raises(ConfigError, match=r"^llms\.one\.engine_kwargs\.api_key_env: the variable SOME_KEY is not set"):
        check_keys(endpoint(api_key_env="SOME_KEY"))
    check_keys(endpoint())
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    check_keys(endpoint(api_key_env="SOME_KEY"))


def test_the_fingerprint_knows_an_endpoint_by_model_and_url_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    assert llm_id(endpoint(api_key_env="SOME_KEY").llms["one"]) == "openai:big@https://a.example.com/v1"
    same = [endpoint(), endpoint(api_key_env="SOME_KEY", timeout_s=5), endpoint(base_url="https://a.example.com/v1/")]
    other = [endpoint(base_url="https://b.example.com/v1"), pool(llms__one=ENDPOINT | {"model": "openai:small"}), pool()]
    assert len({fingerprint(config) for config in same}) == 1
    assert len({fingerprint(config) for config in [*same, *other]}) == 4


async def test_a_summarizer_may_live_behind_an_endpoint() -> None:
    async with playing(answer("FINAL\n", "It is 19.")) as server:
        config = pool(
            llms__one__engine_kwargs={"replies": {"adder": "19"}},
            llms__far=ENDPOINT | {"engine_kwargs": {"base_url": server.url}},
            summarizer=LLM_SUMMARIZER | {"llm": "far"},
        )
        agents, engines = build_local(config)
        gate, record = build_pool_gate(config)
        router = LocalRouter()
        router.install(record.version, gate)
        swarm = Swarm(config, agents=agents, router=router, encoder=HashEncoder())
        events = [event async for event in swarm.ask(Query(trace_id="t", text="What is 12 + 7?"), "dmoa", None)]
        for engine in engines:
            await engine.close()
    answered = events[-1]
    assert isinstance(answered, Answer)
    assert (answered.text, answered.stop_reason, len(answered.steps)) == ("It is 19.", "summarizer", 1)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "It is 19."
    written = answered.steps[0].summarizer
    assert (written.verdict, written.usage.prompt_tokens, written.usage.completion_tokens) == ("final", 11, 3)
    assert [call.body["model"] for call in server.calls] == ["big"]


def test_a_scripted_pool_needs_no_sentence_encoder() -> None:
    assert isinstance(build_encoder(pool()), HashEncoder)


def test_a_pool_without_a_checkpoint_has_untrained_weights() -> None:
    (gate, record), (_, again) = build_pool_gate(pool()), build_pool_gate(pool())
    assert is_untrained(record.version)
    assert record.version == again.version
    assert record.pool_fingerprint == fingerprint(pool())
    assert gate.spec.agents == ("adder", "sorter", "dater")
    assert build_pool_gate(pool(gate__seed=1))[1].version != record.version


def trained(folder: Path, config: Config) -> str:
    """A checkpoint that claims to be trained for a pool."""
    gate, _ = build_pool_gate(config)
    return str(
        checkpoint.save(folder, gate, checkpoint.describe_gate(gate, fingerprint=fingerprint(config), trained_on={"n": 1}))
    )


def test_a_pool_takes_the_checkpoint_that_was_made_for_it(tmp_path: Path) -> None:
    folder = trained(tmp_path / "gate", pool())
    gate, record = build_pool_gate(pool(gate__checkpoint=folder))
    assert not is_untrained(record.version)
    assert torch.equal(gate.head_weight, build_pool_gate(pool())[0].head_weight)
    with pytest.raises(CheckpointError, match="same names, but"):
        build_pool_gate(pool(gate__checkpoint=folder, agents__0__profile="Multiplies."))
    with pytest.raises(CheckpointError, match=r"its preset is 'default', the pool's gate\.preset is 'paper'"):
        build_pool_gate(pool(gate__checkpoint=folder, gate__preset="paper"))


def test_a_profile_gate_is_taken_over_to_the_agents_of_another_pool(tmp_path: Path) -> None:
    folder = trained(tmp_path / "gate", pool(gate__head="profile"))
    kept, record = build_pool_gate(pool(gate__checkpoint=folder))
    other = pool(gate__checkpoint=folder, agents=[*TREE["agents"][1:], {"name": "writer", "llm": "one", "profile": "Writes."}])
    gate, adopted = build_pool_gate(other)
    assert gate.spec.agents == ("sorter", "dater", "writer")
    assert (adopted.parent, adopted.trained_on, adopted.pool_fingerprint) == (record.version, {"n": 1}, fingerprint(other))
    assert not is_untrained(adopted.version)
    assert adopted.version != record.version
    assert torch.equal(gate.query_weight, kept.query_weight)
    before, after = kept.get_buffer("profile_AD"), gate.get_buffer("profile_AD")
    assert torch.equal(before[1:], after[:2])  # sorter and dater, as they were
    assert not torch.equal(before[0], after[2])


async def test_a_profile_gate_can_be_built_inside_an_event_loop() -> None:
    assert asyncio.get_running_loop().is_running()
    gate, _ = build_pool_gate(pool(gate__head="profile"))
    norms = gate.get_buffer("profile_AD").norm(dim=1)
    assert torch.allclose(norms, torch.ones(3), atol=1e-5)


def test_only_who_searches_reads_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("no JSON")
    config = pool(tools__search_corpus=str(tmp_path / "corpus.jsonl"))
    assert sorted(build_agents(config, "one", ScriptedEngine(ScriptedOptions()))) == ["adder"]
    searching = pool(tools__search_corpus=str(tmp_path / "corpus.jsonl"), agents__1__tools=["search"])
    with pytest.raises(ConfigError, match=r"search corpus: .*line 1: not JSON"):
        build_agents(searching, "two", ScriptedEngine(ScriptedOptions()))


@pytest.mark.parametrize("home", ["~nobody-of-that-name/x", "~nobody-of-that-name"])
def test_a_home_that_is_not_there_is_a_path_that_is_not_there(home: str) -> None:
    config = pool(llms__one={"model": f"path:{home}"}, agents__1__adapter=f"path:{home}")
    with pytest.raises(ConfigError, match=r"llms.one.model: .* lacks config.json; .*\(agents on it: adder\)"):
        check_files(config)
    with pytest.raises(ConfigError, match=r"agents.sorter.adapter: .* lacks adapter_config.json"):
        check_files(pool(agents__1__adapter=f"path:{home}"))
