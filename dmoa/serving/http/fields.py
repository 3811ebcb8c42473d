"""What request records are made of: strict values, lenient records, fields of which little is supported; tools, forms, sizes."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from dmoa.errors import RequestError
from dmoa.reading import without_texts
from dmoa.types import FinalCall

MAX_NEW_TOKENS = 131072
MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 65536
"""Longest JSON Schema of a form or of a tool's parameters."""
MAX_SCHEMA_DEPTH = 64
MAX_CHOICES = 8
MAX_OBJECTS = 20_000
"""JSON objects of a body, such as messages and their parts, and lists: each costs the server some fifty microseconds."""
MAX_VALUES = 100_000
"""JSON values of a body, by the commas between them; a million unknown fields would take seconds."""
_MOST = ((b"{", "objects", MAX_OBJECTS), (b"[", "lists", MAX_OBJECTS), (b",", "commas between values", MAX_VALUES))


class Only:
    """Marks an OpenAI field of which nothing but the given values (and null) is supported; `way`: what to do instead."""

    def __init__(self, *allowed: Any, way: str = "") -> None:
        self.allowed = (*allowed, None)
        self.way = way

    def check(self, value: Any) -> Any:
        """Return the value if it is supported. Raises pydantic's custom error of type `unsupported`."""
        if any(value == one and _json_type(value) is _json_type(one) for one in self.allowed):
            return value
        shown = ", ".join(json.dumps(one) for one in self.allowed)
        way = f"; {self.way}" if self.way else ""
        raise PydanticCustomError(
            "unsupported", "which is not supported; expected {shown}; leave the field out{way}", {"shown": shown, "way": way}
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self.allowed)}


def _json_type(value: Any) -> type:
    """Return the type of a JSON value: 1 and 1.0 are numbers alike, true is none."""
    return float if type(value) is int else type(value)


def text_or_list(value: Any) -> str | None:
    """Say which side of a text-or-list union a value is on; the tags never reach an error's `param`."""
    if isinstance(value, str):
        return "<text>"
    return "<list>" if isinstance(value, list | tuple) else None


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Lets an integer be written as 5.0, as JSON Schema does."""


def _or_absent(value: Any) -> Any:
    return None if value == -1 and not isinstance(value, bool) else _whole(value)


_TOKENS: JsonSchemaValue = {
    "anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_NEW_TOKENS}, {"const": -1}, {"type": "null"}]
}
Tokens = Annotated[Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None, BeforeValidator(_or_absent), WithJsonSchema(_TOKENS)]
"""A number of tokens; -1, as some clients write it, is as good as absent."""


class RequestModel(BaseModel):
    """Base of every request record: strict, unknown fields refused, fields documented in place."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class LenientModel(RequestModel):
    """A request record whose unknown fields are found by `unknown_in`."""

    model_config = ConfigDict(extra="allow")


class FunctionSpec(LenientModel):
    """A function of the client's that an answer may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = Field(default=None, max_length=16384)
    parameters: dict[str, Any] | None = None
    """JSON Schema of its arguments."""
    strict: bool | None = None


class ToolSpec(LenientModel):
    """A tool of the client's; of other kinds than functions none is supported."""

    type: Literal["function"]
    function: FunctionSpec


class ToolName(LenientModel):
    """The name of a tool."""

    name: str = Field(max_length=128)


class NamedTool(LenientModel):
    """The tool that the answer must call."""

    type: Literal["function"]
    function: ToolName


class JsonForm(LenientModel):
    """A form of the answer."""

    name: str = Field(min_length=1, max_length=128)
    description: str | None = Field(default=None, max_length=16384)
    form: dict[str, Any] | None = Field(default=None, alias="schema")
    """JSON Schema of the answer; absent: any value."""
    strict: bool | None = None


class ResponseFormat(LenientModel):
    """What the answer's text is to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonForm | None = None
    """With that type alone."""


def _choice_kind(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<tool>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[NamedTool, Tag("<tool>")],
    Discriminator(_choice_kind),
]


def final_call(
    *,
    tools: list[ToolSpec] | None = None,
    tool_choice: str | NamedTool | None = None,
    is_parallel: bool | None = None,
    response_format: ResponseFormat | None = None,
    logprobs: bool | None = None,
    top_logprobs: int | None = None,
    n: int | None = None,
) -> FinalCall | None:
    """Return what a client wants of its answer beyond a text, None where that is nothing. Raises RequestError (400)."""
    if top_logprobs and not logprobs:
        raise refused("top_logprobs", f"is {top_logprobs} without logprobs; send logprobs: true too")
    choice = _choice(tools or [], tool_choice)
    known, form = set(FunctionSpec.model_fields), _form(response_format)
    functions = [tool.function.model_dump(include=known, exclude_none=True) for tool in tools or []] if choice != "none" else []
    for number, function in enumerate(functions):
        _check_size(function.get("parameters"), f"tools[{number}].function.parameters")
    wanted = FinalCall(
        tools=tuple(functions),
        tool_choice=choice if functions else "auto",
        is_parallel=is_parallel is not False,
        **form,
        top_logprobs=(top_logprobs or 0) if logprobs else None,
        n=n or 1,
    )
    return None if not functions and wanted.may_be_text else wanted


def _choice(tools: list[ToolSpec], choice: str | NamedTool | None) -> str:
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise refused("tools", f"is of two tools that are both called {twice!r}; names must differ")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            seen = f"is {choice.function.name!r}; expected {', '.join(names[:12]) or 'no tool, because tools is empty'}"
            raise refused("tool_choice", seen)
        return f"={choice.function.name}"
    if choice == "required" and not tools:
        raise refused("tool_choice", "is 'required' without tools; send tools too")
    return choice or "auto"


def _form(wanted: ResponseFormat | None) -> dict[str, Any]:
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"schema": {"type": "object"}}
    if wanted.json_schema is None:
        raise refused("response_format.json_schema", "missing; add it", "missing_required_parameter")
    form = wanted.json_schema
    _check_size(form.form, "response_format.json_schema.schema")
    told = {"schema_name": form.name, "schema_description": form.description or "", "is_strict": form.strict}
    return {"schema": form.form or {}, **told}


def _check_size(schema: dict[str, Any] | None, param: str) -> None:
    size, depth = len(json.dumps(schema)), _depth(schema)
    if size > MAX_SCHEMA_BYTES or depth > MAX_SCHEMA_DEPTH:
        raise refused(param, f"is of {size} bytes, {depth} deep; expected at most {MAX_SCHEMA_BYTES} and {MAX_SCHEMA_DEPTH}")


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def check_parts(body: bytes) -> None:
    """Raise RequestError for a body of too many parts, before it is read."""
    if all(body.count(sign) <= most for sign, _, most in _MOST):
        return
    bare = without_texts(body)
    for sign, name, most in _MOST:
        if (count := bare.count(sign)) > most:
            raise RequestError(
                f"body: {count} JSON {name}; expected at most {most}; send fewer messages, parts or fields",
                code="request_too_large",
            )


def refused(param: str, why: str, code: str = "invalid_value", status: int = 400) -> RequestError:
    """Return the error of a field; `why` goes on after its name: `is 3; expected ...`, or says what is wrong."""
    joint = " " if why.startswith("is ") else ": "
    return RequestError(f"{param}{joint}{why}", param=param, code=code, status=status)
