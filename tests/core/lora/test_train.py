import contextlib
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from loragen.core.adapter.checks import file_keys
from loragen.core.adapter.files import read_adapter
from loragen.core.base.load import load_training_base
from loragen.core.config import LoraTrainConfig, load
from loragen.core.data.dataset import Dataset
from loragen.core.errors import DataError, LoragenError, UsageError
from loragen.core.files import sha256
from loragen.core.lora import train as training
from loragen.core.lora.data import load_rows
from loragen.core.progress import Silent
from loragen.core.run.checkpoints import load_adapter
from loragen.core.run.directory import LoraManifest, checkpoint_files, read_manifest


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def distance(one, other):
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def files(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def checkpoint(run, step):
    file = run.directory / "checkpoints" / f"checkpoint-step-{step:03d}.ckpt"
    return torch.load(file, weights_only=True)


def last_tensors(run):
    return load_adapter(checkpoint_files(run.directory)[-1]).tensors


class Watching(Silent):
    """Remembers the steps, and may stop the training at one of them."""

    def __init__(self, at=0, error=None):
        self.steps, self.at, self.error = [], at, error

    def step(self, step):
        self.steps.append(step)
        if step.step == self.at:
            raise self.error


class TestARun:
    def test_files_are_as_documented(self, collection):
        assert files(collection.runs["colors"]) == {
            "config.yaml",
            "manifest.json",
            "metrics.jsonl",
            ".run.lock",
            *(f"checkpoints/checkpoint-step-00{step}.ckpt" for step in (5, 6, 7, 8)),
            "adapter/README.md",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        }

    def test_the_manifest_describes_the_run(self, collection):
        run = collection.runs["colors"]
        manifest = read_manifest(run, LoraManifest)
        file = collection.file("colors")
        assert manifest.status == "success"
        assert manifest.seconds > 0
        assert manifest.steps == [5, 6, 7, 8]
        assert manifest.base_model == str(collection.base)
        assert manifest.dataset.model_dump(exclude={"tokens", "too_long", "validation"}) == {
            "name": "colors", "path": str(file), "sha256": sha256(file), "rows": 16,
        }  # fmt: skip
        assert manifest.adapter_config == read_adapter(run / "adapter").config
        assert [record.name for record in manifest.plugins] == ["two-stage"]
        assert manifest.final_loss > 0

    def test_the_saved_configuration_loads(self, collection):
        run = collection.runs["colors"]
        config = load(LoraTrainConfig, run / "config.yaml", environment={})
        assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) == json.loads(
            config.model_dump_json()
        )
        assert config.training.max_steps == 8

    def test_a_checkpoint_holds_only_the_adapter_and_its_optimizer(self, collection):
        file = checkpoint_files(collection.runs["colors"])[-1]
        document = torch.load(file, weights_only=True)
        adapter = read_adapter(collection.runs["colors"] / "adapter").tensors
        assert equal(file_keys(document["state_dict"], "x"), adapter)
        assert len(document["state_dict"]) == len(adapter)
        (optimizer,) = document["optimizer_states"]
        assert len(optimizer["state"]) == len(adapter)
        assert document["global_step"] == 8

    def test_the_final_model_is_the_base_with_the_adapter_merged(self, train_lora, base):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        run = train_lora({"final_model": "merged"}).directory
        assert {name for name in files(run) if name.startswith("final_model/")} == {
            "final_model/chat_template.jinja",
            "final_model/config.json",
            "final_model/generation_config.json",
            "final_model/model.safetensors",
            "final_model/tokenizer.json",
            "final_model/tokenizer_config.json",
        }
        ids = torch.arange(20).view(2, 10)
        with torch.inference_mode():
            without = base.model(ids).logits
            adapted = PeftModel.from_pretrained(base.model, str(run / "adapter")).eval()
            wanted = adapted(ids).logits
            merged = AutoModelForCausalLM.from_pretrained(run / "final_model").eval()
            assert (merged(ids).logits - wanted).abs().max() < 1e-4
        assert (wanted - without).abs().max() > 1e-2
        tokenizer = AutoTokenizer.from_pretrained(run / "final_model")
        assert tokenizer("red cat").input_ids == base.tokenizer("red cat").input_ids
        assert tokenizer.chat_template == base.tokenizer.chat_template

    def test_the_final_model_has_the_stored_dtype_of_the_base(
        self, base, tmp_path, lora_config, dataset
    ):
        base.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
        base.tokenizer.save_pretrained(tmp_path / "half")
        config = lora_config({"base_model": str(tmp_path / "half"), "final_model": "merged"})
        half = load_training_base(config)
        run = training.train_adapter(config, Dataset(dataset(), "colors"), half, Silent())
        stored = load_file(run.directory / "final_model" / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.bfloat16}
        config_file = run.directory / "final_model" / "config.json"
        assert json.loads(config_file.read_text(encoding="utf-8"))["dtype"] == "bfloat16"
        assert {t.dtype for t in last_tensors(run).values()} == {torch.float32}

    def test_training_reduces_the_loss(self, lora_config, base, dataset):
        watching = Watching()
        config = lora_config({"training.max_steps": 40, "schedule.stage1_steps": 30})
        run = training.train_adapter(config, Dataset(dataset(), "colors"), base, watching)
        assert watching.steps[-1].loss < 0.5 * watching.steps[0].loss
        assert run.manifest.final_loss == watching.steps[-1].loss


