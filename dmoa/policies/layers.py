"""Mixture-of-agents policies: proposers answer, and an aggregator writes one answer from what they said, without their names.

Sources: MoA arXiv 2406.04692, Self-MoA and its sequential form arXiv 2502.00674, SMoA arXiv 2411.03284; `fusion` is the panel
and judge that several vendors sell behind one model name. The words of the instructions are ours.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Self

from pydantic import Field, model_validator

from dmoa.policies.options import Count, PolicyOptions, SampledOptions, ask, ask_one, texts
from dmoa.policies.registry import scheduled
from dmoa.types import QueryState, StepPlan, StepRecord, Stop

AGGREGATE = (
    "The work above holds answers of several assistants to the question; some may be wrong. Weigh them, then write one answer, "
    "complete and correct."
)


_NUMBERS = re.compile(r"(?:best|top) \d+|\d+(?:,\d{3})*(?:\.\d+)?", re.IGNORECASE)
"""What a judge says in numbers; that it was asked for the best 2 names no answer, nor does a part of 12,345 or 1.5."""


def aggregation(agents: Sequence[str], aggregator: str, answers: Sequence[str]) -> StepPlan:
    """Return the last step of a mixture: one agent writes the answer from what others said; it streams."""
    task = AGGREGATE if answers else ""
    return ask_one(agents, aggregator, ends_with="schedule", instruction=task, history=tuple(answers))


def newest_texts(steps: Sequence[StepRecord]) -> tuple[str, ...]:
    """Return what agents contributed to the last step in which any did."""
    return next(filter(None, map(texts, reversed(steps))), ())


class AggregatorOptions(PolicyOptions):
    """Parameters of policies with an aggregator."""

    aggregator: str | None = None
    """Who writes the answer; None: the first of `agents`."""


class MoaOptions(AggregatorOptions):
    """Parameters of `moa`."""

    layers: Annotated[int, Field(ge=2, le=16)] = 3
    """Layers, the aggregator's included."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    """Of the proposers; None: each agent's own."""


@scheduled(
    "moa",
    "Layers of proposers, each reading the layer before, then an aggregator (Mixture-of-Agents, arXiv 2406.04692).",
    options=MoaOptions,
    cost="(layers - 1) * A + 1",
    reads="(layers - 2) * A * A + A",
)
def moa(options: MoaOptions, state: QueryState) -> StepPlan | Stop:
    """Ask the next layer: all agents in every one but the last, who see all answers of the layer before."""
    done, answers = len(state.steps), newest_texts(state.steps)
    if done == options.layers - 1:
        return aggregation(options.agents, options.lead, answers)
    if done >= options.layers:
        return Stop(reason="schedule")
    layer = ask(options.agents, instruction=AGGREGATE if answers else "", history=answers, temperature=options.temperature)
    return StepPlan(activations=layer, fold="vote")


class SelfMoaOptions(SampledOptions):
    """Parameters of `self_moa`."""

    k: Count = 6
    """Samples."""


@scheduled(
    "self_moa",
    "k samples of one agent, which it aggregates itself (Self-MoA, arXiv 2502.00674).",
    options=SelfMoaOptions,
    cost="k + 1",
    reads="k",
)
def self_moa(options: SelfMoaOptions, state: QueryState) -> StepPlan | Stop:
    """Take the samples, then have them aggregated: the best agent alone in place of a mixture, named as `self_moa:AGENT`."""
    if len(state.steps) > 1:
        return Stop(reason="schedule")
    if state.steps:
        return aggregation((), options.lead, texts(state.steps[0]))
    return StepPlan(activations=ask([options.lead] * options.k, temperature=options.temperature), fold="vote")


class SelfMoaSeqOptions(SelfMoaOptions):
    """Parameters of `self_moa_seq`."""

    window: Annotated[int, Field(ge=2, le=64)] = 3
    """Texts that the aggregator reads at once, its own last answer included."""


@scheduled(
    "self_moa_seq",
    "k samples of one agent, aggregated a window at a time (Self-MoA-Seq, arXiv 2502.00674).",
    options=SelfMoaSeqOptions,
    cost="k + max(1, ceil((k - 1) / (window - 1)))",
    reads="k + max(1, ceil((k - 1) / (window - 1))) - 1",
)
def self_moa_seq(options: SelfMoaSeqOptions, state: QueryState) -> StepPlan | Stop:
    """Take the samples, then aggregate window by window.

    The first window holds samples alone; each later one the last aggregate and new samples, so context stays bounded.
    """
    done = len(state.steps)
    if not state.steps:
        return StepPlan(activations=ask([options.lead] * options.k, temperature=options.temperature), fold="vote")
    samples = texts(state.steps[0])
    seen = 1 + (done - 1) * (options.window - 1) if done > 1 else 0
    if done > 1 and seen >= len(samples):
        return Stop(reason="schedule")
    last = (state.summary,) if done > 1 else ()
    end = seen + options.window - len(last)
    plan = aggregation((), options.lead, (*last, *samples[seen:end]))
    return plan if end >= len(samples) else StepPlan(activations=plan.activations, fold="pass")


class SmoaOptions(AggregatorOptions):
    """Parameters of `smoa`."""

    layers: Count = 2
    """Most layers of proposers."""
    keep: Count = 2
    """Answers that the judge lets through."""


@scheduled(
    "smoa",
    "As moa, but a judge lets the best answers through and a moderator may end it early (Sparse MoA, arXiv 2411.03284).",
    options=SmoaOptions,
    cost="layers * (A + 2) at most",
    reads="(2 * layers - 1) * A + ((layers - 1) * A + 1) * min(keep, A) at most",
)
def smoa(options: SmoaOptions, state: QueryState) -> StepPlan | Stop:
    """Ask a layer in the agents' own roles, its judges, or at last the aggregator; a judge that names nothing keeps the first."""
    steps = state.steps
    if not steps:
        return StepPlan(activations=ask(options.agents, history=()), fold="vote")
    if len(steps) % 2:
        return _judging(options, steps)
    judge, *moderator = (reply.text for reply in steps[-1].replies)
    kept = chosen(judge, newest_texts(steps[:-1:2]), options.keep)
    if len(steps) == 2 * options.layers or re.search(r"\bSTOP\b", " ".join(moderator)):
        return aggregation(options.agents, options.lead, kept)
    return StepPlan(activations=ask(options.agents, instruction=AGGREGATE if kept else "", history=kept), fold="vote")


