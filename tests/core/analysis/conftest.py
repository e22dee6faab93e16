"""Small adapters, written as lone checkpoints."""

import pytest
import torch


@pytest.fixture
def folder(tmp_path):
    """`folder([{...}, ...])` writes a lone checkpoint for each set of tensors."""

    def write(adapters, name="lone"):
        return written(tmp_path / name, adapters)

    return write


@pytest.fixture
def drifting():
    """`drifting(5)`: so many adapters of two layers, each a small step from the previous one."""
    return drifting_adapters


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two series of checkpoints, which no test changes."""
    home = tmp_path_factory.mktemp("two")
    names = ("first <b>&$x_1$", "second")
    return [
        written(home / name, drifting_adapters(3, seed=seed)) for seed, name in enumerate(names)
    ]


@pytest.fixture
def flat():
    """ΔW of an adapter, all modules as one long vector, the dense way."""

    def vector(tensors):
        keys = [key for key in tensors if "lora_A" in key]
        pairs = [(tensors[key.replace("lora_A", "lora_B")], tensors[key]) for key in keys]
        return torch.cat([(b.double() @ a.double()).flatten() for b, a in pairs])

    return vector


def written(directory, adapters):
    directory.mkdir()
    for step, tensors in enumerate(adapters, start=1):
        torch.save(tensors, directory / f"checkpoint-step-{step:03d}.ckpt")
    return directory


def drifting_adapters(count, rank=2, seed=0, kinds=("q_proj", "up_proj")):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        f"base_model.model.layers.{layer}.{kind}.lora_{matrix}.weight": size
        for layer in range(2)
        for kind in kinds
        for matrix, size in (("A", (rank, 6)), ("B", (5, rank)))
    }
    tensors = {key: torch.randn(size, generator=generator) for key, size in sizes.items()}
    steps = []
    for _ in range(count):
        tensors = {
            key: t + 0.1 * torch.randn(t.shape, generator=generator) for key, t in tensors.items()
        }
        steps.append(tensors)
    return steps
