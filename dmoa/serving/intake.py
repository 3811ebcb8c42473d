"""From a checked request to a Query: which policy and agent a model name means, which limits hold, what the gate reads.

Between `serving/schemas` (is the body well formed?) and the swarm; here is everything that depends on the pool.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dmoa.errors import RequestError
from dmoa.serving.schemas import ChatMessage, ChatRequest, CompletionRequest, DmoaOptions, SharedRequest, show, unknown_field
from dmoa.serving.service import SwarmService
from dmoa.types import Limits, Message, Query
from dmoa.validation import did_you_mean

SINGLE = "single"
"""The policy that answers for an agent's own name."""
N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One checked request: the query, and how the client wants its answer."""

    query: Query
    model: str
    """The name that the client used."""
    policy: str
    agent: str | None
    """The one agent of the `single` policy where the client named one."""
    is_stream: bool
    has_usage_chunk: bool
    with_texts: bool
    """Whether the reply carries agents' texts and summaries."""
    user: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def chat_order(request: ChatRequest, service: SwarmService) -> Order:
    """Return the order of a chat request. Raises RequestError (400, 404).

    System and developer messages ahead of the first turn become the query's system text; later ones stay in place.
    """
    policy, agent = resolve(request, service)
    _check_messages(request)
    if request.messages[-1].role != "user":
        raise RequestError(
            f"messages[{len(request.messages) - 1}].role: value seen: {request.messages[-1].role!r}; allowed for the last "
            "message: 'user'; end the conversation with the question",
            param=f"messages[{len(request.messages) - 1}].role",
            code="invalid_value",
        )
    num_system = next(i for i, message in enumerate(request.messages) if message.role not in ("system", "developer"))
    tokens = request.max_completion_tokens
    if tokens is not None and request.max_tokens is not None and tokens != request.max_tokens:
        raise RequestError(
            f"max_tokens: value seen: {request.max_tokens}, and max_completion_tokens is {tokens}; they mean the same; send one",
            param="max_tokens",
            code="invalid_value",
        )
    return _order(
        request,
        service,
        policy=policy,
        agent=agent,
        text=_question(request.messages[-1].text, f"messages[{len(request.messages) - 1}].content"),
        system="\n\n".join(message.text for message in request.messages[:num_system]),
        turns=tuple(
            Message(role="system" if message.role == "developer" else message.role, content=message.text)
            for message in request.messages[num_system:-1]
        ),
        max_tokens=tokens or request.max_tokens,
        metadata=request.metadata or {},
    )


def completion_order(request: CompletionRequest, service: SwarmService) -> Order:
    """Return the order of a plain completion. Raises RequestError (400, 404)."""
    policy, agent = resolve(request, service)
    text = _question(request.text, "prompt")
    return _order(request, service, policy=policy, agent=agent, text=text, max_tokens=request.max_tokens)


def _check_messages(request: ChatRequest) -> None:
    """Raise RequestError for a message without content or with an unknown field, which only an assistant's may be."""
    for number, message in enumerate(request.messages):
        if message.role == "assistant":
            continue
        for name, value in (message.model_extra or {}).items():
            nearest = did_you_mean(name[:200], list(ChatMessage.model_fields))
            raise unknown_field(f"messages[{number}].{name}"[:200], value, nearest)
        if isinstance(message.content, str) or message.content:
            continue
        param = f"messages[{number}].content"
        if "content" not in message.model_fields_set:
            raise RequestError(f"{param}: missing; add it", param=param, code="missing_required_parameter")
        raise RequestError(
            f"{param}: value seen: {'null' if message.content is None else '[]'}; allowed: a text, or text parts; add some",
            param=param,
            code="invalid_value",
        )


def _question(text: str, param: str) -> str:
    if not text.strip():
        raise RequestError(
            f"{param}: value seen: {show(text)}; allowed: a text; ask something", param=param, code="invalid_value"
        )
    return text


def _order(
    request: SharedRequest,
    service: SwarmService,
    *,
    policy: str,
    agent: str | None,
    text: str,
    max_tokens: int | None,
    system: str = "",
    turns: tuple[Message, ...] = (),
    metadata: Mapping[str, str] | None = None,
) -> Order:
    if request.stream_options is not None and not request.stream:
        raise RequestError(
            "stream_options: given without stream; allowed with stream: true; leave it out",
            param="stream_options",
            code="invalid_value",
        )
    sampling: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": max_tokens,
        "stop": request.stop_texts or None,
        "seed": request.seed,
    }
    return Order(
        query=Query(
            trace_id=uuid.uuid4().hex,
            text=text,
            system=system,
            turns=turns,
            sampling={name: value for name, value in sampling.items() if value is not None},
            limits=_limits(request.dmoa or DmoaOptions(), service),
            is_streamed=bool(request.stream),
        ),
        model=request.model,
        policy=policy,
        agent=agent,
        is_stream=bool(request.stream),
        has_usage_chunk=bool(request.stream_options and request.stream_options.include_usage),
        with_texts=bool(request.dmoa and request.dmoa.trace),
        user=request.user,
        metadata=metadata or {},
    )


def model_names(service: SwarmService) -> tuple[str, ...]:
    """Return every name that `model` may hold: the pool, the pool under each policy, each agent."""
    return (service.pool, *(f"{service.pool}/{policy}" for policy in service.policies), *service.agents)


def resolve(request: SharedRequest, service: SwarmService) -> tuple[str, str | None]:
    """Return the policy and the agent that a request's `model` and `dmoa.policy` mean together.

    Raises RequestError: 404 `model_not_found` for an unknown name, 400 for an unknown policy or two that disagree.
    """
    model, asked = request.model, request.dmoa.policy if request.dmoa else None
    if model not in model_names(service):
        raise unknown_model(model, service)
    if asked is not None and asked not in service.policies:
        raise RequestError(
            f"dmoa.policy: value seen: {show(asked)}; allowed: {', '.join(service.policies)}; choose one of them"
            f"{did_you_mean(asked, service.policies)}",
            param="dmoa.policy",
            code="unknown_policy",
        )
    if model == service.pool:
        return asked or service.policies[0], None
    agent = model if model in service.agents else None
    named = SINGLE if agent else model.removeprefix(f"{service.pool}/")
    if asked not in (None, named):
        raise RequestError(
            f"dmoa.policy: value seen: {asked!r}, but model {model!r} means {named!r}; make them agree, or leave one out",
            param="dmoa.policy",
            code="invalid_value",
        )
    return named, agent


def unknown_model(model: str, service: SwarmService) -> RequestError:
    """Return the 404 of a model name that this server does not have."""
    names = model_names(service)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    message = f"model: value seen: {show(model)}; allowed: {shown}; GET /v1/models lists them{did_you_mean(model[:200], names)}"
    return RequestError(message, param="model", code="model_not_found", status=404)


def _limits(options: DmoaOptions, service: SwarmService) -> Limits:
    """Return the query's limits: the pool's, where the client does not ask for less."""
    pool = service.limits
    return Limits(
        max_steps=_lower(options.max_steps, pool.max_steps) or pool.max_steps,
        max_agents=options.max_agents,
        budget_tokens=_lower(options.budget_tokens, pool.budget_tokens),
        deadline_s=_lower(options.deadline_s, pool.deadline_s),
    )


def _lower(asked: N | None, allowed: N | None) -> N | None:
    given = [value for value in (asked, allowed) if value is not None]
    return min(given) if given else None
