"""How many workers training is given where nobody said: as many as are not slower than one.

A gate's update is so short that adding up its gradients between processes mostly costs more than sharing the batch saves.
Both are measured here, on this machine: updates of whole and of shared batches, and all-reduces over gloo.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from statistics import median

import torch
from torch import distributed

from dmoa.core.inference import one_thread
from dmoa.training.objective import batch_loss
from dmoa.training.train_loop import Job, Learner, epoch_batches
from dmoa.training.world import Alone, flat_size

_ROUNDS = 9
_GAIN = 0.9
"""More workers are taken only where an update is expected to take less than this share of one worker's: the measurement is
short, and a network is slower than one machine's memory."""
_TIMEOUT = timedelta(seconds=60)


def choose_workers(job: Job, most: int) -> tuple[int, str]:
    """Return how many of at most `most` workers to take, and why, in words."""
    most = min(most, job.options.batch_queries)
    if most < 2 or job.options.gpu:
        reason = "one GPU is enough for a gate" if job.options.gpu else "there is room for one"
        return 1, reason
    with one_thread():
        learner = Learner(job, Alone(torch.device("cpu")))
        batch = next(epoch_batches(job, 0))

        def gradient(size: int) -> Callable[[], object]:
            part = learner.batches.gather(batch[:size])
            return lambda: torch.autograd.backward(batch_loss(learner.gate, part, loss=job.options.loss, eta=job.eta).total)

        def seconds_with(count: int) -> float:
            return _seconds(gradient(-(-len(batch) // count)))

        alone_s = _seconds(lambda: learner.update(batch))
        fixed_s = max(0.0, alone_s - seconds_with(1))
        sizes = [count for count in (2, 4, 8, 16) if count <= most]
        times = {1: alone_s} | {count: fixed_s + seconds_with(count) for count in sizes}
    reduce_s = _reduce_seconds(flat_size(list(learner.gate.parameters())), learner.gate.head()[0].dtype)
    totals = {count: seconds + (reduce_s if count > 1 else 0.0) for count, seconds in times.items()}
    count = best_count(totals)
    beside = ", ".join(f"{number}: {1e3 * seconds:.2f} ms" for number, seconds in totals.items())
    return count, f"expected time of an update by workers: {beside}"


def best_count(seconds: Mapping[int, float]) -> int:
    """Return the number of workers with the shortest update, of expected times by number; 1 unless it is clearly shorter."""
    best = min(seconds, key=lambda count: seconds[count])
    return best if seconds[best] < _GAIN * seconds[1] else 1


def _seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call, after a first one that does not count."""
    call()
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def _reduce_seconds(numbers: int, dtype: torch.dtype) -> float:
    """Return the time of one all-reduce between two workers of this machine: two threads over gloo."""
    store = distributed.HashStore()  # type: ignore[attr-defined] # not among its exports

    def worker(rank: int) -> float:
        group = distributed.ProcessGroupGloo(store, rank, 2, _TIMEOUT)
        values = torch.zeros(numbers, dtype=dtype)
        return _seconds(lambda: group.allreduce([values]).wait())  # type: ignore[attr-defined] # of the compiled class

    with ThreadPoolExecutor(max_workers=2) as threads:
        return max(threads.map(worker, range(2)))
