"""JSON by a stranger's schema: what matches, what is refused, that no schema keeps the server busy; calls of tools in texts."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from dmoa.agents.json_forms import (
    calls_in,
    calls_schema,
    check_schemas,
    completed,
    form_brief,
    form_prompt,
    schema_fault,
    text_fault,
    unwrapped,
    value_fault,
)
from dmoa.errors import RequestError
from dmoa.types import FinalCall

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = ({"name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS}, {"name": "now"})


def nested(levels: int) -> dict[str, Any]:
    """A schema whose evaluation doubles at every level."""
    parts = {f"p{i}": {"allOf": [{"$ref": f"#/$defs/p{i + 1}"}] * 2} for i in range(levels)}
    return {"$ref": "#/$defs/p0", "$defs": {**parts, f"p{levels}": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("value", "schema", "fault"),
    [
        ({"a": 1}, {"type": "object", "properties": {"a": {"type": "integer"}}}, ""),
        ({"a": "x"}, {"properties": {"a": {"type": "integer"}}}, "$.a: 'x' is not of type 'integer'"),
        ("ab", {"pattern": "^a"}, ""),
        ("ab", {"pattern": "b$"}, ""),
        ("ab", {"pattern": "^b"}, "$: it does not match '^b'"),
        ([1, 1], {"uniqueItems": True}, "$: [1, 1] has non-unique elements"),
        ({"next": {"next": {}}}, {"$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}, ""),
        (1, nested(3), ""),
        (1, nested(40), "checking it by the schema takes too long"),
        (1, {"$ref": "#"}, "checking it by the schema takes too long"),
        ([0] * 20000, {"items": {"allOf": [{"type": "integer"}] * 200}}, "checking it by the schema takes too long"),
        ("a" * 5000, {"pattern": "^(a+)+$"}, ""),
        ("a" * 5000 + "!", {"pattern": "^(a+)+$"}, "$: it does not match '^(a+)+$'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_values_are_checked_in_bounded_time(value: Any, schema: dict[str, Any], fault: str) -> None:
    started = time.perf_counter()
    assert schema_fault(schema) == ""
    found = value_fault(value, schema)
    assert found == fault
    assert time.perf_counter() - started < 20  # such schemas take minutes to years where nothing bounds them


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "strange"}, "type is 'strange'; expected one or several of array"),
        (
            {"properties": {"a": {"pattern": "(?=(a{1000}){1000})"}}},
            "properties.a: pattern '(?=(a{1000}){1000})' is not supported",
        ),
        ({"pattern": "(((a{1000}){1000}){1000})"}, "is not supported"),
        ({"pattern": "a" * 513}, "is not supported"),
        ({"pattern": "("}, "is not supported"),
        ({"patternProperties": {"^(a+)+$": {}}}, "patternProperties is not supported"),
        ({"items": {"$ref": "http://127.0.0.1:9/x"}}, "references must be $ref, to parts of the same schema"),
        ({"$dynamicRef": "#x"}, "references must be $ref"),
        ({"$id": "http://x/y"}, "$id is not supported"),
        ({"unevaluatedItems": False}, "unevaluatedItems is not supported"),
        ({"allOf": [{"$ref": "#/$defs/none"}]}, "allOf.0: $ref is '#/$defs/none'; references must be $ref, to parts"),
        ({"allOf": [{"$ref": "#/allOf/x"}]}, "references must be $ref, to parts of the same schema that are there"),
        ({"const": {"required": 5}, "anyOf": [{"$ref": "#/const"}]}, "anyOf.0.$ref: required is 5; expected a list"),
        ({"allOf": [5]}, "allOf.0: 5 is no schema"),
        ({"minLength": True}, "minLength is True; expected a whole number, 0 or more"),
        ({"dependentRequired": {"a": [1]}}, "expected an object of lists of different names"),
    ],
)
def test_schemas_that_cannot_be_used_say_why(schema: dict[str, Any], fault: str) -> None:
    assert fault in schema_fault(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {
            "properties": {
                "$id": {"type": "string"},
                "$ref": {"type": "string"},
                "patternProperties": {},
                "pattern": {"pattern": "a"},
            }
        },
        {"$defs": {"$id": {}}, "properties": {"a": {"$ref": "#/$defs/$id"}}},
        {"const": {"$id": 1}, "default": {"pattern": "("}, "examples": [{"$ref": "x"}], "enum": [{"patternProperties": 1}]},
        {"properties": {"mail": {"pattern": r"^(?!\.)(?!.*\.\.)[a-z.]+@([a-z0-9]*\.)+[a-z]{2,}$"}}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a b": {}}, "$ref": "#/definitions/a%20b"},
        {"x-parts": {"a": {"type": "string"}}, "items": {"$ref": "#/x-parts/a"}},
        {"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}},
        {"multipleOf": 2.0, "minItems": 1.0, "additionalProperties": False, "items": True},
    ],
)
def test_names_of_properties_and_examples_are_no_keywords(schema: dict[str, Any]) -> None:
    assert schema_fault(schema) == ""
    assert value_fault(None, schema) in ("", "$: {'$id': 1} was expected")


def test_a_pattern_with_look_around_is_not_looked_for() -> None:
    schema = {"type": "string", "pattern": "^(?=(a+)+$)b"}
    assert schema_fault(schema) == ""
    assert value_fault("a" * 100 + "!", schema) == ""
    assert value_fault(1, schema) == "$: 1 is not of type 'string'"


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [True] * 13000},
        {"properties": {f"a{number}": True for number in range(5000)}},
        {"required": ["x", *range(9000)]},
        {"allOf": [{"pattern": rf"\w{{100}}{number}"} for number in range(2000)]},
    ],
    ids=["list", "properties", "required", "patterns"],
)
def test_large_schemas_are_checked_in_bounded_time_all_together(schema: dict[str, Any]) -> None:
    started = time.thread_time()
    tools = tuple({"name": f"t{number}", "parameters": schema} for number in range(128))
    with pytest.raises(RequestError, match="its schema cannot be used"):
        check_schemas(FinalCall(tools=(*tools, {"name": "last", "parameters": {"type": 1}})), are_tools_checked=True)
    assert time.thread_time() - started < 2  # a single one took up to five seconds, and patterns half a minute


def test_another_dialect_is_counted_too_and_runs_no_regular_expressions_of_its_own() -> None:
    draft = "http://json-schema.org/draft-07/schema#"
    schema = nested(40)
    schema["$defs"]["p0"]["$schema"] = draft
    assert value_fault(1, schema) == "checking it by the schema takes too long"
    assert value_fault("a" * 40 + "!", {"allOf": [{"$schema": draft, "pattern": "^(a+)+$"}]}) == "$: it does not match '^(a+)+$'"


@pytest.mark.parametrize("value", [[*range(20_000), "a"], [*range(20_000), [1], [1.0]], [{"a": [0]}] * 20_000])
def test_unique_items_take_linear_time(value: list[Any]) -> None:
    started = time.thread_time()
    is_unique = value_fault(value, {"uniqueItems": True}) == ""
    assert time.thread_time() - started < 1  # a fiftieth of what comparing each with each takes
    assert is_unique == ("a" in value)


@pytest.mark.parametrize(
    ("items", "is_unique"),
    [([1, 1.0], False), ([1, True], True), ([0, False, "0", None], True), ([{"a": 1, "b": 2}, {"b": 2.0, "a": 1}], False),
     ([[1], [True]], True), ([0, -0.0], False), ([2**53 + 1, float(2**53)], True), (["a", "b"], True)],
)  # fmt: skip
def test_unique_items_are_those_that_differ_as_json(items: list[Any], is_unique: bool) -> None:
    assert (value_fault(items, {"uniqueItems": True}) == "") == is_unique


@pytest.mark.parametrize(
    ("value", "schema", "is_right"),
    [
        (10**400, {"multipleOf": 0.5}, True),
        (10**400 + 1, {"multipleOf": 2.0}, False),
        (1.5, {"multipleOf": 10**400}, False),
        ({"a": 1}, {"unevaluatedProperties": False, "allOf": [{"properties": {"a": {}}}]}, True),
        ({"b": 1}, {"unevaluatedProperties": False, "allOf": [{"properties": {"a": {}}}]}, False),
        (1, {"oneOf": [{"type": "integer"}, {"minimum": 0}]}, False),
        (1, {"oneOf": [{"type": "integer"}, {"minimum": 2}]}, True),
    ],
    ids=lambda value: str(value)[:40],
)
def test_rules_of_dmoas_own(value: Any, schema: dict[str, Any], is_right: bool) -> None:
    assert schema_fault(schema) == ""
    assert (value_fault(value, schema) == "") == is_right


def test_what_was_evaluated_is_looked_for_in_bounded_time() -> None:
    parts = {f"s{i}": {"dependentSchemas": {key: {"$ref": f"#/$defs/s{i + 1}"} for key in "ab"}} for i in range(40)}
    schema = {"unevaluatedProperties": False, "$ref": "#/$defs/s0", "$defs": {**parts, "s40": {}}}
    assert schema_fault(schema) == ""
    assert value_fault({"a": 1, "b": 1}, schema) == "checking it by the schema takes too long"


SCALARS = st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from([0.0, 1.0, 1.5, "", "a", "b", "ab"])
JSON = st.recursive(SCALARS, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.sampled_from("abc"), one, max_size=3))
SCHEMAS = st.recursive(
    st.booleans() | st.just({}) | st.sampled_from([{"type": "string"}, {"type": ["integer", "null"]}, {"$ref": "#/$defs/a"}]),
    lambda one: st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), st.lists(one, min_size=1, max_size=2)),
            **dict.fromkeys(("items", "not", "contains", "additionalProperties", "unevaluatedProperties", "if", "then"), one),
            **dict.fromkeys(("properties", "dependentSchemas"), st.dictionaries(st.sampled_from("abc"), one, max_size=2)),
            **dict.fromkeys(("minimum", "maxLength", "minItems", "maxProperties"), st.integers(0, 2)),
            "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
            "enum": st.lists(JSON, max_size=2),
            "const": JSON,
            "uniqueItems": st.booleans(),
            "multipleOf": st.sampled_from([1, 0.5, 2]),
        },
    ),
    max_leaves=6,
)


@given(
    schema=st.fixed_dictionaries({"$defs": st.just({"a": {"minimum": 1}}), "allOf": st.lists(SCHEMAS, min_size=1, max_size=2)}),
    value=JSON,
)
def test_values_match_where_the_reference_says_so(schema: dict[str, Any], value: Any) -> None:
    assert schema_fault(schema) == ""
    assert (value_fault(value, schema) == "") == Draft202012Validator(schema).is_valid(value)


KEYWORDS = (
    *("additionalProperties", "allOf", "anyOf", "const", "contains", "definitions", "dependentRequired", "dependentSchemas"),
    *("description", "else", "enum", "examples", "exclusiveMinimum", "format", "if", "items", "maximum", "maxItems", "minLength"),
    *(
        "multipleOf",
        "not",
        "oneOf",
        "prefixItems",
        "properties",
        "propertyNames",
        "readOnly",
        "required",
        "then",
        "title",
        "type",
    ),
    *("unevaluatedProperties", "uniqueItems"),
)
WORDS = st.sampled_from(["string", "null", "a"])


@given(
    st.dictionaries(
        st.sampled_from(KEYWORDS),
        JSON
        | SCHEMAS
        | WORDS
        | st.lists(SCHEMAS | WORDS, max_size=3)
        | st.dictionaries(WORDS, SCHEMAS | st.lists(WORDS, max_size=2)),
        max_size=3,
    )
)
def test_schemas_are_right_where_their_own_schema_says_so(part: dict[str, Any]) -> None:
    schema = {"$defs": {"a": {}}, "items": part}
    try:
        Draft202012Validator.check_schema(schema, format_checker=None)
        is_right = True
    except SchemaError:
        is_right = False
    assert (schema_fault(schema) == "") == is_right


def test_a_part_that_is_not_there_is_a_fault_of_the_value() -> None:
    assert "lacks" in value_fault(1, {"$ref": "#/$defs/none"})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1}', ""),
        ("{", "it is not JSON"),
        ("NaN", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "$: [] is not of type 'object'"),
    ],
    ids=["object", "cut", "NaN", "deep", "list"],
)
def test_texts_are_json_by_the_schema_or_say_why_not(text: str, fault: str) -> None:
    assert text_fault(text, {"type": "object"}).startswith(fault)
    assert bool(text_fault(text, {"type": "object"})) == bool(fault)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (' {"a": 1} ', '{"a": 1}'),
        ('Here it is:\n```json\n{"a": 1}\n```\nGood?', '{"a": 1}'),
        ('The answer: {"a": [1]} as asked.', '{"a": [1]}'),
        ("no JSON at all {", "no JSON at all {"),
        (' "see [1] there" ', '"see [1] there"'),
        ('"```json\\n{}```"', '"```json\\n{}```"'),
    ],
)
def test_json_is_taken_out_of_its_wrapping(text: str, value: str) -> None:
    assert unwrapped(text) == value


def asked(choice: str = "auto", *, is_parallel: bool = True) -> FinalCall:
    return FinalCall(tools=TOOLS, tool_choice=choice, is_parallel=is_parallel)


PARIS = ("weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("text", "final", "calls", "fault"),
    [
        ('{"tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}]}', asked(), [PARIS], ""),
        ('```json\n{"name": "weather", "arguments": {"city": "Paris"}}\n```', asked(), [PARIS], ""),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', asked(), [PARIS], ""),
        ('<tool_call>{"name": "now", "arguments": {}}</tool_call><tool_call>{"name": "now", "arguments": null}', asked(),
         [("now", {}), ("now", {})], ""),
        ('[{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}}]', asked("required"), [PARIS], ""),
        ("It is sunny.", asked(), [], ""),
        ('The result is {"name": "Bob", "arguments": 3}.', asked(), [], ""),
        ("It is sunny.", asked("required"), [], "no tool is called"),
        ("", asked("=now"), [], "no tool is called"),
        ('{"name": "weather", "arguments": {"city": "Paris"}}', asked("=now"), [], "'weather' is called; expected now"),
        ('{"tool_calls": [{"name": "rain", "arguments": {}}]}', asked(), [], "'rain' is called; expected weather, now"),
        ('{"name": "weather", "arguments": {}}', asked(), [], "do not match its parameters: $: 'city' is a required property"),
        ('{"name": "weather", "arguments": "Paris"}', asked(), [], "the arguments of weather are not a JSON object"),
        ('{"name": ["weather"], "arguments": {}}', asked(), [], ""),
        ('{"tool_calls": [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]}', asked(is_parallel=False), [],
         "2 calls; expected at most 1"),
    ],
)  # fmt: skip
def test_calls_are_found_in_texts(text: str, final: FinalCall, calls: list[Any], fault: str) -> None:
    found, why = calls_in(text, final)
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    assert why.endswith(fault)
    assert bool(why) == bool(fault)
    assert all(call.call_id.startswith("call_") for call in found)


@given(st.text(max_size=80) | st.text(alphabet='{}[]":,name`argumetsol_clw <>/', max_size=80))
def test_any_text_is_read(text: str) -> None:
    calls, fault = calls_in(text, asked())
    assert not (calls and fault)
    assert isinstance(unwrapped(text), str)


def test_all_of_many_calls_are_found_however_nested_their_arguments_are() -> None:
    arguments = {"a": [{"b": [[], {}]}] * 8}
    said = "\n".join(json.dumps({"name": "now", "arguments": arguments | {"n": number}}) for number in range(20))
    calls, fault = calls_in(said, asked())
    assert ([json.loads(call.arguments)["n"] for call in calls], fault) == ([*range(20)], "")


def test_what_guided_decoding_may_write_is_what_is_read() -> None:
    for final in (asked("required"), asked("=weather"), asked("required", is_parallel=False)):
        schema = calls_schema(final)
        assert schema_fault(schema) == ""
        text = '{"tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}]}'
        assert text_fault(text, schema) == ""
        assert len(calls_in(text, final)[0]) == 1
    assert text_fault('{"tool_calls": [{"name": "now", "arguments": {}}]}', calls_schema(asked("=weather")))
    assert text_fault('{"tool_calls": []}', calls_schema(asked("required")))
    assert "$ref" not in str(calls_schema(asked("required")))  # behind one, vLLM's grammars take {"type": "object"} for {} alone


def test_references_of_a_tool_lead_to_its_own_parts_in_what_guides_decoding() -> None:
    point = {"type": "object", "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/P"}}, "required": ["x"]}
    draw = {"properties": {"at": {"$ref": "#/$defs/P"}, "$ref": {"type": "string"}}, "$defs": {"P": point}, "required": ["at"]}
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}}, "additionalProperties": False}
    final = FinalCall(tools=({"name": "draw", "parameters": draw}, {"name": "grow", "parameters": tree}), tool_choice="required")
    schema = calls_schema(final)
    assert schema_fault(schema) == ""
    assert (draw["properties"]["at"], tree["properties"]) == ({"$ref": "#/$defs/P"}, {"left": {"$ref": "#"}})
    for name, arguments, is_right in (
        ("draw", {"at": {"x": 1, "next": {"x": 2}}, "$ref": "a"}, True),
        ("draw", {"at": {"x": 1, "next": {"x": "2"}}}, False),
        ("grow", {"left": {"left": {}}}, True),
        ("grow", {"left": {"right": {}}}, False),
    ):
        text = json.dumps({"tool_calls": [{"name": name, "arguments": arguments}]})
        assert (text_fault(text, schema) == "") == is_right
        assert bool(calls_in(text, final)[0]) == is_right


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_arguments_that_json_does_not_have_are_no_call(number: str) -> None:
    calls, fault = calls_in(f'{{"name": "now", "arguments": {{"x": {number}}}}}', asked())
    assert (calls, fault.partition(" (")[0]) == ((), "the arguments of now cannot be written as JSON")


def test_the_prompt_says_tools_choice_and_form() -> None:
    text = form_prompt(asked("=now", is_parallel=False), has_tools=True)
    assert '"description": "Tells the weather."' in text
    assert text.endswith("Call now. Make one call only.")
    assert form_prompt(FinalCall(schema={"type": "object"}), has_tools=False) == "Write the answer as nothing but one JSON object"
    assert '{"type": "integer"}' in form_prompt(FinalCall(schema={"type": "integer"}, schema_name="x"), has_tools=False)
    described = FinalCall(schema={"type": "integer"}, schema_name="x", schema_description="Parcels on the shelf.")
    assert form_prompt(described, has_tools=False).endswith("\nWhat it is for: Parcels on the shelf.")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('{"a": 19', '{"a": 19}'),
        ('{"a": [{"b": "x"}, ', '{"a": [{"b": "x"}]}'),
        ('{"a": "Paris', '{"a": "Paris"}'),
        ('{"a": "Paris\nThe city', '{"a": "Paris"}'),
        ('{"a": "say \\"yes', '{"a": "say \\"yes"}'),
        ('{"a": 19}\n\nThat is it. {', '{"a": 19}'),
        ('{"a": {"b": 1}. Done.', '{"a": {"b": 1}}'),
        ('{"a": nothing', '{"a": nothing'),
        ("words", "words"),
        ("", ""),
    ],
)
def test_json_that_broke_off_gets_its_end(text: str, whole: str) -> None:
    assert completed(text) == whole


@given(value=st.dictionaries(st.text(), st.lists(st.integers() | st.text())), cut=st.integers(min_value=0))
def test_whole_json_stays_and_a_cut_one_becomes_json_or_stays(value: dict[str, Any], cut: int) -> None:
    text = json.dumps(value)
    assert completed(text) == text
    short = text[: cut % (len(text) + 1)]
    found = completed(short)
    assert found == short or isinstance(json.loads(found), dict)


@pytest.mark.parametrize(
    ("final", "brief", "head"),
    [
        (FinalCall(schema={"type": "object"}), "Write it as JSON.", "{"),
        (FinalCall(schema={"type": "array"}), "", ""),
        (FinalCall(n=2), "", ""),
        (asked(), "", ""),
        (
            FinalCall(schema={"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}, "required": ["s"]}),
            'Write it as JSON with "n" (integer), "s" (string).',
            '{"s": "',
        ),
        (
            FinalCall(tools=({"name": "f"}, {"name": "g", "parameters": {}}), tool_choice="=f"),
            "Call the tool f, in JSON.",
            '{"tool_calls": [{"name": "f", "arguments": {',
        ),
        (
            FinalCall(tools=({"name": "f"}, {"name": "g", "parameters": {"properties": {"a": {}}}}), tool_choice="required"),
            'Call one of these tools, in JSON: f; g with "a" (any).',
            '{"tool_calls": [{"name": "',
        ),
    ],
)
def test_a_form_in_few_words_and_its_beginning(final: FinalCall, brief: str, head: str) -> None:
    assert form_brief(final) == (brief, head)
