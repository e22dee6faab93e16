import numpy as np
import pytest
import torch
from torch import nn

from loragen.core.generator.network import Normalization
from loragen.core.learning.arrays import AdapterSamples, SourceArrays, conditions, embedded

PLAIN = Normalization(torch.zeros(5, 2), torch.ones(5, 1))


class Encoder(nn.Module):
    """A text has a position for each of its letters, all of them its length."""

    def __init__(self):
        super().__init__()
        self.weight, self.texts = nn.Parameter(torch.ones(2)), []

    def forward(self, texts):
        self.texts += texts
        sizes = torch.tensor([len(text) for text in texts])
        mask = torch.arange(sizes.max()) < sizes[:, None]
        return mask[..., None] * sizes[:, None, None] * self.weight, mask


@pytest.fixture
def encoder():
    return Encoder()


def test_conditions_hold_their_own_texts_padded_under_the_mask(encoder):
    embeddings, mask = conditions(encoder, [["a", "bbb"], ["cc"]])
    assert embeddings.shape == (2, 2, 3, 2)
    assert mask.sum(-1).tolist() == [[1, 3], [2, 0]]
    assert embeddings[..., 0][mask].tolist() == [1, 3, 3, 3, 2, 2]
    embeddings.sum().backward()
    assert encoder.weight.grad.tolist() == [14, 14]  # 1 + 3 x 3 + 2 x 2


def test_a_text_of_several_conditions_is_encoded_once(encoder):
    conditions(encoder, [["a", "b"], ["b", "a"], ["b", "c"]])
    assert encoder.texts == ["a", "b", "c"]


def test_what_is_embedded_already_is_not_embedded_again(encoder):
    tokens, fixed = np.zeros((1, 1, 1), np.float32), np.ones((3, 1, 2), np.float32)
    nothing, mask = np.zeros((2, 0, 2), np.float32), np.ones((3, 1), bool)
    frozen = SourceArrays("frozen", tokens, fixed, mask, train_texts=range(3))
    trained = SourceArrays("trained", tokens, nothing, mask[:2, :0], range(2), texts=["a", "bb"])
    found = {name: (arrays, valid) for name, arrays, valid in embedded(encoder, [frozen, trained])}
    assert found["frozen"][0] is fixed
    assert found["trained"][0].tolist() == [[[1, 1], [0, 0]], [[2, 2], [2, 2]]]
    assert found["trained"][1].tolist() == [[True, False], [True, True]]
    assert encoder.texts == ["a", "bb"]


def checkpoints_of(count, value):
    return np.full((count, 5, 2), value, dtype=np.float32)


def test_every_dataset_has_equally_many():
    samples = AdapterSamples([checkpoints_of(50, 1.0), checkpoints_of(50, 2.0)], PLAIN)
    assert samples.shape == (64, 5, 2)
    assert samples[1:3].shape == (64, 2, 2)
    assert samples[:][:, 0, 0].tolist() == [1.0] * 32 + [2.0] * 32


def test_many_datasets_have_one_each():
    samples = AdapterSamples([checkpoints_of(50, float(i)) for i in range(70)], PLAIN)
    assert samples.shape == (70, 5, 2)


def test_few_checkpoints_are_samples_themselves():
    checkpoints = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((1, 5, 2), np.float32)
    samples = AdapterSamples([checkpoints], PLAIN)
    assert samples[:][:, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_they_are_normalised():
    normalization = Normalization(torch.full((5, 2), 3.0), torch.full((5, 1), 2.0))
    samples = AdapterSamples([checkpoints_of(4, 7.0)], normalization)
    assert samples[2:4].unique().tolist() == [2.0]


def test_what_all_checkpoints_share_is_the_same_in_all_samples():
    """A frozen A, whose values are no round numbers; samples are of different numbers of them."""
    shared = np.random.default_rng(0).normal(size=(1, 4, 2)).astype(np.float32)
    collections = [np.repeat(shared, count, axis=0) for count in [8] * 20 + [5, 7]]
    samples = AdapterSamples(collections, Normalization(torch.zeros(4, 2), torch.ones(4, 1)))[0:4]
    assert samples.eq(torch.from_numpy(shared)).all()


@pytest.mark.parametrize("checkpoints", [1, 65, 1000])
def test_few_are_read_whatever_the_number(checkpoints):
    read = set()

    class Counted(np.ndarray):
        def __getitem__(self, key):
            if isinstance(key, tuple):
                read.add(int(key[0]))
            return super().__getitem__(key)

    samples = AdapterSamples([checkpoints_of(checkpoints, 1.0).view(Counted)], PLAIN)
    assert samples.shape[0] == min(64, checkpoints)
    _ = samples[0:1]
    assert len(read) <= 4 * 64
    assert checkpoints - 1 in read
