"""An OpenAI-compatible endpoint on a real socket, which answers, refuses, stalls and breaks off as told, and remembers.

Spoken in plain HTTP/1.1 over asyncio streams, because a test must be able to cut a connection in mid-reply.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from dmoa.types import GenerationRequest, Message, Sampling

USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 5}}


@dataclass
class Call:
    """One call as it arrived, and the wire to answer on."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    reader: asyncio.StreamReader = field(repr=False)
    writer: asyncio.StreamWriter = field(repr=False)
    at_s: float = field(default_factory=time.monotonic)

    async def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a whole reply."""
        fields = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        head = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        await self.raw("\r\n".join(head).encode() + content)

    async def open_stream(self) -> None:
        """Begin a stream of events."""
        await self.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, content: bytes) -> None:
        """Send some bytes of a stream."""
        await self.raw(b"%x\r\n%s\r\n" % (len(content), content))

    async def event(self, data: Any) -> None:
        """Send one event."""
        await self.chunk(event_bytes(data))

    async def raw(self, content: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(content)
        await self.writer.drain()

    async def until_gone(self) -> None:
        """Wait until the client hangs up."""
        await self.reader.read()


Turn = Callable[[Call], Awaitable[None]]


def event_bytes(data: Any) -> bytes:
    """Return an event as it goes over the wire."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def row(token: str, *probabilities: float, chosen: float | None = None) -> dict[str, Any]:
    """Return a token's log-probabilities: the listed ones by probability; `chosen` where it is not the first of them."""
    listed = [
        {"token": token if i == 0 and chosen is None else f"t{i}", "logprob": math.log(p)} for i, p in enumerate(probabilities)
    ]
    own = chosen if chosen is not None else probabilities[0]
    return {"token": token, "logprob": math.log(own), "bytes": None, "top_logprobs": listed}


def answer(
    *pieces: str, rows: Sequence[dict[str, Any]] | None = None, usage: dict[str, Any] | None = USAGE, finish: str | None = "stop"
) -> Turn:
    """Answer with a text, whole or as a stream of its pieces; `rows` go with the pieces one by one, the rest with the last."""

    async def turn(call: Call) -> None:
        logprobs = None if rows is None else {"content": list(rows), "refusal": None}
        if not call.body["stream"]:
            choice = {"index": 0, "message": {"role": "assistant", "content": "".join(pieces)}, "finish_reason": finish}
            tree = {"id": "x", "object": "chat.completion", "choices": [choice | {"logprobs": logprobs}]}
            await call.send(200, json.dumps(tree | ({"usage": usage} if usage else {})).encode())
            return
        await call.open_stream()
        await call.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for i, piece in enumerate(pieces):
            part = None if rows is None else rows[i:] if i == len(pieces) - 1 else rows[i : i + 1]
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            await call.event({"choices": [choice | ({"logprobs": {"content": part}} if part is not None else {})], "usage": None})
        await call.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        if usage and call.body.get("stream_options") == {"include_usage": True}:
            await call.event({"choices": [], "usage": usage})
        await call.event("[DONE]")
        await call.raw(b"0\r\n\r\n")

    return turn


def refusal(status: int, message: str, *, headers: dict[str, str] | None = None, **fields: Any) -> Turn:
    """Answer with an OpenAI error object."""

    async def turn(call: Call) -> None:
        await call.send(status, json.dumps({"error": {"message": message, "type": "x", **fields}}).encode(), headers)

    return turn


def content(data: bytes, status: int = 200) -> Turn:
    """Answer with any bytes."""

    async def turn(call: Call) -> None:
        await call.send(status, data)

    return turn


def opening(*pieces: str, then: str) -> Turn:
    """Begin a stream, then `stall` until the client is gone, `cut` the connection, or `end` without a word."""

    async def turn(call: Call) -> None:
        await call.open_stream()
        for piece in pieces:
            await call.event({"choices": [{"delta": {"content": piece}}]})
        if then == "stall":
            await call.until_gone()
        elif then == "cut":
            call.writer.transport.abort()
        else:
            await call.raw(b"0\r\n\r\n")

    return turn


async def stall(call: Call) -> None:
    """Say nothing until the client is gone."""
    await call.until_gone()


class FakeEndpoint:
    """Answers each call with the next of its turns, the last of them for all that follow."""

    def __init__(self, *turns: Turn) -> None:
        self._turns = list(turns)
        self.url = ""
        self.calls: list[Call] = []
        self.running = 0
        self.peak = 0
        """Most calls that were open at one time."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                call = Call(first.split()[1], headers, body, reader, writer)
                self.calls.append(call)
                self.running += 1
                self.peak = max(self.peak, self.running)
                try:
                    await self._turns[min(len(self.calls), len(self._turns)) - 1](call)
                finally:
                    self.running -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def playing(*turns: Turn) -> AsyncIterator[FakeEndpoint]:
    """Run an endpoint on a free port in the test's own loop."""
    endpoint = FakeEndpoint(*turns)
    server = await asyncio.start_server(endpoint._serve, "127.0.0.1", 0)
    endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield endpoint
    finally:
        server.close()
        await until(lambda: endpoint.running == 0)


def request(
    text: str, *, name: str = "", adapter: str | None = None, deadline_unix_s: float | None = None, **sampling: Any
) -> GenerationRequest:
    """Return a request of one user message."""
    return GenerationRequest(
        request_id=name or text,
        call_id=name or text,
        messages=(Message(role="user", content=text),),
        sampling=Sampling(**sampling),
        adapter=adapter,
        deadline_unix_s=deadline_unix_s,
    )


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is bound to happen."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)
