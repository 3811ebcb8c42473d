"""Loads rollouts, checks that they belong to this pool, and packs them into episodes: from Parquet to what training reads.

Ray Data reads the parts, a task per file, on the driver's node, where the folders are. Next stop: `training/objective`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dmoa.core.features import FEEDBACK_FEATURES, feedback
from dmoa.core.gate import GateSpec
from dmoa.core.in_step import read_classes
from dmoa.core.scores import Array, BoolArray, IntArray, reply_key
from dmoa.core.witnesses import NOT_ASKED
from dmoa.dataflow import on_this_node, quiet, stopped_by
from dmoa.errors import ConfigError
from dmoa.feedback import MARK
from dmoa.reading import offsets
from dmoa.training.rollouts import (
    LEARNED,
    MEASURE,
    Manifest,
    RolloutFolder,
    RolloutQuery,
    check_rollout_pool,
    columns_with,
    part_paths,
    read_manifest,
    read_part,
)
from dmoa.types import FloatArray, is_untrained

COLUMNS = columns_with(LEARNED, MEASURE)
"""The columns of a rollout that training reads."""
_KEY = ("query_id", "gate_version", "seed")
_MEASURES = columns_with(MEASURE)
_CELL = np.dtype(
    [
        *((name, np.float64) for name in _MEASURES),
        ("slack", np.float64),
        ("ran", np.bool_),
        ("cut", np.bool_),
        ("reply", np.int64),
    ]
)
"""What training keeps of a row: its measures by their columns' names, and what follows from the other columns."""


Asked = Mapping[tuple[str, int], str]
"""By query and step, what was asked; at step -1 what the query asks, as every step beyond its stages does."""


class EpisodeKey(NamedTuple):
    """What tells two episodes apart; the order of episodes is the order of their keys."""

    query_id: str
    folder: int
    """Place of the folder among those that are read."""
    gate_version: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """All episodes of a training, packed: step n of episode q is entry `start_Q[q] + n`."""

    agents: tuple[str, ...]
    key_Q: tuple[EpisodeKey, ...]
    start_Q: IntArray
    """[Q + 1], where each episode begins, and the end of the last."""
    input_NX: FloatArray
    asked_NA: BoolArray
    """Agents that have a row: asked, or masked while they were wanted."""
    ran_NA: BoolArray
    """Agents that replied with at least one token."""
    cut_NA: BoolArray
    """Replies that ended by length."""
    sum_NA: Array
    """Entropy sums in nats, 0 where nothing ran."""
    sq_sum_NA: Array
    tokens_NA: Array
    slack_NA: Array
    """How far a truncated sum may lie off, in nats: 0 for exact ones, infinite where nobody wrote it down."""
    propensity_NA: Array
    """1 where an agent has no row."""
    probability_NA: Array
    """Of the policy that collected; NaN where an agent has no row."""
    reply_NA: IntArray
    """`reply_key` of each reply's text, 0 where nothing ran."""
    answer_NA: IntArray
    """Equality class of the answer within its step (`core/witnesses`); `NOT_ASKED` where episodes are read without answers."""
    length_NA: Array
    """Characters of the reply; 0 where there is none, NaN in traffic, whose texts are tokens (`dmoa/feedback`)."""
    outcome_NA: Array
    """How good replies were found to be, 0 to 1, NaN where nobody said."""

    def dense_steps(self, episodes: IntArray) -> IntArray:
        """Return the steps of some episodes in which every agent was asked for certain."""
        is_dense_N = (self.asked_NA & (self.propensity_NA == 1.0)).all(axis=1)
        steps = self.steps_of(episodes)
        found: IntArray = steps[is_dense_N[steps]]
        return found

    def steps_of(self, episodes: IntArray) -> IntArray:
        """Return the entries of all steps of some episodes, in their order."""
        parts = [np.arange(self.start_Q[q], self.start_Q[q + 1]) for q in episodes]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def take(self, episodes: IntArray) -> Episodes:
        """Return some episodes, in the order given."""
        steps = self.steps_of(episodes)
        length_Q = (self.start_Q[1:] - self.start_Q[:-1])[episodes]
        return dataclasses.replace(
            self,
            key_Q=tuple(self.key_Q[q] for q in episodes),
            start_Q=np.concatenate([[0], np.cumsum(length_Q)]).astype(np.int64),
            **{name: getattr(self, name)[steps] for name in _OF_STEPS},
        )

    @staticmethod
    def joined(parts: Sequence[Episodes]) -> Episodes:
        """Return the episodes of all parts, one after the other."""
        sizes = [len(part.input_NX) for part in parts]
        starts = np.cumsum([0, *sizes[:-1]])
        return dataclasses.replace(
            parts[0],
            key_Q=tuple(key for part in parts for key in part.key_Q),
            start_Q=np.concatenate([*(part.start_Q[:-1] + at for part, at in zip(parts, starts, strict=True)), [sum(sizes)]]),
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _OF_STEPS},
        )

    def digest(self) -> str:
        """Return a hash of everything that is learned from."""
        found = hashlib.sha256(repr((self.agents, self.key_Q)).encode())
        for name in ("start_Q", "input_NX", "ran_NA", "cut_NA", "sum_NA", "sq_sum_NA", "tokens_NA", "propensity_NA", "reply_NA"):
            found.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        if self.slack_NA.any():  # exact rollouts keep the hash that they had before there was a slack
            found.update(np.ascontiguousarray(self.slack_NA).tobytes())
        return found.hexdigest()


