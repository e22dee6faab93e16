import logging
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.config import GenTrainConfig
from loragen.core.errors import UsageError
from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.data import PairBatches, Split, TrainingData, draw_texts
from loragen.core.learning.plan import Phase, Phases
from loragen.core.learning.texts import LabelledRows
from loragen.core.lora.packing import answer_losses
from loragen.core.protocols import Objective
from tests.core.lora.test_packing import PACKED, PADDED, SIMILAR, tiny


def arrays(code, checkpoints=3, texts=8, positions=1, held_out=2):
    """Every value says where it is from: 100 · source + its index. The last texts are held out."""
    tokens = 100.0 * code + np.arange(checkpoints)[:, None, None] + np.zeros((1, 4, 2))
    embeddings = 100.0 * code + np.arange(texts)[:, None, None] + np.zeros((1, positions, 5))
    last = max(1, texts - held_out)
    return SourceArrays(
        f"source {code}",
        tokens.astype(np.float32),
        embeddings.astype(np.float32),
        np.ones((texts, positions), dtype=bool),
        train_texts=range(last),
        val_texts=range(last, texts),
    )


def pairs(sources, batch_size=4, prompts=3, seed=1, split=None):
    return PairBatches(
        sources, batch_size=batch_size, prompts=prompts, seed=seed, split=split or Split()
    )


def data(sources, val_sources=(), **settings):
    config = GenTrainConfig(training={"objective": "reconstruction"}, **settings)
    return TrainingData(config, None, None, {}, sources, val_sources)


def equal(one, other):
    parts = ("condition", "mask", "tokens")
    return all(getattr(one, part).equal(getattr(other, part)) for part in parts)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 50))
def test_a_batch_is_a_pure_function_of_seed_and_step(batch_size, seed, step):
    sources = [arrays(1), arrays(2, checkpoints=5, texts=4)]
    one = pairs(sources, batch_size=batch_size, seed=seed)
    other = pairs(sources, batch_size=batch_size, seed=seed)
    other[step + 1]
    assert equal(one[step], other[step])
    assert len(one[step].tokens) == batch_size


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4))
def test_only_the_datasets_own_prompts_go_with_its_checkpoints(sizes):
    sources = [arrays(i + 1, checkpoints=c, texts=t) for i, (c, t) in enumerate(sizes)]
    batches = pairs(sources)
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        owner = batch.tokens[:, 0, 0] // 100
        texts = torch.where(batch.mask, batch.condition[..., 0] // 100, owner[:, None, None])
        assert (texts == owner[:, None, None]).all()
        assert batch.mask.flatten(1).any(1).all()


def test_every_checkpoint_comes_equally_often():
    sources = [arrays(1, checkpoints=3), arrays(2, checkpoints=4)]
    batches = pairs(sources, batch_size=2)
    assert batches.steps_per_epoch == 4  # 7 pairs
    seen = Counter(
        value for step in range(7) for value in batches[step].tokens[:, 0, 0].tolist()
    )  # 14 pairs: twice each
    assert set(seen.values()) == {2}
    assert len(seen) == 7


def test_the_prompts_of_a_pair_differ_from_step_to_step_and_never_repeat_within():
    batches = pairs([arrays(1, checkpoints=1, texts=30)], prompts=4)
    drawn = [tuple(batches[step].condition[0, :, 0, 0].tolist()) for step in range(10)]
    assert all(len(set(texts)) == 4 for texts in drawn)
    assert len(set(drawn)) > 5


@settings(max_examples=25)
@given(st.integers(2, 20), st.integers(1, 19), st.integers(0, 9))
def test_held_out_texts_are_never_drawn_in_training(texts, held_out, seed):
    source = arrays(1, texts=texts, held_out=held_out)
    batches = pairs([source], seed=seed)
    for step in range(20):
        drawn = batches[step].condition[batches[step].mask][:, 0]
        assert set(drawn.tolist()) <= {100.0 + i for i in source.train_texts}
    (batch,) = data([source]).val_dataloader()[0]
    assert set(batch.condition[batch.mask][:, 0].tolist()) <= {100.0 + i for i in source.val_texts}


def test_tracked_checkpoints_come_with_their_own_texts_alone():
    tracked = [[0, 1], [2], [1, 3, 4]]
    source = replace(arrays(1, checkpoints=3), tracked=tracked)
    batches = pairs([source], prompts=2)
    for step in range(10):
        batch = batches[step]
        for condition, mask, tokens in zip(batch.condition, batch.mask, batch.tokens, strict=True):
            texts = {int(value) - 100 for value in condition[mask][:, 0]}
            own = tracked[int(tokens[0, 0]) - 100]
            assert texts <= set(own)
            assert len(texts) == min(2, len(own))


def test_validation_is_the_last_checkpoint_and_the_same_every_time():
    ours = data([arrays(1), arrays(2, texts=1)], val_sources=[arrays(7, checkpoints=2)])
    for _ in range(2):
        seen, held_out = (list(loader) for loader in ours.val_dataloader())
        assert [batch.tokens[0, 0, 0].item() for batch in seen] == [102.0]
        assert [batch.tokens[0, 0, 0].item() for batch in held_out] == [701.0]
    assert all(equal(a, b) for a, b in zip(seen, ours.val_dataloader()[0], strict=True))


def test_fewer_prompts_and_positions_are_padded_under_the_mask():
    sources = [arrays(1, 1, 2, positions=3, held_out=0), arrays(2, 1, 6, held_out=0)]
    batches = pairs(sources, batch_size=2, prompts=5)
    batch = batches[0]
    assert batch.condition.shape == (2, 5, 3, 5)
    assert sorted(batch.mask.sum((1, 2)).tolist()) == [5, 6]  # 5 x 1 and 2 x 3
    assert batch.condition[~batch.mask].eq(0).all()
    assert batch.condition[batch.mask].ge(100).all()


def test_texts_travel_where_the_encoder_trains_along():
    source = replace(
        arrays(1, texts=8),
        embeddings=np.zeros((8, 0, 5), np.float32),
        mask=np.zeros((8, 0), bool),
        texts=[f"text {i}" for i in range(8)],
    )
    batch = pairs([source])[0]
    assert batch.condition.shape == (4, 3, 0, 5)
    allowed = {f"text {i}" for i in source.train_texts}
    assert [len(texts) for texts in batch.texts] == [3] * 4
    assert {text for texts in batch.texts for text in texts} <= allowed


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_and_micro_batches_share_one_batch(processes, accumulation):
    sources, size = [arrays(1), arrays(2)], 8 // accumulation
    whole = pairs(sources, batch_size=8)[3]
    for part in range(accumulation):
        for process in range(processes):
            split = Split(accumulation, process, processes)
            mine = pairs(sources, batch_size=size, split=split)[3 * accumulation + part]
            own = slice(size * part + process, size * (part + 1), processes)
            assert mine.tokens.equal(whole.tokens[own])
            assert mine.condition.equal(whole.condition[own])


def test_an_epoch_is_whole_steps():
    batches = pairs([arrays(1, checkpoints=7)], batch_size=2, split=Split(accumulation=3))
    assert batches.steps_per_epoch == 2  # of 6 pairs


class Fixed(Objective):
    """Its micro-batches are numbers."""

    def __init__(self, first):
        self.first = first

    def batches(self, process_index, num_processes):
        return range(self.first, self.first + 100)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_goes_from_the_trainers_step_through_the_phases(accumulation):
    """The micro-batches of a phase are counted from its own first step."""
    ours = data([arrays(1)], trainer={"accumulate_grad_batches": accumulation})
    ours.phases = Phases([Phase("a", Fixed(0), 3, None), Phase("b", Fixed(100), 2, None)], 1)
    ours.trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=2, max_steps=5)
    micro_batches = range(accumulation)
    expected = [2 * accumulation + i for i in micro_batches]
    expected += [100 + step * accumulation + i for step in range(2) for i in micro_batches]
    assert list(ours.train_dataloader()) == expected


