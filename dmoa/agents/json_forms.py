"""Answers in a form that a client wants: JSON by a schema, and calls of the client's tools where an engine has no way of its own.

Schemas come from strangers: checking one, or a text by one, takes a bounded number of steps, reads nothing from elsewhere, and
regular expressions run in an engine whose time is linear.
"""

from __future__ import annotations

import copy
import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from dmoa.answer_form import FinalCall, ToolCall, new_call_id
from dmoa.errors import RequestError
from dmoa.reading import read_json

MAX_STEPS = 100_000
"""Most keywords and values of all schemas of a request together, and most keywords that the checks of one answer evaluate."""
MAX_CHECK_S = 1.0
"""Processor time after which those checks are given up: a keyword may take as long as a schema, or a text, is large."""
MAX_PATTERN_CHARS = 512
MAX_CALLS = 32
"""Most calls of tools that one answer may hold."""
_SHOWN = 300
_STARTS = 16
"""Most places of a text at which a JSON value may be looked for in vain."""
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_MAX_REPEATS = 1000
"""Product of all counts of repeats in a pattern that dmoa cannot check, but an engine may make a grammar of."""
_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_ONE = ("additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames", "then")
"""Keywords that hold a schema."""
_LISTED, _NAMED = ("allOf", "anyOf", "oneOf", "prefixItems"), ("$defs", "definitions", "dependentSchemas", "properties")
"""Keywords that hold a list of schemas, and those that hold an object of them, by names that are no keywords."""
_NOWHERE = object()
Rule = Callable[[Any, Any, Any, Any], Iterator[Any] | None]


class _TooLongError(Exception):
    """A check that was given up."""


class Budget:
    """What the checks of one request, or of one answer, may take together, in one thread."""

    def __init__(self) -> None:
        self._steps, self._until_s = 0, math.inf
        self.matchers: dict[str, tuple[Any, str]] = {}
        """By pattern; not kept for longer, because one may take ten megabytes."""

    def spend(self, steps: int = 1) -> None:
        """Count steps. Raises an error of this module's own where there were too many."""
        if not self._steps:  # from here on: what the first check of a process imports is not counted
            self._until_s = time.thread_time() + MAX_CHECK_S
        self._steps += steps
        if self._steps > MAX_STEPS or time.thread_time() > self._until_s:
            raise _TooLongError

    def hurry(self, seconds: float) -> None:
        """Take away some of the time."""
        self._until_s -= seconds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value) and len(set(value)) == len(value)


def _is_type(value: Any) -> bool:
    return value in _TYPES if isinstance(value, str) else _are_names(value) and bool(value) and set(value) <= {*_TYPES}


def _lists_names(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_are_names, value.values()))


_KINDS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (" ".join(_LISTED), "a list of schemas, not empty", lambda value: isinstance(value, list) and bool(value)),
    (" ".join(_NAMED), "an object of schemas", lambda value: isinstance(value, dict)),
    ("type", f"one or several of {', '.join(_TYPES)}", _is_type),
    ("enum examples", "a list", lambda value: isinstance(value, list)),
    ("required", "a list of different names", _are_names),
    ("dependentRequired", "an object of lists of different names", _lists_names),
    ("exclusiveMaximum exclusiveMinimum maximum minimum", "a number", _is_number),
    ("multipleOf", "a number above 0", lambda value: _is_number(value) and value > 0),
    (
        "maxContains maxItems maxLength maxProperties minContains minItems minLength minProperties",
        "a whole number, 0 or more",
        lambda value: _is_number(value) and value >= 0 and value == value // 1,
    ),
    ("deprecated readOnly uniqueItems writeOnly", "true or false", lambda value: isinstance(value, bool)),
    (
        "$anchor $comment $dynamicAnchor $ref $schema contentEncoding contentMediaType description format pattern title",
        "a text",
        lambda value: isinstance(value, str),
    ),
)
_KEYWORDS = {name: (expected, fits) for names, expected, fits in _KINDS for name in names.split()}


