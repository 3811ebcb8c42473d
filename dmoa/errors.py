"""All errors that dmoa raises on purpose.

One root, `DmoaError`; every category is also the standard error that a caller would expect, and survives pickling
(Ray sends errors between processes). A message states the field or object, its value, what is expected, and what
to do next.
"""

from __future__ import annotations

import errno
from functools import partial


class DmoaError(Exception):
    """Root of every error that dmoa raises on purpose."""

    replies: tuple[object, ...] = ()
    """Of a query that ends with it: the calls so far (`types.AgentReply`, `SummarizerRecord`), so that their cost counts."""


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Numbers of an OSError for a disk that takes nothing more: a command ends with one sentence."""
_BUGS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, SyntaxError, TypeError, ValueError)


def is_bug(error: BaseException) -> bool:
    """Tell an error that says that code is wrong, ours or a plug-in's, from one that says what the world was like."""
    return isinstance(error, (*_BUGS, NotImplementedError)) and not isinstance(error, DmoaError)


class ConfigError(DmoaError, ValueError):
    """A configuration or a command line is wrong; commands exit with status 2."""


class PluginError(ConfigError):
    """A policy, an engine or a benchmark that is not dmoa's own breaks its contract; names it, its file and what went wrong."""


class RequestError(DmoaError, ValueError):
    """A client's request is wrong.

    `param` names the offending field, `code` is the OpenAI error code, `status` the HTTP status (4xx).
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        return partial(RequestError, param=self.param, code=self.code, status=self.status), (str(self),)


class AgentUnavailableError(DmoaError, ConnectionError):
    """The place where an agent runs died, is restarting or cannot be reached; the same call may succeed later."""


class CallNotTakenError(AgentUnavailableError):
    """No replica of an agent took a call for as long as a query waits for a place that is lost; nobody waits for it again."""


class AgentOverloadedError(DmoaError, RuntimeError):
    """An agent's queue is full; another agent should take its place."""


class PoolChangedError(DmoaError, RuntimeError):
    """A part of the swarm runs another version of the pool than the query's: it must begin again on one version."""


class NoAgentError(DmoaError, RuntimeError):
    """No agent of the pool answered before the deadline (HTTP 503)."""

    has_bug = False
    """Whether an agent failed because code is wrong."""


class BrokenStreamError(DmoaError, RuntimeError):
    """A stream was lost, and nothing came of it, or something else than what was handed on (HTTP 503, `stream_lost`)."""


class EmptyAnswerError(DmoaError, RuntimeError):
    """Every contribution to a query was empty (HTTP 503, code `empty_answer`)."""

    def __init__(self, message: str, replies: tuple[object, ...] = ()) -> None:
        """Keep the replies; none where a server says it."""
        super().__init__(message)
        self.replies = replies


class DeadlineError(DmoaError, TimeoutError):
    """The deadline passed before any contribution existed (HTTP 504)."""


class CheckpointError(DmoaError, ValueError):
    """A checkpoint is damaged or does not fit the pool."""


class ModelFetchError(DmoaError, RuntimeError):
    """A model could not be fetched, or its bytes are not the expected ones."""


class EngineError(DmoaError, RuntimeError):
    """An engine cannot run a request as asked."""


class PromptTooLongError(EngineError):
    """A prompt does not fit the model's context; HTTP 400 where no agent could take it."""


class RoutingError(DmoaError, RuntimeError):
    """The gate produced no usable decision."""


class TraceError(DmoaError, ValueError):
    """A trace is damaged or does not belong to this pool or gate."""


class SandboxError(DmoaError, RuntimeError):
    """This host cannot contain a program as asked; nothing was run."""
