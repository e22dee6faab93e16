import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from loragen.core.config import LoraTrainConfig
from loragen.core.errors import DataError
from loragen.core.files import sha256
from loragen.core.run.directory import LoraManifest, read_manifest

QUICK = ("--set", "loggers={}", "--set", "trainer.accelerator=cpu", "--set", "data.max_length=64")


@pytest.fixture
def base_flag(base_dir):
    return ("--base-model", base_dir)


def snapshot(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


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
        assert (run / "final_model" / "config.json").is_file()
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
        assert error.startswith(
            "c.yaml:2:3: training.batch_sise: unknown key. Did you mean 'batch_size'?"
        )

    def test_all_errors_come_at_once(self, fails):
        text = "seed: x\nlora: {rank: 0}\nschedule: {name: cosin}\n"
        (fails.loragen.work / "c.yaml").write_text(text, encoding="utf-8")
        arguments = ("--config", "c.yaml", "--dataset", "x", "--set", "bogus=1")
        errors = fails(2, "lora", "train", *arguments, lines=4)
        for start in (
            "c.yaml:1:1: seed: ",
            "c.yaml:2:8: lora.rank: ",
            "c.yaml:3:12: schedule: unknown schedule 'cosin'. Did you mean 'cosine'?",
            "--set: bogus: unknown key",
        ):
            assert any(error.startswith(start) for error in errors), start

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((), "which dataset? Give --dataset NAME|FILE"),
            (("--dataset", "none.jsonl"), "none.jsonl: no such file"),
            (("--dataset", "arc"), "data_to_lora/cs is not a directory; see --data-root"),
            (("--dataset", "x", "--all"), "--all is every dataset below --data-root"),
            (("--all",), "--all: no datasets in data_to_lora/cs"),
            (("--dataset", "x", "--launcher", "slurm"), "--launcher: launcher.name: "),
            (("--config", "none.yaml"), "none.yaml: no such configuration file"),
            (("--dataset", "x", "--set", "seed"), "--set seed: expected key=value"),
            (("--dataset", "x", "--batch-size", "0"), "--batch-size: training.batch_size: "),
        ],
    )
    def test_what_is_missing_is_a_usage_error(self, fails, arguments, message):
        assert message in fails(2, "lora", "train", *arguments)

    def test_an_unknown_dataset_is_told_what_there_is(self, fails, collection):
        error = fails(2, "lora", "train", "--data-root", collection.data, "--dataset", "colours")
        assert "unknown dataset 'colours'. Did you mean 'colors'?" in error
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
        assert "colors.jsonl:2: 'response' is missing" in errors[0]
        assert errors[-1].endswith("and 2 more bad rows (--skip-bad-rows leaves them out)")

    @pytest.fixture
    def bad(self, tmp_path):
        file = tmp_path / "bad.jsonl"
        file.write_text('{"prompt": "p", "response": "r"}\n{"prompt": "p"}\n', encoding="utf-8")
        return file

    @pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
    def test_a_malformed_row_of_a_single_dataset(self, fails, bad, base_flag, arguments):
        error = fails(1, "lora", "train", "--dataset", bad, *base_flag, *arguments, *QUICK)
        assert error.startswith(f"{bad}:2: 'response' is missing")

    def test_a_dry_run_reads_the_validation_file(self, fails, dataset, base_flag):
        given = ("lora", "train", "--dataset", dataset(), *base_flag, "--dry-run", *QUICK)
        assert fails(1, *given, "--set", "data.validation=v.csv") == "v.csv: no such file"
        result = fails.loragen(*given, "--set", f"data.validation={dataset(name='val.jsonl')}")
        assert result.exit_code == 0, result.output
        assert "data.validation: 12 rows in " in result.stderr

    def test_a_dry_run_tells_of_all_bad_files_at_once(self, fails, dataset, bad, base_flag):
        worse = dataset([], "worse.jsonl")
        error = fails(
            1, "lora", "train", "--dataset", bad, "--dataset", dataset(), "--dataset", worse,
            *base_flag, "--dry-run", *QUICK, lines=2,
        )  # fmt: skip
        assert error[1] == f"{worse}: no rows in it"

    def test_a_dataset_that_fails_does_not_stop_the_rest(self, loragen, dataset, bad, base_flag):
        arguments = ("--dataset", bad, "--dataset", dataset(), *base_flag, "--test-mode", *QUICK)
        result = loragen("lora", "train", *arguments)
        assert result.exit_code == 1
        (run,) = (loragen.work / "runs").iterdir()
        assert result.stdout == f"runs/{run.name}\n"
        assert f"error: bad: {bad}:2: 'response' is missing" in result.stderr
        assert re.search(rf"\[2/2\] colors: done in \d+ s: runs/{run.name}", result.stderr)
        again = loragen("lora", "train", *arguments, "--json")
        failed, skipped = json.loads(again.stdout)
        assert again.exit_code == 1
        assert (failed["run"], failed["status"], failed["dataset"]["name"]) == (
            None, "failed", "bad",
        )  # fmt: skip
        assert (skipped["outcome"], skipped["status"]) == ("skipped", "success")
        assert skipped["run"] == f"runs/{run.name}"

    def test_what_is_done_is_told_at_once_and_trained_again_by_force(
        self, loragen, dataset, base_flag
    ):
        arguments = ("lora", "train", "--dataset", dataset(), *base_flag, "--test-mode", *QUICK)
        first = loragen(*arguments)
        again = loragen(*arguments)
        assert again.stdout == first.stdout
        done = f"colors: done already in {first.stdout.strip()} (--force trains it again)\n"
        assert again.stderr == done
        forced = loragen(*arguments, "--force")
        assert forced.exit_code == 0
        assert forced.stdout != first.stdout

    def test_what_is_done_is_told_without_anything_heavy(self, loragen, dataset, base_flag):
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

    def test_a_finished_run_has_nothing_left_to_go_on_with(self, loragen, dataset, base_flag):
        arguments = ("--dataset", dataset(), *base_flag, "--test-mode", *QUICK)
        run = loragen("lora", "train", *arguments).stdout.strip()
        before = snapshot(loragen.work / run)
        result = loragen("lora", "train", "--resume", run)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{run}\n"
        assert result.stderr == f"{run}: finished at step 6, nothing is left to do\n"
        assert snapshot(loragen.work / run) == before

    def test_a_dry_run_tells_the_size_and_the_command_lines(
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
            assert error == "base model ./none: no such directory"

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

        def score(model, *_):
            devices.append(model.device)
            raise DataError("enough is known")

        monkeypatch.setattr("loragen.core.base.load.best_device", lambda: torch.device("meta"))
        monkeypatch.setattr("loragen.core.lora.evaluate.evaluate", score)
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
        assert error.startswith(f"{adapter}: does not fit this base model: ")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((), "give either --adapter DIR|CKPT or --no-adapter"),
            (("--adapter", "x", "--no-adapter"), "give either --adapter DIR|CKPT or --no-adapter"),
            (("--no-adapter",), "which base model? Give --base-model"),
            (("--adapter", "none"), "none: no such adapter or checkpoint"),
            (("--adapter", "."), ".: neither a run directory nor inside one"),
        ],
    )
    def test_what_is_missing_is_a_usage_error(self, fails, dataset, arguments, message):
        assert message in fails(2, "lora", "eval", "--dataset", dataset(), *arguments)

    def test_it_only_reads(self, loragen, collection, adapter):
        run = collection.runs["colors"]
        before = snapshot(run)
        loragen("lora", "eval", "--adapter", run, "--dataset", collection.file("colors"))
        assert snapshot(run) == before
