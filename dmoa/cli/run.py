"""`dmoa run` and `dmoa chat`: questions to the swarm, in this process or through a server; or recorded routing once more."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoa.agents.pool import build_pool_gate, check_files
from dmoa.config import Config
from dmoa.errors import DmoaError, RequestError, TraceError
from dmoa.plugins import names_file
from dmoa.trace import Trace, read_traces
from dmoa.types import Message
from dmoa.validation import did_you_mean, redact_text
from dmoa.workflows.console import (
    EXIT_FAILED,
    AgentOption,
    CheckpointOption,
    Common,
    DeadlineOption,
    MaxStepsOption,
    PolicyOption,
    QueryResult,
    Screen,
    UrlOption,
    printable,
    refuse_together,
    untrained_note,
    with_common,
)
from dmoa.workflows.terminal import tell

if TYPE_CHECKING:
    from dmoa.replay import Replay
    from dmoa.workflows.backends import AskOptions, Backend


@with_common
def run(
    common: Common,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="What to ask.", show_default=False)] = None,
    policy: PolicyOption = None,
    agent: AgentOption = None,
    checkpoint: CheckpointOption = None,
    url: UrlOption = None,
    replay: Annotated[
        Path | None, typer.Option("--replay", metavar="TRACE", help="Route the traces of this file again and compare.")
    ] = None,
    trace: Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Append the query's trace to this file.")] = None,
    max_steps: MaxStepsOption = None,
    deadline_s: DeadlineOption = None,
) -> None:
    """Ask one question and watch it being answered.

    \b
    dmoa run "What is 12 + 7?"
    dmoa run "What is 12 + 7?" --config pool.yaml --max-steps 2 --trace traces.jsonl
    dmoa run "What is 12 + 7?" --url http://127.0.0.1:8000 --json reply.json
    dmoa run "What is 12 + 7?" --policy mine.py:Mine
    dmoa run --replay traces.jsonl      repeats every routing decision, exit 1 if one differs
    """
    from dmoa.workflows.backends import AskOptions, append_line

    if replay is not None:
        others = {"QUESTION": question, "--policy": policy, "--agent": agent, "--url": url, "--trace": trace}
        refuse_together(others | {"--max-steps": max_steps, "--deadline": deadline_s}, "with --replay")
        _replay(common, replay, checkpoint)
        return
    if question is None:
        raise RequestError('question: missing; give one, such as dmoa run "What is 12 + 7?", or --replay TRACE')
    policy = _policy(policy, url)
    wish = AskOptions(policy=policy, agent=agent, max_steps=max_steps, deadline_s=deadline_s, keeps_trace=trace is not None)
    if trace is not None and not trace.is_fifo():  # whose reader would take this for its end
        append_line(trace)  # a file that cannot be written is told of before anything is asked
    backend = open_backend(common, url, checkpoint, wish, question)

    async def ask() -> None:  # returns nothing: what a main task returns is formatted when `run` ends, for 25 ms
        common.write_json((await ask_once(backend, question, wish, common, trace)).to_json())

    asyncio.run(ask())


def _policy(asked: str | None, url: str | None) -> str | None:
    """Return the name of the policy that `--policy` means; one of a file is loaded. Raises ConfigError, RequestError."""
    from dmoa.policies.registry import POLICIES

    if asked is None or not names_file(asked):
        return asked
    refuse_together({"--url": url}, "with a policy of a file: the server has its own policies")
    return POLICIES.resolve((asked,), "--policy")[0]


def open_backend(
    common: Common, url: str | None, checkpoint: Path | None, wish: AskOptions, question: str | None = None
) -> Backend:
    """Return what answers: a server where `--url` names one, else the pool in this process.

    What can be checked is checked before a model loads. Raises ConfigError, RequestError, CheckpointError.
    """
    from dmoa.workflows.backends import Backend, build_local_swarm, check_ask_options, check_question, open_client

    if question is not None:
        check_question(question)
    config = common.load_without(url, checkpoint)
    if config is None:
        return Backend(open_client(str(url)))
    check_ask_options(config, wish)
    return Backend(build_local_swarm(config, common.say))


async def ask_once(backend: Backend, question: str, wish: AskOptions, common: Common, trace: Path | None) -> QueryResult:
    """Ask one question, show how it is answered, append its trace to a file, and close the backend. Raises DmoaError."""
    from dmoa.workflows.backends import append_line

    screen = Screen(common.verbosity)
    try:
        asked = await backend.ask(question, (), wish, screen)
        screen.answer(asked)
    finally:
        screen.end_live_line()
        await backend.close()
    if trace is not None and asked.trace is not None:
        append_line(trace, asked.trace.line())
    return asked


def _replay(common: Common, path: Path, checkpoint: Path | None) -> None:
    traces = read_traces(path)
    if not traces:
        raise TraceError(f"trace {str(path)!r}: it is empty; give a file of JSON lines that dmoa wrote")
    results = replay_traces(common.load(checkpoint), traces)
    is_identical = all(not result.differences for result in results)
    rows = [
        {
            "trace_id": result.trace_id,
            "decisions": len(result.decisions),
            "identical": not result.differences,
            "differences": list(result.differences),
        }
        for result in results
    ]
    common.write_json({"identical": is_identical, "traces": rows})
    if not is_identical:
        raise typer.Exit(EXIT_FAILED)


def replay_traces(config: Config, traces: Sequence[Trace]) -> list[Replay]:
    """Route traces again with a pool's gate, all of them in the same batches, and print what came of it.

    Raises TraceError, CheckpointError.
    """
    from dmoa.replay import replay_routing

    check_files(config)
    gate, record = build_pool_gate(config)
    results = replay_routing(traces, gate, record.version)
    for trace, result in zip(traces, results, strict=True):
        count = f"{len(result.decisions)} decision{'' if len(result.decisions) == 1 else 's'}"
        if not result.differences:
            print(
                f"trace {result.trace_id}: {count}, identical" if result.decisions else f"trace {trace.trace_id}: no gate decided"
            )
            continue
        print(f"trace {result.trace_id}: {count}, {len(result.differences)} differ from the recording")
        for difference in result.differences:
            print(f"  {printable(difference)[:500]}")
    num_different = sum(bool(result.differences) for result in results)
    verdict = "identical" if not num_different else f"{num_different} of {len(results)} traces differ"
    print(f"replayed {len(results)} trace{'' if len(results) == 1 else 's'} together: {verdict}")
    versions = {route.gate_version for trace in traces for route in trace.routes}
    for note in filter(None, map(untrained_note, sorted(versions))):
        print(note)
    return results


_HELP = (
    "/quit ends, /steps shows or hides the steps, /policy NAME changes the policy, /agent NAME asks one agent alone (none: all), "
    "/history shows the questions so far, /clear forgets the conversation, /help tells this"
)


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
    /help lists what else can be typed: /quit, /steps, /policy NAME, /agent NAME, /history, /clear
    """
    from dmoa.workflows.backends import AskOptions

    wish = AskOptions(policy=_policy(policy, url), agent=agent, max_steps=max_steps, deadline_s=deadline_s)
    backend = open_backend(common, url, checkpoint, wish)
    conversation = Conversation(backend, wish, Screen(common.verbosity))
    # One runner for all turns: engines belong to its event loop, and Ctrl-C cancels the answer under way, no more.
    with asyncio.Runner() as runner:
        try:
            runner.run(backend.check(wish))
            common.say(f"ready; {_HELP}")
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

    def __init__(self, backend: Backend, wish: AskOptions, screen: Screen) -> None:
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
            return self._obey(runner, *line[1:].split(maxsplit=1))
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
        try:
            asked = await self._backend.ask(question, self._turns, self._wish, self._screen)
        finally:
            self._screen.end_live_line()
        self._screen.answer(asked)
        self._turns += [Message(role="user", content=question), Message(role="assistant", content=asked.answer.text)]
        self.answered.append(asked.to_json())

    def _take(self, wish: AskOptions, runner: asyncio.Runner) -> bool:
        """Ask so from now on, unless nobody here answers so, which is told."""
        try:
            runner.run(self._backend.check(wish))
        except DmoaError as error:
            tell(f"dmoa: {redact_text(str(error))}")
            return False
        self._wish = wish
        return True

    def _obey(self, runner: asyncio.Runner, name: str = "", argument: str = "") -> bool:
        match name:
            case "quit" | "exit":
                return False
            case "steps":
                self._screen.shows_steps = not self._screen.shows_steps
                tell(f"dmoa: steps {'shown' if self._screen.shows_steps else 'hidden'}")
            case "help":
                tell(f"dmoa: {_HELP}")
            case "history":
                asked = [turn.content for turn in self._turns if turn.role == "user"]
                tell("\n".join(f"{number}. {text}" for number, text in enumerate(asked, 1)) or "dmoa: nothing was asked yet")
            case "agent":
                if self._take(replace(self._wish, agent=argument or None, policy="single" if argument else None), runner):
                    tell(f"dmoa: {argument or 'the policy of the pool'} answers")
            case "policy":
                if not argument or self._take(replace(self._wish, policy=argument, agent=None), runner):
                    tell(f"dmoa: policy {self._wish.policy or 'as the pool has it'}")
            case "clear":
                self._turns.clear()
                tell("dmoa: the conversation starts anew")
            case _:
                nearest = did_you_mean(f"/{name}", re.findall(r"/[a-z]+", _HELP))
                tell(f"dmoa: /{name} is not a command; {_HELP}{nearest}")
        return True