def schema_fault(schema: Any, budget: Budget | None = None) -> str:
    """Return why texts cannot be checked by a JSON Schema (draft 2020-12), empty if they can.

    Read are the places where schemas stand and those that are referred to: names of properties and examples are no keywords.
    """
    budget, seen = budget or Budget(), set[int]()
    left: deque[tuple[tuple[str | int, ...], Any]] = deque([((), schema)])
    try:
        while left:
            at, part = left.popleft()
            if isinstance(part, bool) or id(part) in seen:
                continue
            seen.add(id(part))
            fault = next(_faults(part, schema, budget), "")
            if fault:
                return ".".join(map(str, at))[:_SHOWN] + (": " if at else "") + fault
            left.extend(((*at, *inner), one) for inner, one in _parts(part, schema))
    except _TooLongError:
        return f"it, or all of the request together, is of more than {MAX_STEPS} parts, or its patterns are too large"
    return ""


def _faults(part: Any, schema: Any, budget: Budget) -> Iterator[str]:
    """Yield what is wrong with one schema in a schema, the schemas in it aside."""
    if not isinstance(part, dict):
        yield f"{repr(part)[:80]} is no schema; expected an object, true or false"
        return
    for name, value in part.items():
        budget.spend(1 + _extent(value))
        expected, fits = _KEYWORDS.get(name, ("", None))
        if fits is not None and not fits(value):
            yield f"{name} is {repr(value)[:80]}; expected {expected}"
        elif name in ("$id", "patternProperties", "unevaluatedItems"):
            yield f"{name} is not supported"
        elif name in ("$dynamicRef", "$recursiveRef") or (name == "$ref" and _target(schema, value) is _NOWHERE):
            yield f"{name} is {repr(value)[:80]}; references must be $ref, to parts of the same schema that are there"
        elif name == "pattern" and (why := _fault_of_pattern(value, budget)):
            yield f"pattern {value[:80]!r} is not supported; {why}"


def _extent(value: Any) -> int:
    """Return how many values a keyword holds next to it."""
    inner = value.values() if isinstance(value, dict) else ()
    return len(value) + sum(len(one) for one in inner if isinstance(one, list)) if isinstance(value, dict | list) else 0


