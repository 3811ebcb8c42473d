"""Policies in which agents answer each other: debate, refinement by kind of mistake, and a chat that a manager leads."""

from __future__ import annotations

import re

from dmoa.policies.baselines import named
from dmoa.policies.layers import AGGREGATE
from dmoa.policies.options import Count, OneOptions, PolicyOptions, ask, ask_one, said, texts
from dmoa.policies.registry import PolicyContext, policy, scheduled
from dmoa.types import Activation, QueryState, StepPlan, Stop, StopReason

DEBATE = (
    "The first work above is your own answer, the others are those of other assistants. Use them as additional advice, and write "
    "your answer anew, complete and on its own."
)


class DebateOptions(PolicyOptions):
    """Parameters of `debate`."""

    rounds: Count = 2
    """Rounds after the first answers."""


@scheduled(
    "debate",
    "All answer, then in every round all read all answers and write theirs anew; the vote wins (arXiv 2305.14325).",
    options=DebateOptions,
    cost="A * (rounds + 1)",
    reads="A * A * rounds",
)
def debate(options: DebateOptions, state: QueryState) -> StepPlan | Stop:
    """Ask everyone, with the answers of the round before.

    Each sees its own last answer first, then the others' in the pool's order; who is lost is heard as it spoke last.
    """
    agents, done = options.agents, len(state.steps)
    if done > options.rounds:
        return Stop(reason="schedule")
    newest = {reply.agent: reply.text for step in state.steps for reply in said(step)}
    asked = tuple(
        Activation(
            agent=name,
            instruction=DEBATE if name in newest else AGGREGATE if newest else "",
            history=tuple(newest[x] for x in sorted(agents, key=lambda x: x != name) if x in newest),
        )
        for name in agents
    )
    return StepPlan(activations=asked, fold="vote", ends_with="schedule" if done == options.rounds else None)


MISTAKES = {
    "MISREAD": "It answers another question than the one that was asked. Read the question again, then write the answer anew.",
    "CONCEPT": "It uses a wrong idea or rule. Say which one is right, then write the answer anew.",
    "COMPUTATION": "It has a mistake of calculation. Work it out again, step by step, then write the answer anew.",
}
"""Kinds of mistakes that MoRA tells apart, and what their refiner is told."""
IDENTIFY = (
    "Do not answer it yourself. The last work above is an answer to the question. Reply with one word: NONE if it is right, "
    f"else the kind of its worst mistake, one of {', '.join(MISTAKES)}."
)


class RefineOptions(OneOptions):
    """Parameters of `refine`: the first of `agents` answers, the second looks for mistakes, the next ones refine, a kind each."""

    rounds: Count = 2
    """Most rounds of looking and refining."""


@scheduled(
    "refine",
    "One answers, one names the kind of its mistake, that kind's refiner mends it, again until none (MoRA, arXiv 2412.00821).",
    options=RefineOptions,
    cost="1 + 2 * rounds at most",
    reads="2 * rounds at most",
)
def refine(options: RefineOptions, state: QueryState) -> StepPlan | Stop:
    """Ask for the answer, for its mistake, or for one without it; a word that names no kind of mistake counts as NONE."""
    agents, last = options.agents, 2 * options.rounds
    done = sum(bool(step.summary) for step in state.steps)  # those before said nothing
    if not done and len(state.steps) < len(agents):
        return ask_one(agents, agents[len(state.steps)], history=())
    if done % 2 and done <= last:
        return ask_one(agents, agents[1 % len(agents)], fold="keep", instruction=IDENTIFY, history=(state.summary,))
    words = " ".join(texts(state.steps[-1])).upper()
    kind = next((kind for kind in MISTAKES if kind in words), None)
    if kind is None or done > last or not done:
        return Stop(reason="schedule")
    refiner = agents[(2 + list(MISTAKES).index(kind)) % len(agents)]
    task = f"The work above is an answer to the question. {MISTAKES[kind]}"
    ends_with: StopReason | None = "schedule" if done == last else None
    return ask_one(agents, refiner, ends_with=ends_with, instruction=task, history=(state.summary,))


SPEAK = "The work above is what was said so far, oldest first. Go on from there: write the best answer, complete and on its own."


class GroupChatOptions(OneOptions):
    """Parameters of `group_chat`."""

    turns: Count = 4
    """Most messages of the chat."""
    manager: str | None = None
    """Who says who speaks next; None: the first of `agents`."""


@policy(
    "group_chat",
    "A manager names who speaks next, who reads all that was said, until it says DONE (AutoGen, arXiv 2308.08155).",
    options=GroupChatOptions,
    cost="2 * turns at most",
    reads="turns * (turns - 1) at most",
    first_step_only=False,
    answers_at_once=False,
)
class GroupChatPolicy:
    """Manager and speaker in turns; where the manager names nobody the next agent in order speaks. The last message counts."""

    name = "group_chat"

    def __init__(self, context: PolicyContext) -> None:
        self._options: GroupChatOptions = context.options
        profiles = {agent.name: agent.profile.strip() for agent in context.config.agents}
        speakers = "\n".join(f"{name}: {profiles[name]}" for name in dict.fromkeys(self._options.agents))
        self._task = (
            f"Do not answer it yourself. You lead a chat of these assistants:\n{speakers}\nReply with the name of the one who "
            "should speak next, or DONE if the last message answers the question."
        )

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask the manager, or the one it named."""
        options, done = self._options, len(state.steps)
        chat = tuple(text for step in state.steps[1::2] for text in texts(step)[:1])
        if done % 2 == 0:
            if done == 2 * options.turns:
                return Stop(reason="schedule")
            return StepPlan(activations=ask([options.lead], instruction=self._task, history=chat), fold="keep")
        words = " ".join(texts(state.steps[-1]))
        speaker = named(words, options.agents)
        if chat and speaker is None and re.search(r"\bDONE\b", words):
            return Stop(reason="schedule")
        chosen = speaker or options.agents[done // 2 % len(options.agents)]
        ends_with: StopReason | None = "schedule" if done == 2 * options.turns - 1 else None
        return ask_one(options.agents, chosen, ends_with=ends_with, instruction=SPEAK if chat else "", history=chat)
