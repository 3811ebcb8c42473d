"""References made from the records themselves, the annotated pool and tables of fields and routes, and the guides."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dmoa.config import AgentConfig, Config, LlmConfig
from dmoa.engine_options import Node

_GUIDES = ("configuration", "serving", "api", "learning", "guards", "evaluation", "extending", "operations", "limits")
_COLUMN = 40
_WIDTH = 130
_POOL: dict[str, Any] = {
    "name": "everything",
    "llms": {
        "local": {},
        "big": {"model": "hub:openai/gpt-oss-120b", "engine": "vllm", "gpus": 1},
        "far": {
            "model": "openai:gpt-oss-120b",
            "engine": "openai",
            "engine_kwargs": {"base_url": "https://api.example.com/v1"},
        },
        "fake": {"model": "scripted:fake", "engine": "scripted"},
    },
    "agents": [
        {"name": "solver", "llm": "local", "profile": "Solves arithmetic and word problems step by step."},
        {"name": "echo", "llm": "fake", "profile": "Repeats the question."},
    ],
}
"""What has no default, and an LLM of every engine."""
_HEAD = """\
# Every field of a pool, with what it means. The values are the defaults, but for names, profiles, and the model, engine and
# GPUs of each LLM. Unknown keys are refused. A pool needs `name`, `llms` and `agents`, and an agent its `name`, `llm` and
# `profile`; leave out what you do not change.
"""


def pool_example() -> str:
    """Return a pool file that names every field, its meaning as a comment beside it.

    What a field means is said once, and of a second LLM or agent only what differs is shown.
    """
    config = Config.model_validate(_POOL)
    return _HEAD + "\n".join(_mapping(config, depth=0, explained=set())) + "\n"


def _mapping(node: Node, *, depth: int, explained: set[type[Node]], is_whole: bool = True) -> Iterator[str]:
    """Yield the lines of a record: all of its fields, or those that were given; with their meaning for the first of its kind."""
    has_meaning = type(node) not in explained
    explained.add(type(node))
    for name, field in type(node).model_fields.items():
        if not is_whole and name not in node.model_fields_set and name != "engine_kwargs":
            continue
        value = node.options if isinstance(node, LlmConfig) and name == "engine_kwargs" else getattr(node, name)
        key = f"{'  ' * depth}{name}:"
        if isinstance(value, Node):
            if name == "engine_kwargs":
                yield _commented(key, value.__doc__ or "")
            else:
                yield _commented(key, _meaning(field, type(value)) if has_meaning else "")
            yield from _mapping(value, depth=depth + 1, explained=explained)
        elif name == "llms":
            yield _commented(key, "By names of your own; an agent says by name which one it runs on.")
            for llm, part in value.items():
                yield f"  {llm}:"
                yield from _mapping(part, depth=2, explained=explained, is_whole=LlmConfig not in explained)
        elif name == "agents":
            yield _commented(key, "In this order everywhere, also in a gate's checkpoint.")
            for agent in value:
                first, *rest = _mapping(agent, depth=2, explained=explained, is_whole=AgentConfig not in explained)
                yield from (f"  - {first.removeprefix('    ')}", *rest)
        else:
            yield _commented(f"{key} {_scalar(value)}", _meaning(field) if has_meaning else "")


def _scalar(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _meaning(field: FieldInfo, section: type[Node] | None = None) -> str:
    """Return the allowed words of a field, where its text does not name them all, and its text."""
    text = re.sub(r"\bNone\b", "null", field.description or (section.__doc__ if section else None) or "")
    words = [str(word) for word in _words(field.annotation)]
    if not all(re.search(rf"\b{re.escape(word)}\b", text) for word in words):
        text = f"{' | '.join(words)}. {text}"
    return " ".join(text.split())


def _words(annotation: Any) -> list[Any]:
    """Return the words that a field may hold, none where it is not a choice of words."""
    parts = get_args(annotation)
    if get_origin(annotation) is tuple:
        return _words(parts[0])
    return list(parts) if parts and not any(isinstance(part, type) or get_args(part) for part in parts) else []


def _commented(line: str, meaning: str) -> str:
    if not meaning:
        return line
    first = f"{line} " if len(line) >= _COLUMN else line.ljust(_COLUMN)
    return textwrap.fill(
        meaning,
        width=_WIDTH,
        initial_indent=f"{first}# ",
        subsequent_indent=f"{' ' * _COLUMN}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def field_table(record: type[BaseModel]) -> str:
    """Return the fields of a record and of those in it as a Markdown table: path, what it holds, meaning."""
    schema = record.model_json_schema()
    about = f"{' '.join(schema.get('description', '').split())}\n\n" if schema.get("description") else ""
    rows = (f"| {_code(path)} | {kind} | {text} |\n" for path, kind, text in _fields(schema, schema.get("$defs", {}), ""))
    return f"{about}| field | holds | meaning |\n|---|---|---|\n{''.join(rows)}"


def _fields(schema: Mapping[str, Any], records: Mapping[str, Any], above: str) -> Iterator[tuple[str, str, str]]:
    for name, part in schema.get("properties", {}).items():
        suffix, inner, kind = _inside(part, records)
        text = part.get("description") or inner.get("description", "")
        yield f"{above}{name}{suffix}", kind, " ".join(text.split()).replace("|", "\\|")
        yield from _fields(inner, records, f"{above}{name}{suffix}.")


def _inside(part: Mapping[str, Any], records: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str]:
    """Return what a field's path ends with, the record in it (empty: none) and, in words, what it holds."""
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        found = records[name]
        return "", (found if "properties" in found else {}), ("" if "properties" in found else _kind(found))
    choices = [choice for choice in part.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) == 1:
        suffix, inner, kind = _inside(choices[0], records)
        return suffix, inner, f"{kind or 'record'} or null"
    if part.get("type") == "array" and "items" in part:
        suffix, inner, kind = _inside(part["items"], records)
        return f"[]{suffix}", inner, kind
    if part.get("type") == "object" and isinstance(part.get("additionalProperties"), dict):
        suffix, inner, kind = _inside(part["additionalProperties"], records)
        return f".NAME{suffix}", inner, kind
    return "", {}, _kind(part)


