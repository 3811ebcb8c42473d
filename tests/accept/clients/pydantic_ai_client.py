"""Pydantic AI."""

from __future__ import annotations

from cells import ASKED, MODEL, URL, cell
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=URL, api_key="none")
model = OpenAIChatModel(MODEL, provider=provider)


class Wanted(BaseModel):
    answer: int


def with_tool():
    agent = Agent(model)

    @agent.tool_plain
    def weather(city: str) -> str:
        """Tell the weather of a city."""
        return f"Sunny in {city}."

    return "19" in agent.run_sync(ASKED).output


async def streamed():
    async with Agent(model).run_stream(ASKED) as result:
        return "19" in await result.get_output()


cell("run", lambda: "19" in Agent(model).run_sync(ASKED).output)
cell("run_stream", streamed)
cell("tools", with_tool)
cell("output_type", lambda: Agent(model, output_type=Wanted).run_sync(ASKED).output == Wanted(answer=19))
cell("NativeOutput", lambda: Agent(model, output_type=NativeOutput(Wanted)).run_sync(ASKED).output == Wanted(answer=19))
cell("by responses", lambda: "19" in Agent(OpenAIResponsesModel(MODEL, provider=provider)).run_sync(ASKED).output)
