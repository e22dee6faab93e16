import pytest
import torch

from loragen.core.adapter.files import read_adapter, write_adapter
from loragen.core.analysis.checkpoints import find_series, read_checkpoint
from loragen.core.errors import UsageError


def names(*paths):
    return [found.name for found in find_series(paths)]


def test_a_run_is_one_collection_and_a_folder_of_runs_one_each(collection):
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
    assert read_checkpoint(weights).config == adapter.config  # it stands beside the file


def test_no_two_collections_have_one_name(collection):
    adapters = [run / "adapter" for run in collection.runs.values()]
    assert names(*adapters) == [str(adapter) for adapter in adapters]


@pytest.mark.parametrize("path", ["", "empty", "none"])
def test_nothing_there(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no checkpoints or adapters there"):
        find_series([tmp_path / path])


def test_the_scaling_is_in_the_delta(collection):
    checkpoint = read_checkpoint(collection.runs["colors"] / "adapter")
    a, b = checkpoint.deltas()["model.layers.0.self_attn.q_proj"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert torch.equal(a, checkpoint.tensors[key.format("A")])
    assert torch.equal(b, 2.0 * checkpoint.tensors[key.format("B")].double())
