"""The front in Serve's proxy: bodies that do not come, queries too many, and what stands for Serve's own errors."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
import uvicorn.config
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmoa.serving.http.connection import BoundedProtocol
from dmoa.serving.http.errors import SurpriseGuard
from dmoa.serving.http.front import (
    BODY,
    GONE_S,
    MAX_CARRIED,
    MAX_HALF_SENT,
    SETTING,
    Bounds,
    Front,
    FrontNotice,
    middlewares,
    places_behind,
)
from dmoa.serving.launch import PROXY_FLAGS
from tests.unit.serving.fake_service import until

CHAT = "/v1/chat/completions"
SERVES_404 = [
    {"type": "http.response.start", "status": 404, "headers": [[b"content-type", b"text/plain; charset=utf-8"]]},
    {"type": "http.response.body", "body": b"Path '/x' not found. Ping http://.../-/routes for available routes."},
]
"""As Serve's proxy says it."""


class Asked:
    """One request to an ASGI app, sent and read by hand."""

    def __init__(self, app: ASGIApp, path: str = CHAT, *, method: str = "POST", headers: dict[str, str] | None = None) -> None:
        sent = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.scope: Scope = {"type": "http", "method": method, "path": path, "headers": sent, "root_path": ""}
        self._in: asyncio.Queue[Message] = asyncio.Queue()
        self.messages: list[Message] = []
        self.task = asyncio.create_task(app(self.scope, self._in.get, self._take))  # type: ignore[arg-type]

    async def _take(self, message: Message) -> None:
        self.messages.append(message)

    def send(self, body: bytes = b"{}", *, more: bool = False) -> Asked:
        self._in.put_nowait({"type": "http.request", "body": body, "more_body": more})
        return self

    def hang_up(self) -> Asked:
        self._in.put_nowait({"type": "http.disconnect"})
        return self

    async def done(self) -> Asked:
        await asyncio.wait_for(self.task, 5.0)
        return self

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {bytes(name).decode(): bytes(value).decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> tuple[int, str, str]:
        found = json.loads(self.body)["error"]
        return self.status, found["code"], found["type"]


class App:
    """A pool's ingress behind Serve: answers what it is told to, and remembers the bodies that it got."""

    def __init__(self, *answers: Iterable[Message], **bounds: Any) -> None:
        self.bodies: list[bytes] = []
        self.carried: list[bytes | None] = []
        self.running = 0
        self.release = asyncio.Event()
        self.release.set()
        self._answers = list(answers)
        self._own = FrontNotice(self._ok, Bounds(**bounds))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._answers or scope["path"] == "/healthz":
            await self._own(scope, receive, send)
            return
        for message in self._answers.pop(0):
            await send(message)

    async def _ok(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        self.carried.append(scope.get(BODY))
        self.running += 1
        await self.release.wait()
        self.running -= 1
        status = 401 if dict(scope["headers"]).get(b"authorization") == b"Bearer no" else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def known(app: App, **times: float) -> Front:
    """A front that an app has answered behind."""
    front = Front(app, **({"linger_s": 0.05} | times))
    answer = await Asked(front, "/healthz", method="GET").send(b"").done()
    assert (answer.status, answer.body) == (200, b"ok")
    app.bodies.clear()
    return front


async def test_what_the_ingress_tells_the_front_reaches_no_client() -> None:
    app = App()
    front = await known(app)
    assert "x-dmoa-bounds" not in (await Asked(front).send().done()).headers
    assert "x-dmoa-bounds" not in (await Asked(app).send().done()).headers  # without a front as well
    asked = await Asked(app, headers={"x-dmoa-front": "1"}).send().done()
    told = json.loads(asked.headers["x-dmoa-bounds"])
    assert told == ["", {"body": 16_777_216, "queries": 256, "has_keys": True}]


async def test_a_body_is_read_before_it_is_handed_on() -> None:
    app = App()
    front = await known(app)
    asked = Asked(front).send(b"one ", more=True)
    await asyncio.sleep(0)
    assert app.bodies == []
    assert (await asked.send(b"two").done()).status == 200
    assert app.bodies == [b"one two"]


async def test_a_small_body_goes_with_the_scope_and_a_large_one_does_not() -> None:
    app = App()
    front = await known(app)
    small, large = b"x" * MAX_CARRIED, b"x" * (MAX_CARRIED + 1)
    for body in (small, large):
        assert (await Asked(front).send(body).done()).status == 200
    assert app.bodies == [small, large]
    assert app.carried[-2:] == [small, None]


async def test_a_body_that_does_not_come_is_408() -> None:
    app = App()
    front = await known(app, body_s=0.05)
    asked = await Asked(front).send(b"{", more=True).done()
    assert asked.error == (408, "request_timeout", "invalid_request_error")
    assert asked.headers["connection"] == "close"
    assert app.bodies == []


async def test_a_body_that_came_while_the_front_was_busy_is_read() -> None:
    front = await known(App(), body_s=0.05)
    asked = Asked(front).send(b"{", more=True)
    await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251 -- what keeps the loop busy
    asyncio.get_running_loop().call_soon(asked.send, b"}")
    assert (await asked.done()).status == 200


async def test_a_body_in_very_many_pieces_is_whole() -> None:
    app = App(body=1000)
    front = await known(app)
    asked = Asked(front)
    for _ in range(999):
        asked.send(b"x", more=True)
    assert (await asked.send(b"y").done()).status == 200
    assert app.bodies == [b"x" * 999 + b"y"]


async def test_a_body_in_drops_ends_in_time() -> None:
    """A byte now and then is not a body that comes."""
    front = await known(App(), body_s=0.2)
    asked = Asked(front)

    async def dripping() -> None:
        while not asked.task.done():
            asked.send(b"x", more=True)
            await asyncio.sleep(0.01)

    await dripping()
    assert asked.error[0] == 408


async def test_who_hangs_up_inside_the_body_is_forgotten() -> None:
    app = App()
    front = await known(app)
    asked = await Asked(front).send(b"{", more=True).hang_up().done()
    assert (asked.messages, app.bodies) == ([], [])


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_too_large_is_413_before_it_was_sent(declared: bool) -> None:
    app = App(body=1000)
    front = await known(app)
    asked = Asked(front, headers={"content-length": "1001"} if declared else {})
    if not declared:
        asked.send(b"x" * 600, more=True).send(b"x" * 401, more=True)
    await until(lambda: len(asked.messages) == 2)  # the answer is there, while the client is still sending
    assert asked.error[:2] == (413, "request_too_large")
    assert "at most 1000 (server.max_body_bytes)" in json.loads(asked.body)["error"]["message"]
    await asked.done()
    assert asked.messages[-1]["more_body"] is False
    assert app.bodies == []


async def test_the_oldest_half_sent_body_of_a_key_makes_room() -> None:
    front = await known(App())
    theirs, mine = {"authorization": "Bearer them"}, {"authorization": "Bearer me"}
    for headers in (theirs, mine):  # keys that an app took
        assert (await Asked(front, headers=headers).send().done()).status == 200
    own = Asked(front, headers=mine).send(b"{", more=True)
    half = [Asked(front, headers=theirs).send(b"{", more=True) for _ in range(MAX_HALF_SENT)]
    await asyncio.sleep(0)
    more = Asked(front, headers=theirs).send(b"{", more=True)
    assert (await half[0].done()).error[0] == 408
    assert (await more.send(b"}").done()).status == 200
    assert not half[1].task.done()
    assert (await own.send(b"}").done()).status == 200
    for asked in half[1:]:
        await asked.hang_up().done()


async def test_half_sent_bodies_that_are_late_together_are_all_408() -> None:
    front = await known(App(), body_s=0.05)
    late = [Asked(front).send(b"{", more=True) for _ in range(MAX_HALF_SENT)]
    await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251 -- all are late at once
    asyncio.get_running_loop().call_soon(lambda: late.append(Asked(front).send(b"{", more=True)))  # before their tasks know
    await asyncio.sleep(0.01)
    assert {(await asked.done()).error[0] for asked in late} == {408}


async def test_made_up_keys_count_together() -> None:
    front = await known(App())
    first = Asked(front, headers={"authorization": "Bearer no"}).send(b"{", more=True)
    await asyncio.sleep(0)
    others = [Asked(front, headers={"authorization": f"Bearer {i}"}).send(b"{", more=True) for i in range(MAX_HALF_SENT)]
    assert (await first.done()).error[0] == 408
    for asked in others:
        await asked.hang_up().done()


async def test_queries_too_many_are_refused_and_probes_are_not() -> None:
    app = App(queries=2)
    front = await known(app)
    app.release.clear()
    asked = [Asked(front).send() for _ in range(2)]
    await until(lambda: app.running == 2)
    refused = await Asked(front).send().done()
    assert refused.error == (429, "too_many_requests", "rate_limit_error")
    assert refused.headers["retry-after"] == "1"
    probe = Asked(front, "/healthz", method="GET").send(b"")
    others = Asked(front, "/v1/models", method="GET").send(b"")
    await until(lambda: app.running == 4)
    app.release.set()
    for answered in (*asked, probe, others):
        assert (await answered.done()).status == 200
    assert (await Asked(front).send().done()).status == 200


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream"), (b"x-own", b"1")]}
PLAIN = {b"content-type": b"text/plain; charset=utf-8"}


def said(status: int, text: bytes, **headers: bytes) -> list[Message]:
    """What Serve's proxy says itself."""
    named = [*PLAIN.items(), *((name.replace("_", "-").encode(), value) for name, value in headers.items())]
    return [{"type": "http.response.start", "status": status, "headers": named}, {"type": "http.response.body", "body": text}]


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (SERVES_404, 503, "server_lost"),
        (said(500, b"Internal Server Error"), 503, "server_lost"),
        (said(503, b"Deployment is unavailable"), 503, "server_lost"),
        (said(408, b"Request timed out"), 503, "server_lost"),
        (said(429, b"Too many", retry_after=b"3"), 429, "too_many_requests"),
        ([], 503, "server_lost"),
        (said(500, b"")[:1], 503, "server_lost"),
    ],
    ids=["no app", "500", "503", "408", "429", "nothing", "no body"],
)
async def test_what_serve_says_itself_is_an_error_object(answer: list[Message], status: int, code: str) -> None:
    front = await known(App(answer))
    asked = await Asked(front).send().done()
    assert asked.error[:2] == (status, code)
    assert asked.headers["retry-after"] == "1"
    assert asked.headers["content-type"] == "application/json"
    assert (await Asked(front).send().done()).status == 200


