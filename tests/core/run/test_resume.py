"""What both trainings share when they resume; that the steps are the same is tested with each."""

import pytest
import torch

from loragen.core.config import LoraTrainConfig, dump
from loragen.core.errors import DataError, UsageError
from loragen.core.run.directory import LoraManifest, checkpoint_name, write_manifest
from loragen.core.run.resume import ResumableModule, ResumePoint, newest, optimizer_state
from tests.conftest import lora_manifest


class Point(ResumePoint):
    kind, ignored_on_resume = LoraManifest, ("runs_dir",)

    def changed_inputs(self, config, manifest):
        return ["the data differ"] if manifest.seed != self.manifest.seed else []


def save(file, step, optimizer=True):
    file.parent.mkdir(exist_ok=True)
    states = [{"state": {}}] if optimizer else []
    torch.save({"global_step": step, "optimizer_states": states}, file)
    return file


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints of steps 1 to 3 and a last.ckpt of step 4."""
    write_manifest(tmp_path, lora_manifest(max_steps=4, steps=[1, 2, 3]))
    (tmp_path / "config.yaml").write_text(dump(LoraTrainConfig()), encoding="utf-8")
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints" / checkpoint_name(step), step)
    save(tmp_path / "checkpoints" / "last.ckpt", 4)
    return tmp_path


def names(run):
    return sorted(file.name for file in (run / "checkpoints").iterdir())


def test_a_run_resumes_from_its_newest_checkpoint_or_from_the_one_named(run):
    assert (Point.find(run).step, Point.find(run).checkpoint.name) == (4, "last.ckpt")
    file = run / "checkpoints" / checkpoint_name(2)
    assert (Point.find(file).step, Point.find(file).checkpoint) == (2, file)


def test_the_newest_has_the_optimizers_state_where_any_has(tmp_path):
    old, new = save(tmp_path / "a.ckpt", 1), save(tmp_path / "b.ckpt", 2, optimizer=False)
    assert newest([old, new]) == old
    old.unlink()
    assert newest([new]) == new
    assert newest([]) is None


def test_a_damaged_checkpoint_is_passed_over_unless_there_is_no_other(tmp_path, caplog):
    good, damaged = save(tmp_path / "a.ckpt", 1), tmp_path / "b.ckpt"
    damaged.write_bytes(b"half of a checkpoint")
    assert newest([good, damaged]) == good
    assert "b.ckpt" in caplog.text
    with pytest.raises(DataError, match=r"b\.ckpt"):
        newest([damaged])


def test_later_checkpoints_are_deleted(run):
    Point.find(run / "checkpoints" / checkpoint_name(2)).delete_later_checkpoints()
    assert names(run) == [checkpoint_name(1), checkpoint_name(2)]


def test_nothing_later_is_there_after_the_last(run):
    before = names(run)
    Point.find(run).delete_later_checkpoints()
    assert names(run) == before


def test_all_differences_of_settings_and_inputs_are_named_but_the_ignored_ones(run):
    point = Point.find(run)
    config = point.config.model_copy(deep=True)
    config.runs_dir = "elsewhere"
    point.check(config)
    config.seed = 3
    with pytest.raises(UsageError) as error:
        point.check(config, point.manifest.model_copy(update={"seed": 3}))
    assert [str(run) in problem for problem in error.value.problems] == [True, True]
    assert "seed" in error.value.problems[0]
    assert "the data differ" in error.value.problems[1]


def test_only_a_successful_run_at_its_last_step_is_finished(run):
    point = Point.find(run)
    config = point.config.model_copy(deep=True)
    assert not point.is_finished(config)
    point.manifest.status = "success"
    assert point.is_finished(config)
    config.seed = 3
    assert not point.is_finished(config)


def test_other_hardware_costs_a_warning(run, caplog):
    class Free(Point):
        ignored_on_resume = ("trainer.devices",)

    point = Free.find(run)
    config = point.config.model_copy(deep=True)
    config.trainer.devices = 2
    point.check(config, point.manifest)
    assert "hardware" in caplog.text


def test_a_checkpoint_without_an_optimizer_costs_a_warning(caplog):
    assert optimizer_state({"optimizer_states": [{"state": {}}]}) == {"state": {}}
    assert not caplog.records
    assert optimizer_state({}) is None
    assert "optimizer" in caplog.text


@pytest.mark.parametrize(
    "state",
    [
        {"state": None},
        {"param_groups": []},
        {"state": {}, "param_groups": []},
        {"state": {0: {"exp_avg": torch.ones(3, 2)}}},
        {"state": {0: None}},
    ],
    ids=str,
)
def test_the_state_of_another_optimizer_is_one_line(state):
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    module = ResumableModule()
    module.resumed_optimizer = {**optimizer.state_dict(), **state}
    if state == {"param_groups": []}:
        module.resumed_optimizer = state
    with pytest.raises(DataError, match="optimizer state is not that of this training") as error:
        module.load_optimizer(optimizer)
    assert "\n" not in str(error.value)


def test_the_state_of_the_same_optimizer_is_loaded_once():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    first, second = torch.optim.AdamW([weight]), torch.optim.AdamW([weight])
    weight.grad = torch.ones(2, 3)
    first.step()
    module = ResumableModule()
    module.resumed_optimizer = first.state_dict()
    module.load_optimizer(second)
    assert second.state[weight]["exp_avg"].equal(first.state[weight]["exp_avg"])
    assert module.resumed_optimizer is None