class TestSteps:
    def test_each_step_has_the_rate_of_its_stage(self, lora_config, base, dataset):
        """Three steps of stage 1, then stage 2; a checkpoint's optimizer says it too."""
        watching = Watching()
        config = lora_config(
            {"training.max_steps": 6, "schedule.stage1_steps": 3, "checkpoints.first_step": 2}
        )
        run = training.train_adapter(config, Dataset(dataset(), "colors"), base, watching)
        assert [(s.step, s.stage) for s in watching.steps] == [
            (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2),
        ]  # fmt: skip
        assert {s.total for s in watching.steps} == {6}
        rates = {step: checkpoint(run, step)["lr_schedulers"][0] for step in (2, 3, 4, 6)}
        assert {step: rate["_last_lr"] for step, rate in rates.items()} == {
            2: [1e-2], 3: [1e-3], 4: [1e-3], 6: [1e-3],
        }  # fmt: skip

    def test_the_first_update_of_stage_2_is_small(self, train_lora):
        """AdamW moves a weight by about the rate: the step after the last of stage 1 by 1e-3."""
        run = train_lora({"checkpoints.first_step": 1, "training.max_steps": 6})
        moved = [
            distance(checkpoint(run, step)["state_dict"], checkpoint(run, step - 1)["state_dict"])
            for step in (2, 3, 4, 5, 6)
        ]
        assert all(5e-3 < move < 5e-2 for move in moved[:3])
        assert all(5e-4 < move < 5e-3 for move in moved[3:])

    @pytest.mark.parametrize(
        "first, every, kept",
        [(5, 1, [5, 6, 7, 8]), (2, 4, [2, 6, 8]), (9, 1, [8]), (1, 100, [1, 8])],
    )
    def test_the_configured_steps_and_the_last_are_kept(self, train_lora, first, every, kept):
        run = train_lora({"checkpoints.first_step": first, "checkpoints.every": every})
        names = [f"checkpoint-step-{step:03d}.ckpt" for step in kept]
        assert [file.name for file in checkpoint_files(run.directory)] == names
        assert run.manifest.steps == kept

    @pytest.mark.parametrize(
        "keeps, with_state", [("all", [5, 6, 7, 8]), ("last", [8]), ("none", [])]
    )
    def test_which_checkpoints_carry_the_optimizer(self, train_lora, keeps, with_state):
        run = train_lora({"checkpoints.optimizer": keeps})
        carrying = [s for s in (5, 6, 7, 8) if checkpoint(run, s)["optimizer_states"]]
        assert carrying == with_state


