import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Trainer

from loragen.core.adapter.files import read_adapter
from loragen.core.config import GenTrainConfig, load
from loragen.core.errors import DataError, LoragenError, UsageError
from loragen.core.generator.model import Generator
from loragen.core.learning import arrays as prepared
from loragen.core.learning import callbacks
from loragen.core.learning import train as module
from loragen.core.learning.arrays import embed_prompts_ahead
from loragen.core.learning.train import train
from loragen.core.plugins import create
from loragen.core.progress import Silent
from loragen.core.run.directory import GeneratorManifest, generator_file, read_manifest
from loragen.core.run.metrics import read_metrics
from tests.conftest import TRANSFER, configured, generator_settings

PROMPTS = ["Question 1 about red?", "Question 2 about red?"]


class Watching(Silent):
    def __init__(self, at=0, error=None):
        self.steps, self.at, self.error = [], at, error
        self.validations = []

    def validated(self, validation):
        self.validations.append(validation)

    def step(self, step):
        self.steps.append(step)
        if step.step == self.at:
            raise self.error


def files(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def weights(directory):
    return torch.load(generator_file(directory), weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def ours(collection, sbert_dir, tmp_path_factory):
    """The settings of the runs that several tests read."""
    return generator_settings(collection, sbert_dir, tmp_path_factory.mktemp("train"))


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


class TestTraining:
    def test_files_are_as_documented(self, experiment):
        found = files(experiment)
        (best,) = [name for name in found if name.startswith("checkpoints/epoch=")]
        assert re.fullmatch(r"checkpoints/epoch=[1-4]-val_loss=\d\.\d{4}\.ckpt", best)
        assert found - {best} == {
            "checkpoints/last.ckpt",
            "config.yaml",
            "manifest.json",
            "metrics.jsonl",
            ".run.lock",
            "results/final_model/generator_model.pt",
        }

    def test_the_manifest_says_what_it_was_trained_on(self, experiment, collection):
        manifest = read_manifest(experiment, GeneratorManifest)
        assert manifest.status == "success"
        assert manifest.sources == [str(run / "checkpoints") for run in collection.runs.values()]
        assert manifest.base_model == str(collection.base)
        assert manifest.steps == 8  # 4 epochs of 8 checkpoints, 4 at a time
        assert {record.kind for record in manifest.plugins} == {
            "encoder",
            "decoder",
            "schedule",
            "objective",
        }
        assert {"train/loss", "val/loss", "val/relative_error"} <= manifest.metrics.keys()

    def test_the_configuration_loads_again(self, experiment):
        config = load(GenTrainConfig, experiment / "config.yaml", environment={})
        assert config.decoder.options["hidden_dim"] == 16

    def test_the_loss_falls_and_the_adapters_are_reconstructed(self, gen_config, collection):
        watching = Watching()
        config = gen_config({"training.max_epochs": 60, "training.learning_rate": 2e-2})
        run = train(config, watching)
        losses = [step.loss for step in watching.steps]
        assert losses[-1] < 0.2 * losses[0]
        generator = Generator.load(run.directory)
        errors = {}
        for name, other in (("colors", "animals"), ("animals", "colors")):
            prompts = [
                json.loads(line)["prompt"]
                for line in collection.file(name).read_text(encoding="utf-8").splitlines()
            ]
            made = generator.layout.pack(generator.generate(prompts).tensors)
            for candidate in (name, other):
                wanted = read_adapter(collection.runs[candidate] / "adapter").tensors
                errors[name, candidate] = torch.dist(made, generator.layout.pack(wanted)).item()
            assert errors[name, name] < 0.5 * errors[name, other]

    def test_the_same_training_twice_gives_equal_weights(self, gen_config):
        config = gen_config({"training.condition_noise": 0.1, "decoder.dropout": 0.1})
        one, other = train(config, Silent()), train(config, Silent())
        assert equal(weights(one.directory), weights(other.directory))
        assert one.directory != other.directory

    def test_max_steps_ends_earlier(self, gen_config):
        watching = Watching()
        run = train(gen_config({"training.max_steps": 3}), watching)
        assert [step.step for step in watching.steps] == [1, 2, 3]
        assert run.manifest.steps == 3

    def test_accumulation_only_splits_the_work(self, gen_config):
        """The doubled batch in one piece: the same steps, metrics and weights, up to rounding."""
        found = []
        for batch, accumulation in ((6, 1), (3, 2)):  # 8 checkpoints: no size divides them
            watching = Watching()
            settings = {"data.batch_size": batch, "trainer.accumulate_grad_batches": accumulation}
            run = train(gen_config(settings), watching)
            found.append((run, watching.steps, read_metrics(run.directory / "metrics.jsonl")))
        (one, steps, logged), (other, split_steps, split_logged) = found
        assert [step.step for step in split_steps] == [step.step for step in steps]
        assert one.manifest.steps == other.manifest.steps == 8
        assert [entry["step"] for entry in split_logged] == [entry["step"] for entry in logged]
        for entry, split in zip(logged, split_logged, strict=True):
            for name in entry.keys() & {"train/loss", "train/lr", "val/loss"}:
                assert split[name] == pytest.approx(entry[name], rel=1e-4), name
        ours = weights(one.directory)
        for key, value in weights(other.directory).items():
            assert torch.allclose(value, ours[key], atol=1e-5), key

    def test_pairs_per_second_are_those_of_whole_steps(self, gen_config, monkeypatch):
        clock = itertools.count()  # a second a step
        monkeypatch.setattr(
            callbacks, "time", SimpleNamespace(perf_counter=lambda: float(next(clock)))
        )
        watching = Watching()
        train(gen_config({"trainer.accumulate_grad_batches": 2}), watching)
        assert {step.rate for step in watching.steps} == {8.0}

    @pytest.fixture(scope="class")
    def exploded(self, ours):
        """A run whose loss explodes after a few steps, and its progress."""
        watching = Watching()
        settings = {
            "training.max_epochs": 6,
            "schedule.name": "two-stage",
            "schedule.stage1_steps": 4,
            "schedule.learning_rate_stage1": 1e-2,
            "schedule.learning_rate_stage2": 100.0,
        }
        return train(configured(GenTrainConfig, {**ours, **settings}), watching), watching

    def test_every_validation_is_reported_with_the_best_so_far(self, exploded):
        run, watching = exploded
        found = watching.validations
        assert [one.position for one in found] == [(step, 12) for step in (2, 4, 6, 8, 10, 12)]
        (best,) = run.directory.glob("checkpoints/epoch=*")
        kept = torch.load(best, weights_only=True)["global_step"]
        assert found[-1].best == ("reconstruction", kept)
        losses = [one.metrics["val/loss"] for one in found]
        assert found[losses.index(min(losses))].best == ("reconstruction", kept)
        assert found[-1].metrics.items() <= run.manifest.metrics.items()

    @pytest.mark.parametrize("limit, steps", [(3, 2), (0.5, 2), (100, 4), (2.0, 4)])
    def test_a_limit_counts_the_micro_batches_of_the_whole_run(self, gen_config, limit, steps):
        settings = {"trainer.limit_train_batches": limit, "trainer.accumulate_grad_batches": 2}
        assert train(gen_config(settings), Silent()).manifest.steps == steps

    def test_held_out_datasets_are_what_the_best_is_chosen_by(self, gen_config, collection):
        animals, colors = (str(run) for run in collection.runs.values())
        run = train(
            gen_config({"sources": [{"run": animals}], "val_sources": [{"run": colors}]}), Silent()
        )
        assert {"val/loss", "val_unseen/loss"} <= run.manifest.metrics.keys()
        assert run.manifest.val_sources == [f"{colors}/checkpoints"]
        assert generator_file(run.directory)
        document = torch.load(generator_file(run.directory), weights_only=True)
        assert "val_unseen/loss" in document["provenance"]["chosen_by"]

    def test_the_best_checkpoint_by_validation_is_the_one_that_is_kept(self, exploded):
        run, _ = exploded
        best = [f for f in (run.directory / "checkpoints").iterdir() if "epoch=" in f.name]
        state = torch.load(best[0], weights_only=True)["state_dict"]
        kept = weights(run.directory)
        assert int(best[0].name.removeprefix("epoch=")[0]) <= 3
        assert all(state[f"network.{key}"].equal(value) for key, value in kept.items())

    def test_with_nothing_held_out_the_last_step_is_kept(self, gen_config):
        run = train(gen_config({"data.val_ratio": 0.0}), Silent())
        last = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)
        kept = weights(run.directory)
        assert all(last["state_dict"][f"network.{k}"].equal(v) for k, v in kept.items())
        assert not any(name.startswith("val") for name in run.manifest.metrics)

    def test_training_never_needs_the_base(self, gen_config, collection):
        away = collection.base.rename(collection.base.with_name("away"))
        try:
            run = train(gen_config({"training.max_steps": 1}), Silent())
        finally:
            away.rename(collection.base)
        assert run.manifest.status == "success"

    def test_metrics_reach_the_log_at_their_steps(self, gen_config):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = train(gen_config({"loggers": {"tensorboard": {}}}), Silent())
        events = EventAccumulator(str(run.directory / "tensorboard_logs")).Reload()
        assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 9))
        assert [e.step for e in events.Scalars("val/loss")] == [2, 4, 6, 8]

    def test_the_learning_rate_is_that_of_training(self, gen_config):
        """`training.learning_rate` goes to a schedule that was given none of its own."""
        for settings, rate in (
            ({"schedule.name": "constant"}, 1e-2),
            ({"schedule.name": "constant", "schedule.learning_rate": 5e-3}, 5e-3),
        ):
            config = gen_config({**settings, "training.max_steps": 1, "data.val_ratio": 0.0})
            run = train(config, Silent())
            last = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)
            assert last["lr_schedulers"][0]["_last_lr"] == [rate, rate]


