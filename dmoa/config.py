"""The pool file as a tree of typed, inert records, with the options of every engine and all defaults.

Read by everything that puts a pool together; `yaml_tree` parses the text, `agents/pool` builds from the records.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from dmoa.engine_options import ENGINES, AutoscalingConfig, EngineEntry, EngineName, EngineOptions, Node, fault_of_url, owner_of
from dmoa.errors import ConfigError
from dmoa.plugins import absolute_reference, is_reference, missing_file
from dmoa.plugins import is_name as is_name
from dmoa.reading import home_path
from dmoa.types import Defence, Sampling
from dmoa.validation import describe, did_you_mean, short
from dmoa.yaml_tree import merged, parse_yaml, read, set_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """How a field of `Options` is written as a flag, where its type does not say so."""

    metavar: str | None = None
    """What stands for the value in the help; None: by the type."""
    negation: str | None = None
    """The flag that says no."""
    envvar: str | None = None
    """Environment variable that is read where the flag is not given."""
    is_repeated: bool = False
    """Whether the flag is given once for each value; else one text holds them all."""


def names_of(value: object) -> object:
    """Accept `a,b` where a list of names is expected; a name counts once."""
    names = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    return tuple(dict.fromkeys(names)) if isinstance(names, list) and all(isinstance(name, str) for name in names) else names


Names = Annotated[tuple[str, ...], BeforeValidator(names_of)]
Address = Annotated[str | None, Flag(metavar="RAY", envvar="RAY_ADDRESS")]


class Options(Node):
    """Base of what a command or job is asked to do: flags are made of its fields, and a `job:` section is read as it."""

    where: ClassVar[str] = "job"
    """What messages begin with."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build the options from plain values. Raises ConfigError naming field, value and what is expected."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{cls.where}: {describe(error, cls)}") from error


def _check_name(value: str) -> str:
    if not is_name(value):
        raise ValueError("expected 1-64 lower case letters, digits, '-', '_', '.', the first a letter or digit")
    return value


def _check_adapter(value: str) -> str:
    if not re.fullmatch(r"(builtin|path):.+", value):
        raise ValueError("expected builtin:NAME, path:DIR or null")
    return value


Name = Annotated[str, AfterValidator(_check_name)]
KeyName = Annotated[str, Field(pattern=r"^([0-9a-f]{16}|[0-9a-f]{64})$")]
AdapterSource = Annotated[str, AfterValidator(_check_adapter)]
"""builtin:NAME or path:DIR."""
ToolName = Literal["calculator", "search", "python"]
SUMMARIZER = "summarizer"
"""Name under which the `llm` summarizer is called; no agent may have it."""


class SamplingConfig(Node):
    """How an agent's replies are decoded."""

    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Probability mass kept by nucleus sampling."""
    max_tokens: int = Field(default=96, ge=1, le=131072)
    """Most new tokens of one reply."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=8)
    """Texts that end a reply."""

    def to_sampling(self) -> Sampling:
        """Return the same settings as the record that engines read."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, stop=self.stop)


_ALLOWED_MODELS = "expected embedded:NAME, hub:REPO[@REVISION], path:DIR, s3://..., openai:NAME, scripted:NAME, recorded:NAME"
_SOURCES = ("embedded", "hub", "path", "s3", "openai", "scripted")


class PriceConfig(Node):
    """What a model's tokens cost, in any one currency; the same for all models of a pool."""

    prompt_per_1m: float = Field(ge=0.0, allow_inf_nan=False)
    """For a million prompt tokens, cached ones included."""
    completion_per_1m: float = Field(ge=0.0, allow_inf_nan=False)
    """For a million generated tokens, thoughts included."""


