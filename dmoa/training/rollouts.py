"""The record of rollouts: one Parquet row per agent and step of a query, and the manifest beside them, written and read checked.

`dmoa rollouts` writes them, `dmoa train` and `dmoa probe` read them. Nothing here holds a label: labels of benchmark rows
lie in another folder, which training never opens. Shape letters: D embedding, F feedback features, X gate input.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmoa.core.features import FEEDBACK_FEATURES, Preset
from dmoa.engines.recorded import open_table
from dmoa.errors import ConfigError
from dmoa.flat import TokenFields, flat_reply
from dmoa.reading import read_bounded
from dmoa.training.options import QUERIES
from dmoa.types import AgentReply, AgentStatus, Answer, EntropyKind, FinishReason, FloatArray, Stage, StepRecord
from dmoa.validation import describe, redact_text, short, storable

SCHEMA_VERSION = 1
LEARNED = "learned"
"""Marks a column that training reads."""
MEASURE = "measure"
"""Marks a column of finite numbers from 0 that training reads."""


class FileRecord(BaseModel):
    """Base of the records that lie in files: frozen, unknown keys refused, fields documented in place."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _RolloutRowHead(FileRecord):
    query_id: Annotated[str, LEARNED]
    """Names the query in every file: `benchmark/split/hash`, or `queries/hash` for the user's own."""
    source: str
    """Benchmark, suite, or name of the file of queries."""
    split: str
    """Of the benchmark or suite; `train` for the user's own queries."""
    step: Annotated[int, LEARNED]
    """Counts from 0."""
    num_steps: Annotated[int, LEARNED]
    """Steps that the query took."""
    context: Annotated[list[float], LEARNED]
    """float32; the embedding part of the gate's input: [2D] in the default preset, [D] in `paper`."""
    feedback: Annotated[list[float], LEARNED]
    """float32 [F]; the rest of the gate's input, zeros in the `paper` preset."""
    agent: Annotated[str, LEARNED]
    probability: Annotated[float, MEASURE]
    """The gate's; exactly 0 where masked."""
    is_selected: bool
    """Whether the agent was in the step's active set, from which the next context was built."""
    is_explored: bool
    """Whether it was asked only to learn from."""
    propensity: Annotated[float, MEASURE]
    """Probability with which exploration came to ask it; 1.0 for selected agents and in dense rollouts."""
    entropy_sum_nats: Annotated[float, MEASURE]
    """Sum over the tokens of the answer, stop token included, of the entropy of the next-token distribution; with
    `gate.entropy_scope: all` over those of the thought too."""
    entropy_sq_sum: Annotated[float, MEASURE]
    """Sum of the squares of the same entropies."""
    entropy_tokens: Annotated[int, MEASURE]
    entropy_kind: Annotated[EntropyKind, LEARNED]
    """truncated: the sums are the middle of two bounds."""
    entropy_slack_nats: Annotated[float, LEARNED] = 0.0
    """How far the bounds of a truncated sum lie off, either way; NaN: not known, as in files from before this column."""
    finish_reason: Annotated[FinishReason, LEARNED]


class RolloutRow(TokenFields, _RolloutRowHead):
    """One row of the Parquet files: one agent that was asked, or masked, in one step of one query."""

    latency_ms: float
    """From the call to the reply."""
    text: Annotated[str, LEARNED]
    """What it contributed."""
    reasoning: str = ""
    """What it thought before, no part of the contribution."""
    reasoning_entropy_sum_nats: float = 0.0
    """As entropy_sum_nats, over the tokens of the thought alone."""
    reasoning_entropy_tokens: int = 0
    status: Annotated[AgentStatus, LEARNED]
    """ok, masked, or why there is no contribution."""
    gate_version: Annotated[str, LEARNED]
    engine: str
    """Engine and the options that may change numbers; empty where nothing ran."""
    seed: Annotated[int, LEARNED]
    """Of the collection."""
    pool_fingerprint: str
    schema_version: int
    final_text: str = ""
    """What the query was answered with, in the rows of its first step; empty in others, and in files from before this column."""
    error: str = ""
    """Why there is no contribution, in words; empty in files from before this column."""


