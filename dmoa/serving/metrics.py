"""Metrics: what an ingress counts with Ray's metrics, and the router's aggregate as Prometheus text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.registry import Collector
from ray.util import metrics as ray_metrics

from dmoa.types import Answer, RouterStatus

_LATENCY_MS = [50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000]


class QueryMetrics:
    """Counts answered queries, and the tokens of all calls, lost and explored ones too; Ray exports every replica's numbers."""

    def __init__(self, pool: str) -> None:
        tags = {"pool": pool}
        self._queries = ray_metrics.Counter("dmoa_queries", "Answered queries.", ("pool", "policy", "stop_reason"))
        self._calls = ray_metrics.Counter("dmoa_agent_calls", "Agent calls by outcome.", ("pool", "agent", "status"))
        self._tokens = ray_metrics.Counter("dmoa_tokens", "Tokens of agents and summarizer.", ("pool", "kind"))
        self._latency = ray_metrics.Histogram("dmoa_query_latency_ms", "Wall time of a query.", _LATENCY_MS, ("pool", "policy"))
        self._steps = ray_metrics.Histogram("dmoa_query_steps", "Steps of a query.", [1, 2, 3, 5, 10, 20], ("pool", "policy"))
        self._hurried = ray_metrics.Counter("dmoa_hurried_calls", "Explored calls that gave way to queries no longer.", ("pool",))
        for metric in (self._queries, self._calls, self._tokens, self._latency, self._steps, self._hurried):
            metric.set_default_tags(tags)

    def count(self, answer: Answer) -> None:
        """Count one answered query and its calls."""
        self._queries.inc(1, {"policy": answer.policy, "stop_reason": answer.stop_reason})
        self._latency.observe(answer.wall_ms, {"policy": answer.policy})
        self._steps.observe(len(answer.steps), {"policy": answer.policy})
        self.count_calls(answer)

    def count_calls(self, answer: Answer) -> None:
        """Count calls and tokens alone: a query that was asked once more to learn from is nobody's query."""
        for step in answer.steps:
            for reply in step.replies:
                self._calls.inc(1, {"agent": reply.agent, "status": reply.status})
        usage = answer.usage
        for kind, tokens in (("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)):
            if tokens:
                self._tokens.inc(tokens, {"kind": kind})

    def count_hurried(self, calls: int) -> None:
        """Count explored calls that were made while somebody waited."""
        if calls:
            self._hurried.inc(calls)


class _Undated(Collector):
    """What a registry tells, without the moments at which its counters were made."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if sample.name != f"{family.name}_created"]
            yield family


def exposition(status: RouterStatus | None) -> str:
    """Return the router's account of itself as Prometheus text; None while the router is away.

    Its counters start at 0 whenever the router actor is started anew, as Prometheus expects of a process. When they did is not
    told: the registry, made for this account alone, would name this moment (`_created`).
    """
    registry = CollectorRegistry()
    Gauge("dmoa_router_up", "1 while the router actor answers.", registry=registry).set(0 if status is None else 1)
    if status is not None:
        Counter("dmoa_router_decisions", "Routing decisions.", registry=registry).inc(status.decisions)
        Counter("dmoa_router_batches", "Micro-batches.", registry=registry).inc(status.batches)
        Gauge("dmoa_router_masked_agents", "Agents left out because they are down.", registry=registry).set(len(status.masked))
        Gauge("dmoa_router_cold_agents", "Agents scaled to zero.", registry=registry).set(len(status.cold))
        gate = Gauge("dmoa_router_gate", "1 for the current gate version.", ["version", "pool"], registry=registry)
        gate.labels(version=status.gate_version, pool=status.pool).set(1)
        active = Counter("dmoa_router_activations", "How often each agent was activated.", ["agent"], registry=registry)
        _count(active, status.activations)
        if status.adaptation.get("mode", "off") != "off":
            _adaptation(status.adaptation, registry)
    return generate_latest(_Undated(registry)).decode()


def _count(counter: Counter, times: Mapping[str, float]) -> None:
    for label, count in times.items():
        counter.labels(label).inc(count)


def _adaptation(told: dict[str, Any], registry: CollectorRegistry) -> None:
    """Say what learning while serving comes to. These counters are kept with the router's state and outlive it."""
    offers = Counter("dmoa_router_offers", "Offered gates, and trials, by what became of them.", ["state"], registry=registry)
    _count(offers, told["counts"])
    stopped = Counter("dmoa_router_guard", "How often each guard refused, or signal ended a trial.", ["guard"], registry=registry)
    _count(stopped, told["failures"])
    gauges = {
        "ledger": ("Number of the last update that was judged.", told["ledger"]),
        "frozen": ("1 while no offer is taken.", told["frozen"] is not None),
        "cooldown_seconds": ("How long no offer is taken after a rollback.", told["cooldown_s"]),
        "held_back": ("Finished queries that gates are judged by.", told["held_back"]),
        "distrusted_agents": ("Agents left out of learning.", len(told["distrusted"])),
        "trial": ("1 while two versions are compared.", told["trial"] is not None),
    }
    for name, (words, value) in gauges.items():
        Gauge(f"dmoa_router_adaptation_{name}", words, registry=registry).set(value)
    for signal, arm in (told["trial"] or {"signals": {}})["signals"].items():
        evidence = Gauge(f"dmoa_router_trial_{signal}", "Evidence that the candidate is worse.", registry=registry)
        evidence.set(arm["evidence"])
