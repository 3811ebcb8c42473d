"""Records of evaluation: what is asked, what is right, what was answered, how it scored; a run's options and provenance.

A row of a benchmark falls apart into a `Task`, which agents see, and a `Label`, which only scorers see; the two are
written to different folders. `Answered` says what a policy did with a task, `Scored` whether it was right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dmoa.agents.adversaries import Kind
from dmoa.config import Address, Flag, Name, Names, Options, names_of
from dmoa.errors import DmoaError
from dmoa.flat import TokenFields
from dmoa.plugins import is_reference
from dmoa.provenance import Machine
from dmoa.types import Defence, Limits, Stage
from dmoa.validation import redact, redact_text

Split = Literal["train", "adaptation", "test"]
SPLITS: tuple[Split, ...] = ("train", "adaptation", "test")
FineSplit = Literal["specialist", "anchor", "gate", "validation"]
"""Splits that generated suites have beside `adaptation` and `test`."""


class FileRecord(BaseModel):
    """Base of the records that are lines of files: frozen, unknown keys refused, fields documented in place."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Task(FileRecord):
    """What is asked; carries nothing that gives the answer away."""

    row_id: str
    """`benchmark/split/hash`: names the row in every file; the hash covers the whole normalised row."""
    benchmark: str
    text: str
    """The query: task description, answer format and question."""
    group: str = ""
    """What tables break results down by: subject, library, template; empty where there is none."""
    stages: tuple[Stage, ...] = ()
    """Set where the task runs exactly these steps (`chain`, `relay`); empty: as many as the policy wants."""


class Label(FileRecord):
    """What is right; opened by evaluation alone."""

    row_id: str
    benchmark: str
    gold: dict[str, Any]
    """Plain JSON values; the keys are the benchmark's own and are documented where its rows are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a benchmark."""

    task: Task
    label: Label
    row_hash: str
    """SHA-256 hex of the whole normalised row: equal rows are equal, wherever they come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a scorer reads of an answer."""

    text: str
    """The final answer; empty where there was none."""
    step_texts: tuple[str, ...] = ()
    """The summary after every step, in order; `relay` scores them one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one answer was judged."""

    value: float
    """0..1; what accuracy is the mean of. 0.0 where `is_scored` is false."""
    extracted: str | None = None
    """The answer as the scorer read it; None where it found none."""
    reason: str = ""
    """One short sentence: why this value, or why it could not be scored."""
    is_scored: bool = True
    """False: the reply held no answer, or the checker itself failed; counted beside wrong ones, as *unscored*."""
    is_left_out: bool = False
    """The row cannot be judged here whatever is replied; it leaves the denominator of every policy. Never with `is_scored`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Secondary measures, such as `f1`; every scored or unscored row of a benchmark has the same keys."""


Scorer = Callable[[Label, Reply], Score]
"""Judges a reply. Never raises, whatever the reply says; raises only for a label that is not its benchmark's."""


class _LineHead(FileRecord):
    row_id: str
    benchmark: str
    policy: str
    group: str = ""


class _AnsweredHead(_LineHead):
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    """Why there is no answer; None where there is one. With status ok every contribution was empty: the query is judged."""
    text: str = ""
    step_texts: tuple[str, ...] = ()
    """The summary after every step."""
    stop_reason: str = ""
    finish_reason: str = ""
    degraded: bool = False
    active: tuple[tuple[str, ...], ...] = ()
    """Per step, the agents whose contributions counted."""


class Answered(TokenFields, _AnsweredHead):
    """What one policy did with one task: a line of `answers/`. Counts of tokens are of all agents and the summarizer."""

    summarizer_tokens: int = 0
    """Part of prompt_tokens and completion_tokens that the summarizer took."""
    memoised_tokens: int = 0
    """Part of prompt_tokens and completion_tokens that came from the call cache: counted as if run."""
    entropy_nats: float | None = None
    """Mean over the active agents of the last step, nats per token."""
    right_probability: float | None = None
    """That the answer is right, by the label model of the gate version; None without one."""
    wall_ms: float = 0.0
    gate_version: str | None = None
    price: float | None = None
    """What all calls cost; None where that of one is not known."""
    calls: int | float | None = None
    """Calls of agents and the summarizer, of repeats the mean; None in lines of earlier versions."""
    bugs: int = 0
    """Calls, or the query itself, that failed because code is wrong: a tool's, an engine's or a policy's."""

    @property
    def is_late(self) -> bool:
        """Whether the deadline ended it: failed, or with the answer of the steps before."""
        return self.stop_reason == "deadline" or (self.error or "").startswith("DeadlineError")


