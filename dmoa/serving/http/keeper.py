"""Keeps the port and its connections while who answers is away: a killed process loses no client's connection.

`dmoa serve` itself listens, and hands the listening socket to each new server: the ingress (`APP_VARIABLE`), or Serve's proxy.
That hands back a copy of every connection that it takes, and marks in shared memory what it is at: a query costs no call more.
Where it dies, who waits for an answer or asks now is told to try again (503) at the time when the next one is due (Retry-After);
who asks after that, or while one takes the place of another, waits for it. Connections without a query go to the next one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import mmap
import os
import selectors
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http import httptools_impl

from dmoa.errors import RequestError
from dmoa.serving.http.connection import MAX_FILES, MAX_IDLE, BoundedProtocol, allow_files, refusal
from dmoa.serving.http.errors import RETRY_AFTER_S, last_event

VARIABLE = "DMOA_PORT_KEEPER"
"""Path of the keeper's socket, for those who may listen."""
APP_VARIABLE = "DMOA_PORT_APP"
"""Name of the app whose ingress has the port; unset: Serve's proxy has it."""
RETURN_S = 4.0
"""In what time another proxy is expected. Until then clients are told to come again when it is over; after that they wait for it:
the official ones repeat a query twice, and would take a third refusal for good."""
PATIENCE_S = 120.0
"""How long a proxy may be away while clients wait for it; after that they are told to try again as well."""
IDLE, ASKED, ANSWERING, STREAMING, RESPONDING = range(5)
"""What a connection is at: nothing, a query without an answer yet, an answer under way; a stream of chat, one of responses."""
_MESSAGE = struct.Struct("!cI")
_OPENED, _CLOSED, _HELLO, _LEAVES = b"+", b"-", b"=", b"."
_BATCH = 200
"""Sockets in one message; the kernel takes 253."""
_BACKLOG = 2048
_LINGER_S = 2.0
_MAX_GUESTS = 512
_HELLO_S = 20.0
_LOG = logging.getLogger("dmoa.port")


_LOST = RequestError("the process that held this connection was lost; try again", code="server_lost", status=503)
_LAST_EVENTS = {STREAMING: last_event("/chat/completions", _LOST), RESPONDING: last_event("/responses", _LOST)}


@dataclass(slots=True)
class _Proxy:
    states: mmap.mmap
    copies: dict[int, socket.socket] = field(default_factory=dict)
    """Of its connections, by the proxy's own number of each."""
    listens: bool = True