class TestWeights:
    """What moves them, and which of them are kept."""

    def test_every_optimizer_learns(self, gen_config):
        for optimizer, rate in (("adamw", 2e-2), ("adam", 2e-2), ("sgd", 5e-3)):
            watching = Watching()
            settings = {"training.optimizer": optimizer, "training.learning_rate": rate}
            train(gen_config({**settings, "training.max_epochs": 20}), watching)
            assert watching.steps[-1].loss < 0.8 * watching.steps[0].loss, optimizer

    def test_the_average_is_what_is_kept(self, gen_config):
        """`w + (1 - d)(new - w)` after every step but the first, which it starts as."""
        found = {}
        for steps in (1, 2):
            settings = {"training.ema_decay": 0.75, "data.val_ratio": 0.0}
            run = train(gen_config({**settings, "training.max_steps": steps}), Silent())
            last = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)
            found[steps] = last["state_dict"], weights(run.directory)
        (first, kept_first), (second, kept) = found[1], found[2]
        for key, value in kept.items():
            live = f"network.{key}"
            assert kept_first[key].equal(first[live])
            assert value.equal(second[f"averaged.module.{live}"])
        moved = [key for key in kept if not second[f"network.{key}"].equal(kept[key])]
        assert moved
        assert last["state_dict"]["averaged.n_averaged"] == 2

    def test_gradients_are_clipped_in_mixed_precision(self, gen_config):
        clipped = {"trainer.precision": "bf16-mixed", "trainer.gradient_clip_val": 0.5}
        assert train(gen_config({**clipped, "training.max_steps": 2}), Silent()).manifest.steps == 2

    def test_in_bfloat16(self, gen_config):
        watching = Watching()
        settings = {"trainer.precision": "bf16-mixed", "training.learning_rate": 2e-2}
        run = train(gen_config({**settings, "training.max_epochs": 20}), watching)
        assert watching.steps[-1].loss < 0.8 * watching.steps[0].loss
        assert all(value.dtype != torch.bfloat16 for value in weights(run.directory).values())


