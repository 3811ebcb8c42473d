"""Records that travel between the parts of dmoa: queries, calls, replies, decisions, steps, answers.

Frozen records of plain values and CPU arrays, so that each may cross a process boundary. Shape letters: A agents in the pool,
D embedding, F feedback features, H gate hidden, X gate input (D, or 2D + F). Entropies in nats, durations in the name's unit.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from dmoa.answer_form import Choice as Choice
from dmoa.answer_form import FinalCall as FinalCall
from dmoa.answer_form import ToolCall as ToolCall
from dmoa.records import quicken

FloatArray = npt.NDArray[np.float32]
"""A CPU array of float32."""

Role = Literal["system", "user", "assistant"]
AgentStatus = Literal["ok", "failed", "late", "overloaded", "cold", "masked", "idle", "examiner"]
ColdPolicy = Literal["wait", "skip", "warm_on_rank"]
EntropyKind = Literal["exact", "truncated"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
StopReason = Literal[
    "summarizer",
    "agreement",
    "sure",
    "max_steps",
    "budget_tokens",
    "budget_price",
    "budget_calls",
    "deadline",
    "single",
    "no_agent",
    "stages",
    "schedule",
]
Verdict = Literal["final", "continue", "unparsable", "rule"]
Fold = Literal["summarizer", "pass", "vote", "surest", "keep"]
Defence = Literal["none", "agreement", "cluster_filter", "dropout_cluster", "entropy_outlier", "cross_examination"]
RoutedBy = Literal["router", "ingress"]

UNTRAINED = "untrained-"
"""Prefix of the version of gate weights that no training has touched."""


def question_key(text: str) -> str:
    """Return the digest of a query's text, the same for texts that differ in white space or Unicode composition alone."""
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


OUTCOMES = "outcomes"
"""Begins the version of weights that outcomes were a part of: `outcomes-20-` and the hash, so that whoever sees it knows."""


def is_untrained(gate_version: str) -> bool:
    """Tell whether a gate version names weights that no training has touched."""
    return gate_version.startswith(UNTRAINED)


