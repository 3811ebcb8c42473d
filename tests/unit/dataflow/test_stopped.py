"""What ends a pass whose work on Ray fails."""

from __future__ import annotations

import errno
import os

from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from dmoa.dataflow import stopped_by
from dmoa.errors import DmoaError

ADVICE = "the same command goes on from here"


def remote(cause: Exception) -> RayTaskError:
    """Return a task's failure as Ray raises it: it is its cause too, and its text a traceback."""
    return RayTaskError("flush", f"Traceback (most recent call last):\n  File x\n{cause!r}", cause).as_instanceof_cause()


def test_a_full_disk_of_a_remote_task_is_raised_as_it_is() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        cause = OSError(number, os.strerror(number), "part-000001.parquet")
        assert stopped_by(remote(cause), "the writer of the run is gone", ADVICE) is cause
        assert stopped_by(cause, "rollouts stopped", ADVICE) is cause


def test_other_failures_of_a_task_are_told_by_their_cause_without_a_traceback() -> None:
    found = stopped_by(remote(ValueError("column \n'k' is missing")), "rollouts stopped", ADVICE)
    assert isinstance(found, DmoaError)
    assert str(found) == f"rollouts stopped: column 'k' is missing; {ADVICE}"
    assert str(stopped_by(KeyError(), "rollouts stopped", ADVICE)) == f"rollouts stopped: KeyError; {ADVICE}"
    refused = OSError(errno.ECONNREFUSED, "refused")
    assert str(stopped_by(remote(refused), "rollouts stopped", ADVICE)) == f"rollouts stopped: [Errno 111] refused; {ADVICE}"


def test_what_ends_a_training_is_told_by_the_error_of_its_first_worker() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    failures = {rank: UserExceptionWithTraceback(error, "Traceback") for rank, error in ((1, ValueError("later")), (0, full))}
    assert stopped_by(WorkerGroupError("Traceback", failures), "training stopped", ADVICE) is full
    lost = ControllerError(WorkerGroupError("Traceback", {3: ActorDiedError()}))
    assert str(stopped_by(lost, "training stopped", ADVICE)).startswith("training stopped: The actor died unexpectedly")
    assert str(stopped_by(ControllerError(ValueError("odd")), "training stopped", ADVICE)) == f"training stopped: odd; {ADVICE}"


def test_an_actor_that_died_is_told_as_ray_tells_it() -> None:
    found = str(stopped_by(ActorDiedError(), "the writer of the run is gone", ADVICE))
    assert found.startswith("the writer of the run is gone: The actor died unexpectedly")
