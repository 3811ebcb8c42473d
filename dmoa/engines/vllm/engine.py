"""The `vllm` engine: calls of many agents and queries through one vLLM, with the entropy of every token.

Stands between a vLLM client (`serving/vllm_replica` starts it on Ray Serve) and the agents. Entropies are exact, from inside
vLLM (`engines/vllm/entropy`), or lie between bounds, from the log-probabilities that vLLM lists. No Ray here.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from dmoa.answer_form import NEVER_NATS, FinalCall
from dmoa.core.entropy import NOT_FINITE
from dmoa.core.truncated_entropy import listed_entropy
from dmoa.engines.chat_template import encode_chat, opened_thought, room_for_reply, seed_of
from dmoa.engines.thoughts import cuts_of
from dmoa.engines.vllm.entropy import KEY
from dmoa.engines.vllm.entropy_store import RequestSums, Wanted
from dmoa.engines.vllm.thoughts import ReasoningFormat, ReplyText
from dmoa.engines.vllm.tools import ToolFormat, ToolReader
from dmoa.errors import EngineError
from dmoa.types import EntropySum, FinishReason, Generation, GenerationRequest, Sampling, TextDelta, TokenUsage


class Listed(NamedTuple):
    """How entropies are estimated where vLLM cannot compute them itself."""

    top_logprobs: int
    """Log-probabilities that are asked for per token."""
    vocab_size: int
    """Tokens that what is not listed may be spread over."""


class EntropyTaker:
    """Fetches the sums of finished calls, all that are due in one round trip to the workers."""

    def __init__(self, client: Any) -> None:
        """`client`: a vLLM client, for `collective_rpc`."""
        self._client = client
        self._due: dict[str, tuple[Wanted, asyncio.Future[RequestSums | None]]] = {}
        self._running: asyncio.Task[None] | None = None

    async def take(self, key: str, tokens: int, cuts: Sequence[int] = ()) -> RequestSums | None:
        """Return a call's sums over its first tokens, None: not known. `cuts`: tokens at which thoughts begin and end in turn."""
        return await self._ask(key, tokens, *cuts)

    def forget(self, key: str) -> None:
        """Have whatever is kept of a call dropped; returns at once."""
        # Nobody awaits the answer: an error must not be told as one that was never looked at.
        self._ask(key, 0).add_done_callback(lambda future: future.cancelled() or future.exception())

    async def drained(self) -> None:
        """Wait until nothing is due."""
        while self._running is not None:
            await asyncio.wait([self._running])

    def _ask(self, key: str, tokens: int, *cuts: int) -> asyncio.Future[RequestSums | None]:
        future: asyncio.Future[RequestSums | None] = asyncio.get_running_loop().create_future()
        self._due[key] = ((key, tokens, *cuts), future)
        if self._running is None:
            self._running = asyncio.create_task(self._fetch())
        return future

    async def _fetch(self) -> None:
        try:
            while self._due:
                due, self._due = self._due, {}
                try:
                    wanted = [item for item, _ in due.values()]
                    answers = await self._client.collective_rpc("take_entropies", args=(wanted,))
                    # All of a tensor-parallel group know the same, other pipeline stages nothing.
                    found = {key: RequestSums(*values) for answer in answers for key, values in answer.items()}
                except Exception as error:  # every call that waits for its sums is told
                    for _, future in due.values():
                        if not future.done():
                            future.set_exception(EngineError(f"vllm: entropies: {type(error).__name__}: {error}"))
                    continue
                for key, (_, future) in due.items():
                    if not future.done():
                        future.set_result(found.get(key))
        finally:
            self._running = None


