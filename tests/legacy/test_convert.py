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
from loragen.core.run.checkpoints import load_adapter, load_weights_only
from loragen.core.run.directory import LoraManifest, checkpoint_name, read_manifest
from loragen.legacy.convert import ConversionOptions, check_one_dataset, convert, convert_optimizer
from loragen.legacy.experiments import find_runs

from .runs import CONTAINERS, STEPS, only_run


@pytest.fixture
def options(tmp_path, collection):
    return ConversionOptions(output=tmp_path / "runs", data_root=collection.data)


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def files_of(directory):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def change_adapter_configs(run, **fields):
    for file in run.rglob("adapter_config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, **fields}), encoding="utf-8")


class TestRunDirectory:
    @pytest.mark.parametrize("container", CONTAINERS)
    def test_every_container_gives_the_weights_bit_for_bit(
        self, legacy_run, options, collection, container
    ):
        source = legacy_run(container)
        before = {p: sha256(p) for p in source.rglob("*") if p.is_file()}
        result = convert(only_run(source), options)
        assert result.directory == options.output / "colors_lora_20250720_143052"
        assert (result.left_out, result.manifest.steps) == ([], STEPS)
        for step in STEPS:
            name = f"checkpoints/{checkpoint_name(step)}"
            document = load_weights_only(result.directory / name)
            expected = load_weights_only(collection.runs["colors"] / name)
            assert equal(document["state_dict"], expected["state_dict"])
            assert list(document["state_dict"]) == list(expected["state_dict"])  # in model order
            assert (document["global_step"], document["epoch"]) == (step, 0)
        assert {p: sha256(p) for p in source.rglob("*") if p.is_file()} == before

    def test_it_has_the_files_and_the_manifest_of_a_trained_run(
        self, legacy_run, options, collection
    ):
        run = convert(only_run(legacy_run()), options).directory
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
        trained = read_manifest(collection.runs["colors"], LoraManifest)
        assert manifest.status == "success"
        assert manifest.base_model == str(collection.base)
        assert manifest.dataset == trained.dataset.model_copy(update={"tokens": ""})
        for key in ("r", "lora_alpha", "task_type", "peft_type", "bias"):
            assert manifest.adapter_config[key] == trained.adapter_config[key]
        names = {path.rpartition(".")[2] for path in trained.adapter_config["target_modules"]}
        assert manifest.adapter_config["target_modules"] == sorted(names)
        assert manifest.started.startswith("2025-07-20T14:30:52")
        text = (run / "config.yaml").read_text(encoding="utf-8")
        config = LoraTrainConfig.model_validate(yaml.safe_load(text))
        assert (config.lora.rank, config.lora.alpha) == (2, 4)
        assert (config.training.max_steps, config.checkpoints.first_step) == (8, 5)
        assert config.data.dataset == str(collection.file("colors"))
        last = load_adapter(run / "checkpoints" / checkpoint_name(8)).tensors
        assert equal(read_adapter(run / "adapter").tensors, last)

    def test_a_run_is_converted_once(self, legacy_run, options):
        source = only_run(legacy_run())
        first = convert(source, options)
        again = convert(source, options)
        assert again.already
        assert again.directory == first.directory
        shutil.rmtree(first.directory)
        assert not convert(source, options).already

    def test_single_files_of_one_folder_are_converted_separately(self, legacy_run, options):
        folder = legacy_run(yaml=False) / "checkpoints"
        given = ConversionOptions(options.output, "some/base", "colors", options.data_root, alpha=4)
        for step in (5, 6):
            result = convert(only_run(folder / f"step_00{step}.pt"), given)
            assert (result.already, result.manifest.steps) == (False, [step])
        assert convert(only_run(folder / "step_005.pt"), given).already

    def test_nothing_is_overwritten(self, legacy_run, options):
        existing = options.output / "colors_lora_20250720_143052"
        existing.mkdir(parents=True)
        (existing / "mine").touch()
        run = convert(only_run(legacy_run()), options).directory
        assert run.name == "colors_lora_20250720_143052_2"
        assert files_of(existing) == ["mine"]

    def test_a_failure_leaves_nothing_behind(self, legacy_run, options, monkeypatch):
        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("loragen.legacy.convert.write_manifest", fail)
        with pytest.raises(OSError, match="disk full"):
            convert(only_run(legacy_run()), options)
        assert list(options.output.iterdir()) == []


class TestSettings:
    def test_the_configuration_of_the_training(self, legacy_run, options):
        source = legacy_run()
        with (source / "training_config.yaml").open("a", encoding="utf-8") as file:
            file.write(
                "training: {per_device_train_batch_size: 4, gradient_accumulation_steps: 2, "
                "max_grad_norm: 1.0, optimizer: sgd, stage1: {steps: 4}, stage2: {steps: 4}}\n"
            )
        with pytest.raises(ConfigError, match=r"training_config\.yaml:4:\d+: training\.optimizer"):
            convert(only_run(source), options)
        text = (source / "training_config.yaml").read_text(encoding="utf-8")
        corrected = source.parent / "corrected.yaml"
        corrected.write_text(text.replace("optimizer: sgd, ", ""), encoding="utf-8")
        given = dataclasses.replace(options, config=corrected)
        run = convert(only_run(source), given).directory
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        assert config["trainer"]["gradient_clip_val"] == 1.0
        assert config["trainer"]["accumulate_grad_batches"] == 2
        assert config["training"]["batch_size"] == 8
        assert config["schedule"]["stage1_steps"] == 4

    def test_a_final_model_belongs_to_no_step(self, legacy_run, options):
        source = legacy_run()
        shutil.copy(source / "checkpoints" / "step_008.pt", source / "models" / "final_step_8.pt")
        weights = load_weights_only(source / "checkpoints" / "step_008.pt")["lora_state_dict"]
        torch.save(weights, source / "models" / "best.pt")
        result = convert(only_run(source), options)
        assert result.manifest.steps == STEPS
        (left_out,) = result.left_out
        assert left_out.startswith(f"{source / 'models' / 'best.pt'}: ")

    def test_a_lone_final_model_has_the_last_step_of_the_configuration(self, legacy_run, options):
        source = legacy_run()
        document = load_weights_only(source / "checkpoints" / "step_008.pt")
        torch.save(document["lora_state_dict"], source / "models" / "lora.pt")
        shutil.rmtree(source / "checkpoints")
        with pytest.raises(DataError, match=r"lora\.pt: no step"):
            convert(only_run(source), options)
        with (source / "training_config.yaml").open("a", encoding="utf-8") as file:
            file.write("training: {max_steps: 125, stage1: {steps: 75, learning_rate: 2.0e-4}}\n")
        result = convert(only_run(source), options)
        assert result.manifest.steps == [125]
        text = (result.directory / "config.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(text)["schedule"]["learning_rate_stage1"] == 2e-4
        assert result.assumed == ["training.batch_size", "data.max_length", "seed"]

    def test_target_modules_of_some_layers_are_full_paths(self, legacy_run, options):
        source = legacy_run()
        for file in (source / "checkpoints").iterdir():
            document = torch.load(file, weights_only=True)
            kept = {k: v for k, v in document["lora_state_dict"].items() if ".layers.1." in k}
            torch.save({"step": document["step"], "lora_state_dict": kept}, file)
        targets = convert(only_run(source), options).manifest.adapter_config["target_modules"]
        assert "model.layers.1.mlp.up_proj" in targets
        assert len(targets) == 7

    def test_rslora_is_converted_to_plain_alpha(self, legacy_run, options):
        source = legacy_run("peft", yaml=False)
        change_adapter_configs(source, use_rslora=True)
        config = convert(only_run(source), options).manifest.adapter_config
        assert config["lora_alpha"] / 2 == pytest.approx(4 / 2**0.5)
        assert not config["use_rslora"]

    def test_a_recorded_base_may_be_on_another_machine(self, legacy_run, options, caplog):
        source = legacy_run("torch", yaml=False)
        text = "lora_alpha: 4.0\nbase_model: 'D:\\models\\Qwen'\n"
        (source / "training.yaml").write_text(text, encoding="utf-8")
        given = ConversionOptions(options.output, data_root=Path("no"))
        result = convert(only_run(source), given)
        assert "base model D:\\models\\Qwen is not on this machine" in caplog.text
        assert result.manifest.base_model == "D:\\models\\Qwen"
        assert result.optimizer_states == 4
        record = result.manifest.dataset
        assert (record.name, record.path, record.sha256, record.rows) == ("colors", "", "", 0)

    def test_bad_rows_of_the_dataset_are_not_counted(self, legacy_run, options, dataset):
        file = dataset()
        with file.open("a", encoding="utf-8") as opened:
            opened.write('{"prompt": "no answer"}\n')
        given = dataclasses.replace(options, dataset=str(file))
        record = convert(only_run(legacy_run()), given).manifest.dataset
        assert (record.rows, record.path) == (12, str(file))

    @pytest.mark.parametrize("recorded, name", [("gsm8k.v2", "gsm8k.v2"), ("some/set", "set")])
    def test_a_recorded_dataset_may_be_on_another_machine(
        self, legacy_run, options, tmp_path, recorded, name, monkeypatch
    ):
        def offline(*_):
            raise UsageError("the hub does not answer")

        monkeypatch.setattr("loragen.core.data.documents.read_hub", offline)
        folder = tmp_path / "bare"
        shutil.copytree(legacy_run("safetensors") / "checkpoints", folder)
        text = f"dataset: {recorded}\nlora_alpha: 4\nbase_model: some/base\n"
        (folder / "c.yaml").write_text(text, encoding="utf-8")
        record = convert(only_run(folder), options).manifest.dataset
        assert (record.name, record.path) == (name, "")
        with pytest.raises(UsageError, match="does not answer"):
            convert(only_run(folder), dataclasses.replace(options, dataset="hub:some/set"))


class TestErrors:
    def test_settings_that_are_not_recorded(self, legacy_run, options, tmp_path):
        source = only_run(legacy_run(yaml=False))
        with pytest.raises(UsageError) as error:
            convert(source, options)
        alpha, base = error.value.problems
        assert "--alpha" in alpha
        assert "--base-model" in base
        bare = shutil.copytree(source.directory / "checkpoints", tmp_path / "bare")
        with pytest.raises(UsageError, match=f"{bare}: .*--dataset"):
            convert(only_run(bare), options)

    @pytest.mark.parametrize(
        "damage, word",
        [
            ("nan", "NaN"),
            ("shape", "has shape"),
            ("missing", "1 tensors are missing"),
            ("cut", "truncated"),
            ("empty", "no LoRA tensors"),
        ],
    )
    def test_a_bad_checkpoint_fails_the_run_unless_it_is_skipped(
        self, legacy_run, options, damage, word
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
        with pytest.raises(DataError, match=rf"step_006\.pt: .*{word}.*--skip-bad"):
            convert(only_run(source), options)
        assert not options.output.exists()
        result = convert(only_run(source), dataclasses.replace(options, skip_bad=True))
        assert result.manifest.steps == [5, 7, 8]
        (left_out,) = result.left_out
        assert "step_006.pt: " in left_out

    def test_all_bad_checkpoints_at_once(self, legacy_run, options):
        source = legacy_run()
        for name in ("step_005.pt", "step_007.pt"):
            (source / "checkpoints" / name).write_bytes(b"broken")
        with pytest.raises(DataError) as error:
            convert(only_run(source), options)
        assert len(error.value.problems) == 2

    def test_a_base_given_as_a_flag_must_exist(self, legacy_run, options):
        given = dataclasses.replace(options, base_model="./tpyo")
        with pytest.raises(UsageError, match=r"\./tpyo: no such directory"):
            convert(only_run(legacy_run()), given)

    def test_an_adapter_of_another_base(self, legacy_run, options):
        given = ConversionOptions(options.output, base_model="demo")
        with pytest.raises(DataError, match=r"step_008\.pt: .*base model demo: "):
            convert(only_run(legacy_run()), given)

    @pytest.mark.parametrize(
        "change, word",
        [
            (lambda w: {k: v for k, v in w.items() if "lora_A" in k}, "pairs"),
            (
                lambda w: {k: torch.ones(3, 3) if "q_proj" in k else v for k, v in w.items()},
                "ranks",
            ),
            (lambda w: {k.replace("proj", "else"): v for k, v in w.items()}, "base model"),
        ],
    )
    def test_tensors_that_are_no_adapter_of_the_base(self, legacy_run, options, change, word):
        source = legacy_run()
        for file in (source / "checkpoints").iterdir():
            document = torch.load(file, weights_only=True)
            weights = change(document["lora_state_dict"])
            torch.save({"step": document["step"], "lora_state_dict": weights}, file)
        with pytest.raises(DataError, match=rf"step_008\.pt: .*{word}"):
            convert(only_run(source), options)

    @pytest.mark.parametrize(
        "fields, word",
        [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"r": None}, "")],
    )
    def test_more_than_plain_lora(self, legacy_run, options, fields, word):
        source = legacy_run("peft")
        change_adapter_configs(source, **fields)
        with pytest.raises(DataError, match=rf"adapter_config\.json: .*{word}"):
            convert(only_run(source), options)

    def test_one_dataset_given_for_runs_of_two(self, legacy_run):
        runs = find_runs(legacy_run(dataset="colors").parents[1])
        check_one_dataset(runs, ConversionOptions(dataset="x"))
        runs += find_runs(legacy_run(dataset="animals"))
        with pytest.raises(UsageError, match=r"--dataset x: .*animals, colors"):
            check_one_dataset(runs, ConversionOptions(dataset="x"))

    def test_a_dataset_file_given_as_a_flag_must_exist(self, legacy_run, options):
        with pytest.raises(UsageError, match=r"none\.jsonl: no such file"):
            convert(only_run(legacy_run()), ConversionOptions(options.output, dataset="none.jsonl"))


class TestOptimizer:
    @pytest.mark.parametrize("container, states", [("torch", 4), ("peft", 4), ("full", 0)])
    def test_the_state_is_converted_where_the_order_is_certain(
        self, legacy_run, options, collection, container, states
    ):
        result = convert(only_run(legacy_run(container)), options)
        assert result.optimizer_states == states
        name = f"checkpoints/{checkpoint_name(7)}"
        found = load_weights_only(result.directory / name)["optimizer_states"]
        assert len(found) == bool(states)
        if not states:
            return
        (expected,) = load_weights_only(collection.runs["colors"] / name)["optimizer_states"]
        for index, moments in expected["state"].items():
            assert equal(found[0]["state"][index], moments)
        optimizer = torch.optim.AdamW(
            [torch.zeros_like(m["exp_avg"]) for m in expected["state"].values()], lr=1.0
        )
        optimizer.load_state_dict(found[0])
        group, trained = found[0]["param_groups"][0], expected["param_groups"][0]
        assert {**group, "lr": None} == {**trained, "lr": None}

    @pytest.mark.parametrize(
        "change",
        [
            lambda s: s["state"].pop(0),
            lambda s: s["state"][0].update(max_exp_avg_sq=torch.ones(2, 2)),
            lambda s: s["state"][0].update(exp_avg=torch.ones(3, 2)),
            lambda s: s["state"][0].update(exp_avg=torch.full((2, 2), float("nan"))),
            lambda s: s["state"][0].update(exp_avg=1.0),
            lambda s: s.pop("state"),
            lambda s: s["param_groups"][0].update(decoupled_weight_decay=False),
            lambda s: s["param_groups"][0].update(betas=(2.0, 2.0)),
            lambda s: s["param_groups"][0].pop("params"),
        ],
    )
    def test_a_state_that_does_not_fit_is_left_out(self, change):
        tensors = {"a": torch.zeros(2, 2, requires_grad=True)}
        frozen = torch.zeros(5, requires_grad=True)
        optimizer = torch.optim.AdamW([frozen, *tensors.values()], lr=0.1)
        tensors["a"].sum().backward()
        optimizer.step()
        state = optimizer.state_dict()
        assert convert_optimizer(state, tensors, 0.1)["param_groups"][0]["params"] == [0]
        state["state"] = {0: state["state"][1]}
        state["param_groups"][0]["params"] = [0]
        change(state)
        assert convert_optimizer(state, tensors, 0.1) is None
