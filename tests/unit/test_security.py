"""What `make check` asks of the repository: no secret in a file, no dependency with an advisory that `tests/advisories.json` has.

The list holds old advisories alone, each as the database has it that its name comes from. What is known today `make audit` asks
for, which needs the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PLACES = ("dmoa", "jobs", "cluster", "tests", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "serve_app.py")
SECRETS = {
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{22,}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{20,}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a JWT": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY",
    "a package index with a password": r"https?://[^\s/:@\"']+:[^\s/:@\"'{]+@(?!host|proxy|example)[\w.-]+/",
}
MADE_UP = {
    "tests/contract/training/test_import_logs.py",
    "tests/unit/agents/test_openai_endpoint.py",
    "tests/unit/serving/test_failures.py",
    "tests/unit/test_config.py",
    "tests/unit/test_redaction.py",
    "tests/unit/test_security.py",
}
"""Files that hold made-up secrets, to see them redacted."""


def secrets_in(text: str) -> list[str]:
    """Return what kinds of secrets a text holds."""
    return [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]


def text_files() -> Iterator[Path]:
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*")) if (ROOT / place).is_dir() else [ROOT / place]:
            if path.is_file() and "__pycache__" not in path.parts and b"\0" not in (head := path.read_bytes()[:4096]) and head:
                yield path


@pytest.mark.contract
def test_no_file_holds_a_secret() -> None:
    found = {}
    for path in text_files():
        name = str(path.relative_to(ROOT))
        kinds = secrets_in(path.read_text(encoding="utf-8", errors="replace"))
        if kinds and name not in MADE_UP:
            found[name] = kinds
    assert found == {}
    assert {name for name in MADE_UP if not (ROOT / name).is_file()} == set(), "a name of the list is out of date"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("key = 'AKIAIOSFODNN7EXAMPLE'", "an AWS key"),
        ("hf_" + "a1B2" * 9, "a Hugging Face token"),
        ("ghp_" + "a" * 36, "a GitHub token"),
        ("OPENAI_API_KEY=sk-proj-" + "x" * 24, "an API key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("extra = https://me:secret@mirror.corp.test/files", "a package index with a password"),
    ],
)
def test_what_a_secret_looks_like(text: str, kind: str) -> None:
    assert secrets_in(text) == [kind]


@pytest.mark.parametrize("text", ["sk-short", "risk-assessment-of-all-the-agents", "https://host:8000/v1/", "hf_hub_download"])
def test_what_none_looks_like(text: str) -> None:
    assert secrets_in(text) == []


def advisories() -> tuple[date, list[dict[str, str]]]:
    tree = json.loads((ROOT / "tests" / "advisories.json").read_text(encoding="utf-8"))
    return date.fromisoformat(tree["date"]), tree["advisories"]


def hit(installed: dict[str, str], known: list[dict[str, str]]) -> list[str]:
    """Return the advisories that installed versions fall under."""
    return [
        f"{one['package']} {installed[one['package']]}: {one['id']}"
        for one in known
        if one["package"] in installed and SpecifierSet(one["affected"]).contains(installed[one["package"]], prereleases=True)
    ]


def test_no_dependency_has_an_advisory_of_the_list() -> None:
    """Of the whole environment: what a direct dependency brings along is run too."""
    when, known = advisories()
    assert when <= date.today()
    installed = {canonicalize_name(one.name): one.version for one in metadata.distributions()}
    assert {"torch", "ray", "starlette"} <= installed.keys()
    assert hit(installed, known) == []
    assert all(canonicalize_name(one["package"]) == one["package"] for one in known), "else it would never be found"


def test_an_old_version_is_found() -> None:
    _, known = advisories()
    assert hit({"pyyaml": "5.3.1", "requests": "2.31.0", "starlette": "0.26.1"}, known) == [
        "pyyaml 5.3.1: GHSA-8q59-q68h-6hv4",
        "starlette 0.26.1: PYSEC-2023-83",
    ]
