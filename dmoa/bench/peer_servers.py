"""The servers that `peers` compares: what people would write in place of dmoa, and the endpoint that all of them call.

Run by path, in an environment without dmoa: `python peer_servers.py null`, or the name of a peer with the endpoint's URL. Each
answers `POST /v1/chat/completions` with three calls side by side and the reply that most agree on. It prints its port as a line
of JSON, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import operator
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

ROLES = ("Solve it step by step.", "Answer at once.", "Check every assumption.")
"""One agent each."""
WORDS = ("The", " answer", " is", " 42")
"""Tokens of every reply."""
_IS_LISTED = re.compile(rb'"logprobs": ?true')
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def reply_body(*, is_listed: bool) -> bytes:
    """Return the endpoint's reply, with the log-probabilities of 20 tokens a place where they are asked for."""
    near = [{"token": f" t{i}", "logprob": -4.0 - i / 4, "bytes": None} for i in range(19)]
    tokens = [{"token": word, "logprob": -0.2, "bytes": None} for word in WORDS]
    content = [token | {"top_logprobs": [token, *near]} for token in tokens]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(WORDS)},
        "logprobs": {"content": content} if is_listed else None,
        "finish_reason": "stop",
    }
    usage = {"prompt_tokens": 40, "completion_tokens": len(WORDS), "total_tokens": 40 + len(WORDS)}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "null", "choices": [choice], "usage": usage}
    return json.dumps(body).encode()


class NullEndpoint(asyncio.Protocol):
    """An OpenAI-compatible endpoint that answers at once, with little of a CPU."""

    _REPLIES = tuple(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        for body in (reply_body(is_listed=False), reply_body(is_listed=True))
    )

    def __init__(self) -> None:
        self._seen = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request that is whole."""
        self._seen += data
        while (end := self._seen.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self._seen[:end])
            whole = end + 4 + (int(found[1]) if found else 0)
            if len(self._seen) < whole:
                return
            body, self._seen = self._seen[end + 4 : whole], self._seen[whole:]
            self._transport.write(self._REPLIES[bool(_IS_LISTED.search(body))])


def serve_null() -> None:
    """Serve the endpoint until standard input ends."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(NullEndpoint, "127.0.0.1", 0)
        print(json.dumps(server.sockets[0].getsockname()[1]), flush=True)
        await loop.run_in_executor(None, sys.stdin.read)

    asyncio.run(run())


Call = Callable[[str, str], Any]
"""Asks the endpoint in one role."""


def openai_call(endpoint: str) -> Call:
    """Return a call by OpenAI's client."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=endpoint, api_key="none")

    async def call(role: str, question: str) -> str:
        messages: Any = [{"role": "system", "content": role}, {"role": "user", "content": question}]
        reply = await client.chat.completions.create(model="null", messages=messages, temperature=0.0, max_tokens=64)
        return reply.choices[0].message.content or ""

    return call


def langchain_call(endpoint: str) -> Call:
    """Return a call by LangChain's model class, which LangGraph's guides use."""
    from langchain_openai import ChatOpenAI  # type: ignore[import-not-found]

    model = ChatOpenAI(base_url=endpoint, api_key="none", model="null", temperature=0.0, max_tokens=64)

    async def call(role: str, question: str) -> str:
        return str((await model.ainvoke([("system", role), ("user", question)])).content)

    return call


def _most_common(replies: list[str]) -> str:
    return Counter(replies).most_common(1)[0][0]


def script(call: Call) -> Callable[[str], Any]:
    """Return a swarm in plain asyncio."""

    async def answer(question: str) -> str:
        return _most_common(list(await asyncio.gather(*(call(role, question) for role in ROLES))))

    return answer


class GraphState(TypedDict):
    """State of the graph."""

    question: str
    replies: Annotated[list[str], operator.add]
    answer: str


def langgraph(call: Call) -> Callable[[str], Any]:
    """Return a swarm as a graph of LangGraph: a node an agent, side by side, and one that folds."""
    from langgraph.graph import END, START, StateGraph  # type: ignore[import-not-found]

    def node(role: str) -> Callable[[GraphState], Any]:
        async def ask(state: GraphState) -> dict[str, list[str]]:
            return {"replies": [await call(role, state["question"])]}

        return ask

    def fold(state: GraphState) -> dict[str, str]:
        return {"answer": _most_common(state["replies"])}

    graph = StateGraph(GraphState)
    graph.add_node("fold", fold)
    for number, role in enumerate(ROLES):
        graph.add_node(f"agent-{number}", node(role))
        graph.add_edge(START, f"agent-{number}")
        graph.add_edge(f"agent-{number}", "fold")
    graph.add_edge("fold", END)
    compiled = graph.compile()

    async def answer(question: str) -> str:
        state = await compiled.ainvoke({"question": question, "replies": [], "answer": ""})
        return str(state["answer"])

    return answer


PEERS: dict[str, Callable[[str], Callable[[str], Any]]] = {
    "script": lambda endpoint: script(openai_call(endpoint)),
    "langgraph": lambda endpoint: langgraph(langchain_call(endpoint)),
}
"""Name -> makes its swarm over an endpoint."""


def serve_peer(answer: Callable[[str], Any]) -> None:
    """Serve a swarm behind FastAPI until standard input ends."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Turn(BaseModel):
        role: str
        content: str

    class Asked(BaseModel):
        model: str
        messages: list[Turn]

    app = FastAPI()

    async def complete(asked: Asked) -> dict[str, Any]:
        text = await answer(asked.messages[-1].content)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {"id": "x", "object": "chat.completion", "created": 1, "model": asked.model, "choices": [choice]}

    complete.__annotations__["asked"] = Asked  # a class of this function, which a string would not name
    app.post("/v1/chat/completions")(complete)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()  # so that whoever reads the port can connect
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))

    def stop_at_end() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=stop_at_end, daemon=True).start()
    print(json.dumps(sock.getsockname()[1]), flush=True)
    server.run(sockets=[sock])


if __name__ == "__main__":
    if sys.argv[1] == "null":
        serve_null()
    else:
        serve_peer(PEERS[sys.argv[1]](sys.argv[2]))