class Scored(_LineHead):
    """How one policy's answer to one task was judged: a line of `labels/scores/`."""

    value: float
    extracted: str | None = None
    reason: str = ""
    is_scored: bool = True
    is_left_out: bool = False
    """The row cannot be judged here whatever is replied: it counts for no policy of the run."""
    is_failed: bool = False
    """The query itself failed: no answer to judge; value is 0."""
    metrics: dict[str, float] = {}


def _gates(value: object) -> object:
    """Accept `a=DIR,b=DIR` where a mapping of names to folders is expected."""
    if not isinstance(value, str):
        return value
    found: dict[str, str] = {}
    for part in filter(None, map(str.strip, value.split(","))):
        name, _, folder = part.partition("=")
        if not folder or name in found:
            raise ValueError(f"expected NAME=DIR,..., each name once; {part!r} is {'a second one' if folder else 'none'}")
        found[name] = folder
    return found


Gates = Annotated[dict[Name, Path], BeforeValidator(_gates)]
CPU_BUDGET = {"max_steps": 3, "max_agents": 2, "max_tokens": 96}
"""`--budget cpu`: what two cores can pay for."""


class EvaluateOptions(Options):
    """One evaluation."""

    where = "evaluate"

    benchmarks: Annotated[Names, Flag(metavar="A,B")] = Field(min_length=1)
    """Benchmarks and suites; all: the nine public benchmarks, suites: the generated ones."""
    policies: Annotated[Names, Flag(metavar="P,Q")] = Field(default=("dmoa", "single"), min_length=1)
    """Policies to compare: single:NAME one agent, dmoa:NAME one of `gates`, FILE.py:NAME of a file; all: those without labels."""
    gates: Annotated[Gates, Flag(metavar="NAME=DIR,...")] = Field(default={}, max_length=50)
    """Checkpoints to compare in one run, beside the pool's own: policies dmoa:NAME."""
    data_dir: Path | None = None
    """Benchmark files, one folder a benchmark; None: the Hugging Face hub."""
    split: Annotated[Split | FineSplit, Flag(metavar="SPLIT")] = "test"
    """train, adaptation or test; suites have more. Open test last, and once."""
    limit: int | None = Field(default=None, ge=1)
    """A seeded sample of this many rows per benchmark; None: every row of a file, 200 of a suite."""
    seed: int = Field(default=0, ge=0)
    """Seed of the samples, the suites and the sampling of replies."""
    difficulty: int = Field(default=1, ge=1)
    """Difficulty of the suites; each suite defines its own levels."""
    budget: Literal["pool", "cpu"] = "pool"
    """cpu: at most 3 steps, 2 agents a step and 96 new tokens a reply; pool: the pool's own limits."""
    max_tokens: int | None = Field(default=None, ge=1, le=131072)
    """Most new tokens of a reply, in place of the budget's; None: as the agents and the budget have it."""
    adversaries: int = Field(default=0, ge=0)
    """Agents of the pool, its last ones, that work against it."""
    kind: Kind = "liar"
    """What `adversaries` do."""
    defence: Defence | None = None
    """In place of the pool's `summarizer.defence`: what leaves contributions out without labels."""
    out: Path | None = None
    """Folder of the run, or a URI."""
    resume: bool = False
    """Go on with the run in `out`."""
    retry_failed: bool = False
    """With `resume`: run failed rows again."""
    skip_bad_rows: bool = False
    """Leave out and count rows that do not parse."""
    allow_weak_sandbox: bool = False
    """Run model-written programs where the host can hardly contain them."""
    call_cache: Path | None = None
    """Folder in which greedy agent calls are kept and found again."""
    url: Annotated[str | None, Flag(metavar="URL")] = None
    """A running server to evaluate instead of a swarm in this process's Ray; key in DMOA_API_KEY."""
    address: Address = None
    """A Ray cluster to run on (auto, HOST:PORT); None: RAY_ADDRESS, else a Ray of its own."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Answering actors, each with the pool's engines."""
    concurrency: int | None = Field(default=None, ge=1, le=65536)
    """Agent calls that may be under way in one worker; None: enough to keep the pool's engines full."""
    track: Literal["auto", "wandb", "jsonl", "none"] = "auto"
    """Where tables are logged; auto: W&B, offline without a key."""

    @model_validator(mode="after")
    def _retry_needs_resume(self) -> Self:
        if self.retry_failed and not self.resume:
            raise ValueError("retry_failed has no effect without resume; add --resume or leave it out")
        if self.resume and self.out is None:
            raise ValueError("resume needs out, the folder of the run to go on with; add --out DIR")
        if self.kind != "liar" and not self.has_adversaries:
            raise ValueError(
                f"kind is {self.kind!r}, and no agent is an adversary; say how many are (adversaries), or leave it out"
            )
        for given, what, why in (
            (self.call_cache, "call_cache has", "calls its own agents"),
            (self.adversaries, "adversaries have", "has its own agents"),
            (self.defence, "defence has", "has its own"),
            (self.gates, "gates have", "has its own"),
        ):
            if self.url is not None and given:
                raise ValueError(f"{what} no effect with url: the server {why}; leave one out")
        return self

    @property
    def has_adversaries(self) -> bool:
        """Whether any agent works against the pool."""
        return self.adversaries > 0

    @property
    def matching(self) -> Matching | None:
        """What every policy may spend as much of as a reference; None: no such thing."""
        return None

    def limits(self, pool: Limits) -> Limits:
        """Return a query's limits: the pool's, lowered by the budget."""
        agents = min(pool.max_agents or CPU_BUDGET["max_agents"], CPU_BUDGET["max_agents"])
        steps = min(pool.max_steps, CPU_BUDGET["max_steps"])
        lowered = replace(pool, max_steps=steps, max_agents=agents, max_tokens=CPU_BUDGET["max_tokens"])
        limits = pool if self.budget == "pool" else lowered
        return replace(limits, max_tokens=self.max_tokens or limits.max_tokens)


