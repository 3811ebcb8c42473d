"""`dmoa router`: shows which gate a running swarm routes with, installs another one, takes it back."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoa.storage import local_copy
from dmoa.workflows.console import Common, printable, untrained_note, with_common
from dmoa.workflows.terminal import tell

if TYPE_CHECKING:
    from dmoa.serving.router.admin import RouterAdmin

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="The gate of a running swarm: install, roll back, freeze.",
)

_MAX_SHOWN = 5
_with_common = partial(with_common, has_pool=False)

AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="RAY", envvar="RAY_ADDRESS", help="Ray that the swarm runs on [auto: the one on this machine]."
    ),
]
AppOption = Annotated[str, typer.Option("--app", metavar="NAME", help="Name of the Serve application.")]
NoteOption = Annotated[str, typer.Option("--note", metavar="TEXT", help="Words for the history: why, and by whom.")]


def _connect(common: Common, app_name: str, address: str | None) -> RouterAdmin:
    from dmoa.serving.router.admin import RouterAdmin

    admin = RouterAdmin(app_name, address=address)
    if address is None:
        common.say(f"asking the Ray at {admin.address}, the only one on this machine")
    return admin


@app.command("install")
@_with_common
def install(
    common: Common,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint: a folder that `dmoa train` wrote, or its URI.")],
    note: NoteOption = "",
    address: AddressOption = None,
    app_name: AppOption = "dmoa",
) -> None:
    """Make a checkpoint the gate that new queries begin with. Running ones finish with theirs.

    \b
    dmoa router install out/train/checkpoint
    dmoa router install out/train/checkpoint --address 127.0.0.1:6379 --note "80 queries, soft loss"

    The gate is checked first, and let decide the last inputs in the shadow; one that is refused changes nothing.
    """
    from dmoa.serving.router.admin import checkpoint_files

    with local_copy(folder, "DIR") as here:
        files = checkpoint_files(here)
    changed = _connect(common, app_name, address).install(files, note)
    _tell(common, changed)


@app.command("rollback")
@_with_common
def rollback(
    common: Common,
    version: Annotated[str | None, typer.Argument(metavar="[VERSION]", help="Version to go back to [the one before].")] = None,
    note: NoteOption = "",
    address: AddressOption = None,
    app_name: AppOption = "dmoa",
) -> None:
    """Make an earlier gate current again, and end a trial. Rolling back twice goes back twice."""
    changed = _connect(common, app_name, address).rollback(version, note)
    _tell(common, changed)


@app.command("history")
@_with_common
def history(common: Common, address: AddressOption = None, app_name: AppOption = "dmoa") -> None:
    """Show which gates were current and what became of offered ones. The oldest comes first.

    configured, install, adapted and rollback change the current gate; the other lines are of learning while serving.
    """
    changes = _connect(common, app_name, address).history()
    for change in changes:
        note = f"  {printable(change['note'])}" if change["note"] else ""
        typer.echo(f"{_when(change['unix_s'])}  {change['action']:<11}  {change['version']}{note}")
    common.write_json({"app": app_name, "history": changes})


@app.command("freeze")
@_with_common
def freeze(common: Common, note: NoteOption = "", address: AddressOption = None, app_name: AppOption = "dmoa") -> None:
    """Take no offered gate until `dmoa router thaw`. Also after a restart; a trial ends with the gate before it."""
    told = _connect(common, app_name, address).freeze(note)
    typer.echo(f"frozen: {printable(told['frozen'])}")
    common.write_json(told)


@app.command("thaw")
@_with_common
def thaw(common: Common, note: NoteOption = "", address: AddressOption = None, app_name: AppOption = "dmoa") -> None:
    """Take offered gates again. Also where a rollback is still cooling down."""
    told = _connect(common, app_name, address).thaw(note)
    typer.echo(f"offers are taken (adaptation {told['mode']})")
    common.write_json(told)


@app.command("status")
@_with_common
def status(common: Common, address: AddressOption = None, app_name: AppOption = "dmoa") -> None:
    """Show the current gate, its decisions, and what learning does. Which agents are masked, and how often each was activated."""
    found = _connect(common, app_name, address).status()
    typer.echo(f"pool          {found.pool} ({found.pool_fingerprint[:12]}), app {found.app}")
    typer.echo(f"gate          {found.gate_version}, current since {_when(found.installed_unix_s)}")
    if found.gate_version != found.configured_version:
        typer.echo(f"deployed with {found.configured_version}")
    if note := untrained_note(found.gate_version):
        typer.echo(f"              {note}")
    typer.echo(f"score         {found.score}")
    typer.echo(f"supervision   {found.supervision}")
    typer.echo(f"decisions     {found.decisions} in {found.batches} batches since {_when(found.started_unix_s)}")
    active = sorted(found.activations.items(), key=lambda item: -item[1])
    typer.echo(f"activations   {', '.join(f'{name} {count}' for name, count in active) or 'none'}")
    typer.echo(f"masked        {', '.join(found.masked) or 'none'}")
    typer.echo(f"cold          {', '.join(found.cold) or 'none'}")
    if found.state_lost is not None:
        typer.echo(f"state         {printable(found.state_lost)}; the cluster remembers it")
    for name, words in adaptation_lines(found.adaptation):
        typer.echo(f"{name:<12}  {words}")
    common.write_json(asdict(found))


outcomes = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="What clients said of the answers of a swarm: list, export.",
)
StateOption = Annotated[
    str | None,
    typer.Option(
        "--state", metavar="URI", help="Read what is saved under this router.state_uri; ask no Ray [the running swarm]."
    ),
]


@outcomes.command("list")
@_with_common
def list_outcomes(common: Common, state: StateOption = None, address: AddressOption = None, app_name: AppOption = "dmoa") -> None:
    """Show the outcomes that clients posted, key by key, oldest first."""
    from dmoa.workflows.traffic import read_traffic

    found = read_traffic(common, app_name, address, state).outcomes
    for one in found:
        whose = (one.agent or "final answer") + (f", step {one.step}" if one.step else "")
        typer.echo(f"{one.trace_id}  {one.reward:g}  {whose}  {' '.join(printable(one.source).split())}".rstrip())
    common.say(f"{len(found)} outcomes")
    common.write_json({"app": app_name, "outcomes": [one.model_dump(mode="json", exclude={"query_id"}) for one in found]})


@outcomes.command("export")
@_with_common
def export_outcomes(
    common: Common,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.jsonl", help="Where they are written.")] = Path("outcomes.jsonl"),
    state: StateOption = None,
    address: AddressOption = None,
    app_name: AppOption = "dmoa",
) -> None:
    """Write the outcomes as a file that `dmoa train --outcomes` reads.

    \b
    dmoa rollouts --from-traffic running --out out/traffic
    dmoa outcomes export --out outcomes.jsonl
    dmoa train --rollouts out/traffic --outcomes outcomes.jsonl --out out/gate
    """
    from dmoa.workflows.traffic import read_traffic, write_outcomes

    traffic = read_traffic(common, app_name, address, state)
    write_outcomes(out, traffic)
    common.say(f"{len(traffic.outcomes)} outcomes")
    typer.echo(out)
    common.write_json({"app": app_name, "out": str(out), "outcomes": len(traffic.outcomes)})


def adaptation_lines(told: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of `status` about learning while serving."""
    if not told:
        return [("adaptation", "off")]
    counts = ", ".join(f"{end.replace('_', ' ')} {times}" for end, times in told["counts"].items()) or "no offer yet"
    is_off = told["mode"] == "off"
    lines = [("adaptation", "off" if is_off else f"{told['mode']}, last update {told['ledger']}: {counts}")]
    if told["frozen"] is not None:
        lines.append(("", f"frozen: {printable(told['frozen'])}; `dmoa router thaw` ends that"))
    if is_off:
        return lines
    if told["cooldown_s"]:
        lines.append(("", f"no offer is taken for {told['cooldown_s']:.0f} s, after a rollback"))
    if told["failures"]:
        lines.append(("guards", ", ".join(f"{name} {times}" for name, times in told["failures"].items())))
    if told["distrusted"]:
        lines.append(("distrusted", ", ".join(told["distrusted"])))
    trial = told["trial"]
    if trial is not None:
        done = trial["queries"].get("candidate", 0)
        lines.append(("trial", f"{trial['candidate']} against {trial['control']}, {done} queries of update {trial['update']}"))
        lines += [
            ("", f"{name}: worse by {arm['worse_by']:g} on {arm['pairs']} pairs, evidence {arm['evidence']:g}")
            for name, arm in trial["signals"].items()
        ]
    return lines


def _tell(common: Common, changed: dict[str, Any]) -> None:
    version, previous = changed["version"], changed["previous"]
    typer.echo(
        f"gate {version} is current, before it was {previous}" if changed["changed"] else f"gate {version} was current already"
    )
    shadow = changed["shadow"]
    if shadow is not None and shadow["inputs"]:
        shares = [f"{name} {share:.0%}" for name, share in list(shadow["first"].items())[:_MAX_SHOWN]]
        more = len(shadow["first"]) - len(shares)
        typer.echo(
            f"on the last {shadow['inputs']} inputs: most probable {', '.join(shares)}{f' and {more} more' if more else ''}; "
            f"as the gate before on {shadow['same_first']:.0%}; {shadow['mean_k']:.2f} agents a step"
        )
    if note := untrained_note(version):
        tell(f"dmoa: {note}")
    common.write_json(changed)


def _when(unix_s: float | None) -> str:
    return "an unknown time" if unix_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