_OF_STEPS = tuple(field.name for field in dataclasses.fields(Episodes) if field.name not in ("agents", "key_Q", "start_Q"))
"""Arrays of `Episodes` with an entry a step."""


class _Step(NamedTuple):
    input_X: FloatArray
    cells: dict[str, np.void]
    """By agent: a record of `_CELL`."""
    texts: dict[str, str]
    """By agent: the replies that answers are read from; empty unless they are wanted."""


class EpisodeBuilder:
    """Collects rows, in any order, into episodes. Not safe to use from two threads at once."""

    def __init__(
        self, agents: tuple[str, ...], input_dim: int, *, has_feedback: bool, asked: Sequence[Asked] | None = None
    ) -> None:
        """`input_dim`: X of the gate that is to learn; `has_feedback`: whether its preset reads the feedback features.

        `asked`: what each folder asked, where that is known; with it answers are read.
        """
        self._agents = agents
        self._asked = asked
        self._input_dim = input_dim
        self._parts = ("context", "feedback") if has_feedback else ("context",)
        self._episodes: dict[EpisodeKey, dict[int, _Step]] = {}
        self._num_steps: dict[EpisodeKey, int] = {}

    def add(self, table: pa.Table, folder: int) -> None:
        """Take rows of the pool's own agents, with `COLUMNS`; `folder` is the place of the folder they come from.

        Raises ConfigError for rows of another gate's inputs, given twice, or holding no finite numbers.
        """
        if not table.num_rows:
            return
        lists = ("context", "feedback")
        columns = {name: table.column(name).to_pylist() for name in COLUMNS if name not in (*lists, *_MEASURES)}
        cell_R = _cells(table, columns)
        keys = [
            EpisodeKey(query, folder, version, int(seed))
            for query, version, seed in zip(*(columns[n] for n in _KEY), strict=True)
        ]
        fresh: dict[tuple[EpisodeKey, int], int] = {}
        for row, place in enumerate(zip(keys, columns["step"], strict=True)):
            if place[1] not in self._episodes.get(place[0], {}):
                fresh.setdefault(place, row)
        for (key, step), input_X in zip(fresh, self._inputs(table, list(fresh.values())), strict=True):
            self._episodes.setdefault(key, {})[step] = _Step(input_X, {}, {})
        for row, key in enumerate(keys):
            self._num_steps.setdefault(key, columns["num_steps"][row])
            _, cells, texts = self._episodes[key][columns["step"][row]]
            if columns["agent"][row] in cells:
                raise ConfigError(
                    f"rollouts: query {key.query_id!r}, step {columns['step'][row]}, agent {columns['agent'][row]!r} is there "
                    "twice; remove one of the copies"
                )
            cells[columns["agent"][row]] = cell_R[row]
            if self._asked is not None and columns["status"][row] == "ok":
                texts[columns["agent"][row]] = columns["text"][row]

    def _inputs(self, table: pa.Table, rows: list[int]) -> Iterator[FloatArray]:
        """Return the gate's inputs [X] of some rows: context, and feedback where the preset has it."""
        taken = table.take(pa.array(rows, type=pa.int64()))
        parts = [taken.column(name) for name in self._parts]
        for row in range(len(rows)):
            input_X = np.concatenate([np.asarray(part[row].values.to_numpy(zero_copy_only=False), np.float32) for part in parts])
            if input_X.shape != (self._input_dim,) or not np.isfinite(input_X).all():
                raise ConfigError(
                    f"rollouts: query {taken['query_id'][row].as_py()!r}: context and feedback hold {len(input_X)} numbers, the "
                    f"gate reads {self._input_dim}, all finite; collect with the preset and encoder that the gate is to have"
                )
            yield input_X

    def build(self) -> Episodes:
        """Return all episodes, sorted. Raises ConfigError where there are none, or a step of one is missing."""
        if not self._episodes:
            raise ConfigError("rollouts: no rows; collect some with dmoa rollouts")
        for key, steps in self._episodes.items():
            if len(steps) != self._num_steps[key] or sorted(steps) != list(range(len(steps))):
                raise ConfigError(
                    f"rollouts: query {key.query_id!r} has steps {sorted(steps)} of {self._num_steps[key]}; all of them are "
                    "needed; collect the query again"
                )
        return self.pack()

    def pack(self) -> Episodes:
        """Return all episodes, sorted, unchecked; there may be none."""
        keys = tuple(sorted(self._episodes))
        places = [(key, step) for key in keys for step in range(self._num_steps[key])]
        steps = [self._episodes[key][step] for key, step in places]
        place = {name: a for a, name in enumerate(self._agents)}
        cell_NA = np.zeros((len(steps), len(self._agents)), dtype=_CELL)
        cell_NA["probability"], cell_NA["propensity"] = np.nan, 1.0
        asked_NA = np.zeros(cell_NA.shape, dtype=np.bool_)
        for n, step in enumerate(steps):
            for agent, cell in step.cells.items():
                cell_NA[n, place[agent]] = cell
                asked_NA[n, place[agent]] = True
        ran_NA = cell_NA["ran"].copy()
        answer_NA, length_NA = np.full(asked_NA.shape, NOT_ASKED), np.full(asked_NA.shape, np.nan)
        for n, (key, number) in enumerate(places if self._asked is not None else ()):
            answer_NA[n], length_NA[n] = self._said(key, number)
        return Episodes(
            agents=self._agents,
            key_Q=keys,
            start_Q=np.concatenate([[0], np.cumsum([self._num_steps[key] for key in keys])]).astype(np.int64),
            input_NX=np.array([step.input_X for step in steps], dtype=np.float32).reshape(len(steps), self._input_dim),
            asked_NA=asked_NA,
            ran_NA=ran_NA,
            cut_NA=ran_NA & cell_NA["cut"],
            sum_NA=np.where(ran_NA, cell_NA["entropy_sum_nats"], 0.0),
            sq_sum_NA=np.where(ran_NA, cell_NA["entropy_sq_sum"], 0.0),
            tokens_NA=np.where(ran_NA, cell_NA["entropy_tokens"], 0.0),
            slack_NA=np.where(ran_NA, cell_NA["slack"], 0.0),
            propensity_NA=cell_NA["propensity"].copy(),
            probability_NA=cell_NA["probability"].copy(),
            reply_NA=np.where(ran_NA, cell_NA["reply"], 0),
            answer_NA=answer_NA,
            length_NA=length_NA,
            outcome_NA=np.full(asked_NA.shape, np.nan),
        )

    def _said(self, key: EpisodeKey, number: int) -> tuple[list[int], list[float]]:
        """Return the classes and the lengths of the answers of a step."""
        step, known = self._episodes[key][number], self._asked[key.folder] if self._asked else {}
        asked = known.get((key.query_id, number), known.get((key.query_id, -1), ""))
        texts = [step.texts.get(name) for name in self._agents]
        are_cut = [name in step.cells and bool(step.cells[name]["cut"]) for name in self._agents]
        is_told = not key.query_id.startswith(MARK)
        return read_classes(texts, are_cut, asked), [float(len(text or "")) if is_told else math.nan for text in texts]


