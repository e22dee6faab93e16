from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.data.tokenize import Example
from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.batches import (
    BehaviourBatches,
    PairBatches,
    PhasedBatches,
    TransferBatches,
    equally_many,
    validation_rows,
)
from loragen.core.learning.plan import Phase, Phases
from loragen.core.learning.texts import LabelledRows

PAD = 0


def prepared(code, checkpoints=3, texts=8, tracked=None):
    """Every value says where it is from: 100 · source + its index."""
    tokens = 100.0 * code + np.arange(checkpoints)[:, None, None] + np.zeros((1, 4, 2))
    embeddings = 100.0 * code + np.arange(texts)[:, None, None] + np.zeros((1, 1, 5))
    mask = np.ones((texts, 1), dtype=bool)
    tokens, embeddings = tokens.astype(np.float32), embeddings.astype(np.float32)
    name = f"source {code}"
    return SourceArrays(name, tokens, embeddings, mask, tracked=tracked, dataset=name)


def labelled(code, count=6):
    """The first token of a row is that of its source, the second its own."""
    return LabelledRows([Example([100 * code, i + 1, 7], 1) for i in range(count)], [])


def batches(sources=None, rows=None, kind=BehaviourBatches, **settings):
    sources = sources or [prepared(1), prepared(2, checkpoints=9)]
    rows = rows or [labelled(i + 1) for i in range(len(sources))]
    texts = [range(len(source.embeddings)) for source in sources]
    ours = {"batch_size": 4, "rows_per_adapter": 3, "prompts": 2, "pad_id": PAD, "seed": 1}
    return kind(sources, texts, rows, **ours | settings)


def equal(one, other):
    """Pairs and rows."""
    tensors = zip([*one[:3], *one.rows[:4]], [*other[:3], *other.rows[:4]], strict=True)
    return all(a.equal(b) for a, b in tensors)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 50))
def test_a_batch_is_a_pure_function_of_seed_and_step(batch_size, seed, step):
    one, other = (batches(batch_size=batch_size, seed=seed) for _ in range(2))
    other[step + 1]
    assert equal(one[step], other[step])
    assert len(one[step].tokens) == batch_size


