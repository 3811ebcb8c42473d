"""What a pool asks of a cluster: its deployments with agents, replicas and GPUs. Pure, no Ray.

`deployments` starts them, and `capacity` says on which GPUs they fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmoa.config import AgentConfig, Config, callable_agents


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One Serve deployment with agents on it."""

    name: str
    llm: str
    model: str
    engine: str
    placement: str
    agents: tuple[str, ...]
    """The summarizer of mode `llm` among them."""
    adapters: tuple[str, ...]
    """Distinct LoRA adapters of these agents."""
    min_replicas: int
    max_replicas: int
    gpus: float
    """Per replica; 0: it runs on the CPU."""
    tensor_parallel: int
    """GPUs of one replica that compute every layer together."""
    pipeline_parallel: int
    """Groups of these in one replica; they may be on several nodes, and Ray keeps a group together only where it can."""
    accelerator_type: str | None
    """Kind of GPU that it must have, as Ray names it."""
    is_remote: bool = False
    """The model runs at an endpoint elsewhere."""

    @property
    def min_gpus(self) -> float:
        """GPUs of all replicas at the least."""
        return self.gpus * self.min_replicas

    @property
    def max_gpus(self) -> float:
        """GPUs of all replicas when scaled up."""
        return self.gpus * self.max_replicas

    @property
    def gpus_together(self) -> float:
        """GPUs that one node must have."""
        return self.gpus / self.pipeline_parallel

    @property
    def is_on_one_node(self) -> bool:
        """Whether Ray starts a replica only where one node has all of its GPUs free."""
        return self.pipeline_parallel == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LightPart:
    """A part of the application without a language model; it takes no GPU and no CPU in Ray's book-keeping."""

    name: str
    replicas: int
    purpose: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What Ray will be asked to start for a pool."""

    pool: str
    deployments: tuple[Deployment, ...]
    parts: tuple[LightPart, ...]

    @property
    def min_gpus(self) -> float:
        """GPUs that the pool needs to start."""
        return sum(item.min_gpus for item in self.deployments)

    @property
    def max_gpus(self) -> float:
        """GPUs that the pool may grow to."""
        return sum(item.max_gpus for item in self.deployments)


INGRESS = "ingress"
"""Name of the deployment that answers HTTP."""


def is_in_ingress(config: Config, agent: AgentConfig) -> bool:
    """Tell whether an agent is called from the ingress itself: then it is up wherever it is asked."""
    return config.llms[agent.llm].placement == "ingress"


def deployment_names(config: Config) -> dict[str, str]:
    """Return the deployment of every agent (and of the summarizer) that has one beside the ingress, by agent name."""
    return {agent.name: deployment_name(config, agent) for agent in callable_agents(config) if not is_in_ingress(config, agent)}


def deployment_name(config: Config, agent: AgentConfig) -> str:
    """Return the name of the deployment that an agent runs in."""
    names = {"shared": f"llm-{agent.llm}", "dedicated": f"agent-{agent.name}"}
    return names.get(config.llms[agent.llm].placement, INGRESS)


def plan_of(config: Config) -> Plan:
    """Return the plan of a pool, deployments in the order of their first agents."""
    groups: dict[tuple[str, str], list[AgentConfig]] = {}
    for agent in callable_agents(config):
        groups.setdefault((deployment_name(config, agent), agent.llm), []).append(agent)
    deployments = []
    for (name, _), hosted in groups.items():
        llm = config.llms[hosted[0].llm]
        scaling, ingresses = config.scaling_of(hosted[0]), config.server.ingress_replicas
        options = llm.options
        wide, deep = options.gpu_split or (1, 1)
        deployments.append(
            Deployment(
                name=name,
                llm=hosted[0].llm,
                model=llm.model,
                engine=llm.engine,
                placement=llm.placement,
                agents=tuple(agent.name for agent in hosted),
                adapters=tuple(dict.fromkeys(agent.adapter for agent in hosted if agent.adapter)),
                min_replicas=ingresses if name == INGRESS else scaling.min_replicas,
                max_replicas=ingresses if name == INGRESS else scaling.max_replicas,
                gpus=llm.gpus,
                tensor_parallel=wide,
                pipeline_parallel=deep,
                accelerator_type=options.gpu_kind if llm.gpus else None,
                is_remote=bool(options.endpoint),
            )
        )
    parts = [
        LightPart(name=INGRESS, replicas=config.server.ingress_replicas, purpose="HTTP, and the step loop of every query"),
        LightPart(name="encoder", replicas=1, purpose="MiniLM on the CPU: embeddings for the gate"),
        LightPart(name="router", replicas=1, purpose="the gate, on the CPU"),
        LightPart(name="traces", replicas=1, purpose="the last traces"),
    ]
    if config.router.feedback == "on":
        purpose = f"a sample of the answered queries, about {config.router.feedback_mb} MB at most"
        parts.append(LightPart(name="feedback", replicas=1, purpose=purpose))
    return Plan(pool=config.name, deployments=tuple(deployments), parts=tuple(parts))
