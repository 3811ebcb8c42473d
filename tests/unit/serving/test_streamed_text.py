"""A streamed answer is the whole one, character by character, and every event is one line to whatever splits lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI

from dmoa.agents.agent import Agent, LocalAgents
from dmoa.config import AgentConfig
from dmoa.core.reasoning import split_reasoning
from dmoa.engine_options import ScriptedOptions
from dmoa.engines.scripted import ScriptedEngine
from dmoa.policies.baselines import SinglePolicy
from dmoa.testing import Schedule, asks, orchestrator_of
from dmoa.types import Event, Query
from tests.examples import examples
from tests.unit.serving.fake_service import QUESTION, FakeService, connect, make_app

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
CODE = "    if n < 2:\n        return n\n"


class Speaker(FakeService):
    """A pool of one agent and perhaps a summarizer, real from the engine's pieces on, that says one text to everything."""

    def __init__(self, text: str, *, llm: bool = False) -> None:
        super().__init__()
        said = {"adder": text, "summarizer": f"FINAL\n{text}"}
        engine = ScriptedEngine(ScriptedOptions(replies=said))
        agents = {name: Agent(AgentConfig(name="any", llm="tiny", profile="Speaks."), engine) for name in said}
        self._orchestrator = orchestrator_of(LocalAgents(agents), ["adder"], llm=llm)
        self._policy = Schedule(asks("adder")) if llm else SinglePolicy(agent="adder")

    async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        async for event in self._orchestrator.answer(query, self._policy):
            yield event


async def both(service: FakeService, path: str) -> tuple[str, str]:
    """The whole text of an answer, and its streamed pieces together; lines are split as Python's `splitlines` does."""
    body: dict[str, Any] = {"model": "tiny"} | ({"messages": QUESTION} if path == CHAT else {"prompt": "1 + 1"})
    async with connect(make_app(service)) as client:
        whole = await client.post(path, json=body)
        streamed = await client.post(path, json=body | {"stream": True})
    assert (whole.status_code, streamed.status_code) == (200, 200), whole.text
    choice = whole.json()["choices"][0]
    lines = [line for line in streamed.text.splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    if path == CHAT:
        return choice["message"]["content"], "".join(chunk["delta"].get("content", "") for chunk in chunks)
    return choice["text"], "".join(chunk["text"] for chunk in chunks)


TEXTS = st.text(
    st.sampled_from("ab\u0085\u2028\u2029\x0b\x0c\x1c\x1e\r\n\t \u00a0\ufeff\ud800é😀{}\\\"'") | st.characters()
).filter(lambda text: bool(text.strip()) and split_reasoning(text).text == text)  # no thought, as `analysis` alone is


@pytest.mark.parametrize("path", [CHAT, PLAIN])
@pytest.mark.parametrize("llm", [False, True])
@settings(max_examples=examples(60))
@given(text=TEXTS)
def test_streamed_pieces_are_the_whole_text(text: str, llm: bool, path: str) -> None:
    whole, streamed = asyncio.run(both(Speaker(text, llm=llm), path))
    assert streamed == whole
    # An agent's text is sent as it is; a summarizer's without blank lines after the verdict.
    said = text.encode("utf-8", "replace").decode()
    assert whole == said if not llm else said.endswith(whole) and whole.strip() == said.strip()


@pytest.mark.parametrize("llm", [False, True])
@pytest.mark.parametrize("path", [CHAT, PLAIN])
async def test_code_keeps_its_indentation(path: str, llm: bool) -> None:
    assert await both(Speaker(CODE, llm=llm), path) == (CODE, CODE)


@pytest.mark.parametrize(
    ("deltas", "text"),
    [
        ((" ", "\n", " 1 ", "9 "), " \n 1 9 "),
        ((" \n",), "19"),
        (("1",), "19"),
        (("", " "), " 19"),
    ],
)
async def test_what_was_not_streamed_comes_at_the_end(deltas: tuple[str, ...], text: str) -> None:
    """White space alone is no beginning of an answer: what comes in its place may be another text."""
    for path in (CHAT, PLAIN):
        assert await both(FakeService(deltas=deltas, overrides={"text": text}), path) == (text, text)


async def test_no_event_and_no_reply_holds_a_character_that_ends_lines() -> None:
    text = "a\u0085b\u2028c\u2029d\x0be\x0cf\x1cg\rh"
    service = FakeService(overrides={"text": text})
    async with connect(make_app(service)) as client:
        for body in ({"stream": True}, {}, {"dmoa": {"trace": True}}):
            response = await client.post(CHAT, json={"model": "tiny", "messages": QUESTION} | body)
            assert not set(response.text) & set("\u0085\u2028\u2029\x0b\x0c\x1c\x1d\x1e\r")
            events = [event for event in response.text.split("\n\n") if event]
            assert [event for event in events if len(event.splitlines()) != 1] == []


async def test_the_official_clients_read_the_same_text_line_by_line() -> None:
    text = "  x = 'a\u2028b\u0085c'\n"
    transport = httpx.ASGITransport(make_app(Speaker(text)))
    async with (
        AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport)) as official,
        official.chat.completions.stream(model="tiny", messages=QUESTION) as stream,
    ):
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == text
    async with connect(make_app(Speaker(text))) as client:
        body = {"model": "tiny", "messages": QUESTION, "stream": True}
        async with client.stream("POST", CHAT, json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
    for line in lines[:-1]:
        json.loads(line.removeprefix("data: "))
