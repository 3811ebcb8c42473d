"""`dmoa run`: one question through the swarm, in this process or through a server; or recorded routing once more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    refuse_together,
    with_common,
)
from dmoa.errors import RequestError

if TYPE_CHECKING:
    from dmoa.cli.local import Backend, Wish
    from dmoa.cli.show import Asked, Screen
    from dmoa.config import Config
    from dmoa.replay import Replay
    from dmoa.trace import Trace


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
    dmoa run --replay traces.jsonl      repeats every routing decision, exit 1 if one differs
    """
    from dmoa.cli.local import Wish

    if replay is not None:
        others = {"QUESTION": question, "--policy": policy, "--agent": agent, "--url": url, "--trace": trace}
        refuse_together(others | {"--max-steps": max_steps, "--deadline": deadline_s}, "with --replay")
        _replay(common, replay, checkpoint)
        return
    if question is None:
        raise RequestError('question: missing; give one, such as dmoa run "What is 12 + 7?", or --replay TRACE')
    wish = Wish(policy=policy, agent=agent, max_steps=max_steps, deadline_s=deadline_s, keeps_trace=trace is not None)
    backend = open_backend(common, url, checkpoint, wish, question)
    asked = asyncio.run(_ask_once(backend, question, wish, common))
    if trace is not None and asked.trace is not None:
        from dmoa.cli.local import append_line

        append_line(trace, asked.trace.model_dump_json())
    common.write_json(asked.to_json())


def open_backend(common: Common, url: str | None, checkpoint: Path | None, wish: Wish, question: str | None = None) -> Backend:
    """Return what answers: a server where `--url` names one, else the pool in this process.

    What can be checked is checked before a model loads. Raises ConfigError, RequestError, CheckpointError.
    """
    from dmoa.cli.local import build_local_backend, check_question, check_wish

    if question is not None:
        check_question(question)
    if url is not None:
        from dmoa.cli.remote import build_remote_backend

        given = {"--config": common.config, "--set": common.overrides, "--checkpoint": checkpoint}
        refuse_together(given, "with --url: the server has its own pool")
        return build_remote_backend(url)
    config = common.load(checkpoint)
    check_wish(config, wish)
    return build_local_backend(config, common.say)


async def _ask_once(backend: Backend, question: str, wish: Wish, common: Common) -> Asked:
    from dmoa.cli.show import Screen

    screen = Screen(common.verbosity)
    try:
        asked = await backend.ask(question, (), wish, screen)
        screen.answer(asked)
    finally:
        await backend.close()
    return asked


def _replay(common: Common, path: Path, checkpoint: Path | None) -> None:
    from dmoa.cli.show import Screen
    from dmoa.trace import read_traces

    traces = read_traces(path)
    config = common.load(checkpoint)
    results = replay_traces(config, traces)
    screen = Screen(common.verbosity)
    _show_replay(screen, traces, results)
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
    """Route traces again with a pool's gate, all of them in the same batches. Raises TraceError, CheckpointError."""
    from dmoa.agents.pool import build_pool_gate, check_files
    from dmoa.replay import replay_routing

    check_files(config)
    gate, record = build_pool_gate(config)
    return replay_routing(traces, gate, record.version)


def _show_replay(screen: Screen, traces: Sequence[Trace], results: Sequence[Replay]) -> None:
    from dmoa.cli.show import printable, untrained_note

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
