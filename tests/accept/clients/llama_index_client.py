"""LlamaIndex: llama-index-llms-openai-like."""

from __future__ import annotations

from cells import ASKED, MODEL, URL, cell
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

llm = OpenAILike(model=MODEL, api_base=URL, api_key="none", is_chat_model=True, is_function_calling_model=True)


class Wanted(BaseModel):
    """The answer."""

    answer: int


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}."


asked = [ChatMessage(role="user", content=ASKED)]
tool = FunctionTool.from_defaults(weather)
cell("chat", lambda: "19" in str(llm.chat(asked)))
cell("stream_chat", lambda: "19" in "".join(piece.delta or "" for piece in llm.stream_chat(asked)))
cell("complete", lambda: "19" in str(OpenAILike(model=MODEL, api_base=URL, api_key="none").complete(ASKED)))
cell(
    "chat_with_tools",
    lambda: llm.get_tool_calls_from_response(llm.chat_with_tools([tool], user_msg=ASKED))[0].tool_name == "weather",
)
cell("as_structured_llm", lambda: llm.as_structured_llm(Wanted).chat(asked).raw == Wanted(answer=19))