async def test_an_app_that_stays_away_is_unknown() -> None:
    front = await known(App(SERVES_404, SERVES_404))
    assert (await Asked(front).send().done()).error[0] == 503
    front._apps[""].gone_since_s = asyncio.get_running_loop().time() - GONE_S - 1
    assert (await Asked(front).send().done()).error[:2] == (404, "unknown_url")


async def test_before_any_app_is_there_it_starts() -> None:
    asked = await Asked(Front(App(SERVES_404))).send().done()
    assert asked.error[0] == 503


async def test_errors_of_other_apps_stay_as_they_are() -> None:
    theirs = said(500, b"oh", content_length=b"2")
    asked = await Asked(await known(App(theirs))).send().done()
    assert (asked.status, asked.body) == (500, b"oh")


@pytest.mark.parametrize(
    ("path", "last"),
    [
        (CHAT, ["data: {error}", "data: [DONE]"]),
        ("/v1/responses", ["event: error\ndata: {error}"]),
    ],
)
async def test_a_stream_that_breaks_ends_with_an_error_event(path: str, last: list[str]) -> None:
    begun = [START, {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}]
    asked = await Asked(await known(App(begun)), path).send().done()
    events = asked.body.decode().split("\n\n")[:-1]
    assert events[0] == "data: {}"
    assert asked.messages[-1]["more_body"] is False
    told = json.loads(events[1].partition("data: ")[2])
    error = told.get("error", told)
    assert error["code"] == "server_lost"
    assert len(events) == 1 + len(last)
    assert (events[1].startswith("event: error\n"), events[-1] == "data: [DONE]") == (path != CHAT, path == CHAT)


