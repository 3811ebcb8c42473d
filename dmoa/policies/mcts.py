"""Monte Carlo tree search over answers: an agent answers or mends an answer, another rates it, and good branches grow.

Source: after the MCTS of Patched MOA (arXiv 2407.18521), small: nodes are answers instead of conversations, one rating stands for
a rollout, and the rule of choice is UCT (Kocsis and Szepesvari 2006). The words of the instructions are ours.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field

from dmoa.policies.graphs import IMPROVE
from dmoa.policies.options import Count, OneOptions, Temperature, ask, ask_one, texts
from dmoa.policies.registry import PolicyContext, policy
from dmoa.types import Activation, QueryState, StepPlan, StepRecord, Stop

RATE = (
    "Do not answer it yourself. The last work above is an answer to the question. Reply with one number, from 0 if it is wrong "
    "to 10 if it is certainly right."
)
FINISH = "The work above is the best answer that was found. Write the answer, complete and on its own."
_UNRATED = 0.5


@dataclass(slots=True)
class Node:
    """One answer of the tree; the root holds none."""

    text: str = ""
    rating: float = 0.0
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    worth: float = 0.0
    """Sum of the ratings of this answer and of those below it."""


class MctsOptions(OneOptions):
    """Parameters of `mcts`; the agents answer in turn."""

    simulations: Count = 4
    """Answers that are tried."""
    children: Count = 2
    """Most answers that follow from one."""
    exploration: Annotated[float, Field(ge=0.0, le=100.0)] = 1.4
    """Weight of what was seldom tried."""
    temperature: Temperature = 0.7
    """Of the answers."""
    rater: str | None = None
    """Who rates the answers and writes the last one; None: the first of `agents`."""


@policy(
    "mcts",
    "Answers grow as a tree: one is tried, one rates it, the best branch is mended (after Patched MOA, arXiv 2407.18521).",
    options=MctsOptions,
    cost="2 * simulations + 1",
    reads="2 * simulations + 1 - min(children, simulations)",
    first_step_only=False,
)
class MctsPolicy:
    """Steps in turns: an answer, then its rating; the answer rated best is written out at last."""

    name = "mcts"

    def __init__(self, context: PolicyContext) -> None:
        self._options: MctsOptions = context.options

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask for an answer, for its rating, or for the last word."""
        options, done = self._options, len(state.steps)
        agents, rater = options.agents, options.lead
        if done > 2 * options.simulations:
            return Stop(reason="schedule")
        if done % 2:
            history = texts(state.steps[-1])
            return StepPlan(activations=ask([rater], instruction=RATE, history=history), fold="keep")
        root, nodes = self._tree(state.steps)
        number = done // 2
        if number == options.simulations:
            best = best_of(nodes)
            told = {"instruction": FINISH, "history": (best,)} if best else {"history": ()}
            return ask_one(agents, rater, ends_with="schedule", **told)
        leaf = self._path(root)[-1]
        task, seen = (IMPROVE, (leaf.text,)) if leaf.text else ("", ())
        agent = agents[number % len(agents)]
        asked = Activation(agent=agent, instruction=task, history=seen, temperature=options.temperature, sample=number)
        stand_ins = tuple(replace(asked, agent=name) for name in agents if name != agent)
        return StepPlan(activations=(asked,), reserves=stand_ins, fold="pass")

    def ended(self, state: QueryState) -> str:
        """Return the answer of a query: the last word, or the answer rated best where there is none."""
        is_over = state.query.stages or any(map(texts, state.steps[2 * self._options.simulations :]))
        return ("" if is_over else best_of(self._tree(state.steps)[1])) or state.summary

    def _tree(self, steps: tuple[StepRecord, ...]) -> tuple[Node, list[Node]]:
        """Return the root and all answers so far: the search goes the same ways again, as the replies led it."""
        root, nodes = Node(), list[Node]()
        for tried, rated in zip(steps[::2], steps[1::2], strict=False):
            path, said = self._path(root), texts(tried)
            rating = rating_of(" ".join(texts(rated))) if said else 0.0
            node = Node(text=said[0] if said else "", rating=rating)
            path[-1].children.append(node)
            nodes.append(node)
            for above in (*path, node):
                above.visits += 1
                above.worth += rating
        return root, nodes

    def _path(self, root: Node) -> list[Node]:
        """Return the nodes that lead to the one that grows next: the best child by UCT, until one has room for another."""
        path = [root]
        while len(path[-1].children) >= self._options.children:
            weight, tries = self._options.exploration, math.log(path[-1].visits)
            path.append(max(path[-1].children, key=lambda x: x.worth / x.visits + weight * math.sqrt(tries / x.visits)))
        return path


def best_of(nodes: list[Node]) -> str:
    """Return the answer that was rated best, empty where none was; of equally good ones the first."""
    return max(nodes, key=lambda node: (bool(node.text), node.rating), default=Node()).text


def rating_of(words: str) -> float:
    """Return the rating that a text names first, the scale itself aside, 0..1; the middle where it names none from 0 to 10."""
    found = re.search(r"(?<![\d.])\d{1,2}(?:\.\d+)?(?![\d.]*\d)", re.sub(r"\b0 ?(?:to|-) ?10\b", "", words))
    value = float(found[0]) if found else math.inf
    return value / 10 if value <= 10 else _UNRATED