def test_what_was_read_ahead_is_not_embedded_again(gen_config, tmp_path, monkeypatch):
    config = gen_config()
    first, *_ = config.sources
    embed_prompts_ahead(config.model_copy(update={"sources": [first]}))
    assert len(list((tmp_path / "cache" / "embeddings").glob("*.mask.npy"))) == 1
    embed_prompts_ahead(config)
    monkeypatch.setattr(prepared, "write_embeddings", lambda *_: pytest.fail("embedded again"))
    train(config, Silent())


def test_a_transfer_is_refused_where_the_encoder_turns_out_to_train(gen_config, monkeypatch):
    """Whatever a plugin calls the option by which it does."""
    untrained = create("encoder", "sbert", gen_config().encoder.options)
    monkeypatch.setattr(type(untrained), "frozen", False)
    with pytest.raises(UsageError, match="transfer: the encoder is trained"):
        train(gen_config(TRANSFER), Silent())


class TestTrainedEncoder:
    SETTINGS: ClassVar = {"encoder.frozen": False, "training.encoder_rate": 1.0}

    @pytest.fixture(scope="class", params=["sentence", "tokens"])
    def trained(self, ours, request, tmp_path_factory):
        """The configuration and the run. Nobody writes to it."""
        cache = {"data.cache_dir": str(tmp_path_factory.mktemp("cache"))}
        settings = {**ours, **self.SETTINGS, **cache, "encoder.positions": request.param}
        config = configured(GenTrainConfig, settings)
        return config, train(config, Silent())

    def test_its_weights_move_and_are_kept(self, trained):
        config, run = trained
        untrained = create("encoder", "sbert", config.encoder.options)
        state = torch.load(generator_file(run.directory), weights_only=True)["encoder_state"]
        before = untrained.state_dict()
        moved = {key for key, value in state.items() if not value.equal(before[key])}
        still = {key for key in state.keys() - moved if "position" not in key}
        assert all("pooler" in key or "embeddings" in key for key in still)
        assert not list(Path(config.data.cache_dir).glob("embeddings/*"))

        generator = Generator.load(run.directory)
        assert generator.text_encoder.fingerprint == generator.encoder_fingerprint
        assert generator.encoder_fingerprint != untrained.fingerprint
        made = generator.generate(PROMPTS).tensors
        assert equal(made, Generator.load(run.directory).generate(PROMPTS).tensors)
        generator.text_encoder.load_state_dict(before)
        assert not equal(made, generator.generate(PROMPTS).tensors)

    def test_the_best_checkpoint_holds_the_encoder_that_is_kept(self, trained):
        _, run = trained
        (best,) = (run.directory / "checkpoints").glob("epoch=*")
        state = torch.load(best, weights_only=True)["state_dict"]
        kept = torch.load(generator_file(run.directory), weights_only=True)["encoder_state"]
        assert all(state[f"encoder.{key}"].equal(value) for key, value in kept.items())

    def test_its_rate_is_a_share_of_the_decoders(self, gen_config):
        settings = {**self.SETTINGS, "training.encoder_rate": 0.25, "schedule.name": "constant"}
        run = train(gen_config({**settings, "training.max_steps": 1}), Silent())
        last = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["lr_schedulers"][0]["_last_lr"] == [1e-2, 1e-2, 2.5e-3, 2.5e-3]


