import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from loragen.core.adapter.files import read_adapter
from loragen.core.config import LoraTrainConfig
from loragen.core.errors import ConfigError, DataError, UsageError
from loragen.core.files import sha256
from loragen.core.run.checkpoints import load_plain, read_tensors
from loragen.core.run.directory import LoraManifest, checkpoint_name, read_manifest
from loragen.legacy.convert import ConversionOptions, check_one_dataset, convert
from loragen.legacy.discover import find_runs

from .finding import one_of

FORMS = ["torch", "full", "safetensors", "peft", "peft-bin", "plain"]
STEPS = [5, 6, 7, 8]


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.fixture
def options(tmp_path, collection):
    return ConversionOptions(output=tmp_path / "runs", data_root=collection.data)


def files_of(directory):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


class TestConvert:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_container_gives_the_weights_bit_for_bit(
        self, legacy_run, options, collection, form
    ):
        source = legacy_run(form)
        before = {p: sha256(p) for p in source.rglob("*") if p.is_file()}
        converted = convert(one_of(source), options)
        assert converted.directory == options.output / "colors_lora_20250720_143052"
        assert (converted.left_out, converted.manifest.steps) == ([], STEPS)
        ours = collection.runs["colors"]
        for step in STEPS:
            name = f"checkpoints/{checkpoint_name(step)}"
            document, wanted = load_plain(converted.directory / name), load_plain(ours / name)
            assert equal(document["state_dict"], wanted["state_dict"])
            assert list(document["state_dict"]) == list(wanted["state_dict"])  # the model's order
            assert (document["global_step"], document["epoch"]) == (step, 0)
        assert {p: sha256(p) for p in source.rglob("*") if p.is_file()} == before

    def test_the_run_is_like_one_of_ours(self, legacy_run, options, collection):
        run = convert(one_of(legacy_run()), options).directory
        assert files_of(run) == [
            "adapter/README.md",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            *(f"checkpoints/{checkpoint_name(step)}" for step in STEPS),
            "config.yaml",
            "manifest.json",
            "tracking/batch_tracking_colors.jsonl",
            "tracking/checkpoint_mapping_colors.json",
        ]
        manifest = read_manifest(run, LoraManifest)
        ours = read_manifest(collection.runs["colors"], LoraManifest)
        assert manifest.status == "success"
        assert manifest.base_model == str(collection.base)
        assert manifest.dataset == ours.dataset.model_copy(update={"tokens": ""})
        same = ("r", "lora_alpha", "task_type", "peft_type", "bias")
        assert [manifest.adapter_config[k] for k in same] == [ours.adapter_config[k] for k in same]
        names = {path.rpartition(".")[2] for path in ours.adapter_config["target_modules"]}
        assert manifest.adapter_config["target_modules"] == sorted(names)
        assert manifest.started.startswith("2025-07-20T14:30:52")
        text = (run / "config.yaml").read_text(encoding="utf-8")
        config = LoraTrainConfig.model_validate(yaml.safe_load(text))
        assert (config.lora.rank, config.lora.alpha) == (2, 4)
        assert (config.training.max_steps, config.checkpoints.first_step) == (8, 5)
        assert config.data.dataset == str(collection.file("colors"))
        last = read_tensors(run / "checkpoints" / checkpoint_name(8))
        assert equal(read_adapter(run / "adapter").tensors, last)

    @pytest.mark.parametrize("form, states", [("torch", 4), ("peft", 4), ("full", 0)])
    def test_the_optimizer_comes_along_where_it_is_certain(
        self, legacy_run, options, collection, form, states
    ):
        converted = convert(one_of(legacy_run(form)), options)
        assert converted.optimizer_states == states
        name = f"checkpoints/{checkpoint_name(7)}"
        found = load_plain(converted.directory / name)["optimizer_states"]
        assert len(found) == bool(states)
        if not states:
            return
        (wanted,) = load_plain(collection.runs["colors"] / name)["optimizer_states"]
        for index, moments in wanted["state"].items():
            assert equal(found[0]["state"][index], moments)
        optimizer = torch.optim.AdamW(
            [torch.zeros_like(m["exp_avg"]) for m in wanted["state"].values()], lr=1.0
        )
        optimizer.load_state_dict(found[0])
        group, ours = found[0]["param_groups"][0], wanted["param_groups"][0]
        assert group.keys() == ours.keys()
        assert {k: v for k, v in group.items() if k != "lr"} == {
            k: v for k, v in ours.items() if k != "lr"
        }

    def test_once_is_enough(self, legacy_run, options):
        source = one_of(legacy_run())
        first = convert(source, options)
        again = convert(source, options)
        assert again.already
        assert again.directory == first.directory
        shutil.rmtree(first.directory)
        assert not convert(source, options).already

    def test_lone_files_of_one_folder_are_two_conversions(self, legacy_run, options):
        folder = legacy_run(yaml=False) / "checkpoints"
        given = ConversionOptions(options.output, "some/base", "colors", options.data_root, alpha=4)
        for step in (5, 6):
            converted = convert(one_of(folder / f"step_00{step}.pt"), given)
            assert (converted.already, converted.manifest.steps) == (False, [step])
        assert convert(one_of(folder / "step_005.pt"), given).already

    def test_the_configuration_of_the_training_comes_along(self, legacy_run, options):
        source = legacy_run()
        with (source / "training_config.yaml").open("a", encoding="utf-8") as file:
            file.write(
                "training: {per_device_train_batch_size: 4, gradient_accumulation_steps: 2, "
                "max_grad_norm: 1.0, optimizer: sgd, stage1: {steps: 4}, stage2: {steps: 4}}\n"
            )
        with pytest.raises(ConfigError, match=r"training_config\.yaml:4:\d+: training\.optimizer"):
            convert(one_of(source), options)
        text = (source / "training_config.yaml").read_text(encoding="utf-8")
        mended = source.parent / "mended.yaml"
        mended.write_text(text.replace("optimizer: sgd, ", ""), encoding="utf-8")
        run = convert(one_of(source), dataclasses.replace(options, config=mended)).directory
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        assert config["trainer"]["gradient_clip_val"] == 1.0
        assert config["trainer"]["accumulate_grad_batches"] == 2
        assert config["training"]["batch_size"] == 8
        assert config["schedule"]["stage1_steps"] == 4

    def test_nothing_is_overwritten(self, legacy_run, options):
        taken = options.output / "colors_lora_20250720_143052"
        taken.mkdir(parents=True)
        (taken / "mine").touch()
        run = convert(one_of(legacy_run()), options).directory
        assert run.name == "colors_lora_20250720_143052_2"
        assert files_of(taken) == ["mine"]

    def test_half_a_run_is_not_left(self, legacy_run, options, monkeypatch):
        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("loragen.legacy.convert.write_manifest", fail)
        with pytest.raises(OSError, match="disk full"):
            convert(one_of(legacy_run()), options)
        assert list(options.output.iterdir()) == []

    def test_a_final_model_of_the_last_step_is_no_second_checkpoint(self, legacy_run, options):
        source = legacy_run()
        shutil.copy(source / "checkpoints" / "step_008.pt", source / "models" / "final_step_8.pt")
        weights = load_plain(source / "checkpoints" / "step_008.pt")["lora_state_dict"]
        torch.save(weights, source / "models" / "best.pt")
        converted = convert(one_of(source), options)
        assert converted.manifest.steps == STEPS
        assert converted.left_out == [f"{source / 'models' / 'best.pt'}: belongs to no step"]

    def test_a_lone_result_is_of_the_last_step_of_the_configuration(self, legacy_run, options):
        source = legacy_run()
        document = load_plain(source / "checkpoints" / "step_008.pt")
        torch.save(document["lora_state_dict"], source / "models" / "lora.pt")
        shutil.rmtree(source / "checkpoints")
        with pytest.raises(DataError, match=r"lora\.pt: no step in it or in its name"):
            convert(one_of(source), options)
        with (source / "training_config.yaml").open("a", encoding="utf-8") as file:
            file.write("training: {max_steps: 125, stage1: {steps: 75, learning_rate: 2.0e-4}}\n")
        converted = convert(one_of(source), options)
        assert converted.manifest.steps == [125]
        text = (converted.directory / "config.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(text)["schedule"]["learning_rate_stage1"] == 2e-4
        assert converted.assumed == ["training.batch_size", "data.max_length", "seed"]

    def test_layers_left_out_of_the_training_are_named_by_paths(self, legacy_run, options):
        source = legacy_run()
        for file in (source / "checkpoints").iterdir():
            document = torch.load(file, weights_only=True)
            kept = {k: v for k, v in document["lora_state_dict"].items() if ".layers.1." in k}
            torch.save({"step": document["step"], "lora_state_dict": kept}, file)
        converted = convert(one_of(source), options)
        targets = converted.manifest.adapter_config["target_modules"]
        assert "model.layers.1.mlp.up_proj" in targets
        assert len(targets) == 7

    def test_a_base_that_is_not_here_is_taken_at_its_word(self, legacy_run, options, caplog):
        source = legacy_run("torch", yaml=False)
        yaml = "lora_alpha: 4.0\nbase_model: 'D:\\models\\Qwen'\n"
        (source / "training.yaml").write_text(yaml, encoding="utf-8")
        converted = convert(one_of(source), ConversionOptions(options.output, data_root=Path("no")))
        assert "base D:\\models\\Qwen is not here: fit and order of the tensors" in caplog.text
        assert converted.manifest.base_model == "D:\\models\\Qwen"
        assert converted.optimizer_states == 4
        record = converted.manifest.dataset
        assert (record.name, record.path, record.sha256, record.rows) == ("colors", "", "", 0)

    def test_bad_rows_of_the_dataset_are_not_counted(self, legacy_run, options, dataset):
        file = dataset()
        with file.open("a", encoding="utf-8") as opened:
            opened.write('{"prompt": "no answer"}\n')
        given = dataclasses.replace(options, dataset=str(file))
        record = convert(one_of(legacy_run()), given).manifest.dataset
        assert (record.rows, record.path) == (12, str(file))

    @pytest.mark.parametrize("recorded, name", [("gsm8k.v2", "gsm8k.v2"), ("some/set", "set")])
    def test_a_recorded_dataset_that_is_not_here(
        self, legacy_run, options, tmp_path, recorded, name, monkeypatch
    ):
        def offline(*_):
            raise UsageError("the hub does not answer")

        monkeypatch.setattr("loragen.core.data.documents.read_hub", offline)
        folder = tmp_path / "bare"
        shutil.copytree(legacy_run("safetensors") / "checkpoints", folder)
        text = f"dataset: {recorded}\nlora_alpha: 4\nbase_model: some/base\n"
        (folder / "c.yaml").write_text(text, encoding="utf-8")
        record = convert(one_of(folder), options).manifest.dataset
        assert (record.name, record.path) == (name, "")
        with pytest.raises(UsageError, match="does not answer"):
            convert(one_of(folder), dataclasses.replace(options, dataset="hub:some/set"))

    def test_rslora_is_said_as_plain_alpha(self, legacy_run, options):
        source = legacy_run("peft", yaml=False)
        for file in source.rglob("adapter_config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**config, "use_rslora": True}), encoding="utf-8")
        config = convert(one_of(source), options).manifest.adapter_config
        assert config["lora_alpha"] / 2 == pytest.approx(4 / 2**0.5)
        assert not config["use_rslora"]


class TestRefusals:
    def test_what_is_not_recorded_is_asked_for(self, legacy_run, options, tmp_path):
        source = one_of(legacy_run(yaml=False))
        with pytest.raises(UsageError, match=r"alpha is not recorded .* give --alpha"):
            convert(source, options)
        with pytest.raises(UsageError, match="base model is not recorded; give --base-model"):
            convert(source, ConversionOptions(options.output, alpha=4))
        bare = shutil.copytree(source.directory / "checkpoints", tmp_path / "bare")
        with pytest.raises(UsageError, match="which dataset is it of"):
            convert(one_of(bare), options)

    @pytest.mark.parametrize(
        "damage, reason",
        [
            ("nan", "NaN or infinity in 1 tensors"),
            ("shape", "other tensors than most: .* has shape"),
            ("missing", "other tensors than most: 1 tensors are missing"),
            ("cut", "not a checkpoint that loads safely"),
            ("empty", "no LoRA tensors in it"),
        ],
    )
    def test_a_bad_checkpoint_fails_the_run_unless_it_is_skipped(
        self, legacy_run, options, damage, reason
    ):
        source = legacy_run()
        file = source / "checkpoints" / "step_006.pt"
        document = torch.load(file, weights_only=True)
        weights = document["lora_state_dict"]
        key = next(iter(weights))
        if damage == "nan":
            weights[key][0, 0] = float("nan")
        elif damage == "shape":
            weights[key] = weights[key][:, :-1].clone()
        elif damage == "missing":
            del weights[key]
        elif damage == "empty":
            weights.clear()
        torch.save(document, file)
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(DataError, match=rf"step_006\.pt: {reason}.*--skip-bad leaves it out"):
            convert(one_of(source), options)
        assert not options.output.exists()
        skipping = ConversionOptions(options.output, data_root=options.data_root, skip_bad=True)
        converted = convert(one_of(source), skipping)
        assert converted.manifest.steps == [5, 7, 8]
        assert len(converted.left_out) == 1
        assert "step_006.pt" in converted.left_out[0]

    def test_steps_count_from_one(self, legacy_run, options):
        source = legacy_run()
        folder = source / "checkpoints"
        shutil.copy(folder / "step_005.pt", folder / "step_000.pt")
        with pytest.raises(DataError, match=r"step_000\.pt: step 0: .* rename it .*--skip-bad"):
            convert(one_of(source), options)

    def test_a_base_that_was_given_has_to_be_there(self, legacy_run, options):
        given = dataclasses.replace(options, base_model="./tpyo")
        with pytest.raises(UsageError, match=r"base model \./tpyo: no such directory"):
            convert(one_of(legacy_run()), given)

    def test_all_that_is_wrong_is_told_at_once(self, legacy_run, options):
        source = legacy_run()
        for name in ("step_005.pt", "step_007.pt"):
            (source / "checkpoints" / name).write_bytes(b"broken")
        with pytest.raises(DataError) as error:
            convert(one_of(source), options)
        assert len(error.value.problems) == 2

    def test_two_different_checkpoints_of_one_step(self, legacy_run, options):
        source = legacy_run()
        shutil.copy(source / "checkpoints" / "step_007.pt", source / "models" / "step_8.pt")
        with pytest.raises(DataError, match="step 8 again, with other weights than"):
            convert(one_of(source), options)

    def test_an_adapter_of_another_base(self, legacy_run, options):
        source = legacy_run()
        wrong = ConversionOptions(options.output, base_model="demo")
        with pytest.raises(DataError, match="does not fit the base model demo: "):
            convert(one_of(source), wrong)

    def test_more_than_plain_lora(self, legacy_run, options):
        source = legacy_run("peft")
        for file in source.rglob("adapter_config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**config, "use_dora": True}), encoding="utf-8")
        with pytest.raises(DataError, match="use_dora: only plain LoRA can be converted"):
            convert(one_of(source), options)

    def test_one_dataset_for_runs_of_two(self, legacy_run, options):
        runs = find_runs(legacy_run(dataset="colors").parents[1])
        check_one_dataset(runs, ConversionOptions(dataset="x"))
        runs += find_runs(legacy_run(dataset="animals"))
        with pytest.raises(UsageError, match="the runs are of 2: animals, colors"):
            check_one_dataset(runs, ConversionOptions(dataset="x"))

    def test_a_dataset_file_that_was_named_has_to_be_there(self, legacy_run, options):
        with pytest.raises(UsageError, match=r"none\.jsonl: no such file"):
            convert(one_of(legacy_run()), ConversionOptions(options.output, dataset="none.jsonl"))