async def test_an_app_below_a_prefix_has_its_own_bounds() -> None:
    app = App(body=10)
    front = Front(app, linger_s=0.05)
    first = Asked(front, "/b/healthz", method="GET")
    first.scope["root_path"] = "/b"
    await first.send(b"").done()
    assert (await Asked(front, "/b" + CHAT).send(b"x" * 11).done()).error[0] == 413
    beside = Asked(front, "/bb" + CHAT)
    beside.scope["root_path"] = "/bb"
    assert (await beside.send(b"x" * 11).done()).status == 200
    elsewhere = App(SERVES_404)
    front.app = elsewhere
    assert (await Asked(front, "/c" + CHAT).send().done()).error[:2] == (404, "unknown_url")


async def test_a_path_of_slashes_takes_no_time() -> None:
    front = await known(App())
    path = "/" * 65_000
    started_s = time.thread_time()
    assert (await Asked(front, path, method="GET").send(b"").done()).status == 200
    assert time.thread_time() - started_s < 0.2  # a second and a half where every slash was cut off by itself


PAGE = {"origin": "https://app.example"}


async def test_a_page_reads_what_the_front_refuses() -> None:
    """Whatever it is: a body too large, one that does not come, a query too many, one whose process was lost."""
    app = App(body=10, queries=1, origins=("https://app.example",))
    front = await known(app, body_s=0.05)
    asked = [
        await Asked(front, headers=PAGE).send(b"x" * 11).done(),
        await Asked(front, headers=PAGE).send(b"{", more=True).done(),
    ]
    app.release.clear()
    running = Asked(front).send()
    await until(lambda: app.running == 1)
    asked.append(await Asked(front, headers=PAGE).send().done())
    app.release.set()
    await running.done()
    front.app = App(SERVES_404)
    asked.append(await Asked(front, "/x", method="GET", headers=PAGE).send(b"").done())
    assert [one.error[0] for one in asked] == [413, 408, 429, 503]
    for one in asked:
        assert (one.headers["access-control-allow-origin"], one.headers["vary"]) == ("https://app.example", "Origin")
        assert "retry-after" in one.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ((), "https://app.example", None),
        (("https://app.example",), "https://evil.example", None),
        (("https://app.example",), "", None),
        (("*",), "https://evil.example", "*"),
        (("*",), "", None),
    ],
)
async def test_only_pages_of_configured_origins_read_it(origins: tuple[str, ...], origin: str, allowed: str | None) -> None:
    front = await known(App(body=10, origins=origins))
    asked = await Asked(front, headers={"origin": origin} if origin else {}).send(b"x" * 11).done()
    assert (asked.error[0], asked.headers.get("access-control-allow-origin")) == (413, allowed)
    assert "vary" not in asked.headers