def asked_of(queries: Iterable[RolloutQuery]) -> Asked:
    """Return what queries ask at each step."""
    found: dict[tuple[str, int], str] = {}
    for query in queries:
        found[query.query_id, -1] = query.text
        found |= {(query.query_id, step): stage.part for step, stage in enumerate(query.stages) if stage.part is not None}
    return found


def _cells(table: pa.Table, columns: Mapping[str, list[Any]]) -> npt.NDArray[np.void]:
    """Return what training keeps of each row [R]. Raises ConfigError for numbers that cannot be."""
    cell_R = np.zeros(table.num_rows, dtype=_CELL)
    slack_R = table.column("entropy_slack_nats").to_numpy()
    if (slack_R < 0).any():
        row = int(np.argmax(slack_R < 0))
        seen = f"entropy_slack_nats is {slack_R[row]} ({columns['entropy_kind'][row]})"
        raise _unusable(columns, row, f"{seen}; expected numbers from 0, and NaN where it is not known")
    # Of what nobody knows, any difference may be chance.
    cell_R["slack"] = np.where(np.array(columns["entropy_kind"]) == "exact", 0.0, np.where(np.isnan(slack_R), np.inf, slack_R))
    for name in _MEASURES:
        cell_R[name] = table.column(name).to_numpy()
    bad_R = cell_R["propensity"] <= 0
    for name in _MEASURES:
        bad_R |= ~np.isfinite(cell_R[name]) | (cell_R[name] < 0)
    if bad_R.any():
        row = int(np.argmax(bad_R))
        measures = {name: float(cell_R[name][row]) for name in _MEASURES}
        raise _unusable(columns, row, f"{measures}; expected finite numbers from 0, propensity above 0")
    cell_R["ran"] = (np.array(columns["status"]) == "ok") & (cell_R["entropy_tokens"] > 0)
    cell_R["cut"] = np.array(columns["finish_reason"]) == "length"
    cell_R["reply"] = [reply_key(text) for text in columns["text"]]
    return cell_R