class PortKeeper:
    """The side of `dmoa serve`: a thread that listens for proxies at `path`, and for clients where there is none."""

    def __init__(self, *, patience_s: float = PATIENCE_S, return_s: float = RETURN_S) -> None:
        """Raises OSError where no socket can be made."""
        allow_files()
        self._folder = tempfile.mkdtemp(prefix="dmoa-")  # its owner's alone
        self.path = str(Path(self._folder) / "port")
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.bind(self.path)
        self._door.listen()
        self._patience_s, self._return_s = patience_s, return_s
        self._selector = selectors.DefaultSelector()
        self._port: socket.socket | None = None
        self._proxies: dict[socket.socket, _Proxy] = {}
        self._idle: list[socket.socket] = []
        self._guests: dict[socket.socket, float] = {}
        """Connections that the keeper has answered, and until when it reads on."""
        self._away_since_s = float("inf")
        self._is_standing_in = self._is_over = False
        self._reader, self._writer = socket.socketpair()
        self._watch(self._door, self._welcome)
        self._watch(self._reader, lambda reader: reader.recv(1))
        self._thread = threading.Thread(target=self._run, name="dmoa-port", daemon=True)
        self._thread.start()

    def listen(self, host: str, port: int) -> None:
        """Listen for clients, as Serve's proxy would, before there is one. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # the proxy binds its own, which it does not use
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._port = listener

    def stand_in(self) -> None:
        """Wait for no further proxy: from now on the keeper answers as soon as the last one is gone."""
        self._patience_s = 0.0
        self._writer.send(b"!")

    def close(self) -> None:
        """Close the port and all connections."""
        self._is_over = True
        self._writer.send(b"!")
        self._thread.join()
        self._reader.close()  # not by the thread, which may have seen that it is over before it was woken
        self._writer.close()

    def _run(self) -> None:
        while not self._is_over:
            waits = bool(self._guests) or self._away_since_s < float("inf")
            for key, _ in self._selector.select(0.25 if waits else None):
                if self._selector.get_map().get(key.fd) is key:  # what came before it may have ended it
                    with suppress(OSError):  # of one connection
                        key.data(key.fileobj)
            now_s = time.monotonic()
            self._stand_in(is_due=not self._return_s <= now_s - self._away_since_s < self._patience_s)
            for guest in [guest for guest, until_s in self._guests.items() if until_s < now_s]:
                self._end(guest)
        copies = [copy for proxy in self._proxies.values() for copy in proxy.copies.values()]
        own = [self._port] if self._port else []
        for one in (*own, *copies, *self._idle, *self._guests, *self._proxies, self._door):
            one.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self, what: socket.socket, act: Callable[[socket.socket], object]) -> None:
        self._selector.register(what, selectors.EVENT_READ, act)

    def _welcome(self, door: socket.socket) -> None:
        """Hand a new proxy the port, a page for the states of its connections, and those that were idle at the last one's end."""
        link, _ = door.accept()
        if self._port is None:
            link.close()
            return
        link.settimeout(_HELLO_S)
        page = os.memfd_create("dmoa-port")
        try:
            os.ftruncate(page, MAX_FILES)
            socket.send_fds(link, [_MESSAGE.pack(_HELLO, len(self._idle))], [self._port.fileno(), page])
            states = mmap.mmap(page, MAX_FILES)
        finally:
            os.close(page)
        self._away_since_s = float("inf")
        self._stand_in(is_due=False)
        for begin in range(0, len(self._idle), _BATCH):
            socket.send_fds(link, [_HELLO], [one.fileno() for one in self._idle[begin : begin + _BATCH]])
        for one in self._idle:
            one.close()
        self._idle.clear()
        link.setblocking(False)
        self._proxies[link] = _Proxy(states)
        self._watch(link, self._hear)

    def _hear(self, link: socket.socket) -> None:
        """Take what a proxy says of its connections; nothing: it is dead."""
        proxy = self._proxies[link]
        while True:
            try:
                said, files, _, _ = socket.recv_fds(link, _MESSAGE.size, 1)
            except BlockingIOError:
                return
            except OSError:
                said, files = b"", []
            if not said:
                self._lose(link, proxy)
                return
            kind, number = _MESSAGE.unpack(said)
            if kind == _LEAVES:
                proxy.listens = False
                self._look_for_others(time.monotonic() - self._return_s)
            gone = proxy.copies.pop(number, None)
            if gone is not None:
                gone.close()
            if kind == _OPENED and files:
                proxy.copies[number] = socket.socket(fileno=files[0])

    def _lose(self, link: socket.socket, proxy: _Proxy) -> None:
        self._selector.unregister(link)
        link.close()
        del self._proxies[link]
        self._look_for_others(time.monotonic())
        for number, copy in proxy.copies.items():
            state = proxy.states[number]
            copy.setblocking(False)
            if state == ASKED:
                self._refuse(copy)
            elif state == IDLE and self._away_since_s < float("inf"):
                self._idle.append(copy)
            else:
                with suppress(OSError):
                    if event := _LAST_EVENTS.get(state):
                        copy.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
                    copy.shutdown(socket.SHUT_RDWR)
                copy.close()
        proxy.states.close()

    def _look_for_others(self, since_s: float) -> None:
        """Where nobody listens any more, count from `since_s`."""
        if self._away_since_s == float("inf") and not any(proxy.listens for proxy in self._proxies.values()):
            self._away_since_s = since_s

    def _stand_in(self, *, is_due: bool) -> None:
        """Answer those who ask, or leave them to the next proxy."""
        is_due = is_due and self._away_since_s < float("inf")
        if is_due == self._is_standing_in:
            return
        self._is_standing_in = is_due
        for one in [*self._idle, *([self._port] if self._port else [])]:
            if is_due:
                self._watch(one, self._accept if one is self._port else self._guest)
            else:
                self._selector.unregister(one)

    def _accept(self, port: socket.socket) -> None:
        """Take a client, who is not heard yet."""
        client, _ = port.accept()
        client.setblocking(False)
        self._idle.append(client)
        self._watch(client, self._guest)
        if len(self._idle) > MAX_IDLE:
            oldest = self._idle.pop(0)
            self._selector.unregister(oldest)
            oldest.close()

    def _guest(self, client: socket.socket) -> None:
        """Answer what a connection asks by now; where it was closed, close it."""
        self._selector.unregister(client)
        self._idle.remove(client)
        self._refuse(client)

    def _refuse(self, client: socket.socket) -> None:
        """Tell a client to try again, and read on for a while, so that it reads the answer before it is reset."""
        self._guests[client] = time.monotonic() + _LINGER_S
        if len(self._guests) > _MAX_GUESTS:
            self._end(next(iter(self._guests)))
        self._watch(client, self._drain)
        left_s = self._return_s - (time.monotonic() - self._away_since_s)
        try:
            after_s = math.ceil(left_s) if RETRY_AFTER_S < left_s < float("inf") else RETRY_AFTER_S
            client.send(refusal(503, "server_lost", str(_LOST), b"retry-after: %d" % after_s))
            client.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(client)

    def _drain(self, client: socket.socket) -> None:
        try:
            is_done = not client.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            is_done = True
        if is_done:
            self._end(client)

    def _end(self, client: socket.socket) -> None:
        self._guests.pop(client, None)
        self._selector.unregister(client)
        client.close()


