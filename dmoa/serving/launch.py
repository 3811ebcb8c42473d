"""Starts a swarm on Ray Serve from a program: flags, Ray, Serve, the app, and the wait until it answers."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoa.agents.pool import check_corpus, check_files, check_keys
from dmoa.config import Config
from dmoa.errors import ConfigError, DmoaError
from dmoa.loopback import ignore_proxies, is_loopback
from dmoa.serving import listening
from dmoa.serving.ending import own_process_groups
from dmoa.serving.failures import last_words, wait_running
from dmoa.serving.http.middleware import ADMIN_VARIABLE, ON_THIS_RAY, check_exposure, hash_keys
from dmoa.types import RouterStatus

if TYPE_CHECKING:
    from dmoa.serving.http.keeper import PortKeeper

_DIRECT = "RAY_SERVE_ENABLE_DIRECT_INGRESS"
SERVE_FLAGS = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1", _DIRECT: "0"}
"""Serve's flags for short hops; the proxy alone listens, unless `server.listener` says otherwise."""
PROXY_FLAGS = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "dmoa.serving.http.front:middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.3",
}
"""Serve's settings for who listens: the front that bounds what clients send, and a new proxy within seconds of a killed one."""
_PATIENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30"}
"""Serve kills a proxy that takes more than 5 s to start, as on a busy machine, and then ends with an error."""
START_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 10.0
"""How long the machine at an address may take to accept a connection."""
STOP_WAIT_S = 6.0
"""How long a swarm that is stopped may go on with its queries before its Ray ends, or this process leaves it."""
SAVE_WAIT_S = 1.0
"""How much longer its feedback may take to be saved: what it answered clients for is kept."""
_START_ATTEMPTS = 3
_keeper: PortKeeper | None = None
"""Of this process, as its Ray is."""
AUTO = "auto"
"""The word for the Ray that runs on this machine."""
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's name, on any system, for whether other machines may join; "0": all of its processes listen on loopback alone."""
_LOCAL = "local"
"""Ray's own word for a Ray that this process starts."""
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # an ingress ends when its queries have
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",  # else every process of Serve's works for its gauges ten times a second
    "RAY_task_events_max_num_task_in_gcs": "10000",  # else Ray's head grows by megabytes a minute, to 100,000 calls
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A swarm that answers."""

    url: str
    """Base URL of the server, without /v1."""
    pool: str
    gate_version: str
    configured_version: str | None
    """Gate that the app was deployed with; another one where a gate was installed since."""
    ray_address: str
    """Where other commands join the Ray that it runs on."""
    started_ray: bool
    """Whether this process started Ray, and so ends it."""


def set_flags() -> None:
    """Set the Serve flags that dmoa ships, where the environment does not say otherwise. Call before importing Serve."""
    for name, value in (SERVE_FLAGS | PROXY_FLAGS | _PATIENT | _QUIET).items():
        os.environ.setdefault(name, value)
    ignore_proxies()  # before Ray starts, whose processes inherit it


def launch(
    config: Config,
    *,
    host: str | None = None,
    port: int | None = None,
    address: str | None = None,
    app: str = "dmoa",
    route_prefix: str = "/",
    insecure: bool = False,
    policy_files: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Launched:
    """Start or join Ray, deploy the pool, and return once it answers.

    `address` joins a running cluster; `route_prefix` lets several apps share one server; `policy_files`
    are policies as FILE.py:NAME, which clients may then ask for; `say` takes lines on what is ready. Raises ConfigError for bad
    files, a port that is taken or an exposed server without keys, NoAgentError if it does not answer in time.
    """
    host, port = listening.bare(host or config.server.host), port or config.server.port
    config = config.model_copy(update={"server": config.server.model_copy(update={"host": host, "port": port})})
    key_hashes = hash_keys(os.environ)
    check_exposure(host, key_hashes, insecure)
    address = ray_address(address)
    check_files(config)  # here already, as what follows: importing Serve takes seconds
    if address is not None:
        _check_listening(address)
    elif not ray_is_up():
        # A Ray of our own inherits this environment, these files and this port; on another one the engines find out.
        check_keys(config)
        check_corpus(config)
        listening.check_free(host, port)
    mark = secrets.token_hex(16)
    say("starting Ray" if address is None else f"joining the Ray at {address}")
    if address is None and not ray_is_up():
        # Before Ray starts, whose processes inherit where.
        _keep_port(app if config.server.listener == "ingress" and config.server.ingress_replicas == 1 else None)
    from ray import serve

    application, started_ray = _build(config, key_hashes, address, mark, policy_files)
    host = _start_serve(host, port, app, is_here=started_ray)
    check_exposure(host, key_hashes, insecure, ON_THIS_RAY)  # which may be another than was asked for
    say(f"Ray is up; deploying pool {config.name}")
    target = serve.RunTarget(target=application, name=app, route_prefix=route_prefix)
    serve.run_many([target], wait_for_applications_running=False)
    wait_running(config, app, say)
    url = listening.base_url(host, port, route_prefix)
    listening.wait_ready(url, mark, START_TIMEOUT_S)
    return _launched(url, config.name, app, started_ray=started_ray)


def _keep_port(app: str | None) -> None:
    """Have this process keep the port for the ingress of `app`, or for Serve's proxy, which keeps it alone where this fails."""
    global _keeper
    from dmoa.serving.http.keeper import APP_VARIABLE, VARIABLE, PortKeeper

    with contextlib.suppress(OSError):
        _keeper = PortKeeper()
        os.environ[VARIABLE] = _keeper.path
        if app is not None:
            os.environ.update({APP_VARIABLE: app, _DIRECT: "1"})