class TestSameness:
    def test_every_dataset_starts_from_the_same_adapter(self, lora_config, base):
        first = training.new_adapter(base, lora_config())
        start = state(first)
        first.unload()
        again = training.new_adapter(base, lora_config({"data.dataset": "other"}))
        assert equal(state(again), start)
        again.unload()
        other = training.new_adapter(base, lora_config({"seed": 43}))
        assert not equal(state(other), start)

    def test_the_first_step_of_two_datasets_differs_by_their_rows_only(self, train_lora, dataset):
        """lora_A starts equal and has no gradient while lora_B is zero."""
        animals = dataset([{"prompt": "q", "response": "cat"}] * 5, "animals.jsonl")
        settings = {"training.max_steps": 1, "checkpoints.first_step": 1}
        one = last_tensors(train_lora(settings))
        other = last_tensors(train_lora(settings, file=animals, name="animals"))
        for key in one:
            assert one[key].equal(other[key]) == ("lora_A" in key), key

    def test_a_frozen_a_is_shared_by_all_datasets_and_saved(self, train_lora, dataset, lora_config):
        animals = dataset([{"prompt": "q", "response": "cat"}] * 5, "animals.jsonl")
        settings = {"lora.freeze_a": True}
        one = train_lora(settings)
        other = last_tensors(train_lora(settings, file=animals, name="animals"))
        for key, tensor in last_tensors(one).items():
            assert tensor.equal(other[key]) == ("lora_A" in key), key
        values, trained, _ = training.count_values(lora_config(settings))
        (optimizer,) = checkpoint(one, 8)["optimizer_states"]
        assert len(optimizer["state"]) == len(last_tensors(one)) / 2
        assert trained == sum(t.numel() for k, t in last_tensors(one).items() if "lora_B" in k)
        assert trained < values

    def test_the_same_run_twice_is_equal_bit_for_bit(self, train_lora):
        settings = {"lora.dropout": 0.3, "checkpoints.first_step": 1}
        one, other = train_lora(settings), train_lora(settings)
        for step in range(1, 9):
            first, second = checkpoint(one, step), checkpoint(other, step)
            assert equal(first["state_dict"], second["state_dict"])
        assert one.directory != other.directory

    def test_another_seed_is_another_run(self, train_lora):
        assert not equal(last_tensors(train_lora()), last_tensors(train_lora({"seed": 1})))

    def test_the_base_is_unchanged_afterwards(self, lora_config, base, dataset):
        before, kind, rng = state(base.model), type(base.model), torch.get_rng_state()
        training.train_adapter(lora_config(), Dataset(dataset(), "colors"), base, Silent())
        assert type(base.model) is kind
        assert equal(state(base.model), before)
        assert not any(p.requires_grad for p in base.model.parameters())
        assert torch.get_rng_state().equal(rng)
        assert base.model.config.dtype == torch.float32

    @pytest.mark.parametrize("parts", [2, 4])
    def test_accumulation_does_not_change_the_result(self, lora_config, base_dir, dataset, parts):
        file = dataset(
            [{"prompt": "q" * i, "response": "red cat"[: 1 + i % 7]} for i in range(1, 9)]
        )
        results = []
        for rounds in (1, parts):
            config = lora_config(
                {
                    "training.packing": False,  # the base's norms are in float32 whatever it is in
                    "trainer.precision": "64-true",
                    "trainer.accumulate_grad_batches": rounds,
                }
            )
            watching = Watching()
            base = load_training_base(config)
            run = training.train_adapter(config, Dataset(file, "colors"), base, watching)
            results.append((last_tensors(run), watching.steps))
        (one, steps), (other, others) = results
        assert {t.dtype for t in one.values()} == {torch.float64}
        assert distance(one, other) < 1e-10
        assert [s.step for s in steps] == [s.step for s in others] == list(range(1, 9))
        assert [s.loss for s in steps] == pytest.approx([s.loss for s in others], abs=1e-10)

    def test_a_dataset_may_be_smaller_than_a_batch(self, train_lora, dataset):
        file = dataset([{"prompt": "q", "response": "red"}, {"prompt": "w", "response": "blue"}])
        run = train_lora({"training.batch_size": 32}, file=file)
        assert run.manifest.status == "success"
        assert run.manifest.dataset.rows == 2