def columns_with(*marks: str) -> tuple[str, ...]:
    """Return the columns that have one of the marks, in order."""
    return tuple(name for name, field in RolloutRow.model_fields.items() if set(marks) & set(field.metadata))


def _schema() -> pa.Schema:
    """Return the Parquet schema of `RolloutRow`."""
    types: dict[Any, pa.DataType] = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), list[float]: pa.list_(pa.float32())}
    fields = RolloutRow.model_fields.items()
    return pa.schema([pa.field(name, types.get(field.annotation, pa.string()), nullable=False) for name, field in fields])


SCHEMA: pa.Schema = _schema()
"""Columns of the Parquet files, in order."""
_WORDS: dict[str, tuple[str, ...]] = {
    name: get_args(kind)
    for name, kind in (("entropy_kind", EntropyKind), ("finish_reason", FinishReason), ("status", AgentStatus))
}
"""Columns of words, each with those that there are."""
LATER_COLUMNS = {name: field.default for name, field in RolloutRow.model_fields.items() if not field.is_required()}
LATER_COLUMNS["entropy_slack_nats"] = float("nan")
"""Columns that older files lack, each with what is read then: those that have a default."""


class RolloutQuery(FileRecord):
    """One query of a collection: a line of `queries.jsonl`."""

    query_id: str
    source: str
    split: str
    text: str
    stages: tuple[Stage, ...] = ()
    """Set where the query runs exactly these steps."""


class SourceInfo(FileRecord):
    """One source of queries."""

    name: str
    weight: float
    queries: int
    """How many it gave."""
    origin: dict[str, str]
    """File -> SHA-256, or hub data set -> revision, or the generator and its parameters."""


class Counts(FileRecord):
    """What lies in the Parquet files."""

    queries: int = 0
    steps: int = 0
    rows: int = 0
    failed: int = 0
    """Queries without any answer in the last session; the same command asks them again."""


class Manifest(FileRecord):
    """`rollouts.json`: where rollouts come from, and everything needed to repeat them."""

    schema_version: int = SCHEMA_VERSION
    pool: str
    pool_fingerprint: str
    agents: list[str]
    """In the pool's order, which is that of the gate's logits."""
    gate_version: str
    """The gate that chose the active agents."""
    preset: Preset
    engines: list[str]
    """Engine and options per LLM of the pool."""
    sources: list[SourceInfo]
    mode: Literal["dense", "epsilon"]
    """dense: all agents ran in every step; epsilon: the active ones, and with probability epsilon one more."""
    epsilon: float | None = None
    seed: int
    round: int = 0
    """Of on-policy collecting: 0 is collected with the first gate, 1 with the gate that was trained on it, and so on."""
    options: dict[str, Any]
    """What the collection was asked for."""
    config: dict[str, Any]
    """The whole pool."""
    counts: Counts = Field(default_factory=Counts)
    failures: list[str] = []
    """The newest failed queries of the last session, each with its error."""
    dmoa_version: str
    code_revision: str = ""
    command: str = ""
    started_unix_s: float
    ended_unix_s: float | None = None
    """null: the collection was stopped before its end."""


