"""Replicas of agents, options of every engine (what `llms.NAME.engine_kwargs` are read as), and the engines by name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeFloat, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from dmoa.errors import ConfigError
from dmoa.plugins import Registry, absolute_reference, is_reference
from dmoa.protocols import Engine
from dmoa.types import ColdPolicy
from dmoa.validation import short


class Node(BaseModel):
    """Base of every configuration record: frozen, unknown keys refused, fields documented in place."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What an engine does with memory, as far as `--dry-run` estimates it."""

    dtype: str
    """What weights, keys and values are kept in; auto: as the model was published."""
    max_model_len: int | None
    """Longest prompt plus reply in tokens; None: as the model allows."""
    gpu_share: float | None = None
    """Part of each of its GPUs that it may fill; None: the part of a GPU that the replica has."""
    cpu_room_gib: int | None = None
    """Memory for keys and values without a GPU; None: what there is."""
    adapter_rank: int | None = None
    """Rank that room is made for, whatever the adapter's own; None: adapters are loaded as their files are."""
    max_adapters: int | None = None
    """Adapters of one batch, where room is made for them; None: all."""


class AutoscalingConfig(Node):
    """How many replicas an agent (dedicated) or an LLM's host (shared) runs on."""

    min_replicas: int = Field(default=1, ge=0, le=1024)
    """0: while nobody asks it, it has no replica and holds no GPU; it is then cold, see `cold`."""
    max_replicas: int = Field(default=1, ge=1, le=1024)
    """Most replicas under load."""
    target_ongoing_requests: float = Field(default=8.0, gt=0)
    """Calls in flight per replica that autoscaling aims at."""
    upscale_delay_s: float = Field(default=5.0, ge=0, le=86400)
    """How long the load must be above target before replicas are added; the first replica of a cold one starts at once."""
    downscale_delay_s: float = Field(default=300.0, ge=0, le=86400)
    """How long the load must be below target before replicas are taken away, all but the last."""
    downscale_to_zero_delay_s: float = Field(default=900.0, ge=0, le=86400)
    """How long nobody may have asked before the last replica goes; only with min_replicas 0."""
    max_queued_calls: int | None = Field(default=None, ge=1, le=1_000_000)
    """Calls that may wait for room in each replica beyond its batch, and as many in each ingress, before the agent counts as
    overloaded and the next-ranked one takes its place; None: three batches in a replica, sixteen in an ingress."""
    cold: ColdPolicy = "wait"
    """What a query does with an agent without a replica. wait: it waits for one. skip: the next-ranked agent takes its place,
    and a replica is started for later queries. warm_on_rank: a replica is started as soon as the agent is among the K most
    probable ones of a decision, chosen or not; a query that chose it waits. Only with min_replicas 0."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, below min_replicas {self.min_replicas}; raise it or lower the minimum"
            )
        if self.cold != "wait" and self.min_replicas > 0:
            raise ValueError(
                f"cold is {self.cold!r}; with min_replicas {self.min_replicas} there is always a replica; "
                "set min_replicas to 0, or leave cold out"
            )
        return self


class EngineOptions(Node):
    """Base of the options of an engine, which `engine_kwargs` are read as; an engine from a file says the same by its own."""

    @property
    def endpoint(self) -> str:
        """URL of the server where the model runs, part of what the model is; empty where dmoa runs it."""
        return ""

    @property
    def key_variable(self) -> str | None:
        """NAME of the environment variable with the endpoint's key, which `serve` and `doctor` look for; None: no key."""
        return None

    @property
    def gpu_split(self) -> tuple[int, int] | None:
        """GPUs of a replica that compute each layer together, and groups of layers; None: all its GPUs are on one node."""
        return None

    @property
    def gpu_kind(self) -> str | None:
        """Kind of GPU that it must have, as Ray names it; None: any."""
        return None

    @property
    def max_adapter_rank(self) -> int | None:
        """Largest rank of an adapter; None: any."""
        return None

    @property
    def abilities(self) -> tuple[str, ...]:
        """What the options add to the abilities of the engine."""
        return ()

    @property
    def memory_use(self) -> MemoryUse | None:
        """What it does with memory; None: it loads no model, or nothing is known of it."""
        return None

    def fault_of_gpus(self, gpus: float) -> str | None:
        """Return what is wrong with so many GPUs for a replica, None if nothing."""
        if gpus > 1 and gpus % 1:
            return f"gpus is {gpus:g}; Ray gives a part of one GPU, or whole ones; expected a number up to 1, or a whole one"
        return None


