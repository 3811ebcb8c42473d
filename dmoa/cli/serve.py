"""`dmoa serve`: the swarm on Ray Serve behind an OpenAI-compatible URL, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from dmoa.cli.options import EXIT_FAILED, CheckpointOption, Common, with_common
from dmoa.cli.show import untrained_note
from dmoa.cli.terminal import tell

if TYPE_CHECKING:
    from dmoa.serving.launch import Launched

AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="RAY", envvar="RAY_ADDRESS", help="Join this Ray cluster (auto, HOST:PORT), start none."),
]


@with_common
def serve(
    common: Common,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on [server.host of the pool].")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port [server.port of the pool].")] = None,
    address: AddressOption = None,
    checkpoint: CheckpointOption = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow a host that others can reach without API keys (DMOA_API_KEYS).")
    ] = False,
    app: Annotated[str, typer.Option("--app", metavar="NAME", help="Name of the Serve application.")] = "dmoa",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would run where and what it needs of each GPU; start nothing. Exit 2: cannot."
        ),
    ] = False,
) -> None:
    """Serve the swarm over HTTP to any OpenAI client.

    \b
    dmoa serve --port 8000
    dmoa serve --config pool.yaml --address auto
    DMOA_API_KEYS=secret dmoa serve --host 0.0.0.0
    dmoa serve --config pool.yaml --dry-run                 does it fit on this machine?
    dmoa serve --config pool.yaml --dry-run --address auto  does it fit on that cluster?
    """
    from dmoa.serving.launch import ray_address

    config = common.load(checkpoint)
    address = ray_address(address)
    if dry_run:
        from dmoa.cli.serve_plan import show_plan

        return show_plan(common, config, address)
    from dmoa.serving.ending import Ending
    from dmoa.serving.launch import launch, stop

    launched: Launched | None = None
    for said in config.unused_scaling():
        tell(f"dmoa: {said}")
    common.say(f"starting pool {config.name} on Ray; the first start also fetches and loads its models")
    with Ending(common.say) as ending:
        try:
            launched = launch(config, host=host, port=port, address=address, app=app, insecure=insecure)
            ending.ready()
            _announce(common, launched)
            threading.Event().wait()
        except (KeyboardInterrupt, SystemExit):  # the latter from Ray's own handler, which holds while it starts
            if launched is None:
                ending.leave(EXIT_FAILED)
            common.say("stopping")
        finally:
            if launched is not None:
                stop(app, end_ray=launched.started_ray)
            elif address is None and _ray_is_up():
                stop(app, end_ray=True)


def _ray_is_up() -> bool:
    """Say whether this process is connected to a Ray; a launch that failed early has not even loaded it."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _announce(common: Common, launched: Launched) -> None:
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
