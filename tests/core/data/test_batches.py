from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.batches import batch_indices, micro_batch, train_val_split

rows = st.integers(1, 40)
sizes = st.integers(1, 50)
seeds = st.integers(0, 2**31)
steps = st.integers(0, 300)


@given(rows, sizes, seeds, st.lists(steps, min_size=1, max_size=6))
def test_a_batch_is_a_pure_function_of_seed_and_step(rows, size, seed, steps):
    """Whatever was asked for before, in whatever order."""
    first = {step: batch_indices(rows, size, seed, step) for step in steps}
    again = {step: batch_indices(rows, size, seed, step) for step in reversed(steps)}
    assert first == again
    assert all(len(batch) == size for batch in first.values())


@given(rows, sizes, seeds, st.integers(1, 5))
def test_every_epoch_has_every_row_once(rows, size, seed, epochs):
    """Also where a batch is larger than the dataset or lies across two epochs."""
    total = rows * epochs
    stream = [
        index
        for step in range(-(-total // size))
        for index in batch_indices(rows, size, seed, step)
    ]
    for epoch in range(epochs):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(rows, sizes, seeds, steps)
def test_no_row_is_ahead_of_another_by_more_than_one(rows, size, seed, steps):
    seen = Counter(
        index for step in range(steps % 20) for index in batch_indices(rows, size, seed, step)
    )
    counts = [seen[index] for index in range(rows)]
    assert max(counts) - min(counts) <= 1


def test_seeds_and_epochs_shuffle_differently():
    def order(seed, epoch):
        return batch_indices(20, 20, seed, epoch)

    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != list(range(20))


def test_the_order_is_the_same_on_every_machine():
    """Frozen: a resumed run of yesterday must see the batches of yesterday."""
    assert batch_indices(10, 6, 42, 0) == [5, 2, 0, 7, 9, 6]


@given(st.data(), st.integers(1, 6), st.integers(1, 5), st.integers(1, 6))
def test_devices_and_rounds_together_make_exactly_the_batch(data, ranks, parts, each):
    size = ranks * parts * each
    batch = data.draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
    pieces = [
        micro_batch(batch, rank, ranks, part, parts)
        for rank in range(ranks)
        for part in range(parts)
    ]
    assert {len(piece) for piece in pieces} == {each}
    assert Counter(index for piece in pieces for index in piece) == Counter(batch)


@given(st.integers(1, 200), st.floats(0, 0.99), seeds)
def test_held_out_rows_and_the_others_are_all_rows(rows, ratio, seed):
    training, held = train_val_split(rows, ratio, seed)
    assert sorted([*training, *held]) == list(range(rows))
    assert training == sorted(training)
    assert held == sorted(held)
    assert len(held) == (max(1, round(rows * ratio)) if ratio else 0)
    assert train_val_split(rows, ratio, seed) == (training, held)