class TransformersOptions(EngineOptions):
    """Options of the `transformers` engine; each is named in every result."""

    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Weights and arithmetic; int8 is dynamic int8 weights on CPU, without adapters."""
    compile: bool = False
    """Run the decode step through torch.compile; needs a C++ compiler on CPU, and agents without adapters."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where torch sees one, else the CPU."""
    threads: int | None = Field(default=None, ge=1, le=256)
    """CPU threads of the engine; None: half of the cores, because the small operations of small models gain little from more,
    lose much where another process wants a core, and gateway, router and encoder need theirs."""
    max_model_len: int = Field(default=2048, ge=64, le=1048576)
    """Longest prompt plus reply in tokens; where the model was made for fewer, that is the limit."""
    prefix_cache: bool = True
    """Reuse the keys and values of the prompt prefix shared by the agents of a step."""

    @property
    def memory_use(self) -> MemoryUse:
        return MemoryUse(dtype=self.dtype, max_model_len=self.max_model_len)

    def fault_of_gpus(self, gpus: float) -> str | None:
        if gpus > 1:
            return f"gpus is {gpus:g}; engine 'transformers' computes on one GPU; set gpus to 1 or less, or use engine vllm"
        if gpus and (self.device == "cpu" or self.dtype == "int8"):
            on_cpu = f"engine_kwargs.device {self.device!r} and dtype {self.dtype!r} run on the CPU"
            return f"gpus is {gpus:g}; {on_cpu}; set gpus to 0, or change these"
        return None


class ScriptedOptions(EngineOptions):
    """Options of the `scripted` engine: deterministic stand-ins for tests and for measuring overhead."""

    delay_ms: float = Field(default=0.0, ge=0.0)
    """How long every reply takes."""
    delays_ms: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Delay by agent name, over `delay_ms`."""
    replies: dict[str, str] = Field(default_factory=dict)
    """Reply by agent name; `{query}` in it stands for the last user message. Others echo."""
    failing: tuple[str, ...] = ()
    """Agents whose every call fails."""
    tokens: int = Field(default=8, ge=1)
    """Completion tokens that every reply claims."""
    entropies_nats: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Mean entropy by agent name; others get one from the hash of agent and query."""


