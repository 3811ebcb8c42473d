"""What only real sockets show: a client that hangs up cancels its query, and one that sends too much reads its 413."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.unit.serving.fake_service import QUESTION, FakeService, listening, make_app, until

CHAT = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def serving(service: FakeService, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app on a free port."""
    async with listening(make_app(service, **options)) as port:
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                yield client
        finally:
            service.release.set()


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("hold_at", [0, 1])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_query_within_two_seconds(path: str, hold_at: int, is_stream: bool) -> None:
    service = FakeService(hold_at=hold_at)
    body = {"model": "tiny", "stream": is_stream} | ({"messages": QUESTION} if path == CHAT else {"prompt": "x"})
    async with serving(service, queued=1) as client:
        asking = asyncio.create_task(client.post(path, json=body))
        await until(lambda: service.running == 1)
        asking.cancel()
        assert await until(lambda: service.cancelled == 1 and service.running == 0) < 2.0
        service.release.set()
        assert (await client.post(path, json=body)).status_code == 200, "the place was not given back"
    assert service.cancelled == 1


async def test_a_client_that_goes_away_between_two_chunks_cancels_its_query() -> None:
    service = FakeService(hold_at=1)
    async with serving(service) as client:
        body = {"model": "tiny", "messages": QUESTION, "stream": True}
        async with client.stream("POST", CHAT, json=body) as response:
            async for line in response.aiter_lines():
                if "reasoning_content" in line:
                    break
        assert await until(lambda: service.cancelled == 1 and service.running == 0) < 2.0


async def test_chunks_arrive_as_they_are_made() -> None:
    service = FakeService(hold_at=1)
    async with serving(service) as client:
        body = {"model": "tiny", "messages": QUESTION, "stream": True}
        async with client.stream("POST", CHAT, json=body) as response:
            lines = [line async for line in until_held(response, service)]
    assert "reasoning_content" in lines[1]
    assert lines[-1] == "data: [DONE]"


async def until_held(response: httpx.Response, service: FakeService) -> AsyncIterator[str]:
    """The lines of a stream; the held query goes on only after the first step's line was read."""
    async for line in response.aiter_lines():
        if line:
            yield line
        if "reasoning_content" in line:
            service.release.set()


async def test_a_client_that_sends_too_much_reads_its_413() -> None:
    service = FakeService()
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * 2_000_000}]}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for i in range(0, len(body), 65536):
            yield body[i : i + 65536]

    async with serving(service, max_body_bytes=1_000_000) as client:
        for content in (body, pieces()):
            response = await client.post(CHAT, content=content, headers={"content-type": "application/json"})
            assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        assert (await client.get("/healthz")).status_code == 200
    assert service.asked == []


async def test_a_connection_that_ends_inside_the_body_harms_nobody() -> None:
    service = FakeService()
    async with serving(service) as client:
        _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await client.get("/healthz")).status_code == 200
    assert service.asked == []