class VllmEngine:
    """Runs one model for many agents at once; implements `protocols.Engine`."""

    def __init__(
        self,
        client: Any,
        tokenizer: Any,
        *,
        max_model_len: int,
        label: str,
        adapters: Mapping[str, Path] | None = None,
        model_label: str = "vllm",
        listed: Listed | None = None,
        reasoning_parser: str | None = None,
        tool_parser: str | None = None,
    ) -> None:
        """`client`: a started vLLM client; `adapters` maps the names that requests use to LoRA folders on this machine.

        Without `listed` the client must run the classes of `engines/vllm/entropy`. `reasoning_parser` and `tool_parser` name two
        of vLLM's; raises ConfigError for one that does not fit.
        """
        self._client = client
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self.label = label
        self._name = model_label
        self._listed = listed
        self._loras = {
            name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate((adapters or {}).items(), 1)
        }
        self._format = ReasoningFormat(tokenizer, reasoning_parser)
        self._tool_format = ToolFormat(tokenizer, tool_parser)
        self._taker = EntropyTaker(client)
        self._numbers = count()

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate one continuation; cancelling aborts it in vLLM. Raises EngineError."""
        async with aclosing(self.stream(request)) as items:
            async for item in items:
                if isinstance(item, Generation):
                    return item
        raise AssertionError("a request ends with a generation")

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | Generation, None]:
        """Generate one continuation, yielding pieces of text and last the whole Generation. Raises EngineError."""
        accepted_s, sampling, final = time.perf_counter(), request.sampling, request.final
        reader = self._reader(final)
        offered = reader.tools if reader else ()
        # A grammar holds from the first token on: no thought could end that the template opens.
        is_bound = final is not None and (final.tool_choice != "auto" if reader else final.schema is not None)
        tokens = encode_chat(
            self._tokenizer,
            request.messages,
            model=self._name,
            settings=sampling.template,
            tools=offered,
            thinks=not is_bound,
        )
        room = room_for_reply(len(tokens), self._max_model_len, model=self._name)
        key = f"{request.request_id}-{next(self._numbers)}"
        opened = opened_thought(self._tokenizer, tokens, request.messages)
        text = ReplyText(self._format, tokens, opened, keeps_marks=reader is not None and reader.keeps_marks)
        reply = _Reply(len(tokens), accepted_s, self._listed, text, reader, final.top_logprobs if final else None)
        params = _params(sampling, request.call_id, room)
        params.skip_special_tokens = not (self._format.keeps_marks or (reader is not None and reader.keeps_marks))
        if reader is not None:
            reader.bind(params)
        elif final is not None and final.schema is not None:
            params.structured_outputs = StructuredOutputsParams(json=final.schema)
        self._ask_for_logprobs(params, final)
        if self._listed is None:
            params.extra_args = {KEY: key}
        try:
            outputs = self._client.generate({"prompt_token_ids": tokens}, params, key, lora_request=self._lora(request.adapter))
            async with aclosing(outputs):
                async for delta in _until(outputs, request.deadline_unix_s):
                    for piece in reply.take(delta):
                        yield piece
            for piece in reply.finish():
                yield piece
            sums = None if self._listed else await self._taker.take(key, reply.num_tokens, cuts_of(reply.is_answer))
        except BaseException as error:
            if self._listed is None:
                self._taker.forget(key)
            if isinstance(error, EngineError) or not isinstance(error, Exception):
                raise
            raise EngineError(f"{self._name}: {type(error).__name__}: {error}") from error
        if self._listed is None and sums is None and reply.num_tokens:
            raise EngineError(f"{self._name}: vLLM kept no entropies of a call; is `logits_processors` set?")
        whole = reply.whole(None if self._listed else sums or RequestSums(0.0, 0.0, 0))
        if not math.isfinite(whole.entropy.sum_nats + whole.reasoning_entropy.sum_nats):
            raise EngineError(f"{self._name}: {NOT_FINITE}")
        yield whole

    def _reader(self, final: FinalCall | None) -> ToolReader | None:
        try:
            return self._tool_format.reader(final)
        except Exception as error:  # whatever vLLM has against the client's tools
            raise EngineError(f"{self._name}: tools: vLLM cannot offer them: {type(error).__name__}: {error}") from error

    def _ask_for_logprobs(self, params: SamplingParams, final: FinalCall | None) -> None:
        """Ask for as many as the client wants, or as the bounds of the entropies take."""
        wanted = [] if final is None or final.top_logprobs is None else [final.top_logprobs]
        wanted += [self._listed.top_logprobs] if self._listed else []
        if wanted:
            params.logprobs, params.flat_logprobs = max(wanted), True

    async def close(self) -> None:
        """Stop vLLM; requests in flight fail with EngineError."""
        await self._taker.drained()
        self._client.shutdown()

    async def count_kept(self) -> int:
        """Return of how many calls the workers keep something, the largest number of any worker."""
        await self._taker.drained()
        counts: list[int] = await self._client.collective_rpc("count_entropies")
        return max(counts)

    def _lora(self, adapter: str | None) -> LoRARequest | None:
        if adapter is None:
            return None
        if adapter not in self._loras:
            allowed = ", ".join(self._loras) or "none is loaded"
            raise EngineError(f"adapter is {adapter!r}; expected null, {allowed}; name it in the pool, then restart")
        return self._loras[adapter]


class _Reply:
    """What has come of one call."""

    def __init__(
        self,
        prompt_tokens: int,
        accepted_s: float,
        listed: Listed | None,
        text: ReplyText,
        reader: ToolReader | None = None,
        top_logprobs: int | None = None,
    ) -> None:
        """`top_logprobs`: how many a client wants of each token of the answer; None: none."""
        self.num_tokens = 0
        self._reader = reader
        self._tokens: list[int] = []
        self._top_logprobs = top_logprobs
        self._rows: list[dict[str, Any]] = []
        self.is_answer: list[bool] = []
        """Of every token whether it is the answer's, once the reply has ended."""
        self._vocab_size = listed.vocab_size if listed else None
        self._listed_entropies: list[EntropySum] = []
        self._prompt_tokens = prompt_tokens
        self._accepted_s = accepted_s
        self._text = text
        self._cached_tokens = 0
        self._queue_ms = 0.0
        self._finish: FinishReason = "length"
        self._has_end = False
        """Whether its last token is the model's own end of a reply, which is no part of the text."""

    def take(self, output: Any) -> list[TextDelta]:
        """Take what vLLM tells next; return what may be shown. Raises EngineError for a call that vLLM itself gave up."""
        part = output.outputs[0]
        if part.finish_reason in ("abort", "error"):  # it was put to sleep, or failed: what came so far is not a reply
            raise EngineError(f"vLLM gave the call up after {self.num_tokens} tokens ({part.finish_reason})")
        self.num_tokens += len(part.token_ids)
        self._cached_tokens = output.num_cached_tokens or self._cached_tokens
        if part.logprobs is not None:
            self._list(part.logprobs)
        if part.finish_reason is not None:
            self._has_end = part.finish_reason == "stop" and part.stop_reason is None
            self._finish = "stop" if part.finish_reason == "stop" else "length"
        metrics = output.metrics
        if metrics is not None and metrics.scheduled_ts and metrics.queued_ts:
            self._queue_ms = max(0.0, (metrics.scheduled_ts - metrics.queued_ts) * 1e3)
        pieces = self._text.feed(part.text, part.token_ids)
        if self._reader is None:
            return pieces
        self._tokens += part.token_ids
        return self._reader.feed(pieces, part.token_ids)

    def finish(self) -> list[TextDelta]:
        """Take the reply as ended, at the deadline too; return what is still to be shown."""
        shown = self._text.finish()
        self.is_answer = self._text.answer_tokens()
        return shown if self._reader is None else self._reader.feed(shown, ())

    def _list(self, logprobs: Any) -> None:
        """Take the tokens of vLLM's flat record; a position lists the chosen token, and again where it is among the first."""
        for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True):
            if self._vocab_size is not None:
                listed = dict(zip(logprobs.token_ids[start:end], logprobs.logprobs[start:end], strict=True))
                self._listed_entropies.append(listed_entropy(list(listed.values()), self._vocab_size))
            if self._top_logprobs is not None:
                self._rows.append(_row(logprobs, range(start, end), self._top_logprobs))

    def whole(self, sums: RequestSums | None) -> Generation:
        """Return the whole of it, with the sums that vLLM kept; None: with those of the listed log-probabilities."""
        if sums is not None:
            entropy, its_entropy = sums.text, sums.thought
        else:
            entropy = its_entropy = EntropySum(kind="truncated")
            for is_answer, of_token in zip(self.is_answer, self._listed_entropies, strict=True):
                if is_answer:
                    entropy += of_token
                else:
                    its_entropy += of_token
        text, calls = (self._text.text, ()) if self._reader is None else self._reader.finish(self._text.text, self._tokens)
        thought_tokens = self.is_answer.count(False)
        return Generation(
            text=text,
            reasoning=self._text.reasoning,
            raw=self._text.raw,
            # A thought without an answer never ended, or might as well not have.
            finish_reason="length" if thought_tokens and not (text.strip() or calls) else self._finish,
            tool_calls=calls,
            logprobs=self._logprobs(),
            entropy=entropy,
            reasoning_entropy=its_entropy if thought_tokens else EntropySum(),
            usage=TokenUsage(
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                completion_tokens=self.num_tokens,
                reasoning_tokens=thought_tokens,
            ),
            engine_ms=(time.perf_counter() - self._accepted_s) * 1e3,
            queue_ms=self._queue_ms,
        )

    def _logprobs(self) -> tuple[dict[str, Any], ...] | None:
        """Return the rows of the answer's tokens, without the one that ended it; None where none were asked for."""
        if self._top_logprobs is None:
            return None
        rows = [row for is_answer, row in zip(self.is_answer, self._rows, strict=True) if is_answer]
        return tuple(rows[:-1] if self._has_end else rows)


