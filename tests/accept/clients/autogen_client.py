"""AutoGen: autogen-ext[openai] and autogen-agentchat."""

from __future__ import annotations

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from cells import ASKED, MODEL, URL, cell
from pydantic import BaseModel

INFO = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True, "family": "unknown"}


class Wanted(BaseModel):
    answer: int


def client():
    return OpenAIChatCompletionClient(model=MODEL, base_url=URL, api_key="none", model_info=INFO)


async def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}."


async def create():
    return "19" in (await client().create([UserMessage(content=ASKED, source="user")])).content


async def stream():
    *_, last = [piece async for piece in client().create_stream([UserMessage(content=ASKED, source="user")])]
    return "19" in last.content


async def form():
    reply = await client().create([UserMessage(content=ASKED, source="user")], json_output=Wanted)
    return Wanted.model_validate_json(reply.content) == Wanted(answer=19)


async def agent():
    result = await AssistantAgent("one", client(), tools=[weather], reflect_on_tool_use=True).run(task=ASKED)
    return "19" in result.messages[-1].content


for name, run in (("create", create), ("create_stream", stream), ("json_output", form), ("AssistantAgent with a tool", agent)):
    cell(name, run)
