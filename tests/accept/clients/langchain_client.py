"""LangChain: langchain-openai."""

from __future__ import annotations

from cells import ASKED, MODEL, URL, cell
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

llm = ChatOpenAI(base_url=URL, model=MODEL)


class Wanted(BaseModel):
    """The answer."""

    answer: int


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}."


async def asynchronous():
    return "19" in (await llm.ainvoke(ASKED)).content


cell("invoke", lambda: "19" in llm.invoke(ASKED).content)
cell("stream", lambda: "19" in "".join(str(chunk.content) for chunk in llm.stream(ASKED)))
cell("ainvoke", asynchronous)
cell("bind_tools", lambda: llm.bind_tools([weather]).invoke(ASKED).tool_calls[0]["name"] == "weather")
cell("with_structured_output", lambda: llm.with_structured_output(Wanted).invoke(ASKED) == Wanted(answer=19))
cell(
    "use_responses_api", lambda: "19" in str(ChatOpenAI(base_url=URL, model=MODEL, use_responses_api=True).invoke(ASKED).content)
)
