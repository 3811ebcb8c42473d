"""Bounds of one connection, before there is a request: its headers' bytes, number and time, and how long a client may not read.

uvicorn's parser joins the pieces of a header line as they come, without a limit: one endless line stops the event loop. What it
is not strict about, and another server before this one may read otherwise, is refused here. Another protocol is never taken up.
"""

from __future__ import annotations

import asyncio
import resource
from typing import ClassVar

import httptools
import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from dmoa.serving.http.errors import encode_json, problem

MAX_HEAD_BYTES = 65_536
"""Of a request line and its headers together, or of the trailers and the framing of a body."""
MAX_HEADERS = 128
MAX_WAITING = 64
"""Requests of one connection that came before the answer to the first one."""
MAX_OPENING = 512
"""Connections whose headers are not complete; the oldest one makes room for a new one."""
MAX_IDLE = 2048
"""Connections that were answered and ask nothing; the oldest one makes room."""
MAX_FILES = 65_536
HEAD_S = 10.0
"""How long a connection may take for the headers of a request, from its first byte, or from its beginning."""
STALL_S = 30.0
"""In what time a client reads what there is to send, or `MIN_BYTES_PER_S`."""
MIN_BYTES_PER_S = 16_384
"""At least so fast bodies come and answers are read."""
_ONCE = (b"host", b"authorization", b"content-type")
"""Headers that have one value; of two, another server may believe the other one."""
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
    _unanswered = 0
    """Requests that were handed on."""
    _refusal = b""
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
        self._end_stall()
        self.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, within the bounds."""
        pieces = [memoryview(data)]
        self._extra_bytes += len(data)
        while pieces and not self._is_refused:
            piece = pieces.pop()
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                pieces = [piece[upgrade.args[0] :], memoryview(self._begun_again())]
            except httptools.HttpParserError as error:
                self._refuse(*(self._fault or (400, "bad_request", f"request: it is no HTTP/1.1 ({error}); send that")))
        if self._is_refused or self.transport.is_closing():
            return
        if self._extra_bytes > MAX_HEAD_BYTES:
            self._refuse(*_too_large(f"more than {MAX_HEAD_BYTES} bytes"))
        elif self._is_in_head and self._head_timer is None:
            self._wait_for_head()

    def _begun_again(self) -> bytes:
        """Return the head of a request that asks for another protocol as if it did not; its body would not be read else."""
        lines = [name + b": " + value + b"\r\n" for name, value in self.headers if name != b"upgrade"]
        version = self.parser.get_http_version().encode()
        head = (self.parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n", *lines, b"\r\n")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"".join(head)

    def on_message_begin(self) -> None:
        """Count a new request's bytes anew."""
        super().on_message_begin()
        self._is_in_head = True
        self.idle.pop(self, None)
        self._unset_keepalive_if_required()
        if not self.flow.write_paused:
            self._end_stall()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what comes as a trailer never becomes one."""
        if not self._is_in_head:
            return
        if len(self.headers) >= MAX_HEADERS:
            self._fault = _too_large(f"more than {MAX_HEADERS} of them")
            raise ValueError("too many headers")  # which ends the parsing
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request on."""
        self._is_in_head = False
        self._end_wait()
        self._fault = self._fault_of_head()
        if self._fault:
            raise ValueError("refused")
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self._unanswered += 1

    def _fault_of_head(self) -> tuple[int, str, str] | None:
        seen = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if seen > MAX_HEAD_BYTES:
            return _too_large(f"{seen} bytes")
        if self._unanswered >= MAX_WAITING:
            return 429, "too_many_requests", f"connection: {MAX_WAITING} requests are unanswered; read the answers first"
        names, version = [name for name, _ in self.headers], self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            return 505, "unsupported_version", f"request: HTTP/{version}; expected HTTP/1.1; send that"
        if self.parser.get_method() == b"CONNECT":
            return 405, "method_not_allowed", "CONNECT: this server is no proxy; send the requests themselves"
        twice = next((name.decode() for name in _ONCE if names.count(name) > 1), None)
        if twice or (b"host" not in names and version == "1.1"):
            return 400, "bad_request", f"{twice or 'host'}: {'sent twice' if twice else 'missing'}; send this header once"
        coding = next((value for name, value in self.headers if name == b"transfer-encoding"), b"chunked").lower()
        if coding != b"chunked" or (version == "1.0" and b"transfer-encoding" in names):
            return 501, "unsupported_transfer_encoding", "Transfer-Encoding: expected chunked, of HTTP/1.1; leave it out"
        return None

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body, which pays for its framing."""
        self._extra_bytes = max(0, self._extra_bytes - (1 + _FRAMING) * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin the count anew: what follows belongs to the next request."""
        if not self.parser.should_upgrade():
            self._extra_bytes = 0
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or be idle."""
        self._unanswered -= 1
        super().on_response_complete()
        self._await_reader()
        if self._is_refused:
            self._tell_refusal()
        elif self.timeout_keep_alive_task is not None:
            self.idle[self] = None
            if len(self.idle) > self.max_idle:
                oldest = next(iter(self.idle))
                del self.idle[oldest]
                oldest.transport.abort()  # also where its answer was never read

    def pause_writing(self) -> None:
        """Give the client a while to read."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """Go on: the client reads."""
        super().resume_writing()
        self._end_stall()
        if self.cycle is not None and self.cycle.response_complete:
            self._await_reader()

    def _await_reader(self) -> None:
        """Wait for the client to read what is still to be sent, without which the connection would not even close."""
        left = self.transport.get_write_buffer_size()
        if left and self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.stall_s, self._let_go, left - self.stall_s * MIN_BYTES_PER_S)

    def _let_go(self, most_bytes: float) -> None:
        self._stall_timer = None
        if self.transport.get_write_buffer_size() > max(0.0, most_bytes):
            self.transport.abort()
        else:
            self._await_reader()

    def _end_stall(self) -> None:
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
        """Answer with an error object, after the answers that are due, and read on for a while without keeping what comes."""
        self._end_wait()
        self._is_refused = True
        self._refusal = refusal(status, code, message)
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not cycle.response_complete:  # its body is what is wrong
            if cycle.response_started:
                self.transport.close()  # another answer is on its way
                return
            self._unanswered -= 1
            if self.pipeline and self.pipeline[0][0] is cycle:
                self.pipeline.popleft()
            cycle.disconnected = True  # it gets this answer and no other
            cycle.message_event.set()
        self._tell_refusal()

    def _tell_refusal(self) -> None:
        if self._unanswered or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self.transport.write(self._refusal)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(self.linger_s, self.transport.abort)


def refusal(status: int, code: str, message: str, *more: bytes) -> bytes:
    """Return a whole response with an error object, after which the connection ends; `more`: headers."""
    body = encode_json(problem(status, message, code))
    lines = (b"content-type: application/json", b"content-length: %d" % len(body), *more, b"connection: close", b"")
    return STATUS_LINE[status] + b"\r\n".join((*lines, body))


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