Match = Literal["tokens", "calls", "latency", "price", "none"]
_LIMITS = {"tokens": "budget_tokens", "calls": "budget_calls", "latency": "deadline_s", "price": "budget_price"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """What every policy of a comparison may spend on a query."""

    by: Match
    reference: str
    """The policy that sets the budget: on each benchmark the mean of its answered rows."""
    amount: float | None = None
    """The budget itself; None: the reference's."""

    def budget(self, benchmark: str, lines: Iterable[Answered]) -> dict[str, float]:
        """Return a query's limit on a benchmark, given what the reference answered. Raises DmoaError where that is not known."""
        amount = self.amount
        if amount is None:
            spent = [self._spent(line) for line in lines if line.status == "ok"]
            known = [value for value in spent if value or (value is not None and self.by == "price")]
            seen = f"is not known: {len(known)} of {len(spent)} answered rows say it; mend what failed (or give llms.NAME.price)"
            if known and not any(known):
                seen = "is nothing, and nobody could spend as much; name another reference first, or match tokens"
            if len(known) < len(spent) or not any(known):
                raise DmoaError(f"--match {self.by}: what {self.reference} takes on {benchmark} {seen}, or set --match-budget")
            amount = math.fsum(known) / len(known)
        return {_LIMITS[self.by]: math.ceil(amount) if self.by in ("tokens", "calls") else amount}

    def _spent(self, line: Answered) -> float | None:
        of = {"tokens": line.usage.total, "calls": line.calls, "latency": line.wall_ms / 1e3, "price": line.price}
        return of[self.by]


def _counts(value: object) -> object:
    """Accept `0..3` or `0,2` where several numbers are expected."""
    if not isinstance(value, str):
        return value
    first, dots, last = value.partition("..")
    if dots and first.strip().isdecimal() and last.strip().isdecimal():
        if int(first) > int(last):
            raise ValueError("expected N..M, the smaller number first")
        return tuple(range(int(first), min(int(last), 1001) + 1))
    return tuple(part.strip() for part in value.split(",") if part.strip())


Counts = Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], ...], BeforeValidator(_counts)]


