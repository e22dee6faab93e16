"""Which rows make up a step: a pure function of (seed, step, device rank), and of nothing else.

So a resumed run sees the batches it would have seen, DDP ranks slice one and the same batch, and
"which rows made checkpoint 101?" has an answer without a log.
"""

from functools import lru_cache
from random import Random

import numpy as np


def batch_indices(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The row indices of optimizer step `step` (counted from 0).

    The steps walk through one endless stream of shuffled epochs, so every row is seen equally
    often, whatever the sizes; a batch larger than the dataset takes rows again.
    """
    first = step * batch_size
    return [_stream(rows, seed, position) for position in range(first, first + batch_size)]


def micro_batch(batch: list[int], rank: int, ranks: int, part: int, parts: int) -> list[int]:
    """What one device works on in one of `parts` accumulation rounds: `batch[rank::ranks]`, cut
    into `parts` equal pieces. Together the devices and parts make exactly `batch`."""
    mine = batch[rank::ranks]
    size = len(mine) // parts
    return mine[part * size : (part + 1) * size]


def held_out(rows: int, ratio: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, validation) row indices, sorted: a seeded draw of `ratio` of the rows,
    at least one where the ratio is not 0."""
    count = max(1, round(rows * ratio)) if ratio else 0
    drawn = set(Random(f"held-out:{seed}").sample(range(rows), count))
    return [i for i in range(rows) if i not in drawn], sorted(drawn)


def _stream(rows: int, seed: int, position: int) -> int:
    epoch, place = divmod(position, rows)
    return int(_permutation(rows, seed, epoch)[place])


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """`random.Random` seeded with text gives the same order on every platform and version."""
    order = list(range(rows))
    Random(f"batches:{seed}:{epoch}").shuffle(order)
    return np.array(order, dtype=np.int64)
