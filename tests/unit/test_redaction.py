"""Secrets are taken out by field name and by shape; counts of tokens are not secrets."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.validation import REDACTED, Conceal, redact, redact_command, redact_text

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
        {"auth_tokens": {"prod": SECRET}},
        {"auth_tokens": {"prod": {"eu": [SECRET]}, "spare": (SECRET,)}},
        {"accessTokens": {"prod": SECRET, "max_tokens": SECRET}},
        {"tokens": {"prod": SECRET}},
        {"passwords": [SECRET, {"old": SECRET}]},
        {"apiKeys": {"a": {"b": {"c": SECRET}}}},
        {"private_keys": {"a", SECRET}},
        {"creds": {"user": SECRET}},
        {"id_token": SECRET},
        {"line": f"api_key: {SECRET}"},
        {"line": f"token: {SECRET}"},
        {"line": f"password={SECRET}"},
        {"line": f"Secret : '{SECRET}'"},
        {"line": f"x-api-key: {SECRET}"},
        {"line": f"DMOA_API_KEYS=first-key, {SECRET}"},
        {"line": f"DMOA_API_KEYS=first-key,{SECRET}, third"},
        {"line": f"<password>{SECRET}</password>"},
        {"line": f"<db:apiKey>{SECRET}</db:apiKey>"},
        {"line": f"curl -u me:{SECRET} https://example.org"},
        {"line": f"curl --user 'me:{SECRET}' https://example.org"},
        {"line": f"the API key: {SECRET} is wrong"},
        {"line": f"Incorrect API key provided: {SECRET}."},
        {"line": f"Authorization: token {SECRET}"},
        {"line": f"authorization: basic {SECRET}"},
        {"line": f"bearer {SECRET}"},
        {"line": f"dmoa serve --api-key {SECRET} --port 1"},
        {"line": f"OPENAI_API_KEY={SECRET} dmoa serve"},
        {"line": json.dumps({"auth_tokens": {"prod": SECRET}, "n": 1})},
        {"line": json.dumps({"a": {"secrets": {"b": {"c": "x"}, "d": SECRET}}})},
        {"line": json.dumps(json.dumps({"api_key": f"{SECRET} and more", "n": 1}))},
        {"line": f"api_key: '{SECRET} cut off"},
        {"line": f"postgres://me:{SECRET}@host/db"},
        {"line": f"https:\\/\\/me:{SECRET}@host\\/db"},
        {"line": f"https://bucket/x?X-Amz-Signature={SECRET}&y=2"},
    ],
    ids=lambda tree: str(next(iter(tree))),
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
        "prompt_tokens": 11,
        "completion_tokens": "11",
        "completion_tokens_details": {"reasoning_tokens": 2, "kind": "text"},
        "auth_tokens": {"number": 3},
        "eos_token": "</s>",
        "token_ids": [1, 2],
        "stop_tokens": ["</s>"],
        "monkey": "george",
        "turkeys": ["tom"],
        "keyboard": "us",
        "num_key_value_heads": 2,
        "num_keys": 4,
    }
    assert redact(tree) == tree


def test_other_values_become_plain() -> None:
    assert redact({"path": Path("a/b"), "pair": (1, 2)}) == {"path": "a/b", "pair": [1, 2]}


def test_the_rest_of_a_text_is_kept() -> None:
    assert redact_text("see https://me:pw@host/x?token=abc&y=2 now") == f"see https://{REDACTED}@host/x?token={REDACTED}&y=2 now"


@pytest.mark.parametrize(
    "secret",
    [
        *(
            f"{mark}abcDEF0123456789abcd"
            for mark in ("gho_", "ghp_", "ghs_", "ghu_", "ghr_", "github_pat_11A_", "glpat-", "AIza", "hf_")
        ),
        *(
            f"{mark}abcDEF0123456789abcd"
            for mark in ("xoxb-", "xoxp-", "xapp-", "sk-", "sk-proj-", "sk-ant-", "sk_live_", "ya29.")
        ),
        "AKIAIOSFODNN7EXAMPLE",
        "ASIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl-_x",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\n-----END RSA PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("text", ["{}", "see {}, please", "'{}'", "a/{}/b", "x={}", "line\\n{}", "Basic: {}", '{{"note": "{}"}}'])
def test_keys_of_known_shapes_are_gone_wherever_they_stand(secret: str, text: str) -> None:
    clean = redact_text(text.format(secret))
    assert secret not in clean
    assert clean == text.format(REDACTED)


S = "Zx9Qw7Er5Ty3Ui1Op0"


@pytest.mark.parametrize(
    "text",
    [
        f"postgres://me:a/{S}@host/db",
        f"Cookie: a=1; sid={S}",
        f"[('Authorization', '{S}'), (b'x-api-key', b'{S}')]",
        f'Authorization: Digest username="me", response="{S}"',
        f"Authorization: Negotiate {S}",
        f"Authorization: AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/2020, SignedHeaders=host, Signature={S}",
        f"cut off\nMIIE{S}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n{S}\n-----END PGP PRIVATE KEY BLOCK-----",
        *(
            f"{mark}{S}"
            for mark in ("GOCSPX-", "whsec_", "hvs.", "dp.pt.", "dapi", "shpat_", "lin_api_", "figd_", "NRAK-", "fw_")
        ),
        f"https://hooks.slack.com/services/T00000000/B00000000/{S}",
        f"https://discord.com/api/webhooks/123456789012345678/{S}",
        f"https://api.telegram.org/bot123456789:AA{S}{S}/send",
        f"machine example.org login me password {S}",
        f'{{"auths": {{"example.org": {{"auth": "{S}"}}}}}}',
        f"api_key: |\n  {S}\n  more",
        f"api_keys:\n  - {S}\n  - other\nnext: 1",
        f"api_keys:\n- {S}\nnext: 1",
        f"a:\n  password:\n    {S}\n  b: 1",
        f"api_key='{S[:9]}'\n        '{S[9:]}'",
        f"SecretStr('{S}')",
        f"curl -b 'sid={S}' example.org",
        f'<add key="ApiKey" value="{S}"/>',
        f"<apiKey><![CDATA[{S}]]></apiKey>",
        f"api_key=&quot;{S}&quot;",
        f"the passphrase is {S}",
        f"DB_PASS={S}",
        f"secret%3D{S}",
        f'{{"name": "API_KEY", "value": "{S}"}}',
        f"name: DMOA_API_KEYS\n  value: {S}",
        f"X-Goog-Signature={S}",
    ],
)
def test_more_shapes_are_gone(text: str) -> None:
    clean = redact_text(text)
    assert S not in clean
    assert S[9:] not in clean
    assert REDACTED in clean
    assert redact_text(clean) == clean


@pytest.mark.parametrize("login", ["dXNlcjpwYXNz", "dXNlcjpwYXNzd29yZA==", "bWU6cw=="])
def test_a_basic_login_is_gone(login: str) -> None:
    assert redact_text(f"sent Basic {login} to it") == f"sent Basic {REDACTED} to it"


@pytest.mark.parametrize(
    "text",
    [
        "Basic arithmetic and basic English",
        "The key: be brief. Two keys: a, b",
        "max_tokens: 5 is less than prompt_tokens: 11, completion_tokens=3",
        '{"usage": {"prompt_tokens": 11, "total_tokens": 14}, "tokens": {"a": 1}}',
        "tokens=96, tokenizer=gpt2, tokenizer: gpt2",
        "monkey: george, donkey=1, --monkey george",
        "if token == 5: pass",
        "a task-force of risk-takers; hf_hub_download; std::token",
        "api_key: null, token=None",
        "https://example.org/a@b, me@example.org, 12:30",
        "1. Bearings; the bearer of news",
        "dmoa evaluate --max-tokens 96 --budget cpu",
        "http://127.0.0.1:8000/v1/a@b and http://[::1]:8000/a@b",
        "[\"api_key\", \"model\"], ('model', 'a1b2c3d4e5')",
        "pass: yes, pass: 3 of 5, auth: none, the secret is that nobody knows",
        "steps:\n  - one\ntokens:\n  a: 1\n  b: 2\n",
        "name: agent, value: a1b2c3d4",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    assert redact_text(text) == text


PARTS = [*"=,{}[]@'\" \n\\x", ": ", "//", "--", "api_key", "token", "auth_tokens", " sk-aaaaaaaaa", "Bearer "]


@given(st.lists(st.sampled_from(PARTS), max_size=14))
def test_what_is_clean_stays_as_it_is(parts: list[str]) -> None:
    clean = redact_text("".join(parts))
    assert " sk-aaaaaaaaa" not in clean
    assert redact_text(clean) == clean


@pytest.mark.parametrize(
    "part",
    [
        "a",
        "key ",
        'a=\\"',
        "{",
        "api_key={",
        "//",
        "\\",
        "token='",
        "Basic ",
        "max_tokens={",
        "tokens=[1,",
        "key-",
        "<a>",
        "-u ",
        "keys=a,",
        "//:",
        "//a",
        "-----END PRIVATE KEY-----",
        "MIIE",
        "password:\n",
        "password:\n  a\n",
        "key='a'\n",
        "('key','",
        "name: a, ",
        "cookie: ",
        'authorization: a="',
        "&quot;",
        "curl -b ",
        "password ",
    ],
)
def test_a_long_text_takes_time_in_proportion_to_its_length(part: str) -> None:
    started = time.process_time()
    redact_text(part * (100_000 // len(part)))
    assert time.process_time() - started < 5  # of quadratic work it would be minutes


def test_the_value_is_replaced_and_what_is_around_it_kept() -> None:
    assert redact_text('{"api_key": "x y", "n": 1}') == f'{{"api_key": "{REDACTED}", "n": 1}}'
    assert redact({"sk-aaaaaaaaa": 1, "auth_tokens": {"prod": "x", "n": 3}}) == {
        REDACTED: 1,
        "auth_tokens": {"prod": REDACTED, "n": 3},
    }
    assert redact({"auth_tokens": {"password": 1234}}) == {"auth_tokens": {"password": REDACTED}}


def test_a_command_line_has_no_secret() -> None:
    words = ["dmoa", "run", "--api-key", "two words", "--set", "llms.a.token=two words", "--set", "llms.a.max_tokens=5", "it's"]
    assert shlex.split(redact_command(words)) == [
        "dmoa", "run", "--api-key", REDACTED, "--set", f"llms.a.token={REDACTED}", "--set", "llms.a.max_tokens=5", "it's",
    ]  # fmt: skip


def test_a_secret_that_is_known_is_taken_out_alone() -> None:
    assert Conceal("")("nothing") == "nothing"
    assert Conceal("k")("keys like k, k2") == f"keys like {REDACTED}, k2"
    assert Conceal("Zq9wTr4kV")("a Zq9wTr4kV, b") == f"a {REDACTED}, b"
