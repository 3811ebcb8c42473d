"""Answers in a form that a client wants: JSON by a schema, and calls of the client's tools where an engine has no way of its own.

Schemas come from strangers: checking one, or a text by one, takes a bounded number of steps, reads nothing from elsewhere, and
regular expressions run in an engine whose time is linear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from dmoa.answer_form import FinalCall, ToolCall, new_call_id
from dmoa.errors import RequestError
from dmoa.reading import read_json

MAX_STEPS = 100_000
"""Most keywords that one check of a text may evaluate, some 0.2 s."""
MAX_PATTERN_CHARS = 512
MAX_CALLS = 32
"""Most calls of tools that one answer may hold."""
_SHOWN = 300
_STARTS = 16
"""Most places at which a JSON value is looked for in a text."""
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_REMOTE = ("$dynamicRef", "$recursiveRef")
Rule = Callable[[Any, Any, Any, Any], Iterator[Any] | None]


class _TooLongError(Exception):
    """A check that was given up."""


def schema_fault(schema: Mapping[str, Any]) -> str:
    """Return why texts cannot be checked by a JSON Schema, empty if they can."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema, format_checker=None)
        return next(_faults_of_parts(schema), "")
    except SchemaError as error:
        where = ".".join(map(str, error.absolute_path))
        return f"{where or 'the schema'}: {error.message[:_SHOWN]}"
    except RecursionError:
        return "it is nested too deeply"


