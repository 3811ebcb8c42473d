"""The OpenAPI document: real request and reply schemas, and every status that each route can answer with.

The routes read their bodies themselves (bounded, strict, 400 instead of 422), so the document is described here and
the schemas are put into its components by `install`.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from dmoa.serving.problems import RETRY_AFTER_S
from dmoa.serving.render import ChatReply, TextReply
from dmoa.serving.schemas import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class ErrorReply(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail


class NotReadyReply(ErrorReply):
    """Body of /readyz while agents are down."""

    agents: dict[str, str]


class ReadyReply(BaseModel):
    """Body of /readyz when every agent is up, or cold: scaled to zero, and started when it is asked."""

    status: Literal["ready"]
    agents: dict[str, str]


class AliveReply(BaseModel):
    """Body of /healthz."""

    status: Literal["alive"]


class ModelReply(BaseModel):
    """One name that `model` may hold."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelListReply(BaseModel):
    """Body of /v1/models."""

    object: Literal["list"]
    data: list[ModelReply] = Field(min_length=1)


_ERRORS: dict[int, str] = {
    400: "A field is wrong; `param` names it.",
    401: "The API key is missing or not known.",
    404: "There is no such model, trace or route.",
    413: "The body is over server.max_body_bytes.",
    429: "Too many queries are in flight; try again after Retry-After.",
    500: "An unexpected error; the server's log has the details.",
    503: "No agent is left (`no_agent`), or every contribution was empty (`empty_answer`).",
    504: "The deadline passed before any contribution existed.",
}


def _responses(success: type[BaseModel] | dict[str, Any], *statuses: int) -> dict[int | str, dict[str, Any]]:
    whole = {"content": {"application/json": {"schema": _ref(success)}}} if isinstance(success, type) else success
    found: dict[int | str, dict[str, Any]] = {200: {"description": "Done.", **whole}}
    for status in sorted({*statuses, 500}):
        found[status] = {"description": _ERRORS[status], "content": {"application/json": {"schema": _ref(ErrorReply)}}}
    if 429 in found:
        found[429]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": RETRY_AFTER_S}}}
    return found


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(model)}}}}


def _completions(request: type[BaseModel], reply: type[BaseModel]) -> dict[str, Any]:
    data = {"type": "string", "description": "One chunk as JSON, an error object as JSON, or `[DONE]`."}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"], "description": "With `stream: true`."}
    success = {"content": {"application/json": {"schema": _ref(reply)}, "text/event-stream": {"schema": event}}}
    return {"openapi_extra": _body(request), "responses": _responses(success, 400, 401, 404, 413, 429, 503, 504)}


CHAT = _completions(ChatRequest, ChatReply)
COMPLETION = _completions(CompletionRequest, TextReply)
MODELS: dict[str, Any] = {"responses": _responses(ModelListReply, 401)}
MODEL: dict[str, Any] = {"responses": _responses(ModelReply, 401, 404)}
TRACE: dict[str, Any] = {"responses": _responses({"content": {"application/json": {"schema": {"type": "object"}}}}, 401, 404)}
HEALTHZ: dict[str, Any] = {"responses": _responses(AliveReply)}
METRICS: dict[str, Any] = {"responses": _responses({"content": {"text/plain": {"schema": {"type": "string"}}}}, 401)}
_NOT_READY = {"description": "Agents are down.", "content": {"application/json": {"schema": _ref(NotReadyReply)}}}
READYZ: dict[str, Any] = {"responses": {**_responses(ReadyReply), 503: _NOT_READY}}
_MODELS = (ChatRequest, CompletionRequest)
_REPLIES = (ChatReply, TextReply, ErrorReply, NotReadyReply, ReadyReply, AliveReply, ModelReply, ModelListReply)


def install(app: FastAPI, *, has_keys: bool) -> None:
    """Make the app serve its document with the schemas above; with keys, every route but the probes asks for one."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, has_keys)
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _document(app: FastAPI, has_keys: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema(
        [*((model, "validation") for model in _MODELS), *((model, "serialization") for model in _REPLIES)],
        ref_template=_REF,
    )
    components = document.setdefault("components", {})
    components["schemas"] = schemas["$defs"]
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI adds it for path parameters; ours answer 404
            if has_keys and path not in ("/healthz", "/readyz"):
                operation["security"] = [{"key": []}]
    return document
