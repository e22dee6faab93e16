"""`loragen lora`."""

import json
import re
import shutil
import stat
import subprocess
import sys

import pytest
import torch
import yaml

from loragen.core.adapter.files import attach_adapter, read_adapter
from loragen.core.base.load import load_training_base
from loragen.core.config import LoraTrainConfig, load
from loragen.core.data.dataset import Dataset
from loragen.core.errors import DataError
from loragen.core.files import sha256
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent
from loragen.core.run.directory import LoraManifest, checkpoint_name, read_manifest, write_manifest

QUICK = ("--set", "loggers={}", "--set", "trainer.accelerator=cpu", "--set", "data.max_length=64")


@pytest.fixture
def base_flag(base_dir):
    return ("--base-model", base_dir)


def snapshot(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def half(lora_config, dataset):
    """`half({...})`: a run of which only the first checkpoint is left."""

    def run(settings=None):
        config = lora_config(settings)
        base = load_training_base(config)
        directory = train_adapter(config, Dataset(dataset(), "colors"), base, Silent()).directory
        for step in (6, 7, 8):
            (directory / "checkpoints" / f"checkpoint-step-00{step}.ckpt").unlink()
        shutil.rmtree(directory / "adapter")
        return directory

    return run


IDS = torch.tensor([[5, 9, 13, 2]])


@pytest.fixture
def checkpoint(run):
    return run / "checkpoints" / checkpoint_name(8)


@pytest.fixture
def wanted(run, base):
    """What the base says with the adapter."""
    with torch.inference_mode():
        return attach_adapter(base.model, read_adapter(run / "adapter"), "run")(IDS).logits


def loaded(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


class TestTrain:
    def test_a_dry_run_prints_the_configuration_and_touches_nothing(
        self, loragen, dataset, base_flag, tmp_path
    ):
        file = dataset()
        before = sorted(tmp_path.rglob("*"))
        result = loragen(
            "lora", "train", "--dataset", file, *base_flag, "--dry-run", "--set", "lora.rank=3"
        )
        assert result.exit_code == 0, result.output
        config = LoraTrainConfig.model_validate(yaml.safe_load(result.stdout))
        assert config.lora.rank == 3
        assert config.training.max_steps == 125
        assert f"colors: 12 rows in {file}" in result.stderr
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        "options",
        [
            ("--batch-size", "7", "--runs-dir", "r", "--data-root", "d"),
            ("--batch_size", "7", "--runs_dir", "r", "--data_root", "d"),
        ],
    )
    def test_both_spellings_of_an_option(self, loragen, dataset, options):
        result = loragen(
            "lora", "train", "--dataset", dataset(), "--base_model", "demo", "--dry_run", *options
        )
        assert result.exit_code == 0, result.output
        config = yaml.safe_load(result.stdout)
        assert config["training"]["batch_size"] == 7
        assert (config["runs_dir"], config["data"]["root"]) == ("r", "d")

    def test_test_mode_is_six_steps_and_three_checkpoints(self, loragen, dataset, base_flag):
        file = dataset()
        result = loragen("lora", "train", "--dataset", file, *base_flag, "--test-mode", *QUICK)
        assert result.exit_code == 0, result.output
        (run,) = (loragen.work / "runs").iterdir()
        assert result.stdout == f"runs/{run.name}\n"
        names = [f.name for f in sorted((run / "checkpoints").iterdir())]
        assert names == [f"checkpoint-step-00{step}.ckpt" for step in (4, 5, 6)]
        assert (run / "adapter" / "adapter_config.json").is_file()
        assert "step 6/6" in result.stderr
        assert list(loragen.work.iterdir()) == [loragen.work / "runs"]

    def test_several_datasets_as_one_json_document(self, loragen, dataset, base_flag):
        files = [dataset(name=f"{name}.jsonl") for name in ("one", "two")]
        result = loragen(
            "lora", "train", "--dataset", files[0], "--dataset", files[1], *base_flag,
            "--test-mode", "--json", *QUICK,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        documents = json.loads(result.stdout)
        assert [d["dataset"]["name"] for d in documents] == ["one", "two"]
        for document, file in zip(documents, files, strict=True):
            assert document["status"] == "success"
            assert document["dataset"]["sha256"] == sha256(file)
            manifest = read_manifest(loragen.work / document["run"], LoraManifest)
            assert manifest.steps == document["steps"] == [4, 5, 6]
            config = yaml.safe_load((loragen.work / document["run"] / "config.yaml").read_text())
            assert config["data"]["dataset"] == str(file)

    def test_a_dataset_by_name_from_the_configuration_file(self, loragen, collection, base_flag):
        text = f"data: {{root: {json.dumps(str(collection.data))}, dataset: animals}}"
        (loragen.work / "c.yaml").write_text(text, encoding="utf-8")
        result = loragen("lora", "train", "--config", "c.yaml", *base_flag, "--test-mode", *QUICK)
        assert result.exit_code == 0, result.output
        (run,) = (loragen.work / "runs").iterdir()
        assert run.name.startswith("animals_lora_")

    def test_an_unknown_key_is_refused_with_its_place(self, fails):
        (fails.loragen.work / "c.yaml").write_text("training:\n  batch_sise: 3\n", encoding="utf-8")
        error = fails(2, "lora", "train", "--config", "c.yaml", "--dataset", "x")
        assert error.startswith("c.yaml:2:3: training.batch_sise: unknown key")
        assert "'batch_size'" in error

    def test_all_errors_come_at_once(self, fails):
        text = "seed: x\nlora: {rank: 0}\nschedule: {name: cosin}\n"
        (fails.loragen.work / "c.yaml").write_text(text, encoding="utf-8")
        arguments = ("--config", "c.yaml", "--dataset", "x", "--set", "bogus=1")
        errors = fails(2, "lora", "train", *arguments, lines=4)
        for start in (
            "c.yaml:1:1: seed: ",
            "c.yaml:2:8: lora.rank: ",
            "c.yaml:3:12: schedule: unknown schedule 'cosin'",
            "--set: bogus: unknown key",
        ):
            assert any(error.startswith(start) for error in errors), start

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((), "--dataset NAME|FILE"),
            (("--dataset", "none.jsonl"), "none.jsonl: no such file"),
            (("--dataset", "arc"), "--data-root"),
            (("--dataset", "x", "--all"), "--all"),
            (("--all",), "--all: no datasets"),
            (("--dataset", "x", "--launcher", "slurm"), "--launcher: launcher.name: "),
            (("--config", "none.yaml"), "none.yaml: no such"),
            (("--dataset", "x", "--set", "seed"), "--set seed: "),
            (("--dataset", "x", "--batch-size", "0"), "--batch-size: training.batch_size: "),
        ],
    )
    def test_what_is_missing_is_a_usage_error(self, fails, arguments, message):
        assert message in fails(2, "lora", "train", *arguments)

    def test_an_unknown_dataset_lists_the_known_ones(self, fails, collection):
        error = fails(2, "lora", "train", "--data-root", collection.data, "--dataset", "colours")
        assert "Did you mean 'colors'?" in error
        assert "animals, colors" in error

    def test_bad_rows_are_left_out_on_request(self, loragen, dataset, base_flag):
        good = [{"prompt": f"Question {n}?", "response": "red"} for n in range(5)]
        long = {"prompt": "p", "response": "x" * 99}
        file = dataset([{"prompt": "p"}, *good, long])
        result = loragen(
            "lora", "train", "--dataset", file, *base_flag, "--test-mode", "--json",
            "--skip-bad-rows", *QUICK,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)[0]["dataset"]["rows"] == 5
        warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        assert [line.partition("left out: ")[2] for line in warnings] == [
            "line 1: 'response' is missing (keys here: prompt)",
            "line 7: the answer has 100 tokens, data.max_length is 64",
        ]
        assert warnings[0].startswith(f"warning: {file}: 1 of 7 rows")

    def test_all_bad_rows_are_reported(self, fails, dataset, base_flag):
        rows = [{"prompt": "p", "response": "r"}, *[{"prompt": "p"}] * 7]
        errors = fails(1, "lora", "train", "--dataset", dataset(rows), *base_flag, lines=6)
        assert "colors.jsonl:2: 'response'" in errors[0]
        assert "2 more bad rows" in errors[-1]

    @pytest.fixture
    def bad(self, tmp_path):
        file = tmp_path / "bad.jsonl"
        file.write_text('{"prompt": "p", "response": "r"}\n{"prompt": "p"}\n', encoding="utf-8")
        return file

    @pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
    def test_a_malformed_row_of_a_single_dataset(self, fails, bad, base_flag, arguments):
        error = fails(1, "lora", "train", "--dataset", bad, *base_flag, *arguments, *QUICK)
        assert error.startswith(f"{bad}:2: 'response'")

    def test_a_dry_run_reads_the_validation_file(self, fails, dataset, base_flag):
        given = ("lora", "train", "--dataset", dataset(), *base_flag, "--dry-run", *QUICK)
        assert fails(1, *given, "--set", "data.validation=v.csv").startswith("v.csv: no such file")
        result = fails.loragen(*given, "--set", f"data.validation={dataset(name='val.jsonl')}")
        assert result.exit_code == 0, result.output
        assert "data.validation: 12 rows in " in result.stderr

    def test_a_dry_run_reports_all_bad_files_at_once(self, fails, dataset, bad, base_flag):
        worse = dataset([], "worse.jsonl")
        error = fails(
            1, "lora", "train", "--dataset", bad, "--dataset", dataset(), "--dataset", worse,
            *base_flag, "--dry-run", *QUICK, lines=2,
        )  # fmt: skip
        assert error[1].startswith(f"{worse}: no rows")

    def test_a_dataset_that_fails_does_not_stop_the_rest(self, loragen, dataset, bad, base_flag):
        arguments = ("--dataset", bad, "--dataset", dataset(), *base_flag, "--test-mode", *QUICK)
        result = loragen("lora", "train", *arguments)
        assert result.exit_code == 1
        (run,) = (loragen.work / "runs").iterdir()
        assert result.stdout == f"runs/{run.name}\n"
        assert f"error: bad: {bad}:2: 'response'" in result.stderr
        assert re.search(rf"\[2/2\] colors: done in \d+ s: runs/{run.name}", result.stderr)
        again = loragen("lora", "train", *arguments, "--json")
        failed, skipped = json.loads(again.stdout)
        assert again.exit_code == 1
        assert (failed["run"], failed["status"], failed["dataset"]["name"]) == (
            None, "failed", "bad",
        )  # fmt: skip
        assert (skipped["outcome"], skipped["status"]) == ("skipped", "success")
        assert skipped["run"] == f"runs/{run.name}"

    def test_a_trained_dataset_is_skipped_unless_forced(self, loragen, dataset, base_flag):
        arguments = ("lora", "train", "--dataset", dataset(), *base_flag, "--test-mode", *QUICK)
        first = loragen(*arguments)
        again = loragen(*arguments)
        assert again.stdout == first.stdout
        assert again.stderr.startswith(f"colors: done already in {first.stdout.strip()} ")
        forced = loragen(*arguments, "--force")
        assert forced.exit_code == 0
        assert forced.stdout != first.stdout

    def test_skipping_needs_no_torch(self, loragen, dataset, base_flag):
        arguments = ("lora", "train", "--dataset", dataset(), *base_flag, "--test-mode", *QUICK)
        first = loragen(*arguments)
        code = (
            "import sys\nfrom loragen.cli.main import main\n"
            "try:\n    main()\nfinally:\n"
            "    print([m for m in ('torch', 'lightning', 'ray') if m in sys.modules])"
        )
        again = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=loragen.work, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert again.stdout == f"{first.stdout}[]\n"

    def test_all_datasets_below_the_root(self, loragen, collection, base_flag):
        result = loragen(
            "lora", "train", "--all", "--data-root", collection.data, *base_flag, "--test-mode",
            *QUICK,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        names = [line.split("/")[1].split("_")[0] for line in result.stdout.splitlines()]
        assert names == ["animals", "colors"]

    def test_a_finished_run_has_nothing_to_resume(self, loragen, dataset, base_flag):
        arguments = ("--dataset", dataset(), *base_flag, "--test-mode", *QUICK)
        run = loragen("lora", "train", *arguments).stdout.strip()
        before = snapshot(loragen.work / run)
        result = loragen("lora", "train", "--resume", run)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{run}\n"
        assert result.stderr.startswith(f"{run}: finished at step 6")
        assert snapshot(loragen.work / run) == before

    def test_a_dry_run_prints_the_size_and_the_command_lines(
        self, loragen, dataset, base_flag, monkeypatch
    ):
        given = [
            "lora", "train", "--dataset", str(dataset()), *map(str, base_flag), "--dry-run",
            "--set", "trainer.num_nodes=2", "--set", "trainer.devices=4", "--set", "loggers={}",
        ]  # fmt: skip
        monkeypatch.setattr("sys.argv", ["loragen", *given])
        result = loragen(*given)
        assert result.exit_code == 0, result.output
        values = re.search(r"the adapter has ([\d,]+) values; 50 checkpoints", result.stderr)
        assert values, result.stderr
        assert re.search(r"memory: the base's [\d,]+ parameters, 0.00 GB in bf", result.stderr)
        lines = result.stderr.splitlines()
        torchrun = next(line for line in lines if "torchrun" in line)
        assert "--nnodes=2" in torchrun
        assert "--nproc-per-node=4 --no-python loragen lora train --dataset" in torchrun
        assert "'loggers={}'" in torchrun
        slurm = next(line for line in lines if "srun" in line)
        assert "srun --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 loragen lora" in slurm
        assert "--dry-run" not in torchrun + slurm

    def test_a_base_that_is_not_there_is_a_usage_error(self, fails, dataset):
        file = dataset()
        for dry in ((), ("--dry-run",)):
            error = fails(
                2, "lora", "train", "--dataset", file, "--base-model", "./none", *dry, *QUICK
            )
            assert "./none: no such directory" in error

    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    def test_target_modules_that_are_not_there_leave_nothing(self, fails, dataset, base_flag, dry):
        error = fails(
            2, "lora", "train", "--dataset", dataset(), *base_flag, *QUICK, *dry,
            "--set", "lora.target_modules=[nope]",
        )  # fmt: skip
        assert error.startswith("lora.target_modules: ")

    @pytest.mark.parametrize("place", [0, 2, -1])
    def test_debug_shows_the_traceback_wherever_it_stands(self, loragen, place):
        arguments = ["lora", "train", "--dataset", "none.jsonl"]
        arguments.insert(len(arguments) if place == -1 else place, "--debug")
        result = loragen(*arguments)
        assert result.exit_code == 1
        assert "no such file" in str(result.exception)
        assert result.exc_info[2] is not None

    def test_an_unknown_option_is_a_usage_error(self, loragen):
        result = loragen("lora", "train", "--datset", "x")
        assert result.exit_code == 2
        assert "--datset" in result.stderr
        assert result.stdout == ""


class TestEval:
    @pytest.fixture
    def adapter(self, collection):
        return collection.runs["colors"] / "adapter"

    @pytest.mark.parametrize("part", ["adapter", ".", "checkpoints/checkpoint-step-006.ckpt"])
    def test_one_json_document(self, loragen, collection, part):
        adapter, file = collection.runs["colors"] / part, collection.file("colors")
        result = loragen("lora", "eval", "--adapter", adapter, "--dataset", file, "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["dataset"] == "colors"
        assert document["rows"] == 16
        assert document["base_model"] == str(collection.base)
        assert document["adapter"] == str(adapter)
        assert 0 <= document["exact_match"] <= 1
        assert 0 <= document["choice_accuracy"] <= 1
        assert document["choices"] == 3

    def test_a_table(self, loragen, adapter, collection):
        result = loragen(
            "lora", "eval", "--adapter", adapter, "--dataset", collection.file("colors"),
            "--limit", 4,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        cells = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
        assert cells["measure"] == "value"
        assert cells["rows"] == "4"
        assert cells["choices"] == "3"  # of the whole dataset
        assert "exact_match" in cells

    def test_the_base_without_an_adapter(self, loragen, collection):
        result = loragen(
            "lora", "eval", "--no-adapter", "--base-model", collection.base,
            "--dataset", collection.file("colors"), "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["adapter"] is None

    def test_the_best_device_answers(self, loragen, collection, monkeypatch):
        """`meta` stands for a GPU."""
        devices = []

        def score(model, *_, **__):
            devices.append(model.device)
            raise DataError("enough is known")

        monkeypatch.setattr("loragen.core.base.load.best_device", lambda: torch.device("meta"))
        monkeypatch.setattr("loragen.core.lora.evaluate.evaluate_model", score)
        loragen(
            "lora", "eval", "--no-adapter", "--base-model", collection.base,
            "--dataset", collection.file("colors"),
        )  # fmt: skip
        assert devices == [torch.device("meta")]

    def test_a_dataset_by_name_is_its_test_split(self, loragen, collection, tmp_path, adapter):
        folder = tmp_path / "root" / "colors"
        folder.mkdir(parents=True)
        shutil.copy(collection.file("colors"), folder / "colors_test_formatted.jsonl")
        result = loragen(
            "lora", "eval", "--adapter", adapter, "--dataset", "colors",
            "--data-root", tmp_path / "root", "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["file"] == str(folder / "colors_test_formatted.jsonl")

    def test_bad_rows_are_left_out_on_request(self, loragen, dataset, adapter):
        file = dataset([{"prompt": "p", "response": "red"}, {"prompt": "p"}])
        arguments = ("lora", "eval", "--adapter", adapter, "--dataset", file, "--json")
        assert loragen(*arguments).exit_code == 1
        result = loragen(*arguments, "--skip-bad-rows")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["rows"] == 1
        assert "1 of 2 rows left out: line 2" in result.stderr

    def test_an_adapter_of_another_shape_is_one_line(self, fails, adapter, collection, base_dir):
        error = fails(
            1, "lora", "eval", "--adapter", adapter, "--base-model", "demo",
            "--dataset", collection.file("colors"),
        )  # fmt: skip
        assert error.startswith(f"{adapter}: ")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((), "--no-adapter"),
            (("--adapter", "x", "--no-adapter"), "--no-adapter"),
            (("--no-adapter",), "--base-model"),
            (("--adapter", "none"), "none: no such adapter"),
            (("--adapter", "."), ".: "),
        ],
    )
    def test_what_is_missing_is_a_usage_error(self, fails, dataset, arguments, message):
        assert message in fails(2, "lora", "eval", "--dataset", dataset(), *arguments)

    def test_it_only_reads(self, loragen, collection, adapter):
        run = collection.runs["colors"]
        before = snapshot(run)
        loragen("lora", "eval", "--adapter", run, "--dataset", collection.file("colors"))
        assert snapshot(run) == before


class TestResume:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"base_dtype": "bfloat16"},
            {"trainer.precision": "bf16-true"},
            {"trainer.precision": "64-true"},
            {"trainer.precision": "bf16-mixed"},
        ],
        ids=str,
    )
    def test_a_run_resumes_with_nothing_but_its_path(self, loragen, half, settings):
        run = half(settings)
        result = loragen("lora", "train", "--resume", run)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{run}\n"
        assert f"{run}: found checkpoint-step-005.ckpt; the next step is 6" in result.stderr
        manifest = read_manifest(run, LoraManifest)
        assert (manifest.status, manifest.resumed_from) == ("success", [5])
        assert manifest.steps == [5, 6, 7, 8]
        assert (run / "adapter").is_dir()
        config = load(LoraTrainConfig, run / "config.yaml", environment={})
        assert config.trainer.precision == settings.get("trainer.precision", "32-true")

    def test_a_checkpoint_names_its_run(self, loragen, half):
        run = half()
        path = run / "checkpoints" / "checkpoint-step-005.ckpt"
        result = loragen("lora", "train", "--resume-from-checkpoint", path, "--json")
        (document,) = json.loads(result.stdout)
        assert (document["run"], document["resumed_from"]) == (str(run), [5])

    def test_every_difference_is_an_error_and_nothing_is_touched(self, fails, half, dataset):
        run = half()
        before = snapshot(run)
        other = dataset([{"prompt": "q", "response": "red"}], "other.jsonl")
        errors = fails(
            2, "lora", "train", "--resume", run, "--dataset", other, "--batch-size", 2,
            "--set", "seed=1", lines=3,
        )  # fmt: skip
        assert all(error.startswith(f"{run} ") for error in errors)
        assert [error.split(": ", 1)[1].split(" is ")[0] for error in errors] == [
            "seed", "training.batch_size", f"the data differ: {other}",
        ]  # fmt: skip
        assert snapshot(run) == before

    def test_data_that_are_gone_are_one_line(self, fails, half, tmp_path):
        run = half()
        (tmp_path / "colors.jsonl").unlink()
        error = fails(2, "lora", "train", "--resume", run)
        assert error.startswith(f"{tmp_path / 'colors.jsonl'}: ")

    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    def test_a_run_that_was_converted_without_its_dataset_asks_for_it(self, fails, half, dry):
        run = half()
        manifest = read_manifest(run, LoraManifest)
        manifest.dataset.path = ""
        write_manifest(run, manifest)
        error = fails(2, "lora", "train", "--resume", run, *dry)
        assert error.startswith(f"{run}: ")
        assert "--dataset" in error

    @pytest.mark.parametrize("path", ["none", "."])
    def test_what_is_no_run_is_a_usage_error(self, fails, path):
        error = fails(2, "lora", "train", "--resume", path)
        assert error.startswith(f"{path}: ")

    def test_one_run_has_one_dataset(self, fails, half, dataset):
        file = dataset(name="other.jsonl")
        error = fails(
            2, "lora", "train", "--resume", half(), "--dataset", file, "--dataset", dataset()
        )
        assert error.startswith("--resume: ")

    def test_a_run_of_test_mode_resumes(self, loragen, dataset, base_dir):
        quick = ("--set", "loggers={}", "--set", "trainer.accelerator=cpu", "--test-mode")
        result = loragen("lora", "train", "--dataset", dataset(), "--base-model", base_dir, *quick)
        run = loragen.work / result.stdout.strip()
        (run / "checkpoints" / "checkpoint-step-006.ckpt").unlink()
        result = loragen("lora", "train", "--resume", run)
        assert result.exit_code == 0, result.output
        assert read_manifest(run, LoraManifest).steps == [4, 5, 6]