class TestValidation:
    def test_early_stopping_ends_the_run_and_keeps_its_last_step(self, lora_config, base, dataset):
        """Every row has an answer of its own: what is learned of one is wrong for another."""
        watching = Watching()
        file = dataset([{"prompt": "q", "response": f"{i * 7919}"} for i in range(8)])
        config = lora_config(
            {
                "data.val_ratio": 0.5,
                "training.max_steps": 60,
                "training.val_every": 2,
                "training.patience": 4,
                "schedule.learning_rate_stage1": 3e-2,
                "schedule.stage1_steps": 60,
                "checkpoints.first_step": 1000,
            }
        )
        run = training.train_adapter(config, Dataset(file, "colors"), base, watching)
        last = watching.steps[-1].step
        assert last < 60
        assert last % 2 == 0
        assert run.manifest.steps == [last]
        assert run.manifest.status == "success"
        adapter = read_adapter(run.directory / "adapter").tensors
        assert equal(adapter, last_tensors(run))

    def test_held_out_rows_are_not_trained_on(self, base, lora_config, dataset):
        config = lora_config({"data.val_ratio": 0.25})
        rows = load_rows(config, Dataset(dataset(), "colors"), base.tokenizer)
        assert (len(rows.training), len(rows.validation), rows.record.rows) == (9, 3, 12)

    def test_validation_metrics_are_logged(self, train_lora):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = train_lora(
            {"data.val_ratio": 0.25, "training.val_every": 4, "loggers": {"tensorboard": {}}}
        )
        events = EventAccumulator(str(run.directory / "tensorboard_logs")).Reload()
        assert [e.step for e in events.Scalars("val/loss")] == [4, 8]
        assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 9))
        rates = [e.value for e in events.Scalars("train/lr")]
        assert rates == pytest.approx([1e-2] * 4 + [1e-3] * 4)
        assert {e.value for e in events.Scalars("train/stage")} == {1.0, 2.0}

    def test_nothing_to_train_on_is_an_error(self, train_lora, dataset):
        file = dataset([{"prompt": "q", "response": "red"}])
        with pytest.raises(DataError, match=r"data\.val_ratio"):
            train_lora({"data.val_ratio": 0.9}, file=file)