def _unusable(columns: Mapping[str, list[Any]], row: int, words: str) -> ConfigError:
    where = f"query {columns['query_id'][row]!r}, agent {columns['agent'][row]!r}"
    return ConfigError(f"rollouts: {where}: {words}; collect the query again")


FOLDER = "folder"
"""Column that says which of the folders a row comes from."""


def read_manifests(folders: Sequence[Path], spec: GateSpec, fingerprint: str) -> list[Manifest]:
    """Return the manifests of the folders, after a look at each of their files.

    Raises ConfigError for a folder that is none, holds rollouts of another pool (the message says which agents differ) or of
    another preset than the gate's, or a file that was cut short.
    """
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        check_rollout_pool(manifest, fingerprint=fingerprint, agents=spec.agents)
        if manifest.preset != spec.preset:
            raise ConfigError(
                f"--rollouts: {str(folder)!r}: preset is {manifest.preset!r}; the gate that is to learn has "
                f"{spec.preset!r}, which reads other inputs; set gate.preset to {manifest.preset!r}, or collect again"
            )
    for _, path in _parts(folders):
        read_part(path, columns=("step",))
    return manifests


def _parts(folders: Sequence[Path]) -> list[tuple[int, str]]:
    """Return place of the folder and path of every file. Raises ConfigError for a folder without any."""
    parts: list[tuple[int, str]] = []
    for place, folder in enumerate(folders):
        found = part_paths(folder)
        if not found:
            raise ConfigError(f"--rollouts: {str(folder)!r}: no Parquet files; collect with dmoa rollouts --out {folder}")
        parts += [(place, str(path.absolute())) for path in found]
    return parts


