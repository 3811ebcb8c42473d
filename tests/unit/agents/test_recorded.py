"""The recorded engine: files in three formats, what a reply is found by, what is refused and by which name, what is counted."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local, build_pool_gate, load_pool
from dmoa.config import Config, load, loads
from dmoa.engine_options import RecordedOptions
from dmoa.engines.recorded import RecordedEngine, RecordedReply, ReplyIndex, agent_name, entropy_of, read_replies
from dmoa.errors import ConfigError, EngineError, NoAgentError, RequestError
from dmoa.protocols import final_answer
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.testing import query
from dmoa.types import Answer, GenerationRequest, Message, Query, Sampling, TextDelta, TokenUsage, question_key

EXAMPLE = Path(__file__).parents[3] / "cluster" / "pools" / "recorded.yaml"
SUM = "What is 12 + 7?"


def line(agent: str = "a", query: str = SUM, text: str = "19", **more: Any) -> dict[str, Any]:
    return {"query": query, "agent": agent, "text": text, **more}


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    text = "".join(f"{json.dumps(item)}\n" for item in lines)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(item) for item in lines]), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def engine_of(path: Path, agents: Sequence[str] = ("a",), **options: Any) -> RecordedEngine:
    return RecordedEngine(RecordedOptions(replies=str(path), **options), agents)


def request(text: str = SUM, agent: str = "a", **changes: Any) -> GenerationRequest:
    messages = (Message(role="user", content=text),)
    known = {"question": question_key(text), "agent": agent} | changes
    return GenerationRequest(request_id="r", messages=messages, sampling=Sampling(), **known)


def swarm_of(config: Config) -> Swarm:
    gate, record = build_pool_gate(config)
    router = LocalRouter()
    router.install(record.version, gate)
    agents, engines = build_local(config)
    return Swarm(config, agents=agents, router=router, encoder=HashEncoder(), engines=engines)


async def ask(swarm: Swarm, asked: str | Query, policy: str, agent: str | None = None) -> Answer:
    return await final_answer(swarm, query(asked, max_steps=1) if isinstance(asked, str) else asked, policy, agent)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.parquet"])
async def test_each_format_gives_the_same_generation(tmp_path: Path, name: str) -> None:
    known = line(
        reasoning="7 and 12",
        entropy=0.5,
        prompt_tokens=9,
        completion_tokens=4,
        reasoning_tokens=3,
        cached_tokens=2,
        latency_ms=80.0,
        price=0.1,
    )
    bare = line(agent="B", text="It is 19, I think.")
    engine = engine_of(write(tmp_path / name, [known, bare]), ("a", "b"))
    full, plain = await engine.generate(request()), await engine.generate(request(agent="b"))
    assert (full.text, full.finish_reason, full.engine_ms, full.are_tokens_estimated) == ("19", "stop", 80.0, False)
    assert (full.price, plain.price) == (0.1, None)
    assert full.usage == TokenUsage(prompt_tokens=9, cached_tokens=2, completion_tokens=4, reasoning_tokens=3)
    assert (full.reasoning, plain.reasoning) == ("7 and 12", "")
    assert (full.entropy.sum_nats, full.entropy.sq_sum, full.entropy.tokens) == (0.5, 0.25, 1)
    # 15 characters are asked, 18 come back: at 4 a token.
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens, plain.are_tokens_estimated) == (4, 5, True)
    assert plain.entropy.tokens == 0
    assert plain.entropy.mean_nats is None
    await engine.close()


async def test_a_reply_is_found_by_text_then_by_id_and_the_first_of_two_counts(tmp_path: Path) -> None:
    folder = tmp_path / "replies"
    folder.mkdir()
    write(folder / "2.jsonl", [line(text="later"), {"query_id": "q2", "agent": "a", "text": "by id"}])
    write(folder / "1.jsonl", [line(query=" What is\n12 + 7? ", text="first", query_id="q1")])
    engine = engine_of(folder)
    assert (await engine.generate(request("What  is 12 + 7?"))).text == "first"
    assert (await engine.generate(request("In other words: 12 + 7?", query_id="q1"))).text == "first"
    assert (await engine.generate(request("Unknown", query_id="q2"))).text == "by id"
    assert (await engine.generate(request(query_id="q2"))).text == "first"
    assert await anext(engine.stream(request())) == TextDelta(text="first")
    with pytest.raises(EngineError, match=r"agent a: no reply to this query is recorded in replies; record one"):
        await engine.generate(request("Unknown"))
    with pytest.raises(EngineError, match=r"agent a: the prompt holds more than the query"):
        await engine.generate(request(question=""))
    await engine.close()


async def test_thoughts_that_an_endpoint_counts_apart_are_generated_tokens_too(tmp_path: Path) -> None:
    counts = {"entropy": 0.5, "completion_tokens": 4, "reasoning_tokens": 50}
    engine = engine_of(write(tmp_path / "r.jsonl", [line(**counts), line(query="Huge", entropy=1e300)]))
    found = await engine.generate(request())
    assert (found.usage.completion_tokens, found.usage.reasoning_tokens) == (54, 50)
    assert (found.entropy.tokens, found.entropy.sum_nats) == (4, 2.0)
    assert not (await engine.generate(request("Huge"))).entropy.is_finite
    await engine.close()


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_a_mean_entropy_has_two_names_and_may_say_of_how_many_tokens(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [line(entropy_nats=0.3, entropy_tokens=6, completion_tokens=40)])
    (reply,) = read_replies(path)
    with closing(ReplyIndex(path)) as index:
        found = index.find("a", reply.keys)
    assert found is not None
    for one in (reply, found):
        known = entropy_of(one, 40, 50_000)
        assert (known.tokens, known.sum_nats) == (6, pytest.approx(1.8))


def test_entropies_are_of_tokens_of_a_mean_or_bounded_by_what_is_listed() -> None:
    def known(**more: Any) -> Any:
        return entropy_of(RecordedReply.model_validate(line(**more)), 4, 2)

    assert known(entropy=[0.5, 1.5]).mean_nats == 1.0
    assert known(entropy=[0.5, 1.5]).sq_sum == 2.5
    assert known(entropy=0.25).sum_nats == 1.0
    half = math.log(0.5)
    listed = known(top_logprobs=[[half, half], [0.0]])
    assert (listed.tokens, listed.kind) == (2, "truncated")
    assert listed.sum_nats == pytest.approx(math.log(2))
    assert known().tokens == 0


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"query": "x", "agent": "a"}', "text: missing"),
        ('{"query": "x", "agent": "a", "text": 5}', "text is 5"),
        ('{"agent": "a", "text": "t"}', "query and query_id are both missing"),
        ('{"query": "x", "agent": "", "text": "t"}', "agent is ''"),
        ('{"query": "x", "agent": "a", "text": "t", "price": -1}', "price is -1"),
        ('{"query": "x"', "line 3: invalid JSON: EOF while parsing an object"),
        ("[1]", "line 3"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, bad: str, said: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f"{json.dumps(line())}\n\n{bad}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        engine_of(path)
    assert f"{path}, line 3" in str(caught.value)
    assert said in str(caught.value)


def test_files_that_are_not_there_not_readable_or_not_for_the_pool_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not there; name a file or folder"):
        engine_of(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"holds no file of replies"):
        engine_of(tmp_path)
    for name, data in (("cut.jsonl.gz", gzip.compress(b"{}\n" * 99)[:-9]), ("x.parquet", b"PAR1"), ("x.jsonl.gz", b"plain")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=rf"{name}.*(line 1|cannot be read)"):
            engine_of(tmp_path / name)
    path = write(tmp_path / "r.jsonl", [line(agent="Model-8B"), line(agent="other")])
    with pytest.raises(ConfigError, match=r"holds no reply of agent 'modell-8b'; expected one of model-8b, other.*did you mean"):
        engine_of(path, ("modell-8b",))
    with closing(ReplyIndex(path)) as index:
        assert [index.count(name) for name in ("model-8b", "other", "none")] == [1, 1, 0]
    with pytest.raises(ConfigError, match=r"'B/C' and 'b c' both become 'b-c'"):
        engine_of(write(tmp_path / "s.jsonl", [line(agent="b c"), line(agent="B/C")]))


def test_names_of_models_become_names_of_agents() -> None:
    assert [agent_name(name) for name in ("Meta/Llama 3.1-8B", "_x_", "gpt-4o")] == ["meta-llama-3.1-8b", "x", "gpt-4o"]


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"query": TEXTS.filter(str.strip), "agent": TEXTS.filter(agent_name), "text": TEXTS},
            optional={"query_id": TEXTS, "entropy": st.lists(st.floats(0, 9)), "price": st.floats(0, 9), "other": st.integers()},
        ),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_written_is_read_and_found(tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any]]) -> None:
    path = write(tmp_path_factory.mktemp("r") / "r.jsonl", lines)
    assert [(reply.query, reply.agent, reply.text) for reply in read_replies(path)] == [
        (item["query"], item["agent"], item["text"]) for item in lines
    ]
    if len({item["agent"] for item in lines}) == len({agent_name(item["agent"]) for item in lines}):
        index = ReplyIndex(path)
        for number, item in enumerate(lines):
            key = question_key(item["query"])
            first = next(other for other in lines if question_key(other["query"]) == key and other["agent"] == item["agent"])
            found = index.find(agent_name(item["agent"]), (key,))
            assert found is not None, number
            assert (found.text, found.entropy) == (first["text"], first.get("entropy"))
        index.close()


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    for name in ("r.jsonl", "r.jsonl.gz", "r.parquet"):
        path = tmp_path_factory.mktemp("r") / name
        path.write_bytes(data)
        with suppress(ConfigError):
            assert all(reply.agent and (reply.query or reply.query_id) for reply in read_replies(path))


def test_keys_of_queries_take_no_notice_of_white_space() -> None:
    assert question_key(" a\n b ") == question_key("a b") == question_key("a\u00a0b")
    assert question_key("e\u0301") == question_key("\u00e9")
    assert len({question_key("a b"), question_key("A b"), question_key("ab")}) == 3


async def test_the_example_answers_through_the_orchestrator() -> None:
    swarm = swarm_of(load_pool(EXAMPLE))
    asked = "Today is Monday. Which day is it in 10 days?"
    one = await ask(swarm, asked, "single", "careful")
    assert one.text.endswith("The answer is Thursday.")
    assert one.steps[0].replies[0].usage.prompt_tokens == 60
    assert one.steps[0].replies[0].engine_ms == 2100
    everyone = await ask(swarm, "Today is Friday. Which day is it in 3 days?", "dense")
    # Two of three agree, though the third is surer of itself.
    assert (everyone.text, everyone.stop_reason) == ("Saturday, Sunday, Monday. The answer is Monday.", "agreement")
    gated = await ask(swarm, asked, "dmoa")
    assert gated.stop_reason in ("agreement", "sure", "max_steps")
    assert len(gated.steps) == 1
    await swarm.close()


async def test_a_pool_may_call_an_agent_otherwise_than_the_files(tmp_path: Path) -> None:
    engine = engine_of(write(tmp_path / "r.jsonl", [line(agent="Model-8B")]), ("big",), names={"big": "Model-8B"})
    assert (await engine.generate(request(agent="big"))).text == "19"
    await engine.close()


async def test_an_unknown_query_is_a_failed_contribution_that_others_stand_in_for(tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl", [line(), line(agent="b"), line(agent="b", query="And 1 + 1?", text="2")])
    swarm = swarm_of(pool_of(tmp_path / "r.jsonl"))
    stood_in = await ask(swarm, "And 1 + 1?", "single")
    assert (stood_in.text, stood_in.degraded) == ("2", True)
    assert [reply.status for reply in stood_in.steps[0].replies] == ["failed", "ok"]
    with pytest.raises(NoAgentError, match=r"a: failed, agent a: no reply to this query is recorded"):
        await ask(swarm, "Unknown?", "dense")
    await swarm.close()


def pool_of(path: Path, **changes: Any) -> Config:
    tree = {
        "name": "logs",
        "llms": {"logs": {"model": "recorded:x", "engine": "recorded", "engine_kwargs": {"replies": str(path)}}},
        "agents": [{"name": name, "llm": "logs", "profile": "A model."} for name in ("a", "b")],
        "gate": {"hidden": 8, "activation": {"max_agents": 2}},
        "limits": {"max_steps": 1},
    }
    return Config.model_validate(tree | changes)


async def test_policies_that_ask_more_than_the_query_are_refused_by_name(tmp_path: Path) -> None:
    swarm = swarm_of(pool_of(write(tmp_path / "r.jsonl", [line(), line(agent="b")])))
    with pytest.raises(RequestError, match=r"policy: 'selector' asks agents more than the query alone, and the replies of a are"):
        await ask(swarm, SUM, "selector")
    talk = replace(query(SUM, max_steps=1), turns=(Message(role="user", content="Hi"), Message(role="assistant", content="Hi.")))
    with pytest.raises(RequestError, match=r"policy: 'dense': step 1 asks a with earlier turns in the prompt; its replies are"):
        await ask(swarm, talk, "dense")
    differing = swarm_of(pool_of(write(tmp_path / "s.jsonl", [line(text="19"), line(agent="b", text="20")])))
    with pytest.raises(RequestError, match=r"policy: 'dense': step 2 asks a with earlier work in the prompt"):
        await ask(differing, query(SUM, max_steps=2), "dense")
    await swarm.close()
    await differing.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limits": {}}, "limits.max_steps is 20; the replies of llms.logs are recorded"),
        ({"summarizer": {"mode": "llm", "llm": "logs"}}, "summarizer.llm is 'logs', whose replies are recorded"),
        (
            {"agents": [{"name": "a", "llm": "logs", "profile": "p", "tools": ["calculator"]}]},
            r"agents.a.tools is \['calculator'\]; the replies of llms.logs are recorded",
        ),
        ({"agents": [{"name": "a", "llm": "logs", "profile": "p", "adapter": "builtin:words"}]}, "engine 'recorded'.*takes none"),
        (
            {"llms": {"logs": {"model": "recorded:x", "engine": "scripted"}}},
            "engine 'recorded' runs models recorded:NAME|recorded",
        ),
        ({"llms": {"logs": {"model": "recorded:x", "engine": "recorded"}}}, "replies: missing"),
    ],
)
def test_pools_that_recorded_replies_cannot_run_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pool_of(tmp_path / "r.jsonl", **changes)


def test_a_relative_path_is_taken_from_the_pool_file(tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl", [line()])
    text = EXAMPLE.read_text(encoding="utf-8")
    (tmp_path / "pool.yaml").write_text(text.replace("recorded/replies.jsonl", "r.jsonl"), encoding="utf-8")
    assert load(tmp_path / "pool.yaml").llms["logs"].options.model_dump()["replies"] == str(tmp_path / "r.jsonl")
    assert loads(text).llms["logs"].options.model_dump()["replies"] == str(Path("recorded/replies.jsonl").absolute())
