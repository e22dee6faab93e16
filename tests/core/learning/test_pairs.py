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
from loragen.core.learning.batches import draw_texts
from loragen.core.learning.data import GeneratorData


def prepared(code, checkpoints=3, texts=8, positions=1):
    """Every value says where it is from: 100 · source + its index."""
    tokens = 100.0 * code + np.arange(checkpoints)[:, None, None] + np.zeros((1, 4, 2))
    embeddings = 100.0 * code + np.arange(texts)[:, None, None] + np.zeros((1, positions, 5))
    return SourceArrays(
        f"source {code}",
        tokens.astype(np.float32),
        embeddings.astype(np.float32),
        np.ones((texts, positions), dtype=bool),
    )


def pairs(sources, unseen=(), batch_size=4, prompts=3, val_ratio=0.25, seed=1, parts=1):
    config = GenTrainConfig(
        seed=seed,
        data={"batch_size": batch_size, "prompts_per_condition": prompts, "val_ratio": val_ratio},
        training={"objective": "reconstruction"},
        trainer={"accumulate_grad_batches": parts},
    )
    return GeneratorData(sources, unseen, config)


def equal(one, other):
    parts = ("condition", "mask", "tokens")
    return all(getattr(one, part).equal(getattr(other, part)) for part in parts)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 50))
