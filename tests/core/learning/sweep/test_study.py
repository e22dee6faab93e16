"""A study without any training: who tries what, what is pruned, and what a dead process leaves."""

import os
import signal
import sys
import time
from multiprocessing import get_context

import pytest

pytest.importorskip("optuna", reason="the extra sweep is not installed")

from loragen.core.config import LoraTrainConfig
from loragen.core.errors import UsageError
from loragen.core.learning.sweep.space import parse_params
from loragen.core.learning.sweep.study import Pruned, Study, StudyRecord, best_of
from tests.conftest import configured

SPACE = ("lora.rank=int:2:8", "training.weight_decay=float:0:0.1")


class Training:
    """What a study asks of a training that never runs."""

    free = ("runs_dir",)


def a_study(directory, base=None, space=SPACE, **fields):
    params, _ = parse_params(space)
    usual = {
        "command": "lora train",
        "metric": "val/loss",
        "direction": "minimize",
        "space": {param.key: param.spec for param in params},
        "inputs": {"the dataset": "abc"},
        "startup_trials": 2,
        "pruning": True,
        "seed": 1,
    }
    record = StudyRecord(**{**usual, **fields})
    base = base or configured(LoraTrainConfig, {"loggers": {}})
    return Study.open(directory, record, params, Training(), base)


def test_trials_are_counted_for_all_processes_together(tmp_path):
    with a_study(tmp_path / "s") as one, a_study(tmp_path / "s") as other:
        first, second = one.ask(3), other.ask(3)
        assert (first.number, second.number) == (0, 1)
        assert one.values(first) != other.values(second)
        one.finished(first, 0.5)
        third = one.ask(3)
        assert other.ask(3) is None
        other.finished(second, 0.25)
        one.failed(third, "it has diverged")
        states = [(t.state, t.value, t.problem) for t in one.trials()]
        assert states == [
            ("finished", 0.5, None),
            ("finished", 0.25, None),
            ("failed", None, "it has diverged"),
        ]
        assert best_of(one.trials(), "minimize").number == 1
        assert best_of(one.trials(), "maximize").number == 0


def test_worse_than_the_median_is_pruned_but_not_at_the_last_step(tmp_path):
    with a_study(tmp_path / "s") as study:
        for loss in (0.3, 0.2, 0.1):  # none is worse than those before
            trial = study.ask(9)
            trial.validated({"val/loss": loss}, 2, is_last=False)
            trial.validated({"val/loss": loss / 2}, 4, is_last=True)
            study.finished(trial, loss / 2)
        trial = study.ask(9)
        with pytest.raises(Pruned, match="after step 2"):
            trial.validated({"val/loss": 0.9}, 2, is_last=False)
        study.pruned(trial)
        assert trial.record.pruned_at == 2
        assert study.trials()[-1].state == "pruned"
        last = study.ask(9)
        last.validated({"val/loss": 0.9}, 4, is_last=True)


def test_without_pruning_nothing_is(tmp_path):
    with a_study(tmp_path / "s", pruning=False) as study:
        for loss in (0.1, 0.2, 0.9):
            trial = study.ask(9)
            trial.validated({"val/loss": loss}, 2, is_last=False)
            study.finished(trial, loss)


def test_a_metric_that_the_run_does_not_validate(tmp_path):
    with a_study(tmp_path / "s", metric="val/wrong") as study:
        trial = study.ask(9)
        with pytest.raises(UsageError, match="validates val/loss, val/mae"):
            trial.validated({"val/loss": 1.0, "val/mae": 2.0}, 1, is_last=False)


def test_a_stopped_trial_is_tried_again_once(tmp_path):
    with a_study(tmp_path / "s") as study:
        first = study.ask(1)
        tried = study.values(first)
        study.stopped(first, "interrupted")
        again = study.ask(1)
        assert again.number == 1
        assert study.values(again) == tried
        study.stopped(again, "interrupted")
        assert study.ask(1) is None
        assert [(t.state, t.again) for t in study.trials()] == [("failed", True), ("failed", False)]


def _train_for_ever(directory, asked):
    with a_study(directory) as study:
        study.ask(9)
        asked.set()
        time.sleep(100)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no SIGKILL")
def test_the_trial_of_a_killed_process_is_told_failed_and_tried_again(tmp_path):
    context = get_context("spawn")
    asked = context.Event()
    process = context.Process(target=_train_for_ever, args=(tmp_path / "s", asked))
    process.start()
    try:
        assert asked.wait(100)
        with a_study(tmp_path / "s") as study:
            study.finished(study.ask(2), 1.0)
            assert study.ask(2) is None  # the other one is alive
            os.kill(process.pid, signal.SIGKILL)
            process.join(30)
            again = study.ask(2)
            dead, _, now = study.trials()
            assert (dead.state, dead.problem) == ("failed", "its process has died")
            assert (now.number, now.params) == (again.number, dead.params)
    finally:
        process.kill()
        process.join()


class TestAnotherSearchIsRefused:
    @pytest.fixture
    def begun(self, tmp_path):
        with a_study(tmp_path / "s"):
            pass
        return tmp_path / "s"

    def problems(self, directory, **changes):
        with pytest.raises(UsageError) as raised, a_study(directory, **changes):
            pass
        return "\n".join(raised.value.problems)

    def test_by_its_ranges(self, begun):
        text = self.problems(begun, space=("lora.rank=int:2:16",))
        assert "--param lora.rank: int:2:16, the study has int:2:8" in text
        assert "--param training.weight_decay: not searched, the study has float:0:0.1" in text
        assert "another --study" in text

    def test_by_its_settings(self, begun):
        base = configured(LoraTrainConfig, {"loggers": {}, "training.batch_size": 8})
        text = self.problems(begun, base=base)
        assert "training.batch_size is 8, the study has 32" in text

    def test_by_its_metric_and_its_data(self, begun):
        text = self.problems(begun, metric="val/accuracy", direction="maximize")
        assert "metric is val/accuracy, the study has val/loss" in text
        assert "the dataset is another one" in self.problems(begun, inputs={"the dataset": "def"})

    def test_where_it_may_differ(self, begun):
        base = configured(LoraTrainConfig, {"loggers": {}, "runs_dir": "others", "lora.rank": 2})
        with a_study(begun, base=base):
            pass

    def test_a_directory_of_something_else(self, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        assert "holds something else" in self.problems(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
