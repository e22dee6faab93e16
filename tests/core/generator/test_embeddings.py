"""Embeddings on disk are those that the encoder gives, whatever comes at once."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loragen.core.generator import embeddings as module
from loragen.core.generator.embeddings import write_embeddings


class Letters:
    """A position for every letter of a text, at its code; counts the texts that come at once."""

    def __init__(self):
        self.most = 0

    def __call__(self, texts):
        self.most = max(self.most, len(texts))
        sizes = torch.tensor([len(text) for text in texts])
        mask = torch.arange(max(sizes)) < sizes[:, None]
        embeddings = torch.zeros(*mask.shape, 1, dtype=torch.float64)
        embeddings[mask] = torch.tensor([[float(ord(x))] for text in texts for x in text]).double()
        return embeddings, mask


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=12),
    at_once=st.integers(1, 5),
)
def test_parts_of_any_width_make_the_whole(tmp_path, texts, at_once):
    encoder, files = Letters(), (tmp_path / "cache" / "e.npy", tmp_path / "cache" / "m.npy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TEXTS_AT_ONCE", at_once)
        write_embeddings(encoder, texts, *files)
    whole, mask = (np.load(file, mmap_mode="r") for file in files)
    wanted, there = Letters()(texts)
    assert (whole.dtype, mask.dtype) == (np.float32, bool)
    assert np.array_equal(whole, wanted.float().numpy())
    assert np.array_equal(mask, there.numpy())
    assert encoder.most <= at_once
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == ["e.npy", "m.npy"]


def test_an_encoder_that_fails_leaves_nothing(tmp_path):
    def fail(_):
        raise RuntimeError("on fire")

    with pytest.raises(RuntimeError):
        write_embeddings(fail, ["a"], tmp_path / "e.npy", tmp_path / "m.npy")
    assert list(tmp_path.iterdir()) == []
