"""An outside check: a plain asyncio script that knows nothing of dmoa makes the same calls of the same tokens."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import urllib.request
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local
from dmoa.policies.registry import split_policy
from dmoa.protocols import final_answer
from dmoa.swarm import Swarm
from dmoa.testing import fixed_gate, query, router_of, scripted_pool
from dmoa.types import Answer
from tests.unit.agents.openai_server import Call, FakeEndpoint, playing

QUESTION = "What is 12 + 7?"
ROLES = {"a": "Adds.", "b": "Checks.", "c": "Guesses.", "d": "Doubts."}
SYSTEM = "You work with other experts on a user's question. Be brief and correct."
COT = "Think step by step, then write the answer on a last line of its own."
AGGREGATE = (
    "The work above holds answers of several assistants to the question; some may be wrong. Weigh them, then write one answer, "
    "complete and correct."
)


async def counted(call: Call) -> None:
    """Answer in as many words as the prompt's digest says; tokens are words."""
    prompt = json.dumps(call.body["messages"])
    words = 3 + hashlib.sha256(prompt.encode()).digest()[0] % 20
    text = " ".join(["Well,"] * (words - 2) + ["Answer:", str(words % 4)])
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": words, "total_tokens": 0}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    await call.send(200, json.dumps({"choices": [choice], "usage": usage}).encode())


class Script:
    """What somebody would write by hand against a chat endpoint."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.tokens = 0
        self.calls = 0

    async def ask(self, agent: str, seen: list[str], instruction: str = "", temperature: float = 0.0) -> str:
        work = "".join(f"Work so far, step {number}:\n{text}\n\n" for number, text in enumerate(seen, 1))
        role = f"Answer the question above. Your role: {ROLES[agent]} {instruction}".strip()
        user = f"{QUESTION}\n\n{work}{role}"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        body = {"model": "big", "messages": messages, "temperature": temperature, "stream": False}
        tree = await asyncio.to_thread(self._post, body)
        self.calls += 1
        self.tokens += tree["usage"]["prompt_tokens"] + tree["usage"]["completion_tokens"]
        return str(tree["choices"][0]["message"]["content"])

    def _post(self, body: dict[str, Any]) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        asked = urllib.request.Request(
            f"{self._url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with opener.open(asked, timeout=600) as reply:
            return json.load(reply)

    async def moa(self) -> str:
        first = await asyncio.gather(*(self.ask(name, []) for name in ROLES))
        second = await asyncio.gather(*(self.ask(name, list(first), AGGREGATE) for name in ROLES))
        return await self.ask("a", list(second), AGGREGATE)

    async def self_consistency(self) -> str:
        samples = await asyncio.gather(*(self.ask("b", [], COT, 0.7) for _ in range(5)))
        return Counter(samples).most_common(1)[0][0]


def swarm_of(url: str, places: int = 16) -> Swarm:
    """The same pool in the runtime, its model behind an endpoint that takes so many calls at once."""
    config = scripted_pool(tuple(ROLES))
    options = {"base_url": url, "vocab_size": 10}
    far = {"model": "openai:big", "engine": "openai", "max_num_seqs": places, "engine_kwargs": options}
    tree = config.model_dump(mode="json", exclude_unset=True) | {"llms": {"s": far}}
    tree["agents"] = [{"name": name, "llm": "s", "profile": role} for name, role in ROLES.items()]
    config = type(config).model_validate(tree)
    agents, engines = build_local(config)
    router = router_of(fixed_gate(dict.fromkeys(ROLES, 0.25)))
    return Swarm(config, agents=agents, router=router, encoder=HashEncoder(), engines=engines)


async def by_dmoa(server: FakeEndpoint, policy: str) -> Answer:
    """The same question through the runtime."""
    swarm = swarm_of(server.url)
    try:
        return await final_answer(swarm, query(QUESTION, max_steps=9), *split_policy(policy))
    finally:
        await swarm.close()


@pytest.mark.parametrize(("policy", "calls"), [("moa", 9), ("self_consistency:b", 5)])
async def test_calls_tokens_and_answer_are_those_of_a_script_by_hand(policy: str, calls: int) -> None:
    async with playing(counted) as server:
        script = Script(server.url)
        text = await (script.moa() if policy == "moa" else script.self_consistency())
        by_hand = [call.body["messages"] for call in server.calls]
        server.calls.clear()
        answer = await by_dmoa(server, policy)
        asked = [call.body["messages"] for call in server.calls]
    assert len(asked) == script.calls == calls
    assert sorted(map(json.dumps, asked)) == sorted(map(json.dumps, by_hand))
    assert answer.usage.total == script.tokens
    assert answer.text == text


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_application_behind_the_guides_bridge_is_an_agent(is_streamed: bool) -> None:
    """The guide's code, with a function in place of a LangGraph app, an AutoGen group or a CrewAI crew."""
    text = (files("dmoa") / "docs" / "extending.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(re.findall(r"^```python\n# bridge.py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0], names)
    seen: list[Any] = []

    def answer(messages: list[dict[str, str]]) -> str:
        seen.append([message["role"] for message in messages])
        return f"{len(messages)} messages. Answer: 19"

    server = names["bridge"](answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    swarm = swarm_of(f"http://127.0.0.1:{server.server_address[1]}/v1")
    try:
        asked = replace(query(QUESTION), is_streamed=is_streamed)
        answers = [await final_answer(swarm, asked, policy, agent) for policy, agent in (("single", "b"), ("majority_k", None))]
    finally:
        await swarm.close()
        server.shutdown()
        server.server_close()
        thread.join()
    assert [found.text for found in answers] == ["2 messages. Answer: 19"] * 2
    assert seen == [["system", "user"]] * 4
    assert answers[0].usage.completion_tokens == len("2 messages. Answer: 19") // 4
    assert answers[1].steps[0].replies[0].entropy.mean_nats is None