class CompareOptions(EvaluateOptions):
    """One comparison of policies at equal budgets."""

    where = "compare"

    policies: Annotated[Names, Flag(metavar="P,Q")] = Field(default=("dmoa",), min_length=1)
    """Policies to compare; the first is the reference. As in `dmoa evaluate`."""
    match: Match = "tokens"
    """What every policy may spend as much of on a query as the reference does in the mean: tokens, calls, latency or price."""
    match_budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The budget of a query, in tokens, calls, seconds or the prices' currency; None: what the reference takes."""
    baselines: Annotated[bool, Flag(negation="--no-baselines")] = True
    """Add self_moa, self_consistency and single, which a claim must beat, where they are not named."""
    repeats: int = Field(default=1, ge=1, le=100)
    """Runs over the same rows with other seeds of the replies; tables show the mean of a row's scores."""
    share_calls: Annotated[bool, Flag(negation="--no-share-calls")] = True
    """Answer a greedy call that several policies make once, from a cache in `out`; latency and repeats are taken without it."""
    curve: Annotated[Counts, Flag(metavar="N..M")] = ()
    """Numbers of adversaries to run the same with, such as 0..3: accuracy against their share, in the report and the JSON."""
    curve_defences: Annotated[tuple[Defence, ...], BeforeValidator(names_of), Flag(metavar="A,B")] = Field(
        default=("none",), min_length=1
    )
    """Defences to run each point of `curve` with."""

    @property
    def has_own_cache(self) -> bool:
        """Whether the policies share their calls through a cache in `out`."""
        return self.share_calls and self.match != "latency" and self.repeats == 1 and not (self.call_cache or self.url)

    @property
    def has_adversaries(self) -> bool:
        """Whether any agent works against the pool."""
        return self.adversaries > 0 or bool(self.curve)

    @property
    def matching(self) -> Matching | None:
        """What is matched."""
        return None if self.match == "none" else Matching(by=self.match, reference=self.policies[0], amount=self.match_budget)

    @model_validator(mode="after")
    def _can_match(self) -> Self:
        if self.match_budget is not None and self.match == "none":
            raise ValueError("match_budget has no effect with match 'none'; choose what is matched, or leave it out")
        if self.match == "calls" and self.url is not None:
            raise ValueError("match is 'calls'; a server has no budget of calls; match tokens, or leave url out")
        if self.curve and (self.url is not None or self.adversaries or self.repeats > 1):
            raise ValueError(
                "curve has its own adversaries and one repeat, of this process's agents; leave url, adversaries and repeats out"
            )
        if self.curve_defences != ("none",) and not self.curve:
            raise ValueError("curve_defences has no effect without curve; add it, such as 0..3, or take defence")
        if self.repeats > 1 and self.call_cache is not None:
            raise ValueError(f"repeats is {self.repeats} with call_cache; cached calls do not vary; leave one out")
        if self.match == "latency" and self.call_cache is not None:
            raise ValueError("match is 'latency' with call_cache; cached calls take no time, so no budget; leave one out")
        return self


Redacted = Annotated[dict[str, Any], AfterValidator(lambda tree: dict(redact(tree)))]
"""Plain values; secrets are taken out when the record is made."""


class BenchmarkInfo(FileRecord):
    """One benchmark of a run: where its rows came from, and how its scores are to be read."""

    name: str
    title: str = ""
    """What tables call it; empty: the name."""
    is_generated: bool = False
    """Whether a generator made the rows; every table says so."""
    deviation: str = ""
    """How the scoring differs from the benchmark's original protocol; empty where it does not. Every table says so."""
    primary: str = "accuracy"
    """What accuracy means here, such as `exact match`."""
    chance: float | None = None
    """Accuracy of guessing, 0..1; None where unknown."""
    sources: dict[str, str] = {}
    """File -> SHA-256, or hub data set -> revision, or generator -> its parameters."""
    rows: int = Field(ge=0)
    """Rows that each policy is asked."""
    bad_rows: int = 0
    """Rows left out because they do not parse (`--skip-bad-rows`)."""
    duplicates: int = 0
    """Rows left out because an equal row of the same split came before."""
    dropped: int = 0
    """Rows taken out of the training side because another split has them."""