def test_processes_that_cannot_share_a_batch_equally_are_refused():
    pairs([arrays(1)], batch_size=3, split=Split(num_processes=3))
    with pytest.raises(UsageError, match=r"data\.batch_size 3"):
        pairs([arrays(1)], batch_size=3, split=Split(num_processes=2))


@given(st.integers(0, 20), st.integers(1, 25), st.text(max_size=5))
def test_drawn_texts_are_different_ones(count, wanted, draw):
    drawn = draw_texts(range(count), wanted, draw)
    assert len(drawn) == len(set(drawn)) == min(count, wanted)
    assert drawn == draw_texts(range(count), wanted, draw)


@pytest.mark.parametrize(
    ("kind", "is_packed"),
    [(PACKED["llama"], True), (PADDED["bloom"], False), (PADDED["mistral"], False)],
    ids=["llama", "positions in the scores", "short window"],
)
def test_rows_are_packed_if_the_base_can_be(kind, is_packed, caplog):
    """Those of training and of validation. The base is asked once."""
    caplog.set_level(logging.INFO, "loragen")
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    base = SimpleNamespace(model=tiny(*kind), tokenizer=tokenizer)
    rows = LabelledRows(SIMILAR, SIMILAR[1:], SIMILAR)
    config = GenTrainConfig(training={"objective": "behaviour"})
    ours = TrainingData(config, None, None, {}, [replace(arrays(1), rows=rows)], base=base)
    batch = ours.collate(SIMILAR[:2] * 3, adapters=3)
    (held_out,) = ours.val_dataloader()[0]
    assert batch.packed == held_out.rows.packed == is_packed
    assert len(batch.ids) == (3 if is_packed else 6)
    assert len(held_out.rows.ids) == (1 if is_packed else 4)
    assert sum("rows are padded" in one for one in caplog.messages) == (not is_packed)
    losses, alone = (answer_losses(base.model, ours.collate(r)) for r in (SIMILAR, SIMILAR[:1]))
    assert losses.isfinite().all()
    assert (losses[:, None] - alone).abs().min(0).values.max() < 1e-5