def _faults_of_parts(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "patternProperties" in part:
            yield "patternProperties is not supported"
        if isinstance(pattern := part.get("pattern"), str) and _matcher(pattern) is None:
            why = f"it must be without look-around and of at most {MAX_PATTERN_CHARS} characters"
            yield f"pattern {pattern[:80]!r} is not supported; {why}"
        if any(name in part for name in _REMOTE) or not str(part.get("$ref", "#")).startswith("#"):
            yield "references must be $ref, to parts of the same schema"
        if "$id" in part:
            yield "$id is not supported"
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _faults_of_parts(inner)


@lru_cache(maxsize=256)
def _matcher(pattern: str) -> Any:
    """Return what looks for a pattern in a text in linear time; None where the engine cannot."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    if len(pattern) > MAX_PATTERN_CHARS:
        return None
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except SchemaError:
        return None


def value_fault(value: Any, schema: Mapping[str, Any]) -> str:
    """Return the first thing in which a JSON value does not match a schema without a fault, empty if it matches."""
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.exceptions import _WrappedReferencingError
    from jsonschema.validators import extend
    from referencing import Registry

    def pattern(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        matcher = _matcher(wanted) if isinstance(instance, str) else None
        if matcher is not None and not matcher.isinstance_python(instance):
            yield ValidationError(f"it does not match {wanted!r}")

    steps = 0

    def counted(rule: Rule) -> Rule:
        def run(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any] | None:
            nonlocal steps
            steps += 1
            if steps > MAX_STEPS:
                raise _TooLongError
            return rule(validator, wanted, instance, schema)

        return run

    rules = {name: counted(rule) for name, rule in {**Draft202012Validator.VALIDATORS, "pattern": pattern}.items()}
    checker = extend(Draft202012Validator, rules)(schema, registry=Registry())
    try:
        error = next(checker.iter_errors(value), None)
    except (_TooLongError, RecursionError):
        return "checking it by the schema takes too long"
    except _WrappedReferencingError as broken:
        return f"the schema refers to a part that it lacks: {str(broken)[:_SHOWN]}"
    return "" if error is None else f"{error.json_path}: {error.message[:_SHOWN]}"


def text_fault(text: str, schema: Mapping[str, Any]) -> str:
    """Return why a text is not JSON by a schema, empty if it is."""
    try:
        value = read_json(text)
    except ValueError as error:
        return f"it is not JSON ({str(error)[:_SHOWN]})"
    return value_fault(value, schema)


def unwrapped(text: str) -> str:
    """Return the JSON of a text that holds one value between fences or words, any other text as it is."""
    found = _FENCE.search(text)
    candidate = (found[1] if found else text).strip()
    value = next(_values(candidate), None)
    return text.strip() if value is None else candidate[value[0] : value[1]]


def _values(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yield start, end and value of the JSON objects and lists in a text, one behind the other."""
    decoder, end = json.JSONDecoder(), 0
    for found in list(re.finditer(r"[{\[]", text))[:_STARTS]:
        if found.start() < end:
            continue
        try:
            value, end = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        yield found.start(), end, value


def form_prompt(final: FinalCall, *, has_tools: bool) -> str:
    """Return what a model is told of the form of its answer; `has_tools`: of the tools as well."""
    parts = []
    if has_tools:
        choice = final.tool_choice
        rule = {"auto": "To answer without them, write the answer alone.", "required": "Call at least one of them."}
        tools = [{key: tool[key] for key in ("name", "description", "parameters") if tool.get(key)} for tool in final.tools]
        parts.append(
            f"These tools can be called: {json.dumps(tools, ensure_ascii=False)}\n"
            'To call them, write nothing but JSON: {"tool_calls": [{"name": "NAME", "arguments": {...}}]} '
            + rule.get(choice, f"Call {choice[1:]}.")
            + ("" if final.is_parallel else " Make one call only.")
        )
    if final.schema is not None:
        wanted = f" that matches this JSON Schema: {json.dumps(final.schema, ensure_ascii=False)}" if final.schema_name else ""
        parts.append(f"Write the answer as nothing but one JSON {'value' if final.schema_name else 'object'}{wanted}")
    return "\n".join(parts)


def form_brief(final: FinalCall) -> tuple[str, str]:
    """Return the form in a few words, and how a text in it begins, for a small model that is to go on with that.

    Both are empty where the beginning is not known. A small model copies a schema that it is shown.
    """
    if not final.tools or final.tool_choice == "auto":
        head = "" if final.schema is None else _opened(final.schema)
        return f"Write it as JSON{_keys(final.schema or {})}." if head else "", head
    names = [tool["name"] for tool in final.tools if final.tool_choice in ("required", f"={tool['name']}")]
    if len(names) != 1:
        tools = "; ".join(f"{tool['name']}{_keys(tool.get('parameters') or {})}" for tool in final.tools)
        return f"Call one of these tools, in JSON: {tools}.", '{"tool_calls": [{"name": "'
    parameters = next(tool.get("parameters") for tool in final.tools if tool["name"] == names[0]) or {}
    head = f'{{"tool_calls": [{{"name": {json.dumps(names[0])}, "arguments": {_opened(parameters) or "{"}'
    return f"Call the tool {names[0]}, in JSON{_keys(parameters)}.", head


def _keys(schema: Mapping[str, Any]) -> str:
    parts = {name: part for name, part in (schema.get("properties") or {}).items() if isinstance(part, dict)}
    named = ", ".join(f"{json.dumps(name)} ({part.get('type', 'any')})" for name, part in parts.items())
    return f" with {named}" if named else ""


def _opened(schema: Mapping[str, Any]) -> str:
    """Return the beginning of an object by a schema, up to the value of its first property."""
    if schema.get("type", "object") != "object":
        return ""
    properties = schema.get("properties") or {}
    name = next(iter((*schema.get("required", ()), *properties)), None)
    part = properties.get(name)
    is_text = isinstance(part, dict) and part.get("type") == "string"
    return "{" if name is None else f"{{{json.dumps(name)}:" + (' "' if is_text else "")


def completed(text: str) -> str:
    """Return JSON that broke off, or went on in other words, with what its end lacks; any other text as it is."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # Of a string without an end the error names the beginning.
        kept = text if error.msg.startswith("Unterminated") else text[: error.pos]
    except (ValueError, RecursionError):
        return text
    else:
        return text
    ends: list[str] = []
    for sign in re.findall(r'\\.|["{}\[\]]', kept, re.DOTALL):
        if ends and ends[-1] == '"':
            ends = ends[:-1] if sign == '"' else ends
        elif sign in '"{[':
            ends.append({"{": "}", "[": "]"}.get(sign, sign))
        elif ends and sign in "}]":
            ends.pop()
    whole = (kept if '"' in ends else kept.rstrip(" \t\n,")) + "".join(reversed(ends))
    try:
        json.loads(whole)
    except (ValueError, RecursionError):
        return text
    return whole


def calls_schema(final: FinalCall) -> dict[str, Any]:
    """Return the JSON Schema of what `form_prompt` asks for where tools must be called, for guided decoding."""
    allowed = [tool for tool in final.tools if final.tool_choice in ("auto", "required", f"={tool['name']}")]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": tool.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in allowed
    ]
    listed = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": MAX_CALLS if final.is_parallel else 1}
    return {"type": "object", "properties": {"tool_calls": listed}, "required": ["tool_calls"], "additionalProperties": False}


def calls_in(text: str, final: FinalCall) -> tuple[tuple[ToolCall, ...], str]:
    """Return the calls of tools that a text holds, and what is wrong with it; no calls and no fault: it is a plain answer.

    Read is what `form_prompt` asks for, one call or a list of calls as JSON, and calls between <tool_call> tags.
    """
    found = _calls(text, {tool["name"] for tool in final.tools})
    if not found:
        return (), "" if final.tool_choice == "auto" else "no tool is called"
    fault = _fault_of_calls(found, final)
    if fault:
        return (), fault
    made = (ToolCall(call_id=new_call_id(), name=call["name"], arguments=json.dumps(call["arguments"])) for call in found)
    return tuple(made), ""


def calls_fault(calls: Sequence[ToolCall], final: FinalCall) -> str:
    """Return what is wrong with calls that an engine read of what its model wrote, empty if nothing."""
    return _fault_of_calls([{"name": call.name, "arguments": _arguments(call.arguments)} for call in calls], final)


def _fault_of_calls(found: Sequence[Mapping[str, Any]], final: FinalCall) -> str:
    most = MAX_CALLS if final.is_parallel else 1
    if len(found) > most:
        return f"{len(found)} calls; expected at most {most}"
    return next(filter(None, (_call_fault(call, final) for call in found)), "")


def _calls(text: str, names: set[str]) -> list[dict[str, Any]]:
    """Return what in a text reads like calls of tools, well made or not."""
    tagged = [value for part in _TAGGED.findall(text) for _, _, value in _values(part)]
    values = tagged or [value for _, _, value in _values(_FENCE.sub(r"\1", text))]
    found: list[dict[str, Any]] = []
    for value in values:
        listed = value.get("tool_calls") if isinstance(value, dict) and "tool_calls" in value else value
        for call in listed if isinstance(listed, list) else [listed]:
            inner = call.get("function", call) if isinstance(call, dict) else None
            if (
                not isinstance(inner, dict)
                or not isinstance(inner.get("name"), str)
                or not {"arguments", "parameters"} & inner.keys()
            ):
                continue
            if inner["name"] in names or listed is not value or tagged:
                found.append({"name": inner["name"], "arguments": _arguments(inner.get("arguments", inner.get("parameters")))})
    return found


def _arguments(given: Any) -> Any:
    if not isinstance(given, str):
        return {} if given is None else given
    try:
        return read_json(given)
    except ValueError:
        return given


def _call_fault(call: Mapping[str, Any], final: FinalCall) -> str:
    name, arguments = call["name"], call["arguments"]
    tool = next((tool for tool in final.tools if tool["name"] == name), None)
    if tool is None or final.tool_choice not in ("auto", "required", f"={name}"):
        allowed = [tool["name"] for tool in final.tools] if final.tool_choice in ("auto", "required") else [final.tool_choice[1:]]
        return f"{str(name)[:80]!r} is called; expected {', '.join(allowed)}"
    if not isinstance(arguments, dict):
        return f"the arguments of {name} are not a JSON object"
    fault = value_fault(arguments, tool.get("parameters") or {})
    return f"the arguments of {name} do not match its parameters: {fault}" if fault else ""


def check_schemas(final: FinalCall, *, are_tools_checked: bool) -> None:
    """Check that texts can be checked by a client's schemas, of tools where dmoa itself checks calls. Raises RequestError."""
    asked: Sequence[tuple[str, Any]] = [("response_format", final.schema)]
    if are_tools_checked:
        asked = [*asked, *((f"tools[{number}]", tool.get("parameters")) for number, tool in enumerate(final.tools))]
    for param, schema in asked:
        fault = schema_fault(schema) if schema else ""
        if fault:
            raise RequestError(f"{param}: its schema cannot be used: {fault}", param=param, code="invalid_schema")
