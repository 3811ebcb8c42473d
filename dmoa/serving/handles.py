"""Calls through Serve's handles, each with an id of its own.

Within a request Serve gives all calls the request's internal id (Ray 2.60), and keeps books by it. A router that chooses
replicas by session finds one waiting call per id: of two that wait at a time the other is never sent. And where a client goes
away, Serve cancels whatever bears the id, also what other queries wait for by now, such as a cold agent's start.
"""

from __future__ import annotations

import itertools
import uuid
from dataclasses import replace
from typing import Any

from ray.serve import context

_PROCESS = uuid.uuid4().hex
_NUMBERS = itertools.count()


def ask(handle: Any, *args: object) -> Any:
    """Call through a handle and return Serve's response. The request's id in Serve's logs stays the client's.

    Serve cancels the call with nothing else: whoever no longer waits for the response must cancel it.
    """
    request = context._get_serve_request_context()
    token = context._serve_request_context.set(replace(request, _internal_request_id=f"{_PROCESS}-{next(_NUMBERS)}"))
    try:
        return handle.remote(*args)
    finally:
        context._serve_request_context.reset(token)


def is_taken(response: Any) -> bool:
    """Tell whether a replica has accepted a call, or the call is over; Serve says it nowhere in public."""
    return bool(response._replica_result_future.done())
