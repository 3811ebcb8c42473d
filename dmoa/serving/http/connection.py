"""Bounds of one connection, before there is a request: its headers' bytes, number and time, and how long a client may not read.

uvicorn's parser joins the pieces of a header line as they come, without a limit: one endless line stops the event loop.
"""

from __future__ import annotations

import asyncio
import resource
from typing import ClassVar

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from dmoa.serving.http.errors import encode_json, problem

MAX_HEAD_BYTES = 65_536
"""Of a request line and its headers together, or of the trailers and the framing of a body."""
MAX_HEADERS = 128
MAX_OPENING = 512
"""Connections whose headers are not complete; the oldest one makes room for a new one."""
MAX_IDLE = 2048
"""Connections that were answered and ask nothing; the oldest one makes room."""
MAX_FILES = 65_536
HEAD_S = 10.0
"""How long a connection may take for the headers of a request, from its first byte, or from its beginning."""
STALL_S = 30.0
"""How long a client may read nothing while the server has something to send."""
LINGER_S = 2.0
"""How long a refused client may go on sending, so that it reads the refusal before the connection is reset."""
_FRAMING = 17
"""Bytes that one byte of a body pays for: a chunk of one byte, with its length in hexadecimal digits and its line ends."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds: 431 above those of the headers, 408 for headers that do not come, never a plain text."""

    head_s: ClassVar[float] = HEAD_S
    stall_s: ClassVar[float] = STALL_S
    linger_s: ClassVar[float] = LINGER_S
    max_opening: ClassVar[int] = MAX_OPENING
    opening: ClassVar[dict[BoundedProtocol, None]] = {}
    """Connections whose headers are not complete, the oldest first."""
    max_idle: ClassVar[int] = MAX_IDLE
    idle: ClassVar[dict[BoundedProtocol, None]] = {}
    """Connections that ask nothing, the oldest first."""

    _extra_bytes = 0
    """What came since the last byte of a body, or since the request began."""
    _is_in_head = True
    _is_refused = False
    _fault: tuple[int, str, str] | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Begin to wait for the headers."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection's timers."""
        self._end_wait()
        self.idle.pop(self, None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, within the bounds."""
        if self._is_refused:
            return
        self.idle.pop(self, None)
        self._extra_bytes += len(data)
        super().data_received(data)
        if self._is_refused or self.transport.is_closing():
            return
        if self._extra_bytes > MAX_HEAD_BYTES:
            self._refuse(*_too_large(f"more than {MAX_HEAD_BYTES} bytes"))
        elif self._is_in_head and self._head_timer is None:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """Count a new request's bytes anew."""
        super().on_message_begin()
        self._is_in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        if len(self.headers) >= MAX_HEADERS:
            self._fault = _too_large(f"more than {MAX_HEADERS} of them")
            raise ValueError("too many headers")  # which ends the parsing
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request on."""
        self._is_in_head = False
        self._end_wait()
        seen = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if seen > MAX_HEAD_BYTES:
            self._fault = _too_large(f"{seen} bytes")
            raise ValueError("headers too large")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body, which pays for its framing."""
        self._extra_bytes = max(0, self._extra_bytes - (1 + _FRAMING) * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin the count anew: what follows belongs to the next request."""
        self._extra_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or be idle."""
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self.idle[self] = None
            if len(self.idle) > self.max_idle:
                oldest = next(iter(self.idle))
                del self.idle[oldest]
                oldest.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or the fault that ended the parsing."""
        self._refuse(*(self._fault or (400, "bad_request", f"request: {msg} Send HTTP/1.1.")))

    def pause_writing(self) -> None:
        """Give the client a while to read."""
        super().pause_writing()
        self._stall_timer = self._stall_timer or self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client reads."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_s, self._head_is_late)
        self.opening[self] = None
        if len(self.opening) > self.max_opening:
            next(iter(self.opening))._head_is_late()

    def _end_wait(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
            self.opening.pop(self, None)

    def _head_is_late(self) -> None:
        if self.scope is not None:
            self._refuse(408, "request_timeout", f"headers: not complete within {self.head_s:g} s; send them at once")
        else:
            self._end_wait()
            self.transport.close()  # nothing was asked

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer with an error object, and read on for a while without keeping what comes."""
        self._end_wait()
        self._is_refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.close()  # another answer is on its way
                return
            self.cycle.disconnected = True  # its body is what is wrong: it gets this answer and no other
            self.cycle.message_event.set()
        body = encode_json(problem(status, message, code))
        lines = (b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close", b"")
        self.transport.write(STATUS_LINE[status] + b"\r\n".join((*lines, body)))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(self.linger_s, self.transport.abort)


def _too_large(seen: str) -> tuple[int, str, str]:
    message = f"headers: {seen}; expected at most {MAX_HEAD_BYTES} bytes in {MAX_HEADERS} of them; send fewer or shorter ones"
    return 431, "headers_too_large", message


def allow_files() -> None:
    """Raise this process's limit of open files to `MAX_FILES`, where it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MAX_FILES)), hard))


def bound_connections() -> None:
    """Have the uvicorn servers that this process starts from now on use `BoundedProtocol`, with files enough for all of them."""
    allow_files()
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