class VllmOptions(EngineOptions):
    """Options of the `vllm` engine (extra `vllm`): the ones of vLLM's own that a pool has a say in, by their names there."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and arithmetic; auto: as the model was published."""
    max_model_len: int | None = Field(default=None, ge=64)
    """Longest prompt plus reply in tokens; None: as the model allows."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """GPUs over which every layer is split; they are on one node."""
    pipeline_parallel_size: int = Field(default=1, ge=1, le=64)
    """Groups of layers that run one after the other, each on GPUs of its own."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Part of each GPU's memory that weights, activations and keys and values may fill."""
    accelerator_type: str | None = Field(default=None, max_length=64)
    """Kind of GPU as Ray names it, such as H100; None: any."""
    block_size: int | None = Field(default=None, ge=1, le=256)
    """Tokens of one block of keys and values: only whole blocks are reused; None: 32 on a CPU, as vLLM chooses on a GPU."""
    enforce_eager: bool = False
    """Run without compiled graphs: starts sooner, decodes slower. Always so on a CPU."""
    prefix_cache: bool = True
    """Reuse the keys and values of the prompt prefix shared by the agents of a step."""
    enable_sleep_mode: bool = False
    """Start vLLM so that the methods `sleep` and `wakeup` of its replicas work, through a Serve handle. On GPUs only."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Room for the ranks of the agents' adapters."""
    max_loras: int | None = Field(default=None, ge=1, le=256)
    """Adapters of one batch; None: all that the agents of this LLM have."""
    entropy: Literal["exact", "listed"] = "exact"
    """exact: computed inside vLLM, over the whole vocabulary, by a logits processor; listed: bounds from `top_logprobs`
    log-probabilities per token, from vLLM as it comes. No option here turns speculative decoding on; a checkpoint that names
    its own draft model does so by itself, and with it vLLM takes no processor: then `listed` is needed."""
    top_logprobs: int = Field(default=20, ge=1, le=20)
    """Log-probabilities asked for per token where `entropy` is listed."""
    reasoning_parser: str | None = Field(default=None, min_length=1, max_length=64)
    """One of vLLM's own reasoning parsers, by its name there, such as deepseek_r1: it then tells thoughts from the answer; None:
    tags such as <think> and the channels of gpt-oss do, which is enough where the tokenizer keeps them."""
    tool_parser: str | None = Field(default=None, min_length=1, max_length=64)
    """One of vLLM's own tool parsers, by its name there, such as hermes: the model is told of a client's tools by its chat
    template, and calls them in its own form; None: tools are asked for in words."""
    cpu_kv_cache_gib: int = Field(default=1, ge=1, le=1024)
    """Memory for keys and values where no GPU is asked for."""
    threads: int | None = Field(default=None, ge=1, le=256)
    """CPU threads where no GPU is asked for; None: half of the cores."""

    @property
    def abilities(self) -> tuple[str, ...]:
        return ("tools",) if self.tool_parser else ()

    @property
    def num_workers(self) -> int:
        """Devices that one replica runs on."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def gpu_split(self) -> tuple[int, int]:
        return self.tensor_parallel_size, self.pipeline_parallel_size

    @property
    def gpu_kind(self) -> str | None:
        return self.accelerator_type

    @property
    def max_adapter_rank(self) -> int:
        return self.max_lora_rank

    @property
    def memory_use(self) -> MemoryUse:
        return MemoryUse(
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            gpu_share=self.gpu_memory_utilization,
            cpu_room_gib=self.cpu_kv_cache_gib,
            adapter_rank=self.max_lora_rank,
            max_adapters=self.max_loras,
        )

    def fault_of_gpus(self, gpus: float) -> str | None:
        if gpus and gpus != self.num_workers:
            return (
                f"gpus is {gpus:g}; tensor_parallel_size {self.tensor_parallel_size} x pipeline_parallel_size "
                f"{self.pipeline_parallel_size} run on {self.num_workers}; set gpus to that, or to 0 for the CPU"
            )
        if self.enable_sleep_mode and not gpus:
            return (
                "engine_kwargs: enable_sleep_mode is true with gpus 0; vLLM gives memory back on GPUs only; leave it out, or set "
                "gpus"
            )
        return None


class OpenaiOptions(EngineOptions):
    """Options of the `openai` engine: an OpenAI-compatible endpoint that runs elsewhere."""

    base_url: str
    """What `/chat/completions` is appended to, such as https://api.example.com/v1; without user, query and fragment."""
    api_key_env: str | None = None
    """NAME of the environment variable that holds the key where the engine runs, never the key; None: no key is sent."""
    timeout_s: float = Field(default=120.0, gt=0.0, le=3600.0)
    """Longest silence: until the reply of an unstreamed call, between two pieces of a stream. Connecting may take 10 s of it."""
    max_retries: int = Field(default=2, ge=0, le=10)
    """How often a call is sent again after status 408, 429 or 5xx and after a lost connection, within the query's deadline."""
    top_logprobs: int = Field(default=20, ge=0, le=20)
    """Log-probabilities asked for per token; 0 asks for none: the entropies are then unknown, and no reply counts as sure."""
    vocab_size: int = Field(default=128000, ge=2, le=10000000)
    """Size of the model's vocabulary, which endpoints do not tell: what probability that is not listed may be spread over."""
    continue_final_message: bool = False
    """Ask for the assistant's own beginning to be continued in place, after a tool's result say (vLLM and SGLang can);
    else it stands as a turn before the reply."""

    @property
    def endpoint(self) -> str:
        return self.base_url.rstrip("/")

    @property
    def key_variable(self) -> str | None:
        return self.api_key_env

    def fault_of_gpus(self, gpus: float) -> str | None:
        return f"gpus is {gpus:g}; engine 'openai' runs its model elsewhere; set gpus to 0" if gpus else None

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        # A rule over the record, because the message of a rule over one field would show what may be a secret.
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError(
                "api_key_env: the value is not a variable's name (A-Z, 0-9 and '_', not beginning with a digit); "
                "name the variable that holds the key, and keep the key itself out of this file"
            )
        fault = fault_of_url(self.base_url, "the variable of api_key_env")
        if fault:
            raise ValueError(f"base_url: {fault}; write it as https://HOST[:PORT]/PATH, up to what /chat/completions follows")
        return self


class RecordedOptions(EngineOptions):
    """Options of the `recorded` engine: replies that models gave before, from files; nothing is generated."""

    replies: str
    """File of replies, or folder of such files: JSON Lines (also .gz) or Parquet with query_id, query, agent and text. A relative
    path is taken from the pool file, else from the working directory."""
    names: dict[str, str] = Field(default_factory=dict)
    """What the files call an agent, by its name in the pool; others go by their own name, in small letters and with `-` for
    signs that no name has."""
    vocab_size: int = Field(default=128000, ge=2, le=10000000)
    """Size of the models' vocabulary, for replies with `top_logprobs`: what probability that is not listed may be spread over."""

    def fault_of_gpus(self, gpus: float) -> str | None:
        return f"gpus is {gpus:g}; engine 'recorded' runs no model; set gpus to 0" if gpus else None


