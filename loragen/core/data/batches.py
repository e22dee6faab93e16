"""The rows of each step: a pure function of (seed, step, process), and of nothing else.

A resumed run therefore gets the batches of an unbroken one, the processes of DDP slice the same
batch, and the rows behind a checkpoint are known without a log. Steps are counted from 0 here, and
in the data modules; everywhere else they are counted from 1.
"""

from functools import lru_cache
from random import Random

import numpy as np


def batch_indices(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Returns the row indices of optimizer step `step`, counted from 0.

    The steps read one endless stream of shuffled epochs, so that every row is used equally often
    for any sizes; a batch larger than the dataset repeats rows.
    """
    stream = (divmod(step * batch_size + i, rows) for i in range(batch_size))
    return [int(_shuffled(rows, seed, epoch)[index]) for epoch, index in stream]


def micro_batch(
    batch: list[int],
    process_index: int,
    num_processes: int,
    accumulation: int,
    num_accumulation: int,
) -> list[int]:
    """Returns the rows of one process in accumulation round `accumulation`, counted from 0: the
    batch's rows `[process_index::num_processes]`, cut into `num_accumulation` equal pieces. All
    processes and rounds together have exactly the rows of `batch`."""
    own = batch[process_index::num_processes]
    size = len(own) // num_accumulation
    return own[accumulation * size : (accumulation + 1) * size]


def train_val_split(rows: int, ratio: float, seed: int) -> tuple[list[int], list[int]]:
    """Returns sorted (training, validation) row indices. A random share `ratio` of the rows is held
    out for validation, at least one row unless the ratio is 0."""
    count = max(1, round(rows * ratio)) if ratio else 0
    drawn = set(Random(f"held-out:{seed}").sample(range(rows), count))
    return [i for i in range(rows) if i not in drawn], sorted(drawn)


@lru_cache(maxsize=4)
def _shuffled(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the row indices in the order of an epoch. `random.Random` seeded with text gives the
    same order on every platform and version."""
    order = list(range(rows))
    Random(f"batches:{seed}:{epoch}").shuffle(order)
    return np.array(order, dtype=np.int64)