class TestExport:
    def test_plain_peft_loads_what_was_exported(self, loragen, checkpoint, collection, wanted):
        from peft import PeftModel

        result = loragen("lora", "export", checkpoint, "--output", "mine")
        assert result.exit_code == 0, result.output
        assert result.stdout == "mine\n"
        model = PeftModel.from_pretrained(loaded(collection.base), "mine")
        with torch.inference_mode():
            assert torch.equal(model(IDS).logits, wanted)
        card = (loragen.work / "mine" / "README.md").read_text(encoding="utf-8")
        assert "rank 2, alpha 4" in card

    def test_the_merged_model_computes_what_base_and_adapter_compute(self, loragen, run, wanted):
        from transformers import AutoTokenizer

        result = loragen("lora", "export", run, "--output", "mine", "--merge", "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert (document["output"], document["kind"]) == ("mine", "merged")
        with torch.inference_mode():
            assert (loaded("mine")(IDS).logits - wanted).abs().max() < 1e-4
        assert AutoTokenizer.from_pretrained("mine")("red").input_ids
        modes = {
            stat.S_IMODE((loragen.work / "mine" / name).stat().st_mode)
            for name in ("model.safetensors", "config.json")
        }
        assert len(modes) == 1

    def test_the_merged_model_has_the_dtype_of_the_base(self, loragen, run, collection, tmp_path):
        half = tmp_path / "half"
        shutil.copytree(collection.base, half)
        loaded(collection.base).to(torch.bfloat16).save_pretrained(half)
        given = ("--merge", "--base-model", half)
        assert loragen("lora", "export", run, "--output", "mine", *given).exit_code == 0
        assert {p.dtype for p in loaded("mine").parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("form", ["torch", "full", "safetensors", "plain"])
    def test_a_file_that_no_run_knows(self, loragen, legacy_run, collection, run, form):
        source = legacy_run(form, yaml=False)
        file = sorted((source / "checkpoints").iterdir())[-1]
        given = ("--alpha", "4", "--base-model", collection.base)
        result = loragen("lora", "export", file, "--output", "mine", *given)
        assert result.exit_code == 0, result.output
        exported, ours = read_adapter(loragen.work / "mine"), read_adapter(run / "adapter")
        assert exported.tensors.keys() == ours.tensors.keys()
        assert all(exported.tensors[key].equal(ours.tensors[key]) for key in ours.tensors)
        assert exported.config["r"] == 2

    @pytest.mark.parametrize("form", ["peft", "peft-bin"])
    def test_a_peft_directory_knows_itself(self, loragen, legacy_run, run, form):
        directory = legacy_run(form, yaml=False) / "checkpoints" / "checkpoint-8"
        assert loragen("lora", "export", directory, "--output", "mine").exit_code == 0
        exported, ours = read_adapter(loragen.work / "mine"), read_adapter(run / "adapter")
        assert all(exported.tensors[key].equal(ours.tensors[key]) for key in ours.tensors)

    def test_the_shipped_base_is_named_so_that_peft_finds_it(self, loragen, legacy_run, tmp_path):
        from peft import LoraConfig, get_peft_model

        from loragen.core.base.names import resolve_base

        model = get_peft_model(
            loaded(resolve_base("demo")), LoraConfig(r=2, target_modules=["q_proj"])
        )
        weights = {k: v for k, v in model.state_dict().items() if "lora_" in k}
        torch.save(weights, tmp_path / "lone.pt")
        given = ("--alpha", "2", "--base-model", "demo")
        result = loragen("lora", "export", tmp_path / "lone.pt", "--output", "mine", *given)
        assert result.exit_code == 0, result.output
        config = read_adapter(loragen.work / "mine").config
        assert loaded(config["base_model_name_or_path"])
        assert config["target_modules"] == ["q_proj"]
        card = (loragen.work / "mine" / "README.md").read_text(encoding="utf-8")
        assert "ships with loragen" in card

    def test_what_is_not_recorded_has_to_be_given(self, fails, legacy_run):
        file = legacy_run(yaml=False) / "checkpoints" / "step_008.pt"
        alpha, base = fails(2, "lora", "export", file, "--output", "mine", lines=2)
        assert "--alpha" in alpha
        assert "--base-model" in base
        error = fails(2, "lora", "export", file, "--output", "mine", "--alpha", "4")
        assert "--base-model" in error

    def test_a_file_beside_a_lone_checkpoint_is_of_something_else(
        self, fails, legacy_run, collection
    ):
        file = legacy_run(yaml=False) / "checkpoints" / "step_008.pt"
        (file.parent / "deploy.yaml").write_text("model_name: gpt-4\nlora_alpha: 99\n", "utf-8")
        export = ("lora", "export", file, "--output", "mine", "--base-model", collection.base)
        assert "--alpha" in fails(2, *export)

    def test_a_folder_says_where_alpha_and_base_are_from(self, fails, legacy_run, collection):
        folder = legacy_run(yaml=False) / "checkpoints" / "only"
        folder.mkdir()
        shutil.copy(folder.parent / "step_008.pt", folder)
        file = folder / "train.yaml"
        file.write_text(f"model_name: {collection.base}\nlora_alpha: lots\n", encoding="utf-8")
        error = fails(2, "lora", "export", folder, "--output", "mine")
        assert error.startswith(f"{file}:2:1: lora.alpha: ")
        file.write_text(f"model_name: {collection.base}\nlora_alpha: 4\n", encoding="utf-8")
        result = fails.loragen("lora", "export", folder, "--output", "mine")
        assert f"lora.alpha 4 is from {file}:2:1\n" in result.stderr

    def test_an_adapter_of_another_base(self, fails, run):
        given = ("--output", "mine", "--merge", "--base-model", "demo")
        assert "does not fit" in fails(1, "lora", "export", run, *given)

    def test_nothing_is_replaced_but_an_earlier_output(self, fails, run, collection, tmp_path):
        export = ("lora", "export", run, "--output", "mine")
        assert fails.loragen(*export).exit_code == 0
        assert "mine exists" in fails(2, *export)
        assert fails.loragen(*export, "--force").exit_code == 0
        assert "--force" in fails(2, *export, "--merge", "--force")
        merged = ("lora", "export", run, "--output", "merged", "--merge", "--force")
        for arguments in (merged, merged, (*export, "--force")):  # merged: also over itself
            assert fails.loragen(*arguments).exit_code == 0
        for name, arguments in (("mine", (*export, "--force")), ("merged", merged)):
            (fails.loragen.work / name / "notes.txt").touch()
            assert fails.loragen(*arguments).exit_code == 0
            assert (fails.loragen.work / name / "notes.txt").exists()
        model = shutil.copytree(collection.base, tmp_path / "model")
        error = fails(2, "lora", "export", run, "--output", model, "--merge", "--force")
        assert "--force" in error

    def test_alpha_zero_is_refused(self, fails, run):
        error = fails(2, "lora", "export", run, "--output", "mine", "--alpha", "0")
        assert error.startswith("--alpha: ")

    def test_an_adapter_that_is_no_lora(self, fails, run, tmp_path):
        adapter = shutil.copytree(run / "adapter", tmp_path / "prompts")
        (adapter / "adapter_config.json").write_text('{"peft_type": "P_TUNING"}', encoding="utf-8")
        error = fails(1, "lora", "export", adapter, "--output", "mine")
        assert "adapter_config.json: " in error
        assert "P_TUNING" in error

    def test_one_layer_of_the_merged_model_at_a_time(self, run, base, monkeypatch):
        """All ΔW at once would be a second model in memory."""
        import weakref

        from peft.tuners.lora import Linear

        from loragen.core.adapter.export import merged_state

        model = attach_adapter(base.model, read_adapter(run / "adapter"), "run")
        alive = []
        compute = Linear.get_delta_weight

        def counted(layer, name):
            assert sum(one() is not None for one in alive) <= 1
            delta = compute(layer, name)
            alive.append(weakref.ref(delta))
            return delta

        monkeypatch.setattr(Linear, "get_delta_weight", counted)
        merged_state(model, torch.float32)
        assert len(alive) == 14

    def test_nothing_there(self, fails, tmp_path):
        error = fails(2, "lora", "export", "none", "--output", "mine")
        assert error.startswith("none: no such adapter")
        assert "no adapter" in fails(2, "lora", "export", ".", "--output", "mine")
