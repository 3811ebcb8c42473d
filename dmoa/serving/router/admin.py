"""Changes the gate of a running swarm from another process: the router actor's operator side.

Used by `dmoa router` and by jobs that install what they trained. Joins the Ray that the swarm runs on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmoa.errors import ConfigError, DmoaError
from dmoa.types import RouterStatus

CALL_TIMEOUT_S = 120.0
"""How long a call may take; a router that restarts answers within seconds."""


class RouterAdmin:
    """The router of one running app."""

    def __init__(self, app: str = "dmoa", *, address: str | None = None) -> None:
        """Join the Ray at `address`, by default the one on this machine, and find the app's router.

        Raises ConfigError where no Ray answers, where several run here and none is named, or where the app has no router.
        """
        from dmoa.serving.launch import AUTO, ray_address, start_ray

        start_ray(ray_address(address) or AUTO)  # before Ray is imported: it reads the environment then
        import ray

        self._app = app
        self.address: str = ray.get_runtime_context().gcs_address
        """The Ray that is asked."""
        from dmoa.serving.actors import find_actor

        try:
            find_actor("router", app)
        except ValueError as error:
            running = ", ".join(running_apps()) or "none"
            raise ConfigError(
                f"app is {app!r}; running on this Ray: {running}; this is the one at {self.address}; "
                "name one of them (--app), or the Ray that it runs on (--address)"
            ) from error

    def install(self, files: dict[str, bytes], note: str = "") -> dict[str, Any]:
        """Make a checkpoint (`checkpoint_files`) current, as `RouterActor.install`. Raises CheckpointError, DmoaError (away)."""
        return self._call("install", files, note)

    def rollback(self, version: str | None = None, note: str = "") -> dict[str, Any]:
        """Make an earlier version current again, by default the one before. Raises CheckpointError, DmoaError."""
        return self._call("rollback", version, note)

    def offer(self, files: dict[str, bytes], evidence: dict[str, Any]) -> dict[str, Any]:
        """Offer a gate that was adapted, as `RouterActor.offer`; a refusal is no error.

        Raises ConfigError for evidence that cannot be read, DmoaError while the router is away: offer it again then, for an
        update that was taken is refused the second time.
        """
        return self._call("offer", files, evidence)

    def freeze(self, note: str = "") -> dict[str, Any]:
        """Take no offer until `thaw`; returns the status of adaptation. Raises DmoaError."""
        return self._call("freeze", note)

    def thaw(self, note: str = "") -> dict[str, Any]:
        """Take offers again; returns the status of adaptation. Raises DmoaError."""
        return self._call("thaw", note)

    def history(self) -> list[dict[str, Any]]:
        """Return the changes of the current version and what became of offers, oldest first. Raises DmoaError."""
        return self._call("history")

    def status(self) -> RouterStatus:
        """Return the router's account of itself. Raises DmoaError."""
        return self._call("status")

    def weights(self, version: str) -> dict[str, bytes]:
        """Return the files of a version's checkpoint. Raises DmoaError, also for one that is not kept."""
        return self._call("weights", version)

    def feedback(self) -> tuple[bytes, bytes]:
        """Return the records and the state of the app's feedback, as `FeedbackActor.snapshot`. Raises ConfigError, DmoaError."""
        return self._call("snapshot", actor=self._feedback())

    def feedback_since(self, life: str, number: int) -> tuple[str, int, bytes, bytes]:
        """Return what came to the app's feedback since, as `FeedbackActor.since`. Raises ConfigError, DmoaError."""
        return self._call("since", life, number, actor=self._feedback())

    def _feedback(self) -> Any:
        from dmoa.serving.actors import find_actor

        try:
            return find_actor("feedback", self._app)
        except ValueError:
            raise ConfigError(f"app {self._app!r} keeps no feedback; set router.feedback to on") from None

    def _call(self, method: str, *arguments: object, actor: Any = None) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        from dmoa.serving.actors import find_actor

        try:
            actor = actor or find_actor("router", self._app)  # by its name: another one where the app was served anew
            return ray.get(getattr(actor, method).remote(*arguments), timeout=CALL_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, DmoaError):
                raise error.cause from error
            raise DmoaError(
                f"router: {method} failed: {type(error.cause).__name__}: {error.cause}; nothing was changed"
            ) from error
        except (RayError, ValueError) as error:  # the latter where no actor has its name now
            raise DmoaError(f"router: it is away ({type(error).__name__}); see `dmoa router status` and try again") from error


def checkpoint_files(folder: str | Path) -> dict[str, bytes]:
    """Return the files of the checkpoint in a folder. Raises CheckpointError if it is none, or damaged."""
    from dmoa import checkpoint

    # The router checks it again, but only here can a message name the folder.
    return checkpoint.files_of(*checkpoint.load(folder))


def running_apps() -> list[str]:
    """Return the names of the apps that have a router on this Ray."""
    import ray

    from dmoa.serving.actors import NAMESPACE, actor_name

    prefix, named = actor_name("router", ""), ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
