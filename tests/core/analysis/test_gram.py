import pytest
import torch

from loragen.core.analysis import gram as module
from loragen.core.analysis.gram import cosine, evenly, gram, sampled, trajectory
from loragen.core.run.directory import checkpoint_files


@pytest.fixture
def files(folder, walk):
    return checkpoint_files(folder(walk(7)))


@pytest.fixture
def dense(walk, flat):
    return torch.stack([flat(tensors) for tensors in walk(7)])


@pytest.mark.parametrize("held", [1, 2000, 2**30])  # bytes: files one by one, a few, all at once
def test_the_inner_products_are_those_of_the_dense_matrices(files, dense, held, monkeypatch):
    monkeypatch.setattr(module, "HELD_BYTES", held)
    assert torch.allclose(gram(files), dense @ dense.T, rtol=1e-12)


def test_the_cosine_is_none_for_a_zero():
    found = cosine(torch.tensor([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    assert found[0, :2].tolist() == [1.0, 0.5]
    assert found[2].isnan().all()


def test_the_trajectory_is_the_pca_of_the_dense_matrices(dense):
    found = trajectory(dense @ dense.T)
    centred = dense - dense.mean(0)
    values = torch.linalg.svdvals(centred)
    assert found.shares == pytest.approx((values**2 / (values**2).sum())[:3].tolist())
    points = torch.tensor(found.coordinates, dtype=torch.float64)
    assert torch.allclose(points.norm(dim=0), values[:3])
    assert torch.allclose(points.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert (points[-1] >= points[0]).all()  # from the first towards the last


def test_two_checkpoints_have_one_axis(dense):
    two = dense[:2]
    found = trajectory(two @ two.T)
    assert found.shares == pytest.approx([1.0])
    (first,), (last,) = found.coordinates
    assert last - first == pytest.approx(float((two[1] - two[0]).norm()))


def test_equal_checkpoints_have_no_axes(dense):
    same = dense[:1].repeat(3, 1)
    assert trajectory(same @ same.T) is None


def test_a_sample_is_evenly_spaced_with_both_ends(files):
    assert evenly(files, 7) == files
    assert evenly(files, 3) == [files[0], files[3], files[6]]
    assert evenly(files, 1) == [files[-1]]
    assert sampled(files[:1]) is None
    assert sampled(files).checkpoints == [file.name for file in files]


def test_of_many_checkpoints_only_a_sample_is_compared(files, monkeypatch):
    monkeypatch.setattr(module, "MOST_CHECKPOINTS", 4)
    assert sampled(files).checkpoints == [files[i].name for i in (0, 2, 4, 6)]