class KeptPort:
    """The proxy's side. Nothing here waits for the keeper: what it cannot be told in time it does not keep."""

    def __init__(self, path: str) -> None:
        """Raises OSError where no keeper answers."""
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.settimeout(_HELLO_S)
        self._link.connect(path)
        said, files, _, _ = socket.recv_fds(self._link, _MESSAGE.size, 2)
        if len(files) != 2:
            raise ConnectionError("the keeper has no port")
        self.port = socket.socket(fileno=files[0])
        self.states = mmap.mmap(files[1], MAX_FILES)
        os.close(files[1])
        self.idle: list[socket.socket] = []
        while len(self.idle) < _MESSAGE.unpack(said)[1]:
            _, files, _, _ = socket.recv_fds(self._link, _MESSAGE.size, _BATCH)
            if not files:
                raise ConnectionError("the keeper is gone")
            self.idle += [socket.socket(fileno=one) for one in files]
        self._link.setblocking(False)

    def opened(self, number: int) -> bool:
        """Hand over a copy of a connection, by its file descriptor; tell whether the keeper will have it."""
        if number >= MAX_FILES:
            return False
        self.states[number] = IDLE
        try:
            socket.send_fds(self._link, [_MESSAGE.pack(_OPENED, number)], [number])
        except OSError:
            return False
        return True

    def leave(self) -> None:
        """Tell the keeper that who asks from now on is for the next one."""
        with suppress(OSError):
            self._link.send(_MESSAGE.pack(_LEAVES, MAX_FILES))

    def closed(self, number: int) -> None:
        """Have the copy closed. The connection ends here: with a copy left, closing would not tell the client."""
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as end:
            end.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._link.send(_MESSAGE.pack(_CLOSED, number))


class KeptProtocol(BoundedProtocol):
    """A bounded connection that the keeper has a copy of."""

    kept: KeptPort
    _number = -1

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Hand over a copy."""
        number: int = transport.get_extra_info("socket").fileno()
        if self.kept.opened(number):
            self._number = number
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Have the copy closed."""
        if self._number >= 0:
            self.kept.closed(self._number)
            self._number = -1
        super().connection_lost(exc)

    def mark(self, state: int) -> None:
        """Mark what the connection is at."""
        if self._number >= 0:
            self.kept.states[self._number] = state

    def on_message_begin(self) -> None:
        """Mark the connection as asked, unless an answer is under way."""
        super().on_message_begin()
        if self._number >= 0 and self.kept.states[self._number] == IDLE:
            self.mark(ASKED)

    def on_response_complete(self) -> None:
        """Mark the connection as idle, or asked where the next query was there already."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self.mark(IDLE if self.timeout_keep_alive_task is not None else ASKED)

    def _tell_refusal(self) -> None:
        if not self._unanswered:
            self.mark(ANSWERING)
        super()._tell_refusal()


class _KeptCycle(httptools_impl.RequestResponseCycle):
    """uvicorn's request and response, which tells when the first byte is about to be answered, and of what."""

    async def send(self, message: Any) -> None:
        """Send; of a stream in chunks, mark that it ends with an event where its server dies between two of them."""
        protocol = getattr(self.on_response, "__self__", None)
        if self.disconnected or message["type"] != "http.response.start" or not isinstance(protocol, KeptProtocol):
            await super().send(message)
            return
        protocol.mark(ANSWERING)
        await super().send(message)
        is_stream = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"])
        if is_stream and self.chunked_encoding:
            protocol.mark(RESPONDING if self.scope["path"].rstrip("/").endswith("/responses") else STREAMING)


class _KeptServer(uvicorn.Server):
    """uvicorn's server on the kept port, with connections that the last one left idle; replaced, it stops listening at once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        kept = KeptProtocol.kept
        for own in sockets or ():
            own.close()  # bound, and not listening
        await super().startup([kept.port])
        loop = asyncio.get_running_loop()
        for one in kept.idle:
            with suppress(OSError):
                await loop.connect_accepted_socket(
                    lambda: KeptProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state), one
                )
        kept.idle.clear()

    async def on_tick(self, counter: int) -> bool:
        """Look whether the ingress is to end; tell whether this server is."""
        ends = getattr(getattr(innermost(self.config.loaded_app), "__self__", None), "_shutting_down", False)
        self.should_exit = self.should_exit or ends
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is idle, and wait for the rest."""
        KeptProtocol.kept.leave()
        await super().shutdown(sockets)


class _SilentServer(uvicorn.Server):
    """A server that does not listen: Serve starts a proxy beside an ingress that listens itself."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for own in sockets or ():
            own.close()
        self.servers, self.started = [], True


def innermost(app: Any) -> Any:
    """Return what the middlewares around it call."""
    while (inner := getattr(app, "app", None) or getattr(app, "_app", None)) is not None:
        app = inner
    return app


def keep_silent() -> None:
    """Have the uvicorn server that this process starts next not listen."""
    uvicorn.Server = _SilentServer  # type: ignore[misc]


def keep_port(path: str | None = None) -> bool:
    """Have the uvicorn server that this process starts next use the kept port; False where there is no keeper (VARIABLE)."""
    path = path or os.environ.get(VARIABLE)
    if not path:
        return False
    try:
        KeptProtocol.kept = KeptPort(path)
    except OSError as error:
        _LOG.warning("the port is not kept: %s", error)
        return False
    httptools_impl.RequestResponseCycle = _KeptCycle  # type: ignore[misc] # the one that uvicorn makes
    uvicorn.Server = _KeptServer  # type: ignore[misc]
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{KeptProtocol.__name__}"
    return True