def supervision_of(gate_version: str) -> str:
    """Return what a gate's training was told of how good replies are, as its version says: `none`, or `outcomes(N)`."""
    word, number, *_ = [*gate_version.split("-"), ""]
    return f"outcomes({number})" if word == OUTCOMES and number.isdigit() else "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a reply is decoded."""

    temperature: float = 0.0
    """0 is greedy; else softmax temperature, 0..2."""
    top_p: float = 1.0
    """Probability mass kept by nucleus sampling, (0, 1]."""
    max_tokens: int = 96
    """Most new tokens of one generation."""
    stop: tuple[str, ...] = ()
    """Texts that end a generation; the text itself is not part of the reply."""
    seed: int | None = None
    """Seed of the sampling; None: from the call's id, so a repeated call repeats."""
    top_k: int | None = None
    """Most probable tokens that are kept; None, -1: all. This and the fields below are for engines that know them."""
    min_p: float | None = None
    """Least probability of a kept token, as a share of the most probable one's."""
    repetition_penalty: float | None = None
    """Factor above 1 by which tokens that were there before lose."""
    template: tuple[tuple[str, bool | int | float | str], ...] = ()
    """Settings of the model's chat template, such as enable_thinking, by name."""
    given: tuple[str, ...] = field(default=(), compare=False)
    """Fields that the client set itself: endpoints are sent those also where they are as good as absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """Tokens of one call, or with `+` of several."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Part of prompt_tokens whose keys and values were reused from another request."""
    completion_tokens: int = 0
    """Generated tokens, stop tokens included."""
    reasoning_tokens: int = 0
    """Part of completion_tokens that the model thought with, delimiters included."""

    @property
    def total(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(**{part: getattr(self, part) + getattr(other, part) for part in self.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What tokens of a model cost, in any one currency."""

    prompt_per_1m: float = 0.0
    """For a million prompt tokens, cached ones included."""
    completion_per_1m: float = 0.0
    """For a million generated tokens, thoughts included."""

    def of(self, usage: TokenUsage) -> float:
        """Return what the tokens of a call cost."""
        return (usage.prompt_tokens * self.prompt_per_1m + usage.completion_tokens * self.completion_per_1m) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropySum:
    """Entropy of the next-token distributions of a reply, summed over its tokens; `+` puts tokens together."""

    sum_nats: float = 0.0
    """Sum over the tokens of the entropy of the whole next-token distribution, before temperature."""
    sq_sum: float = 0.0
    """Sum of the squares of the same entropies."""
    slack_nats: float = 0.0
    """How far the sum may be off either way where it is the middle of two bounds; 0 for exact entropies."""
    tokens: int = 0
    """Tokens in the sums: for exact entropies all generated ones, 0 where nothing is known of the entropy."""
    kind: EntropyKind = "exact"
    """truncated: of at least one part only listed log-probabilities are known."""

    @classmethod
    def of_tokens(cls, entropies: Sequence[float]) -> EntropySum:
        """Return the sum over tokens whose entropies are exact."""
        return cls(sum_nats=sum(entropies, 0.0), sq_sum=sum((nats * nats for nats in entropies), 0.0), tokens=len(entropies))

    def __add__(self, other: EntropySum) -> EntropySum:
        return EntropySum(
            sum_nats=self.sum_nats + other.sum_nats,
            sq_sum=self.sq_sum + other.sq_sum,
            slack_nats=self.slack_nats + other.slack_nats,
            tokens=self.tokens + other.tokens,
            kind=self.kind if self.kind == other.kind else "truncated",
        )

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite; if not, the engine's numbers broke."""
        return math.isfinite(self.sum_nats) and math.isfinite(self.sq_sum) and math.isfinite(self.slack_nats)

    @property
    def mean_nats(self) -> float | None:
        """Mean entropy in nats per token; None where it is not known: no tokens, or a sum that is not a number from 0."""
        is_known = self.tokens > 0 and math.isfinite(self.sum_nats) and self.sum_nats >= 0.0
        return self.sum_nats / self.tokens if is_known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What an engine is asked to generate: one continuation of one conversation; the last three fields are the call's."""

    request_id: str
    """Unique among the requests in flight; the handle for cancelling."""
    messages: tuple[Message, ...]
    """Conversation; the last message is the user's, or the assistant's own beginning to be continued."""
    sampling: Sampling
    adapter: str | None = None
    """Name of the LoRA adapter (as registered with the engine), None for the base model."""
    deadline_unix_s: float | None = None
    """When to give up (time.time()), None for never."""
    agent: str = ""
    """Name of the agent that asks; scripted engines answer by it."""
    call_id: str = ""
    """Stable name of the call, `trace/step/agent`: seeds the sampling, so a repeated call repeats."""
    question: str = ""
    query_id: str = ""
    final: FinalCall | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What an engine generated."""

    text: str
    """The answer; an engine that does not part thoughts leaves them in it, and the agent parts them."""
    reasoning: str = ""
    """What the model thought before it answered, where the engine parts it from the text."""
    raw: str = ""
    """All that was generated, thought and delimiters included, as a message that is continued holds it; empty: the text."""
    finish_reason: FinishReason
    entropy: EntropySum
    """Over the generated tokens of the text, stop token included."""
    reasoning_entropy: EntropySum = EntropySum()
    """Over the generated tokens of the thought, delimiters included."""
    usage: TokenUsage
    are_tokens_estimated: bool = False
    """Whether the counts in `usage` are guesses, because an endpoint did not tell."""
    price: float | None = None
    """What it cost, where the engine knows; None: as the configured price of its tokens says."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of the client's tools, where the engine parts them from the text."""
    logprobs: tuple[dict[str, Any], ...] | None = None
    """Per token of the text what `FinalCall.top_logprobs` asks for, as OpenAI's objects; None: not known."""
    engine_ms: float = 0.0
    """From the engine's accept to the last token."""
    queue_ms: float = 0.0
    """Part of engine_ms before the request's prefill began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """A piece of streamed text."""

    text: str
    is_reasoning: bool = False
    """Whether it is a piece of a thought, and so no part of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCall:
    """One call of one agent in one step of one query. Idempotent by `call_id`."""

    trace_id: str
    step: int
    agent: str
    messages: tuple[Message, ...]
    """The whole prompt, laid out by `agents.prompts`."""
    sampling: Sampling
    deadline_unix_s: float | None = None
    conversation: str = ""
    """`Query.conversation`: calls that share it find each other's prompt prefix in a replica's cache; empty: none is shared."""
    question: str = ""
    """`question_key` of the query where the prompt is that text in the agent's role; empty where there is more in the prompt."""
    query_id: str = ""
    """`Query.query_id`."""
    sample: int = 0
    """As the activation's."""
    final: FinalCall | None = None
    """What is asked of the call that writes a client's answer; the engine of its agent can do it."""

    @property
    def call_id(self) -> str:
        """`trace/step/agent`, with `~sample` after the first of several; the same for every attempt of the call."""
        return f"{self.trace_id}/{self.step}/{self.agent}{f'~{self.sample}' if self.sample else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReply:
    """What an agent contributed to a step, or why it did not."""

    agent: str
    status: AgentStatus
    text: str = ""
    """The answer: what everybody else sees, compares and builds on."""
    reasoning: str = ""
    """What it thought before: kept for traces, no part of the contribution."""
    finish_reason: FinishReason = "stop"
    entropy: EntropySum = EntropySum()
    """Over the answer's tokens; with `gate.entropy_scope: all` over the thought's too."""
    reasoning_entropy: EntropySum = EntropySum()
    """Over the thought's tokens alone."""
    usage: TokenUsage = TokenUsage()
    are_tokens_estimated: bool = False
    latency_ms: float = 0.0
    """From the call to the reply, as the caller saw it."""
    engine_ms: float = 0.0
    """Part of latency_ms between the engine's accept and its last token, over all rounds of a tool loop."""
    error: str | None = None
    """Why there is no contribution, or what an earlier attempt of this call met."""
    attempts: int = 1
    """How often the call was sent; above 1 an earlier attempt was lost."""
    engine: str = ""
    """Engine and the options that may change numbers, such as `transformers/float32`."""
    is_memoised: bool = False
    """Whether the call cache gave this reply; its counts and times are those of the run that filled the cache."""
    replica: str = ""
    """Serve's name of the replica that answered; empty where agents do not run on Serve."""
    right_probability: float | None = None
    """That its answer is right, given all replies of its step; None where the gate version has no label model."""
    price: float | None = None
    """What the call cost; None where no price is known."""
    prompt: tuple[Message, ...] = field(default=(), compare=False, repr=False)
    """What it was asked, message by message; empty where that is not known. Kept for traces."""
    sent_unix_s: float = field(default=0.0, compare=False, repr=False)
    """When it was asked, 0 where that is not known."""
    is_barred: bool = False
    """Whether the pool's defence left it out: then it is recorded, and counts for nothing."""
    is_bug: bool = False
    """Whether it failed because code is wrong, a tool's or an engine's; counted apart, for no other call does better."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of the client's tools; only of a final call."""
    logprobs: tuple[dict[str, Any], ...] | None = None
    """As the generation's; only of a final call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """What the gate is asked: one step of one query."""

    input_X: FloatArray
    """The gate's input: [X] float32."""
    hidden_H: FloatArray | None = None
    """Hidden state after the previous step, [H] float32; None at the first step."""
    gate_version: str | None = None
    """Version to decide with; None at the first step: the current one."""
    max_agents: int | None = None
    """Upper limit of this query on k; None: the gate's own."""
    unavailable: tuple[str, ...] = ()
    """Agents that this query found dead, beyond those that the router masks."""
    trace_id: str = ""
    """Of the query: chance by which a trial of two gate versions gives it one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDecision:
    """What the gate decided for one step."""

    gate_version: str
    agents: tuple[str, ...]
    """All agents of the pool, in the pool's order: names of the entries of probability_A."""
    probability_A: FloatArray
    """[A] float32, sums to 1; exactly 0 where masked."""
    ranking: tuple[int, ...]
    """Indices of the available agents, most probable first, ties by pool order."""
    k: int
    """How many of `ranking` are active, 1..K."""
    mass: float
    """Probability of the active set."""
    masked: tuple[str, ...] = ()
    """Agents left out because they were unavailable."""
    cold: tuple[str, ...] = ()
    """Agents that the router knows to have no replica running, the masked ones left out; the gate takes no notice of it."""
    hidden_H: FloatArray
    """Hidden state after this step, [H] float32: travels with the query."""
    routed_by: RoutedBy = "router"
    theta: float | None = None
    """Highest score of a sure reply, as this gate version fitted it; None where nothing was fitted."""
    limit: int = 1
    """Most agents that the step may come to: K of this query where unsure steps ask more agents (the cascade), else k."""
    anchors: tuple[float, ...] | None = None
    """Per agent, what the version's anchored score subtracts; None for raw scores."""
    max_agents: int = 1
    """K of the gate version: what the next step's feedback takes the number of active agents as a share of."""
    label_model: Any = None
    """The version's `core.label_model.LabelModel` in the context of this query; None where it has none."""
    agent_price: float = 0.02
    """Probability of a right answer that one more reply must be expected to bring; read with a label model only."""
    is_beside: bool = False
    """Whether a new query got the version that is compared with the current one, not that itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatus:
    """A router's account of itself; its fields, in this order, are the JSON of `dmoa router status`."""

    app: str
    """Name of the Serve application."""
    pool: str
    pool_fingerprint: str
    pool_version: str
    gate_version: str
    """The current one, which new queries begin with."""
    configured_version: str | None = None
    """The one that the app was deployed with."""
    untrained: bool = False
    installed_unix_s: float | None = None
    """When the current version became current."""
    recent_inputs: int = 0
    """Inputs kept for the shadow check of the next install."""
    masked: tuple[str, ...] = ()
    """Agents left out of decisions because they do not answer."""
    cold: tuple[str, ...] = ()
    """Agents scaled to zero, or on their way up from there, the masked ones left out."""
    gone: tuple[str, ...] = ()
    """Agents that no replica can still be answering calls to, though they should have one."""
    agents: tuple[str, ...]
    """All agents, with the summarizer of mode `llm`."""
    supervision: str = "none"
    """What the training of the current gate was told of how good replies are: none, or outcomes(N)."""
    score: str = ""
    """What the current gate learnt to rank: raw, anchored or posterior."""
    activations: dict[str, int] = field(default_factory=dict)
    """How often each agent was activated."""
    decisions: int = 0
    batches: int = 0
    started_unix_s: float = 0.0
    adaptation: dict[str, Any] = field(default_factory=dict)
    """What learning while serving comes to: mode, ledger, trial, counts (`serving/router/adaptation`)."""
    state_lost: str | None = None
    """What the place of `router.state_uri` lacks and is still to be written back; None where it is whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SummarizerRecord:
    """What the summarizer did in a step."""

    mode: Literal["select", "llm"]
    verdict: Verdict
    reasoning: str = ""
    """What the summarizer, or the agent whose text became the summary, thought before it."""
    usage: TokenUsage = TokenUsage()
    latency_ms: float = 0.0
    engine_ms: float = 0.0
    finish_reason: FinishReason = "stop"
    """How the text that became the summary ended."""
    is_memoised: bool = False
    """Whether the call cache gave the summarizer's words."""
    error: str | None = None
    price: float | None = None
    """What the call cost; None where no price is known, or nobody was called."""
    prompt: tuple[Message, ...] = field(default=(), compare=False, repr=False)
    """What the summarizer was asked; empty where nobody was. Kept for traces."""
    sent_unix_s: float = field(default=0.0, compare=False, repr=False)
    """When it was asked, 0 where nobody was."""


Call = TypeVar("Call", AgentReply, SummarizerRecord)


def priced(call: Call, price: Price | None) -> Call:
    """Return a call with what its tokens cost, unless its engine knew, or no price is known."""
    return call if price is None or call.price is not None else replace(call, price=price.of(call.usage))


def total_price(calls: Iterable[AgentReply | SummarizerRecord]) -> float | None:
    """Return what calls cost together; None where one that took tokens has no price, or none has any."""
    counted = [call for call in calls if call.price is not None or call.usage.total]
    known = [call.price for call in counted if call.price is not None]
    return math.fsum(known) if known and len(known) == len(counted) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One finished step: whom the policy chose, what each contributed, and the new summary."""

    step: int
    """Counts from 0."""
    replies: tuple[AgentReply, ...]
    """Every agent that was asked, lost ones included; the explored ones last."""
    active: tuple[str, ...]
    """The agents whose contributions count, in order of probability."""
    summary: str
    summarizer: SummarizerRecord
    mass: float = 1.0
    """Probability of the active set; 1.0 for policies without a gate."""
    explored: tuple[tuple[str, float], ...] = ()
    """Agents that were asked only to learn from, each with its propensity; none of them is in `active`."""
    wall_ms: float = 0.0
    decision: RouteDecision | None = None
    """None for policies without a gate."""
    route: RouteRequest | None = None
    """The gate's input, kept for replay; None for policies without a gate."""
    right_probability: float | None = None
    """That the leading answer is right; None where the gate version has no label model."""

    @property
    def usage(self) -> TokenUsage:
        """Tokens of all agents and the summarizer, lost calls included."""
        return sum((reply.usage for reply in self.replies), self.summarizer.usage)

    @property
    def calls(self) -> tuple[AgentReply | SummarizerRecord, ...]:
        """What was generated in the step: the agents' replies, and the summarizer's where it was asked."""
        return (*self.replies, *((self.summarizer,) if self.summarizer.verdict != "rule" else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Budgets of one query."""

    max_steps: int = 20
    max_agents: int | None = None
    budget_tokens: int | None = None
    """Prompt and completion tokens of all agents and the summarizer."""
    budget_price: float | None = None
    """What all agents and the summarizer may cost; calls without a price cost nothing."""
    budget_calls: int | None = None
    """Calls of agents and the summarizer; of a step's agents the least probable are left out, and stand in if nobody else can."""
    within_steps: bool = False
    """Whether tokens and price hold within a step too: its first agent is asked alone, then what is left pays for. Ours."""
    deadline_s: float | None = None
    max_tokens: int | None = None
    """Most new tokens of any one reply, the summarizer's included; None: as each agent's sampling says."""
    quorum: int | None = None
    """Contributions that end a step of more agents which the pool's summarizer folds; None: all are waited for."""
    hedge_after_ms: float | Literal["p95"] | None = None
    """How long such a step's call runs before the next-ranked agent is asked too; p95: of the agent's own latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of a query whose steps are set beforehand."""

    observation: str | None = None
    """What the gate reads at this step in place of the summary; None: the summary."""
    part: str | None = None
    """What the agents see at this step in place of the query's text; None: the query's text."""
    has_history: bool = True
    """Whether the agents see the work of earlier steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One question to the swarm."""

    trace_id: str
    text: str
    """The last user message: what the gate reads."""
    query_id: str = ""
    """What a file of queries or a benchmark calls it; empty where it comes from a client."""
    system: str = ""
    """The client's system message."""
    turns: tuple[Message, ...] = ()
    """Earlier turns of the conversation, in order."""
    exchange: str = ""
    """What the client's tools were asked since the question, and what they said, as text."""
    final: FinalCall | None = None
    """What the client wants of its answer beyond a text."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """The client's sampling fields (temperature, top_p, max_tokens, stop, seed), absent where not given."""
    limits: Limits = field(default_factory=Limits)
    stages: tuple[Stage, ...] = ()
    """Where given, the query runs exactly these steps, if its budgets allow, and no rule ends it before."""
    epsilon: float | None = None
    """With policy `exploring`, the probability with which a step asks one agent beside the active ones; None: all of them."""
    is_streamed: bool = True
    """Whether somebody reads the final text piece by piece; if not, no call has to send it so."""
    traceparent: str = ""
    """W3C trace context of whoever asks, as its HTTP header says; empty where there is none."""

    @property
    def conversation(self) -> str:
        """Digest of how the conversation began, the same for all its turns: a client's system message and its first words."""
        text = f"{self.system}\0{self.turns[0].content if self.turns else self.text}"
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the swarm answered."""

    trace_id: str
    text: str
    reasoning: str = ""
    """What whoever wrote the text thought before it: the summarizer's thought or the chosen agent's."""
    policy: str
    stop_reason: StopReason
    steps: tuple[StepRecord, ...]
    degraded: bool
    """At least one chosen agent failed, was masked, or was passed over because it was cold."""
    finish_reason: Literal["stop", "length"]
    gate_version: str | None = None
    gate_trained: bool | None = None
    """Whether the gate's weights were trained; None for policies without a gate."""
    routed_by: RoutedBy = "router"
    wall_ms: float = 0.0
    choices: tuple[Choice, ...] = ()
    """What the final call wrote, the first being the text; the last step is then that call. Empty where none was asked for."""

    @property
    def usage(self) -> TokenUsage:
        """Tokens of all agents and the summarizer in all steps, lost calls included."""
        return sum((step.usage for step in self.steps), TokenUsage())

    @property
    def price(self) -> float | None:
        """What all calls cost; None as `total_price` says."""
        return total_price(call for step in self.steps for call in step.calls)


Event = StepRecord | TextDelta | Answer
"""What comes of a query: steps as they finish, pieces of the final text if it streams, and last, exactly once, the Answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """One agent that a policy asks in a step."""

    agent: str
    probability: float = 1.0
    instruction: str = ""
    """What to do in this step; empty: the agent's role alone."""
    history: tuple[str, ...] | None = None
    """Earlier work that the agent sees, oldest first; None: the summaries of all steps so far."""
    propensity: float = 1.0
    """Probability with which exploration came to ask this agent, given the policy's own choice; 1.0 where it was certain."""
    sample: int = 0
    """Which of several calls of the agent in this step it is: each draws its own words, where temperature is above 0."""
    temperature: float | None = None
    """Temperature of this call, 0..2; None: the agent's, or the client's."""
    max_tokens: int | None = None
    """Most new tokens of this call, where that is less than the agent's own limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What a policy wants done in the next step."""

    activations: tuple[Activation, ...]
    """Agents to ask, in parallel; the first is the most probable."""
    reserves: tuple[Activation, ...] = ()
    """Who takes the place of a lost agent, and whom the cascade asks, next-ranked first."""
    explored: tuple[Activation, ...] = ()
    """Agents asked only to learn from: their replies are recorded and count for nothing else, nobody stands in for them."""
    fold: Fold = "summarizer"
    """What becomes the summary: what the pool's summarizer makes of the replies, the first reply, the answer that most agree on
    (or else the surest), that of the lowest score, or the summary before. Only the summarizer calls a model or ends a query."""
    quorum: int | None = None
    """Contributions that end the step, the others are cancelled; None: all are waited for."""
    ends_with: StopReason | None = None
    """Set on the last step of a schedule: why the query ends after it, whatever its budgets say."""
    mass: float = 1.0
    decision: RouteDecision | None = None
    route: RouteRequest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A policy's word that the query is done."""

    reason: StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryState:
    """What is known of a query between two steps; policies read it and never change it."""

    query: Query
    steps: tuple[StepRecord, ...] = ()
    started_unix_s: float
    deadline_unix_s: float | None = None
    tokens_used: int = 0
    """Prompt and completion tokens of all agents and the summarizer so far."""

    @property
    def price_used(self) -> float:
        """What all calls so far cost, those without a price left out."""
        return math.fsum(call.price or 0.0 for step in self.steps for call in step.calls)

    @property
    def calls_used(self) -> int:
        """Calls of agents and the summarizer so far."""
        return sum(len(step.calls) for step in self.steps)

    @property
    def summary(self) -> str:
        """The newest summary, empty before the first step."""
        return self.steps[-1].summary if self.steps else ""

    @property
    def stage(self) -> Stage | None:
        """The stage that the next step runs, None where the query has no stages or they are all done."""
        stages = self.query.stages
        return stages[len(self.steps)] if len(self.steps) < len(stages) else None

    @property
    def asked(self) -> str:
        """What the agents are asked at the next step: the query's text, or the stage's part of it."""
        return self.query.text if self.stage is None or self.stage.part is None else self.stage.part

    @property
    def history(self) -> tuple[str, ...]:
        """The summaries of all steps so far, oldest first."""
        return tuple(step.summary for step in self.steps if step.summary)


quicken(vars(), __name__)
