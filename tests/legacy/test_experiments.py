import shutil
from pathlib import Path

import pytest

from loragen.core.errors import ConfigError, UsageError
from loragen.legacy.experiments import (
    find_runs,
    settings_beside,
    settings_by_synonyms,
    settings_in_yaml,
    step_in_name,
)

from .runs import STEPS, only_run


class TestRuns:
    def test_all_runs_below_a_folder(self, legacy_run, tmp_path):
        runs = [legacy_run(dataset="colors"), legacy_run(dataset="animals")]
        found = find_runs(tmp_path / "experiments")
        assert sorted(run.directory for run in found) == sorted(runs)
        assert all(run.has_subfolders and len(run.checkpoints) == 4 for run in found)

    def test_a_stray_file_is_no_run(self, legacy_run, tmp_path, caplog):
        run = legacy_run()
        (tmp_path / "experiments" / "best.pt").touch()
        assert only_run(tmp_path / "experiments").directory == run
        assert "best.pt" in caplog.text

    def test_numbered_files_are_a_run_beside_those_below(self, legacy_run, tmp_path):
        run = legacy_run()
        folder = tmp_path / "experiments"
        (folder / "step_5.pt").touch()
        (folder / "final").mkdir()
        (folder / "final" / "model.pt").touch()
        assert [found.directory for found in find_runs(folder)] == [folder, run]

    def test_a_link_to_a_run_is_no_second_run(self, legacy_run):
        run = legacy_run()
        try:
            (run.parent / "latest").symlink_to(run, target_is_directory=True)
        except OSError:
            pytest.skip("links are not allowed here")
        assert only_run(run.parent).directory == run
        assert only_run(run.parent / "latest") == only_run(run)

    def test_a_subfolder_that_was_named_is_searched_alone(self, legacy_run):
        run = legacy_run()
        (run / "models" / "base.safetensors").touch()
        assert only_run(run / "checkpoints").directory == run
        assert len(only_run(run / "checkpoints").checkpoints) == 4
        assert len(only_run(run).checkpoints) == 5

    def test_the_output_of_a_trainer(self, legacy_run, tmp_path):
        folder = legacy_run("peft") / "checkpoints"
        output = shutil.copytree(folder, tmp_path / "output")
        for file in (folder / "checkpoint-8").iterdir():
            shutil.copy(file, output)
        found = only_run(output).checkpoints
        assert found == [output, *(output / f"checkpoint-{step}" for step in STEPS)]

    def test_a_folder_of_one_step_is_a_checkpoint(self, tmp_path):
        for step in (1, 2):
            folder = tmp_path / "run" / f"step_{step}"
            folder.mkdir(parents=True)
            for name in ("lora.pt", "optimizer.pt", "rng_state_0.pth", "optimizer_step_1.pt"):
                (folder / name).touch()
        assert [path.name for path in only_run(tmp_path).checkpoints] == ["step_1", "step_2"]

    @pytest.mark.parametrize(
        "name",
        ["model_step_{:03}.safetensors", "pytorch_model_step_{}.bin", "model{}.safetensors"],
    )
    def test_numbered_models_are_no_shards(self, tmp_path, name):
        files = [tmp_path / name.format(step) for step in (76, 100, 125)]
        for file in files:
            file.touch()
        assert only_run(tmp_path).checkpoints == files

    def test_run_directories_of_loragen_are_skipped(self, collection, caplog):
        run = collection.runs["colors"]
        with pytest.raises(UsageError, match="no checkpoints to convert"):
            find_runs(run)
        assert f"{run}: skipped" in caplog.text

    @pytest.mark.parametrize("path", ["none", "."])
    def test_nothing_to_convert(self, tmp_path, path):
        with pytest.raises(UsageError, match=str(tmp_path)):
            find_runs(tmp_path / path)

    @pytest.mark.parametrize(
        "name, year",
        [("old_20250720_143052_lora", 2025), ("old_20259920_143052", None), ("run", None)],
    )
    def test_the_time_in_a_name(self, tmp_path, name, year):
        (tmp_path / name).mkdir()
        (tmp_path / name / "step_5.pt").touch()
        started = only_run(tmp_path / name).started
        assert (started and started.year) == year

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
    def test_the_step_in_a_name(self, name, step):
        assert step_in_name(Path(name)) == step


