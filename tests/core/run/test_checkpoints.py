import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file

from loragen.core.adapter.files import read_adapter
from loragen.core.errors import DataError, UsageError
from loragen.core.run.checkpoints import (
    AtomicCheckpointIO,
    load_adapter,
    read_checkpointed_adapter,
)
from loragen.core.run.directory import checkpoint_name, find_checkpoints


@pytest.fixture
def run(collection):
    return collection.runs["colors"]


@pytest.fixture
def last(run):
    return run / "checkpoints" / checkpoint_name(8)


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def test_every_container_gives_the_same_tensors(run, last, tmp_path):
    wanted = read_adapter(run / "adapter").tensors
    assert len(wanted) == 28
    save_file(wanted, tmp_path / "a.safetensors")
    torch.save(wanted, tmp_path / "a.pt")
    torch.save({"state_dict": {f"model.{k}": v for k, v in wanted.items()}}, tmp_path / "b.pt")
    live = {k.replace(".weight", ".default.weight"): v for k, v in wanted.items()}
    torch.save(live, tmp_path / "c.pt")
    save_file(live, tmp_path / "c.safetensors")
    for path in (last, run / "adapter", *sorted(tmp_path.iterdir())):
        assert equal(load_adapter(path).tensors, wanted), path


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_runs_code_is_refused(tmp_path, zipped):
    file, mark = tmp_path / "bad.ckpt", tmp_path / "mark"
    document = {"state_dict": {"lora_A": Malicious(mark)}}
    if zipped:
        torch.save(document, file)
    else:
        file.write_bytes(pickle.dumps(document))
    with pytest.raises(DataError, match=r"bad\.ckpt: .*safely") as error:
        load_adapter(file)
    assert not mark.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_broken_file_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name) as error:
        load_adapter(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_file_that_was_cut_off_is_one_line(tmp_path, last):
    data = last.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut\.ckpt"):
        load_adapter(tmp_path / "cut.ckpt")


def test_a_file_without_an_adapter_is_refused(tmp_path):
    torch.save({"model.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "full.pt")
    save_file({"model.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "full.safetensors")
    for file in tmp_path.iterdir():
        with pytest.raises(DataError, match="no LoRA tensors in it"):
            load_adapter(file)


def test_a_file_that_is_no_dictionary_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(DataError, match="expected a dictionary, found list"):
        load_adapter(tmp_path / "list.pt")


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such checkpoint"):
        load_adapter(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    "part", [".", "adapter", "checkpoints", "checkpoints/checkpoint-step-008.ckpt"]
)
def test_an_adapter_from_a_run_its_folder_or_a_checkpoint_of_it(run, part):
    adapter = read_checkpointed_adapter(run / part)
    wanted = read_adapter(run / "adapter")
    assert adapter.config == wanted.config
    assert equal(adapter.tensors, wanted.tensors)


def test_a_lone_checkpoint_does_not_know_its_adapter(last, tmp_path):
    file = shutil.copy(last, tmp_path / "lone.ckpt")
    with pytest.raises(UsageError, match=r"manifest\.json"):
        read_checkpointed_adapter(tmp_path / "lone.ckpt")
    assert load_adapter(file).tensors
    with pytest.raises(UsageError, match="no such adapter or checkpoint"):
        read_checkpointed_adapter(tmp_path / "none")


def test_checkpoints_are_found_in_a_run_its_folder_and_a_folder_of_adapters(run, last, tmp_path):
    steps = [checkpoint_name(step) for step in (5, 6, 7, 8)]
    assert [file.name for file in find_checkpoints(run)] == steps
    assert [file.name for file in find_checkpoints(run / "checkpoints")] == steps
    assert find_checkpoints(last) == [last]
    assert find_checkpoints(run / "adapter") == [run / "adapter"]
    names = ["step-2", "step-10", "step-100"]
    for name in names:
        shutil.copytree(run / "adapter", tmp_path / name)
    assert [folder.name for folder in find_checkpoints(tmp_path)] == names


def test_no_checkpoints_is_a_usage_error(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="no checkpoints or adapters there"):
            find_checkpoints(path)


def test_saving_that_fails_leaves_nothing(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        AtomicCheckpointIO().save_checkpoint({"x": lambda: None}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []
