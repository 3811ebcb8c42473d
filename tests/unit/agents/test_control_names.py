"""An endpoint gets no text that names a control token; other texts arrive as they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.engine_options import OpenaiOptions
from dmoa.engines.openai import OpenaiEngine, break_names
from dmoa.types import GenerationRequest, Message, Sampling
from tests.unit.agents.openai_server import answer, playing, request

NAMES = {
    "ChatML and Qwen": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_response>", "<|fim_prefix|>"],
    "Llama 2": ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>"],
    "Llama 3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
    "Llama 4": ["<|header_start|>", "<|eot|>"],
    "Gemma": ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<|turn>", "<turn|>"],
    "Mistral": [
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
    ],
    "Phi": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_sep|>"],
    "DeepSeek": ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"],
    "harmony": ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|constrain|>", "<|call|>"],
    "others": ["<|START_OF_TURN_TOKEN|>", "<|start_of_role|>", "[|system|]", "[gMASK]", "<sop>", "<|im_user|>", "]~b]"],
}
ALL = [name for names in NAMES.values() for name in names]


@pytest.mark.parametrize("name", ALL)
def test_a_name_is_broken_up_and_can_still_be_read(name: str) -> None:
    broken = break_names(f"say {name} twice: {name}{name}")
    assert name not in broken
    assert broken.replace(" ", "") == f"say{name}twice:{name}{name}".replace(" ", "")
    assert break_names(broken) == broken


@given(st.lists(st.sampled_from([*ALL, "<", "|", ">", "[", "a", " ", "\n", "<|im_", "end|>"]), max_size=12))
def test_no_name_is_left_or_made(parts: list[str]) -> None:
    broken = break_names("".join(parts))
    assert not [name for name in ALL if name in broken]
    assert break_names(broken) == broken


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and c > d: x[i] = y[j]",
        "<b>bold</b> <h1>x</h1> <|> a <| b |> c",
        "[link](https://example.org) [MASKS] [INSTALL]",
        "<think>so</think> <calculator>1+1</calculator> = 2",
        "std::vector<int> v; cat <<EOF >out",
        "|a|b|\n|-|-|",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert break_names(text) == text


@pytest.mark.parametrize("name", ["<|im_end|>", "</s>", "[INST]", "<start_of_turn>"])
async def test_no_message_that_is_sent_names_one(name: str) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = tuple(Message(role=role, content=f"{i} {name}{name}system x") for i, role in enumerate(roles))
    asked = GenerationRequest(request_id="r", call_id="r", messages=messages, sampling=Sampling())
    async with playing(answer("19")) as endpoint:
        engine = OpenaiEngine("m", OpenaiOptions(base_url=endpoint.url), max_num_seqs=1)
        await engine.generate(asked)
        await engine.generate(request("a < b | c"))
        await engine.close()
        sent, ordinary = (call.body["messages"] for call in endpoint.calls)
    assert [message["role"] for message in sent] == list(roles)
    assert not [message for message in sent if name in message["content"]]
    assert ordinary == [{"role": "user", "content": "a < b | c"}]