def _parts(part: Mapping[str, Any], schema: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the schemas in one schema of a schema, and what it refers to, each with its place."""
    yield from (((name,), part[name]) for name in (*_ONE, "unevaluatedProperties") if name in part)
    for name in _LISTED:
        yield from (((name, number), one) for number, one in enumerate(part.get(name, ())))
    for name in _NAMED:
        yield from (((name, key), one) for key, one in part.get(name, {}).items())
    if "$ref" in part and (target := _target(schema, part["$ref"])) is not None:
        yield ("$ref",), target


def _target(schema: Any, reference: str) -> Any:
    """Return what a reference leads to, `_NOWHERE` where that is no part of the schema; None for an anchor, which has a name."""
    if not reference.startswith("#/"):
        return None if reference.startswith("#") else _NOWHERE
    found = schema
    for name in unquote(reference[2:]).split("/"):
        if isinstance(found, list) and name.isdecimal() and len(name) < 10 and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict):
            found = found.get(name.replace("~1", "/").replace("~0", "~"), _NOWHERE)
        else:
            return _NOWHERE
    return _NOWHERE if found is None else found


def _fault_of_pattern(pattern: str, budget: Budget) -> str:
    """Return why a pattern is refused. One with look-around, as clients write of addresses, is taken but never looked for."""
    if len(pattern) > MAX_PATTERN_CHARS:
        return f"it must be of at most {MAX_PATTERN_CHARS} characters"
    matcher, why = _matcher(pattern, budget)
    if matcher is not None:
        return ""
    if not ("look-around" in why or "backreferences" in why):
        return f"it is broken, or too large ({why.strip()[:80]})"
    is_large = math.prod(max(1, int(count)) for count in re.findall(r"[{,](\d{1,9})", pattern)) > _MAX_REPEATS
    return f"with look-around or a backreference its counts of repeats may make {_MAX_REPEATS} at most" if is_large else ""


def _matcher(pattern: str, budget: Budget) -> tuple[Any, str]:
    """Return what looks for a pattern in a text in linear time; None where the engine cannot, and why."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    if pattern not in budget.matchers:
        started_s = time.thread_time()
        try:
            budget.matchers[pattern] = SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex")), ""
        except SchemaError as error:
            budget.matchers[pattern] = None, str(error).splitlines()[-1]
        budget.hurry(3 * (time.thread_time() - started_s))  # what takes long to make takes much memory
    return budget.matchers[pattern]


def value_fault(value: Any, schema: Mapping[str, Any], budget: Budget | None = None) -> str:
    """Return the first thing in which a JSON value does not match a schema without a fault, empty if it matches."""
    from jsonschema.exceptions import _WrappedReferencingError
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        error = next(_checker(budget or Budget())(schema, registry=Registry()).iter_errors(value), None)
    except (_TooLongError, RecursionError):
        return "checking it by the schema takes too long"
    except (_WrappedReferencingError, Unresolvable) as broken:
        return f"the schema refers to a part that it lacks: {str(broken)[:_SHOWN]}"
    return "" if error is None else f"{error.json_path[:_SHOWN]}: {error.message[:_SHOWN]}"


def _checker(budget: Budget) -> Any:
    """Return a class of jsonschema's that counts what it evaluates, whatever `$schema` a part of a schema names."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    def counted(rule: Rule) -> Rule:
        def run(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any] | None:
            budget.spend()
            return rule(validator, wanted, instance, schema)

        return run

    def is_boolean(checker: Any, instance: Any) -> bool:
        budget.spend()  # asked wherever jsonschema looks for what was evaluated, which no rule tells of
        return isinstance(instance, bool)

    def evolve(self: Any, **changes: Any) -> Any:
        kept = {"schema": self.schema, "registry": self._registry, "_resolver": self._resolver}
        return type(self)(**{**kept, **changes})

    rules = {name: counted(rule) for name, rule in {**Draft202012Validator.VALIDATORS, **_own_rules(budget)}.items()}
    types = Draft202012Validator.TYPE_CHECKER.redefine("boolean", is_boolean)
    made = extend(Draft202012Validator, rules, type_checker=types)
    made.evolve = evolve
    return made


def _own_rules(budget: Budget) -> dict[str, Rule]:
    """Return rules in place of those of jsonschema's that fail, or take more than linear time or memory."""
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema._utils import find_evaluated_property_keys_by_schema

    usual_multiple = Draft202012Validator.VALIDATORS["multipleOf"]

    def pattern(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        is_read = isinstance(instance, str) and len(wanted) <= MAX_PATTERN_CHARS
        matcher = _matcher(wanted, budget)[0] if is_read else None
        if matcher is not None and not matcher.isinstance_python(instance):
            yield ValidationError(f"it does not match {wanted!r}")

    def unique(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if wanted and isinstance(instance, list) and len({_canonical(one) for one in instance}) < len(instance):
            yield ValidationError(f"{instance!r} has non-unique elements")

    def multiple(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        try:
            yield from usual_multiple(validator, wanted, instance, schema)
        except OverflowError:  # one of them is an integer that no float holds
            if Fraction(instance) % Fraction(wanted):
                yield ValidationError(f"{instance!r} is not a multiple of {wanted}")

    def any_of(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if not any(next(validator.descend(instance, one), None) is None for one in wanted):
            yield ValidationError(f"{instance!r} is not valid under any of the given schemas")

    def one_of(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        fitting = sum(next(validator.descend(instance, one), None) is None for one in wanted)
        if fitting != 1:
            yield ValidationError(f"{instance!r} is valid under {fitting or 'none'} of the given schemas; expected one")

    def unevaluated(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        known = set(find_evaluated_property_keys_by_schema(validator, instance, schema)) if isinstance(instance, dict) else ()
        if isinstance(instance, dict) and (extra := sorted(instance.keys() - known)):
            yield ValidationError(f"Unevaluated properties are not allowed ({', '.join(map(repr, extra))})")

    rules: dict[str, Rule] = {"pattern": pattern, "uniqueItems": unique, "multipleOf": multiple}
    return {**rules, "anyOf": any_of, "oneOf": one_of, "unevaluatedProperties": unevaluated}


def _canonical(value: Any) -> str:
    """Return a text that two JSON values share where they are equal: 1 is 1.0, and neither is true."""
    return json.dumps(_whole(value), sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return list(map(_whole, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def text_fault(text: str, schema: Mapping[str, Any]) -> str:
    """Return why a text is not JSON by a schema, empty if it is."""
    try:
        value = read_json(text)
    except ValueError as error:
        return f"it is not JSON ({str(error)[:_SHOWN]})"
    return value_fault(value, schema)


def unwrapped(text: str) -> str:
    """Return the JSON of a text that holds one value between fences or words, any other text as it is."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        found = _FENCE.search(text)
    else:
        return text.strip()
    candidate = (found[1] if found else text).strip()
    value = next(_values(candidate), None)
    return text.strip() if value is None else candidate[value[0] : value[1]]


def _values(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yield start, end and value of the JSON objects and lists in a text, one behind the other."""
    decoder, end, failed = json.JSONDecoder(), 0, 0
    for found in re.finditer(r"[{\[]", text):
        if found.start() < end or failed >= _STARTS:
            continue
        try:
            value, end = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            failed += 1
        else:
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
        parts += [f"What it is for: {final.schema_description}"] if final.schema_description else []
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
    wanted = [tool.get("parameters") or {"type": "object"} for tool in allowed]
    # Those with references of their own alone: behind a reference grammars take an object of any names for an empty one.
    moved = {number: there for number, one in enumerate(wanted) if (there := _moved(one, f"#/$defs/{number}")) != one}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                "arguments": {"$ref": f"#/$defs/{number}"} if number in moved else wanted[number],
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(allowed)
    ]
    listed = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": MAX_CALLS if final.is_parallel else 1}
    whole = {"type": "object", "properties": {"tool_calls": listed}, "required": ["tool_calls"], "additionalProperties": False}
    return whole | ({"$defs": {str(number): schema for number, schema in moved.items()}} if moved else {})


def _moved(schema: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return a schema whose references lead to its own parts where it stands at a place of another one."""
    moved = copy.deepcopy(schema)
    left, seen = deque[Any]([moved]), set[int]()
    while left:
        part = left.popleft()
        if isinstance(part, dict) and id(part) not in seen:
            seen.add(id(part))
            left.extend(inner for _, inner in _parts(part, moved))
            if (reference := part.get("$ref", "")) == "#" or reference.startswith("#/"):
                part["$ref"] = place + reference[1:]
    return moved


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
    budget = Budget()
    return next(filter(None, (_call_fault(call, final, budget) for call in found)), "")


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


def _call_fault(call: Mapping[str, Any], final: FinalCall, budget: Budget) -> str:
    name, arguments = call["name"], call["arguments"]
    tool = next((tool for tool in final.tools if tool["name"] == name), None)
    if tool is None or final.tool_choice not in ("auto", "required", f"={name}"):
        allowed = [tool["name"] for tool in final.tools] if final.tool_choice in ("auto", "required") else [final.tool_choice[1:]]
        return f"{str(name)[:80]!r} is called; expected {', '.join(allowed)}"
    if not isinstance(arguments, dict):
        return f"the arguments of {name} are not a JSON object"
    try:
        json.dumps(arguments, allow_nan=False)
    except (ValueError, RecursionError) as error:
        return f"the arguments of {name} cannot be written as JSON ({error})"
    fault = value_fault(arguments, tool.get("parameters") or {}, budget)
    return f"the arguments of {name} do not match its parameters: {fault}" if fault else ""


def check_schemas(final: FinalCall, *, are_tools_checked: bool) -> None:
    """Check that texts can be checked by a client's schemas, of tools where dmoa itself checks calls. Raises RequestError."""
    asked: Sequence[tuple[str, Any]] = [("response_format", final.schema)]
    if are_tools_checked:
        asked = [*asked, *((f"tools[{number}]", tool.get("parameters")) for number, tool in enumerate(final.tools))]
    budget = Budget()
    for param, schema in asked:
        fault = schema_fault(schema, budget) if schema else ""
        if fault:
            raise RequestError(f"{param}: its schema cannot be used: {fault}", param=param, code="invalid_schema")