def _kind(part: Mapping[str, Any]) -> str:
    if "enum" in part or "const" in part:
        return ", ".join(_code(str(word)) for word in part.get("enum", [part.get("const")]))
    kind = str(part.get("type", ""))
    return {"string": "text", "integer": "whole number", "boolean": "true or false"}.get(kind, kind)


def route_table(document: Mapping[str, Any]) -> str:
    """Return the routes of an OpenAPI document as a Markdown table: route, what it does, statuses beside 200."""
    rows = (
        f"| {_code(f'{method.upper()} {path}')} | {operation.get('description', '')} | {_statuses(operation)} |\n"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    return f"| route | does | statuses |\n|---|---|---|\n{''.join(rows)}"


def _statuses(operation: Mapping[str, Any]) -> str:
    return ", ".join(sorted(status for status in operation["responses"] if status != "200"))


def _code(text: str) -> str:
    return f"`{text}`"


def guides() -> dict[str, str]:
    """Return the guides that dmoa ships as Markdown, by topic, in the order to read them in."""
    found = {name: files("dmoa").joinpath("docs", f"{name}.md") for name in _GUIDES}
    return {name: file.read_text(encoding="utf-8") for name, file in found.items() if file.is_file()}


def subject(guide: str) -> str:
    """Return what a guide is about: the first sentence under its heading."""
    return " ".join(guide.split("\n\n")[1].split()).partition(". ")[0].removesuffix(".") + "."


def show_markdown(text: str) -> None:
    """Print Markdown: rendered on a terminal, as it is in a pipe."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        typer.echo(text.removesuffix("\n"))