class LlmConfig(Node):
    """One language model and how it is run."""

    model: str = "embedded:smollm2-135m"
    """embedded:NAME, hub:REPO[@REVISION], path:DIR, s3://... (vllm), openai:NAME (as the endpoint calls it), scripted:NAME, or
    recorded:NAME."""
    engine: EngineName = "transformers"
    """transformers: dmoa's own; vllm: Ray Serve LLM; openai: an endpoint elsewhere; scripted: no model, fixed replies;
    recorded: no model, replies from files."""
    placement: Literal["shared", "dedicated", "ingress"] = "shared"
    """shared: all agents of the LLM are records of one deployment; dedicated: one deployment per agent; ingress: they are called
    from the ingress itself, without a hop, what engines `openai` and `recorded` do where neither this nor autoscaling is set."""
    max_num_seqs: int = Field(default=16, ge=1, le=4096)
    """Most sequences in one decoding batch; calls in flight at an endpoint, in placement `ingress` for each ingress."""
    gpus: float = Field(default=0, ge=0)
    """GPUs per replica; dedicated: per agent. With `vllm`: tensor_parallel_size x pipeline_parallel_size, or 0 for the CPU; with
    `transformers` 1 at most."""
    autoscaling: AutoscalingConfig = Field(default_factory=AutoscalingConfig)
    """Replicas of the host in shared placement."""
    price: PriceConfig | None = None
    """What its tokens cost; None: replies have no price, but for recorded ones that have their own."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Typed per engine, unknown keys refused: see `OPTIONS`."""

    @model_validator(mode="before")
    @classmethod
    def _calls_from_the_ingress(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("engine") in ("openai", "recorded") and "autoscaling" not in values:
            return {"placement": "ingress", **values}
        return values

    @field_validator("model")
    @classmethod
    def _known_source(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*:.+", value):
            raise ValueError(_ALLOWED_MODELS)
        return value

    @model_validator(mode="after")
    def _suits_its_engine(self) -> Self:
        entry = self.engine_entry
        if self.placement == "ingress" and not entry.is_light:
            raise ValueError(
                f"placement is 'ingress'; engine {self.engine!r} runs a model, which would hold up every query there; expected "
                "'shared' or 'dedicated'; or use an engine that calls an endpoint"
            )
        try:
            options = self.options
        except ValidationError as error:
            why = describe(error, entry.options)
            raise ValueError(f"engine_kwargs: {why}{owner_of(self.engine_kwargs, self.engine)}") from None
        prefix, own = self.model.partition(":")[0], entry.model_prefix
        if prefix != own and (own is not None or prefix in ("openai", "recorded")):
            owner, prefix = (entry.name, own) if own else (prefix, prefix)
            raise ValueError(
                f"model {short(self.model)} on engine {self.engine!r}; engine {owner!r} runs models {prefix}:NAME, and no "
                "other engine does; change one of the two"
            )
        if prefix not in (own, *_SOURCES):
            raise ValueError(f"model is {short(self.model)}; {_ALLOWED_MODELS}")
        if fault := options.fault_of_gpus(self.gpus):
            raise ValueError(fault)
        return self

    @property
    def engine_entry(self) -> EngineEntry:
        """The engine that runs it. A file's is loaded; raises ConfigError where it cannot be."""
        return ENGINES.load(self.engine, "engine") if is_reference(self.engine) else ENGINES[self.engine]

    @property
    def options(self) -> EngineOptions:
        """`engine_kwargs` as the engine's own typed record."""
        return self.engine_entry.options.model_validate(self.engine_kwargs)


class AgentConfig(Node):
    """One agent: an LLM, perhaps with an adapter, in a role, with tools."""

    name: Name
    """1-64 of a-z, 0-9, `-`, `_` and `.`; unique in the pool."""
    llm: Name
    """Key under `llms`."""
    adapter: AdapterSource | None = None
    """LoRA adapter, builtin:NAME (those that dmoa ships) or path:DIR; None for the base model."""
    profile: str = Field(min_length=1, max_length=4000)
    """The role, in a sentence or two: prompt and, for the `profile` head, the agent's own embedding."""
    tools: tuple[ToolName, ...] = ()
    """What the agent may call: calculator, search (in `tools.search_corpus`), python (in the sandbox)."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    autoscaling: AutoscalingConfig = Field(default_factory=AutoscalingConfig)
    """Replicas in dedicated placement."""
    tags: tuple[Name, ...] = ()
    """Words of your own; nothing reads them."""


class ToolsConfig(Node):
    """What the agents' tools work on."""

    search_corpus: str | None = None
    """JSON Lines file of {title, text} passages for `search`; it must be readable where the agents run."""


class SummarizerConfig(Node):
    """Who folds a step's contributions into the summary, and who decides to stop."""

    mode: Literal["select", "llm"] = "select"
    """select: the reply that agents agree on, else the surest; llm: an agent writes the summary and its verdict."""
    llm: Name | None = None
    """Key under `llms`; needed in `llm` mode."""
    adapter: AdapterSource | None = None
    """As an agent's."""
    profile: str = Field(default="Merges the agents' work into one correct, complete answer.", min_length=1, max_length=4000)
    """Its role, in `llm` mode."""
    share_reasoning: bool = False
    """Whether it reads what agents thought before their answers, in `llm` mode; other agents never do."""
    defence: Defence = "none"
    """Which contributions of three or more count: those that agree, whose answer another agent shares (cluster_filter) or wins
    where half are dropped (dropout_cluster), whose entropy is no outlier (entropy_outlier), or that another agent does not find
    wrong (cross_examination, at a call an answer)."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)

    @model_validator(mode="after")
    def _llm_named(self) -> Self:
        if self.mode == "llm" and self.llm is None:
            raise ValueError("mode 'llm' needs `llm`, a key under llms; or use mode 'select'")
        return self


class ActivationConfig(Node):
    """How many agents a step activates."""

    rule: Literal["top_mass", "fixed", "effective_count"] = "top_mass"
    """top_mass: the smallest set that reaches `mass`; fixed: `max_agents`; effective_count: exp of the entropy, rounded up."""
    mass: float = Field(default=0.8, gt=0.0, le=1.0)
    """tau of `top_mass`: the smallest set whose probability reaches it."""
    cascade: bool = True
    """Let unsure steps run the next-ranked agent too, where a checkpoint carries theta."""
    max_agents: int = Field(default=4, ge=1, le=1024)
    """K, the most active agents of a step, and the k of `fixed`."""


Core = Literal["gru", "reset", "linear", "mlp"]


EntropyScope = Literal["answer", "all"]


class GateConfig(Node):
    """The recurrent gate."""

    preset: Literal["default", "paper"] = "default"
    """default: query and summary apart, with feedback. paper: one embedding of both, no feedback features, no cascade."""
    head: Literal["linear", "profile"] = "linear"
    """linear: a row of weights for every agent; profile: logits from embeddings of the agents' profiles."""
    core: Core = "gru"
    """reset (no state between steps), linear (no GRU) and mlp (one hidden layer instead) are ablations."""
    hidden: int = Field(default=128, ge=1, le=4096)
    """H, the size of the state between steps."""
    temperature: float = Field(default=0.1, gt=0.0, le=100.0)
    """T of the softmax over gate logits."""
    score: Literal["raw", "anchored", "posterior"] = "posterior"
    """What training ranks and theta compares: posterior, the probability of being right by agreement, entropy and outcomes;
    anchored, the entropy less the agent's own usual; or raw (the paper's, and what preset `paper` has where nothing is said)."""
    agent_price: float = Field(default=0.02, ge=0.0, le=1.0)
    """With score posterior, the probability of a right answer that one more agent must be expected to bring to be asked."""
    entropy_scope: EntropyScope = "answer"
    """Which tokens of a reply its entropy is taken over, where a model thinks first: the answer's, or all (paper)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the untrained weights."""
    checkpoint: str | None = None
    """Folder of a dmoa checkpoint, made with this preset; its own settings win over these. None: untrained weights of `seed`."""
    activation: ActivationConfig = Field(default_factory=ActivationConfig)

    @model_validator(mode="before")
    @classmethod
    def _paper_is_raw(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("preset") == "paper":
            return {"score": "raw", **values}
        return values

    @model_validator(mode="after")
    def _paper_is_linear(self) -> Self:
        if self.preset == "paper" and self.head != "linear":
            raise ValueError(f"preset 'paper' has a linear head, head is {self.head!r}; use head 'linear' or preset 'default'")
        return self


class LimitsConfig(Node):
    """Budgets of a query where the client sets none; a client may only lower them."""

    max_steps: int = Field(default=20, ge=1, le=1000)
    """Steps after which the best answer so far is given."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """Prompt and completion tokens of all agents and the summarizer; None: no such limit."""
    budget_price: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What all agents and the summarizer may cost, in the currency of `llms.NAME.price`; None: no such limit."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds after which the best answer so far is given; None: never."""
    quorum: int | None = Field(default=None, ge=1)
    """Replies that end a step of more agents: the others are cancelled and count as `late`; None: all are waited for."""
    hedge_after_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["p95"] | None = None
    """How long a call runs before the next-ranked agent is asked too, p95: of the agent's own latency; None: never."""
    max_queued_requests: int = Field(default=64, ge=1)
    """Queries in flight per ingress replica; one more is answered 429."""


Adaptation = Literal["off", "observe", "canary", "on"]
Guard = Literal["drift", "distance", "held_back", "load", "disagreement", "known_answers", "canary"]


class GuardsConfig(Node):
    """What an offered gate must pass before it decides queries, with `router.adaptation`."""

    skip: Annotated[tuple[Guard, ...], BeforeValidator(names_of)] = ()
    """Guards that are left out. That weights and decisions are finite is always checked."""
    max_kl: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """drift: most nats by which routing on recent inputs may differ from the current gate's, on average; twice at a shift."""
    max_distance: float = Field(default=0.35, gt=0, allow_inf_nan=False)
    """distance: most that the weights may lie from the anchor's, as a share of their norm; twice that at a shift."""
    held_back: float = Field(default=0.2, gt=0, lt=1)
    """held_back: share of finished queries that gates are judged by and never learn from."""
    margin: float = Field(default=0.02, ge=0, lt=1)
    """held_back, known_answers, canary: loss of quality (0 to 1) that does not count as worse."""
    error_rate: float = Field(default=0.05, gt=0, lt=1)
    """held_back, known_answers, canary: probability with which a gate that is not worse is taken for worse."""
    min_effective_agents: float = Field(default=1.5, ge=1, allow_inf_nan=False)
    """load: fewest agents in effect; where the current gate has hardly more, three quarters of what it has."""
    known_answers: str | None = None
    """File of probe inputs with who is right on them (JSON Lines; uses probe labels); None: no such guard."""
    canary_share: float = Field(default=0.2, gt=0, le=0.5)
    """canary: share of new queries that the candidate has (canary; half of them once it is suspect), or the former gate (on)."""
    canary_queries: int = Field(default=50, ge=1)
    """canary: queries of that share after which a gate that was not found worse has passed."""
    cooldown_s: float = Field(default=300.0, ge=0, allow_inf_nan=False)
    """Seconds after a rollback in which no offer is taken."""


class RouterConfig(Node):
    """The central router."""

    state_uri: str | None = None
    """Where versions and state are kept (file://, s3://, gs://); None: a folder in dmoa's cache, for one machine."""
    adaptation: Adaptation = "off"
    """Learning while serving. observe: offered gates are judged, none is installed. canary: one that passes decides a share of
    new queries, then all. on: it decides all but a share at once. Both: it goes where it does worse. See `guards`."""
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    decide: Literal["router", "ingress"] = "router"
    """Who decides: the router, or each ingress by copies of its weights; what is installed and masked is the router's word."""
    max_wait_ms: float = Field(default=0.0, ge=0, le=1000)
    """How long a decision may wait for others to share its batch."""
    probe_interval_s: float = Field(default=0.5, gt=0, le=60)
    """How often a masked agent is tried again."""
    num_traces: int = Field(default=1000, ge=1)
    """Most traces that are kept, for the page and GET /v1/dmoa/traces/{id}; the oldest go."""
    trace_mb: int = Field(default=256, ge=1, le=1048576)
    """Most megabytes of traces; the oldest go."""
    trace_days: float = Field(default=30.0, gt=0, le=3660)
    """Days after which a trace goes."""
    trace_uri: str | None = None
    """Where traces are kept too (file://, s3://, gs://), secrets taken out of their texts; None: in memory alone."""
    feedback: Literal["on", "off"] = "on"
    """Keep a sample of finished queries to learn from, under state_uri: the gate's inputs (embeddings) and hashes of answers, no
    texts. off: nothing is kept, and outcomes are refused."""
    feedback_mb: int = Field(default=32, ge=1, le=65536)
    """Most megabytes of memory that the sample takes, about."""
    feedback_exclude: tuple[KeyName, ...] = ()
    """API keys whose queries teach nothing and are not kept: SHA-256 of each (64 hex digits), or its name in the records (16)."""
    feedback_key_share: float = Field(default=0.5, gt=0, le=1)
    """Most of the sample that one key may fill, and of a batch and of the evidence for a shift where others teach too."""
    feedback_mix_keys: bool = False
    """Whether a batch that is learned from while serving may hold queries of several keys; else they take turns."""
    feedback_anonymous: bool = False
    """Whether queries without an API key teach while serving; they are kept either way."""
    explore: float = Field(default=0.05, ge=0, le=1)
    """With adaptation, the share of queries that are asked once more, of all agents, after their answer has left."""
    explore_after_shift: float = Field(default=0.5, ge=0, le=1)
    """The same for some time after the stream of queries has changed."""
    outcomes_per_minute: int = Field(default=600, ge=1)
    """Most outcomes that one API key may post in a minute; one more is answered 429."""
    outcome_days: float = Field(default=7.0, gt=0, le=3660)
    """Days after its answer in which a query may be judged."""

    @field_validator("adaptation", "feedback", mode="before")
    @classmethod
    def _yaml_switch(cls, value: object) -> object:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _adaptation_is_judged(self) -> Self:
        if self.adaptation != "off" and self.feedback == "off":
            raise ValueError(
                f"router.adaptation is {self.adaptation!r} and router.feedback 'off'; offers are judged by finished queries; set "
                "feedback to 'on', or adaptation to 'off'"
            )
        if self.adaptation == "canary" and "canary" in self.guards.skip:
            raise ValueError(
                "router.guards.skip names 'canary' and router.adaptation is 'canary'; take it out, or set adaptation to 'on'"
            )
        return self


class ServerConfig(Node):
    """The HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach is refused without API keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    max_body_bytes: int = Field(default=1048576, ge=1024)
    """Longest request body; a longer one is answered 413."""
    unknown_fields: Literal["warn", "refuse"] = "warn"
    """What becomes of request fields that dmoa does not know: warn passes over them, and names them in the log, in the header
    x-dmoa-ignored and in the reply; refuse answers 400."""
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")], ...] = ()
    """Origins (https://HOST[:PORT], or *) whose pages may ask this server from a browser."""
    allowed_hosts: tuple[Annotated[str, Field(pattern=r"^(\*|[^/:\s]+)$")], ...] = ()
    """Names of a server without API keys, beside localhost, `host`, the machine's name and addresses; *: any."""
    ingress_replicas: int = Field(default=1, ge=1, le=256)
    """Processes that run the step loop."""
    listener: Literal["ingress", "proxy"] = "ingress"
    """Who listens where `dmoa serve` starts Ray: a single ingress itself, or Serve's proxy, which costs a hop a request and which
    several apps may share. Elsewhere, and for several ingresses: always the proxy."""


class TracingConfig(Node):
    """OpenTelemetry, by the conventions for generative AI."""

    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$")
    """Collector that takes OTLP over HTTP, such as http://HOST:4318; None: off. Headers, keys too: OTEL_EXPORTER_OTLP_HEADERS."""
    content: bool = False
    """Whether spans hold prompts and texts."""

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        # A rule over the record, because the message of a rule over one field would show what may be a secret.
        fault = fault_of_url(self.otlp_endpoint, "OTEL_EXPORTER_OTLP_HEADERS") if self.otlp_endpoint else None
        if fault:
            raise ValueError(f"otlp_endpoint: {fault}; write it as http://HOST:4318, up to what /v1/traces follows")
        return self


class Config(Node):
    """A pool and how it is served: the whole tree."""

    name: Name
    """The model name that clients use."""
    llms: dict[Name, LlmConfig] = Field(min_length=1)
    agents: tuple[AgentConfig, ...] = Field(min_length=1, max_length=4096)
    tools: ToolsConfig = Field(default_factory=ToolsConfig)
    summarizer: SummarizerConfig = Field(default_factory=SummarizerConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    tracing: TracingConfig = Field(default_factory=TracingConfig)

    @model_validator(mode="after")
    def _references(self) -> Self:
        seen: set[str] = set()
        for i, agent in enumerate(self.agents):
            if agent.name in seen:
                raise ValueError(f"agents.{i}.name: {agent.name!r} is taken by an earlier agent; names must differ")
            if agent.name in (self.name, SUMMARIZER):
                raise ValueError(f"agents.{i}.name: {agent.name!r} is taken by the pool or its summarizer; choose another")
            self._check_llm(f"agents.{i}", agent.llm, agent.adapter)
            seen.add(agent.name)
        if self.summarizer.llm is not None:
            self._check_llm("summarizer", self.summarizer.llm, self.summarizer.adapter)
        return self

    @model_validator(mode="after")
    def _recorded_once(self) -> Self:
        """Recorded replies answer the query alone: what would ask more is refused here, before anything starts."""
        recorded = {name for name, llm in self.llms.items() if llm.engine_entry.is_recorded}
        asked = [agent for agent in self.agents if agent.llm in recorded]
        if self.summarizer.mode == "llm" and self.summarizer.llm in recorded:
            raise ValueError(
                f"summarizer.llm is {self.summarizer.llm!r}, whose replies are recorded; a summarizer reads other agents' "
                "replies; use mode 'select'"
            )
        for agent in asked:
            if agent.tools:
                raise ValueError(
                    f"agents.{agent.name}.tools is {list(agent.tools)}; the replies of llms.{agent.llm} are recorded and call no "
                    "tool; leave tools out"
                )
        if asked and self.limits.max_steps != 1:
            raise ValueError(
                f"limits.max_steps is {self.limits.max_steps}; the replies of llms.{asked[0].llm} are recorded, to the query "
                "alone, and a second step asks more; set limits.max_steps to 1"
            )
        return self

    @model_validator(mode="after")
    def _budget_has_prices(self) -> Self:
        lacking = self.unpriced
        if self.limits.budget_price is not None and lacking:
            raise ValueError(
                f"limits.budget_price is {self.limits.budget_price:g}, and llms.{lacking[0]} has no price; a budget needs one of "
                f"every model; set llms.{lacking[0]}.price, or leave budget_price out"
            )
        return self

    @model_validator(mode="after")
    def _room_for_a_step(self) -> Self:
        for name, llm in self.llms.items():
            hosted = sum(agent.llm == name for agent in self.agents)
            together = min(hosted, self.gate.activation.max_agents)
            room = llm.autoscaling.max_queued_calls
            if llm.placement == "shared" and room is not None and room < together:
                raise ValueError(
                    f"llms.{name}.autoscaling.max_queued_calls is {room}; one step may send it {together} calls at "
                    f"once, and calls on their way count; expected at least {together}; raise it, or lower "
                    "gate.activation.max_agents"
                )
        return self

    def _check_llm(self, where: str, llm: str, adapter: str | None) -> None:
        if llm not in self.llms:
            raise ValueError(
                f"{where}.llm: {llm!r} is not defined; expected one of {', '.join(self.llms)}; add it under llms or fix the name"
                f"{did_you_mean(llm, self.llms)}"
            )
        if adapter is not None and not self.llms[llm].engine_entry.takes_adapters:
            raise ValueError(
                f"{where}.adapter is {short(adapter)}; engine {self.llms[llm].engine!r} (llms.{llm}) takes none: an endpoint "
                "serves an adapter under a model name of its own; set adapter to null, and add an LLM of that name"
            )

    @property
    def unpriced(self) -> tuple[str, ...]:
        """The models that are asked and have no price; recorded replies have their own."""
        asked = {agent.llm for agent in callable_agents(self)}
        return tuple(
            name for name, llm in self.llms.items() if name in asked and llm.price is None and not llm.engine_entry.is_recorded
        )

    @property
    def agent_names(self) -> tuple[str, ...]:
        """Names of the agents in the pool's order."""
        return tuple(agent.name for agent in self.agents)

    def changed(self, section: str, **values: Any) -> Self:
        """Return the pool with some fields of a section replaced."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})

    def agent(self, name: str) -> AgentConfig:
        """Return the agent called `name`; KeyError if there is none."""
        return {agent.name: agent for agent in self.agents}[name]

    def scaling_of(self, agent: AgentConfig) -> AutoscalingConfig:
        """Return what the replicas that an agent runs on are scaled by: its own in dedicated placement, else its LLM's.

        Those in the ingress are scaled with it, by nothing of their own.
        """
        llm = self.llms[agent.llm]
        return {"shared": llm.autoscaling, "dedicated": agent.autoscaling}.get(llm.placement) or AutoscalingConfig()

    def unused_scaling(self) -> tuple[str, ...]:
        """Return what is said of `autoscaling` blocks that scale nothing in the placement of their LLM, a sentence each."""
        said = [
            f"agents.{i}.autoscaling is not used: {agent.llm!r} is in {self.llms[agent.llm].placement} placement; "
            f"set llms.{agent.llm}.autoscaling, or make its placement dedicated"
            for i, agent in enumerate(self.agents)
            if self.llms[agent.llm].placement != "dedicated" and agent.autoscaling != AutoscalingConfig()
        ]
        said += [
            f"llms.{name}.autoscaling is not used: its placement is {llm.placement}; "
            + ("set the autoscaling of its agents" if llm.placement == "dedicated" else "set server.ingress_replicas, or another")
            for name, llm in self.llms.items()
            if llm.placement != "shared" and llm.autoscaling != AutoscalingConfig()
        ]
        return tuple(said)


def parse_gate(tree: dict[str, Any]) -> GateConfig:
    """Build a gate's settings from plain values, their types taken strictly. Raises ConfigError."""
    try:
        return GateConfig.model_validate(tree, strict=True)
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = (), changes: Mapping[str, Any] | None = None) -> Config:
    """Read a pool file, `-` for standard input, lay `changes` over it as `merged` does, and apply `a.b=c` overrides.

    Raises ConfigError naming file, field, value and what is expected.
    """
    try:
        text, source = read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: cannot read {str(path)!r}: {error}; give the path of a pool YAML file") from error
    tree = parse_yaml(text, source)
    return from_tree(merged(tree, changes) if changes else tree, source=source, overrides=overrides)


def loads(text: str, *, source: str = "<text>", overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Build a configuration from YAML text. Raises ConfigError."""
    return from_tree(parse_yaml(text, source), source=source, overrides=overrides)


def from_tree(tree: Any, *, source: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Build a configuration from plain values, which are changed. Raises ConfigError."""
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{source}: {short(tree)} is not a pool; write a mapping with the keys {', '.join(Config.model_fields)}"
        )
    tree.pop("job", None)
    for override in overrides:
        set_value(tree, override)
    _find_engine_files(tree, Path(source).parent if Path(source).is_file() else Path())
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe(error, Config)}") from error


def _find_engine_files(tree: dict[str, Any], folder: Path) -> None:
    """Make the paths of engines and of their files absolute in place.

    Raises ConfigError for an engine's file that is in neither of the two folders.
    """
    llms = tree.get("llms")
    for name, llm in llms.items() if isinstance(llms, dict) else ():
        if isinstance(llm, dict) and isinstance(llm.get("engine"), str) and is_reference(llm["engine"]):
            fault = missing_file(llm["engine"], folder)
            if fault:
                raise ConfigError(f"llms.{name}: engine: {fault}")
            llm["engine"] = absolute_reference(llm["engine"], folder)
        given = llm.get("engine_kwargs") if isinstance(llm, dict) and llm.get("engine") == "recorded" else None
        if isinstance(given, dict) and isinstance(given.get("replies"), str):
            beside = folder / given["replies"]
            given["replies"] = str((beside if beside.exists() else home_path(given["replies"])).absolute())


def summarizer_agent(config: Config) -> AgentConfig | None:
    """Return the `llm` summarizer as an agent of its own, None in `select` mode."""
    part = config.summarizer
    if part.mode != "llm" or part.llm is None:
        return None
    return AgentConfig(name=SUMMARIZER, llm=part.llm, adapter=part.adapter, profile=part.profile, sampling=part.sampling)


def callable_agents(config: Config, llm: str | None = None) -> list[AgentConfig]:
    """Return the pool's agents and its summarizer, all of them or those on one LLM."""
    extra = summarizer_agent(config)
    everyone = [*config.agents, *([extra] if extra else [])]
    return [agent for agent in everyone if llm is None or agent.llm == llm]
