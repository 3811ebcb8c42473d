"""The official openai package."""

from __future__ import annotations

from cells import ASKED, MODEL, URL, cell
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=URL)
messages = [{"role": "user", "content": ASKED}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
tool = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}


class Wanted(BaseModel):
    answer: int


def chat():
    return "19" in client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content


def stream():
    chunks = client.chat.completions.create(model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True})
    return "19" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def helper():
    with client.chat.completions.stream(model=MODEL, messages=messages) as events:
        for _ in events:
            pass
        return "19" in events.get_final_completion().choices[0].message.content


def tools():
    reply = client.chat.completions.create(model=MODEL, messages=messages, tools=[tool]).choices[0].message
    result = {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "19"}
    return (
        "19"
        in client.chat.completions.create(model=MODEL, messages=[*messages, reply, result], tools=[tool])
        .choices[0]
        .message.content
    )


def parse():
    return client.chat.completions.parse(model=MODEL, messages=messages, response_format=Wanted).choices[
        0
    ].message.parsed == Wanted(answer=19)


def several():
    reply = client.chat.completions.create(model=MODEL, messages=messages, n=2, logprobs=True, top_logprobs=1)
    return len(reply.choices) == 2 and reply.choices[0].logprobs.content


def responses():
    return "19" in client.responses.create(model=MODEL, input=ASKED).output_text


def responses_stream():
    with client.responses.stream(model=MODEL, input=ASKED) as events:
        for _ in events:
            pass
        return "19" in events.get_final_response().output_text


def responses_parse():
    return client.responses.parse(model=MODEL, input=ASKED, text_format=Wanted).output_parsed == Wanted(answer=19)


def responses_tools():
    flat = {"type": "function", "strict": True, **tool["function"]}
    return client.responses.create(model=MODEL, input=ASKED, tools=[flat]).output[0].name == "weather"


async def asynchronous():
    async with AsyncOpenAI(base_url=URL) as own:
        return "19" in (await own.chat.completions.create(model=MODEL, messages=messages)).choices[0].message.content


def completions():
    return "19" in client.completions.create(model=MODEL, prompt=ASKED).choices[0].text


for name, run in (
    ("chat", chat), ("chat, streamed", stream), ("stream helper", helper), ("async", asynchronous), ("tools, two turns", tools),
    ("parse", parse), ("n and logprobs", several), ("completions", completions), ("responses", responses),
    ("responses, streamed", responses_stream), ("responses, parse", responses_parse), ("responses, tools", responses_tools),
):  # fmt: skip
    cell(name, run)
