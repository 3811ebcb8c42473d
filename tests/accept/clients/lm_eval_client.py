"""lm-eval: local-chat-completions with a chat template, and local-completions."""

from __future__ import annotations

from cells import ASKED, MODEL, URL, cell
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model


def generated(kind, path, prompt):
    lm = get_model(kind)(model=MODEL, base_url=f"{URL}/{path}", tokenizer_backend=None, num_concurrent=1, max_retries=1)
    given = (
        lm.apply_chat_template([{"role": "user", "content": prompt}]) if kind == "local-chat-completions" else prompt,
        {"until": ["\n\n"], "max_gen_toks": 64},
    )
    return "19" in lm.generate_until([Instance("generate_until", {}, given, 0)])[0]


cell("local-chat-completions, chat template", lambda: generated("local-chat-completions", "chat/completions", ASKED))
cell("local-completions, generate_until", lambda: generated("local-completions", "completions", ASKED))
