import pytest
import torch

from loragen.core.analysis.series import analyze


def between(one, other):
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def test_collections_are_compared_whatever_their_rank(folder, walk, flat):
    """ΔW has the same size whether its factors have two components or three."""
    walks = walk(4), walk(6, rank=3, seed=1)
    paths = [folder(steps, name) for steps, name in zip(walks, "ab", strict=True)]
    (found,) = analyze(paths).comparisons
    dense = [torch.stack([flat(tensors) for tensors in steps]) for steps in walks]
    assert found.collections == ["a", "b"]
    assert found.cosine_last[0][1] == pytest.approx(between(dense[0][-1], dense[1][-1]))
    assert found.cosine_mean[0][1] == pytest.approx(between(dense[0].mean(0), dense[1].mean(0)))
    assert [len(files) for files in found.checkpoints] == [4, 6]
    assert len(found.pca.coordinates) == 10


def test_others_are_told_apart(folder, walk):
    nan = {key: torch.full_like(t, float("nan")) for key, t in walk(1)[0].items()}
    collections = {"a": walk(2), "b": walk(2, seed=1), "odd": walk(2, kinds=("k_proj",))}
    paths = [folder(steps, name) for name, steps in {**collections, "broken": [nan]}.items()]
    analysis = analyze(paths)
    assert [found.collections for found in analysis.comparisons] == [["a", "b"]]
    assert analysis.not_compared == [
        "broken: no checkpoint is finite",
        "odd: other modules or sizes than the others",
    ]


def test_equal_files_are_named(folder, walk):
    first, second = walk(2)
    one, other = folder([first, second, first], "a"), folder([second], "b")
    twins = [found.files for found in analyze([one, other]).twins]
    assert twins == [
        [str(one / f"checkpoint-step-00{step}.ckpt") for step in (1, 3)],
        [str(one / "checkpoint-step-002.ckpt"), str(other / "checkpoint-step-001.ckpt")],
    ]


def test_equal_values_of_another_type_are_no_twins(folder, walk):
    (tensors,) = walk(1)
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    assert analyze([folder([tensors, wide])]).twins == []
