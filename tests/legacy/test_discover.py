import shutil
from pathlib import Path

import pytest

from loragen.core.errors import UsageError
from loragen.legacy.discover import find_runs, step_in_name

from .finding import one_of

STEPS = [5, 6, 7, 8]


def test_all_runs_below_a_folder(legacy_run, tmp_path):
    wanted = [legacy_run(dataset="colors"), legacy_run(dataset="animals")]
    found = find_runs(tmp_path / "experiments")
    assert sorted(run.directory for run in found) == sorted(wanted)
    assert all(run.traditional and len(run.entries) == 4 for run in found)
    assert one_of(wanted[0] / "checkpoints").directory == wanted[0]


def test_a_stray_file_is_no_run(legacy_run, tmp_path, caplog):
    run = legacy_run()
    (tmp_path / "experiments" / "best.pt").touch()
    assert one_of(tmp_path / "experiments").directory == run
    assert "experiments: left out, for there are runs below: best.pt" in caplog.text


def test_numbered_files_are_a_run_beside_those_below(legacy_run, tmp_path):
    wanted = legacy_run()
    folder = tmp_path / "experiments"
    (folder / "step_5.pt").touch()
    (folder / "final").mkdir()
    (folder / "final" / "model.pt").touch()
    assert [run.directory for run in find_runs(folder)] == [folder, wanted]


def test_a_link_to_a_run_is_no_second_one(legacy_run):
    run = legacy_run()
    try:
        (run.parent / "latest").symlink_to(run, target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    assert one_of(run.parent).directory == run
    assert one_of(run.parent / "latest") == one_of(run)


def test_of_a_named_part_only_that(legacy_run):
    run = legacy_run()
    (run / "models" / "base.safetensors").touch()
    assert len(one_of(run / "checkpoints").entries) == 4
    assert len(one_of(run).entries) == 5


def test_the_output_of_a_trainer(legacy_run, tmp_path):
    folder = legacy_run("peft") / "checkpoints"
    output = shutil.copytree(folder, tmp_path / "output")
    for file in (folder / "checkpoint-8").iterdir():
        shutil.copy(file, output)
    run = one_of(output)
    assert run.entries == [output, *(output / f"checkpoint-{step}" for step in STEPS)]


def test_a_step_folder_with_one_file(tmp_path):
    for step in (1, 2):
        folder = tmp_path / "run" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "lora.pt").touch()
        (folder / "optimizer.pt").touch()
        (folder / "rng_state_0.pth").touch()
        (folder / "optimizer_step_1.pt").touch()
    assert [entry.name for entry in one_of(tmp_path).entries] == ["step_1", "step_2"]


@pytest.mark.parametrize(
    "name", ["model_step_{:03}.safetensors", "pytorch_model_step_{}.bin", "model{}.safetensors"]
)
def test_numbered_models_are_no_shards(tmp_path, name):
    files = [tmp_path / name.format(step) for step in (76, 100, 125)]
    for file in files:
        file.touch()
    assert one_of(tmp_path).entries == files


def test_our_own_runs_are_left_alone(collection, caplog):
    with pytest.raises(UsageError, match="nothing to convert"):
        find_runs(collection.runs["colors"])
    assert "is one of loragen's own directories already" in caplog.text


@pytest.mark.parametrize("path", ["none", "."])
def test_nothing_there(tmp_path, path):
    with pytest.raises(UsageError, match=r"no such file|nothing to convert"):
        find_runs(tmp_path / path)


@pytest.mark.parametrize(
    "name, step",
    [
        ("step_080.pt", 80),
        ("checkpoint-80", 80),
        ("checkpoint-step-080.ckpt", 80),
        ("lora_step80_final.bin", 80),
        ("epoch=1-step=80.ckpt", 80),
        ("80.pth", 80),
        ("checkpoint_epoch_3.pt", None),
        ("lora_20250720_143052.pt", None),
        ("checkpoint_20250720.pt", None),
        ("last.ckpt", None),
    ],
)
def test_the_step_in_a_name(name, step):
    assert step_in_name(Path(name)) == step
