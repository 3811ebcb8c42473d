"""`dmoa chat`: a conversation with the swarm, in this process or through a server; earlier turns go with every question."""

from __future__ import annotations

import asyncio
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from dmoa.cli.options import (
    EXIT_FAILED,
    AgentOption,
    CheckpointOption,
    Common,
    DeadlineOption,
    MaxStepsOption,
    PolicyOption,
    UrlOption,
    with_common,
)
from dmoa.cli.run import open_backend
from dmoa.cli.terminal import tell
from dmoa.errors import DmoaError
from dmoa.types import Message
from dmoa.validation import did_you_mean, redact_text

if TYPE_CHECKING:
    from dmoa.cli.local import Backend, Wish
    from dmoa.cli.show import Screen

_HELP = "/quit ends, /steps shows or hides the steps, /policy NAME changes the policy, /clear forgets the conversation"


@with_common
def chat(
    common: Common,
    policy: PolicyOption = None,
    agent: AgentOption = None,
    checkpoint: CheckpointOption = None,
    url: UrlOption = None,
    max_steps: MaxStepsOption = None,
    deadline_s: DeadlineOption = None,
) -> None:
    """Talk with the swarm, question after question.

    \b
    dmoa chat
    dmoa chat --url http://127.0.0.1:8000
    /quit ends, /steps shows or hides the steps, /policy NAME changes the policy
    """
    from dmoa.cli.local import Wish
    from dmoa.cli.show import Screen

    wish = Wish(policy=policy, agent=agent, max_steps=max_steps, deadline_s=deadline_s)
    backend = open_backend(common, url, checkpoint, wish)
    conversation = Conversation(backend, wish, Screen(common.verbosity))
    common.say(f"ready; {_HELP}")
    # One runner for all turns: engines belong to its event loop, and Ctrl-C cancels the answer under way, no more.
    with asyncio.Runner() as runner:
        try:
            while (line := _read_line()) is not None and conversation.take(line, runner):
                pass
        finally:
            runner.run(backend.close())
    common.write_json({"turns": conversation.answered})
    if conversation.num_failed:
        raise typer.Exit(EXIT_FAILED)


def _read_line() -> str | None:
    """Return the next line that the user typed, None at the end of the input."""
    if sys.stdin.isatty():
        tell("you> ", nl=False)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        return None
    return line.strip() if line else None


class Conversation:
    """The turns so far and how the next question is asked."""

    def __init__(self, backend: Backend, wish: Wish, screen: Screen) -> None:
        self._backend = backend
        self._wish = wish
        self._screen = screen
        self._turns: list[Message] = []
        self.answered: list[dict[str, Any]] = []
        """The finished turns, as `--json` writes them."""
        self.num_failed = 0

    def take(self, line: str, runner: asyncio.Runner) -> bool:
        """Answer a question or obey a command; return False when the conversation is over."""
        if line.startswith("/"):
            return self._obey(*line[1:].split(maxsplit=1))
        if line:
            try:
                runner.run(self._ask(line))
            except DmoaError as error:
                self.num_failed += 1
                tell(f"dmoa: {redact_text(str(error))}")
            except KeyboardInterrupt:
                tell("\ndmoa: answer cancelled")
        return True

    async def _ask(self, question: str) -> None:
        asked = await self._backend.ask(question, self._turns, self._wish, self._screen)
        self._screen.answer(asked)
        self._turns += [Message(role="user", content=question), Message(role="assistant", content=asked.text)]
        self.answered.append(asked.to_json())

    def _obey(self, name: str = "", argument: str = "") -> bool:
        match name:
            case "quit" | "exit":
                return False
            case "steps":
                self._screen.shows_steps = not self._screen.shows_steps
                tell(f"dmoa: steps {'shown' if self._screen.shows_steps else 'hidden'}")
            case "policy":
                if argument:
                    self._wish = replace(self._wish, policy=argument, agent=None)
                tell(f"dmoa: policy {self._wish.policy or 'as the pool has it'}")
            case "clear":
                self._turns.clear()
                tell("dmoa: the conversation starts anew")
            case _:
                nearest = did_you_mean(f"/{name}", re.findall(r"/[a-z]+", _HELP))
                tell(f"dmoa: /{name} is no command; {_HELP}{nearest}")
        return True