class TestRecordedSettings:
    TRADITIONAL = """
        model: {name: Qwen/Qwen2.5-0.5B-Instruct}
        lora: {r: 8, lora_alpha: 16, lora_dropout: 0.1}
        training:
          per_device_train_batch_size: 4
          gradient_accumulation_steps: 8
          max_steps: 125
          max_grad_norm: 0.5
          bf16: true
          stage1: {steps: 75, learning_rate: 1e-4}
          stage2: {steps: 50, learning_rate: 1e-5}
    """
    FLAT = """
        model_name: Qwen/Qwen2.5-0.5B-Instruct
        lora: {alpha: 16, dropout: 0.1}
        training: {batch_size: 4, max_steps: 125, stage1_steps: 75, max_grad_norm: 0.5,
                   bf16: true, gradient_accumulation_steps: 8,
                   learning_rate_stage1: 1.0e-4, learning_rate_stage2: 1.0e-5}
    """

    @pytest.mark.parametrize("text, line", [(TRADITIONAL, "3:22"), (FLAT, "3:16")])
    def test_a_file_of_the_original_scripts(self, tmp_path, text, line):
        file = tmp_path / "c.yaml"
        file.write_text(text, encoding="utf-8")
        found = settings_in_yaml(file)
        assert found["lora.alpha"].origin.startswith(f"{file}:{line}")
        values = {key: float(v) if "rate" in key else v for key, (v, _) in found.items()}
        assert values == {
            "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
            "lora.alpha": 16,
            "lora.dropout": 0.1,
            "training.batch_size": 32,
            "training.max_steps": 125,
            "schedule.stage1_steps": 75,
            "schedule.learning_rate_stage1": 1e-4,
            "schedule.learning_rate_stage2": 1e-5,
            "trainer.accumulate_grad_batches": 8,
            "trainer.gradient_clip_val": 0.5,
            "trainer.precision": "bf16-mixed",
        }

    def test_unsupported_settings_are_refused(self, tmp_path):
        file = tmp_path / "c.yaml"
        text = "training:\n  stage1_steps: 75\n  optimizer: sgd\n  warmup_steps: 10\n"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as error:
            settings_in_yaml(file)
        first, second = error.value.problems
        assert first.startswith(f"{file}:3:3: training.optimizer: ")
        assert second.startswith(f"{file}:4:3: training.warmup_steps: ")

    def test_a_file_of_another_training_loop(self):
        tree = {
            "model_name_or_path": "some/base",
            "train": {"batch_size": 4, "gradient_accumulation_steps": 2, "seed": "7"},
            "peft": {"lora_alpha": "lots"},
        }
        found = {key: value for key, (value, _) in settings_by_synonyms(tree, "x").items()}
        assert found == {
            "base_model": "some/base",
            "training.batch_size": 8,
            "seed": 7,
            "lora.alpha": "lots",
        }

    @pytest.mark.parametrize(
        "tree",
        [
            {"loss": {"alpha": 1}, "eval": {"batch_size": 3}, "max_steps": -1},
            {"service": {"model_name": "gpt-4", "lora_alpha": 99}},
        ],
    )
    def test_similar_names_of_other_settings(self, tree):
        assert settings_by_synonyms(tree, "x") == {}

    def test_a_broken_file_beside_a_run_is_skipped(self, legacy_run, caplog):
        run = legacy_run()
        (run / "a.yaml").write_text("{", encoding="utf-8")
        assert settings_beside(only_run(run))["lora.alpha"].value == 4
        assert f"{run / 'a.yaml'}:1:2: not YAML" in caplog.text