class TestFailure:
    @pytest.mark.parametrize(
        "error, status", [(RuntimeError("on fire"), "failed"), (KeyboardInterrupt(), "interrupted")]
    )
    def test_a_run_that_ends_early_says_how(self, gen_config, tmp_path, error, status):
        with pytest.raises(type(error)):
            train(gen_config(), Watching(3, error))
        (run,) = (tmp_path / "experiments").iterdir()
        assert read_manifest(run, GeneratorManifest).status == status
        assert not (run / "results").exists()

    def test_a_generator_that_cannot_be_written_is_a_failed_run(
        self, gen_config, tmp_path, monkeypatch
    ):
        def full(*_):
            raise OSError("disk full")

        monkeypatch.setattr(module.Generator, "save", full)
        with pytest.raises(OSError, match="disk full"):
            train(gen_config(), Silent())
        (run,) = (tmp_path / "experiments").iterdir()
        assert read_manifest(run, GeneratorManifest).status == "failed"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"data.val_ratio": 0.0}, r"train/loss is (nan|inf) at step \d"),
            ({"training.val_every_epochs": 1}, r"(train|val)/loss is (nan|inf) at step \d"),
            # Finite gradients of the only step make weights that are not.
            ({"data.val_ratio": 0.0, "training.max_steps": 1}, "is not finite at step 1"),
        ],
    )
    def test_a_training_that_diverges_is_a_failed_run(
        self, gen_config, tmp_path, settings, message
    ):
        huge = {"training.optimizer": "sgd", "schedule.name": "constant"}
        rate = 3e38 if "training.max_steps" in settings else 10.0
        config = gen_config({**huge, "training.learning_rate": rate, **settings})
        config.training.last_every = 1
        with pytest.raises(LoragenError, match=message) as raised:
            train(config, Silent())
        assert "try a lower learning rate or trainer.gradient_clip_val=1.0" in str(raised.value)
        assert "\n" not in str(raised.value)
        (run,) = (tmp_path / "experiments").iterdir()
        assert read_manifest(run, GeneratorManifest).status == "failed"
        assert not (run / "results").exists()
        for file in (run / "checkpoints").iterdir():
            state = torch.load(file, weights_only=True)["state_dict"]
            assert all(value.isfinite().all() for value in state.values())

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"encoder.model": "./none"}, "encoder ./none: no such directory"),
            ({"sources": [{"run": "none"}]}, "none: no such run directory"),
            ({"layout.max_seq_len": 2}, "set it to"),
        ],
    )
    def test_what_cannot_start_leaves_nothing(
        self, gen_config, tmp_path, monkeypatch, settings, message
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(LoragenError, match=message):
            train(gen_config(settings), Silent())
        assert not (tmp_path / "experiments").exists()

    def test_devices_that_cannot_share_a_batch_leave_nothing(
        self, gen_config, tmp_path, monkeypatch
    ):
        """As where `devices: auto` finds two."""
        monkeypatch.setattr(Trainer, "world_size", 2)
        with pytest.raises(UsageError, match=r"data\.batch_size 3 must be a multiple"):
            train(gen_config({"data.batch_size": 3}), Silent())
        assert not (tmp_path / "experiments").exists()

    def test_a_broken_checkpoint_leaves_nothing(self, gen_config, collection, tmp_path):
        run = shutil.copytree(collection.runs["colors"], tmp_path / "run")
        (run / "checkpoints" / "checkpoint-step-006.ckpt").write_bytes(b"broken")
        with pytest.raises(DataError, match=r"checkpoint-step-006\.ckpt"):
            train(gen_config({"sources": [{"run": str(run)}]}), Silent())
        assert not (tmp_path / "experiments").exists()


class TestInfer:
    @pytest.fixture
    def generator(self, experiment):
        return Generator.load(experiment)

    def test_it_writes_an_adapter_that_plain_peft_loads(self, generator, base, tmp_path):
        from peft import PeftModel

        adapter = generator.generate(PROMPTS)
        adapter.save(tmp_path / "new" / "adapter")
        assert adapter.origin.prompts == 2
        assert generator.layout.values == 1856
        assert files(tmp_path / "new") == {
            "adapter/README.md",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        }
        ids = torch.arange(8).view(1, 8)
        with torch.inference_mode():
            without = base.model(ids).logits
            model = PeftModel.from_pretrained(base.model, str(tmp_path / "new" / "adapter")).eval()
            assert (model(ids).logits - without).abs().max() > 1e-3
        live = {k: v for k, v in model.state_dict().items() if "lora_" in k}
        written = read_adapter(tmp_path / "new" / "adapter").tensors
        assert len(live) == len(written)
        for key, value in written.items():
            assert live[key.replace(".weight", ".default.weight")].equal(value)

    def test_it_never_needs_the_base(self, generator, collection, tmp_path):
        away = collection.base.rename(collection.base.with_name("away"))
        try:
            generator.generate(PROMPTS).save(tmp_path / "adapter")
        finally:
            away.rename(collection.base)
        assert read_adapter(tmp_path / "adapter").tensors

    def test_the_card_says_what_it_is(self, generator, collection, tmp_path):
        generator.generate(PROMPTS).save(tmp_path / "adapter")
        card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlibrary_name: peft\n")
        assert "- **prompts**: 2 (sha256 " in card
        assert str(collection.base) not in card  # a path of this machine
        assert "2 datasets: animals, colors" in card

    @pytest.mark.parametrize("prompts", [[], ["", " "]])
    def test_prompts_without_text_are_refused(self, generator, tmp_path, prompts):
        with pytest.raises(UsageError, match="no prompts"):
            generator.generate(prompts).save(tmp_path / "adapter")
        assert list(tmp_path.iterdir()) == []

    def test_an_error_leaves_nothing(self, generator, tmp_path):
        def fail(texts):
            raise RuntimeError("no")

        generator.text_encoder = fail
        with pytest.raises(RuntimeError):
            generator.generate(PROMPTS).save(tmp_path / "adapter")
        assert list(tmp_path.iterdir()) == []
