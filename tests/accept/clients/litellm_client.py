"""LiteLLM's SDK."""

from __future__ import annotations

import litellm
from cells import ASKED, MODEL, URL, cell
from pydantic import BaseModel

given = {"model": f"openai/{MODEL}", "api_base": URL, "messages": [{"role": "user", "content": ASKED}]}
tool = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


class Wanted(BaseModel):
    answer: int


def stream():
    return "19" in "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**given, stream=True))


async def asynchronous():
    return "19" in (await litellm.acompletion(**given)).choices[0].message.content


async def messages():
    asked = {"messages": given["messages"], "max_tokens": 64, "model": given["model"]}
    reply = await litellm.anthropic_messages(**asked, api_base=URL, api_key="none")
    return "19" in reply["content"][0]["text"]


cell("completion, as Anthropic's messages", messages)
cell("completion", lambda: "19" in litellm.completion(**given).choices[0].message.content)
cell("completion, streamed", stream)
cell("acompletion", asynchronous)
cell("tools", lambda: litellm.completion(**given, tools=[tool]).choices[0].message.tool_calls[0].function.name == "weather")
cell(
    "response_format",
    lambda: Wanted.model_validate_json(litellm.completion(**given, response_format=Wanted).choices[0].message.content),
)
cell("responses", lambda: litellm.responses(model=given["model"], api_base=URL, input=ASKED).output)
