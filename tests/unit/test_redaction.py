"""Secrets are taken out by field name and by shape; counts of tokens are not secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dmoa.redaction import REDACTED, redact, redact_text

SECRET = "s3cr3t-Value"


@pytest.mark.parametrize(
    "tree",
    [
        {"api_key": SECRET},
        {"API_KEY": SECRET},
        {"hf_token": SECRET},
        {"db": {"password": SECRET}},
        {"keys": [SECRET, SECRET]},
        {"auth_tokens": [SECRET]},
        {"secrets": {"name": SECRET}},
        {"credentials": {"inner": [{"deep": SECRET}]}},
        {"client_secret": SECRET.encode()},
        {"base_url": f"https://user:{SECRET}@example.org/v1"},
        {"state_uri": f"https://{SECRET}@example.org/v1"},
        {"url": f"https://example.org/v1?api_key={SECRET}&x=1"},
        {"line": f"--set 'llms.a.api_key=\"two {SECRET}\"'"},
        {"command": f"dmoa evaluate --set llms.a.engine_kwargs.api_key={SECRET} --limit 8"},
        {"header": f"Bearer {SECRET}"},
        {"note": f"sk-{SECRET}"},
    ],
    ids=str,
)
def test_a_secret_is_gone(tree: dict[str, Any]) -> None:
    clean = json.dumps(redact(tree))
    assert SECRET not in clean
    assert REDACTED in clean


def test_a_number_that_is_a_password_is_gone() -> None:
    assert redact({"password": 1234}) == {"password": REDACTED}


def test_what_is_no_secret_stays() -> None:
    tree = {
        "max_tokens": 96,
        "budget_tokens": None,
        "tokenizer": "gpt2",
        "tokens": {"a": 1},
        "api_key": None,
        "use_token": True,
        "model": "embedded:smollm2-135m",
        "base_url": "https://example.org/v1",
        "command": "dmoa evaluate --set sampling.max_tokens=96 --limit 8",
        "list": [1, 2.5, "x"],
    }
    assert redact(tree) == tree


def test_other_values_become_plain() -> None:
    assert redact({"path": Path("a/b"), "pair": (1, 2)}) == {"path": "a/b", "pair": [1, 2]}


def test_the_rest_of_a_text_is_kept() -> None:
    assert redact_text("see https://me:pw@host/x?token=abc&y=2 now") == f"see https://{REDACTED}@host/x?token={REDACTED}&y=2 now"
