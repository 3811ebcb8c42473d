"""References: `dmoa docs`, the annotated pool, tables of fields and routes, and the list of benches."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field

import dmoa as package
from dmoa.cli.bench import _METRICS
from dmoa.config import Config, LlmConfig, loads
from dmoa.engine_options import Node
from dmoa.trace import ReplyAgent, ReplyDmoa, ReplyStep
from dmoa.workflows.reference import field_table, guides, show_markdown, subject

DOCS = Path(package.__file__).parent / "docs"


def test_docs_list_every_guide_with_a_line(dmoa: Any, tmp_path: Path) -> None:
    result = dmoa("docs", "--json", tmp_path / "d.json")
    assert result.exit_code == 0
    assert {path.stem for path in DOCS.glob("*.md")} == set(guides())
    for name, text in guides().items():
        assert re.search(rf"^{name} +{re.escape(subject(text))}$", result.stdout, re.M)
        assert len(subject(text)) <= 130
    listed = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert [row["topic"] for row in listed] == list(guides())


def test_docs_print_a_guide_as_it_is_into_a_pipe(dmoa: Any) -> None:
    assert dmoa("docs", "limits").stdout == (DOCS / "limits.md").read_text(encoding="utf-8")


def test_docs_answer_an_unknown_topic_with_the_nearest(dmoa: Any) -> None:
    result = dmoa("docs", "servin")
    assert result.exit_code == 2
    assert "did you mean 'serving'?" in result.stderr


def test_markdown_is_rendered_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(other, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        show_markdown("# A title\n\n| a | b |\n|---|---|\n| `x` | **y** |\n")
        terminal.flush()
        shown = os.read(main, 65536).decode()
    os.close(main)
    assert "A title" in shown
    assert "\x1b[" in shown
    assert not set("#`*|") & set(shown)


def test_guides_are_package_data() -> None:
    settings = (DOCS.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"docs/*.md"' in settings


def example(dmoa: Any) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(dmoa("schema", "pool", "--example").stdout)
    return tree


def sections(node: Node, tree: Any, where: str) -> Iterator[tuple[str, Node, Any]]:
    """Every record of the pool with the part of the file that it was read from; of LLMs and agents the first."""
    yield where, node, tree
    for name in type(node).model_fields:
        value = getattr(node, name)
        if isinstance(node, LlmConfig) and name == "engine_kwargs":
            value = node.options
        if isinstance(value, Node):
            yield from sections(value, tree[name], f"{where}.{name}")


def test_the_annotated_pool_names_every_field(dmoa: Any) -> None:
    tree = example(dmoa)
    config = loads(yaml.safe_dump(tree, sort_keys=False))
    found = list(sections(config, tree, "pool"))
    found += list(sections(config.agents[0], tree["agents"][0], "agents.0"))
    found += list(sections(next(iter(config.llms.values())), next(iter(tree["llms"].values())), "llms"))
    found += [(name, llm.options, tree["llms"][name]["engine_kwargs"]) for name, llm in config.llms.items()]
    assert {type(node).__name__ for _, node, _ in found} >= {
        "Config", "LlmConfig", "AgentConfig", "AutoscalingConfig", "SamplingConfig", "ActivationConfig", "ServerConfig",
        "TransformersOptions", "VllmOptions", "OpenaiOptions", "ScriptedOptions",
    }  # fmt: skip
    for where, node, part in found:
        assert set(part) == set(type(node).model_fields), where


def test_the_annotated_values_are_the_defaults(dmoa: Any) -> None:
    shown = loads(yaml.safe_dump(example(dmoa), sort_keys=False))
    kept = {"engine", "model", "gpus"}
    bare = {
        "name": shown.name,
        "llms": {
            name: {field: getattr(llm, field) for field in kept}
            | ({"engine_kwargs": {"base_url": llm.engine_kwargs["base_url"]}} if llm.engine == "openai" else {})
            for name, llm in shown.llms.items()
        },
        "agents": [{"name": agent.name, "llm": agent.llm, "profile": agent.profile} for agent in shown.agents],
    }
    defaults = Config.model_validate(bare)
    no_options = {"engine_kwargs": {}}
    for name, llm in shown.llms.items():
        assert llm.options == defaults.llms[name].options
        assert llm.model_copy(update=no_options) == defaults.llms[name].model_copy(update=no_options)
    assert shown.model_copy(update={"llms": {}}) == defaults.model_copy(update={"llms": {}})


def test_the_annotated_pool_explains_every_field_once(dmoa: Any) -> None:
    text = dmoa("schema", "pool", "--example").stdout
    assert max(map(len, text.splitlines())) <= 130
    explained = {match[1] for match in re.finditer(r"^[ -]*(\w+):.*? # \S", text, re.M)}
    named = {match[1] for match in re.finditer(r"^[ -]*(\w+):", text, re.M)}
    assert named - explained <= {"local", "big", "far", "fake"}
    assert text.count("Most new tokens of one reply.") == 1
    assert "None" not in text


def test_an_example_is_of_a_pool_alone(dmoa: Any) -> None:
    result = dmoa("schema", "reply", "--example")
    assert result.exit_code == 2
    assert "--example" in result.stderr


class _Part(BaseModel, use_attribute_docstrings=True):
    """A part."""

    size: int | None = None
    """Its size | in metres."""


class _Whole(BaseModel, use_attribute_docstrings=True):
    """A whole."""

    name: str
    parts: list[_Part] = Field(default_factory=list)
    """All of them."""
    by_name: dict[str, _Part] = Field(default_factory=dict)


def test_a_table_shows_the_paths_of_all_fields() -> None:
    assert field_table(_Whole) == (
        "A whole.\n\n| field | holds | meaning |\n|---|---|---|\n"
        "| `name` | text |  |\n"
        "| `parts[]` |  | All of them. |\n"
        "| `parts[].size` | whole number or null | Its size \\| in metres. |\n"
        "| `by_name.NAME` |  | A part. |\n"
        "| `by_name.NAME.size` | whole number or null | Its size \\| in metres. |\n"
    )


def test_the_table_of_the_reply_has_every_field(dmoa: Any) -> None:
    text = dmoa("schema", "reply", "--table").stdout
    for prefix, record in (("", ReplyDmoa), ("steps[].", ReplyStep), ("steps[].agents[].", ReplyAgent)):
        for name in record.model_fields:
            assert re.search(rf"^\| `{re.escape(prefix + name)}(\[\])?` \|", text, re.M)


def test_the_api_is_the_document_of_the_server(dmoa: Any) -> None:
    tree = json.loads(dmoa("schema", "api").stdout)
    assert tree["openapi"].startswith("3.")
    assert "/v1/chat/completions" in tree["paths"]
    table = dmoa("schema", "api", "--table").stdout
    rows = re.findall(r"^\| `(\w+) (\S+)` \| \S.+ \| .*\b500\b.* \|$", table, re.M)
    assert rows == [(method.upper(), path) for path, operations in tree["paths"].items() for method in operations]


def test_benches_are_listed_without_measuring(dmoa: Any, tmp_path: Path) -> None:
    result = dmoa("bench", "--list", "--json", tmp_path / "b.json")
    assert re.findall(r"^\| ([\w.]+) \|", result.stdout, re.M)[1:] == list(_METRICS)
    assert [row["id"] for row in json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))] == list(_METRICS)
    assert len(dmoa("bench", "--list", "--only", "P1,P8").stdout.splitlines()) == 4


@pytest.mark.parametrize(
    ("id_", "bars"),
    [
        ("P1", [("gate", "BAR")]),
        ("P3", [("latency", "BAR")]),
        ("P4", [("latency", "P4_BAR")]),
        ("P5", [("throughput", "BAR")]),
        ("P7", [("prefix", "PREFILL_BAR"), ("prefix", "FIRST_TOKEN_BAR")]),
        ("P8", [("engine", "ENTROPY_BAR_NATS"), ("engine", "SHARE_BAR")]),
        ("P14", [("training", "BAR")]),
        ("P15", [("adaptation", "BAR")]),
        ("P15.real", [("adaptation", "BAR")]),
        ("P17", [("memory", "BAR")]),
        ("P18", [("engine", "SPEED_BAR")]),
        ("growth", [("latency", "GROWTH_BAR")]),
        ("otlp", [("tracing", "ON_BAR"), ("tracing", "OFF_BAR")]),
        ("prefill", [("prefix", "GROWTH_BAR")]),
    ],
)
def test_listed_bars_are_those_that_are_judged(id_: str, bars: list[tuple[str, str]]) -> None:
    listed = re.findall(r"[<>]= (\S+)( %)?", _METRICS[id_].bar)
    values = [float(number) / (100 if percent else 1) for number, percent in listed]
    assert values == pytest.approx([getattr(import_module(f"dmoa.bench.{home}"), name) for home, name in bars])
