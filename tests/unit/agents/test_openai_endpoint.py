"""What the openai engine does about refusals, lost connections and keys: asking again, learning, errors that keep secrets."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import pickle
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from urllib.parse import quote

import pytest

from dmoa.agents.agent import Agent
from dmoa.config import AgentConfig
from dmoa.engine_options import OpenaiOptions
from dmoa.engines.openai import OpenaiEngine
from dmoa.errors import AgentOverloadedError, ConfigError, EngineError, PromptTooLongError
from dmoa.types import AgentCall, AgentReply, FinalCall, Generation, GenerationRequest, Message, Sampling
from tests.logged import Logged
from tests.unit.agents.openai_server import Call, FakeEndpoint, Turn, answer, content, opening, playing, refusal, request

AT_ONCE = {"Retry-After": "0"}
KEY = "sk-proj-abcDEF0123456789"


def engine_of(endpoint: FakeEndpoint, **options: Any) -> OpenaiEngine:
    return OpenaiEngine("some-model", OpenaiOptions.model_validate({"base_url": endpoint.url} | options), max_num_seqs=4)


async def ask(engine: OpenaiEngine, *, is_stream: bool = False, **fields: Any) -> Generation:
    if not is_stream:
        return await engine.generate(request("Hi", **fields))
    items = [item async for item in engine.stream(request("Hi", **fields))]
    assert isinstance(items[-1], Generation)
    return items[-1]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("status", [408, 429, 500, 503, 529])
async def test_a_passing_refusal_is_answered_by_asking_again(status: int, is_stream: bool) -> None:
    async with playing(refusal(status, "busy", headers=AT_ONCE), answer("19")) as endpoint:
        engine = engine_of(endpoint)
        assert (await ask(engine, is_stream=is_stream)).text == "19"
        await engine.close()
    assert len(endpoint.calls) == 2
    assert endpoint.calls[0].body == endpoint.calls[1].body


@pytest.mark.parametrize("asked_s", [0.3, None])
async def test_it_waits_as_long_as_it_is_asked_to_or_a_little(asked_s: float | None) -> None:
    headers = {"Retry-After": str(asked_s)} if asked_s else None
    async with playing(refusal(500, "oh", headers=headers), answer("19")) as endpoint:
        engine = engine_of(endpoint)
        await ask(engine)
        await engine.close()
    assert endpoint.calls[1].at_s - endpoint.calls[0].at_s >= (asked_s or 0.25)


async def test_a_wait_in_milliseconds_comes_before_one_in_seconds() -> None:
    async with playing(refusal(500, "oh", headers={"Retry-After": "30", "Retry-After-Ms": "20"}), answer("19")) as endpoint:
        engine = engine_of(endpoint)
        await ask(engine, deadline_unix_s=time.time() + 20.0)
        await engine.close()
    assert 0.02 <= endpoint.calls[1].at_s - endpoint.calls[0].at_s < 20.0


@pytest.mark.parametrize(("max_retries", "calls"), [(0, 1), (2, 3)])
async def test_it_gives_up_after_so_many_retries(max_retries: int, calls: int) -> None:
    async with playing(refusal(500, "the GPU is gone", headers=AT_ONCE)) as endpoint:
        engine = engine_of(endpoint, max_retries=max_retries)
        with pytest.raises(EngineError, match=r"^openai:some-model: it answered with status 500: the GPU is gone$"):
            await ask(engine)
        await engine.close()
    assert len(endpoint.calls) == calls


@pytest.mark.parametrize(
    "later", ["3600", format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)], ids=["seconds", "date"]
)
@pytest.mark.parametrize("deadline_s", [None, 5.0])
async def test_a_wait_past_the_deadline_or_the_timeout_is_not_begun(later: str, deadline_s: float | None) -> None:
    async with playing(refusal(429, "slow down", headers={"Retry-After": later})) as endpoint:
        engine = engine_of(endpoint)
        started = time.monotonic()
        with pytest.raises(AgentOverloadedError, match="status 429: slow down"):
            await ask(engine, deadline_unix_s=None if deadline_s is None else time.time() + deadline_s)
        assert time.monotonic() - started < 4.5, "it waited up to its deadline"
        await engine.close()
    assert len(endpoint.calls) == 1


@pytest.mark.parametrize("asked_s", ["30", None])
async def test_no_wait_of_any_length_goes_beyond_the_deadline(asked_s: str | None) -> None:
    headers = {"Retry-After": asked_s} if asked_s else None
    async with playing(refusal(500, "the GPU is gone", headers=headers)) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(EngineError, match="status 500: the GPU is gone"):
            await ask(engine, deadline_unix_s=time.time() + (5.0 if asked_s else 0.45))
        await engine.close()
    assert len(endpoint.calls) == 1


async def test_retries_are_counted_together_whatever_they_are_for() -> None:
    turns = (refusal(500, "oh", headers={"Retry-After": "0.01"}), opening(then="cut"), opening(then="end"), answer("19"))
    async with playing(*turns) as endpoint:
        engine = engine_of(endpoint, max_retries=2)
        with pytest.raises(EngineError, match="its stream broke off"):
            await ask(engine, is_stream=True)
        await engine.close()
    assert len(endpoint.calls) == 3


async def test_nothing_is_sent_that_the_pool_file_does_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", f"from-{name}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/other")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer other\nX-Other: other")
    monkeypatch.setenv("SOME_KEY", KEY)
    async with playing(answer("19")) as endpoint:
        for key in (None, "SOME_KEY"):
            engine = engine_of(endpoint, api_key_env=key)
            await ask(engine)
            await engine.close()
    bare, keyed = (call.headers for call in endpoint.calls)
    allowed = {"host", "accept", "accept-encoding", "connection", "user-agent", "content-length", "content-type"}
    assert bare.keys() == allowed
    assert bare["user-agent"].startswith("dmoa/")
    assert keyed == bare | {"authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 422])
async def test_other_refusals_are_final(status: int) -> None:
    async with playing(refusal(status, "no\nsuch model")) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(EngineError, match=rf"status {status}: no such model"):
            await ask(engine)
        await engine.close()
    assert len(endpoint.calls) == 1


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"<html>Bad gateway</html>", "status 404: <html>Bad gateway</html>"),
        (b'{"detail": "Not Found"}', "status 404: Not Found"),
        (b'{"error": "no"}', "status 404: no"),
        (b'{"error": "half \\ud83d"}', "status 404: half ?"),
        (b'{"error": {"code": 7}}', 'status 404: {"code": 7}'),
        (b"", "status 404: no details"),
        (b"x" * 10**6, "status 404: " + "x" * 300),
    ],
)
async def test_every_shape_of_an_error_is_quoted_in_short(body: bytes, named: str) -> None:
    async with playing(content(body, 404)) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(EngineError) as caught:
            await ask(engine)
        await engine.close()
    assert str(caught.value) == f"openai:some-model: it answered with {named}"


@pytest.mark.parametrize("field", [{"code": "context_length_exceeded"}, {}])
async def test_a_prompt_that_is_too_long_is_told_apart(field: dict[str, str]) -> None:
    said = "too many" if field else "This model's maximum context length is 8192 tokens."
    async with playing(refusal(400, said, **field)) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(PromptTooLongError, match="the prompt does not fit"):
            await ask(engine)
        await engine.close()


@pytest.mark.parametrize(
    ("fault", "gone", "is_stream"),
    [
        (refusal(400, "logprobs is True; not supported", param="logprobs"), ("logprobs", "top_logprobs"), False),
        (refusal(422, "Extra inputs are not permitted: stream_options"), ("stream_options",), True),
        (refusal(400, "x", param="seed"), ("seed",), False),
        (
            refusal(400, "Use 'max_completion_tokens'.", param="max_tokens"),
            ("max_tokens",),
            True,
        ),
    ],
    ids=["logprobs", "stream_options", "seed", "max_tokens"],
)
async def test_an_optional_field_that_is_refused_is_not_sent_again(fault: Turn, gone: tuple[str, ...], is_stream: bool) -> None:
    async with playing(fault, answer("19")) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        for _ in range(2):
            assert (await ask(engine, is_stream=is_stream, temperature=1.0, max_tokens=7)).text == "19"
        await engine.close()
    first, *later = (call.body for call in endpoint.calls)
    assert len(later) == 2
    for body in later:
        kept = {name: value for name, value in first.items() if name not in gone}
        assert body == kept | ({"max_completion_tokens": 7} if "max_tokens" in gone else {})


async def test_hints_are_sent_until_the_endpoint_refuses_them() -> None:
    hints = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "template": (("enable_thinking", False),)}
    async with playing(refusal(400, "Unrecognized request argument supplied: top_k"), answer("19")) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        await ask(engine, **hints)
        await ask(engine)
        await engine.close()
    first, second, plain = (call.body for call in endpoint.calls)
    assert second == {name: value for name, value in first.items() if name != "top_k"}
    assert first == plain | {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "chat_template_kwargs": {"enable_thinking": False},
    }


VLLM_SAYS = "Requested sample logprobs of 20, which is greater than max allowed: 5"
PLAIN, FAULTY = request("What?", name="plain", temperature=1.0), request("What?", name="faulty", temperature=1.0)


def with_(**sampling: Any) -> GenerationRequest:
    return replace(FAULTY, sampling=replace(FAULTY.sampling, **sampling))


def with_logprobs(number: int) -> GenerationRequest:
    return replace(FAULTY, final=FinalCall(top_logprobs=number))


def without(call: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in names}


@pytest.mark.parametrize(
    ("said", "faulty", "gone"),
    [
        ("body.seed: should be less than or equal to 9223372036854775807", with_(seed=2**63), "seed"),
        ("top_k must be at most 40", with_(top_k=2**31 - 1), "top_k"),
        ("repetition_penalty 10 is not supported; use (0, 2]", with_(repetition_penalty=10.0), "repetition_penalty"),
        ("chat_template_kwargs: unknown parameter a", with_(template=(("a", 1),)), "chat_template_kwargs"),
        ("logprobs are not supported with tools", replace(FAULTY, final=FinalCall(tools=({"name": "f"},))), "logprobs"),
        ("logprobs need thinking to be off", with_(template=(("enable_thinking", True),)), "logprobs"),
    ],
    ids=["seed", "top_k", "repetition_penalty", "template", "tools", "thinking"],
)
async def test_what_one_client_asks_for_costs_the_others_nothing(said: str, faulty: GenerationRequest, gone: str) -> None:
    async with playing(answer("19"), refusal(400, said), answer("19")) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        for one in (PLAIN, faulty, PLAIN, with_(top_k=5, seed=3, repetition_penalty=1.1, template=(("b", 1),))):
            assert (await engine.generate(one)).text == "19"
        await engine.close()
    first, asked, again, after, wish = (call.body for call in endpoint.calls)
    assert gone in asked
    assert again == without(asked, gone, *(["top_logprobs"] if gone == "logprobs" else []))
    assert after == first
    hints = {"top_k": 5, "repetition_penalty": 1.1, "chat_template_kwargs": {"b": 1}}
    assert wish == first | hints | {"seed": 3}


async def test_a_client_that_wants_more_log_probabilities_than_there_are_gets_the_pools_number() -> None:
    async with playing(refusal(400, VLLM_SAYS), answer("19")) as endpoint:
        engine = engine_of(endpoint, max_retries=0, top_logprobs=5)
        for one in (with_logprobs(20), PLAIN):
            assert (await engine.generate(one)).text == "19"
        await engine.close()
    assert [call.body["top_logprobs"] for call in endpoint.calls] == [20, 5, 5]


@pytest.mark.parametrize(
    ("said", "most"),
    [
        ("Invalid value for 'top_logprobs': must be less than or equal to 5.", 5),
        (VLLM_SAYS, 5),
        ("Unsupported parameter: 'top_logprobs' is not supported with this model.", None),
    ],
)
async def test_an_endpoint_that_lists_fewer_log_probabilities_is_asked_for_as_many(said: str, most: int | None) -> None:
    async with playing(refusal(400, said), answer("19")) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        for _ in range(2):
            assert (await engine.generate(PLAIN)).text == "19"
        await engine.close()
    assert [call.body.get("top_logprobs") for call in endpoint.calls] == [20, most, most]
    assert [call.body.get("logprobs") for call in endpoint.calls] == [True, *[True if most else None] * 2]


async def test_a_model_that_takes_no_temperature_but_its_own_is_asked_without() -> None:
    said = "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is supported."
    async with playing(refusal(400, said, param="temperature"), answer("19")) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        for _ in range(2):
            assert (await ask(engine, temperature=0.7)).text == "19"
        await engine.close()
    first, *later = (call.body for call in endpoint.calls)
    assert later == [without(first, "temperature")] * 2


async def test_a_field_is_given_up_only_where_the_call_without_it_is_answered() -> None:
    # The refusal quotes the prompt, which names fields.
    said = "stop: at most 4 texts; messages: 'no logprobs, stream_options or seed, please'"
    async with playing(answer("19"), *[refusal(400, said)] * 3, answer("19")) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        await engine.generate(PLAIN)
        with pytest.raises(EngineError, match="at most 4 texts"):
            await engine.generate(FAULTY)
        await engine.generate(PLAIN)
        await engine.close()
    assert endpoint.calls[-1].body == endpoint.calls[0].body


async def test_calls_in_flight_while_a_field_is_given_up_go_without_it_too() -> None:
    ready = asyncio.Barrier(2)

    async def together(call: Call) -> None:
        await ready.wait()
        await refusal(400, "logprobs: no")(call)

    async with playing(together, together, answer("19")) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        found = await asyncio.gather(engine.generate(PLAIN), engine.generate(FAULTY))
        await engine.close()
    assert [one.text for one in found] == ["19", "19"]


async def test_what_a_client_says_is_sent_also_where_it_means_nothing() -> None:
    wished = replace(PLAIN.sampling, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, given=("top_p",))
    async with playing(answer("19")) as endpoint:
        engine = engine_of(endpoint)
        for one in (PLAIN, replace(PLAIN, sampling=wished)):
            await engine.generate(one)
        await engine.close()
    plain, asked = (call.body for call in endpoint.calls)
    assert asked == plain | {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


async def test_a_top_p_of_one_that_is_refused_is_left_out() -> None:
    said = "Unsupported parameter: 'top_p' is not supported with this model."
    async with playing(refusal(400, said), answer("19"), refusal(400, said)) as endpoint:
        engine = engine_of(endpoint)
        assert (await engine.generate(with_(top_p=1.0, given=("top_p",)))).text == "19"
        with pytest.raises(EngineError, match="top_p"):
            await engine.generate(with_(top_p=0.9, given=("top_p",)))
        await engine.close()
    assert [call.body.get("top_p") for call in endpoint.calls] == [1.0, None, 0.9]


@pytest.mark.parametrize("said", ["max_tokens is too large: 7; at most 4", "temperature must be at most 2", "proseeds"])
async def test_a_bad_value_is_no_refused_field(said: str) -> None:
    async with playing(refusal(400, said)) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(EngineError, match=f"status 400: {said}"):
            await ask(engine, temperature=1.0)
        await engine.close()
    assert len(endpoint.calls) == 1


async def test_a_field_that_was_left_out_and_is_named_again_is_an_error() -> None:
    async with playing(refusal(400, "logprobs again and again")) as endpoint:
        engine = engine_of(endpoint)
        with pytest.raises(EngineError, match="status 400: logprobs again"):
            await ask(engine)
        await engine.close()
    assert len(endpoint.calls) == 2


@pytest.mark.parametrize("then", ["cut", "end"])
async def test_a_stream_that_breaks_off_before_any_text_is_asked_for_again(then: str) -> None:
    async with playing(opening(then=then), answer("19")) as endpoint:
        engine = engine_of(endpoint)
        assert (await ask(engine, is_stream=True)).text == "19"
        await engine.close()
    assert len(endpoint.calls) == 2


@pytest.mark.parametrize(("then", "named"), [("cut", "the connection failed"), ("end", "its stream broke off")])
async def test_a_stream_that_breaks_off_in_mid_text_is_an_error(then: str, named: str) -> None:
    async with playing(opening("The ", then=then), answer("19")) as endpoint:
        engine = engine_of(endpoint)
        stream = engine.stream(request("Hi"))
        assert getattr(await anext(stream), "text", "") == "The "
        with pytest.raises(EngineError, match=named):
            await anext(stream)
        await engine.close()
    assert len(endpoint.calls) == 1


async def test_nobody_at_the_address_is_an_error_that_says_where_to_look() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        engine = OpenaiEngine("some-model", OpenaiOptions(base_url=url, max_retries=1), max_num_seqs=1)
        with pytest.raises(EngineError, match=r"the connection failed \(ConnectError: .*\); check base_url"):
            await ask(engine)
        await engine.close()


async def test_the_key_is_in_no_error_log_or_text(monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    said = f"Incorrect API key provided: {KEY} (Bearer {KEY})"
    turns = [refusal(status, said, headers=AT_ONCE) for status in (401, 500, 429)]
    turns += [refusal(400, f"logprobs {said}"), content(f'{{"error": "{said}"}}'.encode())]
    shown: list[str] = []
    with logged.at_level(logging.DEBUG):
        for turn in turns:
            async with playing(turn) as endpoint:
                engine = engine_of(endpoint, api_key_env="SOME_KEY", max_retries=1)
                with pytest.raises((EngineError, AgentOverloadedError)) as caught:
                    await ask(engine)
                assert endpoint.calls[0].headers["authorization"] == f"Bearer {KEY}"
                shown += [str(caught.value), repr(pickle.loads(pickle.dumps(caught.value))), repr(engine), engine.label]
                shown += [repr(vars(engine)), repr(engine._room), repr(engine._room and engine._room.client)]
                await engine.close()
    shown += [record.getMessage() for record in logged.records] + [logged.text]
    assert any("redacted" in text for text in shown)
    assert any("the key in SOME_KEY" in text for text in shown)
    assert not [text for text in shown if KEY in text]


PLAIN_KEY = "Zq9/w+Tr_4kV=mB7x-hJ2p"
"""A key of no known shape, with signs that URLs, JSON and HTML write in ways of their own."""


def written(key: str) -> dict[str, str]:
    """Return ways in which an endpoint may show the key."""
    encoded = {before: base64.b64encode(f"{before}{key}".encode()).decode() for before in ("", "u:", "Bearer ")}
    return {
        "as it is": key,
        "in a sentence": f"no such key:{key}.",
        "in capitals": key.upper(),
        "in a URL": quote(key, safe=""),
        "in a URL, small": quote(key, safe="").lower(),
        "in a URL twice": quote(quote(key, safe=""), safe=""),
        "in JSON": json.dumps({"key": key}).replace("/", "\\/"),
        "in JSON within JSON": json.dumps(json.dumps({"key": key}).replace("/", "\\/")),
        "in code points": "".join(f"\\u{ord(char):04x}" for char in key),
        "in HTML": "".join(char if char.isalnum() else f"&#{ord(char)};" for char in key),
        "in HTML, hexadecimal": "".join(char if char.isalnum() else f"&#x{ord(char):X};" for char in key),
        "in base64": encoded[""],
        "in base64 of a URL": encoded[""].replace("+", "-").replace("/", "_").rstrip("="),
        "in base64 of a login": encoded["u:"],
        "in base64 of a header": encoded["Bearer "],
        "in hexadecimal digits": key.encode().hex(),
        "its beginning": f"{key[:10]}...",
        "its end": f"...{key[-10:]}",
        "its middle": key[5:15],
        "with a mask": f"{key[:4]}********{key[-4:]}",
        "with a short mask": f"{key[:3]}***{key[-3:]}",
        "over two lines": f"{key[:11]}\n{key[11:]}",
    }


@pytest.mark.parametrize("way", written(PLAIN_KEY))
@pytest.mark.parametrize("place", ["refusal", "param", "retry", "in a stream", "in a reply", "broken"])
async def test_a_key_of_no_known_shape_is_not_shown_in_any_way_of_writing(
    way: str, place: str, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    monkeypatch.setenv("SOME_KEY", PLAIN_KEY)
    said = written(PLAIN_KEY)[way]
    error = {"error": {"message": f"no: {said} at all"}}

    async def streamed(call: Call) -> None:
        await call.open_stream()
        await call.event(error)
        await call.until_gone()

    turns = {
        "refusal": refusal(401, f"Incorrect API key provided: {said}"),
        "param": refusal(400, f"logprobs are not for you: {said}", param=f"logprobs {said}"),
        "retry": refusal(500, said, headers=AT_ONCE),
        "in a stream": streamed,
        "in a reply": content(json.dumps({"choices": [{"message": {"content": None, "refusal": said}}]}).encode()),
        "broken": content(said.encode(), 400),
    }
    async with playing(turns[place]) as endpoint:
        engine = engine_of(endpoint, api_key_env="SOME_KEY", max_retries=1)
        agent = Agent(AgentConfig(name="a", llm="x", profile="Answers."), engine)
        call = AgentCall(
            trace_id="t",
            step=0,
            agent="a",
            messages=(Message(role="user", content="Hi"),),
            sampling=Sampling(),
            deadline_unix_s=None,
        )
        with logged.at_level(logging.DEBUG, logger="dmoa"):
            reply = [item async for item in agent.stream(call)][-1] if place == "in a stream" else await agent.call(call)
        await engine.close()
    assert isinstance(reply, AgentReply)
    assert reply.status == "failed"
    shown = f"{reply.error} {logged.text}"
    assert said not in shown
    parts = {said[i : i + 8] for i in range(len(said) - 7)} if said.isascii() and " " not in said else set()
    forms = [PLAIN_KEY, *(written(PLAIN_KEY)[name] for name in ("in a URL", "in base64", "in hexadecimal digits"))]
    runs = {form[i : i + 8] for form in forms for i in range(len(form) - 7)}
    assert not [part for part in runs & parts if part in shown]
    assert "[redacted]" in shown


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_a_text_that_says_the_key_arrives_without_it(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", PLAIN_KEY)
    text = f"{PLAIN_KEY[:5]} you sent Bearer {PLAIN_KEY}{PLAIN_KEY}, Zq{PLAIN_KEY} and {PLAIN_KEY[:9]}"
    hidden = text.replace(PLAIN_KEY, "[redacted]")
    async with playing(answer(*(text[i : i + size] for i in range(0, len(text), size)))) as endpoint:
        engine = engine_of(endpoint, api_key_env="SOME_KEY")
        items = [item async for item in engine.stream(request("Hi"))]
        whole = await engine.generate(request("Hi"))
        await engine.close()
    assert isinstance(items[-1], Generation)
    assert "".join(item.text for item in items[:-1]) == items[-1].text == whole.text == hidden


async def test_a_key_that_is_a_word_stays_in_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "none")
    async with playing(answer("There is none.")) as endpoint:
        engine = engine_of(endpoint, api_key_env="SOME_KEY")
        assert (await ask(engine)).text == "There is none."
        await engine.close()


@pytest.mark.parametrize(
    "said", ["the model some-model does not exist", "Your role is not allowed...", "**no**: x****", "%41&amp;"]
)
async def test_what_is_not_the_key_is_quoted_as_it_is(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", PLAIN_KEY)
    async with playing(refusal(400, said)) as endpoint:
        engine = engine_of(endpoint, api_key_env="SOME_KEY")
        with pytest.raises(EngineError) as caught:
            await ask(engine)
        await engine.close()
    assert str(caught.value).endswith(f"status 400: {said}")


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_key_that_is_not_set_is_refused_when_the_engine_starts(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("SOME_KEY", raising=False)
    else:
        monkeypatch.setenv("SOME_KEY", value)
    options = OpenaiOptions(base_url="https://api.example.com/v1", api_key_env="SOME_KEY")
    with pytest.raises(ConfigError, match=r"engine_kwargs\.api_key_env: the variable SOME_KEY is not set where the engine runs"):
        OpenaiEngine("m", options, max_num_seqs=1)


@pytest.mark.parametrize("value", [f"{KEY}\nX-Evil: 1", f"{KEY} two", f"{KEY}ä"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", value)
    options = OpenaiOptions(base_url="https://api.example.com/v1", api_key_env="SOME_KEY")
    with pytest.raises(ConfigError, match="the value of SOME_KEY holds characters that no key has") as caught:
        OpenaiEngine("m", options, max_num_seqs=1)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("turn", "deadline_s", "status"),
    [
        (answer("19"), None, "ok"),
        (refusal(429, "busy", headers={"Retry-After": "9999"}), None, "overloaded"),
        (refusal(500, "oh", headers=AT_ONCE), None, "failed"),
        (refusal(400, "maximum context length"), None, "failed"),
        (opening(then="stall"), 0.1, "late"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_became_of_a_call_is_in_the_agents_reply(
    turn: Turn, deadline_s: float | None, status: str, is_stream: bool
) -> None:
    async with playing(turn) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        agent = Agent(AgentConfig(name="a", llm="x", profile="Answers."), engine)
        call = AgentCall(
            trace_id="t",
            step=0,
            agent="a",
            messages=(Message(role="user", content="Hi"),),
            sampling=Sampling(),
            deadline_unix_s=None if deadline_s is None else time.time() + deadline_s,
        )
        reply = [item async for item in agent.stream(call)][-1] if is_stream else await agent.call(call)
        await engine.close()
    assert isinstance(reply, AgentReply)
    assert (reply.status, reply.text) == (status, "19" if status == "ok" else "")
    assert (reply.error is None) == (status == "ok")


@pytest.mark.parametrize("way", ["whole", "line", "lines", "events"])
async def test_a_reply_without_end_is_cut_off(way: str) -> None:
    """It would fill the memory of the process that asks, which may be the server's own."""
    piece = {"whole": b"x" * 65_536, "line": b"data: " + b"x" * 65_536, "lines": b"data: x\n" * 8192}.get(way)
    sent = (
        piece or (b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": "x" * 1000}}]}).encode() + b"\n\n") * 60
    )
    taken = 0

    async def endless(call: Call) -> None:
        nonlocal taken
        kind = b"application/json" if way == "whole" else b"text/event-stream"
        await call.raw(b"HTTP/1.1 200 OK\r\nContent-Type: " + kind + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not call.writer.is_closing():
            await call.chunk(sent if taken == 0 or way != "line" else sent[6:])
            taken += len(sent)

    async with playing(endless) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        with pytest.raises(EngineError, match=r"its reply has more than .* bytes for max_tokens 16"):
            await ask(engine, is_stream=way != "whole", max_tokens=16)
        await engine.close()
    assert taken < 64 << 20


async def test_a_reply_that_says_it_is_too_long_is_not_read() -> None:
    async def announces(call: Call) -> None:
        await call.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 10000000\r\n\r\n{")
        await call.until_gone()

    async with playing(announces) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        with pytest.raises(EngineError, match=r"its reply has more than .* bytes for max_tokens 16"):
            async with asyncio.timeout(20):  # the endpoint sends nothing more
                await ask(engine, max_tokens=16)
        await engine.close()


async def test_of_a_refusal_without_end_the_beginning_is_read() -> None:
    async def endless(call: Call) -> None:
        await call.raw(b"HTTP/1.1 400 X\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not call.writer.is_closing():
            await call.chunk(b"no " * 20_000)

    async with playing(endless) as endpoint:
        engine = engine_of(endpoint, max_retries=0)
        with pytest.raises(EngineError, match="it answered with status 400: no no"):
            await ask(engine)
        await engine.close()
