"""Puts a probe together: dense rollouts of the queries, and of rows with known answers, judged; then the statistics."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from dmoa.agents.pool import fingerprint
from dmoa.config import Config
from dmoa.core.features import Preset
from dmoa.engine_options import RecordedOptions
from dmoa.engines.recorded import RecordedReply, agent_name, read_replies, replies_files
from dmoa.errors import ConfigError
from dmoa.evaluation.records import Reply
from dmoa.evaluation.registry import SKILLS, SUITES
from dmoa.reading import offsets
from dmoa.storage import check_local, localized, write_whole, writing
from dmoa.training.cluster_router import ProbeSample, sample_of
from dmoa.training.options import ProbeOptions, RolloutOptions
from dmoa.training.outcomes import credit_replies, no_outcome_fits, read_outcomes
from dmoa.training.probe import ProbeReport, one_agent, probe_pool
from dmoa.training.queries import sample_queries
from dmoa.training.rollouts import RolloutFolder, RolloutQuery, check_rollout_pool, read_manifest, read_table
from dmoa.types import Price
from dmoa.validation import did_you_mean
from dmoa.workflows.collect import read_labels, run_rollouts
from dmoa.workflows.console import Common
from dmoa.workflows.evaluate import opened_ray
from dmoa.workflows.terminal import goes_on

DEFAULT_SUITES = ",".join(suite.name for suite in SKILLS)
STAGED = ("chain", "relay")
KNOWN_ANSWERS = "known-answers.jsonl"
"""In the folder of a probe with known answers: who is right on which input, for the router's guard of that name."""
RECORDED = "recorded-queries.jsonl"
"""In the folder of a probe of recorded replies: the queries that were chosen of theirs."""


def run_probe(options: ProbeOptions, config: Config, common: Common, command: str) -> ProbeReport:
    """Ask the queries, unless there are rollouts, and rows with known answers where some are wanted; look at what was found.

    Raises ConfigError, DmoaError as `dmoa rollouts` does.
    """
    check_local(options.out, "--out")
    if len(config.agents) < 2:
        raise one_agent(config.agents[0].name)
    if options.outcomes is not None:
        read_outcomes(options.outcomes)  # a file that is none is refused before anybody is asked
    known = options.known_answers or ()
    allowed = [name for name in SUITES if name not in STAGED]
    unknown = [name for name in known if name not in allowed]
    if unknown:
        raise ConfigError(
            f"--known-answers: {', '.join(unknown)} not known; name some of {', '.join(allowed)}, the generated suites "
            f"whose answers are computed{did_you_mean(unknown, allowed)}"
        )
    out = options.out or Path("out") / time.strftime("probe-%Y%m%d-%H%M%S")
    collect = partial(_collect, config=config, common=common, options=options, command=command)
    if options.rollouts is not None:
        with localized(options, common.say, reads=("rollouts",)) as here:
            assert here.rollouts is not None
            return _look(here.rollouts, out, config, common, options, collect)
    sources = sources_of(options, config, out, common)
    with goes_on(f"the same command with --out {out} goes on from here"), opened_ray(options.address):
        collect(sources, out / "dense")
        return _look(out / "dense", out, config, common, options, collect)


def sources_of(options: ProbeOptions, config: Config, out: Path, common: Common) -> dict[str, Any]:
    """Return what is asked, as `RolloutOptions` has it: queries, benchmarks, or those that a pool has recorded replies to."""
    queries: Any = options.queries or (None if options.benchmarks else _recorded_queries(config, out, common, options))
    benchmarks = options.benchmarks or ("" if queries else DEFAULT_SUITES)
    return {"queries": queries or (), "benchmarks": benchmarks, "data_dir": options.data_dir, "limit": options.limit}


def _recorded_queries(config: Config, out: Path, common: Common, options: ProbeOptions) -> list[dict[str, str]] | None:
    """Return the source of what a recorded pool is asked, a file that is written for it; None for any other pool."""
    places = _recorded_places(config)
    if not places:
        return None
    found, whole = common_queries(places, options.limit, options.seed)
    num_agents = sum(len(agents) for named in places.values() for agents in named.values())
    common.say(f"asking {len(found)} of the recorded queries; all {num_agents} recorded agents replied to {whole} of them")
    with writing(out, what="folder"):
        write_whole(out / RECORDED, "".join(json.dumps(line) + "\n" for line in found))
    return [{"name": str(out / RECORDED)}]


def _recorded_places(config: Config) -> dict[Path, dict[str, list[str]]]:
    """Return where the replies of a pool are recorded, and under which names those of which agents."""
    found: dict[Path, dict[str, list[str]]] = {}
    for agent in config.agents:
        options = config.llms[agent.llm].options
        if isinstance(options, RecordedOptions):
            named = found.setdefault(Path(options.replies), {})
            named.setdefault(agent_name(options.names.get(agent.name, agent.name)), []).append(agent.name)
    return found


