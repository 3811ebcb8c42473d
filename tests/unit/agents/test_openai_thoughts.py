"""Thoughts of endpoints: every field they come in, whole and streamed, their tokens, and the entropy of either side."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import Any

import pytest

from dmoa.engine_options import OpenaiOptions
from dmoa.engines.openai import OpenaiEngine
from dmoa.errors import EngineError
from dmoa.types import Generation, TextDelta
from dmoa.validation import REDACTED
from tests.unit.agents.openai_server import Call, Turn, playing, request, row, until

LOG2, LOG4 = math.log(2), math.log(4)
COIN, DIE = (0.5, 0.5), (0.25, 0.25, 0.25, 0.25)
"""Distributions whose entropies are log 2 and log 4."""


def said(pieces: list[dict[str, Any]], *, rows: Any = None, usage: Any = None, finish: str = "stop") -> Turn:
    """Answer with messages that follow each other: put together where the reply is whole, one by one where it is a stream.

    `rows`: the log-probabilities that go with each of them.
    """

    async def turn(call: Call) -> None:
        listed = rows or [None] * len(pieces)
        tail = {"usage": usage} if usage else {}
        if not call.body["stream"]:
            whole: dict[str, Any] = {"role": "assistant", "content": None}
            for piece in pieces:
                for name, value in piece.items():
                    is_text = isinstance(whole.get(name), str) and (value is None or isinstance(value, str))
                    whole[name] = whole[name] + (value or "") if is_text else value
            choice = {"index": 0, "message": whole, "finish_reason": finish, "logprobs": merged(listed)}
            await call.send(200, json.dumps({"choices": [choice]} | tail).encode())
            return
        await call.open_stream()
        for piece, part in zip(pieces, listed, strict=True):
            await call.event({"choices": [{"index": 0, "delta": piece, "logprobs": part}]})
        await call.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]} | tail)
        await call.event("[DONE]")
        await call.raw(b"0\r\n\r\n")

    return turn


def merged(listed: list[Any]) -> Any:
    """One record of log-probabilities for all parts."""
    names = {name for part in listed if part for name in part}
    return {name: [item for part in listed if part for item in part.get(name) or []] for name in names} or None


async def ask(turn: Turn, *, is_stream: bool, deadline_s: float | None = None, **options: Any) -> Generation:
    asked = request("Hi", deadline_unix_s=None if deadline_s is None else time.time() + deadline_s)
    async with playing(turn) as endpoint:
        settings = OpenaiOptions.model_validate({"base_url": endpoint.url, "vocab_size": 10, "max_retries": 0} | options)
        engine = OpenaiEngine("thinker", settings, max_num_seqs=4)
        try:
            if not is_stream:
                return await engine.generate(asked)
            items = [item async for item in engine.stream(asked)]
        finally:
            await engine.close()
    whole = items[-1]
    assert isinstance(whole, Generation)
    pieces = [item for item in items[:-1] if isinstance(item, TextDelta)]
    assert "".join(item.text for item in pieces if not item.is_reasoning) == whole.text
    assert "".join(item.text for item in pieces if item.is_reasoning) == whole.reasoning
    return whole


def thinking(text: str, kind: str = "text") -> dict[str, Any]:
    return {"type": "thinking", "thinking": [{"type": kind, "text": text}]}


both = pytest.mark.parametrize("is_stream", [False, True])


@both
@pytest.mark.parametrize(
    "pieces",
    [
        [{"reasoning_content": "I add. "}, {"reasoning_content": "Done."}, {"content": "It is "}, {"content": "19."}],
        [{"reasoning": "I add. "}, {"reasoning": "Done.", "content": ""}, {"content": "It is 19.", "reasoning": None}],
        # Both names with the same words, and details that say them once more.
        [
            {"reasoning": "I add. Done.", "reasoning_content": "I add. Done.", "reasoning_details": [{"text": "I add. Done."}]},
            {"content": "It is 19."},
        ],
        [{"reasoning_content": [{"type": "text", "text": "I add. "}, {"text": "Done."}]}, {"content": "It is 19."}],
        [{"reasoning": {"content": "I add. Done."}}, {"content": [{"type": "text", "text": "It is 19."}]}],
    ],
)
async def test_a_thought_is_parted_whatever_field_it_comes_in(pieces: list[dict[str, Any]], is_stream: bool) -> None:
    found = await ask(said(pieces), is_stream=is_stream)
    assert (found.text, found.reasoning, found.finish_reason) == ("It is 19.", "I add. Done.", "stop")


@both
async def test_parts_of_content_that_are_thoughts_are_no_text(is_stream: bool) -> None:
    content = [thinking("I add."), {"type": "reasoning", "text": " Done."}, {"type": "text", "text": "It is 19."}]
    found = await ask(said([{"content": content}]), is_stream=is_stream)
    assert (found.text, found.reasoning) == ("It is 19.", "I add. Done.")


@both
@pytest.mark.parametrize("odd", [None, 5, True, [], {}, [5, None], [{"text": 5}], {"content": [{}]}])
async def test_a_thought_of_another_type_counts_as_none(odd: Any, is_stream: bool) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "completion_tokens_details": odd}
    found = await ask(
        said([{"content": "It is 19.", "reasoning_content": odd, "reasoning": odd}], usage=usage), is_stream=is_stream
    )
    assert (found.text, found.reasoning, found.usage.reasoning_tokens, found.usage.completion_tokens) == ("It is 19.", "", 0, 4)


@both
@pytest.mark.parametrize(
    ("usage", "completion", "reasoning"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 40, "completion_tokens_details": {"reasoning_tokens": 30}}, 40, 30),
        # Thoughts that are no part of completion_tokens, by the total or because they are more.
        (
            {
                "prompt_tokens": 3,
                "completion_tokens": 10,
                "total_tokens": 43,
                "completion_tokens_details": {"reasoning_tokens": 30},
            },
            40,
            30,
        ),
        ({"prompt_tokens": 3, "completion_tokens": 10, "completion_tokens_details": {"reasoning_tokens": 30}}, 40, 30),
        # Not told: by the length of the thought's nine characters and the text's nine.
        ({"prompt_tokens": 3, "completion_tokens": 40}, 40, 20),
        ({"prompt_tokens": 3, "completion_tokens": 40, "completion_tokens_details": {"reasoning_tokens": -1}}, 40, 20),
        (None, 6, 3),
    ],
)
async def test_tokens_of_a_thought_are_counted(usage: Any, completion: int, reasoning: int, is_stream: bool) -> None:
    found = await ask(said([{"reasoning": "I add it."}, {"content": "It is 19."}], usage=usage), is_stream=is_stream)
    assert (found.usage.completion_tokens, found.usage.reasoning_tokens) == (completion, reasoning)
    is_told = '"reasoning_tokens": 30' in json.dumps(usage)
    assert found.are_tokens_estimated == (not is_told)


@both
async def test_tokens_of_a_thought_that_nobody_shows_are_counted(is_stream: bool) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 40, "completion_tokens_details": {"reasoning_tokens": 30}}
    found = await ask(said([{"content": "It is 19."}], usage=usage), is_stream=is_stream)
    assert (found.reasoning, found.usage.reasoning_tokens) == ("", 30)


def apart(generation: Generation, thought: list[float], answer: list[float]) -> bool:
    sides = ((generation.reasoning_entropy, thought), (generation.entropy, answer))
    return all(
        entropy.tokens == len(nats) and entropy.sum_nats == pytest.approx(sum(nats)) and entropy.slack_nats == pytest.approx(0.0)
        for entropy, nats in sides
    )


@both
async def test_rows_of_thought_and_answer_in_one_list_are_kept_apart(is_stream: bool) -> None:
    # As vLLM lists them: every token, the tags too, which are in no text.
    rows = [
        {"content": [row("<think>", *COIN), row("It is", *DIE), row(" 19?", *DIE)]},
        {"content": [row("</think>", *COIN)]},
        {"content": [row("\n\n", 1.0), row("It is", *COIN), row(" 19", *COIN)]},
        {"content": [row("<|im_end|>", 1.0)]},
    ]
    pieces = [{"reasoning": "It is 19?"}, {}, {"content": "It is 19"}, {"content": ""}]
    found = await ask(said(pieces, rows=rows), is_stream=is_stream)
    assert (found.text, found.reasoning) == ("It is 19", "It is 19?")
    assert apart(found, [LOG2, LOG4, LOG4, LOG2, 0.0], [LOG2, LOG2, 0.0])
    assert found.entropy.kind == found.reasoning_entropy.kind == "truncated"


@both
async def test_rows_that_come_in_a_list_of_their_own(is_stream: bool) -> None:
    rows = [{"content": None, "reasoning_content": [row("So", *DIE)]}, {"content": [row("19", *COIN)]}]
    found = await ask(said([{"reasoning_content": "So"}, {"content": "19"}], rows=rows), is_stream=is_stream)
    assert apart(found, [LOG4], [LOG2])


@both
async def test_where_the_thought_is_not_listed_the_answers_stand_alone(is_stream: bool) -> None:
    rows = [None, {"content": [row("It is", *COIN), row(" 19", *COIN)]}]
    found = await ask(said([{"reasoning_content": "I add."}, {"content": "It is 19"}], rows=rows), is_stream=is_stream)
    assert apart(found, [], [LOG2, LOG2])


@both
async def test_a_thought_in_tags_is_kept_apart_in_the_entropy_and_stays_for_the_agent_to_part(is_stream: bool) -> None:
    first, second = "\u00e9".encode()
    listed = [*(row(token, *DIE) for token in ("<think>", "So", "</think>")), row("It is", *COIN)]
    listed += [row(" \\xc3", *COIN) | {"bytes": [32, first]}, row("\\xa9", *COIN) | {"bytes": [second]}, row("19", *COIN)]
    rows = [{"content": listed}]
    found = await ask(said([{"content": "<think>So</think>It is \u00e919"}], rows=rows), is_stream=is_stream)
    assert apart(found, [LOG4] * 3, [LOG2] * 4)


@both
async def test_rows_that_do_not_spell_the_answer_leave_it_unknown(is_stream: bool) -> None:
    rows = [{"content": [row("token_id:7", *DIE), row("token_id:9", *COIN)]}]
    pieces = [{"reasoning": "So", "content": "19"}]
    found = await ask(said(pieces, rows=rows), is_stream=is_stream)
    assert apart(found, [LOG4, LOG2], [])
    assert apart(await ask(said([{"content": "19"}], rows=rows), is_stream=is_stream), [], [LOG4, LOG2])


@both
@pytest.mark.parametrize("finish", ["length", "stop"])
async def test_a_thought_that_never_ended_is_no_answer(finish: str, is_stream: bool) -> None:
    rows = [{"content": [row("So", *DIE), row(" it is 41", *COIN)]}]
    found = await ask(said([{"reasoning": "So it is 41"}], rows=rows, finish=finish), is_stream=is_stream)
    assert (found.text, found.reasoning, found.finish_reason) == ("", "So it is 41", "length")
    assert apart(found, [LOG4, LOG2], [])


async def test_a_deadline_amid_the_thought_leaves_the_thought() -> None:
    async def turn(call: Call) -> None:
        await call.open_stream()
        await call.event({"choices": [{"index": 0, "delta": {"reasoning_content": "I add"}}]})
        await call.until_gone()

    found = await ask(turn, is_stream=True, deadline_s=0.3)
    assert (found.text, found.reasoning, found.finish_reason) == ("", "I add", "length")


@both
async def test_a_refusal_or_a_call_after_a_thought_is_no_reply(is_stream: bool) -> None:
    for message, named in (
        ({"refusal": "I will not."}, "it refused to answer"),
        ({"tool_calls": [{"id": "1"}]}, "called a tool"),
    ):
        with pytest.raises(EngineError, match=named):
            await ask(said([{"reasoning": "Hmm."}, message]), is_stream=is_stream)


async def test_a_thought_comes_as_it_is_made_and_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret-0123456789")
    go_on = asyncio.Event()

    async def turn(call: Call) -> None:
        await call.open_stream()
        for piece in ("My key is sk-sec", "ret-0123456789."):
            await call.event({"choices": [{"index": 0, "delta": {"reasoning_content": piece}}]})
        await go_on.wait()
        await call.event({"choices": [{"index": 0, "delta": {"content": "19"}, "finish_reason": "stop"}]})
        await call.event("[DONE]")
        await call.raw(b"0\r\n\r\n")

    async with playing(turn) as endpoint:
        settings = OpenaiOptions.model_validate({"base_url": endpoint.url, "api_key_env": "SOME_KEY"})
        engine = OpenaiEngine("thinker", settings, max_num_seqs=4)
        stream = engine.stream(request("Hi"))
        first = await anext(stream)
        assert first == TextDelta(text="My key is ", is_reasoning=True)
        go_on.set()
        items = [item async for item in stream]
        await engine.close()
        await until(lambda: endpoint.running == 0)
    assert isinstance(items[-1], Generation)
    assert "sk-" not in items[-1].reasoning
    assert items[-1].reasoning == f"My key is {REDACTED}."
