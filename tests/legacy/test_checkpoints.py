import pytest
import torch
from safetensors.torch import save_file

from loragen.core.errors import DataError, UsageError
from loragen.legacy.checkpoints import read_legacy_checkpoint, scan_checkpoints
from loragen.legacy.experiments import settings_by_synonyms

from .runs import only_run


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.q_proj.lora_A.default.weight",
        "model.base_model.model.model.layers.0.q_proj.lora_A.default.weight",
        "module.base_model.model.model.layers.0.q_proj.lora_A.mine.weight",
        "_orig_mod.module.base_model.model.model.layers.0.q_proj.lora_A.default",
        "model.layers.0.q_proj.lora_A",
        "model.model.layers.0.q_proj.lora_A.weight",
        "layers.0.q_proj.lora_A",
    ],
)
def test_keys_become_those_of_peft(tmp_path, key):
    torch.save({"model": {key: torch.ones(2, 4), "other": torch.ones(1)}}, tmp_path / "a.pt")
    save_file({key: torch.ones(2, 4), "other": torch.ones(1)}, tmp_path / "a.safetensors")
    for file in tmp_path.iterdir():
        (found,) = read_legacy_checkpoint(file).tensors
        assert found == "base_model.model.model.layers.0.q_proj.lora_A.weight"


@pytest.mark.parametrize("key", ["a.lora_embedding_A", "a.lora_magnitude_vector", "lora_A"])
def test_tensors_of_other_methods_are_refused(tmp_path, key):
    torch.save({key: torch.ones(2, 4)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=f"a.pt: {key} "):
        read_legacy_checkpoint(tmp_path / "a.pt")


def test_the_adapter_named_default_is_read_of_several(tmp_path):
    keys = [f"m.lora_A.{name}.weight" for name in ("default", "other")]
    torch.save({key: torch.full((2, 4), float(i)) for i, key in enumerate(keys)}, tmp_path / "a.pt")
    (tensor,) = read_legacy_checkpoint(tmp_path / "a.pt").tensors.values()
    assert not tensor.any()
    torch.save({f"m.lora_A.{name}": torch.ones(2, 4) for name in "xy"}, tmp_path / "b.pt")
    with pytest.raises(DataError, match=r"b\.pt: .*'default': x, y"):
        read_legacy_checkpoint(tmp_path / "b.pt")


def test_settings_and_step_saved_with_the_weights(tmp_path):
    document = {
        "model": {"m.lora_A": torch.ones(2, 4)},
        "optimizer": {"param_groups": [{"weight_decay": 0.01}]},
        "config": {"training": {"batch_size": 16}},
        "lora_config": {"alpha": 32},
        "step": torch.tensor(7),
    }
    torch.save(document, tmp_path / "a.pt")
    checkpoint = read_legacy_checkpoint(tmp_path / "a.pt")
    assert checkpoint.step == 7
    found = settings_by_synonyms(checkpoint.settings, "a.pt")
    assert {key: value for key, (value, _) in found.items()} == {
        "lora.alpha": 32,
        "training.batch_size": 16,
        "training.weight_decay": 0.01,
    }


def test_a_broken_optimizer_beside_the_weights_is_ignored(tmp_path):
    save_file({"m.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "optimizer.pt").write_bytes(b"broken")
    assert read_legacy_checkpoint(tmp_path).optimizer is None


def test_a_broken_safetensors_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"a\.safetensors: "):
        read_legacy_checkpoint(tmp_path / "a.safetensors")


def test_a_model_in_shards(tmp_path):
    for index, matrix in enumerate("AB", 1):
        name = f"model-0000{index}-of-00002.safetensors"
        save_file({f"m.lora_{matrix}.weight": torch.ones(2, 2)}, tmp_path / name)
    assert len(read_legacy_checkpoint(tmp_path).tensors) == 2


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for index in (1, 2):
        name = f"model-0000{index}-of-00002.safetensors"
        save_file({"m.lora_A.weight": torch.full((2, 2), float(index))}, tmp_path / name)
    with pytest.raises(DataError, match=r"00002-of-.*: m\.lora_A\.weight .*shard"):
        read_legacy_checkpoint(tmp_path)


def test_a_folder_of_several_checkpoints_is_refused(tmp_path):
    for step in (1, 2):
        save_file({"m.lora_A.weight": torch.ones(2, 2)}, tmp_path / f"model_{step}.safetensors")
    with pytest.raises(UsageError, match=f"{tmp_path}: 2 checkpoints.*model_1"):
        read_legacy_checkpoint(tmp_path)


def test_the_base_of_a_full_model_is_not_loaded(tmp_path):
    """Its 64 MiB stay in the file."""
    psutil = pytest.importorskip("psutil")
    big = {"base.weight": torch.ones(4096, 4096), "m.lora_A.weight": torch.ones(2, 4)}
    torch.save({"model_state_dict": big}, tmp_path / "full.pt")
    save_file(big, tmp_path / "full.safetensors")
    del big
    for file in ("full.pt", "full.safetensors"):
        before = psutil.Process().memory_info().rss
        kept = read_legacy_checkpoint(tmp_path / file)
        assert psutil.Process().memory_info().rss - before < 16 * 2**20
        assert kept.tensors["base_model.model.m.lora_A.weight"].untyped_storage().nbytes() == 32


class TestScan:
    def write(self, folder, names, value=1.0):
        folder.mkdir(exist_ok=True)
        for name in names:
            torch.save({"m.lora_A": torch.full((2, 4), value)}, folder / name)
        return only_run(folder)

    @pytest.mark.parametrize(
        "name, recorded, step",
        [("step_080.pt", 79, 80), ("checkpoint-80.pt", 79, 79), ("80.pt", None, 80)],
    )
    def test_a_step_in_the_name_counts_more_than_a_recorded_one(
        self, tmp_path, name, recorded, step
    ):
        document = {"model": {"m.lora_A": torch.ones(2, 4)}, "step": recorded}
        torch.save(document, tmp_path / name)
        (found,) = scan_checkpoints(only_run(tmp_path), None).usable
        assert found.step == step

    def test_the_same_weights_twice_are_one_checkpoint(self, tmp_path):
        run = self.write(tmp_path / "run", ["step_1.pt", "final_step_1.pt"])
        scan = scan_checkpoints(run, None)
        assert [one.step for one in scan.usable] == [1]
        assert scan.problems == []

    def test_other_weights_of_the_same_step_are_a_problem(self, tmp_path):
        self.write(tmp_path / "run", ["final_step_1.pt"])
        scan = scan_checkpoints(self.write(tmp_path / "run", ["step_1.pt"], 2.0), None)
        (problem,) = scan.problems
        assert problem.startswith(f"{tmp_path / 'run' / 'step_1.pt'}: step 1 again")

    def test_steps_count_from_one(self, tmp_path):
        scan = scan_checkpoints(self.write(tmp_path / "run", ["step_0.pt", "step_1.pt"]), None)
        (problem,) = scan.problems
        assert problem.startswith(f"{tmp_path / 'run' / 'step_0.pt'}: step 0")

    def test_a_checkpoint_without_a_step(self, tmp_path):
        with pytest.raises(DataError, match=r"lora\.pt: no step"):
            scan_checkpoints(self.write(tmp_path / "run", ["lora.pt"]), None)