def read_episodes(folders: Sequence[Path], spec: GateSpec, fingerprint: str, *, on_ray: bool) -> Episodes:
    """Return the episodes of all folders; for the score `posterior` with the answers.

    Raises ConfigError for files that are damaged, missing or hold what cannot be used.
    """
    parts = _parts(folders)
    asked = None
    if spec.score == "posterior":  # of a folder without a list of queries nothing is known
        lines = [offsets(RolloutFolder(folder).queries) for folder in folders]
        asked = [asked_of(RolloutQuery.model_validate_json(line) for _, line in those) for those in lines]
    builder = EpisodeBuilder(spec.agents, spec.input_dim, has_feedback=spec.preset != "paper", asked=asked)
    for table in _stream(parts, fingerprint) if on_ray else (read_rollout_rows(*part, fingerprint) for part in parts):
        for place in table[FOLDER].unique().to_pylist():
            builder.add(table.filter(pc.equal(table[FOLDER], place)), place)
    episodes = builder.build()
    return episodes if spec.preset == "paper" else as_asked(episodes, spec.max_agents)


def as_asked(episodes: Episodes, max_agents: int) -> Episodes:
    """Return the episodes with the feedback that a trained gate may read, where an untrained one collected dense steps.

    That one asks as many agents as it may, a trained one few and sure ones. So feedback is made anew from the replies to the step
    before: of 1 to `max_agents` agents, all numbers alike, on half of the steps the surest, else any. Deterministic. Ours.
    """
    begun = np.array([is_untrained(key.gate_version) for key in episodes.key_Q])
    last_N = np.setdiff1d(episodes.dense_steps(np.flatnonzero(begun)), episodes.start_Q[1:] - 1)
    if not len(last_N):
        return episodes
    rng, input_NX = np.random.default_rng(0), episodes.input_NX.copy()
    nats_NA = np.where(episodes.ran_NA, episodes.sum_NA / np.maximum(episodes.tokens_NA, 1.0), np.inf)[last_N]
    order_NA = np.where(rng.random((len(last_N), 1)) < 0.5, nats_NA, rng.random(nats_NA.shape)).argsort(axis=1, kind="stable")
    count_N = rng.integers(1, min(max_agents, nats_NA.shape[1]) + 1, len(last_N))
    for last, nats_A, order_A, count in zip(last_N, nats_NA, order_NA, count_N, strict=True):
        nats = [float(value) for value in nats_A[order_A[:count]] if np.isfinite(value)]
        input_NX[last + 1, -FEEDBACK_FEATURES:] = feedback(nats, len(nats), max_agents, float(input_NX[last + 1, -1]))
    return dataclasses.replace(episodes, input_NX=input_NX)


def read_rollout_rows(place: int, path: str, fingerprint: str) -> pa.Table:
    """Return what training reads of one Parquet file, with the place of its folder. Raises ConfigError as `read_part` does."""
    table = read_part(path, fingerprint=fingerprint, columns=COLUMNS)
    return table.append_column(FOLDER, pa.array([place] * len(table), pa.int64()))


def _stream(parts: Sequence[tuple[int, str]], fingerprint: str) -> Iterator[pa.Table]:
    """Yield the rows of the files by way of Ray Data. Raises ConfigError for a bad file, DmoaError where Ray stops."""
    from ray.exceptions import RayError

    def read(block: pa.Table) -> pa.Table:
        return read_rollout_rows(block["place"][0].as_py(), block["path"][0].as_py(), fingerprint)

    quiet()
    paths = [pa.table({"place": [place], "path": [path]}) for place, path in parts]
    try:
        yield from on_this_node(paths, read).iter_batches(batch_size=None, batch_format="pyarrow")
    except (RayError, ConfigError) as error:
        reason = _first_config_error(error)
        if reason is not None:
            raise ConfigError(reason) from error
        raise stopped_by(error, "reading the rollouts stopped", "run the same command again") from error


def _first_config_error(error: BaseException | None) -> str | None:
    """Return the message of the bad input behind an error that crossed Ray, None where it was something else."""
    while error is not None:
        if type(error) is ConfigError:
            return str(error).partition("\n")[0]  # Ray adds lines about trying again
        error = getattr(error, "cause", None) or error.__cause__
    return None