def _row(logprobs: Any, places: range, most: int) -> dict[str, Any]:
    """Return a position of vLLM's flat record as OpenAI's objects have it, with the most probable tokens."""

    def part(place: int) -> dict[str, Any]:
        token, nats = logprobs.decoded_tokens[place] or "", logprobs.logprobs[place]
        data = list(token.encode(errors="replace"))
        return {"token": token, "logprob": nats if math.isfinite(nats) else NEVER_NATS, "bytes": data}

    places_by_id = {logprobs.token_ids[place]: place for place in places}
    first = sorted(places_by_id.values(), key=lambda place: -logprobs.logprobs[place])[:most]
    return part(places[0]) | {"top_logprobs": [part(place) for place in first]}


async def _until(outputs: AsyncIterator[Any], deadline_unix_s: float | None) -> AsyncIterator[Any]:
    """Yield what comes before the deadline."""
    while True:
        # Item by item: a timeout around the whole loop would go off in the code that reads the items.
        wait_s = None if deadline_unix_s is None else deadline_unix_s - time.time()
        if wait_s is not None and wait_s <= 0:
            return
        try:
            # Not wait_for: Python 3.11's forgets a cancellation that comes together with an item.
            async with asyncio.timeout(wait_s):
                output = await anext(outputs)
        except (StopAsyncIteration, TimeoutError):
            return
        yield output


def _params(sampling: Sampling, call_id: str, room: int) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p or 0.0,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        max_tokens=max(1, min(sampling.max_tokens, room)),
        stop=list(sampling.stop) or None,
        seed=None if sampling.temperature == 0.0 else seed_of(sampling, call_id),
        output_kind=RequestOutputKind.DELTA,
    )
