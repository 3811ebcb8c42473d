"""Breaks up the names of control tokens in texts for an endpoint, which may read them as real ones.

Where a turn begins and ends is said by tokens with names such as `<|im_end|>`. An endpoint that puts messages into its template
as text, as most servers of open models do, takes such a name in a message for the token itself: a user's text, a tool's result
or another agent's reply could end its turn and open a system turn. Engines that we tokenise for need none of this
(`chat_tokens`). The break is a space that one can see, behind the first character: servers that clean texts remove characters
without width, and the name would stand again.
"""

from __future__ import annotations

import re

_NAMES = re.compile(
    # ChatML, Qwen, Llama 3, Phi, GPT-OSS's harmony, Zephyr, Command, Granite, Kimi: a word between <| and |>, or beside one.
    r"<\|[^\s<>|]{1,64}\|>|<\|[A-Za-z_]{1,40}>|<[A-Za-z_]{1,40}\|>"
    # DeepSeek and Hunyuan, with fullwidth bars.
    r"|<\uff5c[^<>\uff5c\n]{1,64}\uff5c>"
    # EXAONE.
    r"|\[\|[^\s\[\]|]{1,64}\|\]"
    # Llama 2 and Mistral.
    r"|</?s>|\[/?INST\]|<</?SYS>>"
    r"|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|SYSTEM_PROMPT|ARGS|CALL_ID|PREFIX|MIDDLE|SUFFIX|IMG)\]"
    # Gemma, and names that many share.
    r"|<(?:start|end)_of_(?:turn|image|audio)>|</?(?:bos|eos|pad|unk|sep|cls|mask|eod|eot|sop|eop)>"
    # Qwen's tools.
    r"|</?tool_(?:call|calls|response|responses)>"
    # GLM, BERT, MiniMax, Seed.
    r"|\[(?:gMASK|sMASK|MASK|CLS|SEP|PAD|UNK)\]|\]~[!b]\[|\]~b\]|\[e~\[|<seed:\w{1,40}>",
    re.IGNORECASE,
)


def break_names(text: str) -> str:
    """Return a text in which no control token of a common family is named; others come back as they are."""
    # Again, because what overlapped the name may be one itself.
    while _NAMES.search(text):
        text = _NAMES.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text