class PoolInfo(FileRecord):
    """The agents of a run."""

    name: str
    fingerprint: str
    """SHA-256 of what makes the agents answer as they do; empty where it is not known, as behind a URL."""
    config: Redacted
    """The resolved configuration tree; secrets are taken out when this record is made."""


_ANSWERING = ("agents", "summarizer", "gate", "tools", "llms")
"""Parts of a pool's configuration that replies depend on."""
_NOT_COMPARED = ("autoscaling", "placement", "max_num_seqs", "gpus", "threads", "tags", "model", "adapter", "checkpoint")
"""Fields of theirs that say how much runs side by side and where, or whose content fingerprint and gate version stand for."""


def pool_differences(before: PoolInfo, now: PoolInfo) -> dict[str, tuple[Any, Any]]:
    """Return the settings that replies depend on and in which two pools differ: dotted name -> (before, now).

    Sees what the fingerprint leaves out, such as max_tokens and dtype, and the URL of a server; what scripted agents do, and
    where the file of an engine lies, is not compared.
    """
    old, new = _settings(before), _settings(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {name: (old.get(name), new.get(name)) for name in names}


def _settings(pool: PoolInfo) -> dict[str, Any]:
    tree = {name: pool.config[name] for name in (*_ANSWERING, "url") if name in pool.config}
    if "url" in tree:
        tree["url"] = str(tree["url"]).rstrip("/")
    if "llms" in tree:
        llms = {name: llm for name, llm in tree["llms"].items() if llm.get("engine") != "scripted"}
        tree["llms"] = {name: llm | {"engine": _engine_name(llm.get("engine"))} for name, llm in llms.items()}
    return dict(_flat(tree, ""))


def _engine_name(engine: Any) -> Any:
    """Return an engine without the folder of its file, which a copy of the working directory has elsewhere."""
    return Path(engine).name if isinstance(engine, str) and is_reference(engine) else engine


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in entries:
            if key not in _NOT_COMPARED:
                yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


class RunInfo(FileRecord):
    """Everything needed to repeat a run: `run.json`, and `config` of the result."""

    schema_version: Literal[1] = 1
    command: Annotated[str, AfterValidator(redact_text)] = ""
    """The command line that repeats the run; secrets are taken out."""
    options: Redacted = {}
    """The options of the run as plain values; secrets are taken out."""
    dmoa_version: str
    code_revision: str = ""
    """Commit of the code, `+changes` where files differ from it; empty outside a checkout."""
    later_revisions: list[str] = []
    """Other code that the run went on with, in order."""
    pool: PoolInfo
    benchmarks: list[BenchmarkInfo]
    policies: list[str]
    derived: list[str] = []
    """Policies whose lines were worked out from those of the others, such as `oracle`; nobody was asked for them."""
    split: Split | FineSplit = "test"
    limit: int | None = None
    """Rows asked for per benchmark, a seeded sample; None: all."""
    seed: int
    """Seed of samples, suites and replies."""
    limits: Redacted = {}
    """Budgets of a query, such as max_steps, max_agents, budget_tokens, deadline_s."""
    match: Match = "none"
    """What the policies may spend equally much of (`dmoa compare`)."""
    reference: str | None = None
    """The policy that sets the budget, and that the others are compared with."""
    budgets: dict[str, dict[str, float]] = {}
    """Benchmark -> the limit that matching sets for a query of every policy but the reference."""
    repeats: int = 1
    """Runs over the same rows that the lines are the means of."""
    gate_version: str | None = None
    """Gate that the run began with; None for policies without one."""
    gates: dict[str, str] = {}
    """Version of each gate of the policies `dmoa:NAME`, by name."""
    engines: list[str] = []
    """Engines and their options that may change numbers, such as `transformers/float32`."""
    plugins: dict[str, str] | None = None
    """SHA-256 of the file of each policy, benchmark and engine that came from one, by `KIND NAME`; None in older runs."""
    isolation: str = ""
    """How programs were contained while they were scored; empty where none ran."""
    machine: Machine
    versions: dict[str, str] = {}
    """Package -> version, beyond those of `machine`."""
    started_unix_s: float
    ended_unix_s: float | None = None
    """End of the last session; None while none has ended."""

    @property
    def all_policies(self) -> list[str]:
        """The policies that were run, and the derived ones."""
        return [*self.policies, *self.derived]