class TestFailure:
    @pytest.mark.parametrize(
        "error, status",
        [(RuntimeError("disk on fire"), "failed"), (KeyboardInterrupt(), "interrupted")],
    )
    def test_the_manifest_records_how_a_run_ended(
        self, lora_config, base, dataset, tmp_path, error, status
    ):
        before = state(base.model)
        with pytest.raises(type(error)):
            training.train_adapter(
                lora_config(), Dataset(dataset(), "colors"), base, Watching(6, error)
            )
        (run,) = (tmp_path / "runs").iterdir()
        manifest = read_manifest(run, LoraManifest)
        assert manifest.status == status
        assert manifest.steps[0] == 5
        assert equal(state(base.model), before)
        assert not (run / "adapter").exists()

    @pytest.mark.parametrize(
        ("rate", "settings", "message"),
        [
            (1e30, {}, r"train/loss is nan at step 5"),
            (1e30, {"data.val_ratio": 0.25, "training.val_every": 1, "training.patience": 3},
             r"val/loss is nan at step 4"),
            (1e39, {"training.max_steps": 4}, r"is not finite at step 4"),
        ],
    )  # fmt: skip
    def test_a_diverging_training_is_a_failed_run(
        self, train_lora, tmp_path, rate, settings, message
    ):
        """From the fourth step on; what was saved before stays."""
        rates = {
            "schedule.stage1_steps": 3,
            "schedule.learning_rate_stage2": rate,
            "checkpoints.first_step": 2,
        }
        with pytest.raises(LoragenError, match=message) as raised:
            train_lora({**rates, **settings})
        assert "try a lower learning rate or trainer.gradient_clip_val=1.0" in str(raised.value)
        (run,) = (tmp_path / "runs").iterdir()
        manifest = read_manifest(run, LoraManifest)
        assert manifest.status == "failed"
        assert manifest.steps[:2] == [2, 3]
        for file in (run / "checkpoints").iterdir():
            adapter = torch.load(file, weights_only=True)["state_dict"]
            assert all(value.isfinite().all() for value in adapter.values())

    @pytest.mark.parametrize(
        "error, status", [(OSError("disk full"), "failed"), (KeyboardInterrupt(), "interrupted")]
    )
    def test_a_run_whose_results_cannot_be_written_is_not_successful(
        self, train_lora, monkeypatch, tmp_path, error, status
    ):
        def fail(*_):
            raise error

        monkeypatch.setattr(training, "save_merged", fail)
        with pytest.raises(type(error)):
            train_lora({"final_model": "merged"})
        (run,) = (tmp_path / "runs").iterdir()
        assert read_manifest(run, LoraManifest).status == status
        assert not (run / "final_model").exists()

    def test_the_next_dataset_trains_after_one_that_failed(self, lora_config, base, dataset):
        with pytest.raises(RuntimeError):
            error = RuntimeError("once")
            training.train_adapter(lora_config(), Dataset(dataset(), "a"), base, Watching(1, error))
        run = training.train_adapter(lora_config(), Dataset(dataset(), "colors"), base, Silent())
        assert run.manifest.status == "success"

    @pytest.mark.parametrize(
        "settings, rows, error, message",
        [
            ({}, [{"prompt": "q"}], DataError, ":1: 'response'"),
            ({"data.max_length": 8}, None, DataError, r"colors\.jsonl:1: the answer has"),
            ({"lora.target_modules": ["nope"]}, None, UsageError, r"lora\.target_modules: .*nope"),
            (
                {"trainer.accumulate_grad_batches": 2, "trainer.limit_train_batches": 1},
                [{"prompt": "q", "response": "red"}],
                UsageError,
                "leaves no whole step",
            ),
        ],
    )
    def test_a_training_that_cannot_start_writes_nothing(
        self, train_lora, dataset, tmp_path, settings, rows, error, message
    ):
        long = [{"prompt": "q", "response": "a long answer indeed"}]
        file = dataset(rows or long)
        with pytest.raises(error, match=message) as raised:
            train_lora(settings, file=file)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "runs").exists()

    def test_gradient_checkpointing_changes_no_bit(self, train_lora):
        plain, checkpointed = (
            train_lora({"training.gradient_checkpointing": wanted, "lora.dropout": 0.1})
            for wanted in (False, True)
        )
        assert plain.manifest.final_loss == checkpointed.manifest.final_loss
        assert equal(last_tensors(plain), last_tensors(checkpointed))

    def test_by_default_no_final_model_is_written(self, train_lora):
        run = train_lora()
        assert not (run.directory / "final_model").exists()
        assert (run.directory / "adapter").is_dir()


def test_the_adapter_of_a_moved_run_is_read(collection, tmp_path):
    from loragen.core.run.checkpoints import read_checkpointed_adapter

    moved = shutil.copytree(collection.runs["colors"], tmp_path / "moved")
    adapter = read_checkpointed_adapter(moved / "checkpoints" / "checkpoint-step-005.ckpt")
    assert adapter.config["r"] == 2
    assert len(adapter.tensors) == 28


def test_under_autocast_nothing_but_autocast_casts_the_input(lora_config, dataset, monkeypatch):
    """PEFT's own cast to the adapter's float32 and back changes no bit."""
    config = lora_config({"base_dtype": "bfloat16"})
    inputs, adapters = [], []

    def note(module, given):
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            inputs[-1].add((module.in_features == config.lora.rank, given[0].dtype))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        for casts in (False, True):
            if casts:
                monkeypatch.setattr("peft.helpers.disable_input_dtype_casting", kept_casts)
            inputs.append(set())
            base = load_training_base(config)
            run = training.train_adapter(config, Dataset(dataset(), "colors"), base, Silent())
            adapters.append(last_tensors(run))
    finally:
        handle.remove()
    assert (False, torch.float32) in inputs[1]
    assert equal(*adapters)


def kept_casts(model, active):
    return contextlib.nullcontext()
