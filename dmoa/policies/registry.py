"""Every policy by name: what `POOL/NAME` and `--policy NAME` may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dmoa.config import Config
from dmoa.core.features import Preset
from dmoa.errors import RequestError
from dmoa.plugins import Registry
from dmoa.protocols import Encoder, Policy, Router
from dmoa.validation import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedGate:
    """A gate that the router holds beside the current one, so that several can be compared in one run."""

    version: str
    preset: Preset


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContext:
    """What a policy may be built from."""

    config: Config
    router: Router
    encoder: Encoder
    agent: str | None = None
    """The agent that was named, for policies of one agent; for `dmoa` the name of a gate."""
    gates: Mapping[str, NamedGate] = field(default_factory=dict)


def _everyone(config: Config) -> int:
    return len(config.agents)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEntry:
    """One policy: its name, one sentence, and how it is built for a query."""

    name: str
    summary: str
    build: Callable[[PolicyContext], Policy]
    width: Callable[[Config], int] = _everyone
    """Most agents that one of its steps asks at once; evaluation lets in as many queries as engines have room for."""


POLICIES: Registry[PolicyEntry] = Registry(
    PolicyEntry,
    what="policy",
    group="dmoa.policies",
    builtin={
        "dmoa": "dmoa.policies.dmoa:build_dmoa",
        "single": "dmoa.policies.baselines:build_single",
        "dense": "dmoa.policies.baselines:build_dense",
        "random": "dmoa.policies.baselines:build_random",
        "selector": "dmoa.policies.baselines:build_selector",
    },
)

Build = TypeVar("Build", bound=Callable[[PolicyContext], Policy])


def policy(name: str, summary: str, *, width: Callable[[Config], int] = _everyone) -> Callable[[Build], Build]:
    """Enter a policy under a name: its class, built from a `PolicyContext`, or a function that builds it.

    Args:
        summary: one sentence, which `dmoa policies` shows.
        width: most agents that one of its steps asks at once.
    """

    def enter(build: Build) -> Build:
        return POLICIES.add(PolicyEntry(name=name, summary=summary, build=build, width=width), build)

    return enter


def build_policy(name: str, context: PolicyContext) -> Policy:
    """Return the policy called `name`, built for one query. Raises RequestError for an unknown name, never runs a file."""
    if name not in POLICIES:
        raise RequestError(
            f"policy: {name!r} is not known; allowed: {', '.join(POLICIES)}{did_you_mean(name, POLICIES)}",
            param="dmoa.policy",
            code="unknown_policy",
        )
    return POLICIES[name].build(context)