def fault_of_url(url: str, keys: str) -> str | None:
    """Return what is wrong with the URL of an endpoint, None if nothing; parts that may hold a secret are not repeated.

    `keys` says where secrets belong.
    """
    if re.search(r"[@?#]", url):
        return f"the URL has a user part, a query or a fragment; none is allowed (a key goes into {keys})"
    try:
        parts = urlsplit(url)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        has_host = False
    is_whole = has_host and url.isascii() and url.isprintable() and " " not in url
    return None if is_whole else f"{short(url)} is not an http or https URL with a host"


_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")


def read_key(variable: str | None) -> str:
    """Return the key in an environment variable, empty where none is named. Raises ConfigError, never with the key."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"engine_kwargs.api_key_env: the variable {variable} is not set where the engine runs, or empty; set it there "
            "before Ray is started, or set api_key_env to null for an endpoint without keys"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", key):  # else the HTTP library would refuse the header and show it
        raise ConfigError(f"engine_kwargs.api_key_env: the value of {variable} holds characters that no key has; set it again")
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """One engine: what the rest of dmoa has to know of it before it is built."""

    name: str
    options: type[EngineOptions]
    """What `engine_kwargs` are read as."""
    build: Callable[[Any], Engine]
    """Builds the engine from an `engines.EngineContext`."""
    model_prefix: str | None = None
    """Its models are written PREFIX:NAME and are no other engine's; None: it takes what has weights, or scripted:NAME."""
    is_light: bool = False
    """Loads no weights and asks for no processor of its own."""
    takes_adapters: bool = True
    adapter_rules: Literal["transformers", "vllm"] | None = None
    """Which of dmoa's checks the files of its adapters must pass before it is built; None: it checks them itself."""
    is_scripted: bool = False
    """Has no model at all: replies hang on the agent's name, and a pool of such engines alone needs no sentence encoder."""
    is_recorded: bool = False
    """Has replies to queries alone: a prompt with earlier work, turns, tools or an instruction in it cannot be answered."""
    abilities: tuple[str, ...] = ()
    """What it can do beyond plain replies: names of `Sampling` fields that it knows (template, top_k, min_p, ...), and what it
    takes of a `FinalCall`: tools, or tool_prompt where dmoa asks for calls in words; schema; logprobs."""
    deployment: str | None = None
    """`module:function` that makes its Serve deployment; None: replicas build the engine as any other process does."""

    def __post_init__(self) -> None:
        """Raise TypeError for options that are no record of theirs: the decorator takes whatever it is given."""
        if not (isinstance(self.options, type) and issubclass(self.options, EngineOptions)):
            raise TypeError(f"@engine({self.name!r}): options is {short(self.options)}; expected a subclass of EngineOptions")

    @property
    def loads_weights(self) -> bool:
        """Whether dmoa finds, fetches and checks the weights of its models."""
        return not self.is_light and self.model_prefix is None


_BUILTIN = ["transformers", "scripted", "vllm", "openai", "recorded"]
# By name, because engines are above the configuration.
ENGINES: Registry[EngineEntry] = Registry(
    EngineEntry, what="engine", group="dmoa.engines", builtin={name: f"dmoa.engines:build_{name}" for name in _BUILTIN}
)


def _check_engine(value: str) -> str:
    if is_reference(value):
        return absolute_reference(value)
    if value not in ENGINES:
        names = ", ".join(map(repr, ENGINES))
        raise PydanticCustomError("engine", "expected {expected} or FILE.py:NAME", {"expected": names})
    return value


def owner_of(given: Iterable[str], engine: str) -> str:
    """Return the end of an error: which engine has the first of the options that an engine lacks; empty where none has it."""
    known = {name: entry.options.model_fields for name, entry in ENGINES.items()}
    foreign = next((option for option in given if option not in known.get(engine, {})), None)
    owners = " and ".join(name for name, options in known.items() if foreign in options)
    return f"; {foreign} is an option of engine {owners}, and this LLM's engine is {engine}" if owners else ""


EngineName = Annotated[
    str,
    AfterValidator(_check_engine),
    WithJsonSchema({"anyOf": [{"enum": _BUILTIN, "type": "string"}, {"type": "string"}]}),
]
"""Name of an engine, of dmoa's own or of an installed package, or `FILE.py:NAME`."""
