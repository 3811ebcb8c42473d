"""The `transformers` engine: one language model on CPU or one GPU, batching the calls of many agents and queries.

The asyncio side of it: requests become token sequences here, go to the engine's one thread, which runs the decode
loop, and come back as text and a `Generation`. For throughput beyond one plain batch there is vLLM.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dmoa.core.reasoning import ReasoningSplitter
from dmoa.engine_options import TransformersOptions
from dmoa.engines.chat_template import encode_chat, opened_thought, room_for_reply
from dmoa.engines.models import HubModel
from dmoa.engines.thoughts import has_special_marks
from dmoa.engines.transformers.decode import DecodeLoop, Running, TextStream, draw_for
from dmoa.engines.transformers.load import give_back, load_model, use_threads
from dmoa.engines.transformers.lora import Adapters
from dmoa.errors import EngineError
from dmoa.types import Generation, GenerationRequest, TextDelta

IDLE_S = (1.0, 30.0)
"""Idle seconds after which an engine gives back the memory of its rows, and further ones after which that of recent prompts:
a conversation goes on with what it said before."""
_Item = TextDelta | Generation | EngineError


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request on its way through the engine's thread, and what its event loop is told."""

    sequence: Running
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[_Item] = field(default_factory=asyncio.Queue)


class TransformersEngine:
    """Runs one model for many agents at once; implements `protocols.Engine`."""

    def __init__(
        self,
        model: Path | HubModel,
        options: TransformersOptions | None = None,
        *,
        max_num_seqs: int = 16,
        adapters: Mapping[str, Path] | None = None,
        model_label: str = "",
        gpu: int | None = None,
        idle_s: tuple[float, float] = IDLE_S,
    ) -> None:
        """Load the model and its adapters, and start the engine's thread. Blocks for seconds; raises ConfigError.

        `model` is a folder or a repository on the hub; `adapters` maps the names that requests use to PEFT LoRA folders;
        `model_label` names the model in errors; `gpu` is the position of its GPU, where it runs on one, None for torch's own;
        `idle_s`: see `IDLE_S`.
        """
        self._options = options or TransformersOptions()
        self._name = model_label or str(model)
        folders = {name: Path(folder) for name, folder in (adapters or {}).items()}
        loaded = load_model(model, self._options, has_adapters=bool(folders), gpu=gpu)
        self.label = loaded.label
        self._max_model_len = loaded.max_model_len
        self._device = loaded.device
        self._tokenizer = loaded.tokenizer
        self._keeps_special = has_special_marks(loaded.tokenizer.backend_tokenizer)
        self._adapters = Adapters(loaded.model, folders)
        self._loop = DecodeLoop(loaded, self._adapters, max_rows=max_num_seqs, has_prefix_cache=self._options.prefix_cache)
        self.times = self._loop.times
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: set[_Ticket] = set()
        self._outbox: dict[_Ticket, list[_Item]] = {}
        self._is_closed = False
        self._idle_s = idle_s
        self._thread = threading.Thread(target=self._run, name="transformers-engine", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Places of the batch in use at this moment."""
        return self._loop.num_running

    @property
    def held_bytes(self) -> int:
        """Memory of keys and values at this moment, of running and of recent requests."""
        return self._loop.held_bytes

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate one continuation. Cancelling frees its place within two token steps. Raises EngineError."""
        async for item in self._items(request, has_text=False):
            if isinstance(item, Generation):
                return item
        raise AssertionError("a request ends with a generation")

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta | Generation]:
        """Generate one continuation, yielding pieces of text and last the whole Generation. Raises EngineError."""
        async for item in self._items(request, has_text=True):
            yield item

    async def close(self) -> None:
        """Stop the engine's thread and free its memory; requests in flight fail with EngineError."""
        self._is_closed = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _items(self, request: GenerationRequest, *, has_text: bool) -> AsyncIterator[TextDelta | Generation]:
        ticket = self._ticket(request, has_text=has_text)
        self._inbox.put(lambda: self._admit(ticket))
        is_ended = False
        try:
            while not is_ended:
                item = await ticket.items.get()
                is_ended = not isinstance(item, TextDelta)
                if isinstance(item, EngineError):
                    raise item
                yield item
        finally:
            if not is_ended:
                self._inbox.put(lambda: self._drop(ticket))

    def _ticket(self, request: GenerationRequest, *, has_text: bool) -> _Ticket:
        accepted_s = time.perf_counter()
        if self._is_closed:
            raise EngineError(f"{self._name}: the engine is closed; start it again")
        self._adapters.check(request.adapter)
        tokens = encode_chat(self._tokenizer, request.messages, model=self._name, settings=request.sampling.template)
        if not tokens:  # its forward would fail, and take all that runs beside it along
            raise EngineError(
                f"{self._name}: the prompt has no tokens; ask something, or use a chat template with marks of its own"
            )
        is_opened, opening = opened_thought(self._tokenizer, tokens, request.messages)
        room = room_for_reply(len(tokens), self._max_model_len, model=self._name)
        sampling = request.sampling
        sequence = Running(
            tokens=np.array(tokens, dtype=np.int64),
            adapter=request.adapter,
            max_tokens=max(1, min(sampling.max_tokens, room)),
            draw=draw_for(sampling, request.call_id),
            text=TextStream(self._tokenizer.backend_tokenizer, sampling.stop, keeps_special=self._keeps_special),
            deadline_unix_s=request.deadline_unix_s,
            accepted_s=accepted_s,
            on_text=(lambda delta: self._post(ticket, delta)) if has_text else (lambda delta: None),
            splitter=ReasoningSplitter(is_opened=is_opened),
            opening=opening,
            on_done=lambda result: self._finish(ticket, result),
            outputs=[],
        )
        ticket = _Ticket(sequence, asyncio.get_running_loop())
        return ticket

    # The rest runs in the engine's thread.

    def _run(self) -> None:
        use_threads(self._options)
        is_open = True
        with torch.inference_mode():
            while is_open:
                try:
                    is_open = self._take_inbox()
                    if is_open:
                        self._loop.step()
                except Exception as error:  # kept in what every request in flight raises; the engine goes on
                    self._fail_all(error)
                self._flush()
        while not self._inbox.empty():  # what other threads asked for at the last moment
            message = self._inbox.get()
            if message is not None:
                message()
        self._fail_all(EngineError("the engine was closed"))
        self._flush()
        self._loop.close()

    def _take_inbox(self) -> bool:
        """Handle what has arrived, waiting for it where nothing runs; return False once the engine is to stop."""
        while True:
            try:
                message = self._wait() if self._loop.is_idle else self._inbox.get_nowait()
            except queue.Empty:
                return True
            if message is None:
                return False
            message()

    def _wait(self) -> Callable[[], None] | None:
        """Return what arrives next, however long it takes; memory that nobody needs meanwhile is given back."""
        for wait_s, release in zip(self._idle_s, (self._loop.release_rows, self._loop.release_prefixes), strict=True):
            if not self._loop.held_bytes:
                break
            try:
                return self._inbox.get(timeout=wait_s)
            except queue.Empty:
                release()
                give_back(self._device)
        return self._inbox.get()

    def _admit(self, ticket: _Ticket) -> None:
        self._tickets.add(ticket)
        self._loop.submit(ticket.sequence)

    def _drop(self, ticket: _Ticket) -> None:
        self._tickets.discard(ticket)
        self._loop.cancel(ticket.sequence)

    def _finish(self, ticket: _Ticket, result: Generation | EngineError) -> None:
        self._tickets.discard(ticket)
        self._post(ticket, EngineError(f"{self._name}: {result}") if isinstance(result, EngineError) else result)

    def _fail_all(self, error: Exception) -> None:
        self._loop.clear()
        for ticket in self._tickets:
            self._post(ticket, EngineError(f"{self._name}: {type(error).__name__}: {error}"))
        self._tickets.clear()

    def _post(self, ticket: _Ticket, item: _Item) -> None:
        self._outbox.setdefault(ticket, []).append(item)

    def _flush(self) -> None:
        """Hand over what a step produced, one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, list[_Item]]]] = {}
        for ticket, items in self._outbox.items():
            by_loop.setdefault(ticket.loop, []).append((ticket, items))
        self._outbox = {}
        for loop, parcels in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, parcels)
            except RuntimeError:  # its event loop is closed: nobody waits any more
                for ticket, _ in parcels:
                    self._drop(ticket)


def _deliver(parcels: list[tuple[_Ticket, list[_Item]]]) -> None:
    for ticket, items in parcels:
        for item in items:
            ticket.items.put_nowait(item)
