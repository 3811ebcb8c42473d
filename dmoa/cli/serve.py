"""`dmoa serve`: serves a pool until it is ended, or shows with `--dry-run` where everything goes and whether it fits."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from dmoa.config import Config
from dmoa.errors import ConfigError
from dmoa.serving.capacity import DryRun, Memory, dry_run, gib
from dmoa.serving.placement import Deployment
from dmoa.storage import is_held, place_of
from dmoa.workflows.console import EXIT_FAILED, CheckpointOption, Common, stdout_console, untrained_note, with_common
from dmoa.workflows.terminal import tell, terminal_descriptor, warn

if TYPE_CHECKING:
    from rich.console import Console

    from dmoa.serving.launch import Launched


_MAX_AGENTS = 4
_CAVEAT = (
    "K/V: keys and values. Estimates from config.json: activations, CUDA graphs and the driver's memory (often 1 to 5 GiB) are "
    "not in them; layers with a window are counted in full; GPUs in use count as there"
)


def show_plan(common: Common, config: Config, address: str | None) -> None:
    """Print the plan of a pool, write it where `--json` says, and raise ConfigError with every fault if it cannot work."""
    found = dry_run(config, address)
    _print(stdout_console(), found, quiet=common.verbosity < 0)
    common.write_json(found.to_json())
    if found.faults:
        count = f"{len(found.faults)} fault{'s' if len(found.faults) > 1 else ''}"
        rows = "\n".join(f"  {number}. {fault}" for number, fault in enumerate(found.faults, 1))
        raise ConfigError(f"pool {found.plan.pool!r} cannot run on {found.supply.source}: {count}\n{rows}")


def _print(console: Console, found: DryRun, *, quiet: bool) -> None:
    console.print(_placement(found))
    light = ", ".join(f"{part.name} x {part.replicas}" for part in found.plan.parts)
    console.print(f"beside them, without a GPU: {light}", soft_wrap=True)
    console.print(f"GPUs: {_gpus(found)}", soft_wrap=True)
    if any(memory.weights_bytes is not None for memory in found.memories.values()):
        console.print()
        console.print(_memory(found))
        if not quiet:
            console.print(Text(_CAVEAT, style="dim"), soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if not found.faults:
        console.print(f"pool {found.plan.pool}: fits; nothing was started")


def _table(title: str, *columns: str, left: int) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold", padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return table


def _placement(found: DryRun) -> Table:
    title = f"pool {found.plan.pool}: placement"
    table = _table(title, "deployment", "agents", "llm", "engine", "replicas", "each on", "GPUs in all", left=4)
    for item in found.plan.deployments:
        replicas = _range(item.min_replicas, item.max_replicas)
        table.add_row(
            item.name, _agents(item), item.llm, item.engine, replicas, _place(item), _range(item.min_gpus, item.max_gpus)
        )
    table.add_row("", "", "", "", "", "all", _range(found.plan.min_gpus, found.plan.max_gpus), style="bold")
    return table


def _agents(item: Deployment) -> str:
    more = f" and {len(item.agents) - _MAX_AGENTS} more" if len(item.agents) > _MAX_AGENTS else ""
    return ", ".join(item.agents[:_MAX_AGENTS]) + more


def _place(item: Deployment) -> str:
    if not item.gpus:
        return "endpoint" if item.is_remote else "CPU"
    kind = f" {item.accelerator_type}" if item.accelerator_type else ""
    together = item.gpus_together
    if item.pipeline_parallel > 1:
        where = f", each {together:g} on one node if Ray can" if together > 1 else ""
        return f"{item.pipeline_parallel} x {together:g}{kind} GPU{where}"
    return f"{item.gpus:g}{kind} GPU{', one node' if together > 1 else ''}"


def _gpus(found: DryRun) -> str:
    supply = found.supply
    if not supply.nodes:
        return f"none on {supply.source}"
    rows = [f"{node.name} {node.gpus:g} x {node.label}" for node in supply.nodes]
    return f"{supply.gpus:g} on {supply.source}: {'; '.join(rows)}"


def _memory(found: DryRun) -> Table:
    columns = (
        "llm",
        "model",
        "parameters",
        "weights",
        "adapters",
        "may fill",
        "left for K/V",
        "K/V a token",
        "tokens",
        "sequences",
    )
    table = _table("memory of each GPU (of a replica where it has none)", *columns, left=2)
    seen: set[tuple[str, ...]] = set()
    for item in found.plan.deployments:
        row = _memory_row(item, found.memories[item.name])
        if row not in seen:
            seen.add(row)
            table.add_row(*row)
    return table


def _memory_row(item: Deployment, memory: Memory) -> tuple[str, ...]:
    if memory.weights_bytes is None:
        word = "no model here" if memory.device == "none" else "unknown"
        return (item.llm, item.model, word, *[""] * 7)
    kind = memory.quantization or memory.dtype
    tokens = memory.room_tokens
    return (
        item.llm,
        item.model,
        f"{_count(memory.num_parameters)} {kind}",
        gib(memory.weights_bytes),
        gib(memory.adapters_bytes) if memory.adapters_bytes else "-",
        "CPU" if memory.device == "cpu" else gib(memory.budget_bytes) if memory.budget_bytes is not None else "unknown",
        "-" if memory.room_bytes is None else gib(max(0, memory.room_bytes)),
        "-" if memory.token_bytes is None else f"{memory.token_bytes / 1024:.1f} KiB",
        "-" if tokens is None else f"{tokens:,}",
        "-" if memory.num_sequences is None else f"{memory.num_sequences:,.1f} of {memory.max_model_len:,}",
    )


def _count(number: Any) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="RAY", envvar="RAY_ADDRESS", help="Join this Ray cluster (auto, HOST:PORT), start none."),
]

PolicyFilesOption = Annotated[
    list[str] | None,
    typer.Option("--policy", metavar="FILE.py:NAME", help="Let clients ask for this policy as POOL/its name; repeatable."),
]


InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Allow a host that others can reach without API keys (DMOA_API_KEYS).")
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what would run where and what it needs of each GPU; start nothing. Exit 2: cannot."),
]
AdaptOption = Annotated[
    bool, typer.Option("--adapt", help="Learn from the traffic meanwhile, as `dmoa adapt --online` does beside a server.")
]


@with_common
def serve(
    common: Common,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on [server.host of the pool].")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port [server.port of the pool].")] = None,
    address: AddressOption = None,
    checkpoint: CheckpointOption = None,
    insecure: InsecureOption = False,
    policies: PolicyFilesOption = None,
    app: Annotated[str, typer.Option("--app", metavar="NAME", help="Name of the Serve application.")] = "dmoa",
    dry_run: DryRunOption = False,
    adapt: AdaptOption = False,
) -> None:
    """Serve the swarm over HTTP to any OpenAI client.

    \b
    dmoa serve --port 8000
    dmoa serve --config pool.yaml --address auto
    dmoa serve --policy review.py:Review                    clients ask for POOL/review
    DMOA_API_KEYS=secret dmoa serve --host 0.0.0.0
    dmoa serve --config pool.yaml --adapt                   and learn from the traffic (router.adaptation)
    dmoa serve --config pool.yaml --dry-run                 does it fit on this machine?
    dmoa serve --config pool.yaml --dry-run --address auto  does it fit on that cluster?
    """
    from dmoa.serving.launch import ray_address

    config = common.load(checkpoint)
    files = _policy_files(policies or ())
    address = ray_address(address)
    if dry_run:
        return show_plan(common, config, address)
    _check_adapts(config, adapt)
    from dmoa.serving.ending import Ending
    from dmoa.serving.launch import launch, ray_is_up, stop

    launched: Launched | None = None
    learner: Learner | None = None
    for said in config.unused_scaling():
        tell(f"dmoa: {said}")
    common.say(f"starting pool {config.name} on Ray; the first start also fetches and loads its models")
    with Ending(common.say) as ending:
        try:
            launched = launch(
                config, host=host, port=port, address=address, app=app, insecure=insecure, policy_files=files, say=common.say
            )
            ending.ready()
            announce(common, launched)
            learner = Learner(launched.ray_address, app, learner_folder(config, app), common) if adapt else None
            threading.Event().wait()
        except (KeyboardInterrupt, SystemExit):  # the latter from Ray's own handler, which holds while it starts
            if launched is None:
                ending.leave(EXIT_FAILED)
            common.say("stopping")
        finally:
            if learner is not None:
                learner.end()
            if launched is not None:
                stop(app, end_ray=launched.started_ray)
            elif address is None and ray_is_up():
                stop(app, end_ray=True)


def _check_adapts(config: Config, adapt: bool) -> None:
    if adapt and config.router.adaptation == "off":
        raise ConfigError("--adapt: router.adaptation is 'off'; set it to observe, canary or on (--set router.adaptation=canary)")


_BY_CTRL_C = (-signal.SIGINT, 128 + signal.SIGINT)
"""How a child ends that the terminal interrupts beside this process."""


class Learner:
    """`dmoa adapt --online` beside the server. Where it dies that is said, and the server goes on."""

    def __init__(self, address: str, app: str, out: Path, common: Common) -> None:
        """Start it."""
        command = ["adapt", "--online", "--address", address, "--app", app, "--out", str(out)]
        command += ["-q"] if common.verbosity < 0 else []
        self._shown = shlex.join(["dmoa", *command])
        self._is_over = False
        common.say(f"learning from the traffic: {self._shown}")
        # Its words go where ours do: the stderr that it would have of us is the log of libraries.
        self._process = subprocess.Popen(  # noqa: S603 -- our own command
            [sys.executable, "-m", "dmoa", *command], stdin=subprocess.DEVNULL, stderr=terminal_descriptor()
        )
        threading.Thread(target=self._wait, name="dmoa-learner", daemon=True).start()

    def _wait(self) -> None:
        status = self._process.wait()
        if not self._is_over and status not in _BY_CTRL_C:
            warn(f"the learner ended with status {status}, and the server goes on without; start it again: {self._shown}")

    def end(self) -> None:
        """Tell it to end."""
        self._is_over = True
        self._process.terminate()


def learner_folder(config: Config, app: str) -> Path:
    """Return where the learner of an app keeps curves and log: beside the router's state, or where that lies by default.

    The latter also where the state is on another machine. Not one that the learner of another cluster's app writes to.
    """
    from dmoa.serving.actors import default_state_uri

    uris = [uri for uri in (config.router.state_uri,) if uri is not None and uri.startswith("file:")]
    folders = [Path(place_of(uri, "router.state_uri")[1]) for uri in (*uris, default_state_uri(app))]
    beside = next((folder for folder in folders if folder.is_dir()), folders[-1])
    found = [beside / "learner", *(beside / f"learner-{number}" for number in range(2, 100))]
    return next((folder for folder in found if not is_held(folder, "adapt")), found[0])


def _policy_files(asked: Sequence[str]) -> tuple[str, ...]:
    """Return `FILE.py:NAME`s with absolute paths; each is run here first, so that a bad one ends the command."""
    from dmoa.policies.registry import POLICIES

    return POLICIES.references(POLICIES.load(reference, "--policy").name for reference in asked)


def announce(common: Common, launched: Launched) -> None:
    """Say where a swarm answers and with which gate, and write it where `--json` says."""
    typer.echo(f"dmoa: ready at {launched.url} (pool {launched.pool}, gate {launched.gate_version})")
    note = untrained_note(launched.gate_version)
    if note:
        tell(f"dmoa: {note}")
    if launched.gate_version != launched.configured_version:
        tell(f"dmoa: the gate was installed before; deployed is {launched.configured_version}")
    common.say(f"its gate: dmoa router status --address {launched.ray_address}")
    common.write_json(
        {
            "url": launched.url,
            "pool": launched.pool,
            "gate_version": launched.gate_version,
            "configured_version": launched.configured_version,
            "ray_address": launched.ray_address,
            "untrained": note is not None,
        }
    )
