"""The guide's table of clients is what the last run of `tests/accept/accept_clients.py` came to."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from tests.accept.accept_clients import NO_FORM, table, write_table

RESULT = Path(__file__).parents[1] / "accept" / "clients" / "results.json"


def cell(client: str, name: str, why: str = "", *, pool: str = "endpoint", cannot: str = "") -> dict[str, str]:
    return {"pool": pool, "client": client, "cell": name, "why": why, "cannot": cannot}


def test_a_line_a_client_and_a_sentence_for_what_cannot_work(tmp_path: Path) -> None:
    lost = cell("one", "forms", "ValueError: x", pool="embedded", cannot=NO_FORM)
    cells = [cell("one", "chat"), cell("one", "forms"), cell("one", "chat", pool="embedded"), lost, cell("two", "chat")]
    text = table({"versions": {"one": "one 1.0", "two": "two 2.0, three 3.0"}, "cells": cells})
    assert text.splitlines()[2:] == [
        "| one 1.0 | chat; forms | all | 1 of 2; not forms (a) |",
        "| two 2.0, three 3.0 | chat | all | not tried |",
        "",
        f"a: {NO_FORM}.",
    ]
    guide = tmp_path / "guide.md"
    guide.write_text(
        "# Clients\n\n| client | works |\n|---|---|\n| old | all |\n\na: an old reason.\n\nThe rest.\n", encoding="utf-8"
    )
    for _ in range(2):
        write_table(guide, text)
        assert guide.read_text(encoding="utf-8") == f"# Clients\n\n{text}\n\nThe rest.\n"


def test_the_guide_shows_what_the_run_found() -> None:
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    assert f"\n{table(found)}\n" in (files("dmoa") / "docs" / "api.md").read_text(encoding="utf-8")
    assert not [one for one in found["cells"] if one["why"] and not one["cannot"]]
