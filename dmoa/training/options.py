"""Options of collecting and of training, for `dmoa rollouts`, `dmoa train` and the `job:` section of their jobs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dmoa.config import Address, Config, Flag, Names, Options, parse_gate
from dmoa.engine_options import Node
from dmoa.types import Limits

_SAMPLE = (
    "benchmarks", "queries", "field", "data_dir", "split", "limit", "difficulty", "max_steps", "max_tokens", "skip_bad_rows",
)  # fmt: skip
"""Options that say what is asked, and how: a collection that goes on must have the same."""
QUERIES = "queries.jsonl"
"""The queries of a collection, in its folder."""


class Weighted(Node):
    """A source of queries and its weight."""

    name: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, le=1e9)
    """Its share of `limit`, beside the other sources' weights."""


def _weighted(value: object) -> object:
    """Accept `a:2,b` or a list of `a:2`, where sources with weights are expected."""
    parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    return tuple(_one(part) if isinstance(part, str) else part for part in parts) if isinstance(parts, list | tuple) else parts


def _one(text: str) -> dict[str, Any]:
    """Read `NAME` or `NAME:WEIGHT`; a colon that no number follows is part of the name."""
    name, colon, weight = text.rpartition(":")
    try:
        return {"name": name.strip(), "weight": float(weight)} if colon else {"name": text}
    except ValueError:
        return {"name": text}


Sources = Annotated[tuple[Weighted, ...], BeforeValidator(_weighted)]


