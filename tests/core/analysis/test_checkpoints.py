"""Checkpoints: found, read, and compared by their inner products."""

import pytest
import torch

from loragen.core.adapter.files import read_adapter, write_adapter
from loragen.core.analysis import checkpoints as module
from loragen.core.analysis.checkpoints import (
    CheckpointSeries,
    cosines,
    evenly_spaced,
    find_series,
    inner_product_matrix,
    principal_components,
)
from loragen.core.errors import UsageError


def names(*paths):
    return [found.name for found in find_series(paths)]


def test_a_run_is_one_series_and_a_folder_of_runs_one_each(collection):
    run = collection.runs["colors"]
    assert names(run) == names(run / "checkpoints") == [run.name]
    assert names(run.parent) == sorted(run.name for run in collection.runs.values())


def test_adapters_and_files(collection, tmp_path):
    adapter = read_adapter(collection.runs["colors"] / "adapter")
    for number in (1, 2, 10):
        write_adapter(tmp_path / f"step-{number}", adapter, "")
    (whole,) = find_series([tmp_path])
    assert [file.name for file in whole.files] == ["step-1", "step-2", "step-10"]
    assert names(tmp_path / "step-1") == ["step-1"]
    weights = tmp_path / "step-1" / "adapter_model.safetensors"
    (single,) = find_series([weights])
    assert single.read(weights).config == adapter.config  # from the file beside it


def test_no_two_series_have_one_name(collection):
    adapters = [run / "adapter" for run in collection.runs.values()]
    assert names(*adapters) == [str(adapter) for adapter in adapters]


@pytest.mark.parametrize("path", ["", "empty", "none"])
def test_nothing_there(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no checkpoints or adapters there"):
        find_series([tmp_path / path])


def test_the_scaling_is_in_the_delta(collection):
    adapter = collection.runs["colors"] / "adapter"
    checkpoint = CheckpointSeries("one", adapter, [adapter]).read(adapter)
    a, b = checkpoint.deltas()["model.layers.0.self_attn.q_proj"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert torch.equal(a, checkpoint.tensors[key.format("A")])
    assert torch.equal(b, 2.0 * checkpoint.tensors[key.format("B")].double())


@pytest.fixture
def series(folder, drifting):
    (found,) = find_series([folder(drifting(7))])
    return found


@pytest.fixture
def dense(drifting, flat):
    return torch.stack([flat(tensors) for tensors in drifting(7)])


@pytest.mark.parametrize("loaded", [1, 2000, 2**30])  # bytes: files one by one, a few, all at once
def test_the_inner_products_are_those_of_the_dense_matrices(series, dense, loaded, monkeypatch):
    monkeypatch.setattr(module, "LOADED_BYTES", loaded)
    found = inner_product_matrix([(series, file) for file in series.files])
    assert torch.allclose(found, dense @ dense.T, rtol=1e-12)


def test_the_cosine_is_none_for_a_zero():
    found = cosines(torch.tensor([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    assert found[0, :2].tolist() == [1.0, 0.5]
    assert found[2].isnan().all()


def test_the_principal_components_are_the_pca_of_the_dense_matrices(dense):
    found = principal_components(dense @ dense.T)
    centred = dense - dense.mean(0)
    values = torch.linalg.svdvals(centred)
    assert found.shares == pytest.approx((values**2 / (values**2).sum())[:3].tolist())
    points = torch.tensor(found.coordinates, dtype=torch.float64)
    assert torch.allclose(points.norm(dim=0), values[:3])
    assert torch.allclose(points.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert (points[-1] >= points[0]).all()  # from the first towards the last


def test_two_checkpoints_have_one_axis(dense):
    two = dense[:2]
    found = principal_components(two @ two.T)
    assert found.shares == pytest.approx([1.0])
    (first,), (last,) = found.coordinates
    assert last - first == pytest.approx(float((two[1] - two[0]).norm()))


def test_equal_checkpoints_have_no_axes(dense):
    same = dense[:1].repeat(3, 1)
    assert principal_components(same @ same.T) is None


def test_a_sample_is_evenly_spaced_with_both_ends(series):
    files = series.files
    assert evenly_spaced(files, 7) == files
    assert evenly_spaced(files, 3) == [files[0], files[3], files[6]]
    assert evenly_spaced(files, 1) == [files[-1]]
