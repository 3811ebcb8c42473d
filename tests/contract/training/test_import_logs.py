"""Importing logs: each format end to end to a pool that answers; what is left out is counted; secrets are never copied."""

from __future__ import annotations

import gzip
import json
import os
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local, build_pool_gate, load_pool
from dmoa.engines.recorded import RecordedReply, ReplyIndex, read_replies
from dmoa.errors import ConfigError
from dmoa.protocols import final_answer
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.testing import query
from dmoa.training.options import ImportOptions
from dmoa.workflows.import_logs import ImportReport, SkippedError, import_logs, question_of, reply_of

pytestmark = pytest.mark.contract
SECRET = "sk-0123456789abcdef0123"
ASKED = "What is 12 + 7?"


def user(text: Any = ASKED, *before: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be brief."}, *before, {"role": "user", "content": text}]


def completion(text: str | None = "The answer is 19.", model: str = "Big/Model-8B", **message: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "model": f"{model}-0613",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text} | message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 21, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 2}},
    }


def pair(text: str | None = "The answer is 19.", model: str = "Big/Model-8B", asked: Any = ASKED, **more: Any) -> dict[str, Any]:
    request = {"model": model, "messages": user(asked), "api_key": SECRET, "extra_headers": {"Authorization": f"Bearer {SECRET}"}}
    return {"request": request, "response": completion(text, model), "headers": {"x-api-key": SECRET}} | more


def run(folder: Path, records: Any, name: str = "logs.jsonl", **options: Any) -> tuple[ImportReport, list[RecordedReply]]:
    text = "".join(f"{json.dumps(item)}\n" for item in records) if name.endswith(".jsonl") else json.dumps(records)
    (folder / name).write_text(text, encoding="utf-8")
    values = {"logs": (folder / name,), "out": folder / "replies.jsonl"} | options
    parsed = ImportOptions.parse(values)
    report = import_logs(parsed, lambda text: None)
    opened = gzip.open if parsed.out.suffix == ".gz" else open
    with opened(parsed.out, "rt", encoding="utf-8") as file:
        assert SECRET not in file.read()
    return report, list(read_replies(parsed.out))


async def answer_of_pool(path: Path, agent: str) -> str:
    config = load_pool(path)
    gate, record = build_pool_gate(config)
    router = LocalRouter()
    router.install(record.version, gate)
    agents, engines = build_local(config)
    swarm = Swarm(config, agents=agents, router=router, encoder=HashEncoder(), engines=engines)
    answer = await final_answer(swarm, query(ASKED, max_steps=1), "single", agent)
    await swarm.close()
    return answer.text


async def test_pairs_of_request_and_response_become_a_pool_that_answers(tmp_path: Path) -> None:
    rows = [
        {"token": "19", "logprob": -0.1, "top_logprobs": [{"token": "19", "logprob": -0.1}, {"token": "20", "logprob": -3.0}]}
    ]
    first = pair(latency_ms=250, query_id="q1", user_api_key=SECRET)
    first["response"]["choices"][0]["logprobs"] = {"content": rows}
    first["response"]["choices"][0]["message"]["reasoning_content"] = "12 and 7"
    report, replies = run(
        tmp_path,
        [
            first,
            pair("It is 19.", "small"),
            pair("Thursday", "small", asked=[{"type": "text", "text": "Which day?"}]),
            pair("again", "small"),
            pair(None, "small", asked="Other?"),
            pair(asked=[{"type": "image_url", "image_url": {}}]),
            {
                "request": {"model": "m", "messages": user("and?", {"role": "assistant", "content": "x"})},
                "response": completion(),
            },
            {"request": {"model": "m", "messages": user()}, "response": {"error": "no"}, "error": {"message": SECRET}},
            {"something": "else"},
        ],
        pool=tmp_path / "pool.yaml",
    )
    assert report.model_dump() == {
        "read": 9,
        "written": 3,
        "skipped": {
            "a reply of this agent to this query came before": 1,
            "the response holds no text": 1,
            "the question is not text": 1,
            "a conversation of several turns": 1,
            "the call failed": 1,
            "neither a request with its response, nor a spend log": 1,
        },
        "agents": {"big-model-8b": 1, "small": 2},
        "queries": 2,
        "complete": 1,
    }
    assert replies[0].model_dump(exclude_none=True) == {
        "query_id": "q1",
        "query": ASKED,
        "agent": "Big/Model-8B",
        "text": "The answer is 19.",
        "reasoning": "12 and 7",
        "top_logprobs": [[-0.1, -3.0]],
        "prompt_tokens": 21,
        "completion_tokens": 5,
        "reasoning_tokens": 2,
        "latency_ms": 250.0,
        "finish_reason": "stop",
    }
    assert await answer_of_pool(tmp_path / "pool.yaml", "big-model-8b") == "The answer is 19."
    assert await answer_of_pool(tmp_path / "pool.yaml", "small") == "It is 19."


def test_batch_output_is_joined_with_its_input_and_goes_without(tmp_path: Path) -> None:
    asked = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": user()}}
    (tmp_path / "in.jsonl").write_text(json.dumps(asked), encoding="utf-8")
    output = [
        {"id": "b", "custom_id": "r1", "response": {"status_code": 200, "request_id": "x", "body": completion()}, "error": None},
        {"id": "b", "custom_id": "r2", "response": {"status_code": 500, "body": {"error": {}}}, "error": None},
        {"id": "b", "custom_id": "r3", "response": {"status_code": 200, "body": completion("20")}, "error": None},
    ]
    report, replies = run(tmp_path, output, logs=(tmp_path / "logs.jsonl", tmp_path / "in.jsonl"))
    assert [(reply.query_id, reply.query, reply.agent) for reply in replies] == [
        ("r1", ASKED, "m"),
        ("r3", None, "Big/Model-8B-0613"),
    ]
    assert report.skipped == {"the call failed": 1, "a request of a batch, for the reply in its output file": 1}


def test_batches_whose_requests_have_the_same_ids_are_not_mixed_up(tmp_path: Path) -> None:
    for model in ("strong", "weak"):
        asked = {"custom_id": "request-0", "body": {"model": model, "messages": user()}}
        (tmp_path / f"{model}.jsonl").write_text(json.dumps(asked), encoding="utf-8")
    output = [{"custom_id": "request-0", "response": {"status_code": 200, "body": completion()}}]
    inputs = tmp_path / "strong.jsonl", tmp_path / "weak.jsonl"
    with pytest.raises(ConfigError, match="custom_id 'request-0' stands for two different requests of a batch"):
        run(tmp_path, output, logs=(tmp_path / "logs.jsonl", *inputs))
    assert not (tmp_path / "replies.jsonl").exists()
    _, replies = run(tmp_path, output, logs=(tmp_path / "logs.jsonl", inputs[0], inputs[0]))
    assert [reply.agent for reply in replies] == ["strong"]


def test_two_spellings_of_a_model_are_one_agent_of_a_file_that_can_be_read(tmp_path: Path) -> None:
    records = [pair(model="GPT-4o"), pair(model="gpt-4o", asked="What is 1 + 1?"), pair(model="gpt-4o", asked="Half \ud83d")]
    report, replies = run(tmp_path, [*records, pair(model="模型")])
    assert report.agents == {"gpt-4o": 2}
    assert [reply.agent for reply in replies] == ["GPT-4o", "GPT-4o"]
    with closing(ReplyIndex(tmp_path / "replies.jsonl")) as index:
        assert index.count("gpt-4o") == 2
    assert report.skipped == {
        "a text holds half of a character (a lone surrogate)": 1,
        "the model's name holds no letter of a to z and no digit; give --agent": 1,
    }


@pytest.mark.parametrize(
    ("model", "out", "names"),
    [
        ("llama", "llama.jsonl", ("llama-logs", "llama")),
        ("a" * 64, f"{'a' * 64}.jsonl", (f"{'a' * 59}-logs", "a" * 64)),
        ("Summarizer", "replies.jsonl", ("replies", "summarizer-logs")),
        ("Summarizer", "summarizer-logs.jsonl.gz", ("summarizer-logs-logs", "summarizer-logs")),
        ("2024-01-01", "1_000.jsonl", ("1_000", "2024-01-01")),
    ],
)
async def test_a_pool_over_any_names_is_one_that_answers(model: str, out: str, names: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    run(tmp_path, [pair(model=model)], out=tmp_path / out, pool=path)
    config = load_pool(path)
    assert (config.name, *config.agent_names) == names
    assert await answer_of_pool(path, names[1]) == "The answer is 19."


def test_a_column_of_an_unknown_field_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--columns names 'querry'; expected FIELD=COLUMN .* did you mean 'query'") as refused:
        run(tmp_path, [{}], columns="querry=prompt,text=output")
    assert "'text'" not in str(refused.value)


def test_a_model_called_summarizer_takes_no_other_ones_name(tmp_path: Path) -> None:
    run(tmp_path, [pair(model="summarizer"), pair(model="summarizer-logs")], pool=tmp_path / "pool.yaml")
    assert load_pool(tmp_path / "pool.yaml").agent_names == ("summarizer-logs2", "summarizer-logs")


def test_more_agents_than_a_pool_may_have_are_no_pool(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--pool: .*agents.*at most 4096 items"):
        run(tmp_path, [pair(model=f"m{number}") for number in range(4097)], pool=tmp_path / "pool.yaml")
    assert not (tmp_path / "pool.yaml").exists()


def test_columns_without_a_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--columns: no effect: none of the logs is a W&B table"):
        run(tmp_path, [pair()], columns=("query=prompt",))
    assert not (tmp_path / "replies.jsonl").exists()


def test_a_record_that_has_columns_is_no_table(tmp_path: Path) -> None:
    report, _ = run(tmp_path, [pair(columns=["query", "text"]), {"columns": ["query", "text"], "data": [["x", "y"]]}])
    assert (report.written, report.skipped) == (1, {"neither a request with its response, nor a spend log": 1})


def test_a_wandb_table_is_read_by_its_columns(tmp_path: Path) -> None:
    table = {
        "columns": ["Prompt", "model", "output", "latency_ms", "Cost", "api_key"],
        "data": [[ASKED, "a", "19", 12.5, 0.1, SECRET], [ASKED, "b", None, 1, 0.1, SECRET], ["x?", "b", "y", None, None, SECRET]],
        "ncols": 6,
    }
    report, replies = run(tmp_path, table, "predictions.table.json", out=tmp_path / "replies.jsonl.gz")
    assert [reply.model_dump(exclude_none=True) for reply in replies] == [
        {"query": ASKED, "agent": "a", "text": "19", "latency_ms": 12.5, "price": 0.1},
        {"query": "x?", "agent": "b", "text": "y"},
    ]
    assert report.skipped == {"the table has no column of the text; name it by --columns text=COLUMN": 1}
    _, named = run(tmp_path, table, "predictions.table.json", columns=("text=model",), agent="mine")
    assert [(reply.agent, reply.text) for reply in named] == [("mine", "a"), ("mine", "b")]
    with pytest.raises(ConfigError, match="--columns: text=nothing: the table has Prompt, model, output"):
        run(tmp_path, table, "predictions.table.json", columns=("text=nothing",))


def test_litellm_spend_logs_give_price_latency_and_counts(tmp_path: Path) -> None:
    row = {
        "request_id": "1",
        "call_type": "acompletion",
        "api_key": SECRET,
        "spend": 0.0021,
        "prompt_tokens": 30,
        "completion_tokens": 6,
        "startTime": "2026-11-01T10:00:00Z",
        "endTime": "2026-11-01T10:00:01.500000Z",
        "model": "openai/gpt-4o",
        "model_group": "GPT 4o",
        "metadata": {"user_api_key": SECRET},
        "status": "success",
    }
    as_text = {"messages": json.dumps(user()), "response": json.dumps(completion())}
    proxied = {
        "messages": "{}",
        "proxy_server_request": json.dumps({"messages": user("Which day?")}),
        "response": completion("Monday"),
    }
    logs = [row | as_text, row | proxied, row | as_text | {"status": "failure"}, row | {"messages": {}, "response": {}}]
    report, replies = run(tmp_path, logs, "spend.json")
    assert [(reply.query, reply.agent, reply.text) for reply in replies] == [
        (ASKED, "GPT 4o", "The answer is 19."),
        ("Which day?", "GPT 4o", "Monday"),
    ]
    assert (replies[0].price, replies[0].latency_ms, replies[0].prompt_tokens, replies[0].completion_tokens) == (
        0.0021,
        1500,
        30,
        6,
    )
    assert (report.read, report.written, report.agents) == (4, 2, {"gpt-4o": 2})
    assert set(report.skipped) == {
        "the call failed",
        "what was asked is not there: LiteLLM keeps it with store_prompts_in_spend_logs",
    }


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_no_log(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "logs.json"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    options = ImportOptions.parse({"logs": (path,), "out": tmp_path / "replies.jsonl"})
    with pytest.raises(ConfigError, match="is no regular file"):
        import_logs(options, print)


def test_bad_files_leave_no_output_behind(tmp_path: Path) -> None:
    (tmp_path / "logs.jsonl").write_text(f"{json.dumps(pair())}\n{{broken\n", encoding="utf-8")
    options = ImportOptions.parse({"logs": (tmp_path / "logs.jsonl",), "out": tmp_path / "replies.jsonl"})
    with pytest.raises(ConfigError, match=r"logs.jsonl, line 2: no JSON"):
        import_logs(options, lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["logs.jsonl"]
    with pytest.raises(ConfigError, match=r"no reply was found in 1 records \(1: neither a request"):
        run(tmp_path, [{"a": 1}])
    for options_of, said in (
        ({"out": tmp_path / "x.json"}, "ends with .jsonl"),
        ({"out": tmp_path / "logs.jsonl"}, "which is read"),
        ({"columns": ("text",)}, "expected FIELD=COLUMN"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(tmp_path, [pair()], **options_of)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["body", "messages", "choices", "message", "content", "role", "usage", "status_code"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(["request", "response", "spend", "columns", "custom_id", "body", "error"]), JSON, max_size=4)
)
def test_any_record_is_a_reply_or_left_out(record: dict[str, Any]) -> None:
    options = ImportOptions.parse({"logs": (Path("logs.jsonl"),), "out": Path("replies.jsonl")})
    with suppress(SkippedError):
        read = reply_of(record, {}, options)
        assert RecordedReply.model_validate_json(read.model_dump_json()) == read
        assert read.agent


@given(JSON)
def test_any_conversation_is_one_question_or_left_out(messages: Any) -> None:
    with suppress(SkippedError):
        assert question_of(messages).strip()
