"""How many threads torch uses for one piece of work.

Short work is slower on several threads wherever other processes want the cores too: every operation then waits for
the last thread to be scheduled. It may also round differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in this block. The setting is the calling thread's own: others keep theirs."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
