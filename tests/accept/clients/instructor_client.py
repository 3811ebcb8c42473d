"""Instructor."""

from __future__ import annotations

import instructor
from cells import ASKED, MODEL, URL, cell
from openai import OpenAI
from pydantic import BaseModel


class Wanted(BaseModel):
    answer: int


def asked(mode):
    client = instructor.from_openai(OpenAI(base_url=URL), mode=mode)
    reply = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": ASKED}], response_model=Wanted)
    return reply.answer == 19


for name in ("TOOLS", "JSON", "JSON_SCHEMA", "MD_JSON"):
    cell(f"mode {name}", lambda name=name: asked(getattr(instructor.Mode, name)))