async def test_bounds_of_a_newer_app_are_taken_as_far_as_they_are_known() -> None:
    front = await known(App(body=10))
    told = b'["", {"body": 20, "queries": 3, "has_keys": true, "colour": "blue"}]'
    front.learn(told, Asked(App()).scope, 200)
    assert (await Asked(front).send(b"x" * 20).done()).status == 200


async def test_a_new_pool_brings_its_own_bounds() -> None:
    """And the old one, which goes on for a while beside it, has not the last word for ever."""
    front = await known(App(body=10))
    for most in (100, 10, 100):
        front.app = App(body=most)
        await Asked(front, "/healthz", method="GET").send(b"").done()
        assert (await Asked(front).send(b"x" * 11).done()).status == (200 if most == 100 else 413)


async def test_serves_own_paths_pass() -> None:
    health = said(200, b"success")
    asked = await Asked(await known(App(health)), "/-/healthz", method="GET").send(b"").done()
    assert (asked.status, asked.body) == (200, b"success")


@pytest.mark.parametrize("path", ["/-/v1", "/-/healthz/x", "/-/"])
async def test_no_other_path_gets_past_the_front(path: str) -> None:
    front = await known(App(body=10))
    assert (await Asked(front, path).send(b"x" * 11).done()).error[0] == 413


async def test_a_client_does_not_order_serve_about() -> None:
    """Serve fails by a request id that is no text, and would drop a query after the seconds that a client gives it."""
    seen: list[dict[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"]))

    ordered = {"x-request-timeout-seconds": "0.001", "x-request-disconnect-disabled": "?1", "x-dmoa-front": "0"}
    for headers in (
        ordered
        | {"serve-multiplexed-model-id": "x", "serve_multiplexed_model_id": "x", "x-request-id": "\u00ff", "x-own": "\u00ff"},
        {"x-request-id": "a" * 10_000, "x-session-id": "\u00ff"},
        {"x-request-id": "mine", "x-session-id": "s"},
    ):
        await Asked(Front(app), headers=headers).send().done()
    assert [set(found) for found in seen] == [
        {b"x-own", b"x-dmoa-front"},
        {b"x-dmoa-front"},
        {b"x-request-id", b"x-session-id", b"x-dmoa-front"},
    ]
    assert {found[b"x-dmoa-front"] for found in seen} == {b"1"}


def test_serve_gets_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "to be restored")
    made, outermost = middlewares()
    assert (made.cls, outermost.cls) == (Front, SurpriseGuard)
    assert isinstance(made.cls(App(), *made.args, **made.kwargs), Front)
    bounded = uvicorn.Config(App())
    bounded.load()
    assert bounded.http_protocol_class is BoundedProtocol


def test_an_app_behind_a_front_holds_queries_that_end_a_moment_after_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty streams cut at once, and new ones in their places: the app hears of it later than the front, and refused some."""
    monkeypatch.delenv(SETTING, raising=False)
    assert places_behind(32) == 32  # nobody else counts
    monkeypatch.setenv(SETTING, PROXY_FLAGS[SETTING])
    assert places_behind(32) == 64