def table_of(asked: RolloutQuery, answer: Answer, *, preset: Preset, seed: int, fingerprint: str) -> pa.Table:
    """Return the rows of an answered query, by `SCHEMA`."""
    common: dict[str, Any] = {
        "query_id": asked.query_id,
        "source": asked.source,
        "split": asked.split,
        "num_steps": len(answer.steps),
        "seed": seed,
        "pool_fingerprint": fingerprint,
        "schema_version": SCHEMA_VERSION,
    }
    rows = [common | row for step in answer.steps for row in _rows(step, preset)]
    final_text = storable(answer.text)
    for row in rows:
        row["final_text"] = "" if row["step"] else final_text
    columns = [
        _lists([row[field.name] for row in rows])
        if pa.types.is_list(field.type)
        else pa.array([row[field.name] for row in rows], field.type)
        for field in SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def part_of(tables: Sequence[pa.Table]) -> bytes:
    """Return the Parquet file of some queries' rows."""
    data = io.BytesIO()
    strings = [field.name for field in SCHEMA if pa.types.is_string(field.type)]
    # Contexts repeat from agent to agent: zstd finds that, a dictionary of single numbers would not.
    pq.write_table(pa.concat_tables(tables), data, compression="zstd", use_dictionary=strings, write_page_checksum=True)
    return data.getvalue()


def _rows(step: StepRecord, preset: Preset) -> list[dict[str, Any]]:
    """Return what is particular to each row of a step, and more than its columns: agents that were asked, then masked ones."""
    assert step.decision is not None
    assert step.route is not None
    context, feedback_F = split_input(step.route.input_X, preset)
    chance = dict(zip(step.decision.agents, step.decision.probability_A.tolist(), strict=True))
    explored = dict(step.explored)
    asked = {reply.agent: reply for reply in step.replies}
    masked = [AgentReply(agent=name, status="masked") for name in step.decision.masked if name not in asked]
    return [
        {
            "step": step.step,
            "context": context,
            "feedback": feedback_F,
            "probability": chance[reply.agent],
            "is_selected": reply.agent in step.active,
            "is_explored": reply.agent in explored,
            "propensity": explored.get(reply.agent, 1.0),
            "gate_version": step.decision.gate_version,
            **flat_reply(reply),
            "text": storable(reply.text),
            "reasoning": storable(reply.reasoning),
            "error": storable(redact_text(reply.error or "")),
        }
        for reply in (*asked.values(), *masked)
    ]


def split_input(input_X: FloatArray, preset: Preset) -> tuple[FloatArray, FloatArray]:
    """Return the embedding part and the feedback part [F] of a gate's input; zeros for `paper`, which has no feedback."""
    if preset == "paper":
        return input_X, np.zeros(FEEDBACK_FEATURES, dtype=np.float32)
    return input_X[:-FEEDBACK_FEATURES], input_X[-FEEDBACK_FEATURES:]


def _lists(arrays: list[FloatArray]) -> pa.Array:
    """Return a column of lists of float32; from Python floats it would take a millisecond a step."""
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate(arrays).astype(np.float32, copy=False) if arrays else np.zeros(0, dtype=np.float32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


_AGAIN = "remove the file: the command that collected it asks its queries again"


@dataclass(frozen=True, slots=True)
class RolloutFolder:
    """Paths of one collection."""

    root: Path

    @property
    def manifest(self) -> Path:
        """Where the rollouts come from."""
        return self.root / "rollouts.json"

    @property
    def queries(self) -> Path:
        """What is asked."""
        return self.root / QUERIES

    @property
    def parts(self) -> Path:
        """Folder of the Parquet files."""
        return self.root / "rollouts"

    @property
    def artifact(self) -> str:
        """Name under which runs log the folder of the Parquet files: the collection, and the trainings that read it."""
        name = self.root.resolve().name
        return f"rollouts-{re.sub(r'[^A-Za-z0-9._-]', '-', name)}"[:128]


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a collection. Raises ConfigError naming file, value and what is expected."""
    path = RolloutFolder(Path(folder)).manifest
    try:
        text = read_bounded(path, most=1 << 26).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--rollouts: cannot read {str(path)!r}: {error}; name a folder that `dmoa rollouts` wrote") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, Manifest)}; name a folder that `dmoa rollouts` wrote") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise _other_version(path, manifest.schema_version)
    return manifest


def check_rollout_pool(manifest: Manifest, *, fingerprint: str, agents: Sequence[str]) -> None:
    """Raise ConfigError unless the rollouts are of this pool; the message says which agents differ."""
    if manifest.pool_fingerprint == fingerprint:
        return
    theirs = manifest.agents
    missing, added = [name for name in theirs if name not in agents], [name for name in agents if name not in theirs]
    detail = "a model, adapter, profile, tool or sampling setting, or the order of the agents differs"
    if missing or added:
        detail = f"only in the rollouts: {', '.join(missing) or 'none'}; only in the pool: {', '.join(added) or 'none'}"
    raise ConfigError(
        f"--rollouts: pool_fingerprint is {manifest.pool_fingerprint[:12]} (pool {manifest.pool}), and this "
        f"pool's {fingerprint[:12]}; {detail}; use the pool that they were collected with, or collect them again"
    )


def part_paths(folder: str | Path) -> list[Path]:
    """Return the Parquet files of a collection, in order."""
    return sorted(RolloutFolder(Path(folder)).parts.glob("*.parquet"))


def read_part(path: str | Path, *, fingerprint: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of one Parquet file, checked; `columns` reads a part of them. Older files get `LATER_COLUMNS`.

    Raises ConfigError naming file, value and what is expected: a file that is damaged or cut short, a column that is
    missing or of another type, rows of another schema version, or of a pool other than `fingerprint`.
    """
    wanted = list(SCHEMA.names if columns is None else columns)
    marks = ["schema_version", *(["pool_fingerprint"] if fingerprint is not None else [])]
    try:
        with open_table(path) as file:
            absent = [name for name in LATER_COLUMNS if name in wanted and name not in file.schema_arrow.names]
            present = [name for name in dict.fromkeys([*wanted, *marks]) if name not in absent]
            _check_columns(path, file.schema_arrow, present)
            table = file.read(columns=present, use_threads=False)
            _check_values(path, table)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"{path}: not a whole Parquet file: {reason}; {_AGAIN}") from error
    for version in table["schema_version"].unique().to_pylist():
        if version != SCHEMA_VERSION:
            raise _other_version(path, version)
    for seen in table["pool_fingerprint"].unique().to_pylist() if fingerprint is not None else ():
        if seen != fingerprint:
            raise ConfigError(
                f"{path}: pool_fingerprint is {short(seen)}; expected {fingerprint!r}, the collection's; "
                "take the file of another pool out of this folder"
            )
    for name in absent:
        table = table.append_column(SCHEMA.field(name), pa.array([LATER_COLUMNS[name]] * len(table), SCHEMA.field(name).type))
    return table.select(wanted).cast(pa.schema([SCHEMA.field(name) for name in wanted]))


def read_table(folder: str | Path) -> pa.Table:
    """Return all rows of a collection, checked as `read_part` does; for collections that fit into memory."""
    manifest = read_manifest(folder)
    parts = [read_part(path, fingerprint=manifest.pool_fingerprint) for path in part_paths(folder)]
    return pa.concat_tables(parts) if parts else SCHEMA.empty_table()


def _check_columns(path: str | Path, schema: pa.Schema, wanted: Sequence[str]) -> None:
    for name in wanted:
        expected = SCHEMA.field(name).type
        seen = schema.field(name).type if name in schema.names else None
        if not _is_same(seen, expected):
            raise ConfigError(f"{path}: column {name} is {seen}; expected {expected}; {_AGAIN}")


def _check_values(path: str | Path, table: pa.Table) -> None:
    """Refuse what no writer of ours leaves: nulls, also within lists, and words that a column does not know."""
    for name in table.column_names:
        column = table[name].combine_chunks()
        is_list = pa.types.is_list(column.type)
        bad = column.null_count + (column.flatten().null_count if is_list else 0)
        if bad:
            row = next(row for row, value in enumerate(column) if not value.is_valid or (is_list and None in value.as_py()))
            raise ConfigError(f"{path}, row {row}: {name} is null; expected {column.type}; {_AGAIN}")
        known = _WORDS.get(name, ())
        for seen in column.unique().to_pylist() if known else ():
            if seen not in known:
                row = column.to_pylist().index(seen)
                raise ConfigError(f"{path}, row {row}: {name} is {short(seen)}; expected one of {', '.join(known)}; {_AGAIN}")


def _is_same(seen: pa.DataType | None, expected: pa.DataType) -> bool:
    """Compare column types; the name of a list's item is the writer's own business."""
    if seen is not None and pa.types.is_list(expected):
        return pa.types.is_list(seen) and bool(seen.value_type == expected.value_type)
    return bool(seen == expected)


def _other_version(path: str | Path, seen: object) -> ConfigError:
    return ConfigError(
        f"{path}: schema_version is {short(seen)}; this dmoa reads {SCHEMA_VERSION}; "
        "use the dmoa that wrote it, or collect the rollouts again"
    )