class RolloutOptions(Options):
    """One collection of rollouts."""

    where = "rollouts"

    benchmarks: Annotated[Sources, Flag(metavar="A:2,B")] = ()
    """Benchmarks and suites, each NAME or NAME:WEIGHT; all: the nine public benchmarks, suites: the generated ones."""
    queries: Annotated[Sources, Flag(metavar="FILE[:W]", is_repeated=True)] = ()
    """Your own queries, each FILE or FILE:WEIGHT: a line is a text, {"query": TEXT}, {"prompt": TEXT} or {"messages": [...]}; or
    CSV, or recorded replies; no labels needed; repeatable."""
    field: Annotated[str | None, Flag(metavar="NAME")] = None
    """Key or column that holds the text of your own queries; None: query, prompt or messages."""
    from_traffic: Annotated[str | None, Flag(metavar="running|URI")] = None
    """Ask nobody: take the queries that a swarm answered, `running` at `address`, or saved under its router.state_uri."""
    app: str = "dmoa"
    """Name of the Serve application of `from_traffic`."""
    url: Annotated[str | None, Flag(metavar="URL")] = None
    """Ask the agents of this running server, whose pool is this one; its key is DMOA_API_KEY. None: a pool of its own."""
    share: float = Field(default=0.25, gt=0, le=1)
    """Part of the agent calls that the served pool runs at once that may be this collection's; with `url`."""
    out: Path
    """Folder of the collection, or a URI. The same folder goes on with the collection in it."""
    data_dir: Path | None = None
    """Benchmark files, one folder a benchmark; None: the Hugging Face hub."""
    split: Annotated[str, Flag(metavar="SPLIT")] = "train"
    """train, adaptation or test; suites have more: specialist, anchor, gate (their `train`), validation."""
    difficulty: int = Field(default=1, ge=1)
    """Difficulty of the suites; each suite defines its own levels."""
    limit: int | None = Field(default=None, ge=1)
    """Queries in all, shared out by weight; None: all rows of a file, 200 of a suite."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the samples, the suites, the sampling of replies and the exploration."""
    dense: bool = False
    """Ask every agent in every step, as is also done without `epsilon`."""
    epsilon: float | None = Field(default=None, gt=0, le=1)
    """Sparse: probability with which a step asks one agent beside the active ones; None: dense."""
    round: int = Field(default=0, ge=0)
    """Number of the on-policy round, for the record."""
    labels: Path | None = None
    """Folder for the labels of benchmark rows, apart from `out`; None: not kept."""
    max_steps: int | None = Field(default=None, ge=1)
    """Maximum steps of a query; None: as many as the pool allows."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum new tokens of a reply; None: as many as each agent's sampling says."""
    skip_bad_rows: bool = False
    """Leave out and count rows that do not parse."""
    call_cache: Path | None = None
    """Folder in which greedy agent calls are kept and found again."""
    address: Address = None
    """A Ray cluster to run on (auto, HOST:PORT); None: RAY_ADDRESS, else a Ray of its own."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Answering actors, each with the pool's engines."""
    concurrency: int | None = Field(default=None, ge=1, le=65536)
    """Agent calls that may be under way in one worker; None: enough to keep the pool's engines full."""
    track: Literal["auto", "wandb", "jsonl", "none"] = "auto"
    """Where the collection is logged; auto: W&B, offline without a key."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.from_traffic is not None:
            given = [name for name in ("benchmarks", "queries", "epsilon", "labels", "limit", "url") if getattr(self, name)]
            if given:
                raise ValueError(f"from_traffic: its queries are answered already; leave {', '.join(given)} out")
        elif not self.benchmarks and not self.queries:
            raise ValueError("benchmarks, queries: both are empty; name benchmarks, or a file of queries")
        if self.url is not None and self.call_cache is not None:
            raise ValueError("call_cache: no effect with url, the server's agents are asked; leave it out")
        if self.dense and self.epsilon is not None:
            raise ValueError(f"epsilon is {self.epsilon}, and dense is set, which explores everyone; leave one of them out")
        weights = {source.weight for source in (*self.benchmarks, *self.queries)}
        if self.limit is None and len(weights) > 1:
            raise ValueError("weights share out limit, which is not given; add --limit N, or leave the weights out")
        if self.labels is not None and _is_inside(self.labels, self.out):
            raise ValueError(f"labels is {str(self.labels)!r}, inside out; training reads out: name a folder apart")
        if any(_is_same(Path(source.name), self.out / QUERIES) for source in self.queries):
            raise ValueError(f"queries names {QUERIES} of out, which is written; name another folder as out")
        return self

    def limits(self, pool: Limits) -> Limits:
        """Return a query's limits: the pool's, lowered by these options.

        Nobody waits for these answers, so there is no deadline; the pool's token budget is the exploring policy's to keep.
        """
        return Limits(
            max_steps=min(pool.max_steps, self.max_steps or pool.max_steps),
            max_agents=pool.max_agents,
            max_tokens=self.max_tokens or pool.max_tokens,
        )

    def sample(self) -> dict[str, Any]:
        """Return the options that say what is asked, as plain values."""
        tree = self.model_dump(mode="json", include=set(_SAMPLE))
        for name in ("benchmarks", "queries"):
            tree[name] = [f"{source['name']}:{source['weight']:g}" for source in tree[name]]
        return tree


def _is_inside(folder: Path, other: Path) -> bool:
    return _is_same(folder, other) or other.resolve() in folder.resolve().parents


def _is_same(path: Path, other: Path) -> bool:
    """Tell whether two paths are one place, also by way of links."""
    return path.resolve() == other.resolve()


class ProbeOptions(Options):
    """One look at a pool before anything is trained."""

    where = "probe"

    queries: Annotated[str | None, Flag(metavar="FILE.jsonl")] = None
    """Your own queries: a text, or {"query": TEXT}, a line; None: those of a recorded pool."""
    benchmarks: Annotated[str | None, Flag(metavar="A,B")] = None
    """Benchmarks and suites; None: arith,words,calendar,parcels,signals,dyes."""
    rollouts: Path | None = None
    """Look at dense rollouts that are there; ask nobody."""
    outcomes: Annotated[Path | None, Flag(metavar="FILE")] = None
    """How good some answers were, as `dmoa train --outcomes` reads them: what they settle is said."""
    known_answers: Annotated[Names | None, Flag(metavar="SUITE,...")] = None
    """Generated suites with computed answers, to find which agents are wrong."""
    limit: int = Field(default=30, ge=4)
    """Queries without labels."""
    known_limit: int = Field(default=60, ge=4)
    """Rows with known answers, all suites together."""
    data_dir: Path | None = None
    """Benchmark files, one folder a benchmark; None: the Hugging Face hub."""
    difficulty: int = Field(default=1, ge=1)
    """Difficulty of the suites; each suite defines its own levels."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of samples, suites and replies."""
    out: Path | None = None
    """Folder of the rollouts."""
    call_cache: Path | None = None
    """Folder in which greedy agent calls are kept and found again."""
    address: Address = None
    """A Ray cluster to run on (auto, HOST:PORT); None: RAY_ADDRESS, else a Ray of its own."""