def _close_port() -> None:
    global _keeper
    if _keeper is not None:
        from dmoa.serving.http.keeper import APP_VARIABLE, VARIABLE

        _keeper.close()
        _keeper = None
        del os.environ[VARIABLE]
        if os.environ.pop(APP_VARIABLE, None) is not None:
            os.environ[_DIRECT] = "0"


def ray_is_up() -> bool:
    """Say whether this process is connected to a Ray, without importing it."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def free_port() -> int:
    """Return a loopback port that nothing listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _start_serve(host: str, port: int, app: str, *, is_here: bool) -> str:
    """Start Serve, unless it runs; return the host it listens on. Raises ConfigError. `is_here`: on a new Ray of this machine."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client

    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        options = running.http_config
        if options.port != port:
            raise ConfigError(
                f"server.port is {port}; Serve listens on {options.host}:{options.port} on this Ray; give that port "
                "(--port), or start a Ray of its own (no --address)"
            )
        groups = running.get_serve_details().get("target_groups", ())  # of an app, where its ingress listens itself
        owner = next((str(group["app_name"]) for group in groups if group.get("app_name") and group.get("targets")), None)
        if owner not in {None, app}:
            raise ConfigError(
                f"app is {app!r}; the ingress of app {owner!r} has port {port} to itself on this Ray; start that one with "
                "--set server.listener=proxy, which apps share, or this one on a Ray of its own (no --address)"
            )
        return str(options.host)
    if is_here:
        listening.check_free(host, port)  # again: Ray took a while to start
    try:
        if is_here and _keeper is not None:
            _keeper.listen(host, port)
        serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    except (OSError, RayError, RuntimeError) as error:
        _close_port()
        if is_here:
            listening.check_free(host, port)
        why = f"server: Serve's proxy did not start on {host}:{port}: {last_words(error)}"
        raise DmoaError(f"{why}; start again, on another address if it is taken") from error
    return host


def _build(
    config: Config, key_hashes: tuple[str, ...], address: str | None, mark: str, policy_files: tuple[str, ...]
) -> tuple[Any, bool]:
    """Build the application and start or join Ray; return it, and whether Ray was started here."""
    from dmoa.serving.app import build_app

    # Ray Serve LLM asks Ray while an application is built, and would start one of its own making. Otherwise what is wrong
    # with a pool is told before Ray starts, which takes seconds.
    started_ray = start_ray(address) if any(llm.engine_entry.deployment for llm in config.llms.values()) else None
    # The proxy is on the head alone: an ingress beside it is lost with no other node, nor are the queries in it.
    application = build_app(
        config,
        key_hashes=key_hashes,
        is_ingress_on_head=True,
        mark=mark,
        policy_files=policy_files,
        admin_hashes=hash_keys(os.environ, ADMIN_VARIABLE),
    )
    return application, start_ray(address) if started_ray is None else started_ray


def start_ray(address: str | None = None) -> bool:
    """Join the Ray at `address` (default: RAY_ADDRESS), or start one on this machine where there is neither.

    Returns whether this process started it, and so ends it. Raises ConfigError where none answers at the address.
    """
    address = ray_address(address)
    import ray

    is_own = not ray.is_initialized() and address is None
    if is_own:
        _start_own_ray()
    elif not ray.is_initialized():
        if address == AUTO:
            address = _only_ray()
        _check_listening(str(address))
        _let_others_join(not _is_on_loopback_alone(str(address)))
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise ConfigError(
                f"address is {address!r}; no Ray answers there as asked; check that it runs, and set "
                f"RAY_AUTH_MODE=token where it wants tokens ({' '.join(str(error).split())[:200]})"
            ) from error
    return is_own


def _only_ray() -> str:
    """Return the address of the Ray on this machine. Raises ConfigError where there is none, or which one is not plain."""
    from ray._private.services import find_bootstrap_address, find_gcs_addresses

    find_gcs_addresses.cache_clear()
    found: list[str] = sorted(find_gcs_addresses())
    if not found:
        started = find_bootstrap_address(None)
        if started:
            return str(started)
        raise ConfigError(f"address is {AUTO!r}; no Ray runs on this machine; give HOST:PORT of a running one (--address)")
    if len(found) > 1:
        raise ConfigError(
            f"address: several Rays run on this machine, and none of them was asked: {', '.join(found)}; name the one that "
            "is meant (--address)"
        )
    return found[0]


def _check_listening(address: str) -> None:
    """Raise ConfigError where nothing listens at a HOST:PORT: Ray 2.60 goes on trying for more than ten minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return  # `auto`, or ray://
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"address is {address!r}; nothing listens there ({error}); give HOST:PORT of a running Ray, or auto"
        ) from error


