"""A generator's training that went on is the training that was never interrupted, bit for bit."""

import json
import shutil
import signal

import pytest
import torch

from loragen.core.config import GenTrainConfig
from loragen.core.errors import DataError, Interrupted, UsageError
from loragen.core.learning import train as module
from loragen.core.learning.train import GeneratorPoint, train
from loragen.core.progress import Silent
from loragen.core.run.directory import GENERATOR_FILE, GeneratorManifest, read_manifest
from tests.conftest import TRANSFER, configured, generator_settings
from tests.core.run.resuming import Kill, StopAt, assert_same_course, entries, same

WORSE_AND_WORSE = {  # the best step is an early one
    "schedule.name": "two-stage",
    "schedule.stage1_steps": 4,
    "schedule.learning_rate_stage1": 1e-2,
    "schedule.learning_rate_stage2": 100.0,
}


@pytest.fixture(scope="module")
def ours(collection, sbert_dir, tmp_path_factory):
    """The settings of the runs that several tests read."""
    return generator_settings(collection, sbert_dir, tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def unbroken(ours):
    """`unbroken(settings)`: the run that nobody stops, trained once. Nobody writes to it."""
    runs = {}

    def run(settings=None):
        key = json.dumps(settings or {}, sort_keys=True)
        if key not in runs:
            config = configured(GenTrainConfig, {**ours, **(settings or {})})
            runs[key] = train(config, Silent()).directory
        return runs[key]

    return run


@pytest.fixture
def copied(unbroken, tmp_path):
    """`copied(settings)`: the same run, to be written to."""
    return lambda settings=None: shutil.copytree(unbroken(settings), tmp_path / "copy")


@pytest.fixture
def stopped(gen_config, tmp_path):
    """`stopped(step, settings)`: the run that was killed in that step."""

    def run(step, settings=None):
        with pytest.raises(Kill):
            train(gen_config(settings), StopAt(step))
        (directory,) = (tmp_path / "experiments").iterdir()
        return directory

    return run


@pytest.fixture
def resume(gen_config):
    """`resume(path, settings)` goes on with the run and gives the steps that it did."""

    def run(path, settings=None, at=0):
        progress = StopAt(at)
        with GeneratorPoint.find(path) as point:
            train(gen_config(settings), progress, point)
        return progress.steps

    return run


def assert_equal(one, other):
    """Generator, checkpoints, metrics and manifest of the two runs."""
    assert_same_course(one, other, GeneratorManifest)
    generators = [torch.load(run / GENERATOR_FILE, weights_only=True) for run in (one, other)]
    for document in generators:
        for key in ("started", "resumed_from"):
            document["provenance"].pop(key)
    assert same(*generators)


class TestExact:
    @pytest.mark.parametrize("step", [1, 2, 5, 6, 8])
    def test_from_wherever_it_was_killed(self, unbroken, stopped, resume, step):
        settings = {"training.last_every": 3, "training.val_every_epochs": 2}
        run = stopped(step, settings)
        done = resume(run, settings)
        assert done[-1] == 8
        assert step - 3 <= done[0] <= step  # no more is lost than last_every
        assert_equal(unbroken(settings), run)
        assert read_manifest(run, GeneratorManifest).resumed_from == [done[0] - 1]

    @pytest.mark.parametrize(
        "settings",
        [
            {"decoder.dropout": 0.2, "training.condition_noise": 0.3},
            {"trainer.accumulate_grad_batches": 2, "decoder.dropout": 0.2},
            {"trainer.precision": "bf16-mixed"},
            {"trainer.gradient_clip_val": 0.5, "schedule.name": "constant"},
            {"data.val_ratio": 0.0},
            {"training.max_steps": 7},
            {"training.optimizer": "sgd", "training.ema_decay": 0.9},
            {"encoder.frozen": False, "training.ema_decay": 0.9, "training.optimizer": "adam"},
            {"encoder.frozen": False, "encoder.positions": "tokens", "encoder.max_tokens": 5},
            {
                "training.objective": "reconstruction-then-behaviour",
                "training.max_steps": 4,
                "behaviour.max_steps": 4,
                "behaviour.batch_size": 2,
                "encoder.frozen": False,
            },
            {
                **TRANSFER,
                "training.condition_noise": 0.3,
                "training.ema_decay": 0.9,
                "behaviour.max_steps": 6,
            },
        ],
        ids=str,
    )
    def test_whatever_is_configured(self, unbroken, stopped, resume, settings):
        settings = {"training.last_every": 1, **settings}
        run = stopped(3, settings)
        assert resume(run, settings)[0] == 3
        assert_equal(unbroken(settings), run)

    @pytest.mark.parametrize("step", [4, 6, 7])
    def test_the_best_so_far_is_kept(self, unbroken, stopped, resume, step):
        settings = {**WORSE_AND_WORSE, "training.last_every": 1}
        run = stopped(step, settings)
        resume(run, settings)
        whole = unbroken(settings)
        assert_equal(whole, run)
        (best,) = (whole / "checkpoints").glob("epoch=*")
        assert torch.load(best, weights_only=True)["global_step"] < 8

    def test_a_run_may_be_killed_again_and_again(self, unbroken, stopped, resume):
        settings = {"training.last_every": 1}
        run = stopped(3, settings)
        for step in (3, 5, 7):
            with pytest.raises(Kill):
                resume(run, settings, at=step)
        resume(run, settings)
        assert_equal(unbroken(settings), run)
        assert read_manifest(run, GeneratorManifest).resumed_from == [2, 2, 4, 6]

    def test_a_run_killed_before_any_checkpoint_starts_again(self, unbroken, stopped, resume):
        run = stopped(1)
        assert resume(run) == list(range(1, 9))
        assert_equal(unbroken(), run)

    def test_a_run_killed_after_its_last_step_writes_its_generator(
        self, unbroken, gen_config, resume, monkeypatch, tmp_path
    ):
        whole = unbroken()

        def kill(*_):
            raise Kill

        with monkeypatch.context() as patch, pytest.raises(Kill):
            patch.setattr(module.Generator, "save", kill)
            train(gen_config(), Silent())
        (run,) = (tmp_path / "experiments").iterdir()
        assert resume(run) == []
        assert_equal(whole, run)

    def test_a_finished_run_is_left_as_it_is(self, copied, resume):
        run = copied()
        before = {p: p.read_bytes() for p in run.rglob("*.ckpt")}
        assert resume(run) == []
        assert {p: p.read_bytes() for p in run.rglob("*.ckpt")} == before

    def test_what_was_trained_beyond_the_checkpoint_is_void(self, unbroken, copied, resume):
        whole, run = unbroken(WORSE_AND_WORSE), copied(WORSE_AND_WORSE)
        (best,) = (run / "checkpoints").glob("epoch=*")
        with pytest.raises(Kill):
            resume(best, WORSE_AND_WORSE, at=6)
        assert not (run / "checkpoints" / "last.ckpt").exists()
        assert max(entry["step"] for entry in entries(run)) == 6
        resume(run, WORSE_AND_WORSE)
        assert_equal(whole, run)

    def test_an_interrupted_run_says_how_to_go_on(self, unbroken, gen_config, resume, tmp_path):
        class Interrupting(Silent):
            def step(self, step):
                if step.step == 3:
                    signal.raise_signal(signal.SIGINT)

        with pytest.raises(Interrupted) as raised:
            train(gen_config(), Interrupting())
        (run,) = (tmp_path / "experiments").iterdir()
        assert "step 3 of 8" in str(raised.value)
        assert f"--resume {run}" in str(raised.value)
        assert raised.value.exit_code == 130
        assert read_manifest(run, GeneratorManifest).status == "interrupted"
        assert resume(run) == [4, 5, 6, 7, 8]
        assert_equal(unbroken(), run)

    def test_from_other_directories(self, stopped, resume, gen_config, tmp_path, monkeypatch):
        """The configuration that is kept names every source by its absolute path."""
        monkeypatch.chdir(tmp_path)
        run = stopped(3, {"training.last_every": 1})
        kept = GeneratorPoint.find(run).config
        assert all(source.run.startswith("/") for source in kept.sources)
        monkeypatch.chdir(tmp_path.parent)
        train(kept, Silent(), GeneratorPoint.find(run))


class TestRefusals:
    @pytest.fixture(scope="class")
    def killed(self, ours, tmp_path_factory):
        """Killed in its fourth step."""
        home = tmp_path_factory.mktemp("refused")
        settings = {"training.last_every": 1, "experiments_dir": str(home)}
        with pytest.raises(Kill):
            train(configured(GenTrainConfig, {**ours, **settings}), StopAt(4))
        (directory,) = home.iterdir()
        return directory

    @pytest.fixture
    def run(self, killed, tmp_path):
        return shutil.copytree(killed, tmp_path / "killed")

    @pytest.fixture
    def refused(self, run, resume):
        """The problems with which the run is refused; nothing of it is touched."""

        def check(settings=None):
            before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
            with pytest.raises(UsageError) as raised:
                resume(run, settings)
            assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
            start = f"{run} cannot resume: "
            assert all(problem.startswith(start) for problem in raised.value.problems)
            return [problem.removeprefix(start) for problem in raised.value.problems]

        return check

    @pytest.mark.parametrize(
        "key, value, then",
        [
            ("seed", 7, 42),
            ("training.max_epochs", 9, 4),
            ("decoder.hidden_dim", 8, 16),
            ("data.prompts_per_condition", 2, 3),
            ("trainer.precision", "bf16-mixed", "32-true"),
        ],
    )
    def test_a_setting_that_decides_the_result(self, refused, key, value, then):
        problem, *_ = refused({key: value})  # another seed changes the prompts too
        assert problem.startswith(key)
        assert str(value) in problem
        assert str(then) in problem

    def test_other_sources(self, refused, collection):
        runs = [{"run": str(run)} for run in collection.runs.values()]
        (problem,) = refused({"sources": runs[:1]})
        assert "animals, colors" in problem

    def test_other_checkpoints_and_prompts(self, refused, collection, tmp_path):
        animals, colors = collection.runs.values()
        other = shutil.copytree(colors, tmp_path / "other")
        next((other / "checkpoints").iterdir()).unlink()
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "Which one?"}\n' * 3, encoding="utf-8")
        sources = [{"run": str(animals), "prompts": str(prompts)}, {"run": str(other)}]
        first, second = refused({"sources": sources})
        assert "animals" in first
        assert "prompts" in first
        assert "colors" in second
        assert "checkpoints" in second

    def test_another_encoder(self, refused, sbert_dir, run):
        manifest = read_manifest(run, GeneratorManifest)
        text = (run / "manifest.json").read_text(encoding="utf-8")
        changed = text.replace(manifest.encoder_fingerprint, "0" * 64)
        (run / "manifest.json").write_text(changed, encoding="utf-8")
        (problem,) = refused()
        assert "encoder sbert" in problem

    def test_what_does_not_decide_the_result_may_change(self, run, resume, collection, tmp_path):
        moved = [shutil.copytree(r, tmp_path / name) for name, r in collection.runs.items()]
        settings = {
            "sources": [{"run": str(one)} for one in moved],
            "data.cache_tokenized": False,
            "training.last_every": 2,
        }
        assert resume(run, settings) == [4, 5, 6, 7, 8]

    def test_a_run_of_lora_train(self, collection):
        with pytest.raises(DataError, match="is a run of lora train, not of gen train"):
            GeneratorPoint.find(collection.runs["colors"])