def share_out(limit: int, weights: list[float], available: list[int | None]) -> list[int]:
    """Share `limit` queries out by weight; what a source cannot give, the others do. None: a source without end.

    Quotas are rounded to the largest remainders, so that they add up to `limit`, or to all there is.
    """
    quotas = [0] * len(weights)
    open_: set[int] = set(range(len(weights)))
    left = limit
    while open_ and left > 0:
        total = math.fsum(weights[i] for i in open_)
        wished = {i: left * weights[i] / total for i in open_}
        full = {i for i in open_ if (room := available[i]) is not None and room <= wished[i]}
        if not full:
            floors = {i: math.floor(wish) for i, wish in wished.items()}
            by_remainder = sorted(open_, key=lambda i: (floors[i] - wished[i], i))
            for i in by_remainder[: left - sum(floors.values())]:
                floors[i] += 1
            for i, floor in floors.items():
                quotas[i] = floor
            return quotas
        for i in full:
            quotas[i] = available[i] or 0
            left -= quotas[i]
        open_ -= full
    return quotas


PRESETS: dict[str, dict[str, Any]] = {
    "few-shot": {"epochs": 10, "batch_queries": 4, "lr": 1e-3, "patience": 5},
    "full": {"epochs": 60, "batch_queries": 16, "lr": 1e-3, "patience": 8},
}
"""Preset -> what it sets where the options do not. Source: 40-80 queries from the paper; the rest ours."""
JOB_ONLY = ("weight_decay", "clip", "hidden", "temperature", "max_agents", "clusters")
"""Options of a training that job files may set and the command has no flags for."""
NOT_COMPARED = ("out", "workers", "gpu", "track", "address", "max_failures", "storage_path")
"""Options that a run may be continued with other values of: they change where and how it runs, not what it learns."""