def test_a_batch_is_a_pure_function_of_seed_and_step(batch_size, seed, step):
    sources = [prepared(1), prepared(2, checkpoints=5, texts=4)]
    one = pairs(sources, batch_size=batch_size, seed=seed).train_batches()
    other = pairs(sources, batch_size=batch_size, seed=seed).train_batches()
    other[step + 1]
    assert equal(one[step], other[step])
    assert len(one[step].tokens) == batch_size


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4))
def test_only_the_datasets_own_prompts_go_with_its_checkpoints(sizes):
    sources = [prepared(i + 1, checkpoints=c, texts=t) for i, (c, t) in enumerate(sizes)]
    data = pairs(sources)
    batches = data.train_batches()
    for step in range(data.plan.per_epoch):
        batch = batches[step]
        owner = batch.tokens[:, 0, 0] // 100
        texts = torch.where(batch.mask, batch.condition[..., 0] // 100, owner[:, None, None])
        assert (texts == owner[:, None, None]).all()
        assert batch.mask.flatten(1).any(1).all()


def test_every_checkpoint_comes_equally_often():
    sources = [prepared(1, checkpoints=3), prepared(2, checkpoints=4)]
    data = pairs(sources, batch_size=2)
    batches = data.train_batches()
    assert data.plan.per_epoch == 4  # 7 pairs
    seen = Counter(
        value for step in range(7) for value in batches[step].tokens[:, 0, 0].tolist()
    )  # 14 pairs: twice each
    assert set(seen.values()) == {2}
    assert len(seen) == 7


def test_the_prompts_of_a_pair_differ_from_step_to_step_and_never_repeat_within():
    batches = pairs([prepared(1, checkpoints=1, texts=30)], prompts=4).train_batches()
    drawn = [tuple(batches[step].condition[0, :, 0, 0].tolist()) for step in range(10)]
    assert all(len(set(texts)) == 4 for texts in drawn)
    assert len(set(drawn)) > 5


@settings(max_examples=25)
@given(st.integers(2, 20), st.floats(0.01, 0.99), st.integers(0, 9))
def test_held_out_texts_are_never_drawn_in_training(texts, ratio, seed):
    data = pairs([prepared(1, texts=texts)], val_ratio=ratio, seed=seed)
    (training,), (held,) = data.train_texts, data.val_texts
    assert sorted([*training, *held]) == list(range(texts))
    assert training, "a source must keep texts to train on"
    assert held
    batches = data.train_batches()
    for step in range(20):
        batch = batches[step]
        assert set(batch.condition[batch.mask][:, 0].tolist()) <= {100.0 + i for i in training}
    (seen, _) = data.val_dataloader()
    (batch,) = seen
    assert set(batch.condition[batch.mask][:, 0].tolist()) <= {100.0 + i for i in held}


def test_a_source_with_one_text_trains_on_it():
    data = pairs([prepared(1, texts=1)])
    assert (data.train_texts, data.val_texts) == ([[0]], [[]])
    assert data.train_batches()[0].mask.all()


def test_a_source_may_say_which_texts_are_held_out():
    data = pairs([replace(prepared(1, texts=4), held_out=[1, 3])], val_ratio=0.9)
    assert (data.train_texts, data.val_texts) == ([[0, 2]], [[1, 3]])


def test_tracked_checkpoints_come_with_their_own_texts_alone():
    tracked = [[0, 1], [2], [1, 3, 4]]
    source = replace(prepared(1, checkpoints=3), held_out=[6, 7], tracked=tracked)
    batches = pairs([source], prompts=2).train_batches()
    for step in range(10):
        batch = batches[step]
        for condition, mask, tokens in zip(batch.condition, batch.mask, batch.tokens, strict=True):
            texts = {int(value) - 100 for value in condition[mask][:, 0]}
            own = tracked[int(tokens[0, 0]) - 100]
            assert texts <= set(own)
            assert len(texts) == min(2, len(own))


def test_validation_is_the_last_checkpoint_and_the_same_every_time():
    data = pairs([prepared(1), prepared(2, texts=1)], unseen=[prepared(7, checkpoints=2)])
    for _ in range(2):
        seen, unseen = (list(loader) for loader in data.val_dataloader())
        assert [batch.tokens[0, 0, 0].item() for batch in seen] == [102.0]
        assert [batch.tokens[0, 0, 0].item() for batch in unseen] == [701.0]
    assert all(equal(a, b) for a, b in zip(seen, data.val_dataloader()[0], strict=True))


def test_fewer_prompts_and_positions_are_padded_under_the_mask():
    sources = [prepared(1, 1, texts=2, positions=3), prepared(2, 1, texts=6)]
    batches = pairs(sources, batch_size=2, prompts=5, val_ratio=0.0).train_batches()
    batch = batches[0]
    assert batch.condition.shape == (2, 5, 3, 5)
    assert sorted(batch.mask.sum((1, 2)).tolist()) == [5, 6]  # 5 x 1 and 2 x 3
    assert batch.condition[~batch.mask].eq(0).all()
    assert batch.condition[batch.mask].ge(100).all()


def test_texts_travel_where_the_encoder_trains_along():
    source = replace(
        prepared(1, texts=8),
        embeddings=np.zeros((8, 0, 5), np.float32),
        mask=np.zeros((8, 0), bool),
        texts=[f"text {i}" for i in range(8)],
    )
    data = pairs([source, prepared(2)], val_ratio=0.5)
    batch = pairs([source], val_ratio=0.5).train_batches()[0]
    assert batch.condition.shape == (4, 3, 0, 5)
    allowed = {f"text {i}" for i in data.train_texts[0]}
    assert [len(texts) for texts in batch.texts] == [3] * 4
    assert {text for texts in batch.texts for text in texts} <= allowed


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_devices_share_one_batch(ranks):
    data = pairs([prepared(1), prepared(2)], batch_size=8)
    whole = data.train_batches()[3]
    parts = [data.train_batches(rank, ranks)[3] for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert part.tokens.equal(whole.tokens[rank::ranks])
        assert part.condition.equal(whole.condition[rank::ranks])


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_accumulation_rounds_share_one_batch(ranks):
    sources = [prepared(1), prepared(2)]
    whole = pairs(sources, batch_size=8).train_batches()[3]
    data = pairs(sources, batch_size=4, parts=2)
    parts = [[data.train_batches(r, ranks)[k] for r in range(ranks)] for k in (6, 7)]
    for part, devices in enumerate(parts):
        for rank, mine in enumerate(devices):
            places = slice(4 * part + rank, 4 * part + 4, ranks)
            assert mine.tokens.equal(whole.tokens[places])
            assert mine.condition.equal(whole.condition[places])


def test_an_epoch_is_whole_steps():
    data = pairs([prepared(1, checkpoints=7)], batch_size=2, parts=3)
    assert data.plan.per_epoch == 2  # of 6 pairs


def test_the_walk_goes_from_the_trainers_step_to_the_last():
    data = pairs([prepared(1)], batch_size=2, parts=3)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=2, max_steps=4)
    assert list(data.train_dataloader().sampler) == list(range(6, 12))


def test_devices_that_cannot_share_a_batch_equally_are_refused():
    data = pairs([prepared(1)], batch_size=3)
    data.check_shared(3)
    with pytest.raises(UsageError, match=r"data\.batch_size 3 must be a multiple of 2 devices"):
        data.check_shared(2)


@given(st.integers(0, 20), st.integers(1, 25), st.text(max_size=5))
def test_drawn_texts_are_different_ones(count, wanted, draw):
    drawn = draw_texts(range(count), wanted, draw)
    assert len(drawn) == len(set(drawn)) == min(count, wanted)
    assert drawn == draw_texts(range(count), wanted, draw)
