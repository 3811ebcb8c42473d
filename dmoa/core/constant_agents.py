"""Which agents say the same whatever they are asked: their sureness is about the reply, not about the query.

An agent that was tuned, or collapsed, onto one reply is sure of it everywhere; predictive entropy alone cannot tell it from
an expert, its replies can. Found from replies alone, without labels; read by `training/targets`, which makes such an agent
less sure than everybody else. Source: ours. Shape letters: R rows of a dense sample, A agents.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

CONSTANT_SHARE = 0.9
"""Share of its replies that are one and the same, from which an agent counts as constant, ..."""
USUAL_SHARE = 0.5
"""... where for half of the other agents that share is at most this: the queries do have different answers."""
MIN_ROWS = 10
"""Replies of an agent that its judgement takes."""


def reply_key(text: str | None) -> int:
    """Return a 32-bit number that is the same for the same reply, blanks around it aside. A chance match does no harm."""
    return zlib.crc32((text or "").strip().encode())


def same_reply_shares(reply_RA: npt.NDArray[np.int64], is_known_RA: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return per agent [A] the share of its replies that are its commonest one; NaN for fewer than `MIN_ROWS` replies.

    `reply_RA` are `reply_key`s, `is_known_RA` says where there is a reply at all.
    """
    shares = np.full(reply_RA.shape[1], np.nan)
    for agent in range(reply_RA.shape[1]):
        replies = reply_RA[is_known_RA[:, agent], agent]
        if len(replies) >= MIN_ROWS:
            shares[agent] = np.unique(replies, return_counts=True)[1].max() / len(replies)
    return shares


def constant_agents(share_A: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which agents [A] give one reply nearly always, while the others, by the median, do not; from `same_reply_shares`.

    Where most queries have one and the same answer, honest agents repeat themselves too: then nobody is constant. Agents
    without a share are not judged and judge nobody.
    """
    found = np.zeros(len(share_A), dtype=np.bool_)
    for agent in np.flatnonzero(share_A >= CONSTANT_SHARE):
        others = np.delete(share_A, agent)
        others = others[np.isfinite(others)]
        found[agent] = len(others) > 0 and float(np.median(others)) <= USUAL_SHARE
    return found