def _is_on_loopback_alone(address: str) -> bool:
    """Say whether a Ray of this machine, at its HOST:PORT, listens nowhere else."""
    from ray._private.services import node_ip_address_from_perspective

    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not is_loopback(host):
        return False
    with contextlib.suppress(OSError):
        socket.create_connection((node_ip_address_from_perspective(), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        return False
    return True


def _let_others_join(may_join: bool) -> None:
    """Say whether the Ray that is started or joined next is for several machines: every process of it must know."""
    from ray._private import ray_constants

    if not may_join:
        os.environ[_CLUSTERS] = "0"  # for what this process starts
    elif os.environ.get(_CLUSTERS) == "0":
        del os.environ[_CLUSTERS]  # Ray's default; a 1 is the user's word, also for a Ray that is started next
    ray_constants.ENABLE_RAY_CLUSTER = may_join


def ray_address(address: str | None) -> str | None:
    """Return the Ray to join, None to start one, with the environment set for it; call before importing Ray."""
    set_flags()
    if not os.environ.get("RAY_ADDRESS", "-").strip():
        del os.environ["RAY_ADDRESS"]  # set to nothing, as a shell does that clears it: not set
    address = (address or "").strip() or os.environ.get("RAY_ADDRESS")
    if address in (None, _LOCAL):
        return None
    _use_token()
    return address


def _use_token() -> None:
    """Send this user's token for Ray, unless the environment says otherwise; a Ray that wants none ignores it."""
    if token_path().is_file() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def token_path() -> Path:
    """Return the file of the token with which a user's Rays are joined: whoever reads it runs code as that user."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def keep_token_private(path: Path) -> None:
    """Make sure that a token's file is there and is its owner's alone, and so is `~/.ray`; Ray 2.60 leaves both to the umask.

    A file or folder of somebody else stays as it is. Raises ConfigError where no file can be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            # Made with its mode, so that there is no moment at which others may read it.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
        is_rays = path.parent == Path.home() / ".ray"  # any other folder may hold more
        for place, mode in ((path, 0o600), *(((path.parent, 0o700),) if is_rays else ())):
            found = place.stat()
            if found.st_uid == os.geteuid() and found.st_mode & 0o077:
                place.chmod(mode)
    except OSError as error:
        raise ConfigError(
            f"Ray's token: cannot write {str(path)!r}: {error}; make its folder writable, or set RAY_AUTH_TOKEN"
        ) from error


def _start_own_ray() -> None:
    """Start a Ray on this machine, again where its processes were too slow: on a busy machine Ray gives up too soon."""
    if "RAY_AUTH_TOKEN" not in os.environ and os.environ.get("RAY_AUTH_MODE", "token") == "token":
        keep_token_private(token_path())
    import ray

    num_cpus = max(8, os.cpu_count() or 1)  # light replicas take none, engines one each: leave room for them
    _let_others_join(os.environ.get(_CLUSTERS) == "1")
    for attempt in range(_START_ATTEMPTS):
        try:
            with own_process_groups():
                ray.init(address="local", log_to_driver=False, include_dashboard=False, num_cpus=num_cpus)
        except Exception as error:
            # Ray 2.60 raises a bare Exception for processes that did not come up in time.
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == _START_ATTEMPTS - 1:
                raise
        else:
            # Ray opens its sessions to everybody: logs, and sockets by which objects are read.
            Path(ray._private.worker._global_node.get_session_dir_path()).chmod(0o700)
            return


def _launched(url: str, pool: str, app: str, *, started_ray: bool) -> Launched:
    import ray

    from dmoa.serving.actors import find_actor

    status: RouterStatus = ray.get(find_actor("router", app).status.remote())
    return Launched(
        url=url,
        pool=pool,
        gate_version=status.gate_version,
        configured_version=status.configured_version,
        ray_address=ray.get_runtime_context().gcs_address,
        started_ray=started_ray,
    )


def stop(app: str = "dmoa", *, end_ray: bool = False) -> None:
    """Delete the app and its actors; with `end_ray` Serve and Ray as well.

    Queries under way have STOP_WAIT_S; on a Ray that goes on, those that take longer may end in the background.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from dmoa.serving.actors import end_actors

    if end_ray and _keeper is not None:
        _keeper.stand_in()
    try:
        serve.delete(app, _blocking=False)
        deadline = time.monotonic() + STOP_WAIT_S
        while app in serve.status().applications and time.monotonic() < deadline:
            time.sleep(0.1)
        end_actors(app, deadline - time.monotonic() + SAVE_WAIT_S)
    except (DmoaError, ray.exceptions.RayError, RayServeException, ConnectionError):
        if not end_ray:
            raise
    finally:
        if end_ray:
            ray.shutdown()
            _close_port()
