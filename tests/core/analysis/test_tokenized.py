import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.analysis.tokenized import bits_changed, largest_error, tokenized
from loragen.core.errors import UsageError


def test_the_kinds_add_up_to_the_whole(folder, drifting):
    report = tokenized(folder(drifting(2)), token_dim=4, max_tokens=10)
    assert report.file.endswith("checkpoint-step-002.ckpt")
    assert (report.tensors, report.values) == (8, 4 * (2 * 6 + 5 * 2))
    kind = {(kind.module, kind.matrix): kind for kind in report.kinds}["q_proj", "lora_B"]
    assert (kind.tensors, kind.layers, kind.shape, kind.tokens_each) == (2, 2, [5, 2], 3)
    assert report.tokens == sum(kind.tensors * kind.tokens_each for kind in report.kinds) == 24
    assert report.fill == pytest.approx(88 / 96)
    assert not report.fits
    assert (report.bits_changed, report.largest_error) == (0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_round_trip_is_measured_bit_for_bit(folder, drifting, dtype):
    (tensors,) = drifting(1)
    first, second, *_ = tensors
    tensors[first][0, 0], tensors[second][0, 0] = float("nan"), -0.0
    report = tokenized(folder([{k: t.to(dtype) for k, t in tensors.items()}]), 4, "auto")
    assert report.fits
    assert (report.bits_changed, report.largest_error) == (0, 0.0)


@given(st.integers(0, 20), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_every_change_is_seen(changes, dtype):
    values = torch.ones(20, dtype=dtype)
    one = values.clone().view(4, 5).T  # not contiguous
    values[:changes] += 0.5
    other = values.view(4, 5).T
    assert bits_changed(one, other) == changes
    assert largest_error(one, other) == (0.5 if changes else 0.0)


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="no checkpoints or adapters there"):
        tokenized(tmp_path, 4, "auto")
