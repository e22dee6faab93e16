import numpy as np
import pytest
import torch
from torch import nn

from loragen.core.learning.arrays import SourceArrays, conditions, embedded


class Encoder(nn.Module):
    """A text has a position for each of its letters, all of them its length."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.ones(2)), []

    def forward(self, texts):
        self.asked += texts
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
    assert encoder.asked == ["a", "b", "c"]


def test_what_is_embedded_already_is_not_embedded_again(encoder):
    tokens, fixed = np.zeros((1, 1, 1), np.float32), np.ones((3, 1, 2), np.float32)
    nothing, mask = np.zeros((2, 0, 2), np.float32), np.ones((3, 1), bool)
    frozen = SourceArrays("frozen", tokens, fixed, mask)
    trained = SourceArrays("trained", tokens, nothing, mask[:2, :0], texts=["a", "bb"])
    found = {name: (arrays, valid) for name, arrays, valid in embedded(encoder, [frozen, trained])}
    assert found["frozen"][0] is fixed
    assert found["trained"][0].tolist() == [[[1, 1], [0, 0]], [[2, 2], [2, 2]]]
    assert found["trained"][1].tolist() == [[True, False], [True, True]]
    assert encoder.asked == ["a", "bb"]