def _folders(value: object) -> object:
    """Accept one folder, or `a,b`, where a list of folders is expected."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, Path) else value


class ImportOptions(Options):
    """One import of logs."""

    where = "import-logs"

    logs: Annotated[tuple[Path, ...], BeforeValidator(_folders), Flag(metavar="FILE", is_repeated=True)] = Field(min_length=1)
    """File of logs: JSON Lines (also .gz), a JSON array or a W&B table; repeatable, batch output beside its input."""
    out: Annotated[Path, Flag(metavar="FILE.jsonl")]
    """File of recorded replies, written whole: .jsonl or .jsonl.gz."""
    pool: Annotated[Path | None, Flag(metavar="FILE.yaml")] = None
    """Pool file over the replies that is written too; None: none is."""
    agent: Annotated[str | None, Flag(metavar="NAME")] = None
    """Who replied, over what the logs say; None: each record's model."""
    columns: Annotated[Names, Flag(metavar="FIELD=COLUMN,...")] = ()
    """Columns of a W&B table, such as query=prompt,text=output; others are guessed by their names."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not self.out.name.endswith((".jsonl", ".jsonl.gz")):
            raise ValueError(f"out is {str(self.out)!r}; expected a name that ends with .jsonl or .jsonl.gz")
        for name, path in (("out", self.out), ("pool", self.pool)):
            if path is not None and any(_is_same(read, path) for read in self.logs):
                raise ValueError(f"{name} is {str(path)!r}, which is read; name another file")
        if self.pool is not None and _is_same(self.pool, self.out):
            raise ValueError(f"pool is {str(self.pool)!r}, as out is; name another file")
        for pair in self.columns:
            if "=" not in pair:
                raise ValueError(f"columns holds {pair!r}; expected FIELD=COLUMN, such as query=prompt")
        return self


def _was_exported(path: Path) -> bool:
    """Tell what an export wrote, a line or none, from files of a run."""
    with path.open("rb") as file:
        return file.read(9) in (b"", b'{"message', b'{"prompt"')


class ExportOptions(Options):
    """One export of what a swarm said."""

    where = "export"

    format: Literal["sft", "dpo"]
    """sft: conversations with the chosen answer; dpo: pairs of a better and a worse reply."""
    out: Annotated[Path, Flag(metavar="FILE.jsonl")]
    """File that is written whole."""
    traces: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Traces, as `dmoa run --trace` writes them: no label is read."""
    run: Path | None = None
    """Folder of an evaluation: its scores say which answers are right."""
    margin: float = Field(default=0.2, gt=0, le=1)
    """With `traces`, dpo: how far the probabilities of being right of a pair must lie apart."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.traces is None) == (self.run is None):
            raise ValueError("run and traces: give one of the two, --run DIR of an evaluation or --traces FILE")
        if self.traces is not None and _is_same(self.traces, self.out):
            raise ValueError(f"out is {str(self.out)!r}, which is read; name another file")
        if self.run is not None and self.out.is_file() and _is_inside(self.out, self.run) and not _was_exported(self.out):
            raise ValueError(f"out is {str(self.out)!r}, a file that lies in run, which is read; name another file")
        return self


class AdaptSettings(Options):
    """How a gate's weights follow new records: settings of `training/adapt.Adapter`."""

    where = "adapt"

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of AdamW."""
    steps: int = Field(default=4, ge=1, le=1000)
    """Gradient steps of an update."""
    batch_queries: int = Field(default=4, ge=1, le=65536)
    """Queries of the stream in each gradient step, the newest first; replayed ones come on top."""
    replay_ratio: float = Field(default=3.0, ge=0)
    """Replayed queries of old domains for each of the stream."""
    recent: int = Field(default=64, ge=1, le=100_000)
    """Newest queries of the stream that are learned from again; older ones join the replay."""
    replay_queries: int = Field(default=512, ge=1, le=1_000_000)
    """Most queries that are kept to be replayed; of more a fair sample stays."""
    pull: float = Field(default=0.01, ge=0, lt=1)
    """Part of the way back to the deployed weights that every gradient step ends with."""
    loss: Literal["soft", "hard", "hinge", "listnet"] = "soft"
    """Ranking loss."""
    clip: float = Field(default=1.0, gt=0)
    """Greatest norm of the gradient."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of what is replayed; of a run its samples, suites and replies too."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the gate in training."""


class _StreamOptions(Options):
    """What a gate is adapted to, and where."""

    benchmark: Annotated[Names, Flag(metavar="A,B")] = Field(min_length=1)
    """Benchmarks and suites whose first test queries teach; of several they are mixed."""
    queries: int = Field(default=30, ge=1, le=100_000)
    """First queries, all benchmarks together: everybody is asked, and the gate's own answer counts. Then it is frozen."""
    every: int = Field(default=1, ge=1, le=10_000)
    """Queries of an update; all of them are answered before it."""
    zero_shot: bool = False
    """Begin with untrained weights alone, whatever checkpoint there is; else with both."""
    replay: Annotated[tuple[Path, ...], BeforeValidator(_folders), Flag(is_repeated=True)] = ()
    """Rollouts that the checkpoint learnt from, to be replayed; repeatable. None: nothing keeps it from forgetting them."""
    outcomes: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Outcomes of some of the queries, for score posterior, as of `dmoa train`: read after the counted answer."""
    out: Path
    """Folder of the run, or a URI: gates, `adapt.json`, the evaluation. The same folder goes on with the run in it."""
    data_dir: Path | None = None
    """Benchmark files, one folder a benchmark; None: the Hugging Face hub."""
    limit: int | None = Field(default=None, ge=1)
    """Test rows of a benchmark, the first queries among them; None: every row of a file, 200 of a suite."""
    difficulty: int = Field(default=1, ge=1)
    """Difficulty of the suites; each suite defines its own levels."""
    workers: int = Field(default=1, ge=0, le=64)
    """Ray Train workers of the updates, the first of which asks the agents; 0: in this process."""
    allow_weak_sandbox: bool = False
    """Run model-written programs where the host can hardly contain them."""
    address: Address = None
    """A Ray cluster to run on (auto, HOST:PORT); None: RAY_ADDRESS, else a Ray of its own."""
    track: Literal["auto", "wandb", "jsonl", "none"] = "auto"
    """Where tables are logged; auto: W&B, offline without a key."""


class AdaptOptions(AdaptSettings, _StreamOptions):
    """One adaptation of a gate to benchmarks."""


ADAPT_JOB_ONLY = ("batch_queries", "recent", "replay_queries", "clip", "loss", "dtype")
"""Settings that job files may set and `dmoa adapt` has no flags for."""


class OnlineOptions(AdaptSettings):
    """Learning from the traffic of a running swarm until it is told to end."""

    app: str = "dmoa"
    """Name of the Serve application."""
    address: Address = None
    """The Ray that it runs on (auto, HOST:PORT); None: RAY_ADDRESS, else the one on this machine."""
    replay: Annotated[tuple[Path, ...], BeforeValidator(_folders), Flag(is_repeated=True)] = ()
    """Rollouts that the gate learnt from, to be replayed; repeatable. None: the traffic from before the current gate alone."""
    out: Path = Path("out/adapt-online")
    """Folder for curves and the log."""
    workers: int = Field(default=1, ge=1, le=64)
    """Ray Train workers; each takes its part of every batch."""
    every: int = Field(default=8, ge=1, le=10_000)
    """New queries for each update."""
    offer_every: int = Field(default=4, ge=1, le=10_000)
    """Updates for each gate that is offered to the router."""
    cpu_share: float = Field(default=0.5, gt=0, le=1)
    """Most of one core that a worker takes on average."""
    poll_s: float = Field(default=2.0, gt=0, le=600)
    """Seconds between looks at the traffic."""
    track: Literal["auto", "wandb", "jsonl", "none"] = "auto"
    """Where curves are logged; auto: W&B, offline without a key."""


class TrainOptions(Options):
    """One training of the gate."""

    where = "train"

    rollouts: Annotated[tuple[Path, ...], BeforeValidator(_folders), Flag(is_repeated=True)] = Field(min_length=1)
    """Folder or URI that `dmoa rollouts` wrote; repeatable: several are learned from together."""
    outcomes: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Outcomes that you know, for score posterior: a line is {query_id or trace_id, agent or null, reward 0 to 1}; None: learn
    without."""
    out: Path
    """Folder of the run, or a URI: `checkpoint/`, `train.json`, curves. The same folder goes on with the run in it."""
    preset: Literal["few-shot", "full"] = "few-shot"
    """few-shot: some 40-80 queries; full: thousands. Sets `epochs`, `batch_queries`, `lr`, `patience` unless given."""
    workers: Annotated[Annotated[int, Field(ge=0, le=1024)] | Literal["auto"], Flag(metavar="W")] = "auto"
    """Ray Train workers; 0: in this process, without Ray; auto: 1, which is the fastest for a gate unless batches are large."""
    gpu: bool = False
    """Give every worker a GPU (all-reduce over nccl; on CPUs over gloo)."""
    epochs: int = Field(default=10, ge=1, le=100_000)
    """Maximum epochs."""
    batch_queries: int = Field(default=4, ge=1, le=65536)
    """Queries of a global batch, shared out among the workers."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Greatest norm of the gradient."""
    loss: Literal["soft", "hard", "hinge", "listnet"] = "soft"
    """Ranking loss."""
    score: Literal["raw", "anchored", "posterior"] | None = None
    """What of a reply is ranked; None: gate.score of the pool."""
    core: Literal["gru", "reset", "linear", "mlp"] | None = None
    """Core of the gate, gru but for ablations; None: gate.core."""
    head: Literal["linear", "profile"] | None = None
    """Head of the gate; None: gate.head."""
    hidden: int | None = Field(default=None, ge=1, le=4096)
    temperature: float | None = Field(default=None, gt=0, le=100)
    max_agents: int | None = Field(default=None, ge=1, le=1024)
    start_from: Path | None = None
    """Checkpoint whose weights the training begins with, as in a later round; None: untrained weights."""
    alpha: Annotated[Annotated[float, Field(gt=0, lt=1)] | Literal["auto"], Flag(metavar="X")] = "auto"
    """tau covers the surest agent on 1 - alpha of the held-back rows, a nominal level; auto: chosen, with `theta_alpha`."""
    theta_alpha: float | None = Field(default=None, gt=0, lt=1)
    """theta lies above the surest reply's score on a share of 1 - theta_alpha of those rows; None: `alpha`, or chosen with it."""
    agent_price: float | None = Field(default=None, ge=0)
    """What one more agent per step must be worth to be asked. Score posterior: the gain in probability of a right answer that is
    expected of it, frozen with the gate; None: gate.agent_price. Else, with `alpha` auto: how much it must lower the logarithm of
    the winner's entropy; None: 0.1, a tenth surer."""
    anchor_rollouts: Path | None = None
    """Folder with dense rollouts that the anchor set is taken from; None: `rollouts`."""
    clusters: int = Field(default=8, ge=1, le=1024)
    """Embedding clusters over which the anchor set is balanced."""
    discount_constant: Annotated[bool, Flag(negation="--keep-constant")] = True
    """With score anchored, an agent that gives one reply to nearly all dense steps, where others do not, counts as less sure
    than everybody else."""
    holdout: float = Field(default=0.25, gt=0, lt=1)
    """Share of the queries held back, those with the lowest hashes of their ids."""
    patience: int = Field(default=5, ge=1)
    """Epochs without a lower loss on the held-back queries, after which training ends."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the untrained weights and of the order of the queries."""
    max_bad_steps: int = Field(default=10, ge=0)
    """Updates that may be skipped because loss or gradient was not finite; one more fails the run."""
    max_failures: int = Field(default=3, ge=0)
    """Lost workers that are replaced."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the gate in training."""
    storage_path: Annotated[str | None, Flag(metavar="URI")] = None
    """Where workers keep the run's state (a folder, s3://, gs://) that all of them and this process reach; None: in `out`."""
    address: Address = None
    """A Ray cluster to run on (auto, HOST:PORT); None: RAY_ADDRESS, else a Ray of its own."""
    track: Literal["auto", "wandb", "jsonl", "none"] = "auto"
    """Where curves are logged; auto: W&B, offline without a key."""

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        return {**PRESETS.get(str(given.get("preset", "few-shot")), {}), **given}

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        seen: set[Path] = set()
        for folder in self.rollouts:
            if folder.resolve() in seen:
                raise ValueError(f"rollouts names {str(folder)!r} twice, and its replies would count twice; leave one out")
            seen.add(folder.resolve())
        return self

    @property
    def alphas(self) -> tuple[float, ...]:
        """Values of alpha to choose from."""
        from dmoa.core.calibration import ALPHAS  # loads torch

        return ALPHAS if self.alpha == "auto" else (self.alpha,)

    @property
    def theta_alphas(self) -> tuple[float, ...]:
        """Values of theta_alpha to choose from."""
        return self.alphas if self.theta_alpha is None else (self.theta_alpha,)

    def gate_config(self, config: Config) -> Config:
        """Return the pool with the gate that these options ask for: untrained, or `start_from`'s. Raises ConfigError."""
        section = config.gate.model_dump(exclude={"checkpoint", "seed"})
        for name in ("score", "core", "head", "hidden", "temperature"):
            value = getattr(self, name)
            section |= {} if value is None else {name: value}
        if self.max_agents is not None:
            section["activation"]["max_agents"] = self.max_agents
        checkpoint = str(self.start_from.absolute()) if self.start_from else None
        gate = parse_gate({**section, "seed": self.seed, "checkpoint": checkpoint})
        return config.model_copy(update={"gate": gate})

    def identity(self) -> dict[str, Any]:
        """Return the options that decide what is learned: a run is continued only with the same."""
        return self.model_dump(mode="json", exclude=set(NOT_COMPARED) | {"rollouts", "anchor_rollouts", "start_from", "outcomes"})
