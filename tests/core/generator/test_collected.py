import copy
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loragen.core.adapter.layout import Layout
from loragen.core.errors import DataError
from loragen.core.generator import collected
from loragen.core.generator.collected import Collected
from loragen.core.generator.network import Network, Normalization, new_network
from loragen.core.protocols import SupportSet

DATASETS, DIM = 5, 6
LAYOUT = Layout.of(
    {
        f"base_model.model.model.layers.{layer}.q_proj.{matrix}.weight": torch.empty(shape)
        for layer in range(2)
        for matrix, shape in (("lora_A", (2, 12)), ("lora_B", (10, 2)))
    },
    token_dim=8,
)


def adapters(seed=0):
    """Of five datasets, around a common one, as trainings that start alike leave them."""
    chance = np.random.default_rng(seed)
    shape = (LAYOUT.tokens, LAYOUT.token_dim)
    common = chance.normal(size=shape)
    return [
        np.float32(common + 0.1 * chance.normal(size=shape)) * LAYOUT.mask().numpy()
        for _ in range(DATASETS)
    ]


def fitted(values):
    return Normalization.fit(LAYOUT, [value[None] for value in values]).without_mean()


@pytest.fixture
def ours():
    values = adapters()
    return Collected(values, fitted(values).scale)


def test_what_is_written_is_read_again(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(collected, "CHUNK", 30)  # in pieces
    ours.save(tmp_path / "deep" / "g.safetensors")
    file = tmp_path / "deep" / "g.safetensors"
    again = Collected.load(file, ours.scale, ours.fingerprint)
    assert again.shape == ours.shape == (DATASETS, LAYOUT.tokens, 8)
    for tokens in (slice(0, 3), slice(2, None)):
        assert again.read([3, 0], tokens).equal(ours.read([3, 0], tokens))
    assert load_file(file)["adapters"].numpy().tolist() == np.stack(ours.adapters).tolist()
    assert again.mean().allclose(ours.mean())
    assert again.fingerprint == ours.fingerprint


def test_adapters_are_normalised_by_their_scale_alone(ours):
    read = ours.read([1], slice(0, 4))[0] * ours.scale[:4]
    assert read.numpy().tolist() == ours.adapters[1][:4].tolist()  # to the bit


def test_the_same_adapters_are_not_written_again(ours, tmp_path):
    file = tmp_path / "g.safetensors"
    ours.save(file)
    before = file.stat().st_ino
    ours.save(file)
    assert file.stat().st_ino == before
    other = Collected(adapters(seed=1), ours.scale)
    other.save(file)
    assert file.stat().st_ino != before


def test_a_file_that_has_not_changed_is_not_read_at_every_checkpoint(ours, tmp_path, monkeypatch):
    file = tmp_path / "g.safetensors"
    ours.save(file)
    read = []
    pieces = collected._pieces
    monkeypatch.setattr(collected, "_pieces", lambda one: read.append(1) or pieces(one))
    ours.save(file)
    assert not read
    other = Collected(adapters(), ours.scale)  # of a resumed training
    other.save(file)
    assert len(read) == DATASETS  # it is checked once
    other.save(file)
    assert len(read) == DATASETS
    damaged = bytearray(file.read_bytes())
    damaged[-40] ^= 1
    file.write_bytes(damaged)
    os.utime(file, (0, 0))  # the clock of a file system may be coarse
    ours.save(file)  # writes it again
    Collected.load(file, ours.scale, ours.fingerprint).mean()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.unlink(), "missing: no g.safetensors beside it"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "not a file of collected"),
        (lambda file: file.write_text("no"), "not a file of collected"),
        (
            lambda file: Collected(adapters(seed=1), torch.ones(1)).save(file),
            "the adapters of another generator",
        ),
    ],
    ids=["missing", "cut off", "text", "another's"],
)
def test_a_file_that_does_not_belong_is_refused(ours, tmp_path, change, problem):
    file = tmp_path / "g.safetensors"
    ours.save(file)
    change(file)
    with pytest.raises(DataError, match=problem):
        Collected.load(file, ours.scale, ours.fingerprint)


def test_a_copy_of_a_network_reads_the_same_adapters(ours):
    assert copy.deepcopy(ours) is ours


@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        ("mixture", {"hidden_dim": 16, "share": "adapter"}),
        ("mixture", {"hidden_dim": 16, "share": "cell"}),
        ("neighbours", {"temperature": 1.0}),
    ],
)
def test_a_prediction_does_not_depend_on_the_adapter_that_it_leaves_out(decoder, options):
    """Not a bit: neither through a mean nor through a scale."""
    chance = torch.Generator().manual_seed(0)
    condition, known = (torch.randn(n, 3, 1, DIM, generator=chance) for n in (1, DATASETS))
    mask, known_mask = (torch.ones(n, 3, 1, dtype=torch.bool) for n in (1, DATASETS))
    left_out = torch.tensor([[False, False, True, False, False]])

    def predicted(values, left_out):
        normalization = fitted(values)
        torch.manual_seed(1)
        network: Network = new_network(decoder, options, DIM, LAYOUT).eval()
        network.decoder.use_adapters(Collected(values, normalization.scale))
        support = torch.arange(DATASETS)
        made = network.predict(condition, mask, SupportSet(known, known_mask, support, left_out))
        return normalization.denormalize(made).detach()

    values, noisy = adapters(), adapters()
    noisy[2] = np.float32(50 * np.random.default_rng(9).normal(size=noisy[2].shape))
    assert not fitted(values).scale.equal(fitted(noisy).scale)
    assert predicted(noisy, left_out).equal(predicted(values, left_out))
    nothing = torch.zeros_like(left_out)
    assert not predicted(noisy, nothing).allclose(predicted(values, nothing))
