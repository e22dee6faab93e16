import pytest
import torch
from torch import nn

from loragen.testing import check_encoder

from .stand_ins import Options, variant


class Encoder(nn.Module):
    Config = Options
    dim = 4
    fingerprint = "f"
    frozen = True

    def __init__(self, config):
        super().__init__()

    def forward(self, texts):
        values = [[[float(len(text)), 1.0, 2.0, 3.0]] for text in texts]
        return torch.tensor(values), torch.ones(len(texts), 1, dtype=torch.bool)


def test_a_correct_encoder_passes():
    check_encoder(Encoder)


def dependent(self, texts):
    embeddings, mask = Encoder.forward(self, texts)
    return embeddings + len(texts), mask


def inference(self, texts):
    with torch.inference_mode():
        return Encoder.forward(self, texts)


def changed(part, change):
    def forward(self, texts):
        answer = list(Encoder.forward(self, texts))
        answer[part] = change(answer[part])
        return tuple(answer)

    return forward


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"forward": dependent}, "beside other texts"),
        ({"forward": inference}, "inference tensors"),
        ({"forward": changed(0, lambda e: e[:, 0])}, "must give"),
        ({"forward": changed(0, torch.Tensor.long)}, "torch.int64 embeddings"),
        ({"forward": changed(1, torch.Tensor.float)}, "must be boolean"),
        ({"forward": changed(1, torch.zeros_like)}, "masks a whole text"),
        ({"dim": 5}, "dim is 5"),
        ({"fingerprint": 7}, "fingerprint must be"),
        ({"fingerprint": property(lambda self: str(id(self)))}, "equal fingerprints"),
        ({"frozen": "no"}, "frozen must be True or False"),
        ({"frozen": False}, "frozen is False, and 0 parameters require gradients"),
    ],
)
def test_a_broken_contract_is_named(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_encoder(variant(Encoder, **attributes))
