import numpy as np
import pytest
import torch

from loragen.core.generator.network import Normalization
from loragen.core.learning.arrays import CollectionSamples

PLAIN = Normalization(torch.zeros(5, 2), torch.ones(5, 1))


def collection(checkpoints, value):
    return np.full((checkpoints, 5, 2), value, dtype=np.float32)


def test_every_dataset_has_equally_many():
    samples = CollectionSamples([collection(50, 1.0), collection(50, 2.0)], PLAIN)
    assert samples.shape == (64, 5, 2)
    assert samples[1:3].shape == (64, 2, 2)
    assert samples[:][:, 0, 0].tolist() == [1.0] * 32 + [2.0] * 32


def test_many_datasets_have_one_each():
    samples = CollectionSamples([collection(50, float(i)) for i in range(70)], PLAIN)
    assert samples.shape == (70, 5, 2)


def test_few_checkpoints_are_samples_themselves():
    checkpoints = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((1, 5, 2), np.float32)
    samples = CollectionSamples([checkpoints], PLAIN)
    assert samples[:][:, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_they_are_normalised():
    normalization = Normalization(torch.full((5, 2), 3.0), torch.full((5, 1), 2.0))
    samples = CollectionSamples([collection(4, 7.0)], normalization)
    assert samples[2:4].unique().tolist() == [2.0]


@pytest.mark.parametrize("checkpoints", [1, 65, 1000])
def test_few_are_read_whatever_the_number(checkpoints):
    read = set()

    class Counted(np.ndarray):
        def __getitem__(self, key):
            if isinstance(key, tuple):
                read.add(int(key[0]))
            return super().__getitem__(key)

    samples = CollectionSamples([collection(checkpoints, 1.0).view(Counted)], PLAIN)
    assert samples.shape[0] == min(64, checkpoints)
    _ = samples[0:1]
    assert len(read) <= 4 * 64
    assert checkpoints - 1 in read