def common_queries(places: Mapping[Path, Mapping[str, list[str]]], limit: int, seed: int) -> tuple[list[dict[str, str]], int]:
    """Return at most `limit` recorded queries as lines of a file of queries, and how many of them every agent replied to.

    Agents are compared on what they all replied to, so those come first that most agents have a reply to, drawn by seed among
    equals. `places`: where replies lie, with the agents by their recorded name. Raises ConfigError for files that cannot be read,
    and where no reply has the text of its query.
    """
    replied: defaultdict[str, set[str]] = defaultdict(set)
    names: dict[str, str] = {}
    for reply, agents in _recorded(places):
        for key in reply.keys:
            replied[key].update(agents)
        if (reply.query or "").strip():
            names.setdefault(reply.keys[0], reply.query_id or "")
    if not names:
        raise ConfigError("engine_kwargs.replies: no reply has the text of its query; name a file of queries with --queries")
    texts_of = Counter(names.values())
    names = {key: name if texts_of[name] == 1 else "" for key, name in names.items()}  # an id of two texts names neither
    by_count: defaultdict[int, list[str]] = defaultdict(list)
    for key, name in names.items():
        by_count[len(replied[key] | (replied.get(f"id:{name}") or set()))].append(key)
    chosen: list[str] = []
    for count in sorted(by_count, reverse=True):
        chosen += sample_queries(by_count[count], limit - len(chosen), seed, lambda key: names[key] or key)
    wanted = {*chosen}
    texts = {reply.keys[0]: reply.query for reply, _ in _recorded(places) if reply.keys[0] in wanted}
    lines = [{"query": str(texts[key])} | ({"query_id": names[key]} if names[key] else {}) for key in chosen]
    everybody = sum(len(agents) for named in places.values() for agents in named.values())
    return lines, sum(key in wanted for key in by_count.get(everybody, ()))


def _recorded(places: Mapping[Path, Mapping[str, list[str]]]) -> Iterator[tuple[RecordedReply, list[str]]]:
    """Yield the replies of a pool's agents, and whose each is. Raises ConfigError."""
    for place, named in places.items():
        try:
            for file in replies_files(place):
                for reply in read_replies(file):
                    agents = named.get(agent_name(reply.agent))
                    if agents:
                        yield reply, agents
        except ConfigError as error:
            raise ConfigError(f"engine_kwargs.replies: {error}") from error


def _look(
    folder: Path,
    out: Path,
    config: Config,
    common: Common,
    options: ProbeOptions,
    collect: Callable[[dict[str, Any], Path], None],
) -> ProbeReport:
    """Look at rollouts that are there, and at rows with known answers, judged, where some are wanted."""
    sample = _unlabelled_sample(folder, config, options.outcomes)
    if not options.known_answers:
        return probe_pool(sample, seed=options.seed)
    common.say("uses probe labels: generated rows with computed answers")
    labels = out / "known-labels"
    collect({"benchmarks": options.known_answers, "limit": options.known_limit, "labels": labels}, out / "known")
    table = read_table(out / "known")
    judged = judged_replies(table, labels)
    write_whole(out / KNOWN_ANSWERS, known_answers(table, judged, config.gate.preset))
    known = sample_of(table, config.agent_names, config.gate.preset, judged)
    return probe_pool(sample, known=known, seed=options.seed)


def probe_rollouts(folder: Path, config: Config, *, seed: int = 0) -> ProbeReport:
    """Look at dense rollouts of a pool. Raises ConfigError for those of another pool, or too few."""
    return probe_pool(_unlabelled_sample(folder, config), seed=seed)


def _unlabelled_sample(folder: Path, config: Config, outcomes: Path | None = None) -> ProbeSample:
    manifest = read_manifest(folder)
    check_rollout_pool(manifest, fingerprint=fingerprint(config), agents=config.agent_names)
    table, credit = read_table(folder), None
    if outcomes is not None:
        given = read_outcomes(outcomes)
        found = credit_replies(given, table, seed=manifest.seed, round_=manifest.round)
        if not found.places:
            raise no_outcome_fits(len(given))
        credit = found.credit
    prices = {agent.name: Price(**price.model_dump()) for agent in config.agents if (price := config.llms[agent.llm].price)}
    return sample_of(
        table,
        config.agent_names,
        manifest.preset,
        outcomes=credit,
        prices=prices,
        agent_price=config.gate.agent_price,
        asked=_asked(folder),
    )


def _asked(folder: Path) -> dict[str, str]:
    """Return what each query of a collection asks at its first step; nothing of one without a list of queries."""
    queries = [RolloutQuery.model_validate_json(line) for _, line in offsets(RolloutFolder(folder).queries)]
    return {query.query_id: (query.stages and query.stages[0].part) or query.text for query in queries}


def judged_replies(table: pa.Table, labels: Path) -> dict[tuple[str, str], float]:
    """Return the score of every reply to the first step, by query and agent."""
    label_of = {label.row_id: label for label in read_labels(labels)}
    rows = table.select(("query_id", "step", "source", "agent", "text")).to_pylist()
    return {
        (row["query_id"], row["agent"]): SUITES[row["source"]].score(label_of[row["query_id"]], Reply(text=row["text"])).value
        for row in rows
        if row["step"] == 0
    }


def known_answers(table: pa.Table, judged: Mapping[tuple[str, str], float], preset: Preset) -> str:
    """Return the lines of a file for `router.guards.known_answers`: the gate's input to each question, and who is right."""
    rows = [row for row in table.select(("query_id", "step", "agent", "context", "feedback")).to_pylist() if row["step"] == 0]
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        given = row["context"] + (row["feedback"] if preset != "paper" else [])
        one = found.setdefault(row["query_id"], {"input": [round(value, 7) for value in given], "right": {}})
        one["right"][row["agent"]] = judged[row["query_id"], row["agent"]]
    return "".join(json.dumps(one) + "\n" for one in found.values())


def _collect(sources: dict[str, Any], out: Path, *, config: Config, common: Common, options: ProbeOptions, command: str) -> None:
    shared = options.model_dump(include={"difficulty", "seed", "call_cache", "address"})
    fixed = {"out": out, "dense": True, "max_steps": 1, "track": "none"}
    run_rollouts(RolloutOptions.parse({**shared, **sources, **fixed}), config, common, command)
