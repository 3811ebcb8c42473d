"""OpenAI's agents SDK."""

from __future__ import annotations

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from cells import ASKED, MODEL, URL, cell
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)


class Wanted(BaseModel):
    answer: int


@function_tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}."


def agent(**options):
    return Agent(name="one", instructions="Be brief.", **options)


async def run(**options):
    return (await Runner.run(agent(**options), ASKED)).final_output


async def responses():
    return "19" in await run(model=MODEL)


async def tools():
    return "19" in await run(model=MODEL, tools=[weather])


async def form():
    return await run(model=MODEL, output_type=Wanted) == Wanted(answer=19)


async def chat():
    model = OpenAIChatCompletionsModel(model=MODEL, openai_client=AsyncOpenAI(base_url=URL))
    return "19" in await run(model=model, tools=[weather])


async def streamed():
    result = Runner.run_streamed(agent(model=MODEL, tools=[weather]), ASKED)
    async for _ in result.stream_events():
        pass
    return "19" in result.final_output


for name, run_cell in (
    ("run, by responses", responses),
    ("tools", tools),
    ("output_type", form),
    ("by chat completions", chat),
    ("run_streamed", streamed),
):
    cell(name, run_cell)
