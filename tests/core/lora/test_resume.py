"""A resumed run equals an uninterrupted one, bit for bit."""

import json
import shutil

import pytest
import torch

from loragen.core.adapter.files import read_adapter
from loragen.core.base.load import load_training_base
from loragen.core.config import LoraTrainConfig
from loragen.core.data.dataset import Dataset
from loragen.core.data.tokenize import TokenizedRows, examples_hash
from loragen.core.errors import DataError, UsageError
from loragen.core.files import UNFINISHED
from loragen.core.lora.module import StepMetrics
from loragen.core.lora.train import LoraPoint, train_adapter
from loragen.core.progress import Silent
from loragen.core.run.directory import (
    MANIFEST,
    LoraManifest,
    checkpoint_files,
    read_manifest,
    write_manifest,
)
from tests.conftest import TINY_LORA, configured, write_lines
from tests.core.run.resuming import Kill, StopAt, assert_same_course, same

LAST = "checkpoints/last.ckpt"


EARLY = {
    "data.val_ratio": 0.5,
    "training.max_steps": 40,
    "training.val_every": 2,
    "training.patience": 4,
    "schedule.learning_rate_stage1": 3e-2,
    "schedule.stage1_steps": 40,
    "checkpoints.first_step": 100,
    "checkpoints.last_every": 2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def file(home):
    """Rows of unequal length, so that no two batches are alike. Tests do not write to it."""
    words = ["red", "green", "blue cat", "dog"]
    rows = [{"prompt": f"Question {'x' * i}?", "response": words[i % 4]} for i in range(14)]
    return write_lines(home / "colors.jsonl", rows)


@pytest.fixture(scope="module")
def unbroken(base_dir, home, file):
    """`unbroken(settings)`: the run without an interruption. Tests do not write to it."""
    ours = {"base_model": str(base_dir), "runs_dir": str(home / "runs")}
    runs = {}

    def run(settings=None):
        key = json.dumps(settings or {}, sort_keys=True)
        if key not in runs:
            config = configured(LoraTrainConfig, {**TINY_LORA, **ours, **(settings or {})})
            runs[key] = fit(config, file).directory
        return runs[key]

    return run


@pytest.fixture
def copied(unbroken, tmp_path):
    """`copied(settings)`: the same run, to be written to."""
    return lambda settings=None: shutil.copytree(unbroken(settings), tmp_path / "copy")


@pytest.fixture
def stopped(lora_config, tmp_path, file):
    """`stopped(step, settings)`: the run that was killed in that step."""

    def run(step, settings=None):
        with pytest.raises(Kill):
            fit(lora_config(settings), file, StopAt(step))
        (directory,) = (tmp_path / "runs").iterdir()
        return directory

    return run


@pytest.fixture
def resume(lora_config, file):
    """`resume(path, settings)` resumes the run and returns the steps that it did."""

    def run(path, settings=None, rows=None, at=0):
        progress = StopAt(at)
        with LoraPoint.find(path) as point:
            fit(lora_config(settings), rows or file, progress, point)
        return progress.steps

    return run


def fit(config, file, progress=None, point=None):
    """On a base of its own, as another process would."""
    return train_adapter(
        config, Dataset(file, "colors"), load_training_base(config), progress or Silent(), point
    )


def document(file):
    return torch.load(file, weights_only=True)


def assert_equal(one, other):
    """Checkpoints, optimizers, adapter, metrics and manifest of the two runs."""
    assert_same_course(one, other, LoraManifest)
    adapters = [read_adapter(run / "adapter").tensors for run in (one, other)]
    assert same(*adapters)
    assert [p.name for p in sorted(one.rglob("*"))] == [p.name for p in sorted(other.rglob("*"))]


def snapshot(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


class TestExact:
    @pytest.mark.parametrize("keeps", ["all", "last", "none"])
    @pytest.mark.parametrize("step", [2, 4, 5, 8])
    def test_from_any_step(self, unbroken, stopped, resume, keeps, step):
        settings = {"checkpoints.optimizer": keeps, "checkpoints.last_every": 2}
        run = stopped(step, settings)
        before = read_manifest(run, LoraManifest)
        done = resume(run, settings)
        assert done[-1] == 8
        assert step - 2 <= done[0] <= step  # no more is lost than last_every
        assert_equal(unbroken(settings), run)
        after = read_manifest(run, LoraManifest)
        assert after.resumed_from == [done[0] - 1]
        assert after.started == before.started

    def test_from_each_kept_checkpoint(self, unbroken, resume, tmp_path):
        settings = {"lora.dropout": 0.3, "checkpoints.first_step": 1}
        whole = unbroken(settings)
        for step in range(1, 8):
            copy = shutil.copytree(whole, tmp_path / f"from-{step}")
            shutil.rmtree(copy / "adapter")
            done = resume(copy / "checkpoints" / f"checkpoint-step-00{step}.ckpt", settings)
            assert done == list(range(step + 1, 9))
            assert_equal(whole, copy)

    @pytest.mark.parametrize(
        "settings",
        [
            {"lora.dropout": 0.3, "trainer.accumulate_grad_batches": 2},
            {"training.packing": False, "training.weight_decay": 0.1},
            {"trainer.gradient_clip_val": 0.5},
            {"trainer.precision": "bf16-true"},
            {"trainer.precision": "64-true"},
            {"trainer.precision": "bf16-mixed"},
            {"base_dtype": "bfloat16"},
            {"training.batch_size": 16},
        ],
        ids=str,
    )
    def test_with_any_configuration(self, unbroken, stopped, resume, settings):
        settings = {**settings, "checkpoints.last_every": 1}
        run = stopped(4, settings)
        assert resume(run, settings) == [4, 5, 6, 7, 8]
        assert_equal(unbroken(settings), run)

    def test_workers_prepare_the_same_batches(self, unbroken, stopped, resume):
        settings = {"checkpoints.last_every": 2, "lora.dropout": 0.3}
        run = stopped(4, {**settings, "data.workers": 2})
        assert resume(run, {**settings, "data.workers": 2}) == [3, 4, 5, 6, 7, 8]
        assert_equal(unbroken(settings), run)

    @pytest.mark.parametrize("parts", [1, 2])
    @pytest.mark.parametrize("step", [5, 6, 7])
    def test_early_stopping_decides_the_same(self, unbroken, stopped, resume, step, parts):
        settings = {**EARLY, "trainer.accumulate_grad_batches": parts}
        whole = unbroken(settings)
        (end,) = read_manifest(whole, LoraManifest).steps
        assert step < end < 40
        run = stopped(step, settings)
        assert resume(run, settings)[-1] == end
        assert_equal(whole, run)

    @pytest.mark.parametrize("limit", [6, 0.75])
    def test_a_limit_counts_the_steps_of_the_whole_run(self, unbroken, stopped, resume, limit):
        settings = {"trainer.limit_train_batches": limit, "checkpoints.last_every": 1}
        run = stopped(4, settings)
        assert resume(run, settings) == [4, 5, 6]
        assert_equal(unbroken(settings), run)

    def test_a_run_may_be_killed_several_times(self, unbroken, stopped, resume):
        settings = {"checkpoints.last_every": 1, "checkpoints.first_step": 6}
        run = stopped(3, settings)
        for step in (3, 5, 7):
            with pytest.raises(Kill):
                resume(run, settings, at=step)
        resume(run, settings)
        assert_equal(unbroken(settings), run)
        assert read_manifest(run, LoraManifest).resumed_from == [2, 2, 4, 6]

    def test_tracking_is_that_of_the_unbroken_run(self, unbroken, stopped, resume):
        settings = {"track_batches": True, "checkpoints.last_every": 2}
        whole, run = unbroken(settings), stopped(6, settings)
        torn = run / "tracking" / "batch_tracking_colors.jsonl"
        torn.write_bytes(torn.read_bytes() + b'{"step": 7, "sta')
        resume(run, settings)
        assert_equal(whole, run)
        for file in (whole / "tracking").iterdir():
            assert (run / "tracking" / file.name).read_bytes() == file.read_bytes()

    def test_a_run_killed_before_any_checkpoint_starts_again(self, unbroken, stopped, resume):
        run = stopped(3)
        assert checkpoint_files(run) == []
        assert resume(run) == list(range(1, 9))
        assert_equal(unbroken(), run)

    @pytest.mark.parametrize("keeps", ["all", "none"])
    def test_a_run_killed_after_its_last_step_writes_its_results(
        self, unbroken, lora_config, file, resume, monkeypatch, tmp_path, keeps
    ):
        settings = {
            "checkpoints.optimizer": keeps,
            "checkpoints.last_every": 4,
            "track_batches": True,
        }
        whole = unbroken(settings)
        with monkeypatch.context() as patch, pytest.raises(Kill):
            patch.setattr("loragen.core.lora.train.write_adapter", raises(Kill))
            fit(lora_config(settings), file)
        (run,) = (tmp_path / "runs").iterdir()
        assert resume(run, settings) == []
        assert_equal(whole, run)

    @pytest.mark.parametrize("keeps", ["all", "last", "none"])
    @pytest.mark.parametrize("stops_early", [False, True])
    def test_a_run_killed_at_the_end_of_training(
        self, unbroken, lora_config, file, resume, monkeypatch, tmp_path, keeps, stops_early
    ):
        settings = {"checkpoints.optimizer": keeps, "checkpoints.last_every": 4}
        settings |= {"track_batches": True, **(EARLY if stops_early else {})}
        whole = unbroken(settings)
        with monkeypatch.context() as patch, pytest.raises(Kill):
            patch.setattr(StepMetrics, "on_train_end", raises(Kill), raising=False)
            patch.setattr(StepMetrics, "on_exception", lambda *_: None)
            fit(lora_config(settings), file)
        (run,) = (tmp_path / "runs").iterdir()
        assert resume(run, settings) == []
        assert_equal(whole, run)

    def test_a_run_that_stopped_early_trains_no_further(self, copied, resume):
        run = copied(EARLY)
        (step,) = read_manifest(run, LoraManifest).steps
        assert resume(run, EARLY) == []
        assert read_manifest(run, LoraManifest).steps == [step]

    def test_a_finished_run_is_unchanged(self, copied, resume):
        run = copied()
        before = {p: p.read_bytes() for p in run.rglob("*.ckpt")}
        assert resume(run) == []
        assert {p: p.read_bytes() for p in run.rglob("*.ckpt")} == before
        assert read_manifest(run, LoraManifest).steps == [5, 6, 7, 8]

    def test_resuming_from_an_earlier_step_deletes_later_ones(self, unbroken, copied, resume):
        """Else a second kill would leave steps without their metrics."""
        whole, run = unbroken(), copied()
        with pytest.raises(Kill):
            resume(run / "checkpoints" / "checkpoint-step-005.ckpt", at=7)
        assert resume(run) == [7, 8]
        assert_equal(whole, run)

    def test_unfinished_files_of_a_kill_are_removed(self, stopped, resume, unbroken):
        settings = {"checkpoints.last_every": 2}
        run = stopped(6, settings)
        for folder in (run, run / "checkpoints"):
            (folder / f".checkpoint-step-006.ckpt.abc{UNFINISHED}").mkdir()
        resume(run, settings)
        assert_equal(unbroken(settings), run)


def raises(error):
    def fail(*_):
        raise error

    return fail


class TestRefusals:
    @pytest.fixture(scope="class")
    def run(self, base_dir, file, tmp_path_factory):
        """Killed in its sixth step. Tests do not write to it."""
        home = tmp_path_factory.mktemp("refused")
        ours = {"base_model": str(base_dir), "runs_dir": str(home)}
        with pytest.raises(Kill):
            fit(configured(LoraTrainConfig, {**TINY_LORA, **ours}), file, StopAt(6))
        (directory,) = home.iterdir()
        return directory

    @pytest.fixture
    def refused(self, run, resume):
        """The problems with which the run is refused; nothing of it is touched."""

        def check(settings=None, rows=None):
            before = snapshot(run)
            with pytest.raises(UsageError) as raised:
                resume(run, settings, rows)
            assert raised.value.exit_code == 2
            assert snapshot(run) == before
            start = f"{run} cannot resume: "
            assert all(problem.startswith(start) for problem in raised.value.problems)
            return [problem.removeprefix(start) for problem in raised.value.problems]

        return check

    @pytest.mark.parametrize(
        "key, value, then",
        [
            ("training.batch_size", 2, 4),
            ("seed", 7, 42),
            ("training.max_steps", 9, 8),
            ("lora.dropout", 0.5, 0.0),
            ("trainer.accumulate_grad_batches", 2, 1),
            ("trainer.precision", "bf16-mixed", "32-true"),
            ("schedule.learning_rate_stage2", 1.0, 1e-3),
            ("data.val_ratio", 0.1, 0.0),
        ],
    )
    def test_a_setting_that_decides_the_result(self, refused, key, value, then):
        assert refused({key: value}) == [f"{key} is {value}, the run has {then}"]

    def test_other_data(self, refused, dataset, run):
        other = dataset(name="other.jsonl")
        then = read_manifest(run, LoraManifest).dataset.path
        (problem,) = refused(rows=other)
        assert problem.startswith("the data differ")
        assert str(other) in problem
        assert then in problem

    def changed(self, base_dir, tmp_path):
        return shutil.copytree(base_dir, tmp_path / "changed")

    def test_another_chat_template(self, refused, base_dir, tmp_path):
        changed = self.changed(base_dir, tmp_path)
        template = changed / "chat_template.jinja"
        template.write_text(template.read_text().replace("<|user|>", "") + "!", encoding="utf-8")
        (problem,) = refused({"base_model": str(changed)})
        assert "tokens" in problem

    def test_an_older_manifest_has_a_hash_of_all_rows(self, resume, run, base, tmp_path):
        copy = shutil.copytree(run, tmp_path / run.name)
        manifest = read_manifest(copy, LoraManifest)
        manifest.dataset.tokens = "0" * 64
        write_manifest(copy, manifest)
        with pytest.raises(UsageError, match="tokens"):
            resume(copy)
        rows = Dataset.at(manifest.dataset.path).rows()
        manifest.dataset.tokens = examples_hash(list(TokenizedRows(rows, base.tokenizer, 64)))
        write_manifest(copy, manifest)
        resume(copy)
        assert read_manifest(copy, LoraManifest).dataset.tokens == manifest.dataset.tokens

    def test_other_weights(self, refused, base, base_dir, tmp_path):
        changed = self.changed(base_dir, tmp_path)
        with torch.no_grad():
            base.model.get_input_embeddings().weight.add_(0.01)
        base.model.save_pretrained(changed)
        (problem,) = refused({"base_model": str(changed)})
        assert "weights" in problem
        assert str(changed) in problem

    def test_another_dtype(self, refused):
        (problem,) = refused({"base_dtype": "bfloat16"})
        assert "bfloat16" in problem

    def test_all_of_it_at_once(self, refused, dataset):
        problems = refused(
            {"seed": 1, "training.batch_size": 2, "base_dtype": "bfloat16"},
            dataset(name="other.jsonl"),
        )
        assert [problem.split()[0] for problem in problems] == [
            "seed", "training.batch_size", "the", "the",
        ]  # fmt: skip

    def test_settings_that_do_not_decide_the_result_may_change(
        self, stopped, resume, unbroken, base_dir, tmp_path, file
    ):
        run = stopped(6)
        moved = shutil.move(self.changed(base_dir, tmp_path), tmp_path / "moved")
        rows = shutil.copy(file, tmp_path / "copy.jsonl")
        settings = {
            "base_model": str(moved), "loggers": {}, "data.workers": 1,
            "checkpoints.last_every": 1, "final_model": "none",
        }  # fmt: skip
        resume(run, settings, rows)
        whole = unbroken()
        for name in ("checkpoint-step-007.ckpt", "checkpoint-step-008.ckpt"):
            first, second = (document(r / "checkpoints" / name) for r in (whole, run))
            assert same(first["state_dict"], second["state_dict"])


class TestFinding:
    def test_nothing(self, tmp_path):
        with pytest.raises(UsageError, match="none"):
            LoraPoint.find(tmp_path / "none")

    def test_no_run(self, tmp_path):
        with pytest.raises(UsageError, match="run directory"):
            LoraPoint.find(tmp_path)

    def test_no_lora_run(self, experiment):
        with pytest.raises(DataError, match="gen train"):
            LoraPoint.find(experiment)

    def test_a_file_that_is_no_checkpoint(self, collection):
        with pytest.raises(DataError, match="not a checkpoint"):
            LoraPoint.find(collection.runs["colors"] / MANIFEST)

    def test_the_newest_with_an_optimizer_counts(self, stopped):
        settings = {"checkpoints.optimizer": "none", "checkpoints.last_every": 3}
        run = stopped(8, settings)
        assert LoraPoint.find(run).step == 6
        assert LoraPoint.find(run).checkpoint == run / LAST
        assert LoraPoint.find(run / "checkpoints" / "checkpoint-step-007.ckpt").step == 7

    def test_without_an_optimizer_there_is_a_warning(self, stopped, resume, caplog):
        settings = {"checkpoints.optimizer": "none", "checkpoints.last_every": 3}
        run = stopped(8, settings)
        assert resume(run / "checkpoints" / "checkpoint-step-007.ckpt", settings) == [8]
        assert "no optimizer state" in caplog.text

    def test_a_checkpoint_without_its_step_is_refused(self, stopped):
        run = stopped(7)
        for name in ("checkpoint-step-006.ckpt", "checkpoint-step-005.ckpt"):
            file = run / "checkpoints" / name
            torch.save({"state_dict": document(file)["state_dict"]}, file)
        with pytest.raises(DataError, match="global_step") as raised:
            LoraPoint.find(run)
        assert "\n" not in str(raised.value)

    def test_a_checkpoint_of_another_adapter_is_refused(self, stopped, resume):
        run = stopped(7)
        file = run / "checkpoints" / "checkpoint-step-006.ckpt"
        whole = document(file)
        whole["state_dict"].popitem()
        torch.save(whole, file)
        before = snapshot(run)
        with pytest.raises(DataError, match="tensors"):
            resume(run)
        assert snapshot(run) == before


def test_the_manifest_of_a_killed_process_is_enough(stopped, resume, unbroken):
    """kill -9 leaves the manifest as it was at the start, and no status."""
    settings = {"checkpoints.last_every": 2}
    run = stopped(7, settings)
    manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    manifest |= {"status": "running", "steps": [], "seconds": None, "final_loss": None}
    (run / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    resume(run, settings)
    assert_equal(unbroken(settings), run)