def _judging(options: SmoaOptions, steps: tuple[StepRecord, ...]) -> StepPlan:
    """Ask judge and moderator side by side, who read the layer's answers; after the last layer there is nothing to moderate."""
    work = "Do not answer it yourself. The work above is answers of several assistants."
    judge = f"{work} Reply with the numbers of the best {options.keep} alone."
    moderator = f"{work} Reply STOP if they agree on a good answer, else GO."
    both = ask([options.lead] * 2, instruction=judge, history=texts(steps[-1]))
    asked = (both[0], replace(both[1], instruction=moderator))
    return StepPlan(activations=asked[:1] if len(steps) == 2 * options.layers - 1 else asked, fold="keep")


def chosen(words: str, answers: Sequence[str], keep: int) -> tuple[str, ...]:
    """Return the answers whose numbers, from 1, a judge names first; the first ones where it names none."""
    places = {str(number): answer for number, answer in enumerate(answers, 1)}
    named = [number for number in dict.fromkeys(_NUMBERS.findall(words)) if number in places]
    return tuple(places[number] for number in named[:keep]) or tuple(answers[:keep])


class FusionOptions(PolicyOptions):
    """Parameters of `fusion`."""

    panel: Count = 3
    """Agents that answer at first; the others take the places of lost ones, in order."""
    quorum: Count | None = None
    """Contributions that are enough: the slower ones are cancelled; None: all of the panel."""
    judge: str | None = None
    """Who writes the answer; None: the first of `agents`."""

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        if self.quorum is not None and self.quorum > self.panel:
            raise ValueError(f"quorum is {self.quorum}, and the panel has {self.panel}; expected at most as many")
        return self

    @property
    def width(self) -> int:
        """The panel is asked at once."""
        return min(self.panel, len(self.agents))


@scheduled(
    "fusion",
    "A panel answers, a judge writes one answer from its words, unnamed and shuffled; the judge streams.",
    options=FusionOptions,
    cost="min(panel, A) + 1",
    reads="min(panel, A)",
)
def fusion(options: FusionOptions, state: QueryState) -> StepPlan | Stop:
    """Ask the panel, then the judge; names are left out and the order is drawn by the query's id, so neither sways the judge."""
    if len(state.steps) > 1:
        return Stop(reason="schedule")
    if not state.steps:
        asked, size = ask(options.agents), options.width
        return StepPlan(activations=asked[:size], reserves=asked[size:], fold="vote", quorum=options.quorum)
    answers = list(texts(state.steps[0]))
    random.Random(f"{state.query.trace_id}/1").shuffle(answers)  # noqa: S311 -- an order, not a secret
    return aggregation(options.agents, options.lead, answers)
