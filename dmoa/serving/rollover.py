"""Answers a query on one version of the pool, while a changed pool is deployed over a running one.

Serve replaces the replicas of every deployment in place, in no order, so old and new ones meet. Whatever answers within a query
is asked with the version that the query began on and refuses another; the query then begins again, whole, at a running ingress.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from dmoa.config import Config
from dmoa.errors import DeadlineError, NoAgentError, PoolChangedError
from dmoa.types import Event, Query, TextDelta

Attempt = Callable[[Query], AsyncGenerator[str | Event]]
"""Answers a query: yields the fingerprint of the pool that does, steps, pieces of the final text, and last the Answer."""
CALL_DRAIN_S = 60.0
"""How long an agent's replica that is replaced may go on with the calls it has; its GPUs are free only after them."""
_QUERY_DRAIN_S = 300.0
_DRAIN_SLACK_S = 30.0
PATIENCE_S = 240.0
"""How long a query looks for one version of the pool; less than its ingress may go on."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


def query_drain_s(deadline_s: float | None) -> float:
    """Return how long a replaced ingress may go on with queries of this deadline: agents of the new pool may load models."""
    return max(_QUERY_DRAIN_S, (deadline_s or 0.0) + _DRAIN_SLACK_S)


def pool_version(config: Config) -> str:
    """Return what tells one version of a pool from another: a hash of all of its configuration."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]


def check_version(asked: str, here: str) -> None:
    """Raise PoolChangedError where a query on the version `asked` meets a part that runs `here`."""
    if asked != here:
        raise PoolChangedError(f"this part runs pool version {here}, and the query began with {asked}; begin the query again")


async def answer_on_one_pool_version(
    here: Attempt, elsewhere: Attempt, query: Query, *, patience_s: float = PATIENCE_S
) -> AsyncGenerator[str | Event]:
    """Yield what one attempt at a query yields, the first `here`; one that met another version begins again `elsewhere`.

    Steps of attempts that were given up are yielded too; the Answer holds those of its own alone. The query keeps its
    deadline. Raises what the attempt raises, and NoAgentError where no one version could be met for `patience_s`.
    """
    began, give_up, pause = time.monotonic(), None, _FIRST_PAUSE_S
    attempt, left = here, query
    while True:
        has_text = False
        try:
            async with aclosing(attempt(left)) as events:
                async for event in events:
                    has_text = has_text or isinstance(event, TextDelta)
                    yield event
            return
        except PoolChangedError as error:
            give_up = give_up or time.monotonic() + patience_s
            if has_text or time.monotonic() > give_up:
                raise NoAgentError(f"the pool was replaced while it answered, ask again ({error})") from error
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
        attempt, left = elsewhere, _with_time_left(query, time.monotonic() - began)


def _with_time_left(query: Query, gone_s: float) -> Query:
    """Return the query with what is left of its deadline. Raises DeadlineError."""
    limit = query.limits.deadline_s
    if limit is None:
        return query
    if limit <= gone_s:
        raise DeadlineError(f"the deadline of {limit} s passed while the pool was being replaced")
    return replace(query, limits=replace(query.limits, deadline_s=limit - gone_s))
