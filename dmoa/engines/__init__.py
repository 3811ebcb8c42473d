"""Engines: what generates an agent's replies. Here is what each engine of dmoa's own is; none is loaded before it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dmoa.config import AgentConfig, Config, LlmConfig
from dmoa.engine_options import (
    ENGINES,
    EngineEntry,
    EngineOptions,
    OpenaiOptions,
    RecordedOptions,
    ScriptedOptions,
    TransformersOptions,
    VllmOptions,
)
from dmoa.errors import ConfigError
from dmoa.protocols import Engine

if TYPE_CHECKING:
    from dmoa.engines.gpus import GpuSlice

_MAX_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """What an engine is built from: one LLM of a pool, and the agents that ask it."""

    config: Config
    llm: str
    """Its key under `llms`."""
    agents: tuple[AgentConfig, ...]
    gpus: GpuSlice | None = None
    """Its own of the GPUs that this process sees; None: all of them."""

    @property
    def part(self) -> LlmConfig:
        """The LLM's section of the pool."""
        return self.config.llms[self.llm]

    @property
    def options(self) -> Any:
        """`engine_kwargs` as the record that the engine was entered with, its own kind of `EngineOptions`."""
        return self.part.options

    @property
    def model(self) -> str:
        """The LLM's `model` without what stands before the colon."""
        return self.part.model.partition(":")[2]

    @property
    def adapters(self) -> list[str]:
        """The adapters of the agents, each once, in their order."""
        return list(dict.fromkeys(agent.adapter for agent in self.agents if agent.adapter))


Build = TypeVar("Build", bound=Callable[[EngineContext], Engine])


def engine(
    name: str,
    *,
    options: type[EngineOptions],
    model_prefix: str | None = None,
    is_light: bool = False,
    takes_adapters: bool = True,
    adapter_rules: Literal["transformers", "vllm"] | None = None,
    is_scripted: bool = False,
    is_recorded: bool = False,
    abilities: tuple[str, ...] = (),
    deployment: str | None = None,
) -> Callable[[Build], Build]:
    """Enter an engine under a name: its class, built from an `EngineContext`, or a function that builds it.

    Building blocks while a model loads, and raises ConfigError. The arguments are the fields of `EngineEntry`.
    """

    def enter(build: Build) -> Build:
        entry = EngineEntry(
            name=name,
            options=options,
            build=build,
            model_prefix=model_prefix,
            is_light=is_light,
            takes_adapters=takes_adapters,
            adapter_rules=adapter_rules,
            is_scripted=is_scripted,
            is_recorded=is_recorded,
            abilities=abilities,
            deployment=deployment,
        )
        return ENGINES.add(entry, build)

    return enter


_HINTS = ("top_k", "min_p", "repetition_penalty", "template")


@engine("transformers", options=TransformersOptions, adapter_rules="transformers", abilities=("template", "tool_prompt"))
def build_transformers(context: EngineContext) -> Engine:
    """Load a model into this process."""
    from dmoa.engines.models import model_id, resolve_adapter, resolve_model
    from dmoa.engines.transformers.engine import TransformersEngine

    part = context.part
    adapters = {name: resolve_adapter(name) for name in context.adapters}
    try:
        return TransformersEngine(
            resolve_model(part.model),
            context.options,
            max_num_seqs=part.max_num_seqs,
            adapters=adapters,
            model_label=model_id(part.model),
            gpu=context.gpus.positions[0] if context.gpus else None,
        )
    except ConfigError as error:
        if not str(error).startswith("model:"):
            raise
        raise ConfigError(f"llms.{context.llm}.{error} (agents on it: {named(context.agents)})") from error


@engine("scripted", options=ScriptedOptions, is_light=True, is_scripted=True)
def build_scripted(context: EngineContext) -> Engine:
    """Return the engine over its table of replies."""
    from dmoa.engines.scripted import ScriptedEngine

    return ScriptedEngine(context.options)


@engine(
    "vllm",
    options=VllmOptions,
    adapter_rules="vllm",
    abilities=(*_HINTS, "schema", "tool_prompt", "logprobs"),
    deployment="dmoa.serving.vllm_replica:vllm_deployment",
)
def build_vllm(context: EngineContext) -> Engine:
    """Start a vLLM beside this process."""
    from dmoa.engines.vllm.start import start_vllm

    started: Engine = start_vllm(context.part, context.llm, sorted(context.adapters), context.gpus)
    return started


@engine(
    "openai",
    options=OpenaiOptions,
    model_prefix="openai",
    is_light=True,
    takes_adapters=False,
    abilities=(*_HINTS, "tools", "schema", "logprobs"),
)
def build_openai(context: EngineContext) -> Engine:
    """Return the client of an endpoint."""
    from dmoa.engines.openai import OpenaiEngine

    try:
        return OpenaiEngine(context.model, context.options, max_num_seqs=context.part.max_num_seqs)
    except ConfigError as error:
        raise ConfigError(f"llms.{context.llm}.{error}") from error


@engine("recorded", options=RecordedOptions, model_prefix="recorded", is_light=True, takes_adapters=False, is_recorded=True)
def build_recorded(context: EngineContext) -> Engine:
    """Index the files of replies, and return the engine over them."""
    from dmoa.engines.recorded import RecordedEngine

    try:
        return RecordedEngine(context.options, tuple(agent.name for agent in context.agents))
    except ConfigError as error:
        raise ConfigError(f"llms.{context.llm}.{error}") from error


def named(agents: tuple[AgentConfig, ...] | list[AgentConfig]) -> str:
    """Return the names of agents for a message: the first few, and how many more there are."""
    names = [agent.name for agent in agents]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