def test_steps_and_seeds_differ():
    assert not equal(batches()[0], batches()[1])
    assert not equal(batches()[0], batches(seed=2)[0])


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4))
def test_an_adapter_comes_with_prompts_and_rows_of_its_own_dataset(sizes):
    """Equally many rows of each, also of a dataset that has fewer."""
    sources = [prepared(i + 1, checkpoints=c) for i, (c, _) in enumerate(sizes)]
    drawn = batches(sources, [labelled(i + 1, r) for i, (_, r) in enumerate(sizes)])
    for step in range(3):
        batch = drawn[step]
        owner = batch.tokens[:, 0, 0] // 100  # (batch,)
        assert (batch.condition[..., 0] // 100 == owner[:, None, None]).all()
        assert batch.rows.ids.shape == (4 * 3, 3)
        assert (batch.rows.ids[:, 0] // 100).tolist() == owner.repeat_interleave(3).tolist()


def test_no_row_comes_twice_to_an_adapter_where_there_are_enough():
    for step in range(10):
        for rows in batches()[step].rows.ids[:, 1].view(4, 3):
            assert len(set(rows.tolist())) == 3


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_equally_many(there, wanted, seed):
    rows = labelled(1, there).training
    found = equally_many(rows, wanted, Random(seed))
    assert len(found) == wanted
    assert all(row in rows for row in found)
    if there >= wanted:
        assert len({row.ids[1] for row in found}) == wanted


def test_every_dataset_comes_equally_often_whatever_the_number_of_its_checkpoints():
    sources = [prepared(1, checkpoints=1), prepared(2, checkpoints=20), prepared(3)]
    drawn = batches(sources, batch_size=2)
    seen = Counter(int(value) for step in range(6) for value in drawn[step].tokens[:, 0, 0] // 100)
    assert seen == {1: 4, 2: 4, 3: 4}


def test_every_checkpoint_of_a_dataset_comes():
    drawn = batches([prepared(1, checkpoints=5)])
    seen = {value for step in range(20) for value in drawn[step].tokens[:, 0, 0].tolist()}
    assert seen == {100.0, 101.0, 102.0, 103.0, 104.0}


def test_tracked_checkpoints_come_with_their_own_texts():
    tracked = [[0, 1], [2], [1, 3, 4]]
    drawn = batches([prepared(1, tracked=tracked)])
    for step in range(10):
        batch = drawn[step]
        for condition, mask, tokens in zip(batch.condition, batch.mask, batch.tokens, strict=True):
            texts = {int(value) - 100 for value in condition[mask][:, 0]}
            assert texts <= set(tracked[int(tokens[0, 0]) - 100])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("parts", [1, 2])
def test_devices_and_accumulation_rounds_share_one_batch(ranks, parts):
    whole = batches(batch_size=8)[3]
    several = [
        batches(batch_size=8 // parts, parts=parts, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    rows = whole.rows.ids.view(8, 3, -1)
    for part in range(parts):
        for rank in range(ranks):
            places = slice(8 // parts * part + rank, 8 // parts * (part + 1), ranks)
            mine = several[rank][3 * parts + part]
            assert mine.tokens.equal(whole.tokens[places])
            assert mine.condition.equal(whole.condition[places])
            assert mine.rows.ids.equal(rows[places].flatten(0, 1))


@pytest.mark.parametrize("parts", [1, 3])
def test_items_are_of_the_phase_that_their_step_is_in(parts):
    tried = batches(parts=parts)
    texts = [range(8)] * 2
    pairs = PairBatches(tried.sources, texts, batch_size=4, prompts=2, seed=1, parts=parts)
    phases = Phases((Phase("reconstruction", 2), Phase("behaviour", 3)))
    both = PhasedBatches(phases, pairs, tried, parts)
    for k in range(2 * parts):
        assert both[k].rows is None
        assert all(a.equal(b) for a, b in zip(both[k][:3], pairs[k][:3], strict=True))
    for k in range(3 * parts):
        assert equal(both[2 * parts + k], tried[k])  # its own first step


def test_validation_has_the_first_held_out_rows():
    held = labelled(1, 5).training
    rows = validation_rows(LabelledRows([], held), 3, PAD)
    assert rows.ids[:, 1].tolist() == [1, 2, 3]
    assert rows.targets[0].eq(7).sum() == 1
    assert validation_rows(LabelledRows([], held), 0, PAD) is None
    assert validation_rows(LabelledRows(held, []), 3, PAD) is None
    assert torch.equal(validation_rows(LabelledRows([], held), 9, PAD).ids[:3], rows.ids)


@settings(max_examples=25)
@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 20))
def test_the_others_are_all_datasets_that_no_device_writes_for(more, pairs, parts, k):
    datasets = 4 * pairs + more
    sources = [prepared(i + 1) for i in range(datasets)]
    ours = {"kind": TransferBatches, "batch_size": 2 * pairs, "parts": parts, "ranks": 2}
    first, second = (batches(sources, **ours, rank=rank)[k] for rank in range(2))
    left_out = {int(one) // 100 - 1 for half in (first, second) for one in half.tokens[:, 0, 0]}
    assert set(first.others.datasets.tolist()) == set(range(datasets)) - left_out
    assert (
        first.others.condition[:, 0, 0, 0] // 100 - 1
    ).tolist() == first.others.datasets.tolist()
    assert all(a.equal(b) for a, b in zip(first.others, second.others, strict=True))


def test_another_source_of_what_is_left_out_is_left_out_too():
    sources = [replace(prepared(i + 1), dataset=f"dataset {i // 2}") for i in range(8)]
    found = batches(sources, kind=TransferBatches, batch_size=2)
    for k in range(6):
        left_out = {(int(one) // 100 - 1) // 2 for one in found[k].tokens[:, 0, 0]}
        others = {index // 2 for index in found[k].others.datasets.tolist()}
        assert others == set(range(4)) - left_out


def test_a_transfer_batch_has_the_adapters_and_rows_of_any_other():
    sources = [prepared(i + 1) for i in range(6)]
    plain, transfer = batches(sources), batches(sources, kind=TransferBatches)
    assert equal(plain[3], transfer[3])
    assert plain[3].others is None
